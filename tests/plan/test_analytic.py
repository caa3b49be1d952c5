"""Plans by arithmetic: every experiment in seconds, memory as the compiler has it, sampler, layouts, advice."""

import dataclasses
import functools
import json
import typing

import jax
import jax.numpy as jnp
import pytest

from lm.experiment import (
    CPO,
    DPO,
    GRPO,
    KTO,
    ORPO,
    PPO,
    SFT,
    Distill,
    Layer,
    LoRA,
    Model,
    Pretrain,
    RewardModel,
    RolloutMesh,
    UserError,
    to_dict,
)
from lm.files import load
from lm.model.attention import attention_mask
from lm.model.flops import forward_flops_per_token
from lm.overrides import override
from lm.plan.advise import largest_batch, plan_stage, ways_to_fit
from lm.plan.analytic import estimate, model_flops, repeated_bytes
from lm.plan.chips import parse_topology
from lm.plan.program import resolve
from lm.plan.search import factors, layouts
from tests.plan.plan_helpers import experiment

SMALL = parse_topology("v5e:2x2")
OBJECTIVES = {
    "pretrain": Pretrain(),
    "sft": SFT(),
    "dpo": DPO(),
    "dpo_cached": DPO(reference="cached"),
    "dpo_mixed": DPO(losses=("sigmoid", "aot", "sft"), weighting=True),
    "cpo": CPO(),
    "orpo": ORPO(),
    "kto": KTO(),
    "grpo": GRPO(max_new_tokens=64, group_size=4, kl_coef=0.1),
    "distill": Distill(teacher_prompt="{prompt} {answer}", max_new_tokens=64),
    "reward_model": RewardModel(),
    "ppo": PPO(reward_models=("reward",), max_new_tokens=64),
    "ppo_head": PPO(verifier="answer", max_new_tokens=64, critic="head"),
}


@functools.cache  # several tests compare with the plan of the same experiment
def plan(value, topology=SMALL):
    return plan_stage(value, "train", topology)


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("quickstart", "text_file")), "tiny"]
)
def test_every_experiment_has_a_plan_for_every_stage(name):
    value = load(name)
    for stage in value.stages:
        found = plan_stage(value, stage.name, SMALL)
        assert found.fits and found.step_s >= found.bound_s > 0


@pytest.mark.slow
def test_the_state_is_counted_to_the_byte():
    """Parameters and both moments, over fsdp; whoever reads a reference has a third copy of the parameters."""
    value = experiment()
    program = resolve(value, value.stages[0], SMALL)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(program.parameters()))
    memory = estimate(program).memory
    vectors = 2 * 2 * 256 + 256 + 2 * 2 * 128  # of norms, which every device has whole
    assert memory.parameters == 4 * ((numbers - vectors) // 4 + vectors)
    assert memory.optimizer == pytest.approx(2 * memory.parameters, abs=64)
    narrow = plan(experiment(model={"param_dtype": "bfloat16"})).memory
    assert narrow.parameters == memory.parameters / 2
    assert narrow.optimizer == pytest.approx(3 * memory.parameters, abs=64)  # float32 master weights beside the moments
    assert memory.reference == 0 and narrow.casts == 0  # nothing is cast
    assert memory.casts == 2 * ((numbers - 1024 * 256 - vectors) // 4)  # the layers' matrices in bfloat16
    assert plan(experiment(model={"compute_dtype": "float32"})).memory.casts == 0
    assert plan(experiment(DPO())).memory.reference == memory.parameters
    assert plan(experiment(DPO(reference="cached"))).memory.reference == 0


@pytest.mark.slow
def test_a_stage_counts_the_factors_of_earlier_stages():
    value = experiment()
    first = dataclasses.replace(value.stages[0], lora=LoRA(rank=4, base="nf4"))
    later = dataclasses.replace(first, name="later", lora=LoRA(rank=8, base="nf4"))
    chain = dataclasses.replace(value, stages=(first, later))
    once, twice = (plan_stage(chain, name, SMALL).memory for name in ("train", "later"))
    alone = plan_stage(dataclasses.replace(value, stages=(later,)), "later", SMALL).memory
    assert twice.parameters - alone.parameters == alone.parameters - once.parameters
    assert twice.parameters - alone.parameters == pytest.approx(once.optimizer / 2, abs=64)
    assert twice.optimizer == alone.optimizer


@pytest.mark.slow
@pytest.mark.parametrize("base", ["model", "nf4"])
def test_policy_and_critic_with_adapters_have_one_base(base):
    """Beside what GRPO has, PPO has the critic's factors and head; with a reward model that model's base, once."""

    def parts(objective):
        value = experiment(objective)
        stage = dataclasses.replace(value.stages[0], lora=LoRA(rank=4, base=base))
        program = resolve(dataclasses.replace(value, stages=(stage,)), stage, SMALL)
        return estimate(program).memory, repeated_bytes(program)

    policy, none = parts(OBJECTIVES["grpo"])
    shared, repeated = parts(PPO(verifier="answer", max_new_tokens=64))
    judged, again = parts(OBJECTIVES["ppo"])
    factors = (policy.optimizer + 8) // 2  # two moments of each factor
    assert none == 0 and shared.reference == 0 and repeated > 0
    assert 0 < shared.parameters - policy.parameters - factors < 2048  # the head
    assert policy.parameters - factors <= repeated <= policy.parameters
    whole = estimate(resolve(experiment(), experiment().stages[0], SMALL)).memory.parameters
    assert judged.parameters + judged.reference - shared.parameters == pytest.approx(whole, abs=2048)
    assert again == pytest.approx(whole, abs=2048)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_planned(name):
    found = plan(experiment(OBJECTIVES[name]))
    described = found.to_json()
    assert described["fits"] and 0 < described["mfu"] < 1 and described["step_ms"] >= described["bound_ms"] > 0
    assert (described["sampler"] is not None) == (name in ("grpo", "distill", "ppo", "ppo_head"))
    of_pairs = dict.fromkeys(("dpo", "dpo_cached", "dpo_mixed", "cpo", "orpo", "reward_model"), 32)
    rows = {**of_pairs, "grpo": 64}.get(name, 16)
    others = {"dpo": 1, "dpo_mixed": 1, "grpo": 1, "distill": 1, "kto": 3}.get(name, 0)
    policies, scorers = {"reward_model": (0, 1), "ppo": (1, 1)}.get(name, (1, 0))
    whole, body = (forward_flops_per_token(found.program.model, size, 256) for size in (1024, 0))
    per_token = (3 * policies + others) * whole + 3 * scorers * body
    assert model_flops(found.program) == pytest.approx(per_token * rows * 256 / 4)


@pytest.mark.slow
def test_a_larger_teacher_is_counted(tmp_path):
    """Its parameters in the state, its forward pass in the FLOPs."""
    small = experiment(Distill(teacher_prompt="{prompt} {answer}", max_new_tokens=64))
    large = dataclasses.replace(small, model=dataclasses.replace(small.model, num_layers=2 * small.model.num_layers))
    (tmp_path / "experiment.json").write_text(json.dumps(to_dict(large)))
    told = experiment(Distill(teacher=f"{tmp_path}:train", max_new_tokens=64))
    found, before, whole = plan(told), plan(small), plan(large)
    assert found.memory.reference == whole.memory.reference > before.memory.reference
    sizes = [forward_flops_per_token(one.model, 1024, 256) for one in (small, large)]
    assert model_flops(found.program) == pytest.approx(
        model_flops(before.program) * (3 * sizes[0] + sizes[1]) / (4 * sizes[0])
    )


@functools.cache
def kernel_flops(*windows):
    """FLOPs of the attention kernel with a layer of each window."""
    model = {"pattern": tuple(map(Layer, windows)), "attention_blocks": (128,) * 4, "max_len": 512}
    value = experiment(model=model, seq_len=512)
    return estimate(resolve(value, value.stages[0], SMALL)).kernel_flops


@pytest.mark.parametrize("window", [1, 2, 128, 129, 130, 300, 512, 4096])
def test_a_kernel_with_a_window_is_counted_by_the_blocks_that_it_shows(window):
    """Of a pattern each layer by its own; a block of which the window shows one pair is computed whole."""
    places = jnp.arange(512)[None]

    def shown(window):
        mask = attention_mask(places, places, places * 0, places * 0, window)[0]
        return int(mask.reshape(4, 128, 4, 128).any((1, 3)).sum())

    assert kernel_flops(window, 0) / kernel_flops(0, 0) == pytest.approx((shown(window) + shown(0)) / (2 * shown(0)))


def test_products_as_executed_are_those_of_the_model_and_of_what_is_recomputed():
    """Without attention, which is a kernel: three passes, and with full rematerialisation a fourth of the blocks."""
    value = experiment()
    none, full = (estimate(resolve(v, v.stages[0], SMALL)) for v in (with_remat(value, "none"), value))
    m, tokens = value.model, 16 * 256 / 4
    weights = m.embed_dim * (2 * m.num_heads * m.head_dim + 2 * m.num_kv_heads * m.head_dim + 3 * m.mlp_dim)
    blocks, head = 2 * tokens * m.num_layers * weights, 2 * tokens * m.embed_dim * 1024
    # Rope turns queries and keys by a product with a matrix that has no gradient.
    turns = 2 * tokens * m.num_layers * (m.num_heads + m.num_kv_heads) * m.head_dim**2
    assert none.product_flops == pytest.approx(3 * (blocks + head) + 2 * turns, rel=0.01)
    # The last product of a block, down, is not computed again: nothing reads it.
    again = blocks + turns - 2 * tokens * m.num_layers * m.embed_dim * m.mlp_dim
    assert full.product_flops == pytest.approx(none.product_flops + again, rel=0.01)
    assert full.memory.activations < none.memory.activations


def with_remat(value, policy):
    return dataclasses.replace(value, model=dataclasses.replace(value.model, remat=policy))


@pytest.mark.slow
def test_every_rematerialisation_policy_keeps_something_between_all_and_the_blocks_input():
    policies = typing.get_args(typing.get_type_hints(Model)["remat"])
    value = experiment(rows=64)
    plans = {policy: plan(with_remat(value, policy)) for policy in policies}
    kept = {policy: found.memory.activations for policy, found in plans.items()}
    inputs = value.model.num_layers * 64 / 4 * 256 * value.model.embed_dim * 2
    assert kept["full"] == pytest.approx(inputs, rel=0.05)
    assert kept["full"] < kept["minimal"] < kept["dots"]
    assert kept["offload"] == kept["full"]  # the rest is in the host's memory, and has to come and go
    assert plans["offload"].parts_s["host"] > 0 and plans["minimal"].parts_s["host"] == 0


def test_axes_that_split_rows_split_activations_and_those_that_split_parameters_the_state():
    one = plan(experiment(mesh={"data": 4, "fsdp": 1}))
    four = plan(experiment(mesh={"data": 1, "fsdp": 4}))
    assert four.memory.activations == one.memory.activations
    assert one.memory.parameters > 3.9 * four.memory.parameters
    assert {item["what"] for item in one.collectives} == {"gradients"}
    tensor = plan(experiment(mesh={"data": 1, "fsdp": 2, "tensor": 2}))
    assert {"tensor", "fsdp"} == {axis for item in tensor.collectives for axis in item["axes"]}


@pytest.mark.slow
def test_a_second_slice_sends_each_devices_part_of_the_gradients_over_the_network():
    one, two = plan(experiment()), plan(experiment(rows=32), parse_topology("v5e:2x2", slices=2))
    across = [item for item in two.collectives if item["axes"] == ("slices",)]
    parameters = one.memory.parameters / 2  # sent in bfloat16
    assert sum(item["bytes"] for item in across) == pytest.approx(parameters, rel=0.01)
    assert two.step_s > one.step_s and two.memory.total == one.memory.total


@pytest.mark.slow
def test_the_sampler_reads_its_cache_and_the_parameters_for_every_token():
    short, long = (plan(experiment(GRPO(max_new_tokens=n, group_size=8), seq_len=256)).sampling for n in (64, 192))
    m = experiment().model
    token = 2 * m.num_layers * m.num_kv_heads * m.head_dim * 2  # bytes of its keys and values
    assert short.rows == 32 and short.cache_bytes == token * (4 * 192 + 32 * 64)  # each prompt once for its group
    assert short.peak_bytes > short.cache_bytes
    assert short.token_s >= short.cache_s == (4 * 192 + 32 * 32) * token / SMALL.chip.hbm_rate  # half the answer
    assert long.rollout_s > short.rollout_s


def test_a_layout_of_its_own_gathers_no_weights_for_a_token():
    grpo, rows = GRPO(max_new_tokens=64, group_size=8), {"rows": 16, "seq_len": 256}
    trained, own = (plan(experiment(grpo, **rows, rollout=n)).sampling for n in (0, 2))
    weights = 2 * sum(
        x.size for x in jax.tree.leaves(resolve(experiment(grpo), experiment(grpo).stages[0], SMALL).parameters())
    )
    assert trained.reshard_s == 0 < own.reshard_s
    assert own.weights_s == pytest.approx(trained.weights_s / 2, rel=0.01)
    assert trained.weights_s == pytest.approx(weights / SMALL.chip.hbm_rate, rel=0.01)
    assert own.rows == trained.rows and own.cache_bytes == trained.cache_bytes  # half the heads of twice the rows
    assert own.collectives_s < 0.1 * trained.collectives_s
    assert own.token_s >= max(own.roofline.values())


def test_the_trainers_pass_over_a_rollout_is_counted():
    """Log-probabilities of all that was sampled, as many rows as several updates have: a forward pass of each."""
    one, four = (
        plan(experiment(GRPO(max_new_tokens=64, group_size=4, updates_per_rollout=n), rows=16)) for n in (1, 4)
    )
    assert one.sampling.trainer_s == pytest.approx(four.sampling.trainer_s, rel=0.25)
    assert 0.1 < one.sampling.trainer_s / one.update_s < 0.5
    assert one.step_s == pytest.approx(one.update_s + one.sampling.rollout_s + one.sampling.trainer_s)
    assert four.step_s == pytest.approx(4 * four.update_s + four.sampling.rollout_s + four.sampling.trainer_s)
    assert one.bytes >= one.memory.state + one.sampling.trainer_bytes


@pytest.mark.slow
def test_microbatches_gather_the_tables_once_and_keep_them():
    """Of the policy and of the reference, whose layers are cast once, too."""
    wide = {"vocab_size": 8192, "rows": 64}
    once, pieces = (plan(experiment(GRPO(max_new_tokens=64, kl_coef=0.1), microbatches=n, **wide)) for n in (1, 4))
    tables = 2 * 8192 * 256 * 2  # bytes when gathered
    assert pieces.memory.gathered >= tables
    assert pieces.memory.casts == 2 * once.memory.casts
    gathered = [plan.collectives[0]["bytes"] for plan in (once, pieces)]
    blocks = gathered[0] - tables
    assert gathered[1] == pytest.approx(tables + 4 * blocks, rel=0.01)


def test_no_logits_are_made_of_prompts():
    values = [experiment(GRPO(max_new_tokens=n), vocab_size=4096) for n in (32, 128)]
    short, long = (estimate(resolve(v, v.stages[0], SMALL)).product_flops for v in values)
    completions = 16 * 8 / 4  # of a device
    assert long - short == pytest.approx(3 * 2 * completions * (128 - 32) * 256 * 4096, rel=0.01)


def test_rows_that_a_mesh_splits_need_as_much_as_shorter_ones():
    """A device has the same tokens: of each the same is kept, and as many logits are made at a time."""
    value = experiment(model={"max_len": 1024, "max_logits": 2**22}, seq_len=1024, vocab_size=32768, rows=4)
    split = dataclasses.replace(value, mesh=dataclasses.replace(value.mesh, context=4))
    whole, parts = plan(value).memory, plan(split).memory
    assert parts.logits == whole.logits > 0 and parts.total == pytest.approx(whole.total, rel=0.02)


@pytest.mark.slow
def test_what_does_not_fit_gets_changes_that_do():
    value = override(experiment(rows=4 * 1024, vocab_size=32768), ["--model.remat", "none", "--model.num_layers", "24"])
    found = plan(value)
    assert not found.fits
    changes = ways_to_fit(found, value, largest_batch(found, value))
    assert changes and all(change.plan.fits for change in changes)
    assert [change.rank for change in changes] == sorted(change.rank for change in changes)
    words = {" ".join(change.words) for change in changes}
    assert "--model.remat full" in words
    for change in changes[:3]:  # typed as they stand, they do what they say
        if change.words[0] != "--topology":
            assert plan(override(value, list(change.words))).bytes == change.plan.bytes


@pytest.mark.slow
def test_the_largest_batch_fits_and_not_much_more_does():
    value = experiment(vocab_size=32768)
    most = largest_batch(plan(value), value)
    assert most % 4 == 0
    assert plan(override(value, ["--train.batch_size", str(most)])).fits
    more = 4 * round(most * 1.04 / 4) + 4
    assert more >= 4 * 4096 or not plan(override(value, ["--train.batch_size", str(more)])).fits


def test_every_layout_is_tried_and_the_fastest_that_fits_is_first():
    found = layouts(experiment(), "train", SMALL)
    meshes = [tuple(p.program.sizes[axis] for axis in ("data", "fsdp", "context", "tensor")) for p in found]
    # Two key heads are not split by four.
    assert sorted(meshes) == [sizes for sizes in factors(4, 4) if sizes[3] < 4]
    assert [p.step_s for p in found] == sorted(p.step_s for p in found)


def test_a_mesh_that_does_not_fit_the_topology_is_refused():
    with pytest.raises(UserError, match="uses 2 of the 4 devices"):
        plan(experiment(mesh={"data": 1, "fsdp": 2}))
    with pytest.raises(UserError, match="train: 6 rows in a microbatch"):
        plan(experiment(rows=6))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "reward_model"])
def test_the_largest_batch_of_pairs_may_part_them_over_devices(name):
    value = experiment(OBJECTIVES[name])
    assert largest_batch(plan(value), value) >= 16


@pytest.mark.parametrize("alone", [0, 2])
def test_a_step_with_a_sampler_of_its_own_takes_the_slower_of_the_two(alone):
    value = experiment(GRPO(max_new_tokens=64, group_size=4, max_staleness=1), rows=16)
    value = dataclasses.replace(value, rollout_mesh=RolloutMesh(devices=alone))
    found = plan(value)
    sampled, parts = found.sampling, found.to_json()
    trained = found.update_s + sampled.trainer_s
    rollout = sampled.rollout_s + sampled.check_s
    assert found.step_s == pytest.approx(max(trained, rollout) if alone else trained + rollout)
    assert found.program.devices == 4 - alone and found.program.sampler.devices == (alone or 4)
    assert parts["sampler"]["takes_turns"] == (not alone) and parts["sampler"]["max_staleness"] == 1
    today = plan(experiment(GRPO(max_new_tokens=64, group_size=4), rows=16))
    assert today.step_s == pytest.approx(today.update_s + today.sampling.rollout_s + today.sampling.trainer_s)
    assert found.bytes > (0 if alone else today.bytes)  # one more copy of what trains
