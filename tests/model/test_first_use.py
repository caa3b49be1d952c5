"""Our attention kernel is held against plain attention before a kind of device is trusted with it; kernels interpreted."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.experiment import Layer, Model, UserError
from lm.model import attention
from lm.model.kernels import first_use, splash_kernels
from lm.model.kernels.cudnn import cudnn_attention
from lm.model.kernels.jax_splash import jax_splash
from lm.model.kernels.splash import splash
from lm.stored import cache_at

WIDE = Model(num_layers=1, embed_dim=64, num_heads=4, num_kv_heads=2, head_dim=128, mlp_dim=64, max_len=256)


def interpreted(q, k, v, segments, window, softcap):
    return splash(q, k, v, segments, (256,) * 4, window, softcap, interpret=True)


def beside(change):
    """The kernel with its result changed."""
    return lambda q, *rest: change(interpreted(q, *rest))


BROKEN = {
    "values": beside(lambda out: out * 1.05),
    "gradients": beside(lambda out: jax.lax.stop_gradient(out) + 0.9 * (out - jax.lax.stop_gradient(out))),
    "nan": beside(lambda out: out.at[0, 0, 7].set(jnp.nan)),
    "one key too many": lambda q, k, v, *rest: interpreted(q, jnp.roll(k, -1, 2), jnp.roll(v, -1, 2), *rest),
    "documents": lambda q, k, v, segments, *rest: interpreted(q, k, v, jnp.ones_like(segments), *rest),
    "window": lambda q, k, v, segments, window, softcap: interpreted(q, k, v, segments, 0, softcap),
    "soft cap": lambda q, k, v, segments, window, softcap: interpreted(q, k, v, segments, window, 0.0),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(first_use, "LENGTH", 512)
    for remembered in (first_use._remembered, first_use.say):
        remembered.cache_clear()


@pytest.mark.parametrize(
    "kernel", [pytest.param(interpreted, marks=pytest.mark.slow), lambda *given: jax_splash(*given, interpret=True)]
)
def test_a_right_kernel_agrees_also_where_something_is_traced(kernel):
    assert first_use.measured_problem(kernel, attention._plain) == ""
    found = []

    @jax.jit
    def traced(x):
        found.append(first_use.measured_problem(attention._plain, attention._plain))
        return x

    traced(1.0)
    assert found == [""]


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_kernel_does_not(name):
    assert first_use.measured_problem(BROKEN[name], attention._plain)


def by_xla(q, k, v, segments, window, softcap):
    return cudnn_attention(q, k, v, segments, window, implementation="xla")


@pytest.mark.slow
def test_the_layout_and_mask_given_to_cudnn_are_right():
    """cuDNN runs on GPUs only: here XLA computes what `jax.nn.dot_product_attention` is asked for."""
    assert first_use.measured_problem(by_xla, attention._plain, first_use.WITHOUT_SOFTCAP) == ""
    assert "window 200" in first_use.measured_problem(
        lambda q, k, v, segments, *rest: by_xla(q, k, v, segments, 0, 0.0), attention._plain, first_use.WITHOUT_SOFTCAP
    )


def test_a_kernel_that_does_not_compile_is_told():
    def fails(*given):
        raise NotImplementedError("no such operation")

    assert first_use.measured_problem(fails, attention._plain) == "it fails: NotImplementedError: no such operation"


def test_the_outcome_is_kept_with_kind_versions_and_source(tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr(first_use, "measured_problem", lambda *both: runs.append(both) or "wrong")
    with cache_at(tmp_path):
        for kind, runtime in (
            ("TPU v9", "libtpu 1"),
            ("TPU v9", "libtpu 1"),
            ("TPU v9", "libtpu 2"),
            ("TPU v8", "libtpu 2"),
        ):
            assert first_use._remembered(kind, runtime, interpreted, attention._plain, (splash_kernels,)) == "wrong"
            first_use._remembered.cache_clear()  # as another process
        assert len(runs) == 3
        files = sorted((tmp_path / "kernels").iterdir())
        assert len(files) == 3 and json.loads(files[0].read_text())["made_of"][1] == jax.__version__
        for file in files:
            file.write_text("{}"[:1])
        first_use._remembered("TPU v9", "libtpu 1", interpreted, attention._plain, (splash_kernels,))
        assert len(runs) == 4  # damaged: found anew
        monkeypatch.setattr(splash_kernels, "__file__", __file__)
        first_use._remembered.cache_clear()
        first_use._remembered("TPU v9", "libtpu 1", interpreted, attention._plain, (splash_kernels,))
        assert len(runs) == 5


@pytest.mark.parametrize("asked, problem, wanted, told", [
    ("auto", "", "splash", ""),
    ("auto", "its values are 1 of their size off", "jax", "jax's own kernel is used"),
    ("splash", "its values are 1 of their size off", "splash", "model.attention splash asks for it"),
])  # fmt: skip
def test_what_is_used_and_said(monkeypatch, capsys, asked, problem, wanted, told):
    """The kernels are marked by what they return."""
    q = np.zeros((1, 4, 256, 128), np.float32)
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    monkeypatch.setattr(attention, "kernel_problem", lambda *both: problem)
    monkeypatch.setattr(attention.splash, "splash", lambda *given, **how: "splash")
    monkeypatch.setattr(attention, "jax_splash", lambda *given: "jax")
    rows = np.zeros((1, 256), np.int32)
    for _ in range(2):
        config = dataclasses.replace(WIDE, attention=asked)
        of = attention.attention_of(config, Layer(), rows, rows + 1)
        assert of(q, q, q) == wanted
    said = capsys.readouterr().err
    assert len(said.splitlines()) == bool(problem) and told in said and problem in said


@pytest.mark.parametrize("problem, change, wanted", [
    ("", {}, "cudnn"),
    ("its dq are 1 of their size off", {}, "plain"),
    ("", {"compute_dtype": "float32"}, "plain"),
    ("", {"softcap": 30.0}, "plain"),
    ("", {"head_dim": 132}, "plain"),
])  # fmt: skip
def test_cudnn_is_used_where_it_is_right_and_fits(monkeypatch, capsys, problem, change, wanted):
    monkeypatch.setattr(attention, "platform", lambda: "gpu")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(attention, "kernel_problem", lambda *given: problem)
    monkeypatch.setattr(attention.cudnn, "cudnn_attention", lambda q, *given: q + 1)
    monkeypatch.setattr(attention, "attend", lambda q, *given: q)
    config = dataclasses.replace(WIDE, **{"compute_dtype": "bfloat16"} | change)
    rows, q = np.zeros((1, 256), np.int32), np.zeros((1, 4, 256, config.head_dim), np.float32)
    heads = attention.attention_of(config, config.layer(0), rows, rows + 1)(q, q, q)
    assert float(heads[0, 0, 0, 0]) == (wanted == "cudnn")
    assert ("plain attention is used" in capsys.readouterr().err) == bool(problem)


def test_cudnn_is_refused_on_other_devices():
    rows = np.zeros((1, 256), np.int32)
    with pytest.raises(UserError, match=r"model\.attention is cudnn, which needs an NVIDIA GPU, not a cpu"):
        attention.attention_of(dataclasses.replace(WIDE, attention="cudnn"), Layer(), rows, rows + 1)
