"""Decoding of a merged model against its bare language model: tokens a second, in turn, the same weights.

    python benchmarks/decode.py [--layers 4] [--batch 1]      # layers of LLaMA-13B's shape, random weights
    python benchmarks/decode.py --model MERGED_DIR             # an export of tools/merge_adapters.py
    python benchmarks/decode.py --model MERGED_DIR --captions demo_data/scenes/shards/test     # captions/s

Pictures are encoded before: what is timed is greedy decoding alone, prompt included. The random model has a
vocabulary of 1,000, so that nothing but the layers takes time. Prints tokens/s of each pair and their ratio.
--static decodes with transformers' static cache, which on a GPU compiles the step; --captions times what
eval.py does with its batches, from reading the pictures to the texts.
"""

from __future__ import annotations

import argparse

import torch
from bench import DTYPES, flags, median_and_range, print_profile, seconds_in_turn
from inside import caption_questions
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig

from dehvf_ds.evaluation.predict import in_batches
from dehvf_ds.model import DehvfConfig, DehvfForConditionalGeneration
from dehvf_ds.model.adapter import find_trained
from dehvf_ds.planning.plan import BACKBONES


def main() -> None:
    """Parses the flags, runs the pairs, prints the ratio merged / bare."""
    parser = flags(__doc__)
    parser.add_argument("--model", help="merged directory; without it random layers of LLaMA-13B's shape")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--static", action="store_true", help="static cache; compiled steps on a GPU")
    parser.add_argument("--captions", help="shards whose first pictures are captioned by --model")
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--profile", action="store_true", help="print where the merged model spends its time")
    args = parser.parse_args()
    if args.captions:
        captions_per_second(args)
        return
    dtype = DTYPES[args.dtype]
    if args.model:
        merged = AutoModelForImageTextToText.from_pretrained(args.model, dtype=dtype)
    else:
        text = BACKBONES["llama-13b"].to_dict() | {"num_hidden_layers": args.layers, "vocab_size": 1000}
        vision = BACKBONES["clip-vit-large-patch14"]
        merged = random_model(
            DehvfConfig(text_config=LlamaConfig(**text), vision_config=vision, rank=128), dtype
        )
    merged = merged.to(args.device).eval()
    bare, config = without_pictures(merged), merged.config
    ids = torch.randint(5, 900, (args.batch, args.prompt_tokens), device=args.device)
    shape = (args.batch, config.num_layers, config.num_slots, config.rank)
    memory = torch.randn(shape, device=args.device, dtype=dtype)
    given = {
        "attention_mask": torch.ones_like(ids),
        "min_new_tokens": args.new_tokens,
        "max_new_tokens": args.new_tokens,
        "do_sample": False,
        "pad_token_id": 0,
        "cache_implementation": "static" if args.static else None,
    }
    runs = {
        "bare": lambda: bare.generate(ids, **given),  # pyright: ignore[reportCallIssue]
        "merged": lambda: merged.generate(ids, visual_memory=memory, **given),
    }
    if args.profile:
        print_profile(runs["merged"])
    ratios = []
    for seconds in seconds_in_turn(runs, args.pairs):
        speed = {name: args.batch * args.new_tokens / value for name, value in seconds.items()}
        ratios.append(speed["merged"] / speed["bare"])
        told = "   ".join(f"{name} {value:.2f}" for name, value in speed.items())
        print(f"{told} tokens/s   {ratios[-1]:.3f}", flush=True)
    print(f"merged / bare: {median_and_range(ratios)}")


def captions_per_second(args: argparse.Namespace) -> None:
    """Captions a second of the evaluation's own code, for each number of rows a batch, in turn."""
    trained = find_trained(args.model)
    model = trained.load(args.dtype, device=args.device)
    questions = caption_questions(trained, args.captions)
    num_rows = min(args.pictures, questions.num_rows)

    def ask_all(rows: int) -> None:
        for group in in_batches(range(num_rows), rows):
            questions.ask(model, group)

    runs = {str(rows): lambda rows=rows: ask_all(rows) for rows in (1, 4, 16, 32) if rows <= num_rows}
    rounds = list(seconds_in_turn(runs, args.pairs))
    for name in runs:
        told = median_and_range([num_rows / seconds[name] for seconds in rounds])
        print(f"{name} rows a batch: {told} captions/s", flush=True)


def random_model(
    config: DehvfConfig, dtype: torch.dtype, device: torch.device | str = "cpu", *, tower: bool = True
) -> DehvfForConditionalGeneration:
    """Random weights of a configuration's shapes, made where they are to lie; with or without a tower."""
    with torch.device("meta"):
        model = DehvfForConditionalGeneration(config)
    if not tower:
        delattr(model, "vision_tower")
    model = model.to(dtype).to_empty(device=device)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            parameter.data.normal_(std=0.02)
        else:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
    # Buffers hold no value after to_empty.
    rotary = model.get_decoder().rotary_emb
    model.get_decoder().rotary_emb = type(rotary)(config.text_config).to(device)
    for name, buffer in model.named_buffers():
        assert name.endswith(("inv_freq", "position_ids")), name
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1], device=buffer.device))
    return model


def without_pictures(merged: DehvfForConditionalGeneration) -> torch.nn.Module:
    """The language model of a merged one as it was before, over the same tensors."""
    with torch.device("meta"):
        bare = AutoModelForCausalLM.from_config(merged.config.text_config)
    tensors = {
        name.replace(".mlp.ffn.", ".mlp."): tensor
        for name, tensor in merged.language_model.state_dict().items()
        if not name.rpartition(".")[2].startswith("scale_")
    }
    bare.load_state_dict(tensors, assign=True)
    bare.get_decoder().rotary_emb = merged.get_decoder().rotary_emb
    bare.tie_weights()
    return bare.eval()


if __name__ == "__main__":
    with torch.inference_mode():
        main()
