"""`torchzoo cite`: BibTeX from the catalogue and the units' sources."""

import json

import pytest

from torchzoo import catalogue
from torchzoo.cli.cite import Source, bibtex, parse_source


@pytest.mark.parametrize(
    ("text", "authors", "year"),
    [
        ('A. Turing and B. Lee. "A Study: of Heads". 2024.', ("A. Turing", "B. Lee"), 2024),
        ("Turing, Lovelace, A study,\n  1999, eq. (3).", ("Turing", "Lovelace"), 1999),
        ('Nie et al., "Other", 2021; Doe, Roe and Poe, "A Study: of heads", 2023, for the rest.',
         ("Doe", "Roe", "Poe"), 2023),
        ('Nie et al., "Other", 2021. A. B. Doe et al., A Study of Heads, 2022.',
         ("A. B. Doe", "others"), 2022),
        ("Doe & Roe, A Study, 2020", ("Doe", "Roe"), 2020),
    ],
)  # fmt: skip
def test_sources_are_read(text, authors, year):
    assert parse_source(text, "A Study: of Heads") == Source(authors, year)


@pytest.mark.parametrize("text", ["", "Doe, Something Else, 2020", "A Study, 2020", "Doe, A Study"])
def test_a_source_that_does_not_say_gives_none(text):
    assert parse_source(text, "A Study: of Heads") is None


def test_bibtex_escapes_and_says_what_is_missing(fake):
    paper = catalogue.find(903)
    assert bibtex(paper, Source(("A. Doe", "others"), 2020)) == (
        "@misc{edges-100-of-them,\n"
        "  author = {A. Doe and others},\n"
        "  title  = {{Edges \\& 100\\% of \\{them\\}}},\n"
        "  year   = {2020},\n"
        "}"
    )
    assert "note  = {Authors and year are not recorded" in bibtex(paper, None)


def test_a_built_paper_has_authors_and_year(run):
    code, out, err = run("cite", "DenseToSparseGate", "--json")
    about = json.loads(out)
    assert (code, err) == (0, "")
    assert (about["number"], about["year"]) == (69, 2024)
    assert about["authors"][0].endswith("Nguyen")
    assert about["title"] in about["bibtex"]
    assert about["torchzoo"].startswith("@misc{torchzoo,")
    _, out, _ = run("cite", "69")
    assert out == f"{about['bibtex']}\n\n{about['torchzoo']}\n"


def test_every_built_paper_has_a_source(run):
    for paper in catalogue.papers():
        if paper.built:
            assert json.loads(run("cite", paper.number, "--json")[1])["year"], paper.title


def test_an_engine_piece_has_nothing_to_cite(run):
    code, _, err = run("cite", "moe.SoftmaxGate")
    assert (code, err.startswith("error: moe.SoftmaxGate is an engine piece")) == (2, True)
