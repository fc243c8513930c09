"""
What a second stop token does, and what merge_stops does about it: stops.py FOLDER WORLD

In the tiny world's student the weights of <end> and <pad> are swapped. It ends its answers as often
as before, but with another token than the teacher, as a base student with a chat teacher does. It
is trained without --no_merge_stops and with it. A table, also in stops.txt: its answers before and
after.
"""

import json
import os
import shutil
import sys

import torch
import transformers

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import opd

ROW = "{0:>4} {stopped_fraction:>8.0%} {mean_length:>7.1f} {avg_at_n:>9.1%} {avg_of_stopped:>8.1%}"


def stop_with_pad(world):
    """Make the student of a world end its answers with <pad>."""
    folder = f"{world}/student"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    with torch.no_grad():
        rows = model.get_input_embeddings().weight  # also those of the head: they are tied
        rows[[pad, end]] = rows[[end, pad]]
    tokenizer.eos_token = tokenizer.pad_token
    model.generation_config.eos_token_id = pad
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(folder, world, *flags):
    for name, flag in (("merged", []), ("apart", ["--no_merge_stops"])):
        out = f"{folder}/{name}"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(world, f"{out}/world")
        stop_with_pad(f"{out}/world")
        opd.main(["--output_dir", out, *flag, *flags])
    lines = ["       step  stopped  length  accuracy  of the stopped"]
    for name in ("merged", "apart"):
        for line in open(f"{folder}/{name}/metrics.jsonl", encoding="utf-8"):
            record = json.loads(line)
            if record.get("model") == "student":
                told = {key: value or 0 for key, value in record["eval"]["eval"].items()}
                lines.append(f"{name:>6} " + ROW.format(record["step"], **told))
    opd.say(*lines)
    with open(f"{folder}/stops.txt", "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
