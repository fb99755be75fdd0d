"""A cascade of seven networks, small enough to be sampled in a second: the bundled one's structure, random weights, none of them zero."""

import gc
import os
import shutil
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"         # before triton is imported: its own functions are interpreted, or not, from then on
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

BUNDLED = Path(__file__).parents[1] / "configs" / "cascade" / "sprites"


def tiny_config():
    """4 frames of 8x12 at 3 fps -> 32 frames of 32x48 at 24 fps, the last stage in chunks of 8 frames: 1 1/3 seconds."""
    from engine.config import CascadeConfig

    common = {"channels": 8, "channel_mults": (1, 2), "num_blocks": (1, 1), "groups": 4, "head_dim": 4, "text_dim": 128, "context_dim": 8}
    base = {**common, "attention_levels": (1,), "attention_every_block": True, "temporal": "attention", "max_frames": 4,
            "frame_index": True, "coordinates": True}
    above = {**common, "space_to_depth": 2, "lowres": True}
    residual = {"prediction": "x0", "residual_scale": 0.1}
    shapes = {"base": (4, 8, 12, 3, 4), "tsr1": (8, 8, 12, 6, 2), "ssr1": (8, 16, 24, 6, 3), "ssr2": (8, 24, 36, 6, 2),
              "tsr2": (16, 24, 36, 12, 2), "tsr3": (32, 24, 36, 24, 2), "ssr3": (32, 32, 48, 24, 2)}
    stages = []
    for name, (frames, height, width, fps, steps) in shapes.items():
        extra = {"unet": base} if name == "base" else {"unet": above, "diffusion": residual}
        if name.startswith("tsr"):
            extra["temporal_upsample"] = "linear"
        if name == "ssr3":
            extra["chunk_frames"] = 8
        stages.append({"name": name, "frames": frames, "height": height, "width": width, "fps": fps, "steps": steps, **extra})
    return CascadeConfig(name="tiny", text={"encoder": "text_encoder", "precision": "fp32", "max_tokens": 48}, stages=stages)


def write_tiny(folder: Path) -> Path:
    """The tiny cascade as a folder that describes itself."""
    import torch
    from safetensors.torch import save_file

    from engine.cascade_folder import write_index
    from engine.models.unet import VideoUNet
    from engine.runtime.weights import WEIGHTS_NAME

    config = tiny_config()
    write_index(folder, config)
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(BUNDLED / part, folder / part)
    for i, stage in enumerate(config.stages):
        generator = torch.Generator().manual_seed(i)
        state = {}
        for name, value in VideoUNet(stage.unet).state_dict().items():
            noise = torch.randn(value.shape, generator=generator) * (0.7 / max(1, value[0].numel()) ** 0.5 if value.ndim > 1 else 0.1)
            state[name] = noise + (1 if "norm" in name and name.endswith("weight") else 0)
        save_file(state, folder / stage.name / WEIGHTS_NAME)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of the tiny cascade. Shared by all tests: to damage it, copy it."""
    folder = write_tiny(tmp_path_factory.mktemp("cascade") / "tiny")
    gc.freeze()          # every stage ends in a collection, which otherwise walks through all of torch's and transformers' modules
    return folder


@pytest.fixture(scope="session")
def own_cache(tmp_path_factory):
    """Prompts are kept in a folder of this session, not in the user's; and nobody asks the hub."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield folder


@pytest.fixture(scope="session")
def film():
    """film(path, levels, sound=0): an MP4 of uniform grey pictures, levels in [-1, 1], 36x48 at 24 fps, with `sound` seconds of a tone."""
    from fractions import Fraction

    import av
    import numpy as np

    def make(path, levels, sound=0.0, picture=None):
        with av.open(str(path), "w") as out:
            stream = out.add_stream("libx264", rate=24, options={"crf": "4", "threads": "1"})
            stream.width, stream.height, stream.pix_fmt = 48, 36, "yuv420p"
            context = stream.codec_context
            context.color_range = context.colorspace = context.color_primaries = context.color_trc = 1
            audio = out.add_stream("aac", rate=48000, layout="mono") if sound else None
            for level in levels:
                pixels = np.full((36, 48, 3), round((level + 1) * 127.5), np.uint8) if picture is None else picture
                for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                    out.mux(packet)
            for packet in stream.encode(None):
                out.mux(packet)
            if audio is not None:
                wave = np.sin(np.arange(int(sound * 48000)) * (2 * np.pi * 440 / 48000)).astype(np.float32) * 0.3
                for k in range(0, len(wave), 1024):
                    block = av.AudioFrame.from_ndarray(wave[None, k : k + 1024], format="fltp", layout="mono")
                    block.sample_rate, block.pts, block.time_base = 48000, k, Fraction(1, 48000)
                    for packet in audio.encode(block):
                        out.mux(packet)
                for packet in audio.encode(None):
                    out.mux(packet)
        return path

    return make


@pytest.fixture(scope="session")
def device():
    """The GPU where there is one; else the CPU, where Triton's interpreter runs the same kernels."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
