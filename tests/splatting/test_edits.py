"""Edits: which rows there are afterwards, and what Adam remembers of them."""

import math

import pytest
import torch
from scipy import integrate

from torchzoo.splatting import GaussianScene, relocated

NAMES = ("means", "quats", "log_scales", "opacity_logits", "sh0", "shN")


@pytest.fixture
def trained():
    """A scene after three steps of Adam, with one optimiser of groups and one of its own."""
    torch.manual_seed(0)
    scene = GaussianScene(7, sh_degree=1).double()
    for parameter in scene.parameters():
        parameter.data += torch.randn_like(parameter)
    one = torch.optim.Adam(
        [{"params": [p], "lr": 1e-2, "name": n} for n, p in scene.named_parameters() if n != "shN"]
    )
    two = torch.optim.AdamW([scene.shN], amsgrad=True)
    for _ in range(3):
        sum((p * torch.randn_like(p)).sum() for p in scene.parameters()).backward()
        for optimizer in (one, two):
            optimizer.step()
            optimizer.zero_grad()
    return scene, [one, two]


def remember(scene, optimizers):
    """Values and Adam's state by name."""
    state = {}
    for name, parameter in scene.named_parameters():
        holder = next(o for o in optimizers if parameter in o.state)
        state[name] = {k: v.clone() for k, v in holder.state[parameter].items()}
    return {n: p.detach().clone() for n, p in scene.named_parameters()}, state


def check_state(scene, optimizers, old, origin):
    """Moments are bitwise those of the rows they come from or 0, and the step is the old one."""
    values, state = remember(scene, optimizers)
    held = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in scene.parameters()}
    assert {id(p) for o in optimizers for p in o.state} == {id(p) for p in scene.parameters()}
    for name in NAMES:
        assert len(values[name]) == len(origin) == scene.num_gaussians
        assert state[name].keys() == old[name].keys()
        assert "exp_avg_sq" in state[name]
        for key, value in state[name].items():
            if key == "step":
                assert torch.equal(value, old[name]["step"])
                assert value == 3
                continue
            assert value.shape == values[name].shape
            for row, source in enumerate(origin):
                expected = old[name][key][source] if source >= 0 else torch.zeros_like(value[row])
                assert torch.equal(value[row], expected)
    return values


def test_keep(trained):
    scene, optimizers = trained
    values, state = remember(scene, optimizers)
    origin = scene.keep(torch.tensor([5, 0, 3]), optimizers)
    assert origin.tolist() == [5, 0, 3]
    new = check_state(scene, optimizers, state, [5, 0, 3])
    assert all(torch.equal(new[name], values[name][[5, 0, 3]]) for name in NAMES)
    scene.keep(torch.tensor([True, False, True]), optimizers)
    assert torch.equal(scene.means, values["means"][[5, 3]])


def test_clone(trained):
    scene, optimizers = trained
    values, state = remember(scene, optimizers)
    mask = torch.zeros(7, dtype=torch.bool)
    mask[[2, 6]] = True
    origin = scene.clone(mask, optimizers)
    assert origin.tolist() == [0, 1, 2, 3, 4, 5, 6, -1, -1]
    new = check_state(scene, optimizers, state, origin.tolist())
    rows = [0, 1, 2, 3, 4, 5, 6, 2, 6]
    assert all(torch.equal(new[name], values[name][rows]) for name in NAMES)


def test_append_asks_for_every_parameter(trained):
    scene, optimizers = trained
    _, state = remember(scene, optimizers)
    rows = {name: getattr(scene, name).detach()[:2] + 1 for name in NAMES}
    new = check_state(scene, optimizers, state, scene.append(rows, optimizers).tolist())
    assert all(torch.equal(new[name][7:], rows[name]) for name in NAMES)
    with pytest.raises(ValueError, match=r"values: got .*'quats'.*expected .*'means'"):
        scene.append({name: row for name, row in rows.items() if name != "means"}, optimizers)
    with pytest.raises(ValueError, match=r"values\['quats'\]: got \(2, 3\), expected \(2, 4\)"):
        scene.append(rows | {"quats": torch.zeros(2, 3)}, optimizers)


@pytest.mark.parametrize("revised", [False, True])
def test_split(trained, revised):
    scene, optimizers = trained
    values, state = remember(scene, optimizers)
    generator = torch.Generator().manual_seed(3)
    origin = scene.split(
        torch.tensor([4, 1]), optimizers, revised_opacity=revised, generator=generator
    )
    assert origin.tolist() == [0, 2, 3, 5, 6, -1, -1, -1, -1]
    new = check_state(scene, optimizers, state, origin.tolist())
    rows = [0, 2, 3, 5, 6, 4, 1, 4, 1]
    for name in ("quats", "sh0", "shN"):
        assert torch.equal(new[name], values[name][rows])
    for name in NAMES:
        assert torch.equal(new[name][:5], values[name][rows[:5]])
    shrunk = values["log_scales"][rows[5:]].exp() / 1.6
    torch.testing.assert_close(new["log_scales"][5:].exp(), shrunk)
    opacity = values["opacity_logits"][rows[5:]].sigmoid()
    if revised:
        opacity = 1 - (1 - opacity).sqrt()
    torch.testing.assert_close(new["opacity_logits"][5:].sigmoid(), opacity)


def test_three_parts_let_through_what_one_did():
    """In the centre; their places are those of the generator, whatever torch's own has drawn."""
    places = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        scene = GaussianScene.from_points(torch.zeros(2, 3), torch.zeros(2, 3), init_opacity=0.7)
        generator = torch.Generator().manual_seed(5)
        options = {"parts": 3, "shrink": 2.0, "revised_opacity": True, "generator": generator}
        before = scene.scales.detach().clone()
        assert scene.split(torch.tensor([True, True]), **options).tolist() == [-1] * 6
        places.append(scene.means.detach())
        torch.testing.assert_close((1 - scene.opacities) ** 3, torch.full((6,), 0.3))
        torch.testing.assert_close(scene.scales.detach(), before.repeat(3, 1) / 2)
    assert torch.equal(*places)


def test_parts_are_drawn_from_what_is_split():
    """Their places have the mean and the covariance of the Gaussian."""
    torch.manual_seed(0)
    scene = GaussianScene(1, sh_degree=0).double()
    scene.quats.data = torch.randn(1, 4, dtype=torch.float64)
    scene.log_scales.data = torch.tensor([[0.5, 0.1, 2.0]], dtype=torch.float64).log()
    mean, covariance = scene.means.detach()[0].clone(), scene.covariances().detach()[0]
    scene.split(torch.tensor([0]), parts=40000)
    drawn = scene.means.detach() - mean
    error = drawn.T @ drawn / 40000 - covariance
    variance = covariance.diagonal()
    bound = 5 * ((variance[:, None] * variance + covariance**2) / 40000).sqrt()
    assert (error.abs() < bound).all()
    assert (drawn.mean(0).abs() < 5 * (variance / 40000).sqrt()).all()


@pytest.mark.parametrize(("o", "n"), [(0.9, 3), (0.3, 7), (0.99, 51)])
def test_relocation_keeps_the_integral_along_a_line(o, n):
    opacity, shrink = relocated(
        torch.tensor([o], dtype=torch.float64), torch.tensor([n]), min_opacity=0.0
    )
    a, c = opacity.item(), shrink.item()
    assert 1 - (1 - a) ** n == pytest.approx(o, abs=1e-12)

    def held(x):
        return 1 - (1 - a * math.exp(-x * x / (2 * c * c))) ** n

    integral = 2 * integrate.quad(held, 0, 30, epsabs=1e-12, epsrel=1e-12)[0]
    assert integral == pytest.approx(o * math.sqrt(2 * math.pi), abs=1e-6)


def test_relocation_counts_at_most_51_and_keeps_an_opacity():
    many, most = (relocated(torch.tensor([0.9]), torch.tensor([n])) for n in (80, 51))
    assert torch.equal(many[0], most[0])
    assert torch.equal(many[1], most[1])
    assert relocated(torch.tensor([0.01]), torch.tensor([9]))[0].item() == pytest.approx(0.005)
    one = relocated(torch.tensor([0.4], dtype=torch.float64), torch.tensor([1]))
    assert one[0].item() == pytest.approx(0.4)
    assert one[1].item() == pytest.approx(1)


def test_opacities_that_rounding_makes_one_have_finite_logits_after():
    scene = GaussianScene(3, sh_degree=0)
    scene.opacity_logits.data.fill_(18.0)
    assert (scene.opacities == 1).all()
    for counts in ([1], [2], [51]):
        opacity, shrink = relocated(torch.ones(1), torch.tensor(counts))
        assert 0 < opacity < 1
        assert 0 < shrink <= 1
    scene.relocate(torch.tensor([0, 0, 1]))
    scene.split(torch.tensor([2]), revised_opacity=True)
    assert scene.num_gaussians == 7
    assert scene.opacity_logits.isfinite().all()
    assert scene.log_scales.isfinite().all()
    assert scene.opacity_logits[:6].gt(4).all()


@pytest.mark.parametrize("appended", [False, True])
def test_relocate(trained, appended):
    scene, optimizers = trained
    values, state = remember(scene, optimizers)
    sources = torch.tensor([2, 5, 2])
    dead = None if appended else torch.tensor([6, 0, 3])
    origin = scene.relocate(sources, optimizers, dead=dead)
    if appended:
        expected, rows = [0, 1, -1, 3, 4, -1, 6, -1, -1, -1], [0, 1, 2, 3, 4, 5, 6, 2, 5, 2]
    else:
        expected, rows = [-1, 1, -1, -1, 4, -1, -1], [5, 1, 2, 2, 4, 5, 2]
    assert origin.tolist() == expected
    new = check_state(scene, optimizers, state, expected)
    for name in ("means", "quats", "sh0", "shN"):
        assert torch.equal(new[name], values[name][rows])
    copies = {2: 3, 5: 2}
    for row, source in enumerate(rows):
        opacity, log_scales = (
            values["opacity_logits"][source].sigmoid(),
            values["log_scales"][source],
        )
        if expected[row] < 0:
            a, c = relocated(opacity[None], torch.tensor([copies[source]]))
            opacity, log_scales = a[0], log_scales + c.log()
        torch.testing.assert_close(new["opacity_logits"][row].sigmoid(), opacity)
        torch.testing.assert_close(new["log_scales"][row], log_scales)


def test_no_relocated_opacity_falls_below_what_is_asked():
    scene = GaussianScene.from_points(torch.zeros(1, 3), torch.zeros(1, 3), init_opacity=0.4)
    scene.relocate(torch.zeros(3, dtype=torch.long), min_opacity=0.25)
    torch.testing.assert_close(scene.opacities.detach(), torch.full((4,), 0.25))


def test_relocate_refuses_rows_that_are_both(trained):
    scene, _ = trained
    with pytest.raises(ValueError, match="dead: got rows that are sources"):
        scene.relocate(torch.tensor([1, 2]), dead=torch.tensor([2, 3]))
    with pytest.raises(ValueError, match="dead: got 1 rows, expected 2"):
        scene.relocate(torch.tensor([1, 2]), dead=torch.tensor([3]))


def test_reset_opacities(trained):
    scene, optimizers = trained
    values, state = remember(scene, optimizers)
    scene.reset_opacities(0.4, optimizers)
    torch.testing.assert_close(scene.opacities, values["opacity_logits"].sigmoid().clamp(max=0.4))
    moments = remember(scene, optimizers)[1]
    assert not moments["opacity_logits"]["exp_avg"].any()
    assert not moments["opacity_logits"]["exp_avg_sq"].any()
    assert moments["opacity_logits"]["step"] == 3
    assert torch.equal(moments["means"]["exp_avg"], state["means"]["exp_avg"])


def test_opacities_above_the_ceiling_come_down_to_it():
    scene = GaussianScene(3, sh_degree=0)
    scene.opacity_logits.data = torch.tensor([-3.0, -0.2, 4.0])
    scene.reset_opacities(0.4)
    low = 1 / (1 + math.exp(3))
    torch.testing.assert_close(scene.opacities.detach(), torch.tensor([low, 0.4, 0.4]))


def test_training_goes_on_after_an_edit(trained):
    """Adam's next step moves kept rows as it would have without the edit."""
    scene, optimizers = trained
    other, twins = trained_copy(scene, optimizers)
    scene.clone(torch.tensor([1]), optimizers)
    for one, two in ((scene, optimizers), (other, twins)):
        (one.means[:7] ** 2).sum().backward()
        two[0].step()
    assert torch.equal(scene.means[:7], other.means)
    assert torch.equal(scene.means[7], other.means[1]) is False


def trained_copy(scene, optimizers):
    import copy

    return copy.deepcopy((scene, optimizers))


def test_rows_of_a_users_own_parameter_go_along():
    scene = GaussianScene(4)
    scene.register_parameter("mask_logits", torch.nn.Parameter(torch.arange(4.0)))
    scene.clone(torch.tensor([3]))
    assert scene.mask_logits.tolist() == [0, 1, 2, 3, 3]
    scene.means.requires_grad_(False)
    scene.keep(torch.tensor([4, 2]))
    assert scene.mask_logits.tolist() == [3, 2]
    assert not scene.means.requires_grad


@pytest.mark.parametrize(
    "rows", [torch.zeros(3, dtype=torch.bool), torch.zeros(2), torch.zeros(1, 1, dtype=torch.long)]
)
def test_rows_of_another_kind_are_refused(rows):
    with pytest.raises(ValueError, match="rows: got"):
        GaussianScene(4).keep(rows)


def test_an_empty_scene_grows():
    scene = GaussianScene(0, sh_degree=0)
    optimizer = torch.optim.Adam(scene.parameters())
    sum(p.sum() for p in scene.parameters()).backward()
    optimizer.step()
    rows = {name: p.detach() for name, p in GaussianScene(2, sh_degree=0).named_parameters()}
    assert scene.append(rows, optimizer).tolist() == [-1, -1]
    assert not optimizer.state[scene.means]["exp_avg"].any()
    assert scene.split(torch.tensor([], dtype=torch.long), optimizer).tolist() == [0, 1]


def test_a_state_of_another_size_is_taken_over_whole_or_not_at_all():
    scene, other = GaussianScene(4), GaussianScene(9)
    state = {name: value for name, value in other.state_dict().items() if name != "shN"}
    with pytest.raises(RuntimeError, match="size mismatch for means"):
        scene.load_state_dict(state, strict=False)
    assert len(scene.shN) == scene.num_gaussians == 4
    for parameter in scene.parameters():
        parameter.grad = torch.ones_like(parameter)
    scene.load_state_dict(other.state_dict())
    assert torch.equal(scene.means, other.means)
    assert all(parameter.grad is None for parameter in scene.parameters())
