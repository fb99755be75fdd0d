"""The product of finetuning: what is written is what was learned, with one tensor in memory, complete or not at all."""

import errno
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from engine.cascade import Cascade
from engine.config import FinetuneConfig
from engine.errors import DiskError, NumericError, UserError, WeightsError
from engine.runtime.overlay import LORA_NAME, RECORD, Overlay
from engine.runtime.weights import WEIGHTS_NAME, fingerprint
from engine.training import product
from engine.training.product import low_rank, write
from engine.training.ranks import Ranks

CONFIG = FinetuneConfig(stages=("base", "ssr1"), steps=7, stage_lr={"ssr1": 1e-4}, rare_token="sks", seed=3)


@pytest.fixture(scope="module")
def cascade(tiny):
    return Cascade.load(tiny, "cpu", "fp32")


@pytest.fixture(scope="module")
def learned(tiny):
    """Stage -> its weights after some finetuning: each matrix has moved by something of rank 2, and a little more."""
    found = {}
    for stage in ("base", "ssr1", "ssr2"):
        generator = torch.Generator().manual_seed(1)
        found[stage] = {}
        for name, value in load_file(tiny / stage / WEIGHTS_NAME).items():
            if value.ndim > 1:
                m, n = value.flatten(1).shape
                up, down = torch.randn(m, 2, generator=generator), torch.randn(2, n, generator=generator)
                value = value + (0.05 * up @ down + 1e-4 * torch.randn(m, n, generator=generator)).view_as(value)
            else:
                value = value + 0.05 * torch.randn(value.shape, generator=generator)
            found[stage][name] = value
    return found


@pytest.fixture
def stages(learned):
    return lambda name: iter(learned[name].items())


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_whole_weights(cascade, learned, stages, tmp_path):
    folder = write(tmp_path / "deep" / "product", cascade, CONFIG, stages)
    assert files(tmp_path) == ["deep", "deep/product", *(f"deep/product/{name}" for name in (
        "base", "base/config.json", f"base/{WEIGHTS_NAME}", RECORD, "ssr1", "ssr1/config.json", f"ssr1/{WEIGHTS_NAME}"))]
    for stage in CONFIG.stages:
        found = load_file(folder / stage / WEIGHTS_NAME)
        assert found.keys() == learned[stage].keys()
        assert all(torch.equal(found[name], learned[stage][name].bfloat16()) for name in found)
        written, given = ((path / stage / "config.json").read_text() for path in (folder, cascade.folder))
        assert json.loads(written) == json.loads(given)
        with safe_open(folder / stage / WEIGHTS_NAME, framework="pt") as f:
            assert f.metadata() == {"format": "pt"}                         # diffusers reads no other
    record = json.loads((folder / RECORD).read_text())
    assert record["format"] == "dreamix-product-1" and record["prompt"] == "sks"
    assert (record["alpha"], record["steps"], record["lr"], record["seed"]) == (0.35, 7, 6e-6, 3)
    assert record["base"] == {"name": "tiny", "stages": {name: fingerprint(cascade.folder / name) for name in CONFIG.stages}}
    assert record["stages"] == {"base": {"steps": 7, "lr": 6e-6, "lora_rank": 0, "kept": None},
                                "ssr1": {"steps": 7, "lr": 1e-4, "lora_rank": 0, "kept": None}}
    assert FinetuneConfig(**record["config"]) == CONFIG and record["versions"].keys() >= {"dreamix", "torch", "safetensors"}


def test_tensors_may_come_in_any_order(cascade, learned, stages, tmp_path):
    a = write(tmp_path / "a", cascade, CONFIG, stages)
    b = write(tmp_path / "b", cascade, CONFIG, lambda name: iter(reversed(learned[name].items())))
    assert [(a / name).read_bytes() for name in files(a) if (a / name).is_file()] == [
        (b / name).read_bytes() for name in files(b) if (b / name).is_file()]


def test_one_tensor_at_a_time(cascade, learned, tmp_path, monkeypatch):
    """When the next tensor is asked for, the one before is in the file and referred to by nobody."""
    import gc
    import weakref

    def tensors(stage):
        for name, value in learned[stage].items():
            mine = value.clone()
            seen = weakref.ref(mine)
            yield name, mine
            del mine
            alive.append(seen)
            gone = [ref for ref in alive[:-1] if ref() is not None]
            assert not gone

    alive = []
    gc.collect()
    write(tmp_path / "product", cascade, CONFIG, tensors)
    assert len(alive) == sum(len(learned[stage]) for stage in CONFIG.stages)


def test_low_rank(cascade, learned, stages, tiny, tmp_path):
    """Rank 2 holds what has rank 2 and leaves the rest; biases and norms are there in full; the folder is smaller."""
    config = CONFIG.model_copy(update={"lora_rank": 2})
    folder, whole = write(tmp_path / "low", cascade, config, stages), write(tmp_path / "whole", cascade, CONFIG, stages)
    kept = {name: entry["kept"] for name, entry in json.loads((folder / RECORD).read_text())["stages"].items()}
    for stage in CONFIG.stages:
        assert 0.999 < kept[stage] < 1
        found, base = load_file(folder / stage / LORA_NAME), load_file(tiny / stage / WEIGHTS_NAME)
        assert any(name.endswith(".lora_up") for name in found) and all(value.dtype == torch.bfloat16 for value in found.values())
        for name, value in learned[stage].items():
            update = value - base[name]
            if value.ndim == 1:
                assert torch.equal(found[name], update.bfloat16())
            elif name not in found:
                made = found[name + ".lora_up"].float() @ found[name + ".lora_down"].float()
                assert (made - update.flatten(1)).norm() < 0.02 * update.norm()
        assert (folder / stage / LORA_NAME).stat().st_size < 0.8 * (whole / stage / WEIGHTS_NAME).stat().st_size


@pytest.mark.parametrize("shape", [(40, 30), (300, 400)], ids=str)
def test_low_rank_is_the_nearest(shape):
    """The truncation's error is that of the singular values left out (Eckart and Young), and no state of a generator matters."""
    matrix = torch.randn(shape[0], 20) @ torch.randn(20, shape[1]) + 0.1 * torch.randn(shape)
    up, down = low_rank(matrix, 4)
    best = torch.linalg.svdvals(matrix.double())[4:].square().sum().sqrt()
    assert up.shape == (shape[0], 4) and down.shape == (4, shape[1])
    assert (matrix - up @ down).norm() <= 1.001 * best
    before = torch.random.get_rng_state()
    assert torch.equal(low_rank(matrix, 4)[0], up) and torch.equal(torch.random.get_rng_state(), before)


def test_an_older_product_is_replaced_by_a_complete_one_only(cascade, learned, stages, tmp_path):
    folder = write(tmp_path / "product", cascade, CONFIG, stages)
    before = {name: (folder / name).read_bytes() for name in files(folder) if (folder / name).is_file()}

    def breaks(name):
        yield from list(learned[name].items())[:5]
        assert Overlay.open(folder)                             # still there while the new one is being written
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(folder, cascade, CONFIG, breaks)
    assert files(tmp_path) == ["product", *(f"product/{name}" for name in files(folder))]
    assert {name: (folder / name).read_bytes() for name in before} == before
    write(folder, cascade, CONFIG.model_copy(update={"stages": ("ssr2",), "lora_rank": 1}), stages)
    assert files(folder) == [RECORD, "ssr2", "ssr2/config.json", f"ssr2/{LORA_NAME}"] and os.listdir(tmp_path) == ["product"]


def test_where_folders_cannot_change_places(cascade, stages, tmp_path, monkeypatch):
    folder = write(tmp_path / "product", cascade, CONFIG, stages)
    monkeypatch.setattr(product, "_exchange", lambda a, b: False)
    write(folder, cascade, CONFIG.model_copy(update={"seed": 9}), stages)
    assert Overlay.open(folder).record.seed == 9 and os.listdir(tmp_path) == ["product"]


@pytest.mark.parametrize("what", ["file", "other", "inside", "link"])
def test_nothing_else_is_ever_replaced(cascade, stages, tmp_path, what):
    folder = tmp_path / "product"
    if what == "file":
        folder.write_text("mine")
    elif what == "link":
        folder.symlink_to(tmp_path)
    else:
        write(folder, cascade, CONFIG, stages)
        (folder / ("base/mine.txt" if what == "inside" else "mine.txt")).write_text("mine")
    before = files(tmp_path)
    with pytest.raises(DiskError, match="product: cannot be written"):      # before the first weight is asked for
        write(folder, cascade, CONFIG, lambda name: pytest.fail("asked"))
    assert files(tmp_path) == before


@pytest.mark.parametrize("change, error, says", [
    (lambda items: items[:-1], WeightsError, "1 weights did not come"),
    (lambda items: [*items, items[0]], WeightsError, "there twice"),
    (lambda items: [*items, ("more", torch.zeros(2))], WeightsError, "more.*not a weight of this stage"),
    (lambda items: [(items[0][0], torch.zeros(1, 2, 3)), *items[1:]], WeightsError, "not a weight of this stage"),
    (lambda items: [*items[:-1], (items[-1][0], items[-1][1] * float("nan"))], NumericError, "is not finite"),
], ids=["missing", "twice", "unknown", "shape", "nan"])
def test_other_weights_are_refused(cascade, learned, tmp_path, change, error, says):
    with pytest.raises(error, match=says) as caught:
        write(tmp_path / "product", cascade, CONFIG, lambda name: iter(change(list(learned[name].items()))))
    assert files(tmp_path) == [] and "\n" not in str(caught.value)


@pytest.mark.fault
@pytest.mark.parametrize("at", ["before", "header", "middle", "end"])
def test_a_full_disk(cascade, stages, tmp_path, monkeypatch, at):
    """Exit 5, and the product of before is as it was."""
    folder = write(tmp_path / "product", cascade, CONFIG, stages)
    calls, real = [], product._Stage._write

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class File:
        seek = write = full

    def some(self, name, value):
        calls.append(name)
        if len(calls) == 30:
            self.file = File()
        real(self, name, value)

    if at == "before":
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    elif at == "header":
        monkeypatch.setattr(product, "sealed", full)
    elif at == "middle":
        monkeypatch.setattr(product._Stage, "_write", some)
    else:
        monkeypatch.setattr(product, "sync", full)
    with pytest.raises(DiskError, match="No space left on device") as error:
        write(folder, cascade, CONFIG.model_copy(update={"seed": 9}), stages)
    assert error.value.exit_code == 5 and Overlay.open(folder).record.seed == 3 and os.listdir(tmp_path) == ["product"]


class Threads(Ranks):
    """Ranks that are threads of this process."""

    def __init__(self, rank, barrier, board):
        self.rank, self.world, self.barrier_, self.board = rank, 2, barrier, board

    def gather(self, value):
        self.board[self.rank] = value
        self.barrier_.wait(30)
        found = [self.board[0], self.board[1]]
        self.barrier_.wait(30)
        return found


@pytest.mark.parametrize("full", [False, True])
def test_two_ranks(cascade, learned, tmp_path, monkeypatch, full):
    """Every tensor is asked for by both ranks, as collectives want it, even if rank 0 can no longer write; both hear how it ended."""
    barrier, board, asked, ends = threading.Barrier(2), {}, [[], []], [None, None]
    together = threading.Barrier(2)
    if full:
        def write_none(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        monkeypatch.setattr(product._Stage, "_write", write_none)

    def rank(index):
        def tensors(stage):
            for name, value in learned[stage].items():
                together.wait(30)                               # as an all-gather would
                asked[index].append(name)
                yield name, value
        try:
            ends[index] = write(tmp_path / "product", cascade, CONFIG, tensors, ranks=Threads(index, barrier, board))
        except UserError as error:
            ends[index] = error
        except Exception as error:
            ends[index] = error
            barrier.abort()

    threads = [threading.Thread(target=rank, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if full:
        assert len(asked[0]) == len(learned["base"]) and asked[0] == asked[1]
        assert all("No space left" in str(end) for end in ends) and os.listdir(tmp_path) == []
    else:
        assert asked[0] == asked[1] and len(asked[0]) == sum(len(learned[stage]) for stage in CONFIG.stages)
        assert ends == [tmp_path / "product"] * 2 and Overlay.open(tmp_path / "product").record.stages.keys() == {"base", "ssr1"}
