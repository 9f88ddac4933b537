"""Page section on training: optimiser steps of the rows, and which published settings they use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from viladiff.core.messages import format_value
from viladiff.report.table.results import CellRun, Results, Summary, number, row_name, summary
from viladiff.tables.recipes.recipe import load_recipe

if TYPE_CHECKING:
    from viladiff.tables.stated import Stated

BEST = (
    "Best epoch: the highest of a run's evaluations, picked on the images that it reports, so it is no estimate for "
    "others. Printed numbers of the rivals are best epochs on validation images, which are 0.35 points above the last "
    "on average over 51 logs of UniMatch-V2 (f6afb4d) and 0.55 in those of UniMatch (0324f3d); of its own rows the "
    "paper does not say. Differences, order and claims are those of the last."
)
SHARED = "Encoder, optimiser, rate, batch and crop are the table's, whatever a publication has."


def shows_best(results: Results) -> bool:
    """Return whether runs are evaluated epoch by epoch, as those behind printed numbers are, in a table of mIoU.

    Evaluations along the way have no other score.
    """
    return results.plan.table.metric == "miou" and any(
        run.changed.get("eval.every_epochs") is not None for run in results.plan.runs.values()
    )


def best_epoch(entries: Sequence[CellRun]) -> Summary:
    """Return mIoU of each run's best evaluation; it is selected on the images that it reports, unlike ``summary``."""
    found = {
        e.cell.seed: 100 * float(e.record.best["miou"])
        for e in entries
        if e.record is not None and e.record.best is not None and not (e.network or e.stream)
    }
    lacking = [e for e in entries if e.cell.seed not in found]
    why = {e.cell.seed: e.why or "not evaluated on the way" for e in lacking}
    return Summary(found, why, frozenset(e.state for e in lacking))


class SettingsRow(NamedTuple):
    """A row: what its publication sets by data set, as far as its method declares it."""

    number: str
    label: str
    runs: str
    """Settings that its runs have; empty for none."""
    lacks: str
    """Settings that they do not have, and what they have in their place."""
    yields: str
    """Settings of the protocol that all rows share, likewise: the table's go before the publication's."""
    source: str


class Length(NamedTuple):
    """A row's optimiser steps and scores, one a column."""

    number: str
    label: str
    steps: tuple[str, ...]
    last: tuple[Summary, ...]
    best: tuple[Summary, ...]


def lengths(results: Results) -> list[Length]:
    """Return all rows if runs of a column differ in length or are evaluated epoch by epoch; else none."""
    plan, table = results.plan, results.plan.table
    found = []
    for row in results.rows():
        cells = [results.at(row, column) for column in plan.columns]
        steps = tuple(_steps(results, row, column) for column in plan.columns)
        scores = [(summary(cell, table.metric), best_epoch(cell)) for cell in cells]
        about = (number(results, row), row_name(results, row), steps)
        found.append(Length(*about, tuple(last for last, _ in scores), tuple(best for _, best in scores)))
    by_column = zip(*(line.steps for line in found), strict=True)
    return found if any(len(set(steps) - {"—"}) > 1 for steps in by_column) or shows_best(results) else []


def _steps(results: Results, row: int, column: int) -> str:
    """Format ``157,350``; an em dash for a cell without a run."""
    runs = results.plan.runs
    found = {runs[name].steps for name in results.plan.run_ids(row, column) if name in runs}
    return " or ".join(f"{steps:,}" for steps in sorted(found)) or "—"


def settings_rows(results: Results) -> list[SettingsRow]:
    """Return rows whose methods declare settings for a data set of the table, in its order."""
    found = []
    for row in results.rows():
        mine = [one for one in results.plan.published if one.row == row and one.column in results.plan.columns]
        if mine:
            columns = tuple(dict.fromkeys(one.column for one in mine))
            applied = [one for one in mine if one.applied]
            other = [one for one in mine if not one.applied and not one.yields]
            yields = [one for one in mine if one.yields]
            sources = "; ".join(dict.fromkeys(one.source for one in mine))
            label = row_name(results, row)
            said = [_told(results, some, columns) for some in (applied, other, yields)]
            found.append(SettingsRow(number(results, row), label, said[0], said[1], said[2], sources))
    return found


def undeclared(results: Results) -> str:
    """Return a sentence on the rows that ``lines`` leaves out; empty if it leaves out none or all."""
    there = {line.number for line in settings_rows(results)}
    rows = [f"{number(results, row)} {row_name(results, row)}" for row in results.rows()]
    rest = [row for row in rows if row.partition(" ")[0] not in there]
    return f"No setting by data set is declared for {', '.join(rest)}." if there and rest else ""


def _told(results: Results, found: Sequence[Stated], columns: Sequence[int]) -> str:
    """Format ``method.pseudo.weight = 0.06 (1/16 (92)), 0.6 (1/8 (183))``; columns are omitted if they are all."""
    labels = {column: results.plan.table.columns[column].label for column in columns}
    by_path: dict[str, dict[str, list[int]]] = {}
    for one in found:
        values = by_path.setdefault(one.path or f"not available: {one.value}", {})
        values.setdefault(_value(one), []).append(one.column)
    said = []
    for path, values in by_path.items():
        parts = []
        for value, where in values.items():
            there = "" if len(where) == len(columns) else f"({', '.join(labels[column] for column in where)})"
            parts.append(" ".join(filter(None, [value, there])))
        said.append(f"{path} = {', '.join(parts)}" if any(values) else f"{path} {parts[0]}".rstrip())
    return "; ".join(said)


def _value(one: Stated) -> str:
    if not one.path:
        return ""
    value = format_value(one.value, 4)
    return value if one.applied else f"{value} (here {format_value(one.runs, 4)})"


def protocol_note(results: Results) -> str:
    """Return a sentence on the recipe of the page's scale; empty if it has none."""
    name = results.plan.table.scale[results.plan.scale].recipe
    if not name:
        return ""
    recipe = load_recipe(name)
    return (
        f"All rows train by the recipe {name} ({recipe.title}); `viladiff methods --recipe {name}` lists it field by "
        "field with sources. What it sets of encoder, optimiser, batch, crop, length and average of weights goes "
        "before a publication's settings; thresholds, weights of losses, warm-ups, hard pixels are the publication's."
    )


def settings_notes(results: Results) -> list[str]:
    """Return the sentences below the settings: rows without any, and whose settings all rows share."""
    return [*filter(None, [undeclared(results)]), protocol_note(results) or SHARED]


def training_markdown(results: Results) -> dict[str, list[str]]:
    """Return the sections of table.md."""
    from viladiff.report.markup import markdown

    found, long = settings_rows(results), lengths(results)
    columns = [results.plan.table.columns[c].label for c in results.plan.columns]
    settings = [
        f"- {markdown(f'{one.number} {one.label} ({one.source})')}: "
        + ". ".join(
            markdown(part)
            for part in (
                f"runs {one.runs}" if one.runs else "",
                f"not run: {one.lacks}" if one.lacks else "",
                f"yields to the protocol: {one.yields}" if one.yields else "",
            )
            if part
        )
        for one in found
    ]
    if settings or protocol_note(results):
        settings += [f"- {markdown(note)}" for note in settings_notes(results)]
    heads = ["row", *(f"{label} {kind}" for label in columns for kind in ("steps", "last", "best"))]
    grid = [heads, *([f"{one.number} {one.label}", *_cells(one)] for one in long)]
    pipes = ["| " + " | ".join(markdown(cell) for cell in row) + " |" for row in grid]
    table = [pipes[0], "|" + " --- |" * len(heads), *pipes[1:]] if long else []
    return {"Optimiser steps": table, "Published settings": settings}


def _cells(one: Length) -> list[str]:
    return [str(part) for group in zip(one.steps, one.last, one.best, strict=True) for part in group]
