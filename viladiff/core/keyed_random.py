"""Keyed random numbers: each draw is named by seed, purpose, step and image, so the order of execution does not matter.

Every draw is named by a tuple such as ``(seed, "crop", epoch, image)``. Two workers, a resumed run and an uninterrupted
one therefore draw the same numbers, and no generator's state is stored in a checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # loaded where it is used: those who draw with NumPy alone do without
    import torch
    from torch import Tensor

Part = int | str


def seed_for(*parts: Part) -> int:
    """Return the 63-bit integer named by ``parts``; equal on every machine and Python version."""
    text = "\x1f".join(f"{type(part).__name__[0]}{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def numpy_generator(*parts: Part) -> np.random.Generator:
    """Return the NumPy generator of the draw named by ``parts``."""
    return np.random.Generator(np.random.Philox(key=seed_for(*parts)))


def torch_generator(*parts: Part, device: torch.device | str = "cpu") -> torch.Generator:
    """Return the torch generator on ``device`` of the draw named by ``parts``."""
    import torch

    gen = torch.Generator(device=device)
    gen.manual_seed(seed_for(*parts))
    return gen


def uniform(keys: Sequence[Part], shape: tuple[int, ...], *parts: Part, device: torch.device | str = "cpu") -> Tensor:
    """Return one uniform tensor of ``shape`` per key, stacked: (len(keys), *shape), float32 in [0, 1)."""
    import torch

    out = torch.empty((len(keys), *shape), device=device)
    if out.is_meta:  # has a shape alone, and no generator
        return out
    for row, name in zip(out, keys, strict=True):
        row.uniform_(generator=torch_generator(*parts, name, device=device))
    return out


def normal(keys: Sequence[Part], shape: tuple[int, ...], *parts: Part, device: torch.device | str = "cpu") -> Tensor:
    """Return one standard normal tensor of ``shape`` per key, stacked: (len(keys), *shape), float32."""
    import torch

    out = torch.empty((len(keys), *shape), device=device)
    if out.is_meta:
        return out
    for row, name in zip(out, keys, strict=True):
        row.normal_(generator=torch_generator(*parts, name, device=device))
    return out
