"""`fastcm average`: another average of a run's weights, after the fact, from the snapshots that the run has stored."""

import argparse
from pathlib import Path


def add(subparsers) -> None:
    parser = subparsers.add_parser("average", help="an average of any width from a run's snapshots", description=__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of a run with optimizer.ema_widths and snapshot_every_kimg")
    width = "standard deviation of the average over training time, as a share of its length: 0.05 looks back further than 0.01"
    parser.add_argument("--width", type=float, required=True, metavar="W", help=width)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the model folder to write, which must not exist")


def run(args: argparse.Namespace) -> None:
    from fastcm.training.snapshots import reconstruct

    facts = reconstruct(args.run, args.width, args.out)
    print(
        f"{args.out}: the average of width {facts['ema_width']:g} at {facts['nimg'] / 1000:g} kimg, from {facts['snapshots']} snapshots; "
        f"least-squares error {facts['least_squares_error']:.2g} of its profile"
    )
