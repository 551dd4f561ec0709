"""Package metadata that pyproject.toml cannot hold: kernels/, export/ and benchmarks/ stand at the top level and install inside fastcm."""

from setuptools import find_packages, setup

MAPPED = {"kernels": "fastcm.kernels", "export": "fastcm.export", "benchmarks": "fastcm.benchmarks"}

setup(
    packages=find_packages(include=["fastcm", "fastcm.*"]) + list(MAPPED.values()),
    package_dir={"fastcm": "fastcm", **{name: folder for folder, name in MAPPED.items()}},
)
