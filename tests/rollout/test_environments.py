"""The built-in environments judge good and bad answers rightly, and tools answer every call with text."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from lm.config.objective import check_environment
from lm.data.curriculum import GENERATORS
from lm.data.tokenizer import SubwordTokenizer
from lm.experiment import GRPO, Eval, Source, UserError
from lm.rollout.engine import Completion, Request
from lm.rollout.environment import find_environment
from lm.rollout.environments.countdown import solves
from lm.rollout.environments.expression import ExpressionError, evaluate, plain_number
from lm.rollout.environments.search import SearchIndex
from lm.rollout.environments.tool_dialogue import CalculatorDialogue
from lm.rollout.environments.tools import Tool, ToolError, tool_replies
from lm.rollout.episodes import conclude, environment_spec, run_episodes
from lm.rollout.trajectory import ENVIRONMENT, LENGTH, MODEL, MOST_TURNS, STOP
from tests.data.hub import published

ROW = {"question": "What is 12 * 7?", "answer": "84"}


def test_expressions_are_exact_and_bounded():
    values = {"12*7": "84", "(1/3)*3": "1", "2^3": "8", "7 ÷ 2": "3.5", "10**-3": "0.001", "-" * 99 + "1": "-1"}
    assert {text: plain_number(evaluate(text)) for text in values} == values
    bad = ("9**9**9", "2**100", "1/0", "", "x", "3(4)", "5 5", "__import__('os')", "(" * 150 + "1" + ")" * 150, "٣")
    for text in bad:
        with pytest.raises(ExpressionError):
            evaluate(text)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("(3 + 7) * 12", True),
        ("12 × (7 + 3)", True),
        ("3 * 40", False),
        ("(3 + 7) * 12 * 1", False),
        ("(3 + 7) * 12 + 0.0", False),
        ("120", False),
        ("", False),
        ("(3 + 7) * 12 = 120", False),
    ],
)
def test_countdown_wants_each_number_once(text, right):
    assert solves(text, [3, 7, 12], 120) is right


@pytest.mark.parametrize("name", ["countdown", "products"])
def test_generated_tasks_have_right_answers(name):
    for index in range(300):
        row = GENERATORS[name](index)
        if name == "countdown":
            assert solves(row["answer"], row["numbers"], row["target"])
        else:
            assert plain_number(evaluate(row["question"][8:-1])) == row["answer"]
    assert GENERATORS[name](7) == GENERATORS[name](7)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("<tool>calc: 12*7</tool>", "84"),
        ('<tool_call>\n{"name": "calc", "arguments": {"expression": "12*7"}}\n</tool_call>', "84"),
        ('{"name": "calc", "parameters": {"expression": "12*7"}}', "84"),
        ("<tool>calc: 12*", "cut off"),
        ('<tool_call>{"name": "calc", "argum', "cut off"),
        ("<tool>calc</tool>", "a call is"),
        ("<tool>weather: Paris</tool>", "there is no tool 'weather'; there are calc"),
        ("<tool_call>{'name'}</tool_call>", "not valid JSON"),
        ("<tool_call>" + "[" * 5000 + "</tool_call>", "not valid JSON"),
        ('<tool_call>["calc"]</tool_call>', "a call is"),
        ('<tool_call>{"name": "calc", "arguments": "12*7"}</tool_call>', "are an object"),
        ('<tool_call>{"name": "calc", "arguments": {"expression": 84}}</tool_call>', "of another type"),
        ('<tool_call>{"name": "calc", "arguments": {"expression": "1", "b": 1}}</tool_call>', "b is missing, unknown"),
        ("<tool>calc: 9**9**9</tool>", "exponent"),
    ],
)
def test_every_call_is_answered(call, said):
    environment = CalculatorDialogue()
    environment.reset(ROW)
    (reply,) = environment.step(call)
    failed = said != "84"
    assert (
        reply.get("error", False) == failed
        and reply["role"] == "tool"
        and said in reply["content"]
        and reply["content"].startswith("Error: ") == failed
    )
    assert environment.reward() == {"answer": 0.0, "tool_used": 1.0, "tool_errors": float(failed)}
    assert environment.step("The answer is 84.") is None and environment.reward()["answer"] == 1.0


def add(a, b):
    return str(a + b)


ADD = Tool("add", "The sum.", {"a": "number", "b": "number"}, add)
TWICE = Tool("twice", "Twice the number.", {"a": "integer"}, lambda a: str(2 * a))
NOW = Tool("now", "The time.", {}, lambda: "noon")
LONG = Tool("long", "A long text.", {"how": "string"}, lambda how: "y" * 10**6)


def fails(how):
    raise ToolError("x" * 10**6)


@pytest.mark.parametrize(
    ("tool", "call", "said"),
    [
        (TWICE, "<tool>twice: 5</tool>", "10"),
        (TWICE, "<tool>twice: 5.5</tool>", "Error: twice takes a (integer); a is missing"),
        (TWICE, "<tool>twice: five</tool>", "Error: the call is not valid JSON"),
        (ADD, "<tool>add: 5</tool>", "Error: add takes a (number), b (number); b is missing"),
        (ADD, '<tool_call>{"name": "add", "arguments": {"a": 1, "b": Infinity}}</tool_call>', "Error: add takes"),
        (ADD, '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 1e999}}</tool_call>', "Error: add takes"),
        (ADD, '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>', "3"),
        (NOW, "<tool>now: please</tool>", "noon"),
        (NOW, '<tool_call>{"name": "now", "arguments": {"a": 1}}</tool_call>', "Error: now takes no arguments; a is"),
        (LONG, "<tool>long: x</tool>", "y" * 2000 + " … (998000 characters left out)"),
        (Tool("fails", "", {"how": "string"}, fails), "<tool>fails: x</tool>", "Error: x"),
    ],
)
def test_arguments_have_the_types_of_the_tool_in_both_forms(tool, call, said):
    (reply,) = tool_replies(call, [tool])
    assert reply.text.startswith(said) and reply.failed == said.startswith("Error: ") and len(reply.text) < 2100


def test_a_tool_that_gives_no_text_or_has_an_unknown_type_is_told():
    with pytest.raises(TypeError, match="the tool none gave None; a tool returns text"):
        tool_replies("<tool>none: x</tool>", [Tool("none", "", {"how": "string"}, lambda how: None)])
    with pytest.raises(ValueError, match="tool many: a parameter has type 'array'; there are string, number"):
        Tool("many", "", {"a": "array"}, add)


class Scripted:
    """An engine whose completions are written down: a text for each turn, cut where it ends in …"""

    def __init__(self, tokenizer, *turns):
        self.tokenizer, self.turns = tokenizer, iter(turns)

    def complete(self, request):
        text = next(self.turns)
        ended = not text.endswith("…")
        ids = self.tokenizer.encode(text.rstrip("…")) + [self.tokenizer.eos_id] * ended
        return [Completion(np.array(ids, np.int32), np.zeros(len(ids), np.float32), np.ones(len(ids), bool), ended, 0)]


def play(tokenizer, *turns, environment="calculator", new=200, max_turns=0):
    spec = environment_spec((), environment, "tiny", "tiny", 5.0, max_turns)
    prompt = tokenizer.render(
        spec.messages(ROW, "row"), True, tools=spec.messages.tools if tokenizer.has_template else None
    )
    request = Request([prompt.tokens], jax.random.key(0), new, width=len(prompt.tokens))
    (found,) = conclude(spec, run_episodes(Scripted(tokenizer, *turns), spec, [ROW], request, tokenizer)).trajectories
    return found


@pytest.fixture(scope="module")
def tokenizer():
    return SubwordTokenizer.train(
        ["user\nWhat is 12 * 7?\nassistant\n<tool>calc: 84</tool> Error: The answer is\n"] * 20, 300
    )


def test_a_small_model_gets_results_as_a_user_turn_and_learns_its_own_tokens_only(tokenizer):
    found = play(tokenizer, "<tool>calc: 12*7</tool>", "The answer is 84.")
    assert tokenizer.decode(found.tokens[found.authors == ENVIRONMENT].tolist()) == "\nuser\n84\nassistant\n"
    own = [*tokenizer.encode("<tool>calc: 12*7</tool>"), tokenizer.eos_id, *tokenizer.encode("The answer is 84.")]
    assert found.tokens[found.authors == MODEL].tolist() == [*own, tokenizer.eos_id]
    assert (found.finish, found.reward) == (STOP, 1.0)  # what is recorded beside the answer is no reward
    assert found.rewards == {"answer": 1.0, "tool_used": 1.0, "tool_errors": 0.0}


def test_budgets_of_turns_and_tokens_end_an_episode(tokenizer):
    call = "<tool>calc: 1+1</tool>"
    found = play(tokenizer, call, call, "The answer is 84.", max_turns=2)
    assert (found.finish, found.reward, found.ended) == (MOST_TURNS, 0.0, False)
    assert play(tokenizer, call, "The answer is 84.", max_turns=2).finish == STOP
    cut = play(tokenizer, "<tool>calc: 1+…")
    assert (cut.finish, cut.rewards["tool_errors"]) == (LENGTH, 1.0)
    assert play(tokenizer, "<tool>calc: x</tool>", "1").messages[2]["error"]
    assert play(tokenizer, call, new=len(tokenizer.encode(call)) + 2).finish == LENGTH  # no room for the result


class Surrogate:
    """Replies with half a surrogate pair, which UTF-8 cannot encode."""

    def reset(self, task):
        return [{"role": "user", "content": "\udc80 12"}]

    def step(self, completion):
        return [{"role": "user", "content": "\ud83d 7"}]

    def reward(self):
        return {"none": 0.0}


def test_text_that_utf8_cannot_encode_is_replaced_and_an_endless_environment_ends(tokenizer):
    name = f"{__file__}:Surrogate"
    found = play(tokenizer, "1", "1", environment=name, max_turns=2)
    assert [turn["content"] for turn in found.messages] == ["? 12", "1", "? 7", "1"]
    assert found.finish == MOST_TURNS
    assert play(tokenizer, *["1"] * 99, environment=name, new=60).finish == LENGTH


@pytest.mark.slow
@pytest.mark.parametrize("model", ["qwen2.5", "qwen3"])
def test_a_chat_template_is_told_of_the_tools_and_of_their_results(model):
    folder = Path(__file__).parents[3] / "shared" / "models" / "tokenizers" / model
    if not folder.is_dir():
        pytest.skip(f"there is no {folder}")
    tokenizer = published.tokenizer(folder)
    call = '<tool_call>\n{"name": "calc", "arguments": {"expression": "12*7"}}\n</tool_call>'
    assert play(tokenizer, call.replace("12*7", "x"), "The answer is 84.").messages[2]["error"]
    found = play(tokenizer, call, "The answer is 84.")
    shown = tokenizer.show(found.tokens.tolist())
    assert '"name": "calc"' in shown and "<tool_response>\n84\n</tool_response>" in shown
    assert found.rewards == {"answer": 1.0, "tool_used": 1.0, "tool_errors": 0.0}


def test_search_among_rows_that_never_end_is_refused():
    with pytest.raises(UserError, match="search:gen:instruct: its rows are generated and never end"):
        find_environment("search:gen:instruct", "env")


def test_search_finds_the_passage_that_has_the_words(tmp_path):
    file = tmp_path / "corpus.jsonl"
    texts = ["Paris is the capital of France.", "Rome is the capital of Italy.", "Cats sleep."]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert SearchIndex.of_file(str(file)).best("capital of italy", 2) == [texts[1], texts[0]]
    environment = find_environment(f"search:{file}", "env")()
    environment.reset({"question": "Which is the capital of Italy?", "answer": "Rome"})
    assert environment.step("<tool>search: ITALY?</tool>") == [{"role": "tool", "content": texts[1]}]
    assert environment.step("<tool>search: xyzzy</tool>")[0]["content"] == "(nothing found)"


def test_python_runs_in_a_jail():
    environment = find_environment("python", "env")()
    environment.reset(ROW)
    assert environment.step("<tool>python: print(12 * 7)</tool>")[0]["content"] == "84"
    assert environment.step("<tool>python: 1/0</tool>")[0]["content"] == "Error: ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("countdwn", "did you mean countdown?"),
        ("calculator:3", "is 'calculator:3'"),
        ("search", "it should be search:FILE"),
        ("search:nowhere.jsonl", "there is no such file"),
        ("gym:chain_sum:x", "no such family"),
    ],
)
def test_an_environment_that_is_not_there_is_told_in_a_line(name, said):
    if name.startswith("gym"):
        pytest.importorskip("reasoning_gym", reason="the extra gym is not installed")
    with pytest.raises(UserError, match=r"^env is ") as told:
        find_environment(name, "env")
    assert said in str(told.value) and "\n" not in str(told.value)


def test_a_budget_of_turns_without_an_environment_is_refused():
    with pytest.raises(UserError, match=r"evals.a.max_turns is 3"):
        check_environment("evals.a", "", ("answer",), 3)
    assert GRPO().turn_limit == 0 and Eval("a", Source("gen:countdown")).max_turns == 0
