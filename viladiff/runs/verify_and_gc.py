"""Verification of runs on disk, and garbage collection; both only read, ``remove`` alone deletes."""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from viladiff.config.base import ConfigError, unflatten
from viladiff.core.atomic import abandoned, abandoned_draft, writer_gone
from viladiff.core.messages import one_line, shown
from viladiff.core.source_digest import plan_stem
from viladiff.runs.record import RunRecord, load_record
from viladiff.runs.run_name import PLACES, hashed
from viladiff.runs.store import RUN_ID, Store

CHECKPOINTS = ("checkpoint.pt", "checkpoint.prev.pt")
ATTEMPT_NOTES = ("failure.json", "hang.txt", "traceback.txt")
_DAMAGED = re.compile(r"[0-9a-f]{16}-\S+")
_PLAN = re.compile(r"plan-[0-9a-f-]+\.json")
_IMPORT = re.compile(r"\.import-(\d+)-(?:([0-9a-f]{8})-)?\S+")


class Finding(NamedTuple):
    """One file that was looked at."""

    path: Path
    run_id: str
    good: bool
    text: str


class Garbage(NamedTuple):
    """A file or directory that nothing needs any more."""

    path: Path
    why: str
    size: int
    """Bytes that removing it frees; a second name of a file that was counted is 0."""


def verify(store: Store, wanted: Collection[str] | None = None) -> Iterator[Finding]:
    """Check every record and checkpoint against its checksum and recompute each run's name; None means all runs.

    A record is good where its configuration matches its name, which authenticates no score. A run of an older revision
    is good: its numbers are what they were, only a table of today would run it again.
    torch is loaded when the first sound record is met. Nothing is moved or changed.
    """
    files = [store.directory(run_id) / "record.json" for run_id in store.local_run_ids()]
    for path in [*filter(_there, files), *store.layer_files()]:
        mine = path.parent.parent == store.root
        try:
            record = load_record(path)
        except ValueError as error:
            # Which run a damaged file of a layer was is unknown, so it is always told.
            if wanted is None or not mine or path.parent.name in wanted:
                yield Finding(path, path.parent.name if mine else "", False, str(error))
            continue
        run_id = path.parent.name if mine else record.run_id
        if wanted is not None and run_id not in wanted:
            continue
        if run_id != record.run_id:
            yield Finding(path, run_id, False, f"is the record of another run, {record.run_id}")
        elif why := contradiction(record):
            yield Finding(path, run_id, False, f"contradicts its name or itself: {why}")
        else:
            yield Finding(path, run_id, True, _revision(record))
    for run_id in store.local_run_ids():
        if wanted is None or run_id in wanted:
            yield from _checkpoints(store.directory(run_id), run_id)


def contradiction(record: RunRecord) -> str:
    """Return how a record contradicts its name or itself; empty if it does not. Loads torch.

    ``viladiff.runs.record.mismatch`` binds changed fields to the name. This asks for fields of ``config`` that are
    neither among them nor at their defaults, in records of today's revisions, since defaults of older ones are not
    known; and whether ``miou`` is that of the scores and ``steps`` what ``train.steps`` asks for.
    """
    headline = record.scores.get(record.network, {}).get(record.stream, {}).get("miou")
    if record.miou != headline:
        where = one_line(f"{record.network}, {record.stream}", 100)
        return f"miou is {record.miou}, and {headline} among the scores of {where}"
    if (asked := record.config.get("train.steps")) is not None and asked != record.steps:
        return f"steps is {record.steps}, and train.steps {shown(asked)}"
    from viladiff.methods import METHODS
    from viladiff.runs.config import CORE_REVISION, defaults

    method = METHODS.get(str(record.changed.get("method.name")))
    if method is None or (record.core_revision, record.method_revision) != (CORE_REVISION, method.revision):
        return ""
    try:
        plain = defaults(str(record.changed.get("data.dataset")), str(record.changed["method.name"]))
    except ConfigError:
        return ""
    for path, value in plain.items():
        if path in record.config and path not in record.changed and not path.startswith(PLACES):
            there = record.config[path]
            if hashed(path, there) != hashed(path, value):
                return f"{path} is {shown(there)} in config, {value!r} by default, and not among the changed fields"
    return ""


def current_name(record: RunRecord) -> str | None:
    """Return the run's name under today's revisions; None if a field is gone or no longer allowed."""
    from viladiff.runs.config import RunConfig, run_id

    try:
        return run_id(RunConfig(**unflatten(record.config)), record.fingerprints)
    except ConfigError:
        return None


def _revision(record: RunRecord) -> str:
    name = current_name(record)
    if name == record.run_id:
        return "configuration matches name"
    told = f"older revision, today's name would be {name}" if name else "older fields"
    return f"configuration matches name; stale: {told}"


def _checkpoints(directory: Path, run_id: str) -> Iterator[Finding]:
    for path in (directory / name for name in CHECKPOINTS):
        if not _there(path):
            continue
        from viladiff.runs.checkpoint import load_file

        try:
            state = load_file(path)
            yield Finding(path, run_id, True, f"readable, at step {state.get('step', '?')}")
        except FileNotFoundError:
            continue
        except (ValueError, OSError) as error:
            yield Finding(path, run_id, False, one_line(str(error)))


def _there(path: Path) -> bool:
    """Return whether there is such a file, or something that this user cannot look at."""
    try:
        return stat.S_ISREG(path.stat().st_mode) or path.is_dir()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True


def garbage(
    store: Store, keep_checkpoints: bool = False, pages: Path | None = None, cache: Path | None = None
) -> list[Garbage]:
    """Return what ``viladiff runs gc`` removes; never a readable record, never a file of a running run.

    ``pages``, ``cache``: directories of reports and of the cache, of which only half-written files and folders are
    listed.
    """
    found: list[tuple[Path, str]] = [
        (path, "lease of a process that is gone" if "lease-" in path.name else "left half written")
        for path in store.stale_files()
    ]
    plans = store.root / "plans"
    folders = [plans, *(folder for root in (pages, cache) if root for folder in [root, *_below(root)])]
    found += [(path, "left half written") for folder in folders for path in abandoned(folder)]
    found += [(path, "left half written") for path in _below(cache) if abandoned_draft(path)] if cache else []
    found += [
        (path, "plan by other code") for path in _entries(plans, _PLAN) if not path.name.startswith(plan_stem() + "-")
    ]
    found += _replaced(store.root / "replaced", keep_checkpoints)
    found += [(path, "left by an import") for path in _entries(store.root, _IMPORT) if _abandoned_import(path)]
    found += [(path, "damaged, set aside") for path in _entries(store.root / "damaged", _DAMAGED)]
    for run_id in filter(lambda one: _finished(store, one), store.local_run_ids()):
        names = [(name, "note of an attempt, beside a finished run") for name in ATTEMPT_NOTES]
        names += [] if keep_checkpoints else [(name, "checkpoint of a finished run") for name in CHECKPOINTS]
        found += [(path, why) for name, why in names if (path := store.directory(run_id) / name).is_file()]
    seen: set[tuple[int, int]] = set()
    return [Garbage(path, why, _size(path, seen)) for path, why in found]


def _replaced(folder: Path, keep_checkpoints: bool) -> Iterator[tuple[Path, str]]:
    """Of runs that ``--restart`` has set aside: the networks of finished ones, and all of the others."""
    for run in sorted(path for path in folder.glob("*/*") if path.is_dir() and RUN_ID.fullmatch(path.name)):
        if not (run / "record.json").exists():
            yield run, "unfinished, replaced"
        elif not keep_checkpoints:
            yield from ((run / name, "checkpoint of a replaced run") for name in CHECKPOINTS if (run / name).is_file())


def remove(item: Garbage) -> None:
    """Delete the item; ignore what another process has deleted."""
    if item.path.is_dir() and not item.path.is_symlink():
        shutil.rmtree(item.path, ignore_errors=True)
    else:
        item.path.unlink(missing_ok=True)


def _finished(store: Store, run_id: str) -> bool:
    """Return whether a run is finished, without the store, which would set a damaged record aside."""
    try:
        return load_record(store.directory(run_id) / "record.json").run_id == run_id and store.holder(run_id) is None
    except ValueError:
        return False


def _entries(folder: Path, names: re.Pattern[str]) -> list[Path]:
    try:
        return [folder / name for name in sorted(os.listdir(folder)) if names.fullmatch(name)]
    except FileNotFoundError:
        return []


def _below(root: Path) -> list[Path]:
    """Return the folders below a directory, but for links, which lead to what is not ours, and drafts' own folders."""
    folders = (path for path in root.rglob("*") if path.is_dir() and not path.is_symlink())
    return [path for path in folders if not path.parent.name.startswith(".")]


def _abandoned_import(path: Path) -> bool:
    writer = _IMPORT.fullmatch(path.name)
    try:
        return writer is not None and writer_gone(int(writer[1]), writer[2] or "", path.stat().st_mtime)
    except FileNotFoundError:
        return False


def _size(path: Path, seen: set[tuple[int, int]]) -> int:
    total = 0
    for file in [path, *(path.rglob("*") if path.is_dir() and not path.is_symlink() else ())]:
        stat = file.lstat()
        if (stat.st_dev, stat.st_ino) not in seen and not file.is_dir():
            seen.add((stat.st_dev, stat.st_ino))
            total += stat.st_size
    return total
