"""Memory and time of merging a 13B-shaped model with random weights on a CPU.

python benchmarks/merge.py --directory SCRATCH [--layers 40]     # SCRATCH needs 55 GB at 40 layers
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from dehvf_ds.export.merge import TensorSpec, write_shards
from dehvf_ds.model import DehvfConfig, DehvfForConditionalGeneration
from dehvf_ds.model.adapter import save_adapter

LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": ["down_proj"]}


def build(root: Path, num_layers: int) -> None:
    """Writes a random decoder of LLaMA-13B's shape in bf16, CLIP ViT-L/14's tower, an artifact over them."""
    text = LlamaConfig(
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=num_layers,
        num_attention_heads=40,
        vocab_size=32000,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        decoder = AutoModelForCausalLM.from_config(text)
    (root / "llm").mkdir(parents=True)
    text.save_pretrained(root / "llm")

    def draw(like: torch.Tensor) -> torch.Tensor:
        return torch.empty(like.shape, dtype=like.dtype).normal_(std=0.02)

    named = [(name, parameter.detach().bfloat16()) for name, parameter in decoder.named_parameters()]
    tensors = [TensorSpec(name, like, partial(draw, like)) for name, like in named]
    write_shards(root / "llm", tensors, "10GB")
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
    )
    tower = AutoModel.from_config(vision)
    tower.save_pretrained(root / "tower")
    CLIPImageProcessorPil().save_pretrained(root / "tower")
    save_byte_tokenizer(root / "llm")
    model = DehvfForConditionalGeneration(
        DehvfConfig(text_config=text, vision_config=vision, rank=128, lora=LORA, task="caption"),
        decoder,
        tower,
    )
    tensors = {n: torch.randn(p.shape) * 0.02 for n, p in model.trainable_parameters().items()}
    bases = {"language_model": str(root / "llm"), "vision_tower": str(root / "tower")}
    save_adapter(root / "adapter", tensors, model, **bases, dtype=torch.bfloat16)


def save_byte_tokenizer(directory: Path) -> None:
    """Writes a tokenizer of one token a byte, with an end of text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["</s>", *letters])}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>").save_pretrained(directory)


def main() -> int:
    """Builds the model where it is not there, merges it in a process of its own, prints memory and time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=40)
    args = parser.parse_args()
    if not (args.directory / "adapter").exists():
        build(args.directory, args.layers)
    command = [sys.executable, "-m", "dehvf_ds.export", "--checkpoint", str(args.directory / "adapter")]
    start = time.perf_counter()
    subprocess.run([*command, "--output", str(args.directory / "model"), "--force"], check=True)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    size = sum(path.stat().st_size for path in (args.directory / "model").glob("*.safetensors"))
    print(f"{size / 1e9:.1f} GB of weights: peak {peak / 1e9:.2f} GB of memory, {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
