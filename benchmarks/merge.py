"""Memory and time of merging a 13B-shaped model with random weights on a CPU.

python benchmarks/merge.py --directory SCRATCH [--layers 40]     # SCRATCH needs 55 GB at 40 layers
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from bench import LORA, flags
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModel, AutoModelForCausalLM, CLIPImageProcessorPil, PreTrainedTokenizerFast

from dehvf_ds.export.merge import TensorSpec, write_shards
from dehvf_ds.model import DehvfConfig, DehvfForConditionalGeneration
from dehvf_ds.model.adapter import save_adapter
from dehvf_ds.planning.plan import BACKBONES


def build(root: Path, num_layers: int) -> None:
    """Writes a random decoder of LLaMA-13B's shape in bf16, CLIP ViT-L/14's tower, an artifact over them."""
    llm, tower = root / "llm", root / "tower"
    text = type(BACKBONES["llama-13b"])(
        **BACKBONES["llama-13b"].to_dict() | {"num_hidden_layers": num_layers}
    )
    text.dtype = torch.bfloat16
    with torch.device("meta"):
        decoder = AutoModelForCausalLM.from_config(text)
    llm.mkdir(parents=True)
    text.save_pretrained(llm)

    def draw(like: torch.Tensor) -> torch.Tensor:
        return torch.empty(like.shape, dtype=like.dtype).normal_(std=0.02)

    named = [(name, parameter.detach().bfloat16()) for name, parameter in decoder.named_parameters()]
    write_shards(llm, [TensorSpec(name, like, partial(draw, like)) for name, like in named], "10GB")
    letters = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({token: number for number, token in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>").save_pretrained(llm)
    vision = AutoModel.from_config(BACKBONES["clip-vit-large-patch14"])
    vision.save_pretrained(tower)
    CLIPImageProcessorPil().save_pretrained(tower)
    config = DehvfConfig(text_config=text, vision_config=vision.config, rank=128, lora=LORA, task="caption")
    model = DehvfForConditionalGeneration(config, decoder, vision)
    tensors = {n: torch.randn(p.shape) * 0.02 for n, p in model.trainable_parameters().items()}
    bases = {"language_model": str(llm), "vision_tower": str(tower)}
    save_adapter(root / "adapter", tensors, model, **bases, dtype=torch.bfloat16)


def main() -> None:
    """Builds the model where it is not there, merges it in a process of its own, prints memory and time."""
    parser = flags(__doc__)
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


if __name__ == "__main__":
    main()
