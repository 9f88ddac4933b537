"""Ten of the faults of ``make chaos``, one of each kind that needs no long wait, in a minute."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from chaos.hook import PLACES
from chaos.suite import KINDS, Fault, Results, Undisturbed, plan, report
from chaos.through_ray import COMMANDS, VICTIMS

HERE = Path(__file__).resolve().parent
FAULTS = (
    "kill/before/train/checkpoint",
    "kill/during/train/step log",
    "kill/after/train/record",
    "torn/during/train/step log",
    "torn/after/train/lease",
    "full disk/during/train/checkpoint",
    "EIO/after/train/record",
    "read-only/during/train/record",
    "clock/before/train/checkpoint",
    "kill/during/captions/captions",
    "EIO/during/captions/captions' part",
    "torn/during/render/cache's manifest",
)


@pytest.mark.timeout(600)  # a machine may be busy
def test_nothing_is_lost_repeated_or_left_over(tmp_path: Path) -> None:
    words = ["--only", *FAULTS, "--targets", "train", "captions", "render"]
    words += ["--results", str(tmp_path / "done.jsonl"), "--report", str(tmp_path / "report.json")]
    path = os.pathsep.join([str(HERE.parent), str(HERE.parent / "report"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "CHAOS_CACHE": os.environ["VILADIFF_CACHE"]}
    made = subprocess.run([sys.executable, "-m", "chaos.suite", *words], env=env, capture_output=True, text=True)
    if made.returncode == 2 and "needs namespaces" in made.stderr:
        pytest.skip("this machine makes no namespaces")
    assert made.returncode == 0, made.stdout[-6000:] + made.stderr[-3000:]
    found = json.loads((tmp_path / "report.json").read_text())["faults"]
    assert len(found) == len(FAULTS) and all(one["good"] for one in found)
    assert f"{len(FAULTS)} faults, {len(FAULTS)} good" in made.stdout


def test_the_plan_has_each_kind_at_each_place_and_file(tmp_path: Path) -> None:
    files = {
        "train": ("lease", "step log", "checkpoint", "previous checkpoint", "pictures", "record"),
        "captions": ("captioning job", "captions' part", "captions"),
        "render": ("cache's array", "cache's manifest"),
        "table": ("plan", "failure note", "figure", "page"),
    }
    profiles = {
        target: Undisturbed([(place, file, 100) for file in names for place in PLACES], {})
        for target, names in files.items()
    }
    profiles |= {target: Undisturbed([], {}) for target in COMMANDS}
    faults = plan(profiles, 26)
    assert len({fault.key for fault in faults}) == len(faults) >= 200
    cells = Counter((fault.kind, fault.place) for fault in faults)
    assert set(cells) == {(kind, place) for kind in (*KINDS, *VICTIMS) for place in PLACES} and min(cells.values()) >= 5
    for kind in KINDS:
        spared = {"previous checkpoint"} if kind == "torn" else set()  # a second name of a file, which has no data
        found = {fault.file for fault in faults if fault.kind == kind}
        assert found == {file for some in files.values() for file in some} - spared
    assert plan(profiles, 26) == faults != plan(profiles, 27)


def test_what_has_a_result_is_not_done_again(tmp_path: Path) -> None:
    one, two = (Fault("kill", "before", "train", "record", seed) for seed in (1, 2))
    Results(tmp_path / "done").add({**one._asdict(), "good": True, "seconds": 1})
    with (tmp_path / "done").open("a") as file:
        file.write('{"kind": "kill", "pla')  # the suite itself was killed
    found = Results(tmp_path / "done")
    assert found.has(one) and not found.has(two)
    found.add({**two._asdict(), "good": False, "seconds": 1})
    again = Results(tmp_path / "done")
    assert again.has(one) and not again.has(two), "what was bad is tried again"
    assert report(again, tmp_path / "report.json", 26) == 1
    assert [line["good"] for line in json.loads((tmp_path / "report.json").read_text())["faults"]] == [True, False]
