"""The command ``viladiff``: the parser of all subcommands. torch is imported after the arguments are parsed.

Exit status: 0 done, 1 a check failed, 2 the request cannot be carried out, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from viladiff import __version__
from viladiff.cli.common import CommandParser, parse_arguments, positive, run_command
from viladiff.cli.data import add_data
from viladiff.cli.runs import add_runs
from viladiff.cli.sweeps import add_sweep_options as add_sweep_options
from viladiff.cli.tables import add_table_options
from viladiff.cli.text import add_text
from viladiff.core.messages import format_value, print_text, printable

if TYPE_CHECKING:
    from viladiff.runs.config import RunConfig

EXAMPLES = """\
examples:
  viladiff train method.name=viladiff data.split=183
  viladiff train method.name=semibaseline train.steps=50 --dry-run
  viladiff config method.mixe                  list fields: type, default, meaning
  viladiff evaluate runs/0123456789abcdef      evaluate a finished run again
  viladiff predict DIR --model RUN             label photographs
  viladiff export RUN OUT --onnx               export a model folder, independent of run and data
  viladiff doctor                              check the installation and suggest fixes

Set VILADIFF_DEBUG=1 to show the traceback of an error.
"""
TRAIN_EXAMPLES = """\
examples:
  viladiff train method.name=viladiff data.split=183 seed=1
  viladiff train method.name=viladiff method.mixe.enabled=false train.steps=100 --threads 1
  viladiff train method.name=semibaseline data.dataset=dense data.split=463 --runs-dir /tmp/runs
  viladiff train method.name=viladiff --dry-run

The name of a run's directory is a hash of its configuration and data. Re-running the command
resumes from the last checkpoint; for a finished run it prints the scores.
"""
PREDICT_EXAMPLES = """\
examples:
  viladiff predict holiday.jpg --model runs/0123456789abcdef
  viladiff predict photographs/ --model model --out masks

Output: OUT/masks (palette PNGs), OUT/overlays (mask over image), OUT/confidence (probability of the
predicted class, from black to white), OUT/classes.csv (id, name and colour of each class).
"""
TABLE_HELP = "number of a table of the paper, or path of a .toml file"
TABLE_EXAMPLES = """\
examples:
  viladiff plan 5 --scale digits          list the runs and estimate the time
  viladiff plan all --scale digits        all tables: shared runs, remaining time and cost
  viladiff table 5                        scale quick: one seed, minutes on two cores
  viladiff table 5 --scale digits --rows 1 8 --seeds 3 -- train.steps=300
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; errors of the user are one line each on stderr."""
    args = parse_arguments(command_parser(), argv)
    return run_command(lambda: int(args.run(args)), getattr(args, "resumes", True))


def command_parser() -> argparse.ArgumentParser:
    """Build the parser of all subcommands; each sets ``run`` to the function that executes it."""
    raw = argparse.RawDescriptionHelpFormatter
    top: argparse.ArgumentParser = CommandParser(
        "viladiff", epilog=EXAMPLES, formatter_class=raw, description=_first_line()
    )
    top.add_argument("--version", action="version", version=f"viladiff {__version__}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    _add_train(commands)
    _add_uses(commands)

    config = commands.add_parser("config", help="list fields with type, value and meaning", formatter_class=raw)
    _add_fields(config, "section or field, such as method.mixe; field=value shows the defaults that depend on it")
    config.set_defaults(run=_config)

    add_data(commands)
    add_text(commands)
    methods = commands.add_parser("methods", help="list the methods: paper, inputs, cost of a step")
    methods.add_argument("name", nargs="?", help="show one method and its published settings by data set")
    methods.add_argument("--recipe", metavar="NAME", help="show a recipe of the tables' scales, field by field")
    methods.add_argument("--json", action="store_true", help="print JSON")
    methods.set_defaults(run=_methods)

    add_runs(commands)

    for name, text in (
        ("table", "run a table of the paper and write its page"),
        ("plan", "list the runs of a table and estimate the time (table --dry-run)"),
    ):
        table = commands.add_parser(name, help=text, description=text, epilog=TABLE_EXAMPLES, formatter_class=raw)
        which = "number of a table of the paper, or path of a .toml file" + (
            "; all: all tables" if name == "plan" else ""
        )
        table.add_argument("table", metavar="TABLE", help=which)
        add_table_options(table)
        table.set_defaults(run=_table, plan=name == "plan")

    sweep = commands.add_parser("sweep", help="search for the best values of fields", formatter_class=raw)
    sweep.add_argument("sweep", metavar="SWEEP", help="lambda, timesteps, tau, flip, joint, or path of a .toml file")
    add_sweep_options(sweep)
    sweep.set_defaults(run=_sweep)

    doctor = commands.add_parser("doctor", help="check the installation and suggest fixes")
    doctor.add_argument("--runs-dir", metavar="DIR", default="runs", help="directory of runs to check (default: runs)")
    doctor.add_argument("--cluster", metavar="FILE", help="check a cluster file of `ray up` instead")
    doctor.set_defaults(run=_doctor)
    return top


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    train = commands.add_parser("train", help="train one run", epilog=TRAIN_EXAMPLES, formatter_class=raw)
    _add_fields(train)
    train.add_argument("--runs-dir", metavar="DIR", help="directory of runs (runtime.runs_dir)")
    train.add_argument(
        "--captions", metavar="FILE", help="captions to use instead of the data set's own (runtime.captions)"
    )
    train.add_argument("--dry-run", action="store_true", help="print the planned run and its directory, and exit")
    again = train.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="resume from the last checkpoint (default)")
    again.add_argument("--restart", action="store_true", help="train from scratch, even if the run is finished")
    _add_runtime(train)
    train.add_argument("--workers", metavar="N", help="processes that share each batch (runtime.workers)")
    train.set_defaults(run=_train)


def _add_uses(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands that use a trained network."""
    raw = argparse.RawDescriptionHelpFormatter
    evaluate = commands.add_parser("evaluate", help="evaluate the networks of a finished run", formatter_class=raw)
    evaluate.add_argument("directory", metavar="RUN", help="directory of a run, as printed by train")
    _add_fields(evaluate, "eval.protocol=sliding_window, and other fields of eval and runtime")
    _add_runtime(evaluate)
    evaluate.add_argument("--workers", metavar="N", help="processes that share the images (runtime.workers)")
    evaluate.add_argument("--cost", action="store_true", help="also print parameters, FLOPs and time per image")
    evaluate.add_argument(
        "--json", action="store_true", help="print all scores, per class too, and confusion matrices as JSON"
    )
    evaluate.set_defaults(run=_evaluate)

    predict = commands.add_parser("predict", help="label photographs", epilog=PREDICT_EXAMPLES, formatter_class=raw)
    predict.add_argument("source", metavar="IMAGE|DIR", help="image file, or directory of images (recursive)")
    predict.add_argument("--model", required=True, metavar="DIR", help="directory of a run, or exported model folder")
    predict.add_argument("--out", default="predictions", metavar="DIR", help="output directory (default: %(default)s)")
    predict.add_argument(
        "--protocol", metavar="NAME", help="original or sliding_window (default: chosen by image size)"
    )
    predict.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda")
    predict.add_argument(
        "--max-pixels", type=positive, metavar="N", help="pixels of the largest image that is read (default: 2^30)"
    )
    predict.add_argument("--threads", metavar="N", help="CPU threads")
    predict.add_argument("--quiet", action="store_true", help="hide the progress bar")
    predict.set_defaults(run=_predict, resumes=False)

    export = commands.add_parser("export", help="export a run as a model folder", formatter_class=raw)
    export.add_argument("directory", metavar="RUN", help="directory of a run, as printed by train")
    export.add_argument("out", metavar="OUT", help="folder to create")
    export.add_argument("--onnx", action="store_true", help="also write model.onnx and compare its output with torch")
    export.add_argument("--pt2", action="store_true", help="also write model.pt2 by torch.export, read by torch alone")
    export.set_defaults(run=_export, resumes=False)


def _first_line() -> str:
    return "Semi-supervised semantic segmentation: train and evaluate ViLaDiff and its baselines."


def _add_fields(
    command: argparse.ArgumentParser, text: str = "configuration fields; `viladiff config` lists them"
) -> None:
    command.add_argument("fields", nargs="*", metavar="FIELD=VALUE", help=text)


def _add_runtime(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", metavar="NAME", help="auto, cpu or cuda (runtime.device)")
    command.add_argument("--threads", metavar="N", help="CPU threads of each worker (runtime.threads)")
    command.add_argument("--quiet", action="store_true", help="hide the progress bar (runtime.progress=false)")


def _changes(args: argparse.Namespace) -> dict[str, object]:
    """Return fields and the flags that stand for fields as one flat map; refuse a field that is set in both ways."""
    from viladiff.runs.config import parse_overrides

    flags = {name: getattr(args, name, None) for name in ("runs_dir", "device", "workers", "threads", "captions")}
    words = [f"runtime.{name}={value}" for name, value in flags.items() if value is not None]
    if args.quiet:
        words.append("runtime.progress=false")
    return dict(parse_overrides([*args.fields, *words]))


def _train(args: argparse.Namespace) -> int:
    from viladiff.runs.config import RunConfig, override

    cfg = override(RunConfig(), _changes(args))
    if args.dry_run:
        return _dry_run(cfg)
    from viladiff.training.trainer import fit

    result = fit(cfg, resume=not args.restart)
    _print_result({**result.summary(), "directory": result.directory})
    for note in result.notes():
        print_text(f"note: {note}", error=True)
    if result.already_finished:
        print_text("\nAlready finished; nothing to do. Use --restart to retrain.")
    return 0


def _dry_run(cfg: RunConfig) -> int:
    from viladiff.inference.load import preview_run
    from viladiff.runs.config import non_default_fields

    _print_facts(preview_run(cfg))
    _print_facts(non_default_fields(cfg), "non-default fields")
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from viladiff.inference.load import evaluate_run

    found = evaluate_run(args.directory, _changes(args))
    cost = _cost(args.directory) if args.cost else {}
    if args.json:
        import json

        print_text(json.dumps({**found, **cost}, indent=1))
        return 0
    facts = {name: value for name, value in found.items() if isinstance(value, str)}
    scores = {
        f"{network}/{stream}/{score}": value
        for network, streams in found["scores"].items()
        for stream, measured in streams.items()
        for score, value in measured.items()
    }
    _print_result({**facts, **cost, **scores})
    return 0


def _cost(directory: str) -> dict[str, str]:
    from viladiff.evaluation.complexity import cost_facts, costs
    from viladiff.inference.load import text_dim
    from viladiff.inference.pretrained import load_model

    model = load_model(directory)
    found = costs(model.network, model.crop, text_dim(model.network.state_dict()))
    return cost_facts(found, model.crop, model.device)


def _predict(args: argparse.Namespace) -> int:
    from dataclasses import replace

    import torch

    from viladiff.inference.predict import label_files
    from viladiff.inference.pretrained import load_model
    from viladiff.runs.config import RunConfig, override

    if args.threads is not None:
        torch.set_num_threads(override(RunConfig(), {"runtime.threads": args.threads}).runtime.threads or 1)
    model = load_model(args.model, args.device)
    if args.max_pixels is not None:
        model = replace(model, max_pixels=args.max_pixels)
    found = label_files(model, args.source, args.out, args.protocol, not args.quiet)
    facts: dict[str, Any] = {"photographs": found.images}
    if found.unused:
        first = ", ".join(path.name for path in found.unused[:5])
        facts |= {"files not used": f"{len(found.unused)}: {first}{' ...' if len(found.unused) > 5 else ''}"}
    _print_facts({**facts, "masks, overlays, confidence": args.out})
    total = max(1, int(found.pixels.sum()))
    shares = {name: f"{n / total:.1%}" for name, n in zip(model.class_names, found.pixels, strict=True) if n}
    _print_facts(shares, "share of all pixels")
    for sentence in found.failed:
        print_text(f"error: {sentence}", error=True)
    return int(bool(found.failed))


def _export(args: argparse.Namespace) -> int:
    from viladiff.inference.export import export_run

    _print_facts(export_run(args.directory, args.out, args.onnx, args.pt2))
    return 0


def _config(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from viladiff.runs.config import RunConfig, fields_help, override, parse_overrides

    cfg = override(RunConfig(), parse_overrides([word for word in args.fields if "=" in word]))
    table = Table("field", "type", "value", "meaning", box=None, pad_edge=False)
    for prefix in [word for word in args.fields if "=" not in word] or [""]:
        for row in fields_help(prefix, cfg):
            shown = printable(format_value(row.default, 6))
            table.add_row(row.path, row.kind, shown, " ".join(row.text.split()))
    width = None if sys.stdout.isatty() else 160
    console = Console(width=width, markup=False, highlight=False)
    with console.capture() as text:
        console.print(table)
    sys.stdout.write(text.get())
    return 0


def _methods(args: argparse.Namespace) -> int:
    if args.recipe is not None:
        from viladiff.cli.methods import format_recipe

        sys.stdout.write(format_recipe(args.recipe, args.json, args.name))
        return 0
    from viladiff.cli.methods import format_methods

    sys.stdout.write(format_methods(args.json, None if sys.stdout.isatty() else 160, args.name))
    return 0


def _table(args: argparse.Namespace) -> int:
    from viladiff.core.installation import specs_dir
    from viladiff.experiments.tables import find_table, run_table, shell_command

    if args.plan and args.table == "all":
        from viladiff.experiments.all_tables import outline_all

        return outline_all(sorted(specs_dir("ablations").glob("*.toml")), args)
    args.dry_run = args.dry_run or args.plan
    return run_table(find_table(args.table), args, shell_command("viladiff", sys.argv[1:]))


def _sweep(args: argparse.Namespace) -> int:
    from viladiff.experiments.sweeps import find_sweep, run_sweep
    from viladiff.experiments.tables import shell_command

    return run_sweep(find_sweep(args.sweep), args, shell_command("viladiff", sys.argv[1:]))


def _doctor(args: argparse.Namespace) -> int:
    from viladiff.cli.doctor import examine, print_checks

    if args.cluster:
        from viladiff.cluster.config_check import examine_cluster

        checks = examine_cluster(args.cluster)
    else:
        checks = examine(args.runs_dir)
    print_checks(checks)
    return int(any(check.broken for check in checks))


def _print_result(row: dict[str, Any]) -> None:
    """Print facts of a run, one a line, and its scores in percent, one network and stream a line.

    ``row``: scores in [0, 1], under ``miou`` and ``network/stream/score``. Scores by class stay in the record.
    """
    from rich.console import Console
    from rich.table import Table

    scores: dict[str, dict[str, object]] = {}
    for name, value in row.items():
        if name.count("/") == 2 and not isinstance(value, list | tuple):
            stream, _, score = name.rpartition("/")
            scores.setdefault(stream, {})[score] = value
    facts = {name: value for name, value in row.items() if name.count("/") != 2}
    _print_facts({"mIoU %" if name == "miou" else name: _fact(name, value) for name, value in facts.items()})
    columns = list(dict.fromkeys(score for found in scores.values() for score in found))
    titles = [name if name == "images" else f"{name} %" for name in columns]
    table = Table("network/stream", *titles, box=None, pad_edge=False)
    for stream, found in scores.items():
        table.add_row(stream, *(_score(found.get(score)) for score in columns))
    console = Console(width=120, markup=False, highlight=False)
    with console.capture() as text:
        console.print(table)
    print("\n" + text.get(), end="")


def _fact(name: str, value: object) -> object:
    return _score(value) if name == "miou" else value


def _score(value: object) -> str:
    """Format a share in [0, 1] in percent, a count as it is, and a missing value as a dash."""
    return f"{100 * value:.2f}" if isinstance(value, float) else "-" if value is None else str(value)


def _print_facts(facts: dict[str, Any], title: str = "") -> None:
    if title:
        print_text(f"\n{title}:")
    width = max((len(name) for name in facts), default=0)
    for name, value in facts.items():
        print_text(f"{name:<{width}}  {format_value(value, 6)}")
