"""What a run would be, before anything is loaded: per stage its shape, steps, parameters and FLOPs."""

import torch

from engine.config import STAGE_ORDER, CascadeConfig, SampleConfig, StageConfig
from engine.diffusion.sampler import start_index
from engine.models.unet import VideoUNet
from engine.runtime.flops import count_flops
from engine.runtime.weights import on_meta

TEXT_TOKENS = 32        # a long sentence; attention to text is a few parts in a thousand of a pass


def plan(cascade: CascadeConfig, settings: SampleConfig, strength: float = 1.0) -> list[dict]:
    """One record a stage, in order: stage, shape, fps, steps (the sampler's, of each chunk), chunks, parameters, flops and weight bytes."""
    width = {"fp32": 4}.get(settings.dtype, 2)
    records = []
    for stage in cascade.stages[: STAGE_ORDER.index(settings.last_stage) + 1]:
        steps = start_index(strength if stage.name == "base" else 1.0, settings.steps.get(stage.name, stage.steps))
        chunk = min(stage.chunk_frames or stage.frames, stage.frames)
        weight = stage.diffusion.guidance_weight
        if stage.name == "base" and settings.guidance_weight is not None:
            weight = settings.guidance_weight
        passes = 1 if weight == 1 else 2
        parameters, flops = step_cost(stage, chunk)
        records.append({
            "stage": stage.name, "frames": stage.frames, "height": stage.height, "width": stage.width, "fps": stage.fps,
            "steps": steps, "chunks": stage.chunks, "passes_per_step": passes, "parameters": parameters,
            "weight_bytes": parameters * width, "flops_per_step": flops * passes * stage.chunks,
            "flops": flops * passes * steps * stage.chunks})
    return records


def step_cost(stage: StageConfig, frames: int) -> tuple[int, int]:
    """(parameters, FLOPs of one pass over `frames` frames), without allocating either."""
    network = on_meta(lambda: VideoUNet(stage.unet))
    with torch.device("meta"):
        z = torch.empty(1, frames, stage.height, stage.width, 3)
        time, text, mask = torch.empty(1), torch.empty(1, TEXT_TOKENS, stage.unet.text_dim), torch.empty(1, TEXT_TOKENS, dtype=torch.bool)
        extra = {"lowres": z, "aug_level": time} if stage.unet.lowres else {}
        flops = count_flops(lambda: network(z, time, text, mask, **extra))
    return sum(p.numel() for p in network.parameters()), flops


def table(records: list[dict]) -> str:
    """The records as text for a terminal."""
    lines = [f"{'stage':6} {'frames x height x width':>24} {'fps':>5} {'steps':>7} {'parameters':>12} {'TFLOP/step':>11} {'TFLOP':>10}"]
    for r in records:
        shape = f"{r['frames']} x {r['height']} x {r['width']}"
        steps = f"{r['chunks']} x {r['steps']}" if r["chunks"] > 1 else str(r["steps"])
        lines.append(f"{r['stage']:6} {shape:>24} {r['fps']:>5g} {steps:>7} {r['parameters'] / 1e6:>10.2f} M "
                     f"{r['flops_per_step'] / 1e12:>11.3f} {r['flops'] / 1e12:>10.2f}")
    total = sum(r["flops"] for r in records)
    parameters = sum(r["parameters"] for r in records)
    lines.append(f"{'all':6} {'':>24} {'':>5} {'':>7} {parameters / 1e6:>10.2f} M {'':>11} {total / 1e12:>10.2f}")
    return "\n".join(lines)
