"""The rival computes our function: otherwise its time would say nothing."""

import pytest
import torch

from benchmarks.rival_unet import RivalUNet, frames_last
from engine.config import UNetConfig
from engine.models.unet import VideoUNet

COMMON = {"channels": 16, "channel_mults": (1, 2, 2), "num_blocks": (1, 2, 1), "groups": 4, "head_dim": 8, "text_dim": 12,
          "context_dim": 20}
CONFIGS = {
    "attention": {"temporal": "attention", "attention_levels": (1, 2), "attention_every_block": True, "max_frames": 5, "frame_index": True,
                  "coordinates": True, "space_to_depth": 2},
    "convolution": {"lowres": True, "attention_levels": (2,), "space_to_depth": 4},
    "plain": {"lowres": True, "channel_mults": (1,), "num_blocks": (2,)},
}


def random_unet(config: dict) -> VideoUNet:
    """No weight is zero, as the last layers of every branch are before training: a branch left out could not be seen."""
    unet = VideoUNet(UNetConfig(**COMMON | config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in unet.named_parameters():
            noise = torch.randn(value.shape, generator=generator) * (0.7 / max(1, value[0].numel()) ** 0.5 if value.ndim > 1 else 0.2)
            value.copy_(noise + (1 if "norm" in name and name.endswith("weight") else 0))
            if "position_bias" in name:
                value.mul_(4)
    return unet.eval()


def inputs(config, batch, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    size = 8 * config.space_to_depth

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    video = (batch, 5, size, size + 2 * config.space_to_depth, 3)        # 8x10 after the stem: 5 columns, then 3
    mask = torch.arange(6)[None] < torch.tensor([6, 4, 0])[:batch, None]
    extra = {"lowres": randn(*video), "aug_level": torch.linspace(0.1, 0.6, batch, dtype=dtype)} if config.lowres else {}
    return (randn(*video), torch.linspace(0.2, 0.9, batch, dtype=dtype), randn(batch, 6, config.text_dim), mask), extra


@pytest.mark.parametrize("independent", [None, [False, True, False], [True, True, True]], ids=["video", "mixed", "frames"])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_ours(name, independent):
    unet = random_unet(CONFIGS[name])
    rival = RivalUNet(unet)
    (z, *rest), extra = inputs(unet.config, 3)
    mask = None if independent is None else torch.tensor(independent)
    with torch.no_grad():
        ours = unet(z, *rest, **extra, independent_frames=mask)
        extra = {k: frames_last(v) if v.ndim == 5 else v for k, v in extra.items()}
        theirs = rival(frames_last(z), *rest, **extra, independent_frames=mask)
    assert theirs.shape == (3, 3, *z.shape[1:4]) and ours.std() > 0.1
    assert (theirs.permute(0, 2, 3, 4, 1) - ours).abs().max() <= 1e-5 * ours.abs().max()


def test_the_original_is_left_alone():
    """Building the rival reorders weights of copies; ours computes what it did, and casting one does not cast the other."""
    unet = random_unet(CONFIGS["attention"])
    args, extra = inputs(unet.config, 1)
    with torch.no_grad():
        before = unet(*args, **extra)
        RivalUNet(unet).to(torch.bfloat16)
        assert torch.equal(unet(*args, **extra), before)
