"""A TensorRT engine (.plan) as a generator: the same call as torch's, run by NVIDIA's code. A file to trust."""

import hashlib
import json
import logging
from pathlib import Path

import numpy as np
import torch

from fastcm.consistency.denoiser import Preconditioning
from fastcm.errors import InputError, RunError
from fastcm.generation.onnx_contract import Contract
from fastcm.generation.onnx_generator import Feeds, OnnxGenerator
from fastcm.generation.plan_engine import Batches, PlanEngine
from fastcm.generation.tensorrt_bindings import RUNTIMES, bindings, logger
from fastcm.weights.fields import check_model_fields

FORMAT, VERSION = "fastcm-plan", 1
# Images of the first call that are compared with ONNX Runtime's.
COMPARED = 4
log = logging.getLogger("fastcm")


def manifest_path(plan: Path) -> Path:
    return plan.with_name(f"{plan.name}.manifest.json")


def read_manifest(plan: Path) -> dict:
    """The manifest beside a plan, its fields checked; InputError where it is missing, damaged or another file's."""
    path = manifest_path(plan)
    if not plan.is_file():
        raise InputError(f"no such file in MODEL: {plan}. Give a .plan of fastcm export.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"no manifest beside the engine in MODEL: {plan}. Put {path.name} there, which fastcm export writes.") from None
    except ValueError:
        content = None
    try:
        if (content["format"], content["version"]) != (FORMAT, VERSION) or content["engine"]["runtime"] not in RUNTIMES:
            raise ValueError
        check_model_fields(content["config"], path)
        Contract(**content["graph"]).checked()
        Preconditioning(**content["config"]["preconditioning"])
        smallest, tuned, largest = content["engine"]["profile"]
        if not (1 <= smallest <= tuned <= largest and len(content["sigmas"]) == content["graph"]["steps"]):
            raise ValueError
        known = content["files"][plan.name]["sha256"]
        plan.with_name(content["onnx"]["name"])  # a file beside it, not elsewhere
        str.lower(content["onnx"]["sha256"])
    except (KeyError, TypeError, ValueError):
        raise InputError(f"not the manifest of an engine of this fastcm in {path}. Export it again with --tensorrt.") from None
    if _sha256(plan) != known:
        raise InputError(f"another file than its manifest says in MODEL: {plan}. Copy both again.")
    return content


class PlanGenerator(OnnxGenerator):
    """generator(seeds, labels) -> images from a file that `fastcm export --tensorrt` built; what it can do is what the exported graph can.

    Loading it runs code of the file. The first call is compared with ONNX Runtime on the graph, where that lies beside it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        content = read_manifest(self.path)
        engine = content["engine"]
        kind, runtime = engine["runtime"], RUNTIMES[engine["runtime"]]
        trt = bindings(kind)
        if trt.__version__ != engine["version"]:
            versions = f"{self.path} is of {engine['version']}, here is {trt.__version__}"
            raise InputError(f"an engine of another version of {runtime.name} in MODEL: {versions}. Build it again.")
        check_card(engine["capabilities"], self.path)
        sigmas = tuple(float(sigma) for sigma in content["sigmas"])
        self._take(content["config"], sigmas, Contract(**content["graph"]), Preconditioning(**content["config"]["preconditioning"]))
        self.provider, self.device = runtime.name, "cuda"
        smallest, _, largest = engine["profile"]
        self.batch_size = largest
        batches = Batches(smallest, largest)
        self._engine = PlanEngine(trt, logger(kind), self.path.read_bytes(), self.contract, batches, name=str(self.path))
        self._graph, self._compared = content["onnx"], False

    def run(self, feeds: Feeds) -> np.ndarray:
        """As `OnnxGenerator.run`; the first call also runs the graph in ONNX Runtime and compares."""
        feeds = {name: np.asarray(array) for name, array in feeds.items()}
        self.contract.check(feeds)
        shape, dtype = self.contract.output
        if len(next(iter(feeds.values()))) == 0:
            return np.empty((0, *shape), dtype)
        images = self._engine.run(feeds)
        if not self._compared:
            self._compare({name: array[:COMPARED] for name, array in feeds.items()}, images[:COMPARED])
            self._compared = True
        return images

    def _compare(self, feeds: Feeds, images: np.ndarray) -> None:
        """RunError where the engine's images are further from ONNX Runtime's than the graph's tolerance."""
        onnx = self.path.with_name(self._graph["name"])
        if not onnx.is_file() or _sha256(onnx) != self._graph["sha256"]:
            log.warning(f"{self.path.name} is not compared with its graph: {onnx.name}, as it was built from, does not lie beside it.")
            return
        expected = OnnxGenerator(onnx, "cpu").run(feeds)
        difference = np.abs(images.astype(np.float64) - expected.astype(np.float64)).max()
        if not difference <= self.contract.tolerance:  # NaN fails too
            limit = f"{difference:.3g}, over {self.contract.tolerance:g} for {self.contract.precision}"
            raise RunError(f"{self.path} disagrees with {onnx.name}: {limit}. Build it again: fastcm export MODEL --tensorrt.")


def check_card(capabilities: list[list[int]], path: Path) -> None:
    """InputError, naming both, where this machine's card is not one that the engine was built for."""
    if not torch.cuda.is_available():
        raise InputError(f"an engine without a CUDA device in MODEL: {path}. Run its .onnx here.")
    here = list(torch.cuda.get_device_capability())
    if here not in capabilities:
        built = ", ".join(f"sm_{major}{minor}" for major, minor in capabilities)
        remedy = f"Build it for sm_{here[0]}{here[1]}: fastcm export MODEL --tensorrt"
        raise InputError(f"an engine for another card in MODEL: {path} is for {built}, here is sm_{here[0]}{here[1]}. {remedy}.")


def _sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
