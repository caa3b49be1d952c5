"""Time and memory of reading a published model's checkpoint, beside those of reading the bytes, and of a LoRA step on it.

    python benchmarks/import_checkpoint.py                       # Llama 3.2 1B in bfloat16, five files
    python benchmarks/import_checkpoint.py --config config.json  # another model's sizes

Makes a checkpoint of random numbers in a temporary folder (--folder: where; it needs as much room as the weights).
Each measurement is a process of its own, with the files dropped from the page cache (cold) or in it (warm).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LLAMA_3_2_1B: dict[str, Any] = {
    "model_type": "llama", "num_hidden_layers": 16, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 64, "intermediate_size": 8192, "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "tie_word_embeddings": True,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
MB = 2**20
ROWS_OF_A_STEP = 1, 512  # rows, tokens in each


def make(folder: Path, config: dict[str, Any], files: int) -> int:
    """Write a checkpoint of random bfloat16 numbers; returns the bytes of its largest tensor."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    from lm.algorithms.state import abstract_model
    from lm.interop.config import read_config
    from lm.interop.places import parameter_places
    from lm.model.families import FAMILIES

    (folder / "config.json").write_text(json.dumps(config))
    places = parameter_places(abstract_model(*read_config(config)), FAMILIES[config["model_type"]])
    shapes = {name: place.their_shape for place in places for name in place.names}
    names = sorted(shapes, key=lambda name: (not name.startswith("model.embed"), name))
    sizes = {name: 2 * int(np.prod(shapes[name])) for name in names}
    shards: list[list[str]] = [[] for _ in range(files)]
    for name in names:
        min(shards, key=lambda shard: sum(sizes[one] for one in shard)).append(name)
    noise = (np.random.default_rng(0).standard_normal(2**20, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
    where = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{files:05}.safetensors"
        save_file({name: np.resize(noise, shapes[name]) for name in shard}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return max(sizes.values())


def read_bytes(folder: Path) -> Any:
    """The content of the files."""
    return [file.read_bytes() for file in sorted(folder.glob("*.safetensors"))]


def read_model(folder: Path, dtype: str) -> Any:
    """The model."""
    import jax

    from lm.experiment import Mesh
    from lm.interop import hf
    from lm.parallel.mesh import make_mesh

    return jax.block_until_ready(hf.read(folder, make_mesh(Mesh(data=1)), param_dtype=dtype))


READERS: dict[str, Callable[[Path], Any]] = {
    "the bytes": read_bytes,
    "bfloat16 parameters": lambda folder: read_model(folder, "bfloat16"),
    "float32 parameters": lambda folder: read_model(folder, "float32"),
}


def memory(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def measure(reader: str, folder: Path) -> None:
    """Print seconds, and the peak of memory beside what is kept, of one reading."""
    import jax

    import lm.interop.hf  # noqa: F401

    jax.device_put(1.0).block_until_ready()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    start = time.perf_counter()
    found = READERS[reader](folder)
    seconds = time.perf_counter() - start
    kept = sum(len(leaf) if isinstance(leaf, bytes) else leaf.nbytes for leaf in jax.tree.leaves(found))
    print(json.dumps({"seconds": seconds, "beside": memory("VmHWM") - before - kept}))


def lora_step(folder: Path, rows: int, length: int) -> None:
    """Print seconds of a LoRA SFT step (rank 16, all linear layers, bfloat16) and the peak of the process's memory."""
    import jax
    import numpy as np

    from lm.experiment import SFT, LoRA, Mesh, Optimizer, Source, Stage
    from lm.interop import hf
    from lm.parallel.mesh import make_mesh
    from lm.parallel.rules import batch_sharding
    from lm.train.loop import start_state
    from lm.types import TokenBatch

    mesh = make_mesh(Mesh(data=1))
    jax.set_mesh(mesh)
    changes = {"param_dtype": "bfloat16", "compute_dtype": "bfloat16", "remat": "full", "max_len": length}
    model = hf.read(folder, mesh, **changes)
    optimizer, lora = Optimizer(peak_lr=1e-4), LoRA(rank=16)
    stage = Stage("sft", SFT(), (Source("random"),), optimizer, batch_size=rows, seq_len=length, lora=lora)
    state, step = start_state(stage, model, mesh)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (rows, length)).astype(np.int32)
    places = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    batch = TokenBatch(tokens, np.ones(tokens.shape, np.float32), np.ones_like(tokens), places)
    for _ in range(2):  # the first compiles
        start = time.perf_counter()
        state, metrics = step(state, jax.device_put(batch, batch_sharding(mesh)))
        loss = float(metrics["loss"])
    print(json.dumps({"seconds": time.perf_counter() - start, "peak": memory("VmHWM"), "loss": loss}))


def in_process(reader: str, folder: Path, cold: bool) -> dict[str, Any]:
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            if cold:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while stream.read(MB):
                    pass
    command = [sys.executable, __file__, "--measure", reader, "--folder", str(folder)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="config.json of another model")
    parser.add_argument("--files", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3, help="the fastest of so many counts")
    parser.add_argument("--folder", type=Path, help="for the temporary folder; else where the system has them")
    parser.add_argument("--step", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--measure", choices=READERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        lora_step(arguments.folder, *ROWS_OF_A_STEP)
        return
    if arguments.measure:
        measure(arguments.measure, arguments.folder)
        return
    config = json.loads(arguments.config.read_text()) if arguments.config else LLAMA_3_2_1B
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        largest = make(folder, config, arguments.files)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        print(f"{size / 1e9:.2f} GB in {arguments.files} files, the largest tensor {largest / MB:.0f} MiB\n")
        print(
            "| reading | cold, s | × the bytes | warm, s | × the bytes | peak beside what is kept, MiB | × the largest tensor |"
        )
        print("|---|---|---|---|---|---|---|")
        baseline: dict[bool, float] = {}
        for reader in READERS:
            cells, peak = [reader], 0
            for cold in (True, False):
                runs = [in_process(reader, folder, cold) for _ in range(arguments.repeats)]
                seconds, peak = min(run["seconds"] for run in runs), max(peak, *(run["beside"] for run in runs))
                cells += [f"{seconds:.2f}", f"{seconds / baseline.setdefault(cold, seconds):.2f}"]
            print(f"| {' | '.join([*cells, f'{peak / MB:.0f}', f'{peak / largest:.2f}'])} |", flush=True)
        command = [sys.executable, __file__, "--step", "--folder", str(folder)]
        step = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    rows, length = ROWS_OF_A_STEP
    print(
        f"\na LoRA SFT step, rank 16, all linear layers, {rows} x {length} tokens: {step['seconds']:.1f} s, "
        f"peak of the process {step['peak'] / 2**30:.1f} GiB"
    )


if __name__ == "__main__":
    main()
