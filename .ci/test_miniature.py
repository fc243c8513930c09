"""
The recipes of the tiny world: what .ci/compare.py makes of runs, and that .ci/premises.py measures
what it says.
"""

import torch

torch.set_num_threads(1)

import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import compare
import premises
import test_runs

from test_opd import close

made = test_runs.made

# --------------------------------------------------------------------------------------------------
# compare.py


def run_of(curve, overlap=(0.5, 0.75)):
    """What opd.read_run gives of a run. curve: (tokens, seconds, accuracy) of each evaluation"""
    tokens, seconds, after = curve[-1]
    first, last = ({"overlap_ratio": value} for value in overlap)
    last |= {"generated_tokens": tokens, "seconds": seconds}
    return {"curve": curve, "after": after, "first": first, "last": last}


PLAIN = [
    {"seed-0": run_of([(0, 0, 0.2), (1000, 10, 0.4), (3000, 30, 0.8)])},
    {"seed-1": run_of([(0, 0, 0.1), (1000, 10, 0.5), (3000, 30, 0.9)])},
]


def test_the_interval_of_the_mean_is_students_t():
    """Of .1 and .3: .2, and 12.71 standard errors of .1."""
    assert compare.interval([0.1, 0.3]) == "20.0±127.1"
    assert compare.interval([0.1, 0.2, 0.3, 0.4, 0.5], "+") == "+30.0±19.7"
    assert compare.interval([0.25]) == "25.0"


def test_a_method_is_beside_plain_opd_where_that_had_spent_as_much():
    """After 2,000 tokens plain OPD was half way from .4 to .8, after 15 seconds a quarter."""
    own = run_of([(2000, 15, 0.7)])
    close(compare.minus_opd(own, PLAIN[0]["seed-0"], 0), 0.7 - 0.6)
    close(compare.minus_opd(own, PLAIN[0]["seed-0"], 1), 0.7 - 0.5)


def test_what_spent_more_is_beside_the_end_of_plain_opd():
    own = run_of([(9000, 90, 0.7)])
    assert [compare.minus_opd(own, PLAIN[0]["seed-0"], place) for place in (0, 1)] == [
        pytest.approx(-0.1)
    ] * 2


def test_differences_are_taken_seed_by_seed():
    """Both methods end .1 above plain OPD of their seed: nothing is left to the interval."""
    plain = {**PLAIN[0], **PLAIN[1]}
    runs = {"seed-0": run_of([(3000, 15, 0.9)]), "seed-1": run_of([(3000, 15, 1.0)])}
    cells = compare.row("mine", runs, plain).split()
    assert cells[:3] == ["mine", "95.0±63.5", "+10.0±0.0"]
    assert cells[3:] == ["+10.0±0.0", "+40.0±0.0", "1.00x", "0.50x", "0.50-0.75"]
    plain_cells = compare.row("opd", plain, plain).split()
    assert plain_cells == ["opd", "85.0±63.5", "3", "30", "0.50-0.75"]
    assert all(len(line) <= 100 for line in compare.TITLES)


def test_the_picture_has_a_curve_and_a_point_per_method():
    plain = {**PLAIN[0], **PLAIN[1]}
    ends = {seed: run_of(run["curve"][-1:]) for seed, run in plain.items()}
    figure = compare.draw({"opd": plain, "mine": ends}, plain)
    for panel in figure.axes:
        assert len(panel.lines) == 2 and [
            float(line.get_ydata()[-1]) for line in panel.lines
        ] == pytest.approx([85, 85])


# --------------------------------------------------------------------------------------------------
# premises.py


@pytest.fixture(scope="module")
def first_step(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("premises") / "run"
    config, run = premises.open_world(str(folder), str(made[0]), max_new_tokens=24)
    return run, *premises.sample(config, run, 1)


def test_what_comes_after_a_drift_had_a_mumble_in_its_context(first_step):
    """The first mumbled word, which sound words led to, does not."""
    run, out, after = first_step
    mumbles = set(premises.opd.LEXICON["mumble"])
    words = [run.tokenizer.convert_ids_to_tokens(ids) for ids in out["response_ids"].tolist()]
    expected = [[bool(mumbles & set(row[:t])) for t in range(len(row))] for row in words]
    assert after.tolist() == expected and after.any() and not after.all()


def test_overlap_is_shown_apart_for_rows_that_drift(first_step):
    """Here it is 1 until a row drifts, and 0 from there on."""
    _, out, after = first_step
    lines = premises.overlaps({**out, "overlap": 1 - after.float()}, after)
    assert lines[1].split()[1:] == ["1.00"] * premises.PARTS
    assert lines[0].split()[4] == "1.00" or float(lines[0].split()[4]) < 1
    assert lines[2].endswith("there 1.00 until they do, 0.00 afterwards")
