"""The residual block, and the optimiser groups of models made of it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchzoo.ssm import S4D, S4Block, S4DBlock, ssm_param_groups

DYNAMICS = {"log_dt", "log_A_real", "A_imag"}


def model(**options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), S4DBlock(8, 16, **options), S4DBlock(8, 4))


@pytest.mark.claim(
    107,
    "The block is x + GLU(linear(GELU(SSM(norm(x)) + D norm(x))))",
    tolerance=1e-5,
)
def test_block_is_the_formula():
    torch.manual_seed(0)
    block = S4DBlock(6, 8, init="legs").eval()
    with torch.no_grad():
        block.norm.weight.uniform_(0.5, 2)
        block.norm.bias.normal_()
    x = 3 * torch.randn(2, 40, 6) + 1
    u = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    u = u * block.norm.weight + block.norm.bias
    K = block.ssm.kernel(40)[0]
    toeplitz = torch.stack([F.pad(K, (s, 0))[:, :40] for s in range(40)], 1)  # [h, s, l]
    y = torch.einsum("hsl,bsh->blh", toeplitz, u) + block.ssm.D[0] * u
    y = y * (1 + torch.erf(y / 2**0.5)) / 2
    value, gate = block.ssm.output_linear(y).chunk(2, -1)
    torch.testing.assert_close(block(x), x + value * gate.sigmoid(), rtol=0, atol=1e-5)


@pytest.mark.claim(107, "A block by steps gives what it gives over the sequence", tolerance=1e-5)
def test_block_by_steps():
    torch.manual_seed(0)
    block = S4DBlock(6, 8, init="inv").eval()
    x = torch.randn(3, 30, 6)
    y, last = block(x, return_state=True)
    block.setup_step()
    state = block.initial_state(3)
    for t in range(30):
        out, state = block.step(x[:, t], state)
        torch.testing.assert_close(out, y[:, t], rtol=0, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=0, atol=1e-5)
    first, state = block(x[:, :11], return_state=True, rate=0.5)
    second = block(x[:, 11:], state, rate=0.5)
    both = torch.cat([first, second], 1)
    torch.testing.assert_close(both, block(x, rate=0.5), rtol=0, atol=1e-5)
    lengths = torch.tensor([30, 4, 1])
    padded = block(x, lengths=lengths)
    torch.testing.assert_close(padded[1, :4], block(x[1, :4]), rtol=0, atol=1e-5)


def test_any_layer_by_name():
    for name in ("S4D", "s4d"):
        block = S4Block(4, 6, ssm=name, init="inv", dropout=0.25)
        assert type(block.ssm) is S4D
        assert block.ssm.dropout == 0.25
        assert block.ssm.kernel.init == "inv"
    for name in ("LSTM", "S4DBlock", "s4d_init"):
        with pytest.raises(ValueError, match="ssm: expected the name of a state space layer"):
            S4Block(4, 6, ssm=name)


@pytest.mark.claim(
    107,
    "A, B and dt land in the group without weight decay, at min(1e-3, lr); all else does not, and "
    "every parameter is in exactly one group",
)
@pytest.mark.parametrize(("lr", "slow"), [(4e-3, 1e-3), (5e-4, 5e-4)])
def test_parameter_groups(lr, slow):
    net = copy.deepcopy(model(train_B=True))  # as for an average of weights
    names = {id(p): name for name, p in net.named_parameters()}
    rest, dynamics = ssm_param_groups(net, lr, weight_decay=0.05)
    assert (rest["lr"], rest["weight_decay"]) == (lr, 0.05)
    assert (dynamics["lr"], dynamics["weight_decay"]) == (slow, 0.0)
    found = [names[id(p)] for group in (rest, dynamics) for p in group["params"]]
    assert len(found) == len(set(found)) == len(names)
    inside = [names[id(p)] for p in dynamics["params"]]
    assert {name.rpartition(".")[2] for name in inside} == DYNAMICS | {"B"}
    assert len(inside) == 7  # the second block's B doesn't learn
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.AdamW([rest, dynamics])
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    decayed = {name for name, p in net.named_parameters() if not torch.equal(p, start[name])}
    zero = {name for name, value in start.items() if not value.any()}
    assert decayed == set(names.values()) - set(inside) - zero


def test_groups_of_other_rates():
    net = nn.ModuleList([S4D(4, 8, lr=2e-4), S4D(4, 8, lr=1e-3), S4D(4, 8, lr=0.0)])
    tied = nn.ModuleList([net, net[0]])
    groups = ssm_param_groups(tied, 1e-2)
    sizes = [(g["lr"], len(g["params"])) for g in groups]
    assert sizes == [(1e-2, 12), (2e-4, 3), (1e-3, 3), (0, 3)]
    assert [len(g["params"]) for g in ssm_param_groups(nn.Linear(2, 2), 1e-3)] == [2]
    parameter = net[0].kernel.log_dt
    assert parameter._optim == {"lr": 2e-4, "weight_decay": 0.0}
    for bad in ({"lr": -1.0}, {"lr": 1e-3, "weight_decay": -1.0}):
        with pytest.raises(ValueError, match=f"{[*bad][-1]}: expected"):
            ssm_param_groups(net, **bad)
