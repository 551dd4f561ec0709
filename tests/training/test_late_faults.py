"""What fails beside the steps of a run does not cost them: a checkpoint is saved first."""

import pytest
from training_runs import small_run

from fastcm.errors import InputError
from fastcm.training.checkpoint import complete_steps
from fastcm.training.monitor import Monitor


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (InputError("no such thing. Give another."), r"no such thing\. Give another\. The last checkpoint is step-000000004\."),
        (ValueError("a bug"), "a bug"),
    ],
)
def test_a_checkpoint_is_saved_before_an_error_beside_the_steps(tmp_path, monkeypatch, error, message):
    def evaluate(self, generator):
        raise error

    monkeypatch.setattr(Monitor, "evaluate", evaluate)
    with pytest.raises(type(error), match=message):
        small_run(tmp_path / "run", kimg=0.16, evaluate_every_kimg=0.064)
    assert complete_steps(tmp_path / "run" / "checkpoints") == [4]
    monkeypatch.undo()
    assert small_run(tmp_path / "run", kimg=0.16).nimg == 160, "the run goes on without it"
