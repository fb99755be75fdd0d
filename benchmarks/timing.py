"""The clocks. CPU: competitors in turn, round after round, in one process. CUDA: events around queued work, L2 flushed before each run."""

import gc
import statistics
import time
from collections.abc import Callable

import torch

CALIBRATION_VERSION = 1                # goes up when `calibration` changes: times counted in it are then no longer comparable
L2_FLUSH_BYTES = 256 * 2**20           # five times an H200's cache
Competitors = dict[str, Callable[[], object]]


def calibration() -> Callable[[], object]:
    """A fixed workload for the CPU, milliseconds of arithmetic, memory and small calls: the unit of time on a machine of unknown speed."""
    a, b = torch.randn(2, 384, 384, generator=torch.Generator().manual_seed(0))
    x = torch.randn(1 << 20, generator=torch.Generator().manual_seed(1))
    y = torch.empty_like(x)

    def run():
        for _ in range(4):
            torch.mm(a, b)
            torch.add(x, 1.0, out=y)
            torch.tanh(y[:65536])
    return run


def cpu_times(competitors: Competitors, seconds: float, min_rounds: int = 4, max_rounds: int = 60) -> dict[str, dict]:
    """Milliseconds a call of each competitor -> {name: {min_ms, median_ms, cpu_min_ms, cpu_median_ms, rounds}}.

    Each round calls everyone, beginning with another each time: what slows the machine for a while slows all alike.
    """
    repeats = {}
    for name, run in competitors.items():
        run()
        began = time.perf_counter()
        run()
        repeats[name] = max(1, round(0.002 / max(time.perf_counter() - began, 1e-7)))      # a sample of 2 ms: above any clock's grain
    walls, cpus = ({name: [] for name in competitors} for _ in range(2))
    order, began, was_enabled = list(competitors), time.perf_counter(), gc.isenabled()
    gc.disable()
    try:
        for done in range(max_rounds):
            if done >= min_rounds and time.perf_counter() - began > seconds:
                break
            for name in order[done % len(order):] + order[: done % len(order)]:
                run, n = competitors[name], repeats[name]
                wall, cpu = time.perf_counter_ns(), time.process_time_ns()
                for _ in range(n):
                    run()
                cpus[name].append((time.process_time_ns() - cpu) / n / 1e6)
                walls[name].append((time.perf_counter_ns() - wall) / n / 1e6)
    finally:
        if was_enabled:
            gc.enable()
    return {name: {"min_ms": min(walls[name]), "median_ms": statistics.median(walls[name]), "cpu_min_ms": min(cpus[name]),
                   "cpu_median_ms": statistics.median(cpus[name]), "rounds": len(walls[name])} for name in competitors}


def cuda_times(competitors: Competitors, seconds: float, rounds: int = 5) -> dict[str, dict]:
    """Device milliseconds of each competitor -> {name: {p20_ms, p50_ms, p80_ms, runs, graph, peak_bytes}}.

    What can be captured runs as a CUDA graph; the rest is queued behind a sleeping kernel, so that the host's time does not count.
    """
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    calls, peaks, samples = {}, {}, {name: [] for name in competitors}
    for name, run in competitors.items():
        peaks[name] = _peak_bytes(run)
        calls[name] = _captured(run)
    counts = {name: _runs_a_round(call or competitors[name], seconds / rounds / len(competitors)) for name, call in calls.items()}
    for _ in range(rounds):
        for name, run in competitors.items():
            samples[name] += _queue(calls[name] or run, counts[name] if calls[name] else min(counts[name], 8), flush)
    found = {}
    for name, times in samples.items():
        p20, p50, p80 = (torch.tensor(times, dtype=torch.float64).quantile(q).item() for q in (0.2, 0.5, 0.8))
        found[name] = {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "runs": len(times), "graph": calls[name] is not None,
                       "peak_bytes": peaks[name]}
    del calls
    torch.cuda.empty_cache()
    return found


def _peak_bytes(run: Callable) -> int:
    """What a call allocates above what was there before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _captured(run: Callable) -> Callable | None:
    """The call as a CUDA graph, or None if it cannot be captured (it waits for the device, or allocates where it must not)."""
    side, current = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    current.wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            out = run()
        graph.replay()
        torch.cuda.synchronize()
    except Exception:                  # capture errors come as several types, and may leave the capture's stream behind
        torch.cuda.set_stream(current)
        torch.cuda.synchronize()
        return None

    def replay(kept_alive=out):        # its memory belongs to the graph
        graph.replay()
    return replay


def _runs_a_round(call: Callable, seconds: float) -> int:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return max(2, min(40, int(seconds * 1000 / (start.elapsed_time(end) + 0.1))))


def _queue(call: Callable, runs: int, flush: torch.Tensor) -> list[float]:
    """Milliseconds of each of so many calls, all of them queued while the device still sleeps."""
    began = time.perf_counter()
    call()
    host_seconds = time.perf_counter() - began
    torch.cuda.synchronize()
    starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(runs)] for _ in range(2))
    torch.cuda._sleep(int(min(0.2, 1.5 * runs * (host_seconds + 3e-5)) * 2e9))              # cycles at about 2 GHz
    for start, end in zip(starts, ends):
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in zip(starts, ends)]
