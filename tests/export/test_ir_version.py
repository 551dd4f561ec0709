"""Files in the oldest form that has their operators, read by the runtimes of that time; companions under the file's whole name."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from exported_models import exported

from fastcm.export import publish
from fastcm.export.to_onnx import lowest_ir_version
from fastcm.generation.onnx_generator import OnnxGenerator

OLD_RUNTIME = ("onnxruntime==1.17.3", "numpy==1.26.4")


@pytest.mark.parametrize(("opset", "version"), [(18, 8), (19, 9), (20, 9), (21, 10), (22, 10), (23, 11)])
def test_the_lowest_version_of_each_opset(opset, version):
    assert lowest_ir_version({"": opset}) == lowest_ir_version({"": opset, "com.microsoft": 1}) == version


@pytest.mark.slow
@pytest.mark.parametrize(("form", "version"), [("plain", 8), ("seeded", 8), ("tensorrt", 10)])
def test_files_have_it(form, version):
    import onnx

    assert onnx.load(exported(form).path, load_external_data=False).ir_version == version


def test_companions_carry_the_whole_name(tmp_path):
    for name in ("m.onnx", "m.pt2", "m"):
        with publish.staging(tmp_path / name, option="--onnx") as folder:
            (folder / name).write_text(name)
            publish.write_manifest(folder, tmp_path / name, {"of": name})
            publish.publish(folder, tmp_path / name)
    manifests = [f"{name}.manifest.json" for name in ("m", "m.onnx", "m.pt2")]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["m", "m.onnx", "m.pt2", *manifests])
    assert publish.manifest_path(Path("model.v2")).name == "model.v2.manifest.json"


@pytest.mark.long
def test_a_runtime_of_that_time_draws_the_same_images(tmp_path):
    """ONNX Runtime 1.17 knows versions up to 9. Its wheel is for Python 3.8 to 3.12 and for NumPy 1."""
    packages = tmp_path / "packages"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--only-binary=:all:", "--target", str(packages), *OLD_RUNTIME]
    if subprocess.run([*install, "flatbuffers", "coloredlogs", "humanfriendly", "protobuf<5", "packaging"], capture_output=True).returncode:
        pytest.skip("the wheel of ONNX Runtime 1.17 cannot be had here")
    code = (
        "import sys, numpy, onnxruntime\n"
        "assert onnxruntime.__version__ == '1.17.3'\n"
        "seeds, labels = numpy.arange(3), numpy.array([0, 1, 2])\n"
        "session = onnxruntime.InferenceSession(sys.argv[1])\n"
        "numpy.save(sys.argv[2], session.run(None, {'seeds': seeds, 'labels': labels})[0])\n"
    )
    path, images = exported("seeded").path, tmp_path / "images.npy"
    subprocess.run([sys.executable, "-c", code, path, images], check=True, env={"PYTHONPATH": str(packages)})
    want = OnnxGenerator(path, "cpu").run({"seeds": np.arange(3), "labels": np.arange(3)})
    assert want.std() > 0.01
    np.testing.assert_allclose(np.load(images), want, atol=1e-4)
