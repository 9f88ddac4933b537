"""Export of a run's network to a folder: weights that cannot carry code, their description and origin."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from viladiff.core.atomic import draft_of, name_file_in_errors, sync_directory
from viladiff.data.transforms.augment import normalise
from viladiff.inference.card import input_words
from viladiff.inference.predict import Model
from viladiff.inference.pretrained import load_model
from viladiff.models.segmenter import Network

ONNX, PROGRAM = "model.onnx", "model.pt2"
TOLERANCE = 1e-3
"""Largest difference of a logit that the ONNX file may have; what is found is a thousandth of it."""


class Standalone(nn.Module):
    """Images (B, N, H, W) in 0..1, RGB or the run's channels, to logits (B, C, H, W): the text-free path with its
    normalisation."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        return self.network.logits(self.network.encode(normalise(image)), image.shape[-2:])


def export_run(
    directory: Path | str, out: Path | str, onnx: bool = False, torch_export: bool = False
) -> dict[str, Any]:
    """Write the model folder of a finished run and return its cost; ``Segmenter.from_pretrained`` reads the folder.

    The folder is written atomically. No data set is opened. Raises ValueError if ``out`` exists, there is no finished
    run, or a requested file of the network itself cannot be made or does not compute the same.
    """
    out = Path(out).expanduser()
    if out.exists():
        raise ValueError(f"{out}: exists already; name another folder, or remove it first")
    model = load_model(directory, "cpu")
    if model.fields["model.encoder"] == "transformers":
        raise ValueError(
            f"{directory}: with model.encoder = 'transformers' no model folder can say what the network is"
        )
    if onnx:
        _need_onnx()
    facts: dict[str, Any] = model.cost()
    wanted = [(ONNX, "ONNX", export_onnx, onnx), (PROGRAM, "torch.export", export_program, torch_export)]
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = draft_of(out)
    draft.mkdir()
    try:
        with name_file_in_errors(out):
            for name, kind, write, asked in wanted:
                if asked:
                    facts[f"{kind} against torch"] = f"logits differ by at most {write(model, draft / name):.2g}"
            model.write(draft, facts, [name for name, *_, asked in wanted if asked])
            draft.rename(out)
        sync_directory(out.parent)
    except OSError as error:
        if error.filename is not None and draft in Path(error.filename).parents:
            error.filename = str(out)  # the draft is gone by now
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return {"model folder": out, **facts}


def _need_onnx() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"ONNX: the package {missing[0]} is not installed; pip install 'viladiff[onnx]'")


def _free_sizes(model: Model) -> tuple[Tensor, dict[int, Any], list[tuple[int, int, int]]]:
    """Return example images, which of their sizes stay free, and two other (batch, height, width) to compare at."""
    patch = model.network.patch
    # Sides that differ from each other and from the encoder's own, so that none of them is taken for a constant.
    side = max(2, model.crop // patch)
    example = torch.zeros(2, model.network.encoder.inputs, (side + 1) * patch, (side + 2) * patch)
    free = {
        0: torch.export.Dim("batch", min=1, max=1024),
        2: patch * torch.export.Dim("rows", min=2, max=4096),
        3: patch * torch.export.Dim("columns", min=2, max=4096),
    }
    return example, free, [(1, side * patch, side * patch), (3, 2 * patch, (side + 3) * patch)]


def _checked(name: str, found: list[float]) -> float:
    """Return the largest difference. Raises ValueError if it is more than ``TOLERANCE``, or no number."""
    difference = float(np.max(found))
    if not difference <= TOLERANCE:
        raise ValueError(f"{name}: its logits differ from torch's by {difference:.2g}; at most {TOLERANCE} is right")
    return difference


def export_program(model: Model, path: Path) -> float:
    """Export as ``export_onnx``, by ``torch.export``; the file is read again and run before it is accepted.

    ``torch.export.load(path).module(check_guards=False)`` runs where this package is not installed. The guards note
    which of two equal ways the example took, such as positions at their own grid or resampled to it. Raises ValueError
    as ``export_onnx``.
    """
    module, (example, free, sizes) = Standalone(model.network).eval(), _free_sizes(model)
    try:
        with torch.no_grad():
            program = torch.export.export(module, (example,), dynamic_shapes={"image": free})
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # paths of this machine
        torch.export.save(program, path)
        again = torch.export.load(path).module(check_guards=False)
    except Exception as error:  # torch raises many kinds: of its own, of sympy and of pickle
        raise _no_form(model, "torch.export", error, "without --pt2, or with --onnx") from error
    return _checked(path.name, [_difference(module, again, image) for image in _images(sizes, example.shape[1])])


def _no_form(model: Model, form: str, error: BaseException, instead: str) -> ValueError:
    """Return the one line of a network that a form of torch cannot hold: of a chain of errors the first cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    name = getattr(model, "fields", {}).get("model.encoder", type(model.network.encoder).__name__)
    return ValueError(f"model.encoder = {name!r} has no form for {form}: {reason[:200]}; export {instead}")


def _images(sizes: list[tuple[int, int, int]], inputs: int) -> Iterator[Tensor]:
    """Yield random images (batch, inputs, height, width) in 0..1."""
    for batch, height, width in sizes:
        yield torch.rand(batch, inputs, height, width, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _difference(module: nn.Module, other: Callable[[Tensor], Tensor], image: Tensor) -> float:
    return float((module(image) - other(image)).abs().max())


def export_onnx(model: Model, path: Path) -> float:
    """Export the text-free path with free batch, height and width (multiples of the patch); return the largest error.

    Input ``image`` as in ``Standalone``, output ``logits``. The file is run by onnxruntime on two other sizes before it
    is accepted. Raises ValueError if it cannot be made, or differs by more than ``TOLERANCE``.
    """
    module, patch = Standalone(model.network).eval(), model.network.patch
    example, free, sizes = _free_sizes(model)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), _quiet("torch.onnx"):
        try:
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                input_names=["image"],
                output_names=["logits"],
                dynamic_shapes={"image": free},
                verbose=False,
            )
            assert program is not None
            program.model.metadata_props.update(
                {
                    "classes": json.dumps(model.class_names),
                    "patch": str(patch),
                    "input": f"{input_words(model)}, sides multiples of patch",
                }
            )
            for node in program.model.graph.all_nodes():
                node.metadata_props.clear()  # paths of this machine
            program.save(path, external_data=False)
        except torch.onnx.OnnxExporterError as error:
            raise _no_form(model, "ONNX", error, "without --onnx, or with --pt2") from error
    return _checked(path.name, [onnx_difference(module, path, size, model.network.encoder.inputs) for size in sizes])


def onnx_difference(module: nn.Module, path: Path, size: tuple[int, int, int], inputs: int = 3) -> float:
    """Return the largest difference of a logit between torch and onnxruntime, on random (batch, height, width)."""
    import onnxruntime

    (image,) = _images([size], inputs)
    with torch.inference_mode():
        expected = module(image).numpy()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(["logits"], {"image": image.numpy()})[0]
    return float(np.abs(found - expected).max())


@contextlib.contextmanager
def _quiet(name: str):  # type: ignore[no-untyped-def]
    """Silence the exporter's log of its own passes; errors are raised anyway."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
