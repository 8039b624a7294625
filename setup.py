"""Builds the optional C++ extension ``ndm_fast._C``; everything else is in pyproject.toml."""

from setuptools import setup

setup()
