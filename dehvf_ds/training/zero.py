"""Between whole tensors and ZeRO's partitions: frozen weights, the optimizer's state, a model to decode with.

Frozen weights are read from their files straight into the partitions.

Some 5 M parameters train, so the optimizer's state is small enough to gather whole: fp32 master values and
AdamW's two moments by parameter name, and the number of steps taken. DeepSpeed's own checkpoints are bound to
the number of ranks, and its setters for whole parameters leave the compute copy stale.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dehvf_ds.config import UserError
from dehvf_ds.distributed import World, gather_to_main, on_main
from dehvf_ds.model import DehvfForConditionalGeneration
from dehvf_ds.model.ffn import decoder_layers
from dehvf_ds.model.fingerprint import StoredTensor, reading_ranges

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "master"

LARGE_BYTES = 2e9
"""Weights above that are noteworthy where they go through one rank's memory."""

GATHERED_ELEMENTS = 100_000_000
"""Elements of weights that are gathered at a time for a copy of the model."""


def numel(parameter: nn.Parameter) -> int:
    """Elements of a parameter, also where ZeRO-3 has partitioned it."""
    return getattr(parameter, "ds_numel", parameter.numel())


def gathered_units(model: DehvfForConditionalGeneration) -> list[nn.Module]:
    """The modules whose weights ZeRO-3 gathers at once: decoder layers, and what a tower never splits."""
    units: list[nn.Module] = decoder_layers(model.language_model)
    if model.config.fusion != "none":
        names = model.vision_tower._no_split_modules or ()
        units += [module for module in model.vision_tower.modules() if type(module).__name__ in names]
    return units


# --- frozen weights ---


class Zero3Partitions:
    """Puts backbones into ZeRO-3's partitions (``model.backbones.Partitions``). Every rank must call it."""

    def __init__(self, ds_config: dict[str, Any], world: World) -> None:
        self._ds_config, self._world = ds_config, world
        _share_hpz_groups()

    def require_same(self, source: str, contents: object) -> None:
        """Refuses a checkpoint whose ``contents``, of any plain type, are not the same on all ranks.

        Each reads its share from its own files, which may be copies on the nodes' disks.
        """
        digests = gather_to_main([sha256(repr(contents).encode()).hexdigest()], self._world)

        def compare() -> None:
            odd = [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]
            if odd:
                raise UserError(
                    f"{source}: rank {', '.join(odd)} finds other weights there than rank 0; copy them to "
                    "its node again, or set a path that all nodes share"
                )

        on_main(self._world, compare)

    def read(self, tensors: Mapping[nn.Parameter, StoredTensor]) -> None:
        """Partitions parameters without values, and reads this rank's share of each from its file.

        The parameters have their shapes and their dtype, which is one for all. They come in the same order on
        all ranks, in which DeepSpeed numbers them.
        """
        from deepspeed import zero

        # Of a module without parameters, for its settings alone: it would make every weight whole.
        init: Any = zero.Init(nn.Module(), config_dict_or_path=self._ds_config)
        # The machine gives no pages for it, as nothing is written there.
        largest, dtype = max(map(torch.Tensor.numel, tensors)), next(iter(tensors)).dtype
        nowhere = torch.empty(largest, dtype=dtype)
        for parameter in tensors:
            init._convert_to_deepspeed_param(parameter)
        in_order = sorted(tensors.items(), key=lambda item: (item[1].path, item[1].start))
        for path, group in groupby(in_order, key=lambda item: item[1].path):
            with reading_ranges(path) as read:
                for parameter, tensor in group:
                    parameter.data = nowhere[: parameter.numel()].view(parameter.shape)
                    for share, start in _allocate(init, parameter):
                        if (count := min(len(share), tensor.num_elements - start)) > 0:
                            read(tensor, start, share[:count])
                    parameter.data = torch.empty(0, dtype=dtype, device=init.local_device)

    @contextmanager
    def filled_by_transformers(self, source: str, num_bytes: int) -> Iterator[None]:
        """Within it ``from_pretrained`` partitions: rank 0 reads all and sends the others their shares."""
        from transformers.integrations import HfDeepSpeedConfig

        if self._world.is_main and self._world.size > 1 and num_bytes >= LARGE_BYTES:
            print(
                f"note: {source}: rank 0 reads all {num_bytes / 1e9:.0f} GB and sends the other ranks their "
                "shares: not every weight is one tensor of a safetensors file, in the run's dtype",
                file=sys.stderr,
                flush=True,
            )
        # transformers keeps a weak reference.
        partitioning = HfDeepSpeedConfig(self._ds_config)
        yield
        del partitioning


def _allocate(init: Any, parameter: Any) -> list[tuple[Tensor, int]]:
    """Allocates what this rank holds of a parameter: its share, and under hpZ its share within the node.

    Returns each with the position of its first value in the parameter flattened.
    """
    # Of the rank after the last there is nothing to copy.
    init._partition_rank = lambda _: init.dp_world_size
    parameter.partition()
    del init._partition_rank
    shares = [(parameter.ds_tensor, init.rank * len(parameter.ds_tensor))]
    if (within := parameter.ds_secondary_tensor) is not None:
        shares.append((within, init.rank_in_group * len(within)))
    return shares


def _share_hpz_groups() -> None:
    """Lets hpZ load two backbones.

    DeepSpeed 0.19.8 creates its groups in each load and asserts there are none yet (its issues 4901, 7066).
    """
    from deepspeed.utils import groups

    create = groups._create_zero_param_parallel_group
    if create.__name__ == "create_once":
        return

    def create_once(group_size: int) -> None:
        if groups._get_zero_param_intra_parallel_group() is None:
            create(group_size)

    groups._create_zero_param_parallel_group = create_once


# --- the optimizer's state ---


def gather_trainables(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Gathers an engine's fp32 master values, by name, on every rank's CPU. Every rank must call it."""
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
    entries = engine.optimizer.optimizer.state.values()
    steps = max((int(entry["step"]) for entry in entries if "step" in entry), default=0)
    if steps:
        for moment in MOMENTS:
            for name, parameter in parameters.items():
                state[f"{moment}/{name}"] = _on_cpu(_gather_moment(engine.optimizer, parameter, moment))
    return state, steps


def load_state(
    engine: Any, parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor], steps: int
) -> None:
    """Loads what ``gather_state`` returned; each rank takes its own part. Every rank must call it.

    The engine must not have taken a step. UserError if the state belongs to other parameters.
    """
    keys = (MASTER, *MOMENTS) if steps else (MASTER,)
    expected = {
        f"{key}/{name}": tuple(getattr(p, "ds_shape", p.shape))
        for key in keys
        for name, p in parameters.items()
    }
    found = {name: tuple(value.shape) for name, value in state.items()}
    if found != expected:
        odd = sorted(name for name in expected | found if expected.get(name) != found.get(name))
        raise UserError(f"the checkpoint has different parameters from the model: {', '.join(odd[:4])}")
    zero = engine.optimizer
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        partitions, load = zero.fp32_partitioned_groups_flat, _load_zero3
    else:
        partitions, load = zero.single_partition_of_fp32_groups, _load_zero2
    if steps:
        # AdamW creates its state in its first step; a resumed optimizer must have it before.
        for tensor in partitions:
            moments = {moment: torch.zeros_like(tensor) for moment in MOMENTS}
            zero.optimizer.state[tensor] = {"step": torch.tensor(float(steps))} | moments
    with torch.no_grad():
        for name, parameter in parameters.items():
            load(zero, parameter, {key: state[f"{key}/{name}"] for key in keys})


def _gather_moment(zero: Any, parameter: Any, moment: str) -> Tensor:
    from deepspeed.utils import safe_get_full_optimizer_state

    if hasattr(parameter, "ds_id"):
        value = safe_get_full_optimizer_state(parameter, moment)
        assert value is not None
        return value
    # DeepSpeed's own getter for stages 1 and 2 uses a lookup made before AdamW had any state.
    whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    mapping = parameter._hp_mapping
    if mapping is not None:
        source, target = mapping.hp_fragment_address, mapping.lp_fragment_address
        flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
        own = zero.optimizer.state[flat][moment].narrow(0, source.start, source.numel)
        whole.narrow(0, target.start, target.numel).copy_(own)
    torch.distributed.all_reduce(whole, group=parameter._dp_group)
    return whole.reshape(parameter.shape)


def _load_zero3(zero: Any, parameter: Any, values: Mapping[str, Tensor]) -> None:
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    group = parameter.ds_process_group
    rank, num_ranks = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    size = parameter.ds_tensor.numel()
    for key, value in values.items():
        # The last rank's part is padded where the size does not divide.
        padded = F.pad(value.flatten(), (0, size * num_ranks - value.numel()))
        own = padded[rank * size : (rank + 1) * size].to(parameter.ds_tensor.device)
        if key != MASTER:
            safe_set_local_optimizer_state(parameter, own, key)
            continue
        safe_set_local_fp32_param(parameter, own)
        parameter.ds_tensor.data.copy_(own)
        if getattr(parameter, "ds_secondary_tensor", None) is not None:
            # hpZ's copy within the node: gathered again from the primary parts.
            parameter.ds_secondary_tensor = None
        if parameter.ds_status == ZeroParamStatus.AVAILABLE:
            # Small parameters stay gathered on every rank between steps.
            parameter.data.copy_(value)


def _load_zero2(zero: Any, parameter: Any, values: Mapping[str, Tensor]) -> None:
    parameter.data.copy_(values[MASTER])
    mapping = parameter._hp_mapping
    if mapping is None:
        # All of it belongs to other ranks' partitions.
        return
    source, target = mapping.lp_fragment_address, mapping.hp_fragment_address
    flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
    for key, value in values.items():
        part = flat if key == MASTER else zero.optimizer.state[flat][key]
        own = value.flatten().narrow(0, source.start, source.numel)
        part.narrow(0, target.start, target.numel).copy_(own)


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().clone()


# --- a model to decode with ---


@contextmanager
def full_model(model: DehvfForConditionalGeneration, world: World) -> Iterator[DehvfForConditionalGeneration]:
    """The model in evaluation mode: itself where every rank holds all of it (ZeRO-2), else a full copy.

    Under ZeRO-3 the engine's model gathers every weight for every token and needs all ranks to run the same
    modules. A copy has none of DeepSpeed's hooks, so ranks may decode texts of different length. Every rank
    must enter. On exit the model trains again, and the copy's memory is released.
    """
    partitioned = any(hasattr(p, "ds_id") for p in model.parameters())
    full = full_copy(model, world) if partitioned else model.eval()
    try:
        yield full
    finally:
        if partitioned:
            # Whoever still refers to the copy keeps no weights alive.
            full.to(device=torch.device("meta"))  # pyright: ignore[reportCallIssue]
        else:
            model.train()
            if model.config.fusion == "ffn":
                model.set_memory(None)
        if world.device.type == "cuda":
            torch.cuda.empty_cache()


@torch.no_grad()
def full_copy(model: DehvfForConditionalGeneration, world: World) -> DehvfForConditionalGeneration:
    """Copies the weights as they are now into a model without partitions. Every rank must call it.

    ``model`` is the one inside the engine, under any ZeRO stage; it is not changed. The copy is in evaluation
    mode, on this rank's device and in the engine's dtypes.
    """
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with torch.device("meta"):
        copy = DehvfForConditionalGeneration(model.config)
    sources = dict(model.named_parameters())
    assert dict(copy.named_parameters()).keys() == sources.keys()
    for group in _groups(sources):
        with GatheredParameters(list(group.values())):
            for name, source in group.items():
                whole = source.data.detach().to(world.device, copy=True)
                _assign(copy, name, nn.Parameter(whole, requires_grad=False))
    for name, buffer in model.named_buffers():
        _assign(copy, name, buffer.detach().clone())
    # Shared tensors were assigned once, under their first name.
    copy.tie_weights()
    copy.language_model.generation_config = model.language_model.generation_config
    return copy.eval()


def _groups(sources: Mapping[str, nn.Parameter]) -> Iterator[dict[str, nn.Parameter]]:
    group: dict[str, nn.Parameter] = {}
    size = 0
    for name, parameter in sources.items():
        if group and size + numel(parameter) > GATHERED_ELEMENTS:
            yield group
            group, size = {}, 0
        group[name] = parameter
        size += numel(parameter)
    yield group


def _assign(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    held = module._parameters if attribute in module._parameters else module._buffers
    held[attribute] = value  # pyright: ignore[reportArgumentType]
