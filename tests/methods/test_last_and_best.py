"""The last evaluation is the result; those on the way change nothing, and the best of them is marked for what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_claims import EXAMPLE, a_table, plain, world

from viladiff.runs.checkpoint import load_checkpoint
from viladiff.runs.config import RunConfig, override
from viladiff.runs.record import RunRecord
from viladiff.sweeps.spec import OURS
from viladiff.tables.claims import evaluate_claims
from viladiff.tables.significance import score
from viladiff.tables.spec import Claim
from viladiff.training.trainer import fit

FAST = {
    "model.pretrained": "none",
    "train.steps": 6,
    "data.batch_labelled": 4,
    "eval.max_images": 6,
    "eval.boundary": False,
    "runtime.threads": 1,
    "runtime.progress": False,
    "runtime.log_every": 2,
}


def run(out: Path, method: str, **changes: Any) -> tuple[RunRecord, list[dict[str, float]], dict[str, torch.Tensor]]:
    flat = {path.replace("__", "."): value for path, value in changes.items()}
    cfg = override(RunConfig(), {**FAST, "method.name": method, "runtime.runs_dir": str(out), **flat})
    done = fit(cfg)
    lines = [json.loads(line) for line in (done.directory / "steps.jsonl").read_text().splitlines()]
    state = load_checkpoint(done.directory / "checkpoint.pt")
    assert state is not None
    return done.record, lines, state["method"]


@pytest.mark.parametrize("method", ["swith", "corrmatch"])
def test_an_evaluation_on_the_way_changes_no_loss_and_no_weight(tmp_path: Path, method: str) -> None:
    """``swith`` drops branches by torch's own generator, ``corrmatch`` keeps running values and drops channels."""
    drops: dict[str, Any] = {} if method == "swith" else {"model__drop_path": 0.3}
    without = run(tmp_path / "a", method, **drops)
    # 183 of 4,000 images have labels: 3,817 / 8 = 477.125 steps are an epoch, 1.9 of them 0.004.
    every = run(tmp_path / "b", method, eval__every_epochs=0.004, **drops)
    assert [entry["step"] for entry in every[0].history] == [2, 4, 6] and len(without[0].history) == 1
    assert every[1] == without[1] and len(every[1]) == 6
    assert all(torch.equal(value, without[2][name]) for name, value in every[2].items())
    assert every[0].miou == without[0].miou and every[0].run_id != without[0].run_id


def test_the_best_is_marked_and_the_result_is_the_last(tmp_path: Path) -> None:
    record, _, _ = run(tmp_path, "supervised", eval__every_steps=2)
    assert record.best is not None
    scores = [entry["miou"] for entry in record.history]
    assert record.best["miou"] == max(scores) and record.miou == scores[-1]
    assert (record.best["evaluations"], record.best["picked_on"], record.best["picked_on_reported"]) == (3, "dev", True)
    alone, _, _ = run(tmp_path, "supervised")
    assert alone.best is None, "of one evaluation none is picked"


def test_sgd_trains_and_its_checkpoint_is_refused_by_name_in_a_run_with_adamw(tmp_path: Path) -> None:
    sgd = run(tmp_path, "ddfp", optim__name="sgd", optim__lr=0.02, optim__nesterov=True)
    adamw = run(tmp_path, "ddfp", optim__lr=0.02)
    assert sgd[0].run_id != adamw[0].run_id and sgd[1][0]["total"] == adamw[1][0]["total"]
    assert sgd[1][-1]["total"] != adamw[1][-1]["total"] and [a["lr"] for a in sgd[1]] == [a["lr"] for a in adamw[1]]
    theirs, mine = (tmp_path / record.run_id for record in (sgd[0], adamw[0]))
    (mine / "record.json").unlink()
    (mine / "checkpoint.pt").write_bytes((theirs / "checkpoint.pt").read_bytes())
    with pytest.raises(ValueError, match=r"checkpoint\.pt: written with optim\.name = 'sgd', got 'adamw'; start over"):
        run(tmp_path, "ddfp", optim__lr=0.02)


def test_an_sgd_run_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    from viladiff.training.errors import StopRequested

    changes = {"optim__name": "sgd", "optim__lr": 0.02, "eval__every_steps": 2}
    whole = run(tmp_path / "whole", "ddfp", **changes)
    flat = {path.replace("__", "."): value for path, value in changes.items()}
    cfg = override(RunConfig(), {**FAST, "method.name": "ddfp", "runtime.runs_dir": str(tmp_path / "cut"), **flat})
    with pytest.raises(StopRequested):
        fit(cfg, report=lambda news: "miou" in news)
    again = run(tmp_path / "cut", "ddfp", **changes)
    assert again[1] == whole[1] and all(torch.equal(value, whole[2][name]) for name, value in again[2].items())


def test_claims_read_the_last_whatever_the_best_was() -> None:
    table = a_table(plain(2), ["c"], Claim(text="first", kind="higher", rows=("r0", "r1")))
    plan, records = world(table, {(0, 0): [50.0, 51.0, 52.0], (1, 0): [40.0, 41.0, 42.0]})
    before = evaluate_claims(plan, records)
    high = {
        name: one.model_copy(
            update={
                "best": {"step": 1, "miou": 0.99},
                "history": [{"step": 1, "miou": 0.99}, {"step": 2, "miou": one.miou}],
            }
        )
        if name.startswith("1/")
        else one
        for name, one in records.items()
    }
    assert evaluate_claims(plan, high) == before and before[0].verdict == "holds"
    one = EXAMPLE.model_copy(update={"miou": 0.3, "best": {"step": 1, "miou": 0.9}})
    assert score(one, "miou") == pytest.approx(30)


def test_the_interval_of_a_sweep_is_that_of_its_rungs() -> None:
    assert OURS["eval.every_epochs"] == OURS["eval.every_steps"]
