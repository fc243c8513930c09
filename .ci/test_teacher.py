"""
Tests of --teacher_prompt_template of opd.py: the teacher gets another prompt, with a solution in
it, before the responses of the student; without --teacher it is the initial student.
"""

import torch

torch.set_num_threads(1)  # tiny tensors gain next to nothing from more

import json
import os
import sys
import time
import warnings

import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from test_runs import changed_copy, few_positions, load_student, opened, stopped, watch
from test_runs import flags_read_once as flags_read_once  # this and the next two: fixtures
from test_runs import handlers as handlers
from test_runs import made as made

import opd
import test_opd
from test_opd import (
    FAMILIES,
    LENGTHS,
    LOSS_OF,
    SAMPLING,
    STUDENT,
    TEACHER,
    WORDS,
    V,
    assert_same,
    close,
    command,
    forward_shapes,
    gradients_of,
    make_batch,
    outcome,
    prompts,
    roll,
    rows_of,
    says_a,
    tiny_qwen3,
    train,
    update,
    without_padding,
    write,
)

# --------------------------------------------------------------------------------------------------
# Helpers, all of them

small_world = test_opd.world
updates = test_opd.updates
runs = test_opd.runs
TOKENIZER = opd.tiny_tokenizer(WORDS)
TEMPLATE = "{problem} {solution}"
FOR_TEACHER = without_padding(*prompts(7, 1, 4, 9))  # the student's have 2, 5, 3 and 4 tokens


@pytest.fixture(scope="session")
def world(small_world):
    """The small world of test_opd.py, its problems with solutions of different lengths, a model of
    64 positions, and one whose tokenizer has one word more.
    """
    test_opd.save_model(small_world / "table", test_opd.tiny_gpt2(0))
    test_opd.save_model(small_world / "hinted", tiny_qwen3(1), [*WORDS, "hint"])
    problems = test_opd.read(small_world / "train.jsonl")
    for index, problem in enumerate(problems):
        problem["solution"] = "a b c d e f g h"[: 1 + 2 * ((index * 5) % 8)]
    write(small_world / "solved.jsonl", *problems)
    write(small_world / "graded.jsonl", *problems[:3])
    for problem in problems[::4]:  # three of nine, and one of these three
        del problem["solution"]
    write(small_world / "some.jsonl", *problems)
    write(small_world / "some_graded.jsonl", *problems[:3])
    return small_world


def informed(**changes):
    """The flags of a run whose teacher has the solution in its prompt."""
    files = {"train_file": "{world}/solved.jsonl", "eval_file": "{world}/graded.jsonl"}
    return {**files, "teacher_prompt_template": TEMPLATE, **changes}


def as_read(out):
    """rows_of for the teacher: each row with the teacher's prompt, without any padding."""
    own = {"prompt_ids": out["teacher_prompt_ids"], "prompt_mask": out["teacher_prompt_mask"]}
    return rows_of({**out, **own})


def assert_judged(teacher, out):
    """The stored states are those of one plain forward per row of [its prompt, the response]."""
    for row, (ids, prompt) in enumerate(as_read(out)):
        states = teacher.base_model(ids).last_hidden_state[0, prompt - 1 : -1]
        close(out["teacher_hidden"][row], states, rtol=1e-4, atol=1e-5)


def asked(run, problem, key):
    return run.tokenizer.convert_ids_to_tokens(problem[key])


def of(evaluations, who):
    """The result of that model's first evaluation, on the only file."""
    (result,) = next(line["eval"] for line in evaluations if line["model"] == who).values()
    return result


# --------------------------------------------------------------------------------------------------
# The rollout


def halves(length, overlap, mask, ended):
    """At the first border only every second row goes on."""
    return (torch.arange(len(ended)) % 2 == 0) | (length > 4)


@FAMILIES
@pytest.mark.parametrize("goes_on", [None, halves])
def test_scores_are_those_of_one_plain_forward_of_the_teachers_prompt_and_the_response(
    family, goes_on
):
    teacher = family(2)
    settings = {"for_teacher": FOR_TEACHER, "eos_ids": test_opd.ENDS, "goes_on": goes_on}
    out = roll(STUDENT, teacher, **settings)
    assert without_padding(out["teacher_prompt_ids"], out["teacher_prompt_mask"]) == FOR_TEACHER
    lengths = out["response_mask"].sum(-1).tolist()
    assert len(set(lengths)) > 1  # rows leave both caches at different borders
    assert_judged(teacher, out)
    for row, (ids, prompt) in enumerate(as_read(out)):
        own, own_prompt = rows_of(out)[row]
        p = STUDENT(own).logits[:, own_prompt - 1 : -1]
        q = teacher(ids).logits[:, prompt - 1 : -1]
        close(out["overlap"][row, : lengths[row]], opd.topk_overlap(p, q, 4)[0])


def test_the_teachers_prompt_changes_nothing_that_is_sampled():
    plain, out = (roll(STUDENT, TEACHER, for_teacher=own) for own in (None, FOR_TEACHER))
    for name in ("prompt_ids", "prompt_mask", "response_ids", "response_mask", "log_probs"):
        assert torch.equal(plain[name].nan_to_num(1), out[name].nan_to_num(1))
    assert not torch.equal(plain["overlap"], out["overlap"])


def test_with_the_students_prompts_for_the_teacher_a_rollout_is_bit_for_bit_the_plain_one():
    same = without_padding(*prompts(*LENGTHS))
    plain, out = (roll(STUDENT, TEACHER, for_teacher=own) for own in (None, same))
    for name in ("response_ids", "overlap", "teacher_prompt_ids"):
        assert torch.equal(plain[name], out[name])
    assert all(map(torch.equal, plain["teacher_hidden"], out["teacher_hidden"]))


def test_the_teacher_computes_equal_prompts_once_and_no_sampled_token_twice():
    teacher = tiny_qwen3(2)
    shapes, stop = forward_shapes(teacher)
    two = [FOR_TEACHER[0], FOR_TEACHER[3]]
    roll(STUDENT, teacher, eos_ids={V}, for_teacher=[two[0], two[0], two[1], two[1]])
    stop()
    # Prompts of 7 and 9 tokens without the last, then passes of 4: it, and all but the last sampled
    assert shapes == [(2, 8), (4, 4), (4, 4), (4, 4)]


def test_the_update_is_that_of_full_logits_after_each_models_own_prompt():
    student = test_opd.tiny_llama(1)
    batch = make_batch(student, TEACHER, for_teacher=FOR_TEACHER)
    metrics, grads = update(student, TEACHER, batch)
    student.zero_grad()
    total = 0.0
    for row, (own, read) in enumerate(zip(rows_of(batch), as_read(batch))):
        p = student(own[0]).logits[:, own[1] - 1 : -1]
        q = TEACHER(read[0]).logits[:, read[1] - 1 : -1].detach()
        weight = batch["token_weight"][row, : p.shape[1]]
        total = total + (opd.reverse_kl(p, q) * weight).sum()
    (total / batch["loss_mask"].sum()).backward()
    assert_same(grads, gradients_of(student))
    assert metrics["loss"] == pytest.approx(total.item() / batch["loss_mask"].sum().item())


def test_a_rollout_in_groups_keeps_the_teachers_prompt_of_each_row():
    own = without_padding(*prompts(*LENGTHS))
    settings = {**SAMPLING, "temperature": 0, "overlap_k": 4, "for_teacher": FOR_TEACHER}
    out = opd.rollout_in_groups(STUDENT, TEACHER, own, opd.Plan(12, 4), 3, **settings)
    assert out["teacher_prompt_mask"][:, -1].all()  # left-padded, as all prompts
    assert without_padding(out["teacher_prompt_ids"], out["teacher_prompt_mask"]) == FOR_TEACHER
    assert_judged(TEACHER, out)


# --------------------------------------------------------------------------------------------------
# Templates and solutions


def test_a_template_is_filled_in_one_pass_and_all_other_braces_stay_text():
    problem = {"problem": "{answer}?", "answer": "5", "solution": "{problem} \\boxed{5}"}
    template = "{problem} {hint} \\boxed{} {solution} = {answer}, \\boxed{answer}"
    filled = opd.fill_template(template, problem)
    assert filled == "{answer}? {hint} \\boxed{} {problem} \\boxed{5} = 5, \\boxed{answer}"


def test_a_field_is_filled_whatever_stands_directly_before_it():
    """A letter, a field, a brace, a backslash and an n; only a LaTeX command keeps its braces."""
    problem = {"problem": "1+1", "answer": "2", "solution": None}
    filled = opd.fill_template(
        "题目{problem}{answer}\\n{answer}\\nA{answer}\\boxed{{answer}}", problem
    )
    assert filled == "题目1+12\\n2\\nA2\\boxed{2}"
    assert opd.fill_template("{problem} \\text{solution}", problem) == "1+1 \\text{solution}"


@pytest.mark.parametrize("lacks", ["answer", "solution"])
def test_a_template_that_names_a_missing_field_is_not_filled(lacks):
    problem = {"problem": "a", "answer": "5", "solution": "b", lacks: None}
    assert opd.fill_template("{problem}", problem) == "a"
    assert opd.fill_template(f"{{problem}} {{{lacks}}}", problem) is None


ASKED = {"role": "user", "content": "2+3?"}
SOLUTIONS = [
    ({"problem": "2+3?", "solution": " so \\boxed{5} "}, "so \\boxed{5}"),
    ({"problem": "2+3?", "answer": "5", "solution": "long"}, "long"),
    ({"question": "2+3?", "correct": "A", "rationale": "count"}, "count"),
    ({"problem": "2+3?", "answer": "5", "reasoning": "count on"}, "count on"),
    ({"problem": "2+3?", "solution": None, "rationale": "", "reasoning": "count"}, "count"),
    ({"question": "2+3?", "answer": "2+3 is <<2+3=5>>5.\nSo 5.\n#### 5"}, "2+3 is 5.\nSo 5."),
    ({"question": "2+3?", "answer": "2 and 3 <<2+3\n=5>>.\n#### 5"}, "2 and 3 <<2+3\n=5>>."),
    ({"problem": "2+3?", "solution": "#### Add\n2+3\n#### So\n5"}, "#### Add\n2+3\n#### So\n5"),
    (
        {"messages": [ASKED, {"role": "assistant", "content": "it is \\boxed{5}"}]},
        "it is \\boxed{5}",
    ),
    ({"problem": "2+3?", "solution": ["2+3", 4, "is 5"], "answer": 5}, "2+3\nis 5"),
    ({"problem": "2+3?", "solution": {"text": "5"}, "answer": 5}, None),
    ({"problem": "2+3?", "answer": "5"}, None),
    ({"problem": "2+3?", "answer": "#### 5"}, None),
]


@pytest.mark.filterwarnings("ignore:.*no answer")
@pytest.mark.parametrize("record, solution", SOLUTIONS)
def test_load_problems_keeps_the_worked_solution_without_gsm8ks_marks(tmp_path, record, solution):
    (problem,) = opd.load_problems(write(tmp_path / "a.jsonl", record))
    assert problem["solution"] == solution


@pytest.mark.filterwarnings("ignore:.*no answer")
@pytest.mark.parametrize("name", ["rationale", "reasoning"])
def test_a_rationale_or_reasoning_is_not_taken_for_the_answer(name, tmp_path):
    (problem,) = opd.load_problems(write(tmp_path / "a.jsonl", {"problem": "2+3?", name: "count"}))
    assert problem["answer"] is None


@pytest.mark.filterwarnings("ignore:.*duplicates")
@pytest.mark.parametrize("solutions", [("long", None), (None, "long"), ("long", "short")])
def test_of_duplicates_the_first_solution_found_is_kept(solutions, tmp_path):
    records = [{"problem": "2+3?", "answer": "5", "solution": text} for text in solutions]
    (problem,) = opd.load_problems(write(tmp_path / "a.jsonl", *records))
    assert problem["solution"] == "long"


@pytest.fixture(scope="module")
def of_world(made):
    """The training and evaluation problems of the tiny world."""
    train_file, eval_file = (f"{made[0]}/{name}.jsonl" for name in ("train", "eval"))
    return opd.load_problems(train_file) + opd.load_problems(eval_file)


def test_the_solutions_of_the_tiny_world_are_graded_right_and_use_only_its_words(of_world):
    words = {*sum(opd.LEXICON.values(), [])} - {*opd.LEXICON["special"]}
    for problem in of_world:
        assert opd.is_correct(problem["solution"], problem["answer"])
        assert set(problem["solution"].split()) <= words


def test_problem_and_solution_of_the_tiny_world_fit_into_max_prompt_length(of_world):
    tokenizer = opd.tiny_tokenizer(sum(opd.LEXICON.values(), []))
    lengths = []
    for problem in of_world:
        text = opd.fill_template(TEMPLATE, problem)
        lengths.append(len(opd.encode_prompt(tokenizer, text, "{problem}")))
    assert 64 < max(lengths) <= opd.TINY.max_prompt_length


# --------------------------------------------------------------------------------------------------
# Set-up


def test_each_model_gets_prompts_of_its_own_template(world, tmp_path):
    flags = informed(
        prompt_template="h {problem}", teacher_prompt_template="{solution} {problem} g"
    )
    _, run = opened(world, tmp_path, **flags)
    for problem in sum([*run.pools, *run.evals.values()], []):
        text, told = problem["problem"].split(), problem["solution"].split()
        assert asked(run, problem, "prompt_ids") == ["<user>", "h", *text, "<solve>"]
        own = ["<user>", *told, *text, "g", "<solve>"]
        assert asked(run, problem, "teacher_prompt_ids") == own


def test_training_problems_without_a_solution_are_left_out_with_a_count(world, tmp_path):
    flags = informed(train_file="{world}/some.jsonl", eval_file="{world}/some_graded.jsonl")
    with pytest.warns(UserWarning, match="some.jsonl: 3 training problems lack what") as notes:
        _, run = opened(world, tmp_path, **flags)
    assert len([note for note in notes if "lack what" in str(note.message)]) == 1
    assert len(run.pools[0]) == 6 and all(problem["solution"] for problem in run.pools[0])
    assert len(run.evals["some_graded"]) == 3


def test_if_every_problem_has_a_solution_there_is_no_note(world, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _, run = opened(world, tmp_path, **informed(batch_size=9))
    assert len(run.pools[0]) == 9


def test_a_problem_whose_teachers_prompt_is_too_long_is_left_out(world, tmp_path):
    with pytest.warns(UserWarning, match="solved.jsonl: ") as notes:
        _, run = opened(world, tmp_path, **informed(max_prompt_length=9))
    lengths = [len(opd.teacher_prompt(problem)) for problem in run.pools[0]]
    assert max(lengths) == 9 and 0 < len(lengths) < 9
    left_out = f"{9 - len(lengths)} training problems have a prompt longer than"
    told = f"{left_out} --max_prompt_length 9, and are left out"
    assert told in str(notes[0].message)


HINTED = {"student": "{world}/hinted", "teacher": None, "teacher_prompt_template": "{problem} hint"}
MISTAKES = {
    "a token that the models have not": (
        informed(**HINTED),
        "have the token 'hint' (24), and the models know only the first 24",
    ),
    "a template without the problem": (
        informed(teacher_prompt_template="{solution}"),
        "--teacher_prompt_template must say {problem} where the problem goes",
    ),
    "no student": (
        informed(student=None, teacher=None, train_file=None, eval_file=None),
        "give --student, --teacher (or --teacher_prompt_template) and --train_file",
    ),
    "no teacher and no template": (
        informed(teacher=None, teacher_prompt_template=None),
        "give --student, --teacher (or --teacher_prompt_template) and --train_file",
    ),
    "no file to train on": (informed(teacher=None, train_file=None), "and --train_file"),
    "no problem with a solution": (
        informed(train_file="{world}/train.jsonl"),
        "train.jsonl: 9 training problems lack what --teacher_prompt_template names, and none",
    ),
    "more than a table has positions": (
        informed(teacher="{world}/table", max_new_tokens=50),
        "a prompt of 15 and a response of 50 tokens (--max_new_tokens) are more than the 64 "
        "positions of the teacher",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_about_the_template_ends_in_one_line(mistake, world, tmp_path, capfd):
    changes, says = MISTAKES[mistake]
    status, line = stopped(command(world, tmp_path / "out", **changes), capfd)
    assert status == 2 and says in line and os.listdir(tmp_path) == []


def test_the_positions_of_each_model_are_checked_with_its_own_prompts(world, tmp_path):
    """In training the teacher's longest prompt has 15 tokens, the student's 7."""
    for who, longest in (("student", 7), ("teacher", 15)):
        for number in (longest + 12, longest + 11):
            path = changed_copy(world, who, tmp_path / f"{who}{number}", few_positions(number))
            _, run = opened(
                world, tmp_path / "out", **informed(eval_max_new_tokens=1, **{who: path})
            )
            expected = []
            if number == longest + 11:
                sizes = f"a prompt of {longest} and a response of 12 tokens (--max_new_tokens)"
                expected = [f"{sizes} are more than the {number} positions of the {who}"]
            assert opd.check_lengths(run) == expected


def test_the_plan_counts_the_columns_of_the_teachers_own_prompts(world, tmp_path):
    config, run = opened(world, tmp_path, **informed(eval_max_new_tokens=20))
    question = max(len(opd.teacher_prompt(problem)) for problem in run.evals["graded"])
    columns = {
        flag: sizes["columns"] for flag, (_, _, sizes, _) in opd.plan_phases(config, run).items()
    }
    assert columns == {
        "rollout_batch_size": 15 + 12,
        "micro_batch_size": 7 + 12,
        "eval_batch_size": run.most["question"] + 20,
        "teacher_eval_batch_size": question + 20,
    }
    assert question > run.most["question"]


def test_without_teacher_flag_the_teacher_is_a_frozen_copy_of_the_initial_student(
    world, tmp_path, runs, capsys
):
    train(world, tmp_path, **informed(teacher=None), max_steps=2)
    first = load_student(world / "student").state_dict()
    assert_same(runs[0].teacher.state_dict(), first, tolerance=0)
    moved = runs[0].student.state_dict()
    assert any(not torch.equal(moved[name], first[name]) for name in first)
    size = sum(value.numel() * 4 for value in runs[0].teacher.parameters())
    told = "the teacher is a frozen copy of the initial student: one more copy of its weights"
    assert f"{told}, {opd.tqdm.format_sizeof(size)}B" in capsys.readouterr().out


def test_self_distillation_resumes_bit_for_bit_with_the_initial_weights_as_teacher(world, tmp_path):
    flags = informed(teacher=None, max_steps=4)
    train(world, tmp_path / "whole", **flags)
    train(world, tmp_path / "part", **{**flags, "max_steps": 2})
    train(world, tmp_path / "part", **flags, resume=True)
    whole, part = (outcome(tmp_path / name) for name in ("whole", "part"))
    # A run that ends after step 2 is graded there, too
    graded = {"step": 2, "model": "student"}.items()
    for kind in (0, 1):
        assert whole[kind] == [line for line in part[kind] if not graded <= line.items()]
    assert whole[2:] == part[2:]


# --------------------------------------------------------------------------------------------------
# Whole runs


SEEN = {"max_steps": 4, "eval_every": 2, "probe_depths": [0, 50], "cold_start_steps": 1}
SEEN |= {"eval_samples": 2, "rollout_batch_size": 3, "num_generations": 2}


@pytest.mark.parametrize("method", ["prefix-guided", "prune"])
def test_with_both_templates_equal_a_run_is_bit_for_bit_the_run_without(
    method, world, tmp_path, monkeypatch
):
    """With rewards, probes and a cold start. The prompted teacher's evaluation comes on top."""
    monkeypatch.setattr(opd, "is_correct", says_a)
    flags = {**SEEN, "method": method, "drift_threshold": 0.5, "w_drop": 0.1}
    for name, template in (("without", None), ("with", "{problem}")):
        train(world, tmp_path / name, **informed(**flags, teacher_prompt_template=template))
    without, with_it = (outcome(tmp_path / name) for name in ("without", "with"))
    again = [line for line in with_it[0] if line.get("model") == "prompted_teacher"]
    for kind in (0, 1):  # metrics, samples
        others = [line for line in with_it[kind] if line.get("model") != "prompted_teacher"]
        assert json.dumps(without[kind]) == json.dumps(others)
    assert without[2:] == with_it[2:]  # the last checkpoint's name, and its weights
    assert of(again, "prompted_teacher") == of(without[0], "teacher")
    assert of(without[0], "student")["mean_reward"] < 0


@pytest.mark.parametrize("method", LOSS_OF)
def test_every_method_scores_after_the_teachers_prompt_and_trains_after_the_students(
    method, world, tmp_path, updates
):
    flags = {"method": method, "loss": LOSS_OF[method], "rollout_batch_size": 3, "max_steps": 2}
    _, steps, _ = train(world, tmp_path, **informed(**flags, eval_file=None))
    teacher = load_student(world / "teacher")
    known = {}
    for problem in opd.load_problems(str(world / "solved.jsonl")):
        known[problem["problem"]] = problem["solution"]
    for line, (_, batch, _) in zip(steps, updates, strict=True):
        assert_judged(teacher, batch)
        for own, read in zip(rows_of(batch), as_read(batch)):
            _, *text, _ = TOKENIZER.convert_ids_to_tokens(own[0][0, : own[1]])
            _, *told, _ = TOKENIZER.convert_ids_to_tokens(read[0][0, : read[1]])
            assert told == [*text, *known[" ".join(text)].split()]
        assert line["teacher_prompt_length"] > line["prompt_length"]


def test_a_cold_start_samples_after_the_teachers_prompt_and_trains_after_the_students(
    world, tmp_path, updates, monkeypatch
):
    monkeypatch.setattr(opd, "is_correct", lambda text, gold: True)
    calls = watch(monkeypatch, "rollout")["rollout"]
    flags = {"cold_start_steps": 1, "max_steps": 1, "eval_file": None}
    _, (step,), _ = train(world, tmp_path, **informed(**flags))
    solving = calls[1]  # after that of the preflight
    _, batch, _ = updates[0]
    assert solving["teacher"] is None
    own = without_padding(batch["prompt_ids"], batch["prompt_mask"])
    for prompt, read in zip(own, solving["prompts"], strict=True):
        assert len(read) > len(prompt) and read[: len(prompt) - 1] == prompt[:-1]

    # FLOPs: the teacher's prompt counts for the teacher, the student's for training
    student, teacher = (load_student(world / name) for name in ("student", "teacher"))
    read = torch.tensor([len(prompt) for prompt in solving["prompts"]])
    length, learned = (batch[name].sum(-1) for name in ("response_mask", "loss_mask"))
    context = (batch["prompt_mask"].sum(-1) + learned)[learned > 0]
    cold = opd.forward_flops(teacher, read + length) + 3 * opd.forward_flops(student, context)
    warm = updates[1][1]
    length = warm["response_mask"].sum(-1)
    written, judged = (warm[f"{who}prompt_mask"].sum(-1) + length for who in ("", "teacher_"))
    cost = 4 * opd.forward_flops(student, written) + opd.forward_flops(teacher, judged)
    assert step["flops"] == pytest.approx(cold + cost, rel=1e-9)


def test_a_probe_continues_the_beginning_of_the_students_answer_after_the_teachers_prompt(
    world, tmp_path, monkeypatch
):
    calls = watch(monkeypatch, "evaluate", "rollout")
    train(world, tmp_path, **informed(max_steps=1, probe_depths=[50]))
    probes = [call for call in calls["evaluate"] if "begun" in call["problems"][0]]
    for problem in probes[0]["problems"]:
        assert problem["prompt_ids"] == problem["teacher_prompt_ids"]
        assert problem["begun"] == problem["response_ids"][: len(problem["begun"])]
        whole = problem["teacher_prompt_ids"] + problem["begun"]
        assert any(whole in call["prompts"] for call in calls["rollout"])


def mean_log_prob(model, prompt, ids, start):
    """The mean log-prob of ids[start:] after the prompt, by one plain forward."""
    ids = torch.tensor([prompt + ids])
    start += len(prompt)
    log_probs = model(ids).logits[0, start - 1 : -1, :V].log_softmax(-1)
    return log_probs.gather(-1, ids[0, start:, None]).mean().item()


def test_the_reward_of_an_answer_is_scored_after_the_teachers_prompt():
    """Without one, after the student's prompt. A given beginning of an answer does not count."""
    problems = []
    for index, own in enumerate(FOR_TEACHER):
        problems.append({"prompt_ids": [2, 7 + index, 3], "answer": "1", "teacher_prompt_ids": own})
    del problems[1]["teacher_prompt_ids"]
    problems[2]["begun"] = [9, 8, 7]
    _, answers = test_opd.evaluate(*problems, teacher=TEACHER, num_samples=1, rows_per_batch=3)
    for problem, answer in zip(problems, answers, strict=True):
        begun, ids = len(problem.get("begun", [])), answer["response_ids"]
        log_q = mean_log_prob(TEACHER, opd.teacher_prompt(problem), ids, begun)
        log_p = mean_log_prob(STUDENT, problem["prompt_ids"], ids, begun)
        assert answer["reward"] == pytest.approx(log_q - log_p, abs=1e-5)


def test_three_evaluations_precede_step_1_and_no_gap_is_printed_if_their_problems_differ(
    world, tmp_path, monkeypatch, capsys
):
    """Two of the three problems have a solution: the prompted teacher is evaluated on those."""
    monkeypatch.setattr(opd, "is_correct", says_a)
    flags = informed(train_file="{world}/some.jsonl", eval_file="{world}/some_graded.jsonl")
    calls = watch(monkeypatch, "evaluate")["evaluate"]
    _, _, evaluations = train(world, tmp_path, **flags, max_steps=1, eval_samples=4)
    graded = [(line["step"], line["model"]) for line in evaluations]
    assert graded == [(0, "teacher"), (0, "prompted_teacher"), (0, "student"), (1, "student")]
    assert [call["teacher"] is not None for call in calls] == [False, False, True, True]
    assert calls[0]["model"] is calls[1]["model"] is calls[2]["teacher"]
    own = [problem["prompt_ids"] for problem in calls[1]["problems"]]
    assert own == [problem["teacher_prompt_ids"] for problem in calls[0]["problems"][1:]]
    assert [line["prompt_template"] for line in evaluations[:3]] == [
        "{problem}",
        TEMPLATE,
        "{problem}",
    ]

    alike, told, student = (
        100 * line["eval"]["some_graded"]["avg_at_n"] for line in evaluations[:3]
    )
    assert len({alike, told, student}) > 1
    assert "points ahead" not in capsys.readouterr().out  # they are of two problems and of three


def test_a_line_before_step_1_says_how_far_the_prompted_teacher_is_ahead(
    world, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(opd, "is_correct", says_a)
    _, _, evaluations = train(world, tmp_path, **informed(max_steps=1, eval_samples=4))
    told, student = (of(evaluations, who) for who in ("prompted_teacher", "student"))
    gap = 100 * (told["avg_at_n"] - student["avg_at_n"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "points ahead" in line]
    assert line.startswith(f"graded: the teacher with its own prompt is {gap:+.1f} points ahead")
    assert gap


def test_without_solutions_in_the_evaluation_file_the_prompted_teacher_is_not_evaluated(
    world, tmp_path, capsys
):
    flags = informed(eval_file="{world}/eval.jsonl", max_steps=1)
    _, _, evaluations = train(world, tmp_path, **flags)
    assert "prompted_teacher" not in [line["model"] for line in evaluations]
    assert "points ahead" not in capsys.readouterr().out


def test_eval_first_auto_counts_the_evaluation_of_the_prompted_teacher(world, tmp_path):
    """Three evaluations of 12 columns are under a tenth of 31 steps of 12, not of 30."""
    for steps, whom in ((30, ["student"]), (31, ["teacher", "prompted_teacher", "student"])):
        config, run = opened(world, tmp_path, **informed(eval_first="auto", max_steps=steps))
        assert opd.evaluated_first(config, run) == whom


def test_the_plan_of_a_rollout_has_room_for_the_teachers_longer_prompt(
    world, tmp_path, monkeypatch
):
    monkeypatch.setattr(opd, "seconds_at_most", lambda *_: {})
    config, run = opened(world, tmp_path, **informed())
    longest = max(len(problem["teacher_prompt_ids"]) for problem in run.pools[0])
    assert longest > max(len(problem["prompt_ids"]) for problem in run.pools[0])
    assert f"rows at once of {longest + 12} tokens" in opd.plan_lines(config, run, {})[1]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_preflight_prints_the_teachers_log_probs_after_both_prompts_and_its_first_prompt(
    temperature, world, tmp_path, monkeypatch
):
    config, run = opened(world, tmp_path, **informed(temperature=temperature))
    outs = []
    rollout = opd.rollout
    monkeypatch.setattr(opd, "rollout", lambda *a, **k: outs.append(rollout(*a, **k)) or outs[-1])
    told = "\n".join(opd.preflight(config, run))
    means = []
    for rows in (as_read(outs[0]), rows_of(outs[0])):
        log_probs = []
        for ids, prompt in rows:
            logits = run.teacher(ids).logits[:, prompt - 1 : -1, :V]
            log_q = (logits / temperature).log_softmax(-1)
            log_probs.append(log_q.gather(-1, ids[:, prompt:, None]).flatten())
        means.append(torch.cat(log_probs).mean().item())
    own, alike = means
    assert f"teacher's mean log-prob {own:.2f}, top-4 overlap" in told
    assert f"{own:.2f} after its own prompt, {alike:.2f} after the student's" in told
    assert f"a gap of {own - alike:+.2f} nats a token" in told and abs(own - alike) > 0.01
    first = run.tokenizer.decode(run.pools[0][0]["teacher_prompt_ids"])
    assert f"the teacher's own first prompt: {first!r}" in told


def test_without_a_template_the_preflight_does_not_mention_the_teachers_prompt(world, tmp_path):
    told = "\n".join(opd.preflight(*opened(world, tmp_path)))
    assert "own" not in told and "frozen" not in told


def test_a_report_has_the_accuracy_of_the_teacher_with_its_own_prompt(world, tmp_path, monkeypatch):
    monkeypatch.setattr(opd, "is_correct", says_a)
    _, _, evaluations = train(world, tmp_path, **informed(max_steps=1, eval_samples=8))
    alike, told = (of(evaluations, who)["avg_at_n"] for who in ("teacher", "prompted_teacher"))
    assert alike != told and opd.read_run(tmp_path, "")["teacher"] == told


def test_samples_jsonl_has_no_solutions(world, tmp_path):
    train(world, tmp_path, **informed(max_steps=1))
    samples = test_opd.read(tmp_path / "samples.jsonl")
    assert samples and not [name for line in samples for name in line if name == "solution"]


def test_no_chat_template_holds_for_the_teachers_prompt_too(world, tmp_path):
    _, run = opened(world, tmp_path, **informed(), no_chat_template=True)
    problem = run.pools[0][0]
    text = [*problem["problem"].split(), *problem["solution"].split()]
    assert asked(run, problem, "teacher_prompt_ids") == text


def test_grading_alone_ignores_the_template(world, tmp_path):
    flags = {
        "eval_only": True,
        "teacher": None,
        "train_file": None,
        "eval_file": "{world}/graded.jsonl",
    }
    results = []
    for template in (None, TEMPLATE):
        results.append(
            opd.main(command(world, tmp_path, **flags, teacher_prompt_template=template))
        )
    assert json.dumps(results[0]) == json.dumps(results[1])


def test_four_solutions_of_a_million_characters_are_read_in_four_seconds():
    began = time.perf_counter()
    for text in ("#" * 10**6 + "\nend", "<" * 10**6, "<<1" * 300_000, "####\n" * 200_000):
        opd.read_solution(text)
    assert time.perf_counter() - began < 4
