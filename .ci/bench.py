"""
Time and memory of opd.py, compared with the plainest way to do the same: one model.generate for all
rows, or the logits of all tokens of both models at once and autograd through them.

    .venv/bin/python .ci/bench.py

The models are random; nothing is downloaded.
"""

import contextlib
import copy
import ctypes
import functools
import math
import os
import random
import statistics
import sys
import time
from dataclasses import dataclass
from unittest import mock

import torch
import transformers

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import opd

PAD = 0
CANDIDATES = 4  # per prompt
REPEATS = {"cpu": 5, "cuda": 2}  # of every job; times vary less on a GPU
TOP_K = 16

# --------------------------------------------------------------------------------------------------
# What is measured: sizes, models, prompts


@dataclass
class Sizes:
    device: str
    dtype: torch.dtype
    vocabulary: int
    prompts: int  # with CANDIDATES rows each
    prompt_length: int  # at most
    tokens: int  # of the longest response
    scale_rows: int  # of the smallest step in growth_lines
    student: dict
    teacher: dict
    update_width: int  # hidden size of both models in the update
    update_vocabularies: tuple = (32_000, 151_936)
    chunk_rows: tuple = ((102, 24), (151_936, 1))  # vocabulary, rows of 256 tokens

    @property
    def rows(self):
        return CANDIDATES * self.prompts


# 512 rows of wide, shallow models. Even so, half of the rows take more than half the time (a line
# of the table shows it). Prompts are much shorter than responses, as in a real run: no method saves
# their cost
CPU = Sizes(
    device="cpu",
    dtype=torch.float32,
    vocabulary=2048,
    prompts=128,
    prompt_length=2,
    tokens=32,
    scale_rows=16,
    student=dict(
        hidden_size=384,
        intermediate_size=1152,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=64,
    ),
    teacher=dict(
        hidden_size=384,
        intermediate_size=1152,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=64,
    ),
    update_width=64,
)

# The shapes of Qwen3-1.7B and Qwen3-4B
CUDA = Sizes(
    device="cuda",
    dtype=torch.bfloat16,
    vocabulary=151_936,
    prompts=32,
    prompt_length=128,
    tokens=256,
    scale_rows=32,
    student=dict(
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
    ),
    teacher=dict(
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    ),
    update_width=2048,
)


def random_model(seed, vocabulary, dtype=torch.float32, **size):
    """A random Qwen3."""
    torch.manual_seed(seed)
    config = transformers.Qwen3Config(
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        **size,
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@torch.no_grad()
def countdown(seed, vocabulary, drifts=False, device="cpu", **size):
    """
    A random model that continues the token n with n - 1, n - 2, ... down to 0: the last token of a
    prompt sets the length of its response, whoever samples it and whatever else is in the batch.
    drifts: not in the upper half of the vocabulary, where a model without it counts down to V / 2.
    """
    with torch.device(device):
        model = random_model(seed, vocabulary, **size)
        embedding = model.get_input_embeddings().weight.normal_()
        # The residual stream is mostly the embedding: the head's row that equals it wins by far
        model.get_output_embeddings().weight.copy_(embedding.roll(-1, 0))
        if drifts:
            embedding[vocabulary // 2 :].normal_()
    return model


def bench_prompts(lengths, vocabulary, longest, drifts=False):
    """Prompts whose responses get these lengths; drifts: every other one ends in the upper half."""
    rng = random.Random(0)
    prompts = []
    for row, length in enumerate(lengths):
        before = rng.randint(longest // 2, longest) - 1
        prompt = [rng.randrange(2, vocabulary) for _ in range(before)]
        upper_half = vocabulary // 2 if drifts and row % 2 else 0
        prompts.append([*prompt, int(length) + upper_half])
    return prompts


def skewed(rows, longest):
    """Response lengths as in reasoning: most are short; the mean is a quarter of the longest."""
    share = torch.arange(1, rows + 1) / rows
    return (longest * share**3).round().clamp(min=1).long()


@dataclass
class Subject:
    """Two countdown models, the sizes, and the speed of the machine."""

    sizes: Sizes
    bandwidth: float  # bytes per second, of a copy
    operations: float  # per second, of a matrix product

    def __post_init__(self):
        sizes = self.sizes
        place = {"device": sizes.device, "dtype": sizes.dtype}
        self.student = countdown(1, sizes.vocabulary, **place, **sizes.student)
        self.teacher = countdown(2, sizes.vocabulary, True, **place, **sizes.teacher)
        self.eos_ids = {0, sizes.vocabulary // 2}
        self.law = {"vocab_size": sizes.vocabulary, "eos_ids": self.eos_ids, "pad_id": PAD}

    def plan(self, segments=4, **who_goes_on):
        """Four segments, as 512 of 2,048: in shorter ones the overhead of generate would show."""
        tokens = self.sizes.tokens
        return opd.Plan(tokens, tokens // segments, **who_goes_on)

    def prompts(self, lengths):
        return bench_prompts(lengths, self.sizes.vocabulary, self.sizes.prompt_length, drifts=True)

    def guided(self):
        """Half of the rows go on after a quarter of the tokens."""
        quarter = self.sizes.tokens // 4
        rule = functools.partial(
            opd.best_prefixes,
            at=quarter,
            num_generations=CANDIDATES,
            keep_ratio=0.5,
            probe_window=self.sizes.tokens // 16,
        )
        return self.plan(look_at=quarter, goes_on=rule)

    def prune(self):
        """The half that drifts is unreliable after an eighth of the tokens, and stops at 1/4."""

        def still_reliable(length, overlap, mask, ended):
            w_drop = 8 / self.sizes.tokens
            return opd.drift_weights(overlap, mask, 1 / 32, w_drop)[:, -1] > 1e-8

        return self.plan(goes_on=still_reliable)

    def sampling_floor(self, prompt, lengths):
        """
        The least seconds in which any program can sample rows with prompts and responses of these
        lengths: every step reads all weights, and the keys and values of the rows that still run.
        """
        config, embedding = self.student.config, self.student.get_input_embeddings().weight
        of_a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        weights = self.student.num_parameters() - embedding.numel()  # those are looked up
        numbers = weights * int(lengths.max())
        numbers += of_a_token * int((prompt * lengths + lengths**2 / 2).sum())
        read = numbers * embedding.element_size() / self.bandwidth
        return max(read, self.forward_floor(self.student, prompt + lengths))

    def forward_floor(self, model, lengths):
        """The least seconds in which any program can run a forward over rows of these lengths."""
        embedding = model.get_input_embeddings().weight  # looked up, not multiplied
        operations = opd.forward_flops(model, lengths) - 2 * embedding.numel() * int(lengths.sum())
        return operations / self.operations


# --------------------------------------------------------------------------------------------------
# How it is measured


def median(numbers):
    return statistics.median(torch.as_tensor(numbers).flatten().tolist())


def in_turns(jobs, device="cpu", repeats=None):
    """
    Run the jobs in turns, so that other load on the machine hits all of them alike; the first turn
    is a warm-up -> {job: {"seconds": (repeats,), and the same for all that the job returns}}
    """
    repeats = repeats or REPEATS[device]
    told = {name: [] for name in jobs}
    for turn in range(repeats + 1):
        for name, job in jobs.items():
            began = opd.clock(torch.device(device))
            result = job()
            seconds = opd.clock(torch.device(device)) - began
            if turn:
                told[name].append({**(result or {}), "seconds": seconds})
    seen = {}
    for name, turns in told.items():
        seen[name] = {}
        for key in turns[0]:
            seen[name][key] = torch.tensor([turn[key] for turn in turns]).double()
    return seen


def resident(name):
    """A line of /proc/self/status, such as VmRSS, in bytes."""
    with open("/proc/self/status") as file:
        lines = [line.split() for line in file if line.startswith(name)]
    return int(lines[0][1]) * 1024


def peak_bytes(job, device="cpu"):
    """The peak memory of a job above what was held before; NaN if that cannot be measured."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job()
        return torch.cuda.max_memory_allocated() - before
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**20)  # M_MMAP_THRESHOLD: freed memory goes back to Linux at once
        libc.malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets the peak
        before = resident("VmRSS")
        job()
        return resident("VmHWM") - before
    except (OSError, AttributeError):
        return math.nan


@contextlib.contextmanager
def tokens_computed(model):
    """A list that gets the number of tokens of every forward of a model."""
    counted = []

    def count(module, args, kwargs):
        counted.append(kwargs["input_ids"].numel())

    hook = model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield counted
    finally:
        hook.remove()


@contextlib.contextmanager
def seconds_of(teacher):
    """A list that gets the seconds of every forward and head of a teacher in a rollout."""
    spent = []

    def timed(function):
        def inner(model, hidden, *others, **settings):
            began = opd.clock(hidden.device)
            result = function(model, hidden, *others, **settings)
            if model is teacher:
                spent.append(opd.clock(hidden.device) - began)
            return result

        return inner

    forward = mock.patch.object(opd, "hidden_states", timed(opd.hidden_states))
    head = mock.patch.object(opd, "head_logits", timed(opd.head_logits))
    with forward, head:
        yield spent


def exponent(sizes, seconds):
    """The b of seconds = a * sizes ** b, fitted on logarithms."""
    x = torch.tensor(sizes).double().log()
    y = torch.tensor(seconds).double().log()
    x = x - x.mean()
    return ((x * (y - y.mean())).sum() / x.square().sum()).item()


def line(name, ours, baseline, unit=" s", floor=math.nan, value=None, most=None, least=None):
    """
    One line of the table: medians over the turns (n,), also of the ratio, taken turn by turn. The
    target limits the ratio, or value if there is one; value may also be a text, without a limit.
    """
    ratio = median(ours / baseline)
    judged = ratio
    target = ""
    if isinstance(value, str):
        target = value
    elif value is not None:
        judged = median(value)
        target = f"{judged:.2f}"
    if most is not None or least is not None:
        sign, holds = f"<= {most}", judged <= (most or 0)
        if most is None:
            sign, holds = f">= {least}", judged >= least
        verdict = "holds" if holds else "MISSED"
        target = f"{target} {sign}: {'not measured' if math.isnan(judged) else verdict}".strip()

    def show(number):
        return f"{number:.3g}{unit}" if unit else f"{number:,.0f}"

    return {
        "line": name,
        "ours": show(median(ours)),
        "baseline": show(median(baseline)),
        "ratio": f"{ratio:.3f}",
        "floor": "" if math.isnan(floor) else f"{median(ours) / floor:.1f}x",
        "target": target,
    }


NOTES = """
After the semicolon: the baseline. Floor: the time as a multiple of what reading the bytes at the
speed of a copy, or computing at that of a matrix product, would take. A number before a target:
times faster (skewed), time saved / tokens saved (half, guided, prune), the exponent (8 times).
Medians of 5 turns, on a GPU of 2; memory is measured once.
"""


def bench_table(rows):
    """Dicts of texts -> the lines of a table, the first of which has the names."""
    rows = [{name: name for name in rows[0]}, *rows]
    widths = {}
    for name in rows[0]:
        widths[name] = max(len(row[name]) for row in rows)
    lines = []
    for row in rows:
        cells = []
        for name, text in row.items():
            left = name in ("line", "target")
            cells.append(text.ljust(widths[name]) if left else text.rjust(widths[name]))
        lines.append("  ".join(cells).rstrip())
    return lines


def machine_name(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = f"{torch.get_num_threads()} threads of a CPU"
    with contextlib.suppress(OSError, IndexError), open("/proc/cpuinfo") as file:
        models = [row.split(":")[1].rstrip() for row in file if row.startswith("model name")]
        name += models[0]
    return name


def machine_rates(device):
    """-> bytes per second of a copy, operations per second of a matrix product"""
    dtype, side = (torch.bfloat16, 8192) if device == "cuda" else (torch.float32, 2048)
    a = torch.ones(side, side, device=device, dtype=dtype)
    product = torch.empty_like(a)
    wide = torch.ones(64 * side, side // 2, device=device, dtype=dtype)  # larger than any cache
    copied = torch.empty_like(wide)

    def copy_it():
        copied.copy_(wide)

    def multiply():
        torch.mm(a, a, out=product)

    seen = in_turns({"copy": copy_it, "product": multiply}, device)
    bandwidth = 2 * wide.numel() * wide.element_size() / median(seen["copy"]["seconds"])
    return bandwidth, 2 * side**3 / median(seen["product"]["seconds"])


# --------------------------------------------------------------------------------------------------
# Rollouts


def plain_generate(model, ids, mask, eos_ids, length):
    """One uninterrupted model.generate, with its own cache -> (B, T)"""
    config = transformers.GenerationConfig(
        max_new_tokens=length,
        eos_token_id=sorted(eos_ids),
        pad_token_id=PAD,
        do_sample=True,
        top_k=0,
    )
    ids_and_response = model.generate(ids, attention_mask=mask.long(), generation_config=config)
    return ids_and_response[:, ids.shape[1] :]


def generate_job(subject, prompts):
    ids, mask = (part.to(subject.sizes.device) for part in opd.pad_left(prompts, PAD))

    def job():
        response = plain_generate(subject.student, ids, mask, subject.eos_ids, subject.sizes.tokens)
        return {"tokens": int(opd.mask_through_eos(response, subject.eos_ids).sum())}

    return job


def rollout_job(subject, prompts, plan, teacher=None):
    """A job. teacher_pass: the seconds of the teacher's forward and head alone."""
    top_k = TOP_K if teacher else 0

    def job():
        with seconds_of(teacher) as spent, tokens_computed(subject.student) as computed:
            out = opd.rollout(
                subject.student, teacher, prompts, plan, overlap_k=top_k, **subject.law
            )
        return {
            "tokens": int(out["response_mask"].sum()),
            "computed": sum(computed),
            "teacher_pass": sum(spent),
        }

    return job


def rollout_lines(subject):
    """Sampling alone, then with the rules of prefix-guided OPD and of Prune-OPD."""
    tokens, rows = subject.sizes.tokens, subject.sizes.rows
    lengths = {"equal": torch.full((rows,), tokens), "skewed": skewed(rows, tokens)}
    equal = subject.prompts(lengths["equal"])
    uneven = subject.prompts(lengths["skewed"])
    jobs = {  # jobs that are compared run close together
        "prune": rollout_job(subject, equal, subject.prune(), subject.teacher),
        "generate equal": generate_job(subject, equal),
        "equal": rollout_job(subject, equal, subject.plan()),
        "generate half": generate_job(subject, equal[::2]),
        "guided": rollout_job(subject, equal, subject.guided(), subject.teacher),
        "unprobed": rollout_job(subject, equal, subject.guided()),
        "generate skewed": generate_job(subject, uneven),
        "skewed": rollout_job(subject, uneven, subject.plan(segments=8)),
    }
    seen = in_turns(jobs, subject.sizes.device)

    table = []
    for name, prompts in (("equal", equal), ("skewed", uneven)):
        ours, plain = seen[name], seen[f"generate {name}"]
        # Both sides sampled the lengths that the prompts set
        total = int(lengths[name].sum())
        assert {*ours["tokens"].tolist(), *plain["tokens"].tolist()} == {total}
        target = {"most": 1.05}
        if name == "skewed":
            target = {"value": plain["seconds"] / ours["seconds"], "least": 2}
        prompt = torch.tensor([len(prompt) for prompt in prompts])
        target["floor"] = subject.sampling_floor(prompt, lengths[name])
        name = f"rollout, {name} lengths; generate"
        table.append(line(name, ours["seconds"], plain["seconds"], **target))
    return table + selection_lines(seen, total_tokens=rows * tokens)


def selection_lines(seen, total_tokens):
    """What is saved if half of the rows stop after a quarter, and what choosing them costs."""
    assert {*seen["unprobed"]["tokens"].tolist()} == {total_tokens * 5 // 8}
    assert {*seen["prune"]["tokens"].tolist()} == {total_tokens * 5 // 8}
    whole, plain = seen["generate equal"]["seconds"], seen["unprobed"]["seconds"]
    # The probe has a line of its own. Guided rollouts can run without it; prune cannot, so the
    # probe's seconds there are subtracted: both score as many tokens
    probe = seen["guided"]["seconds"] - seen["guided"]["teacher_pass"] - plain
    pruned = seen["prune"]["seconds"] - seen["prune"]["teacher_pass"]
    compared = (
        ("half of the rows by generate; generate", 1 / 2, seen["generate half"]["seconds"], None),
        ("guided, .625 of the tokens; generate", 3 / 8, plain, 0.85),
        ("prune, .625, with the probe; generate", 3 / 8, pruned, None),
        ("    without; generate", 3 / 8, pruned - probe, 0.85),
    )
    table = []
    for name, fewer, seconds, least in compared:
        saved = (1 - seconds / whole) / fewer
        table.append(line(name, seconds, whole, value=saved, least=least))
    table.append(line("probe: top k of both, compared; guided", probe, plain, most=0.1))
    table.append(line("teacher's scoring; guided", seen["guided"]["teacher_pass"], plain))
    return table


def prompt_lines(subject):
    """Rollouts of prompts as long as the responses, prefilled once, or once per candidate."""
    length, count = subject.sizes.tokens, max(1, subject.sizes.prompts // 4)
    rng = random.Random(0)
    shared, own = [], []
    for prompt in range(count):
        ids = [rng.randrange(2, subject.sizes.vocabulary) for _ in range(length - 2)]
        for candidate in range(CANDIDATES):
            shared.append([prompt, *ids, length])
            # Another first token makes every candidate a prompt of its own
            own.append([prompt * CANDIDATES + candidate, *ids, length])
    jobs = {}
    for name, prompts in (("once", shared), ("each", own)):
        jobs[name] = rollout_job(subject, prompts, subject.plan(), subject.teacher)
    seen = in_turns(jobs, subject.sizes.device)

    once, each = seen["once"], seen["each"]
    assert once["tokens"].tolist() == each["tokens"].tolist()
    # The last column of a prompt is computed with the response
    copies = (CANDIDATES - 1) * count * (length - 1)
    assert {*(each["computed"] - once["computed"]).tolist()} == {copies}
    name = f"rollout, prompts of {length}, once; for each"
    saved = f"{1 - median(once['seconds'] / each['seconds']):.0%} saved"
    return [line(name, once["seconds"], each["seconds"], value=saved)]


# --------------------------------------------------------------------------------------------------
# Updates


def full_logits_step(
    student,
    optimizer,
    batch,
    learning_rate,
    max_grad_norm=1.0,
    *,
    student_head,
    teacher_head,
    token_loss,
    measure,
    **_,
):
    """What train_step computes, the plain way: all logits at once, one loss, one backward."""
    learned, T = batch["loss_mask"], batch["loss_mask"].shape[1]
    ids = torch.cat([batch["prompt_ids"], batch["response_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["response_mask"]], dim=1)
    teacher_hidden = []
    for states, row, valid in zip(batch["teacher_hidden"], learned, batch["response_mask"]):
        teacher_hidden.append(states[row[valid]])
    optimizer.zero_grad(set_to_none=True)
    student_logits = student_head(opd.hidden_states(student, ids, mask, T)[learned])  # (N, V)
    with torch.no_grad():
        teacher_logits = teacher_head(torch.cat(teacher_hidden))  # (N, V)
    response_ids = batch["response_ids"][learned]
    losses = token_loss(student_logits, teacher_logits, response_ids)
    loss = (losses * batch["token_weight"][learned]).sum() / learned.sum()
    loss.backward()
    with torch.no_grad():
        log_probs = batch["log_probs"][learned]
        measured = measure(student_logits, teacher_logits, response_ids, log_probs)
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), max_grad_norm).item()
    optimizer.param_groups[0]["lr"] = learning_rate
    optimizer.step()
    means = {name: value.nanmean().item() for name, value in measured.items()}
    return {"loss": loss.item(), "grad_norm": norm, "num_tokens": int(learned.sum()), **means}


def update_settings(student, teacher, vocabulary, loss, rows, autocast=None):
    """The settings that a run with these flags passes to the update."""
    config = opd.Config(loss=loss, overlap_k=TOP_K, micro_batch_size=rows)
    run = opd.Run({}, [], student=student, teacher=teacher, vocab_size=vocabulary)
    run.autocast, run.sampling = autocast, {"vocab_size": vocabulary}
    run.rows_at_once = {"micro_batch_size": rows}
    return opd.update_settings(config, run)


def made_up_update(vocabulary, width, device="cpu", rows=8, tokens=256, loss="reverse_kl"):
    """Random models and a random batch -> (student, optimizer, batch, learning rate), settings"""
    size = dict(
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.1,
    )
    student = random_model(1, vocabulary, **size).to(device)
    teacher = random_model(2, vocabulary, **size).to(device)
    rng = random.Random(0)
    prompts = []
    for _ in range(rows):
        prompts.append([rng.randrange(vocabulary) for _ in range(rng.randint(8, 16))])
    ids, mask = (part.to(device) for part in opd.pad_left(prompts, PAD))
    response = torch.randint(vocabulary, (rows, tokens), device=device)
    valid = torch.ones_like(response, dtype=torch.bool)
    with torch.no_grad():
        both = torch.cat([ids, response], dim=1), torch.cat([mask, valid], dim=1)
        states = opd.hidden_states(teacher, *both, tokens)
    batch = {
        "prompt_ids": ids,
        "prompt_mask": mask,
        "response_ids": response,
        "response_mask": valid,
        "loss_mask": valid,
        "token_weight": torch.ones(valid.shape, device=device),
        "log_probs": torch.zeros(valid.shape, device=device),
        "teacher_hidden": list(states),
    }
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    settings = update_settings(student, teacher, vocabulary, loss, rows)
    return (student, optimizer, batch, 0.0), settings


def update_jobs(vocabulary, width, device, rows):
    """One update on the same batch: with the loss in chunks, and on full logits."""
    made, settings = made_up_update(vocabulary, width, device, rows)
    return {
        "ours": functools.partial(opd.train_step, *made, **settings),
        "full": functools.partial(full_logits_step, *made, **settings),
    }


def same_results(seen, other):
    for name in ("loss", "grad_norm"):
        torch.testing.assert_close(seen[name], other[name], rtol=1e-3, atol=0)


def update_lines(sizes):
    """The seconds of an update, compared with full logits."""
    table = []
    for V in sizes.update_vocabularies:
        jobs = update_jobs(V, sizes.update_width, sizes.device, rows=1)
        seen = in_turns(jobs, sizes.device)
        same_results(seen["ours"], seen["full"])
        seconds = [seen[name]["seconds"] for name in ("ours", "full")]
        most = 1.3 if V > 100_000 else None
        table.append(line(f"update, V {V:,}, N 256; full logits", *seconds, most=most))
    return table


def chunk_lines(sizes):
    """The seconds of an update in chunks of tokens_at_once, compared with chunks of 192 tokens."""
    table = []
    for V, rows in sizes.chunk_rows:
        made, settings = made_up_update(V, sizes.update_width, sizes.device, rows)
        jobs = {}
        for chunk_tokens in (opd.tokens_at_once(V), 192):
            settings["chunk_tokens"] = chunk_tokens
            jobs[chunk_tokens] = functools.partial(opd.train_step, *made, **settings)
        elements, tokens = in_turns(jobs, sizes.device).values()
        same_results(elements, tokens)
        name = f"update, V {V:,}, N {256 * rows:,}; chunks of 192"
        table.append(line(name, elements["seconds"], tokens["seconds"]))
    return table


def memory_lines(sizes):
    """The peak memory of an update, compared with full logits."""
    table = []
    for V in sizes.update_vocabularies:
        peak = {}
        for name, job in update_jobs(V, sizes.update_width, sizes.device, rows=8).items():
            peak[name] = torch.tensor(peak_bytes(job, sizes.device) / 2**30)
        most = 0.1 if V > 100_000 else None
        name = f"update, V {V:,}, N 2,048; full logits"
        table.append(line(name, peak["ours"], peak["full"], " GiB", most=most))
    return table


# --------------------------------------------------------------------------------------------------
# Steps


def step_job(subject, student, prompts):
    """A rollout and an update, as in a run -> a job that returns seconds by phase and tokens"""
    on_gpu = subject.sizes.device == "cuda"
    bf16 = torch.autocast(subject.sizes.device, torch.bfloat16, enabled=on_gpu)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.0, weight_decay=0.0)
    settings = update_settings(
        student, subject.teacher, subject.sizes.vocabulary, "topk", rows=4, autocast=bf16
    )
    plan = subject.plan(segments=8)

    def job():
        began = opd.clock(subject.student.device)
        with tokens_computed(subject.student) as sampled:
            out = opd.rollout(
                subject.student, subject.teacher, prompts, plan, overlap_k=TOP_K, **subject.law
            )
        middle = opd.clock(subject.student.device)
        batch = {**out, "loss_mask": out["response_mask"]}
        batch["token_weight"] = torch.ones_like(out["overlap"])
        with tokens_computed(student) as learned:
            opd.train_step(student, optimizer, batch, 0.0, **settings)
        return {
            "rollout": middle - began - out["teacher_seconds"],
            "teacher": out["teacher_seconds"],
            "update": opd.clock(subject.student.device) - middle,
            "sampled": sum(sampled),
            "learned": sum(learned),
        }

    return job


def step_lines(subject, student):
    """A step of skewed lengths: its seconds by phase, and what is computed in vain."""
    lengths = skewed(subject.sizes.rows, subject.sizes.tokens)
    prompts = subject.prompts(lengths)
    prompt = torch.tensor([len(prompt) for prompt in prompts])
    seen = in_turns({"step": step_job(subject, student, prompts)}, subject.sizes.device)["step"]
    floors = {
        "rollout": subject.sampling_floor(prompt, lengths),
        "teacher": subject.forward_floor(subject.teacher, prompt + lengths),
        "update": 3 * subject.forward_floor(subject.student, prompt + lengths),
    }
    floor = sum(floors.values())
    speed = f"{int(lengths.sum()) / median(seen['seconds']):,.0f} tokens/s"
    name = "step, skewed lengths; its floor"
    table = [line(name, seen["seconds"], torch.tensor(floor), floor=floor, value=speed)]
    for phase, floor in floors.items():
        table.append(line(f"    {phase}; step", seen[phase], seen["seconds"], floor=floor))
    at_full_speed = torch.full_like(seen["update"], floors["update"])
    least = 0.4 if subject.sizes.device == "cuda" else None
    name = "    its FLOPs at full speed; update"
    table.append(line(name, at_full_speed, seen["update"], least=least))
    # The last token of a row predicts nothing
    real = torch.tensor(int((prompt + lengths - 1).sum()))
    table.append(line("    computed in the rollout; real", seen["sampled"], real, unit=""))
    name = "    computed in the update; real"
    table.append(line(name, seen["learned"], real, unit="", most=1.1))
    return table


def growth_lines(subject, student):
    """How the seconds of a step grow with the response length and with the batch."""
    eighth, rows = subject.sizes.tokens // 8, subject.sizes.scale_rows
    times = (1, 2, 4, 8)
    drawn = {
        "response length": {n: [eighth * n] * rows for n in times},
        "batch": {n: [eighth] * rows * n for n in times},
    }
    table = []
    for what, lengths_of in drawn.items():
        jobs = {}
        for n, lengths in lengths_of.items():
            prompts = bench_prompts(lengths, subject.sizes.vocabulary, subject.sizes.prompt_length)
            jobs[n] = step_job(subject, student, prompts)
        seen = in_turns(jobs, subject.sizes.device)
        seconds = {n: median(seen[n]["seconds"]) for n in times}
        growth = exponent(times, list(seconds.values()))
        name = f"step, 8 times the {what}; once"
        table.append(line(name, seen[8]["seconds"], seen[1]["seconds"], value=growth, most=1.1))
    return table


def plan_line(subject):
    """A line: the memory that the steps will need; the seconds of it all, from a short rollout."""
    sizes, student, teacher = subject.sizes, subject.student, subject.teacher
    cache = sum(opd.check_model(model, False) for model in (student, teacher))
    context = contextlib.nullcontext()
    plan = opd.memory_plan(
        student.num_parameters(),
        teacher.num_parameters(),
        bf16=sizes.device == "cuda",
        rows=sizes.rows,
        columns=sizes.prompt_length + sizes.tokens,
        vocab=sizes.vocabulary,
        cache=cache,
        # The update keeps four rows; the caches are of all rows
        kept=4 * opd.kept_for_backward(student, context, False) // sizes.rows,
    )
    columns = 16
    prompts = subject.prompts(torch.full((sizes.rows,), columns))
    for _ in range(2):  # the first one is a warm-up
        began = opd.clock(student.device)
        opd.rollout(student, None, prompts, opd.Plan(columns, columns), **subject.law)
        column = (opd.clock(student.device) - began) / columns
    # All jobs take about as long as 30 rollouts of all rows
    seconds = 30 * (REPEATS[sizes.device] + 1) * sizes.tokens * column
    rollout, update = (sum(phase.values()) for phase in plan.values())
    most = max(rollout, update + plan["rollout"]["caches"])
    return f"plan: {most / 1e9:.1f} GB, about {seconds:.0f} s"


def bench(sizes, rates):
    """All lines of the table -> list of dicts"""
    subject = Subject(sizes, *rates)
    print(plan_line(subject), flush=True)
    # On a GPU the student has float32 master weights
    student = copy.deepcopy(subject.student).float() if sizes.device == "cuda" else subject.student
    return [
        *rollout_lines(subject),
        *prompt_lines(subject),
        *update_lines(sizes),
        *chunk_lines(sizes),
        *step_lines(subject, student),
        *growth_lines(subject, student),
        *memory_lines(sizes),  # last: its malloc settings slow down what follows
    ]


def main():
    began = time.perf_counter()
    transformers.utils.logging.set_verbosity_error()
    sizes = CUDA if torch.cuda.is_available() else CPU
    rates = machine_rates(sizes.device)
    print(f"{machine_name(sizes.device)}; {rates[0] / 1e9:.1f} GB/s, {rates[1] / 1e12:.3f} TFLOPS")
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{versions}, Python {sys.version.split()[0]}", flush=True)
    table = bench(sizes, rates)
    print(*bench_table(table), NOTES.strip(), sep="\n")
    print(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
