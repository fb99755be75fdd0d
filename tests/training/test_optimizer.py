"""The optimizer against what it says it is: orthogonal updates, AdamW, an average, and masters that remember small steps."""

import pytest
import torch
from torch import nn

from engine.training.optimizer import MasterWeights, orthogonalise


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def network(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.ModuleDict({"stem": nn.Linear(5, 7), "inside": nn.Linear(7, 6), "conv": nn.Conv1d(6, 4, 3), "head": nn.Linear(4, 2)})
    return model.to(dtype)


def gradients(model, seed):
    g = generator(seed)
    return {name: torch.randn(p.shape, generator=g) for name, p in model.named_parameters()}


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 8, 40), (2, 64, 12)])
def test_orthogonalise(shape):
    """All singular values near 1, whatever they were; the singular vectors, and so the direction, are kept."""
    x = torch.randn(shape, generator=generator()) * torch.logspace(-4, 3, shape[0])[:, None, None]
    y = orthogonalise(x)
    values = torch.linalg.svdvals(y.float())
    assert y.shape == x.shape and y.dtype == x.dtype
    assert values.min() > 0.3 and values.max() < 1.35 and 0.7 < values.mean() < 1.15, values
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    exact = u @ vt
    cosine = (y * exact).flatten(1).sum(1) / (y.flatten(1).norm(dim=1) * exact.flatten(1).norm(dim=1))
    assert cosine.min() > 0.9, cosine


def test_orthogonalise_takes_each_matrix_by_itself():
    x = torch.randn(3, 6, 9, generator=generator())
    torch.testing.assert_close(orthogonalise(x)[1:2], orthogonalise(x[1:2] * 100), rtol=0, atol=0.05)
    assert torch.isfinite(orthogonalise(torch.zeros(1, 4, 4))).all()


def test_which_parameters_are_muons():
    optimizer = MasterWeights(network(), 0.9)
    inside = {name for names in optimizer.groups.values() for name in names}
    assert inside == {"inside.weight", "conv.weight"} and inside.isdisjoint(optimizer.second)
    assert not MasterWeights.uses_muon("up.0.0.temporal.position_bias.table", torch.zeros(4, 7))


def test_adam_path_is_torchs():
    model, twin = network(), network()
    optimizer = MasterWeights(model, 0.9)
    names = list(optimizer.second)
    theirs = torch.optim.AdamW([p for name, p in twin.named_parameters() if name in names], betas=(0.9, 0.99), eps=1e-8, weight_decay=0)
    for step in range(20):
        given = gradients(model, step)
        rate = 3e-3 * (1 - step / 40)
        optimizer.step(given, 0.0, rate)
        for name, p in twin.named_parameters():
            p.grad = given[name].clone()
        theirs.param_groups[0]["lr"] = rate
        theirs.step()
    wanted = dict(twin.named_parameters())
    assert names
    for name in names:
        torch.testing.assert_close(optimizer.master[name], wanted[name].detach(), rtol=0, atol=1e-6)


def test_muon_path():
    """Nesterov momentum, orthogonalised, scaled by 0.2 sqrt(longer side); a conv's kernel is a matrix of outputs x everything else."""
    model = network()
    optimizer = MasterWeights(model, 0.9)
    start = {name: p.clone() for name, p in optimizer.master.items()}
    moment = {"inside.weight": 0.0, "conv.weight": 0.0}
    for step in range(3):
        given = gradients(model, step)
        optimizer.step(given, 1e-2, 0.0)
        for name in moment:
            moment[name] = 0.95 * moment[name] + given[name]
            flat = (given[name] + 0.95 * moment[name]).flatten(1)
            start[name] = start[name] - 1e-2 * 0.2 * max(flat.shape) ** 0.5 * orthogonalise(flat[None])[0].view_as(start[name])
            torch.testing.assert_close(optimizer.master[name], start[name], rtol=0, atol=2e-5)
    assert all(torch.equal(optimizer.master[name], start[name]) for name in optimizer.second)         # adam's rate was 0


def test_no_weight_decay():
    """A weight whose gradient stays zero does not move: under a loss that leaves it unused it keeps what it knew."""
    model = network()
    optimizer = MasterWeights(model, 0.9)
    before = {name: p.clone() for name, p in optimizer.master.items()}
    for _ in range(3):
        optimizer.step({name: torch.zeros_like(p) for name, p in optimizer.master.items()}, 1e-2, 1e-2)
    assert all(torch.equal(before[name], p) for name, p in optimizer.master.items())


def test_average_is_the_closed_form():
    """ema_n = d_n ema_{n-1} + (1 - d_n) w_n with d_n = min(ema, (1 + n) / (10 + n))."""
    model = network()
    optimizer = MasterWeights(model, 0.3)
    average = {name: p.double() for name, p in optimizer.master.items()}
    decays = []
    for step in range(1, 9):
        optimizer.step(gradients(model, step), 1e-2, 1e-2)
        decays.append(min(0.3, (1 + step) / (10 + step)))
        average = {name: decays[-1] * value + (1 - decays[-1]) * optimizer.master[name].double() for name, value in average.items()}
        for name, value in average.items():                                       # at every step: an average forgets how it began
            torch.testing.assert_close(optimizer.ema[name].double(), value, rtol=0, atol=1e-6)
    assert decays[0] < 0.3 == decays[-1]                                          # both sides of the min were met


def test_masters_keep_what_bf16_would_round_away():
    model = network(torch.bfloat16)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    optimizer = MasterWeights(model, 0.9)
    ones = {name: torch.ones_like(p) for name, p in optimizer.master.items()}
    for _ in range(100):
        optimizer.step(ones, 0.0, 1e-4)                                           # bf16 near 1 has steps of 4e-3: each alone is lost
    assert (torch.tensor(1.0, dtype=torch.bfloat16) - torch.tensor(1e-4, dtype=torch.bfloat16)) == 1
    moved = dict(model.named_parameters())["head.bias"]
    torch.testing.assert_close(optimizer.master["head.bias"], torch.full((2,), 1 - 100 * 1e-4), rtol=0, atol=1e-5)
    assert moved.dtype == torch.bfloat16 and (moved < 1).all()
    torch.testing.assert_close(moved.detach(), optimizer.master["head.bias"].bfloat16(), rtol=0, atol=0)


def test_state_round_trip():
    """Half of the steps, the state carried over to a fresh model, the other half: the same bits as in one go."""
    whole, first, second = (MasterWeights(network(torch.bfloat16), 0.9) for _ in range(3))
    with torch.no_grad():
        for p in second.master.values():
            p.zero_()
    for step in range(6):
        whole.step(gradients(whole.model, step), 1e-2, 1e-2)
    for step in range(3):
        first.step(gradients(first.model, step), 1e-2, 1e-2)
    state = {name: value.clone() for name, value in first.state_dict().items()}
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    second.load_state_dict(state)
    assert second.step_count == 3
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters()))
    for step in range(3, 6):
        second.step(gradients(second.model, step), 1e-2, 1e-2)
    a, b = whole.state_dict(), second.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
