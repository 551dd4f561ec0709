"""A training run from settings to a model folder: opens everything before it creates anything, resumes, logs, samples, evaluates, saves."""

import copy
import json
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastcm import networks
from fastcm.consistency.denoiser import Denoiser
from fastcm.errors import InputError
from fastcm.generation.generator import Generator, choose_device
from fastcm.training.checkpoint import newest_checkpoint, save_checkpoint
from fastcm.training.config import FIELDS_OF, TrainConfig
from fastcm.training.data import Dataset
from fastcm.training.feature_distance import feature_distance
from fastcm.training.method_loss import Guides
from fastcm.training.monitor import Monitor
from fastcm.training.run_folder import RunFolder
from fastcm.training.signals import StopRequest
from fastcm.training.trainer import Callbacks, Progress, Trainer
from fastcm.weights.model_folder import save_model

LOG_EVERY_S = 2.0


@dataclass(frozen=True)
class RunResult:
    """Where the run stands: its model folder, its images seen, and the signal that stopped it early, if one did."""

    model: Path
    nimg: int
    total_nimg: int
    signal: int | None


def resolve_precision(precision: str, device: torch.device) -> str:
    """ "auto" is bf16 where the processor multiplies it natively, else fp32. fp16 needs a GPU."""
    if precision == "auto":
        native = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return "bf16" if native else "fp32"
    if precision == "fp16":
        raise InputError("not available for training in --precision: fp16. Use bf16 or fp32.")
    return precision


def resolve_compile(compile: str, device: torch.device) -> bool:
    """ "auto" compiles on CUDA; on a CPU the minutes of compilation outweigh what a short run gains."""
    return compile == "on" or (compile == "auto" and device.type == "cuda")


def build_network(config: TrainConfig) -> nn.Module:
    """The network of the config, its first weights a function of the seed alone."""
    options = dict(config.network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed & (2**63 - 1))
        return networks.build(options.pop("kind"), options)


def check_network(network: nn.Module) -> None:
    """Refuses modules whose result depends on torch's global random state or on the batch."""
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            raise InputError(
                f"dropout outside the noise stream in network: {name} ({type(module).__name__}). "
                "Use fastcm.networks.dropout.Dropout, so that student and target share masks and a resumed run is exact."
            )
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise InputError(
                f"batch statistics in network: {name} ({type(module).__name__}). Use nn.GroupNorm: a sample must not depend on its batch."
            )


def check_against(model: Denoiser, info: dict, config: TrainConfig, dataset: Dataset, option: str) -> None:
    """Refuses a teacher or first model whose images, classes or noise range differ from the run's."""
    expected = {"resolution": dataset.resolution, "channels": dataset.channels, "classes": len(dataset.class_names or ())}
    found = {"resolution": info.get("resolution"), "channels": info.get("channels"), "classes": len(info.get("classes") or ())}
    for field, want in expected.items():
        if found[field] != want:
            raise InputError(f"another {field} in {option}: {found[field]} (the run has {want}). Choose a model of the run's data.")
    for field in ("sigma_min", "sigma_max", "sigma_data", "c_noise"):
        have, want = getattr(model.preconditioning, field), getattr(config.noise, field)
        if have != want:
            raise InputError(f"another {field} in {option}: {have} (the run has {want}). Pass --set noise.{field}={json.dumps(have)}.")


def run(
    config: TrainConfig, out: Path, *, dataset: Dataset, network: nn.Module | None = None,
    teacher: tuple[Denoiser, dict] | None = None, init: tuple[Denoiser, dict] | None = None, callbacks: Callbacks = (),
) -> RunResult:  # fmt: skip
    """Trains, or resumes what stands in `out`. network: a module of the user's own, F(x, c_noise, labels); else the config's is built.

    teacher, init: opened models (denoiser, config.json). Raises InputError before anything is created, RunError afterwards.
    """
    device, network = choose_device(config.device), network if network is not None else build_network(config)
    check_network(network)
    precision = resolve_precision(config.precision, device)
    for model, option in ((teacher, "--teacher"), (init, "--init")):
        if model is not None:
            check_against(*model, config, dataset, option)
    start = init if init is not None else teacher  # distillation starts from the teacher's weights (Song et al. 2023, section 5.1)
    if start is not None:
        copy_weights(network, start[0].network, "--init" if init is not None else "--teacher")
    if config.objective.tangent == "finite-difference" and precision != "fp32":
        raise InputError(f"too coarse for objective.tangent finite-difference in --precision: {precision}. Use fp32, or the tangent jvp.")
    distance = feature_distance(config, dataset)
    guides = Guides(
        teacher=None if teacher is None else teacher[0].to(device), feature_distance=None if distance is None else distance.to(device)
    )
    folder = RunFolder(out, settings(config, dataset, network, precision))
    try:
        network = network.to(device).train()
        needs_target = "mu_schedule" in FIELDS_OF[config.method] and config.objective.mu_schedule != "zero"
        trainer = Trainer(
            config, network, copy.deepcopy(network).requires_grad_(False) if needs_target else None, dataset,
            device=device, precision=precision, compiled=resolve_compile(config.compile, device), guides=guides,
        )  # fmt: skip
        return _Session(trainer, folder, callbacks).train()
    finally:
        folder.close()


def settings(config: TrainConfig, dataset: Dataset, network: nn.Module, precision: str) -> dict:
    """What config.json of a run holds: the config and the facts of its data, so that a changed data set is noticed."""
    count = sum(p.numel() for p in network.parameters())
    return {
        **config.as_dict(),
        "dataset": {"fingerprint": dataset.fingerprint, "images": len(dataset)},
        "parameters": count,
        "computed_in": precision,
    }


def copy_weights(network: nn.Module, source: nn.Module, option: str) -> None:
    """Fills the network with another's weights of the same names and shapes."""
    state, own = source.state_dict(), network.state_dict()
    wrong = [name for name in {**own, **state} if name not in state or name not in own or state[name].shape != own[name].shape]
    if wrong:
        raise InputError(f"another architecture in {option}: {', '.join(wrong[:3])}. Train both with the same network settings.")
    network.load_state_dict(state)


class _Session:
    """The run around the trainer: what happens between steps."""

    def __init__(self, trainer: Trainer, folder: RunFolder, callbacks: Callbacks):
        self.trainer, self.folder, self.callbacks = trainer, folder, callbacks
        self.config = trainer.config
        self.best: dict | None = None
        self._resume()
        self.monitor = Monitor(folder, trainer)
        self.saved_nimg = self.trainer.nimg if self.trainer.step else -1
        self.saved_at = time.monotonic()

    def _resume(self) -> None:
        found = newest_checkpoint(self.folder.checkpoints)
        for note in self.folder.notes:
            print(f"fastcm: {note}", file=sys.stderr)
        if found is None:
            self.folder.cut_log(-1)
            return
        parts, state = found
        if state["threads"] != torch.get_num_threads():
            warnings.warn(
                f"resumed with {torch.get_num_threads()} threads, not {state['threads']}: sums differ in the last bits", stacklevel=2
            )
        self.trainer.restore(parts, state)
        self.best = state.get("best")
        self.folder.cut_log(self.trainer.nimg)
        print(
            f"fastcm: resumed at {self.trainer.nimg / 1000:g} of {self.trainer.total_nimg / 1000:g} kimg in {self.folder.path}",
            file=sys.stderr,
        )

    def train(self) -> RunResult:
        trainer = self.trainer
        with StopRequest() as request, self.monitor:
            self.request = request
            trainer.train(log_every_s=LOG_EVERY_S, on_log=self._log, on_step=self._between_steps)
            if self.saved_nimg != trainer.nimg:
                self._checkpoint()
            if request.signal is None:
                self.monitor.finish(self._generator())
        self._save_model(self.folder.model)
        return RunResult(self.folder.model, trainer.nimg, trainer.total_nimg, request.signal)

    def _log(self, progress: Progress) -> None:
        self.monitor.log(progress)
        for callback in self.callbacks:
            callback(progress, self.trainer)

    def _between_steps(self) -> bool:
        """Whether to go on; samples, evaluates and saves where they are due."""
        nimg, config = self.trainer.nimg, self.config
        self.monitor.advance(nimg)
        if _due(nimg, config.batch, config.sample_every_kimg):
            self.monitor.sample(self._generator())
        if _due(nimg, config.batch, config.evaluate_every_kimg):
            self._evaluate()
        if time.monotonic() - self.saved_at >= config.checkpoint_every_s:
            self._checkpoint()
        return self.request.signal is None

    def _checkpoint(self) -> None:
        parts, state = self.trainer.state()
        save_checkpoint(self.folder.checkpoints, step=self.trainer.step, parts=parts, state={**state, "best": self.best})
        self.saved_nimg, self.saved_at = self.trainer.nimg, time.monotonic()

    def _evaluate(self) -> None:
        figures = self.monitor.evaluate(self._generator())
        if self.best is None or figures["score"] < self.best["score"]:
            self.best = {"nimg": self.trainer.nimg, **figures}
            self._save_model(self.folder.path / "best")

    def _averaged(self) -> dict[str, Tensor]:
        """The network's state dict with the first average in the place of the weights; buffers are the student's."""
        average = self.trainer.optimizer.average(0)
        buffers = self.trainer.optimizer.student.state_dict()
        return {name: average[name] if name in average else tensor.clone() for name, tensor in buffers.items()}

    def _generator(self) -> Generator:
        """A generator with the first evaluation average, beside the student that trains on."""
        if not hasattr(self, "_averaged_network"):
            self._averaged_network = copy.deepcopy(self.trainer.optimizer.student).float().requires_grad_(False)
        self._averaged_network.load_state_dict(self._averaged())
        denoiser = Denoiser(self._averaged_network, self.config.noise)
        return Generator(denoiser, self.info(), device=str(self.trainer.device), precision="fp32")

    def info(self) -> dict:
        """The model folder's facts beside network and preconditioning."""
        dataset, config = self.trainer.dataset, self.config
        training = {
            "preset": config.preset,
            "method": config.method,
            "data": config.data,
            "dataset": dataset.fingerprint,
            "nimg": self.trainer.nimg,
            "seed": config.seed,
        }
        return {
            "classes": list(dataset.class_names) if dataset.class_names else None,
            "resolution": dataset.resolution, "channels": dataset.channels,
            "training": training, "sampling": config.sampling, "licence": None,
        }  # fmt: skip

    def _save_model(self, path: Path) -> None:
        save_model(path, Denoiser(self.trainer.optimizer.student, self.config.noise), self.info(), state=self._averaged())


def _due(nimg: int, batch: int, every_kimg: float | None) -> bool:
    """Whether the step that ended at nimg crossed a multiple of every_kimg."""
    if every_kimg is None:
        return False
    every = every_kimg * 1000
    return nimg // every > (nimg - batch) // every
