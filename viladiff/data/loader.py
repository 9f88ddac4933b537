"""Batches as a pure function of the step: step s has the same batch on any number of workers.

A built-in data set is in arrays of one size and goes through ``augment.geometric``. Files are decoded and cut one by
one on the host (``decode``), optionally in other processes; colours change in batches on the device for both.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from queue import Queue
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from viladiff.config.sections import Sections
from viladiff.core import keyed_random
from viladiff.core.messages import print_text
from viladiff.data.batch import Batch, CutMix, TextBank, TextBatch, Views
from viladiff.data.captions.tags import dataset_tags
from viladiff.data.dataset import Dataset
from viladiff.data.decode_workers import CropRecipe, DecodeRequest, DecodeWorkers, decode_all
from viladiff.data.files.images import FileMasks
from viladiff.data.loading.device_copies import LoaderStream, send
from viladiff.data.loading.pace import LIMITING, LoaderPace, decoding_cores, decoding_processes, limit_note
from viladiff.data.loading.picture_cache import picture_folder
from viladiff.data.splits import set_apart
from viladiff.data.transforms.augment import geometric, normalise, strong, unit_images
from viladiff.data.transforms.mixing import cutmix_boxes, pair_partner

T = TypeVar("T")


class ShuffledIndices:
    """An endless list of image ids: one seeded permutation of ``ids`` after another.

    ``paired``: neighbours are mixed, so where an odd list ends in the middle of a pair, the next one must not begin
    with the same image.
    """

    def __init__(self, ids: np.ndarray, seed: int, name: str, paired: bool = False) -> None:
        self.ids, self.seed, self.name = ids, seed, name
        self.paired = paired and len(ids) % 2 == 1 and len(ids) > 1
        self._epoch, self._permutation = -1, ids

    def __getitem__(self, place: int) -> tuple[int, int]:
        """Return (epoch, image id) at this place of the endless list."""
        epoch, offset = divmod(place, len(self.ids))
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = self._shuffled(epoch)
            if self.paired and epoch % 2 and self._permutation[0] == self._shuffled(epoch - 1)[-1]:
                self._permutation[:2] = self._permutation[1::-1].copy()
        return epoch, int(self._permutation[offset])

    def _shuffled(self, epoch: int) -> np.ndarray:
        return keyed_random.numpy_generator(self.seed, "order", self.name, epoch).permutation(self.ids)


class MicroBatch(NamedTuple):
    """The images of one role in a micro-batch."""

    keys: tuple[int, ...]
    """Places in the global batch."""
    drawn: list[tuple[int, int]]
    """(epoch, image id) of each."""


class BatchLoader:
    """Makes this worker's part of any step's batch; it is contiguous, and so is each micro-batch within it."""

    def __init__(
        self,
        cfg: Sections,
        dataset: Dataset,
        views: Views,
        bank: TextBank | None,
        patch: int,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.cfg, self.dataset, self.views, self.bank = cfg, dataset, views, bank
        self.patch, self.device, self.rank, self.world = patch, device, rank, world
        rest, apart = (dataset.labelled, None) if views.apart == 1 else set_apart(dataset, views.apart)
        self.labelled = ShuffledIndices(rest, cfg.seed, "labelled")
        self.apart = None if apart is None else ShuffledIndices(apart, cfg.seed, "labelled-apart")
        self.unlabelled = ShuffledIndices(dataset.unlabelled, cfg.seed, "unlabelled", views.cutmix or views.pairs)
        asked = cfg.data.captions, cfg.data.captions_on
        self._tags = torch.from_numpy(dataset_tags(dataset, *asked)) if views.tags else None
        self._decoders: DecodeWorkers | None = None
        self.pace = LoaderPace()

    def micro_batches(self, step: int) -> list[Batch]:
        """Return the batches whose gradients make up one optimiser step."""
        return [self._batch(step, part) for part in range(self.cfg.train.grad_accum_steps)]

    def _shares(self, step: int, part: int) -> tuple[MicroBatch, MicroBatch]:
        """Return the labelled and the unlabelled share; the second is empty for a method that uses none."""
        data = self.cfg.data
        unlabelled = data.batch_unlabelled if self.views.unlabelled else 0
        return (
            self._share(self.labelled, data.batch_labelled, step, part),
            self._share(self.unlabelled, unlabelled, step, part),
        )

    def _share(self, order: ShuffledIndices, size: int, step: int, part: int) -> MicroBatch:
        parts = self.cfg.train.grad_accum_steps
        share = size // (self.world * parts)
        start = (self.rank * parts + part) * share
        keys = tuple(range(start, start + share))
        if order is self.labelled and self.apart is not None:
            return MicroBatch(keys, [self._partly_apart(self.apart, step, size, key) for key in keys])
        return MicroBatch(keys, [order[step * size + key] for key in keys])

    def _partly_apart(self, apart: ShuffledIndices, step: int, size: int, key: int) -> tuple[int, int]:
        """Draw the image at position ``key`` of a batch in which the last of every ``views.apart`` is set apart."""
        round_, place = divmod(step * size + key, self.views.apart)
        last = self.views.apart - 1
        return apart[round_] if place == last else self.labelled[round_ * last + place]

    def _batch(self, step: int, part: int) -> Batch:
        labelled, unlabelled = self._shares(step, part)
        crops = self._from_arrays if self.dataset.files is None else self._from_files
        image, target, weak, valid, truth = crops(labelled, unlabelled)
        batch = Batch(normalise(image), target, labelled.keys, text=self._text(labelled.drawn))
        batch.tags = self._tagged(labelled.drawn)
        if self.views.strong_labelled:
            batch.image_strong = self._strong(image, labelled.drawn, "labelled")
        if not self.views.unlabelled:
            return batch
        batch.keys_u, batch.valid, batch.text_u = unlabelled.keys, valid, self._text(unlabelled.drawn)
        batch.truth_u = truth
        batch.tags_u = self._tagged(unlabelled.drawn)
        batch.weak = (normalise(weak),) * self.views.weak
        batch.strong = tuple(self._strong(weak, unlabelled.drawn, view) for view in range(self.views.strong))
        if self.views.cutmix:
            batch.mix = tuple(self._mix(unlabelled.drawn, view) for view in range(self.views.strong))
        return batch

    def _rngs(self, purpose: str, drawn: list[tuple[int, int]]) -> list[np.random.Generator]:
        return [keyed_random.numpy_generator(self.cfg.seed, purpose, epoch, image) for epoch, image in drawn]

    def _from_arrays(
        self, labelled: MicroBatch, unlabelled: MicroBatch
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Return images in 0..1, masks of labelled ones, unlabelled images, their valid pixels, an oracle's masks."""
        masks = np.stack([self.dataset.target(i) for _, i in labelled.drawn])
        image, target, _ = self._geometry("labelled", labelled.drawn, masks)
        assert target is not None  # masks went in
        if not unlabelled.drawn:
            return image, target, image[:0], target[:0] > 0, None
        hidden = self.dataset.oracle_masks([i for _, i in unlabelled.drawn]) if self.views.truth else None
        weak, truth, valid = self._geometry("unlabelled", unlabelled.drawn, hidden)
        return image, target, weak, valid, truth

    def _geometry(
        self, purpose: str, drawn: list[tuple[int, int]], masks: np.ndarray | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        data, images = self.cfg.data, np.stack([self.dataset.images[i] for _, i in drawn])
        on_device = send(torch.from_numpy(images), self.device)
        labels = None if masks is None else send(torch.from_numpy(masks), self.device)
        return geometric(on_device, labels, data.crop, data.scale, data.hflip, self._rngs(f"crop-{purpose}", drawn))

    def _from_files(self, labelled: MicroBatch, unlabelled: MicroBatch) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        """Return the same as ``_from_arrays``."""
        samples, count = self._samples(labelled, unlabelled), len(labelled.drawn)
        found = decode_all(samples, self._recipe()) if self._decoders is None else self._decoders.take(samples)
        pixels = unit_images(send(torch.from_numpy(found.images), self.device))
        target = send(torch.from_numpy(found.masks[:count]), self.device).long()
        valid = valid_pixels(found.shown[count:], self.cfg.data.crop, self.device)
        return pixels[:count], target, pixels[count:], valid, None

    def _samples(self, labelled: MicroBatch, unlabelled: MicroBatch) -> list[DecodeRequest]:
        files = self.dataset.files
        assert files is not None
        return [
            DecodeRequest(
                str(files.paths[i]), str(self.dataset.target_path(i)) if masked else None, tuple(rng.random(4).tolist())
            )
            for share, purpose, masked in ((labelled, "crop-labelled", True), (unlabelled, "crop-unlabelled", False))
            for (_, i), rng in zip(share.drawn, self._rngs(purpose, share.drawn), strict=True)
        ]

    def _recipe(self) -> CropRecipe:
        data, masks = self.cfg.data, self.dataset.masks
        assert isinstance(masks, FileMasks)
        pictures = str(picture_folder()) if self.cfg.runtime.picture_cache else None
        reading = masks.num_classes, masks.coding, self.dataset.pixels, pictures, self.cfg.runtime.max_pixels
        return CropRecipe(data.crop, data.scale, data.hflip, *reading)

    def _strong(self, weak: Tensor, drawn: list[tuple[int, int]], view: int | str) -> Tensor:
        return normalise(strong(weak, self._rngs(f"strong-{view}", drawn)) if self.cfg.data.color_jitter else weak)

    def _mix(self, drawn: list[tuple[int, int]], view: int) -> CutMix:
        snap = self.patch if self.cfg.data.cutmix_grid == "patch" else 1
        boxes = cutmix_boxes(self._rngs(f"cutmix-{view}", drawn), self.cfg.data.crop, snap)
        return CutMix(send(boxes, self.device), send(pair_partner(len(drawn)), self.device))

    def _text(self, drawn: list[tuple[int, int]]) -> TextBatch | None:
        if self.bank is None:
            return None
        text = self.bank.batch([i for _, i in drawn])
        return TextBatch(send(text.tokens, self.device), send(text.mask, self.device))

    def _tagged(self, drawn: list[tuple[int, int]]) -> Tensor | None:
        return None if self._tags is None else send(self._tags[[i for _, i in drawn]], self.device)

    def stream(self, start: int, stop: int, ahead: int = 0) -> Generator[list[Batch], None, None]:
        """Yield the micro-batches of steps start ... stop - 1, with ``ahead`` steps prepared by a thread.

        Files are decoded in ``decoding_processes``, which live as long as this iterator: close it.
        """
        with self._decoding():
            steps = self._steps(start, stop)
            if not ahead:
                yield from self.pace.timed(steps)
                return
            stream = LoaderStream(self.device)
            yield from self.pace.timed(stream.receive(_threaded(stream.prepare(steps), ahead)))

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        try:
            if self.dataset.files is not None:
                self._decode_in(decoding_processes(self.cfg, self.device)[0])
            yield
        finally:
            if self._decoders is not None:
                self._decoders.close()
                self._decoders = None

    def _decode_in(self, processes: int) -> None:
        """Bring the number of decoding processes up to ``processes``; batches are the same by any number."""
        if self._decoders is None and processes:
            parts = self.cfg.train.grad_accum_steps
            samples = len(self._samples(*self._shares(0, 0)))
            self._decoders = DecodeWorkers(self._recipe(), processes, samples, (1 + DECODED_AHEAD) * parts - 1)
        elif self._decoders is not None:
            self._decoders.grow(processes)

    def _steps(self, start: int, stop: int) -> Generator[list[Batch], None, None]:
        asked = start
        for step in range(start, stop):
            if self.dataset.files is not None:
                self._adapt()
            asked = max(asked, step)
            while self._decoders is not None and asked < min(stop, step + 1 + DECODED_AHEAD):
                for part in range(self.cfg.train.grad_accum_steps):
                    self._decoders.ask(self._samples(*self._shares(asked, part)))
                asked += 1
            yield self.micro_batches(step)

    def _adapt(self) -> None:
        """Start processes while training waits for images, and say after a minute if it still does."""
        here = 0 if self._decoders is None else len(self._decoders.pids)
        most = decoding_processes(self.cfg, self.device)[1]
        if here < most and self.pace.behind():
            self._decode_in(min(most, max(1, 2 * here)))
        share = self.pace.verdict()
        if share is not None and share > LIMITING and self.rank == 0:
            print_text(f"note: {limit_note(share, here, decoding_cores(self.cfg))}", error=True, flush=True)


def valid_pixels(shown: list[tuple[int, int, bool]], crop: int, device: torch.device) -> Tensor:
    """Return (n, crop, crop) bool, False in the padding of each crop, by geometry alone; see ``DecodedBatch.shown``."""
    seen = send(torch.tensor(shown, dtype=torch.int64).view(-1, 3), device)
    rows, columns, flip = seen[:, :, None].unbind(1)
    place = torch.arange(crop, device=device)
    column = torch.where(flip > 0, crop - 1 - place, place)
    return (place < rows)[:, :, None] & (column < columns)[:, None, :]


DECODED_AHEAD = 2
"""Steps that decoding processes are ahead."""


def _threaded(items: Iterator[T], ahead: int) -> Generator[T, None, None]:
    """Prepare up to ``ahead`` items in a thread, which ends when this iterator is closed."""
    queue: Queue[T | BaseException | None] = Queue(ahead)
    ended = threading.Event()

    def fill() -> None:
        try:
            for item in items:
                queue.put(item)
                if ended.is_set():
                    return
            queue.put(None)
        except BaseException as error:
            queue.put(error)

    thread = threading.Thread(target=fill, daemon=True)
    thread.start()
    try:
        while (item := queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        ended.set()
        while thread.is_alive():
            while not queue.empty():
                queue.get_nowait()
            thread.join(0.05)
