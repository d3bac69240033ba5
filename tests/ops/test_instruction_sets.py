"""The same kernels compiled for several instruction sets: each gives the reference's results."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from torchzoo.ops import library

ABI = Path(__file__).parents[1] / "abi.py"


@pytest.mark.parametrize("wanted", ["baseline", "avx2", "avx512"])
def test_forced_instruction_set_gives_the_results_of_the_reference(wanted):
    cpu = library.load()["cpu"]
    if not cpu.loaded:
        pytest.skip(f"no CPU library: {cpu.error}")
    done = subprocess.run(
        [sys.executable, str(ABI), str(cpu.path)],
        env=os.environ | {"TORCHZOO_CPU_ISA": wanted},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    used = done.stdout.split(":")[0]
    if used != wanted and wanted != "baseline":
        pytest.skip(f"this processor has no {wanted}")
    assert used == wanted
