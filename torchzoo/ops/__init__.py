"""Custom operators, one file an op: public function, reference, fake and autograd.

Importing the operators loads the kernel libraries that are there (see `torchzoo.ops.library`).
"""

from torchzoo.ops import library
from torchzoo.ops.crrelu import crrelu
from torchzoo.ops.delta_conv2d import delta_conv2d, delta_conv2d_step
from torchzoo.ops.delta_linear import delta_linear, delta_linear_step, delta_scan
from torchzoo.ops.grouped_ffn import grouped_ffn
from torchzoo.ops.grouped_mm import grouped_mm
from torchzoo.ops.hyrelu import hyrelu
from torchzoo.ops.knn import knn
from torchzoo.ops.sparse_ffn import FFNStats, pack_ffn, sparse_ffn
from torchzoo.ops.spgemm import (
    SpGEMMPlan,
    SpGEMMStats,
    spgemm,
    spgemm_batched,
    spgemm_plan,
    spgemm_stats,
)

__all__ = [
    "FFNStats",
    "SpGEMMPlan",
    "SpGEMMStats",
    "crrelu",
    "delta_conv2d",
    "delta_conv2d_step",
    "delta_linear",
    "delta_linear_step",
    "delta_scan",
    "grouped_ffn",
    "grouped_mm",
    "hyrelu",
    "knn",
    "pack_ffn",
    "sparse_ffn",
    "spgemm",
    "spgemm_batched",
    "spgemm_plan",
    "spgemm_stats",
]

library.load()
