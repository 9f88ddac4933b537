"""Train ``viladiff/models/encoders/digits_vit.safetensors``, which stands where ImageNet weights stand on real data.

As in ImageNet, each image shows one object and has one label: a digit of any colour on a piece of a photograph, or no
digit. No mask and no scene of the pool is used. Its handwriting is the part ``pretrain`` of
``viladiff.data.scenes``, elastically deformed; no other part has these scans.

Each step renders new images. Class scores of the tokens of an image are pooled by a log-sum-exp, so that the tokens on
the digit learn to answer for it. Example (about 15 minutes on one core):

    python scripts/pretrain_digits.py --threads 1
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from viladiff.core import keyed_random
from viladiff.core.progress import Progress
from viladiff.data.scenes import Part, Sources, deform_handwriting, load_sources, render
from viladiff.data.sources.digits import DIGITS
from viladiff.data.transforms.augment import normalise
from viladiff.models.encoders.build import SHIPPED
from viladiff.models.encoders.digits_vit import DigitsViT

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
BATCH = 96


class Classifier(nn.Module):
    """The encoder with a linear classifier on each of its two coarse maps."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = DigitsViT()
        self.heads = nn.ModuleList([nn.Conv2d(channels, 11, 1) for channels in self.encoder.channels[2:]])

    def forward(self, images: Tensor) -> list[Tensor]:
        """Scores (n, 11) of each head for images (n, 3, h, w)."""
        maps = self.encoder(images)[2:]
        return [head(level).flatten(2).logsumexp(2) for head, level in zip(self.heads, maps, strict=True)]


def images_and_labels(part: Part, purpose: str, first: int, count: int, sources: Sources) -> tuple[Tensor, Tensor]:
    """(count, 40, 40, 3) uint8 images and (count,) int64 labels; of the scene's mask only the class is kept."""
    images, labels = np.empty((count, SIDE, SIDE, 3), np.uint8), np.empty(count, np.int64)
    for place, index in enumerate(range(first, first + count)):
        empty = keyed_random.numpy_generator(7, purpose, index).random() <= EMPTY
        recipe = replace(RECIPE, objects=(0, 0)) if empty else RECIPE
        scene = render(recipe, purpose, part, index, sources)
        images[place], top = scene.image, int(scene.mask.max())
        labels[place] = top - 1 if top else 10
    return torch.from_numpy(images), torch.from_numpy(labels)


def to_input(images: Tensor) -> Tensor:
    """Normalised (n, 3, 40, 40) from (n, 40, 40, 3) uint8."""
    return normalise(images.permute(0, 3, 1, 2).float() / 255)


@torch.no_grad()
def accuracy(model: Classifier, images: Tensor, labels: Tensor) -> float:
    """Share of right labels by the last map."""
    right = [
        (model(to_input(x))[-1].argmax(1) == y).float().mean()
        for x, y in zip(images.split(100), labels.split(100), strict=True)
    ]
    return torch.stack(right).mean().item()


def train(model: Classifier, steps: int, lr: float, sources: Sources) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    with Progress(steps, 0, "pretraining digits_vit", True) as bar:
        for step in range(steps):
            images, labels = images_and_labels("pretrain", "single", step * BATCH, BATCH, sources)
            scores = model(to_input(images))
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
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--amplitude", type=float, default=AMPLITUDE, help="elastic deformation; 0 shows the scans alone"
    )
    parser.add_argument("--out", type=Path, default=SHIPPED)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sources = load_sources("pretrain")
    if args.amplitude:
        sources = deform_handwriting(sources, COPIES, args.amplitude, seed=11)
    shown = images_and_labels("dev", "probe", 0, 1500, load_sources("dev"))
    torch.manual_seed(keyed_random.seed_for(0, "pretrain"))
    model = Classifier()
    train(model, args.steps, args.lr, sources)
    save_file({name: value.half().contiguous() for name, value in model.encoder.state_dict().items()}, args.out)
    right = 100 * accuracy(model, *shown)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB, {right:.1f} % of dev's digits right")


if __name__ == "__main__":
    main()
