#!/usr/bin/env python3
"""
opd.py: on-policy distillation (OPD) of language models, in one file, on one GPU or a CPU.

A small model (the student) samples solutions; a larger one (the teacher) judges every token of them; the student
moves towards the teacher where it went itself. Sampling is most of the cost, and deep in a solution that went
astray the teacher's judgement is worth little. The papers below differ in what they sample, and in little else.

    python opd.py                                       a tiny world, made on the spot: two CPU cores, no download
    python opd.py --student A --teacher B --train_file train.jsonl --eval_file aime24.jsonl --method prefix-guided
    python opd.py --eval_only --student A --eval_file aime24.jsonl amc23.jsonl

Papers, by the tag that the code cites
    [GKD]             2306.13649   on-policy distillation of language models
    [Rethinking-OPD]  2604.13016   top-k overlap and the other alignment metrics, student top-k loss
    [FastOPD]         2602.15260   train on prefixes only, let the prefix grow
    [POPD]            2605.31490   the same schedule as a staircase ("TOPD": a fixed horizon)
    [PG-OPD]          2606.21994   prefix-guided: continue the candidates whose opening agrees with the teacher
    [Prune-OPD]       2605.07804   weigh down and stop what drifts, and move the length cap
    [EffOPD]          2605.11739   extrapolate the update, gated by a small validation set
    [vOPD]            2605.07865   closed-form baseline of the sampled-token loss

One step, and the section that does it
    prompts (2) -> rollout (9): for each segment of the response: generate (3), score and overlap (4), who goes on (5)
    -> train_step (10): losses (6) -> extrapolate (7) -> evaluate (8)

Shapes: P prompts, G candidates per prompt, B = P * G rows (candidate g of prompt p is row p * G + g), S prompt
length, T response length, V vocabulary, K the top k, N = all response tokens of some rows, one after the other.

Not here: vLLM, several GPUs, two different tokenizers, tools and dialogues. The README says which project has them.
"""
import argparse
import contextlib
import copy
import functools
import inspect
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig, PreTrainedTokenizerFast

# ---------------------------------------------------------------------------------------------------------------------
# 1. Flags. One row each: name, default for real models, default for the tiny world (= when it is the same), help.
#    A paper's tag in the help says whose value the default is; "our choice" says that we saw no published one.

METHODS = ("opd", "prefix", "progressive", "prefix-guided", "prune")
LOSSES = ("reverse_kl", "topk", "sampled")
SUPPORTS = ("student", "teacher", "intersection", "union")
CHOICES = {"method": METHODS, "loss": LOSSES, "support": SUPPORTS, "dtype": ("auto", "float32", "bfloat16")}
SAME = object()

FLAGS = {
    "models and data": [
        ("student", "", SAME, "model folder or hub name; without --student and --teacher a tiny world is made"),
        ("teacher", "", SAME, "model folder or hub name; its tokenizer must map tokens to the ids of the student's"),
        ("train_file", [], SAME, "problems to train on: jsonl, json or parquet files; answers are not needed"),
        ("eval_file", [], SAME, "problems with answers to evaluate on, one result row per file"),
        ("output_dir", "out", SAME, "metrics.jsonl, samples.jsonl, checkpoints, and the tiny world"),
        ("prompt_template", r"{problem} Please reason step by step, and put your final answer within \boxed{}.",
         "{problem}", "the user's message [Rethinking-OPD]"),
        ("no_chat_template", False, SAME, "give the model the message as it is (base models without a template)"),
        ("enable_thinking", False, SAME, "passed to chat templates that know it (Qwen3)"),
        ("dtype", "auto", SAME, "auto: bfloat16 with float32 master weights of the student on a GPU, float32 on a CPU"),
        ("device", "", SAME, "cuda, cuda:1, mps, cpu; default: the first GPU, else the CPU"),
        ("seed", 0, SAME, "of everything: the tiny world, the order of the data, the sampling"),
    ],
    "method and loss": [
        ("method", "opd", SAME, "opd: all to the cap. prefix: all to --prefix_length [FastOPD, TOPD]. progressive: to a "
         "growing horizon [FastOPD, POPD]. prefix-guided: only the candidates that agree with the teacher go on past "
         "the prefix [PG-OPD]. prune: tokens after drift weigh less, rows without reliability stop [Prune-OPD]"),
        ("loss", "topk", "reverse_kl", "reverse_kl: KL(student || teacher) over the vocabulary [GKD]. topk: over the top "
         "k, with the gradient of the released code [Rethinking-OPD]. sampled: k1 policy gradient of the sampled token"),
        ("support", "student", SAME, "whose top k --loss topk sums over [Rethinking-OPD]"),
        ("baseline", False, SAME, "--loss sampled minus its closed-form baseline [vOPD]"),
        ("overlap_k", 16, 4, "k of the overlap and of --loss topk [Rethinking-OPD, PG-OPD, Prune-OPD]"),
    ],
    "sampling": [
        ("batch_size", 64, 16, "prompts per step [Rethinking-OPD]"),
        ("num_generations", 4, SAME, "candidates per prompt [Rethinking-OPD, PG-OPD, Prune-OPD]"),
        ("max_prompt_length", 1024, 64, "longer training prompts are left out [Rethinking-OPD]"),
        ("max_new_tokens", 7168, 96, "cap of a response in training [Rethinking-OPD]"),
        ("temperature", 1.0, SAME, "divides both models' logits, in sampling and in the loss [all papers: 1]"),
        ("segment_length", 512, 16, "tokens between two looks at who goes on (our choice)"),
        ("prefix_length", 1024, 24, "of prefix and prefix-guided (our choice; unseen in the papers)"),
        ("probe_window", 128, 16, "prefix-guided: the first tokens, whose mean overlap is the score [PG-OPD]"),
        ("keep_ratio", 0.5, SAME, "prefix-guided: the share of all candidates that goes on [PG-OPD: .25, .5, .75]"),
        ("train_pruned_prefix", False, SAME, "prefix-guided: train on the prefixes of the others too"),
        ("horizon_start", 512, 16, "progressive: first horizon (our choice; unseen in the papers)"),
        ("horizon_growth", 256, 8, "progressive: tokens added each time (our choice)"),
        ("horizon_every", 10, 4, "progressive: steps between two additions (our choice)"),
        ("drift_threshold", 0.7, SAME, "prune: an overlap below this is a bad event [Prune-OPD]"),
        ("w_drop", 0.01, 0.05, "prune: reliability lost per bad event [Prune-OPD]"),
        ("w_base", 0.5, SAME, "prune: weight that a token keeps at reliability 0 [Prune-OPD]"),
        ("cap_init", 2048, 48, "prune: first length cap; prune ignores --max_new_tokens [Prune-OPD]"),
        ("cap_min", 1024, 24, "prune: smallest cap [Prune-OPD]"),
        ("cap_max", 12288, 96, "prune: largest cap [Prune-OPD]"),
        ("cap_step", 100, 8, "prune: how far the cap moves [Prune-OPD]"),
        ("cap_margin", 100, 8, "prune: a row hits the cap when reliable to within this margin [Prune-OPD]"),
        ("cap_hit_ratio", 0.1, SAME, "prune: share of rows that must hit for the cap to grow [Prune-OPD]"),
        ("cap_patience", 3, SAME, "prune: misses in a row before the cap shrinks [Prune-OPD]"),
        ("no_prune_in_flight", False, SAME, "prune: only move the cap, as released; do not stop rows while they run"),
    ],
    "optimisation": [
        ("learning_rate", 1e-6, 1e-3, "of AdamW, constant after the warm-up [Rethinking-OPD, Prune-OPD, EffOPD]"),
        ("warmup_steps", 0, SAME, "linear warm-up [EffOPD: none]"),
        ("max_steps", 200, 40, "one epoch of DAPO-Math-17K is about 200 steps [Rethinking-OPD]"),
        ("max_grad_norm", 1.0, SAME, "gradient clipping (our choice)"),
        ("micro_batch_size", 4, 64, "rows per forward and backward; does not change the gradients"),
        ("gradient_checkpointing", False, SAME, "recompute the student's layers in backward: less memory, more time"),
        ("extrapolate", False, SAME, "at steps 1, 2, 4, 8, ... try to go on along the update [EffOPD]"),
        ("validation_size", 50, SAME, "training prompts that judge an extrapolation; they need answers [EffOPD]"),
        ("save_every", 0, SAME, "steps between checkpoints; 0: only at the end and when interrupted"),
    ],
    "evaluation": [
        ("eval_only", False, SAME, "grade --student on --eval_file and stop"),
        ("eval_every", 20, 0, "steps between evaluations; 0: only before and after"),
        ("eval_samples", 16, 4, "answers per problem [Rethinking-OPD, PG-OPD, Prune-OPD]"),
        ("eval_temperature", 0.7, 1.0, "0 is greedy [Rethinking-OPD]"),
        ("eval_top_p", 0.95, 1.0, "nucleus of the evaluation only [Rethinking-OPD]"),
        ("eval_max_new_tokens", 31744, 96, "full length, whatever the training cap [Rethinking-OPD]"),
    ],
}
ALIASES = {"student": "model_name_or_path", "teacher": "teacher_model_name_or_path",
           "max_new_tokens": "max_completion_length"}


def parse_args(argv=None):
    """
    Command line -> argparse.Namespace. Raises ValueError, in one line, for what cannot work.

    Two sets of defaults: the papers' for real models, small ones for the tiny world, which is what runs when neither
    --student nor --teacher is given.
    """
    parser = argparse.ArgumentParser(
        prog="opd.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog="Defaults are for real models; [tiny: x] is the default in the tiny world.")

    def fail(message):
        raise ValueError(f"{message}; see python opd.py --help")
    parser.error = fail

    for title, rows in FLAGS.items():
        group = parser.add_argument_group(title)
        for name, default, tiny, text in rows:
            names = [f"--{name}"] + [f"--{ALIASES[name]}"] * (name in ALIASES)
            if default is not False and default != [] and default != "":
                text += f" (default {default}{'' if tiny is SAME else f' [tiny: {tiny}]'})"
            kind = {"action": "store_true"} if default is False else {"nargs": "+", "metavar": "FILE"} \
                if isinstance(default, list) else {"type": type(default), "choices": CHOICES.get(name)}
            group.add_argument(*names, default=default, help=text.replace("%", "%%"), **kind)
    given = parser.parse_args(argv)
    if not given.student and not given.teacher:
        parser.set_defaults(**{row[0]: row[2] for rows in FLAGS.values() for row in rows if row[2] is not SAME})
        given = parser.parse_args(argv)
    check_args(given)
    return given


def check_args(args):
    """Raises ValueError for flags that cannot work, alone or together, before anything is loaded or written."""
    def need(condition, message):
        if not condition:
            raise ValueError(message)

    for name in ("batch_size", "num_generations", "max_prompt_length", "max_new_tokens", "segment_length", "overlap_k",
                 "prefix_length", "probe_window", "horizon_start", "horizon_every", "cap_init", "cap_min", "cap_max",
                 "cap_step", "cap_patience", "max_steps", "micro_batch_size", "validation_size", "eval_samples",
                 "eval_max_new_tokens", "temperature", "learning_rate", "max_grad_norm"):
        need(getattr(args, name) > 0, f"--{name} {getattr(args, name)} must be above 0")
    for name in ("horizon_growth", "cap_margin", "warmup_steps", "save_every", "eval_every", "eval_temperature",
                 "drift_threshold", "w_drop", "w_base", "cap_hit_ratio", "seed"):
        need(getattr(args, name) >= 0, f"--{name} {getattr(args, name)} must not be below 0")
    need(0 < args.eval_top_p <= 1, f"--eval_top_p {args.eval_top_p} must be above 0 and at most 1")
    need(0 < args.keep_ratio <= 1, f"--keep_ratio {args.keep_ratio} must be above 0 and at most 1")
    need("{problem}" in args.prompt_template, "--prompt_template must contain {problem}, where the problem goes")
    need(args.cap_min <= args.cap_init <= args.cap_max,
         f"--cap_init {args.cap_init} must lie between --cap_min {args.cap_min} and --cap_max {args.cap_max}")
    if args.method == "prefix-guided":
        rows, kept = args.batch_size * args.num_generations, round(args.keep_ratio * args.batch_size * args.num_generations)
        need(kept >= args.batch_size, f"--keep_ratio {args.keep_ratio} keeps {kept} of {rows} candidates, less than one "
             f"for each of {args.batch_size} prompts; use at least {1 / args.num_generations:.4g}")
        need(args.probe_window <= args.prefix_length, f"--probe_window {args.probe_window} is longer than "
             f"--prefix_length {args.prefix_length}; the probe reads tokens of the prefix")
        need(args.prefix_length < args.max_new_tokens, f"--prefix_length {args.prefix_length} leaves nothing to continue "
             f"up to --max_new_tokens {args.max_new_tokens}")
    need(not args.eval_only or args.eval_file or not args.student, "--eval_only needs --eval_file")
    need(args.eval_only or bool(args.student) == bool(args.teacher), "give both --student and --teacher, or neither "
         "(then a tiny world is made)")
    need(not args.teacher or args.eval_only or args.train_file, "--student and --teacher need --train_file")
    need(args.student or not (args.train_file or args.eval_file), "--train_file and --eval_file need --student and "
         "--teacher; the tiny world brings its own problems")


# ---------------------------------------------------------------------------------------------------------------------
# 2. Data and grading


def read_records(path):
    """A jsonl, json or parquet file -> list of (line number, object). Raises OSError, or ValueError naming the line."""
    if path.endswith(".parquet"):
        try:
            import pandas
            frame = pandas.read_parquet(path)                     # raises ImportError too, when pyarrow is missing
        except ImportError:
            raise ValueError(f"{path}: parquet needs 'pip install pandas pyarrow'; or save it as jsonl") from None
        return list(enumerate(frame.astype(object).where(frame.notna(), None).to_dict("records"), start=1))
    with open(path, encoding="utf-8") as file:
        text = file.read()
    try:
        if path.endswith(".json"):
            number = 1
            return list(enumerate(json.loads(text), start=1))
        # Not splitlines(): inside a JSON string, U+2028 is a character and no line end
        lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        return [(number, json.loads(line)) for number, line in lines]
    except json.JSONDecodeError as error:
        bad = next((n for n, line in lines if line == error.doc), 0) if not path.endswith(".json") else error.lineno
        raise ValueError(f"{path}, line {bad}: not JSON ({error.msg})") from None


def last_boxed(text):
    r"""
    The content of the last balanced \boxed{...} of a text, or None. Example: r"\boxed{1} no, \boxed{\frac{1}{2}}" ->
    r"\frac{1}{2}". A box that never closes is not one: a solution cut off while it writes its answer has none.
    """
    for start in reversed([match.end() for match in re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for position in range(start, len(text)):
            if text[position] in "{}" and text[position - 1] != "\\":
                depth += 1 if text[position] == "{" else -1
            if depth == 0:
                return text[start:position]
    return None


def strip_instructions(text):
    """A problem without the instructions that some files add to it, which fight --prompt_template and the grader."""
    for instruction in (
            "Solve the following math problem step by step. The last line of your response should be of the form "
            "Answer: $Answer (without quotes) where $Answer is the answer to the problem.",
            'Remember to put your answer on its own line after "Answer:".',
            r"Please reason step by step, and put your final answer within \boxed{}."):
        text = text.replace(instruction, "")
    return text.strip()


def load_problems(path):
    """
    A jsonl, json or parquet file -> list of {"problem": str, "answer": str or None}, without duplicate problems (a
    warning says how many). Raises OSError, or ValueError that names the file and the line.

    Knows the field names of the usual data sets, takes the user's turn of a chat, and unwraps a gold answer from the
    solution, its box, or GSM8K's "#### 42".
    """
    records, problems = read_records(path), {}
    for number, record in records:
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: needs an object with named fields, not {str(record)[:40]!r}")
        fields = {**(record.get("reward_model") or {}), **record}
        problem, answer = (next((fields[name] for name in names if fields.get(name) is not None), None) for names in (
            ("problem", "question", "prompt", "messages"), ("answer", "final_answer", "ground_truth", "solution")))
        if problem is not None and not isinstance(problem, str):
            turns = {turn["role"]: turn["content"] for turn in problem}   # of a chat, the last turn of each role
            problem, answer = turns.get("user"), turns.get("assistant") if answer is None else answer
        if not isinstance(problem, str) or not problem.strip():
            raise ValueError(f"{path}, line {number}: no problem; its fields are {', '.join(record) or 'none'}, and it "
                             "needs one of problem, question, prompt, messages")
        if answer is not None:
            answer = str(answer).rsplit("####", 1)[-1]
            answer = (last_boxed(answer) or answer).strip().strip("$").strip()
        problems.setdefault(strip_instructions(problem), answer or None)
    if not problems:
        raise ValueError(f"{path}: the file is empty; it needs one problem per line")
    if len(problems) < len(records):
        warnings.warn(f"{path}: left out {len(records) - len(problems)} duplicates of {len(problems)} problems")
    return [{"problem": problem, "answer": answer} for problem, answer in problems.items()]


def math_equal(gold, answer):
    r"""
    Whether math-verify takes answer for gold, both bare LaTeX; with answer None, whether gold can be read at all.

    Both are wrapped: math-verify reads a bare \left( 3, \frac{\pi}{2} \right) as 3. Gold comes first in verify: 1<x<2 is
    accepted for (1,2), but not the other way round. No timeouts here: math-verify's are signals, which work in the main
    thread only and cancel the alarms of the caller; math_verify_answers bounds the time from outside.
    """
    from math_verify import parse, verify
    gold = parse(f"\\boxed{{{gold}}}", parsing_timeout=None)
    if answer is None:
        return bool(gold)
    return bool(verify(gold, parse(f"\\boxed{{{answer}}}", parsing_timeout=None), timeout_seconds=None))


@functools.cache
def grading_process():
    """A Python process that runs math_equal on each line it is sent. One for all answers: importing sympy is slow."""
    loop = ("import json, sys\nprint('ready', flush=True)\nfor line in sys.stdin:\n    try:\n"
            "        equal = math_equal(*json.loads(line))\n    except Exception:\n        equal = False\n"
            "    print(json.dumps(equal), flush=True)\n")
    code = "from math_verify import parse\n" + inspect.getsource(math_equal) + loop
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True)
    process.stdout.readline()
    return process


GRADING_LOCK = threading.Lock()


def ask_math_verify(gold, answer, timeout=3.0):
    r"""
    math_equal in a process of its own, from any thread; False if it takes longer than timeout seconds.

    \boxed{2003^{2002^{2001}}} would keep sympy busy for ever, inside one C call that no signal and no thread can stop.
    A process can be killed.
    """
    with GRADING_LOCK:
        process, reply = grading_process(), []
        process.stdin.write(json.dumps([gold, answer]) + "\n")
        process.stdin.flush()
        reader = threading.Thread(target=lambda: reply.append(process.stdout.readline()), daemon=True)
        reader.start()
        reader.join(timeout)
        if not reply or not reply[0]:
            process.kill()
            process.wait()
            grading_process.cache_clear()
            return False
        return json.loads(reply[0])


def is_correct(response_text, gold):
    r"""
    Whether the last balanced \boxed{...} after any </think> equals the gold answer. No box is wrong, so a solution that
    was cut off is wrong, whatever numbers it wrote on its way.
    """
    answer, gold = last_boxed(response_text.rsplit("</think>", 1)[-1]), last_boxed(gold) or gold
    if answer is None:
        return False
    answer, gold = ("".join(text.strip().strip("$").split()) for text in (answer, gold))
    if answer == gold:
        return True
    if re.fullmatch(r"-?\d{1,300}", answer) and re.fullmatch(r"-?\d{1,300}", gold):
        return int(answer) == int(gold)
    return ask_math_verify(gold, answer)


def encode_prompts(tokenizer, problems, template, chat_template=True, **template_flags):
    """Problems (str) -> list of lists of token ids: the template filled in, as a user's turn where there is a chat template."""
    encoded = []
    for problem in problems:
        text = template.replace("{problem}", problem)
        if chat_template and tokenizer.chat_template:
            text = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False,
                                                 add_generation_prompt=True, **template_flags)
            # The template wrote its own special tokens, so the tokenizer must not add a second set
            encoded.append(tokenizer(text, add_special_tokens=False).input_ids)
        else:
            encoded.append(tokenizer(text + "\n").input_ids)
    return encoded


def pad_left(rows, pad_id):
    """
    Lists of ids -> ids (B, S), mask (B, S) bool. On the left, so that all rows start their response in one column.
    The mask is made from the lengths: where pad and EOS are one id, `ids != pad` would hide real tokens.
    """
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    return ids, mask


def batch_indices(step, batch_size, num_problems, seed):
    """
    Which problems step 1, 2, ... trains on: every one once in a new order before any comes again. A function of its
    arguments alone, so a resumed run needs no sampler state, and every method sees the same prompts in the same order.
    """
    indices = []
    for position in range((step - 1) * batch_size, step * batch_size):
        epoch, place = divmod(position, num_problems)
        indices.append(int(np.random.default_rng((seed, epoch)).permutation(num_problems)[place]))
    return indices


# ---------------------------------------------------------------------------------------------------------------------
# 3. Sampling

def mask_through_eos(ids, eos_ids):
    """
    (B, T) ids -> (B, T) bool: True up to and including the first EOS of each row. The EOS is a token like the others:
    without it in the mask a student never learns when to stop.
    """
    is_eos = torch.isin(ids, torch.tensor(sorted(eos_ids), dtype=ids.dtype, device=ids.device))
    return is_eos.cumsum(-1) - is_eos.long() == 0


@torch.no_grad()
def generate(model, input_ids, attention_mask, cache, *, max_new_tokens, vocab_size, eos_ids, pad_id,
             temperature=1.0, top_p=1.0, record_k=0):
    """
    Sample up to max_new_tokens further tokens for every row, on the KV cache that the last call left.

    input_ids (B, L), left-padded, attention_mask (B, L), cache: a DynamicCache of the first L - 1 columns, or empty
    -> new ids (B, n), and the record_k likeliest tokens at each of them (B, n, K), best first.

    n is max_new_tokens, or less when all rows have ended. Rows that ended go on as pad_id; mask_through_eos says where.
    temperature 0 is greedy. Draws from torch's global stream.
    """
    topk = []

    def within_vocabulary(_, scores):
        scores = scores[:, :vocab_size]           # rows of the embedding that are no token must never be sampled
        if record_k:
            topk.append(scores.topk(record_k).indices)
        return scores

    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=temperature > 0, temperature=temperature or 1.0, top_p=top_p, top_k=0,
        eos_token_id=sorted(eos_ids) or None, pad_token_id=pad_id)
    # generate fills what we leave open from the config that came with the model: a repetition penalty or a list of
    # suppressed tokens there would sample from another law than the one the loss scores
    shipped, model.generation_config = model.generation_config, GenerationConfig()
    try:
        ids = model.generate(input_ids, attention_mask=attention_mask.long(), past_key_values=cache,
                             generation_config=config, logits_processor=[within_vocabulary])
    finally:
        model.generation_config = shipped
    return ids[:, input_ids.shape[1]:], torch.stack(topk, dim=1) if record_k else None


# ---------------------------------------------------------------------------------------------------------------------
# 4. Scoring and overlap

def hidden_states(model, ids, mask, num_last, cache=None):
    """
    The final hidden states that predict the last num_last columns of ids (B, L), mask (B, L) -> (B, num_last, H).

    What predicts column t stands at column t - 1: this is the shift by one, and the only place where it is made. Columns
    that the cache already holds are not computed again. Positions count real tokens, because left padding would
    otherwise shift learned positions (GPT-2); rotary ones only see differences.
    """
    seen = cache.get_seq_length() if cache is not None else 0
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    output = model.base_model(
        input_ids=ids[:, seen:-1], attention_mask=mask[:, :-1].long(), position_ids=positions[:, seen:-1],
        past_key_values=cache, use_cache=cache is not None)
    return output.last_hidden_state[:, -num_last:]


def head_logits(model, hidden, vocab_size):
    """
    Hidden states (..., H) -> logits (..., vocab_size) in float32, as the model's own forward gives them.

    Calls the head's module, not its weight, so that adapters on it count; rows that are no token are cut off before any
    softmax. Softcap: Gemma. Scales: Cohere multiplies, Granite divides. check_head refuses what this does not know.
    """
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(hidden)[..., :vocab_size].float()
    logits = logits * (getattr(config, "logit_scale", None) or 1) / (getattr(config, "logits_scaling", None) or 1)
    softcap = getattr(config, "final_logit_softcapping", None)
    return torch.tanh(logits / softcap) * softcap if softcap else logits


def topk_overlap(student_logits, teacher_logits, k):
    """
    Fraction of the student's k likeliest tokens that are also among the teacher's.          [Rethinking-OPD]
    (B, T, V), (B, T, V) -> (B, T), each one of 0, 1/k, ..., 1.

    Rank inside the top k does not count, only membership. Two unrelated models overlap by k/V, not by 0.
    """
    student_topk = student_logits.topk(k, dim=-1).indices                               # (B, T, K)
    teacher_topk = teacher_logits.topk(k, dim=-1).indices
    hit = student_topk[..., :, None] == teacher_topk[..., None, :]                       # (B, T, K, K)
    return hit.any(-1).float().mean(-1)


def alignment_per_token(student_logits, teacher_logits, k):
    """
    What `alignment` averages, per position: (..., V), (..., V) -> dict of (...), NaN where undefined.

    With p, q the student's and the teacher's probabilities, I the tokens in the top k of both, and bars for
    renormalised on I:                                                            [Rethinking-OPD, methods a']
        overlap_ratio            |I| / k
        overlap_token_advantage  1/|I| sum_I p_bar (log q_bar - log p_bar)       <= 0; NaN where I is empty
        overlap_mass_student     sum_I p             overlap_mass_teacher  sum_I q       not renormalised
        entropy_student, entropy_teacher             over the whole vocabulary, in nats
        entropy_gap              |entropy_teacher - entropy_student|
        reverse_kl               KL(student || teacher) over the whole vocabulary, whatever the loss is
    """
    log_p, log_q = F.log_softmax(student_logits.float(), -1), F.log_softmax(teacher_logits.float(), -1)
    ids = log_p.topk(k, dim=-1).indices                                                  # (..., K)
    shared = (ids[..., :, None] == log_q.topk(k, dim=-1).indices[..., None, :]).any(-1)
    top_p, top_q = log_p.gather(-1, ids), log_q.gather(-1, ids)
    bar_p = top_p.masked_fill(~shared, -torch.inf).log_softmax(-1)     # all NaN where I is empty, and NaN is what we want
    bar_q = top_q.masked_fill(~shared, -torch.inf).log_softmax(-1)
    advantage = torch.where(shared, bar_p.exp() * (bar_q - bar_p), 0).sum(-1) / shared.sum(-1)
    entropy_p, entropy_q = -(log_p.exp() * log_p).sum(-1), -(log_q.exp() * log_q).sum(-1)
    return {"overlap_ratio": shared.float().mean(-1), "overlap_token_advantage": advantage,
            "overlap_mass_student": (top_p.exp() * shared).sum(-1), "overlap_mass_teacher": (top_q.exp() * shared).sum(-1),
            "entropy_student": entropy_p, "entropy_teacher": entropy_q, "entropy_gap": (entropy_q - entropy_p).abs(),
            "reverse_kl": (log_p.exp() * (log_p - log_q)).sum(-1)}


def alignment(student_logits, teacher_logits, response_mask, k):
    """
    Means of alignment_per_token over the valid positions. (B, T, V), (B, T, V), (B, T) bool -> dict of floats.
    Positions where the top k share nothing have no overlap_token_advantage and are left out of its mean.
    """
    per_token = alignment_per_token(student_logits, teacher_logits, k)
    return {name: value[response_mask.bool()].nanmean().item() for name, value in per_token.items()}


# ---------------------------------------------------------------------------------------------------------------------
# 5. Who goes on: horizon, selection, drift, cap

def horizon(step, start, growth, every, max_length):
    """
    How many tokens to sample at step 0, 1, 2, ...: min(max_length, start + growth * floor(step / every)).
    every = 1 is FastOPD's schedule, more is POPD's staircase, growth = 0 a fixed prefix.        [FastOPD, POPD]
    Example: start 512, growth 256, every 10: steps 0 to 9 give 512, step 10 gives 768.
    """
    return min(max_length, start + growth * (step // every))


def select_prefixes(score, num_keep):
    """
    Which candidates go on past the prefix. (P, G) scores -> (P, G) bool with num_keep True.            [PG-OPD]

    Prompt minimum: the best candidate of every prompt, then the best of all the others until num_keep are chosen. With
    num_keep = P this is "best of G per prompt"; every slot above P is won across prompts, so prompts on which the models
    agree take most of them. Equal scores: the first one wins. Raises ValueError unless P <= num_keep <= P * G.
    """
    P, G = score.shape
    if not P <= num_keep <= P * G:
        raise ValueError(f"num_keep must lie between {P} prompts and {P * G} candidates, got {num_keep}")
    is_best = F.one_hot(score.argmax(dim=1), G)                                          # (P, G)
    by_score = score.flatten().argsort(descending=True, stable=True)
    order = by_score[is_best.flatten()[by_score].argsort(descending=True, stable=True)]  # the best first, then the rest
    keep = torch.zeros(P * G, dtype=torch.bool, device=score.device)
    keep[order[:num_keep]] = True
    return keep.view(P, G)


def drift_weights(overlap, response_mask, threshold, w_drop):
    """
    How far each token can still be trusted once its prefix has drifted. (B, T), (B, T) -> (B, T) in [0, 1]  [Prune-OPD]

        w_t = max(0, 1 - w_drop * #{s <= t: overlap_s < threshold}), 0 outside the mask; the loss weight is w_t + w_base

    A bad token lowers its own weight and that of every later one, and nothing brings it back: the teacher judges a
    token given all before it. Example: threshold .75, w_drop .1, overlap (1, .5, 0) -> (1, .9, .8).
    """
    bad = (overlap < threshold) & response_mask.bool()
    return (1 - w_drop * bad.cumsum(-1)).clamp(min=0) * response_mask


def reliable_length(weights, response_mask):
    """How many tokens of each row still have some reliability, w > 1e-8. (B, T), (B, T) -> (B,)       [Prune-OPD]"""
    return ((weights > 1e-8) & response_mask.bool()).sum(-1)


def next_max_length(reliable, max_length, misses, *, step, margin, hit_ratio, patience, low, high):
    """
    Prune-OPD's cap for the next rollouts: reliable (B,) lengths under the cap max_length -> (max_length, misses).

    It grows by step as soon as a share hit_ratio of the rows is reliable to within margin of the cap, and shrinks by
    step after patience steps in a row without. Rows that end early can never hit: growth needs long, reliable rows.
    Example: cap 2048, margin 100: a tenth of the rows at 1948 or more -> 2148; three misses -> 1948.    [Prune-OPD]
    """
    boundary = max(low, max_length - margin)
    if (reliable >= boundary).float().mean().item() >= hit_ratio:
        return min(max_length + step, high), 0
    if misses + 1 >= patience:
        return max(max_length - step, low), 0
    return max_length, misses + 1


# ---------------------------------------------------------------------------------------------------------------------
# 6. Losses, per token. Contexts are constants: no gradient flows through the sampling.

def reverse_kl(student_logits, teacher_logits):
    """
    KL(student || teacher) over the whole vocabulary. (B, T, V), (B, T, V) -> (B, T)                     [GKD]

        sum_v p(v) (log p(v) - log q(v)),   p student, q teacher

    Written out, not called: F.kl_div(a, b) is KL(b || a), and the direction decides whether the student settles on what
    the teacher does (this one) or spreads over all that it might do.
    """
    log_p = F.log_softmax(student_logits.float(), dim=-1)       # bfloat16 has 8 bits: the difference would be noise
    log_q = F.log_softmax(teacher_logits.float(), dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl_topk(student_logits, teacher_logits, k, support="student"):
    """
    Reverse KL on a support S of top-k tokens, (B, T, V), (B, T, V) -> (B, T).              [Rethinking-OPD, code]

        value sum_S p_bar(v) rho(v),  rho = log p - log q,  p_bar = p / P_S,  P_S = sum_S p
        gradient wrt the logits, u in S: (p(u) rho(u) - p(u) sum_S p rho) / P_S; the second term for u outside

    This is the gradient of the released code, not that of the renormalised KL in the paper: p_bar rho is a constant and
    log p carries the gradient. It vanishes at p = q, and it can move mass into S and out of it. Backpropagating through
    sum_S p rho instead would push mass out of S even at p = q.
    support: the top k of the student | of the teacher | their intersection (0 where empty) | their union.
    """
    log_p, log_q = F.log_softmax(student_logits.float(), dim=-1), F.log_softmax(teacher_logits.float(), dim=-1)
    ids, teacher_ids = log_p.topk(k, dim=-1).indices, log_q.topk(k, dim=-1).indices      # (B, T, K)
    same = ids[..., :, None] == teacher_ids[..., None, :]
    if support == "student":
        inside = torch.ones_like(ids, dtype=torch.bool)
    elif support == "teacher":
        ids, inside = teacher_ids, torch.ones_like(ids, dtype=torch.bool)
    elif support == "intersection":
        inside = same.any(-1)
    elif support == "union":
        inside = torch.cat([torch.ones_like(ids, dtype=torch.bool), ~same.any(-2)], dim=-1)  # no token counts twice
        ids = torch.cat([ids, teacher_ids], dim=-1)                                      # (B, T, 2K)
    else:
        raise ValueError(f"support must be student, teacher, intersection or union, got {support!r}")
    log_p, log_q = log_p.gather(-1, ids), log_q.gather(-1, ids)
    p = log_p.exp() * inside
    constant = (p / p.sum(-1, keepdim=True).clamp(min=1e-20) * (log_p - log_q)).detach()
    # ratio is 1, and its gradient that of log p: the importance ratio of the released code, strictly on-policy
    ratio = (log_p - log_p.detach()).exp()
    return (constant * ratio).sum(-1)


def reverse_kl_sampled(student_logits, teacher_logits, response_ids, baseline=False):
    """
    k1 policy-gradient surrogate of the sampled tokens. (B, T, V), (B, T, V), (B, T) -> (B, T)           [GKD]

        - stop_gradient(r) log p(y),   r = log q(y) - log p(y)

    Averaged over y ~ p its gradient is that of reverse_kl; its value means nothing. baseline=True takes r + KL for r:
    the mean of r is -KL, so the advantage then has mean 0 and a smaller variance, at the same mean gradient. [vOPD]
    (With -KL alone as the advantage the mean gradient would be exactly 0: a state's constant teaches nothing.)
    """
    log_p = F.log_softmax(student_logits.float(), dim=-1)
    log_q = F.log_softmax(teacher_logits.float(), dim=-1)
    sampled = response_ids[..., None]
    reward = (log_q - log_p).gather(-1, sampled).squeeze(-1)
    if baseline:
        reward = reward + (log_p.exp() * (log_p - log_q)).sum(-1)
    return -reward.detach() * log_p.gather(-1, sampled).squeeze(-1)


# ---------------------------------------------------------------------------------------------------------------------
# 7. Extrapolation

def extrapolate(weights, anchor, validate, max_tries=5):
    """
    Go on along the update while a validation score rises.                                              [EffOPD]

        try weights + 2k (weights - anchor) for k = 1, 2, ..., max_tries; stop at the first that is not strictly better

    weights, anchor: dicts of tensors, now and as accepted the last time; validate(dict) -> float.
    Returns (accepted dict, accepted k, [scores: of weights, then of each try]). k = 0: nothing was better, plain OPD.
    """
    accepted, accepted_k, scores = weights, 0, [validate(weights)]
    for k in range(1, max_tries + 1):
        candidate = {name: value + 2 * k * (value - anchor[name]) for name, value in weights.items()}
        scores.append(validate(candidate))
        if not scores[-1] > scores[-2]:
            break
        accepted, accepted_k = candidate, k
    return accepted, accepted_k, scores


# ---------------------------------------------------------------------------------------------------------------------
# 8. Evaluation

def pass_at_k(num_samples, num_correct, k):
    """
    Chance that one of k answers is right, estimated without bias from num_samples >= k answers of which num_correct are:
    1 - C(n - c, k) / C(n, k), Chen et al. 2107.03374. Example: n 4, c 1, k 2 -> .5. Raises ValueError for k > n.
    """
    if not 1 <= k <= num_samples or not 0 <= num_correct <= num_samples:
        raise ValueError(f"needs 1 <= k <= num_samples and 0 <= num_correct <= num_samples, got k {k}, "
                         f"num_samples {num_samples}, num_correct {num_correct}")
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def repetition(ids):
    """Share of the 4-grams of a list of ids that occurred before in it: 0 without repeats, near 1 in a loop."""
    grams = [tuple(ids[i:i + 4]) for i in range(len(ids) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def summarize(samples, num_samples):
    """Graded answers (dicts as evaluate writes them, num_samples per problem, in order) -> metrics over problems."""
    correct = np.array([sample["correct"] for sample in samples], dtype=float).reshape(-1, num_samples)
    mean = lambda name: float(np.mean([sample[name] for sample in samples]))
    # The standard error is over problems: answers to one problem are not independent evidence
    return {"avg_at_n": float(correct.mean()), "pass_at_n": float((correct.sum(1) > 0).mean()),
            "se": float(correct.mean(1).std(ddof=1) / math.sqrt(len(correct))) if len(correct) > 1 else float("nan"),
            "mean_length": mean("length"), "truncated_fraction": mean("truncated"), "no_box_fraction": mean("no_box"),
            "repetition": mean("repetition"), "num_problems": len(correct), "n": num_samples}


def evaluate(model, tokenizer, problems, prompts, *, num_samples, rows_per_batch, seed, decoding, title="evaluate"):
    """
    Sample num_samples answers to every problem, at full length, and grade them -> (metrics dict, list of samples).

    prompts: the problems' token ids; decoding: keyword arguments of rollout. All inside a random stream of its own, so
    that how often one evaluates cannot change how one trains. The same seed gives every model the same draws.
    """
    rows = [(index, sample) for index in range(len(problems)) for sample in range(num_samples)]
    device = next(model.parameters()).device
    samples = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in tqdm(range(0, len(rows), rows_per_batch), desc=title, leave=False):
            batch = rows[start:start + rows_per_batch]
            ids, mask = pad_left([prompts[index] for index, _ in batch], decoding["pad_id"])
            out = rollout(model, None, ids.to(device), mask.to(device), **decoding)
            for row, (index, sample) in enumerate(batch):
                response = out["response_ids"][row][out["response_mask"][row]].tolist()
                text = tokenizer.decode(response, skip_special_tokens=True)
                samples.append({
                    "problem": problems[index]["problem"], "answer": problems[index]["answer"], "sample": sample,
                    "response": text, "correct": is_correct(text, problems[index]["answer"]), "length": len(response),
                    "truncated": not bool(out["ended"][row]), "no_box": last_boxed(text) is None,
                    "repetition": repetition(response)})
    return summarize(samples, num_samples), samples


# ---------------------------------------------------------------------------------------------------------------------
# 9. Rollout

@torch.no_grad()
def score(teacher, ids, mask, cache, student_topk, *, vocab_size, chunk_tokens):
    """
    The teacher reads the new columns of ids (B, L) once, on its cache. student_topk (B, n, K) are the student's likeliest
    tokens at the last n columns -> the teacher's hidden states (B, n, H) there, and the overlap (B, n) in [0, 1].

    Hidden states are kept, not logits: the loss needs the whole distribution, and V is 50 times wider than H.
    """
    hidden = hidden_states(teacher, ids, mask, student_topk.shape[1], cache)
    topk = torch.cat([head_logits(teacher, piece, vocab_size).topk(student_topk.shape[2]).indices
                      for piece in hidden.flatten(0, 1).split(chunk_tokens)]).view_as(student_topk)
    return hidden, (student_topk[..., :, None] == topk[..., None, :]).any(-1).float().mean(-1)


def method_row(method, step, *, max_new_tokens, prefix_length, probe_window, num_keep, horizon_schedule, cap, drift):
    """
    One row of the papers' table: what `rollout` must know to run a method at step 1, 2, ... This is all they differ in,
    but for prune's token weights and moving cap (train).
    """
    return {
        "opd": {"max_length": max_new_tokens},
        "prefix": {"max_length": min(prefix_length, max_new_tokens)},
        "progressive": {"max_length": horizon(step - 1, *horizon_schedule, max_new_tokens)},
        "prefix-guided": {"max_length": max_new_tokens, "select_at": prefix_length, "probe_window": probe_window,
                          "num_keep": num_keep},
        "prune": {"max_length": cap, "drift": drift},
    }[method]


@torch.no_grad()
def rollout(student, teacher, prompt_ids, prompt_mask, *, max_length, segment_length, vocab_size, eos_ids, pad_id,
            temperature=1.0, top_p=1.0, overlap_k=0, num_generations=1, select_at=None, probe_window=None, num_keep=None,
            drift=None, chunk_tokens=256):
    """
    Sample the responses to prompts (B, S), segment by segment, on KV caches that are never computed twice. After each
    segment the teacher scores it (teacher None: no scoring, as in evaluation), and the rows that ended, were not
    selected or have drifted leave both caches.

    select_at, probe_window, num_keep: after select_at tokens continue num_keep rows    [PG-OPD]
    drift: (threshold, w_drop): stop a row at the segment border after which its reliability is 0    [Prune-OPD]

    Returns a dict, T the longest response: response_ids (B, T), response_mask (B, T) bool, overlap (B, T), ended (B,)
    (with an EOS), kept (B,) (not stopped by selection or drift), teacher_hidden: B tensors (length, H) of what the
    teacher's head needs, probe_score (B,), teacher_seconds.
    """
    B, S = prompt_ids.shape
    device = prompt_ids.device
    ids = torch.cat([prompt_ids, torch.full((B, max_length), pad_id, device=device)], dim=1)     # (B, S + max_length)
    mask = torch.cat([prompt_mask.bool(), torch.zeros(B, max_length, dtype=torch.bool, device=device)], dim=1)
    overlap = torch.zeros(B, max_length, device=device)
    ended, kept = (torch.full((B,), value, device=device) for value in (False, True))
    teacher_hidden, teacher_seconds, probe_score = [[] for _ in range(B)], 0.0, None
    student_cache = DynamicCache(config=student.config)
    teacher_cache = DynamicCache(config=teacher.config) if teacher else None
    rows, start = torch.arange(B, device=device), S
    borders = {*range(segment_length, max_length, segment_length), max_length, *([select_at] if select_at else [])}
    for border in sorted(border for border in borders if border <= max_length):
        seen = mask[rows, :start]
        new_ids, student_topk = generate(
            student, ids[rows, :start], seen, student_cache, max_new_tokens=S + border - start, vocab_size=vocab_size,
            eos_ids=eos_ids, pad_id=pad_id, temperature=temperature, top_p=top_p, record_k=overlap_k)
        end = start + new_ids.shape[1]
        new_mask = mask_through_eos(new_ids, eos_ids)
        ids[rows, start:end], mask[rows, start:end] = new_ids.where(new_mask, pad_id), new_mask
        ended[rows] = torch.isin(new_ids, torch.tensor(sorted(eos_ids), device=device)).any(-1)
        if teacher:
            clock = time.perf_counter()
            hidden, hit = score(teacher, ids[rows, :end], mask[rows, :end], teacher_cache, student_topk,
                                vocab_size=vocab_size, chunk_tokens=chunk_tokens)
            overlap[rows, start - S:end - S] = hit * new_mask
            for row, states, valid in zip(rows.tolist(), hidden, new_mask):
                teacher_hidden[row].append(states[valid])
            teacher_seconds += time.perf_counter() - clock
        if border == select_at:
            window = mask[:, S:S + probe_window]               # a row that ended inside it is judged on what it has
            probe_score = (overlap[:, :probe_window] * window).sum(-1) / window.sum(-1)
            # Rows that ended are complete and cost nothing more: they stay, and take a slot only if no other wants it
            ranking = torch.where(ended, -1.0, probe_score).view(-1, num_generations)
            kept &= select_prefixes(ranking, num_keep).flatten() | ended
        if drift:
            weights = drift_weights(overlap[:, :end - S], mask[:, S:end], *drift)
            kept[rows] &= (weights[rows, -1] > 1e-8) | ended[rows]
        stay = (kept & ~ended)[rows].nonzero().squeeze(-1)
        rows, start = rows[stay], end
        if not len(rows) or border == max_length:
            break
        for cache in filter(None, (student_cache, teacher_cache)):
            cache.batch_select_indices(stay)
    return {"response_ids": ids[:, S:start], "response_mask": mask[:, S:start], "overlap": overlap[:, :start - S],
            "ended": ended, "kept": kept, "probe_score": probe_score, "teacher_seconds": teacher_seconds,
            "teacher_hidden": [torch.cat(pieces) for pieces in teacher_hidden] if teacher else None}


# ---------------------------------------------------------------------------------------------------------------------
# 10. One update

def token_loss(student_logits, teacher_logits, response_ids, *, loss, k, support, baseline):
    """The loss of --loss, per token: (N, V), (N, V), (N,) -> (N,)."""
    if loss == "reverse_kl":
        return reverse_kl(student_logits, teacher_logits)
    if loss == "topk":
        return reverse_kl_topk(student_logits, teacher_logits, k, support)
    return reverse_kl_sampled(student_logits, teacher_logits, response_ids, baseline)


def backward_chunk(student, teacher, hidden, teacher_hidden, response_ids, token_weight, *, vocab_size, temperature,
                   overlap_k, **loss_flags):
    """
    Heads, loss and backward of N tokens: hidden (N, H), teacher_hidden (N, H'), response_ids (N,), token_weight (N,)
    -> (gradient wrt hidden (N, H), sum of the weighted losses, alignment per token). The head's gradient accumulates.

    Backward runs here and now, so the (N, V) logits die with this call. Keeping them to the end would take B * T * V
    floats several times over; recomputing them in backward would take the two heads' time once more.
    """
    hidden = hidden.detach().requires_grad_()
    with torch.no_grad():
        teacher_logits = head_logits(teacher, teacher_hidden, vocab_size) / temperature
    student_logits = head_logits(student, hidden, vocab_size) / temperature
    loss = (token_loss(student_logits, teacher_logits, response_ids, k=overlap_k, **loss_flags) * token_weight).sum()
    loss.backward()
    with torch.no_grad():
        aligned = alignment_per_token(student_logits, teacher_logits, overlap_k)
    return hidden.grad, loss.item(), aligned


def train_step(student, teacher, optimizer, batch, *, micro_batch_size, max_grad_norm, autocast, chunk_tokens=256,
               **chunk_flags):
    """
    One optimizer step on a rollout -> dict of loss, grad_norm, trained tokens and the alignment means over them.

    batch: prompt_ids, prompt_mask (B, S), response_ids, loss_mask (B, T), token_weight (B, T), teacher_hidden. The loss
    is sum(weight * loss) / number of tokens in loss_mask, of the whole step: a mean per micro-batch would let the rows
    that share one with short rows count for more. Raises FloatingPointError before a non-finite gradient is applied.
    """
    lengths = batch["loss_mask"].sum(-1)
    num_tokens, loss, aligned = int(lengths.sum()), 0.0, []
    order = lengths.argsort(descending=True, stable=True)          # rows of one length together: less padding
    order = order[lengths[order] > 0]
    optimizer.zero_grad(set_to_none=True)
    for rows in order.split(micro_batch_size):
        T, S = int(lengths[rows].max()), int(batch["prompt_mask"][rows].sum(-1).max())
        loss_mask, response_ids = batch["loss_mask"][rows, :T], batch["response_ids"][rows, :T]
        ids = torch.cat([batch["prompt_ids"][rows, -S:], response_ids], dim=1)
        mask = torch.cat([batch["prompt_mask"][rows, -S:], loss_mask], dim=1)
        with autocast():
            hidden = hidden_states(student, ids, mask, T)[loss_mask]                     # (N, H)
            columns = [column.split(chunk_tokens) for column in (
                hidden, torch.cat([batch["teacher_hidden"][row] for row in rows.tolist()]), response_ids[loss_mask],
                batch["token_weight"][rows, :T][loss_mask] / num_tokens)]
            grads = []
            for chunk in zip(*columns):
                grad, value, per_token = backward_chunk(student, teacher, *chunk, **chunk_flags)
                grads.append(grad)
                loss += value
                aligned.append(per_token)
        hidden.backward(torch.cat(grads))
    grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), max_grad_norm).item()
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        raise FloatingPointError(f"loss {loss}, gradient norm {grad_norm}, response lengths {lengths.tolist()[:8]}...")
    optimizer.step()
    means = {name: torch.cat([piece[name] for piece in aligned]).nanmean().item() for name in aligned[0]}
    return {"loss": loss, "grad_norm": grad_norm, "trained_tokens": num_tokens, **means}


def step_flops(student_params, teacher_params, student_shape, teacher_shape, prompt, generated, trained):
    """
    Floating-point operations of one step by the usual count (2 N per token forward, 4 N backward, plus attention's
    2 n_layer d_model L^2 per forward). prompt, generated, trained: (B,) token counts; *_shape: (n_layer, d_model).

        decode 2 N_S (P + gen) + teacher 2 N_T (P + gen) + update 6 N_S (P + trained), rows without trained tokens at 0
    """
    full, sup = (prompt + generated).double(), torch.where(trained > 0, prompt + trained, 0).double()
    attention = lambda shape, length: 2 * shape[0] * shape[1] * length ** 2
    return float((2 * student_params * full + attention(student_shape, full)
                  + 2 * teacher_params * full + attention(teacher_shape, full)
                  + 6 * student_params * sup + 3 * attention(student_shape, sup)).sum())


# ---------------------------------------------------------------------------------------------------------------------
# 11. The tiny world

# A made-up language in which on-policy distillation can be watched. A problem is a start and up to eight operations
# modulo 10, "4 a +3 b *7"; its solution goes step by step, "first a 4 +3 gives 7 , then b 7 *7 is 9 . so the answer is
# \boxed{ 9 }". Every operation can be undone, so a slip always carries through to the answer. The words of a sentence
# have eight synonyms each, of which an author likes some better, so the top k of a model are its habits of wording.

TINY = {
    "opener": "first next then now so here well okay".split(), "verb": "is gives makes equals yields becomes leaves gets".split(),
    "closer": ", ; . : and - / |".split(), "label": "a b c d e f g h".split(), "digit": list("0123456789"),
    "operation": [f"+{n}" for n in range(1, 10)] + ["*3", "*7", "*9"], "frame": ["the", "answer", "\\boxed{", "}"],
    "special": ["<pad>", "<end>", "<user>", "<solve>"]}


def tiny_apply(value, operation):
    """4, "+3" -> 7; 7, "*7" -> 9: arithmetic modulo 10."""
    return (value + int(operation[1:]) if operation[0] == "+" else value * int(operation[1:])) % 10


def tiny_problem(rng, steps):
    """A problem of steps operations, {"problem", "answer"}, from a random.Random."""
    value, first = rng.randrange(10), rng.randrange(9 - steps)
    words = [str(value)]
    for label in TINY["label"][first:first + steps]:
        operation = rng.choice(TINY["operation"])
        words += [label, operation]
        value = tiny_apply(value, operation)
    return {"problem": " ".join(words), "answer": str(value)}


def tiny_solution(problem, rng, habit, slip_rate):
    """
    One author's solution to a problem's text -> list of (word, trust). habit (0 to 7) turns the order in which the author
    likes the synonyms; with slip_rate per step the result is wrong, the operation misread, or a step left out. What
    follows a slip is consistent with it. trust is False on the slip itself: a careful model reads on from it, but does
    not learn to make it.
    """
    def synonym(kind):        # each next word in the author's order is .6 times as likely
        return TINY[kind][(min(int(math.log(1 - rng.random()) / math.log(.6)), 7) + habit) % 8], True

    start, *rest = problem.split()
    value, place, words = int(start), 0, []
    while place < len(rest):
        slip = rng.choice(("result", "misread", "skip")) if rng.random() < slip_rate else None
        if slip == "skip" and place + 2 < len(rest):
            place += 2
        label, operation = rest[place:place + 2]
        if slip == "misread":
            operation = rng.choice(TINY["operation"])
        result = (tiny_apply(value, operation) + (rng.choice((1, 9, 1, 9, 2, 8)) if slip == "result" else 0)) % 10
        words += [synonym("opener"), (label, slip != "skip"), (str(value), True), (operation, slip != "misread"),
                  synonym("verb"), (str(result), slip != "result"), synonym("closer")]
        value, place = result, place + 2
    return words + [synonym("opener"), ("the", True), ("answer", True), synonym("verb"), ("\\boxed{", True),
                    (str(value), True), ("}", True), ("<end>", True)]


def tiny_tokenizer():
    """One token per word of the tiny language, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = [word for kind in ("special", "digit", "operation", "label", "frame", "opener", "verb", "closer") for word in TINY[kind]]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>")
    tokenizer.chat_template = "{% for m in messages %}<user> {{ m['content'] }} {% endfor %}<solve>"
    return tokenizer


def fit(model, sample_batch, *, steps, learning_rate, pad_id, title, progress=None):
    """
    Supervised training: sample_batch(step) -> list of (ids, weights), the cross-entropy of every id weighted. In place.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    model.train()
    for step in tqdm(range(steps), desc=title, leave=False):
        for group in optimizer.param_groups:      # warm up over 20 steps, then down along a cosine to a twentieth
            group["lr"] = learning_rate * min(1, (step + 1) / 20) * (.525 + .475 * math.cos(math.pi * step / steps))
        rows = sample_batch(step)
        width = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([row + [pad_id] * (width - len(row)) for row, _ in rows], device=model.device)
        weights = torch.tensor([row + [0.0] * (width - len(row)) for _, row in rows], device=model.device)
        logits = model(input_ids=ids[:, :-1]).logits          # right-padded, causal: no mask is needed
        loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (loss * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    return loss.item()


def make_world(folder, seed):
    """
    Write the tiny world into folder: teacher/ and student/ (model folders like any other), train.jsonl and eval.jsonl.
    About half a minute on one CPU core. Both models grow out of one base model, as the pairs of the papers do: the
    teacher on a careful author's solutions, with slips that it only reads; the student, for a short while, on those of
    an author with other habits of wording who slips at every fourth step. So it could solve more than it does.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM
    tokenizer = tiny_tokenizer()

    def author(number, lengths, habit, slip_rate, trust_slips):
        rng = random.Random(f"{seed} {number}")

        def sample_batch(_):
            rows = []
            for _ in range(64):
                problem = tiny_problem(rng, rng.randint(*lengths))["problem"]
                words = tiny_solution(problem, rng, rng.randrange(8) if habit is None else habit, slip_rate)
                prompt = encode_prompts(tokenizer, [problem], "{problem}")[0]
                rows.append((prompt + tokenizer.convert_tokens_to_ids([word for word, _ in words]),
                             [0.0] * len(prompt) + [float(trust or trust_slips) for _, trust in words]))
            return rows
        return sample_batch

    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, tie_word_embeddings=True,
        initializer_range=0.05, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    phases = functools.partial(fit, pad_id=tokenizer.pad_token_id, learning_rate=4e-3)
    phases(model, author(0, (1, 3), None, .1, False), steps=250, title="tiny world: base model, short problems")
    phases(model, author(1, (4, 8), None, .1, False), steps=130, title="tiny world: base model, full problems")
    teacher, student = copy.deepcopy(model), model
    phases(teacher, author(2, (4, 8), 0, .1, False), steps=100, title="tiny world: teacher")
    phases(student, author(3, (4, 8), 2, .25, True), steps=40, title="tiny world: student")
    partial = f"{folder}.partial"                                   # a broken-off attempt must not look like a world
    shutil.rmtree(partial, ignore_errors=True)
    for name, made in (("teacher", teacher), ("student", student)):
        made.save_pretrained(os.path.join(partial, name))
        tokenizer.save_pretrained(os.path.join(partial, name))
    for name, number, count in (("train", 4, 2000), ("eval", 5, 100)):
        rng = random.Random(f"{seed} {number}")
        with open(os.path.join(partial, f"{name}.jsonl"), "w", encoding="utf-8") as file:
            file.writelines(json.dumps(tiny_problem(rng, rng.randint(4, 8))) + "\n" for _ in range(count))
    os.replace(partial, folder)


# ---------------------------------------------------------------------------------------------------------------------
# 12. Set-up, preflight, checkpoints

@contextlib.contextmanager
def user_mistakes():
    """Inside, a ValueError or OSError is a mistake in flags, files or models: one line on stderr, exit status 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        print("opd.py: " + " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None


def check_folder(path):
    """Raises OSError unless path can be made, or is a folder that can be written to. Makes nothing."""
    parent = os.path.abspath(path)
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent) or not os.access(parent, os.W_OK | os.X_OK):
        raise OSError(f"--output_dir {path} cannot be written: {parent} is "
                      f"{'read-only' if os.path.isdir(parent) else 'not a folder'}; choose another")


def load_model(path, dtype, device):
    """A causal language model by folder or hub name, in eval mode. Raises ValueError, in one line, if it does not load."""
    try:
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
    except Exception as error:         # transformers, safetensors and json each have errors of their own for a bad folder
        reason = str(error).strip().splitlines()
        raise ValueError(f"model {path} does not load: {type(error).__name__}: {reason[0] if reason else 'no reason'}") from None


def load_tokenizer(path):
    """A model's tokenizer. Raises ValueError, in one line, if it does not load."""
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise ValueError(f"the tokenizer of {path} does not load: {type(error).__name__}: "
                         f"{reason[0] if reason else 'no reason'}") from None


def compare_vocabularies(student_vocab, teacher_vocab):
    """Raises ValueError, naming three tokens, unless both dicts map the same tokens to the same ids."""
    tokens = sorted(student_vocab.keys() | teacher_vocab.keys())
    different = [token for token in tokens if student_vocab.get(token) != teacher_vocab.get(token)]
    if different:
        examples = "; ".join(f"{token!r} is {student_vocab.get(token, 'missing')} in the student and "
                             f"{teacher_vocab.get(token, 'missing')} in the teacher" for token in different[:3])
        raise ValueError(f"the two tokenizers map {len(different)} tokens differently: {examples}; choose two models with "
                         "one tokenizer, or a project that distils across tokenizers (TRL's GOLD)")


def stop_ids(model, tokenizer):
    """Every id that ends a response: those of the generation config (one or several) and the tokenizer's EOS."""
    listed = model.generation_config.eos_token_id
    listed = listed if isinstance(listed, list) else [listed]
    return {index for index in (*listed, tokenizer.eos_token_id) if index is not None}


@torch.no_grad()
def check_head(model, ids, vocab_size):
    """Raises ValueError unless head_logits, on the backbone's output, gives what the model's own forward gives."""
    ids = torch.tensor([ids], device=model.device)
    own = model(input_ids=ids).logits[:, -1, :vocab_size].float()
    ours = head_logits(model, model.base_model(input_ids=ids).last_hidden_state[:, -1], vocab_size)
    if (own - ours).abs().max() > 0.05 * own.abs().max().clamp(min=1):
        raise ValueError(f"{model.config.model_type} models cannot be used: their logits are not the head applied to the "
                         "last hidden state, with a known scale or softcap; teach head_logits how they are made")
