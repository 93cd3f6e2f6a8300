"""The optimizer's state of all trainables, out of DeepSpeed's partitions and back, on any number of ranks.

Some 5 M parameters train, so the state is small enough to gather whole: fp32 master values and AdamW's two
moments by parameter name, and the number of steps taken. DeepSpeed's own checkpoints are bound to the number
of ranks, and its setters for whole parameters leave the compute copy stale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dehvf_ds.config import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "master"


def gather_trainables(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Gathers the fp32 master values of an engine's trainables, by name, on every rank's CPU. Every rank must
    call it.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    gathered = {}
    for name, parameter in parameters.items():
        value = safe_get_full_fp32_param(parameter)
        gathered[name] = _on_cpu(parameter.data if value is None else value)
    return gathered


def gather_state(engine: Any, parameters: Mapping[str, nn.Parameter]) -> tuple[dict[str, Tensor], int]:
    """Gathers master values and moments of all trainables. Every rank must call it.

    Returns whole fp32 tensors on the CPU, by ``master/NAME``, ``exp_avg/NAME`` and ``exp_avg_sq/NAME`` (no
    moments before the first step), and the number of steps that the optimizer has taken.
    """
    state = {f"{MASTER}/{name}": value for name, value in gather_trainables(parameters).items()}
    optimizer = _base_optimizer(engine)
    steps = max((int(entry["step"]) for entry in optimizer.state.values() if "step" in entry), default=0)
    if steps:
        for moment in MOMENTS:
            for name, parameter in parameters.items():
                state[f"{moment}/{name}"] = _on_cpu(_whole_moment(engine.optimizer, parameter, moment))
    return state, steps


def load_state(
    engine: Any, parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor], steps: int
) -> None:
    """Puts a state as ``gather_state`` gives it back: each rank takes its own part. Every rank must call it.

    The engine must have taken no step yet. UserError if the state is of other parameters.
    """
    _check_names(parameters, state, steps)
    zero, optimizer = engine.optimizer, _base_optimizer(engine)
    moments = MOMENTS if steps else ()
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        _start_moments(optimizer, zero.fp32_partitioned_groups_flat, steps)
        put = _put_zero3
    elif hasattr(zero, "single_partition_of_fp32_groups"):
        _start_moments(optimizer, zero.single_partition_of_fp32_groups, steps)
        put = _put_zero2
    else:
        raise UserError(f"a run under {type(zero).__name__} cannot be resumed; use ZeRO stage 1, 2 or 3")
    with torch.no_grad():
        for name, parameter in parameters.items():
            values = {key: state[f"{key}/{name}"] for key in (MASTER, *moments)}
            put(zero, optimizer, parameter, values)


def _whole_moment(zero: Any, parameter: Any, moment: str) -> Tensor:
    from deepspeed.utils import safe_get_full_optimizer_state

    if hasattr(parameter, "ds_id"):
        value = safe_get_full_optimizer_state(parameter, moment)
        assert value is not None
        return value
    if not hasattr(zero, "single_partition_of_fp32_groups"):
        return zero.state[parameter][moment]
    # DeepSpeed's own getter for stages 1 and 2 looks up what it noted before AdamW had any state.
    whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    mapping = parameter._hp_mapping
    if mapping is not None:
        source, target = mapping.hp_fragment_address, mapping.lp_fragment_address
        flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
        own = zero.optimizer.state[flat][moment].narrow(0, source.start, source.numel)
        whole.narrow(0, target.start, target.numel).copy_(own)
    torch.distributed.all_reduce(whole, group=parameter._dp_group)
    return whole.reshape(parameter.shape)


def _put_zero3(zero: Any, optimizer: Any, parameter: Any, values: Mapping[str, Tensor]) -> None:
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    group = parameter.ds_process_group
    rank, num_ranks = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    size = parameter.ds_tensor.numel()
    for key, value in values.items():
        # The last rank's part is filled up where the size does not divide.
        padded = F.pad(value.flatten(), (0, size * num_ranks - value.numel()))
        own = padded[rank * size : (rank + 1) * size].to(parameter.ds_tensor.device)
        if key == MASTER:
            safe_set_local_fp32_param(parameter, own)
            parameter.ds_tensor.data.copy_(own)
            if getattr(parameter, "ds_secondary_tensor", None) is not None:
                # hpZ's copy within the node: gathered anew from the primary parts.
                parameter.ds_secondary_tensor = None
            if parameter.ds_status == ZeroParamStatus.AVAILABLE:
                # Small parameters are whole on every rank between steps.
                parameter.data.copy_(value)
        else:
            safe_set_local_optimizer_state(parameter, own, key)


def _put_zero2(zero: Any, optimizer: Any, parameter: Any, values: Mapping[str, Tensor]) -> None:
    parameter.data.copy_(values[MASTER])
    mapping = parameter._hp_mapping
    if mapping is None:
        # All of it lies in other ranks' parts.
        return
    source, target = mapping.lp_fragment_address, mapping.hp_fragment_address
    flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
    for key, value in values.items():
        part = flat if key == MASTER else optimizer.state[flat][key]
        own = value.flatten().narrow(0, source.start, source.numel)
        part.narrow(0, target.start, target.numel).copy_(own)


def _start_moments(optimizer: Any, tensors: list[Tensor], steps: int) -> None:
    """AdamW makes its state in its first step; a resumed one must have it before."""
    if steps:
        for tensor in tensors:
            optimizer.state[tensor] = {"step": torch.tensor(float(steps))} | {
                moment: torch.zeros_like(tensor) for moment in MOMENTS
            }


def _check_names(parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor], steps: int) -> None:
    kinds = (MASTER, *MOMENTS) if steps else (MASTER,)
    wanted = {
        f"{kind}/{name}": tuple(getattr(p, "ds_shape", p.shape))
        for kind in kinds
        for name, p in parameters.items()
    }
    found = {name: tuple(value.shape) for name, value in state.items()}
    if found != wanted:
        odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise UserError(f"the checkpoint is of other parameters: {', '.join(odd[:4])}")


def _base_optimizer(engine: Any) -> Any:
    """The torch optimizer inside DeepSpeed's."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().clone()
