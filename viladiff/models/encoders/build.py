"""Encoders: four feature maps, coarsest last, from timm by name or from the conv-stem ViT of the built-in data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from viladiff.core.hashing import file_sha256
from viladiff.data.transforms.augment import IMAGENET_MEAN, IMAGENET_STD
from viladiff.models.encoders.base import Encoder
from viladiff.models.encoders.digits_vit import DigitsViT
from viladiff.models.encoders.load import load_weights
from viladiff.models.encoders.segformer import MIT, new_mit
from viladiff.models.encoders.timm_encoder import TimmEncoder, _check_known, timm_units
from viladiff.models.encoders.timm_files import cached_weights, missing_weights
from viladiff.models.weight_files import in_place_of, read_file, weights_path

if TYPE_CHECKING:
    from viladiff.config.sections import ModelConfig

SHIPPED = Path(__file__).with_name("digits_vit.safetensors")
"""Weights of ``digits_vit`` that come with the package; ``scripts/pretrain_digits.py`` remakes them."""


def build_encoder(
    name: str,
    pretrained: str,
    weights: str | None = None,
    drop_path: float = 0.0,
    stride: int | None = None,
    norm: str = "group",
    inputs: int = 3,
) -> Encoder:
    """Build an encoder by name.

    pretrained: ``shipped`` (the file in the package, for digits_vit alone), ``timm`` (timm's own weights) or ``none``.
    weights: a local .safetensors or .pth file, which overrides ``pretrained``; for ``transformers`` a directory.
    stride: that of the coarsest map, for convolutional encoders of timm. norm: of a plain transformer's maps, as of
    ``TimmEncoder``; the built-in encoder has its own. inputs: channels of an image; weights for 3 are brought to
    others as timm does (``TimmEncoder``). Raises ValueError for an unknown name, a file that does not fit,
    or a combination that does not exist.
    """
    if stride is not None and name in ("digits_vit", "transformers"):
        raise ValueError(
            f"model.encoder_stride = {stride}: only convolutional encoders of timm can be dilated, got model.encoder = "
            f"{name!r}; set it to none"
        )
    if name == "transformers":
        return _of_directory(weights, drop_path, norm, inputs)
    own, mit = name == "digits_vit", name in MIT
    if not own and pretrained == "shipped" and weights is None:
        raise ValueError(f'model.pretrained = "shipped": only digits_vit is shipped, not "{name}" (use timm or none)')
    if (own or mit) and pretrained == "timm" and weights is None:
        raise ValueError(_no_timm_weights(name))
    if (own or mit) and norm == "final":
        raise ValueError(f'model.map_norm = "final": model.encoder = "{name}" is no plain vision transformer')
    use_timm = pretrained == "timm" and weights is None
    encoder: Encoder
    if own:
        encoder = DigitsViT(drop_path=drop_path, inputs=inputs)
    else:
        encoder = (
            new_mit(name, drop_path, inputs) if mit else TimmEncoder(name, use_timm, drop_path, stride, norm, inputs)
        )
    if weights is not None or pretrained == "shipped":
        path, timm_name = weights_path(weights) if weights else SHIPPED, "" if own or mit else name
        encoder.notes += load_weights(encoder if own else encoder.net, path, timm_name)  # type: ignore[arg-type]
    return encoder


def _of_directory(weights: str | None, drop_path: float, norm: str, inputs: int) -> Encoder:
    from viladiff.models.encoders.transformers_vit import from_directory  # it builds on this module

    if weights is None:
        raise ValueError('model.encoder = "transformers": model.weights must be the directory of the model')
    found = from_directory(weights_path(weights), drop_path, norm)
    if found.inputs != inputs:
        raise ValueError(
            f"data.channels = {inputs}: model.weights = {weights!r} is a model of {found.inputs}; use an encoder "
            "of timm, whose first layer is made for any number"
        )
    return found


def _no_timm_weights(name: str) -> str:
    instead = "shipped or none" if name == "digits_vit" else 'none, or model.encoder = "transformers" with a directory'
    return f'model.pretrained = "timm": timm has no weights for {name} (use {instead})'


def encoder_fingerprint(model: ModelConfig) -> dict[str, str]:
    """Return the encoder's initial state under ``weights``: a file by its checksum, timm's by their tag and source.

    timm's are downloaded when the first run builds its network, after it was named; ``weights_origin`` has their
    checksum. ``input`` is there too if the encoder's images are not normalised as ImageNet's usually are.
    """
    return {**_weights_fingerprint(model), **_input_fingerprint(model)}


def _input_fingerprint(model: ModelConfig) -> dict[str, str]:
    if model.encoder == "digits_vit" or model.encoder in MIT:
        return {}
    if model.encoder == "transformers":
        from viladiff.models.encoders.transformers_vit import directory_units

        mean, std = directory_units(weights_path(model.weights or ""))
    else:
        _check_known(model.encoder)
        mean, std = timm_units(model.encoder)
    own = {"input": f"mean {' '.join(map(str, mean))}, std {' '.join(map(str, std))}"}
    return {} if (mean, std) == (IMAGENET_MEAN, IMAGENET_STD) else own


def _weights_fingerprint(model: ModelConfig) -> dict[str, str]:
    if _from_timm(model):
        if model.encoder in MIT:
            raise ValueError(_no_timm_weights(model.encoder))
        return {"weights": _timm_weights(model.encoder)}
    path = weights_path(model.weights) if model.weights else SHIPPED if model.pretrained == "shipped" else None
    if path is None:
        return {}
    if model.encoder == "transformers":
        from viladiff.models.encoders.transformers_vit import directory_checksum

        return {"weights": directory_checksum(path)}
    return {"weights": file_checksum(path, "model.weights, model.pretrained")}


def weights_origin(model: ModelConfig, inputs: int = 3) -> str:
    """Return the weights' origin for a record: a file's path, ``shipped`` or ``none``, or timm's name and source, the
    licence that timm states, and a checksum.

    For images of other than 3 channels it also says how the first layer was made (``input_note``).
    """
    told = "".join(f"; {note}" for note in input_note(model, inputs))
    if not _from_timm(model):
        return (model.weights or model.pretrained) + told
    import timm

    path, found = cached_weights(model.encoder), timm.get_pretrained_cfg(model.encoder)
    licence = f", licence {found.license}" if found is not None and found.license else ""
    return _timm_weights(model.encoder) + licence + (f", SHA-256 {file_sha256(path)[:16]}" if path else "") + told


def input_note(model: ModelConfig, inputs: int) -> list[str]:
    """Return a sentence if weights for 3 channels are brought to another number."""
    if inputs == 3 or (model.weights is None and model.pretrained == "none") or model.encoder == "transformers":
        return []
    if model.weights is not None and not _has_rgb(weights_path(model.weights)):
        return []  # its first layer takes other channels, and is read as it is or refused
    how = "added up" if inputs == 1 else f"repeated in turn over {inputs} and scaled by 3 / {inputs}"
    return [f"first layer's weights for red, green and blue {how}"]


def _has_rgb(path: Path) -> bool:
    """Return whether a file has a layer for 3 channels; True where it cannot be read, which is refused elsewhere."""
    try:
        state, _ = read_file(path)
    except (ValueError, OSError):
        return True
    return any(value.ndim == 4 and value.shape[1] == 3 for value in state.values())


def own_size(name: str) -> int | None:
    """Return the side in pixels of the images that timm trained a model on; None for other encoders."""
    import timm

    found = timm.get_pretrained_cfg(name) if name.split(".")[0] in timm.list_models(pretrained=False) else None
    return None if found is None else int(found.input_size[-1])


def weights_fault(model: ModelConfig, fetch: bool = False) -> str | None:
    """Return why the encoder's first weights cannot be had from here, with what to set; None if they can.

    timm's must be in the cache of the Hugging Face hub. ``fetch`` downloads them if they are not, and else there is no
    access to a network. Files and directories are checked where runs are named.
    """
    return missing_weights(model.encoder, fetch) if _from_timm(model) else None


def _from_timm(model: ModelConfig) -> bool:
    return model.pretrained == "timm" and model.weights is None and model.encoder != "digits_vit"


def _timm_weights(name: str) -> str:
    """Return ``timm resnet18.a1_in1k (timm/resnet18.a1_in1k)``. Raises ValueError if timm has no such weights."""
    import timm

    _check_known(name)
    try:
        found = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise ValueError(f'model.encoder = "{name}": {error}') from error
    home = None if found is None else found.hf_hub_id or found.url or found.file
    if found is None or not home:
        raise ValueError(f'model.pretrained = "timm": timm has no weights for "{name}" (use none, or model.weights)')
    return f"timm {found.architecture}{'.' * bool(found.tag)}{found.tag or ''} ({home})"


def file_checksum(path: Path, fields: str) -> str:
    """Return 16 digits of the SHA-256 of a file of weights. Raises ValueError that names the fields if missing."""
    if path.is_dir():
        raise ValueError(f"weights file {path} is a directory; {in_place_of(path)}")
    if not path.is_file():
        raise ValueError(f"weights file {path} does not exist ({fields})")
    return file_sha256(path)[:16]
