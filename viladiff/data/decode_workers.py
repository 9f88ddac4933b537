"""Decoding of files to crops, in this process or in worker processes.

``python -m viladiff.data.decode_workers`` is a worker: a program of its own, so that it neither loads torch (0.2 s to
start instead of seconds, 40 MB instead of hundreds) nor runs the caller's main module again, and so that a trial's
thread can start it as well. Tasks and answers are lines of JSON on its standard streams; pixels are in memory that both
sides have mapped and that no file name leads to. It ends when its input does, so that it never outlives the run.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import weakref
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from viladiff.config.pixel_format import RGB_8, PixelFormat
from viladiff.data.files.images import IdEncoding, MaskEncoding, PaletteEncoding
from viladiff.data.formats.pillow_file import limit_pixels
from viladiff.data.loading.picture_cache import picture_cache
from viladiff.data.transforms.geometry import Range, Window, crop_image, crop_mask, window

ROOT = Path(__file__).resolve().parents[2]
"""The directory that a fresh interpreter finds this package in."""


class CropRecipe(NamedTuple):
    """The processing of every file of a run."""

    crop: int
    scale: Range
    hflip: float
    num_classes: int
    coding: MaskEncoding | None
    """What the pixels of a mask stand for, where they are not class ids."""
    pixels: PixelFormat = RGB_8
    """What the pixels of an image are."""
    pictures: str | None = None
    """Folder of decoded pictures that are read in place of files, and stored where they are missing."""
    max_pixels: int | None = None
    """``runtime.max_pixels``."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of crops."""
        return np.dtype(np.uint8 if self.pixels.value_range is None else np.float32)

    @property
    def sample_bytes(self) -> int:
        """Bytes of a crop and its mask."""
        return (self.pixels.inputs * self.dtype.itemsize + 1) * self.crop**2


class DecodeRequest(NamedTuple):
    """One image to decode."""

    image: str
    mask: str | None
    """None for an unlabelled image, whose mask is not to be opened."""
    draws: tuple[float, ...]
    """Four uniform numbers that choose the window; see ``geometry.window``."""


class DecodedBatch(NamedTuple):
    """Crops of several samples."""

    images: np.ndarray
    """(n, N, crop, crop) uint8, or float32 in 0..1 where a range of values is declared; 0 in the padding."""
    masks: np.ndarray
    """(n, crop, crop) uint8, 255 in the padding; meaningless where there is no mask."""
    shown: list[tuple[int, int, bool]]
    """Rows and columns of each crop that show the image, and whether it is mirrored."""


def decode(sample: DecodeRequest, recipe: CropRecipe, image: np.ndarray, mask: np.ndarray) -> tuple[int, int, bool]:
    """Write one crop to ``image`` (N, crop, crop) and ``mask`` (crop, crop); return a row of ``DecodedBatch``.

    Raises ValueError that names the file for one that cannot be read, and for a mask of another size than its image.
    """
    cache = picture_cache(recipe.pictures)
    with cache.image(sample.image, recipe.pixels) as pixels:
        height, width = pixels.shape[:2]
        to: Window = window((height, width), recipe.crop, recipe.scale, recipe.hflip, sample.draws)
        crop_image(pixels, to, image)
    if sample.mask is None:
        return (*to.shown, to.flip)
    with cache.mask(sample.mask, recipe.num_classes, recipe.coding) as labels:
        if labels.shape != (height, width):
            sizes = f"{labels.shape[0]} x {labels.shape[1]} pixels, but {sample.image} has {height} x {width}"
            raise ValueError(f"{sample.mask}: {sizes}; an image and its mask must have one size")
        crop_mask(labels, to, mask)
    return (*to.shown, to.flip)


def decode_all(samples: Sequence[DecodeRequest], recipe: CropRecipe) -> DecodedBatch:
    """Decode the samples one after another in this process."""
    images, masks = _arrays(bytearray(_bytes(len(samples), recipe)), recipe)
    shown = [decode(sample, recipe, *out) for sample, *out in zip(samples, images, masks, strict=True)]
    return DecodedBatch(images, masks, shown)


def _bytes(samples: int, recipe: CropRecipe) -> int:
    return max(1, samples * recipe.sample_bytes)


def _arrays(memory: bytearray | mmap.mmap, recipe: CropRecipe) -> tuple[np.ndarray, np.ndarray]:
    """View the memory as images and masks of as many samples as it holds."""
    crop = recipe.crop
    samples = len(memory) // recipe.sample_bytes
    flat = np.frombuffer(memory, np.uint8, samples * recipe.sample_bytes)
    cut = len(flat) - samples * crop**2
    images = flat[:cut].view(recipe.dtype).reshape(samples, recipe.pixels.inputs, crop, crop)
    return images, flat[cut:].reshape(samples, crop, crop)


_Process = subprocess.Popen[bytes]


class DecodeWorkers:
    """Processes that decode batches in the order in which they are asked for, ``ahead`` of them beforehand.

    What ``take`` returns may be overwritten by the next ``ask``.
    """

    def __init__(self, recipe: CropRecipe, processes: int, samples: int, ahead: int) -> None:
        """Start the processes. samples: maximum size of a batch."""
        self.recipe, self.samples, self.slots = recipe, samples, ahead + 1
        self._asked: deque[tuple[int, tuple[DecodeRequest, ...], list[_Process]]] = deque()
        self._next = 0
        self._size = _bytes(samples * self.slots, recipe)
        self._file = _nameless(self._size)
        self._images, self._masks = _arrays(mmap.mmap(self._file.fileno(), self._size), recipe)
        self._processes: list[_Process] = []
        self._tasks: Counter[int] = Counter()
        """By process id, what it has not answered."""
        self._finalizer = weakref.finalize(self, _end, self._processes, self._file)
        self._finalizer.atexit = False  # a forked copy of this process must not end them when it exits
        self.grow(processes)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def grow(self, processes: int) -> None:
        """Start more processes, until there are so many; what is asked for from now on is shared with them."""
        while len(self._processes) < processes:
            self._processes.append(_start(self._file.fileno(), self._size, self.recipe))

    def ask(self, samples: Sequence[DecodeRequest]) -> None:
        """Request a batch. At most ``ahead`` may be pending at a time."""
        if len(self._asked) >= self.slots or len(samples) > self.samples:
            raise ValueError(f"{len(self._asked)} batches are out, one of {len(samples)} samples: too many")
        slot, self._next = self._next, (self._next + 1) % self.slots
        chosen: list[_Process] = []
        self._asked.append((slot, tuple(samples), chosen))
        for i, sample in enumerate(samples):
            process = min(self._processes, key=lambda one: self._tasks[one.pid])
            chosen.append(process)
            self._tasks[process.pid] += 1
            try:
                _write(process, [slot * self.samples + i, *sample])
            except OSError:
                raise self._died(process, sample) from None

    def take(self, samples: Sequence[DecodeRequest]) -> DecodedBatch:
        """Return the crops of the oldest requested batch, which must be ``samples``, or request it if none is.

        Raises ValueError for a file that cannot be used, ChildProcessError where a process has died.
        """
        if not self._asked:
            self.ask(samples)
        slot, asked, chosen = self._asked.popleft()
        if asked != tuple(samples):
            raise ValueError("batches must be taken in the order in which they were asked for")
        shown = [self._answer(process, sample) for process, sample in zip(chosen, asked, strict=True)]
        part = slice(slot * self.samples, slot * self.samples + len(asked))
        return DecodedBatch(self._images[part], self._masks[part], shown)

    def close(self) -> None:
        """Kill the processes at once; they have no state to save."""
        self._finalizer()

    def _answer(self, process: _Process, sample: DecodeRequest) -> tuple[int, int, bool]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.endswith(b"\n"):
            raise self._died(process, sample)
        self._tasks[process.pid] -= 1
        answer = json.loads(line)
        if isinstance(answer, str):
            raise ValueError(answer)
        rows, columns, flip = answer
        return rows, columns, flip

    def _died(self, process: _Process, sample: DecodeRequest) -> ChildProcessError:
        try:
            code = process.wait(10)
        except subprocess.TimeoutExpired:
            how = "closed its output"
        else:
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        return ChildProcessError(
            f"a process that decodes images {how} while {sample.image} was its task; too little memory is the usual "
            "cause. The same command goes on from the last checkpoint; runtime.loader_workers=0 does without them"
        )


def _nameless(size: int) -> IO[bytes]:
    """Open a file in memory, or in the directory of temporary files, that disappears with its last user."""
    in_memory = hasattr(os, "memfd_create")
    file = os.fdopen(os.memfd_create("viladiff"), "r+b") if in_memory else tempfile.TemporaryFile()  # noqa: SIM115
    file.truncate(size)
    return file


def _start(memory: int, size: int, recipe: CropRecipe) -> _Process:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        # -P: nothing is imported from the directory that the run was started in.
        [sys.executable, "-P", "-m", "viladiff.data.decode_workers", str(memory), str(size)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=(memory,),
        env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
        start_new_session=True,  # a terminal's Ctrl-C is for the run, which ends these itself
    )
    with suppress(OSError):  # one that dies at once is noticed by whoever asks it
        coding = recipe.coding
        packed = coding and [isinstance(coding, PaletteEncoding), *astuple(coding)]
        _write(process, [*recipe[:4], packed, list(recipe.pixels), *recipe[6:]])
    return process


def _write(process: _Process, message: list[Any]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(message).encode() + b"\n")
    process.stdin.flush()


def _end(processes: list[_Process], file: IO[bytes]) -> None:
    file.close()
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()


def main(memory: int, size: int) -> None:
    """Process the tasks on standard input, one a line, until it ends."""
    crop, scale, hflip, num_classes, coding, pixels, *rest = _tupled(json.loads(sys.stdin.buffer.readline()))
    if coding is not None:
        coding = (PaletteEncoding if coding[0] else IdEncoding)(*coding[1:])
    recipe = CropRecipe(crop, scale, hflip, num_classes, coding, PixelFormat(*pixels), *rest)
    limit_pixels(recipe.max_pixels)
    images, masks = _arrays(mmap.mmap(memory, size), recipe)
    for line in sys.stdin.buffer:
        place, image, mask, draws = json.loads(line)
        try:
            answer: Any = decode(DecodeRequest(image, mask, tuple(draws)), recipe, images[place], masks[place])
        except ValueError as error:
            answer = str(error)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _tupled(value: Any) -> Any:
    """Convert lists, which JSON knows, to tuples at any depth."""
    return tuple(map(_tupled, value)) if isinstance(value, list) else value


if __name__ == "__main__":
    with suppress(BrokenPipeError):  # the run is gone
        main(*map(int, sys.argv[1:]))
    os._exit(0)  # nothing to clean up, and no last flush into a broken pipe
