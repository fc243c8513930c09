"""
The recipes: the tables that .ci/compare.py and .ci/real.py make of runs, and that .ci/premises.py
measures what it says.
"""

import torch

torch.set_num_threads(1)

import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import compare
import premises
import real
import teacher_prompts
import test_runs

made = test_runs.made

# --------------------------------------------------------------------------------------------------
# compare.py


def run_of(curve, overlap=(0.5, 0.75)):
    """What opd.read_run returns for a run. curve: (tokens, seconds, accuracy) per evaluation"""
    tokens, seconds, after = curve[-1]
    first, last = ({"overlap_ratio": value} for value in overlap)
    last |= {"generated_tokens": tokens, "seconds": seconds}
    return {"curve": curve, "after": after, "first": first, "last": last}


PLAIN = [
    {"seed-0": run_of([(0, 0, 0.2), (1000, 10, 0.4), (3000, 30, 0.8)])},
    {"seed-1": run_of([(0, 0, 0.1), (1000, 10, 0.5), (3000, 30, 0.9)])},
]


def test_the_interval_of_the_mean_is_students_t():
    """Of .1 and .3: the mean is .2, half the interval 12.71 standard errors of .1."""
    assert compare.interval([0.1, 0.3]) == "20.0±127.1"
    assert compare.interval([0.1, 0.2, 0.3, 0.4, 0.5], "+") == "+30.0±19.7"
    assert compare.interval([0.25]) == "25.0"


def test_a_method_is_compared_with_plain_opd_at_as_many_tokens_and_at_as_many_seconds():
    """From .4 to .8 plain OPD was half way after 2,000 tokens, a quarter after 15 seconds."""
    own = run_of([(2000, 15, 0.7)])
    for place, beside in ((0, 0.6), (1, 0.5)):
        minus, measured = compare.minus_opd(own, PLAIN[0]["seed-0"], place)
        assert minus == pytest.approx(0.7 - beside) and measured


@pytest.mark.parametrize("spent, expected", [((9000, 90), -0.1), ((500, 5), 0.4)])
def test_comparisons_outside_of_plain_opds_curve_are_marked(spent, expected):
    """After plain OPD's end that end counts; before its first evaluation a line from its start."""
    own = run_of([(*spent, 0.7)])
    for place in (0, 1):
        minus, measured = compare.minus_opd(own, PLAIN[0]["seed-0"], place)
        assert minus == pytest.approx(expected) and not measured
    table = compare.row("mine", {"seed-0": own}, PLAIN[0])
    assert table.count("*") == 2 and len(table) <= 100


def test_differences_are_taken_seed_by_seed():
    """Both seeds end .1 above plain OPD of the same seed: the interval is 0."""
    plain = {**PLAIN[0], **PLAIN[1]}
    runs = {"seed-0": run_of([(3000, 15, 0.9)]), "seed-1": run_of([(3000, 15, 1.0)])}
    cells = compare.row("mine", runs, plain).split()
    assert cells[:3] == ["mine", "95.0±63.5", "+10.0±0.0"]
    assert cells[3:] == ["+10.0±0.0", "+40.0±0.0", "1.00x", "0.50x", "0.50-0.75"]
    plain_cells = compare.row("opd", plain, plain).split()
    assert plain_cells == ["opd", "85.0±63.5", "3", "30", "0.50-0.75"]
    assert all(len(line) <= 100 for line in compare.TITLES)


def test_the_table_has_only_the_seeds_that_all_methods_have_finished(tmp_path, monkeypatch, capsys):
    """Plain OPD first, with its costs. Here seed-1 of the other method is not done."""
    runs = {"a": PLAIN[0] | PLAIN[1], "opd": PLAIN[0] | PLAIN[1]}
    for name in ("a/seed-0", "opd/seed-0", "opd/seed-1"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "done").touch()

    def read_run(root, name):
        group, seed = name.split("/")
        return {**runs[group][seed], "before": 0.1, "teacher": 0.9}

    monkeypatch.setattr(compare.opd, "read_run", read_run)
    compare.main(str(tmp_path), tmp_path / "picture.png")
    table = capsys.readouterr().out.splitlines()[3:]
    assert table[0].split() == ["opd", "80.0", "3", "30", "0.50-0.75"]
    assert table[1].split()[:5] == ["a", "80.0", "+0.0", "+0.0", "+0.0"]
    assert "opd, seed by seed: 80" in table
    assert "over 1 seeds" in table[2] and (tmp_path / "picture.png").exists()
    assert all(len(line) <= 100 for line in table)


def test_the_picture_has_plain_opds_curve_and_a_point_per_other_method():
    plain = {**PLAIN[0], **PLAIN[1]}
    ends = {seed: run_of(run["curve"][-1:]) for seed, run in plain.items()}
    figure = compare.draw({"opd": plain, "mine": ends}, plain)
    for panel in figure.axes:
        assert len(panel.lines) == 2 and [
            float(line.get_ydata()[-1]) for line in panel.lines
        ] == pytest.approx([85, 85])


# --------------------------------------------------------------------------------------------------
# real.sh, real.py


def test_real_sh_has_the_students_prompt_and_the_last_teacher_prompt_of_teacher_prompts_py():
    with open(os.path.join(os.path.dirname(real.__file__), "real.sh"), encoding="utf-8") as file:
        script = file.read()
    assert f"asked='{teacher_prompts.BOXED}'\n" in script
    assert f"informed='{list(teacher_prompts.TEMPLATES.values())[-1]}'\n" in script


def test_the_table_of_a_real_model_by_hand():
    """A student at 1% is trained for two steps of 2 + 1 + 3 seconds; overlap rises everywhere."""
    shares = {"se": 0.01, "answered_fraction": 0.5, "stopped_fraction": 0.25}
    step = {"loss": 1.0, "time_rollout": 2, "time_teacher": 1, "time_update": 3}
    records = [
        {"model": "student", "step": 0, "eval": {"a": {**shares, "avg_at_n": 0.01}}},
        {**step, "overlap_by_position": 4 * [0.5] + 4 * [0.25], "generated_tokens": 600},
        {**step, "overlap_by_position": 4 * [0.75] + 4 * [0.5], "generated_tokens": 1200},
        {"model": "student", "step": 2, "eval": {"a": {**shares, "avg_at_n": 0.125}}},
    ]
    assert [line.split() for line in real.of_run("opd", records)] == [
        "student 1.0±1.0 50.0 25.0 0.50 0.50 0.25 0.25".split(),
        "opd 12.5±1.0 50.0 25.0 0.75 0.75 0.50 0.50 1,200 12".split(),
    ]


# --------------------------------------------------------------------------------------------------
# premises.py


@pytest.fixture(scope="module")
def first_step(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("premises") / "run"
    config, run = premises.open_world(str(folder), str(made[0]), max_new_tokens=24)
    return run, *premises.sample(config, run, 1)


def test_tokens_after_a_drift_are_those_with_a_mumbled_word_before_them(first_step):
    """The first mumbled word itself does not count as after the drift."""
    run, out, after = first_step
    mumbles = set(premises.opd.LEXICON["mumble"])
    words = [run.tokenizer.convert_ids_to_tokens(ids) for ids in out["response_ids"].tolist()]
    expected = [[bool(mumbles & set(row[:t])) for t in range(len(row))] for row in words]
    assert after.tolist() == expected and after.any() and not after.all()


def test_overlap_is_printed_separately_for_rows_that_drift_and_for_others(first_step):
    """Here the overlap is 1 until a row drifts, and 0 from there on."""
    _, out, after = first_step
    overlap = 1 - after.float()
    mask = out["response_mask"]
    drifted = (after & mask).any(-1)[:, None]
    first, second, told = premises.overlaps({**out, "overlap": overlap}, after)
    expected = premises.opd.overlap_by_position(overlap, mask & drifted, premises.PARTS)
    assert first.split()[3:] == [f"{value:.2f}" for value in expected] and min(expected) < 0.5
    assert second.split()[1:] == ["1.00"] * premises.PARTS
    assert told.endswith("there 1.00 until they do, 0.00 afterwards")


def test_an_openings_auroc_leaves_out_rows_that_drift_while_they_are_scored(made, tmp_path):
    """Scores .1 to .4; the last row mumbles at the last scored token. Of the others the best drifts
    later, so that the two sound ones score lower; no row is right."""
    config, run = premises.open_world(str(tmp_path), str(made[0]), batch_size=1)
    W = config.probe_window
    after = torch.zeros(4, W + 9, dtype=torch.bool)
    after[2, W + 5 :] = True
    after[3, W:] = True
    out = {
        "overlap": torch.tensor([[0.1], [0.2], [0.3], [0.4]]).expand(4, W + 9),
        "response_mask": torch.ones(4, W + 9, dtype=torch.bool),
        "response_ids": torch.zeros(4, W + 9, dtype=torch.long),
    }
    told = premises.openings(config, run, out, after)
    assert told == "AUROC over 3 rows that are sound so far: right nan, sound to its end 0.00"


def test_bad_events_are_counted_in_sound_rows_and_on_both_sides_of_a_drift():
    """Four tokens a row, threshold .5, .5 lost at a bad event: two bad ones stop a row."""
    config = premises.opd.Config(drift_threshold=0.5, w_drop=0.5)
    overlap = torch.tensor([[0.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    after = torch.tensor([[False] * 4, [False, False, True, True]])
    out = {"overlap": overlap, "response_mask": torch.ones(2, 4, dtype=torch.bool)}
    assert premises.bad_events(config, out, after) == [
        "of the tokens: 25% in rows that do not drift, 50% before a drift, 100% after it",
        "reliability reaches 0 in 0% of the rows that do not drift, and in 100% of the others",
    ]


@pytest.mark.parametrize("side", ["before", "after", "elsewhere"])
def test_each_update_trains_on_budget_tokens_all_of_its_side(side, made, tmp_path, monkeypatch):
    learned = []

    def backward(student, out, **settings):
        learned.append(out)
        return {}

    monkeypatch.setattr(premises.opd, "backward", backward)
    monkeypatch.setattr(premises.opd, "optimizer_step", lambda *_: 0.0)
    monkeypatch.setattr(premises.opd, "grade", lambda *_, **settings: ({"avg_at_n": 0.25}, []))
    monkeypatch.setattr(
        premises.opd, "TINY", premises.opd.replace(premises.opd.TINY, max_new_tokens=16)
    )
    monkeypatch.setattr(premises, "STEPS", 2)
    monkeypatch.setattr(premises, "BUDGET", 20)
    told = premises.learn(str(tmp_path), str(made[0]), side, 0)
    assert told == 0.25 and len(learned) == 2
    mumbles = set(premises.opd.LEXICON["mumble"])
    tokenizer = premises.opd.AutoTokenizer.from_pretrained(made[0] / "student")
    for out in learned:
        assert out["loss_mask"].sum() == 20 and not (out["loss_mask"] & ~out["response_mask"]).any()
        for ids, mask, chosen in zip(out["response_ids"], out["response_mask"], out["loss_mask"]):
            words = tokenizer.convert_ids_to_tokens(ids[mask].tolist())
            drifts = bool(mumbles & set(words[:-1]))
            for place in chosen.nonzero().flatten().tolist():
                behind = bool(mumbles & set(words[:place]))
                assert side == ("elsewhere" if not drifts else "after" if behind else "before")
