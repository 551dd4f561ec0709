"""An ONNX file through NVIDIA's parser and compiler, TensorRT for RTX or TensorRT: the bytes of an engine, or the node that is refused."""

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from fastcm.errors import RunError
from fastcm.generation.onnx_contract import Contract
from fastcm.generation.tensorrt_bindings import RUNTIMES, bindings, logger


class Profile(NamedTuple):
    """The batches that an engine serves: the smallest, the one that it is tuned for, the largest."""

    smallest: int
    tuned: int
    largest: int


class Compiled(NamedTuple):
    """engine: what a runtime of this version loads. layers: of the parsed network. timings: the compiler's cache, if any."""

    engine: bytes
    layers: int
    timings: bytes | None


def compile_graph(
    kind: str,
    path: Path,
    contract: Contract,
    batches: Profile,
    *,
    capabilities: tuple[tuple[int, int], ...] | None = None,
    timings: bytes | None = None,
    progress: Callable[[str], None] | None = None,
) -> Compiled:
    """Compiles the file, strongly typed: types are the graph's own, and fp32 is not rounded to TF32. Raises RunError.

    kind: RTX or DATACENTER. capabilities: the cards of an RTX engine, as (8, 9); None is this machine's. timings: an earlier build's,
    b"" for the first; None where the compiler measures nothing. progress: called with each phase's name.
    """
    trt, log = bindings(kind), logger(kind)
    log.errors.clear()
    builder = trt.Builder(log)
    # Later versions build every network so and may drop the flag.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        raise _refused(kind, path, refused_node(parser.get_error(0), path))
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    if capabilities is not None:
        config.num_compute_capabilities = len(capabilities)
        for index, (major, minor) in enumerate(capabilities):
            if not config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{major}{minor}"), index):
                raise _refused(kind, path, log.reason())
    if contract.batch is None:
        shapes = builder.create_optimization_profile()
        for name in contract.inputs:
            shapes.set_shape(name, *(contract.shape(name, batch) for batch in batches))
        config.add_optimization_profile(shapes)
    cache = None if timings is None else config.create_timing_cache(timings)
    if cache is not None:
        config.set_timing_cache(cache, ignore_mismatch=True)
    if progress is not None:
        config.progress_monitor = _monitor(trt, progress)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise _refused(kind, path, log.reason())
    return Compiled(bytes(engine), network.num_layers, None if cache is None else bytes(cache.serialize()))


def refused_node(error, path: Path) -> str:
    """What the parser says and the node that it is about; of a constant that it cannot read, the first node that takes it."""
    import onnx

    reason = " ".join(error.desc().split())
    name, operator = error.node_name(), error.node_operator()
    if not name and (constant := re.search(r"initializer: (\S+)", reason.rpartition("Failed to import ")[2])):
        graph = onnx.load(path, load_external_data=False).graph
        node = next((node for node in graph.node if constant[1] in node.input), None)
        name, operator = (node.name, node.op_type) if node is not None else (f"constant {constant[1]}", "")
    reason = reason.rpartition("Assertion failed: ")[2]
    if reason in ("", "false"):  # a check that says no more
        reason = error.code().name.lower().replace("_", " ")
    return f"{operator} ({name or f'node {error.node()}'}): {reason[:200]}".strip()


def _refused(kind: str, path: Path, reason: str) -> RunError:
    return RunError(f"{RUNTIMES[kind].name} refuses {path.name}: {reason.rstrip('. ')}. No engine was written.")


def _monitor(trt: ModuleType, progress: Callable[[str], None]):
    class Monitor(trt.IProgressMonitor):
        def __init__(self):
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name, parent_phase, num_steps):
            progress(phase_name)

        def phase_finish(self, phase_name):
            pass

        def step_complete(self, phase_name, step):
            return True

    return Monitor()
