"""MaskCLIP: dense features of a frozen CLIP, and its text vectors, in one space; weights from a file.

open_clip's own modules compute it. Nothing is downloaded: its tokenizer comes with the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from viladiff.config.base import did_you_mean
from viladiff.models.encoders.base import unit_change
from viladiff.models.encoders.load import load_weights

TEMPLATE = "a photo of a {}"
"""SemiVL's, without a full stop."""
PLAIN = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}
"""What the configuration of a CLIP as first published consists of."""


class Clip(NamedTuple):
    """Image and text side of one model, frozen."""

    image: MaskClip
    texts: Tensor
    """(M, T) unit vectors of the texts that were asked for."""


class MaskClip(nn.Module):
    """A vision transformer whose last block lets every token read itself alone: the value path of its attention."""

    shift: Tensor
    scale: Tensor
    """From the units of batches, ImageNet's, to those of CLIP."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

        self.visual: Any = visual.requires_grad_(False)
        scale, shift = unit_change(OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W), in the units of batches, to unit maps (B, T, h, w) float32.

        Images are enlarged to CLIP's own size if they are smaller, and to whole patches.
        """
        net = self.visual
        x = net.conv1(self._sized(images * self.scale + self.shift))
        grid = x.shape[-2:]
        first = net.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = net.ln_pre(torch.cat([first, x.flatten(2).mT], 1) + self._positions(grid).to(x.dtype))
        *blocks, last = net.transformer.resblocks
        for block in blocks:
            x = block(x)
        itself = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        x = last(x, attn_mask=torch.zeros_like(itself, dtype=x.dtype).masked_fill(~itself, -torch.inf))
        found = (net.ln_post(x[:, 1:]) @ net.proj).float()
        return F.normalize(found, dim=2).mT.unflatten(2, tuple(grid))

    def _sized(self, images: Tensor) -> Tensor:
        patch, own = self.visual.patch_size[0], self.visual.image_size[0]
        factor = max(1.0, own / min(images.shape[-2:]))
        size = [max(1, round(side * factor / patch)) * patch for side in images.shape[-2:]]
        if size == list(images.shape[-2:]):
            return images
        return F.interpolate(images, size, mode="bicubic", align_corners=False)

    def _positions(self, grid: torch.Size) -> Tensor:
        found: Tensor = self.visual.positional_embedding
        own = self.visual.grid_size
        if tuple(grid) == tuple(own):
            return found
        map_ = found[1:].mT.unflatten(1, own)[None]
        fitted = F.interpolate(map_, tuple(grid), mode="bicubic", align_corners=False)
        return torch.cat([found[:1], fitted[0].flatten(1).mT])


def load_clip(name: str, weights: str, texts: Sequence[str]) -> Clip:
    """Load open_clip's model of that name with the weights of a local file, and encode the texts in a sentence.

    Raises ValueError that names the field if open_clip has no such model or one of another build, and as
    ``load_weights`` for the file.
    """
    import open_clip
    from open_clip.tokenizer import SimpleTokenizer

    config = open_clip.get_model_config(name)
    if config is None:
        known = open_clip.list_models()
        raise ValueError(f"method.clip.model = {name!r}: open_clip has no such model{did_you_mean(name, known)}")
    vision, words = config["vision_cfg"], config["text_cfg"]
    strange = set(config) - PLAIN or {
        key for key in (*vision, *words) if key.startswith(("hf_", "timm_", "attentional"))
    }
    if strange or not isinstance(vision.get("layers"), int):
        raise ValueError(
            f"method.clip.model = {name!r}: not a CLIP with a plain vision transformer, as ViT-B-16-quickgelu is"
        )
    with torch.random.fork_rng(devices=[]):  # the student is drawn alike with and without it
        model: Any = open_clip.CLIP(**config)
    load_weights(model, Path(weights))
    tokens = SimpleTokenizer(context_length=model.context_length)([TEMPLATE.format(text) for text in texts])
    with torch.no_grad():
        vectors = model.eval().encode_text(tokens, normalize=True)
    return Clip(MaskClip(model.visual), vectors)
