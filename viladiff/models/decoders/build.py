"""Decoders by the name that ``model.decoder`` gives them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from viladiff.models.decoders.base import Decoder
from viladiff.models.decoders.deeplabv3plus import DeepLabV3PlusDecoder
from viladiff.models.decoders.dpt import DptDecoder
from viladiff.models.decoders.light import LightDecoder
from viladiff.models.encoders.base import Encoder

if TYPE_CHECKING:
    from viladiff.config.sections import ModelConfig

DECODERS: dict[str, Callable[[tuple[int, ...], tuple[int, ...], int], Decoder]] = {
    "light": LightDecoder,
    "deeplabv3plus": DeepLabV3PlusDecoder,
    "dpt": DptDecoder,
}
"""``model.decoder`` to the class, which is called with the encoder's channels and strides and the width."""


def build_decoder(model: ModelConfig, encoder: Encoder) -> Decoder:
    """Return a new decoder for the maps of ``encoder``. Raises ValueError for maps that it cannot take."""
    return DECODERS[model.decoder](encoder.channels, encoder.strides, model.decoder_width)
