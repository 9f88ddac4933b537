"""Encoders: four feature maps, coarsest last, from timm by name or from the conv-stem ViT of the embedded data."""

from __future__ import annotations

import difflib
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from viladiff.models.blocks import SelfBlock

if TYPE_CHECKING:
    from viladiff.config.sections import ModelConfig

SHIPPED = Path(__file__).with_name("digits_vit.safetensors")
"""Weights of ``digits_vit`` that come with the package; ``scripts/pretrain_digits.py`` remakes them."""


class Encoder(nn.Module):
    """Contract: ``forward`` maps (B, 3, H, W) to four maps (B, channels[i], H / strides[i], W / strides[i])."""

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    any_size: bool = True
    """Whether it can do with sides that are no multiples of ``patch``; patches cut without overlap cannot."""

    @property
    def patch(self) -> int:
        """Pixels a cell of the coarsest map is wide; image sides must be multiples of it."""
        return self.strides[-1]


class Residual(nn.Module):
    """Two 3 x 3 convolutions around a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(width, width, 1), nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(x + self.body(x))


class DigitsViT(Encoder):
    """A ViT on 8 x 8 patches behind a residual convolutional stem, whose stages serve as the finer maps.

    The stem is deeper than is usual, since attention alone learns shapes slowly from a few thousand small images.
    """

    def __init__(self, dim: int = 128, depth: int = 2, heads: int = 4, drop_path: float = 0.0) -> None:
        super().__init__()
        self.channels, self.strides = (32, 64, dim, dim), (2, 4, 8, 8)
        self.stem = nn.ModuleList(
            [
                _conv(3, 32, 2),
                nn.Sequential(_conv(32, 64, 2), Residual(64)),
                nn.Sequential(_conv(64, dim, 2), Residual(dim)),
            ]
        )
        self.positions = nn.Parameter(torch.zeros(1, dim, 8, 8))
        nn.init.trunc_normal_(self.positions, std=0.02)
        rates = [drop_path * (i + 1) / depth for i in range(depth)]
        self.blocks = nn.Sequential(*[SelfBlock(dim, heads, drop_path=rate) for rate in rates])
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> list[Tensor]:
        fine = self.stem[0](x)
        middle = self.stem[1](fine)
        grid = self.stem[2](middle)
        positions: Tensor = self.positions
        if grid.shape[-2:] != positions.shape[-2:]:
            positions = nn.functional.interpolate(positions, grid.shape[-2:], mode="bicubic", align_corners=False)
        tokens = self.norm(self.blocks((grid + positions).flatten(2).transpose(1, 2)))
        return [fine, middle, grid, tokens.transpose(1, 2).reshape_as(grid)]


def _conv(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.GroupNorm(8, outputs), nn.ReLU())


class TimmEncoder(Encoder):
    """Any timm backbone that offers features: last four levels of a pyramid, or four evenly spaced blocks of a ViT."""

    def __init__(self, name: str, pretrained: bool, drop_path: float) -> None:
        super().__init__()
        import timm  # a second of import time that the embedded data does not need

        _check_known(name)
        options: dict[str, Any] = {"pretrained": pretrained, "features_only": True}
        if drop_path:
            options["drop_path_rate"] = drop_path
        try:
            levels = len(_feature_info(timm.create_model(name, features_only=True)))
            # A ViT reports every block; a pyramid its few stages.
            indices = [(levels * (i + 1)) // 4 - 1 for i in range(4)] if levels >= 8 else list(range(levels))[-4:]
            plain = levels >= 8
            extra: dict[str, Any] = {"dynamic_img_size": True} if plain else {}
            self.net = timm.create_model(name, out_indices=indices, **options, **extra)
        except (RuntimeError, AttributeError, TypeError) as error:
            raise ValueError(f'model.encoder = "{name}": timm offers no feature maps for it ({error})') from error
        self.any_size = not plain
        self.channels = tuple(_feature_info(self.net).channels())
        self.strides = tuple(_feature_info(self.net).reduction())
        if len(self.channels) != 4:
            raise ValueError(f'model.encoder = "{name}": {len(self.channels)} feature levels, four are needed')
        # Some transformers have no norm on intermediate features; the decoder expects maps of one scale.
        self.norms = nn.ModuleList([nn.GroupNorm(1, c) if plain else nn.Identity() for c in self.channels])

    def forward(self, x: Tensor) -> list[Tensor]:
        return [norm(level) for norm, level in zip(self.norms, self.net(x), strict=True)]


def _check_known(name: str) -> None:
    import timm

    known = timm.list_models(pretrained=False)
    if name.split(".")[0] not in known:
        near = ", ".join(difflib.get_close_matches(name, known, n=3)) or "none is near"
        raise ValueError(f'model.encoder = "{name}": timm has no such model (did you mean: {near}?)')


def _feature_info(net: nn.Module) -> Any:
    """timm's description of each feature level; it is no module, which is all that type checkers know of attributes."""
    return net.feature_info


def build_encoder(name: str, pretrained: str, weights: str | None = None, drop_path: float = 0.0) -> Encoder:
    """Makes an encoder by name.

    pretrained: ``shipped`` (the file in the package, for digits_vit alone), ``timm`` (timm's own weights) or ``none``.
    weights: a local .safetensors or .pth file, which goes before ``pretrained``; of ``transformers`` a directory.
    Raises ValueError for an unknown name, a file that does not fit, or a combination that does not exist.
    """
    if name == "transformers":
        from viladiff.models.encoders.transformers_vit import DirectoryEncoder  # it builds on this module

        if weights is None:
            raise ValueError('model.encoder = "transformers": model.weights must be the directory of the model')
        return DirectoryEncoder(Path(weights).expanduser(), drop_path)
    own = name == "digits_vit"
    if not own and pretrained == "shipped" and weights is None:
        raise ValueError(f'model.pretrained = "shipped": only digits_vit is shipped, not "{name}" (use timm or none)')
    if own and pretrained == "timm" and weights is None:
        raise ValueError('model.pretrained = "timm": timm has no weights for digits_vit (use shipped or none)')
    use_timm = pretrained == "timm" and weights is None
    encoder: Encoder = DigitsViT(drop_path=drop_path) if own else TimmEncoder(name, use_timm, drop_path)
    if weights is not None or pretrained == "shipped":
        load_weights(encoder if own else encoder.net, Path(weights) if weights else SHIPPED)  # type: ignore[arg-type]
    return encoder


def encoder_fingerprint(model: ModelConfig) -> dict[str, str]:
    """What the encoder starts from, under ``weights``: a file by its checksum, timm's weights by their tag and home.

    Those are fetched when the first run builds its network, after it was named; ``weights_origin`` has their checksum.
    """
    if _from_timm(model):
        return {"weights": _timm_weights(model.encoder)}
    path = Path(model.weights) if model.weights else SHIPPED if model.pretrained == "shipped" else None
    if path is None:
        return {}
    if model.encoder == "transformers":
        from viladiff.models.encoders.transformers_vit import directory_checksum

        return {"weights": directory_checksum(path.expanduser())}
    return {"weights": file_checksum(path, "model.weights, model.pretrained")}


def weights_origin(model: ModelConfig) -> str:
    """For a record: a file's path, ``shipped`` or ``none``, or timm's weights with the checksum of the file read."""
    if not _from_timm(model):
        return model.weights or model.pretrained
    path = _timm_file(model.encoder)
    return _timm_weights(model.encoder) + (f", SHA-256 {_checksum(path)}" if path else "")


def _from_timm(model: ModelConfig) -> bool:
    return model.pretrained == "timm" and model.weights is None and model.encoder != "digits_vit"


def _timm_weights(name: str) -> str:
    """``timm resnet18.a1_in1k (timm/resnet18.a1_in1k)``; ValueError where timm has no weights for the model."""
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


def _timm_file(name: str) -> Path | None:
    """timm's weights as they lie in the hub's cache; None where they came in another way."""
    import timm
    from huggingface_hub import try_to_load_from_cache

    found = timm.get_pretrained_cfg(name)
    if found is None or not found.hf_hub_id:
        return None
    for file in (found.hf_hub_filename, "model.safetensors", "pytorch_model.bin"):
        path = try_to_load_from_cache(found.hf_hub_id, file) if file else None
        if isinstance(path, str):
            return Path(path)
    return None


def file_checksum(path: Path, fields: str) -> str:
    """16 digits of the SHA-256 of a file of weights. ValueError that names the fields where there is none."""
    if not path.is_file():
        raise ValueError(f"weights file {path} does not exist ({fields})")
    return _checksum(path)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def load_weights(module: nn.Module, path: Path) -> None:
    """Fills ``module`` from a safetensors or torch file without running any code that the file may carry.

    Heads that a backbone here lacks are left out; a parameter that the file lacks is an error, as is another shape.
    """
    if not path.is_file():
        raise ValueError(f"weights file {path} does not exist")
    try:
        found: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"weights file {path} cannot be read: {str(error).splitlines()[0]}") from error
    state: dict[str, Tensor] = found.get("state_dict", found.get("model", found))
    wanted = module.state_dict()
    # timm's feature wrappers put the network under "model."; files of the plain network do not.
    if not set(state) & set(wanted):
        state = {f"model.{name}": value for name, value in state.items()}
    missing = [name for name in wanted if name not in state]
    wrong = [name for name in wanted if name in state and state[name].shape != wanted[name].shape]
    if missing or wrong:
        what = f"lacks {missing[0]}" if missing else f"has {tuple(state[wrong[0]].shape)} for {wrong[0]}"
        raise ValueError(
            f"weights file {path} does not fit: it {what} ({len(missing)} missing, {len(wrong)} of another shape)"
        )
    module.load_state_dict({name: state[name].to(wanted[name].dtype) for name in wanted})
