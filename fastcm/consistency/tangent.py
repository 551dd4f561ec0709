"""The derivative of a network along the trajectory of the probability-flow ODE, by forward-mode differentiation or by a difference."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastcm.errors import InputError, nearest
from fastcm.networks.compiled import compiled as for_training

# (x, c_noise, labels, x_rate, c_noise_rate) -> (F, dF), both without gradient; what else the network takes, by name, stays as it is.
NetworkTangent = Callable[..., tuple[Tensor, Tensor]]
TANGENTS = ("jvp", "finite-difference")


def network_tangent(network: nn.Module, kind: str, *, step: float = 1e-3, compiled: bool = False) -> NetworkTangent:
    """Returns the function that gives F and its directional derivative; rates have the shapes and dtypes of what they are rates of.

    jvp: one dual pass (Lu and Song 2024, section 4.1), in which GroupNorm and attention are taken by their definitions, since torch's fused
    forms have no forward mode. finite-difference: (F(x) - F(x - h x')) / h with h = `step`, two ordinary passes of an fp32 network
    (rCM, Zheng et al. 2025, calls it semi-continuous; the step here is one of ln(sigma), which keeps it small at every level). fp32
    rounds F by 1e-7 of itself, so a step of 1e-3 is good to about 1e-3; a large one smooths over the fast sines of ADM's embedding, whose
    derivative is 250 times that of ln(sigma) and mostly noise.
    """
    if kind == "jvp":
        run = _jvp(network)
        return for_training(run, network) if compiled else run
    if kind == "finite-difference":
        return _difference(for_training(network, network) if compiled else network, step)
    raise InputError(f"unknown value in objective.tangent: {kind}. Use one of {', '.join(TANGENTS)}.{nearest(kind, TANGENTS)}")


def _jvp(network: nn.Module) -> NetworkTangent:
    def run(x, c_noise, labels, x_rate, c_noise_rate, **conditions):
        with torch.no_grad():
            return torch.func.jvp(lambda x, c_noise: network(x, c_noise, labels, **conditions), (x, c_noise), (x_rate, c_noise_rate))

    return run


def _difference(network: nn.Module, step: float) -> NetworkTangent:
    def run(x, c_noise, labels, x_rate, c_noise_rate, **conditions):
        with torch.no_grad():
            F_x = network(x, c_noise, labels, **conditions)
            before = network(x - step * x_rate, c_noise - step * c_noise_rate, labels, **conditions)
            return F_x, (F_x - before) / step

    return run
