"""The models whose generation is timed say the same, and are as sparse as they should be."""

import torch

from torchzoo.experiments.ops.generation import generate, models


def test_both_models_generate_the_same_tokens():
    dense, sparse = models(dim=64, hidden=512, vocab=40)
    ids = torch.tensor([[1, 2, 3, 4]])
    expected = generate(dense, ids, 12)
    assert expected.shape == (1, 16)
    assert torch.equal(generate(sparse, ids, 12), expected)
    assert len(set(expected[0].tolist())) > 5


def test_nine_neurons_in_ten_are_silent():
    _, sparse = models(dim=64, hidden=512, vocab=40)
    shares = []
    for layer in sparse.model.layers:
        layer.mlp.register_forward_hook(
            lambda ffn, x, y: shares.append((ffn.hidden(x[0]) != 0).double().mean().item())
        )
    with torch.no_grad():
        sparse(torch.arange(40)[None])
    assert all(0.07 < share < 0.13 for share in shares)
    assert len(shares) == 2
