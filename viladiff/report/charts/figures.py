"""Charts: small SVG panels that follow the page's colours and width, and matplotlib's files for papers and slides."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup, escape
from PIL import Image

from viladiff.core.atomic import write_atomically
from viladiff.core.colormap import SERIES
from viladiff.core.hashing import sha256_hex
from viladiff.evaluation.metrics import METRICS
from viladiff.report.charts import differences
from viladiff.report.charts.themes import plain, save_drawn
from viladiff.report.sections.learning_curves import TERMS, Curve
from viladiff.report.table.results import Results, number, row_name, summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 260, 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 34, 8, 8, 20
_FORM = 4
"""Raised when the same numbers are drawn otherwise."""
Limits = tuple[float, float]


def colour(results: Results, column: int) -> str:
    """One a column, the same in every chart of the page."""
    return SERIES[results.plan.columns.index(column) % len(SERIES)]


def limits(curves: Sequence[Curve]) -> tuple[Limits, Limits, bool]:
    """Return the limits of steps and values, shared by all panels, and whether the values need a logarithmic axis."""
    x = (0.0, max(float(c.steps[-1]) for c in curves))
    low, high = min(float(c.low.min()) for c in curves), max(float(c.high.max()) for c in curves)
    log = low > 0 and high / low > 12
    if log:
        return x, (low / 1.1, high * 1.1), True
    margin = 0.05 * (high - low) or 0.5
    return x, (0.0 if 0 <= low < 0.5 * high else low - margin, high + margin), False


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Two to five round values inside."""
    if log:
        decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
        fine = [m * 10.0**d for d in decades for m in (1, 2, 5) if low <= m * 10.0**d <= high]
        coarse = [value for value in fine if f"{value:e}".startswith("1")]
        return coarse if len(coarse) > 2 else fine[:: max(1, len(fine) // 4)]
    rough = (high - low) / 5
    size = 10.0 ** np.floor(np.log10(rough))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= rough)
    return [float(value) for value in np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step]


def panel(curves: Sequence[Curve], colours: Sequence[str], bounds: tuple[Limits, Limits, bool], words: str) -> Markup:
    """One small chart; ``words`` are read to those who do not see it. Colours are CSS."""
    (x0, x1), (y0, y1), log = bounds
    scale = np.log10 if log else np.asarray
    bottom, span = HEIGHT - _BOTTOM, HEIGHT - _BOTTOM - _TOP

    def across(steps: np.ndarray) -> np.ndarray:
        return _LEFT + (np.asarray(steps) - x0) / ((x1 - x0) or 1) * (WIDTH - _LEFT - _RIGHT)

    def down(values: np.ndarray) -> np.ndarray:
        share = (scale(np.clip(values, y0, y1)) - scale(y0)) / (scale(y1) - scale(y0))
        return bottom - share * span

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" class="panel"><title>{escape(words)}</title>']
    for value in ticks(y0, y1, log):
        level = float(down(np.array(value)))
        parts.append(f'<path class="grid" d="M{_LEFT} {level:.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 4}" y="{level + 3:.1f}" text-anchor="end">{value:g}</text>')
    for value in ticks(x0, x1, False)[:: 2 if x1 >= 1000 else 1]:
        place = float(across(np.array(value)))
        anchor = "end" if place > WIDTH - 24 else "middle"
        parts.append(f'<text x="{place:.1f}" y="{bottom + 13}" text-anchor="{anchor}">{value:g}</text>')
    for curve, css in zip(curves, colours, strict=True):
        x, low, high = across(curve.steps), down(curve.low), down(curve.high)
        if curve.seeds > 1:
            band = _points(np.concatenate([x, x[::-1]]), np.concatenate([low, high[::-1]]))
            parts.append(f'<polygon points="{band}" fill="{escape(css)}" opacity=".2"/>')
        parts.append(f'<polyline points="{_points(x, down(curve.mean))}" stroke="{escape(css)}"/>')
    return Markup("".join([*parts, "</svg>"]))


def _points(x: np.ndarray, y: np.ndarray) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x.tolist(), y.tolist(), strict=True))


def save_figures(results: Results, curves: dict[str, list[Curve]], folder: Path) -> list[Path]:
    """Write scores and, if there are step logs, curves, as PNG and SVG; return their paths.

    A figure whose PNG was drawn from the same numbers is kept, and matplotlib, which takes longer to load than all the
    rest of a page takes to make, is not loaded for it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted: dict[str, tuple[str, Callable[[], Figure]]] = {
        "scores": (_digest(_score_numbers(results)), lambda: _scores(results)),
    }
    if "sup" in curves:
        numbers = [(c.row, c.column, c.steps.tolist(), c.mean.tolist()) for c in curves["sup"]]
        labels = [_title(results, c.row) + results.plan.table.columns[c.column].label for c in curves["sup"]]
        wanted["curves"] = _digest([numbers, labels]), lambda: _lines(results, curves["sup"], TERMS["sup"])
    written = []
    for name, (digest, draw) in wanted.items():
        paths = [folder / f"{name}.{kind}" for kind in ("png", "svg")]
        if not all(path.is_file() for path in paths) or _drawn_from(paths[0]) != digest:
            _write(draw(), paths, digest)
        written += paths
    return written


def save_differences(results: Results, folder: Path) -> dict[str, Path]:
    """Write differences to the reference row as an SVG for each theme, and as a PNG; nothing where there are none.

    The PNG has the first column alone: it is for places where a picture is scaled to a page's width. Returns paths by
    theme, and of the PNG under ``png``.
    """
    gaps = differences.gaps_of(results)
    if not gaps:
        return {}
    against, metric = row_name(results, results.reference), METRICS[results.plan.table.metric].name
    first, png = dict([next(iter(gaps.items()))]), folder / "differences.png"

    def draw() -> Figure:
        return differences.draw_differences(gaps, against, metric)

    paths = save_drawn([gaps, against, metric], draw, folder, "differences")
    digest = _digest([first, against, metric])
    if not png.is_file() or _drawn_from(png) != digest:
        _write(differences.draw_differences(first, against, metric), [png], digest)
    return {**paths, "png": png}


def _digest(numbers: object) -> str:
    return sha256_hex(json.dumps([_FORM, numbers]))


def _write(figure: Figure, paths: Sequence[Path], digest: str) -> None:
    import matplotlib

    # The PNG, which carries the digest, comes last: a kill in between has both drawn again.
    for path in reversed(paths):
        metadata = {"Software": None, "Comment": digest} if path.suffix == ".png" else {"Date": None}
        buffer = io.BytesIO()
        with matplotlib.rc_context({"svg.hashsalt": "viladiff", "svg.fonttype": "none"}):
            figure.savefig(buffer, format=path.suffix[1:], dpi=160, metadata=metadata)
        write_atomically(path, buffer.getvalue())


def _drawn_from(path: Path) -> str:
    try:
        with Image.open(path) as image:
            return str(image.info.get("Comment", ""))
    except OSError:
        return ""


def _title(results: Results, row: int) -> str:
    return f"{number(results, row)}  {row_name(results, row)}"


def _score_numbers(results: Results) -> list[object]:
    columns, metric = results.plan.columns, results.plan.table.metric
    values = [[sorted(summary(results.at(r, c), metric).values.items()) for c in columns] for r in results.rows()]
    return [
        values,
        [_title(results, r) for r in results.rows()],
        [results.plan.table.columns[c].label for c in columns],
    ]


def _figure(width: float, height: float, across: int, left: float) -> tuple[Figure, list[Axes]]:
    """Axes side by side, ``left`` inches from the edge; sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: it keeps figures and picks a display

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, across, sharey=True, squeeze=False)[0])
    figure.subplots_adjust(left / width, 0.5 / height, 1 - 0.1 / width, 1 - 0.3 / height, 0.08)
    for axis in axes:
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _with_scores(results: Results) -> tuple[list[int], list[int]]:
    """Return the rows and columns that have a score in this figure; all where there is none yet."""
    rows, columns = results.rows(), list(results.plan.columns)
    there = {(r, c) for r in rows for c in columns if summary(results.at(r, c), results.plan.table.metric).n}
    if not there:
        return rows, columns
    return [r for r in rows if any((r, c) in there for c in columns)], [
        c for c in columns if any((r, c) in there for r in rows)
    ]


def _scores(results: Results) -> Figure:
    """Draw a panel a column: seeds as dots, their mean as a bar. Rows and columns without a score are left out."""
    (rows, columns), table = _with_scores(results), results.plan.table
    labels = [plain(_title(results, row)) for row in rows]
    left = 0.4 + 0.065 * max(map(len, labels))
    width = 2.6 if len(columns) > 1 else 4.0
    figure, axes = _figure(left + width * len(columns), 0.24 * len(rows) + 0.9, len(columns), left)
    for axis, column in zip(axes, columns, strict=True):
        for place, row in enumerate(rows):
            found = summary(results.at(row, column), table.metric)
            css = "#888888" if table.rows[row].control else colour(results, column)
            axis.plot(list(found.values.values()), [place] * found.n, "o", color=css, alpha=0.5, markersize=4)
            if found.mean is not None:
                axis.plot([found.mean], [place], "|", color=css, markersize=12, markeredgewidth=2)
        if not any(summary(results.at(row, column), table.metric).n for row in rows):
            axis.set_xticks([])
        axis.set_title(plain(table.columns[column].label), fontsize=8)
        axis.set_xlabel("mIoU (%)", fontsize=8)
    axes[0].set_yticks(range(len(rows)), labels)
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    return figure


def _lines(results: Results, curves: Sequence[Curve], name: str) -> Figure:
    """Draw a panel a column, a line a row. Columns with controls alone are left out if others have more."""
    table, rows = results.plan.table, list(dict.fromkeys(x.row for x in curves))
    told = {x.column for x in curves if not table.rows[x.row].control} or {x.column for x in curves}
    columns = [c for c in results.plan.columns if c in told]
    names = {row: plain(_title(results, row)) for row in rows}
    key = 0.4 + 0.055 * max(map(len, names.values()))
    figure, axes = _figure(0.6 + 3.4 * len(columns) + key, max(3.2, 0.15 * len(rows) + 0.6), len(columns), 0.6)
    figure.subplots_adjust(right=1 - key / figure.get_figwidth())
    for axis, column in zip(axes, columns, strict=True):
        for curve in (c for c in curves if c.column == column):
            place = rows.index(curve.row)  # ten colours, then the same with another dash
            css, style = f"C{place % 10}", ("-", "--", ":", "-.")[place // 10 % 4]
            axis.plot(curve.steps, curve.mean, style, color=css, linewidth=1.2, label=names[curve.row])
        axis.set_title(plain(table.columns[column].label), fontsize=8)
        axis.set_xlabel("step", fontsize=8)
    axes[0].set_ylabel(name, fontsize=8)
    handles = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    ordered = [name for name in names.values() if name in handles]
    axes[-1].legend(
        [handles[name] for name in ordered],
        ordered,
        fontsize=6,
        frameon=False,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
    )
    if limits(curves)[2]:
        axes[0].set_yscale("log")
    return figure
