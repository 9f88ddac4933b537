"""Train ``viladiff/models/digits_vit.safetensors``, which stands where ImageNet weights stand on real data.

As in ImageNet, each image shows one object and has one label: a digit of any colour on a piece of a photograph, or no
digit. No mask and no scene of the pool is used. Its handwriting is the part ``pretrain`` of ``viladiff.data.digits``,
elastically deformed; no other part has these scans.

Two stages: single images of 40 x 40 pixels; then 2 x 2 mosaics of them, with a label for each quarter, so that a token
learns to answer for its own place. Each step renders new images. Class scores of the tokens of an image are pooled by a
log-sum-exp. Example (about 40 minutes on one core; the file is written after each stage):

    python scripts/pretrain_digits.py --threads 1
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from viladiff import draws
from viladiff.data.augment import normalise
from viladiff.data.digits import DIGITS, Part, Sources, deform_handwriting, load_sources, render
from viladiff.models.backbones import SHIPPED, DigitsViT
from viladiff.progress import Progress

SIDE = 40
RECIPE = replace(
    DIGITS,
    side=SIDE,
    objects=(1, 1),
    height=(22, 38),
    aspect=(0.8, 1.2),
    rotation=20,
    shear=0.25,
    hue_spread=360.0,
    background_gain=(0.0, 1.0),
    contrast=(0.16, 0.5),
    texture=0.7,
    outside=0.05,
)
"""One object fills the frame, in any colour, on plain to busy grounds: scenes of the pool look otherwise."""
EMPTY = 0.1
"""Share of images without a digit, whose label is 10."""
COPIES, AMPLITUDE = 48, 0.42
"""Elastic deformations of each scan, and their strength in pixels of the scan."""
IMAGES = 96
"""Images in a step; a quarter as many mosaics."""


class Stage(NamedTuple):
    name: str
    tiles: int
    """Images along a side of the canvas."""
    lr: float


STAGES = (Stage("single", 1, 1.5e-3), Stage("mosaic", 2, 1e-3))


class Classifier(nn.Module):
    """The encoder with a linear classifier on each of its two coarse maps."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = DigitsViT()
        self.heads = nn.ModuleList([nn.Conv2d(channels, 11, 1) for channels in self.encoder.channels[2:]])

    def forward(self, canvas: Tensor, tiles: int) -> list[Tensor]:
        """Scores (images, 11) of each head for a canvas (n, 3, h, w) of ``tiles`` x ``tiles`` images."""
        scores = []
        for head, level in zip(self.heads, self.encoder(canvas)[2:], strict=True):
            maps = head(level)
            n, classes, side = len(maps), maps.shape[1], maps.shape[-1] // tiles
            maps = maps.view(n, classes, tiles, side, tiles, side).permute(0, 2, 4, 1, 3, 5)
            scores.append(maps.reshape(n * tiles**2, classes, side * side).logsumexp(2))
        return scores


def images_and_labels(part: Part, purpose: str, first: int, count: int, sources: Sources) -> tuple[Tensor, Tensor]:
    """(count, 40, 40, 3) uint8 images and (count,) int64 labels; of the scene's mask only the class is kept."""
    images, labels = np.empty((count, SIDE, SIDE, 3), np.uint8), np.empty(count, np.int64)
    for place, index in enumerate(range(first, first + count)):
        empty = draws.rng(7, purpose, index).random() <= EMPTY
        recipe = replace(RECIPE, objects=(0, 0)) if empty else RECIPE
        scene = render(recipe, purpose, part, index, sources)
        images[place], top = scene.image, int(scene.mask.max())
        labels[place] = top - 1 if top else 10
    return torch.from_numpy(images), torch.from_numpy(labels)


def to_canvas(images: Tensor, tiles: int) -> Tensor:
    """Normalised (n / tiles², 3, 40 tiles, 40 tiles) from (n, 40, 40, 3) uint8."""
    grid = images.view(-1, tiles, tiles, SIDE, SIDE, 3).permute(0, 1, 3, 2, 4, 5)
    canvas = grid.reshape(-1, tiles * SIDE, tiles * SIDE, 3)
    return normalise(canvas.permute(0, 3, 1, 2).float() / 255)


@torch.no_grad()
def accuracy(model: Classifier, tiles: int, images: Tensor, labels: Tensor) -> float:
    """Share of right labels by the last map."""
    right = [
        (model(to_canvas(x, tiles), tiles)[-1].argmax(1) == y).float().mean()
        for x, y in zip(images.split(100), labels.split(100), strict=True)
    ]
    return torch.stack(right).mean().item()


def train(model: Classifier, stage: Stage, steps: int, sources: Sources) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), stage.lr, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, stage.lr, steps, pct_start=0.1)
    with Progress(steps, 0, f"pretraining digits_vit, {stage.name}", True) as bar:
        for step in range(steps):
            images, labels = images_and_labels("pretrain", stage.name, step * IMAGES, IMAGES, sources)
            scores = model(to_canvas(images, stage.tiles), stage.tiles)
            loss = torch.stack([F.cross_entropy(score, labels) for score in scores]).sum()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % 20 == 0:
                bar.note(loss.item())
            bar.advance()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs=2, default=(3500, 5500), metavar=("SINGLE", "MOSAIC"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=SHIPPED)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sources = deform_handwriting(load_sources("pretrain"), COPIES, AMPLITUDE, seed=11)
    shown = images_and_labels("dev", "probe", 0, 1500, load_sources("dev"))
    torch.manual_seed(draws.key(0, "pretrain"))
    model = Classifier()
    for stage, steps in zip(STAGES, args.steps, strict=True):
        train(model, stage, steps, sources)
        save_file({name: value.half().contiguous() for name, value in model.encoder.state_dict().items()}, args.out)
        right = 100 * accuracy(model, stage.tiles, *shown)
        print(f"{stage.name}: {args.out}, {args.out.stat().st_size / 1e6:.2f} MB, {right:.1f} % of dev's digits right")


if __name__ == "__main__":
    main()
