"""Guidance in the Gaussian world, where D_c, D_u and so D_w are known, and the weight as a condition of a student."""

import functools

import pytest
import torch
from analytic import denoiser_gain, gaussian_teacher
from test_generator import SMALL, randomised
from test_unet2d import PLAIN
from test_unet2d import SMALL as SMALL_2D

from fastcm import networks
from fastcm.consistency.denoiser import Denoiser, Preconditioning, expand
from fastcm.consistency.guidance import as_guide, beyond, checked_interval, checked_weight, guided, takes_weight
from fastcm.consistency.objective import Batch, consistency_loss, continuous_loss
from fastcm.consistency.solver import STEPS
from fastcm.consistency.tangent import network_tangent
from fastcm.errors import InputError
from fastcm.training.method_loss import bind_teacher

DATA_STD, SHIFT = 0.3, 0.25
SIGMA = torch.tensor([0.1, 0.5, 2.0, 30.0])
LABELS = torch.tensor([0, 1, 2, 5])
WEIGHTS = torch.tensor([0.0, 1.0, 2.5, 4.0])


class Counted:
    """A denoiser that notes how many images each of its calls had."""

    def __init__(self, denoise):
        self.denoise, self.sizes = denoise, []

    def __call__(self, x, sigma, labels=None):
        self.sizes.append(len(x))
        return self.denoise(x, sigma, labels)


def teacher_of_classes(form="edm"):
    """D(x, sigma, k) = g x + SHIFT k: without a class, k = -1."""
    teacher = gaussian_teacher(form, data_std=DATA_STD)
    teacher.network.class_shift = SHIFT
    return teacher


def points(seed=0):
    return expand(SIGMA, torch.empty(4, 1, 1, 1)) * torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


def expected(x, sigma, weight, labels=LABELS):
    """D_u + w (D_c - D_u) = g x - SHIFT + w SHIFT (k + 1)."""
    return expand(denoiser_gain(sigma, DATA_STD), x) * x + expand(SHIFT * (weight * (labels + 1) - 1), x)


@pytest.mark.parametrize("weight", [2.0, WEIGHTS])
def test_both_halves_are_one_call_and_their_combination_is_known(weight):
    teacher, x = Counted(teacher_of_classes()), points()
    torch.testing.assert_close(guided(teacher, x, SIGMA, LABELS, weight=weight), expected(x, SIGMA, weight), rtol=1e-4, atol=1e-5)
    assert teacher.sizes == [8]


def test_a_weight_of_one_is_the_conditional_half_to_the_bit():
    D_c, D_u = torch.randn(3, 8) * torch.tensor([[1e-4], [1.0], [1e4]]), torch.randn(3, 8)
    assert torch.equal(beyond(D_c, D_u, torch.ones(3)), D_c)
    torch.testing.assert_close(beyond(D_c, D_u, torch.zeros(3)), D_u, rtol=1e-5, atol=1e-3)


def test_guidance_holds_between_two_levels_and_costs_nothing_beyond():
    teacher, x = Counted(teacher_of_classes()), points()
    alone = teacher.denoise(x, SIGMA, LABELS)
    D_x = guided(teacher, x, SIGMA, LABELS, weight=3.0, interval=(0.5, 2.0))
    inside = torch.tensor([False, False, True, False])  # low < sigma <= high
    assert torch.equal(D_x[~inside], alone[~inside])
    torch.testing.assert_close(D_x[inside], expected(x, SIGMA, 3.0)[inside], rtol=1e-4, atol=1e-5)
    assert torch.equal(guided(teacher, x, SIGMA, LABELS, weight=3.0, interval=(50.0, 80.0)), alone)
    assert teacher.sizes == [8, 4]


def test_autoguidance_goes_away_from_the_second_model():
    teacher, guide, x = gaussian_teacher("edm", data_std=0.3), gaussian_teacher("edm", data_std=0.6), points()
    D_x = guided(teacher, x, SIGMA, weight=WEIGHTS, guide=guide)
    good, bad = (expand(denoiser_gain(SIGMA, std), x) for std in (0.3, 0.6))
    torch.testing.assert_close(D_x, (bad + expand(WEIGHTS, x) * (good - bad)) * x, rtol=1e-4, atol=1e-5)
    told = []
    guided(teacher, x, SIGMA, LABELS, weight=2.0, guide=as_guide(lambda x, s, labels: told.append(labels) or x, has_classes=False))
    guided(teacher, x, SIGMA, LABELS, weight=2.0, guide=as_guide(lambda x, s, labels: told.append(labels) or x, has_classes=True))
    assert told[0] is None and told[1] is LABELS


@pytest.mark.parametrize("solver", STEPS)
def test_the_solver_of_cd_follows_the_guided_ode(solver):
    denoise = functools.partial(guided, teacher_of_classes(), weight=WEIGHTS)
    x, sigma_lo = points(), SIGMA * 0.8
    known = STEPS[solver](lambda x, sigma, labels: expected(x, sigma, WEIGHTS), x, SIGMA, sigma_lo, LABELS)
    torch.testing.assert_close(bind_teacher(denoise, solver)(x, SIGMA, sigma_lo, LABELS), known, rtol=1e-4, atol=1e-4)


def test_the_tangent_of_scd_follows_the_guided_ode():
    preconditioning = Preconditioning(form="edm", c_noise="ln sigma / 4")
    student = Denoiser(randomised(networks.build("adm", {**SMALL, "num_classes": 6})), preconditioning)
    batch = Batch(DATA_STD * torch.randn(4, 1, 8, 8), LABELS, torch.tensor([3]), torch.arange(4))
    losses = []
    for teacher in (
        functools.partial(guided, teacher_of_classes(), weight=WEIGHTS),
        lambda x, sigma, labels: expected(x, sigma, WEIGHTS),
        teacher_of_classes(),
    ):
        tangent = network_tangent(student.network, "jvp")
        losses.append(continuous_loss(student, batch, SIGMA, tangent=tangent, warmup=1.0, teacher=teacher).detach())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(losses[0], losses[2], rtol=1e-3)


KINDS = {
    "adm": {**SMALL, "num_classes": 6},
    "song": {**SMALL, "num_classes": 6, "attention_resolutions": (4,)},
    "unet2d": {**SMALL_2D, **PLAIN, "in_channels": 1, "out_channels": 1, "num_classes": 6},
}
KINDS["song"] = {name: value for name, value in KINDS["song"].items() if name != "head_channels"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_condition_changes_nothing_and_a_trained_one_does(kind):
    plain = randomised(networks.build(kind, KINDS[kind]))
    told = networks.build(kind, {**KINDS[kind], "default_guidance": 2.5}).eval()
    assert takes_weight(told) and not takes_weight(plain)
    missing = told.load_state_dict(plain.state_dict(), strict=False)
    assert missing.missing_keys == ["guidance_embed.weight"] and not missing.unexpected_keys
    x, c_noise = torch.randn(4, 1, 8, 8), torch.tensor([-0.5, 0.1, 0.4, 1.0])
    assert torch.equal(told(x, c_noise, LABELS, guidance=WEIGHTS), plain(x, c_noise, LABELS))
    torch.nn.init.normal_(told.guidance_embed.weight, std=0.3)
    F_x = told(x, c_noise, LABELS, guidance=torch.full((4,), 2.5))
    assert torch.equal(told(x, c_noise, LABELS), F_x)
    assert (told(x, c_noise, LABELS, guidance=WEIGHTS) - F_x).flatten(1).abs().amax(1).gt(1e-3).tolist() == [True, True, False, True]


@pytest.mark.parametrize("method", ["cd", "scd"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_student_learns_its_weight(kind, method):
    form = "boundary" if method == "cd" else "edm"
    network = randomised(networks.build(kind, {**KINDS[kind], "default_guidance": 2.5})).train()
    student = Denoiser(network, Preconditioning(form=form, c_noise="ln sigma / 4"))
    batch = Batch(DATA_STD * torch.randn(4, 1, 8, 8), LABELS, torch.tensor([3]), torch.arange(4), guidance=WEIGHTS)
    teacher = functools.partial(guided, teacher_of_classes(), weight=WEIGHTS)
    if method == "cd":
        how = {"weight": torch.ones(4), "distance": "l2", "teacher_step": bind_teacher(teacher, "heun")}
        loss = consistency_loss(student, student, batch, SIGMA, SIGMA * 0.8, **how)
    else:
        loss = continuous_loss(student, batch, SIGMA, tangent=network_tangent(network, "jvp"), warmup=1.0, teacher=teacher)
    loss.sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert network.guidance_embed.weight.grad.abs().max() > 0


def test_the_tangent_keeps_the_weight_as_it_is():
    network = randomised(networks.build("adm", {**KINDS["adm"], "default_guidance": 2.5}))
    generator = torch.Generator().manual_seed(5)
    x, c_noise, x_rate, c_rate = (torch.randn(4, *shape, generator=generator) for shape in ((1, 8, 8), (), (1, 8, 8), ()))
    arguments = (x, c_noise, LABELS, x_rate, c_rate)
    (F_x, dF), (same, difference) = (
        network_tangent(network, kind, step=1e-3)(*arguments, guidance=WEIGHTS) for kind in ("jvp", "finite-difference")
    )
    torch.testing.assert_close(F_x, same, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dF, difference, rtol=5e-2, atol=5e-2)
    other = network_tangent(network, "jvp")(*arguments)[1]
    assert (dF - other).flatten(1).abs().amax(1).gt(0.1).tolist() == [True, True, False, True]


def test_weights_and_intervals_that_cannot_be_meant():
    assert checked_weight(2, "w") == 2.0 and checked_weight([1, 4], "w") == (1.0, 4.0)
    for check, value in ((checked_weight, -1), (checked_weight, float("nan")), (checked_weight, (4, 1)), (checked_weight, "2")):
        with pytest.raises(InputError, match="illegal value in --guidance"):
            check(value, "--guidance")
    for value in (2.0, (1,), (2, 2), (-1, 2), (1, float("inf"))):
        with pytest.raises(InputError, match="illegal value in --guidance-interval"):
            checked_interval(value, "--guidance-interval")
