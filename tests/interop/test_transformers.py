"""What leaves `lm` gives the same logits, ids and chat tokens in transformers; skipped where that package is not installed."""

import dataclasses

import jax
import numpy as np
import pytest

from lm.data.tokenizer import SubwordTokenizer
from lm.interop.export import write
from lm.model.heads import Scorer
from lm.model.transformer import Transformer
from tests.interop.test_hf import MEMBERS, SMALL

torch = pytest.importorskip("torch", reason="the comparison with transformers needs torch")
transformers = pytest.importorskip("transformers", reason="the comparison with transformers needs it installed")


@pytest.mark.parametrize("member", MEMBERS)
def test_each_family_has_the_same_logits(tmp_path, member):
    config = dataclasses.replace(SMALL, **MEMBERS[member])
    model = jax.jit(lambda: Transformer(config, 96, jax.random.key(0)))()
    model = jax.tree.map(lambda x: x + 0.1 * np.random.default_rng(x.size).standard_normal(x.shape, np.float32), model)
    write(model, tmp_path, member, token_ids={"pad_token_id": 0})  # which Phi 3 has beyond this vocabulary
    ids = np.random.default_rng(0).integers(0, 96, (2, 48))
    positions = np.broadcast_to(np.arange(48), ids.shape)
    ours = np.asarray(jax.jit(lambda model: model(ids, positions, np.ones_like(ids)))(model))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32", attn_implementation="eager")
    with torch.no_grad():
        found = theirs(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(ours, found, atol=1e-5 * np.abs(found).max())


@pytest.mark.parametrize("member", MEMBERS)
def test_a_reward_model_of_each_family_has_the_same_scores(tmp_path, member):
    """Also of rows with padding: the score is that of the last token before it."""
    config = dataclasses.replace(SMALL, **MEMBERS[member])
    make = jax.jit(lambda: Scorer(Transformer(config, 96, jax.random.key(0)), jax.random.key(1)))
    model = jax.tree.map(lambda x: x + 0.1 * np.random.default_rng(x.size).standard_normal(x.shape, np.float32), make())
    write(model, tmp_path, member, token_ids={"pad_token_id": 0})
    ids = np.random.default_rng(0).integers(1, 96, (3, 24))
    lengths = np.array([24, 20, 7])
    ids[np.arange(24) >= lengths[:, None]] = 0
    positions = np.broadcast_to(np.arange(24), ids.shape)
    scores, _ = jax.jit(lambda model: model(ids, positions, (ids > 0).astype(np.int32)))(model)
    ours = np.asarray(scores)[np.arange(3), lengths - 1]
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, dtype="float32", attn_implementation="eager"
    )
    with torch.no_grad():
        found = theirs(torch.from_numpy(ids), attention_mask=torch.from_numpy((ids > 0).astype(int))).logits.numpy()
    np.testing.assert_allclose(ours, found[:, 0], atol=1e-5 * np.abs(found).max())


def test_a_tokenizer_has_the_same_ids_and_the_chat_the_same_tokens(tmp_path):
    own = SubwordTokenizer.train(["the cat sat on the mat; 12 caf\u00e9s\n" * 20], 330)
    for name, content in own.published_files(64).items():
        (tmp_path / name).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("  the cat\n\n \u2581\u00e9 \U0001f600\t", "<|im_end|> <0x41><unk>", ""):
        assert theirs.encode(text, split_special_tokens=True, add_special_tokens=False) == own.encode(text)
        assert theirs.decode(own.encode(text)) == text
    chat = [{"role": "system", "content": " be kind "}, {"role": "user", "content": "the cat?\n"}]
    assert theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] == own.render(chat, True).tokens
    chat.append({"role": "assistant", "content": "the mat"})
    assert theirs.apply_chat_template(chat)["input_ids"] == own.render(chat).tokens
    assert (theirs.eos_token_id, theirs.pad_token_id) == (own.eos_id, own.pad_id)
