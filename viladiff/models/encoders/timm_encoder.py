"""Encoders from timm, by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from viladiff.config.base import did_you_mean
from viladiff.data.transforms.augment import IMAGENET_MEAN, IMAGENET_STD
from viladiff.models.encoders.base import Encoder
from viladiff.models.encoders.timm_files import cached_weights

INSTEAD = 'use a plain vit_*, swin_*, convnext_*, resnet* or mit_b0 to mit_b5, or model.encoder = "transformers"'
"""Families whose maps fit images of any size."""
FINAL_BLOCKS = {24: (4, 11, 17, 23), 40: (9, 19, 29, 39)}
"""Blocks of DINOv2 by its depth that DINOv2's authors and UniMatch-V2 read; at 12 they are the evenly spaced ones."""

MOST_UNPADDED = 5
"""Cells by which a map may be smaller than its image's size and stride say."""


class TimmEncoder(Encoder):
    """Any timm backbone that offers features: last four levels of a pyramid, or four evenly spaced blocks of a ViT.

    ``stride``: pixels a cell of the coarsest map is wide; a stage beyond it has its stride replaced by a dilation twice
    that of the stage before, from its second block on, as in DeepLab. None is the network's own. ``norm``: "group"
    gives each map of a ViT a GroupNorm of one group, "final" the ViT's own final norm, "authors" the latter to DINOv2
    and DINOv3 alone, whose authors read inner blocks so, and the former to others. ``inputs``: channels of an image; of
    pretrained weights for 3, timm repeats those of the first layer in turn and scales them by 3 / inputs. A network
    that takes images of one size reads others in tiles of that size (``tiled``), one that takes multiples of a number
    (``multiple``) reads them padded, and ``notes`` says so. Raises ValueError for a network whose maps are not four or
    do not fit.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool,
        drop_path: float,
        stride: int | None = None,
        norm: str = "group",
        inputs: int = 3,
    ) -> None:
        super().__init__()
        self.inputs = inputs
        import timm  # a second of import time that the built-in data does not need

        from viladiff.models.encoders.vit_block import join_norms

        _check_known(name)
        options: dict[str, Any] = {"pretrained": pretrained, "features_only": True}
        if inputs != 3:
            options["in_chans"] = inputs
        if pretrained and (file := cached_weights(name)) is not None:
            options["pretrained_cfg_overlay"] = {"file": str(file)}  # else the hub is asked for news, however long
        if drop_path:
            options["drop_path_rate"] = drop_path
        if stride is not None:
            _check_dilates(name, stride)
            options["output_stride"] = stride
        try:
            levels = len(_feature_info(timm.create_model(name, features_only=True)))
        except (RuntimeError, AttributeError, TypeError) as error:
            raise ValueError(f'model.encoder = "{name}": timm offers no feature maps for it ({error})') from error
        plain = levels >= 8  # a ViT reports every block; a pyramid its few stages
        if norm == "final" and not plain:
            raise ValueError(f'model.map_norm = "final": model.encoder = "{name}" is no plain vision transformer')
        final = plain and (norm == "final" or (norm == "authors" and re.search("dinov[23]", name) is not None))
        self.net, told = _fitting(name, levels, options, final)
        join_norms(self.net)
        self.channels = tuple(_feature_info(self.net).channels())
        self.strides = tuple(_feature_info(self.net).reduction())
        self.any_size = not plain and not told
        self.channels_last = getattr(self.net, "output_fmt", "NCHW") == "NHWC"
        # Some transformers have no norm on intermediate features; the decoder expects maps of one scale.
        grouped = plain and not final
        self.norms = nn.ModuleList([nn.GroupNorm(1, c) if grouped else nn.Identity() for c in self.channels])
        self.unpadded = False
        self.multiple, self.tiled = 1, False
        self.set_units(*timm_units(name))
        self._check_maps(name)

    def forward(self, x: Tensor) -> list[Tensor]:
        x, size = self.own_units(x), x.shape[-2:]
        if self.unpadded:  # which leave nothing of a small image
            short = [max(0, 3 * self.patch - side) for side in size]
            x = nn.functional.pad(x, (0, short[1], 0, short[0]), mode="replicate")
        if self.multiple > 1:
            x = nn.functional.pad(x, (0, -x.shape[-1] % self.multiple, 0, -x.shape[-2] % self.multiple))
        maps = self.net(_tiles(x, self.multiple) if self.tiled else x)
        if self.channels_last:
            maps = [level.permute(0, 3, 1, 2).contiguous() for level in maps]
        if self.tiled:
            maps = [_joined(level, *(side // self.multiple for side in x.shape[-2:])) for level in maps]
        if self.unpadded:
            maps = [_bordered(level, x.shape[-2:], s) for level, s in zip(maps, self.strides, strict=True)]
        if self.unpadded or self.multiple > 1:
            maps = [m[..., : -(-size[0] // s), : -(-size[1] // s)] for m, s in zip(maps, self.strides, strict=True)]
        return [norm(level) for norm, level in zip(self.norms, maps, strict=True)]

    @torch.no_grad()
    def _check_maps(self, name: str) -> None:
        """Raise ValueError unless the maps of two unequal sides, another size than the network's own, are as told.

        Maps with a few cells less are those of convolutions without padding, as Inception's; ``forward`` repeats their
        border. Networks that take one size, or even maps alone, read padded images (``_fits_padded``).
        """
        if len(self.channels) != 4:
            raise ValueError(
                f'model.encoder = "{name}": {len(self.channels)} feature levels, four are needed; {INSTEAD}'
            )
        self.eval()
        told = self._map_fault()
        if told is not None and self._fits_padded(name):
            told = None
        if told is not None:
            raise ValueError(f'model.encoder = "{name}": {told}; {INSTEAD}')
        self.train()

    def _map_fault(self) -> str | None:
        """Return why the maps of two unequal sides are not as told; None if they are."""
        for height, width in ((2 * self.patch, 3 * self.patch), (8 * self.patch, 9 * self.patch)):
            try:
                found = [tuple(level.shape) for level in self(torch.zeros(1, self.inputs, height, width))]
            except Exception as error:  # of timm's many networks each has its own
                refused = error
            else:
                break  # the larger size is for networks whose unpadded convolutions leave nothing of the smaller one
        else:
            said = (str(refused).splitlines() or ["other sizes fail a check of its own"])[0]
            return f"takes images of its own size alone ({said})"
        wanted = [(1, c, height // s, width // s) for c, s in zip(self.channels, self.strides, strict=True)]
        missing = [w - f for want, got in zip(wanted, found, strict=True) for w, f in zip(want, got, strict=True)]
        if self.any_size and 0 < max(missing) <= MOST_UNPADDED and min(missing) == 0:
            self.unpadded, found = True, wanted
        return None if found == wanted else f"maps of {found} where {wanted} are needed"

    def _fits_padded(self, name: str) -> bool:
        """Read images at multiples of twice the patch, else in tiles of the network's own size; whether one fits.

        MobileViTv2 rounds its last map up to an even size; MaxViT, GCViT, CoAtNet, Hiera and BEiT have one size.
        """
        import timm

        known = timm.get_pretrained_cfg(name)
        own = 0 if known is None else known.input_size[-1]
        for multiple, tiled in ((2 * self.patch, False), (own, True)):
            if multiple < self.patch or multiple % self.patch:
                continue
            self.multiple, self.tiled = multiple, tiled
            if self._map_fault() is None:
                self.any_size = True
                self.notes = (_padded_note(name, multiple, tiled),)
                return True
        self.multiple, self.tiled = 1, False
        return False


def _padded_note(name: str, multiple: int, tiled: bool) -> str:
    if tiled:
        size = f"{multiple} x {multiple} pixels"
        how = f"takes {size}: other sizes are read in tiles of that size, and attention ends at them"
    else:
        how = f"takes sides that are multiples of {multiple}"
    return f"model.encoder = {name!r} {how}; the border is filled with the mean colour"


def _tiles(x: Tensor, side: int) -> Tensor:
    """Cut (B, C, rows side, columns side) into (B rows columns, C, side, side), row by row."""
    return x.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def _joined(x: Tensor, rows: int, columns: int) -> Tensor:
    """Join (B rows columns, D, h, w), row by row, to (B, D, rows h, columns w)."""
    return x.unflatten(0, (-1, rows, columns)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def _bordered(level: Tensor, size: Sequence[int], stride: int) -> Tensor:
    """Repeat the border cells of a map on both sides up to ceil(size / stride), so that cells stay in their place."""
    rows, columns = (-(-side // stride) - cells for side, cells in zip(size, level.shape[-2:], strict=True))
    return nn.functional.pad(
        level, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2), mode="replicate"
    )


class FinalNormed(nn.Module):
    """Blocks of a plain transformer through its final norm, in the place of timm's wrapper and with its names."""

    def __init__(self, model: Any, out_indices: Sequence[int], **_: Any) -> None:
        super().__init__()
        from timm.models import FeatureInfo

        self.feature_info: Any = FeatureInfo(model.feature_info, tuple(out_indices))
        self.indices = list(model.prune_intermediate_layers(list(out_indices), prune_norm=False))
        self.model = model
        if not isinstance(getattr(model, "norm", None), nn.Module) or isinstance(model.norm, nn.Identity):
            raise TypeError("it has no final norm")

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return maps (B, D, h, w) of x (B, 3, H, W)."""
        found: list[Tensor] = self.model.forward_intermediates(
            x, indices=self.indices, norm=True, output_fmt="NCHW", intermediates_only=True
        )
        return found


def timm_units(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of the images that timm's weights of that name and tag were learned from.

    ImageNet's where timm says nothing. Raises ValueError for a tag that it does not know.
    """
    import timm

    try:
        found = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise ValueError(f'model.encoder = "{name}": {error}') from error
    return (IMAGENET_MEAN, IMAGENET_STD) if found is None else (tuple(found.mean), tuple(found.std))


def _fitting(name: str, levels: int, options: dict[str, Any], final: bool) -> tuple[nn.Module, bool]:
    """Build the network so that it takes images of any size; return also whether it had to be told to.

    Families that are made for one size of image have an option for that, or nothing helps; ``_check_maps`` tries it.
    """
    import timm

    indices = [(levels * (i + 1)) // 4 - 1 for i in range(4)] if levels >= 8 else list(range(levels))[-4:]
    if final:
        indices = list(FINAL_BLOCKS.get(levels, indices))
        options = {**options, "feature_cls": FinalNormed}
    try:
        try:
            return timm.create_model(name, out_indices=indices, dynamic_img_size=True, **options), True
        except TypeError as error:
            if "dynamic_img_size" not in str(error):
                raise
        return timm.create_model(name, out_indices=indices, **options), False
    except (RuntimeError, AttributeError, TypeError) as error:
        raise ValueError(f'model.encoder = "{name}": timm offers no feature maps for it ({error})') from error


def _check_known(name: str) -> None:
    import timm

    known = timm.list_models(pretrained=False)
    if name.split(".")[0] in known:
        return
    bare = name.rpartition("/")[2].removeprefix("tu-")  # a hub's owner, segmentation_models.pytorch's mark of timm
    if bare.split(".")[0] in known:
        hint = f"; did you mean {bare!r}?"
    else:
        alike = [one for one in known if re.split(r"[-_.]", bare)[0] in one.split("_")]
        hint = did_you_mean(bare, known) or (
            f"; its names with that word: {', '.join(sorted(alike, key=len)[:6])}" if alike else ""
        )
    raise ValueError(f'model.encoder = "{name}": timm has no such model{hint or "; timm.list_models() has its names"}')


def _check_dilates(name: str, stride: int) -> None:
    """Raise ValueError for a network of timm whose later stages cannot be dilated to this stride."""
    import timm

    try:
        with torch.device("meta"):
            found = max(_feature_info(timm.create_model(name, features_only=True, output_stride=stride)).reduction())
    except (RuntimeError, AttributeError, TypeError, AssertionError, NotImplementedError):
        found = None
    if found != stride:
        raise ValueError(
            f"model.encoder_stride = {stride}: timm cannot dilate model.encoder = {name!r}; set it to none, or use a "
            "convolutional encoder, as resnet101s"
        )


def _feature_info(net: nn.Module) -> Any:
    """Return timm's description of the feature levels, typed Any since type checkers take it for a module."""
    return net.feature_info
