"""Checks of what a module computes: batch dimensions, gradients, precision, determinism."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call

from torchzoo.testing.subject import AsTensors, Subject, assert_same, backward, call


def leading_dims(subject: Subject) -> None:
    """More leading dimensions, or none, give what the flattened batch gives."""
    inputs = subject.flat_inputs()
    twice = tuple(torch.cat([value, value.flip(0)]) for value in inputs)
    flat = call(subject.build().eval(), twice)
    split = tuple(value.unflatten(0, (2, -1)) for value in twice)
    _assert_reshaped(call(subject.build().eval(), split), flat, len(twice[0]), (2, -1))
    one = tuple(value[:1] for value in inputs)
    bare = call(subject.build().eval(), [value[0] for value in one])
    _assert_reshaped(bare, call(subject.build().eval(), one), 1, ())


def _assert_reshaped(
    actual: list[Tensor], flat: list[Tensor], rows: int, batch: tuple[int, ...]
) -> None:
    """Assert equality up to the batch shape; outputs may keep the leading dims or flatten them."""
    what = f"leading dimensions {batch}"
    assert len(actual) == len(flat), f"{what}: {len(actual)} outputs, not {len(flat)}"
    for one, two in zip(actual, flat, strict=True):
        if two.dim() and len(two) == rows:
            kept = (2, rows // 2, *two.shape[1:]) if batch else two.shape[1:]
            assert one.shape in (kept, two.shape), (
                f"{what}: output shape {tuple(one.shape)}, expected {kept} or {tuple(two.shape)}"
            )
        assert one.numel() == two.numel(), (
            f"{what}: output shape {tuple(one.shape)} against {tuple(two.shape)} for a flat batch"
        )
    assert_same([one.reshape(two.shape) for one, two in zip(actual, flat, strict=True)], flat, what)


def batch_independence(subject: Subject) -> None:
    """Each row's output is the one it has alone."""
    inputs = subject.flat_inputs()
    rows = len(inputs[0])
    together = call(subject.build().eval(), inputs)
    for row in range(rows):
        alone = call(subject.build().eval(), [value[row : row + 1] for value in inputs])
        pairs = [
            (one.flatten(), all_.reshape(rows, -1)[row])
            for one, all_ in zip(alone, together, strict=True)
            if one.numel() * rows == all_.numel()
        ]
        assert pairs, "no output has a part for each row"
        assert_same([one for one, _ in pairs], [two for _, two in pairs], f"row {row} alone")


def empty_batch(subject: Subject) -> None:
    """A batch of no rows gives no rows, and gradients that are finite."""
    inputs = [
        value[:0].requires_grad_(value.is_floating_point()) for value in subject.flat_inputs()
    ]
    full = call(subject.build(), subject.flat_inputs())
    rows = len(subject.flat_inputs()[0])
    module = subject.build()
    outputs = call(module, inputs)
    for output, normal in zip(outputs, full, strict=True):
        if normal.dim() and len(normal) == rows:
            expected = (0, *normal.shape[1:])
            assert output.shape == expected, f"shape {tuple(output.shape)}, expected {expected}"
    if any(output.requires_grad for output in outputs):
        backward(outputs)
    _assert_finite({name: parameter.grad for name, parameter in module.named_parameters()})


def noncontiguous(subject: Subject) -> None:
    """Strided and transposed inputs give what contiguous ones give."""
    inputs = subject.make_inputs()
    expected = call(subject.build(), inputs)
    strided = [torch.stack([value, value], -1)[..., 0] for value in inputs]
    swapped = [
        value.transpose(0, -1).contiguous().transpose(0, -1) if value.dim() > 1 else value
        for value in inputs
    ]
    assert_same(call(subject.build(), strided), expected, "strided inputs")
    assert_same(call(subject.build(), swapped), expected, "transposed inputs")


def gradients(subject: Subject) -> None:
    """Every parameter that learns and every floating-point input gets a finite gradient."""
    module, inputs = subject.build(), subject.make_inputs(grad=True)
    backward(call(module, inputs))
    found = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    found |= {f"input {i}": x.grad for i, x in enumerate(inputs) if x.requires_grad}
    missing = [name for name, grad in found.items() if grad is None]
    assert not missing, f"no gradient for {', '.join(missing)}"
    _assert_finite(found)


def _assert_finite(values: dict[str, Tensor | None]) -> None:
    bad = [
        name for name, value in values.items() if value is not None and not value.isfinite().all()
    ]
    assert not bad, f"not finite: {', '.join(bad)}"


def gradcheck_float64(subject: Subject) -> None:
    """Gradients of parameters and inputs equal finite differences in float64."""
    inputs = subject.make_inputs(torch.float64, grad=True)
    names, start = [], []
    for name, parameter in subject.build().double().named_parameters():
        if parameter.requires_grad:
            names.append(name)
            start.append(parameter.detach().clone().requires_grad_())

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        # a fresh module for each evaluation, as a call may change its buffers
        module = AsTensors(subject.build().double())
        named = {f"module.{name}": value for name, value in zip(names, values, strict=False)}
        outputs = call(lambda *xs: functional_call(module, named, xs), values[len(names) :])
        return tuple(output for output in outputs if output.requires_grad)

    assert torch.autograd.gradcheck(function, (*start, *inputs), fast_mode=True)


def float64_agrees(subject: Subject) -> None:
    """In float64 all is float64, and equals float32 to float32's rounding."""
    single = call(subject.build().float().eval(), subject.make_inputs(torch.float32))
    double = call(subject.build().double().eval(), subject.make_inputs(torch.float64))
    for index, output in enumerate(double):
        expected = torch.float64 if output.is_floating_point() else output.dtype
        assert output.dtype == expected, f"output {index} is {output.dtype} for float64 inputs"
    as_single = [out.float() if out.is_floating_point() else out for out in double]
    assert_same(single, as_single, "float32 against float64", rtol=1e-3, atol=1e-4)


def autocast_bf16(subject: Subject) -> None:
    """Under bfloat16 autocast outputs are finite and near float32, and gradients are finite."""
    expected = call(subject.build().eval(), subject.make_inputs())
    module, inputs = subject.build().eval(), subject.make_inputs(grad=True)
    with torch.autocast(subject.device.type, torch.bfloat16):
        outputs = call(module, inputs)
    for index, (output, exact) in enumerate(zip(outputs, expected, strict=True)):
        if not output.is_floating_point() or not output.numel():
            continue
        kept = exact.isfinite()  # a module may say -inf on purpose, in both
        assert (output.isfinite() == kept).all(), f"output {index} is not finite"
        error = (output.float() - exact)[kept].norm() / exact[kept].norm().clamp_min(1e-6)
        assert error < 0.05, f"output {index} is off by {error:.3f} of its norm, allowed 0.05"
    if any(output.requires_grad for output in outputs):
        backward(outputs)
    _assert_finite({name: parameter.grad for name, parameter in module.named_parameters()})


def determinism(subject: Subject) -> None:
    """A seed fixes the weights and, with the same inputs, every call's output exactly."""
    one, two = subject.build(seed=3), subject.build(seed=3)
    weights = list(one.state_dict().values())
    assert_same(weights, list(two.state_dict().values()), "weights", rtol=0, atol=0)
    inputs = subject.make_inputs()
    first = call(one, inputs)
    assert_same(call(one, inputs), first, "second call", rtol=0, atol=0)
    assert_same(call(two, inputs), first, "second module", rtol=0, atol=0)
