"""
Which prompt makes a model a useful teacher of itself? teacher_prompts.py MODEL FILE [COUNT]

The model answers the first COUNT problems of FILE, once each at temperature .7: with the student's
prompt, then with the solution in the prompt, in several ways. real.sh uses the last one.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import opd

BOXED = "{problem} Please reason in one sentence, and put your final answer within \\boxed{}."
EXAMPLE = """\
Question: A pen costs 3 coins. What do 4 pens cost?
Answer: Each of 4 pens costs 3 coins: 4 * 3 = 12. The answer is \\boxed{12}.
"""
TWICE = "Question: {problem}\nAnswer: {solution}\n\nQuestion: {problem}\nAnswer:"
TEMPLATES = {
    "as the student": BOXED,
    "again": BOXED + "\n\nHere is a reference solution: {solution}\n\nNow solve the problem again "
    "in the same way.",
    "repeat": BOXED + "\n\nHere is a reference solution:\n{solution}\n\nRepeat this solution.",
    "example": EXAMPLE + "\n{problem}\n{solution}\n\n" + BOXED,
    "twice": TWICE,
    "example, twice": EXAMPLE + "\n" + TWICE,
}
ROW = "{:18} {:>9} {:>6} {:>18} {:>7} {:>8}"


def last_number(text):
    numbers = re.findall(r"-?\d+", text.replace(",", ""))
    return numbers[-1] if numbers else None


def main(model, path, count=24):
    student = opd.load(opd.AutoModelForCausalLM, model, dtype=opd.torch.float32)
    tokenizer = opd.load(opd.AutoTokenizer, model)
    problems = opd.load_problems(path)[: int(count)]
    print(ROW.format("prompt", "right", "boxed", "last number right", "stopped", "length"))
    for name, template in TEMPLATES.items():
        for problem in problems:
            filled = opd.fill_template(template, problem)
            problem["prompt_ids"] = opd.encode_prompt(tokenizer, filled, "{problem}")
        metrics, answers = opd.evaluate(
            student,
            tokenizer,
            problems,
            max_length=64,
            vocab_size=len(tokenizer),
            eos_ids=opd.stop_ids(student, tokenizer),
            temperature=0.7,
        )
        numbers = [last_number(answer["response"]) == answer["answer"] for answer in answers]
        cells = [metrics["avg_at_n"], metrics["answered_fraction"], sum(numbers) / len(numbers)]
        cells = [f"{cell:.0%}" for cell in [*cells, metrics["stopped_fraction"]]]
        print(ROW.format(name, *cells, f"{metrics['mean_length']:.0f}"), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
