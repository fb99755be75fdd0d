"""Temporal attention's Triton kernels, on a GPU or in the interpreter, against the definition in fp64."""

import pytest
import torch

pytest.importorskip("triton")
from dreamix_kernels import temporal_attention_triton as op  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def reference(q, k, v, bias, independent_frames=None):
    """The definition; q, k, v [B, T, P, heads, d]. The values are put in by hand, so that NaN in a masked sample's q and k goes nowhere."""
    scores = torch.einsum("bsphd,btphd->bphst", q, k) * q.shape[-1] ** -0.5 + bias
    attended = torch.einsum("bphst,btphd->bsphd", torch.softmax(scores, -1), v)
    return attended if independent_frames is None else torch.where(independent_frames[:, None, None, None, None], v, attended)


def packed_reference(qkv, bias, independent_frames=None):
    return reference(*qkv.unbind(3), bias, independent_frames)


def inputs(randn, device, B=2, T=5, P=None, heads=None, d=32, dtype=torch.float32, mask=None):
    """qkv, bias, mask, gradient of the output; a single sequence per sample where T is long, for the interpreter's sake."""
    P, heads = P or (3 if T <= 16 else 1), heads or (2 if T <= 16 else 1)
    make = {"dtype": dtype, "device": device}
    mask = None if mask is None else torch.tensor(mask, device=device)
    return randn(B, T, P, 3, heads, d, **make), randn(heads, T, T, **make), mask, randn(B, T, P, heads, d, **make)


def run(qkv, bias, mask, do):
    """(output, dqkv, dbias)"""
    qkv, bias = qkv.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()
    out = op.temporal_attention_packed(qkv, bias, mask)
    return out.detach(), *torch.autograd.grad(out, (qkv, bias), do)


def same(these, those):
    return all(torch.equal(a, b) for a, b in zip(these, those))


# T, pixels (never a multiple of the block but for one), heads, head size
SHAPES = [(1, 1, 1, 32), (2, 5, 3, 64), (5, 9, 1, 32), (16, 5, 2, 64), (16, 4, 1, 128), (17, 3, 1, 128), (17, 5, 1, 32), (32, 3, 2, 64),
          (33, 2, 1, 64), (64, 1, 2, 32), (50, 1, 1, 128), (65, 1, 1, 64), (100, 1, 1, 128), (128, 1, 1, 32)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(shape, dtype, randn, device, assert_matches, poisoned):
    T, P, heads, d = shape
    qkv, bias, _, _ = inputs(randn, device, 1, T, P, heads, d, dtype)
    assert_matches(op.temporal_attention_packed, packed_reference, (qkv, bias, None))


@pytest.mark.parametrize("mask", [[False] * 2, [True] * 2, [False, True]], ids=str)
@pytest.mark.parametrize("shape, dtype", [
    ((5, 3, 2, 32), torch.float32), ((5, 5, 1, 64), torch.bfloat16), ((5, 5, 1, 32), torch.float16),
    ((33, 1, 1, 32), torch.float32), ((33, 2, 1, 64), torch.float16), ((70, 1, 1, 32), torch.bfloat16)])
def test_matches_reference_under_every_mask(shape, mask, dtype, randn, device, assert_matches, poisoned):
    qkv, bias, mask, _ = inputs(randn, device, 2, *shape, dtype, mask)
    assert_matches(op.temporal_attention_packed, packed_reference, (qkv, bias, mask))


@pytest.mark.parametrize("T, mask", [(7, None), (7, [False, True]), (66, [False, True])], ids=str)
def test_separate_inputs_give_the_bits_of_packed_ones_without_a_copy(T, mask, randn, device, poisoned, monkeypatch):
    qkv, bias, mask, do = inputs(randn, device, T=T, dtype=torch.bfloat16, mask=mask)
    out, dqkv, dbias = run(qkv, bias, mask, do)
    contiguous = torch.Tensor.contiguous

    def not_a_copy(x):
        assert x.is_contiguous()
        return contiguous(x)
    monkeypatch.setattr(torch.Tensor, "contiguous", not_a_copy)
    q, k, v = (x.requires_grad_() for x in qkv.detach().unbind(3))
    separate = op.temporal_attention(q, k, v, bias.requires_grad_(), mask)
    *gradients, dbias_separate = torch.autograd.grad(separate, (q, k, v, bias), do)
    assert same((separate, torch.stack(gradients, 3), dbias_separate), (out, dqkv, dbias))


@pytest.mark.parametrize("layout", ["rows of 36 elements", "rows from an odd address", "frames after pixels", "q alone", "k alone"])
def test_any_layout_gives_the_same_values(layout, randn, device, assert_matches):
    qkv, bias, _, _ = inputs(randn, device, dtype=torch.bfloat16)

    def strided(q, k, v, bias):
        if layout == "rows of 36 elements":
            q, k, v = (torch.nn.functional.pad(x, (0, 4))[..., :-4] for x in (q, k, v))
        elif layout == "rows from an odd address":
            q, k, v = (torch.nn.functional.pad(x, (1, 7))[..., 1:-7] for x in (q, k, v))
        elif layout == "frames after pixels":
            q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        elif layout == "q alone":
            q = q.transpose(2, 3).contiguous().transpose(2, 3)
        else:
            k = k.transpose(3, 4).contiguous().transpose(3, 4)
        return op.temporal_attention(q, k, v, bias)
    assert_matches(strided, reference, (*qkv.unbind(3), bias))


@pytest.mark.parametrize("shape, programs", [((5, 15, 2, 32), 1), ((5, 15, 2, 32), 7), ((70, 3, 1, 32), 4)], ids=str)
def test_programs_walk_many_blocks(shape, programs, randn, device, assert_matches, poisoned, monkeypatch):
    """Slots that walk several blocks, of both samples, the last slot with fewer; the bias's gradient is the sum of all."""
    monkeypatch.setattr(op, "PROGRAMS", programs)
    qkv, bias, _, _ = inputs(randn, device, 2, *shape, torch.float16)
    for mask in (None, torch.tensor([False, True], device=device)):
        assert_matches(op.temporal_attention_packed, packed_reference, (qkv, bias, mask))


@pytest.mark.parametrize("T", [6, 80])
def test_offsets_of_64_bits(T, randn, device, monkeypatch):
    arguments = inputs(randn, device, T=T, dtype=torch.bfloat16, mask=[False, True])
    narrow = run(*arguments)
    monkeypatch.setattr(op, "_wide", lambda *tensors: True)
    assert same(run(*arguments), narrow)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [5, 40])
def test_large_scores_do_not_overflow(T, dtype, randn, device, assert_matches):
    qkv, bias, _, _ = inputs(randn, device, 1, T, 1, 1, dtype=dtype)
    qkv[:, :, :, 0] *= 30
    assert_matches(op.temporal_attention_packed, packed_reference, (qkv, bias, None))
    assert op.temporal_attention_packed(qkv * 30, bias).isfinite().all()


@pytest.mark.parametrize("T", [5, 70])
def test_keys_at_minus_infinity_get_nothing(T, randn, device):
    """A bias of minus infinity but at one key: every query takes that key's value, and gradients stay finite."""
    qkv, bias, _, do = inputs(randn, device, B=1, T=T)
    bias.fill_(float("-inf"))[..., 3] = 0.0
    out, dqkv, dbias = run(qkv, bias, None, do)
    v = qkv[:, :, :, 2]
    assert torch.equal(out, v[:, 3:4].expand_as(v)) and dqkv[:, :, :, :2].abs().max() < 1e-4 and dbias.abs().max() < 1e-4
    assert torch.allclose(dqkv[:, 3, :, 2], do.sum(1), atol=1e-4)


def test_bias_may_be_wider_and_strided_and_frozen(randn, device, assert_matches):
    qkv, _, _, do = inputs(randn, device, dtype=torch.bfloat16)
    bias = randn(5, 5, 2, device=device).permute(2, 0, 1)                    # as an embedding of relative positions leaves it
    assert_matches(lambda qkv, bias: op.temporal_attention_packed(qkv, bias.permute(2, 0, 1)),
                   lambda qkv, bias: packed_reference(qkv, bias.permute(2, 0, 1).to(qkv.dtype)), (qkv, bias.permute(1, 2, 0).contiguous()))
    _, dqkv, dbias = run(qkv, bias, None, do)
    assert dbias.dtype == torch.float32
    alone, = torch.autograd.grad(op.temporal_attention_packed(qkv.requires_grad_(), bias), qkv, do)
    assert torch.equal(alone, dqkv)


@pytest.mark.parametrize("T", [5, 40, 70])
def test_masked_samples_are_their_values_and_give_no_other_gradient(T, randn, device, poisoned):
    qkv, bias, _, do = inputs(randn, device, T=T)
    qkv[:, :, :, :2] = float("nan")                                          # not read
    out, dqkv, dbias = run(qkv, bias, torch.tensor([True, True], device=device), do)
    assert torch.equal(out, qkv[:, :, :, 2]) and torch.equal(dqkv[:, :, :, 2], do)
    assert not dqkv[:, :, :, :2].any() and not dbias.any()


@pytest.mark.parametrize("T", [5, 40, 70])
def test_a_masked_frame_stays_alone_to_the_bit(T, randn, device, poisoned, monkeypatch):
    """NaN in one frame of a masked sample, values and gradient, changes nothing outside that frame: not the bias's gradient either."""
    monkeypatch.setattr(op, "PROGRAMS", 2)                                   # one slot walks samples of both kinds
    qkv, bias, mask, do = inputs(randn, device, T=T, dtype=torch.bfloat16, mask=[False, True])
    out, dqkv, dbias = run(qkv, bias, mask, do)
    qkv[1, 3], do[1, 3] = float("nan"), float("nan")
    dirty, dirty_dqkv, dirty_dbias = run(qkv, bias, mask, do)
    assert dirty[1, 3].isnan().all() and dirty_dqkv[1, 3, :, 2].isnan().all() and not dirty_dqkv[1, 3, :, :2].any()
    for x in (out, dqkv, dirty, dirty_dqkv):
        x[1, 3] = 0
    assert same((dirty, dirty_dqkv, dirty_dbias), (out, dqkv, dbias))


def test_a_pixel_and_a_head_see_only_themselves(randn, device):
    qkv, bias, _, do = inputs(randn, device, P=6)
    before = run(qkv, bias, None, do)
    qkv[0, 2, 4, :, 1] += 1
    after = run(qkv, bias, None, do)
    changed = (after[0] != before[0]).any(-1)                                # [B, T, P, heads]
    assert changed[0, :, 4, 1].all() and changed.sum() == changed.shape[1]
    changed = (after[1] != before[1]).any(-1).any(3).any(1)                  # [B, P, heads]
    assert changed[0, 4, 1] and changed.sum() == 1
    changed = (after[2] != before[2]).any(-1).any(-1)
    assert changed.tolist() == [False, True]


@pytest.mark.parametrize("T", [16, 64, 70])
def test_same_bits_twice(T, randn, device, monkeypatch):
    monkeypatch.setattr(op, "PROGRAMS", 2)
    arguments = inputs(randn, device, T=T, dtype=torch.bfloat16, mask=[False, True])
    assert same(run(*arguments), run(*arguments))


def test_gradient_may_be_expanded_and_inputs_empty(randn, device):
    qkv, bias, _, _ = inputs(randn, device)
    qkv.requires_grad_()
    summed, = torch.autograd.grad(op.temporal_attention_packed(qkv, bias).sum(), qkv)
    ones, = torch.autograd.grad(op.temporal_attention_packed(qkv, bias), qkv, torch.ones(2, 5, 3, 2, 32, device=device))
    assert torch.equal(summed, ones)
    out, dqkv, dbias = run(qkv[:, :, :0], bias, None, torch.ones(2, 5, 0, 2, 32, device=device))
    assert out.shape == (2, 5, 0, 2, 32) and dqkv.shape == (2, 5, 0, 3, 2, 32) and not dbias.any()


def test_every_supported_shape_has_a_tile_that_covers_it():
    assert not any(op.supported(T, d, torch.float32) for T, d in [(0, 64), (129, 64), (16, 16), (16, 40), (16, 256)])
    assert not op.supported(16, 64, torch.float64)
    for T in range(1, 129):
        for d in (32, 64, 128):
            for dtype in DTYPES:
                assert op.supported(T, d, dtype)
                forward, backward, keys = (op.config(kernel, T, d, dtype) for kernel in ("forward", "backward", "backward_keys"))
                assert (keys is None) == (backward.queries == backward.keys)
                for tile in (forward, backward, keys or backward):
                    assert min(tile.queries, tile.keys) >= 16 and d % tile.chunk == 0 and tile.chunk >= 16
                    assert tile.pixels == 1 or tile.queries == tile.keys and tile.pixels % tile.warps == 0      # a warp per pixel
                assert min(forward.keys, backward.keys, keys.queries if keys else T) >= T


def test_kernels_are_called_with_names_they_have(randn, device, monkeypatch):
    """Triton refuses an unknown keyword on a GPU; its interpreter passes over it."""
    called = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel, self.arg_names = kernel, kernel.arg_names

        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                assert {*kwargs} == {*self.arg_names[len(args):], "num_warps", "num_stages"}
                called.append(self.kernel.__name__)
                self.kernel[grid](*args, **kwargs)
            return launch
    for name in ("forward", "backward", "backward_keys"):
        monkeypatch.setattr(op.kernels, name, Recorder(getattr(op.kernels, name)))
    run(*inputs(randn, device, B=1, T=65, dtype=torch.bfloat16))
    assert called == ["forward", "backward", "backward_keys"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_self_check(dtype, device):
    op.self_check(device, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("B, T, P, heads, d", [(1, 16, 70_000, 1, 32), (5, 16, 15_360, 2, 64), (2, 16, 960, 12, 64), (2, 128, 960, 8, 64)])
def test_real_sizes_and_more_sequences_than_a_grid_axis(B, T, P, heads, d, device):
    generator = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(B, T, P, 3, heads, d, device=device, dtype=torch.bfloat16, generator=generator)
    bias = torch.randn(heads, T, T, device=device, generator=generator)
    do = torch.randn(B, T, P, heads, d, device=device, dtype=torch.bfloat16, generator=generator)
    out, dqkv, dbias = run(qkv, bias, None, do)
    total = torch.zeros_like(bias, dtype=torch.float64)
    for p in range(0, P, 256):                                               # fp64 in pieces
        part = slice(p, p + 256)
        x, b = qkv[:, :, part].double().requires_grad_(), bias.double().requires_grad_()
        want = packed_reference(x, b)
        dx, db = torch.autograd.grad(want, (x, b), do[:, :, part].double())
        total += db
        assert (out[:, :, part] - want).abs().max() <= 0.02 * want.abs().max()
        assert (dqkv[:, :, part] - dx).abs().max() <= 0.03 * dx.abs().max()
    assert (dbias - total).abs().max() <= 0.01 * total.abs().max()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.mem_get_info()[1] < 30e9, reason="needs a CUDA device of 30 GB")
def test_tensors_of_more_than_two_to_the_31_elements(device):
    qkv = torch.randn(1, 16, 720_000, 3, 1, 64, device=device, dtype=torch.bfloat16)
    bias, do = torch.randn(1, 16, 16, device=device), torch.randn(1, 16, 720_000, 1, 64, device=device, dtype=torch.bfloat16)
    assert qkv.numel() > 2**31
    out, dqkv, _ = run(qkv, bias, None, do)
    last = [x[:, :, -1000:].contiguous() for x in (qkv, do)]
    end, dend, _ = run(last[0], bias, None, last[1])
    assert torch.equal(out[:, :, -1000:], end) and torch.equal(dqkv[:, :, -1000:], dend)
