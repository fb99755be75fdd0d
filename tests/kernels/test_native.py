"""The CPU's C++ kernels: forward without gradients, their compilation, and what happens where there is no compiler."""

import os
import shutil
import stat
import subprocess
import sys
import warnings

import pytest
import torch

from dreamix_kernels import dispatch, group_norm_silu, native, temporal_attention

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="there is no GNU C++ compiler")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A machine that has compiled nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(dispatch, "_verdicts", {})
    native.library.cache_clear()
    yield tmp_path
    native.library.cache_clear()


def attend(q, k, v, bias):
    scores = torch.einsum("bshwnd,bthwnd->bhwnst", q, k) * q.shape[-1] ** -0.5 + bias
    return torch.einsum("bhwnst,bthwnd->bshwnd", torch.softmax(scores, -1), v)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1, 1), (2, 3, 2, 2, 3, 5), (1, 16, 4, 5, 3, 32), (1, 15, 1, 3, 1, 64), (1, 17, 2, 3, 2, 40),
                                   (2, 33, 1, 2, 2, 128), (1, 128, 1, 2, 1, 16)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_is_exact_without_gradients(shape, dtype, randn, poisoned):
    q, k, v = randn(*shape[:4], 3, *shape[4:], dtype=dtype).unbind(4)
    bias = randn(shape[4], shape[1], shape[1])
    assert native.can_attend(q, k, v)
    with torch.no_grad():
        ours, want = temporal_attention(q, k, v, bias), attend(q.double(), k.double(), v.double(), bias.double())
        theirs = attend(q, k, v, bias.to(dtype))
        unit = torch.finfo(dtype).eps * want.abs().max()
        assert (ours.double() - want).abs().max() <= 2 * (theirs.double() - want).abs().max() + unit
        assert torch.equal(ours, temporal_attention(q, k, v, bias))
        apart = temporal_attention(q.contiguous(), k.clone(), v.contiguous(), bias)            # other strides, the same arithmetic
        assert torch.equal(apart, ours)


def test_attention_survives_large_scores(randn):
    qkv = randn(1, 9, 1, 2, 3, 2, 8)
    qkv[:, :, :, :, 0] *= 1e4
    q, k, v = qkv.unbind(4)
    assert native.can_attend(q, k, v)
    with torch.no_grad():
        out = temporal_attention(q, k, v, torch.zeros(2, 9, 9))
    assert torch.allclose(out, attend(q.double(), k.double(), v.double(), torch.zeros(2, 9, 9).double()).float(), atol=1e-4)


def test_heads_may_lie_anywhere(randn):
    heads_first = randn(3, 2, 4, 2, 5, 3, 8)                                # [heads, B, T, H, W, 3, d]
    q, k, v = heads_first.permute(1, 2, 3, 4, 5, 0, 6).unbind(4)
    bias = randn(q.shape[4], q.shape[1], q.shape[1])
    assert native.can_attend(q, k, v) and q.stride(4) != q.shape[5]
    with torch.no_grad():
        assert torch.equal(temporal_attention(q, k, v, bias), temporal_attention(*(x.contiguous() for x in (q, k, v)), bias))


def test_a_nan_stays_in_its_pixel(randn):
    qkv = randn(1, 5, 2, 2, 3, 2, 8)
    clean = qkv.clone()
    qkv[0, 3, 1, 0] = float("nan")
    with torch.no_grad():
        hurt, fine = (temporal_attention(*x.unbind(4), torch.zeros(2, 5, 5)) for x in (qkv, clean))
    differs = ~torch.isclose(hurt, fine, rtol=0, atol=0)
    assert hurt[0, :, 1, 0].isnan().all() and differs.any(1)[0].flatten(-2).any(-1).tolist() == [[False, False], [True, False]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_has_the_same_bits_on_any_number_of_threads(dtype, randn):
    q, k, v = randn(1, 16, 7, 9, 3, 2, 32, dtype=dtype).unbind(4)
    bias, threads, runs = randn(2, 16, 16), torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            with torch.no_grad():
                runs.append(temporal_attention(q, k, v, bias))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C, groups", [(1, 1), (20, 5), (48, 8), (96, 8)])
def test_the_norm_takes_statistics_from_outside(C, groups, dtype, randn, poisoned):
    x, weight, bias = randn(3, 5, 7, C, dtype=dtype), randn(C, dtype=dtype), randn(C, dtype=dtype)
    parts = x.float().view(3, 35, groups, -1)
    stats = torch.stack([parts.mean((1, 3)), parts.var((1, 3), unbiased=False)], -1)
    with torch.no_grad():
        own, given = (group_norm_silu(x, groups, weight, bias, stats=s) for s in (None, stats))
        assert torch.allclose(own.float(), given.float(), atol=16 * torch.finfo(dtype).eps, rtol=0)
        doubled = group_norm_silu(x, groups, weight, bias, stats=stats * torch.tensor([1.0, 4.0]))
        assert C == 1 or not torch.allclose(doubled.float(), own.float(), atol=0.05)


def test_bf16_is_fp32_rounded_once(randn):
    """The arithmetic is the same; only loads and stores differ."""
    x, weight, bias = randn(2, 5, 7, 24, dtype=torch.bfloat16), randn(24, dtype=torch.bfloat16), randn(24, dtype=torch.bfloat16)
    q, k, v = randn(1, 16, 2, 3, 3, 2, 32, dtype=torch.bfloat16).unbind(4)
    table = randn(2, 16, 16)
    with torch.no_grad():
        assert torch.equal(group_norm_silu(x, 8, weight, bias), group_norm_silu(x.float(), 8, weight.float(), bias.float()).bfloat16())
        qkv = torch.stack([q, k, v], 4).float().unbind(4)
        assert torch.equal(temporal_attention(q, k, v, table), temporal_attention(*qkv, table).bfloat16())


def norm_once():
    return group_norm_silu(torch.ones(1, 2, 2, 4), 2, torch.ones(4), torch.zeros(4))


def test_compiles_once_and_leaves_one_file(fresh):
    norm_once()
    files = list((fresh / "cache" / "dreamix").iterdir())
    assert len(files) == 1 and files[0].suffix == ".so"
    before = files[0].stat().st_mtime_ns
    native.library.cache_clear()
    native.library()
    assert files[0].stat().st_mtime_ns == before


def test_several_processes_may_compile_at_once(fresh):
    code = "from dreamix_kernels import native; native.library()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    running = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
    assert [process.wait(200) for process in running] == [0, 0, 0]
    assert len(list((fresh / "cache" / "dreamix").iterdir())) == 1


def test_no_compiler_is_no_fault(fresh, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        norm_once()
    entry = next(e for e in dispatch.report(torch.device("cpu"), torch.float32) if e["kernel"] == "group_norm_silu")
    assert entry == {"kernel": "group_norm_silu", "implementation": "torch", "reason": "there is no GNU C++ compiler"}


@pytest.mark.parametrize("says", ["Apple clang version 17", "clang version 21"])
def test_clang_is_no_compiler_of_ours(says, fresh, monkeypatch):
    script = fresh / "c++"
    script.write_text(f"#!/bin/sh\necho '{says}'\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(RuntimeError, match="no GNU C\\+\\+ compiler"):
        native.library()


def test_the_compiler_may_have_arguments(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "env g++")
    native.library()


def test_a_cache_that_cannot_be_written_is_no_fault(fresh, monkeypatch):
    (fresh / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh / "file"))
    monkeypatch.setattr(native.tempfile, "gettempdir", lambda: str(fresh))
    native.library()
    assert len(list((fresh / f"dreamix-{os.getuid()}").glob("*.so"))) == 1


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_is_not_ours(default, randn):
    x, weight, bias = randn(2, 5, 7, 24), randn(24), randn(24)
    q, k, v = randn(1, 16, 2, 3, 3, 2, 32).unbind(4)
    table = randn(2, 16, 16)

    def run():
        with torch.no_grad():
            return group_norm_silu(x, 8, weight, bias), temporal_attention(q, k, v, table)
    want = run()
    torch.set_default_dtype(default)
    try:
        got = run()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, got, want))


def test_a_broken_compiler_is_told_once(fresh, monkeypatch):
    script = fresh / "c++"
    script.write_text("#!/bin/sh\ncase $1 in --version) echo 1;; *) echo 'no such option' >&2; exit 1;; esac\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(script))
    with pytest.warns(UserWarning, match=r"group_norm_silu runs in PyTorch on cpu .*: c\+\+ failed: no such option$") as told:
        norm_once()
        norm_once()
    assert len(told) == 1 and not list((fresh / "cache" / "dreamix").iterdir())


def test_a_kernel_that_lies_is_left_out(fresh, monkeypatch):
    right = native.norm_forward
    monkeypatch.setattr(native, "norm_forward", lambda *args: (right(*args)[0] * 1.01, right(*args)[1]))
    with pytest.warns(UserWarning, match="group_norm_silu runs in PyTorch on cpu .* differs from its reference"):
        ours = norm_once()
    monkeypatch.setenv("DREAMIX_KERNELS", "torch")
    assert torch.equal(ours, norm_once())
