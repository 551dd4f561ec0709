"""Package metadata that pyproject.toml cannot hold: kernels/, export/ and benchmarks/ stand at the top level and install inside fastcm."""

from setuptools import find_packages, setup

MAPPED = ("kernels", "export", "benchmarks")

setup(
    packages=find_packages(include=["fastcm", "fastcm.*"])
    + [f"fastcm.{name}" for name in find_packages(include=[f"{room}{rest}" for room in MAPPED for rest in ("", ".*")])],
    package_dir={"fastcm": "fastcm", **{f"fastcm.{name}": name for name in MAPPED}},
)
