"""Where a run is to go: GPUs, links, and what is assumed of them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from dehvf_ds.config.values import CHECKS, Positive, PositiveNumber
from dehvf_ds.training.metrics import PEAK_FLOPS
from dehvf_ds.training.planning.memory import GIB
from dehvf_ds.training.planning.times import Cluster

GB = 1e9
FULL = 0.92
"""Share of a GPU's memory that a plan may fill; fragments of the allocator take of the rest."""

LINK_SHARE = 0.8
"""Share of a link's nominal speed that large messages are assumed to reach."""

GpuName = Literal["H100-80G", "H200-141G", "A100-80G", "A100-40G", "B200-192G", "L40S-48G", "cpu"]

# Memory in GiB as CUDA tells it (rounded), GPU to GPU and host to GPU in GB/s and direction (data sheets).
GPUS: dict[str, tuple[float | None, float, float]] = {
    "H100-80G": (79, 450, 64),
    "H200-141G": (140, 450, 64),
    "A100-80G": (79, 300, 32),
    "A100-40G": (39, 300, 32),
    "B200-192G": (178, 900, 64),
    "L40S-48G": (44, 32, 32),
    "cpu": (None, 10, 10),
}
CPU_FLOPS = 1e11


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class PlanConfig:
    """Where the run is to go, and what is assumed of it."""

    gpus_per_node: Annotated[int, Field(ge=1, le=1024)] = 8
    """GPUs of a machine"""
    nodes: Annotated[int, Field(ge=1, le=2**16)] = 1
    """machines"""
    gpu: GpuName = "H100-80G"
    """kind of GPU"""
    mfu: Annotated[float, Field(gt=0, le=1)] = 0.5
    """assumed share of the GPU's peak that arithmetic reaches"""
    tokens: Positive | None = None
    """text tokens of a row, padding included; None takes data.max_tokens"""
    nvlink_gb_s: PositiveNumber | None = None
    """between GPUs of a node, GB/s a GPU and direction; None takes the GPU's"""
    internode_gb_s: PositiveNumber = 50.0
    """between nodes, GB/s a GPU and direction; 50 is 400 Gb/s"""
    host_gb_s: PositiveNumber | None = None
    """between GPU and host, GB/s a GPU and direction; None takes the GPU's"""
    overhead_gib: Annotated[float, Field(ge=0, le=10**4)] = 3.0
    """assumed memory of CUDA's context, NCCL's buffers and libraries' work space"""

    @property
    def memory_bytes(self) -> float | None:
        """Memory of one GPU; None for the CPU, which is not checked."""
        gibibytes = GPUS[self.gpu][0]
        return None if gibibytes is None else gibibytes * GIB

    @property
    def limit_bytes(self) -> float | None:
        """Memory of one GPU that a plan may fill."""
        return None if self.memory_bytes is None else FULL * self.memory_bytes

    @property
    def overhead_bytes(self) -> float:
        """Assumed overhead of a GPU; the CPU has none of it."""
        return 0.0 if self.memory_bytes is None else self.overhead_gib * GIB

    @property
    def cluster(self) -> Cluster:
        """The same as the formulas take it."""
        _, intra, host = GPUS[self.gpu]
        return Cluster(
            nodes=self.nodes,
            gpus_per_node=self.gpus_per_node,
            peak_flops=next((v for k, v in PEAK_FLOPS.items() if self.gpu.startswith(k)), CPU_FLOPS),
            mfu=self.mfu,
            intra_bytes_per_s=LINK_SHARE * (self.nvlink_gb_s or intra) * GB,
            inter_bytes_per_s=LINK_SHARE * self.internode_gb_s * GB,
            host_bytes_per_s=LINK_SHARE * (self.host_gb_s or host) * GB,
        )
