"""Images that are scored: batches of one size, the same pixels whether they are read ahead or not."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from viladiff.data import registry
from viladiff.data.dataset import Dataset
from viladiff.data.files.images import read_image
from viladiff.data.loading import eval_loader
from viladiff.data.loading.eval_loader import decoding_threads, images_together, plan_batches, validation
from viladiff.data.transforms.augment import normalise
from viladiff.runs.config import RunConfig, override

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
Make = Callable[..., Path]


def config(root: Path, **changes: Any) -> RunConfig:
    given = {"data.dataset": "folder", "data.crop": 32, "runtime.data_root": str(root)}
    return override(RunConfig(), {**given, **{path.replace("__", "."): value for path, value in changes.items()}})


def opened(root: Path, **changes: Any) -> Dataset:
    return registry.load_dataset(*registry.dataset_spec(config(root, **changes)))


@pytest.fixture
def data(photo_folder: Make) -> Dataset:
    """Sixteen scored images of four sizes."""
    return opened(photo_folder(24, labelled=6, val=16, sizes=(40, 41)))


def ended() -> bool:
    """Whether no thread that decodes is left."""
    return not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_each_batch_has_one_size_and_each_image_its_place(data: Dataset) -> None:
    sizes = [image.shape[:2] for image in data.val_images]
    places = range(1, 16, 2)
    planned = plan_batches(data, places, lambda size: 3)
    assert sorted(place for some, _ in planned for place in some) == list(places)
    assert all({sizes[place] for place in some} == {size} and list(some) == sorted(some) for some, size in planned)
    counts = {size: sum(sizes[place] == size for place in places) for size in sizes}
    assert len(planned) == sum(-(-count // 3) for count in counts.values()) < len(places)
    found = list(validation(data, None, CPU, planned))
    assert [batch.places for batch in found] == [some for some, _ in planned]
    for batch in found:
        for k, place in enumerate(batch.places):
            wanted = normalise(torch.from_numpy(data.val_images[place]).permute(2, 0, 1)[None].float() / 255)[0]
            assert torch.equal(batch.images[k], wanted) and batch.text is None
            assert torch.equal(batch.target[k], torch.from_numpy(data.val_masks[place]).long())


def test_arrays_of_one_size_keep_their_order() -> None:
    data = registry.load_dataset(*registry.dataset_spec(RunConfig()))
    planned = plan_batches(data, range(0, 20, 2), lambda size: 4)
    assert planned == [((0, 2, 4, 6), (64, 64)), ((8, 10, 12, 14), (64, 64)), ((16, 18), (64, 64))]
    assert plan_batches(data, [], lambda size: 4) == []
    assert [batch.places for batch in validation(data, None, CPU, planned, 3)] == [some for some, _ in planned]
    assert ended(), "nothing is to be decoded"


def test_images_that_are_held_out_are_planned_by_their_headers(
    photo_folder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = photo_folder(16, labelled=12, val=2, sizes=(40, 41))
    held = opened(root, data__holdout=0.4, eval__split="holdout")
    sizes = [image.shape[:2] for image in held.val_images]
    monkeypatch.setattr(type(held.val_images), "__getitem__", lambda self, index: pytest.fail("decoded"))
    planned = plan_batches(held, range(len(sizes)), lambda size: 9)
    assert {place: size for some, size in planned for place in some} == dict(enumerate(sizes))


def test_threads_give_the_same_batches(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan_batches(data, range(16), lambda size: 3)
    plain = list(validation(data, None, CPU, planned))
    for most in (1, 30_000, 2**28):
        monkeypatch.setattr(eval_loader, "AHEAD_BYTES", most)
        found = list(validation(data, None, CPU, planned, 3))
        assert [batch.places for batch in found] == [batch.places for batch in plain]
        assert all(
            torch.equal(a.images, b.images) and torch.equal(a.target, b.target)
            for a, b in zip(plain, found, strict=True)
        )
    assert ended()


def test_what_waits_is_bounded_and_a_batch_is_always_ahead(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    plain = type(data.val_masks).__getitem__

    def noted(self: Any, index: int) -> np.ndarray:
        read.append(index)
        return plain(self, index)

    monkeypatch.setattr(type(data.val_masks), "__getitem__", noted)
    planned = plan_batches(data, range(16), lambda size: 1)
    for most, ahead in ((1, 1), (3 * 4 * 41 * 41, 3), (2**28, 15)):
        monkeypatch.setattr(eval_loader, "AHEAD_BYTES", most)
        read.clear()
        with closing(validation(data, None, CPU, planned, 2)) as batches:
            next(batches)
            time.sleep(0.5)
            assert ahead <= len(read) - 1 <= ahead + 1
        assert ended(), "who stops in between leaves nothing behind"


@pytest.mark.parametrize("threads", [0, 3])
def test_faults_name_the_file(data: Dataset, threads: int) -> None:
    planned = plan_batches(data, range(16), lambda size: 4)
    assert data.val_files is not None
    mask, image = data.val_files.masks[5], data.val_files.paths[9]
    kept = mask.read_bytes()
    Image.fromarray(np.zeros((5, 7), np.uint8)).save(mask)
    with pytest.raises(ValueError, match=rf"{data.val_files.ids[5]}: its mask has \(5, 7\), the image \(4\d, 4\d\)"):
        list(validation(data, None, CPU, planned, threads))
    mask.write_bytes(kept)
    pixels = read_image(image)
    Image.fromarray(np.concatenate([pixels, pixels])).save(image)
    Image.fromarray(np.zeros((2 * pixels.shape[0], pixels.shape[1]), np.uint8)).save(data.val_files.masks[9])
    with pytest.raises(ValueError, match=rf"{data.val_files.ids[9]}: was changed while it was read, from \(4"):
        list(validation(data, None, CPU, planned, threads))
    image.write_bytes(b"\xff\xd8\xff nothing")
    with pytest.raises(ValueError, match=rf"{image}: "):
        list(validation(data, None, CPU, planned, threads))
    with pytest.raises(ValueError, match=rf"{image}: "):
        list(validation(data, None, CPU, plan_batches(data, range(16), lambda size: 4), threads))
    assert ended()


def test_budgets_of_a_batch() -> None:
    assert [images_together(size, 21, CPU) for size in ((64, 64), (320, 320), (375, 500))] == [25, 1, 1]
    assert [images_together(size, 21, GPU) for size in ((375, 500), (1024, 2048), (10_000, 10_000))] == [34, 3, 1]
    assert images_together((375, 500), 150, GPU) == 4


def test_threads_are_those_that_the_worker_has_cores_for(photo_folder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    root = photo_folder(8, sizes=(40, 41))
    cores = 16
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)

    def chosen(device: torch.device, **changes: Any) -> int:
        return decoding_threads(config(root, **changes), device)

    assert chosen(CPU) == 0 and chosen(GPU) == 8 and chosen(GPU, runtime__workers=4) == 3
    assert chosen(GPU, runtime__threads=1) == 1 and chosen(CPU, runtime__threads=1) == 0
    assert chosen(CPU, runtime__loader_workers=2) == 2 and chosen(GPU, runtime__loader_workers=0) == 0
