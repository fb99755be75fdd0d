import importlib

import pytest
import torch

from dreamix_kernels import spatial_attention

SHAPES = [(1, 1, 1, 1, 1), (2, 3, 7, 2, 5), (1, 2, 60, 3, 32), (2, 1, 240, 2, 16), (1, 1, 300, 1, 64)]     # B, T, P, heads, head_dim


def reference(q, k, v, text_k=None, text_v=None, text_mask=None):
    """The definition, one frame and head at a time in the einsum; tokens that are not there at minus infinity."""
    T = q.shape[1]
    if text_k is not None:
        k = torch.cat([k, text_k[:, None].expand(-1, T, -1, -1, -1)], 2)
        v = torch.cat([v, text_v[:, None].expand(-1, T, -1, -1, -1)], 2)
    scores = torch.einsum("btpnd,btsnd->btnps", q, k) * q.shape[-1] ** -0.5
    if text_mask is not None:
        gone = torch.zeros(len(q), k.shape[2], dtype=torch.bool)
        gone[:, q.shape[2]:] = ~text_mask
        scores = scores.masked_fill(gone[:, None, None, None], float("-inf"))
    return torch.einsum("btnps,btsnd->btpnd", torch.softmax(scores, -1), v)


def inputs(randn, B, T, P, heads, d, dtype=torch.float32, tokens=5):
    qkv = [randn(B, T, P, heads, d, dtype=dtype) for _ in range(3)]
    if not tokens:
        return qkv
    mask = torch.arange(tokens)[None] < torch.tensor([3, 0, 5])[:B, None]                 # part, none, all of the tokens
    return [*qkv, randn(B, tokens, heads, d, dtype=dtype), randn(B, tokens, heads, d, dtype=dtype), mask]


@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, tokens, randn, assert_matches):
    assert_matches(spatial_attention, reference, inputs(randn, *shape, dtype=dtype, tokens=tokens))


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training_equals_inference(shape, dtype, atol, randn):
    """Two code paths on the CPU: plain products where there is a gradient, SDPA where there is none."""
    args = inputs(randn, *shape, dtype=dtype)
    with torch.no_grad():
        inference = spatial_attention(*args)
    assert torch.allclose(spatial_attention(*args), inference, atol=atol, rtol=0)


def test_the_two_paths_are_two(randn, monkeypatch):
    module, calls = importlib.import_module("dreamix_kernels.attention"), []
    sdpa = module.F.scaled_dot_product_attention
    monkeypatch.setattr(module.F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or sdpa(*a, **k))
    args = inputs(randn, 1, 1, 9, 2, 4)
    spatial_attention(*args)
    assert not calls
    with torch.no_grad():
        spatial_attention(*args)
    assert calls


@pytest.mark.parametrize("tokens", [0, 3])
def test_gradients_in_fp64(tokens, randn):
    args = inputs(randn, 2, 2, 3, 2, 2, torch.float64, tokens)
    mask = args[5:]
    assert torch.autograd.gradcheck(lambda *a: spatial_attention(*a, *mask), [a.requires_grad_() for a in args[:5]])


@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
def test_frames_and_samples_stay_apart(grad, randn):
    q, k, v, text_k, text_v, mask = inputs(randn, 3, 4, 6, 2, 8)
    with torch.set_grad_enabled(grad):
        clean = spatial_attention(q, k, v, text_k, text_v, mask)
        for x in (q, k, v):
            x[1, 2] = float("nan")
        dirty = spatial_attention(q, k, v, text_k, text_v, mask)
    same = torch.ones(3, 4, dtype=torch.bool)
    same[1, 2] = False
    assert torch.equal(dirty[same], clean[same]) and dirty[1, 2].isnan().all()


@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
def test_padding_tokens_do_not_count(grad, randn):
    q, k, v, text_k, text_v, mask = inputs(randn, 3, 2, 6, 2, 8)
    with torch.set_grad_enabled(grad):
        before = spatial_attention(q, k, v, text_k, text_v, mask)
        bare = spatial_attention(q, k, v)
        other_k, other_v = (torch.where(mask[..., None, None], x, 100 * randn(*x.shape)) for x in (text_k, text_v))
        assert torch.equal(spatial_attention(q, k, v, other_k, other_v, mask), before)
        assert torch.allclose(before[1], bare[1], atol=1e-6)                                # no token at all: pixels alone
        assert not torch.allclose(before[0], bare[0], atol=1e-2)
        text_v[0, 0] += 1
        changed = (spatial_attention(q, k, v, text_k, text_v, mask) != before).flatten(2).any(-1)
    assert changed[0].all() and not changed[1:].any()


def test_same_bits_twice_and_from_strided_inputs(randn):
    q, k, v = randn(2, 3, 7, 3, 2, 8).unbind(-3)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            out = spatial_attention(q, k, v)
            assert torch.equal(out, spatial_attention(q, k, v))
            assert torch.equal(out, spatial_attention(q.contiguous(), k.contiguous(), v.contiguous()))


def test_refusals(randn):
    q, k, v, text_k, text_v, mask = inputs(randn, 2, 2, 4, 2, 8)
    with pytest.raises(ValueError, match=r"k, v: want the shape of q = \[2, 2, 4, 2, 8\]"):
        spatial_attention(q, k[:, :, :3], v)
    with pytest.raises(ValueError, match=r"text_k, text_v: want \[2, L, 2, 8\]"):
        spatial_attention(q, k, v, text_k, text_v[:1], mask)
    with pytest.raises(ValueError, match="text_k, text_v: want both or neither"):
        spatial_attention(q, k, v, text_k)
    with pytest.raises(ValueError, match=r"text_mask: want bool \[2, 5\]"):
        spatial_attention(q, k, v, text_k, text_v, mask[:, :3])
