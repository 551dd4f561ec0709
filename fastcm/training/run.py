"""A training run from settings to a session: everything is opened and checked before anything is created."""

import copy
import inspect
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from fastcm import networks
from fastcm.consistency.denoiser import Denoiser, Preconditioning
from fastcm.consistency.guidance import as_guide
from fastcm.data.dataset import Dataset
from fastcm.errors import InputError
from fastcm.generation.devices import choose_device
from fastcm.generation.generator import class_names
from fastcm.training.checkpoint import complete_steps
from fastcm.training.config import TrainConfig
from fastcm.training.feature_distance import feature_distance
from fastcm.training.method_loss import Guides
from fastcm.training.methods import FIELDS_OF
from fastcm.training.parallel import Processes
from fastcm.training.resumed_settings import settings
from fastcm.training.run_folder import RunFolder
from fastcm.training.run_logs import RunLog
from fastcm.training.session import RunResult, Session
from fastcm.training.starting_point import check_against, check_guide, copy_weights
from fastcm.training.trainer import Callbacks
from fastcm.training.trainer_parts import build_trainer


def resolve_precision(precision: str, device: torch.device, noise: Preconditioning | None = None) -> str:
    """ "auto" is bf16 where the processor multiplies it natively and the form bears it, else fp32."""
    if precision == "auto" and noise is not None and not noise.fits_16_bits:
        return "fp32"
    if precision == "auto":
        native = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return "bf16" if native else "fp32"
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


def check_second_time(network: nn.Module) -> None:
    """Refuses a module that meanflow cannot tell the end of an average velocity."""
    parameters = inspect.signature(network.forward).parameters
    if "end" not in parameters and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        raise InputError(f"no second time in network: {type(network).__name__}. Let its forward take end=None, fp32 [B]; None means 0.")


def run(
    config: TrainConfig,
    out: Path,
    *,
    dataset: Dataset,
    network: nn.Module | None = None,
    teacher: tuple[Denoiser, dict] | None = None,
    guide: tuple[Denoiser, dict] | None = None,
    init: tuple[Denoiser, dict] | None = None,
    callbacks: Callbacks = (),
    processes: Processes | None = None,
    logs: Sequence[RunLog] = (),
) -> RunResult:
    """Trains, or resumes what stands in `out`. network: a module of the user's own, F(x, c_noise, labels); else the config's is built.

    teacher, guide, init: opened models (denoiser, config.json). processes: those that train together, each in this call; alone by default.
    callbacks, logs: called in the writer's process. Raises InputError before anything is created, RunError afterwards.
    """
    processes = processes or Processes()
    device, network = choose_device(config.device), network if network is not None else build_network(config)
    check_network(network)
    if config.method == "meanflow":
        check_second_time(network)
    processes.share(config.batch)
    processes.use(device)
    precision = resolve_precision(config.precision, device, config.noise)
    if config.method == "tcm" and init is None:
        raise InputError("missing option for --method tcm: --init. Name its first stage: a consistency model made by --method ect or ict.")
    for model, option in ((teacher, "--teacher"), (init, "--init")):
        if model is not None:
            check_against(*model, config, dataset, option)
    if guide is not None:
        check_guide(*guide, config, dataset)
    start = init if init is not None else teacher  # distillation starts from the teacher's weights (Song et al. 2023, section 5.1)
    note = None if start is None else copy_weights(network, start[0].network, "--teacher" if init is None else "--init")
    if config.objective.tangent == "finite-difference" and precision != "fp32":
        raise InputError(f"too coarse for objective.tangent finite-difference in --precision: {precision}. Use fp32, or the tangent jvp.")
    distance = feature_distance(config, dataset)
    first_stage = init if config.method == "tcm" else None
    teaching, guiding, answering, measuring = (
        None if model is None else model.to(device)
        for model in (teacher and teacher[0], guide and guide[0], first_stage and first_stage[0], distance)
    )
    if guide is not None:
        guiding = as_guide(guiding, has_classes=bool(class_names(*guide)))
    guides = Guides(teacher=teaching, guide=guiding, feature_distance=measuring, first_stage=answering)
    folder = None
    if processes.is_writer:
        weights = {name: model and model[0] for name, model in (("teacher", teacher), ("guide", guide), ("init", init))}
        weights["lpips_weights"] = distance if config.lpips_weights else None
        folder = RunFolder(out, settings(config, dataset, network, precision=precision, device=device.type, weights=weights))
    try:
        if folder is not None and note and not complete_steps(folder.checkpoints):
            folder.notes.append(note)
        network = network.to(device).train()
        trainer = build_trainer(
            config,
            network,
            target_of(network, config),
            dataset,
            device=device,
            precision=precision,
            compiled=resolve_compile(config.compile, device),
            guides=guides,
            processes=processes,
        )
        return Session(trainer, out, folder, callbacks, logs).train()
    finally:
        if folder is not None:
            folder.close()


def target_of(network: nn.Module, config: TrainConfig) -> nn.Module | None:
    """The network's moving average that the method's loss looks at; None where the student itself takes its place."""
    needed = "mu_schedule" in FIELDS_OF[config.method] and config.objective.mu_schedule != "zero"
    return copy.deepcopy(network).requires_grad_(False) if needed else None
