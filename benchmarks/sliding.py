"""Peak memory of sliding-window prediction against the number of windows.

OMP_NUM_THREADS=1 python benchmarks/sliding.py

Each line is a fresh process that labels one image of 1024 x 2048 pixels in windows of 801 x 801, with a network of 19
classes whose own memory is small, so that what the windows keep is what is seen. The stride makes the difference: 534
pixels as published, and a quarter of it. What is compared is how far the peak grows above the process with its
image. The rival keeps every window's probabilities and averages at the end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from viladiff.core.environment import peak_memory
from viladiff.evaluation import protocols

SIZE, CROP, CLASSES = (1024, 2048), 801, 19
STRIDES = (534, 133)


class Shallow(nn.Module):
    """Full-size logits from one small convolution at an eighth of the resolution."""

    patch = 1

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Conv2d(3, CLASSES, 9, stride=8, padding=4)

    def forward(self, images: Tensor, text: None = None) -> dict[str, Tensor]:
        return {"visual": nn.functional.interpolate(self.look(images), images.shape[-2:], mode="bilinear")}


def starts(length: int, stride: int) -> list[int]:
    return [*range(0, length - CROP, stride), length - CROP]


def kept(network: Shallow, image: Tensor, stride: int) -> Iterator[Tensor]:
    """The rival: probabilities of all windows first, then their mean; the labels."""
    places = [(top, left) for top in starts(SIZE[0], stride) for left in starts(SIZE[1], stride)]
    windows = [network(image[..., y : y + CROP, x : x + CROP])["visual"].softmax(1) for y, x in places]
    total = torch.zeros(1, CLASSES, *SIZE)
    for (y, x), window in zip(places, windows, strict=True):
        total[..., y : y + CROP, x : x + CROP] += window
    yield total.argmax(1)


def ours(network: Shallow, image: Tensor, stride: int) -> Iterator[Tensor]:
    """``protocols.stream_bands``, with another stride than the published one."""
    protocols.window_stride = lambda crop: stride
    for band in protocols.stream_bands(network, image, None, ("visual",), "sliding_window", CROP):
        yield band.logits["visual"].argmax(1)


def measured(side: str, stride: int) -> None:
    """What a fresh process prints: bytes by which the peak grew, and a sum of labels that both sides must agree on."""
    torch.manual_seed(0)
    network, image = Shallow().eval(), torch.rand(1, 3, *SIZE)
    with torch.inference_mode():
        network(image[..., :64, :64])
        before = peak_memory()
        labels = torch.cat(list({"ours": ours, "kept": kept}[side](network, image, stride)), 1)
    print(json.dumps({"bytes": peak_memory() - before, "sum": int(labels.sum())}))


def in_fresh_process(side: str, stride: int) -> dict[str, int]:
    command = [sys.executable, __file__, "--side", side, "--stride", str(stride)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints megabytes by stride and the ratio; returns 0 where the most windows need at most 1.05 times the fewest."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", choices=("ours", "kept"))
    parser.add_argument("--stride", type=int, choices=STRIDES)
    given = parser.parse_args(arguments)
    if given.side:
        measured(given.side, given.stride)
        return 0
    found = {}
    for stride in STRIDES:
        windows = len(starts(SIZE[0], stride)) * len(starts(SIZE[1], stride))
        found[stride] = in_fresh_process("ours", stride)
        print(f"stride {stride}, {windows} windows: {found[stride]['bytes'] / 2**20:.0f} MiB over the network itself")
    rival = in_fresh_process("kept", STRIDES[0])
    print(f"stride {STRIDES[0]}, all windows kept: {rival['bytes'] / 2**20:.0f} MiB")
    # The order of additions differs, so that a pixel on a tie may fall to either class.
    if abs(rival["sum"] - found[STRIDES[0]]["sum"]) > 1e-4 * SIZE[0] * SIZE[1]:
        raise SystemExit("the two sides see different classes")
    ratio = found[STRIDES[-1]]["bytes"] / found[STRIDES[0]]["bytes"]
    print(f"ratio of the most windows to the fewest {ratio:.3f} (aim: at most 1.05)")
    print(f"ratio of all windows kept to ours {rival['bytes'] / found[STRIDES[0]]['bytes']:.2f}")
    return 0 if ratio <= 1.05 else 1


if __name__ == "__main__":
    raise SystemExit(main())
