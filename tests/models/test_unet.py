"""The U-Net, above all the rule of Sec. 4.2: a frame of a sample marked as independent frames never hears of the others, to the last bit.

Every stage of both cascades is tested, made small but with its own structure, and with every weight random: the zeros that training
starts from would hide any leak. The first test shows that, without the mask, the leak is there to be seen.
"""

from functools import lru_cache
from pathlib import Path

import pytest
import torch

from engine.config import CascadeConfig, UNetConfig
from engine.config_io import load_config
from engine.models.unet import VideoUNet, count_parameters

CONFIGS = Path(__file__).parents[2] / "configs" / "cascade"
PAPER_PARAMETERS = {"base": 5.6e9, "tsr1": 1.7e9, "ssr1": 1.4e9, "ssr2": 1.2e9, "tsr2": 780e6, "tsr3": 630e6, "ssr3": 340e6}
T, L = 5, 4


@lru_cache
def cascade(name: str) -> CascadeConfig:
    return load_config(CascadeConfig, CONFIGS / f"{name}.yaml")


def shrunk(config: UNetConfig) -> UNetConfig:
    """The same structure, level by level, with few channels and one block."""
    small = {"channels": 32, "head_dim": 16, "groups": 8, "text_dim": 16, "context_dim": 16, "max_frames": 4,
             "num_blocks": (1,) * len(config.num_blocks)}
    return UNetConfig(**config.model_dump() | small)


def structures() -> dict[UNetConfig, str]:
    """Every small structure of the two cascades, with the stages that have it."""
    found: dict[UNetConfig, str] = {}
    for name in ("imagen_video", "sprites"):
        for stage in cascade(name).stages:
            config = shrunk(stage.unet)
            found[config] = f"{found[config]}+{stage.name}" if config in found else f"{name}.{stage.name}"
    return found


STRUCTURES = [pytest.param(config, id=stages) for config, stages in structures().items()]
every_structure = pytest.mark.parametrize("config", STRUCTURES)
BASE, SSR = shrunk(cascade("sprites").stage("base").unet), shrunk(cascade("sprites").stage("ssr2").unet)


def randomised(network: VideoUNet, seed: int = 0) -> VideoUNet:
    """No weight is left at zero or one."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in network.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if "table" in name:
            p.data = noise
        elif p.ndim > 1:
            p.data = noise * p[0].numel() ** -0.5
        else:
            p.data = 0.3 * noise + (1 if "norm" in name and name.endswith("weight") else 0)
    return network


@lru_cache
def network_of(config: UNetConfig) -> VideoUNet:
    return randomised(VideoUNet(config)).eval().requires_grad_(False)


def inputs(config: UNetConfig, B: int, frames: int = T, size: tuple[int, int] = (6, 10), seed: int = 1) -> dict[str, torch.Tensor]:
    """6x10 inside the network: 3x5, 2x3 and 1x2 on the levels below, odd sizes among them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (B, frames, size[0] * config.space_to_depth, size[1] * config.space_to_depth, 3)
    words = torch.arange(L, L - B, -1) if B < L else torch.full((B,), L)
    given = {"z": torch.randn(shape, generator=generator), "time": torch.rand(B, generator=generator),
             "text": torch.randn(B, L, config.text_dim, generator=generator), "text_mask": torch.arange(L) < words[:, None]}
    if config.lowres:
        given |= {"lowres": torch.randn(shape, generator=generator), "aug_level": torch.rand(B, generator=generator)}
    return given


def changed(given: dict, sample: int, frame: int, value: float | None = None) -> dict:
    """One frame of one sample becomes another picture (or all one value), in z and in the conditioning video."""
    given = {name: x.clone() for name, x in given.items()}
    for name in {"z", "lowres"} & given.keys():
        picture = given[name][sample, frame]
        given[name][sample, frame] = picture.flip(0) + 1 if value is None else value
    return given


def taken(given: dict, index) -> dict:
    return {name: x[index] for name, x in given.items()}


def frames_that_differ(a: torch.Tensor, b: torch.Tensor) -> set[tuple[int, int]]:
    differ = (a != b) | (a.isnan() != b.isnan())
    return {tuple(i) for i in differ.flatten(2).any(-1).nonzero().tolist()}


def run(config, given, independent=None) -> torch.Tensor:
    mask = None if independent is None else torch.tensor(independent)
    with torch.no_grad():
        return network_of(config)(**given, independent_frames=mask)


# --- the mask ----------------------------------------------------------------------------------------------------------------------

@every_structure
def test_without_the_mask_frames_do_mix(config):
    given = inputs(config, 2)
    differ = frames_that_differ(run(config, given), run(config, changed(given, 1, 2)))
    assert {(1, 1), (1, 2), (1, 3)} <= differ <= {(1, t) for t in range(T)}
    if config.temporal == "attention":
        assert len(differ) == T
    assert frames_that_differ(run(config, given), run(config, given, [False, False])) == set()


@every_structure
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_a_changed_frame_changes_no_other(config, grad):
    """A video beside, which must not notice either, and NaN, which no product with zero hides."""
    given, independent = inputs(config, 3), torch.tensor([True, False, True])
    network = network_of(config)
    with torch.set_grad_enabled(grad):
        before = network(**given, independent_frames=independent)
        assert frames_that_differ(before, network(**changed(given, 2, 3), independent_frames=independent)) == {(2, 3)}
        assert frames_that_differ(before, network(**changed(given, 0, 1, float("nan")), independent_frames=independent)) == {(0, 1)}


@every_structure
def test_permuted_frames_give_permuted_output(config):
    given, order = inputs(config, 2), torch.tensor([3, 1, 4, 0, 2])
    permuted = given | {name: given[name][:, order] for name in {"z", "lowres"} & given.keys()}
    out, moved = run(config, given, [True, False]), run(config, permuted, [True, False])
    assert torch.equal(moved[0], out[0, order])
    assert frames_that_differ(moved[1:], out[1:, order])                       # and a video is not a set


@every_structure
def test_a_mixed_batch_equals_its_kinds_apart(config):
    given = inputs(config, 3)
    mixed = run(config, given, [False, True, False])
    assert torch.equal(mixed[[1]], run(config, taken(given, [1]), [True]))
    assert torch.equal(mixed[[0, 2]], run(config, taken(given, [0, 2])))


@every_structure
def test_frames_of_a_set_equal_pictures(config):
    """The set of a clip's frames, and its frames as T samples of one frame each."""
    given = inputs(config, 1)
    pictures = {name: x[0][:, None] if name in ("z", "lowres") else x.expand(T, *x.shape[1:]) for name, x in given.items()}
    assert torch.equal(run(config, given, [True])[0], run(config, pictures, [True] * T)[:, 0])


@every_structure
def test_the_order_of_the_batch_does_not_matter(config):
    given, order = inputs(config, 3), [2, 0, 1]
    assert torch.equal(run(config, taken(given, order), [True, False, True]), run(config, given, [False, True, True])[order])


@every_structure
def test_gradients_stay_in_their_frame(config):
    given, network = inputs(config, 2), network_of(config)
    watched = [given[name].requires_grad_() for name in ("z", "lowres") if name in given]
    for independent in ([True, False], [False, False]):
        out = network(**given, independent_frames=torch.tensor(independent))
        for grad in torch.autograd.grad(out[0, 2].square().sum(), watched):
            reached = {tuple(i) for i in grad.flatten(2).any(-1).nonzero().tolist()}
            assert reached == {(0, 2)} if independent[0] else len(reached) > 1


def gradients(network, given, independent, loss=lambda out: out.square().sum()):
    network.zero_grad(set_to_none=True)
    loss(network(**given, independent_frames=None if independent is None else torch.tensor(independent))).backward()
    return {name: p.grad.clone() for name, p in network.named_parameters()}


@every_structure
def test_what_temporal_layers_learn_from_frames(config):
    """Masked attention keeps its value and output projections, masked convolutions are bypassed. A gradient is there, be it zero."""
    network, given = randomised(VideoUNet(config)), inputs(config, 2)
    from_video = gradients(network, given, None)
    from_frames = gradients(network, given, [True, True])
    only_video = {name for name in from_video if not from_frames[name].any()}
    temporal = [name for name in from_video if ".temporal." in name]
    if config.temporal == "attention":
        assert {name for name in temporal if "position_bias" in name} <= only_video
        for name in temporal:
            if "to_qkv" in name:
                q, k, v = from_frames[name].chunk(3)
                assert not q.any() and not k.any() and v.any()
        assert all("position_bias" in name or "frame_index" in name for name in only_video)
    else:
        assert only_video == set(temporal)
    assert all(grad.any() for grad in from_video.values())


# --- time, text, conditioning ------------------------------------------------------------------------------------------------------

@every_structure
def test_padding_tokens_do_not_count_and_words_do(config):
    given = inputs(config, 2)                                                  # 4 and 3 tokens of 4
    other = given["text"].clone()
    other[1, 3] = 50
    before = run(config, given)
    assert torch.equal(run(config, given | {"text": other}), before)
    other[1, 2] += 1
    assert frames_that_differ(run(config, given | {"text": other}), before) == {(1, t) for t in range(T)}


@every_structure
def test_no_text_is_an_all_false_mask(config):
    given = inputs(config, 2)
    null = given | {"text_mask": torch.zeros(2, L, dtype=torch.bool)}
    out = run(config, null)
    assert torch.isfinite(out).all() and len(frames_that_differ(out, run(config, given))) == 2 * T
    assert torch.equal(run(config, null | {"text": 7 * given["text"]}), out)


@every_structure
def test_time_and_conditioning_count(config):
    given = inputs(config, 2)
    before = run(config, given)
    for name in {"time", "aug_level", "lowres"} & given.keys():
        other = given[name].clone()
        other[1] = 0.5 * other[1] + 0.1
        assert frames_that_differ(run(config, given | {name: other}), before) == {(1, t) for t in range(T)}, name


def test_only_videos_know_the_clock():
    """With no picture to tell frames apart, a set gives one output T times; the frame index makes a video's frames differ."""
    given = inputs(BASE, 1)
    given["z"] = given["z"][:, :1].expand(-1, T, -1, -1, -1).contiguous()
    set_of_frames = run(BASE, given, [True])
    assert torch.equal(set_of_frames, set_of_frames[:, :1].expand_as(set_of_frames))
    video = run(BASE, given, [False])
    assert all((video[0, t] - video[0, 0]).abs().max() > 1e-3 for t in range(1, T))


def test_coordinates_break_the_symmetry_of_the_picture():
    """A shifted picture is not a shifted output where pixels know their place; it is, away from the borders, where they do not."""
    def responses(coordinates):
        flat = {"coordinates": coordinates, "channel_mults": (1,), "num_blocks": (1,), "attention_levels": ()}
        config = UNetConfig(**BASE.model_dump() | flat)
        given = inputs(config, 1, size=(20, 20))
        given["z"] = torch.zeros_like(given["z"])
        return run(config, given, [True])[0, 0]
    flat = responses(False)[14:-14, 14:-14].unflatten(0, (-1, 2)).unflatten(2, (-1, 2))       # blocks of 2x2 pixels
    assert torch.allclose(flat, flat[:1, :, :1].expand_as(flat), atol=1e-5)
    placed = responses(True)[14:-14, 14:-14].unflatten(0, (-1, 2)).unflatten(2, (-1, 2))
    assert (placed - placed[:1, :, :1]).abs().max() > 1e-2


# --- shapes, sizes, precision ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("stage", PAPER_PARAMETERS)
def test_parameters_are_the_papers(stage):
    assert count_parameters(cascade("imagen_video").stage(stage).unet) == pytest.approx(PAPER_PARAMETERS[stage], rel=0.02)


@pytest.mark.parametrize("name", ["imagen_video", "sprites"])
def test_a_fresh_network_predicts_zero(name):
    """Zero-initialised: the head, and the last layer of every residual branch."""
    for stage in cascade(name).stages[:3]:
        config = shrunk(stage.unet)
        assert not VideoUNet(config)(**inputs(config, 1)).any()


@pytest.mark.parametrize("size", [(24, 40), (3, 5), (1, 1), (7, 2)], ids=str)
def test_any_size_comes_back(size):
    config = shrunk(cascade("imagen_video").stage("base").unet)                # four levels
    out = run(config, inputs(config, 1, frames=2, size=size))
    assert out.shape == (1, 2, *size, 3) and torch.isfinite(out).all()


@pytest.mark.parametrize("frames", [1, 2, 9])
def test_any_number_of_frames_comes_back(frames):
    """Also more than the table of distances holds (4)."""
    for config in (BASE, SSR):
        assert torch.isfinite(run(config, inputs(config, 1, frames=frames))).all()


@pytest.mark.parametrize("config", [BASE, SSR], ids=["base", "ssr2"])
def test_bf16_follows_fp32(config):
    given = inputs(config, 2)
    network = randomised(VideoUNet(config)).to(torch.bfloat16).requires_grad_(False)
    out, exact = network(**given), run(config, given)
    assert out.dtype == torch.float32                                          # z's own
    assert (out - exact).square().mean() < 1e-3 * exact.square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stage", ["base", "ssr2"])
def test_the_same_bits_on_any_number_of_threads(stage, dtype):
    """The bundled networks at their own width. Small products are the trap: see engine/models/__init__.py."""
    config = cascade("sprites").stage(stage).unet
    network = randomised(VideoUNet(config)).to(dtype).requires_grad_(False)
    given, threads, outputs = inputs(config, 2), torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            outputs.append(network(**given))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("config", [BASE, SSR], ids=["base", "ssr2"])
@pytest.mark.parametrize("independent", [None, [False, True], [True, True]], ids=str)
def test_gradient_checkpointing_changes_nothing(config, independent):
    network, given = randomised(VideoUNet(config)), inputs(config, 2)
    plain = gradients(network, given, independent)
    network.gradient_checkpointing = True
    again = gradients(network, given, independent)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_gradient_checkpointing_runs_blocks_again():
    network, calls = randomised(VideoUNet(SSR)), []
    for block in network.down[0]:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    for checkpointing, times in ((False, 1), (True, 2)):
        network.gradient_checkpointing = checkpointing
        calls.clear()
        network(**inputs(SSR, 1)).sum().backward()
        assert len(calls) == times


def test_gradient_in_fp64():
    """A directional derivative of the whole network against a difference quotient, in every weight at once."""
    for config in (BASE, SSR):
        network = randomised(VideoUNet(config)).double()
        given = {name: x.double() if x.is_floating_point() else x for name, x in inputs(config, 2, frames=3).items()}

        def loss(network=network, given=given):
            return network(**given, independent_frames=torch.tensor([False, True])).sin().sum()

        loss().backward()
        generator = torch.Generator().manual_seed(3)
        steps = [torch.randn(p.shape, generator=generator, dtype=p.dtype) * p.detach().square().mean().sqrt() for p in network.parameters()]
        slope = sum((p.grad * step).sum() for p, step in zip(network.parameters(), steps))
        with torch.no_grad():
            values = []
            for h in (1e-5, -1e-5):
                for p, step in zip(network.parameters(), steps):
                    p += h * step
                values.append(loss())
                for p, step in zip(network.parameters(), steps):
                    p -= h * step
        # the embedding of time is made in fp32, the same for both
        assert (values[0] - values[1]).item() / 2e-5 == pytest.approx(slope.item(), rel=1e-4)


# --- refusals ----------------------------------------------------------------------------------------------------------------------

def test_refusals():
    base, ssr = network_of(BASE), network_of(SSR)
    given, other = inputs(BASE, 2), inputs(SSR, 2)
    for network, change, message in [
        (base, given | {"lowres": given["z"]}, "lowres, aug_level: want both None for this stage"),
        (base, given | {"aug_level": given["time"]}, "lowres, aug_level: want both None"),
        (ssr, other | {"lowres": None}, "lowres, aug_level: want both given"),
        (ssr, other | {"aug_level": None}, "lowres, aug_level: want both given"),
        (ssr, other | {"lowres": other["lowres"][:, :2]}, r"lowres: want the shape of z = \[2, 5, 24, 40, 3\], got \[2, 2, 24, 40, 3\]"),
        (base, given | {"z": given["z"][..., :2]}, r"z: want \[B, T, H, W, 3\]"),
        (base, given | {"z": given["z"][0]}, r"z: want \[B, T, H, W, 3\]"),
        (base, given | {"z": given["z"][:, :, :-1]}, r"H and W multiples of 2, got \[2, 5, 11, 20, 3\]"),
        (base, given | {"independent_frames": torch.ones(2)}, r"independent_frames: want bool \[2\], got torch.float32"),
        (base, given | {"independent_frames": torch.ones(3, dtype=torch.bool)}, r"independent_frames: want bool \[2\]"),
        (base, given | {"independent_frames": torch.ones(2, 5, dtype=torch.bool)}, r"independent_frames: want bool \[2\]"),
        (base, given | {"time": given["time"][:1]}, r"time: want \[2\], got \[1\]"),
        (ssr, other | {"aug_level": torch.tensor(0.1)}, r"aug_level: want \[2\], got \[\]"),
        (base, given | {"text": given["text"][..., :8]}, r"text: want \[2, L, 16\], got \[2, 4, 8\]"),
        (base, given | {"text_mask": given["text_mask"][:, :2]}, r"text_mask: want bool \[2, 4\]"),
        (base, given | {"text_mask": given["text_mask"].float()}, r"text_mask: want bool \[2, 4\], got torch.float32"),
    ]:
        with pytest.raises(ValueError, match=message):
            network(**change)
