"""The claim ledger, run on small suites of its own."""

import json

import pytest

SUITE = """
import pytest

@pytest.mark.claim(3, "one holds", tolerance=1e-6)
def test_holds():
    pass

@pytest.mark.claim(1, "some parameter fails")
@pytest.mark.parametrize("x", [0, 1, 2])
def test_merged(x):
    assert x != 1

@pytest.mark.claim(2, "every parameter holds or is skipped")
@pytest.mark.parametrize("x", [0, 1])
def test_partly(x):
    if x:
        pytest.skip("no need")

@pytest.mark.claim(2, "nothing ran")
@pytest.mark.skip(reason="needs more")
def test_skipped():
    assert False

@pytest.mark.claim(4, "known to fail")
@pytest.mark.xfail(strict=True)
def test_xfail():
    assert False

@pytest.mark.claim(5, "could not be set up")
def test_setup(broken):
    pass

@pytest.fixture
def broken():
    raise RuntimeError

def test_without_claim():
    pass
"""
# What a small suite does not need, and would take longer to import than to run.
LEAN = ["-p", "torchzoo.testing.ledger", "--assert=plain"]
LEAN += ["-p", "no:hypothesispytest", "-p", "no:pytest_cov", "-p", "no:anyio"]
STATUSES = {
    "some parameter fails": "refuted",
    "every parameter holds or is skipped": "holds",
    "nothing ran": "untested",
    "one holds": "holds",
    "known to fail": "refuted",
    "could not be set up": "untested",
}


@pytest.fixture
def run(pytester, monkeypatch):
    """Run the suite in a fresh folder with the plugin, and read the ledger."""
    monkeypatch.delenv("TORCHZOO_CLAIMS", raising=False)
    pytester.makepyfile(test_suite=SUITE)

    def run(*args, claims="claims.json"):
        options = ["--claims", claims] if claims else []
        result = pytester.runpytest_inprocess(*LEAN, *options, *args)
        path = pytester.path / "claims.json"
        text = path.read_text() if path.exists() else None
        return result, text, json.loads(text)["claims"] if text else []

    return run


def statuses(entries):
    return {entry["statement"]: entry["status"] for entry in entries}


def test_statuses_and_entries(run):
    result, _, entries = run()
    assert statuses(entries) == STATUSES
    assert entries[-3] == {
        "paper": 3,
        "statement": "one holds",
        "tolerance": 1e-6,
        "test": "test_suite.py::test_holds",
        "status": "holds",
    }
    keys = [(entry["paper"], entry["test"]) for entry in entries]
    assert keys == sorted(keys)
    result.stdout.fnmatch_lines(["claims: 2 holds, 2 refuted, 2 untested (claims.json)"])


def test_xdist_writes_the_same_file(run):
    _, alone, _ = run()
    _, spread, _ = run("-n", "2")
    assert spread == alone


def test_nothing_is_written_unless_asked(run):
    assert run(claims=None)[1] is None
    assert run(claims="none")[1] is None


def test_environment_names_the_ledger(run, monkeypatch):
    monkeypatch.setenv("TORCHZOO_CLAIMS", "claims.json")
    assert statuses(run(claims=None)[2]) == STATUSES


def test_partial_run_updates_only_what_it_ran(run, pytester):
    run()
    pytester.makepyfile(
        test_suite=SUITE.replace("x != 1", "True").replace("def test_holds():\n    pass", "")
    )
    _, _, entries = run("test_suite.py::test_merged")
    assert statuses(entries) == STATUSES | {"some parameter fails": "holds"}


def test_whole_run_drops_tests_that_are_gone(run, pytester):
    run()
    pytester.makepyfile(test_suite=SUITE.replace("test_partly", "helper"))
    expected = dict(STATUSES)
    del expected["every parameter holds or is skipped"]
    assert statuses(run("-k", "merged")[2]) == expected
    assert statuses(run()[2]) == expected


def test_whole_run_keeps_files_that_it_could_not_read(run, pytester):
    run()
    pytester.makepyfile(
        test_suite="import pytest\npytest.skip('not here', allow_module_level=True)",
        test_other="import pytest\n@pytest.mark.claim(9, 'other')\ndef test_other(): pass",
    )
    assert statuses(run()[2]) == STATUSES | {"other": "holds"}


@pytest.mark.parametrize("workers", [(), ("-n", "1")])
def test_whole_run_enters_deselected_claims_as_untested(run, workers):
    _, _, entries = run("-k", "holds", *workers)
    assert statuses(entries) == dict.fromkeys(STATUSES, "untested") | {"one holds": "holds"}


def test_changed_statement_replaces_the_old_one(run, pytester):
    run()
    pytester.makepyfile(test_suite=SUITE.replace("one holds", "one holds twice"))
    _, _, entries = run("test_suite.py::test_holds")
    assert "one holds" not in statuses(entries)
    assert statuses(entries)["one holds twice"] == "holds"


@pytest.mark.parametrize("mark", ["claim('1', 'text')", "claim(1)", "claim(1, 'text', '1e-6')"])
def test_malformed_marks_stop_the_run(run, pytester, mark):
    pytester.makepyfile(test_suite=f"import pytest\n@pytest.mark.{mark}\ndef test_it(): pass")
    result, text, _ = run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert not text or not json.loads(text)["claims"]


def test_damaged_ledger_is_not_overwritten(run, pytester):
    (pytester.path / "claims.json").write_text("{")
    result = pytester.runpytest_inprocess(*LEAN, "--claims=claims.json")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert (pytester.path / "claims.json").read_text() == "{"
