"""Positions of a file of weights that were learned on another grid than the network's, resampled as timm does."""

from __future__ import annotations

import math

from torch import Tensor, nn


def fit_positions(name: str, value: Tensor, module: nn.Module) -> Tensor:
    """Return ``value`` of a file in the shape of the parameter or buffer ``name`` of ``module``, if it is a position.

    Absolute positions (1, extra + h * w, D) are resampled bicubically between square grids, tables of relative ones
    (places, heads) between windows, with timm's own functions. Everything else, and what does not fit a grid, comes
    back as it is.
    """
    from timm.layers.pos_embed import resample_abs_pos_embed
    from timm.layers.pos_embed_rel import resize_rel_pos_bias_table

    wanted = module.state_dict()[name]
    if value.shape == wanted.shape or value.ndim != wanted.ndim or value.shape[-1] != wanted.shape[-1]:
        return value
    owner, _, last = name.rpartition(".")
    parent = module.get_submodule(owner)
    if last == "pos_embed" and value.ndim == 3:
        grid = getattr(getattr(parent, "patch_embed", None), "grid_size", None)
        if grid is not None:
            extra = wanted.shape[1] - grid[0] * grid[1]
            if math.isqrt(max(0, value.shape[1] - extra)) ** 2 == value.shape[1] - extra:
                return resample_abs_pos_embed(value, list(grid), num_prefix_tokens=extra)
    window = getattr(parent, "window_size", None)
    if last == "relative_position_bias_table" and window is not None:
        return resize_rel_pos_bias_table(value, new_window_size=tuple(window), new_bias_shape=tuple(wanted.shape))
    return value
