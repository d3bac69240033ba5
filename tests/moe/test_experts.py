"""Grouped experts against one pair of linear layers an expert."""

import pytest
import torch
import torch.nn.functional as F

from torchzoo.moe import GroupedExperts

SIZES = [2, 0, 3]


def by_expert(experts, x, sizes):
    """Slices of x through `F.linear` with each expert's own matrices."""
    outputs = []
    for e, rows in enumerate(x[: sum(sizes)].split(sizes)):
        b_in = None if experts.b_in is None else experts.b_in[e]
        b_out = None if experts.b_out is None else experts.b_out[e]
        hidden = F.linear(rows, experts.w_in[e].T, b_in)
        if experts.activation == "swiglu":
            gate, up = hidden[:, : experts.hidden_dim], hidden[:, experts.hidden_dim :]
            hidden = gate * torch.sigmoid(gate) * up
        else:
            hidden = getattr(F, experts.activation)(hidden)
        outputs.append(F.linear(hidden, experts.w_out[e].T, b_out))
    padding = x.new_zeros(x.shape[0] - sum(sizes), experts.dim)
    return torch.cat([*outputs, padding])


@pytest.mark.claim(69, "Grouped experts equal one feed-forward network an expert", tolerance=1e-12)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu"])
@pytest.mark.parametrize("sizes", [SIZES, [0, 0, 0], [5, 0, 0]])
def test_equals_loop(activation, bias, sizes):
    torch.manual_seed(0)
    experts = GroupedExperts(4, 6, 3, activation=activation, bias=bias, dtype=torch.float64)
    x = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    inputs = [x, *experts.parameters()]
    offs = torch.tensor(sizes).cumsum(0).to(torch.int32)
    ours, oracle = experts(x, offs), by_expert(experts, x, sizes)
    torch.testing.assert_close(ours, oracle, rtol=0, atol=1e-12)
    upstream = torch.randn_like(ours)
    ours_grad = torch.autograd.grad((ours * upstream).sum(), inputs)
    oracle_grad = torch.autograd.grad((oracle * upstream).sum(), inputs, materialize_grads=True)
    for a, b in zip(ours_grad, oracle_grad, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.claim(69, "An expert without tokens may hold NaN without harm")
@pytest.mark.parametrize("empty", [0, 1, 2])
def test_nan_in_an_idle_expert(empty):
    experts = GroupedExperts(4, 6, 3, bias=True)
    sizes = [2, 2, 2]
    sizes[empty] = 0
    offs = torch.tensor(sizes).cumsum(0)
    x = torch.randn(6, 4)
    clean = experts(x, offs)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter[empty] = torch.nan
    y = experts(x, offs)
    assert torch.equal(y, clean)
    y.sum().backward()
    for parameter in experts.parameters():
        assert parameter.grad.isfinite().all()
        assert (parameter.grad[empty] == 0).all()


@pytest.mark.parametrize(("activation", "factor"), [("swiglu", 2), ("gelu", 1)])
def test_starts_like_linear(activation, factor):
    """Fan-in is that of an expert's own matrix; of the 3-D tensor it would be E times as large."""
    torch.manual_seed(0)
    experts = GroupedExperts(64, 256, 5, activation=activation, bias=True)
    assert experts.w_in.shape == (5, 64, 256 * factor)
    assert experts.w_out.shape == (5, 256, 64)
    layers = ((experts.w_in, experts.b_in, 64), (experts.w_out, experts.b_out, 256))
    for weight, bias, fan_in in layers:
        one = torch.nn.Linear(fan_in, weight.shape[2])
        for ours, theirs in ((weight, one.weight), (bias, one.bias)):
            assert ours.abs().max() <= fan_in**-0.5
            assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.1)


def test_from_mixtral():
    torch.manual_seed(0)
    weights = {
        f"model.layers.3.block_sparse_moe.experts.{e}.{name}.weight": torch.randn(*shape)
        for e in range(3)
        for name, shape in (("w1", (6, 4)), ("w2", (4, 6)), ("w3", (6, 4)))
    }
    weights["model.layers.3.block_sparse_moe.gate.weight"] = torch.randn(3, 4)
    experts = GroupedExperts.from_mixtral(weights)
    x = torch.randn(6, 4)
    expected = []
    for e in range(3):
        w1, w2, w3 = (
            weights[f"model.layers.3.block_sparse_moe.experts.{e}.w{i}.weight"] for i in (1, 2, 3)
        )
        rows = x[2 * e : 2 * e + 2]
        expected.append((F.silu(rows @ w1.T) * (rows @ w3.T)) @ w2.T)
    torch.testing.assert_close(experts(x, torch.tensor([2, 4, 6])), torch.cat(expected))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["gate.weight"], "got none"),
        (["experts.0.w1.weight", "experts.0.w2.weight"], "expected w1, w2 and w3 of experts"),
        ([f"experts.1.w{i}.weight" for i in (1, 2, 3)], "expected w1, w2 and w3 of experts 0"),
        (["1.experts.0.w1.weight", "2.experts.0.w1.weight"], "expected the experts of one block"),
    ],
)
def test_from_mixtral_refuses(names, message):
    with pytest.raises(ValueError, match=message):
        GroupedExperts.from_mixtral({name: torch.zeros(2, 2) for name in names})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GroupedExperts(0, 4, 2), "dim: expected an integer at least 1, got 0"),
        (lambda: GroupedExperts(4, 0, 2), "hidden_dim: expected"),
        (lambda: GroupedExperts(4, 4, 0), "num_experts: expected"),
        (lambda: GroupedExperts(4, 4, 2, activation="swish"), "activation: expected one of swiglu"),
        (
            lambda: GroupedExperts(4, 4, 2)(torch.ones(3, 5), torch.tensor([1, 2])),
            r"x: expected \(N, 4\), got \(3, 5\)",
        ),
        (
            lambda: GroupedExperts(4, 4, 2)(torch.ones(3, 4), torch.tensor([1, 2, 3])),
            r"offsets: expected int32 or int64 of shape \(2,\)",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
