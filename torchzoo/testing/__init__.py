"""The contract that every registered module is held to, for modules of your own as well.

>>> import torch
>>> from torchzoo.testing import check_module
>>> from torchzoo.attention import GaussianAdaptiveAttention
>>> check_module(lambda **kw: GaussianAdaptiveAttention(4, **kw), (torch.randn(2, 5, 4),))
"""

from torchzoo._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "contract": [
            "CHECKS",
            "EXEMPTIONS",
            "SLOW_CHECKS",
            "applies",
            "check_module",
            "check_registered",
        ],
        "statistics": ["assert_within_se"],
        "subject": ["Subject"],
        "work": ["CountElements"],
    },
)
