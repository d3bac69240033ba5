"""`torchzoo info`: names, what is shown, and examples that run when pasted."""

import json

import pytest

from torchzoo import catalogue, registry
from torchzoo.cli import _docstrings

CARDS = registry.cards()


def test_a_paper_that_is_not_built(run):
    paper = next(paper for paper in catalogue.papers() if not paper.units)
    code, out, err = run("info", str(paper.number), "--json")
    about = json.loads(out)
    assert (code, err) == (0, "")
    assert about["units"] == []
    assert about["paper"]["title"] == paper.title
    assert (about["paper"]["built"], about["paper"]["verdict"]) == (False, None)
    _, out, _ = run("info", str(paper.number))
    assert "not built yet" in out


@pytest.mark.parametrize("name", ["69", "dense-to-sparse", "dense_to_sparse"])
def test_number_and_slug_name_the_same_paper(run, name):
    about = json.loads(run("info", name, "--json")[1])
    assert about["paper"]["number"] == 69


def test_a_unit_by_class_name_and_with_its_family(run):
    about = json.loads(run("info", "moe.TopKGate", "--json")[1])
    assert about == json.loads(run("info", "TopKGate", "--json")[1])
    (unit,) = about["units"]
    assert (unit["name"], unit["key"], unit["kind"]) == ("TopKGate", "moe.TopKGate", "class")
    assert unit["path"] == "torchzoo.moe.gates:TopKGate"
    assert "num_experts: int" in unit["signature"]
    assert "(..., dim)" in unit["shape"]
    _, out, _ = run("info", "moe.TopKGate")
    for part in (unit["signature"], unit["example"]):
        assert part.rstrip() in "\n".join(line.rstrip() for line in out.splitlines())


def test_claims_result_and_exemptions_are_shown(run, monkeypatch):
    result = {
        "verdict": "partly",
        "rule": "r",
        "criteria": [{"text": "beats [it]", "holds": False, "measured": "0.4"}],
        "measurements": [],
        "baseline": "b",
        "setup": "s",
        "budget": "full",
        "seeds": [0, 1],
        "seconds": 12.4,
    }
    claim = {"statement": "sums to one", "tolerance": 1e-6, "status": "holds", "test": "t::t"}
    card = registry.card("moe.TopKGate")
    exempt = registry.Card(card.cls, 146, card.example, {"stateful": "it [counts] calls"})
    monkeypatch.setattr(catalogue, "recorded_result", lambda _: result)
    monkeypatch.setattr(catalogue, "claims", lambda _: [claim])
    monkeypatch.setattr(catalogue.Paper, "built", True)
    monkeypatch.setitem(registry._cards, "moe.TopKGate", exempt)
    about = json.loads(run("info", "moe.TopKGate", "--json")[1])
    assert (about["paper"]["number"], about["paper"]["verdict"]) == (146, "partly")
    assert about["paper"]["claims"] == [claim]
    assert about["paper"]["result"]["criteria"] == result["criteria"]
    assert about["units"][0]["exempt"] == {"stateful": "it [counts] calls"}
    _, out, _ = run("info", "moe.TopKGate")
    for part in (
        "✗ fails  beats [it]",
        "✓ holds  sums to one",
        "within 1e-06",
        "it [counts] calls",
    ):
        assert part in out


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.key)
def test_every_example_runs_when_pasted(card):
    code = _docstrings.example_code(card.cls)
    assert card.name in code
    exec(compile(code, card.key, "exec"), {"__name__": "pasted"})


def test_every_registered_module_of_the_zoo_has_signature_and_shape(run):
    for card in CARDS:
        (unit,) = json.loads(run("info", card.key, "--json")[1])["units"]
        assert unit["signature"].startswith(f"{card.name}(")
        assert unit["shape"], card.key


class Sample:
    """Says what it is.

    Two lines of it.

    Example:
        >>> for n in range(2):
        ...     total = n
        >>> Sample(total)
        1
        >>> json.dumps({"a": Sample.__name__})
        '{"a": "Sample"}'
    """

    def __init__(self, n: "int | None" = 3, *, mode: str = "it's", **rest: float):
        self.n = n


def test_signature_and_example_are_python():
    assert _docstrings.signature(Sample, width=100) == (
        'Sample(n: int | None = 3, *, mode: str = "it\'s", **rest: float)'
    )
    assert _docstrings.signature(Sample, width=20).splitlines() == [
        "Sample(",
        "    n: int | None = 3,",
        "    *,",
        '    mode: str = "it\'s",',
        "    **rest: float,",
        ")",
    ]
    assert _docstrings.summary(Sample) == "Says what it is."
    assert _docstrings.example_code(Sample).splitlines() == [
        f"from {__name__} import Sample",
        "import json",
        "",
        "for n in range(2):",
        "    total = n",
        "",
        "Sample(total)  # 1",
        """json.dumps({"a": Sample.__name__})  # '{"a": "Sample"}'""",
    ]
    assert _docstrings.example_code(test_signature_and_example_are_python) == ""
