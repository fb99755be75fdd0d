"""DeepSpeed's JSON together with the finetuning config: who rules what, and what this machine can do of it."""

import json
from pathlib import Path

import torch

from engine.config import FinetuneConfig
from engine.errors import ConfigError

# the finetuning config rules these, in one process and in many: a JSON that also speaks of them would be one of two truths
RULED = {"optimizer": "optimizer, lr, betas, eps, weight_decay", "scheduler": "lr (constant)", "bf16": "dtype", "fp16": "dtype",
         "torch_autocast": "dtype", "gradient_clipping": "clip", "gradient_accumulation_steps": "accumulate",
         "managed_gradient_accumulation": "accumulate", "train_batch_size": "draws", "activation_checkpointing": "gradient_checkpointing"}


def deepspeed_settings(path: str | Path, config: FinetuneConfig, device: torch.device, dtype: torch.dtype) -> dict:
    """The settings DeepSpeed gets.   Raises: ConfigError naming the file and the key."""
    path = Path(path)
    try:
        settings = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: want DeepSpeed's settings as JSON, got {' '.join(str(error).split())}") from error
    zero = settings.get("zero_optimization") if isinstance(settings, dict) else None
    if not isinstance(zero, dict) or zero.get("stage") != 3:
        raise ConfigError(f"{path}: want zero_optimization.stage 3, got {zero.get('stage') if isinstance(zero, dict) else zero}")
    for key, ours in RULED.items():
        if settings.get(key, "auto") != "auto":
            raise ConfigError(f"{path}: {key} is ruled by the finetuning config ({ours}); want it left out")
    if config.master != "fp32" or config.in_backward:
        raise ConfigError("master, in_backward: ZeRO-3 keeps fp32 masters and steps after the pass; want fp32 and false, or one process")
    if dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"dtype: want fp32 or bf16 for ZeRO-3, got {dtype}")
    settings = {key: value for key, value in settings.items() if key not in RULED}
    settings["zero_optimization"] = zero | {part: offload(path, part, zero[part], device)
                                            for part in ("offload_optimizer", "offload_param") if zero.get(part)}
    return settings | {
        "train_micro_batch_size_per_gpu": 1,                      # DeepSpeed's bookkeeping only: the objective makes the batches
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,                   # the optimizer steps when step() is called, after any number of passes
        "gradient_clipping": config.clip or 0.0,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_allow_untested_optimizer": True,                    # bitsandbytes
        "zero_force_ds_cpu_optimizer": False,                     # torch's AdamW steps offloaded masters, nothing is compiled
    }


def offload(path: Path, part: str, wanted: dict, device: torch.device) -> dict:
    """One of the two offloads, as far as it means something here."""
    where = wanted.get("device", "none")
    if where not in ("none", "cpu", "nvme"):
        raise ConfigError(f"{path}: {part}.device: want none, cpu or nvme, got {where}")
    if where == "cpu" and device.type == "cpu":
        return {"device": "none"}                                 # it is in host memory as it is
    if where == "nvme":
        from deepspeed.ops.op_builder import AsyncIOBuilder

        if not AsyncIOBuilder().is_compatible(verbose=False):
            raise ConfigError(f"{path}: {part}.device nvme needs DeepSpeed's async_io, which needs libaio (package libaio-dev) "
                              "and a C++ compiler; want cpu or none here")
    return wanted
