"""Checks of how a module lives: saved, copied, moved, compiled and exported."""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchzoo.hub import ZooModel
from torchzoo.testing.subject import AsTensors, Subject, assert_same, backward, call


def _assert_twin(subject: Subject, module: nn.Module, twin: nn.Module, what: str) -> None:
    """Assert that `twin` computes what `module` does and shares no memory with it."""
    mine, theirs = module.state_dict(), twin.state_dict()
    addresses = {tensor.data_ptr() for tensor in mine.values() if tensor.numel()}
    shared = [name for name, tensor in theirs.items() if tensor.data_ptr() in addresses]
    assert not shared, f"{what}: {', '.join(shared)} shared with the original"
    inputs = subject.make_inputs()
    twin.train(module.training)
    assert_same(call(twin, inputs), call(module, inputs), what)


def state_dict_round_trip(subject: Subject) -> None:
    """`load_state_dict` makes a module with other weights compute the same."""
    module, twin = subject.build(), subject.build(seed=7)
    twin.load_state_dict(module.state_dict())
    _assert_twin(subject, module, twin, "after load_state_dict")


def deepcopy_round_trip(subject: Subject) -> None:
    """A deep copy computes the same and shares nothing."""
    module = subject.build()
    _assert_twin(subject, module, copy.deepcopy(module), "deep copy")


def pickle_round_trip(subject: Subject) -> None:
    """A module survives pickling, as data loaders and process pools do it."""
    module = subject.build()
    _assert_twin(subject, module, pickle.loads(pickle.dumps(module)), "unpickled")


def pretrained_round_trip(subject: Subject) -> None:
    """`from_pretrained` rebuilds what `save_pretrained` wrote."""
    module = subject.build()
    assert isinstance(module, ZooModel), f"{type(module).__name__} is not a ZooModel"
    with tempfile.TemporaryDirectory() as folder:
        module.save_pretrained(folder)
        torch.manual_seed(7)
        twin = type(module).from_pretrained(folder, device=subject.device)
    assert not twin.training, "from_pretrained gave a module in training mode"
    assert repr(twin) == repr(module), f"{twin!r} was rebuilt from {module!r}"
    _assert_twin(subject, module, twin, "from_pretrained")


def meta_device(subject: Subject) -> None:
    """It can be built on the meta device, by argument or context, and gives the same shapes."""
    expected = call(subject.build(), subject.make_inputs())
    with torch.device("meta"):
        under_context = subject.build()
    for module in (subject.build(device=torch.device("meta")), under_context):
        _assert_on(module, "meta")
        outputs = call(module, [value.to("meta") for value in subject.make_inputs()])
        shapes = [(tuple(out.shape), out.dtype) for out in outputs]
        real = [(tuple(out.shape), out.dtype) for out in expected]
        assert shapes == real, f"on meta {shapes}, else {real}"


def _assert_on(module: nn.Module, device: str) -> None:
    named = [*module.named_parameters(), *module.named_buffers()]
    wrong = [name for name, tensor in named if tensor.device.type != device]
    assert not wrong, f"not on {device}: {', '.join(wrong)}"


def factory_kwargs(subject: Subject) -> None:
    """`device` and `dtype` of the constructor decide for all parameters, whatever the defaults."""
    module = subject.build(dtype=torch.float64)
    wrong = [
        name
        for name, parameter in module.named_parameters()
        if parameter.is_floating_point() and parameter.dtype != torch.float64
    ]
    assert not wrong, f"not in the dtype asked for: {', '.join(wrong)}"
    with torch.device("meta"):
        module = subject.build(device=subject.device)
    _assert_on(module, subject.device.type)


def _run(module: nn.Module, run: Callable[..., Any], subject: Subject) -> list[Tensor]:
    """Outputs and gradients of one seeded call of `run`, which is `module` or made from it."""
    inputs = subject.make_inputs(grad=True)
    outputs = call(run, inputs)
    if any(output.requires_grad for output in outputs):
        backward(outputs)
    leaves = [*inputs, *module.parameters()]
    return [*(out.detach() for out in outputs), *(x.grad for x in leaves if x.grad is not None)]


def _compiled_equals_eager(subject: Subject, backend: str) -> None:
    module = subject.build()
    expected = _run(module, module, subject)
    torch.compiler.reset()
    module = subject.build()
    try:
        compiled = torch.compile(AsTensors(module), fullgraph=True, backend=backend)
        actual = _run(module, compiled, subject)
    finally:
        torch.compiler.reset()
    assert_same(actual, expected, f"compiled with {backend}")


def compile_fullgraph(subject: Subject) -> None:
    """`torch.compile` finds one graph, whose outputs and gradients equal eager mode."""
    _compiled_equals_eager(subject, "aot_eager")


def compile_inductor(subject: Subject) -> None:
    """Outputs and gradients of the default backend's code equal eager mode."""
    _compiled_equals_eager(subject, "inductor")


def export_equal(subject: Subject) -> None:
    """The exported program gives equal outputs."""
    inputs = subject.make_inputs()
    expected = call(subject.build().eval(), inputs)
    program = torch.export.export(AsTensors(subject.build().eval()), inputs)
    assert_same(call(program.module(), inputs), expected, "exported")
