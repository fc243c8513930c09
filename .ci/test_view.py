"""
Tests of rollouts.html, section 18 of opd.py: what it shows of a step, that a model's text is never
markup, that a run is the same without it. The page is parsed by html.parser; how its style sheet
colours the numbers is not tested here: it was checked in a browser.
"""

import torch

torch.set_num_threads(1)  # tiny tensors gain next to nothing from more

import contextlib
import errno
import functools
import html.parser
import io
import itertools
import os
import re
import sys
import time
import types

import pytest
import tokenizers
import transformers

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import opd
import test_opd
from test_opd import (
    END,
    STUDENT,
    TEACHER,
    WORDS,
    V,
    close,
    make_batch,
    outcome,
    rows_of,
    without_padding,
)

# Other tests run the small world with --no_view
command = functools.partial(test_opd.command, no_view=None)
train = functools.partial(test_opd.train, no_view=None)
flags = functools.partial(test_opd.flags, no_view=False)

# --------------------------------------------------------------------------------------------------
# Helpers, all of them

world = test_opd.world
runs = test_opd.runs
TOKENIZER = opd.tiny_tokenizer(WORDS)
GUIDED = {"method": "prefix-guided", "prefix_length": 6, "probe_window": 4}
FINISHED = {**GUIDED, "batch_size": 5, "num_generations": 4, "keep_ratio": 0.25}
FINISHED |= {"max_steps": 3, "eval_every": 2}


class Page(html.parser.HTMLParser):
    """What a browser would see: the text of each token by row, headlines, and what tokens say."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.names, self.rows, self.texts, self.inside = [], set(), [], {}, []
        self.style, self.tips = [], []  # by token: {name: value}, lines
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.names |= {*attributes}
        if tag == "div":
            self.rows.append([])
        if tag == "span":
            self.rows[-1].append("")
            pairs = [pair.split(":") for pair in attributes["style"].split(";")]
            self.style.append({name.removeprefix("--"): float(value) for name, value in pairs})
            self.tips.append(attributes["data-tip"].split("\n"))
        if tag not in ("meta", "input"):
            self.inside.append(tag)
        self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        while self.inside.pop() != tag:
            pass

    def handle_data(self, text):
        if "span" in self.inside:
            self.rows[-1][-1] += text.removeprefix(" ")  # in front of most words
        for tag in {*self.inside}:
            self.texts[tag][-1] += text

    def values(self, name):
        return torch.tensor([style[name] for style in self.style])


def likeliest(tip, who):
    """The lines of a tip -> the words of a model, 0 student, 1 teacher, and their probabilities."""
    lines = [re.fullmatch(r"(\S*) +([\d.]+)% +(\S*) +([\d.]+)%", line.strip()) for line in tip[3:]]
    words = [line[1 + 2 * who] for line in lines]
    return words, torch.tensor([float(line[2 + 2 * who]) / 100 for line in lines])


def page_of(folder):
    return Page((folder / "rollouts.html").read_text(encoding="utf-8"))


def run_of(folder, problems, out, tokenizer=TOKENIZER, plan=None, **changes):
    """-> (config, run) after a step whose rollout is out."""
    changes = {"student": "s", "teacher": "t", "output_dir": str(folder), **changes}
    config = flags(**changes)
    run = opd.Run({}, [], student=STUDENT, sampler=STUDENT, teacher=TEACHER, step=7)
    run.tokenizer, run.device, run.vocab_size = tokenizer, torch.device("cpu"), V
    run.sampling = {"vocab_size": V, "eos_ids": {END}, "temperature": config.temperature}
    run.rows_at_once = {"rollout_batch_size": len(problems)}
    if out:
        plan = plan or opd.plan_rollout(config, 7, cap=12)
        out["token_weight"], out["loss_mask"] = opd.token_weights(config, out)
        run.shown = opd.first_rows(config, problems, plan, out)
    return config, run


def shown(folder, **changes):
    """The page of a rollout of four prompts, one candidate each -> (Page, its rollout)"""
    out = make_batch(STUDENT, TEACHER, max_length=12)
    prompts = without_padding(out["prompt_ids"], out["prompt_mask"])
    problems = [{"prompt_ids": ids, "answer": None, "problem": ""} for ids in prompts]
    opd.write_view(*run_of(folder, problems, out, num_generations=1, **changes))
    return page_of(folder), out


def byte_tokenizer():
    """One token per byte: byte-level BPE without merges."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core)


def one_row(ids, problem):
    """What first_rows keeps of a single response that ended."""
    response, ones = torch.tensor([ids]), torch.ones(1, len(ids))
    shown = {"response_ids": response, "response_mask": ones.bool(), "overlap": ones}
    shown |= {"token_weight": ones, "loss_mask": ones.bool()}
    for name in ("prompt", "teacher_prompt"):
        shown[f"{name}_ids"] = torch.tensor([problem["prompt_ids"]])
        shown[f"{name}_mask"] = torch.ones_like(shown[f"{name}_ids"]).bool()
    return {**shown, "stopped": ["ended"], "problems": [problem], "borders": []}


def said(text, folder, length=None, tokenizer=None):
    """The page of one response, a text or its ids, repeated up to a length if given -> Page"""
    tokenizer = tokenizer or byte_tokenizer()
    ids = tokenizer.encode(text) if isinstance(text, str) else text
    ids = (ids * (length or 1))[: length or len(ids)]
    problem = {"prompt_ids": tokenizer.encode("<b>&"), "answer": "</h2>", "problem": ""}
    config, run = run_of(folder, [], None, tokenizer)
    run.vocab_size = run.sampling["vocab_size"] = 256
    run.sampler = run.student = run.teacher = test_opd.tiny_llama(
        1, vocab_size=256, max_position_embeddings=8192
    )
    run.shown = one_row(ids, problem)
    opd.write_view(config, run)
    return page_of(folder)


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """A run of three steps, evaluated after the second and the last -> what the tests use of it"""
    folder = tmp_path_factory.mktemp("finished")
    done = types.SimpleNamespace(folder=folder, updates=[], written=[], said=io.StringIO())
    real = opd.write_view

    def watched(config, run):
        done.written.append(run.step)
        done.run = run
        real(config, run)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(done.said):
        test_opd.watch_updates(patch, done.updates)
        patch.setattr(opd, "write_view", watched)
        opd.main(command(world, folder, **FINISHED))
    done.page = page_of(folder)
    return done


# --------------------------------------------------------------------------------------------------
# What it shows


def test_every_token_of_a_response_is_a_span(tmp_path):
    page, out = shown(tmp_path)
    expected = without_padding(out["response_ids"], out["response_mask"])
    assert page.rows == [[WORDS[token] for token in row] for row in expected]


def test_the_overlap_and_weight_of_a_token_are_those_of_its_rollout(tmp_path):
    page, out = shown(tmp_path, method="prune", w_drop=0.1)
    mask = out["response_mask"]
    for name, values in (("overlap", out["overlap"]), ("weight", out["token_weight"])):
        close(page.values(name), values[mask], atol=6e-4, rtol=0)


def test_tokens_that_are_not_trained_on_have_weight_0(tmp_path):
    out = make_batch(STUDENT, TEACHER, max_length=12)
    out["kept"][1], out["ended"][1] = False, False
    out["overlap"][1] = 0
    problems = [{"prompt_ids": [5], "answer": None}] * 4
    opd.write_view(*run_of(tmp_path, problems, out, num_generations=1, **GUIDED))
    page = page_of(tmp_path)
    ends = [0, *itertools.accumulate(map(len, page.rows))]
    weights = page.values("weight").tolist()
    assert {*weights[ends[1] : ends[2]]} == {0.0}
    assert {*weights[: ends[1]]} == {1.0} == {*weights[ends[2] :]}


def test_likeliest_tokens_kl_and_advantage_are_those_of_plain_forwards_of_both_models(tmp_path):
    page, out = shown(tmp_path)
    place = 0
    for ids, prompt in rows_of(out):
        p = STUDENT(ids).logits[0, prompt - 1 : -1].log_softmax(-1)
        q = TEACHER(ids).logits[0, prompt - 1 : -1, :V].log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1)
        for t, token in enumerate(ids[0, prompt:].tolist()):
            numbers = page.tips[place][0]
            advantage = (q - p)[t, token].item()
            close(page.style[place]["advantage"], advantage, atol=6e-4, rtol=0)
            assert f"log q − log p {page.style[place]['advantage']:.3f}" in numbers
            close(float(re.match(r"KL ([\d.]+),", numbers)[1]), kl[t].item(), atol=6e-4, rtol=0)
            for who, log_probs in enumerate((p[t], q[t])):
                words, probs = likeliest(page.tips[place], who)
                best = log_probs.topk(5)
                assert words == [WORDS[index] for index in best.indices]
                close(probs, best.values.exp(), atol=6e-4, rtol=0)
            place += 1
    assert place == len(page.tips) == sum(map(len, page.rows))


def test_a_temperature_divides_the_logits_of_both_models(tmp_path):
    page, out = shown(tmp_path, temperature=3.0)
    ids, prompt = rows_of(out)[0]
    for who, model in enumerate((STUDENT, TEACHER)):
        best = (model(ids).logits[0, prompt - 1, :V] / 3).softmax(-1).max().item()
        close(likeliest(page.tips[0], who)[1][0].item(), best, atol=6e-4, rtol=0)


def test_the_teachers_probabilities_are_those_after_its_own_prompt(tmp_path):
    out = make_batch(STUDENT, TEACHER)
    own = [7, 8, 9, 10, 11, 12, 13]
    prompts = without_padding(out["prompt_ids"], out["prompt_mask"])
    problems = [{"prompt_ids": ids, "answer": None} for ids in prompts]
    out = opd.with_prompts(out, [own] * 4, "teacher_prompt")
    opd.write_view(*run_of(tmp_path, problems, out, num_generations=1))
    ids = torch.tensor([own + out["response_ids"][0][out["response_mask"][0]].tolist()])
    q = TEACHER(ids).logits[0, len(own) - 1, :V].softmax(-1)
    best = likeliest(page_of(tmp_path).tips[0], who=1)[1][0].item()
    close(best, q.max().item(), atol=6e-4, rtol=0)


@pytest.mark.parametrize("elements", [V, 7 * V])
def test_the_logits_of_all_tokens_never_exist_at_once(elements, tmp_path, monkeypatch):
    plain, _ = shown(tmp_path)
    monkeypatch.setattr(opd, "tokens_at_once", lambda size: elements // size)
    widths = []
    real = opd.head_logits

    def noted(model, states, *args, **kwargs):
        widths.append(len(states))
        return real(model, states, *args, **kwargs)

    out = make_batch(STUDENT, TEACHER)
    monkeypatch.setattr(opd, "head_logits", noted)
    prompts = without_padding(out["prompt_ids"], out["prompt_mask"])
    problems = [{"prompt_ids": ids, "answer": None, "problem": ""} for ids in prompts]
    opd.write_view(*run_of(tmp_path, problems, out, num_generations=1))
    assert max(widths) == elements // V and page_of(tmp_path).tips == plain.tips


def test_segment_borders_are_marked(tmp_path):
    shown(tmp_path)
    source = (tmp_path / "rollouts.html").read_text()
    assert ":is(span:nth-child(5), span:nth-child(9), span:nth-child(13)) {" in source  # 4, 8, 12


def headline(out, row, **changes):
    """What why_stopped says of a row of a made-up rollout, with 3 candidates per prompt."""
    return opd.why_stopped(flags(num_generations=3, **changes), out, row)


def made_rollout(scores, kept, ended=(), lengths=None):
    """Rows of constant overlap."""
    overlap = torch.tensor(scores)[:, None].expand(len(scores), 12).clone()
    lengths = lengths or [12 if keep else 6 for keep in kept]
    mask = torch.arange(12) < torch.tensor(lengths)[:, None]
    ends = torch.tensor([row in ended for row in range(len(scores))])
    return {
        "overlap": overlap * mask,
        "response_mask": mask,
        "kept": torch.tensor(kept).bool(),
        "ended": ends,
    }


def test_a_row_that_ended_and_one_that_was_cut_say_so():
    out = made_rollout([0.5, 0.5], [1, 1], ended=[0])
    assert headline(out, 0) == "ended" and headline(out, 1) == "cut"


def test_a_row_not_selected_names_its_score_and_the_least_that_was_kept_of_its_prompt():
    """Rows 0 to 2 are of one prompt, 3 to 5 of another."""
    out = made_rollout([0.9, 0.8, 0.7, 0.6, 0.5, 0.4], [1, 1, 0, 1, 0, 0])
    for row, own, least in ((2, 0.7, 0.8), (4, 0.5, 0.6), (5, 0.4, 0.6)):
        kept = f"least kept of this prompt {least:.3f}"
        assert headline(out, row, **GUIDED) == f"not selected: overlap {own:.3f} at first, {kept}"


def test_a_row_that_ended_before_the_prefix_does_not_count_as_kept_for_its_score():
    out = made_rollout([0.9, 0.8, 0.7], [1, 1, 0], ended=[1])
    out["response_mask"][1, 5:] = False
    assert headline(out, 2, **GUIDED).endswith("kept of this prompt 0.900")


def test_no_score_is_named_with_a_custom_rule_or_if_no_row_was_kept():
    out = made_rollout([0.9, 0.8, 0.7], [0, 0, 0])
    assert headline(out, 1, method="opd") == "not selected"
    assert headline(out, 1, **GUIDED) == "not selected"


def test_random_selection_names_no_score():
    out = made_rollout([0.9, 0.8, 0.7], [1, 0, 1])
    assert headline(out, 1, **GUIDED, select="random") == "not selected"


def test_a_row_that_drifted_names_its_bad_events():
    out = made_rollout([0.9, 0.9], [1, 0], lengths=[12, 8])
    out["overlap"][1, [2, 5]] = 0.1
    told = headline(out, 1, method="prune")
    assert told == "drifted: bad events at tokens [3, 6]"


def test_the_scores_named_are_those_by_which_the_run_selected(finished):
    batch = finished.updates[-1][1]
    scores = [f"{score:.3f}" for score in batch["overlap"][:, :4].mean(-1)]
    lines = finished.page.texts["h3"]
    lost = [row for row, line in enumerate(lines) if "not selected" in line]
    assert lost == [row for row in range(16) if not batch["kept"][row]] and len(lost) >= 2
    for row in lost:
        own, least = re.search(r"overlap (\S+) at first, .* (\S+) $", lines[row]).groups()
        assert own == scores[row] <= least
        selected = batch["kept"] & (batch["response_mask"].sum(-1) > 6)  # others ended before
        of_prompt = range(row - row % 4, row - row % 4 + 4)
        assert least == min(scores[other] for other in of_prompt if selected[other])


@pytest.mark.parametrize(
    "answer, text, verdict",
    [
        ("3", "\\boxed{ 3 }", "right"),
        ("3", "\\boxed{ 4 }", "wrong"),
        ("3", "4", "wrong"),
        (None, "\\boxed{ 3 }", ""),
    ],
)
def test_right_or_wrong_is_shown_if_the_gold_is_known(answer, text, verdict, tmp_path):
    ids = TOKENIZER.encode(text) + [END]
    config, run = run_of(tmp_path, [], None)
    run.shown = one_row(ids, {"prompt_ids": [5], "answer": answer})
    opd.write_view(config, run)
    assert page_of(tmp_path).texts["h3"] == [f"{len(ids)} tokens, ended {verdict}"]


def test_an_answer_that_is_not_known_is_said_to_be_so(tmp_path):
    shown(tmp_path)
    assert (tmp_path / "rollouts.html").read_text().count("(answer: not known)</h2>") == 4


@pytest.mark.parametrize(
    "stopped, cap, verdict",
    [("ended", 9, "wrong"), ("cut", 2, "wrong"), ("cut", 9, ""), ("not selected", 9, "")],
)
def test_a_response_that_a_method_stopped_is_not_called_wrong(stopped, cap, verdict, tmp_path):
    """A row of two tokens is cut by the cap if that is 2, else by the method."""
    config, run = run_of(tmp_path, [], None, max_new_tokens=cap)
    run.shown = one_row([5, 6], {"prompt_ids": [5], "answer": "3"}) | {"stopped": [stopped]}
    opd.write_view(config, run)
    assert page_of(tmp_path).texts["h3"] == [f"2 tokens, {stopped} {verdict}"]


def test_the_first_four_prompts_have_all_their_candidates(finished):
    assert len(finished.page.texts["h2"]) == 4 and len(finished.page.rows) == 16


def test_the_header_has_the_step_the_method_and_the_flags_that_differ(tmp_path):
    page, _ = shown(tmp_path, method="prune")
    told = " ".join(page.texts["p"])
    assert "Step 7" in told and "method prune" in told and str(tmp_path) in told
    assert "--max_new_tokens 12" in told and "--seed" not in told


def test_a_flag_is_never_markup(tmp_path):
    page, _ = shown(tmp_path, prompt_template="<h1>{problem} &amp;")
    assert len(page.texts["h1"]) == 1 and "<h1>{problem} &amp;" in " ".join(page.texts["p"])


def test_a_folder_of_a_model_whose_name_is_not_utf8_does_not_end_the_run(tmp_path):
    page, _ = shown(tmp_path, student="caf\udce9")
    assert "--student caf? " in page.texts["p"][0]


def test_the_header_has_no_list_that_was_not_given(finished):
    told = " ".join(finished.page.texts["p"])
    assert "--max_new_tokens 12" in told and "--mix" not in told and "[]" not in told


# --------------------------------------------------------------------------------------------------
# A model's text is never markup

HOSTILE = (
    "</script><script>x=1</script><img src=http://a/ onerror=x>&lt;&amp; \"'`$body %s {0}\n\n<!--"
)


def test_the_text_of_a_model_is_never_markup(tmp_path):
    plain, hostile = said("a", tmp_path), said(HOSTILE, tmp_path)
    assert {*hostile.tags} == {*plain.tags} and "script" not in hostile.tags
    assert hostile.texts["div"][0].replace("↵\n", "\n") == HOSTILE
    assert "<b>&" in hostile.texts["h2"][0] and "</h2>" in hostile.texts["h2"][0]


def test_a_token_that_looks_like_markup_is_text_in_the_row_and_in_the_table(tmp_path):
    words = [
        "</script><script>x=1</script>",
        "<img/src=x/onerror=y>",
        "&lt;",
        "\"'><!--",
        "</span>",
    ]
    filler = ["<pad>", "<end>", "<b>&", *[f'"><script>w{index}' for index in range(248)]]
    plain = said("a", tmp_path)
    page = said(" ".join(words), tmp_path, tokenizer=opd.tiny_tokenizer(words + filler))
    assert {*page.tags} == {*plain.tags} and "script" not in page.tags
    assert page.rows == [words] and not any(name.startswith("on") for name in page.names)
    assert any('"><script>w' in line for tip in page.tips for line in tip)


def test_the_page_fetches_nothing_and_has_no_script(tmp_path):
    page = said(HOSTILE, tmp_path)
    source = (tmp_path / "rollouts.html").read_text()
    style = source[source.index("<style>") : source.index("</style>")]
    assert not {*page.tags} & {"link", "img", "iframe", "script"}
    assert not page.names & {"src", "href"} and not any(
        name.startswith("on") for name in page.names
    )
    assert "url(" not in style and "@import" not in style


def test_half_a_character_is_shown_as_such_and_the_text_after_it_is_readable(tmp_path):
    row = said("x日y", tmp_path).rows[0]
    assert row == ["x", "\ufffd", "\ufffd", "\ufffd", "y"]


def test_newlines_are_visible_and_spaces_are_kept(tmp_path):
    page = said("a  b\n c", tmp_path)
    assert page.texts["div"][0] == "a  b↵\n c" and page.rows[0].count("↵\n") == 1
    assert "white-space: pre-wrap" in (tmp_path / "rollouts.html").read_text()


def test_the_space_before_a_word_is_no_part_of_its_box(finished):
    source = (finished.folder / "rollouts.html").read_text()
    boxes = re.findall("<span[^>]*>([^<]*)</span>", source)
    assert boxes and not any(box.startswith(" ") for box in boxes) and "</span> <span" in source


def test_byte_level_tokens_keep_the_space_before_a_word():
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator(["the cat and the dog"] * 9, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core)
    text = functools.partial(opd.token_text, tokenizer, tokenizer.encode("a")[0])
    got = [text(token) for token in tokenizer.encode("the cat the")]
    assert "".join(got) == "the cat the" and " the" in got


def test_metaspace_tokens_keep_the_space_before_a_word():
    vocab = [("<unk>", 0.0), ("▁a", -1.0), ("▁the", -1.0), ("re", -1.0), ("▁", -2.0)]
    core = tokenizers.Tokenizer(tokenizers.models.Unigram(vocab, unk_id=0))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    core.decoder = tokenizers.decoders.Metaspace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core)
    assert [opd.token_text(tokenizer, 1, token) for token in (2, 3)] == [" the", "re"]


def test_a_row_of_7000_tokens_is_written_within_20_seconds_and_takes_under_3_mb(tmp_path):
    began = time.perf_counter()
    page = said(HOSTILE + "日", tmp_path, length=7000)
    seconds = time.perf_counter() - began
    size = os.path.getsize(tmp_path / "rollouts.html")
    assert len(page.rows[0]) == 7000 and seconds < 20
    assert size < 3e6


def luminance(colour):
    """Of #rrggbb, as defined by WCAG 2."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    dark, light = sorted([luminance(one), luminance(other)])
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1])
def test_text_has_a_contrast_of_at_least_4_5_in_light_and_in_dark(scheme):
    text = ("#000000", "#ffffff")[scheme]  # as browsers have CanvasText
    colours = re.findall(r"light-dark\((#\w{6}), (#\w{6})\)", opd.PAGE)
    assert len(colours) == 2
    for behind in colours:
        assert contrast(text, behind[scheme]) >= 4.5, behind


# --------------------------------------------------------------------------------------------------
# A run and its page


def test_a_run_is_the_same_with_and_without_its_page(finished, world, tmp_path):
    train(world, tmp_path, **FINISHED, no_view=True)
    assert outcome(finished.folder) == outcome(tmp_path)
    assert (finished.folder / "rollouts.html").exists()
    assert not (tmp_path / "rollouts.html").exists()


def test_writing_the_page_draws_no_random_numbers_and_leaves_both_models_in_eval_mode(tmp_path):
    out = make_batch(STUDENT, TEACHER)
    problems = [{"prompt_ids": [5, 6], "answer": "1"}] * 4
    config, run = run_of(tmp_path, problems, out)
    before = torch.get_rng_state()
    opd.write_view(config, run)
    assert torch.equal(torch.get_rng_state(), before)
    assert not STUDENT.training and not TEACHER.training


def test_the_page_is_written_at_every_evaluation_after_a_step(finished):
    assert [step for step in finished.written if step] == [2, 3]
    assert "Step 3" in " ".join(finished.page.texts["p"])


def test_the_rows_of_the_page_are_those_of_the_last_step(finished):
    batch = finished.updates[-1][1]
    expected = without_padding(batch["response_ids"], batch["response_mask"])[:16]
    assert finished.page.rows == [[WORDS[t] for t in row] for row in expected]


def test_only_the_shown_rows_of_a_step_are_kept_in_memory_of_their_own(finished):
    """Neither hidden states nor views, which would keep all rows of the step in memory."""
    kept = [x for x in finished.run.shown.values() if isinstance(x, torch.Tensor)]
    assert kept and "teacher_hidden" not in finished.run.shown
    assert all(x.untyped_storage().nbytes() == x.nbytes and len(x) == 16 for x in kept)


def test_a_resumed_run_that_has_only_to_evaluate_writes_no_page(world, tmp_path, monkeypatch):
    changes = {"max_steps": 2, "eval_every": 1, "save_every": 1}
    opd.main(command(world, tmp_path, **changes))
    (tmp_path / "rollouts.html").unlink()
    # As if the run had been interrupted during the evaluation
    real = opd.read_checkpoint
    monkeypatch.setattr(opd, "read_checkpoint", lambda *a: {**real(*a), "graded": 1})
    opd.main(command(world, tmp_path, **changes, resume=True))
    assert (
        len(test_opd.read(tmp_path / "metrics.jsonl")) and not (tmp_path / "rollouts.html").exists()
    )


def test_a_run_resumed_with_no_view_leaves_the_page_as_it_was(world, tmp_path):
    opd.main(command(world, tmp_path, max_steps=1))
    opd.main(command(world, tmp_path, max_steps=2, resume=True, no_view=True))
    assert "Step 1" in " ".join(page_of(tmp_path).texts["p"])


def test_a_new_run_puts_the_page_of_an_earlier_one_aside(world, tmp_path):
    opd.main(command(world, tmp_path, max_steps=1))
    opd.main(command(world, tmp_path, max_steps=1, no_view=True))
    assert not (tmp_path / "rollouts.html").exists()
    assert (tmp_path / "rollouts.html.old").exists()


def test_a_full_disk_ends_with_status_2_and_leaves_the_last_page_whole(tmp_path, monkeypatch):
    class FullFile:
        def __init__(self, *args, **kwargs):
            self.file = open(*args, **kwargs)  # noqa: SIM115

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, text):
            self.file.write(text[:100])
            raise OSError(errno.ENOSPC, "No space left on device")

    shown(tmp_path)
    before = (tmp_path / "rollouts.html").read_bytes()
    out = make_batch(STUDENT, TEACHER)
    config, run = run_of(tmp_path, [{"prompt_ids": [5], "answer": None}] * 4, out)
    monkeypatch.setattr(opd, "open", FullFile, raising=False)
    with pytest.raises(OSError, match="No space") as error:
        opd.write_view(config, run)
    assert opd.explain(error.value, run.phase, {"a": 1})[1] == 2
    assert (tmp_path / "rollouts.html").read_bytes() == before


def test_a_rank_other_than_the_first_keeps_no_rows_for_the_page(monkeypatch):
    out = make_batch(STUDENT, TEACHER)
    monkeypatch.setattr(opd, "RANK", 1)
    assert opd.first_rows(flags(), [{"prompt_ids": [5], "answer": None}], None, out) == {}


def test_the_last_line_of_a_run_says_where_the_page_is(finished):
    assert f"{finished.folder}/rollouts.html" in finished.said.getvalue().splitlines()[-1]


@pytest.mark.parametrize("method, top", [("prune", "1.25"), ("opd", "1")])
def test_the_scale_of_loss_weights_ends_at_the_largest_weight_of_the_method(method, top, tmp_path):
    page, _ = shown(tmp_path, method=method, w_base=0.25)
    assert f"var(--weight) / {top};" in (tmp_path / "rollouts.html").read_text()
    assert f"loss weight, 0 to {top}" in page.texts["nav"][0]


def test_a_page_of_the_tiny_world_shows_the_flags_that_differ_from_its_defaults(tmp_path):
    problems = [{"prompt_ids": [5], "answer": None}] * 4
    _, run = run_of(tmp_path, problems, make_batch(STUDENT, TEACHER))
    opd.write_view(opd.replace(opd.TINY, output_dir=str(tmp_path), seed=7), run)
    told = f"--output_dir {tmp_path} --seed 7"
    assert page_of(tmp_path).texts["p"][0].strip().endswith(f"method opd, with {told}")


def test_markup_in_the_name_of_the_folder_is_escaped(tmp_path):
    (tmp_path / "<b>").mkdir()
    page, _ = shown(tmp_path / "<b>")
    assert f"of {tmp_path / '<b>'}, method" in page.texts["p"][0]
