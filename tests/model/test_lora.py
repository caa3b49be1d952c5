"""Adapters on a model: they begin as nothing, stay apart from the base, and merge into what they computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.experiment import DPO, PPO, SFT, LoRA, Mesh, Optimizer, UserError
from lm.model.lora import adapted, base_of, freeze_adapter, has_adapter, linears, merged, without_adapter
from lm.objectives.logprobs import token_logprobs
from lm.optimizer import as_matrices, matrices
from lm.parallel.mesh import make_mesh
from lm.train.base import fingerprint
from lm.train.loop import checkpoint_items, start_state
from lm.train.named_arrays import named_leaves
from lm.train_step import partition
from tests.helpers import random_batch, tiny_model, tiny_stage, with_moved_adapter

KINDS = {
    "plain": LoRA(rank=3, alpha=6.0),
    "rs_lora": LoRA(rank=4, rs_lora=True, targets=("blocks/attention/[qo]", "*/down")),
    "dora": LoRA(rank=3, dora=True),
}


@jax.jit
def logp(model):
    return token_logprobs(model, random_batch(4)).logp


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing_and_off_it_is_the_base(kind):
    base, lora = tiny_model(), KINDS[kind]
    new = adapted(base, tiny_stage(SFT(), lora=lora), jax.random.key(1), "policy")
    # DoRA divides a norm by itself, which two programs may round apart.
    np.testing.assert_allclose(logp(new), logp(base), atol=1e-6 if lora.dora else 0, rtol=0)
    trained = with_moved_adapter(base, lora, 1)
    assert np.abs(logp(trained) - logp(base)).max() > 1e-3
    np.testing.assert_array_equal(logp(without_adapter(trained)), logp(base))
    assert sum(one.lora is not None for _, one in linears(trained)) == (3 if lora.targets else 7)


@pytest.mark.slow
def test_adapters_of_several_stages_stay_apart_and_merge_into_what_they_compute():
    model = base = tiny_model()
    for seed, kind in enumerate(("plain", "dora", "rs_lora", "dora")):
        entering = logp(model)
        model = with_moved_adapter(freeze_adapter(model), KINDS[kind], seed)
        np.testing.assert_allclose(logp(without_adapter(model)), entering, atol=2e-6)
    np.testing.assert_allclose(logp(merged(model)), logp(model), atol=2e-5)
    assert not has_adapter(merged(model)) and len(named_leaves(merged(model))) == len(named_leaves(base))
    for name, leaf in named_leaves(base_of(model)).items():
        assert leaf is named_leaves(base)[name], name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "dora"])
def test_gradients_of_the_factors_are_those_of_finite_differences(kind):
    model, batch = with_moved_adapter(tiny_model(), KINDS[kind], 2), random_batch(4)
    rng = np.random.default_rng(0)

    def toward(
        name, x
    ):  # the norm of a column counts as constant, so that of DoRA's factors only the magnitude is exact
        chosen = "magnitude" in name if kind == "dora" else "lora" in name
        return jnp.asarray(rng.standard_normal(x.shape) * chosen, x.dtype)

    direction = jax.tree_util.tree_map_with_path(lambda path, x: toward(jax.tree_util.keystr(path), x), model)

    @jax.jit
    def loss(step):
        return token_logprobs(jax.tree.map(lambda x, d: x + step * d, model, direction), batch).logp.mean()

    gradient, step = jax.grad(loss)(0.0), 1e-3
    assert abs(gradient) > 1e-3
    np.testing.assert_allclose((loss(step) - loss(-step)) / (2 * step), gradient, rtol=1e-2)


@pytest.mark.slow
def test_a_stage_copies_no_base_and_saves_none():
    mesh, stage = make_mesh(Mesh(data=1)), tiny_stage(DPO(), lora=LoRA(rank=2, alpha=2.0))
    model = tiny_model()
    state, step = start_state(stage, model, mesh, key=jax.random.key(0))
    assert "reference" not in state.frozen
    old, seal = named_leaves(model), fingerprint(model)
    state, metrics = step(state, random_batch())
    assert float(metrics["loss"]) == pytest.approx(np.log(2), abs=1e-6)  # policy and reference are equal
    new = named_leaves(state.models["policy"])
    for name, leaf in old.items():
        assert leaf.unsafe_buffer_pointer() == new[name].unsafe_buffer_pointer(), name
    saved = named_leaves(checkpoint_items(state)["policy"])
    assert saved.keys() == new.keys() - old.keys() and all("/lora/" in name for name in saved)
    state, metrics = step(state, random_batch())
    assert float(metrics["loss"]) < np.log(2)
    changed = jax.tree.map(lambda x: x, model)
    changed.norm.scale[...] = changed.norm.scale[...].at[0].add(1e-7)
    assert fingerprint(state.models["policy"]) == seal != fingerprint(changed)


def test_policy_and_critic_share_a_base_and_have_factors_of_their_own():
    stage = tiny_stage(PPO(max_new_tokens=8), lora=LoRA(rank=2))
    state, _ = start_state(stage, tiny_model(), make_mesh(Mesh(data=1)), key=jax.random.key(0))
    policy, critic = named_leaves(state.models["policy"]), named_leaves(state.models["critic"].body)
    assert policy.keys() == critic.keys()
    for name, leaf in policy.items():
        alike = leaf.unsafe_buffer_pointer() == critic[name].unsafe_buffer_pointer()
        assert alike == ("/lora/" not in name), name
    assert not np.array_equal(policy["blocks/mlp/up/lora/a"], critic["blocks/mlp/up/lora/a"])


def test_muon_turns_factors_and_no_magnitude_decays():
    stage = tiny_stage(SFT(), lora=LoRA(rank=2, dora=True), optimizer=Optimizer(kind="muon"))
    models = jax.eval_shape(lambda m: adapted(m, stage, jax.random.key(0), "policy"), jax.eval_shape(tiny_model))
    trained, _ = partition({"policy": models}, stage)
    decays, sides = named_leaves(matrices(trained)), as_matrices(trained)["policy"].blocks.attention
    assert {name.split("/")[-1] for name, decay in decays.items() if decay} == {"a", "b"}
    assert all("magnitude" in name for name, decay in decays.items() if not decay)
    found = [one.get_value() for lora in (sides.q.lora, sides.o.lora) for one in (lora.a, lora.b)]
    # The rank against all else, whichever of the two sides is `embed`.
    assert [tuple(one) for one in found] == [((2,), (1,)), ((1,), (2, 3)), ((3,), (1, 2)), ((1,), (2,))]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora": LoRA(rank=2, targets=("*q_proj",))}, r"tiny\.lora\.targets has '\*q_proj', .* blocks/attention/q, "),
        ({"lora": LoRA(rank=2), "trainable": ("policy/*norm*",)}, r"tiny\.trainable has .*norm.* lora\.rank 2"),
    ],
)
def test_patterns_that_match_no_layer_or_no_factor_are_refused(changes, said):
    with pytest.raises(UserError, match=said):
        start_state(tiny_stage(SFT(), **changes), tiny_model(), make_mesh(Mesh(data=1)))
