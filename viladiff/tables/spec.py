"""The spec of a table of the paper, from one TOML file: rows, columns, scales, printed numbers and claims.

Nothing here loads torch: ``viladiff.tables.cells`` checks the paths and values of fields.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, ConfigDict, Field

from viladiff.config.base import Section
from viladiff.config.toml_file import entry_name
from viladiff.evaluation.metrics import METRICS

RESERVED = {
    "seed": "write seeds = [...] at the top, or ask for other seeds when the table is run",
    "runtime.scale": "it is the name of the scale",
}
_PATH = re.compile(r"[a-z][a-z_]*(\.[a-z][a-z_]*)*")


def _as_printed(value: object) -> object:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value == "-" or (number and 0 <= value <= 100):  # type: ignore[operator]
        return value
    raise ValueError('must be a number from 0 to 100, or "-" where the paper omits it')


def _as_seed(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError("a seed must be a whole number that is not negative")


PaperValue = Annotated[float | Literal["-"], BeforeValidator(_as_printed)]
"""A number as the paper prints it, in percent; "-" where it leaves one out."""
Seeds = Annotated[tuple[Annotated[int, BeforeValidator(_as_seed)], ...], Field(min_length=1)]
if TYPE_CHECKING:
    MetricName = str
else:
    MetricName = Literal[tuple(METRICS)]
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
"""Fewest and most rows that each kind of claim names; ``viladiff.tables.contrasts`` says what they mean."""
AMONG = ("best_row", "worst_rows", "differs")
"""Kinds that compare with all other rows, or with those in ``among``."""


ORACLE = "method.pseudo.oracle"
OWN_LISTS = "each seed draws its own labelled images, the same for all rows (data.split_seed)"
"""What a scale's ``split_per_seed`` means, in words."""


def letter(place: int) -> str:
    """Return a, b, ..., z, aa, bb, ...: the letter of a row or a note, counted from 0."""
    return chr(ord("a") + place % 26) * (place // 26 + 1)


class Strict(Section):
    """No number from text, no number from true, no text from numbers."""

    model_config = ConfigDict(strict=True)


class Scale(Strict):
    """The substitutes of the paper's data sets at one size of experiment."""

    datasets: dict[str, str] = Field(default_factory=dict)
    """The paper's data set to the one used here; empty uses the paper's own."""
    set: dict[str, Any] = Field(default_factory=dict)
    shared_method_fields: dict[str, Any] = Field(default_factory=dict)
    """Fields of methods, for cells whose method has them and that do not set them: one momentum for all averages."""
    recipe: str = ""
    """Name of a file in ``viladiff/tables/recipes`` that sets fields below this scale's ``set``; empty for none."""
    published: bool = False
    """Whether cells take what their methods' publications set for the data set, where neither column nor row does."""
    seeds: Seeds | None = None
    """None takes the table's."""
    column_seeds: dict[str, Seeds] = Field(default_factory=dict)
    """Label of a column to those of the seeds that it is run with when none are named; other columns have them all."""
    split_per_seed: bool = False
    """Whether each seed draws its own labelled list, the same for all rows (``data.split_seed`` is the seed, added to
    what a cell sets there); on built-in data alone, since other data sets have published lists."""
    published_runs: str = ""
    """Another scale of the table, whose committed records are shown beside the runs of this one; empty for none."""
    rows: tuple[str, ...] = ()
    """Labels of those that are run when none are named, in the order in which their runs start; empty for all."""
    columns: tuple[str, ...] = ()
    """Labels of those that are run when none are named; empty for all."""
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
    paper: tuple[PaperValue, ...] = ()
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
    scales: tuple[str, ...] = ()
    """Scales that run it when no rows are named; empty for all."""
    requires: str = ""
    """A field that has to be given before the row can be run, such as a file; until then its cells say so."""
    note: str = ""

    @property
    def oracle(self) -> bool:
        """Whether its runs read true masks of unlabelled images: a ceiling, and no result of a method."""
        return self.set.get(ORACLE, "none") != "none"


class Claim(Strict):
    """A sentence in a form that records can decide."""

    text: str = Field(min_length=1)
    kind: Kind
    source: Literal["paper", "ours"] = "paper"
    """Whose claim it is; the two are corrected for their numbers apart."""
    metric: MetricName = "miou"
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
    """The goal of a scale's runs with ``published_runs``, relative to the published ones."""

    row: str = Field(min_length=1)
    """Label."""
    above: str = ""
    """Label of the row that it is to be above."""
    deviations: float | None = Field(None, gt=0)
    """By so many standard deviations over seeds of the published runs of both rows."""
    points: float | None = Field(None, gt=0)
    """Most points between its mean and the published one."""


class Gap(Strict):
    """A row's position between two other rows, which pages print and no claim tests."""

    row: str = Field(min_length=1)
    """Label, and so of the others."""
    low: str = Field(min_length=1)
    high: str = Field(min_length=1)


class Table(Strict):
    name: str
    """The file's stem."""
    title: str
    metric: MetricName = "miou"
    """What its columns and printed numbers are of."""
    select: Literal["last"] = "last"
    chooses: bool = False
    """Whether settings are chosen by its scores: none of its runs may read the images that results are quoted from."""
    seeds: Seeds = (0, 1, 2)
    base: dict[str, Any] = Field(default_factory=dict)
    scale: dict[str, Scale] = Field(min_length=1)
    columns: tuple[Column, ...] = Field(min_length=1)
    rows: tuple[Row, ...] = Field(min_length=1)
    claims: tuple[Claim, ...] = ()
    criteria: tuple[Criterion, ...] = ()
    gaps: tuple[Gap, ...] = ()
    notes: tuple[str, ...] = ()
    reference: str = ""
    """Label of the row that differences are taken to; empty for the first."""
    headline: str = ""
    """Label of the row that the page's first sentence is about; empty for the paper's last."""
    supervised: str = ""
    """Label of the row that sees labelled images alone, below which no printed row ought to be; empty for none."""
    page: Literal["table", "leaderboard", "clusters", "captions"] = "table"
    """``leaderboard``: also accuracy against cost, calibration, rates that were tried; ``clusters``: also features;
    ``captions``: also mIoU against the recall of captions."""

    @property
    def row_numbers(self) -> tuple[str, ...]:
        """What each row is called on pages and with ``--rows``: 1, 2, ... for the paper's rows, a, b, ... for ours."""
        numbers = []
        for place, row in enumerate(self.rows):
            same_kind = sum(one.control == row.control for one in self.rows[:place])
            numbers.append(letter(same_kind) if row.control else str(same_kind + 1))
        return tuple(numbers)

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
    """Return the settings of the table's own entries, without scales."""
    columns = [Layer(entry_name("columns", i, one.label), one.set) for i, one in enumerate(table.columns)]
    rows = [Layer(entry_name("rows", i, one.label), one.set) for i, one in enumerate(table.rows)]
    return [Layer("base", table.base), *columns, *rows]


# Reading
