"""
The runs of real.sh as a table: real.py FOLDER

The models before training, then the student after each run: right, boxed and stopped answers, the
overlap in four parts of the responses (first step, last step), tokens and seconds.
"""

import glob
import json
import os
import sys

import numpy as np

ROW = "{:21} {:>10} {:>6} {:>8}   {:23} {:>7} {:>8}"
TITLES = ROW.format("in %", "right", "boxed", "stopped", "overlap by position", "tokens", "seconds")


def graded(name, record, overlap, tokens="", seconds=""):
    """A line of the table. record: that of an evaluation in metrics.jsonl"""
    (told,) = record["eval"].values()
    right = f"{100 * told['avg_at_n']:.1f}±{100 * told['se']:.1f}"
    shares = [f"{100 * told[key]:.1f}" for key in ("answered_fraction", "stopped_fraction")]
    return ROW.format(name, right, *shares, overlap, tokens, seconds).rstrip()


def by_position(record):
    """The mean overlap of a step in four parts of its responses -> str"""
    parts = np.array_split(record["overlap_by_position"], 4)
    return " ".join(f"{np.mean(part):.2f}" for part in parts)


def of_run(name, records):
    """metrics.jsonl of a run -> lines: models evaluated before step 1, then the run's result"""
    steps = [record for record in records if "loss" in record]
    *before, after = [record for record in records if "eval" in record]
    lines = []
    for record in before:
        overlap = by_position(steps[0]) if record["model"] == "student" else ""
        lines.append(graded(record["model"], record, overlap))
    times = ("time_rollout", "time_teacher", "time_update")
    seconds = sum(record[key] for record in steps for key in times)
    tokens = f"{steps[-1]['generated_tokens']:,}"
    lines.append(graded(name, after, by_position(steps[-1]), tokens, f"{seconds:.0f}"))
    return lines


def main(folder):
    with open(f"{folder}/prompts.txt", encoding="utf-8") as file:
        print(file.read())
    print(TITLES)
    # The first run, opd/seed-0, is the one that also evaluated the untrained models
    for done in sorted(glob.glob("*/seed-*/done", root_dir=folder)):
        path = os.path.dirname(done)
        with open(f"{folder}/{path}/metrics.jsonl", encoding="utf-8") as file:
            records = [json.loads(line) for line in file]
        print("\n".join(of_run(path.replace("/seed-", ", seed "), records)))
    print("right: ± standard error over the problems; seconds of training, beside other work")


if __name__ == "__main__":
    main(*sys.argv[1:])
