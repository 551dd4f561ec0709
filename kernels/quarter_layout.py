"""Device code of the noise stream: Philox draws in the quarter layout, for kernels to call.

A program owns BLOCK counters of one sample, or of each of SAMPLES small ones; a thread takes four neighbouring counters, so that each of
the four lanes of a sample is read and written by wide accesses. Bounds are constants: a mask whose bound is not known to divide by 4 makes
every access a scalar one.
"""

from fastcm.kernels.launch import libdevice, tl, triton


@triton.jit
def quarter_counters(batch, N: tl.constexpr, BLOCK: tl.constexpr, SAMPLES: tl.constexpr):
    """This program's place among `batch` samples of N elements: (samples, counters) of its elements and of each thread's first.

    Samples are int64, one number or, where a program has several, [SAMPLES BLOCK] and [SAMPLES BLOCK / 4] like the counters, int32.
    """
    pid = tl.program_id(0)
    if SAMPLES == 1:
        QUARTER: tl.constexpr = (N + 3) // 4
        BLOCKS: tl.constexpr = (QUARTER + BLOCK - 1) // BLOCK
        i_sample = (pid // BLOCKS).to(tl.int64)
        i_first = i_sample
        first = (pid % BLOCKS) * BLOCK
        o_i, o_first = first + tl.arange(0, BLOCK), first + 4 * tl.arange(0, BLOCK // 4)
    else:
        o_i, o_first = tl.arange(0, SAMPLES * BLOCK), 4 * tl.arange(0, SAMPLES * BLOCK // 4)
        # Behind the last sample a program repeats it, to the bit: no access needs a mask.
        i_sample = tl.minimum(pid * SAMPLES + o_i // BLOCK, batch - 1).to(tl.int64)
        i_first = tl.minimum(pid * SAMPLES + o_first // BLOCK, batch - 1).to(tl.int64)
        o_i, o_first = o_i % BLOCK, o_first % BLOCK
    return i_sample, o_i, i_first, o_first


@triton.jit
def lane_offsets(o_i, LANE: tl.constexpr, N: tl.constexpr):
    """Elements of one lane within their sample."""
    QUARTER: tl.constexpr = (N + 3) // 4
    return LANE * QUARTER + o_i


@triton.jit
def lane_mask(o_i, LANE: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    """None where every program is full. The bounds are constants, so the compiler knows their divisors and keeps wide accesses.

    Triton 3.6 refuses None within a tuple: assign the result by itself.
    """
    QUARTER: tl.constexpr = (N + 3) // 4
    m_lane = None
    if QUARTER % BLOCK != 0 or 4 * QUARTER != N:
        # In a lane that ends before its quarter does, the sample's end is the nearer bound.
        END: tl.constexpr = min(QUARTER, max(0, N - LANE * QUARTER))
        m_lane = o_i < END
    return m_lane


@triton.jit
def load_scalar(p_value, stride, i_sample):
    """A per-sample coefficient; 0 where there is none."""
    b_value = 0.0
    if p_value is not None:
        b_value = tl.load(p_value + i_sample * stride)
    return b_value


@triton.jit
def store_lane(p_sample, o_i, b_lane, LANE: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    o_lane = lane_offsets(o_i, LANE, N)
    tl.store(p_sample + o_lane, b_lane.to(p_sample.dtype.element_ty), mask=lane_mask(o_i, LANE, N, BLOCK))


@triton.jit
def wide_product(a, b, MATH: tl.constexpr):
    """(low, high) words of a 32 x 32 bit product. Left to themselves, mul.hi and mul.lo are two instructions (triton 3.7)."""
    if MATH == 1:
        low, high = tl.inline_asm_elementwise(
            "{ .reg .b64 product; mul.wide.u32 product, $2, $3; mov.b64 {$0, $1}, product; }",
            "=r,=r,r,r",
            [a, b],
            dtype=(tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
    else:
        product = a.to(tl.uint64) * b.to(tl.uint64)
        low, high = product.to(tl.uint32), (product >> 32).to(tl.uint32)
    return low, high


@triton.jit
def philox_block(p_seed, seed_stride, p_position, position_stride, i_sample, o_i, stream, MATH: tl.constexpr):
    """The four words, uint32 [BLOCK], of the counters o_i of one sample."""
    seed = tl.load(p_seed + i_sample * seed_stride)
    position = tl.load(p_position + i_sample * position_stride)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0 = o_i.to(tl.uint32)
    zero = c0 * 0
    c1, c2, c3 = zero + position.to(tl.uint32), zero + (position >> 32).to(tl.uint32), (zero + stream).to(tl.uint32)
    A, B = zero + 0xD2511F53, zero + 0xCD9E8D57
    for _ in tl.static_range(10):
        low_0, high_0 = wide_product(c0, A, MATH)
        low_2, high_2 = wide_product(c2, B, MATH)
        c0, c1, c2, c3 = high_2 ^ c1 ^ k0, low_2, high_0 ^ c3 ^ k1, low_0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def word_uniform(word, MATH: tl.constexpr):
    """(k + 0.5) 2^-23 with k = word >> 9; every step is exact."""
    # 1 + k 2^-23: the exponent of 1 stands above k. A funnel shift brings it there, in place of a shift and a conversion.
    if MATH == 1:
        bits = tl.inline_asm_elementwise("shf.r.wrap.b32 $0, $1, 0x7F, 9;", "=r,r", [word], dtype=tl.uint32, is_pure=True, pack=1)
    else:
        bits = (word >> 9) | 0x3F800000
    return bits.to(tl.float32, bitcast=True) - 0.999999940395355224609375


@triton.jit
def box_muller(word_radius, word_angle, MATH: tl.constexpr):
    """Two blocks of normals from two blocks of words."""
    u = word_uniform(word_radius, MATH)
    # The signed shift takes the angle from [-pi, pi), where the fast sine and cosine are specified to 2^-21.
    theta = (word_angle.to(tl.int32, bitcast=True) >> 8).to(tl.float32) * 3.7450703e-07
    v = 1.0 - u
    # -2 ln u, near 1 by its series in v = 1 - u, which is exact; elsewhere by the base-2 logarithm of the machine.
    series = v * (2.0 + v * (1.0 + v * (0.6666666666666666 + v * 0.5)))
    if MATH == 1:
        log2, cosine, sine = libdevice.fast_log2f(u), libdevice.fast_cosf(theta), libdevice.fast_sinf(theta)
    else:
        log2, cosine, sine = tl.log2(u), tl.cos(theta), tl.sin(theta)
    # Both branches are positive where they are taken, so the radicand needs no clamp.
    radius = tl.sqrt(tl.where(u > 0.984375, series, log2 * -1.3862943611198906))
    return radius * cosine, radius * sine


@triton.jit
def draw_block(p_seed, seed_stride, p_position, position_stride, i_sample, o_i, stream, NORMAL: tl.constexpr, MATH: tl.constexpr):
    """The four lanes, fp32, of normals or uniforms of the counters o_i of one sample."""
    w0, w1, w2, w3 = philox_block(p_seed, seed_stride, p_position, position_stride, i_sample, o_i, stream, MATH)
    if NORMAL:
        b0, b1 = box_muller(w0, w1, MATH)
        b2, b3 = box_muller(w2, w3, MATH)
    else:
        b0, b1, b2, b3 = word_uniform(w0, MATH), word_uniform(w1, MATH), word_uniform(w2, MATH), word_uniform(w3, MATH)
    return b0, b1, b2, b3


@triton.jit
def in_order(a, b, c, d):
    """Interleaves blocks of the counters 4t, 4t + 1, 4t + 2, 4t + 3: a thread's four values become neighbours, no data moves."""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def quarter_lanes(p_seed, seed_stride, p_position, position_stride, i_first, o_first, stream, NORMAL: tl.constexpr, MATH: tl.constexpr):
    """The four lanes of normals or uniforms for the counters o_first .. o_first + 3 of each thread, in order."""
    a0, a1, a2, a3 = draw_block(p_seed, seed_stride, p_position, position_stride, i_first, o_first, stream, NORMAL, MATH)
    b0, b1, b2, b3 = draw_block(p_seed, seed_stride, p_position, position_stride, i_first, o_first + 1, stream, NORMAL, MATH)
    c0, c1, c2, c3 = draw_block(p_seed, seed_stride, p_position, position_stride, i_first, o_first + 2, stream, NORMAL, MATH)
    d0, d1, d2, d3 = draw_block(p_seed, seed_stride, p_position, position_stride, i_first, o_first + 3, stream, NORMAL, MATH)
    return in_order(a0, b0, c0, d0), in_order(a1, b1, c1, d1), in_order(a2, b2, c2, d2), in_order(a3, b3, c3, d3)
