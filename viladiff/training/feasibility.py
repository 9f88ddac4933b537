"""Whether a run can be trained and scored, found before it starts on meta tensors: shapes alone, without content.

One training step and the forward passes of an evaluation run on networks that are built without pretrained weights, so
that nothing is downloaded and no image is read. Memory, the types of autocast and the content of files of weights are
not seen. A method that reads numbers of its tensors cannot run so; then the step is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call

from viladiff.data.batch import TextBatch
from viladiff.evaluation.complexity import TextFree
from viladiff.evaluation.protocols import PROTOCOLS, STREAMS, resized_logits, stream_bands
from viladiff.methods import METHODS
from viladiff.methods.base import Method
from viladiff.models.encoders.base import Encoder
from viladiff.models.encoders.build import own_size, weights_fault
from viladiff.models.encoders.digits_vit import DigitsViT
from viladiff.models.segmenter import Network
from viladiff.runs.config import RunConfig, non_default_fields
from viladiff.runs.job import DataFacts
from viladiff.training.checked import Checked, shares_statistics, usual
from viladiff.training.errors import check_inputs
from viladiff.training.optim import param_groups
from viladiff.training.step_work import LATE, META, empty_batch, empty_picture, empty_text, method_on_meta

_FIRST_LINE = 160


def run_faults(cfg: RunConfig, data: DataFacts, store: Checked | None = None) -> list[str]:
    """Return why a run cannot be trained or scored, a sentence each with what to set; empty if it can.

    Each distinct combination of method, encoder, crop and classes is tried once and its result stored.
    """
    fields, workers = non_default_fields(cfg), cfg.runtime.workers
    if usual(fields, workers, data):
        return []
    store = store or Checked()
    key = store.key(fields, workers, data, shares_statistics(workers, cfg.runtime.device))
    found = store.find(key)
    if found is None:
        found = try_on_meta(cfg, data)
        store.keep(key, found)
    return found


def refuse_infeasible(cfg: RunConfig, data: DataFacts, weights: bool = True) -> None:
    """Raise ValueError, with what to set, for a run that cannot be trained or scored.

    ``weights``: the encoder's first weights are downloaded if they are not here, and refused if that is impossible;
    else no network is used.
    """
    faults = [*run_faults(cfg, data), *filter(None, [weights_fault(cfg.model, True) if weights else None])]
    if faults:
        raise ValueError("\n".join(faults))


def refuse_scoring(cfg: RunConfig, data: DataFacts) -> None:
    """Raise ValueError if the networks of a run that is trained cannot be scored under ``eval.protocol``."""
    if usual(non_default_fields(cfg), 1, data):
        return
    for fault in _protocol(cfg, method_on_meta(cfg, data.classes), data):
        raise ValueError(fault)


def try_on_meta(cfg: RunConfig, data: DataFacts) -> list[str]:
    """Return ``run_faults`` without looking for a stored result; the first problem ends the search."""
    try:
        method = method_on_meta(cfg, data.classes)
        check_inputs(cfg, method, data)
    except ValueError as error:
        return str(error).splitlines()
    for look in (_maps, _training, _scoring):
        for fault in look(cfg, method, data):
            return [fault]
    return []


# Parts


def _maps(cfg: RunConfig, method: Method, data: DataFacts) -> Iterator[str]:
    """Yield the fault of an encoder that cannot take the crop or whose maps do not fit any decoder."""
    encoder, crop = method.student.encoder.eval(), cfg.data.crop  # of one image, which BatchNorm cannot train on
    fault = _map_fault(encoder, crop)
    if fault is not None:
        own = own_size(cfg.model.encoder)
        fits = own is not None and own != crop and _map_fault(encoder, own) is None
        yield (
            f"data.crop = {crop}: model.encoder = {cfg.model.encoder!r} cannot take it ({fault}); "
            f"{f'data.crop={own} fits, or ' if fits else ''}choose {_OTHERS}"
        )


def _map_fault(encoder: Encoder, side: int) -> str | None:
    try:
        found = encoder(empty_picture(side, side, encoder.inputs))
    except Exception as error:
        return None if _untraceable(error) else _said(error)
    sides = [-(-side // stride) for stride in encoder.strides]
    for one, channels, length in zip(found, encoder.channels, sides, strict=True):
        if one.shape != (1, channels, length, length):
            return f"a decoder needs a map of (1, {channels}, {length}, {length}), got {tuple(one.shape)}"
    return None


_OTHERS = "an encoder for images of any size, such as vit_base_patch16_224, resnet101 or convnext_tiny"


def _training(cfg: RunConfig, method: Method, data: DataFacts) -> Iterator[str]:
    """Yield the fault of a step: forward, backward, groups of the optimiser, the method's own update."""
    where = f"method.name = {cfg.method.name!r} with model.encoder = {cfg.model.encoder!r}, data.crop = {cfg.data.crop}"
    method.train()
    weights = {name: weight for name, weight in method.named_parameters() if weight.requires_grad}
    try:
        shared = shares_statistics(cfg.runtime.workers, cfg.runtime.device)
        losses = method(empty_batch(cfg, method.required_views(), data.classes, shared), LATE)
        grads = torch.autograd.grad(losses.total, list(weights.values()), allow_unused=True)
        with torch.no_grad():
            method.after_step(LATE)
        param_groups(method, cfg)
    except Exception as error:
        if str(error).startswith("model."):  # the network's own sentence, with what to set
            yield str(error)
        elif "more than 1 value per channel" in str(error):
            yield f"{where}: {_batch_fault(cfg)}"
        elif not _untraceable(error):
            yield f"{where}: a training step fails ({_said(error)}); choose another encoder or crop"
        return
    idle = [name for name, grad in zip(weights, grads, strict=True) if grad is None]
    if idle and cfg.runtime.workers > 1:
        yield (
            f"runtime.workers = {cfg.runtime.workers}: {where}: no loss reaches {len(idle)} weights ({idle[0]}), for "
            "whose gradient workers would wait; use runtime.workers = 1"
        )


def _batch_fault(cfg: RunConfig) -> str:
    """Return the fault of a BatchNorm that meets one value: a map of one cell of a micro-batch of one image."""
    parts = cfg.runtime.workers * cfg.train.grad_accum_steps
    sizes = {"data.batch_labelled": cfg.data.batch_labelled}
    if METHODS[cfg.method.name].views.unlabelled:
        sizes["data.batch_unlabelled"] = cfg.data.batch_unlabelled
    small = [name for name, size in sizes.items() if size // parts < 2]
    each = f" for runtime.workers x train.grad_accum_steps = {parts} parts" if parts > 1 else ""
    fix = (
        f"{' and '.join(f'{name}={2 * parts}' for name in small)}{each}" if small else f"data.crop={2 * cfg.data.crop}"
    )
    return f"BatchNorm needs two values of each channel, and a map of one cell of one image has one; set {fix}"


def _scoring(cfg: RunConfig, method: Method, data: DataFacts) -> Iterator[str]:
    """Yield the fault of an evaluation: pseudo-labels, then each network under the run's protocol."""
    method.eval()
    inputs = method.student.encoder.inputs
    text = empty_text(1) if method.required_views().text else None
    for size in picture_sizes(cfg.data.crop, data.picture):
        try:
            with torch.no_grad():  # of whole pictures, whatever the protocol is
                resized_logits(
                    lambda x: method.pseudo_labels(x, text, (0,), LATE),
                    empty_picture(*size, inputs),
                    method.student.patch,
                )
        except Exception as error:
            if not _untraceable(error):
                yield (
                    f"model.encoder = {cfg.model.encoder!r}: pseudo-labels are scored on whole pictures, and it cannot "
                    f"take one of {size[0]} x {size[1]} pixels ({_said(error)}); choose {_OTHERS}"
                )
                return
    yield from _protocol(cfg, method, data)


def _protocol(cfg: RunConfig, method: Method, data: DataFacts) -> Iterator[str]:
    """Yield the fault of the run's protocol on a crop and on an odd-sized picture, with a protocol that has none."""
    method.eval()
    text = empty_text(1) if method.required_views().text else None
    for network in {type(one): one for one in method.eval_networks().values()}.values():
        for size in picture_sizes(cfg.data.crop, data.picture):
            faults = (
                (name, protocol_fault(network, size, text, name, cfg.data.crop))
                for name in (cfg.eval.protocol, "sliding_window", "center_crop", "original")
            )
            _, fault = next(faults)
            if fault is not None:
                able = next((name for name, other in faults if other is None), None)
                yield (
                    f"eval.protocol = {cfg.eval.protocol!r}: model.encoder = {cfg.model.encoder!r} cannot score a "
                    f"picture of {size[0]} x {size[1]} pixels ({fault}); "
                    f"{f'eval.protocol={able} fits, or ' if able else ''}choose {_OTHERS}"
                )
                return


def picture_sizes(crop: int, picture: tuple[int, int] | None = None) -> list[tuple[int, int]]:
    """Return the sizes to try: of the pictures if they have one, else a crop's and one that no patch divides."""
    return [picture] if picture is not None else [(crop, crop), (crop + crop // 3 + 5, crop - crop // 5 + 3)]


def protocol_fault(
    network: Network | _Shapes, size: tuple[int, int], text: TextBatch | None, protocol: str, crop: int
) -> str | None:
    """Return why a network on the meta device cannot score a picture of ``size`` under the protocol; None if it can."""
    try:
        with torch.no_grad():
            inputs = network.inputs if isinstance(network, _Shapes) else network.encoder.inputs
            for _ in stream_bands(network, empty_picture(*size, inputs), text, STREAMS, protocol, crop):
                pass
    except Exception as error:
        return None if _untraceable(error) else _said(error)
    return None


def check_prediction(network: Network, crop: int, protocol: str, sizes: Iterable[tuple[int, int]]) -> None:
    """Raise ValueError if a loaded network cannot label pictures of these (height, width); name a protocol that works.

    Its weights are neither read nor copied. ``sizes`` are looked at only if the network cannot take any size.
    """
    if isinstance(network.encoder, DigitsViT) or protocol not in PROTOCOLS:
        return
    plain = _Shapes(network)
    if not any(protocol_fault(plain, size, None, protocol, crop) for size in picture_sizes(crop)):
        return
    for size in dict.fromkeys(sizes):
        fault = protocol_fault(plain, size, None, protocol, crop)
        if fault is not None:
            others = [name for name in ("original", "sliding_window") if name != protocol]
            able = [name for name in others if protocol_fault(plain, size, None, name, crop) is None]
            raise ValueError(
                f"protocol = {protocol!r}: the network cannot label a picture of {size[0]} x {size[1]} pixels "
                f"({fault}); {f'use {able[0]}' if able else f'train with {_OTHERS}'}"
            )


class _Shapes(nn.Module):
    """A network without the content of its weights, which stay where they are."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.side_multiple, self.inputs = network.side_multiple, network.encoder.inputs
        whole = TextFree(network)
        self._whole = (whole,)  # in a tuple, so that it is no part of this module
        self._weights = {name: x.to(META) for name, x in (*whole.named_parameters(), *whole.named_buffers())}

    def forward(self, images: Tensor, text: TextBatch | None = None) -> dict[str, Tensor]:
        return {"visual": functional_call(self._whole[0], self._weights, (images,))}


def _untraceable(error: Exception) -> bool:
    """Return whether a number of a tensor without content was asked for, which is no fault of the run."""
    return "meta" in str(error).lower()


def _said(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:_FIRST_LINE]
