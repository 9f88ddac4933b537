"""A table of the paper as data: one TOML file says rows, columns, scales, printed numbers and claims."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from viladiff.fields import Section

Printed = float | Literal["-"]
"""A number as the paper prints it; "-" where it leaves one out."""


class Scale(Section):
    """What the paper's data sets become at one size of experiment."""

    datasets: dict[str, str] = {}
    """The paper's data set to the one used here."""
    set: dict[str, Any] = {}
    seeds: tuple[int, ...] | None = None
    """None takes the table's."""
    threads: int | None = None
    """CPU threads of each run; fixed, since another count changes the last bits."""
    controls: bool = True
    """Whether rows marked ``control`` are run."""


class Column(Section):
    label: str
    set: dict[str, Any] = {}


class Row(Section):
    label: str
    parts: tuple[str, ...] = ()
    """What is on, as the paper ticks it; rows are compared by inclusion of these."""
    set: dict[str, Any] = {}
    paper: tuple[Printed, ...] = ()
    """One a column; empty for a row that the paper does not have."""
    control: bool = False
    """A row of ours, shown below the paper's."""
    note: str = ""


class Claim(Section):
    """A sentence of the paper in a form that records can decide."""

    text: str
    kind: str
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    options: dict[str, Any] = {}


class Table(Section):
    name: str
    """The file's stem."""
    title: str
    metric: Literal["miou"] = "miou"
    select: Literal["last"] = "last"
    seeds: tuple[int, ...] = (0, 1, 2)
    base: dict[str, Any] = {}
    scale: dict[str, Scale]
    columns: tuple[Column, ...] = Field(min_length=1)
    rows: tuple[Row, ...] = Field(min_length=1)
    claims: tuple[Claim, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One run that a table asks for; equal runs in several cells happen once."""

    row: int
    column: int
    seed: int
    changes: dict[str, object]
    """Everything set for this cell, by dotted path, precedence resolved."""
