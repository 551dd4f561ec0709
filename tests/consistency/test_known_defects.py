"""Faults of other consistency-model code (found by reading it), each with an assertion that this code does not share it."""

import math

import pytest
import torch
from test_continuous import Linear
from test_objective import gaussian_batch

from fastcm import kernels, presets
from fastcm.consistency.curriculum import discretization_steps, target_decay
from fastcm.consistency.denoiser import Denoiser, Preconditioning
from fastcm.consistency.noise_schedule import log_normal_pair
from fastcm.consistency.objective import consistency_loss
from fastcm.training.method_loss import huber_constant
from fastcm.training.run_folder import RunFolder

P = Preconditioning()


def loss(distance, *, student=None, weight=1.0, huber_c=0.1):
    torch.manual_seed(0)
    student = student or Denoiser(Linear(), P)
    hi, lo = torch.full((4,), 2.0), torch.full((4,), 1.0)
    return consistency_loss(
        student, student, gaussian_batch(4), hi, lo, weight=torch.full((4,), weight), distance=distance, huber_c=huber_c
    )


def test_the_distance_that_is_asked_for_is_the_one_that_is_used():
    # openai/consistency_models parses --loss_norm and then always takes LPIPS.
    values = [loss(distance) for distance in ("l1", "l2", "pseudo_huber", lambda a, b: (a - b).abs().amax((1, 2, 3)))]
    for i, a in enumerate(values):
        assert all(not torch.allclose(a, b, rtol=1e-2) for b in values[i + 1 :])


def test_mu_follows_the_paper_or_the_code_by_name():
    # The published code divides by N - 1 where the paper has N.
    n = discretization_steps("progressive", 0.1, s0=2, s1=150)
    assert target_decay("adaptive", n, s0=2, mu0=0.9) == pytest.approx(math.exp(2 * math.log(0.9) / n))
    assert target_decay("adaptive-code", n, s0=2, mu0=0.9) == pytest.approx(math.exp(2 * math.log(0.9) / (n - 1)))


def test_scalings_have_their_roots_and_factors():
    # diffusers' training script has c_in = 1 / (s^2 + d^2) and c_out without d; cloneofsimo has c_out = .25 s / root, that is d^2.
    c = P.coefficients(torch.tensor([3.0]))
    assert c.c_in.item() == pytest.approx(1 / math.sqrt(9.25)) and c.c_out.item() == pytest.approx(2.998 * 0.5 / math.sqrt(9.25))


def test_the_boundary_is_where_training_and_sampling_both_have_it():
    # diffusers' script has it at 0 while its scheduler has sigma_min; ECT trains with 0 and evaluates with .003.
    x = torch.randn(2, 1, 4, 4)
    assert torch.equal(Denoiser(Linear(), P)(x, torch.full((2,), P.sigma_min)), x)
    edm = Preconditioning(form="edm")
    assert torch.equal(Denoiser(Linear(), edm)(x, torch.zeros(2)), x) and presets.noise("ect").form == "edm"


def test_pseudo_huber_is_a_norm_of_the_whole_image():
    # Kinyugo takes it pixel by pixel, with one c for every size.
    difference = torch.zeros(1, 1, 4, 4)
    difference[0, 0, 0, :2] = torch.tensor([3.0, 4.0])
    one, zero = torch.ones(1), torch.zeros(1)
    nothing = torch.zeros_like(difference)
    value = kernels.distance(nothing, difference, zero, one, nothing, None, None, None, one, kind="pseudo_huber", c=1e-6)
    assert value.item() == pytest.approx(5.0, abs=1e-4)
    for shape, c in (((3, 32, 32), 0.0299), ((3, 64, 64), 0.0599), ((3, 256, 256), 0.2394)):
        assert huber_constant(None, shape) == pytest.approx(c, abs=6e-5)


def test_the_log_normal_of_ict_has_a_negative_mean():
    # Kinyugo's README gives +1.1.
    assert presets.objective("ict").P_mean == -1.1
    hi, _ = log_normal_pair(torch.linspace(0.001, 0.999, 999), 1281, sigma_min=0.002, sigma_max=80.0, rho=7.0, P_mean=-1.1, P_std=2.0)
    assert hi.log().median().item() == pytest.approx(-1.1, abs=0.05)


@pytest.mark.slow
def test_no_weights_are_lost_and_no_step_is_counted_twice_on_resuming(tmp_path):
    # EDM training of openai/consistency_models saves step + resume_step where step already holds it; diffusers starts anew without a word.
    from training_runs import small_run

    small_run(tmp_path / "run", method="edm", kimg=0.048)
    resumed = small_run(tmp_path / "run", method="edm", kimg=0.08)
    assert resumed.nimg == 80
    steps = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert steps == ["step-000000003", "step-000000005"]
    folder = RunFolder.__new__(RunFolder)
    folder.path = tmp_path / "run"
    assert [row["step"] for row in folder.read_log() if "step" in row][-1] == 5


def test_student_and_target_share_dropout_without_a_generator():
    # The published code saves and restores the CPU's generator, which does nothing on CUDA.
    from fastcm import networks

    options = {
        "resolution": 8,
        "in_channels": 1,
        "out_channels": 1,
        "channels": 16,
        "channel_mult": (1,),
        "blocks": 1,
        "attention_resolutions": (),
        "head_channels": 16,
        "dropout": 0.5,
    }
    network = networks.build("adm", options).train()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    student = Denoiser(network, P)
    batch = gaussian_batch(2, size=8)
    level = torch.full((2,), 1.0)
    arguments = {"weight": torch.ones(2), "distance": "l2"}
    same = consistency_loss(student, student, batch, level, level * (1 - 1e-7), **arguments)
    assert same.max() < 1e-6, "two passes at one level differ: the masks do"
    other = consistency_loss(student, student, batch, level, level / 2, **arguments)
    assert other.min() > 1e-4
