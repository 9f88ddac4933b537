"""The errors on docs/performance.md are those of the committed step times, and the label of an estimate covers them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from conftest import load_module

from viladiff.evaluation.step_time import CORE, ERROR
from viladiff.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model() -> ModuleType:
    return load_module(ROOT / "benchmarks" / "cost_model.py")


def test_the_page_is_of_the_committed_times(model: ModuleType) -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    there = re.search(r"<!-- core -->\n(.*?)\n<!-- end of core -->", page, re.DOTALL)
    assert there is not None and there[1] == "\n".join(model.core())


def test_the_rates_are_those_of_the_fit(model: ModuleType) -> None:
    steps = json.loads(model.TIMES.read_text())["steps"]
    assert {one["method"] for one in steps} == set(METHODS)
    assert np.array(CORE) == pytest.approx(model.fit(steps), rel=0.02)


def test_the_label_covers_the_largest_error_of_a_method_that_was_left_out(model: ModuleType) -> None:
    steps = json.loads(model.TIMES.read_text())["steps"]
    found = [
        error
        for name in METHODS
        for error in model.errors(
            model.fit([x for x in steps if x["method"] != name]), [x for x in steps if x["method"] == name]
        )
    ]
    assert 0.3 < max(map(abs, found)) < ERROR < 1.1 * max(map(abs, found))
