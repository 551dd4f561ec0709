"""`fastcm train`: a preset or pictures in, a run folder with its model out; the same command again resumes."""

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

from fastcm.errors import InputError
from fastcm.training.quantities import kimg, seconds

SCHEDULE_ROWS, SHOWN_CLASSES = 8, 12


def add(subparsers) -> None:
    parser = subparsers.add_parser("train", help="train a model, or resume the run", description=__doc__)
    parser.add_argument(
        "preset", nargs="?", metavar="PRESET", help="a run of docs/presets.md, as imagenet64; mnist by default, folder with --data"
    )
    parser.add_argument(
        "--method",
        help="edm (diffusion), cd, scd (distillation), ct, ict, sct, meanflow (data), ect (tuning), tcm (second stage); or the preset's",
    )
    parser.add_argument("--config", metavar="FILE", help="settings in TOML or JSON by the names of --set; options override them")
    add_data(parser)
    parser.add_argument("--teacher", metavar="MODEL", help="the diffusion model that cd or scd distils; the network is taken from it")
    weight = "cd, scd: guide the teacher with this weight, 1 for none; LOW,HIGH: each image its own, of which the student is told"
    parser.add_argument("--guidance", metavar="W", type=parsed, help=weight)
    parser.add_argument("--guidance-interval", metavar="LOW,HIGH", type=parsed, help="guide between these noise levels alone, as 0.2,5")
    parser.add_argument("--guide", metavar="MODEL", help="guide away from this model, in the place of the teacher without its labels")
    parser.add_argument("--label-drop", metavar="P", type=float, help="share of images whose class is not told, as 0.1: allows guidance")
    parser.add_argument(
        "--init", metavar="MODEL", help="start from this model's weights and network (classes may be others); the first stage of tcm"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="the run folder; runs/PRESET, or runs/PRESET-METHOD, by default")
    parser.add_argument(
        "--duration", metavar="N", type=kimg, help="images to train on, as 500kimg, 2Mimg or 64000img (plain numbers are kimg)"
    )
    parser.add_argument("--batch", type=int, help="images per step, of all processes together")
    parser.add_argument("--microbatch", type=int, metavar="N", help="images at a time in each process; halved where memory runs out")
    parser.add_argument("--seed", type=int, help="the seed of weights, noise, levels and order")
    parser.add_argument("--device", help="auto, cpu or cuda")
    parser.add_argument("--precision", help="auto, fp32, bf16 or fp16")
    parser.add_argument("--lr", type=float, help="the peak learning rate")
    parser.add_argument("--resolution", type=int, metavar="N", help="side of the pictures after crop and resize")
    parser.add_argument("--compile", help="auto, on or off: torch.compile of the network")
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other setting, as network.channels=64 or optimizer.ema_rampup=none",
    )
    parser.add_argument("--bad-images", help="fail (default) or skip")
    parser.add_argument("--checkpoint-every", metavar="T", type=seconds, help="time between checkpoints, as 30s or 10m")
    parser.add_argument("--evaluate-every", metavar="N", type=kimg, help="images between two measurements; the best model is kept in best/")
    parser.add_argument("--sample-every", metavar="N", type=kimg, help="images between two sample grids")
    parser.add_argument("--log", metavar="NAMES", help="some of tensorboard,wandb,trackio, or none; TensorBoard where it is installed")
    parser.add_argument("--lpips-weights", metavar="FILE", help="VGG16's state dict, for objective.distance=lpips")
    parser.add_argument("--dry-run", action="store_true", help="print settings, parameters, memory and schedule, and stop")


def parsed(text: str):
    from fastcm.training.config import parse_value

    return parse_value(text)


def add_data(parser: argparse.ArgumentParser) -> None:
    """`--data` and how it is read."""
    kinds = "a folder, zip, .npz, .npy, IDX, .parquet, hf:owner/name, CIFAR-10, SVHN, tar shards, mnist, digits, emoji32"
    parser.add_argument("--data", metavar="SRC", help=f"pictures: {kinds} (docs/data.md)")
    labels = "classes for --data: CSV or JSON (labels.csv beside the pictures is found), beside arrays IDX, .npy or .npz"
    parser.add_argument("--labels-file", metavar="FILE", help=labels)
    parser.add_argument("--channels", type=int, metavar="C", help="1 (grey), 3 (RGB) or 4 (RGBA); 1 or 3 by the pictures by default")
    parser.add_argument("--image-column", metavar="NAME", help="the pictures' column in a table; found by its type by default")
    parser.add_argument("--label-column", metavar="NAME", help="the classes' column, or none; the ClassLabel by default")


def run(args: argparse.Namespace) -> int:
    from fastcm import runs
    from fastcm.training.parallel import joined
    from fastcm.training.run_logs import chosen_logs

    with joined() as processes:
        logs = chosen_logs(args.log)
        with processes.writer_first():
            ready = plan(args)
        if processes.is_writer:
            print_plan(ready)
            if args.dry_run:
                print_schedule(ready.config)
                print_memory(replace(ready.config, batch=processes.share(ready.config.batch)))
                print_time(ready, processes)
                print(json.dumps(ready.config.as_dict(), indent=1))
        if args.dry_run:
            return 0
        result = runs.start(ready, processes=processes, logs=logs)
    if processes.is_writer:
        report(result)
    return 0 if result.signal is None else 128 + result.signal


def report(result) -> None:
    """Where the run stands, in one line."""
    done = f"{result.nimg / 1000:g} of {result.total_nimg / 1000:g} kimg"
    if result.signal is not None:
        print(f"fastcm: stopped at {done}; the checkpoint is saved. Run the same command again to go on.", file=sys.stderr)
    else:
        print(f"trained {done}; model in {result.model}")


def plan(args: argparse.Namespace):
    """The run that the options describe, opened and checked."""
    from fastcm import runs

    return runs.plan(
        args.preset,
        method=args.method,
        data=args.data,
        teacher=args.teacher,
        out=args.out,
        changes=changes(args),
        config_file=args.config,
        complete=not args.dry_run,
    )


def changes(args: argparse.Namespace) -> dict:
    """The settings that were given, by field: an option that was not is left out, so that None is a value, as in --set clip=none."""
    from fastcm.training.config import parse_value

    fields = {
        "objective.guidance": args.guidance,
        "objective.guidance_interval": args.guidance_interval,
        "guide": args.guide,
        "label_drop": args.label_drop,
        "init": args.init,
        "duration_kimg": args.duration,
        "batch": args.batch,
        "microbatch": args.microbatch,
        "seed": args.seed,
        "device": args.device,
        "precision": args.precision,
        "lr": args.lr,
        "resolution": args.resolution,
        "compile": args.compile,
        "bad_images": args.bad_images,
        "lpips_weights": args.lpips_weights,
        "labels_file": args.labels_file,
        "channels": args.channels,
        "image_column": args.image_column,
        "label_column": args.label_column,
        "checkpoint_every_s": args.checkpoint_every,
        "evaluate_every_kimg": args.evaluate_every,
        "sample_every_kimg": args.sample_every,
    }
    fields = {name: value for name, value in fields.items() if value is not None}
    for setting in args.settings:
        name, equals, value = setting.partition("=")
        if not equals or not name or not value.strip():
            raise InputError(f"no value in --set: {setting}. Write it as name=value.")
        fields[name] = parse_value(value)
    return fields


def print_plan(ready) -> None:
    """What was chosen, in a few lines."""
    config, dataset = ready.config, ready.dataset
    if dataset is not None:
        classes = f", {len(dataset.class_names):,} classes" if dataset.class_names else ", no classes"
        print(f"data     {config.data}: {len(dataset):,} pictures, {dataset.channels}x{dataset.resolution}x{dataset.resolution}{classes}")
        for line in [*dataset.notes, *class_lines(dataset)]:
            print(f"         {line}")
    optimizer = f"{config.optimizer.kind} {config.optimizer.lr:g}"
    if ready.first is not None:
        first = ready.first.config
        print(f"first    its teacher: {first.method}, {first.duration_kimg:g} kimg in batches of {first.batch}, in {ready.first.out}")
    print(f"method   {config.method}, {config.duration_kimg:g} kimg in batches of {config.batch}, {optimizer}")
    network = {name: value for name, value in config.network.items() if name not in ("in_channels", "out_channels")}
    print(f"network  {' '.join(f'{name}={value}' for name, value in network.items())}")
    if config.teacher is not None or config.init is not None:
        noise = config.noise
        print(f"noise    {noise.form} form, sigma {noise.sigma_min:.4g} to {noise.sigma_max:.4g}, c_noise {noise.c_noise}")
    print_disk(config)
    print(f"out      {ready.out}", flush=True)


def print_disk(config) -> None:
    """What the run's snapshots will take: its only files whose number grows."""
    from fastcm import networks

    every = config.optimizer.snapshot_every_kimg
    if every is not None and config.network.get("kind") in networks.KINDS:
        each = 4e-9 * networks.parameter_count(config.network) * len(config.optimizer.ema_widths)
        count = math.ceil(config.duration_kimg / every)
        print(f"disk     {count:,} snapshots of {each:.3g} GB, {count * each:.3g} GB in all")


def class_lines(dataset) -> list[str]:
    """How many pictures each class has, and which classes have none."""
    from fastcm.weights.class_names import listed

    if not dataset.class_names:
        return []
    names, counts = dataset.class_names, dataset.class_counts().tolist()
    full = [count for count in counts if count]
    if len(full) <= SHOWN_CLASSES:
        lines = [", ".join(f"{listed([name])} {count:,}" for name, count in zip(names, counts, strict=True) if count)]
    else:
        lines = [f"{min(full):,} to {max(full):,} pictures a class"]
    empty = [name for name, count in zip(names, counts, strict=True) if not count]
    return [*lines, *([f"no picture of {len(empty):,} classes: {listed(empty)}"] if empty else [])]


def print_schedule(config) -> None:
    """Parameters, and what changes over the run, in eighths of it: the learning rate and what of the schedules the method reads."""
    from fastcm import networks
    from fastcm.training.methods import ECT_METHODS, FIELDS_OF
    from fastcm.training.schedule import step_values

    print(f"weights  {networks.parameter_count(config.network):,} parameters")
    read = FIELDS_OF[config.method]
    columns = {"lr": lambda values: f"{values.lr:.2g}"}
    if "curriculum" in read:
        columns |= {
            "stage" if config.method in ECT_METHODS else "N": lambda values: f"{values.steps}",
            "mu": lambda values: f"{values.mu:.4f}",
        }
    if "tangent_warmup_kimg" in read:
        columns |= {"warm-up": lambda values: f"{values.tangent_warmup:.2f}"}
    print(f"schedule {'kimg':>10}{''.join(f'{name:>9}' for name in columns)}")
    for row in range(SCHEDULE_ROWS + 1):
        nimg = round(config.duration_kimg * 1000 * row / SCHEDULE_ROWS)
        values = step_values(config, nimg)
        print(f"{nimg / 1000:19g}{''.join(f'{show(values):>9}' for show in columns.values())}")


def print_memory(config) -> None:
    """What a step takes at its peak on the device of one process, by component."""
    from fastcm.training.memory import estimate

    for name, size in estimate(config).items():
        print(f"memory   {name:<22}{size / 1e6:14,.1f} MB")


LARGE_WEIGHTS = 50_000_000  # from here on a step is too long to be tried on a CPU


def print_time(ready, processes) -> None:
    """How long the run will take here, its teacher's included, by a few of its passes; and what to turn for more quality."""
    from fastcm import networks
    from fastcm.generation.generator import choose_device
    from fastcm.training.speed import images_per_s

    config, hours = ready.config, 0.0
    if choose_device(config.device).type == "cpu" and networks.parameter_count(config.network) > LARGE_WEIGHTS:
        print("time     not measured: a network of this size needs a GPU")
        return
    for each in (config, ready.first and ready.first.config):
        if each is not None:
            speed = images_per_s(replace(each, batch=processes.share(each.batch))) * processes.size
            hours += each.duration_kimg * 1000 / speed / 3600
            print(f"speed    {each.method} {speed:.3g} images/s in a few passes; an hour is --duration {speed * 3.6:.0f}kimg")
    shown = f"{hours * 60:.0f} minutes" if hours < 2 else f"{hours:.0f} hours" if hours < 72 else f"{hours / 24:.0f} days"
    print(f"time     about {shown} here")
    print("quality  train longer first (--duration), then widen the network (--set network.channels=N), then --set network.blocks=2")
