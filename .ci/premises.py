"""
Can the papers be right in the tiny world? Their premises, measured before any method is compared
in it, in a world whose seed the comparison does not use: premises.py FOLDER

A row drifts at its first mumbled word. That word still counts as before the drift, since the model
chose it in a sound context; all tokens after it are after the drift.
"""

import dataclasses
import os
import sys

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import compare

import opd

SEED = 100  # of the world
PARTS = 8  # of the longest response
DEPTHS = [10, 25, 50, 75, 90]  # percent of an answer
STEPS, BUDGET, REPEATS = 6, 1000, 5  # of part 3: updates, tokens per update, seeds


def open_world(folder, world, **changes):
    """A run of the tiny world, ready for its first step -> (config, run)"""
    files = {"train_file": [f"{world}/train.jsonl"], "eval_file": [f"{world}/eval.jsonl"]}
    models = {"student": f"{world}/student", "teacher": f"{world}/teacher"}
    config = dataclasses.replace(opd.TINY, **files, **models, output_dir=folder, **changes)
    return config, opd.open_run(config)


def sample(config, run, step):
    """The rollout of a step of plain OPD -> (its dict, (B, T) bool: tokens after a drift)"""
    prompts = [problem["prompt_ids"] for problem in opd.draw_prompts(config, run, step)]
    settings = {"overlap_k": config.overlap_k, **run.sampling}
    plan = opd.plan_rollout(config, step, run.cap)
    out = opd.rollout(run.sampler, run.teacher, prompts, plan, **settings)
    mumble = torch.tensor(run.tokenizer.convert_tokens_to_ids(opd.LEXICON["mumble"]))
    mumbled = torch.isin(out["response_ids"], mumble)
    return out, mumbled.cumsum(-1) - mumbled.long() > 0


def mean_of(values, mask):
    return values[mask].mean().item() if mask.any() else float("nan")


def overlaps(out, after):
    """Overlap by position, for rows that drift and for the others -> lines of the table"""
    overlap, mask = out["overlap"], out["response_mask"]
    drifted = (after & mask).any(-1)[:, None]
    lines = []
    for title, rows in (("rows that drift", drifted), ("others", ~drifted)):
        told = opd.overlap_by_position(overlap, mask & rows, PARTS)
        lines.append(f"{title:>16} " + " ".join(f"{value:5.2f}" for value in told))
    sound, lost = (mean_of(overlap, mask & drifted & side) for side in (~after, after))
    lines.append(f"{drifted.float().mean():.0%} of rows drift; there {sound:.2f} until they do, ")
    lines[-1] += f"{lost:.2f} afterwards"
    return lines


def openings(config, run, out, after):
    """Does prefix-guided OPD's score of a row tell how the row goes on? -> a line. Rows that drift
    within the tokens that are scored are left out: there is nothing left to foretell
    """
    mask = out["response_mask"]
    problems = opd.draw_prompts(config, run, 1)  # those of sample
    rows = zip(problems, out["response_ids"], mask)
    right = [opd.is_solved(run.tokenizer, problem, ids[valid]) for problem, ids, valid in rows]
    sound = ~(after & mask).any(-1)

    # A mumble at the last scored token shows in after one token later
    going = ~after[:, : config.probe_window + 1].any(-1)
    score = out["overlap"][going, : config.probe_window].mean(-1).tolist()
    of_right = opd.auroc(score, torch.tensor(right)[going].tolist())
    of_sound = opd.auroc(score, sound[going].tolist())
    told = f"AUROC over {len(score)} rows that are sound so far"
    return f"{told}: right {of_right:.2f}, sound to its end {of_sound:.2f}"


def bad_events(config, out, after):
    """Do Prune-OPD's bad events tell rows that drift from others? -> lines"""
    overlap, mask = out["overlap"], out["response_mask"]
    bad = (overlap < config.drift_threshold).float()
    drifted = (after & mask).any(-1)
    reliability = opd.drift_weights(overlap, mask, config.drift_threshold, config.w_drop)
    stopped = opd.reliable_length(reliability, mask) < mask.sum(-1)
    sound = mean_of(bad, mask & ~drifted[:, None])
    before = mean_of(bad, mask & drifted[:, None] & ~after)
    lost = mean_of(bad, mask & after)
    stops, others = (mean_of(stopped.float(), rows) for rows in (~drifted, drifted))
    told = f"of the tokens: {sound:.0%} in rows that do not drift, {before:.0%} before a drift, "
    reached = f"reliability reaches 0 in {stops:.0%} of the rows that do not drift, and in "
    return [f"{told}{lost:.0%} after it", f"{reached}{others:.0%} of the others"]


def learn(folder, world, side, seed):
    """Train on BUDGET tokens per step, sampled by the initial student, of one side: "before" or
    "after" the drift in rows that drift, or "elsewhere", in the other rows -> accuracy
    """
    config, run = open_world(f"{folder}/{side}-{seed}", world, seed=seed, batch_size=32)
    # All rows are from the initial student: a trained one no longer drifts. draw_prompts seeds
    # torch, so with one seed all sides see the same rows
    for out, after in [sample(config, run, step) for step in range(1, STEPS + 1)]:
        mask = out["response_mask"]
        drifted = (after & mask).any(-1)[:, None]
        sides = {"before": drifted & ~after, "after": after, "elsewhere": ~drifted}
        places = (mask & sides[side]).flatten().nonzero().squeeze(-1)
        assert len(places) >= BUDGET, f"{len(places)} tokens {side}"
        places = places[torch.randperm(len(places))[:BUDGET]]
        learned = torch.zeros(mask.numel(), dtype=torch.bool).index_fill(0, places, True)
        out["loss_mask"] = learned.view_as(mask)
        out["token_weight"] = torch.ones_like(out["overlap"])
        opd.backward(run.student, out, **opd.update_settings(config, run))
        opd.optimizer_step(run.student, run.optimizer, config.learning_rate)
        run.optimizer.zero_grad()
    metrics, _ = opd.grade(config, run, run.student, run.evals["eval"], num_samples=4)
    return metrics["avg_at_n"]


def main(folder):
    torch.set_num_threads(1)
    world = f"{folder}/world"
    if not os.path.exists(world):
        opd.make_world(world, SEED)
    config, run = open_world(f"{folder}/start", world, probe_depths=DEPTHS, batch_size=64)
    told = ["1. Overlap in eighths of the longest response: does it fall where a row drifts?"]
    out, after = sample(config, run, 1)
    told += overlaps(out, after)

    (student,) = opd.evaluate_files(config, run, "student").values()
    (teacher,) = opd.evaluate_files(config, run, "teacher").values()
    told += [
        "2. Does the teacher, going on from a part of the student's answer, end right less often?"
    ]
    told += [f"   from   0%: {teacher['avg_at_n']:.1%}"]
    for depth in DEPTHS:
        right = student["avg_at_n"] + student[f"advantage_from_{depth}"]
        told.append(f"   from {depth:3}%: {right:.1%}")
    told += [f"   the student itself: {student['avg_at_n']:.1%}"]

    told += [
        f"3. Accuracy after {STEPS} steps of {BUDGET} tokens, of rows that drift and of others"
    ]
    right = {}
    for side in ("before", "after", "elsewhere"):
        right[side] = [learn(folder, world, side, seed) for seed in range(REPEATS)]
        told.append(f"   {side:>9}: " + ", ".join(f"{accuracy:.1%}" for accuracy in right[side]))
    ahead = [before - after for before, after in zip(right["before"], right["after"])]
    told.append(f"   before minus after: {compare.interval(ahead, '+')}, half of a 95% interval")
    told += [
        f"4. Does the mean reward tell right from wrong? AUROC {student['auroc']:.2f}",
        f"5. Does the mean overlap of the first {config.probe_window} tokens tell how a row ends?",
        f"   {openings(config, run, out, after)}",
        f"6. Are overlaps under {config.drift_threshold}, the bad events of Prune-OPD, of drift?",
        *[f"   {line}" for line in bad_events(config, out, after)],
    ]
    opd.say(*told)
    with open(f"{folder}/premises.txt", "w", encoding="utf-8") as file:
        file.write("\n".join(told) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
