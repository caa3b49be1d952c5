"""The report: one offline page that tells what the run folder says, for whole, unfinished and hostile runs."""

import dataclasses
import html.parser
import json
import math
import re
from pathlib import Path

import pytest
from run_folder import ANSWERS, DONE, PROMPTS, write_lines, write_run

from lm.experiment import OBJECTIVES, UserError
from lm.train.run_files import read_run
from lm.web import charts, costs, numbers, story
from lm.web.report import render, write_report
from lm.web.text import shown, visible


class Page(html.parser.HTMLParser):
    """Text, tags and attributes of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.text, self.tags = "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "quickstart")


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text("utf-8"))


def test_one_file_that_fetches_nothing(finished):
    path = write_report(finished)
    page = page_of(finished)
    assert path == finished / "report.html"
    assert path.stat().st_size < 3_000_000
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object"}
    addresses = [value for _, attrs in page.tags for key, value in attrs.items() if key in ("href", "src")]
    assert addresses and all(address.startswith("#") for address in addresses)
    assert "url(" not in re.sub(r"url\(#\w+\)", "", path.read_text("utf-8"))
    assert list(finished.glob("*.tmp")) == []


def test_every_link_on_the_page_has_its_section(finished):
    tags = page_of(finished).tags
    ids = {attrs["id"] for tag, attrs in tags if tag == "section"}
    assert {attrs["href"][1:] for tag, attrs in tags if tag == "a"} == ids


def test_sections_stand_in_the_order_of_the_story(finished):
    headings = re.findall(r"<h2>(.*?)</h2>", render(read_run(finished)))
    words = ("prompts", "Held-out results", "curves", "pairs", "Rollouts", "examples", "data", "experiment", "cost")
    assert len(headings) == len(words)
    assert all(word in heading for word, heading in zip(words, headings, strict=True))


def test_prompts_have_an_answer_in_every_column(finished):
    run = read_run(finished)
    table = story.prompt_table(run)
    assert [prompt for prompt, _ in table] == list(PROMPTS)
    assert [cell["answer"] for cell in table[0][1]] == list(ANSWERS.values())
    assert story.columns(run) == ["random", *DONE]


@pytest.mark.parametrize(("init", "name"), [("", "random"), ("hf:folder", "open weights")])
def test_the_page_names_the_model_that_the_run_begins_with(finished, init, name):
    run = read_run(finished)
    page = render(dataclasses.replace(run, experiment=run.experiment | {"init": init}))
    assert f"<b>{name}</b> is the model that the run begins with." in page


def test_markup_of_the_model_is_shown_and_not_obeyed(tmp_path):
    hostile = "<script>alert(1)</script><b>bold</b>&amp;\x00\x1b[31m\ud800"
    folder = write_run(tmp_path / "run")
    for stage in DONE:
        path = folder / "stages" / stage / "samples.jsonl"
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for line in lines:
            for key in ("prompt", "answer", "chosen", "rejected", "expected"):
                if key in line:
                    line[key] = hostile
            for completion in line.get("completions", []):
                completion["text"] = hostile
        write_lines(path, lines)
    page = page_of(folder)
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count("<script>alert(1)</script><b>bold</b>&amp;␀␛[31m\ufffd") > 20


def test_the_heading_of_examples_counts_the_answers_marked_right(tmp_path):
    folder = write_run(tmp_path / "run")
    for path in folder.glob("stages/*/samples.jsonl"):
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for number, line in enumerate(one for one in lines if one["kind"] == "heldout"):
            line["reward"] = (1.0, 0.5, 0.0)[number % 3]
        write_lines(path, lines)
    section = re.search(r'<section id="examples">.*?</section>', render(read_run(folder)), re.DOTALL)[0]
    told = re.findall(r"(\d+) of these \d+ right", section)
    assert sum(map(int, told)) == section.count('<span class="right">right') > 0


def test_white_space_of_an_answer_is_kept(finished):
    assert "def add(a, b):\n    return a + b" in page_of(finished).text
    assert "white-space: pre-wrap" in (Path(charts.__file__).parent / "report.css").read_text("utf-8")


def test_a_long_answer_is_cut_and_can_be_unfolded(finished):
    page = page_of(finished)
    assert f"all {len(visible(ANSWERS['random'])):,} characters" in page.text


def test_held_out_changes_are_judged_against_their_noise(finished):
    rows = {row.name: row for row in story.heldout_table(read_run(finished))}
    docs, curriculum, arithmetic = rows["docs"], rows["curriculum"], rows["arithmetic"]
    assert [cell.tone for cell in docs.cells] == ["", "better", "worse", "worse", "even"]
    assert [cell.tone for cell in curriculum.cells] == ["", "even", "better", "even", "even"]
    assert arithmetic.cells[4].change == "+25.7"
    assert arithmetic.cells[4].value.startswith("61.0")
    assert docs.cells[1].note == "below xz -9e" and docs.cells[0].note == ""


def test_headlines_are_the_last_models_own_numbers_with_the_best_beside_them(finished):
    values = {line.name: (line.value, line.notes) for line in story.headlines(read_run(finished))}
    value, notes = values["docs: bits per byte"]
    assert value == "1.949" and notes == [
        "model after reason",
        "best 1.842, after pretrain",
        "random 8.113",
        "xz -9e 2.011",
    ]
    value, notes = values["curriculum: mean reward"]
    assert value.startswith("72.5") and notes[0] == "model after reason" and notes[1].startswith("best 74.0")
    value, notes = values["arithmetic: mean reward"]
    assert value.startswith("61.0") and not any("best" in note for note in notes)  # the last is the best


def test_a_number_taken_only_before_the_next_stage_fills_the_column(tmp_path):
    folder = write_run(tmp_path / "run", {"pretrain": 900, "sft": 400})
    path = folder / "stages" / "pretrain" / "eval.jsonl"
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    write_lines(path, [line for line in lines if line["eval"] != "curriculum"])
    before_sft = story.measurements(read_run(folder), "curriculum")
    assert before_sft[0] is None
    assert before_sft[1]["when"] == "before"
    assert before_sft[2]["when"] == "after"


def test_a_resumed_run_counts_its_last_line_and_a_half_written_one_not(tmp_path):
    folder = write_run(tmp_path / "run", {"pretrain": 120})
    path = folder / "stages" / "pretrain" / "metrics.jsonl"
    again = [{"step": step, "time": 1.0, "loss": 0.25, "lr": 1e-3} for step in range(101, 121)]
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in again) + '{"step": 121, "lo')
    lines = read_run(folder).stages[0].metrics
    assert [line["step"] for line in lines] == list(range(1, 121))
    assert [line["loss"] for line in lines[100:]] == [0.25] * 20


@pytest.mark.parametrize("done", [{}, {"pretrain": 1}, {"pretrain": 900, "sft": 130}])
def test_an_unfinished_run_shows_what_there_is(tmp_path, done):
    page = page_of(write_run(tmp_path / "run", done))
    assert "Not finished" in page.text
    assert "reason has not begun" in page.text
    assert "not yet" in page.text
    if done:
        name, steps = list(done.items())[-1]
        assert f"{name} is at step {steps} of" in page.text
        assert sum(tag == "svg" for tag, _ in page.tags) > 0


def test_a_finished_run_says_what_it_took(finished):
    run = read_run(finished)
    page = page_of(finished)
    assert "Not finished" not in page.text
    assert "A language model with 4.3" in page.text
    assert [row[0] for row in costs.costs(run)] == list(DONE)
    assert costs.costs(run)[0][2][:2] == ["3 min 11 s", "3.7\N{NO-BREAK SPACE}M"]
    assert "on 2 CPU cores" in page.text
    assert "3f9c2d1e with uncommitted changes" in page.text
    assert "python lm run quickstart" in page.text and "2 sessions" in page.text


def test_a_finished_run_says_where_its_time_went(finished):
    rows = costs.goodput(read_run(finished))
    assert [name for name, _, _ in rows] == list(DONE)
    _, useful, shares = rows[0]
    assert useful == "83.4\N{NARROW NO-BREAK SPACE}%"  # 135 s of steps and 6 s of sampling in 169 s
    assert sum(share.percent for share in shares) == pytest.approx(100)
    assert "lost to restarts 4.5 s" in page_of(finished).text


def test_the_page_can_be_sent_to_a_friend(finished):
    text = page_of(finished).text
    assert "somebody" not in text and "/opt/venv" not in text


def test_every_value_of_the_experiment_has_its_help(finished):
    knobs = story.knob_table(read_run(finished))
    assert any(
        name == "sft.steps" and value == 400 and text.startswith("number of steps:") for name, value, text in knobs
    )
    assert [name for name, _, text in knobs if not text] == [f"{stage}.objective.kind" for stage in DONE]


def test_preference_pairs_tell_the_choice_before_and_after(finished):
    run = read_run(finished)
    stage, pairs = story.preference_pairs(run)
    assert stage == "preference" and len(pairs) == 8
    assert all(pair.before == 0.0 and pair.after != 0.0 for pair in pairs)
    text = page_of(finished).text
    assert "before: prefers neither" in text and "after: prefers the chosen" in text


def test_choices_are_counted_only_where_there_are_any():
    assert story.choices([1.0, -2.0, 0.5, None]) == "2 of 3"
    assert story.choices([0.0, 0.0]) == story.choices([None]) == story.choices([]) == ""


def test_rollouts_are_shown_early_and_late(finished):
    run = read_run(finished)
    found = story.rollouts(run)
    assert found.stage == "reason" and [step for step, _ in found.first_and_last] == [1, 200]
    page = page_of(finished)
    texts = [one["text"] for _, groups in found.first_and_last for group in groups for one in group["completions"]]
    assert all(page.text.count(visible(text)) for text in texts)


def test_each_stage_has_the_curves_of_its_objective(finished):
    run = read_run(finished)
    titles = {stage.name: {c.title for c in charts.stage_charts(stage) if not c.small} for stage in run.stages}
    assert titles["pretrain"] == {"Loss", "Held out"}
    assert titles["preference"] == {"Loss", "Preference accuracy", "Implicit reward", "Reward margin", "Held out"}
    assert titles["reason"] == {"Reward", "Completion length", "Entropy", "Held out"}
    legend = next(c for c in charts.stage_charts(run.stages[0]) if c.title == "Loss").legend
    assert [label for _, label, _ in legend] == ["training, mean of the last 90 steps", "held out, docs"]


@pytest.mark.slow
def test_every_chart_says_how_to_read_it(finished):
    declared = [chart for kind in OBJECTIVES.values() for chart in (*kind.charts, *kind.small_charts)]
    drawn = [chart for stage in read_run(finished).stages for chart in charts.stage_charts(stage)]
    assert [chart.title for chart in [*declared, *drawn] if not chart.note.endswith(".")] == []
    text = page_of(finished).text
    assert all(visible(chart.note) in text for chart in drawn)


def test_rewards_of_several_verifiers_have_a_chart_with_a_curve_each(finished):
    stage = next(stage for stage in read_run(finished).stages if stage.name == "reason")
    names = [f"reward_{name}" for name in ("answer", "style", "mine:c", "mine:d", "mine:e", "mine:f")]
    lines = [line | dict.fromkeys(names, 0.25) | {"reward_std": 0.1} for line in stage.metrics]
    found = charts.stage_charts(dataclasses.replace(stage, metrics=lines))
    labels = [label.split(",")[0] for c in found if c.title == "Rewards by verifier" for _, label, _ in c.legend]
    assert labels == ["answer", "style", "mine:c", "mine:d", "mine:e", "mine:f"]
    assert "Rewards by verifier" not in {chart.title for chart in charts.stage_charts(stage)}


def test_the_loss_of_a_mixture_does_not_stand_beside_that_of_one_part(finished):
    run = read_run(finished)
    mixed = story.Mixture((("gen:docs", 1.0), ("gen:drills", 3.0)), (("docs", "gen:docs"),))
    drawn = [c for c in charts.stage_charts(run.stages[0], mixed) if "oss" in c.title]
    assert [c.title for c in drawn] == ["Loss on 25 % gen:docs, 75 % gen:drills", "Held-out loss on gen:docs alone"]
    assert [len(c.legend) for c in drawn] == [1, 1]
    alone = story.Mixture((("gen:docs", 1.0),), (("docs", "gen:docs"),))
    drawn = [c for c in charts.stage_charts(run.stages[0], alone) if "oss" in c.title]
    assert [(c.title, len(c.legend)) for c in drawn] == [("Loss on gen:docs", 2)]


def test_the_headline_of_a_curve_is_the_mean_of_its_last_steps():
    noisy = charts.Series("reward", list(range(1, 49)), [0.0] * 40 + [0.0, 1.0] * 4)
    assert charts.draw("x", "Reward", [noisy], "", True).legend == [
        (0, "reward, mean of the last 8 steps", numbers.percent(0.5))
    ]
    assert charts.draw("x", "Reward", [noisy], "", True, small=True).legend == [(0, "reward", numbers.percent(1.0))]
    points = charts.Series("docs", [0, 10], [1.0, 2.0], points=True)
    assert charts.draw("x", "Held out", [points], "").legend == [(0, "docs", "2")]
    assert [charts.last_steps(n) for n in (1, 4, 10, 48, 300)] == [1, 1, 2, 8, 30]


def test_two_ticks_of_an_axis_have_two_labels():
    for low, step in ((1.948, 0.0005), (0, 0.0025), (4.02, 0.005), (0.5, 0.25), (0, 3e-5), (990, 5), (-0.08, 0.04)):
        labels = [charts.tick(low + i * step, step) for i in range(6)]
        assert len(set(labels)) == 6 and max(map(len, labels)) <= 7, labels
        assert all(float(label.replace(",", "")) == pytest.approx(low + i * step) for i, label in enumerate(labels))
    for low, step in ((0.48, 0.015), (0, 0.25), (0.9985, 0.0005), (0.12, 0.01), (0, 0.2)):
        values = [low + i * step for i in range(4)]
        assert [float(charts.percent_tick(value, step)[:-1]) for value in values] == pytest.approx(
            [100 * v for v in values]
        )
    assert charts.percent_tick(0.5, 0.25) == "50%" and charts.percent_tick(0.495, 0.015) == "49.5%"


def test_values_stand_under_the_pointer_without_a_script():
    curve = charts.Series("training", list(range(1, 301)), [step / 100 for step in range(1, 301)])
    points = charts.Series("held <out>", [7, 151], [5.5, math.nan], points=True)
    svg = charts.draw("x", "Loss", [curve, points], "").svg
    texts = re.findall(r"<text[^>]* text-anchor[^>]*>(.*?)</text>", svg[svg.index('class="hover"') :])
    assert 40 < len(texts) <= 60 and texts[0].startswith("step 1: ") and ">0.010<" in texts[0]
    both = next(text for text in texts if text.startswith("step 7<"))  # few points have a strip of their own
    assert "training 0.070" in both and "held &lt;out&gt; 5.500" in both
    assert "not finite" not in svg and "<script" not in svg


def test_an_answer_of_white_space_alone_is_shown_by_signs(tmp_path):
    folder = write_run(tmp_path / "run")
    path = folder / "stages" / "pretrain" / "samples.jsonl"
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    for line in lines:
        if line["kind"] == "prompt":
            line["answer"] = "\n" * 70 + " \t"
    write_lines(path, lines)
    assert "⏎" * 70 + "␣⇥" in page_of(folder).text


@pytest.mark.parametrize("text, told", [
    ("\n" * 40 + "yes", "⏎" * 40 + "\nyes"), ("a" + "\n" * 30 + "b", "a" + "⏎" * 30 + "\nb"), (" \n\tif x:\n", "␣⏎\n\tif x:\n"),
    ("a\n\nb\n\n\nc", "a\n\nb\n\n\nc"), ("", ""), ("  a", "  a"),
])  # fmt: skip
def test_many_blank_lines_take_no_room_and_are_told(text, told):
    assert shown(text) == told
    assert "max-height" in (Path(charts.__file__).parent / "report.css").read_text("utf-8")


def test_data_counts_and_warnings_of_a_stage_are_shown(tmp_path):
    folder = write_run(tmp_path / "run")
    stage = folder / "stages" / "sft"
    summary = json.loads((stage / "summary.json").read_text("utf-8"))
    source = {
        "source": "chat.jsonl",
        "unit": "conversations",
        "examples": 1234,
        "tokens": 56789,
        "trained_tokens": 4321,
    }
    source |= {
        "truncated": 7,
        "dropped": {"empty answer": 3},
        "first": {"empty answer": "chat.jsonl:12"},
        "partial": True,
    }
    source |= {"unread": ["mood"], "truncated_tokens": 99}
    (stage / "summary.json").write_text(json.dumps(summary | {"sources": [source]}), "utf-8")
    write_lines(stage / "warnings.jsonl", [{"step": 4, "text": "all <rewards> are equal"}] * 2)
    page = page_of(folder)
    for word in (
        "chat.jsonl",
        "1,234 conversations",
        "56,789",
        "4,321",
        "3 empty answer, the first: chat.jsonl:12",
        "columns not read: mood",
        "99 tokens cut off",
    ):
        assert word in page.text
    assert page.text.count("Stage sft, step 4: all <rewards> are equal") == 1


def test_drawings_take_their_colours_from_the_page():
    chart = charts.draw("salt", "Loss", [charts.Series("a", [1, 2, 3], [3.0, float("nan"), 1.0])], "")
    assert "var(--series-0)" in chart.svg and "var(--muted)" in chart.svg
    assert not re.search(r"#0[0-9a-f]{5}\b", chart.svg)
    assert chart.svg.startswith("<svg") and "<?xml" not in chart.svg
    again = charts.draw("salt", "Loss", [charts.Series("a", [1, 2, 3], [3.0, float("nan"), 1.0])], "")
    assert chart.svg == again.svg


def test_a_loss_that_is_not_finite_is_said_and_not_drawn(tmp_path):
    folder = write_run(tmp_path / "run", {"pretrain": 60})
    path = folder / "stages" / "pretrain" / "metrics.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 61, "time": 12.0, "loss": None, "lr": 1e-3}) + "\n")
    loss = charts.stage_charts(read_run(folder).stages[0])[0]
    assert loss.legend[0] == (0, "training", "not finite")
    assert "nan" not in loss.svg.lower()
    assert "not finite" in page_of(folder).text


@pytest.mark.parametrize("length", [1, 5, 299, 300, 301, 12_345])
def test_thinning_keeps_the_mean_and_the_last_point(length):
    y = [float(i % 7) for i in range(length)]
    x, thinned = charts.thin(range(length), y)
    assert len(x) == len(thinned) <= charts.MAX_POINTS
    assert x[-1] == length - 1
    assert sum(thinned) / len(thinned) == pytest.approx(sum(y) / length, abs=0.1)


def test_smoothing_keeps_a_straight_line_straight():
    line = [2.0 * i for i in range(50)]
    assert charts.smooth(line, 5) == pytest.approx(line)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.0 s"),
        (9.96, "10 s"),
        (59.7, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3600, "1 h 00 min"),
        (7830, "2 h 10 min"),
    ],
)
def test_durations_read_well(value, text):
    assert numbers.duration(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1.0, "1"), (0.0003, "0.0003"), (1.2345, "1.234"), (-12.34, "−12.3"), (20840.2, "20,840")],
)
def test_plain_numbers_read_well(value, text):
    assert numbers.plain(value) == text


def test_what_is_no_run_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no experiment\.json"):
        write_report(tmp_path)


def test_a_broken_line_is_named(tmp_path):
    folder = write_run(tmp_path / "run", {"pretrain": 3})
    path = folder / "stages" / "pretrain" / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n', "utf-8")
    with pytest.raises(UserError, match=r"metrics\.jsonl:2 is not valid JSON"):
        write_report(folder)
