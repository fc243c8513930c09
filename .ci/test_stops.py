"""
Stop tokens merged into one, in a run: when, which calls get the merged id, what checkpoints store.
The tests of merge_stops itself are in test_opd.py. All names: pytest --collect-only -q
"""

import torch

torch.set_num_threads(1)  # tiny tensors gain next to nothing from more

import dataclasses
import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import opsd
import stops
import test_runs
from test_runs import changed_copy, opened, stopped, watch

import opd
import test_opd
from test_opd import END, V, close, command, repeatable, train

small_world = test_opd.world
world = test_runs.world
handlers = test_runs.handlers
made = test_runs.made
SECOND = 20  # a second stop token


def second_stop(model, tokenizer):
    """The model also ends with a second token."""
    model.generation_config.eos_token_id = [END, SECOND]


def ends_otherwise(model, tokenizer):
    """The model ends with another token instead of <end>."""
    model.generation_config.eos_token_id = SECOND
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(SECOND)


@pytest.fixture(scope="module")
def pair(world, tmp_path_factory):
    """Folders of a student and a teacher that end with different tokens."""
    folder = tmp_path_factory.mktemp("pair")
    student = changed_copy(world, "student", folder / "student", ends_otherwise)
    return {"student": student, "teacher": world / "teacher"}


def test_with_a_single_stop_token_nothing_is_merged(world, tmp_path):
    config, run = opened(world, tmp_path)
    assert run.sampling["stop_id"] is None and run.sampling["eos_ids"] == {END}
    assert not [line for line in opd.preflight(config, run) if line.startswith("stops: ")]


def test_the_stop_tokens_of_both_models_are_merged_into_the_students_own(world, pair, tmp_path):
    config, run = opened(world, tmp_path, **pair)
    assert run.sampling["stop_id"] == SECOND and run.sampling["eos_ids"] == {END, SECOND}
    lines = opd.preflight(config, run)
    expected = f"stops: [{END}, {SECOND}] count as one, written as {SECOND}; see --no_merge_stops"
    assert expected in lines
    assert [line for line in lines if line.startswith("student: ") and "at [20]" in line]


def test_two_stop_tokens_of_one_model_are_merged_too(world, tmp_path):
    student = changed_copy(world, "student", tmp_path / "student", second_stop)
    _, run = opened(world, tmp_path / "out", student=student)
    assert run.sampling["stop_id"] == END and run.sampling["eos_ids"] == {END, SECOND}


def test_no_merge_stops_keeps_the_stop_tokens_apart_and_warns(world, pair, tmp_path):
    config, run = opened(world, tmp_path, **pair, no_merge_stops=True)
    assert run.sampling["stop_id"] is None and run.sampling["eos_ids"] == {SECOND}
    told = "warning: other stops than the teacher's: the student may unlearn to stop"
    assert told in opd.preflight(config, run)


def test_the_stop_token_that_all_are_merged_into_may_have_id_0(world, tmp_path):
    """Token 0 is a token like any other."""

    def ends_with_0(model, tokenizer):
        model.generation_config.eos_token_id = 0
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)

    student = changed_copy(world, "student", tmp_path / "student", ends_with_0)
    config, run = opened(world, tmp_path / "out", student=student)
    assert run.sampling["stop_id"] == 0
    told = f"stops: [0, {END}] count as one, written as 0; see --no_merge_stops"
    assert told in opd.preflight(config, run)


@pytest.mark.parametrize("method", ["opd", "prefix-guided"])
def test_every_call_of_generate_and_head_logits_in_a_run_gets_the_merged_stop(
    method, world, pair, tmp_path, monkeypatch
):
    names = ("generate", "head_logits", "merge_stops")
    calls = watch(monkeypatch, *names)
    flags = {"cold_start_steps": 1, "probe_depths": 50, "extrapolate": True, "max_steps": 1}
    train(world, tmp_path, **pair, method=method, keep_ratio=0.5, **flags)
    checked = [call for call in calls["head_logits"] if call["vocab_size"] is None]  # check_model
    assert len(checked) == 2 and len(calls["head_logits"]) > 10
    for call in calls["generate"] + calls["head_logits"]:
        if call not in checked:
            assert (call["stop_id"], call["eos_ids"]) == (SECOND, {END, SECOND})


def test_in_evaluations_the_answers_of_both_models_end_with_the_merged_stop(world, pair, tmp_path):
    config, run = opened(world, tmp_path, **pair, eval_samples=40)
    for who in ("student", "teacher"):
        metrics = opd.evaluate_files(config, run, who)["eval"]
        assert metrics["stopped_fraction"] > 0
    for model in (run.student, run.teacher):
        _, answers = opd.grade(config, run, model, run.evals["eval"], num_samples=40)
        ends = [answer["response_ids"][-1] for answer in answers if not answer["truncated"]]
        assert ends and set(ends) == {SECOND}
        assert not [answer for answer in answers if END in answer["response_ids"]]


def test_the_rewards_of_answers_are_those_of_merged_stops(world, pair, tmp_path):
    config, run = opened(world, tmp_path, **pair)
    judged = {"teacher": run.teacher, "num_samples": 8}
    _, answers = opd.grade(config, run, run.student, run.evals["eval"], **judged)
    for answer in answers[:8]:
        rewards = []
        ids = torch.tensor([answer["prompt_ids"] + answer["response_ids"]])
        for model, sign in ((run.teacher, 1), (run.student, -1)):
            law = opd.merge_stops(model(ids).logits[..., :V], {END, SECOND}, SECOND).log_softmax(-1)
            begin = len(answer["prompt_ids"]) - 1
            scored = law[0, begin:-1].gather(-1, ids[0, begin + 1 :, None])
            rewards.append(sign * scored)
        close(answer["reward"], sum(rewards).mean().item(), atol=1e-4, rtol=1e-4)


def test_a_checkpoint_stops_at_all_merged_tokens_and_is_graded_as_the_run_graded_it(
    world, pair, tmp_path
):
    results, _, _ = train(world, tmp_path / "out", **pair)
    saved = test_runs.load_student(results["checkpoint"])
    assert saved.generation_config.eos_token_id == [END, SECOND]
    argv = command(world, tmp_path / "again", eval_only=True, student=results["checkpoint"])
    graded = opd.main([*argv, "--eval_samples", "1"])
    assert graded["eval"]["avg_at_n"] == results["final"]["eval"]["avg_at_n"]
    assert graded["eval"]["mean_length"] == results["final"]["eval"]["mean_length"]


def test_a_resumed_run_with_merged_stops_logs_the_same_steps_bit_for_bit(world, pair, tmp_path):
    train(world, tmp_path / "whole", **pair, max_steps=4)
    train(world, tmp_path / "cut", **pair, max_steps=2)
    train(world, tmp_path / "cut", **pair, max_steps=4, resume=True)
    whole, cut = (test_opd.read(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut"))
    steps = [line for line in repeatable(whole) if "loss" in line]
    assert steps == [line for line in repeatable(cut) if "loss" in line]


def test_a_cold_start_trains_on_the_merged_stop_and_no_other(world, pair, tmp_path, monkeypatch):
    calls = watch(monkeypatch, "train_step")["train_step"]
    flags = {"cold_start_steps": 1, "max_new_tokens": 24, "num_generations": 8, "max_steps": 1}
    train(world, tmp_path, **pair, **flags, train_file=world / "unanswered.jsonl", batch_size=1)
    ids = calls[0]["batch"]["response_ids"][calls[0]["batch"]["response_mask"]]
    assert (ids == SECOND).sum() > 0 and (ids == END).sum() == 0


def test_an_evaluation_has_the_shares_that_stopped_that_answered_and_of_the_stopped_right():
    """Three of four stopped, one of those is right; two have a box."""
    rows = [(True, False, False), (False, False, False), (False, False, True), (False, True, True)]
    names = ("correct", "truncated", "no_box")
    zeros = {"length": 0, "repetition": 0, "reward": 0}
    told = opd.summarise([{**dict(zip(names, row)), **zeros} for row in rows], 2)
    assert (told["stopped_fraction"], told["answered_fraction"]) == (0.75, 0.5)
    assert told["avg_of_stopped"] == 1 / 3 and told["avg_at_n"] == 0.25
    none = opd.summarise([{"correct": True, "truncated": True, "no_box": False, **zeros}], 1)
    assert none["stopped_fraction"] == 0 and none["avg_of_stopped"] != none["avg_of_stopped"]


def test_the_printed_line_of_a_step_shows_the_share_that_stopped(world, tmp_path, capsys):
    _, steps, _ = train(world, tmp_path, max_steps=1, eval_file=None, max_new_tokens=24)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert f"| stopped {steps[0]['stopped_fraction']:4.0%} |" in line
    assert steps[0]["stopped_fraction"] == 1 - steps[0]["truncated_fraction"]


def test_a_tail_without_the_topk_loss_is_refused(world, tmp_path, capfd):
    argv = command(world, tmp_path, loss="reverse_kl", tail=True)
    assert stopped(argv, capfd) == (
        2,
        "opd.py: --tail is of --loss topk alone, and --loss is reverse_kl",
    )


def test_head_logits_are_divided_by_the_temperature_before_stops_are_merged(world, pair, tmp_path):
    """exp(z / T) of all stops is summed, not exp(z): the distribution that was sampled."""
    _, run = opened(world, tmp_path, **pair, temperature=2.0)
    hidden = torch.randn(3, run.student.config.hidden_size)
    z = run.student.lm_head(hidden).detach()[..., :V]
    close(
        opd.head_logits(run.student, hidden, **run.sampling).detach(),
        opd.merge_stops(z / 2, {END, SECOND}, SECOND),
    )


@pytest.fixture
def tiny_world(made):
    """A tiny world with untrained models."""
    return made[0]


def test_opsd_py_prints_both_teachers_the_student_and_the_trained_student(
    tiny_world, tmp_path, capsys
):
    flags = {"batch_size": 2, "max_new_tokens": 8, "eval_max_new_tokens": 4, "eval_samples": 1}
    some = (tiny_world / "eval.jsonl").read_text().splitlines(keepends=True)[:20]
    (tmp_path / "eval.jsonl").write_text("".join(some))
    flags["eval_file"] = [str(tmp_path / "eval.jsonl")]
    opsd.main(str(tmp_path / "out"), str(tiny_world), "opd", **flags)
    table = capsys.readouterr().out.splitlines()[-4:]
    told = [line.split()[0] for line in table]
    assert told == ["teacher", "prompted_teacher", "student", "opd"]


def test_stops_py_prints_both_runs_and_its_student_ends_with_pad(
    tiny_world, tmp_path, monkeypatch, capsys
):
    """Its student ends with <pad> as likely as before with <end>."""
    folder = tiny_world
    sizes = "--max_steps 1 --batch_size 2 --max_new_tokens 8 --eval_max_new_tokens 4"
    monkeypatch.setattr(opd, "TINY", dataclasses.replace(opd.TINY, eval_samples=1))
    stops.main(str(tmp_path / "out"), str(folder), *sizes.split())
    table = capsys.readouterr().out.splitlines()[-5:]
    assert [line.split()[:2] for line in table[1:]] == [
        ["merged", "0"],
        ["merged", "1"],
        ["apart", "0"],
        ["apart", "1"],
    ]
    own = test_runs.load_student(tmp_path / "out" / "apart" / "world" / "student")
    ids = torch.tensor([[2, 20, 30]])
    before = test_runs.load_student(folder / "student")(ids).logits
    close(own(ids).logits[..., [0, 1]], before[..., [1, 0]])
    assert own.generation_config.eos_token_id == 0
