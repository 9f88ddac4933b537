"""The parts of a configuration that all methods and data sets share.

The fields of one data set, and the defaults that depend on it, stand in its file in ``viladiff/data/sources``;
``viladiff.runs.config`` puts the parts together.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

from pydantic import Field, field_validator, model_validator

from viladiff.config.base import Section
from viladiff.config.pixel_format import RGB_8, PixelFormat


class DataConfig(Section):
    """What every data set has; each has its own defaults in ``viladiff/data/sources``."""

    dataset: str
    """Chooses the section; that of a data set admits its own name only."""
    split: str
    """Which images have labels: the number of labelled images, as in the paper's tables, or all that have a mask."""
    split_seed: int | None = Field(None, ge=0)
    """Draws another labelled subset of the same size; none is the published list."""
    holdout: float = Field(0.0, ge=0, lt=1)
    """Share of the labelled list that is kept out of training, for choosing between runs."""
    batch_labelled: int = Field(4, ge=1)
    """Labelled images in a step, over all workers."""
    batch_unlabelled: int = Field(4, ge=1)
    """Unlabelled images in a step, over all workers."""
    crop: int = Field(512, ge=16)
    """Side of the square crop, in pixels."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Range of the random resize before the crop."""
    hflip: float = Field(0.5, ge=0, le=1)
    """Probability of mirroring left and right."""
    color_jitter: bool = True
    """Whether strong views get colour changes and blur. With other than 3 channels these are brightness, contrast about
    each channel's own mean, and blur; hue, saturation and grey are of red, green and blue alone."""
    cutmix_grid: Literal["patch", "pixel"] = "patch"
    """Where CutMix boxes have their edges: between patches (ours, so that feature maps can be mixed), or anywhere."""
    captions: Literal["own", "shuffled", "generic", "none"] = "own"
    """Each image's captions; or, as controls, another image's, one sentence for all, or no words."""
    captions_on: Literal["both", "labelled", "unlabelled"] = "both"
    """Images of the pool that keep their captions; the others are given no words. Validation images keep theirs."""
    text_encoder: Literal["words", "minilm", "open_clip", "transformers"] = "open_clip"
    """What turns captions into vectors; the last two from ``runtime.text_model``."""

    @property
    def pixels(self) -> PixelFormat:
        """What the pixels of image files are; 8 bits of red, green and blue but for ``folder``."""
        return RGB_8

    @model_validator(mode="after")
    def _check_scale(self) -> DataConfig:
        low, high = self.scale
        if not 0 < low <= high:
            raise ValueError(f"scale = {self.scale}: must be low, high with 0 < low <= high")
        return self


class ModelConfig(Section):
    """The segmenter that every method builds."""

    encoder: str = Field("digits_vit", min_length=1)
    """``digits_vit``, any timm backbone, or ``transformers``; ``vit_base_patch16_224`` unless the data is built in."""
    pretrained: Literal["shipped", "timm", "none"] = "shipped"
    """Where the encoder's first weights come from; ``timm`` unless the data set is built in."""
    weights: str | None = None
    """A file of encoder weights, in place of ``pretrained``; of ``transformers`` the model's directory. A whole network
    of a published layout, as UniMatch's, also sets ``decoder`` and classifier."""
    encoder_stride: Literal[8, 16] | None = None
    """Pixels a cell of a convolutional timm encoder's coarsest map is wide: later stages are dilated in place of
    strided. None is the network's own, mostly 32; ``resnet101s`` at 16 is UniMatch's ResNet-101."""
    map_norm: Literal["group", "final"] | None = None
    """What norms a plain transformer's maps: a GroupNorm of one group each, or the encoder's own final norm all four
    (``final``, and blocks as UniMatch-V2 takes them); none is ``final`` for DINOv2 and DINOv3 under ``dpt``, else
    ``group``."""
    decoder: Literal["light", "deeplabv3plus", "dpt"] = "light"
    """What brings the encoder's maps to one fine map, ``dpt`` that of UniMatch-V2; semivl and textprobe have their own.
    """
    decoder_width: int = Field(16, ge=8)
    """Channels of ``light``, a multiple of 8; 128 unless the data set is built in. ``dpt`` has 64, 128 or 256,
    ``deeplabv3plus`` its published widths."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Rate of stochastic depth in the encoder."""
    encoder_frozen: bool = False
    """Whether the encoder's weights stay as they are."""


class OptimConfig(Section):
    """AdamW (paper, section 4.1), or SGD, as the methods with ResNet-101 were published."""

    name: Literal["adamw", "sgd"] = "adamw"
    """The optimiser."""
    lr: float = Field(1e-3, gt=0)
    """Learning rate at its highest, of all but the encoder."""
    encoder_lr_scale: float = Field(1.0, ge=0)
    """Factor of ``lr`` for the encoder (ours; the paper's rate is high for a pretrained one)."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled from the gradient under ``adamw``, added to it under ``sgd``, where 1e-4 is usual."""
    decay_norm_and_bias: bool = False
    """Whether parameters of one dimension (biases, scales of norms) decay too."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of ``adamw`` alone."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of ``sgd`` alone."""
    nesterov: bool = False
    """Of ``sgd`` alone: the gradient is that at the point which the momentum leads to."""
    schedule: Literal["poly", "cosine", "constant"] = "poly"
    """How rates fall from step to step."""
    poly_power: float = Field(0.9, gt=0)
    """Exponent of ``poly``."""
    warmup_steps: int = Field(0, ge=0)
    """Linear warm-up steps. Shorter runs never reach the base learning rate."""
    clip_norm: float | None = Field(None, gt=0)
    """Largest norm of the gradient; none leaves it as it is."""

    @model_validator(mode="after")
    def _check_betas(self) -> OptimConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas = {self.betas}: both must be ≥ 0 and < 1")
        return self

    @model_validator(mode="after")
    def _fits_the_optimiser(self) -> OptimConfig:
        for field in {"adamw": ("momentum", "nesterov"), "sgd": ("betas",)}[self.name]:
            value = getattr(self, field)
            if value != type(self).model_fields[field].default:
                other = "adamw" if self.name == "sgd" else "sgd"
                here = f"{field} = {value}: not a field of optim.name = {self.name!r}"
                raise ValueError(f"{here}; remove it, or set optim.name to {other}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov = True: needs a momentum above 0, got optim.momentum = 0; remove it")
        return self


class TrainConfig(Section):
    """How long, and in which arithmetic."""

    steps: int | None = Field(1500, ge=1)
    """Optimiser steps; giving ``epochs`` makes this none."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the unlabelled images (the labelled ones for a method that uses no others)."""
    epoch_images: int | Literal["unlabelled"] | None = Field(None)
    """Images of an epoch of a method that uses labelled ones alone, whose list is repeated up to this number; none is
    the list once, ``unlabelled`` as many optimiser steps as a pass over the unlabelled list has."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the forward pass (autocast); ``bf16`` unless the data set is built in, on whatever device. A CPU
    computes in bf16 too, slower than in fp32 where it has no such instructions. Evaluation computes in it as well;
    built-in data are scored in fp32. Weights, averages and the logits that give labels are fp32."""
    tf32: bool = False
    """Whether a GPU may round the inputs of fp32 products and convolutions to TF32: faster, 10 bits in place of 23."""
    grad_accum_steps: int = Field(1, ge=1)
    """Parts that each worker's share of a step is computed in, to save memory."""

    @model_validator(mode="before")
    @classmethod
    def _epochs_replace_steps(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("epochs") is not None and "steps" not in given:
            return {**given, "steps": None}
        return given

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"steps = {self.steps}, epochs = {self.epochs}: give exactly one of the two")
        return self

    @field_validator("epoch_images", mode="before")
    @classmethod
    def _some_images(cls, images: object) -> object:
        whole = isinstance(images, int) and not isinstance(images, bool)
        if not (images in (None, "unlabelled") or (whole and images >= 1)):  # type: ignore[operator]
            raise ValueError(f"must be a number of images ≥ 1, unlabelled or none, got {images!r}")
        return images


class EvalConfig(Section):
    every_steps: int = Field(0, ge=0)
    """Optimiser steps between evaluations; 0 evaluates at the end only."""
    every_epochs: float | None = Field(None, gt=0)
    """Epochs between evaluations, in place of ``every_steps``; an evaluation follows the step that completes one."""
    protocol: Literal["original", "center_crop", "sliding_window"] = "original"
    """``sliding_window`` by default on Cityscapes."""
    split: Literal["val", "dev", "test", "holdout"] = "val"
    """Images that scores are of. The built-in data sets have ``dev``, their default, for choices and ``test`` for
    results; the others have ``val``. ``holdout``: labelled images that ``data.holdout`` keeps out of training."""
    max_images: int | None = Field(None, ge=1)
    """The first so many validation images, for quick looks; none takes all."""
    boundary: bool = True
    """Whether boundary IoU and trimap mIoU are computed."""

    @model_validator(mode="after")
    def _one_interval(self) -> EvalConfig:
        if self.every_steps and self.every_epochs is not None:
            both = f"every_steps = {self.every_steps} and eval.every_epochs = {self.every_epochs:g}"
            raise ValueError(f"{both}: give one of the two")
        return self


class RuntimeConfig(Section):
    """Where and how a run happens; nothing here changes what it is, so nothing here is in its name."""

    workers: int = Field(1, ge=1)
    """Processes that share each global batch."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto``: a GPU where there is one."""
    threads: int | None = Field(None, ge=1, le=1024)
    """CPU threads of each worker; another count changes the last bits of sums."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether networks are compiled for training, part by part (torch.compile). ``auto`` does on a GPU for data sets of
    files and runs of 30,000 steps or more, if a step compiles in a process of its own within two minutes and
    ``gradient_shares`` is 0; a part that the compiler fails at runs as it is, and a line says so.
    Evaluation is never compiled, since sizes change there."""
    cores: int | None = Field(None, ge=1)
    """Cores of each worker, which its decoding processes share; none is ``threads``, or else its share of the machine.
    Tables and sweeps set it."""
    loader_workers: int | None = Field(None, ge=0, le=64)
    """Processes that decode image files, for each worker; none chooses: 0 on a CPU, else by the cores, and in the first
    minute more of them if training waits for images. In evaluation threads: none is 0 on a CPU, else the worker's cores
    but one, up to 8."""
    picture_cache: bool = False
    """Whether images and masks are stored decoded in the cache folder at their first use, and crops are cut from there:
    the same bits for less of the processor. A run says the size before it starts."""
    runs_dir: str = Field("runs", min_length=1)
    """Directory that holds one directory a run."""
    data_root: str | None = None
    """Directory of the data, for ``folder`` the one with ``images`` in it; not needed by the built-in data sets."""
    max_pixels: int | None = Field(None, ge=1)
    """Pixels of the largest image file that is read; none is 178,956,970. An image is decoded as a whole, in 3 bytes a
    pixel or more."""
    captions: str | None = None
    """File of captions (CSV, JSON lines or Parquet) in place of the data set's own; the run's name has its content."""
    text_model: str | None = None
    """Directory of the text encoder ``open_clip`` or ``transformers``; its content is in the run's name."""
    log_every: int = Field(50, ge=1)
    """Steps between two writes of the log, which has a line a step."""
    checkpoint_minutes: float = Field(10.0, gt=0)
    """Minutes of training after which a checkpoint is due; its writing goes on beside the next steps."""
    checkpoint_every: int = Field(100, ge=0)
    """Steps between two checkpoints besides those by time, which then follow each evaluation too; 0 is by time alone,
    the default unless the data set is built in."""
    scale: str = ""
    """Size of experiment that the run belongs to, for its record; set by the runner of tables."""
    visualizations: int = Field(0, ge=0, le=64)
    """Validation images whose labels at every stage are kept in ``pictures.npz``."""
    gradient_shares: int = Field(0, ge=0, le=100)
    """Steps of each third of training at which the share of the gradient that each part of the loss makes is measured;
    5 is plenty. Weights stay the same bit for bit; each such step takes one more backward pass a part."""
    tensorboard: bool = False
    """Whether losses and scores go to TensorBoard's files, too."""
    wandb: bool = False
    """Whether losses and scores go to Weights & Biases, too; where, its environment variables say."""
    group: str = ""
    """Name by which trackers group runs; set by the runners of tables and sweeps to the table or sweep."""
    progress: bool = True
    """Whether a bar shows how far the run is."""


class Sections(Protocol):
    """The part of a run's configuration that every method has: what ``RunConfig`` is without its method."""

    @property
    def seed(self) -> int: ...
    @property
    def data(self) -> DataConfig: ...
    @property
    def train(self) -> TrainConfig: ...
    @property
    def eval(self) -> EvalConfig: ...
    @property
    def runtime(self) -> RuntimeConfig: ...
