"""The training loop: ``fit(cfg)`` on one process or many, interrupted or not, gives the same weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from viladiff.core import keyed_random
from viladiff.core.distributed import autocast, in_turn, tf32
from viladiff.core.messages import print_text
from viladiff.core.progress import Progress, counter
from viladiff.data.batch import Batch, Step
from viladiff.data.files.run_checks import check_files
from viladiff.data.loader import BatchLoader
from viladiff.data.loading.picture_space import picture_notes
from viladiff.data.registry import dataset_spec
from viladiff.data.registry import load_dataset as load_dataset
from viladiff.evaluation import evaluator
from viladiff.methods import METHODS
from viladiff.methods.base import Method
from viladiff.models.batch_norm import average_statistics, statistics_notes, synchronise
from viladiff.models.encoders.build import input_note
from viladiff.models.segmenter import NetworkFactory
from viladiff.runs.checkpoint import StepLog, previous
from viladiff.runs.config import RunConfig, run_id
from viladiff.runs.lease import Lease, acquire_or_raise
from viladiff.runs.record import load_record, save_record
from viladiff.text.embedding_bank import load_text, text_vectors, uneven_notes
from viladiff.trackers.base import Callback, Callbacks, RunInfo, tracked_config
from viladiff.trackers.build import asked_trackers
from viladiff.training.errors import (
    RunIdMismatchError,
    StopRequested,
    check_finite,
    check_inputs,
    memory_errors,
    stop_flag,
)
from viladiff.training.feasibility import refuse_infeasible
from viladiff.training.fingerprints import (
    data_facts,
    scoring_fingerprint,
    scoring_precision,
    sizes_fingerprint,
    weights_fingerprint,
)
from viladiff.training.gradients import GradientShares
from viladiff.training.launch import compiles, data_parallel, join_group, run_in_processes, select_device, step_forward
from viladiff.training.optim import Optimizer, evaluation_steps, lr_factor, param_groups, total_steps
from viladiff.training.result import Result
from viladiff.training.saving import CheckpointWriter, restore, state_of

ProgressCallback = Callable[[dict[str, Any]], bool | None]
"""Called by every worker with step and steps: at each log also loss, history (all scores so far), and miou where one
was measured, then True asks to stop; with history after a checkpoint was read, likewise; and with evaluating = True
while no step ends."""


def fit(
    cfg: RunConfig,
    *,
    report: ProgressCallback | None = None,
    callbacks: Sequence[Callback] = (),
    resume: bool = True,
    lease: Lease | None = None,
) -> Result:
    """Train, evaluate and record one run in ``runtime.runs_dir/<run_id>``.

    A finished run is returned as it is, and an interrupted one continues from its checkpoint, unless ``resume`` is
    False. ``report`` is called at each log and evaluation and may end the run early (StopRequested); ``callbacks``
    follow the run in its first worker, beside the trackers that ``runtime`` asks for. With
    ``runtime.workers`` > 1 and no process group, the workers are started here; inside an existing group (torchrun, Ray
    Train) the loop joins it. One process at a time works on a run: a lease on its directory is acquired, unless the
    caller holds one and passes it as ``lease``.

    Raises RunIdMismatchError if that lease is on another run's directory, LeaseLostError once another machine has taken
    over, TrainingError for a loss that is not finite and for too little memory, ValueError for unusable inputs.
    """
    join_group(cfg)
    world = dist.get_world_size() if dist.is_initialized() else 1
    if dist.is_initialized() and world != cfg.runtime.workers:
        raise ValueError(f"runtime.workers = {cfg.runtime.workers}, but the process group has {world} workers")
    if cfg.runtime.workers > 1 and not dist.is_initialized():
        if name := "callbacks" if callbacks else "report" if report is not None else "":
            raise ValueError(f"{name}: cannot be sent to other processes; call fit inside a process group")
        finished, _, directory = run_in_processes(_fitted, cfg, cfg.runtime.workers, resume).partition(" ")
        return Result(Path(directory), load_record(Path(directory) / "record.json"), bool(finished))
    return Trainer(cfg, callbacks).execute(report, resume, lease)


def _fitted(cfg: RunConfig, resume: bool) -> str:
    result = fit(cfg, resume=resume)
    return f"{'finished' * result.already_finished} {result.directory}"


class Trainer:
    """One worker's side of a run."""

    def __init__(self, cfg: RunConfig, callbacks: Sequence[Callback] = ()) -> None:
        self.cfg, self.device, self.started = cfg, select_device(cfg), time.monotonic()
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if cfg.runtime.threads is not None:
            torch.set_num_threads(cfg.runtime.threads)
        self.dataset = in_turn(lambda: load_dataset(*dataset_spec(cfg)))
        # Words are looked up even where the method reads none: the shared input of all methods is then checked alike.
        with counter("encoding captions", cfg.runtime.progress and not self.rank) as advance:
            text_source = cfg.data.text_encoder, cfg.data.captions
            self.bank, self.val_bank = load_text(
                self.dataset, *text_source, model=cfg.runtime.text_model, advance=advance, on=cfg.data.captions_on
            )
        self.fingerprints = {
            "data": self.dataset.fingerprint,
            "text": self.bank.fingerprint,
            **weights_fingerprint(cfg),
            **sizes_fingerprint(cfg),
            **scoring_fingerprint(cfg),
        }
        self.scoring = scoring_precision(cfg)
        self.name = run_id(cfg, self.fingerprints)
        self.directory = Path(cfg.runtime.runs_dir).expanduser().resolve() / self.name
        self.wall_before: float | None = 0.0
        """Seconds of earlier legs, up to their last checkpoints; None where an older version kept none."""
        self.report: ProgressCallback | None = None
        self.lease: Lease | None = None
        self.memory = evaluator.PeakMemory(self.device)
        self.callbacks = Callbacks([] if self.rank else callbacks, [] if self.rank else asked_trackers(cfg.runtime))

    def execute(self, report: ProgressCallback | None, resume: bool, lease: Lease | None = None) -> Result:
        """Run from start to record; see ``fit``."""
        self.report, self.lease = report, lease
        done = self.directory / "record.json"
        if lease is not None and lease.path.parent.name != self.name:
            planned = lease.path.parent.name
            raise RunIdMismatchError(
                f"planned as {planned}, it would be {self.name} now: its code, data or weights have changed"
            )
        if resume and done.is_file():
            return Result(self.directory, load_record(done), True)
        if lease is not None or self.rank:
            return self._carry_out(done, resume)
        with acquire_or_raise(self.directory) as self.lease:
            if resume and self.world == 1 and done.is_file():  # whoever had the lease has just finished
                return Result(self.directory, load_record(done), True)
            return self._carry_out(done, resume)

    def wall_seconds(self) -> float | None:
        """Return the seconds of all legs, without work after the last checkpoint that a kill undid."""
        return None if self.wall_before is None else self.wall_before + time.monotonic() - self.started

    def _carry_out(self, done: Path, resume: bool) -> Result:
        self.memory.start()
        self.directory.mkdir(parents=True, exist_ok=True)
        self._barrier()
        with memory_errors(self.cfg), tf32(self.cfg.train.tf32):
            self._build()
            if resume:
                restore(self)
                if self.rank == 0:
                    self.log.truncate_to(self.step)
            with self.callbacks as following:
                following.start(self._info())
                if self.rank == 0 and not resume:  # not before: what cannot start leaves the old run as it is
                    for name in ("record.json", "checkpoint.pt", "checkpoint.prev.pt", "steps.jsonl", *evaluator.FILES):
                        (self.directory / name).unlink(missing_ok=True)
                self._recall()
                self._train()
                record = evaluator.record(self)
                evaluator.save_qualitative(self)
                self._check_lease()
                if self.rank == 0:
                    previous(self.saver.path).unlink(missing_ok=True)
                    save_record(record, done)
                following.end(record)
        self._barrier()
        return Result(self.directory, load_record(done))

    # Making and restoring

    def _build(self) -> None:
        cfg = self.cfg
        stored, unlabelled = cfg.runtime.picture_cache, METHODS[cfg.method.name].views.unlabelled
        pictures = in_turn(lambda: picture_notes(self.dataset, unlabelled)) if stored else ()
        for note in (*in_turn(lambda: check_files(self.dataset)), *self.bank.notes(), *pictures):
            if self.rank == 0:
                print_text(f"note: {note}", error=True)
        in_turn(lambda: refuse_infeasible(cfg, data_facts(self.dataset)))
        compiled = compiles(cfg, self.dataset.num_classes, self.device, total_steps(cfg, self.dataset, unlabelled))
        torch.manual_seed(keyed_random.seed_for(cfg.seed, "init"))
        self.method: Method = METHODS[cfg.method.name](cfg.method, self.build()).to(self.device)
        own = [
            *self.method.student.encoder.notes,
            *statistics_notes(self.method, self.device, self.world),
            *input_note(cfg.model, cfg.data.pixels.inputs),
            *uneven_notes(self.bank, self.dataset, self.method.labels_read_text),
        ]
        for note in (*self.method.notes(), *own) if self.rank == 0 else ():
            print_text(f"note: {note}", error=True)
        synchronise(self.method, self.device, self.world)
        views = self.method.required_views()
        check_inputs(cfg, self.method, data_facts(self.dataset))
        self.steps = total_steps(cfg, self.dataset, views.unlabelled)
        self.evaluated_at = evaluation_steps(cfg, self.dataset, views.unlabelled, self.steps)
        patch = self.method.student.patch
        bank = self.bank if views.text else None
        self.loader = BatchLoader(cfg, self.dataset, views, bank, patch, self.device, self.rank, self.world)
        self.pace = self.loader.pace
        self.model: nn.Module = self.method if self.world == 1 else data_parallel(self.method, self.device)
        self.forward = step_forward(cfg, self.model, self.method, self.device, compiled)
        self.optimizer = Optimizer(param_groups(self.method, cfg), cfg)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=cfg.train.precision == "fp16")
        self.log = StepLog(self.directory / "steps.jsonl")
        minutes = math.inf if self.rank else cfg.runtime.checkpoint_minutes  # the first worker decides and writes
        self.saver = CheckpointWriter(self.directory / "checkpoint.pt", minutes, self.device, self._check_lease)
        self.history: list[dict[str, Any]] = []
        self.shares = GradientShares(cfg, self.method, self.steps)
        self.step, self.train_seconds = 0, 0.0
        self._mark = 0.0, 0.0
        self.cpu_seconds: float | None = 0.0

    def build(self) -> NetworkFactory:
        """Return the factory of the method's networks."""
        cfg, data = self.cfg, self.dataset
        texts = text_vectors(data, cfg.data.text_encoder, cfg.runtime.text_model)
        names, inputs = data.class_names, data.pixels.inputs
        return NetworkFactory(
            cfg.model, data.num_classes, self.bank.dim, data.name, names, cfg.data.crop, texts, inputs
        )

    def _recall(self) -> None:
        """Report the earlier evaluations again after an interruption: their receiver may have died with it."""
        if self.report is None or not self.history:
            return
        if self._any(bool(self.report({"step": self.step, "steps": self.steps, "history": self.history})))[0]:
            raise StopRequested(f"stopped at step {self.step} of {self.steps}; the same command continues from there")

    def _save(self, wait: bool = False) -> None:
        """Save in a thread; ``wait`` for its end, where the run may end or training does."""
        if self.rank:
            return
        self.log.flush()
        if not nn.utils.get_total_norm([p.detach() for p in self.method.parameters()]).isfinite():
            # The loss may still be finite where a gradient was not; such weights must not replace good ones.
            check_finite({"weights": math.nan}, self.step, self.steps, self.cfg, self.directory)
        self.saver.save(state_of(self))
        if wait:
            self.saver.wait()

    # The loop

    def _train(self) -> None:
        cfg, runtime, every = self.cfg, self.cfg.runtime, self.cfg.runtime.checkpoint_every
        self.method.train()
        pending: list[tuple[int, float, dict[str, Tensor]]] = []
        ahead = 2 if self.device.type == "cuda" else 0
        with (
            self.saver,
            Progress(self.steps, self.step, self._title(), runtime.progress and self.rank == 0) as bar,
            stop_flag() as stop,
            closing(self.loader.stream(self.step, self.steps, ahead)) as stream,
        ):
            self._lap(training=False)
            for batches in stream:
                pending.append((self.step, lr_factor(cfg, self.step, self.steps) * cfg.optim.lr, self._step(batches)))
                self.step += 1
                last = self.step == self.steps
                evaluate = self.step in self.evaluated_at
                agree = self.world == 1 or self.step % 10 == 0
                stopped, due = self._any(stop.is_set(), self.saver.due()) if agree else (False, False)
                keep = due or last or (every > 0 and (evaluate or self.step % every == 0))
                stop_requested = False
                if keep or evaluate or stopped or self.step % runtime.log_every == 0:
                    self._check_lease()
                    loss = self._write(pending)
                    bar.note(loss)
                    self._lap()  # after the log, which waits for the device
                    update = {"step": self.step, "steps": self.steps, "loss": loss, "history": self.history}
                    if evaluate:
                        update |= self._evaluate_now()
                    if self.report is not None:
                        stop_requested = self._any(bool(self.report(update)))[0] and not last
                    self._lap(training=False)
                    if keep or stopped or stop_requested:
                        self._save(wait=last or stopped or stop_requested)
                bar.advance()
                if stopped or stop_requested:
                    text = f"stopped at step {self.step} of {self.steps}; the same command continues from there"
                    raise StopRequested(text) if stop_requested else KeyboardInterrupt(text)
            self._lap()

    def _lap(self, training: bool = True) -> None:
        """Add what has passed since the last call to the time of training, unless it went into something else."""
        now = time.perf_counter(), time.process_time()
        if training:
            self.train_seconds += now[0] - self._mark[0]
            if self.cpu_seconds is not None:
                self.cpu_seconds += now[1] - self._mark[1]
        self._mark = now

    def _step(self, batches: list[Batch]) -> dict[str, Tensor]:
        """Take one optimiser step on this worker's micro-batches; return the mean of their terms, unsynchronised."""
        cfg = self.cfg
        step = Step(self.step, self.step / self.steps, cfg.seed)
        torch.manual_seed(keyed_random.seed_for(cfg.seed, "dropout", self.step, self.rank))
        factor = lr_factor(cfg, self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = cfg.optim.lr * factor * group["scale"]
        sums: dict[str, Tensor] = {}
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            hold = nullcontext() if last or self.world == 1 else self.model.no_sync()  # type: ignore[operator]
            with hold:
                with autocast(self.device, cfg.train.precision):
                    losses = self.forward(batch, step)
                self.shares.add(self.step, losses, self._factor() / len(batches))
                self.scaler.scale(losses.total / len(batches)).backward()
            for name, value in {"total": losses.total.detach(), **losses.terms}.items():
                sums[name] = sums.get(name, 0) + value.float() / len(batches)
        self.shares.finish(self.step, self._factor())
        if cfg.optim.clip_norm is not None:
            self.optimizer.unscale(self.scaler)
            nn.utils.clip_grad_norm_(self.method.parameters(), cfg.optim.clip_norm)
        self.optimizer.step(self.scaler)
        self.scaler.update()
        self.optimizer.zero_grad()
        with torch.no_grad():
            if self.world > 1:
                average_statistics(self.method)
            self.method.after_step(step)
        return sums

    def _factor(self) -> float:
        """Return the scaler's factor; read only on measured steps, since the host waits for it."""
        return self.scaler.get_scale() if self.scaler.is_enabled() and self.step in self.shares.at else 1.0

    def _write(self, pending: list[tuple[int, float, dict[str, Tensor]]]) -> float:
        """Copy the last steps' loss terms to the host at once, check and log them; return the newest total."""
        names = list(pending[0][2])
        table = torch.stack([torch.stack([terms[name].to(self.device) for name in names]) for _, _, terms in pending])
        if self.world > 1:
            dist.all_reduce(table)
            table /= self.world
        rows, found = table.cpu().tolist(), []
        for (step, lr, _), row in zip(pending, rows, strict=True):
            values = dict(zip(names, row, strict=True))
            check_finite(values, step, self.steps, self.cfg, self.directory)
            found.append({"step": step, "lr": lr, **values})
        pending.clear()
        if self.rank == 0:
            self.log.extend(found)
            self.callbacks.log(found)
        return rows[-1][names.index("total")]

    def _info(self) -> RunInfo:
        place = self.name, self.directory, self._title(), self.cfg.runtime.group, tracked_config(self.cfg)
        return RunInfo(*place, self.step, self.log.read, [*self.history])

    def _any(self, *flags: bool) -> list[bool]:
        """Return of each flag whether any worker has raised it; all workers must ask at the same step."""
        if self.world == 1:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.float32, device=self.device)
        dist.all_reduce(raised)
        return (raised > 0).tolist()

    def _barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def _title(self) -> str:
        cfg = self.cfg
        return f"{cfg.method.name} on {cfg.data.dataset} {cfg.data.split}, seed {cfg.seed}"

    def _check_lease(self) -> None:
        if self.lease is not None and self.lease.lost:
            self.lease.check()

    def alive(self) -> None:
        """Send a heartbeat during work without steps."""
        self._check_lease()
        if self.report is not None:
            self.report({"step": self.step, "steps": self.steps, "evaluating": True})

    def _evaluate_now(self) -> dict[str, Any]:
        """Evaluate the headline stream of the predictor during training, without boundary scores."""
        stream = self.method.eval_stream()
        scores = evaluator.compute_scores(self, self.method.eval_network(), (stream,), False)
        self.history.append({"step": self.step, "miou": scores[stream]["miou"] if stream in scores else None})
        self.callbacks.evaluation(**self.history[-1])
        return {"steps": self.steps, **self.history[-1]}
