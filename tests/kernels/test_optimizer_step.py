"""optimizer_step against torch.optim in float64 and its own promises: bit-equal skips, averages, copies, device scalars."""

import importlib

import pytest
import torch
from kernel_checks import each_implementation, using  # noqa: F401

from fastcm import kernels

MODULE = importlib.import_module("fastcm.kernels.optimizer_step")  # the package has the function under this name
BETAS, EPS = (0.9, 0.995), 1e-8
DECAYS = (0.99, 0.5)


def buffers(n, device="cpu", followers=False, low=None):
    generator = torch.Generator().manual_seed(0)
    state = {"param": torch.randn(n, generator=generator), "grad": torch.randn(n, generator=generator)}
    state |= {"exp_avg": torch.zeros(n), "exp_avg_sq": torch.zeros(n), "step": torch.zeros(1, dtype=torch.int64)}
    state |= {"lr": torch.tensor([2e-3]), "grad_norm": torch.zeros(1)}
    if followers:
        state |= {"target": state["param"].clone(), "mu": torch.tensor([0.9]), "decays": torch.tensor(DECAYS)}
    if low is not None:
        state |= {"low_precision": torch.zeros(n, dtype=low)} | ({"target_low_precision": torch.zeros(n, dtype=low)} if followers else {})
    state = {name: t.to(device) for name, t in state.items()}
    return state | ({"averages": [state["param"].clone() for _ in DECAYS]} if followers else {})


def update(kind, state, *, weight_decay=0.01, clip=None):
    kernels.optimizer_step(kind, **state, betas=BETAS, eps=EPS, weight_decay=weight_decay, clip=clip)


def set_gradient(state, i):
    n, device = len(state["param"]), state["param"].device
    gradient = torch.randn(n, generator=torch.Generator().manual_seed(i)) * (0.01 if i % 3 else 1.0)
    state["grad"].copy_(gradient.to(device))
    state["grad_norm"].copy_(state["grad"].norm())


def tensors(state):
    return {f"{name}[{i}]": t for name, value in state.items() for i, t in enumerate(value if isinstance(value, list) else [value])}


def assert_same_bits(before, after):
    for name, t in tensors(before).items():
        assert torch.equal(t.view(torch.uint8), tensors(after)[name].view(torch.uint8)), name


def copied(state):
    return {name: [t.clone() for t in v] if isinstance(v, list) else v.clone() for name, v in state.items()}


@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize(("kind", "weight_decay"), [("radam", 0.0), ("radam", 0.05), ("adamw", 0.05)])
def test_matches_torch_over_100_steps(device, kind, weight_decay, clip):
    state = buffers(1023, device, followers=True, low=torch.bfloat16)
    weight = torch.nn.Parameter(state["param"].cpu().double())
    start = weight.detach().clone()
    options = {"lr": 2e-3, "betas": BETAS, "eps": EPS, "weight_decay": weight_decay}
    optimizer = torch.optim.AdamW([weight], **options)
    if kind == "radam":
        optimizer = torch.optim.RAdam([weight], **options, decoupled_weight_decay=True)
    followers = [weight.detach().clone() for _ in range(3)]
    for i in range(100):
        state["lr"].fill_(2e-3 * (1 - i / 200))
        optimizer.param_groups[0]["lr"] = state["lr"].item()
        set_gradient(state, i)
        weight.grad = state["grad"].cpu().double()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([weight], clip)
        optimizer.step()
        update(kind, state, weight_decay=weight_decay, clip=clip)
        for follower, decay in zip(followers, (0.9, *DECAYS), strict=True):
            follower.lerp_(weight.detach(), 1 - decay)
    assert state["step"].item() == 100 and (weight.detach() - start).abs().max() > 0.01
    found = [state["param"], state["target"], *state["averages"]]
    for got, want in zip(found, [weight.detach(), *followers], strict=True):
        assert (got.cpu() - want).abs().max() < 1e-6 * max(1.0, want.abs().max())
    # One unit in the last place: Triton's interpreter truncates to bf16.
    for copy, master in (("low_precision", "param"), ("target_low_precision", "target")):
        assert torch.allclose(state[copy].float(), state[master], rtol=2**-7, atol=0)


# Fewer than a block, whole blocks and a rest, several blocks for each program; 16-bit gradients and copies.
@pytest.mark.parametrize("n", [1, 63, 1023, 1024, 12 * 1024 + 16])
@pytest.mark.parametrize("low", [None, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["radam", "adamw"])
def test_every_size_matches_the_reference_in_float64(device, n, low, kind):
    state = buffers(n, device, followers=True, low=low)
    if low is not None:
        state["grad"] = state["grad"].to(low)
    exact = {name: [t.double() for t in v] if isinstance(v, list) else v for name, v in copied(state).items()}
    exact = {name: v.double() if isinstance(v, torch.Tensor) and v.dtype == torch.float32 else v for name, v in exact.items()}
    # Beyond the sixth step RAdam rectifies; the seventh gradient is not finite.
    for i in range(9):
        set_gradient(state, i)
        if i == 6:
            state["grad_norm"].fill_(float("nan"))
        exact["grad"].copy_(state["grad"])
        exact["grad_norm"].copy_(state["grad_norm"])
        update(kind, state, clip=0.5)
        expected(kind, exact, clip=0.5, weight_decay=0.01)
    assert state["step"].item() == 8
    for name, t in tensors(state).items():
        want = tensors(exact)[name].double()
        rtol = 2**-10 if t.dtype == torch.float16 else 2e-6
        assert torch.allclose(t.double(), want, rtol=rtol, atol=1e-7), (name, (t.double() - want).abs().max())


def expected(kind, state, *, clip, weight_decay):
    """One update by the formulas of the two papers, float64, one element a line of text."""
    norm = state["grad_norm"].item()
    if norm != norm or norm == float("inf"):
        return
    state["step"] += 1
    t, lr, (beta1, beta2) = state["step"].item(), state["lr"].item(), BETAS
    gradient = state["grad"].double() * min(1.0, clip / (norm + 1e-6))
    state["exp_avg"].copy_(beta1 * state["exp_avg"] + (1 - beta1) * gradient)
    state["exp_avg_sq"].copy_(beta2 * state["exp_avg_sq"] + (1 - beta2) * gradient**2)
    mean, root = state["exp_avg"] / (1 - beta1**t), state["exp_avg_sq"].sqrt()
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
    if kind == "adamw":
        direction = mean / (root / (1 - beta2**t) ** 0.5 + EPS)
    elif rho > 5:
        rectification = ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) ** 0.5
        direction = rectification * mean * (1 - beta2**t) ** 0.5 / (root + EPS)
    else:
        direction = mean
    param = state["param"]
    param.copy_(param * (1 - lr * weight_decay) - lr * direction)
    for follower, decay in ((state["target"], state["mu"].item()), *zip(state["averages"], state["decays"].tolist(), strict=True)):
        follower.copy_(decay * follower + (1 - decay) * param)
    for copy, master in (("low_precision", "param"), ("target_low_precision", "target")):
        if copy in state:
            state[copy].copy_(state[master])


@pytest.mark.parametrize("kind", ["radam", "adamw"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_leaves_every_buffer_bit_equal(device, kind, bad):
    state = buffers(3000, device, followers=True, low=torch.float16)
    set_gradient(state, 0)
    update(kind, state, clip=1.0)
    for t in (state["param"], state["exp_avg"], state["target"], *state["averages"]):
        t[:4] = torch.tensor([-0.0, 0.0, -1e-40, 1e38])
    state["low_precision"].fill_(-0.0)
    state["grad"][7] = bad
    state["grad_norm"].fill_(bad)
    before = copied(state)
    update(kind, state, clip=1.0)
    assert_same_bits(before, state)
    set_gradient(state, 1)
    update(kind, state, clip=1.0)
    assert state["step"].item() == 2 and not torch.equal(before["param"], state["param"])


def test_resumed_midway_is_bit_equal(device):
    state = buffers(2100, device, followers=True, low=torch.float16)
    resumed = None
    for i in range(12):
        if i == 5:
            resumed = copied(state)
        for run in filter(None, (state, resumed)):
            set_gradient(run, i)
            update("radam", run, clip=1.0)
    assert_same_bits(state, resumed)
    assert state["step"].item() == 12 and not torch.equal(state["param"], buffers(2100, device)["param"])


def test_scalars_are_read_on_the_device(device):
    """What a CUDA graph needs: new values of the same tensors change the next update."""
    state = buffers(100, device, followers=True)
    set_gradient(state, 0)
    update("adamw", state)
    state["lr"].zero_()
    state["mu"].zero_()
    before = state["param"].clone()
    update("adamw", state)
    assert torch.equal(state["param"], before)
    assert torch.allclose(state["target"], before, atol=1e-6) and not torch.allclose(state["averages"][0], before, atol=1e-6)


@pytest.mark.gpu
def test_a_cuda_graph_replays_with_new_scalars():
    graphed, eager = (buffers(12304, "cuda", followers=True, low=torch.bfloat16) for _ in range(2))
    with using("triton"):
        for state in (graphed, eager):
            set_gradient(state, 0)
            update("radam", state, clip=1.0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            update("radam", graphed, clip=1.0)
        for i in range(1, 9):
            for state in (graphed, eager):
                set_gradient(state, i)
                state["lr"].fill_(1e-3 / i)
                if i == 4:
                    state["grad_norm"].fill_(float("inf"))
            graph.replay()
            update("radam", eager, clip=1.0)
    assert eager["step"].item() == 8
    assert_same_bits(eager, graphed)


@pytest.mark.hardware("needs gigabytes")
@pytest.mark.gpu
@pytest.mark.slow
def test_beyond_2_to_the_31_elements():
    n = 2**31 + 2048
    if torch.cuda.get_device_properties(0).total_memory < 6 * 4 * n:
        pytest.skip("needs 52 GB of memory on the GPU")
    state = {name: torch.zeros(n, device="cuda") for name in ("param", "grad", "exp_avg", "exp_avg_sq")}
    state |= {"step": torch.zeros(1, dtype=torch.int64, device="cuda"), "lr": torch.full((1,), 0.5, device="cuda")}
    state["grad"][-1] = state["grad"][5] = 1.0
    state["grad_norm"] = torch.ones(1, device="cuda")
    with using("triton"):
        update("radam", state, weight_decay=0.0)
    assert state["param"][-1].item() == state["param"][5].item() == -0.5 and state["param"].count_nonzero().item() == 2


def test_slices_and_whole_buffer_agree(monkeypatch):
    states = [buffers(1000, followers=True) for _ in range(2)]
    for state, width in zip(states, (64, 4096), strict=True):
        monkeypatch.setattr(MODULE, "SLICE", width)
        for i in range(7):
            set_gradient(state, i)
            with using("reference"):
                update("radam", state)
    assert_same_bits(*states)
    assert (states[0]["param"] - buffers(1000)["param"]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"param": torch.zeros(8, dtype=torch.bfloat16)}, r"optimizer_step\(param\): bfloat16\. Use float32"),
        ({"param": torch.zeros(16)[::2]}, r"non-contiguous tensor in optimizer_step\(param\)"),
        ({"grad": torch.zeros(9)}, r"optimizer_step\(grad\): \[9\]\. Use \[8\]"),
        ({"exp_avg_sq": torch.zeros(8, dtype=torch.float16)}, r"optimizer_step\(exp_avg_sq\): float16\. Use float32"),
        ({"step": torch.zeros(1)}, r"optimizer_step\(step\): float32\. Use int64"),
        ({"lr": torch.zeros(())}, r"optimizer_step\(lr\): \[\]\. Use \[1\]"),
        ({"grad_norm": torch.zeros(1, device="meta")}, r"wrong device in optimizer_step\(grad_norm\): meta"),
        ({"target": torch.zeros(8)}, r"optimizer_step\(mu\): None\. A target needs mu"),
        ({"target_low_precision": torch.zeros(8).half()}, r"optimizer_step\(target\): None"),
        ({"low_precision": torch.zeros(8)}, r"optimizer_step\(low_precision\): float32\. Use bfloat16 or float16"),
        ({"averages": [torch.zeros(8)]}, r"optimizer_step\(decays\): None\. Give fp32 \[1\]"),
        ({"averages": [torch.zeros(8), torch.zeros(7)], "decays": torch.ones(2)}, r"optimizer_step\(averages\[1\]\): \[7\]"),
        ({"averages": [torch.zeros(8)], "decays": torch.ones(2)}, r"optimizer_step\(decays\): \[2\]\. Use \[1\]"),
        ({"kind": "adam"}, r"optimizer_step\(kind\): 'adam'\. Use radam or adamw"),
        ({"betas": (0.9, 1.0)}, r"optimizer_step\(betas\): \(0\.9, 1\.0\)"),
        ({"clip": 0.0}, r"optimizer_step\(clip\): 0\.0"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    options = {"kind": "radam", "betas": BETAS, "eps": EPS, "weight_decay": 0.0, "clip": None}
    with pytest.raises(ValueError, match=message):
        kernels.optimizer_step(**(options | buffers(8) | changes))


def test_forward_mode_is_refused():
    state = buffers(8)

    def updated(param):
        update("radam", state | {"param": param.clone()})
        return param

    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(updated, (torch.zeros(8),), (torch.ones(8),))


@pytest.mark.slow
@pytest.mark.parametrize("low", [None, torch.float16], ids=str)
def test_registered_op_keeps_its_contract(device, low):
    state = buffers(100, device, followers=True, low=low)
    set_gradient(state, 0)
    update("radam", state)
    options = {"kind": "radam", "eps": EPS, "weight_decay": 0.01, "clip": 1.0, "beta1": BETAS[0], "beta2": BETAS[1]}
    absent = {"unit_rows": [], "tiles": None}
    absent |= {"low_precision": None, "target_low_precision": None} if low is None else {}
    torch.library.opcheck(torch.ops.fastcm.optimizer_step.default, (), options | state | absent)


@pytest.mark.slow
def test_compiles_without_a_graph_break(device):
    states = [buffers(100, device, followers=True) for _ in range(2)]

    def step_of(state):
        update("radam", state, clip=1.0)
        return state["param"].clone()

    compiled = torch.compile(step_of, fullgraph=True, backend="aot_eager")
    for i in range(8):
        before = copied(states[0])
        for state, function in zip(states, (compiled, step_of), strict=True):
            set_gradient(state, i)
            if i == 5:  # in a graph, the reference decides by where
                before["grad_norm"].copy_(state["grad_norm"].fill_(float("nan")))
                before["grad"].copy_(state["grad"].index_fill_(0, torch.tensor([3], device=device), float("inf")))
            function(state)
        if i == 5:
            assert_same_bits(before, states[0])
    assert states[0]["step"].item() == 7
    for name, t in tensors(states[0]).items():
        assert torch.allclose(t, tensors(states[1])[name], atol=1e-6), name


# Rows shorter than a block, of one block and of several; weights of no row before, between and after them, and padding of no weight.
UNIT_ROWS, UNIT_SIZE, PADDING = [(32, 5, 36), (224, 3, 1024), (3296, 2, 2500)], 8400, ((212, 224), (8296, 8304))


def elements(parts):
    """bool [UNIT_SIZE]: true in each (start, end)."""
    return torch.stack([(torch.arange(UNIT_SIZE) >= start) & (torch.arange(UNIT_SIZE) < end) for start, end in parts]).any(0)


def with_rows(state):
    return {**state, "unit_rows": UNIT_ROWS, "tiles": MODULE.row_tiles(UNIT_ROWS, UNIT_SIZE, state["param"].device)}


def test_tiles_cover_every_weight_once():
    covered = torch.zeros(UNIT_SIZE, dtype=torch.int64)
    for start, length, _ in MODULE.row_tiles(UNIT_ROWS, UNIT_SIZE, "cpu").tolist():
        covered[start : start + length] += 1
    assert torch.equal(covered, 1 - elements(PADDING).long())
    assert max(length for _, length, _ in MODULE.row_tiles([], 10**5, "cpu").tolist()) == MODULE.STRETCH * MODULE.BLOCK


@pytest.mark.parametrize("low", [None, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["radam", "adamw"])
def test_rows_are_set_back_to_unit_magnitude_in_the_same_step(device, low, kind):
    """Against the plain update and the paper's equation in float64, and what follows: copies, target, averages."""
    state = buffers(UNIT_SIZE, device, followers=True, low=low)
    plain = copied(state)
    for run in (state, plain):
        set_gradient(run, 3)
        if low is not None:
            run["grad"] = run["grad"].to(low)
    update(kind, with_rows(state), clip=0.5)
    update(kind, plain, clip=0.5)
    weights, inside = plain["param"].double().cpu(), ~elements(PADDING)
    for start, rows, length in UNIT_ROWS:
        part = weights[start : start + rows * length].view(rows, length)
        part /= 1e-4 + part.square().mean(1, keepdim=True).sqrt()
    followers = [buffers(UNIT_SIZE)["param"].double().lerp(weights, 1 - decay) for decay in (0.9, *DECAYS)]
    found = [state["param"], state["target"], *state["averages"]]
    for got, want in zip(found, [weights, *followers], strict=True):
        torch.testing.assert_close(got.cpu().double()[inside], want[inside], rtol=1e-5, atol=1e-6)
    rows = elements([(start, start + rows * length) for start, rows, length in UNIT_ROWS])
    change = (state["param"] - plain["param"]).abs().cpu()
    assert change[rows].max() > 1e-3 and change[inside & ~rows].max() < 1e-6
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(state[name].cpu()[inside], plain[name].cpu()[inside], rtol=1e-6, atol=1e-9)
    for copy, master in (("low_precision", "param"), ("target_low_precision", "target")):
        if low is not None:
            torch.testing.assert_close(state[copy].cpu().float()[inside], state[master].cpu()[inside], rtol=2**-9, atol=1e-6)


def test_rows_of_a_step_that_is_left_out_are_bit_equal(device):
    state = buffers(UNIT_SIZE, device, followers=True)
    state["grad_norm"].fill_(float("inf"))
    before = copied(state)
    update("radam", with_rows(state))
    assert_same_bits(before, state)
    with pytest.raises(ValueError, match=r"optimizer_step\(tiles\): None"):
        update("radam", {**state, "unit_rows": UNIT_ROWS})
