"""Parts of a method with rates of their own: named by dotted path, absolute or as a factor, the longest path first."""

from __future__ import annotations

from typing import Any

import pytest
from method_kit import make

from viladiff.methods.base import Method
from viladiff.runs.config import RunConfig, override
from viladiff.training.optim import param_groups, part_of


def scales(method: Method, rates: dict[str, dict[str, Any]], **changes: object) -> dict[str, dict[str, Any]]:
    """The group of each trainable parameter, by name."""
    method.extra_param_groups = lambda: rates  # type: ignore[method-assign]
    cfg = override(RunConfig(), {"optim.lr": 4e-3, "optim.encoder_lr_scale": 0.25, **changes})
    found = {id(p): group for group in param_groups(method, cfg) for p in group["params"]}
    assert sum(len(group["params"]) for group in param_groups(method, cfg)) == len(found)
    return {name: found[id(p)] for name, p in method.named_parameters() if p.requires_grad}


def test_a_rate_is_absolute_a_factor_or_the_encoder_s() -> None:
    rates = {
        "student.spark": {"lr_scale": "encoder"},
        "student.spark.cross": {"lr": 1e-3, "betas": (0.5, 0.9), "weight_decay": 0.0},
        "student.classifier": {"lr_scale": 2.0},
    }
    found = scales(make("allspark", width=16), rates)
    expected = {
        "student.spark.cross.": 0.25,
        "student.spark.": 0.25,
        "student.classifier.": 2.0,
        "student.encoder.": 0.25,
    }
    for name, group in found.items():
        part = next((part for part in expected if name.startswith(part)), None)
        assert group["scale"] == pytest.approx(expected.get(part or "", 1.0)), name
        assert ("betas" in group) == (part == "student.spark.cross."), name
    # The same with another rate for the encoder: what is absolute stays.
    other = scales(make("allspark", width=16), rates, **{"optim.encoder_lr_scale": 0.1})
    assert {g["scale"] for n, g in other.items() if n.startswith("student.spark.enter")} == {0.1}
    assert {g["scale"] for n, g in other.items() if n.startswith("student.spark.cross")} == {0.25}
    assert {g["weight_decay"] for n, g in found.items() if n.startswith("student.spark.own")} == {0.01}


def test_a_path_may_lie_in_the_encoder_and_may_name_one_parameter() -> None:
    rates = {"student.encoder": {"lr_scale": 1.0}, "student.classifier.fine.bias": {"lr_scale": 3.0}}
    found = scales(make("semibaseline"), rates)
    assert {g["scale"] for n, g in found.items() if n.startswith("student.encoder.")} == {1.0}
    assert [n for n, g in found.items() if g["scale"] == 3.0] == ["student.classifier.fine.bias"]


def test_allsparks_block_has_the_encoders_rate_under_adamw_alone() -> None:
    """Its authors train it by SGD at the head's rate, ten times the encoder's."""
    method = make("allspark")
    block = {id(p) for name, p in method.named_parameters() if name.startswith("student.spark.")}
    for optimiser, wanted in (("adamw", 0.1), ("sgd", 1.0)):
        cfg = override(RunConfig(), {"optim.name": optimiser, "optim.encoder_lr_scale": 0.1})
        groups = [one for one in param_groups(method, cfg) if any(id(p) in block for p in one["params"])]
        assert groups and {one["scale"] for one in groups} == {wanted}
        assert all("optimiser" not in one for one in groups), "torch's optimisers know no such option"


def test_a_path_ends_where_a_name_ends() -> None:
    assert part_of("student.sparkler.weight", ["student.spark"]) == ""
    assert part_of("student.spark.weight", ["student", "student.spark", "student.spark.weight.x"]) == "student.spark"


def test_a_path_to_nothing_is_refused_with_the_nearest() -> None:
    expected = r"extra_param_groups of method.name = 'allspark'.*got 'student.sparks'; nearest: 'student.spark'"
    with pytest.raises(ValueError, match=expected):
        scales(make("allspark", width=16), {"student.sparks": {"lr": 1e-3}})
