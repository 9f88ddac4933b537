"""Captions by BLIP-2: a tiny one of random weights with the real classes, from image files to a table that survives."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny_models
from PIL import Image

from viladiff.cli import main
from viladiff.cli.text import CAPTION_EXAMPLES, EMBED_EXAMPLES
from viladiff.data.captions.files import read_captions
from viladiff.data.captions.simulated import PROMPTS
from viladiff.data.sources import digits
from viladiff.runs.config import RunConfig, override, parse_overrides
from viladiff.text.captioning import job as jobs
from viladiff.text.captioning.blip2 import Caption, Captioner, ImageRef, caption_batch, join_prompt, reader, writer
from viladiff.text.captioning.job import CaptioningJob, pictures, rows_table, state

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.blip(tmp_path_factory.mktemp("models") / "blip2-tiny")


@pytest.fixture(scope="module")
def captioner(blip: Path) -> Captioner:
    return Captioner(writer(blip, longest=6))


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 255, (20 + i, 30, 3), np.uint8) // (1 + i % 3) for i in range(6)]


def test_captions_are_those_of_the_library(captioner: Captioner, images: list[np.ndarray], blip: Path) -> None:
    """Image by image and prompt by prompt, as its documentation has it: neither batch nor memory changes a word."""
    from transformers import Blip2ForConditionalGeneration, Blip2Processor

    model, processor = Blip2ForConditionalGeneration.from_pretrained(blip).eval(), Blip2Processor.from_pretrained(blip)
    found = captioner.say(images)
    for image, texts in zip(images, found, strict=True):
        for prompt, text in zip(PROMPTS, texts, strict=True):
            given = processor(images=Image.fromarray(image), text=prompt, return_tensors="pt")
            said = model.generate(**given, max_new_tokens=6, do_sample=False)[0, given["input_ids"].shape[1] :]
            assert text == join_prompt(prompt, processor.decode(said, skip_special_tokens=True).strip())
    assert len({texts[0] for texts in found}) > 1, "a model that says one thing of all would show nothing"


def test_the_image_is_encoded_once_for_all_prompts(
    captioner: Captioner, images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, inner = [], captioner.model.vision_model.forward
    monkeypatch.setattr(captioner.model.vision_model, "forward", lambda *a, **w: seen.append(1) or inner(*a, **w))
    one, two = captioner.say(images[:2]), captioner.say(images[2:4])
    assert len(seen) == 2 and captioner.say(images[:2]) == one != two


def test_a_prompt_is_said_once() -> None:
    assert join_prompt("A photo of", "a cat") == "A photo of a cat" == join_prompt("A photo of", "A photo of a cat")
    assert join_prompt("A photo of", "") == "A photo of"


def test_a_failed_image_is_listed_and_the_others_go_on(
    captioner: Captioner, images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    some = [ImageRef(str(i), str(i)) for i in range(4)]

    def read(where: str) -> np.ndarray:
        if where == "2":
            raise ValueError("2: cannot be read\nat all")
        return images[int(where)]

    rows = caption_batch(captioner, some, read)
    assert [(row.image, row.prompt) for row in rows] == [(str(i), prompt) for i in range(4) for prompt in PROMPTS]
    assert [row.error for row in rows if row.image == "2"] == ["2: cannot be read"] * 2
    alone = captioner.say([images[i] for i in (0, 1, 3)])
    assert [row.text for row in rows if row.image != "2"] == [text for texts in alone for text in texts]
    assert all(row.seconds > 0 and row.model == "blip2-tiny" for row in rows)

    def say(given: list[np.ndarray], inner: Callable = captioner.say) -> list[list[str]]:
        if len(given) > 1:
            raise RuntimeError("out of memory")
        if given[0] is images[1]:
            raise IndexError("odd image")
        return [list(PROMPTS)] if given[0] is images[0] else inner(given)

    monkeypatch.setattr(captioner, "say", say)
    rows = caption_batch(captioner, [some[i] for i in (0, 1, 3)], read)
    assert [row.error for row in rows] == [
        *["the model added nothing to the prompt"] * 2,
        *["odd image"] * 2,
        None,
        None,
    ]
    assert caption_batch(captioner, some[2:3], read)[0].text is None


def test_images_of_an_embedded_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VILADIFF_CACHE", str(tmp_path))
    monkeypatch.setattr(digits, "VARIANTS", {"digits": digits.Variant(digits.DIGITS, 5, 3, 2)})
    name, found = pictures("digits")
    assert [one.image for one in found] == [
        *(f"train/{i}" for i in range(5)),
        *(f"dev/{i}" for i in range(3)),
        "test/0",
        "test/1",
    ]
    arrays = digits.open_pixels("digits").arrays
    assert np.array_equal(reader(name)("dev/2"), arrays["dev_images"][2])


def test_directories_that_hold_no_blip(blip: Path, tmp_path: Path) -> None:
    def refused(place: Path, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Captioner(writer(place))

    refused(tmp_path / "none", "--model .*none'?: there is no such directory")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "has no config.json, so it is no directory of BLIP-2")
    for needed in ("processor_config.json", "tokenizer.json"):
        part = shutil.copytree(blip, tmp_path / f"no-{needed}")
        (part / needed).unlink()
        refused(part, f"has no .*{needed}")
    refused(_without_weights(blip, tmp_path / "bare"), "has no weights")
    other = shutil.copytree(blip, tmp_path / "other")
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config.replace('"model_type": "blip-2"', '"model_type": "bert"'))
    refused(other, "holds a 'bert', not a 'blip-2'")
    (other / "config.json").write_text(config.replace('"ffn_dim": 32', '"ffn_dim": 40'))
    refused(other, "cannot load it|of another model")


def _without_weights(blip: Path, place: Path) -> Path:
    shutil.copytree(blip, place)
    (place / "model.safetensors").unlink()
    return place


def test_a_model_is_called_by_hub_or_content(blip: Path, tmp_path: Path) -> None:
    plain = writer(blip)
    assert plain.model == "blip2-tiny" and len(plain.revision) == 16
    moved = shutil.copytree(blip, tmp_path / "moved")
    assert writer(moved).revision == plain.revision
    tiny_models.blip(moved, seed=1)
    assert writer(moved).revision != plain.revision
    hub = tmp_path / "models--Salesforce--blip2-opt-2.7b" / "snapshots" / "0123456789abcdef0123"
    shutil.copytree(blip, hub)
    (tmp_path / "link").symlink_to(hub)
    assert writer(tmp_path / "link")[1:3] == ("Salesforce/blip2-opt-2.7b", "0123456789ab")


# The job


def rows(job: CaptioningJob, which: slice, error: str | None = None) -> list[Caption]:
    who = job.who
    return [
        Caption(one.image, prompt, None if error else f"{prompt} {one.image}", who.model, who.revision, 0.1, error)
        for one in job.pictures[which]
        for prompt in who.prompts
    ]


@pytest.fixture
def job(blip: Path, tmp_path: Path) -> CaptioningJob:
    return CaptioningJob(
        "", tuple(ImageRef(f"i{n}", f"{n}.jpg") for n in range(6)), writer(blip), tmp_path / "c.parquet"
    )


def test_a_job_goes_on_from_its_parts(job: CaptioningJob) -> None:
    assert len(state(job).todo) == 6
    jobs.begin(job)
    jobs.write_part(job, [rows_table(rows(job, slice(2, 4)))])
    jobs.write_part(job, [rows_table(rows(job, slice(0, 1))), rows_table(rows(job, slice(5, 6), "broken"))])
    assert [one.image for one in state(job).todo] == ["i1", "i4", "i5"], "what failed is tried again"
    jobs.write_part(job, [rows_table(rows(job, slice(1, 2))), rows_table(rows(job, slice(4, 6)))])
    table = jobs.finish(job)
    assert [row["image"] for row in table.to_pylist()] == [f"i{n}" for n in range(6) for _ in PROMPTS]
    assert jobs.failures(table) == {} and not job.parts.exists() and state(job).todo == ()
    assert read_captions(job.out).texts["i3"] == ("A photo of i3", "A photo contains i3")
    more = job._replace(pictures=(*job.pictures, ImageRef("i9", "9.jpg")))
    assert [one.image for one in state(more).todo] == ["i9"], "of a data set that has grown"


def test_a_prompt_that_is_missing_is_asked_again_and_undoes_nothing(job: CaptioningJob) -> None:
    said = rows(job, slice(0, 6))
    jobs.begin(job)
    jobs.write_part(job, [rows_table([*said[:4], *said[5:]])])
    assert [one.image for one in state(job).todo] == ["i2"]
    jobs.finish(job)
    jobs.begin(job)
    jobs.write_part(job, [rows_table([said[4]._replace(text="new"), said[5]._replace(text=None, error="odd")])])
    table = jobs.finish(job)
    assert [row["text"] for row in table.to_pylist()][4:6] == ["new", said[5].text] and jobs.failures(table) == {}


def test_failures_stay_in_the_table_and_out_of_training(job: CaptioningJob) -> None:
    jobs.begin(job)
    jobs.write_part(job, [rows_table([*rows(job, slice(0, 5)), *rows(job, slice(5, 6), "broken")])])
    table = jobs.finish(job)
    assert jobs.failures(table) == {"i5": "broken"} and len(table) == 12
    assert read_captions(job.out).empty == 2 and "i5" not in read_captions(job.out).texts


def test_other_jobs_and_damage_are_refused(job: CaptioningJob, blip: Path, tmp_path: Path) -> None:
    jobs.begin(job)
    with pytest.raises(ValueError, match=r"c\.parquet\.parts: is of another model or prompts"):
        state(job._replace(who=writer(blip, ("An image of",))))
    jobs.write_part(job, [rows_table(rows(job, slice(0, 6)))])
    part = next(job.parts.glob("part-*.parquet"))
    whole = part.read_bytes()
    part.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"part-\w+\.parquet: is damaged or was not written by"):
        state(job)
    part.write_bytes(whole)
    jobs.finish(job)
    with pytest.raises(ValueError, match=r"has captions of blip2-tiny \w+ for .*; name another file with --out"):
        state(job._replace(who=job.who._replace(revision="other")))
    with pytest.raises(ValueError, match=r"captions are written as Parquet"):
        state(job._replace(out=tmp_path / "c.csv"))


def test_a_dry_run_and_a_finished_one_start_nothing(
    photo_folder: Make, blip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = photo_folder(8, sizes=(30, 40)), tmp_path / "c.parquet"
    asked = ["caption", str(root), "--model", str(blip), "--out", str(out)]
    assert main.main([*asked, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "to be captioned   8" in said and "model             blip2-tiny, revision" in said and not out.exists()
    whole = CaptioningJob(*pictures(str(root)), writer(blip), out)
    jobs.begin(whole)
    jobs.write_part(whole, [rows_table(rows(whole, slice(None)))])
    jobs.finish(whole)
    assert main.main(asked) == 0 and "complete, 8 images; nothing to do" in capsys.readouterr().out
    assert main.main(["caption", "photo", "--model", str(blip)]) == 2
    assert "'photo': is neither a directory nor a built-in data set" in capsys.readouterr().err


def test_pictures_of_other_channels_are_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "classes.txt").write_text("a\nb\n")
    np.save(tmp_path / "images" / "a.npy", np.zeros((8, 9, 5), np.uint8))
    with pytest.raises(ValueError, match=r"a\.npy: captions are of red, green and blue in 8 bits, .*to another folder"):
        pictures(str(tmp_path))


def test_the_commands_of_the_page_can_be_typed() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "captions.md").read_text(encoding="utf-8")
    found = re.findall(r"^```sh\n(viladiff .*?)\n```$", page, re.MULTILINE | re.DOTALL)
    commands = [shlex.split(command.replace("\\\n", " "))[1:] for command in found]
    assert [words[0] for words in commands] == ["caption", "embed", "train"]
    examples = re.sub(r"\\\n +", " ", CAPTION_EXAMPLES + EMBED_EXAMPLES)
    commands += [shlex.split(line.split("   ")[0])[1:] for line in re.findall(r"^  (viladiff .*)$", examples, re.M)]
    assert len(commands) == 9
    for words in commands:
        args = main.command_parser().parse_args(words)
        if words[0] != "caption":
            override(RunConfig(), dict(parse_overrides(args.fields)))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_killed_job_goes_on_through_ray(photo_folder: Make, blip: Path, tmp_path: Path) -> None:
    """Kill -9 of the driver as soon as a part is there; then two actors do the rest, and one broken image is listed."""
    root, out = photo_folder(40, sizes=(30, 40)), tmp_path / "c.parquet"
    broken = sorted((root / "images").iterdir())[7]
    broken.write_bytes(broken.read_bytes()[:100])
    program = "import sys, viladiff.cluster.captioning as r, viladiff.cli.main as c\n"
    program += "r.PART = 4; sys.exit(c.main(sys.argv[1:]))"
    asked = ["caption", str(root), "--model", str(blip), "--out", str(out), "--batch", "4", "--quiet"]
    first = subprocess.Popen([sys.executable, "-c", program, *asked], start_new_session=True)
    until = time.monotonic() + 600
    while not list(tmp_path.glob("c.parquet.parts/part-*")) and first.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    whole = CaptioningJob(*pictures(str(root)), writer(blip), out)
    before = state(whole)
    assert 0 < len(before.todo) < 40 and not out.exists()
    again = subprocess.run([sys.executable, "-c", program, *asked, "--actors", "2"], capture_output=True, text=True)
    assert again.returncode == 1 and f"failed: {broken.stem}: " in again.stderr
    assert f"{out}: 78 captions of 39 images" in again.stdout
    table = pq.read_table(out)
    kept = {(row["image"], row["prompt"]): row for row in before.rows.to_pylist()}
    found = {(row["image"], row["prompt"]): row for row in table.to_pylist()}
    assert len(found) == 80 and all(found[key] == row for key, row in kept.items()), "what was done is not done again"
    expected = caption_batch(Captioner(writer(blip)), whole.pictures, reader(""))
    assert [row["text"] for row in table.to_pylist()] == [row.text for row in expected]
    assert not (tmp_path / "c.parquet.parts").exists()
