"""The table at the end of a run: every ratio beside its floor, its goal and the verdict."""

from dataclasses import dataclass, field

from benchmarks.regression import targets

KEYS = {"device": "p50_ms", "wall": "min_ms", "process": "cpu_min_ms"}       # the time that is compared, by the record's clock
CLOCKS = {"device": "device time, median", "wall": "wall time, minimum", "process": "process time, minimum"}
HEADER = f"{'case':<44} {'against':<26} {'ms':>9} {'ratio':>7} {'floor':>6} {'goal':>6}  verdict"


@dataclass
class Row:
    """A case that was measured: its record, what was absent and why, what it is judged by, why it fails."""
    record: dict
    absent: dict[str, str]
    floor: dict[str, float]
    goal: dict[str, float]
    failures: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        record = self.record
        floors, goals = ({name: (got, want) for name, got, want in targets(record, wanted)} for wanted in (self.floor, self.goal))
        lines = [f"{record['case'] + ' ' + record['dtype']:<44} {'ours':<26} {record['ours_ms']:>9.3f} {'':>23}  {_extras(record)}"]
        for name in dict.fromkeys([*record["ratios"], *floors, *goals]):
            got = record["ratios"].get(name) or (floors.get(name) or goals[name])[0]
            if name in floors and got < floors[name][1]:
                verdict = "BELOW FLOOR"
            elif name in goals and got < goals[name][1]:
                verdict = "below goal"
            else:
                verdict = "ok" if name in floors or name in goals else ""
            time = record["times"].get(name, {}).get(KEYS[record["clock"]], record["bound_ms"] if name == "roofline" else None)
            ms = "" if time is None else f"{time:.3f}"
            floor, goal = (f"{judged[name][1]:.2f}" if name in judged else "-" for judged in (floors, goals))
            lines.append(f"{'':<44} {name:<26} {ms:>9} {got:>6.2f}x {floor:>6} {goal:>6}  {verdict}".rstrip())
        lines += [f"{'':<44} {name:<26} absent: {reason}" for name, reason in self.absent.items()]
        if record["disturbed"]:
            lines.append(f"{'':<44} not judged: others use the cores (OMP_NUM_THREADS=1 measures process time, which bears that)")
        return lines + [f"{'':<44} FAILED: {failure}" for failure in self.failures]


def _extras(record: dict) -> str:
    said = [f"{record[name]:.3g} {unit}" for name, unit in (("gb_per_s", "GB/s"), ("tflop_per_s", "TFLOP/s")) if name in record]
    if record["kind"] == "cuda":
        ours = record["times"]["ours"]
        said += [f"p20-p80 {ours['p20_ms']:.4g}-{ours['p80_ms']:.4g} ms", f"peak {ours['peak_bytes'] / 2**20:.0f} MiB",
                 "graph" if ours["graph"] else "queued"]
    return ", ".join(said)
