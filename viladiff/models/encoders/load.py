"""Loading of an encoder from a file of weights, in whatever names and on whatever grid of positions it has them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from viladiff.models.encoders.positions import fit_positions
from viladiff.models.public_weights import Weights, read_weights, stripped
from viladiff.models.weight_files import State, unwrapped


class _Fit(NamedTuple):
    """A file's tensors beside a module's."""

    told: str
    state: State
    names: dict[str, str | None]
    """Of the module's tensors in the file."""
    fitted: State
    missing: list[str]
    wrong: list[str]


def load_weights(module: nn.Module, path: Path, timm_name: str = "") -> tuple[str, ...]:
    """Load ``module`` from a safetensors or torch file without running any code that the file may carry.

    Layouts of other projects are converted (``viladiff.models.public_weights``), and then no name may be left over;
    prefixes are removed; names that timm converts for its model ``timm_name`` are converted by timm; positions of
    another grid are resampled. Heads that a backbone here lacks are skipped; a parameter that the file lacks is an
    error, as is another shape. Returns a sentence on what was done to the file, if anything.
    """
    found = read_weights(path)
    tried = list(_tries(module, found, timm_name))
    best = min(tried, key=lambda fit: len(fit.missing) + len(fit.wrong))
    wanted = module.state_dict()
    _check(path, found, best, wanted)
    _check_blocks(path, best, timm_name)
    _check_numbers(path, best, wanted)
    module.load_state_dict({name: best.fitted.get(name, value).to(value.dtype) for name, value in wanted.items()})
    resampled = [
        f"{there} resampled from {tuple(old.shape)} to {tuple(best.fitted[name].shape)}"
        for name, there in best.names.items()
        if there in best.state
        and (old := best.state[there]).shape != best.fitted[name].shape
        and not _inflated(old, wanted[name])
    ]
    more = f" and {len(resampled) - 1} more" if len(resampled) > 1 else ""
    told = ", ".join(filter(None, [best.told, *resampled[:1]]))
    return (f"weights file {path}: read {told}{more}",) if told else ()


def _tries(module: nn.Module, found: Weights, timm_name: str) -> Iterator[_Fit]:
    """Yield the ways to read a file until one fits: as it is, without prefixes, converted by timm."""
    for convert in (False, True) if timm_name else (False,):
        for prefix, state in unwrapped(found.encoder):
            told = [found.told, stripped(prefix)]
            if convert:
                converted = _converted(state, timm_name)
                if converted is None:
                    continue
                state, told = converted, [*told, "with names converted by timm"]
            fit = _beside(module, state, ", ".join(filter(None, told)))
            yield fit
            if not fit.missing and not fit.wrong:
                return


def _beside(module: nn.Module, state: State, told: str) -> _Fit:
    wanted = module.state_dict()
    names = {name: _name_in(state, name) for name in wanted}
    fitted = {name: fit_positions(name, state[there], module) for name, there in names.items() if there is not None}
    fitted = {name: _of_inputs(value, wanted[name]) for name, value in fitted.items()}
    counts = {name for name in wanted if name.endswith(".num_batches_tracked")}  # absent from files before torch 0.4.1
    missing = [name for name in wanted if name not in fitted and name not in counts]
    wrong = [name for name, value in fitted.items() if value.shape != wanted[name].shape]
    return _Fit(told, state, names, fitted, missing, wrong)


def _check(path: Path, found: Weights, fit: _Fit, wanted: State) -> None:
    """Raise ValueError for tensors that are missing, of another shape or, in a known layout, left over."""
    # A plain transformer's final norm is read under model.map_norm = final alone.
    used = {*fit.names.values(), "norm.weight", "norm.bias"}
    if found.decoder is not None and (more := [name for name in fit.state if name not in used]):
        raise ValueError(f"weights file {path} does not fit: it has {more[0]} beyond the encoder ({len(more)} such)")
    if fit.missing or fit.wrong:
        one = (fit.missing or fit.wrong)[0]
        what = f"lacks {one}" if fit.missing else f"has {tuple(fit.fitted[one].shape)} for {one}"
        has, needs = fit.fitted.get(one, wanted[one]).shape, wanted[one].shape
        if (
            not fit.missing
            and len(fit.wrong) == 1
            and len(has) == 4
            and (*has[:1], *has[2:]) == (*needs[:1], *needs[2:])
        ):
            raise ValueError(
                f"weights file {path} {what}: a first layer for {has[1]} channels, and the data have {needs[1]}; set "
                f"data.channels={has[1]} for such data, or bring weights for 3 channels, which serve any number"
            )
        own = f", and begins with {next(iter(fit.state))}" if fit.missing and fit.state else ""
        if fit.missing and (part := re.search(r"\d+-of-(\d+)", path.name)):
            raise ValueError(
                f"weights file {path} {what} ({len(fit.missing)} missing): it is one of {int(part[1])} files of a "
                "model; join their tensors in one file: safetensors.torch.save_file"
            )
        raise ValueError(
            f"weights file {path} does not fit: it {what} ({len(fit.missing)} missing, {len(fit.wrong)} of another "
            f"shape){own}; set model.encoder to the network that it is of"
        )


def _check_numbers(path: Path, fit: _Fit, wanted: State) -> None:
    """Raise ValueError for weights that are whole numbers, as quantised ones are, and for NaN or infinity."""
    for name, value in fit.fitted.items():
        if wanted[name].is_floating_point() and not value.is_floating_point():
            kind = str(value.dtype).removeprefix("torch.")
            raise ValueError(
                f"weights file {path}: {fit.names[name]} is {kind}, not floating point, as of a quantised network; "
                "name the file that it was made of"
            )
        if value.is_floating_point() and not value.isfinite().all():
            count = int((~value.isfinite()).sum())
            raise ValueError(f"weights file {path}: {fit.names[name]} has {count} values that are NaN or infinite")


def _check_blocks(path: Path, fit: _Fit, timm_name: str) -> None:
    """Raise ValueError for a file of a deeper network of the family, whose first blocks alone would be read."""

    def unnumbered(name: str) -> str:
        return re.sub(r"\d+", "#", name)

    used = {name for name in fit.names.values() if name is not None}
    kinds = {unnumbered(name) for name in used if unnumbered(name) != name}
    more = [name for name in fit.state if name not in used and unnumbered(name) in kinds]
    if more and timm_name:
        import timm

        with torch.device("meta"):  # whose last blocks may have no place in feature maps
            whole = timm.create_model(timm_name).state_dict()
        more = [name for name in more if name not in whole]
        if more:
            raise ValueError(
                f"weights file {path} does not fit: it has {more[0]} ({len(more)} such), which {timm_name} has not; "
                "set model.encoder to the network that it is of"
            )


def _converted(state: State, name: str) -> State | None:
    """Return the weights in the names of timm's model, by timm's own conversion of official files; None without one."""
    import timm

    with torch.device("meta"):
        model = timm.create_model(name)
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return None
    try:
        found = convert(dict(state), model)
    except Exception:  # it is made for files of this network alone, and others break it in any way
        return None
    return {key: value for key, value in found.items() if isinstance(value, Tensor)}


def _of_inputs(value: Tensor, wanted: Tensor) -> Tensor:
    """Return the weights of a first layer (D, 3, k, k), brought to (D, N, k, k) as timm does; others unchanged."""
    if not _inflated(value, wanted):
        return value
    from timm.models import adapt_input_conv

    return adapt_input_conv(wanted.shape[1], value.float())  # timm would round to the half precision of a file


def _inflated(value: Tensor, wanted: Tensor) -> bool:
    """Return whether a file's tensor is that of a first layer for 3 channels, and the module's for another number."""
    if value.ndim != 4 or wanted.ndim != 4 or value.shape[1] != 3 or wanted.shape[1] == 3:
        return False
    return len(value) == len(wanted) and value.shape[2:] == wanted.shape[2:]


def _name_in(state: State, name: str) -> str | None:
    """Return a parameter's name in a file of the plain network: wrappers of timm put "model." before it, or make
    ``layers.0`` ``layers_0``.
    """
    plain = name.removeprefix("model.")
    choices = (name, plain, re.sub(r"^([a-z]+)_(\d+)\.", r"\1.\2.", plain))
    return next((choice for choice in choices if choice in state), None)
