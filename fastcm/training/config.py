"""What a training run is: frozen settings that check themselves, and `name.field=value` overrides of them."""

import contextlib
import dataclasses
import json
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

from fastcm.consistency.denoiser import Preconditioning
from fastcm.errors import InputError, nearest, shown
from fastcm.generation.request import SEED_RANGE, signed
from fastcm.networks import KINDS
from fastcm.training.methods import DIFFERENTIATED_METHODS, ECT_METHODS, FIELDS_OF, METHODS, TAUGHT_METHODS, form_of
from fastcm.training.objective_config import ObjectiveConfig
from fastcm.training.setting_checks import check_choice, check_number

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
OPTIMIZERS = ("radam", "adamw")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """RAdam or AdamW over flat fp32 masters, and the averages of the weights.

    lr: peak learning rate; lr_warmup_kimg: linear rise; lr_decay: "linear" to zero at the end of the run, "inverse-sqrt" from lr_decay_kimg
      on (Karras et al. 2024, equation 67), or "none".
    clip: the gradient's largest L2 norm, None for no limit. ema_halflife_kimg: evaluation averages, in thousands of images;
    ema_rampup: an average's half-life is at most this share of the images seen (Karras et al. 2022, code), None for no limit.
    ema_widths: averages by power functions beside them, each by its relative width (`power_average`). snapshot_every_kimg: how often those
      are stored, from which `fastcm average` makes others; None: never.
    """

    kind: str = "radam"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = None
    lr_warmup_kimg: float = 0.0
    lr_decay: str = "none"
    lr_decay_kimg: float | None = None
    ema_halflife_kimg: tuple[float, ...] = (500.0,)
    ema_rampup: float | None = 0.05
    ema_widths: tuple[float, ...] = ()
    snapshot_every_kimg: float | None = None

    def __post_init__(self):
        check_choice("optimizer.kind", self.kind, OPTIMIZERS)
        check_choice("optimizer.lr_decay", self.lr_decay, ("none", "linear", "inverse-sqrt"))
        check_number("--lr", self.lr, 0, open_low=True)
        if len(self.betas) != 2:
            raise InputError(f"illegal value in optimizer.betas: {list(self.betas)}. Give two numbers, as 0.9,0.999.")
        for beta in self.betas:
            check_number("optimizer.betas", beta, 0, 1)
        check_number("optimizer.eps", self.eps, 0, open_low=True)
        check_number("optimizer.weight_decay", self.weight_decay, 0)
        check_number("optimizer.lr_warmup_kimg", self.lr_warmup_kimg, 0)
        if (self.lr_decay == "inverse-sqrt") != (self.lr_decay_kimg is not None):
            raise InputError(
                f"a decay and its start go together in optimizer.lr_decay_kimg: {self.lr_decay_kimg}. inverse-sqrt alone has one."
            )
        if self.lr_decay_kimg is not None:
            check_number("optimizer.lr_decay_kimg", self.lr_decay_kimg, 0, open_low=True)
        if self.clip is not None:
            check_number("optimizer.clip", self.clip, 0, open_low=True)
        if self.ema_rampup is not None:
            check_number("optimizer.ema_rampup", self.ema_rampup, 0, open_low=True)
        if not self.averages:
            raise InputError("no average in optimizer.ema_halflife_kimg: []. Give at least one half-life, or optimizer.ema_widths.")
        for halflife in self.ema_halflife_kimg:
            check_number("optimizer.ema_halflife_kimg", halflife, 0, open_low=True)
        for width in self.ema_widths:
            check_number("optimizer.ema_widths", width, 0, 0.288, open_low=True)
        if self.snapshot_every_kimg is not None:
            check_number("optimizer.snapshot_every_kimg", self.snapshot_every_kimg, 0, open_low=True)
            if not self.ema_widths:
                every = f"{self.snapshot_every_kimg:g}"
                raise InputError(f"nothing to store in optimizer.snapshot_every_kimg: {every}. Give optimizer.ema_widths, as 0.05,0.1.")

    @property
    def averages(self) -> tuple[str, ...]:
        """The averages' names in their order; the first is the model's."""
        return tuple([f"{halflife:g}kimg" for halflife in self.ema_halflife_kimg] + [f"width-{width:g}" for width in self.ema_widths])


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run. network: {"kind": "adm", **fields of its config}; noise: the preconditioning and its range of sigma."""

    preset: str
    method: str
    data: str
    network: dict[str, Any]
    noise: Preconditioning = Preconditioning()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    duration_kimg: float = 500.0
    batch: int = 128
    microbatch: int | None = None  # images that a process takes at a time; None: its whole share of the batch
    seed: int = 0
    resolution: int | None = None
    channels: int | None = None  # what pictures are brought to; None: their own
    flip: bool = False
    label_drop: float = 0.0  # the share of images whose class is not told, so that the network can be guided
    teacher: str | None = None
    guide: str | None = None  # a second model, away from which the teacher is guided
    init: str | None = None
    lpips_weights: str | None = None
    labels_file: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    precision: str = "auto"
    device: str = "auto"
    compile: str = "auto"
    bad_images: str = "fail"
    checkpoint_every_s: float = 30.0
    evaluate_every_kimg: float | None = None
    sample_every_kimg: float | None = None
    sampling: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self):
        check_choice("--method", self.method, METHODS)
        check_choice("--precision", self.precision, PRECISIONS)
        check_choice("--device", self.device, ("auto", "cpu", "cuda"))
        check_choice("--compile", self.compile, ("auto", "on", "off"))
        check_choice("--bad-images", self.bad_images, ("fail", "skip"))
        check_number("--duration", self.duration_kimg, 0, open_low=True)
        check_number("--batch", self.batch, 1, whole=True)
        if self.microbatch is not None:
            check_number("--microbatch", self.microbatch, 1, whole=True)
        check_number("--checkpoint-every", self.checkpoint_every_s, 0)
        check_number("--label-drop", self.label_drop, 0, 1)
        for name in ("teacher", "guide", "init", "lpips_weights", "labels_file"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value.strip()):
                raise InputError(f"illegal value in --{name.replace('_', '-')}: {value!r}. Give a path, or leave it out.")
        if not isinstance(self.flip, bool):
            raise InputError(f"illegal value in flip: {self.flip}. Give true or false.")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed not in SEED_RANGE:
            raise InputError(f"illegal value in --seed: {self.seed}. Give a whole number of 64 bits: from -2^63 to 2^64 - 1.")
        object.__setattr__(self, "seed", signed(self.seed))
        for name in ("evaluate_every_kimg", "sample_every_kimg"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 0, open_low=True)
        if self.method not in TAUGHT_METHODS and self.teacher is not None:
            raise InputError(
                f"unused option with --method {self.method}: --teacher {self.teacher}. "
                f"Only {' and '.join(TAUGHT_METHODS)} read a teacher; use --init to start from it."
            )
        if self.guide is not None and (self.method not in TAUGHT_METHODS or self.objective.guidance == 1):
            raise InputError(f"unused option: --guide {self.guide}. It is for --method {' or '.join(TAUGHT_METHODS)} with --guidance W.")
        form = form_of(self.method, self.noise.base)
        if self.noise.form != form:
            raise InputError(f"form of another method in noise.form: {self.noise.form}. {self.method} trains the {form} form.")
        if self.method in DIFFERENTIATED_METHODS and self.noise.c_noise == "nearest step":
            raise InputError(f"a c_noise without a derivative in noise.c_noise: nearest step. {self.method} needs interpolated step.")
        if (self.objective.pairs == "ect") != (self.method in ECT_METHODS):
            drawn = f"{' and '.join(ECT_METHODS)} alone draw pairs of ect"
            raise InputError(f"pairs of another method in objective.pairs: {self.objective.pairs}. {drawn}.")
        if (self.noise.transition is not None) != (self.method == "tcm"):
            remedy = "Give the level below which its first stage answers, as 1." if self.method == "tcm" else "Only tcm has one."
            raise InputError(f"transition of another method in noise.transition: {self.noise.transition}. {remedy}")
        if self.method == "meanflow" and self.network["kind"] in KINDS:
            self._check_mean_flow()
        if self.lpips_weights is not None and self.objective.distance != "lpips":
            raise InputError(f"unused option: --lpips-weights {self.lpips_weights}. Add --set objective.distance=lpips.")

    def _check_mean_flow(self) -> None:
        """The network's second time, and the unconditional half of guidance inside training."""
        if self.network.get("second_time") is None:
            able = self.network["kind"] in ("adm", "song")
            remedy = "Pass --set network.second_time=gap" if able else "Networks of kind adm and song have one"
            raise InputError(f"no second time in network.{'second_time: None' if able else 'kind: ' + self.network['kind']}. {remedy}.")
        if (self.objective.omega, self.objective.kappa) != (1, 0):
            given = f"in objective.omega, kappa: {self.objective.omega:g}, {self.objective.kappa:g}"
            if self.network.get("num_classes") is None:
                raise InputError(f"guidance without classes {given}. Give labelled pictures and a network with classes.")
            if self.label_drop == 0 and self.init is None:
                raise InputError(f"guidance without an unconditional half {given}. Pass --label-drop 0.1.")

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready dict that `from_dict` reads back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @staticmethod
    def from_dict(content: dict[str, Any]) -> "TrainConfig":
        content = dict(content)
        optimizer = {k: tuple(v) if isinstance(v, list) else v for k, v in content.pop("optimizer").items()}
        return TrainConfig(
            noise=Preconditioning(**content.pop("noise")),
            objective=ObjectiveConfig(**content.pop("objective")),
            optimizer=OptimizerConfig(**optimizer),
            **content,
        )


def override(config: TrainConfig, changes: dict[str, Any], *, network_fields: tuple[str, ...], written: Container[str] = ()) -> TrainConfig:
    """Returns config with `changes`, whose keys are field names, dotted for the nested ones (`network.channels`).

    written: the names that an error finds in --config, all others in --set.
    """
    check_choice("--method", changes.get("method", config.method), METHODS)
    try:
        return _overridden(config, changes, network_fields, written)
    except InputError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:  # a list for a word, a word for a list
        given = ", ".join(f"{name}={shown(value)}" for name, value in changes.items())
        raise InputError(f"value of another kind in --set: {given[:200]} ({error}). Run fastcm train --dry-run for the defaults.") from None


def _overridden(config: TrainConfig, changes: dict[str, Any], network_fields: tuple[str, ...], written: Container[str]) -> TrainConfig:
    nested: dict[str, dict[str, Any]] = {}
    top: dict[str, Any] = {}
    sections = {"noise": Preconditioning, "objective": ObjectiveConfig, "optimizer": OptimizerConfig}
    known = [f.name for f in dataclasses.fields(TrainConfig) if f.name not in (*sections, "network")]
    known += [f"{s}.{f.name}" for s, kind in sections.items() for f in dataclasses.fields(kind)] + [f"network.{f}" for f in network_fields]
    for key, value in changes.items():
        if key not in known:
            raise InputError(
                f"unknown setting in {_option(key, written)}: {key}.{nearest(key, known) or ' Run fastcm train --dry-run for the list.'}"
            )
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else top)[name] = value
    for name in nested.get("objective", {}):
        method = top.get("method", config.method)
        if name not in FIELDS_OF[method]:
            option = _option(f"objective.{name}", written)
            raise InputError(f"unused setting in {option}: objective.{name}. {method} reads {', '.join(FIELDS_OF[method])}.")
    for section, fields in nested.items():
        current = getattr(config, section)
        top[section] = {**current, **fields} if section == "network" else dataclasses.replace(current, **_typed(sections[section], fields))
    return dataclasses.replace(config, **top)


def _option(name: str, written: Container[str]) -> str:
    return "--config" if name in written else "--set"


def _typed(kind: type, fields: dict[str, Any]) -> dict[str, Any]:
    """Lists become tuples where the field's default is one."""
    tuples = {f.name for f in dataclasses.fields(kind) if isinstance(f.default, tuple)}
    return {name: tuple(value) if name in tuples and isinstance(value, (list, tuple)) else value for name, value in fields.items()}


def parse_value(text: str) -> Any:
    """A value of `--set name=value`: a JSON number, list or word, none, or numbers with commas; anything else is the text itself."""
    for form in (text, f"[{text}]") if "," in text else (text,):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(form)
    return {"none": None, "None": None, "True": True, "False": False}.get(text, text)


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """The fields in which two settings differ, as `name: old -> new`."""
    lines = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a} -> {b}")
    return lines
