"""XLA compiler options of a training step, by device kind."""

from __future__ import annotations

from jax.sharding import Mesh

# Large matrix products as a whole rather than interleaved with the exchange of their operands: by the compiler's
# estimate interleaving costs a third of a step (v5e and v5p, 2026).
_WHOLE_PRODUCTS: dict[str, bool | int | str] = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}

OPTIONS: dict[str, dict[str, bool | int | str]] = {
    "TPU v5 lite": _WHOLE_PRODUCTS
    | {  # gathers behind the computation
        "xla_tpu_enable_async_collective_fusion": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
        "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
        "xla_tpu_overlap_compute_collective_tc": True,
        "xla_enable_async_all_gather": True,
        "xla_tpu_scoped_vmem_limit_kib": 32_768,  # twice the default: larger fusions
    },
    # Blocks of 1024 of the attention kernel need more of the on-chip memory than the default grants.
    "TPU v5": _WHOLE_PRODUCTS | {"xla_tpu_scoped_vmem_limit_kib": 98_304},
    "TPU v6 lite": _WHOLE_PRODUCTS | {"xla_tpu_scoped_vmem_limit_kib": 98_304},
}


def compiler_options(mesh: Mesh) -> dict[str, bool | int | str] | None:
    """Compiler options of a step on this mesh; None for the defaults."""
    return OPTIONS.get(mesh.devices.flat[0].device_kind)
