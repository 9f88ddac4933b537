"""The files of a model folder that are read: weights, configuration, preprocessing, classes, and their checksums."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from viladiff.config.base import unflatten
from viladiff.core.atomic import write_atomically
from viladiff.core.hashing import file_sha256, sha256_hex
from viladiff.core.messages import errors_name, names_file, one_line, shown
from viladiff.inference.load import last_line, text_dim
from viladiff.models.segmenter import Network
from viladiff.runs.config import RunConfig
from viladiff.training.step_work import META, empty_method

FORMAT = 1
"""Of a model folder."""
WEIGHTS, CONFIG, PREPROCESSING, CLASSES = "model.safetensors", "config.json", "preprocessor_config.json", "classes.txt"
"""Files of a model folder that are read; the others are for people."""
MOST_TEXT = 1 << 16
"""Channels of a word."""
PRECISIONS = ("fp32", "bf16", "fp16")
MANIFEST = "manifest.json"
"""SHA-256 of each of these."""

Palette = tuple[tuple[int, int, int], ...] | None
_Level = Annotated[int, Field(strict=True, ge=0, le=255)]
_COLOURS = TypeAdapter(list[tuple[_Level, _Level, _Level]])


class ModelFolder(NamedTuple):
    """What a model folder holds."""

    network: Network
    fields: dict[str, Any]
    """The run's configuration by dotted path, without what belongs to a machine."""
    class_names: tuple[str, ...]
    palette: Palette = None
    """The colour of each class, where the training masks are in colours."""
    precision: str = "fp32"
    """In which the run was scored."""

    @property
    def cfg(self) -> RunConfig:
        return RunConfig(**unflatten(self.fields))


def preprocessing(network: Network, cfg: RunConfig) -> dict[str, Any]:
    """Return how an image becomes the network's input, in the terms of Hugging Face's image processors.

    It says what the software does; ``read_folder`` refuses a folder in which it says something else.
    """
    channels, bands, value_range, _ = cfg.data.pixels
    values: dict[str, Any] = {"channels": channels, "bands": bands and list(bands), "value_range": value_range}
    return {
        "do_resize": False,
        **({"do_rescale": True, "rescale_factor": 1 / 255} if cfg.data.pixels.plain else values),
        "do_normalize": True,
        "image_mean": list(network.encoder.mean),
        "image_std": list(network.encoder.std),
        "size_divisor": network.side_multiple,
        "crop_size": cfg.data.crop,
        "protocol": cfg.eval.protocol,
    }


def write_folder(into: Path, contents: ModelFolder) -> None:
    """Write the files that are read into a directory; the configuration comes last, and without it nothing is read.

    Raises ValueError for a network that no such files can describe.
    """
    network, fields, names, palette, precision = contents
    if fields["model.encoder"] == "transformers":
        raise ValueError("with model.encoder = 'transformers' no model folder can say what the network is")
    state = network.state_dict()
    config = {"format": FORMAT, "text_dim": text_dim(state), "fields": fields}
    config |= {} if palette is None else {"palette": palette}
    config |= {} if precision == "fp32" else {"scored_in": precision}
    (into / CONFIG).unlink(missing_ok=True)
    files = {
        WEIGHTS: save({name: value.contiguous() for name, value in state.items()}),
        CLASSES: ("\n".join(names) + "\n").encode(),
        PREPROCESSING: as_json(preprocessing(network, contents.cfg)),
        CONFIG: as_json(config),
    }
    sums = {name: sha256_hex(content) for name, content in files.items()}
    for name, content in {MANIFEST: as_json({"sha256": sums}), **files}.items():
        write_atomically(into / name, content)


def as_json(value: object) -> bytes:
    """Return indented JSON; ValueError for numbers that are none."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


@names_file
def read_folder(folder: Path) -> ModelFolder:
    """Read a model folder; no code is run and nothing is unpickled.

    Raises ValueError that names the file if one is missing, damaged, changed since it was written, or does not fit the
    others. Folders that were written before there was a manifest are read without one.
    """
    facts = _read_config(folder / CONFIG)
    names = tuple(_read_text(folder / CLASSES).removesuffix("\n").split("\n"))
    _check_sums(folder)
    path = folder / WEIGHTS
    try:
        with safe_open(path, "pt"):  # the header alone
            pass
        with errors_name(folder / CONFIG):
            fields, cfg, network = _empty_network(facts, names, path)
        network.load_state_dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({one_line(str(error))})") from error
    except RuntimeError as error:
        raise ValueError(f"{path}: does not fit {CONFIG} and {CLASSES} beside it: {last_line(error)}") from error
    _check_preprocessing(folder / PREPROCESSING, preprocessing(network, cfg))
    precision = facts.get("scored_in", "fp32")
    if precision not in PRECISIONS:
        raise ValueError(f"{folder / CONFIG}: scored_in = {shown(precision)}: allowed: {', '.join(PRECISIONS)}")
    return ModelFolder(network, fields, names, _palette(folder / CONFIG, facts.get("palette"), len(names)), precision)


def _empty_network(
    facts: dict[str, Any], names: tuple[str, ...], weights: Path
) -> tuple[dict[str, Any], RunConfig, Network]:
    """Return fields, configuration and network, before weights are loaded.

    It is built without content first, so that no memory is taken for a network that the file of weights does not hold.
    """
    fields, text_dim = facts.get("fields"), facts.get("text_dim")
    if not isinstance(fields, dict):
        raise ValueError("describes no model that can be built: has no fields")
    if type(text_dim) is not int or not 0 < text_dim <= MOST_TEXT:
        raise ValueError(f"text_dim = {shown(text_dim)}: must be a whole number from 1 to {MOST_TEXT}")
    try:
        cfg = RunConfig(**unflatten(fields))
        with suppress(RuntimeError, NotImplementedError), META:  # some networks look at their own numbers
            plan = empty_method(cfg, names, text_dim).eval_network()
            _check_size(plan, weights)
        return fields, cfg, empty_method(cfg, names, text_dim).eval_network()
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"describes no model that can be built: {one_line(str(error))}") from error


def _check_size(plan: Network, weights: Path) -> None:
    """Raise ValueError for a network of more bytes than the file of its weights has."""
    wanted = sum(value.numel() * value.element_size() for value in plan.state_dict().values())
    there = weights.stat().st_size
    if wanted > there:
        raise ValueError(f"its network has {wanted} bytes of weights, and {weights.name} has {there}")


def _check_sums(folder: Path) -> None:
    """Compare the files with the manifest. Raises ValueError for one that is another."""
    if not (folder / MANIFEST).is_file():
        return
    sums = _read_json(folder / MANIFEST).get("sha256")
    if not isinstance(sums, dict) or {*sums} != {WEIGHTS, CONFIG, PREPROCESSING, CLASSES}:
        raise ValueError(f"{folder / MANIFEST}: not the manifest of a model folder")
    for name, wanted in sums.items():
        try:
            found = file_sha256(folder / name)
        except OSError as error:
            raise ValueError(f"{folder / name}: cannot be read ({error})") from error
        if found != wanted:
            raise ValueError(
                f"{folder / name}: changed since the folder was written: SHA-256 {found[:12]}..., in {MANIFEST} "
                f"{shown(wanted, 14)}...; fetch the folder again, or remove {MANIFEST} if the change is yours"
            )


def _check_preprocessing(path: Path, own: dict[str, Any]) -> None:
    """Raise ValueError where the file says anything that this software does not do."""
    if not path.is_file():
        return
    for name, value in _read_json(path).items():
        if name in own and value != own[name]:
            raise ValueError(f"{path}: {name} = {shown(value)}, but this network is fed with {own[name]!r}")


def _palette(path: Path, found: object, classes: int) -> Palette:
    """Check the colours in a model folder. Raises ValueError for what is no colour of each class."""
    if found is None:
        return None
    try:
        colours = _COLOURS.validate_python(found)
    except ValidationError:
        colours = []
    if len(colours) != classes:
        raise ValueError(f"{path}: palette: must be three levels from 0 to 255 for each of the {classes} classes")
    return tuple(colours)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: missing, so the model folder is not whole; write or fetch it again")
    facts = _read_json(path)
    if facts.get("format") != FORMAT:
        raise ValueError(
            f"{path}: format = {shown(facts.get('format'))}; this version of viladiff reads format {FORMAT}"
        )
    return facts


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file, empty where the file holds something else. Raises ValueError for no JSON."""
    text = _read_text(path)
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    return facts if isinstance(facts, dict) else {}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
