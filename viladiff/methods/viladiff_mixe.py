"""The MixE half of ViLaDiff: training of the denoiser, its inputs, and the labels that it replaces."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_unshuffle

from viladiff.core import keyed_random
from viladiff.data.batch import IGNORE, Batch, CutMix, Step, TextBatch
from viladiff.data.loading.device_copies import send
from viladiff.data.transforms.mixing import apply_cutmix, cutmix_boxes, join_text, mix_text, pair_partner
from viladiff.losses import edge_mean, ignore_aware_mean, noise_loss, weighted_pixel_mean
from viladiff.methods.base import MeanTeacher
from viladiff.methods.viladiff_outputs import NetworkOutput, Places, Pseudo, TeacherOutput, keys_at, rows_at, text_at
from viladiff.models.blocks import cell_means, resampled, upsample
from viladiff.models.fused.pixel_loss import grid_cross_entropy
from viladiff.models.mixe.denoiser import Denoiser, class_codes, confidence_threshold, corrupt, edge_mask, refine
from viladiff.models.mixe.guided_filter import Guided
from viladiff.models.mixe.relabel import Calibration, refined_pixels, relabelled
from viladiff.models.segmenter import NetworkFactory, Segmenter
from viladiff.models.stream import StreamOutput

LEAD = 0.1
"""Share of training before refinement from which refined confidence is calibrated."""


class MixeTeacher(MeanTeacher):
    """A mean teacher whose labels MixE refines; ``cfg`` has ``mixe``, ``vila`` and ``pseudo`` as ViLaDiff's."""

    def __init__(self, cfg: Any, build: NetworkFactory) -> None:
        super().__init__(cfg, build)
        mixe, classes = cfg.mixe, build.num_classes
        self.denoiser: Denoiser | Guided | None = None
        self.calibration: Calibration | None = None
        if mixe.enabled and mixe.denoiser == "guided":
            self.denoiser = Guided(classes, self.student.label_stride, mixe.width, mixe.depth)
        elif mixe.enabled:
            width = self.student.decoder.width
            sizes = {"finer": self.student.encoder.channels[:2], "other_stream": (width + classes,)}
            sizes["image"] = (3 * self.student.label_stride**2,)
            more = [channels for name in mixe.condition for channels in sizes[name]]
            self.denoiser = Denoiser(classes, width, mixe.width, mixe.depth, mixe.timesteps, more)
        if mixe.enabled and mixe.confidence == "calibrated":
            self.calibration = Calibration()

    def extra_param_groups(self) -> dict[str, dict[str, Any]]:
        scale = self.cfg.mixe.lr_scale
        return {} if self.denoiser is None or scale == 1 else {"denoiser": {"lr_scale": scale}}

    def after_step(self, step: Step) -> None:
        super().after_step(step)
        if self.calibration is not None:
            self.calibration.after_step()

    # Images: which ones, which views

    def _period(self) -> int:
        """Return n if every n-th labelled image of a batch is left out of the supervised loss; 1 if none is."""
        return int(self.cfg.mixe.period) if self.cfg.mixe.enabled else 1

    def _supervised(self, batch: Batch) -> Tensor:
        """Return (B, H, W) masks, 255 in images that are left out."""
        if self._period() == 1:
            return batch.target
        target = batch.target.clone()
        target[self._period() - 1 :: self._period()] = IGNORE
        return target

    def _chosen(self, batch: Batch) -> Places:
        """Choose the labelled images that MixE learns from: as many as unlabelled ones; all at equal batch sizes.

        They are among the left-out images if there are any, unless confidence is calibrated on those. They are evenly
        spaced, so that workers with a share each choose together what one worker would.
        """
        period = 1 if self.calibration is not None else self._period()
        count, most = len(batch.image) // period, len(batch.weak[0])
        if count > most and count % most:
            indices = [i for i in range(count) if -(-(i + 1) * most // count) > -(-i * most // count)]
            return [i * period + period - 1 for i in indices]
        return slice(period - 1, len(batch.image), period * max(1, count // most))

    def _teach(self, batch: Batch, mix: CutMix | None, step: Step) -> TeacherOutput:
        """Run the teacher on the weak views and, where MixE learns from them, on other images, in one pass."""
        cfg, boxes = self.cfg.mixe, None
        learns = None if self.denoiser is None else cfg.train_images
        views: dict[str, tuple[Tensor, TextBatch | None]] = {}
        if learns in ("labelled", "both"):
            chosen = self._chosen(batch)
            image, view_text = batch.image if cfg.labelled_views == "weak" else batch.image_strong, batch.text
            assert image is not None  # the views ask for it
            image, view_text = rows_at(image, chosen), text_at(view_text, chosen)
            if cfg.labelled_views == "cutmix":
                boxes = self._boxes(keys_at(batch, chosen), image, step)
                image, view_text = apply_cutmix(image, boxes), self._words(view_text, boxes)
            views["labelled"] = image, view_text
        views["weak"] = batch.weak[0], batch.text_u
        if learns in ("unlabelled", "both") and cfg.unlabelled_views != "weak":
            image, view_text = batch.strong[0], batch.text_u
            if cfg.unlabelled_views == "cutmix" and mix is not None:
                image, view_text = apply_cutmix(image, mix), self._words(view_text, mix)
            views["unlabelled"] = image, view_text
        images, text = next(iter(views.values()))
        for more_images, view_text in list(views.values())[1:]:
            images, text = torch.cat([images, more_images]), join_text(text, view_text)
        out = self._see(self.teacher, images, text)
        parts, start = {}, 0
        for name, (image, _) in views.items():
            parts[name] = out.part(slice(start, start + len(image)))
            start += len(image)
        logits = {name: self._source_logits(part.streams) for name, part in parts.items() if name != "weak"}
        return TeacherOutput(parts["weak"], logits.get("labelled"), logits.get("unlabelled"), boxes)

    def _boxes(self, keys: tuple[int, ...], images: Tensor, step: Step) -> CutMix:
        """Draw CutMix boxes of labelled neighbours as the unlabelled images' boxes are drawn."""
        rngs = [keyed_random.numpy_generator(step.seed, "mixe-cutmix", step.index, key) for key in keys]
        boxes = cutmix_boxes(rngs, images.shape[-1], self.student.patch)
        return CutMix(*(send(x, images.device) for x in (boxes, pair_partner(len(keys)))))

    def _words(self, text: TextBatch | None, mix: CutMix | None) -> TextBatch | None:
        """Return the texts of images into which boxes were pasted."""
        return text if mix is None or self.cfg.vila.cutmix_text == "own" else mix_text(text, mix)

    def _see(self, network: Segmenter, images: Tensor, text: TextBatch | None) -> NetworkOutput:
        if not (self.cfg.mixe.enabled and "finer" in self.cfg.mixe.condition):
            return NetworkOutput(network.streams(images, text), images)
        maps = network.encode(images)
        return NetworkOutput(network.decode(maps, text), images, tuple(maps[:2]))

    def _source(self) -> str:
        return self.cfg.pseudo.source if self.cfg.vila.enabled else "visual"

    def _source_logits(self, streams: dict[str, StreamOutput]) -> Tensor:
        """Return grid logits (U, C, h, w) of the stream that makes pseudo-labels; log-probabilities for the mean."""
        if self._source() == "mean":
            mean = torch.stack([stream.logits.softmax(1) for stream in streams.values()]).mean(0)
            return mean.clamp_min(1e-30).log()  # kept finite, since interpolating an infinity gives NaN
        return streams[self._source()].logits

    def _soft(self, logits: Tensor, size: torch.Size) -> Tensor:
        """Return probabilities (B, C, h, w) on the label grid of images of ``size``, from logits on the decoder's."""
        return self._labelled_grid(logits.softmax(1), size)

    def _labelled_grid(self, x: Tensor, size: torch.Size) -> Tensor:
        """Bring a map of the decoder's grid to the label grid, whose cells are whole pixels; often that is the same."""
        stride = self.student.label_stride
        if self.student.decoder.stride == stride:
            return x
        return resampled(x, (-(-size[0] // stride), -(-size[1] // stride)))

    def _label_pixels(self, x: Tensor, size: torch.Size) -> Tensor:
        """Resize maps of the label grid to pixels, aligned as the decoder's are where the two grids are one."""
        return upsample(x, size, self.student.label_aligned)

    def _on_labels(self, stream: StreamOutput, size: torch.Size) -> StreamOutput:
        """Bring a stream's map and logits to the label grid, logits as logarithms of mean probabilities."""
        if self.student.decoder.stride == self.student.label_stride:
            return stream
        logits = self._soft(stream.logits, size).clamp_min(1e-30).log()
        return StreamOutput(stream.features, self._labelled_grid(stream.mid, size), logits)

    def _condition(self, out: NetworkOutput, source: str | None = None) -> list[Tensor]:
        """Map and logits of the stream that conditions the denoiser, and the further maps of ``condition``."""
        name = source or ("fusion" if self._source() == "mean" else self._source())
        stream, more = self._on_labels(out.streams[name], out.image.shape[-2:]), list[Tensor]()
        for part in self.cfg.mixe.condition:
            if part == "finer":
                more += out.finer
            elif part == "image":
                more.append(pixel_unshuffle(out.image, self.student.label_stride))
            else:
                second = self._on_labels(out.streams["visual" if name == "fusion" else "fusion"], out.image.shape[-2:])
                more.append(torch.cat([second.mid.float(), second.logits.softmax(1)], 1))
        return [stream.mid.float(), stream.logits, *more]

    def _unlabelled_start(self, teacher_out: TeacherOutput, teacher_logits: Tensor, mix: CutMix | None) -> Tensor:
        """Return x_0 (U, C, h, w), label grid, of the images that the student sees, from the weak views' logits."""
        if teacher_out.unlabelled is not None:
            teacher_logits = teacher_out.unlabelled
        x0 = self._soft(teacher_logits, teacher_out.weak.image.shape[-2:])
        mixed_before = teacher_out.unlabelled is not None and self.cfg.mixe.unlabelled_views == "cutmix"
        return x0 if mix is None or mixed_before else apply_cutmix(x0, mix, self.student.label_stride)

    # Training (section 3.4, Eqs. 3-8 and 11)

    def _tau(self, progress: float) -> float:
        cfg = self.cfg.mixe
        return confidence_threshold(progress, cfg.tau_end, cfg.tau_ramp, start=cfg.tau_start, shape=cfg.tau_shape)

    def _training_condition(self, outputs: list[NetworkOutput], keys: list[str], step: Step) -> list[Tensor]:
        """Return the condition of the images of all ``outputs``, its first map with noise."""
        cfg = self.cfg.mixe
        condition = [torch.cat(maps) for maps in zip(*(self._condition(output) for output in outputs), strict=True)]
        if cfg.condition_noise:
            shape, device = tuple(condition[0].shape[1:]), condition[0].device
            noise = keyed_random.normal(keys, shape, step.seed, "mixe-condition", step.index, device=device)
            condition[0] = condition[0] + cfg.condition_noise * noise
        return condition

    def _label_losses(
        self, loss: Tensor, target: Tensor | None, pseudo: Pseudo, valid: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return L_ce and L_edge from the cross-entropy (L + U, H, W) of all images, labelled ones first.

        ``target`` (L, H, W): None if MixE learns from no labelled image.
        """
        ce, edge = [], []
        if target is not None:
            ce.append(ignore_aware_mean(loss[: len(target)], target))
            edge.append(edge_mean(loss[: len(target)], edge_mask(target)))
        if self.cfg.mixe.train_images != "labelled":
            confident = (pseudo.confidence >= self.cfg.pseudo.threshold).float()
            unlabelled_loss = loss[-len(pseudo.labels) :]
            ce.append(weighted_pixel_mean(unlabelled_loss, confident, valid))
            # The padding has labels too, made up by the teacher; they must not draw an edge around the picture.
            edges = edge_mask(pseudo.labels.masked_fill(~valid, IGNORE))
            edge.append(edge_mean(unlabelled_loss, edges & (confident > 0)))
        return torch.stack(ce).sum(), torch.stack(edge).sum()

    def _diffuse(
        self,
        batch: Batch,
        step: Step,
        student_out: NetworkOutput,
        teacher_out: TeacherOutput,
        unlabelled_x0: Tensor,
        pseudo: Pseudo,
        valid: Tensor,
    ) -> dict[str, Tensor]:
        """Return the three terms of Eq. 13: corrupt the teacher's soft labels and predict the clean ones.

        The condition is the student's view of the same image, never the logits that x_0 was made from: those could be
        copied. Targets are the masks, and on unlabelled images the teacher's confident labels before refinement, so
        that the denoiser never learns from its own output. ``unlabelled_x0`` (U, C, h, w), ``pseudo`` and ``valid`` are
        of the mixed images.
        """
        cfg, size = self.cfg.mixe, batch.image.shape[-2:]
        starts, keys, outputs, targets, valid_pixels = [], [], [], [], []
        target = None
        if teacher_out.labelled is not None:
            chosen = self._chosen(batch)
            target = rows_at(batch.target if self.calibration is None else self._supervised(batch), chosen)
            output = student_out.part(chosen)
            if teacher_out.boxes is not None:
                target, output = apply_cutmix(target, teacher_out.boxes), output.mixed(teacher_out.boxes)
            starts.append(self._soft(teacher_out.labelled, size))
            keys += [f"l{key}" for key in keys_at(batch, chosen)]
            outputs.append(output)
            targets.append(target)
            valid_pixels.append(target != IGNORE)
        if cfg.train_images != "labelled":
            starts.append(unlabelled_x0)
            keys += [f"u{key}" for key in batch.keys_u]
            outputs.append(student_out.part(slice(len(batch.image), None)))
            targets.append(pseudo.labels)
            valid_pixels.append(valid)
        condition = self._training_condition(outputs, keys, step)
        image = torch.cat([output.image for output in outputs])
        clean, gaussian, noise_hat, noise = self._denoised(torch.cat(starts), condition, image, keys, step)
        loss = grid_cross_entropy(clean, torch.cat(targets), self.student.label_aligned)
        ce, edge = self._label_losses(loss, target, pseudo, valid)
        counted = cell_means(torch.cat(valid_pixels).float(), self.student.label_stride) > 0.5
        terms = {
            "mixe_ce": ce,
            "mixe_edge": edge if cfg.edge_loss else clean.sum() * 0,
            "mixe_noise": noise_loss(noise_hat, noise, gaussian & counted & cfg.gaussian),
        }
        return terms | {"tau": torch.tensor(self._tau(step.progress)), "gaussian": gaussian.float().mean()}

    def _denoised(
        self, soft: Tensor, condition: list[Tensor], image: Tensor, keys: list[str], step: Step
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return class logits, Gaussian region, predicted and true noise at a random timestep per image (Eqs. 3-8)."""
        cfg, device, (batch, _, h, w) = self.cfg.mixe, soft.device, soft.shape
        codes = class_codes(self.student.num_classes).shape[1]
        if cfg.denoiser != "diffusion":
            no_noise = torch.zeros(batch, codes, h, w, device=device)
            no_pixel = torch.zeros(batch, h, w, dtype=torch.bool, device=device)
            clean, noise_hat = self._without_noise(soft, condition, image)
            return clean, no_pixel, no_noise if noise_hat is None else noise_hat, no_noise
        assert isinstance(self.denoiser, Denoiser)
        name = (step.seed, "mixe-t", step.index)
        times = [int(keyed_random.numpy_generator(*name, key).integers(1, cfg.timesteps + 1)) for key in keys]
        t = send(torch.tensor(times), device)
        noise = keyed_random.normal(keys, (codes, h, w), step.seed, "mixe-noise", step.index, device=device)
        uniform = keyed_random.uniform(keys, (h, w), step.seed, "mixe-flip", step.index, device=device)
        state = corrupt(soft, t, self._tau(step.progress), cfg, noise=noise, uniform=uniform)
        prepared = self.denoiser.prepare(*condition)
        clean, noise_hat = self.denoiser(state.codes, state.gaussian, state.edges, t, prepared)
        return clean, state.gaussian, noise_hat, noise

    def _without_noise(self, soft: Tensor, condition: list[Tensor], image: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return class logits of a control, and the output of the noise head of a plain one."""
        if isinstance(self.denoiser, Guided):
            return self.denoiser(soft, image), None
        assert self.denoiser is not None
        batch, _, h, w = soft.shape
        codes = class_codes(self.student.num_classes).shape[1]
        no_noise = torch.zeros(batch, codes, h, w, device=soft.device)
        no_pixel = torch.zeros(batch, h, w, dtype=torch.bool, device=soft.device)
        start = torch.zeros(batch, device=soft.device).long()
        clean, noise_hat = self.denoiser(no_noise, no_pixel, no_pixel, start, self.denoiser.prepare(*condition))
        return clean, noise_hat

    # Refinement (Eq. 8)

    def _refined(
        self,
        teacher_out: NetworkOutput,
        teacher_logits: Tensor,
        keys: tuple[int, ...],
        step: Step,
        always: bool = False,
    ) -> Tensor | None:
        """Return label-grid logits (U, C, h, w) after the reverse chain; None if MixE does not refine yet."""
        cfg = self.cfg.mixe
        if self.denoiser is None or not cfg.refine or (step.progress < cfg.refine_from and not always):
            return None
        return self.chained(teacher_out, teacher_logits, keys, step)

    def chained(
        self,
        out: NetworkOutput,
        logits: Tensor,
        keys: tuple[int, ...] | tuple[str, ...],
        step: Step,
        source: str | None = None,
    ) -> Tensor:
        """Return label-grid logits (B, C, h, w) of the labels after the reverse chain from the decoder's; no gradient.

        ``source``: the stream that conditions the denoiser, if it is another than in training.
        """
        cfg, condition = self.cfg.mixe, self._condition(out, source)
        soft = self._soft(logits, out.image.shape[-2:])
        if cfg.denoiser != "diffusion":
            return self._without_noise(soft, condition, out.image)[0]
        assert isinstance(self.denoiser, Denoiser)
        h, w = soft.shape[-2:]
        codes, steps = class_codes(self.student.num_classes).shape[1], cfg.refine_steps or cfg.timesteps
        noise = keyed_random.normal(keys, (codes, h, w), step.seed, "refine-noise", step.index, device=logits.device)
        uniforms = keyed_random.uniform(keys, (steps, h, w), step.seed, "refine-flip", step.index, device=logits.device)
        prepared, tau = self.denoiser.prepare(*condition), self._tau(step.progress)
        return refine(self.denoiser, prepared, soft, tau, cfg, noise, uniforms.transpose(0, 1))

    def relabelled(self, before: Tensor, refined: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return (B, C, H, W) scores of training's labels, from the teacher's probabilities and refined logits.

        ``before`` (B, C, H, W), ``refined`` (B, C, h, w) on the grid, ``valid`` (B, H, W) bool, False in padding.
        """
        cfg, after = self.cfg.mixe, self._label_pixels(refined, before.shape[-2:]).softmax(1)
        threshold, stride, where = self.cfg.pseudo.threshold, self.student.label_stride, None
        if cfg.refine_where != "all":
            where = refined_pixels(before, cfg.refine_where, threshold, stride, valid)
        return relabelled(before, after, where, cfg.confidence, self.calibration)

    def _calibrate(self, batch: Batch, step: Step) -> None:
        """Count how often refined labels of left-out images are right, by their confidence."""
        cfg, size = self.cfg.mixe, batch.image.shape[-2:]
        if self.calibration is None or not cfg.refine or step.progress < cfg.refine_from - LEAD:
            return
        left_out = slice(self._period() - 1, None, self._period())
        teacher_out, target = (
            self._see(self.teacher, batch.image[left_out], text_at(batch.text, left_out)),
            batch.target[left_out],
        )
        teacher_logits = self._source_logits(teacher_out.streams)
        keys = tuple(f"l{key}" for key in batch.keys[left_out])
        found = self._label_pixels(self.chained(teacher_out, teacher_logits, keys, step), size)
        confidence, labels = found.softmax(1).max(1)
        before, stride = self.student.upsample(teacher_logits, size).softmax(1), self.student.label_stride
        replaced = refined_pixels(before, cfg.refine_where, self.cfg.pseudo.threshold, stride)
        self.calibration.add(confidence, labels == target, replaced & (target != IGNORE))


class Refined(nn.Module):
    """The evaluated network and then the denoiser: a chain of MixE as the last step of inference (ours).

    Each stream is refined by itself, with one noise for all images, and takes refined labels where training does.
    """

    def __init__(self, method: MixeTeacher, network: Segmenter) -> None:
        super().__init__()
        self.network, self.denoiser = network, method.denoiser
        self._method = (method,)  # not a part of this module: its networks are evaluated beside it
        self.side_multiple = network.patch  # the denoiser works on whole cells

    def forward(self, images: Tensor, text: TextBatch | None = None) -> dict[str, Tensor]:
        """Map images (B, 3, H, W) to {stream: (B, C, H, W) log-probabilities, up to a constant}."""
        (method,) = self._method
        out, log_probs = method._see(self.network, images, text), {}
        for name, stream in out.streams.items():
            refined = method.chained(out, stream.logits, (0,) * len(images), Step(0, 1.0, 0), name)
            scores = method.relabelled(self.network.upsample(stream.logits, images.shape[-2:]).softmax(1), refined)
            log_probs[name] = scores.clamp_min(1e-30).log()
        return log_probs
