"""The Triton kernels of temporal attention: softmax(q k^T / sqrt(D) + bias) v for every (sample, pixel, head), along T.

A sequence is short (T <= 128), so all its keys lie in one tile and the softmax is plain. A program takes one head and PIX pixels: with
PIX > 1 the tiles are [PIX, T, D] and `tl.dot` runs over the pixels as a batch, so that no product between pixels is computed; with PIX = 1
they are [T, D]. T is padded to KEYS; a program with fewer QUERIES than KEYS takes one block of queries. The head size is walked in chunks
of CHUNK, which keeps the tiles of fp32 and of D = 128 in registers; what two passes need is loaded twice, the second time from a cache.

Inputs have strides in units of UNIT elements (8 where all allow it): a factor in the code, unlike an argument's value, tells the compiler
that rows are aligned to 16 bytes. Output and its gradient are contiguous [B, T, P, heads, D]. WIDE: offsets in a tile need 64 bits.
"""

import triton
import triton.language as tl

from .dispatch import interpreted

INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def _rows(first, stride_t, stride_p, UNIT: tl.constexpr, PIX: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of frames first .. first + ROWS of PIX pixels, [PIX, ROWS, 1] or [ROWS, 1]."""
    t = first + tl.arange(0, ROWS)
    p = tl.arange(0, PIX)
    if WIDE:
        t, p = t.to(tl.int64), p.to(tl.int64)
    if PIX == 1:
        return (t * stride_t * UNIT)[:, None]
    else:
        return (p * stride_p * UNIT)[:, None, None] + (t * stride_t * UNIT)[None, :, None]


@triton.jit
def _inside(first, T, pixels, PIX: tl.constexpr, ROWS: tl.constexpr):
    """Which of those rows exist, where `pixels` pixels are left; same shape."""
    t = first + tl.arange(0, ROWS)
    if PIX == 1:
        return (t < T)[:, None]
    else:
        return (tl.arange(0, PIX) < pixels)[:, None, None] & (t < T)[None, :, None]


@triton.jit
def _transposed(x):
    if len(x.shape) == 3:
        return tl.permute(x, (0, 2, 1))
    else:
        return tl.trans(x)


@triton.jit
def _dot(a, b):
    if INTERPRETED:                                       # it keeps bf16 as integers and would multiply those
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="ieee")       # fp32 means fp32; the 16-bit formats do not look at it


@triton.jit
def _products(a_ptr, b_ptr, inside_a, inside_b, zeros, D: tl.constexpr, CHUNK: tl.constexpr):
    """a b^T over the last axis, fp32, from pointers to rows; `zeros` has the result's shape."""
    for c in range(0, D, CHUNK):
        d = c + tl.arange(0, CHUNK)
        a = tl.load(a_ptr + d, mask=inside_a, other=0.0)
        zeros += _dot(a, _transposed(tl.load(b_ptr + d, mask=inside_b, other=0.0)))
    return zeros


@triton.jit
def _zeros(PIX: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    if PIX == 1:
        return tl.zeros((QUERIES, KEYS), tl.float32)
    else:
        return tl.zeros((PIX, QUERIES, KEYS), tl.float32)


@triton.jit
def _scores(q_ptr, k_ptr, bias_ptr, inside_q, inside_k, q0, k0, T,
            PIX: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr):
    """q k^T / sqrt(D) + bias; minus infinity at the keys of the padding. Rows of padding come out finite: their q is zero."""
    t, s = q0 + tl.arange(0, QUERIES)[:, None], k0 + tl.arange(0, KEYS)[None, :]
    scores = _products(q_ptr, k_ptr, inside_q, inside_k, _zeros(PIX, QUERIES, KEYS), D, CHUNK)
    bias = tl.load(bias_ptr + t * T + s, mask=(t < T) & (s < T), other=0.0).to(tl.float32)
    return scores * (D ** -0.5) + tl.where(s < T, bias, float("-inf"))


@triton.jit
def _softmax(scores):
    """(softmax over the last axis, log of the sum of exponentials [..., 1])."""
    largest = tl.expand_dims(tl.max(scores, -1), -1)
    e = tl.exp(scores - largest)
    total = tl.expand_dims(tl.sum(e, -1), -1)
    return e / total, largest + tl.log(total)


@triton.jit
def forward(q_ptr, k_ptr, v_ptr, bias_ptr, mask_ptr, o_ptr, stride_b, stride_t, stride_p, stride_h, T, P, heads,
            UNIT: tl.constexpr, WIDE: tl.constexpr, PIX: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr,
            CHUNK: tl.constexpr):
    """o. One program per head (fastest: its neighbours read the neighbouring rows), block of queries, block of pixels."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    block = tl.program_id(0) // heads
    parts, blocks = tl.cdiv(T, QUERIES), tl.cdiv(P, PIX)
    q0 = block % parts * QUERIES
    p0 = block // parts % blocks * PIX
    b = (block // parts // blocks).to(tl.int64)
    first = (b * stride_b + p0.to(tl.int64) * stride_p + head * stride_h) * UNIT
    rows = first + _rows(q0, stride_t, stride_p, UNIT, PIX, QUERIES, WIDE)
    inside = _inside(q0, T, P - p0, PIX, QUERIES)
    o_ptr += ((b * T * P + p0) * heads + head) * D + _rows(q0, P * heads, heads, D, PIX, QUERIES, WIDE)
    independent = False
    if mask_ptr is not None:
        independent = tl.load(mask_ptr + b)
    if independent:                                       # a softmax over one key is 1
        for c in range(0, D, CHUNK):
            d = c + tl.arange(0, CHUNK)
            tl.store(o_ptr + d, tl.load(v_ptr + rows + d, mask=inside, other=0.0), mask=inside)
    else:
        rows_k = first + _rows(0, stride_t, stride_p, UNIT, PIX, KEYS, WIDE)
        inside_k = _inside(0, T, P - p0, PIX, KEYS)
        p, _ = _softmax(_scores(q_ptr + rows, k_ptr + rows_k, bias_ptr + head * T * T, inside, inside_k, q0, 0, T,
                                PIX, QUERIES, KEYS, D, CHUNK))
        p = p.to(v_ptr.dtype.element_ty)
        for c in range(0, D, CHUNK):
            d = c + tl.arange(0, CHUNK)
            v = tl.load(v_ptr + rows_k + d, mask=inside_k, other=0.0)
            tl.store(o_ptr + d, _dot(p, v).to(v.dtype), mask=inside)


@triton.jit
def backward(q_ptr, k_ptr, v_ptr, bias_ptr, mask_ptr, do_ptr, dq_ptr, dk_ptr, dv_ptr, dbias_ptr, lse_ptr, delta_ptr,
             stride_b, stride_t, stride_p, stride_h, grad_b, grad_t, grad_p, grad_h, B, T, P, heads, slots,
             UNIT: tl.constexpr, GRAD_UNIT: tl.constexpr, WIDE: tl.constexpr, PIX: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
             D: tl.constexpr, CHUNK: tl.constexpr):
    """dq, and the program's share of dbias [slots, heads, T, T]. Where QUERIES = KEYS, dk and dv too; else `backward_keys` makes them
    from lse and delta [B, P, heads, T], written here. One program per head, block of queries and slot, which walks every slots-th block
    of pixels."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    parts, blocks = tl.cdiv(T, QUERIES), tl.cdiv(P, PIX)
    q0 = tl.program_id(0) // heads % parts * QUERIES
    slot = tl.program_id(0) // heads // parts
    dbias = _zeros(PIX, QUERIES, KEYS)
    # hoisting what does not depend on the block out of the loop costs some 60 registers, half of the programs that fit a multiprocessor
    for block in tl.range(slot, B * blocks, slots, disable_licm=True):
        b = (block // blocks).to(tl.int64)
        p0 = block % blocks * PIX
        first = (b * stride_b + p0.to(tl.int64) * stride_p + head * stride_h) * UNIT
        rows = first + _rows(q0, stride_t, stride_p, UNIT, PIX, QUERIES, WIDE)
        inside = _inside(q0, T, P - p0, PIX, QUERIES)
        grad_rows = (b * grad_b + p0.to(tl.int64) * grad_p + head * grad_h) * GRAD_UNIT
        grad_rows += _rows(q0, grad_t, grad_p, GRAD_UNIT, PIX, QUERIES, WIDE)
        do_rows = do_ptr + ((b * T * P + p0) * heads + head) * D + _rows(q0, P * heads, heads, D, PIX, QUERIES, WIDE)
        independent = False
        if mask_ptr is not None:
            independent = tl.load(mask_ptr + b)
        if independent:
            for c in range(0, D, CHUNK):
                d = c + tl.arange(0, CHUNK)
                do = tl.load(do_rows + d, mask=inside, other=0.0)
                tl.store(dv_ptr + grad_rows + d, do, mask=inside)
                tl.store(dq_ptr + grad_rows + d, tl.zeros_like(do), mask=inside)
                tl.store(dk_ptr + grad_rows + d, tl.zeros_like(do), mask=inside)
        else:
            rows_k = first + _rows(0, stride_t, stride_p, UNIT, PIX, KEYS, WIDE)
            inside_k = _inside(0, T, P - p0, PIX, KEYS)
            p, lse = _softmax(_scores(q_ptr + rows, k_ptr + rows_k, bias_ptr + head * T * T, inside, inside_k, q0, 0, T,
                                      PIX, QUERIES, KEYS, D, CHUNK))
            dp = _zeros(PIX, QUERIES, KEYS)
            if QUERIES == KEYS:
                p_t = _transposed(p.to(do_ptr.dtype.element_ty))
                for c in range(0, D, CHUNK):
                    d = c + tl.arange(0, CHUNK)
                    do = tl.load(do_rows + d, mask=inside, other=0.0)
                    tl.store(dv_ptr + grad_rows + d, _dot(p_t, do).to(do.dtype), mask=inside)
                    dp += _dot(do, _transposed(tl.load(v_ptr + rows_k + d, mask=inside_k, other=0.0)))
            else:
                dp = _products(do_rows, v_ptr + rows_k, inside, inside_k, dp, D, CHUNK)
            delta = tl.expand_dims(tl.sum(p * dp, -1), -1)
            ds = p * (dp - delta)
            if dbias_ptr is not None:
                dbias += ds
            ds = (ds * (D ** -0.5)).to(do_ptr.dtype.element_ty)
            for c in range(0, D, CHUNK):
                d = c + tl.arange(0, CHUNK)
                k = tl.load(k_ptr + rows_k + d, mask=inside_k, other=0.0)
                tl.store(dq_ptr + grad_rows + d, _dot(ds, k).to(k.dtype), mask=inside)
                if QUERIES == KEYS:
                    q = tl.load(q_ptr + rows + d, mask=inside, other=0.0)
                    tl.store(dk_ptr + grad_rows + d, _dot(_transposed(ds), q).to(q.dtype), mask=inside)
            if QUERIES != KEYS:
                at = ((b * P + p0) * heads + head) * T + _rows(q0, 1, heads * T, 1, PIX, QUERIES, WIDE)
                tl.store(lse_ptr + at, lse, mask=inside)
                tl.store(delta_ptr + at, delta, mask=inside)
    if dbias_ptr is not None:
        if PIX > 1:
            dbias = tl.sum(dbias, 0)
        t, s = q0 + tl.arange(0, QUERIES)[:, None], tl.arange(0, KEYS)[None, :]
        tl.store(dbias_ptr + ((slot.to(tl.int64) * heads + head) * T + t) * T + s, dbias, mask=(t < T) & (s < T))


@triton.jit
def backward_keys(q_ptr, k_ptr, v_ptr, bias_ptr, mask_ptr, do_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr,
                  stride_b, stride_t, stride_p, stride_h, grad_b, grad_t, grad_p, grad_h, T, P, heads,
                  UNIT: tl.constexpr, GRAD_UNIT: tl.constexpr, WIDE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
                  D: tl.constexpr, CHUNK: tl.constexpr):
    """dk and dv of one block of KEYS keys from all QUERIES queries of one pixel; `backward` wrote lse, delta, and the masked samples."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    block = tl.program_id(0) // heads
    parts = tl.cdiv(T, KEYS)
    k0 = block % parts * KEYS
    p0 = block // parts % P
    b = (block // parts // P).to(tl.int64)
    independent = False
    if mask_ptr is not None:
        independent = tl.load(mask_ptr + b)
    if not independent:
        first = (b * stride_b + p0.to(tl.int64) * stride_p + head * stride_h) * UNIT
        rows = first + _rows(0, stride_t, stride_p, UNIT, 1, QUERIES, WIDE)
        rows_k = first + _rows(k0, stride_t, stride_p, UNIT, 1, KEYS, WIDE)
        do_rows = do_ptr + ((b * T * P + p0) * heads + head) * D + _rows(0, P * heads, heads, D, 1, QUERIES, WIDE)
        grad_rows = (b * grad_b + p0.to(tl.int64) * grad_p + head * grad_h) * GRAD_UNIT
        grad_rows += _rows(k0, grad_t, grad_p, GRAD_UNIT, 1, KEYS, WIDE)
        inside, inside_k = _inside(0, T, 1, 1, QUERIES), _inside(k0, T, 1, 1, KEYS)
        at = ((b * P + p0) * heads + head) * T + tl.arange(0, QUERIES)[:, None]
        lse = tl.load(lse_ptr + at, mask=inside, other=0.0)                  # queries of the padding add nothing: their do is zero
        delta = tl.load(delta_ptr + at, mask=inside, other=0.0)
        p = tl.exp(_scores(q_ptr + rows, k_ptr + rows_k, bias_ptr + head * T * T, inside, inside_k, 0, k0, T,
                           1, QUERIES, KEYS, D, CHUNK) - lse)
        p_t = tl.trans(p.to(do_ptr.dtype.element_ty))
        dp = tl.zeros((QUERIES, KEYS), tl.float32)
        for c in range(0, D, CHUNK):
            d = c + tl.arange(0, CHUNK)
            do = tl.load(do_rows + d, mask=inside, other=0.0)
            tl.store(dv_ptr + grad_rows + d, _dot(p_t, do).to(do.dtype), mask=inside_k)
            dp += _dot(do, tl.trans(tl.load(v_ptr + rows_k + d, mask=inside_k, other=0.0)))
        ds_t = tl.trans((p * (dp - delta) * (D ** -0.5)).to(do_ptr.dtype.element_ty))
        for c in range(0, D, CHUNK):
            d = c + tl.arange(0, CHUNK)
            q = tl.load(q_ptr + rows + d, mask=inside, other=0.0)
            tl.store(dk_ptr + grad_rows + d, _dot(ds_t, q).to(q.dtype), mask=inside_k)
