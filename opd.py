r"""
opd.py: on-policy distillation (OPD) of language models, in one file, on a CPU, one GPU or several.

A small model (the student) samples solutions, a larger one (the teacher) scores every token, and
the student moves towards the teacher on its own samples. Sampling is most of the cost, and deep in
a solution that went wrong the teacher's scores are worth little. So several of the papers below
change what gets sampled.

    python opd.py                                    a tiny world, made on the spot, no download
    python opd.py --student A --teacher B --train_file train.jsonl --eval_file aime24.jsonl
    python opd.py --eval_only --student A --eval_file aime24.jsonl amc23.jsonl

Data flow of one step, from the problems to the sampler of the next step:

    problems -> prompts (ids) -> rollout -> token_weights -> backward -> student -> sampler
                                 for each segment, which ends at a border:
                                   write    the student samples the segment      its top k
                                   judge    the teacher scores the new tokens    its states, overlap
                                   choose   which rows go on? the method's rule  kept
                                   leave    the other rows leave both caches

Papers, by the tags used below, with their --method, flag or function
    [GKD]             2306.13649   opd: distillation on the student's own samples
    [Rethinking-OPD]  2604.13016   overlap and the other alignment metrics; the student's top-k loss
    [FastOPD]         2602.15260   prefix: train on prefixes only; progressive: let them grow
    [POPD]            2605.31490   progressive as a staircase; TOPD: prefix, a fixed horizon
    [PG-OPD]          2606.21994   prefix-guided: continue the candidates whose prefix agrees
    [Prune-OPD]       2605.07804   prune: down-weight and stop rows that drift, adapt the length cap
    [EffOPD]          2605.11739   --extrapolate the update while a small validation set improves
    [vOPD]            2605.07865   --baseline: a closed-form one for the sampled-token loss
    [EOS]             2609.20511   all tokens that end a response count as one: merge_stops
    [OPSD]            2601.18734   the teacher: the initial student, given the solution to read

Shapes: P prompts, G candidates per prompt, B = P * G rows (candidate g of prompt i is row
i * G + g), of which b still run; S prompt length, T response length, L = S + T columns, n new
columns or tokens of a chunk; V vocabulary size, K top k, H hidden size (H' the teacher's),
N response tokens of several rows, concatenated. p and q are probabilities, student's and teacher's.

Part I is what the papers define, in the order one would explain it. Part II is plumbing.
"""

import argparse
import collections
import contextlib
import copy
import datetime
import fcntl
import functools
import glob
import hashlib
import html
import inspect
import json
import math
import operator
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import unicodedata
import warnings
from dataclasses import dataclass, field, replace
from typing import Literal, get_args, get_origin

# Set before torch is imported. Without it the growing KV caches fragment a GPU's memory
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import numpy as np
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig

# --------------------------------------------------------------------------------------------------
# Part I, the papers
#
# 1. Losses, one value per token; --loss picks one (token_loss, section 17), backward averages it.
# The samples are constants: no gradient flows through sampling, so what a token does to the later
# ones is not learned. (B, T, V) stands for any (..., V): the update passes n tokens, (n, V).


def reverse_kl(student_logits, teacher_logits):
    """KL(student || teacher), whole vocabulary. (B, T, V), (B, T, V) -> (B, T)               [GKD]

        sum_v p(v) (log p(v) - log q(v)),    p student, q teacher

    A step's loss is the mean of token_weight times this over its trained tokens (see backward). A v
    with q = 0 < p costs about 1e30 p, not inf; unless p is tiny, the gradient's norm overflows.
    """
    # Not F.kl_div(log_p, q): that is KL(q || p), which spreads the student over all that the
    # teacher might say. bfloat16 is promoted to float32; float64 stays float64
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    # Clamped: at p = q = 0, p (log p - log q) would be NaN instead of 0
    log_p = F.log_softmax(student_logits, dim=-1, dtype=dtype).clamp(min=-1e30)
    log_q = F.log_softmax(teacher_logits, dim=-1, dtype=dtype).clamp(min=-1e30)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def forward_kl(student_logits, teacher_logits):
    """KL(teacher || student), sum_v q (log q - log p). (B, T, V), (B, T, V) -> (B, T)         [GKD]

    Large where the student gives a low probability to what the teacher might say.
    """
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    log_p = F.log_softmax(student_logits, dim=-1, dtype=dtype).clamp(min=-1e30)
    log_q = F.log_softmax(teacher_logits, dim=-1, dtype=dtype).clamp(min=-1e30)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def jsd(student_logits, teacher_logits, beta):
    """The generalised Jensen-Shannon divergence. (B, T, V), (B, T, V) -> (B, T)        [GKD, eq. 1]

        beta KL(q || m) + (1 - beta) KL(p || m),    m = beta q + (1 - beta) p,    0 < beta < 1

    ValueError for other betas: at 0 and 1 it would be 0, not a KL (see forward_kl, reverse_kl).
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta {beta} must lie between 0 and 1; use forward_kl or reverse_kl")
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    log_p = F.log_softmax(student_logits, dim=-1, dtype=dtype).clamp(min=-1e30)
    log_q = F.log_softmax(teacher_logits, dim=-1, dtype=dtype).clamp(min=-1e30)
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log(1 - beta))
    of_teacher = (log_q.exp() * (log_q - log_m)).sum(-1)
    of_student = (log_p.exp() * (log_p - log_m)).sum(-1)
    return beta * of_teacher + (1 - beta) * of_student


def reverse_kl_sampled(student_logits, teacher_logits, response_ids, baseline=False):
    """Policy-gradient surrogate on the sampled tokens y. (B, T, V), (B, T, V), (B, T) -> (B, T)

        -stop_gradient(r) log p(y),    r = log q(y) - log p(y)    (-r is k1, an estimate of KL)
        with the baseline: r - E[r] = r + KL(p || q) in place of r                            [vOPD]

    In expectation over y ~ p its gradient is that of reverse_kl; its value has no meaning.
    """
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    log_p = F.log_softmax(student_logits, dim=-1, dtype=dtype).clamp(min=-1e30)
    log_q = F.log_softmax(teacher_logits, dim=-1, dtype=dtype).clamp(min=-1e30)
    sampled = response_ids[..., None]  # (B, T, 1)
    log_p_sampled = log_p.gather(-1, sampled).squeeze(-1)  # (B, T)
    advantage = log_q.gather(-1, sampled).squeeze(-1) - log_p_sampled
    if baseline:
        # E[r] = -KL. Subtracting it changes the variance of the gradient, not its mean
        advantage = advantage + (log_p.exp() * (log_p - log_q)).sum(-1)
    return -advantage.detach() * log_p_sampled


def is_among(tokens, others):
    """Whether each token is among the others. (..., K), (..., J) -> (..., K) bool. All comparisons
    of top-k sets are made here.
    """
    return (tokens[..., :, None] == others[..., None, :]).any(-1)


def topk_support(log_p, log_q, k, support):
    """The support S of a top-k loss. log_p, log_q (..., V) -> candidate ids (..., J), J = K or 2K;
    in_support (..., J) bool: which candidates are in S. Needs is_among.

    support: "student" or "teacher", the top k of that model; "intersection" (may be empty) or
    "union" of both. ValueError for any other.
    """
    student_topk = log_p.topk(k, dim=-1).indices  # (..., K)
    teacher_topk = log_q.topk(k, dim=-1).indices
    candidates = teacher_topk if support == "teacher" else student_topk
    in_support = torch.ones_like(candidates, dtype=torch.bool)
    if support == "intersection":
        in_support = is_among(student_topk, teacher_topk)
    elif support == "union":
        candidates = torch.cat([student_topk, teacher_topk], dim=-1)  # (..., 2K)
        new = ~is_among(teacher_topk, student_topk)  # no token counts twice
        in_support = torch.cat([in_support, new], dim=-1)
    elif support not in ("student", "teacher"):
        raise ValueError(f"support {support!r}; use student, teacher, intersection or union")
    return candidates, in_support


def reverse_kl_topk(student_logits, teacher_logits, k, support="student"):
    """Reverse KL on a support S of top-k tokens. (B, T, V), (B, T, V) -> (B, T)
                                                                   [Rethinking-OPD, released code]
        value       sum_S p_bar rho,    p_bar = p / P_S,   P_S = sum_S p,   rho = log p - log q
        gradient    by logit u: p(u) (1[u in S] rho(u) - sum_S p rho) / P_S

    support: see topk_support, which it needs. The value may be negative; it is 0 where S is empty.
    The gradient is the released code's. That of the renormalised KL printed in the paper would
    move no mass into or out of S; this one does.
    """
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    log_p = F.log_softmax(student_logits, dim=-1, dtype=dtype).clamp(min=-1e30)
    log_q = F.log_softmax(teacher_logits, dim=-1, dtype=dtype).clamp(min=-1e30)
    candidates, in_support = topk_support(log_p, log_q, k, support)
    top_log_p, top_log_q = log_p.gather(-1, candidates), log_q.gather(-1, candidates)
    # At an empty S the softmax is NaN
    p_bar = top_log_p.masked_fill(~in_support, -torch.inf).softmax(-1).nan_to_num(0)
    # Only the ratio, which is 1, carries gradient. If rho did, too, that would add grad log P_S,
    # which pushes mass out of S even at p = q, unless S is all of V
    ratio = (top_log_p - top_log_p.detach()).exp()
    return ((p_bar * (top_log_p - top_log_q)).detach() * ratio).sum(-1)


def reverse_kl_tail(student_logits, teacher_logits, k, support="student"):
    """Reverse KL on |S| + 1 classes: S, and the rest as one. (B, T, V), (B, T, V) -> (B, T)

        sum_S p (log p - log q) + p_rest (log p_rest - log q_rest),    p_rest = 1 - sum_S p

    support: see topk_support, which it needs. Up to rounding, at most reverse_kl, and equal if S is
    all of V. Nothing is renormalised: its own gradient moves mass between S and the rest.
    """
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    log_p = F.log_softmax(student_logits, dim=-1, dtype=dtype).clamp(min=-1e30)
    log_q = F.log_softmax(teacher_logits, dim=-1, dtype=dtype).clamp(min=-1e30)
    candidates, in_support = topk_support(log_p, log_q, k, support)
    top_log_p = log_p.gather(-1, candidates).masked_fill(~in_support, -1e30)  # p = 0
    top_log_q = log_q.gather(-1, candidates).masked_fill(~in_support, -1e30)
    # 1 - sum_S p is only accurate to eps: below that, the rest is eps and has no gradient
    least = torch.finfo(dtype).eps
    p_rest = (1 - top_log_p.exp().sum(-1)).clamp(min=least)
    q_rest = (1 - top_log_q.exp().sum(-1)).clamp(min=least)
    on_support = (top_log_p.exp() * (top_log_p - top_log_q)).sum(-1)
    return on_support + p_rest * (p_rest / q_rest).log()


# --------------------------------------------------------------------------------------------------
# 2. Agreement of the two models. Methods decide by overlap_ratio (judge); alignment is only logged


def overlap_ratio(student_topk, teacher_topk):
    """The share of the student's top k in the teacher's. (..., K) both -> (...). Needs is_among."""
    return is_among(student_topk, teacher_topk).float().mean(-1)


def topk_overlap(student_logits, teacher_logits, k):
    """The share of the student's k likeliest tokens among the teacher's k.         [Rethinking-OPD]
    (B, T, V), (B, T, V) -> (B, T), each one of 0, 1/k, ..., 1. Needs overlap_ratio, is_among.

    Rank within the top k does not count. Two unrelated models overlap by k / V on average. In
    filtered logits -inf in both would count as agreement. In a run judge calls overlap_ratio.
    """
    student_topk = student_logits.topk(k, dim=-1).indices  # (B, T, K)
    teacher_topk = teacher_logits.topk(k, dim=-1).indices  # (B, T, K)
    return overlap_ratio(student_topk, teacher_topk)


def alignment(student_logits, teacher_logits, response_mask, k):
    """How well the two models agree on the student's samples. (B, T, V), (B, T, V), (B, T) -> dict
    of floats, means over the mask. With response_mask None: dict of (B, T), as a run measures them
    on trained tokens; backward takes the means. Needs is_among.        [Rethinking-OPD, eqs. 6-10]

        overlap_ratio            |I| / k,    I: the tokens in the top k of both
        overlap_token_advantage  1/|I| sum_I p_bar (log q_bar - log p_bar) = -KL(p_bar || q_bar)/|I|
                                 with p_bar, q_bar renormalised on I; 1/|I| is the paper's; NaN
                                 where I is empty, which the mean leaves out
        overlap_mass_student     sum_I p
        overlap_mass_teacher     sum_I q
        entropy_student, entropy_teacher, entropy_gap (absolute difference), reverse_kl: in nats,
                                 over the whole vocabulary
    """
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    log_p = F.log_softmax(student_logits, dim=-1, dtype=dtype).clamp(min=-1e30)
    log_q = F.log_softmax(teacher_logits, dim=-1, dtype=dtype).clamp(min=-1e30)
    p, q = log_p.exp(), log_q.exp()
    entropy_student = -(p * log_p).sum(-1)  # (B, T)
    entropy_teacher = -(q * log_q).sum(-1)

    # The student's top k, and which of it the teacher shares
    student_topk = log_p.topk(k, dim=-1).indices  # (B, T, K)
    teacher_topk = log_q.topk(k, dim=-1).indices
    shared = is_among(student_topk, teacher_topk)
    top_log_p, top_log_q = log_p.gather(-1, student_topk), log_q.gather(-1, student_topk)
    log_p_bar = top_log_p.masked_fill(~shared, -torch.inf).log_softmax(-1)
    log_q_bar = top_log_q.masked_fill(~shared, -torch.inf).log_softmax(-1)
    advantage = torch.where(shared, log_p_bar.exp() * (log_q_bar - log_p_bar), 0).sum(-1)
    values = {
        "overlap_ratio": shared.float().mean(-1),
        "overlap_token_advantage": advantage / shared.sum(-1),  # 0 / 0 is NaN
        "overlap_mass_student": (top_log_p.exp() * shared).sum(-1),
        "overlap_mass_teacher": (top_log_q.exp() * shared).sum(-1),
        "entropy_student": entropy_student,
        "entropy_teacher": entropy_teacher,
        "entropy_gap": (entropy_teacher - entropy_student).abs(),
        "reverse_kl": (p * (log_p - log_q)).sum(-1),
    }
    if response_mask is None:
        return values
    valid = response_mask.bool()
    return {name: value[valid].nanmean().item() for name, value in values.items()}


def overlap_by_position(overlap, response_mask, parts=8):
    """Mean overlap in `parts` parts of T, nearly equal. (B, T), (B, T) -> floats, NaN if empty"""
    valid = overlap.where(response_mask.bool(), torch.nan)
    return [part.nanmean().item() for part in valid.tensor_split(parts, dim=1)]


# --------------------------------------------------------------------------------------------------
# 3. Which rows go on, and how far: the plan of a step; horizon, selection, drift, cap


@dataclass
class Plan:
    """How long a step's rollouts may get; which rows go on at borders, where ended ones leave"""

    max_length: int  # cap of a response, in tokens
    segment_length: int = 0  # tokens between borders; 0: an eighth of max_length, at most 512
    look_at: int = 0  # one more border, at this many tokens; 0: none
    # The rule, called at each border for all B rows, even those that left: (length, overlap
    # (B, length), mask (B, length), ended (B,)) -> (B,) bool. False is final; what it says of ended
    # rows is ignored. None: all rows go on
    goes_on: object = None

    def borders(self):
        length = self.segment_length or min(max(self.max_length // 8, 1), 512)
        borders = {*range(length, self.max_length, length), self.look_at, self.max_length}
        return sorted(border for border in borders if 0 < border <= self.max_length)


def horizon(step, start, growth, every, max_length):
    """The response length to sample to, after `step` updates.                       [FastOPD, POPD]

        min(max_length, start + growth * floor(step / every)),    step = 0 before the first update

    every = 1 is FastOPD's ramp, more is POPD's staircase. Example: with start 512, growth 256 and
    every 10, the first ten rollouts (step 0 to 9) have up to 512 tokens, the next ten 768.
    """
    return min(max_length, start + growth * (step // every))


def select_prefixes(score, num_keep):
    """Which num_keep candidates go on past the prefix. score (P, G) -> (P, G) bool         [PG-OPD]

    First the best candidate of every prompt, then the best of all others; the first of equal ones.
    So prompts only compete for the slots beyond P. ValueError unless P <= num_keep <= P * G and all
    scores are finite.
    Example: [[.9, .8], [.2, .1]] with num_keep 3 -> .9, .8 and .2.
    """
    P, G = score.shape
    score = score.to(torch.promote_types(score.dtype, torch.float32))  # counts have no infinity
    if not P <= num_keep <= P * G or not score.isfinite().all():
        raise ValueError(f"needs {P} <= num_keep {num_keep} <= {P * G}, and finite scores")
    best = score.argmax(dim=1, keepdim=True)  # (P, 1)
    best_first = score.scatter(1, best, torch.inf).flatten()  # (P * G,)
    order = best_first.argsort(descending=True, stable=True)  # stable: the first wins a tie
    keep = torch.zeros_like(best_first, dtype=torch.bool)
    keep[order[:num_keep]] = True
    return keep.view(P, G)


def best_prefixes(
    length, overlap, mask, ended, *, at, num_generations, keep_ratio, probe_window, by_chance=False
):
    """The rule of prefix-guided OPD, a goes_on for Plan. overlap (B, length) -> (B,) bool  [PG-OPD]

    At length `at` (the prefix, the plan's look_at) max(P, round(keep_ratio * B)) rows that have not
    ended go on; ended ones count in B, but take no slot. First the best of every prompt, then the
    best of all others, by mean overlap over the first probe_window tokens, or by_chance, a control.
    The rest leave both caches, and the loss (token_weights), unless --train_pruned_prefix. B is one
    group of rollout_in_groups; the paper's is the batch. Needs select_prefixes.
    """
    if length != at:
        return torch.ones_like(ended)
    score = overlap[:, :probe_window].mean(-1)  # (B,)
    if by_chance:
        score = torch.rand_like(score)
    # Ended rows are complete without a slot: a score below all others puts them last
    score = score.masked_fill(ended, -1).view(-1, num_generations)  # (P, G)
    slots = max(len(score), round(keep_ratio * len(ended)))
    # select_prefixes also spends a slot on each prompt whose candidates have all ended: add those
    slots += int((score == -1).all(1).sum())
    return select_prefixes(score, min(len(ended), slots)).flatten()


# Prune-OPD: drift_weights gives the reliability w; reliable_rows stops a row at the first border
# where w is 0; token_weights weighs tokens by w + w_base, also those of stopped rows; next_cap
# moves the cap after an update, by next_max_length of all rows' reliable_length (row_facts).


def drift_weights(overlap, response_mask, threshold, w_drop):
    """The reliability w of each token. (B, T), (B, T) -> (B, T), 0 off the mask, never rising on it

        w_t = max(0, 1 - w_drop * #{s <= t : overlap_s < threshold})                   [Prune-OPD]

    The loss weight is w_t + w_base, so never under w_base on the mask.
    Example: threshold .75, w_drop .1: (1, .5, 0) -> (1, .9, .8).
    """
    bad = (overlap < threshold) & response_mask.bool()  # (B, T)
    # Cumulative: all tokens after a wrong turn are scored given that wrong turn
    return (1 - w_drop * bad.cumsum(-1)).clamp(min=0) * response_mask


def reliable_rows(length, overlap, mask, ended, *, threshold, w_drop):
    """Prune-OPD's stop in flight, a rule for Plan: rows go on while w > 0. Needs drift_weights."""
    return drift_weights(overlap, mask, threshold, w_drop)[:, -1] > 1e-8


def reliable_length(weights, response_mask):
    """The number of tokens with w of drift_weights > 1e-8 (as released). (B, T), (B, T) -> (B,)"""
    return ((weights > 1e-8) & response_mask.bool()).sum(-1)


def next_max_length(reliable, max_length, misses, *, step, margin, hit_ratio, patience, low, high):
    """The next cap, from the reliable lengths (B,) under this one -> max_length, misses [Prune-OPD]

    A row hits if reliable >= max(low, max_length - margin). If at least a share hit_ratio of the
    rows hits, the cap grows by step tokens; else that is a miss, and after `patience` misses in a
    row it shrinks by step. It stays between low and high. Example: cap 2048, margin 100, step 100,
    hit_ratio .1, and one of 10 rows reliable for 1948 tokens -> (2148, 0).
    """
    boundary = max(low, max_length - margin)
    # A row that ends early cannot hit: growth needs responses that are long and still reliable
    if (reliable >= boundary).double().mean().item() >= hit_ratio:
        return min(max_length + step, high), 0
    if misses + 1 >= patience:
        return max(max_length - step, low), 0
    return max_length, misses + 1


# --------------------------------------------------------------------------------------------------
# 4. Extrapolation


def extrapolate(weights, anchor, validate, max_tries=5):
    """Extrapolate the update for as long as a validation score rises.                      [EffOPD]

        try weights + 2 * k * (weights - anchor), k = 1, ..., max_tries; stop at the first that is
        not strictly better than the one before

    weights: the current ones, copied (movable_weights); anchor: the dict that the last call
    accepted, at first the weights before step 1; validate: dict -> score, and it may load the dict.
    Example: anchor 1, weight 2: tries 4, 6, 8, 10, 12. A run tries after steps 1, 2, 4, 8, ...,
    scores avg@1 on training problems, and keeps Adam's moments (extrapolate_student, section 17).
    -> the accepted dict, to be loaded; its k (0: weights); the scores of weights and of every try
    """
    accepted, accepted_k = weights, 0
    scores = [validate(weights)]
    for k in range(1, max_tries + 1):
        tried = {name: w + 2 * k * (w - anchor[name].to(w)) for name, w in weights.items()}
        scores.append(validate(tried))
        if not scores[-1] > scores[-2]:
            break
        accepted, accepted_k = tried, k
    return accepted, accepted_k, scores


def movable_weights(model):
    """The weights that EffOPD extrapolates, attention and MLP -> dict of CPU copies        [EffOPD]

    Chosen by parts of their names, as in the released code. In Llama and Qwen3 these are
    self_attn.* (with Qwen3's q_norm, k_norm), mlp.* and post_attention_layernorm, but not
    embed_tokens, input_layernorm, the last norm or lm_head; in GPT-2 attn.* and mlp.*, but not
    wte, wpe, ln_1, ln_2, ln_f or lm_head.
    """
    parts = r"attn|attention|[qkvo]_proj|mlp|feed_forward|ffn|gate_proj|up_proj|down_proj"
    movable = {name: w for name, w in model.named_parameters() if re.search(parts, name)}
    # Not on a GPU, which may be full
    return {name: w.detach().to("cpu", copy=True) for name, w in movable.items()}


# --------------------------------------------------------------------------------------------------
# 5. Sampling and scoring


def mask_through_eos(ids, eos_ids):
    """(B, T) ids -> (B, T) bool, True through the first EOS: else no model would learn to stop"""
    is_eos = torch.isin(ids, torch.tensor(sorted(eos_ids), dtype=ids.dtype, device=ids.device))
    return is_eos.cumsum(-1) - is_eos.long() == 0  # no EOS before


def merge_stops(logits, stop_ids, stop_id):
    """Merge all tokens that end a response into the class stop_id. (..., V) -> new (..., V)   [EOS]

        z'(stop_id) = log sum_E exp z(v),   z' = -1e30 at the others of E = stop_ids,   else z

    If a base student ends with one token and a chat teacher with another, the student's end is
    unlikely to the teacher, and the student unlearns to stop. Merged before any softmax, top k and
    draw, stopping is one action to both. Not -inf: a KL without a clamp would be NaN there.
    """
    least = max(torch.finfo(logits.dtype).min, -1e30)
    ids = sorted({*stop_ids, stop_id})  # E
    together = logits[..., ids].clamp(min=least).logsumexp(-1)
    merged = logits.clone()
    merged[..., ids] = least
    merged[..., stop_id] = together
    return merged


@torch.no_grad()
def generate(
    model,
    input_ids,
    attention_mask,
    cache=None,
    *,
    max_new_tokens,
    vocab_size,
    eos_ids,
    stop_id=None,
    pad_id=0,
    temperature=1.0,
    top_p=1.0,
    record_k=0,
):
    """Sample up to max_new_tokens per row; at top_p 1, from the distribution that the losses score.

    input_ids, attention_mask: (B, L), left-padded. cache: columns 0 to L - 2, as the last call left
    it, or None for a new one; it grows in place, and transformers computes only what it lacks.
    temperature 0 is greedy. stop_id: the one id that stands for all eos_ids (needs merge_stops), or
    None: no id does. pad_id: fills rows that have ended, any id with an embedding.
    eos_ids: a set. Sampling stops early once all rows have ended. The model must be in eval mode.
    -> new ids (B, n); the record_k likeliest tokens at each, best first (B, n, K), or None; the
       log-prob (B,) of each row's last new token, before top_p, meaningless if it ended before
    """
    topk_of, last_two = [], []

    def as_scored(_, logits):  # (B, V or more), float32
        logits = logits[:, :vocab_size] / (temperature or 1)  # the head may have more rows
        if stop_id is not None:
            logits = merge_stops(logits, eos_ids, stop_id)
        last_two[:] = [*last_two[-1:], logits]  # two: on mps the last may be taken back
        topk_of.append(logits.topk(record_k).indices)  # (B, K)
        return logits

    draw = {"do_sample": False}
    if temperature:
        draw = {"do_sample": True, "top_p": top_p, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=sorted(eos_ids), pad_token_id=pad_id, **draw
    )
    # What this config leaves open would come from the one shipped with the model: a repetition
    # penalty there would sample from another distribution than the losses score
    shipped, model.generation_config = model.generation_config, GenerationConfig()
    try:
        ids = model.generate(
            input_ids,
            attention_mask=attention_mask.long(),
            past_key_values=DynamicCache(config=model.config) if cache is None else cache,
            generation_config=config,
            logits_processor=[as_scored],
        )
    finally:
        model.generation_config = shipped

    new_ids = ids[:, input_ids.shape[1] :]  # (B, n)
    # On mps transformers notices one step late that all rows have ended, and drops that step
    taken_back = len(topk_of) - new_ids.shape[1]
    last_logits = last_two[-1 - taken_back]
    # The pad_id of a row that ended may lie outside of the vocabulary
    last_ids = new_ids[:, -1:].clamp(max=vocab_size - 1)
    log_probs = F.log_softmax(last_logits, dim=-1).gather(-1, last_ids)
    topk = torch.stack(topk_of, dim=1)[:, : new_ids.shape[1]] if record_k else None
    return new_ids, topk, log_probs[:, 0]


def hidden_states(model, ids, mask, num_last, cache=None):
    """The final hidden states that predict the last num_last columns. ids, mask (B, L) -> (B, n, H)
    With a cache, the columns it holds are not recomputed, and it grows to L - 1 columns.
    """
    # The shift by one, for scoring and for training: the state at t - 1 predicts column t
    start, end = 0, ids.shape[1] - 1
    width = end  # columns per pass; without a cache there is one pass
    if cache is not None:
        # Passes of at most 32,768 tokens: one layer's activations for more would fill a GPU
        start, width = cache.get_seq_length(), max(1, 2**15 // len(ids))
    # Padding takes no position: rotary models only see differences, but GPT-2's are absolute
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)  # (B, L)
    states = []
    for first in range(start, end, width):
        last = min(first + width, end)
        output = model.base_model(
            input_ids=ids[:, first:last],
            attention_mask=mask[:, :last].long(),
            position_ids=positions[:, first:last],
            past_key_values=cache,
            use_cache=cache is not None,
        )
        states.append(output.last_hidden_state)
    return torch.cat(states, dim=1)[:, -num_last:]


def head_logits(model, hidden, vocab_size, temperature=1.0, eos_ids=(), stop_id=None):
    """Hidden states (..., H) -> logits (..., vocab_size), in float32 or better.

    Divided by the temperature (0 counts as 1). Rows of the head that are not tokens are cut off
    before any softmax; with a stop_id, all eos_ids are merged (needs merge_stops). Refused at
    set-up: models with more after the last hidden state (Gemma 2's softcap, Cohere's logit scale).
    """
    # Call the module instead of multiplying by its weight, so that adapters on it count
    logits = model.get_output_embeddings()(hidden)[..., :vocab_size]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / (temperature or 1)
    return logits if stop_id is None else merge_stops(logits, eos_ids, stop_id)


# --------------------------------------------------------------------------------------------------
# 6. Rollout: write (sample), judge (score), choose which rows go on, leave (drop the others)


def judge(teacher, cache, ids, mask, student_topk, vocab_size, **head):
    """Score the last n columns of ids, mask (b, L) with the teacher, which computes what its cache
    lacks, up to column L - 2 -> its hidden states (b, n, H'); the overlap (b, n) of student_topk
    (b, n, K) with its own top k, 0 off the mask. head: settings of head_logits. Needs that,
    hidden_states, overlap_ratio, tokens_at_once.
    """
    num_new, k = student_topk.shape[1:]
    hidden = hidden_states(teacher, ids, mask, num_new, cache)
    states, student_topk = hidden.flatten(0, 1), student_topk.flatten(0, 1)
    overlap = torch.zeros(len(states), device=ids.device)
    # Skip the padding after ended rows: it may be more than the sampled tokens
    sampled = mask[:, -num_new:].flatten().nonzero().squeeze(-1)
    for part in sampled.split(tokens_at_once(vocab_size)):  # never all (b, n, V) logits at once
        teacher_topk = head_logits(teacher, states[part], vocab_size, **head).topk(k).indices
        overlap[part] = overlap_ratio(student_topk[part], teacher_topk)
    return hidden, overlap.view(-1, num_new)


@torch.no_grad()
def rollout(
    student, teacher, prompts, plan, for_teacher=None, *, eos_ids, pad_id=0, overlap_k=16, **options
):
    """Sample responses to B prompts (lists of ids) by a Plan; no model reads a row's column twice.

    teacher: None to sample without scoring. for_teacher: the teacher's prompts, if they differ
    [OPSD]. options: vocab_size (must), stop_id, temperature, top_p of generate. Both models in eval
    mode. Needs sections 1, 2, 3, 5, 6, 10. -> dict, T the longest response:
        prompt_ids, prompt_mask, teacher_prompt_ids, teacher_prompt_mask   (B, S)
        response_ids, response_mask, overlap   (B, T), off the mask pad_id, False, 0
        log_probs   (B, T), before top_p, at tokens in the last column of a segment; NaN elsewhere
        ended, kept   (B,) bool: has an EOS; goes_on was True until then, or up to the cap
        teacher_hidden   list of B tensors (length, H'), or of Nones;   teacher_seconds
    """
    device = student.device
    out = empty_rollout(prompts, for_teacher or prompts, plan.max_length, pad_id, device)
    student_cache = prefill(student, out["prompt_ids"], out["prompt_mask"])
    if teacher:
        began = clock(device)
        teacher_cache = prefill(teacher, out["teacher_prompt_ids"], out["teacher_prompt_mask"])
        out["teacher_seconds"] += clock(device) - began
    running = torch.arange(len(prompts), device=device)  # the rows in the caches, in their order
    record_k = overlap_k if teacher else 0
    settings = {"eos_ids": eos_ids, "pad_id": pad_id, "record_k": record_k, **options}
    head = {"eos_ids": eos_ids, **options}
    head.pop("top_p", None)  # it applies to sampling, not to scoring

    # Between segments each cache holds all columns but the last, whose token no model has read yet
    length = 0  # of the responses so far
    for border in plan.borders():
        # Write: the student samples up to the border
        ids, mask = tokens_so_far(out, "prompt", running, length)
        new_ids, new_topk, log_probs = generate(
            student, ids, mask, student_cache, max_new_tokens=border - length, **settings
        )
        new_mask = mask_through_eos(new_ids, eos_ids)
        is_eos = torch.isin(new_ids, torch.tensor(sorted(eos_ids), device=device))
        new = slice(length, length + new_ids.shape[1])
        length = new.stop
        out["response_ids"][running, new] = new_ids.where(new_mask, pad_id)
        out["response_mask"][running, new] = new_mask
        out["log_probs"][running, length - 1] = log_probs.where(new_mask[:, -1], torch.nan)
        out["ended"][running] = is_eos.any(-1)

        # Judge: the teacher scores new tokens. Keep its states: logits are V / H' times as large
        if teacher:
            began = clock(device)
            ids, mask = tokens_so_far(out, "teacher_prompt", running, length)
            hidden, overlap = judge(teacher, teacher_cache, ids, mask, new_topk, **head)
            out["overlap"][running, new] = overlap
            for row, states, valid in zip(running.tolist(), hidden, new_mask):
                out["teacher_hidden"][row].append(states[valid])  # a copy: hidden can be freed
            out["teacher_seconds"] += clock(device) - began

        # Choose: the method picks the rows that go on; ended rows are complete
        if plan.goes_on:
            so_far = [out[name][:, :length] for name in ("overlap", "response_mask")]
            chosen = plan.goes_on(length, *so_far, out["ended"])
            out["kept"] &= chosen | out["ended"]

        # Leave: rows that have ended or were not chosen are dropped from both caches
        stays = (out["kept"] & ~out["ended"])[running].nonzero().squeeze(-1)
        if border == plan.max_length or not len(stays):
            break
        if len(stays) < len(running):
            running = running[stays]
            student_cache.batch_select_indices(stays)
            if teacher:
                teacher_cache.batch_select_indices(stays)
    return trim_rollout(out, length)


# --------------------------------------------------------------------------------------------------
# 7. Update


def backward_in_chunks(
    hidden,
    teacher_hidden,
    response_ids,
    log_probs,
    token_weight,
    *,
    student_head,
    teacher_head,
    token_loss,
    chunk_tokens,
    measure=None,
):
    """Heads, loss and backward, chunk_tokens at a time (see tokens_at_once): never all logits.

    hidden (N, H), teacher_hidden (N, H'); response_ids, log_probs (as sampled) and token_weight
    (divided by the step's number of tokens): (N,), N > 0; heads: hidden -> logits; token_loss: both
    logits (n, V), ids (n,) -> (n,); measure: the same and log_probs -> dict of (n,)
    -> the gradient with respect to hidden (N, H), the weighted sum of losses, a list of measures
    """
    gradients, measured = [], []
    total = 0.0
    per_token = (hidden.detach(), teacher_hidden, response_ids, log_probs, token_weight)
    for chunk in zip(*(values.split(chunk_tokens) for values in per_token)):
        states, teacher_states, ids, sampled_log_probs, weight = chunk
        states.requires_grad_()
        student_logits = student_head(states)  # (n, V)
        teacher_logits = teacher_head(teacher_states).detach()
        loss = (token_loss(student_logits, teacher_logits, ids) * weight).sum()
        # Backward per chunk frees its logits: kept, they would fill (B, T, V) several times
        loss.backward()
        gradients.append(states.grad)
        total = total + loss.detach()  # not .item(), which would sync a GPU at every chunk
        if measure:
            student_logits = student_logits.detach()
            measured.append(measure(student_logits, teacher_logits, ids, sampled_log_probs))
    return torch.cat(gradients), total, measured


def backward(student, batch, *, micro_batch_size, autocast=None, **chunk):
    """Compute the gradients of a step's loss, in .grad, which is cleared first; no weight changes.

        (sum of token_weight * loss over the tokens in loss_mask) / their number,

    both over all processes. batch: a rollout with token_weight (B, T) and loss_mask (B, T) bool,
    which may have holes; only tokens in response_mask count. micro_batch_size: rows of the longest
    length per pass, more of shorter ones; the gradient is the same. chunk: for backward_in_chunks.
    -> dict: loss, num_tokens, the means of what measure returns; {} if no token is to be trained.
    FloatingPointError if the loss is not finite. Needs backward_in_chunks, hidden_states,
    learned_rows, concatenate, gather, sum_gradients.
    """
    rows = learned_rows(batch)
    # Over the whole step: a mean per micro-batch or process would give the tokens in batches of
    # short rows more weight than others
    num_tokens = sum(gather([int(learned.sum()) for _, learned, _ in rows]))
    student.zero_grad()
    if not num_tokens:
        return {}
    for module in student.modules():
        # transformers recomputes layers only in training mode; Dropout modules stay in eval mode
        module.training = getattr(module, "gradient_checkpointing", False)

    loss, measured = 0.0, []
    most_tokens = micro_batch_size * len(rows[0][0]) if rows else 0  # padding included
    while rows:
        # The longest of the rows left, as many as most_tokens allows, right-padded
        count = most_tokens // len(rows[0][0])
        micro_batch, rows = rows[:count], rows[count:]
        ids = pad_sequence([row[0] for row in micro_batch], batch_first=True)  # (b, L)
        # All True: no real token attends to the padding, and a mask would bar flash attention
        mask = torch.ones_like(ids, dtype=torch.bool)
        learned = pad_sequence([row[1] for row in micro_batch], batch_first=True)
        values = concatenate([row[2] for row in micro_batch])  # each (N, ...)
        values["token_weight"] = values["token_weight"] / num_tokens
        with autocast or contextlib.nullcontext():
            hidden = hidden_states(student, ids, mask, ids.shape[1] - 1)[learned[:, 1:]]  # (N, H)
            gradient, total, measures = backward_in_chunks(hidden, **values, **chunk)
        hidden.backward(gradient)
        loss = loss + total
        measured += measures
    student.eval()
    sum_gradients(student)  # a sum, not a mean: num_tokens counts all processes

    loss = sum(gather([float(loss)]))
    if not math.isfinite(loss):
        raise FloatingPointError(f"loss {loss}")
    # NaN where a measure has no value: no overlap, or a token whose log-prob was not recorded
    own = {name: value.cpu() for name, value in concatenate(measured).items()}
    means = {name: value.nanmean().item() for name, value in concatenate(gather([own])).items()}
    return {"loss": loss, "num_tokens": num_tokens, **means}


def optimizer_step(student, optimizer, learning_rate, max_grad_norm=1.0):
    """Clip and apply gradients -> their norm before clipping. FloatingPointError if not finite"""
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), max_grad_norm).item()
    if not math.isfinite(norm):
        raise FloatingPointError(f"gradient norm {norm}")
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    return norm


# --------------------------------------------------------------------------------------------------
# 8. The loop. The only section of part I that sees both the flags (config) and a run's state


def plan_rollout(config, step, cap):
    """The Plan of step 1, 2, ...: how long rollouts may get, and which rows go on. cap: that of
    Prune-OPD, in tokens. Methods differ here, in token_weights, and in next_cap.
    """
    plan = Plan(config.max_new_tokens, config.segment_length)
    if config.method == "prefix":
        plan.max_length = min(config.prefix, config.max_new_tokens)

    elif config.method == "progressive":
        plan.max_length = horizon(
            step - 1,  # the updates made so far
            config.horizon_start,
            config.horizon_growth,
            config.horizon_every,
            config.max_new_tokens,
        )

    elif config.method == "prefix-guided":
        plan.look_at = config.prefix
        plan.goes_on = functools.partial(
            best_prefixes,
            at=config.prefix,
            num_generations=config.num_generations,
            keep_ratio=config.keep_ratio,
            probe_window=config.probe_window,
            by_chance=config.select == "random",
        )

    elif config.method == "prune":
        plan.max_length = min(cap, config.max_new_tokens)
        # The abstract stops drifting rows in flight; the released code does not, it moves the cap
        if not config.no_prune_in_flight:
            plan.goes_on = functools.partial(
                reliable_rows, threshold=config.drift_threshold, w_drop=config.w_drop
            )
    return plan


def token_weights(config, out):
    """Loss weights, and which tokens to train on -> token_weight (B, T), loss_mask (B, T) bool"""
    weight = torch.ones_like(out["overlap"])
    loss_mask = out["response_mask"]
    if config.method == "prune":
        # As released: divided by the number of tokens, not the sum of weights. Stopped rows count
        reliability = drift_weights(
            out["overlap"], out["response_mask"], config.drift_threshold, config.w_drop
        )
        weight = reliability + config.w_base
    if config.method == "prefix-guided" and not config.train_pruned_prefix:
        # The paper does not say whether to train on the losers' prefixes: here not (our choice)
        loss_mask = loss_mask & out["kept"][:, None]
    return weight, loss_mask


def next_cap(config, run, reliable):
    """Prune-OPD's next cap and its misses, with the constants of the flags"""
    high = min(config.cap_max, config.max_new_tokens)
    return next_max_length(
        reliable,
        run.cap,
        run.misses,
        step=config.cap_step,
        margin=config.cap_margin,
        hit_ratio=config.cap_hit_ratio,
        patience=config.cap_patience,
        low=min(config.cap_min, high),
        high=high,
    )


def train(config, run):
    """Every method, step by step: sample, score, update, and sample from the updated student."""
    if run.untried:  # after a resume: a signal had cut these tries short
        extrapolate_student(config, run)
    evaluate_and_save(config, run)
    for step in range(run.step + 1, config.max_steps + 1):
        run.phase = f"the rollout of step {step}"
        problems = draw_prompts(config, run, config.cold_start_steps + step)
        plan = plan_rollout(config, step, run.cap)
        settings = rollout_settings(config, run, problems)
        out = rollout_in_groups(run.sampler, run.teacher, plan=plan, **settings)

        run.phase = f"the update of step {step}"
        began = clock(run.device)
        out["token_weight"], out["loss_mask"] = token_weights(config, out)
        update = {"loss": math.nan, "reverse_kl": math.nan}  # if no token is to be trained
        update |= backward(run.student, out, **update_settings(config, run))
        update["learning_rate"] = config.learning_rate * min(1, step / max(1, config.warmup_steps))

        # This part of the step is done whole or not at all: signals wait
        with whole_step(run):
            rate, clip = update["learning_rate"], config.max_grad_norm
            update["grad_norm"] = optimizer_step(run.student, run.optimizer, rate, clip)
            run.optimizer.zero_grad()  # the next rollout's caches need the gradients' memory
            # On-policy: sample next from the updated weights (in float32 they are the same model)
            run.sampler.load_state_dict(run.student.state_dict())
            update["time_update"] = clock(run.device) - began

            rows = row_facts(config, out)
            if config.method == "prune":
                run.cap, run.misses = next_cap(config, run, rows["reliable_length"])
            metrics = step_metrics(run, out, rows, {**update, "max_length": plan.max_length})
            run.shown = first_rows(config, problems, plan, out)
            del out  # frees the teacher's states
            run.step = step
            if config.extrapolate and step.bit_count() == 1:  # 1, 2, 4, 8, ...
                run.untried = metrics
            else:
                run.record(metrics)
        if run.untried:  # the tries take long, so signals do not wait for them
            metrics = extrapolate_student(config, run)
        say(STEP_LINE.format(step=step, **metrics))
        evaluate_and_save(config, run)


# --------------------------------------------------------------------------------------------------
# 9. Evaluation

THOUGHTS = r"(?s)\A(.*</think>)?(.*<think>.*)?"  # through the last </think>; all, if one is open


def last_boxed(text):
    r"""The content of the last balanced \boxed{...} in a text, or None. A box that never closes
    does not count; the one before it does. \boxed 4 is a box, too.
    Example: r"\boxed{1} no, \boxed{\frac{1}{2}}" -> r"\frac{1}{2}"
    """
    text = re.sub(r"\\boxed\s*(-?[\d.,/]*\d|\\[a-z][^\s$]*|\w(?=\$))", r"\\boxed{\1}", text)
    for rest in reversed(re.split(r"\\boxed\s*\{", text)[1:]):
        depth = 1
        for brace in re.finditer(r"\\.|[{}]", rest):  # \{ is a brace of a set, not of the box
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                return rest[: brace.start()]
    return None


def is_correct(response_text, gold):
    r"""Whether the last \boxed{...} after any </think> equals the gold answer. No box: False. If
    the prompt ends with <think>, the text must begin with it. Needs THOUGHTS, last_boxed, and for
    is_same, of section 12, NO_ANSWER, read_gold and all from BEFORE_NFKC to ask_math_verify.
    """
    rest = re.sub(THOUGHTS, "", response_text)
    answer = last_boxed(rest)
    return answer is not None and is_same(answer, str(gold), rest)


def pass_at_k(num_samples, num_correct, k):
    """Unbiased estimate of the chance that at least one of k answers is right, from n >= k answers.

        1 - C(n - c, k) / C(n, k),   n num_samples, c num_correct          [Chen et al., 2107.03374]

    Example: n 4, c 1, k 2 -> .5. ValueError unless 1 <= k <= n and 0 <= c <= n.
    """
    if not 1 <= k <= num_samples or not 0 <= num_correct <= num_samples:
        raise ValueError("needs 1 <= k <= n and 0 <= c <= n")
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def auroc(scores, correct):
    """The chance that a right answer scores higher than a wrong one, ties counting half. Lists ->
    [0, 1], or NaN if one kind or a score is missing. Example: .9, .4 right, .4, .1 wrong -> .875
    """
    scores, correct = np.array(scores, dtype=float), np.array(correct, dtype=bool)
    if correct.all() or not correct.any() or np.isnan(scores).any():
        return math.nan
    wrong = np.sort(scores[~correct])
    # For each right answer the wrong ones below it, and those not above it: a tie is in one of them
    below, up_to = (np.searchsorted(wrong, scores[correct], side) for side in ("left", "right"))
    return float((below + up_to).mean() / 2 / len(wrong))


def evaluate(
    model,
    tokenizer,
    problems,
    *,
    max_length,
    num_samples=1,
    seed=0,
    rows_per_batch=32,
    segment_length=0,
    teacher=None,
    title="",
    **sampling,
):
    """Sample and grade num_samples answers to every problem, after seeding torch's global RNG.

    problems: dicts with prompt_ids, answer, and optionally teacher_prompt_ids, begun (the first ids
    of the answer). max_length: tokens. sampling: vocab_size, eos_ids, stop_id, temperature, top_p
    of rollout. reward: an answer's mean of log q - log p at temperature 1; NaN without a teacher.
    -> (metrics, answers). avg_at_n: the mean of the problems' shares of right answers; se: their
       std / sqrt(num_problems), see summarise. Needs what rollout and is_correct do, 11, 12, 17
    """
    # The answers to sample, and this process's share of them
    answers = []
    for index, problem in enumerate(problems):
        answers += [{**problem, "index": index, "sample": sample} for sample in range(num_samples)]
    # Sorted by prompt length: batches have little padding, and equal prompts stay together
    own = share(sorted(answers, key=prompt_length))
    seed_sampling(seed)  # not restored: every training step seeds anew
    starts = range(0, len(own), rows_per_batch)
    head = {name: sampling.get(name) for name in ("vocab_size", "eos_ids", "stop_id")}
    # A bar only on rank 0, and at a terminal (None)
    for start in tqdm(starts, title, leave=False, disable=None if is_main() else True):
        # Sample, and let the teacher score the samples
        batch = own[start : start + rows_per_batch]
        prompts = [answer["prompt_ids"] + answer.get("begun", []) for answer in batch]
        asked = [teacher_prompt(answer) + answer.get("begun", []) for answer in batch]
        out = rollout(model, None, prompts, Plan(max_length, segment_length), asked, **sampling)
        rewards = [math.nan] * len(batch)
        if teacher:
            log_q = response_log_probs(teacher, out, name="teacher_prompt", **head)
            log_p = response_log_probs(model, out, **head)
            rewards = [(theirs - ours).mean().item() for theirs, ours in zip(log_q, log_p)]

        # Grade the text
        for row, answer in enumerate(batch):
            ids = out["response_ids"][row][out["response_mask"][row]].tolist()
            ids = answer.get("begun", []) + ids
            text = graded_text(tokenizer, ids)
            graded = re.sub(THOUGHTS, "", prompt_end(tokenizer, answer) + text)
            answer |= {
                "response": text,
                "response_ids": ids,
                "correct": is_correct(graded, answer["answer"]),
                "no_box": last_boxed(graded) is None,
                "truncated": not out["ended"][row].item(),
                "length": len(ids),
                "repetition": repetition(ids),
                "reward": rewards[row],
            }

    answers = sorted(gather(own), key=operator.itemgetter("index", "sample"))
    metrics = summarise(answers, num_samples)
    metrics |= {"max_new_tokens": max_length, "seed": seed, "rows_per_batch": rows_per_batch}
    metrics |= {name: sampling.get(name, 1.0) for name in ("temperature", "top_p")}
    return metrics, answers


# --------------------------------------------------------------------------------------------------
# Everything below is plumbing
#
# Part II. 10. What rollout, update and evaluation call

LOGITS_AT_ONCE = 25_000_000  # 100 MB in float32


def tokens_at_once(vocab_size):
    """The number of tokens whose logits may exist at once: 164 at V = 151,936, 362,318 at V = 69"""
    return max(1, LOGITS_AT_ONCE // vocab_size)


def pad_left(prompts, pad_id, device="cpu"):
    """Lists of ids -> ids (B, S), mask (B, S) bool. All responses then start in the same column."""
    ids = [torch.tensor(prompt) for prompt in prompts]
    # From the lengths, not ids != pad_id: if pad and EOS share an id, that would mask real tokens
    mask = [torch.ones_like(row, dtype=torch.bool) for row in ids]
    left = functools.partial(pad_sequence, batch_first=True, padding_side="left")
    return left(ids, padding_value=pad_id).to(device), left(mask).to(device)


def prefill(model, ids, mask):
    """Prefill prompts, left-padded ids, mask (B, S) -> a cache of B rows, of all columns but the
    last; equal prompts run once.
    """
    # Padding becomes -1, so that it differs from tokens: two prompts may be equal but for it
    prompts, place = ids.where(mask, -1).unique(dim=0, return_inverse=True)
    cache = DynamicCache(config=model.config)
    if ids.shape[1] > 1:
        hidden_states(model, prompts.clamp(min=0), prompts >= 0, 1, cache)
        cache.batch_select_indices(place)
    return cache


def clock(device):
    """The time in seconds, once a CUDA device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def empty_rollout(prompts, for_teacher, max_length, pad_id, device):
    """An empty rollout of B prompts, with room up to max_length; all that is blank is masked out"""
    B = len(prompts)
    tokens = functools.partial(torch.full, (B, max_length), device=device)
    rows = functools.partial(torch.full, (B,), device=device)
    out = {  # a tensor's dtype is that of the number it is filled with
        "response_ids": tokens(pad_id),
        "response_mask": tokens(False),
        "overlap": tokens(0.0),
        "log_probs": tokens(torch.nan),
        "ended": rows(False),
        "kept": rows(True),
        "teacher_hidden": [[] for _ in range(B)],
        "teacher_seconds": 0.0,
    }
    out = with_prompts(out, prompts, "prompt", pad_id)
    return with_prompts(out, for_teacher, "teacher_prompt", pad_id)


def with_prompts(out, prompts, name="prompt", pad_id=0):
    """Put prompts, lists of ids, in front of a rollout's responses, under this name -> new dict"""
    ids, mask = pad_left(prompts, pad_id, out["ended"].device)
    return {**out, f"{name}_ids": ids, f"{name}_mask": mask}


def tokens_so_far(out, name, rows, length):
    """The prompts of some rows of a rollout, and their responses up to a length -> ids, mask (b, L)

    name: of the prompts to read, prompt (the student's) or teacher_prompt.
    """
    parts = []
    for part in ("ids", "mask"):
        response = out[f"response_{part}"][rows, :length]
        parts.append(torch.cat([out[f"{name}_{part}"][rows], response], dim=1))
    return parts


def trim_rollout(out, length):
    """Cut a finished rollout to its longest response, and join the teacher's states of each row."""
    # There was room up to the cap, but all rows may have ended earlier
    for name in ("response_ids", "response_mask", "overlap", "log_probs"):
        out[name] = out[name][:, :length]
    for row, pieces in enumerate(out["teacher_hidden"]):  # in place: never all of them twice
        out["teacher_hidden"][row] = torch.cat(pieces) if pieces else None
    return out


def rollout_in_groups(student, teacher, prompts, plan, rows_at_once, for_teacher=None, **settings):
    """rollout, rows_at_once rows at a time, a multiple of G -> its dict, and seconds. Prompts are
    padded to the longest of their group, so sort them by length; the rows that are returned, to the
    longest of all. The plan's rule sees one group at a time.
    """
    began = clock(student.device)
    groups, teacher_seconds = [], 0.0
    for start in range(0, len(prompts), rows_at_once):
        own = slice(start, start + rows_at_once)
        asked = (for_teacher or prompts)[own]
        groups.append(rollout(student, teacher, prompts[own], plan, asked, **settings))
        teacher_seconds += groups[-1].pop("teacher_seconds")

    # Join the groups row by row, and pad again
    out = {"teacher_seconds": teacher_seconds, "seconds": clock(student.device) - began}
    for name in groups[0]:
        rows = [row for group in groups for row in group[name]]
        if name == "teacher_hidden":
            out[name] = rows
        elif rows[0].dim() == 0:  # ended, kept
            out[name] = torch.stack(rows)
        else:
            side = "left" if "prompt" in name else "right"
            blank = math.nan if name == "log_probs" else 0
            if name.endswith("_ids"):
                blank = settings.get("pad_id", 0)
            out[name] = pad_sequence(rows, batch_first=True, padding_value=blank, padding_side=side)
    return out


@torch.no_grad()
def response_logits(model, out, vocab_size, name="prompt", **head):
    """A model's logits on the responses of a rollout, some tokens at a time -> yields logits (n, V)
    and the sampled tokens (n,); in equal chunks for both models, so that they can be zipped

    name: of the prompts to read, prompt or teacher_prompt; equal ones run once. head: for
    head_logits. Needs tokens_so_far, prefill, hidden_states, head_logits, tokens_at_once.
    """
    B, T = out["response_ids"].shape
    # Of both models' prompts, so that both have equal chunks
    longest = max(out["prompt_ids"].shape[1], out["teacher_prompt_ids"].shape[1]) + T
    size = tokens_at_once(vocab_size)  # never (B, T, V)
    for rows in torch.arange(B).split(max(1, 2**15 // longest)):
        ids, mask = tokens_so_far(out, name, rows, T)  # (b, S + T)
        valid = mask[:, -T:]
        cache = prefill(model, ids[:, :-T], mask[:, :-T])
        hidden = hidden_states(model, ids, mask, T, cache)[valid]  # (N, H)
        for states, tokens in zip(hidden.split(size), ids[:, -T:][valid].split(size)):
            yield head_logits(model, states, vocab_size, **head), tokens


def response_log_probs(model, out, vocab_size, name="prompt", **head):
    """A model's log-probs of the tokens in a rollout's responses -> B tensors (length,)

    name, head: see response_logits, which it needs.
    """
    log_probs = []
    for logits, tokens in response_logits(model, out, vocab_size, name, **head):
        log_probs.append(logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0])
    return torch.cat(log_probs).split(out["response_mask"].sum(-1).tolist())


def learned_rows(batch):
    """The rows of a rollout with any token to learn from, without padding, longest first.
    -> list of (ids (L,), learned (L,), {name: (n, ...)}): learned is True at the n tokens that have
       a loss, and the dict has the values of these tokens for backward_in_chunks
    """
    rows = []
    for row, valid in enumerate(batch["response_mask"].bool()):
        # loss_mask may have holes: attention still covers the response, whatever part is learned
        learned = batch["loss_mask"][row].bool()[valid]  # (length,)
        if not learned.any():
            continue
        states = batch["teacher_hidden"][row]
        # Mostly all are learned: then no copy
        values = {"teacher_hidden": states if learned.all() else states[learned]}
        for name in ("response_ids", "log_probs", "token_weight"):
            values[name] = batch[name][row][valid][learned]

        # Tokens after the last learned one do not affect the loss
        end = int(learned.nonzero()[-1]) + 1
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        ids = torch.cat([prompt, batch["response_ids"][row][valid][:end]])
        rows.append((ids, F.pad(learned[:end], (len(prompt), 0)), values))
    return sorted(rows, key=lambda row: len(row[0]), reverse=True)


def train_step(student, optimizer, batch, learning_rate, max_grad_norm=1.0, **settings):
    """backward, with these settings, then optimizer_step -> metrics. train calls both by itself"""
    metrics = backward(student, batch, **settings)
    if metrics:
        metrics["grad_norm"] = optimizer_step(student, optimizer, learning_rate, max_grad_norm)
    return metrics


def concatenate(parts):
    """A list of dicts of (n,) tensors -> one dict, each end to end"""
    joined = {}
    for part in parts:
        for name, value in part.items():
            joined.setdefault(name, []).append(value)
    return {name: torch.cat(values) for name, values in joined.items()}


# --------------------------------------------------------------------------------------------------
# 11. Several processes, as torchrun starts them


NUM_RANKS = int(os.environ.get("WORLD_SIZE") or 1)  # torchrun sets these
RANK = int(os.environ.get("RANK") or 0) if NUM_RANKS > 1 else 0


def is_main():
    """Whether this is rank 0, the process that writes files and prints for all."""
    return RANK == 0


def share(items):
    """This process's share of a list that every process has."""
    return items[RANK::NUM_RANKS]


def gather(items):
    """The lists of all processes, concatenated in rank order. Every process must call it."""
    if not dist.is_initialized():
        return items
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return sum(lists, [])


def sum_gradients(model):
    """All-reduce: every gradient becomes its sum over all processes, which must all call it."""
    if not dist.is_initialized():
        return
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)


def seed_sampling(seed):
    """Seed torch's global RNG, which model.generate draws from, differently in each process."""
    torch.manual_seed(seed * NUM_RANKS + RANK)


def join_processes(device):
    """Join the process group, if torchrun started more than one process."""
    if NUM_RANKS == 1 or dist.is_initialized():
        return
    backend = "gloo"
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # Lists stay on gloo, which notices when another process has died; NCCL would wait for it
        backend = "cpu:gloo,cuda:nccl"
    timeout = datetime.timedelta(hours=2)  # one rank may sample much longer than the others
    dist.init_process_group(backend, timeout=timeout)
    if RANK:
        sys.stdout = open(os.devnull, "w")  # only rank 0 prints
        warnings.simplefilter("ignore")


def peak_memory(device):
    """Peak memory of a GPU in GB since the last call; 0 without one."""
    if device.type != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_allocated(device) / 1e9
    torch.cuda.reset_peak_memory_stats(device)
    return peak


# --------------------------------------------------------------------------------------------------
# 12. Data


def read_records(path):
    """A jsonl, json or parquet file -> list of its records. OSError, or ValueError with the line"""
    with open(path, "rb") as file:
        if str(path).lower().endswith(".parquet"):
            import pyarrow.parquet  # needed only here; if it is missing, ImportError names it

            try:
                return pyarrow.parquet.read_table(file).to_pylist()
            except Exception as error:  # pyarrow has errors of its own
                raise ValueError(f"{path} is not a whole parquet file: {error}") from None
        text = file.read().removeprefix("\ufeff".encode())
    # One JSON list, or JSON lines, which many .json files hold, too
    is_list = text.lstrip().startswith(b"[")
    records = []
    for number, line in enumerate([text] if is_list else text.splitlines(), start=1):
        try:
            if line.strip():
                records.append(json.loads(line))
        except (ValueError, RecursionError) as error:  # RecursionError: nested too deep
            number += getattr(error, "lineno", 1) - 1
            why = getattr(error, "msg", error)  # its str has another line number
            told = f"{path}, line {number}: not JSON in UTF-8, one record per line or one list"
            raise ValueError(f"{told} ({why}): {line.strip()!r:.60}") from None
    return records[0] if is_list else records


# Fields that hold an answer, or in some data sets something else; texts with an answer in a box
ANSWERS = ("answer", "final_answer", "ground_truth", "expected_answer")
LABELS = ("label", "target", "gold")
WORKED = ("solution", "assistant:")
REASONED = ("rationale", "reasoning")  # only steps, no answer to grade by
# What data sets put where there is no answer
NO_ANSWER = (
    r"(?i)[-–—?.\s]*|n\.a\.|none|null|nan|-?inf|unknown"
    # these in wrappers, too: \text{proof}, (N/A), not found.
    r"|(?:\\(?:text|math)\w*|\W)*(?:"
    r"(?-i:NA)|n ?/ ?a|tbd|not[ _]?found|no[ _](?:final[ _])?answer|(?:no answer|not) provided"
    r"|(?:an? |the )?proof(?: problem)?|see (?:the )?solution(?: below)?"
    r")\W*"
)


def read_gold(value):
    """A field -> its answer: what is boxed, in dollars or after "####", else all its text; "" for
    what is no answer, such as true, a dict or "N/A"
    """
    items = value if isinstance(value, list) else [value]
    texts = [str(item) for item in items if type(item) in (str, int, float)]
    text = ", ".join(texts).rsplit("####", 1)[-1]
    boxed = last_boxed(text)
    text = re.sub(r"(?<!\\)\$", "", text if boxed is None else boxed).strip()
    return "" if re.fullmatch(NO_ANSWER, text) else text


def first_of(values):
    """The first value that is not empty, else None"""
    return next(filter(None, values), None)


def read_fields(record):
    """A record of any data set -> problem, answer and worked solution, each None if it is missing;
    what was said before the problem and is left out
    """
    fields = {name.lower(): value for name, value in record.items()}  # some have Problem, Answer
    left_out = []
    if isinstance(fields.get("reward_model"), dict):
        fields = fields["reward_model"] | fields
    # In a chat the last user turn is the problem, and what follows it is an answer
    lists = {name: value for name, value in fields.items() if isinstance(value, list)}
    chat = first_of(map(lists.get, ("prompt", "messages", "conversations"))) or []
    chat = chat + lists.get("completion", [])
    turns = [read_turn(turn) for turn in chat if isinstance(turn, dict)]
    if turns:
        last = max((at for at, (role, _) in enumerate(turns) if role == "user"), default=0)
        fields |= {f"{role}:": text for role, text in turns[last:]}
        left_out = [text for _, text in turns[:last]]
    if fields.get("problem") or fields.get("question"):
        left_out = []  # the problem is not taken from the chat

    def values(names):
        return [fields[name] for name in names if fields.get(name) is not None]

    left_out += filter(None, values(("system", "system_prompt", "history")))
    # Labels come last, as some are no answers. With an answer field or a label, even one that says
    # "no answer", a solution counts only if it has a box or "####"
    given, labels, worked = map(values, (ANSWERS, LABELS, WORKED))
    boxed = [text for text in worked if re.search(r"\\boxed|####", str(text))]
    golds = (given + boxed + labels) or worked
    # GSM8K has its solutions in the answer field, before "####"
    gsm8k = [text for text in given if "####" in str(text)]
    solutions = worked + values(REASONED) + gsm8k
    problem = first_of(values(("problem", "question", "user:", "prompt")))
    answer = first_of(map(read_gold, golds))
    return problem, answer, first_of(map(read_solution, solutions)), left_out


def read_turn(turn):
    """A turn of a chat -> its role and its text. Some say human and gpt, and value for content"""
    role = str(turn.get("role") or turn.get("from"))
    role = {"human": "user", "gpt": "assistant"}.get(role, role)
    return role, turn.get("content") or turn.get("value")


def read_solution(value):
    """A field -> the text of a worked solution, "" if it holds none. GSM8K's <<1+1=2>> and "####"
    line are removed.
    """
    if isinstance(value, list):
        value = "\n".join([item for item in value if isinstance(item, str)])
    text = value.strip() if isinstance(value, str) else ""
    before, newline, last = re.sub(r"<<[^<>\n]*>>", "", text).rpartition("\n")
    return (before + newline + last.partition("####")[0]).strip()


# Instructions that data sets add to a problem. They conflict with the prompt template, and with
# grading by boxes. No .* in here: on a text of a million characters it would take hours
INSTRUCTIONS = (
    r"Solve the following math problem step by step\. The last line of .{0,200}? to the problem\."
    r'|Remember to put your answer on its own line after "Answer:"\.'
    r"|(?:Please|Let's) (?:reason|think) step by step,? and .{0,99}?(?:\\boxed\{\}|\"####\")\."
    r"|Present the answer in LaTex format: \\boxed\{Your answer\}"
)
# Other requests for an answer format; lone surrogates, half characters that UTF-8 cannot encode
FORMAT = (
    r"(?i)\\f?box|###|answer:|</?(ans(wer)?|think)>|step[ -]by[ -]step|double square brackets"
    r"|\[\[(your |final )?answer|(as|return) json|only (a|the) letter|[\"'*`]the (final )?answer is"
    r"|double brackets|\bbox (your|the) (final )?answer|<final>|最终答案"
)
LONE_SURROGATE = "[\ud800-\udfff]"


def load_problems(path, needs_answers=False):
    """A jsonl, json or parquet file -> list of {"problem": str, "answer" and "solution": str or
    None}, duplicates merged. Knows the usual field names, chats, and gold answers in a box, in
    dollars or after "####". OSError, ValueError or ImportError, each with a message for the user.
    """
    problems = {}  # by text
    notes = collections.defaultdict(list)
    for number, record in enumerate(read_records(path), start=1):
        record = record if isinstance(record, dict) else {}
        problem, answer, solution, left_out = read_fields(record)

        # Refuse what cannot be used
        wrong = ""
        if not isinstance(problem, str) or not problem.strip():
            wrong = "needs a text in problem, question, prompt or a turn of the role user"
        elif re.search(LONE_SURROGATE, f"{problem}{answer}{solution}"):
            wrong = "has half a character, a lone surrogate"
        elif needs_answers and not answer:
            wrong = f"evaluation needs an answer, in {', '.join(ANSWERS + LABELS)} or solution"
        if wrong:
            fields = ", ".join(f"{name} {value!r:.20}" for name, value in record.items())
            raise ValueError(f"{path}, record {number}: {wrong}; its fields are {fields or 'none'}")

        # Note what the user should know of the rest
        problem = re.sub(INSTRUCTIONS, "", problem).strip() or problem
        form = re.search(FORMAT, problem)
        if form:
            what = "problems ask for a form of the answer, and boxes alone are graded"
            notes[what].append(problem[max(0, form.start() - 60) :])
        if {"choices", "options"} & {name.lower() for name in record if record[name]}:
            notes["records have choices, which no model is shown"].append(problem)
        if left_out:
            notes["records lose what stands before their question"].append(left_out[0])
        if not answer and len(record) > 1:
            notes["records have no answer"].append(f"one with the fields {', '.join(record)}")
        if problem in problems:
            other = answer and problems[problem]["answer"] not in (None, answer)
            what = "duplicates with another answer" if other else "duplicates"
            notes[f"{what} are left out"].append(problem)
        kept = problems.setdefault(problem, {"problem": problem, "answer": None, "solution": None})
        kept["answer"] = kept["answer"] or answer
        kept["solution"] = kept["solution"] or solution
    if not problems:
        raise ValueError(f"{path}: the file is empty; it needs one problem per line")
    for what, examples in notes.items():
        note(f"{path}: {len(examples)} {what}, such as {examples[0]!r:.120}")
    return list(problems.values())


FIELDS = ("problem", "answer", "solution")  # of load_problems, and of a template


def fill_template(template, problem):
    """Fill {problem}, {answer} and {solution} in a template from a problem, a dict -> text, or None
    if the problem lacks one of them. Braces in the inserted texts are not filled in turn.
    """
    # Not those of a LaTeX command: \boxed{answer} stays as it is. \n is none, typed in a shell
    names = rf"(\\(?!n)[a-zA-Z]{{2,}})?\{{({'|'.join(FIELDS)})\}}"
    if None in [problem[name] for command, name in re.findall(names, template) if not command]:
        return None
    return re.sub(names, lambda found: found[0] if found[1] else problem[found[2]], template)


def encode_prompt(tokenizer, problem, template, chat_template=True, **template_flags):
    """A problem (str) -> list of ids: the template filled in, inside the chat template if any"""
    text = template.replace("{problem}", problem)
    if chat_template and tokenizer.chat_template:
        turns = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_dict=False, **template_flags
        )
        if ids[-1:] == [tokenizer.eos_token_id]:
            note("the chat template ends prompts in the EOS")
        return ids

    # A BOS at the start is wanted. An EOS at the end is not: the response continues from here
    encoded = tokenizer(text + "\n", return_special_tokens_mask=True)
    while encoded.special_tokens_mask.pop():
        last = tokenizer.decode(encoded.input_ids.pop())
        note(f"{last!r} after prompts is left out")
    return encoded.input_ids


def prompt_length(problem):
    return len(problem["prompt_ids"])


def teacher_prompt(problem):
    """The prompt ids of the teacher: its own if there are any, else the student's"""
    return problem.get("teacher_prompt_ids", problem["prompt_ids"])


def graded_text(tokenizer, ids):
    """Ids (a list or a tensor) -> text without special tokens, but for the tags of thoughts"""
    tags, added = ("<think>", "</think>"), tokenizer.added_tokens_decoder
    hidden = {key for key, token in added.items() if token.special and token.content not in tags}
    return tokenizer.decode([token for token in map(int, ids) if token not in hidden])


def prompt_end(tokenizer, problem):
    """The last characters of a prompt, as many as <think> has: if they are <think>, the response
    begins inside the thoughts
    """
    prompt = graded_text(tokenizer, problem["prompt_ids"])
    return prompt.rstrip()[-len("<think>") :]


def is_solved(tokenizer, problem, ids):
    """Whether a response, the ids after a problem's prompt, has the problem's answer"""
    text = graded_text(tokenizer, ids)
    return is_correct(prompt_end(tokenizer, problem) + text, problem["answer"])


def batch_indices(step, batch_size, num_problems, seed):
    """The indices of the problems of step 1, 2, ... Every epoch has each once, in a new order. The
    result depends only on the arguments: there is no data sampler to save, and every method gets
    the same prompts in the same order.
    """
    epoch, start = divmod((step - 1) * batch_size, num_problems)
    order = []  # from this epoch on
    while len(order) < start + batch_size:
        order += np.random.default_rng((seed, epoch)).permutation(num_problems).tolist()
        epoch += 1
    return order[start : start + batch_size]


def draw_prompts(config, run, step):
    """This process's problems of a step, short prompts first, G times each: row i * G + g"""
    pools, shares = [sum(run.pools, [])], [1]  # all files are one pool; with --mix, one each
    if config.mix:
        pools, shares = run.pools, config.mix
    # The ends are rounded to whole prompts, so that the counts add up; the 1e-6 is for 6.4999999: a
    # share worth one prompt must not get none
    ends = np.cumsum([0, *shares]) / sum(shares) * config.batch_size + 0.500001
    counts = np.diff(ends.astype(int)).tolist()
    drawn = []
    for pool, count in zip(pools, counts):
        drawn += [pool[index] for index in batch_indices(step, count, len(pool), config.seed)]
    # Seeded here, so that a step's sampling does not depend on what was drawn before
    seed_sampling(config.seed * 1_000_003 + step)
    own = sorted(share(drawn), key=prompt_length)
    return [problem for problem in own for _ in range(config.num_generations)]


# Spellings of one answer. First signs, before NFKC, which would join 2½ or x⁻² to the digits that
# stand before: x₁₂, ｛1｝ and 90º, too; NFKC makes full-width digits plain, and ℃ °C
BEFORE_NFKC = {
    "[¹²³⁰-ⁿ]+": r"^{\g<0>}",
    "[₀-₎]+": r"_{\g<0>}",
    "[¼-¾⅐-⅞]": r" \g<0>",
    "[｛｝]": r"\\\g<0>",
    "[º˚]": "°",
}
SIGNS = (
    r"–- —- −- ‐- ∞\infty °^\circ ·\cdot~ ∪\cup~ ∩\cap~ ∈\in~ 。. "
    r"≈\approx~ ≡\equiv~ ≤\le~ ≥\ge~"
).split()
BASES = "two three four five six seven eight nine ten eleven twelve 13 14 15 sixteen".split()
# Then patterns in this order, each with an example. Quotes hold text: words, a unit, a base. *+
# does not backtrack: on 5,000 spaces that would take minutes
SPELLINGS = {
    # powers: x^{2}
    r"\^\{(\d)\}(?! *\d)": r"^\1",
    # spaces and sizes: \;  \left(  ~
    r"(?<!\\)\\([,;: >]|([bB]igg?[lr]?|left|right|middle)(?![a-zA-Z])\.?)|~": " ",
    r"(?<=\\\\)\[[\d.]+\w\w\]": " ",
    # marks: \$5  **7**  \color{red}7
    r"\\?\$|\\checkmark|[¢-¥₠-₿✓✔✅]|^(USD|Rs)\b\.?|\*\*|\\(text)?color\{\w+\}|\\\w+\{aligned\}|`"
    r"|&(?= *=)|\\(bf|rm|it|[lL]arge|displaystyle)\b|(?<!\\)\\!": "",
    # dots, a colon, braces, pi: \ldots  3{:}00  \mathbb R  2pi
    r"\\[lc]dots|\.\.\.": r"\\dots",
    r"\\colon\b|(?<![a-z])\{:\}": ":",
    r"\\(mathbb|frac) *([A-Z]\b|\\pi)": r"\\\1{\2}",
    r"(?<![a-zA-Z\\])pi\b": r"\\pi ",
    # powers of ten: 2.5e-3
    r"(?<=\d)[eE]\+?(-?\d+)\b": r"\\times 10^{\1}",
    # lists: 1 and 2
    r"(?i)[, ]*+(\\\w+\{ *+)?\b(and|or)\b( equivalently)? *\}?,?": ", ",
    # a base in words: 1011_{\text{base two}}
    r"(_ *+\{? *+)\\(?:text|mathrm)\{ *+(?:base\b)? *+(\w*) *+\}": r"\1\2",
    # a unit that looks like a variable, or has powers: 5 \text{ N}  5 \text{m s^{-2}}
    r"(?<=[\d}]) *\\(text|mathrm) *\{ *(e?[A-Z]|([^{}]*\^\{-?\d\})+) *\}(?!\w)": r' "\2"',
    # wrapped words: 5 \text{people} is 5 "people"
    r"\\(text\w*|\wbox|math(?:rm|bf|it|sf)|boldsymbol|underline) *\{(?=[^{}]*\})"
    r"([^{}\d]*[a-df-hj-z][^{}\d]*\d?|)([^{}]*)\}": r'"\2"\3 ',
    # a lead-in: the final answer is 5, = 5
    r'(?i)^[" ]*(the )?(final |correct )?(answer|option|choice)( is)?[": ]*=?'
    r'|^ *("[^"]*" *|\w\(\w, *\w\) *)?(=|\\approx)': "",
    # a choice: (C) 42 is C
    r'^[" (]*([A-J])[).](?!.*[A-J][).]).*': r"\1",
    # the empty set: no solution
    r'(?i)"? *+((the )?empty set|no (real )?solutions?|\\varnothing)': r"\\emptyset ",
    # all real numbers
    r'(?i)"? *+\b(for )?all (the )?reals?( numbers)?[ ".]*$': r"\\mathbb{R}",
    # a unit: 5 cm, 3 hours, 2\pi inches; but not variables: 5 xyz
    r'([\d}]|\\pi) *+(""|(?<= )) *+(?![a-dw-z]+\b)'
    r"([a-zA-Z.]{3,}( [a-z]+)*|[A-Z]{2}|[ckm]m|[ap]\.?m)\b(?!\()(/[a-z]+)?": r'\1 "\3\5"',
    # a short unit, which after more than a number would be a variable: 5m, 12 sq ft
    r'^[" ]*(-?[\d.,]*\d) *((sq |cu )?([ckm]?m|ft|in|units?|kg|lbs?|oz|mi|hrs?|[gshL])(\^?[23])?'
    r"(/[a-z]+)?(\^?2)?)$": r'\1 "\2"',
    # a word, or letters in order: north, ABC
    r'^[" ]*(?![a-dw-z]+\b)([a-zA-Z]{3,}|[A-Z]{2}|[Nn]o)\.?(?![^ "])(?!.*[-=+^(])': r'\\text "\1"',
    # letters in order in a list or a name, as one variable: \angle ABC is \angle x_{ABC}; but they
    # commute in a product, a sum or a fraction
    r'(?<![-+=/\w}])(?<![-+=/] )(?<!\\cdot )(?<![a-z}]\{)"*+ *+([A-Z](?: ?[A-Z])++)(?![a-zA-Z])'
    r'(?![^,]*([-+=^/_"]|\\[a-z]))': r" x_{\1}",
    # a fraction, a mixed number: 1⁄2, 1 2/3
    r"(\d+)⁄(\d+)": r"\\frac{\1}{\2}",
    r"^ *(-?\d+) +(\d+)/ *(\d+) *$": r"\1\\frac{\2}{\3}",
    # degrees: 90^\circ
    r'\\degree|"? ?\^ *\{?[ "]*(\\circ|o\b)[ "]*\}?([ "]*([CF])\b)?': r' "degrees\3"',
    # a base: 1011_2; a modulus: 3 \pmod 4
    r'\(?\b([\dA-F]+)\)? *+_[{(" ]*+(\w++)[)}. ]*+$': r'\1 "\2"',
    r'\(? *+["\\]?[pb]?mod\b[{(" ]*+(\w++)[)}. ]*+$': r' "mod\1"',
    # roots: 2√3
    r"(√|\\sqrt)(\[\w\])? *\(?(\d+)\)?": r"\\sqrt\2{\3}",
    # the set of all: \{x \mid x > 1\}
    r"^ *\\\{ *[a-z] *(?:\\in *\\mathbb *\{R\} *)?(?:\\mid|:|\|)(.*)\\\} *$": r"\1",
    # two answers in one: 1 \pm i
    r'^(?!.*(["(\[]|\\[{}]|\\mp))(.*,)?([^,]*)(\\pm|±)([^,]*)': r"\2\3+\5,\3-\5",
    # any integer: k\pi, k \in \mathbb{Z}
    r'(?<![, ])[, ]++(\\q?quad *+)?("[^"]*+" *+)?[kmn] *+\\in *+\\mathbb *\{?Z\}? *+$'
    r'|" *+(for|where)\b[^"]*+" *+[a-zA-Z]? *+$': "",
    # the power of a unit, and what stands between two: "m"^2 is "m2", "m" / "s"
    r'" *\^ *\{?-?(\d)\}?': r'\1"',
    r'\bsq(uare)?\b\.? (?=["]?[a-z]+)"?([a-z]+)': r"\g<2>2",
    r'\bcu(bic)?\b\.? (?=["]?[a-z]+)"?([a-z]+)': r"\g<2>3",
    r'(/|\\cdot) *(?=" *\w)': "",
    # what trails: 7. is 7; and spaces inside a number: 1 000 000
    r'_[ {]*"\w+"[ }]*$|(?!.*\.\.)[.,; \\]+$|(?<=\d) (?=\d{3})': "",
}


def spell(answer):
    r"""An answer -> (its value, its text in lower case). Example: 5\,\text{cm} -> "5 ", "cm"""
    for signs, plain in BEFORE_NFKC.items():
        answer = re.sub(signs, plain, answer)
    answer = " ".join(unicodedata.normalize("NFKC", answer).replace('"', " ").split())
    answer = answer.translate({ord(sign[0]): sign[1:] for sign in SIGNS})
    for pattern, plain in SPELLINGS.items():
        answer = re.sub(pattern, plain, answer)
    text = re.sub(r"\W", "", "".join(re.findall('"[^"]*"', answer)).lower())
    text = str(BASES.index(text) + 2) if text in BASES else text
    return re.sub('"[^"]*"|"', "", answer), text


# Gold answers, as value;unit, that math-verify would misread: words, a modulus, dots
NOT_FOR_MATH_VERIFY = (
    r"^ *;|:.*:|\\text|\.\.|\\[lc]?dots"
    r"|;(mod|(at|more|less)(least|most|than)|(is)?(even|odd|prime)$)"
)
# Those that an answer must have in their own words: \gcd(x, n) = 1, x \in A, 6:05, 2A;16
LITERAL = r"(gcd|lcm)\W*[a-z]|\\in *[A-Z]\b|:0\d|[A-Z][^;]*;\d"


def is_same(answer, gold, text):
    """Whether an answer, the last box of a text, equals the gold one."""
    if len(answer) + len(gold) > 5000:  # no pattern may take minutes
        return answer.strip() == gold.strip()
    gold = read_gold(gold)
    # The same words are the same answer, whether in \text{} or not
    words = [re.sub(r"\\text\w*\{([^{}]*)\}", r"\1", value).split() for value in (gold, answer)]
    if words[0] == words[1]:
        return True
    gold, unit = spell(gold)
    # If the gold answer is a list, as many boxes count as one answer
    boxes = dict.fromkeys(filter(None, map(last_boxed, re.split(r"(?=\\boxed)", text))))
    parts = re.split(r",(?!\d{3}\b)(?![^(\[{]*[)\]}])", gold)
    answer, other = spell(answer)
    if len(boxes) == len(parts) > 1 and answer.count(",") < gold.count(","):
        answer, other = spell(", ".join(boxes))

    # math-verify lets letters commute, so words are text. A unit may be missing or abbreviated
    same = gold.replace(" ", "") == answer.replace(" ", "")
    if re.search(NOT_FOR_MATH_VERIFY, f"{gold};{unit}"):
        return same and unit == other
    # Each of these lines forbids one kind of wrong abbreviation
    short, long = sorted([unit, other], key=len)
    rest = iter(long)
    short_for = long.startswith(short[:1]) and all(letter in rest for letter in short)
    short_for &= len(long) > 2 or short in ("", long)  # m is not short for mm
    short_for &= short != "m" or re.match("m$|met", long) is not None  # nor for miles
    short_for &= not short or short[-1].isdigit() == long[-1].isdigit()  # nor cm for cm^2
    if re.search(LITERAL, f"{gold};{unit}"):
        words, given = (value.replace(" ", "") for value in (gold, answer))
        short_for &= bool(re.search(rf"(?<!\w){re.escape(words)}(?!\w)", given))
    if not short_for or same or ask_math_verify(gold, answer):
        return short_for
    # 12.5 may be 12.5%, but 0.5 is not 0.5%. math-verify does this with integers only
    bare = [value.replace(r"\%", "") for value in (gold, answer)]
    may_lack_it = "%" in gold and "%" in answer or re.match(" *[1-9]", gold)
    return bool(may_lack_it) and bare != [gold, answer] and ask_math_verify(*bare)


# The subprocess of ask_math_verify. Three things are easy to get wrong:
#   in a box     else \left( 3, 4 \right) is read as 3
#   LaTeX only   else 1 \pmod 4 is read as 4
#   gold first   for gold 1<x<2 it accepts (1,2), but for gold (1,2), a point, it rejects 1<x<2
MATH_VERIFY = r"""import json, re, sys
from math_verify import LatexExtractionConfig, LatexNormalizationConfig, parse, verify
# Units are gone already, so a last letter is no unit; at six decimals 0.333333 would equal 1/3
latex = LatexNormalizationConfig(units=False, malformed_operators=True, nits=True)
latex = [LatexExtractionConfig(normalization_config=latex)]
options = dict(numeric_precision=99, float_rounding=12)
verify(parse("$1$"), parse("$1$"))  # the first call is slow
print("ready")
for line in sys.stdin:
    texts = [text for text in json.loads(line) if text is not None]
    if not re.search(r"_\{?i", "".join(texts)):  # I is the imaginary unit, i a variable
        texts = [re.sub(r"(?<![a-zA-Z\\])i(?![a-zA-Z])", "I", text) for text in texts]
    read = [parse(f"\\boxed{{{text}}}", latex, parsing_timeout=None) for text in texts]
    options["allow_set_relation_comp"] = re.search("[][]|infty", texts[0])
    print(verify(*read, timeout_seconds=None, **options) if len(read) > 1 else len(read[0]) > 1)"""


OF_THREAD = threading.local()  # with one process, threads would read each other's replies


def ask_math_verify(gold, answer, seconds=3.0):
    """
    Whether math-verify accepts answer for gold, both bare LaTeX; answer None: whether it can parse
    gold. False after `seconds`: 2003^{2002^{2001}} keeps sympy in one C call, which ends only
    when its process is killed. ImportError if math-verify is missing.
    """
    process = getattr(OF_THREAD, "process", None)
    if process is None or process.poll() is not None:
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [sys.executable, "-P", "-u", "-c", MATH_VERIFY],  # -P: no modules of the folder
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            env={**os.environ, "PYTHONIOENCODING": "utf-8"},  # whatever that of a terminal is
            process_group=0,  # Ctrl-C must not reach it
        )
        if process.stdout.readline() != "ready\n":  # start-up does not count towards seconds
            raise ImportError("math-verify cannot be imported", name="math-verify")
        OF_THREAD.process = process
    reply = ""
    try:
        print(json.dumps([gold, answer]), file=process.stdin, flush=True)
        if select.select([process.stdout], [], [], seconds)[0]:
            reply = process.stdout.readline()
    finally:
        # After Ctrl-C, too: an unread reply would be taken for the next one
        if not reply:
            process.kill()
            process.wait()  # so that poll() sees it, and the next call starts another
    return reply == "True\n"


# --------------------------------------------------------------------------------------------------
# 13. The tiny world: a made-up language in which distillation can be watched
#
# A problem is a digit, five operations modulo 10, and how many rounds of them: "4 a +3 b *7 ...
# IV". Its solution goes step by step: "I first a +3 4 gives 7 , then b *7 7 is 9 . ... II now a +3
# 9 is 2 ; ... so the answer is \boxed{ 8 }". Every operation is invertible, so a slip carries
# through to the answer. Words have synonyms, and authors prefer some: these habits fill a model's
# top k. An author may lose the thread, mumble "hmm er um", and find it again or not.

LEXICON = {
    "special": "<pad> <end> <user> <solve>",
    "frame": "the answer \\boxed{ }",
    "digit": "0 1 2 3 4 5 6 7 8 9",
    "operation": "+1 +2 +3 +5 +7 +9 *3 *7",
    "label": "a b c d e",
    "round": "I II III IV V VI",
    "opener": "first next then now so here well okay",
    "verb": "is gives makes equals yields becomes leaves gets",
    "closer": ", ; . : and - / |",
    "mumble": "hmm er um oh ah wait maybe perhaps",
}
LEXICON = {kind: words.split() for kind, words in LEXICON.items()}


def tiny_example(rng, rounds, habit, slip_rate=0.0, mumble_rate=0.0, order=1):
    """A problem of so many rounds, and an author's solution -> {"problem", "answer"}, words

    habit, 0 to 7: the synonym the author likes best; each next one is .6 times as likely.
    slip_rate: how often a result is wrong; the next steps continue from it.
    mumble_rate: how often a mumble precedes a step; one in four ends the solution, without <end>.
    order -1: "a 4 +3" for "a +3 4".
    """

    def synonym(kind):
        place = int(math.log(1 - rng.random()) / math.log(0.6)) + habit
        return LEXICON[kind][place % 8]

    def apply(value, operation):
        return str(eval(value + operation) % 10)  # such as 4*7: both are words of the lexicon

    operations = rng.choices(LEXICON["operation"], k=len(LEXICON["label"]))
    numerals = LEXICON["round"][:rounds]
    value = rng.choice(LEXICON["digit"])
    plan = list(zip(LEXICON["label"], operations))
    problem = {
        "problem": " ".join([value, *sum(plan, ()), numerals[-1]]),
        "answer": functools.reduce(apply, operations * rounds, value),
    }

    words = []
    for numeral in numerals:
        words.append(numeral)
        for label, operation in plan:
            if rng.random() < mumble_rate:
                lost = rng.random() < 0.25
                words += [synonym("mumble") for _ in range(100 if lost else rng.randint(4, 24))]
                if lost:
                    return problem, words
            told = [operation, value][::order]
            value = apply(value, operation)
            if rng.random() < slip_rate:
                value = apply(value, rng.choice("+1 +2 +8 +9".split()))
            words += [synonym("opener"), label, *told, synonym("verb"), value, synonym("closer")]
    words += [synonym("opener"), "the", "answer", synonym("verb"), "\\boxed{", value, "}", "<end>"]
    return problem, words


def tiny_tokenizer(words):
    """A tokenizer with one token per word, and a chat template, like any other."""
    ids = {word: index for index, word in enumerate(words)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<pad>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<end>"
    )
    tokenizer.chat_template = "{% for m in messages %}<user> {{ m['content'] }} {% endfor %}<solve>"
    return tokenizer


def tiny_model(tokenizer):
    """A Qwen3 of 0.1M parameters. All worlds start with its weights; their seed draws the data."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.05,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return transformers.Qwen3ForCausalLM(config)


def imitate(model, draw, steps, title):
    """Train a model in place, on batches of about 3,000 tokens. draw() returns a row: its ids, and
    1 for each token to train on, else 0 (two lists of L).
    """
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for step in tqdm(range(steps), desc=f"tiny world: {title}", leave=False, disable=None):
        # Right-padded, so that no attention mask is needed, with 0 (<pad>), which is not trained on
        rows = []
        while sum(map(len, rows)) < 3000:
            rows.append(torch.tensor(draw()).T)  # (L, 2)
        ids, learned = pad_sequence(rows, batch_first=True).unbind(-1)  # (rows, L) each
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids.where(learned > 0, -100)).loss.backward()
        # Linear warm-up, and cosine decay to a twentieth
        cosine = 0.525 + 0.475 * math.cos(math.pi * step / steps)
        optimizer_step(model, optimizer, 8e-3 * min(1, (step + 1) / 20) * cosine)


def make_world(folder, seed, teacher_habit=0, teacher_order=1, teacher_steps=100):
    """Write the tiny world into a folder, in a minute: models teacher/ and student/, train.jsonl,
    eval.jsonl. Both start from a base model that saw few mumbles. The teacher is trained on a
    careful author; the student, briefly, on one of other habits, who slips and mumbles.
    """
    # One tokenizer for both, as OPD requires
    tokenizer = tiny_tokenizer(sum(LEXICON.values(), []))

    def learn(model, title, batches, rounds, habit=None, **author):
        rng = random.Random(f"{seed} {title}")

        def draw():
            liked = rng.randrange(8) if habit is None else habit
            problem, words = tiny_example(rng, rng.randint(*rounds), liked, **author)
            prompt = ["<user>", *problem["problem"].split(), "<solve>"]
            learned = [0] * len(prompt) + [1] * len(words)
            return tokenizer.convert_tokens_to_ids(prompt + words), learned

        imitate(model, draw, batches, title)

    student = tiny_model(tokenizer)
    learn(student, "base model, short problems", 200, (1, 2), mumble_rate=0.002)
    learn(student, "base model, full problems", 250, (4, 6), mumble_rate=0.002)
    teacher = copy.deepcopy(student)
    learn(teacher, "teacher", teacher_steps, (4, 6), teacher_habit, order=teacher_order)
    learn(student, "student", 40, (4, 6), habit=2, slip_rate=0.04, mumble_rate=0.03)

    partial = f"{folder}.partial"  # an interrupted world must not look complete
    shutil.rmtree(partial, ignore_errors=True)
    for name, model in (("teacher", teacher), ("student", student)):
        model.save_pretrained(f"{partial}/{name}")
        tokenizer.save_pretrained(f"{partial}/{name}")
    # Problems, no two alike, and solutions without slips, which only --teacher_prompt_template uses
    rng, records = random.Random(f"{seed} problems"), {}
    while len(records) < 2200:
        problem, words = tiny_example(rng, rng.randint(4, 6), habit=0)
        records[problem["problem"]] = {**problem, "solution": " ".join(words[:-1])}  # no <end>
    records = list(records.values())
    append_json(f"{partial}/train.jsonl", *records[:2000])
    append_json(f"{partial}/eval.jsonl", *records[2000:])
    os.replace(partial, folder)


# --------------------------------------------------------------------------------------------------
# 14. Flags

BOXED = r"{problem} Please reason step by step, and put your final answer within \boxed{}."
Method = Literal["opd", "prefix", "progressive", "prefix-guided", "prune"]
Loss = Literal["topk", "reverse_kl", "sampled", "forward_kl", "jsd"]
Support = Literal["student", "teacher", "intersection", "union"]


@dataclass
class Config:
    """All flags: --name in a shell, in a notebook Config(name=...), or for the tiny world
    replace(TINY, name=...). --help shows these comments; a [tag] names the paper that an option or
    its default is from."""

    # -- models and data
    student: str = ""  # model folder or hub name; with no model and no data file: the tiny world
    teacher: str = ""  # model folder or hub name, with the student's token ids; optional with
    # --teacher_prompt_template: then the initial student, frozen, one more model in memory
    train_file: list[str] = ()  # training problems: jsonl, json or parquet; answers are not needed
    mix: list[float] = ()  # each training file's share of a batch, such as 0.8 0.2; unset: one pool
    eval_file: list[str] = ()  # problems with answers to evaluate on; one result per file
    output_dir: str = "out"  # for metrics.jsonl, samples.jsonl, checkpoints, the tiny world
    report_to: Literal["none", "tensorboard", "wandb"] = "none"  # where else to log the metrics
    report: str = ""  # compare the runs below this folder: print a table, draw report.png, exit
    no_view: bool = False  # do not write rollouts.html, which shows the last step token by token
    prompt_template: str = BOXED  # the user message, with {problem} filled in [Rethinking-OPD]
    teacher_prompt_template: str = ""  # the teacher's own user message, such as "{problem} Hint:
    # {solution}"; also {answer}. Training problems that lack a field it uses are left out [OPSD]
    no_chat_template: bool = False  # do not apply the tokenizer's chat template
    enable_thinking: bool = False  # turn on thinking in Qwen3's chat template
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on a GPU, else
    # float32; the student's master weights are always float32
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # such as cuda, cuda:1, cpu
    seed: int = 0  # for the data order, all sampling, and a tiny world that is yet to be made

    # -- method and loss
    method: Method = "opd"  # opd: sample to the cap [GKD]. prefix: to --prefix_length [FastOPD,
    # TOPD]. progressive: to a growing horizon [FastOPD, POPD]. prefix-guided: past the prefix only
    # where overlap is high [PG-OPD]. prune: less weight and early stops after drift [Prune-OPD]
    loss: Loss = "topk"  # topk: KL(student || teacher) on top-k tokens, with the released code's
    # gradient [Rethinking-OPD]. reverse_kl: on the whole vocabulary [GKD]. sampled: k1 policy
    # gradient. forward_kl: KL(teacher || student) [GKD]. jsd: between the two, as --beta says [GKD]
    beta: float = 0.5  # --loss jsd: the teacher's weight in the mixture [.5: OPSD]
    support: Support = "student"  # --loss topk: the top-k set it sums over [Rethinking-OPD]
    tail: bool = False  # --loss topk: add the rest of the vocabulary as one class (TRL's form)
    baseline: bool = False  # --loss sampled: subtract the closed-form baseline [vOPD]
    overlap_k: int = 16  # the k of overlap and --loss topk [Rethinking-OPD, PG-OPD, Prune-OPD]
    cold_start_steps: int = 0  # SFT steps first, on teacher solutions [Rethinking-OPD]; wrong ones
    # are left out, where the answer is known
    cold_start_learning_rate: float = 1e-5  # learning rate of the cold start (our choice)

    # -- sampling
    batch_size: int = 64  # prompts per step [Rethinking-OPD]
    num_generations: int = 4  # candidates per prompt [Rethinking-OPD]
    max_prompt_length: int = 1024  # a training problem is left out if its prompt, the student's or
    # the teacher's, is longer [Rethinking-OPD]
    max_new_tokens: int = 7168  # maximum length (cap) of a training response [Rethinking-OPD]
    temperature: float = 1.0  # divides both models' logits, in sampling and loss [all but OPSD]
    no_merge_stops: bool = False  # keep stop tokens separate; by default all stop tokens of student
    # and teacher count as one [EOS]
    segment_length: int = 0  # tokens between two decisions on which rows go on; 0: an eighth of
    # the cap, at most 512 (our choice)
    rollout_batch_size: int = 0  # rows a process samples at once; 0: what fits on a GPU, else all
    prefix_length: int = 0  # tokens of the prefix; 0: 1024 for prefix (our choice), 128 for
    # prefix-guided [PG-OPD, second hand]
    probe_window: int = 128  # prefix-guided: tokens that are scored [PG-OPD, second hand]
    keep_ratio: float = 0.5  # prefix-guided: share of candidates that go on [PG-OPD: .25 to .75]
    select: Literal["overlap", "random"] = "overlap"  # prefix-guided: criterion; random: a control
    train_pruned_prefix: bool = False  # prefix-guided: train on prefixes of rows not selected, too
    horizon_start: int = 512  # progressive: the first horizon, in tokens (our choice)
    horizon_growth: int = 256  # progressive: tokens that each growth adds (our choice)
    horizon_every: int = 10  # progressive: updates between two growths (our choice)
    drift_threshold: float = 0.7  # prune: overlap below this makes a token a bad event [Prune-OPD]
    w_drop: float = 0.01  # prune: reliability lost at each bad event [Prune-OPD]
    w_base: float = 0.5  # prune: the loss weight is the reliability plus this [Prune-OPD]
    cap_init: int = 2048  # prune: initial cap, in tokens [Prune-OPD]
    cap_min: int = 1024  # prune: smallest cap [Prune-OPD]
    cap_max: int = 12288  # prune: largest cap; --max_new_tokens limits it, too [Prune-OPD]
    cap_step: int = 100  # prune: tokens by which the cap grows or shrinks [Prune-OPD]
    cap_margin: int = 100  # prune: a row hits if reliable to within this of the cap [Prune-OPD]
    cap_hit_ratio: float = 0.1  # prune: the cap grows if this share of the rows hits [Prune-OPD]
    cap_patience: int = 3  # prune: misses (fewer hits) in a row after which it shrinks [Prune-OPD]
    no_prune_in_flight: bool = False  # prune: do not stop rows in flight, as in the released code

    # -- optimisation
    learning_rate: float = 1e-6  # of AdamW [Rethinking-OPD, Prune-OPD, EffOPD]
    warmup_steps: int = 0  # steps of linear warm-up; then the rate is constant [EffOPD]
    max_steps: int = 200  # training steps [Rethinking-OPD]
    max_grad_norm: float = 1.0  # gradient clipping (our choice)
    micro_batch_size: int = 0  # rows at once in the update, if of the longest length; more
    # of shorter ones. 0: what fits on a GPU, else 4
    gradient_checkpointing: bool = False  # recompute layers in backward; on a GPU it is on anyway
    no_gradient_checkpointing: bool = False  # turn it off on a GPU: faster, more memory
    extrapolate: bool = False  # after steps 1, 2, 4, 8, ... try to extrapolate the update [EffOPD]
    validation_size: int = 50  # --extrapolate: answered training problems to validate on [EffOPD]
    save_every: int = 0  # steps between checkpoints; 0: only at the end, or when a signal ends the
    # run, for which torchrun leaves 30 s
    keep_checkpoints: int = 2  # how many of the latest to keep
    resume: str = ""  # continue from the last checkpoint in --output_dir, or from the one given

    # -- evaluation
    eval_only: bool = False  # evaluate --student on --eval_file, then exit
    eval_first: Literal["auto", "none", "student", "both"] = "auto"  # what to evaluate before the
    # first step; auto: both models if that takes under a tenth of the run, else the student
    eval_every: int = 20  # steps between evaluations; 0: only at the end [Prune-OPD]
    eval_samples: int = 16  # answers per problem [Rethinking-OPD]
    probe_depths: list[int] = ()  # cut the student's answers at these percentages, and let the
    # teacher continue them [Rethinking-OPD]
    eval_temperature: float = 0.7  # 0 is greedy [Rethinking-OPD]
    eval_top_p: float = 0.95  # nucleus sampling; 1 turns it off [Rethinking-OPD]
    eval_max_new_tokens: int = 31744  # maximum length of an evaluation answer [Rethinking-OPD]
    eval_batch_size: int = 0  # evaluation rows at once; 0: what fits on a GPU, up to 256, else 32

    @property
    def prefix(self):
        return self.prefix_length or (128 if self.method == "prefix-guided" else 1024)


# The defaults where no model is named: the tiny world
TINY = Config(
    device="cpu",
    prompt_template="{problem}",
    loss="reverse_kl",
    overlap_k=4,
    cold_start_learning_rate=2e-3,
    batch_size=8,
    max_prompt_length=256,
    max_new_tokens=256,
    segment_length=32,
    prefix_length=32,
    probe_window=32,
    horizon_start=32,
    horizon_growth=32,
    horizon_every=3,
    cap_init=64,
    cap_min=32,
    cap_max=256,
    cap_step=16,
    cap_margin=16,
    learning_rate=2e-3,
    warmup_steps=5,
    max_steps=30,
    micro_batch_size=64,
    eval_first="both",
    eval_every=10,
    eval_samples=4,
    eval_temperature=1.0,
    eval_top_p=1.0,
    eval_max_new_tokens=256,
    eval_batch_size=200,
)
ALIASES = {
    "student": ["--model_name_or_path"],
    "teacher": ["--teacher_model_name_or_path"],
    "max_new_tokens": ["--max_completion_length"],
}


def parse_args(argv=None):
    """Command line -> Config; without a model, on top of TINY. Bad flags: a one-line ValueError"""
    # SUPPRESS: parse only the flags given. The rest comes from Config, or from TINY
    parser = argparse.ArgumentParser(
        usage="python opd.py [flags]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )

    def fail(message):  # argparse's own prints all usage before the one line that matters
        raise ValueError(f"{message}; see python opd.py --help")

    parser.error = fail

    # A flag's help is the comment after it and the lines that continue it; "# --" titles a group
    for title, block in re.findall(r"# -- (.*)\n((?:.+\n)+)", inspect.getsource(Config)):
        group = parser.add_argument_group(title)
        for name, comment in re.findall(r"(\w+): .*?  # (.*(?:\n +# .*)*)", block):
            kind, default = Config.__annotations__[name], getattr(Config, name)
            how = {"type": kind}
            if kind is bool:
                how = {"action": "store_true"}
            elif get_origin(kind) is Literal:
                how = {"choices": get_args(kind)}
            elif get_origin(kind) is list:
                how = {"type": get_args(kind)[0], "nargs": "+"}
            elif name == "resume":
                how = {"nargs": "?", "const": "latest"}
            shown = "none" if default in ("", ()) else default
            text = re.sub(r"\n +#", "", comment) + f" (default {shown}"
            if getattr(TINY, name) != default:
                text += f"; tiny world {getattr(TINY, name)}"
            how["help"] = text.replace("%", "%%") + ")"
            group.add_argument(f"--{name}", *ALIASES.get(name, []), **how)

    given = vars(parser.parse_args(argv if argv is None else list(map(str, argv))))
    for name, value in given.items():
        if value == "" or isinstance(value, list) and "" in value:
            fail(f"--{name} is empty, as from an unset variable of the shell")
    named = given.get("student") or given.get("teacher")
    return replace(Config() if named else TINY, **given)


def as_json(value):
    """What JSON does not know, such as a Path or a number of numpy -> a text or a number"""
    return value.item() if isinstance(value, np.generic) else str(value)


def check_values(config):
    """ValueError for a flag whose value is wrong by itself."""
    may_be_zero = (  # and all whose default is 0
        "horizon_growth drift_threshold w_drop w_base cap_margin cap_hit_ratio eval_every "
        "eval_temperature beta"
    ).split()
    # argparse has seen nothing of a Config that was made in a notebook
    for name, kind in Config.__annotations__.items():
        value = getattr(config, name)
        if get_origin(kind) is Literal:
            if value not in get_args(kind):
                raise ValueError(f"--{name} {value}: one of {', '.join(get_args(kind))}")
            continue
        items, of_type = [value], kind
        if get_origin(kind) is list:
            items, of_type = value, get_args(kind)[0]
        as_good = (float, int) if of_type is float else of_type
        is_list = isinstance(items, (list, tuple))
        if not is_list or not all(isinstance(item, as_good) for item in items):
            raise ValueError(f"--{name} {value!r} must be of type {inspect.formatannotation(kind)}")

        zero_ok = name in may_be_zero or getattr(Config, name) == 0
        limit = 1 if name in ("keep_ratio", "eval_top_p") else 1e12
        if of_type is int and name != "seed":  # counts, of which lists are made
            limit = 1e8
        if type(value) in (int, float) and not (0 <= value <= limit and (value or zero_ok)):
            least = "at least 0" if zero_ok else "above 0"
            raise ValueError(f"--{name} {value} must be {least}, and at most {limit:g}")


def check_template(name, template, known):
    """ValueError if a template lacks the problem, or names a field that is not known."""
    if "{problem}" not in template:
        raise ValueError(f"--{name} must say {{problem}} where the problem goes")
    # Not what is in a LaTeX command, as in \frac{a}{b}
    for field_name in re.findall(r"(?<![\w\\}])\{(\w+)\}", template):
        if field_name not in known:
            raise ValueError(f"--{name}: {{{field_name}}} is none of {', '.join(known)}")


def check_config(config):
    """ValueError for flags that cannot work, alone or together, before anything is loaded."""
    check_values(config)
    if not 0 < config.beta < 1:
        ends = "for the two KLs there are --loss reverse_kl and forward_kl"
        raise ValueError(f"--beta {config.beta} must lie between 0 and 1; {ends}")
    of_loss = {"support": "topk", "tail": "topk", "baseline": "sampled", "beta": "jsd"}
    for name, loss in of_loss.items():
        if getattr(config, name) != getattr(Config, name) and config.loss != loss:
            raise ValueError(f"--{name} is of --loss {loss} alone, and --loss is {config.loss}")
    if any(depth not in range(100) for depth in config.probe_depths):
        raise ValueError(f"--probe_depths {config.probe_depths} must be percentages, 0 to 99")
    devices = {"cpu"}
    for index in range(torch.accelerator.device_count()):
        kind = torch.accelerator.current_accelerator().type  # such as cuda
        devices |= {kind, f"{kind}:{index}"}
    if config.device not in devices:
        raise ValueError(f"--device {config.device}: not available here; use cpu")
    if NUM_RANKS > 1 and config.device.startswith("cuda:"):
        raise ValueError(f"--device {config.device}: each process takes a GPU of its own; use cuda")
    if config.output_dir.startswith("~"):
        raise ValueError(f"--output_dir {config.output_dir}: no shell expands this ~; write $HOME")
    if re.search(LONE_SURROGATE, config.output_dir):
        raise ValueError(f"--output_dir {config.output_dir!r}: its name must be UTF-8")
    if config.gradient_checkpointing and config.no_gradient_checkpointing:
        raise ValueError("--gradient_checkpointing and --no_gradient_checkpointing: give one")
    check_template("prompt_template", config.prompt_template, ["problem"])
    if config.teacher_prompt_template:
        check_template("teacher_prompt_template", config.teacher_prompt_template, FIELDS)
    # A checkpoint in --output_dir would be renamed, or removed as the oldest
    for model in filter(None, (config.student, config.teacher)):
        folder, name = os.path.split(os.path.abspath(model))
        inside = os.path.realpath(folder) == os.path.realpath(config.output_dir)
        if inside and name.startswith("checkpoint-") and not config.eval_only:
            raise ValueError(f"{model} is a checkpoint of another run: give another --output_dir")
    if not config.cap_min <= config.cap_init <= config.cap_max:
        raise ValueError("--cap_init must lie between --cap_min and --cap_max")
    if config.batch_size < NUM_RANKS:
        raise ValueError(f"--batch_size must be at least the {NUM_RANKS} processes")

    # Flags in combination
    if config.method == "prefix-guided":
        if not config.probe_window <= config.prefix < config.max_new_tokens:
            lengths = f"{config.probe_window}, {config.prefix} and {config.max_new_tokens}"
            must = "--probe_window <= --prefix_length < --max_new_tokens must hold"
            raise ValueError(f"{must}; they are {lengths}")
        if config.keep_ratio * config.num_generations < 0.999:  # .333 passes for 1/3
            told = f"--keep_ratio {config.keep_ratio} is under one candidate per prompt"
            raise ValueError(f"{told}: raise it to 1/{config.num_generations}")
    if config.mix:
        # Rounded, so that .3333 passes for 1/3
        prompts = round(min(config.mix) * config.batch_size, 2)  # of the smallest share
        matches = len(config.mix) == len(config.train_file)
        if not matches or round(sum(config.mix), 3) != 1 or prompts < 1:
            needs = "a share for each --train_file, each worth a prompt per step, summing to 1"
            raise ValueError(f"--mix needs {needs}")
    own_template = config.teacher_prompt_template
    needed = [config.student, config.teacher or own_template, config.train_file]
    given = [config.student, config.teacher, own_template, config.train_file, config.eval_file]
    if config.eval_only:
        needed = [config.student, config.eval_file]
    if any(given) and not all(needed):
        raise ValueError(
            "give --student, --teacher (or --teacher_prompt_template) and --train_file; for "
            "--eval_only, --student and --eval_file; or none of these"
        )
    if not any(given) and config.prompt_template == BOXED and not config.report:
        raise ValueError("Config() names no models; for the tiny world use replace(TINY, ...)")


# --------------------------------------------------------------------------------------------------
# 15. Set-up and preflight


@dataclass
class Run:
    """What a run has loaded, and where it stands."""

    flags: dict  # as given; to resume, those of the checkpoint must agree
    files: list  # paths of metrics.jsonl and samples.jsonl
    track: object = None  # log(dict of numbers, step) of a tracker
    device: object = None
    autocast: object = None  # context for the update: autocast to bfloat16, or disabled
    student: object = None  # the model that is trained: float32 master weights
    sampler: object = None  # the model that samples: the student itself, or its bfloat16 copy
    teacher: object = None  # None in --eval_only
    tokenizer: object = None  # the student's; it encodes the prompts of both models
    teacher_tokenizer: object = None  # for its vocabulary, stop ids and chat template
    optimizer: object = None
    vocab_size: int = 0  # tokens that both models share; other rows of their heads are cut off
    sampling: dict = None  # vocab_size, eos_ids, stop_id, temperature: for rollout and head_logits
    stops: dict = None  # student, teacher: all ids that end a response of that model
    cache_bytes: list = None  # bytes per token in the caches of sampler and teacher
    kept_bytes: int = 0  # bytes per token that the student's forward keeps for backward
    most: dict = None  # upper bounds on rows and lengths, from work_at_most
    pools: list = None  # training problems, a list for each file
    answered: list = None  # those that have an answer
    evals: dict = None  # name of a file -> problems to evaluate on

    # Where it stands. A checkpoint has all of this, and the optimizer
    data: str = ""  # a digest of all problems, with their prompts
    step: int = 0  # the last completed step
    graded: int = 0  # the last step after which the student was evaluated
    rows_at_once: dict = field(default_factory=dict)  # keys as in plan_phases
    cap: int = 0  # prune: the current cap, in tokens
    misses: int = 0  # prune: misses in a row
    anchor: dict = field(default_factory=dict)  # EffOPD: the weights accepted last
    untried: dict = field(default_factory=dict)  # EffOPD: the step's metrics, until its tries end
    counts: dict = None  # tokens and FLOPs so far

    saved: list = None  # step, graded and whether untried, of the last checkpoint
    shown: dict = None  # rows of the last step, for rollouts.html

    # For the error message and the last checkpoint
    phase: str = "set-up"
    halfway: bool = False  # a whole_step failed: the state must not be saved

    def count(self, **costs):
        for name, cost in costs.items():
            self.counts[name] += cost

    def standing(self):
        """Where the run stands, a part of every line of metrics.jsonl."""
        rows = self.rows_at_once["rollout_batch_size"]
        standing = {"cap": self.cap, "misses": self.misses, "rollout_batch_size": rows}
        return standing | self.counts

    def record(self, metrics):
        """Append a line to metrics.jsonl, and send its numbers to the tracker."""
        if is_main():
            append_json(self.files[0], {"step": self.step, **metrics})
        self.tell(metrics)

    def tell(self, metrics, prefix=""):
        """Send the numbers among the metrics to the tracker, if there is one."""
        if self.track:
            numbers = {prefix + name: x for name, x in metrics.items() if type(x) in (int, float)}
            self.track(numbers, self.step)


def compare_vocabularies(student_vocab, teacher_vocab):
    """Two dicts, token: id -> the size of the vocabulary they share. The ids beyond are cut off.
    ValueError, naming the first token, if an id in it has two tokens, or any token two ids.
    """
    # All ids up to the last one that is the same token in both
    shared = student_vocab.items() & teacher_vocab.items()
    size = 1 + max(dict(shared).values(), default=-1)
    alone = dict(sorted(student_vocab.items() ^ teacher_vocab.items()))
    twice = student_vocab.keys() & teacher_vocab.keys()
    different = [t for t, index in alone.items() if index < size or t in twice or not size]
    if different:
        first = different[0]
        ids = f"{first!r} is {student_vocab.get(first)} and {teacher_vocab.get(first)}"
        count = f"different ids for {len(different)} tokens"
        raise ValueError(f"use models with the same tokenizer: {count}: {ids}")
    if alone:
        told = f"tokens that only one model has are cut off, {len(alone)} such as {min(alone)!r}"
        note(f"{told}; {size} stay")
    return size


def stop_ids(model, tokenizer):
    """All ids that end a response: those of the generation config, and the tokenizer's EOS."""
    listed = model.generation_config.eos_token_id
    listed = listed if isinstance(listed, list) else [listed]
    if not all(item is None or type(item) is int for item in listed):
        raise ValueError(f"{model.name_or_path}: its eos_token_id {listed} must be ids")
    return {tokenizer.eos_token_id, *listed} - {None, -1}  # -1: never, as some models write it


def load(auto_class, path, **options):
    """from_pretrained, or a ValueError of one line. Code that comes with a model is never run."""
    of_a_run = "/checkpoint-" in path and os.path.isdir(os.path.dirname(path))
    no_hub_name = path[0] in "./~" or path.count("/") > 1 or of_a_run or os.path.isfile(path)
    if no_hub_name and not os.path.isdir(path):
        raise ValueError(f"{path} does not load: there is no such folder")
    adapter = os.path.exists(f"{path}/adapter_config.json")
    missing = []  # weights that the files lack: transformers fills them with random numbers
    try:
        if not adapter:
            loaded = auto_class.from_pretrained(path, trust_remote_code=False, **options)
            if options.get("output_loading_info"):
                loaded, info = loaded
                missing = sorted(info["missing_keys"])
            adapter = getattr(loaded, "_hf_peft_config_loaded", False)  # for a hub name
    except Exception as error:  # transformers, safetensors, json: each raises its own errors
        why = f"{type(error).__name__}: {str(error)[:200]}"
        if "trust_remote_code" in str(error):
            why = "it needs code of its own, and models that come with code are not supported"
        elif os.path.isdir(path) and not os.path.exists(f"{path}/config.json"):
            why = "it has no config.json; a run's models are in its checkpoint-<step> folders"
        raise ValueError(f"{path} does not load: {why}") from None
    if adapter:
        raise ValueError(f"{path} is an adapter (LoRA), not a full model: merge it into its base")
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} of its weights, such as {missing[0]}")
    if auto_class is AutoTokenizer and len(loaded) < 5:  # transformers makes up an empty one
        raise ValueError(f"{path} has no tokenizer: copy that of its base model there")
    return loaded


def read_files(config, run):
    """Load the problems of --train_file and --eval_file into the run, with prompt_ids, and with
    teacher_prompt_ids where a problem has all fields that --teacher_prompt_template names.
    """
    encode = functools.partial(
        encode_prompt,
        run.tokenizer,
        chat_template=not config.no_chat_template,
        enable_thinking=config.enable_thinking,
    )

    def read(path, needs_answers=False):
        problems = load_problems(path, needs_answers)
        for problem in problems:
            filled = fill_template(config.teacher_prompt_template, problem)
            try:
                problem["prompt_ids"] = encode(problem["problem"], config.prompt_template)
                if filled:
                    problem["teacher_prompt_ids"] = encode(filled, "{problem}")
                if not problem["prompt_ids"] or not teacher_prompt(problem):
                    raise ValueError("no token is left")
            except Exception as error:  # a chat template can raise anything
                failed = "tokenizer or chat template (see --no_chat_template) fails on"
                what = f"{path}: {failed} {problem['problem']!r:.60}"
                raise ValueError(f"{what}: {error}") from None
        return problems

    run.evals, run.pools = {}, []
    # An evaluation is named after its file, or by its path if that name is taken
    for path in config.eval_file:
        name = os.path.splitext(os.path.basename(path))[0]
        run.evals[path if name in run.evals else name] = read(path, needs_answers=True)
    longest = config.max_prompt_length
    for path in config.train_file:
        pool, left_out = [], collections.Counter()
        for problem in read(path):
            if config.teacher_prompt_template and "teacher_prompt_ids" not in problem:
                left_out["lack what --teacher_prompt_template names"] += 1
            elif max(prompt_length(problem), len(teacher_prompt(problem))) > longest:
                left_out[f"have a prompt longer than --max_prompt_length {longest}"] += 1
            else:
                pool.append(problem)
        for why, count in left_out.items():
            told = f"{path}: {count} training problems {why}"
            if not pool:
                raise ValueError(f"{told}, and none is left")
            note(f"{told}, and are left out")
        run.pools.append(pool)
    run.answered = [problem for problem in sum(run.pools, []) if problem["answer"] is not None]
    if config.extrapolate and len(run.answered) < config.validation_size:
        needed = f"--extrapolate needs {config.validation_size} answered problems"
        raise ValueError(f"{needed}; here are {len(run.answered)}")


def check_model(model, only_sampled):
    """Check a model -> the bytes that its cache keeps per token. ValueError if the cache holds more
    than keys and values, or if its head does more than head_logits; a model that is only_sampled,
    which is neither trained nor judges, may have any head
    """
    ids = torch.arange(16, device=model.device)[None] % 2  # any text: all vocabularies have 0 and 1
    try:
        output = model(input_ids=ids, use_cache=True)
        own_logits = head_logits(model, model.base_model(input_ids=ids).last_hidden_state, None)
        error = (output.logits - own_logits).abs().max()
        layers = output.past_key_values.layers
        other_head = error > 5e-3 * output.logits.abs().max() and not only_sampled
    except (AttributeError, TypeError, KeyError, IndexError):  # it is built another way
        other_head, layers = True, []
    if layers and output.logits.isnan().any():
        raise ValueError(f"{model.name_or_path} is broken: its logits are NaN")
    kinds = {type(layer).__name__ for layer in layers}
    if other_head or kinds - {"DynamicLayer", "DynamicSlidingWindowLayer"}:
        raise ValueError(
            f"{model.config.model_type} models are not supported: their head is not a plain "
            "one, or their cache holds more than keys and values; use others"
        )
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) // ids.numel()


def load_models(config, run, path):
    """Load both models, the student from this path, and all that depends on them, into the run."""
    bf16 = config.dtype == "bfloat16" or config.dtype == "auto" and config.device.startswith("cuda")
    low = torch.bfloat16 if bf16 else torch.float32

    def load_model(path, dtype):
        # Loaded in bfloat16, not cast to it: a cast would round the rotary frequencies, too, and
        # put the angles at positions around 1,000 off by over .1 rad
        model = load(AutoModelForCausalLM, path, dtype=dtype, output_loading_info=True)
        return model.to(config.device)

    run.sampler = run.student = load_model(path, low)
    models = [run.sampler]
    run.stops = {"student": stop_ids(run.student, run.tokenizer)}
    tokens = max(run.tokenizer.get_vocab().values()) + 1
    if not config.eval_only:
        if bf16:
            # At a learning rate of 1e-6 most updates are too small to change a bfloat16 weight
            run.student = load_model(path, torch.float32)
        # Without --teacher: the initial student, also when resuming from a checkpoint
        teacher = config.teacher or config.student
        run.teacher_tokenizer = load(AutoTokenizer, teacher)
        tokens = compare_vocabularies(run.tokenizer.get_vocab(), run.teacher_tokenizer.get_vocab())
        run.teacher = load_model(teacher, low)
        models.append(run.teacher)
        run.stops["teacher"] = stop_ids(run.teacher, run.teacher_tokenizer)
    eos_ids, stop_id = run.stops["student"], None
    all_stops = set().union(*run.stops.values())
    if config.cold_start_steps:  # the student learns from it to stop as the teacher does
        eos_ids = all_stops
    if len(all_stops) > 1 and not config.no_merge_stops:
        # Into the student tokenizer's EOS if it has one: it is among all_stops
        eos_ids, stop_id = all_stops, run.tokenizer.eos_token_id
        if stop_id is None:
            stop_id = min(all_stops)

    run.cache_bytes = [check_model(model, config.eval_only) for model in models]
    # Both heads may have rows beyond the tokens that exist
    heads = [model.get_output_embeddings().weight.shape[0] for model in models]
    run.vocab_size = min(tokens, *heads)
    if config.overlap_k > run.vocab_size and not config.eval_only:
        raise ValueError(f"--overlap_k {config.overlap_k} is more than the {run.vocab_size} tokens")
    run.sampling = {
        "vocab_size": run.vocab_size,
        "eos_ids": eos_ids,
        "stop_id": stop_id,
        "temperature": config.temperature,
    }
    run.device = run.sampler.device
    run.autocast = torch.autocast(run.device.type, torch.bfloat16, enabled=bf16)


def prepare_training(config, run):
    """Put the student's optimizer into the run, and turn on gradient checkpointing if it is due."""
    on_gpu = config.device.startswith("cuda")
    # fused: the default on a GPU would make temporary copies of all weights
    run.optimizer = torch.optim.AdamW(run.student.parameters(), weight_decay=0.0, fused=on_gpu)
    checkpointed = config.gradient_checkpointing or on_gpu and not config.no_gradient_checkpointing
    if checkpointed:
        warnings.filterwarnings("ignore", ".*checkpointing.* is deprecated")  # its name changed
        run.student.gradient_checkpointing_enable({"use_reentrant": False})
        for module in run.student.modules():
            # backward puts recomputed layers into training mode, where OPT's would drop out
            for name, rate in list(vars(module).items()):
                if "drop" in name and type(rate) is float:
                    setattr(module, name, 0.0)
    run.kept_bytes = kept_for_backward(run.student, run.autocast, checkpointed)


def check_tokens(run):
    """ValueError where a prompt, or the end of a response, needs a token that is cut off."""
    needed = set().union(*run.stops.values())
    for problem in sum([*run.pools, *run.evals.values()], []):
        needed.update(problem["prompt_ids"], teacher_prompt(problem))
    last = max(needed)
    if last >= run.vocab_size:
        token = f"{run.tokenizer.convert_ids_to_tokens(last)!r} ({last})"
        raise ValueError(
            f"prompts or ends of responses have the token {token}, and the models know only the "
            f"first {run.vocab_size} tokens: use other models"
        )


def position_limit(model):
    """A model -> the length that it has positions for; what breaks beyond it, "" if nothing does"""
    config = model.config.get_text_config()
    names = ("max_position_embeddings", "max_seq_len")
    limit = next(filter(None, [getattr(config, name, None) for name in names]), math.inf)
    rotary = getattr(config, "rope_parameters", None)
    if not rotary:
        return limit, "they are a fixed table"
    for kind in (rotary, *rotary.values()):  # one for all layers, or one per layer type
        name = kind.get("rope_type", "") if isinstance(kind, dict) else ""
        if name == "longrope" or "dynamic" in name:
            changes = f"{name} factors change there, but keys already cached do not"
            return kind.get("original_max_position_embeddings") or limit, changes
    return limit, ""


def work_at_most(config, run):
    """Upper bounds for this process, lengths in tokens -> dict. Training: rows of a step, the
    longest prompt and response. Evaluation: answers per file, the longest question and answer.
    teacher_prompt, teacher_question: the longest that the teacher reads
    """
    trained, files = sum(run.pools, []), run.evals.values()
    graded = sum(files, [])
    cap = plan_rollout(config, config.max_steps, config.cap_max).max_length
    if config.extrapolate or config.cold_start_steps:  # both always sample to --max_new_tokens
        cap = config.max_new_tokens
    return {
        "rows": math.ceil(config.batch_size / NUM_RANKS) * config.num_generations,
        "prompt": max(map(prompt_length, trained), default=0),
        "teacher_prompt": max(map(len, map(teacher_prompt, trained)), default=0),
        "response": cap if run.pools else 0,
        "answers": [math.ceil(len(file) * config.eval_samples / NUM_RANKS) for file in files],
        "question": max(map(prompt_length, graded), default=0),
        "teacher_question": max(map(len, map(teacher_prompt, graded)), default=0),
        "answer": config.eval_max_new_tokens if graded else 0,
    }


def check_lengths(run):
    """Warn if the longest prompt and response exceed a model's positions, or if the student has no
    stop token -> lines. ValueError if the run would fail or go wrong
    """
    lines, most = [], run.most
    for role, prompt, response, flag in (
        ("student", "prompt", "response", "max_new_tokens"),
        ("student", "question", "answer", "eval_max_new_tokens"),
        ("teacher", "teacher_prompt", "response", "max_new_tokens"),
        ("teacher", "teacher_question", "answer", "eval_max_new_tokens"),
    ):
        model = getattr(run, role)
        limit, why = position_limit(model) if model else (math.inf, "")
        if most[prompt] + most[response] > limit:
            sizes = f"a prompt of {most[prompt]} and a response of {most[response]} tokens"
            beyond = f"{sizes} (--{flag}) are more than the {limit} positions of the {role}"
            if why:
                raise ValueError(f"{beyond}, and {why}: lower it")
            lines.append(beyond)
    if not run.sampling["eos_ids"]:
        lines.append("the student has no stop token: all its responses go on to the cap")
    return lines


def kept_for_backward(student, autocast, checkpointed):
    """The bytes per token that the student's forward keeps for backward."""
    # At two widths: the weights, which do not grow with the tokens, cancel in the difference
    sizes, kept = [], {}

    def keep(tensor):  # by address: several operations may keep the same tensor
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage

    for width in (16, 32):
        ids = torch.ones(1, width + 1, dtype=torch.long, device=student.device)  # any text
        with autocast, torch.autograd.graph.saved_tensors_hooks(keep, keep):
            states = hidden_states(student, ids, torch.ones_like(ids), width)
        sizes.append(sum(storage.nbytes() for storage in kept.values()))
        kept.clear()
    all_layers = (sizes[1] - sizes[0]) // 16  # weights and their casts are in both
    if not checkpointed:
        return all_layers
    # Checkpointed: the input of each layer, and all of one layer while it is recomputed
    layers = student.config.get_text_config().num_hidden_layers
    return layers * states.shape[-1] * states.element_size() + all_layers // layers


def memory_plan(
    student, teacher, *, bf16, rows, columns, vocab, cache=0, segment=0, judged=0, kept=0, states=0
):
    """Memory that a GPU needs -> the parts of the phases rollout and update, two dicts of bytes.

    student, teacher: parameter counts. rows: at once, of so many columns each, prompt and response.
    segment: columns that the teacher scores at once. Bytes per token: cache, in the caches; judged,
    in a pass of the teacher; kept, for backward. states: bytes of the teacher's states of a step.
    """
    low = 2 * student if bf16 else 0  # bfloat16: the sampler's weights; autocast's, in the update
    read = min(rows * segment, 2**15)  # tokens per pass of hidden_states
    judged_logits = min(read * vocab, LOGITS_AT_ONCE)
    learned_logits = min(rows * columns * vocab, LOGITS_AT_ONCE)
    always = {
        "weights": 4 * student + low + (2 if bf16 else 4) * teacher,
        "Adam's moments": 8 * student,
        "hidden states": states,
    }
    rollout = {"caches": rows * columns * cache, "judging": read * judged + 10 * judged_logits}
    update = {
        "gradient": 4 * student,
        "activations": rows * columns * kept + low,
        "logits": 32 * learned_logits,  # both models', with losses, measures, gradient
    }
    return {"rollout": {**always, **rollout}, "update": {**always, **update}}


def plan_phases(config, run):
    """What memory_plan is to be called with -> {flag: (phase, most rows, arguments, title)}. The
    last key is no flag: it is --eval_batch_size where the teacher answers
    """
    most, bf16 = run.most, run.sampler is not run.student
    states = 0  # bytes of the teacher's hidden states of a step
    models = {"student": 0, "teacher": 0, "bf16": bf16, "vocab": run.vocab_size}
    if run.teacher:
        shape = run.teacher.config.get_text_config()
        wide = getattr(shape, "intermediate_size", 4 * shape.hidden_size)
        models["student"] = run.student.num_parameters()
        models["teacher"] = run.teacher.num_parameters()
        models["judged"] = 6 * wide + 14 * shape.hidden_size  # bytes per token
        states = most["rows"] * most["response"] * shape.hidden_size * (2 if bf16 else 4)
    evaluation = {**models, "segment": most["answer"]}
    step = {**models, "states": states}

    # A rollout keeps a cache of both models: counted as if both read the longer prompt
    longer = max(most["prompt"], most["teacher_prompt"])
    asked = max(most["question"], most["teacher_question"])
    rollout = {**step, "columns": longer + most["response"], "cache": sum(run.cache_bytes)}
    rollout["segment"] = Plan(max(most["response"], 1), config.segment_length).borders()[0]
    update = {**step, "columns": most["prompt"] + most["response"], "kept": run.kept_bytes}
    columns = most["question"] + most["answer"]
    if config.extrapolate:  # its tries are evaluations on training prompts
        columns = max(columns, update["columns"])
    student = {**evaluation, "columns": columns, "cache": run.cache_bytes[0]}
    teacher = {**evaluation, "columns": asked + most["answer"], "cache": run.cache_bytes[-1]}
    update_rows, eval_rows = (most["rows"], 256) if run.device.type == "cuda" else (4, 32)
    return {
        "rollout_batch_size": ("rollout", most["rows"], rollout, "rollout"),
        "micro_batch_size": ("update", update_rows, update, "update"),
        "eval_batch_size": ("rollout", eval_rows, student, "evaluation"),
        "teacher_eval_batch_size": ("rollout", eval_rows, teacher, "evaluation of the teacher"),
    }


def use_less(flags, flag, count):
    """What to change if count rows at once, set by this flag, need too much memory -> str"""
    # The candidates of a prompt are sampled together
    least = flags["num_generations"] if flag == "rollout_batch_size" else 1
    if count > least:
        return f"halve --{flag.removeprefix('teacher_')}, now {count}"
    if flag == "micro_batch_size" and flags["no_gradient_checkpointing"]:
        return "leave out --no_gradient_checkpointing"
    cap = "--max_new_tokens"
    if "eval" in flag:
        cap = "--eval_max_new_tokens, in an extrapolation --max_new_tokens"
    one = "the candidates of a single prompt are" if least > 1 else "a single prompt is"
    return f"{one} too long for it: lower {cap}"


def rows_that_fit(config, run):
    """Rows at once for each batch-size flag -> dict: the flag's value. If 0: on resume that of the
    checkpoint if it fits, else the most that fit, up to the bound of plan_phases. ValueError if
    they do not fit.
    """
    free = math.inf
    if run.device.type == "cuda":
        torch.cuda.empty_cache()  # else what torch holds for later would not count as free
        free = torch.cuda.mem_get_info(run.device)[0]
    rows = {}
    for flag, (phase, fits, sizes, _) in plan_phases(config, run).items():

        def left(count, phase=phase, sizes=sizes):
            """Bytes left free by so many rows; the weights are loaded already"""
            plan = memory_plan(**sizes, rows=count)[phase]
            return free - (sum(plan.values()) - plan["weights"])

        # Keep a fifth of what is free in reserve for what is not planned
        while fits > 1 and left(fits) < 0.2 * left(0):
            fits -= 1
        resumed = run.rows_at_once.get(flag, 0)  # of the checkpoint
        if resumed and left(resumed) >= 0:  # else the GPU is smaller now
            fits = resumed
        given = getattr(config, flag.removeprefix("teacher_"))
        least = config.num_generations if flag == "rollout_batch_size" else 1
        count = max(given or fits, least) // least * least  # a prompt's candidates stay together
        if left(count) < 0:
            instead = use_less(vars(config), flag, count)
            if left(0) < 0:  # whatever the rows
                instead = "halve --batch_size, for fewer hidden states of the teacher"
            instead += ", or use smaller models"
            if left(0) + sizes.get("states", 0) < 0:
                instead = "the models alone take more than there is: use smaller ones"
            lacks = f"lacks {tqdm.format_sizeof(-left(count))}B of GPU memory"
            raise ValueError(
                f"{count} rows of {sizes['columns']} tokens do not fit: by the plan the {phase} "
                f"{lacks}; {instead}"
            )
        rows[flag] = min(gather([count]))
        if rows[flag] < resumed and not given:
            told = f"--{flag.removeprefix('teacher_')} was {resumed} and is {rows[flag]}"
            note(f"fewer rows fit on this GPU: {told}")
    return rows


def try_update(config, run):
    """Run an update on dummy rows, as many and as long as they can get, at learning rate 0: what
    would run out of memory hours later does so now.
    """
    run.phase = "an update of the longest rows"
    rows = min(run.rows_at_once["micro_batch_size"], run.most["rows"])
    T = run.most["response"]
    prompts = [[0] * run.most["prompt"]] * rows
    batch = empty_rollout(prompts, prompts, T, 0, run.device)
    for name in ("response_mask", "loss_mask", "token_weight"):
        batch[name] = torch.ones_like(batch["response_mask"])
    # As many of the teacher's hidden states as a step has
    width = run.teacher.config.get_text_config().hidden_size
    states = torch.zeros(run.most["rows"], T, width, dtype=run.teacher.dtype, device=run.device)
    batch["teacher_hidden"] = states
    for _ in range(2):  # the second with Adam's moments in memory: the first creates them
        train_step(run.student, run.optimizer, batch, 0.0, **update_settings(config, run))
    run.optimizer.state.clear()  # leave no trace of these steps
    run.optimizer.zero_grad()


def columns_at_most(run):
    """The columns, sampled one after another, that a step and an evaluation take at most -> dict"""
    rows, most = run.rows_at_once, run.most

    def answering(flag):
        return sum(math.ceil(count / rows[flag]) for count in most["answers"]) * most["answer"]

    return {
        "step": math.ceil(most["rows"] / rows["rollout_batch_size"]) * most["response"],
        "student": answering("eval_batch_size"),
        "teacher": answering("teacher_eval_batch_size"),
    }


def evaluated_first(config, run):
    """What to evaluate before the first step. By columns, not by seconds, to be reproducible."""
    if not run.evals or config.eval_first == "none":
        return []
    columns = columns_at_most(run)
    teachers = ["teacher"]
    if config.teacher_prompt_template:
        teachers.append("prompted_teacher")
    both = columns["student"] + len(teachers) * columns["teacher"]
    cheap = both < 0.1 * config.max_steps * columns["step"]
    if config.eval_first == "both" or config.eval_first == "auto" and cheap:
        return [*teachers, "student"]
    return ["student"]


def seconds_at_most(config, run, out):
    """The seconds of steps and evaluations if every response reaches its cap and every token costs
    what it did in out, a short rollout -> dict
    """
    B, T = out["response_ids"].shape
    per_column = (out["seconds"] - out["teacher_seconds"]) / T  # per column, the student
    per_judged = out["teacher_seconds"] / (B * T)  # per token, the teacher
    size = run.teacher.num_parameters() / run.student.num_parameters()
    per_learned = 4 * per_judged / size  # per token: forward, again if recomputed, backward is two
    columns, most = columns_at_most(run), run.most

    def column_seconds(flag):
        """Seconds per column of an evaluation; on a GPU they are taken not to depend on its rows"""
        rows = min(run.rows_at_once[flag], max(most["answers"], default=0))
        return per_column * max(1, rows / B) if run.device.type == "cpu" else per_column

    tokens = most["response"] * (per_judged + per_learned) + most["prompt"] * per_learned
    step = columns["step"] * per_column + most["rows"] * tokens
    student = columns["student"] * column_seconds("eval_batch_size")
    teacher = columns["teacher"] * size * column_seconds("teacher_eval_batch_size")
    first = evaluated_first(config, run)
    later = math.ceil(config.max_steps / (config.eval_every or config.max_steps))
    of_student = later + first.count("student")
    of_teacher = len(first) - first.count("student")
    return {
        "a step": step,
        "an evaluation of the student": student,
        "one of the teacher": teacher,
        "the run": config.max_steps * step + of_student * student + of_teacher * teacher,
    }


def plan_lines(config, run, out):
    """The memory and time a run takes at most; the time extrapolates a short rollout -> lines"""
    device = run.device.type
    if device == "cuda":
        free, total = map(tqdm.format_sizeof, torch.cuda.mem_get_info(run.device))
        device += f", {free}B of {total}B free"
    lines = [f"plan for {device}"]
    for flag, (phase, _, sizes, title) in plan_phases(config, run).items():
        if not sizes["columns"]:  # there is no file to evaluate on
            continue
        rows = run.rows_at_once[flag]
        plan = memory_plan(**sizes, rows=rows)[phase]
        plan["total"] = sum(plan.values())
        parts = [f"{part} {tqdm.format_sizeof(size)}B" for part, size in plan.items() if size]
        told = f"{title}, {rows} rows at once of {sizes['columns']} tokens"
        lines.append(f"{told}: {', '.join(parts)}")
    seconds = seconds_at_most(config, run, out)
    times = [f"{what} {tqdm.format_interval(took)}" for what, took in seconds.items()]
    first = " and ".join(evaluated_first(config, run)) or "nobody"
    return [
        *lines,
        "time at most, if all tokens cost what the first did, without cold start, probes and "
        f"extrapolation: {', '.join(times)}",
        f"evaluated before step 1, see --eval_first: {first}",
    ]


def own_prompt_lines(config, run, out, log_prob):
    """How --teacher_prompt_template changes the teacher, before any training -> lines

    log_prob: the teacher's mean log-prob of the responses in out, given its own prompts.
    """
    alike = torch.cat(response_log_probs(run.teacher, out, **run.sampling)).mean()
    first = run.tokenizer.decode(run.pools[0][0]["teacher_prompt_ids"])
    lines = [
        f"the teacher's own first prompt: {first!r}",
        f"the same tokens, teacher's mean log-prob: {log_prob:.2f} after its own prompt, "
        f"{alike:.2f} after the student's, a gap of {log_prob - alike:+.2f} nats a token; "
        "0 where its own prompt adds nothing",
    ]
    if not config.teacher:
        size = run.teacher.get_memory_footprint(return_buffers=False)
        told = "the teacher is a frozen copy of the initial student: one more copy of its weights"
        lines.append(f"{told}, {tqdm.format_sizeof(size)}B")
    return lines


def preflight(config, run):
    """What to check before paying for a run, and what would silently ruin it -> list of lines"""
    # Can the answers be graded, and does the student's text look likely to the teacher?
    golds = [problem["answer"] for problem in run.answered[:500]]
    readable = sum(gold.isdigit() or ask_math_verify(gold, None) for gold in golds)
    problems = draw_prompts(config, run, step=1)[: run.rows_at_once["rollout_batch_size"]]
    plan = Plan(min(32, config.max_new_tokens))
    settings = rollout_settings(config, run, problems)
    out = rollout_in_groups(run.sampler, run.teacher, plan=plan, **settings)
    log_q = torch.cat(response_log_probs(run.teacher, out, name="teacher_prompt", **run.sampling))
    if log_q.isnan().any():
        raise FloatingPointError("the teacher's log-prob of a sampled token")
    overlap = out["overlap"][out["response_mask"]].mean()

    others = {"forward_kl": "KL(teacher || student)", "jsd": f"a mixture by {config.beta}"}
    divergence = others.get(config.loss, "KL(student || teacher)")
    lines = [
        f"method {config.method}; loss {config.loss} of {divergence}, mean over a step's tokens",
        f"data: {sum(map(len, run.pools))} training prompts, without those that are too long; "
        f"{readable} of the first {len(golds)} answers can be read; "
        f"first prompt: {run.tokenizer.decode(run.pools[0][0]['prompt_ids'])!r}",
        f"first {len(log_q)} sampled tokens: teacher's mean log-prob {log_q.mean():.2f}, "
        f"top-{config.overlap_k} overlap {overlap:.2f}",
    ]
    if config.teacher_prompt_template:
        lines += own_prompt_lines(config, run, out, log_q.mean())

    # Do the two have the same stop tokens, and the same chat template?
    for role in ("student", "teacher"):
        model = getattr(run, role)
        lines.append(
            f"{role}: {model.config.model_type}, {model.num_parameters() / 1e6:.1f}M parameters, "
            f"{model.get_output_embeddings().weight.shape[0]} rows cut to {run.vocab_size}, "
            f"stops at {sorted(run.stops[role])}"
        )
    lines += [f"warning: {line}" for line in check_lengths(run)]
    if log_q.mean() < -3:
        lines.append("warning: the teacher finds the student's text very unlikely; compare prompts")
    stop_id = run.sampling["stop_id"]
    if stop_id is not None:
        lines.append(
            f"stops: {sorted(run.sampling['eos_ids'])} count as one, written as {stop_id}; "
            "see --no_merge_stops"
        )
    elif run.stops["student"] != run.stops["teacher"]:
        lines.append("warning: other stops than the teacher's: the student may unlearn to stop")
    other = run.tokenizer.chat_template != run.teacher_tokenizer.chat_template
    if other and not config.no_chat_template:
        lines.append("warning: the chat templates differ; both models are given the student's")
    return lines + plan_lines(config, run, out)


# --------------------------------------------------------------------------------------------------
# 16. Files, checkpoints, endings


class Note(UserWarning):
    """What main shows whatever PYTHONWARNINGS says."""


def note(text):
    """Tell the user. main prints it as "note: ...", each text once in a run, on rank 0 only"""
    warnings.warn(text, Note, stacklevel=3)


def say(*lines, file=None):
    """Print lines, with "?" for what the terminal cannot show. A closed terminal stops no run."""
    file = file or sys.stdout  # None if it was closed before the start: then nothing is printed
    encoding = getattr(file, "encoding", None) or "utf-8"
    try:
        # Not tqdm.write: a signal while it takes its lock would end in a traceback
        print("\n".join(lines).encode(encoding, "replace").decode(encoding), file=file, flush=True)
    except OSError:  # a closed pipe (| head -1), a full disk: the flush at exit would fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


@contextlib.contextmanager
def own_folder(config):
    """Create --output_dir, lock it for this run, and afterwards remove the folders made that are
    empty. ValueError if another run has locked it. The lock ends with the process.
    """
    path, made = os.path.abspath(config.output_dir), []
    while not os.path.exists(path):
        made.append(path)
        path = os.path.dirname(path)
    os.makedirs(config.output_dir, exist_ok=True)
    folder = os.open(config.output_dir, os.O_RDONLY)
    try:
        if not config.eval_only:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        told = f"--output_dir {config.output_dir} is in use: wait for that run or give another"
        raise ValueError(told) from None
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(folder)
        with contextlib.suppress(OSError):  # it is not empty
            for path in made:
                os.rmdir(path)


def append_json(path, *records):
    """Append lines to a jsonl file. NaN, the mean of nothing, becomes null: JSON has no NaN."""
    records = json.loads(json.dumps(records), parse_constant=lambda _: None)
    # In one write: a kill hardly ever leaves half of the lines, or half a line
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))


def open_tracker(kind, folder, flags, step):
    """TensorBoard or Weights & Biases, imported only here -> log(dict of numbers, step), or None"""
    if kind == "wandb":
        import wandb

        return wandb.init(project="opd.py", dir=folder, config=flags).log
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(folder, purge_step=step)

        def log(numbers, step):
            for name, value in numbers.items():
                board.add_scalar(name, value, step)
            board.flush()  # every time: at exit its writer thread loses the rest

        return log
    return None


def step_of(path):
    """The step in a checkpoint folder's name, None for any other name"""
    name = re.fullmatch(r"checkpoint-(\d+)", os.path.basename(os.path.normpath(path)))
    return int(name[1]) if name else None


def list_checkpoints(folder):
    """The paths of the checkpoints in a folder, which need not exist, sorted by step"""
    paths = glob.glob(f"{glob.escape(folder)}/checkpoint-*")
    return sorted([path for path in paths if step_of(path) is not None], key=step_of)


def last_checkpoint(config):
    """The path of the last checkpoint in --output_dir, "" without one"""
    return (list_checkpoints(config.output_dir) or [""])[-1]


def remove(path):
    """Remove a folder or a link, if it exists; a file stays"""
    if os.path.islink(path):
        os.unlink(path)
    shutil.rmtree(path, ignore_errors=True)


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


SAVED = "data step graded rows_at_once cap misses anchor untried counts flags".split()


def save_checkpoint(config, run):
    """Save the run's state and files to checkpoint-<step>/, which gets its name when complete; not
    if they are saved already. Only the latest checkpoints stay. OSError, with nothing left behind,
    if it cannot be written or a number in it is not finite.
    """
    folder = f"{config.output_dir}/checkpoint-{run.step}"
    partial = f"{config.output_dir}/checkpoint.partial"
    if not is_main():
        return
    remove(partial)  # left by an interrupted save or removal
    # One that was saved by a signal lacks the tries or the evaluation after its step
    now = [run.step, run.graded, bool(run.untried)]
    if run.saved != now or not os.path.exists(folder):
        write_checkpoint(run, folder, partial)
        run.saved = now
    for old in list_checkpoints(config.output_dir)[: -config.keep_checkpoints]:
        os.replace(old, partial)  # rename first: a kill must not leave half a checkpoint
        remove(partial)


def write_checkpoint(run, folder, partial):
    """Write a checkpoint under the name partial, then rename it to folder. OSError if it fails."""
    try:
        parts = [run.student.state_dict(), run.anchor, *run.optimizer.state.values()]
        if not all(tensor.isfinite().all() for part in parts for tensor in part.values()):
            raise FloatingPointError("not all weights and moments of Adam are finite")
        # Its generation config has the stops that the student was trained with, and nothing else:
        # transformers may refuse to save what shipped beside them
        stops = sorted(run.sampling["eos_ids"])
        run.student.generation_config = GenerationConfig(eos_token_id=stops or None)
        run.student.save_pretrained(partial)
        run.tokenizer.save_pretrained(partial)
        state = {name: getattr(run, name) for name in SAVED}
        state["optimizer"] = run.optimizer.state_dict()
        torch.save(state, f"{partial}/trainer_state.pt")
        for path in run.files:
            shutil.copy(path, partial)
        names = glob.glob("*.*", root_dir=partial)  # no folders
        digests = {name: digest(f"{partial}/{name}") for name in names}
        append_json(f"{partial}/digests.json", digests)
    except Exception as error:  # torch and safetensors raise their own errors for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{folder} cannot be written: {error}") from None
    # An earlier one of this step. A kill between the two renamings leaves only the .old one, which
    # --resume has to name
    earlier = f"{folder}.old" if os.path.exists(folder) else ""
    if earlier:
        remove(earlier)
        os.replace(folder, earlier)
    os.replace(partial, folder)  # from here on it is a checkpoint
    if earlier:
        remove(earlier)


def read_checkpoint(folder, flags):
    """The state in a checkpoint -> dict. ValueError if any of its files has changed since it was
    saved, or if it was made with other flags.
    """
    # Even rollout_batch_size, though samples, and the groups to select in, change with it
    may_change = (
        "resume output_dir max_steps save_every keep_checkpoints device micro_batch_size report_to "
        "eval_batch_size rollout_batch_size gradient_checkpointing no_gradient_checkpointing "
        "eval_first no_view"
    ).split()
    try:
        for name, saved in read_records(f"{folder}/digests.json")[0].items():
            if digest(f"{folder}/{name}") != saved:
                raise ValueError(f"{name} is not as it was saved; resume from another")
        state = torch.load(f"{folder}/trainer_state.pt", map_location="cpu", weights_only=True)
        if step_of(folder) not in (None, state["step"]):
            raise ValueError(f"it is of step {state['step']}; rename it")
    except Exception as error:  # a truncated digests.json raises other errors
        raise ValueError(f"--resume {folder} is no whole checkpoint: {error}") from None

    def without_folders(name, value):  # folders may move; models and files keep their base names
        if name in ("student", "teacher"):
            return os.path.basename(os.path.normpath(value))
        if name in ("train_file", "eval_file"):
            return [os.path.basename(path) for path in value]
        return json.dumps(value)  # () is as good as []

    changed = []
    for name, value in flags.items():
        before = state["flags"].get(name)
        if name not in may_change and without_folders(name, before) != without_folders(name, value):
            changed.append(f"--{name} was {before} and is {value}")
    if changed:
        raise ValueError(f"--resume {folder} would be another run: {'; '.join(changed)}")
    return state


def prepare_files(config, run, checkpoint):
    """Start a new run with empty files, a resumed one with the checkpoint's. What another run, or
    later steps, left in --output_dir is renamed to .old.
    """
    os.makedirs(config.output_dir, exist_ok=True)  # an --eval_only run removes it if empty
    # What to rename: everything of another run; of this run, what came after the checkpoint
    pages, checkpoints = [f"{config.output_dir}/rollouts.html"], list_checkpoints(config.output_dir)
    # Not f"{checkpoint}/..": it may be a link
    around = os.path.dirname(os.path.abspath(checkpoint))
    same_folder = checkpoint and os.path.samefile(around, config.output_dir)
    if same_folder:
        pages, checkpoints = [], [path for path in checkpoints if step_of(path) > run.step]
    files = list(filter(os.path.exists, run.files + pages))
    if not any(map(os.path.getsize, files)):  # of a start that failed: what is put aside stays
        files = []
    if files and not same_folder:
        note(f"the files of the run that was in {config.output_dir} end in .old now")
    for path in files + checkpoints:
        remove(f"{path}.old")
        os.replace(path, f"{path}.old")
    # What takes its place
    for path in run.files:
        if checkpoint:
            shutil.copy(f"{checkpoint}/{os.path.basename(path)}", path)
        else:
            open(path, "w").close()


# Of a terminal, of schedulers that end a job, of a limit on CPU time
SIGNALS = [getattr(signal, f"SIG{name}") for name in "INT TERM HUP USR1 USR2 XCPU".split()]


# The signals that came. Noted here, because Python loses an exception raised in a __del__
STOPPED = []


def interrupt(number, _):
    """The signal handler: stop at once. whole_step replaces it with one that waits."""
    STOPPED.append(number)
    if len(STOPPED) == 1:  # a second one must not disturb the last checkpoint
        raise KeyboardInterrupt(number)


def ignore(number, _):
    """A signal handler that does nothing. After SIG_IGN Python may report a signal as lost"""


@contextlib.contextmanager
def on_signals(act):
    """A block in which act handles SIGNALS; under nohup SIGHUP stays ignored."""
    before = {}
    try:
        with contextlib.suppress(ValueError):  # in another thread than the main one
            for number in SIGNALS:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    before[number] = signal.signal(number, act)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def whole_step(run):
    """A block that is done whole or not at all: signals wait for its end, and so does one that was
    lost before (see STOPPED). If it fails, its lines are removed from the run's files, and
    run.halfway is True: the state must not be saved.
    """
    files = run.files if is_main() else []
    sizes = {path: os.path.getsize(path) for path in files if os.path.exists(path)}
    with on_signals(lambda number, _: STOPPED.append(number)):
        try:
            yield
        except BaseException:
            run.halfway = True
            for path in filter(os.path.exists, files):
                os.truncate(path, sizes.get(path, 0))
            raise
    if STOPPED:
        raise KeyboardInterrupt(STOPPED[0])


@torch.no_grad()
def suspect(run):
    """Which model's logits are not finite, and on which problem, for the error message."""
    for problem in sum([*run.pools, *run.evals.values()], [])[:8]:
        asked = {"student": problem["prompt_ids"], "teacher": teacher_prompt(problem)}
        for role, prompt in asked.items():
            ids, model = torch.tensor([prompt], device=run.device), getattr(run, role)
            if model and model(input_ids=ids).logits[0, -1].softmax(-1).isnan().any():
                return f"; the {role}'s logits are not, on the problem {problem['problem'][:60]!r}"
    return ""


def explain(error, phase, flags):
    """An error -> a line for the user and the exit status; "" if it is a bug of the program. flags:
    those of the run, with the rows at once in use; empty until the run is open
    """
    text = " ".join(str(error).split())[:400]
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 128 + (error.args or [signal.SIGINT])[0]
    memory = (
        "MemoryError|out of memory|allocate memory|calloc async|"
        r"\w+_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)"  # of cuBLAS, cuDNN, ...
    )
    if re.search(memory, f"{type(error).__name__} {text}"):
        told = f"out of memory in {phase}"
        if phase == "set-up":
            return f"{told}: {text}" if text else told, 2
        if "rollouts.html" in phase:
            return f"{told}; there is --no_view", 2
        flag = "rollout_batch_size"
        if "update" in phase:
            flag = "micro_batch_size"
        elif "by the teacher" in phase:
            flag = "teacher_eval_batch_size"
        elif re.match("evaluation|extrapolation", phase):
            flag = "eval_batch_size"
        return f"{told}; {use_less(flags, flag, flags[flag])}", 2
    # Sampling from NaN raises a RuntimeError in torch; on a GPU it is a device-side assert
    if isinstance(error, FloatingPointError) or re.search("probability tensor|device-side", text):
        return f"{phase} is not finite: {text}", 2
    mistake = isinstance(error, (ValueError, ImportError)) and not flags  # in set-up
    # Of a full disk safetensors has an error of its own
    if mistake or isinstance(error, OSError) or "I/O error" in text:
        module, path = getattr(error, "name", None), getattr(error, "filename", None)
        if module:
            text += f"; pip install {module.split('.')[0]}"
        elif path and "No space" not in text:
            text += "; check the path"
        return text, 2
    if dist.is_initialized() and re.search("peer|NCCL", text):
        return "another process has ended", 1
    return "", 1


# --------------------------------------------------------------------------------------------------
# 17. What the loop calls: settings, cost accounting, evaluations, EffOPD, the cold start

STEP_LINE = (
    "step {step:5} | loss {loss:8.4f} | kl {reverse_kl:7.4f} | overlap {overlap_ratio:.3f} | "
    "kept {kept_fraction:4.0%} | length {response_length:7.1f} | stopped {stopped_fraction:4.0%} | "
    "norm {grad_norm:6.2f} | {generated_tokens:11,} tokens"
)


def rollout_settings(config, run, problems):
    """The arguments of rollout_in_groups: the prompts of both models, sizes, how to sample"""
    return {
        "prompts": [problem["prompt_ids"] for problem in problems],
        "for_teacher": [teacher_prompt(problem) for problem in problems],
        "rows_at_once": run.rows_at_once["rollout_batch_size"],
        "overlap_k": config.overlap_k,
        **run.sampling,
    }


def token_loss(config, student_logits, teacher_logits, response_ids):
    """The per-token loss that --loss names. (n, V), (n, V), (n,) -> (n,)"""
    if config.loss == "reverse_kl":
        return reverse_kl(student_logits, teacher_logits)
    if config.loss == "forward_kl":
        return forward_kl(student_logits, teacher_logits)
    if config.loss == "jsd":
        return jsd(student_logits, teacher_logits, config.beta)
    if config.loss == "topk":
        on_support = reverse_kl_tail if config.tail else reverse_kl_topk
        return on_support(student_logits, teacher_logits, config.overlap_k, config.support)
    return reverse_kl_sampled(student_logits, teacher_logits, response_ids, config.baseline)


def update_settings(config, run):
    """The arguments of backward: the heads, the loss of --loss, what is logged per token, sizes"""

    def measure(student_logits, teacher_logits, response_ids, log_probs):
        measures = alignment(student_logits, teacher_logits, None, config.overlap_k)
        # log p now against log p as sampled: on-policy, only caches and bfloat16 make them differ
        now = student_logits.log_softmax(-1).gather(-1, response_ids[:, None])[:, 0]
        return {**measures, "sampling_mismatch": (now - log_probs).abs()}

    return {
        "student_head": functools.partial(head_logits, run.student, **run.sampling),
        "teacher_head": functools.partial(head_logits, run.teacher, **run.sampling),
        "token_loss": functools.partial(token_loss, config),
        "measure": measure,
        "chunk_tokens": tokens_at_once(run.vocab_size),
        "micro_batch_size": run.rows_at_once["micro_batch_size"],
        "autocast": run.autocast,
    }


def forward_flops(model, lengths):
    """Floating-point operations of one forward over rows of these lengths (B,) -> float: the sum of
    2 N L + 2 n_layer d_model L^2, N parameters. Decoding is counted as one forward and an update as
    three, without what shared prompts save and checkpointing adds.
    """
    config, L = model.config.get_text_config(), lengths.double()
    weights = 2 * model.num_parameters() * L
    attention = 2 * config.num_hidden_layers * config.hidden_size * L**2
    return float((weights + attention).sum())


def summarise(answers, num_samples):
    """Graded answers, sorted by problem, num_samples of each -> dict of metrics

    avg_at_n  the share of right answers to a problem, averaged over problems    [Rethinking-OPD]
    se        its standard error, std over problems / sqrt(num_problems), as if problems were drawn
              anew: the difference of two models on the same problems usually has a smaller one
    """

    def values(key):
        return [answer[key] for answer in answers]

    def mean(key):
        return float(np.mean(values(key)))

    # A row per problem, a column per answer
    correct = np.array(values("correct")).reshape(-1, num_samples)
    by_problem = correct.mean(1)
    of_stopped = [answer["correct"] for answer in answers if not answer["truncated"]]
    error = math.nan
    if len(correct) > 1:
        # Not over answers: those to one problem are not independent evidence
        error = float(by_problem.std(ddof=1) / math.sqrt(len(correct)))
    return {
        "avg_at_n": float(by_problem.mean()),
        "se": error,
        "pass_at_n": float(correct.any(1).mean()),
        "n": num_samples,
        "num_problems": len(correct),
        "stopped_fraction": len(of_stopped) / len(answers),
        "answered_fraction": 1 - mean("no_box"),
        "avg_of_stopped": float(np.mean(of_stopped)) if of_stopped else math.nan,
        "truncated_fraction": mean("truncated"),
        "no_box_fraction": mean("no_box"),
        "mean_length": mean("length"),
        "repetition": mean("repetition"),
        "mean_reward": mean("reward"),
        "auroc": auroc(values("reward"), values("correct")),
    }


def repetition(ids):
    """The share of the 4-grams of a list of ids that occurred earlier in it; near 1 in a loop"""
    grams = list(zip(ids, ids[1:], ids[2:], ids[3:]))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def row_facts(config, batch):
    """What is logged per row of a step, for the rows of all processes -> dict of (B,)"""
    mask, overlap = batch["response_mask"], batch["overlap"]
    reliability = drift_weights(overlap, mask, config.drift_threshold, config.w_drop)
    repeated = [repetition(ids[valid].tolist()) for ids, valid in zip(batch["response_ids"], mask)]
    facts = {
        "prompt_length": batch["prompt_mask"].sum(-1),
        "teacher_prompt_length": batch["teacher_prompt_mask"].sum(-1),
        "response_length": mask.sum(-1),
        "trained_length": batch["loss_mask"].sum(-1),
        "reliable_length": reliable_length(reliability, mask),
        # The others were stopped by the method before they could end
        "stopped_fraction": torch.where(batch["kept"], batch["ended"].float(), math.nan),
        "truncated_fraction": ~batch["ended"],
        "kept_fraction": batch["kept"],
        "repetition": torch.tensor(repeated),
    }
    return concatenate(gather([{name: fact.cpu().double() for name, fact in facts.items()}]))


def step_metrics(run, batch, rows, update):
    """Count what a step cost -> all its metrics. rows: what row_facts returned"""
    length, trained = rows["response_length"], rows["trained_length"]
    context, trained_context = rows["prompt_length"] + length, rows["prompt_length"] + trained
    judged = rows["teacher_prompt_length"] + length
    sampled = int(length.sum())
    run.count(generated_tokens=sampled, teacher_tokens=sampled, trained_tokens=int(trained.sum()))
    run.count(flops=forward_flops(run.student, context) + forward_flops(run.teacher, judged))
    run.count(flops=3 * forward_flops(run.student, trained_context[trained > 0]))
    means = {name: fact.nanmean().item() for name, fact in rows.items()}
    # Over the rows of all processes, like the means
    overlaps = batch["overlap"].where(batch["response_mask"], math.nan).cpu()
    # Cloned: a view is sent with all of the tensor that it is of
    overlaps = gather([row.clone() for row in overlaps])
    overlap = pad_sequence(overlaps, batch_first=True, padding_value=math.nan)
    return {
        **update,
        **run.standing(),
        **means,
        # Over all sampled tokens, not only those trained on
        "overlap_ratio": overlap.nanmean().item(),
        "overlap_by_position": overlap_by_position(overlap, ~overlap.isnan()),
        "time_rollout": batch["seconds"] - batch["teacher_seconds"],
        "time_teacher": batch["teacher_seconds"],
        "time_validation": 0.0,
        "peak_memory_gb": peak_memory(run.device),
    }


def evaluate_and_save(config, run):
    """Do the evaluation and the checkpoint that are due after this step, if not done yet."""

    def due(every):  # 0: only at the end
        return run.step >= config.max_steps or every and run.step % every == 0

    if run.step > run.graded and due(config.eval_every):
        if run.shown:
            write_view(config, run)
        evaluate_files(config, run, "student")
    if run.step and due(config.save_every):
        save_checkpoint(config, run)
    peak_memory(run.device)  # the next step's begins here


def grade(config, run, model, problems, phase="evaluation", **settings):
    """evaluate with the values of the flags, which settings override, and with this model's stop
    ids and rows at once -> its metrics and answers
    """
    run.phase = f"{phase} after step {run.step}"
    eos_ids, flag = run.sampling["eos_ids"], "eval_batch_size"
    if model is run.teacher:
        run.phase += " by the teacher"
        eos_ids, flag = eos_ids | run.stops["teacher"], "teacher_eval_batch_size"
    arguments = {
        **run.sampling,
        "eos_ids": eos_ids,
        "temperature": config.eval_temperature,
        "top_p": config.eval_top_p,
        "max_length": config.eval_max_new_tokens,
        "segment_length": config.segment_length,
        "seed": config.seed,
        "rows_per_batch": run.rows_at_once[flag],
        **settings,
    }
    return evaluate(model, run.tokenizer, problems, **arguments)


def evaluate_files(config, run, who):
    """Evaluate who on every --eval_file, print and record the results -> {file: metrics}

    The teacher gets the student's prompts. The prompted_teacher gets its own, on the problems that
    have the fields for them.
    """
    began = clock(run.device)
    # Which model answers, which one scores the answers, and with what prompts
    model, judge_model = run.sampler, run.teacher
    template = config.prompt_template
    if who in ("teacher", "prompted_teacher"):
        model, judge_model = run.teacher, None
    if who == "prompted_teacher":
        template = config.teacher_prompt_template
    results, lines = {}, []
    for name, problems in run.evals.items():
        if who == "prompted_teacher":
            known = [problem for problem in problems if "teacher_prompt_ids" in problem]
            problems = [{**own, "prompt_ids": own["teacher_prompt_ids"]} for own in known]
        if not problems:
            continue
        settings = {"num_samples": config.eval_samples, "title": f"{who}, {name}"}
        metrics, answers = grade(config, run, model, problems, teacher=judge_model, **settings)
        if judge_model:
            metrics |= probe(config, run, answers, metrics["avg_at_n"])
        # To the screen and the tracker now, to the files later
        shown = ", ".join(f"{key} {round(value, 3)}" for key, value in metrics.items())
        say(f"{who} on {name}, step {run.step}: {shown}")
        run.tell(metrics, f"{who}/{name}/")
        results[name] = metrics
        for answer in answers:
            kept = {key: value for key, value in answer.items() if not key.endswith("_ids")}
            kept.pop("solution", None)  # --eval_file has it already
            lines.append({"step": run.step, "model": who, "eval": name, **kept})
    record = {
        "model": who,
        "student": config.student,
        "eval": results,
        "thinking": config.enable_thinking,
        "prompt_template": template,
        "time_eval": clock(run.device) - began,
        **run.standing(),
    }
    # All lines or none, at the end: an interrupted evaluation is redone on resume
    with whole_step(run):
        if is_main():
            append_json(run.files[1], *lines)
        if results:
            run.record(record)
        run.graded = run.step
    return results


def say_gaps(graded):
    """Print how far the teacher with its own prompt is ahead of the student, a line per file.
    graded: {who: {file: metrics}}, from before the first step
    """
    for name, informed in graded.get("prompted_teacher", {}).items():
        student = graded["student"][name]
        if informed["num_problems"] < student["num_problems"]:
            continue  # the problems that it has prompts for may be easier
        gap = 100 * (informed["avg_at_n"] - student["avg_at_n"])
        say(
            f"{name}: the teacher with its own prompt is {gap:+.1f} points ahead of the student; "
            "the gain is said to be linear in this gap (2605.30070)"
        )


def probe(config, run, answers, accuracy):
    """How much more often the teacher is right when it continues answers cut at --probe_depths"""
    advantages = {}
    for depth in config.probe_depths:
        begun = []
        for answer in answers:
            kept = answer["response_ids"][: answer["length"] * depth // 100]
            begun.append({**answer, "prompt_ids": teacher_prompt(answer), "begun": kept})
        most = config.eval_max_new_tokens
        onward = {"max_length": most - most * depth // 100, "title": f"teacher from {depth}%"}
        metrics, _ = grade(config, run, run.teacher, begun, **onward)  # the cap holds in total
        advantages[f"advantage_from_{depth}"] = metrics["avg_at_n"] - accuracy
    return advantages


def extrapolate_student(config, run):
    """Extrapolate the student's update since the last tries, if that helps, and record the step,
    the metrics of which are in run.untried -> all its metrics                              [EffOPD]
    """
    run.phase = f"extrapolation after step {run.step}"
    began = clock(run.device)
    # The same problems and the same seed every time: only the weights differ
    problems = random.Random(config.seed).sample(run.answered, config.validation_size)
    # Not the student itself: a signal may end the tries, and the student is saved then
    tried_model = run.sampler
    if run.sampler is run.student:
        tried_model = copy.deepcopy(run.student)
    sampled = []

    def validate(weights):
        tried_model.load_state_dict(weights, strict=False)
        # Sampled as in training
        settings = {"temperature": config.temperature, "top_p": 1.0}
        settings |= {"max_length": config.max_new_tokens, "title": "extrapolation"}
        metrics, answers = grade(config, run, tried_model, problems, "extrapolation", **settings)
        sampled.extend(answers)
        return metrics["avg_at_n"]

    accepted, tried, scores = extrapolate(movable_weights(run.student), run.anchor, validate)
    with whole_step(run):
        for model in (run.student, run.sampler):
            model.load_state_dict(accepted, strict=False)
        run.anchor = accepted
        # The samples count towards the cost
        tokens = sum(answer["length"] for answer in sampled)
        columns = [prompt_length(answer) + answer["length"] for answer in sampled]
        run.count(validation_tokens=tokens, generated_tokens=tokens)
        run.count(flops=forward_flops(run.student, torch.tensor(columns)))
        tries = {"extrapolation_k": tried, "validation_scores": scores}
        tries["time_validation"] = clock(run.device) - began
        metrics = {**run.untried, **run.standing(), **tries}
        run.untried = {}
        run.record(metrics)
    return metrics


def cold_start_step(config, run, step):
    """A supervised step on the teacher's own right solutions -> their share     [Rethinking-OPD]"""
    run.phase = f"cold start, step {step}"
    # The teacher samples; its right solutions, and those to problems without an answer, are learned
    problems = draw_prompts(config, run, step)
    plan = Plan(config.max_new_tokens, config.segment_length)
    settings = rollout_settings(config, run, problems)
    settings["prompts"] = settings["for_teacher"]
    out = rollout_in_groups(run.teacher, None, plan=plan, **settings)
    # The student learns them after its own prompt
    out = with_prompts(out, [problem["prompt_ids"] for problem in problems])
    run.phase = f"the update of cold start step {step}"
    mask, right = out["response_mask"], out["ended"].clone()
    for row, problem in enumerate(problems):
        ids = out["response_ids"][row][mask[row]]
        right[row] &= problem["answer"] is None or is_solved(run.tokenizer, problem, ids)

    def cross_entropy(logits, _, ids):
        return F.cross_entropy(logits, ids, reduction="none")

    # Learn the sampled ids. This loss ignores the teacher's states: any tensor of that length
    out |= {"loss_mask": mask & right[:, None], "token_weight": mask.float()}
    out["teacher_hidden"] = [valid[valid] for valid in mask]
    settings = update_settings(config, run)
    settings |= {"teacher_head": torch.nn.Identity(), "measure": None, "token_loss": cross_entropy}
    rate = config.cold_start_learning_rate
    train_step(run.student, run.optimizer, out, rate, config.max_grad_norm, **settings)
    run.optimizer.zero_grad()
    run.sampler.load_state_dict(run.student.state_dict())

    # What it cost
    rows = row_facts(config, out)
    length, learned = rows["response_length"], rows["trained_length"] > 0
    run.count(cold_start_tokens=int(length.sum()))
    run.count(flops=forward_flops(run.teacher, rows["teacher_prompt_length"] + length))
    run.count(flops=3 * forward_flops(run.student, (rows["prompt_length"] + length)[learned]))
    return learned.double().mean().item()


# --------------------------------------------------------------------------------------------------
# 18. rollouts.html: rows of the last step, token by token


def why_stopped(config, out, row):
    """Why a row of a rollout stops where it does -> str"""
    if out["ended"][row]:
        return "ended"
    if out["kept"][row]:
        return "cut"
    if config.method == "prune":
        bad = (out["overlap"][row] < config.drift_threshold) & out["response_mask"][row]
        return f"drifted: bad events at tokens {(bad.nonzero()[:, 0] + 1).tolist()}"
    score = out["overlap"][:, : config.probe_window].mean(-1)  # (B,)
    # The selected rows of a prompt are longer than the prefix, and no others are
    selected = score.where(out["response_mask"].sum(-1) > config.prefix, torch.inf)
    least = selected.view(-1, config.num_generations)[row // config.num_generations].min()
    if config.method != "prefix-guided" or config.select == "random" or least.isinf():
        return "not selected"  # by a rule without a score
    return f"not selected: overlap {score[row]:.3f} at first, least kept of this prompt {least:.3f}"


def first_rows(config, problems, plan, out, prompts=4):
    """The rows of a step's first prompts, for the page -> dict; {}: no page"""
    if config.no_view or not is_main():
        return {}
    own = slice(prompts * config.num_generations)
    # Cloned: a view would keep the whole step in memory
    shown = {name: value[own].clone() for name, value in out.items() if torch.is_tensor(value)}
    shown["stopped"] = [why_stopped(config, out, row) for row in range(len(shown["kept"]))]
    return {**shown, "problems": problems[own], "borders": plan.borders()}


def token_text(tokenizer, before, token):
    """The text of a token. Decoded after another one: some tokenizers drop a first space"""
    both = tokenizer.decode([before, token], clean_up_tokenization_spaces=False)
    return both[len(tokenizer.decode([before])) :].replace("\n", "↵")


def token_spans(run):
    """Yield a span for each response token of run.shown, with what both models predict there now"""
    shown, valid = run.shown, run.shown["response_mask"]
    before = shown["problems"][0]["prompt_ids"][0]
    text_of = functools.cache(functools.partial(token_text, run.tokenizer, before))
    weights = shown["token_weight"] * shown["loss_mask"]
    of_step = zip(shown["overlap"][valid].tolist(), weights[valid].tolist())
    asked = response_logits(run.sampler, shown, **run.sampling)
    asked_teacher = response_logits(run.teacher, shown, name="teacher_prompt", **run.sampling)
    for (logits, sampled), (teacher_logits, _) in zip(asked, asked_teacher):
        kls = reverse_kl(logits, teacher_logits)  # (n,)
        log_probs = torch.stack([logits, teacher_logits], dim=1).log_softmax(-1)  # (n, 2, V)
        advantages = log_probs.take_along_dim(sampled[:, None, None], dim=-1).diff(dim=1).flatten()
        likeliest = log_probs.topk(5)  # (n, 2, 5)
        columns = (sampled, advantages, kls, likeliest.indices, likeliest.values.exp())
        for token, advantage, kl, tokens, probs in zip(*(column.tolist() for column in columns)):
            overlap, weight = next(of_step)
            tip = f"KL {kl:.3f}, overlap {overlap:.3f}, log q − log p {advantage:.3f}, "
            tip += f"weight {weight:.3f}\n\nstudent               teacher"
            for mine, its, p, q in zip(*tokens, *probs):
                tip += f"\n{text_of(mine):12} {p:6.1%}   {text_of(its):12} {q:6.1%}"
            style = f"--overlap:{overlap:.3f};--advantage:{advantage:.3f};--weight:{weight:.3f}"
            box = f'<span tabindex="0" style="{style}" data-tip="{html.escape(tip)}">'
            # The space in front of a word is not part of its box
            text = text_of(token)
            word = text.removeprefix(" ") or text
            yield text.removesuffix(word) + box + html.escape(word).replace("↵", "↵\n") + "</span>"


PAGE = """\
<!doctype html><html lang="en"><meta charset="utf-8"><title>Rollouts of step %(step)s</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root { color-scheme: light dark; overflow-wrap: anywhere;
  --warm: light-dark(#f3a24d, #a3540c); --cool: light-dark(#84b8ec, #1f64a8); }
body { max-width: 1060px; margin: auto; padding: 16px 16px 200px; font: 15px/1.5 sans-serif; }
h2, h3, div { margin: 6px 0 0; font: 14px/1.9 monospace; white-space: pre-wrap; }
h2 { margin-top: 24px; font-weight: bold; }
.right { background: var(--cool); } .wrong { background: var(--warm); }
nav { position: sticky; top: 0; padding: 10px 0; background: Canvas; }
span { --at: var(--overlap); padding: 3px 2px; scroll-margin: 90px 0 200px;
  background: linear-gradient(to right, var(--warm), transparent, var(--cool)) 0 / 9999%%;
  background-position-x: clamp(0%%, 100%% * var(--at), 100%%); }
:has([value=advantage]:checked) span { --at: (.5 + var(--advantage) / 4); }
:has([value=weight]:checked) span { --at: var(--weight) / %(top)s; }
:is(%(borders)s) { border-left: 2px solid; } span:is(:focus, :hover) { outline: 2px solid; }
span:is(:focus, :hover)::after { content: attr(data-tip); position: fixed; inset: auto 0 0;
  padding: 10px 16px; line-height: 1.5; border-top: 1px solid; background: Canvas; }
span:hover::after { z-index: 1; }
</style><h1>What the student wrote, and what both models say of it</h1>
<p>Step %(step)s of %(output_dir)s, method %(method)s, with %(flags)s</p>
<p>Point at a token, or press Tab, to see what both models predict there, the student after this
step. <b class="right">High</b>, <b class="wrong">low</b>; │ is a segment border.</p>
<nav>Colour by <label><input type="radio" name="by" value="overlap" checked> top-k overlap, 0 to 1
</label><label><input type="radio" name="by" value="advantage"> log q − log p, −2 to 2</label>
<label><input type="radio" name="by" value="weight"> loss weight, 0 to %(top)s</label></nav>
"""


def write_view(config, run):
    """Write rollouts.html of run.shown, with what both models predict now. No text is markup"""
    shown, path = run.shown, f"{config.output_dir}/rollouts.html"
    run.phase = f"rollouts.html of step {run.step}"
    usual = vars(Config() if config.student else TINY)
    flags = [f"--{name} {x}" for name, x in vars(config).items() if x not in (usual[name], [])]
    head = {**vars(config), "step": run.step, "flags": " ".join(flags)}
    head["borders"] = ", ".join(f"span:nth-child({border + 1})" for border in shown["borders"])
    head["top"] = 1 + config.w_base if config.method == "prune" else 1
    page = PAGE % {name: html.escape(str(x)) for name, x in head.items()}
    spans = token_spans(run)
    for row, (problem, stopped) in enumerate(zip(shown["problems"], shown["stopped"])):
        if row % config.num_generations == 0:
            asked = run.tokenizer.decode(problem["prompt_ids"])
            asked += f" (answer: {problem['answer'] or 'not known'})"
            page += f"<h2>{html.escape(asked)}</h2>"
        ids = shown["response_ids"][row][shown["response_mask"][row]].tolist()
        verdict = ""
        # Others could not finish: not selected, drifted, or cut where the method stops all rows
        finished = stopped == "ended" or len(ids) == config.max_new_tokens
        if problem["answer"] is not None and finished:
            verdict = "right" if is_solved(run.tokenizer, problem, ids) else "wrong"
        page += f'<h3>{len(ids)} tokens, {stopped} <b class="{verdict}">{verdict}</b></h3>'
        page += f"<div>{''.join(next(spans) for _ in ids)}</div>"
    with open(f"{path}.partial", "w", encoding="utf-8", errors="replace") as file:
        file.write(page)
    os.replace(f"{path}.partial", path)  # while it is written, a reader sees the previous one


# --------------------------------------------------------------------------------------------------
# 19. Report

TITLES = """\
                                      opd at as
                                minus      many
 teacher   before     after       opd    tokens  gap   overlap sampled FLOPs seconds method"""
ROW = (
    "{teacher:>8} {before:>8} {after:>9} {minus:>9} {as_many:>9} {gap:>4} {overlap:>9} "
    "{generated_tokens:>7} {flops:>5} {seconds:>7} {method}"
)


def read_run(root, name):
    """A run's metrics.jsonl, its whole lines -> what a report needs, None without a step"""
    # out/compare/prefix/seed-2 is a run of prefix with seed 2. A folder's name may have a newline
    line = name.replace("\n", " ")
    group, seed = re.fullmatch(r"(.*?)(?:(?:\A|[/_-])seed[_-]?(\d+))?", line).groups()
    run = {"name": name, "group": group or ".", "curve": [], "final": {}}
    run |= dict.fromkeys(("teacher", "before", "after"), math.nan)
    seconds = 0.0  # of training
    path = os.path.join(root, name, "metrics.jsonl")
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = file.readlines()
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # half a line, from a run that was killed
            continue
        if not isinstance(record, dict) or "generated_tokens" not in record:
            continue  # it is of another program
        if "overlap_by_position" in record:
            seconds += sum(record[key] for key in record if key.startswith("time_"))
            run.setdefault("first", record)
            run["last"] = {**record, "seconds": seconds}

        # Accuracies are means over the files; the curve is the student's
        if record.get("eval"):
            accuracy = np.mean([metrics["avg_at_n"] for metrics in record["eval"].values()])
            if record["model"] == "student":
                run["curve"].append((record["generated_tokens"], seconds, accuracy))
                run["after" if record["step"] else "before"] = accuracy
                if record["step"]:
                    run["final"] = record["eval"]
            elif record["model"].endswith("teacher"):
                run["teacher"] = accuracy  # prompted_teacher, the one that teaches, comes last
    run["pair"] = (seed, *sorted(run["final"]))  # seed and files: runs with equal ones are paired
    return run if "last" in run else None


def percent(values, sign=""):
    """Fractions, one per seed -> "mean±standard error" in %, "-" without any"""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "-"
    error = f"±{100 * np.std(known, ddof=1) / len(known) ** 0.5:.1f}" if len(known) > 1 else ""
    return f"{100 * np.mean(known):{sign}.1f}{error}"


def report_row(group, baseline):
    """The runs of one method, one per seed, against the baseline's -> a line of the table"""
    row = {"method": group[0]["group"]}
    for who in ("teacher", "before", "after"):
        row[who] = percent([run[who] for run in group])

    # Against the baseline, paired by seed: at the end, and where it had sampled as many tokens
    curves = {run["pair"]: run["curve"] for run in baseline if run["final"]}
    minus, as_many = [], []
    for run in group:
        if run["pair"] in curves and group is not baseline:
            tokens, _, accuracy = zip(*curves[run["pair"]])
            minus.append(run["after"] - accuracy[-1])
            as_many.append(np.interp(run["last"]["generated_tokens"], tokens, accuracy))
    row |= {"minus": percent(minus, "+"), "as_many": percent(as_many)}

    # The share of the gap to the teacher that was closed, if all teachers are ahead
    gaps = [run["teacher"] - run["before"] for run in group]
    gains = [run["after"] - run["before"] for run in group]
    row["gap"] = "-"
    if min(gaps) > 0:
        row["gap"] = f"{np.divide(gains, gaps).mean():.0%}".replace("nan%", "-")

    def mean(runs, key, when="last"):
        return np.mean([run[when][key] for run in runs])

    first, last = mean(group, "overlap_ratio", "first"), mean(group, "overlap_ratio")
    row["overlap"] = f"{first:.2f}-{last:.2f}"
    for key in ("generated_tokens", "flops", "seconds"):
        cost = mean(group, key)
        row[key] = f"{cost / mean(baseline, key):.2f}x"
        if group is baseline:
            row[key] = tqdm.format_sizeof(cost)
    return ROW.format(**row)


def report_table(runs):
    """Runs, as read_run gives them -> lines: a row per method, the baseline first"""
    # The baseline: the first group whose folder is named opd, else the first by name
    runs = sorted(runs, key=lambda run: (os.path.basename(run["group"]) != "opd", run["group"]))
    groups = {}
    for run in runs:
        groups.setdefault(run["group"], []).append(run)
    baseline = groups[runs[0]["group"]]
    return [
        *TITLES.splitlines(),
        *[report_row(group, baseline) for group in groups.values()],
        f"accuracy in %; ±: standard error over seeds; opd up to its last step; runs: {len(runs)}",
        f"opd: here {runs[0]['group']}, the first row; x: times its cost; seconds of training",
    ]


def draw_report(runs):
    """Accuracy against sampled tokens, and overlap by position, a colour per method -> figure"""
    from matplotlib.figure import Figure

    # Not pyplot, which would look for a display
    figure = Figure(figsize=(11, 4), layout="constrained")
    by_tokens, by_position = figure.subplots(1, 2)
    by_tokens.set(xlabel="generated tokens", ylabel="accuracy (a line per seed)")
    by_position.set(xlabel="start to end of the longest response", ylim=(0, 1))
    by_position.set_ylabel("overlap (dotted: first step)")
    names = sorted({run["group"] for run in runs})
    legend = {}
    for run in runs:
        look = {"color": f"C{names.index(run['group'])}", "linewidth": 1}
        if run["curve"]:
            tokens, _, accuracy = zip(*run["curve"])
            by_tokens.plot(tokens, accuracy, "o-", markersize=3, **look)
        by_position.plot(run["first"]["overlap_by_position"], ":", **look)
        (line,) = by_position.plot(run["last"]["overlap_by_position"], **look)
        legend[run["group"].replace("$", r"\$")] = line  # a dollar would begin a formula
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=5, fontsize=8)
    return figure


def report(folder):
    """Print the table of all runs below a folder, and draw its report.png -> {name: results}"""
    if not os.path.isdir(folder):
        raise ValueError(f"--report {folder}: there is no such folder")
    runs = []
    for path in sorted(glob.glob("**/metrics.jsonl", root_dir=folder, recursive=True)):
        # Not the copies in checkpoints, whole, half or old
        if re.search(r"(\A|/)checkpoint(-\d+(\.old)?|\.partial)/metrics", path):
            continue
        try:
            run = read_run(folder, os.path.dirname(path))
            if run:
                report_row([run], [run])  # whether it has all that the table shows
                runs.append(run)
        except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
            note(f"{path} is left out, it lacks what a report needs: {error!r}")
    if not runs:
        raise ValueError(f"--report {folder}: no run below it has a metrics.jsonl with steps")
    say(*report_table(runs))
    draw_report(runs).savefig(f"{folder}/report.png", dpi=110)
    return {run["name"]: run["final"] for run in runs}


# --------------------------------------------------------------------------------------------------
# 20. Main


def open_world(config):
    """The flags with the models and files of the tiny world, which is made if it does not exist."""
    torch.set_num_threads(1)  # tensors this small gain next to nothing from more
    world = f"{config.output_dir}/world"
    if is_main() and not os.path.exists(world):
        make_world(world, config.seed)
    gather([])  # the other processes wait for it
    return replace(
        config,
        student=f"{world}/student",
        teacher=f"{world}/teacher",
        train_file=[f"{world}/train.jsonl"],
        eval_file=[f"{world}/eval.jsonl"],
    )


def open_run(config):
    """Load what the flags name, and prepare --output_dir -> run, new or as a checkpoint left it"""
    flags = {**vars(config), "processes": NUM_RANKS}
    folder, state = config.resume, {}
    if folder == "latest":
        folder = last_checkpoint(config)
        if not folder:
            note(f"no checkpoint in {config.output_dir} to resume: starting at the first step")
    if folder:
        state = read_checkpoint(folder, flags)
    if not config.student:
        config = open_world(config)

    # Everything that is loaded
    files = [f"{config.output_dir}/{name}.jsonl" for name in ("metrics", "samples")]
    run = Run(flags, files, cap=min(config.cap_init, config.max_new_tokens))
    counted = (
        "generated_tokens teacher_tokens trained_tokens validation_tokens cold_start_tokens flops"
    )
    run.counts = dict.fromkeys(counted.split(), 0)
    run.tokenizer = load(AutoTokenizer, folder or config.student)
    read_files(config, run)
    load_models(config, run, folder or config.student)
    prepare_training(config, run)
    check_tokens(run)
    problems = json.dumps([run.pools, *run.evals.values()]).encode()  # no paths: folders may move
    run.data = hashlib.sha256(problems).hexdigest()
    if state.get("data", run.data) != run.data:
        raise ValueError(f"--resume {folder}: the problems, or their prompts, were others then")
    run.most = work_at_most(config, run)
    for line in check_lengths(run):
        if config.eval_only:  # else the preflight of a new run prints it
            note(line)
    ask_math_verify("1", None)  # if it cannot start, better now than after an evaluation
    kind = config.report_to if is_main() else "none"
    run.track = open_tracker(kind, config.output_dir, flags, state.get("step", -1) + 1)
    # Where it stands; of the flags, those given now apply
    for name in set(state) - {"flags", "optimizer"}:
        setattr(run, name, state[name])
    run.rows_at_once = rows_that_fit(config, run)  # before loading the moments: it plans for them
    if state:
        # Take only the moments from it: fused, in param_groups, depends on the device
        state["optimizer"]["param_groups"] = run.optimizer.state_dict()["param_groups"]
        run.optimizer.load_state_dict(state["optimizer"])
        run.saved = [run.step, run.graded, bool(run.untried)]
    if is_main() and not config.eval_only:
        prepare_files(config, run, folder)
    return run


def work(config, run):
    """All that a run does once it is open -> dict of the final metrics"""
    if config.eval_only:
        first = next(iter(run.evals.values()))[0]["prompt_ids"]
        say(f"first prompt: {run.tokenizer.decode(first)!r}")
        return evaluate_files(config, run, "eval_only")
    if run.step == 0:
        say(*preflight(config, run))
        if run.device.type == "cuda":
            try_update(config, run)
        graded = {who: evaluate_files(config, run, who) for who in evaluated_first(config, run)}
        say_gaps(graded)
        for step in range(1, config.cold_start_steps + 1):
            right = cold_start_step(config, run, step)
            say(f"cold start: {right:.0%} of the solutions are right")
        if config.cold_start_steps:
            run.optimizer.state.clear()  # its moments are of another loss
            evaluate_files(config, run, "cold_start")
        if config.extrapolate:
            run.anchor = movable_weights(run.student)  # the anchor of the first extrapolation
    train(config, run)
    if not is_main():
        return run.standing()
    ended, checkpoint = read_run("", config.output_dir), last_checkpoint(config)
    say(*report_table([ended]), f"checkpoint in {checkpoint}")
    if run.shown:
        say(f"the last step, token by token: {config.output_dir}/rollouts.html")
    return {**run.standing(), "checkpoint": checkpoint, **ended}


def main(argv=None):
    """Do what the flags ask for -> dict of the final metrics: after training that of the last step
    (last), of the last evaluation (final, by file), costs, checkpoint. argv: a list of strings, or
    a Config. A user's mistake ends in one line and exit status 2.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()  # it would raise where stderr is closed
    run = Run({}, [])  # in set-up
    held = contextlib.ExitStack()
    try:
        held.enter_context(warnings.catch_warnings())  # each run of a process shows its notes
        held.callback(setattr, warnings, "formatwarning", warnings.formatwarning)
        held.callback(STOPPED.clear)
        warnings.formatwarning = lambda message, *_: f"note: {message}\n"
        warnings.simplefilter("default", Note)
        held.enter_context(on_signals(interrupt))
        held.callback(torch.set_num_threads, torch.get_num_threads())  # the tiny world takes one
        # Not isinstance(argv, Config): after a reload of the module there are two such classes
        config = argv if hasattr(argv, "method") else parse_args(argv)
        # Only what a checkpoint can hold: lists for tuples, texts for Paths
        config = Config(**json.loads(json.dumps(vars(config), default=as_json)))
        check_config(config)
        if config.report:
            return report(config.report) if is_main() else {}
        join_processes(config.device)
        if is_main():
            held.enter_context(own_folder(config))
        run = open_run(config)
        with whole_step(run):  # a signal that was lost so far
            pass
        result = work(config, run)
        if dist.is_initialized():
            dist.destroy_process_group()
        return result
    except (Exception, KeyboardInterrupt) as error:
        # A second signal must not interrupt the saving
        held.enter_context(on_signals(ignore))
        traceback.clear_frames(error.__traceback__)  # they keep the caches alive on a full GPU
        flags = {**run.flags, **run.rows_at_once}  # empty in set-up
        told, status = explain(error, run.phase, flags)
        broken = "is not finite" in told
        if broken:
            with contextlib.suppress(Exception):  # out of memory, or a GPU that failed
                told += suspect(run)
        if run.step:
            with contextlib.suppress(OSError):
                # A resumed run would break again; weights that led there push out no good ones
                if not run.halfway and not broken:
                    save_checkpoint(config, run)
            if told and is_main():
                told += f"; last checkpoint: {last_checkpoint(config) or 'none'}"
        if not told:
            raise
        say(f"opd.py: {told}".replace("\n", " "), file=sys.stderr)
        raise SystemExit(status) from None
    finally:
        held.close()


if __name__ == "__main__":
    main()
