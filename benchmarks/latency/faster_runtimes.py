"""What docs/latency.md says of other people's runtimes: how many times faster than ONNX Runtime each drew, and how to take one that won."""

from fastcm.benchmarks.results_file import Row

WORTH = 1.2  # a runtime that is faster by less is not worth another dependency
THREADS = (1, 2)
# The graph that each takes, and the program that draws with it.
TARGETS = {"OpenVINO": "ort", "MNN": "mobile", "ncnn": "mobile"}
PROGRAMS = {
    "OpenVINO": """
import openvino

model = openvino.compile_model("mnist.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
images = model({"noise": noise, "labels": labels})[0]
""",
    "MNN": """
import MNN
import numpy as np

names = ["noise", "labels"]
threads = MNN.nn.create_runtime_manager(({"backend": "CPU", "numThread": 2, "precision": "high"},))
model = MNN.nn.load_module_from_file("mnist.mnn", names, ["images"], runtime_manager=threads)
given = [MNN.expr.const(array, list(array.shape), MNN.expr.NCHW) for array in (noise, rows)]
drawn = MNN.expr.convert(model.forward(given)[0], MNN.expr.NCHW)
images = np.array(drawn.read())  # a copy: what `read` returns is `drawn`'s own
""",
    "ncnn": """
import ncnn

model = ncnn.Net()
model.opt.use_fp16_packed = model.opt.use_fp16_storage = model.opt.use_fp16_arithmetic = False
model.load_param("mnist.ncnn.param")
model.load_model("mnist.ncnn.bin")
call = model.create_extractor()
call.input("in0", ncnn.Mat(noise[0]).clone())
call.input("in1", ncnn.Mat(rows[0]).clone())
image = call.extract("out0")[1]
""",
}


def text(content: dict | None) -> str:
    """Markdown: a line per network and number of threads, what is faster by WORTH or more and the program that takes it."""
    rows = [row for row in content["rows"] if TARGETS.get(row["backend"]) == row["target"]] if content else []
    if not any(f"threads{n}_over_onnxruntime" in row for row in rows for n in THREADS):
        return "Not measured yet."
    lines = ["| network | threads | ONNX Runtime, ms | " + " | ".join(TARGETS) + " |", "|---|---|---|" + "---|" * len(TARGETS)]
    for model in dict.fromkeys(row["model"] for row in rows):
        own = {row["backend"]: row for row in rows if row["model"] == model}
        anchor = next(row for row in content["rows"] if (row["model"], row["target"], row["backend"]) == (model, "ort", "ONNX Runtime"))
        for n in THREADS:
            if f"threads{n}_p50_ms" in anchor:
                cells = [_times(own.get(runtime, {}), n) for runtime in TARGETS]
                lines.append(f"| {model} | {n} | {anchor[f'threads{n}_p50_ms']:.3g} | " + " | ".join(cells) + " |")
    machine = content["machine"]
    lines += ["", f"{machine['cores']} cores of {machine['processor']}, {machine['date']}, in turns of one run.", ""]
    return "\n".join([*lines, *_verdict(rows)])


def _times(row: Row, threads: int) -> str:
    over = row.get(f"threads{threads}_over_onnxruntime")
    return "-" if over is None else f"{over:.2f}x"


def _verdict(rows: list[Row]) -> list[str]:
    won: dict[str, list[str]] = {}
    for row in rows:
        for n in THREADS:
            if row.get(f"threads{n}_over_onnxruntime", 0) >= WORTH:
                threads = "one thread" if n == 1 else f"{n} threads"
                won.setdefault(row["backend"], []).append(f"{row['model']} on {threads} ({_times(row, n)})")
    if not won:
        return [f"None of them is {WORTH:g} times as fast as ONNX Runtime or more: there is nothing to change for."]
    lines = []
    for runtime, places in won.items():
        mobile = TARGETS[runtime] == "mobile"
        how = (
            "`--target mobile` and its [converter](deploy.md#phones-mnn-and-ncnn); `rows` are one-hot labels" if mobile else "the same file"
        )
        lines += [f"**{runtime} is faster** at {', '.join(places)}. To take it, {how}:", "", f"```python{PROGRAMS[runtime]}```", ""]
    return lines[:-1]
