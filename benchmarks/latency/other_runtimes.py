"""Exported graphs in the runtimes of other people: each a function of feeds, or the reason why it is not here.

MNN's own command line is not used: it installs a package and reports conversions to its makers. Its converter is a function beside it.
"""

import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from fastcm.errors import RunError

Feeds = dict[str, np.ndarray]
Run = Callable[[Feeds], np.ndarray]
# Runtime -> (module, package whose version is told).
PACKAGES = {
    "ONNX Runtime": ("onnxruntime", "onnxruntime-gpu"),
    "OpenVINO": ("openvino", "openvino"),
    "onnx reference": ("onnx", "onnx"),
    "MNN": ("MNN", "mnn"),
    "ncnn": ("ncnn", "ncnn"),
    "TensorRT for RTX": ("tensorrt_rtx_bindings", "tensorrt-rtx-cu12-bindings"),
}
# A converter that fails ends its process, so it gets one of its own.
CONVERT_MNN = "import sys, _tools; _tools.mnnconvert(['mnnconvert', *sys.argv[1:]])"


def version(runtime: str) -> str | None:
    """Of the installed package, None where it is absent."""
    try:
        return metadata.version(PACKAGES[runtime][1]) if find_spec(PACKAGES[runtime][0]) else None
    except metadata.PackageNotFoundError:
        return None


def opened(runtime: str, path: Path, *, threads: int = 1) -> Run:
    """The graph in a runtime that makes pictures on this machine; RunError with one line where it refuses the graph."""
    return OPENERS[runtime](path, threads)


def _onnxruntime(path: Path, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda feeds: session.run(["images"], feeds)[0]


def _openvino(path: Path, threads: int) -> Run:
    import openvino

    try:
        # Processors with bf16 would take it unasked.
        options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        model = openvino.compile_model(openvino.Core().read_model(path), "CPU", options)
    except RuntimeError as error:
        raise RunError(f"OpenVINO refuses {path.name}: {_first(error)}.") from None
    return lambda feeds: model(feeds)[0]


def _reference(path: Path, threads: int) -> Run:
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(str(path))
    return lambda feeds: evaluator.run(["images"], feeds)[0]


def _mnn(path: Path, threads: int) -> Run:
    path = path.resolve()
    out = path.with_suffix(".mnn")
    arguments = ["-f", "ONNX", "--modelFile", str(path), "--MNNModel", str(out), "--bizCode", "fastcm"]
    _converted([sys.executable, "-c", CONVERT_MNN, *arguments], out, "MNN", folder=path.parent)  # it leaves a file where it runs
    import MNN

    def run(feeds: Feeds) -> np.ndarray:
        expr = MNN.expr
        given = [expr.const(np.ascontiguousarray(array), list(array.shape), expr.NCHW) for array in feeds.values()]
        images = network.forward(given)[0]
        if images.data_format == expr.NC4HW4:
            images = expr.convert(images, expr.NCHW)
        return np.array(images.read()).reshape(images.shape)

    names = [value.name for value in _graph(path).input]
    manager = MNN.nn.create_runtime_manager(({"backend": "CPU", "numThread": threads, "precision": "high"},))
    network = MNN.nn.load_module_from_file(str(out), names, ["images"], runtime_manager=manager)
    return run


def _ncnn(path: Path, threads: int) -> Run:
    import pnnx

    folder = path.with_suffix(".ncnn")
    folder.mkdir(exist_ok=True)
    copy, param = folder / "graph.onnx", folder / "graph.ncnn.param"
    copy.write_bytes(path.read_bytes())
    graph = _graph(path)
    shapes = ",".join(_shape(value.type.tensor_type) for value in graph.input)
    converter = Path(pnnx.__file__).with_name("pnnx")
    _converted([str(converter), copy.name, f"inputshape={shapes}", "fp16=0"], param, "pnnx", folder=folder)
    import ncnn

    network = ncnn.Net()
    network.opt.num_threads = threads
    network.opt.use_fp16_packed = network.opt.use_fp16_storage = network.opt.use_fp16_arithmetic = network.opt.use_bf16_storage = False
    if network.load_param(str(param)) or network.load_model(str(param.with_suffix(".bin"))):
        raise RunError(f"ncnn refuses {path.name}: a layer that it does not have.")
    channels, *pixels = (dim.dim_value for dim in graph.output[0].type.tensor_type.shape.dim[1:])

    def run(feeds: Feeds) -> np.ndarray:
        rows = []
        for index in range(len(next(iter(feeds.values())))):  # ncnn knows no batch
            extractor = network.create_extractor()
            for place, array in enumerate(feeds.values()):
                extractor.input(f"in{place}", ncnn.Mat(np.ascontiguousarray(array[index])).clone())
            rows.append(np.array(extractor.extract("out0")[1]).reshape(channels, *pixels))
        return np.stack(rows)

    return run


OPENERS = {"ONNX Runtime": _onnxruntime, "OpenVINO": _openvino, "onnx reference": _reference, "MNN": _mnn, "ncnn": _ncnn}


def _graph(path: Path):
    import onnx

    return onnx.load(path, load_external_data=False).graph


def _shape(kind) -> str:
    """An input in pnnx's words, with 1 for a symbolic batch."""
    from onnx import TensorProto

    sizes = ",".join(str(dim.dim_value or 1) for dim in kind.shape.dim)
    return f"[{sizes}]{'i64' if kind.elem_type == TensorProto.INT64 else 'f32'}"


def _converted(command: list[str], made: Path, name: str, *, folder: Path | None = None) -> None:
    made.unlink(missing_ok=True)
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    if done.returncode or not made.is_file():
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise RunError(f"{name}'s converter fails: {(lines or ['no output'])[-1].strip()[:120]}.")


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
