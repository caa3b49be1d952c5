"""What the official client gets is what the engine samples alone, whatever else is asked at the same time."""

import itertools
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from lm.objectives.logprobs import token_logprobs
from lm.rollout.engine import LocalEngine, Request, completion_text
from lm.rollout.sampler import encode_prompt
from lm.serve.slot_engine import SlotEngine, parts
from lm.types import TokenBatch
from tests.serve.running import wait_until

QUESTIONS = [f"What is {a} + {b}?" for a, b in ((3, 4), (12, 5), (40, 2), (7, 7), (99, 1), (0, 0))]


def chat(question):
    return [{"role": "user", "content": question}]


def offline(running, messages, new=40, temperature=0.0, seed=0, group=1, top_p=1.0, top_k=0):
    """The completions of the engine of training, alone."""
    tokenizer = running.served["first"].tokenizer
    request = Request(
        [encode_prompt(tokenizer, messages)], jax.random.key(seed), new, temperature, group, top_p=top_p, top_k=top_k
    )
    found = LocalEngine(running.model, tokenizer).complete(request)
    return [whole(completion_text(tokenizer, one)) for one in found], found


def whole(text):
    """A text without the beginning of a character at its end."""
    return text.rstrip("\ufffd")


def streamed(running, **asked):
    """The texts of a stream by choice, and the finish reasons."""
    texts, ends = {}, {}
    for chunk in running.client.chat.completions.create(model="default", stream=True, **asked):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            assert choice.index not in ends, "nothing follows the end"
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    return texts, ends


@pytest.mark.slow
def test_many_streams_at_once_are_each_the_greedy_answer_alone(running):
    alone = {question: offline(running, chat(question))[0][0] for question in QUESTIONS}
    asked = QUESTIONS * 4  # six times as many as there are slots

    def one(question):
        return streamed(running, messages=chat(question), max_tokens=40, temperature=0)

    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(one, asked))
    assert [whole(texts[0]) for texts, _ in found] == [alone[question] for question in asked]
    assert len(set(alone.values())) > 3
    assert all(set(ends) == {0} for _, ends in found)
    assert running.engine().running == 0


@pytest.mark.parametrize("options", [{}, {"top_p": 0.6}, {"top_k": 5}])
def test_a_seed_gives_the_samples_of_the_engine(running, options):
    wanted, _ = offline(running, chat(QUESTIONS[0]), new=30, temperature=0.8, seed=7, group=3, **options)
    extra = {"top_k": options["top_k"]} if "top_k" in options else None
    top_p = options.get("top_p", 1.0)
    asked = {
        "messages": chat(QUESTIONS[0]), "max_tokens": 30, "temperature": 0.8, "seed": 7, "n": 3, "top_p": top_p,
        "extra_body": extra,
    }  # fmt: skip
    noise = threading.Thread(target=streamed, args=(running,), kwargs=asked | {"seed": 1, "top_p": 0.9})
    noise.start()
    found = running.client.chat.completions.create(model="default", **asked)
    texts, _ = streamed(running, **asked)
    noise.join()
    assert [whole(choice.message.content) for choice in found.choices] == wanted
    assert [whole(texts[index]) for index in range(3)] == wanted
    assert len(set(wanted)) > 1


def test_a_long_prompt_is_read_in_parts_and_gives_the_same(running):
    messages = chat("What is " + "3 + 4 + " * 20 + "1?")
    tokenizer = running.served["first"].tokenizer
    assert 64 < len(encode_prompt(tokenizer, messages)) < 180
    (wanted,), _ = offline(running, messages, new=15)
    found = running.client.chat.completions.create(model="first", messages=messages, max_tokens=15, temperature=0)
    assert whole(found.choices[0].message.content) == wanted


def test_models_have_names_and_the_first_is_also_the_default(running):
    assert [one.id for one in running.client.models.list()] == ["first", "second", "default"]
    assert running.client.models.retrieve("second").id == "second"
    texts = {
        name: running.client.chat.completions.create(
            model=name, messages=chat(QUESTIONS[0]), max_tokens=20, temperature=0
        )
        for name in ("first", "second", "default")
    }
    assert {name: one.model for name, one in texts.items()} == {
        "first": "first",
        "second": "second",
        "default": "first",
    }
    said = {name: one.choices[0].message.content for name, one in texts.items()}
    assert said["first"] == said["default"] != said["second"]


@pytest.mark.slow
def test_log_probabilities_are_the_models(running):
    asked = {
        "model": "default", "messages": chat(QUESTIONS[1]), "max_tokens": 10, "temperature": 0.7, "seed": 2,
        "logprobs": True,
    }  # fmt: skip
    found = running.client.chat.completions.create(top_logprobs=3, **asked)
    tokenizer = running.served["first"].tokenizer
    content = found.choices[0].logprobs.content
    prompt = encode_prompt(tokenizer, chat(QUESTIONS[1]))
    _, (alone,) = offline(running, chat(QUESTIONS[1]), new=10, temperature=0.7, seed=2)
    sampled = [token for token in alone.tokens.tolist() if token not in tokenizer.end_ids]
    row = np.array([prompt + sampled])
    ones = np.ones_like(row)
    batch = TokenBatch(row, ones.astype(np.float32), ones, np.arange(row.shape[1])[None])
    wanted = np.asarray(token_logprobs(running.model, batch).logp)[0, len(prompt) :]
    np.testing.assert_allclose([one.logprob for one in content], wanted, atol=2e-4)
    said = bytes(b for one in content for b in one.bytes).decode(errors="replace")
    assert whole(said) == whole(found.choices[0].message.content)
    for one in content:
        assert len(one.top_logprobs) == 3
        assert [o.logprob for o in one.top_logprobs] == sorted((o.logprob for o in one.top_logprobs), reverse=True)
        assert one.logprob <= one.top_logprobs[0].logprob + 1e-6
    pieces = running.client.chat.completions.create(stream=True, top_logprobs=3, **asked)
    again = [one for chunk in pieces for c in chunk.choices if c.logprobs for one in c.logprobs.content or ()]
    assert [one.token for one in again] == [one.token for one in content]


def test_stop_strings_end_the_text_before_them(running):
    (wanted,), _ = offline(running, chat(QUESTIONS[0]), new=40)
    stop = next(one for one in wanted[len(wanted) // 2 :] if one.isascii())
    asked = {"messages": chat(QUESTIONS[0]), "max_tokens": 40, "temperature": 0, "stop": [stop, "never said"]}
    found = running.client.chat.completions.create(model="default", **asked)
    assert found.choices[0].message.content == wanted[: wanted.index(stop)]
    assert found.choices[0].finish_reason == "stop"
    texts, ends = streamed(running, **asked)
    assert texts[0] == wanted[: wanted.index(stop)] and ends == {0: "stop"}


def test_completions_continue_texts_and_token_ids(running):
    tokenizer = running.served["first"].tokenizer
    ids = [tokenizer.document_ids[0], *tokenizer.encode("What is 3")]
    found = running.client.completions.create(
        model="default", prompt=["What is 3", "1 + 1"], n=2, max_tokens=8, seed=1, logprobs=2
    )
    as_ids = running.client.completions.create(model="default", prompt=ids, n=2, max_tokens=8, seed=1, logprobs=2)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in found.choices[:2]] == [choice.text for choice in as_ids.choices]
    first = found.choices[0].logprobs
    assert len(first.tokens) == len(first.token_logprobs) == len(first.top_logprobs) == len(first.text_offset)
    assert found.usage.prompt_tokens == len(ids) + 1 + len(tokenizer.encode("1 + 1"))
    chunks = list(
        running.client.completions.create(
            model="default", prompt="What is 3", n=2, max_tokens=8, seed=1, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    texts = ["".join(c.text for chunk in chunks for c in chunk.choices if c.index == index) for index in (0, 1)]
    assert texts == [choice.text for choice in found.choices[:2]]
    assert chunks[-1].usage.completion_tokens <= 16 and not chunks[-1].choices


SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "integer", "maximum": 999, "minimum": 0}, "sure": {"type": "boolean"}},
    "required": ["answer", "sure"],
    "additionalProperties": False,
}


def test_an_answer_by_a_schema_is_valid_json_beside_free_ones(running):
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    free = {"messages": chat(QUESTIONS[2]), "max_tokens": 40, "temperature": 0}
    (wanted,), _ = offline(running, chat(QUESTIONS[2]))
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(streamed, running, **free) for _ in range(3)]
        found = running.client.chat.completions.create(
            model="default", messages=chat(QUESTIONS[0]), response_format=form, temperature=1.5, n=4, seed=5
        )
        assert [whole(one.result()[0][0]) for one in others] == [wanted] * 3
    for choice in found.choices:
        value = json.loads(choice.message.content)
        assert set(value) == {"answer", "sure"} and 0 <= value["answer"] <= 999 and choice.finish_reason == "stop"


@pytest.mark.slow
def test_a_short_prompt_begins_within_three_steps_beside_many_streams(serve):
    with serve(slots=33, max_len=2000, new=1900) as many:
        others = [
            many.client.chat.completions.create(
                model="default", messages=chat(QUESTIONS[0]), temperature=0, stream=True
            )
            for _ in range(32)
        ]
        engine = many.engine()
        wait_until(lambda: engine.running == 32, 60)
        steps = []
        inner = many.scheduler.submit

        def submit(model, completions):
            steps.append(completions[0])
            inner(model, completions)

        many.scheduler.submit = submit
        for _ in range(8):
            many.client.chat.completions.create(model="default", messages=chat("1 + 1?"), max_tokens=1)
        assert engine.running >= 31, "the others are still there"
        assert len(steps) == 8 and max(one.first for one in steps) <= 3
        for one in others:
            one.close()


def test_a_client_that_vanishes_frees_its_slot_within_a_second(running):
    engine = running.engine()
    stream = running.client.chat.completions.create(
        model="default", messages=chat(QUESTIONS[0]), max_tokens=100, temperature=1.9, stream=True, n=4,
    )  # fmt: skip
    next(iter(stream))
    wait_until(lambda: engine.running == 4 or engine.running == 0, 10)
    stream.close()
    assert wait_until(lambda: engine.running == 0, 1.0) < 1
    found = running.client.chat.completions.create(model="default", messages=chat("1 + 1?"), max_tokens=3)
    assert found.usage.completion_tokens >= 1


def test_the_parts_of_a_prompt_hold_it_with_little_padding():
    for length in range(1, 600):
        read = parts(length)
        assert [start for start, _ in read] == [0, *itertools.accumulate(width for _, width in read)][:-1]
        assert 0 <= sum(read[-1]) - length < 8 and {width for _, width in read} <= {8, 32, 256}


@pytest.mark.slow
def test_a_conversation_that_goes_on_is_read_from_where_it_went_on(serve, monkeypatch):
    first, other = (np.random.default_rng(seed).integers(3, 300, 700).tolist() for seed in (0, 1))
    longer = first[:600] + other[:80]
    with serve(slots=2, max_len=900, new=20) as running:
        read, seen = SlotEngine._read, []
        monkeypatch.setattr(SlotEngine, "_read", lambda self, *given: seen.append(given[2:]) or read(self, *given))

        def ask(prompt):
            seen.clear()
            found = running.client.completions.create(
                model="default", prompt=prompt, max_tokens=20, temperature=0, logprobs=3
            )
            return found.choices[0].text, found.choices[0].logprobs, list(seen)

        *alone, every = ask(longer)
        assert every == [(0, 256), (256, 256), (512, 32), (544, 32), (576, 32), (608, 32), (640, 32), (672, 8)]
        assert ask(other)[2][0] == (0, 256)
        ask(first[:600])
        *after, left = ask(longer)
        assert left == every[2:] and after == alone
        *again, left = ask(longer)
        assert left == every[2:] and again == alone
