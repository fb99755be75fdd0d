"""`measure` for every benchmark, and the table at the end of the run."""

import os
from pathlib import Path

import pytest
import torch

from benchmarks import results
from benchmarks.harness import Bench
from benchmarks.table import CLOCKS

BENCH = pytest.StashKey[Bench]()


def pytest_addoption(parser):
    group = parser.getgroup("dreamix benchmarks")
    group.addoption("--record", action="store_true", help="append a JSON line for every case to benchmarks/results/<device>.jsonl")
    group.addoption("--compiled", action="store_true", help="also torch.compile of the references as a peer: slow to begin with")
    group.addoption("--seconds", type=float, default=0.5, help="about how long to time each case")
    group.addoption("--results", type=Path, default=results.FOLDER, help="folder of the stored results")


def _bench(config) -> Bench:
    if BENCH not in config.stash:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = True, False       # fp32 means fp32, for everyone
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        threads = f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} " if "OMP_NUM_THREADS" in os.environ else ""
        command = threads + " ".join(["pytest", *_plain_arguments(config.invocation_params.args)])
        config.stash[BENCH] = Bench(device, record=config.getoption("--record"), seconds=config.getoption("--seconds"), command=command,
                                    folder=config.getoption("--results"))
    return config.stash[BENCH]


def _plain_arguments(arguments) -> list[str]:
    """The command as it is stored: without the folder of the results and pytest's own cache, which are this machine's."""
    kept, skip = [], False
    for argument in map(str, arguments):
        if not skip and not argument.startswith("--results=") and argument not in ("--results", "-p"):
            kept.append(argument)
        skip = argument in ("--results", "-p")
    return kept


@pytest.fixture(scope="session")
def bench(pytestconfig):
    return _bench(pytestconfig)


@pytest.fixture
def device(bench):
    return bench.device


@pytest.fixture
def gpu(device):
    """The GPU; the benchmark is skipped without one."""
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")
    return device


@pytest.fixture
def cpu(device):
    """The CPU; the benchmark is skipped where there is a GPU, whose host has other work than to be measured."""
    if device.type != "cpu":
        pytest.skip("a benchmark of the CPU")
    return device


@pytest.fixture
def compiled(pytestconfig):
    """compiled(f): torch.compile of f, or None where it was not asked for. What the compiler cannot do shows at the first call."""
    def make(f, **options):
        if not pytestconfig.getoption("--compiled"):
            return None
        torch._dynamo.reset()
        return torch.compile(f, **options)
    return make


@pytest.fixture
def measure(bench):
    """`Bench.measure`, failing the test where the case fails."""
    def run(*args, **kwargs):
        row = bench.measure(*args, **kwargs)
        if row.failures:
            pytest.fail(f"{row.record['case']} {row.record['dtype']}: " + "; ".join(row.failures), pytrace=False)
        return row
    return run


def pytest_terminal_summary(terminalreporter, config):
    bench = config.stash.get(BENCH, None)
    if bench is None or not bench.rows:
        return
    about = bench.about
    terminalreporter.section(f"benchmarks on {about['device']}")
    clock = CLOCKS[bench.rows[0].record["clock"]]
    packages = " ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    terminalreporter.write_line(f"{clock}; {about['threads']} threads; {packages}; commit {about['commit']}")
    for line in bench.table():
        terminalreporter.write_line(line)
    if not bench.history:
        terminalreporter.write_line(f"no stored results of {about['device']}: not compared with earlier runs (--record stores them)")
    if bench.save:
        terminalreporter.write_line(f"{len(bench.rows)} records appended to {bench.folder.name}/{about['device']}.jsonl")
