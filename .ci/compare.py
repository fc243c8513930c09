"""
The runs of compare.sh as a table and a picture: compare.py FOLDER PICTURE

A method is compared with plain OPD of the same seed: at the end, and on plain OPD's curve at as
many sampled tokens and as many seconds of training; past the curve its end counts. Differences are
means over the seeds, with 95% intervals of Student's t.
"""

import glob
import os
import sys

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import opd

# The 97.5% quantile of Student's t, by the number of seeds
QUANTILE = dict(zip(range(2, 11), (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)))
ROW = "{:15} {:>10} {:>13} {:>13} {:>13} {:>7} {:>7} {:>9}"
TITLES = [
    ROW.format("", "", "minus opd", "minus opd", "minus opd", "", "", ""),
    ROW.format("", "accuracy", "at the end", "at as many", "at as many", "sampled", "training", ""),
    ROW.format("", "in %", "", "tokens", "seconds", "tokens", "seconds", "overlap"),
]


def interval(values, sign=""):
    """Fractions, one per seed -> "mean±half of the 95% interval", in %"""
    if len(values) < 2:
        return f"{100 * np.mean(values):{sign}.1f}"
    half = QUANTILE[len(values)] * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{100 * np.mean(values):{sign}.1f}±{100 * half:.1f}"


def minus_opd(run, plain, place):
    """A run's final accuracy minus plain OPD's at as many tokens (place 0) or seconds (1); and
    whether that point lies between plain OPD's first evaluation after a step and its last
    """
    spent = run["curve"][-1][place]
    curve = list(zip(*plain["curve"]))
    measured = curve[place][1] <= spent <= curve[place][-1]
    return run["after"] - np.interp(spent, curve[place], curve[2]), measured


def mean(runs, when, key):
    return np.mean([run[when][key] for run in runs.values()])


def row(name, runs, plain):
    """runs of a method and plain OPD's, both {seed: run} with the same seeds -> a table line"""
    # Differences, seed by seed
    pairs = [(runs[seed], plain[seed]) for seed in runs]
    minus = ["", "", ""]
    if runs is not plain:
        minus = [interval([run["after"] - beside["after"] for run, beside in pairs], "+")]
        for place in (0, 1):
            ends, measured = zip(*[minus_opd(*pair, place) for pair in pairs])
            minus.append(interval(ends, "+") + "*" * (not all(measured)))

    # Costs: plain OPD's in thousands of tokens and in seconds, the others' as multiples of them
    cost = []
    for key, unit in (("generated_tokens", 1000), ("seconds", 1)):
        spent = mean(runs, "last", key)
        ratio = spent / mean(plain, "last", key)
        cost.append(f"{spent / unit:.0f}" if runs is plain else f"{ratio:.2f}x")

    first, last = mean(runs, "first", "overlap_ratio"), mean(runs, "last", "overlap_ratio")
    after = interval([run["after"] for run in runs.values()])
    return ROW.format(name, after, *minus, *cost, f"{first:.2f}-{last:.2f}")


def draw(methods, plain):
    """Plain OPD's curve and the end of each method, over tokens and over seconds -> figure"""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for place, (panel, told) in enumerate(zip(panels, ("sampled tokens", "seconds of training"))):
        curves = np.array([run["curve"] for run in plain.values()])  # (seeds, evaluations, 3)
        where, height = curves[..., place].mean(0), 100 * curves[..., 2].mean(0)
        error = 100 * curves[..., 2].std(0, ddof=min(1, len(curves) - 1)) / len(curves) ** 0.5
        panel.plot(where, height, "k.-", label="opd")
        panel.fill_between(where, height - error, height + error, color="k", alpha=0.15)
        for number, (name, runs) in enumerate(methods.items()):
            if runs is plain:
                continue
            ends = np.array([run["curve"][-1] for run in runs.values()])
            error = 100 * ends[:, 2].std(ddof=min(1, len(ends) - 1)) / len(ends) ** 0.5
            spot = {"fmt": "osD^v<>PX"[number % 9], "color": f"C{number}", "label": name}
            panel.errorbar(ends[:, place].mean(), 100 * ends[:, 2].mean(), error, **spot)
        panel.set_xlabel(told)
    panels[0].set_ylabel("accuracy in %, with standard error")
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


def main(folder, picture):
    methods = {}
    for path in glob.glob(f"{folder}/*/seed-*/done"):
        name, seed, _ = os.path.relpath(path, folder).split(os.sep)
        methods.setdefault(name, {})[seed] = opd.read_run(folder, f"{name}/{seed}")
    # Only seeds that all methods have finished; plain OPD first
    seeds = sorted(set.intersection(*map(set, methods.values())))
    methods = {name: {seed: methods[name][seed] for seed in seeds} for name in sorted(methods)}
    plain = methods.pop("opd")
    methods = {"opd": plain, **methods}

    print(*TITLES, sep="\n")
    for name, runs in methods.items():
        print(row(name, runs, plain))
    if {"prefix-guided", "guided-random"} <= set(methods):
        guided, by_chance = methods["prefix-guided"], methods["guided-random"]
        ahead = [guided[seed]["after"] - by_chance[seed]["after"] for seed in seeds]
        print(f"prefix-guided minus guided-random at the end: {interval(ahead, '+')}")
    before = interval([run["before"] for run in plain.values()])
    teacher = interval([run["teacher"] for run in plain.values()])
    print(f"±: half of a 95% interval over {len(seeds)} seeds; opd's tokens in thousands")
    print(f"the student had {before} at first, its teacher {teacher}")
    print("opd, seed by seed:", *[f"{100 * run['after']:.0f}" for run in plain.values()])
    print("*: outside of plain OPD's curve for a seed or more: its end, or a line from its start,")
    print("stands in. Two runs share the machine: seconds are good to a quarter")
    draw(methods, plain).savefig(picture, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
