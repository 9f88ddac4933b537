"""Optuna's pruners, set so that each rung of a sweep is judged once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from optuna.pruners import BasePruner

Kind = Literal["none", "asha", "hyperband", "median"]


def optuna_pruner(kind: Kind, steps: Sequence[int]) -> BasePruner:
    """Build the pruner of a sweep whose rungs are at ``steps``, the last one the full length.

    Raises ValueError if there is no rung before the last, or as ``successive_halving_settings`` does.
    """
    from optuna.pruners import HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner

    if kind == "none":
        return NopPruner()
    if len(steps) < 2:
        raise ValueError(
            f"--early-stopping {kind}: stops trials at rungs, and the sweep has one; add rungs, or use none"
        )
    if kind == "median":
        return MedianPruner()
    least, factor = successive_halving_settings(kind, steps)
    if kind == "asha":
        return SuccessiveHalvingPruner(min_resource=least, reduction_factor=factor)
    # One step more than the last rung's, since Optuna counts brackets by a logarithm that may be rounded down.
    longest = least * factor ** (len(steps) - 1) + 1
    return HyperbandPruner(min_resource=least, max_resource=longest, reduction_factor=factor)


def successive_halving_settings(kind: Kind, steps: Sequence[int]) -> tuple[int, int]:
    """Return min_resource r and reduction_factor η with which successive halving judges a trial once at each rung.

    It judges rung k at the first report from step r η^k on, hence r η^k <= steps[k] < r η^(k+1). η is the growth of the
    budget from rung to rung, and 1 / η the share of trials that continue. Raises ValueError if no r fits.
    """
    factor = max(2, round((steps[-1] / steps[0]) ** (1 / (len(steps) - 1))))
    least = min(step // factor**k for k, step in enumerate(steps))
    if least < 1 or any(step >= least * factor ** (k + 1) for k, step in enumerate(steps)):
        raise ValueError(
            f"--early-stopping {kind}: rungs must grow by one factor of 2 or more, got the steps {list(steps)}; "
            "write such as rungs = [0.25, 0.5, 1.0], or use --early-stopping median"
        )
    return least, factor
