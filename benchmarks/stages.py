"""The shapes that are measured: activations [T, H, W, C] inside the seven U-Nets, after the stem. Numbers only: nothing is imported.

`tests/benchmarks/test_stages.py` compares them with configs/cascade/.
"""

# name of a stage -> (frames, height and width at level 0, width of each level, temporal layer)
FULL = {
    "base": (16, 24, 40, (768, 1536, 3072, 3072), "attention"),
    "tsr1": (32, 24, 40, (512, 1024, 1536, 2048), "conv"),
    "ssr1": (32, 48, 80, (384, 768, 1536, 1536), "conv"),
    "ssr2": (32, 96, 160, (256, 512, 1024, 1536), "conv"),
    "tsr2": (64, 96, 160, (128, 256, 512, 1024), "conv"),
    "tsr3": (128, 96, 160, (128, 256, 512, 1024), "conv"),
    "ssr3": (32, 384, 640, (128, 256, 512, 1024), "conv"),              # one chunk
}
SPRITES = {
    "base": (16, 12, 20, (96, 192, 192), "attention"),
    "tsr1": (32, 12, 20, (32, 64), "conv"),
    "ssr1": (32, 24, 40, (32, 64), "conv"),
    "ssr2": (32, 24, 40, (48,), "conv"),
    "tsr2": (64, 24, 40, (64,), "conv"),
    "tsr3": (128, 24, 40, (64,), "conv"),
    "ssr3": (32, 48, 80, (48,), "conv"),                                 # one chunk
}


def level(stage: str, n: int = 0, cascade: dict = FULL) -> tuple[int, int, int, int]:
    """[T, H, W, C] of a stage's activations at a level."""
    frames, height, width, channels, _ = cascade[stage]
    for _ in range(n):
        height, width = -(-height // 2), -(-width // 2)
    return frames, height, width, channels[n]


def name(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
