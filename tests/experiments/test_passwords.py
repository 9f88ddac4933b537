"""The password of a sweep's database: in no file, on no page, in no line and in no traceback."""

from __future__ import annotations

import sqlite3
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from test_sweep_page import record_of

from viladiff.cli import sweeps as sweep_options
from viladiff.cluster import sweep_executor
from viladiff.core.messages import hidden_url, hide_passwords
from viladiff.experiments.tables import shell_command
from viladiff.runs.record import save_record
from viladiff.sweeps.trial_queue import TrialQueue

pytestmark = pytest.mark.usefixtures("prints_once")
TUNE = Path(__file__).resolve().parents[2] / "tune"
SECRETS = ("s3cr%40tword", "s3cr@tword", "0ther5ecret")
REFUSAL = f'user "ann" has another password than "{SECRETS[1]}" or {SECRETS[2]}'


class Guarded(SQLiteDialect_pysqlite):
    """A database with users: SQLite, which has none, behind a URL with a password and another one in its query."""

    supports_statement_cache = True
    refusing = False

    def create_connect_args(self, url: URL) -> Any:
        assert (url.password, url.query["password"]) == SECRETS[1:], "they reach the database"
        return super().create_connect_args(URL.create("sqlite", database=url.database))

    def connect(self, *given: Any, **words: Any) -> Any:
        if self.refusing:
            raise sqlite3.OperationalError(REFUSAL)
        return super().connect(*given, **words)

    def do_execute(self, cursor: Any, statement: str, parameters: Any, context: Any = None) -> None:
        if self.refusing:
            raise sqlite3.OperationalError(REFUSAL)
        super().do_execute(cursor, statement, parameters, context)


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setitem(registry.impls, "guarded", lambda: Guarded)
    monkeypatch.setattr(Guarded, "refusing", False)
    yield f"guarded://ann:{SECRETS[0]}@db.example/{tmp_path}/study.db?password={SECRETS[2]}"


def played(queue: TrialQueue) -> None:
    """Stands in for Ray and training."""
    queue.prime()
    while not queue.done and (run := queue.next_job()) is not None:
        queue.on_started(run.run_id)
        made = record_of(run, 0.5 - 0.1 * abs(float(str(run.changes["method.vila.lam"])) - 0.6))
        (directory := queue.store.directory(run.run_id)).mkdir(parents=True, exist_ok=True)
        save_record(made, directory / "record.json")
        queue.on_result(run.run_id, {"state": "done", "miou": made.miou})


def sweep(root: Path, *words: str) -> int:
    where = ["--runs-dir", str(root / "runs"), "--report-dir", str(root / "page")]
    short = ["--scale", "smoke", "--sampler", "random", "--trials", "2", "--no-finals"]
    return sweep_options.main(TUNE / "sweep_lambda.toml", [*short, *where, *words])


def files_with_secrets(root: Path) -> list[str]:
    return [
        f"{path}: {secret}"
        for path in root.rglob("*")
        if path.is_file()
        for secret in SECRETS
        if secret.encode() in path.read_bytes()
    ]


@pytest.mark.parametrize("words", [["--database", "{}"], ["--database={}"]], ids=["two words", "one word"])
def test_a_sweep_keeps_its_databases_password_to_itself(
    url: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep_executor, "run_search", played)
    given = [word.format(url) for word in words]
    assert sweep(tmp_path, *given) == 0
    assert (tmp_path / "study.db").stat().st_size, "the study is in the database"
    shown = capsys.readouterr()
    assert not [secret for secret in SECRETS if secret in shown.out + shown.err]
    assert files_with_secrets(tmp_path) == []
    page = (tmp_path / "page" / "index.html").read_text()
    assert "study.db?password=***" in page, "the command is there, without paths"


def test_a_refusal_in_the_middle_is_one_line(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(queue: TrialQueue) -> None:
        Guarded.refusing = True
        played(queue)

    monkeypatch.setattr(sweep_executor, "run_search", refused)
    assert sweep(tmp_path, "--database", url) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: guarded://ann:***@db.example/") and "Optuna cannot keep its study there" in error
    assert not [secret for secret in SECRETS if secret in error] and "Traceback" not in error
    assert files_with_secrets(tmp_path) == []


def test_no_traceback_has_it(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Guarded, "refusing", True)
    monkeypatch.setenv("VILADIFF_DEBUG", "1")
    with pytest.raises(ValueError, match="cannot keep its study there") as caught:
        sweep(tmp_path, "--database", url)
    text = "".join(traceback.format_exception(caught.value))
    assert not [secret for secret in SECRETS if secret in text]
    assert "has another password than" in text, "the reason is there"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--database", "postgresql://ann:***@h/x"], "*** stands for the password; write it out"),
        (["--database", "postgresql:/ann:s3cr@tword@h/x"], "must be a URL"),
        (["--database", "sqlite:///x.db", "postgresql://ann:s3cr@tword@h/x"], "write field=value"),
        (["--data-base=postgresql://ann:s3cr@tword@h/x"], "unknown flag"),
        (["--trials", "postgresql://ann:s3cr@tword@h/x"], "invalid int value"),
    ],
)
def test_a_wrong_command_does_not_repeat_it(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        assert sweep(tmp_path, *words) == 2
    except SystemExit as end:
        assert end.code == 2
    error = capsys.readouterr().err
    assert says in error and "s3cr" not in error and "tword" not in error


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://ann:pw@h/db", "postgresql://ann:***@h/db"),
        ("postgresql+psycopg2://ann:p%40w%2F@h:5432/db?x=1", "postgresql+psycopg2://ann:***@h:5432/db?x=1"),
        ("mysql://ann:a@b/c:d@h/db", "mysql://ann:***@h/db"),
        ("redis://:pw@h:9", "redis://:***@h:9"),
        ("mysql://ann:p w\n'\"@h/db", "mysql://ann:***@h/db"),
        ("postgresql://h/db?user=ann&password=pw&x=1", "postgresql://h/db?user=ann&password=***&x=1"),
        ("postgresql://h/db?sslpassword=pw;PassWord=q", "postgresql://h/db?sslpassword=***;PassWord=***"),
        ("--database=postgresql://ann:pw@h/db", "--database=postgresql://ann:***@h/db"),
        ("postgresql://ann@corp:pw@h:5432/db", "postgresql://ann@corp:***@h:5432/db"),
        ("postgresql://h/db?pass%77ord=pw&pass=pw", "postgresql://h/db?pass%77ord=***&pass=***"),
        ("mssql+pyodbc:///?odbc_connect=UID%3Dann%3BPWD%3Dpw&x=1", "mssql+pyodbc:///?odbc_connect=***&x=1"),
        ("postgresql://h/db?options=-c%20password%3Dpw", "postgresql://h/db?options=***"),
        ("postgresql://ann@h:5432/db?author=me", "postgresql://ann@h:5432/db?author=me"),
        ("sqlite:////home/a@b/x.db", "sqlite:////home/a@b/x.db"),
        ("sqlite:///x.db", "sqlite:///x.db"),
        ("data.root=/a:b/c", "data.root=/a:b/c"),
        ("text.tokens=77", "text.tokens=77"),
    ],
)
def test_a_url_is_shown_without_its_passwords(url: str, shown: str) -> None:
    assert hidden_url(url) == shown
    assert "pw" not in shell_command("viladiff", ["sweep", url, "--render"]).replace("psycopg2", "")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot open postgresql://ann:pw@h/db, see a@b", "cannot open postgresql://ann:***@h/db, see a@b"),
        ("'mysql://ann:pw@h/db?password=pw' 'x'", "'mysql://ann:***@h/db?password=***' 'x'"),
        ("http://127.0.0.1:8265 asks for the token in a@b", "http://127.0.0.1:8265 asks for the token in a@b"),
        ("optim.lr=0.1 text.tokens=77", "optim.lr=0.1 text.tokens=77"),
    ],
)
def test_passwords_in_a_text_are_hidden(text: str, shown: str) -> None:
    assert hide_passwords(text) == shown


@pytest.mark.parametrize("form", ["p%40ss%20word", "p@ss word", "q+r", "q r"])
def test_a_known_password_is_hidden_in_every_form(form: str) -> None:
    url = "postgresql://ann:p%40ss%20word@h/db?password=q+r"
    assert form not in hide_passwords(f"user ann with {form} is refused", url)
