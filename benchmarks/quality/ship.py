"""Makes a trained run the model that is shipped: its folder, with a card that names command, commit and measured figures.

`python -m fastcm.benchmarks.quality.ship RUN --command "fastcm train mnist ..." --json EVALUATION`, EVALUATION being what
`fastcm evaluate RUN --data mnist --json EVALUATION` wrote.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from fastcm.benchmarks.results_file import machine

BUILT_IN = Path(__file__).resolve().parents[2] / "fastcm" / "data" / "builtin" / "models"
LICENCE = "CC BY-SA 3.0, as the pictures of MNIST that it was trained on"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastcm.benchmarks.quality.ship", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the run folder")
    parser.add_argument("--command", required=True, help="how it was trained")
    parser.add_argument("--json", type=Path, required=True, metavar="EVALUATION", help="its figures")
    parser.add_argument("--out", type=Path, default=BUILT_IN / "mnist", help="the folder to write (the shipped one)")
    args = parser.parse_args(argv)
    figures = json.loads(args.json.read_text(encoding="utf-8"))
    shutil.rmtree(args.out, ignore_errors=True)
    shutil.copytree(args.run / "model", args.out)
    config = args.out / "config.json"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace('"licence": null', f'"licence": {json.dumps(LICENCE)}'), encoding="utf-8")
    card = args.out / "README.md"
    card.write_text(
        card.read_text(encoding="utf-8").replace("| licence | not stated |", f"| licence | {LICENCE} |") + told(args.command, figures)
    )
    return 0


def told(command: str, figures: dict) -> str:
    """The card's part about this model: how it was made and how good it is."""
    facts, real, halves = machine(), figures["real"], figures["sets"][0]["fd"]["real"]
    rows = [
        f"| {row['name']} | {row['accuracy']:.2%} | {row['fd']['mean']:.2f} ± {row['fd']['std']:.2f} | {row['fd']['ratio']:.2f} |"
        for row in figures["sets"]
    ]
    return f"""
## This model

Trained by `{command}`, commit {facts["commit"]}, on {facts["processor"]}, torch {facts["torch"]}. Measured by
`fastcm evaluate mnist --data mnist` against 2,000 held-out pictures:

| | recognised | Fréchet distance | times real halves |
|---|---|---|---|
{chr(10).join(rows)}
| real pictures | {real["accuracy"]:.2%} | {halves["mean"]:.2f} ± {halves["std"]:.2f} | 1 |
"""


if __name__ == "__main__":
    sys.exit(main())
