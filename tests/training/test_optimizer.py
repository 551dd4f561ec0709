"""FlatOptimizer: modules as views of flat buffers train as torch's own optimizers do, and say so when they are views no more."""

import pytest
import torch
from torch import nn

from fastcm.training.config import OptimizerConfig
from fastcm.training.optimizer import FlatOptimizer


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(6 * 16, 5))


def config(**changes):
    return OptimizerConfig(**{"kind": "radam", "weight_decay": 0.02, "clip": None, "ema_halflife_kimg": (1.0,)} | changes)


def take_steps(module, optimizer, first, last):
    """Steps first .. last - 1 of a regression whose data depend on the step alone."""
    for i in range(first, last):
        optimizer.zero_grad()
        loss_of(module, i).backward()
        scalars = {"lr": torch.tensor([5e-4]), "mu": torch.tensor([0.9]), "ema_decays": torch.tensor([0.95])}
        optimizer.step(**scalars, grad_norm=optimizer.gradient_norm())


def loss_of(module, i):
    x = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(i))
    return (module(x.to(next(module.parameters()).dtype)) - x.flatten(1)[:, :5]).square().mean()


def test_a_hundred_steps_are_those_of_torch():
    mine, theirs = network(), network().double()
    settings = config()
    optimizer = FlatOptimizer(mine, None, settings)
    other = torch.optim.RAdam(
        theirs.parameters(), lr=5e-4, betas=settings.betas, eps=settings.eps, weight_decay=0.02, decoupled_weight_decay=True
    )
    start = [p.detach().clone() for p in theirs.parameters()]
    with torch.no_grad():
        averages = [p.clone() for p in theirs.parameters()]
    for i in range(100):
        take_steps(mine, optimizer, i, i + 1)
        # The gradient of the fp32 module, so that only the optimizers are compared.
        for p, own in zip(theirs.parameters(), mine.parameters(), strict=True):
            p.grad = own.grad.double().contiguous()
        other.step()
        torch._foreach_lerp_(averages, [p.detach() for p in theirs.parameters()], 0.05)
    for p, want, begin, average, held in zip(
        mine.parameters(), theirs.parameters(), start, averages, optimizer.average(0).values(), strict=True
    ):
        assert (p - want).abs().max() < 1e-6 and (want - begin).abs().max() > 1e-3
        assert (held - average).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("passes", [1, 3])
def test_gathered_gradients_are_the_preset_ones(dtype, passes):
    made = []
    for gathers in (False, True):
        module = network().to(dtype)
        module.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=dtype)))
        optimizer = FlatOptimizer(module, None, config(), dtype=dtype)
        if passes > 1:
            optimizer.sum_in_fp32()
        if gathers:
            optimizer.gather_gradients()
            optimizer.gradient.fill_(7)  # of a step before
        optimizer.zero_grad()
        for i in range(passes):
            loss_of(module, i).backward()
            optimizer.collect()
        assert not gathers or all(parameter.grad is None for parameter in module.parameters())
        made.append(optimizer.layout.views(optimizer.collected))
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True)) and made[0][1].abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resumed_midway_is_bit_equal_and_named_as_the_module_is(dtype):
    def started():
        student, target = network().to(dtype), network().to(dtype)
        return student, target, FlatOptimizer(student, target, config(), dtype=dtype)

    student, target, optimizer = started()
    take_steps(student, optimizer, 0, 50)
    parts = optimizer.state_dict()
    take_steps(student, optimizer, 50, 100)
    again, again_target, resumed = started()
    resumed.load_state_dict(parts)
    take_steps(again, resumed, 50, 100)
    moved = optimizer.state_dict()["weights"]["0.weight"]
    assert resumed.steps_taken.item() == 100 and not torch.equal(parts["weights"]["0.weight"], moved)
    for one, other in ((student, again), (target, again_target)):
        assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    for role, state in optimizer.state_dict().items():
        assert all(torch.equal(t, resumed.state_dict()[role][name]) for name, t in state.items()), role
    # Masters and averages are fp32 and contiguous under the module's own names: any module of the structure takes them.
    assert {t.dtype for t in parts["weights"].values()} == {torch.float32} and all(t.is_contiguous() for t in parts["ema_0"].values())
    network(1).load_state_dict(parts["ema_0"], strict=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.half(),
        lambda module: module.to(torch.float64),
        lambda module: setattr(module[3], "weight", nn.Parameter(module[3].weight.detach().clone())),
        lambda module: setattr(module[0].bias, "data", module[0].bias.detach().clone()),
        lambda module: module.load_state_dict(network(1).state_dict(), assign=True),
    ],
    ids=["half", "to float64", "new parameter", "new data", "assigned"],
)
@pytest.mark.parametrize("which", ["student", "target"])
def test_parameters_that_are_views_no_more_are_an_error(change, which):
    student, target = network(), network()
    optimizer = FlatOptimizer(student, target, config())
    optimizer.check_views()
    take_steps(student, optimizer, 0, 2)
    optimizer.check_views()
    change(student if which == "student" else target)
    with pytest.raises(ValueError, match=rf"parameters of the {which} are not views of the optimizer's buffers\. Do not call \.to\(\)"):
        optimizer.check_views()


def test_a_state_of_another_module_is_refused_by_name():
    optimizer = FlatOptimizer(network(), None, config())
    parts = optimizer.state_dict()
    with pytest.raises(ValueError, match="state without the part exp_avg"):
        optimizer.load_state_dict({"weights": parts["weights"], "ema_0": parts["ema_0"]})
    parts["weights"]["0.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"state does not fit the parameters: 0\.weight \(shape \[1\] for \[6, 2, 3, 3\]\)"):
        optimizer.load_state_dict(parts)
