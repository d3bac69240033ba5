"""Only what setup.cfg can't say: a wheel that holds kernels serves every Python on one platform.

The kernels use the LibTorch stable ABI and no Python API, hence the tag `py3-none-<platform>`. They
are put into torchzoo/lib by `torchzoo build --out torchzoo/lib` beforehand (`make wheel` does).
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel


class Wheel(bdist_wheel):
    def finalize_options(self) -> None:
        super().finalize_options()
        if any(Path("torchzoo/lib").glob("*.so")):
            self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if not self.root_is_pure else (python, abi, platform)


setup(cmdclass={"bdist_wheel": Wheel})
