"""A table of the paper as data: one TOML file says rows, columns, scales, printed numbers and claims.

Nothing here loads torch: what the fields' paths and values mean is checked by ``viladiff.study.cells``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError

from viladiff.fields import Section, nearest
from viladiff.study.toml_file import entry_name, listed, read_toml, sentence, strange_values

RESERVED = {
    "seed": "write seeds = [...] at the top, or ask for other seeds when the table is run",
    "runtime.scale": "it is the name of the scale",
}
_PATH = re.compile(r"[a-z][a-z_]*(\.[a-z][a-z_]*)*")


def _as_printed(value: object) -> object:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value == "-" or (number and 0 <= value <= 100):  # type: ignore[operator]
        return value
    raise ValueError('must be a number from 0 to 100, or "-" where the paper leaves it out')


def _as_seed(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError("a seed must be a whole number that is not negative")


Printed = Annotated[float | Literal["-"], BeforeValidator(_as_printed)]
"""A number as the paper prints it, in percent; "-" where it leaves one out."""
Seeds = Annotated[tuple[Annotated[int, BeforeValidator(_as_seed)], ...], Field(min_length=1)]
Metric = Literal[
    "miou", "boundary_iou", "trimap_miou", "pixel_accuracy", "silhouette", "davies_bouldin", "image_silhouette"
]
METRIC_NAMES: dict[str, str] = {
    "miou": "mIoU",
    "boundary_iou": "boundary IoU",
    "trimap_miou": "trimap mIoU",
    "pixel_accuracy": "pixel accuracy",
    "silhouette": "100 × silhouette coefficient by class",
    "davies_bouldin": "100 × Davies-Bouldin index",
    "image_silhouette": "100 × silhouette coefficient by image",
}
Kind = Literal[
    "superset_increases",
    "best_row",
    "worst_rows",
    "higher",
    "gain_shrinks",
    "gain_exceeds",
    "returns_diminish",
    "less_stable",
    "differs",
]

ROWS_OF: dict[str, tuple[int, int | None]] = {
    "superset_increases": (0, 0),
    "best_row": (1, 1),
    "worst_rows": (1, None),
    "higher": (2, 2),
    "gain_shrinks": (2, 2),
    "gain_exceeds": (4, 4),
    "returns_diminish": (3, None),
    "less_stable": (2, 2),
    "differs": (1, 1),
}
"""Fewest and most rows that each kind of claim names; ``viladiff.study.questions`` says what they mean."""
AMONG = ("best_row", "worst_rows", "differs")
"""Kinds that compare with all other rows, or with those in ``among``."""


class Strict(Section):
    """No number from text, no number from true, no text from numbers."""

    model_config = ConfigDict(strict=True)


class Scale(Strict):
    """What the paper's data sets become at one size of experiment."""

    datasets: dict[str, str] = Field(default_factory=dict)
    """The paper's data set to the one used here; empty uses the paper's own."""
    set: dict[str, Any] = Field(default_factory=dict)
    shared_method_fields: dict[str, Any] = Field(default_factory=dict)
    """Fields of methods, for cells whose method has them and that do not set them: one momentum for all averages."""
    published: bool = False
    """Whether cells take what their methods' publications set for the data set, where neither column nor row does."""
    seeds: Seeds | None = None
    """None takes the table's."""
    published_runs: str = ""
    """Another scale of the table, whose committed records are shown beside the runs of this one; empty for none."""
    rows: tuple[str, ...] = ()
    """Labels of those that are run when none are named, and so for columns; empty for all."""
    columns: tuple[str, ...] = ()
    substitute: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """``field=value`` of the paper's to the fields that stand in for it here, such as a list that a data set lacks."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of each run; fixed, since another count changes the last bits."""
    controls: bool = True
    """Whether rows marked ``control`` are run when no rows are named."""
    seconds_per_step: float | None = Field(None, gt=0)
    """Seconds a step, for an estimate before anything was measured; none where nobody can say."""
    seconds_overhead: float = Field(0.0, ge=0)
    """Seconds of a run outside its steps, likewise."""


class Column(Strict):
    label: str = Field(min_length=1)
    set: dict[str, Any] = Field(default_factory=dict)


class Row(Strict):
    label: str = Field(min_length=1)
    components: tuple[str, ...] = ()
    """What is on, as the paper ticks it; rows are compared by inclusion of these."""
    set: dict[str, Any] = Field(default_factory=dict)
    paper: tuple[Printed, ...] = ()
    """One a column; empty for a row that the paper does not have."""
    control: bool = False
    """A row of ours, shown below the paper's."""
    group: str = ""
    """Heading over this row and those after it that have the same."""
    encoder: str = ""
    """The encoder behind the printed numbers; those measured here are all of one encoder."""
    network: str = ""
    """Whose scores are read from the row's runs; empty for the one that a run names itself."""
    stream: str = ""
    """Likewise."""
    requires: str = ""
    """A field that has to be given before the row can be run, such as a file; until then its cells say so."""
    note: str = ""


class Claim(Strict):
    """A sentence in a form that records can decide."""

    text: str = Field(min_length=1)
    kind: Kind
    source: Literal["paper", "ours"] = "paper"
    """Whose claim it is; the two are corrected for their numbers apart."""
    metric: Metric = "miou"
    rows: tuple[str, ...] = ()
    """Labels; which of them is said to be higher depends on the kind."""
    columns: tuple[str, ...] = ()
    """Labels, in the order that the claim means; empty for all."""
    among: tuple[str, ...] = ()
    """Labels of the rows that best_row, worst_rows and differs compare with; empty for all but controls."""
    tolerance: float = Field(0.0, ge=0)
    """Points by which the higher side may fall short and the claim still hold."""
    margin: float = Field(0.0, ge=0)
    """Points by which the higher side has to be above."""


class Criterion(Strict):
    """What runs of a scale with ``published_runs`` are to reach, measured against the published ones."""

    row: str = Field(min_length=1)
    """Label."""
    above: str = ""
    """Label of the row that it is to be above."""
    deviations: float | None = Field(None, gt=0)
    """By so many standard deviations over seeds of the published runs of both rows."""
    points: float | None = Field(None, gt=0)
    """Most points between its mean and the published one."""


class Table(Strict):
    name: str
    """The file's stem."""
    title: str
    metric: Literal["miou"] = "miou"
    select: Literal["last"] = "last"
    seeds: Seeds = (0, 1, 2)
    base: dict[str, Any] = Field(default_factory=dict)
    scale: dict[str, Scale] = Field(min_length=1)
    columns: tuple[Column, ...] = Field(min_length=1)
    rows: tuple[Row, ...] = Field(min_length=1)
    claims: tuple[Claim, ...] = ()
    criteria: tuple[Criterion, ...] = ()
    notes: tuple[str, ...] = ()
    reference: str = ""
    """Label of the row that differences are taken to; empty for the first."""
    headline: str = ""
    """Label of the row that the page's first sentence is about; empty for the paper's last."""
    supervised: str = ""
    """Label of the row that sees labelled images alone, below which no printed row ought to be; empty for none."""
    page: Literal["table", "leaderboard", "clusters"] = "table"
    """``leaderboard``: also accuracy against cost, calibration, rates that were tried; ``clusters``: also features."""

    @property
    def printed(self) -> bool:
        """Whether the paper has this table."""
        return any(row.paper for row in self.rows)


class Layer(NamedTuple):
    """Fields that one place sets."""

    entry: str
    """The place, in words for a message."""
    fields: Mapping[str, object]


def table_layers(table: Table) -> list[Layer]:
    """What the table's own entries set, scales aside."""
    columns = [Layer(entry_name("columns", i, one.label), one.set) for i, one in enumerate(table.columns)]
    rows = [Layer(entry_name("rows", i, one.label), one.set) for i, one in enumerate(table.rows)]
    return [Layer("base", table.base), *columns, *rows]


# Reading


def load_table(path: Path | str) -> Table:
    """The table in a TOML file, checked but for what the paths and values of fields mean, which ``cells`` does.

    Raises ValueError with one line a fault: file, entry (rows and the like are counted from 1), value, what is allowed.
    """
    path = Path(path)
    tree = read_toml(path)
    faults = [*_unknown_at_top(tree), *strange_values(tree)]
    if not faults:
        try:
            # JSON's strict mode takes an array for a tuple, which TOML cannot write.
            table = Table.model_validate_json(json.dumps({**tree, "name": path.stem}))
        except ValidationError as error:
            faults = [sentence(item, tree, Table, SECTIONS) for item in error.errors(include_url=False)]
        else:
            kinds = (_label_faults, _row_faults, _scale_faults, _beside_faults, _set_faults, _claim_faults)
            faults = [fault for kind in kinds for fault in kind(table)]
    if faults:
        raise ValueError("\n".join(f"{path}: {fault}" for fault in dict.fromkeys(faults)))
    return table


def _unknown_at_top(tree: Mapping[str, Any]) -> Iterator[str]:
    if "name" in tree:
        yield f"name = {tree['name']!r}: a table is named by its file; remove the line"


SECTIONS: dict[str, type[Section]] = {
    "scale": Scale,
    "columns": Column,
    "rows": Row,
    "claims": Claim,
    "criteria": Criterion,
}


def _label_faults(table: Table) -> Iterator[str]:
    for kind in ("rows", "columns"):
        yield from _twice(kind, [one.label for one in getattr(table, kind)])
    yield from _twice("claims", [claim.text for claim in table.claims])
    for where, seeds in [("", table.seeds), *((f"scale.{name}.", one.seeds) for name, one in table.scale.items())]:
        if seeds is not None and len(set(seeds)) < len(seeds):
            yield f"{where}seeds = {list(seeds)}: a seed is named twice"


def _twice(kind: str, labels: Sequence[str]) -> Iterator[str]:
    for i, label in enumerate(labels):
        if label in labels[:i]:
            yield f"{entry_name(kind, i, label)}: {kind}[{labels.index(label) + 1}] is called the same"


def _row_faults(table: Table) -> Iterator[str]:
    for i, row in enumerate(table.rows):
        entry = entry_name("rows", i, row.label)
        if row.control and row.paper:
            yield f"{entry}: paper = {list(row.paper)}: a control is ours, so the paper has no numbers for it"
        elif row.paper and len(row.paper) != len(table.columns):
            yield f"{entry}: paper = {list(row.paper)}: {len(row.paper)} numbers for {len(table.columns)} columns"
        if row.requires and not _PATH.fullmatch(row.requires):
            yield f"{entry}: requires = {row.requires!r}: not a dotted path such as 'method.clip.weights'"
        if len(set(row.components)) < len(row.components):
            yield f"{entry}: components = {list(row.components)}: a component is named twice"


def _scale_faults(table: Table) -> Iterator[str]:
    """Labels and replaced values that the table does not have."""
    rows, columns = [row.label for row in table.rows], [column.label for column in table.columns]
    own = {"reference": table.reference, "headline": table.headline, "supervised": table.supervised}
    asked = [(f"{name} = {label!r}", label, rows) for name, label in own.items() if label]
    for name, one in table.scale.items():
        asked += [(f"scale.{name}: rows = {label!r}", label, rows) for label in one.rows]
        asked += [(f"scale.{name}: columns = {label!r}", label, columns) for label in one.columns]
    for said, label, known in asked:
        if label not in known:
            yield f"{said}: no such label{nearest(label, known) or '.'} {listed(known)}"
    there = {f"{path}={value}" for _, fields in table_layers(table) for path, value in fields.items()}
    for name, one in table.scale.items():
        for key in one.substitute.keys() - there:
            yield f"scale.{name}: substitute: {key!r}: nothing in the table sets this{nearest(key, there)}"


def _beside_faults(table: Table) -> Iterator[str]:
    """Scales and rows of what is compared with published runs."""
    for name, one in table.scale.items():
        other, here = one.published_runs, f"scale.{name}: published_runs = {one.published_runs!r}"
        if other and other not in table.scale:
            yield f"{here}: no such scale{nearest(other, table.scale)}. Allowed: {', '.join(table.scale)}"
        elif other and table.scale[other].published_runs:
            why = "the scale itself" if other == name else "a scale that shows published runs itself"
            yield f"{here}: {why}; name the scale that --publish runs at, such as 'digits'"
    labels = [row.label for row in table.rows]
    for i, wanted in enumerate(table.criteria):
        entry = entry_name("criteria", i, wanted.row)
        for key, label in (("row", wanted.row), ("above", wanted.above)):
            if label and label not in labels:
                yield f"{entry}: {key} = {label!r}: no such label{nearest(label, labels) or '.'} {listed(labels)}"
        if (wanted.deviations is None) == (wanted.points is None):
            yield f"{entry}: deviations = {wanted.deviations}, points = {wanted.points}: give one of the two"
        elif (wanted.deviations is None) != (not wanted.above) or wanted.above == wanted.row:
            yield f"{entry}: above = {wanted.above!r}: another row where deviations is given, and none where points is"
    if table.criteria and not any(one.published_runs for one in table.scale.values()):
        yield "criteria: no scale has published_runs, which they are measured against"


def _set_faults(table: Table) -> Iterator[str]:
    scales = [Layer(f"scale.{name}", one.set) for name, one in table.scale.items()]
    scales += [
        Layer(f"scale.{name}: shared_method_fields", one.shared_method_fields) for name, one in table.scale.items()
    ]
    scales += [
        Layer(f"scale.{name}: substitute for {key}", fields)
        for name, one in table.scale.items()
        for key, fields in one.substitute.items()
    ]
    for entry, fields in (*table_layers(table), *scales):
        for path, value in fields.items():
            here = f"{entry}: {path} = {value!r}"
            if path in RESERVED:
                yield f"{here}: not set here: {RESERVED[path]}"
            elif isinstance(value, dict):
                yield f'{here}: write the whole path in quotes, as in "{path}.{next(iter(value), "field")}" = ...'
            elif not _PATH.fullmatch(path):
                yield f"{here}: not a dotted path such as 'train.steps'"
    for name, one in table.scale.items():
        if one.threads is not None and "runtime.threads" in one.set:
            also = one.set["runtime.threads"]
            yield f"scale.{name}: threads = {one.threads} and runtime.threads = {also!r}: keep one"
        for entry, fields in table_layers(table):
            asked = fields.get("data.dataset")
            if one.datasets and asked is not None and asked not in one.datasets:
                yield (
                    f"scale.{name}: datasets = {one.datasets}: does not say what becomes of {asked!r}, "
                    f"which {entry} asks for{nearest(str(asked), one.datasets)}"
                )


def _claim_faults(table: Table) -> Iterator[str]:
    rows, columns = [row.label for row in table.rows], [column.label for column in table.columns]
    for i, claim in enumerate(table.claims):
        entry = entry_name("claims", i, claim.text)
        fewest, most = ROWS_OF[claim.kind]
        if len(claim.rows) < fewest or (most is not None and len(claim.rows) > most):
            wanted = str(fewest) if fewest == most else f"{fewest} or more"
            yield f"{entry}: rows = {list(claim.rows)}: {len(claim.rows)} rows, but {claim.kind} names {wanted}"
        named = (("rows", claim.rows, rows), ("columns", claim.columns, columns), ("among", claim.among, rows))
        for kind, asked, known in named:
            for label in asked:
                if label not in known:
                    yield f"{entry}: {kind} = {label!r}: no such label{nearest(label, known) or '.'} {listed(known)}"
            # Of two gains, the lower row of one may well be the higher one of the other.
            if len(set(asked)) < len(asked) and (kind, claim.kind) != ("rows", "gain_exceeds"):
                yield f"{entry}: {kind} = {list(asked)}: a label is named twice"
        if claim.kind == "gain_shrinks" and len(claim.columns or columns) < 2:
            yield f"{entry}: a gain shrinks from column to column, so it takes two at least"
        if claim.among and claim.kind not in AMONG:
            yield f"{entry}: among = {list(claim.among)}: only {', '.join(AMONG)} compare with other rows"
        if claim.tolerance and claim.margin:
            yield f"{entry}: tolerance = {claim.tolerance:g} and margin = {claim.margin:g}: keep one"
        if claim.kind in ("less_stable", "differs") and (claim.tolerance or claim.margin):
            yield f"{entry}: {claim.kind} takes neither tolerance nor margin"
