"""A torch.profiler table for the cases whose gap to a goal wants an explanation: which kernels take a step's time.

    python benchmarks/profile_gpu.py --out FILE [--only NAME ...]
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "kernels")]

from benchmarks import bench_group_norm_silu, bench_temporal_attention, bench_temporal_conv, peers  # noqa: E402
from benchmarks.stages import level  # noqa: E402

BF16 = torch.bfloat16


def attention(device) -> Callable:
    qkv, bias = bench_temporal_attention.make(2, *level("base", 0), 64, BF16, device)
    return lambda: bench_temporal_attention.temporal_attention_packed(qkv, bias, None)


def convolution(stage: str, n: int, device, backward: bool = False) -> Callable:
    shape = (1, *level(stage, n))
    x, own = peers.randn(*shape, dtype=BF16, device=device), bench_temporal_conv.weights(shape[-1], BF16, device)
    if backward:
        x.requires_grad_()
        module = torch.nn.ParameterList(own)
        dy = peers.randn(*shape, dtype=BF16, device=device, seed=1)
        return bench_temporal_conv.with_gradients(lambda x: bench_temporal_conv.temporal_conv_block(x, 32, *module, None)[0], x, dy, module)
    stats = bench_temporal_conv.frame_statistics(x, 32)
    return lambda: bench_temporal_conv.temporal_conv_block(x, 32, *own, None, stats=stats, next_groups=32)


def norm(stage: str, n: int, device) -> Callable:
    x, *rest = bench_group_norm_silu.make(level(stage, n), BF16, device)
    return lambda: bench_group_norm_silu.group_norm_silu(x, 32, *rest)


def unet(stage: str, device) -> Callable:
    from benchmarks.bench_unet_step import find_cascade, inputs, random_network

    config = find_cascade("imagen_video")[1].stage(stage)
    network = random_network(config.unet, device, BF16)
    args, extra = inputs(config, device)
    return lambda: network(*args, **extra)


CASES = {
    "temporal attention, base l0": attention,
    "temporal convolution, ssr3 l0": lambda device: convolution("ssr3", 0, device),
    "temporal convolution, ssr2 l0": lambda device: convolution("ssr2", 0, device),
    "temporal convolution, ssr3 l3": lambda device: convolution("ssr3", 3, device),
    "temporal convolution with gradients, tsr3 l0": lambda device: convolution("tsr3", 0, device, True),
    "GroupNorm-FiLM-SiLU, ssr3 l0": lambda device: norm("ssr3", 0, device),
    "GroupNorm-FiLM-SiLU, ssr2 l0": lambda device: norm("ssr2", 0, device),
    "U-Net step, base": lambda device: unet("base", device),
    "U-Net step, ssr1": lambda device: unet("ssr1", device),
    "U-Net step, ssr2": lambda device: unet("ssr2", device),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="NAME")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("profile_gpu: no CUDA device here, so there is nothing to do", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    with open(args.out, "w", encoding="utf-8") as file:
        for name in args.only or CASES:
            try:
                table = profiled(CASES[name](device), backward="gradients" in name)
            except Exception as problem:       # one that is missing (pydantic, memory) spares the others
                table = f"absent: {type(problem).__name__}: {problem}"
            file.write(f"== {name}, bf16, {torch.cuda.get_device_name()}\n{table}\n\n")
            file.flush()
            torch.cuda.empty_cache()
    return 0


def profiled(run: Callable, backward: bool, runs: int = 3) -> str:
    with torch.set_grad_enabled(backward):
        for _ in range(2):
            run()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            for _ in range(runs):
                run()
            torch.cuda.synchronize()
    return profiler.key_averages().table(sort_by="self_device_time_total", row_limit=15, max_name_column_width=60)


if __name__ == "__main__":
    sys.exit(main())
