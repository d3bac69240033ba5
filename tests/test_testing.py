"""Each check of the contract catches the defect that it is there for, and only that one."""

import copy

import pytest
import torch
from torch import nn

from torchzoo import Example, register
from torchzoo.hub import ZooModel
from torchzoo.registry import CAPABILITIES
from torchzoo.testing import (
    CHECKS,
    EXEMPTIONS,
    SLOW_CHECKS,
    Subject,
    applies,
    assert_within_se,
    check_module,
    check_registered,
)


class Good(ZooModel):
    """A linear map and a squashing function, with nothing wrong.

    Args:
        dim: Number of features D.
        scale: Positive factor.
        device: Device of the weights.
        dtype: Type of the weights.

    Shape:
        - x: `(..., D)`
        - output: as x

    Returns:
        The mapped features.

    Raises:
        ValueError: `scale` not positive, or x with other features.

    Source:
        Nobody, Nothing in Particular, 1900, equation 1.

    Example:
        >>> 1 + 1
        2
    """

    def __init__(self, dim, *, scale=1.0, device=None, dtype=None):
        super().__init__()
        self.check_scale(scale)
        self.dim, self.scale = dim, scale
        self.weight = nn.Parameter(torch.empty(dim, dim, device=device, dtype=dtype))
        nn.init.normal_(self.weight)

    def check_scale(self, scale):
        if scale <= 0:
            raise ValueError(f"scale: expected a positive number, got {scale}")

    def check_input(self, x):
        if x.dim() == 0 or x.shape[-1] != self.dim:
            raise ValueError(f"x: expected (..., {self.dim}), got {tuple(x.shape)}")

    def mapped(self, x):
        return self.scale * nn.functional.linear(x, self.weight)

    def forward(self, x):
        self.check_input(x)
        return torch.tanh(self.mapped(x))


BROKEN = []


def broken(check, name=None, factory=None):
    """Class decorator: enter a variant of Good that must fail this check and no other."""

    def enter(cls):
        if not cls.__doc__:
            cls.__doc__ = Good.__doc__
        make = factory(cls) if factory else cls
        BROKEN.append(pytest.param(make, check, id=cls.__name__))
        return cls

    return enter


def subject(factory):
    generator = torch.Generator().manual_seed(0)
    kwargs = {"dim": 3}
    inputs = (torch.randn(4, 3, generator=generator),)
    return Subject(factory, inputs, kwargs, bad_options={"scale": -1.0})


@broken("leading_dims")
class TakesOneBatchDimension(Good):
    def forward(self, x):
        y = super().forward(x)
        return y - y.mean(-2, keepdim=True) if x.dim() > 2 else y


@broken("leading_dims")
class NeedsABatch(Good):
    def forward(self, x):
        y = super().forward(x)
        return y.movedim(-1, 1).movedim(1, -1)


@broken("batch_independence")
class MixesRows(Good):
    def forward(self, x):
        y = super().forward(x)
        return y + 0.1 * y.reshape(-1, self.dim).sum(0)


@broken("empty_batch")
class ReshapesByInference(Good):
    def forward(self, x):
        y = super().forward(x)
        return y.reshape(x.shape[0], -1).reshape(x.shape)


@broken("noncontiguous")
class ViewsItsInput(Good):
    def forward(self, x):
        self.check_input(x)
        return super().forward(x.view(-1).view(x.shape))


@broken("gradients")
class HasAnIdleParameter(Good):
    def __init__(self, dim, *, scale=1.0, device=None, dtype=None):
        super().__init__(dim, scale=scale, device=device, dtype=dtype)
        self.idle = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))


@broken("gradcheck_float64")
class DetachesAFactor(Good):
    def forward(self, x):
        return super().forward(x) * x.detach()


@broken("float64_agrees")
class BranchesOnPrecision(Good):
    def forward(self, x):
        return super().forward(x) * (2 if x.dtype == torch.float64 else 1)


@broken("float64_agrees")
class FallsBackToFloat32InEvaluation(Good):
    def forward(self, x):
        y = super().forward(x)
        return y if self.training else y.float()


@broken("autocast_bf16")
class Cancels(Good):
    def forward(self, x):
        self.check_input(x)
        y = self.mapped(x)
        return (y + 100) - 100 + 0 * x


@broken("determinism")
class CountsItsCalls(Good):
    def __init__(self, dim, *, scale=1.0, device=None, dtype=None):
        super().__init__(dim, scale=scale, device=device, dtype=dtype)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


@broken("state_dict_round_trip")
class WritesAKeyThatItCannotRead(Good):
    def state_dict(self, *args, **kwargs):
        return super().state_dict(*args, **kwargs) | {"extra": torch.zeros(1)}


@broken("deepcopy_round_trip")
class CopiesToItself(Good):
    def __deepcopy__(self, memo):
        return self


@broken("pickle_round_trip")
class HoldsALambda(Good):
    def __init__(self, dim, *, scale=1.0, device=None, dtype=None):
        super().__init__(dim, scale=scale, device=device, dtype=dtype)
        self.helper = lambda: None


def changed_afterwards(cls):
    def factory(**options):
        module = cls(**options)
        module.scale *= 2
        return module

    return factory


@broken("pretrained_round_trip", factory=changed_afterwards)
class ChangesWhatTheConfigSays(Good):
    pass


@broken("meta_device")
class ReadsItsWeights(Good):
    def __init__(self, dim, *, scale=1.0, device=None, dtype=None):
        super().__init__(dim, scale=scale, device=device, dtype=dtype)
        self.largest = self.weight.detach().abs().max().item()


@broken("factory_kwargs")
class IgnoresDtype(Good):
    def __init__(self, dim, *, scale=1.0, device=None, dtype=None):
        super().__init__(dim, scale=scale, device=device)


@broken("factory_kwargs")
class IgnoresDeviceUnderAContext(Good):
    def __init__(self, dim, *, scale=1.0, device=None, dtype=None):
        ambient = torch.get_default_device().type == "meta"
        super().__init__(dim, scale=scale, device=None if ambient else device, dtype=dtype)


@broken("compile_fullgraph")
class BreaksTheGraph(Good):
    def forward(self, x):
        torch._dynamo.graph_break()
        return super().forward(x)


@broken("compile_fullgraph")
class DiffersWhenCompiled(Good):
    def forward(self, x):
        y = super().forward(x)
        return 2 * y if torch.compiler.is_dynamo_compiling() else y


@broken("export_equal")
class DiffersWhenExported(Good):
    def forward(self, x):
        y = super().forward(x)
        return 2 * y if torch.compiler.is_exporting() else y


@broken("wrong_shapes")
class LetsTorchComplain(Good):
    def check_input(self, x):
        pass


@broken("wrong_shapes")
class Broadcasts(Good):
    def check_input(self, x):
        if x.dim() == 0 or x.shape[-1] not in (1, self.dim):
            raise ValueError(f"x: expected (..., {self.dim}), got {tuple(x.shape)}")

    def mapped(self, x):
        return super().mapped(x.expand(*x.shape[:-1], self.dim))


@broken("wrong_shapes")
class DoesNotNameTheInput(Good):
    def check_input(self, x):
        if x.dim() == 0 or x.shape[-1] != self.dim:
            raise ValueError(f"expected (..., {self.dim}), got {tuple(x.shape)}")


@broken("wrong_options")
class AcceptsAnyOption(Good):
    def check_scale(self, scale):
        pass


@broken("wrong_options")
class RaisesAnotherError(Good):
    def check_scale(self, scale):
        assert scale > 0, f"scale: expected a positive number, got {scale}"


@broken("wrong_options")
class DoesNotNameTheOption(Good):
    def check_scale(self, scale):
        if scale <= 0:
            raise ValueError(f"expected a positive number, got {scale}")


@broken("docstring_sections")
class DoesNotSayItsSource(Good):
    __doc__ = Good.__doc__.replace("Source:", "Sauce:")


@broken("docstring_sections")
class DoesNotDocumentAnArgument(Good):
    __doc__ = Good.__doc__.replace("scale: Positive", "other: Positive")


@broken("doctest_runs")
class HasAWrongExample(Good):
    __doc__ = Good.__doc__.replace("        2\n", "        3\n")


@broken("doctest_runs")
class HasNoExample(Good):
    __doc__ = Good.__doc__.replace(">>> 1 + 1\n        2\n", "None.\n")


def failed(factory, names=CHECKS):
    found = set()
    for name in names:
        try:
            CHECKS[name](subject(factory))
        except Exception:
            found.add(name)
    return found


@pytest.mark.parametrize(("factory", "check"), BROKEN)
def test_defect_is_caught_by_its_check_alone(factory, check):
    assert failed(factory) == {check}


def test_every_check_has_a_defect():
    assert {param.values[1] for param in BROKEN} == set(CHECKS)


def test_good_module_passes():
    assert failed(Good) == set()


class HasAnInfiniteGradient(Good):
    """It is wrong, too, against finite differences and under autocast."""

    def forward(self, x):
        y = super().forward(x)
        return y + (y - y.detach()).abs().sqrt()


def test_infinite_gradient_is_caught():
    with pytest.raises(AssertionError, match="not finite: weight, input 0"):
        CHECKS["gradients"](subject(HasAnInfiniteGradient))


@pytest.mark.slow
def test_slow_checks():
    for check in SLOW_CHECKS.values():
        check(subject(Good))
        with pytest.raises(AssertionError, match="compiled with inductor"):
            check(subject(DiffersWhenCompiled))


class Idle(IgnoresDtype):
    """Two defects: see the base class, and there is hardly any documentation."""


def test_check_module_lists_all_failures():
    with pytest.raises(AssertionError) as raised:
        check_module(lambda **kw: Idle(3, **kw), (torch.randn(4, 3),), bad_options={"scale": 0})
    lines = str(raised.value).splitlines()
    assert lines[0] == f"Idle fails 3 of {len(CHECKS)} checks"
    assert lines[1] == "factory_kwargs: not in the dtype asked for: weight"
    assert lines[2] == (
        "docstring_sections: the docstring of Idle lacks "
        "Args, Shape, Returns, Raises, Source, Example"
    )
    assert lines[3] == "doctest_runs: Idle has no example"


def test_exempt_lifts_checks():
    inputs = (torch.randn(4, 3),)
    check_module(lambda **kw: CountsItsCalls(3, **kw), inputs, exempt=["stateful"])
    check_module(lambda **kw: CountsItsCalls(3, **kw), inputs, exempt=["determinism"])
    with pytest.raises(AssertionError, match="determinism"):
        check_module(lambda **kw: CountsItsCalls(3, **kw), inputs, exempt=["fixed-rank"])
    with pytest.raises(ValueError, match=r"exempt: expected .*, got 'statefull'"):
        check_module(Good, inputs, exempt=["statefull"])


def test_exemptions_are_the_capabilities_of_cards():
    assert set(EXEMPTIONS) == set(CAPABILITIES)
    for sentence, checks in EXEMPTIONS.values():
        assert sentence.endswith(".")
        assert checks
        assert set(checks) <= set(CHECKS)


def test_batch_checks_need_batch_dims():
    lifted = {name for name in CHECKS if not applies(name, (), batch_dims=0)}
    assert lifted == {"leading_dims", "batch_independence", "empty_batch"}


def test_check_registered(monkeypatch):
    monkeypatch.setattr("torchzoo.registry._cards", {})
    example = Example({"dim": 3}, (torch.randn(4, 3),), bad_options={"scale": 0.0})
    register(example=lambda: copy.deepcopy(example))(Good)
    register(example=lambda: copy.deepcopy(example))(AcceptsAnyOption)
    check_registered("Good")
    with pytest.raises(AssertionError, match=r"wrong_options: scale=0\.0 is accepted"):
        check_registered("AcceptsAnyOption")


class Wrapper(ZooModel):
    def __init__(self, part, weight=None):
        super().__init__()
        self.part = part

    def forward(self, x):
        return self.part(x)


def test_modules_among_the_arguments_are_copied_and_follow_device_and_dtype(monkeypatch):
    monkeypatch.setattr("torchzoo.registry._cards", {})
    register(example=lambda: Example({"dim": 3}, (torch.randn(4, 3),)))(Good)
    part = Good(3)
    taken = Subject(Wrapper, (torch.randn(4, 3),), {"part": part})
    module = taken.build()
    assert module.part is not part
    assert torch.equal(module.part.weight, part.weight)
    assert taken.build(dtype=torch.float64).part.weight.dtype == torch.float64
    assert taken.build(device=torch.device("meta")).part.weight.is_meta
    for name in ("gradients", "meta_device", "factory_kwargs", "pretrained_round_trip"):
        CHECKS[name](taken)


def test_seeds_and_modes_are_the_checks_business():
    class Noisy(Good):
        __doc__ = Good.__doc__

        def forward(self, x):
            return nn.functional.dropout(super().forward(x), 0.5, self.training)

    noisy = {"pickle_round_trip", "deepcopy_round_trip", "state_dict_round_trip"}
    assert failed(Noisy, set(CHECKS) - noisy - {"pretrained_round_trip"}) == set()


@pytest.mark.parametrize("expected", [0.5, torch.full((2,), 0.5)])
def test_within_se(expected):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4000, 2, generator=generator)
    assert_within_se(x, expected)
    spread = 12**-0.5 / 4000**0.5
    with pytest.raises(AssertionError, match=r"4 standard errors of 4000 samples"):
        assert_within_se(x, expected + 8 * spread)
    with pytest.raises(AssertionError):
        assert_within_se(x, torch.tensor([0.5, 0.5 - 8 * spread]))


def test_within_se_of_constant_samples():
    assert_within_se(torch.full((5,), 0.1), 0.1)
    with pytest.raises(AssertionError):
        assert_within_se(torch.full((5,), 0.1), 0.1001)
    with pytest.raises(ValueError, match="x: expected at least two samples"):
        assert_within_se(torch.zeros(1, 3), 0.0)
