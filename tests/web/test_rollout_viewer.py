"""The page of `lm rollouts`: what it lists and finds, what it says of each token, and what a damaged file does to it."""

import contextlib
import json
import math
import re
import socket
import threading
import urllib.error
import urllib.request
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lm.cli.main import main
from lm.data.tokenizer import SubwordTokenizer
from lm.experiment import GRPO, PPO, Experiment, Source, Stage, UserError, to_dict
from lm.objectives.importance import RATIO_LEVELS
from lm.objectives.surrogates import SURROGATES, TokenSample
from lm.rollout.trajectory import Rollout, Trajectory
from lm.stored import write_json_atomic, write_sealed
from lm.train.trajectory_files import keep_only, trajectory_files
from lm.train.trajectory_writer import keep_trajectories
from lm.web.rollout_index import FILTERS, SORTS
from lm.web.rollout_tokens import describe_tokens, pieces
from lm.web.rollout_viewer import RolloutViewer, serve_rollouts
from tests.browser_checks import CONTRAST

STAGE = Stage("reason", GRPO(group_size=2, clip_high=0.5), (Source("gen:arithmetic"),), steps=9, batch_size=2)
HOSTILE = "<img src=x onerror=\"document.title='hacked'\">\x1b[31m"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return SubwordTokenizer.train(["higher or lower, forty two"], 264, folder), folder


def trajectory(tokenizer, task, answer, rewards, *, finish="stop", reply=None, gap=0.0):
    """A dialogue about a row, of two turns where there is a reply, and the trainer's log-probabilities."""
    turns = [("user", task["question"], "prompt"), ("assistant", answer, "model")]
    turns += [("tool", reply, "environment"), ("assistant", "then 7", "model")] if reply else []
    parts = [np.array(tokenizer.encode(text), np.int32) for _, text, _ in turns]
    authors = np.repeat([{"prompt": 0, "model": 1, "environment": 2}[a] for *_, a in turns], [len(p) for p in parts])
    logp = np.where(authors == 1, -1.0, 0.0).astype(np.float32)
    messages = tuple(dict(zip(("role", "content", "author"), turn, strict=True)) for turn in turns)
    if reply:
        messages[2]["error"] = "Traceback" in reply
    return Trajectory(
        task, messages, np.concatenate(parts), authors.astype(np.int8), logp, finish, 3, rewards, sum(rewards.values())
    ), {"trainer_logp": np.where(authors == 1, logp + np.float32(gap), 0).astype(np.float32)}


@pytest.fixture
def run(tmp_path, tokenizer):
    """Five steps of two groups: the same prompt in every step, and one of its own."""
    made, folder = tokenizer
    experiment = Experiment(name="told", stages=(STAGE, Stage("ppo", PPO(), (Source("gen:arithmetic"),))))
    write_json_atomic(tmp_path / "experiment.json", json.loads(json.dumps(to_dict(experiment))))
    (tmp_path / "tokenizer").symlink_to(folder)
    for step in range(1, 6):
        same, own = {"question": "What is 6 × 7?"}, {"question": f"Number {step}? {HOSTILE}"}
        made_of = [
            (same, "forty two", {"right": float(step > 2), "style": 0.0}, {"gap": 0.01 * step}),
            (same, "no", {"right": 0.0, "style": float(step > 3)}, {}),
            (own, f"answer {step}", {"right": 0.0, "style": 0.5}, {"finish": "length" if step == 2 else "stop"}),
            (own, "日本 🎉", {"right": 0.0, "style": 0.5}, {"reply": "Traceback" if step == 4 else "fine"}),
        ]
        found = [trajectory(made, task, answer, rewards, **more) for task, answer, rewards, more in made_of]
        rollout = Rollout([], [one for one, _ in found], np.array([1.0, -1, 0, 0]) * (step > 2), np.arange(2), {})
        numbers = {place: found[place][1] for place in range(2)}
        keep_trajectories(tmp_path / "stages" / "reason", STAGE, step, rollout, numbers)
    return tmp_path


def found(viewer, **query):
    """(step, group) of the groups that a query finds, in order."""
    return [(one["step"], one["group"]) for one in viewer.groups(query)["groups"]]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({"steps": "2-3", "sort": "oldest"}, [(2, 1), (2, 2), (3, 1), (3, 2)]),
        ({"steps": "5"}, [(5, 1), (5, 2)]),
        ({"filter": "truncated"}, [(2, 2)]),
        ({"filter": "tool_error"}, [(4, 2)]),
        ({"filter": "disagreement"}, [(5, 1), (4, 1)]),
        ({"filter": "no_signal", "steps": "3-5", "sort": "oldest"}, [(3, 2), (4, 2), (5, 2)]),
        ({"filter": "not_trained,truncated"}, [(2, 2)]),
        ({"filter": "timeout"}, []),
        ({"search": "ANSWER 3"}, [(3, 2)]),
        ({"search": "日本", "steps": "1"}, [(1, 2)]),
        ({"search": "(.*"}, []),
        ({"search": "<img", "steps": "4"}, [(4, 2)]),
    ],
)
def test_filters_search_and_steps_select_groups(run, query, expected):
    assert found(RolloutViewer(run), **query) == expected


def test_the_order_is_by_the_largest_gap_and_by_reward(run):
    viewer = RolloutViewer(run)
    assert found(viewer, sort="gap")[:2] == [(5, 1), (4, 1)]
    assert found(viewer, sort="gap")[-5:] == [(step, 2) for step in range(1, 6)], "unknown gaps come last"
    assert found(viewer, sort="reward_high")[0] == (4, 1) and found(viewer, sort="reward_low")[0] == (1, 1)
    gaps = [one["gap"] for one in viewer.groups({"sort": "gap"})["groups"]]
    assert gaps[0] == pytest.approx(0.05) and gaps[-1] is None


def test_one_prompt_is_followed_over_training(run):
    viewer = RolloutViewer(run)
    task = viewer.group({"step": "2", "group": "1"})["task"]
    told = viewer.groups({"task": task})
    assert [(one["step"], one["group"]) for one in told["groups"]] == [(step, 1) for step in (5, 4, 3, 2, 1)]
    assert told["history"] == [[1, 0.0], [2, 0.0], [3, 0.5], [4, 1.0], [5, 1.0]]


def test_a_group_has_its_prompt_rewards_by_name_and_turns(run):
    told = RolloutViewer(run).group({"step": "4", "group": "2"})
    assert [turn["author"] for turn in told["prompt"]] == ["prompt"]
    assert "\x1b" not in told["prompt"][0]["content"], "control characters are shown by symbols"
    second = told["completions"][1]
    assert second["rewards"] == [["right", 0.0], ["style", 0.5]] and (second["errors"], second["version"]) == (1, 3)
    assert [turn["content"] for turn in second["turns"]] == ["日本 🎉", "Traceback", "then 7"]
    assert second["largest_gap"] is None and not second["trained"]


def test_tokens_have_their_authors_and_numbers(run, tokenizer):
    viewer = RolloutViewer(run)
    told = viewer.tokens({"step": "5", "group": "1", "place": "0"})
    own = [place for place, author in enumerate(told["authors"]) if author == 1]
    assert "".join(told["pieces"][place] for place in own) == "forty two"
    assert all(told["gap"][place] == pytest.approx(0.05, rel=1e-4) for place in own)
    assert all(told["ratio"][place] == pytest.approx(math.exp(0.05), rel=1e-4) for place in own)
    assert all(told["logp"][place] is None for place in range(len(told["ids"])) if place not in own)
    assert told["kl"] is None and set(told["clip"]) == {None, 0.0} and told["version"] == 3
    dialogue = viewer.tokens({"step": "1", "group": "2", "place": "1"})
    assert set(dialogue["authors"]) == {0, 1, 2} and dialogue["gap"] is None


def test_a_tokenizer_that_lacks_a_token_is_told_in_a_line(run):
    viewer = RolloutViewer(run)
    viewer.tokenizer.vocab_size = 5
    with pytest.raises(UserError, match="is not among the 5 of"):
        viewer.tokens({"step": "5", "group": "1"})


def test_pieces_together_are_the_text(tokenizer):
    made, _ = tokenizer
    text = "a é 日本語 🎉🎉 \n\tz"
    assert "".join(pieces(made.encode(text), made)) == text
    cut = made.encode("🎉")[:2]  # a character that was cut off is shown
    assert "".join(pieces(cut, made)).strip("\N{REPLACEMENT CHARACTER}") == ""
    assert pieces([], made) == []


def row_of(gap, advantage, ref=None):
    size = len(gap)
    return {
        "tokens": list(range(size)), "authors": [1] * size, "logp": [0.0] * size, "trainer_logp": list(gap),
        "ref_logp": ref, "token_advantages": None, "advantage": advantage, "version": 0,
    }  # fmt: skip


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("level", RATIO_LEVELS)
def test_clipped_tokens_are_those_that_the_loss_counts(tokenizer, surrogate, advantage, level):
    o = GRPO(surrogate=surrogate, clip_low=0.1, clip_high=1.2 if surrogate == "cispo" else 0.3, ratio_level=level)
    gap = np.array([[-0.5, -0.05, 0.0, 0.2, 0.4, 1.5]], np.float32)
    mask = np.ones_like(gap)
    log_weight = RATIO_LEVELS[level](gap, mask)
    ratio = np.exp(log_weight)
    _, low, high = SURROGATES[surrogate](TokenSample(log_weight, gap, gap, mask * advantage, mask, None), o)
    expected = ((ratio > high) & (advantage > 0)).astype(int) - ((ratio < low) & (advantage < 0))
    told = describe_tokens(row_of(gap[0].tolist(), advantage), o, tokenizer[0])
    assert told["clip"] == expected[0].tolist()
    np.testing.assert_allclose(told["ratio"], ratio[0], rtol=1e-4)


def test_importance_correction_is_clipped_by_its_own_bounds_and_the_kl_is_k3(tokenizer):
    o = GRPO(tis_clip=2.0, tis_mode="mask", tis_low=0.5)
    told = describe_tokens(row_of([1.0, 0.0, -1.0], 1.0, ref=[0.5, 0.0, -1.5]), o, tokenizer[0])
    assert told["clip"] == [1.0, 0.0, -1.0]
    assert told["kl"] == pytest.approx([math.expm1(-0.5) + 0.5, 0.0, math.expm1(-0.5) + 0.5], rel=1e-4)


def test_files_of_an_older_lm_are_read_without_the_trainers_numbers(run):
    for path in trajectory_files(run / "stages" / "reason"):
        table = pq.read_table(path)
        path.unlink()
        old = table.drop_columns(["trainer_logp", "ref_logp", "token_advantages", "largest_gap", "sampled", "errors"])
        sink = pa.BufferOutputStream()
        pq.write_table(old, sink)
        content = sink.getvalue().to_pybytes()
        path.with_name(f"{path.name[:14]}{zlib.crc32(content):08x}.parquet").write_bytes(content)
    viewer = RolloutViewer(run)
    assert len(found(viewer)) == 10 and found(viewer, filter="truncated") == [(2, 2)]
    assert found(viewer, filter="tool_error") == []
    told = viewer.tokens({"step": "5", "group": "1"})
    assert told["gap"] is None and told["logp"] is not None


def test_a_damaged_file_is_named_and_the_others_are_shown(run):
    path = trajectory_files(run / "stages" / "reason")[2]
    path.write_bytes(path.read_bytes()[:-1])
    told = RolloutViewer(run).groups({})
    assert len(told["damaged"]) == 1 and path.name in told["damaged"][0] and "damaged" in told["damaged"][0]
    assert {one["step"] for one in told["groups"]} == {1, 2, 4, 5}


def test_a_file_that_a_stage_lacks_is_told(run):
    stage = run / "stages" / "reason"
    assert RolloutViewer(run).groups({})["damaged"] == []
    trajectory_files(stage)[2].unlink()
    (told,) = RolloutViewer(run).groups({})["damaged"]
    assert "has 4 of the 5 trajectory files that the stage kept" in told


def test_a_stage_that_lacks_all_its_files_is_told(run):
    for path in trajectory_files(run / "stages" / "reason"):
        path.unlink()
    with pytest.raises(UserError, match="has 0 of the 5 trajectory files that the stage kept"):
        RolloutViewer(run)


def test_another_tokenizer_than_the_one_that_sampled_shows_no_tokens(run, tokenizer):
    for sampled_by, told in ((tokenizer[0].fingerprint, ""), ("0" * 64, "is not the tokenizer that sampled them")):
        write_sealed(run / "environment.json", {"runs": [], "began": {"tokenizer": sampled_by}})
        viewer = RolloutViewer(run)
        assert told in viewer.no_tokens and (viewer.tokenizer is None) == bool(told)


def test_files_that_come_and_go_while_a_stage_runs_are_followed(run, tokenizer):
    viewer = RolloutViewer(run)
    assert viewer.groups({})["steps"] == [1, 5]
    one, numbers = trajectory(tokenizer[0], {"question": "new?"}, "yes", {"right": 1.0})
    keep_trajectories(
        run / "stages" / "reason", STAGE, 6, Rollout([], [one], np.ones(1), np.arange(1), {}), {0: numbers}
    )
    keep_only(run / "stages" / "reason", trajectory_files(run / "stages" / "reason")[1:])
    told = viewer.groups({})
    assert told["steps"] == [2, 6] and not told["damaged"]


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ({"filter": "odd"}, "filter is 'odd'"),
        ({"sort": "odd"}, "sort is 'odd'"),
        ({"stage": "ppo"}, "stage is 'ppo'"),
        ({"steps": "x"}, "steps is 'x'"),
        ({"task": "zz"}, "task is 'zz'"),
        ({"page": "-1"}, "page is '-1'"),
    ],
)
def test_a_query_that_makes_no_sense_is_told_in_a_line(run, query, told):
    with pytest.raises(UserError, match=re.escape(told)):
        RolloutViewer(run).groups(query)


def test_each_filter_and_order_is_on_the_page():
    from lm.web.rollout_viewer import HERE

    script, page = ((HERE / f"viewer.{kind}").read_text() for kind in ("js", "html"))
    assert all(f"{name}:" in script for name in FILTERS) and all(f'value="{name}"' in page for name in SORTS)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere"], "no run 'nowhere'"),
        (["RUN", "--stage", "odd"], "has no stage 'odd'"),
        (["RUN", "--stage", "ppo"], "--stage ppo: RUN keeps no trajectories of this stage; those with some: reason"),
        (["RUN", "--port", "PORT"], "port PORT is in use"),
        (["EMPTY"], "EMPTY keeps no trajectories"),
    ],
)
def test_what_cannot_be_shown_is_told_in_a_line(run, tmp_path_factory, capsys, words, told):
    empty = tmp_path_factory.mktemp("empty")
    (empty / "experiment.json").write_text((run / "experiment.json").read_text())
    with socket.create_server(("localhost", 0)) as taken:
        names = {"RUN": str(run), "EMPTY": str(empty), "PORT": str(taken.getsockname()[1])}
        assert main(["rollouts", *[names.get(word, word) for word in words]]) == 2
    for name, value in names.items():
        told = told.replace(name, value)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert told in line


@contextlib.contextmanager
def serving(run):
    server = serve_rollouts(run, None, 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://localhost:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_server_is_for_this_machine_and_tells_errors_as_json(run):
    with serving(run) as address:
        with urllib.request.urlopen(f"{address}/") as reply:
            assert "default-src 'none'" in reply.headers["Content-Security-Policy"]
        for path, host, status in (
            ("/api/groups?sort=odd", None, 409),
            ("/api/group?step=99&group=1", None, 409),
            ("/api/tokens?step=1&group=1&place=9", None, 409),
            ("/etc/passwd", None, 404),
            ("/api/groups", "elsewhere.example", 403),
        ):
            request = urllib.request.Request(address + path, headers={"Host": host} if host else {})
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(request)
            assert caught.value.code == status and json.loads(caught.value.read())["error"]


@contextlib.contextmanager
def opened(browser, run, query="", **options):
    """The page in a browser, and everything that went wrong or was asked of others."""
    with serving(run) as address, contextlib.closing(browser.new_context(**options)) as context:
        page = context.new_page()
        page.set_default_timeout(60_000)
        wrong = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: request.url.startswith(address) or wrong.append(request.url))
        page.goto(f"{address}/{query}")
        page.wait_for_selector("#groups a", state="attached")
        yield page
        assert not wrong and page.title() == "told: rollouts"
        assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]


def shows(page, expected):
    """Wait until the list has these groups."""
    page.wait_for_function(
        "(told) => JSON.stringify([...document.querySelectorAll('#groups b')].map((b) => b.textContent)) === told",
        arg=json.dumps(
            [f"step {step} · {group}" for step, group in expected], separators=(",", ":"), ensure_ascii=False
        ),
    )


@pytest.mark.slow
def test_filters_and_search_are_in_the_address_and_survive_a_reload(run, browser):
    with opened(browser, run) as page:
        page.check("[value=no_signal]")
        shows(page, [(5, 2), (4, 2), (3, 2), (2, 1), (2, 2), (1, 1), (1, 2)])
        page.fill("[name=search]", "answer")
        shows(page, [(5, 2), (4, 2), (3, 2), (2, 2), (1, 2)])
        page.select_option("[name=sort]", "oldest")
        shows(page, [(1, 2), (2, 2), (3, 2), (4, 2), (5, 2)])
        page.fill("[name=steps]", "2-3")
        shows(page, [(2, 2), (3, 2)])
        page.reload()
        shows(page, [(2, 2), (3, 2)])
        assert page.is_checked("[value=no_signal]") and page.input_value("[name=search]") == "answer"
        page.fill("[name=steps]", "x")
        page.wait_for_selector("#problem:has-text('steps is')")


@pytest.mark.slow
def test_a_group_by_keys_and_its_tokens_by_colour(run, browser):
    with opened(browser, run, "?sort=oldest") as page:
        page.click("#groups a >> nth=4")  # step 3, prompt 1
        page.wait_for_selector("#where:has-text('Step 3, prompt 1')")
        page.wait_for_selector(".completion >> nth=0 >> [data-token]")
        assert page.locator(".completion >> nth=0 >> .block.model").inner_text() == "forty two"
        assert "right 1" in page.inner_text(".completion >> nth=0") and "style 0" in page.inner_text(
            ".completion >> nth=0"
        )
        plain = "document.querySelectorAll('.completion [data-token][style]').length"
        page.select_option("#colour", "gap")
        page.wait_for_function(f"{plain} > 0")
        assert "trainer less sampler" in page.inner_text("#legend") and "colour=gap" in page.url
        assert page.locator("#colour option[value=kl]").is_disabled(), "no reference was read"
        page.hover(".completion >> nth=0 >> [data-token] >> nth=0")
        told = page.inner_text("#token")
        assert "ratio 1.03" in told and "log p −1" in told and "version 3" in told
        page.keyboard.press("j")
        page.wait_for_selector("#where:has-text('Step 3, prompt 2')")
        assert "<img src=x" in page.inner_text("#prompt") and not page.query_selector("#detail img")
        page.wait_for_selector(".completion >> nth=1 >> [data-token]")
        blocks = page.locator(".completion >> nth=1 >> .block").all_inner_texts()
        assert blocks == ["日本 🎉", "fine", "then 7"]
        page.keyboard.press("k")
        page.wait_for_selector("#where:has-text('Step 3, prompt 1')")
        page.go_back()
        page.wait_for_selector("#where:has-text('Step 3, prompt 2')")
        page.keyboard.press("Escape")
        page.wait_for_selector("#detail", state="hidden")


@pytest.mark.slow
def test_a_prompt_is_followed_over_its_steps(run, browser):
    with opened(browser, run, "?group=2.1") as page:
        page.click("#follow")
        shows(page, [(step, 1) for step in range(1, 6)])
        assert page.locator("#history circle").count() == 5
        page.click("#unfollow")
        page.wait_for_selector("#followed", state="hidden")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_small_screen_in_both_schemes(run, browser, scheme):
    viewport = {"width": 400, "height": 800}
    with opened(browser, run, "?group=4.2", viewport=viewport, color_scheme=scheme) as page:
        page.wait_for_selector(".completion >> nth=1 >> [data-token]")
        assert page.is_hidden("#list") and page.is_visible("#back")
        for place in ("#where", ".line b", ".block.model", ".block.environment", "#legend", ".flag"):
            contrast, paper = page.evaluate(CONTRAST, place)
            assert contrast >= 4.5 and (paper < 0.2) == (scheme == "dark"), place
        page.click("#follow")
        page.wait_for_selector("#history:visible")
        page.click("#unfollow")
        page.wait_for_selector("#followed", state="hidden")
        page.click("#back")
        page.wait_for_selector("#list:visible")


@pytest.mark.slow
def test_a_run_without_its_tokenizer_and_with_a_damaged_file_is_shown_as_text(run, browser):
    (run / "tokenizer").unlink()
    path = trajectory_files(run / "stages" / "reason")[0]
    path.write_bytes(path.read_bytes()[:-1])
    with opened(browser, run, "?group=4.2") as page:
        page.wait_for_selector(".completion .block")
        assert "tokens are not shown" in page.inner_text("#problem") and path.name in page.inner_text("#problem")
        assert page.locator(".completion >> nth=1 >> .block").all_inner_texts() == ["日本 🎉", "Traceback", "then 7"]
