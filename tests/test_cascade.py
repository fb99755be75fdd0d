"""The cascade as a whole: what decides its bits and what does not, what it keeps in memory, and which folders it refuses."""

import gc
import hashlib
import json
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import cascade as module
from engine.cascade import Cascade, Progress, StageRun
from engine.cascade_folder import find_cascade, read_index, write_index
from engine.config import STAGE_ORDER, CascadeConfig, SampleConfig
from engine.diffusion.augmentation import augment
from engine.diffusion.conditioning import upsample
from engine.diffusion.noise import frame_noise
from engine.errors import ConfigError, NumericError, WeightsError
from engine.models import text as text_module
from engine.models.text import TextEmbedding
from engine.models.unet import VideoUNet
from engine.runtime import weights
from engine.runtime.weights import WEIGHTS_NAME

pytestmark = pytest.mark.usefixtures("own_cache")
PROMPT = "a red circle moving left over a plain grey background"
SHAPES = {"base": (4, 8, 12), "tsr1": (8, 8, 12), "ssr1": (8, 16, 24), "ssr2": (8, 24, 36), "tsr2": (16, 24, 36), "tsr3": (32, 24, 36),
          "ssr3": (32, 32, 48)}


@pytest.fixture(scope="module")
def cascade(tiny):
    return Cascade.load(tiny, "cpu", "fp32")


@pytest.fixture(scope="module")
def videos(cascade, own_cache):
    """One whole run, seed 3."""
    return cascade.sample(PROMPT, SampleConfig(seed=3))


@pytest.fixture
def copied(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "mine")


@pytest.fixture
def network_calls(monkeypatch):
    """Every call of a network: the shape of its z, and whether it was given the text."""
    seen, real = [], VideoUNet.forward

    def forward(self, z, time, text, mask, **more):
        seen.append((tuple(z.shape), bool(mask.any())))
        return real(self, z, time, text, mask, **more)

    monkeypatch.setattr(VideoUNet, "forward", forward)
    return seen


def run_of(cascade, name, text, seeds=(3,), network=None, **changes):
    """A StageRun of a stage, with its own network unless another is given."""
    stage = cascade.config.stage(name)
    stage = stage.model_copy(update=changes)
    network = network or weights.load(lambda: VideoUNet(stage.unet), cascade.folder / name, cascade.device, cascade.dtype)
    return StageRun(stage, network, text, SampleConfig(), stage.steps, seeds)


def digest(video) -> str:
    return hashlib.sha256(video.contiguous().numpy().tobytes()).hexdigest()


# --- what decides the bits ---

def test_same_seed_same_bits_on_any_number_of_threads(cascade, videos):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        again = cascade.sample(PROMPT, SampleConfig(seed=3))
    finally:
        torch.set_num_threads(threads)
    assert list(again) == list(STAGE_ORDER)
    assert {name: digest(video) for name, video in again.items()} == {name: digest(video) for name, video in videos.items()}


def test_seed_and_prompt_decide(cascade, videos):
    for prompt, seed in ((PROMPT, 4), ("a blue square", 3)):
        other = cascade.sample(prompt, SampleConfig(seed=seed, last_stage="tsr1"))
        assert list(other) == ["base", "tsr1"] and all(not torch.equal(other[name], videos[name]) for name in other)


def test_a_prompt_from_the_cache_gives_the_same_bits(cascade, videos, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    loaded, real = [], text_module._load_t5
    monkeypatch.setattr(text_module, "_load_t5", lambda *args: loaded.append(args) or real(*args))
    for loads in (1, 1):                                      # a miss, then a hit
        assert torch.equal(cascade.sample(PROMPT, SampleConfig(seed=3, last_stage="base"))["base"], videos["base"])
        assert len(loaded) == loads


def test_a_frames_noise_is_the_same_in_any_chunk(cascade):
    run = run_of(cascade, "ssr3", cascade.encode([PROMPT]), network=object())
    for step in ("init", "aug", 0, 5):
        whole = run.noise(step, range(32))
        assert torch.equal(torch.cat([run.noise(step, range(first, first + 8)) for first in range(0, 32, 8)], 1), whole)
        assert torch.equal(run.noise(step, range(19, 20)), whole[:, 19:20])
        assert torch.equal(whole[0], frame_noise(3, "ssr3", step, range(32), (32, 48, 3)))


def test_chunks_ask_for_the_noise_of_their_own_frames(cascade, videos, monkeypatch):
    asked = []

    def recorded(seed, stage, step, frames, shape):
        asked.append((stage, step, frames))
        return frame_noise(seed, stage, step, frames, shape)

    monkeypatch.setattr(module, "frame_noise", recorded)
    run_of(cascade, "ssr3", cascade.encode([PROMPT])).super_resolution(videos["tsr3"][None])
    assert asked == [("ssr3", step, range(first, first + 8)) for first in range(0, 32, 8) for step in ("init", 0)]


def test_chunk_frames_are_part_of_the_result(cascade, videos):
    text, before = cascade.encode([PROMPT]), videos["tsr3"][None]
    with torch.inference_mode():
        by_8 = run_of(cascade, "ssr3", text).super_resolution(before)
        by_16 = run_of(cascade, "ssr3", text, chunk_frames=16).super_resolution(before)
        by_12 = run_of(cascade, "ssr3", text, chunk_frames=12).super_resolution(before)
        changed = before.clone()
        changed[:, 8:] = -changed[:, 8:]
        other = run_of(cascade, "ssr3", text).super_resolution(changed)
    assert torch.equal(by_8[0], videos["ssr3"])
    assert by_16.shape == by_12.shape == by_8.shape and not torch.equal(by_16, by_8) and not torch.equal(by_12, by_16)
    assert torch.equal(other[:, :8], by_8[:, :8]) and not torch.equal(other[:, 8:16], by_8[:, 8:16])       # a chunk sees its own frames


@pytest.mark.parametrize("name", ["base", "tsr1", "ssr3"])
def test_videos_side_by_side_do_not_depend_on_each_other(cascade, videos, name):
    texts = [cascade.encode([prompt]) for prompt in (PROMPT, "a blue square at night")]
    before = {"tsr1": "base", "ssr3": "tsr3"}.get(name)
    with torch.inference_mode():
        def make(text, seeds):
            run = run_of(cascade, name, text, seeds)
            return run.base(None, 1.0) if before is None else run.super_resolution(videos[before].expand(len(seeds), -1, -1, -1, -1))

        both = make(TextEmbedding.cat(texts), (3, 4))
        alone = torch.cat([make(text, (seed,)) for text, seed in zip(texts, (3, 4))])
    torch.testing.assert_close(both, alone, rtol=0, atol=2e-4)      # fp32 sums of another order, through all steps
    assert not torch.allclose(both[0], both[1], atol=1e-2)
    assert torch.equal(alone[0], videos[name])


# --- steps, guidance and the input ---

def test_progress_counts_what_is_done(cascade, network_calls):
    told, steps, reports = [], [], []
    progress = Progress(lambda stage, n: told.append((stage.name, n)), lambda: steps.append(told[-1][0]),
                        lambda report, video: reports.append((report, tuple(video.shape))))
    cascade.sample(PROMPT, SampleConfig(steps={"base": 3}), progress=progress)
    wanted = {"base": 3, "tsr1": 2, "ssr1": 3, "ssr2": 2, "tsr2": 2, "tsr3": 2, "ssr3": 2 * 4}
    assert dict(told) == wanted and [name for name, _ in told] == list(STAGE_ORDER)
    assert {name: steps.count(name) for name in wanted} == wanted and len(network_calls) == sum(wanted.values())
    assert [shape for shape, _ in network_calls[-8:]] == [(1, 8, 32, 48, 3)] * 8          # ssr3 sees 8 frames at a time
    for report, shape in reports:
        stage = cascade.config.stage(report.stage)
        assert (report.frames, report.height, report.width) == SHAPES[report.stage] == (stage.frames, stage.height, stage.width)
        assert shape == (*SHAPES[report.stage], 3) and report.steps == wanted[report.stage] and report.seconds > 0
        assert report.parameters == sum(v.numel() for v in load_file(cascade.folder / report.stage / WEIGHTS_NAME).values())
    assert [report for report, _ in reports] == cascade.reports


def test_a_ragged_last_chunk_is_counted(cascade):
    assert [cascade.config.stage("ssr3").model_copy(update={"chunk_frames": n}).chunks for n in (8, 12, 32, 100, None)] == [4, 3, 1, 1, 1]


@pytest.mark.parametrize(("weight", "passes"), [(None, 1), (1.0, 1), (2.0, 2), (0.0, 2)])
def test_guidance_is_of_the_base_and_costs_a_second_pass(cascade, network_calls, weight, passes):
    cascade.sample(PROMPT, SampleConfig(guidance_weight=weight, last_stage="tsr1"))
    with_text = [given for shape, given in network_calls if shape == (1, 4, 8, 12, 3)]
    assert with_text == ([True] if passes == 1 else [True, False]) * 4
    assert [given for shape, given in network_calls if shape == (1, 8, 8, 12, 3)] == [True] * 2


def test_oscillating_guidance(cascade, network_calls):
    stage = cascade.config.stage("base")
    diffusion = stage.diffusion.model_copy(update={"guidance_weight": 3.0, "oscillating_guidance": True})
    run = run_of(cascade, "base", cascade.encode([PROMPT]), diffusion=diffusion, steps=8)
    with torch.inference_mode():
        run.base(None, 1.0)
    assert len(network_calls) == 4 * 2 + 1 + 2 + 1 + 2


def test_strength_0_keeps_the_input_and_calls_no_network(cascade, network_calls):
    z = torch.rand(4, 8, 12, 3) * 2 - 1
    assert torch.equal(cascade.sample(PROMPT, SampleConfig(last_stage="base"), z=z, strength=0.0)["base"], z)
    assert not network_calls


@pytest.mark.parametrize(("strength", "steps"), [(0.1, 0), (0.13, 1), (0.5, 2), (0.8, 3), (1.0, 4)])
def test_strength_is_the_share_of_steps(cascade, network_calls, strength, steps):
    cascade.sample(PROMPT, SampleConfig(last_stage="tsr1"), z=torch.zeros(4, 8, 12, 3), strength=strength)
    assert [shape[1] for shape, _ in network_calls] == [4] * steps + [8] * 2               # the stages above always run all of theirs


def test_an_input_of_another_size_is_refused(cascade):
    with pytest.raises(ValueError, match=r"z: want the base's \[4, 8, 12, 3\], got \[4, 8, 10, 3\]"):
        cascade.sample(PROMPT, SampleConfig(last_stage="base"), z=torch.zeros(4, 8, 10, 3), strength=0.5)


# --- conditioning, with a network whose answer is known ---

class Constant:
    """Answers `value` everywhere and remembers what it was asked."""

    def __init__(self, value):
        self.value, self.calls = value, []

    def __call__(self, z, time, text, mask, *, lowres=None, aug_level=None):
        self.calls.append((lowres, aug_level))
        return torch.full_like(z, self.value)


@pytest.mark.parametrize(("value", "scale"), [(0.0, 0.1), (2.0, 0.1), (-30.0, 0.1), (0.25, None)])
def test_residual_stages_add_to_the_upsampled_video(cascade, value, scale):
    """The network answers the residual over its scale; the range that is clipped to is the video's."""
    before = torch.rand(1, 8, 8, 12, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    stage = cascade.config.stage("ssr1")
    diffusion = stage.diffusion.model_copy(update={"residual_scale": scale})
    out = run_of(cascade, "ssr1", cascade.encode([PROMPT]), network=Constant(value), diffusion=diffusion).super_resolution(before)
    lowres = upsample(before, 8, 16, 24)
    wanted = (lowres + scale * value).clamp(-1, 1) if scale else torch.full_like(lowres, value)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "temporal"), [("tsr1", "linear"), ("tsr1", "blank"), ("tsr1", "repeat"), ("ssr3", "repeat")])
def test_what_a_stage_is_conditioned_on(cascade, name, temporal):
    frames, height, width = SHAPES["base" if name == "tsr1" else "tsr3"]
    before = torch.rand(1, frames, height, width, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    network = Constant(0.0)
    run = run_of(cascade, name, cascade.encode([PROMPT]), network=network, temporal_upsample=temporal, aug_level=0.25, steps=1)
    run.super_resolution(before)
    noised = augment(before, 0.25, frame_noise(3, name, "aug", range(frames), (height, width, 3))[None])
    wanted = upsample(noised, *SHAPES[name], temporal)
    given = torch.cat([lowres for lowres, _ in network.calls], 1)
    if name == "tsr1":
        assert torch.equal(given, wanted)
    else:
        torch.testing.assert_close(given, wanted, rtol=0, atol=1e-6)                       # resized chunk by chunk
    assert all(level.tolist() == [0.25] for _, level in network.calls)
    clean = Constant(0.0)
    run_of(cascade, name, cascade.encode([PROMPT]), network=clean, temporal_upsample=temporal, steps=1).super_resolution(before)
    given = torch.cat([lowres for lowres, _ in clean.calls], 1)
    torch.testing.assert_close(given, upsample(before, *SHAPES[name], temporal), rtol=0, atol=1e-6)
    assert all(level.tolist() == [0] for _, level in clean.calls)


def test_stages_end_where_they_are_told(cascade, videos):
    assert {name: tuple(video.shape[:3]) for name, video in videos.items()} == SHAPES
    assert [stage.fps for stage in cascade.config.stages] == [3, 6, 6, 6, 12, 24, 24]
    assert all(video.dtype == torch.float32 and video.is_contiguous() and video.abs().max() <= 1 + 1e-6 for video in videos.values())
    short = cascade.sample(PROMPT, SampleConfig(seed=3, last_stage="ssr1"))
    assert list(short) == ["base", "tsr1", "ssr1"] and all(torch.equal(short[name], videos[name]) for name in short)


# --- memory ---

def in_memory(network) -> bool:
    return any(p.device.type != "meta" for p in network.parameters())


def test_one_stage_in_memory_at_a_time_and_no_encoder(cascade, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))                                     # so that the encoder has to be loaded
    encoders, networks, most = [], [], []
    load_t5, load, forward = text_module._load_t5, weights.load, VideoUNet.forward

    def loading_t5(*args):
        tokenizer, model = load_t5(*args)
        encoders.append(weakref.ref(model))
        return tokenizer, model

    def loading(build, folder, device, dtype):
        assert encoders and all(ref() is None for ref in encoders), "the text encoder is still there"
        assert not any(in_memory(ref()) for ref in networks if ref()), "the stage before is still there"
        network = load(build, folder, device, dtype)
        networks.append(weakref.ref(network))
        return network

    def counting(self, *args, **more):
        most.append(sum(in_memory(ref()) for ref in networks if ref()))
        return forward(self, *args, **more)

    monkeypatch.setattr(text_module, "_load_t5", loading_t5)
    monkeypatch.setattr(weights, "load", loading)
    monkeypatch.setattr(VideoUNet, "forward", counting)
    cascade.sample(PROMPT, SampleConfig())
    assert len(networks) == 7 and len(most) > 7 and set(most) == {1}
    assert not any(in_memory(ref()) for ref in networks if ref())
    gc.collect()
    assert not any(ref() for ref in networks)


def test_a_stage_that_fails_is_freed_too(cascade, tiny):
    stage = cascade.config.stage("base")
    with pytest.raises(KeyboardInterrupt):
        with weights.resident(lambda: VideoUNet(stage.unet), tiny / "base", cascade.device, cascade.dtype) as network:
            assert in_memory(network)
            raise KeyboardInterrupt
    assert not in_memory(network)


def test_loading_reads_no_weights(tiny, monkeypatch):
    monkeypatch.setattr(weights, "load", lambda *_: pytest.fail("weights were loaded"))
    monkeypatch.setattr(text_module, "_load_t5", lambda *_: pytest.fail("the encoder was loaded"))
    Cascade.load(tiny, "cpu", "fp32")


# --- folders ---

def test_index_round_trip(tiny, tmp_path):
    config = read_index(tiny)
    write_index(tmp_path, config)
    assert read_index(tmp_path) == config and config.stage("ssr3").chunk_frames == 8 and isinstance(config, CascadeConfig)


def test_bundled_names_and_yaml_files(tmp_path):
    folder, config = find_cascade("sprites")
    assert folder.name == "sprites" and config.name == "sprites" and find_cascade("imagen_video")[1].name == "imagen_video"
    file = shutil.copy(folder.with_suffix(".yaml"), tmp_path / "other.yaml")
    assert find_cascade(file) == (tmp_path / "other", config)
    with pytest.raises(ConfigError, match=r"imagen_video, sprites; got sprits \(did you mean sprites\?\)"):
        find_cascade("sprits")


def test_sixteen_bit_and_sharded_weights(cascade, copied, videos):
    folder = copied / "base"
    state = load_file(folder / WEIGHTS_NAME)
    names = sorted(state)
    parts = {"a-1.safetensors": names[::2], "a-2.safetensors": names[1::2]}
    for part, keys in parts.items():
        save_file({key: state[key] for key in keys}, folder / part)
    (folder / WEIGHTS_NAME).unlink()
    index = folder / f"{WEIGHTS_NAME}.index.json"
    index.write_text(json.dumps({"weight_map": {key: part for part, keys in parts.items() for key in keys}}))
    sharded = Cascade.load(copied, "cpu", "fp32").sample(PROMPT, SampleConfig(seed=3, last_stage="base"))
    assert torch.equal(sharded["base"], videos["base"])
    index.write_text(json.dumps({"weight_map": {key: "../tsr1/" + WEIGHTS_NAME for key in names}}))
    with pytest.raises(WeightsError, match="want names of safetensors files beside it"):
        Cascade.load(copied, "cpu", "fp32")


def edit_json(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def rewrite(path, change):
    state = load_file(path)
    change(state)
    save_file(state, path)


SSR1 = f"ssr1/{WEIGHTS_NAME}"
DAMAGE = {
    "truncated": (lambda f: (f / SSR1).write_bytes((f / SSR1).read_bytes()[:-1]), "not a complete safetensors"),
    "not weights": (lambda f: (f / SSR1).write_text("hello"), "not a complete safetensors"),
    "no weights": (lambda f: (f / SSR1).unlink(), "ssr1: want diffusion_pytorch_model.safetensors"),
    "no stage": (lambda f: shutil.rmtree(f / "ssr1"), "ssr1"),
    "shape": (lambda f: rewrite(f / SSR1, lambda s: s.update({"head.bias": torch.zeros(13)})), r"head.bias: want shape \[12\], got \[13\]"),
    "missing": (lambda f: rewrite(f / SSR1, lambda s: s.pop("head.bias")), r"1 missing \(head.bias\), 0 unknown"),
    "unknown": (lambda f: rewrite(f / SSR1, lambda s: s.update({"extra": torch.zeros(1)})), r"0 missing, 1 unknown \(extra\)"),
    "json": (lambda f: (f / "model_index.json").write_text("{"), "model_index.json: want a JSON object"),
    "list": (lambda f: (f / "ssr1" / "config.json").write_text("[]"), "config.json: want a JSON object, got list"),
    "field": (lambda f: edit_json(f / "ssr1" / "config.json", lambda d: d.update(stepz=3)), "not a cascade of this engine.*stepz"),
    "value": (lambda f: edit_json(f / "ssr1" / "config.json", lambda d: d.update(steps=0)), "not a cascade of this engine.*steps"),
    "nameless": (lambda f: edit_json(f / "model_index.json", lambda d: d.pop("name")), "not a cascade of this engine.*name"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders_are_refused_before_anything_runs(copied, damage):
    change, says = DAMAGE[damage]
    change(copied)
    with pytest.raises(WeightsError, match=says) as error:
        Cascade.load(copied, "cpu", "fp32")
    assert "\n" not in str(error.value)


def test_stages_that_are_not_wanted_need_no_weights(copied):
    (copied / "ssr3" / WEIGHTS_NAME).unlink()
    cascade = Cascade.load(copied, "cpu", "fp32", STAGE_ORDER[:2])
    assert list(cascade.sample(PROMPT, SampleConfig(last_stage="tsr1"))) == ["base", "tsr1"]


def test_an_encoder_of_another_width_is_refused(cascade, monkeypatch):
    other = TextEmbedding(torch.zeros(1, 2, 64), torch.ones(1, 2, dtype=torch.bool))
    monkeypatch.setattr(module.TextEncoder, "encode", lambda self, prompts: other)
    with pytest.raises(WeightsError, match="want embeddings of 128, got 64"):
        cascade.encode([PROMPT])


def test_numbers_that_are_not_finite_name_their_stage(copied):
    rewrite(copied / "tsr1" / WEIGHTS_NAME, lambda s: s["head.bias"].fill_(float("nan")))
    with pytest.raises(NumericError, match="tsr1: the sampled video is not finite"):
        Cascade.load(copied, "cpu", "fp32").sample(PROMPT, SampleConfig(last_stage="ssr1"))


def test_a_prompt_that_is_cut_is_told(cascade):
    cascade.sample(" ".join(["red"] * 60), SampleConfig(last_stage="base", steps={"base": 1}))
    assert len(cascade.notes) == 1 and "only the first 48 were used" in cascade.notes[0]
    cascade.sample(PROMPT, SampleConfig(last_stage="base", steps={"base": 1}))
    assert not cascade.notes


@pytest.mark.parametrize(("device", "dtype", "says"), [
    ("gpu", "fp32", "device: want auto, cpu, cuda"), ("meta", "fp32", "device: want auto"), ("cpu", "fp16", "fp16 is for GPUs"),
    ("cuda:99", "fp32", "cuda:99 is not there")])
def test_devices_and_number_formats_that_are_not_there(tiny, device, dtype, says):
    with pytest.raises(ConfigError, match=says):
        Cascade.load(tiny, device, dtype)


def test_the_bundled_folder_describes_the_cascade_of_its_yaml():
    folder, config = find_cascade("sprites")
    assert find_cascade(folder)[1] == config
