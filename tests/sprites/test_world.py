"""The world is deterministic, the same at every size and frame count, and its held-out combinations stay out of training."""

from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F

from engine.sprites import ATTRIBUTES, is_held_out, render, render_frames, sample_scenes, scene_from_attributes


def equal(a, b):
    return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))


def test_same_seed_same_scenes_and_pixels():
    a, b, other = sample_scenes(20, 5), sample_scenes(20, 5), sample_scenes(20, 6)
    assert equal(a, b) and not equal(a, other)
    assert torch.equal(render(a), render(b))
    generator = torch.Generator().manual_seed(5)
    assert equal(sample_scenes(20, generator), a)
    assert not equal(sample_scenes(20, generator), a)                  # a generator moves on


def test_batch_does_not_change_a_scene():
    scenes = sample_scenes(24, 1)
    assert torch.equal(render(scenes)[7:9], render(scenes[7:9]))
    assert torch.equal(render(scenes)[3:4], render(scenes[3]))


def test_pictures_are_in_range_and_float32():
    video = render(sample_scenes(64, 2, None))
    assert video.shape == (64, 16, 24, 40, 3) and video.dtype == torch.float32 and video.is_contiguous()
    assert -1 <= video.min() and video.max() <= 1


@pytest.mark.parametrize(("height", "width"), [(24, 40), (48, 80)])
def test_more_frames_show_the_same_scene(height, width):
    scenes = sample_scenes(6, 3)
    assert torch.equal(render(scenes, 128, height, width)[:, ::8], render(scenes, 16, height, width))


def test_frame_range_and_crop_equal_the_slice():
    scenes = sample_scenes(5, 4, None)
    whole = render(scenes, 32, 96, 160)
    assert torch.equal(render(scenes, 32, 96, 160, start=9, stop=14), whole[:, 9:14])
    assert torch.equal(render(scenes, 32, 96, 160, crop=(11, 37, 30, 53)), whole[:, :, 11:41, 37:90])
    y, x = torch.tensor([0, 5, 9, 66, 31]), torch.tensor([1, 107, 7, 0, 40])
    crops = render(scenes, 32, 96, 160, start=3, stop=5, crop=(y, x, 30, 53))
    for i in range(5):
        assert torch.equal(crops[i], whole[i, 3:5, y[i] : y[i] + 30, x[i] : x[i] + 53])


def test_sizes_show_the_same_scene():
    scenes = sample_scenes(40, 8, None)
    small, big = render(scenes, 4), render(scenes, 4, 96, 160)
    averaged = F.avg_pool2d(big.flatten(0, 1).movedim(-1, 1), 4).movedim(1, -1).unflatten(0, (40, 4))
    assert (averaged - small).abs().mean() < 0.01                      # antialiased: only edges differ, and little


def test_single_frames_are_frames_of_the_clip():
    scenes = sample_scenes(16, 9)
    frames = render_frames(scenes, torch.arange(16) / 16, 48, 80)
    assert torch.equal(frames, render(scenes, 16, 48, 80)[torch.arange(16), torch.arange(16)])


def test_held_out_combinations_never_train():
    train, held_out = sample_scenes(6000, 1, "train"), sample_scenes(2000, 1, "held_out")
    codes = [{tuple(row) for row in torch.stack([getattr(s, name) for name in ATTRIBUTES], 1).tolist()} for s in (train, held_out)]
    assert is_held_out(held_out).all() and not is_held_out(train).any()
    assert not codes[0] & codes[1] and len(codes[1]) > 250
    combinations = torch.cartesian_prod(*(torch.arange(len(v)) for v in ATTRIBUTES.values())).T
    assert 0.08 < is_held_out(combinations).float().mean() < 0.12
    for row, values in zip(combinations, ATTRIBUTES.values(), strict=True):           # no value is favoured: edits to any can be judged
        for value in range(len(values)):
            assert 0.07 < is_held_out(combinations[:, row == value]).float().mean() < 0.14


def test_sprite_stays_inside_and_travels_as_named():
    scenes = sample_scenes(3000, 2, None)
    centres = scenes.centres(torch.tensor([0.0, 0.5, 1.0]))
    reach = scenes.radius[:, None]
    assert (centres[..., 0] > reach).all() and (centres[..., 0] < 40 - reach).all()
    assert (centres[..., 1] > reach).all() and (centres[..., 1] < 24 - reach).all()
    travel = centres[:, 2] - centres[:, 0]
    low = torch.tensor([[0, 0], [-22, 0], [16, 0], [0, -10], [0, 7]])[scenes.motion] - 1e-4
    high = torch.tensor([[0, 0], [-16, 0], [22, 0], [0, -7], [0, 10]])[scenes.motion] + 1e-4
    assert ((travel >= low) & (travel <= high)).all()


def test_replace_keeps_the_rest():
    scenes = sample_scenes(30, 4)
    edited = scenes.replace(colour="cyan", style=["night"] * 30, motion=torch.zeros(30, dtype=torch.long))
    assert all(edited.attributes(i)["colour"] == "cyan" and edited.attributes(i)["style"] == "night" for i in range(30))
    assert torch.equal(edited.shape, scenes.shape) and torch.equal(edited.across, scenes.across) and (edited.motion == 0).all()
    plain = scenes.replace(colour="red")
    different = (render(plain) - render(plain.replace(colour="green"))).abs().amax((-1, 1)) > 1e-6
    assert 0.02 < different.float().mean() < 0.6                       # the background stays
    forth, back = render(scenes.replace(motion="left"), 16), render(scenes.replace(motion="right"), 16)
    assert torch.allclose(forth[:, 1:], back.flip(1)[:, :-1], atol=1e-4)              # u = i / 16 and 1 - i / 16


def test_scene_from_attributes():
    wanted = dict(zip(ATTRIBUTES, ("cross", "red", "olive", "striped", "sketch", "up"), strict=True))
    assert scene_from_attributes(wanted, 3).attributes() == wanted


@pytest.mark.parametrize("call", [
    lambda s: sample_scenes(3, 0, "test"), lambda s: render(s, 16, start=4, stop=4), lambda s: render(s, 16, stop=17),
    lambda s: render(s, crop=(0, 30, 8, 11)), lambda s: s.replace(colour="pink"), lambda s: s.replace(texture="plain"),
    lambda s: s.replace(shape=torch.tensor([0, 4])), lambda s: render_frames(s, torch.zeros(3)),
])
def test_wrong_arguments_are_refused(call):
    with pytest.raises(ValueError, match="want"):
        call(sample_scenes(2, 0))
