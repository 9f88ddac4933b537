"""ViLaDiff: two streams with and without text (ViLa), and pseudo-labels refined by diffusion (MixE).

CutMix boxes lie on the patch grid (ours), since they are cut out of feature maps as well. With neither ViLa nor MixE on
unlabelled images nothing but pixels is mixed, and ``data.cutmix_grid`` may be "pixel".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from viladiff.core import keyed_random
from viladiff.data.batch import Batch, CutMix, Losses, Step, TextBatch, Views
from viladiff.data.transforms.mixing import apply_cutmix, join_text
from viladiff.losses import (
    all_reduce_sum,
    distributed_mean,
    image_mean,
    weighted_pixel_mean,
)
from viladiff.methods.base import SHARED_THRESHOLD, MethodConfig, PredictConfig, Reference, StepCost, TeacherConfig
from viladiff.methods.common.oracle import OraclePseudoConfig, with_truth
from viladiff.methods.viladiff_mixe import MixeTeacher, Refined
from viladiff.methods.viladiff_outputs import Pseudo
from viladiff.models.blocks import cell_means
from viladiff.models.fused.pixel_loss import grid_top
from viladiff.models.mixe.denoiser import MixeConfig, class_codes, noise_levels
from viladiff.models.segmenter import NetworkFactory, Segmenter, cutmix_stream
from viladiff.models.stream import StreamOutput
from viladiff.models.vila import Distilled, VilaConfig, distil


class ViLaPseudoConfig(OraclePseudoConfig):
    source: Literal["fusion", "visual", "mean"] = "fusion"
    """The teacher stream that makes the pseudo-labels."""


class ViLaPredictConfig(PredictConfig):
    stream: Literal["visual", "fusion", "mean"] = "visual"
    """The headline stream; ``visual`` needs no text. The others are reported beside it."""
    refine: bool = False
    """Whether the record also has the evaluated network's scores after the denoiser's chain, as ``refined`` (ours)."""


class ViLaDiffConfig(MethodConfig):
    name: Literal["viladiff"] = "viladiff"
    cutmix: bool = True
    teacher: TeacherConfig = TeacherConfig()
    pseudo: ViLaPseudoConfig = ViLaPseudoConfig()
    predict: ViLaPredictConfig = ViLaPredictConfig()
    vila: VilaConfig = VilaConfig()
    mixe: MixeConfig = MixeConfig()

    @model_validator(mode="after")
    def _check(self) -> ViLaDiffConfig:
        if self.predict.refine and not self.mixe.enabled:
            raise ValueError(
                "predict.refine = true: with mixe.enabled = false there is no denoiser; set one of the two"
            )
        if not self.mixe.enabled:
            return self
        if "other_stream" in self.mixe.condition and not self.vila.enabled:
            raise ValueError(
                "mixe.condition = 'other_stream': there is one stream with vila.enabled = false; remove it"
            )
        if self.mixe.unlabelled_views == "cutmix" and not self.cutmix:
            raise ValueError("mixe.unlabelled_views = 'cutmix': no boxes with cutmix = false; set strong")
        return self


TERM_FIELDS = {
    "vila.lam": ("*_features/cosine",),
    "vila.feature_weight": ("*_features/*",),
    "vila.logit_weight": ("*_logits",),
    "vila.teacher_to_visual": ("teacher_to_visual_*",),
    "vila.distillation_paths=student_features": ("student_features/*",),
    "vila.distillation_paths=student_logits": ("student_logits",),
    "vila.distillation_paths=teacher_features": ("teacher_features/*", "teacher_to_visual_features/*"),
    "vila.distillation_paths=teacher_logits": ("teacher_logits", "teacher_to_visual_logits"),
    "mixe.edge_loss": ("mixe_edge",),
    "mixe.gaussian": ("mixe_noise",),
}


BUILT_IN_PRESET: Mapping[str, object] = {
    **SHARED_THRESHOLD,
    "vila.temperature": 1.0,
    "vila.logit_weight": 0.3,
    "vila.path_weights.teacher_logits": 0.0,
    "mixe.refine_where": "unsure",
    "mixe.labelled_views": "strong",
    "mixe.unlabelled_views": "strong",
}
"""What the text leaves open, as it was chosen on ``dev`` of the built-in data: reports/published/protocol/table.md."""


class ViLaDiff(MixeTeacher):
    Config = ViLaDiffConfig
    embedded = BUILT_IN_PRESET
    revision = 2
    views = Views(strong=1, cutmix=True, text=True, whole_cells=True)
    paper = Reference(
        "Learning Beyond Vision: Vision-Language Distillation and Edge-Aware Mix Diffusion in Semi-Supervised "
        "Semantic Segmentation",
        "AAAI",
        2026,
    )
    step_cost = StepCost(4, 2, 4, 2, "denoiser: 1 forward and backward, later 10 forward")
    extra_state = "teacher, denoiser"
    term_fields = TERM_FIELDS

    def build_student(self, build: NetworkFactory) -> Segmenter:
        return build(self.cfg.vila if self.cfg.vila.enabled else None)

    def required_views(self) -> Views:
        cfg, oracle = self.cfg, self.cfg.pseudo.oracle != "none"
        maps = cfg.vila.enabled or (cfg.mixe.enabled and cfg.mixe.train_images != "labelled")
        coloured, apart = cfg.mixe.enabled and cfg.mixe.labelled_views != "weak", self._period()
        views = Views(strong=1, cutmix=cfg.cutmix, text=cfg.vila.enabled, whole_cells=maps, truth=oracle)
        views = replace(views, cells=cfg.vila.enabled or cfg.mixe.enabled)
        return replace(views, strong_labelled=coloured, apart=apart)

    def eval_networks(self) -> dict[str, Any]:
        networks: dict[str, Any] = super().eval_networks()
        network = self.eval_network()
        assert isinstance(network, Segmenter)
        return networks | {"refined": Refined(self, network)} if self.cfg.predict.refine else networks

    def shared(self) -> dict[str, list[nn.Parameter]]:
        own = {} if self.denoiser is None else {"denoiser": list(self.denoiser.parameters())}
        return {**super().shared(), **own}

    @property
    def labels_read_text(self) -> bool:
        return self.cfg.vila.enabled and self.cfg.pseudo.source != "visual"

    def eval_stream(self) -> str:
        return self.cfg.predict.stream if self.cfg.vila.enabled else "visual"

    # One step, in the order of the paper: teacher, pseudo-labels, student, ViLa, MixE.

    def forward(self, batch: Batch, step: Step) -> Losses:
        cfg, labelled, size = self.cfg, len(batch.image), batch.image.shape[-2:]
        mix = batch.mix[0] if batch.mix else None
        with torch.no_grad():
            teacher_out = self._teach(batch, mix, step)
            teacher_logits = self._source_logits(teacher_out.weak.streams)
            unrefined = Pseudo(*self.student.at_pixels(teacher_logits, size).top())
            refined = self._refined(teacher_out.weak, teacher_logits, batch.keys_u, step)
            pseudo = unrefined if refined is None else self._relabelled(teacher_logits, refined, batch.valid)
            self._calibrate(batch, step)
            stride = self.student.label_stride
            pseudo = Pseudo(*with_truth(cfg.pseudo, step.progress, *pseudo, batch.truth_u, stride))

        strong, valid = batch.strong[0], batch.valid
        if mix is not None:
            strong, valid = apply_cutmix(strong, mix), apply_cutmix(valid, mix)
            pseudo = Pseudo(*(apply_cutmix(x, mix) for x in pseudo))
            unrefined = Pseudo(*(apply_cutmix(x, mix) for x in unrefined))
        text = join_text(batch.text, self._words(batch.text_u, mix))
        student_out = self._see(self.student, torch.cat([batch.image, strong]), text)

        confident = (pseudo.confidence >= cfg.pseudo.threshold).float()
        target = self._supervised(batch)
        targets = torch.cat([target, pseudo.labels])
        maps = {
            name: self.student.at_pixels(x.logits, size).cross_entropy(targets)
            for name, x in student_out.streams.items()
        }
        loss_sup = torch.stack([self.supervised_mean(x[:labelled], target) for x in maps.values()]).mean()
        loss_pseudo = torch.stack([weighted_pixel_mean(x[labelled:], confident, valid) for x in maps.values()]).mean()
        parts = {"sup": loss_sup, "pseudo": cfg.pseudo.weight * loss_pseudo}
        total = parts["sup"] + parts["pseudo"]
        coverage = distributed_mean((confident * valid).sum(), valid.sum())
        terms = {"sup": loss_sup, "pseudo": loss_pseudo, "coverage": coverage}

        if cfg.vila.enabled:
            gate = self._gate({name: x[labelled:] for name, x in maps.items()}, (confident * valid) > 0)
            distilled = self._distil(teacher_out.weak.streams, student_out.streams, gate, valid, mix)
            total = total + sum(distilled.terms.values())
            terms |= distilled.terms | {"gate": gate.mean()}
            parts |= distilled.parts
        if self.denoiser is not None:
            teacher_logits = self._unlabelled_start(teacher_out, teacher_logits, mix)
            diffusion = self._diffuse(batch, step, student_out, teacher_out, teacher_logits, unrefined, valid)
            names = ("mixe_ce", "mixe_edge", "mixe_noise")
            weighted = {name: w * diffusion[name] for name, w in zip(names, cfg.mixe.loss_weights, strict=True)}
            total = total + weighted["mixe_ce"] + weighted["mixe_edge"] + weighted["mixe_noise"]
            terms |= diffusion
            parts |= weighted
        return Losses(total, {name: value.detach() for name, value in terms.items()}, parts)

    @torch.no_grad()
    def pseudo_labels(
        self, images: Tensor, text: TextBatch | None, keys: tuple[int, ...], step: Step
    ) -> dict[str, Tensor]:
        """Return the probabilities ``before`` refinement and the scores ``after``, which need not sum to 1."""
        teacher_out = self._see(self.teacher, images, text)
        teacher_logits = self._source_logits(teacher_out.streams)
        before = self.student.upsample(teacher_logits, images.shape[-2:]).softmax(1)
        refined = self._refined(teacher_out, teacher_logits, keys, step, always=True)
        return {"before": before} if refined is None else {"before": before, "after": self.relabelled(before, refined)}

    @torch.no_grad()
    def visualize(self, images: Tensor, text: TextBatch | None, keys: tuple[int, ...], step: Step) -> dict[str, Tensor]:
        """Return labels before and after refinement, the edges that flip more, and labels at a few noise levels."""
        stages = [x.argmax(1) for x in self.pseudo_labels(images, text, keys, step).values()]
        label_maps = dict(zip(("pseudo-label", "refined"), stages, strict=False))
        cfg, size = self.cfg.mixe, images.shape[-2:]
        if self.denoiser is None or cfg.denoiser != "diffusion":
            return label_maps
        probs = self._soft(self._source_logits(self.teacher.streams(images, text)), size)
        _, classes, h, w = probs.shape
        length = class_codes(classes).shape[1]
        noise = keyed_random.normal(keys, (length, h, w), step.seed, "picture-noise", step.index, device=probs.device)
        uniform = keyed_random.uniform(keys, (h, w), step.seed, "picture-flip", step.index, device=probs.device)
        levels = noise_levels(probs, self._tau(step.progress), cfg, noise=noise, uniform=uniform)
        resized = {name: F.interpolate(x.float()[:, None], size, mode="nearest")[:, 0] for name, x in levels.items()}
        return label_maps | {name: labels.long() for name, labels in resized.items()}

    def _relabelled(self, grid: Tensor, refined: Tensor, valid: Tensor) -> Pseudo:
        """Return the labels of ``relabelled`` from grid logits (U, C, h, w) of teacher and chain."""
        size = valid.shape[-2:]
        if self.cfg.mixe.refine_where == "all" and self.cfg.mixe.confidence == "refined":
            return Pseudo(*grid_top(refined, size, self.student.label_aligned))
        before = self.student.upsample(grid, size).softmax(1)
        return Pseudo(*self.relabelled(before, refined, valid).max(1))

    # ViLa (section 3.3)

    def _gate(self, maps: dict[str, Tensor], counted: Tensor) -> Tensor:
        """Return (U,) 1 where the fusion stream may teach the visual one: if its cross-entropy to the labels is lower.

        ``maps`` (U, H, W) a stream, of which the bool pixels ``counted`` are read.
        """
        with torch.no_grad():
            fusion, visual = (image_mean(maps[name], counted) for name in ("fusion", "visual"))
            if self.cfg.vila.gate == "always":
                return torch.ones_like(fusion)
            if self.cfg.vila.gate == "per_batch":
                totals = all_reduce_sum(torch.stack([fusion.sum(), visual.sum()]))
                return (totals[0] < totals[1]).float().expand_as(fusion)
            return (fusion < visual).float()

    def _distil(
        self,
        teacher: dict[str, StreamOutput],
        student: dict[str, StreamOutput],
        gate: Tensor,
        valid: Tensor,
        mix: CutMix | None,
    ) -> Distilled:
        """Return Eq. 12 on the unlabelled images, which are the last ones of ``student``.

        Teacher maps are mixed with the boxes of the strong view.
        """
        cfg, patch, stride = self.cfg.vila, self.student.patch, self.student.decoder.stride
        h, w = valid.shape[-2] // patch, valid.shape[-1] // patch
        cells = (F.avg_pool2d(valid.float()[:, None], patch) > 0.5).flatten(1)
        pixels = cell_means(valid.float(), stride) > 0.5
        student = {name: StreamOutput(*(x[len(x) - len(valid) :] for x in stream)) for name, stream in student.items()}
        if mix is not None:
            teacher = {name: cutmix_stream(stream, mix, h, w, patch, stride) for name, stream in teacher.items()}
        return distil(cfg, teacher, student, gate, cells, pixels)
