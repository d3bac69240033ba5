"""Feed-forward layers and blocks of other libraries' models, by their known names."""

import pytest
import torch
from torch import nn

from torchzoo.experiments.language import Decoder
from torchzoo.experiments.patches import PatchTransformer
from torchzoo.sparsity import SparseFFN, find_blocks, find_ffns


def test_layers_of_other_libraries(host):
    ffns = find_ffns(host.model)
    assert tuple(ffns) == host.ffns
    assert tuple(find_blocks(host.model)) == host.blocks
    for ffn in ffns.values():
        assert ffn.w_down.shape == (16, host.hidden)
        assert callable(ffn.module.get_submodule(ffn.activation.rpartition(".")[0]))
        assert ffn.gated == hasattr(ffn.module, "gate_proj")


def test_down_projections_are_the_ones_applied_to_the_neurons(host):
    """The layer gives h w_down^T + bias, whichever way round the host keeps its weight."""
    ffn = next(iter(find_ffns(host.model).values()))
    h = torch.randn(3, host.hidden)
    bias = ffn.down.bias if ffn.down.bias is not None else 0.0
    with torch.no_grad():
        torch.testing.assert_close(ffn.down(h), h @ ffn.w_down.mT + bias)


def test_own_models():
    decoder = Decoder(9, 8, 3, 2, 16)
    assert list(find_ffns(decoder)) == [f"blocks.{i}.ffn" for i in range(3)]
    assert list(find_blocks(decoder)) == [f"blocks.{i}" for i in range(3)]
    assert find_ffns(decoder)["blocks.0.ffn"].gated
    assert not find_ffns(SparseFFN(4, 8, gated=False))[""].gated
    patches = PatchTransformer(8, 1, 16)
    assert list(find_ffns(patches)) == list(find_blocks(patches)) == ["blocks.0"]


def test_nested_blocks_and_decoys():
    """Stages of blocks, experts without norms, and convolutions of the same names."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(4)
            self.experts = nn.ModuleList(
                nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.GELU(), nn.Linear(8, 4))
                for _ in range(2)
            )

    class Squeeze(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Conv2d(2, 4, 1)

    stages = nn.Sequential(*(nn.Sequential(Block(), Block()) for _ in range(2)))
    model = nn.ModuleDict({"stages": stages, "norms": nn.ModuleList([nn.LayerNorm(4)] * 2)})
    model["squeeze"] = Squeeze()
    places = [f"stages.{i}.{j}" for i in range(2) for j in range(2)]
    assert list(find_blocks(model)) == places
    assert list(find_ffns(model)) == [f"{p}.experts.{e}" for p in places for e in range(2)]
    assert {ffn.activation for ffn in find_ffns(model).values()} == {"2"}


def test_nothing_to_find():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"model: expected feed-forward layers .* 2 Linear"):
        find_ffns(model)
    with pytest.raises(ValueError, match="model: expected blocks"):
        find_blocks(model)
