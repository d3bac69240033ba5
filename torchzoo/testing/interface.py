"""Checks of what a user meets: error messages and documentation."""

from __future__ import annotations

import doctest
import inspect
import io
import re
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from torchzoo._docstring import sections
from torchzoo.testing.subject import Subject, call


def wrong_shapes(subject: Subject) -> None:
    """An input of a shape that can't be served raises a ValueError that says which and why.

    Every axis that is no batch axis is made one longer, and 1; the input is also made 0-d. Each
    must be served or refused, and where an axis can't be longer, it must not be broadcast either.
    The message may name another input, which the wrong one doesn't fit.
    """
    names = list(inspect.signature(subject.build().forward).parameters)
    for index, value in enumerate(subject.make_inputs()):
        fixed = set()
        for axis, wrong in _misshapen(value, subject.batch_dims):
            inputs = [*subject.make_inputs()]
            inputs[index] = wrong
            what = f"{names[min(index, len(names) - 1)]} of shape {tuple(wrong.shape)}"
            if _refused(subject, inputs, names, what):
                fixed.add(axis)
            else:
                assert axis not in fixed, f"{what} is broadcast silently"


def _misshapen(value: Tensor, batch_dims: int) -> Iterator[tuple[int, Tensor]]:
    """Variants of a tensor, each with the axis that is wrong; longer before broadcastable."""
    for axis in range(batch_dims, value.dim()):
        size = value.shape[axis]
        yield axis, torch.cat([value, value.narrow(axis, 0, 1)], axis)
        if size > 1:
            yield axis, value.narrow(axis, 0, 1).clone()
    if value.dim():
        yield -1, value.flatten()[0].clone()


def _refused(subject: Subject, inputs: list[Tensor], names: list[str], what: str) -> bool:
    try:
        call(subject.build(), inputs)
    except ValueError as error:
        _assert_names(names, str(error), what)
        return True
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}, not ValueError: {error}") from error
    return False


def _assert_names(names: list[str], message: str, what: str) -> None:
    named = any(re.search(rf"\b{re.escape(name)}\b", message) for name in names)
    assert named, f"{what}: none of {names} is in the message: {message}"
    assert re.search(r"\bgot\b", message), f"{what}: the message doesn't say what came: {message}"


def wrong_options(subject: Subject) -> None:
    """A wrong constructor argument raises a ValueError that names it and says what came."""
    if subject.bad_options is None:
        return
    plain = [key for key, value in subject.kwargs.items() if isinstance(value, (int, float, str))]
    assert subject.bad_options or not plain, f"the example has no bad option for any of {plain}"
    for name, value in subject.bad_options.items():
        what = f"{name}={value!r}"
        try:
            subject.build(**{name: value})
        except ValueError as error:
            _assert_names([name], str(error), what)
        except Exception as error:
            raise AssertionError(
                f"{what}: {type(error).__name__}, not ValueError: {error}"
            ) from error
        else:
            raise AssertionError(f"{what} is accepted")


def docstring_sections(subject: Subject) -> None:
    """The docstring has all sections, and names every constructor argument."""
    module = subject.build()
    cls = type(module)
    found = sections(cls)
    more = found.keys() | sections(cls.forward).keys()
    arguments = list(inspect.signature(cls.__init__).parameters)[1:]
    needed = ["Shape", "Returns", "Raises", "Source", "Example"]
    missing = [name for name in (["Args"] if arguments else []) + needed if name not in more]
    assert found[""], f"{cls.__name__} has no summary"
    assert not missing, f"the docstring of {cls.__name__} lacks {', '.join(missing)}"
    unnamed = [a for a in arguments if not re.search(rf"\b{a}\b", found.get("Args", ""))]
    assert not unnamed, f"Args of {cls.__name__} doesn't name {', '.join(unnamed)}"


def doctest_runs(subject: Subject) -> None:
    """The docstring's example runs and prints what it says."""
    cls = type(subject.build())
    names = {**vars(sys.modules[cls.__module__]), cls.__name__: cls, "torch": torch}
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    report = io.StringIO()
    for thing in (cls, cls.forward):
        for test in doctest.DocTestFinder(recurse=False).find(
            thing, cls.__name__, globs=dict(names)
        ):
            torch.manual_seed(0)
            runner.run(test, out=report.write)
    assert runner.tries, f"{cls.__name__} has no example"
    assert not runner.failures, report.getvalue()
