"""How many runs go at once and what each has of a machine, without starting Ray."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from viladiff.cluster import resources
from viladiff.cluster.resources import cluster_slots, concurrency, plan_capacity, threads_of_a_run, trains_on_gpus
from viladiff.cluster.session import load_ray
from viladiff.runs.job import ExecutionSettings, PlannedRun


def jobs(count: int, workers: int = 1, **changes: object) -> list[PlannedRun]:
    return [PlannedRun(f"{i:016x}", dict(changes), "t", 4, {}, workers=workers) for i in range(count)]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(resources, "visible_cpus", lambda: 16)
    return monkeypatch


def with_gpus(machine: pytest.MonkeyPatch, count: int) -> None:
    machine.setattr(resources, "visible_gpus", lambda: count)


@pytest.mark.parametrize(
    ("gpus", "runs", "most", "share", "slots", "said"),
    [
        (0, 9, None, 0.0, 16, ""),
        (1, 9, None, 0.25, 4, "1 GPU here, each for 4 runs at once"),
        (1, 1, None, 1.0, 1, "1 GPU here, one for each run"),
        (1, 9, 12, 1 / 12, 12, "1 GPU here, each for 12 runs at once"),
        (2, 9, 3, 0.5, 3, "2 GPUs here, each for 2 runs at once"),
        (4, 3, None, 1.0, 4, "4 GPUs here, one for each run"),
        (8, 99, None, 0.5, 16, "8 GPUs here, each for 2 runs at once"),
        (3, 9, 9, 1 / 3, 9, "3 GPUs here, each for 3 runs at once"),
    ],
)
def test_gpus_are_shared_out_where_nobody_says_how(
    machine: pytest.MonkeyPatch, gpus: int, runs: int, most: int | None, share: float, slots: int, said: str
) -> None:
    """Or all runs would be on the first of them."""
    with_gpus(machine, gpus)
    found = plan_capacity(ExecutionSettings(max_concurrent=most), jobs(runs))
    assert found.settings.gpus_per_trial == pytest.approx(share, abs=1e-4) and found.slots == slots
    assert found.note.startswith(said) and bool(found.note) == bool(said)
    if gpus:
        ray = math.ceil(10_000 * found.settings.gpus_per_trial) / 10_000  # type: ignore[operator]
        assert found.slots * ray <= gpus, "as Ray counts, so many fit"


@pytest.mark.parametrize(
    ("gpus", "settings", "known"),
    [
        (0, ExecutionSettings(), False),
        (2, ExecutionSettings(), True),
        (2, ExecutionSettings(gpus_per_trial=0.5), True),
        (2, ExecutionSettings(gpus_per_trial=0), None),
        (0, ExecutionSettings(gpus_per_trial=0), False),
        (0, ExecutionSettings(address="a", max_concurrent=3), None),
        (2, ExecutionSettings(address="a"), None),
    ],
)
def test_whether_runs_have_gpus(
    machine: pytest.MonkeyPatch, gpus: int, settings: ExecutionSettings, known: bool | None
) -> None:
    with_gpus(machine, gpus)
    assert trains_on_gpus(concurrency(settings, jobs(3))) is known


def test_a_run_on_photographs_has_a_gpu_of_its_own(machine: pytest.MonkeyPatch) -> None:
    """Four of them at real scale need more memory than a GPU has."""
    with_gpus(machine, 4)
    found = plan_capacity(ExecutionSettings(), [*jobs(20), *jobs(20, **{"data.dataset": "voc"})])
    assert (found.settings.gpus_per_trial, found.slots) == (1.0, 4)
    assert [threads_of_a_run(address) for address in (None, "auto")] == [4, 1], "16 processors over 4 GPUs"
    with_gpus(machine, 0)
    assert threads_of_a_run(None) == 1


def test_what_was_asked_for_is_kept(machine: pytest.MonkeyPatch) -> None:
    with_gpus(machine, 2)
    found = [plan_capacity(ExecutionSettings(gpus_per_trial=share), jobs(9)) for share in (0.25, 1, 2, 0)]
    assert [one.slots for one in found] == [8, 2, 1, 16]
    assert [one.settings.gpus_per_trial for one in found] == [0.25, 1, 2, 0] and not any(one.note for one in found)
    assert plan_capacity(ExecutionSettings(gpus_per_trial=0.5), jobs(9, 2)).slots == 1


def test_runs_on_processors_alone_ask_for_no_gpu(machine: pytest.MonkeyPatch) -> None:
    with_gpus(machine, 2)
    found = plan_capacity(ExecutionSettings(threads=4), jobs(9, **{"runtime.device": "cpu"}))
    assert (found.settings.gpus_per_trial, found.slots, found.note) == (0.0, 4, "")


def test_workers_have_whole_gpus_or_none(machine: pytest.MonkeyPatch) -> None:
    with_gpus(machine, 4)
    found = plan_capacity(ExecutionSettings(), jobs(9, 2))
    assert (found.settings.gpus_per_trial, found.slots) == (1.0, 2)
    assert (plan_capacity(ExecutionSettings(), jobs(9, 8)).settings.gpus_per_trial) == 0.0, (
        "they share, as nobody asked for more"
    )


def test_a_run_that_can_never_be_placed_is_refused(machine: pytest.MonkeyPatch) -> None:
    """Ray would wait for its GPUs for ever, and say nothing."""
    with_gpus(machine, 2)
    with pytest.raises(ValueError, match=r"workers = 4 needs 4 GPUs, but this machine has 2"):
        plan_capacity(ExecutionSettings(gpus_per_trial=1), jobs(9, 4))


def test_runs_at_once_are_those_of_the_machine_and_not_known_of_a_cluster(machine: pytest.MonkeyPatch) -> None:
    with_gpus(machine, 0)
    assert concurrency(ExecutionSettings(threads=2), jobs(9)).slots == 8  # type: ignore[union-attr]
    assert concurrency(ExecutionSettings(threads=2), jobs(9, 2)).slots == 4  # type: ignore[union-attr]
    assert concurrency(ExecutionSettings(address="auto"), jobs(9)) is None
    assert concurrency(ExecutionSettings(address="auto", max_concurrent=3), jobs(9)).slots == 3  # type: ignore[union-attr]


def test_a_sweep_takes_the_room_that_a_cluster_has_when_it_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    load_ray(local=True)  # other tests of this process may start it
    for there, settings, workers, wanted in (
        ({"CPU": 8.0}, ExecutionSettings(threads=2, gpus_per_trial=0.0), 1, 4),
        ({"CPU": 8.0}, ExecutionSettings(threads=2, gpus_per_trial=0.0), 2, 2),
        ({"CPU": 64.0, "GPU": 3.0}, ExecutionSettings(threads=2, gpus_per_trial=0.5), 1, 6),
        ({"CPU": 64.0, "GPU": 3.0}, ExecutionSettings(threads=2, gpus_per_trial=1.0), 2, 1),
        ({}, ExecutionSettings(threads=1, gpus_per_trial=1.0), 1, 1),
    ):
        monkeypatch.setattr("ray.cluster_resources", lambda found=there: found)
        assert cluster_slots(settings, workers) == wanted


def test_gpus_are_counted_by_torch_where_there_is_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch counts what CUDA_VISIBLE_DEVICES leaves."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for devices, count in (([], 0), (["nvidia0", "nvidiactl"], 2)):
        monkeypatch.setattr(Path, "glob", lambda path, what, devices=devices: iter([path / each for each in devices]))
        monkeypatch.setattr(Path, "exists", lambda path: False)
        assert resources.visible_gpus() == count
