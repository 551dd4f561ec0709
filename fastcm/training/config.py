"""What a training run is: frozen settings that check themselves, and `name.field=value` overrides of them."""

import contextlib
import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any

from fastcm.consistency.curriculum import CURRICULA, MU_SCHEDULES
from fastcm.consistency.denoiser import BOUNDARY_FORMS, Preconditioning
from fastcm.consistency.objective import LOSS_WEIGHTS, PIXEL_DISTANCES
from fastcm.consistency.solver import STEPS
from fastcm.consistency.tangent import TANGENTS
from fastcm.errors import InputError, nearest, shown
from fastcm.generation.request import SEED_RANGE, signed
from fastcm.networks.checks import is_number

METHODS = ("edm", "cd", "ct", "ict", "ect", "scd", "sct")
CONTINUOUS_METHODS = ("scd", "sct")
TAUGHT_METHODS = ("cd", "scd")  # those that read a diffusion teacher
BOUNDARY_METHODS = ("cd", "ct", "ict")  # those whose denoiser is the identity at sigma_min rather than at 0
PAIRS = ("uniform", "log-normal", "ect")
DISTANCES = (*PIXEL_DISTANCES, "lpips", "classifier")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
OPTIMIZERS = ("radam", "adamw")


def form_of(method: str, base: str) -> str:
    """The form that the method trains, of a network that predicts `base` (denoiser.BASES): the identity at sigma_min for the methods on a
    grid, at 0 for those of continuous time, where "sample" has no identity of its own."""
    identity = method in BOUNDARY_METHODS or (method != "edm" and base == "sample")
    return BOUNDARY_FORMS[base] if identity else base


def _choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"unknown value in {name}: {value}. Use one of {', '.join(choices)}.{nearest(str(value), choices)}")


def _number(name: str, value: object, low: float, high: float = math.inf, *, whole: bool = False, open_low: bool = False) -> None:
    good = is_number(value) and (isinstance(value, int) or not whole)
    if not good or value > high or (value <= low if open_low else value < low):
        what = "a whole number" if whole else "a finite number"
        bound = f"above {low:g}" if open_low else f"of at least {low:g}"
        upper = "" if high == math.inf else f" and at most {high:g}"
        raise InputError(f"illegal value in {name}: {value}. Give {what} {bound}{upper}.")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The loss; `FIELDS_OF` says which method reads which field.

    distance: l1, l2 (mean over the image), pseudo_huber with huber_c = 0.00054 sqrt(C H W) where None (iCT, section 3.3), lpips, or
      classifier: the features of a classifier trained on the run's own labelled pictures.
    pairs: how two levels are drawn: "uniform" over the grid (CM), "log-normal" over it (iCT, with P_mean and P_std), or "ect": log-normal
      and without a grid, with ect_q, ect_k, ect_b of its map (`noise_schedule.ect_pair`).
    curriculum, s0, s1: N(k), or the number s1 of ECT's stages. mu_schedule, mu0: the target's decay. solver: the teacher's ODE step (cd).
    tangent, tangent_step (of a difference), tangent_c, tangent_warmup_kimg, adaptive_weight: of continuous-time methods
      (`objective.continuous_loss`).
    """

    distance: str = "l2"
    huber_c: float | None = None
    loss_weight: str = "uniform"
    pairs: str = "uniform"
    P_mean: float = -1.2
    P_std: float = 1.2
    curriculum: str = "fixed"
    s0: int = 18
    s1: int = 18
    mu_schedule: str = "fixed"
    mu0: float = 0.0
    solver: str = "heun"
    ect_q: float = 2.0
    ect_k: float = 8.0
    ect_b: float = 1.0
    tangent: str = "jvp"
    tangent_step: float = 1e-3
    tangent_c: float = 0.1
    tangent_warmup_kimg: float = 0.0
    adaptive_weight: bool = True

    def __post_init__(self):
        for name, choices in (
            ("distance", DISTANCES),
            ("loss_weight", LOSS_WEIGHTS),
            ("pairs", PAIRS),
            ("curriculum", CURRICULA),
            ("mu_schedule", MU_SCHEDULES),
            ("solver", tuple(STEPS)),
            ("tangent", TANGENTS),
            ("adaptive_weight", (True, False)),
        ):
            _choice(f"objective.{name}", getattr(self, name), choices)
        if self.huber_c is not None:
            _number("objective.huber_c", self.huber_c, 0)
        _number("objective.P_mean", self.P_mean, -math.inf)
        _number("objective.P_std", self.P_std, 0, open_low=True)
        stages = self.curriculum == "stages"
        _number("objective.s0", self.s0, 1 if stages else 2, whole=True)
        _number("objective.s1", self.s1, self.s0, whole=True)
        if stages != (self.pairs == "ect"):
            raise InputError(f"curriculum of other pairs in objective.curriculum: {self.curriculum}. Pairs of ect take stages.")
        _number("objective.ect_q", self.ect_q, 1, open_low=True)
        _number("objective.ect_k", self.ect_k, 0)
        _number("objective.ect_b", self.ect_b, 0)
        _number("objective.tangent_step", self.tangent_step, 0, 1, open_low=True)
        _number("objective.tangent_c", self.tangent_c, 0)
        _number("objective.tangent_warmup_kimg", self.tangent_warmup_kimg, 0)
        _number("objective.mu0", self.mu0, 0, 1)


# The fields of ObjectiveConfig that each method reads. A change of any other would be ignored, and is refused.
_PAIR_FIELDS = ("distance", "huber_c", "loss_weight", "pairs", "P_mean", "P_std", "curriculum", "s0", "s1", "mu_schedule", "mu0")
_TANGENT_FIELDS = ("P_mean", "P_std", "tangent", "tangent_step", "tangent_c", "tangent_warmup_kimg", "adaptive_weight")
FIELDS_OF = {
    "edm": ("P_mean", "P_std"),
    "cd": (*_PAIR_FIELDS, "solver"),
    "ct": _PAIR_FIELDS,
    "ict": _PAIR_FIELDS,
    "ect": (*_PAIR_FIELDS, "ect_q", "ect_k", "ect_b"),
    "scd": _TANGENT_FIELDS,
    "sct": _TANGENT_FIELDS,
}


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """RAdam or AdamW over flat fp32 masters, and the averages of the weights.

    lr: peak learning rate; lr_warmup_kimg: linear rise; lr_decay: "linear" to zero at the end of the run, or "none".
    clip: the gradient's largest L2 norm, None for no limit. ema_halflife_kimg: evaluation averages, in thousands of images;
    ema_rampup: an average's half-life is at most this share of the images seen (Karras et al. 2022, code), None for no limit.
    """

    kind: str = "radam"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = None
    lr_warmup_kimg: float = 0.0
    lr_decay: str = "none"
    ema_halflife_kimg: tuple[float, ...] = (500.0,)
    ema_rampup: float | None = 0.05

    def __post_init__(self):
        _choice("optimizer.kind", self.kind, OPTIMIZERS)
        _choice("optimizer.lr_decay", self.lr_decay, ("none", "linear"))
        _number("--lr", self.lr, 0, open_low=True)
        if len(self.betas) != 2:
            raise InputError(f"illegal value in optimizer.betas: {list(self.betas)}. Give two numbers, as 0.9,0.999.")
        for beta in self.betas:
            _number("optimizer.betas", beta, 0, 1)
        _number("optimizer.eps", self.eps, 0, open_low=True)
        _number("optimizer.weight_decay", self.weight_decay, 0)
        _number("optimizer.lr_warmup_kimg", self.lr_warmup_kimg, 0)
        if self.clip is not None:
            _number("optimizer.clip", self.clip, 0, open_low=True)
        if self.ema_rampup is not None:
            _number("optimizer.ema_rampup", self.ema_rampup, 0, open_low=True)
        if not self.ema_halflife_kimg:
            raise InputError("no average in optimizer.ema_halflife_kimg: []. Give at least one half-life.")
        for halflife in self.ema_halflife_kimg:
            _number("optimizer.ema_halflife_kimg", halflife, 0, open_low=True)


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
    teacher: str | None = None
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
        _choice("--method", self.method, METHODS)
        _choice("--precision", self.precision, PRECISIONS)
        _choice("--device", self.device, ("auto", "cpu", "cuda"))
        _choice("--compile", self.compile, ("auto", "on", "off"))
        _choice("--bad-images", self.bad_images, ("fail", "skip"))
        _number("--duration", self.duration_kimg, 0, open_low=True)
        _number("--batch", self.batch, 1, whole=True)
        if self.microbatch is not None:
            _number("--microbatch", self.microbatch, 1, whole=True)
        _number("--checkpoint-every", self.checkpoint_every_s, 0)
        for name in ("teacher", "init", "lpips_weights", "labels_file"):
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
                _number(name, getattr(self, name), 0, open_low=True)
        if self.method not in TAUGHT_METHODS and self.teacher is not None:
            raise InputError(
                f"unused option with --method {self.method}: --teacher {self.teacher}. "
                f"Only {' and '.join(TAUGHT_METHODS)} read a teacher; use --init to start from it."
            )
        form = form_of(self.method, self.noise.base)
        if self.noise.form != form:
            raise InputError(f"form of another method in noise.form: {self.noise.form}. {self.method} trains the {form} form.")
        if self.method in CONTINUOUS_METHODS and self.noise.c_noise == "nearest step":
            raise InputError(f"a c_noise without a derivative in noise.c_noise: nearest step. {self.method} needs interpolated step.")
        if (self.objective.pairs == "ect") != (self.method == "ect"):
            raise InputError(f"pairs of another method in objective.pairs: {self.objective.pairs}. ect alone draws pairs of ect.")
        if self.lpips_weights is not None and self.objective.distance != "lpips":
            raise InputError(f"unused option: --lpips-weights {self.lpips_weights}. Add --set objective.distance=lpips.")

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


def override(config: TrainConfig, changes: dict[str, Any], *, network_fields: tuple[str, ...]) -> TrainConfig:
    """Returns config with `changes`, whose keys are field names, dotted for the nested ones (`network.channels`)."""
    _choice("--method", changes.get("method", config.method), METHODS)
    try:
        return _overridden(config, changes, network_fields)
    except InputError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:  # a list for a word, a word for a list
        given = ", ".join(f"{name}={shown(value)}" for name, value in changes.items())
        raise InputError(f"value of another kind in --set: {given[:200]} ({error}). Run fastcm train --dry-run for the defaults.") from None


def _overridden(config: TrainConfig, changes: dict[str, Any], network_fields: tuple[str, ...]) -> TrainConfig:
    nested: dict[str, dict[str, Any]] = {}
    top: dict[str, Any] = {}
    sections = {"noise": Preconditioning, "objective": ObjectiveConfig, "optimizer": OptimizerConfig}
    known = [f.name for f in dataclasses.fields(TrainConfig) if f.name not in (*sections, "network")]
    known += [f"{s}.{f.name}" for s, kind in sections.items() for f in dataclasses.fields(kind)] + [f"network.{f}" for f in network_fields]
    for key, value in changes.items():
        if key not in known:
            raise InputError(f"unknown setting in --set: {key}.{nearest(key, known) or ' Run fastcm train --dry-run for the list.'}")
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else top)[name] = value
    for name in nested.get("objective", {}):
        method = top.get("method", config.method)
        if name not in FIELDS_OF[method]:
            raise InputError(f"unused setting in --set: objective.{name}. {method} reads {', '.join(FIELDS_OF[method])}.")
    for section, fields in nested.items():
        current = getattr(config, section)
        top[section] = {**current, **fields} if section == "network" else dataclasses.replace(current, **_typed(sections[section], fields))
    return dataclasses.replace(config, **top)


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
