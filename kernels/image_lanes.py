"""Device code that reads images in the quarter layout: mirrored rows, channels-last memory, bytes as floats.

Where rows divide by 4, the four elements that a thread takes from a lane are neighbours in one row: it finds the place of the first and
steps from there. Elsewhere each element finds its own.
"""

from fastcm.kernels.launch import tl, triton
from fastcm.kernels.quarter_layout import in_order, lane_mask

# 2 / 255 rounded to fp32. The other one is exact in fp32: what 2^23 BYTE_SCALE adds to 2^23 + v has to go, and 1 more.
BYTE_SCALE = tl.constexpr(0.007843137718737125)
BYTE_OFFSET = tl.constexpr(-(2**23 * 0.007843137718737125) - 1)


@triton.constexpr_function
def by_fours(N: tl.constexpr, WIDTH: tl.constexpr):
    """Whether a thread's four elements of a lane are neighbours in one row, in every lane."""
    return WIDTH % 4 == 0 and N % 16 == 0


@triton.jit
def lane_pointers(
    p_images,
    i_sample,
    o,
    mirrored,
    SPAN: tl.constexpr,
    LANE: tl.constexpr,
    N: tl.constexpr,
    PLANE: tl.constexpr,
    WIDTH: tl.constexpr,
    LAST: tl.constexpr,
):
    """Pointers to one lane of the counters o of samples. mirrored = 1 reads rows backwards: of SPAN neighbours, to where they now begin."""
    START: tl.constexpr = LANE * ((N + 3) // 4)
    if mirrored is not None:
        o += mirrored * (WIDTH - SPAN - 2 * ((o + START) % WIDTH))
    if LAST:
        # pixel channels + channel, with pixel = element - channel PLANE: what differs between lanes is one multiply-add.
        CHANNELS: tl.constexpr = N // PLANE
        p = p_images + (i_sample * N + o.to(tl.int64) * CHANNELS)
        p -= ((o + START) // PLANE).to(tl.int64) * (N - 1)
        p += START * CHANNELS
    else:
        p = p_images + i_sample * N + (o + START)
    return p


@triton.jit
def load_lane(
    p_images,
    i_sample,
    o_i,
    i_first,
    o_first,
    mirrored,
    mirrored_first,
    LANE: tl.constexpr,
    N: tl.constexpr,
    PLANE: tl.constexpr,
    WIDTH: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One lane of images; mirrored (0, 1 or None) reads their rows backwards, LAST reads them from channels-last memory.

    mirrored is that of the elements, mirrored_first of each thread's first.
    """
    if by_fours(N, WIDTH) and (LAST or mirrored is not None):
        STEP: tl.constexpr = N // PLANE if LAST else 1
        step = STEP
        if mirrored is not None:
            step = STEP - 2 * STEP * mirrored_first
        p = lane_pointers(p_images, i_first, o_first, mirrored_first, 1, LANE, N, PLANE, WIDTH, LAST)
        m_lane = lane_mask(o_first, LANE, N, BLOCK)
        b0, b1 = tl.load(p, mask=m_lane), tl.load(p + step, mask=m_lane)
        b_lane = in_order(b0, b1, tl.load(p + 2 * step, mask=m_lane), tl.load(p + 3 * step, mask=m_lane))
    else:
        p = lane_pointers(p_images, i_sample, o_i, mirrored, 1, LANE, N, PLANE, WIDTH, LAST)
        b_lane = tl.load(p, mask=lane_mask(o_i, LANE, N, BLOCK))
    return b_lane


@triton.jit
def byte_of(word, index, MATH: tl.constexpr):
    """2^23 + v as uint32 bits of fp32, v the byte of `word` with this index: one permutation of bytes."""
    if MATH == 1:
        bits = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0x4B000000, $2;", "=r,r,r", [word, 0x7440 + index], dtype=tl.uint32, is_pure=True, pack=1
        )
    else:
        bits = ((word >> (8 * index).to(tl.uint32)) & 0xFF) | 0x4B000000
    return bits


@triton.jit
def load_byte_lane(
    p_images,
    i_first,
    o_first,
    mirrored,
    LANE: tl.constexpr,
    N: tl.constexpr,
    PLANE: tl.constexpr,
    WIDTH: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
    MATH: tl.constexpr,
):
    """One lane of bytes v as fp32 in [-1, 1], v BYTE_SCALE - 1 rounded once and without a conversion; only where `by_fours`."""
    p = lane_pointers(p_images, i_first, o_first, mirrored, 4, LANE, N, PLANE, WIDTH, LAST)
    m_lane = lane_mask(o_first, LANE, N, BLOCK)
    # 0 or 1 for each thread: byte k of a mirrored four is byte 3 - k of memory.
    flip = o_first * 0
    if mirrored is not None:
        flip += mirrored
    if LAST:
        STEP: tl.constexpr = N // PLANE
        v0, v1 = tl.load(p, mask=m_lane).to(tl.uint32), tl.load(p + STEP, mask=m_lane).to(tl.uint32)
        v2, v3 = tl.load(p + 2 * STEP, mask=m_lane).to(tl.uint32), tl.load(p + 3 * STEP, mask=m_lane).to(tl.uint32)
        if mirrored is None:
            b0, b1, b2, b3 = v0 | 0x4B000000, v1 | 0x4B000000, v2 | 0x4B000000, v3 | 0x4B000000
        else:
            outer, inner = v0 | (v3 << 16), v1 | (v2 << 16)
            b0, b1 = byte_of(outer, 2 * flip, MATH), byte_of(inner, 2 * flip, MATH)
            b2, b3 = byte_of(inner, 2 - 2 * flip, MATH), byte_of(outer, 2 - 2 * flip, MATH)
    else:
        word = tl.load(p.to(tl.pointer_type(tl.uint32)), mask=m_lane)
        b0, b1 = byte_of(word, 3 * flip, MATH), byte_of(word, 1 + flip, MATH)
        b2, b3 = byte_of(word, 2 - flip, MATH), byte_of(word, 3 - 3 * flip, MATH)
    bits = in_order(b0, b1, b2, b3).to(tl.float32, bitcast=True)
    # The sum of 2^23 + v is exact in one rounding only; the interpreter rounds twice.
    return tl.fma(bits, BYTE_SCALE, BYTE_OFFSET) if MATH == 1 else (bits - 8388608.0) * BYTE_SCALE - 1.0
