"""A pytest plugin that records which claims of which papers the tests found to hold.

A test marked `@pytest.mark.claim(paper, statement, tolerance=None)` is one entry of the ledger,
however many parameters or examples it runs. `--claims PATH`, or TORCHZOO_CLAIMS in the
environment, says where the ledger is; without it nothing is written. A run updates the entries of
the tests it ran; a run of the whole suite also drops entries whose test is gone, and enters claims
that it left out as untested.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from torchzoo.files import write_json

Claim = dict[str, Any]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--claims`."""
    parser.addoption(
        "--claims",
        metavar="PATH",
        default=os.environ.get("TORCHZOO_CLAIMS", "none"),
        help="claim ledger to update, a JSON file; none (the default) writes nothing",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Collect claims in every process, and keep the ledger in the one that reports."""
    config.addinivalue_line(
        "markers", "claim(paper, statement, tolerance=None): a property that the paper says holds"
    )
    found = Found()
    config.pluginmanager.register(found, "torchzoo-claims-found")
    path = config.getoption("--claims")
    if path != "none" and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Ledger(Path(path), found, config), "torchzoo-claims-ledger")


def _claim(paper: int, statement: str, tolerance: float | None = None) -> Claim:
    """An entry without its test, checked; the signature is that of the mark."""
    if not isinstance(paper, int) or not isinstance(statement, str) or not statement.strip():
        raise TypeError("expected claim(paper: int, statement: str, tolerance=None)")
    if tolerance is not None and not isinstance(tolerance, (int, float)):
        raise TypeError(f"tolerance: expected a number or None, got {tolerance!r}")
    return {"paper": paper, "statement": statement, "tolerance": tolerance}


def _key(claim: Claim) -> tuple[int, str, str]:
    return claim["paper"], claim["test"], claim["statement"]


class Found:
    """What collection found, before anything was deselected; a worker sends it home."""

    def __init__(self) -> None:
        self.claims: list[Claim] = []
        self.unread: list[str] = []

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        """Attach the test's claims to all its reports."""
        for mark in item.iter_markers("claim"):
            try:
                claim = _claim(*mark.args, **mark.kwargs)
            except TypeError as error:
                raise pytest.UsageError(f"{item.nodeid}: {error}") from error
            claim["test"] = item.nodeid.partition("[")[0]
            item.user_properties.append(("claim", claim))
            if claim not in self.claims:
                self.claims.append(claim)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note files that were skipped or failed: their tests are not gone."""
        if not report.passed:
            self.unread.append(report.nodeid)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """On a worker of pytest-xdist, hand over to the controller."""
        output = getattr(session.config, "workeroutput", None)
        if output is not None:
            output["claims"] = {"claims": self.claims, "unread": self.unread}


class Ledger:
    """Gathers outcomes and writes the file when the session ends."""

    def __init__(self, path: Path, found: Found, config: pytest.Config) -> None:
        self.path, self.found, self.whole = path, found, _whole_suite(config)
        self.statuses: dict[tuple[int, str, str], set[str]] = {}
        self.ran: dict[tuple[int, str, str], Claim] = {}
        try:
            text = path.read_text(encoding="utf-8") if path.exists() else '{"claims": []}'
            self.entries: list[Claim] = json.loads(text)["claims"]
        except (OSError, ValueError, KeyError) as error:
            raise pytest.UsageError(f"--claims: {path} is no claim ledger: {error}") from error

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note one phase of one test."""
        for name, claim in report.user_properties:
            if name == "claim" and isinstance(claim, dict):
                self.ran[_key(claim)] = claim
                self.statuses.setdefault(_key(claim), set()).add(_status(report))

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Take over what a worker of pytest-xdist found."""
        given = getattr(node, "workeroutput", {}).get("claims", {"claims": [], "unread": []})
        self.found.claims += [claim for claim in given["claims"] if claim not in self.found.claims]
        self.found.unread += given["unread"]

    def pytest_sessionfinish(self) -> None:
        """Write the ledger."""
        self.entries = sorted(self._merged(), key=_key)
        write_json(self.path, {"claims": self.entries})

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print what the ledger now says."""
        counts = Counter(entry["status"] for entry in self.entries)
        text = ", ".join(
            f"{counts[status]} {status}" for status in ("holds", "refuted", "untested")
        )
        terminalreporter.write_line(f"claims: {text} ({self.path})")

    def _merged(self) -> Iterator[Claim]:
        """Old entries that this run did not touch, and new ones."""
        tests = {claim["test"] for claim in self.ran.values()}
        kept = [entry for entry in self.entries if entry["test"] not in tests]
        if self.whole and self.found.claims:
            known = {_key(claim) for claim in self.found.claims}
            kept = [entry for entry in kept if _key(entry) in known or self._unread(entry["test"])]
            have = {_key(entry) for entry in kept} | self.ran.keys()
            for claim in self.found.claims:
                if _key(claim) not in have:
                    yield {**claim, "status": "untested"}
        yield from kept
        for key, claim in self.ran.items():
            statuses = self.statuses[key]
            status = next(s for s in ("refuted", "holds", "untested") if s in statuses)
            yield {**claim, "status": status}

    def _unread(self, test: str) -> bool:
        return any(test.startswith(nodeid) for nodeid in self.found.unread)


def _status(report: pytest.TestReport) -> str:
    """What a phase says: only the test's own body can show or refute a claim."""
    if report.when != "call":
        return "untested"
    if report.failed or (report.skipped and hasattr(report, "wasxfail")):
        return "refuted"
    return "holds" if report.passed else "untested"


def _whole_suite(config: pytest.Config) -> bool:
    """Whether the run collects everything, whatever it then leaves out."""
    named = config.args_source is pytest.Config.ArgsSource.ARGS
    ignored = config.getoption("ignore", None) or config.getoption("ignore_glob", None)
    return not named and not ignored and config.invocation_params.dir == config.rootpath
