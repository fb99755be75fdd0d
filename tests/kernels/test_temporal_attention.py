import pytest
import torch

from dreamix_kernels import temporal_attention


@pytest.fixture(autouse=True, params=["auto", "torch"])
def implementation(request, monkeypatch):
    """What the machine's own kernels compute, and PyTorch's formulation alone."""
    monkeypatch.setenv("DREAMIX_KERNELS", request.param)


def reference(q, k, v, bias, independent_frames=None):
    """The definition: scores of every pair of frames, those the mask forbids at minus infinity."""
    scores = torch.einsum("bshwnd,bthwnd->bhwnst", q, k) * q.shape[-1] ** -0.5 + bias
    if independent_frames is not None:
        apart = ~torch.eye(q.shape[1], dtype=torch.bool)
        scores = scores.masked_fill(independent_frames[:, None, None, None, None, None] & apart, float("-inf"))
    return torch.einsum("bhwnst,bthwnd->bshwnd", torch.softmax(scores, -1), v)


def inputs(randn, B=2, T=5, H=2, W=3, heads=2, d=8, dtype=torch.float32, mask=None):
    return [*(randn(B, T, H, W, heads, d, dtype=dtype) for _ in range(3)), randn(heads, T, T, dtype=dtype), mask]


MASKS = {"none": None, "video": [False] * 3, "frames": [True] * 3, "mixed": [False, True, False], "one video": [True, True, False]}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matches_reference_under_every_mask(mask, dtype, randn, assert_matches):
    mask = None if MASKS[mask] is None else torch.tensor(MASKS[mask])
    assert_matches(temporal_attention, reference, inputs(randn, B=3, dtype=dtype, mask=mask))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1, 1), (1, 2, 1, 1, 3, 5), (2, 7, 3, 1, 2, 33), (1, 16, 12, 20, 3, 32),
                                   (1, 31, 1, 5, 1, 64), (1, 64, 2, 3, 2, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matches_reference_at_every_length(shape, dtype, randn, assert_matches):
    assert_matches(temporal_attention, reference, inputs(randn, *shape, dtype=dtype))


@pytest.mark.parametrize("mask", ["none", "frames", "mixed"])
def test_gradients_in_fp64(mask, randn):
    mask = None if MASKS[mask] is None else torch.tensor(MASKS[mask])
    args = inputs(randn, B=3, T=3, H=1, W=2, heads=2, d=3, dtype=torch.float64)[:4]
    assert torch.autograd.gradcheck(lambda *a: temporal_attention(*a, mask), [a.requires_grad_() for a in args])


def test_independent_frames_are_their_values(randn):
    q, k, v, bias, _ = inputs(randn, B=3)
    out = temporal_attention(q, k, v, bias, torch.tensor([True, False, True]))
    assert torch.equal(out[[0, 2]], v[[0, 2]]) and not torch.equal(out[1], v[1])


def test_independent_frames_leave_no_gradient_on_queries_keys_and_bias(randn):
    q, k, v, bias, _ = (x if x is None else x.requires_grad_() for x in inputs(randn, B=2))
    out = temporal_attention(q, k, v, bias, torch.tensor([False, True]))
    dq, dk, dv, dbias = torch.autograd.grad(out[1].square().sum(), (q, k, v, bias), materialize_grads=True)
    assert not dq.any() and not dk.any() and not dbias.any() and dv[1].any() and not dv[0].any()
    dbias, = torch.autograd.grad(temporal_attention(q, k, v, bias)[0].square().sum(), bias)
    assert dbias.any()


@pytest.mark.parametrize("mask", [[True], [False, True]], ids=str)
def test_queries_and_keys_of_masked_samples_are_not_read_in_training(mask, randn):
    q, k, v, bias, _ = inputs(randn, B=len(mask))
    q[-1, 1], k[-1, 2] = float("nan"), float("nan")
    out = temporal_attention(*(x.requires_grad_() for x in (q, k, v, bias)), torch.tensor(mask))
    assert torch.equal(out[-1], v[-1])


def test_a_frame_of_a_masked_sample_stays_alone_even_as_nan(randn):
    q, k, v, bias, _ = inputs(randn, B=2)
    mask = torch.tensor([True, False])
    clean = temporal_attention(q, k, v, bias, mask)
    for x in (q, k, v):
        x[0, 3] = float("nan")
    dirty = temporal_attention(q, k, v, bias, mask)
    others = [0, 1, 2, 4]
    assert torch.equal(dirty[0, others], clean[0, others]) and torch.equal(dirty[1], clean[1]) and dirty[0, 3].isnan().all()


def test_a_pixel_sees_only_its_own_column(randn):
    q, k, v, bias, _ = inputs(randn, H=3, W=4)
    before = temporal_attention(q, k, v, bias)
    v[0, 2, 1, 3] += 1
    changed = (temporal_attention(q, k, v, bias) != before).any(-1).any(-1)
    assert changed[0, :, 1, 3].all() and changed.sum() == changed.shape[1]


def test_bias_is_from_query_to_key(randn):
    """A bias of minus infinity but at one key makes every query take that key's value."""
    q, k, v, bias, _ = inputs(randn)
    bias.fill_(float("-inf"))[..., 3] = 0
    assert torch.equal(temporal_attention(q, k, v, bias), v[:, 3:4].expand_as(v))


def test_same_bits_twice_and_from_strided_inputs(randn):
    qkv = randn(2, 5, 2, 3, 3, 2, 8)                     # as the projection leaves it
    q, k, v = qkv.unbind(-3)
    bias = randn(2, 5, 5)
    out = temporal_attention(q, k, v, bias)
    assert torch.equal(out, temporal_attention(q, k, v, bias))
    assert torch.equal(out, temporal_attention(q.contiguous(), k.contiguous(), v.contiguous(), bias))


def test_refusals(randn):
    q, k, v, bias, _ = inputs(randn)
    with pytest.raises(ValueError, match=r"q, k: want the shape of v = \[2, 5, 2, 3, 2, 8\]"):
        temporal_attention(q, k[:, :4], v, bias)
    with pytest.raises(ValueError, match=r"bias: want \[heads, T, T\] = \[2, 5, 5\], got \[2, 4, 4\]"):
        temporal_attention(q, k, v, bias[:, :4, :4])
    for mask in (torch.ones(3, dtype=torch.bool), torch.ones(2)):
        with pytest.raises(ValueError, match=r"independent_frames: want bool \[2\]"):
            temporal_attention(q, k, v, bias, mask)
