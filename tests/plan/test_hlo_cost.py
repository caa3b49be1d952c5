"""The cost of a compiled module, on a text small enough to count by hand, and against the other estimator."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lm.plan.chips import CHIPS
from lm.plan.compiled import save_text
from lm.plan.hlo_cost import HOST_RATE, KERNEL_EFFICIENCY, estimate
from lm.plan.hlo_text import array_bytes, parse

OTHER = Path(__file__).resolve().parents[3] / "shared" / "bench" / "hlo_cost.py"
CHIP = CHIPS["v5e"]

# A loop of three turns (an s32 counter from 0 by 1 below 3) around a fused product; a collective that stops everything,
# one that overlaps with a fusion, and one inside a fusion; a kernel; a copy to the host; something without a figure.
TEXT = """HloModule step, is_scheduled=true, num_partitions=8

%fused_product (p0: bf16[128,256], p1: bf16[256,512]) -> bf16[128,512] {
  %p0 = bf16[128,256]{1,0} parameter(0)
  %p1 = bf16[256,512]{1,0} parameter(1)
  ROOT %conv = bf16[128,512]{1,0} convolution(%p0, %p1), dim_labels=bf_io->bf
}

%fused_gather (p0: bf16[64,512]) -> bf16[512,512] {
  %p0 = bf16[64,512]{1,0} parameter(0)
  ROOT %inner-gather = bf16[512,512]{1,0} all-gather(%p0), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
}

%body (carry: (s32[], bf16[128,256])) -> (s32[], bf16[128,256]) {
  %carry = (s32[], bf16[128,256]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %x = bf16[128,256]{1,0} get-tuple-element(%carry), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %w = bf16[256,512]{1,0} constant({...})
  %product = bf16[128,512]{1,0} fusion(%x, %w), kind=kOutput, calls=%fused_product, backend_config={"estimated_cycles":"1500"}
  ROOT %out = (s32[], bf16[128,256]{1,0}) tuple(%next, %x)
}

%condition (carry: (s32[], bf16[128,256])) -> pred[] {
  %carry = (s32[], bf16[128,256]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %limit = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (a: bf16[128,256], q: bf16[2,1024,128], g: f32[1024,1024], part: f32[128,1024]) -> f32[1024,1024] {
  %a = bf16[128,256]{1,0} parameter(0)
  %q = bf16[2,1024,128]{2,1,0} parameter(1)
  %g = f32[1024,1024]{1,0} parameter(2)
  %part = f32[128,1024]{1,0} parameter(3)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[128,256]{1,0}) tuple(%zero, %a)
  %while = (s32[], bf16[128,256]{1,0}) while(%start), condition=%condition, body=%body
  %sum = f32[1024,1024]{1,0} all-reduce(%g), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %gather-start = (f32[128,1024]{1,0}, f32[1024,1024]{1,0}) all-gather-start(%part), channel_id=2, replica_groups=[1,8]<=[8], dimensions={0}
  %beside = f32[1024,1024]{1,0} fusion(%g), kind=kLoop, calls=%nothing, backend_config={"estimated_cycles":"3000"}
  %gathered = f32[1024,1024]{1,0} all-gather-done(%gather-start)
  %fused = bf16[512,512]{1,0} fusion(%a), kind=kLoop, calls=%fused_gather, backend_config={"estimated_cycles":"150"}
  %splash_mha_fwd.1 = bf16[2,1024,128]{2,1,0} custom-call(%q, %q, %q), custom_call_target="tpu_custom_call", backend_config={"m": "{\\"block_q\\": 512, \\"block_kv\\": 512}"}
  %unknown.2 = f32[8]{0} custom-call(%q), custom_call_target="tpu_custom_call"
  %away-start = (f32[1024,1024]{1,0:S(5)}, f32[1024,1024]{1,0}, u32[]) copy-start(%g)
  %away = f32[1024,1024]{1,0:S(5)} copy-done(%away-start)
  ROOT %copy = f32[1024,1024]{1,0} copy(%g)
}
"""
MIB4 = 4 * 2**20  # bytes of f32[1024,1024]
RING = CHIP.interconnect


@pytest.fixture(scope="module")
def cost():
    return estimate(parse(TEXT), CHIP)


def test_a_loop_counts_its_turns(cost):
    assert cost.trips == {"while": 3} and cost.unknown_loops == ()
    assert cost.product_flops == 3 * 2 * 128 * 256 * 512
    assert cost.product_s == pytest.approx(3 * 1500 / CHIP.clock)
    assert cost.compute_s == pytest.approx((3 * 1500 + 3000 + 150) / CHIP.clock)


def test_a_product_whose_cycles_are_no_figure_is_priced_by_its_operations():
    """libtpu 0.0.52 gave the largest integer for some products of a step with int8 weights."""
    cost = estimate(parse(TEXT.replace('"1500"', f'"{2**63 - 1}"')), CHIP)
    bytes_moved, flops = 2 * (128 * 512 + 128 * 256 + 256 * 512), 2 * 128 * 256 * 512
    product = max(bytes_moved / CHIP.hbm_rate, flops / CHIP.peak)
    assert cost.unpriced_s == pytest.approx(2 * MIB4 / CHIP.hbm_rate + 3 * product)
    assert cost.product_s == 0 and cost.compute_s == pytest.approx((3000 + 150) / CHIP.clock)


def test_collectives_are_bytes_on_a_ring(cost):
    assert cost.sync_s == pytest.approx(2 * MIB4 * 3 / 4 / RING)  # all-reduce in groups of four
    assert cost.async_s == pytest.approx((MIB4 + 512 * 512 * 2) * 7 / 8 / RING)
    found = {(x.kind, x.beside, x.devices): x.count for x in cost.collectives}
    assert found == {("all-reduce", False, 4): 1, ("all-gather", True, 8): 2}


def test_a_kernel_is_priced_by_the_blocks_that_it_runs(cost):
    flops = 4 * 2 * 1024 * 128 * 1024 * 3 / 4  # three of four blocks have a pair on or below the diagonal
    assert cost.kernel_flops == flops
    assert cost.kernel_s == pytest.approx(flops / (CHIP.peak * KERNEL_EFFICIENCY))
    assert cost.unpriced_kernels == ("unknown",)


def test_the_schedule_waits_for_what_is_under_way(cost):
    """The gather takes longer than the fusion beside it: what is left of it is waited for, and the copy away too."""
    beside, gather = 3000 / CHIP.clock, MIB4 * 7 / 8 / RING
    assert gather > beside
    copied, away = 2 * MIB4 / CHIP.hbm_rate, MIB4 / HOST_RATE
    assert cost.unpriced_s == pytest.approx(copied) and cost.host_s == pytest.approx(away)
    wanted = 3 * 1500 / CHIP.clock + cost.sync_s + gather + 150 / CHIP.clock + cost.kernel_s + away + copied
    assert cost.schedule_s == pytest.approx(wanted)
    assert cost.bound_s == pytest.approx(max(cost.device_s, cost.sync_s + cost.async_s, away))


def test_a_trip_count_that_cannot_be_read_is_named():
    cost = estimate(parse(TEXT.replace("%limit = s32[] constant(3)", "%limit = s32[] copy(%i)")), CHIP)
    assert cost.unknown_loops == ("while",)


def test_a_loop_of_unknown_length_has_the_iterations_that_it_is_given():
    module = parse(TEXT.replace("%limit = s32[] constant(3)", "%limit = s32[] copy(%i)"))
    one, ten = estimate(module, CHIP), estimate(module, CHIP, unknown=10)
    assert ten.product_flops == 10 * one.product_flops > 0


ROWS = """
%fused_rows (p0: bf16[64,1024,128], p1: s32[64], p2: bf16[64,128]) -> bf16[64,1024,128] {{
  %p0 = bf16[64,1024,128]{{2,1,0}} parameter(0)
  %p1 = s32[64]{{0}} parameter(1)
  %p2 = bf16[64,128]{{1,0}} parameter(2)
  ROOT %rows = {op}, metadata={{op_name="jit(f)/rows"}}
}}
"""
SCATTER = "bf16[64,1024,128]{2,1,0} scatter(%p0, %p1, %p2), to_apply=%add"
GATHER = "bf16[64,128]{1,0} gather(%p0, %p1), slice_sizes={1,1,128}"


@pytest.mark.parametrize(
    ("op", "aliased", "moved"),
    [
        (SCATTER, '[{"indices":["0","3"]}]', 2 * 64 * 128 * 2),
        (SCATTER, "[]", 2 * 64 * 1024 * 128 * 2 + 64 * 4 + 64 * 128 * 2),
        (GATHER, "[]", 2 * 64 * 128 * 2),
    ],
)
def test_a_fusion_in_place_moves_the_rows_that_it_reads_or_writes(op, aliased, moved):
    config = f'backend_config={{"aliasing_operands":{{"lists":{aliased}}}}}'
    shape = op.split(" ")[0]
    text = f"""HloModule step, is_scheduled=true
{ROWS.format(op=op)}
ENTRY %main (a: bf16[64,1024,128], i: s32[64], x: bf16[64,128]) -> {shape} {{
  %a = bf16[64,1024,128]{{2,1,0}} parameter(0)
  %i = s32[64]{{0}} parameter(1)
  %x = bf16[64,128]{{1,0}} parameter(2)
  ROOT %rows_fusion = {shape} fusion(%a, %i, %x), kind=kCustom, calls=%fused_rows, {config}
}}
"""
    assert estimate(parse(text), CHIP).unpriced_s == pytest.approx(moved / CHIP.hbm_rate)


def test_transfers_between_slices_have_a_queue_of_their_own():
    attributes = 'channel_id=3, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="sum_0"}'
    text = TEXT.replace(
        "  ROOT %copy = f32[1024,1024]{1,0} copy(%g)",
        f"""  %send = (f32[1024,1024], u32[], token[]) send(%g, %token), {attributes}
  %recv = (f32[1024,1024], u32[], token[]) recv(%token), {attributes}
  %sent = token[] send-done(%send), {attributes}
  %received = (f32[1024,1024], token[]) recv-done(%recv), {attributes}
  ROOT %end = f32[1024,1024]{{1,0}} get-tuple-element(%received), index=0""",
    )
    cost = estimate(parse(text), CHIP, slices=4)
    assert cost.network_s == pytest.approx(2 * MIB4 * 3 / 4 / CHIP.network, rel=1e-5)
    assert cost.schedule_s > cost.network_s


def test_shapes_are_read():
    assert array_bytes("(bf16[2,3]{1,0:T(8,128)(2,1)}, s4[8], pred[], token[])") == [12, 4, 1, 0]
    with pytest.raises(ValueError, match="ENTRY"):
        parse("no module")


def other_estimate(file: Path) -> dict:
    command = [sys.executable, str(OTHER), str(file), "--chip", "v5e", "--json"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not OTHER.is_file(), reason=f"no other estimator at {OTHER}")
@pytest.mark.parametrize("name", ["step.txt", "step.txt.gz"])
def test_the_other_estimator_agrees_on_the_small_text(name, tmp_path, cost):
    save_text(TEXT, tmp_path / name)
    written = (tmp_path / name).read_bytes()
    assert (gzip.decompress(written) if name.endswith(".gz") else written).decode() == TEXT
    other = other_estimate(tmp_path / name)
    for here, there in (("schedule_s",) * 2, ("bound_s",) * 2, ("product_flops", "hlo_matmul_flops")):
        assert getattr(cost, here) == pytest.approx(other[there], rel=5e-3)
