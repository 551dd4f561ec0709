"""Weights and inputs that any machine can write down: sines of their index. Golden values in the tests belong to them."""

import torch


def wave_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """fp32 tensors of the given shapes, of a size that keeps activations near one; the phase is the name's place in sorted order."""
    state = {}
    for index, name in enumerate(sorted(shapes)):
        shape = torch.Size(shapes[name])
        values = torch.sin(torch.arange(shape.numel(), dtype=torch.float64) * 0.73 + index).reshape(shape)
        if "norm" in name and name.endswith("weight"):
            values = 1 + 0.3 * values
        elif len(shape) > 1:
            values = values * (2 / (shape.numel() / shape[0])) ** 0.5
        else:
            values = 0.3 * values
        state[name] = values.float()
    return state


def wave_images(*shape: int) -> torch.Tensor:
    """fp32 [*shape] in [-1, 1]."""
    return torch.sin(torch.arange(torch.Size(shape).numel(), dtype=torch.float64) * 0.41).reshape(shape).float()
