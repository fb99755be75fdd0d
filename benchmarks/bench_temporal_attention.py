"""Attention along time, one sequence of T frames a pixel. The bound is memory: q, k, v read once, the output written once."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import foreign, peers
from benchmarks.harness import Peer
from benchmarks.layers import attention_layer_case
from benchmarks.stages import SPRITES, level, name
from dreamix_kernels import temporal_attention_packed

FP32, BF16 = torch.float32, torch.bfloat16
BACKENDS = {"math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
            "cudnn": SDPBackend.CUDNN_ATTENTION}


def make(B, T, H, W, C, head_dim, dtype, device):
    """qkv as its linear gives it, [B, T, H, W, 3, heads, head_dim], and a bias of the learned kind."""
    heads = C // head_dim
    qkv = peers.randn(B, T, H, W, 3, heads, head_dim, dtype=dtype, device=device)
    return qkv, peers.randn(heads, T, T, dtype=dtype, device=device, seed=1)


def definition(qkv, bias, independent_frames=None):
    """Softmax attention over T in the inputs' own format, sample by sample; an independent sample takes its values."""
    outs = []
    for i, sample in enumerate(qkv.unbind(0)):
        q, k, v = sample.flatten(1, 2).permute(2, 1, 3, 0, 4)                                  # [P, heads, T, d] each
        scores = q @ k.transpose(-1, -2) * q.shape[-1]**-0.5 + bias
        own = v if independent_frames is not None and independent_frames[i] else torch.softmax(scores, -1) @ v
        outs.append(own.permute(2, 0, 1, 3).unflatten(1, sample.shape[1:3]))
    return torch.stack(outs)


def attn_mask(bias, independent_frames, sample):
    """[1, heads, T, T]: the bias, and for an independent sample -inf off the diagonal, which is how SDPA is told of a mask of frames."""
    if independent_frames is None or not independent_frames[sample]:
        return bias[None]
    return bias[None].masked_fill(~torch.eye(bias.shape[-1], dtype=torch.bool, device=bias.device), float("-inf"))


def sdpa_strided(qkv, masks, backend):
    """No copies: one call a sample on views [P, heads, T, d]; the outputs as they come."""
    def run():
        with sdpa_kernel(backend):
            return [F.scaled_dot_product_attention(*sample.flatten(1, 2).permute(2, 1, 3, 0, 4), attn_mask=mask)
                    for sample, mask in zip(qkv.unbind(0), masks)]
    return Peer(run, lambda outs: torch.stack([out.permute(2, 0, 1, 3).unflatten(1, qkv.shape[2:4]) for out in outs]))


def diffusers_layout(qkv, masks, independent_frames):
    """Its two copies around SDPA's own choice of backend: pictures [B * T, C, H, W] to sequences [B * H * W, T, C] before the linear (whose
    result is given here), and back. The pictures' numbers are any: only their copy is timed."""
    B, T, H, W, _, heads, d = qkv.shape
    pictures = qkv[..., 0, :, :].flatten(-2).permute(0, 1, 4, 2, 3).contiguous()
    sequences = qkv.permute(0, 2, 3, 1, 4, 5, 6).reshape(B * H * W, T, 3, heads, d)

    def run():
        pictures.permute(0, 3, 4, 1, 2).reshape(B * H * W, T, heads * d)
        q, k, v = (part.transpose(1, 2) for part in sequences.unbind(2))
        mask = masks[0] if independent_frames is None else torch.cat(masks).repeat_interleave(H * W, 0)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(B, H, W, T, heads * d)
        return out.permute(0, 3, 4, 1, 2).contiguous()
    return Peer(run, lambda out: out.permute(0, 1, 3, 4, 2).unflatten(-1, (heads, d)))


def sdpa_permuted(qkv, masks, independent_frames):
    """From videos with channels last: pixels into the batch by a copy of q, k and v, SDPA, a copy back."""
    B, T, H, W, _, heads, d = qkv.shape

    def run():
        q, k, v = qkv.permute(4, 0, 2, 3, 5, 1, 6).reshape(3, B * H * W, heads, T, d)
        mask = masks[0] if independent_frames is None else torch.cat(masks).repeat_interleave(H * W, 0)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.view(B, H, W, heads, T, d).permute(0, 4, 1, 2, 3, 5).contiguous()
    return run


def competitors(qkv, bias, independent_frames=None, compiled=lambda f: None):
    mask = None if independent_frames is None else torch.tensor(independent_frames, device=qkv.device)
    masks = [attn_mask(bias, independent_frames, i) if bias.any() else None for i in range(len(qkv))]
    found = {"ours": lambda: temporal_attention_packed(qkv, bias, mask),
             "diffusers' layout": diffusers_layout(qkv, masks, independent_frames),
             "permute+sdpa+permute": sdpa_permuted(qkv, masks, independent_frames)}
    if not qkv.is_cuda:                                    # the engine's own layer lays a pixel's frames side by side on the CPU
        first = qkv.permute(0, 2, 3, 1, 4, 5, 6).contiguous().permute(0, 3, 1, 2, 4, 5, 6)
        found["ours, pixels first"] = lambda: temporal_attention_packed(first, bias, mask)
    for word, backend in BACKENDS.items():
        if qkv.is_cuda or word in ("math", "flash"):
            found[f"sdpa {word} strided"] = sdpa_strided(qkv, masks, backend)
    if qkv.is_cuda and not bias.any():
        found["xformers block diagonal"] = foreign.xformers_block_diagonal(qkv)
    if fast := compiled(definition):
        found["compiled"] = lambda: fast(qkv, bias, independent_frames)
    return found


def judge(case, shape, head_dim, dtype, device, measure, compiled=lambda f: None, independent_frames=None, extra=None, zero=False,
          **kwargs):
    B, T, H, W, C = shape
    qkv, bias = make(*shape, head_dim, dtype, device)
    bias.mul_(not zero)
    everyone = competitors(qkv, bias, independent_frames, compiled) | (extra(qkv, bias) if extra else {})
    measure(case, everyone, reference=lambda: definition(*peers.wide(qkv, bias), independent_frames), dtype=dtype, shape=shape,
            flops=4 * B * H * W * T * T * C, **({"bytes_moved": 4 * qkv[..., 0, :, :].nbytes} | kwargs))


CPU_SHAPES = {"c128": ((1, 16, 24, 40, 128), 64), "c64": ((2, 16, 12, 20, 64), 32), "c256": ((2, 16, 12, 20, 256), 64)} | {
    f"sprites base l{n}": ((1, *level("base", n, SPRITES)), 32) for n in range(3)}


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CPU_SHAPES)
def bench_cpu(case, dtype, cpu, measure, compiled):
    shape, head_dim = CPU_SHAPES[case]
    judge(f"tattn {name(shape)}", shape, head_dim, dtype, cpu, measure, compiled,
          floor={} if "sprites" in case else {"diffusers' layout": 1.8}, goal={"diffusers' layout": 2.5 if dtype is FP32 else 3.0})


@pytest.mark.parametrize("dtype, backward", [(FP32, False), (BF16, False), (FP32, True)], ids=["fp32-fwd", "bf16-fwd", "fp32-fwd_bwd"])
def bench_cpu_layer(dtype, backward, cpu, measure, compiled):
    """The whole layer: the linears around the core are the same for everyone.

    No bf16 backward: PyTorch's own LayerNorm gives its weight a gradient that is off by 13 % there (15360 rows of 128, torch 2.13).
    """
    attention_layer_case("tattn_layer 16x24x40x128", (1, 16, 24, 40, 128), 64, dtype, cpu, measure, compiled, backward, bias=False,
                         goal={"eager": 1.0, "diffusers": 1.0})


GPU_CORE = {"tattn_core_base_l0": (0, 0.80, 1.8, 3.0), "tattn_core_base_l1": (1, 0.70, 1.5, 2.5), "tattn_core_base_l2": (2, 0.70, 1.5, 2.5)}


@pytest.mark.parametrize("case", GPU_CORE)
def bench_gpu_core(case, gpu, measure, compiled):
    n, share, strided, permuted = GPU_CORE[case]
    judge(case, (2, *level("base", n)), 64, BF16, gpu, measure, compiled, floor={"diffusers' layout": 1.0},
          goal={"roofline": share, "sdpa * strided": strided, "diffusers' layout": permuted})


def bench_gpu_core_without_bias(gpu, measure, compiled):
    """No bias of positions: SDPA's flash kernel and xformers' block-diagonal mask can take part."""
    judge("tattn_core_base_l0 no bias", (2, *level("base", 0)), 64, BF16, gpu, measure, compiled, zero=True, goal={"sdpa * strided": 1.8})


@pytest.mark.parametrize("T", [32, 128])
def bench_gpu_core_longer(T, gpu, measure, compiled):
    judge(f"tattn_core T{T}", (1, T, 24, 40, 512), 64, BF16, gpu, measure, compiled, goal={"sdpa * strided": 1.5})


@pytest.mark.parametrize("mask", [(False, True), (True, True)], ids=["mixed", "masked"])
def bench_gpu_masked(mask, gpu, measure):
    """Independent samples take their values: half the bytes, and no scores. Beside them: the same batch without a mask."""
    def unmasked(qkv, bias):
        return {"ours unmasked": Peer(lambda: temporal_attention_packed(qkv, bias, None), want=lambda: definition(*peers.wide(qkv, bias)))}
    shape = (2, *level("base", 0))
    sample_bytes = 2 * shape[1] * shape[2] * shape[3] * shape[4]
    judge(f"tattn_masked {name(map(int, mask))}", shape, 64, BF16, gpu, measure, independent_frames=mask, extra=unmasked,
          bytes_moved=sum(2 if independent else 4 for independent in mask) * sample_bytes,
          goal={"ours unmasked": 1 / 0.55} if all(mask) else {"ours unmasked": 1.2})


def bench_gpu_many_sequences(gpu, measure):
    """More than 65,536 pixels in a batch, where SDPA's and xformers' kernels refuse the permuted layout."""
    judge("tattn_76800_pixels", (5, 16, 96, 160, 64), 64, BF16, gpu, measure)


@pytest.mark.parametrize("backward", [False, True], ids=["fwd", "fwd_bwd"])
def bench_gpu_layer(backward, gpu, measure, compiled):
    """The whole layer at base level 0: norm, projections, core, residual."""
    attention_layer_case("tattn_layer_base_l0", (2, *level("base", 0)), 64, BF16, gpu, measure, compiled, backward,
                         goal={"compiled": 1.2, "eager": 1.5})
