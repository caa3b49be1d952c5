"""Who is in a job, whose rows are whose, and what one process says to all."""

import textwrap

import pytest

from lm.experiment import UserError
from lm.parallel import distributed
from lm.parallel.distributed import (
    ProcessGroup,
    broadcast_from_main,
    find_process_group,
    gather,
    raise_on_all,
    run_on_main,
)
from tests import processes

CLUSTER = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")


@pytest.fixture(autouse=True)
def outside(monkeypatch):
    """No cluster around, whatever this machine is."""
    for name in (*distributed.VARIABLES, *CLUSTER):
        monkeypatch.delenv(name, raising=False)


def test_without_flags_variables_or_cluster_a_process_is_alone():
    assert find_process_group(None, None, None) is None
    assert find_process_group("10.0.0.2:8476", 1, 0) is None


def test_flags_come_before_variables(monkeypatch):
    for name, value in zip(distributed.VARIABLES, ("a:1", "4", "3"), strict=True):
        monkeypatch.setenv(name, value)
    assert find_process_group(None, None, None, 7.0) == ProcessGroup("a:1", 4, 3, 7.0)
    assert find_process_group("b:2", 8, 5) == ProcessGroup("b:2", 8, 5)


def test_a_cluster_gives_what_is_missing(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert find_process_group(None, None, None) is None
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "16")
    assert find_process_group(None, None, None) == ProcessGroup()
    assert find_process_group("a:1", None, None) == ProcessGroup("a:1")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("a:1", None, None), r"--num-processes \(JAX_NUM_PROCESSES\) and --process-id \(JAX_PROCESS_ID\) missing"),
        (("a", 2, 0), "--coordinator is 'a'; it should be HOST:PORT"),
        ((":1", 2, 0), "--coordinator is ':1'; it should be HOST:PORT"),
        (("a:1", 2, 2), "--process-id is 2; with --num-processes 2 it should be from 0 to 1"),
    ],
)
def test_half_a_job_is_refused(flags, message):
    with pytest.raises(UserError, match=message):
        find_process_group(*flags)


def test_a_variable_that_is_no_number_is_named(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES is 'two'"):
        find_process_group("a:1", None, 0)


def test_one_process_agrees_with_itself():
    assert (
        gather({"a": 1}) == [{"a": 1}]
        and raise_on_all(lambda: 3) == run_on_main(lambda: 3) == broadcast_from_main(lambda: 3) == 3
    )


# Each process makes its own rows only; what comes together is the whole, and every row is made where it is needed.
ROWS = """
    import numpy as np
    from lm.experiment import Mesh, UserError
    from lm.parallel.distributed import broadcast_from_main, fetch, find_process_group, gather, run_on_main, joined, own_rows, to_devices, raise_on_all

    with joined(find_process_group(None, None, None)):
        import jax
        from lm.parallel.mesh import make_mesh
        from lm.parallel.rules import batch_sharding

        count, number, whole = jax.process_count(), jax.process_index(), np.arange(24, dtype=np.int32).reshape(8, 3)
        for sizes, parts in (({"data": 4}, 4), ({"data": 2, "fsdp": 2}, 4), ({"data": 2, "tensor": 2}, 2), ({"data": 1, "tensor": 4}, 1)):
            place = batch_sharding(make_mesh(Mesh(**sizes)))
            rows = own_rows(place, 8)
            assert len(rows) == 8 // min(parts, count), (sizes, rows)
            array = to_devices({"x": whole[rows]}, place, rows, 8)["x"]
            assert (fetch(array) == whole).all() and (fetch(to_devices(whole, place, None, 8)) == whole).all()
            assert sorted({row for part in gather(rows.tolist()) for row in part}) == list(range(8))

        def fail():
            if number == 1:
                raise UserError("no disk")

        assert gather("x" * number) == ["x" * i for i in range(count)]
        assert broadcast_from_main(lambda: {"of": number}) == {"of": 0}
        try:
            raise_on_all(fail)
        except UserError as error:
            assert str(error) == ("no disk" if number == 1 else "process 1: no disk"), error
        else:
            raise AssertionError("nobody said it")
        assert run_on_main(lambda: 5) == (5 if number == 0 else None)
"""


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_hold_their_rows_and_speak_to_each_other(tmp_path, count):
    processes.run(tmp_path, count, "-c", textwrap.dedent(ROWS))


# An error in one process only: it goes with its own code, and the others do not wait for it.
ALONE = """
    import time
    from lm.experiment import UserError
    from lm.parallel.distributed import find_process_group, gather, joined

    with joined(find_process_group(None, None, None)):
        import jax
        gather(None)  # as in a run; processes that have never spoken wait half a minute for each other
        if jax.process_index() == 1:
            raise UserError("the disk is full")
        gather(None)
"""


@pytest.mark.slow
def test_a_process_that_fails_alone_goes_alone_and_the_others_end(tmp_path):
    with processes.start(tmp_path, 2, "-c", textwrap.dedent(ALONE)) as found:
        codes = found.wait()
    assert codes[1] == 2 and codes[0] != 0
    assert "the disk is full" in found.said(1)
