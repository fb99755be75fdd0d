"""The optimizer of finetuning: that small updates of 16-bit weights count, and that saving memory changes no bit of them."""

import pytest
import torch

from engine.config import FinetuneConfig
from engine.errors import ConfigError, WeightsError
from engine.models.unet import VideoUNet
from engine.training.finetune_optimizer import FinetuneOptimizer, round_
from engine.training.plain_engine import PlainEngine, offload_hooks

LR, STEPS, N = 6e-6, 20, 100_000
CPU = torch.device("cpu")


def weight(dtype):
    """As wide a spread as a convolution of the paper's base has: 3 x 3 kernels over 768 channels."""
    return (torch.randn(N, generator=torch.Generator().manual_seed(1)) * 0.012).bfloat16().to(dtype)


def gradients(noise: float):
    generator = torch.Generator().manual_seed(2)
    direction = torch.randn(N, generator=generator)
    return [(direction + noise * torch.randn(N, generator=generator)).bfloat16() for _ in range(STEPS)]


def moved(dtype, noise=0.0, **changes):
    """The total update of 20 steps, fp32."""
    start = weight(dtype)
    p = torch.nn.Parameter(start.clone())
    optimizer = FinetuneOptimizer({"w": p}, FinetuneConfig(**changes))
    for gradient in gradients(noise):
        p.grad = gradient.to(dtype).clone()
        optimizer.step(1.0, LR)
    return optimizer.masters.get("w", p.detach()).float() - start.float()


def likeness(a, b):
    """Cosine, and how much of b is in a."""
    return torch.cosine_similarity(a, b, dim=0).item(), ((a @ b) / (b @ b)).item()


@pytest.mark.parametrize("optimizer", ["adamw", "fused", "adamw8bit"])
def test_updates_reach_bf16_weights(optimizer):
    wanted = moved(torch.float32)
    cosine, part = likeness(moved(torch.bfloat16, optimizer=optimizer), wanted)
    assert cosine >= 0.99 and 0.97 < part < 1.03
    # naive bf16, as PyTorch's AdamW does it, for comparison
    p = torch.nn.Parameter(weight(torch.bfloat16))
    plain = torch.optim.AdamW([p], lr=LR, weight_decay=0.0)
    for gradient in gradients(0.0):
        p.grad = gradient.clone()
        plain.step()
    cosine, part = likeness(p.detach().float() - weight(torch.float32), wanted)
    assert cosine < 0.4 and part < 0.2


@pytest.mark.parametrize(("noise", "least"), [(0.0, 0.95), (1.0, 0.87)])
def test_stochastic_rounding_is_right_on_average(noise, least):
    """A single weight can only be where bf16 has a number, so 20 steps of a tenth of a spacing have a limit; the mean is exact."""
    wanted = moved(torch.float32, noise)
    cosine, part = likeness(moved(torch.bfloat16, noise, master="stochastic"), wanted)
    assert cosine > least and abs(part - 1) < 0.01
    several = sum(moved(torch.bfloat16, noise, master="stochastic", seed=seed) for seed in range(8)) / 8
    assert likeness(several, wanted)[0] > 0.98


def test_rounding_is_unbiased_and_has_an_address():
    value = torch.full((1 << 16,), 1 + 0.3 / 128)                           # 0.3 of the way between two numbers
    for step in (0, 1, 17):
        out = torch.empty(value.shape, dtype=torch.bfloat16)
        round_(out, value, 5, step)
        assert set(out.float().unique().tolist()) == {1.0, 1 + 1 / 128}
        assert abs((out > 1).float().mean().item() - 0.3) < 0.01
    again, other = torch.empty_like(out), torch.empty_like(out)
    round_(again, value, 5, 17)
    round_(other, value, 6, 17)
    assert torch.equal(out, again) and not torch.equal(out, other)
    exact = torch.randn(1000).bfloat16()
    round_(kept := torch.empty_like(exact), exact.float(), 0, 3)
    assert torch.equal(kept, exact)
    negative = torch.empty_like(out)
    round_(negative, -value, 5, 17)
    assert abs((negative < -1).float().mean().item() - 0.3) < 0.01


@pytest.mark.parametrize("optimizer", ["adamw", "fused"])
def test_it_is_pytorchs_adamw_to_the_last_bit(optimizer):
    torch.manual_seed(0)
    shapes = {"a": (8, 4, 3, 3), "b": (8,), "c": (16, 8)}
    params = {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    params["a"].data = params["a"].data.contiguous(memory_format=torch.channels_last)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params.values()]
    settings = dict(betas=(0.9, 0.99), eps=1e-7, weight_decay=0.01)
    ours = FinetuneOptimizer(params, FinetuneConfig(optimizer=optimizer, **settings))
    theirs = torch.optim.AdamW(twins, lr=1e-2, foreach=False, fused=optimizer == "fused", **settings)
    for _ in range(5):
        for p, twin in zip(params.values(), twins):
            # in the weight's layout: PyTorch's fused step on the CPU pairs the wrong numbers where they differ, and ours must not
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape))
            twin.grad = p.grad.clone()
            p.grad = p.grad.contiguous()
        ours.step(1.0, 1e-2)
        theirs.step()
    assert all(torch.equal(p, twin) for p, twin in zip(params.values(), twins))


def test_8_bit_moments_pair_the_right_numbers_in_channels_last():
    torch.manual_seed(0)
    start, gradient = torch.randn(64, 32, 3, 3), torch.randn(64, 32, 3, 3)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        p = torch.nn.Parameter(start.clone().contiguous(memory_format=layout))
        optimizer = FinetuneOptimizer({"w": p}, FinetuneConfig(optimizer="adamw8bit"))
        for _ in range(3):
            p.grad = gradient.clone()                                       # not in the weight's layout
            optimizer.step(1.0, 1e-2)
        found.append((p - start).detach().flatten())
        assert optimizer.state["w"]["first"].dtype == torch.uint8
    assert likeness(*found)[0] > 0.999


@pytest.fixture
def engine(tiny):
    from engine.cascade_folder import read_index

    stage = read_index(tiny).stage("base")

    def make(dtype=torch.bfloat16, **changes):
        engine = PlainEngine(lambda: VideoUNet(stage.unet), tiny / "base", FinetuneConfig(**changes), CPU, dtype)

        def loss(seed):
            generator = torch.Generator().manual_seed(seed)
            z = torch.randn(2, 4, 8, 12, 3, generator=generator)
            out = engine.network(z, torch.rand(2, generator=generator), torch.randn(2, 3, 128, generator=generator),
                                 torch.ones(2, 3, dtype=torch.bool), independent_frames=torch.tensor([False, True]))
            return out.square().mean()

        engine.loss = loss
        return engine

    return make


def bits(engine):
    return {name: value.clone() for name, value in engine.optimizer.state_tensors()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def train(engine, steps=3, lr=1e-3, first=0):
    norms = []
    for seed in range(first, first + steps):
        engine.backward(engine.loss(seed))
        norms.append(engine.step(lr))
    return norms


@pytest.mark.parametrize("changes", [{}, {"optimizer": "fused"}, {"master": "stochastic"}, {"optimizer": "adamw8bit", "clip": 0.01},
                                     {"gradient_checkpointing": True, "clip": 0.01}], ids=str)
def test_in_backward_is_the_plain_step(engine, changes):
    plain, frugal = engine(**changes), engine(in_backward=True, **changes)
    before = bits(plain)
    assert train(plain) == train(frugal)
    assert same(bits(plain), bits(frugal)) and not same(before, bits(plain))
    assert all(p.grad is None for p in frugal.module.parameters())


def test_in_backward_never_holds_two_gradients(engine):
    frugal = engine(in_backward=True)
    held, update = [], frugal.optimizer.update

    def watched(*args):
        held.append(sum(p.grad is not None for p in frugal.module.parameters()))
        return update(*args)

    frugal.optimizer.update = watched
    train(frugal, 1)
    assert len(held) == len(frugal.optimizer.params) and max(held) == 0


def test_recomputing_changes_nothing(engine):
    plain, frugal = engine(torch.float32), engine(torch.float32, gradient_checkpointing=True)
    assert train(plain) == train(frugal) and same(bits(plain), bits(frugal))


def test_offloading_changes_nothing(engine):
    plain, frugal = engine(), engine(activation_offload=True)
    assert train(plain) == train(frugal) and same(bits(plain), bits(frugal))
    pack, unpack = offload_hooks(CPU, set())
    x = torch.randn(3)
    assert unpack(pack(x)) is x                                             # nowhere to go


def test_clipping_is_of_the_whole_norm(engine):
    clipped = engine(torch.float32, clip=1e-3)
    clipped.backward(clipped.loss(0))
    gradients = [p.grad.clone() for p in clipped.module.parameters()]
    norm = torch.nn.utils.get_total_norm(gradients).item()
    assert clipped.step(1e-3) == pytest.approx(norm, rel=1e-5) and norm > 1e-2
    first = clipped.optimizer.state                                         # after one step: (1 - beta1) * what was applied
    applied = torch.stack([state["first"].norm() for state in first.values()]).norm().item() / 0.1
    assert applied == pytest.approx(1e-3, rel=1e-4)


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("how", ["nan", "skip"])
def test_a_bad_step_changes_no_bit(engine, in_backward, how):
    run = engine(in_backward=in_backward)
    train(run, 1)
    before = bits(run)
    run.backward(run.loss(1) * (float("nan") if how == "nan" else 1.0))
    norm = run.step(1e-3, skip=how == "skip")
    assert (norm != norm) == (how == "nan") and same(before, bits(run))
    after, whole = train(run, 1, first=2), engine(in_backward=in_backward)
    train(whole, 1)
    assert train(whole, 1, first=2) == after and same(bits(run), bits(whole))   # as if it had not been


@pytest.mark.parametrize("changes", [{}, {"optimizer": "adamw8bit"}, {"master": "stochastic"}], ids=str)
def test_a_saved_state_goes_on_bit_for_bit(engine, tmp_path, changes, monkeypatch):
    monkeypatch.setattr("engine.training.plain_engine.FILE_BYTES", 20_000)   # several files
    whole = engine(**changes)
    train(whole, 2)
    whole.save(tmp_path)
    assert len(list(tmp_path.iterdir())) > 3
    again = engine(**changes)
    again.load(tmp_path)
    assert same(bits(whole), bits(again))
    assert train(whole, 2, first=2) == train(again, 2, first=2) and same(bits(whole), bits(again))
    (tmp_path / "state-1.safetensors").unlink()
    with pytest.raises(WeightsError, match="missing"):
        again.load(tmp_path)


def test_weights_are_the_masters(engine):
    run = engine()
    train(run, 1, lr=1e-6)
    found = dict(run.weights())
    assert all(value.dtype == torch.float32 and torch.equal(value, run.optimizer.masters[name]) for name, value in found.items())
    assert any(not torch.equal(value, run.optimizer.params[name].float()) for name, value in found.items())


def test_refusals(engine):
    with pytest.raises(ConfigError, match="stochastic"):
        engine(torch.float16, master="stochastic")
    with pytest.raises(ValueError, match="in_backward: want accumulate 1"):
        FinetuneConfig(in_backward=True, accumulate=2)
