"""The switch, the self-checks and the fall-backs: a kernel that lies must never run, and must say so once."""

import subprocess
import sys
import warnings

import pytest
import torch
import torch.utils.checkpoint

from dreamix_kernels import attention, dispatch, group_norm_silu

OPS = dispatch.TRITON_OPS


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """No verdict of another test counts here."""
    monkeypatch.setattr(dispatch, "_verdicts", {})
    attention.probe.cache_clear()
    yield
    attention.probe.cache_clear()


def module(op):
    return __import__(f"dreamix_kernels.{op}_triton", fromlist=["x"])


@pytest.fixture
def gpu_like(monkeypatch):
    """`auto` takes Triton wherever it could run, so that its fall-back can be seen in the interpreter too."""
    monkeypatch.setattr(dispatch, "mode", lambda: "auto")
    monkeypatch.setattr(dispatch, "_on_cpu", lambda device: False)


def test_an_unknown_word_is_refused(monkeypatch):
    monkeypatch.setenv("DREAMIX_KERNELS", "cuda")
    with pytest.raises(ValueError, match="DREAMIX_KERNELS: want auto, triton, torch, got 'cuda'"):
        dispatch.use_triton("group_norm_silu", torch.zeros(1))


@pytest.mark.parametrize("word", ["auto", "torch", ""])
def test_a_cpu_runs_pytorch(word, monkeypatch):
    monkeypatch.setenv("DREAMIX_KERNELS", word)
    assert not any(dispatch.use_triton(op, torch.zeros(1)) for op in OPS)


def test_insisting_without_a_gpu_is_an_error(monkeypatch):
    monkeypatch.setenv("DREAMIX_KERNELS", "triton")
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    with pytest.raises(RuntimeError, match="DREAMIX_KERNELS=triton, but group_norm_silu cannot run on cpu .*: Triton needs a GPU"):
        dispatch.use_triton("group_norm_silu", torch.zeros(1))
    with pytest.raises(RuntimeError, match="Triton needs a GPU"):
        dispatch.require_possible(torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32], ids=str)
def test_kernels_take_three_formats(dtype, device, monkeypatch):
    monkeypatch.setenv("DREAMIX_KERNELS", "triton")
    with pytest.raises(RuntimeError, match="fp32, bf16 and fp16"):
        dispatch.use_triton("temporal_conv", torch.zeros(1, dtype=dtype, device=device))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", dispatch.DTYPES, ids=str)
def test_every_kernel_passes_its_own_check(op, dtype, device):
    module(op).self_check(device, dtype)


@pytest.mark.parametrize("op", OPS)
def test_a_check_runs_once(op, device, triton, monkeypatch):
    calls = []
    monkeypatch.setattr(module(op), "self_check", lambda *args: calls.append(args))
    x = torch.zeros(1, device=device)
    assert dispatch.use_triton(op, x) and dispatch.use_triton(op, x) and len(calls) == 1
    assert dispatch.use_triton(op, x.bfloat16()) and len(calls) == 2


def test_a_kernel_that_lies_is_left_out_with_one_line(device, gpu_like, monkeypatch):
    """Its output is one per cent off: `auto` warns once and computes in PyTorch; `triton` raises."""
    triton_side = module("group_norm_silu")
    right = triton_side.group_norm_silu
    monkeypatch.setattr(triton_side, "group_norm_silu", lambda *args: right(*args) * 1.01)
    x, one, zero = torch.randn(2, 3, 4, 8, device=device), torch.ones(8, device=device), torch.zeros(8, device=device)
    with pytest.warns(UserWarning, match="dreamix_kernels: group_norm_silu runs in PyTorch on .* differs from its reference by") as told:
        got = group_norm_silu(x, 2, one, zero)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(group_norm_silu(x, 2, one, zero), got)
    monkeypatch.setattr(dispatch, "mode", lambda: "torch")
    assert torch.equal(group_norm_silu(x, 2, one, zero), got)
    monkeypatch.setattr(dispatch, "mode", lambda: "triton")
    with pytest.raises(RuntimeError, match="DREAMIX_KERNELS=triton, but group_norm_silu cannot run .* differs"):
        group_norm_silu(x, 2, one, zero)


def test_a_kernel_that_does_not_compile_is_left_out(device, gpu_like, monkeypatch):
    def fail(*args):
        raise RuntimeError("PTX was too modern\nand more")
    monkeypatch.setattr(module("temporal_conv"), "self_check", fail)
    with pytest.warns(UserWarning, match="temporal_conv runs in PyTorch on .*: PTX was too modern$"):
        assert not dispatch.use_triton("temporal_conv", torch.zeros(1, device=device))


def test_a_first_use_may_be_inside_a_recomputed_block(monkeypatch):
    """The check's own backward pass is no part of the block's, and the block's is not begun by it."""
    monkeypatch.setenv("DREAMIX_KERNELS", "auto")
    x, weight, bias = torch.randn(1, 2, 30, 10, 8, requires_grad=True), torch.ones(8), torch.zeros(8)

    def block(x):
        h = group_norm_silu(x.flatten(0, 1), 2, weight, bias).view(1, 2, 300, 2, 4)
        return attention.spatial_attention(h, h, h)                       # 300 keys: SDPA, which is probed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got, = torch.autograd.grad(torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False).sum(), x)
    want, = torch.autograd.grad(block(x).sum(), x)
    assert torch.equal(got, want)
    assert attention.probe("sdpa", x.device, x.dtype, 4, False, True) is None


def test_only_shapes_are_asked_for_on_meta(triton):
    x, one = torch.empty(2, 3, 4, 8, device="meta"), torch.empty(8, device="meta")
    assert group_norm_silu(x, 2, one, one).shape == x.shape


@pytest.mark.parametrize("word", ["auto", "torch"])
def test_second_derivatives_are_refused(word, monkeypatch):
    """They would be silently wrong."""
    monkeypatch.setenv("DREAMIX_KERNELS", word)
    x, weight = torch.randn(1, 2, 3, 4, requires_grad=True), torch.ones(4, requires_grad=True)
    first, = torch.autograd.grad(group_norm_silu(x, 2, weight, torch.zeros(4)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_the_report_names_every_op(device, triton):
    found = dispatch.report(device, torch.float32)
    assert [entry["kernel"] for entry in found] == list(OPS)
    assert all(entry == {"kernel": entry["kernel"], "implementation": "triton", "reason": "agrees with its reference"} for entry in found)


def test_agreement_is_strict():
    want = torch.randn(100, dtype=torch.float64)
    dispatch.require_agreement("it", want.float(), want)
    for wrong in (want * 1.01, -want, want + 1e-3, torch.full_like(want, float("nan"))):
        with pytest.raises(RuntimeError, match="it differs from its reference by"):
            dispatch.require_agreement("it", wrong.float(), want)


def test_triton_is_imported_where_it_is_used():
    """A machine without Triton, or without a GPU, never pays for it."""
    code = ("import sys, torch, dreamix_kernels as k; k.group_norm_silu(torch.zeros(1, 2, 2, 4), 2, torch.ones(4), torch.zeros(4));"
            "assert 'triton' not in sys.modules")
    environment = {"PATH": "", "PYTHONPATH": ":".join(p for p in sys.path if p)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_backend_is_judged_by_its_numbers(device, monkeypatch):
    q = torch.randn(1, 2, 9, 2, 8, device=device)
    with torch.no_grad():
        want = attention.spatial_attention(q, q, q)
        attention.probe.cache_clear()
        sdpa = attention._backends["sdpa"]
        monkeypatch.setitem(attention._backends, "sdpa", lambda *args: sdpa(*args) * 1.01)
        with pytest.warns(UserWarning, match="attention without SDPA on .*: the output differs from its reference by"):
            got = attention.spatial_attention(q, q, q)
    assert torch.allclose(got, want, atol=1e-6)
    report = {entry["backend"]: entry for entry in attention.report(device, torch.float32)}
    assert not report["sdpa"]["works"] and not report["sdpa"]["used"] and "differs" in report["sdpa"]["reason"]


@pytest.mark.parametrize("problem, reason", [(RuntimeError("no kernel\nmore"), "no kernel"), (KeyError(), "KeyError")])
def test_a_backend_that_refuses_says_why(problem, reason, device, monkeypatch):
    def refuse(*args):
        raise problem
    monkeypatch.setitem(attention._backends, "sdpa", refuse)
    assert attention.probe("sdpa", device, torch.float32, 8, False, False) == reason


def test_wrong_gradients_are_seen(device, monkeypatch):
    sdpa = attention._backends["sdpa"]
    monkeypatch.setitem(attention._backends, "sdpa", lambda q, k, v, mask: sdpa(q, k.detach() * 0.9 + k * 0.1, v, mask))
    assert attention.probe("sdpa", device, torch.float32, 8, True, False) is None
    assert "gradient of k" in attention.probe("sdpa", device, torch.float32, 8, True, True)


def test_an_added_backend_comes_before_the_products(device, monkeypatch):
    monkeypatch.setattr(attention, "_backends", dict(attention._backends))
    attention.add_backend("mine", attention._products)
    assert list(attention._backends)[-2:] == ["mine", "products"]
    monkeypatch.setitem(attention._backends, "sdpa", lambda *args: args[0] * float("nan"))
    monkeypatch.setitem(attention._backends, "xformers", lambda *args: args[0] * float("nan"))
    assert {e["backend"]: e["used"] for e in attention.report(device, torch.float32)}["mine"]
