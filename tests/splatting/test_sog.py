"""Scenes on grids: what sorting leaves alone, and the smoothness loss by hand."""

import copy

import pytest
import torch

from torchzoo.splatting import (
    Cameras,
    GaussianScene,
    GridSmoothnessLoss,
    SelfOrganizingScene,
    SelfOrganizingStrategy,
    SplatTrainer,
    neighbor_distance,
    vad,
)
from torchzoo.splatting.sog import ATTRIBUTES


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def square(side=6, sh_degree=1, dtype=torch.float64, seed=0):
    """A scene whose parameters are all random."""
    g = seeded(seed)
    count, k = side * side, (sh_degree + 1) ** 2

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype)

    return SelfOrganizingScene.from_tensors(
        0.5 * draw(count, 3),
        draw(count, 4),
        0.3 * draw(count, 3) - 2,
        draw(count),
        0.3 * draw(count, k, 3),
    )


def cameras(dtype=torch.float64):
    return Cameras.orbit(3, radius=4.0, width=12, height=12, dtype=dtype)


@pytest.mark.claim(27, "sorting a scene changes no picture", tolerance=1e-6)
def test_pictures_stay():
    scene = square()
    before, old = scene.render(cameras()).image, scene.means.detach().clone()
    perm = scene.sort_(generator=seeded())
    assert not torch.equal(perm, torch.arange(36))
    assert torch.equal(scene.means, old[perm])
    torch.testing.assert_close(scene.render(cameras()).image, before, atol=1e-6, rtol=0)
    apart = neighbor_distance(scene.as_grid("xyz"))
    assert apart < 0.8 * neighbor_distance(old.T.reshape(3, 6, 6))


@pytest.mark.claim(
    27, "an Adam step after sorting is the sorted result of the step without", tolerance=1e-12
)
def test_moments_move():
    scene = square()
    optimizer = torch.optim.Adam(scene.parameters(), lr=1e-2)

    def step(scene, optimizer):
        optimizer.zero_grad()
        scene.render(cameras()).image.square().sum().backward()
        optimizer.step()

    for _ in range(3):
        step(scene, optimizer)
    other = copy.deepcopy(scene)
    twin = torch.optim.Adam(other.parameters(), lr=1e-2)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    perm = scene.sort_(optimizer, generator=seeded())
    step(scene, optimizer)
    step(other, twin)
    for name, value in scene.named_parameters():
        torch.testing.assert_close(value, other.get_parameter(name)[perm], atol=1e-12, rtol=1e-9)


@pytest.mark.claim(27, "the grid keeps the most opaque Gaussians, as many as make a square")
def test_to_square():
    scene = square(7)
    scene.keep(torch.arange(45))
    old = scene.opacity_logits.detach().clone()
    optimizer = torch.optim.SGD(scene.parameters(), lr=1.0)
    assert scene.to_square_(optimizer) == 9
    assert torch.equal(scene.opacity_logits, old[old >= old.sort().values[9]])  # in order
    assert optimizer.param_groups[0]["params"][0] is scene.means
    assert scene.to_square_() == 0


def test_as_grid():
    scene = square(5, sh_degree=2)
    channels = {"xyz": 3, "sh_dc": 3, "sh_rest": 24, "scaling": 3, "rotation": 4, "opacity": 1}
    for name, parameter in ATTRIBUTES.items():
        grid = scene.as_grid(name)
        assert grid.shape == (channels[name], 5, 5)
        assert torch.equal(grid, scene.as_grid(parameter))
        assert torch.equal(grid[:, 3, 2], scene.get_parameter(parameter)[17].flatten())
    with pytest.raises(ValueError, match="name: got 'colour', expected one of"):
        scene.as_grid("colour")


def test_what_scenes_are_sorted_by():
    """Weights apply after normalisation over all of an attribute's values, scales activated."""
    scene = square(8)
    scene.means.data *= 1e4
    twin = copy.deepcopy(scene)
    twin.means.data *= 1e-4
    assert torch.equal(scene.sort_(generator=seeded()), twin.sort_(generator=seeded()))

    plain, activated = square(8), square(8)
    activated.log_scales.data.copy_(activated.scales)  # what is sorted by, up to its normalisation
    by = {"weights": {"scaling": 1.0}, "shuffle": False}
    found = plain.sort_(generator=seeded(), **by)
    from torchzoo.ops import plas_sort

    assert torch.equal(
        found,
        plas_sort(activated.log_scales.data - activated.log_scales.data.mean(), generator=seeded()),
    )
    both, reverse = square(8), square(8)
    shuffled = both.sort_(generator=seeded(), weights={"xyz": 1.0, "opacity": 0.0})
    assert torch.equal(shuffled, reverse.sort_(generator=seeded(), weights={"xyz": 3.0}))
    assert not torch.equal(shuffled, square(8).sort_(generator=seeded(), shuffle=False))
    scene.opacity_logits.data.fill_(2.0)
    assert len(scene.sort_(weights={"opacity": 1.0}).unique()) == 64


def blurred(picture, kernel=5, sigma=3.0):
    """By loops: around in x, mirrored in y without repeating the border."""
    reach = kernel // 2
    taps = torch.exp(-(torch.arange(-reach, reach + 1).double() ** 2) / (2 * sigma**2))
    taps = taps / taps.sum()
    _, height, width = picture.shape
    result = torch.zeros_like(picture)
    for y in range(height):
        for x in range(width):
            for i in range(-reach, reach + 1):
                row = abs(y + i) if y + i < height else 2 * (height - 1) - (y + i)
                for j in range(-reach, reach + 1):
                    weight = taps[i + reach] * taps[j + reach]
                    result[:, y, x] += weight * picture[:, row, (x + j) % width]
    return result


@pytest.mark.claim(
    27,
    "the loss is the mean Huber distance to a 5 x 5 blur of the raw pictures, weighted by "
    "weights over their sum",
    tolerance=1e-12,
)
@pytest.mark.parametrize("options", [{}, {"kernel": 3, "sigma": 0.8}])
def test_value_of_the_loss(options):
    scene, weights = square(), {"opacity": 1.0, "rotation": 10.0, "xyz": 0.5}
    scene.opacity_logits.data *= 4  # some differences above 1
    expected = 0.0
    for name, weight in weights.items():
        picture = scene.as_grid(name).detach()
        e = (picture - blurred(picture, **options)).abs()
        expected += weight * torch.where(e < 1, e**2 / 2, e - 0.5).mean() / 11.5
    found = GridSmoothnessLoss(weights, **options)(scene)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.claim(
    27,
    "the loss is 0 where a grid is its own blur, and its gradient comes through the grid alone, "
    "not through the blur",
    tolerance=1e-7,
)
def test_gradient_of_the_loss():
    scene = square()
    scene.opacity_logits.data *= 4
    loss = GridSmoothnessLoss({"opacity": 1.0})
    loss(scene).backward()
    picture = scene.as_grid("opacity").detach()
    e = picture - blurred(picture)
    expected = e.clamp(-1, 1).flatten() / 36
    torch.testing.assert_close(scene.opacity_logits.grad, expected, atol=1e-7, rtol=0)
    assert (e.abs() > 1).any()
    assert scene.means.grad is None
    scene.opacity_logits.data.fill_(0.3)
    assert loss(scene) < 1e-14
    scene.opacity_logits.data[7] += 1e-3
    assert loss(scene) > 1e-9


def test_other_losses():
    scene = square()
    picture = scene.as_grid("rotation").detach()
    e = picture - blurred(picture)
    for name, expected in (("l1", e.abs().mean()), ("mse", e.square().mean())):
        found = GridSmoothnessLoss({"rotation": 2.0}, loss=name)(scene)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_measures_of_a_grid():
    grid = torch.rand(4, 5, 7, generator=seeded(), dtype=torch.float64)
    pairs = [(grid[:, y, x], grid[:, y, x + 1]) for y in range(5) for x in range(6)]
    pairs += [(grid[:, y, x], grid[:, y + 1, x]) for y in range(4) for x in range(7)]
    apart = torch.stack([(a - b).norm() for a, b in pairs])
    torch.testing.assert_close(neighbor_distance(grid), apart.mean())
    differences = torch.stack([(a - b).abs() for a, b in pairs])
    expected = ((differences - differences.mean()) ** 2).mean()
    torch.testing.assert_close(vad(grid), expected)
    with pytest.raises(ValueError, match=r"grid: got \(4, 1, 1\)"):
        vad(grid[:, :1, :1])


@pytest.mark.claim(
    27, "training sorts after every densification, on a square grid, and adds the smoothness loss"
)
def test_strategy(monkeypatch):
    sorts = []
    original = SelfOrganizingScene.sort_

    def noted(self, *args, **kwargs):
        sorts.append(self.num_gaussians)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(SelfOrganizingScene, "sort_", noted)
    scene = square(5, dtype=torch.float32)
    strategy = SelfOrganizingStrategy(refine_start=1, refine_stop=7, refine_every=2, cap_max=45)
    views = cameras(torch.float32)
    trainer = SplatTrainer(scene, views, torch.rand(3, 12, 12, 3), steps=8, strategy=strategy)
    seen = []
    trainer.callbacks = (lambda step: seen.append(step.scene.num_gaussians),)
    trainer.fit()
    assert len(sorts) == 3  # after steps 2, 4 and 6
    assert all(count**0.5 == round(count**0.5) for count in (*sorts, *seen))
    assert len(set(seen)) > 1
    expected = GridSmoothnessLoss({"opacity": 1.0, "rotation": 10.0})(scene)
    torch.testing.assert_close(strategy.penalty(scene), expected)
    double = SelfOrganizingStrategy(smoothness=2.0, loss_weights={"opacity": 3.0})
    torch.testing.assert_close(
        double.penalty(scene), 2 * GridSmoothnessLoss({"opacity": 1.0})(scene)
    )
    assert SelfOrganizingStrategy(smoothness=0.0).penalty(scene) == 0
    assert double.config()["loss_weights"] == {"opacity": 3.0}
    assert double.config()["sort_weights"] == {"xyz": 1.0, "sh_dc": 1.0, "scaling": 1.0}


@pytest.mark.claim(
    27,
    "densification runs every 1,000 of 30,000 steps, grows above 7e-5, prunes below opacity 0.1 "
    "and never resets opacities",
)
def test_schedule():
    strategy = SelfOrganizingStrategy()
    strategy.begin(square(), 30_000)
    due = [n for n in range(1, 30_001) if strategy.is_due(n)]
    assert due == list(range(1000, 15_000, 1000))
    assert not any(strategy._resets(n) for n in due)
    assert (strategy.threshold, strategy.prune_opacity, strategy.grow_scale3d) == (7e-5, 0.1, 0.1)


def test_bad_input():
    scene = square()
    for options, message in (
        ({"kernel": 4}, "kernel: got 4, expected an odd number"),
        ({"sigma": 0.0}, "sigma: got 0.0"),
        ({"loss": "cosine"}, "loss: got 'cosine', expected one of"),
        ({"kernel": 13}, "scene: got a grid of side 6, expected more than 6"),
    ):
        with pytest.raises(ValueError, match=message):
            GridSmoothnessLoss({"opacity": 1.0}, **options)(scene)
    for weights in ({}, {"opacity": 0.0}, {"opacity": -1.0, "xyz": 2.0}, {"xyz": torch.inf}):
        with pytest.raises(ValueError, match="weights: got"):
            GridSmoothnessLoss(weights)
        with pytest.raises(ValueError, match="weights: got"):
            scene.sort_(weights=weights)
    with pytest.raises(ValueError, match="name: got 'colour'"):
        GridSmoothnessLoss({"colour": 1.0})(scene)
    scene.keep(torch.arange(20))
    for act in (scene.sort_, lambda: scene.as_grid("xyz")):
        with pytest.raises(ValueError, match="scene: got 20 Gaussians, expected a square number"):
            act()
    with pytest.raises(ValueError, match="smoothness: got -1"):
        SelfOrganizingStrategy(smoothness=-1)
    with pytest.raises(ValueError, match="scene: got GaussianScene, expected a SelfOrganizing"):
        SelfOrganizingStrategy().begin(GaussianScene(4), 10)
    with pytest.raises(ValueError, match="scene: got 20 Gaussians"):
        SelfOrganizingStrategy().begin(scene, 10)
