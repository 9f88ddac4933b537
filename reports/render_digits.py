"""Draws docs/digits.png: scenes of the built-in data sets with their masks, and what the simulated captioner says.

python reports/render_digits.py
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from viladiff.data.registry import load_dataset

OUT = Path(__file__).resolve().parent.parent / "docs" / "digits.png"
COLUMNS = 6


def main() -> None:
    palette = np.vstack([[0.12, 0.12, 0.14], plt.get_cmap("tab10")(range(10))[:, :3]])
    figure, axes = plt.subplots(4, COLUMNS, figsize=(1.75 * COLUMNS, 8.0), layout="constrained")
    for half, (name, split) in enumerate((("digits", "183"), ("dense", "463"))):
        data = load_dataset(name, split)
        for column, index in enumerate(range(8, 8 + COLUMNS)):
            top, bottom = axes[2 * half, column], axes[2 * half + 1, column]
            top.imshow(data.val_images[index], interpolation="nearest")
            bottom.imshow(palette[data.val_masks[index]], interpolation="nearest")
            words = textwrap.shorten(data.val_captions[index][1], 70, placeholder=" …")
            bottom.set_xlabel(textwrap.fill(words, 26), fontsize=6.5)
            for axis in (top, bottom):
                axis.set_xticks([])
                axis.set_yticks([])
                axis.spines[:].set_visible(False)
        axes[2 * half, 0].set_ylabel(name, fontsize=9)
        axes[2 * half + 1, 0].set_ylabel("truth", fontsize=9)
    figure.savefig(OUT, dpi=110)


if __name__ == "__main__":
    main()
