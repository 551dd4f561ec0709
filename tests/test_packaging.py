"""The package as others get it: a wheel in a new environment, away from the checkout; and the checkout itself, installed editable."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("kernels", "export", "benchmarks", "fastcm")
PARTS = (*SOURCES, "setup.py", "pyproject.toml", "README.md", "LICENSE")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
REPORT = """
import importlib, json
from importlib import resources
names = ("fastcm", "fastcm.kernels", "fastcm.export", "fastcm.benchmarks", "fastcm.data.dataset")
files = {name: importlib.import_module(name).__file__ for name in names}
dataset = importlib.import_module("fastcm.data.dataset").open_dataset("digits")
licence = (resources.files("fastcm.data") / "builtin" / "DIGITS-LICENSE.txt").read_text()
print(json.dumps({"files": files, "pictures": len(dataset), "licence": licence[:40]}))
"""


def run(*command, cwd):
    result = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that nothing that lies about in the checkout (build/, egg-info) gets into it, by the backend at hand."""
    folder = tmp_path_factory.mktemp("source")
    for part in PARTS:
        source = ROOT / part
        shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__")) if source.is_dir() else shutil.copy(
            source, folder
        )
    script = "import setuptools.build_meta as backend; print(backend.build_wheel('dist'))"
    name = run(sys.executable, "-c", script, cwd=folder).split()[-1]
    return folder / "dist" / name


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A new environment with the wheel and, by a .pth file, the packages of this one except its fastcm."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    here = {path for path in sys.path if path.endswith(("site-packages", "dist-packages"))}
    # A path line, and no site.addsitedir: the other environment's own .pth files, its editable fastcm among them, stay unread.
    (site / "dependencies.pth").write_text("\n".join(sorted(here)) + "\n")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    empty = folder / "empty"
    empty.mkdir()
    return python, site, empty


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        metadata = next(archive.read(name).decode() for name in archive.namelist() if name.endswith("METADATA"))
        licences = [Path(name).name for name in archive.namelist() if "/licenses/" in name]
    expected = {
        f"{'fastcm/' if folder != 'fastcm' else ''}{path.relative_to(ROOT).as_posix()}"
        for folder in SOURCES
        for path in (ROOT / folder).rglob("*.py")
    }
    assert expected <= set(names)
    others = {name for name in names if not name.endswith(".py")}
    assert {
        f"fastcm/data/builtin/{name}"
        for name in ("digits.npz", "emoji32.npz", "mnist.npz", "MNIST-LICENSE.txt", "models/mnist/model.safetensors")
    } <= others
    assert {"fastcm/export/web/index.html", "fastcm/export/web/philox.js", "fastcm/export/cpp/fastcm.hpp"} <= others
    assert not [name for name in others if not name.startswith(("fastcm/data/builtin/", "fastcm/export/"))]
    assert sorted(licences) == ["DIGITS-LICENSE.txt", "EMOJI32-LICENSE.txt", "LICENSE", "MNIST-LICENSE.txt"]
    assert wheel.stat().st_size < 8e6
    for extra in ("export", "gpu", "metrics", "lpips", "data", "hub", "serve", "test"):
        assert f"Provides-Extra: {extra}\n" in metadata
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert sorted(line.split()[1].split(">")[0].rstrip(";") for line in required) == "numpy pillow safetensors torch tqdm triton".split()


@pytest.mark.slow
def test_wheel_works_in_an_empty_folder(installed):
    python, site, empty = installed
    report = json.loads(run(python, "-c", REPORT, cwd=empty))
    assert all(Path(file).is_relative_to(site) for file in report["files"].values()), report
    assert report["pictures"] == 1797 and report["licence"].startswith("digits.npz: Optical Recognition")
    assert run(python.parent / "fastcm", "--version", cwd=empty).startswith("fastcm 0.")
    assert "bench" in run(python, "-m", "fastcm", "--help", cwd=empty)
    assert list(empty.iterdir()) == []


@pytest.mark.slow
def test_editable_install_takes_the_checkout(tmp_path):
    report = json.loads(run(sys.executable, "-c", REPORT, cwd=tmp_path))
    assert report["pictures"] == 1797
    assert {name: Path(file).relative_to(ROOT).parts[0] for name, file in report["files"].items()} == {
        "fastcm": "fastcm",
        "fastcm.kernels": "kernels",
        "fastcm.export": "export",
        "fastcm.benchmarks": "benchmarks",
        "fastcm.data.dataset": "fastcm",
    }


def test_every_requirement_is_pinned():
    """What the extras ask for (lpips aside: it brings torchvision) stands in constraints.txt, so that an install is the tested one."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [group for name, group in project["optional-dependencies"].items() if name != "lpips"]
    asked = {_name(line) for group in (project["dependencies"], *extras) for line in group} - {"fastcm"}
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(line.count("==") == 1 and "/" not in line and "+" not in line for line in lines)
    pinned = {_name(line) for line in lines}
    assert asked - pinned == {"onnxruntime", "setuptools"}  # another processor's build; the build tool
    assert not pinned & {"torchvision", "lpips"}


def _name(requirement):
    for end in " ;[=<>!~":
        requirement = requirement.split(end)[0]
    return requirement.lower().replace("_", "-")
