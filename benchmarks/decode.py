"""Decoding of a merged model against its bare language model: tokens a second, in turn, the same weights.

    python benchmarks/decode.py [--layers 4] [--batch 1]      # layers of LLaMA-13B's shape, random weights
    python benchmarks/decode.py --model MERGED_DIR             # an export of tools/merge_adapters.py

Pictures are encoded before: what is timed is greedy decoding alone, prompt included. The random model has a
vocabulary of 1,000, so that nothing but the layers takes time. Prints tokens/s of each pair and their ratio.
"""

from __future__ import annotations

import argparse

import torch
from timing import median_and_range, seconds_in_turn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig

from dehvf_ds.model import DehvfConfig, DehvfForConditionalGeneration

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    """Parses the flags, runs the pairs, prints the ratio merged / bare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="merged directory; without it random layers of LLaMA-13B's shape")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--profile", action="store_true", help="print where the merged model spends its time")
    args = parser.parse_args()

    dtype = DTYPES[args.dtype]
    merged = load_merged(args.model, dtype) if args.model else build_13b_layers(args.layers, dtype)
    merged = merged.to(args.device).eval()
    bare = without_pictures(merged)
    ids = torch.randint(5, 900, (args.batch, args.prompt_tokens), device=args.device)
    config = merged.config
    shape = (args.batch, config.num_layers, config.num_slots, config.rank)
    memory = torch.randn(shape, device=args.device, dtype=dtype)
    given = {
        "attention_mask": torch.ones_like(ids),
        "min_new_tokens": args.new_tokens,
        "max_new_tokens": args.new_tokens,
        "do_sample": False,
        "pad_token_id": 0,
    }

    @torch.inference_mode()
    def run_merged() -> None:
        merged.generate(ids, visual_memory=memory, **given)

    @torch.inference_mode()
    def run_bare() -> None:
        bare.generate(ids, **given)

    if args.profile:
        run_merged()
        with torch.profiler.profile() as profile:
            run_merged()
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))
    num_tokens = args.batch * args.new_tokens
    ratios = []
    for seconds in seconds_in_turn({"bare": run_bare, "merged": run_merged}, args.pairs):
        speed = {name: num_tokens / value for name, value in seconds.items()}
        ratios.append(speed["merged"] / speed["bare"])
        print(
            f"merged {speed['merged']:.2f}   bare {speed['bare']:.2f} tokens/s   {ratios[-1]:.3f}", flush=True
        )
    print(f"merged / bare: {median_and_range(ratios)}")


def build_13b_layers(num_layers: int, dtype: torch.dtype) -> DehvfForConditionalGeneration:
    """Random layers of LLaMA-13B's shape with the visual branch of a CLIP ViT-L/14, adapters folded."""
    text = LlamaConfig(
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=num_layers,
        num_attention_heads=40,
        vocab_size=1000,
    )
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
    )
    config = DehvfConfig(text_config=text, vision_config=vision, rank=128)
    with torch.device("meta"):
        model = DehvfForConditionalGeneration(config)
    model = model.to(dtype).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    # Buffers hold no value after to_empty; those of the rotary positions count.
    fresh = AutoModelForCausalLM.from_config(LlamaConfig(**(text.to_dict() | {"num_hidden_layers": 0})))
    model.get_decoder().rotary_emb = fresh.model.rotary_emb
    return model


def load_merged(directory: str, dtype: torch.dtype) -> DehvfForConditionalGeneration:
    """An export of tools/merge_adapters.py."""
    return AutoModelForImageTextToText.from_pretrained(directory, dtype=dtype)


def without_pictures(merged: DehvfForConditionalGeneration) -> torch.nn.Module:
    """The language model of a merged one as it was before, over the same tensors."""
    with torch.device("meta"):
        bare = AutoModelForCausalLM.from_config(merged.config.text_config)
    tensors = {
        name.replace(".mlp.ffn.", ".mlp."): tensor
        for name, tensor in merged.language_model.state_dict().items()
        if not name.rpartition(".")[2].startswith("gain_")
    }
    bare.load_state_dict(tensors, assign=True)
    bare.get_decoder().rotary_emb = merged.get_decoder().rotary_emb
    bare.tie_weights()
    return bare.eval()


if __name__ == "__main__":
    main()
