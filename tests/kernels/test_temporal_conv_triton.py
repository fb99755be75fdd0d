"""The Triton temporal convolution block by its own entry point: on the GPU where there is one, else interpreted."""

import pytest
import torch

pytest.importorskip("triton")

from dreamix_kernels import group_norm_silu_triton as norm  # noqa: E402
from dreamix_kernels import temporal_conv_triton as tconv  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5
# B, T, P, C, groups: no neighbour, one, some; blocks of pixels and of channels that are filled and not; several blocks of pixels
ROLLING = [(1, 1, 3, 8, 2), (2, 2, 131, 32, 2), (1, 16, 5, 32, 1), (1, 17, 9, 48, 1), (1, 3, 66, 64, 2), (2, 3, 67, 96, 2),
           (1, 2, 65, 128, 4)]
PER_TAP = [(1, 1, 6, 192, 6), (2, 3, 5, 256, 2), (1, 2, 130, 136, 1)]
WIDE = [(2, 3, 67, 264, 2), (1, 2, 5, 384, 3)]                                        # above C = 32 in fp32
CASES = [(shape, torch.bfloat16) for shape in ROLLING + PER_TAP + WIDE]
CASES += [(shape, torch.float32) for shape in ROLLING[:4] + ROLLING[5:6] + PER_TAP[1:2]]
CASES += [(shape, torch.float16) for shape in ROLLING[1:4] + PER_TAP[2:]]
FORMS = [(2, 3, 66, 32, 4), (2, 3, 9, 136, 2), (2, 3, 9, 264, 2)]                     # one of each, B = 2
DTYPED_FORMS = [*((shape, torch.bfloat16) for shape in FORMS), (FORMS[0], torch.float32), ((2, 3, 9, 40, 2), torch.float32)]


def make(randn, device, shape, dtype=torch.float32, mask=None):
    """x, groups, norm_weight, norm_bias, weight, bias, independent_frames."""
    B, T, P, C, groups = shape
    x, norm_weight, norm_bias, bias = (randn(*s, dtype=dtype, device=device) for s in ((B, T, P, C), (C,), (C,), (C,)))
    weight = (randn(C, C, 3) / C**0.5).to(device, dtype)
    return [x, groups, norm_weight, norm_bias, weight, bias, None if mask is None else torch.tensor(mask, device=device)]


def op(*args, stats=None, next_groups=None, inplace=False):
    return tconv.temporal_conv_block(*args, EPS, stats, next_groups, inplace)


def output(*args):
    return op(*args)[0]


def gradients(args, dy):
    """Of x and of every parameter, by name."""
    names = ("x", "norm_weight", "norm_bias", "weight", "bias")
    leaves = [args[i].detach().clone().requires_grad_() for i in (0, 2, 3, 4, 5)]
    y = output(leaves[0], args[1], *leaves[1:], args[6])
    return dict(zip(names, torch.autograd.grad(y, leaves, dy)))


@pytest.mark.parametrize("shape, dtype", CASES, ids=str)
def test_matches_reference(shape, dtype, randn, device, assert_matches, poisoned):
    """Output and every gradient; the last sample of two is masked."""
    assert_matches(output, tconv.reference, make(randn, device, shape, dtype, None if shape[0] == 1 else [False, True]), floor=4.0)


@pytest.mark.parametrize("shape, dtype", DTYPED_FORMS, ids=str)
def test_masked_samples_pass_by(shape, dtype, randn, device, poisoned):
    """To the bit: x is the output, dy the gradient, nothing of theirs in a parameter's; and the video beside knows nothing of them."""
    args = make(randn, device, shape, dtype, [False, True])
    dy = randn(*shape[:4], dtype=dtype, device=device)
    y, mixed = output(*args), gradients(args, dy)
    assert torch.equal(y[1], args[0][1]) and torch.equal(mixed["x"][1], dy[1])
    if tconv.fused(shape[3], dtype):                       # conv2d's own bits depend on the batch
        alone = [args[0][:1], *args[1:6], None]
        assert torch.equal(y[:1], output(*alone))
        for name, got in gradients(alone, dy[:1]).items():
            assert torch.equal(mixed[name][:1] if name == "x" else mixed[name], got), name


@pytest.mark.parametrize("shape", FORMS, ids=str)
def test_a_batch_of_images_gives_zero_gradients(shape, randn, device, poisoned):
    """And none is None: every rank of ZeRO-3 sees the same set."""
    args = make(randn, device, (1, *shape[1:]), torch.bfloat16, [True])
    dy = randn(*args[0].shape, dtype=torch.bfloat16, device=device)
    found = gradients(args, dy)
    assert torch.equal(output(*args), args[0]) and torch.equal(found.pop("x"), dy)
    assert all(not g.any() for g in found.values())


@pytest.mark.parametrize("mask", [None, [False, True]], ids=str)
@pytest.mark.parametrize("shape, dtype", DTYPED_FORMS, ids=str)
def test_statistics_of_the_output(shape, dtype, mask, randn, device, poisoned):
    """Of what is stored, rounding included, in fp64."""
    args = make(randn, device, shape, dtype, mask)
    args[0] += 3
    next_groups = args[1] // 2
    y, stats = op(*args, next_groups=next_groups)
    var, mean = torch.var_mean(y.double().flatten(0, 1).unflatten(-1, (next_groups, -1)), (1, 3), correction=0)
    assert stats.dtype == torch.float32 and torch.equal(y, output(*args))
    for got, want in zip(stats.double().unbind(-1), (mean, var)):
        assert (got - want).abs().max() <= 8 * torch.finfo(torch.float32).eps * want.abs().max()


@pytest.mark.parametrize("shape", FORMS, ids=str)
def test_given_statistics_are_used_and_equal_computed_ones(shape, randn, device):
    args = make(randn, device, shape)
    stats = norm.frame_statistics(args[0].flatten(0, 1), args[1])
    assert torch.equal(op(*args, stats=stats)[0], output(*args))
    assert not torch.equal(op(*args, stats=stats * 2)[0], output(*args))


@pytest.mark.parametrize("mask, next_groups", [(None, None), ([False, True], None), ([False, True], 2)], ids=str)
@pytest.mark.parametrize("shape", FORMS, ids=str)
def test_in_place(shape, mask, next_groups, randn, device):
    """The same bits in x's memory; 128 < C <= 256 reads other programs' frames and takes new memory."""
    args = make(randn, device, shape, torch.bfloat16, mask)
    with torch.no_grad():
        want, want_stats = op(*args, next_groups=next_groups)
        x = args[0].clone()
        y, stats = op(x, *args[1:], next_groups=next_groups, inplace=True)
    assert torch.equal(y, want) and (stats is None or torch.equal(stats, want_stats))
    assert (y.data_ptr() == x.data_ptr()) == (shape[3] != 136)


@pytest.mark.parametrize("T", [1, 2, 17])
def test_in_place_reads_each_frame_before_it_writes_it(T, randn, device):
    """Blocks of pixels that are filled and one that is not, for every number of frames ahead."""
    args = make(randn, device, (1, T, 150, 32, 1))
    with torch.no_grad():
        want = output(*args)
        assert torch.equal(op(*args, inplace=True)[0], want) and torch.equal(args[0], want)


def test_in_place_with_a_gradient_leaves_x_alone(randn, device):
    args = make(randn, device, FORMS[0])
    before = args[0].clone()
    y, _ = op(*args, inplace=True)
    assert y.data_ptr() != args[0].data_ptr() and torch.equal(args[0], before)


@pytest.mark.parametrize("shape, dtype", DTYPED_FORMS, ids=str)
def test_reach(shape, dtype, randn, device):
    """A video's frame reaches the two beside it and no other, by one bit; an image reaches nothing."""
    args = make(randn, device, (2, 6, 5, shape[3], 1), dtype, [False, True])
    y = output(*args)
    for b, t in ((0, 2), (0, 0), (0, 5), (1, 2)):
        x = args[0].clone()
        x[b, t] = randn(*x.shape[2:], dtype=dtype, device=device)
        changed = (output(x, *args[1:]) != y).flatten(2).any(-1)
        want = torch.zeros_like(changed)
        want[b, t if b else max(t - 1, 0) : t + 2 if b == 0 else t + 1] = True
        assert torch.equal(changed, want), (b, t)


@pytest.mark.parametrize("shape", FORMS, ids=str)
def test_nan_stays_where_it_is(shape, randn, device):
    args = make(randn, device, shape, torch.bfloat16, [False, True])
    clean = output(*args)
    args[0][0, 0, 0, 0] = args[0][1, 2, 1, 1] = float("nan")
    dirty = output(*args)
    assert torch.equal(dirty[0, 2:], clean[0, 2:]) and dirty[0, :2].isnan().any(-1).all()
    assert torch.equal(dirty[1].nan_to_num(), args[0][1].nan_to_num()) and dirty[1].isnan().sum() == 1


@pytest.mark.parametrize("shape, dtype", DTYPED_FORMS, ids=str)
def test_a_new_layer_is_the_identity(shape, dtype, randn, device):
    """Zero weights, as the model starts: to the bit."""
    args = make(randn, device, shape, dtype)
    args[4].zero_()
    args[5].zero_()
    assert torch.equal(output(*args), args[0])


@pytest.mark.parametrize("shape", FORMS, ids=str)
def test_same_bits_twice(shape, randn, device):
    args = make(randn, device, shape, torch.bfloat16, [False, True])
    dy = randn(*shape[:4], dtype=torch.bfloat16, device=device)
    (y, stats), (y2, stats2) = op(*args, next_groups=4), op(*args, next_groups=4)
    assert torch.equal(y, y2) and torch.equal(stats, stats2)
    again = gradients(args, dy)
    assert all(torch.equal(g, again[name]) for name, g in gradients(args, dy).items())


@pytest.mark.parametrize("programs", [1, 5])
def test_weight_gradient_in_any_number_of_shares(programs, randn, device, monkeypatch):
    """Real sizes have many blocks of pixels and frames per program; small ones one."""
    args = make(randn, device, (2, 3, 150, 32, 1), torch.float32, [False, True])
    dy = randn(*args[0].shape, device=device)
    want = gradients(args, dy)["weight"]
    monkeypatch.setattr(tconv, "PROGRAMS_PER_SAMPLE", programs)
    assert (gradients(args, dy)["weight"] - want).abs().max() < 1e-6 * want.abs().max() * (1 if device.type == "cpu" else 1000)


def test_only_what_is_asked_for(randn, device):
    """Frozen parameters, or a frozen x; a gradient that is expanded, not stored; statistics that carry none."""
    args = make(randn, device, FORMS[0])
    want = gradients(args, torch.ones_like(args[0]))
    for i, name in ((0, "x"), (3, "norm_bias"), (4, "weight"), (5, "bias")):
        leaf = args[i].clone().requires_grad_()
        y, stats = op(*args[:i], leaf, *args[i + 1:], next_groups=4)
        assert torch.equal(torch.autograd.grad(y.sum(), leaf)[0], want[name]), name
        assert not stats.requires_grad


@pytest.mark.parametrize("shape", FORMS[::2], ids=str)
def test_fp32_parameters_of_a_bf16_tensor(shape, randn, device):
    args = make(randn, device, shape, torch.bfloat16)
    wide = [args[0], args[1], *(a.float() for a in args[2:6]), None]
    dy = randn(*shape[:4], dtype=torch.bfloat16, device=device)
    assert torch.equal(output(*wide), output(*args))
    narrow = gradients(args, dy)
    for name, got in gradients(wide, dy).items():
        assert got.dtype == (torch.bfloat16 if name == "x" else torch.float32)
        assert torch.equal(got.bfloat16(), narrow[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_checks_itself(dtype, device):
    tconv.self_check(device, dtype)


def test_what_is_supported():
    x, weight = torch.empty(1, 1, 1, 48), torch.empty(48, 48, 3)
    assert tconv.supported(x, weight) and tconv.supported(x.bfloat16(), weight)
    assert not tconv.supported(x.double(), weight) and not tconv.supported(x, torch.empty(48, 48, 5))
    assert not tconv.supported(x[..., :12], torch.empty(12, 12, 3)) and not tconv.supported(x, torch.empty(96, 48, 3))


def test_every_width_has_a_configuration():
    """The kernels' own conditions: all channels in one block; powers of two; what compiles is what is launched."""
    for C in (8, 24, 32, 48, 96, 128, 192, 256):
        for dtype in DTYPES:
            if tconv.fused(C, dtype):
                kernel, chosen = tconv.config(C, dtype)
                assert C <= chosen["BLOCK_C"] < max(2 * C, 17)
    names = [case.name for case in tconv.aot_cases()]
    assert len(names) == len(set(names))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("T, P, C", [(70, 245760, 128), (70, 122880, 256), (70, 30720, 1024)])
def test_offsets_beyond_32_bits(T, P, C, device):
    """2.2e9 numbers: the last frames are what they are in a clip of their own."""
    x = torch.randn(1, T, P, C, dtype=torch.bfloat16, device=device)
    rest = [32, *torch.randn(2, C, dtype=x.dtype, device=device), torch.randn(C, C, 3, dtype=x.dtype, device=device) / C**0.5,
            torch.randn(C, dtype=x.dtype, device=device), None]
    with torch.no_grad():
        y, stats = op(x, *rest, next_groups=32)
        tail, tail_stats = op(x[:, -4:], *rest, next_groups=32)
    if tconv.fused(C, x.dtype):
        assert torch.equal(y[:, -3:], tail[:, -3:]) and torch.equal(stats[-3:], tail_stats[-3:])
    else:
        assert torch.allclose(y[:, -3:].float(), tail[:, -3:].float(), rtol=0.02, atol=0.02)
