from __future__ import annotations

import pytest
import torch
from torch import nn

from viladiff.models.ema import ema_momentum, ema_update, frozen_copy


def small_net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(5, 2))
    for _ in range(seed + 1):  # moves the running statistics and the integer counter, differently for each seed
        net(torch.randn(2, 3, 7, 7))
    return net


@pytest.mark.parametrize("step", [0, 1, 2, 98, 99, 100, 5000])
def test_update_equals_a_loop_over_every_tensor(step: int) -> None:
    student, teacher = small_net(0), frozen_copy(small_net(1))
    m = min(1 - 1 / (step + 1), 0.99)
    expected = {}
    for name, mine in teacher.state_dict().items():
        theirs = student.state_dict()[name]
        expected[name] = torch.lerp(mine, theirs, 1 - m) if mine.is_floating_point() else theirs.clone()
        if mine.is_floating_point():
            torch.testing.assert_close(expected[name], m * mine + (1 - m) * theirs)
    before = {name: x.clone() for name, x in student.state_dict().items()}
    ema_update(teacher, student, step, 0.99)
    for name, mine in teacher.state_dict().items():
        assert torch.equal(mine, expected[name]), name
        assert torch.equal(student.state_dict()[name], before[name]), name


def test_first_step_copies_and_later_ones_do_not() -> None:
    student, teacher = small_net(0), frozen_copy(small_net(1))
    ema_update(teacher, student, 0)
    assert all(
        torch.equal(a, b) for a, b in zip(teacher.state_dict().values(), student.state_dict().values(), strict=True)
    )
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    ema_update(teacher, student, 1)
    pairs = zip(student.parameters(), teacher.parameters(), strict=True)
    assert [float((a - b).detach().mean()) for a, b in pairs] == pytest.approx([0.5] * 6, abs=1e-5)


def test_momentum_is_a_plain_average_until_it_reaches_the_limit() -> None:
    assert [ema_momentum(i, 0.99) for i in (0, 1, 3)] == [0.0, 0.5, 0.75]
    assert ema_momentum(98, 0.99) == pytest.approx(98 / 99) and ema_momentum(1000, 0.99) == 0.99
    with pytest.raises(ValueError, match="step = -1"):
        ema_momentum(-1, 0.99)
    with pytest.raises(ValueError, match=r"momentum = 1\.5"):
        ema_momentum(0, 1.5)


def test_frozen_copy_has_no_gradient_and_no_shared_memory() -> None:
    student = small_net(0)
    teacher = frozen_copy(student)
    assert not any(p.requires_grad for p in teacher.parameters()) and all(p.requires_grad for p in student.parameters())
    own = {x.data_ptr() for x in student.state_dict().values()}
    assert own.isdisjoint(x.data_ptr() for x in teacher.state_dict().values())


def test_update_leaves_no_graph_and_no_gradient() -> None:
    student, teacher = small_net(0), frozen_copy(small_net(1))
    ema_update(teacher, student, 5)
    assert all(p.grad is None and p.grad_fn is None and not p.requires_grad for p in teacher.parameters())


def test_half_precision_and_other_structures_are_refused() -> None:
    student = small_net(0)
    with pytest.raises(ValueError, match="bfloat16"):
        ema_update(frozen_copy(student).bfloat16(), student, 5)
    other = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(5, 2))
    with pytest.raises(ValueError, match=r"0\.weight \(5, 3, 3, 3\)"):
        ema_update(other, student, 5)
    teacher = frozen_copy(student)
    ema_update(teacher, small_net(3).bfloat16(), 0)  # a student in half precision is fine
    assert teacher[0].weight.dtype is torch.float32
