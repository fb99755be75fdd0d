"""The Triton kernels of GroupNorm, FiLM and SiLU. `group_norm_silu_triton` launches them and says which follow which.

A frame is [P, C] rows, C contiguous. The big passes cut it into parts of so many pixels and blocks of BLOCK_C channels, one program each;
what they sum goes, per channel, into a buffer [N, parts, C, 2] that small kernels add up in a fixed order. Nothing is added atomically, and
no program depends on the number of frames: a frame's bits are its own. C comes as units * UNIT, so that the compiler knows that rows start
on a multiple of UNIT and loads 16 bytes at a time.
"""

import triton
import triton.language as tl

# numbers that stay numbers where they are 1, and do not compile anew where 16 divides them
SIZES = ["N", "P", "units", "pixels_per_part", "parts", "blocks", "groups", "size", "scale_stride", "shift_stride"]


@triton.jit
def _place(pid, parts, blocks):
    """Frame (int64: n * P * C passes 2**31), part and block of channels of a program; blocks vary fastest, then they share cache lines."""
    return (pid // (parts * blocks)).to(tl.int64), pid // blocks % parts, pid % blocks


@triton.jit
def _load(x_ptr, b_ptr, at, inside):
    """x, or x + b rounded as it is stored, in fp32."""
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if b_ptr is not None:
        x = (x + tl.load(b_ptr + at, mask=inside, other=0.0).to(tl.float32)).to(x_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit(do_not_specialize=SIZES)
def statistics(x_ptr, b_ptr, sum_ptr, partials_ptr, P, units, pixels_per_part, parts, blocks,
               UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, FEW: tl.constexpr):
    """(mean, M2) of every channel over a part's pixels; with b, of x + b, which is written to sum.

    The sums are of x less a pivot, the mean of a few pixels of the part: as a rule a fraction of a deviation from the mean, so that nothing
    cancels when the sum of squares becomes M2. Were those k pixels far from all others, k times their squared distance would be a part of
    M2, and the sum of squares at most 1 + n / k times M2 with n pixels: no mean, however large, costs more digits than that.
    """
    C = units * UNIT
    n, part, block = _place(tl.program_id(0), parts, blocks)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    first = part * pixels_per_part
    pixels = tl.minimum(P - first, pixels_per_part)
    start = (n * P + first) * C
    few = tl.arange(0, FEW)
    pivot = _load(x_ptr, b_ptr, start + (few[:, None] * C + c[None, :]), (few < pixels)[:, None] & (c < C)[None, :])
    pivot = tl.sum(pivot, 0) / tl.minimum(pixels, FEW).to(tl.float32)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    square = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for p0 in range(0, pixels, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        inside = (p < pixels)[:, None] & (c < C)[None, :]
        at = start + (p[:, None] * C + c[None, :])
        x = _load(x_ptr, b_ptr, at, inside)
        if b_ptr is not None:
            tl.store(sum_ptr + at, x.to(sum_ptr.dtype.element_ty), mask=inside)
        x = tl.where(inside, x - pivot[None, :], 0.0)
        total += x
        square += x * x
    above = tl.sum(total, 0) / pixels.to(tl.float32)
    m2 = tl.sum(square, 0) - above * tl.sum(total, 0)
    to = partials_ptr + ((n * parts + part) * C + c) * 2
    tl.store(to, pivot + above, mask=c < C)
    tl.store(to + 1, tl.maximum(m2, 0.0), mask=c < C)


@triton.jit(do_not_specialize=SIZES)
def merge(partials_ptr, stats_ptr, P, pixels_per_part, parts, groups, size, BLOCK: tl.constexpr):
    """(mean, biased variance) of one frame and group from its channels' and parts' (mean, M2): Chan et al., with the mean found first.

    A group's entries are walked as one row of parts * size, so any number of channels per group costs the same.
    """
    pid = tl.program_id(0)
    n, g = (pid // groups).to(tl.int64), pid % groups
    from_ptr = partials_ptr + (n * parts * groups * size + g * size) * 2
    pivot = tl.load(from_ptr)
    whole = P.to(tl.float32) * size.to(tl.float32)
    above = tl.zeros([BLOCK], tl.float32)
    for i0 in range(0, parts * size, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        inside = i < parts * size
        part = i // size
        count = tl.minimum(P - part * pixels_per_part, pixels_per_part).to(tl.float32)
        mean = tl.load(from_ptr + (part * (groups * size) + i % size) * 2, mask=inside, other=0.0)
        above += tl.where(inside, (mean - pivot) * count, 0.0)
    offset = tl.sum(above, 0) / whole
    m2 = tl.zeros([BLOCK], tl.float32)
    for i0 in range(0, parts * size, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        inside = i < parts * size
        part = i // size
        count = tl.minimum(P - part * pixels_per_part, pixels_per_part).to(tl.float32)
        at = (part * (groups * size) + i % size) * 2
        away = tl.load(from_ptr + at, mask=inside, other=0.0) - pivot - offset
        m2 += tl.where(inside, tl.load(from_ptr + at + 1, mask=inside, other=0.0) + away * away * count, 0.0)
    tl.store(stats_ptr + pid.to(tl.int64) * 2, pivot + offset)
    tl.store(stats_ptr + pid.to(tl.int64) * 2 + 1, tl.sum(m2, 0) / whole)


@triton.jit
def _film(scale_ptr, n, c, inside, scale_stride):
    """1 + scale, or 1 without FiLM."""
    film = tl.full(c.shape, 1.0, tl.float32)
    if scale_ptr is not None:
        film += tl.load(scale_ptr + n * scale_stride + c, mask=inside, other=0.0).to(tl.float32)
    return film


@triton.jit
def _fold(stats_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, n, c, inside, groups, size, scale_stride, shift_stride, eps):
    """mean and 1 / std of the channels' groups; gain and offset of the multiply-add that normalises, scales and shifts."""
    of = stats_ptr + (n * groups + c // size) * 2
    mean = tl.load(of, mask=inside, other=0.0)
    rstd = tl.rsqrt(tl.load(of + 1, mask=inside, other=0.0) + eps)
    film = _film(scale_ptr, n, c, inside, scale_stride)
    gain = rstd * (tl.load(weight_ptr + c, mask=inside, other=0.0).to(tl.float32) * film)
    offset = tl.load(bias_ptr + c, mask=inside, other=0.0).to(tl.float32) * film
    if shift_ptr is not None:
        offset += tl.load(shift_ptr + n * shift_stride + c, mask=inside, other=0.0).to(tl.float32)
    return mean, rstd, gain, offset - mean * gain


@triton.jit(do_not_specialize=SIZES)
def fold(stats_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, gain_ptr, offset_ptr, blocks, groups, size, scale_stride, shift_stride,
         eps, BLOCK_C: tl.constexpr):
    """gain and offset of every frame and channel, for kernels that apply them themselves."""
    pid = tl.program_id(0)
    n, c = (pid // blocks).to(tl.int64), pid % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < groups * size
    _, _, gain, offset = _fold(stats_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, n, c, inside, groups, size,
                               scale_stride, shift_stride, eps)
    tl.store(gain_ptr + n * (groups * size) + c, gain, mask=inside)
    tl.store(offset_ptr + n * (groups * size) + c, offset, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def apply(x_ptr, stats_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, y_ptr, P, units, pixels_per_part, parts, blocks, groups, size,
          scale_stride, shift_stride, eps, UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """silu(x * gain + offset). From the last frame to the first: the last ones are what the statistics' pass left in the cache."""
    C = units * UNIT
    n, part, block = _place(tl.num_programs(0) - 1 - tl.program_id(0), parts, blocks)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    first = part * pixels_per_part
    pixels = tl.minimum(P - first, pixels_per_part)
    start = (n * P + first) * C
    _, _, gain, offset = _fold(stats_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, n, c, c < C, groups, size,
                               scale_stride, shift_stride, eps)
    for p0 in range(0, pixels, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        inside = (p < pixels)[:, None] & (c < C)[None, :]
        at = start + (p[:, None] * C + c[None, :])
        u = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) * gain[None, :] + offset[None, :]
        tl.store(y_ptr + at, (u * tl.sigmoid(u)).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _through_silu(dy, u):
    """Gradient at silu's input."""
    s = tl.sigmoid(u)
    return dy * (s * (1 + u * (1 - s)))


@triton.jit(do_not_specialize=SIZES)
def gradient_partials(x_ptr, dy_ptr, stats_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, partials_ptr, P, units, pixels_per_part, parts,
                      blocks, groups, size, scale_stride, shift_stride, eps,
                      UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sums of du and of du * normalised x over a part's pixels, u = x * gain + offset."""
    C = units * UNIT
    n, part, block = _place(tl.program_id(0), parts, blocks)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    first = part * pixels_per_part
    pixels = tl.minimum(P - first, pixels_per_part)
    start = (n * P + first) * C
    mean, rstd, gain, offset = _fold(stats_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, n, c, c < C, groups, size,
                                     scale_stride, shift_stride, eps)
    doffset = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    dnormed = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for p0 in range(0, pixels, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        inside = (p < pixels)[:, None] & (c < C)[None, :]
        at = start + (p[:, None] * C + c[None, :])
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)       # 0 outside, and so du is
        du = _through_silu(dy, x * gain[None, :] + offset[None, :])
        doffset += du
        dnormed += du * (x - mean[None, :])
    to = partials_ptr + ((n * parts + part) * C + c) * 2
    tl.store(to, tl.sum(doffset, 0), mask=c < C)
    tl.store(to + 1, tl.sum(dnormed, 0) * rstd, mask=c < C)


@triton.jit(do_not_specialize=SIZES)
def gradient_sums(partials_ptr, weight_ptr, bias_ptr, scale_ptr, sums_ptr, terms_ptr, dscale_ptr, dshift_ptr, P, parts, groups, size,
                  scale_stride, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of one frame and group: sums over all parts of du and du * normalised x per channel; FiLM's gradients; the group's means of both,
    each channel times weight * (1 + scale)."""
    pid = tl.program_id(0)
    n, g = (pid // groups).to(tl.int64), pid % groups
    C = groups * size
    from_ptr = partials_ptr + n * parts * C * 2
    mean_g = tl.zeros([BLOCK_C], tl.float32)
    mean_gx = tl.zeros([BLOCK_C], tl.float32)
    for c0 in range(0, size, BLOCK_C):
        i = c0 + tl.arange(0, BLOCK_C)
        c, channel = g * size + i, i < size
        a = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        b = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        for p0 in range(0, parts, BLOCK_P):
            p = p0 + tl.arange(0, BLOCK_P)
            inside = (p < parts)[:, None] & channel[None, :]
            at = (p[:, None] * C + c[None, :]) * 2
            a += tl.load(from_ptr + at, mask=inside, other=0.0)
            b += tl.load(from_ptr + at + 1, mask=inside, other=0.0)
        doffset, dnormed = tl.sum(a, 0), tl.sum(b, 0)
        weight = tl.load(weight_ptr + c, mask=channel, other=0.0).to(tl.float32)
        affine = weight * _film(scale_ptr, n, c, channel, scale_stride)
        mean_g += doffset * affine
        mean_gx += dnormed * affine
        tl.store(sums_ptr + (n * C + c) * 2, doffset, mask=channel)
        tl.store(sums_ptr + (n * C + c) * 2 + 1, dnormed, mask=channel)
        if dscale_ptr is not None:
            bias = tl.load(bias_ptr + c, mask=channel, other=0.0).to(tl.float32)
            tl.store(dscale_ptr + n * C + c, (dnormed * weight + doffset * bias).to(dscale_ptr.dtype.element_ty), mask=channel)
            tl.store(dshift_ptr + n * C + c, doffset.to(dshift_ptr.dtype.element_ty), mask=channel)
    whole = P.to(tl.float32) * size.to(tl.float32)
    tl.store(terms_ptr + pid.to(tl.int64) * 2, tl.sum(mean_g, 0) / whole)
    tl.store(terms_ptr + pid.to(tl.int64) * 2 + 1, tl.sum(mean_gx, 0) / whole)


@triton.jit(do_not_specialize=SIZES)
def gradient_parameters(sums_ptr, scale_ptr, dweight_ptr, dbias_ptr, N, groups, size, scale_stride,
                        BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """dweight and dbias: every frame's sums times its FiLM, in the order of the frames."""
    C = groups * size
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    dweight = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for n0 in range(0, N, BLOCK_N):
        n = (n0 + tl.arange(0, BLOCK_N)).to(tl.int64)
        inside = (n < N)[:, None] & (c < C)[None, :]
        at = (n[:, None] * C + c[None, :]) * 2
        doffset = tl.load(sums_ptr + at, mask=inside, other=0.0)
        dnormed = tl.load(sums_ptr + at + 1, mask=inside, other=0.0)
        film = tl.full([BLOCK_N, BLOCK_C], 1.0, tl.float32)
        if scale_ptr is not None:
            film += tl.load(scale_ptr + n[:, None] * scale_stride + c[None, :], mask=inside, other=0.0).to(tl.float32)
        dweight += dnormed * film
        dbias += doffset * film
    tl.store(dweight_ptr + c, tl.sum(dweight, 0).to(dweight_ptr.dtype.element_ty), mask=c < C)
    tl.store(dbias_ptr + c, tl.sum(dbias, 0).to(dbias_ptr.dtype.element_ty), mask=c < C)


@triton.jit(do_not_specialize=SIZES)
def gradient_x(x_ptr, dy_ptr, add_ptr, stats_ptr, terms_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, dx_ptr, P, units, pixels_per_part,
               parts, blocks, groups, size, scale_stride, shift_stride, eps,
               UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """dx = du * gain - rstd * (mean of g + normalised x * mean of g * normalised x), g = du * weight * (1 + scale); plus `add`.

    Last frame first, as `apply`.
    """
    C = units * UNIT
    n, part, block = _place(tl.num_programs(0) - 1 - tl.program_id(0), parts, blocks)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    first = part * pixels_per_part
    pixels = tl.minimum(P - first, pixels_per_part)
    start = (n * P + first) * C
    mean, rstd, gain, offset = _fold(stats_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, n, c, c < C, groups, size,
                                     scale_stride, shift_stride, eps)
    of = terms_ptr + (n * groups + c // size) * 2
    flat = -rstd * tl.load(of, mask=c < C, other=0.0)
    slope = -rstd * rstd * tl.load(of + 1, mask=c < C, other=0.0)
    for p0 in range(0, pixels, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        inside = (p < pixels)[:, None] & (c < C)[None, :]
        at = start + (p[:, None] * C + c[None, :])
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dx = _through_silu(dy, x * gain[None, :] + offset[None, :]) * gain[None, :] + ((x - mean[None, :]) * slope[None, :] + flat[None, :])
        if add_ptr is not None:
            dx += tl.load(add_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
