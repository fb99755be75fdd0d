"""Videos beside each other: panels side by side for a player, a contact sheet for a page. For the eye; nothing is measured here.

Enlarging is nearest-neighbour, so that a pixel of a 24x40 stage stays visible as the pixel it is; only reducing is smoothed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from engine.media.atomic import disk_errors, replacing
from engine.media.encode import chunks_of, to_levels

GAP = 4                                                              # pixels between panels
CELL = 192                                                           # the largest height of a picture on a contact sheet


def side_by_side(panels: list[tuple[str, Tensor]], *, chunk: int = 16) -> Iterator[Tensor]:
    """Labelled videos [T_i, H_i, W_i, 3] in [-1, 1] -> chunks [t, H, W, 3] in [-1, 1] of one video, ready for write_video.

    Every panel is brought to the largest height, keeping its aspect, and to the largest frame count, repeating frames evenly
    (all are taken to last equally long, as the stages of a cascade do). Raises: ValueError for no panel or a wrong shape.
    """
    panels = _checked(panels, "panels")
    height, count = max(v.shape[1] for _, v in panels), max(v.shape[0] for _, v in panels)
    widths = [max(1, round(v.shape[2] * height / v.shape[1])) for _, v in panels]
    size = _text_size(height)
    top = torch.cat([_joined(_strip(label, width, size), i) for i, ((label, _), width) in enumerate(zip(panels, widths))], dim=1)

    def generate() -> Iterator[Tensor]:
        for begin in range(0, count, chunk):
            index = torch.arange(begin, min(begin + chunk, count))
            row = []
            for i, ((_, video), width) in enumerate(zip(panels, widths)):
                picked = video[index * len(video) // count].float()
                row.append(_joined(_resized(picked, height, width), i))
            body = torch.cat(row, dim=2)
            yield torch.cat([top.expand(len(index), *top.shape), body], dim=1)

    return generate()


def contact_sheet(path, rows: list[tuple[str, Tensor]], columns: int = 8) -> Path:
    """One PNG: per labelled video [T, H, W, 3] in [-1, 1] a row of `columns` frames, evenly spaced from first to last, label at left.

    Raises: ValueError for no row or a wrong shape; DiskError where `path` cannot be written.
    """
    rows, path = _checked(rows, "rows"), Path(path)
    if columns < 1:
        raise ValueError(f"columns: want at least 1, got {columns}")
    height = min(CELL, max(v.shape[1] for _, v in rows))
    size = _text_size(height)
    widths = [max(1, round(v.shape[2] * height / v.shape[1])) for _, v in rows]
    left = max(int(_font(size).getlength(label)) for label, _ in rows) + 2 * GAP
    sheet = np.zeros((len(rows) * (height + GAP) - GAP, left + columns * (max(widths) + GAP) - GAP, 3), np.uint8)
    for r, ((label, video), width) in enumerate(zip(rows, widths)):
        y = r * (height + GAP)
        sheet[y : y + height, :left] = to_levels(_strip(label, left, size, height)[None])[0]
        index = [round(c * (len(video) - 1) / max(1, columns - 1)) for c in range(columns)]
        for c, picture in enumerate(to_levels(_resized(video[index].float(), height, width))):
            x = left + c * (max(widths) + GAP)
            sheet[y : y + height, x : x + width] = picture
    with replacing(path) as part, disk_errors(path):
        Image.fromarray(sheet).save(part, format="PNG")
    return path


def _checked(labelled: list[tuple[str, Tensor]], name: str) -> list[tuple[str, Tensor]]:
    if not labelled:
        raise ValueError(f"{name}: want at least one (label, video), got none")
    for _, video in labelled:
        for _ in chunks_of(video):                                   # the checks of write_video, before any frame is drawn
            pass
    return [(str(label), video.detach().cpu()) for label, video in labelled]


def _resized(frames: Tensor, height: int, width: int) -> Tensor:
    """[t, h, w, 3] -> [t, height, width, 3]: nearest to enlarge, antialiased bicubic to reduce."""
    if frames.shape[1:3] == (height, width):
        return frames.clamp(-1, 1)
    planes = frames.permute(0, 3, 1, 2).contiguous()
    if height >= frames.shape[1]:
        planes = F.interpolate(planes, size=(height, width), mode="nearest-exact")
    else:
        planes = F.interpolate(planes, size=(height, width), mode="bicubic", antialias=True, align_corners=False)
    return planes.permute(0, 2, 3, 1).clamp(-1, 1)


def _joined(block: Tensor, i: int) -> Tensor:
    """Black between this panel and the one before it; width is the last axis but one."""
    return block if i == 0 else F.pad(block, (0, 0, GAP, 0), value=-1.0)


def _text_size(height: int) -> int:
    return max(10, height // 16)


def _font(size: int):
    return ImageFont.load_default(size)


def _strip(label: str, width: int, size: int, height: int | None = None) -> Tensor:
    """White text on black, [height, width, 3] in [-1, 1]; what does not fit is cut off at the right."""
    height = height or size * 3 // 2
    image = Image.new("RGB", (width, height))
    ImageDraw.Draw(image).text((GAP, height // 2), " ".join(label.split()), fill="white", font=_font(size), anchor="lm")
    return torch.from_numpy(np.array(image)).float() / 127.5 - 1
