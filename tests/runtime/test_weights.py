"""Weights from disk: what is loaded is what was saved, damage and surprises are refused in one line, and memory is given back."""

import contextlib
import gc
import json
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from engine.errors import WeightsError
from engine.runtime import weights
from engine.runtime.weights import WEIGHTS_NAME

CPU = torch.device("cpu")


class Net(nn.Module):
    """A convolution, a linear layer, a buffer: the kinds of a U-Net's state."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.linear = nn.Linear(8, 4)
        self.register_buffer("scale", torch.ones(2))

    def forward(self, x):
        return self.linear(self.conv(x).mean((2, 3))) * self.scale[0]


@pytest.fixture
def state():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(x.shape, generator=generator) for name, x in Net().state_dict().items()}


@pytest.fixture
def whole(tmp_path, state):
    save_file(state, tmp_path / WEIGHTS_NAME)
    return tmp_path


@pytest.fixture
def sharded(tmp_path, state):
    parts = {"part-1.safetensors": ["conv.weight", "scale"], "part-2.safetensors": ["conv.bias", "linear.weight", "linear.bias"]}
    for file, names in parts.items():
        save_file({name: state[name] for name in names}, tmp_path / file)
    write_index(tmp_path, {name: file for file, names in parts.items() for name in names})
    return tmp_path


def write_index(folder, weight_map):
    (folder / (WEIGHTS_NAME + ".index.json")).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def shapes():
    return {name: x.shape for name, x in weights.on_meta(Net).state_dict().items()}


def test_a_meta_module_takes_no_memory():
    """A terabyte of parameters, and each is only a shape."""
    module = weights.on_meta(lambda: nn.Linear(500_000, 500_000))
    assert module.weight.is_meta and module.weight.numel() == 250_000_000_000


@pytest.mark.parametrize("layout", ["whole", "sharded"])
def test_loads_what_was_saved(layout, request, state):
    module = weights.load(Net, request.getfixturevalue(layout), CPU, torch.float32)
    loaded = module.state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)
    assert not module.training and not any(p.requires_grad or p.is_meta for p in module.parameters())
    plain = Net()
    plain.load_state_dict(state)
    x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(module(x), plain(x), atol=1e-6)


def test_convolutions_are_channels_last(whole):
    weight = weights.load(Net, whole, CPU, torch.float32).conv.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def test_loads_in_the_wanted_format(whole, state):
    module = weights.load(Net, whole, CPU, torch.bfloat16)
    assert all(torch.equal(x, state[name].bfloat16()) for name, x in module.state_dict().items())


def test_replacing_the_file_does_not_reach_a_loaded_module(whole, state):
    """The module may be a map of the file; a new checkpoint published under the same name is another file."""
    module = weights.load(Net, whole, CPU, torch.float32)
    save_file({name: x + 1 for name, x in state.items()}, whole / "new")
    (whole / "new").replace(whole / WEIGHTS_NAME)
    assert torch.equal(module.linear.weight, state["linear.weight"])


def test_a_single_file_wins_over_an_index(sharded, state):
    save_file({name: x + 1 for name, x in state.items()}, sharded / WEIGHTS_NAME)
    assert weights.weight_files(sharded) == [sharded / WEIGHTS_NAME]


def test_shards_come_in_the_order_of_their_names(sharded):
    assert [path.name for path in weights.weight_files(sharded)] == ["part-1.safetensors", "part-2.safetensors"]


def refused(folder, message):
    for door in (lambda: weights.check(folder, shapes()), lambda: weights.load(Net, folder, CPU, torch.float32)):
        with pytest.raises(WeightsError, match=message) as error:
            door()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("change, message", [
    (lambda state: state.pop("linear.bias"), r"1 missing \(linear.bias\), 0 unknown$"),
    (lambda state: state.update(extra=torch.zeros(1)), r"0 missing, 1 unknown \(extra\)"),
    (lambda state: state.update({"linear.weight": torch.zeros(8, 4)}), r"linear.weight: want shape \[4, 8\], got \[8, 4\]"),
    (lambda state: state.update({"linear.weight": torch.zeros(4, 9)}), r"linear.weight: want shape \[4, 8\], got \[4, 9\]"),
], ids=["missing", "extra", "transposed", "wider"])
def test_other_weights_are_refused(change, message, tmp_path, state):
    change(state)
    save_file({name: x.contiguous() for name, x in state.items()}, tmp_path / WEIGHTS_NAME)
    refused(tmp_path, message)


@pytest.mark.fault
@pytest.mark.parametrize("keep", [0, 4, 60, -1], ids=["empty", "half a header", "a header", "a byte short"])
def test_truncated_files_are_refused(keep, whole):
    path = whole / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[: keep or None] if keep else b"")
    refused(whole, f"{WEIGHTS_NAME}: not a complete safetensors file")


@pytest.mark.fault
def test_a_pickle_by_that_name_is_refused(tmp_path, state):
    torch.save(state, tmp_path / WEIGHTS_NAME)
    refused(tmp_path, "not a complete safetensors file")


def test_an_empty_folder_is_refused(tmp_path):
    refused(tmp_path, "want diffusion_pytorch_model.safetensors .* found neither")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/part.safetensors", "part-1.bin", "..", "", 7, None])
def test_an_index_may_name_only_its_neighbours(name, sharded):
    save_file({"scale": torch.ones(2)}, sharded.parent / "outside.safetensors")
    write_index(sharded, {"scale": name, "conv.weight": "part-1.safetensors"})
    refused(sharded, "want names of safetensors files beside it")


@pytest.mark.parametrize("text", ["", "[]", "{}", "?", '{"weight_map": 3}', '{"weight_map": {"a": [1]}}', "\ufeff{}", '{"weight_map": {}}'])
def test_a_broken_index_is_refused(text, sharded):
    (sharded / (WEIGHTS_NAME + ".index.json")).write_text(text)
    refused(sharded, "index.json: want |weights do not fit")


def test_an_index_that_is_not_text_is_refused(sharded):
    (sharded / (WEIGHTS_NAME + ".index.json")).write_bytes(b"\xff\xfe\x00")
    refused(sharded, "index.json: want a JSON object")


def test_a_missing_shard_is_refused(sharded):
    (sharded / "part-2.safetensors").unlink()
    refused(sharded, "shard part-2.safetensors is missing")


def test_the_module_is_freed_after_use(whole):
    with weights.resident(Net, whole, CPU, torch.float32) as module:
        storage = weakref.ref(module.linear.weight.untyped_storage())
        kept = module.linear                                                   # someone still holds a part
        assert not module.linear.weight.is_meta
    gc.collect()
    assert kept.weight.is_meta and module.conv.weight.is_meta and module.scale.is_meta
    assert storage() is None
    ref = weakref.ref(module)
    del module, kept
    gc.collect()
    assert ref() is None


def test_the_module_is_freed_after_an_error(whole):
    with pytest.raises(ZeroDivisionError):
        with weights.resident(Net, whole, CPU, torch.float32) as module:
            raise ZeroDivisionError
    assert module.linear.weight.is_meta


@pytest.mark.parametrize("layout", ["whole", "sharded"])
def test_the_fingerprint_knows_every_byte(layout, request):
    folder = request.getfixturevalue(layout)
    before = weights.fingerprint(folder)
    assert before == weights.fingerprint(folder) and len(before) == 64
    (folder / "config.json").write_text("{}")                                  # not a weight
    assert weights.fingerprint(folder) == before
    for path in weights.weight_files(folder):
        data = bytearray(path.read_bytes())
        for at in (9, len(data) - 1):
            data[at] ^= 1
            path.write_bytes(data)
            assert weights.fingerprint(folder) != before
            data[at] ^= 1
        path.write_bytes(data)
    assert weights.fingerprint(folder) == before


def test_loading_holds_one_tensor_beside_the_module(sharded, monkeypatch):
    """By the time a tensor is read, the ones before are converted and gone."""
    read = []

    class Watched:
        def __init__(self, file):
            self.keys, self.get_slice, self.file = file.keys, file.get_slice, file

        def get_tensor(self, name):
            assert all(ref() is None for ref in read)
            tensor = self.file.get_tensor(name)
            read.append(weakref.ref(tensor))
            return tensor

    @contextlib.contextmanager
    def watched(path, framework):
        with safe_open(path, framework=framework) as file:
            yield Watched(file)

    monkeypatch.setattr(weights, "safe_open", watched)
    weights.load(Net, sharded, CPU, torch.bfloat16)
    assert len(read) == 5
