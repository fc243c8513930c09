"""
Tests of the grading of answers: is_correct, last_boxed and ask_math_verify of opd.py. The tables
have spellings that models or data sets write, with verdicts by hand.
"""

import torch

torch.set_num_threads(1)  # tiny tensors gain next to nothing from more

import concurrent.futures
import os
import sys
import threading
import time

import pytest
import transformers

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import opd
from test_opd import TWO, evaluate


@pytest.fixture(scope="module", autouse=True)
def warm():
    opd.ask_math_verify("1", "2", seconds=60)  # its first question takes longer than later ones


def boxed(answer):
    return f"Thus \\boxed{{{answer}}}."


# By kind: (gold, answers that are right, answers that are wrong)
SPELLINGS = [
    # Layout only
    ("14", [r"14\,", r"14~", r"14\ ", r"14\qquad", r"\;14\!"], [r"1\,5"]),
    ("(1,-2)", [r"\left(1,\,-2\right)", r"\Bigl(1,-2\Bigr)"], ["(-2,1)"]),
    (
        r"\begin{pmatrix}1\\2\end{pmatrix}",
        [r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"],
        [r"\begin{pmatrix} 1 & 2 \end{pmatrix}"],
    ),
    (r"x \leftarrow y", [r"x\leftarrow y"], [r"y\leftarrow x"]),
    ("14", ["$14$", r"\$14", "**14**", r"14 \checkmark", "14 ✅", "€14", "£14"], [r"\$15"]),
    ("14", [r"\color{blue}14", r"\textcolor{blue}{14}"], [r"\color{blue}15"]),
    ("14", [r"\begin{aligned} n &= 14 \end{aligned}"], [r"\begin{aligned} n &= 15 \end{aligned}"]),
    ("3:4", [r"\text{3:4}", r"\mbox{3:4}", r"\mathrm{3:4}"], [r"\text{4:3}"]),
    ("14", ["14.", "14;", r"14\\", "14 .", r"\text{14}."], ["14!", "1.4"]),
    ("1250", [r"1\,250", r"1\,\,250", "1 250", r"1,\!250", "1,250"], ["1 25", "1, 250, 0"]),
    ("1,250", [r"1\,250", "1 250"], ["250"]),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", [r"\begin{pmatrix}1\\[4pt]2\end{pmatrix}"], []),
    # Powers of ten, also as JSON writes floats; decimals, to twelve places
    ("2.75e11", [r"2.75 \times 10^{11}", "275000000000", "2.75E+11"], ["2.75e12", "2.75"]),
    ("1e-05", ["0.00001", r"10^{-5}"], ["0.0001"]),
    ("0.0000672", ["6.72e-5"], ["0.000067"]),
    (r"\frac{1}{3}", [r"\dfrac13"], ["0.333333", "0.33333333"]),
    # A single last letter is not a unit
    ("3c", [r"c \cdot 3"], ["3", "3d"]),
    (r"\omega t", [r"t\omega"], [r"\omega"]),
    ("1 + t", ["t + 1"], ["1"]),
    # Names before the answer, units with capitals or of several words, the range of an integer
    ("18", [r"\text{Total} = \$18", r"\text{Total cost} = 18", "f(x, y) = 18"], ["18 = 19"]),
    ("5", [r"5 \text{ N}", r"5 \mathrm{~km} / \mathrm{s}", r"5 \text{cm}^{-1}"], ["5N^2"]),
    ("64", [r"64^\circ\text{F}", "64°F", "64¢"], [r"65^\circ\text{F}"]),
    (r"(2k+1)\pi", [r"(2k+1)\pi, k \in \mathbb{Z}"], [r"2k\pi, k \in \mathbb{Z}"]),
    (r"10 \text{ mm}", ["10", "10 mm", r"10 \text{ millimeters}"], [r"10 \text{ m}", "10 cm"]),
    # Two answers in one
    (
        r"\frac{1+\sqrt5}{2}, \frac{1-\sqrt5}{2}",
        [r"\frac{1\pm\sqrt5}{2}", r"x = \frac{1 \pm \sqrt{5}}{2}"],
        [r"\frac{1\pm\sqrt3}{2}"],
    ),
    # Unicode signs
    ("-7", ["–7", "−7", "—7"], ["7"]),
    ("x^3+y^2", ["x³+y²"], ["x²+y³"]),
    (r"-\infty", ["−∞"], ["∞"]),
    ("(5,6)", ["（5，6）"], ["（6，5）"]),
    (r"\frac{1}{2}", ["½"], ["¼"]),
    (r"\frac{5}{2}", ["2½"], ["½"]),
    (r"2\sqrt{3}", ["2√3", "√12", "2√(3)", r"2\sqrt3"], ["3√2"]),
    (r"\sqrt[3]{5}", [r"\sqrt[3]5"], [r"\sqrt5"]),
    ("-7", ["‐7", "‑7"], ["7"]),
    (r"\{1, 2\}", ["｛1，2｝"], ["｛1，3｝"]),
    (r"\frac{3}{4}", ["¾"], ["¼"]),
    (r"\frac{2}{3}", ["⅔", "2⁄3"], ["⅓"]),
    ("x^{-12}", ["x⁻¹²"], ["x⁻¹", "x^{-1}2"]),
    ("x_1", ["x₁"], ["x₂", "x¹"]),
    ("x_{12}", ["x₁₂"], ["x₁₃"]),
    ("-4", ["－４", "−4。", "≈-4"], ["４"]),
    (r"50\%", ["５０％"], ["６０％"]),
    (r"(-\infty,1)\cup(2,\infty)", ["(−∞,1)∪(2,∞)"], ["(−∞,1)∩(2,∞)"]),
    (r"[1,2] \cup [3,4]", ["[1,2] ∪ [3,4]"], ["[1,2] ∩ [3,4]"]),
    (r"A \cup B", ["A∪B"], ["A∩B"]),
    (r"A \cap B", ["A∩B"], ["A∪B"]),
    (r"\{x \mid x>3\}", ["｛x | x > 3｝"], ["｛x | x > 4｝"]),
    # Fonts, braces, dots, pi
    ("14", [r"\boldsymbol{14}", r"\bf 14", r"\Large 14", "`14`", r"\underline{14}"], [r"\bf 15"]),
    (r"\mathbb{R}", [r"\mathbb R", r"\text{all real numbers}", "all reals"], [r"\mathbb Z"]),
    (r"\frac{\pi}{2}", [r"\frac\pi2", "pi/2"], ["pi/3"]),
    (r"1, 3, 5, \dots", [r"1,3,5,\ldots", "1, 3, 5, ..."], [r"1,3,7,\ldots"]),
    ("3:00", [r"3{:}00 \text{ PM}", r"3 \colon 00"], ["3:30"]),
    ("3:4:5", ["3 : 4 : 5"], ["3:5:4"]),
    # Sentences
    ("14", [r"\text{The answer is }14", r"\text{Final answer: }14", r"\approx 14", "= 14"], []),
    (r"\text{Answer: }14", ["14"], ["41"]),
    ("2, 7", [r"2 \text{ and } 7", r"x=2 \text{ or } x=7", r"\text{7 and 2}", "7 or 2"], ["27"]),
    ("36", [r"36 \text{ or equivalently } 6^2"], [r"36 \text{ or } 37"]),
    (r"\emptyset", [r"\varnothing", r"\text{the empty set}", r"\text{no real solutions}"], ["0"]),
    # Units
    ("12", [r"12\text{ m}", r"12\,\mathrm{m^2}", r"12\text{ m}^2", "12 cm", r"12~\text{m/s}"], []),
    ("60 km/h", ["60", r"60\text{ km/h}"], ["60 m/s", "50"]),
    (r"3\,\text{m/s}", ["3 m/s", "3"], ["3 km/s", "3 m"]),
    (r"12\text{ cm}", ["12", r"12\text{ centimeters}"], [r"12\text{ m}", r"12\text{ kg}", "12 km"]),
    (r"9\text{ cm}^2", [r"9\text{ square centimeters}"], [r"8\text{ square centimeters}"]),
    (r"5\text{ cm}^2", ["5 square cm", "5 sq. cm", "5"], [r"5\text{ cm}^3", r"5\text{ cm}"]),
    (r"5\text{ m}", [r"5\text{ meters}"], [r"5\text{ miles}", r"5\text{ min}"]),
    (r"25^\circ C", ["25", r"25^\circ"], [r"25^\circ F"]),
    (r"12.5\%", ["12.5", r"12.5 \text{ percent}", "0.125"], ["125"]),
    ("12.5", [r"12.5\%"], [r"13.5\%"]),
    ("0.5", [r"50\%"], [r"0.5\%"]),
    (r"7 \text{ hours}", ["7 hours", r"7\,\text{h}"], [r"7 \text{ days}"]),
    (
        "4",
        ["4cm", "4cm^2", "4m²", "4 m^3", "4 sq units", "A = 4 cm", "USD 4", "₹4", "Rs. 4"],
        ["4x"],
    ),
    (r"4\text{ cm}^2", ["4cm^2", "4cm²", "4 sq cm", r"4\text{cm}^{2}"], ["4cm", "4cm³", "4m²"]),
    (r"5^\circ C", ["5 ℃", "5℃", "5º"], ["6℃"]),
    ("6:30", [r"6\!:\!30", "6:30 PM", "t = 6:30"], ["16:30"]),
    ("3:4", [r"\frac{3}{4}", "6:8"], ["4:3"]),
    (r"\frac{5}{2}", [r"\frac{5}{2} inches", r"\frac{5}{2} cm"], [r"\frac{5}{2} xyz"]),
    (r"90\pi", [r"90\pi cubic feet", r"90\pi \text{ cm}^3"], [r"90\pi sin(x)"]),
    (r"2\sqrt{3} miles", [r"2\sqrt{3}", r"2\sqrt{3} \text{ miles}"], [r"2\sqrt{3} hours"]),
    ("4:15", [r"4:15 \text{ PM}", r"\text{4:15 p.m.}", "4:15 am"], ["4:51"]),
    (r"8 \text{ AM}", ["8"], [r"8 \text{ PM}", "8 pm"]),
    ("25", [r"\text{25 points}", "25%", r"25 \text{ percent}"], ["25x"]),
    ("45", ["45°", r"45^{\circ}", r"45^\circ", r"45\degree", r"45^{\text{o}}"], ["54°"]),
    (r"30^\circ, 60^\circ", ["60°, 30°", "30, 60"], ["30°"]),
    (r"45^\circ", [r"\text{45 degrees}"], [r"45\text{ rad}"]),
    # Bases and remainders
    ("1101_2", ["1101", "(1101)_2", "1101_{2}", r"1101_{\text{two}}"], ["1101_8", "1100_2"]),
    (r"345_{6}", ["345_6", "(345)_{6}"], ["345_7", "354_6"]),
    ("1011_2", [r"1011_{\text{base }2}", r"1011_{\text{base two}}"], [r"1011_{\text{three}}"]),
    (r"1011_{\text{two}}", ["1011_2", "1011"], ["1011_3", r"1011_{\text{three}}"]),
    ("1011_{16}", [r"1011_{\text{sixteen}}", r"1011_{\text{base 16}}"], [r"1011_{\text{six}}"]),
    ("101_{(3)}", ["101_3", "(101)_{(3)}"], ["101_{(2)}", "101_2"]),
    ("2A_{16}", ["2A", r"2A_{\text{sixteen}}", r"\text{2A}_{16}"], ["A2_{16}", "2A_{12}"]),
    ("ABC_{16}", ["ABC_{16}."], ["BAC_{16}", "ABC_{12}"]),
    (r"n \equiv 1 \pmod 4", [r"n\equiv1\,(\text{mod }4)", "n ≡ 1 (mod 4)"], ["n ≡ 1 (mod 3)"]),
    (r"\gcd(x, n) = 1", [r"\gcd\left(x,n\right)=1"], [r"\gcd(y,n)=1", r"\gcd(x,n)=2", r"p \in I"]),
    (r"\gcd(c,d)", [r"\gcd(c, d)"], [r"\gcd(a,b)"]),
    (r"\gcd(12,18)", ["6"], ["5"]),
    (r"p \in I", [r"p\in I"], [r"q \in I"]),
    (r"x \in [1,2]", ["[1,2]"], ["[1,3]"]),
    (
        r"x \equiv 2 \pmod{5}",
        [r"x\equiv 2 \pmod 5", r"x \equiv 2 (\bmod 5)"],
        [r"x \equiv 3 \pmod{5}", r"x \equiv 2 \pmod{7}", r"3 \pmod 5", "5", "2"],
    ),
    (r"2y \bmod 9", [r"2 y \bmod 9"], ["9", r"4y \bmod 9", "2y"]),
    (r"A \to 7", [r"A\to 7"], ["7"]),
    (r"p \nmid 7", [r"p\nmid 7"], ["7"]),
    # Choices, words, strings of capitals, lists
    (
        "D",
        [r"\textbf{(D) }\frac{1}{2}", "D.", "D) 8", r"\text{D. } 8", r"\text{Option D}"],
        ["A. D"],
    ),
    ("D", [r"$\textbf{(D)}\ 8$", r"\mathbf{(D)}\ 8"], [r"$\textbf{(C)}\ 8$"]),
    (r"\textbf{(D)}\ 12", ["D", r"\text{(D)}"], [r"\textbf{(E)}\ 12"]),
    ("J", ["(J) 42", "J. 42"], ["(E) 42"]),
    ("(A) 3, (B) 4", ["(A) 3, (B) 4"], ["(A) 4, (B) 3", "A"]),
    (r"\text{Friday}", ["Friday", r"\textbf{friday}", r"\text{Friday}."], ["Sunday", "Fri"]),
    ("No", [r"\text{no}", r"\text{No.}"], ["on", "Not"]),
    (r"\text{March 3}", ["March 3", r"\text{March }3"], [r"\text{March 4}", "3", "May 3"]),
    ("CAB", [r"\text{CAB}"], ["ABC", "BCA"]),
    ("DE", [r"\mathrm{DE}"], ["ED"]),
    ("A, D", [r"\text{A, D}", r"\text{A and D}", "D, A"], ["A", "A, C"]),
    # The same words, as text or not
    ("Alice and Bob", [r"\text{Alice and Bob}"], ["Alice", r"\text{Bob and Eve}"]),
    (r"\text{Paris, France}", ["Paris, France"], ["Paris", "Lyon, France"]),
    (r"\text{I and III only}", ["I and III only"], ["I and II only"]),
    (r"\le 3", ["≤3"], ["≥3"]),
    (r"\ge 3", ["≥3"], ["≤3"]),
    (r"10 \text{ m/s}^2", ["10 m/s^2", "10"], ["10 m/s"]),
    ("10", ["10 m/s^2"], ["100 m/s^2"]),
    (r"\frac{MN}{2}", [r"\frac{1}{2}MN"], [r"\frac{1}{2}MP"]),
    ("AB + CD", ["CD + AB", "CD+AB"], ["AB - CD"]),
    ("2AB", [r"2 \cdot AB", "2BA"], ["2AC"]),
    (r"\angle ABC", [r"\angle \text{ABC}", r"\angle A B C"], [r"\angle BAC"]),
    ("(ABC)", [r"(\text{ABC})", r"\left(ABC\right)"], ["(ACB)"]),
    ("ABC1", ["ABC1"], ["ACB1"]),
    ("ABC, CAB", ["CAB, ABC", r"\text{ABC, CAB}"], ["ABC, BCA"]),
    (r"\{HH, HT\}", [r"\{\text{HT}, \text{HH}\}"], [r"\{HH, TH\}"]),
    (r"\text{I and III}", ["I, III"], [r"\text{I and II}"]),
    ("4AC - B^2", ["-B^2 + 4CA"], ["4AB - C^2"]),
    (r"\frac{MN}{2}", [r"\frac{NM}{2}"], [r"\frac{MP}{2}"]),
    ("abc", ["cab"], ["abd"]),
    (r"\text{at least } 5", [r"\text{at least }5"], ["5", r"\text{at most } 5"]),
    (r"n \text{ even}", [r"n \text{ even}"], ["n", r"n \text{ odd}"]),
    (r"m \text{ is even}", [r"m \text{ is even}"], [r"m \text{ is odd}"]),
    (r"1, 2, \ldots, 9", [r"1,2,\ldots,9"], [r"1,3,\ldots,9", "2"]),
    ("1, 2, 3, ...", ["1,2,3,..."], ["1, 2, 3"]),
    ("5", ["area = 5"], ["area = 6"]),
    # Numbers
    (r"-\frac{7}{2}", ["−3 1/2", "-3 1/2"], ["3 1/2"]),
    (r"\frac{7}{2}", ["3 1/2", r"3\frac{1}{2}", "3.5"], ["31/2", "3"]),
    ("4 2/3", [r"\frac{14}{3}"], ["4"]),
    ("2^{-98}", [r"\frac{1}{2^{98}}"], ["2^{-99}"]),
    (r"1.1\sqrt{2}", [r"\frac{11\sqrt{2}}{10}"], [r"1.2\sqrt{2}"]),
    ("3+2i", [r"3 + 2\mathrm{i}", "2 i + 3"], [r"3 - 2\mathrm{i}"]),
    (r"1+i", [r"\sqrt{2}e^{i\pi/4}", "(2+2 i)/2"], ["1-i"]),
    ("a_i + b", ["b + a_i"], ["a_i - b"]),
    # Intervals: inequalities count only if the gold cannot be a point
    ("(2,5]", [r"2 < x \leq 5", r"x \in (2,5]"], [r"2 < x < 5", r"2 \le x \le 5"]),
    (r"[3,\infty)", [r"t \ge 3", r"3 \le x"], ["t > 3", r"t \le 3"]),
    ("(2,5)", ["(2, 5)"], ["2<x<5"]),
    (r"(3,\infty)", [r"\{x \mid x > 3\}", r"\left\{x : x>3\right\}"], [r"\{x \mid x < 3\}"]),
    # Golds as data sets write them
    ("2+3 = <<2+3=5>>5\n#### 5", ["5"], ["2"]),
    ('["8"]', ["8"], ["9"]),
    (r"so $\boxed{8}$", ["8"], ["9"]),
]
TAKEN = [(gold, answer) for gold, taken, _ in SPELLINGS for answer in taken]
REFUSED = [(gold, answer) for gold, _, refused in SPELLINGS for answer in refused]


@pytest.mark.parametrize("gold, answer", TAKEN)
def test_another_spelling_of_the_gold_is_right(gold, answer):
    assert opd.is_correct(boxed(answer), gold) is True


@pytest.mark.parametrize("gold, answer", REFUSED)
def test_what_only_looks_like_the_gold_is_wrong(gold, answer):
    assert opd.is_correct(boxed(answer), gold) is False


@pytest.mark.parametrize("gold", sorted({gold for gold, _, _ in SPELLINGS if "####" not in gold}))
def test_every_gold_in_a_box_is_right(gold):
    assert opd.is_correct(boxed(gold), gold)


# --------------------------------------------------------------------------------------------------
# Boxes


@pytest.mark.parametrize(
    "text, content",
    [
        (r"\boxed 42", "42"),
        (r"so $\boxed4$.", "4"),
        (r"\boxed -3.5.", "-3.5"),
        (r"\boxed 1,234, or so", "1,234"),
        (r"\boxed 3/4.", "3/4"),
        (r"$\boxed\frac{1}{2}$", r"\frac{1}{2}"),
        (r"$\boxed A$", "A"),
        (r"$\boxed x$", "x"),
        (r"$\boxed4$ as \boxed was asked for", "4"),
        (r"\boxed{3}, as \boxed was asked for", "3"),
        (r"\boxed{\begin{pmatrix}1\\{2}\end{pmatrix}}", r"\begin{pmatrix}1\\{2}\end{pmatrix}"),
        (r"\boxed{\{1\}\\\{2\}}", r"\{1\}\\\{2\}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{1} then \boxed{\frac{2}{3}", "1"),
        ("", None),
    ],
)
def test_last_boxed_returns_the_content_of_the_last_whole_box_with_or_without_braces(text, content):
    assert opd.last_boxed(text) == content


@pytest.mark.parametrize(
    "response, gold, right",
    [
        (r"$\boxed{6}$ or $\boxed{8}$", "6,8", True),
        (r"\boxed{\frac{1}{2}} and \boxed{-2}", r"-2, \frac{1}{2}", True),
        (r"\boxed{(1,2)} and \boxed{(3,4)}", "(1,2), (3,4)", True),
        (r"\boxed{6}, \boxed{8}", r"6, \text{ and } 8", True),
        (r"\boxed{6}, \boxed{7}, \boxed{8}", "6,8", False),
        (r"\boxed{6} or \boxed{9}", "6,8", False),
        (r"x = \boxed 6 or x = \boxed 8", "6,8", True),
        (r"$\boxed6$ and $\boxed{8}$", "6,8", True),
        (r"$\boxed6$ and $\boxed9$", "6,8", False),
        (r"$\boxed6$ and $\boxed8$", "8", True),
        (r"\boxed{6, 8}. Again: \boxed{6, 8}", "6,8", True),
        (r"\boxed{6} or \boxed{8}, as I said \boxed{8}", "6,8", True),
        (r"\boxed{5}, no: \boxed{6, 8}", "6,8", True),
        (r"\boxed{6} or \boxed{8}", "8", True),
        (r"\boxed{8}, no: \boxed{6}", "8", False),
        (r"\boxed{6} or \boxed{8}", "(6,8)", False),
        (r"<think>\boxed{6}</think> \boxed{8}", "6,8", False),
        (r"First \boxed{5}, then \boxed{70000}", "70,000", True),
        (r"\boxed{1}, then \boxed{234}", "1,234", False),
        (r"\boxed{\frac{\sqrt{2}}{2}}, \boxed{-1}", r"\frac{\sqrt{2}}{2}, -1", True),
    ],
)
def test_several_boxes_are_a_list_only_if_the_gold_is_a_list_of_as_many(response, gold, right):
    assert opd.is_correct(response, gold) is right


# --------------------------------------------------------------------------------------------------
# Thoughts


@pytest.mark.parametrize(
    "response, right",
    [
        (r"<think>Try \boxed{9}? Let me check", False),
        (r"Well. <think>\boxed{9}", False),
        (r"<think>no</think> so <think> \boxed{9}", False),
        (r"<think>\boxed{9}</think> \boxed{8}", False),
        (r"<think>\boxed{8}</think> \boxed{9}", True),
        (r"\boxed{8}</think></think> \boxed{9}", True),
        (r"\boxed{9}", True),
    ],
)
def test_a_box_inside_thoughts_closed_or_not_does_not_count(response, right):
    assert opd.is_correct(response, "9") is right


@pytest.mark.parametrize(
    "prompt, text, no_box",
    [
        ("Assistant: <think>\n", r"Try \boxed{1}? Hmm", 1),
        ("Assistant: <think>\n", r"yes </think> \boxed{1}", 0),
        ("Assistant: <think>\n\n</think>\n\n", r"\boxed{1}", 0),
        ("Write <think> first. Assistant:", r"\boxed{1}", 0),
        (r"Answer in \boxed{}.", "one", 1),
    ],
)
def test_a_prompt_can_open_the_thoughts(prompt, text, no_box, monkeypatch):
    """no_box_fraction follows the same rule."""

    def decode(_, ids, **__):
        return prompt if ids == TWO[0]["prompt_ids"] else text

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "decode", decode)
    metrics, answers = evaluate(TWO[0])
    assert metrics["no_box_fraction"] == no_box
    assert metrics["avg_at_n"] == 1 - no_box
    assert answers[0]["response"] == text


@pytest.mark.parametrize("opened", [False, True])
def test_tags_of_thoughts_that_are_special_tokens_count_as_well(opened):
    """The other special tokens are left out."""
    words = ["<pad>", "<end>", "<think>", "</think>", "Try", "\\boxed{42}", "\\boxed{9}"]
    tokenizer = opd.tiny_tokenizer(words)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    problem = {"prompt_ids": [4, 2] if opened else [4], "answer": "42"}
    begun = [] if opened else [2]
    assert opd.graded_text(tokenizer, [2, 4, 3, 5, 1, 0]) == "<think> Try </think> \\boxed{42}"
    assert not opd.is_solved(tokenizer, problem, [*begun, 4, 5, 1])
    assert opd.is_solved(tokenizer, problem, [*begun, 6, 3, 5, 1])


# --------------------------------------------------------------------------------------------------
# Boundaries


@pytest.mark.parametrize(
    "response, gold",
    [
        (boxed('{"a": 1}'), '{"a": 2}'),
        (boxed("NaN"), "0"),
        (boxed("5"), "NaN"),
        (boxed("\ud800"), "5"),
        (boxed("5"), "\ud800"),
        (boxed("}{"), "5"),
        (boxed("5"), "}{"),
        (boxed(r"\frac{}{"), "5"),
        (boxed(r"\text{"), "5"),
        (boxed('"'), '"5"'),
        (boxed("_" * 4000), "5"),
        (boxed("," * 4000 + "x"), "5"),
        (boxed(" and" * 900), "5"),
        (boxed("(" * 12), "5"),
        (boxed("9" * 1_000_000), "5"),
        (boxed("5"), "9" * 1_000_000),
        ("\\boxed{" * 140_000, "5"),
        ("\\boxed " * 140_000, "5"),
        ("{" * 1_000_000 + "\\boxed{6}", "5"),
        ("\\boxed{" + "{" * 1_000_000, "5"),
        ("<think>" * 140_000, "5"),
        ("</think>" * 120_000 + "\\boxed{6}", "5"),
    ],
    ids=range(22),
)
def test_no_text_raises_or_takes_long_and_the_next_answer_is_graded(response, gold):
    begin = time.perf_counter()
    assert opd.is_correct(response, gold) is False
    assert time.perf_counter() - begin < 6  # 3 in math-verify
    assert opd.is_correct(r"\boxed{\frac{2}{4}}", "0.5")


@pytest.mark.parametrize(
    "answer",
    [
        r"5\text{" + "x" * 2000 + "{y}}",
        "5" + r"\;" * 1500 + "x",
        "5" + "~" * 3000 + "x",
        "5_" + "~" * 1500 + "x" + "~" * 1500 + "y",
        "5^" + "~" * 3000 + "x",
        r"\a{" + "~" * 3000 + "x",
    ],
    ids="text thin wide base power wrapped".split(),
)
def test_spell_takes_under_two_seconds_on_a_long_run_that_matches_nothing(answer):
    """A pattern that tries all ways to split a run takes minutes, and the training waits."""
    begin = time.perf_counter()
    opd.spell(answer)
    assert time.perf_counter() - begin < 2


def test_a_unit_may_be_abbreviated_and_a_long_text_is_searched_for_one_in_two_seconds(monkeypatch):
    """An abbreviation has letters of the unit, in order, from the first: gal stands for gallons."""
    monkeypatch.setattr(opd, "ask_math_verify", lambda *_: False)
    begin = time.perf_counter()
    assert not opd.is_correct(r"\boxed{5 \text{" + "galon" * 120 + "}}", r"5 \text{ gallonz}")
    assert time.perf_counter() - begin < 2
    assert opd.is_correct(r"\boxed{5 \text{ gal}}", r"5 \text{ gallons}")
    assert not opd.is_correct(r"\boxed{5 \text{ lag}}", r"5 \text{ gallons}")
    assert not opd.is_correct(r"\boxed{5 \text{ allons}}", r"5 \text{ gallons}")


def test_what_stands_before_the_last_end_of_thoughts_does_not_count():
    thoughts = r"</think> \boxed{5} is what I thought first </think> "
    assert not opd.is_correct(thoughts + "so I do not know", "5")
    assert opd.is_correct(thoughts + r"\boxed{6}", "6")


def test_a_lone_surrogate_leaves_the_process_of_math_verify_alive():
    opd.ask_math_verify("1", "1")
    before = opd.OF_THREAD.process.pid
    opd.ask_math_verify("\ud800", "\udfff5")
    assert opd.ask_math_verify("0.5", r"\frac{2}{4}")
    assert opd.OF_THREAD.process.pid == before


def test_threads_get_the_verdicts_of_their_own_answers():
    pairs = [("0.5", rf"\frac{{{index % 3}}}{{2}}") for index in range(60)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        verdicts = list(pool.map(opd.ask_math_verify, *zip(*pairs)))
    assert verdicts == 20 * [False, True, False]


@pytest.mark.parametrize("gold", ['{"a": 1}', "NaN", "\ud800", "}{", '""', "", "None", "\\", "0/0"])
def test_an_odd_gold_does_not_raise_and_does_not_equal_5(gold):
    assert opd.is_correct(r"\boxed{5}", gold) is False


def test_a_module_of_the_folder_does_not_stand_in_for_math_verify(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(opd, "OF_THREAD", threading.local())
    assert opd.ask_math_verify("1", "1")
    opd.OF_THREAD.process.kill()
