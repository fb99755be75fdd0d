"""What users run today instead of `dreamix_kernels`, each in its best layout; and how inputs are made."""

import torch
import torch.nn.functional as F
from torch import Tensor


def randn(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers that do not depend on the dtype's rounding or the format's memory."""
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    """Inputs of a reference: fp64 on a CPU, fp32 on a GPU, where the sizes are others."""
    return [x if x is None or not x.is_floating_point() else x.to(torch.float32 if x.is_cuda else torch.float64) for x in tensors]


def nchw(x: Tensor) -> Tensor:
    """[N, H, W, C] -> the same numbers in NCHW memory."""
    return x.permute(0, 3, 1, 2).contiguous()


def channels_last(x: Tensor) -> Tensor:
    """[N, H, W, C] -> a NCHW view of the same memory, as `Tensor.to(memory_format=torch.channels_last)` has it."""
    return x.permute(0, 3, 1, 2)


def group_norm_film_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, *,
                         inplace: bool = False) -> Tensor:
    """PyTorch's own ops in the order of every diffusion U-Net: x [N, C, H, W], either memory format; scale, shift [N, C]."""
    h = F.group_norm(x, groups, weight, bias)
    if scale is not None:
        gain, offset = 1 + scale[:, :, None, None], shift[:, :, None, None]
        h = h.mul_(gain).add_(offset) if inplace else h * gain + offset
    return F.silu(h, inplace=inplace)
