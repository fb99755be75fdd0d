"""LayerNorm whose gradients can be trusted in bf16 on the CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm`; trained in bf16 on the CPU it computes in fp32, where PyTorch would sum the parameters' gradients over all rows in
    bf16.

    Off by 13 and 17 % for weight and bias at 15360 rows of 128 (torch 2.13).   x [..., C] -> same
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.dtype == torch.bfloat16 and torch.is_grad_enabled():
            return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)
        return super().forward(x)
