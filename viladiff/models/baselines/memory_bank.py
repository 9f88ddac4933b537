"""Random sampling of a map's positions, and queues of their vectors across steps.

Queues are part of the state, and alike on all workers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from viladiff.losses import all_gather


class MemoryBank(nn.Module):
    """First in, first out: ``size`` vectors of unit length for each of C classes, in half precision.

    They take 2 * C * size * width bytes of the device and of every checkpoint. Nothing here waits for the device.
    """

    vectors: Tensor
    """(C, size, width) float16; places not filled yet are 0."""
    following: Tensor
    """(C,) int64, the place that the next vector of a class goes to."""
    filled: Tensor
    """(C,) int64, how many places hold a vector."""

    def __init__(self, num_classes: int, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.zeros(num_classes, size, width, dtype=torch.float16))
        self.register_buffer("following", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("filled", torch.zeros(num_classes, dtype=torch.int64))

    @torch.no_grad()
    def push(self, vectors: Tensor, counted: Tensor) -> None:
        """Add the ``counted`` (n, C, m) of ``vectors`` (n, C, m, width), of all workers, in the order of n.

        Every worker passes equally many. Of more than ``size`` new vectors of a class the last ones are kept.
        """
        classes, size, width = self.vectors.shape
        given = all_gather(vectors.to(self.vectors.dtype)).transpose(0, 1).reshape(classes, -1, width)
        fits = all_gather(counted.to(torch.uint8)).transpose(0, 1).reshape(classes, -1)
        count = fits.sum(1, dtype=torch.int64)
        newest = (1 - fits).argsort(dim=1, stable=True)  # what counts first, oldest first
        skip = (count - size).clamp(min=0)[:, None]
        slots = torch.arange(min(size, newest.shape[1]), device=count.device)
        chosen = newest.gather(1, slots + skip)
        kept = (count[:, None] - skip).clamp(max=size)
        first = torch.arange(classes, device=count.device)[:, None] * size
        rows = ((self.following[:, None] + slots) % size + first).flatten()
        places = self.vectors.view(-1, width)
        new = torch.where((slots < kept)[..., None].flatten(0, 1), gather_at(given, chosen).flatten(0, 1), places[rows])
        places.index_copy_(0, rows, new)
        self.following.add_(kept[:, 0]).remainder_(size)
        self.filled.add_(kept[:, 0]).clamp_(max=size)

    def draw(self, classes: Tensor, uniform: Tensor) -> Tensor:
        """Draw for each of ``classes`` (...) int64 as many vectors of its bank as it has random numbers.

        ``uniform`` (..., m) in [0, 1): (..., m, width) float16, with repetition; zeros if a bank is empty.
        """
        size, width = self.vectors.shape[1:]
        filled = self.filled[classes][..., None]
        place = (uniform * filled).long().minimum((filled - 1).clamp(min=0))
        # Not by indexing, which on a CPU takes four times as long for whole rows.
        return F.embedding(classes[..., None] * size + place, self.vectors.view(-1, width))


def sample_positions(counted: Tensor, order: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return positions (..., m) of at most ``count`` of the ``counted`` (..., n), and which are counted, both m.

    ``order`` (..., n) random in [0, 1), or a tensor that broadcasts to it.
    """
    score = torch.where(counted, order, -1.0)
    top = score.topk(min(count, score.shape[-1]), -1)
    return top.indices, top.values >= 0


def gather_at(vectors: Tensor, at: Tensor) -> Tensor:
    """Return (N, m, D): the vectors (N, n, D) at the positions (N, m)."""
    return vectors.gather(1, at[..., None].expand(-1, -1, vectors.shape[2]))
