import pytest
import torch

from engine.models.norm import LayerNorm


@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-5), (torch.bfloat16, 0.01)], ids=str)
def test_parameters_learn_from_many_rows(dtype, allowed):
    """PyTorch's own is off by more than a tenth here in bf16 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(15360, 64, generator=generator).to(dtype) for _ in range(2))
    dy = dy + 0.1
    layer = LayerNorm(64).to(dtype)
    torch.nn.init.normal_(layer.weight, generator=generator)
    exact = torch.nn.LayerNorm(64).double()
    exact.load_state_dict(layer.state_dict())
    got = torch.autograd.grad(layer(x), [layer.weight, layer.bias], dy)
    want = torch.autograd.grad(exact(x.double()), [exact.weight, exact.bias], dy.double())
    for a, b in zip(got, want):
        assert (a - b).norm() < allowed * b.norm()


def test_inference_is_pytorchs():
    layer, x = LayerNorm(8).bfloat16(), torch.randn(3, 8).bfloat16()
    with torch.no_grad():
        assert torch.equal(layer(x), torch.nn.LayerNorm(8).bfloat16()(x))
    assert layer(x).dtype == torch.bfloat16
