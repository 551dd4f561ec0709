"""optimizer_step against torch.optim and against its own promises: bit-equal skips, averages, low-precision copies."""

import pytest
import torch

from fastcm.kernels.optimizer_step import optimizer_step

BETAS, EPS = (0.9, 0.995), 1e-8


def buffers(n, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    random = lambda: torch.randn(n, generator=generator)  # noqa: E731
    state = {"param": random(), "grad": random(), "exp_avg": torch.zeros(n), "exp_avg_sq": torch.zeros(n)}
    state |= {"step": torch.zeros(1, dtype=torch.int64), "lr": torch.tensor([2e-3]), "grad_norm": torch.zeros(1)}
    return state | options


def step(kind, state, *, weight_decay=0.01, clip=None):
    optimizer_step(kind, **state, betas=BETAS, eps=EPS, weight_decay=weight_decay, clip=clip)


@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("kind", ["radam", "adamw"])
def test_matches_torch_over_100_steps(kind, weight_decay, clip):
    state = buffers(1023)
    weight = torch.nn.Parameter(state["param"].double())
    optimizer = {
        "radam": lambda: torch.optim.RAdam([weight], lr=2e-3, betas=BETAS, eps=EPS, weight_decay=weight_decay, decoupled_weight_decay=True),
        "adamw": lambda: torch.optim.AdamW([weight], lr=2e-3, betas=BETAS, eps=EPS, weight_decay=weight_decay),
    }[kind]()
    state |= {"target": state["param"].clone(), "mu": torch.tensor([0.9]), "averages": [state["param"].clone() for _ in range(2)]}
    state |= {"decays": torch.tensor([0.99, 0.5]), "low_precision": torch.zeros(1023, dtype=torch.bfloat16)}
    followers = [weight.detach().clone() for _ in range(3)]
    generator = torch.Generator().manual_seed(1)
    for i in range(100):
        lr = 2e-3 * (1 - i / 200)
        state["lr"].fill_(lr)
        optimizer.param_groups[0]["lr"] = float(state["lr"])
        state["grad"].copy_(torch.randn(1023, generator=generator) * (0.01 if i % 3 else 1.0))
        state["grad_norm"].copy_(state["grad"].norm())
        weight.grad = state["grad"].double()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([weight], clip)
        optimizer.step()
        step(kind, state, weight_decay=weight_decay, clip=clip)
        for follower, decay in zip(followers, (0.9, 0.99, 0.5), strict=True):
            follower.lerp_(weight.detach(), 1 - decay)
    assert state["step"].item() == 100
    moved = (weight.detach() - buffers(1023)["param"]).abs().max()
    assert moved > 0.01
    for got, expected in zip([state["param"], state["target"], *state["averages"]], [weight.detach(), *followers], strict=True):
        assert (got - expected).abs().max() < 1e-6 * max(1.0, expected.abs().max())
    # Triton's interpreter truncates to bf16, hence one unit in the last place.
    assert torch.allclose(state["low_precision"].float(), state["param"], rtol=2**-7, atol=0)


@pytest.mark.parametrize("kind", ["radam", "adamw"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_leaves_every_buffer_bit_equal(kind, bad):
    state = buffers(300)
    state |= {"target": torch.randn(300), "mu": torch.tensor([0.9]), "averages": [torch.randn(300)], "decays": torch.tensor([0.99])}
    state |= {"low_precision": torch.randn(300).bfloat16(), "target_low_precision": torch.randn(300).half()}
    step(kind, state, clip=1.0)
    for name in ("param", "exp_avg", "target"):
        state[name][:4] = torch.tensor([-0.0, 0.0, -1e-40, 1e38])
    state["averages"][0][:2] = torch.tensor([-0.0, 0.0])
    state["grad"][7] = bad
    state["grad_norm"].fill_(bad)
    flat = lambda: [t.clone() for v in state.values() for t in (v if isinstance(v, list) else [v])]  # noqa: E731
    before = flat()
    step(kind, state, clip=1.0)
    for old, new in zip(before, flat(), strict=True):
        assert torch.equal(old.view(torch.uint8), new.view(torch.uint8))
    state["grad"][7] = 0.0
    state["grad_norm"].fill_(1.0)
    step(kind, state, clip=1.0)
    assert state["step"].item() == 2
    assert not torch.equal(before[0], state["param"])


def test_slices_and_whole_buffer_agree(monkeypatch):
    module = __import__("fastcm.kernels.optimizer_step", fromlist=["SLICE"])
    states = [buffers(1000), buffers(1000)]
    for state, width in zip(states, (64, 4096), strict=True):
        monkeypatch.setattr(module, "SLICE", width)
        for _ in range(7):
            step("radam", state)
    assert torch.equal(states[0]["param"], states[1]["param"])
    assert (states[0]["param"] - buffers(1000)["param"]).abs().max() > 1e-3
