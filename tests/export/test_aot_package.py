"""AOTInductor packages: the same images as torch's in Python and in C++, built with CMake or g++, and wrong inputs refused."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from exported_models import INFO, once, tiny_denoiser

import fastcm
from fastcm.cli import main
from fastcm.errors import InputError
from fastcm.export import to_aot
from fastcm.generation.onnx_contract import Contract
from fastcm.weights.model_folder import save_model

CPP = Path(to_aot.__file__).resolve().parent / "cpp"
CHECKS = """
#include <iostream>
#include "fastcm.hpp"
int main(int, char** argv) {
  fastcm::Generator generator(argv[1]);
  const auto seeds = torch::zeros({2}, torch::kLong), labels = torch::zeros({2}, torch::kLong);
  const std::vector<std::vector<at::Tensor>> wrong = {
      {seeds}, {seeds.to(torch::kFloat), labels}, {seeds, labels.slice(0, 0, 1)}, {seeds.unsqueeze(1), labels}, {at::Tensor(), labels},
      {seeds.slice(0, 0, 0), labels.slice(0, 0, 0)}};
  for (const auto& inputs : wrong) {
    try {
      generator(inputs);
      std::cout << "taken\\n";
    } catch (const std::invalid_argument& error) {
      std::cout << error.what() << "\\n";
    }
  }
  std::cout << generator({seeds, labels}).sizes() << "\\n";
}
"""
gcc = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@pytest.fixture(scope="module")
def exported():
    """(model folder, package of seeds to bytes), written by the command."""

    def make(folder):
        save_model(folder / "model", tiny_denoiser(), INFO)
        (folder / "package").mkdir()
        assert main(["export", str(folder / "model"), "--aot", str(folder / "package" / "tiny.pt2"), "--seeded", "--uint8"]) == 0
        return folder / "model", folder / "package" / "tiny.pt2"

    return once("aot", make)


def test_what_the_package_states():
    contract = Contract(steps=2, channels=3, resolution=8, classes=4, batch=6)
    assert to_aot.stated(contract) == {
        "fastcm.inputs": "noise float32 2 3 8 8;labels int64",
        "fastcm.output": "images float32 3 8 8",
        "fastcm.batch": "6",
    }
    assert to_aot.stated(Contract(steps=1, channels=1, resolution=8, seeded=True, uint8=True)) == {
        "fastcm.inputs": "seeds int64",
        "fastcm.output": "images uint8 8 8 1",
        "fastcm.batch": "0",
    }


@pytest.mark.slow
def test_a_program_is_loaded_with_trust_alone(tmp_path, capsys):
    file = tmp_path / "x.pt2"
    file.write_bytes(b"no package")
    with pytest.raises(InputError, match="a program in MODEL: .*x.pt2. Loading it runs its code: give --trust"):
        fastcm.load(file)
    with pytest.raises(InputError, match="a program for CPUs in MODEL"):
        fastcm.load(file, trust=True, device="cuda")
    with pytest.raises(InputError, match="cannot load .*x.pt2"):
        fastcm.load(file, trust=True)
    save_model(tmp_path / "model", tiny_denoiser(), INFO)
    for options, words in (
        ([str(tmp_path / "x.onnx")], "unknown kind of file in --aot"),
        ([str(tmp_path / "y.pt2"), "--precision", "fp16"], "an option that --aot decides itself: --precision"),
        ([str(tmp_path / "y.pt2"), "--web", "z"], "several targets at once in fastcm export: --web, --aot"),
    ):
        assert main(["export", str(tmp_path / "model"), "--aot", *options]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "y.pt2").exists()


@gcc
@pytest.mark.long
def test_python_draws_the_same_images(exported):
    model, package = exported
    seeds = [0, -1, 2**63 - 1, 5, 6]
    images = fastcm.load(package, trust=True)(seeds, "bee")
    expected = fastcm.load(model, device="cpu")(seeds, "bee")
    assert images.shape == (5, 8, 8, 1) and expected.std() > 10 and np.abs(images.astype(int) - expected).max() <= 1
    names = [file.name for file in package.parent.iterdir()]
    assert f"{package.name}.manifest.json" in names and not any(name.startswith(".") for name in names)
    generator = fastcm.load(package, trust=True)
    with pytest.raises(InputError, match="wrong shape in input seeds"):
        generator.run({"seeds": np.zeros(3, np.int64), "labels": np.zeros(2, np.int64)})
    with pytest.raises(InputError, match="other noise levels"):
        generator([0], steps=2)


@gcc
@pytest.mark.long
def test_cpp_draws_the_same_image(exported, tmp_path):
    """The example by its CMakeLists where CMake is installed, else by g++ directly; its image, its latency, its errors."""
    model, package = exported
    program = build_example(tmp_path)
    result = run(program, package, "-7", "2", tmp_path / "out.pgm")
    assert result.returncode == 0 and result.stdout.startswith("seed to image: p50 "), result.stderr
    print(result.stdout)
    content = (tmp_path / "out.pgm").read_bytes()
    assert content.startswith(b"P5\n8 8\n255\n")
    image = np.frombuffer(content[-64:], np.uint8).reshape(8, 8)
    expected = fastcm.load(model, device="cpu")([-7], 2)[0, ..., 0]
    assert expected.std() > 10 and np.abs(image.astype(int) - expected).max() <= 1
    missing = run(program, tmp_path / "none.pt2", "0", "0", tmp_path / "out.pgm")
    assert missing.returncode == 1 and missing.stderr.startswith("draw: ")


@gcc
@pytest.mark.long
def test_the_wrapper_refuses_wrong_inputs(exported, tmp_path):
    (tmp_path / "checks.cpp").write_text(CHECKS)
    program = compile_directly(tmp_path / "checks.cpp", tmp_path / "checks")
    result = run(program, exported[1])
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "wrong number of inputs: 1, not 2"
    assert lines[1] == "wrong type of input seeds: Float, not Long"
    assert lines[2] == "wrong shape of input labels: [1], not [2]"
    assert lines[3] == "wrong shape of input seeds: [2, 1], not [2]"
    assert lines[4] == "input seeds is not a tensor on the CPU"
    assert lines[5].startswith("wrong shape of input seeds: [0]")
    assert lines[6] == "[2, 8, 8, 1]"


def run(*command) -> subprocess.CompletedProcess:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120, check=False)


def build_example(folder: Path) -> Path:
    if shutil.which("cmake") is None:
        return compile_directly(CPP / "draw.cpp", folder / "draw")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in (["cmake", "-S", CPP, "-B", folder / "build", prefix], ["cmake", "--build", folder / "build"]):
        result = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=400, check=False)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    return folder / "build" / "draw"


def compile_directly(source: Path, program: Path) -> Path:
    root = Path(torch.__file__).parent
    include = [f"-I{root / 'include'}", f"-I{root / 'include' / 'torch' / 'csrc' / 'api' / 'include'}", f"-I{CPP}"]
    libraries = [f"-L{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root / 'lib'}", "-Wl,--no-as-needed"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-O0", abi, *include, str(source), *libraries, "-o", str(program)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return program
