"""Convolution over three frames, alone and as the block it is used in: x + conv(silu(groupnorm(x))), bypassed for independent frames."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks import foreign, peers
from benchmarks.harness import Peer
from benchmarks.layers import with_gradients
from benchmarks.stages import SPRITES, level, name
from dreamix_kernels import group_norm_silu, temporal_conv, temporal_conv_block

FP32, BF16 = torch.float32, torch.bfloat16


def weights(C, dtype, device):
    """norm weight and bias [C], convolution's weight [C, C, 3] and bias [C]"""
    shapes = (C,), (C,), (C, C, 3), (C,)
    scales = 1, 1, (3 * C) ** -0.5, 1
    return [peers.randn(*s, dtype=dtype, device=device, seed=7 + i, scale=scales[i]) for i, s in enumerate(shapes)]


def conv2d_view(x, weight, bias):
    """x [B, T, H, W, C] seen as a channels-last picture of height T and width H * W: no copies."""
    B, T, H, W, C = x.shape
    out = F.conv2d(x.view(B, T, H * W, C).permute(0, 3, 1, 2), weight[..., None], bias, padding=(1, 0))
    return out.permute(0, 2, 3, 1).view(B, T, H, W, -1)


def conv1d_permuted(x, weight, bias):
    """imagen-pytorch's way, without its causality: x [B, C, T, H, W], pixels into the batch, Conv1d, back."""
    B, C, T, H, W = x.shape
    out = F.conv1d(x.permute(0, 3, 4, 1, 2).reshape(-1, C, T), weight, bias, padding=1)
    return out.view(B, H, W, C, T).permute(0, 3, 4, 1, 2).contiguous()


def conv3d(x, weight, bias):
    return F.conv3d(x, weight[..., None, None], bias, padding=(1, 0, 0))


def floor(C, dtype):
    """Of the ratio to Conv3d on a CPU. From 128 channels on, fp32 is bound by multiply-adds: 2.5 cannot be won at 90 % of the processor's
    where Conv3d reaches half of them, as on a Xeon with AMX (0.156 and 0.082 of 0.17 TFLOP/s on one core, 16x24x40x128, torch 2.13). Two
    cores serve Conv3d better than twice one: 1.07 to 1.4 is left from 128 channels on, 1.75 at 64 (the same, two threads)."""
    if dtype is BF16:
        return 1.2
    alone = torch.get_num_threads() == 1
    return (1.1 if alone else 1.0) if C >= 128 else (2.0 if alone else 1.5)


PLAIN_SHAPES = {"c128": (1, 16, 24, 40, 128), "c64": (1, 16, 24, 40, 64), "c256": (2, 16, 12, 20, 256), "t8": (1, 8, 48, 80, 64)}
back = lambda out: out.permute(0, 2, 3, 4, 1)                          # noqa: E731


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", PLAIN_SHAPES.values(), ids=PLAIN_SHAPES)
def bench_cpu_plain(shape, dtype, cpu, measure):
    """The convolution alone, each formulation from memory in its own layout."""
    x, (_, _, weight, bias) = peers.randn(*shape, dtype=dtype, device=cpu), weights(shape[-1], dtype, cpu)
    view = x.permute(0, 4, 1, 2, 3)
    first = view.contiguous()
    assert view.is_contiguous(memory_format=torch.channels_last_3d)
    measure(f"tconv {name(shape)}", {
        "ours": lambda: temporal_conv(x, weight, bias), "conv3d": Peer(lambda: conv3d(first, weight, bias), back),
        "conv3d channels last": Peer(lambda: conv3d(view, weight, bias), back),
        "conv1d permuted": Peer(lambda: conv1d_permuted(first, weight, bias), back),
    }, reference=lambda: conv2d_view(*peers.wide(x, weight, bias)), dtype=dtype, shape=shape, flops=6 * x.numel() * shape[-1],
        floor={"conv3d": floor(shape[-1], dtype)}, goal={"conv3d": 2.5 if dtype is FP32 else 1.2})


def block(x, groups, norm_weight, norm_bias, weight, bias):
    """The definition, with the convolution as a view: the strongest formulation without kernels of one's own.   x [B, T, H, W, C]"""
    h = F.group_norm(x.flatten(0, 1).permute(0, 3, 1, 2), groups, norm_weight, norm_bias)
    h = F.silu(h).permute(0, 2, 3, 1).unflatten(0, x.shape[:2]).contiguous()
    return x + conv2d_view(h, weight, bias)


def block_conv3d(x, groups, norm_weight, norm_bias, weight, bias, batch):
    """diffusers' way, statistics per frame: pictures [B * T, C, H, W], Conv3d on a permuted view, and back."""
    h = F.silu(F.group_norm(x, groups, norm_weight, norm_bias))
    identity, h = (part.unflatten(0, (batch, -1)).permute(0, 2, 1, 3, 4) for part in (x, h))
    return (identity + conv3d(h, weight, bias)).permute(0, 2, 1, 3, 4).reshape(x.shape)


def block_channels_last_3d(x, groups, norm_weight, norm_bias, weight, bias):
    """x [B, T, H, W, C]: Conv3d on its view as channels_last_3d."""
    h = F.group_norm(x.flatten(0, 1).permute(0, 3, 1, 2), groups, norm_weight, norm_bias)
    h = F.silu(h).permute(0, 2, 3, 1).unflatten(0, x.shape[:2]).contiguous()
    return x + conv3d(h.permute(0, 4, 1, 2, 3), weight, bias).permute(0, 2, 3, 4, 1)


def frame_statistics(x, groups):
    """Mean and biased variance of each frame's groups, [B * T, groups, 2] in fp32, as the layer before would give them."""
    var, mean = torch.var_mean(x.flatten(0, 1).flatten(1, 2).unflatten(-1, (groups, -1)).float(), (1, 3), correction=0)
    return torch.stack([mean, var], -1)


def block_competitors(x, groups, own, compiled, **kwargs):
    B, given = len(x), foreign.frames(x)
    found = {
        "ours": lambda: temporal_conv_block(x, groups, *own, None, **kwargs)[0],
        "conv3d": Peer(lambda: block_conv3d(given, groups, *own, B), lambda out: out.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])),
        "conv3d channels last": lambda: block_channels_last_3d(x, groups, *own), "conv2d view": lambda: block(x, groups, *own)}
    if fast := compiled(block):
        found["compiled conv2d view"] = lambda: fast(x, groups, *own)
    return found


BLOCK_SHAPES = {"c128": ((1, 16, 24, 40, 128), 32)} | {
    f"sprites {stage}": ((1, *level(stage, 0, SPRITES)), 8) for stage in ("ssr1", "tsr2", "ssr3")}


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape, groups", BLOCK_SHAPES.values(), ids=BLOCK_SHAPES)
def bench_cpu_block(shape, groups, dtype, cpu, measure, compiled):
    x, own = peers.randn(*shape, dtype=dtype, device=cpu), weights(shape[-1], dtype, cpu)
    measure(f"tconv_block {name(shape)}", block_competitors(x, groups, own, compiled), dtype=dtype, shape=shape,
            reference=lambda: block(*peers.wide(x), groups, *peers.wide(*own)), flops=6 * x.numel() * shape[-1],
            floor={"conv3d": floor(shape[-1], dtype)} if groups == 32 else {}, goal={"conv3d": 2.5 if dtype is FP32 else 1.2})


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def bench_cpu_diffusers_layer(dtype, cpu, measure):
    """diffusers' TemporalConvLayer, the class itself: four times norm over the clip, SiLU, convolution; then the residual."""
    shape, groups = (1, 16, 24, 40, 128), 32
    x = peers.randn(*shape, dtype=dtype, device=cpu)
    layers = [[w + i * 0.01 for w in weights(shape[-1], dtype, cpu)] for i in range(4)]

    def ours():
        h = x
        for norm_weight, norm_bias, weight, bias in layers:
            clip = group_norm_silu(h.flatten(1, 2), groups, norm_weight, norm_bias)            # a picture of T * H rows: the clip
            h = temporal_conv(clip.view(shape), weight, bias)
        return x + h

    def definition():
        h = wide_x = peers.wide(x)[0].permute(0, 4, 1, 2, 3)
        for norm_weight, norm_bias, weight, bias in (peers.wide(*layer) for layer in layers):
            h = conv3d(F.silu(F.group_norm(h, groups, norm_weight, norm_bias)), weight, bias)
        return back(wide_x + h)
    measure("tconv diffusers TemporalConvLayer", {"ours": ours, "diffusers": foreign.diffusers_temporal_conv(x, layers, groups)},
            reference=definition, dtype=dtype, shape=shape, tolerance=None if dtype is FP32 else 2e-2,
            floor={"diffusers": floor(shape[-1], dtype)}, goal={"diffusers": 2.5 if dtype is FP32 else 1.2})


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def bench_cpu_imagen_layer(dtype, cpu, measure):
    """imagen-pytorch's Conv3d: a 3x3 convolution of every frame, a causal one over three frames. Ours sees one zero frame before them."""
    B, T, H, W, C = shape = (1, 16, 24, 40, 64)
    x, (_, _, weight, bias) = peers.randn(*shape, dtype=dtype, device=cpu), weights(C, dtype, cpu)
    spatial = peers.randn(C, C, 3, 3, dtype=dtype, device=cpu, seed=20, scale=(9 * C) ** -0.5)
    last = spatial.contiguous(memory_format=torch.channels_last)

    def run(x, spatial, weight, bias, conv):
        h = F.conv2d(x.flatten(0, 1).permute(0, 3, 1, 2), spatial, bias, padding=1).permute(0, 2, 3, 1).unflatten(0, (B, T))
        return conv(torch.cat([torch.zeros_like(h[:, :1]), h], 1), weight, bias)[:, :-1]
    measure("tconv imagen-pytorch Conv3d", {"ours": lambda: run(x, last, weight, bias, temporal_conv),
                                            "imagen-pytorch": foreign.imagen_conv(x, (spatial, bias), (weight, bias))},
            reference=lambda: run(*peers.wide(x, spatial, weight, bias), conv2d_view), dtype=dtype, shape=shape,
            goal={"imagen-pytorch": 1.5})


GPU_BLOCKS = {   # case -> shape, share of the bound to reach, ratio to the best formulation, to Conv3d
    "tconv_c128 ssr3 l0": ((1, *level("ssr3", 0)), 0.50, 1.8, 4.0), "tconv_c128 tsr3 l0": ((1, *level("tsr3", 0)), 0.50, 1.8, 4.0),
    "tconv_c256 ssr2 l0": ((1, *level("ssr2", 0)), 0.55, 1.5, 3.0), "tconv_c256 ssr3 l1": ((1, *level("ssr3", 1)), 0.55, 1.5, 3.0),
    "tconv_c384 ssr1 l0": ((1, *level("ssr1", 0)), 0.40, 1.1, 2.0), "tconv_c512 ssr2 l1": ((1, *level("ssr2", 1)), 0.40, 1.1, 1.5),
    "tconv_c1024 ssr3 l3": ((1, *level("ssr3", 3)), 0.40, 1.1, 1.2),
}


@pytest.mark.parametrize("case", GPU_BLOCKS)
def bench_gpu_block(case, gpu, measure, compiled):
    shape, share, view, conv = GPU_BLOCKS[case]
    x, own = peers.randn(*shape, dtype=BF16, device=gpu), weights(shape[-1], BF16, gpu)
    measure(case, block_competitors(x, 32, own, compiled, stats=frame_statistics(x, 32), next_groups=32), dtype=BF16, shape=shape,
            reference=lambda: block(*peers.wide(x), 32, *peers.wide(*own)), bytes_moved=2 * x.nbytes, flops=6 * x.numel() * shape[-1],
            floor={"conv3d": 1.0, "compiled conv2d view": 0.95}, goal={"roofline": share, "*conv2d view": view, "conv3d": conv})


@pytest.mark.parametrize("mask", [(False, True), (True, True)], ids=["mixed", "masked"])
def bench_gpu_bypass(mask, gpu, measure):
    """A batch of a clip and its frames as pictures, in place: the pictures cost nothing. Beside it: the clip alone.

    In place, every call works on the result of the one before; the norm keeps that bounded, and the first call is the one that is checked.
    """
    shape = (1, *level("ssr2", 0))
    x, own = peers.randn(2, *shape[1:], dtype=BF16, device=gpu), weights(shape[-1], BF16, gpu)
    alone, both, independent = x[:1].clone(), x.clone(), torch.tensor(mask, device=gpu)
    right = lambda: block(*peers.wide(x[:1]), 32, *peers.wide(*own))   # noqa: E731
    measure(f"tconv_bypass {name(map(int, mask))}", {
        "ours": lambda: temporal_conv_block(both, 32, *own, independent, inplace=True)[0],
        "ours, clip alone": Peer(lambda: temporal_conv_block(alone, 32, *own, None, inplace=True)[0], want=right),
    }, reference=lambda: x.float() if all(mask) else torch.cat([right(), x[1:].float()]), dtype=BF16, shape=both.shape,
        goal={"ours, clip alone": 20 if all(mask) else 1 / 1.03})


def backward_case(case, shape, groups, dtype, device, measure, compiled, **kwargs):
    x, dy = (peers.randn(*shape, dtype=dtype, device=device, seed=i).requires_grad_(i == 0) for i in range(2))
    module = torch.nn.ParameterList(weights(shape[-1], dtype, device))
    wide = torch.nn.ParameterList(peers.wide(*module))
    wide_x, wide_dy = peers.wide(x.detach(), dy)
    wide_x.requires_grad_()
    given, dgiven = foreign.frames(x.detach()).requires_grad_(), foreign.frames(dy)
    competitors = {
        "ours": with_gradients(lambda x: temporal_conv_block(x, groups, *module, None)[0], x, dy, module),
        "conv3d": Peer(with_gradients(lambda x: block_conv3d(x, groups, *module, shape[0]), given, dgiven, module), lambda out: [
            part.permute(0, 2, 3, 1).unflatten(0, shape[:2]) if part.shape == given.shape else part for part in out]),
        "conv2d view": with_gradients(lambda x: block(x, groups, *module), x, dy, module)}
    if fast := compiled(block):
        competitors["compiled conv2d view"] = with_gradients(lambda x: fast(x, groups, *module), x, dy, module)
    measure(case, competitors, reference=with_gradients(lambda x: block(x, groups, *wide), wide_x, wide_dy, wide), dtype=dtype, shape=shape,
            tolerance=None if dtype is FP32 else 1.5e-2, grad=True, flops=18 * x.numel() * shape[-1], **kwargs)


def bench_cpu_backward(cpu, measure, compiled):
    backward_case("tconv_fwd_bwd 16x24x40x128", (1, 16, 24, 40, 128), 32, FP32, cpu, measure, compiled, goal={"conv3d": 1.5})


@pytest.mark.parametrize("case, stage", [("tconv_bwd c128", ("tsr3", 0)), ("tconv_bwd c256", ("ssr2", 0))], ids=["c128", "c256"])
def bench_gpu_backward(case, stage, gpu, measure, compiled):
    backward_case(case, (1, *level(*stage)), 32, BF16, gpu, measure, compiled, floor={"conv3d": 1.0}, goal={"*conv2d view": 1.3})
