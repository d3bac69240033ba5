"""Benchmarks of the splatting operators: their contenders agree, and bars name a contender."""

import pytest
import torch

from torchzoo import benchmark
from torchzoo.experiments.ops import hyper_condition, plas_sort, rasterize

CPU = torch.device("cpu")


def results(calls):
    return {name: call() for name, call in calls.items()}


def test_renderings_agree():
    found = results(rasterize.rendering(CPU, 300, 40, "reference"))
    image = found["torchzoo"]
    assert image.std() > 0.05
    torch.testing.assert_close(found["reference"], image, rtol=0, atol=2e-3)  # a cut-off apart
    assert (found["reference"] - image).abs().mean() < 1e-6


def test_gradients_agree():
    pulled = rasterize.backward(CPU, 300, 40)["torchzoo"]
    stepped = results(rasterize.steps(CPU, 300, 40, "one thread"))
    for gradients in (pulled(), pulled(), stepped["one thread"]):  # pulled as often as asked
        for found, expected in zip(gradients, stepped["torchzoo"], strict=True):
            assert torch.equal(found, expected)


def test_one_thread_is_one_and_all_are_given_back(monkeypatch):
    seen, threads = [], torch.get_num_threads()
    monkeypatch.setattr(rasterize, "step", lambda *_: seen.append(torch.get_num_threads()))
    torch.set_num_threads(2)
    try:
        results(rasterize.steps(CPU, 10, 16, "one thread"))
        assert seen == rasterize.IN_A_ROW * [2] + rasterize.IN_A_ROW * [1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_the_peak_is_of_as_many_pairs_as_were_blended(monkeypatch):
    seen = []
    composite = rasterize._splat_raster.splat_raster

    def watched(*inputs):
        found = composite(*inputs)
        seen.append((inputs, found))
        return found

    monkeypatch.setattr(rasterize._splat_raster, "splat_raster", watched)
    calls = rasterize.compositing(CPU, 2000, 64)
    seen.clear()
    results(calls)
    (ours, (*_, ours_last, _)), (_, (_, _, dense_t, last, _)) = seen
    assert (last == rasterize.DEEP).all()
    assert dense_t.sub(0.99**rasterize.DEEP).abs().max() < 1e-4  # each splat over every pixel
    lists = (ours[8], ours[9])
    pairs = rasterize._pairs(*ours[:3], lists, 64, ours_last)
    assert pairs == pytest.approx(sum(counted(*ours[:3], lists, ours_last)), abs=2)
    assert last.sum() == pytest.approx(pairs, abs=rasterize.DEEP * rasterize.TILE**2 / 2)


def counted(means, conics, opacities, lists, last):
    """Blended pairs, pixel by pixel."""
    for y in range(64):
        for x in range(64):
            begin = lists[0][y // 16 * 4 + x // 16]
            n = lists[1][begin : begin + last[0, y, x]].long()
            d = means[0, n] - torch.tensor([x + 0.5, y + 0.5])
            a, b, c = conics[0, n].unbind(1)
            q = a * d[:, 0] ** 2 + 2 * b * d.prod(1) + c * d[:, 1] ** 2
            yield int((opacities[0, n] * (-q / 2).exp() >= 1 / 255).sum())


@pytest.mark.parametrize("side", [7, 12])
def test_sorts_agree(side):
    found = results(plas_sort.sorting(CPU, side))
    assert torch.equal(found["torchzoo"], found["reference"])
    assert torch.equal(found["torchzoo"].sort().values, torch.arange(side**2))


def test_a_plain_sort_runs_the_formulation(monkeypatch):
    seen, body = [], plas_sort.formulation(plas_sort._plas_passes)
    monkeypatch.setattr(plas_sort, "formulation", lambda op: lambda *x: seen.append(op) or body(*x))
    calls = plas_sort.sorting(CPU, 6)
    calls["torchzoo"]()
    assert not seen
    calls["reference"]()
    assert seen


@pytest.mark.parametrize("block", [4, 16])
def test_passes_agree(block):
    found = results(plas_sort.passing(CPU, 16, block))
    for ours, plain in zip(found["torchzoo"], found["reference"], strict=True):
        assert torch.equal(ours, plain)
    assert found["torchzoo"][1][1] == plas_sort.DRAWS


@pytest.mark.parametrize("m", [1, 3])
def test_conditional_means_agree(m):
    forward = results(hyper_condition.contenders(CPU, 20, 5, m, False))
    gradients = results(hyper_condition.contenders(CPU, 20, 5, m, True))
    assert list(forward) == list(gradients) == ["torchzoo", "reference", "triangular", "covariance"]
    for name in forward:
        torch.testing.assert_close(forward[name], forward["torchzoo"], rtol=1e-3, atol=1e-4)
        shared = 3 if name == "covariance" else 5  # its other two are covariances
        for found, expected in zip(
            gradients[name][:shared], gradients["torchzoo"][:shared], strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("module", [rasterize, plas_sort, hyper_condition])
def test_definitions(module):
    bench = module.BENCH
    assert bench.op == module.__name__.rpartition(".")[2]
    assert len({case.name for case in bench.cases}) == len(bench.cases)
    assert all(case.flops > 0 and case.bytes > 0 for case in bench.cases)
    assert any(case.bar for case in bench.cases)


def test_each_case_has_the_peer_that_its_name_says():
    kinds = {tuple(case.name.split(",")[0].split(" against ")) for case in rasterize.BENCH.cases}
    assert len(kinds) == 6
    for what, peer in kinds:
        case = rasterize._case(what, peer, (20, 16), None)
        assert list(case.make(CPU)) == ["torchzoo", case.against] == ["torchzoo", peer]


def test_a_case_may_limit_its_rounds(monkeypatch):
    monkeypatch.setattr(benchmark, "_seconds", lambda call, device: call())
    monkeypatch.setattr(benchmark, "WARM_UP", 0.0)
    limits = {"bytes_per_s": 1.0, "flops_per_s": 1.0}
    monkeypatch.setattr(benchmark, "machine_limits", lambda device: limits)
    calls = {"torchzoo": lambda: 1.0, "peer": lambda: 2.0}
    few, every = (
        benchmark.Case(name, lambda device: calls, 1, 1, 1, rounds=rounds)
        for name, rounds in (("few", 3), ("every", None))
    )
    rows = benchmark.run(benchmark.Bench("op", [few, every]), rounds=7)["cases"]
    assert [row["rounds"] for row in rows] == [3, 7]
