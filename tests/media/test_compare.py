"""Panels and sheets: sizes, honest pixels, all frames in step."""

import numpy as np
import pytest
import torch
from PIL import Image

from engine.errors import DiskError
from engine.media import contact_sheet, side_by_side, write_video


def test_panels_are_brought_to_one_size_and_length():
    large, small = torch.zeros(32, 96, 160, 3), torch.rand(16, 24, 40, 3) * 2 - 1
    chunks = list(side_by_side([("input", large), ("base, 24x40", small)], chunk=10))
    assert [len(c) for c in chunks] == [10, 10, 10, 2]
    video = torch.cat(chunks)
    strip = video.shape[1] - 96
    assert 10 <= strip <= 24 and video.shape[2] == 160 + 4 + 160
    assert (video[:, strip:, :160] == 0).all() and (video[:, strip:, 160:164] == -1).all()
    panel = video[:, strip:, 164:]
    for i in (0, 1, 17, 31):                                                      # each frame twice, each pixel a square of 4
        assert torch.equal(panel[i], small[i // 2].repeat_interleave(4, 0).repeat_interleave(4, 1))
    assert (video[:, :strip, :160] > 0.5).any() and (video[:, :strip, 164:] > 0.5).any()      # both labels are drawn


def test_side_by_side_goes_through_write_video(tmp_path):
    path = write_video(tmp_path / "a.mp4", side_by_side([("a", torch.zeros(4, 9, 15, 3)), ("\u30af\u30de", torch.zeros(3, 24, 40, 3))]), 24)
    assert path.stat().st_size > 500


def test_contact_sheet(tmp_path):
    video = (torch.arange(15) / 14 * 2 - 1).view(15, 1, 1, 1).expand(15, 24, 40, 3)
    path = contact_sheet(tmp_path / "sheet.png", [("steps", video), ("one frame", video[:1].repeat(1, 2, 2, 1))])
    sheet = np.asarray(Image.open(path)).astype(int)
    left = sheet.shape[1] - 8 * 80 - 7 * 4
    assert sheet.shape[0] == 48 * 2 + 4 and left > 20
    for c in range(8):                                                            # frames 0, 2, ... 14: first and last are in
        cell = sheet[:48, left + c * 84 : left + c * 84 + 80]
        assert (cell == cell[0, 0]).all() and abs(cell[0, 0, 0] - round(2 * c / 14 * 255)) <= 1
    assert sheet[:48, :left].max() > 200 and sheet[52:, left:, :].max() == 0
    assert [f.name for f in tmp_path.iterdir()] == ["sheet.png"]


def test_large_frames_are_reduced(tmp_path):
    contact_sheet(tmp_path / "a.png", [("x", torch.zeros(2, 400, 600, 3))], columns=2)
    assert Image.open(tmp_path / "a.png").size[1] == 192


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match="panels: want at least one"):
        side_by_side([])
    with pytest.raises(ValueError, match="video: want float"):
        side_by_side([("a", torch.zeros(4, 8, 8))])
    with pytest.raises(ValueError, match="columns"):
        contact_sheet(tmp_path / "a.png", [("a", torch.zeros(1, 8, 8, 3))], columns=0)
    with pytest.raises(DiskError, match="a.png: cannot be written"):
        (tmp_path / "a.png").mkdir()
        contact_sheet(tmp_path / "a.png", [("a", torch.zeros(1, 8, 8, 3))])
    assert [f.name for f in tmp_path.iterdir()] == ["a.png"]
