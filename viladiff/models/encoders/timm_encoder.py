"""Encoders from timm, by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from viladiff.config.base import did_you_mean
from viladiff.models.encoders.base import Encoder


class TimmEncoder(Encoder):
    """Any timm backbone that offers features: last four levels of a pyramid, or four evenly spaced blocks of a ViT.

    ``stride``: pixels a cell of the coarsest map is wide; a stage beyond it has its stride replaced by a dilation twice
    that of the stage before, from its second block on, as in DeepLab. None is the network's own.
    """

    def __init__(self, name: str, pretrained: bool, drop_path: float, stride: int | None = None) -> None:
        super().__init__()
        import timm  # a second of import time that the embedded data does not need

        _check_known(name)
        options: dict[str, Any] = {"pretrained": pretrained, "features_only": True}
        if drop_path:
            options["drop_path_rate"] = drop_path
        if stride is not None:
            _check_dilates(name, stride)
            options["output_stride"] = stride
        try:
            levels = len(_feature_info(timm.create_model(name, features_only=True)))
            # A ViT reports every block; a pyramid its few stages.
            indices = [(levels * (i + 1)) // 4 - 1 for i in range(4)] if levels >= 8 else list(range(levels))[-4:]
            plain = levels >= 8
            extra: dict[str, Any] = {"dynamic_img_size": True} if plain else {}
            self.net = timm.create_model(name, out_indices=indices, **options, **extra)
        except (RuntimeError, AttributeError, TypeError) as error:
            raise ValueError(f'model.encoder = "{name}": timm offers no feature maps for it ({error})') from error
        self.any_size = not plain
        self.channels = tuple(_feature_info(self.net).channels())
        self.strides = tuple(_feature_info(self.net).reduction())
        if len(self.channels) != 4:
            raise ValueError(f'model.encoder = "{name}": {len(self.channels)} feature levels, four are needed')
        # Some transformers have no norm on intermediate features; the decoder expects maps of one scale.
        self.norms = nn.ModuleList([nn.GroupNorm(1, c) if plain else nn.Identity() for c in self.channels])

    def forward(self, x: Tensor) -> list[Tensor]:
        return [norm(level) for norm, level in zip(self.norms, self.net(x), strict=True)]


def _check_known(name: str) -> None:
    import timm

    known = timm.list_models(pretrained=False)
    if name.split(".")[0] not in known:
        raise ValueError(f'model.encoder = "{name}": timm has no such model{did_you_mean(name, known)}')


def _check_dilates(name: str, stride: int) -> None:
    """Raise ValueError for a network of timm whose later stages cannot be dilated to this stride."""
    import timm

    try:
        with torch.device("meta"):
            found = max(_feature_info(timm.create_model(name, features_only=True, output_stride=stride)).reduction())
    except (RuntimeError, AttributeError, TypeError, AssertionError, NotImplementedError):
        found = None
    if found != stride:
        raise ValueError(
            f"model.encoder_stride = {stride}: timm cannot dilate model.encoder = {name!r}; set it to none, or use a "
            "convolutional encoder, as resnet101s"
        )


def _feature_info(net: nn.Module) -> Any:
    """Return timm's description of the feature levels, typed Any since type checkers take it for a module."""
    return net.feature_info
