"""The engine: a completion is the same in any slot, beside any others; it is what a whole forward pass for each token gives."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lm.between_batches import calling_between_batches
from lm.experiment import Layer, LoRA, Mesh, RolloutMesh
from lm.model.lora import merged
from lm.parallel.mesh import make_mesh, rollout_mesh
from lm.parallel.rules import shardings
from lm.rollout.engine import LocalEngine, Request, completion_text
from lm.rollout.sampler import choose, completion_keys
from lm.rollout.slot_cache import chunks_of
from lm.rollout.slots import empty_reader, empty_slots, fill_lanes, read_chunk, sample_tokens, sampling_model
from tests.helpers import VOCAB, layout, tiny_model, with_moved_adapter

END, NEW, WIDTH = 1, 20, 40
TOKENIZER = SimpleNamespace(
    end_ids=(END,), pad_id=0, vocab_size=VOCAB, decode=lambda ids: "".join(chr(ord("0") + one) for one in ids)
)
KEY = jax.random.key(5)
FAMILIES = {
    "plain": {},
    "windows": {"pattern": (Layer(window=5), Layer())},
    "softcap": {"pattern": (Layer(softcap=2.0, window=7),), "final_softcap": 3.0},
    "bfloat16": {"compute_dtype": "bfloat16"},
    "post_norms": {"norms": "post", "qk_norm_of": "heads"},
}


def prompts_of(count, seed=0, most=WIDTH):
    rng = np.random.default_rng(seed)
    return [rng.integers(2, VOCAB, rng.integers(1, most + 1)).tolist() for _ in range(count)]


def complete(model, prompts, slots=0, **changes):
    request = dataclasses.replace(Request(prompts, KEY, NEW, width=WIDTH), **changes)
    return LocalEngine(model, TOKENIZER, slots=slots).complete(request)


@jax.jit
def next_token(model, padded, size, key, step, temperature):
    """Of a whole forward pass over the first `size` tokens: the token after them, and its log-probability."""
    places = jnp.arange(padded.shape[1])[None]
    logits = model(padded, places, jnp.ones_like(padded))[:, size - 1]
    return choose(logits, key, step[None], temperature)


def plain_completion(model, prompt, number, sample, temperature=1.0):
    """A completion by a whole forward pass for every token."""
    key, tokens, logps = completion_keys(KEY, jnp.array([number]), jnp.array([sample])), list(prompt), []
    for step in range(NEW):
        padded = np.array([tokens + [0] * (WIDTH + NEW - len(tokens))])
        token, logp = next_token(model, padded, len(tokens), key, np.int32(step), np.float32(temperature))
        tokens.append(int(token[0]))
        logps.append(float(logp[0]))
        if tokens[-1] == END:
            break
    return tokens[len(prompt) :], logps


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_completions_are_those_of_whole_forward_passes(family):
    model, prompts = tiny_model(3, **FAMILIES[family]), prompts_of(3)
    found = complete(model, prompts, slots=2, group_size=2)
    for number, prompt in enumerate(prompts):
        tokens, logps = plain_completion(model, prompt, number, 1)
        one = found[2 * number + 1]
        close = 0.1 if family == "bfloat16" else 1e-4
        if family != "bfloat16":
            assert one.tokens.tolist() == tokens
        np.testing.assert_allclose(one.logp[:3], logps[:3], atol=close)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("group", "slots"), [(1, 7), (4, 6), (3, 16)])
def test_a_completion_is_equal_to_the_bit_in_any_slot_and_beside_any_others(group, slots, dtype):
    """Its prompt keeps its number; the neighbours end at other times, are others, or do not exist."""
    model, prompts = tiny_model(1, compute_dtype=dtype), prompts_of(30)
    expected = complete(model, prompts, slots, group_size=group)
    rng = np.random.default_rng(group)
    for trial in range(4):
        limits = np.where(rng.random((30, group)) < 0.5, NEW, rng.integers(0, NEW, (30, group)))
        kept = rng.random(30) < 0.4
        limits[kept] = NEW
        others = [
            one if keep else other for one, keep, other in zip(prompts, kept, prompts_of(30, 9 + trial), strict=True)
        ]
        found = complete(model, others, slots, group_size=group, limits=limits.ravel().tolist())
        for number in np.flatnonzero(np.repeat(kept, group)):
            assert found[number].tokens.tobytes() == expected[number].tokens.tobytes()
            assert found[number].logp.tobytes() == expected[number].logp.tobytes()
        for one, limit in zip(found, limits.ravel(), strict=True):
            assert len(one.tokens) <= limit and (one.ended or len(one.tokens) == limit)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["plain", "windows", "bfloat16"])
def test_completions_are_equal_to_the_bit_whichever_part_of_the_caches_is_read(family, monkeypatch):
    """The part follows the longest prompt and completion in progress, so it depends on the others."""
    monkeypatch.setattr("lm.rollout.slot_cache.BLOCK", 4)
    monkeypatch.setattr("lm.rollout.engine.LOOK", 4)
    assert chunks_of(NEW) == [(1, 4), (1, 4), (1, 4), (2, 4)] and chunks_of(WIDTH, window=5) == [(1, 4), (1, 4)]
    model, prompts = tiny_model(3, **FAMILIES[family]), [one[:9] for one in prompts_of(12)]
    alone = complete(model, prompts, 4, group_size=2, limits=[NEW, NEW] + [1] * 22)[:2]
    others = [prompts[0], *prompts_of(12, 7)[1:]]
    for one, other in zip(alone, complete(model, others, 4, group_size=2), strict=False):
        assert one.tokens.tobytes() == other.tokens.tobytes() and one.logp.tobytes() == other.logp.tobytes()
    if family != "bfloat16":
        tokens, logps = plain_completion(model, prompts[0], 0, 1)
        assert alone[1].tokens.tolist() == tokens and len(tokens) > 12
        np.testing.assert_allclose(alone[1].logp, logps, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["plain", "windows"])
def test_an_int8_cache_changes_log_probabilities_a_little(family, monkeypatch):
    monkeypatch.setattr("lm.rollout.slot_cache.BLOCK", 4)
    model, prompts = tiny_model(3, **FAMILIES[family]), prompts_of(6)
    request = Request(prompts, KEY, NEW, group_size=2, width=WIDTH)
    exact, found = (LocalEngine(model, TOKENIZER, slots=4, cache=cache).complete(request) for cache in ("same", "int8"))
    gaps = [abs(one.logp[0] - other.logp[0]) for one, other in zip(found, exact, strict=True)]
    assert max(gaps) == 0, "the first token follows from the hidden state that read the prompt"
    gaps = [
        abs(one.logp[1] - other.logp[1])
        for one, other in zip(found, exact, strict=True)
        if len(one.logp) > 1 and one.tokens[:2].tolist() == other.tokens[:2].tolist()
    ]
    assert len(gaps) > 6 and 0 < max(gaps) < 0.02


def test_an_int8_cache_has_a_byte_for_each_number_and_a_scale_for_each_head_of_a_token():
    model = sampling_model(tiny_model())
    keys = empty_slots(model, slots=2, lanes=1, prompt=30, new=20, cache="int8").columns[0].keys[0]
    assert keys.numbers.dtype == jnp.int8 and keys.scales.shape == (2, model.config.num_kv_heads, 1, 20)


def test_a_layer_with_a_window_has_columns_for_its_window_only():
    model = sampling_model(tiny_model(3, **FAMILIES["windows"]))
    slots = empty_slots(model, slots=2, lanes=1, prompt=30, new=20)
    windows = [model.config.layer(number).window for number in range(model.config.num_layers)]
    assert [one.size for one in slots.columns] == [window or 20 for window in windows]
    assert [one.size for one in slots.prompts] == [window or 30 for window in windows]


@pytest.mark.slow
def test_other_numbers_of_slots_give_the_same_tokens():
    model, prompts = tiny_model(1), prompts_of(12)
    expected = complete(model, prompts, 4, group_size=4)
    for slots in (1, 3, 8, 48):
        for one, other in zip(complete(model, prompts, slots, group_size=4), expected, strict=True):
            np.testing.assert_array_equal(one.tokens, other.tokens)
            np.testing.assert_allclose(one.logp, other.logp, atol=1e-5)


def test_new_caches_are_placed_like_those_that_the_programs_return():
    """Else each program would compile twice, for the first call and for the others."""
    model = sampling_model(jax.device_put(tiny_model(), NamedSharding(make_mesh(Mesh(data=1)), PartitionSpec())))
    slots, reader = empty_slots(model, slots=2, lanes=2, prompt=16, new=8), empty_reader(model, 1, 16)
    read = read_chunk(model, *reader, np.int32(0), np.full((1, 16), 3, np.int32), np.array([16], np.int32))
    filled = fill_lanes(slots, *read, np.array([16], np.int32), np.array([0], np.int32))
    for before, after in ((empty_reader(model, 1, 16), read), (empty_slots(model, 2, 2, 16, 8), filled)):
        for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            assert one.committed and one.sharding == other.sharding


def test_each_program_compiles_once_for_all_requests_of_a_shape():
    model = tiny_model()
    complete(model, prompts_of(9), 4)
    before = sample_tokens._cache_size(), read_chunk._cache_size()
    complete(model, prompts_of(30, 2), 4, temperature=0.3)
    assert (sample_tokens._cache_size(), read_chunk._cache_size()) == before


@pytest.mark.slow
def test_long_prompts_are_read_in_chunks(monkeypatch):
    model, prompts = tiny_model(), prompts_of(10)
    expected = complete(model, prompts)
    monkeypatch.setattr("lm.rollout.batching.CHUNK", 16)
    for one, other in zip(complete(model, prompts), expected, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.logp, other.logp, atol=1e-5)


@pytest.mark.slow
def test_adapters_are_applied_or_merged():
    model, prompts = with_moved_adapter(tiny_model(), LoRA(rank=4), seed=1), prompts_of(6)
    applied, whole = complete(model, prompts, 4), complete(merged(model, "float32"), prompts, 4)
    for one, other in zip(applied, whole, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.logp, other.logp, atol=1e-4)
    assert any(len(a.tokens) != len(b.tokens) or (a.tokens != b.tokens).any() for a, b in zip(applied, complete(tiny_model(), prompts, 4), strict=True))  # fmt: skip


def test_a_stop_string_ends_a_completion_after_the_token_that_completes_it():
    model, prompts = tiny_model(1), prompts_of(12)
    whole = complete(model, prompts, 4)
    texts = [TOKENIZER.decode(one.tokens.tolist()) for one in whole]
    stop = [texts[0][4:6], texts[5][7]]
    for one, text, long in zip(complete(model, prompts, 4, stop=stop), texts, whole, strict=True):
        places = [(text.index(x) + len(x), number, x) for number, x in enumerate(stop) if x in text]
        size, _, string = min(places, default=(len(text), 0, ""))
        assert one.tokens.tolist() == long.tokens[:size].tolist() and one.stopped == string
        np.testing.assert_array_equal(one.logp, long.logp[:size])
        assert completion_text(TOKENIZER, one) == (text[: size - len(string)] if string else text[: size - one.ended])


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2}, {"data": 8}, {"data": 2, "tensor": 2}])
@pytest.mark.parametrize("group", [1, 4])
def test_completions_are_the_same_on_many_devices(sizes, group):
    model, prompts = tiny_model(), prompts_of(11)
    alone = complete(model, prompts, 8, group_size=group)
    with jax.set_mesh(make_mesh(layout(**sizes))):
        spread_out = complete(model, prompts, 8, group_size=group)
    for one, other in zip(alone, spread_out, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.logp, other.logp, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "tensor"), [("plain", 1), ("windows", 2), ("bfloat16", 2)])
def test_completions_are_the_same_where_sampling_has_a_layout_of_its_own(family, tensor):
    """Weights sharded over `fsdp` are resharded by one program, and the cache is split over completions and heads."""
    model, prompts = tiny_model(**FAMILIES[family]), prompts_of(11)
    mesh, own = make_mesh(layout(fsdp=8)), RolloutMesh(tensor)
    model = jax.device_put(model, shardings(model, mesh))
    request = Request(prompts, KEY, NEW, temperature=0.0 if family == "bfloat16" else 1.0, group_size=4, width=WIDTH)
    with jax.set_mesh(mesh):
        expected = LocalEngine(model, TOKENIZER, slots=8).complete(request)
        found = LocalEngine(model, TOKENIZER, slots=8, layout=own).complete(request)
    for one, other in zip(found, expected, strict=True):
        if family != "bfloat16":
            np.testing.assert_array_equal(one.tokens, other.tokens)
            np.testing.assert_allclose(one.logp, other.logp, atol=1e-5)
        np.testing.assert_allclose(one.logp[:1], other.logp[:1], atol=0.05)


def test_a_sampler_of_its_own_layout_has_whole_rows_of_weights():
    model, mesh = tiny_model(compute_dtype="bfloat16"), make_mesh(layout(fsdp=8))
    model = jax.device_put(model, shardings(model, mesh))
    with jax.set_mesh(rollout_mesh(RolloutMesh(2), mesh)):
        weight = sampling_model(model).blocks[0].mlp.gate.weight[...]
        keys = empty_slots(sampling_model(model), 8, 4, 16, 16).columns[0].keys[0].numbers
    embed, mlp = weight.shape
    assert weight.dtype == jnp.bfloat16 and weight.sharding.shard_shape(weight.shape) == (embed, mlp // 2)
    rows, heads = keys.shape[:2]
    assert keys.sharding.shard_shape(keys.shape)[:2] == (rows // 4, heads // 2)


def test_sampling_calls_the_check_every_few_tokens_and_ends_with_its_error(monkeypatch):
    monkeypatch.setattr("lm.rollout.engine.LOOK", 4)
    calls = []

    def check():
        calls.append(1)
        if len(calls) == 3:
            raise InterruptedError

    model = tiny_model()
    request = Request(prompts_of(2), KEY, NEW, width=WIDTH)
    nothing_ends = dataclasses.replace(
        LocalEngine(model, TOKENIZER), tokenizer=SimpleNamespace(**vars(TOKENIZER) | {"end_ids": (VOCAB,)})
    )
    with calling_between_batches(check), pytest.raises(InterruptedError):
        nothing_ends.complete(request)
    assert len(calls) == 3
