"""When a benchmark case fails: slower than it was, or slower beside a peer than it must be. Numbers in, sentences out; no torch, no clock.

A record is one line of results/<device>.jsonl. On a GPU the device time of ours is compared. On a CPU raw seconds of another hour mean
little, so time is counted in runs of a fixed calibration workload that was timed in the same rounds, and a slow-down counts only if a peer
confirms it.
"""

import statistics
from dataclasses import dataclass
from fnmatch import fnmatch

RECENT = 5                             # records that are looked back upon


@dataclass(frozen=True)
class Margin:
    """Slower by both is slower. Either alone is noise: half a microsecond of three, or 2 % of a second."""
    relative: float
    absolute_ms: float


MARGINS = {"cuda": Margin(0.10, 0.005), "cpu": Margin(0.30, 0.3)}


def time_units(record: dict) -> float:
    """What is compared between runs: milliseconds on a GPU, calibration runs on a CPU."""
    return record["ours_ms"] if record["kind"] == "cuda" else record["ours_ms"] / record["calibration_ms"]


def comparable(record: dict, history: list[dict]) -> list[dict]:
    """The recent records of the same case in the same format, measured with the same calibration workload."""
    keys = ("case", "dtype", "shape", "kind", "clock", "calibration_version")
    return [old for old in history if all(old.get(key) == record.get(key) for key in keys)][-RECENT:]


def slowdown(record: dict, history: list[dict], margin: Margin | None = None) -> str | None:
    """A sentence if the case is slower than the median of its recent records by both margins; None if it is not, or has no records."""
    old = comparable(record, history)
    if not old:
        return None
    margin = margin or MARGINS[record["kind"]]
    now, then = time_units(record), statistics.median(time_units(r) for r in old)
    unit_ms = 1.0 if record["kind"] == "cuda" else record["calibration_ms"]
    if now <= then * (1 + margin.relative) or (now - then) * unit_ms <= margin.absolute_ms:
        return None
    if record["kind"] == "cpu" and not _confirmed(record, old, margin):
        return None
    return f"{now / then:.2f}x the time of before ({record['ours_ms']:.3g} ms, median of {len(old)} records: {then * unit_ms:.3g} ms)"


def _confirmed(record: dict, old: list[dict], margin: Margin) -> bool:
    """Whether a peer measured then and now lost ground to nobody but us: where all competitors slowed down alike, the machine did."""
    shared = [peer for peer in record["ratios"] if any(peer in r["ratios"] for r in old)]
    if not shared:
        return True
    falls = (record["ratios"][peer] / statistics.median(r["ratios"][peer] for r in old if peer in r["ratios"]) for peer in shared)
    return min(falls) < 1 / (1 + margin.relative)


def targets(record: dict, wanted: dict[str, float]) -> list[tuple[str, float, float]]:
    """(name, reached, wanted) for each target that can be judged here.

    A name is a peer, a pattern of peers ("sdpa *": the best of them), or "roofline" (share of the bound that binds). Absent peers judge
    nobody.
    """
    judged = []
    for name, want in wanted.items():
        if name == "roofline":
            reached = record.get("roofline_share")
        else:
            reached = min((ratio for peer, ratio in record["ratios"].items() if fnmatch(peer, name)), default=None)
        if reached is not None:
            judged.append((name, reached, want))
    return judged


def failures(record: dict, history: list[dict], floor: dict[str, float]) -> list[str]:
    """Every reason for which the case fails."""
    found = [f"{reached:.2f} of {name}, floor {want:g}" for name, reached, want in targets(record, floor) if reached < want]
    slow = slowdown(record, history)
    return found + ([slow] if slow else [])
