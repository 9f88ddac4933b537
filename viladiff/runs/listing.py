"""Runs as rows for people: selected, sorted, shown in full and compared; without torch."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from viladiff.config import renamed
from viladiff.config.base import did_you_mean
from viladiff.core.messages import format_value, print_text, printable
from viladiff.runs.gradient_shares import THIRDS, by_thirds
from viladiff.runs.record import RunRecord
from viladiff.runs.store import Store

COLUMNS = ("run_id", "method", "dataset", "split", "seed", "differs", "steps", "miou", "state", "when", "scale")
DEFAULT_ORDER = ("method", "dataset", "split", "seed", "run_id")
_SHOWN = ("method.name", "data.dataset", "data.split", "seed", "train.steps")
_BAR = 30


@dataclass(frozen=True)
class RunRow:
    """One run; of one that is not finished only name, state and time are known, since the record is written last."""

    run_id: str
    method: str | None
    dataset: str | None
    split: str | None
    seed: int | None
    differs: dict[str, Any]
    """What is not at its default and has no column of its own."""
    steps: int | None
    miou: float | None
    state: str
    when: str
    """UTC; empty for a published run that did not note it."""
    scale: str
    published: bool
    note: str = ""
    record: RunRecord | None = field(default=None, repr=False)

    def as_json(self) -> dict[str, Any]:
        """Return the row without the record, which ``viladiff runs show --json`` prints."""
        row = {name: value for name, value in vars(self).items() if name != "record"}
        return row


def rows(store: Store) -> list[RunRow]:
    """Return every run of the store and its layers; an empty directory is no run."""
    own = set(store.local_run_ids())
    records = store.records()
    found = [_finished(store, record, run_id in own) for run_id, record in records.items()]
    return found + [row for run_id in sorted(own - records.keys()) if (row := _unfinished(store, run_id))]


def _finished(store: Store, record: RunRecord, own: bool) -> RunRow:
    config, path = record.config, store.directory(record.run_id) / "record.json"
    own = own and path.exists()
    when = record.finished or (_time(path.stat().st_mtime) if own else "")
    differs = {
        name: value for name, value in record.changed.items() if name not in _SHOWN and not name.startswith("runtime.")
    }
    choice = (config.get("method.name"), config.get("data.dataset"), config.get("data.split"), config.get("seed"))
    return RunRow(
        record.run_id, *choice, differs, record.steps, record.miou, "done", when, record.scale, not own, "", record
    )


def _unfinished(store: Store, run_id: str) -> RunRow | None:
    directory = store.directory(run_id)
    if not os.access(directory, os.R_OK | os.X_OK):
        note = "its directory cannot be read by this user"
        return RunRow(run_id, None, None, None, None, {}, None, None, "unreadable", "", "", False, note)
    holder, failure = store.holder(run_id), store.failure(run_id)
    files = [path.stat().st_mtime for path in directory.iterdir() if not path.name.startswith(("lease-", "."))]
    if holder is not None:
        state, note = "running", str(holder)
    elif (directory / "record.json").exists():
        state, note = "damaged", "its record cannot be used; viladiff runs verify says why"
    elif failure is not None:
        at = "" if failure.step is None else f" at step {failure.step}"
        state, note = "failed", f"{failure.kind}{at}, attempt {failure.attempts}: {failure.message}"
    elif files:
        state, note = "begun", "re-run to resume from its checkpoint"
    else:
        return None
    when = _time(max(files)) if files else holder.since if holder else ""
    return RunRow(run_id, None, None, None, None, {}, None, None, state, when, "", False, note)


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


# Choosing


def select_runs(rows: Iterable[RunRow], filters: Sequence[str], state: str | None = None) -> list[RunRow]:
    """Rows where each ``field=value`` holds; a field is a column of the list or any field of the configuration.

    Raises ValueError for a word without "=" and for a field that no run has.
    """
    rows = list(rows)
    known = _fields(rows)
    wanted = []
    for word in filters:
        name, sign, text = word.partition("=")
        if not sign or not name:
            raise ValueError(f"{word!r}: write field=value, as in method.name=viladiff or seed=0")
        if name not in known and rows:
            new = renamed.FIELDS.get(name)
            told = f"renamed; write {new}" if new else f"no run has such a field{did_you_mean(name, known)}"
            raise ValueError(f"{name}: {told}")
        wanted.append((name, text))
    chosen = [row for row in rows if state in (None, row.state)]
    return [row for row in chosen if all(_has(row, name) and _is(_value(row, name), text) for name, text in wanted)]


def explain_no_match(rows: Sequence[RunRow], filters: Sequence[str], state: str | None) -> str:
    """Return the message for an empty selection: the values that the fields have."""
    for word in filters:
        name, _, text = word.partition("=")
        values = {format_value(_value(row, name), 6) for row in rows if _value(row, name) is not None}
        if text not in values:
            shown = ", ".join(sorted(values, key=_natural)[:12])
            return f"No run has {word}; {name} is one of {shown}{did_you_mean(text, values)}"
    states = ", ".join(sorted({row.state for row in rows}))
    return f"None of {len(rows)} runs is all of: {' '.join([*filters, state or ''])} (states: {states})"


def find_run(word: str, rows: Sequence[RunRow]) -> RunRow:
    """Return the run of this name or unique prefix; a path stands for its last part. Raises ValueError otherwise."""
    name = resolve_prefix(word, [row.run_id for row in rows])
    return next(row for row in rows if row.run_id == name)


def resolve_prefix(word: str, names: Collection[str]) -> str:
    """Return the only one of ``names`` that begins with ``word``. Raises ValueError if none or several do."""
    start = Path(word).name if "/" in word else word
    found = sorted(name for name in names if name.startswith(start)) if start else []
    if len(found) == 1:
        return found[0]
    if found:
        shown = ", ".join(found[:5]) + (", …" if len(found) > 5 else "")
        raise ValueError(f"ambiguous run id {word!r}: matches {shown}")
    heads = {name[: max(4, len(start))] for name in names}
    raise ValueError(
        f"unknown run id {word!r}: {len(names)} runs are in viladiff runs list{did_you_mean(start, heads)}"
    )


def finished(row: RunRow) -> RunRecord:
    """Return the row's record. Raises ValueError with the reason if there is none."""
    if row.record is None:
        raise ValueError(f"run {row.run_id}: not finished ({row.state}: {row.note}), so it has no scores")
    return row.record


def ordered(rows: Iterable[RunRow], column: str = "", reverse: bool = False) -> list[RunRow]:
    """Sort by a column of the list or a field; numbers in text count as numbers, runs without a value come last."""
    rows = list(rows)
    if column and rows and column not in _fields(rows):
        raise ValueError(f"--sort {column}: no such column{did_you_mean(column, _fields(rows))}")
    keys = (column, *DEFAULT_ORDER) if column else DEFAULT_ORDER
    out = sorted(rows, key=lambda row: [_natural(format_value(_value(row, key), 6)) for key in keys], reverse=reverse)
    return sorted(out, key=lambda row: _value(row, keys[0]) is None)


def _fields(rows: Iterable[RunRow]) -> set[str]:
    return (
        set(COLUMNS) - {"differs"} | {"published"} | {name for row in rows if row.record for name in row.record.config}
    )


def _value(row: RunRow, name: str) -> Any:
    if name in COLUMNS or name == "published":
        return getattr(row, name)
    return row.record.config.get(name) if row.record else None


def _has(row: RunRow, name: str) -> bool:
    """Return whether the run has the field at all; "none" is a value, the field of another method is not."""
    return _value(row, name) is not None or (row.record is not None and (name in COLUMNS or name in row.record.config))


def _is(value: Any, text: str) -> bool:
    if value is None or isinstance(value, bool | str):
        return format_value(value, 6) == text.strip()
    try:
        return bool(value == float(text))
    except (ValueError, TypeError):
        return format_value(value, 6) == text.replace(" ", "").strip("()[]")


def _natural(text: str) -> list[tuple[int, float, str]]:
    """Return a sort key that orders "183" before "1464"."""
    try:
        return [(0, float(text), "")]
    except ValueError:
        parts = re.split(r"(\d+)", text)
        return [(0, float(part), "") if part.isdigit() else (1, 0.0, part) for part in parts if part]


# Printing


def print_rows(rows: Sequence[RunRow]) -> None:
    """Print the list, mIoU in percent."""
    lines = []
    for row in rows:
        differs = " ".join(f"{name}={format_value(value, 6)}" for name, value in row.differs.items()) or row.note
        facts = [row.method, row.dataset, row.split, row.seed, differs, row.steps]
        when = row.when or ("published" if row.published else "")
        lines.append((row.run_id, *facts, _percent(row.miou), row.state, when, row.scale))
    say(
        [tuple("" if cell is None else str(cell) for cell in line) for line in lines],
        ("run", *COLUMNS[1:7], "mIoU %", *COLUMNS[8:]),
    )
    print_text(f"\n{len(rows)} run{'s' * (len(rows) != 1)}")


def print_run(store: Store, row: RunRow) -> None:
    """Print facts, scores of each network and stream, and a bar for each class of the headline."""
    record = row.record
    path = store.file(row.run_id, "record.json")
    where = path if row.published and path else store.directory(row.run_id)
    print_text(f"run {row.run_id}: {row.state}{', published' if row.published else ''}\n")
    facts: dict[str, Any] = {"where": where, "when": row.when, "scale": row.scale, "note": row.note}
    if record is not None:
        facts |= _facts(record)
    say([(name, format_value(value, 6)) for name, value in facts.items() if value not in ("", None, {})])
    if record is None and row.state == "unreadable":
        return
    if record is None:
        files = sorted(path for path in store.directory(row.run_id).iterdir() if path.is_file())
        say([(path.name, size(path.stat().st_size)) for path in files], ("file", "size"))
        return
    _print_changed(record)
    _print_scores(record)
    _print_shares(record)
    _print_pseudo_labels(record)
    per_class = record.scores.get(record.network, {}).get(record.stream, {}).get("per_class") or []
    print_text(f"\nIoU of each class, {record.network}/{record.stream}, in percent")
    lines = zip(record.class_names, per_class, strict=False)
    say([(name, _percent(value), "█" * round(_BAR * (value or 0.0))) for name, value in lines])


def _facts(record: RunRecord) -> dict[str, Any]:
    git = f"{record.git.get('revision', '')[:12]}{' with changes' if record.git.get('dirty') else ''}"
    wall = "unknown" if record.wall_seconds is None else f"{record.wall_seconds:.0f} s"
    per_step = "" if record.seconds_per_step is None else f"{1000 * record.seconds_per_step:.0f} ms a step"
    return {
        "mIoU %": f"{_percent(record.miou)} ({record.network}/{record.stream}, after the last of {record.steps} steps)",
        "best": record.best and f"{_percent(record.best['miou'])} at step {record.best['step']}, on the set it reports",
        "time": f"{wall}, {record.train_seconds:.0f} s of it training; {per_step}".rstrip("; "),
        "loader": ""
        if record.loader_share is None
        else f"waited for {100 * record.loader_share:.0f} % of the training",
        "memory": "" if record.peak_memory_bytes is None else size(record.peak_memory_bytes),
        "device": f"{record.device}, {record.workers} workers, {record.threads} threads",
        "precision": record.precision,
        "encoder": f"{record.encoder}, weights: {record.pretrained}",
        "captions": f"{record.captions}; read by {record.text_encoder}",
        "fingerprints": " ".join(f"{name}={value}" for name, value in record.fingerprints.items()),
        "versions": " ".join(f"{name} {value}" for name, value in record.versions.items()),
        "revision": git,
    }


def _print_changed(record: RunRecord) -> None:
    print_text("\nnon-default fields")
    say([(name, format_value(value, 6)) for name, value in record.changed.items()])


def _print_scores(record: RunRecord) -> None:
    flat = _scores(record)
    names = list(dict.fromkeys(name for scores in flat.values() for name in scores))
    print_text("\nscores, in percent")
    say([(stream, *(_score(scores.get(name)) for name in names)) for stream, scores in flat.items()], ("", *names))


def _print_shares(record: RunRecord) -> None:
    found = by_thirds(record.gradient_shares, record.steps)
    if not found:
        return
    steps = ", ".join(str(one["step"]) for one in (record.gradient_shares or {})["measured"])
    print_text("\ngradient shares, in percent, and cosines to the supervised gradient")
    lines = [
        (one.place, one.term, *map(_percent, one.shares), *("—" if c is None else f"{c:+.2f}" for c in one.cosines))
        for one in found
    ]
    say(lines, ("at", "part", *THIRDS, *(f"cos {third}" for third in THIRDS)))
    print_text(f"measured at steps {steps}, whose shares are averaged")


def _print_pseudo_labels(record: RunRecord) -> None:
    """Print a line a score, over all pixels and, if they were told apart, over edges and the rest."""
    table: dict[str, dict[str, float | None]] = {}
    for name, value in record.pseudo_labels.items():
        score, _, area = name.rpartition("/")
        score, area = (score, area) if area in ("edges", "elsewhere") else (name, "all")
        table.setdefault(score, {})[area] = value
    areas = [area for area in ("all", "edges", "elsewhere") if any(area in found for found in table.values())]
    if table:
        print_text("\npseudo-labels, in percent")
        lines = [(name, *(_percent(x[area]) if area in x else "" for area in areas)) for name, x in table.items()]
        say(lines, ("", *areas))


def diff(one: RunRecord, two: RunRecord) -> None:
    """Print the differences of two runs: fields, inputs, versions, machine; then all scores, with differences."""
    print_text(f"{one.run_id} | {two.run_id}")
    sections: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "fields": (one.config, two.config),
        "fingerprints": (one.fingerprints, two.fingerprints),
        "versions": (one.versions, two.versions),
        "revision": (one.git, two.git),
        "facts": tuple(  # type: ignore[dict-item]
            {name: getattr(record, name) for name in ("steps", "scale", "device", "workers", "threads", "captions")}
            for record in (one, two)
        ),
    }
    for title, (left, right) in sections.items():
        names = [name for name in {**left, **right} if left.get(name, "-") != right.get(name, "-")]
        if names:
            print_text(f"\n{title}")
            say([(name, format_value(left.get(name, "-"), 6), format_value(right.get(name, "-"), 6)) for name in names])
    lines = []
    left, right = _scores(one), _scores(two)
    for stream in {**left, **right}:
        pair = left.get(stream, {}), right.get(stream, {})
        for name in {**pair[0], **pair[1]}:
            a, b = (scores.get(name) for scores in pair)
            points = f"{100 * (b - a):+.2f}" if isinstance(a, float) and isinstance(b, float) else ""
            lines.append((f"{stream}/{name}", _score(a), _score(b), points))
    print_text("\nscores, in percent")
    say(lines)


def _scores(record: RunRecord) -> dict[str, dict[str, Any]]:
    """Return network/stream, score, value; without scores by class."""
    return {
        f"{network}/{stream}": {name: value for name, value in scores.items() if not isinstance(value, list | tuple)}
        for network, streams in record.scores.items()
        for stream, scores in streams.items()
    }


def _percent(value: float | None) -> str:
    return "—" if value is None else f"{100 * value:.2f}"


def _score(value: Any) -> str:
    return _percent(value) if value is None or isinstance(value, float) else str(value)


def size(count: int) -> str:
    """Format bytes in powers of 1000."""
    amount, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if amount < 1000 or unit == "TB":
            break
        amount /= 1000
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"


def say(lines: Sequence[Sequence[str]], columns: Sequence[str] = ()) -> None:
    """Print lines in columns; a terminal folds long ones, a file or pipe gets each line whole."""
    from rich.console import Console
    from rich.table import Table

    if not lines:
        return
    tty = sys.stdout.isatty()
    table = Table(*map(printable, columns or [""] * len(lines[0])), box=None, pad_edge=False, show_header=bool(columns))
    for line in lines:
        table.add_row(*map(printable, line))
    console = Console(width=None if tty else 10_000, markup=False, highlight=False)
    with console.capture() as text:
        console.print(table, no_wrap=not tty)
    print("\n".join(line.rstrip() for line in text.get().splitlines()))
