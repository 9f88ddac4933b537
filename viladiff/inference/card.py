"""The card of a model folder: README.md for people, with a header that model hubs read."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from huggingface_hub import EvalResult, ModelCardData

from viladiff.core.messages import format_value
from viladiff.evaluation.metrics import METRICS
from viladiff.runs.record import RunRecord

if TYPE_CHECKING:
    from viladiff.inference.predict import Model


CARD, METRICS_FILE = "README.md", "metrics.json"
"""Files of a model folder that are for people."""
EXPORTED = {"model.onnx": "ONNX", "model.pt2": "torch.export"}
"""Files that hold the network itself, and of which format they are."""


def metrics(record: RunRecord) -> bytes:
    """Return metrics.json: the record without what stands elsewhere in the folder."""
    kept = record.model_dump(mode="json", exclude={"config", "changed", "history", "step_log"})
    return (json.dumps(kept, indent=1, allow_nan=False) + "\n").encode()


def header(method: str, record: RunRecord | None = None) -> list[str]:
    """Return the lines that model hubs read: library, task, licence, and of a record the score with its data set."""
    found = None if record is None else record.scores.get(record.network, {}).get("visual", {}).get("miou")
    scores = (
        []
        if found is None or record is None
        else [
            EvalResult(
                task_type="image-segmentation",
                dataset_type=str(record.config["data.dataset"]),
                dataset_name=f"{record.config['data.dataset']}, {record.config['eval.split']}",
                metric_type="mean_iou",
                metric_value=found,
            )
        ]
    )
    data = ModelCardData(
        license="unknown",
        library_name="viladiff",
        pipeline_tag="image-segmentation",
        tags=["semantic-segmentation", "semi-supervised", method],
        model_name=None if record is None else f"{method} {record.run_id}",
        eval_results=scores or None,
    )
    return ["---", data.to_yaml(), "---", ""]


def changed_card(model: Model, method: str) -> str:
    """Return README.md where the weights were changed after the run: no score of it holds."""
    lines = [
        *header(method),
        f"# {method}, changed after its run",
        "",
        "The weights were changed after the run that this network comes from, so no score is known.",
        "",
        *_use(()),
        *_classes(model),
    ]
    return "\n".join(lines) + "\n"


def _use(exported: Sequence[str]) -> list[str]:
    return [
        "```python",
        "import viladiff",
        'segmenter = viladiff.Segmenter.from_pretrained("PATH OF THIS FOLDER, OR ITS ID ON A HUB")',
        'labels, confidence = segmenter.predict("photograph.jpg")',
        "```",
        "",
        "On the command line: `viladiff predict photographs/ --model FOLDER`. It needs no captions and no data set.",
        *(line for name in exported if name == "model.pt2" for line in _PT2),
    ]


_PT2 = [
    "",
    "```python",
    "import torch  # viladiff is not needed",
    'network = torch.export.load("model.pt2").module(check_guards=False)  # only of a folder whose origin you trust',
    "logits = network(image)",
    "```",
]


def _classes(model: Model) -> list[str]:
    return ["", "## Classes", "", ", ".join(f"{i} {name}" for i, name in enumerate(model.class_names))]


def card(model: Model, record: RunRecord, facts: dict[str, str], exported: Sequence[str] = ()) -> str:
    """Return README.md of a model folder: use, scores, cost, origin, licence, limits; from the record alone.

    exported: those of ``EXPORTED`` that are in the folder.
    """
    config, named = record.config, f"{record.config['method.name']} on {record.config['data.dataset']}"
    lines = [
        *header(str(config["method.name"]), record),
        f"# {named}, run {record.run_id}",
        "",
        f"A semantic segmentation network of {len(model.class_names)} classes, trained with ViLaDiff.",
        "",
        *_use(exported),
    ]
    for name in exported:
        inputs = model.network.encoder.inputs
        sides = f"sides are multiples of {model.network.patch}"
        shape = f"(batch, {inputs}, height, width), {input_words(model)}"
        lines += ["", f"`{name}` ({EXPORTED[name]}): input `image` {shape}; output `logits`; {sides}."]
    if not model.pixels.plain:
        lines += [
            "",
            f"Images: {input_words(model)}. Files are read so; an array has the numbers of such a file.",
        ]
    lines += _classes(model)
    lines += ["", "## Scores", "", *_scores(model, record)]
    lines += ["", "## Cost of an image", "", *(f"- {name}: {value}" for name, value in facts.items())]
    lines += ["", "## Origin", "", *(f"- {name}: {value}" for name, value in _origin(record).items())]
    lines += ["", "Trained with:", "", "```sh", _command(record), "```"]
    lines += ["", "## Licence", "", *_licence(record), "", "## Limits", ""]
    lines += [
        f"- Scores are of images of {config['data.dataset']} that were not trained on; other photographs may differ.",
        "- Confidence is the network's own probability and was not calibrated.",
        f"- The biases of the encoder's training images and of {config['data.dataset']} go with it.",
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
        "captions": f"in training {record.captions or 'none'}, read by {record.text_encoder}; for a prediction none",
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


def _licence(record: RunRecord) -> list[str]:
    return [
        f"- Encoder: began as {record.encoder} ({record.pretrained}); their licence goes with the network.",
        f"- Training images: {record.config['data.dataset']}; their licence is not known to this software.",
        "- The header says `unknown` until whoever publishes the folder has looked at both and names a licence.",
    ]
