"""CETT against explicit sums, its thresholds against the grid."""

import pytest
import torch

from torchzoo.sparsity import cett, cett_curve, cett_thresholds, importance


def draw(n=5, f=8, d=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(n, f, generator=generator, dtype=torch.float64)
    return h, torch.randn(d, f, generator=generator, dtype=torch.float64)


def by_hand(h, w_down, tau):
    """CETT of every token from its definition; None where the output is 0."""
    values = []
    for token in h.tolist():
        whole, tail = torch.zeros(len(w_down)).double(), torch.zeros(len(w_down)).double()
        for i, value in enumerate(token):
            whole += value * w_down[:, i]
            if abs(value) * w_down[:, i].norm() <= tau:
                tail += value * w_down[:, i]
        values.append((tail.norm() / whole.norm()).item() if whole.norm() > 0 else None)
    return values


@pytest.mark.claim(
    145, "CETT equals the explicit sum; nothing dropped gives 0, all dropped 1", tolerance=1e-12
)
def test_cett_equals_the_sum():
    h, w = draw()
    for tau in (0.0, 0.5, 1.0, 2.0, 100.0):
        keep = importance(h, w) > tau
        got = cett(h, w, keep)
        torch.testing.assert_close(got.tolist(), by_hand(h, w, tau), atol=1e-12, rtol=0)
        curve = cett_curve(h, w, torch.tensor([tau], dtype=torch.float64))
        torch.testing.assert_close(curve[0], got.mean(), atol=1e-12, rtol=0)
    everything = torch.ones_like(h, dtype=torch.bool)
    assert cett(h, w, everything).tolist() == [0.0] * 5
    torch.testing.assert_close(cett(h, w, ~everything), torch.ones(5).double())


def test_the_mean_is_one_of_ratios_and_tokens_can_be_left_out():
    h, w = draw(n=40, f=30)
    h[:20] *= 100  # a ratio of means would listen to these alone
    taus = importance(h, w).flatten().quantile(torch.tensor([0.1, 0.6, 0.9]).double())
    expected = [torch.tensor(by_hand(h, w, tau)).double().mean() for tau in taus]
    torch.testing.assert_close(cett_curve(h, w, taus), torch.stack(expected))
    some = torch.arange(40) % 3 == 0
    expected = [torch.tensor(by_hand(h[some], w, tau)).double().mean() for tau in taus]
    torch.testing.assert_close(cett_curve(h, w, taus, token_mask=some), torch.stack(expected))


@pytest.mark.claim(145, "Tokens whose output is 0 are marked, and left out of the mean")
def test_silent_tokens():
    h, w = draw()
    silent = torch.cat([h, torch.zeros(2, 8).double()])
    keep = importance(silent, w) > 1.0
    assert cett(silent, w, keep).isnan().tolist() == [False] * 5 + [True] * 2
    taus = torch.tensor([0.3, 1.0]).double()
    torch.testing.assert_close(cett_curve(silent, w, taus), cett_curve(h, w, taus))
    with pytest.raises(ValueError, match="output is not 0"):
        cett_curve(torch.zeros(2, 8).double(), w, taus)


def test_the_curve_does_not_depend_on_the_chunks(monkeypatch):
    h, w = draw(n=9, f=12)
    taus = torch.linspace(0, 3, 7).double()
    whole = cett_curve(h, w, taus)
    monkeypatch.setattr("torchzoo.sparsity.tail_error._CHUNK", 40)
    torch.testing.assert_close(cett_curve(h, w, taus), whole)
    torch.testing.assert_close(cett_curve(h.float(), w.float(), taus), whole, atol=1e-6, rtol=0)
    assert cett_curve(h.bfloat16(), w.bfloat16(), taus).dtype == torch.float64


@pytest.mark.claim(
    145,
    "With orthogonal columns of one norm CETT² is the dropped share of Σ h²",
    tolerance=1e-6,
)
def test_orthogonal_columns():
    h, _ = draw(n=6, f=8)
    w = 2.5 * torch.linalg.qr(draw(d=10)[1])[0].double()
    for tau in (0.5, 1.5, 3.0):
        keep = 2.5 * h.abs() > tau
        share = torch.where(keep, 0.0, h).square().sum(-1) / h.square().sum(-1)
        torch.testing.assert_close(cett(h, w, keep).square(), share, atol=1e-6, rtol=0)


@pytest.mark.claim(
    145,
    "CETT and mask don't change when columns grow by what their neurons shrink",
    tolerance=1e-12,
)
def test_scale_invariance():
    h, w = draw(n=20, f=30)
    scales = torch.linspace(-2, 2, 30).double().exp()
    tau = cett_thresholds(h, w, 0.3)
    moved = cett_thresholds(h / scales, w * scales, 0.3)
    assert tau == pytest.approx(moved, rel=1e-9)
    tau += 1e-9
    keep = importance(h, w) > tau
    again = importance(h / scales, w * scales) > tau
    assert torch.equal(keep, again)
    assert not torch.equal(h.abs() > 0.5, (h / scales).abs() > 0.5)  # one threshold on abs(h) does
    torch.testing.assert_close(cett(h, w, keep), cett(h / scales, w * scales, again))


@pytest.mark.claim(
    145, "A threshold meets its target and the next candidate does not, or there is none"
)
@pytest.mark.parametrize("target", [0.0, 0.01, 0.1, 0.3, 0.7])
def test_thresholds_are_the_largest(target):
    h, w = draw(n=30, f=40)
    count = 500
    m = importance(h, w)
    grid = torch.linspace(m.min().item(), m.flatten().quantile(0.99).item(), count).double()
    tau = cett_thresholds(h, w, target, num_candidates=count)
    error = torch.stack([cett(h, w, m > t).mean() for t in grid])
    met = grid[error <= target]
    if len(met) == 0:
        assert tau == 0.0
    else:
        assert tau == pytest.approx(met.max().item(), abs=(grid[1] - grid[0]).item() * 0.5)
        assert cett(h, w, m > tau).mean() <= target


@pytest.mark.claim(145, "A target that no candidate meets gives 0, not the largest candidate")
def test_a_target_out_of_reach():
    h, w = torch.tensor([[1.0, 1.0, 1.0]]), torch.eye(3)
    assert cett_thresholds(h, w, 0.5) == 0.0
    assert cett_thresholds(torch.tensor([[1.0, 5.0]]), torch.eye(2), 0.5) >= 1.0


@pytest.mark.claim(145, "At a target of 0 the zeros of relu are dropped, and nothing else")
def test_zeros_are_always_in_the_tail():
    h, w = draw(n=30, f=40)
    h = h.relu()
    tau = cett_thresholds(h, w, 0.0)
    assert torch.equal(importance(h, w) > tau, h != 0)


def test_bad_calls_are_refused():
    h, w = draw()
    for call, named in (
        (lambda: cett(h, w[:, :7], h > 0), "h, w_down"),
        (lambda: cett(h, w, h), "mask_keep"),
        (lambda: cett_curve(h[0], w, h[0]), "h, w_down"),
        (lambda: cett_curve(h, w, h[0], token_mask=h[0] > 0), "token_mask"),
        (lambda: cett_thresholds(h, w, 1.0), "target"),
        (lambda: cett_thresholds(h, w, -0.1), "target"),
        (lambda: cett_thresholds(h, w, 0.1, num_candidates=1), "num_candidates"),
    ):
        with pytest.raises(ValueError, match=named):
            call()
