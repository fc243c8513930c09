"""
The lessons: what a reader of opd.py might doubt, one claim per test, in the order of its part I.
Read the names first: python -m pytest --collect-only -q test_opd.py

Everything runs offline, on random models of 2 layers, most with a vocabulary of 24 tokens. Where
there is a second way to compute a number (a sum over all tokens, autograd on full logits, one
uninterrupted model.generate), the test compares with it. Part II is tested in .ci/test_runs.py.
"""

import torch

torch.set_num_threads(1)  # tiny tensors gain next to nothing from more

import copy
import hashlib
import itertools
import json
import math
import os
import pathlib
import random
import re
import shutil
import tracemalloc
from functools import partial

import pytest
import transformers
from torch.distributions import Categorical, kl_divergence
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves

import opd

# --------------------------------------------------------------------------------------------------
# Helpers

WORDS = "<pad> <end> <user> <solve> \\boxed{ } 0 1 2 3 4 5 6 7 8 9 a b c d e f g h".split()
PAD = 0
END = 1
V = len(WORDS)  # 24: small enough to compute exact expectations over all tokens
TOKENS = {"bos_token_id": None, "eos_token_id": END, "pad_token_id": PAD}
SIZES = {**TOKENS, "vocab_size": V, "max_position_embeddings": 256, "tie_word_embeddings": False}
SIZES |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"initializer_range": 0.3}  # with less, greedy decoding would repeat one token forever
close = torch.testing.assert_close


def tiny(family, seed, **changes):
    """A small random model of a family of transformers, such as Llama."""
    torch.manual_seed(seed)
    config = getattr(transformers, family + "Config")(**{**SIZES, **changes})
    return getattr(transformers, family + "ForCausalLM")(config).eval()


tiny_llama = partial(tiny, "Llama")
tiny_qwen3 = partial(tiny, "Qwen3")


def tiny_gpt2(seed):
    """Absolute positions: the only family here that notices shifted position_ids."""
    torch.manual_seed(seed)
    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
    config = transformers.GPT2Config(vocab_size=V, **sizes, **TOKENS)
    return transformers.GPT2LMHeadModel(config).eval()


MAKERS = {"llama": tiny_llama, "qwen3": tiny_qwen3, "gpt2": tiny_gpt2}
FAMILIES = pytest.mark.parametrize("family", MAKERS.values(), ids=MAKERS)
STUDENT = tiny_llama(1)  # no test changes these two
TEACHER = tiny_qwen3(2, hidden_size=48)


def logits(*shape, seed=0, scale=2.0):
    return torch.randn(*shape, V, generator=torch.Generator().manual_seed(seed)) * scale


def gradient(loss, z):
    """The gradient of the sum of loss(z) with respect to the logits z."""
    z = z.clone().requires_grad_()
    return torch.autograd.grad(loss(z).sum(), z)[0]


def advantages(z, t, baseline):
    """The factor of -log p(y) in reverse_kl_sampled, for each token y. (1, 1, V) -> (V,)"""
    y = torch.arange(V)[:, None]
    value = opd.reverse_kl_sampled(z.expand(V, 1, V), t.expand(V, 1, V), y, baseline)
    return value.flatten() / -z.log_softmax(-1).flatten()


def support_set(z, t, k, support):
    """The support S that topk_support must choose, by sorting and set operations in Python."""
    student = {*sorted(range(V), key=lambda v: -z.flatten()[v])[:k]}
    teacher = {*sorted(range(V), key=lambda v: -t.flatten()[v])[:k]}
    sets = {"student": student, "teacher": teacher}
    return sorted({**sets, "intersection": student & teacher, "union": student | teacher}[support])


def entropy(probabilities):
    return -sum(p * math.log(p) for p in probabilities)


def prompts(*lengths):
    """Random prompts of these lengths -> ids, mask, left-padded"""
    rng = random.Random(0)
    return opd.pad_left([rng.choices(range(2, V), k=length) for length in lengths], PAD)


def without_padding(ids, mask):
    return [row[valid].tolist() for row, valid in zip(ids, mask)]


# Sampling

SAMPLING = {"vocab_size": V, "eos_ids": {END}, "pad_id": PAD}
LENGTHS = (2, 5, 3, 4)  # of the prompts, in tokens


def roll(student, teacher=None, lengths=LENGTHS, prompt=None, **changes):
    """A rollout, by default greedy, of 12 tokens in segments of 4. prompt: (ids, mask)"""
    plan = {"max_length": 12, "segment_length": 4}
    settings = {**SAMPLING, "temperature": 0, "overlap_k": 4}
    for name, value in changes.items():
        told = plan if name in opd.Plan.__dataclass_fields__ else settings
        told[name] = value
    rows = without_padding(*(prompt or prompts(*lengths)))
    return opd.rollout(student, teacher, rows, opd.Plan(**plan), **settings)


def rows_of(out):
    """Each row without padding, as (prompt and response (1, L), length of the prompt)."""
    rows = []
    for row, prompt in enumerate(without_padding(out["prompt_ids"], out["prompt_mask"])):
        response = out["response_ids"][row][out["response_mask"][row]].tolist()
        rows.append((torch.tensor([prompt + response]), len(prompt)))
    return rows


def plain_generate(model, ids, mask, eos_ids, length):
    """One uninterrupted greedy model.generate, with its own cache and its own positions."""
    config = transformers.GenerationConfig(
        max_new_tokens=length, eos_token_id=sorted(eos_ids), pad_token_id=PAD, do_sample=False
    )
    new = model.generate(ids, attention_mask=mask.long(), generation_config=config)
    return new[:, ids.shape[1] :]


def staggered_ends(model, ids, mask):
    """EOS ids with which greedy rows end in the first segment of 4, in the second, and never."""
    free = plain_generate(model, ids, mask, {V}, 12)
    for eos_ids in itertools.combinations(range(1, V), 3):
        is_end = torch.isin(free, torch.tensor(eos_ids))
        ends = is_end.int().argmax(1).masked_fill(~is_end.any(1), 12) // 4
        if {0, 1, 3} <= set(ends.tolist()):
            return set(eos_ids)


ENDS = staggered_ends(STUDENT, *prompts(*LENGTHS))


def forward_shapes(model):
    """A list that gets (rows, columns) of every forward pass; a function that stops this."""
    shapes = []

    def note(module, args, kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))

    return shapes, model.base_model.register_forward_pre_hook(note, with_kwargs=True).remove


FLAT = tiny_llama(0, initializer_range=0.1)  # no token is too rare for a chi-square test
FLAT_LOGITS = FLAT(torch.tensor([[3, 5, 7]])).logits[0, -1].detach()


def first_tokens(model, count=4000, **changes):
    """Sample the token after 3, 5, 7 `count` times -> how often each token came (V,)"""
    ids = torch.tensor([[3, 5, 7]]).expand(count, 3)
    settings = {"max_new_tokens": 1, "vocab_size": V, "eos_ids": {END}, **changes}
    torch.manual_seed(0)
    tokens = opd.generate(model, ids, torch.ones_like(ids), **settings)[0]
    return torch.bincount(tokens.flatten(), minlength=settings["vocab_size"])


def chi_square(counts, law):
    """Chi-square of 4000 draws against a distribution; with 24 tokens P(> 50) is .001."""
    assert (counts[law == 0] == 0).all()
    expected = 4000 * law[law > 0]
    return ((counts[law > 0] - expected) ** 2 / expected).sum().item()


# The update

LOSSES = {  # of the logits z of the student, t of the teacher, and the sampled ids y
    "reverse_kl": lambda z, t, y: opd.reverse_kl(z, t),
    "forward_kl": lambda z, t, y: opd.forward_kl(z, t),
    "jsd": lambda z, t, y: opd.jsd(z, t, 0.3),
    "sampled": lambda z, t, y: opd.reverse_kl_sampled(z, t, y),
    "baseline": lambda z, t, y: opd.reverse_kl_sampled(z, t, y, baseline=True),
    "topk": lambda z, t, y: opd.reverse_kl_topk(z, t, 4),
    "tail": lambda z, t, y: opd.reverse_kl_tail(z, t, 4),
}


def make_batch(student, teacher, lengths=LENGTHS, **changes):
    """A sampled rollout to train on, with random token weights."""
    torch.manual_seed(0)
    out = roll(student, teacher, lengths, **{"eos_ids": {2, 3}, "temperature": 1.0, **changes})
    generator = torch.Generator().manual_seed(0)
    out["token_weight"] = torch.rand(out["overlap"].shape, generator=generator) + 0.5
    out["loss_mask"] = out["response_mask"]
    return out


def gradients_of(model):
    named = model.named_parameters()
    return {name: value.grad.clone() for name, value in named if value.grad is not None}


def update(student, teacher, batch, loss="reverse_kl", lr=0.0, **changes):
    """train_step with SGD; lr 0 changes no weight -> (metrics, gradients by name)"""
    settings = {
        "max_grad_norm": 1e9,
        "micro_batch_size": 2,
        "chunk_tokens": 7,
        "token_loss": LOSSES.get(loss, loss),
        "measure": lambda z, t, *_: opd.alignment(z, t, None, 4),
        "student_head": lambda hidden: opd.head_logits(student, hidden, V),
        "teacher_head": lambda hidden: opd.head_logits(teacher, hidden, V),
    }
    optimizer = torch.optim.SGD(student.parameters(), lr=9.0)  # the step has a rate of its own
    metrics = opd.train_step(student, optimizer, batch, lr, **{**settings, **changes})
    return metrics, gradients_of(student)


def plain_gradients(student, teacher, batch, loss="reverse_kl"):
    """The plainest way: each row alone, unpadded, full logits, one backward -> (loss, gradients)"""
    student.zero_grad()
    total = 0.0
    for row, (ids, prompt) in enumerate(rows_of(batch)):
        learned = batch["loss_mask"][row, : ids.shape[1] - prompt]
        z = student(ids).logits[:, prompt - 1 : -1, :V]
        t = teacher(ids).logits[:, prompt - 1 : -1, :V].detach()
        weight = batch["token_weight"][row, : ids.shape[1] - prompt] * learned
        total = total + (LOSSES[loss](z, t, ids[:, prompt:]) * weight).sum()
    total = total / batch["loss_mask"].sum()
    total.backward()
    return total.item(), gradients_of(student)


def assert_same(a, b, tolerance=1e-6):
    """Two dicts of tensors are equal up to rounding, with tolerance 0 exactly."""
    assert a.keys() == b.keys()
    for name in a:
        close(a[name], b[name], rtol=1e-4 if tolerance else 0, atol=tolerance)


STOPS = {3, 7, 9}
KEPT = [index for index in range(V) if index not in STOPS - {7}]  # classes: 7 stands for all stops


def classes_of(z):
    """Log-probs of the classes, the probabilities of all stop tokens summed. (..., V - 2)"""
    p = z.softmax(-1)
    stop = p[..., sorted(STOPS)].sum(-1, keepdim=True)
    return torch.cat([p[..., :7], stop, p[..., 8:]], dim=-1)[..., KEPT].log()


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the size, in elements, of the largest tensor that an operation inside it returns."""

    numel = 0

    def __torch_dispatch__(self, operation, kinds, arguments=(), keywords=None):
        out = operation(*arguments, **(keywords or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


# Whole runs


def write(path, *records, text=None):
    """Write a file of JSON lines, or of this text -> its path, a str"""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    path.write_text(lines if text is None else text, encoding="utf-8")
    return str(path)


def read(path):
    """The records of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def save_model(folder, model, words=WORDS):
    """Save a model and a tokenizer of these words for from_pretrained -> the folder"""
    model.save_pretrained(folder)
    opd.tiny_tokenizer(words).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Two models, the teacher's head with 8 extra rows; 9 problems to train on, 3 to evaluate."""
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "student", tiny_qwen3(1))
    save_model(folder / "teacher", tiny_qwen3(2, hidden_size=48, vocab_size=V + 8))
    rng = random.Random(0)
    problems = []
    for index in range(9):
        text = " ".join(rng.sample(WORDS[6:], 2 + index % 4))
        problems.append({"problem": text, "answer": str(index)})
    write(folder / "train.jsonl", *problems)
    write(folder / "eval.jsonl", *problems[:3])
    return folder


SMALL = {"prompt_template": "{problem}", "dtype": "float32", "device": "cpu", "learning_rate": 1e-3}
SMALL |= {"batch_size": 2, "num_generations": 2, "max_new_tokens": 12, "segment_length": 4}
SMALL |= {"max_steps": 2, "overlap_k": 4, "prefix_length": 6, "probe_window": 4}
SMALL |= {"horizon_start": 4, "horizon_growth": 4, "horizon_every": 1, "validation_size": 3}
SMALL |= {"cap_init": 8, "cap_min": 4, "cap_max": 12, "cap_step": 2, "cap_margin": 2}
SMALL |= {"eval_samples": 1, "eval_max_new_tokens": 12, "eval_every": 0, "eval_first": "both"}
SMALL |= {"no_view": True}  # rollouts.html is tested in .ci/test_view.py


def flags(**changes):
    return opd.Config(**{**SMALL, **changes})


def chosen(score, ended=(0, 0, 0, 0, 0, 0), border=6, **changes):
    """Which candidates prefix-guided continues: scores (P, G), ended (B,) -> (P, G) bool"""
    P, G = len(score), len(score[0])
    overlap = torch.tensor(score).view(-1, 1).expand(P * G, border).clone()
    # Past the probe window of 4 the opposite: a rule that read on would choose others
    overlap[:, 4:] = 1 - overlap[:, 4:]
    changes = {"method": "prefix-guided", "num_generations": G, **changes}
    rule = opd.plan_rollout(flags(**changes), 1, cap=8).goes_on
    mask, ended = torch.ones(P * G, border).bool(), torch.tensor(ended).bool()
    return rule(border, overlap, mask, ended).view(P, G)


def command(world, out, **changes):
    """A command line for the small world. None omits a flag, True gives it no value."""
    flags = {
        **SMALL,
        "student": world / "student",
        "teacher": world / "teacher",
        "train_file": world / "train.jsonl",
        "eval_file": world / "eval.jsonl",
        "output_dir": out,
        **changes,
    }
    argv = []
    for name, value in flags.items():
        if value is not None:
            argv.append(f"--{name}")
        if value is not None and value is not True:
            values = value if isinstance(value, list) else [value]
            argv += [str(part).replace("{world}", str(world)) for part in values]
    return argv


def train(world, out, **changes):
    """A run -> (what main returns, the lines of metrics.jsonl of steps, those of evaluations)"""
    results = opd.main(command(world, out, **changes))
    lines = read(out / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    return results, steps, [line for line in lines if "eval" in line]


def repeatable(lines):
    """The lines without what differs between two equal runs: times and memory."""
    kept = []
    for line in lines:
        names = [name for name in line if not name.startswith(("time", "peak"))]
        kept.append({name: line[name] for name in names})
    return kept


def says_a(text, gold):
    """Replaces is_correct, so that random models are sometimes right."""
    assert gold is not None
    return "a" in text.split()


def checkpoints(folder):
    """The names of the checkpoints in a folder, in order."""
    return [os.path.basename(path) for path in opd.list_checkpoints(str(folder))]


def outcome(folder):
    """What a run leaves, in a form that can be compared bit for bit."""
    last = folder / checkpoints(folder)[-1]
    weights = hashlib.sha256((last / "model.safetensors").read_bytes()).hexdigest()
    samples = read(folder / "samples.jsonl")
    return repeatable(read(folder / "metrics.jsonl")), samples, last.name, weights


def watch_updates(patch, seen):
    """Make every update append (the student before it, its batch, its gradients) to seen."""
    backward = opd.backward

    def watched(student, batch, **settings):
        before = copy.deepcopy(student)
        metrics = backward(student, batch, **settings)
        seen.append((before, batch, gradients_of(student)))
        return metrics

    patch.setattr(opd, "backward", watched)


@pytest.fixture
def updates(monkeypatch):
    seen = []
    watch_updates(monkeypatch, seen)
    return seen


@pytest.fixture
def runs(monkeypatch):
    """A list to which every call of opd.train appends its Run."""
    seen = []
    loop = opd.train

    def watched(config, run):
        seen.append(run)
        loop(config, run)

    monkeypatch.setattr(opd, "train", watched)
    return seen


@pytest.fixture(scope="session")
def first_run(world, tmp_path_factory):
    """A run of four steps that tests share -> (its folder, results, steps, evaluations)"""
    out = tmp_path_factory.mktemp("run")
    return out, *train(world, out, max_steps=4)


def evaluate(*problems, model=STUDENT, **changes):
    """opd.evaluate, three answers per problem, four rows at a time -> (metrics, answers)"""
    settings = {**SAMPLING, "max_length": 8, "num_samples": 3, "seed": 5, "rows_per_batch": 4}
    tokenizer = opd.tiny_tokenizer(WORDS)
    return opd.evaluate(model, tokenizer, problems, **{**settings, **changes})


LOSS_OF = {"opd": "reverse_kl", "prefix": "topk", "progressive": "sampled"}
LOSS_OF |= {"prefix-guided": "topk", "prune": "reverse_kl"}


@pytest.fixture(scope="module", params=LOSS_OF)
def whole_run(request, world, tmp_path_factory):
    """Five steps of a method, extrapolating, saving, evaluating -> (flags, folder, updates)"""
    out = tmp_path_factory.mktemp(request.param)
    changes = {"method": request.param, "loss": LOSS_OF[request.param], "extrapolate": True}
    changes |= {"max_steps": 5, "save_every": 3, "eval_every": 4, "max_grad_norm": 1e9}
    changes |= {"drift_threshold": 0.5, "w_drop": 0.1, "rollout_batch_size": 3}
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        watch_updates(patch, seen)
        patch.setattr(opd, "is_correct", says_a)
        train(world, out, **changes)
    return changes, out, seen


# --------------------------------------------------------------------------------------------------
# 1. Losses, one value per token


def test_reverse_kl_is_torchs_kl_divergence_of_student_and_teacher_in_that_order():
    z, t = logits(2, 5, seed=1), logits(2, 5, seed=2)
    expected = kl_divergence(Categorical(logits=z), Categorical(logits=t))
    close(opd.reverse_kl(z, t), expected)


def test_forward_kl_is_torchs_kl_divergence_of_teacher_and_student_in_that_order():
    z, t = logits(2, 5, seed=1), logits(2, 5, seed=2)
    expected = kl_divergence(Categorical(logits=t), Categorical(logits=z))
    close(opd.forward_kl(z, t), expected)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_is_what_the_entropy_of_the_mixture_exceeds_the_mean_entropy_by(beta):
    """beta is the teacher's share in the mixture, and in the mean."""
    z, t = logits(2, 5, seed=1), logits(2, 5, seed=2)
    mixture = Categorical(beta * t.softmax(-1) + (1 - beta) * z.softmax(-1))
    mean = beta * Categorical(logits=t).entropy() + (1 - beta) * Categorical(logits=z).entropy()
    close(opd.jsd(z, t, beta), mixture.entropy() - mean)


def test_reverse_kl_charges_little_for_one_of_two_modes_and_much_for_an_invented_one():
    """Covering one of the teacher's two modes costs log 2; a third, which it lacks, over 16."""
    never = -50.0
    teacher = torch.tensor([[[0.0, 0.0, never]]])
    one_mode = torch.tensor([[[0.0, never, never]]])
    third_mode = torch.tensor([[[0.0, 0.0, 0.0]]])
    assert opd.reverse_kl(one_mode, teacher).item() == pytest.approx(math.log(2), abs=1e-4)
    # A third of the mass is where log q is -50 - log 2
    invented = 50 / 3 + math.log(2 / 3)
    assert opd.reverse_kl(third_mode, teacher).item() == pytest.approx(invented, abs=1e-3)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_of_bfloat16_logits_are_computed_in_float32_and_those_of_float64_stay_so(loss):
    z = logits(4, 4, seed=1, scale=8).bfloat16()
    t = logits(4, 4, seed=2, scale=8).bfloat16()
    y = torch.arange(16).view(4, 4)
    value = LOSSES[loss](z, t, y)
    assert value.dtype == torch.float32
    close(value, LOSSES[loss](z.float(), t.float(), y), rtol=0, atol=0)
    assert LOSSES[loss](z.double(), t.double(), y).dtype == torch.float64


@pytest.mark.parametrize("loss", ["reverse_kl", "forward_kl", "jsd"])
def test_divergences_pass_gradcheck_in_float64(loss):
    z = logits(2, seed=1).double().requires_grad_()
    t = logits(2, seed=2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z, t: LOSSES[loss](z, t, None), (z, t))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_token_of_probability_zero_under_both_models_changes_no_loss_and_no_gradient(loss):
    """Loss and gradient are those of a vocabulary without it; its own gradient is 0."""
    z, t = logits(2, 3, seed=1), logits(2, 3, seed=2)
    y = torch.arange(6).view(2, 3)
    expected = LOSSES[loss](z[..., :-1], t[..., :-1], y)
    expected_gradient = gradient(lambda z: LOSSES[loss](z, t[..., :-1], y), z[..., :-1])
    z[..., -1] = t[..., -1] = -torch.inf
    close(LOSSES[loss](z, t, y), expected)
    pull = gradient(lambda z: LOSSES[loss](z, t, y), z)
    close(pull[..., :-1], expected_gradient)
    assert pull[..., -1].abs().max() == 0


@pytest.mark.parametrize("baseline", [False, True])
def test_the_sampled_loss_has_the_gradient_of_reverse_kl_in_expectation(baseline):
    """The exact mean over all 24 tokens, weighted by p: there is no sampling noise."""
    z, t = logits(1, 1, seed=1).double(), logits(1, 1, seed=2).double()
    mean = torch.zeros_like(z)
    for y, probability in enumerate(z.softmax(-1).flatten()):
        ids = torch.tensor([[y]])
        mean += probability * gradient(
            lambda z, ids=ids: opd.reverse_kl_sampled(z, t, ids, baseline), z
        )
    close(mean, gradient(lambda z: opd.reverse_kl(z, t), z), rtol=0, atol=1e-12)


def test_the_advantage_of_a_sampled_token_is_log_q_minus_log_p():
    z, t = logits(1, 1, seed=1), logits(1, 1, seed=2)
    expected = (t.log_softmax(-1) - z.log_softmax(-1)).flatten()
    close(advantages(z, t, baseline=False), expected)


def test_the_baseline_centres_the_advantage_and_lowers_its_mean_square_by_kl_squared():
    """Mean square is variance + mean squared: the mean goes, and the variance stays. That of the
    gradient need not fall."""
    z, t = logits(1, 1, seed=1), logits(1, 1, seed=2)
    p = z.softmax(-1).flatten()
    plain, centred = advantages(z, t, False), advantages(z, t, True)
    kl = opd.reverse_kl(z, t).item()
    assert (p * centred).sum().item() == pytest.approx(0, abs=1e-4)
    less = (p * plain**2).sum() - (p * centred**2).sum()
    assert less.item() == pytest.approx(kl**2, rel=1e-3)


@pytest.mark.parametrize(
    "tokens, others, shared",
    [([3, 1], [1, 2], [False, True]), ([3, 1], [1, 3], [True, True]), ([3], [1, 2], [False])],
)
def test_is_among_tells_for_each_token_whether_it_is_one_of_the_others(tokens, others, shared):
    assert opd.is_among(torch.tensor(tokens), torch.tensor(others)).tolist() == shared


SUPPORTS = pytest.mark.parametrize("support", ["student", "teacher", "intersection", "union"])


@SUPPORTS
def test_the_topk_loss_is_the_p_weighted_mean_of_log_p_minus_log_q_on_its_support(support):
    """Weighted by p_bar, renormalised on the support; log p and log q are not renormalised."""
    z, t = logits(1, 1, seed=1).double(), logits(1, 1, seed=2).double()
    S = support_set(z, t, 8, support)
    rho = (z.log_softmax(-1) - t.log_softmax(-1))[..., S]
    expected = (z[..., S].softmax(-1) * rho).sum(-1)
    close(opd.reverse_kl_topk(z, t, 8, support), expected, rtol=0, atol=1e-12)


@SUPPORTS
def test_the_gradient_of_the_topk_loss_is_the_closed_form_of_the_released_code(support):
    """For logit u: p(u) (1[u in S] rho(u) - sum_S p rho) / sum_S p,   rho = log p - log q."""
    z, t = logits(1, 1, seed=1).double(), logits(1, 1, seed=2).double()
    p, rho = z.softmax(-1).flatten(), (z.log_softmax(-1) - t.log_softmax(-1)).flatten()
    S = support_set(z, t, 8, support)
    in_S = torch.zeros(V).double()
    in_S[S] = 1
    expected = p * (in_S * rho - (p * rho)[S].sum()) / p[S].sum()
    got = gradient(lambda z: opd.reverse_kl_topk(z, t, 8, support), z)
    close(got.flatten(), expected, rtol=0, atol=1e-12)


def test_the_topk_loss_on_the_whole_vocabulary_is_reverse_kl():
    """Even if one of its tokens has probability 0 under both models."""
    z, t = logits(2, 3, seed=1), logits(2, 3, seed=2)
    z[..., 0] = t[..., 0] = -torch.inf
    close(opd.reverse_kl_topk(z, t, V), opd.reverse_kl(z, t))


def test_the_topk_loss_moves_mass_between_support_and_rest_which_a_renormalised_kl_cannot():
    z, t = logits(1, 1, seed=1), logits(1, 1, seed=2)
    S = support_set(z, t, 5, "student")
    tail = [v for v in range(V) if v not in S]
    teacher = Categorical(logits=t[..., S])
    renormalised = gradient(lambda z: kl_divergence(Categorical(logits=z[..., S]), teacher), z)
    released = gradient(lambda z: opd.reverse_kl_topk(z, t, 5), z)
    assert renormalised[..., S].sum().abs() < 1e-6 and renormalised[..., tail].abs().max() == 0
    assert released[..., S].sum().abs() > 0.01 and released[..., tail].abs().max() > 0.01


def test_on_an_empty_intersection_the_topk_loss_and_its_gradient_are_zero():
    z = torch.arange(V).float()[None, None]
    pull = gradient(lambda z: opd.reverse_kl_topk(z, -z.detach(), 3, "intersection"), z)
    assert opd.reverse_kl_topk(z, -z, 3, "intersection").item() == 0 and pull.abs().max() == 0


def test_the_topk_loss_renormalises_p_however_improbable_its_support():
    """Its only token has probability e^-200 under the student, 0 in float32, yet p_bar is 1."""
    student = torch.tensor([[[200.0, 0.0]]])
    teacher = torch.tensor([[[0.0, 200.0]]])
    assert opd.reverse_kl_topk(student, teacher, 1, "teacher").item() == -200


def test_an_unknown_support_is_refused():
    with pytest.raises(ValueError):
        opd.reverse_kl_topk(logits(1), logits(1), 2, "both")


@SUPPORTS
def test_reverse_kl_tail_is_the_kl_over_the_support_and_one_class_for_the_rest(support):
    z, t = logits(2, 3, seed=1), logits(2, 3, seed=2)
    value = opd.reverse_kl_tail(z, t, 4, support)
    for place in itertools.product(range(2), range(3)):
        inside = support_set(z[place], t[place], 4, support)
        laws = []
        for probabilities in (z[place].softmax(-1), t[place].softmax(-1)):
            kept = probabilities[inside]
            laws.append(Categorical(torch.cat([kept, 1 - kept.sum(-1, keepdim=True)])))
        close(value[place], kl_divergence(*laws), rtol=1e-4, atol=1e-6)


def test_reverse_kl_tail_in_float64_resolves_a_rest_of_one_in_a_billion():
    """Of two tokens the other one is the rest: this is reverse_kl."""
    z, t = torch.tensor([[0.0, -20.0], [0.0, -10.0]]).double()
    close(opd.reverse_kl_tail(z, t, 1), opd.reverse_kl(z, t), rtol=1e-6, atol=0)


@SUPPORTS
def test_reverse_kl_tail_is_below_reverse_kl_and_equal_on_the_whole_vocabulary(support):
    """Even if one of its tokens has probability 0 under both models."""
    z, t = logits(50, seed=1).double(), logits(50, seed=2).double()
    z[..., 0] = t[..., 0] = -torch.inf
    full = opd.reverse_kl(z, t)
    assert (opd.reverse_kl_tail(z, t, 4, support) < full).all()
    close(opd.reverse_kl_tail(z, t, V, support), full)


def test_reverse_kl_tail_passes_gradcheck_and_has_no_gradient_where_the_models_are_equal():
    z, t = logits(2, seed=1).double().requires_grad_(), logits(2, seed=2).double()
    assert torch.autograd.gradcheck(lambda z: opd.reverse_kl_tail(z, t, 4, "union"), (z,))
    close(gradient(lambda z: opd.reverse_kl_tail(z, t, 4), t), torch.zeros(2, V).double())


def test_reverse_kl_tail_moves_mass_out_of_the_support_if_the_teacher_has_more_outside():
    """Both models rank tokens 0 and 1 equally; the teacher gives the other 22 far more."""
    z, t = torch.zeros(V), torch.zeros(V)
    z[:2] = 6.0
    t[:2] = 1.0
    pull = gradient(lambda z: opd.reverse_kl_tail(z, t, 2), z)
    assert (pull[:2] > 0).all() and (pull[2:] < 0).all()


# --------------------------------------------------------------------------------------------------
# 2. Agreement of the two models

P4 = [0.5, 0.3, 0.15, 0.05]  # top two: tokens 0 and 1
Q4 = [0.4, 0.1, 0.3, 0.2]  # tokens 0 and 2


def test_topk_overlap_is_the_share_of_the_students_top_k_that_is_in_the_teachers():
    student = torch.tensor([[P4, P4, P4]]).log()
    teacher = torch.tensor([[Q4, P4[::-1], P4]]).log()
    assert opd.topk_overlap(student, teacher, 2).tolist() == [[0.5, 0, 1]]


def test_the_overlap_ignores_the_rank_within_the_top_k():
    student, teacher = torch.tensor([[[2.0, 1, 0, 0]]]), torch.tensor([[[1.0, 2, 0, 0]]])
    assert opd.topk_overlap(student, teacher, 2).item() == 1


def test_unrelated_models_overlap_by_k_over_v_on_average_not_by_zero():
    overlap = opd.topk_overlap(logits(100, 100, seed=1), logits(100, 100, seed=2), 6)
    assert overlap.mean().item() == pytest.approx(6 / V, abs=0.01)


def test_every_alignment_metric_agrees_with_a_calculation_by_hand():
    """k = 3: the student's top 3 are 0, 1, 2, the teacher's 1, 0, 3; they share 0 and 1."""
    p, q = [0.6, 0.2, 0.15, 0.05], [0.3, 0.4, 0.1, 0.2]
    got = opd.alignment(torch.tensor([[p]]).log(), torch.tensor([[q]]).log(), torch.ones(1, 1), 3)
    # Renormalised on the shared tokens: p_bar .75, .25 and q_bar 3/7, 4/7
    advantage = (0.75 * math.log(3 / 7 / 0.75) + 0.25 * math.log(4 / 7 / 0.25)) / 2
    assert got == pytest.approx(
        {
            "overlap_ratio": 2 / 3,
            "overlap_token_advantage": advantage,
            "overlap_mass_student": 0.8,
            "overlap_mass_teacher": 0.7,
            "entropy_student": entropy(p),
            "entropy_teacher": entropy(q),
            "entropy_gap": entropy(q) - entropy(p),
            "reverse_kl": sum(a * math.log(a / b) for a, b in zip(p, q)),
        },
        abs=1e-5,
    )


def test_the_entropy_gap_is_the_same_positive_number_when_the_models_are_swapped():
    z, t = logits(1, 1, seed=1), logits(1, 1, seed=2)
    one, other = opd.alignment(z, t, None, 4), opd.alignment(t, z, None, 4)
    assert one["entropy_gap"] == other["entropy_gap"] > 0.1


def test_alignment_averages_over_the_valid_tokens_of_the_batch_not_over_its_rows():
    """Every token counts the same: here three of one row and one of the other."""
    z, t = logits(2, 3, seed=1), logits(2, 3, seed=2)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    means = opd.alignment(z, t, mask, 12)
    for name, value in opd.alignment(z, t, None, 12).items():
        assert means[name] == pytest.approx(value[mask.bool()].sum().item() / 4, abs=1e-6), name


def test_a_position_without_shared_tokens_counts_in_the_overlap_but_not_in_the_advantage():
    """k = 2: the models share both tokens at the first position, none at the second."""
    student = torch.tensor([[P4, P4]]).log()
    teacher = torch.tensor([[[0.2, 0.6, 0.15, 0.05], P4[::-1]]]).log()
    both = opd.alignment(student, teacher, torch.ones(1, 2), 2)
    first = opd.alignment(student, teacher, torch.tensor([[1, 0]]), 2)
    assert both["overlap_ratio"] == 0.5
    assert both["overlap_token_advantage"] == first["overlap_token_advantage"] < -0.1


def test_a_token_of_probability_zero_under_both_models_changes_no_alignment_metric():
    z, t = logits(1, 4, seed=1), logits(1, 4, seed=2)
    mask = torch.ones(1, 4)
    expected = opd.alignment(z[..., :-1], t[..., :-1], mask, 12)
    z[..., -1] = t[..., -1] = -torch.inf
    assert opd.alignment(z, t, mask, 12) == pytest.approx(expected, abs=1e-6)


def test_alignment_of_bfloat16_logits_is_computed_in_float32():
    z, t = logits(1, 4, seed=1).bfloat16(), logits(1, 4, seed=2).bfloat16()
    expected = opd.alignment(z.float(), t.float(), None, 12)
    close(opd.alignment(z, t, None, 12), expected)


def test_overlap_by_position_averages_over_the_tokens_in_each_of_8_equal_parts_of_the_columns():
    """16 columns in 8 parts; the rows have 14 and 7 tokens, so the last part is empty: NaN."""
    # The mean of columns 2i and 2i + 1 is (2i + .5) / 16 in the first row, and 1 in the second
    overlap = torch.stack([torch.arange(16) / 16, torch.full((16,), 1.0)])
    mask = torch.arange(16) < torch.tensor([[14], [7]])
    parts = opd.overlap_by_position(overlap, mask)
    assert parts[:3] == [((2 * i + 0.5) / 16 + 1) / 2 for i in range(3)]
    assert parts[3] == pytest.approx((6 / 16 + 7 / 16 + 1) / 3)
    assert parts[4:7] == [(2 * i + 0.5) / 16 for i in range(4, 7)]
    assert math.isnan(parts[7]) and len(parts) == 8


# --------------------------------------------------------------------------------------------------
# 3. Which rows go on, and how far: horizon, selection, drift, cap


def test_borders_are_the_ends_of_segments_look_at_and_max_length():
    assert opd.Plan(10, 4).borders() == [4, 8, 10]
    assert opd.Plan(8, 4, look_at=6).borders() == [4, 6, 8]
    assert opd.Plan(8, 20, look_at=9).borders() == [8]  # beyond max_length it is ignored


def test_by_default_a_segment_is_an_eighth_of_max_length_within_1_to_512_tokens():
    assert opd.Plan(16).borders() == [2, 4, 6, 8, 10, 12, 14, 16]
    assert opd.Plan(3).borders() == [1, 2, 3]
    assert opd.Plan(7168).borders()[:2] == [512, 1024]


def test_the_horizon_is_a_staircase_up_to_max_length():
    steps = {0: 512, 9: 512, 10: 768, 19: 768, 20: 1024, 1000: 2048}
    assert {step: opd.horizon(step, 512, 256, 10, 2048) for step in steps} == steps
    assert {opd.horizon(step, 512, 0, 10, 2048) for step in range(99)} == {512}  # growth 0: fixed


@pytest.mark.parametrize("num_keep", [8, 11, 16, 31, 32])
def test_each_prompt_keeps_its_best_candidate_and_more_slots_go_to_the_best_of_all_others(num_keep):
    """With 8 slots for 8 prompts nothing is left to compete for."""
    score = torch.rand(8, 4, generator=torch.Generator().manual_seed(num_keep))
    best = {(p, int(score[p].argmax())) for p in range(8)}
    others = {*itertools.product(range(8), range(4))} - best
    others = sorted(others, key=lambda place: -score[place])
    kept = {tuple(place) for place in opd.select_prefixes(score, num_keep).nonzero().tolist()}
    assert kept == best | {*others[: num_keep - 8]}


def test_the_first_candidate_wins_a_tie():
    keep = opd.select_prefixes(torch.ones(2, 30, dtype=torch.int), 3)  # counts are scores, too
    assert keep.nonzero().tolist() == [[0, 0], [0, 1], [1, 0]]


@pytest.mark.parametrize("num_keep, last", [(1, 1), (7, 1), (4, math.nan), (4, math.inf)])
def test_select_prefixes_refuses_too_few_or_too_many_slots_and_scores_not_finite(num_keep, last):
    with pytest.raises(ValueError):
        opd.select_prefixes(torch.tensor([[1, 1, 1], [1, 1, last]]), num_keep)


@pytest.mark.parametrize(
    "overlap, threshold, w_drop, w",
    [
        ([1, 0.5, 0], 0.75, 0.1, [1, 0.9, 0.8]),  # the released unit test
        ([0.75, 0.5], 0.75, 0.25, [1, 0.75]),  # an overlap equal to the threshold is not bad
        ([0, 1, 1, 0, 1], 0.5, 0.25, [0.75, 0.75, 0.75, 0.5, 0.5]),  # w never rises again
    ],
)
def test_every_token_below_the_threshold_lowers_reliability_for_good(overlap, threshold, w_drop, w):
    mask = torch.ones(1, len(overlap))
    got = opd.drift_weights(torch.tensor([overlap]), mask, threshold, w_drop)
    close(got, torch.tensor([w]).float())


def test_with_w_drop_of_a_hundredth_the_hundredth_bad_token_ends_the_reliable_length():
    w = opd.drift_weights(torch.zeros(1, 150), torch.ones(1, 150), 0.7, 0.01)
    assert w[0, 98] > 1e-8 and w[0, 99:].max() <= 1e-8 and w.min() >= 0
    assert opd.reliable_length(w, torch.ones(1, 150)).tolist() == [99]


def test_padding_has_no_reliability_is_no_bad_token_and_adds_no_reliable_length():
    mask = torch.tensor([[0, 1, 1, 0]])
    w = opd.drift_weights(torch.tensor([[0.0, 1, 0, 0]]), mask, 0.5, 0.25)
    assert w.tolist() == [[0, 1, 0.75, 0]]
    assert opd.reliable_length(torch.ones(1, 4), mask).tolist() == [2]


def test_a_reliability_of_up_to_1e_8_counts_as_zero():
    """As in the released code."""
    w = torch.tensor([[1, 1e-7, 1e-9]])
    assert opd.reliable_length(w, torch.ones(1, 3)).tolist() == [2]


CAP = {"step": 100, "margin": 100, "hit_ratio": 0.1, "patience": 3, "low": 1024, "high": 12288}


def test_the_cap_grows_if_a_tenth_of_the_rows_is_reliable_to_within_margin_of_it():
    hits = torch.tensor([1948] + [0] * 9)
    assert opd.next_max_length(hits, 2048, 2, **CAP) == (2148, 0)  # and the misses restart at 0
    one_token_short = hits - 1
    assert opd.next_max_length(one_token_short, 2048, 0, **CAP) == (2048, 1)
    of_eleven = torch.tensor([2048] + [0] * 10)
    assert opd.next_max_length(of_eleven, 2048, 0, **CAP) == (2048, 1)


@pytest.mark.parametrize("ratio, hits, rows", [(0.25, 1, 4), (0.7, 7, 10)])
def test_a_share_of_rows_exactly_at_the_hit_ratio_is_enough_to_grow_the_cap(ratio, hits, rows):
    """The share is computed in float64: in float32, 7/10 would be below .7."""
    reliable = torch.tensor([2048] * hits + [0] * (rows - hits))
    assert opd.next_max_length(reliable, 2048, 0, **{**CAP, "hit_ratio": ratio}) == (2148, 0)


def test_the_cap_shrinks_after_three_misses_in_a_row():
    cap, misses = 2048, 0
    caps = []
    for _ in range(6):
        cap, misses = opd.next_max_length(torch.zeros(10), cap, misses, **CAP)
        caps.append(cap)
    assert caps == [2048, 2048, 1948, 1948, 1948, 1848]


def test_the_cap_stays_between_low_and_high_and_its_boundary_is_never_below_low():
    assert opd.next_max_length(torch.full((4,), 12288), 12250, 0, **CAP) == (12288, 0)
    assert opd.next_max_length(torch.zeros(4), 1100, 2, **CAP) == (1024, 0)
    # At the lowest cap the boundary is 1024, not 1024 - margin: 1000 tokens are a miss
    assert opd.next_max_length(torch.full((4,), 1000), 1024, 0, **CAP) == (1024, 1)


# --------------------------------------------------------------------------------------------------
# 4. Extrapolation


def test_try_k_of_extrapolation_is_1_plus_2k_times_as_far_from_the_anchor_as_the_weights():
    seen = []

    def better_and_better(weights):
        seen.append(weights["w"].item())
        return len(seen)

    weights, anchor = {"w": torch.tensor(3.0)}, {"w": torch.tensor(2.0)}
    accepted, k, scores = opd.extrapolate(weights, anchor, better_and_better)
    assert seen == [3, 5, 7, 9, 11, 13]
    assert k == 5 and accepted["w"] == 13 and scores == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "scores, k, value",
    [
        ([0.5, 0.5], 0, 3.0),
        ([0.5, 0.6, 0.6], 1, 5.0),
        ([0.5, 0.6, 0.7, 0.65, 1], 2, 7.0),
    ],
)
def test_extrapolation_stops_at_the_first_try_that_is_no_better_and_rejects_it(scores, k, value):
    left = iter(scores)
    weights, anchor = {"w": torch.tensor(3.0)}, {"w": torch.tensor(2.0)}
    accepted, accepted_k, tried = opd.extrapolate(weights, anchor, lambda _: next(left))
    assert (accepted_k, accepted["w"].item(), tried) == (k, value, scores[: k + 2])


def test_an_anchor_of_another_dtype_is_converted_to_that_of_the_weights():
    """And likewise to their device, which a test on a CPU cannot show."""
    weights, anchor = {"w": torch.ones(2)}, {"w": torch.zeros(2, dtype=torch.float64)}
    accepted, k, _ = opd.extrapolate(weights, anchor, lambda tried: tried["w"].sum().item(), 2)
    assert k == 2 and accepted["w"].dtype == torch.float32 and accepted["w"].tolist() == [5, 5]


LEFT_BY_LLAMA = {"embed_tokens", "input_layernorm", "model.norm", "lm_head"}
LEFT_BY_GPT2 = {"wte", "wpe", "ln_1", "ln_2", "ln_f", "lm_head"}


@pytest.mark.parametrize(
    "family, left",
    [(tiny_llama, LEFT_BY_LLAMA), (tiny_qwen3, LEFT_BY_LLAMA), (tiny_gpt2, LEFT_BY_GPT2)],
)
def test_movable_weights_are_copies_of_the_weights_named_after_attention_or_mlp(family, left):
    """In Llama and Qwen3 post_attention_layernorm is one of them, for its name, as in the released
    code. Later updates do not change the copies."""
    model = family(0)
    moved = opd.movable_weights(model)
    for name, parameter in model.named_parameters():
        stays = any(part in name for part in left)
        assert stays == (name not in moved), name
        assert stays or torch.equal(moved[name], parameter)
        assert stays or moved[name].data_ptr() != parameter.data_ptr()


# --------------------------------------------------------------------------------------------------
# 5. Sampling and scoring


@pytest.mark.parametrize(
    "ids, eos_ids, length",
    [
        ([5, 1, 6, 1], {1}, 2),
        ([5, 2, 1, 6], {1, 2}, 2),
        ([1, 5, 6, 7], {1}, 1),
        ([5, 6, 7, 1], {1}, 4),
        ([5, 6, 7, 8], {1}, 4),
        ([5, 6, 7, 8], set(), 4),
        ([5, 1, 1, 1], {1}, 2),  # if pad and EOS are one id, only the first is an EOS
    ],
)
def test_the_mask_is_true_up_to_and_including_the_first_eos(ids, eos_ids, length):
    mask = opd.mask_through_eos(torch.tensor([ids]), eos_ids)
    assert mask.tolist() == [[t < length for t in range(4)]]


def test_the_generation_config_shipped_with_a_model_does_not_affect_sampling(monkeypatch):
    """Each setting would silently make the samples off-policy. The model keeps its config."""
    law = {"do_sample": True, "temperature": 0.1, "top_k": 1, "top_p": 0.3, "min_new_tokens": 9}
    more = {"repetition_penalty": 5.0, "suppress_tokens": [5, 6, 7], "forced_eos_token_id": 9}
    shipped = transformers.GenerationConfig(**law, **more, **TOKENS)
    monkeypatch.setattr(FLAT, "generation_config", shipped)
    before = shipped.to_dict()
    assert chi_square(first_tokens(FLAT), FLAT_LOGITS.softmax(-1)) < 50
    assert FLAT.generation_config is shipped and shipped.to_dict() == before


def test_sampling_divides_the_logits_by_the_temperature():
    law = (FLAT_LOGITS / 0.5).softmax(-1)
    assert chi_square(first_tokens(FLAT, temperature=0.5), law) < 50


def test_top_p_samples_from_the_fewest_likeliest_tokens_with_that_much_probability():
    p, order = FLAT_LOGITS.softmax(-1).sort(descending=True)
    fewest = int((p.cumsum(0) < 0.5).sum()) + 1
    law = torch.zeros(V).index_copy(0, order[:fewest], p[:fewest] / p[:fewest].sum())
    assert chi_square(first_tokens(FLAT, top_p=0.5), law) < 50


def test_sampling_is_not_limited_to_the_50_likeliest_tokens():
    """The default top_k of transformers is 50; here all 99 tokens get sampled."""
    counts = first_tokens(tiny_llama(0, vocab_size=99, initializer_range=0.02), vocab_size=99)
    assert (counts > 0).sum() == 99


def test_rows_of_the_head_that_are_not_tokens_are_never_sampled():
    """The distribution is the softmax over the first vocab_size rows, as in the loss."""
    counts = first_tokens(FLAT, vocab_size=6)
    assert len(counts) == 6 and chi_square(counts, FLAT_LOGITS[:6].softmax(-1)) < 25


@FAMILIES
def test_a_greedy_rollout_in_segments_with_rows_leaving_equals_one_uninterrupted_generate(family):
    model, (ids, mask) = family(1), prompts(2, 7, 3, 5, 4, 6)
    eos_ids = staggered_ends(model, ids, mask)
    out = roll(model, prompt=(ids, mask), eos_ids=eos_ids)
    assert out["response_ids"].tolist() == plain_generate(model, ids, mask, eos_ids, 12).tolist()


@FAMILIES
def test_padding_changes_neither_the_tokens_nor_the_teachers_hidden_states(family):
    student, teacher = family(1), family(2)
    lengths = (2, 7, 3, 5)
    together, (ids, mask) = roll(student, teacher, lengths), prompts(*lengths)
    for row, length in enumerate(lengths):
        alone = roll(student, teacher, prompt=(ids[[row], -length:], mask[[row], -length:]))
        n = alone["response_mask"].sum()
        assert together["response_ids"][row, :n].tolist() == alone["response_ids"][0, :n].tolist()
        states = together["teacher_hidden"][row]
        close(states, alone["teacher_hidden"][0], rtol=1e-3, atol=1e-4)


def test_the_seed_decides_what_is_sampled_except_at_temperature_zero():
    def ids(seed, temperature):
        torch.manual_seed(seed)
        return roll(STUDENT, temperature=temperature)["response_ids"].tolist()

    assert ids(0, 0) == ids(1, 0)
    assert ids(0, 1) == ids(0, 1) != ids(1, 1)


def test_the_top_k_recorded_while_sampling_is_that_of_a_full_forward_pass():
    ids, mask = prompts(4, 4)
    settings = {"max_new_tokens": 6, "vocab_size": 20, "eos_ids": {V}, "record_k": 5}
    new_ids, topk, _ = opd.generate(STUDENT, ids, mask, **settings)
    full = STUDENT(torch.cat([ids, new_ids], 1)).logits[:, 3:-1, :20]
    assert topk.tolist() == full.topk(5).indices.tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_recorded_log_prob_is_of_the_last_token_under_the_sampling_distribution(temperature):
    ids, mask = prompts(4, 4, 4)
    torch.manual_seed(0)
    settings = {"max_new_tokens": 5, "vocab_size": 20, "eos_ids": {V}, "temperature": temperature}
    new_ids, topk, log_probs = opd.generate(STUDENT, ids, mask, **settings)
    full = STUDENT(torch.cat([ids, new_ids], 1)).logits[:, -2, :20]
    law = (full / temperature).log_softmax(-1)
    close(log_probs, law.gather(-1, new_ids[:, -1:])[:, 0], rtol=1e-4, atol=1e-5)
    assert topk is None


def test_hidden_states_are_those_that_predict_the_last_columns():
    """The shift by one: the head turns each into the logits of a pass over the columns before."""
    ids, mask = prompts(9)
    got = opd.head_logits(STUDENT, opd.hidden_states(STUDENT, ids, mask, 4), V)
    for column, row in zip(range(5, 9), got[0]):
        close(row, STUDENT(ids[:, :column]).logits[0, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_head_logits_are_cut_divided_by_temperature_and_in_float32_or_better(dtype):
    wide = tiny_llama(0, vocab_size=V + 8).to(dtype)
    ids, _ = prompts(6)
    cut = opd.head_logits(wide, wide.base_model(ids).last_hidden_state, V, temperature=2.0)
    assert cut.dtype == torch.promote_types(dtype, torch.float32)
    close(cut, wide(ids).logits[..., :V].to(cut.dtype) / 2)


# Several stop tokens merged into one class


def test_merge_stops_sums_the_probabilities_of_all_stop_tokens_and_changes_no_other():
    z = logits(2, 3)
    p, merged = z.softmax(-1), opd.merge_stops(z, STOPS, 7).softmax(-1)
    close(merged[..., 7], p[..., 3] + p[..., 7] + p[..., 9])
    assert not merged[..., [3, 9]].any()
    others = [index for index in KEPT if index != 7]
    close(merged[..., others], p[..., others])


def test_merging_a_single_stop_token_returns_an_exact_copy_of_the_logits():
    z = logits(2, 3)
    merged = opd.merge_stops(z, {7}, 7)
    assert torch.equal(merged, z) and merged.data_ptr() != z.data_ptr()


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_gradients_with_merged_stops_are_those_of_classes_summed_by_hand(loss):
    z, t = logits(2, 5, seed=1).double(), logits(2, 5, seed=2).double()
    y = torch.tensor([[0, 1, 7, 2, 7], [7, 4, 5, 6, 23]])
    places = y.clone().apply_(KEPT.index)

    def merged(z):
        return LOSSES[loss](opd.merge_stops(z, STOPS, 7), opd.merge_stops(t, STOPS, 7), y)

    def classes(z):
        return LOSSES[loss](classes_of(z), classes_of(t), places)

    close(merged(z), classes(z))
    close(gradient(merged, z), gradient(classes, z))


def test_overlap_and_alignment_with_merged_stops_are_those_of_classes_summed_by_hand():
    z, t = logits(3, 9, seed=1).double(), logits(3, 9, seed=2).double()
    merged = opd.merge_stops(z, STOPS, 7), opd.merge_stops(t, STOPS, 7)
    by_hand = classes_of(z), classes_of(t)
    close(opd.topk_overlap(*merged, 4), opd.topk_overlap(*by_hand, 4))
    mask = torch.ones(3, 9)
    close(opd.alignment(*merged, mask, 4), opd.alignment(*by_hand, mask, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", LOSSES)
def test_merged_stops_of_probability_zero_make_no_loss_nan_and_leave_gradients_finite(loss, dtype):
    z, t = logits(1, 3, seed=1).to(dtype), logits(1, 3, seed=2).to(dtype)
    z[0, 0, sorted(STOPS)] = -torch.inf
    t[0, :2, sorted(STOPS)] = -torch.inf
    y = torch.tensor([[1, 7, 7]])
    t = opd.merge_stops(t, STOPS, 7)

    def merged(z):
        return LOSSES[loss](opd.merge_stops(z, STOPS, 7), t, y)

    assert not merged(z).isnan().any() and gradient(merged, z).isfinite().all()


def test_with_merged_stops_the_sampled_loss_has_the_gradient_of_reverse_kl_in_expectation():
    z, t = logits(1, 1, seed=1), opd.merge_stops(logits(1, 1, seed=2), STOPS, 7)

    def expected_k1(z):
        z = opd.merge_stops(z, STOPS, 7).expand(V, 1, V)
        k1 = opd.reverse_kl_sampled(z, t.expand(V, 1, V), torch.arange(V)[:, None])
        return z[0, 0].softmax(-1).detach() * k1[:, 0]

    def kl(z):
        return opd.reverse_kl(opd.merge_stops(z, STOPS, 7), t)

    close(gradient(expected_k1, z), gradient(kl, z), atol=1e-6, rtol=1e-4)


def test_a_teacher_with_another_stop_token_unteaches_stopping_unless_stops_are_merged():
    """One logit of log 23 among 23 of 0 has probability 1/2: the student stops by token 3, the
    teacher by 7."""
    z, t = torch.zeros(V), torch.zeros(V)
    z[3] = t[7] = math.log(V - 1)

    def stop_probability(z):
        return z.softmax(-1)[sorted(STOPS)].sum()

    merged_t = opd.merge_stops(t, STOPS, 7)
    apart = gradient(lambda z: opd.reverse_kl(z, t), z)
    merged = gradient(lambda z: opd.reverse_kl(opd.merge_stops(z, STOPS, 7), merged_t), z)
    assert stop_probability(z - 0.1 * apart) < stop_probability(z) - 0.01
    close(stop_probability(z - 0.1 * merged), stop_probability(z), atol=1e-3, rtol=0)


def test_with_a_stop_id_generate_samples_from_and_records_the_merged_distribution():
    """Of 4000 first tokens, those with the one id have the summed share of all stop tokens."""
    ids, mask = prompts(4)
    settings = {**SAMPLING, "eos_ids": STOPS, "stop_id": 7, "temperature": 2.0}
    ids, mask = ids.expand(4000, -1), mask.expand(4000, -1)
    new, topk, log_probs = opd.generate(
        STUDENT, ids, mask, max_new_tokens=1, record_k=4, **settings
    )
    law = opd.merge_stops(STUDENT(ids[:1]).logits[0, -1] / 2, STOPS, 7).log_softmax(-1)
    assert chi_square(torch.bincount(new[:, 0], minlength=V), law.exp()) < 50
    close(log_probs, law[new[:, 0]])
    assert topk[0, 0].tolist() == law.topk(4).indices.tolist()


def test_with_a_stop_id_rows_end_with_it_alone_and_overlap_is_that_of_merged_logits():
    told = {"eos_ids": STOPS, "stop_id": 7, "temperature": 1.5, "max_length": 24}
    out = roll(STUDENT, TEACHER, lengths=LENGTHS * 4, **told)
    is_stop = torch.isin(out["response_ids"], torch.tensor(sorted(STOPS)))
    ends = out["response_ids"][out["response_mask"] & is_stop]
    assert len(ends) == out["ended"].sum() > 4 and (ends == 7).all()
    for row, (ids, prompt) in enumerate(rows_of(out)):
        z, t = (opd.merge_stops(m(ids).logits / 1.5, STOPS, 7) for m in (STUDENT, TEACHER))
        expected = opd.topk_overlap(z, t, 4)[0, prompt - 1 : -1]
        close(out["overlap"][row][out["response_mask"][row]], expected)


# --------------------------------------------------------------------------------------------------
# 6. Rollout: write (sample), judge (score), choose which rows go on, leave (drop the others)


def test_the_overlap_of_every_row_of_a_rollout_is_topk_overlap_on_full_logits(monkeypatch):
    """Also for rows that ended while others ran on: after their EOS it is 0."""
    monkeypatch.setattr(opd, "tokens_at_once", lambda vocab_size: 5)  # judge works in parts
    out = roll(STUDENT, TEACHER, eos_ids=ENDS)
    assert 0 < out["ended"].sum() < 4
    for row, (ids, prompt) in enumerate(rows_of(out)):
        full = opd.topk_overlap(STUDENT(ids).logits, TEACHER(ids).logits, 4)
        expected = full[0, prompt - 1 : -1].tolist()
        assert out["overlap"][row].tolist() == expected + [0] * (12 - len(expected))


def test_the_overlap_ignores_rows_of_the_heads_that_are_not_tokens():
    """Both heads have 8 extra rows, the likeliest: if only one were cut, the overlap would be 0."""
    student, teacher = (tiny_llama(seed, vocab_size=V + 8) for seed in (1, 2))
    for model in (student, teacher):
        model.lm_head.weight.data[V:] *= 9
    out = roll(student, teacher, eos_ids={V})
    for row, (ids, prompt) in enumerate(rows_of(out)):
        z, t = student(ids).logits[..., :V], teacher(ids).logits[..., :V]
        expected = opd.topk_overlap(z, t, 4)[0, prompt - 1 : -1]
        assert out["overlap"][row].tolist() == expected.tolist()


def test_the_teachers_hidden_states_are_those_of_each_row_alone():
    """Alone: in a pass without a cache, without padding, without other rows."""
    out = roll(STUDENT, TEACHER, eos_ids=ENDS)
    for (ids, prompt), states in zip(rows_of(out), out["teacher_hidden"]):
        expected = TEACHER.model(ids).last_hidden_state[0, prompt - 1 : -1]
        close(states, expected, rtol=1e-3, atol=1e-4)


def test_top_p_narrows_what_a_rollout_samples_but_not_its_overlap_and_log_probs():
    """All tokens that are likelier than a sampled one have together less than top_p."""
    torch.manual_seed(0)
    out = roll(STUDENT, TEACHER, temperature=1.0, top_p=0.5, eos_ids={V})
    for row, (ids, prompt) in enumerate(rows_of(out)):
        z, t = (model(ids).logits[0, prompt - 1 : -1] for model in (STUDENT, TEACHER))
        p, sampled = z.softmax(-1), ids[0, prompt:, None]
        likelier = p > p.gather(-1, sampled)
        assert ((p * likelier).sum(-1) < 0.5).all()
        close(out["overlap"][row], opd.topk_overlap(z, t, 4))
        log_probs = z.log_softmax(-1).gather(-1, sampled)[3::4, 0]
        close(out["log_probs"][row, 3::4], log_probs, rtol=1e-4, atol=1e-5)


def test_an_eos_that_is_also_the_pad_id_stays_once_at_the_end_of_the_response():
    ids, mask = prompts(2, 7, 3, 5)
    end = plain_generate(STUDENT, ids, mask, {V}, 12)[0, 2].item()
    out = roll(STUDENT, prompt=(ids, mask), eos_ids={end}, pad_id=end)
    responses = without_padding(out["response_ids"], out["response_mask"])
    assert responses[0][-1] == end and responses[0].count(end) == 1
    assert [row[-1] == end for row in responses] == out["ended"].tolist()


def test_log_probs_are_recorded_at_the_last_token_of_each_full_segment_and_nowhere_else():
    """A row that ended within a segment has none there: at its border there is padding."""
    out = roll(STUDENT, TEACHER, eos_ids=ENDS, segment_length=3)
    mask = out["response_mask"]
    at_border = torch.tensor([column % 3 == 2 for column in range(mask.shape[1])])
    assert not mask[:, -1].all() and mask.shape[1] == 12
    assert torch.equal(~out["log_probs"].isnan(), mask & at_border)
    for row, log_probs in enumerate(opd.response_log_probs(STUDENT, out, V)):
        close(out["log_probs"][row][mask[row] & at_border], log_probs[2::3], rtol=1e-4, atol=1e-5)


MODELS = pytest.mark.parametrize("model", [STUDENT, TEACHER], ids=["student", "teacher"])


@MODELS
def test_each_model_computes_every_column_but_the_last_once(model):
    """5 columns of prompt and 12 of response; the last one predicts nothing."""
    shapes, stop = forward_shapes(model)
    roll(STUDENT, TEACHER, eos_ids={V})
    stop()
    assert sum(columns for _, columns in shapes) == 5 + 12 - 1
    assert {rows for rows, _ in shapes} == {4}


@MODELS
def test_a_prompt_is_prefilled_once_for_all_its_candidates(model):
    """Prompts of five and four tokens, three candidates each; prefill omits the last column."""
    ids, mask = prompts(5, 4)
    order = torch.tensor([0, 0, 0, 1, 1, 1])
    shapes, stop = forward_shapes(model)
    together = roll(STUDENT, TEACHER, prompt=(ids[order], mask[order]), eos_ids={V})
    stop()
    assert shapes[0] == (2, 4) and {rows for rows, _ in shapes[1:]} == {6}
    apart = roll(STUDENT, TEACHER, prompt=(ids, mask), eos_ids={V})
    assert together["response_ids"].tolist() == apart["response_ids"][order].tolist()
    assert together["overlap"].tolist() == apart["overlap"][order].tolist()


@MODELS
def test_rows_that_have_ended_leave_the_cache_at_the_next_border(model):
    """Of four rows one ends in the first segment and one in the second."""
    shapes, stop = forward_shapes(model)
    lengths = roll(STUDENT, TEACHER, eos_ids=ENDS)["response_mask"].sum(-1)
    stop()
    running = {int((lengths > border).sum()) for border in (0, 4, 8)}
    assert {rows for rows, _ in shapes} == running and len(running) == 3


def test_at_each_border_a_rule_gets_all_rows_and_a_row_that_it_stops_stays_stopped():
    """Row 0 is stopped at 4 tokens; that the rule returns True later does not restart it."""
    seen = []

    def rule(length, overlap, mask, ended):
        seen.append((length, *overlap.shape, *mask.shape, *ended.shape))
        return torch.tensor([length > 4, True, True, True])

    out = roll(STUDENT, TEACHER, eos_ids={V}, goes_on=rule)
    assert seen == [(length, 4, length, 4, length, 4) for length in (4, 8, 12)]
    assert out["kept"].tolist() == [False, True, True, True] and not out["ended"].any()
    assert out["response_mask"].sum(-1).tolist() == [4, 12, 12, 12]


def test_rows_that_have_ended_count_as_kept_whatever_the_rule_returns():
    """The rule is given which rows have ended, and returns False for all."""
    told = []

    def rule(length, overlap, mask, ended):
        told.append(ended.tolist())
        return torch.zeros(4).bool()

    out = roll(STUDENT, TEACHER, eos_ids=ENDS, goes_on=rule)
    assert told == [out["ended"].tolist()] == [out["kept"].tolist()] and out["ended"].any()
    assert out["response_mask"].shape == (4, 4)  # no row is left after the first border


# --------------------------------------------------------------------------------------------------
# 7. Update


@pytest.mark.parametrize("loss", LOSSES)
@FAMILIES
def test_loss_and_gradients_equal_autograd_on_full_logits_and_the_teacher_has_none(family, loss):
    student, teacher = family(1), family(2)
    batch = make_batch(student, teacher)
    metrics, grads = update(student, teacher, batch, loss)
    expected, plain = plain_gradients(student, teacher, batch, loss)
    assert metrics["loss"] == pytest.approx(expected, rel=1e-4)
    assert_same(grads, plain, tolerance=3e-6)
    assert gradients_of(teacher) == {}


MASKS = {"a hole": [0, 1, 2, 6, 7, 8, 9, 10, 11], "the tail": range(2, 12), "the prefix": range(3)}


@pytest.mark.parametrize("where", MASKS)
def test_the_update_trains_on_the_tokens_of_the_loss_mask_with_others_as_context(where):
    """Other tokens are context only: they have no loss and do not count in the mean."""
    student = tiny_llama(1)
    batch = make_batch(student, TEACHER)
    columns = torch.isin(torch.arange(12), torch.tensor(MASKS[where]))
    batch["loss_mask"] = columns & batch["response_mask"]
    batch["loss_mask"][2] = False  # a row with nothing to learn
    metrics, grads = update(student, TEACHER, batch)
    expected, plain = plain_gradients(student, TEACHER, batch)
    assert metrics["num_tokens"] == batch["loss_mask"].sum() > 0
    assert metrics["loss"] == pytest.approx(expected, rel=1e-4)
    assert_same(grads, plain, tolerance=3e-6)


def test_a_loss_mask_that_covers_padding_does_not_train_on_it():
    student = tiny_llama(1)
    batch = make_batch(student, TEACHER)
    expected = update(student, TEACHER, batch)
    batch["loss_mask"] = torch.ones_like(batch["response_mask"])
    assert not batch["response_mask"].all()
    assert_same(update(student, TEACHER, batch)[1], expected[1])


def test_train_step_without_a_token_to_train_on_changes_nothing():
    student = tiny_llama(1)
    batch = make_batch(student, TEACHER)
    batch["loss_mask"] = torch.zeros_like(batch["response_mask"])
    before = copy.deepcopy(student.state_dict())
    assert update(student, TEACHER, batch, lr=1.0) == ({}, {})
    assert_same(student.state_dict(), before, tolerance=0)


@pytest.mark.parametrize(
    "change",
    [{"micro_batch_size": 1}, {"micro_batch_size": 3}, {"chunk_tokens": 1}, {"chunk_tokens": 5}],
    ids=str,
)
def test_the_update_does_not_depend_on_micro_batch_size_or_chunk_tokens(change):
    """The mean is over the step: one per micro-batch would favour the tokens of short rows."""
    student = tiny_llama(1)
    batch = make_batch(student, TEACHER)
    assert len(set(batch["loss_mask"].sum(-1).tolist())) > 1
    whole, expected = update(student, TEACHER, batch, micro_batch_size=4, chunk_tokens=99)
    pieces, grads = update(student, TEACHER, batch, **change)
    assert_same(grads, expected)
    assert pieces == pytest.approx(whole, rel=1e-4)


def test_the_loss_gets_every_response_token_once_including_eos_but_no_prompt_or_padding():
    student, seen = tiny_llama(1), []
    batch = make_batch(student, TEACHER)

    def token_loss(student_logits, teacher_logits, ids):
        seen.extend(ids.tolist())
        return opd.reverse_kl(student_logits, teacher_logits)

    metrics, _ = update(student, TEACHER, batch, token_loss)
    assert sorted(seen) == sorted(batch["response_ids"][batch["response_mask"]].tolist())
    assert sum(token in (2, 3) for token in seen) == batch["ended"].sum() > 0
    assert metrics["num_tokens"] == len(seen)


def test_a_measure_is_the_plain_mean_over_tokens_whatever_their_chunk_and_weight():
    """One chunk has all tokens but one; token_weight applies to the loss, not to measures."""
    student, values = tiny_llama(1), []
    batch = make_batch(student, TEACHER)
    for ids, prompt in rows_of(batch):
        z, t = student(ids).logits[0, prompt - 1 : -1], TEACHER(ids).logits[0, prompt - 1 : -1]
        values += opd.reverse_kl(z, t).tolist()
    chunks = {"micro_batch_size": 9, "chunk_tokens": len(values) - 1}
    metrics, _ = update(student, TEACHER, batch, **chunks)
    assert metrics["reverse_kl"] == pytest.approx(sum(values) / len(values), rel=1e-4)


def test_the_gradient_on_the_prefix_of_a_full_rollout_is_that_on_a_truncated_rollout():
    """So a prefix method need not sample what it does not train on."""
    student = tiny_llama(1)
    full = make_batch(student, TEACHER, eos_ids={V})
    prefix = make_batch(student, TEACHER, eos_ids={V}, max_length=4)
    prefix["token_weight"] = full["token_weight"][:, :4]
    full["loss_mask"] = full["response_mask"] & (torch.arange(12) < 4)
    assert_same(update(student, TEACHER, full)[1], update(student, TEACHER, prefix)[1])


@pytest.mark.parametrize("loss", LOSSES)
def test_the_logits_of_all_tokens_never_exist_at_once(loss, monkeypatch):
    """Only those of 60 of the 320 tokens, both in judge and in the update."""
    wide = 2000
    monkeypatch.setattr(opd, "tokens_at_once", lambda vocab_size: 60)
    student, teacher = (tiny_qwen3(seed, vocab_size=wide) for seed in (1, 2))
    settings = {"vocab_size": wide, "max_length": 80, "segment_length": 40, "eos_ids": set()}
    heads = {
        "student_head": lambda hidden: opd.head_logits(student, hidden, wide),
        "teacher_head": lambda hidden: opd.head_logits(teacher, hidden, wide),
    }
    with LargestTensor() as largest:
        batch = make_batch(student, teacher, **settings)
        update(student, teacher, batch, loss, micro_batch_size=4, chunk_tokens=60, **heads)
    assert batch["loss_mask"].sum() == 320 and largest.numel == 60 * wide


@pytest.mark.parametrize("loss", LOSSES)
def test_a_student_equal_to_its_teacher_has_zero_loss_and_gradient_and_full_overlap(loss):
    student, teacher = tiny_llama(1), tiny_llama(1)
    metrics, _ = update(student, teacher, make_batch(student, teacher), loss)
    assert abs(metrics["loss"]) < 1e-5 and metrics["grad_norm"] < 1e-3
    assert metrics["overlap_ratio"] == 1 and abs(metrics["reverse_kl"]) < 1e-5


NOT_FINITE = {
    "a loss of NaN": lambda z, t, y: opd.reverse_kl(z, t) + math.nan,
    "an infinite gradient": lambda z, t, y: (z - z.detach()).sum(-1) * 3e38,
}


@pytest.mark.parametrize("what", NOT_FINITE)
def test_a_loss_or_gradient_that_is_not_finite_raises_before_any_weight_changes(what):
    student = tiny_llama(1)
    batch, before = make_batch(student, TEACHER), copy.deepcopy(student.state_dict())
    with pytest.raises(FloatingPointError):
        update(student, TEACHER, batch, NOT_FINITE[what], lr=1.0)
    assert_same(student.state_dict(), before, tolerance=0)


def test_an_infinite_norm_of_finite_gradients_raises_before_any_weight_changes():
    """Two gradients of 3e38 have a norm of 4e38, more than float32 holds."""
    layer = torch.nn.Linear(2, 1, bias=False)
    before = layer.weight.tolist()
    layer.weight.grad = torch.full((1, 2), 3e38)
    with pytest.raises(FloatingPointError):
        opd.optimizer_step(layer, torch.optim.SGD(layer.parameters(), lr=1.0), 1.0)
    assert layer.weight.tolist() == before


@pytest.mark.parametrize("max_grad_norm", [0.5, 1e9])
def test_an_sgd_step_is_the_rate_times_the_clipped_norm_long_and_lowers_the_loss(max_grad_norm):
    """The norm that is reported is the one before clipping."""
    student = tiny_llama(1)
    batch, before = make_batch(student, TEACHER), copy.deepcopy(student)
    metrics, _ = update(student, TEACHER, batch, lr=1e-4, max_grad_norm=max_grad_norm)
    norm = torch.cat(
        [g.flatten() for g in plain_gradients(before, TEACHER, batch)[1].values()]
    ).norm()
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    moved = [b - a for a, b in zip(before.parameters(), student.parameters())]
    length = torch.cat([part.flatten() for part in moved]).norm()
    assert length.item() == pytest.approx(1e-4 * min(norm.item(), max_grad_norm), rel=1e-2)
    assert update(student, TEACHER, batch)[0]["loss"] < metrics["loss"]


# --------------------------------------------------------------------------------------------------
# 8. The loop


@pytest.mark.parametrize(
    "changes, lengths",
    [
        ({"method": "opd"}, [12, 12, 12, 12]),
        ({"method": "prefix"}, [6, 6, 6, 6]),
        ({"method": "prefix", "prefix_length": 99}, [12, 12, 12, 12]),
        ({"method": "prefix", "prefix_length": 0, "max_new_tokens": 2000}, [1024] * 4),
        ({"method": "progressive"}, [4, 8, 12, 12]),
        ({"method": "progressive", "horizon_start": 2}, [2, 6, 10, 12]),
        ({"method": "progressive", "horizon_growth": 1}, [4, 5, 6, 7]),
        ({"method": "progressive", "horizon_every": 2}, [4, 4, 8, 8]),
        ({"method": "prefix-guided"}, [12, 12, 12, 12]),
        ({"method": "prune"}, [8, 8, 8, 8]),
        ({"method": "prune", "max_new_tokens": 5}, [5, 5, 5, 5]),
    ],
    ids=str,
)
def test_in_steps_1_to_4_each_method_samples_up_to_the_length_that_its_flags_give(changes, lengths):
    """Of small runs: 12 tokens, a prefix of 6, a horizon of 4 and 4 more each step. For prune it is
    the cap, here 8, but at most --max_new_tokens."""
    plans = [opd.plan_rollout(flags(**changes), step, cap=8) for step in (1, 2, 3, 4)]
    assert [plan.max_length for plan in plans] == lengths


@pytest.mark.parametrize("prefix_length, look_at", [(70, 70), (0, 128)])
def test_prefix_guided_has_one_more_border_at_the_end_of_its_prefix(prefix_length, look_at):
    changes = {"prefix_length": prefix_length, "max_new_tokens": 300, "segment_length": 100}
    plan = opd.plan_rollout(flags(method="prefix-guided", **changes), 1, cap=8)
    assert plan.borders() == sorted([look_at, 100, 200, 300])


SCORES = [[0.9, 0.8], [0.2, 0.1], [0.6, 0.7]]


@pytest.mark.parametrize("keep_ratio, kept", [(0.5, 3), (0.7, 4), (0.8, 5), (1.0, 6)])
def test_prefix_guided_rounds_keep_ratio_to_whole_rows_and_selects_by_overlap(keep_ratio, kept):
    """Of six rows, 4.2 becomes four and 4.8 five; select_prefixes says which."""
    keep = chosen(SCORES, keep_ratio=keep_ratio)
    assert keep.tolist() == opd.select_prefixes(torch.tensor(SCORES), kept).tolist()


def test_prefix_guided_keeps_a_candidate_of_every_prompt_however_low_keep_ratio_is():
    assert chosen(SCORES, keep_ratio=0.1).sum(1).tolist() == [1, 1, 1]


@pytest.mark.parametrize("probe_window, first_is_better", [(4, True), (5, True), (12, False)])
def test_prefix_guided_selects_by_mean_overlap_in_the_probe_window(probe_window, first_is_better):
    """The first four tokens favour the first candidate, the eight after them the second: in a
    window of 5 the means are .56 and .50, in one of 12 they are .47 and .50."""
    flags_of_it = {"border": 12, "prefix_length": 12, "probe_window": probe_window}
    keep = chosen([[0.6, 0.5]], ended=(0, 0), keep_ratio=0.5, **flags_of_it)
    assert keep.tolist() == [[first_is_better, not first_is_better]]


def test_prefix_guided_selects_at_the_end_of_the_prefix_and_at_no_other_border():
    for border, kept in ((4, 6), (6, 3), (8, 6), (12, 6)):
        assert chosen(SCORES, border=border).sum() == kept


def test_rows_that_ended_within_the_prefix_take_no_slot_from_running_rows():
    """The best row has ended; .6 of eight rows is five slots, which go to five others."""
    score = [[0.9, 0.8, 0.7, 0.6], [0.5, 0.4, 0.3, 0.2]]
    keep = chosen(score, ended=[1, 0, 0, 0, 0, 0, 0, 0], keep_ratio=0.6)
    assert keep[0, 1:].all() and keep[1].tolist() == [True, True, False, False]


def test_a_prompt_whose_candidates_have_all_ended_takes_no_slot_from_the_others():
    """Half of six rows is three slots: the best of both other prompts, and .6."""
    keep = chosen(SCORES, ended=[1, 1, 0, 0, 0, 0], keep_ratio=0.5)
    assert keep[1:].tolist() == [[True, False], [True, True]]


def test_at_keep_ratio_1_a_prompt_that_has_ended_adds_no_slot_beyond_all_rows():
    """A ratio of 1 gives six slots for six rows; the additional one would be a seventh."""
    assert chosen(SCORES, ended=[1, 1, 0, 0, 0, 0], keep_ratio=1.0).all()


def test_random_selection_keeps_as_many_rows_and_one_per_prompt_regardless_of_overlap():
    torch.manual_seed(0)
    kept = torch.stack([chosen(SCORES, keep_ratio=0.7, select="random") for _ in range(100)])
    assert (kept.sum((1, 2)) == 4).all() and kept.any(2).all()
    share = kept.double().mean(0)
    assert share.min() > 0.5 and share.max() < 0.85  # 2/3 for each: overlap does not count


def test_random_selection_gives_no_slot_to_rows_that_have_ended():
    """Half of eight rows go on: the four that still run, whatever is drawn."""
    torch.manual_seed(0)
    for _ in range(10):
        keep = chosen([[0.5] * 4] * 2, ended=[1, 1, 0, 0] * 2, keep_ratio=0.5, select="random")
        assert keep[:, 2:].all()


def test_a_prefix_guided_rollout_continues_the_rows_that_its_own_overlap_selects():
    plan = opd.plan_rollout(flags(method="prefix-guided", keep_ratio=0.7), 1, cap=8)
    torch.manual_seed(0)
    changes = {"eos_ids": {V}, "temperature": 1.0, "look_at": plan.look_at}
    out = roll(STUDENT, TEACHER, [3] * 6, goes_on=plan.goes_on, **changes)
    score = out["overlap"][:, :4].mean(-1).view(3, 2)
    assert out["kept"].tolist() == opd.select_prefixes(score, 4).flatten().tolist()
    lengths = [12 if kept else 6 for kept in out["kept"]]
    assert out["response_mask"].sum(-1).tolist() == lengths


DRIFT = {"method": "prune", "drift_threshold": 1.1, "w_drop": 0.25}  # every token is bad


@pytest.mark.parametrize(
    "changes, length",
    [
        ({}, 6),
        ({"w_drop": 0.2}, 6),
        ({"w_drop": 0.15}, 9),
        ({"drift_threshold": 0}, 12),
        ({"no_prune_in_flight": True}, 12),
    ],
    ids=str,
)
def test_prune_stops_rows_at_the_first_border_where_their_reliability_is_zero(changes, length):
    """It is zero from token 4, 5 or 7 on; the borders are at 3, 6, 9 and 12."""
    rule = opd.plan_rollout(flags(**{**DRIFT, **changes}), 1, cap=12).goes_on
    out = roll(STUDENT, TEACHER, eos_ids={V}, segment_length=3, goes_on=rule)
    assert out["response_mask"].sum(-1).tolist() == [length] * 4
    assert out["kept"].tolist() == [length == 12] * 4


def test_the_readmes_rule_keeps_rows_while_16_tokens_agree(world, tmp_path, monkeypatch, updates):
    """Rows go on exactly while their last 16 tokens, or all if fewer, overlap by more than half on
    average. Here the top 12 of 24 tokens are compared, so that about every second row does."""
    readme = pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    (code,) = [block for block in blocks if "opd.plan_rollout = plan" in block]
    changes = {"overlap_k": 12, "max_new_tokens": 32, "segment_length": 8, "temperature": 2}
    changes |= {"batch_size": 8, "num_generations": 16, "max_steps": 1, "eval_file": None}
    small = partial(opd.main, command(world, tmp_path, **changes))
    monkeypatch.setattr(opd, "main", lambda argv: small())  # with these flags, not the README's
    monkeypatch.setattr(opd, "plan_rollout", opd.plan_rollout)  # so it is put back after the test
    exec(code, {})
    out = updates[0][1]
    lengths = out["response_mask"].sum(-1)
    # At each border some rows were stopped, and of all rows those that the rule names
    assert {8, 16, 24} <= {*lengths[~out["kept"]].tolist()} <= {8, 16, 24, 32}
    for border in (8, 16, 24, 32):
        agree = out["overlap"][:, max(0, border - 16) : border].mean(-1) > 0.5
        assert agree[lengths > border].all()  # they went on
        assert not agree[~out["kept"] & (lengths == border)].any()  # they were stopped


OUT = {  # two rows; the method stopped the second
    "overlap": torch.tensor([[1.0, 0.4, 0.6, 0], [0.4, 0.4, 0, 0]]),
    "response_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool(),
    "kept": torch.tensor([True, False]),
}


@pytest.mark.parametrize(
    "changes, weight, learned",
    [
        ({"method": "opd"}, [[1, 1, 1], [1, 1]], [3, 2]),
        ({"method": "prefix-guided"}, [[1, 1, 1], [1, 1]], [3, 0]),
        ({"method": "prefix-guided", "train_pruned_prefix": True}, [[1, 1, 1], [1, 1]], [3, 2]),
        ({"method": "prune", "w_drop": 0.25}, [[1.5, 1.25, 1], [1.25, 1]], [3, 2]),
        ({"method": "prune", "w_drop": 0.5, "w_base": 0}, [[1, 0.5, 0], [0.5, 0]], [3, 2]),
        (
            {"method": "prune", "w_drop": 0.25, "drift_threshold": 0.5},
            [[1.5, 1.25, 1.25], [1.25, 1]],
            [3, 2],
        ),
    ],
    ids=str,
)
def test_method_and_flags_decide_what_is_trained_on_and_with_what_weights(changes, weight, learned):
    weights, loss_mask = opd.token_weights(flags(**changes), OUT)
    got = [row[valid].tolist() for row, valid in zip(weights, OUT["response_mask"])]
    assert got == [pytest.approx(row) for row in weight]
    assert loss_mask.sum(-1).tolist() == learned


def test_the_misses_of_the_cap_are_counted_across_steps(world, tmp_path):
    """Every token is bad, so all steps miss: after every second the cap, at first 8, falls by 2."""
    changes = {"method": "prune", "cap_patience": 2, "max_steps": 5, "eval_file": None}
    steps = train(world, tmp_path, **changes, drift_threshold=1.1, w_drop=1)[1]
    assert [step["max_length"] for step in steps] == [8, 8, 6, 6, 4]
    assert [step["misses"] for step in steps] == [1, 0, 1, 0, 1]


def test_each_step_samples_from_the_weights_the_last_one_left(world, tmp_path, monkeypatch, runs):
    """With bfloat16 the sampler is a rounded copy of the student, whose own weights are float32."""
    sampled_with = []
    rollout = opd.rollout_in_groups

    def watched(sampler, *args, **settings):
        if runs:  # not yet in the preflight
            sampled_with.append(copy.deepcopy(sampler.state_dict()))
            for name, value in runs[0].student.state_dict().items():
                assert value.dtype == torch.float32
                assert torch.equal(sampled_with[-1][name], value.bfloat16()), name
        return rollout(sampler, *args, **settings)

    def jump(weights, anchor, validate):
        return {name: value + 0.1 for name, value in weights.items()}, 1, [validate(weights)]

    monkeypatch.setattr(opd, "rollout_in_groups", watched)
    monkeypatch.setattr(opd, "extrapolate", jump)
    train(world, tmp_path, dtype="bfloat16", extrapolate=True, max_steps=4, eval_file=None)
    # After step 2 the weights are extrapolated (by .1), after step 3 they are not
    weights = [state["model.layers.0.mlp.up_proj.weight"] for state in sampled_with]
    assert len(weights) == 4
    assert (weights[2] - weights[1]).mean() > 0.09
    assert not torch.equal(weights[2], weights[3])


def test_the_rate_warms_up_and_the_one_logged_is_used(world, tmp_path):
    used = []
    hook = register_optimizer_step_pre_hook(
        lambda adam, *_: used.append(adam.param_groups[0]["lr"])
    )
    changes = {"warmup_steps": 2, "learning_rate": 0.008, "max_steps": 3}
    steps = train(world, tmp_path, eval_file=None, **changes)[1]
    hook.remove()
    assert [line["learning_rate"] for line in steps] == used == [0.004, 0.008, 0.008]


def test_each_step_of_a_run_clips_at_max_grad_norm_and_no_weight_decays(world, tmp_path):
    norms, decays = [], []

    def note(optimizer, *_):
        (group,) = optimizer.param_groups
        norms.append(torch.cat([weight.grad.flatten() for weight in group["params"]]).norm().item())
        decays.append(group["weight_decay"])

    hook = register_optimizer_step_pre_hook(note)
    train(world, tmp_path, eval_file=None, max_grad_norm=0.01)
    hook.remove()
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3) and decays == [0, 0]


def test_extrapolation_runs_at_powers_of_two_and_its_samples_count_as_generated(world, tmp_path):
    _, steps, _ = train(world, tmp_path, extrapolate=True, max_steps=5, eval_file=None)
    assert [line["step"] for line in steps if "extrapolation_k" in line] == [1, 2, 4]
    first = steps[0]
    # The teacher reads all that is sampled to train on, and none of what is sampled to validate
    assert first["generated_tokens"] == first["teacher_tokens"] + first["validation_tokens"]
    assert first["validation_tokens"] > 0 and first["time_validation"] > 0


def test_rejected_tries_do_not_change_the_losses(world, tmp_path, first_run, monkeypatch):
    monkeypatch.setattr(opd, "is_correct", lambda text, gold: False)  # no try is ever better
    steps = train(world, tmp_path, extrapolate=True, max_steps=4)[1]
    assert [line["loss"] for line in steps] == [line["loss"] for line in first_run[2]]
    accepted = {line["step"]: line.get("extrapolation_k") for line in steps}
    assert accepted == {1: 0, 2: 0, 3: None, 4: 0}  # after step 3 nothing is tried


def test_accepted_weights_become_the_next_anchor_and_student(world, tmp_path, monkeypatch, runs):
    """Otherwise each try would repeat the extrapolations before it. The first anchor is the
    initial student."""
    start = transformers.AutoModelForCausalLM.from_pretrained(world / "student")
    accepted, anchors = [opd.movable_weights(start)], []

    def jump(weights, anchor, validate):
        anchors.append(anchor)
        accepted.append({name: value + 0.01 for name, value in weights.items()})
        return accepted[-1], 1, [0.0, validate(weights)]

    monkeypatch.setattr(opd, "extrapolate", jump)
    train(world, tmp_path, extrapolate=True, max_steps=4, eval_file=None)
    assert len(anchors) == 3
    for anchor, expected in zip(anchors, accepted):
        assert_same(anchor, expected, tolerance=0)
    assert_same(opd.movable_weights(runs[0].student), accepted[-1], tolerance=0)


# --------------------------------------------------------------------------------------------------
# 9. Evaluation


@pytest.mark.parametrize(
    "text, content",
    [
        (r"\boxed{1} no, \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{2", "1"),
        ("42", None),
        (r"\boxed{ \{1,2\} }", r" \{1,2\} "),
        (r"\boxed {3}", "3"),
        (r"\boxed{}", ""),
        (r"\boxed{\left\{ 1 \right)}", r"\left\{ 1 \right)"),
    ],
)
def test_last_boxed_is_the_content_of_the_last_box_that_closes(text, content):
    assert opd.last_boxed(text) == content


@pytest.mark.parametrize(
    "response, gold, right",
    [
        (r"so \boxed{33}", "33", True),
        ("so 33", "33", False),
        (r"so \boxed{33", "33", False),
        (r"\boxed{33} no, \boxed{34}", "33", False),
        (r"\boxed{34} no, \boxed{33}", "33", True),
        (r"<think>\boxed{33}</think> 34", "33", False),
        (r"<think>\boxed{34}</think> \boxed{33}", "33", True),
    ],
)
def test_only_the_last_box_after_any_thoughts_is_graded(response, gold, right):
    assert opd.is_correct(response, gold) is right


@pytest.mark.parametrize(
    "boxed, gold, right",
    [
        (" $3 3$ ", r"\boxed{33}", True),
        ("0.5", r"\frac{1}{2}", True),
        ("(1,2)", "1<x<2", True),
        ("1<x<2", "(1,2)", False),  # math-verify is not symmetric: a point is no interval
    ],
)
def test_an_answer_is_compared_with_the_gold_one_as_mathematics(boxed, gold, right):
    opd.ask_math_verify("1", "2", seconds=60)  # the first call takes longer than others
    assert opd.is_correct(rf"\boxed{{{boxed}}}", gold) is right


def test_pass_at_k_is_the_share_of_all_draws_of_k_that_contain_a_right_answer():
    for n, c, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if c <= n and k <= n:
            draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert opd.pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize("n, c, k", [(4, 0, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_refuses_k_outside_1_to_n_and_c_outside_0_to_n(n, c, k):
    with pytest.raises(ValueError):
        opd.pass_at_k(n, c, k)


def test_auroc_is_the_share_of_pairs_that_the_right_answer_wins_with_a_tie_as_half():
    """Right .9 and .4, wrong .4 and .1: of four pairs three are won and one is tied."""
    assert opd.auroc([0.9, 0.4, 0.4, 0.1], [True, False, True, False]) == 3.5 / 4
    assert opd.auroc([0.1, 0.9], [1, 0]) == 0  # numbers for True and False


def test_auroc_is_nan_if_all_are_right_or_all_are_wrong_or_a_score_is_missing():
    assert math.isnan(opd.auroc([0.1, 0.2], [True, True]))
    assert math.isnan(opd.auroc([0.1, 0.2], [False, False]))
    for missing in (math.nan, None):
        assert math.isnan(opd.auroc([0.1, 0.9, missing], [True, False, True]))


def test_auroc_of_100_000_answers_needs_less_than_100_mb():
    """All pairs at once would take 20 GB. Of n right answers the i-th beats i of n wrong ones."""
    tracemalloc.start()
    n = 50_000
    assert opd.auroc(range(2 * n), [0, 1] * n) == pytest.approx((n + 1) / (2 * n))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


def test_a_summary_averages_over_answers_but_its_error_and_pass_rate_are_over_problems():
    """Four problems, two answers each, 2, 1, 0 and 0 of them right: .375 of all, and half pass."""
    answers = []
    for index, correct in enumerate([1, 1, 0, 1, 0, 0, 0, 0]):
        facts = {"truncated": index < 2, "no_box": index < 4, "repetition": index > 6}
        answers.append({"correct": bool(correct), "length": index, "reward": -index, **facts})
    got = opd.summarise(answers, 2)
    assert got["se"] == pytest.approx(torch.tensor([1, 0.5, 0, 0]).std().item() / 2)
    assert (got["avg_at_n"], got["pass_at_n"], got["n"], got["num_problems"]) == (0.375, 0.5, 2, 4)
    assert (got["mean_length"], got["mean_reward"], got["truncated_fraction"]) == (3.5, -3.5, 0.25)
    assert (got["no_box_fraction"], got["repetition"]) == (0.5, 0.125)


TWO = {"prompt_ids": [2, 7, 3], "answer": "1"}, {"prompt_ids": [2, 7, 8, 3], "answer": "2"}


def test_the_answers_of_an_evaluation_depend_on_its_seed_and_not_on_what_was_drawn_before():
    def sampled(before, seed):
        torch.manual_seed(before)
        return [answer["response_ids"] for answer in evaluate(*TWO, seed=seed)[1]]

    assert sampled(before=0, seed=5) == sampled(before=1, seed=5) != sampled(before=0, seed=6)


def test_an_evaluation_samples_at_temperature_and_top_p_1_by_default_and_says_so():
    metrics, answers = evaluate(*TWO)
    assert (metrics["temperature"], metrics["top_p"]) == (1, 1)
    assert answers == evaluate(*TWO, temperature=1.0, top_p=1.0)[1]


def test_answers_come_in_order_and_each_batch_of_four_prefills_a_problem_once():
    """Three answers to each of two problems: four of the six, then two."""
    shapes, stop = forward_shapes(STUDENT)
    _, answers = evaluate(*TWO)
    stop()
    places = [(answer["index"], answer["sample"]) for answer in answers]
    assert places == [*itertools.product(range(2), range(3))]
    assert [rows for rows, columns in shapes if columns > 1] == [2, 1]
    assert max(rows for rows, _ in shapes) == 4


def test_the_reward_of_an_answer_is_the_mean_of_log_q_minus_log_p_over_its_tokens(monkeypatch):
    monkeypatch.setattr(opd, "is_correct", says_a)
    metrics, answers = evaluate(*TWO, eos_ids={2, 3}, teacher=TEACHER, num_samples=8)
    rewards = [answer["reward"] for answer in answers]
    correct = [answer["correct"] for answer in answers]
    assert metrics["auroc"] == opd.auroc(rewards, correct) and len(set(correct)) == 2
    for answer in answers:
        prompt, tokens = len(answer["prompt_ids"]), answer["response_ids"]
        ids = torch.tensor([answer["prompt_ids"] + tokens])
        log_p = STUDENT(ids).logits[0, prompt - 1 : -1].log_softmax(-1)
        log_q = TEACHER(ids).logits[0, prompt - 1 : -1].log_softmax(-1)
        reward = (log_q - log_p)[range(len(tokens)), tokens].mean().item()
        assert answer["reward"] == pytest.approx(reward, rel=1e-3, abs=1e-4)


def test_an_evaluation_counts_a_box_inside_the_thoughts_as_no_box(monkeypatch):
    text = r"\boxed{1} </think> or not"
    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "decode", lambda *_, **__: text)
    metrics, _ = evaluate(TWO[0])
    assert metrics["no_box_fraction"] == 1 and metrics["avg_at_n"] == 0


def test_a_begun_answer_is_continued_and_both_parts_are_graded_together():
    """The begun ids 4, 11, 5 are a box around the right answer, 5."""
    problem = {"prompt_ids": [2, 7, 3], "answer": "5", "begun": [4, 11, 5]}
    _, (answer,) = evaluate(problem, max_length=6, temperature=0, num_samples=1)
    prompt = torch.tensor([[2, 7, 3, 4, 11, 5]])
    new = plain_generate(STUDENT, prompt, torch.ones_like(prompt), {END}, 6)[0].tolist()
    assert answer["response_ids"] == [4, 11, 5, *new] and answer["correct"]


# --------------------------------------------------------------------------------------------------
# All of part I: every method from end to end, and resumed


def test_each_update_of_a_run_has_loss_and_gradients_of_autograd_on_full_logits(whole_run, world):
    """In all five steps, with the weights and the mask of token_weights."""
    changes, out, seen = whole_run
    teacher = transformers.AutoModelForCausalLM.from_pretrained(world / "teacher")
    steps = [line for line in read(out / "metrics.jsonl") if "loss" in line]
    for line, (student, batch, grads) in zip(steps, seen, strict=True):
        weight, learned = opd.token_weights(flags(**changes), batch)
        by_the_book = {**batch, "token_weight": weight, "loss_mask": learned}
        loss, expected = plain_gradients(student, teacher, by_the_book, changes["loss"])
        assert line["loss"] == pytest.approx(loss, rel=1e-4, abs=1e-6)
        assert_same(grads, expected, tolerance=1e-5)
        assert learned.any() and line["grad_norm"] > 0.1


def test_a_run_logs_all_its_steps_evaluations_and_answers(whole_run):
    lines = read(whole_run[1] / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5]
    graded = [(line["step"], line["model"]) for line in lines if "eval" in line]
    assert graded == [(0, "teacher"), (0, "student"), (4, "student"), (5, "student")]
    assert len(read(whole_run[1] / "samples.jsonl")) == 4 * 3


def test_in_a_run_the_log_probs_of_the_update_are_those_of_sampling(whole_run):
    """sampling_mismatch: |log p in the update - log p as sampled|, a mean."""
    steps = [line for line in read(whole_run[1] / "metrics.jsonl") if "loss" in line]
    assert all(line["sampling_mismatch"] < 1e-4 for line in steps)


def test_a_run_samples_up_to_the_length_of_its_method_and_only_prune_moves_the_cap(whole_run):
    """prune: up to the cap that the step before left."""
    changes, out, _ = whole_run
    steps = [line for line in read(out / "metrics.jsonl") if "loss" in line]
    lengths, caps = [line["max_length"] for line in steps], [line["cap"] for line in steps]
    told = {"prefix": [6] * 5, "progressive": [4, 8, 12, 12, 12], "prune": [8, *caps[:-1]]}
    assert lengths == told.get(changes["method"], [12] * 5)
    assert (len(set(caps)) > 1) == (changes["method"] == "prune")


def test_a_run_draws_no_problem_again_while_others_are_left(whole_run):
    """Two of nine problems per step, with two candidates each: eight in four steps."""
    drawn = []
    for _, batch, _ in whole_run[2][:4]:
        prompts = without_padding(batch["prompt_ids"], batch["prompt_mask"])
        assert prompts[0] == prompts[1] and prompts[2] == prompts[3]
        drawn += [tuple(prompts[0]), tuple(prompts[2])]
    assert len(set(drawn)) == 8


def test_a_resumed_run_is_bit_for_bit_an_uninterrupted_one(whole_run, world, tmp_path, monkeypatch):
    """It starts from the checkpoint of step 3, in a folder whose metrics go on to step 5."""
    changes, out, _ = whole_run
    monkeypatch.setattr(opd, "is_correct", says_a)
    shutil.copytree(out, tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoint-5")
    train(world, tmp_path / "killed", **changes, resume=True)
    assert outcome(tmp_path / "killed") == outcome(out)


def test_distillation_moves_the_student_towards_the_teacher(world, tmp_path):
    """Means over the first and the last five steps: one step has only 8 rows, too noisy."""
    changes = {"max_steps": 25, "batch_size": 4, "learning_rate": 6e-3, "loss": "reverse_kl"}
    steps = train(world, tmp_path, eval_file=None, **changes)[1]

    def mean(name, lines):
        return sum(line[name] for line in lines) / 5

    assert mean("reverse_kl", steps[-5:]) < 0.8 * mean("reverse_kl", steps[:5])
    assert mean("overlap_ratio", steps[-5:]) > mean("overlap_ratio", steps[:5]) + 0.05
