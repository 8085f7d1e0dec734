"""The ZeRO-3 engine: sharded parameters, gradients and optimizer states.

The stages see `Engine`: run, backward, step. DeepSpeed's settings and calls are here, and what it does to a single
parameter in `model/sharding.py`; no other module knows it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lbr_dist.config import EngineConfig, OptimizerConfig
from lbr_dist.model.sharding import extent, full_shape, import_deepspeed
from lbr_dist.ranks.traffic import Traffic

HOLDER = -1
"""A module number that no module has: it marks a parameter as in use while `Engine.accumulate` holds it."""


def deepspeed_config(engine: EngineConfig, dtype: str, max_grad_norm: float) -> dict[str, Any]:
    """DeepSpeed's settings from ours. Every setting with a default of its own is written out."""

    def offload(where: str, **nvme: Any) -> dict[str, Any] | None:
        if where == "none":
            return None
        nvme |= {"nvme_path": engine.nvme_path}
        return {"device": where, "pin_memory": torch.cuda.is_available()} | (nvme if where == "nvme" else {})

    zero = {
        "stage": engine.zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": torch.cuda.is_available(),
        "reduce_scatter": True,
        "stage3_param_persistence_threshold": engine.persistence_threshold,
        "stage3_prefetch_bucket_size": engine.prefetch_elements,
        "reduce_bucket_size": engine.reduce_elements,
        "stage3_max_live_parameters": engine.live_elements,
        "stage3_max_reuse_distance": engine.live_elements,
        "offload_optimizer": offload(engine.offload_optimizer),
        "offload_param": offload(engine.offload_parameters, buffer_size=engine.nvme_buffer_elements),
    }
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": {key: value for key, value in zero.items() if value is not None},
        # torch's AdamW, for offloaded states too: DeepSpeed's own would be compiled at the first start
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def sharded_init(engine: EngineConfig, dtype: str) -> AbstractContextManager[None]:
    """Modules built inside are sharded as they are built, so that no rank ever holds the whole model."""
    config = deepspeed_config(engine, dtype, max_grad_norm=0.0)
    # the dtype comes from the config: passed as an argument, it is read as bfloat16 on machines without fp16
    context: AbstractContextManager[None] = import_deepspeed().zero.Init(config_dict_or_path=config)
    return context


def parameter_groups(
    model: nn.Module, optimizer: OptimizerConfig, fast: Iterable[nn.Parameter]
) -> list[dict[str, Any]]:
    """Weight decay for matrices only, and the parameters of `fast` at their own rate."""
    fast_ids = {id(p) for p in fast}
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "vectors": [], "fast": []}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        name = "fast" if id(parameter) in fast_ids else "matrices" if len(full_shape(parameter)) > 1 else "vectors"
        groups[name].append(parameter)
    return [
        {
            "params": members,
            "lr": optimizer.lr,
            "lr_factor": optimizer.bottleneck_lr_factor if name == "fast" else 1.0,
            "weight_decay": optimizer.weight_decay if name == "matrices" else 0.0,
        }
        for name, members in groups.items()
        if members
    ]


@dataclass(frozen=True, slots=True)
class Update:
    """What an optimizer step did; the same on every rank."""

    grad_norm: float
    """The global gradient's norm before clipping; infinite if the gradient is not finite."""

    applied: bool
    """False if the step was skipped: no weight and no optimizer state has changed."""


@dataclass(frozen=True, slots=True)
class Slice:
    """A rank's part of the state of one trained parameter, flattened: elements `start` to `stop`."""

    name: str
    start: int
    stop: int
    tensors: dict[str, Tensor]
    """``[stop - start]`` float32 each, by kind (`shards.KINDS`)."""


class Engine:
    """A model under ZeRO-3, and its optimizer.

    Everything runs through `__call__`, never through the bare module: the engine's hooks gather the parameters. The
    gradients of all chunks of a step are reduced once, when the `accumulate` block ends.
    """

    def __init__(
        self,
        model: nn.Module,
        engine: EngineConfig,
        optimizer: OptimizerConfig,
        dtype: str,
        fast: Iterable[nn.Parameter] = (),
        resident: Iterable[nn.Parameter] = (),
        traffic: Traffic | None = None,
    ) -> None:
        """
        Args:
            model: built under `sharded_init`.
            engine: sharding and offload.
            optimizer: AdamW's settings.
            dtype: of weights and activations.
            fast: parameters that learn at `optimizer.bottleneck_lr_factor` times the rate.
            resident: parameters that stay whole on every rank, gathered once per step.
            traffic: counts DeepSpeed's collectives from now on.
        """
        groups = parameter_groups(model, optimizer, fast)
        self.model = model
        self._engine, self._optimizer, _, _ = import_deepspeed().initialize(
            model=model,
            optimizer=torch.optim.AdamW(groups, betas=(optimizer.beta1, optimizer.beta2), fused=True),
            config=deepspeed_config(engine, dtype, optimizer.max_grad_norm),
        )
        self.world_size: int = self._engine.world_size
        self.can_save: bool = engine.offload_optimizer != "nvme"
        """Whether `slices` and `restore` work: states on nvme are not tensors of this process."""
        self._rank: int = self._engine.global_rank
        kept = self._engine.optimizer.persistent_parameters
        for parameter in resident:
            if not parameter.ds_persist:  # type: ignore[attr-defined]
                parameter.ds_persist = True  # type: ignore[attr-defined]
                kept.append(parameter)
        apart = sum(full_shape(p).numel() for p in model.parameters() if not getattr(p, "ds_persist", False))
        self.fits_whole: bool = apart <= engine.live_elements
        """Whether all parameters may be whole at the same time."""
        self._stop_counting = traffic.watch(import_deepspeed().comm.comm.cdb) if traffic else None

    @property
    def dimension(self) -> int:
        """d, the width of the hidden states."""
        return int(self.model.backbone.config.hidden_size)  # type: ignore[union-attr,arg-type]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def train(self, mode: bool = True) -> None:
        self._engine.train(mode)

    @contextmanager
    def accumulate(self, hold: bool = False) -> Iterator[None]:
        """The gradients of every `backward` inside add up locally and are reduced once, at the end.

        Args:
            hold: keep gathered parameters whole until the end, so that a step of many passes gathers them once.
                DeepSpeed itself releases them after each pass, whatever `engine.live_elements` is.
        """
        with self._held() if hold else nullcontext(), self._engine.coalesce_grad_reduction():
            yield

    @contextmanager
    def _held(self) -> Iterator[None]:
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        # DeepSpeed keeps a parameter whole while a module uses it; modules are numbered from 0
        parameters: list[Any] = list(self.model.parameters())
        for parameter in parameters:
            parameter.ds_active_sub_modules.add(HOLDER)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.ds_active_sub_modules.discard(HOLDER)
                whole_now = parameter.ds_status == ZeroParamStatus.AVAILABLE and not parameter.ds_persist
                if whole_now and not parameter.ds_active_sub_modules:
                    parameter.partition()

    def backward(self, loss: Tensor) -> None:
        """Backward of this rank's share of a **global sum**: undoes DeepSpeed's mean over the ranks."""
        self._engine.backward(loss * self.world_size)

    def step(self, lr: float, largest_norm: float = math.inf) -> Update:
        """Clip the gradients, step and clear them; or only clear them, if their norm is not finite or too large.

        Args:
            lr: the learning rate.
            largest_norm: a gradient with a larger norm is not applied.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        if math.isfinite(largest_norm):
            from deepspeed.runtime.utils import combine_grad_norm_groups

            zero = self._engine.optimizer
            norm = float(combine_grad_norm_groups(zero._get_norm_groups()))  # of all ranks' gradients
            if norm > largest_norm:
                self.discard()
                return Update(norm, applied=False)
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        # DeepSpeed itself skips a step whose norm is not finite
        return Update(norm, applied=math.isfinite(norm))

    def discard(self) -> None:
        """Clear the accumulated gradients: no weight and no optimizer state changes."""
        zero = self._engine.optimizer
        zero._overflow_clean_up(zero.loss_scale)

    # ---- checkpoints ------------------------------------------------------------------------------------------

    @property
    def optimizer_steps(self) -> float:
        """AdamW's step count, which its bias correction needs; the same for every parameter and rank."""
        self._begin_moments()
        zero = self._engine.optimizer
        counts = {float(zero.optimizer.state[flat]["step"]) for flat in zero.fp32_partitioned_groups_flat}
        assert len(counts) == 1, counts
        return counts.pop()

    def _begin_moments(self) -> None:
        """Create the state that AdamW itself would create at its first step."""
        zero = self._engine.optimizer
        for flat in zero.fp32_partitioned_groups_flat:
            state = zero.optimizer.state[flat]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
                state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(flat, requires_grad=False) for _ in range(2))

    def shapes(self) -> dict[str, list[int]]:
        """The shapes of the trained parameters, by name."""
        return {name: list(full_shape(p)) for name, p in self.model.named_parameters() if p.requires_grad}

    def slices(self) -> list[Slice]:
        """This rank's part of the state of every trained parameter: views of the optimizer's own tensors."""
        self._begin_moments()
        zero = self._engine.optimizer
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        found = []
        for group, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
            state = zero.optimizer.state[flat]
            kinds = {"master": flat.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
            offset = 0
            for parameter in group:
                start, stop = extent(parameter.ds_numel, self._rank, self.world_size)
                views = {kind: tensor.narrow(0, offset, stop - start) for kind, tensor in kinds.items()}
                found.append(Slice(names[id(parameter)], start, stop, views))
                offset += parameter.partition_numel()  # the last rank's part may end in padding
        return found

    def restore(self, pieces: Callable[[str, str, int, int], Iterable[tuple[int, Tensor]]], steps: float) -> None:
        """Set the master weights and moments of all trained parameters, and the weights that follow from them.

        Args:
            pieces: takes a kind of state, a parameter's name, start and stop, as `ShardReader.pieces` does.
            steps: `optimizer_steps` when the state was saved.
        """
        zero = self._engine.optimizer
        zero.checkpoint_event_prologue()
        for part in self.slices():
            for kind, view in part.tensors.items():
                for at, piece in pieces(kind, part.name, part.start, part.stop):
                    view[at - part.start : at - part.start + len(piece)].copy_(piece)
        for number, flat in enumerate(zero.fp32_partitioned_groups_flat):
            zero.optimizer.state[flat]["step"].fill_(steps)
            zero._reassign_or_swap_out_partitioned_parameters(number)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].partition(zero.persistent_parameters)
        zero.checkpoint_event_epilogue()

    def close(self) -> None:
        """Drop hooks and buffers, so that another engine can follow in the same process."""
        if self._stop_counting is not None:
            self._stop_counting()
        self._engine.destroy()
