"""The command ``viladiff data``: validate images and masks, split them into lists, make missing files.

Only the standard library is loaded until a command is executed.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from viladiff.cli.common import positive
from viladiff.core.messages import print_text

if TYPE_CHECKING:
    from viladiff.data.files.validate import Advance, DatasetReport

EXAMPLES = """\
examples:
  viladiff data check photos                   check every file; writes data-check/index.html
  viladiff data split photos --labelled 30     photos/splits/labelled/: 30 labelled images, a fifth for validation
  viladiff data split photos --labelled 30 --seed 1 --name labelled-1
  viladiff data split photos --groups 'patient[0-9]+' --split-dir lists
  viladiff data check photos data.value_range=12bit data.channels=5 data.mask_suffix=_mask.tif
  viladiff data coco-masks photos --own --instances mine.json
  viladiff data coco-masks coco                coco/masks/: from COCO's instances; resumes if interrupted
  viladiff data pictures --remove outdated     delete decoded pictures whose file is gone or changed
  viladiff train data.dataset=folder runtime.data_root=photos data.split=labelled
"""
SHOWN = 20


def add_data(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``data`` and its actions to the subparsers of ``viladiff``."""
    raw = argparse.RawDescriptionHelpFormatter
    text = "check and split images and masks, or render the built-in data sets"
    data = commands.add_parser("data", help=text, description=text, epilog=EXAMPLES, formatter_class=raw)
    actions = data.add_subparsers(title="actions", required=True, metavar="ACTION")

    check = actions.add_parser("check", help="check every image, mask and list, and report faults", formatter_class=raw)
    _add_root(check)
    check.add_argument("--split-dir", metavar="DIR", help="directory of lists (default: ROOT/splits)")
    check.add_argument("--out", metavar="DIR", default="data-check", help="directory of the page (default: data-check)")
    check.set_defaults(run=_check)

    _add_split(actions, raw)
    _add_coco_masks(actions)

    render = actions.add_parser("render", help="render a built-in data set into the cache, or verify it")
    render.add_argument("names", nargs="+", metavar="NAME", help="name of the data set, such as digits or dense")
    render.set_defaults(run=_render)

    text = "list the decoded pictures in the cache folder (runtime.picture_cache), or delete them"
    pictures = actions.add_parser("pictures", help=text, description=text)
    pictures.add_argument(
        "--remove",
        choices=("outdated", "all"),
        help="delete those that no run reads any more, since their file is gone or changed or Pillow is; or all",
    )
    pictures.set_defaults(run=_pictures)


def _add_split(
    actions: argparse._SubParsersAction[argparse.ArgumentParser], raw: type[argparse.RawDescriptionHelpFormatter]
) -> None:
    split = actions.add_parser(
        "split", help="split masked images into labelled, unlabelled and validation lists", formatter_class=raw
    )
    _add_root(split)
    split.add_argument(
        "--labelled", metavar="N", type=int, help="number of labelled images (default: all but validation)"
    )
    split.add_argument(
        "--val",
        metavar="N",
        type=_count_or_share,
        help="number of validation images, or a share below 1 (default: the present val.txt, or 0.2)",
    )
    split.add_argument("--seed", metavar="N", type=int, default=0, help="seed of the split (default: 0)")
    split.add_argument("--name", default="labelled", help="name of the split, for data.split (default: labelled)")
    split.add_argument("--split-dir", metavar="DIR", help="directory of lists (default: ROOT/splits)")
    split.add_argument(
        "--groups",
        metavar="HOW",
        help="keep images of a group on one side of validation: folder, a CSV file of image and group, or a regular "
        "expression that finds the group in a name, such as patient[0-9]+",
    )
    split.set_defaults(run=_split)


def _count_or_share(text: str) -> float:
    """Return a number above 0. Raises ArgumentTypeError for another, with what was probably meant."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if math.isfinite(found) and found > 0:
        return found
    meant = ""
    if text.endswith("%") or "," in text:
        with suppress(ValueError):
            number = float(text.rstrip("%").replace(",", "."))
            meant = f"; write {number / 100 if text.endswith('%') else number:g}"
    raise argparse.ArgumentTypeError(f"{text!r}: must be a number of images, or a share below 1 such as 0.2{meant}")


def _add_coco_masks(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    masks = actions.add_parser("coco-masks", help="render masks from the instances of COCO 2017, or from one's own")
    masks.add_argument("root", metavar="ROOT", help="directory with train2017/, val2017/ and annotations/, or images/")
    masks.add_argument(
        "--own", action="store_true", help="instances of any categories; also writes ROOT/classes.txt, background first"
    )
    masks.add_argument(
        "--instances",
        metavar="FILE",
        action="append",
        default=[],
        help="JSON file of instances (default: both of annotations/)",
    )
    masks.add_argument("--out", metavar="DIR", help="directory of the masks (default: ROOT/masks)")
    masks.add_argument("--processes", metavar="N", type=positive, help="number of processes (default: one per core)")
    masks.add_argument("--quiet", action="store_true", help="hide the progress bar")
    masks.set_defaults(run=_coco_masks)


def _add_root(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "root",
        metavar="ROOT",
        help="directory with images/ and masks/, or in the layout of VOC, Cityscapes, COCO or ADE20K",
    )
    command.add_argument(
        "--shifted", action="store_true", help="ADE20K masks with labels 0...149 and 255 (data.reduce_zero_label=false)"
    )
    command.add_argument(
        "fields",
        metavar="FIELD=VALUE",
        nargs="*",
        help="fields of data that say how files are read, such as data.value_range=12bit or data.channels=5",
    )
    command.add_argument("--processes", metavar="N", type=positive, help="number of processes (default: one per core)")
    command.add_argument("--quiet", action="store_true", help="hide the progress bar")


def _fields(args: argparse.Namespace) -> dict[str, object]:
    """Return the fields of ``data`` as ``open_tree`` takes them; of a folder, they are checked. Raises ValueError."""
    from viladiff.config.base import parse_overrides

    given = parse_overrides(args.fields)
    wrong = [path for path in given if not path.startswith("data.")]
    if wrong:
        raise ValueError(f"{wrong[0]}: only fields of data, such as data.value_range, say how files are read")
    shifted: dict[str, object] = {"reduce_zero_label": False} if args.shifted else {}
    return {**shifted, **{path.removeprefix("data."): value for path, value in given.items()}}


def _check(args: argparse.Namespace) -> int:
    from viladiff.data.files.validate import validate_dataset
    from viladiff.report.dataset_page import write_page

    with _bar("reading images", args.quiet) as advance:
        report = validate_dataset(args.root, args.split_dir, args.processes, advance, _fields(args))
    page = write_page(report, Path(args.out).expanduser(), f"viladiff data check {args.root}")
    _say(report)
    print_text(f"\n{page}")
    return int(report.errors > 0)


def _say(report: DatasetReport) -> None:
    from viladiff.report.dataset_page import class_rows, dataset_facts

    for name, value in dataset_facts(report).items():
        print_text(f"{name:<30}{value}")
    print_text()
    for row in class_rows(report):
        share = "-" if row["share"] is None else f"{row['share']:.2f} %"
        of = "labelled" if row["id"] < 255 else "all"
        print_text(f"{row['id']:>3}  {row['name']:<24}{share:>9} of {of} pixels, in {row['images']} masks")
    for split in report.splits:
        labelled, unlabelled, val = split.counts
        print_text(f"\ndata.split={split.name}: {labelled} labelled, {unlabelled} unlabelled, {val} validation images")
        print_text("\n".join(f"  {text}" for text in (split.published, *split.notes)))
    if report.faults:
        print_text()
    for fault in report.faults[:SHOWN]:
        print_text(f"{fault.level}: {fault.path}: {fault.reason}")
    if len(report.faults) > SHOWN:
        print_text(f"... and {len(report.faults) - SHOWN} more, on the page")


def _split(args: argparse.Namespace) -> int:
    from viladiff.data.files.make_split import SplitOptions, make_split, write_lists
    from viladiff.data.files.validate import inspect_images
    from viladiff.data.sources.detect import open_tree

    tree, classes = open_tree(args.root, **_fields(args))
    with _bar("reading masks", args.quiet) as advance:
        seen = inspect_images(tree, classes, args.processes, advance)
    split_dir = None if args.split_dir is None else Path(args.split_dir).expanduser()
    options = SplitOptions(_fields(args), split_dir, args.groups)
    found = make_split(args.root, seen, args.labelled, args.val, args.seed, options)
    directory = write_lists(args.root, args.name, found.lists, options)
    labelled, unlabelled, val = map(len, found.lists)
    kept = f", the list of {found.kept_val}" if found.kept_val else ""
    print_text(f"{directory}: {labelled} labelled, {unlabelled} unlabelled, {val} validation images{kept}")
    if found.left_out:
        print_text(f"{found.left_out} images are of groups in validation and have no mask: they are in no list")
    for name, missing in found.uncovered.items():
        print_text(
            f"warning: no {name} image shows {', '.join(missing)}; increase --labelled or --val, or change --seed"
        )
    return 0


def _coco_masks(args: argparse.Namespace) -> int:
    from viladiff.data.sources.coco_masks import make_masks, make_own_masks

    with _bar("drawing masks", args.quiet) as advance:
        make = make_own_masks if args.own else make_masks
        made = make(args.root, args.instances, args.out, args.processes, advance)
    print_text(f"{made.written:,} masks written, {made.there:,} existed already")
    print_text(f"{made.empty:,} images have no annotation and are background; {made.crowds:,} crowds are 255")
    if made.hollow:
        where = f", in {len(made.hollow_in):,} images, first {made.hollow_in[0]!r}"
        print_text(
            f"{made.hollow:,} polygons of fewer than three points or regions without a pixel were skipped{where}"
        )
    if made.absent:
        print_text(f"warning: {len(made.absent):,} images of the file are not in images/, first {made.absent[0]!r}")
    if made.unnamed:
        first = made.unnamed[0]
        print_text(f"{len(made.unnamed):,} images are not in the file and have no mask of it, first {first!r}")
    return 0


def _render(args: argparse.Namespace) -> int:
    from viladiff.config.base import did_you_mean
    from viladiff.data.sources import DATASETS
    from viladiff.data.sources.base import EmbeddedSource

    sources = {name: source for name, source in DATASETS.items() if isinstance(source, EmbeddedSource)}
    for name in args.names:
        if name not in sources:
            allowed = f"allowed: {', '.join(sources)}{did_you_mean(name, sources)}"
            raise ValueError(f"{name}: is no data set that is rendered; {allowed}")
    for name in args.names:
        arrays = sources[name].pixels().arrays
        print_text(f"{name}: " + ", ".join(f"{part} {array.shape}" for part, array in sorted(arrays.items())))
    return 0


def _pictures(args: argparse.Namespace) -> int:
    from viladiff.data.loading.picture_cache import picture_folder, survey

    found = survey(picture_folder(), remove=args.remove)
    print_text(f"{picture_folder()}: {found.entries:,} files, {found.total / 1e9:.2f} GB")
    print_text(f"outdated or incomplete: {found.outdated:,}, {found.outdated_bytes / 1e9:.2f} GB")
    if args.remove:
        print_text(f"deleted: {found.removed:,}, {found.removed_bytes / 1e9:.2f} GB")
    return 0


@contextmanager
def _bar(title: str, quiet: bool) -> Iterator[Advance]:
    """Count images on stderr if it is a terminal; show nothing otherwise or if ``quiet``."""
    if quiet or not sys.stderr.isatty():
        yield lambda done, of: None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    bar = Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True), transient=True)
    with bar:
        task = bar.add_task(title, total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)
