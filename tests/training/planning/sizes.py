"""Full-sized models and a cluster to plan for."""

from __future__ import annotations

import torch
from tiny_models import LORA
from transformers import CLIPVisionConfig, LlamaConfig

from dehvf_ds.model import DehvfConfig, DehvfForConditionalGeneration
from dehvf_ds.training.planning.estimate import Estimate, estimate
from dehvf_ds.training.planning.shapes import Shapes, Work, count_shapes
from dehvf_ds.training.planning.times import Cluster
from dehvf_ds.training.planning.zero import Strategy, Zero

CLUSTER = Cluster(
    nodes=1,
    gpus_per_node=8,
    peak_flops=1e15,
    mfu=0.5,
    intra_bytes_per_s=400e9,
    inter_bytes_per_s=50e9,
    host_bytes_per_s=50e9,
)
ZERO = Zero(reduce_bucket=20_000_000, persistence_threshold=1_000_000)


def full_shapes(size: str) -> Shapes:
    text = {
        "7B": LlamaConfig(),
        "13B": LlamaConfig(
            hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
        ),
    }[size]
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
    )
    lora = LORA | {"rank": {"7B": 8, "13B": 4}[size]}
    config = DehvfConfig(text_config=text, vision_config=vision, rank=128, lora=lora)
    with torch.device("meta"):
        return count_shapes(DehvfForConditionalGeneration(config), ZERO.persistence_threshold)


def plan(shapes: Shapes, work: Work, cluster: Cluster = CLUSTER, strategy: Strategy = "ZeRO-3") -> Estimate:
    return estimate(shapes, work, ZERO, strategy, cluster, accumulation=1, overhead_bytes=0.0)
