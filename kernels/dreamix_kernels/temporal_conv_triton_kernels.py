"""The Triton kernels of the temporal convolution block, y = x + conv(h) + bias on [B, T, P, C]. `temporal_conv_triton` launches them.

h = silu(x * gain + offset) is the activated tensor; frames outside the clip are zeros of h. Tap k of output frame t reads h at t + k - 1.
A weight is packed [3, C, C]: tap, channel that is read, channel that is written. Without ACTIVATE h is x itself, and without RESIDUAL
y = conv(h) and a masked sample's y is zero: the same kernels then carry a gradient back through the convolution.
C is a compile-time number: the compiler then knows which rows it may load 16 bytes at a time. Nothing is added atomically.
"""

import triton
import triton.language as tl

SIZES = ["T", "P"]                     # numbers that stay numbers where they are 1, and do not compile anew where 16 divides them


@triton.jit
def _if(exists, n):
    """A limit for indices: n, or none of them. (A tensor & a scalar condition is a mask of another type in Triton's interpreter.)"""
    return tl.where(exists, n, 0)


@triton.jit
def _product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in fp32. PRECISION: ieee, tf32, or `widened`, for Triton's interpreter, which multiplies bf16 by its bit patterns."""
    if PRECISION == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _activate(raw, gain_ptr, offset_ptr, row, exists, ACTIVATE: tl.constexpr):
    """h of a tile, rounded to x's format as PyTorch rounds it before its convolution. raw is zeros where the frame does not exist;
    so are gain and offset then, and silu(0) is 0. `row`: where the tile's channels are in [B * T, C]."""
    if ACTIVATE:
        gain = tl.load(gain_ptr + row, mask=exists, other=0.0)
        offset = tl.load(offset_ptr + row, mask=exists, other=0.0)
        u = raw.to(tl.float32) * gain[None, :] + offset[None, :]
        return (u / (1 + tl.exp(-u))).to(raw.dtype)
    else:
        return raw


@triton.jit
def _residual(x_ptr, bias_ptr, at, inside, c, C: tl.constexpr):
    """x + bias in fp32. x is read again, from the L2 cache: kept in registers since it was activated, it would crowd out the sums."""
    bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    return tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) + bias[None, :]


@triton.jit
def _store(out, y_ptr, partials_ptr, at, inside, count, part, c, C: tl.constexpr):
    """A tile of y, and with partials the (mean, M2) over its `count` pixels of every channel as stored, at partials[part].

    For those the tile is read back, from the cache: a loaded tile keeps most of a channel's pixels in one thread's registers, a matrix
    product's result does not, and would have to be shuffled between threads channel by channel.
    """
    tl.store(y_ptr + at, out.to(y_ptr.dtype.element_ty), mask=inside)
    _statistics(y_ptr, partials_ptr, at, inside, count, part, c, C)


@triton.jit
def _statistics(y_ptr, partials_ptr, at, inside, count, part, c, C: tl.constexpr):
    if partials_ptr is not None:
        tl.debug_barrier()             # the tile's other threads have stored their share
        y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(y, 0) / count.to(tl.float32)
        away = tl.where(inside, y - mean[None, :], 0.0)
        to = partials_ptr + (part * C + c) * 2
        tl.store(to, mean, mask=c < C)
        tl.store(to + 1, tl.sum(away * away, 0), mask=c < C)


@triton.jit
def _bypass(x_ptr, y_ptr, partials_ptr, at, inside, count, part, c, C: tl.constexpr, RESIDUAL: tl.constexpr, INPLACE: tl.constexpr):
    """A tile of a masked sample: the residual alone. In place it is there already."""
    if not INPLACE:
        if RESIDUAL:
            tl.store(y_ptr + at, tl.load(x_ptr + at, mask=inside, other=0.0), mask=inside)
        else:
            tl.store(y_ptr + at, tl.zeros(at.shape, y_ptr.dtype.element_ty), mask=inside)
    _statistics(y_ptr, partials_ptr, at, inside, count, part, c, C)


@triton.jit(do_not_specialize=SIZES)
def rolling(x_ptr, gain_ptr, offset_ptr, weight_ptr, bias_ptr, mask_ptr, y_ptr, partials_ptr, T, P,
            C: tl.constexpr, ACTIVATE: tl.constexpr, RESIDUAL: tl.constexpr, INPLACE: tl.constexpr, PRECISION: tl.constexpr,
            BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """One program: a block of pixels, all channels, all frames in turn. Each element of x is activated once, and the weight stays on chip.

    May run in place: no other program reads these pixels, and when frame t is written only later ones are still to be read.
    """
    blocks = tl.cdiv(P, BLOCK_P)
    b = (tl.program_id(0) // blocks).to(tl.int64)          # int64: frame * P * C passes 2**31
    block = tl.program_id(0) % blocks
    p, c = block * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C)
    inside = (p < P)[:, None] & (c < C)[None, :]
    at = tl.arange(0, BLOCK_P)[:, None] * C + c[None, :]
    count = tl.minimum(BLOCK_P, P - block * BLOCK_P)
    start = (b * T * P + block * BLOCK_P) * C
    frame = C * P.to(tl.int64)
    part = b * T * blocks + block
    x_ptr += start
    y_ptr += start
    if mask_ptr is not None:
        if tl.load(mask_ptr + b) != 0:
            if (not INPLACE) or (partials_ptr is not None):
                for _t in range(T):
                    _bypass(x_ptr, y_ptr, partials_ptr, at, inside, count, part, c, C, RESIDUAL, INPLACE)
                    x_ptr += frame
                    y_ptr += frame
                    part += blocks
            return

    square = (c < C)[:, None] & (c < C)[None, :]
    to = weight_ptr + c[:, None] * C + c[None, :]
    first = tl.load(to, mask=square, other=0.0)
    middle = tl.load(to + C * C, mask=square, other=0.0)
    last = tl.load(to + 2 * C * C, mask=square, other=0.0)

    row = b * T * C + c
    raw = tl.load(x_ptr + at, mask=inside, other=0.0)
    before = tl.zeros([BLOCK_P, BLOCK_C], raw.dtype)       # h of the frames before, at and after t
    here = _activate(raw, gain_ptr, offset_ptr, row, c < C, ACTIVATE)
    raw = tl.load(x_ptr + frame + at, mask=(p < _if(T > 1, P))[:, None] & (c < C)[None, :], other=0.0)
    for t in range(T):
        # the frame after the next is on its way while the next is activated and this one multiplied
        following = tl.load(x_ptr + 2 * frame + at, mask=(p < _if(t + 2 < T, P))[:, None] & (c < C)[None, :], other=0.0)
        row += C
        after = _activate(raw, gain_ptr, offset_ptr, row, c < _if(t + 1 < T, C), ACTIVATE)
        # one sum, not three that live across frames: those would rotate, and sm_90 then runs its matrix products one at a time
        out = _product(before, first, tl.zeros([BLOCK_P, BLOCK_C], tl.float32), PRECISION)
        out = _product(here, middle, out, PRECISION)
        out = _product(after, last, out, PRECISION)
        if RESIDUAL:
            out += _residual(x_ptr, bias_ptr, at, inside, c, C)
        _store(out, y_ptr, partials_ptr, at, inside, count, part, c, C)
        before, here, raw = here, after, following
        x_ptr += frame
        y_ptr += frame
        part += blocks


@triton.jit(do_not_specialize=SIZES)
def per_tap(x_ptr, gain_ptr, offset_ptr, weight_ptr, bias_ptr, mask_ptr, y_ptr, partials_ptr, T, P,
            C: tl.constexpr, ACTIVATE: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
            BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    """One program: a block of pixels of one frame, all output channels; taps and input channels in turn. x is activated once per tap."""
    blocks = tl.cdiv(P, BLOCK_P)
    t = tl.program_id(0) % T           # frames run fastest: what three of them read comes from memory once
    block = tl.program_id(0) // T % blocks
    b = (tl.program_id(0) // T // blocks).to(tl.int64)
    c, k = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    pixels = block * BLOCK_P + tl.arange(0, BLOCK_P) < P
    inside = pixels[:, None] & (c < C)[None, :]
    at = tl.arange(0, BLOCK_P)[:, None] * C + c[None, :]
    count = tl.minimum(BLOCK_P, P - block * BLOCK_P)
    n = b * T + t
    start = (n * P + block * BLOCK_P) * C
    frame = C * P.to(tl.int64)
    part = n * blocks + block
    x_ptr += start
    y_ptr += start
    if mask_ptr is not None:
        if tl.load(mask_ptr + b) != 0:
            _bypass(x_ptr, y_ptr, partials_ptr, at, inside, count, part, c, C, RESIDUAL, False)
            return

    if RESIDUAL:
        out = _residual(x_ptr, bias_ptr, at, inside, c, C)     # first: after the products it would not fit in the registers
    else:
        out = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    at_x = tl.arange(0, BLOCK_P)[:, None] * C + k[None, :]
    at_w = k[:, None] * C + c[None, :]
    steps: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    for i in range(3 * steps):
        tap, k0 = i // steps, i % steps * BLOCK_K
        exists = k0 + k < _if((t + tap >= 1) & (t + tap <= T), C)
        weight = tl.load(weight_ptr + (tap * C + k0) * C + at_w, mask=(k0 + k < C)[:, None] & (c < C)[None, :], other=0.0)
        raw = tl.load(x_ptr + (tap - 1) * frame + k0 + at_x, mask=pixels[:, None] & exists[None, :], other=0.0)
        h = _activate(raw, gain_ptr, offset_ptr, (n + tap - 1) * C + k0 + k, exists, ACTIVATE)
        out = _product(h, weight, out, PRECISION)
    _store(out, y_ptr, partials_ptr, at, inside, count, part, c, C)


@triton.jit(do_not_specialize=SIZES)
def add_residual(x_ptr, conv_ptr, bias_ptr, mask_ptr, y_ptr, partials_ptr, T, P,
                 C: tl.constexpr, INPLACE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """y = x + conv + bias, or x where masked, for a convolution made elsewhere: conv like x. y may be x (then INPLACE) or conv."""
    blocks, columns = tl.cdiv(P, BLOCK_P), (C + BLOCK_C - 1) // BLOCK_C
    part = (tl.program_id(0) // columns).to(tl.int64)
    block, n = part % blocks, part // blocks
    c = tl.program_id(0) % columns * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (block * BLOCK_P + tl.arange(0, BLOCK_P) < P)[:, None] & (c < C)[None, :]
    at = tl.arange(0, BLOCK_P)[:, None] * C + c[None, :]
    count = tl.minimum(BLOCK_P, P - block * BLOCK_P)
    start = (n * P + block * BLOCK_P) * C
    x_ptr += start
    y_ptr += start
    if mask_ptr is not None:
        if tl.load(mask_ptr + n // T) != 0:
            _bypass(x_ptr, y_ptr, partials_ptr, at, inside, count, part, c, C, True, INPLACE)
            return
    out = tl.load(conv_ptr + start + at, mask=inside, other=0.0).to(tl.float32) + _residual(x_ptr, bias_ptr, at, inside, c, C)
    _store(out, y_ptr, partials_ptr, at, inside, count, part, c, C)


@triton.jit(do_not_specialize=SIZES + ["splits", "items_per_split"])
def weight_gradient(x_ptr, gain_ptr, offset_ptr, dy_ptr, mask_ptr, partials_ptr, T, P, splits, items_per_split,
                    C: tl.constexpr, ACTIVATE: tl.constexpr, PRECISION: tl.constexpr,
                    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_P: tl.constexpr):
    """partials[b, split, tap, o, i]: the sum over a share of sample b's (block of pixels, frame)s of dy[t - tap + 1, o] * h[t, i].

    One tile of h meets three of dy, so it is activated once per block of output channels and not three times. Zeros where masked.
    """
    columns: tl.constexpr = (C + BLOCK_I - 1) // BLOCK_I
    tiles: tl.constexpr = columns * ((C + BLOCK_O - 1) // BLOCK_O)
    tile = tl.program_id(0) % tiles    # fastest: the tiles of one share read the same frames
    share = (tl.program_id(0) // tiles).to(tl.int64)
    b, split = share // splits, (share % splits).to(tl.int32)
    o = tile // columns * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tile % columns * BLOCK_I + tl.arange(0, BLOCK_I)
    items = tl.cdiv(P, BLOCK_P) * T
    begin = split * items_per_split
    end = tl.minimum(begin + items_per_split, items)
    if mask_ptr is not None:
        end = tl.where(tl.load(mask_ptr + b) != 0, begin, end)
    frame = C * P.to(tl.int64)
    at_x = tl.arange(0, BLOCK_P)[:, None] * C + i[None, :]
    at_dy = tl.arange(0, BLOCK_P)[:, None] * C + o[None, :]
    first = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    middle = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    last = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    for item in range(begin, end):
        t, block = item % T, item // T
        p = block * BLOCK_P + tl.arange(0, BLOCK_P)
        start = ((b * T + t) * P + block * BLOCK_P) * C
        raw = tl.load(x_ptr + start + at_x, mask=(p < P)[:, None] & (i < C)[None, :], other=0.0)
        dy_after = tl.load(dy_ptr + start + frame + at_dy, mask=(p < _if(t + 1 < T, P))[:, None] & (o < C)[None, :], other=0.0)
        dy = tl.load(dy_ptr + start + at_dy, mask=(p < P)[:, None] & (o < C)[None, :], other=0.0)
        dy_before = tl.load(dy_ptr + start - frame + at_dy, mask=(p < _if(t > 0, P))[:, None] & (o < C)[None, :], other=0.0)
        h = _activate(raw, gain_ptr, offset_ptr, (b * T + t) * C + i, i < C, ACTIVATE)
        first = _product(tl.trans(dy_after), h, first, PRECISION)
        middle = _product(tl.trans(dy), h, middle, PRECISION)
        last = _product(tl.trans(dy_before), h, last, PRECISION)
    square = (o < C)[:, None] & (i < C)[None, :]
    to = partials_ptr + share * (3 * C * C) + o[:, None] * C + i[None, :]
    tl.store(to, first, mask=square)
    tl.store(to + C * C, middle, mask=square)
    tl.store(to + 2 * C * C, last, mask=square)
