"""An episode of one turn is what the sampler gives; of several, the tokens are the sampled ones and only these are learnt."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.data.packing import left_pad
from lm.data.tokenizer import SubwordTokenizer
from lm.experiment import UserError
from lm.model.transformer import Transformer
from lm.objectives.logprobs import token_logprobs
from lm.rollout.engine import Completion, LocalEngine, Request
from lm.rollout.episodes import EnvironmentSpec, conclude, environment_spec, judge_environments, run_episodes
from lm.rollout.trajectory import ENVIRONMENT, LENGTH, MODEL, PROMPT, STOP, TIMEOUT, trajectory_batch
from tests.helpers import TINY
from tests.rollout.rows import as_batch, generate

WIDTH, NEW = 24, 40


class Guess:
    """Asks for a number between 1 and 20, and once more after a wrong guess."""

    columns = ("secret",)

    def reset(self, task):
        self.secret, self.guesses = task["secret"], []
        return [{"role": "user", "content": "Guess."}]

    def step(self, completion):
        self.guesses.append(completion.strip())
        if len(self.guesses) == 2 or self.guesses[-1] == str(self.secret):
            return None
        return [{"role": "user", "content": "higher" if self.guesses[-1] < str(self.secret) else "lower"}]

    def reward(self):
        return {"found": float(str(self.secret) in self.guesses), "turns": len(self.guesses)}


@pytest.fixture(scope="module")
def tokenizer():
    texts = [f"user\nGuess. higher lower\nassistant\n{number}\n" for number in range(1, 21)] * 4
    return SubwordTokenizer.train(texts, 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    """Of which some turns end by themselves."""
    made = Transformer(dataclasses.replace(TINY, max_len=128), tokenizer.vocab_size, jax.random.key(0))
    return made


def spec(make=Guess):
    return EnvironmentSpec(make, judge_environments, (), lambda row, where: make().reset(row), "tiny", 5.0)


class Scripted:
    """An engine whose completions are written down: texts of each turn, ended unless they end in …"""

    def __init__(self, tokenizer, turns):
        self.tokenizer, self.turns, self.requests = tokenizer, iter(turns), []

    def complete(self, request):
        self.requests.append(request)
        found = []
        for text in next(self.turns):
            ids = self.tokenizer.encode(text.rstrip("…")) + [self.tokenizer.eos_id] * (not text.endswith("…"))
            tokens = np.array(ids, np.int32)
            found.append(
                Completion(
                    tokens, np.full(len(ids), -0.5, np.float32), np.ones(len(ids), bool), not text.endswith("…"), 7
                )
            )
        return found


def begin(tokenizer, rows, new=NEW, **changes):
    prompt = tokenizer.encode("Guess.")
    return Request([prompt] * rows, jax.random.key(0), new, width=WIDTH, **changes)


@pytest.mark.slow
def test_one_turn_is_what_the_sampler_gives_to_the_bit(tokenizer, model):
    rows = [{"question": text, "answer": "1"} for text in ("Guess.", "higher", "Guess. lower")]
    prompts = [tokenizer.encode(row["question"]) for row in rows]
    key = jax.random.key(3)
    request = Request(prompts, key, 16, 0.7, 2, WIDTH)
    answered = environment_spec(("answer",), "", "tiny", "tiny.objective", 5.0)
    found = conclude(answered, run_episodes(LocalEngine(model, tokenizer), answered, rows, request, tokenizer))
    tokens, lengths = left_pad(prompts, WIDTH, tokenizer.pad_id)
    out = jax.device_get(
        generate(
            model, tokens, lengths, key, 0.7, group_size=2, max_new_tokens=16, end_ids=tokenizer.end_ids,
            pad_id=tokenizer.pad_id,
        )
    )  # fmt: skip
    advantages = np.arange(6.0)
    expected = as_batch(np.repeat(tokens, 2, 0), np.repeat(lengths, 2), out, advantages, 2)
    made = trajectory_batch(found.trajectories, WIDTH, 16, tokenizer.pad_id, advantages, 2)
    jax.tree.map(np.testing.assert_array_equal, made, expected)
    assert found.timeouts == 0 and [set(one.rewards) for one in found.trajectories] == [{"answer"}] * 6


def test_replies_stand_between_the_sampled_tokens_and_are_not_learnt(tokenizer):
    engine = Scripted(tokenizer, [["12", "7"], ["x", "9"]])
    rows = [{"secret": 12}, {"secret": 9}]
    found = conclude(spec(), run_episodes(engine, spec(), rows, begin(tokenizer, 2), tokenizer)).trajectories
    eos = [tokenizer.eos_id]
    first, second = tokenizer.encode("7") + eos, tokenizer.encode("9") + eos
    at_once, later = found
    assert at_once.tokens.tolist() == tokenizer.encode("Guess.") + tokenizer.encode("12") + eos
    assert (at_once.finish, at_once.rewards, at_once.reward) == (STOP, {"found": 1.0, "turns": 1.0}, 2.0)
    sampled = later.tokens[later.authors == MODEL].tolist()
    assert sampled == first + second and later.length == len(sampled)
    forced = later.tokens[later.authors == ENVIRONMENT].tolist()
    assert tokenizer.decode(forced) == "\nuser\nhigher\nassistant\n"
    # In order: prompt, first turn, reply, second turn.
    assert (np.diff(np.flatnonzero(np.diff(later.authors))) > 0).all() and later.authors[0] == PROMPT
    assert [turn["author"] for turn in later.messages] == ["prompt", "model", "environment", "model"]
    assert (later.logp[later.authors != MODEL] == 0).all() and (later.logp[later.authors == MODEL] == -0.5).all()
    batch = trajectory_batch(found, WIDTH, NEW, tokenizer.pad_id, np.array([1.0, -1.0]))
    for row, one in enumerate(found):
        learnt = batch.tokens[row][batch.weights[row] > 0].tolist()
        assert learnt == one.tokens[one.authors == MODEL].tolist()
        assert batch.segments[row].sum() == len(one.tokens) and batch.positions[row].max() == len(one.tokens) - 1
    assert engine.requests[1].prompts[1].tolist() == later.tokens[: -len(second)].tolist()
    assert engine.requests[1].limits[0] == 0  # what has ended is not completed
    assert later.version == 7


@pytest.mark.parametrize(
    ("turns", "new", "finish"),
    [
        ([["7…"]], NEW, LENGTH),  # cut before its end
        ([["7"]], 3, LENGTH),  # no room for the reply
        ([["7"], ["8…"]], NEW, LENGTH),
        ([["7"], ["8"]], NEW, STOP),
    ],
)
def test_an_episode_ends_where_it_is_over_or_no_tokens_are_left(tokenizer, turns, new, finish):
    engine = Scripted(tokenizer, turns)
    (found,) = conclude(spec(), run_episodes(engine, spec(), [{"secret": 9}], begin(tokenizer, 1, new), tokenizer))[0]
    assert found.finish == finish and found.rewards["turns"] == len(turns)
    assert len(found.tokens) - found.prompt_length <= new


class Refuses(Guess):
    """Replies to every turn that it was an error."""

    def step(self, completion):
        return [reply | {"error": True} for reply in super().step(completion) or []] or None


@pytest.mark.parametrize(
    ("turns", "new", "most", "marked"),
    [
        ([["7"], ["8"]], NEW, 0, [False, False, True, False]),  # the reply
        ([["7"]], 3, 0, [False, True]),  # the turn whose reply has no room
        ([["7"]], NEW, 1, [False, True]),
        ([["9"]], NEW, 0, [False, False]),
    ],
)
def test_an_error_is_marked_also_where_its_reply_has_no_room(tokenizer, turns, new, most, marked):
    told, engine = dataclasses.replace(spec(Refuses), max_turns=most), Scripted(tokenizer, turns)
    (found,) = conclude(told, run_episodes(engine, told, [{"secret": 9}], begin(tokenizer, 1, new), tokenizer))[0]
    assert [bool(turn.get("error")) for turn in found.messages] == marked


def play(model, tokenizer, secrets, seed=0, temperature=1.0):
    request = dataclasses.replace(begin(tokenizer, len(secrets)), key=jax.random.key(seed), temperature=temperature)
    rows = [{"secret": secret} for secret in secrets]
    return conclude(spec(), run_episodes(LocalEngine(model, tokenizer), spec(), rows, request, tokenizer)).trajectories


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_engine_and_trainer_agree_over_both_turns(tokenizer, model, temperature):
    found = play(model, tokenizer, [*range(1, 17)] * 4, temperature=temperature)
    assert sum((one.authors == ENVIRONMENT).any() for one in found) >= 2  # of two turns
    batch = jax.tree.map(jnp.asarray, trajectory_batch(found, WIDTH, NEW, tokenizer.pad_id))
    logp = token_logprobs(model, batch, temperature).logp
    assert np.abs((logp - batch.old_logp) * batch.weights).max() < 1e-4
    assert all(len(one.tokens) - one.prompt_length <= NEW for one in found)


@pytest.mark.slow
def test_what_a_row_samples_does_not_depend_on_the_others(tokenizer, model):
    """Other episodes end sooner or later, and ask otherwise."""
    one, other = (play(model, tokenizer, [5, *secrets], seed=8) for secrets in (range(1, 16), [10**9] * 15))
    assert (one[0].authors == ENVIRONMENT).any()
    np.testing.assert_array_equal(one[0].tokens, other[0].tokens)
    np.testing.assert_allclose(one[0].logp, other[0].logp, atol=1e-5)


class Broken(Guess):
    def step(self, completion):
        return self.bad(completion)

    def reward(self):
        return self.worse()


class Panic(BaseException):
    """No `Exception`, as what libraries in Rust raise."""


def panic():
    raise Panic("at line 1\nof 2")


@pytest.mark.parametrize(
    ("bad", "worse", "said"),
    [
        (lambda self, text: 1 / 0, None, "Broken.step raised ZeroDivisionError"),
        (lambda self, text: "higher", None, "it returns a list of messages, or None"),
        (lambda self, text: [{"role": "assistant", "content": "no"}], None, "step"),
        (lambda self, text: None, lambda self: {"found": float("nan")}, "Broken.reward gave nan"),
        (lambda self, text: None, lambda self: {}, "gave no rewards"),
        (lambda self, text: None, lambda self: {"a": "b"}, "gave 'b'"),
        (lambda self, text: None, lambda self: {}["x"], "raised KeyError"),
        (lambda self, text: None, lambda self: {"found": 10**5000}, "gave a int that cannot be shown"),
        (lambda self, text: None, lambda self: np.eye(20), r"gave array\(\[\[.* characters\) \(ndarray\)"),
        (lambda self, text: None, lambda self: panic(), "Broken.reward raised Panic: at line 1 of 2"),
        (lambda self, text: np.eye(20), None, r"gave array\(\[\[.*; it returns a list of messages, or None"),
        (lambda self, text: [{"role": "user", "content": 10**5000}], None, "found a int that cannot be shown"),
    ],
)
def test_a_broken_environment_is_told_in_a_line(tokenizer, bad, worse, said):
    kind = type("Broken", (Broken,), {"bad": bad, "worse": worse})
    with pytest.raises(UserError, match=said) as told:
        conclude(
            spec(kind),
            run_episodes(Scripted(tokenizer, [["7"]]), spec(kind), [{"secret": 9}], begin(tokenizer, 1), tokenizer),
        )
    assert "\n" not in str(told.value) and str(told.value).startswith("tiny: Broken.")


class NeedsMore(Guess):
    def __init__(self, more):
        self.more = more


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (NeedsMore, r"NeedsMore\(\) raised TypeError: .*'more'"),
        (type("Fails", (Guess,), {"__init__": lambda self: 1 / 0}), r"Fails\(\) raised ZeroDivisionError"),
        (type("Other", (Guess,), {"__new__": lambda kind: 5}), r"Other\(\) gave 5"),
    ],
)
def test_an_environment_that_cannot_be_created_is_told_in_a_line(tokenizer, kind, said):
    with pytest.raises(UserError, match=f"tiny: {said}.*; it should be a class with reset, step and reward") as told:
        run_episodes(Scripted(tokenizer, [["7"]]), spec(kind), [{"secret": 9}], begin(tokenizer, 1), tokenizer)
    assert "\n" not in str(told.value)


def never_ends(self, *_):
    while True:
        pass


def catches_everything(self, *_):
    with contextlib.suppress(BaseException):
        never_ends(self)
    return {"found": 1.0}


@pytest.mark.parametrize(
    ("method", "slow", "finish"),
    [("step", never_ends, TIMEOUT), ("step", catches_everything, TIMEOUT), ("reward", catches_everything, STOP)],
)
def test_an_environment_that_takes_too_long_gets_no_reward_and_is_counted(tokenizer, method, slow, finish):
    kind = type("Slow", (Guess,), {"step": lambda self, text: None} | {method: slow})
    quick = dataclasses.replace(spec(kind), seconds=0.2)
    found = conclude(
        quick, run_episodes(Scripted(tokenizer, [["7"]]), quick, [{"secret": 9}], begin(tokenizer, 1), tokenizer)
    )
    assert found.timeouts == 1 and found.trajectories[0].finish == finish and found.trajectories[0].reward == 0
