"""The readers that are fuzzed: each gets an odd file, and what it reads is compared where that can be told."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import safetensors.torch

from viladiff.config.base import unflatten
from viladiff.config.pixel_format import RGB_8, PixelFormat
from viladiff.core.hashing import file_sha256
from viladiff.core.messages import error_lines
from viladiff.data.captions.files import match, read_captions
from viladiff.data.files.groups import groups_of
from viladiff.data.files.images import IdEncoding, PaletteEncoding, image_size, read_image, read_mask
from viladiff.data.files.index import FOLDER, FileIndex, scan
from viladiff.data.files.open_lists import read_lists
from viladiff.data.sources.coco_masks import paint, read_instances, read_own_instances
from viladiff.data.sources.folder import read_classes
from viladiff.experiments.publish import BESIDE
from viladiff.experiments.sweep_setup import read_definition
from viladiff.inference.model_folder import ModelFolder, read_folder, write_folder
from viladiff.models.weight_files import read_file, unwrapped
from viladiff.report.sections import feature_clusters, qualitative
from viladiff.report.sections.leaderboard import read_costs
from viladiff.report.sections.learning_curves import read_log
from viladiff.runs.archive import import_archive
from viladiff.runs.checkpoint import StepLog, load_checkpoint, save_checkpoint
from viladiff.runs.config import RunConfig, non_default_fields, override, parse_overrides, run_id
from viladiff.runs.gradient_shares import by_thirds
from viladiff.runs.lease import HeartbeatMonitor, live_leases
from viladiff.runs.record import parse_record, record_bytes, strip_local_paths
from viladiff.runs.store import Store
from viladiff.runs.verify_and_gc import contradiction, verify
from viladiff.sweeps.space import Dimension, shrunk
from viladiff.sweeps.spec import check, load_sweep
from viladiff.sweeps.trials import load_trials, trial_bytes
from viladiff.tables.cells import cells
from viladiff.tables.recipes.recipe import check_recipe, read_recipe
from viladiff.tables.spec_file import load_table
from viladiff.training.step_work import empty_method

CORPUS = Path(__file__).resolve().parent / "corpus"
RUN = "0123456789abcdef"


class WrongResultError(AssertionError):
    """What was read is not what the file says."""


def same(found: object, again: object, what: str) -> None:
    if found != again:
        raise WrongResultError(f"{what}: read once more it is something else")


@dataclass(frozen=True)
class Reader:
    """One reader of the project."""

    read: Callable[[Path], object]
    """Reads the file at a path, whose name is that of the corpus; the folder is its own."""
    kinds: dict[str, str]
    """Suffix of the file to the name of a mutator."""
    several: bool = False
    """Whether its errors have a line for each fault."""
    names: Callable[[Path], tuple[str, ...]] = lambda path: (path.name,)
    """What an error must name: one of these."""


# Specs and words


def table(path: Path) -> object:
    found = load_table(path)
    for scale in found.scale:
        cells(found, scale)
    return found


def sweep(path: Path) -> object:
    found = load_sweep(path)
    for scale in found.scale:
        check(found, scale)
    return found


def recipe(path: Path) -> object:
    found = read_recipe(path)
    check_recipe(found)
    return found


SECTIONS = ("data.", "method.", "model.", "optim.", "train.", "eval.", "runtime.", "seed")


def file_or_field(path: Path) -> tuple[str, ...]:
    return (path.name, *SECTIONS)


def words(path: Path) -> list[str]:
    return path.read_bytes().decode("utf-8", "replace").split("\n")


def overrides(path: Path) -> object:
    cfg = override(RunConfig(), parse_overrides(words(path)))
    again = RunConfig(**unflatten(non_default_fields(cfg)))
    same(cfg, again, "configuration")
    same(run_id(cfg), run_id(again), "name")
    return cfg


def fields_named(path: Path) -> tuple[str, ...]:
    """Fields of the words, and sections, one of which an error on words names."""
    given = [word.partition("=")[0].strip() for word in words(path)]
    return (*SECTIONS, "field=value", *(one for one in given if one), *(one.split(".")[0] for one in given if one))


# Runs


def record(path: Path) -> object:
    found = parse_record(path.read_bytes(), path)
    same(found.model_dump(), parse_record(record_bytes(found), path).model_dump(), "record")
    contradiction(found)
    strip_local_paths(found)
    by_thirds(found.gradient_shares, max(1, found.steps))
    return found


@contextmanager
def listened(folder: Path, repair: bool = True) -> Iterator[Store]:
    """A store whose remarks are judged as errors are."""
    said: list[str] = []
    yield Store(folder, [folder / "layer"], said.append, repair)
    for text in said:
        if text != error_lines(text) or "\n" in text:
            raise WrongResultError(f"a remark of the store: {text[:300]!r}")


def failure(path: Path) -> object:
    place = path.parent / "store" / RUN / "failure.json"
    place.parent.mkdir(parents=True)
    path.rename(place)
    with listened(path.parent / "store") as store:
        return store.failure(RUN)


def published(path: Path) -> object:
    layer = path.parent / "store" / "layer" / "table5" / "records"
    layer.mkdir(parents=True)
    path.rename(layer / path.name)
    with listened(path.parent / "store", repair=False) as store:
        found = store.records()
        for one in verify(store):
            if one.text != error_lines(one.text) or "\n" in one.text:
                raise WrongResultError(f"a finding: {one.text[:300]!r}")
        return found


def steps(path: Path) -> object:
    log = StepLog(path)
    read_log(path)
    rows = log.read()
    BESIDE["steps.jsonl"](path)
    log.truncate_to(3)
    same(json.dumps(log.read()), json.dumps([row for row in rows if row["step"] < 3]), "log")
    return rows


def lease(path: Path) -> object:
    path.rename(path.with_name(f"lease-{'0' * 32}.json"))
    found = live_leases(path.parent, HeartbeatMonitor())
    for holder in found.values():
        text = str(holder)
        if text != error_lines(text):
            raise WrongResultError(f"holder: {text[:300]!r}")
    return found


def trial(path: Path) -> object:
    found = load_trials(path.parent)
    for one in found:
        path.write_bytes(trial_bytes(one))
        same([one], load_trials(path.parent), "trial")
    return found


def study(path: Path) -> object:
    found = read_definition(path)
    shrunk(found["space"], {"method.vila.lam": Dimension(low=0.01, high=1.0, log=True)})
    return found


def checkpoint(path: Path) -> object:
    found = load_checkpoint(path)
    if found is None:
        raise WrongResultError("no checkpoint, although there is a file")
    save_checkpoint(path, found)
    return found


def weights(path: Path) -> object:
    found, _ = read_file(path)
    return list(unwrapped(found))


def pictures(path: Path) -> object:
    return qualitative.load(path)


def plane(path: Path) -> object:
    return feature_clusters.load(path, 3)


def costs(path: Path) -> object:
    found = read_costs(path.parent, [])
    if found.why != error_lines(found.why):
        raise WrongResultError(f"costs: {found.why[:300]!r}")
    return found.measured and str(found.measured)


def archive(path: Path) -> object:
    store = Store(path.parent / "store", say=lambda text: None)
    try:
        found = import_archive(store, path)
    except ValueError:
        left = [one for one in store.root.rglob("*") if one.is_file()]
        if left:
            raise WrongResultError(f"a refused archive left {left[0]}") from None
        raise
    for name in found:
        if store.get(name) is None:
            raise WrongResultError(f"{name} was imported and has no record")
    return found


# Data


@cache
def tree() -> Path:
    """A folder of four images, made once."""
    import tempfile

    from PIL import Image

    root = Path(tempfile.mkdtemp(prefix="fuzz-tree-"))
    for name in ("one", "two", "sub/three", "four"):
        for folder in ("images", "masks"):
            place = root / folder / f"{name}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.zeros((2, 2), np.uint8)).save(place)
    (root / "splits").mkdir()
    return root


@cache
def index() -> FileIndex:
    return scan(tree(), FOLDER)


LISTS = {"labelled.txt": "one\n", "val.txt": "four\n"}


def lists(path: Path) -> object:
    for name, text in LISTS.items():
        if name != path.name:
            path.with_name(name).write_text(text)
    return read_lists(index(), path.parent, ["labelled"])


def classes(path: Path) -> object:
    found = read_classes(path.parent)
    if not 2 <= len(found.names) <= 255 or len({*found.names}) < len(found.names):
        raise WrongResultError(f"classes {found.names[:5]}")
    return found


def groups(path: Path) -> object:
    found = groups_of(index(), str(path))
    same(sorted(found), ["four", "one", "sub/three", "two"], "groups")
    return found


def captions(path: Path) -> object:
    return match(read_captions(path), ["one", "two"], ["three"])


def coco(path: Path) -> object:
    for read in (read_own_instances, read_instances):
        try:
            found = read(path)
        except ValueError:
            if read is read_own_instances:
                raise
            continue
        for task in found[0] if isinstance(found, tuple) else found:
            if task.height * task.width < 1 << 20:
                labels, _ = paint(task)
                same(labels.shape, (task.height, task.width), "mask")
    return None


FORMATS = (
    RGB_8,
    PixelFormat(channels=5, value_range="16bit"),
    PixelFormat(bands=(1,), value_range="p1..p99", shown=None),
)
CODES = (None, IdEncoding((0, 1, 2), (0, 1, 255), "hold 0 ... 2"), PaletteEncoding(((0, 0, 0), (128, 0, 0)), (0, 1)))


def image(path: Path) -> object:
    """All ways to read an image or a mask; the first error is that of the image itself."""
    errors: list[ValueError] = []
    found = []
    for pixels in FORMATS:
        try:
            found.append(read_image(path, pixels))
        except ValueError as error:
            errors.append(error)
        else:
            same(found[-1].shape[:2], image_size(path), "size")
    for coding in CODES:
        try:
            labels = read_mask(path, 3, coding)
        except ValueError as error:
            errors.append(error)
        else:
            if labels.dtype != np.uint8 or labels.ndim != 2:
                raise WrongResultError(f"a mask of {labels.dtype} {labels.shape}")
            found.append(labels)
    for error in errors:
        if str(error) != error_lines(str(error)) or "\n" in str(error) or path.name not in str(error):
            raise error
    if errors and not found:
        raise errors[0]
    return found


@cache
def whole_folder() -> Path:
    """A model folder of a small network, made once; without its manifest."""
    import tempfile

    root = Path(tempfile.mkdtemp(prefix="fuzz-model-"))
    fields = json.loads((CORPUS / "model" / "config.json").read_bytes())["fields"]
    network = empty_method(RunConfig(**unflatten(fields)), ["a", "b", "c"], 1).eval_network()
    write_folder(root, ModelFolder(network, fields, ("a", "b", "c")))
    (root / "manifest.json").unlink()
    return root


@cache
def data_size() -> int:
    """Bytes of the weights of that folder, without the header."""
    whole = (whole_folder() / "model.safetensors").read_bytes()
    return len(whole) - 8 - struct.unpack("<Q", whole[:8])[0]


def complete_manifest(path: Path) -> None:
    """Add the sums of the files that a manifest does not name, since weights differ from one worker to the next."""
    try:
        found = json.loads(path.read_bytes())
        named = found["sha256"].keys()
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return
    if len(named) == 1:
        found["sha256"] |= {
            one.name: file_sha256(one) for one in path.parent.iterdir() if one.name not in (*named, path.name)
        }
        path.write_text(json.dumps(found))


def model(path: Path) -> object:
    for file in whole_folder().iterdir():
        if file.name != path.name:
            path.with_name(file.name).hardlink_to(file)
    if path.name == "manifest.json":
        complete_manifest(path)
    if path.name == "model.safetensors":  # the corpus has its header alone
        os.truncate(path, path.stat().st_size + data_size())
    found = read_folder(path.parent)
    wanted = safetensors.torch.load_file(path.with_name("model.safetensors"))
    same({*found.network.state_dict()}, {*wanted}, "weights")
    return found


READERS: dict[str, Reader] = {
    "table": Reader(table, {".toml": "toml"}, several=True, names=file_or_field),
    "sweep": Reader(sweep, {".toml": "toml"}, several=True, names=file_or_field),
    "recipe": Reader(recipe, {".toml": "toml"}, several=True, names=lambda path: (path.name, f"recipe {path.stem}")),
    "override": Reader(overrides, {".txt": "lines"}, several=True, names=fields_named),
    "record": Reader(record, {".json": "record"}),
    "published": Reader(published, {".json": "record"}),
    "failure": Reader(failure, {".json": "json"}),
    "steps": Reader(steps, {".jsonl": "jsonl"}),
    "lease": Reader(lease, {".json": "json"}),
    "trial": Reader(trial, {".json": "record"}, names=lambda path: (path.parent.name,)),
    "study": Reader(study, {".json": "json"}),
    "checkpoint": Reader(checkpoint, {".pt": "checkpoint"}),
    "weights": Reader(weights, {".pth": "zip", ".safetensors": "safetensors"}),
    "pictures": Reader(pictures, {".npz": "zip"}),
    "plane": Reader(plane, {".npz": "zip"}),
    "costs": Reader(costs, {".json": "json"}),
    "archive": Reader(archive, {".gz": "archive"}),
    "list": Reader(lists, {".txt": "lines"}, names=lambda path: (str(path.parent),)),
    "classes": Reader(classes, {".txt": "lines"}, names=lambda path: (path.name, str(path.parent))),
    "groups": Reader(groups, {".csv": "lines"}),
    "captions": Reader(captions, {".csv": "lines", ".jsonl": "jsonl", ".parquet": "bytes"}),
    "coco": Reader(coco, {".json": "json"}),
    "image": Reader(image, {"": "bytes", ".npy": "npy"}),
    "model": Reader(
        model,
        {".json": "json", ".txt": "lines", ".safetensors": "safetensors"},
        names=lambda path: (str(path.parent),),
    ),
}
"""By the name of their folder in the corpus."""


def attempt(reader: Reader, folder: Path, name: str, data: bytes) -> tuple[str, str, BaseException | None]:
    """Let a reader read a file: (outcome, what is wrong, the error); the outcome is accepted, refused or finding."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    path = folder / name
    path.write_bytes(data)
    named = reader.names(path)
    try:
        reader.read(path)
    except (ValueError, OSError) as error:
        why = complaint(str(error), named, reader.several)
        return ("finding" if why else "refused"), why, error
    except Exception as error:
        return "finding", type(error).__name__, error
    return "accepted", "", None


LONGEST = 1000


def complaint(text: str, named: tuple[str, ...], several: bool) -> str:
    """What is wrong with the text of an error; empty where it is as it should be."""
    lines = text.split("\n")
    if len(lines) > (60 if several else 1):
        return f"{len(lines)} lines"
    for line in lines:
        if not line.strip() or not line.isprintable():
            return "a line is empty or has control characters"
        if len(line) > LONGEST:
            return f"a line of {len(line)} characters"
    wrong = [line for line in lines if not any(name in line for name in named) and "more faults" not in line]
    return "names neither file nor field" if wrong else ""
