"""The command line: quick help, one clear line for what cannot be done, and the right call for what can."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from record_kit import made

from viladiff.cli import doctor
from viladiff.cli import main as cli
from viladiff.runs.config import RunConfig, override
from viladiff.training.result import Result

RESULT = {
    "miou": 0.25,
    "best": None,
    "teacher/visual/miou": 0.25,
    "student/visual/miou": None,
    "student/visual/images": 4,
}
HEAVY = ("torch", "numpy", "pydantic", "rich")


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[RunConfig, dict[str, Any]]]:
    """A stand-in for training that keeps what it was asked for, and whose result has a note."""
    calls: list[tuple[RunConfig, dict[str, Any]]] = []

    def fit(cfg: RunConfig, **options: Any) -> SimpleNamespace:
        calls.append((cfg, options))
        notes = "2 of 3 classes have IoU 0"
        return SimpleNamespace(
            summary=lambda: dict(RESULT), notes=lambda: [notes], directory=tmp_path, already_finished=False
        )

    monkeypatch.setitem(sys.modules, "viladiff.training.trainer", SimpleNamespace(fit=fit))  # type: ignore[arg-type]
    return calls


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["--version"], ["train", "--no-such-flag"]])
def test_help_comes_without_loading_torch(words: list[str]) -> None:
    code = (
        "import sys, os\nfrom viladiff.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        f"finally: print('LOADED', [m for m in {HEAVY} if m in sys.modules], sum(os.times()[:2]))"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
    loaded, _, seconds = done.stdout.rpartition("LOADED ")[2].rpartition(" ")
    assert loaded == "[]", done.stderr
    assert float(seconds) < 0.5
    assert done.returncode == (2 if "--no-such-flag" in words else 0)


def test_package_is_light_and_names_what_it_has() -> None:
    code = "import sys, viladiff; assert 'torch' not in sys.modules; viladiff.RunConfig; print(viladiff.nothing)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "module 'viladiff' has no attribute 'nothing'; it has Callback, RunConfig, Segmenter" in done.stderr


def test_train_calls_fit_with_the_fields(trained: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "train",
        "method.name=viladiff",
        "data.split=92",
        "--device",
        "cpu",
        "--threads",
        "2",
        "--runs-dir",
        "o",
        "--quiet",
    ]
    assert cli.main(words) == 0
    wanted = {
        "method.name": "viladiff",
        "data.split": "92",
        "runtime.device": "cpu",
        "runtime.threads": 2,
        "runtime.runs_dir": "o",
        "runtime.progress": False,
    }
    assert trained == [(override(RunConfig(), wanted), {"resume": True})]
    out, told = capsys.readouterr()
    assert told == "note: 2 of 3 classes have IoU 0\n"
    assert "none" in out and "0.25" not in out and "Already finished" not in out
    rows = [line.split() for line in out.splitlines()]
    assert ["mIoU", "%", "25.00"] in rows and ["network/stream", "miou", "%", "images"] in rows
    assert ["teacher/visual", "25.00", "-"] in rows and ["student/visual", "-", "4"] in rows


def test_fields_may_follow_options(capsys: pytest.CaptureFixture[str]) -> None:
    read = cli.parse_arguments(
        cli.command_parser(), ["train", "seed=1", "--runs-dir", "here", "train.steps=5", "--restart", "data.split=92"]
    )
    assert read.fields == ["seed=1", "train.steps=5", "data.split=92"] and read.runs_dir == "here" and read.restart
    for words in (
        ["table", "5", "--scale", "smoke", "--", "a=1", "b=2"],
        ["table", "5", "--rows", "1", "--", "a=1", "b=2"],
    ):
        assert cli.parse_arguments(cli.command_parser(), words).changes == ["a=1", "b=2"]
    assert cli.parse_arguments(cli.command_parser(), ["train", "--runs-dir", "a=b"]).fields == []
    for command in (["table", "5"], ["sweep", "lambda"]):
        read = cli.parse_arguments(
            cli.command_parser(), [*command, "--dry-run", "train.steps=5", "--seeds", "2", "seed=1"]
        )
        assert read.changes == ["train.steps=5", "seed=1"] and read.dry_run and read.seeds == "2"
    for words, wrong in (
        (["train", "seed=1", "--restart", "--frsh"], "--frsh: unknown flag"),
        (["train", "--restart", "--frsh=1", "seed=1"], "--frsh: unknown flag"),
        (["doctor", "a=b"], "unrecognized arguments: a=b"),
    ):
        with pytest.raises(SystemExit):
            cli.parse_arguments(cli.command_parser(), words)
        assert wrong in capsys.readouterr().err


@pytest.mark.parametrize("script", ["ablations/table5", "tune/sweep_lambda"])
def test_so_they_may_in_scripts(script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from viladiff.cli import sweeps
    from viladiff.cli import tables as options

    main = options.main if script.startswith("ablations") else sweeps.main
    words = ["eval.max_images=8", "--scale", "smoke", "--runs-dir", str(tmp_path), "--dry-run", "train.stepz=5"]
    assert main(Path(__file__).resolve().parents[2] / f"{script}.toml", words) == 2
    assert "train.stepz: no such field; did you mean 'train.steps'?" in capsys.readouterr().err


def test_classes_without_a_right_pixel_are_named() -> None:
    """A class that is neither in the truth nor predicted has no IoU, and is not among them."""
    record = made("supervised-92-0")
    names, split = record.class_names, record.config["eval.split"]

    def notes(per_class: list[float | None]) -> list[str]:
        scores = {record.network: {record.stream: {"miou": 0.1, "per_class": per_class}}}
        return Result(Path("o"), record.model_copy(update={"scores": scores})).notes()

    rest = [0.5] * (len(names) - 3)
    lost = (
        f"1 of {len(names)} classes have IoU 0 on {split}, so that none of their pixels is labelled right: {names[0]}"
    )
    assert notes([0.0, None, 0.2, *rest]) == [lost]
    assert notes([0.1, None, 0.2, *rest]) == []
    assert notes([0.0] * len(names))[0].endswith(f": {', '.join(names[:8])} and {len(names) - 8} more")


def test_fresh_and_workers(trained: list[Any]) -> None:
    assert cli.main(["train", "--restart", "--workers", "2"]) == 0
    cfg, options = trained[0]
    assert (cfg.runtime.workers, options) == (2, {"resume": False})


def test_a_finished_run_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    result = SimpleNamespace(summary=lambda: dict(RESULT), notes=lambda: [], directory=Path("o"), already_finished=True)
    trainer = SimpleNamespace(fit=lambda *_, **__: result)
    monkeypatch.setitem(sys.modules, "viladiff.training.trainer", trainer)  # type: ignore[arg-type]
    assert cli.main(["train"]) == 0
    assert "Already finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "optim.lrr=1"], "error: optim.lrr: no such field; did you mean 'optim.lr'?"),
        (["train", "seed"], "error: 'seed': write field=value"),
        (["train", "seed=1", "seed=2"], "error: seed: given twice"),
        (["train", "runtime.device=cpu", "--device", "cuda"], "error: runtime.device: given twice"),
        (["train", "--workers", "two"], "error: runtime.workers = 'two': must be a whole number"),
        (["config", "method.mixxe"], "error: method.mixxe: no such field"),
    ],
)
def test_errors_are_one_line_and_status_2(
    words: list[str], message: str, trained: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith(message) and err.count("\n") == 1 and "Traceback" not in err
    assert trained == []


def test_several_faults_are_several_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "optim.lr=0", "data.crop=1"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: data.crop = 1: must be ≥ 16",
        "error: optim.lr = 0.0: must be > 0",
    ]


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VILADIFF_DEBUG", "1")
    with pytest.raises(ValueError, match="no such field"):
        cli.main(["train", "x=1"])


def test_an_error_while_training_is_told_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fit(cfg: RunConfig, **options: Any) -> None:
        raise ValueError("the loss is nan at step 3")

    monkeypatch.setitem(sys.modules, "viladiff.training.trainer", SimpleNamespace(fit=fit))  # type: ignore[arg-type]
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == "error: the loss is nan at step 3\n"


def test_interruption_is_130_and_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fit(cfg: RunConfig, **options: Any) -> None:
        raise KeyboardInterrupt("stopped at step 3; the same command continues from there")

    monkeypatch.setitem(sys.modules, "viladiff.training.trainer", SimpleNamespace(fit=fit))  # type: ignore[arg-type]
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "stopped at step 3; the same command continues from there\n"


def test_config_lists_fields_of_any_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "method.mixe"]) == 0
    out = capsys.readouterr().out
    assert "method.mixe.timesteps" in out and "int ≥ 1 ≤ 1000" in out and "optim.lr" not in out
    assert cli.main(["config", "train", "data.dataset=voc"]) == 0
    assert "60" in next(line for line in capsys.readouterr().out.splitlines() if line.startswith("train.epochs"))


def test_output_may_be_cut_off() -> None:
    command = [sys.executable, "-m", "viladiff", "config"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == 0


def test_evaluate_refuses_what_is_no_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", str(tmp_path)]) == 2
    assert f"error: {tmp_path}: no record.json" in capsys.readouterr().err
    (tmp_path / "record.json").write_text("{}")
    assert cli.main(["evaluate", str(tmp_path), "seed=3"]) == 2
    assert "error: seed: would be another run" in capsys.readouterr().err
    assert cli.main(["evaluate", str(tmp_path)]) == 2
    assert f"error: {tmp_path}: no checkpoint.pt" in capsys.readouterr().err


def test_doctor_passes_on_a_sound_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VILADIFF_CACHE", str(tmp_path / "cache"))
    assert cli.main(["doctor", "--runs-dir", str(tmp_path / "runs")]) == 0
    out = capsys.readouterr().out
    assert "torch" in out and "not rendered;" in out and "FAIL" not in out
    assert not list(tmp_path.iterdir())


def test_doctor_finds_a_damaged_cache_and_unusable_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    digits = pytest.importorskip("viladiff.data.sources.digits")
    monkeypatch.setenv("VILADIFF_CACHE", str(tmp_path))
    (tmp_path / "digits" / digits.variant_fingerprint("digits")).mkdir(parents=True)
    (tmp_path / "file").touch()
    assert cli.main(["doctor", "--runs-dir", str(tmp_path / "file")]) == 1
    broken = {check.name: check for check in doctor.examine(tmp_path / "file") if check.broken}
    assert set(broken) == {"data digits", "runs"}
    assert all(check.remedy for check in broken.values())
    assert capsys.readouterr().out.count("FAIL") == 2


def test_doctor_looks_at_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert {check.name for check in doctor.examine(tmp_path)} >= {"temporary"}
    monkeypatch.setenv("TMPDIR", "/nonexistent")
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=10**6))
    found = {check.name: check for check in doctor.examine(tmp_path)}
    assert found["TMPDIR"].broken and found["TMPDIR"].found == f"/nonexistent: cannot be used, {tmp_path} is instead"
    assert found["temporary"].broken and "0.0 GB free" in found["temporary"].found


def test_doctor_finds_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=1e6))
    broken = [check.name for check in doctor.examine(tmp_path) if check.broken]
    assert broken == ["cache", "runs", "temporary"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_doctor_finds_a_place_it_may_not_write(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "runs" in [check.name for check in doctor.examine(tmp_path) if check.broken]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train --out x", "--out: unknown flag; use --runs-dir"),
        ("train --fresh", "--fresh: unknown flag; use --restart"),
        ("doctor --out=x", "--out: unknown flag; use --runs-dir"),
        ("table 5 --storage x", "--storage: unknown flag; use --runs-dir"),
        ("table 5 --out x", "--out: unknown flag; use --report-dir"),
        ("sweep lambda --out x", "--out: unknown flag; use --report-dir"),
        ("sweep lambda --hang-after 3", "--hang-after: unknown flag; use --stall-timeout"),
        ("plan all --price 3", "--price: unknown flag; use --hourly-price"),
        ("runs list --store x", "--store: unknown flag; use --runs-dir"),
        ("runs gc --dry-rum", "--dry-rum: unknown flag; did you mean --dry-run?"),
        ("predict a --model b --storage c", "--storage: unknown flag"),
    ],
)
def test_an_unknown_flag_names_the_flag_to_use(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(words.split())
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(f": error: {message}")
