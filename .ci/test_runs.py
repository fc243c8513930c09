"""
Tests of the plumbing, part II of opd.py: odd files, the command line, kills, signals, several
ranks, checkpoints, cost accounting, reports, in the order of opd.py. The tests of its part I are in
test_opd.py. All names: python -m pytest --collect-only -q .ci/test_runs.py
"""

import torch

torch.set_num_threads(1)  # tiny tensors gain next to nothing from more

import ast
import collections
import contextlib
import copy
import dataclasses
import functools
import gc
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import warnings
import weakref

import numpy as np
import pytest
import tokenizers
import transformers
from torch.utils._pytree import tree_leaves

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import plans

import opd
import test_opd
from test_opd import (
    END,
    ENDS,
    FAMILIES,
    LENGTHS,
    PAD,
    SAMPLING,
    STUDENT,
    TEACHER,
    WORDS,
    V,
    assert_same,
    checkpoints,
    close,
    command,
    forward_shapes,
    gradients_of,
    make_batch,
    outcome,
    plain_gradients,
    prompts,
    repeatable,
    roll,
    rows_of,
    save_model,
    says_a,
    staggered_ends,
    tiny,
    tiny_llama,
    train,
    update,
    without_padding,
    write,
)

# --------------------------------------------------------------------------------------------------
# Helpers, all of them

small_world = test_opd.world
updates = test_opd.updates
first_run = test_opd.first_run
runs = test_opd.runs
TOKENIZER = opd.tiny_tokenizer(WORDS)


@pytest.fixture(scope="session")
def world(small_world):
    """The small world of test_opd.py, with models and files in which something is wrong."""
    save_model(small_world / "other", tiny("Qwen3", 3), WORDS[:6] + WORDS[6:][::-1])
    # A scale that head_logits does not know, and a layer that keeps no keys
    falcon = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1}
    falcon |= {"mamba_d_state": 8, "lm_head_multiplier": 0.3}
    save_model(small_world / "falcon", tiny("FalconH1", 0, **falcon))
    save_model(small_world / "conv", tiny("Lfm2", 0, layer_types=["conv", "full_attention"]))
    save_model(small_world / "window", tiny("Mistral", 0, sliding_window=8))
    shutil.copytree(small_world / "teacher", small_world / "broken")
    write(small_world / "broken" / "model.safetensors", text="cut off")
    # Half of its layers: transformers would fill the others with random numbers
    half = tiny("Qwen3", 3)
    weights = {name: value for name, value in half.state_dict().items() if "layers.1" not in name}
    half.save_pretrained(small_world / "half", state_dict=weights)
    TOKENIZER.save_pretrained(small_world / "half")
    tiny("Qwen3", 3).save_pretrained(small_world / "mute")  # without a tokenizer
    shutil.copytree(small_world / "student", small_world / "words")
    write(small_world / "words" / "generation_config.json", {"eos_token_id": "<end>"})
    # An adapter, custom code, a template that raises, one with a token that the models lack
    write(small_world / "adapter" / "adapter_config.json", {"peft_type": "LORA", "r": 4})
    opd.tiny_tokenizer(WORDS).save_pretrained(small_world / "adapter")
    shutil.copytree(small_world / "student", small_world / "custom")
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    write(small_world / "custom" / "config.json", own)
    write(small_world / "custom" / "own.py", text="open('own code ran', 'w')")
    changed_copy(small_world, "student", small_world / "strict", raises)
    changed_copy(small_world, "student", small_world / "think", thinks)
    save_model(small_world / "table", test_opd.tiny_gpt2(0))  # of 64 positions
    save_model(small_world / "llama4", tiny_llama4())
    problems = test_opd.read(small_world / "train.jsonl")
    write(small_world / "again" / "eval.jsonl", *problems[3:5])
    write(small_world / "pair.jsonl", *problems[3:5])
    write(small_world / "double.jsonl", *problems, problems[0])
    write(small_world / "unanswered.jsonl", {"problem": "1 2 3"})
    write(small_world / "empty.jsonl", text="")
    write(small_world / "bad.jsonl", text='{"problem": "1"}\n{"problem": \n')
    write(small_world / "keys.jsonl", {"text": "1", "label": 2})
    write(small_world / "value.jsonl", {"problem": "1", "value": 2})
    return small_world


@pytest.fixture(scope="session", autouse=True)
def flags_read_once():
    """parse_args reads the source of Config, for --help: .1 s each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "getsource", functools.cache(inspect.getsource))
        yield


@pytest.fixture(autouse=True)
def handlers():
    """main changes the signal handlers; they are restored after every test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def opened(world, out, **changes):
    """-> (config, run), ready for the first step, and nothing written outside of out"""
    config = opd.parse_args(command(world, out, **changes))
    return config, opd.open_run(config)


def watch(monkeypatch, *names):
    """-> {name: a list to which every call of that function of opd adds its arguments, by name}"""
    calls = {name: [] for name in names}

    def watched(name, real):
        signature = inspect.signature(real)

        def call(*args, **kwargs):
            known = {}
            for argument, value in signature.bind(*args, **kwargs).arguments.items():
                gathered = signature.parameters[argument].kind == inspect.Parameter.VAR_KEYWORD
                known |= value if gathered else {argument: value}
            calls[name].append(known)
            return real(*args, **kwargs)

        return call

    for name in names:
        monkeypatch.setattr(opd, name, watched(name, getattr(opd, name)))
    return calls


def contents(folder):
    """All files below a folder, by path."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def load_student(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def same_weights(a, b):
    one, other = load_student(a).state_dict(), load_student(b).state_dict()
    return all(torch.equal(one[name], other[name]) for name in one)


def settings_of(**changes):
    """The arguments of backward under these flags, with a vocabulary of 20."""
    config = test_opd.flags(**changes)
    run = opd.Run({}, [], student=STUDENT, teacher=TEACHER, vocab_size=20, autocast="low")
    run.sampling = {"vocab_size": 20, "temperature": config.temperature}
    run.rows_at_once = {"micro_batch_size": 3}
    return opd.update_settings(config, run)


def changed_copy(world, name, folder, change):
    """A model of the world with change(model, tokenizer), saved in a folder -> the folder"""
    model = load_student(world / name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / name)
    change(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def stopped(argv, capfd):
    """-> (exit status, the one line) of a run that ends early."""
    with pytest.raises((SystemExit, KeyboardInterrupt)) as stop:  # the latter would end the tests
        opd.main(argv)
    err = capfd.readouterr().err
    assert stop.type is SystemExit
    lines = [line for line in err.splitlines() if line.startswith("opd.py: ")]
    assert len(lines) == 1 and "Traceback" not in err
    return stop.value.code, lines[0]


def problems_of(batch, num_generations=1):
    """The problems of a batch as texts, in its order, one for the candidates of a prompt."""
    texts = []
    for ids in without_padding(batch["prompt_ids"], batch["prompt_mask"])[::num_generations]:
        texts.append(" ".join(WORDS[token] for token in ids if token > 3))
    return texts


def unanswered(world, path, every):
    """The training problems, every `every`-th without its answer -> the path of the file"""
    problems = test_opd.read(world / "train.jsonl")
    for problem in problems[::every]:
        problem["answer"] = None
    return write(path, *problems)


def raises(_, tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no system, no answer') }}"


def thinks(_, tokenizer):
    tokenizer.add_tokens("<think>")
    tokenizer.chat_template = tokenizer.chat_template + " <think>"


def tiny_llama4():
    """Its base_model is not the module below its head."""
    sizes = {**test_opd.SIZES, "intermediate_size_mlp": 48, "num_local_experts": 2}
    config = transformers.Llama4TextConfig(**sizes, attention_chunk_size=16)
    return transformers.Llama4ForCausalLM(config).eval()


def of_lengths(name, border=30):
    """A model whose rotary factors change beyond `border` positions."""
    rope = {"rope_type": name, "rope_theta": 1e4, "factor": 4.0}
    if name == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
        rope |= {"original_max_position_embeddings": border}
    positions = {"dynamic": border, "longrope": 4 * border}[name]
    return tiny("Llama", 0, rope_parameters=rope, max_position_embeddings=positions)


def ending_in(*tokens, first="$A"):
    """A tokenizer without a chat template that adds special tokens to its input."""
    tokenizer = opd.tiny_tokenizer(WORDS)
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=" ".join([first, *tokens]),
        special_tokens=[(word, index) for index, word in enumerate(WORDS[:4])],
    )
    return tokenizer


def noted(path, **options):
    """-> the notes about a file of problems, without its path"""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opd.load_problems(path, **options)
    notes = [str(warning.message) for warning in caught]
    assert all(note.startswith(f"{path}: ") and "\n" not in note for note in notes)
    return [note.removeprefix(f"{path}: ") for note in notes]


# Moments of a run of LONG at which a test interferes

LONG = {
    "method": "prune",
    "loss": "reverse_kl",
    "extrapolate": True,
    "max_steps": 5,
    "save_every": 2,
    "eval_every": 4,
    "keep_checkpoints": 1,
    "eval_file": ["{world}/eval.jsonl", "{world}/pair.jsonl"],
    "eval_max_new_tokens": 3,
    "max_new_tokens": 8,
    "validation_size": 1,
    "cap_init": 6,
    "cap_max": 8,
    "drift_threshold": 1.1,  # three misses in a row move the cap in step 3
    "w_drop": 0.4,
}


def is_checkpoint(path):
    return re.fullmatch(r"checkpoint-\d+", os.path.basename(path))


def any_call(*_, **__):
    return True


def with_a_teacher(student, teacher, *_, **__):
    return teacher


def of_two_problems(model, tokenizer, problems, *_, **__):
    return len(problems) == 2


def of_a_folder(path, *_, **__):
    return os.path.isdir(path)


def of_samples(path, *records):
    return str(path).endswith("samples.jsonl")


def to(ending):
    """For calls with two paths: whether the second ends like this, or is a checkpoint."""
    if ending == "checkpoint":
        return lambda _, name: is_checkpoint(name)
    return lambda _, name: str(name).endswith(ending)


# Owner and name of a function; which of its calls, counting those that fulfil a condition; when
MOMENTS = {
    "the preflight": (opd, "rollout", 1, with_a_teacher, "after"),
    "a rollout": (opd, "rollout", 5, with_a_teacher, "after"),  # of step 4
    "a cold start": (opd, "cold_start_step", 2, any_call, "after"),
    "a backward pass": (opd, "backward_in_chunks", 4, any_call, "before"),
    "an update": (opd, "optimizer_step", 4, any_call, "after"),
    "an extrapolation": (opd, "extrapolate", 3, any_call, "after"),  # of step 4
    "an evaluation": (opd, "evaluate", 3, of_two_problems, "before"),
    "the teacher's evaluation": (opd, "evaluate", 1, any_call, "before"),
    "what the teacher makes of answers": (opd, "evaluate", 4, any_call, "before"),  # of two files
    # The answers after step 4, before their means are written: two evaluations preceded step 1
    "the writing of answers": (opd, "append_json", 3, of_samples, "after"),
    "the writing of a model": (
        transformers.PreTrainedModel,
        "save_pretrained",
        2,
        any_call,
        "after",
    ),
    "the writing of a state": (torch, "save", 2, any_call, "before"),
    "the naming of a checkpoint": (os, "replace", 2, to("checkpoint"), "before"),
    "the time after its naming": (os, "replace", 2, to("checkpoint"), "after"),
    "the removal of an old one": (shutil, "rmtree", 1, of_a_folder, "before"),
    "putting an earlier run aside": (os, "replace", 2, to(".old"), "before"),
    "putting its checkpoints aside": (os, "replace", 4, to(".old"), "before"),
    "copying back the metrics": (shutil, "copy", 1, to("metrics.jsonl"), "before"),
    "copying back the samples": (shutil, "copy", 1, to("samples.jsonl"), "before"),
}


def at(moment, act, patch=setattr):
    """Have act called at that moment, with the arguments of the function there."""
    owner, name, number, such_that, when = MOMENTS[moment]
    real = getattr(owner, name)
    calls = itertools.count(1)

    def call(*args, **kwargs):
        now = such_that(*args, **kwargs) and next(calls) == number
        if now and when == "before":
            act(*args, **kwargs)
        result = real(*args, **kwargs)
        if now and when == "after":
            act(*args, **kwargs)
        return result

    patch(owner, name, call)


def send(number):
    return lambda *_, **__: os.kill(os.getpid(), number)


def throw(error):
    def act(*_, **__):
        raise error

    return act


def always_further(weights, anchor, validate):
    """An extrapolation that accepts its first try, so that the next step depends on the anchor."""
    tried = {name: value + (value - anchor[name]) for name, value in weights.items()}
    return tried, 1, [0.0, validate(tried)]


@pytest.fixture
def further(monkeypatch):
    monkeypatch.setattr(opd, "extrapolate", always_further)


def long_run(world, out, **changes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opd, "extrapolate", always_further)
        train(world, out, **{**LONG, **changes})
    return out


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """The folder of an undisturbed run of LONG."""
    return long_run(world, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def every_step(world, tmp_path_factory):
    """The same with a checkpoint for every step."""
    return long_run(world, tmp_path_factory.mktemp("every"), save_every=1, keep_checkpoints=9)


@pytest.fixture(scope="module")
def after_one_step(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    train(world, out, max_steps=1, loss="reverse_kl")
    return out / "checkpoint-1"


def assert_whole(folder):
    """Model, tokenizer and state of a checkpoint can be loaded."""
    load_student(folder)
    assert transformers.AutoTokenizer.from_pretrained(folder).chat_template
    state = torch.load(folder / "trainer_state.pt", weights_only=True)
    assert f"checkpoint-{state['step']}" == folder.name


def resume(world, out, **changes):
    """Resume a run of LONG."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a note that there is no checkpoint
        train(world, out, **{**LONG, **changes}, resume=True)


# Runs that are killed or have several ranks are children of a fork server, which has imported all
# and started no thread yet. The first of them takes some seconds

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["test_runs"])
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup make test ignores it, as opd.py would then
PATIENCE = 240  # seconds until a child counts as hanging, on a machine that others use, too


def in_child(job, log, result, environ, *args):
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    os.environ.update(environ)
    opd.RANK = int(environ.get("RANK", 0))
    opd.NUM_RANKS = int(environ.get("WORLD_SIZE", 1))
    opd.ask_math_verify = lambda *_: False  # its import takes seconds; all answers are integers
    opd.extrapolate = always_further
    torch.save(job(*args), result)


def start(job, folder, *args, **environ):
    """A job in a process of its own; its output and its result go into the folder."""
    name = f"rank-{environ.get('RANK', 0)}"
    files = folder / f"{name}.log", folder / f"{name}.pt"
    process = SERVER.Process(target=in_child, args=(job, *files, environ, *args))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the server begins with the first
        process.start()
    return process


def in_two(job, folder, *args):
    """The job in two ranks -> exit codes, logs, and the results if both codes are 0"""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meet = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [start(job, folder, *args, RANK=rank, LOCAL_RANK=rank, **meet) for rank in "01"]
    end = time.monotonic() + PATIENCE
    for process in ranks:
        process.join(max(0, end - time.monotonic()))
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()  # one that hangs; its exit code was None
    logs = [(folder / f"rank-{rank}.log").read_text() for rank in "01"]
    results = None
    if codes == [0, 0]:
        results = [torch.load(folder / f"rank-{rank}.pt") for rank in "01"]
    return codes, logs, results


def killed_run(argv, moment, out):
    def tear(name, size):
        os.truncate(out / name, (out / name).stat().st_size - size)

    def kill(*args, **_):
        if moment == "an update":
            tear("metrics.jsonl", 99)  # half a line is left of step 3
        if moment in ("an evaluation", "the writing of answers"):
            tear("samples.jsonl", 9)  # half a line is left
        if moment == "the removal of an old one":
            os.remove(os.path.join(args[0], "model.safetensors"))
        os.kill(os.getpid(), signal.SIGKILL)

    at(moment, kill)
    opd.main(argv)


def kill_at(moment, world, folder, out, **changes):
    """A run of LONG that is killed at that moment."""
    argv = command(world, out, **{**LONG, **changes})
    process = start(killed_run, folder, argv, moment, out)
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGKILL, (folder / "rank-0.log").read_text()


def share_of_a_step(trained_rows, max_grad_norm=1e9, lr=0.0):
    """
    This rank's share of an update, whose loss_mask is empty outside the trained rows -> its
    metrics, gradients, and the weights after it
    """
    student = tiny_llama(1)
    batch = make_batch(student, TEACHER)
    trained = torch.tensor([row in trained_rows for row in range(4)])
    batch["loss_mask"] = batch["loss_mask"] & trained[:, None]
    del batch["teacher_seconds"]
    own = {name: opd.share(value) for name, value in batch.items()}
    metrics, grads = update(student, TEACHER, own, lr=lr, max_grad_norm=max_grad_norm)
    return metrics, grads, student.state_dict()


SHARES = {
    "all rows": {"trained_rows": [0, 1, 2, 3]},
    "none of the second rank's": {"trained_rows": [0, 2]},
    "clipped": {"trained_rows": [0, 1, 2, 3], "max_grad_norm": 0.01, "lr": 1.0},
}


def share_of_an_evaluation(count, num_samples, temperature):
    problems = []
    for index in range(count):
        problems.append({"answer": str(index), "prompt_ids": [2, 7 + index, 3]})
    settings = {**SAMPLING, "max_length": 8, "temperature": temperature, "rows_per_batch": 2}
    return opd.evaluate(
        STUDENT, TOKENIZER, problems, num_samples=num_samples, seed=5, segment_length=4, **settings
    )


def work_of_a_rank():
    """What two ranks do together, each its share -> dict of the results."""
    opd.join_processes("cpu")
    results = {name: share_of_a_step(**settings) for name, settings in SHARES.items()}
    results["gathered"] = opd.gather([f"of {opd.RANK}"] * (1 + opd.RANK))
    results["greedy"] = share_of_an_evaluation(3, 1, 0.0)
    results["one greedy"] = share_of_an_evaluation(1, 1, 0.0)
    results["sampled"] = share_of_an_evaluation(3, 3, 1.0)
    results["two of one"] = share_of_an_evaluation(1, 2, 1.0)
    return results


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """The results of work_of_a_rank in both ranks."""
    codes, logs, results = in_two(work_of_a_rank, tmp_path_factory.mktemp("two"))
    assert codes == [0, 0], logs
    return results


def test_what_processes_send_each_other_is_no_view_of_something_larger(
    world, tmp_path, monkeypatch
):
    """A view is sent with all of its storage: B rows of a step would be B steps."""
    sent = []

    def gather(items):
        for item in items:
            values = item.values() if isinstance(item, dict) else [item]
            sent.extend(value for value in values if torch.is_tensor(value))
        return items

    monkeypatch.setattr(opd, "gather", gather)
    train(world, tmp_path, max_steps=1, eval_file=None)
    assert sent and all(value.untyped_storage().nbytes() == value.nbytes for value in sent)


def run_of_two(argv):
    """
    opd.main -> (the final weights, what this rank wrote). Saving a checkpoint is made to take the
    first rank a while.
    """
    written, students = [], []
    out = argv[argv.index("--output_dir") + 1]
    optimizer_step = opd.optimizer_step
    save = torch.save
    changing = "os.rename os.mkdir os.remove os.rmdir os.truncate shutil.rmtree".split()

    def note(event, args):
        changes = event in changing or event == "open" and set(str(args[1])) & set("wax+")
        if changes and str(args[0]).startswith(out):
            written.append((event, str(args[0])))

    def watched_step(student, *args):
        students.append(student)
        return optimizer_step(student, *args)

    def slow_save(value, path, **more):
        time.sleep(isinstance(path, str) / 2)
        save(value, path, **more)

    sys.addaudithook(note)
    opd.optimizer_step = watched_step
    torch.save = slow_save
    opd.main(argv)
    assert not torch.distributed.is_initialized()
    torch.save = save
    return {name: value.clone() for name, value in students[-1].state_dict().items()}, written


def run_that_nobody_hears(argv, outputs=(1,)):
    """Standard output is a pipe that is closed at its other end, as with | head -1."""
    read, pipe = os.pipe()
    os.close(read)
    for output in outputs:
        os.dup2(pipe, output)
    opd.main(argv)


def run_that_loses_a_rank(argv):
    if os.environ["RANK"] == "1":
        at("a backward pass", lambda *_, **__: os._exit(7))
    opd.main(argv)


# Reports of made-up runs, whose expected tables are worked out by hand


def graded(step, model, accuracy, se=0.02, **more):
    """The record of an evaluation; accuracy: of a file named eval, or {file: accuracy}."""
    files = accuracy if isinstance(accuracy, dict) else {"eval": accuracy}
    results = {file: {"avg_at_n": value, "se": se, "n": 4} for file, value in files.items()}
    return {"step": step, "model": model, "eval": results, "generated_tokens": 0, **more}


def made_run(path, after=0.6, teacher=0.9, before=0.1, scale=1, steps=2, text=""):
    """
    metrics.jsonl of a run; scale: a factor on all costs. A step samples 1000 tokens in 2 + 1 + 1
    seconds; text is appended.
    """
    records = []
    if before is not None:
        records = [graded(0, "student", before), graded(0, "teacher", teacher)]
    for step in range(1, steps + 1):
        spent = {"generated_tokens": 1000, "trained_tokens": 500, "flops": 10**9}
        records.append(
            {
                "step": step,
                "overlap_ratio": 0.5 + 0.1 * step,
                "overlap_by_position": [0.5 + 0.1 * step, None],
                "time_rollout": 2 * scale,
                "time_teacher": scale,
                "time_update": scale,
                "time_validation": 0.0,
                **{name: value * step * scale for name, value in spent.items()},
            }
        )
    if after is not None:
        tokens = 1000 * steps * scale
        records.append(graded(steps, "student", after, generated_tokens=tokens))
    lines = "".join(json.dumps(record) + "\n" for record in records)
    return write(path / "metrics.jsonl", text=lines + text)


def read_runs(folder):
    paths = sorted(path.parent.relative_to(folder) for path in folder.rglob("metrics.jsonl"))
    return [opd.read_run(folder, str(path)) for path in paths]


TITLES = ["teacher", "before", "after", "minus opd", "opd at as many tokens"]
TITLES += ["gap", "overlap", "sampled", "FLOPs", "seconds"]


def table(folder):
    """
    The printed table of the runs below a folder -> ({method: {column: text}}, its lines). Three
    lines of titles, two of notes; a method's name comes last.
    """
    lines = opd.report_table(read_runs(folder))
    rows = {}
    for line in lines[3:-2]:
        *cells, name = line.split(maxsplit=len(TITLES))
        rows[name] = dict(zip(TITLES, cells, strict=True))
    return rows, lines


# Tables of cases

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+3?"}]
DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n2+3?"
    '\n\nRemember to put your answer on its own line after "Answer:".'
)
TWO = {"role": "assistant", "content": "2"}
SHARED = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "2+3?"}]
RECORDS = [
    ({"problem": "2+3?", "answer": "\\frac{5}{1}", "solution": "long"}, "\\frac{5}{1}"),  # MATH-500
    ({"problem": "2+3?", "answer": 5}, "5"),
    ({"problem": "2+3?", "answer": 0}, "0"),
    ({"problem": "2+3?", "answer": ["1", "2"]}, "1, 2"),
    ({"question": "2+3?", "answer": "2 and 3 give 5.\n#### 5"}, "5"),  # GSM8K
    ({"question": "2+3?", "final_answer": "5"}, "5"),  # DeepMath
    ({"prompt": "2+3?", "solution": "5"}, "5"),  # DAPO, processed
    ({"prompt": CHAT, "solution": "$5$"}, "5"),  # DeepMath of TRL
    ({"prompt": CHAT, "reward_model": {"ground_truth": "5", "style": "rule"}}, "5"),  # verl
    ({"prompt": [{"role": "user", "content": DAPO}], "answer": "5"}, "5"),
    ({"problem": "2+3? Please reason step by step, and put it within \\boxed{}."}, None),
    ({"problem": "2+3?", "solution": "So \\boxed{4}, no, \\boxed{5}."}, "5"),  # NuminaMath
    ({"messages": [*CHAT, {"role": "assistant", "content": "\\boxed{5}"}]}, "5"),
    ({"conversations": [{"from": "human", "value": "2+3?"}], "answer": 5}, "5"),  # ShareGPT
    ({"conversations": [*SHARED, {"from": "gpt", "value": "So \\boxed{5}"}]}, "5"),
    ({"prompt": CHAT, "completion": [{"role": "assistant", "content": "\\boxed{5}"}]}, "5"),  # TRL
    ({"prompt": [{"role": "user", "content": "1+1?"}, *CHAT], "answer": "5"}, "5"),
    (
        {"user": "alice", "assistant": "gpt", "prompt": CHAT, "answer": "5", "reward_model": "x"},
        "5",
    ),
    ({"problem": "2+3?", "prompt": 5, "reward_model": None, "answer": 5}, "5"),
    ({"problem": "2+3?", "answer": 5, "reward_model": {"answer": 6, "problem": "no"}}, "5"),
    ({"problem": "2+3?", "answer": None, "solution": "5"}, "5"),
    ({"problem": "2+3?"}, None),
    ({"prompt": CHAT, "label": "5"}, "5"),  # slime
    ({"problem": "2+3?", "label": "sums", "solution": "\\boxed{5}"}, "5"),
    ({"problem": "2+3?", "expected_answer": "5", "solution": "long"}, "5"),
    ({"problem": "", "question": "2+3?", "answer": "5"}, "5"),
    # An answer of an earlier question
    ({"prompt": [{"role": "user", "content": "1+1?"}, TWO, *CHAT[1:]]}, None),
    ({"prompt": [{"role": "user", "content": "1+1?"}, TWO, *CHAT[1:]], "label": 5}, "5"),
    # Proofs, and what is no answer
    ({"problem": "2+3?", "answer": "proof", "solution": "2 = 2*1."}, None),
    ({"problem": "2+3?", "answer": "Proof.", "solution": "2 = 2*1."}, None),
    ({"problem": "2+3?", "answer": ["5", None]}, "5"),
]
NO_ANSWERS = [
    "",
    r"\boxed{}",
    " ",
    None,
    [],
    [None],
    {},
    {"a": 1},
    True,
    math.nan,
    math.inf,
    "N/A",
    "nan",
    "-",
    "no answer",
    "no answer.",
    "no_answer",
    "No answer provided",
    "not provided",
    "not found.",
    "NOT_FOUND",
    "N / A",
    "NA",
    "TBD",
    "See solution below",
    "proof problem",
    "(proof)",
    "**Proof**",
    r"\text{proof}",
    r"\boxed{\text{proof}}",
]
INSTRUCTIONS = [
    DAPO.partition("\n")[0],
    r"Please reason step by step, and put your final answer within \boxed{}.",
    r"Let's think step by step and output the final answer within \boxed{}.",
    'Let\'s think step by step and output the final answer after "####".',
    r"Present the answer in LaTex format: \boxed{Your answer}",
]
FORMATS = [
    r"Enclose your final result in \boxed{}.",
    "Write the number behind ####.",
    "End in a line Answer: and the number.",
    "Put it between <answer> and </answer>.",
    "Solve it Step-by-Step.",
    r"Put it into \fbox{}.",
    "Use double square brackets: [[answer]].",
    "Give [[your answer]].",
    "Return JSON.",
    "Respond with only a letter.",
    "Conclude with 'The answer is X'.",
    "Put it into <ans>.",
    "Write it after ###.",
]
UNREADABLE = [
    ('{"problem": "a"}\n\n{"problem": "b",\n', "line 3: not JSON"),
    ('[{"problem": "a"},\n{"problem": \n', "line 3: not JSON"),
    ('{"text": "a", "id": 1}\n', "fields are text 'a', id 1"),
    ('"just a string"\n', "record 1"),
    ('{"messages": [{"role": ["user"], "content": "2+3?"}]}\n', "record 1"),
    ("", "empty"),
    ("\n\n", "empty"),
    ('{"problem": null}\n', "problem"),
    ('{"problem": "a"}\n{"problem": 5}\n', "record 2"),
    ('{"problem": "  "}\n', "record 1"),
    ('{"prompt": [{"from": "gpt", "value": "2+3?"}]}\n', "record 1"),
    ('{"messages": [{"role": "bot", "content": "2+3?"}]}\n', "or a turn of the role user"),
    ('{"problem": "a"}\n{"problem": "\\ud800"}\n', "record 2: has half a character"),
    ('{"problem": "a", "answer": "\\udfff"}\n', "record 1: has half a character"),
    ('{"problem": "a", "solution": "\\udfff"}\n', "record 1: has half a character"),
    ('{"problem": "a"}\n' + "[" * 100_000 + "]" * 100_000, "line 2: not JSON"),
    ('{"problem": ' + '{"a": ' * 100_000 + "1" + "}" * 100_001, "line 1: not JSON"),
]
GRADES = [
    (r"so \boxed{33}", "33", True),
    ("so 33", "33", False),
    (r"so $12+21=33$ and", "33", False),
    (r"so \boxed{33", "33", False),
    (r"\boxed{33} no, \boxed{34}", "33", False),
    (r"\boxed{34} no, \boxed{33}", "33", True),
    (r"<think>\boxed{33}</think> 34", "33", False),
    (r"<think>\boxed{34}</think> \boxed{33}", "33", True),
    (r"\boxed{033}", "33", True),
    (r"\boxed{$33$}", r"\boxed{33}", True),
    (r"\boxed{0.5}", r"\frac{1}{2}", True),
    (r"\boxed{10\%}", "0.1", True),
    (r"\boxed{1,234}", "1234", True),
    (r"\boxed{}", "33", False),
    (r"\boxed{\frac{}}", "33", False),
    (r"\boxed{(3, \pi/2)}", r"\left( 3, \frac{\pi}{2} \right)", True),
    (r"\boxed{3}", r"\left( 3, \frac{\pi}{2} \right)", False),
    (r"\boxed{(1,2)}", "1<x<2", True),
    (r"\boxed{1<x<2}", "(1,2)", False),  # math-verify is not symmetric
]
TWICE = ["{world}/train.jsonl"] * 2
MISTAKES = {
    "no such training file": ({"train_file": "{world}/nowhere.jsonl"}, "nowhere.jsonl"),
    "an empty file": ({"train_file": "{world}/empty.jsonl"}, "empty"),
    "a line that is not JSON": ({"train_file": "{world}/bad.jsonl"}, "line 2"),
    "a record without a problem": (
        {"train_file": "{world}/keys.jsonl"},
        "fields are text '1', label 2",
    ),
    "a model that is nowhere": ({"student": "{world}/nowhere"}, "nowhere"),
    "a model folder that does not load": ({"teacher": "{world}/broken"}, "broken does not load"),
    "different token maps": (
        {"teacher": "{world}/other"},
        "different ids for 18 tokens: '0' is 6 and 23",
    ),
    "a model whose logits are made otherwise": ({"student": "{world}/falcon"}, "falcon_h1"),
    "a model whose layers keep no keys": ({"student": "{world}/conv"}, "lfm2"),
    "a model that is built another way": ({"teacher": "{world}/llama4"}, "llama4_text models are"),
    "an adapter as a student": ({"student": "{world}/adapter"}, "adapter is an adapter (LoRA)"),
    "an adapter as a teacher": ({"teacher": "{world}/adapter"}, "merge it into its base"),
    "a teacher without all of its weights": (
        {"teacher": "{world}/half"},
        "half lacks 11 of its weights, such as model.layers.1.input_layernorm.weight",
    ),
    "a student without a tokenizer": ({"student": "{world}/mute"}, "mute has no tokenizer"),
    "a teacher without a tokenizer": ({"teacher": "{world}/mute"}, "mute has no tokenizer"),
    "a stop that is no id": ({"student": "{world}/words"}, "eos_token_id ['<end>'] must be ids"),
    "a template that names a field of another name": (
        {"teacher_prompt_template": "{problem} {sollution}"},
        "--teacher_prompt_template: {sollution} is none of problem, answer, solution",
    ),
    "a prompt that would tell the answer": (
        {"prompt_template": "{problem} {answer}"},
        "--prompt_template: {answer} is none of problem",
    ),
    "checkpointing on and off": (
        {"gradient_checkpointing": True, "no_gradient_checkpointing": True},
        "give one",
    ),
    "a file from an unset variable of the shell": (
        {"train_file": ["{world}/train.jsonl", ""]},
        "--train_file is empty",
    ),
    "more tokens than a list can have": ({"max_new_tokens": 10**12}, "and at most 1e+08"),
    "a model with code of its own": (
        {"student": "{world}/custom"},
        "models that come with code are not supported",
    ),
    "a chat template that raises": (
        {"student": "{world}/strict"},
        "chat template (see --no_chat_template) fails on ",
    ),
    "a token in prompts that the models have not": (
        {"student": "{world}/think", "teacher": "{world}/think"},
        "have the token '<think>' (24), and the models know only the first 24",
    ),
    "more training than a table has positions": (
        {"student": "{world}/table", "max_new_tokens": 60},
        "response of 60 tokens (--max_new_tokens) are more than the 64 positions of the student",
    ),
    "more evaluation than a table has positions": (
        {"teacher": "{world}/table", "eval_max_new_tokens": 61},
        "61 tokens (--eval_max_new_tokens) are more than the 64 positions of the teacher, and they",
    ),
    "evaluation answers in an unknown field": (
        {"eval_file": "{world}/value.jsonl"},
        "solution; its fields are problem '1', value 2",
    ),
    "prompts that are all too long": ({"max_prompt_length": 2}, "--max_prompt_length 2"),
    "a share of a mixture that is no number": ({"mix": ["nan"]}, "--mix"),
    "shares for more files than there are": ({"mix": [0.5, 0.5]}, "--mix"),
    "shares that are not 1 in all": ({"mix": [0.9]}, "--mix"),
    "a share of less than a prompt": (
        {"mix": [0.1, 0.9], "batch_size": 4, "train_file": TWICE},
        "--mix",
    ),
    "a depth of no percentage": ({"probe_depths": [0, 100]}, "--probe_depths"),
    "a share above all": ({"keep_ratio": 1.1}, "--keep_ratio"),
    "a nucleus above all": ({"eval_top_p": 1.1}, "--eval_top_p"),
    "a prefix of all tokens": (
        {"method": "prefix-guided", "prefix_length": 12},
        "--prefix_length < --max_new_tokens must hold; they are 4, 12 and 12",
    ),
    "a probe window over the prefix": (
        {"method": "prefix-guided", "probe_window": 7},
        "--probe_window <= --prefix_length < --max_new_tokens must hold; they are 7, 6 and",
    ),
    "a keep ratio under one per prompt": (
        {"method": "prefix-guided", "keep_ratio": 0.4},
        "--keep_ratio 0.4 is under one candidate per prompt: raise it to 1/2",
    ),
    "a cap below its least": ({"cap_init": 3}, "--cap_init"),
    "a cap above its largest": ({"cap_init": 13}, "--cap_init"),
    "a template without the problem": ({"prompt_template": "Solve it."}, "{problem}"),
    "a device that is not here": ({"device": "cuda:7"}, "--device cuda:7"),
    "a kind of device that is not here": ({"device": "xpu"}, "--device xpu: not available"),
    "a size of zero": ({"batch_size": 0}, "--batch_size 0"),
    "a negative size": ({"max_new_tokens": -1}, "--max_new_tokens -1"),
    "a negative seed": ({"seed": -1}, "--seed -1"),
    "a rate of infinity": ({"learning_rate": "inf"}, "--learning_rate inf"),
    "a size that is no number": ({"batch_size": "many"}, "many"),
    "an unknown method": ({"method": "magic"}, "magic"),
    "an unknown flag": ({"magic": 1}, "--magic"),
    "a flag cut short": ({"max_step": 1}, "--max_step"),
    "a switch with a value": ({"baseline": "no"}, "no"),
    "a switch of another loss": (
        {"baseline": True, "loss": "topk"},
        "--baseline is of --loss sampled alone, and --loss is topk",
    ),
    "a flag from an unset variable of the shell": ({"resume": ""}, "--resume is empty"),
    "a checkpoint in the folder of the run": (
        {"teacher": "{world}/checkpoint-3", "output_dir": "{world}/x/.."},
        "checkpoint-3 is a checkpoint of another run",
    ),
    "a student that the run would put aside": (
        {"student": "{world}/checkpoint-3.old/", "output_dir": "{world}"},
        "checkpoint-3.old/ is a checkpoint of another run",
    ),
    "a folder from an unset variable of the shell": ({"output_dir": ""}, "--output_dir is empty"),
    "a template from an unset variable of the shell": (
        {"teacher_prompt_template": ""},
        "--teacher_prompt_template is empty",
    ),
    "evaluation problems without answers": (
        {"eval_file": "{world}/unanswered.jsonl"},
        "unanswered",
    ),
    "a student without a teacher": ({"teacher": None}, "--teacher"),
    "a teacher without a student": ({"student": None}, "--student"),
    "training without problems": ({"train_file": None}, "--train_file"),
    "grading without problems": ({"eval_only": True, "eval_file": None}, "--eval_file"),
    "an overlap of more tokens than there are": ({"overlap_k": V + 1}, "--overlap_k 25"),
    "fewer answers than extrapolation asks for": (
        {"extrapolate": True, "validation_size": 10},
        "needs 10 answered problems; here are 9",
    ),
    "fewer answers once long prompts are left out": (
        {"extrapolate": True, "validation_size": 9, "max_prompt_length": 5},
        "needs 9 answered problems",
    ),
    "an output folder that cannot be made": ({"output_dir": "{world}/bad.jsonl/out"}, "bad.jsonl"),
    "a checkpoint that is nowhere": (
        {"resume": "{world}/nowhere"},
        "nowhere is no whole checkpoint",
    ),
    "a report of nothing": (
        {"report": "{world}"},
        "no run below it has a metrics.jsonl with steps",
    ),
}


# --------------------------------------------------------------------------------------------------
# What a function needs that is copied


SOURCE = inspect.getsource(opd)


def own_names():
    """{name: (section, the names of opd.py that it uses, docstring)} of all top-level names."""
    tree = ast.parse(SOURCE)
    titles = re.finditer(r"(?m)^#(?: Part II\.)? (\d+)\. ", SOURCE)
    starts = [(SOURCE[: title.start()].count("\n"), int(title[1])) for title in titles]
    nodes = {node.name: node for node in tree.body if hasattr(node, "name")}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            nodes[node.targets[0].id] = node
    found = {}
    for name, node in nodes.items():
        inside = {argument.arg for argument in ast.walk(node) if isinstance(argument, ast.arg)}
        used = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)} & set(nodes)
        section = max([number for line, number in starts if line < node.lineno], default=0)
        doc = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
        found[name] = section, used - inside - {name}, doc or ""
    return found


OWN = own_names()
COPIED = []
for name, (section, _, doc) in OWN.items():
    of_the_papers = section in range(1, 6) and inspect.isfunction(getattr(opd, name))
    if of_the_papers or re.search(r"Needs\s+\w+[,.]", doc):
        COPIED.append(name)


@pytest.mark.parametrize("name", COPIED)
def test_a_docstring_names_all_of_opd_py_that_its_function_uses(name):
    _, used, doc = OWN[name]
    assert used <= set(re.findall(r"\w+", doc))


def test_the_docstring_of_rollout_names_all_sections_that_it_needs():
    names, needed = ["rollout"], {OWN["Plan"][0]}  # of its argument
    for name in names:
        section, used, _ = OWN[name]
        needed.add(section)
        names += used - set(names)
    told = re.search(r"Needs sections ([\d, ]+)\.", opd.rollout.__doc__)[1]
    assert needed == set(map(int, told.split(", ")))


# --------------------------------------------------------------------------------------------------
# 11. Several processes


def test_every_item_of_a_list_is_in_exactly_one_ranks_share(monkeypatch):
    monkeypatch.setattr(opd, "NUM_RANKS", 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(opd, "RANK", rank)
        shares.append(opd.share(list(range(8))))
    assert sorted(sum(shares, [])) == list(range(8))
    assert [len(own) for own in shares] == [3, 3, 2]


def test_only_the_first_rank_is_main(monkeypatch):
    assert opd.is_main()
    monkeypatch.setattr(opd, "RANK", 1)
    assert not opd.is_main()


def test_no_two_ranks_and_no_two_seeds_draw_the_same_numbers(monkeypatch):
    monkeypatch.setattr(opd, "NUM_RANKS", 2)
    numbers = set()
    for seed, rank in itertools.product((0, 1, 2), (0, 1)):
        monkeypatch.setattr(opd, "RANK", rank)
        opd.seed_sampling(seed)
        numbers.add(torch.rand(1).item())
    assert len(numbers) == 6


@pytest.mark.parametrize("device, backend", [("cpu", "gloo"), ("cuda", "cpu:gloo,cuda:nccl")])
def test_ranks_communicate_over_gloo_on_cpus_and_over_nccl_on_gpus(device, backend, monkeypatch):
    """On the GPU that torchrun assigned, and with a long timeout: a rank may sample for long."""
    met, gpus = [], []
    monkeypatch.setattr(opd, "NUM_RANKS", 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "set_device", gpus.append)
    monkeypatch.setattr(
        opd.dist, "init_process_group", lambda name, timeout: met.append((name, timeout))
    )
    opd.join_processes(device)
    assert met[0][0] == backend and met[0][1].total_seconds() >= 3600
    assert gpus == ([1] if device == "cuda" else [])


def test_a_rank_without_a_world_size_is_not_one_of_several_processes(monkeypatch):
    """The shell of a cluster may set RANK alone."""
    monkeypatch.setenv("RANK", "1")
    assert runpy.run_path(opd.__file__)["RANK"] == 0


def test_an_empty_world_size_is_one_process(monkeypatch):
    """As some container files export it."""
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.setenv(name, "")
    assert runpy.run_path(opd.__file__)["NUM_RANKS"] == 1


def test_a_single_process_joins_no_process_group(monkeypatch):
    monkeypatch.setattr(opd.dist, "init_process_group", throw(AssertionError))
    opd.join_processes("cpu")


def test_lists_of_all_ranks_are_gathered_in_the_order_of_the_ranks(two_ranks):
    for results in two_ranks:
        assert results["gathered"] == ["of 0", "of 1", "of 1"]


@pytest.mark.parametrize("case", ["all rows", "none of the second rank's"])
def test_two_ranks_make_the_step_of_one_process_with_all_rows(case, two_ranks):
    metrics, grads, _ = share_of_a_step(**SHARES[case])
    for results in two_ranks:
        own, own_grads, _ = results[case]
        assert own == pytest.approx(metrics, rel=1e-5, abs=1e-6)
        assert_same(own_grads, grads)


def test_the_gradient_of_all_ranks_is_clipped_and_not_that_of_each(two_ranks):
    metrics, _, weights = share_of_a_step(**SHARES["clipped"])
    assert metrics["grad_norm"] > 0.01
    for results in two_ranks:
        own, _, own_weights = results["clipped"]
        assert own["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=1e-4)
        assert_same(own_weights, weights)


def test_two_ranks_share_out_the_answers_of_an_evaluation_and_both_get_all_in_order(two_ranks):
    first, second = two_ranks
    for case in ("greedy", "one greedy", "sampled", "two of one"):
        assert str(first[case]) == str(second[case])
    _, answers = first["sampled"]
    places = [(answer["index"], answer["sample"]) for answer in answers]
    assert places == list(itertools.product(range(3), range(3)))


def test_two_ranks_grade_greedy_answers_as_one_process_does(two_ranks):
    """If greedy. Otherwise they differ: each rank has a random stream of its own."""
    assert str(two_ranks[0]["greedy"]) == str(share_of_an_evaluation(3, 1, 0.0))
    assert str(two_ranks[0]["one greedy"]) == str(share_of_an_evaluation(1, 1, 0.0))
    one, other = two_ranks[0]["two of one"][1]
    assert one["response"] != other["response"]


def test_ranks_share_out_the_prompts_of_a_step_and_draw_different_numbers(
    world, tmp_path, monkeypatch
):
    config, run = opened(world, tmp_path, batch_size=5)
    monkeypatch.setattr(opd, "NUM_RANKS", 2)
    shares, numbers = [], set()
    for step, rank in ((3, 0), (3, 1), (4, 0), (4, 1)):
        monkeypatch.setattr(opd, "RANK", rank)
        shares.append(opd.draw_prompts(config, run, step)[::2])  # two candidates each
        numbers.add(torch.rand(1).item())
    assert [len(own) for own in shares] == [3, 2, 3, 2] and len(numbers) == 4
    drawn = [run.pools[0].index(problem) for problem in shares[0] + shares[1]]
    assert sorted(drawn) == sorted(opd.batch_indices(3, 5, 9, config.seed))


def test_fewer_prompts_than_processes_are_refused(monkeypatch):
    monkeypatch.setattr(opd, "NUM_RANKS", 3)
    opd.check_config(opd.parse_args(["--batch_size", "3"]))
    with pytest.raises(ValueError, match="--batch_size must be at least the 3 processes"):
        opd.check_config(opd.parse_args(["--batch_size", "2"]))


def test_one_gpu_for_all_processes_is_refused(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    config = dataclasses.replace(opd.TINY, device="cuda:1")
    opd.check_config(config)
    monkeypatch.setattr(opd, "NUM_RANKS", 2)
    opd.check_config(dataclasses.replace(config, device="cuda"))
    with pytest.raises(ValueError, match="--device cuda:1: each process takes a GPU"):
        opd.check_config(config)


def test_a_run_of_two_ranks_ends_with_one_set_of_weights_and_only_the_first_rank_writes(
    world, tmp_path
):
    """Three prompts a step, two for the first rank, one for the second. Also when resumed."""

    def run(out, **changes):
        flags = {**LONG, "method": "prefix-guided", "batch_size": 3, "max_steps": 2}
        flags |= {"max_new_tokens": 8, "eval_every": 1, "save_every": 0, **changes}
        flags["train_file"] = "{world}/double.jsonl"  # of which there is a note
        folder = tmp_path / f"{len(os.listdir(tmp_path))}"
        codes, logs, results = in_two(run_of_two, folder, command(world, out, **flags))
        assert codes == [0, 0], logs
        (first, wrote), (second, nothing) = results
        assert_same(first, second, tolerance=0)
        assert_same(first, load_student(out / checkpoints(out)[-1]).state_dict(), tolerance=0)
        assert wrote and nothing == []
        for told in ("| loss", "note: "):
            assert told in logs[0] and told not in logs[1]

    run(tmp_path / "a")
    run(tmp_path / "b", max_steps=1)
    run(tmp_path / "b", resume=True)
    assert outcome(tmp_path / "b") == outcome(tmp_path / "a")


def test_a_rank_that_dies_ends_the_other_and_the_last_step_is_kept(world, tmp_path):
    out = tmp_path / "out"
    argv = command(world, out, **{**LONG, "max_steps": 100_000})
    codes, logs, _ = in_two(run_that_loses_a_rank, tmp_path, argv)
    assert codes[1] == 7 and codes[0] not in (0, None), logs[0]
    assert "Traceback" not in logs[0] and "checkpoint-3" in logs[0].splitlines()[-1]
    assert_whole(out / "checkpoint-3")


LOST = """
import os, signal, sys, time
sys.path.insert(0, {folder!r})
import opd
opd.ask_math_verify = lambda *_: False
begin, save = opd.draw_prompts, opd.torch.save
def slow_save(state, path, **more):
    time.sleep(isinstance(path, str))
    save(state, path, **more)
def draw_prompts(config, run, step):
    if opd.RANK == 1 and step == 2:
        open({died!r}, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return begin(config, run, step)
opd.torch.save, opd.draw_prompts = slow_save, draw_prompts
opd.main(sys.argv[1:])
"""


def test_torchrun_starts_ranks_and_ends_them_when_one_dies(world, tmp_path):
    """
    Killed at the start of step 2. The other saves what it has, though torchrun tells it to end
    meanwhile.
    """
    folder = os.path.dirname(os.path.abspath(opd.__file__))
    write(tmp_path / "lost.py", text=LOST.format(folder=folder, died=str(tmp_path / "died")))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc_per_node", "2", tmp_path / "lost.py"]
    flags = command(world, tmp_path / "out", max_steps=9, eval_file=None)
    process = subprocess.Popen(
        [*torchrun, *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        told, _ = process.communicate(timeout=PATIENCE)
    finally:
        process.terminate()  # one that hangs; it ends its own children
    assert process.returncode and (tmp_path / "died").exists(), told
    assert checkpoints(tmp_path / "out") == ["checkpoint-1"]
    assert_whole(tmp_path / "out" / "checkpoint-1")


# --------------------------------------------------------------------------------------------------
# 12. Data


@pytest.mark.parametrize("record, answer", RECORDS)
def test_load_problems_reads_the_formats_of_the_usual_data_sets(tmp_path, record, answer):
    lines = write(tmp_path / "a.jsonl", record)
    for path in (lines, write(tmp_path / "a.json", text=json.dumps([record], indent=2))):
        (problem,) = opd.load_problems(path)
        assert (problem["problem"], problem["answer"]) == ("2+3?", answer)


@pytest.mark.parametrize("value", NO_ANSWERS, ids=repr)
@pytest.mark.parametrize("solution, answer", [("so \\boxed{5}", "5"), ("5 steps.\n#### 5", "5")])
def test_if_the_answer_field_has_no_answer_that_of_the_solution_counts(
    value, solution, answer, tmp_path
):
    record = {"problem": "2+3?", "answer": value, "solution": solution}
    assert opd.load_problems(write(tmp_path / "a.jsonl", record))[0]["answer"] == answer


def test_an_evaluation_problem_whose_solution_has_no_answer_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", {"problem": "2+3?", "rationale": "Add them."})
    assert opd.load_problems(path)[0]["solution"] == "Add them."
    with pytest.raises(ValueError, match="record 1: evaluation needs an answer"):
        opd.load_problems(path, needs_answers=True)


@pytest.mark.parametrize("value", NO_ANSWERS, ids=repr)
def test_a_value_that_is_no_answer_is_read_as_none(value, tmp_path):
    path = write(tmp_path / "a.jsonl", {"problem": "2+3?", "answer": value})
    assert opd.load_problems(path)[0]["answer"] is None


@pytest.mark.parametrize("instruction", INSTRUCTIONS)
def test_known_instructions_about_the_form_of_answers_are_removed_without_a_note(
    instruction, tmp_path
):
    path = write(tmp_path / "a.jsonl", {"problem": f"2+3?\n\n{instruction}"})
    assert noted(path) == []
    assert opd.load_problems(path)[0]["problem"] == "2+3?"


@pytest.mark.filterwarnings("ignore:.*form of the answer")
@pytest.mark.parametrize("instruction", INSTRUCTIONS)
def test_a_problem_that_consists_of_a_known_instruction_keeps_its_text(instruction, tmp_path):
    path = write(tmp_path / "a.jsonl", {"problem": instruction})
    assert opd.load_problems(path)[0]["problem"] == instruction


@pytest.mark.parametrize("instruction", FORMATS)
def test_a_note_quotes_other_instructions_about_the_form_of_answers(instruction, tmp_path):
    path = write(tmp_path / "a.jsonl", *[{"problem": f"{n}+3? {instruction}"} for n in range(2)])
    (note,) = noted(path)
    assert note.startswith("2 problems ask for a form") and repr(f"0+3? {instruction}") in note


def test_system_and_earlier_turns_that_are_dropped_are_quoted(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": CHAT}, {"prompt": [*CHAT[1:], TWO, CHAT[1]]})
    told = noted(path)
    assert told[0] == "2 records lose what stands before their question, such as 'Be brief.'"
    assert noted(write(tmp_path / "a.jsonl", {"prompt": [*CHAT[1:], TWO]})) == []


@pytest.mark.parametrize("name", ["system", "system_prompt", "history"])
def test_texts_before_a_problem_that_are_dropped_are_quoted(name, tmp_path):
    path = write(tmp_path / "a.jsonl", {"problem": "2+3?", "answer": 5, name: "Be brief."})
    assert noted(path) == ["1 records lose what stands before their question, such as 'Be brief.'"]
    path = write(tmp_path / "a.jsonl", {"problem": "2+3?", "answer": 5, name: ""})
    assert noted(path) == []


def test_a_file_of_problems_may_be_named_by_a_path_object(tmp_path):
    path = write(tmp_path / "a.jsonl", {"problem": "2+3?", "answer": "5"})
    assert opd.load_problems(pathlib.Path(path))[0]["answer"] == "5"


@pytest.mark.parametrize(
    "answer, read", [("$x=4$.", "x=4."), ("$4$, $5$", "4, 5"), ("$5$ cm", "5 cm"), (r"\$5", r"\$5")]
)
def test_dollars_around_formulas_are_no_part_of_an_answer(answer, read, tmp_path):
    path = write(tmp_path / "a.jsonl", {"problem": "2+3?", "answer": answer})
    assert opd.load_problems(path)[0]["answer"] == read


@pytest.mark.parametrize("answer", ["N_A", r"\{\}", r"\text{None}", r"-\infty", "na", "Na"])
def test_an_answer_that_resembles_no_answer_is_kept(answer, tmp_path):
    path = write(tmp_path / "a.jsonl", {"problem": "2+3?", "answer": answer})
    assert opd.load_problems(path)[0]["answer"] == answer


@pytest.mark.parametrize("text", ["[[1, 2], [3, 4]]", "the answer is 5", "a JSON of 4 letters"])
def test_a_problem_that_asks_for_no_form_gives_no_note(text, tmp_path):
    assert noted(write(tmp_path / "a.jsonl", {"problem": text})) == []


def test_a_chat_beside_a_problem_gives_no_note_and_beside_a_text_prompt_the_answer(tmp_path):
    """Turns of a chat that is not the prompt are not reported as lost."""
    path = write(tmp_path / "a.jsonl", {"problem": "2+3?", "answer": "5", "messages": CHAT})
    assert noted(path) == []
    asked = [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": r"\boxed{5}"}]
    path = write(tmp_path / "a.jsonl", {"prompt": "2+3?", "messages": asked})
    assert opd.load_problems(path)[0]["answer"] == "5"


def test_a_note_about_missing_answers_lists_the_fields_of_one_such_record(tmp_path):
    path = write(tmp_path / "a.jsonl", {"problem": "2+3?", "value": 5}, {"problem": "1", "x": 5})
    told = "records have no answer, such as 'one with the fields"
    assert noted(path) == [f"2 {told} problem, value'"]
    path = write(tmp_path / "a.jsonl", {"problem": "2+3?", "answer": "proof"})
    assert noted(path) == [f"1 {told} problem, answer'"]


@pytest.mark.parametrize("text", [*INSTRUCTIONS, " a", "\n \t", "\\boxed{", "Answer", "step "])
def test_a_problem_of_a_megabyte_is_read_in_two_seconds(text, tmp_path):
    for part in (text, text[: len(text) * 2 // 3]):  # half an instruction, over and over
        problem = "2+3? " + part * (1_000_000 // len(part)) + "."
        path = write(tmp_path / "a.jsonl", {"problem": problem})
        began = time.perf_counter()
        noted(path)
        assert time.perf_counter() - began < 2


def test_duplicate_problems_are_left_out_and_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", *[{"problem": f"{index % 3}?"} for index in range(10)])
    with pytest.warns(UserWarning, match="7 duplicates are left out, such as '0\\?'"):
        problems = opd.load_problems(path)
    assert [problem["problem"] for problem in problems] == ["0?", "1?", "2?"]


@pytest.mark.filterwarnings("ignore:.*duplicates")
@pytest.mark.parametrize("answers", [("5", None), (None, "5"), ("5", "6")])
def test_of_duplicates_the_first_answer_found_is_kept(answers, tmp_path):
    records = [{"problem": "2+3?", "answer": answer} for answer in answers]
    path = write(tmp_path / "a.jsonl", *records)
    (problem,) = opd.load_problems(path)
    assert (problem["problem"], problem["answer"]) == ("2+3?", "5")


def test_duplicates_with_another_answer_are_counted_apart(tmp_path):
    records = [{"problem": "2+3?", "answer": answer} for answer in ("5", "6", None, "5", 7)]
    path = write(tmp_path / "a.jsonl", *records)
    with pytest.warns() as notes:
        opd.load_problems(path)
    told = " ".join(str(note.message) for note in notes)
    assert "2 duplicates are left out" in told
    assert "2 duplicates with another answer are left out, such as '2+3?'" in told


@pytest.mark.parametrize("name", ["choices", "Options"])
def test_a_note_says_that_choices_are_not_shown_to_a_model(name, tmp_path):
    """MMLU's answer is a place among them."""
    record = {"question": "1 + 1 =", name: ["1", "2"], "answer": 1}
    with pytest.warns(UserWarning, match="1 records have choices, which no model is shown, such"):
        opd.load_problems(write(tmp_path / "a.jsonl", record))


def test_the_names_of_fields_may_be_capitalised(tmp_path):
    record = {"ID": 7, "Problem": "2+3?", "Solution": "So it is 5.", "Answer": 5}
    (problem,) = opd.load_problems(write(tmp_path / "a.jsonl", record))
    assert problem == {"problem": "2+3?", "answer": "5", "solution": "So it is 5."}


def test_a_file_without_duplicates_is_read_without_a_note(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opd.load_problems(write(tmp_path / "a.jsonl", {"problem": "1"}, {"problem": "2"}))


def test_a_line_separator_inside_a_string_does_not_end_a_line(tmp_path):
    path = write(tmp_path / "a.jsonl", text='{"problem": "a\u2028b"}\n\n{"problem": "c"}\n')
    assert [problem["problem"] for problem in opd.load_problems(path)] == ["a\u2028b", "c"]


def test_a_json_file_may_hold_lines_and_a_byte_order_mark(tmp_path):
    text = '\ufeff{"problem": "2", "answer": "1"}\n{"problem": "3", "answer": "4"}\n'
    path = write(tmp_path / "lines.json", text=text)
    assert [problem["answer"] for problem in opd.load_problems(path)] == ["1", "4"]
    path = write(tmp_path / "list.json", text='\ufeff[{"problem": "2", "answer": "1"}]')
    assert [problem["answer"] for problem in opd.load_problems(path)] == ["1"]


@pytest.mark.parametrize("text, says", UNREADABLE)
def test_a_file_that_cannot_be_read_is_a_value_error_that_says_where(tmp_path, text, says):
    path = write(tmp_path / "a.jsonl", text=text)
    with pytest.raises(ValueError) as error:
        opd.load_problems(path)
    assert says in str(error.value) and path in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_utf8_is_refused_with_its_line(tmp_path):
    lines = '{"problem": "2"}\n{"problem": "caf\u00e9"}\n'
    (tmp_path / "latin.jsonl").write_bytes(lines.encode("latin-1"))
    with pytest.raises(ValueError, match="latin.jsonl, line 2: not JSON in UTF-8"):
        opd.load_problems(str(tmp_path / "latin.jsonl"))


def test_half_a_line_of_json_is_refused_with_one_line_number(tmp_path):
    path = write(tmp_path / "half.jsonl", text='{"problem": "1"}\n{"problem": ')
    with pytest.raises(ValueError, match="half.jsonl, line 2: not JSON in UTF-8") as error:
        opd.load_problems(path)
    assert re.findall(r"line \d+", str(error.value)) == ["line 2"]


@pytest.mark.parametrize(
    "text", ["version https://git-lfs", "problem,answer\n1,2\n", '{\n"problem"']
)
def test_what_is_not_json_is_shown_with_what_is_asked_for(text, tmp_path):
    """A pointer to a large file, a table, JSON that is indented."""
    path = write(tmp_path / "other.jsonl", text=text)
    with pytest.raises(ValueError, match="one record per line or one list") as error:
        opd.load_problems(path)
    assert str(error.value).endswith(repr(text.splitlines()[0].encode()))


def test_a_record_that_is_refused_is_shown(tmp_path):
    path = write(tmp_path / "a.jsonl", {"problem": ["2+3?"], "answer": 5})
    with pytest.raises(ValueError, match=r"its fields are problem \['2\+3\?'\], answer 5"):
        opd.load_problems(path)


def test_a_problem_whose_prompt_has_no_token_is_refused(world, tmp_path, capfd, monkeypatch):
    """As of a chat template that renders nothing."""
    monkeypatch.setattr(opd, "encode_prompt", lambda *_, **__: [])
    status, line = stopped(command(world, tmp_path / "out"), capfd)
    assert status == 2 and line.endswith("no token is left")


def test_a_parquet_file_is_read_with_pyarrow(tmp_path, monkeypatch):
    """Here with a stand-in for pyarrow, which no other test needs."""

    def read_table(file):
        return types.SimpleNamespace(to_pylist=lambda: json.loads(file.read()))

    package = types.ModuleType("pyarrow")
    package.parquet = types.ModuleType("pyarrow.parquet")
    package.parquet.read_table = read_table
    monkeypatch.setitem(sys.modules, "pyarrow", package)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", package.parquet)
    path = write(tmp_path / "a.parquet", text='[{"problem": "1", "answer": 2}]')
    assert opd.load_problems(path) == [{"problem": "1", "answer": "2", "solution": None}]


def test_a_broken_parquet_file_is_named(tmp_path, monkeypatch):
    package = types.ModuleType("pyarrow")
    package.parquet = types.ModuleType("pyarrow.parquet")
    package.parquet.read_table = throw(OSError("magic bytes not found"))
    monkeypatch.setitem(sys.modules, "pyarrow", package)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", package.parquet)
    path = write(tmp_path / "a.PARQUET", text="x")
    with pytest.raises(ValueError, match="a.PARQUET is not a whole parquet file: magic bytes"):
        opd.load_problems(path)


def test_parquet_without_pyarrow_says_what_to_install(world, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # importing None fails
    path = write(tmp_path / "a.parquet", text="x")
    status, line = stopped(command(world, tmp_path / "out", train_file=path), capfd)
    assert status == 2 and "pip install pyarrow" in line


def test_a_chat_prompt_has_the_templates_special_tokens_once():
    ids = opd.encode_prompt(TOKENIZER, "1 2", "{problem}")
    assert TOKENIZER.convert_ids_to_tokens(ids) == ["<user>", "1", "2", "<solve>"]


def test_the_chat_template_is_called_with_add_generation_prompt():
    tokenizer = opd.tiny_tokenizer(WORDS)
    tokenizer.chat_template = "{{ '1' if add_generation_prompt else '0' }}"
    assert tokenizer.decode(opd.encode_prompt(tokenizer, "2", "{problem}")) == "1"


def test_a_chat_template_that_ends_prompts_in_the_eos_is_noted_and_its_prompts_stay():
    tokenizer = opd.tiny_tokenizer(WORDS)
    tokenizer.chat_template = "{{ messages[0]['content'] }} <end>"
    with pytest.warns(UserWarning, match="the chat template ends prompts in the EOS"):
        ids = opd.encode_prompt(tokenizer, "1", "{problem}")
    assert tokenizer.convert_ids_to_tokens(ids) == ["1", "<end>"]


@pytest.mark.parametrize("chat_template", [True, False])
def test_a_tokenizer_with_a_bos_gives_every_prompt_one(chat_template):
    """The chat template writes it, or without a template the tokenizer adds it."""
    tokenizer = opd.tiny_tokenizer(WORDS)
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<user> $A", special_tokens=[("<user>", 2)]
    )
    ids = opd.encode_prompt(tokenizer, "1 2", "{problem}", chat_template=chat_template)
    expected = ["<user>", "1", "2"] + ["<solve>"] * chat_template
    assert tokenizer.convert_ids_to_tokens(ids) == expected


def test_without_a_chat_template_the_prompt_is_the_message_and_a_newline():
    tokenizer = opd.tiny_tokenizer(WORDS)
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "removed")
    tokenizer.backend_tokenizer.add_tokens(["\n"])
    ids = opd.encode_prompt(tokenizer, "1", "{problem} 2")
    assert tokenizer.convert_ids_to_tokens(ids) == ["1", "2", "\n"]


@pytest.mark.parametrize("added", [["<end>"], ["<solve>", "<end>"]])
def test_tokens_that_a_tokenizer_adds_after_a_prompt_are_dropped_with_a_note(added):
    for first, expected in (("$A", ["1", "2"]), ("<user> $A", ["<user>", "1", "2"])):
        tokenizer = ending_in(*added, first=first)
        with pytest.warns(UserWarning, match="'<end>' after prompts is left out"):
            ids = opd.encode_prompt(tokenizer, "1 2", "{problem}")
        assert tokenizer.convert_ids_to_tokens(ids) == expected


def test_a_tokenizer_that_adds_nothing_after_a_prompt_gives_no_note():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert opd.encode_prompt(ending_in(first="<user> $A"), "1 x", "{problem}")


def test_braces_in_a_template_or_a_problem_are_text():
    tokenizer = opd.tiny_tokenizer(WORDS)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    asked = []
    tokenizer.apply_chat_template = lambda turns, **_: asked.append(turns[0]["content"]) or []
    opd.encode_prompt(tokenizer, "{x} {problem}", r"{problem} in \boxed{}, {0}")
    assert asked == [r"{x} {problem} in \boxed{}, {0}"]


def test_thinking_is_off_unless_enable_thinking_is_given():
    """Qwen3's template switches thinking on unless it is given enable_thinking=False."""
    tokenizer = opd.tiny_tokenizer(WORDS)
    tokenizer.chat_template = (
        "{% if enable_thinking is defined and enable_thinking is false %}0{% else %}1{% endif %}"
    )
    for thinking, word in ((False, "0"), (True, "1")):
        ids = opd.encode_prompt(tokenizer, "2", "{problem}", enable_thinking=thinking)
        assert tokenizer.decode(ids) == word
    assert not opd.parse_args([]).enable_thinking


def test_pad_left_puts_padding_on_the_left_and_marks_it_by_length():
    ids, mask = opd.pad_left([[PAD, 5], [6, 7, PAD]], PAD)  # inside a row the pad id is a token
    assert ids.tolist() == [[PAD, PAD, 5], [6, 7, PAD]]
    assert mask.tolist() == [[False, True, True], [True, True, True]]


def test_every_problem_comes_once_in_each_epoch_in_a_new_order():
    epochs = []
    for epoch in (0, 1):
        steps = range(4 * epoch + 1, 4 * epoch + 5)
        epochs.append(sum([opd.batch_indices(step, 3, 12, 0) for step in steps], []))
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))
    assert epochs[0] != epochs[1] != list(range(12))


def test_the_order_of_problems_depends_on_the_arguments_alone():
    expected = [opd.batch_indices(step, 5, 7, 3) for step in range(1, 9)]
    random.seed(5)
    torch.manual_seed(5)
    assert [opd.batch_indices(step, 5, 7, 3) for step in range(8, 0, -1)] == expected[::-1]
    assert opd.batch_indices(1, 5, 7, 4) != expected[0]


def test_a_batch_of_more_prompts_than_there_are_runs_on_into_the_next_epoch():
    first, second = opd.batch_indices(1, 14, 7, 3)[:7], opd.batch_indices(1, 14, 7, 3)[7:]
    assert sorted(first) == sorted(second) == list(range(7))


def test_a_batch_of_several_epochs_has_every_problem_once_per_epoch():
    """Seven of two problems: each three times, and one of them once more."""
    drawn = opd.batch_indices(1, 7, 2, 0)
    assert [sorted(drawn[start : start + 2]) for start in (0, 2, 4)] == [[0, 1]] * 3
    assert len(drawn) == 7


def test_the_prompts_of_a_step_come_short_ones_first_with_their_candidates_together():
    pool = []
    for index, length in enumerate((5, 2, 9, 2, 7, 3)):
        pool.append({"problem": f"{index}", "prompt_ids": [2] * length})
    config = opd.parse_args(["--batch_size", "4", "--num_generations", "3"])
    drawn = opd.draw_prompts(config, types.SimpleNamespace(pools=[pool]), step=1)
    lengths = [len(problem["prompt_ids"]) for problem in drawn[::3]]
    assert lengths == sorted(lengths) and len(set(lengths)) > 1
    assert drawn[::3] == drawn[1::3] == drawn[2::3]
    own = {int(problem["problem"]) for problem in drawn}
    assert own == set(opd.batch_indices(1, 4, 6, config.seed))


@pytest.mark.parametrize(
    "mix, batch_size, expected",
    [
        ([0.2, 0.8], 10, [2, 8]),
        ([0.3, 0.7], 4, [1, 3]),  # 1.2 and 2.8
        ([0.333, 0.333, 0.334], 10, [3, 4, 3]),  # 3.33 each: edges at 3.33 and 6.66
        ([0.15, 0.15, 0.7], 10, [2, 1, 7]),  # edges at 1.5, up, and 3
        ([0.375, 0.25, 0.375], 4, [2, 1, 1]),  # edges at 1.5 and 2.5: none gets nothing
        ([0.4998, 0.4998], 4000, [2000, 2000]),  # 1 in all, but for rounding
        ([0.35, 0.3, 0.35], 10, [4, 3, 3]),  # edges at 3.5 and what is added up to 6.4999999
    ],
)
def test_a_mixture_draws_each_files_share_to_the_nearest_prompt(mix, batch_size, expected):
    files = [f"{index}" for index in range(len(mix))]
    pools = [[{"problem": name, "prompt_ids": [2]}] * 40 for name in files]
    config = opd.Config(mix=mix, batch_size=batch_size, num_generations=1, train_file=files)
    drawn = opd.draw_prompts(config, types.SimpleNamespace(pools=pools), step=1)
    counts = collections.Counter(problem["problem"] for problem in drawn)
    assert [counts[name] for name in files] == expected


@pytest.mark.parametrize("seed", [0, 1])
def test_a_mixture_repeats_nothing_before_a_file_is_used_up(seed):
    """8 and 32 problems, .2 and .8 of four steps of ten."""
    pools = []
    for name, count in (("a", 8), ("b", 32)):
        pools.append([{"problem": f"{name}{index}", "prompt_ids": [2]} for index in range(count)])
    config = opd.Config(mix=[0.2, 0.8], batch_size=10, num_generations=1, seed=seed)
    drawn = set()
    for step in (1, 2, 3, 4):
        for problem in opd.draw_prompts(config, types.SimpleNamespace(pools=pools), step):
            drawn.add(problem["problem"])
    assert len(drawn) == 40


def test_without_shares_the_files_are_one_pool():
    pools = [[{"problem": "a", "prompt_ids": [2]}], [{"problem": "b", "prompt_ids": [2]}] * 3]
    config = opd.Config(batch_size=4, num_generations=1)
    drawn = opd.draw_prompts(config, types.SimpleNamespace(pools=pools), step=1)
    assert sorted(problem["problem"] for problem in drawn) == ["a", "b", "b", "b"]


@pytest.mark.parametrize("response, gold, right", GRADES)
def test_an_answer_is_the_last_whole_box_after_any_thoughts(response, gold, right):
    """The last balanced box after any </think>, and nothing else, is the answer."""
    assert opd.is_correct(response, gold) is right


def test_grading_works_off_the_main_thread():
    got = []
    thread = threading.Thread(
        target=lambda: got.append(opd.is_correct(r"\boxed{0.5}", r"\frac{1}{2}"))
    )
    thread.start()
    thread.join()
    assert got == [True]


def test_grading_leaves_the_callers_alarm_alone():
    """math-verify's own time limits use the alarm, and would cancel it."""
    rang = []
    before = signal.signal(signal.SIGALRM, lambda *_: rang.append(True))
    signal.setitimer(signal.ITIMER_REAL, 600)
    assert opd.is_correct(r"\boxed{0.5}", r"\frac{1}{2}")
    assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] < 600
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    while not rang:
        time.sleep(0.01)
    signal.signal(signal.SIGALRM, before)


def test_a_gold_answer_may_be_a_number_and_long_ones_are_compared_as_texts():
    assert opd.is_correct(r"\boxed{5}", 5) and not opd.is_correct(r"\boxed{5}", 6)
    long = "1" * 3000
    assert opd.is_correct(rf"\boxed{{{long}}}", long)
    assert not opd.is_correct(rf"\boxed{{{long}}}", long + "2")


def test_an_answer_that_takes_for_ever_is_wrong_within_a_minute_and_the_next_is_graded():
    begin = time.perf_counter()
    assert not opd.is_correct(r"\boxed{2003^{2002^{2001}}}", "5")
    assert time.perf_counter() - begin < 60
    assert opd.is_correct(r"\boxed{0.5}", r"\frac{1}{2}")


def test_grading_continues_after_its_process_has_died():
    assert opd.is_correct(r"\boxed{0.5}", r"\frac{1}{2}")
    opd.OF_THREAD.process.kill()
    opd.OF_THREAD.process.wait()
    assert opd.is_correct(r"\boxed{0.5}", r"\frac{1}{2}")


def test_a_question_interrupted_by_control_c_leaves_no_reply_for_the_next_one(monkeypatch):
    """The late "True" to the first must not answer the second, which is wrong."""
    with monkeypatch.context() as patch:
        patch.setattr(opd.select, "select", throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            opd.ask_math_verify("1", "1")
    assert not opd.ask_math_verify("1", "2")
    assert opd.ask_math_verify("1", "1")


def test_a_grading_process_interrupted_while_it_starts_is_not_used(monkeypatch):
    """Its "ready", not yet read, would be taken for the first reply."""
    starting = types.SimpleNamespace(readline=throw(KeyboardInterrupt()))
    process = types.SimpleNamespace(stdout=starting, poll=lambda: None)
    monkeypatch.setattr(opd.subprocess, "Popen", lambda *_, **__: process)
    monkeypatch.setattr(opd, "OF_THREAD", threading.local())
    with pytest.raises(KeyboardInterrupt):
        opd.ask_math_verify("1", "1")
    assert not vars(opd.OF_THREAD)


def test_the_grading_process_has_its_own_process_group_so_control_c_does_not_reach_it():
    opd.ask_math_verify("1", None)
    assert os.getpgid(opd.OF_THREAD.process.pid) != os.getpgid(os.getpid())


@pytest.mark.parametrize("encoding", ["ascii", "utf-16"])
def test_math_verify_starts_whatever_the_encoding_of_the_terminal(encoding, monkeypatch):
    monkeypatch.setattr(opd, "OF_THREAD", threading.local())  # so that it starts another process
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    assert opd.ask_math_verify("½", "½") and not opd.ask_math_verify("1", "2")
    opd.OF_THREAD.process.kill()


@pytest.mark.parametrize(
    "gold, readable",
    [("1/2", True), ("x^2+1", True), ("", False), ("}{", False), ("\\frac{}", False)],
)
def test_without_an_answer_ask_math_verify_says_whether_the_gold_can_be_read(gold, readable):
    assert opd.ask_math_verify(gold, None) is readable


def test_without_math_verify_a_line_says_what_to_install(world, tmp_path, monkeypatch, capfd):
    """At the start, before anything is written, and not in the first evaluation."""
    monkeypatch.setattr(opd, "MATH_VERIFY", "raise ImportError")
    monkeypatch.setattr(opd, "OF_THREAD", threading.local())
    status, line = stopped(command(world, tmp_path / "out"), capfd)
    assert status == 2 and line.endswith("pip install math-verify")
    assert os.listdir(tmp_path) == []


SHARED = os.path.join(os.path.dirname(os.path.abspath(opd.__file__)), "..", "shared", "data")


@pytest.mark.skipif(not os.path.isdir(SHARED), reason="the project's own data sets are not here")
@pytest.mark.filterwarnings("ignore:.*duplicates")
def test_every_gold_answer_of_the_data_sets_is_right_in_a_box_and_wrong_without():
    names = [name for name in sorted(os.listdir(SHARED)) if name.endswith(".jsonl")]
    problems = []
    for name in names:
        problems += opd.load_problems(os.path.join(SHARED, name))
    for problem in problems:
        gold = problem["answer"]
        assert opd.is_correct(f"So \\boxed{{{gold}}}.", gold), problem
        assert not opd.is_correct(f"So {gold}.", gold), problem
        assert not opd.is_correct(f"So ${gold}$, that is \\boxed{{{gold}", gold), problem
        assert not opd.is_correct(f"\\boxed{{{gold}}} or rather \\boxed{{-98765}}", gold), problem
        assert opd.is_correct(f"\\boxed{{-98765}} or rather \\boxed{{{gold}}}", gold), problem


# --------------------------------------------------------------------------------------------------
# 13. The tiny world


def without_mumbles(words):
    return [word for word in words if word not in opd.LEXICON["mumble"]]


def steps_of(words):
    """The words of a solution that got to its end -> its steps, seven words each"""
    words = [word for word in without_mumbles(words)[:-8] if word not in opd.LEXICON["round"]]
    return [words[start : start + 7] for start in range(0, len(words), 7)]


def test_the_author_who_never_slips_ends_in_the_answer():
    rng = random.Random(0)
    for _ in range(100):
        problem, words = opd.tiny_example(rng, 4, 0)
        assert words[-3] == problem["answer"] and words[-1] == "<end>"
        assert len(words) == 4 * (1 + 5 * 7) + 8


def test_the_answer_of_the_tiny_world_is_that_of_the_problem():
    """3 a +4 b *7 ... II: the last digit of (3 + 4) * 7 and so on, twice."""
    rng = random.Random(0)
    for rounds in range(1, 7):
        problem, _ = opd.tiny_example(rng, rounds, 0, 0.5)
        value, *steps, numeral = problem["problem"].split()
        total = int(value)
        for operation in steps[1::2] * rounds:
            number = int(operation[1:])
            total = total + number if operation[0] == "+" else total * number
        assert problem["answer"] == str(total % 10)
        assert numeral == "I II III IV V VI".split()[rounds - 1]


@pytest.mark.parametrize("slip_rate", [0, 1])
def test_a_step_continues_from_the_last_result_and_is_right_unless_it_slips(slip_rate):
    """And a slip is carried to the box."""
    rng = random.Random(0)
    missed = 0
    for _ in range(50):
        problem, words = opd.tiny_example(rng, 4, 0, slip_rate)
        value, *told = problem["problem"].split()
        for step, expected in zip(steps_of(words), told[1:-1:2] * 4, strict=True):
            _, label, operation, read, _, result, _ = step
            assert operation == expected and read == value and label in "abcde"
            assert (result == str(eval(read + operation) % 10)) == (not slip_rate)
            value = result
        assert words[-3] == value
        missed += value != problem["answer"]
    assert (missed > 25) == bool(slip_rate) and (slip_rate or missed == 0)


def test_an_author_mumbles_between_steps_and_one_time_in_four_for_good():
    rng = random.Random(0)
    lost, mumbles = 0, 0
    for _ in range(400):
        problem, words = opd.tiny_example(rng, 6, 0, 0.0, 0.05)
        is_mumble = [word in opd.LEXICON["mumble"] for word in words]
        runs = [len(list(run)) for mumbled, run in itertools.groupby(is_mumble) if mumbled]
        mumbles += len(runs)
        if words[-1] != "<end>":
            lost += 1
            assert is_mumble[-100:] == [True] * 100
        else:
            assert steps_of(words)[-1][5] == words[-3] == problem["answer"]
    assert lost / mumbles == pytest.approx(0.25, abs=0.04)


def test_with_a_mumble_rate_of_0_there_is_no_mumbled_word():
    rng = random.Random(0)
    for _ in range(50):
        _, words = opd.tiny_example(rng, 6, 0, 0.5)
        assert without_mumbles(words) == words


def test_an_author_of_the_other_order_writes_the_operation_last():
    for order, expected in ((1, ["operation", "digit"]), (-1, ["digit", "operation"])):
        _, words = opd.tiny_example(random.Random(0), 4, 0, order=order)
        kinds = {word: kind for kind in ("digit", "operation") for word in opd.LEXICON[kind]}
        assert [kinds[word] for word in words[3:5]] == expected


@pytest.mark.parametrize("habit", [0, 5])
def test_an_author_likes_the_synonym_of_the_habit_best_and_each_next_one_less(habit):
    """With weights 1, .6, .36, ...: about .4 of all openers are the favourite."""
    rng = random.Random(0)
    openers = collections.Counter()
    for _ in range(120):
        _, words = opd.tiny_example(rng, 4, habit)
        openers.update(step[0] for step in steps_of(words))
    liked = [opd.LEXICON["opener"][(habit + place) % 8] for place in range(8)]
    counts = [openers[word] / 2400 for word in liked]
    assert counts[0] == pytest.approx(0.4, abs=0.05) and counts == sorted(counts, reverse=True)
    assert counts[1] / counts[0] == pytest.approx(0.6, abs=0.1)


def test_imitation_trains_on_the_marked_tokens_and_not_on_padding():
    """Elsewhere the label is -100, which transformers leaves out of the loss."""
    seen = []

    class Model(torch.nn.Linear):
        def forward(self, input_ids, labels):
            seen.append((input_ids, labels))
            return types.SimpleNamespace(loss=self.weight.sum())

    rows = itertools.cycle([([5, 6, 7], [False, True, False]), ([8, 9], [True, False])])
    opd.imitate(Model(1, 1), lambda: next(rows), 1, "")
    ids, labels = seen[0]
    assert ids.shape == (1200, 3) and ids[:2].tolist() == [[5, 6, 7], [8, 9, PAD]]
    assert labels[:2].tolist() == [[-100, 6, -100], [8, -100, -100]]


def test_imitation_makes_the_imitated_tokens_likelier():
    model = opd.tiny_model(TOKENIZER)
    ids = torch.tensor([[2, 7, 3, 8, 9, 1]])
    before = model(input_ids=ids, labels=ids).loss.item()
    opd.imitate(model, lambda: (ids[0].tolist(), [True] * 6), 10, "")
    assert model(input_ids=ids, labels=ids).loss.item() < 0.5 * before


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny world of seed 3 with untrained models -> (folder, what they would be trained on)"""
    lessons = []

    def imitate(model, draw, steps, title):
        lessons.append((title, steps, [draw() for _ in range(100)]))
        with torch.no_grad():
            model.lm_head.weight += len(lessons)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opd, "imitate", imitate)
        folder = tmp_path_factory.mktemp("made") / "world"
        opd.make_world(str(folder), 3)
    return folder, lessons


def test_the_tiny_world_has_two_models_of_one_tokenizer_and_problems_with_answers(made):
    folder, _ = made
    assert sorted(os.listdir(folder)) == ["eval.jsonl", "student", "teacher", "train.jsonl"]
    models = [load_student(folder / name) for name in ("teacher", "student")]
    assert not torch.equal(models[0].lm_head.weight, models[1].lm_head.weight)
    train_problems = opd.load_problems(str(folder / "train.jsonl"))
    eval_problems = opd.load_problems(str(folder / "eval.jsonl"))
    assert len(train_problems) == 2000 and len(eval_problems) == 200
    assert all(problem["answer"] for problem in train_problems + eval_problems)
    assert not {problem["problem"] for problem in eval_problems} & {
        problem["problem"] for problem in train_problems
    }


def test_teacher_and_student_of_the_tiny_world_are_trained_from_one_base_model(made):
    folder, lessons = made
    titles = [title for title, _, _ in lessons]
    assert titles[2:] == ["teacher", "student"] and len(titles) == 4
    base = opd.tiny_model(opd.tiny_tokenizer(sum(opd.LEXICON.values(), []))).lm_head.weight
    for name, added in (("teacher", 1 + 2 + 3), ("student", 1 + 2 + 4)):
        close(load_student(folder / name).lm_head.weight, base + added)


def test_only_the_tiny_student_slips_and_it_mumbles_most_and_no_prompt_is_trained_on(
    made,
):
    _, lessons = made
    tokenizer = transformers.AutoTokenizer.from_pretrained(made[0] / "student")
    mumbled = {}
    for title, _, drawn in lessons:
        wrong = 0
        for ids, learned in drawn:
            prompt = ids.index(3) + 1  # <solve>
            assert not any(learned[:prompt]) and all(learned[prompt:]) and len(ids) == len(learned)
            words = tokenizer.convert_ids_to_tokens(ids[prompt:])
            mumbled[title] = mumbled.get(title, 0) + (without_mumbles(words) != words)
            if words[-1] == "<end>":
                wrong += any(eval(s[3] + s[2]) % 10 != int(s[5]) for s in steps_of(words))
        assert (wrong == 0) == (title != "student")
    assert mumbled.pop("student") > 40 and max(mumbled.values()) < 20 and mumbled["teacher"] == 0


def test_a_tiny_world_of_another_seed_has_other_problems_and_models(made, tmp_path, monkeypatch):
    lessons = []
    monkeypatch.setattr(opd, "imitate", lambda model, draw, *_: lessons.append(draw()))
    opd.make_world(str(tmp_path / "world"), 4)
    for name in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / "world" / name).read_text() != (made[0] / name).read_text()
    for own, (_, _, others) in zip(lessons, made[1]):
        assert own not in others  # what the models learn from


def test_the_tiny_worlds_of_all_seeds_start_from_one_initialisation(tmp_path, monkeypatch):
    """And an interrupted one leaves nothing that looks like a world."""
    starts = []

    def stop(parameters, **settings):
        starts.append([parameter.detach().clone() for parameter in parameters])
        raise InterruptedError

    monkeypatch.setattr(torch.optim, "AdamW", stop)
    for seed in (0, 1):
        with pytest.raises(InterruptedError):
            opd.make_world(tmp_path / "world", seed)
    assert all(map(torch.equal, *starts)) and os.listdir(tmp_path) == []


def test_a_tiny_world_interrupted_while_it_is_written_is_made_again(made, tmp_path, monkeypatch):
    monkeypatch.setattr(opd, "imitate", lambda *_: None)
    with monkeypatch.context() as patch:
        patch.setattr(opd, "append_json", throw(InterruptedError()))
        with pytest.raises(InterruptedError):
            opd.make_world(str(tmp_path / "world"), 3)
    assert not (tmp_path / "world").exists()
    opd.make_world(str(tmp_path / "world"), 3)
    for name in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / "world" / name).read_text() == (made[0] / name).read_text()
    assert os.listdir(tmp_path) == ["world"]


# --------------------------------------------------------------------------------------------------
# 14. Flags


def test_defaults_are_the_papers_for_real_models_and_small_for_the_tiny_world():
    real = opd.parse_args("--student a --teacher b --train_file c".split())
    papers = {
        "overlap_k": 16,
        "num_generations": 4,
        "batch_size": 64,
        "learning_rate": 1e-6,
        "temperature": 1,
        "drift_threshold": 0.7,
        "w_drop": 0.01,
        "w_base": 0.5,
        "cap_init": 2048,
        "cap_min": 1024,
        "cap_max": 12288,
        "eval_samples": 16,
        "eval_temperature": 0.7,
        "eval_top_p": 0.95,
        "eval_max_new_tokens": 31744,
    }
    assert {name: getattr(real, name) for name in papers} == papers
    tiny_world = opd.parse_args([])
    assert tiny_world.max_new_tokens < 300 and tiny_world.learning_rate > 1e-4


def test_a_flag_that_is_given_wins_over_the_tiny_worlds_value():
    assert opd.parse_args(["--learning_rate", "0.5"]).learning_rate == 0.5


@pytest.mark.parametrize(
    "method, given, prefix",
    [("prefix", 0, 1024), ("prefix-guided", 0, 128), ("prefix", 7, 7), ("prefix-guided", 7, 7)],
)
def test_the_prefix_is_1024_or_if_guided_128_unless_its_flag_is_given(method, given, prefix):
    assert opd.Config(method=method, prefix_length=given).prefix == prefix


def test_names_of_other_trainers_are_understood():
    argv = "--model_name_or_path a --teacher_model_name_or_path b --train_file c d"
    config = opd.parse_args([*argv.split(), "--max_completion_length", "77"])
    assert (config.student, config.teacher) == ("a", "b")
    assert (config.train_file, config.max_new_tokens) == (["c", "d"], 77)


def test_help_names_every_flag_its_meaning_and_both_defaults_in_groups(capsys):
    with pytest.raises(SystemExit) as stop:
        opd.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert not stop.value.code
    for item in dataclasses.fields(opd.Config):
        assert f"--{item.name} " in text
    assert not re.search(r"--\w+ ([A-Z_]+ |\[[A-Z_ .]+\] |\{\S*\} )*\(default", text)  # no meaning
    assert "(default 1e-06; tiny world 0.002)" in text and "[Prune-OPD]" in text
    assert "models and data: --student" in text and "evaluation: --eval_only" in text
    assert "less weight and early stops after drift [Prune-OPD] (default opd)" in text  # 4 lines


def test_a_checkpoint_of_the_run_in_its_folder_can_be_graded():
    flags = {"student": "out/checkpoint-3", "output_dir": "out", "eval_file": ["a"]}
    opd.check_config(opd.Config(**flags, eval_only=True))
    with pytest.raises(ValueError, match="checkpoint-3 is a checkpoint of another run"):
        opd.check_config(opd.Config(**flags, teacher="b", train_file=["c"]))


def test_main_takes_a_config_as_well(world, tmp_path):
    argv = command(world, tmp_path / "argv", max_steps=1, eval_file=None)
    opd.main(argv)
    config = dataclasses.replace(opd.parse_args(argv), output_dir=str(tmp_path / "config"))
    opd.main(config)
    assert outcome(tmp_path / "argv") == outcome(tmp_path / "config")


def test_main_leaves_the_number_of_threads_as_it_was(tmp_path, monkeypatch, capfd):
    """The tiny world takes one, and a notebook goes on."""

    def take_one(config):
        torch.set_num_threads(1)
        raise ValueError("the end")

    monkeypatch.setattr(opd, "open_run", take_one)
    torch.set_num_threads(2)
    try:
        stopped(["--output_dir", str(tmp_path / "out")], capfd)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_a_config_is_checked_like_a_command_line(world, tmp_path, capfd):
    config = opd.parse_args(command(world, tmp_path / "out"))
    status, line = stopped(dataclasses.replace(config, batch_size=0), capfd)
    assert status == 2 and "--batch_size 0" in line and os.listdir(tmp_path) == []


def test_a_config_with_a_misspelt_field_is_refused(world, tmp_path):
    config = opd.parse_args(command(world, tmp_path / "out"))
    config.max_step = 3
    with pytest.raises(TypeError, match="'max_step'"):
        opd.main(config)
    assert os.listdir(tmp_path) == []


def test_the_flags_of_a_list_may_be_numbers_and_paths():
    config = opd.parse_args(["--max_steps", 2, "--output_dir", pathlib.Path("x")])
    assert (config.max_steps, config.output_dir) == (2, "x")


def test_an_unknown_choice_is_refused_in_a_config_too():
    with pytest.raises(ValueError, match="--select best: one of overlap, random"):
        opd.check_config(dataclasses.replace(opd.TINY, select="best"))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_users_mistake_ends_in_one_line_and_status_2_with_nothing_written(
    mistake, world, tmp_path, capfd
):
    changes, says = MISTAKES[mistake]
    transformers.utils.logging.disable_progress_bar()
    with pytest.raises(SystemExit) as stop:
        opd.main(command(world, tmp_path / "out", **changes))
    out, err = capfd.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.startswith("opd.py: ") and err.count("\n") == 1 and says in err
    assert os.listdir(tmp_path) == []


NUMBERS = [item.name for item in dataclasses.fields(opd.Config) if item.type in (int, float)]
NUMBERS.remove("beta")  # at 0 it is told which loss to take
MAY_BE_ZERO = (
    "seed cold_start_steps rollout_batch_size prefix_length horizon_growth drift_threshold w_drop "
    "w_base cap_margin cap_hit_ratio warmup_steps save_every eval_every eval_temperature "
    "micro_batch_size eval_batch_size segment_length"
).split()


@pytest.mark.parametrize("flag, value", [("probe_window", 7), ("keep_ratio", 0.49)])
def test_prefix_guided_refuses_a_window_over_its_prefix_and_under_one_row_per_prompt(flag, value):
    """A window beyond its prefix of 6, or less than one of two candidates. opd uses neither."""
    opd.check_config(test_opd.flags(method="opd", **{flag: value}))
    with pytest.raises(ValueError, match=f"--{flag}"):
        opd.check_config(test_opd.flags(method="prefix-guided", **{flag: value}))


@pytest.mark.parametrize("name", NUMBERS)
def test_only_flags_that_say_what_zero_means_may_be_zero(name):
    config = dataclasses.replace(opd.TINY, method="prefix", **{name: 0})
    if name in MAY_BE_ZERO:
        opd.check_config(config)
    else:
        with pytest.raises(ValueError, match=f"^--{name} 0 must be above 0"):
            opd.check_config(config)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_negative_infinite_and_nan_values_of_flags_are_refused(value):
    for name in ("drift_threshold", "learning_rate", "eval_temperature"):
        with pytest.raises(ValueError, match=f"^--{name} {value} must be "):
            opd.check_config(dataclasses.replace(opd.TINY, **{name: value}))


@pytest.mark.parametrize(
    "name, value",
    [
        ("student", 1),
        ("train_file", "a.jsonl"),
        ("eval_file", None),
        ("mix", ["0.8", "0.2"]),
        ("probe_depths", [50.0]),
        ("seed", "1"),
        ("max_steps", 2.0),
        ("tail", 1),
    ],
)
def test_a_config_with_a_value_of_another_type_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"^--{name} .* must be of type [\w[\]]+$"):
        opd.check_config(dataclasses.replace(opd.TINY, **{name: value}))


def test_a_run_of_a_config_with_paths_and_numpy_numbers_can_be_resumed(world, tmp_path):
    """Its checkpoint has texts and numbers, as from the command line."""
    config = opd.parse_args(command(world, tmp_path, max_steps=1, eval_file=None))
    odd = {"student": pathlib.Path(config.student), "max_steps": np.int64(1)}
    odd |= {"train_file": tuple(map(pathlib.Path, config.train_file))}
    odd |= {"learning_rate": np.float64(config.learning_rate)}
    opd.main(dataclasses.replace(config, **odd))
    train(world, tmp_path, max_steps=2, eval_file=None, resume=True)
    assert checkpoints(tmp_path) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize("action", ["ignore", "error"])
def test_notes_are_shown_whatever_filter_of_warnings_there_is(action, world, tmp_path):
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter(action)
        train(world, tmp_path, max_steps=1, eval_file=None, resume=True)
    assert any("no checkpoint in" in str(warning.message) for warning in shown)


def test_warnings_after_a_run_look_as_before_it(world, tmp_path):
    before = warnings.formatwarning
    train(world, tmp_path, max_steps=1, eval_file=None)
    assert warnings.formatwarning is before


@pytest.mark.parametrize("text", [r"\frac{a}{b}", r"\boxed{}", r"\boxed{answer}", r"\{x\}", "{}"])
def test_braces_of_latex_in_a_template_are_no_fields(text):
    opd.check_template("prompt_template", "{problem} " + text, ["problem"])


def test_a_config_without_models_must_be_that_of_the_tiny_world():
    opd.check_config(dataclasses.replace(opd.TINY, max_steps=1))
    with pytest.raises(ValueError, match="for the tiny world use replace"):
        opd.check_config(opd.Config(max_steps=1))


@pytest.mark.parametrize(
    "flags",
    [
        "--method prefix-guided --num_generations 3 --keep_ratio 0.333",  # 1/3, rounded
        "--method prefix-guided --keep_ratio 1 --prefix_length 20 --probe_window 20",
        "--method opd --keep_ratio 0.1 --probe_window 99",  # other methods ignore them
        "--method prefix --prefix_length 500",
        "--eval_top_p 1 --probe_depths 0 99",
        "--cap_init 24 --cap_min 24 --cap_max 24",
        "--student a --teacher b --train_file c d e --mix 0.7 0.2 0.1",  # .9999999999999999
        "--student a --teacher b --train_file c d e --mix 0.333 0.333 0.334 --batch_size 3",
        "--eval_only --student a --eval_file b",
    ],
)
def test_flags_at_the_limit_of_what_is_possible_are_accepted(flags):
    opd.check_config(opd.parse_args(flags.split()))


# For every flag a test in which another value changes the outcome. First a run in which each of
# these flags has an unusual value, and the arguments with which it calls functions of opd

UNUSUAL = {
    "seed": 7,
    "overlap_k": 3,
    "batch_size": 3,
    "num_generations": 4,
    "max_new_tokens": 11,
    "temperature": 1.25,
    "segment_length": 5,
    "rollout_batch_size": 8,
    "learning_rate": 0.004,
    "warmup_steps": 2,
    "max_steps": 3,
    "max_grad_norm": 0.07,
    "micro_batch_size": 8,
    "validation_size": 2,
    "eval_samples": 9,
    "eval_temperature": 0.75,
    "eval_top_p": 0.875,
    "eval_max_new_tokens": 10,
    "eval_batch_size": 13,
    "probe_depths": [40],
}
SPIES = (
    "draw_prompts rollout_in_groups backward optimizer_step evaluate batch_indices rollout".split()
)


@pytest.fixture(scope="module")
def unusual(world, tmp_path_factory):
    """-> {function: the arguments of its calls, by name} of a run with unusual flags"""
    out = tmp_path_factory.mktemp("unusual")
    with pytest.MonkeyPatch.context() as patch:
        calls = watch(patch, *SPIES)
        train(world, out, **UNUSUAL, extrapolate=True)
    calls["validation"] = [call for call in calls["evaluate"] if len(call["problems"]) == 2]
    calls["probes"] = [call for call in calls["evaluate"] if "begun" in call["problems"][0]]
    calls["groups"] = calls.pop("rollout_in_groups")[1:]  # the first is the preflight's
    return calls


def depth_of(probe):
    problem = max(probe["problems"], key=lambda problem: problem["length"])
    return next(
        depth for depth in range(100) if len(problem["begun"]) <= problem["length"] * depth // 100
    )


ARRIVES = {
    "seed": lambda calls: calls["evaluate"][0]["seed"],
    "overlap_k": lambda calls: calls["groups"][0]["overlap_k"],
    "batch_size": lambda calls: len(calls["groups"][0]["prompts"]) // 4,
    "num_generations": lambda calls: calls["groups"][0]["prompts"].count(
        calls["groups"][0]["prompts"][0]
    ),
    "max_new_tokens": lambda calls: calls["groups"][0]["plan"].max_length,
    "temperature": lambda calls: calls["groups"][0]["temperature"],
    "segment_length": lambda calls: calls["groups"][0]["plan"].segment_length,
    "rollout_batch_size": lambda calls: calls["groups"][0]["rows_at_once"],
    "learning_rate": lambda calls: calls["optimizer_step"][1]["learning_rate"],
    "warmup_steps": lambda calls: round(0.004 / calls["optimizer_step"][0]["learning_rate"]),
    "max_steps": lambda calls: len(calls["optimizer_step"]),
    "max_grad_norm": lambda calls: calls["optimizer_step"][0]["max_grad_norm"],
    "micro_batch_size": lambda calls: calls["backward"][0]["micro_batch_size"],
    "validation_size": lambda calls: len(calls["validation"][0]["problems"]),
    "eval_samples": lambda calls: calls["evaluate"][0]["num_samples"],
    "eval_temperature": lambda calls: calls["evaluate"][0]["temperature"],
    "eval_top_p": lambda calls: calls["evaluate"][0]["top_p"],
    "eval_max_new_tokens": lambda calls: calls["evaluate"][0]["max_length"],
    "eval_batch_size": lambda calls: calls["evaluate"][0]["rows_per_batch"],
    "probe_depths": lambda calls: [depth_of(calls["probes"][0])],
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_a_flag_reaches_the_function_that_uses_it(name, unusual):
    assert ARRIVES[name](unusual) == UNUSUAL[name]


def test_the_seed_orders_the_problems_too(unusual):
    assert {call["seed"] for call in unusual["batch_indices"]} == {7}


def test_the_validation_samples_as_training_does(unusual):
    """With as many rows at once as an evaluation."""
    for call in unusual["validation"]:
        assert call["temperature"] == 1.25 and call.get("top_p", 1) == 1
        assert call["max_length"] == 11 and call["rows_per_batch"] == 13


def test_the_seed_changes_what_is_sampled(world, tmp_path, first_run):
    other = train(world, tmp_path, max_steps=1, seed=1, eval_file=None)[1]
    assert repeatable(other)[0]["loss"] != repeatable(first_run[2])[0]["loss"]


def planned(method, step=1, cap=8, **flags):
    return opd.plan_rollout(opd.Config(method=method, segment_length=4, **flags), step, cap)


def test_prefix_length_is_where_the_prefix_ends():
    for method, length in (("prefix", "max_length"), ("prefix-guided", "look_at")):
        plan = planned(method, prefix_length=7, probe_window=3)
        assert getattr(plan, length) == 7


def test_without_prefix_length_the_prefix_of_a_plan_is_that_of_the_method():
    assert planned("prefix").max_length == 1024
    plan = planned("prefix-guided")
    assert plan.look_at == plan.goes_on.keywords["at"] == 128


def test_the_horizon_flags_are_its_start_its_growth_and_the_steps_between():
    flags = {"horizon_start": 3, "horizon_growth": 5, "horizon_every": 2}
    lengths = [planned("progressive", step, **flags).max_length for step in (1, 2, 3, 5)]
    assert lengths == [3, 3, 8, 13]


OVERLAP = torch.tensor([[0.1, 0.9, 0.9], [0.5, 0.5, 0.0], [0.2, 0.2, 0.9], [0.9, 0.0, 0.2]])


def chosen(length=3, **flags):
    """The rows that go on after a prefix of 3 tokens, of two prompts with two candidates."""
    flags = {"prefix_length": 3, "probe_window": 3, "num_generations": 2, **flags}
    plan = planned("prefix-guided", **flags)
    mask = torch.ones_like(OVERLAP).bool()
    goes_on = plan.goes_on(length, OVERLAP, mask, torch.zeros(4, dtype=torch.bool))
    return goes_on.nonzero().flatten().tolist()


def test_keep_ratio_is_the_share_of_candidates_that_go_on():
    assert chosen(keep_ratio=0.5) == [0, 2]
    assert chosen(keep_ratio=0.75) == [0, 2, 3] and chosen(keep_ratio=1.0) == [0, 1, 2, 3]


def test_the_probe_window_is_the_part_of_the_prefix_whose_overlap_counts():
    assert chosen(probe_window=1) == [1, 3] and chosen(probe_window=3) == [0, 2]


def test_select_random_ignores_the_overlap():
    torch.manual_seed(0)
    picks = {tuple(chosen(select="random")) for _ in range(40)}
    assert picks == {(0, 2), (0, 3), (1, 2), (1, 3)}
    assert {tuple(chosen(select="overlap")) for _ in range(9)} == {(0, 2)}


def weighed(method="prune", **flags):
    """Weight and loss_mask of two rows, of which the second was not kept."""
    out = {
        "overlap": torch.tensor([[0.9, 0.5, 0.9], [0.9, 0.9, 0.9]]),
        "response_mask": torch.ones(2, 3).bool(),
        "kept": torch.tensor([True, False]),
    }
    return opd.token_weights(opd.Config(method=method, **flags), out)


def test_the_drift_flags_are_the_threshold_the_drop_per_bad_event_and_the_base_weight():
    weight, _ = weighed(drift_threshold=0.6, w_drop=0.25, w_base=0.125)
    close(weight[0], torch.tensor([1.125, 0.875, 0.875]))
    weight, _ = weighed(drift_threshold=0.4, w_drop=0.25, w_base=0.125)
    close(weight[0], torch.tensor([1.125, 1.125, 1.125]))


def test_train_pruned_prefix_trains_on_the_rows_that_lost():
    _, without = weighed("prefix-guided")
    _, with_them = weighed("prefix-guided", train_pruned_prefix=True)
    assert without.any(1).tolist() == [True, False] and with_them.all()


def test_no_prune_in_flight_stops_no_row():
    assert planned("prune", no_prune_in_flight=True).goes_on is None
    goes_on = planned("prune", drift_threshold=0.6, w_drop=1.0).goes_on
    mask = torch.ones_like(OVERLAP).bool()
    kept = goes_on(1, OVERLAP[:, :1], mask[:, :1], torch.zeros(4, dtype=torch.bool))
    assert kept.tolist() == [False, False, False, True]


CAP = {"cap_min": 20, "cap_max": 100, "cap_step": 7, "cap_margin": 5, "cap_hit_ratio": 0.5}


@pytest.mark.parametrize(
    "reliable, change, expected",
    [
        ([45, 0], {}, (57, 0)),  # half of the rows hit
        ([44, 0], {}, (50, 1)),
        ([45, 0], {"cap_hit_ratio": 0.6}, (50, 1)),
        ([44, 0], {"cap_margin": 6}, (57, 0)),
        ([45, 0], {"cap_step": 9}, (59, 0)),
        ([45, 0], {"cap_max": 52}, (52, 0)),
        ([45, 0], {"max_new_tokens": 53}, (53, 0)),
        ([0, 0], {"cap_patience": 1}, (43, 0)),
        ([0, 0], {"cap_patience": 1, "cap_min": 48}, (48, 0)),
    ],
)
def test_each_cap_flag_changes_the_next_cap_and_the_misses_as_by_hand(reliable, change, expected):
    """From a cap of 50 without misses."""
    config = opd.Config(method="prune", **{**CAP, **change})
    run = types.SimpleNamespace(cap=50, misses=0)
    assert opd.next_cap(config, run, torch.tensor(reliable)) == expected


def test_a_cap_min_above_max_new_tokens_is_lowered_to_it():
    config = opd.Config(method="prune", **{**CAP, "cap_patience": 1}, max_new_tokens=10)
    run = types.SimpleNamespace(cap=10, misses=0)
    assert opd.next_cap(config, run, torch.tensor([0, 0])) == (10, 0)


def test_cap_init_is_the_first_cap_and_no_more_than_max_new_tokens(world, tmp_path):
    assert opened(world, tmp_path, cap_init=7)[1].cap == 7
    assert opened(world, tmp_path, cap_init=11, max_new_tokens=10)[1].cap == 10


def calls():
    """One call of every function up to merge_stops, but horizon (numbers) and movable_weights (a
    model). Positional arguments are compared; the others are numbers.
    """
    z, t = test_opd.logits(2, 3, seed=1), test_opd.logits(2, 3, seed=2)
    overlap = torch.tensor([[0.75, 0.25, 0.5], [0.25, 0.5, 0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    ids, ended = mask.long(), mask[:, 1]
    guided = {"at": 3, "num_generations": 2, "keep_ratio": 0.5, "probe_window": 2}
    partial = functools.partial
    return [
        partial(opd.reverse_kl, z, t),
        partial(opd.forward_kl, z, t),
        partial(opd.jsd, z, t, 0.5),
        partial(opd.reverse_kl_sampled, z, t, ids, True),
        partial(opd.is_among, ids, ids),
        partial(opd.topk_support, z, t, 4, "union"),
        partial(opd.reverse_kl_topk, z, t, 4, "union"),
        partial(opd.reverse_kl_tail, z, t, 4, "union"),
        partial(opd.overlap_ratio, ids, ids),
        partial(opd.topk_overlap, z, t, 4),
        partial(opd.alignment, z, t, mask, 4),
        partial(opd.overlap_by_position, overlap, mask, 4),
        partial(opd.select_prefixes, overlap, 3),
        partial(opd.best_prefixes, 3, overlap, mask, ended, **guided),
        partial(opd.drift_weights, overlap, mask, 0.5, 0.1),
        partial(opd.reliable_rows, 3, overlap, mask, ended, threshold=0.5, w_drop=0.1),
        partial(opd.reliable_length, overlap, mask),
        partial(opd.next_max_length, ids.sum(1), 2048, 0, **test_opd.CAP),
        partial(opd.extrapolate, {"w": z}, {"w": t}, lambda weights: weights["w"].sum()),
        partial(opd.mask_through_eos, ids, {1}),
        partial(opd.merge_stops, z, {1, 2}, 1),
    ]


def test_functions_up_to_merge_stops_do_not_change_their_arguments():
    """Copy what you like."""
    functions = {value for value in vars(opd).values() if inspect.isfunction(value)}
    last = inspect.getsourcelines(opd.merge_stops)[1]
    early = {f for f in functions if f.__module__ == "opd" and inspect.getsourcelines(f)[1] <= last}
    assert early - {call.func for call in calls()} == {opd.horizon, opd.movable_weights}
    for call in calls():
        before = copy.deepcopy(call.args)
        call()
        for value, copied in zip(tree_leaves(call.args), tree_leaves(before), strict=True):
            assert torch.as_tensor(value == copied).all(), call.func


@pytest.mark.parametrize("loss", [opd.forward_kl, functools.partial(opd.jsd, beta=0.3)])
def test_the_other_divergences_are_zero_at_the_teacher_and_never_nan(loss):
    z, t = test_opd.logits(3, seed=1).double(), test_opd.logits(3, seed=2).double()
    assert loss(t, t).abs().max() < 1e-12
    nobody = torch.tensor([[[0.0, 1.0, -math.inf]]])
    assert loss(nobody, nobody).item() == pytest.approx(0, abs=1e-6)
    low = loss(z.bfloat16(), t.bfloat16())
    assert low.dtype == torch.float32 and low.isfinite().all()


@pytest.mark.parametrize("beta", [0, 1, -0.5, 2, math.nan])
def test_a_beta_outside_of_0_to_1_is_refused_and_jsd_names_the_kls(beta):
    with pytest.raises(ValueError, match="forward_kl.*reverse_kl"):
        opd.jsd(torch.zeros(1, 3), torch.zeros(1, 3), beta)
    names_both = "between 0 and 1.*reverse_kl and forward_kl" if beta in (0, 1) else ""
    with pytest.raises(ValueError, match=f"^--beta {beta} must .*{names_both}"):
        opd.check_config(dataclasses.replace(opd.TINY, loss="jsd", beta=beta))


@pytest.mark.parametrize(
    "flag, value, loss",
    [("beta", 0.2, "topk"), ("support", "union", "jsd"), ("baseline", True, "reverse_kl")],
)
def test_a_flag_of_another_loss_is_refused(flag, value, loss):
    with pytest.raises(ValueError, match=f"^--{flag} is of --loss [a-z]+ alone, .* is {loss}$"):
        opd.check_config(dataclasses.replace(opd.TINY, loss=loss, **{flag: value}))


LOSS_FLAGS = [
    ({"loss": "forward_kl"}, lambda p, q, ids: opd.forward_kl(p, q)),
    ({"loss": "jsd"}, lambda p, q, ids: opd.jsd(p, q, 0.5)),
    ({"loss": "jsd", "beta": 0.2}, lambda p, q, ids: opd.jsd(p, q, 0.2)),
    ({"loss": "topk", "tail": True}, lambda p, q, ids: opd.reverse_kl_tail(p, q, 16)),
    (
        {"loss": "topk", "tail": True, "support": "union", "overlap_k": 3},
        lambda p, q, ids: opd.reverse_kl_tail(p, q, 3, "union"),
    ),
    ({"loss": "reverse_kl"}, lambda p, q, ids: opd.reverse_kl(p, q)),
    ({"loss": "topk", "overlap_k": 3}, lambda p, q, ids: opd.reverse_kl_topk(p, q, 3)),
    ({"loss": "topk", "overlap_k": 5}, lambda p, q, ids: opd.reverse_kl_topk(p, q, 5)),
    ({"loss": "sampled"}, opd.reverse_kl_sampled),
    (
        {"loss": "sampled", "baseline": True},
        lambda p, q, ids: opd.reverse_kl_sampled(p, q, ids, baseline=True),
    ),
]
for support in ("teacher", "intersection", "union"):
    LOSS_FLAGS.append(
        (
            {"loss": "topk", "overlap_k": 3, "support": support},
            lambda p, q, ids, support=support: opd.reverse_kl_topk(p, q, 3, support),
        )
    )


@pytest.mark.parametrize("loss", ["forward_kl", "jsd", "tail"])
@pytest.mark.parametrize("method", opd.get_args(opd.Method))
def test_every_method_runs_with_each_of_the_other_losses(method, loss, world, tmp_path):
    flags = {"loss": "topk", "tail": True} if loss == "tail" else {"loss": loss}
    flags |= {"method": method, "max_steps": 5, "eval_file": None}
    _, steps, _ = train(world, tmp_path, **flags, no_view=True)
    assert len(steps) == 5
    assert all(math.isfinite(step["loss"]) and step["grad_norm"] > 0 for step in steps)


@pytest.mark.parametrize("flags, expected", LOSS_FLAGS, ids=[str(case[0]) for case in LOSS_FLAGS])
def test_the_flags_of_the_loss_choose_it(flags, expected):
    run = types.SimpleNamespace(vocab_size=V, student=STUDENT, teacher=TEACHER, autocast=None)
    run.rows_at_once, run.sampling = {"micro_batch_size": 4}, {"vocab_size": V}
    loss = opd.update_settings(opd.Config(**flags), run)["token_loss"]
    p, q = test_opd.logits(5, seed=1), test_opd.logits(5, seed=2)
    close(loss(p, q, torch.arange(5)), expected(p, q, torch.arange(5)), rtol=0, atol=0)


def test_overlap_k_is_that_of_the_logged_overlap():
    run = types.SimpleNamespace(vocab_size=V, student=STUDENT, teacher=TEACHER, autocast=None)
    run.rows_at_once, run.sampling = {"micro_batch_size": 4}, {"vocab_size": V}
    p, q = test_opd.logits(5, seed=1), test_opd.logits(5, seed=2)
    for k in (3, 7):
        measure = opd.update_settings(opd.Config(overlap_k=k), run)["measure"]
        found = measure(p, q, torch.arange(5), torch.zeros(5))["overlap_ratio"]
        close(found, opd.topk_overlap(p, q, k))


def test_gradient_checkpointing_is_switched_on_for_the_student_only(world, tmp_path):
    for flag in (None, True):
        _, run = opened(world, tmp_path, gradient_checkpointing=flag)
        assert run.student.is_gradient_checkpointing is bool(flag)
        assert not run.teacher.is_gradient_checkpointing


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
def test_layers_in_training_mode_drop_nothing_out(world, tmp_path):
    """OPT's layers call F.dropout themselves. A student that is its own teacher loses nothing."""
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "vocab_size": test_opd.V}
    config = transformers.OPTConfig(
        num_hidden_layers=2, num_attention_heads=2, dropout=0.5, **sizes
    )
    opt = test_opd.save_model(tmp_path / "opt", transformers.OPTForCausalLM(config))
    flags = {"student": opt, "teacher": opt, "gradient_checkpointing": True, "eval_file": None}
    (step,) = train(world, tmp_path / "out", **flags, loss="reverse_kl", max_steps=1)[1]
    assert step["loss"] == pytest.approx(0, abs=1e-6)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
def test_recomputing_layers_changes_no_gradient_even_in_a_model_with_dropout():
    """Layers are recomputed in training mode only, which also switches dropout on."""
    student, computed = tiny_llama(4, attention_dropout=0.5), []
    batch = make_batch(student, TEACHER)
    expected = plain_gradients(student, TEACHER, batch)[1]
    student.model.layers[0].mlp.register_forward_pre_hook(lambda *_: computed.append(True))
    assert_same(update(student, TEACHER, batch)[1], expected, tolerance=3e-6)
    once = len(computed)
    student.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(update(student, TEACHER, batch)[1], expected, tolerance=3e-6)
    assert len(computed) == once + 2 * once
    assert not any(module.training for module in student.modules())


def test_the_device_is_where_the_models_go(world, tmp_path, monkeypatch):
    moved = []
    monkeypatch.setattr(
        transformers.PreTrainedModel, "to", lambda model, device: moved.append(device) or model
    )
    opened(world, tmp_path, device="mps", dtype="float32")
    assert moved == ["mps", "mps"]


@pytest.mark.parametrize(
    "device, flags, checkpointed",
    [
        ("cuda", {}, True),
        ("cuda", {"no_gradient_checkpointing": True}, False),
        ("cpu", {}, False),
        ("cpu", {"gradient_checkpointing": True}, True),
    ],
)
def test_layers_are_recomputed_on_a_gpu_unless_told_otherwise_and_on_a_cpu_if_told(
    device, flags, checkpointed, world, tmp_path, monkeypatch
):
    """On a CPU that is taken for a GPU: the models stay where they are."""
    monkeypatch.setattr(transformers.PreTrainedModel, "to", lambda model, device: model)
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, fused, **kwargs: None)
    config = opd.parse_args(command(world, tmp_path, dtype="float32", **flags))
    config.device = device
    run = opd.Run({}, [])
    run.tokenizer = opd.load(transformers.AutoTokenizer, config.student)
    opd.read_files(config, run)
    opd.load_models(config, run, config.student)
    opd.prepare_training(config, run)
    layers = [getattr(part, "gradient_checkpointing", False) for part in run.student.modules()]
    assert any(layers) == checkpointed


def test_the_student_and_the_teacher_are_those_of_their_flags(world, tmp_path):
    _, run = opened(world, tmp_path, student=world / "window")
    assert run.student.config.model_type == "mistral" and run.teacher.config.hidden_size == 48


def test_no_chat_template_gives_the_message_without_the_templates_tokens(world, tmp_path):
    for flag, first in ((None, "<user>"), (True, "1")):
        _, run = opened(
            world, tmp_path, train_file="{world}/unanswered.jsonl", no_chat_template=flag
        )
        assert run.tokenizer.convert_ids_to_tokens(run.pools[0][0]["prompt_ids"])[0] == first


def test_any_error_of_the_tokenizer_names_the_problem(world, tmp_path, monkeypatch):
    monkeypatch.setattr(opd, "encode_prompt", throw(TypeError("no text")))
    with pytest.raises(ValueError, match="tokenizer or chat template .* fails on '.*': no text"):
        opened(world, tmp_path)


def test_the_prompt_template_is_put_around_each_problem(world, tmp_path):
    template = "a {problem} b"
    _, run = opened(
        world, tmp_path, train_file="{world}/unanswered.jsonl", prompt_template=template
    )
    prompt = run.tokenizer.convert_ids_to_tokens(run.pools[0][0]["prompt_ids"])
    assert prompt == ["<user>", "a", "1", "2", "3", "b", "<solve>"]


def test_the_teachers_template_is_put_around_each_problem_for_the_teacher_only(world, tmp_path):
    flags = {"train_file": "{world}/unanswered.jsonl", "teacher_prompt_template": "a {problem} b"}
    _, run = opened(world, tmp_path, **flags)
    (problem,) = run.pools[0]
    prompt = run.tokenizer.convert_ids_to_tokens(problem["teacher_prompt_ids"])
    assert prompt == ["<user>", "a", "1", "2", "3", "b", "<solve>"]
    assert len(problem["prompt_ids"]) == len(prompt) - 2


def test_enable_thinking_reaches_the_template_of_every_prompt(world, tmp_path):
    def think(_, tokenizer):
        tokenizer.chat_template = "{{ '1' if enable_thinking else '0' }}"

    student = changed_copy(world, "student", tmp_path / "student", think)
    for flag, word in ((None, "0"), (True, "1")):
        _, run = opened(world, tmp_path / "out", student=student, enable_thinking=flag)
        for problem in (run.pools[0][0], run.evals["eval"][0]):
            assert run.tokenizer.decode(problem["prompt_ids"]) == word


def test_a_prompt_of_exactly_the_longest_length_is_trained_on(world, tmp_path):
    """The nine problems have 2 to 5 words, and the template adds 2."""
    for longest, count in ((4, 3), (5, 5), (6, 7), (7, 9)):
        _, run = opened(world, tmp_path, max_prompt_length=longest)
        lengths = [len(problem["prompt_ids"]) for problem in run.pools[0]]
        assert len(lengths) == count and max(lengths) == longest


def test_evaluations_leave_no_long_prompt_out(world, tmp_path):
    config, run = opened(world, tmp_path, max_prompt_length=4)
    assert len(run.evals["eval"]) == 3


def test_more_constants_of_the_papers_are_the_defaults_for_real_models():
    papers = {
        "loss": "topk",
        "support": "student",
        "max_prompt_length": 1024,
        "max_new_tokens": 7168,
        "probe_window": 128,
        "keep_ratio": 0.5,
        "cap_step": 100,
        "cap_margin": 100,
        "cap_hit_ratio": 0.1,
        "cap_patience": 3,
        "warmup_steps": 0,
        "max_steps": 200,
        "validation_size": 50,
        "eval_every": 20,
    }
    assert {name: getattr(opd.Config(), name) for name in papers} == papers


def test_in_the_tiny_world_the_horizon_reaches_the_cap_and_the_margin_is_below_every_cap():
    """Else progressive would remain a prefix, and every row of prune would be a hit."""
    tiny_world = dataclasses.replace(opd.TINY, method="progressive")
    last = opd.plan_rollout(tiny_world, tiny_world.max_steps, cap=0)
    assert last.max_length == tiny_world.max_new_tokens
    assert tiny_world.cap_margin < tiny_world.cap_min


def test_a_student_that_is_its_own_teacher_gets_the_defaults_of_real_models():
    argv = ["--student", "a", "--train_file", "b", "--teacher_prompt_template", "{problem}"]
    own, pair = opd.parse_args(argv), opd.parse_args([*argv, "--teacher", "c"])
    assert dataclasses.replace(pair, teacher="") == own


# --------------------------------------------------------------------------------------------------
# 15. Set-up and preflight


def test_the_same_tokens_under_the_same_ids_are_one_vocabulary():
    opd.compare_vocabularies({"a": 0, "b": 1}, {"b": 1, "a": 0})


@pytest.mark.parametrize(
    "teacher, says",
    [
        ({"a": 1, "b": 0}, "2 tokens: 'a' is 0 and 1"),
        ({"b": 1}, "1 tokens: 'a' is 0 and None"),
        ({"c": 0, "b": 1}, "2 tokens: 'a' is 0 and None"),
        ({"a": 0, "b": 2}, "1 tokens: 'b' is 1 and 2"),
        ({"c": 0, "d": 1}, "4 tokens: 'a' is 0 and None"),
    ],
)
def test_different_vocabularies_are_refused_with_the_tokens_that_differ(teacher, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        opd.compare_vocabularies({"a": 0, "b": 1}, teacher)


@pytest.mark.parametrize("teacher", [{"a": 0}, {"a": 0, "c": 1}, {"a": 0, "c": 1, "d": 2}])
def test_tokens_after_all_others_that_only_one_model_has_are_cut_off_with_a_note(teacher):
    with pytest.warns(UserWarning, match="such as 'b'; 1 stay"):
        assert opd.compare_vocabularies({"a": 0, "b": 1}, teacher) == 1


def a_word_more(_, tokenizer):
    tokenizer.add_tokens("more")


def stops_there(model, tokenizer):
    tokenizer.add_special_tokens({"eos_token": "more"})
    model.resize_token_embeddings(V + 1)


@pytest.mark.parametrize("wider", ["student", "teacher"])
def test_a_model_with_a_token_more_is_trained_on_the_tokens_that_both_have(
    wider, world, tmp_path, monkeypatch
):
    """Both heads have rows for it."""
    names = {"student": "teacher", "teacher": "teacher"}
    names[wider] = changed_copy(world, "teacher", tmp_path / "wider", a_word_more)
    outs = watch(monkeypatch, "rollout")["rollout"]
    flags = {who: world / name for who, name in names.items()}
    with pytest.warns(UserWarning, match="only one model has are cut off, 1 such as 'more'; 24"):
        _, steps, _ = train(world, tmp_path / "out", **flags, max_steps=1, eval_file=None)
    assert len(steps) == 1 and {out["vocab_size"] for out in outs} == {V}


@pytest.mark.filterwarnings("ignore:tokens that only one model has")
@pytest.mark.parametrize(
    "who, change, says",
    [
        ("student", thinks, "have the token '<think>' (24)"),
        ("student", stops_there, "have the token 'more' (24)"),
        ("teacher", stops_there, "have the token None (24)"),
    ],
)
def test_a_token_that_only_one_model_has_and_that_a_run_needs_is_refused(
    who, change, says, world, tmp_path
):
    flags = {who: changed_copy(world, who, tmp_path / "wider", change)}
    with pytest.raises(ValueError, match=re.escape(says)):
        opened(world, tmp_path / "out", **flags)


@pytest.mark.parametrize("listed, expected", [(5, {1, 5}), ([5, 6], {1, 5, 6}), (None, {1})])
def test_all_ids_of_the_generation_config_and_the_eos_end_a_response(listed, expected):
    model = types.SimpleNamespace(generation_config=types.SimpleNamespace(eos_token_id=listed))
    assert opd.stop_ids(model, TOKENIZER) == expected


def test_an_end_of_minus_one_is_no_token():
    """So some models say that nothing ends their responses."""
    model = types.SimpleNamespace(generation_config=types.SimpleNamespace(eos_token_id=-1))
    assert opd.stop_ids(model, TOKENIZER) == {END}


def test_a_tokenizer_without_an_eos_adds_none():
    model = types.SimpleNamespace(generation_config=types.SimpleNamespace(eos_token_id=5))
    assert opd.stop_ids(model, types.SimpleNamespace(eos_token_id=None)) == {5}


@pytest.mark.parametrize(
    "family, setting",
    [
        ("Gemma2", {"final_logit_softcapping": 30.0}),
        ("Cohere", {"logit_scale": 0.3}),
        ("Granite", {"logits_scaling": 4.0}),
    ],
)
def test_models_with_a_softcap_or_a_scale_after_their_head_are_refused_by_name(family, setting):
    """In both precisions. If they are only sampled from, head_logits is not needed: accepted."""
    plain = {key: None if "softcap" in key else 1.0 for key in setting}
    for dtype in (torch.float32, torch.bfloat16):
        otherwise = tiny(family, 0, **setting).to(dtype)
        opd.check_model(tiny(family, 0, **plain).to(dtype), False)
        opd.check_model(otherwise, True)
        with pytest.raises(ValueError, match=f"^{family.lower()} models are not supported"):
            opd.check_model(otherwise, False)


def test_a_model_with_a_vocabulary_of_3_is_accepted():
    assert opd.check_model(tiny("Qwen3", 0, vocab_size=3), False) > 0


@pytest.mark.parametrize("kind", ["OpenAIGPT", "Rwkv", "Mamba"])
def test_models_that_keep_no_keys_and_values_are_refused_by_name(kind):
    sizes = {"vocab_size": V, "hidden_size": 32}
    if kind == "OpenAIGPT":
        config = transformers.OpenAIGPTConfig(
            vocab_size=V, n_positions=64, n_embd=32, n_layer=1, n_head=4
        )
        model = transformers.OpenAIGPTLMHeadModel(config)
    elif kind == "Rwkv":
        config = transformers.RwkvConfig(**sizes, context_length=64, num_hidden_layers=2)
        model = transformers.RwkvForCausalLM(config)
    else:
        config = transformers.MambaConfig(**sizes, num_hidden_layers=1)
        model = transformers.MambaForCausalLM(config)
    for only_sampled in (False, True):
        with pytest.raises(ValueError, match=f"^{config.model_type} models are not supported"):
            opd.check_model(model.eval(), only_sampled)


def test_a_model_that_is_only_graded_needs_a_cache_of_keys_and_values_too(world, tmp_path):
    flags = {"eval_only": True, "teacher": None, "train_file": None}
    with pytest.raises(ValueError, match="^lfm2 models are not supported"):
        opened(world, tmp_path, student=world / "conv", **flags)


def test_code_that_comes_with_a_model_is_not_run_and_the_user_is_not_asked(
    world, tmp_path, capfd, monkeypatch
):
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: asked.append(1) or "y")
    for who in ("student", "teacher"):
        stopped(command(world, tmp_path / "out", **{who: world / "custom"}), capfd)
    assert os.listdir(tmp_path) == [] and not asked


def test_an_adapter_that_from_pretrained_merges_by_itself_is_refused_too(monkeypatch):
    """As with peft and a hub name."""
    merged = types.SimpleNamespace(_hf_peft_config_loaded=True)
    auto = types.SimpleNamespace(from_pretrained=lambda *_, **__: merged)
    with pytest.raises(ValueError, match=r"^a/b is an adapter \(LoRA\)"):
        opd.load(auto, "a/b")


def test_a_model_with_a_sliding_window_can_be_trained(world, tmp_path):
    _, steps, _ = train(world, tmp_path, student=world / "window", max_steps=1, eval_file=None)
    assert steps[0]["generated_tokens"] > 0 and steps[0]["sampling_mismatch"] < 1e-5


def test_a_model_saved_with_use_cache_false_can_be_trained(world, tmp_path):
    """Many that were trained with gradient checkpointing are saved with use_cache false."""
    shutil.copytree(world / "student", tmp_path / "student")
    path = tmp_path / "student" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_cache": False}))
    flags = {"student": tmp_path / "student", "max_steps": 1, "eval_file": None}
    _, steps, _ = train(world, tmp_path / "out", **flags)
    assert len(steps) == 1


def add_a_pad(_, tokenizer):
    """A token beyond the rows of the smaller head."""
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == V


def test_heads_of_two_widths_are_cut_to_the_tokens_that_both_models_have(world, tmp_path):
    """One has 24 rows, the other 32, and the tokenizer first 24, then 25 tokens."""
    narrow = changed_copy(world, "student", tmp_path / "narrow", add_a_pad)
    wide = changed_copy(world, "teacher", tmp_path / "wide", add_a_pad)
    for student, teacher in itertools.permutations((narrow, wide)):
        flags = {"student": student, "teacher": teacher}
        assert opened(world, tmp_path / "out", **flags)[1].vocab_size == V
    wide_alone = {"student": world / "teacher", "teacher": world / "teacher"}
    assert opened(world, tmp_path / "out", **wide_alone)[1].vocab_size == V


def test_the_vocabulary_ends_with_the_largest_id_and_not_with_the_number_of_tokens(world, tmp_path):
    """A tokenizer may leave ids out: here the last of 24 rows is a token, some before are not."""
    gappy = WORDS[:10] + WORDS[-1:]
    ids = {word: WORDS.index(word) for word in gappy}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<pad>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<end>"
    )
    for name in ("student", "teacher"):
        shutil.copytree(world / name, tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    flags = {name: tmp_path / name for name in ("student", "teacher")}
    assert opened(world, tmp_path / "out", **flags)[1].vocab_size == V


def test_a_pad_token_beyond_the_models_rows_does_not_stop_a_run(world, tmp_path):
    padded = changed_copy(world, "student", tmp_path / "padded", add_a_pad)
    _, steps, _ = train(
        world, tmp_path / "out", student=padded, teacher=padded, max_steps=1, eval_file=None
    )
    assert len(steps) == 1


def test_generate_needs_no_cache_and_takes_a_pad_id_beyond_the_vocabulary():
    """It fills the rows that have ended; here at least one has."""
    ids, mask = prompts(*LENGTHS)
    settings = {"max_new_tokens": 8, "eos_ids": ENDS, "temperature": 0}
    wide = tiny_llama(1, vocab_size=V + 8)
    new, _, log_probs = opd.generate(wide, ids, mask, vocab_size=V, pad_id=V + 7, **settings)
    through_eos = opd.mask_through_eos(new, ENDS)
    assert (new[~through_eos] == V + 7).all() and new[through_eos].max() < V
    assert not through_eos.all() and log_probs.isfinite().all()


def test_generate_leaves_no_scores_for_the_garbage_collector():
    """(B, V) of a real vocabulary, at every segment: a reference cycle would keep them for long."""
    wide = tiny_llama(1, vocab_size=977)
    gc.collect()
    gc.disable()
    try:
        ids, mask = prompts(*LENGTHS)
        opd.generate(wide, ids, mask, max_new_tokens=8, vocab_size=977, eos_ids=ENDS)
        shapes = [thing.shape for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    finally:
        gc.enable()
    assert (len(LENGTHS), 977) not in shapes


def test_dtype_auto_is_bfloat16_on_a_gpu_and_float32_elsewhere(world, tmp_path, monkeypatch):
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        seen = []

        def stop(path_class, path, seen=seen, **options):
            seen.append(options.get("dtype"))
            raise InterruptedError

        config = opd.Config(student="a", teacher="b", device=device)
        monkeypatch.setattr(opd, "load", stop)
        with pytest.raises(InterruptedError):
            opd.load_models(config, opd.Run({}, []), "a")
        assert seen == [dtype]


def test_in_bfloat16_sampler_and_teacher_are_bfloat16_and_trained_weights_float32(world, tmp_path):
    _, run = opened(world, tmp_path, dtype="bfloat16")
    assert run.sampler.dtype == run.teacher.dtype == torch.bfloat16
    assert run.student.dtype == torch.float32
    learning = {id(weight) for weight in run.optimizer.param_groups[0]["params"]}
    assert learning == {id(weight) for weight in run.student.parameters()}


def test_in_float32_the_sampler_is_the_student_itself(world, tmp_path):
    _, run = opened(world, tmp_path)
    assert run.sampler is run.student


def test_the_bfloat16_sampler_keeps_rotary_frequencies_in_float32(world, tmp_path):
    """Rounded to 8 bits they turn positions near 1,000 by over .1 rad too much: another model."""
    _, run = opened(world, tmp_path, dtype="bfloat16")
    sampler, student = run.sampler.model.rotary_emb, run.student.model.rotary_emb
    close(sampler.inv_freq, student.inv_freq, rtol=0, atol=0)
    frequencies = 10000.0 ** -(torch.arange(0, 64, 2) / 64)  # heads of 64, as models of 1.5B have
    assert ((frequencies.bfloat16().float() - frequencies) * 1000).abs().max() > 0.1


def test_autocast_is_bfloat16_in_a_bfloat16_run_and_off_in_a_float32_run(world, tmp_path):
    for dtype, expected in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        _, run = opened(world, tmp_path, dtype=dtype)
        with run.autocast:
            product = torch.ones(2, 2) @ torch.ones(2, 2)
        assert product.dtype == expected


def test_the_update_gets_its_sizes_and_its_precision():
    told = settings_of()  # as many tokens at once as the vocabulary of 20 allows
    assert told["chunk_tokens"] == 25_000_000 // 20
    assert (told["micro_batch_size"], told["autocast"]) == (3, "low")


def test_the_bfloat16_copy_is_updated_after_every_step(world, tmp_path, monkeypatch):
    """Else the samples would stay those of the initial student."""
    copies = []
    rollout = opd.rollout

    def watched(student, teacher, *args, **settings):
        if teacher is not None:
            copies.append(student.lm_head.weight.clone())
        return rollout(student, teacher, *args, **settings)

    monkeypatch.setattr(opd, "rollout", watched)
    flags = {"dtype": "bfloat16", "learning_rate": 0.01, "max_steps": 2, "save_every": 1}
    train(world, tmp_path, **flags, eval_file=None)
    saved = load_student(tmp_path / "checkpoint-1").lm_head.weight
    assert saved.dtype == torch.float32
    close(copies[-1], saved.bfloat16(), rtol=0, atol=0)
    assert not torch.equal(copies[-1], copies[0])


@pytest.mark.parametrize("dtype, low, high", [("float32", 0, 1e-5), ("bfloat16", 1e-4, 0.1)])
def test_sampled_and_scored_log_probs_agree_up_to_bfloat16(dtype, low, high, world, tmp_path):
    """
    sampling_mismatch: |log p scored - log p sampled|. A bfloat16 copy of the weights is another
    model, and its samples are off-policy by that much.
    """
    flags = {"dtype": dtype, "temperature": 2.0, "batch_size": 8, "eval_file": None}
    _, steps, _ = train(world, tmp_path, **flags)
    assert all(low <= line["sampling_mismatch"] < high for line in steps)


def test_no_weight_decays(world, tmp_path):
    """AdamW's default would shrink all weights by .01 times the learning rate in every step."""
    _, run = opened(world, tmp_path)
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == [0.0]


@pytest.mark.parametrize("dtype, size", [("float32", 4), ("bfloat16", 2)])
def test_cache_bytes_count_the_keys_and_values_of_a_token_in_all_layers_of_each_model(
    dtype, size, world, tmp_path
):
    """The student samples in bfloat16, whatever its master weights are."""
    _, run = opened(world, tmp_path, dtype=dtype)
    expected = []
    for model in (run.student, run.teacher):
        config = model.config
        heads = config.num_hidden_layers * config.num_key_value_heads
        expected.append(2 * size * heads * config.head_dim)
    assert run.cache_bytes == expected


def test_a_step_that_transformers_takes_back_shifts_nothing(monkeypatch):
    """On some devices it samples one token more and drops it from the ids and from the cache."""
    model = copy.deepcopy(STUDENT)
    ids = torch.randint(4, V, (3, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    settings = {"max_new_tokens": 4, "vocab_size": V, "eos_ids": {2}, "temperature": 0}
    expected = opd.generate(model, ids, mask, record_k=3, **settings)
    generate = model.generate

    def late(input_ids, *, generation_config, past_key_values, **more):
        generation_config.max_new_tokens += 1
        cache = {"past_key_values": past_key_values}
        out = generate(input_ids, generation_config=generation_config, **cache, **more)
        past_key_values.crop(-1)
        return out[:, :-1]

    monkeypatch.setattr(model, "generate", late)
    found = opd.generate(model, ids, mask, record_k=3, **settings)
    for ours, theirs in zip(found, expected):
        assert ours.shape == theirs.shape
        close(ours, theirs)


def test_many_tokens_are_computed_in_several_passes_with_the_same_result():
    """With 8,192 rows a pass has four columns; of nine columns the last pass has one."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, V, (2**13, 10), generator=generator)
    mask = torch.ones_like(ids).bool()
    passes = []
    hook = STUDENT.model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    cache = transformers.DynamicCache(config=STUDENT.config)
    with torch.no_grad():
        found = opd.hidden_states(STUDENT, ids, mask, 9, cache)
        hook.remove()
        expected = opd.hidden_states(STUDENT, ids[:50], mask[:50], 9)
    assert passes == [4, 4, 1] and cache.get_seq_length() == 9
    close(found[:50], expected)


# A student of 10 parameters and a teacher of 100; rows of 5 columns, a vocabulary of 3
PLAN = {"student": 10, "teacher": 100, "columns": 5, "vocab": 3}


def test_the_memory_plan_by_hand():
    """Two rows: 4 tokens are scored at once, 10 are trained on."""
    sizes = {**PLAN, "rows": 2, "cache": 7, "segment": 2, "judged": 11, "kept": 13, "states": 1000}
    always = {"weights": 40 + 20 + 200, "Adam's moments": 80, "hidden states": 1000}
    assert opd.memory_plan(**sizes, bf16=True) == {
        "rollout": {**always, "caches": 70, "judging": 44 + 120},
        "update": {**always, "gradient": 40, "activations": 130 + 20, "logits": 32 * 30},
    }
    plain = opd.memory_plan(**sizes, bf16=False)["update"]
    assert (plain["weights"], plain["activations"]) == (40 + 400, 130)


def test_the_logits_of_a_plan_are_those_of_one_chunk():
    plan = opd.memory_plan(1, 1, bf16=True, rows=100, columns=10_000, vocab=150_000, segment=512)
    assert plan["update"]["logits"] == 32 * 25_000_000
    assert plan["rollout"]["judging"] == 10 * 25_000_000


def fitting(monkeypatch, gigabytes, flag="rollout_batch_size", before=0, states=0, **flags):
    """rows_that_fit on a GPU with so much free, where each of at most 20 rows takes 1 GB."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gigabytes * 1e9, None))
    phase, kind = ("update", "kept") if flag == "micro_batch_size" else ("rollout", "cache")
    sizes = {"student": 10**9, "teacher": 0, "bf16": False, "columns": 1000, "vocab": 1}
    sizes["states"] = states
    plan = {flag: (phase, 20, {**sizes, kind: 10**6}, "")}
    monkeypatch.setattr(opd, "plan_phases", lambda config, run: plan)
    run = types.SimpleNamespace(device=torch.device("cuda"))
    run.rows_at_once = {flag: before} if before else {}
    rows = opd.rows_that_fit(opd.Config(**{"num_generations": 2, **flags}), run)
    return rows[flag]


@pytest.mark.parametrize("gigabytes, rows", [(100, 20), (28, 16), (18, 8)])
def test_on_a_gpu_rows_fill_four_fifths_of_what_adam_leaves(gigabytes, rows, monkeypatch):
    """Adam's moments take 8 GB; there are 20 rows in all."""
    assert fitting(monkeypatch, gigabytes) == rows


def test_a_resumed_run_computes_as_many_rows_at_once_as_before_if_they_fit(monkeypatch):
    assert fitting(monkeypatch, 100, before=4) == 4
    assert fitting(monkeypatch, 28, before=20) == 20  # they fit into the fifth that is kept free
    with pytest.warns(UserWarning, match="--rollout_batch_size was 20 and is 14$"):
        assert fitting(monkeypatch, 26, before=20) == 14


@pytest.mark.parametrize("asked, rows", [(1, 2), (2, 2), (3, 2), (5, 4)])
def test_the_candidates_of_a_prompt_are_sampled_together(asked, rows, monkeypatch):
    """So the rows at once are a multiple of the two candidates, and at least two."""
    assert fitting(monkeypatch, 100, rollout_batch_size=asked) == rows
    assert fitting(monkeypatch, 19) == 8  # nine would leave a fifth free, too


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "gigabytes, before, asked", [(26, 0, 0), (100, 4, 0), (100, 20, 0), (26, 20, 7)]
)
def test_no_note_about_rows_unless_fewer_fit_than_before(gigabytes, before, asked, monkeypatch):
    assert fitting(monkeypatch, gigabytes, before=before, rollout_batch_size=asked)


@pytest.mark.parametrize(
    "flags, instead",
    [
        ({"rollout_batch_size": 30}, "halve --rollout_batch_size, now 30"),
        ({"num_generations": 30}, "the candidates of a single prompt .* lower --max_new_tokens"),
        ({"flag": "micro_batch_size"}, "a single prompt .* lower --max_new_tokens"),
        (
            {"flag": "micro_batch_size", "no_gradient_checkpointing": True},
            "leave out --no_gradient_checkpointing",
        ),
        (
            {"flag": "teacher_eval_batch_size", "eval_batch_size": 30},
            "halve --eval_batch_size, now 30",
        ),
    ],
)
def test_what_cannot_fit_is_refused_with_the_flag_to_change(flags, instead, monkeypatch):
    gigabytes = 13 if flags.get("flag") == "micro_batch_size" else 28
    with pytest.raises(ValueError, match=f"do not fit: .* lacks .*B of GPU memory; {instead}, or"):
        fitting(monkeypatch, gigabytes, **flags)


@pytest.mark.parametrize(
    "gigabytes, states, instead",
    [(7, 0, "the models alone take"), (28, 21e9, "halve --batch_size"), (28, 0, "halve --rollout")],
)
def test_where_no_row_fits_the_flag_to_change_is_not_that_of_the_rows(
    gigabytes, states, instead, monkeypatch
):
    """Adam's moments take 8 GB; a step's hidden states of the teacher, none or 21 GB."""
    with pytest.raises(ValueError, match=f"do not fit: .* GPU memory; {instead}"):
        fitting(monkeypatch, gigabytes, states=states, rollout_batch_size=30)


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3"])
def test_the_table_of_plans_has_a_row_for_a_pair_of_models_and_a_gpu(family, monkeypatch):
    """As in assets/plans.txt: both models, GB, seven sizes in GB, four numbers of rows at once."""
    monkeypatch.setitem(plans.SHAPES, "small", (64, 128, 2, 4, 2, 16, True, family))
    row = plans.plan("small", "small", 24)
    assert row[:3] == ["small", "small", 24]
    sizes, rows = [float(cell) for cell in row[3:10]], row[10:]
    assert 0 < min(sizes) and max(sizes) < 24 and len(rows) == 4 and min(rows) >= 1
    assert "does not fit" in plans.plan("small", "small", 1)[3]


def test_bytes_kept_for_backward_are_those_that_each_token_more_lets_autograd_save():
    def saved(width):
        kept = {}

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        ids = torch.ones(1, width + 1, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            STUDENT.model(input_ids=ids[:, :width], use_cache=False)
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    kept = opd.kept_for_backward(STUDENT, contextlib.nullcontext(), False)
    assert kept == pytest.approx((saved(80) - saved(40)) / 40, rel=0.02)


def test_bytes_kept_for_backward_by_layer_and_with_recomputed_layers_by_hand():
    """If recomputed: the input of every layer, 4 bytes a number, and all of one layer."""
    kept = []
    for layers in (1, 2, 3):
        model = tiny("Qwen3", 0, num_hidden_layers=layers)
        kept.append(opd.kept_for_backward(model, contextlib.nullcontext(), False))
    assert kept[2] - kept[1] == kept[1] - kept[0] > 0
    recomputed = opd.kept_for_backward(model, contextlib.nullcontext(), True)
    assert recomputed == 3 * 4 * model.config.hidden_size + kept[2] // 3


@pytest.mark.parametrize("micro_batch_size, rows", [(3, 3), (99, 4)])
def test_the_trial_update_before_a_run_changes_nothing(
    micro_batch_size, rows, world, tmp_path, monkeypatch
):
    """Its rows are the longest possible, as many as at once, at most the four of a step."""
    config, run = opened(world, tmp_path, micro_batch_size=micro_batch_size)
    before = copy.deepcopy(run.student.state_dict())
    tried = watch(monkeypatch, "train_step")["train_step"]
    opd.try_update(config, run)
    assert_same(run.student.state_dict(), before, tolerance=0)
    assert not run.optimizer.state
    assert all(parameter.grad is None for parameter in run.student.parameters())
    _, call = tried  # the second update, when Adam's moments exist
    longest = max(len(problem["prompt_ids"]) for problem in run.pools[0])
    assert call["batch"]["prompt_mask"].shape == (rows, longest)
    assert call["batch"]["prompt_mask"].all()
    assert call["batch"]["loss_mask"].shape == (rows, 12) and call["batch"]["loss_mask"].all()
    assert call["learning_rate"] == 0.0


def test_gradients_and_the_teachers_states_are_freed_before_the_next_rollout(
    world, tmp_path, runs, monkeypatch
):
    held, states = [], []
    rollout = opd.rollout_in_groups

    def watched(*args, **settings):
        for run in runs:  # not yet in the preflight
            held.append([p.grad for p in run.student.parameters() if p.grad is not None])
            held.append([one() for one in states if one() is not None])
        out = rollout(*args, **settings)
        states.extend(map(weakref.ref, out["teacher_hidden"]))
        return out

    monkeypatch.setattr(opd, "rollout_in_groups", watched)
    train(world, tmp_path, max_steps=3, eval_file=None)
    assert held == 3 * [[], []] and len(states) == 4 * 4


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_short_rows_share_a_micro_batch_up_to_the_tokens_of_the_longest_ones(micro_batch_size):
    """Prompt and response count together: a long prompt may have a short response."""
    student, lengths = tiny_llama(1), (30, 1, 2, 14, 7, 1, 3, 2)
    cuts = (2, 12, 12, 9, 12, 0, 1, 3)  # tokens to train on
    batch = make_batch(student, TEACHER, lengths, eos_ids={V})
    batch["loss_mask"] = torch.arange(12) < torch.tensor(cuts)[:, None]
    shapes, stop = forward_shapes(student)
    _, grads = update(student, TEACHER, batch, micro_batch_size=micro_batch_size)
    stop()
    sizes = sorted((prompt + cut for prompt, cut in zip(lengths, cuts) if cut), reverse=True)
    for rows, columns in shapes:
        assert columns == sizes[0] - 1  # its last token predicts nothing
        assert rows * sizes[0] <= micro_batch_size * 32
        del sizes[:rows]
    assert not sizes and max(rows for rows, _ in shapes) > micro_batch_size
    assert_same(grads, plain_gradients(student, TEACHER, batch)[1], tolerance=3e-6)


def test_the_update_gives_attention_no_mask_though_its_rows_are_padded(monkeypatch):
    """With one a GPU has no flash attention. That padding changes nothing, others test."""
    student, masks = tiny_llama(1), []
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(*args, attn_mask=None, **settings):
        masks.append(attn_mask)
        return attention(*args, attn_mask=attn_mask, **settings)

    batch = make_batch(student, TEACHER)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    update(student, TEACHER, batch, micro_batch_size=4)
    assert len(set(batch["response_mask"].sum(-1).tolist())) > 1
    assert masks and masks == [None] * len(masks)


def test_the_teachers_states_are_not_copied_for_the_update():
    batch = make_batch(STUDENT, TEACHER)
    places = {states.data_ptr() for states in batch["teacher_hidden"]}
    for _, _, columns in opd.learned_rows(batch):
        assert columns["teacher_hidden"].data_ptr() in places


@pytest.mark.parametrize(
    "choice, steps, whom",
    [
        ("none", 1, []),
        ("student", 99, ["student"]),
        ("both", 1, ["teacher", "student"]),
        ("auto", 20, ["student"]),
        ("auto", 21, ["teacher", "student"]),
    ],
)
def test_eval_first_chooses_the_models_to_evaluate_before_the_first_step(
    choice, steps, whom, world, tmp_path
):
    """auto: both, if they take under a tenth of all steps, else the student. A step has one group
    of 12 columns; an evaluation has 12 columns for each model."""
    flags = {"eval_first": choice, "max_steps": steps}
    config, run = opened(world, tmp_path, **flags)
    assert opd.columns_at_most(run) == {"step": 12, "student": 12, "teacher": 12}
    assert opd.evaluated_first(config, run) == whom


def test_a_prompts_candidates_are_counted_as_sampled_together(world, tmp_path):
    """Three rows at once have room for one prompt: four prompts are four groups of 12 columns."""
    _, run = opened(world, tmp_path, batch_size=4, rollout_batch_size=3)
    assert opd.columns_at_most(run)["step"] == 4 * 12


def test_the_plan_of_evaluations_includes_the_tries_of_effopd(world, tmp_path):
    """They sample from training prompts, with the cap of a rollout."""
    config, run = opened(world, tmp_path, eval_file=None, extrapolate=True, validation_size=3)
    columns = opd.plan_phases(config, run)["eval_batch_size"][2]["columns"]
    assert columns == max(len(problem["prompt_ids"]) for problem in run.pools[0]) + 12


def test_without_an_evaluation_file_nothing_is_evaluated_and_the_preflight_says_so(
    world, tmp_path, capsys
):
    train(world, tmp_path, eval_file=None, cold_start_steps=1, max_steps=1)
    assert all("eval" not in line for line in test_opd.read(tmp_path / "metrics.jsonl"))
    told = capsys.readouterr().out
    assert "evaluated before step 1, see --eval_first: nobody" in told
    assert "update, 4 rows at once" in told and "evaluation, " not in told


def test_a_run_without_an_initial_evaluation_has_no_accuracy_before(world, tmp_path):
    train(world, tmp_path, eval_first="none", max_steps=2)
    run = opd.read_run(tmp_path, "")
    assert math.isnan(run["before"]) and run["after"] == run["curve"][0][2]


def test_seconds_at_most_by_hand(world, tmp_path):
    """A teacher of the student's size: 1 s a column; .5 s to score a token, 2 s to train on it."""
    flags = {"teacher": world / "student", "max_steps": 3, "eval_every": 2}
    config, run = opened(world, tmp_path, **flags)
    out = {"response_ids": torch.zeros(4, 3), "seconds": 9.0, "teacher_seconds": 6.0}
    prompt = max(len(problem["prompt_ids"]) for problem in run.pools[0])
    step = 12 * 1 + 4 * (12 * 0.5 + (prompt + 12) * 2)
    assert max(run.most["answers"]) <= 4  # no more rows than out has
    for_student, for_teacher = "an evaluation of the student", "one of the teacher"
    # Evaluated at first, after step 2 and after step 3; the teacher only at first
    config.eval_first = "both"
    expected = {"a step": step, for_student: 12, for_teacher: 12, "the run": 3 * step + 4 * 12}
    assert opd.seconds_at_most(config, run, out) == expected
    for changes, evaluations in (({"eval_every": 0}, 3), ({"eval_first": "none"}, 2)):
        told = opd.seconds_at_most(dataclasses.replace(config, **changes), run, out)
        assert told["the run"] == 3 * step + evaluations * 12

    # Three answers, timed with a single row; the teacher has two at once. On a CPU the seconds of a
    # column grow with its rows, on a GPU they do not
    run.most["answers"], run.rows_at_once["teacher_eval_batch_size"] = [3], 2
    one = {"response_ids": torch.zeros(1, 3), "seconds": 9.0, "teacher_seconds": 6.0}
    told = opd.seconds_at_most(config, run, one)
    assert (told[for_student], told[for_teacher]) == (3 * 12, 2 * 2 * 12)
    run.device = torch.device("cuda")
    told = opd.seconds_at_most(config, run, one)
    assert (told[for_student], told[for_teacher]) == (12, 2 * 12)

    # A batch has answers of one file only
    run.most["answers"] = [3, 1, 1]
    told = opd.seconds_at_most(config, run, one)
    assert (told[for_student], told[for_teacher]) == (3 * 12, (2 + 1 + 1) * 12)


@pytest.mark.parametrize(
    "rows, first, cold, warm",
    [(None, [8], [8], [8]), (4, [4], [4, 4], [4, 4]), (2, [2], [2] * 4, [2] * 4)],
)
def test_the_rows_sampled_at_once_are_those_of_the_flag_in_the_cold_start_too(
    rows, first, cold, warm, world, tmp_path, monkeypatch
):
    calls = watch(monkeypatch, "rollout")["rollout"]
    flags = {"rollout_batch_size": rows, "batch_size": 4, "cold_start_steps": 1, "max_steps": 1}
    _, (step,), _ = train(world, tmp_path, **flags, eval_file=None)
    seen = [len(call["prompts"]) for call in calls]  # first: of the preflight
    assert seen == first + cold + warm and step["rollout_batch_size"] == (rows or 8)


def test_all_ranks_sample_as_many_rows_at_once_as_the_smallest_rank(world, tmp_path, monkeypatch):
    """Else their groups would have different sizes."""
    monkeypatch.setattr(opd, "gather", lambda items: [*items, 3])
    assert set(opened(world, tmp_path)[1].rows_at_once.values()) == {3}


def warnings_of(world, folder, change=None, **flags):
    """The warnings of the preflight if the teacher is a changed copy of the student."""
    teacher = changed_copy(world, "student", folder, change or (lambda *_: None))
    config, run = opened(world, folder / "out", teacher=teacher, no_merge_stops=True, **flags)
    return [line for line in opd.preflight(config, run) if line.startswith("warning: ")]


def unlikely(model, _):
    model.lm_head.weight.data.mul_(-9)


def two_stops(model, _):
    model.generation_config.eos_token_id = [1, 2]


def no_template(_, tokenizer):
    tokenizer.chat_template = None


@pytest.mark.parametrize(
    "change, says",
    [
        (unlikely, "very unlikely"),
        (two_stops, "other stops than the teacher's: the student may unlearn to stop"),
        (no_template, "the chat templates differ"),
    ],
)
def test_the_preflight_warns_of_what_silently_ruins_runs(change, says, world, tmp_path):
    (warning,) = warnings_of(world, tmp_path, change)
    assert says in warning


def test_other_chat_templates_are_no_matter_where_none_is_used(world, tmp_path):
    assert warnings_of(world, tmp_path, no_template, no_chat_template=True) == []


def test_there_is_no_warning_if_the_teacher_equals_the_student(world, tmp_path):
    assert warnings_of(world, tmp_path) == []


def few_positions(number):
    def change(model, _):
        model.config.max_position_embeddings = number

    return change


@pytest.mark.parametrize(
    "changes, length",
    [
        ({"max_new_tokens": 30}, 30),
        ({"max_new_tokens": 30, "method": "prune", "cap_max": 20}, 20),
        ({"max_new_tokens": 30, "method": "prune", "cap_max": 40}, 30),
        ({"max_new_tokens": 30, "method": "prune", "cap_max": 20, "extrapolate": True}, 30),
        ({"max_new_tokens": 30, "method": "prune", "cap_max": 20, "cold_start_steps": 1}, 30),
        ({"max_new_tokens": 30, "method": "prefix", "prefix_length": 20}, 20),
        ({"max_new_tokens": 30, "method": "progressive", "max_steps": 3}, 12),
        ({"eval_max_new_tokens": 30}, 30),
    ],
)
def test_the_longest_prompt_and_its_response_are_compared_with_the_positions_of_both_models(
    changes, length, world, tmp_path
):
    """The longest prompt, in training and evaluation, has 7 tokens; just enough positions do."""
    flag = "eval_max_new_tokens" if "eval_max_new_tokens" in changes else "max_new_tokens"
    changes = {"eval_file": "{world}/train.jsonl", "eval_max_new_tokens": 4, **changes}
    for who in ("student", "teacher"):
        for number in (length + 7, length + 6):
            path = changed_copy(world, who, tmp_path / f"{who}{number}", few_positions(number))
            config, run = opened(world, tmp_path / "out", **{**changes, who: path})
            expected = []
            if number == length + 6:
                sizes = f"a prompt of 7 and a response of {length} tokens (--{flag})"
                expected = [f"{sizes} are more than the {number} positions of the {who}"]
            assert opd.check_lengths(run) == expected


def test_the_preflight_warns_of_too_few_positions(world, tmp_path):
    (warning,) = warnings_of(world, tmp_path, few_positions(18))
    assert "response of 12 tokens (--max_new_tokens) are more than the 18 positions" in warning


def test_eval_only_notes_too_few_positions(world, tmp_path):
    student = changed_copy(world, "student", tmp_path / "short", few_positions(9))
    flags = {"eval_only": True, "teacher": None, "train_file": None, "student": student}
    with pytest.warns(UserWarning, match="more than the 9 positions of the student"):
        opened(world, tmp_path / "out", **flags)


def test_a_run_can_use_the_last_position_of_a_table(world, tmp_path):
    table = {"student": world / "table", "teacher": world / "table"}
    flags = {"max_new_tokens": 57, "eval_file": "{world}/train.jsonl", "eval_max_new_tokens": 57}
    _, steps, _ = train(world, tmp_path, **table, **flags, max_steps=1, num_generations=9)
    assert steps[0]["sampling_mismatch"] < 1e-4


def test_the_tiny_model_has_enough_positions_for_the_default_flags():
    longest = opd.TINY.max_prompt_length + max(opd.TINY.max_new_tokens, opd.TINY.cap_max)
    tokenizer = opd.tiny_tokenizer(WORDS)
    assert opd.position_limit(opd.tiny_model(tokenizer)) == (512, "") and longest <= 512


@pytest.mark.parametrize("name", ["longrope", "dynamic"])
def test_rotary_factors_that_change_with_length_are_refused_if_a_run_gets_that_long(
    name, world, tmp_path
):
    path = save_model(tmp_path / name, of_lengths(name))
    for who in ("student", "teacher"):
        opened(world, tmp_path / "out", **{who: path}, max_new_tokens=23)
        with pytest.raises(ValueError, match=f"the 30 positions of the {who}, and {name} factors"):
            opened(world, tmp_path / "out", **{who: path}, max_new_tokens=24)


def test_rotary_factors_given_by_type_of_layer_count_too():
    rope = {"full": {"rope_type": "longrope", "original_max_position_embeddings": 8}}
    text = types.SimpleNamespace(rope_parameters=rope, max_position_embeddings=99)
    model = types.SimpleNamespace(config=types.SimpleNamespace(get_text_config=lambda: text))
    assert opd.position_limit(model)[0] == 8
    rope["full"]["rope_type"] = "yarn"
    assert opd.position_limit(model) == (99, "")


@pytest.mark.parametrize(
    "names, limit",
    [
        ({"max_position_embeddings": 8}, 8),
        ({"max_seq_len": 8}, 8),  # MPT's
        ({"max_position_embeddings": None}, math.inf),
        ({}, math.inf),  # Bloom
    ],
)
def test_positions_that_are_not_rotary_count_as_a_table_of_the_configs_length(names, limit):
    text = types.SimpleNamespace(**names)
    model = types.SimpleNamespace(config=types.SimpleNamespace(get_text_config=lambda: text))
    assert opd.position_limit(model) == (limit, "they are a fixed table")


def test_a_student_without_a_stop_token_is_warned_of(world, tmp_path):
    def never(model, tokenizer):
        model.generation_config.eos_token_id = None
        tokenizer.eos_token = None

    student = changed_copy(world, "student", tmp_path / "endless", never)
    config, run = opened(world, tmp_path / "out", student=student)
    assert any("student has no stop token" in line for line in opd.preflight(config, run))


def test_the_checkpoint_of_a_student_without_a_stop_token_can_generate(world, tmp_path):
    def never(model, tokenizer):
        model.generation_config.eos_token_id = None
        tokenizer.eos_token = None

    student = changed_copy(world, "student", tmp_path / "endless", never)
    flags = {"student": student, "teacher": student, "eval_file": None, "max_steps": 1}
    train(world, tmp_path / "out", **flags)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-1")
    assert model.generate(torch.tensor([[3, 4]]), max_new_tokens=2).shape == (1, 4)


def test_the_preflight_prints_what_a_run_is_about(world, tmp_path, monkeypatch):
    """Method, loss, data with a prompt and readable golds, the models, how far they agree."""
    monkeypatch.setattr(opd, "ask_math_verify", lambda gold, answer: gold == "x")
    path = tmp_path / "train.jsonl"
    golds = ["12", "x", "y", "z"]
    write(path, *[{"problem": f"{index} 1", "answer": gold} for index, gold in enumerate(golds)])
    flags = {"train_file": path, "method": "prune", "loss": "sampled", "batch_size": 6}
    config, run = opened(world, tmp_path / "out", **flags)
    calls = watch(monkeypatch, "rollout")["rollout"]
    told = "\n".join(opd.preflight(config, run))
    assert "method prune; loss sampled of KL(student || teacher)" in told
    assert "4 training prompts" in told and "2 of the first 4 answers can be read" in told
    assert "'<user> 0 1 <solve>'" in told and "top-4 overlap" in told
    assert "student: qwen3, 0.0M parameters, 24 rows cut to 24, stops at [1]" in told
    assert "teacher: qwen3, 0.0M parameters, 32 rows cut to 24, stops at [1]" in told
    (call,) = calls
    assert call["teacher"] is run.teacher
    assert call["plan"].max_length == 12 and len(call["prompts"]) == 6 * 2
    for part in ("plan for cpu", "rollout, 12 rows at once", "update, 4 rows at once"):
        assert part in told
    assert "time at most" in told
    assert told.endswith("evaluated before step 1, see --eval_first: teacher and student")


def test_every_size_in_the_plan_is_that_of_the_rows_in_its_line(world, tmp_path, monkeypatch):
    def memory_plan(*, rows, **_):
        rollout = {"weights": 1, "caches": 100 + rows, "nothing": 0}
        return {"rollout": rollout, "update": {"logits": 200 + rows}}

    config, run = opened(world, tmp_path, batch_size=6, eval_batch_size=7)
    monkeypatch.setattr(opd, "memory_plan", memory_plan)
    monkeypatch.setattr(opd, "seconds_at_most", lambda *_: {})
    _, sampling, update, evaluation, of_teacher, *_ = opd.plan_lines(config, run, {})
    assert sampling.startswith("rollout, 12 rows at once")
    assert sampling.endswith(" tokens: weights 1.00B, caches 112B, total 113B")
    assert update.startswith("update, 4 rows at once")
    assert update.endswith(" tokens: logits 204B, total 204B")
    assert evaluation.startswith("evaluation, 7 rows") and "caches 107B" in evaluation
    assert of_teacher.startswith("evaluation of the teacher, 7 rows")


def test_the_preflights_numbers_are_those_of_a_plain_forward(world, tmp_path, monkeypatch):
    config, run = opened(world, tmp_path)
    outs = []
    rollout = opd.rollout
    monkeypatch.setattr(opd, "rollout", lambda *a, **k: outs.append(rollout(*a, **k)) or outs[-1])
    told = "\n".join(opd.preflight(config, run))
    log_probs, overlaps = [], []
    for ids, prompt in rows_of(outs[0]):
        p = run.student(ids).logits[:, prompt - 1 : -1, :V]
        q = run.teacher(ids).logits[:, prompt - 1 : -1, :V]
        log_probs.append(q.log_softmax(-1).gather(-1, ids[:, prompt:, None]).flatten())
        overlaps.append(opd.topk_overlap(p, q, 4).flatten())
    log_probs, overlaps = torch.cat(log_probs), torch.cat(overlaps)
    assert f"first {len(log_probs)} sampled tokens" in told
    assert f"mean log-prob {log_probs.mean():.2f}, top-4 overlap {overlaps.mean():.2f}" in told


def test_an_extrapolation_is_validated_on_the_answered_problems_of_all_training_files(
    world, tmp_path
):
    files = ["{world}/train.jsonl", "{world}/pair.jsonl"]
    _, run = opened(world, tmp_path, train_file=files)
    assert len(run.answered) == 9 + 2


@pytest.mark.filterwarnings("ignore:tokens that only one model has")
def test_a_token_without_a_row_is_refused_even_if_only_an_evaluation_prompt_has_it(world, tmp_path):
    path = write(tmp_path / "graded.jsonl", {"problem": "1 more", "answer": "1"})
    student = changed_copy(world, "student", tmp_path / "wider", a_word_more)
    with pytest.raises(ValueError, match="have the token 'more'"):
        opened(world, tmp_path / "out", student=student, eval_file=path)


def test_with_no_merge_stops_the_teachers_stop_ids_still_end_its_cold_start_solutions(
    world, tmp_path
):
    def stops(model, _):
        model.generation_config.eos_token_id = [END, 6]

    teacher = changed_copy(world, "teacher", tmp_path / "teacher", stops)
    flags = {"teacher": teacher, "no_merge_stops": True, "cold_start_steps": 1}
    _, run = opened(world, tmp_path / "out", **flags)
    assert run.sampling["eos_ids"] == {END, 6}


def test_a_process_plans_for_the_larger_share_of_prompts_and_answers(world, tmp_path, monkeypatch):
    """Five prompts of two candidates and three answers, for two processes."""
    config, run = opened(world, tmp_path, batch_size=5)
    monkeypatch.setattr(opd, "NUM_RANKS", 2)
    most = opd.work_at_most(config, run)
    assert (most["rows"], most["answers"]) == (3 * 2, [2])


def test_a_rollout_is_planned_with_both_caches_and_an_evaluation_with_one(world, tmp_path):
    config, run = opened(world, tmp_path)
    run.cache_bytes = [10, 300]
    phases = opd.plan_phases(config, run).values()
    assert [sizes.get("cache") for _, _, sizes, _ in phases] == [310, None, 10, 300]


def test_in_bfloat16_the_teachers_states_are_planned_with_two_bytes_each(world, tmp_path):
    """A step has 2 * 2 rows of 12 tokens; the teacher is 48 wide."""
    for dtype, size in (("bfloat16", 2), ("float32", 4)):
        sizes = opd.plan_phases(*opened(world, tmp_path, dtype=dtype))["rollout_batch_size"][2]
        assert sizes["states"] == 2 * 2 * 12 * 48 * size


def test_on_a_cpu_an_update_takes_4_rows_and_an_evaluation_32_rows_at_once(world, tmp_path):
    _, run = opened(world, tmp_path, batch_size=5)
    assert list(run.rows_at_once.values()) == [5 * 2, 4, 32, 32]


def test_a_larger_teacher_makes_its_evaluation_slower_in_the_plan_but_not_the_update(
    world, tmp_path
):
    """The teacher scores a token in .5 s with twice the parameters. So a forward of the student
    takes .25 s, and the update of a token four of them; 4 rows after prompts of at most 7 tokens.
    """
    config, run = opened(world, tmp_path)
    twice = 2 * run.student.num_parameters()
    run.teacher = types.SimpleNamespace(num_parameters=lambda: twice)
    out = {"response_ids": torch.zeros(4, 3), "seconds": 9.0, "teacher_seconds": 6.0}
    told = opd.seconds_at_most(config, run, out)
    assert told["a step"] == 12 * 1 + 4 * (12 * 0.5 + (7 + 12) * 1)
    assert told["one of the teacher"] == 2 * told["an evaluation of the student"]


# --------------------------------------------------------------------------------------------------
# 16. Files, checkpoints, endings


def test_nan_and_infinity_are_written_as_null_also_inside_lists(tmp_path):
    opd.append_json(tmp_path / "a.jsonl", {"a": math.nan, "b": [1.5, -math.inf], "c": "é"})
    opd.append_json(tmp_path / "a.jsonl", {"d": 1})
    text = (tmp_path / "a.jsonl").read_text(encoding="utf-8")
    assert text.count("\n") == 2 and "NaN" not in text and "Infinity" not in text
    assert test_opd.read(tmp_path / "a.jsonl") == [
        {"a": None, "b": [1.5, None], "c": "é"},
        {"d": 1},
    ]


def test_metrics_are_json_even_if_a_standard_error_is_undefined(world, tmp_path):
    """One problem has no standard error. JSON has no NaN, so other readers would fail on it."""
    write(tmp_path / "one.jsonl", {"problem": "2 3", "answer": "5"})
    train(world, tmp_path, eval_file=tmp_path / "one.jsonl", max_steps=1)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert '"se": null' in text and "NaN" not in text


@pytest.mark.parametrize(
    "path, step",
    [
        ("out/checkpoint-12", 12),
        ("checkpoint-0/", 0),
        ("checkpoint-12.old", None),
        ("checkpoint.partial", None),
        ("checkpoint-1/model", None),
    ],
)
def test_the_step_of_a_checkpoint_is_read_from_its_name(path, step):
    assert opd.step_of(path) == step


def test_checkpoints_are_listed_in_the_order_of_their_steps_without_other_folders(tmp_path):
    folder = tmp_path / "a [1]"  # not to be read as a pattern
    others = ("checkpoint-9.old", "checkpoint-best-77", "checkpoint-study")
    for name in ("checkpoint-100", "checkpoint-9", "checkpoint-10", *others):
        (folder / name).mkdir(parents=True)
    (folder / "checkpoint.partial").mkdir()
    names = [os.path.basename(path) for path in opd.list_checkpoints(str(folder))]
    assert names == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert opd.list_checkpoints(str(tmp_path / "nowhere")) == []


def test_only_the_last_checkpoints_are_kept_by_number(world, tmp_path):
    """After 9 and 10 comes 11: by name the oldest would be 10."""
    config, run = opened(world, tmp_path, keep_checkpoints=2)
    for run.step in (9, 10, 11):
        opd.save_checkpoint(config, run)
    assert checkpoints(tmp_path) == ["checkpoint-10", "checkpoint-11"]
    assert not [name for name in os.listdir(tmp_path) if name.endswith((".partial", ".old"))]


def test_no_file_of_a_partial_checkpoint_gets_into_a_whole_one(world, tmp_path):
    config, run = opened(world, tmp_path)
    run.step = 3
    write(tmp_path / "checkpoint.partial" / "model-2-of-2.safetensors", text="half")
    opd.save_checkpoint(config, run)
    assert not (tmp_path / "checkpoint-3" / "model-2-of-2.safetensors").exists()
    assert not (tmp_path / "checkpoint.partial").exists()


def test_the_rest_of_an_interrupted_removal_goes_even_if_the_checkpoint_exists(world, tmp_path):
    """A signal interrupted the removal of an older one."""
    config, run = opened(world, tmp_path)
    opd.save_checkpoint(config, run)
    write(tmp_path / "checkpoint.partial" / "config.json", text="half")
    opd.save_checkpoint(config, run)
    assert checkpoints(tmp_path) == ["checkpoint-0"]
    assert not (tmp_path / "checkpoint.partial").exists()


def test_a_checkpoint_is_a_model_folder_like_any_other(world, first_run):
    folder = first_run[0] / "checkpoint-4"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab() and tokenizer.chat_template
    assert not same_weights(folder, world / "student")
    assert checkpoints(first_run[0]) == ["checkpoint-4"]


def test_checkpoints_come_every_save_every_steps_and_at_the_end(world, tmp_path):
    flags = {"max_steps": 5, "save_every": 2, "keep_checkpoints": 9, "eval_file": None}
    train(world, tmp_path, **flags)
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]


@pytest.mark.parametrize("every, steps", [(0, [5]), (2, [2, 4, 5]), (5, [5]), (9, [5])])
def test_evaluations_come_every_eval_every_steps_and_at_the_end(every, steps, monkeypatch):
    done = []

    def evaluate_files(config, run, who):
        assert who == "student"
        done.append(run.step)
        run.graded = run.step

    monkeypatch.setattr(opd, "evaluate_files", evaluate_files)
    monkeypatch.setattr(opd, "save_checkpoint", lambda *_: None)
    config, run = opd.Config(max_steps=5, eval_every=every), opd.Run({}, [])
    run.device = torch.device("cpu")
    for run.step in range(6):
        opd.evaluate_and_save(config, run)
        opd.evaluate_and_save(config, run)  # nothing is done twice
    assert done == steps


def test_the_peak_memory_of_a_step_is_not_that_of_the_evaluation_before_it(monkeypatch):
    done = []
    monkeypatch.setattr(opd, "evaluate_files", lambda *_: done.append("evaluation"))
    monkeypatch.setattr(opd, "save_checkpoint", lambda *_: None)
    monkeypatch.setattr(opd, "peak_memory", lambda device: done.append("reset"))
    opd.evaluate_and_save(opd.Config(max_steps=1), opd.Run({}, [], step=1))
    assert done == ["evaluation", "reset"]


def test_a_loss_that_is_not_finite_stops_the_run_names_the_step_and_saves_nothing(
    world, tmp_path, monkeypatch, capfd
):
    losses = iter([opd.reverse_kl, lambda p, q: p.sum(-1) * math.nan])
    monkeypatch.setattr(opd, "reverse_kl", lambda p, q: next(losses)(p, q))
    status, line = stopped(command(world, tmp_path, loss="reverse_kl", max_steps=5), capfd)
    assert status == 2 and "the update of step 2 is not finite: loss nan" in line
    assert line.endswith("last checkpoint: none") and checkpoints(tmp_path) == []


def test_a_gradient_that_is_not_finite_stops_the_run_and_pushes_out_no_good_checkpoint(
    world, tmp_path, monkeypatch, capfd
):
    """Of step 4: a checkpoint of step 3 would take the place of that of step 2."""
    losses = iter(3 * [opd.reverse_kl] + [lambda p, q: (p - p.detach()).abs().sqrt().sum(-1)])
    monkeypatch.setattr(opd, "reverse_kl", lambda p, q: next(losses)(p, q))
    flags = {"loss": "reverse_kl", "max_steps": 5, "save_every": 2, "keep_checkpoints": 1}
    status, line = stopped(command(world, tmp_path, **flags, no_view=True), capfd)
    assert status == 2 and "the update of step 4 is not finite: gradient norm" in line
    assert checkpoints(tmp_path) == ["checkpoint-2"]


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_model_whose_logits_are_nan_is_refused_by_name(role, world, tmp_path, capfd):
    def forget(model, _):
        model.lm_head.weight.data.fill_(math.nan)

    broken = changed_copy(world, role, tmp_path / "nan", forget)
    status, line = stopped(command(world, tmp_path / "out", **{role: broken}), capfd)
    assert (status, line) == (2, f"opd.py: {broken} is broken: its logits are NaN")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("inside", ["prompt", "response"])
def test_a_teacher_that_breaks_on_some_tokens_ends_the_run_before_anything_is_paid_for(
    inside, world, tmp_path, capfd
):
    """On tokens of prompts it is named; else it is the only model that scores."""
    first = test_opd.read(world / "train.jsonl")[0]["problem"]
    asked = set(TOKENIZER.encode("<user> <solve> " + first))

    def forget(model, _):
        for token in set(range(2, V)):  # check_model asks with 0 and 1
            if (token in asked) == (inside == "prompt"):
                model.get_input_embeddings().weight.data[token] = math.nan

    teacher = changed_copy(world, "teacher", tmp_path / "nan", forget)
    status, line = stopped(command(world, tmp_path / "out", teacher=teacher), capfd)
    told = "set-up is not finite: the teacher's log-prob of a sampled token"
    assert status == 2 and told in line
    if inside == "prompt":
        assert f"; the teacher's logits are not, on the problem '{first}'" in line


def test_a_single_log_prob_of_the_teacher_that_is_nan_ends_the_preflight(
    world, tmp_path, monkeypatch
):
    config, run = opened(world, tmp_path)
    some = [torch.tensor([-1.0, math.nan])]
    monkeypatch.setattr(opd, "response_log_probs", lambda *_, **__: some)
    with pytest.raises(FloatingPointError):
        opd.preflight(config, run)


def spoil_the_moments(student, optimizer, *_):
    for moments in optimizer.state.values():
        moments["exp_avg"].fill_(math.nan)


def test_weights_that_a_damaged_optimizer_made_nan_are_not_saved_and_the_student_is_named(
    world, tmp_path, monkeypatch, capfd
):
    """Damaged before the third update, whose gradients are finite; step 4 would be saved."""
    monkeypatch.setitem(MOMENTS, "step 3", (opd, "optimizer_step", 3, any_call, "before"))
    at("step 3", spoil_the_moments, monkeypatch.setattr)
    status, line = stopped(command(world, tmp_path, **{**LONG, "extrapolate": None}), capfd)
    assert status == 2 and "the rollout of step 4 is not finite: " in line
    assert "; the student's logits are not, on the problem " in line
    assert line.endswith(f"; last checkpoint: {tmp_path}/checkpoint-2")
    assert checkpoints(tmp_path) == ["checkpoint-2"]


def test_a_student_that_ships_with_odd_settings_can_be_saved(world, tmp_path):
    """A temperature without do_sample: transformers loads that, but refuses to save it."""
    shipped = changed_copy(world, "student", tmp_path / "shipped", lambda *_: None)
    path = shipped / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "temperature": 0.6}))
    train(world, tmp_path / "out", student=shipped, max_steps=1, eval_file=None)
    saved = json.loads((tmp_path / "out/checkpoint-1/generation_config.json").read_text())
    assert saved["eos_token_id"] == [END] and "temperature" not in saved


@pytest.mark.parametrize("what", ["a weight", "a moment"])
def test_nothing_that_is_not_finite_is_saved_and_the_older_checkpoint_stays(
    what, world, tmp_path, monkeypatch, capfd
):
    def spoil(student, optimizer, *_):
        name, parameter = next(student.named_parameters())
        value = parameter.data if what == "a weight" else optimizer.state[parameter]["exp_avg_sq"]
        value.view(-1)[-1] = math.inf

    monkeypatch.setitem(MOMENTS, "step 2", (opd, "optimizer_step", 2, any_call, "after"))
    at("step 2", spoil, monkeypatch.setattr)
    flags = {"save_every": 1, "keep_checkpoints": 1, "eval_file": None, "max_steps": 5}
    status, line = stopped(command(world, tmp_path, **flags), capfd)
    told = "checkpoint-2 cannot be written: not all weights and moments of Adam are finite"
    last = f"; last checkpoint: {tmp_path}/checkpoint-1"
    assert (status, line) == (2, f"opd.py: {tmp_path}/{told}{last}")
    names = ["checkpoint-1", "metrics.jsonl", "samples.jsonl"]
    assert sorted(os.listdir(tmp_path)) == names  # no partial checkpoint


@pytest.mark.parametrize(
    "moment",
    [
        "a rollout",
        "an update",
        "an extrapolation",
        "an evaluation",
        "the writing of answers",
        "the writing of a state",
        "the naming of a checkpoint",
        "the time after its naming",
        "the removal of an old one",
    ],
)
def test_a_killed_run_resumes_as_if_nothing_had_happened(moment, world, tmp_path, further, whole):
    out = tmp_path / "out"
    kill_at(moment, world, tmp_path, out)
    assert checkpoints(out)
    for name in checkpoints(out):
        assert_whole(out / name)
    resume(world, out)
    assert outcome(out) == outcome(whole)
    put_aside = ["metrics.jsonl.old", "samples.jsonl.old"]  # left by the killed run
    assert sorted(os.listdir(out)) == sorted(os.listdir(whole) + put_aside)  # no partial checkpoint


@pytest.mark.parametrize("moment", list(MOMENTS)[-4:])
def test_a_kill_while_files_are_put_aside_or_copied_back_loses_nothing(
    moment, world, tmp_path, further, every_step
):
    """
    The folder has an earlier run with the same flags: if the new run takes its checkpoints for its
    own, all of its metrics must come with them.
    """
    out, flags = tmp_path / "out", {"save_every": 1, "keep_checkpoints": 9}
    shutil.copytree(every_step, out)
    shutil.rmtree(out / "checkpoint-5")
    resumed = {"resume": True} if "copying" in moment else {}
    kill_at(moment, world, tmp_path, out, **flags, **resumed)
    resume(world, out, **flags)
    assert outcome(out) == outcome(every_step)


@pytest.mark.parametrize("kept", [0.9, 0.5, 0])
def test_a_torn_state_ends_in_one_line_that_names_the_checkpoint_and_writes_nothing(
    kept, world, tmp_path, capfd, whole
):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    state = out / checkpoints(out)[-1] / "trainer_state.pt"
    state.write_bytes(state.read_bytes()[: int(kept * state.stat().st_size)])
    before = contents(out)
    status, line = stopped(command(world, out, **LONG, resume=True), capfd)
    assert status == 2 and f"{state.parent} is no whole checkpoint" in line
    assert contents(out) == before


def drop_a_line(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name, change",
    [
        ("metrics.jsonl", drop_a_line),
        ("samples.jsonl", drop_a_line),
        ("samples.jsonl", os.remove),
        ("model.safetensors", flip_a_bit),
        ("trainer_state.pt", flip_a_bit),
        ("config.json", os.remove),
        ("tokenizer.json", drop_a_line),
        ("digests.json", os.remove),
        ("digests.json", drop_a_line),
    ],
)
def test_a_checkpoint_with_a_changed_file_is_refused_by_name_and_nothing_is_written(
    name, change, world, tmp_path, capfd, whole
):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    change(out / "checkpoint-5" / name)
    before = contents(out)
    status, line = stopped(command(world, out, **LONG, resume=True), capfd)
    assert status == 2 and f"--resume {out}/checkpoint-5 is no whole checkpoint: " in line
    assert name in line or (name, change) == ("digests.json", drop_a_line)  # an empty file
    assert contents(out) == before


def test_a_model_of_another_run_in_a_checkpoint_is_refused(world, tmp_path, capfd, every_step):
    out = tmp_path / "out"
    shutil.copytree(every_step, out)
    shutil.copy(out / "checkpoint-4" / "model.safetensors", out / "checkpoint-5")
    status, line = stopped(command(world, out, **LONG, resume=True), capfd)
    assert (
        status == 2 and "checkpoint-5 is no whole checkpoint: model.safetensors is not as" in line
    )


def test_a_checkpoint_under_the_number_of_another_step_is_refused(world, tmp_path, capfd, whole):
    """Else it would pass for a later one, and be put aside before its files are copied."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    os.rename(out / "checkpoint-5", out / "checkpoint-9")
    before = contents(out)
    status, line = stopped(command(world, out, **LONG, resume=True), capfd)
    assert status == 2 and "checkpoint-9 is no whole checkpoint: it is of step 5" in line
    assert contents(out) == before


def test_resume_takes_no_checkpoint_of_an_earlier_run(world, tmp_path, monkeypatch, first_run):
    """The second run ends before its first checkpoint, so resuming it starts it anew."""
    out, flags = tmp_path / "out", {"max_steps": 2, "learning_rate": 3e-3}
    train(world, tmp_path / "straight", **flags)
    shutil.copytree(first_run[0], out)
    with monkeypatch.context() as patch:
        at("the preflight", throw(ZeroDivisionError), patch.setattr)
        with pytest.raises(ZeroDivisionError):
            opd.main(command(world, out, **flags))
    assert checkpoints(out) == []
    assert same_weights(out / "checkpoint-4.old", first_run[0] / "checkpoint-4")
    old_metrics = (out / "metrics.jsonl.old").read_text()
    assert old_metrics == (first_run[0] / "metrics.jsonl").read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(world, out, **flags, resume=True)
    assert outcome(out) == outcome(tmp_path / "straight")
    assert checkpoints(out) == ["checkpoint-2"]


def test_each_run_of_a_process_shows_its_notes(world, tmp_path, monkeypatch):
    """Python shows equal warnings of a process once."""
    shown = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: shown.append(str(message)))
    flags = {"train_file": "{world}/double.jsonl", "max_steps": 1, "eval_file": None}
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        for _ in range(2):
            train(world, tmp_path, **flags)
    assert len([text for text in shown if "1 duplicates are left out" in text]) == 2


@pytest.mark.parametrize("name", ["train.jsonl", "eval.jsonl"])
def test_resume_with_other_problems_in_the_same_files_is_refused(name, world, tmp_path, capfd):
    for path in world.glob("*.jsonl"):
        shutil.copy(path, tmp_path)
    files = {"train_file": tmp_path / "train.jsonl", "eval_file": tmp_path / "eval.jsonl"}
    out = tmp_path / "out"
    train(world, out, max_steps=1, **files)
    before = (out / "metrics.jsonl").read_bytes()
    lines = (tmp_path / name).read_text().splitlines(True)
    (tmp_path / name).write_text("".join(lines[:-1]))
    status, line = stopped(command(world, out, max_steps=2, resume=True, **files), capfd)
    assert status == 2 and "the problems, or their prompts, were others then" in line
    assert (out / "metrics.jsonl").read_bytes() == before
    assert not (out / "metrics.jsonl.old").exists()


def test_evaluation_files_of_one_name_may_be_in_a_moved_folder_on_resume(world, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        shutil.copy(world / "eval.jsonl", tmp_path / "data" / name)
    files = [tmp_path / "data" / name / "eval.jsonl" for name in ("a", "b")]
    opd.main(
        [*command(world, tmp_path / "out", max_steps=1, eval_file=None), "--eval_file", *files]
    )
    (tmp_path / "data").rename(tmp_path / "moved")
    files = [tmp_path / "moved" / name / "eval.jsonl" for name in ("a", "b")]
    again = command(world, tmp_path / "out", max_steps=2, eval_file=None, resume=True)
    opd.main([*again, "--eval_file", *files])
    assert checkpoints(tmp_path / "out") == ["checkpoint-1", "checkpoint-2"]


def test_a_second_run_in_a_folder_says_what_became_of_the_files_of_the_first(world, tmp_path):
    train(world, tmp_path, max_steps=1, eval_file=None)
    with pytest.warns(UserWarning, match=f"{tmp_path} end in .old now"):
        opd.main(command(world, tmp_path, max_steps=1, eval_file=None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of its own files it says nothing
        opd.main(command(world, tmp_path, max_steps=1, eval_file=None, resume=True))


@pytest.mark.parametrize(
    "path, why",
    [
        ("./nope", "there is no such folder"),
        ("out/r1/checkpoint-300", "there is no such folder"),
        ("out/checkpoint-300", "there is no such folder"),
        ("model.safetensors", "there is no such folder"),  # a file
        (".", "it has no config.json; a run's models are in its checkpoint-<step> folders"),
    ],
)
def test_a_folder_without_a_model_is_told_so(path, why, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "model.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        opd.load(transformers.AutoTokenizer, path)
    assert str(error.value) == f"{path} does not load: {why}"


def test_a_hub_name_may_look_like_a_checkpoint(tmp_path, monkeypatch):
    """Its owner is no folder here, so the hub is asked."""
    monkeypatch.chdir(tmp_path)
    asked = types.SimpleNamespace(from_pretrained=lambda path, **_: path)
    assert opd.load(asked, "someone/checkpoint-300") == "someone/checkpoint-300"


def test_an_output_folder_under_a_tilde_is_refused():
    with pytest.raises(ValueError, match="no shell expands this ~"):
        opd.check_config(dataclasses.replace(opd.TINY, output_dir="~/out"))


@pytest.mark.parametrize("exists", [True, False])
def test_resume_without_a_checkpoint_starts_from_the_beginning_with_a_note(
    exists, world, tmp_path, after_one_step
):
    if exists:
        (tmp_path / "out").mkdir()
    with pytest.warns(UserWarning, match=f"no checkpoint in {tmp_path}/out to resume"):
        train(world, tmp_path / "out", max_steps=1, loss="reverse_kl", resume=True)
    assert outcome(tmp_path / "out") == outcome(after_one_step.parent)


def test_resume_into_a_folder_of_another_run_puts_that_one_aside(
    world, tmp_path, further, every_step, first_run
):
    """
    Whatever the steps of its checkpoints: else they would be taken for the resumed run's own, and
    be removed.
    """
    out, flags = tmp_path / "out", {**LONG, "save_every": 0, "keep_checkpoints": 9}
    shutil.copytree(first_run[0], out)
    (out / "rollouts.html").write_text("of the other run")
    for step in (2, 3):
        shutil.copytree(out / "checkpoint-4", out / f"checkpoint-{step}")
    train(world, out, **flags, resume=every_step / "checkpoint-3")
    assert all((out / f"checkpoint-{step}.old").exists() for step in (2, 3))
    assert outcome(out) == outcome(every_step) and checkpoints(out) == ["checkpoint-5"]
    assert (out / "rollouts.html.old").read_text() == "of the other run"
    assert same_weights(out / "checkpoint-4.old", first_run[0] / "checkpoint-4")
    old_metrics = (out / "metrics.jsonl.old").read_text()
    assert old_metrics == (first_run[0] / "metrics.jsonl").read_text()


def test_going_back_to_an_earlier_checkpoint_leaves_no_later_one_to_resume(
    world, tmp_path, monkeypatch, further, every_step
):
    """Else the run, interrupted again in step 4, would resume from checkpoint-5."""
    out, flags = tmp_path / "out", {"save_every": 0, "keep_checkpoints": 9}
    shutil.copytree(every_step, out)
    with monkeypatch.context() as patch:
        step_4 = (opd, "draw_prompts", 2, any_call, "before")
        patch.setitem(MOMENTS, "step 4", step_4)
        at("step 4", throw(ZeroDivisionError), patch.setattr)
        with pytest.raises(ZeroDivisionError):
            opd.main(command(world, out, **{**LONG, **flags}, resume=out / "checkpoint-2"))
    # checkpoint-3 is new: it is saved even after an error of the program
    assert checkpoints(out) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    resume(world, out, **flags)
    assert outcome(out) == outcome(every_step)


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 2e-3},
        {"seed": 1},
        {"batch_size": 3},
        {"method": "opd"},
        {"loss": "topk"},
        {"extrapolate": None},
        {"student": "{world}/teacher"},
        {"train_file": "{world}/eval.jsonl"},
        {"dtype": "bfloat16"},
        {"eval_file": "{world}/eval.jsonl"},
        {"eval_every": 1},
        {"eval_samples": 2},
        {"prompt_template": "{problem} !"},
    ],
    ids=str,
)
def test_resume_with_a_changed_flag_is_refused_by_its_name_and_writes_nothing(
    change, world, tmp_path, capfd, whole
):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    before = contents(out)
    status, line = stopped(command(world, out, **{**LONG, **change}, resume=True), capfd)
    assert status == 2 and f"--{list(change)[0]} " in line
    assert line.count("--") == 2  # --resume, and this flag alone
    assert contents(out) == before


def test_resume_with_another_number_of_processes_is_refused(whole, monkeypatch):
    flags = torch.load(whole / "checkpoint-5" / "trainer_state.pt", weights_only=True)["flags"]
    opd.read_checkpoint(whole / "checkpoint-5", flags)
    with pytest.raises(ValueError, match="--processes was 1 and is 2"):
        opd.read_checkpoint(whole / "checkpoint-5", {**flags, "processes": 2})


MAY_CHANGE = {
    "resume": "a",
    "output_dir": "b",
    "max_steps": 9,
    "save_every": 7,
    "keep_checkpoints": 7,
    "device": "mps",
    "micro_batch_size": 7,
    "report_to": "wandb",
    "eval_batch_size": 7,
    "rollout_batch_size": 7,
    "gradient_checkpointing": True,
    "no_gradient_checkpointing": True,  # the memory plan may advise to leave it out
    "eval_first": "none",
    "no_view": True,
}


def test_the_flags_of_may_change_may_change_on_resume_and_no_others(whole):
    folder = whole / "checkpoint-5"
    flags = torch.load(folder / "trainer_state.pt", weights_only=True)["flags"]
    opd.read_checkpoint(folder, {**flags, **MAY_CHANGE})
    for name in flags:
        if name not in MAY_CHANGE:
            with pytest.raises(ValueError, match=f"another run: --{name} was"):
                opd.read_checkpoint(folder, {**flags, name: "other"})


def test_the_next_checkpoint_stores_a_flag_that_changed_on_resume(world, tmp_path):
    train(world, tmp_path, max_steps=1, eval_file=None)
    train(world, tmp_path, max_steps=2, micro_batch_size=2, eval_file=None, resume=True)
    saved = torch.load(tmp_path / "checkpoint-2" / "trainer_state.pt", weights_only=True)
    told = [saved["flags"][name] for name in ("max_steps", "micro_batch_size")]
    assert told == [2, 2]


def test_a_run_resumes_after_its_models_and_files_have_moved(world, tmp_path):
    flags = {"eval_file": "{world}/eval.jsonl", "max_steps": 1}
    shutil.copytree(world, tmp_path / "disk")
    train(tmp_path / "disk", tmp_path / "out", **flags)
    shutil.move(tmp_path / "disk", tmp_path / "other")
    other = tmp_path / "other"
    flags |= {who: f"{other}/{who}/" for who in ("student", "teacher")} | {"max_steps": 2}
    _, steps, _ = train(other, tmp_path / "out", **flags, resume=True)
    assert [line["step"] for line in steps] == [1, 2]


@pytest.mark.parametrize("name", ["student", "teacher", "train_file", "eval_file"])
def test_a_path_may_move_on_resume_but_must_keep_its_last_part(name, whole):
    folder = whole / "checkpoint-5"
    flags = torch.load(folder / "trainer_state.pt", weights_only=True)["flags"]
    value = flags[name]
    if name in ("student", "teacher"):
        moved, renamed = f"x/y/{os.path.basename(value)}/", f"{value}x"
    else:
        moved, renamed = [f"x/y/{os.path.basename(path)}" for path in value], [*value[1:], "x"]
    opd.read_checkpoint(folder, {**flags, name: moved})
    with pytest.raises(ValueError, match=f"--{name} was"):
        opd.read_checkpoint(folder, {**flags, name: renamed})


def test_a_finished_run_resumed_with_more_steps_is_as_if_it_had_them_from_the_start(
    world, tmp_path
):
    """Evaluated after every step: else only the short run would have an evaluation at step 2."""
    for folder, steps in (("long", 3), ("short", 2)):
        train(world, tmp_path / folder, max_steps=steps, eval_every=1)
    more = {"max_steps": 3, "eval_every": 1, "keep_checkpoints": 1, "save_every": 2}
    train(world, tmp_path / "short", **more, resume=True)
    assert outcome(tmp_path / "short") == outcome(tmp_path / "long")


def test_how_many_rows_are_computed_at_once_may_change_on_resume(
    world, tmp_path, further, every_step
):
    """It changes no more than rounding."""
    flags = {**LONG, "micro_batch_size": 1, "eval_batch_size": 1, "save_every": 0}
    _, steps, evaluations = train(world, tmp_path, **flags, resume=every_step / "checkpoint-4")
    before = [line["loss"] for line in outcome(every_step)[0] if "loss" in line]
    assert [line["loss"] for line in steps] == pytest.approx(before, rel=1e-3)
    assert [line["step"] for line in evaluations] == [0, 0, 4, 5]


def test_a_resumed_run_samples_as_many_rows_at_once_as_before_unless_a_flag_is_given(
    world, tmp_path
):
    """Else another GPU, or another program on the same one, would change the run."""
    flags = {"eval_file": None, "save_every": 1}
    for steps, rows, expected in ((1, 2, 2), (2, None, 2), (3, 4, 4)):
        resumed = {"resume": True} if steps > 1 else {}
        more = {**flags, **resumed, "max_steps": steps, "rollout_batch_size": rows}
        _, metrics, _ = train(world, tmp_path, **more)
        assert metrics[-1]["rollout_batch_size"] == expected


def test_a_step_without_a_token_to_train_on_changes_no_weight(world, tmp_path, monkeypatch):
    """As a rule of one's own may have it."""
    real = opd.token_weights

    def none(config, out):
        weight, mask = real(config, out)
        return weight, mask & False

    monkeypatch.setattr(opd, "token_weights", none)
    _, steps, _ = train(world, tmp_path, max_steps=1, eval_file=None)
    assert steps[0]["loss"] is None and steps[0]["trained_tokens"] == 0
    assert same_weights(tmp_path / "checkpoint-1", world / "student")


def test_grading_shows_how_it_asks(world, tmp_path, capsys):
    """With a template that it was not trained with, a model may have no right answer."""
    flags = {"eval_only": True, "teacher": None, "train_file": None}
    opd.main(command(world, tmp_path, **flags, prompt_template="a {problem} b"))
    first = test_opd.read(world / "eval.jsonl")[0]["problem"]
    prompt = f"<user> a {first} b <solve>"
    assert capsys.readouterr().out.splitlines()[0] == f"first prompt: {prompt!r}"


def test_grading_alone_needs_no_overlap_of_more_tokens_than_there_are(world, tmp_path):
    flags = {"eval_only": True, "teacher": None, "train_file": None, "overlap_k": V + 1}
    assert opd.main(command(world, tmp_path, **flags))["eval"]["num_problems"] > 0


def test_a_new_run_keeps_the_metrics_of_the_last_one_and_grading_adds_to_them(world, tmp_path):
    first = train(world, tmp_path, max_steps=1)[1]
    train(world, tmp_path, max_steps=2)
    assert test_opd.read(tmp_path / "metrics.jsonl.old")[-2] == first[0]
    lines = test_opd.read(tmp_path / "metrics.jsonl")
    opd.main(command(world, tmp_path, eval_only=True, teacher=None, train_file=None))
    added = test_opd.read(tmp_path / "metrics.jsonl")
    assert added[:-1] == lines and added[-1]["model"] == "eval_only"
    assert added[-1]["student"] == str(world / "student")
    assert len(opd.read_run(tmp_path, "")["curve"]) == 2


def test_files_put_aside_replace_those_put_aside_before(world, tmp_path):
    """Three runs in one folder: nothing is left of the first."""
    lines = [
        train(world, tmp_path, max_steps=1, seed=seed, eval_file=None)[1] for seed in (0, 1, 2)
    ]
    old = test_opd.read(tmp_path / "metrics.jsonl.old")
    assert [line for line in old if "loss" in line] == lines[1] != lines[0]
    names = {"metrics.jsonl", "samples.jsonl", "checkpoint-1"}
    assert set(os.listdir(tmp_path)) == names | {f"{name}.old" for name in names}


def test_starts_that_fail_do_not_replace_what_was_put_aside(world, tmp_path, capfd, monkeypatch):
    """Though each of them makes new, empty files."""
    train(world, tmp_path, max_steps=1)
    before = test_opd.read(tmp_path / "metrics.jsonl"), test_opd.read(tmp_path / "samples.jsonl")
    monkeypatch.setattr(opd, "preflight", throw(KeyboardInterrupt()))
    for _ in range(2):
        stopped(command(world, tmp_path), capfd)
    after = [test_opd.read(tmp_path / f"{name}.jsonl.old") for name in ("metrics", "samples")]
    assert tuple(after) == before and len(before[1]) > 0


def test_no_view_writes_no_rollouts_html(world, tmp_path):
    for no_view in (True, None):
        train(world, tmp_path, max_steps=1, eval_file=None, no_view=no_view)
        assert ("rollouts.html" in os.listdir(tmp_path)) is (no_view is None)


SIGNALS = {
    "the preflight": (signal.SIGTERM, None),
    "a rollout": (signal.SIGINT, 3),
    "a backward pass": (signal.SIGTERM, 3),
    "an update": (signal.SIGTERM, 4),
    "an extrapolation": (signal.SIGINT, 4),
    "an evaluation": (signal.SIGHUP, 4),
    "the writing of answers": (signal.SIGUSR1, 4),
    "the writing of a state": (signal.SIGINT, 4),
    "the removal of an old one": (signal.SIGTERM, 4),
}


ALL_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
ALL_SIGNALS += (signal.SIGUSR2, signal.SIGXCPU)


@pytest.mark.parametrize("moment", SIGNALS)
def test_an_interrupted_run_names_its_checkpoint_and_resumes_from_there(
    moment, world, tmp_path, monkeypatch, capfd, further, whole
):
    """Before the update the step is dropped; later on the signal waits for the end of the step."""
    number, step = SIGNALS[moment]
    with monkeypatch.context() as patch:
        at(moment, send(number), patch.setattr)
        status, line = stopped(command(world, tmp_path, **LONG), capfd)
    assert status == 128 + number
    last = f"; last checkpoint: {tmp_path / f'checkpoint-{step}'}" if step else ""
    assert line == "opd.py: interrupted" + last
    for name in checkpoints(tmp_path):
        assert_whole(tmp_path / name)
    assert checkpoints(tmp_path)[-1:] == ([f"checkpoint-{step}"] if step else [])
    resume(world, tmp_path)
    assert outcome(tmp_path) == outcome(whole)


def test_tries_after_the_last_step_that_were_cut_short_are_in_the_resumed_runs_checkpoint(
    world, tmp_path, monkeypatch, capfd, further
):
    """The checkpoint that the signal left has the same name."""
    flags, out = {**LONG, "max_steps": 4}, tmp_path / "out"
    train(world, tmp_path / "whole", **flags)
    with monkeypatch.context() as patch:
        at("an extrapolation", send(signal.SIGTERM), patch.setattr)
        stopped(command(world, out, **flags), capfd)
    assert not same_weights(out / "checkpoint-4", tmp_path / "whole" / "checkpoint-4")
    train(world, out, **flags, resume=True)
    assert outcome(out) == outcome(tmp_path / "whole")
    assert [name for name in os.listdir(out) if "check" in name] == ["checkpoint-4"]


def test_a_checkpoint_that_a_kill_left_as_old_can_be_resumed(
    world, tmp_path, monkeypatch, further, whole
):
    """Between the two renamings that replace one of the same step."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    config, run = opened(world, out, **LONG, resume=True)
    run.saved, replace = None, os.replace

    def killed(source, target):
        replace(source, target)
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(SystemExit):
            opd.save_checkpoint(config, run)
    assert checkpoints(out) == []
    train(world, out, **LONG, resume=out / "checkpoint-5.old")
    assert outcome(out) == outcome(whole)


def test_during_the_tries_the_student_keeps_its_weights(world, tmp_path, monkeypatch):
    """Whenever a signal comes, they are what is saved."""
    config, run = opened(world, tmp_path, extrapolate=True)
    before = copy.deepcopy(run.student.state_dict())
    run.anchor = {name: 0 * weight for name, weight in opd.movable_weights(run.student).items()}
    run.untried = {"loss": 0.0}

    def graded(model, *_, **__):
        assert_same(run.student.state_dict(), before, tolerance=0)
        tried.append(model.state_dict()["model.layers.0.mlp.up_proj.weight"].clone())
        return {"avg_at_n": len(tried) == 2}, []

    tried = []
    monkeypatch.setattr(opd, "evaluate", graded)
    opd.extrapolate_student(config, run)
    weight = before["model.layers.0.mlp.up_proj.weight"]
    close(tried[1], 3 * weight)
    close(run.student.state_dict()["model.layers.0.mlp.up_proj.weight"], 3 * weight)


def test_old_checkpoints_go_even_if_the_last_one_was_complete_before_a_kill(
    world, tmp_path, every_step, further
):
    """Killed between the naming of the last checkpoint and the removal of the older ones."""
    out = tmp_path / "out"
    shutil.copytree(every_step, out)
    assert len(checkpoints(out)) == 5
    resume(world, out, save_every=1, keep_checkpoints=2)
    assert checkpoints(out) == ["checkpoint-4", "checkpoint-5"]


def test_control_c_saves_the_last_whole_step_whatever_save_every_is(
    world, tmp_path, monkeypatch, capfd, after_one_step
):
    calls = itertools.count(1)
    draw = opd.draw_prompts

    def interrupted(*args, **more):
        if next(calls) == 3:  # the preflight draws, too
            raise KeyboardInterrupt
        return draw(*args, **more)

    monkeypatch.setattr(opd, "draw_prompts", interrupted)
    status, line = stopped(command(world, tmp_path, loss="reverse_kl", max_steps=5), capfd)
    assert status == 130 and "checkpoint-1" in line
    assert same_weights(tmp_path / "checkpoint-1", after_one_step)


def test_control_c_does_not_wait_for_the_tries_of_an_extrapolation(
    world, tmp_path, monkeypatch, capfd, after_one_step
):
    """The weights of the step are saved, not of a try; its line is written with the tries."""
    tries = []

    def interrupted(model, tokenizer, problems, **_):
        tries.append(model)
        if len(tries) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return {"avg_at_n": len(tries)}, []

    monkeypatch.setattr(opd, "evaluate", interrupted)
    flags = {"loss": "reverse_kl", "extrapolate": True, "eval_first": "none"}
    status, line = stopped(command(world, tmp_path, **flags), capfd)
    assert status == 130 and "checkpoint-1" in line and len(tries) == 2
    assert same_weights(tmp_path / "checkpoint-1", after_one_step)
    assert test_opd.read(tmp_path / "metrics.jsonl") == []


def test_a_line_is_printed_without_the_lock_of_progress_bars(monkeypatch, capsys):
    """A signal while that lock is taken would end in a traceback."""
    monkeypatch.setattr(opd.tqdm, "get_lock", throw(AssertionError("the lock")))
    opd.say("a", "b")
    assert capsys.readouterr().out == "a\nb\n"


def test_a_second_signal_right_after_the_first_changes_nothing():
    with opd.on_signals(opd.interrupt):
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        for number in ALL_SIGNALS:
            os.kill(os.getpid(), number)
            time.sleep(0.01)
    opd.STOPPED.clear()


class SignalsWhenDeleted:
    """Python ignores what is raised in __del__, also by the handler of a signal."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("function, step", [("read_files", None), ("draw_prompts", 3)])
def test_a_signal_whose_exception_python_ignores_ends_the_run_at_the_end_of_the_step(
    function, step, world, tmp_path, monkeypatch, capfd
):
    real, calls = getattr(opd, function), []

    def signals(*args, **kwargs):
        calls.append(args)
        if step is None or len(calls) == step + 1:  # the first draw is the preflight's
            SignalsWhenDeleted()
        return real(*args, **kwargs)

    monkeypatch.setattr(opd, function, signals)
    argv = command(world, tmp_path / "out", max_steps=9, eval_file=None)
    status, line = stopped(argv, capfd)
    assert status == 128 + signal.SIGTERM and "opd.py: interrupted" in line
    if step:
        assert line.endswith(f"last checkpoint: {tmp_path}/out/checkpoint-{step}")
    else:
        assert os.path.getsize(tmp_path / "out" / "metrics.jsonl") == 0  # before any step


def test_only_the_process_that_saves_names_the_last_checkpoint(world, tmp_path, monkeypatch, capfd):
    """Another one may end before it is saved."""
    calls = []
    monkeypatch.setattr(opd, "is_main", lambda: False)
    monkeypatch.setattr(opd, "say", lambda *lines, file=None: calls.extend(lines))
    monkeypatch.setattr(opd, "optimizer_step", send(signal.SIGTERM))
    with pytest.raises(SystemExit):
        opd.main(command(world, tmp_path / "out", max_steps=9, eval_file=None))
    assert calls[-1] == "opd.py: interrupted"


@pytest.mark.parametrize("number", ALL_SIGNALS)
def test_a_signal_while_models_are_loaded_is_one_line_with_nothing_written(
    number, world, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(opd, "load_models", send(number))
    status = 128 + number
    assert stopped(command(world, tmp_path / "out"), capfd) == (status, "opd.py: interrupted")
    assert os.listdir(tmp_path) == []


def test_a_run_under_nohup_continues_when_its_terminal_hangs_up(world, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for moment in ("a rollout", "an update"):
        at(moment, send(signal.SIGHUP), monkeypatch.setattr)
    try:
        train(world, tmp_path, max_steps=5, eval_file=None)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert checkpoints(tmp_path) == ["checkpoint-5"]


def test_after_a_run_signals_do_what_they_did_before(world, tmp_path, capfd):
    before = [signal.getsignal(number) for number in ALL_SIGNALS]
    train(world, tmp_path, max_steps=1, eval_file=None)
    stopped(command(world, tmp_path, max_steps=0), capfd)
    assert [signal.getsignal(number) for number in ALL_SIGNALS] == before
    assert opd.interrupt not in before


def test_a_second_run_in_a_folder_is_refused_while_the_first_is_running(
    world, tmp_path, monkeypatch, capfd
):
    """Grading and reports are allowed."""
    line = f"opd.py: --output_dir {tmp_path} is in use: wait for that run or give another"
    grading = command(world, tmp_path, eval_only=True, teacher=None, train_file=None)
    seen = []

    def meanwhile(*_, **__):
        before = contents(tmp_path)
        for resumed in (None, True):
            seen.append(stopped(command(world, tmp_path, resume=resumed), capfd))
        assert contents(tmp_path) == before
        opd.main(["--report", str(tmp_path)])
        opd.main(grading)

    moment = (opd, "rollout_in_groups", 3, with_a_teacher, "before")  # the first: the preflight
    monkeypatch.setitem(MOMENTS, "step 2", moment)
    at("step 2", meanwhile, monkeypatch.setattr)
    train(world, tmp_path)
    assert seen == [(2, line)] * 2
    train(world, tmp_path)  # the folder is free again


def test_a_run_that_is_refused_leaves_the_empty_folder_of_the_one_that_just_began(tmp_path):
    folder = tmp_path / "out"
    config = test_opd.flags(output_dir=str(folder))
    with opd.own_folder(config):
        with pytest.raises(ValueError, match="is in use"):
            with opd.own_folder(config):
                pass
        assert folder.is_dir()
    assert not folder.exists()  # it stayed empty


def test_a_run_removes_the_empty_folders_that_it_made_and_no_others(tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("mine", "new/deep", "mine/new"):
        with opd.own_folder(test_opd.flags(output_dir=str(tmp_path / name))):
            assert (tmp_path / name).is_dir()
    assert os.listdir(tmp_path) == ["mine"] and os.listdir(tmp_path / "mine") == []


def test_a_checkpoint_that_is_a_link_is_removed_without_what_it_leads_to(world, tmp_path):
    """One that was moved to another disk: by later saves, and by a new run that puts it aside."""
    out, disk = tmp_path / "out", tmp_path / "disk"
    flags = {"save_every": 1, "keep_checkpoints": 1, "eval_file": None}
    train(world, out, **flags, max_steps=1)
    shutil.move(out / "checkpoint-1", disk)
    (out / "checkpoint-1").symlink_to(disk)
    (out / "checkpoint-1.old").symlink_to(disk)
    before = contents(disk)
    opd.prepare_files(test_opd.flags(output_dir=str(out)), opd.Run({}, []), "")
    os.replace(out / "checkpoint-1.old", out / "checkpoint-1")
    train(world, out, **flags, max_steps=2, resume=True)
    assert checkpoints(out) == ["checkpoint-2"] and contents(disk) == before


def test_a_run_in_another_thread_than_the_main_one_is_as_any_other(world, tmp_path):
    """Where Python allows no signal handlers."""
    results = []

    def job():
        results.append(train(world, tmp_path, max_steps=1, eval_file=None)[0])

    thread = threading.Thread(target=job)
    thread.start()
    thread.join()
    assert results[0]["generated_tokens"] > 0 and checkpoints(tmp_path) == ["checkpoint-1"]


def test_a_run_also_works_on_a_file_system_without_locks(world, tmp_path, monkeypatch):
    monkeypatch.setattr(opd.fcntl, "flock", throw(OSError(38, "Function not implemented")))
    train(world, tmp_path, max_steps=1, eval_file=None)
    assert checkpoints(tmp_path) == ["checkpoint-1"]


def test_a_signal_inside_a_whole_step_waits_for_its_end_and_handlers_are_restored(monkeypatch):
    run = opd.Run({}, [])
    before = signal.getsignal(signal.SIGTERM)
    done = []
    with pytest.raises(KeyboardInterrupt) as stop:
        with opd.whole_step(run):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            done.append(True)
    opd.STOPPED.clear()  # as main does
    assert done == [True] and not run.halfway and stop.value.args == (signal.SIGTERM,)
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_error_inside_a_whole_step_leaves_it_halfway_and_restores_the_handlers():
    run = opd.Run({}, [])
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError):
        with opd.whole_step(run):
            raise ZeroDivisionError
    assert run.halfway and signal.getsignal(signal.SIGINT) is before


def test_an_error_inside_a_whole_step_takes_back_what_it_wrote(tmp_path):
    files = [str(tmp_path / "metrics.jsonl"), str(tmp_path / "samples.jsonl")]
    write(tmp_path / "metrics.jsonl", {"step": 1})
    with pytest.raises(OSError):
        with opd.whole_step(opd.Run({}, files)):
            for path in files:
                opd.append_json(path, {"step": 2})
            raise OSError(28, "No space left on device")
    assert test_opd.read(tmp_path / "metrics.jsonl") == [{"step": 1}]
    assert (tmp_path / "samples.jsonl").read_text() == ""


def test_a_second_signal_does_not_disturb_the_last_checkpoint(
    world, tmp_path, monkeypatch, capfd, further, whole
):
    """torchrun passes a Ctrl-C on to processes that already got it from the terminal."""
    with monkeypatch.context() as patch:
        at("a rollout", send(signal.SIGINT), patch.setattr)
        at("the writing of a state", send(signal.SIGTERM), patch.setattr)
        status, line = stopped(command(world, tmp_path, **LONG), capfd)
    assert status in (130, 143) and "checkpoint-3" in line
    assert_whole(tmp_path / "checkpoint-3")
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".partial")]
    resume(world, tmp_path)
    assert outcome(tmp_path) == outcome(whole)


def test_a_signal_from_outside_at_any_time_leaves_all_steps_so_far(world, tmp_path):
    out, flags = tmp_path / "out", {"eval_file": None}
    process = start(opd.main, tmp_path, command(world, out, **flags, max_steps=100_000))
    metrics = out / "metrics.jsonl"
    while process.is_alive() and not (metrics.exists() and '"step": 3' in metrics.read_text()):
        time.sleep(0.01)
    process.terminate()
    process.join(PATIENCE)
    assert process.exitcode == 143
    (name,) = checkpoints(out)
    assert name in (tmp_path / "rank-0.log").read_text().splitlines()[-1]
    steps = [line["step"] for line in outcome(out)[0] if "loss" in line]
    assert steps == list(range(1, int(name[11:]) + 1))
    train(world, out, **flags, max_steps=steps[-1] + 1, resume=True)
    train(world, tmp_path / "straight", **flags, max_steps=steps[-1] + 1)
    assert outcome(out) == outcome(tmp_path / "straight")


@pytest.mark.parametrize("moment", ["the writing of a model", "the writing of a state"])
def test_a_full_disk_ends_a_run_in_one_line_with_the_last_checkpoint_whole(
    moment, world, tmp_path, monkeypatch, capfd, further, whole
):
    owner, name, number, such_that, when = MOMENTS[moment]
    with monkeypatch.context() as patch:
        for call in (number, number + 1):  # the disk is still full when the run ends
            patch.setitem(MOMENTS, moment, (owner, name, call, such_that, when))
            at(moment, throw(OSError(28, "No space left on device")), patch.setattr)
        status, line = stopped(command(world, tmp_path, **LONG), capfd)
    assert status == 2 and "No space left on device" in line and "checkpoint-2" in line
    assert_whole(tmp_path / "checkpoint-2")
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "metrics.jsonl", "samples.jsonl"]
    resume(world, tmp_path)
    assert outcome(tmp_path) == outcome(whole)


def tear_a_line(path, *records):
    text = "".join(json.dumps(record) + "\n" for record in records)
    with open(path, "a") as file:
        file.write(text[:-30])
    raise OSError(28, "No space left on device")


def test_a_disk_full_while_answers_are_written_leaves_none_of_their_evaluation(
    world, tmp_path, monkeypatch, capfd, further, whole
):
    with monkeypatch.context() as patch:
        patch.setitem(MOMENTS, "a full disk", (*MOMENTS["the writing of answers"][:4], "before"))
        at("a full disk", tear_a_line, patch.setattr)
        status, line = stopped(command(world, tmp_path, **LONG), capfd)
    assert status == 2 and "No space left on device" in line and "checkpoint-2" in line
    assert [line["step"] for line in test_opd.read(tmp_path / "samples.jsonl")] == [0] * 10
    lines = test_opd.read(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 0, 1, 2, 3, 4] and "loss" in lines[-1]
    resume(world, tmp_path)
    assert outcome(tmp_path) == outcome(whole)


@pytest.mark.parametrize("name", ["samples.jsonl", "metrics.jsonl"])
def test_a_disk_full_while_grading_leaves_the_files_as_they_were(
    name, world, tmp_path, monkeypatch, capfd, first_run
):
    out = tmp_path / "out"
    shutil.copytree(first_run[0], out)
    before = contents(out)
    moment = (opd, "append_json", 1, lambda path, *_: path.endswith(name), "before")
    monkeypatch.setitem(MOMENTS, "a full disk", moment)
    at("a full disk", tear_a_line, monkeypatch.setattr)
    grading = command(world, out, eval_only=True, teacher=None, train_file=None)
    assert stopped(grading, capfd) == (2, "opd.py: [Errno 28] No space left on device")
    assert contents(out) == before


def test_all_answers_of_an_evaluation_are_written_at_once(world, tmp_path, monkeypatch):
    """In one write: a kill between two would leave half of them. Buffers have only 8 KB."""
    writes = collections.Counter()

    class Watched(io.FileIO):
        def write(self, data):
            writes[os.path.basename(self.name)] += 1
            return super().write(data)

    def watched(path, mode="r", **how):
        if mode != "a":
            return open(path, mode, **how)
        return io.TextIOWrapper(io.BufferedWriter(Watched(path, mode)), **how)

    monkeypatch.setattr(opd, "open", watched, raising=False)
    grading = {"eval_only": True, "teacher": None, "train_file": None, "eval_samples": 40}
    opd.main(command(world, tmp_path, **grading))
    assert os.path.getsize(tmp_path / "samples.jsonl") > 2 * io.DEFAULT_BUFFER_SIZE
    assert writes == {"samples.jsonl": 1, "metrics.jsonl": 1}


def test_grading_makes_the_folder_that_it_writes_to(world, tmp_path):
    out = tmp_path / "a" / "new one"
    opd.main(command(world, out, eval_only=True, teacher=None, train_file=None))
    assert len(test_opd.read(out / "samples.jsonl")) == 3
    assert len(test_opd.read(out / "metrics.jsonl")) == 1


def test_a_disk_full_in_the_middle_of_a_line_costs_that_step_only(
    world, tmp_path, monkeypatch, capfd, further, whole
):
    real, calls = open, itertools.count(1)

    def full(path, mode="r", *args, **kwargs):
        line = mode == "a" and str(path).endswith("metrics.jsonl")
        if line and next(calls) == 5:  # after two evaluations and two steps
            with real(path, mode) as file:
                file.write('{"step": 3, "lo')
            raise OSError(28, "No space left on device")
        return real(path, mode, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(opd, "open", full, raising=False)
        status, line = stopped(command(world, tmp_path, **LONG), capfd)
    assert status == 2 and "No space left on device" in line and "checkpoint-2" in line
    resume(world, tmp_path)
    assert outcome(tmp_path) == outcome(whole)


MEMORY = {
    "the preflight": ("out of memory in set-up", ""),
    "a rollout": (
        "out of memory in the rollout of step 4; halve --rollout_batch_size, now 4",
        "checkpoint-3",
    ),
    "a backward pass": (
        "out of memory in the update of step 4; halve --micro_batch_size, now 6",
        "checkpoint-3",
    ),
    "a cold start": (
        "out of memory in the update of cold start step 2; halve --micro_batch_size, now 6",
        "",
    ),
    "an evaluation": (
        "out of memory in evaluation after step 4; halve --eval_batch_size, now 5",
        "checkpoint-4",
    ),
    "the teacher's evaluation": (
        "out of memory in evaluation after step 0 by the teacher; halve --eval_batch_size, now 5",
        "",
    ),
    "what the teacher makes of answers": (
        "out of memory in evaluation after step 0 by the teacher; halve --eval_batch_size, now 5",
        "",
    ),
    "an extrapolation": (
        "out of memory in extrapolation after step 4; halve --eval_batch_size, now 5",
        "checkpoint-4",
    ),
}


@pytest.mark.parametrize("moment", MEMORY)
def test_out_of_memory_names_the_phase_and_the_flag_to_halve(
    moment, world, tmp_path, monkeypatch, capfd, further
):
    """And saves the weights after the last update."""
    told, checkpoint = MEMORY[moment]
    flags = {**LONG, "micro_batch_size": 6, "eval_batch_size": 5}
    if "cold" in moment:
        flags["cold_start_steps"] = 2
        monkeypatch.setattr(opd, "is_correct", lambda text, gold: True)
    if "makes of" in moment:
        flags["probe_depths"] = 50
    out = tmp_path / "out"
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    with monkeypatch.context() as patch:
        at(moment, throw(error), patch.setattr)
        status, line = stopped(command(world, out, **flags), capfd)
    assert status == 2 and told in line and checkpoint in line
    assert checkpoints(out) == [checkpoint] * (checkpoint != "")
    for name in checkpoints(out):
        assert_whole(out / name)


@pytest.mark.parametrize(
    "error, expected",
    [
        (KeyboardInterrupt(), ("interrupted", 130)),
        (KeyboardInterrupt(signal.SIGTERM), ("interrupted", 143)),
        (MemoryError(), ("out of memory in set-up", 2)),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            ("out of memory in set-up: DefaultCPUAllocator: can't allocate memory", 2),
        ),
        (
            ValueError("a/b does not load: OutOfMemoryError: CUDA"),
            ("out of memory in set-up: a/b does not load: OutOfMemoryError: CUDA", 2),
        ),
        (ValueError("two\nlines"), ("two lines", 2)),
        (FileNotFoundError(2, "None", "a/b"), ("[Errno 2] None: 'a/b'; check the path", 2)),
        (
            OSError(28, "No space left on device", "a/b"),
            ("[Errno 28] No space left on device: 'a/b'", 2),
        ),
        (ModuleNotFoundError("No x", name="x.y"), ("No x; pip install x", 2)),
        (RuntimeError("serializing: I/O error: No space"), ("serializing: I/O error: No space", 2)),
        (ZeroDivisionError("by zero"), ("", 1)),
    ],
)
def test_errors_that_are_not_the_programs_get_a_message_and_others_none(error, expected):
    assert opd.explain(error, "set-up", {}) == expected


SIZES_NOW = {"rollout_batch_size": 8, "micro_batch_size": 2, "eval_batch_size": 2}
SIZES_NOW |= {"num_generations": 4, "teacher_eval_batch_size": 3}
SIZES_NOW |= {"no_gradient_checkpointing": False}


@pytest.mark.parametrize(
    "phase, now, advice",
    [
        ("set-up", {}, ": NCCL error: Cuda failure 2 'out of memory'"),  # the preflight's phase
        ("the rollout of step 1", {}, "; halve --rollout_batch_size, now 8"),
        (
            "the rollout of step 1",
            {"rollout_batch_size": 4},  # the candidates of a prompt stay together
            "; the candidates of a single prompt are too long for it: lower --max_new_tokens",
        ),
        (
            "the update of step 1",
            {"micro_batch_size": 1},
            "; a single prompt is too long for it: lower --max_new_tokens",
        ),
        (
            "evaluation after step 1",
            {"eval_batch_size": 1},
            "; a single prompt is too long for it: lower --eval_max_new_tokens, in an "
            "extrapolation --max_new_tokens",
        ),
        ("evaluation after step 1 by the teacher", {}, "; halve --eval_batch_size, now 3"),
        (
            "the update of step 1",
            {"micro_batch_size": 1, "no_gradient_checkpointing": True},
            "; leave out --no_gradient_checkpointing",
        ),
        ("rollouts.html of step 1", {}, "; there is --no_view"),
        ("extrapolation after step 1", {}, "; halve --eval_batch_size, now 2"),
        (
            "extrapolation after step 1",
            {"eval_batch_size": 1},
            "; a single prompt is too long for it: lower --eval_max_new_tokens, in an "
            "extrapolation --max_new_tokens",
        ),
    ],
)
def test_out_of_memory_advises_what_can_still_be_lowered_and_in_set_up_nothing(phase, now, advice):
    error = RuntimeError("NCCL error: Cuda failure 2 'out of memory'")
    told = opd.explain(error, phase, {**SIZES_NOW, **now})
    assert told == (f"out of memory in {phase}{advice}", 2)


@pytest.mark.parametrize(
    "text, told",
    [
        ("CUDA error: device-side assert triggered", "x is not finite: CUDA error: device-side"),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling", "out of memory in x; halve --roll"),
        # What a library says that finds no memory for its own state
        ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when", "out of memory in x; halve --roll"),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "out of memory in x; halve --roll"),
        ("ncclUnhandledCudaError: Failed to CUDA calloc async 608", "out of memory in x; halve"),
    ],
)
def test_cuda_errors_of_nan_and_of_memory_are_explained(text, told):
    line, status = opd.explain(RuntimeError(text), "x", SIZES_NOW)
    assert line.startswith(told) and status == 2


def test_what_a_full_gpu_held_is_freed_before_the_last_checkpoint(world, tmp_path, monkeypatch):
    """Else there would be no room to check the weights, and the steps since then would be lost."""
    held, alive = [], []
    backward, save = opd.backward, opd.save_checkpoint

    def fills(*args, **settings):
        room = torch.zeros(3)
        held.append(weakref.ref(room))
        if len(held) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return backward(*args, **settings)

    def watched(config, run):
        alive.extend(one() for one in held)
        save(config, run)

    monkeypatch.setattr(opd, "backward", fills)
    monkeypatch.setattr(opd, "save_checkpoint", watched)
    with pytest.raises(SystemExit):
        train(world, tmp_path, eval_file=None)
    assert alive == [None, None] and checkpoints(tmp_path) == ["checkpoint-1"]


def test_a_value_error_after_the_first_step_began_is_an_error_of_the_program():
    assert opd.explain(ValueError("x"), "the update of step 1", {"micro_batch_size": 1}) == ("", 1)


def test_a_lost_connection_is_explained_as_another_process_that_has_ended(monkeypatch):
    error = RuntimeError("Connection closed by peer [127.0.0.1]:1")
    assert opd.explain(error, "x", {"x": 1}) == ("", 1)
    monkeypatch.setattr(opd.dist, "is_initialized", lambda: True)
    assert opd.explain(error, "x", {"x": 1}) == ("another process has ended", 1)


def test_an_error_of_the_program_is_raised_as_it_is(world, tmp_path, monkeypatch):
    monkeypatch.setattr(opd, "plan_rollout", throw(ZeroDivisionError("by zero")))
    with pytest.raises(ZeroDivisionError):
        opd.main(command(world, tmp_path, eval_file=None))


def test_wandb_gets_the_flags_as_its_config(monkeypatch):
    told = {}
    wandb = types.SimpleNamespace(log=None)
    wandb.init = lambda **given: told.update(given) or wandb
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    opd.open_tracker("wandb", "out", {"seed": 7}, 0)
    assert told["config"] == {"seed": 7}


def test_the_first_of_two_signals_inside_a_step_sets_the_exit_status():
    with pytest.raises(KeyboardInterrupt) as stop, opd.whole_step(opd.Run({}, [])):
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
            time.sleep(0.01)
    opd.STOPPED.clear()  # as main does
    assert stop.value.args == (signal.SIGTERM,)


def test_only_rank_0_removes_the_lines_of_a_step_that_failed(tmp_path, monkeypatch):
    """Here rank 0 has written a line while the step of rank 1 fails."""
    path = str(tmp_path / "metrics.jsonl")
    monkeypatch.setattr(opd, "RANK", 1)
    with pytest.raises(OSError), opd.whole_step(opd.Run({}, [path])):
        opd.append_json(path, {"step": 1})
        raise OSError
    assert test_opd.read(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_without_training_problems_the_suspect_is_found_on_evaluation_problems(world, tmp_path):
    _, run = opened(world, tmp_path, eval_only=True, teacher=None, train_file=None)
    run.student.lm_head.weight.data.fill_(math.nan)
    first = test_opd.read(world / "eval.jsonl")[0]["problem"]
    assert opd.suspect(run) == f"; the student's logits are not, on the problem {first!r}"


def test_the_suspect_teacher_is_asked_with_its_own_prompt(world, tmp_path, monkeypatch):
    _, run = opened(world, tmp_path)
    for problem in run.pools[0]:
        problem["teacher_prompt_ids"] = [3, 20]
    run.teacher.get_input_embeddings().weight.data[20] = math.nan
    assert opd.suspect(run).startswith("; the teacher's logits are not")


# --------------------------------------------------------------------------------------------------
# 17. What a run does besides its steps: cost accounting, evaluations, EffOPD, the cold start


def test_for_the_loss_both_models_logits_are_cut_to_the_vocabulary_and_divided_by_temperature():
    settings = settings_of(temperature=2.0)
    for role, model in (("student", STUDENT), ("teacher", TEACHER)):
        hidden = torch.randn(3, model.config.hidden_size)
        close(settings[f"{role}_head"](hidden), model.lm_head(hidden)[:, :20] / 2)


def test_the_update_measures_alignment_and_how_far_log_probs_are_from_those_at_sampling():
    z, t, y = [test_opd.logits(3, seed=1), test_opd.logits(3, seed=2), torch.arange(3)]
    log_p = z.log_softmax(-1)[torch.arange(3), y]
    sampled_log_probs = torch.tensor([log_p[0] - 0.25, log_p[1] + 0.5, math.nan])
    measures = settings_of(overlap_k=6)["measure"](z, t, y, sampled_log_probs)
    close(measures.pop("sampling_mismatch"), torch.tensor([0.25, 0.5, math.nan]), equal_nan=True)
    close(measures, opd.alignment(z, t, None, 6))


@pytest.mark.parametrize(
    "rows_at_once, widths",
    [(2, [3, 4, 7, 9]), (4, [4, 9]), (6, [7, 9]), (8, [9]), (100, [9])],
)
def test_groups_of_prompts_give_the_rollout_of_all_rows(rows_at_once, widths):
    """A group is as wide as its longest prompt."""
    ids, mask = prompts(3, 3, 4, 4, 7, 7, 9, 9)
    settings = {**SAMPLING, "eos_ids": staggered_ends(STUDENT, ids, mask), "overlap_k": 4}
    whole = roll(STUDENT, TEACHER, prompt=(ids, mask), **settings)
    shapes, stop = forward_shapes(STUDENT)
    rows, plan = without_padding(ids, mask), opd.Plan(12, 4)
    settings["temperature"] = 0
    out = opd.rollout_in_groups(STUDENT, TEACHER, rows, plan, rows_at_once, **settings)
    stop()
    assert [columns + 1 for _, columns in shapes if columns > 1] == widths
    del out["seconds"], out["teacher_seconds"], whole["teacher_seconds"]
    for states, others in zip(out.pop("teacher_hidden"), whole.pop("teacher_hidden")):
        close(states, others, rtol=1e-3, atol=1e-4)
    close({**out, "log_probs": 0}, {**whole, "log_probs": 0}, rtol=0, atol=0)
    assert out["log_probs"][~out["response_mask"]].isnan().all()
    seen = ~whole["log_probs"].isnan()  # a group that ended sooner has one more column of them
    close(out["log_probs"][seen], whole["log_probs"][seen], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("teacher, recorded", [(TEACHER, 16), (None, 0)])
def test_the_students_top_16_are_recorded_for_a_teacher_alone(teacher, recorded, monkeypatch):
    calls = watch(monkeypatch, "generate")["generate"]
    opd.rollout(STUDENT, teacher, without_padding(*prompts(3, 2)), opd.Plan(4), **SAMPLING)
    assert {call["record_k"] for call in calls} == {recorded}


def test_the_padding_of_joined_groups_is_that_of_a_rollout():
    rows, plan = without_padding(*prompts(3, 2, 5)), opd.Plan(6)
    settings = {**SAMPLING, "pad_id": 3}
    settings["eos_ids"] = staggered_ends(STUDENT, *prompts(3, 2, 5))
    out = opd.rollout_in_groups(STUDENT, None, rows, plan, 1, temperature=0, **settings)
    assert (out["prompt_ids"][~out["prompt_mask"]] == 3).all()
    blank = out["response_ids"][~out["response_mask"]]
    assert len(blank) and (blank == 3).all()


def test_groups_without_a_teacher_have_no_hidden_states_of_it():
    rows, plan = without_padding(*prompts(3, 2, 5)), opd.Plan(4)
    out = opd.rollout_in_groups(STUDENT, None, rows, plan, 1, **SAMPLING)
    assert out["teacher_hidden"] == [None] * 3 and out["teacher_seconds"] == 0
    assert out["prompt_mask"].sum(-1).tolist() == [3, 2, 5]


def test_teacher_seconds_are_those_of_prefill_and_scoring_in_all_groups(monkeypatch):
    """Every look at the clock is a tick: in both groups one to prefill, three to score."""
    ticks = itertools.count()
    monkeypatch.setattr(opd, "clock", lambda device: next(ticks))
    rows, plan = without_padding(*prompts(3, 2)), opd.Plan(12, 4)
    settings = {**SAMPLING, "eos_ids": {V}, "overlap_k": 4}
    out = opd.rollout_in_groups(STUDENT, TEACHER, rows, plan, 1, **settings)
    assert out["teacher_seconds"] == 2 * (1 + 3)
    assert out["seconds"] == next(ticks) - 1  # from the first look to the last


def test_the_teachers_head_gets_the_sampled_tokens_and_not_the_padding_after_them():
    read = []
    teacher = copy.deepcopy(TEACHER)
    teacher.lm_head.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[0]))
    out = test_opd.roll(STUDENT, teacher, eos_ids=test_opd.ENDS)
    assert sum(read) == out["response_mask"].sum() < out["response_mask"].numel()


def test_tokens_at_once_keeps_the_number_of_logits_whatever_the_vocabulary():
    """25 million, 100 MB in float32, but at least those of one token."""
    sizes = {62: 403_225, 151_936: 164, 10**9: 1}
    assert {V: opd.tokens_at_once(V) for V in sizes} == sizes


@FAMILIES
def test_the_log_probs_of_a_response_are_those_of_a_plain_forward_of_each_row(family, monkeypatch):
    monkeypatch.setattr(opd, "tokens_at_once", lambda vocab_size: 9)  # several rounds
    torch.manual_seed(0)
    out = roll(STUDENT, lengths=LENGTHS * 5, eos_ids={2, 3}, temperature=1.0, vocab_size=20)
    model = family(1)
    found = opd.response_log_probs(model, out, 20, temperature=2.0)
    assert len({len(row) for row in found}) > 2
    for row, (ids, prompt) in enumerate(rows_of(out)):
        log_p = (model(ids).logits[0, prompt - 1 : -1, :20] / 2).log_softmax(-1)
        close(found[row], log_p.gather(-1, ids[0, prompt:, None])[:, 0], rtol=1e-4, atol=1e-5)


def test_response_log_probs_computes_at_most_32768_tokens_at_once():
    """
    Padded rows need a mask of all pairs of columns, too large for a whole evaluation. Each of the
    two groups is two passes, of prompts and of responses.
    """
    out = roll(STUDENT, lengths=[3] * 900, eos_ids={V}, max_length=40, segment_length=40)
    shapes, stop = forward_shapes(STUDENT)
    log_probs = opd.response_log_probs(STUDENT, out, V)
    stop()
    assert len(shapes) == 4 and all(rows * columns <= 2**15 for rows, columns in shapes)
    assert [len(row) for row in log_probs] == [40] * 900


def test_the_flops_of_a_forward_by_hand():
    """10 parameters, three layers of width 1, rows of 5 and 2 tokens."""
    sizes = types.SimpleNamespace(num_hidden_layers=3, hidden_size=1)
    config = types.SimpleNamespace(get_text_config=lambda: sizes)
    model = types.SimpleNamespace(num_parameters=lambda: 10, config=config)
    expected = 2 * 10 * 5 + 6 * 25 + 2 * 10 * 2 + 6 * 4
    assert opd.forward_flops(model, torch.tensor([5, 2])) == expected
    assert opd.forward_flops(model, torch.tensor([])) == 0


def test_repetition_is_the_share_of_four_grams_seen_before():
    assert opd.repetition([1, 2, 3, 4, 5]) == 0 and opd.repetition([1, 2]) == 0
    assert opd.repetition([7] * 13) == 0.9  # ten 4-grams, all one
    assert opd.repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)


# Two rows with prompts of 2 and 3 tokens (the teacher's: 1 and 4) and responses of 4 and 1 tokens;
# the first did not end, the second was not kept
STEP = {
    "prompt_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]).bool(),
    "teacher_prompt_mask": torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1]]).bool(),
    "response_ids": torch.tensor([[7, 7, 7, 7], [1, 0, 0, 0]]),
    "response_mask": torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]]).bool(),
    "loss_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]).bool(),
    "overlap": torch.tensor([[1.0, 0.5, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]),
    "ended": torch.tensor([True, False]),
    "kept": torch.tensor([True, False]),
    "seconds": 7.0,
    "teacher_seconds": 2.5,
}


def counted(**config):
    """-> (facts of the rows, metrics, run) of STEP, with models of 10 and 100 parameters"""
    run = opd.Run({}, [], cap=9, misses=1, device=torch.device("cpu"))
    run.rows_at_once = {"rollout_batch_size": 6}
    sizes = types.SimpleNamespace(num_hidden_layers=0, hidden_size=1)
    text = types.SimpleNamespace(get_text_config=lambda: sizes)
    run.student = types.SimpleNamespace(num_parameters=lambda: 10, config=text)
    run.teacher = types.SimpleNamespace(num_parameters=lambda: 100, config=text)
    names = "generated_tokens teacher_tokens trained_tokens validation_tokens flops".split()
    run.counts = dict.fromkeys(names, 1000)
    rows = opd.row_facts(opd.Config(**{"drift_threshold": 0.6, "w_drop": 0.5, **config}), STEP)
    return rows, opd.step_metrics(run, STEP, rows, {"loss": 3.0, "max_length": 4}), run


def test_the_facts_of_each_row_by_hand():
    """Threshold .6, and .5 lost at each bad event: the first row is reliable for two tokens."""
    rows, _, _ = counted()
    assert {name: fact.tolist() for name, fact in rows.items()} == {
        "prompt_length": [2, 3],
        "teacher_prompt_length": [1, 4],
        "response_length": [4, 1],
        "trained_length": [4, 0],
        "reliable_length": [2, 1],
        # The method stopped the second row: it could not stop by itself
        "stopped_fraction": [1, pytest.approx(math.nan, nan_ok=True)],
        "truncated_fraction": [0, 1],
        "kept_fraction": [1, 0],
        "repetition": [0, 0],
    }


def test_the_facts_are_those_of_the_rows_of_all_processes(monkeypatch):
    """Another process has rows of the same kind: costs double, and means stay."""
    rows, metrics, _ = counted()
    monkeypatch.setattr(opd, "gather", lambda items: items + items)
    of_both, told, _ = counted()
    assert of_both["response_length"].tolist() == 2 * rows["response_length"].tolist()
    assert told["generated_tokens"] - 1000 == 2 * (metrics["generated_tokens"] - 1000)
    assert told["response_length"] == metrics["response_length"]


def test_the_reliable_length_depends_on_threshold_and_drop():
    assert counted(drift_threshold=0.4)[0]["reliable_length"].tolist() == [4, 1]
    assert counted(w_drop=1.0)[0]["reliable_length"].tolist() == [1, 0]


def test_what_a_step_logs_of_its_rows_is_their_mean():
    _, metrics, _ = counted()
    names = "response_length trained_length truncated_fraction kept_fraction prompt_length".split()
    assert [metrics[name] for name in names] == [2.5, 2, 0.5, 0.5, 2.5]
    assert metrics["stopped_fraction"] == 1  # of the rows that could


def test_the_overlap_of_a_step_is_over_tokens_and_not_a_mean_of_rows():
    """2.5 of 5 tokens; the means of the rows are .625 and 0."""
    _, metrics, _ = counted()
    assert metrics["overlap_ratio"] == 0.5
    assert metrics["overlap_by_position"][:4] == [0.5, 0.5, 0, 1]


def test_the_overlap_by_position_is_of_the_rows_of_all_processes(monkeypatch):
    """Here another process has a copy of the first of the two rows, which begin with 1 and 0."""
    monkeypatch.setattr(
        opd, "gather", lambda items: items + items[:1] if torch.is_tensor(items[0]) else items
    )
    assert counted()[1]["overlap_by_position"][0] == pytest.approx(2 / 3)


def test_the_tokens_and_flops_of_a_step_are_added_to_those_before():
    """5 tokens are sampled and scored; 4, after a prompt of 2, are trained on: three forwards."""
    _, metrics, run = counted()
    assert metrics["generated_tokens"] == metrics["teacher_tokens"] == 1005
    assert metrics["trained_tokens"] == 1004 and metrics["validation_tokens"] == 1000
    written, judged = 2 + 4 + 3 + 1, 1 + 4 + 4 + 1
    assert metrics["flops"] == 1000 + 2 * 10 * written + 2 * 100 * judged + 3 * 2 * 10 * 6
    assert run.counts["flops"] == metrics["flops"]


def test_the_teachers_seconds_are_not_the_rollouts():
    _, metrics, _ = counted()
    assert metrics["time_teacher"] == 2.5 and metrics["time_rollout"] == 4.5
    assert metrics["time_validation"] == 0


def test_a_step_logs_its_cap_its_rows_at_once_and_what_the_update_returned():
    _, metrics, _ = counted()
    assert (metrics["cap"], metrics["misses"], metrics["rollout_batch_size"]) == (9, 1, 6)
    assert (metrics["loss"], metrics["max_length"]) == (3.0, 4)


def test_the_numbers_of_a_step_are_those_of_what_was_sampled(world, tmp_path, updates):
    """Of all rows and tokens, trained on or not: selected rows are those that overlap more."""
    changes = {"method": "prefix-guided", "num_generations": 8, "max_new_tokens": 40, "seed": 3}
    changes["temperature"] = 2.0  # which sampling and the loss must both use
    step = train(world, tmp_path, max_steps=1, eval_file=None, **changes)[1][0]
    out = updates[0][1]
    mask, ended, kept = [out[name] for name in ("response_mask", "ended", "kept")]
    assert not ended.all() and ended.any() and not kept.all()
    expected = {
        "response_length": mask.sum().item() / 16,
        "truncated_fraction": 1 - ended.double().mean().item(),
        "kept_fraction": kept.double().mean().item(),
        "overlap_ratio": (out["overlap"].sum() / mask.sum()).item(),
        "generated_tokens": mask.sum().item(),
        "teacher_tokens": mask.sum().item(),
        "trained_tokens": mask[kept].sum().item(),
        "time_teacher": out["teacher_seconds"],
        "time_rollout": out["seconds"] - out["teacher_seconds"],
    }
    assert {name: step[name] for name in expected} == pytest.approx(expected)
    assert step["sampling_mismatch"] < 1e-4
    assert set((out["overlap"] * 4 % 1).flatten().tolist()) == {0}  # k is 4
    assert step["overlap_by_position"][0] == pytest.approx(
        opd.overlap_by_position(out["overlap"], mask)[0]
    )


@pytest.mark.parametrize(
    "changes, cap",
    [
        ({}, 10),
        ({"cap_step": 3}, 11),
        ({"cap_max": 9}, 9),
        ({"max_new_tokens": 9}, 9),
        ({"cap_hit_ratio": 0.6}, 8),
        ({"cap_margin": 1}, 8),
        ({"cap_hit_ratio": 0.6, "cap_patience": 1}, 6),
        ({"cap_hit_ratio": 0.6, "cap_patience": 1, "cap_min": 7}, 7),
    ],
    ids=str,
)
def test_the_next_cap_depends_on_every_cap_flag(changes, cap):
    """From 8, with one of two rows reliable for 6 tokens, the other for none."""
    run = types.SimpleNamespace(cap=8, misses=0)
    assert opd.next_cap(test_opd.flags(**changes), run, torch.tensor([6, 0]))[0] == cap


def test_every_step_logs_the_documented_names(first_run):
    names = """step loss reverse_kl overlap_ratio overlap_token_advantage overlap_mass_student
        overlap_mass_teacher entropy_student entropy_teacher entropy_gap overlap_by_position
        response_length truncated_fraction kept_fraction repetition generated_tokens teacher_tokens
        trained_tokens flops time_rollout time_teacher time_update peak_memory_gb grad_norm
        learning_rate sampling_mismatch""".split()
    for line in first_run[2]:
        assert set(names) <= set(line) and len(line["overlap_by_position"]) == 8
    assert [line["step"] for line in first_run[2]] == [1, 2, 3, 4]


def test_if_everything_sampled_is_trained_on_the_three_token_counts_are_equal(first_run):
    lengths = sum(line["response_length"] * 4 for line in first_run[2])
    last = first_run[2][-1]
    assert last["generated_tokens"] == last["teacher_tokens"] == last["trained_tokens"] == lengths


def test_the_overlap_of_a_step_is_over_all_that_was_sampled_trained_on_or_not(world, tmp_path):
    """
    Over the selected rows alone it would be high because of the selection. Prefixes of candidates
    that lost are trained on only when asked for.
    """
    flags = {"method": "prefix-guided", "num_generations": 8, "max_steps": 1, "eval_file": None}
    ((without,), (with_them,)) = (
        train(world, tmp_path, **flags, train_pruned_prefix=more)[1] for more in (None, True)
    )
    assert without["generated_tokens"] == with_them["generated_tokens"]
    assert without["trained_tokens"] < without["generated_tokens"] == with_them["trained_tokens"]
    assert without["overlap_ratio"] == with_them["overlap_ratio"]


def test_every_evaluation_logs_its_result_and_its_sampling_settings(first_run):
    names = """avg_at_n se pass_at_n n num_problems mean_length truncated_fraction no_box_fraction
        repetition mean_reward auroc temperature top_p max_new_tokens seed""".split()
    graded_models = [(line["step"], line["model"]) for line in first_run[3]]
    assert graded_models == [(0, "teacher"), (0, "student"), (4, "student")]
    for line in first_run[3]:
        assert set(names) <= set(line["eval"]["eval"])
        assert line["prompt_template"] == "{problem}" and line["thinking"] is False
        assert line["time_eval"] > 0
    result = first_run[3][0]["eval"]["eval"]
    settings = [result[name] for name in ("temperature", "top_p", "max_new_tokens", "seed", "n")]
    assert settings == [0.7, 0.95, 12, 0, 1] and result["num_problems"] == 3


def test_the_flags_of_an_evaluation_are_those_it_samples_with(world, tmp_path):
    """A tiny top_p is greedy, as is a temperature of 0; with 1 for both, answers are random."""
    grading = {"eval_only": True, "teacher": None, "train_file": None}

    def answers(**changes):
        opd.main(command(world, tmp_path, **grading, **changes))
        return [answer["response"] for answer in test_opd.read(tmp_path / "samples.jsonl")][-3:]

    greedy = answers(eval_temperature=0)
    assert answers(eval_top_p=0.001) == greedy != answers(eval_top_p=1, eval_temperature=1)
    cut = answers(eval_temperature=0, eval_max_new_tokens=3)
    assert all(len(short.split()) <= 3 for short in cut) and cut != greedy


def test_an_evaluation_logs_the_tokens_sampled_until_then(first_run):
    tokens = [line["generated_tokens"] for line in first_run[3]]
    assert tokens == [0, 0, first_run[2][-1]["generated_tokens"]]


def test_the_text_that_is_graded_has_no_special_tokens(monkeypatch):
    """<end> is one. It is among the ids, and the length counts it."""
    monkeypatch.setattr(opd, "is_correct", says_a)
    _, answers = test_opd.evaluate(*test_opd.TWO, eos_ids={END, 16}, max_length=40, num_samples=8)
    ends = [answer["response_ids"][-1] for answer in answers]
    assert {END, 16} <= set(ends)
    for answer, end in zip(answers, ends):
        assert "<end>" not in answer["response"] and "<pad>" not in answer["response"]
        assert answer["correct"] == (end == 16)  # the word a
        assert answer["truncated"] == (end not in (END, 16))
        assert answer["length"] == len(answer["response_ids"])


def test_every_graded_answer_is_a_line_of_samples(first_run):
    samples = test_opd.read(first_run[0] / "samples.jsonl")
    assert len(samples) == 3 * 3
    assert {"problem", "answer", "response", "correct", "step", "model", "eval"} <= set(samples[0])
    assert not [name for name in samples[0] if name.endswith("_ids")]


def test_evaluating_more_often_does_not_change_training(world, tmp_path, first_run):
    flags = {"max_steps": 4, "eval_every": 1, "eval_samples": 2}
    _, steps, evaluations = train(world, tmp_path, **flags)
    assert len(evaluations) == 6 and repeatable(steps) == repeatable(first_run[2])


def test_main_returns_the_final_metrics(first_run):
    out, results, steps, evaluations = first_run
    assert results["checkpoint"] == str(out / "checkpoint-4")
    assert results["generated_tokens"] == steps[-1]["generated_tokens"]
    assert results["final"] == evaluations[-1]["eval"]


def test_eval_only_grades_a_model_file_by_file(world, tmp_path):
    files = [world / "eval.jsonl", world / "train.jsonl"]
    flags = {"eval_only": True, "teacher": None, "train_file": None, "eval_file": files}
    results = opd.main(command(world, tmp_path, **flags))
    counts = {name: row["num_problems"] for name, row in results.items()}
    assert counts == {"eval": 3, "train": 9} and checkpoints(tmp_path) == []


def test_of_two_evaluation_files_of_one_name_the_second_goes_by_its_path(world, tmp_path):
    again = str(world / "again" / "eval.jsonl")
    files = [world / "eval.jsonl", again]
    flags = {"eval_only": True, "teacher": None, "train_file": None, "eval_file": files}
    results = opd.main(command(world, tmp_path, **flags))
    counts = {name: row["num_problems"] for name, row in results.items()}
    assert counts == {"eval": 3, again: 2}


def test_the_stop_ids_of_the_graded_model_end_its_answers(world, tmp_path, monkeypatch):
    """The teacher's own stop ids end its answers, but not those of the student."""

    def stops(model, _):
        model.generation_config.eos_token_id = [END, 20, 21]

    teacher = changed_copy(world, "teacher", tmp_path / "teacher", stops)
    calls = watch(monkeypatch, "evaluate")["evaluate"]
    train(world, tmp_path / "out", teacher=teacher, max_steps=1, no_merge_stops=True)
    assert [sorted(call["eos_ids"]) for call in calls] == [[1, 20, 21], [1], [1]]


def test_the_teacher_scores_the_answers_of_the_student_and_not_its_own(
    world, tmp_path, monkeypatch
):
    calls = watch(monkeypatch, "evaluate")["evaluate"]
    train(world, tmp_path, max_steps=1)
    judged = [call["teacher"] is not None for call in calls]
    assert judged == [False, True, True] and calls[1]["teacher"] is calls[0]["model"]


# Probes: the teacher continues the student's answers from some depth


@pytest.fixture(scope="module")
def probed(world, tmp_path_factory):
    """A run with probes, graded by says_a every two steps -> (folder, steps, evaluations)"""
    out = tmp_path_factory.mktemp("probed")
    flags = {"max_steps": 4, "eval_every": 2, "eval_samples": 4, "probe_depths": [0, 50]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opd, "is_correct", says_a)
        return out, *train(world, out, **flags)[1:]


def test_an_evaluation_of_the_student_reports_the_auroc_and_the_mean_of_its_answers_rewards(
    probed,
):
    samples = test_opd.read(probed[0] / "samples.jsonl")
    for line in probed[2]:
        own = (line["step"], line["model"])
        rows = [item for item in samples if (item["step"], item["model"]) == own]
        result, rewards = line["eval"]["eval"], [item["reward"] for item in rows]
        if line["model"] == "teacher":
            assert result["auroc"] is result["mean_reward"] is None and set(rewards) == {None}
            continue
        right = [item["reward"] for item in rows if item["correct"]]
        wrong = [item["reward"] for item in rows if not item["correct"]]
        higher = sum((a > b) + 0.5 * (a == b) for a, b in itertools.product(right, wrong))
        assert result["auroc"] == pytest.approx(higher / len(right) / len(wrong))
        assert result["mean_reward"] == pytest.approx(sum(rewards) / 12)
        assert -20 < result["mean_reward"] < 0


def test_neither_probing_nor_evaluating_more_often_changes_a_step_or_another_result(
    world, tmp_path, probed, monkeypatch
):
    monkeypatch.setattr(opd, "is_correct", says_a)
    _, steps, evaluations = train(world, tmp_path, max_steps=4, eval_samples=4)
    assert repeatable(probed[1]) == repeatable(steps)
    results = {(line["step"], line["model"]): line["eval"]["eval"] for line in probed[2]}
    assert len(results) == 4 and len(evaluations) == 3
    for line in evaluations:
        result = dict(results[line["step"], line["model"]])
        for depth in (0, 50):
            result.pop(f"advantage_from_{depth}", None)
        assert line["eval"]["eval"] == result


def test_grading_alone_and_grading_the_teacher_run_no_probes(world, tmp_path, monkeypatch, probed):
    monkeypatch.setattr(opd, "is_correct", says_a)
    flags = {"eval_only": True, "train_file": None, "probe_depths": [0], "eval_samples": 4}
    alone = opd.main(command(world, tmp_path, **flags))["eval"]
    teachers = probed[2][0]
    assert teachers["model"] == "teacher"
    for result in (alone, teachers["eval"]["eval"]):
        assert not [name for name in result if "advantage" in name]
    assert math.isnan(alone["auroc"])


def test_a_teacher_that_is_the_student_has_no_advantage_at_any_depth(world, tmp_path, monkeypatch):
    monkeypatch.setattr(opd, "is_correct", says_a)
    flags = {"teacher": world / "student", "eval_temperature": 0, "probe_depths": [0, 50]}
    _, _, evaluations = train(
        world, tmp_path, **flags, max_steps=1, eval_file=world / "train.jsonl"
    )
    assert evaluations[1]["model"] == "student"
    before = evaluations[1]["eval"]["train"]
    assert 0 < before["avg_at_n"] < 1
    assert before["advantage_from_0"] == before["advantage_from_50"] == 0


@pytest.mark.parametrize("stops", [END, [END, *range(6, 16)]], ids=["the student's", "of its own"])
def test_at_depth_0_the_advantage_is_the_teachers_accuracy_minus_the_students(
    stops, world, tmp_path, monkeypatch
):
    """The teacher stops at its own stop ids there, too."""

    def change(model, _):
        model.generation_config.eos_token_id = stops

    monkeypatch.setattr(opd, "is_correct", says_a)
    teacher = changed_copy(world, "teacher", tmp_path / "teacher", change)
    flags = {"teacher": teacher, "eval_temperature": 0, "probe_depths": [0]}
    _, _, evaluations = train(
        world, tmp_path / "out", **flags, max_steps=1, eval_file=world / "train.jsonl"
    )
    teachers, students = (line["eval"]["train"] for line in evaluations[:2])
    assert (teachers["mean_length"] < 9) == (stops != END)
    assert teachers["avg_at_n"] != students["avg_at_n"]
    gain = teachers["avg_at_n"] - students["avg_at_n"]
    assert students["advantage_from_0"] == pytest.approx(gain)


def test_a_probe_continues_each_answer_from_the_stated_share_of_it(world, tmp_path, monkeypatch):
    """With the given beginning, no answer can be longer than the cap."""
    calls = watch(monkeypatch, "evaluate")["evaluate"]
    train(world, tmp_path, max_steps=1, probe_depths=[0, 50, 75])
    cap = calls[0]["max_length"]
    for depth, call in zip((0, 50, 75), calls[2:5]):  # after teacher and student
        begun, left = call["problems"], call["max_length"]
        assert call["model"] is calls[0]["model"] and left == cap - cap * depth // 100
        for item in begun:
            assert len(item["begun"]) == item["length"] * depth // 100
            assert len(item["begun"]) + left <= cap
            assert item["begun"] == item["response_ids"][: len(item["begun"])]


# EffOPD's tries


def test_the_tries_cost_the_flops_of_their_forwards(world, tmp_path, monkeypatch):
    outs = []
    evaluate = opd.evaluate
    monkeypatch.setattr(
        opd, "evaluate", lambda *args, **how: outs.append(evaluate(*args, **how)) or outs[-1]
    )
    flags = {"max_steps": 1, "eval_file": None}
    (plain,) = train(world, tmp_path, **flags)[1]
    (step,) = train(world, tmp_path, **flags, extrapolate=True)[1]
    student = load_student(world / "student")
    lengths, flops = 0, 0
    for _, answers in outs:
        for answer in answers:
            lengths += answer["length"]
            context = torch.tensor([len(answer["prompt_ids"]) + answer["length"]])
            flops += opd.forward_flops(student, context)
    assert step["validation_tokens"] == lengths > 0
    assert step["generated_tokens"] == plain["generated_tokens"] + lengths
    assert step["flops"] - plain["flops"] == pytest.approx(flops, rel=1e-9)


def test_every_try_has_the_same_problems_and_the_same_seed(world, tmp_path, monkeypatch):
    seen = []
    evaluate = opd.evaluate

    def watched(model, tokenizer, problems, **settings):
        seen.append(([problem["problem"] for problem in problems], settings))
        return evaluate(model, tokenizer, problems, **settings)

    monkeypatch.setattr(opd, "evaluate", watched)
    train(world, tmp_path, extrapolate=True, max_steps=4, eval_file=None)
    assert len(seen) > 5 and all(call == seen[0] for call in seen)
    assert len(set(seen[0][0])) == 3 and seen[0][1]["max_length"] == 12


def test_every_try_has_the_problems_and_the_seed_of_the_runs_seed(world, tmp_path, monkeypatch):
    """Also in other steps: only the weights differ. Another seed draws other problems."""
    calls = watch(monkeypatch, "evaluate")["evaluate"]
    judged = {}
    for seed in (0, 1):
        del calls[:]
        train(world, tmp_path, extrapolate=True, seed=seed, max_steps=2, eval_file=None)
        assert len(calls) >= 4 and {call["seed"] for call in calls} == {seed}
        first = calls[0]["problems"]
        assert all(call["problems"] == first for call in calls)
        judged[seed] = {problem["problem"] for problem in first}
        assert len(judged[seed]) == 3
    assert judged[0] != judged[1]


def test_the_weights_an_extrapolation_accepts_are_sampled_from_and_trained_on(
    world, tmp_path, monkeypatch
):
    """In bfloat16, where sampler and student are two models."""
    seen = []
    rollout, real = opd.rollout, opd.movable_weights

    def watched(student, teacher, *args, **settings):
        if teacher is not None:
            seen.append(real(student))
        return rollout(student, teacher, *args, **settings)

    def accept(weights, anchor, validate):
        return {name: value + 1 for name, value in weights.items()}, 1, [0.0, 1.0]

    monkeypatch.setattr(opd, "rollout", watched)
    monkeypatch.setattr(opd, "extrapolate", accept)
    flags = {"dtype": "bfloat16", "extrapolate": True, "max_steps": 2, "save_every": 1}
    train(world, tmp_path, **flags, eval_file=None, learning_rate=1e-9)
    start = real(load_student(world / "student"))
    saved = real(load_student(tmp_path / "checkpoint-1"))
    assert_same(saved, {name: value + 1 for name, value in start.items()}, tolerance=1e-6)
    assert_same(seen[-1], {name: value.bfloat16() for name, value in saved.items()}, tolerance=0)


# A cold start

COLD = {
    "cold_start_steps": 1,
    "cold_start_learning_rate": 2e-3,
    "max_new_tokens": 24,
    "batch_size": 3,
    "num_generations": 4,
    "max_steps": 1,
    "eval_file": None,
    "max_grad_norm": 1e9,
}


def solutions(batch):
    """The rows trained on, unpadded, as (prompt and response (1, L), length of the prompt)."""
    return [row for row, learned in zip(rows_of(batch), batch["loss_mask"]) if learned.any()]


def test_a_cold_start_trains_on_solutions_that_ended_and_are_right_or_of_unknown_answer(
    world, tmp_path, monkeypatch, updates
):
    monkeypatch.setattr(opd, "is_correct", says_a)
    path = unanswered(world, tmp_path / "train.jsonl", 2)
    known = {
        problem["problem"]: problem["answer"] for problem in test_opd.read(tmp_path / "train.jsonl")
    }
    train(world, tmp_path / "out", **{**COLD, "batch_size": 9}, train_file=path)
    batch, kinds = updates[0][1], set()
    for row, problem in enumerate(problems_of(batch)):
        valid = batch["response_mask"][row]
        text = TOKENIZER.decode(batch["response_ids"][row][valid], skip_special_tokens=True)
        kind = batch["ended"][row].item(), known[problem] is None, says_a(text, "")
        kept = kind[0] and (kind[1] or kind[2])
        assert batch["loss_mask"][row].tolist() == (valid & kept).tolist()
        kinds.add(kind)
    assert len(kinds) == 8  # every combination occurs


def test_the_text_graded_in_a_cold_start_has_no_special_tokens(world, tmp_path, monkeypatch):
    texts = []
    monkeypatch.setattr(opd, "is_correct", lambda text, gold: texts.append(text) or True)
    train(world, tmp_path, **COLD)
    assert texts and not [text for text in texts if "<end>" in text or "<pad>" in text]


def test_the_gradient_of_a_cold_start_is_that_of_plain_cross_entropy_on_the_kept_tokens(
    world, tmp_path, updates
):
    path = unanswered(world, tmp_path / "train.jsonl", 1)
    train(world, tmp_path / "out", **{**COLD, "batch_size": 9}, train_file=path)
    student, batch, grads = updates[0]
    student.zero_grad()
    total, count = 0.0, 0
    for ids, prompt in solutions(batch):
        logits = student(ids).logits[0, prompt - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, prompt:], reduction="sum")
        total = total + loss
        count += ids.shape[1] - prompt
    (total / count).backward()
    assert count > 50 and len(set(batch["loss_mask"].sum(-1).tolist())) > 3
    assert_same(grads, gradients_of(student), tolerance=3e-6)


def test_a_cold_start_has_a_learning_rate_of_its_own_and_the_clipping_of_the_run(
    world, tmp_path, monkeypatch
):
    calls = watch(monkeypatch, "optimizer_step")["optimizer_step"]
    path = unanswered(world, tmp_path / "train.jsonl", 1)
    train(world, tmp_path / "out", **{**COLD, "max_grad_norm": 0.5}, train_file=path)
    rates = [(call["learning_rate"], call["max_grad_norm"]) for call in calls]
    assert rates == [(2e-3, 0.5), (1e-3, 0.5)]


def test_the_first_step_after_a_cold_start_has_no_moments_of_it(world, tmp_path, monkeypatch):
    moments = []
    step = opd.optimizer_step

    def watched(student, optimizer, *args):
        moments.append(len(optimizer.state) > 0)
        return step(student, optimizer, *args)

    monkeypatch.setattr(opd, "optimizer_step", watched)
    path = unanswered(world, tmp_path / "train.jsonl", 1)
    train(
        world, tmp_path / "out", **COLD | {"cold_start_steps": 2, "max_steps": 2}, train_file=path
    )
    assert moments == [False, True, False, True]


def test_a_cold_start_without_a_right_solution_changes_no_weight(
    world, tmp_path, monkeypatch, updates
):
    monkeypatch.setattr(opd, "is_correct", lambda text, gold: False)
    results = train(world, tmp_path, **{**COLD, "cold_start_steps": 2})[0]
    assert len(updates) == 3 and results["cold_start_tokens"] > 0
    assert not updates[0][1]["loss_mask"].any() and not updates[1][1]["loss_mask"].any()
    begin = load_student(world / "student").state_dict()
    for name, value in updates[2][0].state_dict().items():
        assert torch.equal(value, begin[name])


def test_a_cold_start_makes_the_teachers_solutions_more_likely(world, tmp_path, updates):
    path = unanswered(world, tmp_path / "train.jsonl", 1)
    flags = {**COLD, "cold_start_steps": 8, "cold_start_learning_rate": 3e-3}
    train(world, tmp_path / "out", **flags, train_file=path)
    batch = updates[0][1]
    torch.manual_seed(99)
    prompt = batch["prompt_ids"], batch["prompt_mask"]
    teacher = load_student(world / "teacher")
    fresh = roll(teacher, temperature=1.0, max_length=24, prompt=prompt)

    def likelihood(student):  # mean log-prob of solutions sampled after training
        with torch.no_grad():
            return torch.cat(opd.response_log_probs(student, fresh, V)).mean().item()

    assert likelihood(updates[8][0]) > likelihood(updates[0][0]) + 0.2


def test_a_cold_start_prints_the_share_of_right_solutions(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(opd, "is_correct", lambda text, gold: False)
    problems = test_opd.read(world / "train.jsonl")
    path = write(tmp_path / "train.jsonl", *problems)
    train(world, tmp_path / "out", **COLD, train_file=path)
    assert "cold start: 0% of the solutions are right" in capsys.readouterr().out


def test_the_teachers_own_stop_ids_end_its_solutions_in_a_cold_start_and_then_the_students(
    world, tmp_path, updates
):
    """Else the teacher would go on after its own, and the student be trained on what follows."""

    def stops(model, _):
        model.generation_config.eos_token_id = [END, *range(6, 16)]

    teacher = changed_copy(world, "teacher", tmp_path / "teacher", stops)
    train(world, tmp_path / "out", **COLD, teacher=teacher)
    cold = updates[0][1]
    all_stops = {END, *range(6, 16)}
    for row, ids in enumerate(without_padding(cold["response_ids"], cold["response_mask"])):
        assert not set(ids[:-1]) & all_stops
        assert (ids[-1] in all_stops) == cold["ended"][row]
    assert cold["ended"].sum() > 6
    saved = transformers.GenerationConfig.from_pretrained(tmp_path / "out" / "checkpoint-1")
    assert saved.eos_token_id == sorted(all_stops)


def test_with_no_merge_stops_the_teachers_stop_ids_end_no_response_of_the_student(world, tmp_path):
    def stops(model, _):
        model.generation_config.eos_token_id = [END, *range(6, 16)]

    teacher = changed_copy(world, "teacher", tmp_path / "teacher", stops)
    _, run = opened(world, tmp_path / "out", teacher=teacher, no_merge_stops=True)
    assert run.sampling["eos_ids"] == {END}


def test_the_anchor_of_an_extrapolation_is_the_student_after_its_cold_start(
    world, tmp_path, monkeypatch, updates
):
    """Not the one before: EffOPD extrapolates the update of distillation."""
    anchors = []

    def reject(weights, anchor, validate):
        anchors.append(anchor)
        return weights, 0, [0.0]

    monkeypatch.setattr(opd, "extrapolate", reject)
    path = unanswered(world, tmp_path / "train.jsonl", 2)
    flags = {**COLD, "cold_start_steps": 2, "train_file": path}
    train(world, tmp_path / "out", **flags, extrapolate=True)
    begin = opd.movable_weights(updates[0][0])
    assert_same(anchors[0], opd.movable_weights(updates[2][0]), tolerance=0)
    assert any(not torch.equal(anchors[0][name], begin[name]) for name in begin)


def test_tries_that_do_not_help_move_the_anchor_to_the_student_as_it_is(
    world, tmp_path, monkeypatch
):
    anchors, weights_then = [], []

    def reject(weights, anchor, validate):
        anchors.append(anchor)
        weights_then.append(weights)
        return weights, 0, [0.0]

    monkeypatch.setattr(opd, "extrapolate", reject)
    train(world, tmp_path, extrapolate=True, max_steps=4, eval_file=None)
    assert len(anchors) == 3
    for anchor, before in zip(anchors[1:], weights_then):
        assert_same(anchor, before, tolerance=0)


def test_a_cold_start_counts_its_tokens_separately_and_its_flops_with_the_rest(
    world, tmp_path, monkeypatch, updates
):
    monkeypatch.setattr(opd, "is_correct", says_a)
    flags = {**COLD, "cold_start_steps": 2, "method": "prefix-guided"}
    _, (step,), _ = train(world, tmp_path, **flags)
    student, teacher = load_student(world / "student"), load_student(world / "teacher")
    flops, sampled = 0, []
    for index, (_, batch, _) in enumerate(updates):
        context = batch["prompt_mask"].sum(-1) + batch["response_mask"].sum(-1)
        trained = batch["loss_mask"].sum(-1)
        learned = (batch["prompt_mask"].sum(-1) + trained)[trained > 0]
        sampled.append(int(batch["response_mask"].sum()))
        flops += 3 * opd.forward_flops(student, learned)
        flops += opd.forward_flops(teacher, context)  # it samples solutions, or it scores
        flops += opd.forward_flops(student, context) if index == 2 else 0
    assert step["cold_start_tokens"] == sampled[0] + sampled[1]
    assert step["generated_tokens"] == step["teacher_tokens"] == sampled[2]
    assert step["trained_tokens"] == updates[2][1]["loss_mask"].sum()
    assert step["flops"] == pytest.approx(flops, rel=1e-9)


def test_the_batches_of_opd_continue_after_those_of_the_cold_start(world, tmp_path, updates):
    """Nine problems in three batches: none comes twice before the file is used up."""
    train(world, tmp_path, **{**COLD, "max_steps": 2})
    assert len(updates) == 3
    drawn = sum([problems_of(batch, 4) for _, batch, _ in updates], [])
    assert len(drawn) == len(set(drawn)) == 9


def responses(folder, who):
    """The responses of `who` in its evaluation at step 0."""
    samples = test_opd.read(folder / "samples.jsonl")
    return [item["response"] for item in samples if (item["step"], item["model"]) == (0, who)]


@pytest.mark.parametrize("method", ["opd", "prefix-guided", "prune"])
def test_every_method_has_one_cold_start_with_an_evaluation_after_it(
    method, world, tmp_path, updates
):
    path = unanswered(world, tmp_path / "train.jsonl", 1)
    flags = {"cold_start_steps": 2, "cold_start_learning_rate": 0.03, "train_file": path}
    out = tmp_path / "out"
    _, _, evaluations = train(world, out, method=method, **flags)
    assert [(line["step"], line["model"]) for line in evaluations] == [
        (0, "teacher"),
        (0, "student"),
        (0, "cold_start"),
        (2, "student"),
    ]
    assert len(updates) == 4
    assert responses(out, "cold_start") != responses(out, "student")


def test_a_resumed_optimizer_has_its_moments_and_the_settings_of_the_device_it_is_on(
    world, tmp_path
):
    """fused is the one of them that differs between a GPU and a CPU."""
    config, run = opened(world, tmp_path)
    for parameter in run.student.parameters():
        parameter.grad = torch.ones_like(parameter)
    opd.optimizer_step(run.student, run.optimizer, 1e-3)
    run.step, run.optimizer.param_groups[0]["fused"] = 1, True
    opd.save_checkpoint(config, run)
    _, resumed = opened(world, tmp_path, resume=True)
    assert resumed.optimizer.param_groups[0]["fused"] is False
    moments = [run.optimizer.state_dict()["state"], resumed.optimizer.state_dict()["state"]]
    assert moments[0].keys() == moments[1].keys() != set()
    for index, before in moments[0].items():
        assert_same(moments[1][index], before, tolerance=0)


def test_a_resumed_run_has_no_second_cold_start(world, tmp_path, updates):
    """In bfloat16, where a copy of the student is evaluated."""
    path = unanswered(world, tmp_path / "train.jsonl", 1)
    flags = {"cold_start_steps": 2, "cold_start_learning_rate": 0.03, "train_file": path}
    flags |= {"dtype": "bfloat16"}
    out = tmp_path / "out"
    _, steps, _ = train(world, out, **flags, max_steps=1)
    _, resumed, evaluations = train(world, out, **flags, max_steps=2, resume=True)
    assert [(line["step"], line["model"]) for line in evaluations] == [
        (0, "teacher"),
        (0, "student"),
        (0, "cold_start"),
        (1, "student"),
        (2, "student"),
    ]
    assert len(updates) == 4  # two of the cold start, and one per run
    assert [line["step"] for line in resumed] == [1, 2]
    assert resumed[1]["cold_start_tokens"] == steps[0]["cold_start_tokens"] > 0
    assert responses(out, "cold_start") != responses(out, "student")


# --------------------------------------------------------------------------------------------------
# Trackers


@pytest.fixture
def logged(monkeypatch):
    """What fake tensorboard and wandb modules are given -> list of (folder, name, value, step)"""
    told = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            self.folder, self.waiting = folder, []
            told.append((folder, "purged from", purge_step, None))

        def add_scalar(self, name, value, step):
            # The real one loses at exit what was not flushed
            self.waiting.append((self.folder, name, value, step))

        def flush(self):
            told.extend(self.waiting)
            self.waiting.clear()

        close = flush

    def init(project, dir=None, config=None):
        def log(values, step=None):
            told.extend((dir, name, value, step) for name, value in values.items())

        return types.SimpleNamespace(log=log)

    modules = {"torch.utils.tensorboard": {"SummaryWriter": SummaryWriter}, "wandb": {"init": init}}
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return told


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_tracker_gets_the_numbers_of_metrics_jsonl_under_their_names(
    kind, world, tmp_path, logged
):
    _, steps, evaluations = train(world, tmp_path, report_to=kind, eval_every=1, probe_depths=[50])
    expected = set()
    for line in steps:
        for name, value in line.items():
            if type(value) in (int, float) and name != "step":
                expected.add((name, value, line["step"]))
    for line in evaluations:
        for name, value in line["eval"]["eval"].items():
            if value is not None:
                expected.add((f"{line['model']}/eval/{name}", value, line["step"]))
    assert {where for where, *_ in logged} == {str(tmp_path)}
    assert len(steps) == 2 and len(evaluations) == 4
    if kind == "tensorboard":
        assert logged.pop(0)[1:3] == ("purged from", 0)  # all that an earlier run left there
    told = {(name, value, step) for _, name, value, step in logged}
    assert expected <= told and ("loss", steps[0]["loss"], 1) in told
    assert any(name == "student/eval/advantage_from_50" and step == 2 for name, _, step in told)
    known = set().union(*(steps + evaluations))
    assert {name for name, *_ in told if "/" not in name} <= known
    assert all(type(value) in (int, float) for _, value, _ in told)


def test_only_the_first_rank_has_a_tracker_and_files(world, tmp_path, logged, monkeypatch):
    monkeypatch.setattr(opd, "RANK", 1)
    _, run = opened(world, tmp_path / "out", report_to="tensorboard")
    assert run.track is None and logged == [] and os.listdir(tmp_path) == []


def test_a_resumed_run_purges_what_tensorboard_has_of_later_steps(world, tmp_path, logged):
    flags = {"report_to": "tensorboard", "eval_file": None}
    train(world, tmp_path, **flags, max_steps=1)
    train(world, tmp_path, **flags, max_steps=2, resume=True)
    purged = [value for _, name, value, _ in logged if name == "purged from"]
    assert purged == [0, 2]


def no_trackers(monkeypatch):
    """Importing tensorboard or wandb now fails as it does where they are not installed."""
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    for name in ("tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)


def test_without_the_flag_no_tracker_is_imported_or_used(world, tmp_path, logged, monkeypatch):
    train(world, tmp_path / "told", max_steps=1, eval_file=None)
    assert logged == []
    no_trackers(monkeypatch)
    train(world, tmp_path / "missing", max_steps=1, eval_file=None)


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_ends_in_one_line_before_any_file_is_touched(
    kind, world, tmp_path, capfd, monkeypatch
):
    transformers.utils.logging.disable_progress_bar()
    train(world, tmp_path / "earlier", max_steps=1, eval_file=None)
    no_trackers(monkeypatch)
    before = contents(tmp_path)
    for out in ("earlier", "fresh"):
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            opd.main(command(world, tmp_path / out, report_to=kind))
        told = capfd.readouterr()
        assert stop.value.code == 2 and told.out == "" and told.err.count("\n") == 1
        # requirements.txt has neither
        assert re.match(rf"opd\.py: .*pip install .*\b{kind}\b", told.err)
        assert contents(tmp_path) == before and os.listdir(tmp_path) == ["earlier"]


def test_response_logits_come_in_the_same_chunks_of_rows_for_both_kinds_of_prompts(monkeypatch):
    """17 rows of 2 tokens after 2,000 of the teacher's prompt: 2**15 columns are 16 of its rows."""

    def states(model, ids, mask, num_last, cache):
        return torch.zeros(*ids[:, -num_last:].shape, 1)

    monkeypatch.setattr(opd, "prefill", lambda *_: None)
    monkeypatch.setattr(opd, "hidden_states", states)
    monkeypatch.setattr(opd, "head_logits", lambda model, states, *_: states)
    out = opd.empty_rollout([[5, 6]] * 17, [[5] * 2000] * 17, 2, PAD, "cpu")
    out["response_mask"][:] = True
    for name in ("prompt", "teacher_prompt"):
        sizes = [len(tokens) for _, tokens in opd.response_logits(None, out, V, name)]
        assert sizes == [16 * 2, 2]


def test_prefill_gives_equal_prompts_the_same_cache_even_if_they_are_not_neighbours():
    """Such as the beginnings of answers that the teacher continues."""
    asked = opd.pad_left([[5, 6, 7], [8, 9, 10], [5, 6, 7]], PAD)
    keys = opd.prefill(STUDENT, *asked).layers[0].keys
    assert torch.equal(keys[0], keys[2]) and not torch.equal(keys[0], keys[1])


def test_prefill_takes_a_pad_id_in_a_prompt_for_a_token():
    """The shorter of two prompts is equal to the longer but for its padding."""
    keys = opd.prefill(STUDENT, *opd.pad_left([[PAD, 6, 7], [6, 7]], PAD)).layers[0].keys
    alone = opd.prefill(STUDENT, *opd.pad_left([[6, 7]], PAD)).layers[0].keys
    close(keys[1, :, 1:], alone[0])
    assert not torch.allclose(keys[0, :, 1:], alone[0])


def test_scoring_reads_equal_prompts_once():
    """Two prompts of five and four tokens, three answers of 12 to each."""
    ids, mask = prompts(5, 4)
    order = torch.tensor([0, 0, 0, 1, 1, 1])
    out = roll(STUDENT, prompt=(ids[order], mask[order]), eos_ids={V})
    shapes, stop = forward_shapes(STUDENT)
    opd.response_log_probs(STUDENT, out, V)
    stop()
    assert shapes == [(2, 4), (6, 12)]


def test_segment_length_reaches_evaluations(world, tmp_path, monkeypatch):
    config, run = opened(world, tmp_path, segment_length=5)
    calls = watch(monkeypatch, "rollout")["rollout"]
    opd.grade(config, run, run.student, run.evals["eval"])
    assert [call["plan"].segment_length for call in calls] == [5]


@pytest.mark.parametrize("thinking", [True, None])
def test_an_evaluation_records_enable_thinking(thinking, world, tmp_path):
    config, run = opened(world, tmp_path, enable_thinking=thinking, eval_max_new_tokens=1)
    opd.evaluate_files(config, run, "student")
    (line,) = test_opd.read(tmp_path / "metrics.jsonl")
    assert line["thinking"] is bool(thinking)


# --------------------------------------------------------------------------------------------------
# 19. Report


def test_runs_that_differ_only_in_their_seed_are_one_row_with_mean_and_standard_error(tmp_path):
    """.5 .6 .7: deviation .1, over the root of 3 .0577. The seed may be written in three ways."""
    runs = (("opd/seed-0", 0.5), ("opd_seed_10", 0.6), ("opd/seed2", 0.7), ("b/opd-x/seed-0", 0.4))
    for name, after in (*runs, ("linseed3", 0.1)):  # a word that ends so names no seed
        made_run(tmp_path / name, after)
    rows, _ = table(tmp_path)
    assert list(rows) == ["opd", "b/opd-x", "linseed3"]  # the baseline first
    assert rows["opd"]["after"] == "60.0±5.8"
    assert rows["b/opd-x"]["after"] == "40.0"


def test_the_first_row_of_a_report_is_plain_opd_wherever_its_folder_is(tmp_path):
    for name in ("a/x", "b/opd", "b/prefix-guided"):
        made_run(tmp_path / name)
    rows, lines = table(tmp_path)
    assert list(rows) == ["b/opd", "a/x", "b/prefix-guided"]
    assert lines[-1].startswith("opd: here b/opd, the first row; x: times its cost")


def test_without_plain_opd_the_report_says_which_row_is_the_baseline(tmp_path):
    for name in ("x", "prune"):
        made_run(tmp_path / name)
    _, lines = table(tmp_path)
    assert lines[-1].startswith("opd: here prune, the first row")


def test_a_difference_to_the_baseline_is_taken_seed_by_seed(tmp_path):
    """.1 and .2 more: .15 ± .05, though the seeds lie .4 apart: unpaired it would be ± .32."""
    for name, accuracies in (("opd", (0.2, 0.6, 0.9)), ("prefix", (0.3, 0.8)), ("a", (0.25,))):
        for seed, after in enumerate(accuracies):
            made_run(tmp_path / name / f"seed-{seed}", after)
    made_run(tmp_path / "z" / "seed-7", 0.5)
    rows, _ = table(tmp_path)
    differences = {name: row["minus opd"] for name, row in rows.items()}
    assert differences == {"opd": "-", "a": "+5.0", "prefix": "+15.0±5.0", "z": "-"}


def test_accuracies_on_different_files_are_not_compared(tmp_path):
    made_run(tmp_path / "opd", {"aime": 0.5}, before={"aime": 0.1})
    made_run(tmp_path / "prefix", {"amc": 0.6}, before={"amc": 0.1})
    row = table(tmp_path)[0]["prefix"]
    assert row["minus opd"] == row["opd at as many tokens"] == "-"


def test_plain_opds_accuracy_at_as_many_tokens_is_interpolated_on_its_curve(tmp_path):
    """.1 at 0 tokens and .6 at 2,000: at 500 it is .225."""
    made_run(tmp_path / "opd", 0.6, before=0.1)
    made_run(tmp_path / "prefix", 0.5, before=0.1, scale=0.25)
    made_run(tmp_path / "slow", 0.5, before=0.1, scale=1)
    rows, _ = table(tmp_path)
    found = {name: row["opd at as many tokens"] for name, row in rows.items()}
    assert found == {"opd": "-", "prefix": "22.5", "slow": "60.0"}


def test_accuracy_at_as_many_tokens_is_interpolated_seed_by_seed(tmp_path):
    """
    Seed 0 had .4 at 1,000 tokens, so .25 at 500; seed 1 was not evaluated there: .225 at 500. The
    mean is .2375, its standard error .0125.
    """
    path = made_run(tmp_path / "opd" / "seed-0", after=None)
    with open(path, "a") as file:
        for step, accuracy in ((1, 0.4), (2, 0.6)):
            line = graded(step, "student", accuracy, generated_tokens=1000 * step)
            file.write(json.dumps(line) + "\n")
    made_run(tmp_path / "opd" / "seed-1")
    for seed in (0, 1):
        made_run(tmp_path / "prefix" / f"seed-{seed}", scale=0.25)
    assert table(tmp_path)[0]["prefix"]["opd at as many tokens"] == "23.8±1.2"


def test_the_recovered_gap_is_a_mean_over_runs_and_empty_if_the_teacher_is_no_better(tmp_path):
    made_run(tmp_path / "opd" / "seed-0", 0.5, teacher=0.9, before=0.1)  # .4 / .8 = 50%
    made_run(tmp_path / "opd" / "seed-1", 0.6, teacher=0.6, before=0.2)  # .4 / .4 = 100%
    made_run(tmp_path / "x" / "seed-0", 0.6, teacher=0.1, before=0.1)
    rows, _ = table(tmp_path)
    assert (rows["opd"]["gap"], rows["x"]["gap"]) == ("75%", "-")


COSTS = ("sampled", "FLOPs", "seconds")


def test_costs_are_means_over_seeds_and_then_ratios_to_the_baseline(tmp_path):
    for seed, scale in ((0, 50), (1, 150)):
        made_run(tmp_path / "opd" / f"seed-{seed}", scale=scale)  # 2 steps: 100k and 300k tokens
    made_run(tmp_path / "prefix", scale=73)
    rows, _ = table(tmp_path)
    assert [rows["opd"][name] for name in COSTS] == ["200k", "200G", "800"]
    assert [rows["prefix"][name] for name in COSTS] == ["0.73x"] * 3


def test_the_overlap_is_that_of_the_first_and_the_last_step(tmp_path):
    made_run(tmp_path / "opd", steps=3)
    made_run(tmp_path / "x", steps=1)
    rows, _ = table(tmp_path)
    assert (rows["opd"]["overlap"], rows["x"]["overlap"]) == ("0.60-0.80", "0.60-0.60")


COMPARED = "opd prefix progressive prefix-guided prune opd-extrapolate guided-random".split()


def test_the_table_of_make_compare_is_at_most_100_columns_wide(tmp_path):
    """With three seeds, large errors and large numbers. Cells end below the end of their titles."""
    for name, seed in itertools.product(COMPARED, (0, 1, 2)):
        after = 0.9 - 0.3 * seed if name == "opd" else 0.6 - 0.28 * seed
        made_run(tmp_path / name / f"seed-{seed}", after, before=0.02 * seed, scale=123.4)
    rows, lines = table(tmp_path)
    assert sorted(rows) == sorted(COMPARED)
    assert (rows["prune"]["after"], rows["prune"]["minus opd"]) == ("32.0±16.2", "-28.0±1.2")
    assert max(map(len, lines)) <= 100
    assert " ".join(lines[2].split()) == " ".join(
        title.split()[-1] for title in [*TITLES, "method"]
    )
    ends = [[word.end() for word in re.finditer(r"\S+", line)][:-1] for line in lines[2:-2]]
    assert ends == [ends[0]] * (1 + len(COMPARED))


def test_the_seconds_of_a_run_include_all_that_its_steps_timed(tmp_path):
    times = {"time_rollout": 1, "time_teacher": 2, "time_update": 4, "time_validation": 30}
    line = {"step": 2, "overlap_by_position": [None], "generated_tokens": 1, **times}
    made_run(tmp_path / "opd", steps=1, text=json.dumps(line) + "\n")
    assert opd.read_run(tmp_path, "opd")["last"]["seconds"] == 4 + 37


def test_an_interrupted_run_counts_up_to_its_last_whole_line(tmp_path):
    made_run(tmp_path / "opd")
    made_run(tmp_path / "x", after=None, steps=3, text='{"step": 4, "lo')  # killed while it wrote
    row = table(tmp_path)[0]["x"]
    shown = [row[name] for name in ("after", "minus opd", "gap", "sampled")]
    assert shown == ["-", "-", "-", "1.50x"]


def test_a_report_leaves_out_the_metrics_of_another_program(tmp_path):
    made_run(tmp_path / "opd", text='3\n[1, 2]\n{"step": 1, "eval": 0.5}\n')
    made_run(tmp_path / "same")
    rows = table(tmp_path)[0]
    assert rows["opd"]["after"] == rows["same"]["after"]


@pytest.mark.parametrize("key, value", [("flops", None), ("time_update", "1"), ("eval", [0.5])])
def test_a_run_that_lacks_what_a_report_needs_is_left_out_with_a_note(key, value, tmp_path):
    """Such as one of an older version."""
    made_run(tmp_path / "opd")
    made_run(tmp_path / "odd")
    lines = test_opd.read(tmp_path / "odd" / "metrics.jsonl")
    for line in lines:
        if key in line:
            line[key] = value
    os.remove(tmp_path / "odd" / "metrics.jsonl")
    write(tmp_path / "odd" / "metrics.jsonl", *lines)
    with pytest.warns(UserWarning, match="^odd/metrics.jsonl is left out"):
        assert set(opd.report(str(tmp_path))) == {"opd"}


def test_a_line_nested_too_deep_for_json_is_left_out(tmp_path):
    made_run(tmp_path / "opd", text="[" * 100_000 + "\n")
    assert set(opd.report(str(tmp_path))) == {"opd"}


def test_half_a_line_is_left_out_wherever_it_is(tmp_path):
    """A run is killed while it writes, then --eval_only adds a line to the same file."""
    made_run(tmp_path / "opd")
    rest = json.dumps(graded(0, "eval_only", 0.5)) + "\n"
    made_run(tmp_path / "x", after=None, text='{"step": 3, "lo' + rest)
    assert table(tmp_path)[0]["x"]["sampled"] == "1.00x"


def test_runs_without_evaluations_are_listed_but_have_no_accuracy_curve(tmp_path):
    made_run(tmp_path / "opd")
    made_run(tmp_path / "x", before=None, after=None)
    row = table(tmp_path)[0]["x"]
    assert [row[name] for name in ("teacher", "before", "after", "gap")] == ["-"] * 4
    figure = opd.draw_report(read_runs(tmp_path))
    curves = [len(axes.lines) for axes in figure.axes]
    assert curves == [1, 4]  # by position: the first and the last step of both


def test_a_report_uses_the_mean_over_evaluation_files(tmp_path):
    """The mean of .3 and .7 is .5. Recovered gap: .3 of .6."""
    others = {"teacher": {"aime": 0.7, "amc": 0.9}, "before": {"aime": 0.1, "amc": 0.3}}
    made_run(tmp_path / "opd", {"aime": 0.3, "amc": 0.7}, **others)
    made_run(tmp_path / "x", {"aime": 0.4, "amc": 0.9}, **others)
    rows, _ = table(tmp_path)
    assert (rows["opd"]["after"], rows["opd"]["gap"]) == ("50.0", "50%")
    assert rows["x"]["minus opd"] == "+15.0"


def test_later_grading_and_a_cold_start_add_no_points_to_a_runs_curve(tmp_path):
    more = [json.dumps(graded(5, who, 0.99)) + "\n" for who in ("eval_only", "cold_start")]
    made_run(tmp_path, text="".join(more))
    run = opd.read_run(tmp_path, "")
    assert run["after"] == run["final"]["eval"]["avg_at_n"] == 0.6
    assert len(run["curve"]) == 2


def test_one_group_is_a_table_of_one_row_without_ratios(tmp_path, capsys):
    made_run(tmp_path / "x" / "seed-3")
    opd.main(["--report", str(tmp_path)])
    rows, lines = table(tmp_path)
    assert capsys.readouterr().out.splitlines() == lines
    facts = rows.pop("x")
    expected = {"after": "60.0", "sampled": "2.00k", "seconds": "8.00", "gap": "62%"}
    expected |= {"minus opd": "-", "opd at as many tokens": "-"}
    assert {label: facts[label] for label in expected} == expected and not rows


def test_the_picture_has_two_panels_with_a_line_per_seed(tmp_path):
    """Two seeds have one colour; the legend names every group once."""
    made_run(tmp_path / "opd/seed-0", 0.5)
    made_run(tmp_path / "opd/seed-1", 0.7, scale=3)
    made_run(tmp_path / "x", 0.2)
    results = opd.main(["--report", str(tmp_path)])
    assert set(results) == {"opd/seed-0", "opd/seed-1", "x"}
    assert (tmp_path / "report.png").stat().st_size > 1000
    figure = opd.draw_report(read_runs(tmp_path))
    tokens, positions = (axes.lines for axes in figure.axes)
    curves = [line.get_xydata().tolist() for line in tokens]
    assert curves[:2] == [[[0, 0.1], [2000, 0.5]], [[0, 0.1], [6000, 0.7]]]
    by_position = [line.get_xydata().tolist()[0] for line in positions]
    assert by_position[:2] == [[0, 0.6], [0, 0.7]]  # the first step, the last
    colors = [line.get_color() for line in tokens]
    assert colors[0] == colors[1] != colors[2]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["opd", "x"]


def test_without_matplotlib_the_table_is_printed_and_a_line_says_what_to_install(
    tmp_path, capsys, monkeypatch
):
    made_run(tmp_path / "opd")
    for name in ["matplotlib", *sys.modules]:
        if name.split(".")[0] == "matplotlib":
            monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as stop:
        opd.main(["--report", str(tmp_path)])
    told = capsys.readouterr()
    assert stop.value.code == 2 and "60.0" in told.out
    assert told.err.count("\n") == 1 and told.err.endswith("; pip install matplotlib\n")


def test_a_report_leaves_out_the_copies_in_checkpoints_wherever_its_folder_is(tmp_path):
    folder = tmp_path / "checkpoint-study [1]"
    for name in ("opd", "opd/checkpoint-2"):
        made_run(folder / name, 0.5)
    assert set(opd.main(["--report", str(folder)])) == {"opd"}


def test_a_run_called_like_a_checkpoint_is_reported_and_its_half_and_old_checkpoints_are_not(
    tmp_path,
):
    copies = ("checkpoint.partial", "checkpoint-2", "checkpoint-2.old")
    for name in ("checkpoint-study", *(f"checkpoint-study/{name}" for name in copies)):
        made_run(tmp_path / name, 0.5)
    assert set(opd.main(["--report", str(tmp_path)])) == {"checkpoint-study"}


def test_a_report_can_be_made_without_the_lines_of_some_steps(tmp_path):
    path = made_run(tmp_path, steps=3)
    lines = test_opd.read(tmp_path / "metrics.jsonl")
    write(tmp_path / "metrics.jsonl", *lines[:2], *lines[4:])  # those of the steps 1 and 2
    run = opd.read_run(tmp_path, "")
    assert path and run["curve"] == [(0, 0.0, 0.1), (3000, 4.0, 0.6)]


ODD = ["two\nlines", "a$\\x$", "_ [1] *", "\u4e16\u754c"]


@pytest.mark.filterwarnings("ignore:Glyph")
def test_runs_in_folders_of_odd_names_are_reported_each_in_one_line(tmp_path):
    for name in ODD:
        made_run(tmp_path / name, 0.5)
    assert set(opd.main(["--report", str(tmp_path)])) == set(ODD)
    lines = opd.report_table(read_runs(tmp_path))
    assert not [line for line in lines if "\n" in line]
    assert [line for line in lines if "two lines" in line]


def test_a_config_of_a_module_that_was_loaded_again_is_one(tmp_path):
    made_run(tmp_path, 0.5)
    other = runpy.run_path(opd.__file__)["TINY"]
    assert not isinstance(other, opd.Config)
    assert opd.main(dataclasses.replace(other, report=str(tmp_path))) != {}


def test_a_report_of_no_run_with_steps_is_refused(tmp_path, capfd):
    write(tmp_path / "x" / "metrics.jsonl", graded(0, "eval_only", 0.5))
    status, line = stopped(["--report", str(tmp_path)], capfd)
    assert status == 2 and "no run below it has a metrics.jsonl with steps" in line
    status, line = stopped(["--report", str(tmp_path / "nowhere")], capfd)
    assert status == 2 and line.endswith("nowhere: there is no such folder")


def test_a_run_ends_with_its_own_report_and_the_path_of_its_checkpoint(world, tmp_path, capsys):
    train(world, tmp_path, max_steps=1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"checkpoint in {tmp_path}/checkpoint-1"
    own = opd.report_table([opd.read_run("", str(tmp_path))])
    assert lines[-1 - len(own) : -1] == own and str(tmp_path) in own[3]


def test_a_terminal_with_ascii_only_shows_question_marks(monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    opd.say("60.0±5.8", "\u4e16\udcff!")
    assert shown.getvalue() == b"60.0?5.8\n??!\n"


def test_a_standard_output_without_an_encoding_will_do(monkeypatch):
    """As a class that writes to the screen and to a file, of which users write their own."""
    shown = []
    tee = types.SimpleNamespace(write=shown.append, flush=lambda: None)
    monkeypatch.setattr(sys, "stdout", tee)
    opd.say("60.0±5.8")
    assert "".join(shown) == "60.0±5.8\n"


def test_a_closed_pipe_does_not_end_a_run(world, tmp_path):
    argv = command(world, tmp_path / "out", max_steps=3)
    process = start(run_that_nobody_hears, tmp_path, argv)
    process.join(PATIENCE)
    log = (tmp_path / "rank-0.log").read_text()
    assert process.exitcode == 0 and "rror" not in log and "Traceback" not in log
    assert checkpoints(tmp_path / "out") == ["checkpoint-3"]


def test_a_closed_pipe_of_standard_error_does_not_end_a_run_at_its_first_progress_bar(
    world, tmp_path
):
    argv = command(world, tmp_path / "out", max_steps=1)
    process = start(run_that_nobody_hears, tmp_path, argv, (1, 2))
    process.join(PATIENCE)
    assert process.exitcode == 0 and checkpoints(tmp_path / "out") == ["checkpoint-1"]


def test_without_a_standard_output_nothing_is_said(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    opd.say("x")


def test_a_run_in_a_folder_of_an_odd_name_finishes_and_resumes(world, tmp_path, capfd):
    out = tmp_path / "two\nlines $\\x$ [1]"
    train(world, out, max_steps=1)
    train(world, out, max_steps=2, resume=True)
    assert checkpoints(out) == ["checkpoint-1", "checkpoint-2"]
    status, line = stopped(command(world, out, max_steps=2, resume=True, seed=1), capfd)
    assert status == 2 and line.endswith("--seed was 0 and is 1")


def test_a_folder_whose_name_is_not_utf8_is_refused_before_anything_is_loaded(tmp_path, capfd):
    """It could be made, but no model could be saved in it."""
    out = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    status, line = stopped(["--output_dir", out], capfd)
    assert status == 2 and line.endswith("its name must be UTF-8")
    assert os.listdir(tmp_path) == []


def test_no_gap_is_shown_if_the_teacher_of_one_seed_is_not_ahead(tmp_path):
    made_run(tmp_path / "opd" / "seed-0", 0.5, teacher=0.9, before=0.1)
    made_run(tmp_path / "opd" / "seed-1", 0.5, teacher=0.2, before=0.3)
    assert table(tmp_path)[0]["opd"]["gap"] == "-"


# --------------------------------------------------------------------------------------------------
# 20. Main


def test_without_models_a_run_makes_its_tiny_world_and_uses_it_again(tmp_path, monkeypatch, made):
    """Here it is a copy of the untrained world of other tests."""
    worlds = []

    def make_world(folder, seed):
        worlds.append((folder, seed))
        shutil.copytree(made[0], folder)

    monkeypatch.setattr(opd, "make_world", make_world)
    argv = ["--output_dir", str(tmp_path), "--max_steps", "1", "--max_new_tokens", "8"]
    argv += ["--batch_size", "2", "--seed", "3", "--eval_samples", "1"]
    argv += ["--eval_max_new_tokens", "4", "--device", "cpu"]
    for _ in range(2):
        opd.main([*argv, "--method", "opd", "--prefix_length", "4", "--cap_init", "40"])
    assert worlds == [(str(tmp_path / "world"), 3)]
    evaluations = [line for line in test_opd.read(tmp_path / "metrics.jsonl") if "eval" in line]
    assert [line["eval"]["eval"]["num_problems"] for line in evaluations] == [200] * 3


def test_a_run_in_the_tiny_world_can_be_resumed(tmp_path, monkeypatch, made):
    shutil.copytree(made[0], tmp_path / "world")
    argv = ["--output_dir", str(tmp_path), "--max_new_tokens", "4", "--batch_size", "1"]
    argv += ["--eval_samples", "1", "--eval_max_new_tokens", "1", "--device", "cpu"]
    for steps in ("1", "2"):
        opd.main([*argv, "--eval_every", "1", "--max_steps", steps, "--resume"])
    steps = [line["step"] for line in test_opd.read(tmp_path / "metrics.jsonl") if "loss" in line]
    assert steps == [1, 2]


# A flag that is missing here fails the test below: write a test for it, and list it
CASES = {
    "student teacher": test_the_student_and_the_teacher_are_those_of_their_flags,
    "train_file": test_without_shares_the_files_are_one_pool,
    "mix": test_a_mixture_draws_each_files_share_to_the_nearest_prompt,
    "eval_file eval_only": test_eval_only_grades_a_model_file_by_file,
    "output_dir": test_a_run_ends_with_its_own_report_and_the_path_of_its_checkpoint,
    "report_to": test_a_tracker_gets_the_numbers_of_metrics_jsonl_under_their_names,
    "report": test_one_group_is_a_table_of_one_row_without_ratios,
    "prompt_template": test_the_prompt_template_is_put_around_each_problem,
    "teacher_prompt_template": (
        test_the_teachers_template_is_put_around_each_problem_for_the_teacher_only
    ),
    "no_chat_template": test_no_chat_template_gives_the_message_without_the_templates_tokens,
    "enable_thinking": test_enable_thinking_reaches_the_template_of_every_prompt,
    "dtype": test_in_bfloat16_sampler_and_teacher_are_bfloat16_and_trained_weights_float32,
    "device": test_the_device_is_where_the_models_go,
    "method": test_prefix_length_is_where_the_prefix_ends,
    "loss support tail baseline beta": test_the_flags_of_the_loss_choose_it,
    "cold_start_steps": test_every_method_has_one_cold_start_with_an_evaluation_after_it,
    "cold_start_learning_rate": (
        test_a_cold_start_has_a_learning_rate_of_its_own_and_the_clipping_of_the_run
    ),
    "max_prompt_length": test_a_prompt_of_exactly_the_longest_length_is_trained_on,
    "prefix_length": test_prefix_length_is_where_the_prefix_ends,
    "probe_window": test_the_probe_window_is_the_part_of_the_prefix_whose_overlap_counts,
    "keep_ratio": test_keep_ratio_is_the_share_of_candidates_that_go_on,
    "select": test_select_random_ignores_the_overlap,
    "train_pruned_prefix": test_train_pruned_prefix_trains_on_the_rows_that_lost,
    "horizon_start horizon_growth horizon_every": (
        test_the_horizon_flags_are_its_start_its_growth_and_the_steps_between
    ),
    "drift_threshold w_drop w_base": (
        test_the_drift_flags_are_the_threshold_the_drop_per_bad_event_and_the_base_weight
    ),
    "cap_init": test_cap_init_is_the_first_cap_and_no_more_than_max_new_tokens,
    "cap_min cap_max cap_step cap_margin cap_hit_ratio cap_patience": (
        test_each_cap_flag_changes_the_next_cap_and_the_misses_as_by_hand
    ),
    "no_merge_stops": (
        test_with_no_merge_stops_the_teachers_stop_ids_end_no_response_of_the_student
    ),
    "no_view": test_no_view_writes_no_rollouts_html,
    "no_prune_in_flight": test_no_prune_in_flight_stops_no_row,
    "no_gradient_checkpointing": (
        test_layers_are_recomputed_on_a_gpu_unless_told_otherwise_and_on_a_cpu_if_told
    ),
    "eval_first": test_eval_first_chooses_the_models_to_evaluate_before_the_first_step,
    "gradient_checkpointing": test_gradient_checkpointing_is_switched_on_for_the_student_only,
    "extrapolate": test_the_tries_cost_the_flops_of_their_forwards,
    "save_every": test_checkpoints_come_every_save_every_steps_and_at_the_end,
    "keep_checkpoints": test_only_the_last_checkpoints_are_kept_by_number,
    "resume": test_a_finished_run_resumed_with_more_steps_is_as_if_it_had_them_from_the_start,
    "eval_every": test_evaluations_come_every_eval_every_steps_and_at_the_end,
}


def test_every_flag_is_listed_once_in_unusual_or_in_cases():
    named = [*UNUSUAL, *" ".join(CASES).split()]
    assert sorted(named) == sorted(item.name for item in dataclasses.fields(opd.Config))
