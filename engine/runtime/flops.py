"""What a forward pass costs, counted on the meta device: no weights, no memory."""

from collections.abc import Callable

import torch


def count_flops(run: Callable[[], object]) -> int:
    """Floating point operations of the matrix products, convolutions and attention that `run` does (a multiply-add is two)."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
