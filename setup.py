"""Leaves ComfyUI's front end out of what pip installs: pyproject.toml names it for the registry alone."""

from __future__ import annotations

from setuptools import Distribution, setup


class PackDistribution(Distribution):
    """setuptools' own, less the front end: a diffusers user has no use for 85 MB of browser code."""

    def finalize_options(self) -> None:
        """Drop the requirement after pyproject.toml was read and before any metadata is written."""
        super().finalize_options()
        self.install_requires = [need for need in self.install_requires if not need.startswith("comfyui-")]


setup(distclass=PackDistribution)
