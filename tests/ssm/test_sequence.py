"""The model of sequences: whole, padded, streamed, and against its parts put together by hand."""

import pytest
import torch
from torch import nn

from torchzoo.ssm import SequenceModel

SIZES = {"d_model": 6, "depth": 2, "d_state": 8}


@pytest.mark.parametrize("pool", ["mean", "last", None])
@pytest.mark.parametrize("tokens", [False, True])
def test_equals_its_parts(pool, tokens):
    torch.manual_seed(0)
    model = SequenceModel(5, 3, tokens=tokens, pool=pool, **SIZES).eval()
    x = torch.randint(5, (4, 9)) if tokens else torch.randn(4, 9, 5)
    weight = model.encoder.weight
    h = weight[x] if tokens else x @ weight.mT + model.encoder.bias
    for block in model.blocks:
        h = h + block.ssm(block.norm(h))
    h = nn.functional.layer_norm(h, (6,), model.norm.weight, model.norm.bias)
    h = {"mean": h.sum(1) / 9, "last": h[:, 8], None: h}[pool]
    torch.testing.assert_close(model(x), h @ model.head.weight.mT + model.head.bias)


@pytest.mark.claim(
    107,
    "A stream, a sample at a time in constant memory, gives what the whole sequence gives",
    tolerance=1e-9,
)
@pytest.mark.parametrize("pool", ["mean", "last", None])
@pytest.mark.parametrize("ssm", ["S4D", "S4"])
def test_streaming(pool, ssm):
    torch.manual_seed(1)
    model = SequenceModel(2, 3, pool=pool, ssm=ssm, **SIZES).double().eval()
    x = torch.randn(4, 30, 2, dtype=torch.float64)
    model.setup_step()
    state = model.initial_state(4)
    size = sum(part.numel() for part in state.blocks)
    for t in range(30):
        y, state = model.step(x[:, t], state)
        whole = model(x[:, : t + 1])
        torch.testing.assert_close(y, whole[:, -1] if pool is None else whole, atol=1e-9, rtol=0)
        assert sum(part.numel() for part in state.blocks) == size
    assert state.steps == 30


@pytest.mark.parametrize("pool", ["mean", "last", None])
def test_padding_changes_nothing(pool):
    torch.manual_seed(2)
    model = SequenceModel(2, 3, pool=pool, bidirectional=True, **SIZES).double().eval()
    x = torch.randn(3, 12, 2, dtype=torch.float64)
    lengths = torch.tensor([12, 5, 1])
    padded = model(x, lengths=lengths)
    for row, length in enumerate(lengths):
        alone = model(x[row : row + 1, :length])[0]
        found = padded[row, :length] if pool is None else padded[row]
        torch.testing.assert_close(found, alone, atol=1e-12, rtol=0)


def test_bad_input_is_refused():
    model = SequenceModel(2, 3, **SIZES)
    with pytest.raises(ValueError, match=r"x: expected \(..., L, 2\), got \(4, 5, 3\)"):
        model(torch.randn(4, 5, 3))
    with pytest.raises(ValueError, match="lengths: expected shape"):
        model(torch.randn(4, 5, 2), lengths=torch.ones(3))
    with pytest.raises(ValueError, match="integers"):
        SequenceModel(2, 3, tokens=True, **SIZES)(torch.randn(4, 5))
    with pytest.raises(ValueError, match="depth"):
        SequenceModel(2, 3, depth=0)
