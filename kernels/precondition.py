"""The skip connection of a denoiser: D = c_skip x + c_out F (EDM, 2206.00364, Eq. 7), with fp32 arithmetic.

x and F_x [B, C, H, W] in any float dtype, coefficients fp32 [B], D fp32. Bytes per element, all fp32: 12 forward, 8 backward to F.
"""


def precondition(x, F_x, c_skip, c_out):
    """Return D = c_skip x + c_out F_x, fp32 [B, C, H, W], differentiable in every argument (forward mode included).

    x, F_x: any float dtype, [B, C, H, W]; c_skip, c_out: fp32 [B]. Raises ValueError naming a bad argument.
    """
    return precondition_reference(x, F_x, c_skip, c_out)


def precondition_reference(x, F_x, c_skip, c_out):
    """The definition, in torch."""
    return c_skip.view(-1, 1, 1, 1) * x.float() + c_out.view(-1, 1, 1, 1) * F_x.float()
