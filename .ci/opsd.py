"""
Self-distillation in the tiny world: opsd.py FOLDER WORLD [METHOD ...]

The teacher is the initial student with the worked solution in its prompt. The table, also in
opsd.txt, has accuracy and answer length of the teacher without and with it, and of the student
before and after 5 steps.
"""

import dataclasses
import json
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import opd

ROW = "{:17} {:>9} {:>7}"


def main(folder, world, *methods, **flags):
    opd.torch.set_num_threads(1)
    own = {"student": f"{world}/student", "teacher_prompt_template": "{problem} {solution}"}
    own |= {"train_file": [f"{world}/train.jsonl"], "eval_file": [f"{world}/eval.jsonl"]}
    for method in methods or opd.get_args(opd.Method):
        out = f"{folder}/{method}"
        config = dataclasses.replace(opd.TINY, **own, method=method, output_dir=out)
        opd.main(dataclasses.replace(config, max_steps=5, eval_every=5, **flags))
    lines = [ROW.format("", "accuracy", "length")]
    for method in methods or opd.get_args(opd.Method):
        for line in open(f"{folder}/{method}/metrics.jsonl", encoding="utf-8"):
            record = json.loads(line)
            if "eval" in record:
                told = record["eval"]["eval"]
                who = method if record["step"] else record["model"]
                cells = f"{told['avg_at_n']:.1%}", f"{told['mean_length']:.1f}"
                lines.append(ROW.format(who, *cells))
    opd.say(*lines)
    with open(f"{folder}/opsd.txt", "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
