"""xformers as a backend of spatial attention: offered on import, tried where SDPA fails, and judged there by its numbers."""

import contextlib
import io
import warnings

import torch
from torch import Tensor

from dreamix_kernels.attention import add_backend


def xformers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of q [N, h, P, d] over k, v [N, h, S, d]; mask bool [N, 1, 1, S] or None -> like q.

    The package is imported here, at the first call, which is a probe: it imports well beside a torch it was not built for, and then
    refuses.
    """
    if not q.is_cuda:
        raise RuntimeError("its operators are for GPUs")
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        from xformers.ops import memory_efficient_attention
    if mask is not None:
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, float("-inf")).expand(*q.shape[:3], -1)
    return memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_bias=mask).transpose(1, 2)


add_backend("xformers", xformers)
