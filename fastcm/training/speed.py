"""How fast a run would train on this machine, measured on a few of its own passes before it starts."""

import time

import torch

from fastcm.generation.generator import choose_device
from fastcm.training.config import TrainConfig
from fastcm.training.memory import blank_batch, blank_trainer
from fastcm.training.schedule import step_values
from fastcm.training.trainer import piece

FEW = 8  # images of the first passes, which say whether a whole one can be waited for
PATIENCE_S = 20.0


def images_per_s(config: TrainConfig) -> float:
    """Images per second of the passes of one microbatch, uncompiled, in this process alone, after some that are not counted.

    The pictures are blank and the weights new, which changes no time; data, optimizer and compilation are left out. Where a whole
    microbatch would take longer than PATIENCE_S, the figure is that of a few images, which are slower each.
    """
    device = choose_device(config.device)
    trainer = blank_trainer(config, device)
    batch = blank_batch(trainer)
    trainer.scalars.set(step_values(config, 0))

    def seconds(images: int) -> float:
        begin = time.perf_counter()
        trainer.losses(piece(batch, 0, images)).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    few = min(FEW, trainer.microbatch)
    seconds(few)
    took = seconds(few)
    if took / few * trainer.microbatch * 2 > PATIENCE_S or few == trainer.microbatch:
        return few / took
    seconds(trainer.microbatch)
    return trainer.microbatch / seconds(trainer.microbatch)
