"""`hyrelu` against its published formula and against ReLU, eager and compiled.

As the benchmark of `crrelu`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchzoo.benchmark import Bench
from torchzoo.experiments.ops.crrelu import cases
from torchzoo.ops import hyrelu


def formula(x: Tensor, bound: Tensor) -> Tensor:
    """HyReLU as the paper writes it."""
    return torch.relu(x - x * torch.sigmoid(20 * (x - bound)))


BENCH = Bench("hyrelu", cases(hyrelu, formula, 1.3, 24.0))
