import pytest
import torch

from engine.errors import ConfigError
from engine.runtime import device
from engine.runtime.device import DTYPES, cpu_has_bf16, dtype_name, resolve_device, resolve_dtype

CPU = torch.device("cpu")


@pytest.fixture
def gpus(monkeypatch):
    """Pretend this many GPUs."""
    def pretend(count, bf16=True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bf16)
    return pretend


def test_auto_is_the_gpu_where_there_is_one(gpus):
    gpus(0)
    assert resolve_device("auto") == CPU
    gpus(2)
    assert resolve_device("auto").type == "cuda"
    assert resolve_device("cpu") == CPU and resolve_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize("name, count", [("cuda", 0), ("cuda:0", 0), ("cuda:2", 2)])
def test_an_absent_gpu_is_refused(name, count, gpus):
    gpus(count)
    with pytest.raises(ConfigError, match=f"device: {name} is not there, this machine has {count} GPUs"):
        resolve_device(name)


@pytest.mark.parametrize("name", ["", "gpu", "cuda:x", "mps", "meta", "cuda:-1", "CPU", "xpu"])
def test_other_names_are_refused(name):
    with pytest.raises(ConfigError, match="device: want auto, cpu, cuda or cuda:N, got"):
        resolve_device(name)


def test_auto_dtype_is_bf16_where_the_hardware_has_it(gpus, monkeypatch):
    for has, want in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(device, "cpu_has_bf16", lambda has=has: has)
        assert resolve_dtype("auto", CPU) is want
    for has, want in ((True, torch.bfloat16), (False, torch.float16)):
        gpus(1, bf16=has)
        assert resolve_dtype("auto", torch.device("cuda")) is want


def test_bf16_is_asked_of_the_processor(monkeypatch):
    for avx512, amx in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda a=avx512: a, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda a=amx: a, raising=False)
        assert cpu_has_bf16() == (avx512 or amx)
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")                # private names may go away
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert cpu_has_bf16() is False


def test_a_named_dtype_is_taken():
    for name, want in DTYPES.items():
        assert resolve_dtype(name, torch.device("cuda")) is want and dtype_name(want) == name
    assert resolve_dtype("bf16", CPU) is torch.bfloat16


def test_fp16_is_refused_on_the_cpu():
    with pytest.raises(ConfigError, match="fp16 is for GPUs"):
        resolve_dtype("fp16", CPU)
