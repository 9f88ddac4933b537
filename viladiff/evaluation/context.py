"""The interface between an evaluation and its caller, the training loop or a loaded run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from viladiff.data.dataset import Dataset
    from viladiff.methods.base import Method
    from viladiff.runs.config import RunConfig
    from viladiff.text.embedding_bank import EmbeddingBank


class EvalContext(Protocol):
    """A method with the images that it is scored on; ``viladiff.training.trainer.Trainer`` is one."""

    cfg: RunConfig
    method: Method
    dataset: Dataset
    val_bank: EmbeddingBank
    """Words of the validation images."""
    device: torch.device
    rank: int
    """Of this worker."""
    world: int
    """Workers in all."""
    scoring: str
    """Arithmetic in which networks are scored: ``fp32``, ``bf16`` or ``fp16``."""
    steps: int
    """Training steps of the whole run."""
    directory: Path
    """Where files beside the record go."""

    def alive(self) -> None:
        """Send a heartbeat; may raise to end the evaluation."""
        ...
