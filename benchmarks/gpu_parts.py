"""The parts of benchmarks/gpu.py, which starts this in processes of its own."""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu import append
from timing import seconds_in_turn
from torch.autograd import DeviceType
from transformers import CLIPVisionConfig, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from decode import without_pictures

from dehvf_ds.batch import IGNORE_INDEX, Batch
from dehvf_ds.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from dehvf_ds.distributed import World, init_process_group, read_world
from dehvf_ds.model import DehvfConfig, DehvfForConditionalGeneration
from dehvf_ds.planning.memory import (
    Parameters,
    build_on_meta,
    count_parameters,
    run_micro_step,
    step_bytes,
)
from dehvf_ds.planning.report import BACKBONES
from dehvf_ds.training import engine as engine_module
from dehvf_ds.training.deepspeed_json import read_deepspeed_json
from dehvf_ds.training.metrics import model_flops, peak_flops, peak_memory_bytes
from dehvf_ds.training.optim import parameter_groups
from dehvf_ds.training.step import train_step

REPOSITORY = Path(__file__).resolve().parent.parent
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": ["down_proj"]}
PROMPT_TOKENS = 8
DTYPE = torch.bfloat16

KINDS = {
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "splitk", "addmm", "aten::mm", "aten::bmm"),
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "copies": ("memcpy", "memset", "copy"),
    "loss": ("softmax", "nll"),
    "optimizer": ("multi_tensor", "adam", "foreach"),
}
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpyAsync")


Part = Callable[[], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured: shapes, rows, tokens, and for how long."""

    texts: dict[str, LlamaConfig]
    vision: CLIPVisionConfig
    rows: int
    tokens: tuple[int, int]
    decode_batches: tuple[int, ...]
    new_tokens: int
    timed_s: float
    most_rows: int


REAL = Sizes(
    texts={"7B": BACKBONES["llama-7b"], "13B": BACKBONES["llama-13b"]},  # pyright: ignore[reportArgumentType]
    vision=BACKBONES["clip-vit-large-patch14"],  # pyright: ignore[reportArgumentType]
    rows=32,
    tokens=(24, 128),
    decode_batches=(1, 16),
    new_tokens=32,
    timed_s=3.0,
    most_rows=4096,
)
_TINY = LlamaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
)
TINY = Sizes(
    texts={"7B": _TINY, "13B": _TINY},
    vision=CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    ),
    rows=4,
    tokens=(12, 24),
    decode_batches=(1, 2),
    new_tokens=3,
    timed_s=0.0,
    most_rows=8,
)


class Session:
    """One process's place, sizes, and time."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.output: Path = args.output
        self.deadline: float = args.deadline
        self.rehearsal: bool = args.rehearse
        self.sizes = TINY if args.rehearse else REAL
        self.world: World = read_world()
        self.device = self.world.device
        if not args.rehearse and self.device.type != "cuda":
            sys.exit("no CUDA device; --rehearse runs every part at tiny sizes on the CPU")
        self.use_one_thread()

    def use_one_thread(self) -> None:
        """In a rehearsal: two threads of tiny sizes wait for one another more than they compute."""
        if self.rehearsal:
            torch.set_num_threads(1)

    def left_s(self) -> float:
        """Seconds to the deadline."""
        return self.deadline - time.time()

    def part(self, name: str, run: Callable[[], dict[str, Any]], *, needs_s: float = 15) -> None:
        """Runs one part, whatever comes of it, and writes what came of it."""
        if self.left_s() < needs_s and not self.rehearsal:
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
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def sync(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    """Runs the groups named."""
    parser = argparse.ArgumentParser()
    parser.add_argument("groups", nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--deadline", type=float, required=True)
    parser.add_argument("--rehearse", action="store_true")
    session = Session(parser.parse_args())
    on_gpu = session.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(session.device)
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    about = {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda}
    append(session.output, {"part": "machine"} | about)
    groups = {
        "plain": plain_steps,
        "zero3": zero_steps("zero3"),
        "zero2": zero_steps("zero2"),
        "decode": decoding_and_profile,
        "largest": largest_micro_batches,
    }
    for group in parser.parse_args().groups:
        groups[group](session)
    sys.stdout.flush()
    # Threads of NCCL and DeepSpeed may abort an interpreter that is torn down.
    os._exit(0)


# --- the model ---


def build(session: Session, size: str, fusion: str, *, lora: bool = True) -> DehvfForConditionalGeneration:
    """Random weights of these shapes, made where they are to lie."""
    config = DehvfConfig(
        text_config=session.sizes.texts[size],
        vision_config=session.sizes.vision,
        fusion=fusion,
        rank=96 if not session.rehearsal else 8,
        lora=LORA if lora else None,
    )
    with torch.device("meta"):
        model = DehvfForConditionalGeneration(config)
    model = model.to(DTYPE).to_empty(device=session.device)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            parameter.data.normal_(std=0.02)
        else:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
    # Buffers hold no value after to_empty.
    rotary = model.get_decoder().rotary_emb
    model.get_decoder().rotary_emb = type(rotary)(config.text_config).to(session.device)
    if fusion != "none":
        positions = {n: b for n, b in model.vision_tower.named_buffers() if n.endswith("position_ids")}
        for buffer in positions.values():
            buffer.copy_(torch.arange(buffer.shape[-1], device=buffer.device))
    known = ("inv_freq", "position_ids")
    assert all(name.endswith(known) for name, _ in model.named_buffers())
    return model


def random_batch(session: Session, model_config: DehvfConfig, rows: int, tokens: int) -> Batch:
    """Captions of random tokens and pictures of noise, on the host, as the loader gives them."""
    generator = torch.Generator().manual_seed(rows * 1000 + tokens)
    ids = torch.randint(10, model_config.text_config.vocab_size, (rows, tokens), generator=generator)
    lengths = torch.randint(int(0.6 * tokens), tokens + 1, (rows,), generator=generator)
    lengths[0] = tokens
    mask = (torch.arange(tokens)[None] < lengths[:, None]).long()
    labels = ids.masked_fill(mask == 0, IGNORE_INDEX)
    labels[:, : min(PROMPT_TOKENS, tokens // 2)] = IGNORE_INDEX
    side = model_config.image_size
    pictures = torch.randn(1, 3, side, side, generator=generator).expand(rows, -1, -1, -1).contiguous()
    return Batch(
        input_ids=ids,
        attention_mask=mask,
        labels=labels,
        pixel_values=pictures,
        has_image=torch.ones(rows, dtype=torch.bool),
        keys=tuple(map(str, range(rows))),
    )


def plain_step(session: Session, model: DehvfForConditionalGeneration) -> Callable[[Batch], None]:
    """A training step of nothing but torch."""
    trainable = model.train().trainable_parameters()
    optimizer = torch.optim.AdamW(parameter_groups(trainable, 0.02), lr=1e-4)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        output = model(**batch.to(session.device, DTYPE).inputs())
        (output.loss_sum / batch.num_supervised()).backward()
        torch.nn.utils.clip_grad_norm_(trainable.values(), 1.0)
        optimizer.step()

    return step


# --- measuring ---


def timed(session: Session, run: Callable[[], object]) -> list[float]:
    """Seconds of each call, after two that are not counted."""
    at_least, seconds = 1 if session.rehearsal else 3, []
    for found in seconds_in_turn({"run": run}, 20, warm_ups=2):
        seconds.append(found["run"])
        if len(seconds) >= at_least and sum(seconds) >= session.sizes.timed_s:
            break
    return seconds


def measure_step(
    session: Session,
    step: Callable[[Batch], object],
    config: DehvfConfig,
    parameters: Parameters,
    tokens: int,
) -> dict[str, Any]:
    """Times a step; where its rows do not fit, half of them."""
    rows = session.sizes.rows
    while True:
        batch = random_batch(session, config, rows, tokens)
        session.clean()
        try:
            seconds = timed(session, lambda batch=batch: step(batch))
            break
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            rows //= 2
    median, text = statistics.median(seconds), batch.num_tokens()
    arithmetic = run_micro_step(build_on_meta(config, DTYPE), batch, zero3=False).flops
    peak = peak_flops(session.device)
    return {
        "rows": rows,
        "tokens": tokens,
        "text_tokens": text,
        "supervised": batch.num_supervised(),
        "step_s": median,
        "range_s": [min(seconds), max(seconds)],
        "num_steps": len(seconds),
        "tokens_per_s": text / median,
        "rows_per_s": rows / median,
        "mfu": None
        if peak is None
        else model_flops(parameters.language + parameters.lora, text) / median / peak,
        "utilisation": None if peak is None else arithmetic / median / peak,
        "peak_bytes": peak_memory_bytes(session.device),
        "reserved_bytes": torch.cuda.max_memory_reserved() if session.device.type == "cuda" else None,
    }


def largest_rows(
    session: Session,
    step: Callable[[Batch], object],
    model: DehvfForConditionalGeneration,
    config: DehvfConfig,
) -> dict[str, Any]:
    """The most rows of a step that fit, found by doubling, then once half as many more."""
    tokens, rows, fits, failed, peak = session.sizes.tokens[0], session.sizes.rows, 0, None, 0
    while rows <= session.sizes.most_rows * 2 and (session.left_s() > 12 or session.rehearsal):
        session.clean()
        try:
            if session.rehearsal and rows > session.sizes.most_rows:
                raise torch.OutOfMemoryError("rehearsed")
            step(random_batch(session, config, rows, tokens))
            session.sync()
            out_of_memory, fits, peak = False, rows, peak_memory_bytes(session.device)
        except torch.OutOfMemoryError:
            out_of_memory = True
        except Exception:
            # DeepSpeed may be left in the middle of a step; what fitted before has been seen.
            if failed is None:
                raise
            break
        if out_of_memory:
            model.zero_grad(set_to_none=True)
            if config.fusion == "ffn":
                model.set_memory(None)
            if failed is not None or not fits:
                failed = rows if failed is None else min(failed, rows)
                break
            failed, rows = rows, fits + fits // 2
        elif failed is not None:
            break
        else:
            rows *= 2
    return {"rows": fits, "tokens": tokens, "failed_rows": failed, "peak_bytes": peak}


# --- the groups ---


def plain_steps(session: Session) -> None:
    """Steps of plain torch: 7B with each fusion, then 13B."""
    for size, fusion in (("7B", "ffn"), ("7B", "prefix"), ("7B", "none"), ("13B", "ffn")):
        for name, run in _plain_parts(session, size, fusion):
            session.part(name, run)
            del run  # it holds the model
        session.clean()


def _plain_parts(
    session: Session, size: str, fusion: str
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    built: dict[str, Any] = {}

    def run(tokens: int) -> dict[str, Any]:
        if not built:
            model = build(session, size, fusion)
            built["model"], built["parameters"] = model, count_parameters(model)
            built["step"] = plain_step(session, model)
        return measure_step(session, built["step"], built["model"].config, built["parameters"], tokens)

    for tokens in session.sizes.tokens:
        yield f"{size} {fusion}, plain torch", lambda tokens=tokens: run(tokens)


def zero_steps(name: str) -> Callable[[Session], None]:
    """Steps of the trainer's own engine under a shipped configuration, then its largest micro-batch."""

    def run(session: Session) -> None:
        linear = torch.nn.functional.linear
        built: dict[str, Any] = {}

        def start() -> None:
            if not built:
                built.update(start_engine(session, name))

        def steps(tokens: int) -> dict[str, Any]:
            start()
            found = measure_step(session, built["step"], built["config"], built["parameters"], tokens)
            batch = random_batch(session, built["config"], found["rows"], tokens)
            return found | {
                # Without what CUDA takes beside PyTorch's allocator.
                "planned_bytes": sum(step_bytes(built["config"], batch, built["ds_config"]).values())
            }

        def largest() -> dict[str, Any]:
            start()
            return largest_rows(session, built["step"], built["model"], built["config"])

        for tokens in session.sizes.tokens:
            session.part(f"7B ffn, {name}", lambda tokens=tokens: steps(tokens), needs_s=30)
        session.part(f"7B ffn, {name}", largest, needs_s=25)
        # ZeRO-3 puts its own in the place of torch's.
        torch.nn.functional.linear = linear

    return run


def start_engine(session: Session, name: str) -> dict[str, Any]:
    """The trainer's engine around random weights that lie on the device already."""
    import deepspeed

    init_process_group(session.world)
    session.use_one_thread()
    rows = session.sizes.rows
    config = RunConfig(
        run_dir="unused",
        model=ModelConfig(language_model="unused", vision_tower="unused"),
        data=DataConfig(train="unused"),
        train=TrainConfig(global_batch_size=rows, micro_batch_size=rows),
    )
    ds_config = read_deepspeed_json(str(REPOSITORY / f"ds_configs/{name}.json"), config, 1)
    ds_config["bf16"] = {"enabled": True}
    model = build(session, "7B", "ffn")
    parameters, model_config = count_parameters(model), model.config
    if name == "zero3":
        # As loading partitioned backbones does: puts DeepSpeed's linear in place.
        with deepspeed.zero.Init(config_dict_or_path=ds_config):
            pass
    engine_module.load_model = lambda *_, **__: model
    engine, model = engine_module.build_engine(config, model_config, ds_config, session.world)
    numbers = itertools.count()

    def step(batch: Batch) -> None:
        train_step(engine, [batch], session.world, DTYPE, seed=0, step=next(numbers))

    return {
        "step": step,
        "model": model,
        "config": model_config,
        "parameters": parameters,
        "ds_config": ds_config,
    }


def decoding_and_profile(session: Session) -> None:
    """Where a step's time goes, and decoding against the bare language model."""
    session.part("7B ffn, plain torch, profile", lambda: profile_step(session), needs_s=30)
    built: dict[str, Any] = {}

    def run(batch: int) -> dict[str, Any]:
        if not built:
            built["merged"] = build(session, "7B", "ffn", lora=False).eval()
            built["bare"] = without_pictures(built["merged"])
        return decode(session, built["merged"], built["bare"], batch)

    for batch in session.sizes.decode_batches:
        session.part("7B ffn merged, greedy", lambda batch=batch: run(batch), needs_s=30)


@torch.inference_mode()
def decode(
    session: Session, merged: DehvfForConditionalGeneration, bare: torch.nn.Module, batch: int
) -> dict[str, Any]:
    """Greedy decoding, prompt and picture included, in turn with the bare model."""
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
    runs = {
        "merged": lambda: merged.generate(ids, pixels, **given),
        "bare": lambda: bare.generate(ids, **given),  # pyright: ignore[reportCallIssue]
    }
    rounds = list(seconds_in_turn(runs, 1 if session.rehearsal else 3))
    seconds = {name: [found[name] for found in rounds] for name in runs}
    speed = {name: batch * new_tokens / statistics.median(values) for name, values in seconds.items()}
    return {
        "batch": batch,
        "new_tokens": new_tokens,
        "tokens_per_s": speed["merged"],
        "bare_tokens_per_s": speed["bare"],
        "ratio": speed["merged"] / speed["bare"],
        "seconds": seconds,
    }


def profile_step(session: Session) -> dict[str, Any]:
    """Two profiled steps: kernels, their kinds, and what the device and the host waited."""
    on_gpu = session.device.type == "cuda"
    model = build(session, "7B", "ffn")
    step = plain_step(session, model)
    batch = random_batch(session, model.config, session.sizes.rows, session.sizes.tokens[0])
    wall = statistics.median(timed(session, lambda: step(batch)))
    num_steps = 2
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(num_steps):
            step(batch)
        session.sync()
    events = profile.key_averages()
    sort_by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    (session.output / "profile.txt").write_text(events.table(sort_by=sort_by, row_limit=40))
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
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
    order = sorted(kinds, key=lambda kind: -kinds[kind])
    top = sorted(times, key=lambda item: -item[1])[:15]
    waiting = sum(e.self_cpu_time_total for e in events if e.key in WAITS) / 1e6 / num_steps
    return {
        "wall_s": wall,
        "busy_s": busy,
        "waiting_s": waiting,
        "kinds": [[kind, f"{100 * kinds[kind] / max(busy, 1e-9):.1f} %"] for kind in order],
        "kernels": [[key[:90], f"{1e3 * seconds:.2f}", calls] for key, seconds, calls in top],
    }


def kind_of(kernel: str) -> str:
    """What a kernel does, by its name."""
    name = kernel.lower()
    return next(
        (kind for kind, words in KINDS.items() if any(word in name for word in words)),
        "element-wise and norms",
    )


def largest_micro_batches(session: Session) -> None:
    """The most rows that fit beside 7B weights under plain torch."""
    for fusion in ("ffn", "prefix", "none"):

        def run(fusion: str = fusion) -> dict[str, Any]:
            model = build(session, "7B", fusion)
            return largest_rows(session, plain_step(session, model), model, model.config)

        session.part(f"7B {fusion}, plain torch", run, needs_s=20)


if __name__ == "__main__":
    main()
