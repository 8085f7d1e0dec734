"""What ZeRO-3 does to a parameter: it is split over the ranks, and can be read, written and measured as a whole.

Every helper here takes an ordinary parameter as well, so that the same code reads and writes a sharded and an ordinary
model. `engine.py` and this file are the only ones that know DeepSpeed.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lbr_dist.ranks.process import large_imports


def import_deepspeed() -> Any:
    """DeepSpeed, imported quickly and quietly, with its process group ready."""
    with large_imports():
        import deepspeed

    # its shared-memory helper serves inference alone, and would be compiled at the first start
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with large_imports(), _no_compiler():
        # it checks whether an optimizer is Muon; that import sets up torch's compiler, two seconds of every start
        import deepspeed.runtime.zero.muon.muon_optimizer
    deepspeed.utils.logger.setLevel(logging.WARNING)
    deepspeed.init_distributed(verbose=False)
    return deepspeed


@contextmanager
def _no_compiler() -> Iterator[None]:
    """Inside, `torch.compile` leaves functions as they are."""
    name = "TORCHDYNAMO_DISABLE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def extent(elements: int, rank: int, world_size: int) -> tuple[int, int]:
    """The elements of a flattened parameter that a rank holds under ZeRO-3: first, and one past the last."""
    part = math.ceil(elements / world_size)
    return min(rank * part, elements), min((rank + 1) * part, elements)


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 has split this parameter."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter that may be sharded."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def read_from(parameter: nn.Parameter, read: Callable[[], Tensor]) -> None:
    """Let `whole` take the value of a parameter on the meta device from `read`, each time it is asked for."""
    parameter.read_whole = read  # type: ignore[attr-defined]


@contextmanager
def whole(parameter: nn.Parameter, write: bool = False) -> Iterator[Tensor]:
    """A parameter's full value on every rank; with `write`, every rank gets what rank 0 has put into it."""
    if hasattr(parameter, "read_whole"):
        assert not write
        yield parameter.read_whole()
        return
    if not is_sharded(parameter):
        yield parameter.data
        return
    with import_deepspeed().zero.GatheredParameters([parameter], modifier_rank=0 if write else None):
        yield parameter.data


@contextmanager
def exact_buffers(sharding: AbstractContextManager[None]) -> Iterator[None]:
    """Enter a sharding context, but keep the rotary tables in float32, which it would cast to the weights' dtype."""
    from transformers.integrations.deepspeed import prevent_arange_dtype_change

    with prevent_arange_dtype_change(), sharding:
        yield
