"""lm/objectives/importance.py: ratio levels, the sampler's correction against golden numbers, and the two masks by hand."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from objective_checks import DTYPES, assert_close, golden_cases, precision

from lm.experiment import GRPO
from lm.objectives.importance import RATIO_LEVELS, off_policy_mask, sampler_correction, top_entropy_mask

MASK = jnp.asarray([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden_sampler_corrections(golden, dtype):
    checked = set()
    for case in golden_cases(golden, "grpo_advantages", dtype):
        p, x = case.params, case.inputs
        if "importance_sampling_ratio" not in case.outputs:
            continue
        level, mode = p["vllm_importance_sampling_mode"].split("_")
        low, high = p.get("vllm_importance_sampling_clip_min") or 0.0, p["vllm_importance_sampling_clip_max"]
        o = GRPO(tis_level=level, tis_mode=mode, tis_low=low, tis_clip=high)
        with precision(dtype) as tolerance:
            logps = (jnp.asarray(x[name]) for name in ("old_logps", "sampling_logps"))
            ours = sampler_correction(*logps, jnp.asarray(x["completion_mask_raw"], dtype), o)
            expected = np.broadcast_to(case.outputs["importance_sampling_ratio"], ours.shape)
            assert_close(ours, expected, tolerance, f"{case.name} correction")
            checked.add((level, mode))
    assert len(checked) == 4


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_a_sampler_that_agrees_needs_no_correction(level, mode):
    logp = jnp.asarray([[-1.0, -2.0, -0.5], [-3.0, -0.1, 7.0]])
    o = GRPO(tis_level=level, tis_mode=mode, tis_clip=2.0)
    np.testing.assert_array_equal(sampler_correction(logp, logp, MASK, o), 1)


def test_ratio_levels_by_hand():
    log_ratio = jnp.asarray([[0.3, -0.6, 0.9], [0.2, 0.4, 0.0]])
    found = {level: np.exp(np.asarray(ratio(log_ratio, MASK))[:, 0]) for level, ratio in RATIO_LEVELS.items()}
    np.testing.assert_allclose(found["token"], np.exp([0.3, 0.2]), rtol=1e-6)
    np.testing.assert_allclose(found["sequence"], np.exp([0.2, 0.3]), rtol=1e-6)
    np.testing.assert_allclose(found["product"], np.exp([0.6, 0.6]), rtol=1e-6)


def test_completions_far_from_the_sampler_are_dropped_where_their_advantage_is_negative():
    logp = jnp.asarray([[-2.0, -2.0, -2.0]] * 4)
    drift = jnp.asarray([[0.5, 0.5, 9.0], [0.5, 0.5, 9.0], [0.1, 0.1, 9.0], [-5.0, 0.1, 9.0]])
    mask = jnp.asarray([[1.0, 1.0, 0.0]] * 4)
    advantages = jnp.asarray([[-1.0], [1.0], [-1.0], [-1.0]]) * mask
    kept = off_policy_mask(logp, logp + drift, advantages, mask, 0.2)
    np.testing.assert_array_equal(kept[:, 0], [0, 1, 1, 1])


def test_the_tokens_of_highest_entropy_are_kept():
    entropy = jnp.asarray([[0.1, 3.0, 0.2], [2.0, 1.0, 99.0]])
    np.testing.assert_array_equal(top_entropy_mask(entropy, MASK, 0.4), [[0, 1, 0], [1, 0, 0]])
    np.testing.assert_array_equal(top_entropy_mask(entropy, MASK, 1.0), MASK)
