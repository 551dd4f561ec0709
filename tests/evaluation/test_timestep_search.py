"""The search of noise levels: exact on every unimodal function, greedy, resumable; the two defects of the published script stay away."""

import json
import math

import pytest

from fastcm.errors import InputError
from fastcm.evaluation import timestep_search
from fastcm.evaluation.timestep_search import Found, greedy_search, most_measurements, save_levels, ternary_search
from fastcm.weights.model_folder import write_json


@pytest.mark.parametrize("width", range(25))
def test_it_finds_the_minimum_of_every_unimodal_function(width):
    """The published tail takes an unmeasured neighbour once the width is 1, and does not compare the ends: here every place is tried."""
    low = 3
    for place in range(low, low + width + 1):
        for left, right in ((1.0, 1.0), (0.01, 5.0), (5.0, 0.01)):
            measured = []

            def value(index, place=place, left=left, right=right, measured=measured):
                assert low <= index <= low + width
                measured.append(index)
                return left * (place - index) if index < place else right * (index - place)

            assert ternary_search(value, low, low + width) == place
            assert place in measured, "the answer must have been measured"
            assert len(set(measured)) <= most_measurements(low, low + width)


def test_a_wide_range_takes_a_logarithm_of_measurements():
    measured = set()
    assert ternary_search(lambda i: measured.add(i) or abs(i - 777), 0, 2000) == 777
    assert len(measured) < 40


def test_an_empty_range_is_refused():
    with pytest.raises(InputError, match="empty range in the search: 5 to 4"):
        ternary_search(float, 5, 4)


GRID = tuple(float(2 ** (6 - i)) for i in range(12))


def bowl(*best):
    """Smallest, at 1 / number of levels, where every level after the first is the given one."""

    def objective(levels):
        misses = [abs(math.log2(sigma) - math.log2(want)) for sigma, want in zip(levels[1:], best, strict=False)]
        return 1 / len(levels) + sum(misses)

    return objective


def test_greedy_search_adds_one_step_at_a_time():
    found = greedy_search(bowl(4.0, 0.5), GRID, steps=3)
    assert found.levels == {1: (64.0,), 2: (64.0, 4.0), 3: (64.0, 4.0, 0.5)}
    assert found.values == {1: 1.0, 2: 0.5, 3: pytest.approx(1 / 3)}


def test_room_is_left_for_the_steps_to_come():
    found = greedy_search(bowl(GRID[-1], GRID[-1]), GRID, steps=3)
    assert found.levels[3] == (64.0, GRID[-2], GRID[-1])


def test_the_best_that_was_measured_wins_where_the_figure_is_not_unimodal():
    odd = {(64.0, GRID[4]): 0.1}
    found = greedy_search(lambda levels: odd.get(levels, bowl(0.25)(levels)), GRID, steps=2, also=[(64.0, 3.0)])
    assert found.levels[2] == min([(64.0, GRID[4]), (64.0, 0.25)], key=lambda levels: odd.get(levels, bowl(0.25)(levels)))
    better = greedy_search(lambda levels: 0.0 if levels == (64.0, 3.0) else bowl(0.25)(levels), GRID, steps=2, also=[(64.0, 3.0)])
    assert better.levels[2] == (64.0, 3.0)


def test_an_interrupted_search_goes_on_where_it_stopped(tmp_path):
    calls = []

    def counted(levels):
        calls.append(levels)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return bowl(2.0)(levels)

    path = tmp_path / "deep" / "search.json"
    with pytest.raises(KeyboardInterrupt):
        greedy_search(counted, GRID, steps=2, journal=path)
    assert len(json.loads(path.read_text())["values"]) == 4
    found = greedy_search(counted, GRID, steps=2, journal=path)
    assert found.levels[2] == (64.0, 2.0) and calls[4] == calls[5] and len(set(calls)) == len(calls) - 1
    again = greedy_search(counted, GRID, steps=2, journal=path)
    assert again == Found(found.levels, found.values, 0, len(set(calls)))
    path.write_text('{"values": [')
    assert greedy_search(bowl(2.0), GRID, steps=2, journal=path).levels == found.levels


def test_another_identity_is_another_journal(tmp_path):
    one = timestep_search.journal_path(tmp_path, {"metric": "fid", "seeds": "1-2"})
    assert one == timestep_search.journal_path(tmp_path, {"seeds": "1-2", "metric": "fid"})
    assert one != timestep_search.journal_path(tmp_path, {"metric": "kid", "seeds": "1-2"})


@pytest.mark.parametrize("steps", [1, 0, 12, 100])
def test_impossible_numbers_of_steps_are_refused(steps):
    with pytest.raises(InputError, match=f"illegal number of steps in --search-steps: {steps}. Use 2 to 11"):
        greedy_search(bowl(2.0), GRID, steps=steps)


def test_a_figure_that_is_not_finite_stops_the_search():
    with pytest.raises(InputError, match="a figure that is not finite in the search: nan at 64"):
        greedy_search(lambda levels: float("nan"), GRID, steps=2)


def test_levels_are_saved_beside_those_of_other_steps(tmp_path):
    path = tmp_path / "config.json"
    write_json(path, {"format": "x", "sampling": {"2": [80.0, 5.0], "4": [80.0, 9.0, 3.0, 1.0]}, "classes": None})
    save_levels(path, {1: (80.0,), 2: (80.0, 0.8), 3: (80.0, 0.8, 0.1)})
    content = json.loads(path.read_text())
    assert content == {"format": "x", "classes": None, "sampling": {"2": [80.0, 0.8], "3": [80.0, 0.8, 0.1], "4": [80.0, 9.0, 3.0, 1.0]}}
