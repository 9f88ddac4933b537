"""How many runs go at once and what each has of a machine, without starting Ray."""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from viladiff.cluster import ray_tune, resources, worker
from viladiff.cluster.resources import (
    ask_cluster,
    cluster_slots,
    concurrency,
    plan_capacity,
    runs_that_fit,
    threads_of_a_run,
)
from viladiff.cluster.session import load_ray
from viladiff.runs.job import Event, ExecutionSettings, PlannedRun
from viladiff.runs.job_queue import JobQueue
from viladiff.runs.store import Store
from viladiff.training.run_cost import CountedStep, CountedSteps

GIB = 2**30


def jobs(count: int, workers: int = 1, **changes: object) -> list[PlannedRun]:
    return [PlannedRun(f"{i:016x}", dict(changes), "t", 4, {}, workers=workers) for i in range(count)]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(resources, "visible_cpus", lambda: 16)
    return monkeypatch


def with_gpus(machine: pytest.MonkeyPatch, count: int, gib: float = 24) -> None:
    """GPUs of 24 GiB; a run on built-in data needs 4 GiB, one on photographs 16."""

    def of(steps: CountedSteps, run: PlannedRun) -> CountedStep:
        return CountedStep((), (16 if "data.dataset" in run.changes else 4) * GIB, 0, 1)

    machine.setattr(resources, "visible_gpus", lambda: count)
    machine.setattr(resources, "gpu_memory", lambda: int(gib * GIB))
    machine.setattr(CountedSteps, "of", of)


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


def test_a_run_on_photographs_has_a_gpu_of_its_own(machine: pytest.MonkeyPatch) -> None:
    """Four of them at real scale need more memory than a GPU has."""
    with_gpus(machine, 4)
    found = plan_capacity(ExecutionSettings(), [*jobs(20), *jobs(20, **{"data.dataset": "voc"})])
    assert (found.settings.gpus_per_trial, found.slots) == (1.0, 4)
    assert [threads_of_a_run(address) for address in (None, "auto")] == [4, 1], "16 processors over 4 GPUs"
    with_gpus(machine, 0)
    assert threads_of_a_run(None) == 1


@pytest.mark.parametrize(("gib", "fit"), [(80, 4), (141, 7), (39, 2), (38, 1), (8, 1)])
def test_as_many_runs_share_a_gpu_as_fit_in_its_memory(machine: pytest.MonkeyPatch, gib: float, fit: int) -> None:
    """16 GiB, 15 % of it as a margin, and 1 GiB for each process: 19.4 GiB a run."""
    with_gpus(machine, 2, gib)
    photographs = jobs(20, **{"data.dataset": "voc"})
    found = plan_capacity(ExecutionSettings(), [*jobs(20), *photographs])
    assert found.slots == 2 * fit and found.settings.gpus_per_trial == pytest.approx(1 / fit, abs=1e-4)
    assert runs_that_fit(photographs, int(gib * GIB)) == fit
    machine.setattr(CountedSteps, "of", lambda steps, run: None)
    assert runs_that_fit(photographs, 999 * GIB) == 1, "what cannot be counted is alone"


def test_a_cluster_shares_the_gpus_that_it_names(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The smallest decides; with one that is not known each run has a GPU."""
    with_gpus(machine, 0)
    load_ray(local=True)
    import ray

    for there, share in (
        ({"GPU": 8.0, "accelerator_type:H100": 1.0}, 1 / 4),
        ({"GPU": 8.0, "accelerator_type:H100": 1.0, "accelerator_type:RTX 4090": 1.0}, 1.0),
        ({"GPU": 8.0, "accelerator_type:X1": 1.0}, 1.0),
        ({"CPU": 8.0}, 0.0),
    ):
        machine.setattr(ray, "cluster_resources", lambda there=there: there)
        notes: list[Event] = []
        queue = JobQueue(jobs(9, **{"data.dataset": "voc"}), Store(tmp_path), ExecutionSettings(), 9, notes.append)
        ask_cluster(queue)
        assert queue.settings.gpus_per_trial == pytest.approx(share, abs=1e-4), notes


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


@pytest.mark.parametrize(
    ("there", "gpus", "workers", "cores"),
    [
        ({"CPU": 16, "GPU": 1}, 1.0, 1, 16),
        ({"CPU": 16, "GPU": 1}, 0.25, 1, 4),
        ({"CPU": 12, "GPU": 1}, 0.3333, 1, 4),
        ({"CPU": 16, "GPU": 8}, 1.0, 1, 2),
        ({"CPU": 16, "GPU": 8}, 0.5, 1, 1),
        ({"CPU": 16, "GPU": 8}, 0.5, 4, 2),
        ({"CPU": 4, "GPU": 2}, 1.0, 1, 2),
        ({"CPU": 192, "GPU": 1}, 1.0, 1, 16),
        ({}, 1.0, 1, 16),
        ({"CPU": 16, "GPU": 1}, 0.0, 1, None),
    ],
)
def test_a_run_decodes_on_its_gpus_share_of_the_processors(
    machine: pytest.MonkeyPatch, tmp_path: Path, there: dict[str, float], gpus: float, workers: int, cores: int | None
) -> None:
    """Whatever its threads, which a scale may fix at one."""
    machine.setattr(worker, "visible_cpus", lambda: 16)
    nodes = [{"NodeID": "other", "Resources": {"CPU": 1.0, "GPU": 1.0}}, {"NodeID": "here", "Resources": there}]
    machine.setattr(worker.ray, "nodes", lambda: nodes)
    machine.setattr(worker.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "here"))
    place = worker.WorkerContext(str(tmp_path), os.getcwd(), 1, 60, "stop", gpus=gpus)
    job = PlannedRun("0" * 16, {"data.batch_labelled": 8, "data.batch_unlabelled": 8}, "t", 4, {}, workers=workers)
    cfg = worker.configuration(job, place)
    assert (cfg.runtime.cores, cfg.runtime.threads) == (cores, 1)
    asked = PlannedRun("0" * 16, {"runtime.cores": 3}, "t", 4, {})
    assert worker.configuration(asked, place).runtime.cores == 3


def test_the_driver_tells_a_run_its_share_of_a_gpu(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine.setattr(ray_tune, "stop_name", lambda: "stop")
    queue = JobQueue(jobs(2), Store(tmp_path), ExecutionSettings(threads=1, gpus_per_trial=0.5), 2, lambda event: None)
    assert ray_tune.worker_context(queue).gpus == 0.5
