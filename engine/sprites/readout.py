"""What a clip shows, read back from its pixels by analysis: no weights, so nothing is trained to flatter a generator.

The world's patterns shift all channels alike, so a pixel's chroma (R - G, G - B) is a blend of just two points, the background's and
the sprite's: projecting on the line between them gives the sprite's soft mask (matte) in every frame, whatever the pattern. From there:
background colour and style are the nearest prototype of chroma and brightness behind the sprite (with the outline as further evidence
of a sketch), the kind is a variance test, the track is the matte's centroid, motion its slope, and the shape is the best match of the
matte, averaged along the track, among the four shapes rendered at several radii, offsets and degrees of blur.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.sprites import world
from engine.sprites.world import ATTRIBUTES, FRAMES, HEIGHT, WIDTH, Scenes

_HALF = 8                                                # the matte is matched in a window of 17 by 17 base pixels
_TOP = 24                                                # pixels that are surely sprite: fewer than the thinnest outline has
_AT_ONCE = 16                                            # clips per pass, bounds memory
_OUTLINE_WEIGHT = 0.08                                   # 1 - correlation, against squared distance of colour in [-1, 1]
_MOVES_X, _MOVES_Y = 0.45 * 19, 0.45 * 8.5               # least travel that counts, of the world's mean travels


@dataclass(frozen=True)
class Reading:
    """What N clips show. Attributes [N] int64 index the tuples of `ATTRIBUTES`, as in `Scenes`.

    track [N, T', 2]: the sprite's centre (x, y) in base pixels in the T' = min(T, 16) frames read; displacement [N, 2]: travel over
    u from 0 to 1; match [N]: correlation of the sprite with the best shape, 1 is perfect, noise about .55.
    """

    shape: Tensor
    colour: Tensor
    background_colour: Tensor
    background_kind: Tensor
    style: Tensor
    motion: Tensor
    track: Tensor
    displacement: Tensor
    match: Tensor

    def __len__(self) -> int:
        return self.shape.shape[0]

    def __iter__(self) -> Iterator[dict[str, str]]:
        return (self.attributes(i) for i in range(len(self)))

    def attributes(self, i: int = 0) -> dict[str, str]:
        """The names of what clip i shows."""
        return {name: values[int(getattr(self, name)[i])] for name, values in ATTRIBUTES.items()}


def read(video: Tensor) -> Reading:
    """Attributes and track of every clip.   video [N, T, H, W, 3] in [-1, 1], H x W a multiple or more of 24 x 40

    Bigger pictures are averaged down to 24x40, longer clips read at 16 evenly spaced frames; a clip of one frame reads as still.
    """
    if video.dim() != 5 or video.shape[-1] != 3 or video.shape[2] < HEIGHT or video.shape[3] < WIDTH:
        raise ValueError(f"video: want [N, T, H >= {HEIGHT}, W >= {WIDTH}, 3], got {[*video.shape]}")
    parts = [_read(_to_base(some)) for some in video.split(_AT_ONCE)]
    return Reading(*(torch.cat([getattr(part, name) for part in parts]) for name in Reading.__dataclass_fields__))


def score(video: Tensor, wanted: "Scenes | list[dict[str, str]]") -> dict[str, float]:
    """Share of the clips in which each attribute is read as wanted. Attributes that no dict names are left out.   video [N, T, H, W, 3]"""
    if len(wanted) != len(video):
        raise ValueError(f"wanted: want {len(video)} scenes or dicts, one per clip, got {len(wanted)}")
    named = [wanted.attributes(i) for i in range(len(wanted))] if isinstance(wanted, Scenes) else wanted
    right = {name: [] for name in ATTRIBUTES}
    for found, want in zip(read(video), named, strict=True):
        for name, value in want.items():
            right[name].append(found[name] == value)
    return {name: sum(hits) / len(hits) for name, hits in right.items() if hits}


def _to_base(video: Tensor) -> Tensor:
    """[N, T, H, W, 3] -> ([N, T', 24, 40, 3] fp32, finite)"""
    frames = video.shape[1]
    if frames > FRAMES:
        video = video[:, torch.arange(FRAMES) * frames // FRAMES]
    video = video.float().cpu()
    if video.shape[2:4] != (HEIGHT, WIDTH):
        planes = F.adaptive_avg_pool2d(video.flatten(0, 1).movedim(-1, 1), (HEIGHT, WIDTH))
        video = planes.movedim(1, -1).unflatten(0, video.shape[:2])
    return video.nan_to_num(0.0).clamp(-1.5, 1.5)


def _chroma(rgb: Tensor) -> Tensor:
    return rgb[..., :2] - rgb[..., 1:]


def _read(video: Tensor) -> Reading:
    count, frames = video.shape[:2]
    chroma = _chroma(video)                                                            # [N, T, 24, 40, 2]
    behind = chroma.flatten(1, 3).median(1).values                                     # the sprite covers less than a fifth
    for _ in range(2):                                                                 # the second time from the background alone
        away = (chroma - behind[:, None, None, None]).square().sum(-1).sqrt()
        strength = away.flatten(2).topk(_TOP, -1).values.mean(-1).median(-1).values
        near = F.max_pool2d(away, 3, 1, 1) > 0.3 * strength[:, None, None, None]
        free = (~near).float()
        behind = (chroma * free[..., None]).sum((1, 2, 3)) / free.sum((1, 2, 3))[:, None].clamp(min=1)

    picture, seen, middle = _background(video, free)
    # the surest pixels near the sprite, mean of a frame, median of the frames: its chroma, and so the line that pixels are projected on
    likely = (away / strength.clamp(min=1e-3)[:, None, None, None]).clamp(0, 1.2)
    likely = likely * _window(_track(likely).flatten(0, 1)).view_as(likely)
    top = likely.flatten(2).topk(_TOP, -1).indices[..., None].expand(-1, -1, -1, 2)
    front = chroma.flatten(2, 3).gather(2, top).mean(2).median(1).values
    line = front - behind
    along = ((chroma - behind[:, None, None, None]) * line[:, None, None, None]).sum(-1)
    matte = (along / line.square().sum(-1).clamp(min=1e-3)[:, None, None, None]).clamp(0, 1.2)

    centroid = _track(matte)                                                           # [N, T, 2]
    match = _match(_patch(matte, centroid))                                            # [N, styles of drawing 2, shapes 4, variants]
    best = match.amax(-1)                                                              # [N, 2, 4]
    background_colour, style = _prototype(behind, middle, best.amax(-1))
    drawn = (style == 1).long()
    best_drawn = best[torch.arange(count), drawn]                                      # [N, 4]
    shape = best_drawn.argmax(-1)
    variant = match[torch.arange(count), drawn, shape].argmax(-1)
    track = centroid + _templates()[1][drawn, shape, variant][:, None]
    u = torch.arange(frames) / frames
    displacement = _slope(track, u)
    return Reading(
        shape=shape, colour=_colour(line, behind, style), background_colour=background_colour,
        background_kind=_kind(picture, seen, style), style=style, motion=_motion(displacement),
        track=track, displacement=displacement, match=best_drawn.amax(-1))


def _background(video: Tensor, free: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Brightness behind the sprite [N, 24, 40], where it was seen at all [N, 24, 40], and the middle between its two shades [N]."""
    brightness = video.mean(-1)
    seen = free.sum(1)
    picture = (brightness * free).sum(1) / seen.clamp(min=1)
    # half of each shade: midway between the quartiles, whatever share of either the sprite hides
    quartiles = picture.masked_fill(seen == 0, torch.nan).flatten(1).nanquantile(torch.tensor([0.25, 0.75]), dim=1)
    return picture, (seen > 0).float(), quartiles.mean(0).nan_to_num(0.0)


def _prototype(behind: Tensor, middle: Tensor, match: Tensor) -> tuple[Tensor, Tensor]:
    """Background colour and style [N] by the nearest of the 15 prototypes; match [N, 2] is how well filled and outlined shapes fit."""
    rgb = (world.BACKGROUND_RGB[None] * world.BACKGROUND_GAIN[:, None] + world.BACKGROUND_LIFT[:, None]) * 2 - 1          # [3, 5, 3]
    known = torch.cat([_chroma(rgb), rgb.mean(-1, keepdim=True)], -1)
    found = torch.cat([behind, middle[:, None]], -1)
    cost = (found[:, None, None] - known).square().sum(-1)                             # [N, 3, 5]
    cost += _OUTLINE_WEIGHT * (1 - match[:, [0, 1, 0]])[..., None]
    at = cost.flatten(1).argmin(-1)
    return at % 5, at // 5


def _colour(line: Tensor, behind: Tensor, style: Tensor) -> Tensor:
    """[N]: the colour whose direction from the background fits; blur shortens the line, so length counts for little."""
    known = _chroma(world.COLOUR_RGB * 2)[None] * world.SPRITE_GAIN[style][:, None, None] - behind[:, None]               # [N, 6, 2]
    length = known.square().sum(-1)
    share = ((known * line[:, None]).sum(-1) / length).clamp(0, 1.2)
    miss = (line[:, None] - share[..., None] * known).square().sum(-1) + 0.05 * (1 - share).square() * length
    return miss.argmin(-1)


def _kind(picture: Tensor, seen: Tensor, style: Tensor) -> Tensor:
    """[N]: plain if the brightness hardly varies; else striped if the columns' means explain it, checkered if not."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, HEIGHT), torch.linspace(-1, 1, WIDTH), indexing="ij")
    plane = torch.stack([torch.ones_like(x), x, y], -1).flatten(0, 1)                  # a slow gradient is no pattern
    weight = seen.flatten(1)
    normal = torch.einsum("pi,np,pj->nij", plane, weight, plane) + 1e-3 * torch.eye(3)
    fit = torch.linalg.solve(normal, torch.einsum("pi,np->ni", plane, weight * picture.flatten(1)))
    shade = 2 * world.SHADE * world.BACKGROUND_GAIN[style].mean(-1)[:, None, None]
    rest = (picture - (fit @ plane.T).view_as(picture)).clamp(-2 * shade, 2 * shade) * seen
    total = rest.square().sum((1, 2)) / seen.sum((1, 2)).clamp(min=1)
    rows = seen.sum(1)
    columns = (rest.sum(1).square() / rows.clamp(min=1)).sum(1) / seen.sum((1, 2)).clamp(min=1)
    patterned = total.sqrt() > 0.4 * shade[:, 0, 0]
    return torch.where(patterned, torch.where(columns > 0.5 * total, 1, 2), 0)


def _motion(displacement: Tensor) -> Tensor:
    x, y = displacement[:, 0] / _MOVES_X, displacement[:, 1] / _MOVES_Y
    sideways = torch.where(x < 0, 1, 2)
    upright = torch.where(y < 0, 3, 4)
    moving = torch.where(x.abs() >= y.abs(), sideways, upright)
    return torch.where(torch.maximum(x.abs(), y.abs()) < 1, 0, moving)


def _slope(track: Tensor, u: Tensor) -> Tensor:
    """[N, 2]: travel per unit of u, the median over all pairs of frames (Theil-Sen): a few lost frames change nothing."""
    if len(u) == 1:
        return torch.zeros_like(track[:, 0])
    i, j = torch.triu_indices(len(u), len(u), 1)
    return ((track[:, j] - track[:, i]) / (u[j] - u[i])[None, :, None]).median(1).values


def _track(matte: Tensor) -> Tensor:
    """[N, T, 2]: the matte's centroid (x, y) in base pixels, near where most of it lies."""
    count, frames = matte.shape[:2]
    at = torch.arange(-_HALF, _HALF + 1.0)
    kernel = torch.exp(-(at[:, None] ** 2 + at[None] ** 2) / (2 * 4.0**2))
    solid = (matte - 0.2).clamp(min=0)                                                 # noise and ghosts far away pull on a centroid
    heat = F.conv2d(solid.flatten(0, 1)[:, None], kernel[None, None], padding=_HALF)
    peak = heat.flatten(1).argmax(-1)
    x, y = (peak % WIDTH + 0.5).float(), (peak // WIDTH + 0.5).float()
    xs, ys = torch.arange(WIDTH) + 0.5, torch.arange(HEIGHT) + 0.5
    where, solid = torch.stack([x, y], -1), solid.flatten(0, 1)
    for _ in range(4):
        weight = solid * _window(where)
        mass = weight.sum((1, 2)).clamp(min=1e-3)
        where = torch.stack([(weight.sum(1) * xs).sum(1) / mass, (weight.sum(2) * ys).sum(1) / mass], -1)
    return where.view(count, frames, 2)


def _window(centre: Tensor) -> Tensor:
    """[M, 24, 40]: 1 within reach of the centre [M, 2], 0 beyond, with a soft edge."""
    x = (_HALF + 0.5 - (torch.arange(WIDTH) + 0.5 - centre[:, 0, None]).abs()).clamp(0, 1)
    y = (_HALF + 0.5 - (torch.arange(HEIGHT) + 0.5 - centre[:, 1, None]).abs()).clamp(0, 1)
    return y[:, :, None] * x[:, None, :]


def _patch(matte: Tensor, centroid: Tensor) -> Tensor:
    """[N, 289]: the matte around the track, its median-like mean over the frames."""
    count, frames = matte.shape[:2]
    at = torch.arange(-_HALF, _HALF + 1.0)
    where = centroid.flatten(0, 1)
    x = (where[:, 0, None] + at) * (2 / WIDTH) - 1
    y = (where[:, 1, None] + at) * (2 / HEIGHT) - 1
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), -1)
    patches = F.grid_sample(matte.flatten(0, 1)[:, None], grid, align_corners=False).view(count, frames, -1)
    low = frames // 4                                                                  # drops the odd frame out at each pixel
    return patches.sort(1).values[:, low : frames - low].mean(1) if frames >= 4 else patches.mean(1)


def _match(patch: Tensor) -> Tensor:
    """[N, 2, 4, variants]: correlation of the matte with filled and outlined shapes."""
    bank, offsets = _templates()
    return (_unit(patch) @ bank.T).view(len(patch), *offsets.shape[:3])


def _unit(patch: Tensor) -> Tensor:
    return F.normalize(patch - patch.mean(-1, keepdim=True), dim=-1)                   # centred: noise then matches nothing


@cache
def _templates() -> tuple[Tensor, Tensor]:
    """The bank [2 * 4 * variants, 289], unit length, and from the centroid to the centre [2, 4, variants, 2]."""
    at = torch.arange(-_HALF, _HALF + 1.0)
    shifts = torch.tensor([-0.5, -0.25, 0.0, 0.25, 0.5])
    bank, offsets = [], []
    for ring in (1e3, world.RING):
        for shape in range(len(world.SHAPES)):
            for radius in (5.0, 5.5, 6.0, 6.5, 7.0):
                def draw(x, y, shape=shape, radius=radius, ring=ring):                 # centres [n] -> [n, 1, 17, 17]
                    dx, dy = at[None, :] - x.view(-1, 1, 1, 1), at[:, None] - y.view(-1, 1, 1, 1)
                    return world.coverage(shape, dx, dy, torch.tensor(radius), torch.tensor(ring), 1.0)

                zero = draw(torch.zeros(1), torch.zeros(1))[0, 0]
                solid = (zero - 0.2).clamp(min=0)
                low_x, low_y = (solid.sum(0) * at).sum() / solid.sum(), (solid.sum(1) * at).sum() / solid.sum()
                y, x = torch.meshgrid(shifts - low_y, shifts - low_x, indexing="ij")
                drawn = draw(x.flatten(), y.flatten())
                for blur in (0.4, 0.7, 1.0):                                           # .4: what resampling along the track does
                    kernel = torch.exp(-at[4:13] ** 2 / (2 * blur**2))
                    kernel = kernel / kernel.sum()
                    soft = F.conv2d(F.conv2d(drawn, kernel[None, None, None], padding=(0, 4)), kernel[None, None, :, None], padding=(4, 0))
                    bank.append(_unit(soft.flatten(1)))
                    offsets.append(torch.stack([x.flatten(), y.flatten()], -1))
    return torch.cat(bank), torch.cat(offsets).view(2, len(world.SHAPES), -1, 2)
