"""Each way that a configuration or its name has been seen to go wrong, as a test."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import re
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from viladiff.config import renamed
from viladiff.config.base import Section, parse
from viladiff.config.sections import ModelConfig, TrainConfig
from viladiff.config.toml_file import read_toml
from viladiff.data.sources import DATASETS
from viladiff.data.sources.digits import CLASS_NAMES, POOL, DigitsData
from viladiff.data.sources.digits import VARIANTS as RENDERED
from viladiff.data.sources.voc import VocData
from viladiff.methods import METHODS
from viladiff.methods.base import MethodConfig
from viladiff.runs import config
from viladiff.runs.config import (
    ConfigError,
    RunConfig,
    fields_help,
    flatten,
    non_default_fields,
    override,
    parse_overrides,
    run_id,
    schema,
)
from viladiff.runs.run_name import PLACES

PLAIN = RunConfig()
VILADIFF = override(PLAIN, {"method.name": "viladiff"})
VARIANTS = [("digits", name) for name in METHODS] + [(name, "supervised") for name in DATASETS if name != "digits"]

COMPANIONS: dict[str, dict[str, object]] = {
    "data.split_family": {"data.split": "662"},
    "eval.split": {"data.holdout": 0.25},
    "model.encoder": {"model.pretrained": "none"},
    "optim.momentum": {"optim.name": "sgd"},
    "optim.nesterov": {"optim.name": "sgd"},
}
"""What makes a second value of a field valid, where none is by itself."""
FORMATTED: dict[str, list[Any]] = {
    "data.mask_suffix": ["_mask.png"],
    "data.value_range": ["12bit"],
    "data.shown": [(2, 1, 3)],
}
"""Second values of texts that have a form."""
COMPANION_START: dict[str, dict[str, object]] = {"data.split_family": {"data.split_family": "aug_u2pl"}}
"""The first value to compare with, where the default is not valid beside the companions."""


def variant(dataset: str, method: str) -> RunConfig:
    return override(PLAIN, {"data.dataset": dataset, "method.name": method})


def other_values(value: Any, kind: Any) -> list[Any]:
    """Values of type ``kind`` other than ``value``; some may be out of the field's range."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return [choice for choice in args if choice != value]
    if origin in (Union, UnionType):
        inner = [found for member in args if member is not NoneType for found in other_values(value, member)]
        return inner if value is None else [*inner, None]
    if origin is tuple:
        value = value or ()
        if not value and ... in args:
            return [(other,) for other in other_values(None, args[0])]
        changes = [
            (*value[:place], other, *value[place + 1 :])
            for place in range(len(value))
            for other in other_values(value[place], args[min(place, len(args) - 1)] if ... not in args else args[0])
        ]
        return [value[:-1], *changes] if ... in args else changes
    if kind is bool:
        return [not value]
    if kind is str:
        return [f"{value or ''}x"]
    number = value or 0
    candidates = [number * 2, number + 1, number / 2, number + 0.05, 5, 0.7, 8, 0.5]
    return [kind(one) for one in candidates if kind(one) != value]


def first_valid(base: RunConfig, path: str, values: list[Any]) -> tuple[RunConfig, RunConfig]:
    """(before, after): two valid configurations that differ in ``path`` alone."""
    tried = []
    for value, extra in itertools.product(values, [{}, *([COMPANIONS[path]] if path in COMPANIONS else [])]):
        try:
            after = override(base, {**extra, path: value})
            return (base if not extra else override(base, {**extra, **COMPANION_START.get(path, {})})), after
        except ConfigError as error:
            tried.append(str(error))
    raise AssertionError(f"no other valid value for {path}: {tried}")


@pytest.mark.parametrize(("dataset", "method"), VARIANTS)
def test_every_hashed_leaf_changes_the_name(dataset: str, method: str) -> None:
    base = variant(dataset, method)
    names = {run_id(base)}
    hashed = 0
    for path, info in schema(dataset, method).items():
        if path in ("data.dataset", "method.name"):
            continue
        if path == "train.epoch_images" and METHODS[method].views.unlabelled:
            with pytest.raises(ConfigError, match=r"train\.epoch_images = 5: not with method\.name"):
                override(base, {path: 5})
            continue
        start = base
        if path == "method.mixe.train_images":  # takes views of both kinds of images away
            start = override(base, {f"method.mixe.{kind}_views": "weak" for kind in ("labelled", "unlabelled")})
        values = FORMATTED.get(path) or other_values(flatten(base)[path], info.annotation)
        before, after = first_valid(start, path, values)
        assert flatten(before)[path] != flatten(after)[path], path
        if path.startswith(PLACES):
            assert run_id(before) == run_id(after), path
        else:
            hashed += 1
            assert run_id(before) != run_id(after), path
            names.add(run_id(after))
    assert len(names) == hashed + 1


def test_names_of_all_variants_differ() -> None:
    every = [run_id(variant(dataset, method)) for dataset in DATASETS for method in METHODS]
    assert len(set(every)) == len(every)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if "pseudo.threshold" in method.embedded])
def test_a_methods_own_defaults_on_embedded_data_yield_to_what_is_set(name: str) -> None:
    section: Any = METHODS[name].Config
    part = section.model_fields["pseudo"].annotation
    published, own = part().threshold, METHODS[name].embedded["pseudo.threshold"]
    assert published != own

    def threshold(cfg: Any) -> float:
        return float(cfg.method.pseudo.threshold)

    silent: list[Any] = [{"name": name}, {"name": name, "pseudo": {}}, {"name": name, "pseudo": part()}, section()]
    for given_ in silent:
        cfg = RunConfig(method=given_)
        assert threshold(cfg) == own and "method.pseudo.threshold" not in config.non_default_fields(cfg)
    for value in (published, own, 0.5):
        pseudo: Any = {"threshold": value}
        set_: list[Any] = [
            {"name": name, "pseudo": pseudo},
            {"name": name, "pseudo": part(**pseudo)},
            section(pseudo=pseudo),
        ]
        for given_ in set_:
            cfg = RunConfig(method=given_)
            assert threshold(cfg) == value
            assert ("method.pseudo.threshold" in config.non_default_fields(cfg)) == (value != own)
    files = RunConfig(data={"dataset": "voc"}, method={"name": name})
    assert threshold(files) == published and RunConfig(**files.model_dump()) == files
    assert threshold(override(files, {"data.dataset": "digits"})) == own
    assert threshold(override(files, {"data.dataset": "dense", "method.pseudo.threshold": "0.5"})) == 0.5


def test_name_is_hex_and_stable_over_order() -> None:
    changes = {"train.steps": 10, "method.name": "viladiff", "method.vila.lam": 0.7}
    reverse = dict(reversed(list(changes.items())))
    assert re.fullmatch(r"[0-9a-f]{16}", run_id(PLAIN))
    assert run_id(override(PLAIN, changes)) == run_id(override(PLAIN, reverse)) != run_id(PLAIN)


def test_name_covers_fingerprints_and_revisions(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {run_id(PLAIN), run_id(PLAIN, {"data": "a"}), run_id(PLAIN, {"data": "b"}), run_id(PLAIN, {"weights": "a"})}
    monkeypatch.setattr(METHODS["supervised"], "revision", METHODS["supervised"].revision + 1)
    names.add(run_id(PLAIN))
    monkeypatch.setattr(config, "CORE_REVISION", config.CORE_REVISION + 1)
    names.add(run_id(PLAIN))
    assert len(names) == 6
    assert run_id(PLAIN, {"a": "1", "b": "2"}) == run_id(PLAIN, {"b": "2", "a": "1"})


def test_a_new_field_with_a_default_keeps_old_names() -> None:
    class Later(RunConfig):
        added: float = 0.5

    assert run_id(Later()) == run_id(PLAIN)
    assert run_id(Later(added=0.6)) != run_id(PLAIN)
    assert run_id(Later(optim={"lr": 0.1})) == run_id(override(PLAIN, {"optim.lr": 0.1}))


def test_equal_floats_have_one_name() -> None:
    texts: list[object] = [1, 1.0, "1", "1.0", "1e0"]
    assert len({run_id(override(PLAIN, {"optim.weight_decay": text})) for text in texts}) == 1
    assert len({run_id(override(PLAIN, {"optim.weight_decay": text})) for text in (0, 0.0, "-0.0")}) == 1


def test_dump_keeps_the_fields_of_the_method() -> None:
    cfg = override(VILADIFF, {"method.vila.lam": 0.9})
    dumped = cfg.model_dump()
    assert dumped["method"]["vila"]["lam"] == 0.9
    assert RunConfig(**dumped) == cfg
    assert RunConfig(**json.loads(cfg.model_dump_json())) == cfg
    assert RunConfig.model_validate_json(cfg.model_dump_json()) == cfg
    assert pickle.loads(pickle.dumps(cfg)) == copy.deepcopy(cfg) == cfg


@pytest.mark.parametrize(("dataset", "method"), [(dataset, method) for dataset in DATASETS for method in METHODS])
def test_changed_fields_are_enough_to_make_it_again(dataset: str, method: str) -> None:
    cfg = variant(dataset, method)
    assert non_default_fields(cfg) == {"data.dataset": dataset, "method.name": method}
    cfg = override(cfg, {"optim.lr": 0.5, "data.batch_labelled": 8, "seed": 3})
    assert override(PLAIN, non_default_fields(cfg)) == cfg
    assert RunConfig(**cfg.model_dump()) == cfg


def test_not_a_number_is_refused() -> None:
    for text in ("nan", "inf", "-inf", float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"optim\.lr = .*: must be a finite number"):
            override(PLAIN, {"optim.lr": text})
    with pytest.raises(ConfigError, match=r"data\.scale\[1\] = nan"):
        override(PLAIN, {"data.scale": "0.5,nan"})


def test_text_is_read_by_the_type_of_the_field() -> None:
    cfg = override(
        PLAIN,
        {
            "method.name": "viladiff",
            "data.split": "183",
            "optim.lr": "1e-4",
            "optim.clip_norm": "none",
            "data.scale": "0.5,2",
            "data.split_seed": "7",
            "eval.boundary": "False",
            "data.captions": "none",
            "method.vila.distillation_paths": "student_logits",
            "method.mixe.loss_weights": "[1, 2, 3]",
            "model.weights": "none",
        },
    )
    method: Any = cfg.method
    assert (cfg.data.split, cfg.optim.lr, cfg.optim.clip_norm, cfg.data.split_seed) == ("183", 1e-4, None, 7)
    assert (cfg.data.scale, cfg.eval.boundary, cfg.data.captions) == ((0.5, 2.0), False, "none")
    assert (method.vila.distillation_paths, method.mixe.loss_weights, cfg.model.weights) == (
        ("student_logits",),
        (1.0, 2.0, 3.0),
        None,
    )
    assert override(PLAIN, {"data.dataset": "folder", "data.split": "1_16"}).data.split == "1_16"
    assert override(PLAIN, {"optim.clip_norm": "1"}).optim.clip_norm == 1.0


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(), st.booleans())
@settings(max_examples=50, deadline=None)
def test_what_is_printed_is_read_back(real: float, whole: int, yes: bool) -> None:
    assert parse(repr(real), float) == real
    assert parse(str(whole), int | None) == whole
    assert parse(str(yes).lower(), bool) is yes
    assert parse(f"{real!r},{whole}", tuple[float, int]) == (real, whole)


FAULTS = [
    ({"seed": "1_000"}, r"seed = '1_000': must be a whole number"),
    ({"seed": "1.5"}, r"seed = '1\.5': must be a whole number"),
    ({"seed": True}, r"seed = True: must be int, not true or false"),
    ({"data.color_jitter": 1}, r"data\.color_jitter = 1: must be true or false"),
    ({"data.color_jitter": "yes"}, r"data\.color_jitter = 'yes': must be true or false"),
    ({"data.split": 183}, r"data\.split = 183: must be text, '183'"),
    ({"data.split": "184"}, r"data\.split = '184': allowed: 92, .*; did you mean '183'\?"),
    ({"data.split": "5000"}, r"data\.split: '5000' asks for more .* pool of 4000 .*; allowed: 92, 183"),
    ({"data.dataset": "didgits"}, r"data\.dataset = 'didgits': allowed: digits, .*; did you mean 'digits'\?"),
    ({"method.name": "viladif"}, r"method\.name = 'viladif': allowed: supervised, .*; did you mean 'viladiff'\?"),
    ({"method.nme": "x"}, r"method\.nme: no such field; did you mean 'method\.name'\? Allowed in method: name"),
    ({"lr": "1"}, r"lr: no such field; did you mean 'optim\.lr'\?"),
    ({"optim.learning_rate": "1"}, r"optim\.learning_rate: no such field; did you mean 'optim\.lr'\? Allowed in optim"),
    ({"batch_size": "4"}, r"batch_size: no such field; did you mean 'data\.batch_labelled'\?"),
    ({"train.max_iters": "4"}, r"train\.max_iters: no such field; did you mean 'train\.steps'\?"),
    (
        {"optim.lrr": "1"},
        r"optim\.lrr: no such field; did you mean 'optim\.lr'\? Allowed in optim: name, lr, encoder_lr_scale",
    ),
    ({"method": "viladiff"}, r"method: a section, not a field; set one of method\.name"),
    ({"method.vila.lam": "1"}, r"method\.vila\.lam: .* it is one of method\.name=viladiff"),
    ({"data.split_family": "hq"}, r"data\.split_family: .* it is one of data\.dataset=voc"),
    ({"data.scale": "0.8"}, r"data\.scale = \(0\.8,\): must be 2 values: float, float"),
    ({"data.scale": [0.8]}, r"data\.scale = \(0\.8,\): must be 2 values: float, float"),
    ({"data.scale": "2,1"}, r"data\.scale = \(2\.0, 1\.0\): must be low, high"),
    ({"optim.betas": "0.9,1"}, r"optim\.betas = \(0\.9, 1\.0\): both must be"),
    ({"optim.lr": "fast"}, r"optim\.lr = 'fast': must be a number"),
    ({"optim.lr": "0"}, r"optim\.lr = 0\.0: must be > 0"),
    ({"train.steps": "none"}, r"train\.steps = None, epochs = None: give exactly one"),
    ({"train.steps": "5", "train.epochs": "5"}, r"train\.steps = 5, epochs = 5\.0: give exactly one"),
    ({"model.pretrained": "timm"}, r"model\.pretrained = 'timm': .*'digits_vit'; allowed: shipped or none"),
    ({"model.encoder": "resnet18"}, r"model\.pretrained = 'shipped': .*'resnet18'; allowed: timm or none"),
    ({"data.dataset": "voc", "data.split": "662"}, r"data\.split = '662' .*; set data\.split_family to aug_cps or"),
    ({"data.dataset": "voc", "data.split_family": "aug_cps"}, r"data\.split = '183' .*; set data\.split_family to hq"),
    ({"data.batch_labelled": "3", "runtime.workers": "2"}, r"data\.batch_labelled = 3: .* = 2 × 1; 4 would do"),
    ({"train.grad_accum_steps": "5"}, r"data\.batch_labelled = 8: .* = 1 × 5; 10 would do"),
    ({"method.name": "viladiff", "method.mixe.timesteps": "0"}, r"method\.mixe\.timesteps = 0: must be ≥ 1"),
    (
        {"method.name": "viladiff", "method.vila.heads": "3"},
        r"method\.vila\.heads = 3: must divide method\.vila\.width",
    ),
    (
        {"method.name": "viladiff", "method.mixe.beta": "0.85"},
        r"beta \+ method\.mixe\.edge_bonus = 0\.95: .* = 0\.9091 .* 11",
    ),
    ({"method.name": "viladiff", "method.mixe.refine_steps": "12"}, r"method\.mixe\.refine_steps = 12"),
    (
        {"method.name": "viladiff", "method.vila.distillation_paths": "x"},
        r"method\.vila\.distillation_paths\[0\] = 'x': allowed: student_features",
    ),
    (
        {"method.name": "viladiff", "method.vila.lamda": "1"},
        r"method\.vila\.lamda: .*did you mean 'method\.vila\.lam'\?",
    ),
    (
        {"method.name": "semibaseline", "data.batch_unlabelled": "4", "runtime.workers": "4"},
        r"data\.batch_unlabelled = 4: .* a multiple of 8, or method\.cut",
    ),
]


@pytest.mark.parametrize(("changes", "message"), FAULTS, ids=[",".join(changes) for changes, _ in FAULTS])
def test_faults_name_field_value_and_remedy(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        override(PLAIN, changes)
    assert "pydantic" not in str(caught.value)


def test_limits_depend_on_classes_workers_and_views() -> None:
    assert override(VILADIFF, {"data.dataset": "coco", "method.mixe.beta": "0.85"}).data.dataset == "coco"
    with pytest.raises(ConfigError, match="19 classes of cityscapes"):
        override(VILADIFF, {"data.dataset": "cityscapes", "method.mixe.beta": "0.855"})
    assert override(PLAIN, {"data.batch_unlabelled": 3, "runtime.workers": 2}).runtime.workers == 2
    without = {"method.name": "semibaseline", "method.cutmix": "false", "runtime.workers": "4"}
    assert override(PLAIN, without).runtime.workers == 4
    with pytest.raises(ConfigError, match=r"data\.batch_unlabelled = 6"):
        override(PLAIN, {"method.name": "semibaseline", "data.batch_unlabelled": 6, "runtime.workers": 2})


def test_several_faults_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        override(PLAIN, {"optim.lr": "0", "data.crop": "4", "train.precision": "fp8"})
    assert len(str(caught.value).splitlines()) == 3


def test_locations_do_not_show_the_tag_of_a_union() -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig(method={"name": "viladiff", "vila": {"lam": -1}}, data={"dataset": "voc", "crop": 1})
    assert sorted(str(caught.value).splitlines()) == [
        "data.crop = 1: must be ≥ 16",
        "method.vila.lam = -1: must be ≥ 0",
    ]


@pytest.mark.parametrize("wrong", [{"nothing": 1}, {"method": 3}, {"train": "long"}, {"data": {"dataset": 3}}])
def test_shapes_that_no_configuration_has(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        RunConfig(**wrong)


def test_a_discriminator_comes_first_and_resets_its_section() -> None:
    tuned = override(VILADIFF, {"method.vila.lam": 0.9, "data.split": "92", "optim.lr": 0.1})
    after = override(tuned, {"method.pseudo.threshold": 0.5, "method.name": "semibaseline"})
    assert non_default_fields(after) == {
        "data.dataset": "digits",
        "data.split": "92",
        "method.name": "semibaseline",
        "method.pseudo.threshold": 0.5,
        "optim.lr": 0.1,
    }
    assert override(tuned, {"method.name": "viladiff"}).method == VILADIFF.method
    other = override(tuned, {"data.batch_labelled": "2", "data.dataset": "dense"})
    assert (other.data.split, other.data.batch_labelled, other.method) == ("463", 2, tuned.method)


def test_defaults_that_follow_the_data_set() -> None:
    voc = override(PLAIN, {"data.dataset": "voc"})
    assert (voc.model.encoder, voc.model.pretrained, voc.train.steps, voc.train.epochs) == (
        "vit_base_patch16_224",
        "timm",
        None,
        60.0,
    )
    assert override(voc, {"data.dataset": "digits"}) == PLAIN
    assert override(PLAIN, {"data.dataset": "cityscapes"}).eval.protocol == "sliding_window"
    assert override(voc, {"model.decoder_width": 64}).model.encoder == "vit_base_patch16_224"
    assert RunConfig(data=VocData(), model=ModelConfig(drop_path=0.1)).model.encoder == "vit_base_patch16_224"
    assert RunConfig(data=VocData(), train=TrainConfig(precision="bf16")).train.epochs == 60.0
    assert RunConfig(data=VocData(), train=TrainConfig(steps=5)).train.precision == "bf16"
    assert RunConfig(data=DigitsData(split="92")) == override(PLAIN, {"data.split": "92"})


@pytest.mark.parametrize("dataset", DATASETS)
def test_precision_follows_the_data_set_and_no_device(dataset: str) -> None:
    plain = override(PLAIN, {"data.dataset": dataset})
    assert plain.train.precision == ("fp32" if dataset in ("digits", "dense") else "bf16") and not plain.train.tf32
    for length in ({"train.steps": "5"}, {"train.epochs": "3"}, {}):
        one = override(plain, length)
        assert one.train.precision == plain.train.precision
        assert run_id(override(one, {"train.precision": plain.train.precision})) == run_id(one)
        other = {"fp32": "bf16", "bf16": "fp32"}[plain.train.precision]
        names = [run_id(override(one, {**how})) for how in ({}, {"train.precision": other}, {"train.tf32": "true"})]
        assert len(set(names)) == 3
        assert run_id(override(one, {"runtime.device": "cpu"})) == names[0]


def test_steps_and_epochs_replace_each_other() -> None:
    epochs = override(PLAIN, {"train.epochs": "2"})
    assert (epochs.train.steps, epochs.train.epochs) == (None, 2.0)
    assert override(epochs, {"train.steps": "1500"}) == PLAIN
    assert override(PLAIN, {"data.dataset": "voc", "train.steps": "5"}).train.epochs is None
    assert RunConfig(train=TrainConfig(epochs=2)) == epochs


def test_an_override_is_validated_as_a_whole_and_leaves_the_old_alone() -> None:
    with pytest.raises(ConfigError):
        override(PLAIN, {"optim.lr": -1.0})
    cfg = override(PLAIN, {"optim.lr": 1.0})
    assert PLAIN.optim.lr == 6e-3 and cfg.optim.lr == 1.0
    with pytest.raises(ValueError, match="frozen"):
        PLAIN.optim.lr = 3.0  # type: ignore[misc]


def test_command_line_words() -> None:
    assert parse_overrides(["a.b=1", "c=x=y", "d="]) == {"a.b": "1", "c": "x=y", "d": ""}
    with pytest.raises(ConfigError, match=r"'seed': write field=value"):
        parse_overrides(["seed"])
    with pytest.raises(ConfigError, match=r"seed: given twice, as '1' and as '2'"):
        parse_overrides(["seed=1", "seed=2"])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_section_with_defaults(name: str) -> None:
    section = METHODS[name].Config(name=name)  # type: ignore[arg-type]
    assert isinstance(section, MethodConfig)
    assert all(issubclass(cls, Section) for cls in type(section).__mro__[:-2] if cls.__module__.startswith("viladiff"))
    assert flatten(override(PLAIN, {"method.name": name}))["method.name"] == name


def test_help_covers_every_field() -> None:
    assert {row.path for row in fields_help()} == set(flatten(PLAIN))
    row = next(row for row in fields_help("method.mixe") if row.path == "method.mixe.timesteps")
    assert (row.kind, row.default) == ("int ≥ 1 ≤ 1000", 10)
    assert fields_help("method.name")[0].kind == " | ".join(METHODS)
    assert "Cityscapes" in next(row.text for row in fields_help("eval") if row.path == "eval.protocol")
    with pytest.raises(ConfigError, match="did you mean 'optim"):
        fields_help("optm.lr")


def test_class_counts_are_those_of_the_renderer() -> None:
    for name, made in RENDERED.items():
        assert DATASETS[name].num_classes == len(CLASS_NAMES)
        assert made.train == POOL


def test_a_former_name_is_refused_and_the_error_gives_the_present_one() -> None:
    fields = {path for name in METHODS for path in schema("digits", name)}
    for old, new in renamed.FIELDS.items():
        assert new in fields and old not in fields, old
        method = next(name for name in METHODS if new in schema("digits", name))
        with pytest.raises(ConfigError, match=rf"^{re.escape(old)}: renamed; write {re.escape(new)}$"):
            override(RunConfig(), {"method.name": method, old: 1})


def test_viladiffs_reading_is_that_of_its_revision() -> None:
    """A run's name holds no defaults: whoever changes a value here raises the method's revision, and trains anew."""
    chosen = {
        "pseudo.threshold": 0.7, "vila.temperature": 1.0, "vila.logit_weight": 0.3,
        "vila.path_weights.teacher_logits": 0.0, "mixe.refine_where": "unsure",
        "mixe.labelled_views": "strong", "mixe.unlabelled_views": "strong",
    }  # fmt: skip
    first = {
        "pseudo.threshold": 0.95, "vila.temperature": 2.0, "vila.logit_weight": 1.0,
        "vila.path_weights.teacher_logits": 1.0, "mixe.refine_where": "all",
        "mixe.labelled_views": "weak", "mixe.unlabelled_views": "weak",
    }  # fmt: skip
    assert METHODS["viladiff"].revision == 2
    for dataset, reading in (("digits", chosen), ("dense", chosen), ("voc", first), ("folder", first)):
        fields = flatten(variant(dataset, "viladiff"))
        assert {path: fields[f"method.{path}"] for path in reading} == reading, dataset


@pytest.mark.parametrize(
    ("field", "value", "meant"),
    [
        ("optim.lr", "0,1", "; write 0.1"),
        ("optim.lr", "1e-3,", "; write 1e-3"),
        ("optim.lr", "1e\N{MINUS SIGN}3", "; write 1e-3"),
        ("optim.lr", "fast", ""),
        ("train.steps", "1e3", " or none; write 1000"),
        ("train.steps", "1,000", " or none; write 1000"),
        ("train.steps", "100.0", " or none; write 100"),
        ("train.steps", "1,5", " or none"),
        ("train.steps", "1.5", " or none"),
        ("seed", "\N{MINUS SIGN}1", "; write -1"),
    ],
)
def test_a_number_in_another_spelling_is_told_in_this_one(field: str, value: str, meant: str) -> None:
    kind = "a number" if field == "optim.lr" else "a whole number"
    with pytest.raises(ValueError, match=rf"^{re.escape(f'{field} = {value!r}: must be {kind}{meant}')}$"):
        override(RunConfig(), {field: value})


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_toml_of_windows_is_read(tmp_path: Path, encoding: str, end: str) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(f'name = "λ"{end}values = [1, 2]{end}'.encode(encoding))
    assert read_toml(path) == {"name": "λ", "values": [1, 2]}
    path.write_bytes('name = "λ"'.encode("utf-16"))
    with pytest.raises(ValueError, match=r"a\.toml: cannot be read .*; save it as UTF-8"):
        read_toml(path)
