"""What pyproject.toml cannot say: this folder is the package, and one of its requirements is the registry's alone."""

from __future__ import annotations

from typing import Any

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py


class PackDistribution(Distribution):
    """Leaves out the front end, named for the registry: a diffusers user has no use for 85 MB of browser code."""

    def parse_config_files(self, *args: Any, **kwargs: Any) -> None:
        """Drop the requirement after pyproject.toml was read and before any metadata is written."""
        super().parse_config_files(*args, **kwargs)
        kept = [need for need in self.install_requires if not need.startswith("comfyui-")]
        self.install_requires = self.metadata.install_requires = kept


class BuildPack(build_py):
    """Leaves out this file, which lies among the package's own."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """(package, module, file) of each module that is shipped."""
        found = super().find_package_modules(package, package_dir)
        return [entry for entry in found if entry[:2] != ("onestep", "setup")]


setup(distclass=PackDistribution, cmdclass={"build_py": BuildPack})
