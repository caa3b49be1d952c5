"""The jobs whose rendering is kept in golden/, and how to render them: `python -m tests.launch.cases` writes them anew."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import sys
import tempfile
from pathlib import Path
from unittest import mock

from lm.cli.main import main
from lm.launch import tpu_vm

GOLDEN = Path(__file__).with_name("golden")
COMMIT = "0123456789abcdef0123456789abcdef01234567"

EXPERIMENT = """
from lm.experiment import Experiment, Mesh, Model, Optimizer, Pretrain, Source, Stage, Tokenizer

experiment = Experiment(
    name="pod_run",
    tokenizer=Tokenizer(vocab_size=512),
    model=Model(num_layers=2, embed_dim=128, num_heads=4, num_kv_heads=4, head_dim=32, mlp_dim=256),
    mesh=Mesh(data=1, fsdp=-1),
    stages=(Stage("pretrain", Pretrain(), (Source("text.txt"),), Optimizer(warmup_steps=2), steps=8, batch_size=64, seq_len=128),),
)
"""

BUCKET = "--volume gs://my-runs:/mnt/runs --run-dir /mnt/runs/pod"
CASES = {
    "gke_one_slice.yaml": """--on gke --topology v5e:4x4 --image us-docker.pkg.dev/p/r/lm:1 --namespace research
        --queue tpus --service-account trainer --secret tracking --spot --volume pvc:runs:/mnt/runs
        --run-dir /mnt/runs/pod --until pretrain --prompts '["What is $(HOME)?", "it is \\"it\\""]'""",
    "gke_one_host.yaml": f"--on gke --topology v6e:2x2 --image lm:1 {BUCKET}",
    "gke_two_slices.yaml": f"""--on gke --topology v5p:2x2x4 --slices 2 --mesh.slices 2 --image lm:1 --cluster pods
        --project my-project --zone us-east5-a --max-restarts 50 --grace 120 {BUCKET}""",
    "tpu_vm_one_slice.sh": f"""--on tpu-vm --topology v5e:4x4 --zone us-west4-a --project my-project --spot
        {BUCKET} --prompts "it's\ntwo lines" """,
    "tpu_vm_two_slices.sh": f"""--on tpu-vm --topology v4:2x2x4 --slices 2 --mesh.slices 2 --zone us-central2-b
        --reserved --runtime-version v2-alpha-tpuv4 --service-account trainer@my-project.iam.gserviceaccount.com {BUCKET}""",
    "slurm.sh": """--on slurm --nodes 2 --gpus-per-node 4 --time 1-00:00:00 --partition gpu --account lab
        --run-dir '/shared/my runs/pod' --pretrain.steps 16""",
    "local.txt": "--on local --processes 2 --devices-per-process 4 --until pretrain --pretrain.steps=16",
}


def render(name: str) -> str:
    """What `lm launch pod.py --dry-run` prints for a case, in a folder that has the experiment and nothing else."""
    here = Path.cwd()
    printed = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        Path(folder, "pod.py").write_text(EXPERIMENT)
        stack.enter_context(mock.patch.object(sys, "executable", "/venv/bin/python"))
        stack.enter_context(mock.patch.object(tpu_vm, "current_commit", lambda: COMMIT))
        stack.enter_context(contextlib.redirect_stdout(printed))
        os.chdir(folder)
        stack.callback(os.chdir, here)
        code = main(["launch", "pod.py", "--dry-run", *shlex.split(CASES[name])])
        assert code == 0
        assert [path.name for path in Path(folder).iterdir()] == ["pod.py"], "a dry run leaves nothing behind"
    return printed.getvalue()


if __name__ == "__main__":
    for name in CASES:
        (GOLDEN / name).write_text(render(name))
