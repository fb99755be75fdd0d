"""`measure`: first is everyone right, then how fast is everyone, then is ours fast enough. No time is reported for a wrong result."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import regression, results, timing
from benchmarks.table import HEADER, KEYS, Row
from dreamix_kernels.dispatch import report

# root mean square of the error, over that of the reference; the largest error may be LARGEST times as much of the largest value
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
LARGEST = 8
DISTURBED = 0.75                       # several threads that take more than this of one thread's time do not have the cores to themselves
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
KNOWN_ROOFLINES = {"NVIDIA H200": (4.3e12, 790e12)}        # bytes/s copied and bf16 FLOP/s multiplied, measured on such a card


class WrongResult(AssertionError):
    """A competitor's output differs from the reference."""


@dataclass
class Peer:
    """A competitor whose output has another layout: `view` brings it into the reference's, untimed. `want`: its own right result."""
    run: Callable[[], object]
    view: Callable[[object], object] = lambda out: out
    want: object = None


def leaves(out) -> list[Tensor]:
    return [out] if torch.is_tensor(out) else [leaf for part in out for leaf in leaves(part)]


def difference(got, want, tolerance: float) -> str | None:
    """What is wrong with a result, in a few words, or None. Both: a tensor, or the output and its gradients in the same order."""
    got, want = leaves(got), leaves(want)
    if len(got) != len(want):
        return f"{len(got)} results, want {len(want)}"
    for i, (mine, exact) in enumerate(zip(got, want)):
        name = "output" if i == 0 else f"result {i}"
        if mine.shape != exact.shape:
            return f"{name}: shape {[*mine.shape]}, want {[*exact.shape]}"
        wide = torch.promote_types(exact.dtype, torch.float32)
        if not torch.isfinite(mine).all():
            return f"{name}: not finite"
        error, exact = mine.to(wide) - exact, exact.to(wide)
        mean, allowed = error.square().mean().sqrt().item(), tolerance * exact.square().mean().sqrt().item()
        largest, most = error.abs().max().item(), LARGEST * tolerance * exact.abs().max().item()
        if mean > allowed or largest > most:
            return f"{name}: error {mean:.2g} (mean), {largest:.2g} (largest), allowed {allowed:.2g}, {most:.2g}"
    return None


@cache
def roofline(device_name: str, dtype: torch.dtype) -> tuple[float, float]:
    """(bytes/s of a copy, FLOP/s of a matrix product) of the current GPU: known, or measured before the first case."""
    if dtype is torch.bfloat16 and device_name in KNOWN_ROOFLINES:
        return KNOWN_ROOFLINES[device_name]
    big = torch.empty(2**30, dtype=torch.int8, device="cuda")
    other = torch.empty_like(big)
    n = 8192 if dtype in (torch.bfloat16, torch.float16) else 4096
    a, b = torch.randn(2, n, n, device="cuda").to(dtype)
    times = timing.cuda_times({"copy": lambda: other.copy_(big), "product": lambda: a @ b}, 0.5)
    return 2 * big.nbytes / times["copy"]["p50_ms"] * 1e3, 2 * n**3 / times["product"]["p50_ms"] * 1e3


class Bench:
    """One run of the benchmarks on one device: measures cases, judges them, keeps the table's rows, and stores records if asked to."""

    def __init__(self, device: torch.device, *, record: bool = False, seconds: float = 1.0, command: str = "",
                 folder: Path = results.FOLDER):
        self.device, self.seconds, self.save, self.folder = device, seconds, record, folder
        self.about = results.about(device, command)
        self.history = results.read(self.about["device"], folder)
        self.rows: list[Row] = []
        self._one_thread: float | None = None
        self.kernels: dict[torch.dtype, list[dict]] = {}   # which implementation of each op runs here, and why: what "ours" stands for

    def measure(self, case: str, competitors: dict, *, reference, dtype: torch.dtype, shape=None, tolerance: float | None = None,
                bytes_moved: float | None = None, flops: float | None = None, floor: dict[str, float] | None = None,
                goal: dict[str, float] | None = None, grad: bool = False, seconds: float | None = None) -> Row:
        """Compare, time and judge. `competitors`: name -> callable, Peer, or a sentence why it is absent; "ours" is the one that is judged.

        reference: the right result (a tensor, or output and gradients), or a callable that computes it; floor and goal: name -> least
        ratio of the peer's time to ours ("roofline": of the bound's time to ours). Below a floor the case fails; a goal is only shown.
        On a CPU whose cores others use, several threads mostly wait for each other: such a case is shown, neither judged nor stored.
        Raises: WrongResult before anything is timed; whatever ours raises. A peer that raises is absent, with its reason.
        """
        with torch.set_grad_enabled(grad):
            calls, absent = self._checked(case, competitors, reference, TOLERANCE[dtype] if tolerance is None else tolerance)
            row = Row({}, absent, floor or {}, goal or {})
            for attempt in range(2):               # what fails is measured once more, longer: a neighbour's burst is no regression
                row.record = self._timed(case, calls, dtype, shape, bytes_moved, flops, (seconds or self.seconds) * (1 + attempt))
                row.failures = regression.failures(row.record, self.history, row.floor)
                if not row.failures:
                    break
        self.rows.append(row)
        if row.record["disturbed"]:
            row.failures = []
        elif self.save:
            results.append(row.record, self.folder)
        return row

    def _checked(self, case, competitors, reference, tolerance) -> tuple[dict[str, Callable], dict[str, str]]:
        want = reference() if callable(reference) else reference
        calls, absent = {}, {}
        for name, competitor in competitors.items():
            if isinstance(competitor, str):
                absent[name] = competitor
                continue
            peer = competitor if isinstance(competitor, Peer) else Peer(competitor)
            try:
                out = peer.run()
            except Exception as problem:           # a peer may lack an operator here; ours may not
                if name == "ours":
                    raise
                absent[name] = (str(problem).strip() or type(problem).__name__).splitlines()[0][:160]
                continue
            own = want if peer.want is None else peer.want() if callable(peer.want) else peer.want
            wrong = difference(peer.view(out), own, tolerance)
            if wrong:
                raise WrongResult(f"{case}: {name} is wrong, nothing was timed: {wrong}")
            calls[name] = peer.run
            del out, own
        return calls, absent

    def _timed(self, case, calls, dtype, shape, bytes_moved, flops, seconds) -> dict:
        if dtype not in self.kernels:
            self.kernels[dtype] = report(self.device, dtype)
        record = {**self.about, "kernels": {row["kernel"]: row["implementation"] for row in self.kernels[dtype]}, "case": case,
                  "dtype": NAMES[dtype], "shape": list(shape or ()), "kind": self.device.type}
        if self.device.type == "cuda":
            times = timing.cuda_times(calls, seconds)
            record |= {"clock": "device", "calibration_version": None, "disturbed": False}
            key = KEYS["device"]
        else:
            times = timing.cpu_times({**calls, "calibration": timing.calibration()}, seconds)
            # one thread: what the process itself computed; several: the wall, since waiting for each other is part of the price
            clock = "process" if torch.get_num_threads() == 1 else "wall"
            key = KEYS[clock]
            record |= {"clock": clock, "calibration_version": timing.CALIBRATION_VERSION,
                       "calibration_ms": times.pop("calibration")[key]}
            record["disturbed"] = clock == "wall" and record["calibration_ms"] > DISTURBED * self._one_thread_ms()
        ours = times["ours"][key]
        record |= {"ours_ms": ours, "ratios": {name: t[key] / ours for name, t in times.items() if name != "ours"}, "times": times}
        if bytes_moved:
            record["gb_per_s"] = bytes_moved / ours / 1e6
        if flops:
            record["tflop_per_s"] = flops / ours / 1e9
        if self.device.type == "cuda" and (bytes_moved or flops):
            bandwidth, rate = roofline(record["gpu"], dtype)
            record["bound_ms"] = max((bytes_moved or 0) / bandwidth, (flops or 0) / rate) * 1e3
            record["roofline_share"] = record["bound_ms"] / ours
        return record

    def _one_thread_ms(self) -> float:
        """Process time of the calibration on one thread, which neighbours hardly change."""
        if self._one_thread is None:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                self._one_thread = timing.cpu_times({"calibration": timing.calibration()}, 0.2)["calibration"]["cpu_min_ms"]
            finally:
                torch.set_num_threads(threads)
        return self._one_thread

    def table(self) -> list[str]:
        """What ran, then every case."""
        lines = [f"{NAMES[dtype]} {row['kernel']}: {row['implementation']} ({row['reason']})"
                 for dtype, rows in self.kernels.items() for row in rows]
        return [*lines, HEADER, *(line for row in self.rows for line in row.lines())]
