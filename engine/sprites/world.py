"""The procedural world of the bundled cascade: one sprite moving over a patterned background, rendered exactly at any size.

A scene has six named attributes (what a caption says) and five unnamed details (position along both axes, radius, speed, phase of
the pattern). It is a function of continuous time u in [0, 1) and of continuous space (a frame is 24 by 40 base pixels, y down), so
frame i of T shows u = i / T: the clip of 128 frames taken at [::8] is the clip of 16 frames, at every size, and every stage of the
cascade has exact data. Shapes are signed distances and patterns are square waves; both are covered analytically at the target's pixels.
"""

import math
from dataclasses import dataclass, fields
from dataclasses import replace as dataclass_replace

import torch
from torch import Tensor

HEIGHT, WIDTH, FRAMES = 24, 40, 16
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
BACKGROUND_COLOURS = ("grey", "brown", "navy", "olive", "rose")
BACKGROUND_KINDS = ("plain", "striped", "checkered")
STYLES = ("normal", "sketch", "night")
MOTIONS = ("still", "left", "right", "up", "down")
ATTRIBUTES = {
    "shape": SHAPES, "colour": COLOURS, "background_colour": BACKGROUND_COLOURS,
    "background_kind": BACKGROUND_KINDS, "style": STYLES, "motion": MOTIONS,
}
STYLE_PROBABILITIES = (0.6, 0.2, 0.2)

# Colours in [0, 1], tuned so that chroma (R - G, G - B) tells all of them apart under every style: the readout rests on it.
COLOUR_RGB = torch.tensor(
    [[0.90, 0.10, 0.12], [0.08, 0.78, 0.18], [0.10, 0.25, 0.98], [0.98, 0.90, 0.08], [0.66, 0.10, 0.88], [0.08, 0.88, 0.92]])
BACKGROUND_RGB = torch.tensor([[0.50, 0.50, 0.50], [0.56, 0.36, 0.22], [0.22, 0.26, 0.54], [0.44, 0.50, 0.20], [0.78, 0.46, 0.56]])
SHADE = 0.18                                             # a pattern's two shades are the background's colour +- this
BACKGROUND_GAIN = torch.tensor([[1.0, 1.0, 1.0], [0.55, 0.55, 0.55], [0.42, 0.43, 0.48]])       # normal, sketch, night
BACKGROUND_LIFT = torch.tensor([[0.0, 0.0, 0.0], [0.42, 0.42, 0.42], [0.0, 0.0, 0.02]])         # sketch: towards paper white
SPRITE_GAIN = torch.tensor([1.0, 1.0, 0.75])
STRIPE_PERIOD, CHECKER_CELL = 8.0, 6.0                   # base pixels; vertical stripes
RING = 1.8                                               # width of a sketch's outline, base pixels, inside the shape's edge
RADIUS = (5.5, 6.5)
TRAVEL_X, TRAVEL_Y = (16.0, 22.0), (7.0, 10.0)           # over the whole clip, u from 0 to 1
MARGIN = 0.25                                            # kept between the sprite and the frame's edge
SPLITS = ("train", "held_out")
_BLOCK_PIXELS = 1 << 18                                  # of one temporary: stays in cache, bounds memory at 128x192x320


@dataclass(frozen=True)
class Scenes:
    """N scenes, a struct of arrays. Attributes [N] int64 index the tuples of `ATTRIBUTES`; details [N] float32.

    `across`, `down` place the middle of the path, `speed` the travel, each in [0, 1] of what keeps the sprite inside the frame, so every
    replaced attribute still gives a scene that fits, and left and right are each other's reverse. `radius` in base pixels; `phase`
    [N, 2] (x, y) in [0, 1] periods of the pattern.
    """

    shape: Tensor
    colour: Tensor
    background_colour: Tensor
    background_kind: Tensor
    style: Tensor
    motion: Tensor
    across: Tensor
    down: Tensor
    radius: Tensor
    speed: Tensor
    phase: Tensor

    def __len__(self) -> int:
        return self.shape.shape[0]

    def __getitem__(self, at) -> "Scenes":
        """Scenes at an int (a batch of one), a slice, or a list or tensor of indices."""
        if isinstance(at, int):
            at = slice(at, at + 1 or None)
        return Scenes(*(getattr(self, f.name)[at] for f in fields(self)))

    def to(self, device: "torch.device | str") -> "Scenes":
        """The same scenes on another device: they are rendered where they are."""
        return Scenes(*(getattr(self, f.name).to(device) for f in fields(self)))

    def replace(self, **values) -> "Scenes":
        """The same scenes with other attributes: the ground truth of an edit. A value is a name, a list of N names, or indices [N]."""
        new = {}
        for name, value in values.items():
            if name in ATTRIBUTES:
                new[name] = _indices(name, value, len(self)).to(self.shape.device)
            elif hasattr(self, name):
                new[name] = torch.as_tensor(value, dtype=torch.float32).expand_as(getattr(self, name)).clone()
            else:
                raise ValueError(f"replace: want one of {[f.name for f in fields(self)]}, got {name!r}")
        return dataclass_replace(self, **new)

    def attributes(self, i: int = 0) -> dict[str, str]:
        """The names of scene i's attributes."""
        return {name: values[int(getattr(self, name)[i])] for name, values in ATTRIBUTES.items()}

    def centres(self, u: Tensor) -> Tensor:
        """Where the sprite is. u [T] or [N, T] -> [N, T, 2] (x, y) in base pixels."""
        u = u.expand(len(self), -1) if u.dim() == 1 else u
        still, horizontal = self.motion == 0, (self.motion == 1) | (self.motion == 2)
        sign = torch.where((self.motion == 1) | (self.motion == 3), -1.0, 1.0)
        travel_x = torch.where(horizontal, TRAVEL_X[0] + self.speed * (TRAVEL_X[1] - TRAVEL_X[0]), 0.0)
        travel_y = torch.where(horizontal | still, 0.0, TRAVEL_Y[0] + self.speed * (TRAVEL_Y[1] - TRAVEL_Y[0]))

        def path(unit, travel, size):
            low = self.radius + travel / 2 + MARGIN
            middle = low + unit * (size - 2 * low)
            return middle[:, None] + (sign * travel)[:, None] * (u - 0.5)

        return torch.stack([path(self.across, travel_x, WIDTH), path(self.down, travel_y, HEIGHT)], -1)


def sample_scenes(n: int, seed: "int | torch.Generator", split: str | None = "train") -> Scenes:
    """n random scenes; the same seed gives the same scenes.

    split: "train" never shows the tenth of all attribute combinations that "held_out" consists of; None draws from both.
    """
    if split not in (None, *SPLITS):
        raise ValueError(f"split: want one of {SPLITS} or None, got {split!r}")
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)

    def draw():
        picks = [torch.randint(len(values), (n,), generator=generator) for values in ATTRIBUTES.values()]
        picks[4] = torch.multinomial(torch.tensor(STYLE_PROBABILITIES), max(n, 1), replacement=True, generator=generator)[:n]
        return torch.stack(picks)

    picks = draw()
    while split is not None and (wrong := is_held_out(picks) != (split == "held_out")).any():
        picks = torch.where(wrong, draw(), picks)
    across, down, radius, speed, px, py = torch.rand(6, n, generator=generator)
    return Scenes(*picks, across, down, RADIUS[0] + radius * (RADIUS[1] - RADIUS[0]), speed, torch.stack([px, py], -1))


def scene_from_attributes(attributes: dict[str, str], seed: "int | torch.Generator" = 0) -> Scenes:
    """A batch of one scene with these attributes (those missing are drawn) and details drawn from the seed."""
    return sample_scenes(1, seed, split=None).replace(**attributes)


def is_held_out(scenes: "Scenes | Tensor") -> Tensor:
    """[N] bool: combinations kept from training, by a fixed hash. Also takes attribute indices [6, N] in the order of ATTRIBUTES."""
    picks = scenes if isinstance(scenes, Tensor) else torch.stack([getattr(scenes, name) for name in ATTRIBUTES])
    code = torch.zeros_like(picks[0])
    for row, values in zip(picks, ATTRIBUTES.values(), strict=True):
        code = code * len(values) + row
    for _ in range(2):                                   # two rounds of multiply and fold, so neighbours part ways
        code = ((code + 0x1B873) * 0x9E3779B1) & 0xFFFFFFFF
        code = code ^ (code >> 15)
    return code % 10 == 0


def render(scenes: Scenes, frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH, *, start: int = 0, stop: int | None = None,
           crop: tuple | None = None) -> Tensor:
    """The scenes as clips.   -> [N, stop - start, H, W, 3] float32 in [-1, 1]

    start, stop: the frames wanted of a clip of `frames`; equal, bit for bit, to the slice of the whole.
    crop: (y, x, h, w) in pixels of the target size, likewise; y and x may be int64 tensors [N], one corner per scene.
    """
    stop = frames if stop is None else stop
    if not 0 <= start < stop <= frames:
        raise ValueError(f"start, stop: want 0 <= start < stop <= {frames}, got {start}, {stop}")
    u = torch.arange(start, stop, dtype=torch.float32, device=scenes.shape.device) / frames
    return _paint(scenes, u.expand(len(scenes), -1), height, width, crop)


def render_frames(scenes: Scenes, u: Tensor, height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    """One picture of each scene, at its own time.   u [N] in [0, 1] -> [N, H, W, 3] float32 in [-1, 1]"""
    if u.shape != (len(scenes),):
        raise ValueError(f"u: want [N] = [{len(scenes)}], got {[*u.shape]}")
    return _paint(scenes, u[:, None].float(), height, width, None)[:, 0]


def _paint(scenes: Scenes, u: Tensor, height: int, width: int, crop) -> Tensor:
    y, x, h, w = crop if crop is not None else (0, 0, height, width)
    for name, corner, size, full in (("y", y, h, height), ("x", x, w, width)):
        corner = torch.as_tensor(corner)
        if size < 1 or int(corner.min()) < 0 or int(corner.max()) + size > full:
            raise ValueError(f"crop: want it inside {height}x{width}, got {name} from {int(corner.min())} to {int(corner.max())} + {size}")
    pixel_y, pixel_x = HEIGHT / height, WIDTH / width    # the size of a target pixel, in base pixels
    device = scenes.shape.device
    ys, xs = ((torch.arange(size, device=device) + torch.as_tensor(corner, device=device).view(-1, 1) + 0.5) * pixel
              for size, corner, pixel in ((h, y, pixel_y), (w, x, pixel_x)))                     # [1 or N, h or w]
    background = _background(scenes, ys, xs, pixel_y, pixel_x)                                   # [N, h, w, 3]
    sprite = _pick(COLOUR_RGB, scenes.colour) * _pick(SPRITE_GAIN, scenes.style)[:, None] * 2 - 1          # [N, 3]
    difference = sprite[:, None, None] - background
    centres, pixel = scenes.centres(u), math.sqrt(pixel_y * pixel_x)
    out = torch.empty(len(scenes), u.shape[1], h, w, 3, device=device)
    ring_all = torch.where(scenes.style == 1, RING, 1e3)                                         # 1e3: no hole
    at_once = max(1, _BLOCK_PIXELS // (h * w))
    for shape in range(len(SHAPES)):
        members = (scenes.shape == shape).nonzero().flatten()
        for first in range(0, len(members), at_once):
            some = members[first : first + at_once]
            ys_some, xs_some = (a if a.shape[0] == 1 else a[some] for a in (ys, xs))
            span = max(1, at_once // len(some))
            for t in range(0, u.shape[1], span):
                centre = centres[some, t : t + span]
                dx = xs_some[:, None, None, :] - centre[..., 0, None, None]                      # [n, t, 1, w]
                dy = ys_some[:, None, :, None] - centre[..., 1, None, None]                      # [n, t, h, 1]
                cover = coverage(shape, dx, dy, scenes.radius[some].view(-1, 1, 1, 1), ring_all[some].view(-1, 1, 1, 1), pixel)
                painted = cover[..., None] * difference[some][:, None]
                out[some, t : t + span] = painted.add_(background[some][:, None])
    return out


def _background(scenes: Scenes, ys: Tensor, xs: Tensor, pixel_y: float, pixel_x: float) -> Tensor:
    """[N, h, w, 3] in [-1, 1]: colour +- shade by a square wave (stripes) or the product of two (checkers), under the style."""
    def wave(positions, phase, period, pixel):           # -1 .. 1, its edges covered over one pixel
        distance = ((positions + phase[:, None] * period) % period - period / 2).abs_().sub_(period / 4)
        return (distance * (2 / pixel)).clamp_(-1, 1)

    stripes = wave(xs, scenes.phase[:, 0], STRIPE_PERIOD, pixel_x)[:, None, :]
    checkers = wave(xs, scenes.phase[:, 0], 2 * CHECKER_CELL, pixel_x)[:, None, :] * wave(
        ys, scenes.phase[:, 1], 2 * CHECKER_CELL, pixel_y)[:, :, None]
    kind = scenes.background_kind[:, None, None]
    pattern = torch.where(kind == 1, stripes, torch.where(kind == 2, checkers, 0.0))
    gain, lift = _pick(BACKGROUND_GAIN, scenes.style), _pick(BACKGROUND_LIFT, scenes.style)      # [N, 3]
    base = (_pick(BACKGROUND_RGB, scenes.background_colour) * gain + lift) * 2 - 1
    return base[:, None, None] + pattern[..., None] * (gain * (SHADE * 2))[:, None, None]


def coverage(shape: int, dx: Tensor, dy: Tensor, radius: Tensor, ring: Tensor, pixel: float) -> Tensor:
    """[n, t, h, w] in [0, 1]: how much of a pixel the shape covers, from its signed distance (negative inside, base pixels)."""
    if shape == 0:
        distance = (dx * dx + dy * dy).sqrt_().sub_(radius)
    elif shape == 1:
        distance = torch.maximum(dx.abs() - 0.88 * radius, dy.abs() - 0.88 * radius)             # about the circle's area
    elif shape == 2:                                     # apex (0, -r), base from (-r, .8 r) to (r, .8 r)
        slope = math.hypot(1.8, 1.0)
        distance = torch.maximum((dx.abs() * 1.8 - radius) / slope - dy / slope, dy - 0.8 * radius)
    else:
        bar_x, bar_y = dx.abs(), dy.abs()
        distance = torch.minimum(torch.maximum(bar_x - radius, bar_y - 0.4 * radius), torch.maximum(bar_y - radius, bar_x - 0.4 * radius))
    hole = (distance + ring).mul_(-1 / pixel).add_(0.5).clamp_(0, 1)
    return distance.mul_(-1 / pixel).add_(0.5).clamp_(0, 1).sub_(hole)


def _pick(table: Tensor, index: Tensor) -> Tensor:
    return table.to(index.device)[index]


def _indices(name: str, value, count: int) -> Tensor:
    names = ATTRIBUTES[name]
    if isinstance(value, Tensor):
        if value.shape not in ((), (count,)) or (value.numel() and not 0 <= int(value.min()) <= int(value.max()) < len(names)):
            raise ValueError(f"{name}: want indices [{count}] below {len(names)}, got {value}")
        return value.long().expand(count).clone()
    wanted = [value] * count if isinstance(value, str) else list(value)
    if len(wanted) != count or any(v not in names for v in wanted):
        raise ValueError(f"{name}: want one or {count} of {names}, got {value!r}")
    return torch.tensor([names.index(v) for v in wanted], dtype=torch.long)
