"""`import torchzoo` adds next to nothing to `import torch`."""

import subprocess
import sys

import pytest

HEAVY = {
    "einops",
    "gpytorch",
    "huggingface_hub",
    "matplotlib",
    "rich",
    "safetensors",
    "scipy",
    "sklearn",
    "torchvision",
    "typer",
}


def added(code):
    """The modules that `code` imports beyond torch, in a fresh interpreter."""
    program = f"import sys, torch; old = set(sys.modules); {code}; print(*(set(sys.modules) - old))"
    result = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    return set(result.stdout.split())


@pytest.mark.parametrize("code", ["import torchzoo", "import torchzoo; dir(torchzoo)"])
def test_import_is_light(code):
    modules = added(code)
    assert not {name.partition(".")[0] for name in modules} & HEAVY
    assert len([name for name in modules if name.startswith("torchzoo")]) < 15
    assert len(modules) < 30


def test_reading_the_catalogue_is_light():
    modules = added("import torchzoo; torchzoo.papers()")
    assert not {name.partition(".")[0] for name in modules} & HEAVY
