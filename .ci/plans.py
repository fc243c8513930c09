"""
What opd.py would plan for pairs of models on GPUs, with the default flags: which fit, how many rows
at once, and the bytes. It needs neither a GPU nor weights, only the shapes of published models.

    .venv/bin/python .ci/plans.py > assets/plans.txt
"""

import os
import sys
import types
from unittest import mock

import torch
import transformers

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import opd

# d_model, d_ff, layers, query heads, key-value heads, head width, tied head, family
SHAPES = {
    "Qwen2.5-0.5B": (896, 4864, 24, 14, 2, 64, True, "Qwen2"),
    "Qwen2.5-1.5B": (1536, 8960, 28, 12, 2, 128, False, "Qwen2"),  # untied, as in R1-Distill
    "Qwen3-0.6B": (1024, 3072, 28, 16, 8, 128, True, "Qwen3"),
    "Qwen3-1.7B": (2048, 6144, 28, 16, 8, 128, True, "Qwen3"),
    "Qwen3-4B": (2560, 9728, 36, 32, 8, 128, True, "Qwen3"),
    "Qwen3-8B": (4096, 12288, 36, 32, 8, 128, False, "Qwen3"),
}
PAIRS = [
    ("Qwen2.5-0.5B", "Qwen2.5-1.5B", 24),
    ("Qwen2.5-1.5B", "Qwen2.5-1.5B", 80),
    ("Qwen3-1.7B", "Qwen3-4B", 48),
    ("Qwen3-1.7B", "Qwen3-4B", 80),
    ("Qwen3-4B", "Qwen3-8B", 141),
    ("Qwen3-1.7B", "Qwen3-4B", 24),
]
PROMPT = {"prompt_ids": [0] * 512}
VOCABULARY = 151_936


def shape_config(name, vocabulary=VOCABULARY, layers=None):
    hidden, wide, depth, heads, keys, width, tied, family = SHAPES[name]
    more = {"head_dim": width} if family == "Qwen3" else {}
    return getattr(transformers, f"{family}Config")(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=layers or depth,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        tie_word_embeddings=tied,
        **more,
    )


def stand_in(name):
    """What the plan needs to know of a model, without its weights."""
    config = shape_config(name)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    count = model.num_parameters()
    return types.SimpleNamespace(config=config, num_parameters=lambda: count)


def cache_bytes(name):
    _, _, layers, _, keys, width, _, _ = SHAPES[name]
    return 2 * 2 * layers * keys * width  # keys and values, 2 bytes each


def kept_bytes(name):
    """Bytes per token kept for backward: the input of each layer, and all of one, as measured."""
    layers = SHAPES[name][2]
    autocast = torch.autocast("cpu", torch.bfloat16)
    kept = []
    for depth in (1, 2):
        config = shape_config(name, vocabulary=64, layers=depth)
        model = transformers.AutoModelForCausalLM.from_config(config)
        kept.append(opd.kept_for_backward(model, autocast, False))
    layer = kept[1] - kept[0]
    return layers * 4 * SHAPES[name][0] + layer


def plan(student, teacher, gigabytes):
    """-> the cells of one row of the table"""
    config = opd.Config(student=student, teacher=teacher, train_file=["x"], eval_file=["x"])
    run = opd.Run({}, [], device=torch.device("cuda"), vocab_size=VOCABULARY)
    run.student, run.teacher = stand_in(student), stand_in(teacher)
    run.sampler = None  # not the student itself: a bfloat16 copy
    run.cache_bytes = [cache_bytes(student), cache_bytes(teacher)]
    run.kept_bytes = kept_bytes(student)
    run.pools, run.evals = [[PROMPT]], {"eval": [PROMPT] * 30}
    run.most = opd.work_at_most(config, run)
    sizes = opd.plan_phases(config, run)
    weights = opd.memory_plan(**sizes["rollout_batch_size"][2], rows=0)["rollout"]["weights"]
    free = (gigabytes * 1e9 - weights, gigabytes * 1e9)
    with mock.patch.object(torch.cuda, "mem_get_info", lambda device: free):
        try:
            rows = run.rows_at_once = opd.rows_that_fit(config, run)
        except ValueError as error:
            lacks = str(error).split("by the plan ")[1].split(" of GPU")[0]
            return [student, teacher, gigabytes, f"does not fit: {lacks}"]
    plans = {}
    for flag, (phase, _, told, _) in sizes.items():
        plans[flag] = opd.memory_plan(**told, rows=rows[flag])[phase]
    rollout, update = plans["rollout_batch_size"], plans["micro_batch_size"]
    parts = ("weights", "Adam's moments", "hidden states", "caches")
    numbers = [*(rollout[part] for part in parts), sum(rollout.values())]
    numbers += [update["activations"], sum(update.values())]
    shown = [f"{number / 1e9:.1f}" for number in numbers]
    return [student, teacher, gigabytes, *shown, *rows.values()]


def main():
    titles = "student,teacher,GPU,weights,Adam,states,caches,rollout,activ.,update,r,u,s,t"
    print(
        "The plan of the default flags: prompts of 512 tokens, responses of 7,168, evaluations of"
    )
    print("31,744. In GB; r, u, s, t: rows at once in rollout, update, evaluation of both models.")
    print()
    widths = (12, 12, 3, 7, 9, 6, 6, 7, 6, 6, 3, 3, 3, 3)
    for cells in (titles.split(","), *(plan(*pair) for pair in PAIRS)):
        print(" ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths)))


if __name__ == "__main__":
    main()
