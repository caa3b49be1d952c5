"""The chat page in a real browser: a conversation, edit, regenerate, stop, side by side, reload; nothing written becomes HTML."""

import contextlib
import json
from pathlib import Path

import pytest

from tests.browser_checks import CONTRAST
from tests.serve.running import wait_until

pytestmark = pytest.mark.slow

SLOW = 60_000  # milliseconds: the machine may be busy
NAMES = ("first", "second")


@pytest.fixture(scope="module")
def two(serve):
    with serve(names=NAMES, max_len=1500, new=1000) as found:
        yield found


@contextlib.contextmanager
def window(browser, port, path="/", **options):
    """A browser's page, which must make no error and ask no other host."""
    with contextlib.closing(browser.new_context(**options)) as context:
        page = context.new_page()
        page.set_default_timeout(SLOW)
        wrong, asked = [], []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.on("console", lambda message: wrong.append(message.text) if "Security Policy" in message.text else None)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"http://localhost:{port}{path}")
        page.wait_for_selector("#models input")
        yield page
        assert not wrong
        assert all(url.startswith((f"http://localhost:{port}/", "blob:")) for url in asked)


def ask(page, text):
    page.fill("#text", text)
    page.press("#text", "Enter")


def settings(page, **values):
    page.evaluate("document.getElementById('settings').open = true")
    for name, value in values.items():
        page.fill(f"#{name}", str(value))
        page.dispatch_event(f"#{name}", "change")


def finished(page, turns):
    page.wait_for_function(
        "(turns) => document.querySelectorAll('#talk > section').length === turns && document.body.ariaBusy === 'false'",
        arg=turns,
    )


def answers(page, turn=1):
    return [one.inner_text() for one in page.query_selector_all(f"#talk > section:nth-child({turn}) article .said")]


def test_a_conversation_edit_regenerate_and_reload(two, browser):
    with window(browser, two.port) as page:
        settings(page, temperature=0, max_tokens=12, system="Answer briefly.")
        ask(page, "What is 3 + 4?")
        finished(page, 1)
        ask(page, "And 5 + 5?")
        finished(page, 2)
        before = answers(page, 1), answers(page, 2)
        assert all(text.strip() for (text,) in before)

        page.reload()
        page.wait_for_selector("#talk article")
        assert (answers(page, 1), answers(page, 2)) == before
        assert page.input_value("#system") == "Answer briefly." and page.input_value("#max_tokens") == "12"

        page.focus("#talk")
        page.evaluate("document.activeElement.blur()")
        page.keyboard.press("r")
        finished(page, 2)
        assert answers(page, 2) == before[1], "greedy: the same again"
        settings(page, temperature=2)
        page.click("text=Regenerate")
        finished(page, 2)
        assert answers(page, 2) != before[1] and answers(page, 1) == before[0]

        page.click("[aria-label='Edit message 1']")
        page.fill("#talk textarea", "What is 9 + 9?")
        page.press("#talk textarea", "Enter")
        finished(page, 1)
        assert page.inner_text("#talk .asked .said") == "What is 9 + 9?" and answers(page, 1) != before[0]

        with page.expect_download() as saved:
            page.click("#export")
        (line,) = Path(saved.value.path()).read_text("utf-8").splitlines()
        kept = json.loads(line)
        assert [turn["role"] for turn in kept["messages"]] == ["system", "user", "assistant"]
        assert kept["model"] == "first" and kept["settings"]["max_tokens"] == 12

        page.click("#new")
        assert not page.query_selector("#talk article")


def test_the_page_sends_what_it_shows(two, browser):
    with window(browser, two.port) as page:
        sent = []
        page.on("request", lambda one: sent.append(one.post_data_json) if one.method == "POST" else None)
        settings(page, temperature=0, max_tokens=3, top_p=0.5, seed=7, system="Be kind.")
        ask(page, "One")
        finished(page, 1)
        ask(page, "Two")
        finished(page, 2)
        told = sent[1]["messages"]
        assert [(turn["role"], turn["content"]) for turn in told[:2] + told[3:]] == [
            ("system", "Be kind."), ("user", "One"), ("user", "Two"),
        ]  # fmt: skip
        assert told[2]["role"] == "assistant"
        assert (sent[0]["temperature"], sent[0]["top_p"], sent[0]["seed"], sent[0]["max_tokens"]) == (0, 0.5, 7, 3)


def test_models_answer_side_by_side_and_stop_frees_their_slots(two, browser):
    with window(browser, two.port, viewport={"width": 1200, "height": 800}) as page:
        settings(page, temperature=0)
        page.check("#models input[value=second]")
        ask(page, "What is 3 + 4?")
        page.wait_for_function(
            "() => [...document.querySelectorAll('article .said')].filter((one) => one.textContent.length > 5).length === 2"
        )
        page.keyboard.press("Escape")
        finished(page, 1)
        assert [one.inner_text() for one in page.query_selector_all("article h2")] == list(NAMES)
        assert page.inner_text("article p.quiet") == "stopped"
        left, right = (one.bounding_box() for one in page.query_selector_all("article"))
        assert left["y"] == right["y"] and left["x"] < right["x"]
        wait_until(lambda: all(one.engine.running == 0 for one in two.served.values()), 60)


def test_probabilities_of_tokens_and_their_alternatives(two, browser):
    with window(browser, two.port) as page:
        settings(page, temperature=0, max_tokens=8)
        ask(page, "What is 3 + 4?")
        finished(page, 1)
        assert not page.is_visible("#key")
        page.click("#shades")
        assert "less probable" in page.inner_text("#key")
        spans = page.query_selector_all(".tokens span")
        assert 1 <= len(spans) <= 8
        spans[0].hover()
        rows = [one.inner_text().split("\t") for one in page.query_selector_all("#hint tr")]
        shares = [float(row[1].removesuffix(" %")) for row in rows]
        assert len(rows) == 5 and shares == sorted(shares, reverse=True) and sum(shares) <= 100.1
        assert page.query_selector("#hint .chosen").inner_text() == "\t".join(rows[0]), "greedy takes the likeliest"
        spans[0].focus()
        page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement === document.querySelectorAll('.tokens span')[1]")


EVIL = """<script>document.title = 'hacked'</script><img src=x onerror="document.title='hacked'">

# A *title* with <b>tags</b>

- one **strong** and `code <i>`
- two
  1. inside

> said [press](javascript:alert(1)) ![see](http://elsewhere.invalid/p.png)

```html
<style>body{display:none}</style>
```

| a | b |
|---|---|
| **1** | <u>2</u> |
"""


def test_what_a_model_writes_never_becomes_html(two, browser):
    with window(browser, two.port) as page:
        found = page.evaluate(
            """async (text) => {
              const { markdown } = await import("/markdown.js");
              const place = document.createElement("div");
              place.append(markdown(text));
              document.getElementById("talk").append(place);
              return [place.textContent, [...place.querySelectorAll("*")].map((one) => one.tagName.toLowerCase())];
            }""",
            EVIL,
        )
        text, tags = found
        assert set(tags) <= {
            "p", "br", "h1", "em", "ul", "ol", "li", "strong", "code", "pre", "blockquote", "table", "thead", "tbody", "tr", "th", "td",
        }  # fmt: skip
        assert {"h1", "em", "ul", "ol", "strong", "code", "pre", "blockquote", "table"} <= set(tags)
        for kept in (
            "<script>",
            "<img src=x",
            "<b>tags</b>",
            "[press](javascript:alert(1))",
            "![see](http",
            "<style>",
            "<u>2</u>",
        ):
            assert kept in text
        assert page.title() == "Chat"


def test_long_and_deep_texts_are_shown_soon(two, browser):
    with window(browser, two.port) as page:
        seconds = page.evaluate(
            """async () => {
              const { markdown } = await import("/markdown.js");
              const began = performance.now();
              for (const text of ["> ".repeat(5000), "*".repeat(20000), "`".repeat(5001), "- ".repeat(3000), "[".repeat(9999),
                "**a ".repeat(3000), "_a_".repeat(3000), "| ".repeat(2000) + "\\n|---|\\n"]) markdown(text);
              return (performance.now() - began) / 1000;
            }"""
        )
        assert seconds < 60  # far more if the time grew with the square of the length


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1200])
def test_it_is_readable_in_small_and_in_the_dark(two, browser, width, scheme):
    with window(browser, two.port, viewport={"width": width, "height": 800}, color_scheme=scheme) as page:
        page.check("#models input[value=second]")
        settings(page, temperature=1, max_tokens=40)
        ask(page, "w" * 300)
        finished(page, 1)
        for shades in (False, True):
            if shades:
                page.click("#shades")
            assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing is wider than the screen"
            for place in (
                ".asked .said",
                "article .said",
                "article h2",
                "#models label",
                "#send",
                "nav button",
                "summary",
            ):
                contrast, paper = page.evaluate(CONTRAST, place)
                assert contrast >= 4.5, f"{place} has a contrast of {contrast:.1f}"
                assert place == "#send" or (paper < 0.1) == (scheme == "dark")


def test_an_error_of_the_server_is_told(two, browser):
    with window(browser, two.port) as page:
        settings(page, max_tokens=1400)
        ask(page, "What is 3 + 4?")
        finished(page, 1)
        assert "max_tokens is 1400" in page.inner_text("article .error")


def test_with_a_token_the_printed_link_opens_the_page(serve, browser):
    with serve(token="0123456789abcdef") as guarded:
        with contextlib.closing(browser.new_context()) as stranger:
            assert stranger.new_page().goto(f"http://localhost:{guarded.port}/").status == 401
        with window(browser, guarded.port, "/?token=0123456789abcdef") as page:
            assert "token" not in page.url
            settings(page, temperature=0, max_tokens=3)
            ask(page, "hello")
            finished(page, 1)
            assert not page.query_selector("article .error")
