"""What the engine's ops keep and move on a GPU and on the CPU, in ops that run on tensors without memory.

A kernel cannot be launched on a shape. Each function here has the signature of an op of `dreamix_kernels`, saves for backward what that
op's own autograd function saves, allocates what it allocates, and reads and writes as many bytes; its numbers mean nothing.
"""

import math

import torch
from torch import Tensor

FUSED_CHANNELS = {4: 32, 2: 256}       # up to which the temporal convolution is one kernel, by bytes of an element
WEIGHT_PROGRAMS = 264                  # of the weight gradient, per sample: its partial sums are fp32


def group_norm_silu(x, groups, weight, bias, scale=None, shift=None, eps=1e-5, *, stats=None):
    return _Norm.apply(x.contiguous(), weight, bias, scale, shift, stats, groups)


def group_norm_silu_cpu(x, groups, weight, bias, scale=None, shift=None, eps=1e-5, *, stats=None):
    return _NormOnCPU.apply(x.contiguous(), weight, bias, scale)


def add_statistics(a, b, groups):
    total = a + b
    return total, total.new_empty(total.shape[0], groups, 2, dtype=torch.float32)


def temporal_attention_packed(qkv, bias, independent_frames=None):
    return _TemporalAttention.apply(qkv.contiguous(), bias)


def temporal_conv_block(x, groups, norm_weight, norm_bias, weight, bias, independent_frames=None, eps=1e-5, *, stats=None, next_groups=None,
                        inplace=False):
    B, T = x.shape[:2]
    if stats is None:
        stats = _frame_statistics(x.flatten(0, 1), groups)
    videos = B if independent_frames is None else len((~independent_frames).nonzero())
    y = _TemporalConv.apply(x.contiguous(), norm_weight, norm_bias, weight, bias, stats, videos)
    return y, None if next_groups is None else x.new_empty(B * T, next_groups, 2, dtype=torch.float32)


def attention_backend(q, k, v, mask):
    """SDPA's memory-efficient form: q, k, v, the output and a log-sum-exp are kept, scores never exist."""
    bias = None if mask is None else q.new_empty(mask.shape).expand(*q.shape[:3], k.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)[0]


def _read(*tensors: Tensor) -> None:
    for x in tensors:
        x.sum()


def _frame_statistics(x: Tensor, groups: int) -> Tensor:
    _read(x)
    return x.new_empty(x.shape[0], groups, 2, dtype=torch.float32)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, scale, shift, stats, groups):
        stats = _frame_statistics(x, groups) if stats is None else stats
        ctx.save_for_backward(x, stats, weight, bias, scale, shift)
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        x, _, weight, bias, scale, shift = ctx.saved_tensors
        _read(x, dy.contiguous())
        return x + dy, *(None if p is None else torch.empty_like(p) for p in (weight, bias, scale, shift)), None, None


class _NormOnCPU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, scale):
        folded = x.new_empty(4, x.shape[0], x.shape[-1], dtype=torch.float32)        # mean, 1 / deviation, gain, offset
        ctx.save_for_backward(x, folded, weight, bias, scale)
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        x, _, weight, bias, scale = ctx.saved_tensors
        return x + dy.contiguous(), torch.empty_like(weight), torch.empty_like(bias), None if scale is None else torch.empty_like(scale)


class _TemporalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, bias):
        ctx.save_for_backward(qkv, bias)
        return torch.addcmul(*qkv.unbind(4))

    @staticmethod
    def backward(ctx, do):
        qkv, bias = ctx.saved_tensors
        _read(do)
        return qkv.clone(), torch.empty_like(bias)


def _conv(x: Tensor, weight: Tensor) -> Tensor:
    image = x.flatten(2, 3).permute(0, 3, 1, 2)
    return torch.nn.functional.conv2d(image, weight[..., None], padding=(1, 0)).permute(0, 2, 3, 1).reshape(x.shape)


def _conv_gradient(dy: Tensor, x: Tensor, weight: Tensor, which: tuple[bool, bool]):
    images = (a.flatten(2, 3).permute(0, 3, 1, 2) for a in (dy, x))
    return torch.ops.aten.convolution_backward(*images, weight[..., None], None, [1, 1], [1, 0], [1, 1], False, [0, 0], 1, [*which, False])


class _TemporalConv(torch.autograd.Function):
    """Above FUSED_CHANNELS the activated x and the convolution of all samples exist for a while; below, one kernel skips such frames."""

    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, weight, bias, stats, videos):
        ctx.save_for_backward(x, norm_weight, norm_bias, weight, bias, stats)
        ctx.videos = videos
        if x.shape[-1] <= FUSED_CHANNELS[x.itemsize]:
            _conv(x[:videos], weight)
            return x.clone()
        return _conv(x.clone(), weight).add_(x)

    @staticmethod
    def backward(ctx, dy):
        x, norm_weight, norm_bias, weight, bias, _ = ctx.saved_tensors
        dy, C, fused = dy.contiguous(), x.shape[-1], x.shape[-1] <= FUSED_CHANNELS[x.itemsize]
        n = slice(0, ctx.videos if fused else len(x))
        h = x if fused else x.clone()
        splits = math.ceil(WEIGHT_PROGRAMS / max(1, (C // 64) * (C // 128)))
        partials = x.new_empty(len(x) * splits, 3, C, C, dtype=torch.float32)
        dweight = _conv_gradient(dy[n], h[n], weight, (False, True))[1].view(weight.shape)
        del h, partials
        dh = x.new_empty(x.shape)
        _conv_gradient(dy[n], x[n], weight, (True, False))
        _read(x, dh)
        dx = torch.addcmul(x, dh, dy)
        return dx, torch.empty_like(norm_weight), torch.empty_like(norm_bias), dweight, torch.empty_like(bias), None, None


class Mask(Tensor):
    """`independent_frames` whose values are known although the tensors around it have none."""

    @staticmethod
    def __new__(cls, values: tuple[bool, ...], device):
        mask = torch.tensor(values, device=device).as_subclass(cls)
        mask.values = values
        return mask

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        mask = args[0]
        if func is Tensor.any:
            return any(mask.values)
        if func is Tensor.__invert__:
            return _Videos(mask.values.count(False), mask.device)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*(x.as_subclass(Tensor) if isinstance(x, cls) else x for x in args), **(kwargs or {}))


class _Videos:
    """~mask, of which only the number of samples is asked."""

    def __init__(self, count: int, device):
        self.count, self.device = count, device

    def nonzero(self) -> Tensor:
        return torch.empty(self.count, 1, dtype=torch.int64, device=self.device)
