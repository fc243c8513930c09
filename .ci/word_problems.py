"""
One-step word problems with written solutions: word_problems.py > assets/word_problems.jsonl

The first 400 are for training, the last 100 for evaluation; no two are the same. It is seeded, so
it always prints the same lines.
"""

import json
import random

NAMES = "Ada Ben Carla Dev Ella Finn Grace Hugo Ivy Jonas Kira Liam Mona Noah Olga Paul".split()
THINGS = "apples books coins eggs flowers marbles pencils shells stamps stickers".split()
PLACES = "bag basket crate drawer jar tray".split()

# (problem, solution, value of the numbers a and b); {c} stands for the value
KINDS = [
    (
        "{name} has {a} {things} and finds {b} more. How many {things} does {name} have now?",
        "{name} starts with {a} {things} and gets {b} more: {a} + {b} = {c}.",
        lambda a, b: a + b,
    ),
    (
        "One {place} holds {a} {things} and another one {b}. How many {things} are there in all?",
        "Both have to be added: {a} + {b} = {c}.",
        lambda a, b: a + b,
    ),
    (
        "{name} had {a} {things} and gave {b} of them to {other}. How many {things} are left?",
        "What was given away is taken off: {a} - {b} = {c}.",
        lambda a, b: a - b,
    ),
    (
        "{name} has {a} {things} and {other} has {b}. How many more {things} does {name} have?",
        "The difference is asked for: {a} - {b} = {c}.",
        lambda a, b: a - b,
    ),
    (
        "{name} fills {a} {place}s with {b} {things} each. How many {things} does {name} need?",
        "There are {a} groups of {b}: {a} * {b} = {c}.",
        lambda a, b: a * b,
    ),
    (
        "Every day {name} collects {b} {things}. How many {things} are that after {a} days?",
        "It is {b} on each of {a} days: {a} * {b} = {c}.",
        lambda a, b: a * b,
    ),
    (
        "{name} shares {a} {things} equally among {b} friends. How many {things} does each get?",
        "They are divided into {b} equal parts: {a} / {b} = {c}.",
        lambda a, b: a // b,
    ),
    (
        "{name} puts {a} {things} into {place}s of {b}. How many {place}s does {name} fill?",
        "The question is how often {b} goes into {a}: {a} / {b} = {c}.",
        lambda a, b: a // b,
    ),
]


def word_problem(rng):
    """-> {"problem", "answer", "solution"}"""
    problem, solution, value = rng.choice(KINDS)
    # Small numbers: sums that a model of 135M parameters gets wrong, no teacher of its size teaches
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    if "-" in solution:
        a += b  # something is left
    if "/" in solution:
        a *= b  # nothing is left over
    name, other = rng.sample(NAMES, 2)
    words = {"name": name, "other": other, "things": rng.choice(THINGS)}
    words |= {"place": rng.choice(PLACES), "a": a, "b": b, "c": value(a, b)}
    solution = f"{solution} The answer is \\boxed{{{{{{c}}}}}}."
    return {
        "problem": problem.format(**words),
        "answer": str(words["c"]),
        "solution": solution.format(**words),
    }


def word_problems(count, seed=0):
    """-> list of `count` different problems"""
    rng = random.Random(seed)
    problems = {}
    while len(problems) < count:
        made = word_problem(rng)
        problems[made["problem"]] = made
    return list(problems.values())


if __name__ == "__main__":
    for made in word_problems(500):
        print(json.dumps(made))
