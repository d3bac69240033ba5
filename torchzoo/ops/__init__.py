"""Custom operators, one file an op: public function, reference, fake and autograd.

Importing the operators loads the kernel libraries that are there (see `torchzoo.ops.library`).
"""

from torchzoo.ops import library
from torchzoo.ops.basis_functions import basis_functions
from torchzoo.ops.block_log_einsum_exp import block_sparse_log_einsum_exp
from torchzoo.ops.bounded_relu import bounded_relu
from torchzoo.ops.categorical_log_prob import categorical_log_prob
from torchzoo.ops.cauchy import cauchy
from torchzoo.ops.crrelu import crrelu
from torchzoo.ops.delta_conv2d import delta_conv2d, delta_conv2d_step
from torchzoo.ops.delta_linear import delta_linear, delta_linear_step, delta_scan
from torchzoo.ops.diagonal_step import diagonal_step
from torchzoo.ops.evonorm_batch import evonorm_batch
from torchzoo.ops.evonorm_sample import evonorm_sample
from torchzoo.ops.grouped_ffn import grouped_ffn
from torchzoo.ops.grouped_mm import grouped_mm
from torchzoo.ops.hyper_condition import hyper_condition
from torchzoo.ops.hyrelu import hyrelu
from torchzoo.ops.knn import knn
from torchzoo.ops.library import release_memory
from torchzoo.ops.log_einsum_exp import log_einsum_exp, log_einsum_exp2
from torchzoo.ops.log_max_sum import log_max_sum
from torchzoo.ops.lti_scan import lti_scan
from torchzoo.ops.mexican_hats import mexican_hats
from torchzoo.ops.ordered_matmul import ordered_matmul
from torchzoo.ops.pair_mixtures import pair_mixtures
from torchzoo.ops.plas_sort import PlasStats, plas_sort
from torchzoo.ops.project_gaussians import PackedProjection, Projected, project_gaussians
from torchzoo.ops.rans import (
    RansDecoder,
    RansEncoder,
    frequency_tables,
    rans_decode,
    rans_encode,
)
from torchzoo.ops.rasterize import RasterOutput, rasterize, sh_to_rgb
from torchzoo.ops.s3im_groups import s3im_groups
from torchzoo.ops.scaled_softmax import scaled_softmax
from torchzoo.ops.sparse_ffn import FFNStats, pack_ffn, sparse_ffn
from torchzoo.ops.spgemm import (
    SpGEMMPlan,
    SpGEMMStats,
    spgemm,
    spgemm_batched,
    spgemm_plan,
    spgemm_stats,
)
from torchzoo.ops.spherical_harmonics import spherical_harmonics
from torchzoo.ops.vandermonde import vandermonde

__all__ = [
    "FFNStats",
    "PackedProjection",
    "PlasStats",
    "Projected",
    "RansDecoder",
    "RansEncoder",
    "RasterOutput",
    "SpGEMMPlan",
    "SpGEMMStats",
    "basis_functions",
    "block_sparse_log_einsum_exp",
    "bounded_relu",
    "categorical_log_prob",
    "cauchy",
    "crrelu",
    "delta_conv2d",
    "delta_conv2d_step",
    "delta_linear",
    "delta_linear_step",
    "delta_scan",
    "diagonal_step",
    "evonorm_batch",
    "evonorm_sample",
    "frequency_tables",
    "grouped_ffn",
    "grouped_mm",
    "hyper_condition",
    "hyrelu",
    "knn",
    "log_einsum_exp",
    "log_einsum_exp2",
    "log_max_sum",
    "lti_scan",
    "mexican_hats",
    "ordered_matmul",
    "pack_ffn",
    "pair_mixtures",
    "plas_sort",
    "project_gaussians",
    "rans_decode",
    "rans_encode",
    "rasterize",
    "release_memory",
    "s3im_groups",
    "scaled_softmax",
    "sh_to_rgb",
    "sparse_ffn",
    "spgemm",
    "spgemm_batched",
    "spgemm_plan",
    "spgemm_stats",
    "spherical_harmonics",
    "vandermonde",
]

library.load()
