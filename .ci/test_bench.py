"""That bench.py measures what it says."""

import torch

torch.set_num_threads(1)  # tiny tensors gain next to nothing from more

import math
import os
from dataclasses import replace

import bench
import pytest

import opd

TINY = dict(
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
)
SIZES = replace(
    bench.CPU,
    vocabulary=1024,
    prompts=2,
    prompt_length=6,
    tokens=32,
    scale_rows=1,
    student=TINY,
    teacher=TINY,
    update_width=16,
    update_vocabularies=(300,),
    chunk_rows=((102, 1),),
)
SUBJECT = bench.Subject(SIZES, 1e9, 1e9)


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_all_21_lines_of_the_table_have_different_names_and_finite_ratios(monkeypatch):
    take_turns = bench.in_turns
    monkeypatch.setattr(bench, "in_turns", lambda jobs, device: take_turns(jobs, device, 1))
    rows = bench.bench(replace(SIZES, tokens=16), (1e9, 1e9))
    assert len({row["line"] for row in rows}) == len(rows) == 21
    assert [row["line"] for row in rows if not math.isfinite(float(row["ratio"]))] == []


def test_the_rollout_and_generate_sample_exactly_the_lengths_that_the_prompts_set():
    """Among them rows of 1 token, rows of the upper half, and rows that leave at a border."""
    lengths = bench.skewed(8, 32)
    prompts = SUBJECT.prompts(lengths)
    ours = opd.rollout(SUBJECT.student, None, prompts, SUBJECT.plan(), **SUBJECT.law)
    ids, mask = opd.pad_left(prompts, bench.PAD)
    plain = bench.plain_generate(SUBJECT.student, ids, mask, SUBJECT.eos_ids, 32)
    assert lengths.tolist() == [1, 1, 2, 4, 8, 14, 21, 32]
    assert ours["response_mask"].sum(-1).tolist() == lengths.tolist()
    assert opd.mask_through_eos(plain, SUBJECT.eos_ids).sum(-1).tolist() == lengths.tolist()


@pytest.mark.parametrize("plan", [SUBJECT.prune(), SUBJECT.guided()], ids=["prune", "guided"])
def test_the_rules_stop_the_rows_of_the_upper_half_and_no_others(plan):
    prompts = SUBJECT.prompts([32] * 8)
    out = opd.rollout(SUBJECT.student, SUBJECT.teacher, prompts, plan, overlap_k=1, **SUBJECT.law)
    assert out["kept"].tolist() == [True, False] * 4


def test_the_skewed_lengths_have_a_mean_of_a_quarter_of_the_longest():
    lengths = bench.skewed(256, 2048)
    assert (lengths.min(), lengths.max()) == (1, 2048)
    assert lengths.float().mean().item() == pytest.approx(512, rel=0.01)


@pytest.mark.parametrize("loss", ["reverse_kl", "topk", "sampled"])
def test_the_baseline_on_full_logits_has_the_gradient_of_train_step(loss):
    """With different token weights, and a gap in the loss mask."""
    made, settings = bench.made_up_update(102, 16, rows=3, tokens=8, loss=loss)
    student, _, batch, _ = made
    batch["token_weight"] = torch.rand(3, 8)
    batch["loss_mask"] = batch["loss_mask"].clone()
    batch["loss_mask"][1, 2:5] = False
    ours = opd.train_step(*made, **settings)
    expected = gradients(student)
    full = bench.full_logits_step(*made, **settings)
    assert full == pytest.approx(ours, rel=1e-4)
    torch.testing.assert_close(gradients(student), expected, rtol=1e-3, atol=1e-6)


def test_the_exponent_fitted_to_made_up_times_is_the_one_that_made_them():
    times = (1, 2, 4, 8)
    assert bench.exponent(times, [3 * n**1.5 for n in times]) == pytest.approx(1.5)
    assert bench.exponent((1, 2, 4), (1, 3, 4)) == pytest.approx(1)  # the middle has no weight


def test_jobs_take_turns_and_the_first_turn_does_not_count():
    calls = []

    def job(name):
        calls.append(name)
        return {"count": len(calls)}

    seen = bench.in_turns({"a": lambda: job("a"), "b": lambda: job("b")}, repeats=3)
    assert "".join(calls) == "abababab"
    assert seen["a"]["count"].tolist() == [3, 5, 7]
    assert seen["b"]["count"].tolist() == [4, 6, 8]


def test_the_ratio_is_the_median_of_the_ratios_of_the_turns():
    told = bench.line("x", torch.tensor([1.0, 2, 9]), torch.tensor([1.0, 4, 3]), most=1.05)
    assert told["ratio"] == "1.000"  # of 1, 1/2 and 3
    assert told["target"] == "<= 1.05: holds"


@pytest.mark.parametrize(
    "target, verdict",
    [
        ({"most": 1.05}, "<= 1.05: MISSED"),
        ({"value": 2.63, "least": 2}, "2.63 >= 2: holds"),
        ({"value": 1.5, "least": 2}, "1.50 >= 2: MISSED"),
        ({"value": math.nan, "least": 2}, "nan >= 2: not measured"),
    ],
)
def test_a_target_limits_the_ratio_or_a_value_of_its_own(target, verdict):
    assert bench.line("x", torch.tensor(2.0), torch.tensor(1.0), **target)["target"] == verdict


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="nothing tells the peak")
def test_the_peak_memory_of_a_job_is_what_it_held_at_once():
    held_before = torch.ones(2**24)  # 64 MiB

    def job():
        for _ in range(3):
            held_before + 1

    assert bench.peak_bytes(job) == pytest.approx(2**26, rel=0.2)


def test_the_floor_of_sampling_is_the_time_to_read_all_weights_and_the_cache_at_every_step():
    """Prompts of 3 tokens, responses of 2 and 4; one layer with keys and values of 16 numbers."""
    subject = replace(SUBJECT, bandwidth=10.0, operations=1e30)
    weights = 4 * (subject.student.num_parameters() - 1024 * 64)
    cached = 4 * 2 * 16 * ((3 + 1) * 2 + (3 + 2) * 4)
    floor = subject.sampling_floor(torch.tensor([3, 3]), torch.tensor([2, 4]))
    assert floor == pytest.approx((4 * weights + cached) / 10)


def test_the_floor_of_a_forward_is_its_operations_without_the_embedding():
    subject = replace(SUBJECT, bandwidth=1e30, operations=10.0)
    weights = subject.student.num_parameters() - 1024 * 64
    operations = 2 * weights * (5 + 7) + 2 * 64 * (5**2 + 7**2)
    assert subject.forward_floor(subject.student, torch.tensor([5, 7])) == operations / 10
    floor = subject.sampling_floor(torch.tensor([3, 3]), torch.tensor([2, 4]))
    assert floor == operations / 10
