"""The parts of benchmarks/gpu.py, which starts this in processes of its own."""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench import LORA, REPOSITORY, random_batch, run_config, seconds_in_turn
from decode import random_model, without_pictures
from gpu import append
from peer_models import build_llava, llava_inputs
from torch.autograd import DeviceType
from transformers import CLIPVisionConfig, CompileConfig, LlamaConfig, PreTrainedConfig

from dehvf_ds.batch import Batch
from dehvf_ds.distributed import init_process_group, read_world
from dehvf_ds.model import DehvfConfig, DehvfForConditionalGeneration
from dehvf_ds.planning.memory import step_bytes
from dehvf_ds.planning.plan import BACKBONES
from dehvf_ds.training import engine as engine_module
from dehvf_ds.training.deepspeed_json import read_deepspeed_json
from dehvf_ds.training.engine import compile_units, parameter_groups
from dehvf_ds.training.flops import StepFlops, count_flops
from dehvf_ds.training.metrics import peak_flops, peak_memory_bytes
from dehvf_ds.training.step import train_step

DTYPE = torch.bfloat16

KINDS = {
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "splitk", "addmm", "aten::mm", "aten::bmm"),
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "copies": ("memcpy", "memset", "copy"),
    "loss": ("softmax", "nll"),
    "optimizer": ("multi_tensor", "adam", "foreach"),
}
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpyAsync")

Found = dict[str, Any]
"""What a part measured, for ``results.json``."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured: shapes, rows, tokens, and for how long."""

    texts: dict[str, PreTrainedConfig]
    vision: PreTrainedConfig
    rank: int = 96
    rows: int = 32
    tokens: tuple[int, int] = (24, 128)
    decode_batches: tuple[int, ...] = (1, 16)
    new_tokens: int = 32
    timed_s: float = 2.0
    least_steps: int = 5
    most_rows: int = 4096


_TINY = LlamaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
)
_TINY_TOWER = CLIPVisionConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=6,
    num_attention_heads=2,
    image_size=16,
    patch_size=4,
)
REAL = Sizes(
    texts={"7B": BACKBONES["llama-7b"], "13B": BACKBONES["llama-13b"]},
    vision=BACKBONES["clip-vit-large-patch14"],
)
TINY = Sizes(
    texts={"7B": _TINY, "13B": _TINY},
    vision=_TINY_TOWER,
    rank=8,
    rows=4,
    tokens=(12, 24),
    decode_batches=(1, 2),
    new_tokens=3,
    timed_s=0.0,
    least_steps=1,
    most_rows=8,
)


class Session:
    """One process's place, sizes, and time."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.output: Path = args.output
        self.deadline: float = args.deadline
        self.parts: str = args.parts
        self.rehearsal: bool = args.rehearse
        self.sizes = TINY if args.rehearse else REAL
        self.world = read_world()
        self.device = self.world.device
        self.on_gpu = self.device.type == "cuda"
        if not args.rehearse and not self.on_gpu:
            sys.exit("no CUDA device; --rehearse runs every part at tiny sizes on the CPU")
        self.use_one_thread()

    def use_one_thread(self) -> None:
        """In a rehearsal: two threads of tiny sizes wait for one another more than they compute."""
        if self.rehearsal:
            torch.set_num_threads(1)

    def has_time(self, needs_s: float) -> bool:
        """Whether so many seconds are left to the deadline; a rehearsal has time."""
        return self.rehearsal or self.deadline - time.time() > needs_s

    def part(self, name: str, run: Callable[[], Found], *, needs_s: float = 15) -> None:
        """Runs one part, whatever comes of it, and writes what came of it."""
        if not re.search(self.parts, name):
            return
        if not self.has_time(needs_s):
            append(self.output, {"part": name, "left out": "no time left"})
            return
        started = time.perf_counter()
        try:
            result = run()
        except Exception as error:
            traceback.print_exc()
            result = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        result |= {"part": name, "part_s": time.perf_counter() - started}
        append(self.output, result)
        print(f"{name}: {result['part_s']:.1f} s", flush=True)
        self.clean()

    def clean(self) -> None:
        """Lets go of what a part held."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def main() -> None:
    """Runs the groups named."""
    parser = argparse.ArgumentParser()
    parser.add_argument("groups", nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--deadline", type=float, required=True)
    parser.add_argument("--parts", default="")
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    session = Session(args)
    if session.on_gpu:
        torch.cuda.set_device(session.device)
    name = torch.cuda.get_device_name() if session.on_gpu else "CPU"
    about = {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda}
    append(session.output, {"part": "machine"} | about)
    groups = {
        "plain": plain_steps,
        "zero3": zero_steps,
        "zero2": zero_steps,
        "decode": decoding,
        "llava": llava,
        "largest": largest_micro_batches,
    }
    for group in args.groups:
        groups[group](session, group)
    sys.stdout.flush()
    # Threads of NCCL and DeepSpeed may abort an interpreter that is torn down.
    os._exit(0)


def build(session: Session, size: str, fusion: str, *, lora: bool = True) -> DehvfForConditionalGeneration:
    """Random weights of these shapes, made where they are to lie."""
    config = DehvfConfig(
        text_config=session.sizes.texts[size],
        vision_config=session.sizes.vision,
        fusion=fusion,
        rank=session.sizes.rank,
        lora=LORA if lora else None,
    )
    return random_model(config, DTYPE, session.device)


def batch_of(config: DehvfConfig, rows: int, tokens: int) -> Batch:
    """Captions of T random tokens each and pictures of noise, on the host, as the loader gives them."""
    return random_batch(
        rows,
        tokens,
        prompt_tokens=min(8, tokens // 2),
        vocab=config.text_config.vocab_size,
        image_size=config.image_size,
    )


@dataclass(frozen=True)
class Training:
    """A model, its sizes, a step of it, and under ZeRO the resolved DeepSpeed configuration."""

    model: torch.nn.Module
    config: DehvfConfig
    flops: StepFlops
    step: Callable[[Batch], object]
    ds_config: dict[str, Any] | None = None


def plain_training(session: Session, size: str, fusion: str) -> Training:
    """A training step of nothing but torch."""
    model = build(session, size, fusion).train()

    def loss(batch: Batch) -> torch.Tensor:
        return model(**batch.training_inputs()).loss_sum / batch.count().num_supervised

    return Training(model, model.config, count_flops(model), plain_step(session, model, loss))


def llava_training(session: Session, size: str) -> Training:
    """The same of LLaVA and PEFT's LoRA as transformers has them: logits at every position."""
    ours = build(session, size, "prefix", lora=False)
    flops = count_flops(ours)
    model = build_llava(ours.language_model, ours.vision_tower, ours.config).train()
    config = model.base_model.model.config

    def loss(batch: Batch) -> torch.Tensor:
        return model(**llava_inputs(batch, config)).loss

    return Training(model, ours.config, flops, plain_step(session, model, loss))


def plain_step(
    session: Session, model: torch.nn.Module, loss: Callable[[Batch], torch.Tensor]
) -> Callable[[Batch], None]:
    """A step that takes its batch to the device, and AdamW's on what trains."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameter_groups(trainable, 0.02), lr=1e-4)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        loss(batch.to(session.device, DTYPE)).backward()
        torch.nn.utils.clip_grad_norm_(trainable.values(), 1.0)
        optimizer.step()

    return step


def zero_training(session: Session, name: str) -> Training:
    """The trainer's engine around random weights that lie on the device already."""
    import deepspeed

    init_process_group(session.world)
    session.use_one_thread()
    config = run_config(session.sizes.rows)
    ds_config = read_deepspeed_json(str(REPOSITORY / f"ds_configs/{name}.json"), config, 1)
    ds_config["bf16"] = {"enabled": True}
    model = build(session, "7B", "ffn")
    if name == "zero3":
        # As loading partitioned backbones does: puts DeepSpeed's linear in place.
        with deepspeed.zero.Init(config_dict_or_path=ds_config):
            pass
    engine_module.load_model = lambda *_, **__: model
    engine, model = engine_module.build_engine(config, model.config, ds_config, session.world)
    numbers = itertools.count()

    def step(batch: Batch) -> None:
        train_step(engine, [batch], session.world, DTYPE, seed=0, step=next(numbers))

    return Training(model, model.config, count_flops(model), step, ds_config)


# --- measuring ---


def timed(session: Session, run: Callable[[], object]) -> list[float]:
    """Seconds of each call, after two that are not counted."""
    seconds = []
    for found in seconds_in_turn({"run": run}, 20, warm_ups=2):
        seconds.append(found["run"])
        if len(seconds) >= session.sizes.least_steps and sum(seconds) >= session.sizes.timed_s:
            break
    return seconds


def measure_step(session: Session, training: Training, tokens: int) -> Found:
    """Times a step; where its rows do not fit, half of them."""
    config, rows = training.config, session.sizes.rows
    while True:
        batch = batch_of(config, rows, tokens)
        session.clean()
        try:
            seconds = timed(session, lambda batch=batch: training.step(batch))
            break
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            rows //= 2
    median, text = statistics.median(seconds), batch.num_input_tokens()
    # Of LLaVA the tokens alone: it computes logits that ours does not.
    ours = isinstance(training.model, DehvfForConditionalGeneration)
    hardware = training.flops.hardware(batch.count()) if ours else None
    flops = {"mfu": training.flops.model(text), "hfu": hardware}
    peak = peak_flops(session.device)
    found: Found = {
        name: None if peak is None or value is None else value / median / peak
        for name, value in flops.items()
    }
    if training.ds_config is not None:
        # Without what CUDA takes beside PyTorch's allocator.
        found["planned_bytes"] = sum(step_bytes(config, batch, training.ds_config).values())
    return found | {
        "rows": rows,
        "tokens": tokens,
        "text_tokens": text,
        "supervised": batch.num_supervised(),
        "step_s": median,
        "range_s": [min(seconds), max(seconds)],
        "num_steps": len(seconds),
        "tokens_per_s": text / median,
        "rows_per_s": rows / median,
        "peak_bytes": peak_memory_bytes(session.device),
        "reserved_bytes": torch.cuda.max_memory_reserved() if session.on_gpu else None,
    }


def largest_rows(session: Session, training: Training) -> Found:
    """The most rows of a step that fit, found by doubling, then once half as many more."""
    model, tokens, most = training.model, session.sizes.tokens[0], session.sizes.most_rows
    best, failed, peak, rows = 0, None, 0, session.sizes.rows

    def fits(rows: int) -> bool:
        session.clean()
        try:
            if session.rehearsal and rows > most:
                raise torch.OutOfMemoryError("rehearsed")
            training.step(batch_of(training.config, rows, tokens))
            if session.on_gpu:
                torch.cuda.synchronize()
            return True
        except torch.OutOfMemoryError:
            model.zero_grad(set_to_none=True)
            if isinstance(model, DehvfForConditionalGeneration) and model.config.fusion == "ffn":
                model.set_memory(None)
            return False

    while failed is None and rows <= 2 * most and session.has_time(12):
        if fits(rows):
            best, peak, rows = rows, peak_memory_bytes(session.device), 2 * rows
        else:
            failed = rows
    between = best + best // 2
    # DeepSpeed may be left in the middle of a step; what fitted before has been seen.
    with suppress(Exception):
        if best and failed is not None and session.has_time(12):
            if fits(between):
                best, peak = between, peak_memory_bytes(session.device)
            else:
                failed = between
    return {"rows": best, "tokens": tokens, "failed_rows": failed, "peak_bytes": peak}


@torch.inference_mode()
def decode(
    session: Session,
    merged: DehvfForConditionalGeneration,
    bare: torch.nn.Module,
    batch: int,
    *,
    compiled: bool,
) -> Found:
    """Greedy decoding, prompt and picture included, in turn with the bare model.

    ``compiled`` is transformers' own way: a static cache and a compiled step, in CUDA graphs.
    """
    config, new_tokens = merged.config, session.sizes.new_tokens
    ids = torch.randint(5, config.text_config.vocab_size, (batch, 16), device=session.device)
    side = config.image_size
    pixels = torch.randn(batch, 3, side, side, device=session.device, dtype=DTYPE)
    given: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids),
        "min_new_tokens": new_tokens,
        "max_new_tokens": new_tokens,
        "do_sample": False,
        "pad_token_id": 0,
    }
    if compiled:
        # A rehearsal traces the step and generates no code.
        step_config = CompileConfig() if session.on_gpu else CompileConfig(backend="eager", mode=None)
        step_config._compile_all_devices = True
        given |= {"cache_implementation": "static", "compile_config": step_config}
    runs = {
        "tokens_per_s": lambda: merged.generate(ids, pixels, **given),
        "bare_tokens_per_s": lambda: bare.generate(ids, **given),  # pyright: ignore[reportCallIssue]
    }
    rounds = list(seconds_in_turn(runs, session.sizes.least_steps))
    medians = {name: statistics.median(found[name] for found in rounds) for name in runs}
    speed = {name: batch * new_tokens / seconds for name, seconds in medians.items()}
    return {"batch": batch, "new_tokens": new_tokens, **speed}


def profile_step(session: Session, training: Training) -> Found:
    """Two profiled steps: kernels, their kinds, and what the device and the host waited."""
    batch = batch_of(training.config, session.sizes.rows, session.sizes.tokens[-1])
    wall = statistics.median(timed(session, lambda: training.step(batch)))
    num_steps = 2
    activities = [torch.profiler.ProfilerActivity.CPU]
    if session.on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(num_steps):
            training.step(batch)
        if session.on_gpu:
            torch.cuda.synchronize()
    events = profile.key_averages()
    sort_by = "self_device_time_total" if session.on_gpu else "self_cpu_time_total"
    with (session.output / "profile.txt").open("a", encoding="utf-8") as file:
        file.write(events.table(sort_by=sort_by, row_limit=40) + "\n")
    wanted = DeviceType.CUDA if session.on_gpu else DeviceType.CPU
    times = [
        (event.key, getattr(event, sort_by) / 1e6 / num_steps, event.count // num_steps)
        for event in events
        if event.device_type == wanted
        and not getattr(event, "is_user_annotation", False)
        and not event.key.startswith(("Optimizer.", "ProfilerStep"))
    ]
    busy = sum(seconds for _, seconds, _ in times)
    kinds: dict[str, float] = {}
    for key, seconds, _ in times:
        kinds[kind_of(key)] = kinds.get(kind_of(key), 0.0) + seconds
    top = sorted(times, key=lambda item: -item[1])[:15]
    shares = sorted(kinds.items(), key=lambda item: -item[1])
    return {
        "wall_s": wall,
        "busy_s": busy,
        "waiting_s": sum(e.self_cpu_time_total for e in events if e.key in WAITS) / 1e6 / num_steps,
        "kinds": [[kind, f"{100 * seconds / max(busy, 1e-9):.1f} %"] for kind, seconds in shares],
        "kernels": [[key[:90], f"{1e3 * seconds:.2f}", calls] for key, seconds, calls in top],
    }


def kind_of(kernel: str) -> str:
    """What a kernel does, by its name."""
    name = kernel.lower()
    found = (kind for kind, words in KINDS.items() if any(word in name for word in words))
    return next(found, "element-wise and norms")


# --- the groups ---


def plain_steps(session: Session, _: str) -> None:
    """Steps of plain torch: 7B with each fusion, then 13B with a profile; `ffn` compiled, too."""
    for size, fusion in (("7B", "ffn"), ("7B", "prefix"), ("7B", "none"), ("13B", "ffn")):
        part, is_ours = f"{size} {fusion}, plain torch", fusion == "ffn"
        build = lambda: plain_training(session, size, fusion)  # noqa: B023, E731
        steps_of(session, part, build, compiled=is_ours, profiled=size == "13B")


def zero_steps(session: Session, name: str) -> None:
    """Steps of the trainer's own engine under a shipped configuration, then its largest micro-batch."""
    linear = torch.nn.functional.linear
    part = f"7B ffn, {name}"
    build = lambda: zero_training(session, name)  # noqa: E731
    steps_of(session, part, build, needs_s=20, compiled=True, largest=True)
    # ZeRO-3 puts its own in the place of torch's.
    torch.nn.functional.linear = linear


def steps_of(
    session: Session,
    part: str,
    build: Callable[[], Training],
    *,
    needs_s: float = 15,
    compiled: bool = False,
    profiled: bool = False,
    largest: bool = False,
) -> None:
    """Parts that share a model, which the first builds: a step of each length, profile, largest micro-batch.

    With ``compiled``, steps and profile again, as `train.compile` has them, and the rest so, too.
    """
    built: list[Training] = []

    def run(measure: Callable[..., Found], *more: int) -> Found:
        if not built:
            built.append(build())
        return measure(session, built[0], *more)

    for way in ("", ", compiled") if compiled else ("",):
        if way and built:
            stage = ((built[0].ds_config or {}).get("zero_optimization") or {}).get("stage")
            compile_units(built[0].model, partitioned=stage == 3)
        for tokens in session.sizes.tokens:
            measure = partial(run, measure_step, tokens)
            session.part(part + way, measure, needs_s=needs_s + (10 if way else 0))
        if profiled:
            session.part(part + way + ", profile", partial(run, profile_step), needs_s=needs_s)
    if largest:
        session.part(part + ", largest", partial(run, largest_rows), needs_s=25)
    built.clear()
    session.clean()


def decoding(session: Session, _: str) -> None:
    """Decoding against the bare language model."""
    models: list[Any] = []

    def run(batch: int, compiled: bool) -> Found:
        if not models:
            models.append(build(session, "7B", "ffn", lora=False).eval())
            models.append(without_pictures(models[0]))
        merged, bare = models
        return decode(session, merged, bare, batch, compiled=compiled)

    # Compiling takes a minute or two a model, so it comes last.
    for way, compiled, needs_s in (("", False, 12), (", static cache, compiled", True, 120)):
        for batch in session.sizes.decode_batches:
            part = partial(run, batch, compiled)
            session.part(f"7B ffn merged, greedy{way}", part, needs_s=needs_s)


def llava(session: Session, _: str) -> None:
    """Steps and the largest micro-batch of what a user would take instead."""
    part = "7B LLaVA and PEFT, plain torch"
    steps_of(session, part, lambda: llava_training(session, "7B"), largest=True)


def largest_micro_batches(session: Session, _: str) -> None:
    """The most rows that fit beside 7B weights under plain torch."""
    for fusion in ("ffn", "prefix", "none"):

        def run(fusion: str = fusion) -> Found:
            return largest_rows(session, plain_training(session, "7B", fusion))

        session.part(f"7B {fusion}, plain torch, largest", run, needs_s=20)


if __name__ == "__main__":
    main()
