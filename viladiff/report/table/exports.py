"""Exports of a table: table.md, table.tex and table.csv, with measured and printed numbers in separate columns."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from viladiff.core.messages import plain_cell
from viladiff.evaluation.metrics import METRICS, shown_metrics
from viladiff.report import provenance
from viladiff.report.markup import markdown
from viladiff.report.sections.training import best_epoch, shows_best
from viladiff.report.table.comparisons import LEGEND, claim_lines, comparison_grid, signed
from viladiff.report.table.long_form import to_rows
from viladiff.report.table.results import (
    Agreement,
    Difference,
    Results,
    Summary,
    difference,
    headline_sentence,
    number,
    row_name,
    summary,
    table_parts,
)
from viladiff.report.table.results import (
    paper_value as printed,
)

if TYPE_CHECKING:
    from viladiff.tables.claims import Verdict

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "±": r"$\pm$", "—": "---", "–": "--", "−": "$-$", "×": r"$\times$",
    "λ": r"$\lambda$", "τ": r"$\tau$", "Δ": r"$\Delta$", "β": r"$\beta$", "γ": r"$\gamma$", "≥": r"$\geq$",
    "≤": r"$\leq$", "→": r"$\rightarrow$", "†": r"$\dagger$", "²": "$^2$", "\n": " ", "\r": " ",
}  # fmt: skip
SPREAD = "± is the sample standard deviation over seeds (n − 1); the number of seeds is in brackets."


class Symbol(NamedTuple):
    base: str
    below: str
    above: str


def symbol(part: str) -> Symbol | None:
    """Parse ``L_feat(t)`` into the paper's parts; None for a part that is a word."""
    match = re.fullmatch(r"([A-Za-z])_([A-Za-z]+) ?(\([a-z]\))?", part)
    return Symbol(match[1], match[2], match[3] or "") if match else None


def latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def paper_text(value: object) -> str:
    """Return the number as the paper prints it; empty for a row that is not the paper's."""
    return "" if value is None else f"{value:.1f}" if isinstance(value, float | int) else "—"


def best(results: Results, column: int, metric: str) -> float | None:
    """Return the best mean of the paper's rows as printed, without controls.

    None if the paper has no such table, since the best of many alternatives is mostly luck, or one row is measured.
    """
    if not results.plan.table.printed:
        return None
    means = [summary(results.at(row, column), metric).mean for row in results.rows(control=False)]
    measured = [round(mean, 1) for mean in means if mean is not None]
    top = max if METRICS[metric].better == "higher" else min
    return top(measured) if len(measured) > 1 else None


class ExportRow(NamedTuple):
    """A line of the plain tables."""

    number: str
    label: str
    ticks: tuple[bool, ...]
    cells: tuple[tuple[Summary, bool, Difference | None, str], ...]
    """A column: measured, whether best, difference to the reference, printed."""
    control: bool
    ceiling: bool
    """Whether its runs read true masks."""


def export_rows(results: Results, metric: str) -> list[ExportRow]:
    """Return the table as numbers, the paper's rows first."""
    names, first = table_parts(results), results.reference
    tops = {column: best(results, column, metric) for column in results.plan.columns}
    out = []
    for row in results.rows():
        cells = []
        for column in results.plan.columns:
            found = summary(results.at(row, column), metric)
            gap = difference(found, summary(results.at(first, column), metric)) if row != first else None
            ranked = row in results.rows(control=False)
            top = found.mean is not None and ranked and round(found.mean, 1) == tops[column]
            cells.append((found, top, gap, paper_text(printed(results, row, column))))
        spec = results.plan.table.rows[row]
        ticks = tuple(name in spec.components for name in names)
        about = (number(results, row), row_name(results, row), ticks, tuple(cells))
        out.append(ExportRow(*about, spec.control, row in results.plan.ceilings))
    return out


def reasons(results: Results) -> list[str]:
    """Return why runs are missing, one line a reason, in the order of the table."""
    found: dict[str, list[str]] = {}
    for entry in results.entries:
        if entry.why:
            label = results.plan.table.columns[entry.cell.column].label
            row = f"row {number(results, entry.cell.row)}"
            whole = entry.state == "unavailable"
            found.setdefault(entry.why, []).append(row if whole else f"{row}, {label}, seed {entry.cell.seed}")
    return [f"{why}: {_some(list(dict.fromkeys(cells)))}" for why, cells in found.items()]


def _some(cells: Sequence[str], most: int = 6) -> str:
    return "; ".join(cells[:most]) + (f"; and {len(cells) - most} more" if len(cells) > most else "")


def agreement_text(found: Agreement) -> str:
    """Format Kendall's τ with its counts and the probability of chance."""
    if found.tau is None:
        if found.rows > 1:
            return f"{found.column}: τ is not defined, since all {found.rows} rows are equal on one side."
        return f"{found.column}: τ needs two or more rows that are both measured and printed; there are {found.rows}."
    ties = f", {found.tied} tied" if found.tied else ""
    chance = f"; a random order does at least so well {_share(found.chance)}" if found.chance is not None else ""
    return (
        f"{found.column}: τ = {found.tau:.2f} over {found.rows} rows: "
        f"{found.same} pairs in the printed order, {found.reverse} reversed{ties}{chance}."
    )


def _share(chance: float) -> str:
    if chance < 0.001:
        return "less than once in 1000 times"
    return f"in {100 * chance:.1f} % of cases" if chance < 0.1 else f"in {100 * chance:.0f} % of cases"


def to_markdown(
    results: Results,
    verdicts: Sequence[Verdict],
    agreements: Sequence[Agreement],
    command: str,
    banner: str,
    context: Sequence[str] = (),
    more: Mapping[str, Sequence[str]] = MappingProxyType({}),
    first: str = "",
    before: Mapping[str, Sequence[str]] = MappingProxyType({}),
    missing: Sequence[str] | None = None,
) -> str:
    """Return the page without its figures, for a terminal or a repository.

    ``context``: sentences without which the numbers would mislead; ``more``: sections and their lines; ``before``:
    those that stand before all others; ``first``: the first sentence, by default that of the results alone;
    ``missing``: why runs are missing, by default ``reasons`` of the results.
    """
    say = markdown
    out = [f"# {say(results.plan.table.title)}", "", say(first or headline_sentence(results)), ""]
    out += [f"**{say(banner)}**", ""] if banner else []
    out += [*(f"- {say(sentence)}" for sentence in context), ""] if context else []
    for heading, told in before.items():
        out += [f"## {heading}", "", *told, ""]
    for metric in shown_metrics(results.plan.table.metric):
        out += [
            f"## {METRICS[metric].heading()} (%)",
            "",
            *pipes(_grid(results, metric, say, "✓", "**{}**".format)),
            "",
        ]
    own = " The paper's numbers are of its own data sets and encoder; compare their order."
    out += [f"{say(SPREAD)}{own if results.plan.table.printed else ''}", ""]
    if results.plan.table.printed:
        out += ["## Agreement with the printed order", "", *(f"- {say(agreement_text(a))}" for a in agreements), ""]
    for heading, told in more.items():
        out += [f"## {heading}", "", *told, ""] if told else []
    if verdicts:
        out += ["## Claims", "", *claim_lines(verdicts, len(results.plan.table.claims)), ""]
        grid = comparison_grid(verdicts)
        out += ["### Comparisons", "", *pipes(grid), "", LEGEND, ""] if len(grid) > 1 else []
    missing = reasons(results) if missing is None else missing
    out += ["## Missing", "", *(f"- {say(reason)}" for reason in missing), ""] if missing else []
    out += ["## Notes", "", *(f"- {say(note)}" for note in notes), ""] if (notes := _notes(results)) else []
    out += ["## Provenance", "", f"- Made by: `{command.replace('`', ' ')}`"]
    out += [
        f"- {fact.name}: {say(str(fact))}{' **(mixed)**' if fact.mixed else ''}"
        for fact in provenance.run_facts(results)
    ]
    return "\n".join([*out, ""])


def _notes(results: Results) -> list[str]:
    """Return the table's notes, and those of its shown rows."""
    rows = [results.plan.table.rows[row] for row in results.rows()]
    return [*results.plan.table.notes, *(f"{row.label}: {row.note}" for row in rows if row.note)]


def _grid(
    results: Results, metric: str, say: Callable[[str], str], tick: str, bold: Callable[[str], str]
) -> list[list[str]]:
    """Return header and lines of one metric's table; printed numbers exist for the table's own metric only."""
    own = metric == results.plan.table.metric
    labels = [say(results.plan.table.columns[c].label) for c in results.plan.columns]
    printed = own and results.plan.table.printed
    encoders = own and any(row.encoder for row in results.plan.table.rows)
    best = own and shows_best(results)
    kinds = ["measured", *(["best epoch"] if best else []), "difference", *(["paper"] if printed else [])]
    head = [
        "",
        "row",
        *(["encoder (paper)"] if encoders else []),
        *(map(say, table_parts(results)) if own else []),
        *(f"{label} {kind}" for label in labels for kind in kinds),
    ]
    body = []
    for place, row in zip(results.rows(), export_rows(results, metric), strict=True):
        cells: list[str] = []
        for column, (found, top, gap, paper) in zip(results.plan.columns, row.cells, strict=True):
            text = say(str(found))
            cells += [bold(text) if top else text]
            cells += [say(str(best_epoch(results.at(place, column))))] if best else []
            cells += [say(signed(gap.mean)) if gap else "", *([say(paper)] if printed else [])]
        ticks = [tick if on else "" for on in row.ticks] if own else []
        encoder = [say(results.plan.table.rows[place].encoder)] if encoders else []
        body.append(
            [
                row.number,
                say(row.label) + (" (ours)" if row.control and not row.ceiling else ""),
                *encoder,
                *ticks,
                *cells,
            ]
        )
    return [head, *body]


def pipes(grid: Sequence[Iterable[str]]) -> list[str]:
    """Return the lines of a table in markdown; the first is its header."""
    head, *body = ["| " + " | ".join(row) + " |" for row in grid]
    return [head, "|" + " --- |" * len(list(grid[0])), *body]


def to_csv(results: Results) -> str:
    """Return ``long`` as text: a line a run and cell, empty if a number is missing."""
    return csv_text(to_rows(results))


def csv_text(rows: Sequence[Mapping[str, object]]) -> str:
    """Format lines that all have the names of the first."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]) if rows else ["number", "row", "column", "seed"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: plain_cell(value) for name, value in row.items()} for row in rows)
    return buffer.getvalue()


def to_latex(results: Results, banner: str, context: Sequence[str] = ()) -> str:
    """Render a booktabs table; printed numbers are set in grey columns headed as the paper's."""
    names, table = table_parts(results), results.plan.table
    grey, encoders = r"\textcolor{gray}{%s}", any(row.encoder for row in table.rows)
    with_best = shows_best(results)
    kinds = ["measured", *(["best epoch"] if with_best else []), r"$\Delta$"]
    kinds += [grey % "paper"] if table.printed else []
    wide = len(kinds)
    spans = [rf"\multicolumn{{{wide}}}{{c}}{{{latex(table.columns[c].label)}}}" for c in results.plan.columns]
    start = 3 + encoders + len(names)
    rules = " ".join(rf"\cmidrule(lr){{{start + wide * i}-{start + wide * (i + 1) - 1}}}" for i in range(len(spans)))
    heads = [*([grey % "Encoder"] if encoders else []), *map(_latex_part, names)]
    out = [
        "% needs \\usepackage{booktabs, amssymb, xcolor}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{latex(table.title)} {latex('— mIoU (%). ' + SPREAD)}"
        + (" Grey: as printed in the paper." if table.printed else "")
        + "".join(f" {latex(sentence)}" for sentence in context)
        + (rf" \emph{{{latex(banner)}}}" if banner else "")
        + "}",
        rf"\begin{{tabular}}{{ll{'l' * encoders}{'c' * len(names)}{'r' * wide * len(spans)}}}",
        r"\toprule",
        " & ".join(["", "", *[""] * len(heads), *spans]) + r" \\",
        rules,
        " & ".join(["", "Row", *heads, *kinds * len(spans)]) + r" \\",
        r"\midrule",
    ]
    ruled = False
    for place, row in zip(results.rows(), export_rows(results, table.metric), strict=True):
        if row.control and not ruled:
            out.append(r"\midrule")
            ruled = True
        cells: list[str] = []
        for column, (found, top, gap, paper) in zip(results.plan.columns, row.cells, strict=True):
            text = latex(str(found))
            cells += [rf"\textbf{{{text}}}" if top else text]
            cells += [latex(str(best_epoch(results.at(place, column))))] if with_best else []
            cells += [latex(signed(gap.mean)) if gap else ""]
            cells += [grey % latex(paper) if paper else ""] if table.printed else []
        ticks = [r"\checkmark" if on else "" for on in row.ticks]
        encoder = [grey % latex(table.rows[place].encoder)] if encoders else []
        out.append(" & ".join([row.number, latex(row.label), *encoder, *ticks, *cells]) + r" \\")
    return "\n".join([*out, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def _latex_part(part: str) -> str:
    found = symbol(part)
    if found is None:
        return latex(part)
    above = f"^{{{found.above}}}" if found.above else ""
    base = rf"\mathcal{{{found.base}}}" if found.base.isupper() else found.base
    return rf"${base}_{{\mathrm{{{found.below}}}}}{above}$"
