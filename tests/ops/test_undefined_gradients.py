"""Operators whose results get no gradient pass none on."""

import pytest
import torch

from torchzoo.ops import grouped_ffn, log_max_sum, spgemm


class Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def experts(x):
    offsets, src = torch.tensor([2, 3], dtype=torch.int32), torch.tensor([0, 1, 1])
    return grouped_ffn(x, torch.ones(2, 3, 4), torch.ones(2, 2, 3), offsets, src, torch.ones(3))


def maximum(x):
    return log_max_sum(x[None], torch.ones(1, 2, 3))[0]


def product(x):
    crow, col = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2])
    sparse = torch.sparse_csr_tensor(crow, col, x.diagonal(), (3, 3), check_invariants=True)
    return spgemm(sparse, sparse).values()


@pytest.mark.parametrize("op", [experts, maximum, product])
def test_no_gradient_is_passed_on(op):
    x = torch.randn(3, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(Dropped.apply(op(x)).sum() + x.sum(), x)
    torch.testing.assert_close(grad, torch.ones(3, 3))
