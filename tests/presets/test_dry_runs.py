"""`fastcm train PRESET --method M --dry-run`: every preset says what it would do, with every method that it has."""

import pytest
from published_runs import PUBLISHED
from test_presets import OURS

from fastcm import cli, networks
from fastcm.training.methods import TAUGHT_METHODS

PAIRS = [*PUBLISHED, *OURS]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert list(tmp_path.iterdir()) == []


def dry(capsys, name, method, *options) -> str:
    assert cli.main(["train", name, "--method", method, "--dry-run", "--device", "cpu", *options]) == 0
    told = capsys.readouterr()
    assert told.err == ""
    return told.out


@pytest.mark.slow
def test_every_preset_with_every_method(capsys, monkeypatch):
    """Without memory and seconds, which take passes of the network."""
    for measured in ("print_memory", "print_time"):
        monkeypatch.setattr(f"fastcm.cli.train.{measured}", lambda *arguments: None)
    for name, method in PAIRS:
        told = dry(capsys, name, method)
        rows = [line.split() for line in told.splitlines()]
        (planned,) = [row for row in rows if row[:1] == ["method"]]
        assert planned[1] == f"{method},", (name, method)
        assert f'"preset": "{name}"' in told and '"duration_kimg"' in told
        (weights,) = [row for row in rows if row[:1] == ["weights"]]
        assert int(weights[1].replace(",", "")) > 1e5, (name, method)
        (start,) = [place for place, row in enumerate(rows) if row[:1] == ["schedule"]]
        assert float(rows[start + 1][0]) == 0 and float(rows[start + 9][0]) == pytest.approx(float(planned[2]), rel=1e-5), (name, method)
    assert len(PAIRS) > 50 and networks.KINDS.keys() >= {"adm", "song", "edm2"}


SMALL = ("--batch", "2", "--set", "network.channels=64", "--set", "network.blocks=1", "--set", "network.channel_mult=[1]")
SMALL += ("--set", "network.attention_resolutions=[]", "--precision", "fp32")
MEASURED = {
    "lpips": ("cifar10", "cd"),
    "edm2": ("imagenet64-edm2", "edm"),
    "tcm": ("imagenet64-edm2-fastgen", "tcm"),
    "meanflow": ("cifar10", "meanflow"),
    "scd": ("imagenet64", "scd"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", MEASURED)
def test_memory_is_estimated_for_what_the_published_runs_need(capsys, monkeypatch, what):
    """Networks narrowed: the distance, the teacher, the first stage and the averages are what is seen here."""
    monkeypatch.setattr("fastcm.cli.train.print_time", lambda *arguments: None)
    name, method = MEASURED[what]
    rows = [line.split() for line in dry(capsys, name, method, *SMALL).splitlines() if line.startswith("memory")]
    sizes = {" ".join(row[1:-2]): float(row[-2].replace(",", "")) for row in rows}
    assert sizes["total"] == pytest.approx(sum(size for part, size in sizes.items() if part != "total"), abs=1)
    assert sizes["activations"] > 1 and sizes["weights"] > 0.1
    beside = {"lpips": 59, "edm2": 0, "meanflow": 0}.get(what)  # VGG16's convolutions, 14.7 million in fp32
    assert sizes["teacher and distance"] >= beside if beside is not None else sizes["teacher and distance"] >= 0.9 * sizes["weights"]
    assert (method in TAUGHT_METHODS) == (what in ("lpips", "scd"))
