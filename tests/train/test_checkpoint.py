"""Checkpoints come back bit for bit, whatever happened while they were written or since."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lm.experiment import UserError
from lm.stored import sealed, unsealed
from lm.train.checkpoint import MANIFEST, Checkpoints
from lm.train.named_arrays import named_leaves

ROOT = Path(__file__).resolve().parents[2]

nnx.set_graph_mode(False)
nnx.set_graph_updates(False)
nnx.use_eager_sharding(False)


class Block(nnx.Module):
    def __init__(self, key):
        self.q = nnx.Param(jax.random.normal(key, (16, 8)), out_sharding=("embed", "heads"))


class Model(nnx.Module):
    def __init__(self, key):
        self.embed = nnx.Param(jax.random.normal(key, (32, 16)).astype(jnp.bfloat16))
        self.block = Block(key)


def mesh_of(size: int) -> Mesh:
    return jax.make_mesh((size,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:size])


def state_of(seed: int) -> dict:
    model = Model(jax.random.key(seed))
    return {"policy": model, "opt_state": optax.adam(1e-3).init(model)}


def abstract(tree, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def assert_same_bits(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save_two(folder) -> list[dict]:
    states = [state_of(1), state_of(2)]
    with Checkpoints(folder) as checkpoints:
        for step, state in zip((10, 20), states, strict=True):
            checkpoints.save(step, state, {"step": step})
    return states


def test_module_and_optimizer_come_back_bit_for_bit_with_meta(tmp_path):
    state = state_of(0)
    with Checkpoints(tmp_path) as checkpoints:
        meta = {"seconds": 1.5, "counts": {10: (1, 2), 9: None}}
        checkpoints.save(7, state, meta)
        meta.clear()
        found = checkpoints.restore(abstract(state))
    assert (found.step, found.meta) == (7, {"seconds": 1.5, "counts": {"10": [1, 2], "9": None}})
    assert_same_bits(found.items, state)
    assert isinstance(found.items["policy"].block.q, nnx.Param)


def test_every_bit_pattern_and_scalars_survive(tmp_path):
    bits = jnp.arange(1 << 16, dtype=jnp.uint16)
    tree = {
        "bfloat16": jax.lax.bitcast_convert_type(bits, jnp.bfloat16),
        "float32": jnp.array([0.1, -0.0, jnp.inf, jnp.nan, 1e-45], jnp.float32),
        "int32": jnp.array([[-(2**31), 2**31 - 1]], jnp.int32),
        "scalars": [jnp.int32(3), jnp.float32(0.3), np.float32(0.7)],
    }
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, {"x": tree}, {})
        assert_same_bits(checkpoints.restore({"x": abstract(tree)}).items["x"], tree)


def test_an_item_without_arrays_comes_back(tmp_path):
    state = {"policy": {"w": jnp.ones(3)}, "opt_state": optax.sgd(0.1).init({"w": jnp.ones(3)})}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        assert_same_bits(checkpoints.restore(abstract(state)).items, state)


def test_names_are_paths_without_the_value_of_a_parameter():
    state = state_of(0)
    assert list(named_leaves(state["policy"])) == ["block/q", "embed"]
    assert "0/mu/block/q" in named_leaves(state["opt_state"])


@pytest.mark.slow
def test_donating_after_save_cannot_change_what_is_saved(tmp_path):
    sharded = NamedSharding(mesh_of(8), PartitionSpec("fsdp"))
    replicated = NamedSharding(mesh_of(8), PartitionSpec())
    state = {
        "sharded": jax.device_put(jax.random.normal(jax.random.key(0), (8, 1 << 18)), sharded),
        "replicated": jax.device_put(jax.random.normal(jax.random.key(1), (1 << 19,)), replicated),
        "one": jax.random.normal(jax.random.key(2), (1 << 18,)),
        "small": jax.device_put(jnp.int32(5), replicated),
    }
    # On CPU orbax reads the arrays in place, and donation reuses a buffer that nobody holds.
    wanted = jax.tree.map(lambda x: np.array(x, copy=True), state)
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + jnp.ones_like(x), tree), donate_argnums=0)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"policy": state}, {})
        for _ in range(100):
            state = step(state)
        jax.block_until_ready(state)
        assert_same_bits(checkpoints.restore({"policy": shapes}).items["policy"], wanted)
    assert int(state["small"]) == 105


@pytest.mark.parametrize("size", [1, 2, 8])
def test_restores_on_another_number_of_devices(tmp_path, size):
    saved_on = NamedSharding(mesh_of(4), PartitionSpec("fsdp"))
    wanted = {"w": jax.device_put(jax.random.normal(jax.random.key(0), (16, 6)), saved_on)}
    sharding = NamedSharding(mesh_of(size), PartitionSpec("fsdp"))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"policy": wanted}, {})
        found = checkpoints.restore({"policy": abstract(wanted, sharding)}).items["policy"]
    assert found["w"].sharding == sharding
    assert_same_bits(found, wanted)


def test_parameters_alone_can_be_restored(tmp_path):
    state = save_two(tmp_path)[1]
    found = Checkpoints(tmp_path).restore({"policy": abstract(state["policy"])})
    assert list(found.items) == ["policy"]
    assert_same_bits(found.items["policy"], state["policy"])


def test_keeps_the_newest_and_counts_them(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, {"policy": {"w": jnp.full(3, step)}}, {})
        checkpoints.wait()
        assert checkpoints.steps() == [3, 4]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000003", "00000004"]


def test_no_checkpoint_is_none(tmp_path):
    assert Checkpoints(tmp_path / "nowhere").restore({"policy": {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}}) is None


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_a_bit(checkpoint):
    file = largest_file(checkpoint)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def flip_a_bit_of_meta(checkpoint):
    manifest = checkpoint / MANIFEST
    manifest.write_text(manifest.read_text().replace('"step": 20', '"step": 21'))


def lose_a_file(checkpoint):
    largest_file(checkpoint).unlink()


def cut_a_file(checkpoint):
    os.truncate(largest_file(checkpoint), 10)


def cut_the_manifest(checkpoint):
    os.truncate(checkpoint / MANIFEST, 40)


def lose_the_manifest(checkpoint):
    (checkpoint / MANIFEST).unlink()


DAMAGES = [flip_a_bit, flip_a_bit_of_meta, lose_a_file, cut_a_file, cut_the_manifest, lose_the_manifest]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_unfinished_checkpoint_is_told_and_passed_over(tmp_path, damage):
    older, newer = save_two(tmp_path)
    damage(tmp_path / "00000020")
    told: list[str] = []
    with Checkpoints(tmp_path) as checkpoints:
        found = checkpoints.restore(abstract(older), told.append)
        assert found.step == 10
        assert_same_bits(found.items, older)
        assert len(told) == 1 and "00000020" in told[0] and "\n" not in told[0]
        # The run goes on from 10 and comes to 20 again: the damaged one is replaced.
        checkpoints.save(20, newer, {})
        again = checkpoints.restore(abstract(newer), told.append)
    assert again.step == 20 and len(told) == 1
    assert_same_bits(again.items, newer)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_command_that_reads_a_model_does_not_take_an_older_one_for_a_damaged_one(tmp_path, damage):
    older, _ = save_two(tmp_path)
    damage(tmp_path / "00000020")
    if damage is lose_the_manifest:  # as a kill during the save leaves it
        assert Checkpoints(tmp_path).restore(abstract(older), skip=False).step == 10
        return
    with pytest.raises(
        UserError, match=r"00000020.*: this is the newest checkpoint: put back a copy of it, or remove .*00000020"
    ):
        Checkpoints(tmp_path).restore(abstract(older), skip=False)


def test_a_damaged_checkpoint_ahead_of_the_run_does_not_crowd_out_sound_ones(tmp_path):
    state = save_two(tmp_path)[0]
    flip_a_bit(tmp_path / "00000020")
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.restore(abstract(state), lambda _: None).step == 10
        checkpoints.save(15, state, {})
    assert Checkpoints(tmp_path).steps() == [10, 15]


def forged(folder: Path, change) -> dict:
    """A folder's checkpoint of step 1 with a manifest of another program under a right seal; returns its items."""
    items = {"policy": {"base": np.arange(3.0), "w": np.arange(4.0)}}
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, items, {"tokens": 7}, {"policy/base"})
    file = folder / "00000001" / MANIFEST
    content = unsealed(json.loads(file.read_bytes()))
    file.write_text(json.dumps(sealed(change(content))))
    return items


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: {name: m[name] for name in m if name != "step"}, "its step cannot be read"),
        (lambda m: {name: m[name] for name in m if name != "meta"}, "its meta cannot be read"),
        (lambda m: m | {"step": 2}, "is that of step 2"),
        (lambda m: m | {"meta": {"tokens": "7"}}, "its meta.tokens cannot be read"),
        (lambda m: m | {"meta": {"ahead": {"x": "step"}}}, "its meta.ahead cannot be read"),
        (lambda m: m | {"items": {"policy": 5}}, "its items.policy cannot be read"),
        (lambda m: m | {"untrained": 5}, "is not what .* was saved with"),
        (lambda m: {name: m[name] for name in m if name != "untrained"}, "have not the arrays that its manifest.json lists"),
        (lambda m: m | {"items": {"policy": m["items"]["policy"] | {"v": "float64[3]"}}}, "its 'v' has no place here"),
    ],
)  # fmt: skip
def test_a_manifest_of_another_program_is_one_line_whatever_its_seal(tmp_path, change, told):
    items = forged(tmp_path, change)
    with pytest.raises(UserError, match=told) as caught:
        Checkpoints(tmp_path).restore(items, only=1)
    assert "\n" not in str(caught.value)


def test_only_damaged_checkpoints_is_an_error_that_says_what_to_do(tmp_path):
    state = save_two(tmp_path)[0]
    flip_a_bit(tmp_path / "00000010")
    flip_a_bit(tmp_path / "00000020")
    told: list[str] = []
    with pytest.raises(UserError, match=r"10, 20.*damaged.*remove it"):
        Checkpoints(tmp_path).restore(abstract(state), told.append)
    assert len(told) == 2


def test_a_first_save_that_never_finished_is_no_checkpoint(tmp_path):
    (tmp_path / "00000010.orbax-checkpoint-tmp" / "policy").mkdir(parents=True)
    told: list[str] = []
    assert Checkpoints(tmp_path).restore({"policy": {}}, told.append) is None
    assert len(told) == 1 and "not finished" in told[0]


MISMATCHES = {
    "shape": ({"a": (2, 3), "b": (5,)}, r"b is float32\[4\], not float32\[5\]"),
    "missing": ({"a": (2, 3), "b": (4,), "bb": (1,)}, r"no 'bb'; the nearest name there is 'b'"),
    "left over": ({"a": (2, 3)}, r"'b' has no place"),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_another_model_is_refused_by_the_first_parameter_that_differs(tmp_path, case):
    shapes, message = MISMATCHES[case]
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"policy": {"a": jnp.ones((2, 3)), "b": jnp.ones(4)}}, {})
        wanted = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
        with pytest.raises(UserError, match=message):
            checkpoints.restore({"policy": wanted})


def test_what_is_no_checkpoint_in_the_folder_is_left_alone(tmp_path):
    (tmp_path / "notes").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"policy": {"a": jnp.ones(2)}}, {})
    assert (tmp_path / "notes").is_dir()


def test_another_dtype_or_item_is_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"policy": {"a": jnp.ones(2)}}, {})
        with pytest.raises(UserError, match=r"a is float32\[2\], not bfloat16\[2\]"):
            checkpoints.restore({"policy": {"a": jax.ShapeDtypeStruct((2,), jnp.bfloat16)}})
        with pytest.raises(UserError, match="no 'frozen'; it has policy"):
            checkpoints.restore({"frozen": {"a": jax.ShapeDtypeStruct((2,), jnp.float32)}})


def test_saving_a_step_twice_leaves_the_sound_one(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"policy": {"a": jnp.ones(2)}}, {"first": True})
        checkpoints.save(1, {"policy": {"a": jnp.ones(2)}}, {"first": False})
        assert checkpoints.restore({"policy": {"a": jax.ShapeDtypeStruct((2,), jnp.float32)}}).meta == {"first": True}


KILLED_SAVE = """
    import os, signal, sys, time
    import jax, jax.numpy as jnp
    import lm.train.checkpoint as checkpoint

    folder, moment = sys.argv[1:]
    checkpoints = checkpoint.Checkpoints(folder)
    checkpoints.save(1, {"policy": {"w": jnp.arange(1000.0)}}, {})
    checkpoints.wait()
    big = {"w": jax.block_until_ready(jax.random.normal(jax.random.key(0), (40, 1 << 20)))}
    if moment == "sealing":
        checkpoint.sealed = lambda content: os.kill(os.getpid(), signal.SIGKILL)
    checkpoints.save(2, {"policy": big}, {})
    if moment == "writing":
        os.kill(os.getpid(), signal.SIGKILL)
    checkpoints.wait()
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["writing", "sealing"])
def test_kill_in_the_middle_of_a_save_leaves_the_one_before(tmp_path, moment):
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED_SAVE), str(tmp_path), moment], cwd=ROOT, timeout=300
    )
    assert run.returncode == -signal.SIGKILL
    left = {"writing": "00000002.orbax-checkpoint-tmp", "sealing": "00000002"}[moment]
    assert (tmp_path / left).exists()
    told: list[str] = []
    with Checkpoints(tmp_path) as checkpoints:
        found = checkpoints.restore({"policy": {"w": jax.ShapeDtypeStruct((1000,), jnp.float32)}}, told.append)
        assert found.step == 1 and len(told) == 1
        assert_same_bits(found.items["policy"]["w"], jnp.arange(1000.0))
        checkpoints.save(2, found.items, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000001", "00000002"]


def save_where_it_does_not_fit(folder, size: int) -> None:
    small, big = {"w": jnp.arange(1000.0)}, {"w": jax.random.normal(jax.random.key(0), (size, 1 << 18))}
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, {"policy": small}, {})
    checkpoints.wait()
    with pytest.raises(UserError) as failure:
        checkpoints.save(2, {"policy": big, "opt_state": big}, {})
        checkpoints.wait()
    assert "00000002" in str(failure.value) and "\n" not in str(failure.value)
    assert os.strerror(28) in str(failure.value) or os.strerror(27) in str(failure.value)
    assert sorted(p.name for p in folder.iterdir() if p.name != "ballast") == ["00000001"]
    found = checkpoints.restore({"policy": abstract(small)}, pytest.fail)
    assert found.step == 1
    assert_same_bits(found.items["policy"], small)


def test_a_disk_that_fills_up_is_one_line_and_costs_nothing(small_disk, capfd):
    save_where_it_does_not_fit(small_disk, size=8)
    assert capfd.readouterr().err == ""


def test_a_full_disk_is_one_line_and_costs_nothing(small_disk, capfd):
    state = {"policy": {"w": jnp.arange(1000.0)}}
    checkpoints = Checkpoints(small_disk)
    checkpoints.save(1, state, {})
    checkpoints.wait()
    with pytest.raises(OSError), (small_disk / "ballast").open("wb") as ballast:
        ballast.write(bytes(8 << 20))
    with pytest.raises(UserError, match="No space left on device"):
        checkpoints.save(2, state, {})
        checkpoints.wait()
    assert checkpoints.steps() == [1]
    assert checkpoints.restore(abstract(state), pytest.fail).step == 1
    # Room again: the same process goes on saving.
    (small_disk / "ballast").unlink()
    checkpoints.save(2, state, {})
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2]
    checkpoints.close()  # a thread that still has a file open keeps the disk mounted
    assert capfd.readouterr().err == ""


LIMITED = """
    import resource, signal, sys
    from pathlib import Path
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    from tests.train.test_checkpoint import save_where_it_does_not_fit
    save_where_it_does_not_fit(Path(sys.argv[1]), size=8)
"""


@pytest.mark.slow
def test_a_refused_write_is_one_line_and_costs_nothing(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LIMITED), str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr


TWO_PROCESSES = """
    import sys
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec
    index, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    jax.distributed.initialize(f"localhost:{port}", 2, index)
    from lm.train.checkpoint import Checkpoints
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    rows = np.arange(32, dtype=np.float32).reshape(8, 4)
    array = jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])
    # One that every device has, so large that each writes a part of it.
    large = np.arange(2**20, dtype=np.float32).reshape(1024, 1024)
    everywhere = NamedSharding(mesh, PartitionSpec())
    base = jax.make_array_from_callback(large.shape, everywhere, lambda index: large[index])
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2, 3):
            items = {"policy": {"w": array * step, "base": base}}
            checkpoints.save(step, items, {"step": step}, untrained=["policy/base"])
        checkpoints.wait()
        wanted = jax.ShapeDtypeStruct(rows.shape, rows.dtype, sharding=sharding)
        whole = jax.ShapeDtypeStruct(large.shape, large.dtype, sharding=everywhere)
        found = checkpoints.restore({"policy": {"w": wanted, "base": whole}})
    assert found.step == 3 == found.meta["step"]
    for shard in found.items["policy"]["w"].addressable_shards:
        assert (np.asarray(shard.data) == 3 * rows[shard.index]).all()
    for shard in found.items["policy"]["base"].addressable_shards:
        assert (np.asarray(shard.data) == large).all()
    print("same")
"""


@pytest.mark.slow
def test_two_processes_save_and_agree_on_what_to_restore(tmp_path, unused_port):
    command = [sys.executable, "-c", textwrap.dedent(TWO_PROCESSES)]
    runs = [
        subprocess.Popen(
            [*command, str(index), str(unused_port), str(tmp_path)],
            cwd=ROOT,
            env={**os.environ, "JAX_NUM_CPU_DEVICES": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        results = [run.communicate(timeout=300) for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [out.split()[-1:] for out, _ in results] == [["same"], ["same"]], results
    # What two processes saved, one restores.
    wanted, whole = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 4), (1024, 1024)))
    found = Checkpoints(tmp_path).restore({"policy": {"w": wanted, "base": whole}})
    assert found.items["policy"]["w"][1, 0] == 12.0 and found.items["policy"]["base"][1, 0] == 1024.0
    assert json.loads((tmp_path / "00000003" / MANIFEST).read_text())["meta"] == {"step": 3}


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]
