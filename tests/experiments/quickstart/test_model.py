import math

import pytest
import torch

from torchzoo.experiments.quickstart.baseline import TransformerModel
from torchzoo.experiments.quickstart.composition import composition, count
from torchzoo.experiments.quickstart.model import PatchEmbedding, ZooVisionModel
from torchzoo.hub import from_pretrained


def test_patches_are_the_squares_of_the_image_row_by_row():
    image = torch.arange(36.0).view(1, 1, 6, 6)
    patches = PatchEmbedding(6, 3, 4).patches(image)
    expected = [image[0, 0, i : i + 3, j : j + 3].flatten() for i in (0, 3) for j in (0, 3)]
    assert torch.equal(patches[0], torch.stack(expected))


def test_the_model_equals_its_formula_written_token_by_token(small):
    model = small.double()
    image = torch.rand(1, 1, 12, 12, dtype=torch.float64)
    logits, routings = model(image, return_routing=True)
    e = model.embedding
    x = e.patches(image)[0] @ e.project.weight.T + e.project.bias + e.position
    for block, routing in zip(model.blocks, routings, strict=True):
        z = block.norm1(x)
        gate = torch.empty_like(z)
        for head in range(2):  # each head: statistics and Gaussian of its own half of the tokens
            rows = z[8 * head : 8 * head + 8]
            delta, xi = block.attention.delta[head, 0], block.attention.xi[head, 0]
            score = (rows - rows.mean(0) - delta) ** 2 / (rows.var(0, correction=0) + 1e-5)
            gate[8 * head : 8 * head + 8] = torch.exp(-score / (2 * xi))
        x = x + z * gate
        z = block.norm2(x)
        y = torch.zeros_like(x)
        experts, tau = block.moe.experts, math.sqrt(2.0 * 0.25)  # halfway, exponentially
        for t, token in enumerate(z):
            share = (block.moe.gate.weight @ token / tau).softmax(0)
            for i in range(3):
                used = share[i] > 0.1 or share[i] == share.max()
                assert bool(routing.mask[t, i]) == bool(used)
                if used:
                    hidden = (token @ experts.w_in[i] + experts.b_in[i]).relu()
                    y[t] += share[i] * (hidden @ experts.w_out[i] + experts.b_out[i])
        x = x + y
        assert 0 < routing.mask.sum() < routing.mask.numel()
    expected = model.head.weight @ model.norm(x).flatten() + model.head.bias
    torch.testing.assert_close(logits[0], expected, atol=1e-10, rtol=0)


def test_gates_anneal_and_start_over_keeps_everything_but_head_and_schedule(small):
    assert float(small.gates[0].temperature) == pytest.approx(math.sqrt(0.5))
    before = {name: value.clone() for name, value in small.state_dict().items()}
    small.start_over()
    changed = {n for n, v in small.state_dict().items() if not torch.equal(v, before[n])}
    schedule = {f"blocks.{i}.moe.gate.{b}" for i in (0, 1) for b in ("log_tau", "num_steps")}
    assert changed == schedule | {"head.weight", "head.bias"}
    assert float(small.gates[1].temperature) == pytest.approx(2.0)
    for _ in range(10):
        small.anneal()
    assert float(small.gates[1].temperature) == pytest.approx(0.25)


def test_a_saved_model_comes_back_with_the_same_logits(small, tmp_path):
    images = torch.rand(4, 1, 12, 12)
    again = from_pretrained(small.save_pretrained(tmp_path / "model"))
    assert torch.equal(again(images), small(images))


def test_the_baseline_is_as_large_as_the_model():
    ours, theirs = count(ZooVisionModel(5)), count(TransformerModel(5))
    assert abs(ours - theirs) / ours < 0.005


def test_the_composition_counts_every_parameter_once():
    tree = composition(ZooVisionModel(5))
    assert tree.parameters == count(ZooVisionModel(5))

    def check(part):
        if part.parts:
            assert sum(child.parameters for child in part.parts) == part.parameters
        for child in part.parts:
            check(child)

    check(tree)


def test_a_patch_that_does_not_divide_the_image_is_refused():
    with pytest.raises(ValueError, match="patch_size"):
        ZooVisionModel(5, patch_size=5)
