"""Mix Transformers, the encoders of SegFormer (Xie et al. 2021), as transformers has them."""

from __future__ import annotations

import operator
from itertools import accumulate
from typing import Any

from torch import Tensor

from viladiff.models.encoders.base import Encoder

MIT: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "mit_b0": ((2, 2, 2, 2), (32, 64, 160, 256)),
    "mit_b1": ((2, 2, 2, 2), (64, 128, 320, 512)),
    "mit_b2": ((3, 4, 6, 3), (64, 128, 320, 512)),
    "mit_b3": ((3, 4, 18, 3), (64, 128, 320, 512)),
    "mit_b4": ((3, 8, 27, 3), (64, 128, 320, 512)),
    "mit_b5": ((3, 6, 40, 3), (64, 128, 320, 512)),
}
"""Blocks and channels of the four stages, by name (table 6 of the paper)."""


class SegformerEncoder(Encoder):
    """Four maps at strides 4, 8, 16 and 32, each through the final norm of its stage."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net: Any = net
        self.inputs = int(net.config.num_channels)
        self.channels = tuple(net.config.hidden_sizes)
        self.strides = tuple(accumulate(net.config.strides, operator.mul))

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(self.net(pixel_values=self.own_units(x), output_hidden_states=True).hidden_states)


def new_mit(name: str, drop_path: float, inputs: int = 3) -> SegformerEncoder:
    """Build ``mit_b0`` to ``mit_b5`` with random weights, for images of ``inputs`` channels."""
    from transformers import SegformerConfig, SegformerModel

    depths, widths = MIT[name]
    config = SegformerConfig(
        depths=list(depths), hidden_sizes=list(widths), drop_path_rate=drop_path, num_channels=inputs
    )
    return SegformerEncoder(SegformerModel(config))
