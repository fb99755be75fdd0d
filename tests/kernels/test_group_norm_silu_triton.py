"""The Triton GroupNorm-FiLM-SiLU and its statistics, by their own entry points: on the GPU where there is one, else interpreted."""

import pytest
import torch

pytest.importorskip("triton")

from dreamix_kernels import group_norm_silu_triton as gn  # noqa: E402
from dreamix_kernels.group_norm_silu import group_norm_silu_reference  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5
# N, P, C, groups, FiLM or not: one number per group; groups of 1, 3, 12, 24, 32, 50; several parts, the last one ragged; blocks of channels
# that C fills and does not; the stages' widths, with few pixels
CASES = [(1, 5, 1, 1, True), (3, 1, 8, 2, True), (2, 39, 3, 1, False), (1, 35, 32, 32, True), (3, 35, 12, 4, True), (2, 35, 48, 2, False),
         (2, 35, 48, 2, True), (2, 1100, 24, 2, True), (1, 7, 96, 8, True), (2, 9, 200, 4, False), (1, 70, 192, 6, True),
         (1, 20, 384, 16, True), (1, 6, 1024, 32, False)]


def op(x, groups, weight, bias, scale, shift):
    return gn.group_norm_silu(x, groups, weight, bias, scale, shift, EPS, None)


def reference(x, groups, weight, bias, scale, shift):
    return group_norm_silu_reference(x[:, None], groups, weight, bias, scale, shift, EPS)[:, 0]


def make(randn, device, shape, dtype=torch.float32, film=True, mean=0.0):
    N, P, C, groups = shape
    x = (randn(N, P, C) + mean).to(device, dtype)
    scale, shift = (randn(N, C, dtype=dtype, device=device) for _ in range(2)) if film else (None, None)
    return [x, groups, randn(C, dtype=dtype, device=device), randn(C, dtype=dtype, device=device), scale, shift]


def exact_statistics(x, groups):
    """In fp64.   x [N, P, C] -> [N, groups, 2]"""
    var, mean = torch.var_mean(x.double().unflatten(-1, (groups, -1)), (1, 3), correction=0)
    return torch.stack((mean, var), -1)


def assert_statistics(got, x, groups, roundings=8):
    """Both to so many roundings of their format; and where the mean is large, what rounding the parts' means moves the variance by."""
    want, eps = exact_statistics(x, groups), torch.finfo(torch.float32).eps
    assert got.dtype == torch.float32 and got.shape == want.shape
    (mean, var), (mean_error, var_error) = want.unbind(-1), (got.double() - want).abs().unbind(-1)
    assert (mean_error <= 2 * eps * (mean.abs() + var.sqrt())).all()
    assert (var_error <= eps * (roundings * var + mean.abs() * var.sqrt())).all()


def run(x, groups, weight, bias, scale, shift, dy):
    """Output, dx, dscale and dshift: what belongs to a frame."""
    stats = gn.frame_statistics(x, groups)
    dx, _, _, dscale, dshift = gn.backward(x, dy, stats, groups, weight, bias, scale, shift, EPS)
    return op(x, groups, weight, bias, scale, shift), stats, dx, dscale, dshift


@pytest.mark.parametrize("case, dtype", [(c, d) for c in CASES for d in DTYPES if d != torch.float16 or c[1] == 35], ids=str)
def test_matches_reference(case, dtype, randn, device, assert_matches, poisoned):
    assert_matches(op, reference, make(randn, device, case[:-1], dtype, case[-1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 5, 1, 1), (3, 1, 8, 2), (2, 1100, 24, 8), (2, 9, 200, 4), (1, 6, 1024, 2)], ids=str)
def test_statistics(shape, dtype, randn, device, poisoned):
    x = make(randn, device, shape, dtype, mean=0.5)[0]
    assert_statistics(gn.frame_statistics(x, shape[-1]), x, shape[-1])


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of few pixels: every loop over parts, entries of a merge and channels of a group goes round more than once, and ends ragged."""
    monkeypatch.setattr(gn, "WALKS", {"statistics": (256, 8, 1), "apply": (256, 8, 1), "gradient_partials": (256, 8, 1),
                                      "gradient_x": (256, 8, 1)})
    monkeypatch.setattr(gn, "FEWEST_PER_PROGRAM", 256)


@pytest.mark.parametrize("shape", [(1, 67, 128, 1), (2, 9, 160, 2)], ids=str)
def test_many_small_parts(shape, randn, device, assert_matches, poisoned, small_parts):
    args = make(randn, device, shape)
    assert_matches(op, reference, args)
    assert_statistics(gn.frame_statistics(args[0], shape[-1]), args[0], shape[-1])


def test_parameters_over_many_frames(randn, device, assert_matches, poisoned):
    assert_matches(op, reference, make(randn, device, (33, 2, 40, 1)))


@pytest.mark.parametrize("film", [False, True], ids=["plain", "film"])
def test_mixed_precision(film, randn, device, assert_matches):
    """fp32 weights beside bf16 activations, as autocast leaves them; each gradient in its own format."""
    x, groups, weight, bias, scale, shift = make(randn, device, (2, 35, 24, 8), torch.bfloat16, film)

    def wide(x, groups, weight, bias, scale, shift):
        h = reference(x.to(weight.dtype), groups, weight, bias, *(None if s is None else s.to(weight.dtype) for s in (scale, shift)))
        return h.to(x.dtype)
    assert_matches(op, wide, [x, groups, weight.float(), bias.float(), scale, shift])


@pytest.mark.parametrize("mean", [1000.0, -3e4])
def test_statistics_far_from_zero(mean, randn, device):
    """E[x^2] - E[x]^2 would have lost every digit of the variance. The mean's own rounding is all that is lost."""
    for shape in ((2, 1100, 24, 2), (1, 20, 384, 16), (2, 1, 8, 2)):
        x = make(randn, device, shape, mean=mean)[0]
        assert_statistics(gn.frame_statistics(x, shape[-1]), x, shape[-1])
    x = make(randn, device, (1, 500, 24, 2), mean=mean)[0]
    x[:, :8] = 0                       # a black edge: the pixels that the sums are taken around are far from all others
    assert_statistics(gn.frame_statistics(x, 2), x, 2, roundings=500 / 4)


@pytest.mark.parametrize("shape", [(2, 1100, 24, 2), (1, 20, 384, 16)], ids=str)
def test_large_means_keep_pytorchs_digits(shape, randn, device, assert_matches):
    assert_matches(op, reference, make(randn, device, shape, mean=1000.0))


def test_constant_frames_are_finite(randn, device):
    x, groups, weight, bias, scale, shift = make(randn, device, (2, 12, 8, 2))
    x = torch.full_like(x, 5.0)
    y, stats, dx, dscale, _ = run(x, groups, weight, bias, scale, shift, torch.ones_like(x))
    want = torch.nn.functional.silu(bias * (1 + scale) + shift)
    assert torch.equal(stats[..., 1], torch.zeros_like(stats[..., 1]))
    assert torch.allclose(y, want[:, None].expand_as(y), atol=1e-3)            # 1 / sqrt(eps) makes 1,581 of 5, before it goes again
    assert dx.isfinite().all() and dscale.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stats_given_are_stats_computed(dtype, randn, device):
    x, groups, *rest = make(randn, device, (2, 130, 48, 4), dtype)
    x.requires_grad_()
    stats = gn.frame_statistics(x.detach(), groups)
    results = []
    for given in (None, stats):
        y = gn.group_norm_silu(x, groups, *rest, EPS, given)
        results.append((y.detach(), torch.autograd.grad(y.float().square().sum(), x)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_given_stats_are_used(randn, device):
    """Not x's own: where they were really read, the output is another."""
    x, groups, weight, bias, *_ = make(randn, device, (2, 35, 24, 8))
    stats = torch.stack((torch.zeros(2, 8), torch.full((2, 8), 4.0 - EPS)), -1).to(device)
    y = gn.group_norm_silu(x, groups, weight, bias, None, None, EPS, stats)
    assert torch.allclose(y, torch.nn.functional.silu(x / 2 * weight + bias), atol=1e-6)


@pytest.mark.parametrize("dtype, film", [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_fold(film, dtype, randn, device, poisoned):
    """Its gain and offset are the op; of a wide C, every block of channels."""
    for shape in ((2, 35, 24, 2), (1, 5, 600, 4)):
        x, groups, *rest = make(randn, device, shape, dtype, film)
        gain, offset = gn.fold(gn.frame_statistics(x, groups), groups, *rest, EPS)
        assert gain.dtype == offset.dtype == torch.float32 and gain.shape == offset.shape == (x.shape[0], x.shape[2])
        exact = reference(*(a.double() if torch.is_tensor(a) else a for a in (x, groups, *rest)))
        folded = torch.nn.functional.silu(x.float() * gain[:, None] + offset[:, None])
        assert (folded.double() - exact).abs().max() < 2e-5


def test_eps_is_read(randn, device):
    x, groups, *rest = make(randn, device, (2, 35, 24, 8))
    y = gn.group_norm_silu(x, groups, *rest, 0.5, None)
    assert torch.allclose(y, group_norm_silu_reference(x[:, None], groups, *rest, 0.5)[:, 0], atol=1e-5)


@pytest.mark.parametrize("P, pixels_per_part, C, groups", [(23, 5, 24, 8), (23, 5, 24, 24), (16, 4, 48, 4), (1, 1, 3, 1), (3, 8, 96, 8),
                                                           (301, 1, 32, 2)])
@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_merge_statistics(P, pixels_per_part, C, groups, mean, randn, device, poisoned):
    """Parts of one frame, the last one smaller, of channels with means far apart; 4,816 entries are more than one step."""
    x = randn(2, P, C, device=device) * 3 + mean + 10 * randn(C, device=device)
    parts = [x[:, p : p + pixels_per_part].double() for p in range(0, P, pixels_per_part)]
    partials = torch.stack([torch.stack((c.mean(1), c.var(1, correction=0) * c.shape[1]), -1) for c in parts], 1).float()
    assert partials.shape == (2, len(parts), C, 2)
    assert_statistics(gn.merge_statistics(partials, pixels_per_part, P, groups), x, groups)


@pytest.mark.parametrize("dtype, film", [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)], ids=str)
def test_backward_adds_another_gradient(dtype, film, randn, device, assert_matches, poisoned):
    """x + op(x): the identity's gradient joins in the last pass."""
    class Residual(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, groups, *rest):
            ctx.groups, ctx.rest = groups, rest
            ctx.save_for_backward(x)
            return x + op(x, groups, *rest)

        @staticmethod
        def backward(ctx, dy):
            (x,) = ctx.saved_tensors
            dx, *others = gn.backward(x, dy, gn.frame_statistics(x, ctx.groups), ctx.groups, *ctx.rest, EPS, add=dy)
            return dx, None, *others

    assert_matches(Residual.apply, lambda x, *rest: x + reference(x, *rest), make(randn, device, (2, 75, 40, 4), dtype, film))


def test_scale_and_shift_are_halves(randn, device, dtype=torch.bfloat16):
    """Halves of one projection, and one row for all frames: read where they are."""
    x, groups, weight, bias, *_ = make(randn, device, (2, 35, 24, 2), dtype)
    halves, dy = randn(2, 48, dtype=dtype, device=device).chunk(2, -1), torch.ones_like(x)
    for scale, shift in (halves, [h[:1].expand(2, -1) for h in halves], [h.T.contiguous().T for h in halves]):
        apart = run(x, groups, weight, bias, scale, shift, dy)
        assert all(torch.equal(a, b) for a, b in zip(apart, run(x, groups, weight, bias, scale.contiguous(), shift.contiguous(), dy)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 1, 8, 2), (2, 1100, 24, 8), (2, 9, 200, 4)], ids=str)
def test_add_statistics(shape, dtype, randn, device, poisoned):
    """The sum as PyTorch rounds it, and the statistics that a pass over it would find, to the bit."""
    N, P, C, groups = shape
    a, b = (randn(N, P, C, dtype=dtype, device=device).requires_grad_() for _ in range(2))
    total, stats = gn.add_statistics(a, b, groups)
    assert torch.equal(total, a + b) and torch.equal(stats, gn.frame_statistics((a + b).detach(), groups))
    assert total.requires_grad and not stats.requires_grad
    dy = randn(N, P, C, dtype=dtype, device=device)
    assert all(torch.equal(d, dy) for d in torch.autograd.grad(total, (a, b), dy))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_through_a_sum_and_its_statistics(dtype, randn, device, assert_matches):
    """The statistics are a cache: the gradient flows as if they had been computed from the sum."""
    def chained(a, b, groups, *rest):
        total, stats = gn.add_statistics(a, b, groups)
        return gn.group_norm_silu(total, groups, *rest, EPS, stats)

    x, *rest = make(randn, device, (2, 35, 24, 8), dtype)
    assert_matches(chained, lambda a, b, *rest: reference(a + b, *rest), [x, randn(*x.shape, dtype=dtype, device=device), *rest])


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_frames_are_normalised_alone(dtype, randn, device):
    """A frame that changes, to numbers or to NaN, changes no bit of another's output, statistics and gradients; nor does its absence."""
    x, groups, weight, bias, scale, shift = make(randn, device, (3, 70, 24, 2), dtype)
    dy = randn(*x.shape, dtype=dtype, device=device)
    whole = run(x, groups, weight, bias, scale, shift, dy)
    for j, value in ((0, 3.0), (1, float("nan"))):
        changed, others = x.clone(), [n for n in range(3) if n != j]
        changed[j, 5:] *= value
        after = run(changed, groups, weight, bias, scale, shift, dy)
        assert all(torch.equal(a[others], b[others]) for a, b in zip(whole, after))
        assert all(not torch.equal(a[j], b[j]) for a, b in zip(whole[:3], after))
    for n in (0, 2):
        alone = run(x[n : n + 1], groups, weight, bias, scale[n : n + 1], shift[n : n + 1], dy[n : n + 1])
        assert all(torch.equal(a[n], b[0]) for a, b in zip(whole, alone))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_same_bits_twice(dtype, randn, device):
    args = make(randn, device, (2, 1100, 24, 2), dtype)
    dy = randn(2, 1100, 24, dtype=dtype, device=device)

    def once():
        stats = gn.frame_statistics(args[0], args[1])
        return op(*args), stats, *gn.backward(args[0], dy, stats, *args[1:], EPS)
    assert all(torch.equal(a, b) for a, b in zip(once(), once()))


@pytest.mark.parametrize("shape", [(2, 63, 3, 3), (2, 9, 200, 4), (2, 1100, 24, 2)], ids=str)
def test_nothing_beside_the_tensors_is_read(shape, randn, device):
    """Every input lies between NaNs; only their own numbers come in."""
    def between(t):
        wide = torch.full((t.numel() + 4096,), float("nan"), dtype=t.dtype, device=t.device)
        wide[2048:-2048] = t.flatten()
        return wide[2048:-2048].view(t.shape)

    args = make(randn, device, shape)
    args.append(randn(*args[0].shape, device=device))
    moved = [between(a) if torch.is_tensor(a) else a for a in args]
    assert all(torch.equal(a, b) for a, b in zip(run(*args), run(*moved)))
    sums = [gn.add_statistics(a[0], a[-1], a[1]) for a in (args, moved)]
    assert all(torch.equal(a, b) for a, b in zip(*sums))


def test_configurations_know_nothing_of_the_number_of_frames():
    """And cut each stage's frames into enough parts for one frame to fill a GPU, no part above what the widest needs."""
    for kind in gn.WALKS:
        pixels_per_part, chosen = gn.config(kind, 384 * 640, 128)
        assert pixels_per_part % chosen["BLOCK_P"] == 0 and 384 * 640 / pixels_per_part >= 128
        assert chosen["UNIT"] == 16 and chosen["BLOCK_C"] == 128


def test_strided_input_and_gradient(randn, device):
    """Half of a wider tensor, as a skip connection is, and a gradient that is expanded rather than stored."""
    x = randn(2, 15, 16, device=device)[..., :8].requires_grad_()
    weight, bias = torch.ones(8, device=device), torch.zeros(8, device=device)
    (got,) = torch.autograd.grad(op(x, 2, weight, bias, None, None).sum(), x)
    (want,) = torch.autograd.grad(reference(x, 2, weight, bias, None, None).sum(), x)
    assert torch.allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_self_check(dtype, device):
    gn.self_check(device, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 384 * 640, 128, 32), (4, 96 * 160, 256, 32), (32, 60, 1024, 32), (16, 960, 768, 32)], ids=str)
def test_real_sizes(shape, dtype, randn, device, assert_matches):
    assert_matches(op, reference, make(randn, device, shape, dtype))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offsets_past_2_to_the_31(device):
    """A tensor of 2.4 billion numbers: its last frame is what it is alone."""
    N, P, C, groups = 3, 768 * 1280, 832, 32
    if torch.cuda.mem_get_info()[0] < 6 * N * P * C * 2:
        pytest.skip("needs 30 GB")
    x = torch.empty(N, P, C, dtype=torch.bfloat16, device=device).normal_()
    weight, bias = torch.randn(2, C, device=device)
    whole = run(x, groups, weight, bias, None, None, x)
    alone = run(x[-1:].clone(), groups, weight, bias, None, None, x[-1:].clone())
    assert all(torch.equal(a[-1], b[0]) for a, b in zip(whole[:3], alone[:3]))
