"""Captioning of a whole data set on disk: remaining images, parts that survive a kill, and the final file.

FILE.parquet is the result; FILE.parquet.parts holds finished parts. A part is written under another name and renamed,
so that a kill costs at most one part. The same command resumes; images whose caption failed are tried again.
"""

from __future__ import annotations

import io
import json
import secrets
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from viladiff.core.atomic import sync_directory, write_atomically
from viladiff.core.messages import errors_name

if TYPE_CHECKING:
    from viladiff.text.captioning.blip2 import CaptionerSpec, ImageRef

SCHEMA = pa.schema(
    [
        ("image", pa.string()),
        ("prompt", pa.string()),
        ("text", pa.string()),
        ("model", pa.string()),
        ("revision", pa.string()),
        ("seconds", pa.float64()),
        ("error", pa.string()),
    ]
)


class CaptioningJob(NamedTuple):
    """The images, the model and the output file of a captioning job."""

    dataset: str
    """A built-in data set; empty where the pictures are files."""
    pictures: tuple[ImageRef, ...]
    who: CaptionerSpec
    out: Path

    @property
    def parts(self) -> Path:
        """Directory of what is done."""
        return self.out.with_name(f"{self.out.name}.parts")


class State(NamedTuple):
    """The progress of a job."""

    rows: pa.Table
    """All that is done, failures left out."""
    todo: tuple[ImageRef, ...]


def pictures(source: str) -> tuple[str, tuple[ImageRef, ...]]:
    """Return the name and images of a built-in data set, or of a directory in any known layout (the name is empty).

    Raises ValueError if there are none, or the first has other channels or another depth than captioning looks at.
    """
    from viladiff.data.sources.digits import VARIANTS
    from viladiff.text.captioning.blip2 import ImageRef

    if source in VARIANTS:
        sizes = VARIANTS[source].sizes()
        names = [f"{part}/{place}" for part, size in sizes.items() for place in range(size)]
        return source, tuple(ImageRef(name, name) for name in names)
    if not Path(source).expanduser().is_dir():
        known = ", ".join(VARIANTS)
        raise ValueError(f"{source!r}: is neither a directory nor a built-in data set ({known})")
    from viladiff.data.files.images import read_image
    from viladiff.data.sources.detect import open_tree

    tree, _ = open_tree(source)
    first = next(iter(tree.images.values()))
    try:
        read_image(first)
    except ValueError as error:
        if "data." in str(error):  # which names a field that captioning has not
            raise ValueError(
                f"{first}: captions are of red, green and blue in 8 bits, and this file has other numbers; write such "
                f"pictures with the same names to another folder, and caption that ({str(error).split(': ')[1][:80]})"
            ) from error
    return "", tuple(ImageRef(name, str(path)) for name, path in tree.images.items())


def state(job: CaptioningJob) -> State:
    """Return what is done and what remains.

    Raises ValueError for a file or parts that another model wrote, or that are damaged, and for a file of captions from
    another source.
    """
    if job.out.suffix != ".parquet":
        raise ValueError(f"--out {str(job.out)!r}: captions are written as Parquet: name it .parquet")
    note = job.parts / "job.json"
    with errors_name(note):
        other = note.is_file() and json.loads(note.read_text(encoding="utf-8")) != _terms(job.who)
    if other:
        raise ValueError(f"{job.parts}: is of another model or prompts; finish that first, remove it, or change --out")
    files = [job.out] if job.out.is_file() else []
    files += sorted(job.parts.glob("part-*.parquet")) if job.parts.is_dir() else []
    done = pa.concat_tables([SCHEMA.empty_table(), *map(_read, files)])
    strange = sorted({*zip(done["model"].to_pylist(), done["revision"].to_pylist(), strict=True)})
    prompts = set(done["prompt"].to_pylist())
    if strange and (strange != [(job.who.model, job.who.revision)] or not prompts <= set(job.who.prompts)):
        raise ValueError(
            f"{job.out}: has captions of {', '.join(f'{a} {b}' for a, b in strange)} for {', '.join(sorted(prompts))}, "
            f"not of {job.who.model} {job.who.revision} for {', '.join(job.who.prompts)}; name another file with --out"
        )
    sound = done.filter(pc.is_valid(done["text"]))
    count: dict[str, int] = {}
    for image in sound["image"].to_pylist():
        count[image] = count.get(image, 0) + 1
    wanted = len(job.who.prompts)
    return State(sound, tuple(one for one in job.pictures if count.get(one.image, 0) < wanted))


def begin(job: CaptioningJob) -> None:
    """Create the directory of parts and record its job. Raises ValueError if it cannot be written."""
    try:
        job.parts.mkdir(parents=True, exist_ok=True)
        write_atomically(job.parts / "job.json", json.dumps(_terms(job.who)).encode())
    except OSError as error:
        raise ValueError(f"{job.parts}: cannot be written ({error.strerror or error}); name another --out") from error


def write_part(job: CaptioningJob, tables: Sequence[pa.Table]) -> None:
    """Write these rows as one part."""
    write_atomically(job.parts / f"part-{secrets.token_hex(8)}.parquet", _bytes(pa.concat_tables(tables)))


def finish(job: CaptioningJob) -> pa.Table:
    """Write the whole table, failures among it, in the order of images and prompts, and remove its parts; return it."""
    files = [job.out] if job.out.is_file() else []
    files += sorted(job.parts.glob("part-*.parquet"))
    rows: dict[tuple[str, str], dict[str, object]] = {}
    for row in pa.concat_tables([SCHEMA.empty_table(), *map(_read, files)]).to_pylist():
        key = (row["image"], row["prompt"])
        if key not in rows or rows[key]["text"] is None:
            rows[key] = row
    images = {one.image: place for place, one in enumerate(job.pictures)}
    prompts = {prompt: place for place, prompt in enumerate(job.who.prompts)}
    order = sorted(rows, key=lambda key: (images.get(key[0], len(images)), key[0], prompts[key[1]]))
    table = pa.Table.from_pylist([rows[key] for key in order], schema=SCHEMA)
    whole = job.parts / job.out.name  # beside the parts, with which all that a kill leaves of it goes away
    write_atomically(whole, _bytes(table))
    whole.replace(job.out)
    sync_directory(job.out.parent)
    shutil.rmtree(job.parts)
    return table


def failures(table: pa.Table) -> dict[str, str]:
    """Return images without a caption, each with the reason."""
    lost = table.filter(pc.is_valid(table["error"]))
    return dict(zip(lost["image"].to_pylist(), lost["error"].to_pylist(), strict=True))


def rows_table(rows: Iterable[tuple[object, ...]]) -> pa.Table:
    """Build a table from rows in the order of SCHEMA."""
    return pa.Table.from_pylist([dict(zip(SCHEMA.names, row, strict=True)) for row in rows], schema=SCHEMA)


def _terms(who: CaptionerSpec) -> dict[str, object]:
    return {"model": who.model, "revision": who.revision, "prompts": list(who.prompts), "longest": who.longest}


def _bytes(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def _read(path: Path) -> pa.Table:
    try:
        table = pq.read_table(path)
        return table.select(SCHEMA.names).cast(SCHEMA)
    except (pa.ArrowException, KeyError) as error:
        raise ValueError(f"{path}: is damaged or was not written by `viladiff caption`; remove it") from error
