"""Page section on clusters of features, before and after reading text: scores and t-SNE.

Used by specs with ``page = "clusters"``; ``viladiff.evaluation.feature_clusters`` measures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from markupsafe import Markup, escape

from viladiff.core import colormap
from viladiff.core.atomic import write_atomically
from viladiff.data.formats.npz import read_arrays
from viladiff.report.markup import markdown
from viladiff.report.table.results import CellRun, Results, number, row_name
from viladiff.runs.record import RunRecord

if TYPE_CHECKING:
    from viladiff.runs.store import Store

SCORES = {
    "silhouette": "Silhouette by class (more is better)",
    "davies_bouldin": "Davies-Bouldin by class (less is better)",
    "image_silhouette": "Silhouette by image (control)",
}
STAGES = {"before": "before words are read", "after": "as masks are made of them"}
FEWEST_SEEDS = 3
SIDE = 300


class Values(NamedTuple):
    """A score by seed."""

    by_seed: dict[int, float]

    def __str__(self) -> str:
        """Return ``0.149 ± 0.010 (3)``, ``0.149 (1)`` or an em dash."""
        values = list(self.by_seed.values())
        if not values:
            return "—"
        spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
        return f"{np.mean(values):.3f}{spread} ({len(values)})".replace("-", "−")


class Paired(NamedTuple):
    """Differences within seeds; below three seeds there is neither interval nor p."""

    mean: float
    seeds: int
    half: float | None
    """Half the width of the 95 % interval of Student's t."""
    p: float | None
    """Two-sided, of a paired t test, not corrected."""

    def __str__(self) -> str:
        """Return ``+0.021 ± 0.013, p = 0.020``, with the interval after ±."""
        shown = f"{self.mean:+.3f}".replace("-", "−")
        if self.half is None or self.p is None:
            return f"{shown} ({self.seeds})"
        return f"{shown} ± {self.half:.3f}, p {'< 0.001' if self.p < 0.001 else f'= {self.p:.3f}'}"


class Score(NamedTuple):
    before: Values
    after: Values
    change: Paired | None
    """After less before, within each run."""
    gap: Paired | None
    """After less the reference row's, within each seed; none for the reference itself."""


class ClusterRow(NamedTuple):
    """A row of the table in one column of it."""

    number: str
    label: str
    column: str
    control: bool
    scores: tuple[Score, ...]
    """In the order of ``SCORES``."""


class Panel(NamedTuple):
    title: str
    about: str
    svg: Markup


class Clusters(NamedTuple):
    said: tuple[str, ...]
    lines: tuple[ClusterRow, ...]
    scores: tuple[str, ...]
    """Of the lines, in words."""
    panels: tuple[Panel, ...]
    legend: tuple[tuple[str, str], ...]
    """Name and CSS colour of each class that has tokens."""
    files: tuple[str, ...]
    """Names of the pictures below figures/."""
    wrong: tuple[str, ...]


def build_clusters(results: Results, store: Store, out: Path) -> Clusters | None:
    """Compute all values of the template; None if the spec does not request them. Writes figures below ``out``."""
    if results.plan.table.page != "clusters":
        return None
    lines = tuple(_line(results, row, column) for row in results.rows() for column in results.plan.columns)
    panels, shown, wrong = _panels(results, store)
    files = []
    for place, panel in enumerate(panels, 1):
        path = out / "figures" / f"tsne-{place}.svg"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, str(panel.svg).encode())
        files.append(path.name)
    return Clusters(
        tuple(_said(results)), lines, tuple(SCORES.values()), panels, _legend(results, shown), tuple(files), wrong
    )


# Numbers


def _line(results: Results, row: int, column: int) -> ClusterRow:
    table, reference = results.plan.table, results.reference
    scores = []
    for name in SCORES:
        after, before = (_values(results.at(row, column), f"{name}{end}") for end in ("", "_before"))
        base = _values(results.at(reference, column), name)
        gap = None if row == reference else paired(after.by_seed, base.by_seed)
        scores.append(Score(before, after, paired(after.by_seed, before.by_seed), gap))
    spec = table.rows[row]
    return ClusterRow(number(results, row), spec.label, table.columns[column].label, spec.control, tuple(scores))


def _values(entries: Sequence[CellRun], name: str) -> Values:
    found = {e.cell.seed: _scores(e.record).get(name) for e in entries if e.record is not None}
    return Values({seed: float(x) for seed, x in found.items() if x is not None and math.isfinite(x)})


def _scores(record: RunRecord) -> Mapping[str, float | None]:
    """Return the headline's cluster scores."""
    return record.scores.get(record.network, {}).get(record.stream, {})


def paired(of: Mapping[int, float], to: Mapping[int, float]) -> Paired | None:
    """Return the difference over the seeds that both have; None without one."""
    from scipy import stats

    gaps = np.array([of[seed] - to[seed] for seed in sorted(of.keys() & to.keys())])
    if not len(gaps):
        return None
    if len(gaps) < FEWEST_SEEDS:
        return Paired(float(gaps.mean()), len(gaps), None, None)
    error = float(gaps.std(ddof=1)) / math.sqrt(len(gaps))
    df = len(gaps) - 1
    p = float(gaps.mean() == 0) if error == 0 else 2 * float(stats.t.sf(abs(gaps.mean()) / error, df))
    return Paired(float(gaps.mean()), len(gaps), float(stats.t.isf(0.025, df)) * error, p)


def _said(results: Results) -> list[str]:
    """Describe the measurement from the records."""
    found = {(s.get("tokens"), s.get("token_classes")) for s in map(_scores, results.records().values())}
    counts = sorted((int(tokens), int(classes or 0)) for tokens, classes in found if tokens)
    sampled = "; ".join(f"{n:,} tokens, {n // k} of each of {k} classes" for n, k in counts if k)
    told = [
        "Captions are simulated, that is, written from the masks: they name classes that are in the image, and leave "
        "some out. With text a network is therefore told at validation what to look for, and a gain may be that and "
        "nothing else. Another image's captions, or one caption for all, show what words do that say nothing of the "
        "image; a null token shows what the block does without words: its attention then adds the same to every token, "
        "and what is left of it is its feed-forward layer."
    ]
    return [
        *(told if any("simulated" in record.captions for record in results.records().values()) else ()),
        f"{sampled or 'No tokens yet'}: drawn from the scored images by a fixed seed, the same for every run. A "
        "token's class is the one that most of its pixels have; pixels that are ignored do not count.",
        "Features are the normalised tokens that the class queries attend to, each brought to length 1; distances are "
        "Euclidean in the space of all channels, not in the plane of the pictures, whose distances mean little.",
        "Before words are read, tokens are those that enter the block of the same network. It was trained to make "
        "masks of what leaves the block, so that the change within a run does not say what text is worth; the "
        "difference to the reference, a network trained without text, does.",
        "All tokens of an image read the same words, so that text can gather them by image rather than by class. "
        "The silhouette by image, over the same tokens but those that are alone in their image, tells how far it does.",
        "± after a difference is the 95 % interval of paired differences within seeds; p is two-sided and not "
        "corrected for the number of differences. Both are of the spread over seeds, on these tokens alone. The claims "
        "are tested with Holm's correction.",
    ]


# Pictures


def _panels(results: Results, store: Store) -> tuple[tuple[Panel, ...], set[int], tuple[str, ...]]:
    """Return the panels of each row after reading the texts, for the headline before as well; classes; problems."""
    table, panels = results.plan.table, []
    shown: set[int] = set()
    wrong: list[str] = []
    rows = dict.fromkeys((results.reference, results.headline, *results.rows()))
    for row, column in ((row, column) for row in rows for column in results.plan.columns):
        found = _first(results.at(row, column), store, wrong)
        if found is None:
            continue
        entry, arrays = found
        assert entry.record is not None
        names, label = entry.record.class_names, arrays["label"].astype(int)
        shown |= set(label.tolist())
        for stage in STAGES if row == results.headline else ("after",):
            if stage in arrays:
                title = f"{number(results, row)} {row_name(results, row)}"
                title += f", {STAGES[stage]}" if row == results.headline else ""
                place = f"{table.columns[column].label}, " if len(results.plan.columns) > 1 else ""
                about = f"{place}seed {entry.cell.seed}"
                words = f"t-SNE of {len(label)} tokens of {len(set(label.tolist()))} classes, row {title}, {about}"
                panels.append(Panel(title, about, drawn(arrays[stage], label, len(names), words)))
    return tuple(panels), shown, tuple(wrong)


def _first(entries: Sequence[CellRun], store: Store, wrong: list[str]) -> tuple[CellRun, dict[str, np.ndarray]] | None:
    """Return the first seed that has a figure; add to ``wrong`` what cannot be read."""
    for entry in entries:
        path = store.file(entry.cell.run_id, "plane.npz") if entry.record is not None else None
        if path is not None and entry.record is not None:
            try:
                return entry, load(path, len(entry.record.class_names))
            except ValueError as error:
                wrong.append(f"{entry.cell.run_id}: {error}")
    return None


def load(path: Path, classes: int) -> dict[str, np.ndarray]:
    """``label`` (n,) and places (n, 2) by stage. Raises ValueError that names a file that is not so."""
    found = read_arrays(path)
    arrays = {name: found[name] for name in ("label", *STAGES) if name in found}
    label = arrays.get("label", np.empty(0))
    if label.dtype != np.uint8 or label.ndim != 1 or not len(label) or label.max() >= classes:
        raise ValueError(f"{path.name}: needs an array label, uint8 (n,), of classes below {classes}")
    for stage in STAGES:
        if stage in arrays and (arrays[stage].shape != (len(label), 2) or not np.isfinite(arrays[stage]).all()):
            raise ValueError(f"{path.name}: {stage} is {arrays[stage].shape}; must be finite {(len(label), 2)}")
    return arrays


def drawn(places: np.ndarray, label: np.ndarray, classes: int, words: str) -> Markup:
    """Draw points (n, 2) in the classes' colours, on a square; one path a class, since circles would take 100 kB."""
    low, high = places.min(0).astype(float), places.max(0).astype(float)
    at = (places - (low + high) / 2) / ((high - low).max() or 1.0) * (SIDE - 16) + SIDE / 2
    colours = colormap.class_colours(classes)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {SIDE} {SIDE}" role="img" fill="none" '
        f'stroke-linecap="round"><title>{escape(words)}</title>'
    ]
    for one in np.unique(label):
        dots = "".join(f"M{x:.0f} {y:.0f}h0" for x, y in at[label == one])
        # A darker rim, since the background's colour is near that of a page.
        parts.append(f'<path d="{dots}" stroke="#80808a" stroke-width="5"/>')
        parts.append(f'<path d="{dots}" stroke="{colormap.css(colours[one])}" stroke-width="4"/>')
    return Markup("".join([*parts, "</svg>"]))


def _legend(results: Results, shown: set[int]) -> tuple[tuple[str, str], ...]:
    record = next(iter(results.records().values()), None)
    if record is None:
        return ()
    colours = colormap.class_colours(len(record.class_names))
    return tuple((record.class_names[k], colormap.css(colours[k])) for k in sorted(shown) if k < len(colours))


# Plain text


def clusters_markdown(found: Clusters | None) -> dict[str, list[str]]:
    """Return the sections of table.md."""
    if found is None:
        return {}
    out = {"How features were measured": [f"- {markdown(text)}" for text in found.said]}
    heads = ["row", "column", "before", "after", "after − before", "to the reference"]
    for place, name in enumerate(SCORES.values()):
        grid = [heads, *(_cells(line, line.scores[place]) for line in found.lines)]
        pipes = ["| " + " | ".join(markdown(cell) for cell in row) + " |" for row in grid]
        out[name] = [pipes[0], "|" + " --- |" * len(heads), *pipes[1:]]
    return out


def _cells(line: ClusterRow, score: Score) -> list[str]:
    shown = [f"{line.number} {line.label}", line.column, str(score.before), str(score.after)]
    return [*shown, *(str(one) if one else "—" for one in (score.change, score.gap))]
