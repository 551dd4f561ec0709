"""The learned log-weight w(sigma) of edm and of continuous-time training, which evens out the loss over noise levels."""

import torch
from torch import Tensor, nn


class LogWeight(nn.Module):
    """w(sigma), fp32 [B]: linear in Fourier features of ln(sigma) (Karras et al. 2024, equation 21; Lu and Song 2024, adaptive weighting).

    exp(w) loss - w is least at w = -ln(loss): every level then weighs the same. Zero at first.
    """

    def __init__(self, features: int = 64):
        super().__init__()
        self.register_buffer("frequencies", torch.linspace(0, 2, features // 2), persistent=False)
        self.linear = nn.Linear(features, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, sigma: Tensor) -> Tensor:
        angles = sigma.log()[:, None] * self.frequencies
        return self.linear(torch.cat([angles.cos(), angles.sin()], dim=1))[:, 0]
