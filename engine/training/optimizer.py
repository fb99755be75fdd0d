"""Muon for matrices, AdamW for the rest, on fp32 master weights of a model that computes in bf16; an average of the weights beside them.

At a learning rate of 6e-6 a bf16 weight rounds most updates away, so the masters are fp32 whatever the pass is in.
Muon: Jordan et al. 2024, with the update scale of Liu et al. 2025 (arXiv 2502.16982), which lets matrices of any shape share AdamW's rates.
"""

import torch
from torch import Tensor, nn


def orthogonalise(matrices: Tensor, iterations: int = 4) -> Tensor:
    """The nearest semi-orthogonal matrices, by a quintic Newton-Schulz iteration in bf16.   [N, rows, columns] -> same"""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.transpose(-1, -2) if tall else x
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).to(x.dtype)
    for _ in range(iterations):
        gram = x @ x.transpose(-1, -2)
        x = torch.baddbmm(a * x, torch.baddbmm(b * gram, gram, gram, alpha=c), x)
    return (x.transpose(-1, -2) if tall else x).to(matrices.dtype)


class MasterWeights:
    """The optimizer of one model: fp32 weights, their moments and their average; the model itself only receives copies.

    model: parameters in any dtype. Matrices inside the network go to Muon, grouped by shape; the stem, the head, biases, norms and
    tables go to AdamW. No weight decay: with it, weights that one loss leaves unused would shrink.
    """

    def __init__(self, model: nn.Module, ema: float, momentum: float = 0.95, betas: tuple[float, float] = (0.9, 0.99)):
        self.model, self.ema_decay, self.momentum, self.betas = model, ema, momentum, betas
        self.params = dict(model.named_parameters())
        self.master = {name: p.detach().float().clone() for name, p in self.params.items()}
        self.ema = {name: p.clone() for name, p in self.master.items()}
        self.first = {name: torch.zeros_like(p) for name, p in self.master.items()}
        self.second = {name: torch.zeros_like(p) for name, p in self.master.items() if not self.uses_muon(name, p)}
        self.groups: dict[tuple, list[str]] = {}
        for name, p in self.master.items():
            if self.uses_muon(name, p):
                self.groups.setdefault(tuple(p.flatten(1).shape), []).append(name)
        self.step_count = 0

    @staticmethod
    def uses_muon(name: str, p: Tensor) -> bool:
        return p.ndim >= 2 and not name.startswith(("stem", "head")) and "position_bias" not in name

    @torch.no_grad()
    def step(self, gradients: dict[str, Tensor], muon_lr: float, adam_lr: float) -> None:
        """One update from fp32 gradients; the model's parameters are refreshed from the masters."""
        self.step_count += 1
        for shape, names in self.groups.items():
            moments = []
            for name in names:
                moment = self.first[name].mul_(self.momentum).add_(gradients[name])
                moments.append(gradients[name].add(moment, alpha=self.momentum).view(shape))      # Nesterov
            updates = orthogonalise(torch.stack(moments))
            scale = 0.2 * max(shape) ** 0.5
            for name, update in zip(names, updates):
                self.master[name].sub_(update.view_as(self.master[name]), alpha=muon_lr * scale)
        beta1, beta2 = self.betas
        correct1, correct2 = 1 - beta1**self.step_count, 1 - beta2**self.step_count
        for name, second in self.second.items():
            first, gradient = self.first[name], gradients[name]
            first.lerp_(gradient, 1 - beta1)
            second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            self.master[name].addcdiv_(first / correct1, (second / correct2).sqrt_().add_(1e-8), value=-adam_lr)
        decay = min(self.ema_decay, (1 + self.step_count) / (10 + self.step_count))
        torch._foreach_lerp_(list(self.ema.values()), list(self.master.values()), 1 - decay)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        for name, p in self.params.items():
            p.copy_(self.master[name])

    def state_dict(self) -> dict[str, Tensor]:
        """All state as one flat dict of tensors, ready for safetensors."""
        out = {"step_count": torch.tensor(self.step_count)}
        for kind in ("master", "ema", "first", "second"):
            out |= {f"{kind}.{name}": value for name, value in getattr(self, kind).items()}
        return out

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.step_count = int(state["step_count"])
        for kind in ("master", "ema", "first", "second"):
            for name, value in getattr(self, kind).items():
                value.copy_(state[f"{kind}.{name}"])
        self.refresh()
