"""The benchmark of quality for cost on made-up curves: what it replays, what it counts, when a goal is reached."""

from __future__ import annotations

import csv
import math
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import optuna
import pytest
from conftest import load_module

from viladiff.sweeps.space import Dimension

ROOT = Path(__file__).resolve().parents[2]
SPACE = {
    "optim.lr": Dimension(low=0.01, high=1.0, log=True),
    "optim.encoder_lr_scale": Dimension(low=0.1, high=1.0, log=True),
    "n": Dimension(low=1, high=9),
    "c": Dimension(choices=("a", "b")),
}


@pytest.fixture(scope="module")
def quality() -> ModuleType:
    return load_module(ROOT / "benchmarks" / "quality.py")


def score(point: dict[str, Any]) -> float:
    return 0.5 - 0.3 * abs(SPACE["optim.lr"].unit(point["optim.lr"]) - 0.7) - 0.05 * (point["c"] == "b")


@pytest.fixture
def table(quality: ModuleType, tmp_path: Path) -> Path:
    """Thirty-two points of three seeds at four steps; the last point lacks a seed."""
    drawn, noise = random.Random(4), random.Random(5)
    with (tmp_path / "curves.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["point", "seed", "run", "step", "miou", *SPACE])
        for number in range(32):
            point = quality.draw(SPACE, drawn)
            for seed in range(3 if number < 31 else 2):
                off = noise.gauss(0, 0.01)
                for step in (20, 40, 60, 80):
                    miou = score(point) * (step / 80) ** 0.3 + off
                    writer.writerow([number, seed, "r", step, f"{miou:.6f}", *point.values()])
    return tmp_path / "curves.csv"


def test_curves_are_read_at_the_rungs_and_whole(quality: ModuleType, table: Path) -> None:
    curves = quality.load(table, SPACE)
    assert curves.values.shape == (31, 3, 3) and len(curves.points) == 31
    assert all(SPACE[path].has(point[path]) for point in curves.points for path in SPACE)
    point = curves.points[4]
    wanted = [score(point) * share**0.3 for share in (0.25, 0.5, 1.0)]
    assert curves.values[4].mean(0) == pytest.approx(wanted, abs=0.02)
    text = table.read_text()
    table.write_text("\n".join(text.splitlines()[:60]))
    with pytest.raises(ValueError, match=r"curves.csv: \d points of 3 seeds; at least 8 of 3 are needed"):
        quality.load(table, SPACE)
    table.write_text(text)
    with pytest.raises(ValueError, match=r"point \d+: optim.lr = .* is not in the space"):
        quality.load(table, {**SPACE, "optim.lr": Dimension(low=0.5, high=1.0, log=True)})


def test_nearest_gives_what_was_recorded_and_the_surface_its_spread(quality: ModuleType, table: Path) -> None:
    curves = quality.load(table, SPACE)
    nearest, surface = quality.Nearest(curves, SPACE), quality.Surface(curves, SPACE)
    for number in (0, 17):
        for seed in (0, 1, 2):
            assert np.array_equal(nearest.curve(curves.points[number], seed), curves.values[number, seed])
    assert nearest.best == curves.values[..., -1].mean(1).max() == pytest.approx(surface.best, abs=0.05)
    point = {"optim.lr": 0.05, "optim.encoder_lr_scale": 0.5, "n": 3, "c": "a"}
    off = np.array([surface.curve(point, seed) - surface.mean(point) for seed in range(400)])
    within = math.sqrt(float(curves.values[..., -1].var(1, ddof=1).mean()))
    assert off[:, -1].std() == pytest.approx(within, rel=0.12) and abs(off[:, -1].mean()) < within / 5
    assert np.array_equal(surface.curve(point, 1), surface.curve(dict(reversed(point.items())), 1))
    exact = quality.Surface(curves, SPACE, noise=False)
    assert np.array_equal(exact.curve(point, 1), surface.mean(point)) and exact.best == surface.best
    assert quality.predicted(curves) > 0.4


def test_the_surface_is_over_the_rates_of_head_and_encoder(quality: ModuleType) -> None:
    at = quality.rates({"optim.lr": 1e-3, "optim.encoder_lr_scale": 0.1})
    assert at == pytest.approx([math.log(1e-3), math.log(1e-4)])


def test_a_goal_is_reached_where_the_regret_stays_below_it(quality: ModuleType) -> None:
    course = quality.Course([10, 20, 30, 40], [0.05, 0.01, 0.03, 0.01])
    assert quality.reached(course, 0.01) == 40 and quality.reached(course, 0.03) == 20
    assert quality.reached(course, 0.05) == 10 and quality.reached(course, 0.005) == math.inf


def test_a_search_is_charged_for_every_step_that_it_trains(
    quality: ModuleType, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay = quality.Nearest(quality.load(table, SPACE), SPACE)
    sweeping, made = quality.helper(), []
    plain = sweeping.Runs

    def runs(*given: Any) -> Any:
        made.append(plain(*given))
        return made[-1]

    sweeping.Runs = runs
    monkeypatch.setattr(quality, "helper", lambda: sweeping)
    found = quality.search(replay, SPACE, "random", 3, 10)
    assert found.steps[-1] == made[0].trained and len(found.steps) == 10
    assert found.steps == sorted(found.steps) and all(regret >= 0 for regret in found.regret)
    guided = quality.search(replay, SPACE, "random", 3, 200, 3000)
    assert guided.steps[-1] == made[1].trained and 3000 <= made[1].trained < 3400
    assert len(guided.steps) > 12, "stopped trials leave room for more"


def test_the_points_to_record_lie_in_the_space_and_fill_it() -> None:
    script = load_module(ROOT / "scripts" / "record_curves.py")
    points = script.spread(SPACE, 64)
    assert all(SPACE[path].has(point[path]) for point in points for path in SPACE)
    assert sum(point["c"] == "a" for point in points) == 32 and {point["n"] for point in points} == set(range(1, 10))
    assert sum(point["optim.lr"] < 0.1 for point in points) == 32, (
        "equally likely in each half of a logarithmic dimension"
    )
    assert script.spread(SPACE, 64) == points


def test_pruners_are_compared_in_pairs_over_one_half_of_the_seeds(quality: ModuleType) -> None:
    """Mean, standard error and difference by hand: regrets of 1, 3 and 2 points against 2, 3 and 4."""
    pruners = load_module(ROOT / "benchmarks" / "pruners.py")
    found = [quality.Course([40, 90], [0.05, value], 3) for value in (0.01, 0.03, 0.02)]
    plain = [quality.Course([50, 100], [0.05, value], 2) for value in (0.02, 0.03, 0.04)]
    text = pruners.line("tpe, asha", found, plain, 100, quality.reached)
    assert "regret 2.00 ± 0.58 (quartiles 1.00 2.00 3.00), against random -1.00 ± 0.58; goal 90% (0 of 3" in text
    assert "2 trials, 3 complete" in text


def test_every_pruner_that_is_compared_takes_its_arguments() -> None:
    pruners = load_module(ROOT / "benchmarks" / "pruners.py")
    made = pruners.variants((25, 50, 100))
    assert all(isinstance(make(), optuna.pruners.BasePruner) for make in made.values()) and len(made) > 8
