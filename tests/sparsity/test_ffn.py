"""`SparseFFN` against the dense formula, its stale copies, and other libraries' layers."""

import copy
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchzoo.ops.library import backend
from torchzoo.sparsity import SparseFFN, mlp_parts

ACTS = {
    "relu": F.relu,
    "fatrelu": F.relu,
    "relu2": lambda z: F.relu(z) ** 2,
    "silu": F.silu,
}


def dense(layer, x, threshold=0.0):
    """The layer from its definition, in the dtype of its weights."""
    act = ACTS[layer.activation]
    up = F.linear(x, layer.up_proj.weight, layer.up_proj.bias)
    if layer.gated:
        a = act(F.linear(x, layer.gate_proj.weight, layer.gate_proj.bias))
        h = a * up
    else:
        a = h = act(up)
    compared = h if layer.threshold_on == "product" else a
    h = torch.where(compared.abs() > threshold, h, 0.0)
    return F.linear(h, layer.down_proj.weight, layer.down_proj.bias)


def with_sparsity(layer, x, share):
    """Shift the first bias so that this share of the pre-activations is negative."""
    first = layer.gate_proj if layer.gated else layer.up_proj
    with torch.no_grad():
        z = F.linear(x, first.weight).flatten().sort().values
        n = len(z)
        cut = round(share * n)
        limit = z[0] - 1 if cut == 0 else z[-1] + 1 if cut == n else (z[cut - 1] + z[cut]) / 2
        first.bias.fill_(-limit)
    return layer


def grads(layer, y, x):
    weights = [p for p in layer.parameters() if p.ndim == 2]
    return torch.autograd.grad(
        (y * torch.arange(y.numel()).view(y.shape).sin()).sum(), [x, *weights]
    )


@pytest.mark.claim(
    122,
    "The sparse path equals the dense formula, values and gradients, for batches and sparsities",
    tolerance=1e-5,
)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("tokens", [1, 2, 7, 33])
def test_sparse_path_equals_the_dense_formula(gated, share, tokens):
    torch.manual_seed(tokens)
    layer = SparseFFN(24, 40, gated=gated, bias=True, policy="sparse")
    x = torch.randn(tokens, 24, requires_grad=True)
    with_sparsity(layer, x.detach(), share)
    y = layer(x)
    expected = dense(copy.deepcopy(layer).double(), x.double())
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
    for got, want in zip(grads(layer, y, x), grads(layer, dense(layer, x), x), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    if share == 1.0:
        assert torch.equal(y, layer.down_proj.bias.expand_as(y))
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), y)  # the copy for inference


@pytest.mark.claim(122, "In bfloat16 the sparse path stays close to the dense one", tolerance=2e-2)
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_bfloat16(share):
    torch.manual_seed(0)
    layer = SparseFFN(24, 40, bias=True, policy="sparse")
    x = torch.randn(7, 24)
    with_sparsity(layer, x, share)
    layer = layer.bfloat16()
    expected = dense(copy.deepcopy(layer).double(), x.bfloat16().double())
    torch.testing.assert_close(layer(x.bfloat16()).double(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("policy", ["auto", "sparse", "dense"])
@pytest.mark.parametrize("on", ["act", "product"])
@pytest.mark.parametrize("activation", ["relu", "fatrelu", "relu2", "silu"])
def test_thresholds_of_every_policy(policy, on, activation):
    torch.manual_seed(1)
    thresholds = torch.rand(40) * 0.3
    layer = SparseFFN(
        24, 40, activation=activation, threshold=thresholds, threshold_on=on, policy=policy
    )
    x = torch.randn(5, 2, 24)
    expected = dense(layer, x, thresholds)
    assert not torch.allclose(expected, dense(layer, x), atol=1e-3)
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(layer.down_proj(layer.hidden(x)), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("policy", ["auto", "sparse", "dense"])
def test_top_k_keeps_the_largest_and_on_ties_the_lowest(policy):
    layer = SparseFFN(1, 5, gated=False, top_k=2, policy=policy)
    with torch.no_grad():
        layer.up_proj.weight.copy_(torch.tensor([[1.0], [3.0], [3.0], [3.0], [-9.0]]))
        layer.down_proj.weight.copy_(torch.tensor([[1.0, 10.0, 100.0, 1000.0, 1e4]]))
    assert layer(torch.ones(3, 1)).flatten().tolist() == [330.0] * 3
    assert layer.hidden(torch.ones(1)).tolist() == [0, 3, 3, 0, 0]


@pytest.mark.claim(122, "After any change of down_proj the sparse path uses the new weight")
def test_the_copy_of_down_proj_is_never_stale():
    torch.manual_seed(0)
    layer = SparseFFN(6, 10, policy="sparse").eval()
    x = torch.randn(3, 6)

    def check():
        with torch.no_grad():
            torch.testing.assert_close(layer(x), dense(layer, x), atol=1e-6, rtol=1e-5)

    check()
    rows = layer._kept.rows
    check()
    assert layer._kept.rows is rows  # made once
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    layer(x).square().sum().backward()
    optimizer.step()
    check()
    layer.load_state_dict(SparseFFN(6, 10).state_dict())
    check()
    layer.down_proj.weight = nn.Parameter(torch.randn(6, 10))
    check()
    layer.down_proj.weight.data = torch.randn(6, 10)
    check()
    with torch.no_grad():
        layer.down_proj.weight.mul_(2)
    check()
    layer.down_proj.weight.data.mul_(2)
    layer.eval()
    check()
    memory = np.ones((6, 10), dtype=np.float32)
    for scale in (1, 3):  # another parameter at the same place, as fresh as the first
        memory *= scale
        layer.down_proj.weight = nn.Parameter(torch.from_numpy(memory))
        check()
    layer.double()
    x = x.double()
    check()
    layer.eval()
    with torch.inference_mode():
        layer(x)
    layer.requires_grad_(False)
    layer(x.clone().requires_grad_()).sum().backward()  # what inference left behind is not used


def test_gradients_reach_down_proj_in_evaluation_too():
    layer = SparseFFN(6, 10, policy="sparse").eval()
    x = torch.randn(3, 6)
    with torch.no_grad():
        layer(x)
    layer(x).sum().backward()
    got = layer.down_proj.weight.grad.clone()
    layer.zero_grad()
    dense(layer, x).sum().backward()
    torch.testing.assert_close(got, layer.down_proj.weight.grad)


@pytest.mark.skipif(backend("sparse_ffn")[0] != "native", reason="needs the kernel")
def test_inactive_neurons_are_not_read():
    layer = SparseFFN(4, 6, bias=True, policy="auto").eval()
    with torch.no_grad():
        layer.gate_proj.bias.copy_(torch.tensor([9.0, -9, 9, -9, -9, 9]))
        expected = layer(torch.ones(1, 4))
        layer.up_proj.weight[[1, 3, 4]] = torch.nan
        layer.down_proj.weight[:, [1, 3, 4]] = torch.nan
        assert torch.equal(layer(torch.ones(1, 4)), expected)


def test_state_dict_has_the_names_of_dense_layers_and_thresholds_stay():
    layer = SparseFFN(4, 6, threshold=0.25)
    names = {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}
    assert set(layer.state_dict()) == names | {"threshold"}
    checkpoint = {name: torch.randn_like(layer.state_dict()[name]) for name in names}
    assert layer.load_state_dict(checkpoint).missing_keys == []
    assert layer.threshold.tolist() == [0.25] * 6
    layer.reset_parameters()
    assert layer.threshold.tolist() == [0.25] * 6
    with pytest.raises(RuntimeError, match=r"gate_proj\.weight"):
        layer.load_state_dict({})
    other = SparseFFN(4, 6)
    other.load_state_dict(layer.state_dict())
    assert other.threshold.tolist() == [0.25] * 6


def test_thresholds_are_saved_with_the_model(tmp_path):
    layer = SparseFFN(4, 6, activation="silu")
    layer.set_threshold(torch.rand(6), on="product")
    again = SparseFFN.from_pretrained(layer.save_pretrained(tmp_path / "ffn"))
    assert torch.equal(again.threshold, layer.threshold)
    assert again.threshold_on == "product"
    x = torch.randn(5, 4)
    assert torch.equal(again(x), layer.eval()(x))


def test_track_keeps_the_mean_of_x1():
    layer = SparseFFN(4, 6, policy="sparse")
    with pytest.raises(ValueError, match="last_x1_l1"):
        _ = layer.last_x1_l1
    layer.track = True
    x = torch.randn(5, 4)
    untracked = copy.deepcopy(layer)
    untracked.track = False
    torch.testing.assert_close(layer(x), untracked(x))
    assert layer.last_x1_l1 == layer.hidden(x).abs().mean()
    assert layer.last_x1_l1.requires_grad
    with pytest.raises(ValueError, match="last_x1_l1"):
        _ = copy.deepcopy(layer).last_x1_l1
    torch.save(layer, io.BytesIO())


@pytest.mark.claim(122, "A gated layer costs N d f + 2 d Σ|S_n| multiplications, counted by hand")
def test_multiplications():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    for gated, on, of_all, of_active in (
        (True, "act", 1, 2),
        (True, "product", 2, 1),
        (False, "act", 1, 1),
        (False, "product", 1, 1),
    ):
        layer = SparseFFN(8, 12, gated=gated, threshold=0.2, threshold_on=on)
        active = int((layer.hidden(x) != 0).sum())
        assert 0 < active < 120
        assert layer.macs(x) == of_all * 10 * 8 * 12 + of_active * 8 * active


def random(module):
    torch.manual_seed(3)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.eval()


def transformers_mlp(kind, act):
    import transformers as t
    from transformers.models import clip, gpt2, llama, t5

    if kind == "llama":
        config = t.LlamaConfig(
            hidden_size=8,
            intermediate_size=20,
            hidden_act=act,
            mlp_bias=True,
            num_attention_heads=2,
        )
        return llama.modeling_llama.LlamaMLP(config)
    if kind == "clip":
        config = t.CLIPTextConfig(hidden_size=8, intermediate_size=20, hidden_act=act)
        return clip.modeling_clip.CLIPMLP(config)
    if kind == "gpt2":
        config = t.GPT2Config(n_embd=8, activation_function=act, resid_pdrop=0.0)
        return gpt2.modeling_gpt2.GPT2MLP(20, config)
    config = t.T5Config(d_model=8, d_ff=20, dense_act_fn=act, dropout_rate=0.0)
    config.dense_act_fn = act
    return (
        t5.modeling_t5.T5DenseGatedActDense if kind == "t5" else t5.modeling_t5.T5DenseActDense
    )(config)


def timm_mlp(kind, act):
    from timm import layers

    return (layers.SwiGLU if kind == "swiglu" else layers.Mlp)(8, 20, act_layer=act)


MLPS = {
    "llama, silu": lambda: transformers_mlp("llama", "silu"),
    "llama, relu": lambda: transformers_mlp("llama", "relu"),
    "clip, relu": lambda: transformers_mlp("clip", "relu"),
    "gpt2, relu": lambda: transformers_mlp("gpt2", "relu"),
    "gpt2, silu": lambda: transformers_mlp("gpt2", "silu"),
    "t5 gated, silu": lambda: transformers_mlp("t5", "silu"),
    "t5, relu2": lambda: transformers_mlp("t5 plain", "relu2"),
    "timm, relu": lambda: timm_mlp("mlp", nn.ReLU),
    "timm, silu": lambda: timm_mlp("mlp", nn.SiLU),
    "timm SwiGLU": lambda: timm_mlp("swiglu", nn.SiLU),
    "sequential": lambda: nn.Sequential(
        nn.Linear(8, 20), nn.Dropout(0.0), nn.SiLU(), nn.Linear(20, 8, bias=False)
    ),
    "own, thresholds": lambda: SparseFFN(
        8, 20, activation="silu", threshold=0.05, threshold_on="product", top_k=9, policy="sparse"
    ),
}


@pytest.mark.claim(
    122, "Taking over a layer with its activation kept changes no output", tolerance=1e-6
)
@pytest.mark.parametrize("name", list(MLPS))
def test_from_mlp_keeps_the_function(name):
    mlp = random(MLPS[name]())
    layer = SparseFFN.from_mlp(mlp)
    x = torch.randn(3, 7, 8)
    torch.testing.assert_close(layer(x), mlp(x), atol=1e-6, rtol=1e-5)
    assert mlp(x).abs().max() > 0.05
    if "gpt2" not in name:  # whose weights are transposed
        assert layer.down_proj.weight is mlp_parts(mlp).down.weight


def test_from_mlp_can_change_the_activation():
    mlp = random(nn.Sequential(nn.Linear(8, 20), nn.GELU(), nn.Linear(20, 8)))
    assert mlp_parts(mlp).activation == "gelu"
    with pytest.raises(ValueError, match="activation"):
        SparseFFN.from_mlp(mlp)
    x = torch.randn(3, 8)
    layer = SparseFFN.from_mlp(mlp, activation="fatrelu", threshold=0.1)
    z = mlp[0](x)
    torch.testing.assert_close(layer(x), mlp[2](torch.where(z > 0.1, z, 0.0)))


@pytest.mark.parametrize(
    ("module", "named"),
    [
        (lambda: nn.Linear(3, 3), "Linear"),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.ReLU()), "Sequential"),
        (
            lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Dropout(0.1), nn.Linear(4, 3)),
            "Dropout",
        ),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), "unknown"),
    ],
)
def test_from_mlp_refuses_what_it_does_not_know(module, named):
    with pytest.raises(ValueError, match=named):
        SparseFFN.from_mlp(module())


def test_blocks_that_hold_the_projections_themselves_are_no_mlps():
    block = nn.Module()
    block.fc1, block.fc2, block.activation_fn = nn.Linear(3, 4), nn.Linear(4, 3), nn.ReLU()
    assert mlp_parts(block).activation == "relu"
    block.norm = nn.LayerNorm(3)
    with pytest.raises(ValueError, match="feed-forward"):
        mlp_parts(block)


@pytest.mark.parametrize("value", [-0.1, torch.zeros(3), torch.tensor([0.0] * 5 + [-1.0])])
def test_bad_thresholds_are_refused(value):
    with pytest.raises(ValueError, match="threshold"):
        SparseFFN(4, 6).set_threshold(value)
    with pytest.raises(ValueError, match="threshold_on"):
        SparseFFN(4, 6).set_threshold(0.1, on="input")


@pytest.mark.claim(122, "Both paths compile as one graph")
@pytest.mark.parametrize("policy", ["sparse", "dense", "auto"])
def test_one_graph(policy):
    layer = SparseFFN(8, 12, policy=policy)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 8)
    torch.testing.assert_close(compiled(x), layer(x))
