"""Noise with an address: each frame's numbers depend on (seed, stage, step, frame) and on nothing else.

One generator drawing in order would give other numbers as soon as a video is cut into chunks, a step is skipped or a batch is split. Here
every frame opens its own counter-based generator, keyed by a hash of its address: chunks, order, threads and devices never change a video.
"""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

_SMALL = 1 << 18     # numbers; below it starting threads costs more than it saves


def frame_noise(seed: int, stage: str, step: int | str, frames: Sequence[int], shape: tuple[int, int, int],
                threads: int | None = None) -> Tensor:
    """Standard normal noise for some frames of one video.

    shape (H, W, C) -> [T, H, W, C] float32 on the CPU, T = len(frames). step: the sampler's step, or the name of another stream
    ("init" for the noise a stage starts from, "aug" for its conditioning): all are independent. frames: absolute indices, in any order.
    threads: None for one per CPU, at most 8. numpy releases the interpreter lock while it draws; the numbers do not depend on it.
    The bits come from numpy's Philox and its float32 ziggurat, which numpy keeps from release to release but does not promise: a test pins
    them. On another C library the few numbers from the ziggurat's edges may differ in the last bit.
    One Intel Xeon core, numpy 2.4: frame_noise(0, "ssr3", 1, range(128), (192, 320, 3), threads=1) takes 0.37 s, 16 ns per number.
    """
    out = np.empty((len(frames), *shape), dtype=np.float32)

    def draw(position: int) -> None:
        key = noise_key(seed, stage, step, frames[position])
        np.random.Generator(np.random.Philox(key=key)).standard_normal(dtype=np.float32, out=out[position])

    threads = min(threads or min(os.cpu_count() or 1, 8), len(frames))
    if threads <= 1 or out.size < _SMALL:
        for position in range(len(frames)):
            draw(position)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(draw, range(len(frames))))     # list: raises what a thread raised
    return torch.from_numpy(out)


def noise_key(seed: int, stage: str, step: int | str, frame: int) -> int:
    """The 128-bit Philox key of one frame. Written out with types and separators, so step 1 and "1", or (1, 23) and (12, 3), stay apart."""
    step = step if isinstance(step, str) else int(step)
    address = repr((int(seed), str(stage), step, int(frame)))
    return int.from_bytes(hashlib.blake2b(address.encode(), digest_size=16).digest(), "little")
