"""The outputs of ViLaDiff's networks that its losses and its denoiser read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from viladiff.data.batch import Batch, CutMix, TextBatch
from viladiff.data.transforms.mixing import apply_cutmix
from viladiff.models.stream import StreamOutput

Places = slice | list[int]
"""Images of a batch."""


class Pseudo(NamedTuple):
    """Labels of the unlabelled pixels, with the teacher's confidence."""

    confidence: Tensor
    """(U, H, W)."""
    labels: Tensor
    """(U, H, W) int64."""


class NetworkOutput(NamedTuple):
    """A network's streams on images, with all maps that may condition the denoiser."""

    streams: dict[str, StreamOutput]
    image: Tensor
    """(B, 3, H, W)."""
    finer: tuple[Tensor, ...] = ()
    """The encoder's two finest maps (B, D_i, h_i, w_i), if the denoiser reads them."""

    def part(self, where: Places) -> NetworkOutput:
        """Select some of the images, detached."""
        streams = {
            name: StreamOutput(*(rows_at(x.detach(), where) for x in stream)) for name, stream in self.streams.items()
        }
        return NetworkOutput(streams, rows_at(self.image, where), tuple(rows_at(x.detach(), where) for x in self.finer))

    def mixed(self, mix: CutMix) -> NetworkOutput:
        """Paste CutMix boxes into every map but the tokens."""

        def cut(x: Tensor) -> Tensor:
            pixels, cells = self.image.shape[-1], x.shape[-1]
            return apply_cutmix(x, mix, pixels / cells if pixels % cells else pixels // cells)

        streams = {name: StreamOutput(x.features, cut(x.mid), cut(x.logits)) for name, x in self.streams.items()}
        return NetworkOutput(streams, cut(self.image), tuple(cut(x) for x in self.finer))


class TeacherOutput(NamedTuple):
    """The teacher's view of a batch; logits are those of the stream that makes pseudo-labels, on the grid."""

    weak: NetworkOutput
    """Of the unlabelled images' weak views."""
    labelled: Tensor | None
    """(K, C, h, w) logits behind x_0 of the labelled images that MixE learns from."""
    unlabelled: Tensor | None
    """(U, C, h, w) logits behind x_0 of the unlabelled images where those are of another view than the weak one."""
    boxes: CutMix | None
    """The boxes pasted into the labelled images before."""


def rows_at(x: Tensor, where: Places) -> Tensor:
    """Select rows by a slice or a list, without sending an index to the device."""
    return x[where] if isinstance(where, slice) else torch.stack([x[i] for i in where])


def keys_at(batch: Batch, where: Places) -> tuple[int, ...]:
    """Return the keys of those labelled images."""
    return batch.keys[where] if isinstance(where, slice) else tuple(batch.keys[i] for i in where)


def text_at(text: TextBatch | None, where: Places) -> TextBatch | None:
    """Return the words of those images."""
    return None if text is None else TextBatch(rows_at(text.tokens, where), rows_at(text.mask, where))
