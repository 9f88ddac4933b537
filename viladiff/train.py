"""The only training loop: ``fit(cfg)`` on one process or many, interrupted or not, gives the same weights."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from viladiff import draws
from viladiff.batch import Batch, Step
from viladiff.checkpoint import StepLog, load, save
from viladiff.config import RunConfig, changed, flatten, run_id
from viladiff.data.datasets import Dataset
from viladiff.data.datasets import load as load_dataset
from viladiff.data.loader import Loader, validation
from viladiff.evaluate import STREAMS, evaluate_network, pseudo_change, pseudo_quality, pseudo_shares
from viladiff.methods import METHODS
from viladiff.methods.base import Method
from viladiff.models.backbones import SHIPPED
from viladiff.models.segmenter import Build
from viladiff.progress import Progress
from viladiff.record import RunRecord, git_state, load_record, save_record, versions
from viladiff.text.bank import Bank, load_text

if TYPE_CHECKING:
    import pandas as pd

Report = Callable[[dict[str, Any]], None]


class TrainingError(ValueError):
    """Training cannot go on; the message says where it stopped and what to change."""


@dataclass(frozen=True)
class Result:
    """A finished run."""

    directory: Path
    record: RunRecord = field(repr=False)

    @property
    def miou(self) -> float | None:
        """The headline mIoU in [0, 1]."""
        return self.record.miou

    @property
    def metrics(self) -> dict[str, float | None]:
        """Flat scores, ``network/stream/score``."""
        return {
            f"{network}/{stream}/{name}": value
            for network, streams in self.record.scores.items()
            for stream, scores in streams.items()
            for name, value in scores.items()
            if not isinstance(value, list)
        }

    def summary(self) -> dict[str, Any]:
        """The run's name, choices and scores as one flat row; ``pandas.DataFrame([r.summary() for r in results])`` is a table."""
        chosen = {path: value for path, value in self.record.changed.items() if not path.startswith("runtime.")}
        return {"run_id": self.record.run_id, **chosen, "seed": self.record.config["seed"], "miou": self.miou, **self.metrics}

    def frame(self) -> pd.DataFrame:
        """The per-step log."""
        import pandas as pd

        return pd.DataFrame(StepLog(self.directory / self.record.step_log).read())


def fit(cfg: RunConfig, *, report: Report | None = None, resume: bool = True) -> Result:
    """Trains, evaluates and records one run in ``runtime.out/<run_id>``.

    A run that is done is returned as it is, and one that was interrupted continues from its checkpoint, unless ``resume`` is False.
    ``report`` is called with the metrics of each evaluation. With ``runtime.workers`` > 1 and no process group, the workers are
    started here; inside an existing group (torchrun, Ray Train) the loop joins it.
    Raises TrainingError for a loss that is not finite and for too little memory, ValueError for inputs that cannot be used.
    """
    _join_group(cfg)
    world = dist.get_world_size() if dist.is_initialized() else 1
    if dist.is_initialized() and world != cfg.runtime.workers:
        raise ValueError(f"runtime.workers = {cfg.runtime.workers}, but the process group has {world} workers")
    if cfg.runtime.workers > 1 and not dist.is_initialized():
        from viladiff.launch import launch

        if report is not None:
            raise ValueError("report: a callback cannot be sent to other processes; call fit inside a process group")
        return launch(cfg, resume)
    return Run(cfg).execute(report, resume)


def _join_group(cfg: RunConfig) -> None:
    """Joins the group that torchrun announces in the environment."""
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(os.environ) and not dist.is_initialized() and cfg.runtime.workers > 1:
        dist.init_process_group("nccl" if pick_device(cfg).type == "cuda" else "gloo")


def pick_device(cfg: RunConfig) -> torch.device:
    """The device of this worker. Raises ValueError where CUDA is asked for and absent."""
    available = torch.cuda.is_available()
    if cfg.runtime.device == "cuda" and not available:
        raise ValueError('runtime.device = "cuda": this machine has no usable CUDA device (use auto or cpu)')
    if cfg.runtime.device == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def total_steps(cfg: RunConfig, dataset: Dataset, uses_unlabelled: bool) -> int:
    """Optimiser steps of the run; an epoch is one pass over the unlabelled list, or over the labelled one if nothing else is used."""
    if cfg.train.steps is not None:
        return cfg.train.steps
    assert cfg.train.epochs is not None
    images, batch = len(dataset.labelled), cfg.data.batch_labelled
    if uses_unlabelled and len(dataset.unlabelled):
        images, batch = len(dataset.unlabelled), cfg.data.batch_unlabelled
    return max(1, math.ceil(cfg.train.epochs * images / batch))


def lr_factor(cfg: RunConfig, step: int, steps: int) -> float:
    """Share of the base learning rate at ``step`` of ``steps``: linear warm-up, then poly, cosine or constant."""
    optim = cfg.optim
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    if optim.schedule == "poly":
        return float((1 - progress) ** optim.poly_power)
    return 0.5 * (1 + math.cos(math.pi * progress)) if optim.schedule == "cosine" else 1.0


def param_groups(method: nn.Module, cfg: RunConfig) -> list[dict[str, Any]]:
    """Four groups: encoder or not, with weight decay (matrices and kernels) or without (biases, norms)."""
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((".encoder." in f".{name}", parameter.ndim >= 2), []).append(parameter)
    return [
        {
            "params": parameters,
            "scale": cfg.optim.encoder_lr_scale if encoder else 1.0,
            "weight_decay": cfg.optim.weight_decay if decays else 0.0,
        }
        for (encoder, decays), parameters in groups.items()
    ]


class Run:
    """One worker's side of a run."""

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg, self.device = cfg, pick_device(cfg)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        if cfg.runtime.threads is not None:
            torch.set_num_threads(cfg.runtime.threads)
        self.dataset = load_dataset(cfg.data.dataset, cfg.data.split, split_seed=cfg.data.split_seed)
        # Words are looked up even where the method reads none: the shared input of all methods is then checked alike.
        self.bank, self.val_bank = load_text(self.dataset, cfg.data.text_encoder, cfg.data.captions)
        self.fingerprints = {"data": self.dataset.fingerprint, "text": self.bank.fingerprint, **weights_fingerprint(cfg)}
        self.name = run_id(cfg, self.fingerprints)
        self.directory = Path(cfg.runtime.out).expanduser().resolve() / self.name
        self.started = time.time()

    def execute(self, report: Report | None, resume: bool) -> Result:
        """The whole life of the run; see ``fit``."""
        done = self.directory / "record.json"
        if resume and done.is_file():
            return Result(self.directory, load_record(done))
        if self.rank == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            if not resume:
                for name in ("record.json", "checkpoint.pt", "checkpoint.prev.pt", "steps.jsonl"):
                    (self.directory / name).unlink(missing_ok=True)
        self._barrier()
        with _memory_errors(self.cfg):
            self._build()
            self._restore()
            self._train(report)
            record = self._finish()
        if self.rank == 0:
            save_record(record, done)
        self._barrier()
        return Result(self.directory, load_record(done))

    # Making and restoring

    def _build(self) -> None:
        cfg = self.cfg
        torch.manual_seed(draws.key(cfg.seed, "init"))
        build = Build(cfg.model, self.dataset.num_classes, self.bank.dim)
        self.method: Method = METHODS[cfg.method.name](cfg.method, build).to(self.device)
        views = self.method.views_wanted()
        if views.unlabelled and cfg.data.crop % self.method.student.patch:
            raise ValueError(f"data.crop = {cfg.data.crop}: must be a multiple of the encoder's patch, {self.method.student.patch}")
        self.steps = total_steps(cfg, self.dataset, views.unlabelled)
        patch = self.method.student.patch
        bank = self.bank if views.text else None
        self.loader = Loader(cfg, self.dataset, views, bank, patch, self.device, self.rank, self.world)
        self.model: nn.Module = self.method
        if self.world > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.model = nn.parallel.DistributedDataParallel(self.method, device_ids=ids, broadcast_buffers=False)
        self.optimizer = torch.optim.AdamW(param_groups(self.method, cfg), cfg.optim.lr, cfg.optim.betas, fused=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=cfg.train.precision == "fp16")
        self.log = StepLog(self.directory / "steps.jsonl")
        self.history: list[dict[str, Any]] = []
        self.step, self.train_seconds = 0, 0.0

    def _restore(self) -> None:
        state = load(self.directory / "checkpoint.pt")
        if state is not None:
            self.method.load_state_dict(state["method"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.step, self.history, self.train_seconds = state["step"], state["history"], state["train_seconds"]
        if self.rank == 0:
            self.log.truncate_to(self.step)

    def _save(self) -> None:
        if self.rank:
            return
        self.log.flush()
        state = {
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "history": self.history,
            "train_seconds": self.train_seconds,
        }
        save(self.directory / "checkpoint.pt", state)

    # The loop

    def _train(self, report: Report | None) -> None:
        cfg, runtime = self.cfg, self.cfg.runtime
        self.method.train()
        pending: list[tuple[int, float, dict[str, Tensor]]] = []
        writer = self._tensorboard()
        ahead = 2 if self.device.type == "cuda" else 0
        with Progress(self.steps, self.step, self._title(), runtime.progress and self.rank == 0) as bar, _stop_flag() as stop:
            mark = time.perf_counter()
            for batches in self.loader.stream(self.step, self.steps, ahead):
                pending.append((self.step, lr_factor(cfg, self.step, self.steps) * cfg.optim.lr, self._step(batches)))
                self.step += 1
                last = self.step == self.steps
                evaluate = cfg.eval.every and self.step % cfg.eval.every == 0 and not last
                keep = self.step % runtime.checkpoint_every == 0 or last or evaluate
                agree = self.world == 1 or self.step % 10 == 0
                stopped = agree and self._any(stop.is_set())
                if keep or stopped or self.step % runtime.log_every == 0:
                    self.train_seconds += time.perf_counter() - mark
                    bar.note(self._write(pending, writer))
                    if evaluate:
                        self._evaluate_now(report)
                    if keep or stopped:
                        self._save()
                    mark = time.perf_counter()
                bar.advance()
                if stopped:
                    raise KeyboardInterrupt(f"stopped at step {self.step} of {self.steps}; the same command continues from there")
        if writer is not None:
            writer.close()

    def _step(self, batches: list[Batch]) -> dict[str, Tensor]:
        """One optimiser step on this worker's micro-batches; returns the mean of their loss terms, not yet synchronised."""
        cfg = self.cfg
        step = Step(self.step, self.step / self.steps, cfg.seed)
        torch.manual_seed(draws.key(cfg.seed, "dropout", self.step, self.rank))
        factor = lr_factor(cfg, self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = cfg.optim.lr * factor * group["scale"]
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[cfg.train.precision]
        sums: dict[str, Tensor] = {}
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            hold = nullcontext() if last or self.world == 1 else self.model.no_sync()  # type: ignore[operator]
            with hold:
                with torch.autocast(self.device.type, dtype, enabled=cfg.train.precision != "fp32"):
                    losses = self.model(batch, step)
                self.scaler.scale(losses.total / len(batches)).backward()
            for name, value in {"total": losses.total.detach(), **losses.terms}.items():
                sums[name] = sums.get(name, 0) + value.float() / len(batches)
        if cfg.optim.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.method.parameters(), cfg.optim.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            self.method.after_step(step)
        return sums

    def _write(self, pending: list[tuple[int, float, dict[str, Tensor]]], writer: Any) -> float:
        """Brings the loss terms of the last steps to the host in one go, checks them and logs them; returns the newest total."""
        names = list(pending[0][2])
        table = torch.stack([torch.stack([terms[name].to(self.device) for name in names]) for _, _, terms in pending])
        if self.world > 1:
            dist.all_reduce(table)
            table /= self.world
        rows = table.cpu().tolist()
        for (step, lr, _), row in zip(pending, rows, strict=True):
            values = dict(zip(names, row, strict=True))
            broken = [name for name, value in values.items() if not math.isfinite(value)]
            if broken:
                raise TrainingError(self._broken(step, broken, values))
            if self.rank == 0:
                self.log.append({"step": step, "lr": lr, **values})
                if writer is not None:
                    for name, value in values.items():
                        writer.add_scalar(name, value, step)
        pending.clear()
        if self.rank == 0:
            self.log.flush()
        return rows[-1][names.index("total")]

    def _broken(self, step: int, broken: list[str], values: dict[str, float]) -> str:
        cfg = self.cfg
        terms = [name for name in broken if name != "total"] or broken
        kept = f"the checkpoint in {self.directory} is from before it" if (self.directory / "checkpoint.pt").exists() else ""
        return (
            f"the loss is {values[broken[0]]} at step {step} of {self.steps} (terms: {', '.join(terms)}) with optim.lr = {cfg.optim.lr:g}, "
            f'train.precision = "{cfg.train.precision}"; try a lower optim.lr, optim.clip_norm=1 or train.precision=fp32. {kept}'
        ).strip()

    def _tensorboard(self) -> Any:
        if not self.cfg.runtime.tensorboard or self.rank:
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("runtime.tensorboard = true: the package tensorboard is not installed") from error
        return SummaryWriter(str(self.directory / "tensorboard"))

    def _any(self, flag: bool) -> bool:
        """Whether any worker has raised the flag; all workers must ask at the same step."""
        if self.world == 1:
            return flag
        asked = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(asked)
        return bool(asked.item())

    def _barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def _title(self) -> str:
        cfg = self.cfg
        return f"{cfg.method.name} on {cfg.data.dataset} {cfg.data.split}, seed {cfg.seed}"

    # Evaluation

    def _validation(self) -> Iterator[Any]:
        images = len(self.dataset.val_images)
        count = min(images, self.cfg.eval.images or images)
        batch = 1 if self.cfg.eval.protocol != "original" else 25
        bank = self.val_bank if self.method.views_wanted().text else None
        return validation(self.dataset, bank, self.device, batch, range(self.rank, count, self.world))

    def _scores(self, network: nn.Module, streams: tuple[str, ...], boundary: bool) -> dict[str, dict[str, Any]]:
        ev = self.cfg.eval
        found = evaluate_network(
            network, self._validation(), streams, self.dataset.num_classes, boundary, ev.protocol, self.cfg.data.crop
        )
        return {name: asdict(scores) for name, scores in found.items()}

    def _evaluate_now(self, report: Report | None) -> None:
        """A quick look on the way: the headline stream of the predictor, without boundary scores."""
        stream = self.method.headline()
        scores = self._scores(self.method.predictor(), (stream,), False)
        self.history.append({"step": self.step, "miou": scores[stream]["miou"] if stream in scores else None})
        if report is not None:
            report(dict(self.history[-1]))

    def _pseudo(self) -> dict[str, float | None]:
        """Quality of the pseudo-labels on validation images, since masks of unlabelled images are never read."""
        threshold = getattr(getattr(self.cfg.method, "pseudo", None), "threshold", None)
        if threshold is None:
            return {}
        self.method.eval()
        sums: dict[str, dict[str, Tensor]] = {}
        step = Step(self.steps, 1.0, self.cfg.seed)
        for i, (images, target, text) in enumerate(self._validation()):
            keys = tuple((i * self.world + self.rank) * 1000 + j for j in range(len(images)))
            stages = {name: p.max(1) for name, p in self.method.pseudo_labels(images, text, keys, step).items()}
            found = {name: pseudo_quality(p.values, p.indices, target, threshold) for name, p in stages.items()}
            if "after" in stages:
                before, after = ((stages[name].values, stages[name].indices) for name in ("before", "after"))
                found["change"] = pseudo_change(before, after, target, threshold)
            for name, counts in found.items():
                into = sums.setdefault(name, {})
                for what, count in counts.items():
                    into[what] = into.get(what, 0) + count
        out: dict[str, float | None] = {}
        for name, counts in sums.items():
            if self.world > 1:
                for count in counts.values():
                    dist.all_reduce(count)
            prefix = "" if name == "change" else f"{name}/"
            out |= {f"{prefix}{what}": share for what, share in pseudo_shares(counts).items()}
        return out

    def _finish(self) -> RunRecord:
        cfg = self.cfg
        predictor, stream = self.method.predictor(), self.method.headline()
        scores = {name: self._scores(net, STREAMS, cfg.eval.boundary) for name, net in self.method.networks().items()}
        network = next(name for name, net in self.method.networks().items() if net is predictor)
        miou = scores[network][stream]["miou"] if stream in scores[network] else None
        history = [*self.history, {"step": self.steps, "miou": miou}]
        measured = [entry for entry in history if entry["miou"] is not None]
        cuda = self.device.type == "cuda"
        return RunRecord(
            run_id=self.name,
            config=flatten(cfg),
            changed=changed(cfg),
            fingerprints=self.fingerprints,
            steps=self.steps,
            miou=miou,
            network=network,
            stream=stream,
            scores=scores,
            best=max(measured, key=lambda entry: entry["miou"]) if len(measured) > 1 else None,
            history=history,
            pseudo_labels=self._pseudo(),
            class_names=list(self.dataset.class_names),
            captions=self.dataset.caption_source,
            text_encoder=cfg.data.text_encoder,
            encoder=cfg.model.encoder,
            pretrained=cfg.model.weights or cfg.model.pretrained,
            wall_seconds=time.time() - self.started,
            train_seconds=self.train_seconds,
            seconds_per_step=self.train_seconds / self.steps,
            peak_memory_bytes=torch.cuda.max_memory_allocated() if cuda else _peak_memory(),
            workers=self.world,
            threads=torch.get_num_threads(),
            device=torch.cuda.get_device_name() if cuda else "cpu",
            versions=versions(),
            git=git_state(),
        )


def weights_fingerprint(cfg: RunConfig) -> dict[str, str]:
    """Checksum of the file that the encoder starts from, where there is one."""
    import hashlib

    path = Path(cfg.model.weights) if cfg.model.weights else SHIPPED if cfg.model.pretrained == "shipped" else None
    if path is None:
        return {}
    if not path.is_file():
        raise ValueError(f"weights file {path} does not exist (model.weights, model.pretrained)")
    return {"weights": hashlib.sha256(path.read_bytes()).hexdigest()[:16]}


def _peak_memory() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def _stop_flag() -> Iterator[threading.Event]:
    """Set by the first Ctrl-C or SIGTERM, so that a step is never torn; a second one stops at once."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag  # trials of a sweep run in other threads, where no handler can be set
        return
    old = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: Any) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()

    for number in old:
        signal.signal(number, handle)
    try:
        yield flag
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def _memory_errors(cfg: RunConfig) -> Iterator[None]:
    """Turns an allocation that fails into an error that names what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        out = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not out:
            raise
        data = cfg.data
        raise TrainingError(
            f"out of memory with data.batch_labelled = {data.batch_labelled}, data.batch_unlabelled = {data.batch_unlabelled}, "
            f"data.crop = {data.crop}, train.accumulate = {cfg.train.accumulate} on {cfg.runtime.workers} workers: raise train.accumulate "
            f"(same result, less memory), lower data.crop or the batch ({str(error).splitlines()[0]})"
        ) from error


__all__ = ["Bank", "Result", "Run", "TrainingError", "fit"]
