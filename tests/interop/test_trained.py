"""Trained checkpoints give their golden logits, continuations and likelihoods; in safetensors, and in GGUF."""

import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.data.vocabulary import load_tokenizer
from lm.interop import gguf, hf
from tests.rollout.rows import generate

CLOSE = 1e-4  # of a logit: what float32 leaves of float64 in a trained model


def pytest_generate_tests(metafunc):
    root = Path(metafunc.config.getoption("--models"))
    found = [path.parent for path in sorted(root.glob("*/golden.json"))]
    skip = pytest.param(None, marks=pytest.mark.skip(reason=f"no trained checkpoints at {root}"))
    metafunc.parametrize(
        "trained", found or [skip], ids=lambda f: f.name if f else "none", indirect=True, scope="module"
    )


@pytest.fixture(scope="module")
def trained(request):
    """(folder, golden numbers, model, path of the tokenizer) of a trained checkpoint."""
    folder = request.param
    golden = json.loads((folder / "golden.json").read_text())
    if (folder / "config.json").is_file():
        return folder, golden, hf.read(folder), folder
    wanted, file = golden["weights"], request.config.getoption("--gguf")
    if file is None or not Path(file).is_file():
        pytest.skip(f"no weights: --gguf FILE, or LM_TESTS_GGUF, names {wanted['file']} of {wanted['package']}")
    if hashlib.sha256(Path(file).read_bytes()).hexdigest() != wanted["file_sha256"]:
        pytest.skip(f"{file} is another file than {wanted['file']} of {wanted['package']}")
    return folder, golden, gguf.read(Path(file)), Path(file)


def rows(texts: list[list[int]]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Ids, right padded, with positions and segments."""
    lengths = np.array([len(ids) for ids in texts])
    places = np.broadcast_to(np.arange(lengths.max()), (len(texts), lengths.max()))
    mask = (places < lengths[:, None]).astype(np.int32)
    ids = np.zeros_like(mask)
    ids[mask.astype(bool)] = [token for text in texts for token in text]
    return jnp.asarray(ids), jnp.asarray(places), jnp.asarray(mask)


forward = jax.jit(lambda model, *batch: model(*batch))


def test_last_logits(trained):
    folder, golden, model, _ = trained
    prompts = golden["prompts"]
    found = np.asarray(forward(model, *rows([one["ids"] for one in prompts])))
    file = folder / "golden.npz"
    stored = np.load(file) if file.is_file() else {}
    for number, one in enumerate(prompts):
        last = found[number, len(one["ids"]) - 1]
        if "top_ids" in one:
            np.testing.assert_allclose(last[one["top_ids"]], one["top_logits"], atol=CLOSE)
            np.testing.assert_allclose(np.logaddexp.reduce(last.astype(float)), one["logsumexp"], atol=CLOSE)
        else:
            np.testing.assert_allclose(last, stored[f"last_logits_{number}"], atol=CLOSE)
        if f"all_logits_{number}" in stored:
            np.testing.assert_allclose(found[number, : len(one["ids"])], stored[f"all_logits_{number}"], atol=CLOSE)


@pytest.mark.slow
def test_greedy_continuations(trained):
    _, golden, model, _ = trained
    prompts = golden["prompts"]
    longest = max(len(one["ids"]) for one in prompts)
    ids = np.array([[0] * (longest - len(one["ids"])) + one["ids"] for one in prompts])
    lengths, count = (np.array([len(one[name]) for one in prompts]) for name in ("ids", "greedy_ids"))
    out = generate(
        model, jnp.asarray(ids), jnp.asarray(lengths), jax.random.key(0), 0.0,
        max_new_tokens=int(count.max()), end_ids=(-1,), pad_id=0,
    )  # fmt: skip
    whole = [one["ids"] + one["greedy_ids"] for one in prompts]
    logits = np.asarray(forward(model, *rows(whole)))
    for number, one in enumerate(prompts):
        given, wanted = list(map(int, out.tokens[number])), one["greedy_ids"]
        other = next((place for place, token in enumerate(wanted) if given[place] != token), None)
        if other is not None:  # two tokens are equally likely, as far as float32 can tell
            scores = logits[number, len(one["ids"]) + other - 1]
            assert abs(scores[wanted[other]] - scores[given[other]]) < CLOSE, one["text"]


def test_likelihoods(trained):
    _, golden, model, _ = trained
    texts = golden.get("perplexity") or pytest.skip("no golden likelihoods")
    ids, places, mask = rows([one["ids"] for one in texts])
    logp = jax.nn.log_softmax(forward(model, ids, places, mask)[:, :-1].astype(jnp.float32))
    nll = -jnp.take_along_axis(logp, ids[:, 1:, None], axis=2)[..., 0] * mask[:, 1:]
    np.testing.assert_allclose(nll.sum(1), [one["sum_nll"] for one in texts], rtol=1e-5)


def test_ids(trained):
    _, golden, model, path = trained
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model")) and path.is_dir():
        pytest.skip("no tokenizer in the folder")
    tokenizer = load_tokenizer(path)
    assert tokenizer.vocab_size <= model.vocab_size
    for one in golden["prompts"]:
        if "messages" in one:
            ids = list(tokenizer.render(one["messages"], generation_prompt=True).tokens)
        else:
            ids = tokenizer.encode(one["text"])
        assert one["ids"][len(one["ids"]) - len(ids) :] == ids  # a start token may be in front
        assert tokenizer.decode(one["greedy_ids"], specials=True).strip() == one["greedy_text"].strip()
