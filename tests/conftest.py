"""Eight simulated CPU devices, and the folder of golden numbers."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser):
    parser.addoption("--golden", default=str(ROOT.parent / "shared" / "golden"), help="folder of golden numbers")


@pytest.fixture(scope="session")
def golden(request) -> Path:
    folder = Path(request.config.getoption("--golden"))
    if not folder.is_dir():
        pytest.skip(f"no golden numbers at {folder} (option --golden DIR)")
    return folder
