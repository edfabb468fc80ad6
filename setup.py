"""Maps kernels/triton to the package mima.kernels and builds the native extension."""

from setuptools import setup

setup(package_dir={"mima.kernels": "kernels/triton"})
