"""What happens around the steps of a run: resume, log, samples, evaluation, checkpoints, the end; by the writer, while the others wait."""

import contextlib
import copy
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastcm.consistency.denoiser import Denoiser
from fastcm.errors import InputError, PeerError, RunError, reason_of
from fastcm.generation.generator import Generator
from fastcm.training.checkpoint import check_room, complete_steps, newest_checkpoint, save_checkpoint
from fastcm.training.monitor import Monitor
from fastcm.training.run_folder import RunFolder
from fastcm.training.run_logs import RunLog
from fastcm.training.signals import StopRequest
from fastcm.training.snapshots import cut_snapshots, write_snapshot
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


class Session:
    """One run of the trainer. folder: the run folder, open in the writer's process; None in the others, which write nothing."""

    def __init__(self, trainer: Trainer, out: Path, folder: RunFolder | None, callbacks: Callbacks, logs: Sequence[RunLog] = ()):
        self.trainer, self.out, self.folder, self.callbacks = trainer, out, folder, callbacks
        self.config, self.processes = trainer.config, trainer.processes
        self.best: dict | None = None
        self.signal: int | None = None
        if self.folder is not None:
            self._resume()
            self.monitor = Monitor(self.folder, trainer, logs)
        trainer.follow_writer()
        self.saved_nimg = self.trainer.nimg if self.trainer.step else -1
        self.saved_at = time.monotonic()

    def _resume(self) -> None:
        found = newest_checkpoint(self.folder.checkpoints)
        for note in self.folder.notes:
            print(f"fastcm: {note}", file=sys.stderr)
        if found is None:
            check_room(self.folder.path, self.trainer.checkpoint_bytes())
            if self.folder.read_log():
                print(f"fastcm: no checkpoint in {self.folder.checkpoints}: from the beginning", file=sys.stderr)
            self.folder.cut_log(-1)
            cut_snapshots(self.folder.snapshots, -1)
            return
        parts, state = found
        for what, now in (("threads", torch.get_num_threads()), ("processes", self.processes.size)):
            before = state.get(what, 1)
            if before != now:
                warnings.warn(f"resumed with {now} {what}, not {before}: sums differ in the last bits", stacklevel=2)
        self.trainer.restore(parts, state)
        self.best = state.get("best")
        self.folder.cut_log(self.trainer.nimg)
        cut_snapshots(self.folder.snapshots, self.trainer.step)
        print(
            f"fastcm: resumed at {self.trainer.nimg / 1000:g} of {self.trainer.total_nimg / 1000:g} kimg in {self.folder.path}",
            file=sys.stderr,
        )

    def train(self) -> RunResult:
        trainer = self.trainer
        with StopRequest() as self.request, self.monitor if self.folder is not None else contextlib.nullcontext():
            try:
                trainer.train(log_every_s=LOG_EVERY_S, on_log=self._saving(self._log), on_step=self._saving(self._between_steps))
            except Exception as error:
                if self.request.signal is None or self.processes.size > 1:
                    raise self._explained(error) from error
                self.signal = self.request.signal  # which ended what this process was waiting for, as a compiler: the steps are whole
            if self.saved_nimg != trainer.nimg:
                self._checkpoint()
            if self.folder is not None:
                if self.signal is None:
                    self.monitor.finish(self._generator())
                self._save_models(self.folder.path, "model")
        self.processes.barrier()
        return RunResult(self.out / "model", trainer.nimg, trainer.total_nimg, self.signal)

    def _saving(self, call: Callable) -> Callable:
        """`call`, whose error is raised after a checkpoint was saved: what fails beside the steps must not cost them."""

        def saving(*arguments):
            try:
                return call(*arguments)
            except PeerError:
                raise
            except Exception:
                if self.folder is not None and self.saved_nimg != self.trainer.nimg:
                    with contextlib.suppress(RunError, OSError):
                        self._save()
                raise

        return saving

    def _explained(self, error: Exception) -> Exception:
        """The error, with the checkpoint that the run can be taken up from; torch's compiler's as one line."""
        if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            error = RunError(f"torch.compile failed in --compile: {reason_of(error)}. Use --compile off, or mend what it says.")
        steps = [] if self.folder is None or isinstance(error, PeerError) else complete_steps(self.folder.checkpoints)
        told = steps and isinstance(error, (RunError, InputError))
        return type(error)(f"{error} The last checkpoint is step-{steps[-1]:09d}.") if told else error

    def _log(self, progress: Progress) -> None:
        self.folder.check_present()
        self.monitor.log(progress)
        for callback in self.callbacks:
            callback(progress, self.trainer)

    def _between_steps(self) -> bool:
        """Whether to go on; samples, evaluates and saves where they are due. Every process comes to the same answers."""
        nimg, config = self.trainer.nimg, self.config
        signal, save = self.processes.agree(self.request.signal or 0, int(self._save_is_due()))
        sample = _due(nimg, config.batch, config.sample_every_kimg)
        evaluate = _due(nimg, config.batch, config.evaluate_every_kimg)
        every = config.optimizer.snapshot_every_kimg
        snapshot = _due(nimg, config.batch, every) or (every is not None and nimg >= self.trainer.total_nimg)
        if self.folder is not None:
            self.monitor.advance(nimg)
            if sample or evaluate or save or snapshot:
                self.folder.check_present()
            if snapshot:
                self._snapshot()
            if sample:
                self.monitor.sample(self._generator())
            if evaluate:
                self._evaluate()
        if save:
            self._checkpoint()
        if sample or evaluate or save or snapshot:
            self.processes.barrier()
        self.signal = signal or None
        return self.signal is None

    def _save_is_due(self) -> bool:
        """By the writer's clock."""
        return self.folder is not None and time.monotonic() - self.saved_at >= self.config.checkpoint_every_s

    def _checkpoint(self) -> None:
        self.trainer.check_same()
        if self.folder is not None:
            self._save()
        self.saved_nimg, self.saved_at = self.trainer.nimg, time.monotonic()

    def _save(self) -> None:
        self.folder.check_present()
        parts, state = self.trainer.state()
        save_checkpoint(self.folder.checkpoints, step=self.trainer.step, parts=parts, state={**state, "best": self.best})

    def _snapshot(self) -> None:
        """Stores the averages by power functions as they stand."""
        optimizer, settings = self.trainer.optimizer, self.config.optimizer
        stored = [(index, name) for index, name in enumerate(settings.averages) if index >= len(settings.ema_halflife_kimg)]
        write_snapshot(self.folder.snapshots, self.trainer.step, {name: optimizer.average(index) for index, name in stored})

    def _evaluate(self) -> None:
        figures = self.monitor.evaluate(self._generator())
        if self.best is None or figures["score"] < self.best["score"]:
            self.best = {"nimg": self.trainer.nimg, **figures}
            self._save_models(self.folder.path, "best")

    def _averaged(self, index: int) -> dict[str, Tensor]:
        """The network's state dict with an average in the place of the weights; buffers are the student's."""
        average = self.trainer.optimizer.average(index)
        state = self.trainer.optimizer.student.state_dict()
        return {name: average[name] if name in average else tensor.clone() for name, tensor in state.items()}

    def _generator(self) -> Generator:
        """A generator with the first average, in weights of its own, to be dropped after use."""
        network = copy.deepcopy(self.trainer.optimizer.student).float().requires_grad_(False)
        network.load_state_dict(self._averaged(0))
        return Generator(Denoiser(network, self.config.noise), self.info(0), device=str(self.trainer.device), precision="fp32")

    def info(self, index: int) -> dict:
        """The facts of average `index`'s model folder beside network and preconditioning."""
        dataset, config = self.trainer.dataset, self.config
        training = {
            "preset": config.preset,
            "method": config.method,
            "data": config.data,
            "dataset": dataset.fingerprint,
            "nimg": self.trainer.nimg,
            "seed": config.seed,
        }
        halflives, widths = config.optimizer.ema_halflife_kimg, config.optimizer.ema_widths
        is_power = index >= len(halflives)
        training["ema_width" if is_power else "ema_halflife_kimg"] = widths[index - len(halflives)] if is_power else halflives[index]
        if config.label_drop:
            training["label_drop"] = config.label_drop
        if config.objective.guidance != 1:
            training["guidance"] = config.objective.guidance
        return {
            "classes": list(dataset.class_names) if dataset.class_names else None,
            "resolution": dataset.resolution,
            "channels": dataset.channels,
            "training": training,
            "sampling": config.sampling,
            "licence": None,
        }

    def _save_models(self, folder: Path, name: str) -> None:
        """Writes the first average as the model folder `name`, each other as `name`-ema-<half-life>kimg or `name`-ema-width-<width>."""
        for index, average in enumerate(self.config.optimizer.averages):
            path = folder / (name if index == 0 else f"{name}-ema-{average}")
            save_model(path, Denoiser(self.trainer.optimizer.student, self.config.noise), self.info(index), state=self._averaged(index))


def _due(nimg: int, batch: int, every_kimg: float | None) -> bool:
    """Whether the step that ended at nimg crossed a multiple of every_kimg."""
    if every_kimg is None:
        return False
    every = every_kimg * 1000
    return nimg // every > (nimg - batch) // every
