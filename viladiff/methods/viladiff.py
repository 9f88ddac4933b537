"""ViLaDiff: two streams with and without text (ViLa), and pseudo-labels refined by diffusion (MixE).

CutMix boxes lie on the patch grid (ours), since they are cut out of feature maps as well. With neither ViLa nor MixE on
unlabelled images nothing but pixels is mixed, and ``data.cutmix_grid`` may be "pixel".
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from viladiff import draws
from viladiff.batch import Batch, CutMix, Losses, Step, TextBatch, Views
from viladiff.data.mixing import apply_cutmix, join_text, mix_text
from viladiff.losses import (
    confident_mean,
    edge_mean,
    global_mean,
    global_sum,
    image_mean,
    labelled_mean,
    noise_loss,
    pixel_cross_entropy,
)
from viladiff.methods.base import (
    MeanTeacher,
    MethodConfig,
    Paper,
    Passes,
    PredictConfig,
    TeacherConfig,
)
from viladiff.methods.oracle import OraclePseudoConfig, with_truth
from viladiff.models.mixe import (
    Denoiser,
    MixeConfig,
    class_codes,
    confidence_threshold,
    corrupt,
    edge_mask,
    noise_levels,
    refine,
)
from viladiff.models.segmenter import Build, Segmenter, Stream, mixed, upsample
from viladiff.models.vila import Distilled, VilaConfig, distil


class ViLaPseudoConfig(OraclePseudoConfig):
    source: Literal["fusion", "visual", "mean"] = "fusion"
    """The teacher stream that makes the pseudo-labels."""


class ViLaPredictConfig(PredictConfig):
    stream: Literal["visual", "fusion", "mean"] = "visual"
    """The headline stream; ``visual`` needs no text. The others are reported beside it."""


class ViLaDiffConfig(MethodConfig):
    name: Literal["viladiff"] = "viladiff"
    cutmix: bool = True
    teacher: TeacherConfig = TeacherConfig()
    pseudo: ViLaPseudoConfig = ViLaPseudoConfig()
    predict: ViLaPredictConfig = ViLaPredictConfig()
    vila: VilaConfig = VilaConfig()
    mixe: MixeConfig = MixeConfig()


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


class Pseudo(NamedTuple):
    """Labels for the unlabelled pixels and how sure the teacher is of them."""

    confidence: Tensor
    """(U, H, W)."""
    labels: Tensor
    """(U, H, W) int64."""


class ViLaDiff(MeanTeacher):
    Config = ViLaDiffConfig
    views = Views(strong=1, cutmix=True, text=True, whole_cells=True)
    paper = Paper(
        "Learning Beyond Vision: Vision-Language Distillation and Edge-Aware Mix Diffusion in Semi-Supervised "
        "Semantic Segmentation",
        "AAAI",
        2026,
    )
    passes = Passes(4, 2, 4, 2, "denoiser: 1 forward and backward, later 10 forward")
    keeps = "teacher, denoiser"
    term_fields = TERM_FIELDS

    def __init__(self, cfg: ViLaDiffConfig, build: Build) -> None:
        super().__init__(cfg, build)
        mixe = cfg.mixe
        self.denoiser: Denoiser | None = None
        if mixe.enabled:
            width = self.student.decoder.width
            self.denoiser = Denoiser(build.num_classes, width, mixe.width, mixe.depth, mixe.timesteps)

    def build_student(self, build: Build) -> Segmenter:
        return build(self.cfg.vila if self.cfg.vila.enabled else None)

    def views_wanted(self) -> Views:
        cfg, oracle = self.cfg, self.cfg.pseudo.oracle != "none"
        maps = cfg.vila.enabled or (cfg.mixe.enabled and cfg.mixe.train_images != "labelled")
        return Views(strong=1, cutmix=cfg.cutmix, text=cfg.vila.enabled, whole_cells=maps, truth=oracle)

    def shared(self) -> dict[str, list[nn.Parameter]]:
        own = {} if self.denoiser is None else {"denoiser": list(self.denoiser.parameters())}
        return {**super().shared(), **own}

    def headline(self) -> str:
        return self.cfg.predict.stream if self.cfg.vila.enabled else "visual"

    # One step, in the order of the paper: teacher, pseudo-labels, student, ViLa, MixE.

    def forward(self, batch: Batch, step: Step) -> Losses:
        cfg, labelled, size = self.cfg, len(batch.image), batch.image.shape[-2:]
        mix = batch.mix[0] if batch.mix else None
        with torch.no_grad():
            taught, taught_labelled = self._teach(batch)
            soft = self._source_logits(taught)
            plain = _pseudo(soft, size)
            refined = self._refined(taught, soft, batch.keys_u, step)
            pseudo = plain if refined is None else _pseudo(refined, size)
            stride = self.student.decoder.stride
            pseudo = Pseudo(*with_truth(cfg.pseudo, step.progress, *pseudo, batch.truth_u, stride))

        strong, valid = batch.strong[0], batch.valid
        if mix is not None:
            strong, valid = apply_cutmix(strong, mix), apply_cutmix(valid, mix)
            pseudo = Pseudo(*(apply_cutmix(x, mix) for x in pseudo))
            plain = Pseudo(*(apply_cutmix(x, mix) for x in plain))
        words = batch.text_u if mix is None or cfg.vila.cutmix_text == "own" else mix_text(batch.text_u, mix)
        text = join_text(batch.text, words)
        seen = self.student.streams(torch.cat([batch.image, strong]), text)
        logits = {name: upsample(stream.logits, size) for name, stream in seen.items()}

        accepted = (pseudo.confidence >= cfg.pseudo.threshold).float()
        answers = torch.cat([batch.target, pseudo.labels])
        maps = {name: pixel_cross_entropy(x, answers) for name, x in logits.items()}
        sup = torch.stack([self.supervised_mean(x[:labelled], batch.target) for x in maps.values()]).mean()
        cons = torch.stack([confident_mean(x[labelled:], accepted, valid) for x in maps.values()]).mean()
        parts = {"sup": sup, "pseudo": cfg.pseudo.weight * cons}
        total = parts["sup"] + parts["pseudo"]
        coverage = global_mean((accepted * valid).sum(), valid.sum())
        terms = {"sup": sup, "pseudo": cons, "coverage": coverage}

        if cfg.vila.enabled:
            student = {name: Stream(*(x[labelled:] for x in stream)) for name, stream in seen.items()}
            gate = self._gate({name: x[labelled:] for name, x in maps.items()}, (accepted * valid) > 0)
            distilled = self._distil(taught, student, gate, valid, mix)
            total = total + sum(distilled.terms.values())
            terms |= distilled.terms | {"gate": gate.mean()}
            parts |= distilled.parts
        if self.denoiser is not None:
            diffusion = self._diffuse(batch, step, seen, taught_labelled, soft, plain, valid, mix)
            ce, edge, noise = cfg.mixe.loss_weights
            total = total + ce * diffusion["mixe_ce"] + edge * diffusion["mixe_edge"] + noise * diffusion["mixe_noise"]
            terms |= diffusion
            weighted = zip(("mixe_ce", "mixe_edge", "mixe_noise"), cfg.mixe.loss_weights, strict=True)
            parts |= {name: weight * diffusion[name] for name, weight in weighted}
        return Losses(total, {name: value.detach() for name, value in terms.items()}, parts)

    @torch.no_grad()
    def pseudo_labels(
        self, images: Tensor, text: TextBatch | None, keys: tuple[int, ...], step: Step
    ) -> dict[str, Tensor]:
        taught = self.teacher.streams(images, text)
        soft = self._source_logits(taught)
        refined = self._refined(taught, soft, keys, step, always=True)
        stages = {"before": soft} if refined is None else {"before": soft, "after": refined}
        return {name: upsample(x, images.shape[-2:]).softmax(1) for name, x in stages.items()}

    @torch.no_grad()
    def illustrate(
        self, images: Tensor, text: TextBatch | None, keys: tuple[int, ...], step: Step
    ) -> dict[str, Tensor]:
        """Pseudo-labels before and after refinement, the edges that flip more, and the labels at a few noise levels."""
        stages = [x.argmax(1) for x in self.pseudo_labels(images, text, keys, step).values()]
        found = dict(zip(("pseudo-label", "refined"), stages, strict=False))
        cfg, size = self.cfg.mixe, images.shape[-2:]
        if self.denoiser is None or cfg.denoiser == "plain":
            return found
        soft = self._source_logits(self.teacher.streams(images, text)).softmax(1)
        _, classes, h, w = soft.shape
        length = class_codes(classes).shape[1]
        noise = draws.normal(keys, (length, h, w), step.seed, "picture-noise", step.index, device=soft.device)
        uniform = draws.uniform(keys, (h, w), step.seed, "picture-flip", step.index, device=soft.device)
        levels = noise_levels(soft, self._tau(step.progress), cfg, noise=noise, uniform=uniform)
        large = {name: F.interpolate(x.float()[:, None], size, mode="nearest")[:, 0] for name, x in levels.items()}
        return found | {name: labels.long() for name, labels in large.items()}

    # Teacher

    def _teach(self, batch: Batch) -> tuple[dict[str, Stream], dict[str, Stream]]:
        """The teacher's streams on the weak views and, where MixE learns from them, on the labelled images."""
        if self.denoiser is None or self.cfg.mixe.train_images == "unlabelled":
            return self.teacher.streams(batch.weak[0], batch.text_u), {}
        chosen = _chosen(batch)
        words = None if batch.text is None else TextBatch(batch.text.tokens[chosen], batch.text.mask[chosen])
        images = torch.cat([batch.image[chosen], batch.weak[0]])
        out = self.teacher.streams(images, join_text(words, batch.text_u))
        count = len(images) - len(batch.weak[0])
        return (
            {name: Stream(*(x[count:] for x in stream)) for name, stream in out.items()},
            {name: Stream(*(x[:count] for x in stream)) for name, stream in out.items()},
        )

    def _source_logits(self, streams: dict[str, Stream]) -> Tensor:
        """Grid logits (U, C, h, w) of the stream that makes pseudo-labels; of the mean, its log-probabilities."""
        source = self.cfg.pseudo.source if self.cfg.vila.enabled else "visual"
        if source == "mean":
            mean = torch.stack([stream.logits.softmax(1) for stream in streams.values()]).mean(0)
            return mean.clamp_min(1e-30).log()  # kept finite, since interpolating an infinity gives NaN
        return streams[source].logits

    def _condition(self, streams: dict[str, Stream]) -> Stream:
        """The stream whose map and logits condition the denoiser."""
        source = self.cfg.pseudo.source if self.cfg.vila.enabled else "visual"
        return streams["fusion" if source == "mean" else source]

    # ViLa (section 3.3)

    def _gate(self, maps: dict[str, Tensor], counted: Tensor) -> Tensor:
        """(U,) 1 where the fusion stream may teach the visual one: where its cross-entropy to the labels is lower.

        ``maps`` (U, H, W) a stream, of which the bool pixels ``counted`` are read.
        """
        with torch.no_grad():
            fusion, visual = (image_mean(maps[name], counted) for name in ("fusion", "visual"))
            if self.cfg.vila.gate == "always":
                return torch.ones_like(fusion)
            if self.cfg.vila.gate == "per_batch":
                totals = global_sum(torch.stack([fusion.sum(), visual.sum()]))
                return (totals[0] < totals[1]).float().expand_as(fusion)
            return (fusion < visual).float()

    def _distil(
        self,
        taught: dict[str, Stream],
        student: dict[str, Stream],
        gate: Tensor,
        valid: Tensor,
        mix: CutMix | None,
    ) -> Distilled:
        """Eq. 12; teacher maps are mixed with the boxes of the strong view."""
        cfg, patch, stride = self.cfg.vila, self.student.patch, self.student.decoder.stride
        h, w = valid.shape[-2] // patch, valid.shape[-1] // patch
        cells = (F.avg_pool2d(valid.float()[:, None], patch) > 0.5).flatten(1)
        pixels = F.avg_pool2d(valid.float()[:, None], stride)[:, 0] > 0.5
        if mix is not None:
            taught = {name: mixed(stream, mix, h, w, patch, stride) for name, stream in taught.items()}
        return distil(cfg, taught, student, gate, cells, pixels)

    # MixE (section 3.4)

    def _tau(self, progress: float) -> float:
        cfg = self.cfg.mixe
        return confidence_threshold(progress, cfg.tau_end, cfg.tau_ramp, start=cfg.tau_start, shape=cfg.tau_shape)

    def _diffuse(
        self,
        batch: Batch,
        step: Step,
        seen: dict[str, Stream],
        taught_labelled: dict[str, Stream],
        soft_unlabelled: Tensor,
        pseudo: Pseudo,
        valid: Tensor,
        mix: CutMix | None,
    ) -> dict[str, Tensor]:
        """The three terms of Eq. 13: corrupt the teacher's soft labels and ask the denoiser for the clean ones.

        The condition is the student's view of the same picture, never the logits that x_0 was made from: those could be
        copied. Targets are the masks, and on unlabelled images the teacher's confident labels as they were before
        refinement, so that the denoiser never learns from its own output.
        """
        assert self.denoiser is not None
        cfg, size, chosen = self.cfg.mixe, batch.image.shape[-2:], _chosen(batch)
        condition, stride = self._condition(seen), self.student.decoder.stride
        target = batch.target[chosen]
        soft, keys, parts = [], [], []
        if cfg.train_images != "unlabelled":
            soft.append(self._source_logits(taught_labelled).softmax(1))
            keys += [f"l{key}" for key in batch.keys[chosen]]
            parts.append(chosen)
        if cfg.train_images != "labelled":
            x0 = soft_unlabelled.softmax(1)
            soft.append(x0 if mix is None else apply_cutmix(x0, mix, stride))
            keys += [f"u{key}" for key in batch.keys_u]
            parts.append(slice(len(batch.image), None))
        mid, logits = (torch.cat([x.detach()[part] for part in parts]) for x in (condition.mid, condition.logits))
        mid = mid.float()
        if cfg.condition_noise:
            noise = draws.normal(keys, tuple(mid.shape[1:]), step.seed, "mixe-condition", step.index, device=mid.device)
            mid = mid + cfg.condition_noise * noise
        clean, gaussian, noise_hat, noise = self._denoised(torch.cat(soft), mid, logits, keys, step)
        clean = upsample(clean, size)

        ce, edge = [], []
        answers = {"labelled": [target], "unlabelled": [pseudo.labels], "both": [target, pseudo.labels]}[
            cfg.train_images
        ]
        loss = pixel_cross_entropy(clean, torch.cat(answers))
        if cfg.train_images != "unlabelled":
            ce.append(labelled_mean(loss[: len(target)], target))
            edge.append(edge_mean(loss[: len(target)], edge_mask(target)))
        if cfg.train_images != "labelled":
            accepted = (pseudo.confidence >= self.cfg.pseudo.threshold).float()
            rest = loss[-len(pseudo.labels) :]
            ce.append(confident_mean(rest, accepted, valid))
            # The padding has labels too, made up by the teacher; they must not draw an edge around the picture.
            edges = edge_mask(pseudo.labels.masked_fill(~valid, 255))
            edge.append(edge_mean(rest, edges & (accepted > 0)))
        known = torch.cat([batch.target != 255, valid])
        seen_pixels = torch.cat([known[part] for part in parts])
        counted = F.avg_pool2d(seen_pixels.float()[:, None], stride)[:, 0] > 0.5
        terms = {
            "mixe_ce": torch.stack(ce).sum(),
            "mixe_edge": torch.stack(edge).sum() if cfg.edge_loss else clean.sum() * 0,
            "mixe_noise": noise_loss(noise_hat, noise, gaussian & counted & cfg.gaussian),
        }
        return terms | {"tau": torch.tensor(self._tau(step.progress)), "gaussian": gaussian.float().mean()}

    def _denoised(
        self, soft: Tensor, mid: Tensor, logits: Tensor, keys: list[str], step: Step
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Class logits, Gaussian region, predicted and true noise for one random timestep per image (Eqs. 3-8)."""
        assert self.denoiser is not None
        cfg, device, (batch, _, h, w) = self.cfg.mixe, soft.device, soft.shape
        condition = self.denoiser.prepare(mid, logits)
        codes = class_codes(self.student.num_classes).shape[1]
        if cfg.denoiser == "plain":
            nothing = torch.zeros(batch, codes, h, w, device=device)
            nowhere = torch.zeros(batch, h, w, dtype=torch.bool, device=device)
            clean, noise_hat = self.denoiser(
                nothing, nowhere, nowhere, torch.zeros(batch, device=device).long(), condition
            )
            return clean, nowhere, noise_hat, nothing
        name = (step.seed, "mixe-t", step.index)
        times = [int(draws.rng(*name, key).integers(1, cfg.timesteps + 1)) for key in keys]
        t = torch.tensor(times).to(device, non_blocking=True)
        noise = draws.normal(keys, (codes, h, w), step.seed, "mixe-noise", step.index, device=device)
        uniform = draws.uniform(keys, (h, w), step.seed, "mixe-flip", step.index, device=device)
        state = corrupt(soft, t, self._tau(step.progress), cfg, noise=noise, uniform=uniform)
        clean, noise_hat = self.denoiser(state.codes, state.gaussian, state.edges, t, condition)
        return clean, state.gaussian, noise_hat, noise

    def _refined(
        self, taught: dict[str, Stream], soft: Tensor, keys: tuple[int, ...], step: Step, always: bool = False
    ) -> Tensor | None:
        """Grid logits (U, C, h, w) of the labels after the reverse chain, or None where MixE does not refine yet."""
        cfg = self.cfg.mixe
        if self.denoiser is None or not cfg.refine or (step.progress < cfg.refine_from and not always):
            return None
        source = self._condition(taught)
        condition = self.denoiser.prepare(source.mid.float(), source.logits)
        batch, _, h, w = soft.shape
        codes, steps = class_codes(self.student.num_classes).shape[1], cfg.refine_steps or cfg.timesteps
        if cfg.denoiser == "plain":
            nothing = torch.zeros(batch, codes, h, w, device=soft.device)
            nowhere = torch.zeros(batch, h, w, dtype=torch.bool, device=soft.device)
            return self.denoiser(nothing, nowhere, nowhere, torch.zeros(batch, device=soft.device).long(), condition)[0]
        noise = draws.normal(keys, (codes, h, w), step.seed, "refine-noise", step.index, device=soft.device)
        uniforms = draws.uniform(keys, (steps, h, w), step.seed, "refine-flip", step.index, device=soft.device)
        tau = self._tau(step.progress)
        return refine(self.denoiser, condition, soft.softmax(1), tau, cfg, noise, uniforms.transpose(0, 1))


def _chosen(batch: Batch) -> slice:
    """Labelled images that MixE learns from: as many as there are unlabelled ones; all of them at equal batch sizes.

    They are evenly spaced, so that workers with a share each choose together what one worker would.
    """
    every = max(1, len(batch.image) // len(batch.weak[0]))
    return slice(0, every * len(batch.weak[0]), every)


def _pseudo(logits: Tensor, size: torch.Size) -> Pseudo:
    return Pseudo(*upsample(logits, size).softmax(1).max(1))
