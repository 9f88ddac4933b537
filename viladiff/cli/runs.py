"""The command ``viladiff runs``: list, show, verify, export, import and clean up runs.

Only the standard library is loaded until a command is executed, and torch only by ``verify`` and ``import``.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from viladiff.core.messages import print_text

if TYPE_CHECKING:
    from viladiff.runs.store import Store

EXAMPLES = """\
examples:
  viladiff runs list                                   one run per line
  viladiff runs list method.name=viladiff seed=0       only matching runs; any field of viladiff config
  viladiff runs list --state failed
  viladiff runs list --json | jq '.[] | .miou'
  viladiff runs show 21b6                              a unique prefix of a run's name is enough
  viladiff runs diff 21b6 0c4f
  viladiff runs verify                                 check records and checkpoints against their checksums
  viladiff runs gc --dry-run                           list what would be deleted
  viladiff runs export mine.tar.gz data.split=183      unpack with: viladiff runs import mine.tar.gz
"""
STATES = ("done", "running", "failed", "begun", "damaged", "unreadable")


def add_runs(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``runs`` and its actions to the subparsers of ``viladiff``."""
    raw = argparse.RawDescriptionHelpFormatter
    text = "list, show, compare, verify, export and clean up runs"
    runs = commands.add_parser("runs", help=text, description=text, epilog=EXAMPLES, formatter_class=raw)
    actions = runs.add_subparsers(title="actions", required=True, metavar="ACTION")
    action = partial(_add_action, actions)
    which = "run name, unique prefix, or field=value"
    listing = action(
        "list", "list runs, one per line", "viladiff runs list method.name=viladiff data.split=183 --sort miou"
    )
    listing.add_argument("filters", nargs="*", metavar="FIELD=VALUE", help="only runs with this value of the field")
    listing.add_argument("--state", choices=STATES, help="only runs in this state")
    listing.add_argument(
        "--sort", metavar="COLUMN", default="", help="column to sort by (default: method, dataset, split, seed)"
    )
    listing.add_argument("--reverse", action="store_true", help="reverse the order")
    listing.add_argument("--json", action="store_true", help="print JSON; mIoU in [0, 1]")
    listing.set_defaults(run=_list)
    show = action("show", "show one run in full", "viladiff runs show 21b6")
    show.add_argument("name", metavar="RUN", help="run name or unique prefix")
    show.add_argument("--json", action="store_true", help="print the record as JSON")
    show.set_defaults(run=_show)
    diff = action("diff", "compare two finished runs", "viladiff runs diff 21b6 0c4f")
    diff.add_argument("names", nargs=2, metavar="RUN", help="run name or unique prefix")
    diff.set_defaults(run=_diff)
    verify = action("verify", "verify records, checkpoints and names; read-only", "viladiff runs verify 21b6")
    verify.add_argument("runs", nargs="*", metavar="RUN", help=f"{which} (default: all)")
    verify.set_defaults(run=_verify)
    gc = action("gc", "delete files that are no longer needed; records are kept", "viladiff runs gc --dry-run")
    gc.add_argument("--dry-run", action="store_true", help="list what would be deleted, and exit")
    gc.add_argument(
        "--keep-checkpoints", action="store_true", help="keep the checkpoints of finished runs, for viladiff evaluate"
    )
    gc.add_argument("--pages", metavar="DIR", default="reports", help="directory of pages (default: reports)")
    gc.set_defaults(run=_gc)
    export = action(
        "export", "pack finished runs into an archive", "viladiff runs export mine.tar.gz method.name=viladiff"
    )
    export.add_argument("file", metavar="FILE.tar.gz", help="archive to create")
    export.add_argument("runs", nargs="*", metavar="RUN", help=f"{which} (default: all finished runs)")
    export.set_defaults(run=_export)
    load = action("import", "verify and unpack an archive of runs", "viladiff runs import mine.tar.gz")
    load.add_argument("file", metavar="FILE.tar.gz", help="archive written by export")
    load.set_defaults(run=_import)


def _add_action(
    actions: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str, example: str
) -> argparse.ArgumentParser:
    """Add an action with the options that all have: the directories of runs."""
    raw = argparse.RawDescriptionHelpFormatter
    made = actions.add_parser(name, help=text, description=text, epilog=f"example:\n  {example}", formatter_class=raw)
    made.add_argument("--runs-dir", metavar="DIR", default="runs", help="directory of runs (default: runs)")
    made.add_argument(
        "--published",
        metavar="DIR",
        default="reports/published",
        help="directory of published runs, read-only (default: reports/published)",
    )
    return made


def _store(args: argparse.Namespace, repair: bool = False) -> Store:
    from viladiff.runs.store import Store

    return Store(Path(args.runs_dir), [Path(args.published)], repair=repair)


def _places(args: argparse.Namespace) -> str:
    return " or ".join(dict.fromkeys((args.runs_dir, args.published)))


def _empty(args: argparse.Namespace) -> str:
    return (
        f"No runs in {_places(args)}. To create one:\n"
        "  viladiff train method.name=viladiff data.split=183\n"
        "  make table5                                          a whole table, in minutes\n"
        "To use another directory: --runs-dir DIR. To use an archive: viladiff runs import FILE.tar.gz"
    )


def _nothing(args: argparse.Namespace, what: str = "run") -> ValueError:
    found = f"no {what} in {_places(args)}"
    return ValueError(f"{found}; create one with viladiff train, or choose another directory with --runs-dir DIR")


def _list(args: argparse.Namespace) -> int:
    from viladiff.runs import listing

    rows = listing.rows(_store(args))
    if not rows:
        print_text(_empty(args), error=args.json)
    chosen = listing.select_runs(rows, args.filters, args.state)
    chosen = listing.ordered(chosen, args.sort, args.reverse)
    if args.json:
        print_text(json.dumps([row.as_json() for row in chosen], indent=1))
    elif chosen:
        listing.print_rows(chosen)
    elif rows:
        print_text(listing.explain_no_match(rows, args.filters, args.state))
    return 0


def _show(args: argparse.Namespace) -> int:
    from viladiff.runs import listing
    from viladiff.runs.record import record_bytes

    store = _store(args)
    rows = listing.rows(store)
    if not rows:
        raise _nothing(args)
    row = listing.find_run(args.name, rows)
    if not args.json:
        listing.print_run(store, row)
    elif row.record is None:
        print_text(json.dumps(row.as_json(), indent=1))
    else:
        print_text(record_bytes(row.record).decode())
    return 0


def _diff(args: argparse.Namespace) -> int:
    from viladiff.runs import listing

    rows = listing.rows(_store(args))
    if not rows:
        raise _nothing(args)
    listing.diff(*(listing.finished(listing.find_run(name, rows)) for name in args.names))
    return 0


def _verify(args: argparse.Namespace) -> int:
    from viladiff.runs import verify_and_gc
    from viladiff.runs.listing import say

    store = _store(args)
    wanted = _verified(store, args.runs) if args.runs else None
    good = bad = 0
    for found in verify_and_gc.verify(store, wanted):
        say([("ok" if found.good else "BAD", found.run_id or "-", str(found.path), found.text)])
        good, bad = good + found.good, bad + (not found.good)
    print_text(f"{good} good, {bad} bad" if good or bad else _empty(args))
    return int(bad > 0)


def _verified(store: Store, words: list[str]) -> set[str]:
    from viladiff.runs import listing

    names = set(store.local_run_ids()) | {record.run_id for record in store.published()}
    plain = {listing.resolve_prefix(word, names) for word in words if "=" not in word}
    filters = [word for word in words if "=" in word]
    return plain | ({row.run_id for row in listing.select_runs(listing.rows(store), filters)} if filters else set())


def _gc(args: argparse.Namespace) -> int:
    from viladiff.data.cache import cache_dir
    from viladiff.runs import verify_and_gc
    from viladiff.runs.listing import size

    store = _store(args)
    found = verify_and_gc.garbage(store, args.keep_checkpoints, Path(args.pages), cache_dir())
    for item in found:
        print_text(f"{'would delete' if args.dry_run else 'deleted'}  {item.path}  {item.why}  {size(item.size)}")
        if not args.dry_run:
            verify_and_gc.remove(item)
    total = size(sum(item.size for item in found))
    kept = f"runs in {store.root}: {len(store.local_run_ids())}"
    if not found:
        print_text(f"Nothing to delete: {kept}.")
    else:
        print_text(
            f"{'It would free' if args.dry_run else 'Freed'} {total} ({len(found)} items); records stay: {kept}."
        )
    return 0


def _export(args: argparse.Namespace) -> int:
    from viladiff.runs import listing
    from viladiff.runs.archive import export
    from viladiff.runs.listing import size

    store = _store(args)
    rows = listing.rows(store)
    if not any(row.record for row in rows):
        raise _nothing(args, "finished run")
    chosen = {listing.finished(listing.find_run(word, rows)).run_id for word in args.runs if "=" not in word}
    filters = [word for word in args.runs if "=" in word]
    if filters or not args.runs:
        chosen |= {row.run_id for row in listing.select_runs(rows, filters, "done")}
    if not chosen:
        raise ValueError(listing.explain_no_match(rows, filters, "done"))
    path = Path(args.file)
    count = export(store, chosen, path)
    packed = f"{count} run{'s' * (count != 1)} in {path}, {size(path.stat().st_size)}"
    print_text(f"{packed}. Elsewhere: viladiff runs import {path.name}")
    return 0


def _import(args: argparse.Namespace) -> int:
    from viladiff.runs.archive import import_archive

    done = import_archive(_store(args, repair=True), Path(args.file))
    for run_id, what in done.items():
        print_text(f"{run_id}  {what}")
    imported = sum(what.startswith("imported") for what in done.values())
    print_text(f"{imported} of {len(done)} runs imported into {args.runs_dir}")
    return 0
