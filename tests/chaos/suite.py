"""Faults at durable writes: each happens to a command, the same command runs again, and all must be as without it.

``python -m chaos.suite`` in the folder ``tests``, or ``make chaos``, makes all of them; results are appended to a file
of lines, and what stands in it is not done again. ``hook`` says where a fault happens, ``targets`` to which command.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from chaos.children import CLONE_NEWNS, Child, may_unshare, unshare
from chaos.hook import MS_PRIVATE, MS_REC, PLACES, mount
from chaos.targets import TARGETS, collect_garbage, contents
from chaos.through_ray import COMMANDS, FILES, VICTIMS, strike, whole

KINDS = ("kill", "torn", "full disk", "EIO", "read-only", "clock", "container", "two hosts", "SIGSTOP")
STOPPED = 120.0
"""Seconds of a SIGSTOP, really waited."""
IDLE = ("container", "two hosts", "SIGSTOP")
"""Kinds that wait for heartbeats most of their time, so that many go on at once."""
EVERYWHERE = ("kill", "torn")
"""Kinds that come at each place of each file; of the others one place of each file, in turn."""
DEAR = ("table", "sweep")
"""Commands that take seconds: one place of each file for every kind."""
DRAWN = ("page", "figure", "page's table")


class Fault(NamedTuple):
    """One fault: what, where, at which file of which command, and the seed that its other choices are drawn from."""

    kind: str
    place: str
    target: str
    file: str
    seed: int

    @property
    def key(self) -> str:
        """Its name in the file of results."""
        return f"{self.kind}/{self.place}/{self.target}/{self.file}/{self.seed}"


class Undisturbed(NamedTuple):
    """A command without a fault."""

    events: list[tuple[str, str, int]]
    """Place, kind of file and its bytes, in order."""
    contents: dict[str, str]

    def times(self, place: str, file: str) -> int:
        """How often the command comes to a place of a file; of a page, which a thread writes, surely."""
        found = sum(event[:2] == (place, file) for event in self.events)
        return max(1, found // 2) if file in DRAWN else found

    def size(self, file: str) -> int:
        return max((size for _, kind, size in self.events if kind == file), default=0)


def undisturbed(target: str, root: Path) -> Undisturbed:
    """Run a command twice; what is not equal both times, which are times of day, is not compared.

    Raises RuntimeError if it fails.
    """
    from chaos import hook

    found: list[dict[str, str]] = []
    for name in ("one", "two"):
        here, notes = root / name / "w", root / f"{name}.json"
        here.mkdir(parents=True)

        def run(here: Path = here, notes: Path = notes) -> int:
            prepare(here)
            counting = hook.install({"root": str(here)})
            status = TARGETS[target](here)
            notes.write_text(json.dumps({"events": counting.seen, "modules": list(sys.modules)}))
            return status

        child = Child(run)
        if child.wait():
            raise RuntimeError(f"{target}: failed without a fault: {child.said()}")
        Child(partial(_collect, here)).wait()
        found.append(contents(here))
        told = json.loads(notes.read_text())
        _load(told["modules"])
    assert found[0].keys() == found[1].keys(), sorted(set(found[0]) ^ set(found[1]))
    same = {name: digest if digest == found[1][name] else "" for name, digest in found[0].items()}
    return Undisturbed([tuple(event) for event in told["events"]], same)


def _load(modules: Iterable[str]) -> None:
    """Load what a child had to load, once for all later ones; not Ray, which starts threads."""
    for name in modules:
        if name not in sys.modules and not name.startswith(("ray", "viladiff.cluster.ray", "__")):
            with suppress(Exception):
                importlib.import_module(name)


def prepare(root: Path) -> None:
    """The surroundings of a command in a child."""
    torch.set_num_threads(1)
    os.environ["VILADIFF_CACHE"] = str(root.parent / "cache" if os.environ.get("CHAOS_COLD") else _cache())


def _cache() -> Path:
    return Path(os.environ.get("CHAOS_CACHE", "/tmp/viladiff-chaos-cache"))


def _collect(root: Path) -> int:
    collect_garbage(root)
    return 0


def perform(fault: Fault, plain: Undisturbed, work: Path) -> dict[str, Any]:
    """Make the fault happen, run the command again, compare; return the line for the report."""
    began, root = time.monotonic(), work / "w"
    root.mkdir(parents=True)
    disk = work if fault.kind == "full disk" and _small_disk(work) else None
    root.mkdir(exist_ok=True)
    draw = random.Random(fault.key)
    at = {"torn": "during", "full disk": "before" if fault.place == "during" else fault.place}
    told = {
        **fault._asdict(),
        "root": str(root),
        "nth": draw.randint(1, max(1, plain.times(at.get(fault.kind, fault.place), fault.file))),
        "size": plain.size(fault.file),
        "marker": f"{work}.happened",
        "disk": disk and str(disk),
        **({"place": "during", "tear": fault.place} if fault.kind == "torn" else {}),
    }
    line: dict[str, Any] = {**fault._asdict(), "nth": told["nth"]}
    try:
        if fault.kind in VICTIMS:
            line["first"], line["again"] = strike(fault.kind, told, fault.target, work)
        else:
            line["first"] = _disturb(fault, told, root)
            (work / "ballast").unlink(missing_ok=True)
            line["again"] = _again(fault, root)
        line["happened"] = os.path.exists(told["marker"])
        Child(partial(_collect, root)).wait()
        line["differs"] = _differences(plain.contents, contents(root))
        line["good"] = bool(line["happened"] and not line["differs"] and line["again"]["status"] == 0)
    except Exception:
        line |= {"good": False, "error": traceback.format_exc()[-1500:]}
    finally:
        Path(told["marker"]).unlink(missing_ok=True)
        if disk is not None:
            subprocess.run(["umount", str(work)], check=False)
    if line["good"]:
        for part in ("first", "again"):
            line[part].pop("said", None)
        shutil.rmtree(work, ignore_errors=True)
    return {**line, "seconds": round(time.monotonic() - began, 1)}


def _small_disk(work: Path) -> bool:
    """Whether a small file system of its own could be put there."""
    try:
        mount("tmpfs", work, "tmpfs", 0, "size=96m")
    except OSError:
        return False
    (work / "w").mkdir()
    return True


def _run(target: str, root: Path) -> Callable[[], int]:
    def run() -> int:
        prepare(root)
        return TARGETS[target](root)

    return run


def _disturb(fault: Fault, told: dict[str, Any], root: Path) -> dict[str, Any]:
    """The run with the fault, until its end. Raises RuntimeError for a traceback, and for another end than is due."""
    run = _run(fault.target, root)
    if fault.kind == "container":
        child = Child(run, told, host="first")
        if child.at_the_place(240):
            child.kill()
        child.wait()
    elif fault.kind == "two hosts":
        child = Child(run, told, host="first")
        found = child.at_the_place(240)
        second = Child(run, host="second")
        if found:
            time.sleep(0.3 * (fault.seed % 4))
            child.go_on()
        _fine(second, "second", second.wait(400), (0, 2))
        _fine(child, "first", child.wait(400), (0, 2))
        return {"status": child.status, "second": second.status, "said": child.said()[-300:]}
    elif fault.kind == "SIGSTOP":
        return _stop(fault, told, run)
    else:
        child = Child(run, told)
        _fine(child, "first", child.wait(), (-9,) if fault.kind in ("kill", "torn") else (0, 1, 2))
    return {"status": child.status, "said": child.said()[-600:]}


def _stop(fault: Fault, told: dict[str, Any], run: Callable[[], int]) -> dict[str, Any]:
    """Stop the first for two minutes, beside a second: on the same machine by even seeds, else in a container."""
    child = Child(run, told)
    if not child.stopped(240):
        return {"status": child.status, "said": child.said()[-600:]}
    began = time.monotonic()
    second = Child(run, host="second" if fault.seed % 2 else "")
    while time.monotonic() - began < STOPPED:
        second.ended()
        time.sleep(0.5)
    os.kill(child.pid, 18)
    _fine(child, "first", child.wait(400), (0, 1, 2))
    _fine(second, "second", second.wait(400), (0, 2))
    return {"status": child.status, "second": second.status, "said": child.said()[-600:]}


def _fine(child: Child, name: str, status: int, due: Sequence[int]) -> None:
    said = child.said()
    if status not in due or ("Traceback" in said and "page could not be written" not in said):
        raise RuntimeError(f"{name}: exit status {status}, expected {due}: {said[-1200:]}")


def _again(fault: Fault, root: Path) -> dict[str, Any]:
    """The same command after the fault; in another container where the first was in one."""
    contained = fault.kind in ("container", "two hosts")
    child = Child(_run(fault.target, root), host="third" if contained else "")
    status = child.wait(400)
    return {"status": status, **({"said": child.said()[-600:]} if status else {})}


def _differences(wanted: dict[str, str], found: dict[str, str]) -> list[str]:
    lost = [f"lost: {name}" for name in sorted(wanted.keys() - found.keys())]
    more = [f"left over: {name}" for name in sorted(found.keys() - wanted.keys())]
    other = [f"other: {name}" for name in sorted(wanted.keys() & found.keys()) if wanted[name] not in ("", found[name])]
    return lost + more + other


def plan(profiles: dict[str, Undisturbed], seed: int, least: int = 5) -> list[Fault]:
    """List the faults: each kind at each kind of file, and ``least`` of each kind and place."""
    where: dict[str, str] = {}  # a kind of file is that of the first command that writes it
    for target, plain in profiles.items():
        for event in plain.events if target in TARGETS else ():
            where.setdefault(event[1], target)
    files = [(target, file) for file, target in where.items()]
    faults: list[Fault] = []
    for number, kind in enumerate(KINDS):
        places = []
        for turn, file in enumerate(files):
            options = [place for place in PLACES if possible(kind, place, *file, profiles)]
            every = kind in EVERYWHERE and file[0] not in DEAR
            taken = options if every else [options[(turn + number) % len(options)]] if options else []
            places += [(file, place) for place in taken]
        faults += [Fault(kind, place, *file, seed) for file, place in places]
        for place in PLACES:
            there = [file for file, at in places if at == place]
            more = [file for file in files if file[0] not in DEAR and possible(kind, place, *file, profiles)]
            random.Random(f"{seed} {kind} {place}").shuffle(more)
            for turn in range(max(0, least - len(there)) if more else 0):
                faults.append(Fault(kind, place, *more[turn % len(more)], seed + 1 + turn))
    faults += through_ray(profiles, seed, least)
    # Two of a kind differ where the seed's parity decides (the direction of a clock, the container of a second).
    faults = [one._replace(seed=2 * one.seed + zlib.crc32(one.key.encode()) % 2) for one in faults]
    random.Random(seed).shuffle(faults)
    return faults


def through_ray(profiles: dict[str, Undisturbed], seed: int, least: int) -> list[Fault]:
    """List the kills of Ray's processes: each at each place, at files and commands in turn."""
    targets = [target for target in COMMANDS if target in profiles]
    faults = []
    for number, kind in enumerate(VICTIMS if targets else ()):
        for turn in range(least):
            for at, place in enumerate(PLACES):
                file = FILES[(turn + at) % len(FILES)]
                faults.append(Fault(kind, place, targets[(turn + number + at) % len(targets)], file, seed + turn))
    return faults


def possible(kind: str, place: str, target: str, file: str, profiles: dict[str, Undisturbed]) -> bool:
    """Whether the command comes to this place of this file; a file that is linked has no data that tear."""
    at = "during" if kind == "torn" else place
    there = any(event[:2] == (at, file) for event in profiles[target].events)
    if kind == "torn" and file == "previous checkpoint":
        return False
    return there


def matrix(lines: Iterable[dict[str, Any]], column: str) -> str:
    """Counts of good and all faults by kind and another field, as text."""
    every, good = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for line in lines:
        cell = line["kind"], line[column]
        every[cell] += 1
        good[cell] += line["good"]
    columns = sorted({cell[1] for cell in every}, key=lambda name: (PLACES.index(name) if name in PLACES else 9, name))
    kinds = list(dict.fromkeys(cell[0] for cell in sorted(every)))
    rows = [["", *columns]]
    for kind in kinds:
        cells = [f"{good[kind, one]}/{every[kind, one]}" if every[kind, one] else "-" for one in columns]
        rows.append([kind, *cells])
    if len(columns) > 3:
        rows = [list(row) for row in zip(*rows, strict=True)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return "\n".join("  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)) for row in rows)


class Results:
    """The file of lines, one a fault that has been done; what was bad is done again, and the last line counts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found: dict[str, dict[str, Any]] = {}
        if path.exists():
            for text in path.read_text().splitlines():
                with suppress(ValueError):
                    self._note(json.loads(text))

    @property
    def lines(self) -> list[dict[str, Any]]:
        return list(self._found.values())

    def has(self, fault: Fault) -> bool:
        return bool(self._found.get(fault.key, {}).get("good"))

    def add(self, line: dict[str, Any]) -> None:
        self._note(line)
        with self.path.open("a+b") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            torn = file.read(1) not in (b"", b"\n")  # by a kill of the suite
            file.write(b"\n" * torn + json.dumps(line).encode() + b"\n")

    def _note(self, line: dict[str, Any]) -> None:
        self._found[Fault(*(line[name] for name in Fault._fields)).key] = line


def run_all(faults: Sequence[Fault], profiles: dict[str, Undisturbed], work: Path, results: Results, idle: int) -> None:
    """Do the faults that have no result: ``idle`` of those that wait at once, of the others one at a time."""
    left = [fault for fault in faults if not results.has(fault)]
    waiting = [fault for fault in left if fault.kind in IDLE]
    rays = [fault for fault in left if fault.kind in VICTIMS]
    busy = [fault for fault in left if fault not in waiting and fault not in rays]
    live: list[tuple[Child, Fault, Path]] = []
    while waiting or busy or rays or live:
        counts = Counter(fault.kind for _, fault, _ in live)
        several = sum(counts[kind] for kind in IDLE)
        through = sum(counts[kind] for kind in VICTIMS)
        rooms = idle - several, 1 - (counts.total() - several - through), 1 - through
        for queue, room in zip((waiting, busy, rays), rooms, strict=True):
            if queue and room > 0:
                fault, place = queue.pop(0), Path(tempfile.mkdtemp(dir=work))
                place.rmdir()
                live.append((Child(partial(_performed, fault, profiles, place)), fault, place))
        for entry in [entry for entry in live if entry[0].ended()]:
            live.remove(entry)
            _hear(*entry, results)
        time.sleep(0.05)


def _performed(fault: Fault, profiles: dict[str, Undisturbed], place: Path) -> int:
    line = perform(fault, profiles[fault.target], place)
    place.with_suffix(".json").write_text(json.dumps(line))
    return 0


def _hear(child: Child, fault: Fault, place: Path, results: Results) -> None:
    child.wait()
    said = place.with_suffix(".json")
    if said.exists():
        line = json.loads(said.read_text())
        said.unlink()
    else:
        line = {**fault._asdict(), "good": False, "error": child.said()[-1500:], "seconds": 0}
    results.add(line)
    print(
        f"{len(results.lines):4} {'good' if line['good'] else 'BAD '} {line['seconds']:6.1f} s  {fault.key}", flush=True
    )
    if not line["good"]:
        print(json.dumps(line, indent=1), flush=True)


def profiled(targets: Iterable[str], work: Path) -> dict[str, Undisturbed]:
    """The commands without a fault."""
    found = {}
    for name in targets:
        here = work / f"plain-{name.replace(' ', '-')}"
        if name in TARGETS:
            found[name] = undisturbed(name, here)
        else:
            events = [("before", file, 0) for file in FILES for _ in range(1 if file == "record" else 3)]
            found[name] = Undisturbed(events, whole(name, here))
    return found


def report(results: Results, to: Path, seed: int) -> int:
    """Print the two matrices and write the report; return how many faults were bad."""
    lines = sorted(results.lines, key=lambda line: (line["kind"], line["place"], line["target"], line["file"]))
    bad = [line for line in lines if not line["good"]]
    print(f"\n{matrix(lines, 'place')}\n\n{matrix(lines, 'file')}\n")
    print(f"{len(lines)} faults, {len(lines) - len(bad)} good; seed {seed}; report: {to}")
    kept = [{name: line.get(name) for name in (*Fault._fields, "nth", "good", "seconds")} for line in lines]
    texts = [
        json.dumps(one | {"first": line.get("first", {}).get("status")}) for one, line in zip(kept, lines, strict=True)
    ]
    head = {"seed": seed, "count": len(lines), "good": len(lines) - len(bad)}
    to.write_text(json.dumps(head)[:-1] + ', "faults": [\n' + ",\n".join(texts) + "\n]}\n")
    return len(bad)


def main(words: Sequence[str] | None = None) -> int:
    """The command; returns 1 if any fault was bad."""
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=26)
    parser.add_argument("--results", type=Path, default=Path("runs/chaos.jsonl"), help="lines of what has been done")
    parser.add_argument("--report", type=Path, default=Path("runs/chaos.json"))
    parser.add_argument("--kinds", nargs="*", default=[*KINDS, *VICTIMS])
    parser.add_argument("--targets", nargs="*", default=[*TARGETS, *COMMANDS])
    parser.add_argument("--only", nargs="*", metavar="KIND/PLACE/COMMAND/FILE", help="these faults and no others")
    parser.add_argument("--most", type=int, default=10**6, help="faults at most in this call")
    parser.add_argument("--idle", type=int, default=8, help="faults that wait for heartbeats at once")
    parser.add_argument("--summary", action="store_true", help="make no faults; print and write what has been done")
    args = parser.parse_args(words)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    results = Results(args.results)
    if args.summary:
        return int(report(results, args.report, args.seed) > 0)
    if not may_unshare():
        print("chaos: needs namespaces; run it as root", file=sys.stderr)
        return 2
    unshare(CLONE_NEWNS)
    mount("", Path("/"), "", MS_REC | MS_PRIVATE)
    with tempfile.TemporaryDirectory(prefix="viladiff-chaos-", ignore_cleanup_errors=True) as folder:
        os.environ.setdefault("CHAOS_CACHE", str(Path(folder) / "cache"))
        profiles = profiled(args.targets, Path(folder))
        faults = [one for one in plan(profiles, args.seed) if one.kind in args.kinds][: args.most]
        if args.only:
            faults = [Fault(*name.split("/"), args.seed) for name in args.only]
        print(f"{len(faults)} faults, of which {sum(map(results.has, faults))} are done", flush=True)
        run_all(faults, profiles, Path(folder), results, args.idle)
    return int(report(results, args.report, args.seed) > 0)


if __name__ == "__main__":
    raise SystemExit(main())
