"""What an exported file says about itself: the model's config, the noise levels inside, the graph's form and who wrote it."""

import json
from collections.abc import Sequence

import fastcm
from fastcm.consistency.denoiser import Denoiser
from fastcm.generation.onnx_contract import Contract
from fastcm.weights.model_folder import model_config

# Read back by generation/onnx_generator.py; values are JSON.
CONFIG, SIGMAS, GRAPH, VERSION = "fastcm.config", "fastcm.sigmas", "fastcm.graph", "fastcm.version"


def metadata(denoiser: Denoiser, info: dict, *, sigmas: Sequence[float], contract: Contract) -> dict[str, str]:
    """The metadata properties of a generator's graph; equal models give equal text."""
    config = model_config(denoiser, info)
    values = {CONFIG: config, SIGMAS: list(sigmas), GRAPH: contract._asdict(), VERSION: fastcm.__version__}
    return {key: json.dumps(value, sort_keys=True, ensure_ascii=False) for key, value in values.items()}
