"""The shipped catalogue, looking things up in it, and the reader on broken rows."""

import json
import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchzoo.catalogue import (
    Paper,
    families,
    find,
    papers,
    parse,
    recorded_result,
    search,
    suggest,
)
from torchzoo.errors import CatalogueError, UnknownNameError

FAMILIES = {
    "activations", "attention", "bayes", "calibration", "circuits", "diffusion", "generative",
    "gp", "infinite", "layers", "mixtures", "moe", "neuro", "pde", "robustness", "sparsity",
    "splatting", "ssm", "structure", "training", "transport", "vision",
}  # fmt: skip
KEYS = ("number", "title", "family", "summary", "claim", "units", "experiment")
REQUIRED = KEYS[:5]
BUILT = [paper for paper in papers() if paper.units or paper.experiment]


# The shipped rows


def test_rows_are_numbered_1_to_171() -> None:
    assert [paper.number for paper in papers()] == list(range(1, 172))


def test_families_are_the_known_ones() -> None:
    assert set(families()) == FAMILIES
    assert list(families()) == sorted(FAMILIES)


def test_titles_are_present_and_unique() -> None:
    titles = Counter(paper.title.strip().lower() for paper in papers())
    assert "" not in titles
    assert titles.most_common(1)[0][1] == 1


@pytest.mark.parametrize("paper", papers(), ids=lambda paper: str(paper.number))
def test_summary_and_claim_keep_to_form(paper: Paper) -> None:
    assert 60 <= len(paper.summary) <= 160
    assert 40 <= len(paper.claim) <= 200
    for text in (paper.summary, paper.claim):
        assert text == " ".join(text.split()), "stray white space"
        assert text[0].isupper() or text[0].isdigit()
        assert not text.endswith(".")
        assert "this paper" not in text.lower()
    assert paper.summary != paper.claim


@pytest.mark.parametrize("key", ["summary", "claim"])
def test_no_two_rows_share_a_run_of_eight_words(key: str) -> None:
    owner: dict[tuple[str, ...], int] = {}
    for paper in papers():
        words = re.findall(r"[a-z0-9]+", getattr(paper, key).lower())
        for run in zip(*(words[start:] for start in range(8)), strict=False):
            first = owner.setdefault(run, paper.number)
            assert first == paper.number, f"{first} and {paper.number} share {' '.join(run)!r}"


def test_slugs_and_unit_paths_are_unique() -> None:
    for names in (
        [paper.slug for paper in papers()],
        [unit for paper in papers() for unit in paper.units],
    ):
        assert [name for name, count in Counter(names).items() if count > 1] == []


@pytest.mark.parametrize("paper", BUILT, ids=lambda paper: paper.slug)
def test_built_rows_import(paper: Paper) -> None:
    assert paper.missing() == []
    assert paper.built
    for path in paper.units:
        assert path.startswith((f"torchzoo.{paper.family}.", "torchzoo.ops.")), path
    assert paper.experiment.startswith(f"torchzoo.experiments.{paper.family}.")


def test_unbuilt_rows_say_so() -> None:
    paper = next(paper for paper in papers() if not paper.units)
    assert not paper.built
    assert recorded_result(paper) is None


# Looking up


@pytest.mark.parametrize(
    ("key", "number"),
    [
        (69, 69),
        ("69", 69),
        (" 157 ", 157),
        ("gaussian-adaptive", 48),
        ("gaussian_adaptive", 48),
        ("GaussianAdaptiveAttention", 48),
        ("gaussianadaptiveattention", 48),
        ("DeltaMeter", 157),
        ("voronoi_loss", 69),
        ("Scalable Neural Network Kernels", 136),
        ("scalable neural network kernels", 136),
        ("scalable-neural-network-kernels", 136),
    ],
)
def test_find(key: str | int, number: int) -> None:
    assert find(key).number == number


@pytest.mark.parametrize("paper", papers(), ids=lambda paper: str(paper.number))
def test_every_paper_is_found_by_number_slug_and_title(paper: Paper) -> None:
    assert {find(paper.number), find(paper.slug), find(paper.title)} == {paper}


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("GausianAdaptiveAtention", "GaussianAdaptiveAttention"),
        ("dense-to-spars", "dense-to-sparse"),
        ("DeltaLiner", "DeltaLinear"),
    ],
)
def test_find_suggests_near_names(wrong: str, near: str) -> None:
    with pytest.raises(UnknownNameError, match=rf"{wrong}.*did you mean .*\b{near}\b"):
        find(wrong)


@pytest.mark.parametrize("number", [0, 172, "9999"])
def test_find_tells_the_range_of_numbers(number: int | str) -> None:
    with pytest.raises(UnknownNameError, match=f"no paper {number}; numbers run from 1 to 171"):
        find(number)


def test_find_without_a_near_name_suggests_nothing() -> None:
    with pytest.raises(UnknownNameError) as caught:
        find("@@@@")
    assert "did you mean" not in str(caught.value)


def test_search_wants_every_word_anywhere_in_the_row() -> None:
    assert [paper.number for paper in search("VORONOI_LOSS")] == [69]
    assert [paper.number for paper in search("delta 3 times video")] == [157]
    assert {paper.family for paper in search("splatting")} >= {"splatting"}
    assert {paper.number for paper in papers() if paper.family == "ssm"} <= {
        paper.number for paper in search("ssm")
    }
    assert search("temperature nosuchword") == []


def test_suggest_orders_by_nearness_and_keeps_the_shown_spelling() -> None:
    assert suggest("alphq", ["Gamma", "Alpha", "alphas"]) == "; did you mean Alpha, alphas?"
    assert suggest("zzz", ["Alpha"]) == ""


# The reader


def _row(number: int, **changes: Any) -> dict[str, Any]:
    row = {
        "number": number,
        "title": f"Title {number}",
        "family": "moe",
        "summary": "What it is",
        "claim": "What it claims",
        "units": ["torchzoo.moe.gates:Gate"],
        "experiment": "torchzoo.experiments.moe.gate",
    }
    return row | changes


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str):  # JSON leaves DEL bare, TOML wants it escaped
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else str(value)


def _catalogue(rows: list[Any]) -> str:
    return f"papers = {_toml(rows)}\n"


def test_reader_round_trips_and_orders_by_number() -> None:
    found = parse(_catalogue([_row(7), _row(3, units=[], experiment="")]))
    assert [paper.number for paper in found] == [3, 7]
    assert found[0].slug == "title-3"
    assert found[1] == Paper(
        7,
        "Title 7",
        "moe",
        "What it is",
        "What it claims",
        ("torchzoo.moe.gates:Gate",),
        "torchzoo.experiments.moe.gate",
    )
    assert (found[1].slug, found[1].unit_names) == ("gate", ("Gate",))


def test_units_and_experiment_may_be_left_out() -> None:
    row = {key: value for key, value in _row(1).items() if key in REQUIRED}
    assert (parse(_catalogue([row]))[0].units, parse(_catalogue([row]))[0].experiment) == ((), "")


_NOT_TEXT: st.SearchStrategy[Any] = st.one_of(
    st.integers(-9, 9), st.booleans(), st.floats(width=16), st.just([]), st.just({"a": 1})
)
_NOT_NUMBER: st.SearchStrategy[Any] = st.one_of(
    st.integers(max_value=0, min_value=-(10**9)),
    st.floats(width=16),
    st.booleans(),
    st.sampled_from(["3", "", [3], {"n": 3}, "\n"]),
)
_TORN_LINE = st.builds(
    "{}{}{}".format,
    st.sampled_from(["", "a", "word "]),
    st.sampled_from(["\n", "\r", "\r\n", "\u2028", "\x0b", "\x85"]),
    st.sampled_from(["", "b"]),
)
_BAD_UNITS = [
    "", "Gate", "torchzoo:Gate", "torch.nn:Linear", "torchzoo.moe", "torchzoo.moe:", ":Gate",
    "torchzoo.moe:1Gate", "torchzoo.moe:Gate.x", "torchzoo.moe:Gate\n", "torchzoo/moe:Gate",
]  # fmt: skip
_BAD_MODULES = ["torchzoo", "torch.nn", "torchzoo.moe:Gate", "torchzoo/moe", " ", "torchzoo.a-b"]


@st.composite
def _mutations(draw: st.DrawFn) -> dict[str, Any] | Any:
    """One row that was valid as number 2 and no longer is."""
    row = _row(2)
    kind = draw(st.sampled_from(["text", "number", "missing", "extra", "units", "path", "table"]))
    if kind == "text":
        key = draw(st.sampled_from(["title", "family", "summary", "claim"]))
        row[key] = draw(_NOT_TEXT | _TORN_LINE | st.sampled_from(["", "  ", "\t"]))
    elif kind == "number":
        row["number"] = draw(_NOT_NUMBER)
    elif kind == "missing":
        del row[draw(st.sampled_from(REQUIRED))]
    elif kind == "extra":
        name = draw(st.from_regex(r"[a-z_]{1,8}", fullmatch=True).filter(lambda n: n not in KEYS))
        row[name] = draw(_NOT_TEXT)
    elif kind == "units":
        row["units"] = draw(st.sampled_from(["torchzoo.moe.gates:Gate", 1, True, {"a": "b"}]))
        if draw(st.booleans()):
            row["units"] = [
                "torchzoo.moe.gates:Gate",
                draw(st.sampled_from(_BAD_UNITS) | _NOT_TEXT),
            ]
    elif kind == "path":
        row["experiment"] = draw(st.sampled_from(_BAD_MODULES) | _NOT_TEXT)
    else:
        return draw(_NOT_TEXT.filter(lambda value: not isinstance(value, dict)) | st.text())
    return row


@settings(deadline=None)
@given(row=_mutations(), before=st.integers(0, 4), after=st.integers(0, 3))
def test_a_broken_row_is_named(row: Any, before: int, after: int) -> None:
    good = [_row(number) for number in range(10, 10 + before + after)]
    text = _catalogue([*good[:before], row, *good[before:]])
    with pytest.raises(CatalogueError, match=rf"^papers\.toml row {before + 1}\b"):
        parse(text)


@settings(deadline=None)
@given(numbers=st.lists(st.integers(1, 99), min_size=1, max_size=6, unique=True), data=st.data())
def test_a_repeated_number_is_named(numbers: list[int], data: st.DataObject) -> None:
    twice = data.draw(st.sampled_from(numbers))
    place = data.draw(st.integers(numbers.index(twice) + 1, len(numbers)))
    rows = [_row(number) for number in numbers]
    rows.insert(place, _row(twice))
    with pytest.raises(CatalogueError, match=rf"row {place + 1} \(paper {twice}\): number .*twice"):
        parse(_catalogue(rows))


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "1.0", "1e3", "1979-05-27", "true"])
def test_a_number_that_is_no_integer_is_refused(number: str) -> None:
    text = _catalogue([_row(1), _row(2)]).replace("number = 2", f"number = {number}")
    with pytest.raises(CatalogueError, match="row 2: number must be a positive integer"):
        parse(text)


@pytest.mark.parametrize(
    "changes",
    [{"units": ["torchzoo.moe.gates:Gate", unit]} for unit in _BAD_UNITS]
    + [{"experiment": module} for module in _BAD_MODULES]
    + [{"family": family} for family in ("moe2", "mo e", "moé", "MOE", "m_o")],
    ids=str,
)
def test_a_malformed_path_or_family_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CatalogueError, match=rf"row 2 \(paper 2\): {next(iter(changes))} must be"):
        parse(_catalogue([_row(1), _row(2, **changes)]))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"title": 3}, "title must be one non-empty line of text, got 3"),
        ({"claim": "a\nb"}, "claim must be one non-empty line"),
        ({"family": "Moe"}, "family must be a lower-case word, got 'Moe'"),
        ({"colour": 1}, "unknown key 'colour'"),
        ({"units": ["x"]}, "units must be a list of 'torchzoo.module:Name'"),
        ({"experiment": "x"}, "experiment must be 'torchzoo.module', got 'x'"),
    ],
)
def test_the_message_says_what_came_and_what_was_expected(
    changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(CatalogueError, match=rf"papers\.toml row 2.*{re.escape(says)}"):
        parse(_catalogue([_row(1), _row(2, **changes)]))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "papers = 1",
        "[papers]\nnumber = 1",
        "paper = []",
        "[[papers]",
        "papers = [",
        "a = 1\na = 2",
        "number = " + "9" * 5000,
        "a = " + "[" * 20_000,
        "a = 2020-13-45",
    ],
    ids=lambda text: text[:20],
)
def test_a_broken_file_is_refused(text: str) -> None:
    with pytest.raises(CatalogueError, match=r"papers\.toml"):
        parse(text)


_TOKENS = st.sampled_from(
    ["[[papers]]", "papers", "number", "title", "family", "units", "=", "\n", '"', "'", '"""', "[",
     "]", "{", "}", ",", ".", "1", "-", "nan", "1979-05-27", "\\u", "#", " ", "moe"]
)  # fmt: skip


def _refusal(text: str) -> str | None:
    """The message of the catalogue's refusal, or None where the text is read."""
    try:
        found = parse(text)
    except CatalogueError as error:
        return str(error)
    assert all(isinstance(paper, Paper) for paper in found)
    return None


@settings(deadline=None)
@given(st.text() | st.lists(_TOKENS, max_size=40).map("".join))
def test_arbitrary_text_raises_nothing_else(text: str) -> None:
    assert (_refusal(text) or "papers.toml").startswith("papers.toml")


@settings(deadline=None)
@given(st.data())
def test_a_mangled_catalogue_raises_nothing_else(data: st.DataObject) -> None:
    text = _catalogue([_row(1), _row(2)])
    start = data.draw(st.integers(0, len(text)))
    stop = data.draw(st.integers(start, min(len(text), start + 20)))
    mangled = text[:start] + data.draw(st.text(max_size=5)) + text[stop:]
    assert (_refusal(mangled) or "papers.toml").startswith("papers.toml")
