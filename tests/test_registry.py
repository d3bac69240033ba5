"""Cards, names and `create`."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import torchzoo
from torchzoo import Example, create, names, register, registry
from torchzoo.errors import UnknownNameError


@pytest.fixture(autouse=True)
def own_cards(monkeypatch):
    """Registrations of a test end with it; those of the zoo are all made before."""
    registry.cards()
    monkeypatch.setattr(registry, "_cards", dict(registry._cards))


def example():
    return Example({"features": 2}, (torch.zeros(1, 2),))


class Mine(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.features = features


def test_own_module_is_created_by_its_name():
    assert register(example=example, exempt={"stateful": "it counts"})(Mine) is Mine
    assert create("Mine", features=3).features == 3
    card = registry.card("Mine")
    assert (card.name, card.family, card.key, card.paper) == ("Mine", "", "Mine", None)
    assert card.exempt == {"stateful": "it counts"}
    assert card in registry.registered()


def test_module_of_the_zoo_has_both_names():
    layer = create("GaussianAdaptiveAttention", dim=4)
    assert type(create("attention.GaussianAdaptiveAttention", dim=4)) is type(layer)
    card = registry.card("GaussianAdaptiveAttention")
    assert (card.family, card.key) == ("attention", "attention.GaussianAdaptiveAttention")
    assert card.paper == 48


def test_registering_again_replaces_but_another_class_of_the_name_is_refused():
    register(example=example)(Mine)
    register(paper=5, example=example)(Mine)
    assert registry.card("Mine").paper == 5
    other = type("Mine", (nn.Module,), {"__module__": "elsewhere"})
    with pytest.raises(ValueError, match=r"Mine is registered twice: .*test_registry, elsewhere"):
        register(example=example)(other)


def test_exemptions_need_a_known_name_and_a_reason():
    with pytest.raises(ValueError, match="unknown capability 'fast'"):
        register(example=example, exempt={"fast": "it is"})
    with pytest.raises(ValueError, match="'stateful' needs a reason"):
        register(example=example, exempt={"stateful": " "})


def test_unknown_names_get_suggestions():
    with pytest.raises(UnknownNameError, match=r"did you mean .*GaussianAdaptiveAttention"):
        create("GausianAdaptiveAtention")
    with pytest.raises(UnknownNameError, match=r"no module 'zzzzzz'$"):
        create("zzzzzz")
    with pytest.raises(UnknownNameError, match="is a function, not a module"):
        create("importance_factor")
    with pytest.raises(UnknownNameError, match="did you mean attention"):
        names("atention")


def test_name_of_several_families_must_be_qualified(monkeypatch):
    homes = {
        "attention.GaussianAdaptiveAttention": "attention",
        "moe.GaussianAdaptiveAttention": "moe",
    }
    monkeypatch.setattr(registry, "_public_names", lambda: homes)
    with pytest.raises(UnknownNameError, match=r"attention\.\w+, moe\.\w+"):
        create("GaussianAdaptiveAttention")
    assert create("attention.GaussianAdaptiveAttention", dim=4).dim == 4


def test_cards_are_sorted_and_complete():
    everything = registry.cards()
    keys = [card.key for card in everything]
    assert keys == sorted(keys)
    for family in {card.family for card in everything} - {""}:
        exported = getattr(torchzoo, family).__all__
        mine = names(family)
        assert set(mine) <= set(exported)
        things = {name: getattr(getattr(torchzoo, family), name) for name in exported}
        modules = {
            name: thing
            for name, thing in things.items()
            if isinstance(thing, type)
            and issubclass(thing, torchzoo.ZooModel)
            and thing.__name__ == name  # not an alias
            and thing.forward is not torch.nn.Module.forward  # an estimator is fitted, not called
        }
        bases = {base for module in modules.values() for base in module.__mro__[1:]}
        assert {name for name in modules if modules[name] not in bases} <= set(mine)


def test_an_alias_is_the_module_that_it_names():
    assert registry.card("PMoEActor") is registry.card("PMoEPolicy")
    assert type(torchzoo.create("moe.PMoEActor", obs_dim=3, action_dim=2)).__name__ == "PMoEPolicy"


def test_examples_are_fresh():
    for card in registry.cards():
        one, two = card.example(), card.example()
        for first, second in zip(one.inputs, two.inputs, strict=True):
            assert first.data_ptr() != second.data_ptr()
            assert first.shape == second.shape


def test_create_imports_only_what_it_needs():
    program = (
        "import sys, torchzoo; torchzoo.create('GaussianAdaptiveAttention', dim=4); "
        "print([m for m in sys.modules if m.startswith(('torchzoo.moe.', 'torchzoo.sparsity.'))])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr
