"""A diffusion teacher as people have them: a DDPM made by diffusers' own classes, its network, scheduler, average and folder.

`python -m fastcm.benchmarks.quality.ddpm OUT --data mnist` trains it and saves a DDPMPipeline. Of fastcm it takes the pictures alone.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from fastcm.data.dataset import open_dataset

# The shape of google/ddpm-cifar10-32, narrowed: 28 halves twice.
NETWORK = {
    "block_out_channels": (24, 48, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "norm_num_groups": 8,
    "norm_eps": 1e-6,
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "downsample_padding": 0,
}
LR, EMA_DECAY, LOG_EVERY = 2e-3, 0.99, 100


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastcm.benchmarks.quality.ddpm", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder of the pipeline")
    parser.add_argument("--data", default="mnist", metavar="SRC", help="as fastcm train takes it (mnist)")
    parser.add_argument("--kimg", type=float, default=96.0, help="thousands of images to train on (96)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    train(args.out, data=args.data, kimg=args.kimg, batch=args.batch, seed=args.seed)
    return 0


def train(out: Path, *, data: str, kimg: float, batch: int, seed: int) -> None:
    """Ho et al. 2020, algorithm 1, at a uniform timestep of a linear chain, but v in epsilon's place (Salimans and Ho 2022, Appendix D);
    AdamW whose rate falls to 0, bf16 products on a CPU."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel

    pictures = torch.tensor(open_dataset(data, classes=0).for_training().images)
    torch.manual_seed(seed)
    network = UNet2DModel(sample_size=pictures.shape[2], in_channels=pictures.shape[1], out_channels=pictures.shape[1], **NETWORK)
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", prediction_type="v_prediction")
    average = EMAModel(network.parameters(), decay=EMA_DECAY)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR)
    steps, began, running = round(kimg * 1000 / batch), time.process_time(), 0.0
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 100) * (1 - step / steps))
    for step in range(1, steps + 1):
        images = pictures[torch.randint(len(pictures), (batch,))].float() / 127.5 - 1
        noise, timesteps = torch.randn_like(images), torch.randint(scheduler.config.num_train_timesteps, (batch,))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            predicted = network(scheduler.add_noise(images, noise, timesteps), timesteps).sample
        loss = F.mse_loss(predicted.float(), scheduler.get_velocity(images, noise, timesteps))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rate.step()
        average.step(network.parameters())
        running += loss.item()
        if step % LOG_EVERY == 0:
            print(f"{step}/{steps} loss {running / LOG_EVERY:.4f}, {time.process_time() - began:.0f} CPU seconds", flush=True)
            running = 0.0
    average.copy_to(network.parameters())
    DDPMPipeline(network, scheduler).save_pretrained(out)


if __name__ == "__main__":
    sys.exit(main())
