"""Former names of configuration fields and TOML keys, for error messages. No old name is accepted."""

from __future__ import annotations

# What neighbouring projects call a field, by the last part of its path.
ELSEWHERE: dict[str, str] = {
    "learning_rate": "optim.lr",
    "lr0": "optim.lr",
    "batch_size": "data.batch_labelled",
    "batch": "data.batch_labelled",
    "img_size": "data.crop",
    "image_size": "data.crop",
    "imgsz": "data.crop",
    "crop_size": "data.crop",
    "max_iters": "train.steps",
    "iterations": "train.steps",
    "max_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "backbone": "model.encoder",
}

FIELDS: dict[str, str] = {
    "data.colour": "data.color_jitter",
    "train.accumulate": "train.grad_accum_steps",
    "eval.every": "eval.every_steps",
    "eval.on": "eval.split",
    "eval.images": "eval.max_images",
    "runtime.out": "runtime.runs_dir",
    "runtime.pictures": "runtime.visualizations",
    "method.vila.paths": "method.vila.distillation_paths",
    "method.mixe.mu": "method.mixe.loss_weights",
    "method.mixe.train_on": "method.mixe.train_images",
    "method.mixe.cond_noise": "method.mixe.condition_noise",
    "method.align": "method.distribution_alignment",
    "method.estimate": "method.adaptive_threshold",
    "method.doubt": "method.conflict_weight",
    "method.spatial": "method.train_attention_only",
    "method.guide.weight": "method.guidance.weight",
    "method.guide.threshold": "method.guidance.threshold",
    "method.guide.scale": "method.guidance.scale",
    "method.guide.map_weight": "method.guidance.map_weight",
    "method.guide.map_scale": "method.guidance.map_scale",
    "method.vat.radius": "method.vat.epsilon",
    "method.vat.probe": "method.vat.xi",
    "method.teacher.period": "method.teacher.switch_period",
    "method.tag_weight": "method.tags.weight",
    "method.pseudo.ramp": "method.pseudo.rampup",
    "method.pseudo.consistency": "method.pseudo.consistency_weight",
    "method.weight": "method.unsup_weight",
    "method.drop": "method.drop_percent",
    "method.alpha": "method.entropy_percent",
    "method.bank": "method.queue_size",
    "method.bank_megabytes": "method.queue_megabytes",
    "method.push": "method.max_enqueue",
}
"""Dotted path of a field to its present one."""

KEYS: dict[str, str] = {
    "first": "initial_point",
    "finals": "final_seeds",
    "guess_step": "seconds_per_step",
    "guess_besides": "seconds_overhead",
    "instead": "substitute",
    "needs": "requires",
    "parts": "components",
    "shared": "shared_method_fields",
}
"""Key of a table's or a sweep's TOML file to its present one."""
