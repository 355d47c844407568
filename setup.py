"""The compiled extensions are declared here; everything else is in pyproject.toml."""

from setuptools import setup

setup()
