"""Benchmarks: ratios, spreads and shares computed from known times; contenders that agree."""

import io
import json

import pytest
import torch

from torchzoo import benchmark
from torchzoo.benchmark import Bench, Case
from torchzoo.experiments.ops import delta_linear_step, grouped_mm, moe_layer, sparse_ffn

LIMITS = {"bytes_per_s": 1e9, "flops_per_s": 1e10}


@pytest.fixture
def clock(monkeypatch):
    """Contenders that return how long they pretend to take, and a machine of known limits."""
    monkeypatch.setattr(benchmark, "_seconds", lambda call, device: call())
    monkeypatch.setattr(benchmark, "machine_limits", lambda device: LIMITS)


@pytest.fixture(autouse=True)
def no_warm_up(monkeypatch):
    monkeypatch.setattr(benchmark, "WARM_UP", 0.0)


def case(name="small", bar=2.0, against=None, **seconds):
    times = {
        who: iter(value * 1000) if isinstance(value, list) else iter([value] * 1000)
        for who, value in seconds.items()
    }
    calls = {who: (lambda it=it: next(it)) for who, it in times.items()}
    return Case(
        name, lambda device: calls, flops=4e6, bytes=1e6, size=4e6, bar=bar, against=against
    )


@pytest.mark.usefixtures("clock")
def test_ratio_is_of_medians_against_the_best_peer():
    row = case(torchzoo=[0.002, 0.002, 0.004], slow=0.009, fast=0.005)
    result = benchmark.run(Bench("op", [row]), rounds=9)
    found = result["cases"][0]
    assert found["best_peer"] == "fast"
    assert found["ratio"] == pytest.approx(2.5)
    assert found["seconds"]["torchzoo"]["median"] == 0.002
    assert found["seconds"]["torchzoo"]["high"] == pytest.approx(0.004)
    assert found["gflops_per_s"] == pytest.approx(2.0)
    assert found["gbytes_per_s"] == pytest.approx(0.5)
    assert found["share_of_limit"] == pytest.approx(0.5)  # 1 MB at 1 GB/s is 1 ms of 2 ms
    assert json.loads(json.dumps(result)) == result


def test_peak_memory_is_what_a_call_holds_at_once():
    def hold(count):
        kept = [torch.ones(2**22) for _ in range(count)]  # 16 MiB each
        return kept[:1]

    device = torch.device("cpu")
    peaks = [benchmark.peak_bytes(lambda n=n: hold(n), device) for n in (1, 4)]
    if None in peaks:
        pytest.skip("the system does not count a process's pages")
    assert peaks[0] == pytest.approx(16 * 2**20, abs=4 * 2**20)
    assert peaks[1] == pytest.approx(64 * 2**20, abs=4 * 2**20)


def test_memory_is_compared_with_the_leanest_peer():
    peaks = {"torchzoo": 2**20, "fat": 5 * 2**20, "lean": 3 * 2**20}
    assert benchmark._memory(peaks) == "1 MiB, peers 3 MiB"
    assert benchmark._memory(peaks | {"torchzoo": None}) == ""


@pytest.mark.usefixtures("clock")
def test_a_bar_may_name_its_peer():
    row = case(torchzoo=0.002, slow=0.009, fast=0.005, against="slow")
    result = benchmark.run(Bench("op", [row]))
    found = result["cases"][0]
    assert (found["best_peer"], found["bar_peer"]) == ("fast", "slow")
    assert found["ratio"] == pytest.approx(2.5)
    assert found["bar_ratio"] == pytest.approx(4.5)
    (asked,) = benchmark.table(result).columns[4].cells
    assert asked == "2x slow: 4.50x"


@pytest.mark.usefixtures("clock")
def test_cases_are_chosen_by_name_and_progress_is_told():
    cases = [case("one", torchzoo=1.0, peer=1.0), case("two", torchzoo=1.0, peer=1.0)]
    seen = []
    result = benchmark.run(
        Bench("op", cases), only=["two"], progress=lambda *step: seen.append(step)
    )
    assert [row["name"] for row in result["cases"]] == ["two"]
    assert seen == [(0, 1, "two"), (1, 1, "")]


@pytest.mark.usefixtures("clock")
def test_table_and_plot(tmp_path):
    from rich.console import Console

    result = benchmark.run(
        Bench("op", [case(torchzoo=0.001, peer=0.003), case("big", torchzoo=0.004, peer=0.002)])
    )
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(benchmark.table(result))
    text = console.export_text()
    assert "3.00x" in text
    assert "0.50x" in text
    assert "peer 3 ms (3-3)" in text
    benchmark.save_plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_machine_limits_are_of_this_machine():
    limits = benchmark.machine_limits(torch.device("cpu"))
    assert 1e8 < limits["bytes_per_s"] < 1e13
    assert 1e8 < limits["flops_per_s"] < 1e14


def test_grouped_contenders_agree():
    for backward in (False, True):
        calls = grouped_mm.contenders(torch.device("cpu"), [3, 0, 5], 16, 8, backward)
        results = {name: call() for name, call in calls.items()}
        assert set(results) >= {"torchzoo", "loop"}
        for found in results.values():
            torch.testing.assert_close(found, results["loop"], rtol=1e-4, atol=1e-4)


def test_moe_contenders_agree():
    calls = moe_layer.contenders(torch.device("cpu"), tokens=12, dim=8, hidden=16, experts=4)
    found = {name: call() for name, call in calls.items()}
    assert set(found) >= {"torchzoo", "loop", "torch grouped_mm"}
    for name, (dx, drouter, *rest) in found.items():
        torch.testing.assert_close(dx, found["torchzoo"][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(drouter, found["torchzoo"][1], rtol=1e-4, atol=1e-5)
        total = sum(float(gradient.square().sum()) for gradient in rest)
        ours = sum(float(gradient.square().sum()) for gradient in found["torchzoo"][2:])
        assert total == pytest.approx(ours, rel=1e-4), name


def test_delta_contenders_agree():
    calls = delta_linear_step.contenders(torch.device("cpu"), 64, 0.1)
    torch.testing.assert_close(calls["torchzoo"](), calls["dense"](), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("module", [grouped_mm, delta_linear_step, moe_layer, sparse_ffn])
def test_every_definition_names_what_is_asked_for(module):
    bench = module.BENCH
    assert bench.op == module.__name__.rpartition(".")[2]
    assert len({case.name for case in bench.cases}) == len(bench.cases)
    assert all(case.flops > 0 and case.bytes > 0 for case in bench.cases)
    assert any(case.bar for case in bench.cases)
