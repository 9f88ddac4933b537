"""Plain vision transformers of a few thousand parameters, known to timm by name: DINOv2's shape, registers and all."""

from __future__ import annotations

import sys
from typing import Any

import timm
from timm.models import build_model_with_cfg, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

PICO = {14: "vit_femto_patch14", 16: "vit_femto_patch16"}
"""Patch to name."""


DINO = {0: "vit_femto_patch14_dinov2", 4: "vit_femto_patch14_reg4_dinov2"}
"""Number of registers to the name of what is shaped as DINOv2 is published, with 5 x 5 patches of 14 pixels."""


def _femto(name: str, patch: int, pretrained: bool, options: dict[str, Any], **more: Any) -> nn.Module:
    shape = {"patch_size": patch, "embed_dim": 32, "depth": 8, "num_heads": 2, "init_values": 1e-5, **more}
    features = {"out_indices": 3, "feature_cls": "getter"}
    shape.setdefault("img_size", 4 * patch)
    return build_model_with_cfg(VisionTransformer, name, pretrained, feature_cfg=features, **shape, **options)


def vit_femto_patch14(pretrained: bool = False, **options: Any) -> nn.Module:
    """Patches of 14 pixels, images of 56."""
    return _femto(PICO[14], 14, pretrained, options, reg_tokens=4)


def vit_femto_patch16(pretrained: bool = False, **options: Any) -> nn.Module:
    """Patches of 16 pixels, images of 64."""
    return _femto(PICO[16], 16, pretrained, options, reg_tokens=4)


def vit_femto_patch14_dinov2(pretrained: bool = False, **options: Any) -> nn.Module:
    """Twelve blocks, no register."""
    return _femto(DINO[0], 14, pretrained, options, depth=12, img_size=70)


def vit_femto_patch14_reg4_dinov2(pretrained: bool = False, **options: Any) -> nn.Module:
    """Twelve blocks, and registers that have no position, nor has the class token."""
    return _femto(DINO[4], 14, pretrained, options, depth=12, img_size=70, reg_tokens=4, no_embed_class=True)


def register() -> None:
    """Make all known to timm."""
    sys.modules[__name__].__dict__.setdefault("__all__", [])
    for make in (vit_femto_patch14, vit_femto_patch16, vit_femto_patch14_dinov2, vit_femto_patch14_reg4_dinov2):
        if not timm.is_model(make.__name__):
            register_model(make)
