"""DeepSpeed ZeRO-3 for stages that fit no single GPU: weights, gradients, masters and moments are split over the ranks.

Every parameter is a flat row cut into `world` equal pieces (the last one padded). A rank holds its piece in the number format of the
pass and in fp32 with its moments; a layer's whole weights exist only while that layer runs. What DeepSpeed leaves open is done here:
weights and states go from and to safetensors piece by piece, a skipped step touches nothing on any rank, and no op is compiled at run
time. Launched by `deepspeed --num_gpus N`; alone (`python -m`), one rank, which is of use with offloading.
Source: Rajbhandari et al. 2020 (ZeRO), 2021 (ZeRO-Infinity).
"""

import contextlib
import gc
import math
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import set_checkpoint_early_stop

from dreamix_kernels import dispatch
from engine.config import FinetuneConfig
from engine.errors import ConfigError
from engine.models.unet import Block, VideoUNet
from engine.runtime import weights

from . import zero_state
from .finetune_optimizer import _bitsandbytes
from .plain_engine import offload_hooks
from .zero_settings import deepspeed_settings

PORT_HINT = "another run has this port: give `deepspeed` a free one, --master_port N"


def join(device: torch.device) -> tuple[int, int]:
    """This process becomes a rank -> (rank, world). Does nothing the second time.   Raises: ConfigError if the port is taken."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)
    import deepspeed

    # On a CPU, DeepSpeed would spend a minute compiling an op of its own for shared memory, or fail without a compiler; gloo is there
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(os.environ.get("DEEPSPEED_LOG_LEVEL", "ERROR").upper())
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")      # of names that DeepSpeed still uses
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        try:
            if os.environ["WORLD_SIZE"] == "1":
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
            deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
        except (RuntimeError, OSError) as error:
            if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
                raise ConfigError(f"port {os.environ.get('MASTER_PORT')}: {PORT_HINT}") from error
            raise
    return dist.get_rank(), dist.get_world_size()


class ZeroEngine:
    """One stage in training, split over the ranks. The same methods as `PlainEngine`; all but `rank` and `world` are collective.

    build: makes the network (called once, without memory for a whole one); folder: its weights; settings: DeepSpeed's JSON file.
    dtype: of the pass, fp32 or bf16; masters and moments are fp32 (AdamW8bit: moments of 8 bits).
    `backward` takes the loss times world, because DeepSpeed averages over ranks.
    Raises: ConfigError for settings that contradict the config or ask for an op this machine cannot have; WeightsError.
    """

    def __init__(self, build: Callable[[], VideoUNet], folder: Path, config: FinetuneConfig, device: torch.device, dtype: torch.dtype,
                 *, settings: str | Path):
        self.config = config
        self.rank, self.world = join(device)
        # kernels check themselves on first use, with a backward pass of their own: that must not happen in a block that is recorded
        dispatch.report(torch.device(device.type, torch.cuda.current_device()) if device.type == "cuda" else device, dtype)
        merged = deepspeed_settings(settings, config, device, dtype)
        import deepspeed
        from deepspeed.utils import set_z3_leaf_modules

        # nccl takes no CPU tensors, and what is counted over ranks (any_rank, sum_ranks) lives on the CPU, in fp64
        self.counts = dist.new_group(backend="gloo")
        with deepspeed.zero.Init(config_dict_or_path=merged):
            network = build()
        network.train()
        network.gradient_checkpointing = config.gradient_checkpointing
        # A block's weights come and go together: its layers read each other's (fused norms), and are called again when it is computed
        # again. And where a rank's samples are all independent frames, some temporal weights have no gradient: a leaf gives zeros for
        # them, so that all ranks reduce the same list.
        set_z3_leaf_modules(network, [Block])
        self.names = {p: name for name, p in network.named_parameters()}
        self.engine, self.zero, _, _ = deepspeed.initialize(
            model=network, optimizer=make_optimizer(config, list(network.parameters())), config=merged)
        keep_for_backward(self.zero.parameter_offload)
        self.device = torch.device(self.engine.device)
        self.read(Path(folder))

    def network(self, *args, **kwargs) -> Tensor:
        """As `VideoUNet.forward`; every rank must call it as often."""
        # a block that is computed again must run to its end: DeepSpeed lets go of a layer's weights when the layer returns
        with set_checkpoint_early_stop(False), self.saving():
            return self.engine(*args, **kwargs)

    def saving(self):
        """Where the backward pass's tensors wait, if activations are offloaded."""
        if not (self.config.activation_offload and torch.is_grad_enabled()):
            return contextlib.nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(*weights_aside(list(self.names), *offload_hooks(self.device, set())))

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self, lr: float, skip: bool = False) -> float:
        """The norm of the whole gradient, infinite if any of it was not finite: then, and for `skip`, nothing is changed."""
        self.zero.set_lr(lr)
        if skip:
            norm = self.norm()
            # the path DeepSpeed itself takes on an overflow
            self.zero._pre_step()
            self.zero._partition_all_parameters()
            self.zero._overflow_clean_up(self.zero.loss_scale)
            self.engine._unmanaged_backward_count = 0
            self.applied = False
            return norm
        self.engine.step()
        self.applied = self.engine.was_step_applied()
        return float(self.engine.get_global_grad_norm())

    applied = False           # whether the last step changed the weights

    def norm(self) -> float:
        """Of the gradient as it is now, over all ranks; infinite if it is not finite."""
        self.zero.finalize_gradient_accumulation_boundary()
        groups = [float(norm) for norm in self.zero._get_norm_groups()]          # -1 stands for one that is not finite
        return math.inf if min(groups) < 0 else math.hypot(*groups)

    def any_rank(self, flag: bool) -> bool:
        return self.sum_ranks([float(flag)])[0] > 0

    def sum_ranks(self, values: list[float]) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.counts)
        return total.tolist()

    def read(self, folder: Path) -> None:
        """Masters and weights of the pass from the stage's folder; moments are left alone."""
        weights.check(folder, {name: p.ds_shape for p, name in self.names.items()})
        with zero_state.Source(weights.weight_files(folder)) as source:
            for group in zero_state.groups(self):
                for piece in group.pieces:
                    piece.master.copy_(source.flat(piece.name, piece.begin, piece.end, piece.master.numel()))
        self.refresh()

    def refresh(self) -> None:
        """The weights of the pass, from the masters. Pieces only: what was gathered is forgotten."""
        self.zero._partition_all_parameters()
        self.zero.zero_grad()
        for _ in zero_state.groups(self, refresh=True):
            pass

    def save(self, folder: Path) -> None:
        zero_state.save(self, Path(folder))

    def load(self, folder: Path) -> None:
        """Also from another number of ranks, but for 8-bit moments.   Raises: WeightsError, ConfigError."""
        zero_state.load(self, Path(folder))
        self.refresh()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Names and fp32 masters [shape of the parameter] on the CPU, one whole parameter at a time."""
        for p, name in self.names.items():
            yield name, self.zero.get_full_hp_param(p).view(p.ds_shape).cpu()

    def close(self) -> None:
        """Gives all memory back; the ranks stay together for the next stage."""
        from deepspeed.runtime.zero import parameter_offload, partition_parameters

        self.engine.destroy()
        # DeepSpeed keeps the network on a global stack, and its own F.linear in torch's place
        parameter_offload.FWD_MODULE_STACK.clear()
        original = getattr(partition_parameters.InsertPostInitMethodToModuleSubClasses, "linear_bk", None)
        if original is not None:
            torch.nn.functional.linear = original
        self.names = {}
        self.engine = self.zero = None
        dist.destroy_process_group(self.counts)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def weights_aside(parameters: list[Tensor], pack: Callable, unpack: Callable) -> tuple[Callable, Callable]:
    """Saved-tensor hooks that leave weights to ZeRO-3: what the hooks are shown is a second hold on a layer's gathered weights, which
    would keep the whole network in memory. The parameter itself is kept in its place: in the backward pass it has been gathered again."""
    shapes: dict[torch.Size, list[Tensor]] = {}
    for p in parameters:
        shapes.setdefault(torch.Size(p.ds_shape), []).append(p)

    def pack_all(tensor: Tensor):
        mine = (p for p in shapes.get(tensor.shape, ()) if p.data_ptr() == tensor.data_ptr())
        return owner if (owner := next(mine, None)) is not None else pack(tensor)

    def unpack_all(packed):
        return packed.data if isinstance(packed, torch.nn.Parameter) else unpack(packed)

    return pack_all, unpack_all


def keep_for_backward(offload) -> None:
    """A block that is computed again keeps its weights: its backward pass follows.

    DeepSpeed fetches them before that pass, of which the recomputation is the first part, and at whose end it would let go of them:
    then a gradient meets a parameter of size 0.
    """
    release = offload.post_sub_module_forward_function

    def release_after_forward(module) -> None:
        if torch._C._current_graph_task_id() == -1:             # -1: not inside a backward pass
            release(module)

    offload.post_sub_module_forward_function = release_after_forward


def make_optimizer(config: FinetuneConfig, parameters: list[Tensor]) -> torch.optim.Optimizer:
    """AdamW by its name in the config. DeepSpeed hands it one flat fp32 piece at a time, so "adamw" needs no list of small tensors."""
    kinds = dict(lr=config.lr, betas=tuple(config.betas), eps=config.eps, weight_decay=config.weight_decay)
    if config.optimizer == "adamw8bit":
        _bitsandbytes()                                         # says what is missing, and nothing of what is not used
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, **kinds)
    # torch's fused AdamW runs on CPUs too: offloaded masters are updated by it, without DeepSpeed's own CPU op and its compiler
    return torch.optim.AdamW(parameters, **kinds, fused=config.optimizer == "fused")


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """Around a whole run: the ranks part in order, so that none of them waits for one that is gone."""
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
