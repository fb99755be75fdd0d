"""Damaged files: each ends in a clip or in one MediaError line, never in anything else. Seeds are in the test's name."""

import random
import time

import numpy as np
import pytest
import torch
from PIL import Image

from engine.errors import MediaError
from engine.media import read_clip

SOURCES = ["h264.mp4", "vp9.webm", "mpeg4.avi", "ffv1.mkv", "h264.ts", "a.gif", "a.png", "a.jpg", "a.npy"]


@pytest.fixture(scope="session")
def sources(tmp_path_factory, make_video):
    folder = tmp_path_factory.mktemp("sources")
    y, x = np.mgrid[:48, :64]
    pictures = [np.stack([(x * 3 + i * 9) % 256, (y * 4 + i * 5) % 256, (x + y + i * 20) % 256], -1).astype(np.uint8) for i in range(12)]
    make_video(folder / "h264.mp4", pictures, sound=0.5)
    make_video(folder / "vp9.webm", pictures, codec="libvpx-vp9", options={"cpu-used": "8"})
    make_video(folder / "mpeg4.avi", pictures, codec="mpeg4", tagged=False)
    make_video(folder / "ffv1.mkv", pictures, codec="ffv1", pix_fmt="yuv444p")
    make_video(folder / "h264.ts", pictures, sound=0.5)
    images = [Image.fromarray(picture) for picture in pictures]
    images[0].save(folder / "a.gif", save_all=True, append_images=images[1:], duration=40)
    images[0].save(folder / "a.png")
    images[0].save(folder / "a.jpg")
    np.save(folder / "a.npy", np.stack(pictures))
    return folder


def damage(data: bytes, rng: random.Random) -> bytes:
    data, kind = bytearray(data), rng.choice(["cut", "bits", "zeros", "delete", "insert", "head"])
    at = rng.randrange(len(data))
    if kind == "cut":
        return bytes(data[:at])
    if kind == "bits":
        for _ in range(rng.choice([1, 5, 50])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "zeros":
        length = min(rng.choice([8, 200, 2000]), len(data) - at)
        data[at : at + length] = bytes(length)
    elif kind == "delete":
        del data[at : at + rng.choice([1, 30, 500])]
    elif kind == "insert":
        data[at:at] = rng.randbytes(rng.choice([1, 30, 500]))
    else:                                                                          # sizes and counts in the header
        for _ in range(4):
            data[rng.randrange(min(len(data), 700))] = rng.choice([0, 1, 127, 128, 255])
    return bytes(data)


@pytest.mark.fault
@pytest.mark.parametrize("seed", range(60))
def test_damaged_file(tmp_path, sources, seed):
    rng = random.Random(seed)
    name = SOURCES[seed % len(SOURCES)]
    path = tmp_path / name
    path.write_bytes(damage((sources / name).read_bytes(), rng))
    began = time.monotonic()
    try:
        clip = read_clip(path, frames=12, fps=24, height=24, width=40)
    except MediaError as error:
        assert "\n" not in str(error) and name in str(error)
    else:
        assert clip.video.shape == (12, 24, 40, 3) and torch.isfinite(clip.video).all() and clip.video.abs().max() <= 1
        assert clip.covered == 12 or clip.notes
    assert time.monotonic() - began < 20 and [f.name for f in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["h264.mp4", "vp9.webm", "ffv1.mkv", "a.png"])
def test_damage_in_the_middle_is_not_passed_over(tmp_path, sources, name):
    """A run of zeros over a third of the pictures' data: an error, or at least a note."""
    data = bytearray((sources / name).read_bytes())
    data[len(data) // 3 : len(data) * 2 // 3] = bytes(len(data) * 2 // 3 - len(data) // 3)
    (tmp_path / name).write_bytes(data)
    try:
        clip = read_clip(tmp_path / name, frames=12 if "." in name and name[0] != "a" else 1, fps=24, height=24, width=40)
    except MediaError:
        return
    assert clip.notes
