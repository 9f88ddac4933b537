"""Remakes ``viladiff/models/digits_vit.safetensors``, which stands where ImageNet weights stand on real data.

As in ImageNet, each image shows one object and has one label: a digit of any colour on a piece of a training
photograph. Its handwriting is the part ``pretrain`` of ``viladiff.data.digits``, which neither the pool nor dev and
test have. The encoder is shown no mask, only which digit it is. The class scores of all tokens are pooled by a
log-sum-exp, so that the tokens on the object learn to speak for it. Example (about 8 minutes):

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

from viladiff import draws
from viladiff.data.augment import normalise
from viladiff.data.digits import DIGITS, render
from viladiff.models.backbones import SHIPPED, DigitsViT
from viladiff.progress import Progress

RECIPE = replace(
    DIGITS,
    side=40,
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


def scenes(count: int) -> tuple[Tensor, Tensor]:
    """(count, 40, 40, 3) uint8 images and (count,) int64 digits; of the scene's mask only the class is kept."""
    images = np.empty((count, RECIPE.side, RECIPE.side, 3), np.uint8)
    labels = np.empty(count, np.int64)
    with Progress(count, 0, "rendering", True) as bar:
        for index in range(count):
            scene = render(RECIPE, "objects", "pretrain", index)
            images[index], labels[index] = scene.image, int(scene.mask.max()) - 1
            bar.advance()
    return torch.from_numpy(images), torch.from_numpy(labels)


def pretrain(images: Tensor, labels: Tensor, steps: int, batch: int, lr: float, seed: int) -> tuple[DigitsViT, float]:
    """The trained encoder, and its share of right labels over the last tenth of the steps, before each update."""
    torch.manual_seed(draws.key(seed, "pretrain"))
    encoder = DigitsViT()
    heads = nn.ModuleList([nn.Conv2d(channels, 10, 1) for channels in encoder.channels[2:]])
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    right: list[Tensor] = []
    with Progress(steps, 0, "pretraining digits_vit", True) as bar:
        for step in range(steps):
            chosen = draws.rng(seed, "pretrain", step).integers(len(images), size=batch)
            x, y = normalise(images[chosen].permute(0, 3, 1, 2).float() / 255), labels[chosen]
            maps = encoder(x)[2:]
            scores = [head(level).flatten(2).logsumexp(2) for head, level in zip(heads, maps, strict=True)]
            loss = sum(F.cross_entropy(score, y) for score in scores)
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            right.append((scores[-1].argmax(1) == y).float().mean())
            if step % 20 == 0:
                bar.note(loss.item())
            bar.advance()
    return encoder, torch.stack(right[-steps // 10 :]).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--images", type=int, default=32000)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=SHIPPED)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    images, labels = scenes(args.images)
    encoder, right = pretrain(images, labels, args.steps, args.batch, args.lr, args.seed)
    save_file({name: value.half().contiguous() for name, value in encoder.state_dict().items()}, args.out)
    print(
        f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB, {100 * right:.1f} % of training labels right at the end"
    )


if __name__ == "__main__":
    main()
