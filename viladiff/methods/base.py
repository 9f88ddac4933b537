"""What every method is: a module that owns its networks and says which views it wants.

``backward`` stands in the loop and nowhere else; the loop, the data layer and the evaluator know a method only through this class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict
from torch import nn

from viladiff.batch import Batch, Losses, Step, Views

if TYPE_CHECKING:
    from viladiff.models.segmenter import Segmenter


class Section(BaseModel):
    """A part of the configuration: frozen, strict about keys, numbers that are not finite refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


class MethodConfig(Section):
    """Base of each method's own section; ``name`` tells the sections apart."""

    name: Literal[""]


class Method(nn.Module):
    """Base of all methods. ``state_dict()`` is the whole state: students, teachers, running statistics."""

    Config: ClassVar[type[MethodConfig]]
    views: ClassVar[Views] = Views()
    revision: ClassVar[int] = 1
    """Raised together with the golden file whenever the method computes something else than before."""

    def __init__(self, cfg: Any, build: Callable[[], Segmenter]) -> None:
        super().__init__()
        self.cfg = cfg
        self.student = build()

    def forward(self, batch: Batch, step: Step) -> Losses:
        raise NotImplementedError

    def after_step(self, step: Step) -> None:
        """Runs after each optimiser step, outside autograd: moving averages, queues."""

    def predictor(self) -> Segmenter:
        """The network that is evaluated, shipped and quoted."""
        return self.student

    def networks(self) -> dict[str, Segmenter]:
        """Every network worth evaluating, by the name that a record uses."""
        return {"student": self.student}

    def streams(self) -> tuple[str, ...]:
        """The prediction streams of ``predictor()``; the first is the headline."""
        return ("visual",)
