"""Batches from files: the same pixels whoever decodes them, and nothing left behind however a run ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from run_kit import alive
from torch import Tensor

from viladiff.core import keyed_random
from viladiff.data import decode_workers, loader, registry
from viladiff.data.batch import Batch, Views
from viladiff.data.decode_workers import CropRecipe, DecodeRequest, DecodeWorkers, decode_all
from viladiff.data.files.images import PaletteEncoding, read_image, read_mask
from viladiff.data.loader import BatchLoader
from viladiff.data.loading.pace import LoaderPace, decoding_processes, limit_note
from viladiff.data.transforms.augment import normalise
from viladiff.data.transforms.geometry import crop_image, crop_mask, window
from viladiff.runs.config import RunConfig, override

CPU = torch.device("cpu")
CROP = 64
Make = Callable[..., Path]


@pytest.fixture
def root(photo_folder: Make) -> Path:
    return photo_folder(16, labelled=6, val=2, sizes=(40, 120))


def config(root: Path, **changes: Any) -> RunConfig:
    given = {"data.dataset": "folder", "data.crop": CROP, "runtime.data_root": str(root), "train.steps": 6}
    return override(RunConfig(), {**given, **{path.replace("__", "."): value for path, value in changes.items()}})


def make(cfg: RunConfig, rank: int = 0, world: int = 1, views: Views | None = None) -> BatchLoader:
    views = views or Views(weak=1, strong=2, cutmix=True)
    return BatchLoader(cfg, registry.load_dataset(*registry.dataset_spec(cfg)), views, None, 16, CPU, rank, world)


def tensors(batch: Batch) -> list[Tensor]:
    boxes = [mix.boxes for mix in batch.mix]
    return [batch.image, batch.target, batch.valid, *batch.weak, *batch.strong, *boxes]


def same(first: list[list[Batch]], second: list[list[Batch]]) -> bool:
    pairs = [(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True)]
    return all(
        a.keys == b.keys and all(torch.equal(p, q) for p, q in zip(tensors(a), tensors(b), strict=True))
        for a, b in pairs
    )


_BEFORE: set[int] = set()


def _all_children() -> set[int]:
    found = set()
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that has just ended
            found |= {int(pid) for pid in (task / "children").read_text().split()}
    return found


@pytest.fixture(autouse=True)
def _leave_out_those_of_other_tests() -> None:
    """Ignore helpers of multiprocessing that earlier tests of this process have started."""
    _BEFORE.clear()
    _BEFORE.update(_all_children())


def children() -> set[int]:
    """Processes that decode for this one; a zombie is one as well."""
    return _all_children() - _BEFORE


# What is in a batch


def test_a_batch_is_its_images_each_cut_by_its_own_draws(root: Path) -> None:
    cfg = config(root, seed=3)
    made = make(cfg)
    files = made.dataset.files
    assert files is not None and not made.dataset.uniform
    for step in (0, 5):
        (batch,) = made.micro_batches(step)
        assert batch.image.shape == batch.weak[0].shape == (4, 3, CROP, CROP) and batch.target.dtype == torch.int64
        for role, order, size in (("labelled", made.labelled, 4), ("unlabelled", made.unlabelled, 4)):
            for k in range(size):
                epoch, i = order[step * size + k]
                pixels = read_image(files.paths[i])
                four = keyed_random.numpy_generator(3, f"crop-{role}", epoch, i).random(4).tolist()
                to = window(pixels.shape[:2], CROP, (0.5, 2.0), 0.5, four)
                image, mask = np.empty((3, CROP, CROP), np.uint8), np.empty((CROP, CROP), np.uint8)
                crop_image(pixels, to, image)
                wanted = normalise(torch.from_numpy(image)[None].float() / 255)[0]
                assert torch.equal((batch.image if role == "labelled" else batch.weak[0])[k], wanted)
                if role == "labelled":
                    crop_mask(made.dataset.target(i), to, mask)
                    assert torch.equal(batch.target[k], torch.from_numpy(mask).long())
                else:
                    crop_mask(np.zeros(pixels.shape[:2], np.uint8), to, mask)
                    assert torch.equal(batch.valid[k], torch.from_numpy(mask) == 0)
        assert not torch.equal(batch.strong[0], batch.weak[0]) and not torch.equal(*batch.strong)
    padded = [b.valid for step in range(6) for b in made.micro_batches(step)]
    assert any((~v).any() for v in padded), "some small image is padded, or the test shows nothing"


def test_decoding_processes_have_the_limit_of_the_run(root: Path) -> None:
    opened = registry.load_dataset(*registry.dataset_spec(config(root)))  # without the limit, as this process reads
    cfg = config(root, runtime__loader_workers=1, runtime__max_pixels=10)
    made = BatchLoader(cfg, opened, Views(), None, 16, CPU)
    with (
        closing(made.stream(0, 6, 1)) as stream,
        pytest.raises(ValueError, match=r"pixels, more than 10 .*runtime\.max_pixels"),
    ):
        next(stream)


def test_an_image_is_cut_otherwise_in_each_epoch_and_under_each_seed(root: Path) -> None:
    def of(seed: int, step: int) -> list[DecodeRequest]:
        made = make(config(root, seed=seed))
        return made._samples(*made._shares(step, 0))

    by_epoch = [sample for step in range(3) for sample in of(0, step)[:4]]
    names = [sample.image for sample in by_epoch]
    assert len(set(names)) == 6 and len({sample.draws for sample in by_epoch}) == 12
    assert of(0, 2) == of(0, 2) and {s.draws for s in of(0, 2)}.isdisjoint({s.draws for s in of(1, 2)})
    assert all(sample.mask for sample in of(0, 0)[:4]) and not any(sample.mask for sample in of(0, 0)[4:])


def test_a_method_without_unlabelled_images_decodes_none(root: Path) -> None:
    made = make(config(root), views=Views(weak=0))
    assert len(made._samples(*made._shares(0, 0))) == 4
    (batch,) = made.micro_batches(0)
    assert batch.weak == () and len(batch.image) == 4


def test_masks_of_unlabelled_images_are_never_opened(photo_folder: Make) -> None:
    whole = photo_folder(12, labelled=4, val=2, unlabelled_masks=True, root="whole")
    cfg = config(whole)
    first = [make(cfg).micro_batches(step) for step in range(3)]
    made = make(cfg)
    files = made.dataset.files
    assert files is not None
    for i in made.dataset.unlabelled:
        files.masks[i].write_bytes(b"not an image")
        with pytest.raises(ValueError, match=f"image {i} is not among the 4 labelled"):
            made.dataset.target_path(int(i))
    assert same(first, [made.micro_batches(step) for step in range(3)])
    for i in made.dataset.unlabelled:
        files.masks[i].unlink()
    assert same(first, [make(cfg).micro_batches(step) for step in range(3)])


# The same whoever decodes


def test_processes_threads_resuming_and_workers_change_nothing(root: Path) -> None:
    whole = [make(config(root)).micro_batches(step) for step in range(6)]
    before = children()
    for processes, start, ahead in ((0, 0, 2), (1, 0, 0), (2, 0, 0), (3, 4, 0), (2, 3, 2)):
        cfg = config(root, runtime__loader_workers=processes)
        with closing(make(cfg).stream(start, 6, ahead)) as stream:
            assert same(whole[start:], list(stream)), (processes, start, ahead)
    shared = config(root, runtime__loader_workers=1, runtime__workers=2)
    parts = []
    for rank in range(2):
        with closing(make(shared, rank, 2).stream(0, 6)) as stream:
            parts.append([batch for (batch,) in stream])
    for (batch,), *split in zip(whole, *parts, strict=True):
        for one, *others in zip(tensors(batch)[:4], *map(tensors, split), strict=False):
            assert torch.equal(one, torch.cat(others))
    assert children() == before


def test_accumulation_in_processes(root: Path) -> None:
    cfg = config(root, train__grad_accum_steps=2)
    plain = [make(cfg).micro_batches(step) for step in range(4)]
    with closing(make(override(cfg, {"runtime.loader_workers": 2})).stream(0, 4)) as stream:
        assert same(plain, list(stream))
    assert [len(batches) for batches in plain] == [2] * 4 and len(plain[0][0].image) == 2


def test_masks_in_colour_are_read_in_processes(tmp_path: Path) -> None:
    colours = PaletteEncoding(((0, 0, 0), (200, 10, 30)), (1, 255))
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (30, 40))
    Image.fromarray(np.array(colours.rgb, np.uint8)[labels]).save(tmp_path / "mask.png")
    Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(tmp_path / "sür fácé.png")
    sample = DecodeRequest(str(tmp_path / "sür fácé.png"), str(tmp_path / "mask.png"), (0.3, 0.5, 0.5, 0.1))
    recipe = CropRecipe(32, (0.5, 2.0), 0.5, 2, colours)
    here = decode_all([sample], recipe)
    assert set(np.unique(here.masks)) == {1, 255} and here.shown[0][2] is True
    with closing(DecodeWorkers(recipe, 1, 1, 0)) as decoders:
        found = decoders.take([sample])
        assert found.shown == here.shown
        assert np.array_equal(found.images, here.images) and np.array_equal(found.masks, here.masks)
    assert np.array_equal(read_mask(sample.mask or "", 2, colours), np.where(labels, 255, 1))


def test_batches_are_taken_in_the_order_in_which_they_were_asked_for(root: Path) -> None:
    made = make(config(root))
    first, second = (made._samples(*made._shares(step, 0)) for step in range(2))
    with closing(DecodeWorkers(made._recipe(), 1, 8, 1)) as decoders:
        decoders.ask(first)
        decoders.ask(second)
        with pytest.raises(ValueError, match="too many"):
            decoders.ask(first)
        with pytest.raises(ValueError, match="in the order"):
            decoders.take(second)


def test_a_thread_that_is_not_the_main_one_may_decode(root: Path) -> None:
    """A trial runs in such a thread."""
    whole = [make(config(root)).micro_batches(step) for step in range(3)]
    found: list[list[Batch]] = []

    def work() -> None:
        with closing(make(config(root, runtime__loader_workers=2)).stream(0, 3)) as stream:
            found.extend(stream)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert same(whole, found)


# Errors


@pytest.mark.parametrize("processes", [0, 1])
def test_a_file_that_cannot_be_used_is_named(root: Path, processes: int) -> None:
    cfg = config(root, runtime__loader_workers=processes)
    made = make(cfg)
    files = made.dataset.files
    assert files is not None
    path = files.paths[made.unlabelled[1][1]]
    kept = path.read_bytes()
    path.write_bytes(kept[: len(kept) // 2])
    for ahead in (0, 1):
        with (
            pytest.raises(ValueError, match=f"{path}.*(truncated|cannot be read)"),
            closing(made.stream(0, 2, ahead)) as s,
        ):
            list(s)
    path.write_bytes(kept)
    mask = files.masks[made.labelled[2][1]]
    Image.fromarray(np.zeros((5, 7), np.uint8)).save(mask)
    wanted = r"5 x 7 pixels, but .* has \d+ x \d+; an image and its mask must have one size"
    with pytest.raises(ValueError, match=wanted), closing(made.stream(0, 2)) as s:
        list(s)
    assert made._decoders is None and not children()


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_process_that_dies_is_an_error_that_says_so(root: Path, ahead: int) -> None:
    made = make(config(root, runtime__loader_workers=2, train__steps=50))
    wanted = r"ended by SIGKILL while .*jpg.*memory.*loader_workers=0"
    with pytest.raises(ChildProcessError, match=wanted), closing(made.stream(0, 50, ahead)) as stream:
        next(stream)
        assert made._decoders is not None
        os.kill(made._decoders.pids[1], signal.SIGKILL)
        list(stream)
    assert not children()


def test_a_process_that_cannot_start_is_an_error_that_says_so(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_workers.sys, "executable", "/bin/false")
    made = make(config(root, runtime__loader_workers=1))
    with pytest.raises(ChildProcessError, match="exit status 1"), closing(made.stream(0, 2)) as stream:
        next(stream)
    assert not children()


# Nothing is left behind

ALONE = """
    import os, signal, sys
    from pathlib import Path
    from viladiff.data.decode_workers import CropRecipe, DecodeRequest, DecodeWorkers
    image = next((Path(sys.argv[1]) / "images").iterdir())
    samples = [DecodeRequest(str(image), None, (0.5, 0.5, 0.5, 0.5))] * 8
    decoders = DecodeWorkers(CropRecipe(64, (0.5, 2.0), 0.5, 3, None), 2, 8, 2)
    decoders.take(samples)
    print(*decoders.pids, flush=True)
    for _ in range(3):
        decoders.ask(samples)
"""
"""Leaves work undone; has no guarded main part, and runs no second time for it."""

STREAM = """
    import os, signal, sys
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    import torch
    from viladiff.data.batch import Views
    from viladiff.runs.config import RunConfig, override
    from viladiff.data import registry
    from viladiff.data.loader import BatchLoader
    cfg = override(RunConfig(), {"data.dataset": "folder", "data.crop": 64, "runtime.data_root": sys.argv[1],
                                 "train.steps": 1000, "runtime.loader_workers": 2})
    made = BatchLoader(cfg, registry.load_dataset(*registry.dataset_spec(cfg)), Views(), None, 16, torch.device("cpu"))
    stream = made.stream(0, 1000, 2)
    next(stream)
    try:
        print(*made._decoders.pids, flush=True)  # the signal may come at once
        for _ in stream: pass
    except KeyboardInterrupt:
        stream.close()
        print("clean")
"""


def start(root: Path, script: str, then: str = "") -> tuple[subprocess.Popen[str], list[int]]:
    """A run in a group of its own, and the processes that decode for it."""
    command = [sys.executable, "-c", textwrap.dedent(script) + then, str(root)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=decode_workers.ROOT,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.stderr and process.stderr.read()
    return process, [int(pid) for pid in line.split()]


def gone(pids: list[int], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not alive(pids):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    "then", ["os.kill(os.getpid(), signal.SIGKILL)", "sys.exit(0)", "raise RuntimeError('broken')", "os._exit(3)"]
)
def test_a_run_that_ends_in_any_way_leaves_no_process(root: Path, then: str) -> None:
    process, pids = start(root, ALONE, then)
    process.wait(60)
    assert len(pids) == 2 and gone(pids)
    _, errors = process.communicate()
    assert errors == "" or "broken" in errors.splitlines()[-1]


def test_ctrl_c_reaches_the_run_alone(root: Path) -> None:
    """A terminal signals the whole group; a process that decodes must neither die of it nor print."""
    process, pids = start(root, STREAM)
    os.killpg(process.pid, signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert (out.strip(), errors, process.returncode) == ("clean", "", 0)
    assert gone(pids)


def test_a_process_that_decodes_loads_no_torch() -> None:
    """Or each would take seconds to start and hundreds of MB."""
    code = "import sys, viladiff.data.decode_workers\n"
    code += "print(sorted({'torch', 'pydantic', 'pandas', 'ray'} & set(sys.modules)))"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=decode_workers.ROOT
    )
    assert found.stdout.strip() == "[]"


# How many processes


def test_none_on_a_cpu_or_a_small_machine_some_beside_a_gpu(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    cores = 16
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)

    def chosen(device: torch.device, **changes: Any) -> tuple[int, int]:
        return decoding_processes(config(root, **changes), device)

    assert chosen(CPU) == (0, 0) and chosen(gpu) == (4, 15)
    assert chosen(gpu, runtime__workers=2) == (4, 7) and chosen(gpu, runtime__workers=4) == (2, 3)
    assert chosen(gpu, runtime__threads=1) == (0, 0), "a trial keeps to the CPUs that it was given"
    assert chosen(gpu, runtime__threads=1, runtime__cores=6) == (3, 5), "which may be more than its threads"
    assert chosen(CPU, runtime__loader_workers=3) == (3, 3) and chosen(gpu, runtime__loader_workers=0) == (0, 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert chosen(gpu) == (0, 1)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    cores = 2
    assert chosen(gpu) == (0, 1)
    cores = 1
    assert chosen(gpu) == (0, 0)
    with pytest.raises(ValueError, match=r"runtime\.loader_workers.*-1"):
        config(root, runtime__loader_workers=-1)


def test_embedded_data_start_no_process() -> None:
    cfg = override(RunConfig(), {"runtime.loader_workers": 2})
    made = BatchLoader(cfg, registry.load_dataset(*registry.dataset_spec(cfg)), Views(), None, 4, CPU)
    with closing(made.stream(0, 2)) as stream:
        next(stream)
        assert made._decoders is None


class Clock:
    """Seconds that a test passes."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def steps(pace: LoaderPace, clock: Clock, count: int, wait: float, work: float, first: float = 9.0) -> list[bool]:
    """Take ``count`` batches that come after ``wait`` seconds each; whether more processes are due after each."""

    def batches() -> Generator[int, None, None]:
        for i in range(count + 1):
            clock.now += wait if i else first
            yield i

    due = []
    for i in pace.timed(batches()):
        clock.now += work
        if i:
            due.append(pace.behind())
    return due


def test_processes_are_due_while_training_waits_and_in_the_first_minute_alone() -> None:
    clock = Clock()
    pace = LoaderPace(clock)
    due = steps(pace, clock, 100, wait=0.5, work=0.5)
    assert pace.waited == pytest.approx(50), "the first batch, for which processes start, does not count"
    assert [i for i, yes in enumerate(due) if yes] == [4, 9, 14, 19, 24, 29, 34, 39, 44, 49, 54, 59][: sum(due)]
    assert 11 <= sum(due) <= 12
    fed = LoaderPace(clock)
    assert not any(steps(fed, clock, 100, wait=0.05, work=0.95)) and fed.waited == pytest.approx(5)


def test_the_verdict_is_said_once_and_is_of_the_time_since_the_last_process() -> None:
    clock = Clock()
    pace = LoaderPace(clock)
    steps(pace, clock, 50, wait=0.5, work=0.5)
    assert pace.verdict() is None, "the minute is not over"
    clock.now += 40
    assert pace.verdict() == pytest.approx(0, abs=0.06) and pace.verdict() is None
    limited = LoaderPace(clock)
    steps(limited, clock, 70, wait=0.6, work=0.4)
    assert limited.verdict() == pytest.approx(0.6)
    said = limit_note(0.63, 15, 16)
    for part in ("63 %", "15 decoding processes on 16 cores", "runtime.picture_cache=true", "runtime.loader_workers"):
        assert part in said
    assert "its own thread decoding on 1 core;" in limit_note(0.3, 0, 1)


def test_time_of_an_earlier_leg_that_is_unknown_stays_so() -> None:
    clock = Clock()
    pace = LoaderPace(clock)
    pace.waited = None
    steps(pace, clock, 3, 1, 1)
    assert pace.waited is None
    pace = LoaderPace(clock)
    pace.waited = 7.0
    steps(pace, clock, 3, 1, 1)
    assert pace.waited == pytest.approx(10)


@pytest.mark.parametrize("ahead", [0, 2])
def test_processes_that_are_added_change_no_batch(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ahead: int
) -> None:
    whole = [make(config(root)).micro_batches(step) for step in range(6)]
    made = make(config(root))
    monkeypatch.setattr(loader, "decoding_processes", lambda cfg, device: (0, 3))
    late = iter([False, False])
    monkeypatch.setattr(made.pace, "behind", lambda: next(late, True))
    monkeypatch.setattr(made.pace, "verdict", lambda: 0.5)
    seen = []
    with closing(made.stream(0, 6, ahead)) as stream:
        found = []
        for batches in stream:
            found.append(batches)
            seen.append(0 if made._decoders is None else len(made._decoders.pids))
    assert same(whole, found) and seen[-1] == 3 and len(children()) == 0
    assert seen == [0, 0, 1, 2, 3, 3] or ahead
    assert "note: the loader is the limit: in its first minute training waited 50 % " in capsys.readouterr().err


def test_added_processes_share_what_is_asked_for(root: Path) -> None:
    made = make(config(root))
    first, second = (made._samples(*made._shares(step, 0)) for step in range(2))
    with closing(DecodeWorkers(made._recipe(), 1, 8, 1)) as decoders:
        decoders.ask(first)
        decoders.grow(3)
        decoders.ask(second)
        assert [decoders._tasks[pid] for pid in decoders.pids] == [8, 4, 4]
        for asked in (first, second):
            found = decoders.take(asked)
            assert np.array_equal(found.images, decode_all(asked, made._recipe()).images)
        assert [decoders._tasks[pid] for pid in decoders.pids] == [0, 0, 0]
    assert not children()
