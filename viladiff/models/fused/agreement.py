"""Whether Triton's kernels are used on a device: where they agree with torch on a small example."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from viladiff.core.messages import print_text

TOLERANCE = 1e-4


def stands_for_gpu(x: Tensor) -> bool:
    """Return whether ``x`` is a tensor without content that is counted as a GPU's."""
    return x.is_meta or (x.device.type == "cuda" and type(x) is not Tensor)


def kernels_agree(device: torch.device, example: Callable[[torch.device], tuple[list[Tensor], list[Tensor]]]) -> bool:
    """Compare what kernels and torch make of a small example on a device; a note says where they differ or fail."""
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            agrees = all(torch.allclose(a, b, atol=TOLERANCE) for a, b in zip(*example(device), strict=True))
        why = "their numbers differ from torch's"
    except Exception as error:  # whatever a compiler says of a device or a system that it does not know
        agrees, why = False, str(error).splitlines()[0] if str(error) else type(error).__name__
    if not agrees:
        print_text(f"note: Triton's kernels are not used on {device}: {why}", error=True)
    return agrees
