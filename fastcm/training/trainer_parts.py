"""What a trainer is made of, put together from networks and a run's settings."""

import torch
from torch import nn

from fastcm.consistency.denoiser import Denoiser
from fastcm.data.dataset import Dataset
from fastcm.networks.compiled import compiled as for_training
from fastcm.training.captured_step import graphs_for
from fastcm.training.config import TrainConfig
from fastcm.training.gradient_reduction import GradientReduction
from fastcm.training.host_memory import keep_freed_memory
from fastcm.training.loss_scale import LossScale
from fastcm.training.method_loss import Guides, MethodLoss
from fastcm.training.optimizer import FlatOptimizer
from fastcm.training.parallel import Processes
from fastcm.training.trainer import Trainer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_trainer(
    config: TrainConfig,
    network: nn.Module,
    target_network: nn.Module | None,
    dataset: Dataset,
    *,
    device: torch.device,
    precision: str,
    compiled: bool,
    guides: Guides | None = None,
    processes: Processes | None = None,
) -> Trainer:
    """A trainer of `network`, which lies on `device`, as `config` says.

    target_network: its copy that follows as a moving average (`run.target_of`), or None. precision: a key of DTYPES, in which the networks
    compute from here on: their parameters become views of the optimizer's buffers.
    """
    processes = processes or Processes()
    if device.type == "cpu":
        keep_freed_memory()
    optimizers = {"": FlatOptimizer(network, target_network, config.optimizer, dtype=DTYPES[precision])}
    student = target = Denoiser(for_training(network, network) if compiled else network, config.noise)
    if target_network is not None:
        target = Denoiser(for_training(target_network, target_network) if compiled else target_network, config.noise)
    with device:  # what the loss learns is made there
        method_loss = MethodLoss(
            config,
            student,
            target,
            guides or Guides(),
            tangent_network=network,
            image_shape=(dataset.channels, dataset.resolution, dataset.resolution),
            compiled=compiled,
        )
    if method_loss.log_weight is not None:
        optimizers["log_weight."] = FlatOptimizer(method_loss.log_weight, None, config.optimizer)
    alone, scaled = processes.size == 1, precision == "fp16"
    if device.type == "cuda" and alone:
        for optimizer in optimizers.values():
            optimizer.gather_gradients()
    # Gradients of several processes leave during the backward pass, fp16 follows its scale: both are untried in a recording.
    recordable = compiled and alone and not scaled
    return Trainer(
        config,
        dataset,
        optimizers=optimizers,
        method_loss=method_loss,
        loss_scale=LossScale(device) if scaled else None,
        reduction=None if alone else GradientReduction(list(optimizers.values()), processes),
        graphs=graphs_for(device, network) if recordable else None,
        processes=processes,
        device=device,
        precision=precision,
        compiled=compiled,
    )
