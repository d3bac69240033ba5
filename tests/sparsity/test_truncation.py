"""CETT-PPL against models masked by hand, and the thresholds it installs."""

import copy

import pytest
import torch
from torch import nn

from torchzoo.experiments.language import Decoder, language_loss
from torchzoo.sparsity import (
    SparseFFN,
    cett,
    cett_ppl,
    cett_thresholds,
    importance,
    ppl_sparsity,
    uniform_ppl,
)
from torchzoo.sparsity.ffn import on_hidden
from torchzoo.sparsity.hosts import find_ffns


def model_and_tokens(activation="silu", gated=False, seed=0):
    torch.manual_seed(seed)
    model = Decoder(11, 16, 2, 2, 48, gated=gated, activation=activation).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.35)
    with torch.no_grad():  # columns of very different lengths
        for block in model.blocks:
            block.ffn.down_proj.weight.mul_(torch.linspace(-1.5, 1, 48).exp())
    tokens = torch.randint(11, (24, 1))
    with torch.no_grad():  # the model's own text, which it knows best when whole
        while tokens.shape[1] < 17:
            following = model(tokens)[:, -1].softmax(-1).multinomial(1)
            tokens = torch.cat([tokens, following], 1)
    return model, tokens


SEARCH = {"loss_fn": language_loss, "num_candidates": 512, "tol": 1e-3}


@pytest.mark.claim(
    145,
    "Thresholds put into SparseFFN give the loss of the masked model, at the asked perplexity",
    tolerance=1e-5,
)
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("gated", [True, False])
def test_report_and_kernel_agree(activation, gated):
    model, tokens = model_and_tokens(activation, gated)
    report = cett_ppl(model, [tokens], p=5.0, **SEARCH)
    assert 1.05 - 2e-2 < report.ppl_pruned / report.ppl_dense <= 1.05
    assert report.ppl_dense == pytest.approx(language_loss(model, tokens).exp().item(), rel=1e-6)
    sparse = copy.deepcopy(model)
    report.apply(sparse)
    with torch.no_grad():
        for block in sparse.blocks:
            block.ffn.policy = "sparse"
            assert block.ffn.threshold_on == ("product" if gated else "act")
        loss = language_loss(sparse, tokens)
    assert loss.exp().item() == pytest.approx(report.ppl_pruned, rel=1e-5)
    assert 0 < report.activation_ratio < 0.9
    assert report.sparsity == 1 - report.activation_ratio
    # by hand: every layer pruned at once, thresholds from the whole model
    for block, thresholds, tau in zip(
        model.blocks, report.neuron_thresholds, report.taus, strict=True
    ):
        norms = block.ffn.down_proj.weight.norm(dim=0)
        torch.testing.assert_close(thresholds, (tau / norms).float())
    kept = []
    for block in sparse.blocks:
        block.ffn.register_forward_hook(
            lambda ffn, x, y: kept.append((ffn.hidden(x[0]) != 0).double().mean().item())
        )
    with torch.no_grad():
        sparse(tokens[:, :-1])
    torch.testing.assert_close(kept, report.layer_ratios.tolist(), atol=1e-3, rtol=0)


def test_layers_share_one_cett():
    model, tokens = model_and_tokens()
    report = ppl_sparsity(model, [tokens], p=10.0, **SEARCH)
    hidden = []
    for block in model.blocks:
        block.ffn.register_forward_hook(
            lambda ffn, x, y: hidden.append((ffn.hidden(x[0]).flatten(0, 1), ffn.down_proj.weight))
        )
    with torch.no_grad():
        model(tokens[:, :-1])
        for (h, w), tau in zip(hidden, report.taus, strict=True):
            expected = cett_thresholds(h, w, report.cett, num_candidates=512)
            assert tau == pytest.approx(expected, rel=1e-5)
            assert cett(h, w, importance(h, w) > tau).mean() <= report.cett + 1e-5


def test_sequential_measures_layers_behind_pruned_ones():
    model, tokens = model_and_tokens()
    model.blocks[0].ffn.requires_grad_(False)
    together = cett_ppl(model, [tokens], p=10.0, **SEARCH)
    one_by_one = cett_ppl(model, [tokens], p=10.0, sequential=True, **SEARCH)
    assert one_by_one.ppl_pruned / one_by_one.ppl_dense <= 1.1
    assert one_by_one.taus[1] != together.taus[1]
    pruned = copy.deepcopy(model)
    pruned.blocks[0].ffn.set_threshold(one_by_one.neuron_thresholds[0])
    with torch.no_grad():
        seen = []
        pruned.blocks[1].ffn.register_forward_hook(lambda ffn, x, y: seen.append(ffn.hidden(x[0])))
        pruned(tokens[:, :-1])
    expected = cett_thresholds(
        seen[0].flatten(0, 1),
        pruned.blocks[1].ffn.down_proj.weight,
        one_by_one.cett,
        num_candidates=512,
    )
    assert one_by_one.taus[1].item() == pytest.approx(expected, rel=1e-4)


def test_batches_count_alike():
    model, tokens = model_and_tokens()
    whole = cett_ppl(model, [tokens], p=5.0, **SEARCH)
    parts = cett_ppl(model, list(tokens.split(8)), p=5.0, **SEARCH)
    assert parts.ppl_dense == pytest.approx(whole.ppl_dense, rel=1e-5)
    assert parts.ppl_pruned == pytest.approx(whole.ppl_pruned, rel=1e-5)
    torch.testing.assert_close(parts.taus, whole.taus, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(parts.layer_ratios, whole.layer_ratios, atol=1e-4, rtol=0)


def with_largest(model, tokens, k):
    """The share kept and the perplexity when k neurons of every token are, if they are not 0."""
    shares, undo = [], []

    def keep(h):
        mask = (h.abs() >= h.abs().sort(descending=True).values[..., k - 1, None]) & (h != 0)
        shares.append(mask.double().mean().item())
        return torch.where(mask, h, 0.0)

    for ffn in find_ffns(model).values():
        undo.append(on_hidden(ffn.module, ffn.down, keep))
    with torch.no_grad():
        ppl = language_loss(model, tokens).exp().item()
    for stop in undo:
        stop()
    return sum(shares) / len(shares), ppl


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_uniform_rules_by_hand(activation):
    model, tokens = model_and_tokens(activation)
    search = {"loss_fn": language_loss, "tol": 1e-3}
    kept, ratio = uniform_ppl(model, [tokens], rule="epsilon", p=5.0, **search)
    assert 0 < kept < 1
    assert 1 < ratio <= 1.05

    kept, ratio = uniform_ppl(model, [tokens], rule="top_k", p=5.0, **search)
    found = [with_largest(model, tokens, k) for k in range(1, 49)]
    whole = found[-1][1]
    least = min(range(48), key=lambda i: abs(found[i][0] - kept))
    assert (kept, ratio * whole) == pytest.approx(found[least], rel=1e-5)
    assert ratio <= 1.05 < found[least - 1][1] / whole
    with pytest.raises(ValueError, match="rule"):
        uniform_ppl(model, [tokens], rule="random", loss_fn=language_loss)


def test_the_model_is_left_as_it_was():
    model, tokens = model_and_tokens()
    model.train()
    model.blocks[0].eval()
    before = copy.deepcopy(model.state_dict())
    report = cett_ppl(model, [tokens], **SEARCH)
    assert report.ppl_pruned / report.ppl_dense <= 1.01, "p is 1 where it is not given"
    assert (model.training, model.blocks[0].training, model.blocks[1].training) == (1, 0, 1)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(block.ffn._watchers for block in model.blocks)


def test_a_transformers_model_with_padding():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.4)
    ids = model.generate(
        torch.tensor([[1], [5], [9]]), max_new_tokens=11, do_sample=True, eos_token_id=None
    )
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    options = {"p": 5.0, "num_candidates": 256, "tol": 1e-3}
    report = cett_ppl(model, [{"input_ids": ids, "attention_mask": mask}], **options)
    other = torch.where(mask == 1, ids, (ids + 3) % 30)  # other padding
    again = cett_ppl(model, [{"input_ids": other, "attention_mask": mask}], **options)
    assert again.ppl_dense == pytest.approx(report.ppl_dense, rel=1e-5)
    torch.testing.assert_close(again.taus, report.taus, atol=1e-4, rtol=1e-4)
    sparse = copy.deepcopy(model)
    report.apply(sparse)
    layer = sparse.model.layers[0].mlp
    assert isinstance(layer, SparseFFN)
    assert layer.threshold_on == "product"
    with torch.no_grad():
        labels = ids.masked_fill(mask == 0, -100)
        loss = sparse(ids, attention_mask=mask, labels=labels).loss
    assert loss.exp().item() == pytest.approx(report.ppl_pruned, rel=1e-5)


def test_thresholds_join_those_that_are_there():
    model, tokens = model_and_tokens("fatrelu")
    for block in model.blocks:
        block.ffn.set_threshold(0.3)
    report = cett_ppl(model, [tokens], p=3.0, **SEARCH)
    report.apply(model)
    assert all((block.ffn.threshold >= 0.3).all() for block in model.blocks)
    assert language_loss(model, tokens).exp().item() == pytest.approx(report.ppl_pruned, rel=1e-5)
    gated, tokens = model_and_tokens("fatrelu", gated=True)
    report = cett_ppl(gated, [tokens], p=3.0, **SEARCH)
    gated.blocks[0].ffn.set_threshold(0.1)
    with pytest.raises(ValueError, match=r"blocks\.0\.ffn"):
        report.apply(gated)
    model.blocks[1].ffn.top_k = 5
    with pytest.raises(ValueError, match=r"blocks\.1\.ffn already drops neurons"):
        report.apply(model)


def test_bad_searches_are_refused():
    model, tokens = model_and_tokens()
    for options, named in (
        ({"p": 0.0}, "p"),
        ({"tol": 0.0}, "tol"),
        ({"ffns": {}}, "ffns"),
    ):
        with pytest.raises(ValueError, match=named):
            cett_ppl(model, [tokens], **{**SEARCH, **options})
    with pytest.raises(ValueError, match="batches"):
        cett_ppl(model, [], **SEARCH)
    with pytest.raises(ValueError, match="model"):
        cett_ppl(nn.Linear(2, 2), [tokens], **SEARCH)
