"""The configuration of a run: a frozen tree of sections, ``override``, and the run's name.

Every field is reached by a dotted path (``method.mixe.beta``), on the command line, in a table's spec and in a search
space alike. ``data`` and ``method`` are unions: ``data.dataset`` and ``method.name`` choose the section.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from viladiff.config.base import (
    ConfigError,
    FieldHelp,
    Section,
    coerce,
    describe_fields,
    did_you_mean,
    field_infos,
    format_errors,
    iter_fields,
    parse_overrides,
    unflatten,
    unknown_field,
)
from viladiff.config.sections import (
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    RuntimeConfig,
    TrainConfig,
)
from viladiff.data.sources import DATASETS, embedded_datasets
from viladiff.data.sources.base import DataSource, EmbeddedSource
from viladiff.data.sources.digits import DigitsData
from viladiff.methods import METHODS
from viladiff.methods.base import MethodConfig
from viladiff.methods.supervised import SupervisedConfig
from viladiff.runs.run_name import Content, run_name

__all__ = [
    "ConfigError",
    "RunConfig",
    "fields_help",
    "flatten",
    "non_default_fields",
    "override",
    "parse_overrides",
    "run_id",
]

CORE_REVISION = 4
"""Raised when the loop, the data layer or the evaluator computes something else than before; old records turn stale."""

LENGTH = frozenset({"steps", "epochs"})
"""Fields of which one that is given replaces the other's preset."""
TAGS = {"data": "dataset", "method": "name"}
"""Field that chooses the section, by section."""


if TYPE_CHECKING:
    AnyData = DataConfig
    AnyMethod = MethodConfig
else:  # annotated with the unions themselves: a base class here would drop every field of its subclasses from a dump
    _data = tuple(source.config for source in DATASETS.values())
    AnyData = Annotated[Union[_data], Field(discriminator="dataset")]  # noqa: UP007
    _sections = tuple(method.Config for method in METHODS.values())
    AnyMethod = Annotated[Union[_sections], Field(discriminator="name")]  # noqa: UP007


class RunConfig(Section):
    """Everything that decides what a run computes, and ``runtime``, which does not. Raises ConfigError."""

    seed: int = Field(0, ge=0)
    """Names every random draw of the run."""
    data: AnyData = DigitsData()
    method: AnyMethod = SupervisedConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    def __init__(self, **given: Any) -> None:
        tree, known = _prepare(given)
        try:
            super().__init__(**tree)
        except ValidationError as error:
            raise ConfigError(format_errors(error, known, TAGS)) from None

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        faults = [*_batch_faults(self), *_method_faults(self), *_other_faults(self)]
        if faults:
            raise ValueError("\n".join(faults))
        return self


def override(cfg: RunConfig, changes: Mapping[str, object]) -> RunConfig:
    """Return a new, validated configuration with ``changes`` (dotted path to value, or to text as typed in a shell).

    ``data.dataset`` and ``method.name`` are applied first, in any position, and reset their section to its defaults. Of
    ``train.steps`` and ``train.epochs``, the one that is set replaces the other. Raises ConfigError.
    """
    flat = non_default_fields(cfg)
    for section, tag in TAGS.items():
        if f"{section}.{tag}" in changes:
            flat = {path: value for path, value in flat.items() if not path.startswith(f"{section}.")}
            flat[f"{section}.{tag}"] = changes[f"{section}.{tag}"]
    known = schema(str(flat["data.dataset"]), str(flat["method.name"]))
    wrong = [path for path in changes if path not in known]
    if wrong:
        raise ConfigError("\n".join(_no_such_field(path, known) for path in wrong))
    for one, other in (("train.steps", "train.epochs"), ("train.epochs", "train.steps")):
        if one in changes and other not in changes:
            flat.pop(other, None)
    return RunConfig(**unflatten({**flat, **changes}))


def flatten(cfg: RunConfig) -> dict[str, object]:
    """Return every field by dotted path, in the order of the sections."""
    return dict(iter_fields(cfg))


def non_default_fields(cfg: RunConfig) -> dict[str, object]:
    """Return the fields that differ from the defaults of the chosen data set and method, and those two choices."""
    plain = _plain(type(cfg), cfg.data.dataset, cfg.method.name)
    chosen = {f"{section}.{tag}" for section, tag in TAGS.items()}
    return {path: value for path, value in flatten(cfg).items() if path in chosen or value != plain[path]}


def defaults(dataset: str, method: str) -> Mapping[str, object]:
    """Return every field of a default run on ``dataset`` with ``method``, by dotted path. Raises ConfigError."""
    _known_choice("data.dataset", dataset, DATASETS)
    _known_choice("method.name", method, METHODS)
    return _plain(RunConfig, dataset, method)


def run_id(cfg: RunConfig, fingerprints: Mapping[str, str] | None = None) -> str:
    """Return 16 hex digits that name a run: changed fields outside ``runtime``, revisions, fingerprints of inputs.

    Paths of lists and weights do not matter, since their content is in the fingerprints. A field added later with a
    default leaves old names unchanged; ``1`` and ``1.0`` in a float field are one name.
    """
    revision, train = METHODS[cfg.method.name].revision, cfg.train
    given = dict(fingerprints or {})
    return run_name(
        Content(CORE_REVISION, revision, non_default_fields(cfg), cfg.seed, train.precision, train.tf32, given)
    )


def fields_help(prefix: str = "", cfg: RunConfig | None = None) -> list[FieldHelp]:
    """Return path, type, value and explanation of each field under ``prefix``. Raises ConfigError if there is none.

    A prefix that the configuration's own method or data set lacks is looked up in the others.
    """
    cfg = cfg or RunConfig()
    others = [{"method.name": name} for name in METHODS] + [{"data.dataset": name} for name in DATASETS]
    choices = {"data.dataset": " | ".join(DATASETS), "method.name": " | ".join(METHODS)}
    for one in (cfg, *(override(cfg, change) for change in others)):
        found = [row for row in describe_fields(one) if f"{row.path}.".startswith(f"{prefix}." if prefix else "")]
        if found:
            return [row._replace(kind=choices.get(row.path, row.kind)) for row in found]
    raise ConfigError(unknown_field(prefix, flatten(cfg)))


@cache
def schema(dataset: str, method: str) -> dict[str, FieldInfo]:
    """Return every field of a run on ``dataset`` with ``method``, by dotted path.

    Raises ConfigError for an unknown one.
    """
    _known_choice("data.dataset", dataset, DATASETS)
    _known_choice("method.name", method, METHODS)
    sections = {"data": DATASETS[dataset].config, "method": METHODS[method].Config}
    found: dict[str, FieldInfo] = {}
    for path, info in field_infos(RunConfig).items():
        found |= field_infos(sections[path], f"{path}.") if path in sections else {path: info}
    return found


def method_presets(dataset: str, method: str) -> dict[str, object]:
    """Return the data set's defaults of fields that the method has, by path below ``method``; not those of a method.

    Raises ConfigError for an unknown method; a data set that does not exist has none.
    """
    source = DATASETS.get(dataset)
    if source is None:
        return {}
    known = schema(dataset, method)
    return {path: value for path, value in source.method_presets.items() if f"method.{path}" in known}


@cache
def _plain(kind: type[RunConfig], dataset: str, method: str) -> dict[str, object]:
    return flatten(kind(data={"dataset": dataset}, method={"name": method}))


def _known_choice(path: str, value: str, table: Mapping[str, object]) -> None:
    if value not in table:
        raise ConfigError(f"{path} = {value!r}: allowed: {', '.join(table)}{did_you_mean(value, table)}")


def _no_such_field(path: str, known: Iterable[str]) -> str:
    """Return the error of an unknown field; it names the data set or method that has the field, if any."""
    for dataset in DATASETS:
        if path in schema(dataset, "supervised"):
            return f"{path}: not a field of this data set; it is one of data.dataset={dataset}"
    for method in METHODS:
        if path in schema("digits", method):
            return f"{path}: not a field of this method; it is one of method.name={method}"
    return unknown_field(path, list(known))


def _prepare(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the input with tags, text parsed by type and the data set's presets; and the paths it may have."""
    tree = dict(given)
    chosen = {}
    for section, tag in TAGS.items():
        default = RunConfig.model_fields[section].default
        value = tree.get(section, default)
        if isinstance(value, BaseModel):
            chosen[section] = getattr(value, tag, "")
        elif isinstance(value, Mapping):
            tree[section] = {tag: getattr(default, tag), **value}
            chosen[section] = tree[section][tag]
    known = schema(str(chosen.get("data", "digits")), str(chosen.get("method", "supervised")))
    source = DATASETS.get(str(chosen.get("data")), DataSource(config=DataConfig))
    for section, fields in source.presets.items():
        here = tree.get(section, {})
        here = here.model_dump(exclude_unset=True) if isinstance(here, BaseModel) else here
        if isinstance(here, Mapping):
            length = LENGTH if here.keys() & LENGTH else frozenset()
            tree[section] = {**{name: value for name, value in fields.items() if name not in length}, **here}
    if chosen.get("method") in METHODS:
        sizes = method_presets(str(chosen["data"]), chosen["method"])
        preset = {**sizes, **(METHODS[chosen["method"]].embedded if isinstance(source, EmbeddedSource) else {})}
        if preset:
            tree["method"] = _filled(tree["method"], preset, chosen["method"])
    if isinstance(tree.get("data"), Mapping):
        tree["data"] = coerce(source.config, tree["data"], "data.")
    if isinstance(tree.get("method"), Mapping):
        tree["method"] = coerce(METHODS[chosen["method"]].Config, tree["method"], "method.")
    return coerce(RunConfig, tree, ""), list(known)


def _filled(given: object, preset: Mapping[str, object], name: str) -> object:
    """Fill ``given``, a method's section or the part that is set, with ``preset`` (dotted path to value)."""

    def plain(part: Any) -> Any:
        return part.model_dump(exclude_unset=True) if isinstance(part, BaseModel) else part

    tree = plain(given)
    if not isinstance(tree, Mapping):
        return given

    def fill(below: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
        over = {key: plain(part) if key in below else part for key, part in over.items()}
        both = {key for key in below.keys() & over.keys() if isinstance(below[key], dict)}
        deeper = {key: fill(below[key], over[key]) for key in both if isinstance(over[key], Mapping)}
        return {**below, **over, **deeper}

    return fill(unflatten(preset), {"name": name, **tree})


def _batch_faults(cfg: RunConfig) -> Iterator[str]:
    """Yield errors of batch sizes: a global batch splits evenly by worker and micro-batch;

    CutMix pairs images in a part.
    """
    workers, parts = cfg.runtime.workers, cfg.runtime.workers * cfg.train.grad_accum_steps
    by = f"runtime.workers × train.grad_accum_steps = {workers} × {cfg.train.grad_accum_steps}"
    sizes = {"data.batch_labelled": cfg.data.batch_labelled}
    views = METHODS[cfg.method.name].views
    if views.unlabelled:
        sizes["data.batch_unlabelled"] = cfg.data.batch_unlabelled
    mixes = getattr(cfg.method, "cutmix", views.pairs or views.cutmix)
    for path, size in sizes.items():
        if size % parts:
            yield f"{path} = {size}: must be a multiple of {by}; {-(-size // parts) * parts} would do"
        elif path == "data.batch_unlabelled" and mixes and size // parts % 2:
            otherwise = ", or method.cutmix=false" if hasattr(cfg.method, "cutmix") else ""
            yield (
                f"{path} = {size}: {by} leaves {size // parts} an image part, and CutMix pairs images within a part; "
                f"set {path} to a multiple of {2 * parts}{otherwise}"
            )
    mixe = getattr(cfg.method, "mixe", None)
    if mixe is None or not mixe.enabled or sizes["data.batch_labelled"] % parts:
        return
    share, other = cfg.data.batch_labelled // parts, cfg.data.batch_unlabelled // parts
    if share % mixe.period:
        yield (
            f"method.mixe.holdout = {mixe.holdout:g}: leaves out every {mixe.period}th labelled image, and {by} leaves "
            f"{share} of data.batch_labelled an image part; set it to a multiple of {mixe.period * parts}"
        )
    period = 1 if mixe.confidence == "calibrated" else mixe.period
    if mixe.labelled_views == "cutmix" and min(share // period, other) % 2:
        yield (
            f"method.mixe.labelled_views = 'cutmix': pairs labelled images within a part, and {by} leaves "
            f"{min(share // period, other)} of them; set data.batch_labelled to a multiple of {2 * period * parts}"
        )


def _method_faults(cfg: RunConfig) -> Iterator[str]:
    """Yield violations of limits that tie fields together, in any section of a method."""
    fields = dict(iter_fields(cfg.method, "method."))
    classes = DATASETS[cfg.data.dataset].num_classes
    for path, value in fields.items():
        section = path.rpartition(".")[0]
        if path.endswith(".heads") and fields.get(f"{section}.width", 0) % value:  # type: ignore[operator]
            yield f"{path} = {value}: must divide {section}.width = {fields[f'{section}.width']}"
        if path.endswith(".beta") and f"{section}.edge_bonus" in fields and classes:
            total = value + fields[f"{section}.edge_bonus"]  # type: ignore[operator]
            if total > (classes - 1) / classes:
                limit = (
                    f"(C - 1) / C = {(classes - 1) / classes:.4g} for the C = {classes} classes of {cfg.data.dataset}"
                )
                yield f"{path} + {section}.edge_bonus = {total:g}: must be at most {limit}; lower one of the two"


def _other_faults(cfg: RunConfig) -> Iterator[str]:
    if cfg.train.epoch_images is not None and METHODS[cfg.method.name].views.unlabelled:
        here = f"train.epoch_images = {cfg.train.epoch_images!r}: not with method.name = {cfg.method.name!r}"
        yield f"{here}, whose epoch is a pass over the unlabelled images; set it to none"
    own = cfg.model.encoder == "digits_vit"
    if cfg.model.encoder == "transformers":
        if cfg.model.weights is None:
            yield "model.weights: must be set to the directory of the model for model.encoder = 'transformers'"
    elif cfg.model.weights is None and cfg.model.pretrained == ("timm" if own else "shipped"):
        allowed = "shipped or none" if own else "timm or none"
        here = f"model.pretrained = {cfg.model.pretrained!r}"
        yield f"{here}: there are none for model.encoder = {cfg.model.encoder!r}; allowed: {allowed}"
    clip = getattr(getattr(cfg.method, "clip", None), "weights", None)
    if clip is not None and cfg.data.pixels.inputs != 3:
        here = (
            f"method.clip.weights = {clip!r}: CLIP sees red, green and blue, and images have {cfg.data.pixels.inputs}"
        )
        yield f"{here} channels (data.channels); set it to none, or choose three bands (data.bands)"
    yield from _caption_faults(cfg)
    embedded = embedded_datasets()
    parts = ("dev", "test") if cfg.data.dataset in embedded else ("val",)
    if cfg.eval.split not in (*parts, "holdout"):
        allowed = f"{', '.join(parts)} or holdout"
        yield f"eval.split = {cfg.eval.split!r}: {cfg.data.dataset} has no such part; allowed: {allowed}"
    oracle = getattr(getattr(cfg.method, "pseudo", None), "oracle", "none")
    if oracle != "none" and cfg.data.dataset not in embedded:
        here = f"method.pseudo.oracle = {oracle!r}"
        yield f"{here}: reads masks of unlabelled images, which only {' and '.join(embedded)} give out; set none"
    if cfg.eval.split == "holdout" and not cfg.data.holdout:
        here = "eval.split = 'holdout'"
        yield f"{here}: no images are held out; set data.holdout to a share of the labelled ones, such as 0.25"


def _caption_faults(cfg: RunConfig) -> Iterator[str]:
    """Yield fields that describe captions although there are none."""
    data = cfg.data
    if data.captions == "none" and data.captions_on != "both":
        yield f"data.captions_on = {data.captions_on!r}: not with data.captions = 'none'; set it to both"
    unread = "which runtime.captions takes the place of" if cfg.runtime.captions is not None else ""
    if data.captions in ("none", "generic"):
        unread = f"which data.captions = {data.captions!r} leaves out"
    if unread:
        for field, info in type(data).model_fields.items():
            value, default = getattr(data, field), info.default
            if field.startswith("caption_") and value != default:
                yield f"data.{field} = {value:g}: of simulated captions, {unread}; set it to {default:g}"
