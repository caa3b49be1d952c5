"""The page in a real browser: two people at once, reload, undo, a server that is killed; keys alone; small and dark."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections import Counter

import pytest

from lm.choices.desk import standing
from lm.choices.export import preferences
from lm.choices.log import read_log
from tests.browser_checks import CONTRAST
from tests.label.label_rows import questions, write_rows

pytestmark = pytest.mark.slow

KEYS = {"left": "ArrowLeft", "right": "ArrowRight", "tie": "ArrowDown", "both bad": "b", "skip": "s"}
SLOW = 60_000  # milliseconds: the machine may be busy


class Serving:
    """`lm label` in a process of its own, which can be killed and started again on its port."""

    def __init__(self, answers, *options: str):
        self.answers, self.options, self.port = answers, options, 0
        self.start()

    def start(self) -> None:
        words = ["label", str(self.answers), "--port", str(self.port), *self.options]
        command = [sys.executable, "-m", "lm.cli.main", *words]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
        self.said = []
        for line in self.process.stdout:
            self.said.append(line)
            if found := re.match(r"open (http://\S+:(\d+)/\S*)", line):
                self.url, self.port = found[1], int(found[2])
                return
        raise AssertionError(f"the server said {self.said}")

    def kill(self, how: signal.Signals = signal.SIGKILL) -> str:
        self.process.send_signal(how)
        rest = self.process.communicate(timeout=300)[0]
        return "".join(self.said) + rest


@contextlib.contextmanager
def labelling(tmp_path, rows, *options: str):
    serving = Serving(write_rows(tmp_path / "answers.jsonl", rows), *options)
    try:
        yield serving
    finally:
        if serving.process.poll() is None:
            serving.kill()


class Person:
    """One browser window with somebody in front of it who has a keyboard only."""

    def __init__(self, browser, url: str, name: str, **options):
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(SLOW)
        self.wrong: list[str] = []
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("dialog", lambda dialog: self.wrong.append(dialog.message))
        self.page.goto(url)
        self.page.keyboard.type(name)
        self.page.keyboard.press("Enter")
        self.page.wait_for_selector("#count:not(:empty)")

    def seen(self) -> tuple[str, str, str]:
        """Prompt, left and right as they are on the screen."""
        prompt, left, right = (self.page.inner_text(place) for place in ("#prompt .said", "#left", "#right"))
        return prompt, left, right

    def yours(self) -> int:
        return int(self.page.inner_text("#count").split()[0])

    def wait_for(self, yours: int) -> None:
        begins = "(text) => document.getElementById('count').textContent.startsWith(text)"
        self.page.wait_for_function(begins, arg=f"{yours} ")

    def press(self, choice: str) -> tuple[str, str, str, str]:
        """Choose with a key, wait until the page has moved on, and say what was chosen of what."""
        seen, before = self.seen(), self.yours()
        self.page.keyboard.press(KEYS[choice])
        self.wait_for(before + 1)
        return (*seen, choice)

    def undo(self) -> None:
        before = self.yours()
        self.page.keyboard.press("u")
        self.wait_for(before - 1)


def told(record) -> tuple[str, str, str, str]:
    return record["prompt"], record["left"]["answer"], record["right"]["answer"], record["choice"]


def test_a_session_of_two_with_reload_undo_and_a_killed_server(tmp_path, browser):
    with labelling(tmp_path, questions(6), "--annotators-per-pair", "2") as serving:
        ann, bob = (Person(browser, serving.url, name) for name in ("Ann", "Bob"))
        chosen = {"Ann": [ann.press("left")], "Bob": [bob.press("tie"), bob.press("right")]}

        before = ann.seen()
        ann.page.reload()
        ann.page.wait_for_selector("#task:not([hidden])")
        assert (ann.seen(), ann.yours()) == (before, 1), "a reload shows the same pair on the same sides"

        ann.page.keyboard.press("3")
        ann.page.keyboard.press("c")
        ann.page.keyboard.type("because: s, b and u are letters here")
        ann.page.keyboard.press("Enter")
        taken_back = ann.press("right")
        ann.undo()
        assert ann.seen() == taken_back[:3], "undo brings the pair back"
        assert ann.page.input_value("#comment") == "" and not ann.page.is_checked("[name=strength][value='3']")
        ann.page.keyboard.press("2")
        chosen["Ann"].append(ann.press("left"))

        serving.kill()
        last = ann.seen()
        ann.page.keyboard.press("ArrowRight")
        ann.page.wait_for_selector("#status.bad:has-text('The server does not answer')")
        assert (ann.seen(), ann.yours()) == (last, 2), "the page does not move on before the choice is saved"
        serving.start()
        ann.wait_for(3)
        chosen["Ann"].append((*last, "right"))
        bob.page.reload()
        bob.page.wait_for_selector("#task:not([hidden])")
        assert bob.yours() == 2

        for person, name in ((ann, "Ann"), (bob, "Bob")):
            while person.page.is_visible("#task"):
                chosen[name].append(person.press("both bad" if person.yours() == 4 else "left"))
            assert "There are no more pairs for you" in person.page.inner_text("#status")
            assert "--export" in person.page.inner_text("#end"), "the end says how to export"
        bob.page.click("text=Summary")
        assert "Krippendorff" in bob.page.inner_text("main") and "6 pairs judged" in bob.page.inner_text("main")
        assert not ann.wrong and not bob.wrong
        assert "the same command continues" in serving.kill(signal.SIGINT) and serving.process.returncode == 0

    records = read_log(tmp_path / "answers.labels.jsonl").records
    stand = standing(records)
    assert [record["id"] for record in records] == list(range(1, 15)), "12 choices, one more that was undone, the undo"
    for name, told_by_name in chosen.items():
        assert [told(record) for record in stand if record["annotator"] == name] == told_by_name
    assert set(Counter((record["annotator"], record["pair"]) for record in stand).values()) == {1}
    assert set(Counter(record["pair"] for record in stand).values()) == {2}
    undone = records[next(r["of"] for r in records if r["kind"] == "undo") - 1]
    assert (undone["strength"], undone["comment"]) == (3, "because: s, b and u are letters here")
    assert told(undone) == taken_back
    again = next(record for record in stand if record["pair"] == undone["pair"] and record["annotator"] == "Ann")
    assert (again["strength"], again["comment"], again["choice"]) == (2, "", "left")
    assert preferences(records).rows


def test_an_answer_is_text_and_the_page_asks_nobody_else(tmp_path, browser):
    evil = (
        "<script>document.title = 'hacked'</script><img src=x onerror=\"document.title='hacked'\">\n\n"
        "<style>body{display:none}</style> [press](javascript:alert(1)) ![see](http://elsewhere.invalid/p.png)"
    )
    rows = [{"prompt": evil, "answers": [evil, "```python\nprint('<b>')\n```\n\n| a | b |\n|---|---|\n| **1** | 2 |"]}]
    with labelling(tmp_path, rows, "--host", "127.0.0.1", "--token-file", str(token_file(tmp_path))) as serving:
        assert "0123" not in serving.url
        with contextlib.closing(browser.new_context()) as stranger:
            page = stranger.new_page()
            assert page.goto(f"http://127.0.0.1:{serving.port}/").status == 401
        asked: list[str] = []
        person = Person(browser, f"http://127.0.0.1:{serving.port}/?token=abcdefgh-01234567", "Ann")
        person.page.on("request", lambda request: asked.append(request.url))
        person.page.reload()
        person.page.wait_for_selector("#task:not([hidden])")
        _, *answers = person.seen()
        evil_one = next(text for text in answers if "script" in text)
        assert "<script>document.title = 'hacked'</script><img src=x" in evil_one
        assert "[press](javascript:alert(1)) ![see](http://elsewhere.invalid/p.png)" in evil_one
        assert person.page.inner_text(".answers pre code") == "print('<b>')\n"
        assert person.page.inner_text(".answers td strong") == "1"
        assert not person.page.query_selector(".said :is(script, img, style, a)")
        person.page.keyboard.press("r")
        assert "| **1** | 2 |" in "".join(person.seen()), "as plain text"
        assert person.page.title() == "Which is better?" and not person.wrong
        assert asked and all(url.startswith(f"http://127.0.0.1:{serving.port}/") for url in asked)
        assert "token" not in "".join(asked) and "token" not in person.page.url


def token_file(tmp_path):
    file = tmp_path / "token"
    file.write_text("abcdefgh-01234567\n", "utf-8")
    return file


READ = ("#prompt .said", "#left", "#right", "[data-choice]", "#count", "h2", ".answers pre code", ".choices kbd")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1200])
def test_it_is_readable_and_in_reach_in_small_and_in_the_dark(tmp_path, browser, width, scheme):
    table = f"| a | b |\n|---|---|\n| {'y' * 200} | 2 |"
    headings = "\n\n".join(f"{'#' * level} Part {level}" for level in range(1, 7))
    long = f"{headings}\n\n{'A sentence that goes on. ' * 60}\n\n```\n{'x' * 300}\n```\n\n{table}"
    with labelling(tmp_path, [{"prompt": "w" * 200, "answers": [long, "short"]}]) as serving:
        person = Person(browser, serving.url, "Ann", viewport={"width": width, "height": 800}, color_scheme=scheme)
        page = person.page
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing is wider than the screen"
        shown = [page.is_visible(f".answers h{level}:text('Part {level}')") for level in range(1, 7)]
        assert all(shown), "an answer is seen whole, its headings too"
        for button in page.query_selector_all("[data-choice], #comment"):
            box = button.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["y"] + box["height"] <= 800
        for place in READ:
            contrast, paper = page.evaluate(CONTRAST, place)
            assert contrast >= 4.5, f"{place} has a contrast of {contrast:.1f}"
            assert (paper < 0.1) == (scheme == "dark")
        left, right = (page.query_selector(place).bounding_box() for place in ("#left", "#right"))
        assert (left["y"] == right["y"]) == (width == 1200), "side by side where there is room"
        page.click("[data-choice='left']")
        person.wait_for(1)
        page.wait_for_selector("#end:not([hidden])")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.goto(f"{serving.url.rstrip('/')}/summary")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert [record["choice"] for record in read_log(tmp_path / "answers.labels.jsonl").records] == ["left"]


def test_every_button_has_a_name_and_tells_its_key(tmp_path, browser):
    with labelling(tmp_path, questions(2)) as serving:
        person = Person(browser, serving.url, "Ann")
        person.press("skip")
        for button in person.page.query_selector_all("button:visible"):
            assert (button.get_attribute("aria-label") or button.inner_text()).strip()
        choices = person.page.query_selector_all("[data-choice]")
        assert {b.get_attribute("data-choice"): b.get_attribute("aria-keyshortcuts") for b in choices} == KEYS
        assert person.page.evaluate("document.activeElement.id") == "prompt", "Space scrolls, and presses nothing"
        assert person.page.get_attribute("#status", "role") == "status"


def test_two_keys_at_once_are_one_choice(tmp_path, browser):
    """While a choice is on its way nothing else is chosen: a second key would judge a pair that nobody has seen."""
    with labelling(tmp_path, questions(3)) as serving:
        person = Person(browser, serving.url, "Ann")
        held = []
        person.page.route("**/api/choose", lambda route: held.append(route))
        person.page.keyboard.press("ArrowLeft")
        person.page.keyboard.press("ArrowRight")
        person.page.wait_for_function("document.body.getAttribute('aria-busy') === 'true'")
        for route in held:
            route.continue_()
        person.wait_for(1)
        assert len(held) == 1 and person.page.inner_text("#status") == ""
    assert [record["choice"] for record in read_log(tmp_path / "answers.labels.jsonl").records] == ["left"]
