"""Makes the corpus, a few small sound files for each reader: ``python tests/fuzz/fuzz_corpus.py``."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import tifffile
import torch
from PIL import Image

from viladiff.config.base import unflatten
from viladiff.runs.archive import export
from viladiff.runs.checkpoint import save_checkpoint
from viladiff.runs.config import RunConfig, flatten, override
from viladiff.runs.record import RunRecord, save_record
from viladiff.runs.run_name import Content, run_name
from viladiff.runs.store import Store
from viladiff.sweeps.space import Dimension
from viladiff.sweeps.trials import Rung, Trial, trial_bytes
from viladiff.training.step_work import empty_method

CORPUS = Path(__file__).resolve().parent / "corpus"
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 8, 3), np.uint8)
TABLE = """\
title = "A table"
seeds = [0, 1]
base = { "data.hflip" = 0.5 }
reference = "plain"
notes = ["one"]
[scale.digits]
datasets = { voc = "digits" }
set = { "data.batch_labelled" = 4, "train.steps" = 8 }
substitute = { "data.split=92" = { "data.split" = "183" } }
threads = 1
[scale.paper]
recipe = "paper"
[[columns]]
label = "1/8"
set = { "data.dataset" = "voc", "data.split" = "92" }
[[rows]]
label = "plain"
set = { "method.name" = "supervised" }
paper = [70.5]
[[rows]]
label = "with"
components = ["vila"]
set = { "method.name" = "viladiff" }
paper = ["-"]
[[rows]]
label = "ours"
control = true
set = { "method.name" = "fixmatch" }
[[claims]]
text = "with is higher"
kind = "higher"
rows = ["with", "plain"]
tolerance = 0.5
[[gaps]]
row = "ours"
low = "plain"
high = "with"
"""
SWEEP = """\
title = "A sweep"
trials = 4
seeds = [0, 1]
final_seeds = [3, 4, 5, 6, 7]
rungs = [0.5, 1.0]
base = { "method.name" = "viladiff", "data.dataset" = "voc" }
space = { "method.vila.lam" = { low = 0.01, high = 1.0, log = true }, "method.vila.depth" = { choices = [1, 2] } }
initial_point = { "method.vila.lam" = 0.1, "method.vila.depth" = 1 }
points = [{ "method.vila.lam" = 0.5 }]
[scale.digits]
datasets = { voc = "digits" }
set = { "train.steps" = 8 }
threads = 1
[[paper]]
label = "figure"
field = "method.vila.lam"
at = [0.1, 1.0]
miou = [70.0, 71.5]
"""
RECIPE = """\
title = "A recipe"
datasets = ["voc", "coco"]
[[entries]]
label = "all"
fields = { "train.steps" = 100, "optim.lr" = 0.001 }
source = "a paper"
[[entries]]
label = "ours"
datasets = ["voc"]
methods = ["fixmatch"]
fields = { "method.ohem.threshold" = 0.9 }
source = "ours"
ours = true
why = "it is"
[[not_expressed]]
text = "something"
source = "a paper"
"""
COCO = {
    "images": [
        {"id": 1, "file_name": "one.jpg", "height": 6, "width": 8},
        {"id": "2", "file_name": "b/two.png", "height": 4.0, "width": 4},
    ],
    "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
    "annotations": [
        {
            "id": 1,
            "image_id": 1,
            "category_id": 3,
            "iscrowd": 0,
            "segmentation": [[1, 1, 5, 1, 5, 4.5, 1, 4]],
            "area": 12,
        },
        {
            "id": 2,
            "image_id": 1,
            "category_id": 7,
            "iscrowd": 1,
            "segmentation": {"size": [6, 8], "counts": [4, 8, 36]},
        },
        {"id": 3, "image_id": 2, "category_id": 7, "segmentation": {"size": [4, 4], "counts": "088"}},
    ],
}


def record(**other: object) -> RunRecord:
    changed = {
        "data.dataset": "digits",
        "method.name": "supervised",
        "train.steps": 8,
        "runtime.runs_dir": "/somewhere",
    }
    config = {"seed": 0, "train.precision": "fp32", "train.tf32": False, "model.weights": None, **changed}
    score = {"miou": 0.5, "boundary_iou": None, "per_class": [0.25, None, 0.75], "images": 5}
    shares = {
        "fields": {"method.lam": ["loss.*"]},
        "measured": [
            {"step": 2, "norms": {"encoder": {"sup": 1.0, "loss.a": 0.5}}, "cosines": {"encoder": {"loss.a": None}}}
        ],
    }
    fields = {
        "run_id": run_name(Content(0, 0, changed, 0, "fp32", False, {"data": "abc"})),
        "config": config,
        "changed": changed,
        "fingerprints": {"data": "abc"},
        "core_revision": 0,
        "method_revision": 0,
        "steps": 8,
        "miou": 0.5,
        "network": "student",
        "stream": "visual",
        "scores": {"student": {"visual": score}},
        "best": {"step": 4, "miou": 0.5, "evaluations": 2},
        "history": [{"step": 4, "miou": 0.25}, {"step": 8, "miou": 0.5}],
        "pseudo_labels": {"coverage": 0.5},
        "class_names": ["background", "cat", "dog"],
        "captions": "none",
        "text_encoder": "",
        "encoder": "digits_vit",
        "pretrained": "shipped",
        "wall_seconds": 3.5,
        "train_seconds": 2.5,
        "seconds_per_step": 0.3,
        "peak_memory_bytes": 1 << 20,
        "workers": 1,
        "threads": 1,
        "device": "cpu",
        "versions": {"torch": "2"},
        "git": {},
        "gradient_shares": shares,
        "palette": [[0, 0, 0], [128, 0, 0], [0, 128, 0]],
        **other,
    }
    return RunRecord(**fields)  # type: ignore[arg-type]


def write(place: str, data: bytes | str) -> Path:
    path = CORPUS / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def pictures() -> bytes:
    out = io.BytesIO()
    image = PIXELS[None]
    labels = (image[..., 0] % 3).astype(np.uint8)
    np.savez_compressed(out, **{"0/image": image, "1/truth": labels, "2/prediction": labels})
    return out.getvalue()


def specs() -> None:
    write("table/table_a.toml", TABLE)
    write("sweep/sweep_a.toml", SWEEP)
    write("recipe/a.toml", RECIPE)
    write(
        "override/words.txt",
        "method.name=viladiff\ntrain.steps=8\nmethod.vila.lam=0.5\noptim.betas=0.9,0.99\ndata.hflip=0.5",
    )
    write(
        "override/folder.txt",
        "data.dataset=folder\ndata.bands=3,2,1\ndata.value_range=p1..p99\nseed=3\nruntime.threads=none\nmodel.decoder=dpt",
    )
    write(
        "override/voc.txt",
        "data.dataset=voc\ndata.split=92\nmodel.encoder=vit_tiny_patch16_224\ntrain.epochs=2.5\neval.protocol=original",
    )


def runs() -> None:
    path = write("record/record.json", "")
    save_record(record(), path)
    (CORPUS / "published").mkdir(exist_ok=True)
    shutil.copy(path, CORPUS / "published" / "record.json")
    log = "".join(json.dumps({"step": i, "loss": 1.5 / (i + 1), "sup": 0.5, "lr": 1e-3}) + "\n" for i in range(6))
    write("steps/steps.jsonl", log)
    failure = {"kind": "nan", "message": "the loss is nan", "step": None, "attempts": 1, "when": "2026-11-28T21:00:38Z"}
    write("failure/failure.json", json.dumps(failure))
    lease = {"host": "here", "machine": "boot pid:[1]", "pid": 4242, "started": 77, "since": "2026-01-31T12:00:00Z"}
    write("lease/lease.json", json.dumps(lease))
    trial = Trial(
        number=0,
        point={"method.vila.lam": 0.5, "a.b": True},
        runs={"0": "0" * 16},
        order=0,
        state="complete",
        rungs=[Rung(step=4, value=0.25, order=1)],
        values={"0": 0.5},
        ended=2,
    )
    write("trial/000000.json", trial_bytes(trial))
    space = {"method.vila.lam": Dimension(low=0.01, high=1.0, log=True).model_dump_json()}
    write("study/sweep.json", json.dumps({"sweep": "a", "scale": "digits", "seeds": [0, 1], "space": space}))
    state = {
        "step": 3,
        "method": {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)},
        "more": [1, "a", None],
    }
    save_checkpoint(CORPUS / "checkpoint" / "checkpoint.pt", state) if (CORPUS / "checkpoint").mkdir(
        exist_ok=True
    ) is None else None
    tensors = {"encoder.conv.weight": torch.ones(2, 3), "head.bias": torch.zeros(2)}
    packed = io.BytesIO()
    torch.save({"state_dict": tensors}, packed)
    write("weights/weights.pth", packed.getvalue())
    write("weights/weights.safetensors", safetensors.torch.save(tensors))
    write("pictures/pictures.npz", pictures())
    out = io.BytesIO()
    np.savez_compressed(out, label=np.array([0, 1, 2], np.uint8), before=np.zeros((3, 2), np.float32))
    write("plane/plane.npz", out.getvalue())
    step = {
        "device": "cpu",
        "passes": "1",
        "step_ms": 2.0,
        "step_cpu_ms": 2.0,
        "reference_ms": 1.0,
        "reference_cpu_ms": 1.0,
    }
    costs = {
        "made": "2026-01-31T12:00:00Z",
        "machine": "here",
        "device": "cpu",
        "threads": 1,
        "repeats": 3,
        "fields": [],
        "methods": {"cps": step},
    }
    write("costs/steps.json", json.dumps(costs))
    root = CORPUS / "archive"
    shutil.rmtree(root, ignore_errors=True)
    run = root / "store" / record().run_id
    run.mkdir(parents=True)
    save_record(record(), run / "record.json")
    (run / "steps.jsonl").write_text(log)
    (run / "pictures.npz").write_bytes(pictures())
    export(Store(root / "store"), [record().run_id], root / "runs.tar.gz")
    shutil.rmtree(root / "store")


def data() -> None:
    write("list/labelled.txt", "one\ntwo.png\nimages/sub/three.png masks/sub/three.png\n")
    write("list/val.txt", "four masks/four.png\n")
    write("classes/classes.txt", "background\ncat\ndog\n")
    write("classes/palette.txt", "0 0 0 background\n128 0 0 cat\n0 128 0 dog\n255 255 255 ignore\n")
    write("groups/groups.csv", "image,group\none,a\ntwo,b\nsub/three,a\nfour.png,b\n")
    rows = [
        ("one", "a photo of", "a cat", "blip2", "12"),
        ("two", "a photo of", "a dög", "blip2", "12"),
        ("two", "the", "one, two", "blip2", "12"),
    ]
    names = ("image", "prompt", "text", "model", "revision")
    write(
        "captions/captions.csv",
        "\n".join([",".join(names), *(",".join(f'"{cell}"' for cell in row) for row in rows)]) + "\n",
    )
    write("captions/captions.jsonl", "".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    write("captions/several.jsonl", '{"file_name": "one.jpg", "captions": ["a", "b"]}\n')
    table = pa.table({name: [row[i] for row in rows] for i, name in enumerate(names)})
    pq.write_table(table, write("captions/captions.parquet", b""))
    write("coco/instances.json", json.dumps(COCO))
    image()


def image() -> None:
    grey = PIXELS[..., 0]
    for name, options in (
        ("one.png", {}),
        ("one.jpg", {"quality": 50}),
        ("one.bmp", {}),
        ("one.webp", {"lossless": True}),
        ("one.ppm", {}),
    ):
        out = io.BytesIO()
        kind = {"jpg": "JPEG"}.get(name[4:], name[4:].upper())
        Image.fromarray(PIXELS).save(out, kind, **options)
        write(f"image/{name}", out.getvalue())
    for name, picture in (
        ("palette.png", Image.fromarray(PIXELS).quantize(4)),
        ("grey.png", Image.fromarray(grey % 3)),
        ("deep.png", Image.fromarray(grey.astype(np.uint16) * 257)),
    ):
        out = io.BytesIO()
        picture.save(out, "PNG")
        write(f"image/{name}", out.getvalue())
    for name, array, options in (
        (
            "bands.tif",
            RNG.integers(0, 4000, (6, 8, 5), np.uint16),
            {"planarconfig": "contig", "photometric": "minisblack"},
        ),
        ("planes.tif", RNG.random((3, 6, 8), np.float32), {"photometric": "minisblack", "compression": "zlib"}),
        ("grey.tif", grey % 3, {"compression": "lzw"}),
    ):
        out = io.BytesIO()
        tifffile.imwrite(out, array, **options)
        write(f"image/{name}", out.getvalue())
    for name, array in (("ids.npy", grey % 3), ("bands.npy", RNG.random((6, 8, 4)).astype(np.float32))):
        out = io.BytesIO()
        np.save(out, array)
        write(f"image/{name}", out.getvalue())


def model() -> None:
    """Of a model folder everything but the weights, which readers of the corpus make; of these the header."""
    fields = {"data.dataset": "digits", "method.name": "supervised", "model.decoder_width": 8, "data.crop": 32}
    every = flatten(override(RunConfig(), fields)).items()
    config = {"format": 1, "text_dim": 1, "fields": {path: value for path, value in every if path[:8] != "runtime."}}
    write("model/config.json", json.dumps(config, indent=1))
    write("model/classes.txt", "a\nb\nc\n")
    write(
        "model/preprocessor_config.json",
        json.dumps({"do_resize": False, "do_normalize": True, "image_mean": [0.485, 0.456, 0.406], "crop_size": 32}),
    )
    sums = {"classes.txt": hashlib.sha256(b"a\nb\nc\n").hexdigest()}
    write("model/manifest.json", json.dumps({"sha256": sums}))
    network = empty_method(RunConfig(**unflatten(config["fields"])), ["a", "b", "c"], 1).eval_network()
    whole = safetensors.torch.save(network.state_dict())
    write("model/model.safetensors", whole[: 8 + struct.unpack("<Q", whole[:8])[0]])


if __name__ == "__main__":
    shutil.rmtree(CORPUS, ignore_errors=True)
    CORPUS.mkdir()
    for make in (specs, runs, data, model):
        make()
    print(f"{sum(1 for path in CORPUS.rglob('*') if path.is_file())} files in {CORPUS}")
