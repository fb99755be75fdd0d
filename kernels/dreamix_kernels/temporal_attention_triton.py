"""Temporal attention in Triton: launchers, gradient, self-check. The definition is in temporal_attention, the kernels in <this>_kernels.

In bytes: forward reads q, k, v once and writes o; backward reads q, k, v and the output's gradient and writes three gradients. Nothing but
the inputs is saved: a sequence lies in one tile, so making its scores again costs less than reading a log-sum-exp back. A sample marked as
independent frames is a copy (v to o, do to dv), its q and k are not read. The bias's gradient is summed within each slot of programs, then
over the slots: always in one order.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import temporal_attention_triton_kernels as kernels
from .aot import Case
from .dispatch import DTYPES, require_agreement

PROGRAMS = 1024       # at most, of `backward`: two waves on a large GPU; not the GPU's own number, so that all sum dbias in the same order


class Tile(NamedTuple):
    """What one program takes: pixels, queries x keys of each, the head size in chunks; with how many warps."""
    pixels: int
    queries: int
    keys: int
    chunk: int
    warps: int


def supported(T: int, d: int, dtype: torch.dtype) -> bool:
    """True if the kernels take sequences of T frames and heads of d channels."""
    return 1 <= T <= 128 and d in (32, 64, 128) and dtype in DTYPES


@cache
def config(kernel: str, T: int, d: int, dtype: torch.dtype) -> Tile | None:
    """The tile of `forward`, `backward` or `backward_keys`; None where there is no need of the last: `backward` makes dk and dv itself.

    One choice per padded length, head size and width of the format: of the tiles that compile without spills for sm_80 and sm_90, one that
    leaves room for several programs per multiprocessor. Batched products give each pixel one warp. Products in fp32 hold whole rows in
    registers, hence short chunks.
    """
    keys = max(16, triton.next_power_of_2(T))
    if dtype == torch.float32:               # padded length: pixels, block of queries (of keys, in `backward_keys`), chunk, warps
        tiles = {"forward": {16: (4, 16, 16, 4), 32: (1, 32, 16, 8), 64: (1, 64, 16, 4), 128: (1, 32, 32, 8)},
                 "backward": {16: (4, 16, 16, 4), 32: (1, 32, 16, 8), 64: (1, 32, 16, 8), 128: (1, 32, 16, 8)},
                 "backward_keys": {64: (1, 32, 16, 8), 128: (1, 16, 16, 8)}}
    elif d == 32:
        tiles = {"forward": {16: (8, 16, d, 4), 32: (4, 32, d, 4), 64: (1, 64, d, 4), 128: (1, 64, d, 4)},
                 "backward": {16: (4, 16, d, 4), 32: (4, 32, d, 4), 64: (1, 64, d, 4), 128: (1, 32, d, 8)},
                 "backward_keys": {128: (1, 64, d, 8)}}
    elif d == 64:
        tiles = {"forward": {16: (4, 16, d, 4), 32: (4, 32, d, 4), 64: (1, 64, d, 4), 128: (1, 64, d, 4)},
                 "backward": {16: (4, 16, d, 4), 32: (1, 32, d, 4), 64: (1, 64, 32, 4), 128: (1, 64, 32, 8)},
                 "backward_keys": {128: (1, 64, d, 8)}}
    else:
        tiles = {"forward": {16: (4, 16, d, 4), 32: (1, 32, d, 4), 64: (1, 64, d, 4), 128: (1, 64, 64, 4)},
                 "backward": {16: (4, 16, 64, 4), 32: (1, 32, d, 4), 64: (1, 64, 64, 8), 128: (1, 64, 64, 8)},
                 "backward_keys": {128: (1, 64, 64, 8)}}
    if keys not in tiles[kernel]:
        return None
    pixels, block, chunk, warps = tiles[kernel][keys]
    return Tile(pixels, keys, block, chunk, warps) if kernel == "backward_keys" else Tile(pixels, block, keys, chunk, warps)


def _constants(kernel: triton.runtime.KernelInterface, tile: Tile, d: int, **more: int) -> dict[str, int]:
    values = dict(PIX=tile.pixels, QUERIES=tile.queries, KEYS=tile.keys, D=d, CHUNK=tile.chunk, **more)
    return {name: value for name, value in values.items() if name in kernel.arg_names}


def _options(tile: Tile) -> dict[str, int]:
    return dict(num_warps=tile.warps, num_stages=1)       # a program runs through its tiles once: nothing to pipeline


def _strides(x: Tensor) -> tuple[int, list[int]]:
    """(unit, strides of B, T, P, heads in it): 8 elements where all allow it. An axis of one element has no stride."""
    strides = [0 if n == 1 else s for n, s in zip(x.shape[:4], x.stride())]
    unit = 1 if any(s % 8 for s in strides) else 8
    return unit, [s // unit for s in strides]


def _alike(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slices of one packed tensor as they are; a mixture of layouts, which no caller has, as copies."""
    strides = _strides(v)
    if v.stride(-1) == 1 and k.stride(-1) == 1 and q.stride(-1) == 1 and _strides(q) == strides and _strides(k) == strides:
        return q, k, v
    return q.contiguous(), k.contiguous(), v.contiguous()


def _wide(*tensors: Tensor) -> bool:
    """True if offsets from a program's first row pass 2**31 elements."""
    return any(x.shape[1] * x.stride(1) + 8 * x.stride(2) >= 2**31 for x in tensors)


def _launch(kernel: triton.runtime.KernelInterface, programs: int, tile: Tile, d: int, arguments: tuple, **more: int) -> None:
    with torch.cuda.device_of(arguments[0]):
        kernel[(programs,)](*arguments, **_constants(kernel, tile, d, **more), **_options(tile))


def _forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    B, T, P, heads, d = v.shape
    o = torch.empty((B, T, P, heads, d), dtype=v.dtype, device=v.device)
    unit, strides = _strides(v)
    tile = config("forward", T, d, v.dtype)
    programs = B * triton.cdiv(P, tile.pixels) * triton.cdiv(T, tile.queries) * heads
    if programs:
        _launch(kernels.forward, programs, tile, d, (q, k, v, bias, mask, o, *strides, T, P, heads), UNIT=unit, WIDE=_wide(v, o))
    return o


def _backward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, do: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
              need_dbias: bool) -> Tensor | None:
    """Writes dq, dk, dv (alike in strides); returns dbias."""
    B, T, P, heads, d = v.shape
    do = do.contiguous()
    unit, strides = _strides(v)
    grad_unit, grad_strides = _strides(dv)
    more = dict(UNIT=unit, GRAD_UNIT=grad_unit, WIDE=_wide(v, do, dv))
    tile, key_tile = (config(kernel, T, d, v.dtype) for kernel in ("backward", "backward_keys"))
    blocks, parts = B * triton.cdiv(P, tile.pixels), triton.cdiv(T, tile.queries)
    if blocks * heads == 0:
        return torch.zeros_like(bias) if need_dbias else None
    rounds = triton.cdiv(blocks * parts * heads, PROGRAMS)
    slots = triton.cdiv(blocks, rounds)                   # each walks `rounds` blocks; the last may have fewer
    fp32 = dict(dtype=torch.float32, device=v.device)
    dbias = torch.empty((slots, heads, T, T), **fp32) if need_dbias else None
    lse, delta = torch.empty((2, B, P, heads, T), **fp32) if key_tile else (None, None)
    _launch(kernels.backward, slots * parts * heads, tile, d,
            (q, k, v, bias, mask, do, dq, dk, dv, dbias, lse, delta, *strides, *grad_strides, B, T, P, heads, slots), **more)
    if key_tile:
        _launch(kernels.backward_keys, B * P * triton.cdiv(T, key_tile.keys) * heads, key_tile, d,
                (q, k, v, bias, mask, do, dk, dv, lse, delta, *strides, *grad_strides, T, P, heads), **more)
    return dbias.sum(0).to(bias.dtype) if need_dbias else None


class _TemporalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bias, mask):
        q, k, v = _alike(q, k, v)
        bias = bias.contiguous()
        ctx.save_for_backward(q, k, v, bias, mask)
        return _forward(q, k, v, bias, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, k, v, bias, mask = ctx.saved_tensors
        dq, dk, dv = (torch.empty(v.shape, dtype=v.dtype, device=v.device) for _ in range(3))
        return dq, dk, dv, _backward(q, k, v, bias, mask, do, dq, dk, dv, ctx.needs_input_grad[3]), None


class _TemporalAttentionPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, bias, mask):
        if qkv.stride(-1) != 1:
            qkv = qkv.contiguous()
        bias = bias.contiguous()
        ctx.save_for_backward(qkv, bias, mask)
        return _forward(*qkv.unbind(3), bias, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        qkv, bias, mask = ctx.saved_tensors
        dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
        return dqkv, _backward(*qkv.unbind(3), bias, mask, do, *dqkv.unbind(3), ctx.needs_input_grad[1]), None


def temporal_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, independent_frames: Tensor | None = None) -> Tensor:
    """Softmax attention over T at each pixel, with an additive bias; marked samples take v.

    Shapes: q, k, v [B, T, P, heads, d], channels contiguous, other strides as they come (slices of a packed tensor are not copied);
    bias [heads, T, T]; independent_frames bool [B] or None -> contiguous [B, T, P, heads, d]. For T, d that `supported` allows.
    """
    return _TemporalAttention.apply(q, k, v, bias, independent_frames)


def temporal_attention_packed(qkv: Tensor, bias: Tensor, independent_frames: Tensor | None = None) -> Tensor:
    """The same for qkv [B, T, P, 3, heads, d]; its gradient is written as one packed tensor."""
    return _TemporalAttentionPacked.apply(qkv, bias, independent_frames)


def self_check(device: torch.device, dtype: torch.dtype) -> None:
    """A batched and a blocked tile against the definition in fp64, one sample of two marked, output and gradients. Raises: RuntimeError."""
    generator = torch.Generator().manual_seed(0)
    for T, P, heads, d in ((5, 5, 2, 64), (65, 1, 1, 32)):
        shapes = (2, T, P, 3, heads, d), (heads, T, T), (2, T, P, heads, d)
        qkv, bias, do = (torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes)
        mask = torch.tensor([False, True], device=device)
        ours, exact = ([x.clone().to(kind).requires_grad_() for x in (qkv, bias)] for kind in (dtype, torch.float64))
        o = temporal_attention_packed(*ours, mask)
        q, k, v = exact[0].unbind(3)
        attended = torch.einsum("bphst,btphd->bsphd", torch.softmax(torch.einsum("bsphd,btphd->bphst", q, k) * d**-0.5 + exact[1], -1), v)
        want = torch.where(mask[:, None, None, None, None], v, attended)
        got = torch.autograd.grad(o, ours, do)
        for name, mine, true in zip(("output", "dqkv", "dbias"), (o, *got), (want, *torch.autograd.grad(want, exact, do.double()))):
            require_agreement(f"temporal_attention: {name} at T = {T}", mine.detach(), true.detach())


def aot_cases() -> list[Case]:
    """Every kernel at the base model's T = 16 (heads of 64; of 32 in the bundled cascade), the lengths above it, and the widest tile."""
    found = []
    for dtype, name in zip(DTYPES, ("fp32", "bf16", "fp16")):
        types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "do_ptr", "o_ptr", "dq_ptr", "dk_ptr", "dv_ptr"), dtype)
        types |= dict.fromkeys(("bias_ptr", "dbias_ptr", "lse_ptr", "delta_ptr"), torch.float32) | {"mask_ptr": torch.bool}
        for T, d in ((16, 32), (16, 64), (32, 64), (64, 64), (128, 128)):
            for kernel in ("forward", "backward", "backward_keys"):
                if tile := config(kernel, T, d, dtype):
                    function = getattr(kernels, kernel)
                    constants = _constants(function, tile, d, UNIT=8, GRAD_UNIT=8, WIDE=False)
                    arguments = {n: types.get(n, "i32") for n in function.arg_names if n not in constants}
                    found.append(Case(f"temporal_attention {kernel} T{T} d{d} {name}", function, arguments, constants, _options(tile)))
    return found
