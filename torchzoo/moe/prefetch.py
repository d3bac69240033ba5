"""Copies of experts that are under way before they are needed, and freed in between.

In forward the copies of a layer are gathered while the layer before computes:

    layer l     start gather(l + 1) | exchange, experts, the rest of the model ...
    layer l + 1                                                     wait | experts

In backward the gather that brings freed copies back and the reduction of gradients go on likewise:

    layer l + 1   start gather(l) | experts, start reduce(l + 1) | the rest of the model ...
    layer l       wait for gather(l) | experts | wait for reduce(l + 1)

Autograd itself delays the wait for a reduction: of the nodes that are ready it runs the one that
was made last in forward, and the node that waits for layer `l + 1` was made before all of layer
`l`. So gradients reach the parameters as usual, and hooks and `torch.autograd.grad` see them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.graph import saved_tensors_hooks

from torchzoo.moe.collectives import (
    sparse_reduce_scatter,
    start_all_gather,
    start_reduce_scatter,
)
from torchzoo.moe.transfer import Transfer

if TYPE_CHECKING:
    from torchzoo.moe.parallel import FSSDPExperts


class Copies:
    """The copies of a layer's experts in one iteration; their gather starts when this is made.

    Args:
        layer: The layer.
        preceding: The copies of the layer before it, in the same iteration.

    Attributes:
        placement: Owners and holders.
        local: The owners' rows by name, as autograd sees them; empty once taken.
        needed: Names of the weights that backward needs, in order.
        again: Gathers under way for backward, by name.
        reducing: Reductions of gradients under way, by name.
    """

    def __init__(self, layer: FSSDPExperts, preceding: Copies | None = None) -> None:
        self.layer = weakref.ref(layer)
        self.group, self.traffic = layer.group, layer.traffic
        self.placement = layer.planned()
        self.preceding = preceding
        self.following: weakref.ref[Copies] | None = None
        if preceding is not None:
            preceding.following = weakref.ref(self)
        self.needed: dict[str, None] = {}
        self.again: dict[str, Transfer] = {}
        self.reducing: dict[str, Transfer] = {}
        self._versions = _versions(layer)
        with torch.enable_grad():
            self.local = {
                name: _Reduced.apply(layer.shared(layer.stacked(name)), self, name)
                for name in layer.names
            }
        self._gathering = {name: self._start(row) for name, row in self.local.items()}

    def _start(self, row: Tensor) -> Transfer:
        return start_all_gather(row, self.placement, self.group, traffic=self.traffic)

    def take(self) -> dict[str, Tensor]:
        """Wait for the copies; by name.

        Raises:
            RuntimeError: The weights have changed since the gather began.
        """
        layer = self.layer()
        if layer is None or _versions(layer) != self._versions:
            self.drop()
            raise RuntimeError(
                "prefetch: the weights changed between the forward of the layer before and this "
                "one's; call prefetch_in_order with the layers in the order of the forward"
            )
        local, self.local = self.local, {}
        return {name: _Gathered.apply(row, self, name) for name, row in local.items()}

    def drop(self) -> None:
        """Wait for copies that nobody took, so that no message is left on its way."""
        self.local = {}
        while self._gathering:
            self._gathering.popitem()[1].wait()

    def advance(self) -> None:
        """Go on to the next round of what is under way."""
        for transfers in (self._gathering, self.again, self.reducing):
            for transfer in transfers.values():
                transfer.advance()

    def enter_backward(self) -> None:
        """Start to gather what backward needs: of this layer, if need be, and of the one before."""
        following = None if self.following is None else self.following()
        for copies in (following, self):
            if copies is not None:
                copies.advance()
        for copies in (self, self.preceding):
            if copies is not None and not copies.again:
                copies._start_again()
        Variable._execution_engine.queue_callback(self._settle)

    @torch.no_grad()
    def _start_again(self) -> None:
        layer = self.layer()
        assert layer is not None
        self.again = {name: self._start(layer.stacked(name)) for name in self.needed}

    def _settle(self) -> None:
        """At the end of backward, wait for what it turned out not to need."""
        for copies in (self, self.preceding):
            while copies is not None and copies.again:
                copies.again.popitem()[1].wait()


def _versions(layer: FSSDPExperts) -> list[tuple[int, int]]:
    """Changes whenever a parameter of the layer is written or replaced."""
    return [(id(weight), weight._version) for weight in layer.parameters()]


class _Reduced(torch.autograd.Function):
    """The owners' rows; in backward their gradient, once the reduction is done."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, copies: Copies, name: str) -> Tensor:
        ctx.key = copies, name
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        copies, name = ctx.key
        transfer = copies.reducing.pop(name, None)
        return grads[0] if transfer is None else transfer.wait(), None, None


class _Gathered(torch.autograd.Function):
    """The holders' rows; in backward the reduction starts, for `_Reduced` to wait for."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, copies: Copies, name: str) -> Tensor:
        ctx.key = copies, name, local.shape
        return copies._gathering.pop(name).wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        copies, name, shape = ctx.key
        options = copies.placement, copies.group
        if torch.is_grad_enabled():
            rows = sparse_reduce_scatter(grads[0], *options, traffic=copies.traffic)
            return rows, None, None
        start = start_reduce_scatter(grads[0], *options, traffic=copies.traffic)
        copies.reducing[name] = start
        return grads[0].new_zeros(()).expand(shape), None, None


def freed(
    weights: Mapping[str, Tensor], again: Callable[[str], Tensor], needed: dict[str, None]
) -> saved_tensors_hooks:
    """A context in which autograd saves, of views of weights, only how to make them again.

    The names of the weights that backward needs are entered into `needed`.
    """
    names = {weight.untyped_storage()._cdata: name for name, weight in weights.items()}

    def pack(tensor: Tensor) -> Any:
        name = names.get(tensor.untyped_storage()._cdata)
        if name is None:
            return tensor
        needed[name] = None
        return name, tensor.shape, tensor.stride(), tensor.storage_offset()

    def unpack(saved: Any) -> Tensor:
        return saved if isinstance(saved, Tensor) else again(saved[0]).as_strided(*saved[1:])

    return saved_tensors_hooks(pack, unpack)
