"""Published layouts of weights: converted, they compute what their authors' networks compute."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import tiny_vits
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from viladiff.config.sections import ModelConfig
from viladiff.models.encoders.build import build_encoder
from viladiff.models.public_weights import read_weights
from viladiff.models.segmenter import NetworkFactory, Segmenter
from viladiff.runs.config import RunConfig, override
from viladiff.training.fingerprints import weights_fingerprint

State = dict[str, Tensor]
DIM, HEADS, DEPTH, GRID, WIDTH, CLASSES = 32, 2, 12, 5, 64, 4
PROJECTED = (48, 96, 192, 384)
READ = (2, 5, 8, 11)


@pytest.fixture(autouse=True, scope="module")
def _known_to_timm() -> None:
    tiny_vits.register()


class Drawn:
    """Random tensors by name."""

    def __init__(self, seed: int) -> None:
        self.gen, self.state = torch.Generator().manual_seed(seed), dict[str, Tensor]()

    def add(self, name: str, *shape: int, scale: float = 0.3) -> None:
        self.state[name] = scale * torch.randn(shape, generator=self.gen)

    def layer(self, name: str, *shape: int, bias: int | None = None) -> None:
        fan = max(1, torch.Size(shape[1:]).numel())
        self.add(f"{name}.weight", *shape, scale=fan**-0.5)
        self.add(f"{name}.bias", shape[0] if bias is None else bias)


def dinov2_state(registers: int = 0, seed: int = 0, chunks: bool = False, grid: int = GRID) -> State:
    """The official backbone's names and shapes (facebookresearch/dinov2), mask token included."""
    drawn = Drawn(seed)
    drawn.add("cls_token", 1, 1, DIM)
    drawn.add("pos_embed", 1, 1 + grid**2, DIM)
    drawn.add("mask_token", 1, DIM)
    if registers:
        drawn.add("register_tokens", 1, registers, DIM)
    drawn.layer("patch_embed.proj", DIM, 3, 14, 14)
    for i in range(DEPTH):
        block = f"blocks.{i // 3}.{i}" if chunks else f"blocks.{i}"
        for norm in ("norm1", "norm2"):
            drawn.add(f"{block}.{norm}.weight", DIM, scale=1.0)
            drawn.add(f"{block}.{norm}.bias", DIM)
        drawn.layer(f"{block}.attn.qkv", 3 * DIM, DIM)
        drawn.layer(f"{block}.attn.proj", DIM, DIM)
        drawn.add(f"{block}.ls1.gamma", DIM)
        drawn.layer(f"{block}.mlp.fc1", 4 * DIM, DIM)
        drawn.layer(f"{block}.mlp.fc2", DIM, 4 * DIM)
        drawn.add(f"{block}.ls2.gamma", DIM)
    drawn.add("norm.weight", DIM, scale=1.0)
    drawn.add("norm.bias", DIM)
    return drawn.state


def dpt_state(seed: int = 1) -> State:
    """Names and shapes of UniMatch-V2's head, the residual unit that is never called included."""
    drawn = Drawn(seed)
    for i, channels in enumerate(PROJECTED):
        drawn.layer(f"projects.{i}", channels, DIM, 1, 1)
    drawn.layer("resize_layers.0", PROJECTED[0], PROJECTED[0], 4, 4)
    drawn.layer("resize_layers.1", PROJECTED[1], PROJECTED[1], 2, 2)
    drawn.layer("resize_layers.3", PROJECTED[3], PROJECTED[3], 3, 3)
    for i, channels in enumerate(PROJECTED, 1):
        drawn.add(f"scratch.layer{i}_rn.weight", WIDTH, channels, 3, 3, scale=(9 * channels) ** -0.5)
        drawn.layer(f"scratch.refinenet{i}.out_conv", WIDTH, WIDTH, 1, 1)
        for unit in (1, 2):
            for conv in (1, 2):
                drawn.layer(f"scratch.refinenet{i}.resConfUnit{unit}.conv{conv}", WIDTH, WIDTH, 3, 3)
    drawn.layer("scratch.output_conv.0", WIDTH, WIDTH, 3, 3)
    drawn.layer("scratch.output_conv.2", CLASSES, WIDTH, 1, 1)
    return drawn.state


def whole(seed: int = 0, prefix: str = "") -> State:
    parts = {"backbone": dinov2_state(seed=seed), "head": dpt_state(seed + 1)}
    return {f"{prefix}{part}.{name}": value for part, state in parts.items() for name, value in state.items()}


def dinov2_maps(w: State, images: Tensor) -> list[Tensor]:
    """DINOv2's forward pass, block by block, on its own grid: normed tokens of four blocks as maps."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (DIM,), w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    patches = F.conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=14).flatten(2).mT
    count = len(images)
    x = torch.cat([w["cls_token"].expand(count, -1, -1), patches], 1) + w["pos_embed"]
    registers = w.get("register_tokens", torch.zeros(1, 0, DIM))
    x = torch.cat([x[:, :1], registers.expand(count, -1, -1), x[:, 1:]], 1)
    found = []
    for i in range(DEPTH):
        block = f"blocks.{i}"
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").view(count, -1, 3, HEADS, DIM // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / (DIM // HEADS) ** 0.5).softmax(-1)
        attended = linear((weights @ v).transpose(1, 2).flatten(2), f"{block}.attn.proj")
        x = x + w[f"{block}.ls1.gamma"] * attended
        hidden = F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + w[f"{block}.ls2.gamma"] * linear(hidden, f"{block}.mlp.fc2")
        if i in READ:
            tokens = norm(x, "norm")[:, 1 + registers.shape[1] :]
            found.append(tokens.mT.reshape(count, DIM, GRID, GRID))
    return found


def dpt_logits(w: State, maps: list[Tensor]) -> Tensor:
    """The head of UniMatch-V2, in the order of its equations."""

    def conv(x: Tensor, name: str, padding: int = 0, stride: int = 1) -> Tensor:
        return F.conv2d(x, w[f"{name}.weight"], w.get(f"{name}.bias"), padding=padding, stride=stride)

    def unit(x: Tensor, name: str) -> Tensor:
        return x + conv(F.relu(conv(F.relu(x), f"{name}.conv1", 1)), f"{name}.conv2", 1)

    def enlarged(x: Tensor, height: int, width: int) -> Tensor:
        return F.interpolate(x, (height, width), mode="bilinear", align_corners=True)

    x = [conv(m, f"projects.{i}") for i, m in enumerate(maps)]
    x[0] = F.conv_transpose2d(x[0], w["resize_layers.0.weight"], w["resize_layers.0.bias"], stride=4)
    x[1] = F.conv_transpose2d(x[1], w["resize_layers.1.weight"], w["resize_layers.1.bias"], stride=2)
    x[3] = conv(x[3], "resize_layers.3", 1, 2)
    x = [conv(m, f"scratch.layer{i}_rn", 1) for i, m in enumerate(x, 1)]
    path = conv(enlarged(unit(x[3], "scratch.refinenet4.resConfUnit2"), 5, 5), "scratch.refinenet4.out_conv")
    for level, side in ((3, 10), (2, 20), (1, 40)):
        path = path + unit(x[level - 1], f"scratch.refinenet{level}.resConfUnit1")
        path = enlarged(unit(path, f"scratch.refinenet{level}.resConfUnit2"), side, side)
        path = conv(path, f"scratch.refinenet{level}.out_conv")
    return conv(F.relu(conv(path, "scratch.output_conv.0", 1)), "scratch.output_conv.2")


def model(weights: Path | None, **fields: object) -> ModelConfig:
    given = {"encoder": tiny_vits.DINO[0], "pretrained": "none", "decoder": "dpt", "decoder_width": WIDTH, **fields}
    return ModelConfig(weights=None if weights is None else str(weights), **given)  # type: ignore[arg-type]


def built(weights: Path | None, classes: int = CLASSES, **fields: object) -> Segmenter:
    return NetworkFactory(model(weights, **fields), classes, 0)().eval()


@pytest.mark.parametrize(("suffix", "prefix"), [("pth", ""), ("pth", "module."), ("safetensors", "")])
def test_unimatch_v2_computes_what_it_does(suffix: str, prefix: str, tmp_path: Path) -> None:
    state, path = whole(prefix=prefix), tmp_path / f"best.{suffix}"
    if suffix == "pth":
        other = {name: torch.zeros_like(value) for name, value in state.items()}
        scores = {"previous_best": np.float64(80.0), "previous_best_ema": np.float64(81.0)}
        torch.save({"model": other, "model_ema": state, "epoch": 3, **scores}, path)
    else:
        save_file(state, path)
    network, images = built(path), torch.randn(2, 3, 70, 70)
    plain = whole()
    expected = dpt_logits(
        {name.removeprefix("head."): value for name, value in plain.items() if name.startswith("head.")},
        dinov2_maps({name.removeprefix("backbone."): v for name, v in plain.items() if "backbone." in name}, images),
    )
    with torch.no_grad():
        found = network.streams(images)["visual"].logits
    assert found.shape == (2, CLASSES, 40, 40) and expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    pixels = F.interpolate(expected, (70, 70), mode="bilinear", align_corners=True)
    with torch.no_grad():
        torch.testing.assert_close(network(images)["visual"], pixels, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("registers", "chunks"), [(0, False), (0, True), (4, False)])
def test_dinov2_computes_what_it_does(registers: int, chunks: bool, tmp_path: Path) -> None:
    path, images = tmp_path / "dinov2.pth", torch.randn(2, 3, 70, 70)
    torch.save(dinov2_state(registers, chunks=chunks), path)
    encoder = build_encoder(tiny_vits.DINO[registers], "none", str(path), norm="authors").eval()
    with torch.no_grad():
        found = encoder(images)
    for mine, theirs in zip(found, dinov2_maps(dinov2_state(registers), images), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    # The final norm belongs to dpt and map_norm = "final" alone.
    grouped = build_encoder(tiny_vits.DINO[registers], "none", str(path)).eval()
    with torch.no_grad():
        assert all(abs(float(level.mean())) < 1e-4 for level in grouped(images))
        assert not torch.allclose(grouped(images)[0], found[0], atol=1e-2)


def test_positions_of_another_grid_are_resampled_as_timm_does(tmp_path: Path) -> None:
    from timm.layers.pos_embed import resample_abs_pos_embed

    path, state = tmp_path / "dinov2.pth", dinov2_state(grid=3)
    torch.save(state, path)
    encoder = build_encoder(tiny_vits.DINO[0], "none", str(path), norm="authors")
    expected = resample_abs_pos_embed(state["pos_embed"], [GRID, GRID], num_prefix_tokens=1)
    assert torch.equal(encoder.state_dict()["net.model.pos_embed"], expected)
    torch.save({**state, "pos_embed": torch.zeros(1, 8, DIM)}, path)
    with pytest.raises(ValueError, match=r"has \(1, 8, 32\) for model\.pos_embed"):
        build_encoder(tiny_vits.DINO[0], "none", str(path))


def test_gated_mlps_and_registers_get_timms_names(tmp_path: Path) -> None:
    state = dinov2_state(4)
    for name in [name for name in state if ".mlp." in name]:
        state[name.replace("fc1", "w12").replace("fc2", "w3")] = state.pop(name)
    torch.save(state, tmp_path / "giant.pth")
    found = read_weights(tmp_path / "giant.pth").encoder
    assert torch.equal(found["blocks.3.mlp.fc1.weight"], state["blocks.3.mlp.w12.weight"])
    assert torch.equal(found["blocks.3.mlp.fc2.bias"], state["blocks.3.mlp.w3.bias"])
    assert torch.equal(found["cls_token"], state["cls_token"] + state["pos_embed"][:, :1])
    assert found["pos_embed"].shape == (1, GRID**2, DIM) and "mask_token" not in found


def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"

    def refused(state: State, message: str, **fields: object) -> None:
        torch.save(state, path)
        with pytest.raises(ValueError, match=message) as caught:
            built(path, **fields)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)

    state = whole()
    one = torch.zeros(1)
    refused({**state, "head.extra": one}, r"looks like UniMatch-V2, but head\.extra is unknown")
    refused({**state, "backbone.blocks.0.attn.rel": one}, r"UniMatch-V2, but blocks\.0\.attn\.rel is unknown")
    refused({**state, "neck.weight": one}, r"UniMatch-V2, but neck\.weight is unknown")
    refused(without(state, "backbone.mask_token"), "its backbone is not DINOv2's")
    refused(without(state, "head.projects.1.bias"), r"decoder\.project\.1\.bias is missing \(1 such\)")
    refused(without(state, "backbone.norm.bias"), r"lacks model\.norm\.bias")
    refused(state, r"classifier\.score\.weight is \(4, 64, 1, 1\) where the network has \(5, 64, 1, 1\)", classes=5)
    refused(state, r"got model\.decoder = 'light'; set it to dpt", decoder="light")
    refused(state, r"model\.decoder_width and the number of classes", decoder_width=128)
    refused({**dinov2_state(), "head.weight": one}, r"looks like DINOv2, but head\.weight is unknown")


MIT_TO_TIMM = (
    ("patch_embed1", "patch_embed"),
    (r"patch_embed(\d)", lambda m: f"stages.{int(m[1]) - 1}.downsample"),
    (r"block(\d)\.(\d+)", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}"),
    (r"^norm(\d)", lambda m: f"stages.{int(m[1]) - 1}.norm"),
    ("dwconv.dwconv", "dwconv"),
)


def mit_state(widths: tuple[int, ...], seed: int = 0) -> State:
    """SegFormer's names and shapes, two blocks a stage."""
    drawn = Drawn(seed)
    for i, (before, width) in enumerate(zip((3, *widths), widths, strict=False), 1):
        kernel, ratio = (7 if i == 1 else 3), (8, 4, 2, 1)[i - 1]
        drawn.layer(f"patch_embed{i}.proj", width, before, kernel, kernel)
        drawn.layer(f"patch_embed{i}.norm", width)
        for block in (f"block{i}.0", f"block{i}.1"):
            for part, shape in (("norm1", (width,)), ("norm2", (width,)), ("attn.q", (width, width)),
                                ("attn.kv", (2 * width, width)), ("attn.proj", (width, width)),
                                ("mlp.fc1", (4 * width, width)), ("mlp.dwconv.dwconv", (4 * width, 1, 3, 3)),
                                ("mlp.fc2", (width, 4 * width))):  # fmt: skip
                drawn.layer(f"{block}.{part}", *shape)
            if ratio > 1:
                drawn.layer(f"{block}.attn.sr", width, width, ratio, ratio)
                drawn.layer(f"{block}.attn.norm", width)
        drawn.layer(f"norm{i}", width)
    drawn.layer("head", 10, widths[-1])
    return drawn.state


def test_mit_computes_what_it_does(tmp_path: Path) -> None:
    """Timm's PVTv2 with SegFormer's heads and ratios is the same network under other names."""
    from timm.models.pvt_v2 import PyramidVisionTransformerV2

    widths = (32, 64, 160, 256)
    state, path = mit_state(widths), tmp_path / "mit_b0.pth"
    torch.save(state, path)
    plain = PyramidVisionTransformerV2(
        depths=(2, 2, 2, 2), embed_dims=widths, num_heads=(1, 2, 5, 8), mlp_ratios=(4, 4, 4, 4), num_classes=0
    ).eval()
    named = {}
    for name, value in state.items():
        if not name.startswith("head."):
            for pattern, other in MIT_TO_TIMM:
                name = re.sub(pattern, other, name)
            named[name] = value
    plain.load_state_dict(named)
    encoder, images = build_encoder("mit_b0", "none", str(path)).eval(), torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected, x = [], plain.patch_embed(images)
        for stage in plain.stages:
            x = stage(x)
            expected.append(x)
        for mine, theirs in zip(encoder(images), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    torch.save({**state, "block1.0.attn.rel.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"looks like SegFormer, but block1\.0\.attn\.rel is unknown"):
        build_encoder("mit_b0", "none", str(path))


def without(state: State, name: str) -> State:
    return {key: value for key, value in state.items() if key != name}


def test_a_checkpoint_without_an_average_gives_the_network(tmp_path: Path) -> None:
    state = {"student.weight": torch.ones(2)}
    torch.save({"model": state, "model_ema": None}, tmp_path / "last.pth")
    found = read_weights(tmp_path / "last.pth").encoder
    assert found.keys() == state.keys() and torch.equal(found["student.weight"], state["student.weight"])


def test_an_encoder_s_file_leaves_the_head_as_it_was_drawn(tmp_path: Path) -> None:
    path = tmp_path / "dinov2.pth"
    torch.save(dinov2_state(), path)
    torch.manual_seed(3)
    first = built(path)
    torch.manual_seed(3)
    second = built(None)
    mine, theirs = first.state_dict(), second.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine if name.startswith(("decoder.", "classifier.")))
    assert not torch.equal(mine["encoder.net.model.norm.weight"], theirs["encoder.net.model.norm.weight"])


def test_a_run_with_such_a_file_is_named_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(whole(), path)
    cfg = override(RunConfig(), {"model.encoder": tiny_vits.DINO[0], "model.weights": str(path)})
    first = weights_fingerprint(cfg)["weights"]
    torch.save(whole(seed=5), path)
    assert weights_fingerprint(cfg)["weights"] != first
