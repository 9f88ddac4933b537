"""Images that are scored, in batches of one size each, read ahead by threads where they are in files."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from viladiff.config.sections import Sections
from viladiff.data.batch import EvalBatch, TextBank, TextBatch
from viladiff.data.dataset import Arrays, Dataset
from viladiff.data.files.images import FileImages
from viladiff.data.files.run_checks import image_sizes
from viladiff.data.loading.device_copies import send
from viladiff.data.loading.pace import decoding_cores
from viladiff.data.splits import Subset
from viladiff.data.transforms.augment import normalise, unit_images

BATCH_PIXELS = 25 * 64 * 64
"""Of the images that are scored together on a CPU, and of built-in data anywhere: more of them gain nothing."""
LOGIT_BYTES = 2**29
"""Of the logits of one stream of images that are scored together on a GPU; all streams and labels take several times
as much."""
AHEAD_BYTES = 2**28
"""Of decoded images and masks that wait for the network."""
MOST_THREADS = 8
"""That decode for one worker; a GPU that scores small networks keeps no more of them busy."""

Size = tuple[int, int]
"""(height, width)."""
Pair = tuple[np.ndarray, np.ndarray]
"""An image and its mask."""


def images_together(size: Size, classes: int, device: torch.device) -> int:
    """Return how many images from files of (height, width) go in one batch; by fixed budgets, not by free memory."""
    pixels = size[0] * size[1]
    if device.type == "cpu":
        return max(1, BATCH_PIXELS // pixels)
    return max(1, LOGIT_BYTES // (4 * classes * pixels))


def plan_batches(
    dataset: Dataset, places: Sequence[int], together: Callable[[Size], int]
) -> list[tuple[tuple[int, ...], Size]]:
    """Return batches of equally large images, as places in the validation set, with their size.

    Images of arrays keep their order. Those of several sizes are grouped over the whole list, each size where it first
    occurs, so that only the last batch of a size is not full. ``together``: most images of a size in one batch. Sizes
    are read from stored facts or headers; an image whose header is damaged stands alone, and its reader says why.
    """
    groups: dict[Size, list[int]] = {}
    for place, size in zip(places, _sizes(dataset, places), strict=True):
        groups.setdefault(size, []).append(place)
    found = []
    for size, some in groups.items():
        most = together(size) if all(size) else 1
        found += [(tuple(some[start : start + most]), size) for start in range(0, len(some), most)]
    return found


def _sizes(dataset: Dataset, places: Sequence[int]) -> list[Size]:
    """Return the size of each image; (0, 0) for one that cannot be read."""
    if dataset.uniform:
        return [dataset.val_images[0].shape[:2]] * len(places) if places else []
    paths = _paths(dataset.val_images)
    if paths is None:
        return [dataset.val_images[i].shape[:2] for i in places]
    return [size or (0, 0) for size in image_sizes([paths[i] for i in places], dataset.contents, dataset.pixels)]


def _paths(images: Arrays) -> Sequence[Path] | None:
    """Return the files of images; None where they are arrays."""
    if isinstance(images, FileImages):
        return images.paths
    if isinstance(images, Subset):
        whole = _paths(images.whole)
        return None if whole is None else [whole[i] for i in images.places.tolist()]
    return None


def decoding_threads(cfg: Sections, device: torch.device) -> int:
    """Return how many threads decode ahead of a network that is scored: ``runtime.loader_workers`` if given.

    0 on a CPU, whose cores the network takes all; else all cores of this worker but one, ``MOST_THREADS`` at most.
    """
    if cfg.runtime.loader_workers is not None:
        return cfg.runtime.loader_workers
    return 0 if device.type == "cpu" else min(MOST_THREADS, max(1, decoding_cores(cfg) - 1))


def validation(
    dataset: Dataset,
    bank: TextBank | None,
    device: torch.device,
    batches: Sequence[tuple[tuple[int, ...], Size]],
    threads: int = 0,
) -> Iterator[EvalBatch]:
    """Yield the batches of ``plan_batches`` in order: images (B, N, H, W) normalised, masks (B, H, W) int64, texts.

    There is no augmentation. ``threads`` read files ahead of the batch that is asked for, as far as ``AHEAD_BYTES``
    allow; with 0 each is read when it is its turn. Raises ValueError that names the file for one that cannot be read or
    has changed since the plan, and for a mask of another size than its image.
    """
    threads = 0 if dataset.uniform else threads
    each = dataset.pixels.inputs * (1 if dataset.pixels.value_range is None else 4) + 1

    def read(place: int) -> Pair:
        return dataset.val_images[place], dataset.val_masks[place]

    weights = [len(places) * height * width * each for places, (height, width) in batches]
    read_batches = _read_ahead(read, [places for places, _ in batches], weights, threads)
    for (places, size), pairs in zip(batches, read_batches, strict=True):
        for place, pair in zip(places, pairs, strict=True):
            _check_size(dataset, place, pair, size)
        images = send(torch.from_numpy(np.stack([image for image, _ in pairs])), device)
        masks = send(torch.from_numpy(np.stack([mask for _, mask in pairs])), device)
        text = None
        if bank is not None:
            found = bank.batch(list(places))
            text = TextBatch(found.tokens.to(device), found.mask.to(device))
        yield EvalBatch(
            normalise(unit_images(images.permute(0, 3, 1, 2).contiguous())), masks.long(), text, tuple(places)
        )


def _read_ahead(
    read: Callable[[int], Pair], batches: Sequence[tuple[int, ...]], weights: Sequence[int], threads: int
) -> Iterator[list[Pair]]:
    """Yield what ``read`` gives for each batch, in order; ``weights`` are the batches' bytes."""
    if not threads:
        for batch in batches:
            yield [read(place) for place in batch]
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    waiting: deque[tuple[int, list[Future[Pair]]]] = deque()
    held = 0
    try:
        for batch, weight in zip(batches, weights, strict=True):
            waiting.append((weight, [pool.submit(read, place) for place in batch]))
            held += weight
            while held > AHEAD_BYTES and len(waiting) > 1:
                freed, pending = waiting.popleft()
                yield [one.result() for one in pending]
                held -= freed
        while waiting:
            yield [one.result() for one in waiting.popleft()[1]]
    finally:
        pool.shutdown(cancel_futures=True)


def _check_size(dataset: Dataset, place: int, pair: Pair, planned: Size) -> None:
    size, other = pair[0].shape[:2], pair[1].shape
    name = place if dataset.val_files is None else dataset.val_files.ids[place]
    if size != other:
        raise ValueError(
            f"validation image {name}: its mask has {other}, the image {size} (height, width); both must have one size"
        )
    if all(planned) and size != planned:
        raise ValueError(f"validation image {name}: was changed while it was read, from {planned} to {size} pixels")
