import pytest
import torch

from dreamix_kernels import group_norm_silu
from dreamix_kernels.group_norm_silu import group_norm_silu_reference

SHAPES = [((1, 1, 1, 2), 1), ((3, 1, 1, 8), 2), ((2, 3, 5, 24), 8), ((5, 7, 9, 30), 5), ((4, 12, 20, 96), 8), ((2, 48, 80, 16), 16)]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True, params=["auto", "torch"])
def implementation(request, monkeypatch):
    """What the machine's own kernels compute, and PyTorch's formulation alone."""
    monkeypatch.setenv("DREAMIX_KERNELS", request.param)


def inputs(randn, shape, groups, dtype, film=True, mean=0.0):
    N, C = shape[0], shape[-1]
    x = (randn(*shape) + mean).to(dtype)
    scale, shift = (randn(N, C, dtype=dtype), randn(N, C, dtype=dtype)) if film else (None, None)
    return [x, groups, randn(C, dtype=dtype), randn(C, dtype=dtype), scale, shift]


@pytest.mark.parametrize("film", [False, True], ids=["plain", "film"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, groups", SHAPES, ids=str)
def test_matches_reference(shape, groups, dtype, film, randn, assert_matches):
    assert_matches(group_norm_silu, group_norm_silu_reference, inputs(randn, shape, groups, dtype, film))


@pytest.mark.parametrize("film", [False, True], ids=["plain", "film"])
def test_gradients_in_fp64(film, randn):
    x, groups, *rest = inputs(randn, (3, 2, 3, 6), 2, torch.float64, film)
    rest = [r.requires_grad_() for r in rest if r is not None]
    assert torch.autograd.gradcheck(lambda x, *rest: group_norm_silu(x, groups, *rest), (x.requires_grad_(), *rest))


def test_fp64_is_computed_in_fp64(randn):
    args = inputs(randn, (2, 5, 7, 12), 3, torch.float64)
    assert (group_norm_silu(*args) - group_norm_silu_reference(*args)).abs().max() < 1e-13


@pytest.mark.parametrize("mean", [1000.0, -3e4])
def test_large_means_keep_their_digits(mean, randn, assert_matches):
    """No worse than twice PyTorch's two-pass statistics; a variance as E[x^2] - E[x]^2 would be orders worse."""
    assert_matches(group_norm_silu, group_norm_silu_reference, inputs(randn, (3, 24, 40, 16), 4, torch.float32, mean=mean))


def test_large_means_have_right_gradients(randn, assert_matches):
    assert_matches(group_norm_silu, group_norm_silu_reference, inputs(randn, (3, 12, 20, 16), 4, torch.float32, mean=1000.0))


def test_bf16_weights_the_mean_in_fp32(randn, assert_matches):
    """A folded offset of -mean / std rounded to bf16 would shift whole channels by 2^-9 of it."""
    assert_matches(group_norm_silu, group_norm_silu_reference, inputs(randn, (3, 12, 20, 16), 4, torch.bfloat16, film=False, mean=30.0))


def test_constant_frames_are_finite(randn):
    x = torch.full((2, 3, 4, 8), 5.0, requires_grad=True)
    out = group_norm_silu(x, 2, torch.ones(8), torch.zeros(8))
    out.sum().backward()
    assert out.abs().max() < 1e-5 and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frames_are_normalised_alone(dtype, randn, monkeypatch):
    """Whatever the number of frames beside it, and however many are taken at a time, a frame's bits and gradients are its own."""
    x, groups, weight, bias, scale, shift = inputs(randn, (7, 5, 6, 24), 8, dtype)

    def run(n):
        frames = x[n].clone().requires_grad_()
        out = group_norm_silu(frames, groups, weight, bias, scale[n], shift[n])
        return out.detach(), torch.autograd.grad(out.float().square().sum(), frames)[0]

    whole = run(slice(None))
    for n in range(7):
        for a, b in zip(whole, run(slice(n, n + 1))):
            assert torch.equal(a[n], b[0])
    # the module, not the function of the same name that the package exports
    import importlib
    monkeypatch.setattr(importlib.import_module("dreamix_kernels.group_norm_silu"), "CHUNK_ELEMENTS", 2 * 5 * 6 * 24)
    assert all(torch.equal(a, b) for a, b in zip(whole, run(slice(None))))


def test_a_nan_stays_in_its_frame(randn):
    args = inputs(randn, (4, 5, 6, 8), 2, torch.float32)
    clean = group_norm_silu(*args)
    args[0][2, 0, 0, 0] = float("nan")
    dirty = group_norm_silu(*args)
    keep = [0, 1, 3]
    assert torch.equal(dirty[keep], clean[keep]) and dirty[2].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_twice(dtype, randn):
    args = inputs(randn, (4, 12, 20, 24), 8, dtype)
    x = args[0].requires_grad_()

    def run():
        out = group_norm_silu(*args)
        return out.detach(), torch.autograd.grad(out.float().sum(), x)[0]

    assert all(torch.equal(a, b) for a, b in zip(run(), run()))


def test_strided_input_and_gradient(randn, assert_matches):
    """Half of a wider tensor, as a skip connection is, and a gradient that is expanded rather than stored."""
    wide = randn(3, 4, 5, 16)
    x = wide[..., :8].requires_grad_()
    out = group_norm_silu(x, 2, torch.ones(8), torch.zeros(8))
    assert torch.equal(out, group_norm_silu(x.detach().contiguous(), 2, torch.ones(8), torch.zeros(8)))
    (got,) = torch.autograd.grad(out.sum(), x)
    (want,) = torch.autograd.grad(group_norm_silu_reference(x, 2, torch.ones(8), torch.zeros(8)).sum(), x)
    assert torch.allclose(got, want, atol=1e-6)


def test_refusals(randn):
    x, _, weight, bias, scale, shift = inputs(randn, (2, 3, 4, 8), 2, torch.float32)
    with pytest.raises(ValueError, match="groups: want a divisor of C = 8, got 3"):
        group_norm_silu(x, 3, weight, bias)
    with pytest.raises(ValueError, match=r"scale, shift: want \[N, C\] = \[2, 8\], got \[1, 8\]"):
        group_norm_silu(x, 2, weight, bias, scale[:1], shift)
    with pytest.raises(ValueError, match="scale, shift: want both"):
        group_norm_silu(x, 2, weight, bias, scale)
    with pytest.raises(ValueError, match=r"weight, bias: want \[8\]"):
        group_norm_silu(x, 2, weight[:4], bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_on_any_number_of_threads(dtype, randn):
    """Shares that end inside a vector, and channels that no vector divides."""
    args = inputs(randn, (11, 12, 20, 30), 5, dtype)
    x, dy, threads, runs = args[0].requires_grad_(), randn(11, 12, 20, 30, dtype=dtype), torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            out = group_norm_silu(*args)
            runs.append((out.detach(), *torch.autograd.grad(out, x, dy)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))
