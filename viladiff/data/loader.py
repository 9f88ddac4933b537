"""Batches as a pure function of the step: whoever asks for step s, on any number of workers, gets the same batch."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from queue import Queue
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from viladiff import draws
from viladiff.batch import Batch, CutMix, TextBatch, Views
from viladiff.data.augment import geometric, normalise, strong
from viladiff.data.mixing import cutmix_boxes, pair_partner

if TYPE_CHECKING:
    from viladiff.config import RunConfig
    from viladiff.data.datasets import Dataset
    from viladiff.text.bank import Bank


class Order:
    """An endless list of image ids: one seeded permutation of ``ids`` after another."""

    def __init__(self, ids: np.ndarray, seed: int, name: str) -> None:
        self.ids, self.seed, self.name = ids, seed, name
        self._epoch, self._permutation = -1, ids

    def __getitem__(self, place: int) -> tuple[int, int]:
        """(epoch, image id) at this place of the endless list."""
        epoch, offset = divmod(place, len(self.ids))
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = draws.rng(self.seed, "order", self.name, epoch).permutation(self.ids)
        return epoch, int(self._permutation[offset])


class Loader:
    """Makes this worker's part of any step's batch; it is contiguous, and so is each micro-batch within it."""

    def __init__(
        self,
        cfg: RunConfig,
        dataset: Dataset,
        views: Views,
        bank: Bank | None,
        patch: int,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.cfg, self.dataset, self.views, self.bank = cfg, dataset, views, bank
        self.patch, self.device, self.rank, self.world = patch, device, rank, world
        self.labelled = Order(dataset.labelled, cfg.seed, "labelled")
        # Where every image is labelled, they serve in both roles.
        rest = dataset.unlabelled if len(dataset.unlabelled) else dataset.labelled
        self.unlabelled = Order(rest, cfg.seed, "unlabelled")

    def micro_batches(self, step: int) -> list[Batch]:
        """The batches whose gradients make up one optimiser step."""
        parts = self.cfg.train.accumulate
        return [self._batch(step, part, parts) for part in range(parts)]

    def _places(self, size: int, part: int, parts: int) -> list[int]:
        share = size // (self.world * parts)
        start = (self.rank * parts + part) * share
        return list(range(start, start + share))

    def _batch(self, step: int, part: int, parts: int) -> Batch:
        data = self.cfg.data
        keys = self._places(data.batch_labelled, part, parts)
        drawn = [self.labelled[step * data.batch_labelled + key] for key in keys]
        masks = np.stack([self.dataset.target(i) for _, i in drawn])
        image, target, _ = self._geometry("labelled", drawn, masks)
        assert target is not None  # masks went in
        batch = Batch(normalise(image), target, tuple(keys), text=self._text(drawn))
        if self.views.strong_labelled:
            batch.image_strong = self._strong(image, drawn, "labelled")
        if not self.views.unlabelled:
            return batch
        keys_u = self._places(data.batch_unlabelled, part, parts)
        drawn_u = [self.unlabelled[step * data.batch_unlabelled + key] for key in keys_u]
        weak, _, valid = self._geometry("unlabelled", drawn_u, None)
        batch.keys_u, batch.valid, batch.text_u = tuple(keys_u), valid, self._text(drawn_u)
        batch.weak = (normalise(weak),) * self.views.weak
        batch.strong = tuple(self._strong(weak, drawn_u, view) for view in range(self.views.strong))
        if self.views.cutmix:
            batch.mix = tuple(self._mix(drawn_u, view) for view in range(self.views.strong))
        return batch

    def _rngs(self, purpose: str, drawn: list[tuple[int, int]]) -> list[np.random.Generator]:
        return [draws.rng(self.cfg.seed, purpose, epoch, image) for epoch, image in drawn]

    def _geometry(
        self, purpose: str, drawn: list[tuple[int, int]], masks: np.ndarray | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        data, images = self.cfg.data, np.stack([self.dataset.images[i] for _, i in drawn])
        on_device = torch.from_numpy(images).to(self.device, non_blocking=True)
        labels = None if masks is None else torch.from_numpy(masks).to(self.device, non_blocking=True)
        return geometric(on_device, labels, data.crop, data.scale, data.hflip, self._rngs(f"crop-{purpose}", drawn))

    def _strong(self, weak: Tensor, drawn: list[tuple[int, int]], view: int | str) -> Tensor:
        return normalise(strong(weak, self._rngs(f"strong-{view}", drawn)) if self.cfg.data.colour else weak)

    def _mix(self, drawn: list[tuple[int, int]], view: int) -> CutMix:
        boxes = cutmix_boxes(self._rngs(f"cutmix-{view}", drawn), self.cfg.data.crop, self.patch)
        return CutMix(boxes.to(self.device), pair_partner(len(drawn)).to(self.device))

    def _text(self, drawn: list[tuple[int, int]]) -> TextBatch | None:
        if self.bank is None:
            return None
        text = self.bank.batch([i for _, i in drawn])
        return TextBatch(text.tokens.to(self.device), text.mask.to(self.device))

    def stream(self, start: int, stop: int, ahead: int = 0) -> Iterator[list[Batch]]:
        """The micro-batches of steps start ... stop - 1, with ``ahead`` steps prepared by a thread."""
        if ahead == 0:
            yield from map(self.micro_batches, range(start, stop))
            return
        queue: Queue[list[Batch] | BaseException] = Queue(ahead)
        ended = threading.Event()

        def fill() -> None:
            try:
                for step in range(start, stop):
                    if ended.is_set():
                        return
                    queue.put(self.micro_batches(step))
            except BaseException as error:
                queue.put(error)

        thread = threading.Thread(target=fill, daemon=True)
        thread.start()
        try:
            for _ in range(start, stop):
                item = queue.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            ended.set()
            while not queue.empty():
                queue.get_nowait()


def validation(
    dataset: Dataset, bank: Bank | None, device: torch.device, batch: int, indices: range
) -> Iterator[tuple[Tensor, Tensor, TextBatch | None]]:
    """Validation images (B, 3, H, W) normalised, masks (B, H, W) int64 and words, in order, without augmentation."""
    for start in range(0, len(indices), batch):
        some = list(indices[start : start + batch])
        images = torch.from_numpy(np.stack([dataset.val_images[i] for i in some])).to(device)
        masks = torch.from_numpy(np.stack([dataset.val_masks[i] for i in some])).to(device)
        text = None
        if bank is not None:
            found = bank.batch(some)
            text = TextBatch(found.tokens.to(device), found.mask.to(device))
        yield normalise(images.permute(0, 3, 1, 2).float() / 255), masks.long(), text
