"""`torchzoo list` and `torchzoo search`."""

import json

import pytest

from torchzoo import catalogue

KEYS = ["number", "title", "family", "summary", "claim", "units", "experiment", "built", "verdict"]


def test_json_is_every_paper_once(run):
    code, out, err = run("list", "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert [paper["number"] for paper in found] == list(range(1, 172))
    assert all(list(paper) == KEYS for paper in found)
    assert [paper["built"] for paper in found] == [paper.built for paper in catalogue.papers()]


def test_coverage_is_computed_from_what_imports(run, fake):
    _, out, _ = run("list")
    assert [line.split() for line in out.splitlines()[1:3]] == [
        ["gp", "0/1", "–"],
        ["moe", "0/2", "–"],
    ]
    one, two, three = catalogue.papers()
    built = catalogue.Paper(**{**vars(one), "units": ("fakezoo.coins.coin:trial",)})
    torn = catalogue.Paper(**{**vars(two), "units": ("fakezoo.coins.nothing:X",)})
    catalogue.papers = lambda: (built, torn, three)
    _, out, _ = run("list")
    assert out.splitlines()[2].split() == ["moe", "1/2", "901", "coin"]
    assert "1 of 3 papers built" in out
    _, out, _ = run("list", "--built", "--json")
    assert [paper["number"] for paper in json.loads(out)] == [901]
    _, out, _ = run("list", "--built")
    assert "Heads" in out
    assert "Tails" not in out


def test_family_lists_its_papers(run):
    code, out, _ = run("list", "--family", "ssm")
    mine = [paper for paper in catalogue.papers() if paper.family == "ssm"]
    assert code == 0
    table, _, footer = out.rpartition("\n\n")
    starts = [line[:3].strip() for line in table.splitlines()[1:]]
    assert [int(start) for start in starts if start] == [paper.number for paper in mine]
    assert f"of {len(mine)} papers built" in footer
    _, out, _ = run("list", "--family", "ssm", "--json")
    assert [paper["title"] for paper in json.loads(out)] == [paper.title for paper in mine]


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("args", [["list"], ["list", "--family", "moe"], ["search", "gaussian"]])
def test_tables_keep_to_the_terminal(run, monkeypatch, args, width):
    monkeypatch.setenv("COLUMNS", str(width))
    _, out, _ = run(*args)
    assert max(map(len, out.splitlines())) <= width
    assert "…" not in out


def test_an_unknown_family_suggests_the_nearest(run):
    assert run("list", "--family", "mo") == (2, "", "error: no family 'mo'; did you mean moe?\n")


def test_search_finds_papers_that_hold_every_word(run):
    code, out, err = run("search", "mixture", "experts", "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert {41, 56, 69, 123, 146} & {paper["number"] for paper in found} >= {41, 69, 123, 146}
    assert [paper["number"] for paper in found] == [
        paper.number for paper in catalogue.search("mixture experts")
    ]
    assert all(list(paper) == KEYS for paper in found)
    _, table, _ = run("search", "mixture experts")
    assert "Mixture" in table


def test_search_without_a_hit_says_so_on_stderr(run):
    code, out, err = run("search", "zzgatingzz", "--json")
    assert (code, json.loads(out)) == (0, [])
    assert err == "no paper holds 'zzgatingzz'; did you mean Gating, Integrating, Grasping?\n"
    assert run("search", " ") == (1, "", "error: TEXT is empty; give a word to look for\n")
