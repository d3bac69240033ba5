"""Fusing the pairs of BatchNorm and ReLU of a model into EvoNorm layers.

Which activation follows which norm is a matter of the forward, not of the order of attributes. So
each module that holds norms is traced, with its children as leaves, and a norm is fused where its
only use is an activation. An activation all of whose calls follow fused norms becomes an identity.
One that also serves elsewhere, as the ReLU of torchvision's ResNet blocks after their additions, or
that is a function, is left out of the traced forward, which takes the module's place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from torchzoo.activations.evonorm_sample import EvoNormS0
from torchzoo.surgery import Replaced, find, replace

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_MODULES = (nn.ReLU, nn.ReLU6, nn.SiLU)
_FUNCTIONS = (torch.relu, torch.relu_, F.relu, F.relu_, F.relu6, F.silu)
_METHODS = ("relu", "relu_")


@dataclass(frozen=True)
class Fused(Replaced):
    """What `convert_norm_act` did.

    Attributes:
        names: The norms that gave way.
        left: For each norm that stays, why.
    """

    left: dict[str, str] = field(default_factory=dict)


def convert_norm_act(
    model: nn.Module, norm: Callable[..., nn.Module] = EvoNormS0, **options: Any
) -> Fused:
    """Fuse the pairs of BatchNorm and ReLU (or ReLU6, SiLU) of a model into EvoNorms, in place.

    Device, dtype and training mode carry over, and a running variance where both have one. Scale
    and shift start at 1 and 0: a BatchNorm's act before the ReLU, these after, so that no choice
    of them keeps the function, and the model has to be trained. A module whose forward had to be
    rewritten becomes a `torch.fx.GraphModule` with the same children.

    Args:
        model: The model to change.
        norm: `EvoNormS0` or another, called with the number of channels.
        **options: Passed to `norm`, for example `group_size=4`.

    Returns:
        The names of the fused norms, and for each other the reason why it was left.

    Raises:
        ValueError: The model has no BatchNorm, or `norm` refuses a number of channels or an
            option; the model is then as it was.

    Source:
        Liu, Brock, Simonyan and Le, "Evolving Normalization-Activation Layers", 2020, where one
        layer takes the place of each pair.

    Example:
        >>> block = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> convert_norm_act(block, group_size=4).names
        ('1',)
        >>> block[1:]
        Sequential(
          (1): EvoNormS0(8, eps=1e-05, groups=2)
          (2): Identity()
        )
    """
    norms = find(model, lambda name, module: type(module) in _NORMS)
    if not norms:
        raise ValueError("model: expected one with BatchNorm layers, got none")
    holders = [m for m in model.modules() if any(type(c) in _NORMS for c in m.children())]
    reasons = dict.fromkeys(norms.values(), "no activation of its own follows in the same forward")
    calls = [call for holder in holders for call in _pairs(holder, reasons)]
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    idle = _identities(calls, places)
    for call in calls:
        if call.holder is model and call.activation not in idle:
            reasons[call.norm] = "its activation serves elsewhere too, in the model's own forward"
    calls = [c for c in calls if c.activation in idle or c.holder is not model]
    fused = {call.norm for call in calls}

    names: tuple[str, ...] = ()
    if fused:
        names = replace(
            model, lambda name, old: old in fused, lambda old: _convert(old, norm, options)
        ).names
    if idle:
        replace(model, lambda name, old: old in idle, lambda old: nn.Identity())
    for holder in holders:
        spare = [c.node for c in calls if c.holder is holder and c.activation not in idle]
        if spare:
            _rewrite(model, holder, spare)
    return Fused(names, {n: reasons[old] for n, old in norms.items() if n not in names})


class _Call(NamedTuple):
    """A norm whose only use is an activation: in which forward, and the activation's node."""

    norm: nn.Module
    holder: nn.Module
    node: fx.Node
    activation: nn.Module | None  # None: a function


class _OneLevel(fx.Tracer):
    """Traces a forward down to the calls of its children."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _trace(module: nn.Module) -> fx.Graph:
    """The forward of a module, which must be the same in both modes."""
    mode, graphs = module.training, []
    try:
        for module.training in (False, True):
            graphs.append(_OneLevel().trace(module))
    finally:
        module.training = mode
    if str(graphs[0]) != str(graphs[1]):
        raise ValueError("it depends on the mode")
    return graphs[0]


def _pairs(holder: nn.Module, reasons: dict[nn.Module, str]) -> list[_Call]:
    """The pairs in the forward of a module; says of the other norms why they are none."""
    own = [child for child in holder.children() if type(child) in _NORMS]
    try:
        graph = _trace(holder)
    except Exception as error:  # whatever the forward of others raises when it gets proxies
        why = f"the forward of {type(holder).__name__} can't be traced: {error}"
        reasons.update(dict.fromkeys(own, why))
        return []
    called = [_target(holder, node) for node in graph.nodes]
    found = []
    for node, norm in zip(graph.nodes, called, strict=True):
        if norm is None or norm not in own:
            continue
        user = _only_user(holder, node)
        if user is None or not _is_activation(holder, user):
            continue
        if called.count(norm) > 1:
            reasons[norm] = "it is called several times"
        else:
            found.append(_Call(norm, holder, user, _target(holder, user)))
    return found


def _target(holder: nn.Module, node: fx.Node) -> nn.Module | None:
    return holder.get_submodule(str(node.target)) if node.op == "call_module" else None


def _only_user(holder: nn.Module, node: fx.Node) -> fx.Node | None:
    """What alone uses a node's output; identities, such as a drop-out left out, are passed by."""
    while len(node.users) == 1:
        (node,) = node.users
        if type(_target(holder, node)) is not nn.Identity:
            return node
    return None


def _is_activation(holder: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(_target(holder, node)) in _MODULES
    return node.target in (_METHODS if node.op == "call_method" else _FUNCTIONS)


def _identities(calls: list[_Call], places: Counter[int]) -> set[nn.Module]:
    """The activations that have no call but those after fused norms, and no other place."""
    fused = {call.node for call in calls}
    idle = set()
    for call in calls:
        if call.activation is not None and places[id(call.activation)] == 1:
            nodes = call.node.graph.nodes
            if all(n in fused for n in nodes if _target(call.holder, n) is call.activation):
                idle.add(call.activation)
    return idle


def _convert(old: nn.Module, norm: Callable[..., nn.Module], options: Any) -> nn.Module:
    new = norm(old.num_features, **options)
    running = getattr(new, "running_var", None)
    if running is not None and old.running_var is not None:
        with torch.no_grad():
            running.copy_(old.running_var)
    return new


def _rewrite(model: nn.Module, holder: nn.Module, spare: list[fx.Node]) -> None:
    """Put the traced forward, without some activations, in the place of a module."""
    graph = spare[0].graph
    for node in spare:
        node.replace_all_uses_with(node.all_input_nodes[0])
        graph.erase_node(node)
    traced = fx.GraphModule(holder, graph, type(holder).__name__)
    for name, child in holder.named_children():  # those that the forward does not call
        if name not in dict(traced.named_children()):
            traced.add_module(name, child)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if child is holder:
                setattr(parent, name, traced)
