"""
What opd.py promises, one claim a test. Read the names first: python -m pytest --collect-only -q test_opd.py

Everything runs offline on random models with 2 layers and 24 tokens. Where there is a second way to get a number (every
token enumerated, autograd on full logits, one uninterrupted model.generate), the test goes that way.
"""
import torch
torch.set_num_threads(1)                                      # 30 times slower on two: the tensors are tiny

import copy
import inspect
import itertools
import json
import math
import os
import random
import signal
import threading
import time

import pytest
import transformers
from torch.distributions import Categorical, kl_divergence

import opd

WORDS = "<pad> <end> <user> <solve> \\boxed{ } 0 1 2 3 4 5 6 7 8 9 a b c d e f g h".split()
PAD, END, V = 0, 1, len(WORDS)                                # V = 24: small enough to try every token
SIZES = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=256, bos_token_id=None, eos_token_id=END,
             pad_token_id=PAD, initializer_range=0.3, tie_word_embeddings=False)


def tiny(family, seed, **changes):
    """A random model; initializer_range .3, because smaller ones repeat one token for ever when decoded greedily."""
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
        vocab_size=V, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=END,
        pad_token_id=PAD, initializer_range=0.3)).eval()


FAMILIES = pytest.mark.parametrize("family", [tiny_llama, tiny_qwen3, tiny_gpt2])


def logits(*shape, seed=0, scale=2.0):
    return torch.randn(*shape, V, generator=torch.Generator().manual_seed(seed)) * scale


def gradient(loss, z):
    """Of the sum of loss(z), with respect to the logits z."""
    z = z.clone().requires_grad_()
    return torch.autograd.grad(loss(z).sum(), z)[0]


def prompts(*lengths):
    rng = random.Random(0)
    return opd.pad_left([[rng.randrange(2, V) for _ in range(length)] for length in lengths], PAD)


def roll(student, teacher=None, lengths=(2, 5, 3, 4), **changes):
    """A rollout of 12 tokens in segments of 4, greedy unless said otherwise."""
    settings = dict(max_length=12, segment_length=4, vocab_size=V, eos_ids={END}, pad_id=PAD, temperature=0,
                    overlap_k=4 if teacher else 0)
    return opd.rollout(student, teacher, *prompts(*lengths), **{**settings, **changes})


def rows_of(out, lengths):
    """Each row without any padding, as (ids of prompt and response (1, L), length of the prompt)."""
    ids, mask = prompts(*lengths)
    return [(torch.cat([ids[b][mask[b]], out["response_ids"][b][out["response_mask"][b]]])[None], int(mask[b].sum()))
            for b in range(len(ids))]


# ---------------------------------------------------------------------------------------------------------------
# 1. Losses (section 6 of opd.py)

def test_reverse_kl_is_the_kl_divergence_of_torch_distributions():
    z, t = logits(2, 5, seed=1), logits(2, 5, seed=2)
    expected = kl_divergence(Categorical(logits=z), Categorical(logits=t))
    torch.testing.assert_close(opd.reverse_kl(z, t), expected)


def test_reverse_kl_is_zero_for_equal_logits_and_positive_otherwise():
    z, t = logits(50, 5, seed=1), logits(50, 5, seed=2)
    assert opd.reverse_kl(z, z + 3).abs().max() < 1e-6
    assert opd.reverse_kl(z, t).min() > 0


def test_reverse_kl_punishes_mass_where_the_teacher_has_none_and_not_a_missed_mode():
    """A student that settles on one of two modes pays log 2; one that invents a third mode pays without limit."""
    never = -50.0
    teacher = torch.tensor([[[0.0, 0.0, never]]])
    one_mode, third_mode = torch.tensor([[[0.0, never, never]]]), torch.tensor([[[0.0, 0.0, 0.0]]])
    assert opd.reverse_kl(one_mode, teacher).item() == pytest.approx(math.log(2), abs=1e-4)
    assert opd.reverse_kl(third_mode, teacher).item() > 10


def test_reverse_kl_of_bfloat16_logits_is_computed_in_float32():
    z, t = logits(4, 4, seed=1, scale=8).bfloat16(), logits(4, 4, seed=2, scale=8).bfloat16()
    value = opd.reverse_kl(z, t)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, opd.reverse_kl(z.float(), t.float()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("baseline", [False, True])
def test_the_sampled_loss_has_the_gradient_of_reverse_kl_on_average(baseline):
    """All 24 tokens are tried, each weighted by its probability: no sampling noise is left."""
    z, t = logits(1, 1, seed=1).double(), logits(1, 1, seed=2).double()
    p = z.softmax(-1).flatten()
    mean = sum(p[y] * gradient(lambda z: opd.reverse_kl_sampled(z, t, torch.tensor([[y]]), baseline), z) for y in range(V))
    torch.testing.assert_close(mean, gradient(lambda z: opd.reverse_kl(z, t), z), rtol=1e-4, atol=1e-6)


def advantages(z, t, baseline):
    """What each of the 24 tokens is multiplied by: the surrogate is - advantage * log p(y)."""
    y = torch.arange(V)[:, None]
    value = opd.reverse_kl_sampled(z.expand(V, 1, V), t.expand(V, 1, V), y, baseline)
    return (-value / z.log_softmax(-1).expand(V, 1, V).gather(-1, y[..., None]).squeeze(-1)).flatten()


def test_the_sampled_advantage_is_what_the_teacher_gives_the_token_over_the_student():
    z, t = logits(1, 1, seed=1), logits(1, 1, seed=2)
    torch.testing.assert_close(advantages(z, t, False), (t.log_softmax(-1) - z.log_softmax(-1)).flatten(),
                               rtol=1e-4, atol=1e-5)


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
    """Why the baseline is added to the advantage: alone, a constant of the context has a mean gradient of 0."""
    z, t = logits(1, 1, seed=1), logits(1, 1, seed=2)
    p, kl = z.softmax(-1).flatten(), opd.reverse_kl(z, t)
    mean = sum(p[y] * gradient(lambda z: kl * z.log_softmax(-1)[..., y], z) for y in range(V))
    assert kl > 0.1 and mean.abs().max() < 1e-6


SUPPORTS = pytest.mark.parametrize("support", ["student", "teacher", "intersection", "union"])


def support_set(z, t, k, support):
    """The same set of tokens, by Python's sorting and sets."""
    p_top, q_top = ({*sorted(range(V), key=lambda v: -row[v])[:k]} for row in (z.flatten(), t.flatten()))
    return {"student": p_top, "teacher": q_top, "intersection": p_top & q_top, "union": p_top | q_top}[support]


@SUPPORTS
def test_the_topk_loss_is_the_mean_of_log_p_minus_log_q_on_its_support(support):
    z, t = logits(1, 1, seed=1), logits(1, 1, seed=2)
    S = sorted(support_set(z, t, 8, support))
    p, rho = z.softmax(-1).flatten()[S], (z.log_softmax(-1) - t.log_softmax(-1)).flatten()[S]
    assert opd.reverse_kl_topk(z, t, 8, support).item() == pytest.approx(((p * rho).sum() / p.sum()).item(), rel=1e-5)


@SUPPORTS
def test_the_gradient_of_the_topk_loss_is_the_stop_gradient_one_over_the_mass_of_the_support(support):
    """methods.md 0.1: what the released code optimises, token by token."""
    z, t = logits(1, 1, seed=1), logits(1, 1, seed=2)
    S = support_set(z, t, 8, support)
    p, rho = z.softmax(-1).flatten().tolist(), (z.log_softmax(-1) - t.log_softmax(-1)).flatten().tolist()
    inside = sum(p[v] * rho[v] for v in S)
    expected = [(p[u] * rho[u] * (u in S) - p[u] * inside) / sum(p[v] for v in S) for u in range(V)]
    torch.testing.assert_close(gradient(lambda z: opd.reverse_kl_topk(z, t, 8, support), z).flatten(),
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
    renormalised = gradient(lambda z: kl_divergence(Categorical(logits=z[..., S]), Categorical(logits=t[..., S])), z).flatten()
    released = gradient(lambda z: opd.reverse_kl_topk(z, t, 5), z).flatten()
    assert renormalised[S].sum().abs() < 1e-6 and renormalised[tail].abs().max() == 0
    assert released[tail].abs().max() > 1e-4
    assert released.sum().abs() < 1e-5                        # it sums to 0 over the whole vocabulary


def test_the_topk_loss_on_the_whole_vocabulary_is_reverse_kl_with_its_gradient():
    z, t = logits(2, 3, seed=1), logits(2, 3, seed=2)
    torch.testing.assert_close(opd.reverse_kl_topk(z, t, V), opd.reverse_kl(z, t))
    torch.testing.assert_close(gradient(lambda z: opd.reverse_kl_topk(z, t, V), z), gradient(lambda z: opd.reverse_kl(z, t), z))


def test_an_empty_intersection_costs_nothing_and_pulls_nowhere():
    z = torch.arange(V).float()[None, None]
    grad = gradient(lambda z: opd.reverse_kl_topk(z, -z.detach(), 3, "intersection"), z)
    assert opd.reverse_kl_topk(z, -z, 3, "intersection").item() == 0 and grad.abs().max() == 0


def test_an_unknown_support_is_a_value_error_that_names_the_four():
    with pytest.raises(ValueError, match="student, teacher, intersection or union"):
        opd.reverse_kl_topk(logits(1, 1), logits(1, 1), 3, "neither")


# ---------------------------------------------------------------------------------------------------------------
# 2. Overlap and alignment (section 4)

P4, Q4 = [.5, .3, .15, .05], [.4, .1, .3, .2]                 # top two of the student: 0, 1; of the teacher: 0, 2


def test_topk_overlap_by_hand():
    student, teacher = torch.tensor([[P4, P4]]).log(), torch.tensor([[Q4, P4[::-1]]]).log()
    assert opd.topk_overlap(student, teacher, 2).tolist() == [[.5, 0]]
    assert opd.topk_overlap(student, student.flip(-1).flip(-1), 2).tolist() == [[1, 1]]


def test_the_overlap_ignores_rank_and_scale():
    z = logits(2, 3)
    assert opd.topk_overlap(z, z * 7 + 1, 5).min() == 1
    assert opd.topk_overlap(torch.tensor([[[2., 1, 0, 0]]]), torch.tensor([[[1., 2, 0, 0]]]), 2).item() == 1


def test_unrelated_models_overlap_by_k_over_v_and_not_by_zero():
    overlap = opd.topk_overlap(logits(100, 100, seed=1), logits(100, 100, seed=2), 6)
    assert overlap.mean().item() == pytest.approx(6 / V, abs=0.01)


def test_every_alignment_metric_by_hand():
    """One valid position, k = 2, both shared: p_bar, q_bar are the first two tokens renormalised."""
    p, q, k = [.6, .2, .15, .05], [.3, .4, .2, .1], 2
    got = opd.alignment(torch.tensor([[p, P4]]).log(), torch.tensor([[q, Q4]]).log(), torch.tensor([[1, 0]]), k)
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
    each = [opd.alignment(z[b:b + 1, i:i + 1], t[b:b + 1, i:i + 1], torch.ones(1, 1), 12) for b, i in mask.nonzero()]
    expected = {name: sum(row[name] for row in each) / 4 for name in each[0]}
    assert opd.alignment(z, t, mask, 12) == pytest.approx(expected, abs=1e-5)


def test_the_entropy_gap_does_not_cancel_between_positions():
    flat, sharp = torch.zeros(V), torch.arange(V).float()
    a, b = torch.stack([flat, sharp])[None], torch.stack([sharp, flat])[None]
    got = opd.alignment(a, b, torch.ones(1, 2), 4)
    assert got["entropy_student"] == pytest.approx(got["entropy_teacher"]) and got["entropy_gap"] > 1


def test_a_position_where_nothing_is_shared_is_left_out_of_the_advantage():
    shared, disjoint = torch.tensor(P4).log(), torch.tensor([.05, .15, .3, .5]).log()
    student, ones = shared.expand(1, 2, 4), torch.ones(1, 2)
    both = opd.alignment(student, torch.stack([torch.tensor(Q4).log(), disjoint])[None], ones, 2)
    alone = opd.alignment(student[:, :1], torch.tensor([[Q4]]).log(), ones[:, :1], 2)
    assert both["overlap_token_advantage"] == pytest.approx(alone["overlap_token_advantage"])
    assert both["overlap_ratio"] == .25                       # while in the overlap it counts as 0


def test_overlap_by_position_averages_eight_parts_and_skips_padding():
    overlap = torch.arange(16).float().expand(2, 16) / 16
    mask = torch.ones(2, 16)
    mask[1, 8:] = 0
    overlap = overlap.where(mask.bool(), torch.tensor(-9.0))
    assert opd.overlap_by_position(overlap, mask) == [(2 * i + .5) / 16 for i in range(8)]
    assert opd.overlap_by_position(overlap, torch.zeros(2, 16)) == [None] * 8


# ---------------------------------------------------------------------------------------------------------------
# 3. Who goes on (section 5)

def test_the_horizon_is_a_staircase_up_to_the_cap():
    steps = {0: 512, 9: 512, 10: 768, 19: 768, 20: 1024, 1000: 2048}
    assert {step: opd.horizon(step, 512, 256, 10, 2048) for step in steps} == steps


def test_a_horizon_without_growth_is_a_fixed_prefix():
    assert {opd.horizon(step, 512, 0, 10, 2048) for step in range(100)} == {512}
    assert opd.horizon(0, 512, 0, 10, 100) == 100


def test_select_prefixes_docstring_example():
    assert opd.select_prefixes(torch.tensor([[.9, .8], [.2, .1]]), 3).tolist() == [[True, True], [True, False]]


def test_with_as_many_slots_as_prompts_each_prompt_keeps_exactly_its_best():
    """n = 4 candidates and a pruning ratio of 75%, as in the paper: prompts do not compete."""
    score = torch.rand(8, 4, generator=torch.Generator().manual_seed(0))
    assert opd.select_prefixes(score, 8).nonzero().tolist() == [[p, int(score[p].argmax())] for p in range(8)]


@pytest.mark.parametrize("num_keep", [8, 11, 16, 31, 32])
def test_slots_above_one_per_prompt_go_to_the_best_of_all_the_others(num_keep):
    score = torch.rand(8, 4, generator=torch.Generator().manual_seed(num_keep))
    best = [(p, int(score[p].argmax())) for p in range(8)]
    others = sorted((pg for pg in itertools.product(range(8), range(4)) if pg not in best), key=lambda pg: -score[pg])
    kept = {tuple(pg) for pg in opd.select_prefixes(score, num_keep).nonzero().tolist()}
    assert kept == {*best, *others[:num_keep - 8]}


def test_of_equal_scores_the_first_candidate_wins():
    assert opd.select_prefixes(torch.ones(2, 3), 3).tolist() == [[True, True, False], [True, False, False]]


@pytest.mark.parametrize("num_keep", [1, 7])
def test_select_prefixes_refuses_fewer_slots_than_prompts_or_more_than_candidates(num_keep):
    with pytest.raises(ValueError, match=f"2 prompts and 6 candidates, got {num_keep}"):
        opd.select_prefixes(torch.ones(2, 3), num_keep)


def test_drift_weights_by_hand_are_those_of_the_released_unit_test():
    w = opd.drift_weights(torch.tensor([[1, .5, 0]]), torch.ones(1, 3), .75, .1)
    torch.testing.assert_close(w, torch.tensor([[1, .9, .8]]))
    torch.testing.assert_close(w + .5, torch.tensor([[1.5, 1.4, 1.3]]))


def test_an_overlap_at_the_threshold_is_not_a_bad_event():
    assert opd.drift_weights(torch.tensor([[.75]]), torch.ones(1, 1), .75, .1).item() == 1


def test_reliability_never_recovers():
    overlap = torch.rand(4, 50, generator=torch.Generator().manual_seed(0))
    w = opd.drift_weights(overlap, torch.ones(4, 50), .5, .01)
    assert (w.diff(dim=-1) <= 0).all() and w[:, -1].max() < .9
    assert (opd.drift_weights(torch.cat([overlap, torch.ones(4, 50)], 1), torch.ones(4, 100), .5, .01)[:, -1] == w[:, -1]).all()


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
    assert opd.next_max_length(torch.tensor([2048] + [0] * 10), 2048, 0, **CAP) == (2048, 1)     # one in eleven


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


# ---------------------------------------------------------------------------------------------------------------
# 4. Extrapolation, evaluation and cost (sections 7, 8, 10)

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
    accepted, got, tried = opd.extrapolate({"w": torch.tensor(3.0)}, {"w": torch.tensor(2.0)}, lambda weights: next(left))
    assert (got, accepted["w"].item(), tried) == (k, value, scores[:k + 2])


@FAMILIES
def test_attention_and_mlp_move_and_embeddings_head_and_input_norms_stay(family):
    names = set(opd.movable_weights(family(0)))
    assert any("attn" in name for name in names) and any("mlp" in name for name in names)
    assert not [name for name in names if any(
        part in name for part in ("embed", "wte", "wpe", "lm_head", "input_layernorm", "ln_1", "ln_f", "model.norm"))]


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


def test_the_flops_of_a_step_by_hand():
    """Models of 10 and 100 parameters with one layer of width 1; 2 prompt, 3 sampled tokens; the second row not trained on."""
    two_rows = opd.step_flops((10, 1, 1), (100, 1, 1), torch.tensor([2, 2]), torch.tensor([3, 3]), torch.tensor([3, 0]))
    student, teacher = 2 * 10 * 5 + 2 * 25, 2 * 100 * 5 + 2 * 25
    assert two_rows == 2 * student + 2 * teacher + 3 * student


def leaf_calls():
    z, t, mask = logits(2, 3, seed=1), logits(2, 3, seed=2), torch.ones(2, 3, dtype=torch.bool)
    overlap, ids = torch.rand(2, 3), torch.randint(0, V, (2, 3))
    return {
        "topk_overlap": (z, t, 4), "alignment": (z, t, mask, 4), "overlap_by_position": (overlap, mask),
        "select_prefixes": (overlap, 3), "drift_weights": (overlap, mask, .5, .1), "reliable_length": (overlap, mask),
        "reverse_kl": (z, t), "reverse_kl_topk": (z, t, 4, "union"), "reverse_kl_sampled": (z, t, ids, True),
        "mask_through_eos": (ids, {3, 5}), "extrapolate": ({"w": z}, {"w": t}, lambda weights: weights["w"].mean().item())}


@pytest.mark.parametrize("name", leaf_calls())
def test_a_leaf_function_changes_none_of_its_arguments(name):
    arguments = leaf_calls()[name]
    before = copy.deepcopy(arguments)
    getattr(opd, name)(*arguments)
    for now, then in zip(arguments, before):
        if isinstance(now, torch.Tensor):
            assert torch.equal(now, then)
        elif isinstance(now, dict):
            assert all(torch.equal(now[key], then[key]) for key in then)


# ---------------------------------------------------------------------------------------------------------------
# 5. Sampling (section 3)

def test_pad_left_puts_padding_on_the_left_and_marks_it_by_length():
    ids, mask = opd.pad_left([[PAD, 5], [6, 7, PAD]], PAD)    # a pad id inside a row is a token like the others
    assert ids.tolist() == [[PAD, PAD, 5], [6, 7, PAD]]
    assert mask.tolist() == [[False, True, True], [True, True, True]]


@pytest.mark.parametrize("ids, eos_ids, length", [
    ([5, 1, 6, 1], {1}, 2), ([5, 2, 1, 6], {1, 2}, 2), ([1, 5, 6, 7], {1}, 1), ([5, 6, 7, 8], {1}, 4),
    ([5, 1, 1, 1], {1}, 2), ([5, 6, 7, 1], {1}, 4), ([5, 6, 7, 8], set(), 4)])
def test_the_mask_ends_with_the_first_of_any_eos_ids_which_is_in_it(ids, eos_ids, length):
    """[5, 1, 1, 1]: where pad and EOS are one id, the first is the EOS and the others are padding."""
    assert opd.mask_through_eos(torch.tensor([ids]), eos_ids).tolist() == [[t < length for t in range(4)]]


def sample_first_tokens(model, rows=4000, **changes):
    ids = torch.tensor([[3, 5, 7]]).expand(rows, 3)
    settings = dict(max_new_tokens=1, vocab_size=V, eos_ids={END}, pad_id=PAD, **changes)
    torch.manual_seed(0)
    return opd.generate(model, ids, torch.ones_like(ids), transformers.DynamicCache(config=model.config), **settings)[0].flatten()


def chi_square(tokens, probs):
    expected = probs * len(tokens)
    return ((torch.bincount(tokens, minlength=V)[:V] - expected) ** 2 / expected.clamp(min=1e-9)).sum().item()


def test_generation_settings_that_came_with_a_model_do_not_change_the_law_of_sampling():
    """Any of them would make the samples off-policy to the logits that the loss is about, and nobody would notice."""
    model = tiny_llama(0, initializer_range=.1)
    shipped = transformers.GenerationConfig(
        do_sample=True, temperature=.1, top_k=1, top_p=.3, repetition_penalty=5.0, suppress_tokens=[5, 6, 7, 8],
        no_repeat_ngram_size=1, min_new_tokens=9, forced_eos_token_id=9, eos_token_id=END, pad_token_id=PAD)
    model.generation_config = shipped
    before = shipped.to_dict()
    probs = model(torch.tensor([[3, 5, 7]])).logits[0, -1].softmax(-1)
    assert chi_square(sample_first_tokens(model), probs) < 50              # 23 degrees of freedom: p = .001
    assert model.generation_config is shipped and shipped.to_dict() == before


def test_temperature_divides_the_logits_in_sampling():
    model = tiny_llama(0, initializer_range=.1)
    probs = (model(torch.tensor([[3, 5, 7]])).logits[0, -1] / .5).softmax(-1)
    assert chi_square(sample_first_tokens(model, temperature=.5), probs) < 50


def test_rows_of_the_head_that_are_no_tokens_are_never_sampled():
    """The law is then the softmax over the first rows alone, as in the loss."""
    model = tiny_llama(0, initializer_range=.1)
    tokens = sample_first_tokens(model, vocab_size=6)
    assert tokens.max() < 6
    assert chi_square(tokens, torch.cat([model(torch.tensor([[3, 5, 7]])).logits[0, -1, :6].softmax(-1), torch.zeros(V - 6)])) < 25


def plain_generate(model, ids, mask, eos_ids, length):
    """One uninterrupted model.generate, with its own cache and its own positions."""
    config = transformers.GenerationConfig(do_sample=False, max_new_tokens=length, eos_token_id=sorted(eos_ids), pad_token_id=PAD)
    return model.generate(ids, attention_mask=mask.long(), generation_config=config)[:, ids.shape[1]:]


def three_ends(model, ids, mask):
    """Two EOS ids chosen so that rows of the greedy decoding end in different segments."""
    free = plain_generate(model, ids, mask, {V - 1}, 16)
    return {free[0, 2].item(), free[1, 6].item()}


@FAMILIES
def test_greedy_decoding_in_segments_with_rows_leaving_is_one_uninterrupted_generate(family):
    model, (ids, mask) = family(1), prompts(2, 7, 3, 5)
    eos_ids = three_ends(model, ids, mask)
    out = opd.rollout(model, None, ids, mask, max_length=16, segment_length=4, vocab_size=V, eos_ids=eos_ids, pad_id=PAD,
                      temperature=0)
    expected = plain_generate(model, ids, mask, eos_ids, 16)
    lengths = out["response_mask"].sum(-1)
    assert len({length.item() // 4 for length in lengths}) > 1             # rows did leave at different borders
    for row, (got, length) in enumerate(zip(out["response_ids"], lengths)):
        assert got[:length].tolist() == expected[row, :length].tolist()
        assert (expected[row, length:] == PAD).all() and (got[length:] == PAD).all()


@FAMILIES
def test_padding_is_invisible(family):
    student, teacher, lengths = family(1), family(2), (2, 7, 3, 5)
    together = roll(student, teacher, lengths)
    ids, mask = prompts(*lengths)
    for row in range(4):
        alone = opd.rollout(student, teacher, ids[row:row + 1, 7 - lengths[row]:], mask[row:row + 1, 7 - lengths[row]:],
                            max_length=12, segment_length=4, vocab_size=V, eos_ids={END}, pad_id=PAD, temperature=0, overlap_k=4)
        length = alone["response_mask"].sum()
        assert together["response_ids"][row, :length].tolist() == alone["response_ids"][0, :length].tolist()
        torch.testing.assert_close(together["teacher_hidden"][row], alone["teacher_hidden"][0], rtol=1e-3, atol=1e-4)


def test_temperature_zero_ignores_the_seed_and_sampling_repeats_with_it():
    def ids(seed, temperature):
        torch.manual_seed(seed)
        return roll(tiny_llama(0), eos_ids={V}, temperature=temperature, seed=None)["response_ids"].tolist()
    model = tiny_llama(0)

    def ids(seed, temperature):
        torch.manual_seed(seed)
        return roll(model, temperature=temperature)["response_ids"].tolist()
    assert ids(0, 0) == ids(1, 0)
    assert ids(0, 1) == ids(0, 1) != ids(1, 1)


def test_an_eos_that_is_also_the_pad_id_stays_in_the_response():
    model, (ids, mask) = tiny_llama(1), prompts(2, 7, 3, 5)
    end = three_ends(model, ids, mask).pop()
    out = opd.rollout(model, None, ids, mask, max_length=16, segment_length=4, vocab_size=V, eos_ids={end}, pad_id=end,
                      temperature=0)
    rows = [ids[valid].tolist() for ids, valid in zip(out["response_ids"], out["response_mask"])]
    assert out["ended"].any()
    assert [row[-1] == end and row.count(end) == 1 for row in rows] == out["ended"].tolist()


# ---------------------------------------------------------------------------------------------------------------
# 6. Rollout and scoring (sections 4 and 9)

STUDENT, TEACHER = tiny_llama(1), tiny_qwen3(2, hidden_size=48)            # read only
FIRST = opd.rollout(STUDENT, None, *prompts(2, 5, 3, 4), max_length=12, segment_length=12, vocab_size=V, eos_ids={V}, pad_id=PAD,
                    temperature=0)["response_ids"]
ENDS = {FIRST[0, 1].item(), FIRST[1, 5].item()}               # with these two EOS ids rows end in different segments


def test_the_topk_recorded_while_sampling_is_that_of_a_full_forward():
    ids, mask = prompts(4, 4)
    new_ids, topk = opd.generate(STUDENT, ids, mask, transformers.DynamicCache(config=STUDENT.config), max_new_tokens=6,
                                 vocab_size=V, eos_ids={V}, pad_id=PAD, temperature=1.0, record_k=5)
    full = STUDENT(torch.cat([ids, new_ids], 1)).logits[:, 3:-1]
    assert topk.tolist() == full.topk(5).indices.tolist()


def test_hidden_states_predict_the_column_they_are_asked_for():
    """The shift by one: through the head they are the logits of an ordinary forward, one column earlier."""
    ids, mask = prompts(9)
    got = opd.head_logits(STUDENT, opd.hidden_states(STUDENT, ids, mask, 4), V)
    for column, row in zip(range(5, 9), got[0]):
        torch.testing.assert_close(row, STUDENT(ids[:, :column]).logits[0, -1], rtol=1e-4, atol=1e-5)


def test_hidden_states_of_the_teacher_from_segments_are_those_of_each_row_alone():
    """Without a cache, without padding, without the rows beside it."""
    lengths = (2, 5, 3, 4)
    out = roll(STUDENT, TEACHER, lengths, eos_ids=ENDS)
    assert 0 < out["ended"].sum() < 4
    for (ids, prompt), states in zip(rows_of(out, lengths), out["teacher_hidden"]):
        torch.testing.assert_close(states, TEACHER.model(ids).last_hidden_state[0, prompt - 1:-1], rtol=1e-3, atol=1e-4)


def test_the_overlap_of_every_row_is_topk_overlap_on_full_logits():
    """Also of rows that ended while others ran on: what came after their end must not show."""
    lengths = (2, 5, 3, 4)
    out = roll(STUDENT, TEACHER, lengths, eos_ids=ENDS)
    for row, (ids, prompt) in enumerate(rows_of(out, lengths)):
        expected = opd.topk_overlap(STUDENT(ids).logits[:, prompt - 1:-1], TEACHER(ids).logits[:, prompt - 1:-1], 4)[0]
        torch.testing.assert_close(out["overlap"][row], torch.nn.functional.pad(expected, (0, out["overlap"].shape[1] - len(expected))))


def forward_shapes(model):
    """A list that fills with the (rows, columns) of every forward of the model; call the second value to stop."""
    shapes = []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    return shapes, hook.remove


@pytest.mark.parametrize("who", [STUDENT, TEACHER], ids=["student", "teacher"])
def test_each_model_computes_every_column_once_and_never_again(who):
    """5 of the prompt and 12 of the response; the last one predicts nothing."""
    shapes, stop = forward_shapes(who)
    roll(STUDENT, TEACHER, eos_ids={V})
    stop()
    assert sum(columns for _, columns in shapes) == 5 + 12 - 1 and {rows for rows, _ in shapes} == {4}


@pytest.mark.parametrize("who", [STUDENT, TEACHER], ids=["student", "teacher"])
def test_rows_that_ended_leave_the_caches_of_both_models_at_the_next_border(who):
    shapes, stop = forward_shapes(who)
    out = roll(STUDENT, TEACHER, eos_ids=ENDS)
    stop()
    alive = [(out["response_mask"].sum(-1) > border).sum().item() for border in (0, 4, 8)]       # where rows ended exactly at
    ended = [(out["ended"] & (out["response_mask"].sum(-1) <= border)).sum().item() for border in (0, 4, 8)]
    assert list(dict.fromkeys(rows for rows, _ in shapes)) == list(dict.fromkeys(4 - n for n in ended)) and alive[0] == 4 != alive[2]


def guided(lengths=(3, 3, 3, 3, 3, 3), student=STUDENT, **changes):
    return roll(student, TEACHER, lengths, **{**dict(
        eos_ids={V}, temperature=1.0, num_generations=2, select_at=6, probe_window=5, num_keep=4), **changes})


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


def test_rows_that_ended_in_the_prefix_are_kept_and_take_no_slot_while_another_row_wants_it():
    for seed in range(20):                                    # until some rows end early and some do not
        torch.manual_seed(seed)
        out = guided(eos_ids={2, 3, 4})
        early = out["ended"] & (out["response_mask"].sum(-1) <= 6)
        if 2 <= early.sum() <= 3 and (early.view(3, 2).sum(-1) == 2).any() is not True:
            break
    assert 2 <= early.sum() <= 3 and out["kept"][early].all()
    pairs = early.view(3, 2)
    wanting = (~early).sum().item()
    empty_prompts = pairs.all(-1).sum().item()                # a prompt whose candidates all ended needs no slot
    assert (out["kept"] & ~early).sum().item() == min(wanting, 4 - empty_prompts)
    assert (out["kept"] & ~early).sum() >= 3 - empty_prompts


def test_a_short_row_is_judged_on_the_tokens_it_has():
    """Prune: rows stop at the first border where their reliability is used up; 4 bad tokens of a quarter each."""
    out = roll(STUDENT, TEACHER, eos_ids={V}, segment_length=3, drift=(1.1, .25))
    assert out["response_mask"].sum(-1).tolist() == [6] * 4 and not out["kept"].any() and not out["ended"].any()


def test_prune_stops_no_row_in_flight_without_drift_and_none_that_is_reliable():
    assert roll(STUDENT, TEACHER, eos_ids={V})["response_mask"].sum().item() == 4 * 12
    assert roll(STUDENT, TEACHER, eos_ids={V}, drift=(0.0, 1.0))["kept"].all()


def test_a_row_that_ended_is_not_called_dropped_by_drift():
    out = roll(STUDENT, TEACHER, eos_ids=ENDS, drift=(1.1, 1.0))
    assert out["kept"].tolist() == out["ended"].tolist() and out["ended"].any()


def test_the_rollout_of_a_prefix_is_the_start_of_the_full_rollout():
    torch.manual_seed(0)
    full = roll(STUDENT, TEACHER, eos_ids={V}, temperature=1.0)
    torch.manual_seed(0)
    prefix = roll(STUDENT, TEACHER, eos_ids={V}, temperature=1.0, max_length=4)
    assert prefix["response_ids"].tolist() == full["response_ids"][:, :4].tolist()
    torch.testing.assert_close(prefix["overlap"], full["overlap"][:, :4])


def test_the_tokens_do_not_depend_on_the_segment_length_nor_on_a_teacher():
    expected = roll(STUDENT, eos_ids=ENDS)["response_ids"].tolist()
    for segment_length in (1, 5, 12, 100):
        assert roll(STUDENT, TEACHER, eos_ids=ENDS, segment_length=segment_length)["response_ids"].tolist() == expected


@pytest.mark.parametrize("family, setting", [
    ("Gemma2", {"final_logit_softcapping": .5}), ("Cohere", {"logit_scale": .3}), ("Granite", {"logits_scaling": 4.0})])
def test_head_logits_are_the_logits_of_models_with_a_softcap_or_a_scale(family, setting):
    model, (ids, mask) = tiny(family, 0, **setting), prompts(6)
    expected = model(ids).logits
    torch.testing.assert_close(opd.head_logits(model, model.base_model(ids).last_hidden_state, V), expected)
    plain = model.lm_head(model.base_model(ids).last_hidden_state)
    assert (plain - expected).abs().max() > .1                # so the setting is no decoration
    opd.check_head(model, ids[0].tolist(), V)


def test_a_model_whose_logits_are_made_otherwise_is_refused_by_name():
    model = tiny("FalconH1", 0, lm_head_multiplier=.3, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1,
                 mamba_d_state=8)
    with pytest.raises(ValueError, match="falcon_h1"):
        opd.check_head(model, [3, 5, 7], V)


def test_heads_of_two_widths_are_cut_to_the_vocabulary_they_share():
    wide = tiny_llama(0, vocab_size=V + 8)
    ids, _ = prompts(6)
    cut = opd.head_logits(wide, wide.base_model(ids).last_hidden_state, V)
    torch.testing.assert_close(cut, wide(ids).logits[..., :V])
    assert roll(wide, TEACHER, eos_ids={V}, temperature=3.0)["response_ids"].max() < V


# ---------------------------------------------------------------------------------------------------------------
# 7. One update (section 10)

LENGTHS = (2, 5, 3, 4)
LOSSES = {"reverse_kl": lambda p, q, ids: opd.reverse_kl(p, q), "topk": lambda p, q, ids: opd.reverse_kl_topk(p, q, 4),
          "sampled": lambda p, q, ids: opd.reverse_kl_sampled(p, q, ids)}


def make_batch(student, teacher, **changes):
    """A sampled rollout, and weights that differ from token to token."""
    torch.manual_seed(0)
    out = roll(student, teacher, LENGTHS, **{**dict(eos_ids={2, 3}, temperature=1.0), **changes})
    prompt_ids, prompt_mask = prompts(*LENGTHS)
    weight = torch.rand(out["overlap"].shape, generator=torch.Generator().manual_seed(0)) + .5
    return {**out, "prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "loss_mask": out["response_mask"], "token_weight": weight}


def update(student, teacher, batch, loss="reverse_kl", lr=0.0, **changes):
    """train_step with a learning rate of 0 -> (its metrics, the gradient of every parameter)."""
    settings = dict(
        micro_batch_size=2, max_grad_norm=1e9, token_loss=LOSSES.get(loss, loss), measure=lambda p, q: opd.alignment_per_token(p, q, 4),
        student_head=lambda hidden: opd.head_logits(student, hidden, V), teacher_head=lambda hidden: opd.head_logits(teacher, hidden, V))
    metrics = opd.train_step(student, torch.optim.SGD(student.parameters(), lr=lr), batch, **{**settings, **changes})
    return metrics, {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def plain_gradients(student, teacher, batch, token_loss):
    """The same by the book: every row alone and unpadded, full logits, one loss, one backward."""
    student.zero_grad()
    total, count = 0.0, batch["loss_mask"].sum()
    for row, (ids, prompt) in enumerate(rows_of(batch, LENGTHS)):
        if batch["loss_mask"][row].any():
            p, q = student(ids).logits[:, prompt - 1:-1], teacher(ids).logits[:, prompt - 1:-1].detach()
            weight = batch["token_weight"][row, :ids.shape[1] - prompt]
            total = total + (token_loss(p, q, ids[:, prompt:]) * weight).sum() / count
    total.backward()
    return total.item(), {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def assert_same(a, b, tolerance=1e-6):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize("loss", LOSSES)
@FAMILIES
def test_the_gradients_are_those_of_plain_autograd_on_full_logits(family, loss):
    student, teacher = family(1), family(2)
    batch = make_batch(student, teacher)
    metrics, grads = update(student, teacher, batch, loss)
    expected, plain = plain_gradients(student, teacher, batch, LOSSES[loss])
    assert metrics["loss"] == pytest.approx(expected, rel=1e-4)
    assert_same(grads, plain, tolerance=3e-6)


@pytest.mark.parametrize("change", [{"micro_batch_size": 1}, {"micro_batch_size": 3}, {"chunk_tokens": 1}, {"chunk_tokens": 5}], ids=str)
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
    full, prefix = make_batch(student, TEACHER, eos_ids={V}), make_batch(student, TEACHER, eos_ids={V}, max_length=4)
    prefix["token_weight"] = torch.ones(4, 4)
    full["token_weight"] = (torch.arange(12) < 4).float().expand(4, 12) * 3          # 12 tokens to count instead of 4
    assert_same(update(student, TEACHER, full)[1], update(student, TEACHER, prefix)[1])


def test_a_loss_mask_shorter_than_the_rollout_takes_the_matching_teacher_states():
    student = tiny_llama(1)
    full, prefix = make_batch(student, TEACHER, eos_ids={V}), make_batch(student, TEACHER, eos_ids={V}, max_length=4)
    full["loss_mask"] = full["response_mask"] & (torch.arange(12) < 4)
    full["token_weight"], prefix["token_weight"] = torch.ones(4, 12), torch.ones(4, 4)
    assert_same(update(student, TEACHER, full)[1], update(student, TEACHER, prefix)[1])


@pytest.mark.parametrize("loss", LOSSES)
def test_a_student_that_is_its_own_teacher_has_nothing_to_learn(loss):
    student = tiny_llama(1)
    metrics, grads = update(student, copy.deepcopy(student), make_batch(student, copy.deepcopy(student)), loss)
    assert abs(metrics["loss"]) < 1e-5 and metrics["grad_norm"] < 1e-3
    assert metrics["overlap_ratio"] == 1 and abs(metrics["reverse_kl"]) < 1e-5


def test_a_loss_that_is_not_finite_is_raised_before_any_weight_changes():
    student = tiny_llama(1)
    batch, before = make_batch(student, TEACHER), {name: p.clone() for name, p in student.named_parameters()}
    with pytest.raises(FloatingPointError):
        update(student, TEACHER, batch, lambda p, q, ids: opd.reverse_kl(p, q) * float("nan"), lr=1.0)
    assert_same(before, dict(student.named_parameters()), tolerance=0)


def test_the_gradient_is_clipped_and_its_norm_before_that_is_reported():
    student = tiny_llama(1)
    batch = make_batch(student, TEACHER)
    metrics, grads = update(student, TEACHER, batch, max_grad_norm=.01)
    norm = torch.stack([grad.norm() for grad in grads.values()]).norm().item()
    assert norm == pytest.approx(.01, rel=1e-3) and metrics["grad_norm"] > .1
