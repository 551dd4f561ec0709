"""docs/deploy.md: its programs run as they stand there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from exported_models import exported, tiny_denoiser

from fastcm import cli
from fastcm.export.to_onnx import export_onnx
from fastcm.generation.onnx_generator import OnnxGenerator

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "deploy.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_python_programs_run(tmp_path):
    shutil.copy(exported("plain").path, tmp_path / "mnist.onnx")
    with_fastcm, without, _ = blocks("python")  # test_denoise.py runs the third
    # The classes of the tests' model are 0 to 2.
    with_fastcm = with_fastcm.replace("labels=3", "labels=2") + "\nassert images.shape == (16, 8, 8, 1) and images.std() > 10\n"
    without += "\nassert pixels.shape == (4, 1, 8, 8) and pixels.std() > 10\n"
    for program in (with_fastcm, without):
        subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)


GRAPH = {f"--{name}" for name in "steps sigmas precision target batch uint8 seeded task factor optimize tensorrt profile".split()}


def test_commands_of_the_page_are_fastcms():
    """Each option that the page names exists, and each option that shapes a graph stands on the page."""
    parser = cli.build_parser("export")
    known = {option for action in cli._actions_of(parser, "export") for option in action.option_strings}
    commands = re.findall(r"fastcm export [^`\n]+", PAGE)
    rows = re.findall(r"^\| `[^|]*`(?= \|)|^\| `--target.*?`", PAGE, flags=re.MULTILINE)
    named = set(re.findall(r"--[a-z0-9]+", " ".join(commands + rows)))
    assert len(commands) >= 4 and GRAPH <= named <= known


def onnxruntime_root():
    """Where ONNX Runtime's headers and library are, or None: $ONNXRUNTIME_ROOT, /usr/local, /usr."""
    for root in filter(None, (os.environ.get("ONNXRUNTIME_ROOT"), "/usr/local", "/usr")):
        for include in ("include", "include/onnxruntime"):
            if (Path(root) / include / "onnxruntime_cxx_api.h").is_file():
                return Path(root), Path(root) / include
    return None


@pytest.mark.slow
def test_the_cpp_program_draws_the_same_image(tmp_path):
    found, compiler = onnxruntime_root(), shutil.which("g++") or shutil.which("clang++")
    if found is None or compiler is None:
        pytest.skip("no headers of ONNX Runtime (set ONNXRUNTIME_ROOT) or no C++ compiler")
    root, include = found
    [source] = blocks("cpp")
    (tmp_path / "draw.cpp").write_text(source)
    flags = [f"-I{include}", f"-L{root / 'lib'}", "-lonnxruntime", f"-Wl,-rpath,{root / 'lib'}"]
    subprocess.run([compiler, "-std=c++17", "-Wall", "-Werror", "draw.cpp", *flags, "-o", "draw"], check=True, cwd=tmp_path)
    path = export_onnx(tiny_denoiser(), {}, out=tmp_path / "mnist.onnx", seeded=True, uint8=True).path
    for seed, label in ((0, 1), (-1, 2)):
        subprocess.run(["./draw", "mnist.onnx", str(seed), str(label), "out.pgm"], check=True, cwd=tmp_path)
        pixels = np.frombuffer((tmp_path / "out.pgm").read_bytes().removeprefix(b"P5\n8 8\n255\n"), np.uint8)
        assert np.array_equal(pixels.reshape(1, 8, 8, 1), OnnxGenerator(path)([seed], label))
