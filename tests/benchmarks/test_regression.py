"""When a case counts as slower, on records made up for the purpose."""

import json

import pytest
import torch

from benchmarks import regression, results
from benchmarks.harness import Bench, Peer, WrongResult, difference


def gpu(ms, **changes):
    return {"case": "a", "dtype": "bf16", "shape": [2], "kind": "cuda", "clock": "device", "calibration_version": None, "ours_ms": ms,
            "ratios": {"peer": 2.0}, **changes}


def cpu(ms, calibration_ms=2.0, peer=2.0, **changes):
    return {**gpu(ms), "kind": "cpu", "clock": "wall", "calibration_version": 1, "calibration_ms": calibration_ms, "ratios": {"peer": peer},
            **changes}


class TestSlowdown:
    def test_slower_by_both_margins_fails(self):
        assert "1.20x the time of before" in regression.slowdown(gpu(1.2), [gpu(1.0)] * 5)

    def test_small_absolute_differences_do_not(self):
        """4 us instead of 3: a third more, and nothing anyone could notice."""
        assert regression.slowdown(gpu(0.004), [gpu(0.003)] * 5) is None

    def test_small_relative_differences_do_not(self):
        assert regression.slowdown(gpu(1050.0), [gpu(1000.0)] * 5) is None

    def test_faster_does_not(self):
        assert regression.slowdown(gpu(0.5), [gpu(1.0)] * 5) is None

    def test_no_records_pass(self):
        assert regression.slowdown(gpu(9.0), []) is None

    def test_one_outlier_among_the_records_decides_nothing(self):
        history = [gpu(1.0), gpu(1.0), gpu(9.0), gpu(1.0), gpu(0.1)]
        assert regression.slowdown(gpu(1.05), history) is None
        assert regression.slowdown(gpu(1.2), history)

    def test_only_recent_records_count(self):
        assert regression.slowdown(gpu(1.0), [gpu(0.5)] * 9 + [gpu(1.0)] * 5) is None
        assert regression.slowdown(gpu(1.0), [gpu(1.0)] * 9 + [gpu(0.5)] * 5)

    @pytest.mark.parametrize("change", [
        {"case": "b"}, {"dtype": "fp32"}, {"shape": [3]}, {"clock": "wall"}, {"calibration_version": 2}], ids=str)
    def test_other_records_do_not_count(self, change):
        assert regression.slowdown(gpu(9.0), [gpu(1.0, **change)] * 5) is None

    def test_shapes_survive_json(self, tmp_path):
        results.append({**gpu(1.0, shape=(2, 3)), "device": "d"}, tmp_path)
        assert regression.slowdown(gpu(2.0, shape=[2, 3]), results.read("d", tmp_path))


class TestProcessors:
    def test_a_slower_machine_is_not_a_slower_case(self):
        assert regression.slowdown(cpu(20.0, calibration_ms=4.0), [cpu(10.0, calibration_ms=2.0)] * 5) is None

    def test_a_faster_machine_hides_nothing(self):
        assert regression.slowdown(cpu(10.0, calibration_ms=1.0, peer=1.0), [cpu(10.0, calibration_ms=2.0)] * 5)

    def test_all_competitors_slower_alike_is_the_machine(self):
        """Memory shared with a neighbour slows what streams and not what calibrates."""
        assert regression.slowdown(cpu(20.0, peer=2.0), [cpu(10.0, peer=2.0)] * 5) is None
        assert regression.slowdown(cpu(20.0, peer=1.0), [cpu(10.0, peer=2.0)] * 5)

    def test_without_a_shared_peer_time_alone_decides(self):
        assert regression.slowdown(cpu(20.0, ratios={"new": 1.0}), [cpu(10.0)] * 5)

    def test_margins(self):
        assert regression.slowdown(cpu(0.5, peer=0.8), [cpu(0.25)] * 5) is None                 # twice the time: a quarter of a millisecond
        assert regression.slowdown(cpu(12.0, peer=1.6), [cpu(10.0)] * 5) is None                # 2 ms: a fifth
        assert regression.slowdown(cpu(14.0, peer=1.4), [cpu(10.0)] * 5)


class TestFloors:
    def test_below_a_floor_fails_whatever_the_records(self):
        assert regression.failures(gpu(1.0), [], {"peer": 2.5}) == ["2.00 of peer, floor 2.5"]
        assert regression.failures(gpu(1.0), [], {"peer": 2.0}) == []

    def test_absent_peers_judge_nobody(self):
        assert regression.failures(gpu(1.0), [], {"another": 9.0}) == []

    def test_a_pattern_is_the_best_of_its_peers(self):
        record = gpu(1.0, ratios={"sdpa a": 1.5, "sdpa b": 3.0, "other": 0.1})
        assert regression.targets(record, {"sdpa *": 2.0}) == [("sdpa *", 1.5, 2.0)]

    def test_the_roofline(self):
        assert regression.failures(gpu(1.0, roofline_share=0.4), [], {"roofline": 0.5}) == ["0.40 of roofline, floor 0.5"]
        assert regression.failures(gpu(1.0), [], {"roofline": 0.5}) == []

    def test_both_reasons_are_told(self):
        assert len(regression.failures(gpu(2.0), [gpu(1.0)], {"peer": 3.0})) == 2


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.harness.DISTURBED", float("inf"))        # whatever runs beside the tests
    return Bench(torch.device("cpu"), record=True, seconds=0.01, command="pytest", folder=tmp_path)


class TestCorrectnessBeforeTime:
    want = torch.arange(1, 9, dtype=torch.float64)

    def measure(self, bench, peer, **kwargs):
        return bench.measure("a", {"ours": lambda: self.want.float(), "peer": peer}, reference=self.want, dtype=torch.float32, **kwargs)

    def test_a_right_result_is_timed_and_recorded(self, bench, tmp_path):
        row = self.measure(bench, Peer(lambda: self.want.float().view(2, 4).t(), lambda out: out.t().reshape(-1)))
        (record,) = results.read(bench.about["device"], tmp_path)
        assert record == json.loads(json.dumps(results.rounded(row.record)))
        assert set(record["times"]) == {"ours", "peer"} and record["ours_ms"] > 0
        assert regression.comparable(row.record, [record]) == [record]
        assert {"device", "cpu", "threads", "versions", "commit", "command", "date", "dtype", "shape", "times", "ratios"} <= set(record)

    @pytest.mark.parametrize("wrong", [
        lambda x: -x, lambda x: x * 1.01, lambda x: torch.cat([x[:-1], torch.zeros(1)]), lambda x: x.roll(1),
        lambda x: x / 0, lambda x: torch.cat([x[:-1], torch.tensor([float("nan")])]), lambda x: x[:-1], lambda x: (x, x)],
        ids=["sign", "one percent", "missing end", "shifted", "infinite", "nan", "shape", "count"])
    @pytest.mark.parametrize("who", ["ours", "peer"])
    def test_a_wrong_result_names_its_competitor_and_times_nobody(self, bench, tmp_path, who, wrong):
        calls = []
        competitors = {"ours": lambda: self.want.float(), "peer": lambda: self.want.float()}
        competitors[who] = lambda: (calls.append(1), wrong(self.want.float()))[1]
        with pytest.raises(WrongResult, match=f"a: {who} is wrong, nothing was timed"):
            bench.measure("a", competitors, reference=self.want, dtype=torch.float32)
        assert len(calls) == 1 and bench.rows == [] and results.read(bench.about["device"], tmp_path) == []
        assert len(bench.table()) == 1                     # its header

    def test_one_percent_is_seen_in_bf16(self):
        want = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        assert difference(want.bfloat16(), want, 8e-3) is None
        assert "error" in difference((want * 1.01).bfloat16(), want, 8e-3)

    def test_every_gradient_is_compared(self):
        want = (self.want, self.want * 2)
        assert difference((self.want.float(), self.want.float() * 2), want, 1e-6) is None
        assert difference((self.want.float(), self.want.float()), want, 1e-6).startswith("result 1: error")

    def test_a_peer_that_cannot_run_is_absent_with_its_reason(self, bench):
        def broken():
            raise RuntimeError("no such operator\nand a trace")
        row = self.measure(bench, broken, floor={"peer": 99.0})
        assert row.absent == {"peer": "no such operator"} and not row.failures and row.record["ratios"] == {}
        assert any("absent: no such operator" in line for line in bench.table())

    def test_ours_may_not_be_absent(self, bench):
        def broken():
            raise RuntimeError("no such operator")
        with pytest.raises(RuntimeError, match="no such operator"):
            bench.measure("a", {"ours": broken}, reference=self.want, dtype=torch.float32)

    def test_below_the_floor_is_in_the_table(self, bench):
        row = self.measure(bench, lambda: self.want.float(), floor={"peer": 1e6})
        assert "floor 1e+06" in row.failures[0] and any("BELOW FLOOR" in line for line in bench.table())

    def test_on_a_busy_machine_several_threads_are_not_judged(self, bench, tmp_path, monkeypatch):
        monkeypatch.setattr("benchmarks.harness.DISTURBED", 0.0)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        row = self.measure(bench, lambda: self.want.float(), floor={"peer": 1e6})
        assert not row.failures and any("not judged" in line for line in bench.table())
        assert results.read(bench.about["device"], tmp_path) == []
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)             # one thread's process time bears neighbours
        assert self.measure(bench, lambda: self.want.float(), floor={"peer": 1e6}).failures

    def test_nothing_is_stored_unless_asked(self, tmp_path):
        bench = Bench(torch.device("cpu"), seconds=0.01, folder=tmp_path)
        self.measure(bench, lambda: self.want.float())
        assert list(tmp_path.iterdir()) == []


class TestGraphics:
    """What is made of device times; the clock itself needs a GPU."""

    def test_rates_and_the_share_of_the_roofline(self, bench, monkeypatch):
        times = {"p20_ms": 0.9, "p50_ms": 1.0, "p80_ms": 1.1, "runs": 40, "graph": True, "peak_bytes": 2**20}
        monkeypatch.setattr("benchmarks.timing.cuda_times", lambda calls, seconds: {
            name: times | {"p50_ms": 1.0 if name == "ours" else 3.0} for name in calls})
        monkeypatch.setattr("benchmarks.harness.report", lambda device, dtype: [])
        bench.device = torch.device("cuda")
        bench.about["gpu"] = "NVIDIA H200"
        want = torch.ones(4)
        row = bench.measure("a", {"ours": lambda: want.bfloat16(), "peer": lambda: want.bfloat16()}, reference=want, dtype=torch.bfloat16,
                            bytes_moved=2.15e9, flops=79e9, goal={"roofline": 0.8, "peer": 2.0}, floor={"roofline": 0.4})
        record = row.record
        assert record["gb_per_s"] == pytest.approx(2150) and record["tflop_per_s"] == pytest.approx(79)
        assert record["bound_ms"] == pytest.approx(0.5) and record["roofline_share"] == pytest.approx(0.5)       # memory's
        text = "\n".join(bench.table())
        assert "peak 1 MiB, graph" in text and "3.00x" in text and "below goal" in text and not row.failures


def test_the_command_is_stored_without_this_machines_folders():
    from benchmarks.conftest import _plain_arguments

    assert _plain_arguments(["benchmarks", "-q", "--results", "/a/b", "--record", "-p", "no:x"]) == ["benchmarks", "-q", "--record"]
    assert _plain_arguments(["--results=/a/b", "-k", "tconv"]) == ["-k", "tconv"]


class TestNames:
    @pytest.mark.parametrize("name, want", [
        ("NVIDIA H200", "nvidia-h200"), ("Intel(R) Xeon(R) Processor", "intel-xeon"), ("AMD EPYC 9B14 96-Core Processor", "amd-epyc-9b14"),
        ("Intel(R) Xeon(R) Platinum 8480+ CPU @ 2.00GHz", "intel-xeon-platinum-8480"), ("", "unknown")])
    def test_slug(self, name, want):
        assert results.slug(name) == want

    def test_a_class_of_processors_has_its_threads(self):
        threads = torch.get_num_threads()
        assert results.device_class(torch.device("cpu")).endswith(f"-{threads}-thread" + "s" * (threads > 1))
