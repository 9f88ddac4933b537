"""Files of weights as people bring them: each works with the right values, or gets one line that says what to do."""

from __future__ import annotations

import argparse
import tarfile
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from viladiff.models.encoders import timm_files
from viladiff.models.encoders.build import (
    build_encoder,
    encoder_fingerprint,
    file_checksum,
    input_note,
    weights_fault,
)
from viladiff.models.encoders.load import load_weights
from viladiff.models.weight_files import CONTAINERS
from viladiff.runs.config import RunConfig, override

State = dict[str, Tensor]
NET = "resnet10t"
FIRST = "conv1.weight"


def tiny() -> nn.Module:
    return nn.Sequential(OrderedDict(conv1=nn.Conv2d(3, 4, 3), bn1=nn.BatchNorm2d(4), layer1=nn.Conv2d(4, 4, 3)))


@pytest.fixture(scope="module")
def state() -> State:
    torch.manual_seed(3)
    return {name: value.clone() for name, value in tiny().state_dict().items()}


def behind(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def other(state: State) -> State:
    return {name: torch.zeros_like(value) for name, value in state.items()}


def check_loads(path: Path, state: State, told: str = "") -> None:
    net = tiny()
    notes = load_weights(net, path)
    assert torch.equal(net.state_dict()[FIRST], state[FIRST])
    assert told in " ".join(notes) and bool(notes) == bool(told)


@pytest.mark.parametrize(
    "prefix",
    ["backbone.", "encoder.", "module.backbone.", "_orig_mod.", "teacher.", "student.", "teacher.backbone.", "model."],
)
def test_prefixes_are_removed_and_said(prefix: str, state: State, tmp_path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": behind(prefix, state)}, tmp_path / "a.pth")
    check_loads(tmp_path / "a.pth", state, f"without the prefix {prefix.removeprefix('module.')!r} of its names")


@pytest.mark.parametrize("key", CONTAINERS)
def test_a_checkpoint_may_hold_them_under_any_usual_key(key: str, state: State, tmp_path: Path) -> None:
    torch.save({key: state, "epoch": 3}, tmp_path / "a.pth")
    check_loads(tmp_path / "a.pth", state, "" if key in ("state_dict", "model") else f"read under '{key}'")


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda s: {"student": behind("module.backbone.", other(s)), "teacher": behind("backbone.", s)}, "'teacher'"),
        (lambda s: {**behind("student.", other(s)), **behind("teacher.", s)}, "prefix 'teacher.'"),
        (
            lambda s: {"state_dict": {**behind("encoder_q.", s), **behind("encoder_k.", other(s)), "queue": s[FIRST]}},
            "'encoder_q.'",
        ),
        (
            lambda s: {
                "state_dict": {**behind("backbone.", s), "decode_head.conv_seg.bias": s["bn1.bias"]},
                "meta": {},
            },
            "'backbone.'",
        ),
        (lambda s: {"model": s, "args": argparse.Namespace(lr=1e-3), "best": np.float32(3)}, ""),
    ],
    ids=["dino", "names", "moco", "mmsegmentation", "arguments"],
)
def test_the_right_network_of_a_checkpoint_is_read(
    make: Callable[[State], Any], told: str, state: State, tmp_path: Path
) -> None:
    torch.save(make(state), tmp_path / "a.pth")
    check_loads(tmp_path / "a.pth", state, told)


def test_the_content_says_the_kind_of_a_file_not_its_suffix(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "a.safetensors")
    save_file(state, tmp_path / "b.pth")
    for name in ("a.safetensors", "b.pth"):
        check_loads(tmp_path / name, state)


def test_a_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(timm.create_model(NET).state_dict(), tmp_path / "a.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build_encoder(NET, "none", "~/a.safetensors")
    changes = {"model.encoder": NET, "model.pretrained": "none", "model.weights": "~/a.safetensors"}
    assert len(encoder_fingerprint(override(RunConfig(), changes).model)["weights"]) == 16


def whole_module(path: Path) -> None:
    torch.save(nn.Linear(2, 2), path)


def program(path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), path)


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.pth", b"1")


def cut(path: Path) -> None:
    torch.save({"a": torch.zeros(9999)}, path)
    path.write_bytes(path.read_bytes()[:9999])


def cut_safetensors(path: Path) -> None:
    save_file({"a": torch.zeros(9999)}, path)
    path.write_bytes(path.read_bytes()[:9999])


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_text("<!DOCTYPE html><html>"), "is a web page; download the file itself"),
        (
            lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
            "fetch them with `git lfs pull`",
        ),
        (lambda path: tarfile.open(path, "w:gz").close(), "compressed archive; unpack it"),
        (lambda path: path.write_bytes(b"\x08\x07\x12\x07pytorch"), "neither a safetensors file nor one of torch.save"),
        (whole_module, r"carries code \(torch.nn.modules.linear.Linear\), which is not run; .*state_dict"),
        (program, r"a program \(TorchScript\), which is not run"),
        (zipped, "cut off, damaged, or no file of torch.save"),
        (cut, "cut off, damaged, or no file of torch.save"),
        (cut_safetensors, "not a whole safetensors file"),
        (lambda path: np.savez(path.open("wb"), kernel=np.zeros(3)), "an archive of NumPy.s arrays"),
        (lambda path: torch.save(torch.zeros(3), path), "holds no tensors by name, but a Tensor"),
        (lambda path: torch.save({"epoch": 3}, path), "holds no tensors by name, but the keys 'epoch'"),
        (lambda path: path.mkdir(), "is a directory; name the file"),
        (lambda path: None, "does not exist"),
        (
            lambda path: torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), path),
            r"lacks conv1.weight \(\d+ missing, 0 of another shape\), and begins with cls_token; set model.encoder",
        ),
    ],
)
def test_what_holds_no_weights_is_one_line_without_unsafe_advice(
    make: Callable[[Path], Any], told: str, tmp_path: Path
) -> None:
    make(tmp_path / "a.pth")
    with pytest.raises(ValueError, match=told) as error:
        load_weights(tiny(), tmp_path / "a.pth")
    said = str(error.value)
    assert said.startswith(f"weights file {tmp_path / 'a.pth'} ") and "\n" not in said
    assert "weights_only" not in said and "trust" not in said


def test_an_address_is_no_file() -> None:
    with pytest.raises(ValueError, match=r"^model.weights = 'https://a.b/c.pth': an address; download the file"):
        build_encoder(NET, "none", "https://a.b/c.pth")


# Networks that timm converts, and grids of positions


def test_positions_of_another_grid_are_resampled_as_timm_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    large = timm.create_model("vit_tiny_patch16_224", img_size=384, num_classes=0).state_dict()
    large["pos_embed"] = torch.randn(large["pos_embed"].shape)
    torch.save({"teacher": behind("backbone.", large)}, tmp_path / "a.pth")
    encoder = build_encoder("vit_tiny_patch16_224", "none", str(tmp_path / "a.pth"))
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    wanted = timm.models.vision_transformer.checkpoint_filter_fn(large, plain)["pos_embed"]
    assert torch.equal(encoder.net.state_dict()["model.pos_embed"], wanted)  # type: ignore[union-attr]
    assert "pos_embed resampled from (1, 577, 192) to (1, 197, 192)" in encoder.notes[0]


def test_official_names_are_converted_by_timm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = timm.create_model("convnext_atto", num_classes=0).state_dict()
    official = {}
    for name, value in ours.items():
        for one, to in (
            ("stem.", "downsample_layers.0."),
            (".blocks.", "."),
            ("conv_dw", "dwconv"),
            ("mlp.fc", "pwconv"),
            ("head.", ""),
        ):
            name = name.replace(one, to)
        stage, _, rest = name.partition(".downsample.")
        name = f"downsample_layers.{stage[-1]}.{rest}" if rest else name
        official[name] = value.flatten(1) if "pwconv" in name and value.ndim == 4 else value
    torch.save({"model": official}, tmp_path / "a.pth")
    encoder = build_encoder("convnext_atto", "none", str(tmp_path / "a.pth"))
    found = encoder.net.state_dict()  # type: ignore[union-attr]
    assert torch.equal(found["stages_1.downsample.1.weight"], ours["stages.1.downsample.1.weight"])
    assert torch.equal(found["stages_3.blocks.0.mlp.fc1.weight"], ours["stages.3.blocks.0.mlp.fc1.weight"])
    assert "with names converted by timm" in encoder.notes[0]


# timm's weights without a network


def test_a_hub_that_does_not_answer_is_told_quickly_with_what_to_bring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    model = override(RunConfig(), {"model.encoder": "resnet18", "model.pretrained": "timm"}).model
    began = time.monotonic()
    told = weights_fault(model, fetch=True)
    assert time.monotonic() - began < 8
    assert told is not None and "\n" not in told
    assert told.startswith("model.pretrained = 'timm': the weights of 'resnet18' (timm/resnet18.a1_in1k) are not")
    assert "http://127.0.0.1:9 does not answer" in told and "set model.weights to a file of them" in told
    assert "`hf download timm/resnet18.a1_in1k model.safetensors` brings it" in told
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(timm_files, "_unreachable", lambda address: pytest.fail("asked although offline is set"))
    assert "HF_HUB_OFFLINE is set" in (weights_fault(model, fetch=True) or "")


def test_weights_in_the_cache_are_read_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    home = tmp_path / "models--timm--resnet10t.c3_in1k"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("abc")
    (home / "snapshots" / "abc").mkdir(parents=True)
    torch.manual_seed(5)
    weights = timm.create_model(NET).state_dict()
    save_file(weights, home / "snapshots" / "abc" / "model.safetensors")

    def refused(*given: object, **words: object) -> None:
        raise AssertionError("no network is needed")

    monkeypatch.setattr("socket.create_connection", refused)
    monkeypatch.setattr("socket.getaddrinfo", refused)
    found = build_encoder(NET, "timm").net.state_dict()  # type: ignore[union-attr]
    assert torch.equal(found["layer1.0.conv1.weight"], weights["layer1.0.conv1.weight"])


def test_a_file_of_a_deeper_network_of_the_family_is_refused(tmp_path: Path) -> None:
    """It has all names of the shallower one, with blocks of another place in the network."""
    path = tmp_path / "deeper.safetensors"
    save_file(timm.create_model("test_convnext", depths=(1, 2, 4, 3)).state_dict(), path)
    with pytest.raises(ValueError, match=r"has stages\.3\.blocks\.2\..* such\), which test_convnext has not"):
        build_encoder("test_convnext", "none", str(path))
    save_file(timm.create_model("test_convnext").state_dict(), path)
    build_encoder("test_convnext", "none", str(path))


def test_a_directory_of_weights_is_no_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"name the file of weights, or set model\.encoder=transformers"):
        file_checksum(tmp_path, "model.weights")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"is a directory; name the file .*/model\.safetensors$"):
        file_checksum(tmp_path, "model.weights")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match=r"/model\.safetensors, or set model\.encoder=transformers$"):
        file_checksum(tmp_path, "model.weights")


def test_weights_for_three_channels_fill_five_as_timm_does_and_are_no_resampled_grid(tmp_path: Path) -> None:
    path, whole = tmp_path / "rgb.safetensors", timm.create_model(NET)
    save_file(whole.state_dict(), path)
    encoder = build_encoder(NET, "none", str(path), inputs=5)
    first = encoder.net.state_dict()["conv1.0.weight"]  # type: ignore[union-attr]
    rgb = whole.state_dict()["conv1.0.weight"]
    assert torch.allclose(first, rgb[:, [0, 1, 2, 0, 1]] * 3 / 5)
    assert encoder.notes == (), "the run's own note says it"


def test_one_of_several_files_and_their_index_are_called_so(state: State, tmp_path: Path) -> None:
    path = tmp_path / "model-00001-of-00002.safetensors"
    save_file({FIRST: state[FIRST]}, path)
    with pytest.raises(ValueError, match=rf"{path.name} lacks conv1\.bias .*it is one of 2 files of a model; join"):
        load_weights(tiny(), path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {}}')
    with pytest.raises(ValueError, match=r"index\.json is JSON, as an index of weights in several files is"):
        load_weights(tiny(), index)


def test_a_length_that_looks_like_another_kind_is_one(tmp_path: Path, state: State) -> None:
    """The first bytes of safetensors are the length of its header, here that of "{" and of "<"."""
    save_file(state, tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    for letter in b"{<":
        more = (letter - length) % 256
        padded = (length + more).to_bytes(8, "little") + whole[8 : 8 + length] + b" " * more + whole[8 + length :]
        (tmp_path / "b.safetensors").write_bytes(padded)
        assert padded[0] == letter
        check_loads(tmp_path / "b.safetensors", state)


def test_arrays_of_jax_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "vit.npz", kernel=np.zeros(3))
    with pytest.raises(ValueError, match=r"vit\.npz is an archive of NumPy's arrays, as of JAX"):
        load_weights(tiny(), tmp_path / "vit.npz")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda x: (x * 100).to(torch.int8), "conv1.weight is int8, not floating point, as of a quantised network"),
        (lambda x: x.clone().fill_(float("nan")), "conv1.weight has 108 values that are NaN or infinite"),
        (lambda x: torch.full_like(x, float("inf")), "conv1.weight has 108 values that are NaN or infinite"),
    ],
)
def test_weights_that_are_no_numbers_of_a_network_are_refused(
    value: Callable[[Tensor], Tensor], message: str, state: State, tmp_path: Path
) -> None:
    save_file({**state, FIRST: value(state[FIRST])}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=rf"weights file .*a\.safetensors: {message}"):
        load_weights(tiny(), tmp_path / "a.safetensors")


def test_half_precision_is_read_with_its_values(state: State, tmp_path: Path) -> None:
    half = {name: x.bfloat16() if x.is_floating_point() else x for name, x in state.items()}
    save_file(half, tmp_path / "a.safetensors")
    check_loads(tmp_path / "a.safetensors", {FIRST: half[FIRST].float()})


def test_weights_of_other_channels_are_read_as_they_are_or_told_as_such(tmp_path: Path) -> None:
    path, four = tmp_path / "four.pth", timm.create_model("resnet18", in_chans=4)
    torch.save(four.state_dict(), path)
    encoder = build_encoder("resnet18", "none", str(path), inputs=4)
    assert torch.equal(encoder.state_dict()["net.conv1.weight"], four.conv1.weight)
    model = override(RunConfig(), {"model.encoder": "resnet18", "model.weights": str(path)}).model
    assert input_note(model, 4) == []
    with pytest.raises(ValueError, match=r"first layer for 4 channels, and the data have 3; set data\.channels=4"):
        build_encoder("resnet18", "none", str(path))
    torch.save(timm.create_model("resnet18").state_dict(), path)
    assert input_note(model, 4) == [
        "first layer's weights for red, green and blue repeated in turn over 4 and scaled by 3 / 4"
    ]
