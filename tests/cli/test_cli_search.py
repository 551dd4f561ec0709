"""`fastcm evaluate --search-steps`: what is measured is what the sampler gets, what is found is saved and used."""

import json

import numpy as np
import pytest
from evaluated_models import judged_quickly, model_folder, run  # noqa: F401

from fastcm.api import load
from fastcm.cli.evaluate_search import trained_levels
from fastcm.consistency.denoiser import Preconditioning
from fastcm.evaluation import timestep_search
from fastcm.generation.generator import Generator


@pytest.mark.slow
def test_the_search_is_saved_and_used(tmp_path, capsys, monkeypatch, quick):
    """The published script calls its sampler without the noise levels: here what is measured is what the sampler gets."""
    model = model_folder(tmp_path / "model")
    drawn = []
    batches = Generator.batches

    def watched(self, seeds, labels=None, **options):
        drawn.append((int(np.min(seeds)), options.get("sigmas")))
        return batches(self, seeds, labels, **options)

    monkeypatch.setattr(Generator, "batches", watched)
    options = ("--data", "digits", "--seeds", "500000-500099", "--metrics", "fid", "--search-steps", "2", "--search-grid", "6")
    code, out, err = run(capsys, model, *options, "--save", "--json", tmp_path / "a.json")
    assert (code, err) == (0, "") and "searched with seeds 300000-300099 among 6 levels" in out
    grid = timestep_search.candidates(Preconditioning(), 6)
    tried = {sigmas for first, sigmas in drawn if first == 300_000}
    assert (80.0,) in tried and len({s for s in tried if s in {(grid[0], level) for level in grid[1:]}}) >= 3
    found = json.loads((model / "config.json").read_text())["sampling"]["2"]
    assert tuple(found) in tried and load(model).sigmas(2) == tuple(found)
    assert json.loads((tmp_path / "a.json").read_text())["protocol"]["sigmas"] == [[80.0], found], "the evaluation uses what was found"
    drawn.clear()
    code, again, _ = run(capsys, model, *options)
    assert code == 0 and "0 sets of samples measured now" in again and not [first for first, _ in drawn if first == 300_000]


@pytest.mark.slow
def test_a_larger_figure_can_be_what_is_searched(tmp_path, capsys, quick):
    model = model_folder(tmp_path / "model")
    options = ("--data", "digits", "--seeds", "500000-500099", "--metrics", "accuracy", "--search-steps", "2", "--search-grid", "4")
    code, out, _ = run(capsys, model, *options, "--search-metric", "accuracy", "--json", tmp_path / "a.json")
    values = [float(line.split()[3]) for line in out.splitlines()[:2]]
    assert code == 0 and 0 <= values[0] <= values[1] <= 1


def test_the_levels_of_a_run_are_the_candidates(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"format": "fastcm-run", "objective": {"curriculum": "doubling", "s0": 10, "s1": 40}}))
    assert trained_levels(tmp_path) == 41
    (tmp_path / "config.json").write_text(json.dumps({"format": "fastcm-run", "objective": {"curriculum": "stages", "s0": 1, "s1": 8}}))
    assert trained_levels(tmp_path) == trained_levels(tmp_path / "none") == 40
