"""Activation functions, and layers whose activation is what they learn."""

from torchzoo._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {},
)
