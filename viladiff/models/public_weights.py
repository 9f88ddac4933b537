"""Published files of weights in other projects' names: each layout is one function, found by the names in the file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from viladiff.models.decoders.base import Decoder

if TYPE_CHECKING:
    from viladiff.config.sections import ModelConfig

State = dict[str, Tensor]


class Weights(NamedTuple):
    """A file's tensors in the names of this package."""

    encoder: State
    """In the names of timm's network."""
    head: Mapping[str, Tensor] = MappingProxyType({})
    """``decoder.`` and ``classifier.`` of a segmenter; empty where the file has an encoder alone."""
    decoder: str | None = None
    """The ``model.decoder`` that ``head`` belongs to."""


def read_weights(path: Path) -> Weights:
    """Read a safetensors or torch file without running any code that the file may carry.

    Names may begin with ``module.``, as DistributedDataParallel leaves them. A file of no known layout is an encoder's
    in its own names. Raises ValueError in one line for a file that cannot be read or, of a known layout, has unknown
    names.
    """
    if not path.is_file():
        raise ValueError(f"weights file {path} does not exist")
    try:
        found: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:
        hint = "; keep its tensors alone in a safetensors file" if "eights only" in str(error) else ""
        raise ValueError(f"weights file {path} cannot be read: {str(error).splitlines()[0]}{hint}") from error
    state: State = found.get("state_dict", found.get("model", found))
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    for name, layout in LAYOUTS.items():
        try:
            weights = layout(state)
        except ValueError as error:
            raise ValueError(f"weights file {path}: looks like {name}, but {error}") from error
        if weights is not None:
            return weights
    return Weights(state)


def load_head(network: nn.Module, model: ModelConfig) -> None:
    """Load decoder and classifier of a segmenter where ``model.weights`` is a whole network's; else leave them.

    Networks with a decoder of their own take the encoder alone. Raises ValueError in one line for another
    ``model.decoder``, and for names and shapes that do not fit.
    """
    if model.weights is None or not isinstance(getattr(network, "decoder", None), Decoder):
        return
    found = read_weights(Path(model.weights))
    if found.decoder is None:
        return
    if found.decoder != model.decoder:
        raise ValueError(
            f"model.weights = {model.weights!r}: a whole network with the decoder {found.decoder!r}, got model.decoder "
            f"= {model.decoder!r}; set it to {found.decoder}"
        )
    wanted = {
        name: value for name, value in network.state_dict().items() if name.startswith(("decoder.", "classifier."))
    }
    wrong = [f"{name} is missing" for name in wanted if name not in found.head]
    wrong += [f"{name} is unknown" for name in found.head if name not in wanted]
    wrong += [
        f"{name} is {tuple(value.shape)} where the network has {tuple(wanted[name].shape)}"
        for name, value in found.head.items()
        if name in wanted and value.shape != wanted[name].shape
    ]
    if wrong:
        raise ValueError(
            f"model.weights = {model.weights!r}: its head does not fit: {wrong[0]} ({len(wrong)} such); "
            "model.decoder_width and the number of classes must be its own"
        )
    network.load_state_dict(dict(found.head), strict=False)


def unimatch(state: State) -> Weights | None:
    """Convert UniMatch's whole network (0324f3d), ResNet with a deep stem and DeepLabV3+, to ``deeplabv3plus``.

    Names alone change. The backbone's are those of timm's ``resnet50s`` and ``resnet101s``.
    """
    if "head.b4.gap.1.weight" not in state:
        return None
    encoder: State = {}
    head: State = {}
    for name, value in state.items():
        part, _, rest = name.partition(".")
        if part == "backbone":
            encoder[rest] = value
        else:
            head[_deeplab_name(name)] = value
    return Weights(encoder, head, "deeplabv3plus")


def _deeplab_name(name: str) -> str:
    rules = (
        (r"head\.b([0-3])\.([01])\.(\w+)", r"decoder.pyramid.branches.\1.\2.\3"),
        (r"head\.b4\.gap\.1\.(\w+)", r"decoder.pyramid.pooling.0.\1"),
        (r"head\.b4\.gap\.2\.(\w+)", r"decoder.pyramid.pooling.1.\1"),
        (r"head\.project\.([01])\.(\w+)", r"decoder.pyramid.project.\1.\2"),
        (r"reduce\.([01])\.(\w+)", r"decoder.reduce.\1.\2"),
        (r"fuse\.([01])\.(\w+)", r"decoder.fuse.0.\1.\2"),
        (r"fuse\.3\.(\w+)", r"decoder.fuse.1.0.\1"),
        (r"fuse\.4\.(\w+)", r"decoder.fuse.1.1.\1"),
        (r"classifier\.(weight|bias)", r"classifier.score.\1"),
    )
    for pattern, ours in rules:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, ours, name)
    raise ValueError(f"{name} is unknown")


LAYOUTS: dict[str, Callable[[State], Weights | None]] = {"UniMatch": unimatch}
"""Name of a layout to the function that converts it, and returns none for a file that is of another one."""
