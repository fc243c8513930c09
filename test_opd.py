"""
What opd.py promises, one claim a test. Read the names first: python -m pytest --collect-only -q test_opd.py

Everything runs offline on random models with 2 layers and 24 tokens. Where there is a second way to get a
number (every token tried, autograd on full logits, one uninterrupted model.generate), the test goes that way.
"""
import torch
THREADS = torch.get_num_threads()                             # for the benchmark; OMP_NUM_THREADS changes it
torch.set_num_threads(1)                                      # tiny tensors gain next to nothing from more

import contextlib
import copy
import ctypes
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import types
import warnings

import pytest
import transformers
from torch.distributions import Categorical, kl_divergence

import opd

WORDS = "<pad> <end> <user> <solve> \\boxed{ } 0 1 2 3 4 5 6 7 8 9 a b c d e f g h".split()
PAD, END, V = 0, 1, len(WORDS)                                # V = 24: small enough to try every token
TOKENS = dict(bos_token_id=None, eos_token_id=END, pad_token_id=PAD)
SIZES = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=256, initializer_range=0.3,
             tie_word_embeddings=False, **TOKENS)
FALCON = dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8,
              lm_head_multiplier=.3)                          # a scale that head_logits does not know
close = torch.testing.assert_close


def tiny(family, seed, **changes):
    """A random model. initializer_range .3: with less, greedy decoding repeats one token for ever."""
    torch.manual_seed(seed)
    config = getattr(transformers, family + "Config")(**{**SIZES, **changes})
    return getattr(transformers, family + "ForCausalLM")(config).eval()


def tiny_llama(seed, **changes):
    return tiny("Llama", seed, **changes)


def tiny_qwen3(seed, **changes):
    return tiny("Qwen3", seed, **changes)


def tiny_gpt2(seed):
    """Absolute positions: the one kind of model that notices wrong position_ids."""
    torch.manual_seed(seed)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=V, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, **TOKENS)).eval()


FAMILIES = pytest.mark.parametrize("family", [tiny_llama, tiny_qwen3, tiny_gpt2])
CACHES = pytest.mark.parametrize("static_cache", [False, True], ids=["dynamic", "static"])


def logits(*shape, seed=0, scale=2.0):
    return torch.randn(*shape, V, generator=torch.Generator().manual_seed(seed)) * scale


def gradient(loss, z):
    """Of the sum of loss(z), with respect to the logits z."""
    z = z.clone().requires_grad_()
    return torch.autograd.grad(loss(z).sum(), z)[0]


def prompts(*lengths):
    rng = random.Random(0)
    return opd.pad_left([[rng.randrange(2, V) for _ in range(length)] for length in lengths], PAD)


def without_padding(ids, mask):
    return [row[valid].tolist() for row, valid in zip(ids, mask)]


SAMPLING = dict(segment_length=4, vocab_size=V, eos_ids={END}, pad_id=PAD)


def roll(student, teacher=None, lengths=(2, 5, 3, 4), prompt=None, **changes):
    """A rollout of 12 tokens in segments of 4, greedy unless said otherwise."""
    settings = dict(SAMPLING, max_length=12, temperature=0, overlap_k=4 if teacher else 0)
    return opd.rollout(student, teacher, without_padding(*(prompt or prompts(*lengths))), **{**settings, **changes})


def rows_of(out, lengths):
    """Each row without any padding, as (ids of prompt and response (1, L), length of the prompt)."""
    (ids, mask), new, valid = prompts(*lengths), out["response_ids"], out["response_mask"]
    return [(torch.cat([ids[b][mask[b]], new[b][valid[b]]])[None], lengths[b]) for b in range(len(ids))]


# ---- 1. Losses (section 6 of opd.py) -----------------------------------------------------------------------

def test_reverse_kl_is_the_kl_divergence_of_torch_distributions():
    z, t = logits(2, 5, seed=1), logits(2, 5, seed=2)
    expected = kl_divergence(Categorical(logits=z), Categorical(logits=t))
    close(opd.reverse_kl(z, t), expected)


def test_reverse_kl_is_zero_for_equal_logits_and_positive_otherwise():
    z, t = logits(50, 5, seed=1), logits(50, 5, seed=2)
    assert opd.reverse_kl(z, z + 3).abs().max() < 1e-6
    assert opd.reverse_kl(z, t).min() > 0


def test_reverse_kl_punishes_mass_where_the_teacher_has_none_and_not_a_missed_mode():
    """Settling on one of two modes costs log 2; inventing a third mode costs without limit."""
    never = -50.0
    teacher = torch.tensor([[[0.0, 0.0, never]]])
    one_mode, third_mode = torch.tensor([[[0.0, never, never]]]), torch.tensor([[[0.0, 0.0, 0.0]]])
    assert opd.reverse_kl(one_mode, teacher).item() == pytest.approx(math.log(2), abs=1e-4)
    assert opd.reverse_kl(third_mode, teacher).item() > 10


def test_reverse_kl_of_bfloat16_logits_is_computed_in_float32():
    z, t = logits(4, 4, seed=1, scale=8).bfloat16(), logits(4, 4, seed=2, scale=8).bfloat16()
    value = opd.reverse_kl(z, t)
    assert value.dtype == torch.float32
    close(value, opd.reverse_kl(z.float(), t.float()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("baseline", [False, True])
def test_the_sampled_loss_has_the_gradient_of_reverse_kl_on_average(baseline):
    """All 24 tokens are tried, each weighted by its probability: no sampling noise is left."""
    z, t = logits(1, 1, seed=1).double(), logits(1, 1, seed=2).double()
    p = z.softmax(-1).flatten()
    mean = 0
    for y in range(V):
        mean += p[y] * gradient(lambda z: opd.reverse_kl_sampled(z, t, torch.tensor([[y]]), baseline), z)
    close(mean, gradient(lambda z: opd.reverse_kl(z, t), z), rtol=1e-4, atol=1e-6)


def advantages(z, t, baseline):
    """What each of the 24 tokens is multiplied by: the surrogate is - advantage * log p(y)."""
    y = torch.arange(V)[:, None]
    value = opd.reverse_kl_sampled(z.expand(V, 1, V), t.expand(V, 1, V), y, baseline)
    return (-value / z.log_softmax(-1).expand(V, 1, V).gather(-1, y[..., None]).squeeze(-1)).flatten()


def test_the_closed_form_baseline_centres_the_advantage_and_shrinks_its_variance():
    """Of the second moment it takes away KL squared. (The variance of the gradient need not fall.)"""
    z, t = logits(1, 1, seed=1), logits(1, 1, seed=2)
    p = z.softmax(-1).flatten()
    plain, centred = advantages(z, t, False), advantages(z, t, True)
    kl = opd.reverse_kl(z, t).item()
    assert (p * plain).sum().item() == pytest.approx(-kl, rel=1e-4)
    assert (p * centred).sum().item() == pytest.approx(0, abs=1e-4)
    assert ((p * plain ** 2).sum() - (p * centred ** 2).sum()).item() == pytest.approx(kl ** 2, rel=1e-3)


def test_minus_kl_in_place_of_the_advantage_teaches_nothing_on_average():
    """Why the baseline is added: alone, a constant of the context has a mean gradient of 0."""
    z, t = logits(1, 1, seed=1), logits(1, 1, seed=2)
    p, kl = z.softmax(-1).flatten(), opd.reverse_kl(z, t)
    mean = sum(p[y] * gradient(lambda z: kl * z.log_softmax(-1)[..., y], z) for y in range(V))
    assert kl > 0.1 and mean.abs().max() < 1e-6


SUPPORTS = pytest.mark.parametrize("support", ["student", "teacher", "intersection", "union"])


def support_set(z, t, k, support):
    """The same set of tokens, by Python's sorting and sets."""
    p, q = ({*sorted(range(V), key=lambda v: -row[v])[:k]} for row in (z.flatten(), t.flatten()))
    return {"student": p, "teacher": q, "intersection": p & q, "union": p | q}[support]


@SUPPORTS
def test_the_topk_loss_is_the_mean_of_log_p_minus_log_q_on_its_support(support):
    z, t = logits(1, 1, seed=1), logits(1, 1, seed=2)
    S = sorted(support_set(z, t, 8, support))
    p, rho = z.softmax(-1).flatten()[S], (z.log_softmax(-1) - t.log_softmax(-1)).flatten()[S]
    close(opd.reverse_kl_topk(z, t, 8, support).flatten(), ((p * rho).sum() / p.sum())[None])


@SUPPORTS
def test_the_gradient_of_the_topk_loss_is_the_stop_gradient_one_over_the_mass_of_the_support(support):
    """methods.md 0.1: what the released code optimises, token by token."""
    z, t = logits(1, 1, seed=1), logits(1, 1, seed=2)
    S = support_set(z, t, 8, support)
    p, rho = z.softmax(-1).flatten().tolist(), (z.log_softmax(-1) - t.log_softmax(-1)).flatten().tolist()
    inside = sum(p[v] * rho[v] for v in S)
    expected = [(p[u] * rho[u] * (u in S) - p[u] * inside) / sum(p[v] for v in S) for u in range(V)]
    close(gradient(lambda z: opd.reverse_kl_topk(z, t, 8, support), z).flatten(),
                               torch.tensor(expected), rtol=1e-4, atol=1e-6)


@SUPPORTS
def test_the_gradient_of_the_topk_loss_vanishes_when_student_equals_teacher(support):
    z = logits(3, 4, seed=1)
    assert gradient(lambda z: opd.reverse_kl_topk(z, z.detach(), 5, support), z).abs().max() < 1e-6


def test_a_truncated_kl_differentiated_directly_pushes_even_when_student_equals_teacher():
    """The contrast: sum_S p (log p - log q) has a + 1 in its gradient that pushes mass out of S at p = q."""
    z = logits(1, 1, seed=1)
    S = sorted(support_set(z, z, 5, "student"))

    def truncated(logits):
        return (logits.softmax(-1) * (logits.log_softmax(-1) - z.log_softmax(-1)))[..., S].sum(-1)
    pushed = gradient(truncated, z).flatten()
    assert pushed[S].sum() > 0.01                             # down the gradient: S loses mass
    assert opd.reverse_kl_topk(z, z, 5).abs().max() < 1e-6


def test_the_topk_loss_moves_mass_between_support_and_tail_and_the_renormalised_one_cannot():
    z, t = logits(1, 1, seed=1), logits(1, 1, seed=2)
    S = sorted(support_set(z, t, 5, "student"))
    tail = [v for v in range(V) if v not in S]
    teacher = Categorical(logits=t[..., S])
    renormalised = gradient(lambda z: kl_divergence(Categorical(logits=z[..., S]), teacher), z).flatten()
    released = gradient(lambda z: opd.reverse_kl_topk(z, t, 5), z).flatten()
    assert renormalised[S].sum().abs() < 1e-6 and renormalised[tail].abs().max() == 0
    assert released[tail].abs().max() > 1e-4
    assert released.sum().abs() < 1e-5                        # it sums to 0 over the whole vocabulary


def test_an_empty_intersection_costs_nothing_and_pulls_nowhere():
    z = torch.arange(V).float()[None, None]
    grad = gradient(lambda z: opd.reverse_kl_topk(z, -z.detach(), 3, "intersection"), z)
    assert opd.reverse_kl_topk(z, -z, 3, "intersection").item() == 0 and grad.abs().max() == 0


def test_an_unknown_support_raises():
    with pytest.raises(KeyError, match="both"):
        opd.reverse_kl_topk(logits(1), logits(1), 2, "both")


# ---- 2. Overlap and alignment (section 4) ------------------------------------------------------------------

P4, Q4 = [.5, .3, .15, .05], [.4, .1, .3, .2]                 # top two: tokens 0 and 1; tokens 0 and 2


def test_topk_overlap_by_hand():
    student, teacher = torch.tensor([[P4, P4]]).log(), torch.tensor([[Q4, P4[::-1]]]).log()
    assert opd.topk_overlap(student, teacher, 2).tolist() == [[.5, 0]]
    assert opd.topk_overlap(student, student.flip(-1).flip(-1), 2).tolist() == [[1, 1]]


def test_the_overlap_ignores_the_rank_inside_the_top_k():
    assert opd.topk_overlap(torch.tensor([[[2., 1, 0, 0]]]), torch.tensor([[[1., 2, 0, 0]]]), 2).item() == 1


def test_unrelated_models_overlap_by_k_over_v_and_not_by_zero():
    overlap = opd.topk_overlap(logits(100, 100, seed=1), logits(100, 100, seed=2), 6)
    assert overlap.mean().item() == pytest.approx(6 / V, abs=0.01)


def test_every_alignment_metric_by_hand():
    """One valid position, k = 2, both shared: p_bar, q_bar are the first two tokens renormalised."""
    p, q, k = [.6, .2, .15, .05], [.3, .4, .2, .1], 2
    student, teacher = torch.tensor([[p, P4]]).log(), torch.tensor([[q, Q4]]).log()
    got = opd.alignment(student, teacher, torch.tensor([[1, 0]]), k)
    entropy_p, entropy_q = (-sum(x * math.log(x) for x in row) for row in (p, q))
    expected = {
        "overlap_ratio": 1.0, "overlap_mass_student": .8, "overlap_mass_teacher": .7,
        "overlap_token_advantage": (.75 * math.log(.3 / .7 / .75) + .25 * math.log(.4 / .7 / .25)) / 2,
        "entropy_student": entropy_p, "entropy_teacher": entropy_q, "entropy_gap": abs(entropy_q - entropy_p),
        "reverse_kl": sum(a * math.log(a / b) for a, b in zip(p, q))}
    assert got == pytest.approx(expected, abs=1e-5)


def test_alignment_is_the_mean_over_the_valid_positions_of_the_batch():
    z, t = logits(2, 3, seed=1), logits(2, 3, seed=2)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    one = torch.ones(1, 1)
    each = [opd.alignment(z[b, i][None, None], t[b, i][None, None], one, 12) for b, i in mask.nonzero()]
    expected = {name: sum(row[name] for row in each) / 4 for name in each[0]}
    assert opd.alignment(z, t, mask, 12) == pytest.approx(expected, abs=1e-5)


def test_a_position_where_nothing_is_shared_is_left_out_of_the_advantage():
    shared, disjoint = torch.tensor(P4).log(), torch.tensor([.05, .15, .3, .5]).log()
    student, ones = shared.expand(1, 2, 4), torch.ones(1, 2)
    teacher = torch.stack([torch.tensor([.2, .6, .15, .05]).log(), disjoint])[None]
    both = opd.alignment(student, teacher, ones, 2)
    alone = opd.alignment(student[:, :1], teacher[:, :1], ones[:, :1], 2)
    assert both["overlap_token_advantage"] == pytest.approx(alone["overlap_token_advantage"]) != 0
    assert both["overlap_ratio"] == .5                        # while in the overlap it counts as 0


def test_overlap_by_position_averages_eight_parts_and_skips_padding():
    overlap = torch.arange(16).float().expand(2, 16) / 16
    mask = torch.ones(2, 16)
    mask[1, 8:] = 0
    overlap = overlap.where(mask.bool(), torch.tensor(-9.0))
    assert opd.overlap_by_position(overlap, mask) == [(2 * i + .5) / 16 for i in range(8)]
    assert all(map(math.isnan, opd.overlap_by_position(overlap, torch.zeros(2, 16))))


# ---- 3. Who goes on (section 5) ----------------------------------------------------------------------------

def test_the_horizon_is_a_staircase_up_to_the_cap():
    steps = {0: 512, 9: 512, 10: 768, 19: 768, 20: 1024, 1000: 2048}
    assert {step: opd.horizon(step, 512, 256, 10, 2048) for step in steps} == steps
    assert {opd.horizon(step, 512, 0, 10, 2048) for step in range(99)} == {512}    # a fixed prefix


def test_select_prefixes_docstring_example():
    keep = opd.select_prefixes(torch.tensor([[.9, .8], [.2, .1]]), 3)
    assert keep.tolist() == [[True, True], [True, False]]


def test_with_as_many_slots_as_prompts_each_prompt_keeps_exactly_its_best():
    """n = 4 candidates and a pruning ratio of 75%, as in the paper: prompts do not compete."""
    score = torch.rand(8, 4, generator=torch.Generator().manual_seed(0))
    assert opd.select_prefixes(score, 8).nonzero().tolist() == [[p, int(score[p].argmax())] for p in range(8)]


@pytest.mark.parametrize("num_keep", [8, 11, 16, 31, 32])
def test_slots_above_one_per_prompt_go_to_the_best_of_all_the_others(num_keep):
    score = torch.rand(8, 4, generator=torch.Generator().manual_seed(num_keep))
    best = [(p, int(score[p].argmax())) for p in range(8)]
    others = {*itertools.product(range(8), range(4))} - {*best}
    others = sorted(others, key=lambda place: -score[place])
    kept = {tuple(place) for place in opd.select_prefixes(score, num_keep).nonzero().tolist()}
    assert kept == {*best, *others[:num_keep - 8]}


def test_of_equal_scores_the_first_candidate_wins():
    assert opd.select_prefixes(torch.ones(2, 3), 3).tolist() == [[True, True, False], [True, False, False]]


@pytest.mark.parametrize("num_keep", [1, 7])
def test_select_prefixes_refuses_fewer_slots_than_prompts_or_more_than_candidates(num_keep):
    with pytest.raises(ValueError, match=f"2 prompts and 6 candidates, got {num_keep}"):
        opd.select_prefixes(torch.ones(2, 3), num_keep)


def test_drift_weights_by_hand_are_those_of_the_released_unit_test():
    w = opd.drift_weights(torch.tensor([[1, .5, 0]]), torch.ones(1, 3), .75, .1)
    close(w, torch.tensor([[1, .9, .8]]))
    close(w + .5, torch.tensor([[1.5, 1.4, 1.3]]))


def test_an_overlap_at_the_threshold_is_not_a_bad_event():
    assert opd.drift_weights(torch.tensor([[.75]]), torch.ones(1, 1), .75, .1).item() == 1


def test_reliability_never_recovers():
    overlap = torch.rand(4, 50, generator=torch.Generator().manual_seed(0))
    w = opd.drift_weights(overlap, torch.ones(4, 50), .5, .01)
    assert (w.diff(dim=-1) <= 0).all() and w[:, -1].max() < .9
    longer = opd.drift_weights(torch.cat([overlap, torch.ones(4, 50)], 1), torch.ones(4, 100), .5, .01)
    assert longer[:, -1].tolist() == w[:, -1].tolist()


def test_a_hundred_bad_events_of_a_hundredth_use_reliability_up_and_end_the_reliable_length():
    w = opd.drift_weights(torch.zeros(1, 150), torch.ones(1, 150), .7, .01)
    assert w[0, 98] > 1e-8 and w[0, 99:].max() <= 1e-8 and w.min() >= 0
    assert opd.reliable_length(w, torch.ones(1, 150)).tolist() == [99]


def test_padding_has_no_reliability_and_is_no_bad_event():
    mask = torch.tensor([[1, 1, 0, 0]])
    w = opd.drift_weights(torch.tensor([[0., 1, 0, 0]]), mask, .5, .25)
    assert w.tolist() == [[.75, .75, 0, 0]]
    assert opd.reliable_length(torch.ones(1, 4), mask).tolist() == [2]


CAP = dict(step=100, margin=100, hit_ratio=.1, patience=3, low=1024, high=12288)


def test_the_cap_grows_when_a_tenth_of_the_rows_is_reliable_to_within_the_margin():
    hits = torch.tensor([1948] + [0] * 9)
    assert opd.next_max_length(hits, 2048, 2, **CAP) == (2148, 0)          # and patience starts again
    assert opd.next_max_length(hits - 1, 2048, 0, **CAP) == (2048, 1)      # one token short of the boundary
    eleven = torch.tensor([2048] + [0] * 10)
    assert opd.next_max_length(eleven, 2048, 0, **CAP) == (2048, 1)


@pytest.mark.parametrize("ratio, hits, rows", [(.25, 1, 4), (.7, 7, 10)])
def test_a_share_of_rows_that_equals_the_hit_ratio_is_a_hit(ratio, hits, rows):
    """In float32 the share 7/10 is below .7."""
    reliable = torch.tensor([2048] * hits + [0] * (rows - hits))
    assert opd.next_max_length(reliable, 2048, 0, **{**CAP, "hit_ratio": ratio}) == (2148, 0)


def test_the_cap_shrinks_after_three_misses_in_a_row():
    cap, misses, caps = 2048, 0, []
    for _ in range(6):
        cap, misses = opd.next_max_length(torch.zeros(10), cap, misses, **CAP)
        caps.append(cap)
    assert caps == [2048, 2048, 1948, 1948, 1948, 1848]


def test_the_cap_stays_between_its_ends():
    assert opd.next_max_length(torch.full((4,), 12288), 12288, 0, **CAP) == (12288, 0)
    assert opd.next_max_length(torch.zeros(4), 1024, 2, **CAP) == (1024, 0)
    # the boundary does not fall below the smallest cap either
    assert opd.next_max_length(torch.full((4,), 1000), 1024, 0, **CAP) == (1024, 1)


# ---- 4. Extrapolation, evaluation and cost (sections 7, 8, 10) ---------------------------------------------

def test_extrapolation_tries_1_plus_2k_times_the_update_from_the_anchor():
    seen = []

    def validate(weights):
        seen.append(weights["w"].item())
        return len(seen)                                      # always better
    accepted, k, scores = opd.extrapolate({"w": torch.tensor(3.0)}, {"w": torch.tensor(2.0)}, validate)
    assert seen == [3, 5, 7, 9, 11, 13] and k == 5 and accepted["w"] == 13 and scores == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("scores, k, value", [
    ([.5, .4], 0, 3.0), ([.5, .5], 0, 3.0), ([.5, .6, .6], 1, 5.0), ([.5, .6, .7, .1, 1], 2, 7.0)])
def test_extrapolation_stops_at_the_first_try_that_is_not_strictly_better(scores, k, value):
    left = iter(scores)
    now, anchor = {"w": torch.tensor(3.0)}, {"w": torch.tensor(2.0)}
    accepted, got, tried = opd.extrapolate(now, anchor, lambda weights: next(left))
    assert (got, accepted["w"].item(), tried) == (k, value, scores[:k + 2])


@FAMILIES
def test_attention_and_mlp_move_and_embeddings_head_and_input_norms_stay(family):
    names = " ".join(opd.movable_weights(family(0)))
    assert "attn" in names and "mlp" in names
    for part in ("embed", "wte", "wpe", "lm_head", "input_layernorm", "ln_1", "ln_f", "model.norm"):
        assert part not in names


def test_movable_weights_are_copies_that_later_updates_do_not_change():
    model = tiny_llama(0)
    before = opd.movable_weights(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert all(value.abs().max() > 0 for value in before.values())


def test_pass_at_k_is_the_share_of_all_draws_of_k_that_hold_a_right_answer():
    for n, c, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if c <= n and k <= n:
            draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert opd.pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize("n, c, k", [(4, 0, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_refuses_more_draws_than_samples(n, c, k):
    with pytest.raises(ValueError):
        opd.pass_at_k(n, c, k)


def test_repetition_is_the_share_of_four_grams_seen_before():
    assert opd.repetition([1, 2, 3, 4, 5]) == 0 and opd.repetition([1, 2]) == 0
    assert opd.repetition([7] * 13) == .9                     # ten 4-grams, all one
    assert opd.repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)


def test_every_problem_comes_once_in_each_epoch_in_a_new_order():
    epoch = lambda e: [i for step in (1, 2, 3, 4) for i in opd.batch_indices(4 * e + step, 3, 12, 0)]
    assert sorted(epoch(0)) == sorted(epoch(1)) == list(range(12)) and epoch(0) != epoch(1) != list(range(12))


def test_the_order_of_problems_depends_on_the_arguments_alone():
    expected = [opd.batch_indices(step, 5, 7, 3) for step in range(1, 9)]
    random.random(), torch.rand(1)
    assert [opd.batch_indices(step, 5, 7, 3) for step in range(8, 0, -1)] == expected[::-1]
    assert opd.batch_indices(1, 5, 7, 4) != expected[0]
    assert len(opd.batch_indices(1, 20, 7, 3)) == 20          # more prompts than problems: epochs run on


def test_the_flops_of_a_forward_by_hand():
    """10 parameters, three layers of width 1, rows of 5 and 2 tokens."""
    config = types.SimpleNamespace(num_hidden_layers=3, hidden_size=1)
    model = types.SimpleNamespace(num_parameters=lambda: 10, config=types.SimpleNamespace(get_text_config=lambda: config))
    assert opd.forward_flops(model, torch.tensor([5, 2])) == 2 * 10 * 5 + 6 * 25 + 2 * 10 * 2 + 6 * 4
    assert opd.forward_flops(model, torch.tensor([])) == 0


Z, T, OVERLAP, MASK = logits(2, 3, seed=1), logits(2, 3, seed=2), torch.rand(2, 3), torch.ones(2, 3).bool()
LEAVES = {
    "topk_overlap": (Z, T, 4), "alignment": (Z, T, MASK, 4), "overlap_by_position": (OVERLAP, MASK),
    "select_prefixes": (OVERLAP, 3), "drift_weights": (OVERLAP, MASK, .5, .1),
    "reliable_length": (OVERLAP, MASK), "reverse_kl": (Z, T), "reverse_kl_topk": (Z, T, 4, "union"),
    "reverse_kl_sampled": (Z, T, MASK.long(), True), "mask_through_eos": (MASK.long(), {0}),
    "extrapolate": ({"w": Z}, {"w": T}, lambda weights: weights["w"].sum())}


@pytest.mark.parametrize("name", LEAVES)
def test_a_leaf_function_changes_none_of_its_arguments(name):
    before = str(LEAVES[name])
    getattr(opd, name)(*LEAVES[name])
    assert str(LEAVES[name]) == before


# ---- 5. Sampling (section 3) -------------------------------------------------------------------------------

def test_pad_left_puts_padding_on_the_left_and_marks_it_by_length():
    ids, mask = opd.pad_left([[PAD, 5], [6, 7, PAD]], PAD)    # inside a row the pad id is a token
    assert ids.tolist() == [[PAD, PAD, 5], [6, 7, PAD]]
    assert mask.tolist() == [[False, True, True], [True, True, True]]


@pytest.mark.parametrize("ids, eos_ids, length", [
    ([5, 1, 6, 1], {1}, 2), ([5, 2, 1, 6], {1, 2}, 2), ([1, 5, 6, 7], {1}, 1), ([5, 6, 7, 8], {1}, 4),
    ([5, 1, 1, 1], {1}, 2), ([5, 6, 7, 1], {1}, 4), ([5, 6, 7, 8], set(), 4)])
def test_the_mask_ends_with_the_first_of_any_eos_ids_which_is_in_it(ids, eos_ids, length):
    """[5, 1, 1, 1]: where pad and EOS are one id, the first is the EOS and the others are padding."""
    assert opd.mask_through_eos(torch.tensor([ids]), eos_ids).tolist() == [[t < length for t in range(4)]]


def chi_square_of_first_tokens(model, probs, **changes):
    """4000 sampled first tokens against their probabilities: above 50 at p = .001."""
    ids = torch.tensor([[3, 5, 7]]).expand(4000, 3)
    settings = {**dict(max_new_tokens=1, vocab_size=V, eos_ids={END}, pad_id=PAD), **changes}
    torch.manual_seed(0)
    cache = transformers.DynamicCache(config=model.config)
    tokens = opd.generate(model, ids, torch.ones_like(ids), cache, **settings)[0].flatten()
    assert tokens.max() < len(probs)
    return ((torch.bincount(tokens, minlength=len(probs)) - 4000 * probs) ** 2 / (4000 * probs)).sum().item()


FLAT = tiny_llama(0, initializer_range=.1)                    # every token is likely enough to be counted
FLAT_LOGITS = FLAT(torch.tensor([[3, 5, 7]])).logits[0, -1].detach()


def test_generation_settings_that_came_with_a_model_do_not_change_the_law_of_sampling(monkeypatch):
    """Each of them would make the samples off-policy to the logits that the loss is about, in silence."""
    shipped = transformers.GenerationConfig(
        do_sample=True, temperature=.1, top_k=1, top_p=.3, repetition_penalty=5.0, suppress_tokens=[5, 6, 7],
        no_repeat_ngram_size=1, min_new_tokens=9, forced_eos_token_id=9, **TOKENS)
    monkeypatch.setattr(FLAT, "generation_config", shipped)
    before = shipped.to_dict()
    assert chi_square_of_first_tokens(FLAT, FLAT_LOGITS.softmax(-1)) < 50
    assert FLAT.generation_config is shipped and shipped.to_dict() == before


def test_temperature_divides_the_logits_in_sampling():
    assert chi_square_of_first_tokens(FLAT, (FLAT_LOGITS / .5).softmax(-1), temperature=.5) < 50


def test_rows_of_the_head_that_are_no_tokens_are_never_sampled():
    """The law is then the softmax over the first rows alone, as in the loss."""
    assert chi_square_of_first_tokens(FLAT, FLAT_LOGITS[:6].softmax(-1), vocab_size=6) < 25


def plain_generate(model, ids, mask, eos_ids, length, **law):
    """One uninterrupted model.generate, greedy unless said otherwise, with its own cache and its own positions."""
    config = transformers.GenerationConfig(
        max_new_tokens=length, eos_token_id=sorted(eos_ids), pad_token_id=PAD, **(law or dict(do_sample=False)))
    return model.generate(ids, attention_mask=mask.long(), generation_config=config)[:, ids.shape[1]:]


def staggered_ends(model, ids, mask):
    """EOS ids with which greedy rows end in the first and in the second segment of 4, and one not at all."""
    free = plain_generate(model, ids, mask, {V}, 12).tolist()
    for eos_ids in map(set, itertools.combinations(range(1, V), 3)):
        ends = [next((t // 4 for t, token in enumerate(row) if token in eos_ids), None) for row in free]
        if {0, 1, None} <= set(ends):
            return eos_ids


@CACHES
@FAMILIES
def test_greedy_decoding_in_segments_with_rows_leaving_is_one_uninterrupted_generate(family, static_cache):
    model, (ids, mask) = family(1), prompts(2, 7, 3, 5, 4, 6)
    eos_ids = staggered_ends(model, ids, mask)
    out = roll(model, prompt=(ids, mask), eos_ids=eos_ids, static_cache=static_cache)
    assert out["response_ids"].tolist() == plain_generate(model, ids, mask, eos_ids, 12).tolist()


@CACHES
@FAMILIES
def test_padding_is_invisible(family, static_cache):
    student, teacher, lengths = family(1), family(2), (2, 7, 3, 5)
    together, (ids, mask) = roll(student, teacher, lengths, static_cache=static_cache), prompts(*lengths)
    for row, length in enumerate(lengths):
        alone = roll(student, teacher, prompt=(ids[[row], -length:], mask[[row], -length:]), static_cache=static_cache)
        n = alone["response_mask"].sum()
        assert together["response_ids"][row, :n].tolist() == alone["response_ids"][0, :n].tolist()
        close(together["teacher_hidden"][row], alone["teacher_hidden"][0], rtol=1e-3, atol=1e-4)


def test_temperature_zero_ignores_the_seed_and_sampling_repeats_with_it():
    model = tiny_llama(0)

    def ids(seed, temperature):
        torch.manual_seed(seed)
        return roll(model, temperature=temperature)["response_ids"].tolist()
    assert ids(0, 0) == ids(1, 0)
    assert ids(0, 1) == ids(0, 1) != ids(1, 1)


def test_an_eos_that_is_also_the_pad_id_stays_in_the_response():
    model, (ids, mask) = tiny_llama(1), prompts(2, 7, 3, 5)
    end = plain_generate(model, ids, mask, {V}, 12)[0, 2].item()
    out = roll(model, prompt=(ids, mask), eos_ids={end}, pad_id=end)
    rows = [ids[valid].tolist() for ids, valid in zip(out["response_ids"], out["response_mask"])]
    assert out["ended"].any()
    assert [row[-1] == end and row.count(end) == 1 for row in rows] == out["ended"].tolist()


# ---- 6. Rollout and scoring (sections 4 and 9) -------------------------------------------------------------

STUDENT, TEACHER = tiny_llama(1), tiny_qwen3(2, hidden_size=48)            # read only
ENDS = staggered_ends(STUDENT, *prompts(2, 5, 3, 4))


def test_the_topk_recorded_while_sampling_is_that_of_a_full_forward():
    ids, mask = prompts(4, 4)
    cache = transformers.DynamicCache(config=STUDENT.config)
    new_ids, topk, _ = opd.generate(
        STUDENT, ids, mask, cache, max_new_tokens=6, vocab_size=V, eos_ids={V}, pad_id=PAD, record_k=5)
    full = STUDENT(torch.cat([ids, new_ids], 1)).logits[:, 3:-1]
    assert topk.tolist() == full.topk(5).indices.tolist()


@pytest.mark.parametrize("temperature", [.5, 1.0, 2.0])
def test_the_log_prob_recorded_while_sampling_is_that_of_the_last_new_token_in_the_law_it_was_drawn_from(temperature):
    ids, mask = prompts(4, 4, 4)
    torch.manual_seed(0)
    new_ids, _, log_probs = opd.generate(
        STUDENT, ids, mask, transformers.DynamicCache(config=STUDENT.config), max_new_tokens=5, vocab_size=V,
        eos_ids={V}, pad_id=PAD, temperature=temperature)
    law = (STUDENT(torch.cat([ids, new_ids], 1)).logits[:, -2] / temperature).log_softmax(-1)
    close(log_probs, law.gather(-1, new_ids[:, -1:])[:, 0], rtol=1e-4, atol=1e-5)


def test_a_rollout_has_log_probs_at_the_last_token_of_each_segment_of_rows_that_run_and_nowhere_else():
    """Not of the padding behind rows that ended inside a segment."""
    out = roll(STUDENT, TEACHER, eos_ids=ENDS, segment_length=3)
    seen, mask = ~out["log_probs"].isnan(), out["response_mask"]
    borders = {*range(2, 12, 3), mask.shape[1] - 1}
    assert not {length - 1 for length in mask.sum(-1).tolist()} <= borders
    for row, valid in enumerate(mask):
        assert set(seen[row].nonzero().flatten().tolist()) == {column for column in borders if valid[column]}
    for row, log_probs in enumerate(opd.sampled_log_probs(STUDENT, out, V)):
        close(out["log_probs"][row][seen[row]], log_probs[seen[row][mask[row]]], rtol=1e-4, atol=1e-5)


def test_hidden_states_predict_the_column_they_are_asked_for():
    """The shift by one: through the head they are the logits of an ordinary forward, one column earlier."""
    ids, mask = prompts(9)
    got = opd.head_logits(STUDENT, opd.hidden_states(STUDENT, ids, mask, 4), V)
    for column, row in zip(range(5, 9), got[0]):
        close(row, STUDENT(ids[:, :column]).logits[0, -1], rtol=1e-4, atol=1e-5)


def test_hidden_states_of_the_teacher_from_segments_are_those_of_each_row_alone():
    """Without a cache, without padding, without the rows beside it."""
    lengths = (2, 5, 3, 4)
    out = roll(STUDENT, TEACHER, lengths, eos_ids=ENDS)
    assert 0 < out["ended"].sum() < 4
    for (ids, prompt), states in zip(rows_of(out, lengths), out["teacher_hidden"]):
        expected = TEACHER.model(ids).last_hidden_state[0, prompt - 1:-1]
        close(states, expected, rtol=1e-3, atol=1e-4)


def test_the_overlap_of_every_row_is_topk_overlap_on_full_logits():
    """Also of rows that ended while others ran on: what came after their end must not show."""
    lengths = (2, 5, 3, 4)
    out = roll(STUDENT, TEACHER, lengths, eos_ids=ENDS)
    for row, (ids, prompt) in enumerate(rows_of(out, lengths)):
        expected = opd.topk_overlap(STUDENT(ids).logits, TEACHER(ids).logits, 4)[0, prompt - 1:-1].tolist()
        assert out["overlap"][row].tolist() == expected + [0] * (12 - len(expected))


def forward_shapes(model):
    """A list that fills with (rows, columns) at every forward of the model, and a function that stops it."""
    shapes = []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    return shapes, hook.remove


@CACHES
@pytest.mark.parametrize("who", [STUDENT, TEACHER], ids=["student", "teacher"])
def test_each_model_computes_every_column_once_and_never_again(who, static_cache):
    """5 of the prompt and 12 of the response; the last one predicts nothing."""
    shapes, stop = forward_shapes(who)
    roll(STUDENT, TEACHER, eos_ids={V}, static_cache=static_cache)
    stop()
    assert sum(columns for _, columns in shapes) == 5 + 12 - 1 and {rows for rows, _ in shapes} == {4}


@pytest.mark.parametrize("who", [STUDENT, TEACHER], ids=["student", "teacher"])
def test_rows_that_ended_leave_the_caches_of_both_models_at_the_next_border(who):
    shapes, stop = forward_shapes(who)
    out = roll(STUDENT, TEACHER, eos_ids=ENDS)
    stop()
    lengths = out["response_mask"].sum(-1)
    still = {4 - (out["ended"] & (lengths <= border)).sum().item() for border in (0, 4, 8)}
    assert {rows for rows, _ in shapes} == still and len(still) == 3


@pytest.mark.parametrize("changes", [
    dict(), dict(segment_length=5), dict(eos_ids={V}, num_generations=2, select_at=6, probe_window=5, keep_ratio=5 / 8),
    dict(segment_length=3, drift=(.5, .4))], ids=["ends", "other segments", "selection", "drift"])
def test_a_rollout_on_a_static_cache_is_that_on_a_growing_one(changes):
    lengths = (2, 5, 3, 4, 6, 4, 3, 5, 2, 6)
    eos_ids = staggered_ends(STUDENT, *prompts(*lengths))
    (shapes, stop), outs, seen = forward_shapes(STUDENT), [], []
    for static_cache in (False, True):
        outs.append(roll(STUDENT, TEACHER, lengths, **{"eos_ids": eos_ids, "static_cache": static_cache, **changes}))
        seen.append([size for size, _ in shapes])
        shapes.clear()
    stop()
    assert seen[0] == seen[1] and len(set(seen[0])) > 1       # rows left, and left both kinds of cache
    for name in ("response_ids", "response_mask", "overlap", "ended", "kept"):
        assert outs[0][name].tolist() == outs[1][name].tolist(), name
    for states, others in zip(outs[0]["teacher_hidden"], outs[1]["teacher_hidden"], strict=True):
        close(states, others, rtol=1e-3, atol=1e-4)


def test_on_both_kinds_of_cache_one_seed_draws_the_same_tokens():
    drawn = []
    for static_cache in (False, True):
        torch.manual_seed(0)
        drawn.append(roll(STUDENT, eos_ids=ENDS, temperature=1.0, static_cache=static_cache)["response_ids"].tolist())
    assert drawn[0] == drawn[1]


def test_a_static_cache_does_not_grow_inside_a_segment(monkeypatch):
    """Each has room for the next border, in steps of 64 columns, and the rows that go on; inside nothing is copied."""
    sizes, generate = [], opd.generate

    def watched(model, ids, mask, cache, **settings):
        assert cache.is_compileable and cache.get_seq_length() == (ids.shape[1] - 1 if sizes else 0)
        out = generate(model, ids, mask, cache, **settings)
        sizes.append((*cache.layers[0].keys.shape[::2], cache.layers[0].keys.data_ptr()))
        return out
    monkeypatch.setattr(opd, "generate", watched)
    out = roll(STUDENT, lengths=(5, 2, 3, 4), eos_ids=ENDS, max_length=140, segment_length=35, static_cache=True)
    rows = [int(out["response_mask"][:, start].sum()) for start in (0, 35, 70, 105) if start < out["response_mask"].shape[1]]
    assert [size[:2] for size in sizes] == [(n, columns) for n, columns in zip(rows, (64, 128, 128, 192))]


def test_decoding_on_a_static_cache_is_compiled_and_not_again_for_every_size(monkeypatch):
    """As on a GPU, but that what was traced is run as it is. torch compiles 8 times, then it gives up in silence."""
    traced, runs, segments, grow = [], [], [], opd.grow_cache

    def backend(graph, inputs):
        traced.append(graph)
        return lambda *inputs: (runs.append(1), graph.forward(*inputs))[1]

    def compile_config(**settings):
        config = transformers.CompileConfig(**settings, backend=backend)
        config._compile_all_devices = True
        return config
    monkeypatch.setattr(opd, "CompileConfig", compile_config)
    monkeypatch.setattr(opd, "grow_cache", lambda *args: (segments.append((len(args[2]), args[3])), grow(*args))[1])
    torch._dynamo.reset()
    model, total = tiny_llama(1), 0
    for seed, lengths in enumerate([(2, 5, 3, 4, 3), (9, 7) * 4, (60, 6, 4), (3,)]):
        torch.manual_seed(seed)
        total += roll(model, lengths=lengths, max_length=90, segment_length=10, temperature=1.0, eos_ids={2},
                      static_cache=True)["response_ids"].shape[1]
    assert len(runs) == total - len(segments)                 # all but the first token of each segment
    assert len(set(segments)) > 8 and len(traced) <= 6
    torch._dynamo.reset()


def guided(lengths=(3, 3, 3, 3, 3, 3), student=STUDENT, **changes):
    return roll(student, TEACHER, lengths, **{**dict(
        eos_ids={V}, temperature=1.0, num_generations=2, select_at=6, probe_window=5, keep_ratio=2 / 3), **changes})


def test_prefix_guided_goes_on_with_the_best_of_each_prompt_and_then_the_best_of_the_others():
    torch.manual_seed(0)
    out = guided()
    score = out["overlap"][:, :5].mean(-1)
    assert out["kept"].tolist() == opd.select_prefixes(score.view(3, 2), 4).flatten().tolist()
    assert out["response_mask"].sum(-1).tolist() == [12 if kept else 6 for kept in out["kept"]]


def test_the_probe_window_is_all_that_counts_for_the_score():
    """With a window of one token, the overlap of the first token decides."""
    torch.manual_seed(0)
    out = guided(probe_window=1)
    assert out["kept"].tolist() == opd.select_prefixes(out["overlap"][:, 0].view(3, 2), 4).flatten().tolist()


def test_a_probe_window_over_the_prefix_is_the_whole_prefix():
    for window in (6, 99):
        torch.manual_seed(0)
        out = guided(probe_window=window)
        score = out["overlap"][:, :6].mean(-1)
        assert out["kept"].tolist() == opd.select_prefixes(score.view(3, 2), 4).flatten().tolist()


def test_a_keep_ratio_below_one_per_prompt_keeps_one_per_prompt():
    assert guided(keep_ratio=.1)["kept"].view(3, 2).sum(1).tolist() == [1, 1, 1]


def test_rows_that_ended_in_the_prefix_stay_and_take_no_slot_from_others():
    for seed in range(99):                                    # until just one row ends in its prefix
        torch.manual_seed(seed)
        out = guided(eos_ids={2, 3}, probe_window=3)
        early = out["ended"] & (out["response_mask"].sum(-1) <= 6)
        if early.sum() == 1:
            break
    assert out["kept"][early].all()
    assert (out["kept"] & ~early).sum() == 4                  # all four slots went to rows that can use them


def test_prune_stops_rows_in_flight_at_the_first_border_where_their_reliability_is_used_up():
    """Four bad tokens of a quarter each, and a border after 3, 6 and 9 tokens."""
    out = roll(STUDENT, TEACHER, eos_ids={V}, segment_length=3, drift=(1.1, .25))
    assert out["response_mask"].sum(-1).tolist() == [6] * 4
    assert not out["kept"].any() and not out["ended"].any()


def test_prune_stops_no_row_in_flight_without_drift_and_none_that_is_reliable():
    assert roll(STUDENT, TEACHER, eos_ids={V})["response_mask"].sum().item() == 4 * 12
    assert roll(STUDENT, TEACHER, eos_ids={V}, drift=(0.0, 1.0))["kept"].all()


def test_a_row_that_ended_is_not_called_dropped_by_drift():
    out = roll(STUDENT, TEACHER, eos_ids=ENDS, drift=(1.1, 1.0))
    assert out["kept"].tolist() == out["ended"].tolist() and out["ended"].any()


@CACHES
def test_the_tokens_do_not_depend_on_the_segment_length_nor_on_a_teacher(static_cache):
    expected = roll(STUDENT, eos_ids=ENDS)["response_ids"].tolist()
    for segment_length in (1, 5, 12, 100):
        out = roll(STUDENT, TEACHER, eos_ids=ENDS, segment_length=segment_length, static_cache=static_cache)
        assert out["response_ids"].tolist() == expected


@pytest.mark.parametrize("family, setting", [
    ("Gemma2", {"final_logit_softcapping": 30.0}), ("Cohere", {"logit_scale": .3}),
    ("Granite", {"logits_scaling": 4.0})])
def test_models_with_a_softcap_or_a_scale_behind_their_head_are_refused_by_name(family, setting, world, tmp_path):
    for name, settings in (("plain", {}), ("otherwise", setting)):
        tiny(family, 0, **{key: None if "softcap" in key else 1.0 for key in setting} | settings).save_pretrained(
            tmp_path / name)
        opd.tiny_tokenizer(WORDS).save_pretrained(tmp_path / name)
    for dtype in ("float32", "bfloat16"):
        flags = dict(student=tmp_path / "otherwise", dtype=dtype)
        opd.read_inputs(opd.parse_args(command(world, tmp_path, **{**flags, "student": tmp_path / "plain"})))
        with pytest.raises(ValueError, match=f"^{family.lower()} models are not supported"):
            opd.read_inputs(opd.parse_args(command(world, tmp_path, **flags)))
    opd.read_inputs(opd.parse_args(command(world, tmp_path, **flags, eval_only=True)))     # it asks for no logits of ours


@pytest.mark.parametrize("rows_at_once, widths", [
    (1, [2, 3, 7, 9]), (3, [2, 3, 7, 9]), (4, [3, 9]), (5, [3, 9]), (6, [7, 9]), (8, [9]), (100, [9])])
def test_groups_of_prompts_give_the_rollout_of_all_rows(rows_at_once, widths):
    """The two candidates of each prompt stay together; a group is as wide as its longest prompt."""
    lengths = [length for length in (2, 3, 7, 9) for _ in range(2)]
    eos_ids = staggered_ends(STUDENT, *prompts(*lengths))
    whole = roll(STUDENT, TEACHER, lengths, eos_ids=eos_ids)
    shapes, stop = forward_shapes(STUDENT)
    out = opd.rollout_in_groups(
        STUDENT, TEACHER, without_padding(*prompts(*lengths)), rows_at_once, num_generations=2,
        **{**SAMPLING, "eos_ids": eos_ids}, max_length=12, temperature=0, overlap_k=4)
    stop()
    first = [shape for shape in shapes if shape[1] > 1]       # the prompts of each group
    assert [width for _, width in first] == widths and sum(rows for rows, _ in first) == 8
    assert max(rows for rows, _ in first) <= max(2, rows_at_once) and out.keys() == whole.keys()
    for name in ("prompt_ids", "prompt_mask", "response_ids", "response_mask", "overlap", "ended", "kept"):
        assert out[name].tolist() == whole[name].tolist(), name
        assert out[name].dtype == whole[name].dtype, name
    for states, others in zip(out["teacher_hidden"], whole["teacher_hidden"], strict=True):
        close(states, others, rtol=1e-3, atol=1e-4)


def test_the_prompts_of_a_step_come_short_ones_first_with_their_candidates_together():
    problems = [dict(problem=f"{index}", prompt_ids=[2] * length) for index, length in enumerate((5, 2, 9, 2, 7, 3))]
    args = opd.parse_args(["--batch_size", "4", "--num_generations", "3"])
    drawn = opd.draw_prompts(types.SimpleNamespace(train=problems), args, step=1)
    lengths = [len(problem["prompt_ids"]) for problem in drawn[::3]]
    assert lengths == sorted(lengths) and len(set(lengths)) > 1
    assert [problem["problem"] for problem in drawn] == [problem["problem"] for problem in drawn[::3] for _ in range(3)]
    assert {int(problem["problem"]) for problem in drawn} == set(opd.batch_indices(1, 4, 6, args.seed))


def test_one_group_of_all_rows_draws_what_a_rollout_draws():
    outs, settings = [], dict(SAMPLING, max_length=12, num_generations=2, overlap_k=4)
    for function, rows in ((opd.rollout, ()), (opd.rollout_in_groups, (6,))):
        torch.manual_seed(0)
        outs.append(function(STUDENT, TEACHER, without_padding(*prompts(3, 3, 2, 2, 5, 5)), *rows, **settings))
    for name in outs[0].keys() - {"teacher_seconds", "teacher_hidden"}:
        assert torch.equal(outs[0][name].nan_to_num(), outs[1][name].nan_to_num()), name
    assert all(map(torch.equal, outs[0]["teacher_hidden"], outs[1]["teacher_hidden"]))


def test_groups_without_a_teacher_have_no_hidden_states_of_it():
    out = opd.rollout_in_groups(STUDENT, None, without_padding(*prompts(3, 2, 5)), 1, max_length=4, **SAMPLING)
    assert out["teacher_hidden"] == [None] * 3 and out["prompt_mask"].sum(-1).tolist() == [3, 2, 5]
    assert out["teacher_seconds"] == 0


def test_the_seconds_of_the_teacher_are_those_of_all_groups(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(opd, "clock", lambda device: next(ticks))
    rows = without_padding(*prompts(3, 2))
    out = opd.rollout_in_groups(STUDENT, TEACHER, rows, 1, max_length=4, overlap_k=4, **SAMPLING)
    assert out["teacher_seconds"] == 2                        # a segment each


@pytest.mark.parametrize("kind", ["OpenAIGPT", "Rwkv", "Mamba"])
def test_models_that_keep_no_keys_and_values_are_refused_by_name(kind, world, tmp_path):
    model = {"OpenAIGPT": lambda: transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(
                 vocab_size=V, n_positions=64, n_embd=32, n_layer=1, n_head=4)),
             "Rwkv": lambda: transformers.RwkvForCausalLM(transformers.RwkvConfig(
                 vocab_size=V, context_length=64, hidden_size=32, num_hidden_layers=2)),
             "Mamba": lambda: transformers.MambaForCausalLM(transformers.MambaConfig(
                 vocab_size=V, hidden_size=32, num_hidden_layers=1))}[kind]()
    model.save_pretrained(tmp_path)
    opd.tiny_tokenizer(WORDS).save_pretrained(tmp_path)
    for changes in ({}, {"eval_only": True}):
        with pytest.raises(ValueError, match=f"^{model.config.model_type} models are not supported"):
            opd.read_inputs(opd.parse_args(command(world, tmp_path, student=tmp_path, **changes)))


def test_heads_of_two_widths_are_cut_to_the_vocabulary_they_share():
    wide = tiny_llama(0, vocab_size=V + 8)
    ids, _ = prompts(6)
    cut = opd.head_logits(wide, wide.base_model(ids).last_hidden_state, V)
    close(cut, wide(ids).logits[..., :V])
    assert roll(wide, TEACHER, eos_ids={V}, temperature=3.0)["response_ids"].max() < V


# ---- 7. One update (section 10) ----------------------------------------------------------------------------

LENGTHS = (2, 5, 3, 4)
LOSSES = {"reverse_kl": lambda p, q, ids: opd.reverse_kl(p, q),
          "topk": lambda p, q, ids: opd.reverse_kl_topk(p, q, 4),
          "sampled": lambda p, q, ids: opd.reverse_kl_sampled(p, q, ids)}


def make_batch(student, teacher, **changes):
    """A sampled rollout, and weights that differ from token to token."""
    torch.manual_seed(0)
    out = roll(student, teacher, LENGTHS, **{**dict(eos_ids={2, 3}, temperature=1.0), **changes})
    prompt_ids, prompt_mask = prompts(*LENGTHS)
    weight = torch.rand(out["overlap"].shape, generator=torch.Generator().manual_seed(0)) + .5
    return dict(out, prompt_ids=prompt_ids, prompt_mask=prompt_mask, loss_mask=out["response_mask"],
                token_weight=weight)


def gradients_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def update(student, teacher, batch, loss="reverse_kl", lr=0.0, **changes):
    """train_step with a learning rate of 0 -> (its metrics, the gradient of every parameter)."""
    settings = dict(
        learning_rate=lr,
        micro_batch_size=2, max_grad_norm=1e9, token_loss=LOSSES.get(loss, loss),
        measure=lambda p, q, *_: opd.alignment(p, q, None, 4),
        student_head=lambda hidden: opd.head_logits(student, hidden, V),
        teacher_head=lambda hidden: opd.head_logits(teacher, hidden, V))
    optimizer = torch.optim.SGD(student.parameters(), lr=lr)
    return opd.train_step(student, optimizer, batch, **{**settings, **changes}), gradients_of(student)


def plain_gradients(student, teacher, batch, token_loss, lengths=LENGTHS):
    """The same by the book: every row alone and unpadded, full logits, one loss, one backward."""
    student.zero_grad()
    total, count = 0.0, batch["loss_mask"].sum()
    for row, (ids, prompt) in enumerate(rows_of({**batch, "response_mask": batch["loss_mask"]}, lengths)):
        if batch["loss_mask"][row].any():
            p, q = student(ids).logits[:, prompt - 1:-1], teacher(ids).logits[:, prompt - 1:-1].detach()
            weight = batch["token_weight"][row, :ids.shape[1] - prompt]
            total = total + (token_loss(p, q, ids[:, prompt:]) * weight).sum() / count
    total.backward()
    return total.item(), gradients_of(student)


def assert_same(a, b, tolerance=1e-6):
    assert a.keys() == b.keys()
    for name in a:
        close(a[name], b[name], rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize("loss", LOSSES)
@FAMILIES
def test_the_gradients_are_those_of_plain_autograd_on_full_logits(family, loss):
    student, teacher = family(1), family(2)
    batch = make_batch(student, teacher)
    metrics, grads = update(student, teacher, batch, loss)
    expected, plain = plain_gradients(student, teacher, batch, LOSSES[loss])
    assert metrics["loss"] == pytest.approx(expected, rel=1e-4)
    assert_same(grads, plain, tolerance=3e-6)


@pytest.mark.parametrize("change", [
    {"micro_batch_size": 1}, {"micro_batch_size": 3}, {"chunk_tokens": 1}, {"chunk_tokens": 5}], ids=str)
def test_the_gradients_do_not_depend_on_how_the_step_is_cut_into_pieces(change):
    """The normaliser is of the whole step: a mean per micro-batch would favour the tokens of short rows."""
    student = tiny_llama(1)
    batch = make_batch(student, TEACHER)
    assert len(set(batch["loss_mask"].sum(-1).tolist())) > 1
    whole, expected = update(student, TEACHER, batch, micro_batch_size=4)
    pieces, grads = update(student, TEACHER, batch, **change)
    assert_same(grads, expected)
    assert pieces == pytest.approx(whole, rel=1e-4)


def spy(seen):
    """A token loss that collects which tokens it is asked about."""
    def token_loss(p, q, ids):
        seen.extend(ids.tolist())
        return opd.reverse_kl(p, q)
    return token_loss


def test_the_loss_sees_each_response_token_once_with_its_eos_and_no_prompt_or_padding():
    student, seen = tiny_llama(1), []
    batch = make_batch(student, TEACHER)
    metrics, _ = update(student, TEACHER, batch, spy(seen))
    assert sorted(seen) == sorted(batch["response_ids"][batch["response_mask"]].tolist())
    assert batch["ended"].any() and sum(token in (2, 3) for token in seen) == batch["ended"].sum()
    assert metrics["num_tokens"] == len(seen)


def test_rows_outside_the_loss_mask_give_no_gradient_and_do_not_count():
    student = tiny_llama(1)
    batch = make_batch(student, TEACHER)
    batch["loss_mask"] = batch["response_mask"] & torch.tensor([True, False, True, False])[:, None]
    metrics, grads = update(student, TEACHER, batch)
    assert metrics["num_tokens"] == batch["loss_mask"].sum()
    assert_same(grads, plain_gradients(student, TEACHER, batch, LOSSES["reverse_kl"])[1], tolerance=3e-6)


def test_a_loss_on_the_prefix_of_a_full_rollout_is_the_loss_on_a_truncated_rollout():
    """So what a prefix method does not train on it need not sample. The normaliser is the only difference."""
    student = tiny_llama(1)
    full, prefix = (make_batch(student, TEACHER, eos_ids={V}, max_length=length) for length in (12, 4))
    prefix["token_weight"] = torch.ones(4, 4)
    full["token_weight"] = (torch.arange(12) < 4).float().expand(4, 12) * 3      # 12 tokens count, not 4
    assert_same(update(student, TEACHER, full)[1], update(student, TEACHER, prefix)[1])


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation makes inside it."""
    numel = 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        out = operation(*arguments, **(keywords or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            self.numel = max(self.numel, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("loss", LOSSES)
def test_no_tensor_of_all_tokens_times_the_vocabulary_ever_exists(loss):
    """python test_opd.py memory shows it at full size, in GiB."""
    wide = 2000
    student, teacher = (tiny_qwen3(seed, vocab_size=wide) for seed in (1, 2))
    with LargestTensor() as sampled:
        batch = make_batch(student, teacher, vocab_size=wide, max_length=160, segment_length=80, eos_ids=set())
    with LargestTensor() as updated:
        heads = {f"{name}_head": lambda hidden, model=model: opd.head_logits(model, hidden, wide)
                 for name, model in (("student", student), ("teacher", teacher))}
        update(student, teacher, batch, loss, micro_batch_size=4, **heads)
    tokens = int(batch["loss_mask"].sum())
    assert tokens == 4 * 160
    assert sampled.numel == updated.numel == 192 * wide < tokens * wide / 3      # the logits of one chunk


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_short_rows_share_a_micro_batch_up_to_the_tokens_of_the_longest_ones(micro_batch_size):
    """A long prompt with a short response and the other way round are of one length; nothing but padding differs."""
    student, lengths, cuts = tiny_llama(1), (30, 1, 2, 14, 7, 1, 3, 2), (2, 12, 12, 9, 12, 0, 1, 3)
    torch.manual_seed(0)
    batch = roll(student, TEACHER, lengths, eos_ids={V}, temperature=1.0, num_generations=1)
    batch["prompt_ids"], batch["prompt_mask"] = prompts(*lengths)
    batch["loss_mask"] = torch.arange(12) < torch.tensor(cuts)[:, None]
    batch["token_weight"] = torch.rand(8, 12) + .5
    shapes, stop = forward_shapes(student)
    _, grads = update(student, TEACHER, batch, micro_batch_size=micro_batch_size)
    stop()
    sizes = sorted((prompt + cut for prompt, cut in zip(lengths, cuts) if cut), reverse=True)
    for rows, columns in shapes:
        assert columns == sizes[0] - 1 and rows * sizes[0] <= micro_batch_size * 32      # its last token predicts nothing
        del sizes[:rows]
    assert not sizes and max(rows for rows, _ in shapes) > micro_batch_size
    _, expected = plain_gradients(student, TEACHER, batch, LOSSES["reverse_kl"], lengths)
    assert_same(grads, expected, tolerance=3e-6)


def test_a_loss_mask_shorter_than_the_rollout_takes_the_matching_teacher_states():
    student = tiny_llama(1)
    full, prefix = (make_batch(student, TEACHER, eos_ids={V}, max_length=length) for length in (12, 4))
    full["loss_mask"] = full["response_mask"] & (torch.arange(12) < 4)
    full["token_weight"], prefix["token_weight"] = torch.ones(4, 12), torch.ones(4, 4)
    assert_same(update(student, TEACHER, full)[1], update(student, TEACHER, prefix)[1])


@pytest.mark.parametrize("loss", LOSSES)
def test_a_student_that_is_its_own_teacher_has_nothing_to_learn(loss):
    student, teacher = tiny_llama(1), tiny_llama(1)
    metrics, grads = update(student, teacher, make_batch(student, teacher), loss)
    assert abs(metrics["loss"]) < 1e-5 and metrics["grad_norm"] < 1e-3
    assert metrics["overlap_ratio"] == 1 and abs(metrics["reverse_kl"]) < 1e-5


def test_a_loss_that_is_not_finite_is_raised_before_any_weight_changes():
    student = tiny_llama(1)
    batch, before = make_batch(student, TEACHER), {name: p.clone() for name, p in student.named_parameters()}
    with pytest.raises(FloatingPointError):
        update(student, TEACHER, batch, lambda p, q, ids: opd.reverse_kl(p, q) * float("nan"), lr=1.0)
    assert_same(before, dict(student.named_parameters()), tolerance=0)


# ---- 8. Data and grading (section 2) -----------------------------------------------------------------------

def write(path, *records, text=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if text is not None else "".join(json.dumps(record) + "\n" for record in records))
    return str(path)


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+3?"}]
DAPO = ("Solve the following math problem step by step. The last line of your response should be of the form "
        "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n2+3?\n\n"
        "Remember to put your answer on its own line after \"Answer:\".")


@pytest.mark.parametrize("record, answer", [
    ({"problem": "2+3?", "answer": "\\frac{5}{1}", "solution": "long"}, "\\frac{5}{1}"),   # MATH-500, AIME
    ({"problem": "2+3?", "answer": 5}, "5"),
    ({"question": "2+3?", "answer": "2 and 3 give 5.\n#### 5"}, "5"),   # GSM8K
    ({"question": "2+3?", "final_answer": "5"}, "5"),   # DeepMath
    ({"prompt": "2+3?", "solution": "5"}, "5"),   # DAPO, processed
    ({"prompt": CHAT, "solution": "$5$"}, "5"),   # DeepMath of TRL
    ({"prompt": CHAT, "reward_model": {"ground_truth": "5", "style": "rule"}}, "5"),   # verl
    ({"prompt": [{"role": "user", "content": DAPO}], "reward_model": {"ground_truth": "5"}}, "5"),
    ({"problem": "2+3?", "solution": "So \\boxed{4}, no, \\boxed{5}."}, "5"),   # NuminaMath
    ({"messages": [*CHAT, {"role": "assistant", "content": "\\boxed{5}"}]}, "5"),
    ({"user": "alice", "assistant": "gpt", "prompt": CHAT, "answer": "5", "reward_model": "rule"}, "5"),
    ({"problem": "2+3?", "prompt": 5, "reward_model": None, "answer": 5}, "5"),
    ({"problem": "2+3?"}, None)], ids=lambda value: None if isinstance(value, dict) else str(value))
def test_load_problems_reads_the_shape_of_the_usual_data_sets(tmp_path, record, answer):
    expected = [{"problem": "2+3?", "answer": answer}]
    assert opd.load_problems(write(tmp_path / "a.jsonl", record)) == expected
    assert opd.load_problems(write(tmp_path / "a.json", text=json.dumps([record], indent=2))) == expected


def test_duplicate_problems_are_left_out_and_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", *[{"problem": f"{i % 3}?"} for i in range(10)])
    with pytest.warns(UserWarning, match="7 duplicates"):
        assert [problem["problem"] for problem in opd.load_problems(path)] == ["0?", "1?", "2?"]


def test_a_line_separator_inside_a_string_does_not_end_a_line(tmp_path):
    path = write(tmp_path / "a.jsonl", text='{"problem": "a\u2028b"}\n\n{"problem": "c"}\n')
    assert [problem["problem"] for problem in opd.load_problems(path)] == ["a\u2028b", "c"]


@pytest.mark.parametrize("text, says", [
    ('{"problem": "a"}\n\n{"problem": "b",\n', "line 3"), ('{"text": "a", "id": 1}\n', "text, id"),
    ('"just a string"\n', "record 1"),
    ("", "empty"), ("\n\n", "empty"), ('{"problem": null}\n', "problem"), ('{"problem": 5}\n', "record 1"),
    ('{"prompt": [{"from": "human", "value": "2+3?"}]}\n', "record 1")])
def test_a_file_that_cannot_be_read_is_a_value_error_that_says_where(tmp_path, text, says):
    path = write(tmp_path / "a.jsonl", text=text)
    with pytest.raises(ValueError) as error:
        opd.load_problems(path)
    assert says in str(error.value) and path in str(error.value) and "\n" not in str(error.value)


def test_parquet_without_pyarrow_says_what_to_install(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)                            # importing None fails
    with pytest.raises(SystemExit) as stop:
        opd.main(command(world, tmp_path, train_file=write(tmp_path / "a.parquet", text="x")))
    told_line = capsys.readouterr().err
    assert stop.value.code == 2 and told_line.count("\n") == 1 and "pip install pyarrow" in told_line


@pytest.mark.parametrize("text, content", [
    (r"\boxed{1} no, \boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{1} and \boxed{2", "1"), ("42", None),
    (r"\boxed{", None), (r"\boxed{ \{1,2\} }", r" \{1,2\} "), (r"\boxed {3}", "3"), (r"\boxed{}", ""),
    (r"\boxed{\left\{ 1 \right)}", r"\left\{ 1 \right)")])
def test_last_boxed_is_the_last_box_that_closes(text, content):
    assert opd.last_boxed(text) == content


@pytest.mark.parametrize("response, gold, right", [
    (r"so \boxed{33}", "33", True), ("so 33", "33", False), (r"so $12+21=33$ and", "33", False),
    (r"so \boxed{33", "33", False),
    (r"\boxed{33} no, \boxed{34}", "33", False), (r"\boxed{34} no, \boxed{33}", "33", True),
    (r"<think>\boxed{33}</think> 34", "33", False), (r"<think>\boxed{34}</think> \boxed{33}", "33", True),
    (r"\boxed{033}", "33", True), (r"\boxed{$33$}", r"\boxed{33}", True),
    (r"\boxed{0.5}", r"\frac{1}{2}", True),
    (r"\boxed{10\%}", "0.1", True), (r"\boxed{1,234}", "1234", True), (r"\boxed{}", "33", False),
    (r"\boxed{\frac{}}", "33", False), (r"\boxed{(3, \pi/2)}", r"\left( 3, \frac{\pi}{2} \right)", True),
    (r"\boxed{3}", r"\left( 3, \frac{\pi}{2} \right)", False),
    (r"\boxed{(1,2)}", "1<x<2", True), (r"\boxed{1<x<2}", "(1,2)", False)])    # math-verify is not symmetric
def test_grading(response, gold, right):
    """The last balanced box after any </think>, and nothing else, is the answer."""
    assert opd.is_correct(response, gold) is right


def test_grading_works_off_the_main_thread():
    got = []
    thread = threading.Thread(target=lambda: got.append(opd.is_correct(r"\boxed{0.5}", r"\frac{1}{2}")))
    thread.start()
    thread.join()
    assert got == [True]


def test_grading_leaves_the_callers_alarm_alone():
    """math-verify's own time limits are alarms, and would cancel it."""
    rang = []
    before = signal.signal(signal.SIGALRM, lambda *_: rang.append(True))
    signal.setitimer(signal.ITIMER_REAL, 60)
    assert opd.is_correct(r"\boxed{0.5}", r"\frac{1}{2}")
    assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] < 60
    signal.setitimer(signal.ITIMER_REAL, .05)
    time.sleep(.1)
    signal.signal(signal.SIGALRM, before)
    assert rang


def test_an_answer_that_takes_for_ever_is_wrong_after_some_seconds_and_the_next_one_is_graded():
    begin = time.perf_counter()
    assert not opd.is_correct(r"\boxed{2003^{2002^{2001}}}", "5")
    assert time.perf_counter() - begin < 5
    assert opd.is_correct(r"\boxed{0.5}", r"\frac{1}{2}")


def test_grading_goes_on_when_its_process_has_died():
    assert opd.is_correct(r"\boxed{0.5}", r"\frac{1}{2}")
    worker, = [value for value in opd.ask_math_verify.__defaults__ if isinstance(value, dict)]
    worker["process"].kill()
    worker["process"].wait()
    assert opd.is_correct(r"\boxed{0.5}", r"\frac{1}{2}")


@pytest.mark.parametrize("gold, readable", [("1/2", True), ("x^2+1", True), ("", False), ("}{", False),
                                            ("\\frac{}", False)])
def test_without_an_answer_math_verify_is_asked_whether_it_can_read_the_gold(gold, readable):
    assert opd.ask_math_verify(gold, None) is readable


SHARED = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "shared", "data")


@pytest.mark.skipif(not os.path.isdir(SHARED), reason="the project's own data sets are not here")
@pytest.mark.filterwarnings("ignore:.*duplicates")
def test_every_gold_answer_of_the_data_sets_is_right_in_a_box_and_wrong_without():
    for name in sorted(os.listdir(SHARED)):
        for problem in opd.load_problems(os.path.join(SHARED, name)) if name.endswith(".jsonl") else ():
            gold = problem["answer"]
            assert opd.is_correct(f"So \\boxed{{{gold}}}.", gold), problem
            assert not opd.is_correct(f"So {gold}.", gold), problem
            assert not opd.is_correct(f"So ${gold}$, that is \\boxed{{{gold}", gold), problem
            assert not opd.is_correct(f"\\boxed{{{gold}}} or rather \\boxed{{-98765}}", gold), problem
            assert opd.is_correct(f"\\boxed{{-98765}} or rather \\boxed{{{gold}}}", gold), problem


# ---- 9. The command line (sections 1, 12, 13) --------------------------------------------------------------

def test_defaults_are_the_papers_for_real_models_and_small_for_the_tiny_world():
    real, world = opd.parse_args("--student a --teacher b --train_file c".split()), opd.parse_args([])
    papers = dict(
        overlap_k=16, num_generations=4, batch_size=64, learning_rate=1e-6, temperature=1, drift_threshold=.7,
        w_drop=.01, w_base=.5, cap_init=2048, cap_min=1024, cap_max=12288, eval_samples=16,
        eval_temperature=.7, eval_top_p=.95, eval_max_new_tokens=31744)
    assert {name: vars(real)[name] for name in papers} == papers
    assert world.max_new_tokens < 200 and world.learning_rate > 1e-4
    assert opd.parse_args(["--learning_rate", "0.5"]).learning_rate == .5        # a flag that is given wins


def test_names_of_other_trainers_are_understood():
    args = opd.parse_args("--model_name_or_path a --teacher_model_name_or_path b --train_file c d "
                          "--max_completion_length 77".split())
    assert (args.student, args.teacher, args.train_file, args.max_new_tokens) == ("a", "b", ["c", "d"], 77)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two models (the teacher's head has 8 rows more), problems, and what can be wrong with either."""
    folder = tmp_path_factory.mktemp("world")
    for name, model, words in (
            ("student", tiny_qwen3(1), WORDS), ("other", tiny_qwen3(3), WORDS[:6] + WORDS[6:][::-1]),
            ("teacher", tiny_qwen3(2, hidden_size=48, vocab_size=V + 8), WORDS),
            ("falcon", tiny("FalconH1", 0, **FALCON), WORDS), ("window", tiny("Mistral", 0, sliding_window=8), WORDS),
            ("conv", tiny("Lfm2", 0, layer_types=["conv", "full_attention"]), WORDS)):
        model.save_pretrained(folder / name)
        opd.tiny_tokenizer(words).save_pretrained(folder / name)
    shutil.copytree(folder / "teacher", folder / "broken")
    write(folder / "broken" / "model.safetensors", text="cut off")
    rng = random.Random(0)
    problems = [{"problem": " ".join(rng.sample(WORDS[6:], 2 + i % 4)), "answer": str(i)} for i in range(9)]
    write(folder / "train.jsonl", *problems)
    write(folder / "eval.jsonl", *problems[:3])
    write(folder / "again" / "eval.jsonl", *problems[3:5])
    write(folder / "unanswered.jsonl", {"problem": "1 2 3"})
    write(folder / "empty.jsonl", text="")
    write(folder / "bad.jsonl", text='{"problem": "1"}\n{"problem": \n')
    write(folder / "keys.jsonl", {"text": "1", "label": 2})
    return folder


SMALL = dict(
    prompt_template="{problem}", batch_size=2, num_generations=2, max_new_tokens=12, segment_length=4,
    prefix_length=6, probe_window=4, overlap_k=4, horizon_start=4, horizon_growth=4, horizon_every=1,
    cap_init=8, cap_min=4, cap_max=12, cap_step=2, cap_margin=2, max_steps=2, learning_rate=1e-3,
    eval_samples=1, eval_max_new_tokens=12, eval_every=0, validation_size=3, dtype="float32", device="cpu")


def command(world, out, **changes):
    """A command line for the small world. A change to None leaves a flag out, to True gives it no value."""
    flags = {**SMALL, **{name: world / name for name in ("student", "teacher")}, "output_dir": out,
             **{f"{name}_file": world / f"{name}.jsonl" for name in ("train", "eval")}, **changes}
    argv = []
    for name, value in flags.items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        if value is not None:
            argv += [f"--{name}", *(str(part).replace("{world}", str(world)) for part in values)]
    return argv


def train(world, out, **changes):
    """-> (what main returns, the lines of metrics.jsonl about training steps, those about evaluations)."""
    results = opd.main(command(world, out, **changes))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return results, [line for line in lines if "loss" in line], [line for line in lines if "eval" in line]


MISTAKES = {
    "no such training file": (dict(train_file="{world}/nowhere.jsonl"), "nowhere.jsonl"),
    "an empty file": (dict(train_file="{world}/empty.jsonl"), "empty"),
    "a line that is not JSON": (dict(train_file="{world}/bad.jsonl"), "line 2"),
    "a record without a problem": (dict(train_file="{world}/keys.jsonl"), "text, label"),
    "a model that is nowhere": (dict(student="{world}/nowhere"), "nowhere"),
    "a model folder that does not load": (dict(teacher="{world}/broken"), "broken"),
    "different token maps": (dict(teacher="{world}/other"), "different ids for 18 tokens: '0' is 6 and 23"),
    "a model whose logits are made otherwise": (dict(student="{world}/falcon"), "falcon_h1"),
    "a model whose layers keep no keys": (dict(student="{world}/conv"), "lfm2"),
    "a static cache for a sliding window": (dict(student="{world}/window", static_cache=True), "mistral"),
    "prompts that are all too long": (dict(max_prompt_length=2), "--max_prompt_length 2"),
    "a share of a mixture that is no number": (dict(mix=["nan"]), "--mix"),
    "a depth of no percentage": (dict(probe_depths=[0, 100]), "--probe_depths"),
    "shares for more files than there are": (dict(mix=[.5, .5]), "--mix"),
    "shares that are not 1 in all": (dict(mix=[.9]), "--mix"),
    "a share of less than a prompt": (dict(mix=[.1, .9], batch_size=4, train_file=["{world}/train.jsonl"] * 2), "--mix"),
    "a prefix of all tokens": (dict(method="prefix-guided", prefix_length=12), "--prefix_length must be below"),
    "a size of zero": (dict(batch_size=0), "--batch_size 0"),
    "a negative size": (dict(max_new_tokens=-1), "--max_new_tokens -1"),
    "a size that is no number": (dict(batch_size="many"), "many"),
    "an unknown method": (dict(method="magic"), "magic"),
    "an unknown flag": (dict(magic=1), "--magic"),
    "evaluation problems without answers": (dict(eval_file="{world}/unanswered.jsonl"), "unanswered"),
    "a student without a teacher": (dict(teacher=None), "--teacher"),
    "training without problems": (dict(train_file=None), "--train_file"),
    "an overlap of more tokens than there are": (dict(overlap_k=V + 1), "--overlap_k 25"),
    "fewer answers than extrapolation asks for": (dict(extrapolate=True, validation_size=10), "10"),
    "fewer answers once long prompts are left out":
        (dict(extrapolate=True, validation_size=9, max_prompt_length=5), "9"),
    "an output folder that cannot be made": (dict(output_dir="{world}/bad.jsonl/out"), "bad.jsonl"),
    "a checkpoint that is nowhere": (dict(resume="{world}/nowhere"), "nowhere is no whole checkpoint"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_users_mistake_ends_in_one_line_and_status_2_with_nothing_written(mistake, world, tmp_path, capfd):
    changes, says = MISTAKES[mistake]
    transformers.utils.logging.disable_progress_bar()
    with pytest.raises(SystemExit) as stop:
        opd.main(command(world, tmp_path / "out", **changes))
    out, err = capfd.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.startswith("opd.py: ") and err.count("\n") == 1 and says in err
    assert os.listdir(tmp_path) == []


def test_a_chat_prompt_has_the_templates_special_tokens_once():
    ids = opd.encode_prompt(opd.tiny_tokenizer(WORDS), "1 2", "{problem}")
    assert [WORDS[token] for token in ids] == ["<user>", "1", "2", "<solve>"]


# ---- 10. From end to end -----------------------------------------------------------------------------------

@pytest.mark.parametrize("loss", ["reverse_kl", "topk", "sampled"])
@pytest.mark.parametrize("method", ["opd", "prefix", "progressive", "prefix-guided", "prune"])
def test_every_method_with_every_loss_finishes_with_finite_numbers(method, loss, world, tmp_path):
    results, steps, evaluations = train(world, tmp_path, method=method, loss=loss)
    assert [line["step"] for line in steps] == [1, 2] and len(evaluations) == 3
    numbers = [value for line in steps for value in line.values() if isinstance(value, float)]
    assert all(math.isfinite(value) for value in numbers) and steps[0]["grad_norm"] > 0
    assert steps[-1]["teacher_tokens"] <= steps[-1]["generated_tokens"] and steps[-1]["trained_tokens"] > 0


def test_a_run_samples_on_static_caches_when_it_is_asked_to(world, tmp_path, monkeypatch):
    """Everywhere: in the preflight, in training, and in evaluations of both models."""
    grown, grow = [], opd.grow_cache
    monkeypatch.setattr(opd, "grow_cache", lambda *args: (grown.append(args[1].hidden_size), grow(*args))[1])
    _, steps, evaluations = train(world, tmp_path, static_cache=True, eval_every=1)
    assert len(steps) == 2 and len(evaluations) == 4 and all(math.isfinite(line["loss"]) for line in steps)
    assert set(grown) == {32, 48}
    grown.clear()
    train(world, tmp_path)
    assert grown == []


def test_the_first_answer_of_every_evaluation_is_shown_when_it_is_asked_for(world, tmp_path, capsys):
    for wanted in (False, True):
        train(world, tmp_path, max_steps=1, print_samples=wanted or None)
        lines = capsys.readouterr().out.splitlines()
        with open(tmp_path / "samples.jsonl") as file:
            answers = [json.loads(line) for line in file]
        first = [answer["response"] for answer in answers if answer["index"] == answer["sample"] == 0]
        assert len(first) == 3 and [text in lines for text in first] == [wanted] * 3


@pytest.fixture(scope="module")
def first_run(world, tmp_path_factory):
    """One run that several tests look at -> (its folder, results, step lines, evaluation lines)."""
    out = tmp_path_factory.mktemp("run")
    return out, *train(world, out, max_steps=4)


def same_weights(a, b):
    a, b = (transformers.AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (a, b))
    return all(torch.equal(a[name], b[name]) for name in a)


def repeatable(lines):
    return [{name: line[name] for name in line if not name.startswith(("time", "peak"))} for line in lines]


def test_the_same_seed_gives_the_same_metrics_and_another_seed_others(world, tmp_path, first_run):
    assert repeatable(train(world, tmp_path, max_steps=4)[1]) == repeatable(first_run[2])
    assert repeatable(train(world, tmp_path, max_steps=4, seed=1)[1]) != repeatable(first_run[2])


def test_evaluating_more_often_does_not_change_training(world, tmp_path, first_run):
    _, steps, evaluations = train(world, tmp_path, max_steps=4, eval_every=1, eval_samples=2)
    assert len(evaluations) == 6 and repeatable(steps) == repeatable(first_run[2])


def test_every_step_logs_the_documented_names(first_run):
    names = """step loss reverse_kl overlap_ratio overlap_token_advantage overlap_mass_student
        overlap_mass_teacher entropy_student entropy_teacher entropy_gap overlap_by_position response_length
        truncated_fraction kept_fraction repetition generated_tokens teacher_tokens trained_tokens flops
        time_rollout time_teacher time_update peak_memory_gb grad_norm""".split()
    for line in first_run[2]:
        assert set(names) <= set(line) and len(line["overlap_by_position"]) == 8


def test_every_evaluation_logs_its_result_and_its_sampling_settings(first_run):
    names = """avg_at_n se pass_at_n mean_length truncated_fraction no_box_fraction temperature top_p
        max_new_tokens seed""".split()
    graded = [(line["step"], line["model"]) for line in first_run[3]]
    assert graded == [(0, "teacher"), (0, "student"), (4, "student")]
    assert all(set(names) <= set(line["eval"]["eval"]) for line in first_run[3])


def test_every_graded_answer_is_a_line_of_samples(first_run):
    samples = [json.loads(line) for line in open(first_run[0] / "samples.jsonl")]
    assert len(samples) == 3 * 3 and {"problem", "answer", "response", "correct"} <= set(samples[0])


def test_a_checkpoint_is_a_model_folder_like_any_other(world, first_run):
    folder = first_run[0] / "checkpoint-4"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == opd.tiny_tokenizer(WORDS).get_vocab() and tokenizer.chat_template
    assert not same_weights(folder, world / "student")


def test_where_everything_sampled_is_trained_on_the_three_token_counts_are_one(first_run):
    lengths = sum(line["response_length"] * 4 for line in first_run[2])
    last = first_run[2][-1]
    assert last["generated_tokens"] == last["teacher_tokens"] == last["trained_tokens"] == lengths


def test_distillation_moves_the_student_towards_the_teacher(world, tmp_path):
    _, steps, _ = train(world, tmp_path, max_steps=60, batch_size=4, learning_rate=3e-3, loss="reverse_kl")
    before, after = ({name: median([line[name] for line in part]) for name in ("reverse_kl", "overlap_ratio")}
                     for part in (steps[:10], steps[-10:]))   # of the 8 rows of one step, chance would decide
    assert after["reverse_kl"] < .8 * before["reverse_kl"] and after["overlap_ratio"] > before["overlap_ratio"] + .1


def test_a_growing_horizon_and_a_moving_cap_show_in_the_length_of_rollouts(world, tmp_path):
    def lengths(**changes):
        return [line["max_length"] for line in train(world, tmp_path, max_steps=4, **changes)[1]]
    assert lengths(method="progressive") == [4, 8, 12, 12]
    assert lengths(method="prune", cap_hit_ratio=0) == [8, 10, 12, 12]
    assert lengths(method="prune", cap_patience=1, drift_threshold=1.1, w_drop=1) == [8, 6, 4, 4]


def test_prune_weighs_a_token_by_its_reliability_plus_w_base(world, tmp_path):
    """Reliability 0 everywhere and 1 everywhere: the losses of the first step are as .5 to 1.5."""
    def loss(**changes):
        changes.update(max_steps=1, method="prune", no_prune_in_flight=True)
        return train(world, tmp_path, **changes)[1][0]["loss"]
    assert loss(w_drop=1, drift_threshold=1.1) * 3 == pytest.approx(loss(drift_threshold=0), rel=1e-4)


def test_temperature_divides_the_logits_of_both_models_in_the_loss(world, tmp_path):
    """So that the loss scores the law that was sampled from. At a huge temperature both are uniform."""
    step = train(world, tmp_path, max_steps=1, temperature=1e6)[1][0]
    assert step["entropy_student"] == pytest.approx(math.log(V)) == step["entropy_teacher"]
    assert abs(step["loss"]) < 1e-4


def test_prefixes_of_candidates_that_lost_are_trained_on_only_when_asked_for(world, tmp_path):
    flags = dict(method="prefix-guided", num_generations=8)
    without = train(world, tmp_path, **flags)[1][0]
    with_them = train(world, tmp_path, **flags, train_pruned_prefix=True)[1][0]
    assert without["generated_tokens"] == with_them["generated_tokens"] == with_them["trained_tokens"]
    assert without["trained_tokens"] < without["generated_tokens"]


@pytest.mark.parametrize("method", ["opd", "prefix-guided"])
def test_extrapolation_happens_at_powers_of_two_and_pays_for_its_samples(method, world, tmp_path):
    _, steps, _ = train(world, tmp_path, method=method, extrapolate=True, max_steps=5)
    assert [line["step"] for line in steps if "extrapolation_k" in line] == [1, 2, 4]
    assert steps[0]["validation_tokens"] > 0
    assert steps[0]["generated_tokens"] == steps[0]["teacher_tokens"] + steps[0]["validation_tokens"]


def test_a_rejected_extrapolation_leaves_training_as_it_was(world, tmp_path, first_run, monkeypatch):
    monkeypatch.setattr(opd, "is_correct", lambda text, gold: False)       # no try is ever better
    steps = train(world, tmp_path, extrapolate=True, max_steps=4)[1]
    assert [line["loss"] for line in steps] == [line["loss"] for line in first_run[2]]
    assert {line.get("extrapolation_k", 0) for line in steps} == {0}


def test_eval_only_grades_a_model_file_by_file(world, tmp_path):
    results = opd.main(command(world, tmp_path, eval_only=True, teacher=None, train_file=None,
                               eval_file=[world / "eval.jsonl", world / "train.jsonl"]))
    assert {name: row["num_problems"] for name, row in results.items()} == {"eval": 3, "train": 9}
    assert not [name for name in os.listdir(tmp_path) if name.startswith("checkpoint")]


def test_of_two_evaluation_files_of_one_name_the_second_goes_by_its_path(world, tmp_path):
    again = str(world / "again" / "eval.jsonl")
    results = opd.main(command(world, tmp_path, eval_only=True, teacher=None, train_file=None,
                               eval_file=[world / "eval.jsonl", again]))
    assert {name: row["num_problems"] for name, row in results.items()} == {"eval": 3, again: 2}


def evaluate(*golds):
    problems = [{"problem": "1", "answer": gold, "prompt_ids": [2, 7, 3]} for gold in golds]
    return opd.evaluate(
        STUDENT, opd.tiny_tokenizer(WORDS), problems, num_samples=3, seed=5,
        rows_per_batch=4, decoding=dict(SAMPLING, max_length=8, temperature=1.0, top_p=1.0))


def test_an_evaluation_does_not_depend_on_what_was_drawn_before():
    torch.manual_seed(0)
    first = evaluate("1", "2")
    torch.manual_seed(1)
    assert str(evaluate("1", "2")) == str(first)


def test_the_standard_error_is_over_problems_and_pass_at_n_is_any_right_answer(monkeypatch):
    """Two problems, three answers each, of which 3 and 0 are right: not the evidence of six problems."""
    monkeypatch.setattr(opd, "is_correct", lambda text, gold: gold == "yes")
    metrics, answers = evaluate("yes", "no")
    assert (metrics["avg_at_n"], metrics["pass_at_n"], len(answers)) == (.5, .5, 6)
    assert metrics["se"] == pytest.approx(math.sqrt(.5 / 2))  # the deviation of (1, 0) over the root of 2


@pytest.fixture(scope="module")
def after_one_step(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    train(world, out, max_steps=1, loss="reverse_kl")
    return out / "checkpoint-1"


def test_a_loss_that_is_not_finite_stops_the_run_names_the_step_and_keeps_the_last_good_weights(
        world, tmp_path, monkeypatch, capfd, after_one_step):
    losses = iter([opd.reverse_kl, lambda p, q: p.sum(-1) * float("nan")])
    monkeypatch.setattr(opd, "reverse_kl", lambda p, q: next(losses)(p, q))
    with pytest.raises(SystemExit) as stop:
        train(world, tmp_path, loss="reverse_kl", max_steps=5)
    message = [line for line in capfd.readouterr().err.splitlines() if line.startswith("opd.py")]
    assert stop.value.code == 2 and len(message) == 1 and "step 2" in message[0]
    assert same_weights(tmp_path / "checkpoint-1", after_one_step)


def test_a_model_whose_probabilities_are_not_finite_ends_the_run_in_one_line(world, tmp_path, capfd):
    shutil.copytree(world / "teacher", tmp_path / "nan")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "nan")
    model.lm_head.weight.data.fill_(math.nan)
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(SystemExit) as stop:
        opd.main(command(world, tmp_path, teacher=tmp_path / "nan"))
    assert stop.value.code == 2 and "evaluation after step 0 is not finite: " in capfd.readouterr().err.splitlines()[-1]


def test_control_c_saves_a_checkpoint_and_exits_with_one_line(
        world, tmp_path, monkeypatch, capfd, after_one_step):
    opd_step = opd.opd_step

    def interrupted(run, args, step):
        if step == 2:
            raise KeyboardInterrupt
        return opd_step(run, args, step)
    monkeypatch.setattr(opd, "opd_step", interrupted)
    with pytest.raises(SystemExit) as stop:
        train(world, tmp_path, loss="reverse_kl", max_steps=5)
    message = [line for line in capfd.readouterr().err.splitlines() if line.startswith("opd.py")]
    assert stop.value.code == 130 and len(message) == 1 and "checkpoint-1" in message[0]
    assert same_weights(tmp_path / "checkpoint-1", after_one_step)


def test_control_c_during_an_extrapolation_waits_for_the_end_of_the_step(world, tmp_path, monkeypatch, capfd):
    """Before that the weights are tried ones, and no metrics tell of them."""
    extrapolate = opd.extrapolate

    def interrupted(weights, anchor, validate):
        os.kill(os.getpid(), signal.SIGINT)
        return extrapolate(weights, anchor, validate)
    monkeypatch.setattr(opd, "extrapolate", interrupted)
    with pytest.raises(SystemExit) as stop:
        train(world, tmp_path, loss="reverse_kl", extrapolate=True)
    assert stop.value.code == 130 and "checkpoint-1" in capfd.readouterr().err
    steps = [item for item in map(json.loads, open(tmp_path / "metrics.jsonl")) if "loss" in item]
    assert len(steps) == 1 and "extrapolation_k" in steps[0]


def test_the_anchor_of_an_extrapolation_is_what_was_accepted_the_last_time(world, tmp_path, monkeypatch):
    """Else each try would repeat the jumps before it. The first anchor is the student at the start."""
    start = opd.movable_weights(transformers.AutoModelForCausalLM.from_pretrained(world / "student"))
    accepted, anchors = [start], []

    def extrapolate(weights, anchor, validate):
        anchors.append(anchor)
        accepted.append({name: value + .01 for name, value in weights.items()})
        return accepted[-1], 1, [0.0, 1.0]
    monkeypatch.setattr(opd, "extrapolate", extrapolate)
    train(world, tmp_path, extrapolate=True, max_steps=4)
    assert len(anchors) == 3
    for anchor, expected in zip(anchors, accepted):
        assert_same(anchor, expected, tolerance=0)


def test_the_bfloat16_sampler_keeps_rotary_frequencies_in_float32(world, tmp_path):
    """Rounded to 8 bits, they turn positions around 1,000 by more than .1 rad: the sampler would be another model."""
    args = opd.parse_args(command(world, tmp_path, dtype="bfloat16"))
    run = opd.read_inputs(args)
    assert (run.sampler.dtype, run.teacher.dtype, run.student.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    close(run.sampler.model.rotary_emb.inv_freq, run.student.model.rotary_emb.inv_freq, rtol=0, atol=0)
    frequencies = 10000.0 ** -(torch.arange(0, 64, 2) / 64)                     # heads of 64, as models of 1.5B have
    assert ((frequencies.bfloat16().float() - frequencies) * 1000).abs().max() > .1


def test_a_bfloat16_weight_does_not_feel_an_update_of_a_millionth():
    """Why the student has float32 master weights: Adam moves a weight by about the learning rate, 1e-6."""
    weight = torch.full((100,), .02)
    assert torch.equal(weight.bfloat16() + 1e-6, weight.bfloat16()) and (weight + 1e-6 > weight).all()


def test_training_in_bfloat16_updates_float32_weights_and_samples_with_their_copies(world, tmp_path):
    _, steps, _ = train(world, tmp_path, dtype="bfloat16", loss="reverse_kl", learning_rate=1e-5)
    assert all(math.isfinite(line["loss"]) for line in steps) and steps[0]["loss"] != steps[1]["loss"]


@pytest.mark.parametrize("loss", ["reverse_kl", "topk", "sampled"])
def test_what_was_sampled_is_scored_alike_but_for_bfloat16(loss, world, tmp_path):
    """sampling_mismatch: |log p scored - log p sampled|, 1e-6 where both are float32. A bfloat16 copy of the weights is
    another model, and its samples are off-policy by that much."""
    for dtype, low, high in (("float32", 0, 1e-5), ("bfloat16", 1e-4, .1)):
        _, steps, _ = train(world, tmp_path / dtype, dtype=dtype, loss=loss, temperature=2.0, batch_size=8)
        assert all(low <= line["sampling_mismatch"] < high for line in steps)


def test_the_rows_sampled_at_once_are_those_of_the_flag_in_the_cold_start_too(world, tmp_path, monkeypatch):
    """The candidates of a prompt stay together, but in a cold start, where nobody compares them."""
    seen, rollout = [], opd.rollout
    monkeypatch.setattr(opd, "rollout", lambda *args, **rest: (seen.append(len(args[2])), rollout(*args, **rest))[1])
    for rows, cold, warm in ((None, [8], [8]), (4, [4, 4], [4, 4]), (3, [3, 3, 2], [2, 2, 2, 2])):
        _, (step,), _ = train(world, tmp_path / f"{rows}", rollout_batch_size=rows, batch_size=4, eval_file=None,
                              cold_start_steps=1, max_steps=1)
        assert seen[1:] == cold + warm and step["rollout_batch_size"] == (rows or 8)         # first the preflight
        seen.clear()


@pytest.mark.parametrize("dtype, size", [("float32", 4), ("bfloat16", 2)])
def test_the_caches_keep_of_a_token_the_keys_and_values_of_all_layers_of_both_models(dtype, size, world, tmp_path):
    """The student samples in bfloat16, whatever its master weights are."""
    run = opd.read_inputs(opd.parse_args(command(world, tmp_path, dtype=dtype)))
    assert run.token_bytes == sum(
        2 * size * model.config.num_hidden_layers * model.config.num_key_value_heads * model.config.head_dim
        for model in (run.student, run.teacher))


def test_a_model_that_keeps_no_cache_unless_asked_is_one_like_any_other(world, tmp_path):
    """Many that were trained with gradient checkpointing are saved with use_cache false."""
    shutil.copytree(world / "student", tmp_path / "student")
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    (tmp_path / "student" / "config.json").write_text(json.dumps({**config, "use_cache": False}))
    _, steps, _ = train(world, tmp_path / "out", student=tmp_path / "student", max_steps=1)
    assert len(steps) == 1


@pytest.mark.parametrize("gigabytes, method, rows", [
    (1000, "opd", 256), (44, "opd", 100), (44, "prune", 50), (25, "opd", 5), (24, "opd", 1), (5, "opd", 1)])
def test_by_default_a_gpu_samples_as_many_rows_as_half_of_what_adam_leaves_holds(gigabytes, method, rows, monkeypatch):
    """The gradient and Adam's moments of 2 billion parameters take 24 GB first; a row of 1,000 tokens takes .1 GB."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gigabytes * 10 ** 9, None))
    args = opd.parse_args(["--batch_size", "64", "--max_prompt_length", "200", "--max_new_tokens", "800",
                           "--cap_max", "1800", "--method", method])
    student = types.SimpleNamespace(num_parameters=lambda: 2 * 10 ** 9)
    run = types.SimpleNamespace(device=torch.device("cuda"), token_bytes=100_000, student=student)
    assert opd.rows_that_fit(run, args) == rows
    run.device = torch.device("cpu")
    assert opd.rows_that_fit(run, args) == 256


def test_thinking_is_off_unless_asked_for():
    """Qwen3's template thinks unless it is told enable_thinking=False, so saying nothing would switch it on."""
    tokenizer = opd.tiny_tokenizer(WORDS)
    tokenizer.chat_template = "{% if enable_thinking is defined and enable_thinking is false %}0{% else %}1{% endif %}"
    off, on = (opd.encode_prompt(tokenizer, "2", "{problem}", enable_thinking=flag) for flag in (False, True))
    assert tokenizer.decode(off) == "0" and tokenizer.decode(on) == "1"
    assert not opd.parse_args([]).enable_thinking


def test_metrics_are_json_even_where_a_mean_is_undefined(world, tmp_path):
    """One problem has no standard error. JSON has no NaN, so other readers would stop at it."""
    write(tmp_path / "one.jsonl", {"problem": "2 3", "answer": "5"})
    train(world, tmp_path, eval_file=tmp_path / "one.jsonl")
    text = (tmp_path / "metrics.jsonl").read_text()
    assert '"se": null' in text and "NaN" not in text


def test_gradient_checkpointing_changes_no_gradient_even_in_a_model_with_dropout(world, tmp_path):
    """Layers are recomputed in training mode only, and training mode brings dropout back."""
    tiny_llama(4, attention_dropout=.5).save_pretrained(tmp_path / "dropout")
    opd.tiny_tokenizer(WORDS).save_pretrained(tmp_path / "dropout")
    plain, recomputed = (train(world, tmp_path / name, student=tmp_path / "dropout", **flags)[1] for name, flags in (
        ("plain", {}), ("recomputed", {"gradient_checkpointing": True})))
    for a, b in zip(plain, recomputed):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_the_topk_loss_weighs_by_probabilities_however_small_their_sum():
    student, teacher = torch.zeros(1, 1, V), torch.zeros(1, 1, V)
    student[..., 0], teacher[..., 1] = 60, 60                    # the teacher's token has e^-60 of the student
    loss = opd.reverse_kl_topk(student, teacher, 1, "teacher")
    close(loss, student.log_softmax(-1)[..., 1] - teacher.log_softmax(-1)[..., 1])


def test_a_pad_token_beyond_the_models_rows_is_not_used(world, tmp_path):
    shutil.copytree(world / "student", tmp_path / "padded")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "padded")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "padded")
    run = opd.read_inputs(opd.parse_args(command(
        world, tmp_path, student=tmp_path / "padded", teacher=tmp_path / "padded")))
    assert tokenizer.pad_token_id == V and run.sampling["pad_id"] < run.vocab_size == V


def test_a_box_inside_the_thoughts_is_no_box(world, monkeypatch):
    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "decode", lambda *_, **__: r"\boxed{3} </think> or not")
    metrics, answers = evaluate("3")
    assert metrics["no_box_fraction"] == 1 and metrics["avg_at_n"] == 0


def test_a_json_file_may_hold_lines_and_a_byte_order_mark(tmp_path):
    write(tmp_path / "lines.json", text='\ufeff{"problem": "2", "answer": "1"}\n{"problem": "3", "answer": ["1", "2"]}\n')
    assert [problem["answer"] for problem in opd.load_problems(str(tmp_path / "lines.json"))] == ["1", "1, 2"]


def test_a_file_that_is_not_utf8_is_refused_with_its_line(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes('{"problem": "2"}\n{"problem": "caf\u00e9"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match="latin.jsonl, line 2: not JSON in UTF-8"):
        opd.load_problems(str(tmp_path / "latin.jsonl"))


def test_a_new_run_keeps_the_metrics_of_the_last_one_and_grading_adds_to_them(world, tmp_path):
    first = train(world, tmp_path, max_steps=1)[1]
    train(world, tmp_path, max_steps=2)
    assert json.loads((tmp_path / "metrics.jsonl.old").read_text().splitlines()[-2]) == first[0]
    lines = len((tmp_path / "metrics.jsonl").read_text().splitlines())
    opd.main(command(world, tmp_path, eval_only=True, teacher=None, train_file=None))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == lines + 1
    run = opd.read_run(tmp_path, "")
    assert len(run["evals"]) == 3                                               # which are no points of its curve
    assert [run["curve"][step][:2] for step in (0, 2)] == [
        (0, 0), (run["last"]["generated_tokens"], run["last"]["seconds"])]


def test_the_overlap_of_a_step_is_over_all_that_was_sampled_trained_on_or_not(world, tmp_path):
    """Over the selected rows alone it would be high because of the selection."""
    flags = dict(method="prefix-guided", num_generations=8, max_steps=1)
    steps = [train(world, tmp_path, **flags, **more)[1][0] for more in ({}, {"train_pruned_prefix": True})]
    assert steps[0]["trained_tokens"] < steps[1]["trained_tokens"]
    assert steps[0]["overlap_ratio"] == steps[1]["overlap_ratio"]


# ---- A report of made-up runs, whose right answers are worked out by hand ---------------------------------------

def graded(step, model, accuracy, se=.02, **more):
    """The record of an evaluation; accuracy: of a file named eval, or {file: accuracy}."""
    files = accuracy if isinstance(accuracy, dict) else {"eval": accuracy}
    return {"step": step, "model": model, "eval": {file: {"avg_at_n": value, "se": se, "n": 4}
                                                   for file, value in files.items()}, "generated_tokens": 0, **more}


def made_run(path, after=.6, teacher=.9, before=.1, scale=1, steps=2, text=""):
    """metrics.jsonl of a run; scale: of all that it cost. A step generates 1000 tokens in 2 + 1 + 1 seconds."""
    lines = [graded(0, "student", before), graded(0, "teacher", teacher, time_eval=7)] if before is not None else []
    for step in range(1, steps + 1):
        spent = {"generated_tokens": 1000, "teacher_tokens": 800, "trained_tokens": 500, "flops": 10 ** 9}
        lines.append({"step": step, "overlap_ratio": .5 + .1 * step, "entropy_student": .4, "entropy_teacher": .3,
                      "overlap_by_position": [.5 + .1 * step, None], "time_rollout": 2 * scale, "time_teacher": scale,
                      "time_update": scale, **{key: value * step * scale for key, value in spent.items()}})
    if after is not None:
        lines.append(graded(steps, "student", after, time_eval=3, generated_tokens=1000 * steps * scale))
    return write(path / "metrics.jsonl", text="".join(json.dumps(line) + "\n" for line in lines) + text)


def report(folder):
    """The table of the runs below folder -> ({group: {column: text}}, its lines). Columns end where their heads end."""
    names = sorted(path.parent.relative_to(folder) for path in folder.rglob("metrics.jsonl"))
    lines = opd.report_table([opd.read_run(folder, str(name)) for name in names])
    heads, rows = list(re.finditer(r"\S+(?: \S+)*", lines[0])), {}
    for line in lines[1:[line.startswith("accuracy in %") for line in lines].index(True)]:
        name = line.split()[0]
        starts = [line.index(name) + len(name), *(head.end() for head in heads)]
        rows[name] = {head.group(): line[start:head.end()].strip() for head, start in zip(heads, starts)}
    return rows, lines


def test_runs_that_differ_in_their_seed_are_one_row_with_mean_and_standard_error_over_seeds(tmp_path):
    """.5 .6 .7: standard deviation .1, over the root of 3 .0577. The seed may be written in three ways."""
    for name, after in (("opd/seed-0", .5), ("opd_seed_1", .6), ("opd/seed2", .7), ("b/opd-x/seed-0", .4)):
        made_run(tmp_path / name, after)
    rows, _ = report(tmp_path)
    assert list(rows) == ["opd", "b/opd-x"]                      # the baseline first
    assert (rows["opd"]["runs"], rows["opd"]["after"]) == ("3", "60.0±5.8")
    assert (rows["b/opd-x"]["runs"], rows["b/opd-x"]["after"]) == ("1", "40.0±2.0")      # over problems


def test_a_difference_to_the_baseline_is_taken_seed_by_seed(tmp_path):
    """.1 and .2 more: .15 ± .05, though the accuracies of the seeds lie .4 apart: unpaired it would be ± .32."""
    for name, accuracies in (("opd", (.2, .6, .9)), ("prefix", (.3, .8)), ("a", (.25,))):
        for seed, after in enumerate(accuracies):
            made_run(tmp_path / name / f"seed-{seed}", after)
    made_run(tmp_path / "z" / "seed-7", .5)
    rows, _ = report(tmp_path)
    assert {name: row["minus opd"] for name, row in rows.items()} == {
        "opd": "", "a": "+5.0", "prefix": "+15.0±5.0", "z": ""}


def test_accuracies_on_different_files_are_not_subtracted(tmp_path):
    made_run(tmp_path / "opd", {"aime": .5}, before={"aime": .1})
    made_run(tmp_path / "prefix", {"amc": .6}, before={"amc": .1})
    assert report(tmp_path)[0]["prefix"]["minus opd"] == ""


def test_the_gap_is_recovered_run_by_run_and_is_none_where_the_teacher_is_no_better(tmp_path):
    made_run(tmp_path / "opd" / "seed-0", .5, teacher=.9, before=.1)                 # .4 / .8 = 50%
    made_run(tmp_path / "opd" / "seed-1", .6, teacher=.6, before=.2)                 # .4 / .4 = 100%
    made_run(tmp_path / "x" / "seed-0", .6, teacher=.1, before=.1)
    rows, _ = report(tmp_path)
    assert (rows["opd"]["gap"], rows["x"]["gap"]) == ("75%", "no gap")


def test_costs_are_means_over_seeds_with_their_ratio_to_the_baseline(tmp_path):
    for seed, scale in ((0, 50), (1, 150)):
        made_run(tmp_path / "opd" / f"seed-{seed}", scale=scale)                     # 2 steps: 100k and 300k tokens
    made_run(tmp_path / "prefix", scale=50)
    rows, _ = report(tmp_path)
    shown = ("generated", "scored", "trained", "FLOPs", "rollout s", "all s", "eval s", "overlap", "entropies")
    assert [rows["opd"][key] for key in shown] == [
        "200k 1.00x", "160k 1.00x", "100k 1.00x", "200G 1.00x", "400 1.00x", "800 1.00x", "10.0",
        "0.60->0.70", "0.40 0.30"]
    assert [rows["prefix"][key] for key in shown[:7]] == [
        "100k 0.50x", "80.0k 0.50x", "50.0k 0.50x", "100G 0.50x", "200 0.50x", "400 0.50x", "10.0"]


def test_seconds_in_all_count_whatever_a_step_timed(tmp_path):
    made_run(tmp_path / "opd", steps=1, text='{"step": 2, "overlap_by_position": null, "generated_tokens": 1,'
             '"time_rollout": 1, "time_validation": 30}\n')
    assert opd.read_run(tmp_path, "opd")["last"]["seconds"] == 4 + 31


def test_a_run_that_was_broken_off_counts_up_to_its_last_whole_line(tmp_path):
    made_run(tmp_path / "opd")
    made_run(tmp_path / "x", after=None, steps=3, text='{"step": 4, "lo')            # killed while it wrote
    rows, _ = report(tmp_path)
    assert [rows["x"][key] for key in ("after", "minus opd", "gap", "generated")] == [
        "-", "", "-", "3.00k 1.50x"]


def test_half_a_line_is_left_out_wherever_it_is(tmp_path):
    """A run is killed while it writes, then --eval_only adds a line to the same file."""
    made_run(tmp_path / "opd")
    made_run(tmp_path / "x", after=None, text='{"step": 3, "lo' + json.dumps(graded(0, "eval_only", .5)) + "\n")
    assert report(tmp_path)[0]["x"]["generated"] == "2.00k 1.00x"


def test_runs_without_evaluations_are_listed_and_leave_no_curve(tmp_path):
    made_run(tmp_path / "opd")
    made_run(tmp_path / "y", after=None)                                             # broken off: no second point
    made_run(tmp_path / "x", before=None, after=None)
    rows, _ = report(tmp_path)
    assert [rows["x"][key] for key in ("teacher", "before", "after", "gap", "eval s")] == ["-", "-", "-", "-", "0.00"]
    figure = opd.draw_report([opd.read_run(tmp_path, name) for name in ("opd", "x", "y")])
    curves = [len(axes.collections) for axes in figure.axes]
    assert curves == [1, 0, 1]                                                       # bands


def test_several_files_have_a_column_each_and_the_mean_decides(tmp_path):
    """Mean of .3 and .7: .5; its error over problems: root of .02^2 + .02^2, over 2: .014. Gap: .3 of .6."""
    made_run(tmp_path / "opd", {"aime": .3, "amc": .7}, {"aime": .7, "amc": .9}, {"aime": .1, "amc": .3})
    made_run(tmp_path / "x", {"aime": .4, "amc": .9}, {"aime": .7, "amc": .9}, {"aime": .1, "amc": .3})
    rows, _ = report(tmp_path)
    assert [rows["opd"][key] for key in ("after", "after aime", "after amc", "gap")] == [
        "50.0±1.4", "30.0±2.0", "70.0±2.0", "50%"]
    assert rows["x"]["minus opd"] == "+15.0"


def test_one_problem_has_no_standard_error_and_the_table_invents_none(tmp_path):
    made_run(tmp_path / "opd", after=None, text=json.dumps(graded(2, "student", 1.0, se=None)) + "\n")
    made_run(tmp_path / "x")
    rows, _ = report(tmp_path)
    assert (rows["opd"]["after"], rows["x"]["after"]) == ("100.0", "60.0±2.0")


def test_later_grading_and_a_cold_start_are_no_points_of_a_run(tmp_path):
    more = (json.dumps(graded(5, who, .99, time_eval=90)) + "\n" for who in ("eval_only", "cold_start"))
    made_run(tmp_path, text="".join(more))
    run = opd.read_run(tmp_path, "")
    assert sum(record["time_eval"] for record in run["evals"] if "time_eval" in record) == 7 + 3 + 90
    assert run["scores"]["after"][0] == run["final"]["eval"]["avg_at_n"] == .6 and list(run["curve"]) == [0, 2]


def test_one_group_is_printed_one_fact_a_line_without_ratios(tmp_path, capsys):
    made_run(tmp_path / "x" / "seed-3")
    opd.main(["--report", str(tmp_path)])
    facts = {line[:32].strip(): line[32:].strip() for line in capsys.readouterr().out.splitlines()}
    expected = {"": "x", "after": "60.0±2.0", "generated": "2.00k", "all s": "8.00", "gap": "62%", "eval s": "10.0"}
    assert {label: facts[label] for label in expected} == expected and not any("minus" in label for label in facts)


def test_the_picture_has_three_panels_whose_curves_are_means_over_seeds(tmp_path):
    """Seed 0 was not graded after step 1, so the curve is not drawn there; the legend names every group once."""
    for seed, after in ((0, .5), (1, .7)):
        made_run(tmp_path / f"opd/seed-{seed}", after, scale=1 + 2 * seed)
    made_run(tmp_path / "opd/seed-1", .7, scale=3, text=json.dumps(graded(1, "student", .8)) + "\n")
    assert set(opd.main(["--report", str(tmp_path)])) == {"opd/seed-0", "opd/seed-1"}
    assert (tmp_path / "report.png").stat().st_size > 1000
    figure = opd.draw_report([opd.read_run(tmp_path, name) for name in ("opd/seed-0", "opd/seed-1")])
    tokens, positions, seconds = ([line.get_xydata().tolist() for line in axes.lines] for axes in figure.axes)
    close(torch.tensor(tokens[-1]), torch.tensor([[0, .1], [4000, .6]]))
    close(torch.tensor(seconds[-1]), torch.tensor([[0, .1], [16, .6]]))
    assert figure.axes[2].collections[0].get_paths()[0].get_extents().y1 == .7       # the band, up to seed 1
    assert [line[0] for line in positions] == [[0, .6], [0, .7]]                     # first step, last
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["opd"]


def test_without_matplotlib_the_table_is_printed_and_a_line_says_what_to_install(tmp_path, capsys, monkeypatch):
    made_run(tmp_path / "opd")
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as stop:
        opd.main(["--report", str(tmp_path)])
    told = capsys.readouterr()
    assert stop.value.code == 2 and "60.0" in told.out
    assert told.err.count("\n") == 1 and told.err.endswith("; pip install matplotlib\n")


def test_a_report_leaves_out_the_copies_in_checkpoints_wherever_its_folder_is(tmp_path):
    folder = tmp_path / "checkpoint-study [1]"
    for name in ("opd", "opd/checkpoint-2"):
        made_run(folder / name, .5)
    assert set(opd.main(["--report", str(folder)])) == {"opd"}


def test_a_report_of_no_run_with_steps_is_refused(tmp_path, capsys):
    write(tmp_path / "x" / "metrics.jsonl", graded(0, "eval_only", .5))
    with pytest.raises(SystemExit):
        opd.main(["--report", str(tmp_path)])
    assert "no run below it has a metrics.jsonl with steps" in capsys.readouterr().err


def test_what_ruins_runs_in_silence_is_warned_of(world, tmp_path):
    """A teacher with a stop id, a template, a mind of its own; of the student itself there is nothing to say."""
    def warnings_of(change=lambda model, tokenizer: None, teacher="student"):
        folder = tmp_path / f"{len(os.listdir(tmp_path))}"
        model = transformers.AutoModelForCausalLM.from_pretrained(world / teacher)
        tokenizer = transformers.AutoTokenizer.from_pretrained(world / teacher)
        change(model, tokenizer)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        args = opd.parse_args(command(world, folder, teacher=folder))
        return [line for line in opd.preflight(opd.read_inputs(args), args) if line.startswith("warning: ")]
    assert warnings_of() == []
    for word, change in {
            "unlikely": lambda model, _: model.lm_head.weight.data.mul_(-9),
            "the student stops at [1], the teacher at [1, 2]":
            lambda model, _: setattr(model.generation_config, "eos_token_id", [1, 2]),
            "templates": lambda _, tokenizer: setattr(tokenizer, "chat_template", None)}.items():
        warning, = warnings_of(change)
        assert word in warning


def test_the_tiny_worlds_of_all_seeds_start_from_one_initialisation(tmp_path, monkeypatch):
    starts = []

    def stop(parameters, **settings):
        starts.append([parameter.detach().clone() for parameter in parameters])
        raise InterruptedError
    monkeypatch.setattr(torch.optim, "AdamW", stop)
    for seed in (0, 1):
        with pytest.raises(InterruptedError):
            opd.make_world(tmp_path / "world", seed)
    assert all(map(torch.equal, *starts)) and os.listdir(tmp_path) == []


def test_a_slip_of_the_tiny_world_is_marked_and_carries_through():
    """The solution of an author who never slips ends in the answer; a slip is marked, and what follows goes on from it."""
    rng = random.Random(0)
    for _ in range(200):
        right, words, trusted = opd.tiny_example(rng, 6, 0, 0.0, opd.LEXICON)
        assert words[-3] == right["answer"] and all(trusted) and len(trusted) == len(words)
        _, words, trusted = opd.tiny_example(rng, 6, 0, 1.0, opd.LEXICON)
        assert trusted.count(False) == 6 and len(trusted) == len(words)
        results = [words[7 * step + 5] for step in range(6)]
        assert [words[7 * step + 2] for step in range(1, 6)] == results[:-1] and words[-3] == results[-1]


# ---- 11. Broken off, resumed, shared out (sections 9 to 13) -----------------------------------------------
#      A moment is where something befalls a run: a kill, a signal, a full disk. Runs that are killed or have several
#      ranks are children of a fork server, which has imported everything and started no thread yet.

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["test_opd"])
LONG = dict(method="prune", loss="reverse_kl", extrapolate=True, max_steps=5, save_every=2, eval_every=4,
            keep_checkpoints=1, eval_file=["{world}/eval.jsonl", "{world}/pair.jsonl"], eval_max_new_tokens=3,
            max_new_tokens=8, validation_size=1, cap_init=6, cap_max=8)
MOMENTS = {                    # owner and name of a function, which of its calls (that ...), before or after it
    "the preflight": (opd, "rollout", 1, lambda student, teacher, *_, **__: teacher, "after"),
    "a rollout": (opd, "rollout", 5, lambda student, teacher, *_, **__: teacher, "after"),             # of step 4
    "a cold start": (opd, "cold_start_step", 2, lambda *_: True, "after"),
    "a backward pass": (opd, "backward_in_chunks", 4, lambda *_, **__: True, "before"),
    "an update": (opd, "train_step", 4, lambda *_, **__: True, "after"),
    "an extrapolation": (opd, "extrapolate", 3, lambda *_: True, "before"),                            # of step 4
    "an evaluation": (opd, "evaluate", 3, lambda model, tokenizer, problems, *_, **__: len(problems) == 2, "before"),
    "the writing of a model": (transformers.PreTrainedModel, "save_pretrained", 2, lambda *_, **__: True, "after"),
    "the writing of a state": (torch, "save", 2, lambda *_, **__: True, "before"),
    "the naming of a checkpoint": (os, "replace", 2, lambda _, name: is_checkpoint(name), "before"),
    "the time after its naming": (os, "replace", 2, lambda _, name: is_checkpoint(name), "after"),
    "the removal of an old one": (shutil, "rmtree", 1, lambda path, *_, **__: os.path.isdir(path), "before"),
    "putting an earlier run aside": (os, "replace", 2, lambda _, name: str(name).endswith(".old"), "before"),
    "putting its metrics aside": (os, "replace", 1, lambda _, name: str(name).endswith("metrics.jsonl.old"), "after"),
    "copying back the metrics": (shutil, "copy", 1, lambda _, name: str(name).endswith("metrics.jsonl"), "before"),
    "copying back the samples": (shutil, "copy", 1, lambda _, name: str(name).endswith("samples.jsonl"), "before")}


def is_checkpoint(path):
    return re.fullmatch(r"checkpoint-\d+", os.path.basename(path))


def checkpoints(folder):
    return sorted(filter(is_checkpoint, os.listdir(folder)))


def at(moment, act, patch=setattr):
    """Have act, called with what the function at that moment is called with, happen then."""
    owner, name, number, such_that, when = MOMENTS[moment]
    real, calls = getattr(owner, name), itertools.count(1)

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
    """An extrapolation that always accepts its first try, so that the next step depends on the anchor."""
    tried = {name: value + (value - anchor[name]) for name, value in weights.items()}
    return tried, 1, [0.0, validate(tried)]


def in_child(job, log, result, environ, *args):
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    os.environ.update(environ)
    opd.RANK, opd.NUM_RANKS = int(environ.get("RANK", 0)), int(environ.get("WORLD_SIZE", 1))
    opd.ask_math_verify = lambda *_: False                      # its import takes seconds, and all answers are integers
    opd.extrapolate = always_further
    torch.save(job(*args), result)


def start(job, folder, *args, **environ):
    name = f"rank-{environ.get('RANK', 0)}"
    process = SERVER.Process(target=in_child, args=(job, folder / f"{name}.log", folder / f"{name}.pt", environ, *args))
    process.start()
    return process


def in_two(job, folder, *args, seconds=60):
    """The job in two processes that torchrun might have started -> exit codes, logs, and results if both are 0."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [start(job, folder, *args, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                   MASTER_PORT=port) for rank in "01"]
    end = time.monotonic() + seconds
    for process in ranks:
        process.join(max(0, end - time.monotonic()))
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()                                          # one that hangs; its exit code was None
    logs = [(folder / f"rank-{rank}.log").read_text() for rank in "01"]
    return codes, logs, [torch.load(folder / f"rank-{rank}.pt") for rank in "01"] if codes == [0, 0] else None


def outcome(folder):
    """All that a run leaves, as it can be compared bit for bit."""
    last = max(checkpoints(folder), key=lambda name: int(name[11:]))
    weights = hashlib.sha256((folder / last / "model.safetensors").read_bytes()).hexdigest()
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return repeatable(metrics), (folder / "samples.jsonl").read_text().splitlines(), last, weights


def assert_whole(folder):
    """Its model, tokenizer and state can be loaded."""
    transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert transformers.AutoTokenizer.from_pretrained(folder).chat_template
    assert f"checkpoint-{torch.load(folder / 'trainer_state.pt', weights_only=True)['step']}" == folder.name


def stopped(argv, capfd):
    """-> (exit status, the one line) of a run that ends before its time."""
    with pytest.raises((SystemExit, KeyboardInterrupt)) as stop:      # the latter would end the tests
        opd.main(argv)
    err = capfd.readouterr().err
    assert stop.type is SystemExit
    lines = [line for line in err.splitlines() if line.startswith("opd.py: ")]
    assert len(lines) == 1 and "Traceback" not in err
    return stop.value.code, lines[0]


@pytest.fixture
def further(monkeypatch):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(opd, "extrapolate", always_further)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """The folder of the run that nothing befell."""
    out = tmp_path_factory.mktemp("whole")
    shutil.copy(world / "again" / "eval.jsonl", world / "pair.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opd, "extrapolate", always_further)
        train(world, out, **LONG)
    return out


@pytest.fixture(scope="module")
def every_step(world, whole, tmp_path_factory):
    """The same with a checkpoint of every step."""
    out = tmp_path_factory.mktemp("every")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opd, "extrapolate", always_further)
        train(world, out, **{**LONG, "save_every": 1, "keep_checkpoints": 9})
    return out


@pytest.mark.parametrize("method", ["opd", "prefix", "progressive", "prefix-guided", "prune"])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(method, world, tmp_path, further, whole):
    """The last checkpoint is that of step 3 in a folder whose metrics go on to step 5."""
    flags = {**LONG, "method": method, "save_every": 3, "keep_checkpoints": 2}
    train(world, tmp_path / "run", **flags)
    shutil.copytree(tmp_path / "run", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoint-5")
    train(world, tmp_path / "killed", **flags, resume=True)
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "run")
    metrics = outcome(tmp_path / "run")[0]
    assert [line["step"] for line in metrics if "loss" in line] == [1, 2, 3, 4, 5]
    assert [(line["step"], line["model"]) for line in metrics if "eval" in line] == [
        (0, "teacher"), (0, "student"), (4, "student"), (5, "student")]
    assert metrics[5]["extrapolation_k"] == 1                   # step 4, from the anchor of step 2


def killed_run(argv, moment, out):
    def kill(*args, **_):
        if moment == "an update":                               # half a line is left of step 3
            os.truncate(out / "metrics.jsonl", (out / "metrics.jsonl").stat().st_size - 99)
        if moment == "an evaluation":                           # the answers to the first file are there, not the last
            os.truncate(out / "samples.jsonl", (out / "samples.jsonl").stat().st_size - 9)
        if moment == "the removal of an old one":
            os.remove(os.path.join(args[0], "model.safetensors"))
        send(signal.SIGKILL)()
    at(moment, kill)
    opd.main(argv)


@pytest.mark.parametrize("moment", [
    "a rollout", "an update", "an extrapolation", "an evaluation", "the writing of a state", "the naming of a checkpoint",
    "the time after its naming", "the removal of an old one"])
def test_a_run_that_was_killed_goes_on_as_if_nothing_had_happened(moment, world, tmp_path, further, whole):
    out = tmp_path / "out"
    process = start(killed_run, tmp_path, command(world, out, **LONG), moment, out)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "rank-0.log").read_text()
    assert checkpoints(out)
    for name in checkpoints(out):
        assert_whole(out / name)
    train(world, out, **LONG, resume=True)
    assert outcome(out) == outcome(whole)
    put_aside = ["metrics.jsonl.old", "samples.jsonl.old"]                           # as the killed run left them
    assert sorted(os.listdir(out)) == sorted(os.listdir(whole) + put_aside)          # and no half of a checkpoint


@pytest.mark.parametrize("moment", list(MOMENTS)[-4:])
def test_a_kill_while_files_are_put_aside_or_copied_back_loses_nothing(moment, world, tmp_path, further, every_step):
    """The folder has a run of the same flags: taken for its own, its checkpoints must come with all of its metrics."""
    out, flags = tmp_path / "out", {**LONG, "save_every": 1, "keep_checkpoints": 9}
    shutil.copytree(every_step, out)
    shutil.rmtree(out / "checkpoint-5")
    process = start(killed_run, tmp_path, command(world, out, **flags, resume=True if "copying" in moment else None),
                    moment, out)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "rank-0.log").read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(world, out, **flags, resume=True)
    assert outcome(out) == outcome(every_step)


def test_only_the_last_checkpoints_are_kept(world, tmp_path):
    train(world, tmp_path, max_steps=3, save_every=1, keep_checkpoints=2, eval_file=None)
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    assert not [name for name in os.listdir(tmp_path) if name.endswith((".partial", ".old"))]


@pytest.mark.parametrize("kept", [.9, .5, 0])
def test_a_torn_state_ends_in_one_line_that_names_the_checkpoint_and_writes_nothing(kept, world, tmp_path, capfd, whole):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    state = sorted(out.glob("checkpoint-*"))[-1] / "trainer_state.pt"
    state.write_bytes(state.read_bytes()[:int(kept * state.stat().st_size)])
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    status, line = stopped(command(world, out, **LONG, resume=True), capfd)
    assert status == 2 and f"{state.parent} is no whole checkpoint" in line
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_resume_takes_no_checkpoint_of_a_run_before(world, tmp_path, monkeypatch, capfd, first_run):
    """The second run ends before its first checkpoint, so resuming it starts it anew."""
    out, flags = tmp_path / "out", dict(max_steps=2, learning_rate=3e-3)
    train(world, tmp_path / "straight", **flags)
    shutil.copytree(first_run[0], out)
    with monkeypatch.context() as patch:
        at("the preflight", throw(ZeroDivisionError), patch.setattr)
        with pytest.raises(ZeroDivisionError):
            opd.main(command(world, out, **flags))
    assert checkpoints(out) == [] and same_weights(out / "checkpoint-4.old", first_run[0] / "checkpoint-4")
    assert (out / "metrics.jsonl.old").read_text() == (first_run[0] / "metrics.jsonl").read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(world, out, **flags, resume=True)
    assert outcome(out) == outcome(tmp_path / "straight") and checkpoints(out) == ["checkpoint-2"]


@pytest.mark.parametrize("exists", [True, False])
def test_resume_where_there_is_no_checkpoint_starts_at_the_beginning_with_a_note(
        exists, world, tmp_path, capfd, after_one_step):
    if exists:
        (tmp_path / "out").mkdir()
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        train(world, tmp_path / "out", max_steps=1, loss="reverse_kl", resume=True)
    told = capfd.readouterr().err + " ".join(str(note.message) for note in notes)
    assert "no checkpoint" in told and str(tmp_path / "out") in told
    assert outcome(tmp_path / "out") == outcome(after_one_step.parent)


def test_resume_into_a_folder_of_another_run_puts_that_one_aside(world, tmp_path, further, every_step, first_run):
    """Whatever the step of its checkpoints: else they would pass for the run's own, and be removed as such."""
    out, flags = tmp_path / "out", {**LONG, "save_every": 0, "keep_checkpoints": 9}
    shutil.copytree(first_run[0], out)
    for step in (2, 3):
        shutil.copytree(out / "checkpoint-4", out / f"checkpoint-{step}")
    train(world, out, **flags, resume=every_step / "checkpoint-3")
    assert all((out / f"checkpoint-{step}.old").exists() for step in (2, 3))
    assert outcome(out) == outcome(every_step) and checkpoints(out) == ["checkpoint-5"]
    assert same_weights(out / "checkpoint-4.old", first_run[0] / "checkpoint-4")
    assert (out / "metrics.jsonl.old").read_text() == (first_run[0] / "metrics.jsonl").read_text()


def test_going_back_to_an_earlier_checkpoint_leaves_no_later_one_to_resume(
        world, tmp_path, monkeypatch, further, every_step):
    """Else the run, broken off again in step 4, would go on from checkpoint-5, not from where it is."""
    out, flags = tmp_path / "out", {**LONG, "save_every": 0, "keep_checkpoints": 9}
    shutil.copytree(every_step, out)
    with monkeypatch.context() as patch:
        patch.setitem(MOMENTS, "step 4", (opd, "opd_step", 2, lambda *_: True, "before"))
        at("step 4", throw(ZeroDivisionError), patch.setattr)
        with pytest.raises(ZeroDivisionError):
            opd.main(command(world, out, **flags, resume=out / "checkpoint-2"))
    assert checkpoints(out) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]   # the third is a new one: even an
    train(world, out, **flags, resume=True)                                      # error of the program saves it
    assert outcome(out) == outcome(every_step)


@pytest.mark.parametrize("change", [
    {"learning_rate": 2e-3}, {"seed": 1}, {"batch_size": 3}, {"method": "opd"}, {"loss": "topk"}, {"extrapolate": None},
    {"baseline": True}, {"student": "{world}/teacher"}, {"train_file": "{world}/eval.jsonl"}, {"dtype": "bfloat16"},
    {"eval_file": "{world}/eval.jsonl"}, {"eval_every": 1}, {"eval_samples": 2},
    {"prompt_template": "{problem} !"}], ids=str)
def test_resume_with_another_flag_is_refused_by_its_name_and_writes_nothing(change, world, tmp_path, capfd, whole):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    status, line = stopped(command(world, out, **{**LONG, **change}, resume=True), capfd)
    assert status == 2 and f"--{list(change)[0]} " in line and line.count("--") == 2     # --resume, and this flag alone
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_finished_run_goes_on_with_more_steps_as_if_it_had_had_them_from_the_start(world, tmp_path):
    """An evaluation after every step: else the first end would be one that the longer run has not."""
    for folder, steps in (("long", 3), ("short", 2)):
        train(world, tmp_path / folder, max_steps=steps, eval_every=1)
    train(world, tmp_path / "short", max_steps=3, eval_every=1, resume=True, keep_checkpoints=1, save_every=2)
    assert outcome(tmp_path / "short") == outcome(tmp_path / "long")


def test_how_many_rows_are_computed_at_once_may_change_on_the_way(world, tmp_path, further, every_step):
    """It changes rounding at most."""
    flags = {**LONG, "micro_batch_size": 1, "eval_batch_size": 1, "save_every": 0}
    _, steps, evaluations = train(world, tmp_path, **flags, resume=every_step / "checkpoint-4")
    before = [line for line in outcome(every_step)[0] if "loss" in line]
    assert [line["loss"] for line in steps] == pytest.approx([line["loss"] for line in before], rel=1e-3)
    assert [line["step"] for line in evaluations] == [0, 0, 4, 5]


def test_a_resumed_run_samples_as_many_rows_at_once_as_before_unless_told_otherwise(world, tmp_path):
    """Else another GPU, or another program on it, would make another run of it."""
    flags = dict(eval_file=None, save_every=1)
    for steps, rows, expected in ((1, 2, 2), (2, None, 2), (3, 3, 3)):
        _, metrics, _ = train(world, tmp_path, **flags, max_steps=steps, rollout_batch_size=rows,
                              resume=True if steps > 1 else None)
        assert metrics[-1]["rollout_batch_size"] == expected


SIGNALS = {"the preflight": (signal.SIGTERM, None), "a rollout": (signal.SIGINT, 3), "a backward pass": (signal.SIGTERM, 3),
           "an update": (signal.SIGTERM, 4), "an evaluation": (signal.SIGINT, 4),
           "the writing of a state": (signal.SIGINT, 4), "the removal of an old one": (signal.SIGTERM, 4)}


@pytest.mark.parametrize("moment", SIGNALS)
def test_an_interrupted_run_names_its_checkpoint_and_goes_on_from_there(
        moment, world, tmp_path, monkeypatch, capfd, further, whole):
    """Before the update the step is dropped; from then on the signal waits for its end."""
    number, step = SIGNALS[moment]
    with monkeypatch.context() as patch:
        at(moment, send(number), patch.setattr)
        status, line = stopped(command(world, tmp_path, **LONG), capfd)
    assert status == 128 + number
    assert line == "opd.py: interrupted" + (f"; last checkpoint: {tmp_path / f'checkpoint-{step}'}" if step else "")
    for name in checkpoints(tmp_path):
        assert_whole(tmp_path / name)
    assert checkpoints(tmp_path)[-1:] == ([f"checkpoint-{step}"] if step else [])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(world, tmp_path, **LONG, resume=True)
    assert outcome(tmp_path) == outcome(whole)


def test_control_c_while_models_are_loaded_is_one_line_with_nothing_written(world, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(opd, "read_inputs", throw(KeyboardInterrupt()))
    assert stopped(command(world, tmp_path / "out"), capfd) == (130, "opd.py: interrupted")
    assert os.listdir(tmp_path) == []


def test_a_second_signal_does_not_disturb_the_last_checkpoint(world, tmp_path, monkeypatch, capfd, further, whole):
    """torchrun passes a Ctrl-C on to processes that the terminal has sent it to already."""
    with monkeypatch.context() as patch:
        at("a rollout", send(signal.SIGINT), patch.setattr)
        at("the writing of a state", send(signal.SIGTERM), patch.setattr)
        status, line = stopped(command(world, tmp_path, **LONG), capfd)
    assert status in (130, 143) and "checkpoint-3" in line
    assert_whole(tmp_path / "checkpoint-3")
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".partial")]
    train(world, tmp_path, **LONG, resume=True)
    assert outcome(tmp_path) == outcome(whole)


def test_a_signal_from_outside_at_any_time_leaves_all_steps_so_far(world, tmp_path):
    out = tmp_path / "out"
    process = start(opd.main, tmp_path, command(world, out, max_steps=5000))
    while process.is_alive() and not (out / "metrics.jsonl").exists() or (
            process.is_alive() and '"step": 3' not in (out / "metrics.jsonl").read_text()):
        time.sleep(.01)
    process.terminate()
    process.join(30)
    assert process.exitcode == 143
    name, = checkpoints(out)
    assert name in (tmp_path / "rank-0.log").read_text().splitlines()[-1]
    steps = [line["step"] for line in outcome(out)[0] if "loss" in line]
    assert steps == list(range(1, int(name[11:]) + 1))
    train(world, out, max_steps=steps[-1] + 1, resume=True)
    train(world, tmp_path / "straight", max_steps=steps[-1] + 1)
    assert outcome(out) == outcome(tmp_path / "straight")


@pytest.mark.parametrize("moment", ["the writing of a model", "the writing of a state"])
def test_a_full_disk_ends_a_run_in_one_line_with_the_last_checkpoint_whole(
        moment, world, tmp_path, monkeypatch, capfd, further, whole):
    owner, name, number, *_ = MOMENTS[moment]
    with monkeypatch.context() as patch:
        for call in (number, number + 1):                       # the disk is still full when the run ends
            patch.setitem(MOMENTS, moment, (owner, name, call, *_))
            at(moment, throw(OSError(28, "No space left on device")), patch.setattr)
        status, line = stopped(command(world, tmp_path, **LONG), capfd)
    assert status == 2 and "No space left on device" in line and "checkpoint-2" in line
    assert_whole(tmp_path / "checkpoint-2")
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "metrics.jsonl", "samples.jsonl"]
    train(world, tmp_path, **LONG, resume=True)
    assert outcome(tmp_path) == outcome(whole)


def test_a_disk_full_in_the_middle_of_a_line_costs_that_step_only(world, tmp_path, monkeypatch, capfd, further, whole):
    real, calls = open, itertools.count(1)

    def full(path, mode="r", *args, **kwargs):
        if mode == "a" and str(path).endswith("metrics.jsonl") and next(calls) == 5:     # 2 evaluations, 2 steps
            with real(path, mode) as file:
                file.write('{"step": 3, "lo')
            raise OSError(28, "No space left on device")
        return real(path, mode, *args, **kwargs)
    with monkeypatch.context() as patch:
        patch.setattr(opd, "open", full, raising=False)
        status, line = stopped(command(world, tmp_path, **LONG), capfd)
    assert status == 2 and "No space left on device" in line and "checkpoint-2" in line
    train(world, tmp_path, **LONG, resume=True)
    assert outcome(tmp_path) == outcome(whole)


MEMORY = {"the preflight": ("out of memory in set-up", ""),
          "a rollout": ("rollout of step 4; halve --rollout_batch_size, now 4", "checkpoint-3"),
          "a backward pass": ("update of step 4; halve --micro_batch_size", "checkpoint-3"),
          "a cold start": ("update of cold start step 2; halve --micro_batch_size, now 4", ""),
          "an evaluation": ("halve --eval_batch_size", "checkpoint-4"),
          "an extrapolation": ("extrapolation; halve --eval_batch_size", "checkpoint-2")}


@pytest.mark.parametrize("moment", MEMORY)
def test_out_of_memory_names_the_phase_and_the_flag_to_halve(
        moment, world, tmp_path, monkeypatch, capfd, further, whole):
    """And keeps the last weights that are of a whole step, which those before an extrapolation are not."""
    with monkeypatch.context() as patch:
        at(moment, throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")), patch.setattr)
        status, line = stopped(command(world, tmp_path, **LONG, cold_start_steps=2 * ("cold" in moment) or None), capfd)
    told, checkpoint = MEMORY[moment]
    assert status == 2 and "out of memory" in line and told in line and checkpoint in line
    assert ("halve" in line) == ("halve" in told)
    assert checkpoints(tmp_path) == [checkpoint] * (checkpoint != "")
    for name in checkpoints(tmp_path):
        assert_whole(tmp_path / name)


def join_other():
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group("gloo")
    return opd.RANK, opd.NUM_RANKS


def share_of_a_step(trained_rows):
    """This rank's share of an update -> (metrics, gradients). loss_mask is empty outside the trained rows."""
    rank, num_ranks = join_other()
    student = tiny_llama(1)
    batch = make_batch(student, TEACHER)
    batch["loss_mask"] = batch["loss_mask"] & torch.tensor([row in trained_rows for row in range(4)])[:, None]
    share = {name: value[rank::num_ranks] for name, value in batch.items() if name != "teacher_seconds"}
    return update(student, TEACHER, share)


@pytest.mark.parametrize("trained_rows", [[0, 1, 2, 3], [0, 2]], ids=["all rows", "none of the second rank's"])
def test_two_ranks_make_the_step_of_one_process_with_all_rows(trained_rows, tmp_path):
    codes, logs, results = in_two(share_of_a_step, tmp_path, trained_rows)
    assert codes == [0, 0], logs
    metrics, grads = share_of_a_step(trained_rows)
    for own, own_grads in results:
        assert own == pytest.approx(metrics, rel=1e-5, abs=1e-6)
        assert_same(own_grads, grads)
        assert max((own_grads[name] - grads[name]).abs().max() for name in grads) < 1e-6


def test_ranks_share_out_the_prompts_of_a_step_and_draw_different_numbers(world, tmp_path, monkeypatch):
    args = opd.parse_args(command(world, tmp_path, batch_size=5))
    run = opd.read_data(args, opd.tiny_tokenizer(WORDS))
    run.sampling, run.device = SAMPLING, torch.device("cpu")
    monkeypatch.setattr(opd, "NUM_RANKS", 2)
    shares, numbers = [], set()
    for step, rank in ((3, 0), (3, 1), (4, 0), (4, 1)):
        monkeypatch.setattr(opd, "RANK", rank)
        shares.append(opd.draw_prompts(run, args, step)[::2])                        # two candidates each
        numbers.add(torch.rand(1).item())
    assert [len(share) for share in shares] == [3, 2, 3, 2] and len(numbers) == 4
    drawn = [run.train.index(problem) for problem in shares[0] + shares[1]]
    assert sorted(drawn) == sorted(opd.batch_indices(3, 5, 9, args.seed))


def share_of_an_evaluation():
    """Greedy and sampled, with one problem and with three."""
    join_other()
    return [opd.evaluate(
        STUDENT, opd.tiny_tokenizer(WORDS), [{"problem": "1", "answer": str(index), "prompt_ids": [2, 7 + index, 3]}
                                             for index in range(count)], num_samples=samples, seed=5, rows_per_batch=2,
        decoding=dict(SAMPLING, max_length=8, temperature=temperature, top_p=1.0))
        for count, samples, temperature in ((3, 1, 0.0), (1, 1, 0.0), (3, 3, 1.0), (1, 2, 1.0))]


def test_two_ranks_share_out_the_answers_of_an_evaluation_and_both_get_all_in_order(tmp_path):
    codes, logs, results = in_two(share_of_an_evaluation, tmp_path)
    assert codes == [0, 0], logs
    assert str(results[0]) == str(results[1])
    assert str(results[0][:2]) == str(share_of_an_evaluation()[:2])                  # sampling has its own stream per rank
    answers = results[0][2][1]
    assert [(answer["index"], answer["sample"]) for answer in answers] == [*itertools.product(range(3), range(3))]
    one, other = results[0][3][1]
    assert one["response"] != other["response"]                 # the ranks do not draw the same numbers


def run_of_two(argv):
    """opd.main -> (the weights at its end, what this rank wrote). Writing a checkpoint takes the first rank a while."""
    runs, written, out = [], [], argv[argv.index("--output_dir") + 1]
    opd_step, save = opd.opd_step, torch.save

    def watch(event, args):
        changes = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree") or (
            event == "open" and set(str(args[1])) & set("wax+"))
        if changes and str(args[0]).startswith(out):
            written.append((event, str(args[0])))
    sys.addaudithook(watch)
    opd.opd_step = lambda run, *args: runs.append(run) or opd_step(run, *args)
    torch.save = lambda value, path, **more: (time.sleep(isinstance(path, str) / 2), save(value, path, **more))
    opd.main(argv)
    torch.save = save
    return {name: value.clone() for name, value in runs[-1].student.state_dict().items()}, written


def test_a_run_of_two_ranks_ends_with_one_set_of_weights_and_only_the_first_rank_writes(world, tmp_path, whole):
    """Three prompts a step: two for the first rank, one for the second. Resumed, it goes on as it would have."""
    def run(out, **changes):
        flags = {**LONG, "method": "prefix-guided", "batch_size": 3, "max_steps": 2, "eval_every": 1,
                 "save_every": 0, **changes}
        codes, logs, results = in_two(run_of_two, tmp_path / f"{len(os.listdir(tmp_path))}", command(world, out, **flags))
        assert codes == [0, 0], logs
        (first, wrote), (second, nothing) = results
        assert_same(first, second, tolerance=0)
        saved = transformers.AutoModelForCausalLM.from_pretrained(out / checkpoints(out)[-1]).state_dict()
        assert_same(first, saved, tolerance=0)
        assert wrote and nothing == [] and "| loss" in logs[0] and "| loss" not in logs[1]
    run(tmp_path / "a")
    run(tmp_path / "b", max_steps=1)
    run(tmp_path / "b", resume=True)
    assert outcome(tmp_path / "b") == outcome(tmp_path / "a")


def run_that_loses_a_rank(argv):
    if os.environ["RANK"] == "1":
        at("a backward pass", lambda *_, **__: os._exit(7))
    opd.main(argv)


def test_a_rank_that_dies_ends_the_other_at_once_and_the_last_step_is_kept(world, tmp_path, whole):
    out = tmp_path / "out"
    codes, logs, _ = in_two(run_that_loses_a_rank, tmp_path, command(world, out, **{**LONG, "max_steps": 50}), seconds=20)
    assert codes[1] == 7 and codes[0] not in (0, None), logs[0]
    assert "Traceback" not in logs[0] and "checkpoint-3" in logs[0].splitlines()[-1]
    assert_whole(out / "checkpoint-3")


def test_torchrun_starts_ranks_and_ends_them_when_one_dies(world, tmp_path):
    """Killed at the start of step 2. The other saves what it has, though torchrun tells it to end meanwhile."""
    write(tmp_path / "lost.py", text=f"""
import os, signal, sys, time
sys.path.insert(0, {os.path.dirname(os.path.abspath(opd.__file__))!r})
import opd
opd.ask_math_verify = lambda *_: False
step, save = opd.opd_step, opd.torch.save
opd.torch.save = lambda state, path, **more: (time.sleep(isinstance(path, str)), save(state, path, **more))
def opd_step(run, args, number):
    if opd.RANK == 1 and number == 2:
        open({str(tmp_path / "died")!r}, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return step(run, args, number)
opd.opd_step = opd_step
opd.main(sys.argv[1:])
""")
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", tmp_path / "lost.py",
         *command(world, tmp_path / "out", max_steps=9)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        told, _ = process.communicate(timeout=60)
    finally:
        process.terminate()                                     # one that hangs; it ends its own children
    assert process.returncode and (tmp_path / "died").exists(), told
    assert time.time() - (tmp_path / "died").stat().st_mtime < 15
    assert checkpoints(tmp_path / "out") == ["checkpoint-1"]
    assert_whole(tmp_path / "out" / "checkpoint-1")


# ---- 12. A cold start, a budget of tokens, candidates at random (sections 9, 13) -----------------------------

def says_a(text, gold):
    """In the place of is_correct, so that random models are right now and then. Nobody may ask without an answer."""
    assert gold is not None
    return "a" in text.split()


class Update:
    """One call of train_step: the student before it, batch, settings, gradients after it, and the rollout before it."""

    def __init__(self, student, batch, settings, rollout):
        self.student, self.batch, self.settings, self.rollout = copy.deepcopy(student), batch, settings, rollout
        self.problems = [" ".join(WORDS[token] for token in ids[mask].tolist() if token > 3)
                         for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"])]

    def solutions(self):
        """Those learned from, without padding, as (prompt and response (1, L), length of the prompt)."""
        batch, lengths = self.batch, self.batch["loss_mask"].sum(-1)
        for row in lengths.nonzero().flatten().tolist():
            prompt = batch["prompt_ids"][row][batch["prompt_mask"][row]]
            yield torch.cat([prompt, batch["response_ids"][row, :lengths[row]]])[None], len(prompt)


@pytest.fixture
def updates(monkeypatch):
    """A list to which every train_step adds what it saw."""
    seen, rollouts, rollout, train_step = [], [], opd.rollout, opd.train_step

    def watched_rollout(*models_and_prompts, **settings):
        rollouts.append(rollout(*models_and_prompts, **settings))
        return rollouts[-1]

    def watched_step(student, optimizer, batch, **settings):
        seen.append(Update(student, batch, settings, rollouts[-1]))
        result = train_step(student, optimizer, batch, **settings)
        seen[-1].grads = gradients_of(student)
        return result
    monkeypatch.setattr(opd, "rollout", watched_rollout)
    monkeypatch.setattr(opd, "train_step", watched_step)
    return seen


COLD = dict(cold_start_steps=1, cold_start_learning_rate=2e-3, max_new_tokens=24, batch_size=3, num_generations=4,
            max_steps=1, eval_file=None, max_grad_norm=1e9)


def unanswered(world, path, every):
    """The training problems, each every-th of which has lost its answer -> (file, {problem: answer})."""
    known = {item["problem"]: item["answer"] for item in map(json.loads, open(world / "train.jsonl"))}
    known = {problem: None if index % every == 0 else answer for index, (problem, answer) in enumerate(known.items())}
    return write(path, *({"problem": problem, "answer": answer} for problem, answer in known.items())), known


def test_a_cold_start_learns_from_solutions_that_ended_and_are_right_or_of_unknown_answer(
        world, tmp_path, monkeypatch, updates):
    monkeypatch.setattr(opd, "is_correct", says_a)
    path, known = unanswered(world, tmp_path / "train.jsonl", 2)
    train(world, tmp_path, **{**COLD, "batch_size": 9}, train_file=path)
    cold, kinds = updates[0], set()
    tokenizer = opd.tiny_tokenizer(WORDS)
    for row, problem in enumerate(cold.problems):
        valid = cold.rollout["response_mask"][row]
        right = says_a(tokenizer.decode(cold.rollout["response_ids"][row][valid], skip_special_tokens=True), "")
        kind = cold.rollout["ended"][row].item(), known[problem] is None, right
        kept = kind[0] and (kind[1] or kind[2])
        assert cold.batch["loss_mask"][row].tolist() == (valid & kept).tolist()
        kinds.add(kind)
    assert len(kinds) == 8                                           # each of them came up


def test_the_gradient_of_a_cold_start_is_that_of_plain_cross_entropy_on_the_kept_tokens(
        world, tmp_path, updates):
    train(world, tmp_path, **{**COLD, "batch_size": 9}, train_file=unanswered(world, tmp_path / "train.jsonl", 1)[0])
    student, total, count = updates[0].student, 0.0, 0
    student.zero_grad()
    for ids, prompt in updates[0].solutions():
        total = total + torch.nn.functional.cross_entropy(
            student(ids).logits[0, prompt - 1:-1], ids[0, prompt:], reduction="sum")
        count += ids.shape[1] - prompt
    (total / count).backward()
    assert count > 50 and len(set(updates[0].batch["loss_mask"].sum(-1).tolist())) > 3
    assert_same(updates[0].grads, gradients_of(student), tolerance=3e-6)
    assert updates[0].settings["learning_rate"] == 2e-3


def test_a_cold_start_without_a_right_solution_changes_nothing(world, tmp_path, monkeypatch, updates):
    monkeypatch.setattr(opd, "is_correct", lambda text, gold: False)
    results = train(world, tmp_path, **{**COLD, "cold_start_steps": 2})[0]
    assert not updates[0].batch["loss_mask"].any() and not updates[1].batch["loss_mask"].any()
    start = transformers.AutoModelForCausalLM.from_pretrained(world / "student").state_dict()
    assert len(updates) == 3 and results["cold_start_tokens"] > 0
    assert all(torch.equal(value, start[name]) for name, value in updates[2].student.state_dict().items())


def test_a_cold_start_makes_the_teachers_solutions_more_likely(world, tmp_path, updates):
    path, _ = unanswered(world, tmp_path / "train.jsonl", 1)
    train(world, tmp_path, **{**COLD, "cold_start_steps": 8, "cold_start_learning_rate": 3e-3}, train_file=path)
    teacher = transformers.AutoModelForCausalLM.from_pretrained(world / "teacher")
    torch.manual_seed(99)
    fresh = roll(teacher, temperature=1.0, max_length=24, prompt=(
        updates[0].batch["prompt_ids"], updates[0].batch["prompt_mask"]))

    def likelihood(student):                                         # per token of solutions drawn after all training
        batch = dict(updates[0].batch, response_ids=fresh["response_ids"], loss_mask=fresh["response_mask"])
        solutions = Update(student, batch, {}, fresh)
        values = [-torch.nn.functional.cross_entropy(student(ids).logits[0, prompt - 1:-1], ids[0, prompt:],
                                                     reduction="none") for ids, prompt in solutions.solutions()]
        return torch.cat(values).mean().item()
    with torch.no_grad():
        assert likelihood(updates[8].student) > likelihood(updates[0].student) + .2


def test_the_teachers_own_stop_ids_end_its_solutions_in_a_cold_start_and_nothing_else(world, tmp_path, updates):
    """Else a teacher with two of them would run on, and the student learn what comes after the end."""
    shutil.copytree(world / "teacher", tmp_path / "teacher")
    config = transformers.GenerationConfig(eos_token_id=[END, *range(6, 16)], pad_token_id=PAD)
    config.save_pretrained(tmp_path / "teacher")
    train(world, tmp_path, **COLD, teacher=tmp_path / "teacher")
    cold, own = updates
    for ids, mask, ended in zip(*(cold.rollout[name] for name in ("response_ids", "response_mask", "ended"))):
        stops = [token in {END, *range(6, 16)} for token in ids[mask].tolist()]
        assert not any(stops[:-1]) and stops[-1] == ended
    assert cold.rollout["ended"].sum() > 6
    assert torch.isin(own.rollout["response_ids"][:, :-1], torch.arange(6, 16)).any()


def test_the_anchor_of_an_extrapolation_is_the_student_after_its_cold_start(world, tmp_path, monkeypatch, updates):
    """Not the one before: what is gone on along is the update of distillation."""
    anchors = []
    monkeypatch.setattr(opd, "extrapolate", lambda weights, anchor, validate: anchors.append(anchor) or (
        weights, 0, [validate(weights)]))
    train(world, tmp_path, **{**COLD, "cold_start_steps": 2}, extrapolate=True,
          train_file=unanswered(world, tmp_path / "train.jsonl", 2)[0])
    start = opd.movable_weights(updates[0].student)
    assert_same(anchors[0], opd.movable_weights(updates[2].student), tolerance=0)
    assert any(not torch.equal(anchors[0][name], start[name]) for name in start)


def test_a_cold_start_is_paid_for_in_tokens_of_its_own_and_in_flops(world, tmp_path, monkeypatch, updates):
    monkeypatch.setattr(opd, "is_correct", says_a)
    _, (step,), _ = train(world, tmp_path, **{**COLD, "cold_start_steps": 2}, method="prefix-guided")
    student, teacher = (
        transformers.AutoModelForCausalLM.from_pretrained(world / name) for name in ("student", "teacher"))
    flops, sampled = 0, []
    for index, update in enumerate(updates):
        prompt, response, trained = (mask.sum(-1) for mask in (
            update.batch["prompt_mask"], update.rollout["response_mask"], update.batch["loss_mask"]))
        sampled.append(int(response.sum()))
        flops += 3 * opd.forward_flops(student, (prompt + trained)[trained > 0])
        flops += opd.forward_flops(teacher, prompt + response)       # it solves, or it scores
        flops += opd.forward_flops(student, prompt + response) if index == 2 else 0
    assert step["cold_start_tokens"] == sampled[0] + sampled[1] and step["generated_tokens"] == sampled[2]
    assert step["teacher_tokens"] == sampled[2] and step["trained_tokens"] == updates[2].batch["loss_mask"].sum()
    assert step["flops"] == pytest.approx(flops, rel=1e-9)


def test_the_batches_of_opd_go_on_behind_those_of_the_cold_start(world, tmp_path, updates):
    """Nine problems in three batches: none comes twice before the file is used up."""
    train(world, tmp_path, **{**COLD, "max_steps": 2}, eval_samples=1)
    assert len(updates) == 3
    drawn = [problem for update in updates for problem in update.problems[::4]]
    assert len(drawn) == len(set(drawn)) == 9


def responses(folder, who):
    """To the first evaluation of it."""
    samples = map(json.loads, open(folder / "samples.jsonl"))
    return [item["response"] for item in samples if (item["step"], item["model"]) == (0, who)]


@pytest.mark.parametrize("method", ["opd", "prefix", "progressive", "prefix-guided", "prune"])
def test_every_method_has_its_cold_start_once_with_an_evaluation_after_it(method, world, tmp_path, updates):
    _, _, evaluations = train(world, tmp_path, method=method, cold_start_steps=2, cold_start_learning_rate=.03,
                              train_file=unanswered(world, tmp_path / "train.jsonl", 1)[0])
    assert [(line["step"], line["model"]) for line in evaluations] == [
        (0, "teacher"), (0, "student"), (0, "cold_start"), (2, "student")]
    assert len(updates) == 4
    assert responses(tmp_path, "cold_start") != responses(tmp_path, "student")


def test_a_run_that_goes_on_has_no_second_cold_start(world, tmp_path, updates):
    """In bfloat16, where what is evaluated is a copy of the student."""
    flags = dict(cold_start_steps=2, cold_start_learning_rate=.03, dtype="bfloat16",
                 train_file=unanswered(world, tmp_path / "train.jsonl", 1)[0])
    _, steps, _ = train(world, tmp_path, **flags, max_steps=1)
    _, resumed, evaluations = train(world, tmp_path, **flags, max_steps=2, resume=True)
    assert [(line["step"], line["model"]) for line in evaluations] == [
        (0, "teacher"), (0, "student"), (0, "cold_start"), (1, "student"), (2, "student")]
    assert len(updates) == 4 and [line["step"] for line in resumed] == [1, 2]      # two cold ones, and one a run
    assert resumed[1]["cold_start_tokens"] == steps[0]["cold_start_tokens"] > 0
    assert responses(tmp_path, "cold_start") != responses(tmp_path, "student")


def test_a_mixture_draws_each_files_share_of_every_step_and_repeats_nothing_before_a_file_is_used_up(
        world, tmp_path, updates):
    """Eight problems of letters and 32 of digits, .2 and .8 of four steps of ten prompts."""
    rng = random.Random(0)
    files = [write(tmp_path / f"{name}.jsonl", *({"problem": " ".join(rng.sample(words, 4))} for _ in range(count)))
             for name, words, count in (("letters", WORDS[16:], 8), ("digits", WORDS[6:16], 32))]
    for seed in (0, 1):
        del updates[:]
        train(world, tmp_path / "out", train_file=files, mix=[.2, .8], batch_size=10, num_generations=1, max_steps=4,
              eval_file=None, max_new_tokens=4, seed=seed)
        letters = [sum(problem[0] in "abcdefgh" for problem in update.problems) for update in updates]
        assert letters == [2] * 4 and {len(update.problems) for update in updates} == {10}
        assert len({problem for update in updates for problem in update.problems}) == 40
    del updates[:]
    train(world, tmp_path / "out", train_file=files, mix=[.3, .7], batch_size=4, num_generations=1, max_steps=2,
          eval_file=None, max_new_tokens=4)                         # 1.2 and 2.8 problems a step
    assert [sum(problem[0] in "abcdefgh" for problem in update.problems) for update in updates] == [1, 1]


@pytest.mark.parametrize("above, last", [(0, 2), (1, 3)])
def test_a_run_stops_after_the_first_step_that_reaches_the_limit_of_tokens(above, last, world, tmp_path, first_run):
    limit = first_run[2][1]["generated_tokens"] + above              # what its first two steps took, or one more
    _, steps, evaluations = train(world, tmp_path, max_steps=9, max_generated_tokens=limit)
    assert repeatable(steps) == repeatable(first_run[2][:last])
    assert [(line["step"], line["model"]) for line in evaluations][1:] == [(0, "student"), (last, "student")]
    assert [name for name in os.listdir(tmp_path) if name.startswith("checkpoint")] == [f"checkpoint-{last}"]


def test_a_random_selection_keeps_as_many_at_least_one_of_each_prompt_and_not_by_overlap():
    kept = {"overlap": [], "random": []}
    for seed in range(10):
        for select, rows in kept.items():
            torch.manual_seed(seed)
            rows.append(guided(select=select)["kept"])
            assert rows[-1].sum() == 4 and rows[-1].view(3, 2).any(1).all()
    differ = [not torch.equal(a, b) for a, b in zip(*kept.values())]
    assert 2 < sum(differ)
    share = torch.stack(kept["random"]).float().mean(0)
    assert (share > .1).all() and (share < 1).all()                  # nobody's place decides


def test_a_random_selection_depends_on_the_seed_alone(world, tmp_path, updates):
    """Not on what the teacher thinks; overlap does."""
    def chosen(select, **changes):
        del updates[:]
        train(world, tmp_path, method="prefix-guided", select=select, num_generations=8, max_steps=1, eval_file=None,
              prefix_length=3, probe_window=3, keep_ratio=.25, **changes)
        return updates[0].batch["loss_mask"].any(-1).tolist()
    first = chosen("random")
    assert first == chosen("random", teacher=world / "student") and sum(first) == sum(chosen("overlap")) < 16
    assert first != chosen("overlap") and first != chosen("random", seed=1)


# ---- 12b. Rewards of answers, and the teacher going on from them (sections 8, 13) ----------------------------

def test_auroc_by_hand_counts_a_tie_half():
    """Right .9 and .4 against wrong .4 and .1: three pairs and half of the fourth."""
    assert opd.auroc([.9, .4, .4, .1], [True, False, True, False]) == 3.5 / 4
    assert opd.auroc([.1, .9], [True, False]) == 0 and opd.auroc([-.5] * 3, [True, False, True]) == .5


@pytest.mark.parametrize("right", [True, False])
def test_auroc_is_nan_where_all_answers_are_right_or_all_are_wrong(right):
    assert math.isnan(opd.auroc([.1, .2, .3], [right] * 3))


@FAMILIES
def test_the_log_probs_of_what_was_sampled_are_those_of_a_plain_forward_of_each_row(family):
    model, lengths = family(1), (2, 5, 3, 4) * 20             # several chunks, rows of different lengths
    torch.manual_seed(0)
    out = roll(STUDENT, lengths=lengths, eos_ids={2, 3}, temperature=1.0, vocab_size=20)
    found = opd.sampled_log_probs(model, out, 20)
    assert out["response_mask"].sum() > 2 * 192 and len({len(row) for row in found}) > 3
    for row, (ids, prompt) in enumerate(rows_of(out, lengths)):
        log_p = model(ids).logits[0, prompt - 1:-1, :20].log_softmax(-1)
        close(found[row], log_p.gather(-1, ids[0, prompt:, None]).squeeze(-1), rtol=1e-4, atol=1e-5)


def test_only_so_many_tokens_are_scored_at_once():
    """Padded rows need a mask of all their pairs of columns: of a whole evaluation it would not fit."""
    out, (shapes, stop) = roll(STUDENT, lengths=[3] * 900, eos_ids={V}, max_length=40), forward_shapes(STUDENT)
    whole = torch.stack(opd.sampled_log_probs(STUDENT, out, V))
    stop()
    assert len(shapes) == 2 and all(rows * columns <= 2 ** 15 for rows, columns in shapes)
    close(whole[-1], opd.sampled_log_probs(STUDENT, {name: out[name][-1:] for name in (
        "prompt_ids", "prompt_mask", "response_ids", "response_mask")}, V)[0], rtol=1e-4, atol=1e-5)


def test_an_anchor_that_was_loaded_elsewhere_is_brought_to_the_weights():
    """A resumed run has its weights on a GPU and the anchor of the checkpoint in memory; here the dtype differs."""
    weights, anchor = {"w": torch.ones(2)}, {"w": torch.zeros(2, dtype=torch.float64)}
    accepted, k, _ = opd.extrapolate(weights, anchor, lambda tried: tried["w"].sum().item(), max_tries=2)
    assert k == 2 and accepted["w"].dtype == torch.float32 and accepted["w"].tolist() == [5, 5]


@pytest.fixture(scope="module")
def probed(world, tmp_path_factory):
    """Judged by says_a, evaluated in between and probed -> (its folder, steps, evaluations)."""
    out = tmp_path_factory.mktemp("probed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opd, "is_correct", says_a)
        return out, *train(world, out, max_steps=4, eval_every=2, eval_samples=4, probe_depths=[0, 50])[1:]


def test_an_evaluation_of_the_student_reports_the_auroc_and_the_mean_of_its_answers_rewards(probed):
    with open(probed[0] / "samples.jsonl") as file:
        samples = [json.loads(line) for line in file]
    for line in probed[2]:
        rows = [item for item in samples if (item["step"], item["model"]) == (line["step"], line["model"])]
        result, rewards = line["eval"]["eval"], [item["reward"] for item in rows]
        if line["model"] == "teacher":
            assert result["auroc"] is result["mean_reward"] is None and set(rewards) == {None}
            continue
        right, wrong = ([item["reward"] for item in rows if item["correct"] == kind] for kind in (True, False))
        higher = sum((a > b) + .5 * (a == b) for a in right for b in wrong) / len(right) / len(wrong)
        assert result["auroc"] == pytest.approx(higher) and 0 <= higher <= 1
        assert result["mean_reward"] == pytest.approx(sum(rewards) / 12) and -20 < result["mean_reward"] < 0


def test_the_reward_of_an_answer_is_the_mean_of_log_q_minus_log_p_over_its_tokens():
    settings = dict(num_samples=3, seed=5, rows_per_batch=4, decoding=dict(
        SAMPLING, eos_ids={2, 3}, max_length=8, temperature=1.0, top_p=1.0))
    problems = [{"problem": "1", "answer": "2", "prompt_ids": ids} for ids in ([2, 7, 3], [2, 7, 8, 3])]
    plain, answers = opd.evaluate(STUDENT, opd.tiny_tokenizer(WORDS), problems, **settings)
    judged, same = opd.evaluate(STUDENT, opd.tiny_tokenizer(WORDS), problems, teacher=TEACHER, **settings)
    assert [answer["response"] for answer in answers] == [answer["response"] for answer in same]
    assert {name: plain[name] for name in plain if name not in ("auroc", "mean_reward")} == {
        name: judged[name] for name in judged if name not in ("auroc", "mean_reward")}
    for answer in same:
        ids, prompt = torch.tensor([answer["prompt_ids"] + answer["response_ids"]]), len(answer["prompt_ids"])
        log_p, log_q = (model(ids).logits[0, prompt - 1:-1, :V].log_softmax(-1) for model in (STUDENT, TEACHER))
        reward = (log_q - log_p).gather(-1, ids[0, prompt:, None]).mean().item()
        assert answer["reward"] == pytest.approx(reward, rel=1e-3, abs=1e-4)


def test_neither_probing_nor_evaluating_more_often_changes_a_step_or_another_result(
        world, tmp_path, probed, monkeypatch):
    monkeypatch.setattr(opd, "is_correct", says_a)
    _, steps, evaluations = train(world, tmp_path, max_steps=4, eval_samples=4)
    assert repeatable(probed[1]) == repeatable(steps)
    graded = {(line["step"], line["model"]): line["eval"]["eval"] for line in probed[2]}
    assert len(graded) == 4 and len(evaluations) == 3
    for line in evaluations:
        result = graded[line["step"], line["model"]]
        assert line["eval"]["eval"] == {name: result[name] for name in result if "advantage" not in name}


def test_grading_alone_and_grading_the_teacher_ask_no_teacher(world, tmp_path, monkeypatch, probed):
    monkeypatch.setattr(opd, "is_correct", says_a)
    flags = dict(eval_only=True, train_file=None, probe_depths=[0], eval_samples=4)
    results = [opd.main(command(world, tmp_path, **flags))["eval"], probed[2][0]["eval"]["eval"]]
    assert probed[2][0]["model"] == "teacher" and not any("advantage" in name for result in results for name in result)
    assert math.isnan(results[0]["auroc"])


def test_a_teacher_that_is_the_student_has_no_advantage_at_any_depth(world, tmp_path, monkeypatch):
    monkeypatch.setattr(opd, "is_correct", says_a)
    _, _, evaluations = train(world, tmp_path, teacher=world / "student", eval_temperature=0, max_steps=1,
                              eval_file=world / "train.jsonl", probe_depths=[0, 50])
    before = next(line["eval"]["train"] for line in evaluations if line["model"] == "student")
    assert 0 < before["avg_at_n"] < 1
    assert [before[f"advantage_from_{depth}"] for depth in (0, 50)] == [0, 0]


@pytest.mark.parametrize("stops", [END, [END, *range(6, 16)]], ids=["the student's stop ids", "stop ids of its own"])
def test_at_depth_0_the_advantage_is_the_teachers_accuracy_minus_the_students(stops, world, tmp_path, monkeypatch):
    monkeypatch.setattr(opd, "is_correct", says_a)
    shutil.copytree(world / "teacher", tmp_path / "teacher")
    transformers.GenerationConfig(eos_token_id=stops, pad_token_id=PAD).save_pretrained(tmp_path / "teacher")
    _, _, evaluations = train(world, tmp_path, teacher=tmp_path / "teacher", eval_temperature=0, max_steps=1,
                              eval_file=world / "train.jsonl", probe_depths=[0])
    teacher, student = (line["eval"]["train"] for line in evaluations if line["step"] == 0)
    assert (teacher["mean_length"] < 9) == (stops != END) and teacher["avg_at_n"] != student["avg_at_n"]
    assert student["advantage_from_0"] == pytest.approx(teacher["avg_at_n"] - student["avg_at_n"])


def test_the_teacher_goes_on_from_the_stated_share_of_each_answer_and_both_parts_are_graded(
        world, tmp_path, monkeypatch):
    """The box is in what the student wrote, before the teacher takes over."""
    problems = [{"problem": "1", "answer": "5", "prompt_ids": [2, 7, 3], "begun": begun} for begun in ([4, 11, 5], [])]
    metrics, answers = opd.evaluate(
        STUDENT, opd.tiny_tokenizer(WORDS), problems, num_samples=1, seed=5, rows_per_batch=4,
        decoding=dict(SAMPLING, max_length=6, temperature=0, top_p=1.0))
    assert [answer["correct"] for answer in answers] == [True, False] and metrics["avg_at_n"] == .5
    prompt = torch.tensor([[2, 7, 3, 4, 11, 5]])                    # it goes on from there, not from the problem
    new = plain_generate(STUDENT, prompt, torch.ones_like(prompt), {END}, 6)[0].tolist()
    assert answers[0]["response"] == opd.tiny_tokenizer(WORDS).decode([4, 11, 5, *new], skip_special_tokens=True)
    evaluate, calls = opd.evaluate, []

    def watched(model, **settings):
        calls.append((settings["problems"], settings["decoding"]["max_length"]))
        return evaluate(model, **settings)
    monkeypatch.setattr(opd, "evaluate", watched)
    train(world, tmp_path, max_steps=1, probe_depths=[0, 50, 75])
    cap = calls[0][1]
    for depth, (begun, left) in zip((0, 50, 75), calls[2:5]):       # behind teacher and student
        assert left == cap - cap * depth // 100 and all(len(item["begun"]) + left <= cap for item in begun)
        assert [len(item["begun"]) for item in begun] == [item["length"] * depth // 100 for item in begun]
        assert all(item["begun"] == item["response_ids"][:len(item["begun"])] for item in begun)


# ---- 12c. Trackers (section 12) -----------------------------------------------------------------------------

@pytest.fixture
def logged(monkeypatch):
    """What fake modules of tensorboard and wandb are told -> list of (where it goes, name, value, step)."""
    told = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            self.folder, self.waiting = folder, []
            told.append((folder, "purged from", purge_step, None))

        def add_scalar(self, name, value, step):                     # the real one loses at exit what waits for a flush
            self.waiting.append((self.folder, name, value, step))

        def flush(self):
            told.extend(self.waiting)
            self.waiting.clear()
        close = flush

    def init(project, dir=None, config=None):
        return types.SimpleNamespace(log=lambda values, step=None: told.extend(
            (dir, name, value, step) for name, value in values.items()))
    for name, content in (("torch.utils.tensorboard", {"SummaryWriter": SummaryWriter}), ("wandb", {"init": init})):
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return told


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_tracker_is_told_the_numbers_of_metrics_jsonl_under_their_names(kind, world, tmp_path, logged):
    _, steps, evaluations = train(world, tmp_path, report_to=kind, eval_every=1, probe_depths=[50])
    expected = {(name, value, line["step"]) for line in steps for name, value in line.items()
                if type(value) in (int, float)}
    expected |= {(f"{line['model']}/eval/{name}", value, line["step"]) for line in evaluations
                 for name, value in line["eval"]["eval"].items() if value is not None}
    assert {where for where, *_ in logged} == {str(tmp_path)} and len(steps) == 2 and len(evaluations) == 4
    if kind == "tensorboard":
        assert logged.pop(0)[1:3] == ("purged from", 0)              # what an earlier run left there
    told = {(name, value, step) for _, name, value, step in logged}
    assert expected <= told and ("loss", steps[0]["loss"], 1) in told
    assert any(name == "student/eval/advantage_from_50" and step == 2 for name, _, step in told)
    known = {name for line in steps + evaluations for name in line}
    assert {name for name, *_ in told if "/" not in name} <= known
    assert all(type(value) in (int, float) for _, value, _ in told)


def no_trackers(monkeypatch):
    """Importing tensorboard or wandb now fails as it does where they are not installed."""
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    for name in ("tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)


def test_without_the_flag_no_tracker_is_imported_or_told_anything(world, tmp_path, logged, monkeypatch):
    train(world, tmp_path / "told", max_steps=1, eval_file=None)
    assert logged == []
    no_trackers(monkeypatch)
    train(world, tmp_path / "missing", max_steps=1, eval_file=None)


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_one_line_before_anything_is_renamed_or_written(
        kind, world, tmp_path, capfd, monkeypatch):
    def files():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    transformers.utils.logging.disable_progress_bar()
    train(world, tmp_path / "earlier", max_steps=1)
    no_trackers(monkeypatch)
    before = files()
    for out in ("earlier", "fresh"):
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            opd.main(command(world, tmp_path / out, report_to=kind))
        told = capfd.readouterr()
        assert stop.value.code == 2 and told.out == "" and told.err.count("\n") == 1
        assert re.match(rf"opd\.py: .*pip install .*\b{kind}\b", told.err)         # a requirements file has neither
        assert files() == before and os.listdir(tmp_path) == ["earlier"]


# ---- 13. The benchmark: python test_opd.py bench -----------------------------------------------------------
#     Random models, nothing downloaded. A baseline does the same work in the plainest way that there is: one
#     model.generate for all rows, or the logits of all tokens of both models at once and autograd through them.

BENCH = {
    "cpu": dict(
        # 512 rows of wide, shallow models: half of the rows do not halve what a step takes for none (a line of the table
        # shows it). Prompts much shorter than the responses, as in a real run: nobody saves what they take
        dtype=torch.float32, vocabulary=2048, prompts=128, prompt_length=2, tokens=32, scale_rows=16,
        update_vocabularies=(32_000, 151_936), update_rows=8, update_width=64,
        student=dict(hidden_size=384, intermediate_size=1152, num_hidden_layers=2, num_attention_heads=6,
                     num_key_value_heads=3, head_dim=64),
        teacher=dict(hidden_size=384, intermediate_size=1152, num_hidden_layers=4, num_attention_heads=6,
                     num_key_value_heads=3, head_dim=64)),
    "cuda": dict(                                             # the shapes of Qwen3-1.7B and Qwen3-4B
        dtype=torch.bfloat16, vocabulary=151_936, prompts=64, prompt_length=128, tokens=2048, scale_rows=32,
        update_vocabularies=(32_000, 151_936), update_rows=8, update_width=2048,
        student=dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
                     num_key_value_heads=8, head_dim=128),
        teacher=dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
                     num_key_value_heads=8, head_dim=128))}


def countdown(seed, vocabulary, drifts=False, device="cpu", dtype=torch.float32, **size):
    """A random model that goes on from the token n with n - 1, n - 2, ... down to 0: the last token of a prompt sets
    how long its response gets, whoever samples it and whatever else is in the batch. drifts: not in the upper half
    of the vocabulary, where a model without it counts down to the half."""
    torch.manual_seed(seed)
    config = transformers.Qwen3Config(vocab_size=vocabulary, max_position_embeddings=4096, tie_word_embeddings=False,
                                      bos_token_id=None, eos_token_id=None, **size)
    with torch.device(device), torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        model.get_input_embeddings().weight.normal_()
        # The residual stream is mostly the embedding: the row of the head that equals it wins by far
        model.get_output_embeddings().weight.copy_(model.get_input_embeddings().weight.roll(-1, 0))
        if drifts:
            model.get_input_embeddings().weight[vocabulary // 2:].normal_()
    return model


def bench_prompts(lengths, vocabulary, longest, drifts=False, device="cpu"):
    """Prompts whose responses get these lengths (B,), with drifts every other row in the upper half -> ids, mask."""
    rng = random.Random(0)
    rows = [[rng.randrange(2, vocabulary) for _ in range(rng.randint(longest // 2, longest) - 1)]
            + [int(length) + (row % 2) * drifts * (vocabulary // 2)] for row, length in enumerate(lengths)]
    return [part.to(device) for part in opd.pad_left(rows, PAD)]


def skewed(rows, longest):
    """Response lengths as in reasoning: most are short, the mean is a quarter of the longest. -> (rows,)"""
    return (longest * (torch.arange(1, rows + 1) / rows) ** 3).round().clamp(min=1).long()


def peak_bytes(job, device):
    """What a job holds at its peak above what was held before it; NaN where the system does not tell."""
    def resident(name):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job()
        return torch.cuda.max_memory_allocated() - before
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2 ** 20)                             # M_MMAP_THRESHOLD: what is freed goes back at once
        libc.malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")                                   # the peak starts anew from here
        before = resident("VmRSS")
        job()
        return resident("VmHWM") - before
    except (OSError, AttributeError):
        return math.nan


def median(numbers):
    return statistics.median(torch.as_tensor(numbers).flatten().tolist())


def in_turns(jobs, device="cpu", repeats=5):
    """Run the jobs in turns, so that what else the machine does falls on all alike; the first turn is to warm up ->
    {job: {"seconds", and what the job itself returns: (repeats,)}}"""
    seen = {name: [] for name in jobs}
    for _, (name, job) in itertools.product(range(repeats + 1), jobs.items()):
        begin = opd.clock(torch.device(device))
        told = job()
        seconds = opd.clock(torch.device(device)) - begin
        seen[name].append({**(told if isinstance(told, dict) else {}), "seconds": seconds})
    return {name: {part: torch.tensor([turn[part] for turn in turns[1:]], dtype=torch.double) for part in turns[0]}
            for name, turns in seen.items()}


def bench_rollout(student, teacher, prompt, **changes):
    """opd.rollout -> its dict, with the seconds that the teacher's forward and head alone took as teacher_pass."""
    spent = []

    def timed(function):
        def inner(model, hidden, *rest):
            begin = opd.clock(hidden.device)
            out = function(model, hidden, *rest)
            if model is teacher:
                spent.append(opd.clock(hidden.device) - begin)
            return out
        return inner
    with pytest.MonkeyPatch.context() as patch:
        for name in ("hidden_states", "head_logits"):
            patch.setattr(opd, name, timed(getattr(opd, name)))
        out = opd.rollout(student, teacher, without_padding(*prompt), overlap_k=16 if teacher else 0, **changes)
    return dict(out, teacher_pass=sum(spent))


def full_logits_step(student, optimizer, batch, *, learning_rate, micro_batch_size, max_grad_norm, student_head,
                     teacher_head, token_loss, measure):
    """What train_step computes, by the book: logits of all tokens of both models at once, one loss, one backward."""
    mask, weight = batch["loss_mask"], batch["token_weight"]
    ids, seen = (torch.cat(pair, 1) for pair in ((batch["prompt_ids"], batch["response_ids"]),
                                                 (batch["prompt_mask"], mask)))
    optimizer.zero_grad(set_to_none=True)
    student_logits = student_head(opd.hidden_states(student, ids, seen, mask.shape[1])[mask])              # (N, V)
    with torch.no_grad():
        teacher_logits = teacher_head(torch.cat(batch["teacher_hidden"]))                                  # (N, V)
    loss = (token_loss(student_logits, teacher_logits, batch["response_ids"][mask]) * weight[mask]).sum() / mask.sum()
    loss.backward()
    with torch.no_grad():
        means = {name: value.nanmean().item() for name, value in measure(
            student_logits, teacher_logits, batch["response_ids"][mask], batch["log_probs"][mask]).items()}
    grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), max_grad_norm).item()
    optimizer.param_groups[0]["lr"] = learning_rate
    optimizer.step()
    return {"loss": loss.item(), "grad_norm": grad_norm, "num_tokens": int(mask.sum()), **means}


def update_jobs(vocabulary, width, device="cpu", rows=8, tokens=256):
    """{"ours", "full"}: one step on the same made-up batch with our loss in chunks, and on full logits."""
    student, teacher = (tiny_qwen3(seed, vocab_size=vocabulary, hidden_size=width, max_position_embeddings=512,
                                   initializer_range=.1).to(device) for seed in (1, 2))
    ids, mask = bench_prompts([tokens] * rows, vocabulary, 16, device=device)
    response = torch.randint(vocabulary, (rows, tokens), device=device)
    valid = torch.ones_like(response, dtype=torch.bool)
    with torch.no_grad():
        states = opd.hidden_states(teacher, torch.cat([ids, response], 1), torch.cat([mask, valid], 1), tokens)
    batch = dict(prompt_ids=ids, prompt_mask=mask, response_ids=response, loss_mask=valid, teacher_hidden=[*states],
                 token_weight=torch.ones(valid.shape, device=device), log_probs=torch.zeros(valid.shape, device=device))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    settings = dict(
        learning_rate=0.0, micro_batch_size=rows, max_grad_norm=1.0, measure=measured,
        token_loss=lambda p, q, ids: opd.reverse_kl(p, q),
        student_head=lambda hidden: opd.head_logits(student, hidden, vocabulary),
        teacher_head=lambda hidden: opd.head_logits(teacher, hidden, vocabulary))
    return {name: functools.partial(step, student, optimizer, batch, **settings)
            for name, step in (("ours", opd.train_step), ("full", full_logits_step))}


def measured(student_logits, teacher_logits, ids, log_probs):
    """As opd_step measures."""
    mismatch = (student_logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0] - log_probs).abs()
    return dict(opd.alignment(student_logits, teacher_logits, None, 16), sampling_mismatch=mismatch)


def exponent(sizes, seconds):
    """The b of seconds = a * sizes ** b, fitted on logarithms."""
    x, y = (torch.tensor(values, dtype=torch.double).log() for values in (sizes, seconds))
    return ((x - x.mean()) * (y - y.mean())).sum().item() / (x - x.mean()).square().sum().item()


def line(name, ours, baseline, unit="s", floor=math.nan, what="ratio", value=None, most=None, least=None):
    """One line of the table: medians over turns (n,), the ratio's too, which is taken turn by turn. The target is on the
    ratio, or on a value with a name of its own."""
    ratio = median(ours / baseline)
    ours, baseline, value = median(ours), median(baseline), ratio if value is None else median(value)
    judged = f"{what} {value:.2f}" if what != "ratio" else ""
    if most is not None or least is not None:
        holds = value <= most if least is None else value >= least
        sign = f"<= {most:.4g}" if least is None else f">= {least:.4g}"
        judged = f"{judged or 'ratio'} {sign}: {'not measured' if value != value else 'holds' if holds else 'MISSED'}"
    ours_text, baseline_text = (f"{number:,.0f}" if unit == "tokens" else f"{number:.3g}" for number in (ours, baseline))
    return dict(line=name, ours=f"{ours_text} {unit}", baseline=f"{baseline_text} {unit}", ratio=f"{ratio:.3f}",
                floor=f"{floor:.3g} s" if floor == floor else "", off=f"{ours / floor:.1f}x" if floor == floor else "",
                target=judged)


def bench_table(rows):
    """Dicts of texts -> lines in columns, under their names."""
    rows = [{name: name for name in rows[0]}, *rows]
    widths = {name: max(len(row[name]) for row in rows) for name in rows[0]}
    left = ("line", "target")
    return ["  ".join(f"{row[name]:{'<' if name in left else '>'}{widths[name]}}" for name in row).rstrip()
            for row in rows]


def machine(device):
    """What is measured on, as text, and what it can do: bytes copied and operations of a matrix product a second."""
    dtype, side = (torch.bfloat16, 8192) if device == "cuda" else (torch.float32, 2048)
    a, b, out = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(3))
    wide = torch.ones(64 * side, side // 2, device=device, dtype=dtype)            # larger than any cache
    copied = torch.empty_like(wide)
    best = in_turns({"copy": lambda: copied.copy_(wide), "product": lambda: torch.mm(a, b, out=out)}, device)
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads of a CPU"
    with contextlib.suppress(OSError, StopIteration):
        if device == "cpu":
            with open("/proc/cpuinfo") as file:
                name += next(row.split(":")[1].rstrip() for row in file if row.startswith("model name"))
    bandwidth = 2 * wide.numel() * wide.element_size() / median(best["copy"]["seconds"])
    return name, bandwidth, 2 * side ** 3 / median(best["product"]["seconds"])


def floors(model, prompt, lengths, bandwidth, operations):
    """Seconds that no program can beat for rows with a prompt and response of so many tokens: to sample them, and for a
    forward over them. Sampling reads all weights at every step, and the keys and values of the rows that still run."""
    config, embedding = model.config, model.get_input_embeddings().weight            # which is looked up, not multiplied
    kept = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim           # of one token
    numbers = (model.num_parameters() - embedding.numel()) * int(lengths.max())
    numbers += kept * int((prompt * lengths + lengths ** 2 / 2).sum())
    forward = opd.forward_flops(model, prompt + lengths) - 2 * embedding.numel() * int((prompt + lengths).sum())
    forward /= operations
    return max(numbers * embedding.element_size() / bandwidth, forward), forward


def bench_steps(sampler, teacher, sizes, sampling, prompt, lengths, rates):
    """Lines of the table about whole steps: seconds by phase, positions computed for nothing, and how a step grows."""
    device, tokens, rows = sampler.device.type, sizes["tokens"], sizes["scale_rows"]
    student = copy.deepcopy(sampler).float() if device == "cuda" else sampler                # float32 master weights
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.0, weight_decay=0.0)
    settings = dict(
        learning_rate=0.0, micro_batch_size=4, max_grad_norm=1.0, measure=measured,
        autocast=torch.autocast(device, torch.bfloat16, enabled=device == "cuda"),
        token_loss=lambda p, q, ids: opd.reverse_kl_topk(p, q, 16),
        student_head=lambda hidden: opd.head_logits(student, hidden, sizes["vocabulary"]),
        teacher_head=lambda hidden: opd.head_logits(teacher, hidden, sizes["vocabulary"]))

    def step(prompt):
        def job():
            forwards, stop = forward_shapes(sampler)
            begin = opd.clock(sampler.device)
            out = opd.rollout(sampler, teacher, without_padding(*prompt), max_length=tokens, overlap_k=16, **sampling)
            sampled = opd.clock(sampler.device)
            stop()
            updates, stop = forward_shapes(student)
            batch = dict(out, prompt_ids=prompt[0], prompt_mask=prompt[1], loss_mask=out["response_mask"],
                         token_weight=torch.ones_like(out["overlap"]))
            opd.train_step(student, optimizer, batch, **settings)
            stop()
            return dict(rollout=sampled - begin - out["teacher_seconds"], teacher=out["teacher_seconds"],
                        update=opd.clock(sampler.device) - sampled, forwards=sum(map(math.prod, forwards)),
                        updates=sum(map(math.prod, updates)))
        return job
    prompt_lengths = prompt[1].sum(-1).cpu()
    real = int((prompt_lengths + lengths - 1).sum())          # the last token of a row predicts nothing
    seen = in_turns({"step": step(prompt)}, device)["step"]
    least = {"rollout": floors(sampler, prompt_lengths, lengths, *rates)[0],
             "teacher": floors(teacher, prompt_lengths, lengths, *rates)[1],
             "update": 3 * floors(sampler, prompt_lengths, lengths, *rates)[1]}
    speed = f"{int(lengths.sum()) / median(seen['seconds']):,.0f} tokens a second"
    table = [line(f"step, skewed lengths, {speed}; its floor", seen["seconds"], sum(least.values()),
                  floor=sum(least.values()))]
    for phase in least:
        table.append(line(f"    {phase}; step", seen[phase], seen["seconds"], floor=least[phase]))
    table.append(line("    model FLOPs of the update, at full speed; update", torch.full_like(
        seen["update"], least["update"]), seen["update"], least=.4 if device == "cuda" else None))
    table.append(line("    computed in the rollout; real", seen["forwards"], real, "tokens"))
    table.append(line("    computed in the update; real", seen["updates"], real, "tokens", most=1.10))

    for what, drawn in {"response length": [[tokens // 8 * n] * rows for n in (1, 2, 4, 8)],
                        "batch": [[tokens // 8] * rows * n for n in (1, 2, 4, 8)]}.items():
        seen = in_turns({n: step(bench_prompts(row, sizes["vocabulary"], sizes["prompt_length"], device=device))
                         for n, row in zip((1, 2, 4, 8), drawn)}, device)
        seconds = [median(seen[n]["seconds"]) for n in (1, 2, 4, 8)]
        shown = ", ".join(f"{value:.2f}" for value in seconds[:3])
        table.append(line(f"step at 1, 2, 4, 8 times the {what} ({shown}); at 1", seconds[3], seconds[0],
                          what="exponent", value=exponent((1, 2, 4, 8), seconds), most=1.1))
    return table


def bench(device, sizes):
    """Print one table: what opd.py takes, what the plainest way takes, and whether it is within what it should be."""
    began, table = time.perf_counter(), []
    name, *rates = machine(device)
    print(f"{name}; torch {torch.__version__}, transformers {transformers.__version__}, Python "
          f"{sys.version.split()[0]}; {rates[0] / 1e9:.1f} GB/s copied, {rates[1] / 1e12:.3f} TFLOPS", flush=True)
    V, T, B = sizes["vocabulary"], sizes["tokens"], 4 * sizes["prompts"]
    sampler = countdown(1, V, device=device, dtype=sizes["dtype"], **sizes["student"])
    teacher = countdown(2, V, True, device=device, dtype=sizes["dtype"], **sizes["teacher"])
    # Four segments, as 512 of 2,048: with more of few tokens, the calls of generate themselves would be seen
    sampling = dict(segment_length=T // 4, vocab_size=V, eos_ids={0, V // 2}, pad_id=PAD, num_generations=4)

    def ours(prompt, teacher=None, tokens=T, **method):
        def job():
            out = bench_rollout(sampler, teacher, prompt, max_length=tokens, **{**sampling, **method})
            return {"teacher": out["teacher_pass"], "tokens": int(out["response_mask"].sum())}
        return job

    def generate(prompt):
        return lambda: {"tokens": int(opd.mask_through_eos(plain_generate(
            sampler, *prompt, sampling["eos_ids"], T, do_sample=True, top_k=0), sampling["eos_ids"]).sum())}
    lengths = {"equal": torch.full((B,), T), "skewed": skewed(B, T)}
    drawn = {name: bench_prompts(row, V, sizes["prompt_length"], True, device) for name, row in lengths.items()}
    floor = {name: floors(sampler, drawn[name][1].sum(-1).cpu(), row, *rates) for name, row in lengths.items()}
    guided = dict(select_at=T // 4, probe_window=T // 16, keep_ratio=.5)
    seen = in_turns({                     # what is compared runs close together
        "prune": ours(drawn["equal"], teacher, drift=(1 / 32, 8 / T)),
        "generate equal": generate(drawn["equal"]), "equal": ours(drawn["equal"]),
        "generate half": generate([part[::2] for part in drawn["equal"]]),
        "static": ours(drawn["equal"], static_cache=True),
        "guided": ours(drawn["equal"], teacher, **guided), "unprobed": ours(drawn["equal"], **guided),
        "generate skewed": generate(drawn["skewed"]), "skewed": ours(drawn["skewed"], segment_length=T // 8)}, device)
    for name, target in (("equal", dict(most=1.05)), ("skewed", dict(what="times faster", least=2))):
        one, other = seen[name]["seconds"], seen[f"generate {name}"]["seconds"]
        assert {*seen[name]["tokens"].tolist(), *seen[f"generate {name}"]["tokens"].tolist()} == {
            int(lengths[name].sum())}
        table.append(line(f"rollout, {name} lengths; model.generate", one, other, floor=floor[name][0],
                          value=other / one if name == "skewed" else None, **target))
    whole, static, compiled = seen["generate equal"], seen["static"]["seconds"], device == "cuda"
    assert {*seen["static"]["tokens"].tolist()} == {*whole["tokens"].tolist()}
    # Without a GPU nothing is compiled: what shows is a cache that does not grow, and attention to its empty columns
    table.append(line(f"rollout, static cache{', compiled' * compiled}; model.generate", static, whole["seconds"],
                      floor=floor["equal"][0], what="times faster" if compiled else "ratio",
                      value=whole["seconds"] / static if compiled else None, least=5 if compiled else None))
    table.append(line("    its floor; rollout", torch.full_like(static, floor["equal"][0]), static,
                      least=.4 if compiled else None))
    assert {*seen["unprobed"]["tokens"].tolist(), *seen["prune"]["tokens"].tolist()} == {B * T * 5 // 8}
    # Half of the rows go on after a quarter, whatever guides them. The probe has a line of its own: guided runs without
    # it, and what it took there is taken from prune, which cannot run without it, and scores as many tokens
    plain, asked = seen["unprobed"]["seconds"], seen["guided"]
    probe, pruned = asked["seconds"] - asked["teacher"] - plain, seen["prune"]["seconds"] - seen["prune"]["teacher"]
    for name, text, one, target in (
            ("generate half", "model.generate, half of the rows", seen["generate half"]["seconds"], None),
            ("unprobed", "guided, .625 of the tokens", plain, .85),
            ("prune", "prune, .625, with the probe", pruned, None), ("prune", "    without", pruned - probe, .85)):
        saved, less = 1 - one / whole["seconds"], 1 - seen[name]["tokens"] / whole["tokens"]
        table.append(line(f"{text}; model.generate", one, whole["seconds"], what="time saved / tokens saved",
                          value=saved / less, least=target))
    table.append(line("probe: top k of both, compared; guided rollout", probe, plain, most=.10))
    table.append(line("teacher's scoring; guided rollout", asked["teacher"], plain))

    rows, width = sizes["update_rows"], sizes["update_width"]
    seen = in_turns({(V, name): job for V in sizes["update_vocabularies"]
                     for name, job in update_jobs(V, width, device, rows // 8).items()}, device)
    for V in sizes["update_vocabularies"]:
        one, other = seen[V, "ours"], seen[V, "full"]
        close(one["loss"], other["loss"], rtol=1e-3, atol=0)
        close(one["grad_norm"], other["grad_norm"], rtol=1e-3, atol=0)
        table.append(line(f"update, V {V:,}, {32 * rows:,} tokens; full logits", one["seconds"], other["seconds"],
                          most=1.3 if V > 100_000 else None))
    table += bench_steps(sampler, teacher, sizes, {**sampling, "segment_length": T // 8}, drawn["skewed"],
                         lengths["skewed"], rates)
    for V in sizes["update_vocabularies"]:                    # last: what it asks of malloc takes time
        peak = {name: peak_bytes(job, device) / 2 ** 30 for name, job in update_jobs(V, width, device, rows).items()}
        table.append(line(f"update, V {V:,}, {256 * rows:,} tokens; full logits", peak["ours"], peak["full"], "GiB",
                          most=.125 if V > 100_000 else None))
    print(*bench_table(table), "behind a semicolon: the baseline; floor: the bytes read over the speed of a copy, or "
          f"the operations over that of a matrix product; medians of 5 turns; {time.perf_counter() - began:.0f} s in all",
          sep="\n")


TINY_BENCH = dict(
    BENCH["cpu"], vocabulary=1024, prompts=2, prompt_length=6, tokens=16, update_vocabularies=(300,), update_rows=8,
    update_width=32, scale_rows=1, **{who: dict(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16) for who in ("student", "teacher")})


def test_the_benchmark_prints_every_line_with_a_ratio(capsys, monkeypatch):
    monkeypatch.setattr(__name__ + ".machine", lambda device: ("a machine", 1e9, 1e9))
    bench("cpu", TINY_BENCH)
    first, names, *lines, last = capsys.readouterr().out.splitlines()
    assert "a machine" in first and torch.__version__ in first and "medians" in last
    where = names.index("ratio")
    assert len(lines) == 21 and all(re.search(r"\d\.\d{3}$|nan$", text[:where + len("ratio")]) for text in lines)
    assert sum("holds" in text or "MISSED" in text for text in lines) == 8


def test_both_sides_of_the_benchmark_sample_exactly_the_lengths_that_were_asked_for():
    """Among them a row of 1 token, rows of the upper half of the vocabulary, and rows that leave on the way."""
    lengths, settings = skewed(8, 24), dict(segment_length=8, vocab_size=64, eos_ids={0, 32}, pad_id=PAD)
    model, prompt = countdown(1, 64, **TINY_BENCH["student"]), bench_prompts(skewed(8, 24), 64, 6, True)
    assert lengths[0] == 1 and lengths[-1] == 24
    ours = bench_rollout(model, None, prompt, max_length=24, **settings)["response_mask"].sum(-1)
    plain = opd.mask_through_eos(plain_generate(model, *prompt, {0, 32}, 24, do_sample=True, top_k=0), {0, 32}).sum(-1)
    assert ours.tolist() == plain.tolist() == lengths.tolist()


def test_in_the_benchmark_the_rows_of_the_upper_half_drift_and_no_others():
    student, teacher = (countdown(seed, 64, seed == 2, **TINY_BENCH["student"]) for seed in (1, 2))
    settings = dict(segment_length=4, vocab_size=64, eos_ids={0, 32}, pad_id=PAD, max_length=24, num_generations=4)
    upper = [False, True] * 4
    for method in (dict(drift=(1, .25)), dict(select_at=8, probe_window=4, keep_ratio=.5)):
        out = opd.rollout(student, teacher, without_padding(*bench_prompts([24] * 8, 64, 6, True)), overlap_k=1,
                          **settings, **method)
        assert out["kept"].tolist() == [not row for row in upper]


def test_the_made_up_lengths_have_a_mean_of_a_quarter_of_the_longest():
    lengths = skewed(256, 2048)
    assert lengths.max() == 2048 and lengths.min() == 1
    assert lengths.float().mean().item() == pytest.approx(512, rel=.01)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_baseline_on_full_logits_has_the_gradient_of_train_step(loss):
    student = tiny_llama(1)
    batch = make_batch(student, TEACHER)
    expected, grads = update(student, TEACHER, batch, loss)
    settings = dict(
        learning_rate=0.0, micro_batch_size=4, max_grad_norm=1e9, token_loss=LOSSES[loss],
        measure=lambda p, q, *_: opd.alignment(p, q, None, 4),
        student_head=lambda hidden: opd.head_logits(student, hidden, V),
        teacher_head=lambda hidden: opd.head_logits(TEACHER, hidden, V))
    metrics = full_logits_step(student, torch.optim.SGD(student.parameters(), lr=0.0), batch, **settings)
    assert metrics == pytest.approx(expected, rel=1e-4)
    assert_same(gradients_of(student), grads, tolerance=3e-6)


def test_the_fitted_exponent_of_made_up_times_is_theirs():
    assert exponent((1, 2, 4, 8), [3 * n ** 1.5 for n in (1, 2, 4, 8)]) == pytest.approx(1.5)
    assert exponent((1, 2, 4), (1, 1, 1)) == 0
    assert exponent((1, 2, 4), (1, 3, 4)) == pytest.approx(1)                        # least squares, not the ends alone


def test_jobs_take_turns_and_the_first_turn_does_not_count():
    calls = []

    def job(name):
        calls.append(name)
        return {"count": len(calls)}
    seen = in_turns({name: functools.partial(job, name) for name in "ab"}, repeats=3)
    assert "".join(calls) == "ab" * 4
    assert seen["a"]["count"].tolist() == [3, 5, 7] and seen["b"]["count"].tolist() == [4, 6, 8]
    assert line("x", torch.tensor([1., 2, 9]), torch.tensor([1., 4, 3]))["ratio"] == "1.000"     # the median of 1, .5, 3


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the system does not tell the peak")
def test_the_peak_memory_of_a_job_is_what_it_held_at_once():
    keep = torch.ones(2 ** 24)                                # 64 MiB that were there before

    def job():
        for _ in range(3):
            keep + keep
    assert peak_bytes(job, "cpu") == pytest.approx(2 ** 26, rel=.2)


def test_the_floor_of_sampling_reads_the_weights_at_every_step_and_what_running_rows_have_cached():
    model = countdown(1, 64, **TINY_BENCH["student"])
    weights, lengths = 4 * (model.num_parameters() - 64 * 64), torch.tensor([2, 4])
    cached = 2 * 16 * 4 * ((3 + 1) * 2 + (3 + 2) * 4)         # keys and values of 16 numbers, a prompt of 3
    assert floors(model, torch.tensor([3, 3]), lengths, 10.0, 1e30)[0] == pytest.approx((4 * weights + cached) / 10)
    sampling, forward = floors(model, torch.tensor([3, 3]), lengths, 1e30, 10.0)
    assert sampling == forward == pytest.approx((2 * weights / 4 * (5 + 7) + 2 * 64 * (5 ** 2 + 7 ** 2)) / 10)


def show_memory(tokens=1024, rows=8, vocabulary=151_936):
    """Peak resident memory of one step at the vocabulary of Qwen, for each loss in a process of its own."""
    import resource

    def step(loss):
        student, teacher = (tiny_qwen3(seed, vocab_size=vocabulary, hidden_size=64, intermediate_size=128, head_dim=16,
                                       max_position_embeddings=2048) for seed in (1, 2))
        heads = {f"{name}_head": lambda hidden, model=model: opd.head_logits(model, hidden, vocabulary)
                 for name, model in (("student", student), ("teacher", teacher))}
        begin = time.time()
        batch = make_batch(student, teacher, vocab_size=vocabulary, max_length=tokens, segment_length=512, eos_ids=set(),
                           overlap_k=16, prompt=prompts(*[16] * rows))
        middle = time.time()
        update(student, teacher, {**batch, **dict(zip(("prompt_ids", "prompt_mask"), prompts(*[16] * rows)))}, loss,
               micro_batch_size=rows, **heads)
        print(f"{loss:>10}: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20:.2f} GiB, rollout "
              f"{middle - begin:.0f} s, update {time.time() - middle:.0f} s", flush=True)

    print(f"V {vocabulary:,}, {rows} rows of {tokens} response tokens, two models with 2 layers, 64 wide")
    for loss in LOSSES:
        process = multiprocessing.get_context("fork").Process(target=step, args=(loss,))
        process.start()
        process.join()


if __name__ == "__main__":
    if sys.argv[1:] not in (["memory"], ["bench"]):
        sys.exit("python test_opd.py memory shows the peak memory of a step, bench how long things take; the tests run "
                 "with make test")
    if sys.argv[1] == "memory":
        show_memory()
    else:
        torch.set_num_threads(THREADS)
        transformers.utils.logging.set_verbosity_error()
        chosen = "cuda" if torch.cuda.is_available() else "cpu"
        bench(chosen, BENCH[chosen])
