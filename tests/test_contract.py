"""Every registered module is held to the contract: one test for each module and check."""

import doctest
import pkgutil
from importlib import import_module

import pytest
import torch

import torchzoo
from torchzoo import registry
from torchzoo.testing import CHECKS, EXEMPTIONS, SLOW_CHECKS, Subject, applies

CARDS = {card.key: card for card in registry.cards()}


def pairs(checks):
    """Parameters `Name-check` for all cards and those checks that apply to them."""
    return [
        pytest.param(key, name, id=f"{card.name}-{name}")
        for key, card in CARDS.items()
        for name in checks
        if applies(name, card.exempt, card.example().batch_dims)
    ]


@pytest.mark.parametrize(("key", "check"), pairs(CHECKS))
def test_contract(key, check):
    CHECKS[check](Subject.of(CARDS[key]))


@pytest.mark.slow
@pytest.mark.parametrize(("key", "check"), pairs(SLOW_CHECKS))
def test_slow_contract(key, check):
    SLOW_CHECKS[check](Subject.of(CARDS[key]))


@pytest.mark.parametrize(
    ("key", "capability"),
    [
        pytest.param(key, capability, id=f"{card.name}-{capability}")
        for key, card in CARDS.items()
        for capability in card.exempt
    ],
)
def test_exemption_is_needed(key, capability):
    """An exemption that lifts no check which would fail is a leftover."""
    card = CARDS[key]
    for name in EXEMPTIONS[capability][1]:
        if applies(name, (), card.example().batch_dims):
            try:
                CHECKS[name](Subject.of(card))
            except Exception:
                return
    pytest.fail(f"{key} passes every check that {capability!r} lifts")


MODULES = [
    info.name
    for info in pkgutil.walk_packages(torchzoo.__path__, "torchzoo.")
    if not info.name.startswith(("torchzoo.experiments.", "torchzoo.cli.", "torchzoo.__main__"))
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_functions_run(name):
    """Docstrings outside the registered modules, whose own check is `doctest_runs`."""
    module = import_module(name)
    registered = {card.name for card in CARDS.values() if card.cls.__module__ == name}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    report: list[str] = []
    for test in doctest.DocTestFinder().find(module, name, extraglobs={"torch": torch}):
        if test.name.removeprefix(f"{name}.") not in registered:
            torch.manual_seed(0)
            runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)
