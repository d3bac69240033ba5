"""Dynamic filter pruning of whole models: conversion, the loss of the heads, multiplications.

What `torchzoo.sparsity.channel_gate` does for one convolution, of Elkerdawy et al., "Fire Together
Wire Together", 2022, for a model that has several. `estimate_flops` says before any training what a
threshold saves: it lets every layer be masked by its own target, as a perfect head would.

Deviations: a residual block's last convolution is masked before the shortcut is added, as its sum
belongs to the block; multiplications are counted for the masked convolutions and their heads.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzoo.sparsity.channel_gate import FTWTConv2d, GateRecord
from torchzoo.surgery import Replaced, find


def ftwt_convert(model: nn.Module, threshold: float = 0.9, **options: Any) -> Replaced:
    """Mask the convolutions of a model, in place; with open gates it computes what it did.

    Converted are `nn.Conv2d`, batch norm (or none) and ReLU in an `nn.Sequential`, and the modules
    conv1, bn1, conv2, ... of residual blocks and stems as timm and torchvision name them.

    Args:
        model: The model.
        threshold: As for `FTWTConv2d`.
        **options: Further options of `FTWTConv2d`.

    Returns:
        The names of the convolutions.

    Raises:
        ValueError: No convolution of a known layout, or an option out of its range.

    Source:
        Elkerdawy et al., "Fire Together Wire Together", 2022.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        >>> ftwt_convert(net, 0.8).names
        ('0',)
    """
    made = [
        (place, FTWTConv2d(place.conv, place.bn, place.act, threshold=threshold, **options))
        for place in _places(model)
    ]
    if not made:
        raise ValueError("model: expected convolutions of a known layout, got none")
    for place, layer in made:
        layer.train(place.parent.training)
        place.parent._modules[place.name] = layer
        for name in place.done:
            place.parent._modules[name] = nn.Identity()
    return Replaced(tuple(find(model, FTWTConv2d)))


class _Place(NamedTuple):
    """A convolution of a parent, what follows it, and which of that is done by the new layer."""

    parent: nn.Module
    name: str
    conv: nn.Conv2d
    bn: nn.BatchNorm2d | None
    act: nn.Module | None
    done: tuple[str, ...]


def _places(model: nn.Module) -> list[_Place]:
    parents = [m for m in model.modules() if not isinstance(m, FTWTConv2d)]
    return [
        place
        for parent in parents
        for place in (_in_sequence if isinstance(parent, nn.Sequential) else _in_block)(parent)
    ]


def _in_sequence(parent: nn.Module) -> Iterator[_Place]:
    children = list(parent.named_children())
    for index, (name, conv) in enumerate(children):
        after = [*children[index + 1 : index + 3], ("", None), ("", None)]
        bn = after.pop(0) if isinstance(after[0][1], nn.BatchNorm2d) else None
        act = after[0]
        if isinstance(conv, nn.Conv2d) and isinstance(act[1], (nn.ReLU, nn.ReLU6)):
            done = (act[0],) if bn is None else (bn[0], act[0])
            yield _Place(parent, name, conv, cast(Any, bn and bn[1]), act[1], done)


def _in_block(parent: nn.Module) -> Iterator[_Place]:
    """The ReLU of a block stays where it is: once more, it changes nothing."""
    children = dict(parent.named_children())
    count = sum(name[:4] == "conv" and name[4:].isdigit() for name in children)
    for place in range(1, count + 1):
        conv, bn = children.get(f"conv{place}"), children.get(f"bn{place}")
        act = children.get(f"act{place}") or children.get("relu")
        last = place == count > 1  # its sum with the shortcut comes before the activation
        if isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d):
            if last:
                yield _Place(parent, f"conv{place}", conv, bn, None, (f"bn{place}",))
            elif isinstance(act, (nn.ReLU, nn.ReLU6)):
                inside = type(act)()
                yield _Place(parent, f"conv{place}", conv, bn, inside, (f"bn{place}",))


@contextmanager
def ftwt_recording(model: nn.Module) -> Iterator[None]:
    """Let the masked convolutions keep logits, targets and masks of their last call.

    Args:
        model: A model with `FTWTConv2d` layers; they compute all filters while this is open.

    Raises:
        ValueError: The model has none.

    Example:
        >>> net = nn.Sequential(FTWTConv2d(nn.Conv2d(1, 4, 3)))
        >>> with ftwt_recording(net):
        ...     _ = net(torch.randn(2, 1, 5, 5))
        ...     tuple(net[0].mask.shape)
        (2, 4)
    """
    layers = _layers(model)
    try:
        for layer in layers:
            layer.recording = True
        yield
    finally:
        for layer in layers:
            layer.recording, layer.record = False, None


def ftwt_loss(model: nn.Module) -> Tensor:
    """The loss of the heads in the last call: how far they are from the filters that fired.

    It is the binary cross-entropy of logits and targets, summed over filters, and its mean over
    images and layers; to be added to the loss of the task inside `ftwt_recording`.

    Args:
        model: A model with `FTWTConv2d` layers.

    Returns:
        A scalar.

    Raises:
        ValueError: The model has no such layer, or one that has not run inside `ftwt_recording`.

    Source:
        Elkerdawy et al., "Fire Together Wire Together", 2022, the self-supervised loss.

    Example:
        >>> net = nn.Sequential(FTWTConv2d(nn.Conv2d(1, 4, 3)))
        >>> with ftwt_recording(net):
        ...     _ = net(torch.randn(2, 1, 5, 5))
        ...     ftwt_loss(net).backward()
        >>> net[0].conv.weight.grad is None
        True
    """
    return _head_loss([(record.logits, record.target) for record in _records(model)])


def open_gates(
    model: nn.Module, batches: Iterable[Tensor], *, lr: float = 0.1, max_batches: int = 500
) -> None:
    """Train the heads to let all filters through, so that masking starts from the dense model.

    Args:
        model: A model with `FTWTConv2d` layers; nothing but their heads changes.
        batches: Images, a batch at a time.
        lr: Learning rate of SGD, whose momentum is 0.9.
        max_batches: Batches to use.

    Raises:
        ValueError: The model has no such layer.

    Source:
        Elkerdawy et al., "Fire Together Wire Together", 2022, the initialisation of the heads.
    """
    heads = [p for layer in _layers(model) for p in layer.predictor.parameters()]
    optimizer = torch.optim.SGD(heads, lr, momentum=0.9)
    with _evaluating(model), ftwt_recording(model):
        for _, batch in zip(range(max_batches), batches, strict=False):
            model(batch)
            logits = [record.logits for record in _records(model)]
            loss = _head_loss([(g, torch.ones_like(g)) for g in logits])
            for head, grad in zip(heads, torch.autograd.grad(loss, heads), strict=True):
                head.grad = grad
            optimizer.step()
            optimizer.zero_grad()


class FlopCount(NamedTuple):
    """Multiplications for an image, on average.

    Attributes:
        macs: Those that the masks leave to the convolutions.
        predictor: Those of the heads.
        dense: Those of the convolutions without masks.
    """

    macs: float
    predictor: float
    dense: float

    @property
    def reduction(self) -> float:
        """Share of the dense multiplications that is saved, the heads' own deducted."""
        return 1 - (self.macs + self.predictor) / self.dense


def measured_flops(model: nn.Module, batches: Iterable[Tensor] | None = None) -> FlopCount:
    """Multiplications of the masked convolutions of a model.

    A convolution multiplies, at each place of its output, the kernels of the kept filters with the
    input channels that are not zero everywhere.

    Args:
        model: A model with `FTWTConv2d` layers.
        batches: Images, a batch at a time, to run in evaluation mode; None: the last call counts,
            inside `ftwt_recording`.

    Raises:
        ValueError: The model has no such layer, one that has not run, or no images.

    Source:
        Elkerdawy et al., "Fire Together Wire Together", 2022.

    Example:
        >>> net = nn.Sequential(FTWTConv2d(nn.Conv2d(1, 4, 3)))
        >>> net[0].gate = "open"
        >>> measured_flops(net, [torch.randn(2, 1, 5, 5)])
        FlopCount(macs=324.0, predictor=4.0, dense=324.0)
    """
    if batches is None:
        return _flops(model, [_records(model)])
    found = []
    with _evaluating(model), torch.no_grad(), ftwt_recording(model):
        for batch in batches:
            model(batch)
            found.append(_records(model))
    return _flops(model, found)


def estimate_flops(
    model: nn.Module, batches: Sequence[Tensor], thresholds: Sequence[float], **options: Any
) -> dict[float, FlopCount]:
    """What thresholds would save, before any training: every layer is masked by its own target.

    Args:
        model: A trained model, converted or not; it is left as it is.
        batches: A few batches of images.
        thresholds: Thresholds to try.
        **options: Options of `FTWTConv2d`, for a model that is not converted.

    Returns:
        Multiplications for each threshold.

    Raises:
        ValueError: No convolution to mask, no images, or a threshold out of its range.

    Source:
        Elkerdawy et al., "Fire Together Wire Together", 2022, the choice of the threshold.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
        >>> found = estimate_flops(net, [torch.randn(8, 1, 7, 7)], (0.5, 0.9))
        >>> found[0.5].reduction > found[0.9].reduction
        True
    """
    table = {}
    for threshold in thresholds:
        gated = copy.deepcopy(model)
        if find(gated, FTWTConv2d):
            for layer in _layers(gated):
                layer.set_threshold(threshold)
        else:
            ftwt_convert(gated, threshold, **options)
        for layer in _layers(gated):
            layer.gate = "target"
        table[threshold] = measured_flops(gated, batches)
    return table


def _head_loss(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    losses = [
        F.binary_cross_entropy_with_logits(g, target.to(g.dtype), reduction="none").sum(-1).mean()
        for g, target in pairs
    ]
    return torch.stack(losses).mean()


def _flops(model: nn.Module, calls: Sequence[Sequence[GateRecord]]) -> FlopCount:
    images = sum(len(records[0].macs) for records in calls)
    if not images:
        raise ValueError("batches: expected images, got none")
    macs = sum(int(record.macs.sum()) for records in calls for record in records)
    dense = sum(r.dense * len(r.macs) for records in calls for r in records)
    heads = sum(layer.predictor.macs for layer in _layers(model))
    return FlopCount(macs / images, float(heads), dense / images)


def _records(model: nn.Module) -> list[GateRecord]:
    records = [layer.record for layer in _layers(model)]
    if None in records:
        raise ValueError(
            "model: expected a call inside ftwt_recording(model), got a layer that has not run"
        )
    return cast(list[GateRecord], records)


def _layers(model: nn.Module) -> list[FTWTConv2d]:
    found = list(find(model, FTWTConv2d).values())
    if not found:
        raise ValueError("model: expected FTWTConv2d layers, got none")
    return cast(list[FTWTConv2d], found)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for all modules, each of which then gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
