"""Export of a run's network to a folder: weights that cannot carry code, their description and origin."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import secrets
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from viladiff.core.atomic import name_file_in_errors, sync_directory
from viladiff.core.messages import format_value
from viladiff.data.transforms.augment import normalise
from viladiff.evaluation.complexity import cost_facts, costs
from viladiff.evaluation.metrics import METRICS
from viladiff.inference.load import load_run, text_dim
from viladiff.inference.predict import CLASSES, CONFIG, FORMAT, WEIGHTS, Model, load_model
from viladiff.models.segmenter import Network
from viladiff.runs.record import RunRecord, strip_local_paths

ONNX = "model.onnx"
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


def export_run(directory: Path | str, out: Path | str, onnx: bool = False) -> dict[str, Any]:
    """Write the model folder of a finished run and return its cost; ``viladiff.load_model`` reads the folder.

    The folder is written atomically. No data set is opened. Raises ValueError if ``out`` exists, there is no finished
    run, or a requested ONNX file cannot be made or does not compute the same.
    """
    out = Path(out).expanduser()
    if out.exists():
        raise ValueError(f"{out}: exists already; name another folder, or remove it first")
    run = load_run(directory)
    if run.cfg.model.encoder == "transformers":
        raise ValueError(
            f"{directory}: with model.encoder = 'transformers' no model folder can say what the network is"
        )
    model = load_model(directory, "cpu")
    if onnx:
        _need_onnx()
    state = model.network.state_dict()
    found = costs(model.network, model.crop, text_dim(state))
    facts: dict[str, Any] = cost_facts(found, model.crop, model.device)
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_name(f".{out.name}-{secrets.token_hex(4)}")
    draft.mkdir()
    try:
        with name_file_in_errors(out):
            record = strip_local_paths(run.record)
            fields = {path: value for path, value in record.config.items() if not path.startswith("runtime.")}
            config = {"format": FORMAT, "text_dim": text_dim(state), "fields": fields}
            config |= {} if model.palette is None else {"palette": model.palette}
            (draft / WEIGHTS).write_bytes(save({name: value.contiguous() for name, value in state.items()}))
            (draft / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
            (draft / CLASSES).write_text("\n".join(model.class_names) + "\n", encoding="utf-8")
            metrics = record.model_dump(mode="json", exclude={"config", "changed", "history", "step_log"})
            (draft / "metrics.json").write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n", encoding="utf-8")
            if onnx:
                facts["ONNX against torch"] = f"logits differ by at most {export_onnx(model, draft / ONNX):.2g}"
            (draft / "README.md").write_text(card(model, record, facts, onnx), encoding="utf-8")
            draft.rename(out)
        sync_directory(out.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return {"model folder": out, **facts}


def _need_onnx() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"ONNX: the package {missing[0]} is not installed; pip install 'viladiff[onnx]'")


def export_onnx(model: Model, path: Path) -> float:
    """Export the text-free path with free batch, height and width (multiples of the patch); return the largest error.

    Input ``image`` as in ``Standalone``, output ``logits``. The file is run by onnxruntime on two other sizes before it
    is accepted. Raises ValueError if it cannot be made, or differs by more than ``TOLERANCE``.
    """
    module, patch = Standalone(model.network).eval(), model.network.patch
    # Sides that differ from each other and from the encoder's own, so that none of them is taken for a constant.
    side = max(2, model.crop // patch)
    example = torch.zeros(2, model.network.encoder.inputs, (side + 1) * patch, (side + 2) * patch)
    free = {
        0: torch.export.Dim("batch", min=1, max=1024),
        2: patch * torch.export.Dim("rows", min=2, max=4096),
        3: patch * torch.export.Dim("columns", min=2, max=4096),
    }
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
            program.save(path, external_data=False)
        except torch.onnx.OnnxExporterError as error:
            raise ValueError(f"{model.network.encoder.__class__.__name__} has no ONNX form: {error}") from error
    sizes = ((1, side * patch, side * patch), (3, 2 * patch, (side + 3) * patch))
    difference = max(onnx_difference(module, path, size, model.network.encoder.inputs) for size in sizes)
    if not difference <= TOLERANCE:
        raise ValueError(
            f"{path.name}: its logits differ from torch's by {difference:.2g}; at most {TOLERANCE} is right"
        )
    return difference


def onnx_difference(module: nn.Module, path: Path, size: tuple[int, int, int], inputs: int = 3) -> float:
    """Return the largest difference of a logit between torch and onnxruntime, on random (batch, height, width)."""
    import onnxruntime

    image = torch.rand(size[0], inputs, *size[1:], generator=torch.Generator().manual_seed(0))
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


def card(model: Model, record: RunRecord, facts: dict[str, str], onnx: bool) -> str:
    """Return README.md of a model folder: use, scores, cost, origin, limits; from the record alone."""
    config, named = record.config, f"{record.config['method.name']} on {record.config['data.dataset']}"
    lines = [
        f"# {named}, run {record.run_id}",
        "",
        f"A semantic segmentation network of {len(model.class_names)} classes, trained with ViLaDiff.",
        "",
        "```python",
        "import viladiff",
        'model = viladiff.load_model("PATH OF THIS FOLDER")',
        'labels, confidence = model.predict("photograph.jpg")',
        "```",
        "",
        "On the command line: `viladiff predict photographs/ --model FOLDER`. It needs no captions and no data set.",
    ]
    if onnx:
        inputs = model.network.encoder.inputs
        sides = f"sides are multiples of {model.network.patch}"
        shape = f"(batch, {inputs}, height, width), {input_words(model)}"
        lines += ["", f"`{ONNX}`: input `image` {shape}; output `logits`; {sides}."]
    if not model.pixels.plain:
        lines += [
            "",
            f"Images: {input_words(model)}. Files are read so; an array has the numbers of such a file.",
        ]
    lines += ["", "## Classes", "", ", ".join(f"{i} {name}" for i, name in enumerate(model.class_names))]
    lines += ["", "## Scores", "", *_scores(model, record)]
    lines += ["", "## Cost of an image", "", *(f"- {name}: {value}" for name, value in facts.items())]
    lines += ["", "## Origin", "", *(f"- {name}: {value}" for name, value in _origin(record).items())]
    lines += ["", "Trained with:", "", "```sh", _command(record), "```"]
    lines += ["", "## Limits", ""]
    lines += [
        f"- Scores are of the validation images of {config['data.dataset']}; other photographs may be another matter.",
        "- Confidence is the network's own probability and was not calibrated.",
        f"- The encoder began as {record.encoder} ({record.pretrained}), whose licence and biases go with it.",
    ]
    return "\n".join(lines) + "\n"


def input_words(model: Model) -> str:
    """Return the kind of images that a network takes, in words: its channels, and which values became 0 and 1."""
    pixels = model.pixels
    if pixels.plain:
        return "RGB in 0..1"
    which = f", bands {', '.join(map(str, pixels.bands))} of the files" if pixels.bands else ""
    values = f" by data.value_range = {pixels.value_range}" if pixels.value_range else ""
    return f"{pixels.inputs} channels{which} in 0..1{values}"


def _scores(model: Model, record: RunRecord) -> list[str]:
    """Format a line for each stream of the exported network; a score that was not measured is a dash."""
    columns = {name: metric.name for name, metric in METRICS.items() if metric.title} | {"images": "images"}
    lines = [f"Network `{record.network}` at the last step, protocol `{record.config['eval.protocol']}`:", ""]
    lines += ["| stream | " + " | ".join(columns.values()) + " |", "| --- " * (len(columns) + 1) + "|"]
    for stream, found in record.scores[record.network].items():
        cells = [found.get(name) for name in columns]
        shown = [
            "-" if cell is None else f"{100 * cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells
        ]
        lines.append(f"| {stream}{' (this folder)' if stream == 'visual' else ''} | " + " | ".join(shown) + " |")
    return lines


def _origin(record: RunRecord) -> dict[str, object]:
    config, git = record.config, record.git
    return {
        "run": f"`{record.run_id}`, finished {record.finished or 'at an unknown time'}",
        "data": f"{config['data.dataset']}, split {config['data.split']}"
        + (f" ({record.split_name})" if record.split_name else "")
        + f", seed {config['seed']}, {record.steps} steps",
        "fingerprints": ", ".join(f"{name} `{value}`" for name, value in record.fingerprints.items()),
        "code": f"`{git['revision']}`" + (", changed since" if git.get("dirty") else "")
        if git
        else "not in a checkout",
        "versions": ", ".join(f"{name} {value}" for name, value in record.versions.items()),
    }


def _command(record: RunRecord) -> str:
    """Return the command that trains the run: its fields that are not at their default."""
    words = [
        f"{path}={format_value(value)}" for path, value in record.changed.items() if not path.startswith("runtime.")
    ]
    return " ".join(["viladiff train", *map(shlex.quote, words)])
