"""DEHVF beside what else a user would take: one run, the same frozen weights, pictures, texts and labels.

    git clone https://github.com/JieShibo/MemVP; git clone https://github.com/Hao840/ADEM-VL
    python benchmarks/peers.py --memvp MemVP --adem ADEM-VL [--shape smollm2 13b]
    python benchmarks/peers.py --shape 13b --profile "LLaVA, PEFT, Trainer"

`ffn` and `prefix` are this trainer's; LLaVA is transformers' with PEFT's LoRA under transformers.Trainer;
MemVP and ADEM-VL are their authors' model code, left out by name without a checkout. Steps and answers are
timed in turn in one process, memory is measured in a process for each variant. fp32 on the CPU.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from bench import (
    LORA,
    MIB,
    flags,
    median_and_range,
    print_profile,
    random_batch,
    resident_bytes,
    saved_bytes,
    seconds_in_turn,
)
from decode import random_model
from memory import RETURNED
from peer_models import PROMPT_TOKENS, Llava, Ours, Published, Shape, Variant
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    PreTrainedModel,
)

from dehvf_ds.batch import Batch
from dehvf_ds.distributed import init_process_group, read_world
from dehvf_ds.model import DehvfConfig
from dehvf_ds.planning.plan import BACKBONES

SHAPES = ("smollm2", "13b", "tiny")

TRAINED = ("adapter", "lora_", "projector", "fuser", "reader", "scale_")

NOTES = """
Random captions of 0.6 T to T tokens ({padding:.0%} padding), {prompt} of each a prompt without labels;
pictures of noise. AdamW, gradients clipped, no recomputation. A time is a variant's over that of `ffn`,
run in turn: median and range of {rounds} rounds. Tokens are those of the texts, without padding and
pictures. `saved` is what a forward keeps for backward beside weights; `peak` a step's highest resident
memory above the built model, in a process of its own: gradients, optimizer state, activations; `fits` the
rows at which a straight line through the peaks of {fit} rows meets {budget:g} GiB. First token: from
picture and prompt of one row. Decoding: the {after} tokens after it. LoRA is folded before.

Not equal:
- `ffn` and `prefix` run on DeepSpeed's ZeRO-2 with one rank, LLaVA in the Trainer, the rest in a bare
  loop.
- `ffn` reads {levels} feature layers, the others one. `prefix` and LLaVA train a two-layer projector, d
  wide.
- LLaVA computes logits everywhere, at its {patches} visual tokens too; MemVP and ADEM-VL at all of the
  text.
- MemVP and ADEM-VL: Llama in code of their own, attention without sdpa, keys for each head (SmolLM2's
  heads share them); a CLIP of the tower's shape with random weights, whose last block is skipped (of
  part of a tower one that is added) and in which adapters train, so that backward passes it; 320 slots
  of width d (MemVP at 13B: 400). ADEM-VL reads a class token and the 3 tokens of "Image: " more a row.
  `.half()` and `autocast` do nothing.
"""


def build_shape(args: argparse.Namespace, name: str) -> Shape:
    """The demo's backbones; or some of LLaMA-13B's 40 layers, random, and its vocabulary's same share."""
    side = 16 if name == "tiny" else 224
    if name == "smollm2":
        language = AutoModelForCausalLM.from_pretrained(args.language_model, dtype=torch.float32)
        tower = AutoModel.from_pretrained(args.vision_tower, dtype=torch.float32)
    else:
        text = {
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
        vision = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 1, "patch_size": 1}
        if name == "13b":
            text, vision = (BACKBONES[n].to_dict() for n in ("llama-13b", "clip-vit-large-patch14"))
        text |= {"num_hidden_layers": args.layers, "vocab_size": 32000 * args.layers // 40}
        vision |= {"num_hidden_layers": args.tower_blocks, "image_size": side}
        configs = {"text_config": LlamaConfig(**text), "vision_config": CLIPVisionConfig(**vision)}
        model = random_model(DehvfConfig(**configs, fusion="prefix"), torch.float32)
        language, tower = model.language_model, model.vision_tower
    # Copies: a configuration takes the choice of attention away from those put into it.
    text_config, vision_config = copy.deepcopy((language.config, tower.config))
    config = DehvfConfig(text_config=text_config, vision_config=vision_config, image_size=side, lora=LORA)
    batch = captions(args.rows, args.tokens, side)
    frozen = {"language": language.requires_grad_(False), "tower": tower.requires_grad_(False)}
    return Shape(**frozen, config=config, batch=batch, is_part=name != "smollm2")


def captions(rows: int, tokens: int, side: int) -> Batch:
    """Captions of 0.6 T to T tokens, prompt included."""
    lengths = torch.linspace(tokens, 0.6 * tokens, rows).int().tolist()
    given = {"prompt_tokens": PROMPT_TOKENS, "vocab": 500, "image_size": side}
    return random_batch(rows, tokens, lengths=lengths, **given)


def builders(args: argparse.Namespace) -> dict[str, Callable[[Shape], Variant]]:
    """The variants that can run here; `ffn` first, against which the others are set."""
    found: dict[str, Callable[[Shape], Variant]] = {
        "ffn": partial(Ours, fusion="ffn"),
        "prefix": partial(Ours, fusion="prefix"),
        "LLaVA, PEFT, Trainer": Llava,
    }
    for name, package, checkout in (("MemVP", "memvp", args.memvp), ("ADEM-VL", "adem", args.adem)):
        if checkout is not None:
            found[name] = partial(Published, package=package, checkout=checkout.resolve())
    return {name: build for name, build in found.items() if name in ("ffn", *(args.variants or found))}


def check_equal_work(variants: Mapping[str, Variant], shape: Shape) -> None:
    """Adapters alone train, attention is the same, and all start from the same language model.

    `ffn` computes it at the start, and so does MemVP's code without pictures; LLaVA computes what `prefix`
    does with the same projector over normed features.
    """
    for name, variant in variants.items():
        wrong = [p for p in variant.trainable() if not any(word in p for word in TRAINED)]
        assert not wrong, f"{name} trains {wrong[0]}"
        models = [m for m in variant.model.modules() if isinstance(m, PreTrainedModel)]
        assert all(m.config._attn_implementation == "sdpa" for m in models), name
    inputs = {name: getattr(shape.batch, name) for name in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        bare = shape.language(**inputs).loss
        torch.testing.assert_close(variants["ffn"].loss(), bare, rtol=1e-5, atol=0)
        if isinstance(memvp := variants.get("MemVP"), Published):
            memvp.model.eval()
            torch.testing.assert_close(memvp.loss(pictures=0), bare, rtol=1e-5, atol=0)
            memvp.model.train()
        if isinstance(llava := variants.get("LLaVA, PEFT, Trainer"), Llava) and "prefix" in variants:
            prefix: Any = variants["prefix"]
            same = llava.loss_with(prefix.model.prefix_projector)
            torch.testing.assert_close(same, prefix.loss(), rtol=1e-5, atol=0)


def in_turn(runs: Mapping[Any, Callable[[], object]], rounds: int) -> dict[Any, list[float]]:
    """Each run's seconds in every round."""
    found = list(seconds_in_turn(runs, rounds))
    return {name: [seconds[name] for seconds in found] for name in runs}


def against_ours(seconds: Mapping[str, list[float]], name: str) -> str:
    """A variant's seconds over those of `ffn` in the same round."""
    if name == "ffn":
        return "1"
    pairs = zip(seconds[name], seconds["ffn"], strict=True)
    return median_and_range([theirs / ours for theirs, ours in pairs]).removeprefix("median ")


def memory_here(args: argparse.Namespace) -> dict[str, float]:
    """Saved bytes, peak of a step above the built model, and rows that fit; of one variant."""
    shape, rows = build_shape(args, args.shape[0]), args.rows
    variant = builders(args)[args.case](shape)
    # DeepSpeed and the Trainer import hundreds of modules only when they start.
    for small in (Ours(tiny := build_shape(args, "tiny"), "ffn"), Llava(tiny)):
        small.start()
        small.train_step()
    variant.loss()  # weights that are mapped from their files are read
    gc.collect()
    before, peaks = resident_bytes("VmRSS"), {}
    variant.start()
    for number in (rows // 4, rows // 2, rows):
        variant.batch = captions(number, args.tokens, shape.config.image_size)
        for _ in range(2):  # the Trainer still holds two batches of before
            variant.train_step()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        variant.train_step()
        peaks[number] = resident_bytes("VmHWM") - before
    saved = saved_bytes(variant.loss, variant.model.parameters())
    slope, fixed = statistics.linear_regression(list(peaks), list(peaks.values()))
    return {"saved": saved, "peak": peaks[rows], "fits": (args.budget_gib * 1024 * MIB - fixed) // slope}


def memory_of(name: str, shape: str) -> dict[str, float]:
    """``memory_here`` in a process whose allocator gives memory back."""
    command = [sys.executable, __file__, *sys.argv[1:], "--shape", shape, "--case", name]
    done = subprocess.run(command, env=os.environ | RETURNED, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(args: argparse.Namespace, name: str) -> None:
    """Prints the tables of a shape."""
    memory = {variant: memory_of(variant, name) for variant in builders(args)}
    shape = build_shape(args, name)
    batch, config, rows = shape.batch, shape.config, args.rows
    text, vision = config.text_config, config.vision_config
    variants = {variant: build(shape) for variant, build in builders(args).items()}
    check_equal_work(variants, shape)
    trained = {key: sum(p.numel() for p in v.trainable().values()) for key, v in variants.items()}
    for variant in variants.values():
        variant.start()
    steps = in_turn({key: variant.train_step for key, variant in variants.items()}, args.rounds)
    for variant in variants.values():
        variant.end()
    # Both in one round, so that their difference meets the same machine.
    answers = {(key, n): partial(v.generate, n) for key, v in variants.items() for n in (1, args.new_tokens)}
    seconds = in_turn(answers, args.rounds)
    first = {key: seconds[key, 1] for key in variants}
    after = {
        key: [whole - one for whole, one in zip(seconds[key, args.new_tokens], first[key], strict=True)]
        for key in variants
    }
    once = {key: statistics.median(first[key]) for key in variants}

    print(f"\n### {name}\n\n{text.num_hidden_layers} layers of width {text.hidden_size}, vocabulary "
          f"{text.vocab_size}; tower of {vision.num_hidden_layers} blocks of width {vision.hidden_size}; "
          f"{rows} rows, T = {args.tokens}\n\n"
          "| variant | trains | samples/s | tokens/s | step time | saved MiB | peak MiB | fits "
          "| first token s | its time | decoding tokens/s | its time |\n" + "|---" * 12 + "|")  # fmt: skip
    for key in variants:
        step, found = statistics.median(steps[key]), memory[key]
        sizes = [f"{found[of] / MIB:.0f} (x {found[of] / memory['ffn'][of]:.2f})" for of in ("saved", "peak")]
        speed = (args.new_tokens - 1) / statistics.median(after[key])
        cells = [key, f"{trained[key] / 1e6:.1f} M", f"{rows / step:.2f}"]
        cells += [f"{batch.num_input_tokens() / step:.1f}", against_ours(steps, key), *sizes]
        cells += [f"{found['fits']:.0f}", f"{once[key]:.3f}", against_ours(first, key)]
        cells += [f"{speed:.2f}", against_ours(after, key)]
        print("| " + " | ".join(cells) + " |")
    missing = [key for key in ("MemVP", "ADEM-VL") if key not in variants]
    print("".join(f"\n{key}: left out, no checkout was named" for key in missing))
    print(
        NOTES.format(
            padding=1 - batch.num_input_tokens() / batch.input_ids.numel(),
            prompt=PROMPT_TOKENS,
            rounds=args.rounds,
            fit=f"{rows // 4}, {rows // 2} and {rows}",
            budget=args.budget_gib,
            after=args.new_tokens - 1,
            levels=len(config.feature_layers),
            patches=config.patches_per_side**2,
        ),
        flush=True,
    )


def profile(args: argparse.Namespace, name: str) -> None:
    """Prints where a variant's step and answer take their time."""
    variant = builders(args)[args.profile](build_shape(args, name))
    variant.start()
    print_profile(variant.train_step)
    variant.end()
    print_profile(lambda: variant.generate(args.new_tokens))


def main() -> None:
    """Parses the flags; measures each shape."""
    parser = flags(__doc__, backbones=True)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["smollm2", "13b"])
    parser.add_argument("--variants", nargs="+", help="these beside ffn; default: all that can run")
    parser.add_argument("--memvp", type=Path, help="checkout of github.com/JieShibo/MemVP")
    parser.add_argument("--adem", type=Path, help="checkout of github.com/Hao840/ADEM-VL")
    parser.add_argument("--rows", type=int, default=4, help="of a step; a multiple of 4")
    parser.add_argument("--tokens", type=int, default=24, help="T, of the longest row")
    parser.add_argument("--new-tokens", type=int, default=17)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=3, help="of LLaMA-13B's 40")
    parser.add_argument("--tower-blocks", type=int, default=2, help="of CLIP-L's 24, the same share")
    parser.add_argument("--budget-gib", type=float, default=8.0, help="memory beside the built model")
    parser.add_argument("--profile", metavar="VARIANT", help="only print where its time goes")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    init_process_group(read_world())
    if args.case:
        print(json.dumps(memory_here(args)), flush=True)
        os._exit(0)  # the Trainer's thread waits for a step that never comes
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, transformers "
          f"{transformers.__version__}, deepspeed {version('deepspeed')}")  # fmt: skip
    for name in args.shape:
        (profile if args.profile else measure)(args, name)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
