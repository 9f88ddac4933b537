"""Mutators of bytes and of structure: each makes one odd input of a sound one, the same for the same random numbers."""

from __future__ import annotations

import copy
import gzip
import hashlib
import io
import json
import re
import struct
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

from viladiff.runs.checkpoint import MAGIC, VERSION
from viladiff.runs.record import checksum
from viladiff.runs.run_name import Content, run_name

DEEP, HUGE = "@@DEEP@@", "@@HUGE@@"
"""Stand for what no writer of JSON writes: lists in lists, and a number of thousands of digits."""
ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    255,
    256,
    2**31,
    2**63,
    2**64,
    -(2**63),
    10**30,
    0.5,
    -0.0,
    1e308,
    1e-320,
    float("nan"),
    float("inf"),
    "",
    " ",
    "0",
    "none",
    "true",
    "x" * 3000,
    "\x1b[31mred",
    "a\nb",
    "a\r",
    "\u202eevil",
    "\ud800",
    "\0",
    "é",
    "ß…",
    "../../etc/passwd",
    "/",
    "~",
    "1e999",
    "<script>",
    "=1+1",
    [],
    {},
    [[]],
    {"a": 1},
    ["voc"],
    [1, "a", None],
    {"": {"": []}},
    [0] * 300,
    DEEP,
    HUGE,
)
TOKENS = (
    "",
    "..",
    "/",
    "\\",
    "\0",
    "\x1b[2J",
    "\u2028",
    "\ufeff",
    "é",
    "x" * 2000,
    "#",
    '"',
    "'",
    ",",
    "\t",
    "=",
    "[",
    "{",
    "None",
    "255",
    "256",
    "-1",
    "1e9",
    "9" * 5000,
    "nan",
    "\ud800",
    "a.b",
    "images/one.png",
    "1 2 3 cat",
)
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF)
Mutator = Callable[[Random, bytes], bytes]


def bytes_changed(rng: Random, data: bytes) -> bytes:
    """Change some bytes of any file."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at, much = rng.randrange(len(out) + 1), rng.choice((1, 1, 2, 4, 16, 64))
        match rng.randrange(8):
            case 0 if out:
                out[at % len(out)] ^= 1 << rng.randrange(8)
            case 1 if out:
                out[at % len(out)] = rng.choice((0, 1, 0x20, 0x22, 0x2F, 0x7F, 0x80, 0xFF))
            case 2:
                del out[at : at + much]
            case 3:
                out[at:at] = out[at : at + much]
            case 4:
                out[at:at] = rng.randbytes(much)
            case 5:
                del out[at:]
            case 6:
                wide = rng.choice("HIQ")
                raw = struct.pack(rng.choice("<>") + wide, rng.choice(NUMBERS) & (256 ** struct.calcsize(wide) - 1))
                out[at : at + len(raw)] = raw
            case _:
                out[at : at + much] = rng.randbytes(much)
    return bytes(out)


# Trees


def places(tree: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [way]
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in pairs:
        found += places(value, (*way, key))
    return found


def at(tree: Any, way: tuple[Any, ...]) -> Any:
    for key in way:
        tree = tree[key]
    return tree


def tree_changed(rng: Random, tree: Any) -> Any:
    """Change one value of a tree of dicts and lists, its key, or where it is."""
    tree = copy.deepcopy(tree)
    ways = places(tree)
    way = rng.choice(ways)
    if not way:
        return (
            rng.choice(ODD)
            if rng.random() < 0.1
            else {**tree, rng.choice(TOKENS): rng.choice(ODD)}
            if isinstance(tree, dict)
            else [tree]
        )
    parent, key = at(tree, way[:-1]), way[-1]
    match rng.randrange(9):
        case 0:
            del parent[key]
        case 1:
            parent[key] = [parent[key]]
        case 2:
            parent[key] = {rng.choice(TOKENS): parent[key]}
        case 3 if isinstance(parent, dict):
            parent[f"{key}{rng.choice(TOKENS)}"] = parent.pop(key)
        case 4:
            parent[key] = copy.deepcopy(at(tree, rng.choice(ways)))
        case 5 if isinstance(parent[key], str):
            old = parent[key]
            cut = rng.randrange(len(old) + 1)
            parent[key] = old[:cut] + rng.choice(TOKENS) + old[cut:]
        case 6 if isinstance(parent, dict):
            parent[f"{key}.{rng.choice(('a', 'b', 'name', ''))}"] = rng.choice(ODD)
        case _:
            parent[key] = copy.deepcopy(rng.choice(ODD))
    return tree


def changed_often(rng: Random, tree: Any) -> Any:
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        tree = tree_changed(rng, tree)
    return tree


def written(text: str, rng: Random) -> bytes:
    """JSON text as bytes, with what stands for odd values put in."""
    deep = rng.choice((40, 300, 1200, 60_000))
    kind = rng.choice(("[]", "{}"))
    nested = "[" * deep + "]" * deep if kind == "[]" else '{"a":' * deep + "1" + "}" * deep
    text = text.replace(f'"{DEEP}"', nested).replace(f'"{HUGE}"', "9" * rng.choice((400, 5000)))
    return text.encode("utf-8", "surrogatepass")


def json_changed(rng: Random, data: bytes) -> bytes:
    if rng.random() < 0.25:
        return bytes_changed(rng, data)
    return written(json.dumps(changed_often(rng, json.loads(data)), indent=1, ensure_ascii=rng.random() < 0.5), rng)


def jsonl_changed(rng: Random, data: bytes) -> bytes:
    if rng.random() < 0.3:
        return lines_changed(rng, data)
    rows = [json.loads(line) for line in data.splitlines()]
    for _ in range(rng.choice((1, 2))):
        place = rng.randrange(len(rows))
        rows[place] = tree_changed(rng, rows[place])
    return b"".join(written(json.dumps(row) + "\n", rng) for row in rows)


def record_changed(rng: Random, data: bytes) -> bytes:
    """Change a record, and often seal it again, so that what is behind the checksum and the name is reached."""
    if rng.random() < 0.15:
        return bytes_changed(rng, data)
    tree = changed_often(rng, json.loads(data))
    if isinstance(tree, dict) and rng.random() < 0.85:
        tree.pop("checksum", None)
        try:
            if rng.random() < 0.7:
                fields = tree["config"], tree["changed"]
                if rng.random() < 0.5:
                    fields[0].update(fields[1])
                how = fields[0]["seed"], fields[0]["train.precision"], bool(fields[0].get("train.tf32"))
                content = Content(tree["core_revision"], tree["method_revision"], fields[1], *how, tree["fingerprints"])
                tree["run_id"] = run_name(content)
            tree["checksum"] = checksum(tree)
        except (KeyError, TypeError, ValueError, AttributeError):
            tree["checksum"] = "0"
    return written(json.dumps(tree, indent=1), rng)


# Text


def lines_changed(rng: Random, data: bytes) -> bytes:
    if rng.random() < 0.15:
        return bytes_changed(rng, data)
    lines = data.decode("utf-8", "replace").split("\n")
    for _ in range(rng.choice((1, 1, 2, 5))):
        place = rng.randrange(len(lines))
        match rng.randrange(8):
            case 0 if len(lines) > 1:
                del lines[place]
            case 1:
                lines.insert(place, rng.choice(lines))
            case 2:
                lines.insert(place, rng.choice(TOKENS))
            case 3:
                words = re.split(r"(\W+)", lines[place])
                words[rng.randrange(len(words))] = rng.choice(TOKENS)
                lines[place] = "".join(words)
            case 4:
                cut = rng.randrange(len(lines[place]) + 1)
                lines[place] = lines[place][:cut] + rng.choice(TOKENS) + lines[place][cut:]
            case 5:
                lines[place] += rng.choice(("\r", " ", "\t", "\0")) + rng.choice(TOKENS)
            case 6:
                lines = lines * rng.choice((2, 50)) if len(lines) < 200 else lines
            case _:
                rng.shuffle(lines)
    return "\n".join(lines).encode("utf-8", rng.choice(("surrogatepass", "replace")))


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))} = {_toml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, bool | None):
        return str(value).lower() if value is not None else "2026-01-31"
    return json.dumps(value) if isinstance(value, str) else str(value)


def toml_changed(rng: Random, data: bytes) -> bytes:
    if rng.random() < 0.25:
        return lines_changed(rng, data)
    tree = changed_often(rng, tomllib.loads(data.decode()))
    if not isinstance(tree, dict):
        return written(_toml(tree), rng)
    return written("\n".join(f"{json.dumps(str(key))} = {_toml(value)}" for key, value in tree.items()) + "\n", rng)


# Containers


def zip_members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as packed:
        return {name: packed.read(name) for name in packed.namelist()}


def zipped(members: list[tuple[str, bytes]], rng: Random, stored: bool = False) -> bytes:
    out = io.BytesIO()
    how = zipfile.ZIP_STORED if stored else rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(out, "w", how) as packed:
        for name, content in members:
            packed.writestr(zipfile.ZipInfo(name), content, how)
    return out.getvalue()


def zip_changed(rng: Random, data: bytes) -> bytes:
    """Change a member of a zip archive: its content, name, number; or the archive's own bytes."""
    if rng.random() < 0.3:
        return bytes_changed(rng, data)
    members = [*zip_members(data).items()]
    place = rng.randrange(len(members))
    name, content = members[place]
    match rng.randrange(6):
        case 0:
            members[place] = (f"{name[:-4]}{rng.choice(TOKENS)}{name[-4:]}".replace("\ud800", "x"), content)
        case 1:
            members.append((name, content))
        case 2:
            del members[place]
        case 3 if content.startswith(b"\x93NUMPY"):
            members[place] = (name, npy_changed(rng, content))
        case _:
            members[place] = (name, bytes_changed(rng, content))
    return zipped(members, rng, stored=rng.random() < 0.7)


def npy_changed(rng: Random, data: bytes) -> bytes:
    """Change an array's header, or any of its bytes."""
    if rng.random() < 0.4:
        return bytes_changed(rng, data)
    length = struct.unpack("<H", data[8:10])[0]
    shape = rng.choice(
        ("(3, 4)", "(10**9, 10)", "(99999999999, 3)", "(-1, 4)", "()", "(0,)", "(2,)*9", "(1e9,)", "'a'", "((((3))))")
    )
    kind = rng.choice(("|u1", "<f4", "<f8", "|O", "<U9", "<M8[s]", ">i8", "<c16", "|V9", "?", "[('a', '<i4')]", "<u2"))
    kind = kind if kind.startswith("[") else f"'{kind}'"
    text = f"{{'descr': {kind}, 'fortran_order': {rng.choice(('False', 'True', '3'))}, 'shape': {shape}, }}"
    if rng.random() < 0.2:
        text = rng.choice(("(" * 900, "{" * 900, "[" * 9000, "1" * 9000, "\0" * 9))
    raw = text.encode().ljust(length - 1)[: max(length - 1, len(text))] + b"\n"
    return data[:8] + struct.pack("<H", len(raw)) + raw + data[10 + length :]


def sealed(content: bytes) -> bytes:
    """A checkpoint whose trailer is right for whatever it holds."""
    return content + struct.pack("<8sIQ32s", MAGIC, VERSION, len(content), hashlib.sha256(content).digest())


def checkpoint_changed(rng: Random, data: bytes) -> bytes:
    if rng.random() < 0.2:
        return bytes_changed(rng, data)
    return sealed(zip_changed(rng, data[:-52]))


def safetensors_changed(rng: Random, data: bytes) -> bytes:
    if rng.random() < 0.3:
        return bytes_changed(rng, data)
    length = struct.unpack("<Q", data[:8])[0]
    head = written(json.dumps(changed_often(rng, json.loads(data[8 : 8 + length]))), rng)
    return struct.pack("<Q", len(head)) + head + data[8 + length :]


def tar_members(data: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar.getmembers()}  # type: ignore[union-attr]


def tarred(members: list[tuple[str, bytes, bytes]], form: int = tarfile.PAX_FORMAT) -> bytes:
    """Members are name, type and content."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(content)
            tar.addfile(info, io.BytesIO(content))
    return gzip.compress(out.getvalue(), 1, mtime=0)


def archive_changed(rng: Random, data: bytes) -> bytes:
    """Change a member of an archive of runs, often with sums that fit; its blocks; or the packed bytes."""
    kind = rng.random()
    if kind < 0.15:
        return bytes_changed(rng, data)
    if kind < 0.4:
        raw = bytearray(gzip.decompress(data))
        place = 512 * rng.randrange(len(raw) // 512)
        raw[place : place + 512] = bytes_changed(rng, bytes(raw[place : place + 512]))
        if rng.random() < 0.7:  # with the block's own sum
            head = raw[place : place + 512]
            head[148:156] = b" " * 8
            raw[place + 148 : place + 156] = b"%06o\0 " % sum(head)
        return gzip.compress(bytes(raw), 1, mtime=0)
    found = tar_members(data)
    sums = json.loads(found.pop("sums.json"))
    members = [(name, tarfile.REGTYPE, content) for name, content in found.items()]
    place = rng.randrange(len(members))
    name, _, content = members[place]
    mutator = record_changed if name.startswith("r") else jsonl_changed if name.startswith("s") else zip_changed
    match rng.randrange(7):
        case 0:
            members[place] = (name + rng.choice(TOKENS).replace("\ud800", "x"), tarfile.REGTYPE, content)
        case 1:
            members.append(members[place])
        case 2:
            del members[place]
        case 3:
            members[place] = (
                name,
                rng.choice((b"0", b"1", b"2", b"3", b"5", b"7", b"L", b"K", b"x", b"g", b"S")),
                content,
            )
        case _:
            members[place] = (name, tarfile.REGTYPE, mutator(rng, content))
    if rng.random() < 0.85:
        sums = {one: hashlib.sha256(there).hexdigest() for one, _, there in members}
    listed = json_changed(rng, json.dumps(sums).encode()) if rng.random() < 0.15 else json.dumps(sums).encode()
    return tarred(
        [*members, ("sums.json", tarfile.REGTYPE, listed)], rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))
    )


MUTATORS: dict[str, Mutator] = {
    "bytes": bytes_changed,
    "json": json_changed,
    "jsonl": jsonl_changed,
    "record": record_changed,
    "lines": lines_changed,
    "toml": toml_changed,
    "zip": zip_changed,
    "npy": npy_changed,
    "checkpoint": checkpoint_changed,
    "safetensors": safetensors_changed,
    "archive": archive_changed,
}
