"""The guard against numbers that are none: alike on all ranks, counted as it was, and not afraid of a healthy run."""

import json
import math
import random
import threading

import pytest

from engine.errors import NumericError
from engine.training.guards import SpikeGuard
from engine.training.ranks import Ranks

NAN, INF = math.nan, math.inf


class Threads(Ranks):
    """Two ranks in one process."""

    world = 2

    def __init__(self, rank, barrier, values):
        self.rank, self.meet, self.values = rank, barrier, values

    def gather(self, value):
        self.values[self.rank] = value
        self.meet.wait(10)
        values = list(self.values)
        self.meet.wait(10)
        return values


class Engine:
    """What the guard is promised of one: it takes no step that is to be skipped, or whose norm is not finite."""

    def __init__(self):
        self.weights = 0

    def step(self, norm, skip):
        self.weights += not skip and math.isfinite(norm)
        return norm


def train(losses, norms, guard=None, ranks=None):
    """A run of these steps -> (weights after each step, guard, error)."""
    guard, engine, weights = guard or SpikeGuard(ranks), Engine(), []
    try:
        for loss, norm in zip(losses, norms):
            applied = guard.applied(engine.step(norm, guard.skip(loss)))
            assert applied == (engine.weights != (weights[-1] if weights else 0))
            weights.append(engine.weights)
    except NumericError as error:
        return weights, guard, error
    return weights, guard, None


def train_pair(losses, norms):
    """losses, norms: a list for each rank."""
    barrier, values, answers = threading.Barrier(2), [None, None], [None, None]

    def run(rank):
        answers[rank] = train(losses[rank], norms[rank], ranks=Threads(rank, barrier, values))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return answers


BAD = {"NaN loss": (NAN, 1.0, "loss of rank {} is nan"), "Inf loss": (INF, 1.0, "loss of rank {} is inf"),
       "-Inf loss": (-INF, 1.0, "loss of rank {} is -inf"), "spike": (1000.0, 1.0, "times the running median"),
       "NaN norm": (1.0, NAN, "gradient norm of rank 0"), "Inf norm": (1.0, INF, "gradient norm of rank 0")}


@pytest.mark.fault
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_step_is_skipped_and_counted_on_all_ranks(kind, rank):
    loss, norm, reason = BAD[kind]
    losses, norms = [[1.0] * 26, [1.0] * 26], [[1.0] * 26, [1.0] * 26]
    for step in (20, 22, 23, 25):                                      # never three in a row
        losses[rank][step] = loss
        norms[0][step] = norms[1][step] = norm                         # the norm is that of all ranks
    for weights, guard, error in train_pair(losses, norms):
        assert error is None and weights == [*range(1, 21), 20, 21, 21, 21, 22, 22]
        assert (guard.applied_steps, guard.skipped_steps, guard.bad_in_row) == (22, 4, 1)
        assert reason.format(rank) in guard.reason                     # rank 0 can tell of rank 1's


@pytest.mark.fault
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", BAD)
def test_three_in_a_row_end_the_run_on_all_ranks(kind, rank):
    loss, norm, reason = BAD[kind]
    losses, norms = [[1.0] * 30, [1.0] * 30], [[1.0] * 30, [1.0] * 30]
    losses[rank][21:] = [loss] * 9
    norms[0][21:] = norms[1][21:] = [norm] * 9
    for weights, guard, error in train_pair(losses, norms):
        assert weights == [*range(1, 22), 21, 21] and (guard.applied_steps, guard.skipped_steps) == (21, 3)
        assert error.exit_code == 6 and reason.format(rank) in str(error) and "\n" not in str(error)


def test_different_faults_in_a_row_count_together():
    weights, guard, error = train([1.0] * 20 + [NAN, 1.0, 1e4], [1.0] * 21 + [INF, 1.0])
    assert len(weights) == 22 and guard.skipped_steps == 3 and error is not None


def test_ranks_that_disagree_stop_at_once():
    for _, _, error in train_pair([[1.0] * 3] * 2, [[1.0, 1.0, 1.0], [1.0, NAN, 1.0]]):
        assert "rank 1 is not finite and of rank 0 is" in str(error)


def test_the_loss_that_counts_is_the_sum():
    def spikes(share):                                                 # each rank's part is small beside what the other's was
        return [guard.skipped_steps for _, guard, _ in train_pair([[1.0] * 20 + [share]] * 2, [[1.0] * 21] * 2)]
    assert spikes(9.0) == [0, 0] and spikes(11.0) == [1, 1]


def test_a_spike_is_not_what_the_next_is_measured_by():
    weights, guard, _ = train([1.0] * 20 + [1e4, 1.0, 1e4, 1.0, 1e3, 1.0, 30.0], [1.0] * 27)
    assert guard.skipped_steps == 4 and max(guard.accepted) == 1.0


@pytest.mark.parametrize("seed", range(10))
def test_a_healthy_run_is_left_alone(seed):
    """The error of a prediction of x spans about three decades over the noise levels; a draw's own factor of 2 comes on top."""
    draw = random.Random(seed)
    losses = [10 ** (-4 + 3 * draw.random()) * 2 ** draw.uniform(-1, 1) for _ in range(300)]
    _, guard, error = train(losses, [1.0] * 300)
    assert error is None and guard.skipped_steps <= 1
    losses[150] = 1000 * sorted(losses)[150]
    assert train(losses, [1.0] * 300)[1].skipped_steps == guard.skipped_steps + 1


def test_a_loss_of_zero_is_no_reason():
    assert train([0.0] * 20, [0.0] * 20)[1].skipped_steps == 0


def test_a_resumed_guard_judges_as_an_unbroken_one():
    draw = random.Random(3)
    losses = [draw.choice([1.0, 1.0, 1.0, 3.0, 30.0, NAN]) * draw.random() for _ in range(60)]
    for cut in range(0, 60, 7):
        weights, whole, error = train(losses, [1.0] * 60)
        _, first, early = train(losses[:cut], [1.0] * 60)
        if early is not None:
            break
        second = SpikeGuard()
        second.restore(json.loads(json.dumps(first.state())))
        rest, second, end = train(losses[cut:], [1.0] * 60, guard=second) if cut else (weights, whole, error)
        assert second.state() == whole.state() and str(end) == str(error)
        assert [w + (weights[cut - 1] if cut else 0) for w in rest] == weights[cut:] or cut == 0
