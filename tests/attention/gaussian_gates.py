"""Gates with random or chosen parameters, and their weights in plain loops."""

import pytest
import torch

from torchzoo.attention import MultiHeadGaussianAdaptiveAttention

SHEET = 48
DIM = 5


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def random_module(cls=MultiHeadGaussianAdaptiveAttention, dim=DIM, spread=0.5, **kwargs):
    """A double-precision module with parameters away from their start."""
    module = cls(dim, **{"dtype": torch.float64, **kwargs})
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += spread * torch.randn_like(parameter)
    return module


def reference(module, x, mask=None):
    """The weights of one unbatched x (n, D) in plain loops over heads, Gaussians and features."""
    if module.norm_dim == -1:
        weights = reference_chunks(module, x.T)
        return weights.T if mask is None else weights.T * mask[:, None]
    if mask is None:
        return reference_chunks(module, x)
    assert module.num_heads == 1
    weights = torch.zeros_like(x)
    if mask.any():
        weights[mask] = reference_chunks(module, x[mask])
    return weights


def reference_chunks(module, x):
    n, heads = len(x), module.num_heads
    starts = [h * (n // heads) for h in range(heads)] + [n]
    weights = torch.zeros_like(x)
    for h in range(heads):
        for d in range(x.shape[1]):
            column = x[starts[h] : starts[h + 1], d]
            var = column.var(unbiased=module.unbiased) if len(column) > 1 else 0 * column[0]
            total = torch.zeros_like(column) if module.mixing == "sum" else torch.ones_like(column)
            for i in range(module.num_gaussians):
                at = d if module.delta.shape[2] > 1 else 0
                xi = module.log_xi[h, i, at].exp()
                z = (column - column.mean() - module.delta[h, i, at]) / (var + module.eps).sqrt()
                gauss = torch.exp(-(z**2) / (2 * xi))
                if module.mixing == "product":
                    total = total * gauss
                elif module.num_gaussians > 1:
                    total = total + torch.softmax(module.omega[h], 0)[i] * gauss
                else:
                    total = gauss
            if module.normalize:
                total = total / total.sum() * (len(column) if module.rescale else 1)
            weights[starts[h] : starts[h + 1], d] = total
    return weights.detach()


def set_parameters(module, delta, xi):
    with torch.no_grad():
        module.delta.copy_(torch.as_tensor(delta).expand_as(module.delta))
        module.log_xi.copy_(torch.as_tensor(xi, dtype=torch.float64).log().expand_as(module.log_xi))
    return module
