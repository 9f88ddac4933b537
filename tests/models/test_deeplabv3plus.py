"""DeepLabV3+ on dilated ResNets: against other libraries and UniMatch's network written down again, and in training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from unimatch_layout import convolutions, forward, multiplications, random_state

from viladiff.config.sections import ModelConfig
from viladiff.inference.export import Standalone, export_onnx, onnx_difference
from viladiff.inference.predict import Model
from viladiff.models.decoders.deeplabv3plus import DeepLabV3PlusDecoder
from viladiff.models.encoders.build import build_encoder
from viladiff.models.encoders.load import load_weights
from viladiff.models.public_weights import load_head
from viladiff.models.segmenter import NetworkFactory, Segmenter
from viladiff.models.vila import ViLa, VilaConfig

TINY = {"encoder": "resnet10t", "pretrained": "none", "encoder_stride": 16, "decoder": "deeplabv3plus"}


def network(classes: int = 5, **fields: object) -> Segmenter:
    torch.manual_seed(0)
    return NetworkFactory(ModelConfig(**{**TINY, **fields}), classes, 1)()  # type: ignore[arg-type]


def shake(module: nn.Module, seed: int = 1) -> None:
    """Draw parameters and statistics anew, so that no norm is the identity."""
    draw = torch.Generator().manual_seed(seed)
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=draw, dtype=torch.float64)
            with torch.no_grad():
                value.copy_(1 + noise.abs() if name.endswith("running_var") else 0.2 * noise)


# Against other libraries


@pytest.mark.parametrize("stride", [16, 8])
def test_pyramid_and_skip_are_those_of_segmentation_models(stride: int) -> None:
    kept = pytest.importorskip("segmentation_models_pytorch.decoders.deeplabv3.decoder")
    rates = {16: (6, 12, 18), 8: (12, 24, 36)}[stride]
    depth = 5 if stride == 16 else 4
    theirs = kept.DeepLabV3PlusDecoder((3, 64, 24, 40, 512, 512)[: depth + 1], depth, 64, rates, stride, False, 0.0)
    if stride == 8:
        theirs.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
    theirs.aspp, theirs.block2 = theirs.aspp[0], nn.Identity()  # its separable convolutions are not UniMatch's
    shake(theirs)
    ours = DeepLabV3PlusDecoder((24, 40, 512, 512), (4, 8, stride, stride))
    names = {f"pyramid.branches.{i}": f"aspp.convs.{i}" for i in range(4)}
    names |= {"pyramid.project": "aspp.project", "reduce": "block1"}
    state = theirs.state_dict()
    for name, other in names.items():
        part = {k.removeprefix(f"{other}."): v for k, v in state.items() if k.startswith(f"{other}.")}
        ours.get_submodule(name).load_state_dict(part)
    pooled = {k: state[f"aspp.convs.4.{int(k[0]) + 1}{k[1:]}"] for k in ours.pyramid.pooling.state_dict()}
    ours.pyramid.pooling.load_state_dict(pooled)
    ours.fuse = nn.Identity()  # type: ignore[assignment]
    fine, top = torch.rand(2, 24, 7 * stride // 4, 5 * stride // 4).double(), torch.rand(2, 512, 7, 5).double()
    for mode in (True, False):
        theirs.double().train(mode), ours.double().train(mode)
        expected = theirs(
            [None, None, fine, None, None, top][: depth + 1] if depth == 5 else [None, None, fine, None, top]
        )
        assert (ours(top, ours.laterals([fine, fine, top, top])).roll(64, 1) - expected).abs().max() < 1e-10


@pytest.mark.parametrize(("stride", "dilated"), [(16, [False, False, True]), (8, [False, True, True])])
def test_a_dilated_resnet_is_torchvisions_with_the_deep_stem(stride: int, dilated: list[bool]) -> None:
    from torchvision.models.resnet import Bottleneck, ResNet

    theirs = ResNet(Bottleneck, [3, 4, 6, 3], replace_stride_with_dilation=dilated)
    theirs.conv1 = nn.Sequential(  # type: ignore[assignment]
        nn.Conv2d(3, 64, 3, 2, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 128, 3, 1, 1, bias=False),
    )  # fmt: skip
    theirs.bn1 = nn.BatchNorm2d(128)
    theirs.layer1[0].conv1 = nn.Conv2d(128, 64, 1, bias=False)
    assert theirs.layer1[0].downsample is not None
    theirs.layer1[0].downsample[0] = nn.Conv2d(128, 256, 1, bias=False)
    ours = build_encoder("resnet50s", "none", stride=stride).eval()
    assert ours.strides == (4, 8, stride, stride) and ours.channels == (256, 512, 1024, 2048) and ours.any_size
    ours.net.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")})
    theirs.eval()
    x = torch.randn(1, 3, 65, 97)
    with torch.inference_mode():
        y = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
        for place, found in enumerate(ours(x)):
            y = getattr(theirs, f"layer{place + 1}")(y)
            assert found.shape[-2:] == tuple(-(-side // ours.strides[place]) for side in (65, 97))
            assert (found - y).abs().max() < 1e-4 * max(1, float(y.abs().max()))


# Against UniMatch's network, written down again


@pytest.mark.parametrize(("stride", "size"), [(16, (97, 81)), (8, (65, 70))])
def test_a_file_of_unimatch_gives_the_logits_of_its_network(stride: int, size: tuple[int, int], tmp_path: Path) -> None:
    state = random_state("resnet50s", 7)
    torch.save({"model": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "unimatch.pth")
    net = network(7, encoder="resnet50s", encoder_stride=stride, weights=str(tmp_path / "unimatch.pth")).eval()
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        expected, found = forward(state, x, "resnet50s", stride), net(x)["visual"]
    assert found.shape == expected.shape == (1, 7, *size) and expected.std() > 0.1
    assert (found - expected).abs().max() < 1e-4 * max(1.0, float(expected.abs().max()))


def saved(state: dict[str, Tensor], path: Path) -> str:
    torch.save(state, path)
    return str(path)


def test_files_that_do_not_fit_are_refused_in_one_line(tmp_path: Path) -> None:
    # One number stands for each tensor, so that files are small.
    state = {name: torch.zeros(()).expand(value.shape) for name, value in random_state("resnet50s", 7).items()}
    nets = {"resnet50s": network(7, encoder="resnet50s")}
    nets["resnet101s"] = network(7, encoder="resnet101s")
    nets["5 classes"] = network(5, encoder="resnet50s")

    def refusal(change: dict[str, Tensor], without: str = "", net: str = "resnet50s", decoder: str = "") -> str:
        path = saved({k: v for k, v in {**state, **change}.items() if k != without}, tmp_path / "a.pth")
        model = ModelConfig(**{**TINY, "weights": path, "decoder": decoder or "deeplabv3plus"})  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"a\.pth") as error:
            load_weights(nets[net].encoder.net, Path(path))  # type: ignore[arg-type]
            load_head(nets[net], model)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "head.b5.0.weight is unknown" in refusal({"head.b5.0.weight": torch.zeros(1)})
    assert "it has fc.weight beyond the encoder" in refusal({"backbone.fc.weight": torch.zeros(1)})
    assert "it lacks layer2.1.conv2.weight" in refusal({}, without="backbone.layer2.1.conv2.weight")
    assert "decoder.fuse.1.0.weight is missing" in refusal({}, without="fuse.3.weight")
    assert "it lacks layer3.6.conv1.weight" in refusal({}, net="resnet101s")
    assert "classifier.score.weight is (7, 256, 1, 1) where the network has (5, 256, 1, 1)" in refusal(
        {}, net="5 classes"
    )
    assert "set it to deeplabv3plus" in refusal({}, decoder="light")


def test_counts_that_old_files_lack_stay_as_they_are(tmp_path: Path) -> None:
    encoder = build_encoder("resnet10t", "none", stride=16)
    shake(encoder)
    found = {name: value for name, value in encoder.net.state_dict().items() if "num_batches" not in name}
    again = build_encoder("resnet10t", "none", saved(found, tmp_path / "old.pth"), stride=16).net.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in found.items())


@pytest.mark.parametrize(("encoder", "stride", "classes", "millions"), [
    ("resnet101s", 16, 21, 59.5), ("resnet101s", 16, 19, 59.5), ("resnet50s", 16, 19, 40.5), ("resnet50s", 8, 21, 40.5),
])  # fmt: skip
def test_parameters_are_the_published_ones(encoder: str, stride: int, classes: int, millions: float) -> None:
    """Counted from the layer sizes of the specification, in millions."""
    with torch.device("meta"):
        net = network(classes, encoder=encoder, encoder_stride=stride)
    count = sum(
        conv.inputs * conv.outputs * conv.kernel**2 + (classes if conv.norm is None else 2 * conv.outputs)
        for conv in convolutions(encoder, stride, classes)
    )
    assert sum(p.numel() for p in net.parameters()) == count
    assert round(count / 1e6, 1) == millions


@pytest.mark.parametrize(("stride", "side"), [(16, 321), (16, 513), (16, 801), (8, 513)])
def test_operations_are_those_of_the_straight_line(stride: int, side: int) -> None:
    with torch.device("meta"):
        net = network(21, encoder="resnet101s", encoder_stride=stride).eval()
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            assert net(torch.zeros(1, 3, side, side))["visual"].shape == (1, 21, side, side)
    assert counter.get_total_flops() == multiplications("resnet101s", stride, 21, side)


# The contract of decoders


@pytest.mark.parametrize("side", [(65, 81), (64, 96)])
def test_streams_share_the_skip(side: tuple[int, int]) -> None:
    net = network()
    net.vila = ViLa(512, 12, VilaConfig(width=32, heads=2))
    net.classifier_fusion = net.decoder.classifier(5)
    shake(net)
    net.eval()
    calls: list[Tensor] = []
    net.decoder.reduce.register_forward_hook(lambda _, given, __: calls.append(given[0]))  # type: ignore[operator, union-attr, arg-type]
    with torch.inference_mode():
        features = net.encode(torch.rand(2, 3, *side))
        both = net.decode(features)
        assert len(calls) == 1 and len(calls[0]) == 2
        for name, stream in both.items():
            grid = tuple(-(-length // 4) for length in side)
            assert stream.mid.shape == (2, 256, *grid) and stream.logits.shape == (2, 5, *grid)
            alone = net.decode(features, names=(name,))[name]
            assert (alone.logits - stream.logits).abs().max() < 1e-4 * stream.logits.abs().max()
    assert (net.decoder.width, net.decoder.stride, net.side_multiple, net.patch) == (256, 4, 1, 16)


def test_maps_are_enlarged_with_corners_aligned() -> None:
    net = network()
    maps = torch.rand(1, 5, 17, 17)
    pixels = net.upsample(maps, (65, 65))
    assert torch.allclose(pixels[..., ::4, ::4], maps, atol=1e-6)
    assert not torch.allclose(network(decoder="light", decoder_width=16).upsample(maps, (65, 65)), pixels, atol=1e-3)


@pytest.mark.parametrize(("fields", "message"), [
    ({"encoder_stride": None}, r"got strides 4, 8, 16, 32; .*model\.encoder_stride=16"),
    ({"encoder": "vit_tiny_patch16_224"}, r"encoder_stride = 16: timm cannot dilate model\.encoder = 'vit_tiny"),
    ({"encoder": "digits_vit"}, r"encoder_stride = 16: only convolutional encoders"),
    ({"encoder": "hrnet_w18_small"}, r"encoder_stride = 16: timm cannot dilate"),
])  # fmt: skip
def test_encoders_that_cannot_are_refused_in_one_line(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        network(**fields)
    assert "\n" not in str(error.value)


def test_one_image_in_training_is_refused_and_fine_in_evaluation() -> None:
    net = network()
    with pytest.raises(
        ValueError, match=r"two images or more in each training pass.*got 1; raise data\.batch_labelled"
    ):
        net(torch.rand(1, 3, 64, 64))
    assert net(torch.rand(2, 3, 64, 64))["visual"].shape == (2, 5, 64, 64)
    assert net.eval()(torch.rand(1, 3, 64, 64))["visual"].shape == (1, 5, 64, 64)


def test_a_frozen_encoder_keeps_its_statistics() -> None:
    nets = network(encoder_frozen=True).train(), network().train()
    for net, same in zip(nets, (True, False), strict=True):
        before = net.encoder.net.bn1.running_mean.clone()  # type: ignore[operator, union-attr]
        net(torch.rand(2, 3, 64, 64))
        assert torch.equal(before, net.encoder.net.bn1.running_mean) == same  # type: ignore[arg-type, union-attr]
        assert net.decoder.reduce[1].training  # type: ignore[index, union-attr]


@pytest.mark.slow
def test_it_learns_four_images_by_heart() -> None:
    net = network(3)
    draw = torch.Generator().manual_seed(2)
    images = torch.randn(4, 3, 49, 49, generator=draw)
    labels = torch.randint(0, 3, (4, 7, 7), generator=draw).repeat_interleave(7, 1).repeat_interleave(7, 2)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(net(images)["visual"], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    right = (net(images)["visual"].argmax(1) == labels).float().mean()
    assert losses[0] > 0.8 and losses[-1] < 0.25 * losses[0] and right > 0.9, (losses[0], losses[-1], right)


@pytest.mark.slow
def test_onnx_with_free_sizes(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    net = network()
    shake(net)
    model = Model(net.eval(), tuple("abcde"), 48, "original", torch.device("cpu"))
    assert export_onnx(model, tmp_path / "model.onnx") < 1e-4
    for shape in ((1, 80, 112), (3, 64, 48)):
        assert onnx_difference(Standalone(net), tmp_path / "model.onnx", shape) < 1e-4
