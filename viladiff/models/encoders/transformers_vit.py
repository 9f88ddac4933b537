"""Vision transformers from a local directory of transformers: safetensors, and no code of its own."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from viladiff.core.hashing import file_sha256
from viladiff.data.transforms.augment import IMAGENET_MEAN, IMAGENET_STD
from viladiff.models.encoders.base import Encoder
from viladiff.models.encoders.segformer import SegformerEncoder
from viladiff.models.encoders.timm_encoder import FINAL_BLOCKS

_OTHERS = {".h5": "of TensorFlow", ".msgpack": "of JAX", ".bin": "a pickle of torch"}
"""Files of weights that transformers has written beside safetensors, by suffix."""


class DirectoryEncoder(Encoder):
    """Four maps of one size from four evenly spaced blocks, as ``TimmEncoder`` has them of a plain ViT.

    ``norm`` as of ``TimmEncoder``; the final norm is the model's ``layernorm``. Raises ValueError for a directory that
    holds no such model, lacks weights, or would need code of its own.
    """

    any_size = False

    def __init__(self, directory: Path, drop_path: float = 0.0, norm: str = "group") -> None:
        super().__init__()
        self.net, config = read(directory, drop_path)
        final = norm == "final" or (norm == "authors" and re.match("dinov[23]", config.model_type) is not None)
        if final and not isinstance(getattr(self.net, "layernorm", None), nn.Module):
            raise ValueError(f'model.map_norm = "final": {directory}: a {config.model_type!r} has no final "layernorm"')
        self.inputs = int(getattr(config, "num_channels", 3))
        depth, width, cell = config.num_hidden_layers, config.hidden_size, config.patch_size
        self.blocks = [max(1, depth * (i + 1) // 4) for i in range(4)]
        """Of the hidden states, whose first is what the blocks begin with."""
        self.channels, self.strides = (width,) * 4, (cell,) * 4
        self.final = final
        if final:
            self.blocks = [i + 1 for i in FINAL_BLOCKS.get(depth, [n - 1 for n in self.blocks])]
        self.norms = nn.ModuleList([nn.Identity() if final else nn.GroupNorm(1, width) for _ in range(4)])
        self.set_units(*directory_units(directory))
        # Positions are made for one size of image; some models bring them to another only if told to.
        told = "interpolate_pos_encoding" in inspect.signature(self.net.forward).parameters
        self.options: dict[str, Any] = {"interpolate_pos_encoding": True} if told else {}
        try:
            self._freeze_unread(torch.zeros(1, self.inputs, 2 * cell, 3 * cell))
        except (RuntimeError, ValueError, TypeError) as error:
            raise ValueError(f"{directory}: gives no maps of an image: {str(error).splitlines()[0]}") from error

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the maps of x (B, 3, H, W), whose sides must be multiples of the patch."""
        images = self.own_units(x)
        found = self.net(pixel_values=images, output_hidden_states=True, **self.options).hidden_states
        if self.final:
            found = [self.net.layernorm(state) for state in found]
        rows, columns = (side // self.patch for side in x.shape[-2:])
        # Before the places of the picture come a class token and maybe others.
        maps = [found[i][:, -rows * columns :].transpose(1, 2).unflatten(2, (rows, columns)) for i in self.blocks]
        return [norm(one) for norm, one in zip(self.norms, maps, strict=True)]

    def _freeze_unread(self, image: Tensor) -> None:
        """Freeze parameters that no map depends on, as a pooler's: two workers would wait for their gradient."""
        weights = list(self.parameters())
        total = torch.stack([one.float().square().sum() for one in self(image)]).sum()
        for parameter, grad in zip(weights, torch.autograd.grad(total, weights, allow_unused=True), strict=True):
            parameter.requires_grad_(grad is not None)


def from_directory(directory: Path, drop_path: float, norm: str) -> Encoder:
    """Build the encoder of a directory: a SegFormer's four stages, or four blocks of a plain vision transformer."""
    if not is_segformer(directory):
        return DirectoryEncoder(directory, drop_path, norm)
    if norm == "final":
        raise ValueError(f'model.map_norm = "final": {directory}: a segformer is no plain vision transformer')
    encoder = SegformerEncoder(read(directory, drop_path)[0])
    encoder.set_units(*directory_units(directory))
    return encoder


def is_segformer(directory: Path) -> bool:
    """Return whether a directory holds a SegFormer, whatever head it has."""
    return _read_json(directory / "config.json").get("model_type") == "segformer"


def directory_units(directory: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of ``preprocessor_config.json``; ImageNet's if it says none."""
    found = _read_json(directory / "preprocessor_config.json")
    mean, std = found.get("image_mean"), found.get("image_std")
    if mean is None or std is None:
        return IMAGENET_MEAN, IMAGENET_STD
    try:
        return tuple(map(float, mean)), tuple(map(float, std))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{directory / 'preprocessor_config.json'}: image_mean, image_std: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def read(directory: Path, drop_path: float) -> tuple[Any, Any]:
    """Load the model with all of its weights, in float32, and its configuration; of CLIP the image tower."""
    from transformers import AutoConfig, AutoModel

    from viladiff.text.pretrained import first_line, quiet, require_weights

    if not directory.is_dir():
        raise ValueError(f"model.weights = {str(directory)!r}: there is no such directory")
    require_weights(directory)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(directory, **options)
        config = getattr(config, "vision_config", config)
        if config.model_type != "segformer":
            check_vit_config(config)
        if drop_path or config.model_type == "segformer":  # which drops a tenth where nothing is said
            config.drop_path_rate = drop_path
        with quiet():
            model, told = AutoModel.from_pretrained(
                directory, config=config, use_safetensors=True, output_loading_info=True, dtype=torch.float32, **options
            )
    except Exception as error:  # whatever a foreign file makes a library raise
        hint = ""
        if "trust_remote_code" in str(error) or "custom code" in str(error):
            hint = (
                "; code that comes with weights is never run; of RADIO timm has its own, as vit_base_patch16_radio_v3"
            )
        raise ValueError(f"{directory}: transformers cannot load it: {first_line(error)}{hint}") from error
    lacking = sorted(name for name in told["missing_keys"] if "pooler" not in name and "mask_token" not in name)
    if lacking or told["mismatched_keys"]:
        first = f", first {lacking[0]}" if lacking else ""
        raise ValueError(f"{directory}: its weights are of another model: {len(lacking)} are missing{first}")
    return model, config


VISUAL_WORDS = ("beit", "data2vec-vision")
"""Models of images whose configuration counts visual words, which were predicted in pretraining, as a vocabulary."""


def check_vit_config(config: Any) -> None:
    """Raise ValueError if a configuration is not that of one transformer on square patches of an image."""
    needed = ("patch_size", "hidden_size", "num_hidden_layers")
    lacking = [name for name in needed if not isinstance(getattr(config, name, None), int)]
    words = hasattr(config, "vocab_size") and config.model_type not in VISUAL_WORDS
    if lacking or words:
        why = f"no {lacking[0]} that is one number" if lacking else "a vocabulary"
        raise ValueError(f"a {config.model_type!r} is no plain vision transformer: it has {why}")


def directory_checksum(directory: Path) -> str:
    """Return 16 hex digits of the configuration and of all weights. Raises ValueError if there are none."""
    files = [directory / "config.json", *sorted(directory.glob("*.safetensors"))]
    if not files[0].is_file() or len(files) == 1:
        found = {path.suffix: path.name for path in directory.glob("*") if path.suffix in _OTHERS}
        has = [f"{name} is {_OTHERS[suffix]}, which is not read" for suffix, name in sorted(found.items())][:1]
        told = (
            f"; {has[0]}: save the model anew with transformers, as safetensors" if has and files[0].is_file() else ""
        )
        raise ValueError(
            f"model.weights = {str(directory)!r}: must be a directory with config.json and *.safetensors{told}"
        )
    if (directory / "manifest.json").is_file() and (directory / "classes.txt").is_file():
        raise ValueError(
            f"model.weights = {str(directory)!r}: a model folder of viladiff export, not of transformers; name "
            f"{files[1]} and set model.encoder to the encoder of its config.json"
        )
    total = hashlib.sha256()
    for path in files:
        total.update(f"{path.name} {file_sha256(path)}\n".encode())
    return total.hexdigest()[:16]
