import pytest
import torch

from engine.models.resblock import Downsample, ResBlock, Upsample, conv2d, depth_to_space, space_to_depth


@pytest.fixture
def x():
    return torch.randn(2, 3, 8, 12, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("s", [1, 2, 4])
def test_depth_to_space_is_the_inverse(s, x):
    deep = space_to_depth(x, s)
    assert deep.shape == (2, 3, 8 // s, 12 // s, 16 * s * s)
    assert torch.equal(depth_to_space(deep, s), x)
    assert torch.equal(deep[1, 2, 0, 1], x[1, 2, :s, s : 2 * s].flatten())     # a block of pixels, row by row, is one vector


def test_conv2d_is_a_convolution_of_each_frame(x):
    conv = torch.nn.Conv2d(16, 5, 3, padding=1)
    out = conv2d(x, conv)
    assert out.is_contiguous() and out.shape == (2, 3, 8, 12, 5)
    assert torch.allclose(out[1, 2], conv(x[1, 2].permute(2, 0, 1)[None])[0].permute(1, 2, 0), atol=1e-6)


@pytest.mark.parametrize("size", [(8, 12), (5, 7), (1, 1)], ids=str)
def test_down_then_up_comes_back_to_the_size(size, x):
    x = x[:, :, : size[0], : size[1]]
    down = Downsample(16, 24)(x)
    assert down.shape == (2, 3, -(-size[0] // 2), -(-size[1] // 2), 24)
    up = Upsample(24, 16)(down, size)
    assert up.shape == x.shape and up.is_contiguous()


def test_upsample_repeats_pixels():
    up = Upsample(1, 1)
    torch.nn.init.dirac_(up.conv.weight)
    torch.nn.init.zeros_(up.conv.bias)
    x = torch.arange(6.0).view(1, 1, 2, 3, 1)
    assert torch.equal(up(x, (4, 6)), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_resblock_begins_as_its_skip_and_then_hears_the_embedding(x):
    resblock, emb = ResBlock(16, 16, 10, 4), torch.randn(2, 1, 10, generator=torch.Generator().manual_seed(1))

    def block(x, emb):
        return resblock(x, emb)[0]                      # the rest are statistics

    assert torch.equal(block(x, emb), x)
    torch.nn.init.normal_(resblock.conv2.weight, generator=torch.Generator().manual_seed(2))
    out = block(x, emb)
    other = emb.clone()
    other[1] += 1
    differ = (block(x, other) != out).flatten(1).any(-1)
    assert differ.tolist() == [False, True]
    per_frame = emb.expand(2, 3, 10).clone()
    assert torch.equal(block(x, per_frame), out)
    per_frame[0, 1] += 1
    assert (block(x, per_frame) != out).flatten(2).any(-1).tolist() == [[False, True, False], [False] * 3]
    assert ResBlock(16, 24, 10, 4)(x, emb)[0].shape == (2, 3, 8, 12, 24)
