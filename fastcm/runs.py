"""From what a user asks for (a preset, data, a method, overrides) to a run: the same for the command line and for Python."""

import copy
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from fastcm import networks, presets
from fastcm.api import load, load_denoiser
from fastcm.consistency.denoiser import Denoiser
from fastcm.data.dataset import Dataset, open_dataset
from fastcm.errors import InputError, check_given, nearest, shown
from fastcm.evaluation import check_judged
from fastcm.generation.generator import Generator, class_names
from fastcm.generation.guided import check_guidable
from fastcm.generation.request import is_diffusion
from fastcm.training.config import TrainConfig, override
from fastcm.training.config_file import flat, read_config_file
from fastcm.training.methods import TAUGHT_METHODS
from fastcm.training.parallel import Processes, joined
from fastcm.training.quantities import kimg, seconds
from fastcm.training.run import RunResult, check_network, run
from fastcm.training.run_folder import settings_in
from fastcm.training.run_logs import RunLog, chosen_logs
from fastcm.training.starting_point import check_images, like
from fastcm.training.trainer import Callbacks
from fastcm.weights.model_folder import check_path, network_config

Source = str | Path | np.ndarray | tuple[np.ndarray, np.ndarray]
# Options of `train` that name a field of TrainConfig otherwise than the field, and how their values are read from text.
OPTION_FIELDS = {
    "lr": "optimizer.lr",
    "duration": "duration_kimg",
    "checkpoint_every": "checkpoint_every_s",
    "evaluate_every": "evaluate_every_kimg",
    "sample_every": "sample_every_kimg",
    "guidance": "objective.guidance",
    "guidance_interval": "objective.guidance_interval",
}
READ_AS = {"duration_kimg": kimg, "checkpoint_every_s": seconds, "evaluate_every_kimg": kimg, "sample_every_kimg": kimg}
# Settings that say how the data set is read.
DATA_SETTINGS = ("channels", "labels_file", "image_column", "label_column")
# Settings of a distillation that the run of its teacher does not share.
OWN_TO_STUDENT = ("objective.", "optimizer.", "noise.", "duration_kimg", "batch", "microbatch", "init", "guide", "evaluate_every_kimg")
OWN_TO_STUDENT += ("sampling", "network.default_guidance")
# Of a teacher that is trained to be guided, where nothing else is given (Ho and Salimans 2022: 0.1 and 0.2 do best).
LABEL_DROP = 0.1
PLAN_ARGUMENTS = ("preset", "method", "data", "teacher", "out")


class Plan(NamedTuple):
    """A run that is ready to start: everything opened and checked, nothing created. dataset is None in a plan without data.

    first: the run that makes its teacher, where the preset's own is to be distilled. guide: the model that guides the teacher.
    """

    config: TrainConfig
    dataset: Dataset | None
    out: Path
    network: nn.Module | None
    teacher: tuple[Denoiser, dict] | None
    init: tuple[Denoiser, dict] | None
    guide: tuple[Denoiser, dict] | None = None
    first: "Plan | None" = None


def plan(
    preset: str | None = None,
    *,
    method: str | None = None,
    data: Source | None = None,
    teacher: str | None = None,
    out: str | Path | None = None,
    network: nn.Module | None = None,
    changes: dict[str, Any] | None = None,
    config_file: str | Path | None = None,
    complete: bool = True,
) -> Plan:
    """Resolves a run. changes: fields of TrainConfig, dotted for nested ones (`network.channels`), or the options' names (`lr`).

    config_file: settings in TOML or JSON, which the other arguments override. complete=False: a plan to look at, which may lack the data
    set of a published preset and the teacher. Raises InputError naming the option at fault.
    """
    written = {} if config_file is None else read_config_file(config_file)
    preset, method, data, teacher, out = (
        written.get(name) if given is None else given
        for name, given in (("preset", preset), ("method", method), ("data", data), ("teacher", teacher), ("out", out))
    )
    written = {name: value for name, value in written.items() if name not in PLAN_ARGUMENTS}
    in_file = written.keys() - flat(changes or {}).keys()  # the names that an error finds there
    changes = {OPTION_FIELDS.get(name, name): _text(name, value) for name, value in {**written, **flat(changes or {})}.items()}
    changes = {name: READ_AS[name](value) if name in READ_AS and isinstance(value, str) else value for name, value in changes.items()}
    preset, method, data, teacher, out = (
        _text(name, given) for name, given in zip(PLAN_ARGUMENTS, (preset, method, data, teacher, out), strict=True)
    )
    for option in PLAN_ARGUMENTS:
        if option in changes:
            where = "PRESET" if option == "preset" else f"--{option}"
            raise InputError(f"an option of its own in --set: {option}={shown(changes[option])}. Give it as {where}.")
    given = dict(changes)
    name = preset or ("folder" if data is not None else presets.DEFAULT)
    if method is None and teacher is None and network is not None and name in presets.TEACH_THEMSELVES:
        method = "ict"  # no teacher is trained first for a network of the user's own
    own = None if name == "folder" else presets.preset(name, method=method, teacher=teacher)
    paths = (teacher, changes.get("init"), changes.get("guide"))
    teacher_model, init_model, _ = models = tuple(path and load_denoiser(path) for path in paths)
    start_model = init_model or teacher_model  # whose weights the network takes, and so its form, unless it is the user's own
    resolution = changes.pop("resolution", None)
    if own is not None:
        resolution = own.resolution if resolution is None else resolution
    elif start_model is not None:  # the pictures are brought to its form, unless told otherwise
        resolution = start_model[1].get("resolution") if resolution is None else resolution
        changes = {"channels": start_model[1].get("channels"), **changes}
    if teacher_model is not None and not teacher_model[1].get("classes"):  # it cannot say anything of classes
        changes = {"network.num_classes": None, **changes}
    source = data if data is not None or own is None else own.data or None
    if source is None and (complete or name == "folder"):
        raise InputError(f"missing option for the preset {name}: --data. Name a folder of pictures or an .npz file.")
    unlabelled = changes.get("network.num_classes", 0 if own is None else own.network["num_classes"]) is None
    dataset = None if source is None else open_data(source, changes, resolution=resolution, unlabelled=unlabelled)
    label = "" if source is None else str(source) if isinstance(source, (str, Path)) else dataset.name
    config = own if own is not None else presets.preset(name, method=method, teacher=teacher, dataset=dataset, data=label)
    if start_model is not None and network is None:
        if dataset is not None:
            check_images(start_model[1], dataset, "--teacher" if init_model is None else "--init", answers=init_model is None)
        config = like(config, start_model[0], teacher=None if teacher_model is None else teacher_model[0])
    kind = changes.pop("network.kind", config.network["kind"])
    if kind != config.network["kind"]:
        config = replace(config, network=of_kind(config.network, kind))
        if kind == "edm2":  # whose random frequencies 250 ln sigma would turn into noise
            config = replace(config, noise=replace(config.noise, c_noise=presets.noise(config.method, kind=kind).c_noise))
    config = override(config, {"data": label, **changes}, network_fields=network_fields(config.network), written=in_file)
    config = told_its_weight(config)
    if dataset is not None:
        check_data(config, dataset, custom=network is not None)
        if config.evaluate_every_kimg is not None:
            check_judged(dataset.labels, option="--evaluate-every")
    if network is not None:
        check_network(network)
        config = replace(config, network=network_config(network))
    usual = presets.preset(name, method=None, **({"dataset": dataset, "data": label} if own is None else {})).method
    first, out = None, Path(out or Path("runs") / (name if config.method == usual else f"{name}-{config.method}"))
    check_path(out, "--out")
    if config.method in TAUGHT_METHODS and teacher is None:
        if name in presets.TEACH_THEMSELVES and network is None:
            config, first = after_its_teacher(config, name, data=data, out=out, given=given)
        elif complete:
            raise InputError(f"missing option for --method {config.method}: --teacher. Name a diffusion model made by --method edm.")
    if teacher_model is not None and not is_diffusion(teacher_model[1], teacher_model[0].preconditioning):
        raise InputError(f"not a diffusion model in --teacher: {teacher}. Train one with --method edm, or name somebody's.")
    check_labels(config, teacher_model, first, classes=config.network.get("num_classes") if dataset is None else dataset.class_names)
    return Plan(config, dataset, out, network, *models, first)


def after_its_teacher(config: TrainConfig, name: str, *, data: Source | None, out: Path, given: dict[str, Any]) -> tuple[TrainConfig, Plan]:
    """A distillation of the preset's own teacher, and the run that makes that teacher, fit to be guided where it will be."""
    shared = {field: value for field, value in given.items() if not field.startswith(OWN_TO_STUDENT)}
    if config.guide is None and config.network.get("num_classes") is None:
        if "objective.guidance" not in given:  # the preset's is by class
            config = replace(config, objective=replace(config.objective, guidance=1.0))
    elif config.guide is None and config.objective.guidance != 1:
        shared = {"label_drop": LABEL_DROP, **shared}
    first = plan(name, method="edm", data=data, out=out.with_name(f"{out.name}-edm"), changes=shared)
    return replace(config, teacher=str(first.out)), first


def open_data(source: Source, changes: dict[str, Any], *, resolution: int | None, unlabelled: bool) -> Dataset:
    """The pictures that the run trains on, read as its settings say."""
    how = {"bad_images": changes.get("bad_images", "fail"), **{name: changes.get(name) for name in DATA_SETTINGS}}
    return open_dataset(source, resolution=resolution, classes=0 if unlabelled else None, **how).for_training()


def told_its_weight(config: TrainConfig) -> TrainConfig:
    """The settings with a network that is told its guidance weight where that is drawn from a range, of which the middle is its default."""
    can_be_told = "default_guidance" in network_fields(config.network)
    if not config.objective.draws_guidance or not can_be_told or config.network.get("default_guidance") is not None:
        return config
    return replace(config, network={**config.network, "default_guidance": sum(config.objective.guidance) / 2})


def check_labels(config: TrainConfig, teacher: tuple[Denoiser, dict] | None, first: Plan | None, *, classes: object) -> None:
    """Refuses labels to drop where there are none, and guidance without an unconditional half, or with weights that nobody is told."""
    if config.label_drop and not classes:
        raise InputError(f"no labels to drop in --label-drop: {config.label_drop}. The run has no classes; leave it out.")
    if config.objective.draws_guidance and config.network.get("default_guidance") is None:
        raise InputError(
            f"a range for a network that is not told its weight in --guidance: {config.objective.guidance}. Give one weight, as 2."
        )
    if config.objective.guidance == 1 or config.guide is not None:
        return
    if teacher is not None:
        check_guidable(class_names(*teacher), teacher[1], "--guidance")
    elif first is not None:
        check_guidable(classes, {"training": {"method": "edm", "label_drop": first.config.label_drop}}, "--guidance")


def _text(name: str, value: Any) -> Any:
    """A path as the text that settings hold; InputError for an empty one."""
    value = str(value) if isinstance(value, Path) else value
    check_given(f"--{name.replace('_', '-')}" if "." not in name else f"--set {name}", value)
    return value


def network_fields(network: dict[str, Any]) -> tuple[str, ...]:
    """The settings that the network's kind has."""
    config_class, _ = networks.KINDS[network["kind"]]
    return tuple(f.name for f in fields(config_class))


def of_kind(network: dict[str, Any], kind: str) -> dict[str, Any]:
    """Settings of another kind of network for the same images and classes, its own defaults otherwise."""
    if kind not in networks.KINDS:
        choices = ", ".join(networks.KINDS)
        raise InputError(f"unknown network in network.kind: {kind}. Choose one of {choices}.{nearest(kind, networks.KINDS)}")
    known = network_fields({"kind": kind})
    shared = ("resolution", "in_channels", "out_channels", "channels", "channel_mult", "num_classes", "second_time")
    return {"kind": kind, **{name: network[name] for name in shared if name in network and name in known}}


def check_data(config: TrainConfig, dataset: Dataset, *, custom: bool) -> None:
    """Refuses data that the preset's network was not made for."""
    if custom:
        return
    network = config.network
    classes = len(dataset.class_names) if dataset.class_names else None
    for what, have, want in (
        ("resolution", dataset.resolution, network["resolution"]),
        ("number of channels", dataset.channels, network["in_channels"]),
        ("number of classes", classes, network["num_classes"]),
    ):
        if have != want:
            raise InputError(
                f"another {what} in --data: {config.data}: {have} (the preset {config.preset} has {want}). "
                f"{'Pass --channels ' + str(want) + ', or leave' if what == 'number of channels' else 'Leave'} PRESET out "
                "to fit the network to the data."
            )


def start(ready: Plan, *, callbacks: Callbacks = (), processes: Processes | None = None, logs: Sequence[RunLog] | None = None) -> RunResult:
    """Trains, or resumes what stands in the plan's folder; with `processes`, together with the other ones that call this.

    A plan with a `first` trains that one before, and distils what it left. logs: what receives the run's figures; None for TensorBoard
    where it is installed.
    """
    if ready.first is not None:
        settings_in(ready.out)  # refused before its teacher is trained, not after
        result = start(ready.first, callbacks=callbacks, processes=processes, logs=logs)
        if result.signal is not None:
            return result
        ready = ready._replace(teacher=load_denoiser(ready.first.out), first=None)
    return run(
        ready.config,
        ready.out,
        dataset=ready.dataset,
        network=ready.network,
        teacher=ready.teacher,
        guide=ready.guide,
        init=ready.init,
        callbacks=callbacks,
        processes=processes,
        logs=chosen_logs(None) if logs is None else logs,
    )


def train(
    preset: str | None = None,
    *,
    network: nn.Module | dict[str, Any] | None = None,
    data: Source | None = None,
    method: str | None = None,
    teacher: str | Path | None = None,
    out: str | Path | None = None,
    config: str | Path | None = None,
    log: str | RunLog | Iterable[str | RunLog] | None = None,
    callbacks: Callbacks = (),
    **overrides: Any,
) -> Generator:
    """Trains a model, or resumes the same call, and returns its generator.

    preset: a name of fastcm.presets; mnist where neither it nor data is given, folder where only data is. network: any nn.Module
    F(x, c_noise, labels) with x fp32 [B, C, H, W], c_noise fp32 [B], labels int64 [B] or None, that returns the shape of x; or settings of
    the preset's own network, dict(channels=48). data: what --data takes, an array uint8 [N, H, W, C], or (array, labels). config: a file of
    settings. log: what --log takes, or objects with the methods of `training.run_logs.RunLog`. callbacks: called as
    callback(progress, trainer) at each log line.
    overrides: the command line's options (lr=1e-3, batch=64, duration="50kimg", checkpoint_every="10m") and any field of TrainConfig, those
    of its sections as dictionaries, objective=dict(P_mean=0.6), or by dotted names, **{"objective.P_mean": 0.6} or the same in `settings`.
    Raises InputError for what cannot be used, RunError where training fails; Ctrl-C saves a checkpoint and raises KeyboardInterrupt.
    """
    changes = {**overrides.pop("settings", {}), **overrides}
    if isinstance(network, dict):
        network, changes = None, {**changes, "network": {**network, **changes.get("network", {})}}
    try:
        logs = chosen_logs(log)
        with joined() as processes:
            options = {"method": method, "data": data, "teacher": teacher, "out": out, "network": network, "config_file": config}
            with processes.writer_first():
                ready = plan(preset, **options, changes=changes)
            if processes.is_writer:
                for note in ready.dataset.notes:
                    print(f"fastcm: {note}", file=sys.stderr)
            result = start(ready, callbacks=callbacks, processes=processes, logs=logs)
    except InputError as error:
        raise InputError(_in_python(str(error))) from error
    if result.signal is not None:
        raise KeyboardInterrupt
    return load(result.model, network=None if network is None else copy.deepcopy(network))


def _in_python(message: str) -> str:
    """An error's line in the names of Python's arguments; what it says of commands stays."""
    parts = re.split(r"(?<=\.) ", message.replace("in --set:", "in fastcm.train:").replace("--set ", ""))
    return " ".join(
        part if "fastcm " in part else re.sub(r"--([a-z][a-z-]*)", lambda match: match[1].replace("-", "_"), part) for part in parts
    )
