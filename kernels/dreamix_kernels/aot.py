"""Compile every Triton kernel for GPUs that are not there, and say what each takes: registers, shared memory, spills.

    python -m dreamix_kernels.aot [--arch 80 90] [--op temporal_conv] [--json FILE]

Exit code 1 if a kernel spills registers to memory or wants more shared memory than the part has. Each module <op>_triton lists, in
`aot_cases`, the configurations its launchers pick at the cascade's shapes.
"""

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch

from .dispatch import TRITON_OPS

# per block, opt-in (CUDA C++ programming guide, table of capabilities)
SHARED_LIMIT_BYTES = {80: 166912, 86: 101376, 89: 101376, 90: 232448}
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.bool: "i1"}


@dataclass
class Case:
    """One compilation: a @triton.jit function, what it is called with, and how it is launched."""
    name: str                                              # kernel, shape, dtype: the row of the report
    kernel: Any
    # name -> torch dtype (a pointer), "i32" / "i64" / "fp32" (a number), None (an absent pointer)
    arguments: dict[str, Any]
    constants: dict[str, Any]                              # name -> value of a constexpr
    options: dict[str, int] = field(default_factory=dict)  # num_warps, num_stages
    min_shared_bytes: int = 0                              # parts with less never launch it


def compile_case(case: Case, arch: int) -> dict:
    """One row: name, arch, registers, spill_bytes, shared_bytes, tensor-core instruction."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(case.kernel.arg_names):
        if name in case.constants or case.arguments[name] is None:
            signature[name], constants[(i,)] = "constexpr", case.constants.get(name)
        else:
            kind = case.arguments[name]
            signature[name] = kind if isinstance(kind, str) else "*" + TYPES[kind]
            if not isinstance(kind, str):
                attributes[(i,)] = [["tt.divisibility", 16]]     # torch's allocations are; so are rows of 8 or more channels
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=case.options)
    use = _resource_usage(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    dot = next((word for word in ("wgmma", "mma.sync") if word in ptx), "-")
    return {"kernel": case.name, "arch": f"sm_{arch}", "registers": use["REG"], "spill_bytes": use["STACK"] + use["LOCAL"],
            "shared_bytes": compiled.metadata.shared, "dot": dot, **{k: case.options[k] for k in sorted(case.options)}}


def _resource_usage(cubin: bytes) -> dict[str, int]:
    import triton.knobs
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def cases(op: str) -> list[Case]:
    """What the op's launchers compile at the cascade's shapes."""
    return list(import_module(f"dreamix_kernels.{op}_triton").aot_cases())


def _row(op: str, index: int, arch: int) -> dict:
    return compile_case(cases(op)[index], arch)            # by number: a @triton.jit function does not travel between processes


def problem(row: dict) -> str | None:
    """What is wrong with a compiled kernel, in a few words."""
    limit = SHARED_LIMIT_BYTES[int(row["arch"][3:])]
    if row["spill_bytes"]:
        return f"spills {row['spill_bytes']} bytes"
    if row["shared_bytes"] > limit:
        return f"wants {row['shared_bytes']} bytes of shared memory, the part has {limit}"
    return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dreamix_kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], choices=sorted(SHARED_LIMIT_BYTES),
                        help="compute capabilities, without the dot")
    parser.add_argument("--op", nargs="+", choices=TRITON_OPS, help="only these ops")
    parser.add_argument("--json", metavar="FILE", help="also write the rows as JSON lines")
    args = parser.parse_args(argv)
    rows = []
    work = [(op, i, arch) for op in args.op or TRITON_OPS for i, case in enumerate(cases(op)) for arch in args.arch
            if case.min_shared_bytes <= SHARED_LIMIT_BYTES[arch]]
    print(f"{'kernel':<72} {'arch':<6} {'regs':>5} {'spill B':>8} {'shared B':>9} {'dot':<9} warps stages")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        for row in pool.map(_row, *zip(*work), chunksize=4):
            rows.append(row)
            numbers = f"{row['registers']:>5} {row['spill_bytes']:>8} {row['shared_bytes']:>9} {row['dot']:<9}"
            options = f"{row.get('num_warps', ''):>5} {row.get('num_stages', ''):>6}"
            print(f"{row['kernel']:<72} {row['arch']:<6} {numbers} {options}  {problem(row) or ''}", flush=True)
    if args.json:
        import triton
        with open(args.json, "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps({**row, "triton": triton.__version__}) + "\n")
    return 1 if any(problem(row) for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
