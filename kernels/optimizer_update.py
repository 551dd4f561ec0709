"""Device code of optimizer_step: the scalars of a step, and the update of a block or of a row."""

from fastcm.kernels.launch import tl, triton


@triton.jit
def power(base, exponent):
    """fp64 base to an int64 exponent. libdevice's pow needs a stack, and 1 - b2^t in fp32 loses the digits that RAdam's rho needs."""
    result = base * 0 + 1
    while exponent > 0:
        result = tl.where((exponent & 1) == 1, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


@triton.jit
def reciprocal(x):
    """1 / x in fp64 by two Newton steps, which is shorter than the division."""
    guess = (1.0 / x.to(tl.float32)).to(tl.float64)
    guess = guess * (2.0 - x * guess)
    return guess * (2.0 - x * guess)


@triton.jit
def step_scalars(t, lr, eps, BETA1: tl.constexpr, BETA2: tl.constexpr, RADAM: tl.constexpr):
    """a, b and size of the module docstring, fp32."""
    left = power(tl.full((), BETA2, tl.float64), t)
    correction1, correction2 = 1.0 - power(tl.full((), BETA1, tl.float64), t), 1.0 - left
    size = lr * reciprocal(correction1).to(tl.float32)
    root = tl.sqrt(correction2.to(tl.float32))
    if RADAM:
        RHO_INF: tl.constexpr = 2 / (1 - BETA2) - 1
        rho = RHO_INF - 2.0 * t.to(tl.float64) * left * reciprocal(correction2)
        above = (rho - 4.0).to(tl.float32) * (rho - 2.0).to(tl.float32) * RHO_INF
        rectification = tl.sqrt(tl.maximum(above / ((RHO_INF - 4) * (RHO_INF - 2) * rho.to(tl.float32)), 0.0))
        rectified = rho > 5.0
        return tl.where(rectified, 1.0, 0.0), tl.where(rectified, eps, 1.0), tl.where(rectified, size * rectification * root, size)
    return tl.full((), 1.0, tl.float32), eps * root, size * root


@triton.jit
def _follow(follower, copy, o, m, b_param, rate):
    b_follower = tl.load(follower + o, m)
    b_follower += (b_param - b_follower) * rate
    tl.store(follower + o, b_follower, m)
    if copy is not None:
        tl.store(copy + o, b_follower.to(copy.dtype.element_ty), m)


@triton.jit
def _moments(buffers, coefficients, o, m, BETA1: tl.constexpr, BETA2: tl.constexpr):
    """The new weights; the new moments are stored."""
    param, grad, exp_avg, exp_avg_sq = buffers
    factor, decay, a, b, size = coefficients
    b_param = tl.load(param + o, m)
    b_grad = tl.load(grad + o, m).to(tl.float32) * factor
    b_avg = tl.load(exp_avg + o, m)
    b_sq = tl.load(exp_avg_sq + o, m)
    b_avg += (b_grad - b_avg) * (1 - BETA1)
    b_sq = b_sq * BETA2 + b_grad * b_grad * (1 - BETA2)
    tl.store(exp_avg + o, b_avg, m)
    tl.store(exp_avg_sq + o, b_sq, m)
    return b_param * decay - size * b_avg / (tl.sqrt(b_sq) * a + b)


@triton.jit
def _keep(b_param, param, followers, mu, o, m):
    """Stores the new weights, and what follows from them."""
    target, averages, decays, low_precision, target_low_precision = followers
    tl.store(param + o, b_param, m)
    if low_precision is not None:
        tl.store(low_precision + o, b_param.to(low_precision.dtype.element_ty), m)
    if target is not None:
        _follow(target, target_low_precision, o, m, b_param, 1 - mu)
    for k in tl.static_range(len(averages)):
        _follow(averages[k], None, o, m, b_param, 1 - tl.load(decays + k))


@triton.jit
def update_blocks(
    buffers, followers, coefficients, mu, n, i_program, programs, BETA1: tl.constexpr, BETA2: tl.constexpr, BLOCK: tl.constexpr
):
    """Every `programs`-th block of n elements, from `i_program` on."""
    o, width = tl.arange(0, BLOCK), tl.full((), BLOCK, tl.int64)
    blocks = n // BLOCK
    # Whole blocks go without a mask, whose bound may not divide by 16; what is left takes its own, masked, block.
    for i in range(i_program, blocks, programs):
        b_param = _moments(buffers, coefficients, o + i * width, None, BETA1, BETA2)
        _keep(b_param, buffers[0], followers, mu, o + i * width, None)
    if blocks % programs == i_program:
        o_last = o + blocks * width
        b_param = _moments(buffers, coefficients, o_last, o_last < n, BETA1, BETA2)
        _keep(b_param, buffers[0], followers, mu, o_last, o_last < n)


@triton.jit
def update_rows(
    buffers,
    followers,
    coefficients,
    mu,
    tiles,
    tile_count,
    i_program,
    programs,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    UNIT_EPS: tl.constexpr,
):
    """Every `programs`-th of the tiles (start, length, is_unit), from `i_program` on; ALIGNMENT divides starts and lengths.

    A row of any length: its new weights and their magnitude, then its weights once more, which the cache still has, over that.
    """
    o, param = tl.arange(0, BLOCK), buffers[0]
    for i in range(i_program, tile_count, programs):
        start, length = tl.multiple_of(tl.load(tiles + 3 * i), ALIGNMENT), tl.multiple_of(tl.load(tiles + 3 * i + 1), ALIGNMENT)
        is_unit = tl.load(tiles + 3 * i + 2)
        squares = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, length, BLOCK):
            m = first + o < length
            b_param = _moments(buffers, coefficients, start + first + o, m, BETA1, BETA2)
            tl.store(param + (start + first + o), b_param, m)
            squares += tl.where(m, b_param * b_param, 0.0)
        magnitude = tl.sqrt(tl.sum(squares, 0) / length.to(tl.float32))
        inverse = tl.where(is_unit != 0, 1.0 / (UNIT_EPS + magnitude), 1.0)
        tl.debug_barrier()  # what other threads of the program have stored is loaded
        for first in range(0, length, BLOCK):
            m = first + o < length
            b_param = tl.load(param + (start + first + o), m) * inverse
            _keep(b_param, param, followers, mu, start + first + o, m)
