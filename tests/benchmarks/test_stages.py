"""The shapes that are measured are the cascades' own."""

import pytest

from benchmarks import stages
from engine.cascade_folder import find_cascade


@pytest.mark.parametrize("name, table", [("imagen_video", stages.FULL), ("sprites", stages.SPRITES)])
def test_shapes_are_those_of_the_configs(name, table):
    _, cascade = find_cascade(name)
    assert list(table) == [stage.name for stage in cascade.stages]
    for stage in cascade.stages:
        unet = stage.unet
        frames, s = min(stage.frames, stage.chunk_frames or stage.frames), unet.space_to_depth
        want = (frames, stage.height // s, stage.width // s, tuple(unet.channels * mult for mult in unet.channel_mults), unet.temporal)
        assert table[stage.name] == want


def test_levels():
    assert stages.level("ssr3", 3) == (32, 48, 80, 1024) and stages.level("base", 2, stages.SPRITES) == (16, 3, 5, 192)
    assert stages.level("base", 3) == (16, 3, 5, 3072)
    with pytest.raises(IndexError):
        stages.level("ssr2", 1, stages.SPRITES)
