"""The search space of a sweep: one dimension a field, its edges, its grid, and tests of membership. No Optuna here."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field, model_validator

from viladiff.tables.spec import Strict

Value = bool | int | float | str
Point = Mapping[str, Value]
"""Dotted path to value."""

EDGES = 256
"""Corners that are tried all; of a space with more, some."""
GRID = 5
"""Places on a dimension that has neither choices nor a step."""


class Dimension(Strict):
    """``low`` to ``high``, both included, of whole numbers where both are; or ``choices``."""

    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    """Whether equal ratios are equally likely."""
    step: int | float | None = Field(None, gt=0)
    choices: tuple[Value, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Dimension:
        if bool(self.choices) == (self.low is not None or self.high is not None):
            raise ValueError("give low and high, or else choices")
        if self.choices:
            self._check_choices()
        else:
            self._check_range()
        return self

    def _check_choices(self) -> None:
        if self.log or self.step is not None:
            raise ValueError("log and step belong to low and high, not to choices")
        if len(self.choices) < 2 or len(set(map(repr, self.choices))) < len(self.choices):
            raise ValueError(f"choices = {list(self.choices)}: two or more, each once")

    def _check_range(self) -> None:
        low, high = self.low, self.high
        if low is None or high is None or not low < high:
            raise ValueError(f"low = {low}, high = {high}: both are needed, and low < high")
        if self.log and (low <= 0 or self.step is not None):
            raise ValueError(f"log = true: needs low > 0 and no step, not low = {low}, step = {self.step}")
        if self.whole and not isinstance(self.step, int | None):
            raise ValueError(f"step = {self.step}: between whole numbers it must be one too")
        if self.step is not None:
            steps = (high - low) / self.step
            if not math.isclose(steps, round(steps), abs_tol=1e-9):
                raise ValueError(f"step = {self.step}: does not lead from low = {low} to high = {high}")

    @property
    def whole(self) -> bool:
        """Whether it holds whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def ends(self) -> tuple[Value, ...]:
        """Its extremes, or all choices."""
        if self.choices:
            return self.choices
        assert self.low is not None and self.high is not None
        return (self.low, self.high) if self.whole else (float(self.low), float(self.high))

    def has(self, value: object) -> bool:
        """Return whether the value lies in it, on a step if there are steps; the type counts too."""
        if self.choices:
            return any(type(value) is type(one) and value == one for one in self.choices)
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        assert self.low is not None and self.high is not None
        steps = 0.0 if self.step is None else (value - self.low) / self.step
        return self.low <= value <= self.high and math.isclose(steps, round(steps), abs_tol=1e-9)

    def covers(self, other: Dimension) -> bool:
        """Return whether every value of another dimension lies in this one."""
        return (
            bool(self.choices) == bool(other.choices)
            and self.whole == other.whole
            and all(self.has(value) for value in other.ends)
        )

    def places(self, count: int = GRID) -> tuple[Value, ...]:
        """Return its grid: choices, every step, or ``count`` values at equal distances (ratios if ``log``)."""
        if self.choices:
            return self.choices
        assert self.low is not None and self.high is not None
        low, high = self.low, self.high
        if self.step is not None:
            found = [low + i * self.step for i in range(round((high - low) / self.step) + 1)]
        elif self.log:
            found = [low * (high / low) ** (i / (count - 1)) for i in range(count)]
        else:
            found = [low + (high - low) * i / (count - 1) for i in range(count)]
        found[-1] = high  # not missed by a rounding
        return tuple(dict.fromkeys(round(one) if self.whole else float(one) for one in found))

    def unit(self, value: Value) -> float:
        """Return a number's position between the ends, 0 to 1, by ratios if ``log``."""
        assert self.low is not None and self.high is not None and not isinstance(value, str)
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def number(self, unit: float) -> Value:
        """Return the value at a position of the unit interval, rounded to its steps; the inverse of ``unit``."""
        assert self.low is not None and self.high is not None
        unit, low, high = min(1.0, max(0.0, unit)), self.low, self.high
        found = low * (high / low) ** unit if self.log else low + (high - low) * unit
        if self.step is not None:
            found = low + round((found - low) / self.step) * self.step
        return round(found) if self.whole else min(float(high), max(float(low), found))

    def __str__(self) -> str:
        if self.choices:
            return f"one of {', '.join(map(str, self.choices))}"
        step = f", in steps of {self.step}" if self.step is not None else ", log" if self.log else ""
        return f"{self.low} to {self.high}{step}"


Space = Mapping[str, Dimension]
"""Dotted path to dimension."""


def strays(point: Mapping[str, object], space: Space) -> Iterator[str]:
    """Yield a sentence for each reason that a point is outside a space."""
    for path in point.keys() - space.keys():
        yield f"{path} is not a dimension of the space"
    for path, dimension in space.items():
        if path not in point:
            yield f"{path} is missing"
        elif not dimension.has(point[path]):
            yield f"{path} = {point[path]!r} is not in {dimension}"


def grid(space: Space) -> Iterator[dict[str, Value]]:
    """Yield every point of the grid, the last dimension fastest."""
    for values in itertools.product(*(dimension.places() for dimension in space.values())):
        yield dict(zip(space, values, strict=True))


def edges(space: Space, first: Point) -> Iterator[dict[str, Value]]:
    """Yield points that together reveal every invalid combination of a space, as far as can be tried.

    All corners if there are few. Otherwise each dimension's ends with the rest at ``first``, and sampled corners.
    """
    ends = [dimension.ends for dimension in space.values()]
    if math.prod(map(len, ends)) <= EDGES:
        for values in itertools.product(*ends):
            yield dict(zip(space, values, strict=True))
        return
    for path, dimension in space.items():
        for value in dimension.ends:
            yield {**first, path: value}
    for i in range(EDGES):
        drawn = random.Random(f"edges {i}")
        yield {path: drawn.choice(one) for path, one in zip(space, ends, strict=True)}


def shrunk(old: Mapping[str, Any], space: Space) -> list[str]:
    """Return what a study of the space ``old`` (as ``dumped`` wrote it) lacks in ``space``; empty if not narrower."""
    before = {path: Dimension.model_validate_json(text) for path, text in old.items()}
    faults = [f"{path} was not searched before" for path in space.keys() - before.keys()]
    for path, dimension in before.items():
        if path not in space:
            faults.append(f"{path} is no longer searched")
        elif not space[path].covers(dimension):
            faults.append(f"{path} was searched in {dimension}, and is now in {space[path]}")
    return faults


def dumped(space: Space) -> dict[str, str]:
    """Serialise a space as text that ``shrunk`` reads."""
    return {path: dimension.model_dump_json() for path, dimension in space.items()}
