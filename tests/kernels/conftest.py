"""How an op is judged: against its definition in fp64, allowed twice the error that PyTorch's own formulation makes in the op's format."""

import pytest
import torch


def gradients(op, inputs, seed):
    """(output, [gradient of every floating-point input]) for one fixed gradient of the output."""
    inputs = [x.detach().clone().requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs]
    out = op(*inputs)
    dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(out.dtype)
    leaves = [x for x in inputs if torch.is_tensor(x) and x.requires_grad]
    return out.detach(), list(torch.autograd.grad(out, leaves, dy, allow_unused=True, materialize_grads=True))


@pytest.fixture
def assert_matches():
    def check(op, reference, inputs, floor=2.0):
        """Output and every gradient, in the largest and in the mean error; `floor` roundings of the largest value are always allowed."""
        wide = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs]
        exact, dexact = gradients(reference, wide, 7)
        ours, dours = gradients(op, inputs, 7)
        theirs, dtheirs = gradients(reference, inputs, 7)
        for i, (want, got, peer) in enumerate(zip([exact, *dexact], [ours, *dours], [theirs, *dtheirs])):
            name = "output" if i == 0 else f"gradient {i - 1}"
            assert got.dtype == peer.dtype and got.shape == peer.shape, name
            unit = torch.finfo(got.dtype).eps * want.abs().max().item() / 2
            mine, others = (got.double() - want).abs(), (peer.double() - want).abs()
            for kind, summary, share in (("largest", torch.max, 1), ("mean", torch.mean, 0.1)):
                error, allowed = summary(mine).item(), 2 * summary(others).item() + floor * unit * share
                assert error <= allowed, f"{name}: {kind} error {error:.3g}, allowed {allowed:.3g}"
    return check


@pytest.fixture
def randn():
    """Normal numbers from a seed that counts up."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape, dtype=torch.float32: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
