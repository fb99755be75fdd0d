"""The plan says what a run then does, and needs neither weights nor memory for it."""

from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.cascade import Cascade
from engine.cascade_folder import find_cascade, read_index
from engine.cascade_plan import TEXT_TOKENS, plan, step_cost, table
from engine.config import STAGE_ORDER, EditConfig, SampleConfig
from engine.models.unet import VideoUNet
from engine.runtime.flops import count_flops


@pytest.fixture(scope="module")
def config(tiny):
    return read_index(tiny)


def test_the_plan_is_what_the_run_does(config, tiny, own_cache):
    settings = SampleConfig(steps={"ssr1": 1})
    records = plan(config, settings)
    cascade = Cascade.load(tiny, "cpu", "fp32")
    cascade.sample("a red circle", settings)
    assert [record["stage"] for record in records] == list(STAGE_ORDER) == [report.stage for report in cascade.reports]
    for record, report in zip(records, cascade.reports):
        assert (record["frames"], record["height"], record["width"]) == (report.frames, report.height, report.width)
        assert record["steps"] * record["chunks"] == report.steps and record["parameters"] == report.parameters
        assert record["fps"] == config.stage(record["stage"]).fps
    assert [record["chunks"] for record in records] == [1] * 6 + [4]


def test_flops_are_those_of_a_real_pass(config, monkeypatch):
    monkeypatch.setenv("DREAMIX_KERNELS", "torch")          # a counter sees what goes through PyTorch
    for name in ("base", "ssr3"):
        stage = config.stage(name)
        frames = stage.chunk_frames or stage.frames
        network = VideoUNet(stage.unet)
        z = torch.zeros(1, frames, stage.height, stage.width, 3)
        extra = {"lowres": z, "aug_level": torch.zeros(1)} if stage.unet.lowres else {}
        inputs = (z, torch.zeros(1), torch.zeros(1, TEXT_TOKENS, 128), torch.ones(1, TEXT_TOKENS, dtype=torch.bool))
        parameters, flops = step_cost(stage, frames)
        with sdpa_kernel(SDPBackend.MATH):           # the counter does not know the CPU's own kernel
            assert flops == count_flops(partial(network, *inputs, **extra)) > 0
        assert parameters == sum(p.numel() for p in network.parameters())


def test_flops_of_a_known_product():
    a, b = torch.zeros(3, 5), torch.zeros(5, 7)
    assert count_flops(lambda: a @ b) == 2 * 3 * 5 * 7


def test_what_changes_the_cost(config):
    whole = plan(config, SampleConfig())
    half = plan(config, EditConfig(), 0.5)
    guided = plan(config, SampleConfig(guidance_weight=2.0))
    assert [record["steps"] for record in half] == [2, *(record["steps"] for record in whole[1:])]
    assert half[0]["flops"] * 2 == whole[0]["flops"] and half[1:] == whole[1:]
    assert guided[0]["flops"] == 2 * whole[0]["flops"] and guided[0]["passes_per_step"] == 2 and guided[1:] == whole[1:]
    assert plan(config, SampleConfig(last_stage="ssr1")) == whole[:3]
    for record in whole:
        assert record["flops"] == record["flops_per_step"] * record["steps"]
    assert plan(config, SampleConfig(dtype="fp32"))[0]["weight_bytes"] == 4 * whole[0]["parameters"]
    assert plan(config, SampleConfig(dtype="bf16"))[0]["weight_bytes"] == 2 * whole[0]["parameters"]


def test_chunks_longer_than_the_video(config):
    stage = config.stage("ssr3").model_copy(update={"chunk_frames": 100})
    record = plan(config.model_copy(update={"stages": (*config.stages[:-1], stage)}), SampleConfig())[-1]
    assert record["chunks"] == 1 and record["flops"] > 0


def test_the_papers_cascade_is_planned_without_its_weights():
    folder, cascade = find_cascade("imagen_video")
    assert not folder.exists()
    records = plan(cascade, SampleConfig(last_stage="tsr1"))
    assert records[0]["parameters"] == pytest.approx(5.6e9, rel=0.02) and records[1]["parameters"] == pytest.approx(1.7e9, rel=0.02)
    assert [(r["frames"], r["height"], r["width"], r["steps"]) for r in records] == [(16, 24, 40, 64), (32, 24, 40, 8)]


def test_the_table(config):
    lines = table(plan(config, SampleConfig())).splitlines()
    assert [line.split()[0] for line in lines] == ["stage", *STAGE_ORDER, "all"]
    assert "4 x 2" in lines[-2] and "32 x 32 x 48" in lines[-2] and len({line.rfind(" ") > 0 for line in lines}) == 1
