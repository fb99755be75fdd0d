"""How an op is judged: against its definition in fp64, allowed twice the error that PyTorch's own formulation makes in the op's format."""

import pytest
import torch


def gradients(op, inputs, seed):
    """(output, [gradient of every floating-point input]) for one fixed gradient of the output."""
    inputs = [x.detach().clone().requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs]
    out = op(*inputs)
    dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(out.device, out.dtype)
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

    def make(*shape, dtype=torch.float32, device="cpu"):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)
    return make


@pytest.fixture
def poisoned(monkeypatch):
    """Every uninitialised tensor of the test is full of NaN: an element that a kernel forgets to write cannot pass for a zero."""
    def poison(make):
        def made(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out
        return made
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture
def triton(monkeypatch):
    """The doors take their Triton path, on the GPU or in the interpreter, and raise where they cannot."""
    monkeypatch.setenv("DREAMIX_KERNELS", "triton")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch, device):
    """It cuts fp32 off to bf16, where a GPU rounds to the nearest: here it rounds too. And most of its time goes into preparing
    triton.language for every function that a kernel calls, at every call (the kernel's own preparation will do, and one of each of
    Triton's modules), and into looking for integers that overflow (these are small)."""
    if device.type == "cuda":
        return
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    import dataclasses

    import numpy
    import triton.language as tl

    cast = interpreter.InterpreterBuilder.cast_impl

    def rounded(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            near = torch.from_numpy(numpy.ascontiguousarray(src.data)).bfloat16().view(torch.int16).numpy().view(numpy.uint16)
            return interpreter.TensorHandle(near, tl.bfloat16)
        return cast(self, src, dst_type)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", rounded)

    call, prepared = interpreter.InterpretedFunction.__call__, set()

    def called(self, *args, **kwargs):
        module = self.fn.__module__
        if module.startswith("dreamix_kernels.") or module in prepared:
            return self.rewrite()(*args, **kwargs)
        prepared.add(module)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", called)
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
