"""ZeRO-3's pieces on disk and its settings, without ranks: an engine of plain tensors stands in for DeepSpeed's."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import FinetuneConfig
from engine.errors import ConfigError, WeightsError
from engine.training import zero_state
from engine.training.zero_settings import deepspeed_settings

SHAPES = {"a.weight": (5, 3), "a.bias": (5,), "b.table": (2, 7), "scalar": ()}
CPU = torch.device("cpu")


class Rank:
    """What `zero_state` asks of an engine: pieces of SHAPES in groups of two, or all in one, with AdamW's states."""

    def __init__(self, rank, world, per_group=2, optimizer="adamw"):
        self.rank, self.world, self.config, self.names = rank, world, FinetuneConfig(optimizer=optimizer), {}
        parameters, positions, flats = [], {}, []
        for name, shape in SHAPES.items():
            p = torch.nn.Parameter(torch.zeros(()))
            p.ds_numel = torch.Size(shape).numel()
            parameters.append(p)
            self.names[p] = name
        groups = [parameters[i : i + per_group] for i in range(0, len(parameters), per_group)]
        for index, group in enumerate(groups):
            offset = 0
            for p in group:
                positions[id(p)] = (index, offset, -(-p.ds_numel // world))
                offset += positions[id(p)][2]
            flats.append(torch.nn.Parameter(torch.full((offset,), 7.0)))
        self.zero = SimpleNamespace(
            fp16_groups=groups, fp32_partitioned_groups_flat=flats, grad_position=positions, get_param_id=id,
            _swappable_optimizer_subgroup=lambda index: False, optimizer=SimpleNamespace(state={}))

    def fill(self, whole: dict[str, dict[str, torch.Tensor]], step=3.0):
        for group in zero_state.groups(self):
            kinds = {kind: group.flat.data if kind == "master" else torch.zeros_like(group.flat.data) for kind in whole}
            for piece in group.pieces:
                for kind, flat in kinds.items():
                    flat[piece.offset : piece.offset + piece.master.numel()] = 0
                    flat[piece.offset : piece.offset + piece.end - piece.begin] = whole[kind][piece.name].flatten()[piece.begin : piece.end]
            group.state |= {kind: flat for kind, flat in kinds.items() if kind != "master"} | {"step": torch.tensor(step)}
        return self


def whole() -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return {kind: {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
            for kind in ("master", "exp_avg", "exp_avg_sq")}


def written(folder, world, **kind):
    for rank in range(world):
        zero_state.save(Rank(rank, world, **kind).fill(whole()), folder)
    return folder


def state(engine) -> list:
    return [(group.flat.data, group.state) for group in zero_state.groups(engine)]


@pytest.mark.parametrize("old, new", [(1, 1), (2, 2), (2, 1), (1, 3), (3, 2), (4, 20)])
def test_any_number_of_ranks_reads_what_another_wrote(tmp_path, old, new):
    written(tmp_path, old)
    for rank in range(new):
        engine = Rank(rank, new, per_group=2 if old == new else 4)
        zero_state.load(engine, tmp_path)
        want = Rank(rank, new, per_group=2 if old == new else 4).fill(whole())
        for (flat, found), (flat_, wanted) in zip(state(engine), state(want), strict=True):
            assert torch.equal(flat, flat_) and found.keys() == wanted.keys()
            assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_the_same_state_is_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        written(tmp_path / name, 2)
    files = sorted((tmp_path / "one").iterdir())
    assert len(files) == 4
    assert all(path.read_bytes() == (tmp_path / "two" / path.name).read_bytes() for path in files)


def test_8_bit_moments_are_for_as_many_ranks(tmp_path):
    engine = Rank(0, 1, optimizer="adamw8bit")
    for group in zero_state.groups(engine):
        group.state |= {"state1": torch.arange(4, dtype=torch.uint8), "absmax1": torch.ones(2), "step": 3}
    zero_state.save(engine, tmp_path)
    again = Rank(0, 1, optimizer="adamw8bit")
    zero_state.load(again, tmp_path)
    assert state(again)[0][1]["step"] == 3 and torch.equal(state(again)[0][1]["state1"], torch.arange(4, dtype=torch.uint8))
    for other in (Rank(0, 2, optimizer="adamw8bit"), Rank(0, 1, per_group=4, optimizer="adamw8bit")):
        with pytest.raises(ConfigError, match="as many ranks"):
            zero_state.load(other, tmp_path)


def test_what_is_missing_or_foreign_is_named(tmp_path):
    with pytest.raises(WeightsError, match="found none"):
        zero_state.load(Rank(0, 2), tmp_path)
    written(tmp_path, 2)
    with pytest.raises(ConfigError, match="want adamw, .* got fused"):
        zero_state.load(Rank(0, 2, optimizer="fused"), tmp_path)
    path = tmp_path / zero_state.file_name(1, 2, 1)
    kept = path.read_bytes()
    path.unlink()
    with pytest.raises(WeightsError, match="missing"):
        zero_state.load(Rank(1, 2), tmp_path)
    path.write_bytes(kept[:-3])
    with pytest.raises(WeightsError, match="not a complete safetensors"):
        zero_state.load(Rank(0, 2), tmp_path)
    save_file(load_file(tmp_path / zero_state.file_name(0, 2, 0)), path)
    with pytest.raises(WeightsError, match="not a state"):
        zero_state.load(Rank(0, 2), tmp_path)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (4, 3), (5, 2, 3)], ids=str)
@pytest.mark.parametrize("world", [1, 2, 3, 16])
def test_a_rank_reads_its_piece_of_a_weight(tmp_path, shape, world):
    value = torch.arange(torch.Size(shape).numel(), dtype=torch.float16).reshape(shape)
    save_file({"w": value}, tmp_path / "w.safetensors")
    n = value.numel()
    size, found = -(-n // world), []
    with zero_state.Source([tmp_path / "w.safetensors"]) as source:
        for rank in range(world):
            begin = min(rank * size, n)
            found.append(source.flat("w", begin, min(begin + size, n), size))
    joined = torch.cat(found)
    assert all(len(piece) == size for piece in found) and joined.dtype == torch.float32
    assert torch.equal(joined[:n], value.flatten().float()) and not joined[n:].any()


def settings(tmp_path, changes=None, config=None, device=CPU, dtype=torch.float32, zero=None):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3} | (zero or {})} | (changes or {})))
    return deepspeed_settings(path, config or FinetuneConfig(clip=0.5), device, dtype)


def test_the_config_rules(tmp_path):
    merged = settings(tmp_path, {"gradient_clipping": "auto", "steps_per_print": None}, dtype=torch.bfloat16)
    assert merged["gradient_clipping"] == 0.5 and merged["bf16"] == {"enabled": True}
    assert settings(tmp_path)["bf16"] == {"enabled": False}
    for key, value in (("gradient_clipping", 1.0), ("optimizer", {"type": "Adam"}), ("bf16", {"enabled": True}), ("train_batch_size", 8)):
        with pytest.raises(ConfigError, match=f"ds.json: {key} is ruled"):
            settings(tmp_path, {key: value})


def test_what_cannot_be_is_refused_in_one_line(tmp_path):
    for wrong in ("{", "[]", "{}", '{"zero_optimization": {"stage": 2}}'):
        (tmp_path / "wrong.json").write_text(wrong)
        with pytest.raises(ConfigError, match="wrong.json: want"):
            deepspeed_settings(tmp_path / "wrong.json", FinetuneConfig(), CPU, torch.float32)
    with pytest.raises(ConfigError, match="none.json"):
        deepspeed_settings(tmp_path / "none.json", FinetuneConfig(), CPU, torch.float32)
    with pytest.raises(ConfigError, match="fp32 masters"):
        settings(tmp_path, config=FinetuneConfig(master="stochastic"))
    with pytest.raises(ConfigError, match="dtype"):
        settings(tmp_path, dtype=torch.float16)
    with pytest.raises(ConfigError, match="offload_param.device: want none, cpu or nvme, got tape"):
        settings(tmp_path, zero={"offload_param": {"device": "tape"}})


def test_host_memory_is_no_offload_on_a_cpu(tmp_path):
    zero = {part: {"device": "cpu", "pin_memory": True} for part in ("offload_optimizer", "offload_param")}
    on_cpu, on_gpu = (settings(tmp_path, zero=zero, device=torch.device(name))["zero_optimization"] for name in ("cpu", "cuda"))
    assert on_cpu["offload_param"] == on_cpu["offload_optimizer"] == {"device": "none"}
    assert on_gpu["offload_param"] == zero["offload_param"]


def test_a_disk_needs_an_op_that_may_not_be_there(tmp_path):
    builder = pytest.importorskip("deepspeed.ops.op_builder")
    if builder.AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("this machine has libaio")
    with pytest.raises(ConfigError, match="libaio"):
        settings(tmp_path, zero={"offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path)}})


def test_the_bundled_settings_are_ours():
    from pathlib import Path

    for path in (Path(__file__).parents[2] / "configs/deepspeed").glob("*.json"):
        deepspeed_settings(path, FinetuneConfig(), torch.device("cuda"), torch.bfloat16)
