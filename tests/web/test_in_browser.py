"""The pages in a real browser: nothing is wider than a telephone, values show under the pointer, sections stay in reach."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
from rollout_files import write_trajectories
from run_folder import write_lines, write_run, write_watched_run

from lm.evals import preferences
from lm.evals.pairs import Scored
from lm.sweep.compare import compare
from lm.sweep.results import read_result
from lm.train.judging import PairScores
from lm.web.compare import write_comparison
from lm.web.frontier import write_frontier
from lm.web.pairs_page import write_pairs_page
from lm.web.papers import write_papers
from lm.web.report import write_report

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent.parent
LONG = "a/path/that/does/not/end/" * 8 + "conversations.jsonl.gz"
WIDTH = 400


def report(home: Path) -> Path:
    """Of a run with everything: counts of a source with a long name, warnings, samples of newlines and of one long word."""
    folder = write_run(home / "run")
    stage = folder / "stages" / "sft"
    summary = json.loads((stage / "summary.json").read_text("utf-8"))
    source = {"source": LONG, "unit": "conversations", "examples": 10**9, "tokens": 10**12, "trained_tokens": 10**12}
    source |= {"truncated": 10**8, "dropped": {"empty answer": 3}, "first": {"empty answer": f"{LONG}:12: {{}}"}}
    (stage / "summary.json").write_text(json.dumps(summary | {"sources": [source]}), "utf-8")
    write_lines(stage / "warnings.jsonl", [{"step": 4, "text": f"no reward: {LONG}"}])
    lines = [json.loads(line) for line in (stage / "samples.jsonl").read_text("utf-8").splitlines()]
    for number, line in enumerate(lines):
        if line["kind"] == "prompt":
            line["answer"] = ("\n" * 300, "w" * 3000, "line\n" * 300)[number % 3]
    write_lines(stage / "samples.jsonl", lines)
    return write_report(folder)


def rollouts(home: Path) -> Path:
    """Of a run with trajectory files of three steps."""
    folder = write_run(home / "rollouts")
    write_trajectories(folder / "stages" / "reason", 3)
    return write_report(folder)


def watch(home: Path) -> Path:
    return write_report(write_watched_run(home / "watched"))


def comparison(home: Path) -> Path:
    folders = []
    for seed in (0, 1, 2):
        for steps in (160, 320):
            folder = write_run(home / f"seed{seed}-{steps}")
            experiment = json.loads((folder / "experiment.json").read_text("utf-8"))
            experiment["seed"] = seed
            experiment["stages"][2]["steps"] = steps
            experiment["stages"][1]["sources"][0]["path"] = f"{LONG}{steps}"
            (folder / "experiment.json").write_text(json.dumps(experiment), "utf-8")
            folders.append(folder)
    write_report(folders[0])
    return write_comparison(compare([read_result(folder) for folder in folders]), home / "compare.html")


def papers(home: Path) -> Path:
    return write_papers(ROOT / "experiments" / "papers", home / "papers.html")


def frontier(home: Path) -> Path:
    return write_frontier([write_watched_run(home / f"seed{seed}", seed) for seed in (0, 1)], home / "frontier.html")[0]


def pairs(home: Path) -> Path:
    rng = np.random.default_rng(0)
    found, longer = rng.normal(0.3, 1, 60), rng.normal(0, 9, 60).round()
    rows = [{"prompt": "w" * 300, "chosen": "long " * 300, "rejected": "\n" * 200}] * 60
    worth = preferences.worth(found, longer, False, [str(number // 2) for number in range(60)])
    scored = Scored(rows, found, longer, 1, 2, 3)
    return write_pairs_page(PairScores("a reward model", LONG, scored, worth, [], "them", "so"), home / "pairs.html")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A page by its maker; each is made once."""
    return functools.cache(lambda make: make(tmp_path_factory.mktemp(make.__name__)))


# What reaches beyond the right edge, but for what scrolls by itself.
TOO_WIDE = """(width) => [...document.querySelectorAll("body *")]
  .filter((one) => one.getBoundingClientRect().right > width + 1 && !one.closest(".scroll, nav, svg"))
  .slice(0, 4).map((one) => `${one.tagName}.${one.className}: ${one.textContent.slice(0, 60)}`)"""


@pytest.mark.parametrize("make", [report, watch, comparison, papers, frontier, pairs], ids=lambda make: make.__name__)
def test_nothing_is_wider_than_a_telephone_and_a_pointer_finds_values(made, browser, make):
    page = browser.new_page(viewport={"width": WIDTH, "height": 800})
    problems = []
    page.on("console", lambda message: problems.append(message.text))
    page.goto(made(make).as_uri())
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true })")
    for width in (1280, 760, WIDTH):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width, page.evaluate(TOO_WIDE, width)
    tall = page.evaluate("Math.max(0, ...[...document.querySelectorAll('.said')].map((one) => one.clientHeight))")
    assert tall <= 250, "what a model wrote scrolls inside its card"
    strips = page.locator(".hover .at")
    assert strips.count() > 0
    first = strips.first
    assert not first.locator("text").is_visible()
    first.locator("rect").hover(force=True)
    assert first.locator("text").is_visible() and any(map(str.isdigit, first.locator("text").inner_html()))
    assert not problems
    page.close()


def test_the_sections_of_a_report_stay_in_reach(made, browser):
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.goto(made(report).as_uri())
    page.click("nav.contents a[href='#took']")
    bar, heading = (page.locator(place).bounding_box() for place in ("nav.contents", "#took h2"))
    assert bar["y"] == 0 and heading["y"] >= bar["height"], "the bar is on the screen and covers no heading"
    page.click("nav.contents a[href='#rollouts']")
    page.close()


def test_every_rollout_is_reached_from_the_report(made, browser):
    page = browser.new_page(viewport={"width": WIDTH, "height": 800})
    page.goto(made(rollouts).as_uri())
    page.click("#all-rollouts-reason > summary")
    page.click("#all-rollouts-reason a >> nth=0")
    seen: list[str] = []
    while True:
        for place in page.locator("details.fold > summary").all():
            place.click()
        assert page.evaluate("document.documentElement.scrollWidth") <= WIDTH
        assert page.locator(".card").first.is_visible()
        seen += page.locator("ul.group .said").all_inner_texts()
        if not page.get_by_text("after →").count():
            break
        page.get_by_text("after →").first.click()
    page.get_by_text("report", exact=True).first.click()
    assert page.url.endswith("report.html#rollouts")
    for step in range(1, 4):
        assert {f"step {step}, answer {number}" for number in range(4)} <= set(seen)
    page.close()


def test_a_comparison_links_to_the_report_of_each_run(made, browser):
    page = browser.new_page()
    page.goto(made(comparison).as_uri())
    links = [link.get_attribute("href") for link in page.locator("td a").all()]
    assert len(links) == 6 and links.count("seed0-160/report.html") == 1 and "seed2-320" in links
    page.click("td a[href='seed0-160/report.html']")
    assert "The story of" in page.inner_text("h1")
    page.close()
