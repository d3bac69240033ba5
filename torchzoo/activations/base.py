"""What the elementwise activations share: their trained number, and putting them into models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzoo.hub import ZooModel
from torchzoo.surgery import Replaced, replace

_TWINS: dict[Any, type[nn.Module]] = {
    F.relu: nn.ReLU,
    torch.relu: nn.ReLU,
    F.relu6: nn.ReLU6,
    F.gelu: nn.GELU,
    F.silu: nn.SiLU,
    F.elu: nn.ELU,
    F.mish: nn.Mish,
    torch.tanh: nn.Tanh,
    torch.sigmoid: nn.Sigmoid,
}
"""Functions that models hold as an attribute, by the module that computes the same."""


class ActivationBase(ZooModel):
    """An activation of single elements with one number, or one for each feature, that may learn.

    Args:
        name: The number's name, as an attribute and in the `state_dict`.
        start: Its first value, a tensor on the CPU.
        learnable: Whether it is a parameter; else it is a buffer.
        device: Where it is held.
        dtype: Its type; None: torch's default.
    """

    def __init__(
        self,
        name: str,
        start: Tensor,
        learnable: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        self._name, self._start = name, start
        held = torch.empty(start.shape, device=device, dtype=dtype or torch.get_default_dtype())
        if learnable:
            self.register_parameter(name, nn.Parameter(held))
        else:
            self.register_buffer(name, held)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Go back to the first value."""
        with torch.no_grad():
            getattr(self, self._name).copy_(self._start)


def replace_activation(
    model: nn.Module,
    types: type[nn.Module] | tuple[type[nn.Module], ...],
    factory: Callable[[], nn.Module],
) -> Replaced:
    """Replace the activations of a model, in place.

    Functions count as the modules they stand for where a module holds them as an attribute, as
    `nn.TransformerEncoderLayer` holds `F.relu`; its fast path, which would go on computing the old
    activation, is switched off. The new modules take over training mode, device and dtype. A model
    that calls one activation in several places shares the new one too.

    Args:
        model: Any model: torchvision's, timm's, transformers', or one's own.
        types: What to replace, for example `(nn.ReLU, nn.GELU)`; subclasses count.
        factory: Makes a new activation, for example `CRReLU`.

    Returns:
        What was replaced: `.count` and `.names`.

    Raises:
        ValueError: The model holds no such activation, or is one itself.

    Example:
        >>> from torchzoo.activations import CRReLU
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
        >>> replace_activation(model, (nn.ReLU, nn.GELU), CRReLU).names
        ('1',)
    """
    for module in list(model.modules()):
        for name, value in list(vars(module).items()):
            twin = _TWINS.get(value) if callable(value) else None
            if twin is not None and issubclass(twin, types):
                setattr(module, name, twin().train(module.training))
    report = replace(model, types, lambda old: factory())
    new = {model.get_submodule(name) for name in report.names}
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and module.activation in new:
            module.activation_relu_or_gelu = 0
    return report
