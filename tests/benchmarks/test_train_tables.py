"""Training speed on the pages is what the committed results say, and only that."""

import pytest

from fastcm.benchmarks.pages import tables
from fastcm.benchmarks.training import picture as train_picture
from fastcm.benchmarks.training import tables as train_tables

PHASES = {
    "data_ms": 1.0,
    "perturb_ms": 1.0,
    "student_ms": 4.0,
    "target_ms": 3.0,
    "distance_ms": 1.0,
    "backward_ms": 8.0,
    "optimizer_ms": 2.0,
}
MACHINE = {"cores": 2, "processor": "P", "torch": "2", "date": "2026-01-01", "commit": "c", "gpu": None, "driver": None}


def step(backend, p50_ms, model="digits", batch=64, **more):
    return {
        "bench": "train",
        "op": "step",
        "model": model,
        "batch": batch,
        "backend": backend,
        "device": "cpu",
        "precision": "fp32",
        "p20_ms": p50_ms - 1,
        "p50_ms": p50_ms,
        "p80_ms": p50_ms + 1,
        "images_per_s": 1000 * batch / p50_ms,
        "parameters": 430_000,
        "startup_s": 1.0,
        **PHASES,
        **more,
    }


CONTENT = {
    "machine": MACHINE,
    "rows": [
        step("published_step", 40.0),
        step("fastcm", 20.0, speedup_over_published_step=2.0, peak_memory_gb=0.5),
        step("fastcm", 30.0, "cifar10", 2, speedup_over_published_step=1.5),
        step("published_step", 30.0, "mnist"),
        step("fastcm", 20.0, "mnist", precision="bf16", speedup_over_published_step=1.5),
        {**step("compile", 1.0), "error": "no compiler"},
        {
            "bench": "train",
            "op": "scaling",
            "model": "digits",
            "axis": "processes",
            "value": 2,
            "batch": 64,
            "backend": "fastcm",
            "parameters": 430_000,
            "images_per_s": 3000.0,
            "p50_ms": 21.0,
        },
        {
            "bench": "train",
            "op": "memory",
            "model": "digits",
            "value": 64,
            "batch": 64,
            "backend": "fastcm",
            "recomputed": True,
            "peak_memory_gb": 0.25,
        },
    ],
}


def test_sections_say_what_was_measured_and_what_was_not():
    made = train_tables.sections(CONTENT, None)
    assert "| digits, 8x8 | 0.43 M | 64 | 1,600 | 3,200 | 2.00 |  |  |  |" in made["train"]
    assert "| mnist, 28x28 on patches | 0.43 M | 64 | 2,133 (fp32) | 3,200 (bf16) | 1.50 |  |  |  |" in made["train"]
    assert made["train"].endswith(train_tables.NOT_ON_GPU) and "2 cores of P" in made["train"]
    assert "| digits, 8x8 | 64 | fastcm | 1 | 1 | 4 | 3 | 1 | 8 | 2 |" in made["train-split"] and "compiled" not in made["train-split"]
    assert "| digits | 2 processes | 64 | 0.43 M | 3,000 | 21 |" in made["train-scaling"]
    assert "| digits, 8x8 | fastcm, recomputed | 64 | 0.25 | 3.91 |" in made["train-memory"]
    assert "| digits, 8x8 | 0.43 M | 5.21 minutes | not measured |" in made["train-cost"]
    assert "| CIFAR-10 DDPM++ | 0.43 M | 4.17 hours | not measured |" in made["train-cost"]
    nothing = train_tables.sections(None, None)
    assert set(nothing.values()) == {train_tables.NOT_MEASURED} and nothing.keys() == made.keys()
    gpu = {"machine": {**MACHINE, "gpu": "G", "driver": "1"}, "rows": [step("fastcm", 1.0, "cifar10", 128, mfu_percent=41.2)]}
    both = train_tables.sections(CONTENT, gpu)
    assert train_tables.NOT_ON_GPU not in both["train"] and "| 41.2 |" in both["train-step"] and "MFU" in both["train-step"]
    assert "| CIFAR-10 DDPM++ | 0.43 M | 4.17 hours | 7.81 s |" in both["train-cost"]


def test_sections_go_between_their_marks():
    page = "a\n<!-- train -->\nold\n<!-- train -->\nb <!-- train-cost -->\n"
    made = train_tables.sections(CONTENT, None)
    found = train_tables.with_sections(page, made)
    assert found == f"a\n<!-- train -->\n{made['train']}\n<!-- train -->\nb <!-- train-cost -->\n"
    assert train_tables.with_sections(found, made) == found


def test_the_picture_knows_its_rows(tmp_path):
    path = tmp_path / "p.png"
    train_picture.write(CONTENT, path)
    assert train_picture.is_current(CONTENT, path)
    other = {**CONTENT, "rows": [{**CONTENT["rows"][0], "p50_ms": 41.0}, *CONTENT["rows"][1:]]}
    assert not train_picture.is_current(other, path) and not train_picture.is_current(CONTENT, tmp_path / "none.png")
    drawn = train_picture.draw(CONTENT).getcolors(1 << 20)
    assert {colour for _, colour in drawn} >= {(0xD5, 0x5E, 0), (0, 0x9E, 0x73)}


@pytest.mark.parametrize("page", tables.TRAINING_PAGES, ids=lambda page: page.name)
def test_committed_pages_are_what_the_results_say(page):
    text = page.read_text(encoding="utf-8")
    assert tables.with_training(text) == text
    speed = ["train-picture", "train-step", "train-split", "train-scaling", "train-memory"]
    marks = {"README.md": ["train"], "long-runs.md": ["train-cost"]}.get(page.name, speed)
    assert all(text.count(f"<!-- {mark} -->") == 2 for mark in marks)


def test_the_committed_picture_is_what_the_results_say():
    content = tables.drawn()
    assert content is None or train_picture.is_current(content)
