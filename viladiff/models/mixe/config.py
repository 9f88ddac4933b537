"""The configuration of MixE: noise, denoiser, its inputs, and the labels that refined ones replace."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from viladiff.config.base import Section

More = Literal["finer", "other_stream", "image"]

NOISE = (
    "gaussian", "flips", "timesteps", "beta", "edge_bonus", "flip_schedule", "gaussian_region", "tau_start", "tau_end",
    "tau_ramp", "tau_shape", "reverse", "refine_steps", "condition_noise", "condition",
)  # fmt: skip
"""Fields of the diffusion and of what its denoiser is conditioned on, which the guided refiner has no use for."""


class MixeConfig(Section):
    """Edge-aware mixed-noise diffusion on labels (paper, section 3.4, Eqs. 3-8 and 13)."""

    enabled: bool = True
    """Off: pseudo-labels are the teacher's, and there is no denoiser."""
    gaussian: bool = True
    """q_G of Table 5; off leaves its region clean."""
    flips: bool = True
    """q_C of Table 5; off leaves its region clean."""
    edge_loss: bool = True
    """Cross-entropy on edge pixels once more, L_edge of Eq. 11."""
    timesteps: int = Field(10, ge=1, le=1000)
    """T, the number of noise levels."""
    beta: float = Field(0.1, ge=0, le=1)
    """Probability of a flip in one step (Eq. 6)."""
    edge_bonus: float = Field(0.1, ge=0, le=1)
    """Added to ``beta`` on edge pixels, in each step."""
    flip_schedule: Literal["cumulative", "constant", "matched"] = "cumulative"
    """Flips by step t: of t steps; of one, the letter of Eq. 6; as many at T as cumulative ones at 10."""
    gaussian_region: Literal["confident", "uncertain"] = "confident"
    """Which side of τ gets Gaussian noise; Eq. 7 and the sentence below it disagree."""
    tau_start: float = Field(0.0, ge=0, le=1)
    """τ of Eq. 7 when training begins."""
    tau_end: float = Field(0.8, ge=0, le=1)
    """τ from the end of its ramp on."""
    tau_ramp: float = Field(0.5, ge=0, le=1)
    """Share of training over which τ moves from start to end."""
    tau_shape: Literal["linear", "cosine", "step"] = "linear"
    """How τ moves; ``step`` jumps at the end of the ramp."""
    reverse: Literal["posterior", "direct"] = "posterior"
    """A step back draws by Bayes' rule over the predicted clean label, or from that prediction (letter of Eq. 8)."""
    train_images: Literal["labelled", "unlabelled", "both"] = "both"
    """Images that the denoiser learns from."""
    labelled_views: Literal["weak", "strong", "cutmix"] = "weak"
    """The view of labelled images that x_0 is made from: as the student sees them, with the colours of a strong view,
    or with a neighbour's box pasted in as well, also into mask and condition (ours)."""
    unlabelled_views: Literal["weak", "strong", "cutmix"] = "weak"
    """The view of unlabelled images that x_0 is made from in training; ``strong`` is mixed afterwards, ``cutmix`` is
    the mixed picture that the student sees. Targets are the weak view's labels in all three (ours)."""
    holdout: float = Field(0.0, ge=0, le=0.5)
    """Share of the labelled list, and of each labelled batch, that is left out of the supervised loss: the labelled
    images that the denoiser learns from, and that its confidence is calibrated on (ours). 0 or 1 / n."""
    loss_weights: tuple[float, float, float] = (1.0, 0.5, 0.5)
    """Weights of (L_ce, L_edge, L_d) in Eq. 11."""
    refine: bool = True
    """Whether refined labels replace the teacher's in the later part of training."""
    refine_from: float = Field(0.5, ge=0, le=1)
    """Share of training after which refined labels are taken."""
    refine_where: Literal["all", "unsure", "edges"] = "all"
    """Pixels whose label and confidence are refined: all, those below ``pseudo.threshold``, or the cells on edges of
    the teacher's labels. The others keep the teacher's."""
    confidence: Literal["refined", "product", "calibrated"] = "refined"
    """Confidence of a refined pixel: the denoiser's own, its product with the teacher's probability of the same class,
    or the running precision of left-out pixels of such a confidence (ours)."""
    refine_steps: int | None = Field(None, ge=1, le=1000)
    """Reverse steps at refinement; none means ``timesteps``."""
    denoiser: Literal["diffusion", "plain", "guided"] = "diffusion"
    """``plain``: a network of the same size that never sees noise (control). ``guided``: a learned joint bilateral
    filter of the teacher's probabilities along the picture, without noise (ours)."""
    width: int = Field(32, ge=8)
    """Channels of the denoiser; 64, or 128 from 81 classes on, unless the data is built in."""
    depth: int = Field(2, ge=1)
    """Residual blocks of the denoiser, passes of the guided filter; 4 unless the data is built in."""
    lr_scale: float = Field(1.0, gt=0)
    """Factor of the learning rate for the denoiser."""
    condition: tuple[More, ...] = ()
    """What the denoiser reads besides the decoder's map and the classes of one stream: the encoder's two finest maps,
    map and classes of the other stream, the picture's pixels (ours)."""
    condition_noise: float = Field(0.1, ge=0)
    """Standard deviation of the noise on the conditioning features, which are of about unit scale (ours)."""

    @model_validator(mode="after")
    def _check(self) -> MixeConfig:
        if self.refine_steps is not None and self.refine_steps > self.timesteps:
            raise ValueError(f"refine_steps = {self.refine_steps} is more than timesteps = {self.timesteps}")
        if len(self.loss_weights) != 3 or min(self.loss_weights) < 0:
            raise ValueError(
                f"loss_weights = {self.loss_weights}: three weights that are not negative, for (L_ce, L_edge, L_d)"
            )
        if self.beta + self.edge_bonus >= 1:
            raise ValueError(
                f"beta + edge_bonus = {self.beta + self.edge_bonus:g}: must be at most (C - 1) / C for C classes"
            )
        for fault in self._faults():
            raise ValueError(fault)
        return self

    @property
    def period(self) -> int:
        """Every such labelled image of a batch is left out; 1 where none is."""
        return round(1 / self.holdout) if self.holdout else 1

    def _faults(self) -> Iterator[str]:
        if len(set(self.condition)) < len(self.condition):
            yield f"condition = {self.condition}: a part is named twice"
        if self.holdout and abs(self.holdout * self.period - 1) > 0.015:
            yield f"holdout = {self.holdout:g}: must be 0 or 1 / n for a whole n; nearest: {1 / self.period:g}"
        for images in ("labelled", "unlabelled"):
            view = getattr(self, f"{images}_views")
            if view != "weak" and self.train_images not in (images, "both"):
                yield (
                    f"{images}_views = {view!r}: train_images = {self.train_images!r} learns from no such images; "
                    f"set {images}_views=weak, or train_images to {images} or both"
                )
        if self.confidence == "calibrated" and not self.holdout:
            yield "confidence = 'calibrated': needs labelled images that were left out; set holdout, such as 0.25"
        if self.confidence == "calibrated" and not self.refine:
            yield "confidence = 'calibrated': of refined labels, which refine = false leaves out; set it to refined"
        if self.holdout and self.train_images == "unlabelled" and self.confidence != "calibrated":
            yield (
                f"holdout = {self.holdout:g}: train_images = 'unlabelled' and confidence = {self.confidence!r} use no "
                "left-out images; set holdout=0"
            )
        if self.denoiser == "guided":
            plain = {name: type(self).model_fields[name].default for name in NOISE}
            for name in [name for name in NOISE if getattr(self, name) != plain[name]]:
                yield f"{name} = {getattr(self, name)}: denoiser = 'guided' does not read it; leave it at {plain[name]}"
