"""opd.py: on-policy distillation (OPD) of language models, in one file, on a CPU, a GPU, or several with torchrun.

A small model (the student) samples solutions, a larger one (the teacher) judges every token, and the student moves
towards the teacher where it went itself. Sampling is most of the cost, and deep in a solution that went astray the
teacher's judgement is worth little: what the papers below change is mostly what gets sampled.

    python opd.py                                  a tiny world, made on the spot: two CPU cores, no download
    python opd.py --student A --teacher B --train_file train.jsonl --eval_file aime24.jsonl --method prefix-guided
    python opd.py --eval_only --student A --eval_file aime24.jsonl amc23.jsonl

Papers, by the tags used below
    [GKD]             2306.13649   distillation on the student's own samples
    [Rethinking-OPD]  2604.13016   the overlap and the other alignment metrics; the student's top-k loss
    [FastOPD]         2602.15260   train on prefixes only, and let the prefix grow
    [POPD]            2605.31490   the same schedule as a staircase; TOPD: a fixed horizon
    [PG-OPD]          2606.21994   prefix-guided: go on only with candidates whose opening the teacher agrees with
    [Prune-OPD]       2605.07804   weigh down and stop what drifts, and move the length cap
    [EffOPD]          2605.11739   extrapolate the update, judged on a small validation set
    [vOPD]            2605.07865   a closed-form baseline for the sampled-token loss

Shapes: P prompts, G candidates per prompt, B = P * G rows (candidate g of prompt p is row p * G + g), S prompt
length, T response length, V vocabulary, K the top k, H hidden size, N response tokens of some rows, end to end.
"""
import argparse, contextlib, copy, datetime, functools, glob, json, math, os
import random, re, select, shutil, signal, subprocess, sys, threading, time, warnings

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tokenizers, transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig, DynamicCache, GenerationConfig, StaticCache
RANK, NUM_RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))           # torchrun sets these

# ---- 1. Flags: names/alias, default (of choices the first), help; [tag]: whose value the default is ----------
FLAGS = {
    "models and data": [
        ("student/model_name_or_path", "", "model folder or hub name; without it and --teacher: tiny world"),
        ("teacher/teacher_model_name_or_path", "", "model folder or hub name, with the student's token ids"),
        ("train_file", [str], "problems to train on: jsonl, json, parquet; answers are not needed"),
        ("mix", [float], "the training files' shares of every step, such as 0.8 0.2; without it all are one pool"),
        ("eval_file", [str], "problems with answers to evaluate on; one result per file"),
        ("output_dir", "out", "for metrics.jsonl, samples.jsonl, checkpoints and the tiny world"),
        ("report_to", ("none", "tensorboard", "wandb"), "where the numbers of metrics.jsonl go, too"),
        ("report", "", "compare the runs below this folder: print a table, draw report.png in it, and stop"),
        ("prompt_template", r"{problem} Please reason step by step, and put your final answer within \boxed{}.",
         "the user's message [Rethinking-OPD]"),
        ("no_chat_template enable_thinking", (False, False), "give the message as it is; let Qwen3's template think"),
        ("dtype", ("auto", "float32", "bfloat16"), "auto: on a GPU bfloat16 with float32 master weights"),
        ("device", "cuda" if torch.cuda.is_available() else "cpu", "such as cuda, cuda:1, cpu"),
        ("seed", 0, "of a tiny world yet to be made, the order of the data, all sampling")],
    "method and loss": [
        ("method", ("opd", "prefix", "progressive", "prefix-guided", "prune"),
         "opd: all to the cap [GKD]. prefix: to --prefix_length [FastOPD, TOPD]. progressive: to a growing horizon "
         "[FastOPD, POPD]. prefix-guided: on where overlap is high [PG-OPD]. prune: less after drift [Prune-OPD]"),
        ("loss", ("topk", "reverse_kl", "sampled"), "topk: KL(student || teacher) on top-k tokens, with the released "
         "gradient [Rethinking-OPD]. reverse_kl: whole vocabulary [GKD]. sampled: k1 policy gradient"),
        ("support", ("student", "teacher", "intersection", "union"), "whose top k --loss topk sums over"),
        ("baseline", False, "subtract the closed-form baseline in --loss sampled [vOPD]"),
        ("overlap_k", 16, "the k of overlap and --loss topk [Rethinking-OPD, PG-OPD, Prune-OPD]"),
        ("cold_start_steps", 0, "first learn the teacher's own right solutions [Rethinking-OPD]"),
        ("cold_start_learning_rate", 1e-5, "learning rate of the cold start (our choice)")],
    "sampling": [
        ("batch_size num_generations", (64, 4), "prompts per step; candidates per prompt [Rethinking-OPD]"),
        ("max_prompt_length", 1024, "longer training prompts are left out [Rethinking-OPD]"),
        ("max_new_tokens/max_completion_length", 7168, "cap of a training response [Rethinking-OPD]"),
        ("temperature", 1.0, "divides the logits of both models, in sampling and in the loss [all: 1]"),
        ("segment_length", 512, "tokens between two looks at who goes on (our choice)"),
        ("rollout_batch_size", 0, "rows that a process samples at once; 0: all, on a GPU what fits (our choice)"),
        ("static_cache", False, "sample on caches of fixed size: on a GPU decoding is compiled; none has run it yet"),
        ("prefix_length", 1024, "tokens of the prefix, in prefix and prefix-guided (our choice)"),
        ("probe_window", 128, "prefix-guided: first tokens of the prefix, whose mean overlap is the score [PG-OPD]"),
        ("keep_ratio", 0.5, "prefix-guided: share of candidates to go on, at least one a prompt [PG-OPD: .25 to .75]"),
        ("select", ("overlap", "random"), "prefix-guided: what ranks the candidates; random is a control"),
        ("train_pruned_prefix", False, "prefix-guided: train on the prefixes of the others too"),
        ("horizon_start horizon_growth horizon_every", (512, 256, 10), "first horizon; growth; every n steps"),
        ("drift_threshold", 0.7, "prune: a token with an overlap below it is a bad event [Prune-OPD]"),
        ("w_drop w_base", (0.01, 0.5), "prune: reliability lost at each; added to it as loss weight"),
        ("cap_init cap_min cap_max", (2048, 1024, 12288), "prune: first cap; least cap; largest cap"),
        ("cap_step cap_margin", (100, 100), "prune: tokens the cap moves by; so near to it is a hit"),
        ("cap_hit_ratio cap_patience", (0.1, 3), "prune: share of hits to grow; misses to shrink"),
        ("no_prune_in_flight", False, "prune: stop no row while it runs, as in the released code")],
    "optimisation": [
        ("learning_rate", 1e-6, "of AdamW, constant after warm-up [Rethinking-OPD, Prune-OPD, EffOPD]"),
        ("warmup_steps max_steps", (0, 200), "linear warm-up [EffOPD]; steps: DAPO-Math-17K once [Rethinking-OPD]"),
        ("max_generated_tokens", 0, "stop after the step at which the student has sampled so many; 0: no limit"),
        ("max_grad_norm", 1.0, "gradient clipping (our choice)"),
        ("micro_batch_size", 4, "longest rows per forward and backward, or more short ones; changes no gradient"),
        ("gradient_checkpointing", False, "recompute the student's layers in backward to save memory"),
        ("extrapolate", False, "at steps 1, 2, 4, 8, ... try to go on along the update [EffOPD]"),
        ("validation_size", 50, "training problems with answers that judge what --extrapolate tries [EffOPD]"),
        ("save_every keep_checkpoints", (0, 2), "steps between (0: only at the end); how many stay"),
        ("resume", None, "go on from the last checkpoint in --output_dir, or from the one named here")],
    "evaluation": [
        ("eval_only print_samples", (False, False), "grade --student on --eval_file and stop; show first answers"),
        ("eval_every eval_samples", (20, 16), "steps between or 0 [Prune-OPD]; answers per problem [Rethinking-OPD]"),
        ("probe_depths", [int], "percentages: how the teacher goes on from answers cut there [Rethinking-OPD]"),
        ("eval_temperature eval_top_p", (0.7, 0.95), "0 is greedy; nucleus, 1 is all [Rethinking-OPD]"),
        ("eval_max_new_tokens eval_batch_size", (31744, 32), "full length [Rethinking-OPD]; rows at once, our choice")]}
TINY = dict(prompt_template="{problem}", loss="reverse_kl", overlap_k=4, cold_start_learning_rate=2e-3, batch_size=16,
            max_prompt_length=64, max_new_tokens=96, segment_length=16, prefix_length=24, probe_window=16,
            eval_every=10, horizon_start=16, horizon_growth=8, horizon_every=4, w_drop=0.05, cap_init=48, cap_min=24,
            cap_max=96, cap_step=8, cap_margin=8, learning_rate=1e-3, warmup_steps=5, max_steps=60, micro_batch_size=64,
            eval_samples=4, eval_temperature=1.0, eval_top_p=1.0, eval_max_new_tokens=96, eval_batch_size=64)

def parse_args(argv=None):
    """Command line -> argparse.Namespace (TINY: its own defaults). ValueError, in one line, for what cannot work."""
    parser = argparse.ArgumentParser(usage="python opd.py [flags]", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    def fail(message):                    # argparse would print its whole usage before the one line that matters
        raise ValueError(f"{message}; see python opd.py --help")
    parser.error = fail
    for title, rows in FLAGS.items():
        group = parser.add_argument_group(title)
        for row in rows:                  # of several flags in a row each has its own default and part of the text
            for names, default, text in zip(row[0].split(), row[1], row[2].split("; ")) if " " in row[0] else [row]:
                kind, names = {"type": type(default)}, names.split("/")
                if isinstance(default, list):
                    kind, default = {"type": default[0], "nargs": "+"}, []
                elif isinstance(default, tuple):
                    kind, default = {"choices": default}, default[0]
                elif default is None or default is False:
                    kind = {"nargs": "?", "const": "latest"} if default is None else {"action": "store_true"}
                tiny = f"; tiny world {TINY[names[0]]}" if names[0] in TINY else ""
                group.add_argument(*(f"--{name}" for name in names), default=default, **kind,
                                   help=f"{text} (default {default or repr(default)}{tiny})".replace("%", "%%"))
    args = parser.parse_args(argv)
    if not args.student and not args.teacher:
        args = parser.parse_args(argv, argparse.Namespace(**TINY))
    check_args(args)
    return args

def check_args(args):
    """Raises ValueError for flags that cannot work, alone or together, before anything is loaded or written."""
    may_be_zero = ("horizon_growth cap_margin warmup_steps save_every eval_every eval_temperature drift_threshold seed "
                   "rollout_batch_size w_drop w_base cap_hit_ratio cold_start_steps max_generated_tokens").split()
    for name, value in vars(args).items():
        if type(value) in (int, float) and not (0 < value < 2 ** 40 or value == 0 and name in may_be_zero):
            raise ValueError(f"--{name} {value} must be {'at least' if name in may_be_zero else 'above'} 0, and finite")
    needed = [args.student, args.eval_file] if args.eval_only else [args.student, args.teacher, args.train_file]
    mistakes = {
        "--probe_depths are percentages from 0 to 99": not {*args.probe_depths} <= {*range(100)},
        "--keep_ratio and --eval_top_p must be at most 1": max(args.keep_ratio, args.eval_top_p) > 1,
        f"--device {args.device}: there is none here; leave it out, or use cpu": args.device not in ("cpu", "mps")
        and not (args.device.startswith("cuda") and int(args.device[5:] or 0) < torch.cuda.device_count()),
        "--prompt_template must say {problem} where the problem goes": "{problem}" not in args.prompt_template,
        "--cap_init must lie between --cap_min and --cap_max": not args.cap_min <= args.cap_init <= args.cap_max,
        "--prefix_length must be below --max_new_tokens in prefix-guided":
        args.method == "prefix-guided" and args.prefix_length >= args.max_new_tokens,
        "--mix needs a share for each --train_file, worth a prompt of every step or more, and 1 in all":
        args.mix and (len(args.mix) != len(args.train_file) or min(args.mix) * args.batch_size < 1
                      or round(sum(args.mix), 3) != 1),
        f"--batch_size must be at least the {NUM_RANKS} processes": args.batch_size < NUM_RANKS,
        "give --student, --teacher and --train_file; with --eval_only --student and --eval_file; or none of these four":
        any([*needed, args.teacher, args.train_file, args.eval_file]) and not all(needed)}
    for message in (message for message, true in mistakes.items() if true):
        raise ValueError(message)

# ---- 2. Data and grading -------------------------------------------------------------------------------------
def read_records(path):
    """The objects in a jsonl, json or parquet file, as a list. Raises OSError, or ValueError naming the line."""
    with open(path, "rb") as file:
        if path.endswith(".parquet"):
            import pyarrow.parquet        # only here; without it an ImportError says so
            return pyarrow.parquet.read_table(file).to_pylist()
        text = file.read().removeprefix("\ufeff".encode())
    is_list, records = text.lstrip().startswith(b"["), []     # else JSON lines, which many a .json file holds, too
    for number, line in enumerate([text] if is_list else text.splitlines(), start=1):
        try:
            records += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            number += getattr(error, "lineno", 1) - 1
            raise ValueError(f"{path}, line {number}: not JSON in UTF-8 ({error})") from None
    return records[0] if is_list else records

def last_boxed(text):
    r"""The content of the last balanced \boxed{...} of a text, or None. A box that never closes is none: a solution
    that was cut off in its answer has no answer. Example: r"\boxed{1} no, \boxed{\frac{1}{2}}" -> r"\frac{1}{2}"."""
    for rest in reversed(re.split(r"\\boxed\s*\{", text)[1:]):
        depth = 1
        for brace in re.finditer(r"(?<!\\)[{}]", rest):        # \{ is a brace of a set, not of the box
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                return rest[:brace.start()]
    return None

def load_problems(path):
    """A jsonl, json or parquet file -> list of {"problem": str, "answer": str or None}, without duplicates; or
    OSError, ValueError, ImportError. Knows usual field names, chats, golds in a box, in dollars or behind "####"."""
    records, problems = read_records(path), {}
    for number, record in enumerate(records, start=1):
        record = record if isinstance(record, dict) else {}
        chat, nested = record.get("prompt") or record.get("messages"), record.get("reward_model")
        turns = [turn for turn in chat if isinstance(turn, dict)] if isinstance(chat, list) else []
        fields = {**(nested if isinstance(nested, dict) else {}), **record}
        fields |= {f"{turn.get('role')}:": turn.get("content") for turn in turns}          # of each role the last turn
        problem, answer = (
            next((fields[name] for name in names.split() if fields.get(name) is not None), "")
            for names in ("problem question user: prompt", "answer final_answer ground_truth solution assistant:"))
        if not isinstance(problem, str) or not problem.strip():
            raise ValueError(f"{path}, record {number}: needs a text in problem, question, prompt or messages; "
                             f"it has the fields {', '.join(record) or 'none'}")
        answer = ", ".join(map(str, answer)) if isinstance(answer, list) else str(answer)
        answer = (last_boxed(end := answer.rsplit("####", 1)[-1]) or end).strip().strip("$").strip()
        # What data sets add to a problem fights the template, and a grader of boxes
        problem = re.sub(r"Solve the following math problem step by step\. The last line of .*? to the problem\."
                         r'|Remember to put your answer on its own line after "Answer:"\.'
                         r"|Please reason step by step, and .*? within \\boxed\{\}\.", "", problem).strip()
        problems[problem] = problems.get(problem) or answer or None
    if not problems:
        raise ValueError(f"{path}: the file is empty; it needs one problem per line")
    if len(problems) < len(records):
        warnings.warn(f"{path}: left out {len(records) - len(problems)} duplicates, {len(problems)} problems stay")
    return [{"problem": problem, "answer": answer} for problem, answer in problems.items()]

def ask_math_verify(gold, answer, seconds=3.0, worker={"lock": threading.Lock(), "process": None}):
    """Whether math-verify takes answer for gold, both bare LaTeX; None as answer: whether it can read gold. False when
    it takes longer: 2003^{2002^{2001}} keeps sympy busy in one C call that only the end of its process ends."""
    code = r"""import json, sys
from math_verify import parse, verify
print("ready")
for line in sys.stdin:
    # In a box, because a bare \left( 3, \frac{\pi}{2} \right) is read as 3
    read = [parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in json.loads(line) if text is not None]
    # Gold first, because verify is not symmetric: 1<x<2 is taken for (1,2), but not the other way round
    print(verify(*read, timeout_seconds=None) if len(read) > 1 else len(read[0]) > 1)"""
    with worker["lock"]:
        if worker["process"] is None or worker["process"].poll() is not None:
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            worker["process"] = subprocess.Popen([sys.executable, "-u", "-c", code], process_group=0, **pipes)
            if worker["process"].stdout.readline() != "ready\n":                 # not counted towards the limit
                raise ImportError("math-verify cannot be imported", name="math-verify")
        process = worker["process"]
        print(json.dumps([gold, answer]), file=process.stdin, flush=True)
        reply = process.stdout.readline() if select.select([process.stdout], [], [], seconds)[0] else ""
        if not reply:
            process.kill()
            process.wait()                                    # poll() sees it, and the next call starts another
        return reply == "True\n"

def is_correct(response_text, gold):
    r"""Whether the last balanced \boxed{...} after any </think> equals the gold answer. No box is wrong."""
    answer = last_boxed(response_text.rsplit("</think>", 1)[-1])
    if answer is None:
        return False
    answer, gold = (text.strip().strip("$").strip() for text in (answer, last_boxed(gold) or gold))
    return "".join(answer.split()) == "".join(gold.split()) or ask_math_verify(gold, answer)

def encode_prompt(tokenizer, problem, template, chat_template=True, **template_flags):
    """A problem (str) -> list of ids: the template filled in, as a user's turn if there is a chat template."""
    text = template.replace("{problem}", problem)
    if not chat_template or not tokenizer.chat_template:
        return tokenizer(text + "\n").input_ids
    return tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True,
                                         return_dict=False, **template_flags)

def pad_left(rows, pad_id):
    """Lists of ids -> ids (B, S), mask (B, S) bool. On the left: all rows then start their response in one column."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows])
    # From the lengths, not ids != pad_id: where pad and EOS are one id, that would hide real tokens
    return ids, torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])

def batch_indices(step, batch_size, num_problems, seed):
    """The problems of step 1, 2, ...: every one once, in a new order each epoch, before any comes again. It depends on
    its arguments alone: there is no sampler to save, and every method meets the same prompts in the same order."""
    places = [divmod(place, num_problems) for place in range((step - 1) * batch_size, step * batch_size)]
    orders = {epoch: np.random.default_rng((seed, epoch)).permutation(num_problems) for epoch, _ in places}
    return [int(orders[epoch][index]) for epoch, index in places]

# ---- 3. Sampling ---------------------------------------------------------------------------------------------
def mask_through_eos(ids, eos_ids):
    """(B, T) ids -> (B, T) bool, True through the first EOS: left out, a student would never learn to stop."""
    is_eos = torch.isin(ids, torch.tensor(sorted(eos_ids), dtype=ids.dtype, device=ids.device))
    return is_eos.cumsum(-1) - is_eos.long() == 0             # no EOS strictly before

@torch.no_grad()
def generate(model, input_ids, attention_mask, cache, *, max_new_tokens, vocab_size, eos_ids, pad_id,
             temperature=1.0, top_p=1.0, record_k=0):
    """Sample up to max_new_tokens further tokens of each row of input_ids, attention_mask (B, L), left-padded, on the
    cache that the last call left, of L - 1 columns, or an empty one -> new ids (B, n); if record_k the likeliest
    tokens at each, best first, (B, n, K); and log-probs of the last new ids (B,). Rows that ended go on as pad_id; when
    all have, n is less."""
    topk, scores = [], None
    def within_vocabulary(_, all_scores):                     # (B, rows of the head), float32
        nonlocal scores
        scores = all_scores[:, :vocab_size]                   # the other rows are no tokens
        if record_k:
            topk.append(scores.topk(record_k).indices)
        return scores
    law = dict(do_sample=True, temperature=temperature, top_p=top_p, top_k=0) if temperature else dict(do_sample=False)
    # Compiled, on a GPU: once for all sizes, and without CUDA graphs, which would be recorded anew for every new cache
    law["compile_config"] = CompileConfig(mode="default", dynamic=True) if cache.is_compileable else None
    config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=sorted(eos_ids), pad_token_id=pad_id, **law)
    # What a config leaves open comes from the model's own: a repetition penalty there would make another law of it
    shipped, model.generation_config = model.generation_config, GenerationConfig()
    try:
        ids = model.generate(input_ids, attention_mask=attention_mask.long(), past_key_values=cache,
                             generation_config=config, logits_processor=[within_vocabulary])
    finally:
        model.generation_config = shipped
    log_probs = (scores / (temperature or 1)).log_softmax(-1).gather(-1, ids[:, -1:])[:, 0]
    return ids[:, input_ids.shape[1]:], torch.stack(topk, dim=1) if record_k else None, log_probs

def grow_cache(cache, config, rows, columns):
    """What a cache holds of these rows (n,), moved into a StaticCache with room for so many columns or a few more."""
    grown, seen = StaticCache(config=config, max_cache_len=-(-columns // 64) * 64), int(cache.get_seq_length())
    for index in range(len(grown.layers) if seen else 0):
        layer = cache.layers.pop(0)                           # freed one by one: there are never two whole caches
        grown.update(layer.keys[rows, :, :seen], layer.values[rows, :, :seen], index)
    return grown

# ---- 4. Scoring and overlap ----------------------------------------------------------------------------------
def hidden_states(model, ids, mask, num_last, cache=None):
    """The final hidden states that predict the last num_last columns of ids (B, L), mask (B, L) -> (B, num_last, H).
    With a cache, columns that it holds are not computed again, and it grows to L - 1."""
    seen = cache.get_seq_length() if cache is not None else 0
    # Left padding must not count as positions: rotary models only see differences, GPT-2's are absolute
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)                            # (B, L)
    # The shift by one, for scoring and for training: what predicts column t is the state at column t - 1
    output = model.base_model(input_ids=ids[:, seen:-1], attention_mask=mask[:, :-1].long(), past_key_values=cache,
                              position_ids=positions[:, seen:-1], use_cache=cache is not None)
    return output.last_hidden_state[:, -num_last:]

def head_logits(model, hidden, vocab_size):
    """Hidden states (..., H) -> logits (..., vocab_size) in float32. Rows of the head that are no tokens are cut off
    before any softmax. read_inputs refuses models that do more than this (Gemma 2's softcap, Cohere's factor)."""
    return model.get_output_embeddings()(hidden)[..., :vocab_size].float()       # the module: adapters on it count

def topk_overlap(student_logits, teacher_logits, k):
    """The share of the student's k likeliest tokens that are among the teacher's.                    [Rethinking-OPD]
    (B, T, V), (B, T, V) -> (B, T), each one of 0, 1/k, ..., 1. Two unrelated models overlap by k / V, not by 0."""
    student_topk = student_logits.topk(k, dim=-1).indices                        # (B, T, K)
    teacher_topk = teacher_logits.topk(k, dim=-1).indices                        # (B, T, K)
    shared = student_topk[..., :, None] == teacher_topk[..., None, :]            # (B, T, K, K)
    return shared.any(-1).float().mean(-1)                                           # (B, T)

def alignment(student_logits, teacher_logits, response_mask, k):
    """How well the two models agree where the student went: (B, T, V), (B, T, V), (B, T) -> dict of floats, the means
    over the valid positions. With response_mask None: the values at each position, as tensors.     [Rethinking-OPD]
    p, q: probabilities of student and teacher; I: the tokens in the top k of both; _bar: renormalised on I.
        overlap_ratio            |I| / k
        overlap_token_advantage  1/|I| sum_I p_bar (log q_bar - log p_bar), at most 0; where I is empty NaN, left out
        overlap_mass_student     sum_I p;   overlap_mass_teacher  sum_I q
        entropy_student, entropy_teacher, entropy_gap (their distance), reverse_kl   in nats, of whole vocabularies"""
    log_p, log_q = F.log_softmax(student_logits.float(), -1), F.log_softmax(teacher_logits.float(), -1)
    ids, teacher_ids = log_p.topk(k, dim=-1).indices, log_q.topk(k, dim=-1).indices      # (B, T, K)
    shared = (ids[..., :, None] == teacher_ids[..., None, :]).any(-1)                    # (B, T, K)
    top_p, top_q = log_p.gather(-1, ids), log_q.gather(-1, ids)                          # (B, T, K)
    bar_p = top_p.masked_fill(~shared, -torch.inf).log_softmax(-1)
    bar_q = top_q.masked_fill(~shared, -torch.inf).log_softmax(-1)
    advantage = torch.where(shared, bar_p.exp() * (bar_q - bar_p), 0).sum(-1) / shared.sum(-1)   # 0 / 0 is NaN
    entropy_p, entropy_q = -(log_p.exp() * log_p).sum(-1), -(log_q.exp() * log_q).sum(-1)        # (B, T)
    values = {
        "overlap_ratio": shared.float().mean(-1), "overlap_token_advantage": advantage,
        "overlap_mass_student": (top_p.exp() * shared).sum(-1), "overlap_mass_teacher": (top_q.exp() * shared).sum(-1),
        "entropy_student": entropy_p, "entropy_teacher": entropy_q, "entropy_gap": (entropy_q - entropy_p).abs(),
        "reverse_kl": (log_p.exp() * (log_p - log_q)).sum(-1)}
    if response_mask is None:
        return values
    return {name: value[response_mask.bool()].nanmean().item() for name, value in values.items()}

def overlap_by_position(overlap, response_mask, parts=8):
    """Mean overlap in equal parts of the longest response: (B, T), (B, T) -> list of floats; NaN: no token there."""
    valid = overlap.where(response_mask.bool(), torch.nan)
    return [part.nanmean().item() for part in valid.tensor_split(parts, dim=1)]

# ---- 5. Who goes on: horizon, selection, drift, cap ----------------------------------------------------------
def horizon(step, start, growth, every, max_length):
    """Tokens to sample at step 0, 1, 2, ...: min(max_length, start + growth * floor(step / every)).    [FastOPD, POPD]
    FastOPD's ramp is every = 1, POPD's staircase more. Example: 512, 256, 10: steps 0 to 9 sample 512, step 10 768."""
    return min(max_length, start + growth * (step // every))

def select_prefixes(score, num_keep):
    """Which candidates go on past the prefix: scores (P, G) -> (P, G) bool, num_keep of them True.           [PG-OPD]
    First the best candidate of every prompt, then the best of all others; the first of equals. Prompts compete for the
    slots above P only. ValueError unless P <= num_keep <= P * G. Example: [[.9, .8], [.2, .1]], 3 -> .9, .8, .2."""
    P, G = score.shape
    if not P <= num_keep <= P * G:
        raise ValueError(f"num_keep must lie between {P} prompts and {P * G} candidates, got {num_keep}")
    best_first = score.scatter(1, score.argmax(dim=1, keepdim=True), torch.inf).flatten()        # (P * G,)
    rank = best_first.argsort(descending=True, stable=True).argsort()            # stable: of equals the first
    return (rank < num_keep).view(P, G)

def drift_weights(overlap, response_mask, threshold, w_drop):
    """The reliability w of each token: (B, T), (B, T) -> (B, T) in [0, 1], never rising, 0 off the mask. [Prune-OPD]
        w_t = max(0, 1 - w_drop * #{s <= t : overlap_s < threshold})          the loss weight is w_t + w_base
    Example: threshold .75, w_drop .1, overlap (1, .5, 0) -> (1, .9, .8)."""
    bad = (overlap < threshold) & response_mask.bool()                               # (B, T)
    # Cumulative: the teacher judges a token given all before it, so nothing makes up for a wrong turn
    return (1 - w_drop * bad.cumsum(-1)).clamp(min=0) * response_mask

def reliable_length(weights, response_mask):
    """How many tokens of each row have some reliability left, w > 1e-8: (B, T), (B, T) -> (B,)         [Prune-OPD]"""
    return ((weights > 1e-8) & response_mask.bool()).sum(-1)

def next_max_length(reliable, max_length, misses, *, step, margin, hit_ratio, patience, low, high):
    """The cap of the next rollouts, from the reliable lengths (B,) under this one -> (max_length, misses). [Prune-OPD]
    It grows by step when a share hit_ratio of the rows is reliable to within margin of it, and shrinks after patience
    misses in a row. Example: cap 2048, margin 100: a tenth of the rows at 1948 or more -> 2148."""
    boundary = max(low, max_length - margin)
    # A row that ends early cannot hit: growth needs responses that are long and still reliable
    if (reliable >= boundary).double().mean().item() >= hit_ratio:
        return min(max_length + step, high), 0
    if misses + 1 >= patience:
        return max(max_length - step, low), 0
    return max_length, misses + 1

# ---- 6. Losses, per token. Contexts are constants: no gradient flows through the sampling. -------------------
def reverse_kl(student_logits, teacher_logits):
    """KL(student || teacher) over the whole vocabulary: (B, T, V), (B, T, V) -> (B, T).                         [GKD]
        sum_v p(v) (log p(v) - log q(v)),   p student, q teacher"""
    # Not F.kl_div(p, q), which is KL(q || p): with that the student spreads over all that the teacher might do
    log_p = F.log_softmax(student_logits.float(), dim=-1)                        # (B, T, V)
    log_q = F.log_softmax(teacher_logits.float(), dim=-1)                        # (B, T, V)
    return (log_p.exp() * (log_p - log_q)).sum(-1)

def reverse_kl_topk(student_logits, teacher_logits, k, support="student"):
    """Reverse KL on a support S of top-k tokens: (B, T, V), (B, T, V) -> (B, T).        [Rethinking-OPD, released code]
        value     sum_S p_bar (log p - log q),   p_bar = p / P_S,   P_S = sum_S p
        gradient  of logit u: p(u) (1[u in S] rho(u) - sum_S p rho) / P_S,   rho = log p - log q
    support: the top k of the student | teacher | both (intersection; 0 where empty) | either (union).
    The released code's gradient, not that of the paper's renormalised KL: it also moves mass into S and out of it."""
    log_p, log_q = F.log_softmax(student_logits.float(), dim=-1), F.log_softmax(teacher_logits.float(), dim=-1)
    student_ids, teacher_ids = log_p.topk(k, dim=-1).indices, log_q.topk(k, dim=-1).indices       # (B, T, K)
    same = student_ids[..., :, None] == teacher_ids[..., None, :]                # (B, T, K, K)
    both, new = same.any(-1), ~same.any(-2)                   # the teacher's new tokens: none may count twice
    whole = torch.ones_like(both)
    ids, inside = {                                           # (B, T, K), or 2K for the union
        "student": (student_ids, whole), "teacher": (teacher_ids, whole), "intersection": (student_ids, both),
        "union": (torch.cat([student_ids, teacher_ids], -1), torch.cat([whole, new], -1))}[support]
    log_p, log_q = log_p.gather(-1, ids), log_q.gather(-1, ids)
    p_bar = log_p.masked_fill(~inside, -torch.inf).softmax(-1).nan_to_num(0)     # NaN: an empty intersection
    constant = p_bar * (log_p - log_q)                                           # p_bar rho
    # The gradient flows through the importance ratio alone, which is 1 on-policy. Through p rho itself it would have a
    # "+1" that does not cancel on a part of the vocabulary, and would push mass out of S even at p = q
    ratio = (log_p - log_p.detach()).exp()
    return (constant.detach() * ratio).sum(-1)

def reverse_kl_sampled(student_logits, teacher_logits, response_ids, baseline=False):
    """The k1 policy-gradient surrogate of the sampled tokens y: (B, T, V), (B, T, V), (B, T) -> (B, T).
        - stop_gradient(r) log p(y),   r = log q(y) - log p(y); with the baseline r + KL(p || q)           [vOPD]
    Over y ~ p its mean gradient is that of reverse_kl; its value means nothing. The mean of r is -KL."""
    log_p = F.log_softmax(student_logits.float(), dim=-1)                        # (B, T, V)
    log_q = F.log_softmax(teacher_logits.float(), dim=-1)                        # (B, T, V)
    sampled = response_ids[..., None]                                                # (B, T, 1)
    advantage = (log_q - log_p).gather(-1, sampled).squeeze(-1)                  # (B, T)
    if baseline:
        # Added to r, never in its place: it centres r, and a constant of the context has mean gradient 0
        advantage = advantage + (log_p.exp() * (log_p - log_q)).sum(-1)
    return -advantage.detach() * log_p.gather(-1, sampled).squeeze(-1)

# ---- 7. Extrapolation ----------------------------------------------------------------------------------------
def extrapolate(weights, anchor, validate, max_tries=5):
    """Go on along the update for as long as a validation score rises.                                        [EffOPD]
        try weights + 2k (weights - anchor), k = 1, 2, ..., max_tries; stop at the first that is not strictly better
    weights, anchor: dicts of tensors, as they are now and as accepted the last time; validate(dict) -> float.
    Returns the accepted dict, the accepted k (0: plain OPD goes on), and the scores of the weights and of every try."""
    accepted, accepted_k, scores = weights, 0, [validate(weights)]
    for k in range(1, max_tries + 1):
        candidate = {name: value + 2 * k * (value - anchor[name].to(value)) for name, value in weights.items()}
        scores.append(validate(candidate))
        if not scores[-1] > scores[-2]:
            break
        accepted, accepted_k = candidate, k
    return accepted, accepted_k, scores

def movable_weights(model):
    """Copies of what EffOPD extrapolates, by name: attention and MLP weights; no embedding, head or input norm."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()
            if re.search(r"attn|attention|mlp|fc\d", name)}

# ---- 8. Evaluation -------------------------------------------------------------------------------------------
def pass_at_k(num_samples, num_correct, k):
    """The chance that one of k answers is right, without bias from num_samples >= k answers of which num_correct are:
    1 - C(n - c, k) / C(n, k)   [Chen et al., 2107.03374]. Example: n 4, c 1, k 2 -> .5. ValueError for k > n."""
    if not 1 <= k <= num_samples or not 0 <= num_correct <= num_samples:
        raise ValueError(f"needs 1 <= k <= n and 0 <= c <= n, got k {k}, n {num_samples}, c {num_correct}")
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)

def repetition(ids):
    """The share of the 4-grams of a list of ids that occurred earlier in it: 0 without repeats, near 1 in a loop."""
    grams = list(zip(ids, ids[1:], ids[2:], ids[3:]))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0

@torch.no_grad()
def sampled_log_probs(model, out, vocab_size):
    """The log-probs that a model gives the tokens of a rollout, out of rollout -> B tensors (length,)."""
    ids, mask = (torch.cat([out[f"prompt_{part}"], out[f"response_{part}"]], dim=1) for part in ("ids", "mask"))
    valid, rows = out["response_mask"], max(1, 2 ** 15 // ids.shape[1])          # so many tokens at a time
    hidden = torch.cat([hidden_states(model, *part, valid.shape[1])[own] for own, *part in zip(
        *(column.split(rows) for column in (valid, ids, mask)))])
    tokens = out["response_ids"][valid][:, None]
    return torch.cat([head_logits(model, states, vocab_size).log_softmax(-1).gather(-1, chosen)[:, 0] for states, chosen
                      in zip(hidden.split(192), tokens.split(192))]).split(valid.sum(-1).tolist())    # never (B, T, V)

def auroc(scores, correct):
    """The chance that a right answer scores higher than a wrong one: lists -> in [0, 1], NaN unless both kinds exist.
    A tie counts half; .5: the score tells nothing. Example: .9 and .4 right, .4 and .1 wrong -> 3.5 / 4."""
    right, wrong = ([score for score, known in zip(scores, correct) if known == kind] for kind in (True, False))
    return float(np.mean([np.sign(s - np.array(wrong)).mean() / 2 + .5 for s in right])) if right and wrong else np.nan

def evaluate(model, tokenizer, problems, *, num_samples, rows_per_batch, seed, decoding, title="", teacher=None):
    """Sample, in a random stream of their own, and grade num_samples answers to every problem: a dict with answer and
    prompt_ids, perhaps begun, ids that each answer begins with -> (dict of metrics, list of one dict per answer).
    decoding: for rollout. With a teacher an answer has a reward, the mean of log q - log p.         [Rethinking-OPD]"""
    answers = [{**problem, "index": index, "sample": sample} for index, problem in enumerate(problems)
               for sample in range(num_samples)][RANK::NUM_RANKS]
    torch.manual_seed(seed * NUM_RANKS + RANK)                # not restored: every step seeds for itself
    for start in tqdm(range(0, len(answers), rows_per_batch), desc=title, leave=False, disable=RANK > 0):
        batch = answers[start:start + rows_per_batch]
        out = rollout(model, None, [answer["prompt_ids"] + answer.get("begun", []) for answer in batch], **decoding)
        log_probs = [sampled_log_probs(who, out, decoding["vocab_size"]) for who in (teacher, model) if teacher]
        for row, answer in enumerate(batch):
            response = answer.get("begun", []) + out["response_ids"][row][out["response_mask"][row]].tolist()
            text = tokenizer.decode(response, skip_special_tokens=True)
            answer.update(response=text, response_ids=response, correct=is_correct(text, answer["answer"]),
                          reward=(log_probs[0][row] - log_probs[1][row]).mean().item() if teacher else math.nan,
                          no_box=last_boxed(text.rsplit("</think>", 1)[-1]) is None, length=len(response),
                          truncated=not out["ended"][row].item(), repetition=repetition(response))
    answers = sorted(gather_from_ranks(answers), key=lambda answer: (answer["index"], answer["sample"]))
    means = {name: float(np.mean([answer[key] for answer in answers])) for name, key in {
        "avg_at_n": "correct", "mean_length": "length", "truncated_fraction": "truncated", "no_box_fraction": "no_box",
        "repetition": "repetition", "mean_reward": "reward"}.items()}
    correct = np.array([answer["correct"] for answer in answers]).reshape(-1, num_samples)       # (problems, n)
    # Over problems, not answers: answers to one problem are not independent evidence
    se = float(correct.mean(1).std(ddof=1) / math.sqrt(len(correct))) if len(correct) > 1 else math.nan
    return dict(means, se=se, pass_at_n=float(correct.any(1).mean()), n=num_samples, num_problems=len(correct),
                auroc=auroc([answer["reward"] for answer in answers], correct.ravel()), top_p=decoding["top_p"],
                temperature=decoding["temperature"], max_new_tokens=decoding["max_length"], seed=seed), answers

# ---- 9. Rollout ----------------------------------------------------------------------------------------------
def clock(device):
    """Seconds, when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

@torch.no_grad()
def rollout(student, teacher, prompts, *, max_length, segment_length, vocab_size, eos_ids, pad_id, temperature=1.0,
            top_p=1.0, overlap_k=0, num_generations=1, select_at=0, select="overlap", probe_window=0, keep_ratio=1.0,
            drift=(), static_cache=False):
    """Sample responses to B prompts, lists of ids, segment by segment, on KV caches that nothing is computed for twice.
    The teacher (None in evaluation) scores each segment once; then rows that ended, lost or drifted leave both caches.
    select_at: there keep_ratio of the rows go on, one a prompt or more, by overlap in the probe_window or at random
    drift: (threshold, w_drop): a row stops at the first segment border where its reliability is used up
    -> dict, T the longest response: prompt_ids, prompt_mask (B, S); response_ids, response_mask, overlap (B, T),
       log_probs (B, T), as sampled, of the last token of each segment, else NaN; ended (has an EOS), kept (not stopped
       by selection or drift) (B,); teacher_hidden: B of (length, H); teacher_seconds"""
    (ids, mask), device = (part.to(student.device) for part in pad_left(prompts, pad_id)), student.device
    B, S = ids.shape
    ids, mask = F.pad(ids, (0, max_length), value=pad_id), F.pad(mask, (0, max_length))          # (B, S + max_length)
    overlap = torch.zeros(B, max_length, device=device)                              # 0 off the mask
    log_probs = torch.full_like(overlap, torch.nan)
    ended, kept = torch.zeros(B, dtype=torch.bool, device=device), torch.ones(B, dtype=torch.bool, device=device)
    teacher_hidden, teacher_seconds = [[] for _ in range(B)], 0.0
    caches, start = [DynamicCache(config=model.config) for model in (student, teacher) if model], S  # the next column
    rows = stay = torch.arange(B, device=device)              # who still runs, and their places in the caches
    for border in sorted({*range(segment_length, max_length, segment_length), max_length, select_at or max_length}):
        if static_cache:                  # the teacher's grows once per segment, anyway
            caches[0] = grow_cache(caches[0], student.config, stay, S + border)
        new_ids, student_topk, last_log_probs = generate(
            student, ids[rows, :start], mask[rows, :start], caches[0], max_new_tokens=S + border - start,
            vocab_size=vocab_size, eos_ids=eos_ids, pad_id=pad_id, temperature=temperature, top_p=top_p,
            record_k=overlap_k)
        new_mask, end = mask_through_eos(new_ids, eos_ids), start + new_ids.shape[1]
        ids[rows, start:end], mask[rows, start:end] = new_ids.where(new_mask, pad_id), new_mask
        log_probs[rows, end - S - 1] = last_log_probs.where(new_mask[:, -1], torch.nan)
        ended[rows] = torch.isin(new_ids, torch.tensor(sorted(eos_ids), device=device)).any(-1)
        if teacher:
            before = clock(device)
            # Hidden states are what stays of the teacher: the loss needs its logits, and those are V / H as big
            hidden = hidden_states(teacher, ids[rows, :end], mask[rows, :end], end - start, caches[1])
            teacher_topk = torch.cat([head_logits(teacher, chunk, vocab_size).topk(overlap_k).indices for chunk
                                      in hidden.flatten(0, 1).split(192)]).view_as(student_topk)      # never (B, T, V)
            shared = (student_topk[..., :, None] == teacher_topk[..., None, :]).any(-1)
            overlap[rows, start - S:end - S] = shared.float().mean(-1) * new_mask
            for row, states, length in zip(rows.tolist(), hidden, new_mask.sum(-1).tolist()):
                teacher_hidden[row].append(states[:length].clone())              # a view would keep all of hidden
            teacher_seconds += clock(device) - before
        if border == select_at:
            score = overlap[:, :probe_window].mean(-1)
            # Rows that ended stay, and take a slot only if nobody wants it, or where all of a prompt ended: one more
            score = torch.where(ended, -1, torch.rand_like(score) if select == "random" else score)
            score = score.view(-1, num_generations)                              # (P, G)
            slots = max(len(score), round(keep_ratio * B)) + int((score == -1).all(1).sum())
            kept &= select_prefixes(score, min(B, slots)).flatten() | ended
        if drift:
            kept &= (drift_weights(overlap[:, :end - S], mask[:, S:end], *drift)[:, -1] > 1e-8) | ended
        stay = (kept & ~ended)[rows].nonzero().squeeze(-1)
        rows, start = rows[stay], end
        if not len(rows) or border == max_length:
            break
        for cache in caches[static_cache:] if len(stay) < len(new_ids) else ():
            cache.batch_select_indices(stay)
    return dict(prompt_ids=ids[:, :S], prompt_mask=mask[:, :S], response_ids=ids[:, S:start], ended=ended, kept=kept,
                response_mask=mask[:, S:start], overlap=overlap[:, :start - S], log_probs=log_probs[:, :start - S],
                teacher_hidden=[torch.cat(pieces) if pieces else None for pieces in teacher_hidden],
                teacher_seconds=teacher_seconds)

def rollout_in_groups(student, teacher, prompts, rows_at_once, *, num_generations=1, **settings):
    """rollout, of at most so many rows at once, but of all candidates of a prompt -> its dict, of all rows, padded with
    0. Best on prompts sorted by length: those of a group are padded to its longest. select_at: within each group."""
    size = max(1, rows_at_once // num_generations) * num_generations
    groups = [rollout(student, teacher, prompts[start:start + size], num_generations=num_generations, **settings)
              for start in range(0, len(prompts), size)]
    out = {"teacher_seconds": sum(group.pop("teacher_seconds") for group in groups)}
    for name in groups[0]:
        rows = [row for group in groups for row in group[name]]
        side = "left" if name.startswith("prompt") else "right"
        out[name] = rows if name == "teacher_hidden" else torch.nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_side=side) if rows[0].dim() else torch.stack(rows)
    return out

def gather_from_ranks(items):
    """The lists of all processes that torchrun started, end to end, in the order of their ranks."""
    if not dist.is_initialized():
        return items
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return sum(lists, [])

# ---- 10. One update ------------------------------------------------------------------------------------------
def backward_in_chunks(hidden, teacher_hidden, response_ids, token_weight, log_probs, *, student_head, teacher_head,
                       token_loss, measure=lambda *_: {}, chunk_tokens=192):
    """Heads, loss and backward, chunk by chunk: hidden (N, H), teacher_hidden (N, H'), response_ids, token_weight,
    log_probs (N,) -> gradient wrt hidden (N, H), sum of weighted losses, measures by chunk."""
    grads, total, measures = [], 0.0, []
    for states, teacher_states, ids, weight, sampled in zip(*(column.split(chunk_tokens) for column in (
            hidden.detach(), teacher_hidden, response_ids, token_weight, log_probs))):
        states.requires_grad_()
        teacher_logits = teacher_head(teacher_states).detach()                   # (chunk, V)
        student_logits = student_head(states)
        loss = (token_loss(student_logits, teacher_logits, ids) * weight).sum()
        # Backward now, while these logits exist: kept to the end, they would fill (B, T, V) several times over
        loss.backward()
        grads.append(states.grad)                                                    # (chunk, H)
        total += loss.detach()                                # read once per step, or the GPU would wait at each chunk
        measures.append(measure(student_logits.detach(), teacher_logits, ids, sampled))
    return torch.cat(grads), total, measures

def train_step(student, optimizer, batch, *, learning_rate, micro_batch_size, max_grad_norm,
               autocast=contextlib.nullcontext(), **chunk):
    """One optimizer step on a rollout -> dict: loss, grad_norm (before clipping), num_tokens, means of the measures; {}
    without a token to train on. batch: prompt_ids, prompt_mask (B, S); response_ids, loss_mask, token_weight, log_probs
    (B, T); teacher_hidden (B tensors); chunk: for backward_in_chunks. FloatingPointError, before any weight changes."""
    lengths = batch["loss_mask"].sum(-1)                                         # (B,)
    # Of the whole step: a mean per micro-batch or rank would give the tokens beside short rows a larger weight
    num_tokens = sum(gather_from_ranks([int(lengths.sum())]))                        # N of the whole step
    if not num_tokens:
        return {}
    # All padding to the right end: what stood before a short prompt would be computed along with a long response
    mask = torch.cat([batch["prompt_mask"], batch["loss_mask"]], dim=1).int()        # (B, S + T)
    mask, columns = mask.sort(dim=1, descending=True, stable=True)
    ids = torch.cat([batch["prompt_ids"], batch["response_ids"]], dim=1).gather(1, columns)
    learned = mask.bool() & (columns >= batch["prompt_ids"].shape[1])
    sizes = mask.sum(-1).where(lengths > 0, 0)                                       # (B,)
    order = sizes.argsort(descending=True, stable=True)[:int((lengths > 0).sum())]
    loss, measures = 0.0, []
    optimizer.zero_grad(set_to_none=True)
    for module in student.modules():      # recomputed in training mode only; all else stays in eval mode: no dropout
        module.training = getattr(module, "gradient_checkpointing", False)
    while len(order):
        width = int(sizes[order[0]])      # micro_batch_size of the longest rows, or as many tokens in shorter ones
        rows, order = order.tensor_split([micro_batch_size * int(sizes.max()) // width])
        with autocast:
            hidden = hidden_states(student, ids[rows, :width], mask[rows, :width], width - 1)[learned[rows, 1:width]]
            teacher_hidden = torch.cat([batch["teacher_hidden"][row][:lengths[row]] for row in rows.tolist()])
            grad, value, measured = backward_in_chunks(
                hidden, teacher_hidden, ids[rows][learned[rows]],                # (N, H), (N, H'), (N,), (N,), (N,)
                batch["token_weight"][rows][batch["loss_mask"][rows]] / num_tokens,
                batch["log_probs"][rows][batch["loss_mask"][rows]], **chunk)
        hidden.backward(grad)
        loss += value
        measures += measured
    student.eval()
    for parameter in student.parameters() if dist.is_initialized() else ():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(parameter.grad)                       # summed over the ranks
    grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), max_grad_norm).item()
    loss = sum(gather_from_ranks([float(loss)]))
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        raise FloatingPointError(f"loss {loss}, gradient norm {grad_norm}, longest response {int(lengths.max())}")
    optimizer.param_groups[0]["lr"] = learning_rate
    optimizer.step()
    parts = gather_from_ranks([{name: torch.cat([piece[name] for piece in measures]).cpu() for name in measures[0]}]
                              if measures else [])
    means = {name: torch.cat([part[name] for part in parts]).nanmean().item() for name in parts[0]}
    return {"loss": loss, "grad_norm": grad_norm, "num_tokens": num_tokens, **means}

def forward_flops(model, lengths):
    """Floating-point operations of one forward over rows of so many tokens (B,) -> float: the sum of 2 N L + 2 n_layer
    d_model L^2, N parameters. Decoding costs a forward, an update three."""
    config, L = model.config.get_text_config(), lengths.double()
    per_row = 2 * model.num_parameters() * L + 2 * config.num_hidden_layers * config.hidden_size * L ** 2
    return float(per_row.sum())

# ---- 11. The tiny world: a made-up language in which distillation can be watched -----------------------------
#     A problem is a digit and four to eight operations modulo 10, "4 a +3 b *7"; its solution goes step by step: "first
#     a 4 +3 gives 7 , then b 7 *7 is 9 . so the answer is \boxed{ 9 }". Every operation can be undone: a slip carries
#     through to the answer. Words have synonyms, of which authors like some better: a model's top k are its habits.
LEXICON = {"special": ["<pad>", "<end>", "<user>", "<solve>"], "frame": ["the", "answer", "\\boxed{", "}"],
           "digit": list("0123456789"), "operation": [f"+{n}" for n in range(1, 10)] + ["*3", "*7", "*9"],
           "label": list("abcdefgh"), "opener": "first next then now so here well okay".split(),
           "verb": "is gives makes equals yields becomes leaves gets".split(), "closer": ", ; . : and - / |".split()}

def tiny_example(rng, steps, habit, slip_rate, lexicon, order=1):
    """A problem of so many steps and an author's solution -> {"problem", "answer"}, [word, ...], [trusted, ...].
    habit, 0 to 7: the synonym the author likes best; each next one is .6 times as likely. slip_rate: how often a step
    goes wrong; what follows is consistent, only the slip itself is not trusted. order -1: "a +3 4" for "a 4 +3"."""
    def synonym(kind):
        return lexicon[kind][(int(math.log(1 - rng.random()) / math.log(.6)) + habit) % 8]
    def apply(value, operation):
        return str((int(value) + int(operation[1:]) if operation[0] == "+" else int(value) * int(operation[1:])) % 10)
    first, start = rng.randrange(9 - steps), rng.choice(lexicon["digit"])
    problem, words, trusted, truth, value = [start], [], [], start, start
    for label in lexicon["label"][first:first + steps]:
        operation = rng.choice(lexicon["operation"])
        problem, truth = problem + [label, operation], apply(truth, operation)
        slip = rng.choice(("result", "operation")) if rng.random() < slip_rate else None
        read = rng.choice(lexicon["operation"]) if slip == "operation" else operation
        result = apply(apply(value, read), rng.choice("+1 +9 +1 +9 +2 +8".split()) if slip == "result" else "+0")
        words += [synonym("opener"), label, *[value, read][::order], synonym("verb"), result, synonym("closer")]
        trusted += [True, True, *[True, slip != "operation"][::order], True, slip != "result", True]
        value = result
    words += [synonym("opener"), "the", "answer", synonym("verb"), "\\boxed{", value, "}", "<end>"]
    return {"problem": " ".join(problem), "answer": truth}, words, trusted + [True] * 8

def tiny_tokenizer(words):
    """A tokenizer with one token per word, and a chat template, like any other that transformers loads."""
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>")
    tokenizer.chat_template = "{% for m in messages %}<user> {{ m['content'] }} {% endfor %}<solve>"
    return tokenizer

def make_world(folder, seed, teacher_habit=0, teacher_order=1, teacher_steps=150):
    """Write the tiny world into a folder, in a minute: models teacher/ and student/, train.jsonl, eval.jsonl. From one
    base model the teacher learns of a careful author; the student, briefly, of one of other habits who slips often."""
    tokenizer = tiny_tokenizer(sum(LEXICON.values(), []))
    torch.manual_seed(0)                  # one start for all worlds; the seed draws what is learned from it
    student = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None,
        initializer_range=0.05, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    def learn(model, who, steps, lengths, habit, slip_rate, believes=False, order=1):
        rng, optimizer = random.Random(f"{seed} {who}"), torch.optim.AdamW(model.parameters(), weight_decay=0.0)
        for step in tqdm(range(steps), desc=f"tiny world: {who}", leave=False):
            batch = []
            for _ in range(64):
                liked = rng.randrange(8) if habit is None else habit
                problem, solution, trusted = tiny_example(rng, rng.randint(*lengths), liked, slip_rate, LEXICON, order)
                prompt = ["<user>", *problem["problem"].split(), "<solve>"]
                words, learned = prompt + solution, [False] * len(prompt) + [good or believes for good in trusted]
                batch.append(torch.tensor([tokenizer.convert_tokens_to_ids(words), learned]).T)      # (T, 2)
            ids, learned = torch.nn.utils.rnn.pad_sequence(batch).permute(2, 1, 0)   # (64, T) each; padding is 0: <pad>
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids.where(learned > 0, -100)).loss.backward()    # padded right: needs no mask
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            warm_up, cosine = min(1, (step + 1) / 20), .525 + .475 * math.cos(math.pi * step / steps)
            optimizer.param_groups[0]["lr"] = 4e-3 * warm_up * cosine            # down to a twentieth
            optimizer.step()
    learn(student, "base model, short problems", 250, (1, 3), None, .1)
    learn(student, "base model, full problems", 130, (4, 8), None, .1)
    teacher = copy.deepcopy(student)
    learn(teacher, "teacher", teacher_steps, (4, 8), teacher_habit, .1, order=teacher_order)
    learn(student, "student", 40, (4, 8), 2, .25, believes=True)
    partial = f"{folder}.partial"                             # a world that was broken off must not look like one
    shutil.rmtree(partial, ignore_errors=True)
    for name, model in (("teacher", teacher), ("student", student)):
        model.save_pretrained(os.path.join(partial, name))
        tokenizer.save_pretrained(os.path.join(partial, name))
    for name, count in (("train", 2000), ("eval", 100)):
        rng = random.Random(f"{seed} {name}")
        for _ in range(count):
            append_json(os.path.join(partial, f"{name}.jsonl"), tiny_example(rng, rng.randint(4, 8), 0, 0, LEXICON)[0])
    os.replace(partial, folder)

# ---- 12. Set-up, preflight, checkpoints ----------------------------------------------------------------------
def compare_vocabularies(student_vocab, teacher_vocab):
    """Raises ValueError, naming three tokens, unless both dicts map the same tokens to the same ids."""
    different = sorted({token for token, _ in student_vocab.items() ^ teacher_vocab.items()})
    if different:
        shown = [f"{token!r} is {student_vocab.get(token)} and {teacher_vocab.get(token)}" for token in different[:3]]
        raise ValueError(f"use models of one tokenizer: different ids for {len(different)} tokens: {', '.join(shown)}")

def stop_ids(model, tokenizer):
    """All ids that end a response: the one or several of the generation config, and the tokenizer's EOS."""
    listed = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])} - {None}

def save_checkpoint(run, args):
    """What a run is after a step, and its files -> checkpoint-<step>/, unless it is there: whole or not at all, since
    it gets its name when complete; then the oldest go. OSError, with no trace left of it, if it cannot be written."""
    folder, partial = (os.path.join(args.output_dir, f"checkpoint{end}") for end in (f"-{run.step}", ".partial"))
    if RANK or os.path.exists(folder):
        return
    shutil.rmtree(partial, ignore_errors=True)
    try:
        run.student.save_pretrained(partial)
        run.tokenizer.save_pretrained(partial)
        state = {name: getattr(run, name) for name in ("step", "flags", "state", "anchor", "graded")}
        torch.save(dict(state, optimizer=run.optimizer.state_dict()), os.path.join(partial, "trainer_state.pt"))
        for path in run.files:
            shutil.copy(path, partial)
    except Exception as error:            # torch and safetensors have errors of their own for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{folder} cannot be written: {error}") from None
    os.replace(partial, folder)
    for old in list_checkpoints(args.output_dir)[:-args.keep_checkpoints]:
        os.replace(old, partial)          # first the name: a kill in the middle must not leave half a checkpoint
        shutil.rmtree(partial)

def explain(error, run):
    """One line, and the exit status, for what is no error of the program; "" for what is. run: None during set-up."""
    text, phase = " ".join(str(error).split())[:400], run.phase if run else "set-up"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 128 + (run and run.stopped or signal.SIGINT)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text:
        flag = "micro" if "update" in phase else "eval" if phase[0] == "e" else "rollout"
        now = {**run.flags, **run.state}[f"{flag}_batch_size"] if phase != "set-up" else 0
        return f"out of memory in {phase}" + f"; halve --{flag}_batch_size, now {now}" * (now > 0), 2
    if isinstance(error, FloatingPointError) or "probability tensor" in text:    # what torch says of drawing from NaN
        return f"{phase} is not finite: {text}", 2
    if isinstance(error, OSError) or isinstance(error, (ValueError, ImportError)) and not run:
        module, path = getattr(error, "name", None), getattr(error, "filename", None)
        return text + (f"; pip install {module.split('.')[0]}" if module else "; check the path" if path else ""), 2
    return "another process has ended" if dist.is_initialized() and re.search("peer|NCCL", text) else "", 1

def open_tracker(kind, folder, flags, step):
    """TensorBoard or Weights & Biases, imported only here -> log(dict of numbers, step); of "none" it does nothing."""
    if kind == "wandb":
        import wandb
        os.makedirs(folder, exist_ok=True)                    # else it goes to a temporary one
        return wandb.init(project="opd.py", dir=folder, config=flags).log
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        board = SummaryWriter(folder, purge_step=step)        # flushed every time: at exit its thread loses the rest
        return lambda numbers, step: ([board.add_scalar(name, numbers[name], step) for name in numbers], board.flush())
    return lambda numbers, step: None

def list_checkpoints(folder):
    """The paths of the checkpoints in a folder, which need not exist, in the order of their steps."""
    paths = [path for path in glob.glob(os.path.join(glob.escape(folder), "checkpoint-*")) if re.search(r"-\d+$", path)]
    return sorted(paths, key=lambda path: int(path.rsplit("-", 1)[1]))

def append_json(path, record):
    """One more line of a jsonl file. NaN, the mean of nothing, becomes null: JSON has no NaN."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(json.loads(json.dumps(record), parse_constant=lambda _: None)) + "\n")

def read_data(args, tokenizer):
    """The problems of the files that the flags name, each with its prompt_ids -> a namespace."""
    def read(path):
        return [{**problem, "prompt_ids": encode_prompt(
            tokenizer, problem["problem"], args.prompt_template, chat_template=not args.no_chat_template,
            enable_thinking=args.enable_thinking)} for problem in load_problems(path)]
    data = argparse.Namespace(tokenizer=tokenizer, eval={}, pools=[])
    for path in args.eval_file:
        problems, name = read(path), os.path.splitext(os.path.basename(path))[0]
        if any(problem["answer"] is None for problem in problems):
            raise ValueError(f"--eval_file {path}: some problems have no answer, and evaluation needs one for each")
        data.eval[path if name in data.eval else name] = problems
    for path in args.train_file:
        data.pools.append([item for item in read(path) if len(item["prompt_ids"]) <= args.max_prompt_length])
        if not data.pools[-1]:
            raise ValueError(f"{path}: all its prompts are longer than --max_prompt_length {args.max_prompt_length}")
    data.train = sum(data.pools, [])
    data.answered = [problem for problem in data.train if problem["answer"] is not None]
    if args.extrapolate and len(data.answered) < args.validation_size:
        raise ValueError(f"--extrapolate needs {args.validation_size} answered problems; here are {len(data.answered)}")
    return data

def read_inputs(args, checkpoint=None):
    """The files and models that the flags name, the student perhaps from a checkpoint -> what a run needs."""
    def load(auto_class, path, **options):
        try:
            return auto_class.from_pretrained(path, **options)
        except Exception as error:        # transformers, safetensors, json: each has errors of its own
            raise ValueError(f"{path} does not load: {type(error).__name__}: {str(error)[:200]}") from None
    bf16 = args.dtype == "bfloat16" or args.dtype == "auto" and args.device.startswith("cuda")
    low, student = torch.bfloat16 if bf16 else torch.float32, checkpoint or args.student
    run = read_data(args, load(AutoTokenizer, student))
    # Loaded, not cast: a cast rounds the rotary frequencies, too, and turns positions around 1,000 by over .1 rad
    run.sampler = run.student = load(AutoModelForCausalLM, student, dtype=low).to(args.device)
    run.device, models, eos_ids = run.sampler.device, [run.student], stop_ids(run.student, run.tokenizer)
    if not args.eval_only:
        if bf16:
            # float32 master weights: at a learning rate of 1e-6 most updates are smaller than bfloat16 can add
            run.student = load(AutoModelForCausalLM, student, dtype=torch.float32).to(args.device)
        run.teacher_tokenizer = load(AutoTokenizer, args.teacher)
        compare_vocabularies(run.tokenizer.get_vocab(), run.teacher_tokenizer.get_vocab())
        run.teacher = load(AutoModelForCausalLM, args.teacher, dtype=low).to(args.device)
        models = [run.sampler, run.teacher]
        if args.cold_start_steps:                             # it teaches the teacher's stop token, too
            eos_ids |= stop_ids(run.teacher, run.teacher_tokenizer)
            run.student.generation_config.eos_token_id = sorted(eos_ids)
    run.vocab_size = min(max(run.tokenizer.get_vocab().values()) + 1,
                         *(model.get_output_embeddings().weight.shape[0] for model in models))
    if args.overlap_k > run.vocab_size:
        raise ValueError(f"--overlap_k {args.overlap_k} is more than the {run.vocab_size} tokens of the vocabulary")
    ask_math_verify("1", None)                                # if it cannot start, better now than after an evaluation
    run.sampling = dict(vocab_size=run.vocab_size, eos_ids=eos_ids, segment_length=args.segment_length,
                        static_cache=args.static_cache, temperature=args.temperature, pad_id=0)    # or any other
    ids, run.token_bytes = torch.arange(16, device=run.device)[None], 0         # any text; what the caches keep a token
    known = {"DynamicLayer"} if args.static_cache else {"DynamicLayer", "DynamicSlidingWindowLayer"}
    for model in models:
        output, states = model(input_ids=ids, use_cache=True), model.base_model(input_ids=ids).last_hidden_state
        error = (output.logits - head_logits(model, states, None)).abs().max()           # None: every row of the head
        cache = getattr(output, "past_key_values", None)
        kinds = {type(layer).__name__ for layer in getattr(cache, "layers", [cache])}
        if kinds - known or error > 5e-3 * output.logits.abs().max() and not args.eval_only:
            raise ValueError(f"{model.config.model_type} models are not supported: their head is not head_logits, "
                             "or their cache not keys and values alone (--static_cache: of all tokens); use others")
        run.token_bytes += sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) // ids.numel()
    run.optimizer = torch.optim.AdamW(run.student.parameters(), lr=args.learning_rate, weight_decay=0.0)
    run.optimizer.register_step_pre_hook(lambda *_: setattr(run, "halfway", True))         # to the end of the step
    run.optimizer.register_step_post_hook(lambda *_: run.sampler.load_state_dict(run.student.state_dict()))
    if args.gradient_checkpointing:
        run.student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    run.train_step = functools.partial(
        train_step, run.student, run.optimizer, micro_batch_size=args.micro_batch_size,
        max_grad_norm=args.max_grad_norm, autocast=torch.autocast(run.device.type, torch.bfloat16, enabled=bf16),
        student_head=lambda hidden: head_logits(run.student, hidden, run.vocab_size) / args.temperature)
    return run

def rows_that_fit(run, args):
    """Rows to sample at once: all of a step; on a GPU those whose caches take half of what Adam leaves (our choice)."""
    columns = args.max_prompt_length + (args.cap_max if args.method == "prune" else args.max_new_tokens)
    free = torch.cuda.mem_get_info(run.device)[0] if run.device.type == "cuda" else math.inf
    rows = (free - 12 * run.student.num_parameters()) / (2 * run.token_bytes * columns)    # 12: gradient, two moments
    return int(max(1, min(args.batch_size * args.num_generations, rows)))

def preflight(run, args):
    """What to look at before a run is paid for, and what ruins runs in silence -> list of lines."""
    golds = [problem["answer"] for problem in run.answered[:500]]
    readable = sum(gold.isdigit() or ask_math_verify(gold, None) for gold in golds)
    prompts = [problem["prompt_ids"] for problem in draw_prompts(run, args, step=1)[::args.num_generations][:4]]
    out = rollout(run.sampler, run.teacher, prompts, max_length=32, overlap_k=args.overlap_k, **run.sampling)
    log_q = torch.cat(sampled_log_probs(run.teacher, out, run.vocab_size))
    sides = ("student", run.student, run.tokenizer), ("teacher", run.teacher, run.teacher_tokenizer)
    stops, templates = [sorted(stop_ids(*side[1:])) for side in sides], [side[2].chat_template for side in sides]
    lines = [f"method {args.method}; loss {args.loss} of KL(student || teacher), mean over the tokens of a step",
             f"data: {len(run.train)} training prompts, those that are too long left out; {readable} of the first "
             f"{len(golds)} answers can be read; first prompt: {run.tokenizer.decode(run.train[0]['prompt_ids'])!r}",
             f"first {len(log_q)} sampled tokens: teacher's mean log-prob {log_q.mean():.2f}, top-{args.overlap_k} "
             f"overlap {out['overlap'][out['response_mask']].mean().item():.2f}"]
    for (role, model, _), stop in zip(sides, stops):
        lines.append(f"{role}: {model.config.model_type}, {model.num_parameters() / 1e6:.1f}M parameters, "
                     f"{model.get_output_embeddings().weight.shape[0]} rows cut to {run.vocab_size}, stops at {stop}")
    found = {
        "the teacher finds what the student writes very unlikely; compare prompts and templates": log_q.mean() < -3,
        f"the student stops at {stops[0]}, the teacher at {stops[1]}; it may unlearn it": stops[0] != stops[1],
        "the chat templates differ; both models read the student's": templates[0] != templates[1]}
    return lines + [f"warning: {text}" for text, true in found.items() if true]

# ---- 13. Main. This, section 1, save_checkpoint, and read_data to preflight see the flags: no others
def draw_prompts(run, args, step):
    """This rank's share of the problems of a step, short prompts first, each num_generations times: row p * G + g."""
    edges = np.rint(np.cumsum([0, *(args.mix or [1])]) * args.batch_size).astype(int).tolist()   # to the nearest prompt
    drawn = [pool[index] for pool, first, last in zip(run.pools if args.mix else [run.train], edges, edges[1:])
             for index in batch_indices(step, last - first, len(pool), args.seed)]
    # model.generate draws from torch's global stream: seeded here, a step does not depend on what was drawn before
    torch.manual_seed((args.seed * 1_000_003 + step) * NUM_RANKS + RANK)
    own = sorted(drawn[RANK::NUM_RANKS], key=lambda problem: len(problem["prompt_ids"]))
    return [problem for problem in own for _ in range(args.num_generations)]

def cold_start_step(run, args, step):
    """A supervised step before OPD, on the teacher's own solutions that are right -> their share.  [Rethinking-OPD]"""
    run.phase = f"cold start, step {step}"
    problems = draw_prompts(run, args, step)
    out = rollout_in_groups(run.teacher, None, [problem["prompt_ids"] for problem in problems], **run.sampling,
                            rows_at_once=run.state["rollout_batch_size"], max_length=args.max_new_tokens)
    run.phase, mask, right = f"the update of cold start step {step}", out["response_mask"], out["ended"].clone()
    for row, gold in enumerate(problem["answer"] for problem in problems):
        text = run.tokenizer.decode(out["response_ids"][row][mask[row]], skip_special_tokens=True)
        right[row] &= gold is None or is_correct(text, gold)
    run.train_step(
        dict(out, loss_mask=mask & right[:, None], token_weight=mask.float(), teacher_hidden=mask[..., None]),
        learning_rate=args.cold_start_learning_rate, teacher_head=lambda states: states,     # nothing is asked of it
        token_loss=lambda student_logits, _, ids: F.cross_entropy(student_logits, ids, reduction="none"))
    rows = torch.stack([out["prompt_mask"].sum(-1), mask.sum(-1), right], dim=1)
    prompt, length, right = torch.cat(gather_from_ranks([rows.cpu()])).T
    run.state["cold_start_tokens"] += int(length.sum())
    run.state["flops"] += forward_flops(run.teacher, prompt + length)
    run.state["flops"] += 3 * forward_flops(run.student, (prompt + length)[right > 0])
    return right.double().mean().item()

def opd_step(run, args, step):
    """One step of any method: prompts, rollout, token weights, update, and for prune the next cap -> its metrics."""
    prompts = [problem["prompt_ids"] for problem in draw_prompts(run, args, args.cold_start_steps + step)]
    state, drift = run.state, (args.drift_threshold, args.w_drop)
    grown = horizon(step - 1, args.horizon_start, args.horizon_growth, args.horizon_every, args.max_new_tokens)
    row = {                        # what the methods differ in; the rest: loss mask, token weight, and the cap of prune
        "opd": dict(max_length=args.max_new_tokens),
        "prefix": dict(max_length=min(args.prefix_length, args.max_new_tokens)),
        "progressive": dict(max_length=grown),
        "prefix-guided": dict(max_length=args.max_new_tokens, select_at=args.prefix_length, select=args.select,
                              probe_window=args.probe_window, keep_ratio=args.keep_ratio),
        "prune": dict(max_length=state["cap"], drift=() if args.no_prune_in_flight else drift)}[args.method]
    run.phase, begin = f"the rollout of step {step}", clock(run.device)
    out = rollout_in_groups(run.sampler, run.teacher, prompts, state["rollout_batch_size"], **run.sampling, **row,
                            num_generations=args.num_generations, overlap_k=args.overlap_k)
    run.phase, sampled = f"the update of step {step}", clock(run.device)
    mask, overlap = out["response_mask"], out["overlap"]
    loss_mask, reliability = mask, drift_weights(overlap, mask, *drift)
    if args.method == "prefix-guided" and not args.train_pruned_prefix:
        loss_mask = mask & out["kept"][:, None]
    token_weight = reliability + args.w_base if args.method == "prune" else torch.ones_like(overlap)
    learning_rate = args.learning_rate * min(1, step / max(1, args.warmup_steps))
    update = run.train_step(
        dict(out, loss_mask=loss_mask, token_weight=token_weight), learning_rate=learning_rate,
        measure=lambda p, q, ids, log_prob: dict(alignment(p, q, None, args.overlap_k), sampling_mismatch=(
            p.log_softmax(-1).gather(-1, ids[:, None])[:, 0] - log_prob).abs()),
        teacher_head=lambda hidden: head_logits(run.teacher, hidden, run.vocab_size) / args.temperature,
        token_loss={"reverse_kl": lambda p, q, ids: reverse_kl(p, q),
                    "topk": lambda p, q, ids: reverse_kl_topk(p, q, args.overlap_k, args.support),
                    "sampled": lambda p, q, ids: reverse_kl_sampled(p, q, ids, args.baseline)}[args.loss])
    updated = clock(run.device)
    columns = [out["prompt_mask"].sum(-1), mask.sum(-1), loss_mask.sum(-1), reliable_length(reliability, mask),
               out["ended"], out["kept"], overlap.sum(-1),
               torch.tensor([repetition(ids[valid].tolist()) for ids, valid in zip(out["response_ids"], mask)])]
    rows = torch.stack([column.cpu().double() for column in columns], dim=1)         # (B, 8)
    prompt, length, trained, reliable, ended, kept, agreed, repeated = torch.cat(gather_from_ranks([rows])).T
    if args.method == "prune":
        state["cap"], state["misses"] = next_max_length(
            reliable, state["cap"], state["misses"], step=args.cap_step, margin=args.cap_margin,
            hit_ratio=args.cap_hit_ratio, patience=args.cap_patience, low=args.cap_min, high=args.cap_max)
    for name, count in (("generated", length), ("teacher", length), ("trained", trained)):
        state[f"{name}_tokens"] += int(count.sum())
    state["flops"] += forward_flops(run.student, prompt + length) + forward_flops(run.teacher, prompt + length)
    state["flops"] += 3 * forward_flops(run.student, (prompt + trained)[trained > 0])
    update["overlap_ratio"] = (agreed.sum() / length.sum()).item()    # of all that was sampled, not what is trained on
    return dict(step=step, **update, **state, max_length=row["max_length"], learning_rate=learning_rate,
                overlap_by_position=overlap_by_position(overlap, mask), response_length=length.mean().item(),
                reliable_length=reliable.mean().item(), truncated_fraction=1 - ended.mean().item(),
                kept_fraction=kept.mean().item(), repetition=repeated.mean().item(), time_update=updated - sampled,
                time_rollout=sampled - begin - out["teacher_seconds"], time_teacher=out["teacher_seconds"],
                time_validation=0.0, peak_memory_gb=torch.cuda.max_memory_allocated(run.device.index) / 2 ** 30)

def extrapolation_step(run, args):
    """Move the student on along its update since the last time, if that helps -> what it adds to the step's metrics."""
    run.phase, begin = "extrapolation", clock(run.device)
    law = dict(run.sampling, top_p=1.0, max_length=args.max_new_tokens)
    problems = random.Random(args.seed).sample(run.answered, args.validation_size)   # the same every time
    def validate(weights):
        run.sampler.load_state_dict(weights, strict=False)
        score, answers = evaluate(run.sampler, run.tokenizer, problems, num_samples=1, seed=args.seed,
                                  rows_per_batch=args.eval_batch_size, decoding=law)
        lengths = torch.tensor([[len(answer["prompt_ids"]), answer["length"]] for answer in answers])
        for name in ("validation_tokens", "generated_tokens"):                   # its samples are part of the price
            run.state[name] += int(lengths[:, 1].sum())
        run.state["flops"] += forward_flops(run.student, lengths.sum(-1))
        return score["avg_at_n"]
    run.anchor, tried, scores = extrapolate(movable_weights(run.student), run.anchor, validate)
    for model in (run.student, run.sampler):                  # what was accepted: the next anchor
        model.load_state_dict(run.anchor, strict=False)
    return dict(run.state, extrapolation_k=tried, validation_scores=scores, time_validation=clock(run.device) - begin)

def open_run(args):
    """What the flags name, and the files in --output_dir -> run: new, what an earlier run left renamed to .old; or
    with --resume as a checkpoint left it, metrics.jsonl and samples.jsonl included."""
    flags, folder = dict(vars(args), processes=NUM_RANKS), args.resume
    counts = dict(generated_tokens=0, teacher_tokens=0, trained_tokens=0, validation_tokens=0, cold_start_tokens=0)
    saved = dict(step=0, graded=0, anchor={}, state=dict(cap=args.cap_init, misses=0, **counts, flops=0.0))
    if folder == "latest":
        folder = (list_checkpoints(args.output_dir) or [None])[-1]
        if not folder:
            warnings.warn(f"no checkpoint in {args.output_dir} to resume: the run starts at its first step")
    if folder:
        try:
            saved = torch.load(os.path.join(folder, "trainer_state.pt"), map_location="cpu", weights_only=True)
        except Exception as error:        # of a torn file, or another one: errors of torch, pickle and zip
            raise ValueError(f"--resume {folder} is no whole checkpoint: {error}") from None
        free = ("resume output_dir max_steps max_generated_tokens save_every keep_checkpoints device micro_batch_size "
                "report_to print_samples eval_batch_size rollout_batch_size").split()        # the last two draw anew
        changed = [f"--{name} was {saved['flags'].get(name)} and is {value}" for name, value in flags.items()
                   if name not in free and saved["flags"].get(name) != value]
        if changed:
            raise ValueError(f"--resume {folder} would be another run: {'; '.join(changed)}")
    if not args.student:
        torch.set_num_threads(1)                              # tensors this small gain next to nothing from more
        transformers.utils.logging.disable_progress_bar()
        world = os.path.join(args.output_dir, "world")
        if RANK == 0 and not os.path.exists(world):
            os.makedirs(args.output_dir, exist_ok=True)       # if it cannot be, better now than after a minute
            make_world(world, args.seed)
        gather_from_ranks([])                                 # the other processes wait for it
        args.student, args.teacher, args.train_file, args.eval_file = (
            f"{world}/student", f"{world}/teacher", [f"{world}/train.jsonl"], [f"{world}/eval.jsonl"])
    run = read_inputs(args, folder)
    track = open_tracker("none" if RANK else args.report_to, args.output_dir, flags, saved["step"] + 1 if folder else 0)
    def record(metrics):
        RANK or append_json(run.files[0], {"step": run.step, **metrics})
        track({name: value for name, value in metrics.items() if type(value) in (int, float)}, run.step)
    run.optimizer.load_state_dict(saved.pop("optimizer", run.optimizer.state_dict()))
    vars(run).update(saved, flags=flags, phase="set-up", halfway=False, stopped=None, record=record, track=track)
    rows = args.rollout_batch_size or run.state.get("rollout_batch_size") or rows_that_fit(run, args)
    run.state["rollout_batch_size"] = min(gather_from_ranks([rows]))
    run.files = [os.path.join(args.output_dir, name) for name in ("metrics.jsonl", "samples.jsonl")]
    RANK or os.makedirs(args.output_dir, exist_ok=True)
    if RANK == 0 and not args.eval_only:
        later = [path for path in list_checkpoints(args.output_dir) if int(path.rsplit("-", 1)[1]) > run.step
                 or not os.path.samefile(os.path.join(folder, ".."), args.output_dir)]               # or of another run
        for path in filter(os.path.exists, later + run.files):
            shutil.rmtree(f"{path}.old", ignore_errors=True)
            os.replace(path, f"{path}.old")
        for path in run.files:
            shutil.copy(os.path.join(folder, os.path.basename(path)), path) if folder else open(path, "w").close()
    return run

def grade(run, args, who):
    """Evaluate a model on every --eval_file; the results go to the screen and into metrics.jsonl and samples.jsonl."""
    run.phase, began, results, given = f"evaluation after step {run.step}", clock(run.device), {}, []
    model, tokenizer = (run.teacher, run.teacher_tokenizer) if who == "teacher" else (run.sampler, run.tokenizer)
    law = dict(run.sampling, temperature=args.eval_temperature, top_p=args.eval_top_p,
               max_length=args.eval_max_new_tokens, eos_ids=run.sampling["eos_ids"] | stop_ids(model, tokenizer))
    for name, problems in run.eval.items():
        judge = None if who in ("teacher", "eval_only") else run.teacher
        how = dict(tokenizer=run.tokenizer, seed=args.seed, rows_per_batch=args.eval_batch_size, title=f"{who}, {name}")
        result, answers = evaluate(
            model, problems=problems, num_samples=args.eval_samples, decoding=law, teacher=judge, **how)
        for depth in args.probe_depths if judge else ():      # how much more often the teacher ends right from there
            begun = [dict(answer, begun=answer["response_ids"][:answer["length"] * depth // 100]) for answer in answers]
            onward = dict(law, eos_ids=law["eos_ids"] | stop_ids(judge, run.teacher_tokenizer),
                          max_length=law["max_length"] - law["max_length"] * depth // 100)      # not more in all
            ended, _ = evaluate(judge, problems=begun, num_samples=1, decoding=onward, **how)
            result[f"advantage_from_{depth}"] = ended["avg_at_n"] - result["avg_at_n"]
        tqdm.write(f"{who} on {name}, step {run.step}: " + ", ".join(f"{k} {round(v, 3)}" for k, v in result.items()))
        args.print_samples and tqdm.write(answers[0]["response"])
        run.track({f"{who}/{name}/{key}": value for key, value in result.items()}, run.step)
        results[name] = result
        given += [{"step": run.step, "model": who, "eval": name, **answer} for answer in answers]
    for answer in given:                                      # at the end: what is broken off is done again on resume
        RANK or append_json(run.files[1], {key: answer[key] for key in answer if not key.endswith("_ids")})
    run.record({"model": who, "eval": results, "time_eval": clock(run.device) - began, "thinking": args.enable_thinking,
                "prompt_template": args.prompt_template, **run.state})
    run.graded = run.step                                     # others than the student are graded at step 0 only
    return results

def read_run(root, name):
    """Whole lines of metrics.jsonl -> {"name", "group": without seed, "pair": (seed, *files), "first", "last", "evals",
    "scores": {who: (accuracy, its error)}, "final": {file: results}, "curve": {step: (tokens, seconds, accuracy)}}."""
    with open(os.path.join(root, name, "metrics.jsonl"), encoding="utf-8") as file:
        records = [json.loads(line) for line in file if line.endswith("\n") and line.rfind('{"step"') == 0]
    steps = [record for record in records if "overlap_by_position" in record]
    seconds = np.cumsum([0, *(sum(step[key] for key in step if key.startswith("time_")) for step in steps)])   # by step
    last = dict(*steps[-1:], rollout_seconds=sum(step["time_rollout"] for step in steps), seconds=seconds[-1])
    evals = [record for record in records if record.get("eval") and record["model"] != "eval_only"]
    for record in evals:
        values, errors = np.array([(result["avg_at_n"], result["se"]) for result in record["eval"].values()], float).T
        record["mean"] = values.mean(), np.linalg.norm(errors) / len(errors)       # over the files
    teacher, student = ([record for record in evals if record["model"] == who] for who in ("teacher", "student"))
    parts = {"teacher": teacher, "before": student[:1], "after": student[1:]}
    scores = {label: record["mean"] for label, part in parts.items() for record in part}         # the last of each
    final = student[-1]["eval"] if "after" in scores else {}
    scores |= {f"after {file}": (final[file]["avg_at_n"], final[file]["se"]) for file in final if len(final) > 1}
    curve = {one["step"]: (one.get("generated_tokens", 0), seconds[one["step"]], one["mean"][0]) for one in student}
    group, seed = re.fullmatch(r"(.*?)(?:[/_-]?seed[_-]?(\d+))?", name).groups()
    return dict(name=name, group=group or ".", pair=(seed, *sorted(final)), first=dict(*steps[:1]), last=last,
                evals=evals, scores=scores, final=final, curve=curve)

def report_table(runs):
    """Runs, as read_run gives them -> lines: a row per group of runs; of a single group a line per fact."""
    def percent(scores, sign=""):                             # (accuracy, its error) of each seed -> mean ± error
        values, errors = np.array(scores, float).T
        error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else errors[0]
        return f"{100 * values.mean():{sign}.1f}" + (f"±{100 * error:.1f}" if np.isfinite(error) else "")
    def mean(group, key, step="last"):
        return np.array([run[step].get(key) for run in group], float).mean()
    names = sorted({run["group"] for run in runs}, key=lambda name: (name.split("/")[-1] != "opd", name))
    groups = {name: [run for run in runs if run["group"] == name] for name in names}
    baseline, rows = groups[names[0]], []
    base = {run["pair"]: run["scores"]["after"][0] for run in baseline if "after" in run["scores"]}
    for name, group in groups.items():
        row = {"": name, "runs": f"{len(group)}"}
        for label in ("teacher", "before", "after", *(label for run in runs for label in run["scores"])):
            scores = [run["scores"][label] for run in group if label in run["scores"]]
            row[label] = percent(scores) if scores else "-"
        pairs = [(run["scores"]["after"][0] - base[run["pair"]], math.nan) for run in group if run["pair"] in base]
        row[f"minus {names[0]}"] = percent(pairs, "+") if pairs and name != names[0] else ""
        known = [[run["scores"][who][0] for who in ("teacher", "before", "after")] for run in group if run["final"]]
        gaps = [(after - before) / (teacher - before) for teacher, before, after in known if teacher > before]
        row["gap"] = "-" if not known else "no gap" if len(gaps) < len(known) else f"{np.mean(gaps):.0%}"
        row["overlap"] = f"{mean(group, 'overlap_ratio', 'first'):.2f}->{mean(group, 'overlap_ratio'):.2f}"
        row["entropies"] = f"{mean(group, 'entropy_student'):.2f} {mean(group, 'entropy_teacher'):.2f}"
        for label, key in {"generated": "generated_tokens", "scored": "teacher_tokens", "trained": "trained_tokens",
                           "FLOPs": "flops", "rollout s": "rollout_seconds", "all s": "seconds"}.items():
            own, other = mean(group, key), mean(baseline, key)
            row[label] = tqdm.format_sizeof(own) + (f" {own / other:.2f}x" if other and len(groups) > 1 else "")
        graded = [sum(item.get("time_eval", 0) for item in run["evals"]) for run in group]
        row["eval s"] = tqdm.format_sizeof(np.mean(graded))
        rows.append(row)
    notes = ["accuracy in %, ±: standard error over seeds, of a single run over problems; entropies: student teacher"]
    if len(rows) == 1:
        return [f"{label:<32}{text:>20}" for label, text in rows[0].items() if text] + notes
    rows.insert(0, {label: label for label in rows[0]})
    widths = {label: max(len(row[label]) for row in rows) for label in rows[0]}
    return ["  ".join(f"{row[label]:>{width}}" for label, width in widths.items()) for row in rows] + notes

def draw_report(runs):
    """Draw accuracy against tokens and against seconds, and overlap by position, a colour per group -> the figure."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    by_tokens, by_position, by_seconds = figure.subplots(1, 3)
    by_tokens.set_xscale("log", nonpositive="mask")           # no place for 0 tokens, before the first step
    by_tokens.tick_params("x", which="both", labelsize=7, labelrotation=45)
    for axes, xlabel in ((by_tokens, "generated tokens"), (by_seconds, "seconds of training")):
        axes.set(xlabel=xlabel, ylabel="accuracy (band: lowest to highest seed)")
    by_position.set(xlabel="start to end of the longest response", ylabel="overlap (dotted: first step)", ylim=(0, 1))
    for index, name in enumerate(sorted({run["group"] for run in runs})):
        group, color = [run for run in runs if run["group"] == name], f"C{index % 10}"
        for step, style, label in (("first", ":", None), ("last", "-", name)):
            overlap = np.array([run[step]["overlap_by_position"] for run in group], float)
            by_position.plot(np.ma.masked_invalid(overlap).mean(0), color + style, label=label)
        curves = [run["curve"] for run in group if run["curve"]]
        common = sorted(set(*curves[:1]).intersection(*curves))                    # where all seeds were graded
        for axes, cost in ((by_tokens, 0), (by_seconds, 1)) if any(common) else ():
            x, accuracy = np.array([[(curve[step][cost], curve[step][2]) for curve in curves] for step in common]).T
            axes.plot(x.mean(0), accuracy.mean(0), color + "o-", markersize=4)
            axes.fill_between(x.mean(0), accuracy.min(0), accuracy.max(0), color=color, alpha=0.15)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8)
    return figure

def main(argv=None):
    """Run the job that the flags describe -> dict of the final metrics. A user's mistake: one line, exit status 2."""
    warnings.formatwarning = lambda message, *_: f"note: {message}\n"
    transformers.utils.logging.set_verbosity_error()
    run = None
    def stop(number=None, _=None):        # a signal stops at once; during an update it waits for the call at the end
        run.stopped, run.halfway = number or run.stopped, run.halfway if number else False
        if run.stopped and not run.halfway:
            raise KeyboardInterrupt
    try:
        args = parse_args(argv)
        if args.report:
            paths = sorted(glob.glob("**/metrics.jsonl", root_dir=args.report, recursive=True))
            runs = [read_run(args.report, os.path.dirname(path)) for path in paths if "checkpoint-" not in path]
            if not (runs := [run for run in runs if run["first"]]):
                raise ValueError(f"--report {args.report}: no run below it has a metrics.jsonl with steps")
            print("\n".join(report_table(runs)))
            draw_report(runs).savefig(os.path.join(args.report, "report.png"), dpi=110)
            return {run["name"]: run["final"] for run in runs}
        if NUM_RANKS > 1 and not dist.is_initialized():
            if "cuda" in args.device:
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if "cuda" in args.device else "gloo", timeout=datetime.timedelta(hours=2))
        sys.stdout = open(os.devnull, "w") if RANK else sys.stdout               # one process speaks for all
        run = open_run(args)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        if args.eval_only:
            return grade(run, args, "eval_only")
        if run.step == 0:
            print("\n".join(preflight(run, args)), flush=True)
            grade(run, args, "teacher")
            grade(run, args, "student")
            for step in range(args.cold_start_steps):
                tqdm.write(f"cold start: {cold_start_step(run, args, step + 1):.0%} of the solutions are right")
                stop()
            args.cold_start_steps and grade(run, args, "cold_start")
            run.anchor = movable_weights(run.student) if args.extrapolate else {}    # OPD's update begins here
        for step in tqdm(range(run.step, args.max_steps + 1), desc="train", leave=False, disable=RANK > 0):
            done = step == args.max_steps or 0 < args.max_generated_tokens <= run.state["generated_tokens"]
            if step > run.graded and (done or step % (args.eval_every or args.max_steps) == 0):
                grade(run, args, "student")
            if step and (done or step % (args.save_every or args.max_steps) == 0):
                save_checkpoint(run, args)
            if done:
                break
            metrics = opd_step(run, args, step + 1)
            if args.extrapolate and (step + 1) & step == 0:
                metrics.update(extrapolation_step(run, args))
            run.step = step + 1
            run.record(metrics)
            tqdm.write("step {step:5} | loss {loss:8.4f} | kl {reverse_kl:7.4f} | overlap {overlap_ratio:.3f} | kept "
                       "{kept_fraction:4.0%} | length {response_length:7.1f} | cut {truncated_fraction:4.0%} | norm "
                       "{grad_norm:6.2f} | {generated_tokens:11,} tokens".format(**metrics))
            stop()
    except (Exception, KeyboardInterrupt) as error:
        told, status = explain(error, run)
        if run and run.step:
            if not run.halfway:
                run.halfway = True                            # a second signal does not break off the saving
                with contextlib.suppress(OSError):
                    save_checkpoint(run, args)
            told += told and f"; last checkpoint: {(list_checkpoints(args.output_dir) or ['none'])[-1]}"
        if not told:
            raise
        print(f"opd.py: {told}", file=sys.stderr)
        raise SystemExit(status) from None
    if RANK:
        return run.state
    ended, checkpoint = read_run("", args.output_dir), (list_checkpoints(args.output_dir) or ["none"])[-1]
    print(*report_table([ended]), f"checkpoint in {checkpoint}", sep="\n")
    return dict(run.state, checkpoint=checkpoint, **ended)

if __name__ == "__main__":
    main()
