"""Shares of the gradient by term of a loss, as records store them, by thirds of training. No torch.

The share of a term at a step is the norm of its gradient over the sum of all terms' norms, at parameters that they
share; a term is weighted as it is in the loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from viladiff.core.messages import shown

THIRDS = ("early", "middle", "late")
ENOUGH = 0.1
"""Share below which leaving a term out can hardly show."""
SUPERVISED = "sup"
"""Name of the supervised term, which the others' directions are compared with."""
_LARGEST = 1e100
"""Norm of a gradient, far beyond those of 32 bits; any number of these can be added."""
Triple = tuple[float | None, float | None, float | None]


class TermShare(NamedTuple):
    """One term; a value for each third of training, None where it was not measured there."""

    place: str
    """The parameters that its gradient is measured at: ``student`` (encoder and decoder), ``denoiser``, and so on."""
    term: str
    shares: Triple
    """Means over the measured steps, in [0, 1]."""
    cosines: Triple
    """Cosine to the supervised gradient, likewise; None at a place that the supervised term does not reach."""


def measured_steps(each: int, steps: int) -> frozenset[int]:
    """Return up to ``each`` steps of each third of training, in the middles of as many equal parts of it."""
    found = set()
    for third in range(3):
        low, high = (-(-(third + end) * steps // 3) for end in (0, 1))
        found |= {low + int((i + 0.5) / each * (high - low)) for i in range(each) if high > low}
    return frozenset(found)


def by_thirds(found: Mapping[str, Any] | None, steps: int) -> list[TermShare]:
    """Return every term of a run's ``RunRecord.gradient_shares``, by place, in the order of the loss.

    A term that the loss lacks in some measured steps of a third, as in a warm-up, has no share of the gradient there.
    """
    measured: Sequence[Mapping[str, Any]] = (found or {}).get("measured", ())
    names = dict.fromkeys((place, term) for one in measured for place, norms in one["norms"].items() for term in norms)
    shares: dict[tuple[str, str, int], list[float]] = {}
    cosines: dict[tuple[str, str, int], list[float]] = {}
    for one in measured:
        third = 3 * one["step"] // steps
        for place, norms in one["norms"].items():
            total = math.fsum(norms.values())
            for term in [term for at, term in names if at == place] if total else ():
                shares.setdefault((place, term, third), []).append(norms.get(term, 0.0) / total)
        for place, values in one["cosines"].items():
            for term, value in values.items():
                if value is not None:
                    cosines.setdefault((place, term, third), []).append(value)
    return [TermShare(*name, _means(shares, name), _means(cosines, name)) for name in names]


def together(found: Sequence[TermShare], names: Sequence[str]) -> Triple:
    """Add the shares of the terms that match a pattern, by third; None if none of them was measured.

    Shares at different parameters are of different gradients: they are added for each set of parameters, and the
    largest sum counts. Terms whose gradients diverge contribute less than that together, never more.
    """
    mine = [one for one in found if any(fnmatchcase(one.term, name) for name in names)]
    sums: list[list[float]] = [[], [], []]
    for place in dict.fromkeys(one.place for one in mine):
        for third, sum_ in enumerate(sums):
            there = [share for one in mine if one.place == place and (share := one.shares[third]) is not None]
            sum_ += [math.fsum(there)] if there else []
    early, middle, late = (max(column, default=None) for column in sums)
    return early, middle, late


def fault(found: Mapping[str, Any]) -> str:
    """Return an error for values that no run can have measured; empty otherwise. For records of any origin."""
    fields, measured = found.get("fields"), found.get("measured")
    if not isinstance(fields, dict) or not isinstance(measured, list):
        return "gradient_shares: must have fields, an object, and measured, a list"
    for field, names in fields.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            return f"gradient_shares.fields.{field}: must be a list of names of terms"
    for i, one in enumerate(measured):
        where = f"gradient_shares.measured[{i}]"
        if not isinstance(one, dict) or type(one.get("step")) is not int or not 0 <= one["step"] < 2**63:
            return f"{where}: must have step, an integer from 0 to 2^63"
        for name, low, high in (("norms", 0.0, _LARGEST), ("cosines", -1.0, 1.0)):
            places = one.get(name)
            if not isinstance(places, dict) or not all(isinstance(values, dict) for values in places.values()):
                return f"{where}: must have {name}, by place and term"
            for place, values in places.items():
                for term, value in values.items():
                    if not (_number(value, low, high) or (value is None and name == "cosines")):
                        there = f"{where}.{name}.{place}.{term}"
                        return f"{there}: must be a number from {low:g} to {high:g}, got {shown(value)}"
    return ""


def _number(value: object, low: float, high: float) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return low <= value <= high


def _means(values: Mapping[tuple[str, str, int], Sequence[float]], name: tuple[str, str]) -> Triple:
    early, middle, late = (
        math.fsum(there) / len(there) if (there := values.get((*name, third))) else None for third in range(3)
    )
    return early, middle, late
