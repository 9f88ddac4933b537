"""The commands ``viladiff caption`` and ``viladiff embed``: captions of images, and captions as vectors.

Only the standard library is loaded until a command is executed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from viladiff.cli.common import positive
from viladiff.core.messages import print_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from viladiff.runs.config import RunConfig
    from viladiff.text.captioning.job import CaptioningJob

CAPTION_EXAMPLES = """\
examples:
  viladiff caption photos --model blip2-opt-2.7b --dry-run
  viladiff caption photos --model blip2-opt-2.7b --out photos.parquet
  viladiff caption VOC2012 --model blip2-opt-2.7b --actors 4 --address auto
  viladiff train method.name=viladiff data.dataset=folder runtime.data_root=photos --captions photos.parquet

The model is a directory of files saved by transformers; nothing is downloaded. Re-running the command resumes
an interrupted job and retries failed images.
"""
EMBED_EXAMPLES = """\
examples:
  viladiff embed data.dataset=voc runtime.data_root=VOC2012 data.text_encoder=open_clip \\
    --captions voc.parquet --text-model CLIP-ViT-B-16
  viladiff embed data.text_encoder=minilm           the built-in data set; requires: pip install "viladiff[minilm]"

Accepts the fields of viladiff train, which reads the encoded captions from the cache.
"""
SHOWN = 20


def add_text(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``caption`` and ``embed`` to the subparsers of ``viladiff``."""
    raw = argparse.RawDescriptionHelpFormatter
    text = "caption the images of a data set with BLIP-2, by Ray Data"
    caption = commands.add_parser("caption", help=text, description=text, epilog=CAPTION_EXAMPLES, formatter_class=raw)
    caption.add_argument("source", metavar="ROOT|DATASET", help="directory of a data set, or digits, or dense")
    caption.add_argument("--model", required=True, metavar="DIR", help="directory of a BLIP-2 model")
    caption.add_argument(
        "--out", metavar="FILE", default="captions.parquet", help="Parquet file to write (default: %(default)s)"
    )
    caption.add_argument(
        "--prompt",
        metavar="TEXT",
        action="append",
        help="prompt of one caption per image; repeatable (default: the paper's two)",
    )
    caption.add_argument(
        "--actors", metavar="N", type=positive, help="number of model replicas (default: one per GPU, or one)"
    )
    caption.add_argument("--batch", metavar="N", type=positive, default=16, help="images per batch (default: 16)")
    caption.add_argument(
        "--threads", metavar="N", type=positive, default=1, help="CPU threads per replica (default: 1)"
    )
    caption.add_argument(
        "--address", metavar="ADDRESS", help="address of a Ray cluster, which must be able to read the files"
    )
    caption.add_argument("--dry-run", action="store_true", help="print the planned job, and exit")
    caption.add_argument("--quiet", action="store_true", help="hide the progress bar")
    caption.set_defaults(run=_caption)

    text = "encode captions into the cache before training"
    embed = commands.add_parser("embed", help=text, description=text, epilog=EMBED_EXAMPLES, formatter_class=raw)
    embed.add_argument("fields", nargs="*", metavar="FIELD=VALUE", help="configuration fields, as of viladiff train")
    embed.add_argument("--captions", metavar="FILE", help="captions as CSV, JSON lines or Parquet (runtime.captions)")
    embed.add_argument("--text-model", metavar="DIR", help="directory of the text encoder (runtime.text_model)")
    embed.add_argument("--dry-run", action="store_true", help="print what would be encoded, and exit")
    embed.add_argument("--quiet", action="store_true", help="hide the progress bar")
    embed.set_defaults(run=_embed)


def _caption(args: argparse.Namespace) -> int:
    from viladiff.core.progress import counter
    from viladiff.data.captions.simulated import PROMPTS
    from viladiff.text.captioning.blip2 import writer
    from viladiff.text.captioning.job import CaptioningJob, failures, pictures, state

    who = writer(args.model, tuple(args.prompt or PROMPTS))
    job = CaptioningJob(*pictures(args.source), who, Path(args.out).expanduser().absolute())
    todo = len(state(job).todo)
    if args.dry_run:
        _print(_facts(job, todo, args))
        return 0
    if not todo and job.out.is_file() and not job.parts.is_dir():
        print_text(f"{job.out}: complete, {len(job.pictures)} images; nothing to do")
        return 0
    from viladiff.cluster.captioning import run_job

    options = {"actors": args.actors, "batch": args.batch, "threads": args.threads, "address": args.address}
    with counter("captioning", not args.quiet) as advance:
        table = run_job(job, **options, advance=advance)
    lost = failures(table)
    print_text(
        f"{job.out}: {len(table) - len(lost) * len(who.prompts)} captions of {len(job.pictures) - len(lost)} images"
    )
    for image, reason in list(lost.items())[:SHOWN]:
        print_text(f"failed: {image}: {reason}", error=True)
    if len(lost) > SHOWN:
        print_text(f"... and {len(lost) - SHOWN} more, in the column 'error' of {job.out}", error=True)
    return int(bool(lost))


def _facts(job: CaptioningJob, todo: int, args: argparse.Namespace) -> dict[str, object]:
    return {
        "images": len(job.pictures),
        "captioned before": len(job.pictures) - todo,
        "to be captioned": todo,
        "prompts": " | ".join(job.who.prompts),
        "model": f"{job.who.model}, revision {job.who.revision}",
        "models at once": args.actors or "one a GPU, or one",
        "images at once": args.batch,
        "file": job.out,
    }


def _embed(args: argparse.Namespace) -> int:
    from viladiff.core.progress import counter
    from viladiff.data.registry import dataset_spec, load_dataset
    from viladiff.runs.config import RunConfig, override, parse_overrides
    from viladiff.text.embedding_bank import is_encoded, load_text

    named = {"runtime.captions": args.captions, "runtime.text_model": args.text_model}
    words = [*args.fields, *(f"{path}={value}" for path, value in named.items() if value is not None)]
    cfg = override(RunConfig(), dict(parse_overrides(words)))
    dataset = load_dataset(*dataset_spec(cfg))
    if not any(dataset.captions):
        raise ValueError(f"the data set {cfg.data.dataset!r} has no captions to encode; use --captions FILE")
    asked = cfg.data.text_encoder, cfg.data.captions
    before = is_encoded(dataset, *asked, model=cfg.runtime.text_model, on=cfg.data.captions_on)
    if args.dry_run:
        _print(_wanted(cfg, dataset.caption_source, [*dataset.captions, *dataset.val_captions], before))
        return 0
    with counter("encoding captions", not args.quiet) as advance:
        model, on = cfg.runtime.text_model, cfg.data.captions_on
        train, val = load_text(dataset, *asked, model=model, advance=advance, on=on)
    size = train.tokens.nbytes + train.mask.nbytes + train.pooled.nbytes
    facts = {
        "captions": train.source,
        "encoder": train.encoder,
        "images": f"{len(train)} for training, {len(val)} for validation",
        "tokens of an image, channels": f"up to {train.tokens.shape[1]}, {train.dim}",
        "on disk": f"{size / 2**20:.1f} MiB" + (", encoded before" if before else ""),
        "name": train.fingerprint,
    }
    _print(facts)
    for note in (*dataset.notes, *train.notes()):
        print_text(f"note: {note}", error=True)
    return 0


def _wanted(cfg: RunConfig, source: str, captions: list[tuple[str, ...]], before: bool) -> dict[str, object]:
    return {
        "captions": source,
        "encoder": cfg.data.text_encoder,
        "images": len(captions),
        "different texts": len({text for lines in captions for text in lines}),
        "encoded before": "yes" if before else "no",
    }


def _print(facts: Mapping[str, object]) -> None:
    width = max(map(len, facts))
    for name, value in facts.items():
        print_text(f"{name:<{width}}  {value}")
