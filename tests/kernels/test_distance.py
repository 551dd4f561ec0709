"""distance: weighted l1, l2 and pseudo-Huber of two denoised images, value and gradient, against float64."""

import itertools

import pytest
import torch
from kernel_checks import each_implementation, using  # noqa: F401

from fastcm import kernels
from fastcm.kernels import launch
from fastcm.kernels.distance import KINDS, ONE_PROGRAM, distance_reference

LAST = torch.channels_last
NAMES = ("x_student", "F_student", "c_skip_student", "c_out_student", "x_target", "F_target", "c_skip_target", "c_out_target", "weight")


def arguments(batch=3, shape=(3, 5, 7), dtype=torch.float32, target_network=True):
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(batch, *shape, generator=generator) for _ in range(4)]
    vectors = [torch.rand(batch, generator=generator) + 0.5 for _ in range(5)]
    student = [images[0], images[1].to(dtype), vectors[0], vectors[1]]
    target = [images[2], images[3].to(dtype), vectors[2], vectors[3]] if target_network else [images[2], None, None, None]
    return [*student, *target, vectors[4]]


def exact(args, kind, c, upstream):
    """(value, gradient to F_student) in float64 by autograd of the formula."""
    x, F_x, c_skip, c_out, x_target, F_target, c_skip_target, c_out_target, weight = (None if a is None else a.cpu().double() for a in args)
    F_x = F_x.detach().requires_grad_()
    D_target = x_target
    if F_target is not None:
        D_target = c_skip_target.view(-1, 1, 1, 1) * x_target + c_out_target.view(-1, 1, 1, 1) * F_target
    d = (c_skip.view(-1, 1, 1, 1) * x + c_out.view(-1, 1, 1, 1) * F_x - D_target).flatten(1)
    value = {"l1": d.abs().mean(1), "l2": d.square().mean(1), "pseudo_huber": (d.square().sum(1) + c**2).sqrt() - c}[kind] * weight
    return value.detach(), torch.autograd.grad(value, F_x, upstream.double())[0]


def on(device, args):
    return [None if a is None else a.to(device) for a in args]


def assert_matches(args, device, kind, c, upstream, dtype=torch.float32):
    args = on(device, args)
    args[1].requires_grad_()
    value = kernels.distance(*args, kind=kind, c=c)
    (gradient,) = torch.autograd.grad(value, args[1], upstream.to(device))
    want_value, want_gradient = exact(args, kind, c, upstream)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    assert torch.allclose(value.detach().cpu().double(), want_value, rtol=3e-6, atol=1e-7)
    # Twice rounded, to the gradient and to its product with what comes from above; truncated by the interpreter for bf16.
    unit = {torch.float32: 2e-6, torch.bfloat16: 2**-6, torch.float16: 2**-10}[dtype]
    error = (gradient.cpu().double() - want_gradient).abs()
    assert (error <= unit * want_gradient.abs() + 1e-7 + 1e-6 * want_gradient.abs().max()).all(), error.max()
    with torch.no_grad():
        assert torch.equal(kernels.distance(*args, kind=kind, c=c), value)
    return gradient


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target_network", [True, False], ids=["target network", "target image"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 9), (3, 11, 31)], ids=str)
def test_value_and_gradient_match_float64(device, kind, target_network, dtype, shape):
    args = arguments(2, shape, dtype, target_network)
    assert_matches(args, device, kind, 0.03, torch.tensor([1.0, -2.0]), dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("formats", list(itertools.product([False, True], repeat=3)), ids=str)
def test_every_layout(device, kind, formats):
    args = arguments(1, (3, 5, 7))
    for index, last in zip((0, 1, 5), formats, strict=True):
        args[index] = args[index].contiguous(memory_format=LAST) if last else args[index]
    gradient = assert_matches(args, device, kind, 0.0, torch.ones(1))
    assert gradient.shape == args[1].shape
    if launch.INTERPRETED or device.type == "cuda":
        assert gradient.stride() == args[1].stride()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "dtype"), [(64, torch.float32), (75, torch.float32), (75, torch.float16)], ids=str)
def test_images_of_one_program_and_beyond(device, kind, size, dtype):
    assert 3 * 64 * 64 <= ONE_PROGRAM < 3 * 75 * 75
    assert_matches(arguments(2, (3, size, size), dtype), device, kind, 0.1, torch.tensor([0.5, 1.0]), dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [4, 80])
def test_equal_images_have_distance_zero_and_gradient_zero(device, kind, size):
    args = on(device, arguments(2, (3, size, size)))
    args[4:8] = [a.clone() for a in args[:4]]
    args[1].requires_grad_()
    for function in (kernels.distance, distance_reference):
        value = function(*args, kind=kind)
        assert torch.equal(value, torch.zeros_like(value))
        (gradient,) = torch.autograd.grad(value.sum(), args[1])
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_a_kept_graph_runs_twice(device):
    args = on(device, arguments())
    args[1].requires_grad_()
    upstream = torch.tensor([3.0, 1.0, -1.0], device=device)
    value = kernels.distance(*args, kind="l2")
    gradients = [torch.autograd.grad(value, args[1], upstream, retain_graph=keep)[0] for keep in (True, True, False)]
    want = exact(args, "l2", 0.0, upstream.cpu())[1]
    assert want.abs().max() > 0.01 and all(torch.allclose(g.cpu().double(), want, atol=1e-7) for g in gradients)


def test_mean_over_the_batch_accumulates_into_grad(device):
    args = on(device, arguments())
    args[1].requires_grad_()
    for _ in range(2):
        kernels.distance(*args, kind="pseudo_huber", c=0.1).mean().backward()
    assert torch.allclose(args[1].grad.cpu().double(), 2 * exact(args, "pseudo_huber", 0.1, torch.full((3,), 1 / 3))[1], atol=1e-6)


def test_a_second_derivative_is_refused():
    args = arguments()
    args[1].requires_grad_()
    value = kernels.distance(*args, kind="l2")
    if not launch.INTERPRETED:  # the interpreter's process takes the definition here, which has one
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(value.sum(), args[1], create_graph=True)


@pytest.mark.parametrize("kind", KINDS)
def test_tangents_and_transforms_match_float64(kind):
    args = arguments()
    tangents = [torch.randn_like(args[0]), torch.randn_like(args[1])]
    with using("triton"):
        _, found = torch.func.jvp(lambda x, F_x: kernels.distance(x, F_x, *args[2:], kind=kind, c=0.1), tuple(args[:2]), tuple(tangents))
        by_grad = torch.func.grad(lambda F_x: kernels.distance(args[0], F_x, *args[2:], kind=kind, c=0.1).sum())(args[1])
    gradient = exact(args, kind, 0.1, torch.ones(3))[1]
    ratio = (args[2] / args[3]).double().view(-1, 1, 1, 1)  # D moves with x as with F, by c_skip in place of c_out
    want = (gradient * (tangents[1].double() + ratio * tangents[0].double())).sum((1, 2, 3))
    assert want.abs().min() > 1e-3 and torch.allclose(found.double(), want, atol=1e-5)
    assert torch.allclose(by_grad.double(), gradient, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_student": torch.zeros(2, 3, 4)}, r"distance\(x_student\): \[2, 3, 4\]"),
        ({"F_student": torch.zeros(2, 1, 4, 4)}, r"distance\(F_student\): \[2, 1, 4, 4\]\. Use \[2, 3, 4, 4\]"),
        ({"F_target": torch.zeros(2, 3, 4, 4, dtype=torch.int32)}, r"distance\(F_target\): int32\. Use float32 or bfloat16 or float16"),
        ({"weight": torch.zeros(3)}, r"distance\(weight\): \[3\]\. Use \[2\] or \[1\]"),
        ({"c_skip_target": None}, r"distance\(c_skip_target\): NoneType"),
        ({"F_target": None}, r"distance\(F_target\): None\. Give F_target, or None for all three"),
        ({"x_target": torch.zeros(2, 3, 4, 4, requires_grad=True)}, r"requires_grad in distance\(x_target\)\. Only F_student"),
        ({"weight": torch.zeros(2, requires_grad=True)}, r"requires_grad in distance\(weight\)"),
        ({"kind": "huber"}, r"distance\(kind\): 'huber'\. Use l1, l2, pseudo_huber"),
        ({"c": -1.0}, r"distance\(c\): -1\.0"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    good = {name: torch.zeros(2) if name.startswith(("c_", "w")) else torch.zeros(2, 3, 4, 4) for name in NAMES} | {"kind": "l2"}
    with pytest.raises(ValueError, match=message):
        kernels.distance(**(good | changes))


@pytest.mark.slow
def test_registered_ops_keep_their_contract(device):
    args = on(device, arguments())
    args[1].requires_grad_()
    kernels.distance(*args, kind="l1")
    for kind in KINDS:
        torch.library.opcheck(torch.ops.fastcm.distance.default, (*args, kind, 0.1, True))
    torch.library.opcheck(torch.ops.fastcm.distance_backward.default, (args[0], args[-1]))


@pytest.mark.slow
def test_compiles_without_a_graph_break(device):
    args = on(device, arguments())
    args[1].requires_grad_()

    def loss(*args):
        return kernels.distance(*args, kind="pseudo_huber", c=0.1).mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    gradients = [torch.autograd.grad(function(*args), args[1])[0] for function in (compiled, loss)]
    assert torch.allclose(*gradients, atol=1e-7) and gradients[0].abs().max() > 0.01
