"""A sweep's page: verdict on fresh seeds first, then what was searched, each comparison at one budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2
from markupsafe import Markup, escape

from viladiff.record import write_atomically
from viladiff.report.figures import HEIGHT, WIDTH, ticks
from viladiff.report.palette import SERIES
from viladiff.study.finals import Contest, Finalist, contests, scores
from viladiff.study.samples import Records
from viladiff.study.space import Dimension
from viladiff.study.sweep import Sweep
from viladiff.study.sweeps import Row, best_so_far, importances, rows, rungs, toml
from viladiff.study.trials import Trial, ranked

HERE = Path(__file__).parent
_LEFT, _RIGHT, _TOP, _BOTTOM = 38, 10, 8, 20


class Dot(NamedTuple):
    """A place in a chart, with its spread."""

    x: float
    y: float
    low: float
    high: float
    colour: str
    words: str
    joined: bool = False
    """Whether a line leads to it from the dot before."""


class Axis(NamedTuple):
    low: float
    high: float
    log: bool = False
    names: tuple[str, ...] = ()
    """Of the places 0, 1, ... on an axis of choices."""


def render_sweep(
    sweep: Sweep,
    scale: str,
    trials: Sequence[Trial],
    found: Sequence[Finalist],
    records: Records,
    steps: Sequence[int],
    out: Path,
    *,
    select: str,
    command: str,
    again: str,
) -> Path:
    """Writes index.html and winner.toml under ``out``; returns the path of index.html.

    ``again`` trains the winner's first run again; ``command`` goes on with the sweep.
    """
    shown = rows(trials, records, steps[-1])
    best = ranked(list(trials))
    out.mkdir(parents=True, exist_ok=True)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    text = environment.get_template("sweep.html.j2").render(
        css=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        sweep=sweep,
        scale=scale,
        peeked=select == "val",
        rows=shown,
        steps=list(steps),
        finals=[_final(one, records, len(sweep.finals)) for one in found],
        contests=[_said(one) for one in contests(found, records)],
        slices=[(path, slice_(sweep, path, shown, best)) for path in sweep.space] if best else [],
        printed=[(curve.label, _printed(sweep.space[curve.field], curve)) for curve in sweep.paper],
        history=_history(trials) if best else None,
        time=_time(shown),
        rungs=rungs(trials, steps),
        importances=_importances(sweep, trials, steps),
        winner=toml(best[0].point) if best else "",
        command=command,
        again=again,
        last=lambda path: path.rpartition(".")[2],
        short=lambda value: f"{value:.4g}" if isinstance(value, float) else str(value),
    )
    write_atomically(out / "index.html", text.encode())
    if best:
        write_atomically(out / "winner.toml", toml(best[0].point).encode())
    return out / "index.html"


# Numbers


def _final(one: Finalist, records: Records, wanted: int) -> dict[str, Any]:
    values = list(scores(one, records).values())
    mean = math.fsum(values) / len(values) if values else None
    sd = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)) if mean and len(values) > 1 else None
    return {"label": one.label, "trial": one.trial, "point": one.point, "n": len(values), "wanted": wanted} | {
        "mean": mean,
        "sd": sd,
    }


def _said(one: Contest) -> dict[str, Any]:
    verdict = {"shown": "better", "reversed": "worse", "open": "not told apart"}[one.outcome]
    return {**vars(one), "verdict": verdict, "p_shown": min(one.p, one.p_reversed)}


def _importances(
    sweep: Sweep, trials: Sequence[Trial], steps: Sequence[int]
) -> list[tuple[int, str, Mapping[str, float]]]:
    """(step, how, share by field) wherever enough trials came; a space of one dimension has nothing to share out."""
    if len(sweep.space) < 2:
        return []
    kinds: dict[str, Literal["ped_anova", "fanova"]] = {"PED-ANOVA": "ped_anova", "fANOVA": "fanova"}
    found = [(step, how, importances(trials, sweep.space, step, kind)) for step in steps for how, kind in kinds.items()]
    return [(step, how, shares) for step, how, shares in found if shares is not None]


# Charts


def slice_(sweep: Sweep, path: str, shown: Sequence[Row], best: Sequence[Trial]) -> Markup:
    """Completed trials along one dimension: mean and range over seeds; the best one and the paper's stand out."""
    dimension = sweep.space[path]
    dots = []
    for row in shown:
        if row.state != "complete" or row.mean is None or row.rank is None:
            continue
        colour = SERIES[1] if row.number == best[0].number else SERIES[3] if row.origin == "paper" else SERIES[0]
        who = "best, " if row.number == best[0].number else "the paper's value, " if row.origin == "paper" else ""
        words = f"trial {row.number} ({who}{row.seeds} seeds): {path} = {row.point[path]}, {row.mean:.2f}"
        dots.append(
            Dot(_place(dimension, row.point[path]), row.mean, row.low or row.mean, row.high or row.mean, colour, words)
        )
    return chart(dots, _axis(dimension), f"mIoU of completed trials along {path}")


def _place(dimension: Dimension, value: Any) -> float:
    return float(dimension.choices.index(value)) if dimension.choices else float(value)


def _axis(dimension: Dimension) -> Axis:
    if dimension.choices:
        return Axis(-0.5, len(dimension.choices) - 0.5, names=tuple(map(str, dimension.choices)))
    low, high = (float(end) for end in dimension.ends)
    return Axis(low, high, dimension.log)


def _printed(dimension: Dimension, curve: Any) -> Markup:
    places = [
        (_place(dimension, at), float(miou)) for at, miou in zip(curve.at, curve.miou, strict=True) if miou != "-"
    ]
    dots = [
        Dot(x, y, y, y, SERIES[3], f"{curve.label}: {curve.field} = {x:g}, {y:g} (printed)", i > 0)
        for i, (x, y) in enumerate(places)
    ]
    return chart(dots, _axis(dimension), f"{curve.label}: numbers that the paper prints along {curve.field}")


def _history(trials: Sequence[Trial]) -> Markup:
    best = best_so_far(trials)
    dots = [
        Dot(float(number), mean, mean, mean, SERIES[2], f"trial {number}: best so far, {mean:.2f}", i > 0)
        for i, (number, mean) in enumerate(best)
    ]
    return chart(dots, Axis(0.0, max(1.0, float(len(trials) - 1))), "Best completed trial so far")


def _time(shown: Sequence[Row]) -> Markup | None:
    dots = [
        Dot(row.seconds / 60, row.mean, row.mean, row.mean, SERIES[0], f"trial {row.number}: {row.seconds:.0f} s")
        for row in shown
        if row.seconds is not None and row.mean is not None and row.rank is not None
    ]
    if not dots:
        return None
    return chart(dots, Axis(0.0, max(dot.x for dot in dots) * 1.05 or 1.0), "mIoU against minutes of training")


def chart(dots: Sequence[Dot], axis: Axis, words: str) -> Markup:
    """Dots with their spread; hovering names each."""
    low, high = min((dot.low for dot in dots), default=0.0), max((dot.high for dot in dots), default=1.0)
    margin = 0.08 * (high - low) or 0.5
    low, high, bottom = low - margin, high + margin, HEIGHT - _BOTTOM
    warp = math.log if axis.log else float

    def across(x: float) -> float:
        return _LEFT + (warp(x) - warp(axis.low)) / (warp(axis.high) - warp(axis.low)) * (WIDTH - _LEFT - _RIGHT)

    def down(y: float) -> float:
        return bottom - (y - low) / (high - low) * (bottom - _TOP)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" class="panel"><title>{escape(words)}</title>']
    for value in ticks(low, high, False):
        parts.append(f'<path class="grid" d="M{_LEFT} {down(value):.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 4}" y="{down(value) + 3:.1f}" text-anchor="end">{value:g}</text>')
    named = [(float(i), name) for i, name in enumerate(axis.names)]
    named = named or [(one, f"{one:g}") for one in ticks(axis.low, axis.high, axis.log)]
    for place, name in named:
        parts.append(f'<text x="{across(place):.1f}" y="{bottom + 13}" text-anchor="middle">{escape(name)}</text>')
    for before, dot in zip([None, *dots], dots, strict=False):
        x, y = across(dot.x), down(dot.y)
        if dot.joined and before is not None:
            start = f"{across(before.x):.1f},{down(before.y):.1f}"
            parts.append(f'<polyline points="{start} {x:.1f},{y:.1f}" stroke="{dot.colour}"/>')
        if dot.high > dot.low:
            ends = f"{x:.1f},{down(dot.low):.1f} {x:.1f},{down(dot.high):.1f}"
            parts.append(f'<polyline points="{ends}" stroke="{dot.colour}" opacity=".5"/>')
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{dot.colour}"><title>{escape(dot.words)}</title></circle>'
        )
    return Markup("".join([*parts, "</svg>"]))
