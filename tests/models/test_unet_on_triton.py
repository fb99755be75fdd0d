"""A whole U-Net through the Triton kernels, on a GPU or in the interpreter: statistics handed from layer to layer, masks, and every
gradient."""

import pytest
import torch

from engine.config import UNetConfig
from engine.models.unet import VideoUNet

pytest.importorskip("triton")

COMMON = {"channels": 32, "channel_mults": (1,), "groups": 8, "head_dim": 32, "text_dim": 8, "context_dim": 8, "space_to_depth": 2}
CONFIGS = {"attention": UNetConfig(**COMMON, num_blocks=(1,), attention_levels=(0,), temporal="attention", max_frames=4),
           "conv": UNetConfig(**COMMON, num_blocks=(2,), attention_levels=(), lowres=True)}


def run(config, kernels, dtype, mask, monkeypatch, device):
    """Output and all gradients of one network, the same weights and inputs every time."""
    monkeypatch.setenv("DREAMIX_KERNELS", kernels)
    torch.manual_seed(0)
    network = VideoUNet(config)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.ndim > 1 else 0.3)
    network = network.to(device, dtype)
    B = len(mask)
    z, lowres = torch.randn(2, B, 3, 4, 6, 3, device=device)
    text, text_mask = torch.randn(B, 3, 8, device=device), torch.ones(B, 3, dtype=torch.bool, device=device)
    extra = {"lowres": lowres, "aug_level": torch.full((B,), 0.1, device=device)} if config.lowres else {}
    out = network(z, torch.full((B,), 0.4, device=device), text, text_mask, independent_frames=torch.tensor(mask, device=device), **extra)
    grads = torch.autograd.grad(out.square().mean(), list(network.parameters()), allow_unused=True, materialize_grads=True)
    return [out.detach(), *grads]


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_network_is_the_same_function(kind, monkeypatch, device):
    """fp32, a mixed batch: both kinds of samples, every parameter's gradient."""
    ours, want = (run(CONFIGS[kind], kernels, torch.float32, [False, True], monkeypatch, device) for kernels in ("triton", "torch"))
    for a, b in zip(ours, want):
        assert torch.allclose(a, b, rtol=0, atol=3e-5 * b.abs().max().item() + 1e-7), (a - b).abs().max() / b.abs().max()


def test_independent_frames_stay_apart_to_the_bit(monkeypatch, device):
    """A frame of a masked sample changes; no other frame's output does, whoever hands statistics to whom."""
    monkeypatch.setenv("DREAMIX_KERNELS", "triton")
    torch.manual_seed(0)
    network = VideoUNet(CONFIGS["conv"]).to(device).requires_grad_(False)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.ndim > 1 else 0.3)
    z, lowres = torch.randn(2, 1, 3, 4, 6, 3, device=device)
    rest = (torch.full((1,), 0.4, device=device), torch.randn(1, 2, 8, device=device), torch.ones(1, 2, dtype=torch.bool, device=device))
    mask = torch.tensor([True], device=device)

    def frames(z):
        return network(z, *rest, lowres=lowres, aug_level=torch.zeros(1, device=device), independent_frames=mask)[0]
    before = frames(z)
    z[0, 1] += 1
    differs = (frames(z) != before).flatten(1).any(1).tolist()
    assert differs == [False, True, False]
