"""torchzoo: PyTorch layers from papers, each with its proof and its measured claim.

>>> import torchzoo
>>> layer = torchzoo.create("GaussianAdaptiveAttention", dim=64)
"""

from torchzoo._lazy import attach
from torchzoo.version import __version__

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "catalogue": ["Paper", "papers"],
        "hub": ["ZooModel", "from_pretrained"],
        "registry": ["Example", "create", "names", "register"],
    },
    submodules=[
        "activations",
        "attention",
        "catalogue",
        "circuits",
        "common",
        "experiment",
        "finetuning",
        "gp",
        "hub",
        "moe",
        "ops",
        "registry",
        "sparsity",
        "ssm",
        "surgery",
        "swaps",
        "testing",
        "trainer",
    ],
)
__all__ += ["__version__"]
