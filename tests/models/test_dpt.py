"""UniMatch-V2's DPT head: against transformers' neck, in parameters and operations, on grids of all encoders."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from viladiff.config.sections import ModelConfig
from viladiff.models.decoders.dpt import DptDecoder, _factors
from viladiff.models.encoders.build import build_encoder
from viladiff.models.segmenter import Segmenter

SIZES = {
    "vit_small_patch14_dinov2": (384, 64),
    "vit_base_patch14_dinov2": (768, 128),
    "vit_large_patch14_dinov2": (1024, 256),
}


def copied(into: nn.Module, source: nn.Module) -> None:
    into.load_state_dict(source.state_dict())


def test_neck_is_that_of_transformers() -> None:
    """Equal weights, equal maps; grids of even sides, since the two bring odd ones to each other differently."""
    from transformers import DPTConfig
    from transformers.models.dpt.modeling_dpt import DPTNeck

    torch.manual_seed(0)
    config = DPTConfig(
        hidden_size=24, neck_hidden_sizes=[48, 96, 192, 384], fusion_hidden_size=64, readout_type="ignore",
        reassemble_factors=[4, 2, 1, 0.5], is_hybrid=False,
    )  # fmt: skip
    neck, ours = DPTNeck(config).eval(), DptDecoder((24,) * 4, (16,) * 4, 64).eval()
    for i in range(4):
        theirs = neck.reassemble_stage.layers[i]
        copied(ours.project[i], theirs.projection)
        copied(ours.resize[i], theirs.resize)
        copied(ours.reduce[i], neck.convs[i])
        layer = neck.fusion_stage.layers[3 - i]  # theirs begins with the coarsest
        copied(ours.fuse[i].out, layer.projection)
        for unit, other in ((ours.fuse[i].unit, layer.residual_layer2), *units(ours, i, layer)):
            copied(unit.first, other.convolution1)
            copied(unit.second, other.convolution2)
    maps = [torch.randn(2, 24, 6, 8) for _ in range(4)]
    tokens = [torch.cat([torch.zeros(2, 1, 24), x.flatten(2).mT], 1) for x in maps]
    with torch.no_grad():
        expected = neck(tokens, 6, 8)[-1]
        found = ours(maps[3], ours.laterals(maps))
    assert found.shape == (2, 64, 48, 64)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def units(ours: DptDecoder, level: int, layer: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    return [(ours.lateral[level], layer.residual_layer1)] if level < 3 else []


@pytest.mark.parametrize(
    ("name", "millions", "head_millions"),
    [("vit_small_patch14_dinov2", 24.8, 2.7), ("vit_base_patch14_dinov2", 97.5, 10.9)],
)
def test_parameters_are_the_published_ones(name: str, millions: float, head_millions: float) -> None:
    """Published counts hold two things that nothing reads: the mask token and a residual unit of one fusion."""
    dim, width = SIZES[name]
    with torch.device("meta"):
        network = Segmenter(
            build_encoder(name, "none", norm="authors"), ModelConfig(decoder="dpt", decoder_width=width), 21
        )
    unread_unit, mask_token = 2 * (9 * width * width + width), dim
    own = count(network.decoder) + count(network.classifier) + unread_unit
    assert round(own / 1e6, 1) == head_millions
    assert round((count(network.encoder) + mask_token + own) / 1e6, 1) == millions


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_operations_of_the_head_for_dinov2_b_at_518() -> None:
    with torch.device("meta"):
        head = DptDecoder((768,) * 4, (14,) * 4, 128)
        classifier, maps = head.classifier(21), [torch.empty(1, 768, 37, 37) for _ in range(4)]
        with FlopCounterMode(display=False) as counter:
            mid = head(maps[3], head.laterals(maps))
            logits = classifier(mid, maps[3])
    assert logits.shape == (1, 21, 296, 296) and round(counter.get_total_flops() / 1e9) == 81


@pytest.mark.parametrize(
    ("strides", "stride", "side"),
    [
        ((14,) * 4, 1.75, 42),
        ((16,) * 4, 2, 48),
        ((8,) * 4, 1, 24),
        ((4, 8, 16, 32), 2, 64),
        ((4, 8, 16, 16), 2, 48),
        ((4, 8, 8, 8), 1, 24),
        ((2, 4, 8, 8), 1, 24),
    ],
)
def test_grid_of_every_encoder(strides: tuple[int, ...], stride: float, side: int) -> None:
    head = DptDecoder((8, 8, 16, 16), strides, 64)
    assert head.stride == stride and isinstance(head.stride, type(stride))
    assert strides[-1] / head.stride == strides[-1] // head.stride
    maps = [torch.rand(1, c, side // s, (side + strides[-1]) // s) for c, s in zip(head_channels, strides, strict=True)]
    found = head(maps[3], head.laterals(maps))
    assert found.shape == (1, 64, side / stride, (side + strides[-1]) / stride)
    assert head.classifier(5)(found, maps[3]).shape == (1, 5, *found.shape[-2:])


head_channels = (8, 8, 16, 16)


def test_two_streams_share_laterals() -> None:
    head = DptDecoder((8,) * 4, (14,) * 4, 64).eval()
    maps, other = [torch.rand(2, 8, 3, 3) for _ in range(4)], torch.rand(2, 8, 3, 3)
    with torch.no_grad():
        laterals = head.laterals(maps)
        both = head(torch.cat([maps[3], other]), laterals)
        apart: list[Tensor] = [head(top, laterals) for top in (maps[3], other)]
    torch.testing.assert_close(both, torch.cat(apart), rtol=1e-5, atol=1e-5)


def test_other_widths_and_strides_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.decoder_width = 100: .* one of 64, 128, 256; nearest: 128"):
        DptDecoder((8,) * 4, (14,) * 4, 100)
    with pytest.raises(ValueError, match=r"maps at strides \(4, 12, 16, 32\) cannot be brought to a doubling sequence"):
        DptDecoder((8,) * 4, (4, 12, 16, 32), 64)
    assert [float(x) for x in _factors((14,) * 4)[0]] == [4, 2, 1, 0.5]
