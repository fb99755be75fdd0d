"""ZeRO-3 over two ranks, through the real launcher: what one process computes, what it keeps, how it ends (zero_ranks.py runs there)."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

RANKS = Path(__file__).with_name("zero_ranks.py")
spec = importlib.util.spec_from_file_location("zero_ranks", RANKS)
zero_ranks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(zero_ranks)
ALPHAS, ROOT, STEPS = zero_ranks.ALPHAS, zero_ranks.ROOT, zero_ranks.STEPS


def launcher(job: str, tiny: Path, out: Path) -> subprocess.Popen:
    """`deepspeed` with two ranks, in a session of its own and with a port of its own."""
    zero_ranks.write_settings(out)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", "2", "--master_port", str(port), RANKS, job, tiny, out]
    return subprocess.Popen([str(part) for part in command], env=environment, cwd=out, start_new_session=True, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def session(sid: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(its) == sid and state != "Z":
            found.append(int(path.parent.name))
    return found


def launched(job: str, tiny: Path, out: Path) -> tuple[Path, list[dict]]:
    process = launcher(job, tiny, out)
    try:
        said, _ = process.communicate(timeout=280)
        assert process.returncode == 0, said[-4000:]
        deadline = time.monotonic() + 5
        while (left := session(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left
    finally:
        for pid in session(process.pid):
            os.kill(pid, signal.SIGKILL)
    return out, [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def short(tiny, tmp_path_factory):
    pytest.importorskip("deepspeed")
    return launched("short", tiny, tmp_path_factory.mktemp("zero"))


@pytest.fixture(scope="module")
def long(tiny, tmp_path_factory):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("deepspeed")
    return launched("long", tiny, tmp_path_factory.mktemp("zero"))


def distance(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def same_bits(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def in_one_process(tiny, stage, steps=range(STEPS), skip=(), **changes):
    from engine.training.plain_engine import PlainEngine

    config = zero_ranks.settings_of(**changes)
    build, folder, objective, data = zero_ranks.task(tiny, stage, config)
    engine = PlainEngine(build, folder, config, torch.device("cpu"), torch.float32)
    record = zero_ranks.advance(engine, config, objective, data, steps, skip=skip)
    return record, zero_ranks.all_weights(engine)


def by_the_book(tiny, stage, **changes) -> dict:
    """No engine at all: one sample a pass, torch's clipping, torch's AdamW."""
    from engine.training.objective import units

    config = zero_ranks.settings_of(**changes)
    build, folder, objective, data = zero_ranks.task(tiny, stage, config)
    network = build()
    network.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    optimizer = torch.optim.AdamW(network.parameters(), config.lr, config.betas, config.eps, config.weight_decay)
    for step in range(STEPS):
        optimizer.zero_grad()
        for unit in units(config, stage, step):
            (unit.weight * objective.errors(network, objective.batch([unit], data, step)).sum()).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip)
        optimizer.step()
    return {name: p.detach() for name, p in network.named_parameters()}


@pytest.mark.parametrize("alpha", ALPHAS)
def test_two_ranks_one_process_and_a_plain_loop_agree(short, tiny, alpha):
    out, ranks = short
    zero, began = load_file(out / f"base-{alpha}.safetensors"), load_file(tiny / "base" / "diffusion_pytorch_model.safetensors")
    record, plain = in_one_process(tiny, "base", alpha=alpha)
    assert distance(zero, began) > 1e-3
    assert distance(zero, plain) < 1e-5 and distance(zero, by_the_book(tiny, "base", alpha=alpha)) < 1e-5
    assert ranks[0]["agreement"] == ranks[1]["agreement"]
    for ours, theirs in zip(ranks[0]["agreement"][str(alpha)], record, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    # what frames alone do not reach has taken part all the same, with zeros
    still = {name for name in zero if torch.equal(zero[name], began[name])}
    assert bool(still) == (alpha == 0) and all("position_bias" in name or "frame_index" in name for name in still)


def test_temporal_convolutions_agree(short, tiny):
    """One rank has only the clip, the other only frames, for which the blocks are left out: no gradient comes from there."""
    out, ranks = short
    record, plain = in_one_process(tiny, "ssr1")
    zero = load_file(out / "ssr1.safetensors")
    assert distance(zero, plain) < 1e-5 and distance(zero, by_the_book(tiny, "ssr1")) < 1e-5
    assert [norm for _, norm in ranks[1]["agreement_of_convolutions"]] == pytest.approx([norm for _, norm in record], rel=1e-5)


def test_a_resumed_run_has_the_bits_of_an_unbroken_one(short):
    out, _ = short
    unbroken, resumed = (load_file(out / f"{name}.safetensors") for name in ("unbroken", "resumed"))
    assert same_bits(unbroken, resumed)
    files = sorted((out / "state").iterdir())
    assert len(files) > 4 and all(path.suffix == ".safetensors" for path in files)       # nothing to unpickle


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_refused_step_touches_nothing(short, tiny):
    out, ranks = short
    before = contents(out / "before")
    assert before == contents(out / "skipped") == contents(out / "spoiled")
    for rank in ranks:
        assert 0 < rank["refused"]["skipped"][1] < 100
        assert rank["refused"]["applied"] == [False, False, True]
    _, plain = in_one_process(tiny, "base", steps=range(4), skip=[2])          # no gradient of a refused step is left either
    assert distance(load_file(out / "refused.safetensors"), plain) < 1e-5


def test_rank_0_hears_of_rank_1(short):
    for rank in short[1]:
        loss, norm = map(float, rank["refused"]["spoiled"])
        assert loss != loss and not norm < float("inf")
        assert rank["refused"]["said"] == [True, False, [3.0, 1.0]]


def test_no_rank_holds_the_network(short):
    for rank in short[1]:
        sizes = rank["refused"]["sizes"]
        assert sizes["between"] == 0
        assert sizes["most"] < 0.5 * sizes["whole"] and sizes["most"] < sizes["largest"] + 0.1 * sizes["whole"]
        assert all(piece == -(-whole // 2) for whole, piece in sizes["pieces"])
        assert sizes["masters"] == sum(piece for _, piece in sizes["pieces"]) < 0.51 * sizes["whole"]


@pytest.mark.fault
def test_a_killed_rank_ends_all(tiny, tmp_path):
    pytest.importorskip("deepspeed")
    process = launcher("forever", tiny, tmp_path)
    try:
        deadline = time.monotonic() + 120
        while not all((tmp_path / f"pid{rank}").exists() for rank in range(2)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        assert len(session(process.pid)) == 4                                  # `deepspeed`, its launcher, two ranks
        os.kill(int((tmp_path / "pid1").read_text()), signal.SIGKILL)
        killed = time.monotonic()
        while session(process.pid):
            assert time.monotonic() < killed + 10
            time.sleep(0.1)
        assert process.wait() != 0
    finally:
        for pid in session(process.pid):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw8bit", "fused"])
def test_a_resumed_run_in_bf16_has_the_bits_of_an_unbroken_one(long, optimizer):
    out, _ = long
    assert same_bits(*(load_file(out / f"{optimizer}-{name}.safetensors") for name in ("unbroken", "resumed")))
    # the moments of all but a few weights are of 8 bits: less than half of fp32's 12 bytes a weight
    size = sum(path.stat().st_size for path in (out / f"{optimizer}-state").iterdir())
    assert (size < 7 * 40279 + 60_000) == (optimizer == "adamw8bit")


def moved(tiny: Path, path: Path) -> torch.Tensor:
    began, now = load_file(tiny / "base" / "diffusion_pytorch_model.safetensors"), load_file(path)
    return torch.cat([(now[name].double() - began[name]).flatten() for name in began])


@pytest.mark.slow
def test_bf16_moves_the_masters_as_fp32_does(long, tiny):
    fp32, bf16 = (moved(tiny, long[0] / f"torch.{name}.safetensors") for name in ("float32", "bfloat16"))
    assert torch.nn.functional.cosine_similarity(fp32, bf16, 0) > 0.99
    assert bf16.abs().max() < 20 * 6.1e-6 and not torch.equal(fp32, bf16)


@pytest.mark.slow
def test_ways_to_save_memory_change_no_sum(long, tiny):
    out = long[0]
    _, plain = in_one_process(tiny, "base", draws=3)
    assert distance(load_file(out / "accumulated.safetensors"), plain) < 1e-5
    for stage in ("base", "ssr1"):
        kept = load_file(out / f"kept-{stage}.safetensors")
        assert all(same_bits(load_file(out / f"{way}-{stage}.safetensors"), kept) for way in ("checkpointed", "elsewhere", "both"))


@pytest.mark.slow
def test_offloaded_states(long, tiny):
    out, ranks = long
    _, plain = in_one_process(tiny, "base")
    unbroken, resumed = (load_file(out / f"offload-{name}.safetensors") for name in ("unbroken", "resumed"))
    assert distance(unbroken, plain) < 1e-5 and same_bits(unbroken, resumed)
    assert contents(out / "offload-before") == contents(out / "offload-after")
    assert [float(norm) < 100 for norm in ranks[1]["offloaded"]] == [True, True, False]
