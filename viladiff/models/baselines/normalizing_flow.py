"""A density of feature vectors: affine couplings (RealNVP) to a mixture of one Gaussian a class, in float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from viladiff.core.distributed import full_precision

COUPLING_STD = 0.05
"""Standard deviation of the couplings' parameters at first, so that z is nearly x, permuted; DDFP's release."""
MEAN_STD = 1.0
"""Standard deviation of the class means at first; DDFP's release. At 0.05 all classes are one Gaussian, and the
density falls away from the origin alone."""


class Coupling(nn.Module):
    """Each half is scaled and shifted by what the other half says, one after the other; then channels are shuffled.

    The form of GLOW. Logarithms of scales are kept in (-clamp, clamp) by ``soft_clamp``.
    """

    permutation: Tensor
    """(D,) int64, drawn once."""

    def __init__(self, width: int, hidden: int, clamp: float = 2.0) -> None:
        super().__init__()
        self.parts, self.clamp = (width // 2, width - width // 2), clamp
        first, second = self.parts
        self.by_second, self.by_first = _subnet(second, hidden, 2 * first), _subnet(first, hidden, 2 * second)
        self.register_buffer("permutation", torch.randperm(width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map x (n, D) to (n, D) and the logarithm of the determinant of the Jacobian, (n,)."""
        first, second = x.split(self.parts, 1)
        scale, shift = self._terms(self.by_second, second)
        first = first * scale.exp() + shift
        other, shift = self._terms(self.by_first, first)
        second = second * other.exp() + shift
        return torch.cat([first, second], 1)[:, self.permutation], scale.sum(1) + other.sum(1)

    def inverse(self, y: Tensor) -> Tensor:
        """Return the x that ``forward`` maps to y (n, D)."""
        first, second = y[:, self.permutation.argsort()].split(self.parts, 1)
        scale, shift = self._terms(self.by_first, first)
        second = (second - shift) * (-scale).exp()
        scale, shift = self._terms(self.by_second, second)
        return torch.cat([(first - shift) * (-scale).exp(), second], 1)

    def _terms(self, subnet: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = subnet(x).chunk(2, 1)
        return soft_clamp(scale, self.clamp), shift


class Flow(nn.Module):
    """x to z by couplings; z is from one of C Gaussians of unit covariance, equally likely, whose means are learned."""

    def __init__(self, width: int, num_classes: int, hidden: int, depth: int = 2, clamp: float = 2.0) -> None:
        super().__init__()
        if width < 2:
            raise ValueError(f"width = {width}: a coupling needs two channels to divide")
        self.couplings = nn.ModuleList([Coupling(width, hidden, clamp) for _ in range(depth)])
        self.means = nn.Parameter(torch.empty(num_classes, width))
        for parameter in self.couplings.parameters():
            nn.init.normal_(parameter, std=COUPLING_STD)
        nn.init.normal_(self.means, std=MEAN_STD)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map x (n, D) to z (n, D) and log |det dz/dx| (n,)."""
        total = x.new_zeros(len(x))
        for coupling in self.couplings:
            x, log_det = coupling(x)
            total = total + log_det
        return x, total

    def inverse(self, z: Tensor) -> Tensor:
        """Return the x of z, both (n, D)."""
        for coupling in reversed(self.couplings):
            z = coupling.inverse(z)  # type: ignore[operator]
        return z

    def nll(self, x: Tensor, classes: Tensor | None = None) -> Tensor:
        """Return -log p(x) in nats, (n,): of x (n, D) given its class, or, without one, under the whole mixture.

        ``classes`` (n,) int64, -1 if unknown. In float32 or better, also under autocast.
        """
        with full_precision(x.device):
            z, log_det = self(x if x.dtype == torch.float64 else x.float())
            # |z - m|^2 multiplied out: a row of differences for each class would be C times the memory.
            squared = z.square().sum(1, keepdim=True) - 2 * z @ self.means.T + self.means.square().sum(1)
            log_p = -0.5 * squared - 0.5 * z.shape[1] * math.log(2 * math.pi)
            mixture = log_p.logsumexp(1) - math.log(len(self.means))
            if classes is None:
                return -mixture - log_det
            given = log_p.gather(1, classes.clamp(min=0)[:, None])[:, 0]
            return -torch.where(classes < 0, mixture, given) - log_det


def soft_clamp(x: Tensor, limit: float) -> Tensor:
    """Squeeze x of any shape into (-limit, limit): 0.636 limit atan(x), as FrEIA does since version 0.2.

    x itself is not divided by the limit, so the slope at 0 is 0.636 limit; 0.636 stands for 2 / pi.
    """
    return 0.636 * limit * torch.atan(x)


def _subnet(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )
