"""The interface of decoders."""

from __future__ import annotations

from torch import Tensor, nn


class Decoder(nn.Module):
    """Contract: maps of an encoder to one map of ``width`` channels, whose cells are ``stride`` pixels wide.

    The coarsest map comes apart from the others, since ViLa makes two of it, one a stream.
    """

    stride: float
    """Pixels a cell of the decoder's map is wide, an int where they are whole ones (dpt has 1.75 with patches of 14).
    A patch of the encoder is a whole number of cells, so that boxes on the patch grid cut none."""
    width: int
    align_corners: bool = False
    """Where the map lies on the image: the centres of its corner cells on the corner pixels, as with ``align_corners``
    of F.interpolate, or its edges on the image's edges."""
    any_size: bool = False
    """Whether image sides that are no multiples of the patch are decoded as they are."""

    def laterals(self, features: list[Tensor]) -> list[Tensor]:
        """Return what the streams share: of the three finer maps (B, D_i, h_i, w_i), computed once for all streams."""
        raise NotImplementedError

    def forward(self, top: Tensor, laterals: list[Tensor]) -> Tensor:
        """Decode top (k * B, D, h, w) for k streams with laterals (B, ...): (k * B, width, H / stride, W / stride)."""
        raise NotImplementedError

    def classifier(self, num_classes: int) -> nn.Module:
        """Return a new classifier: called with the decoder's map and the coarsest one, logits (B, K, h, w)."""
        raise NotImplementedError
