"""Eight simulated CPU devices, quick compiles, and the folder of golden numbers."""

import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

# Before jax is imported, and for the processes that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# The partitioner and every pass over the graph run as always. Only code generation does less: LLVM optimises nothing, fusions
# are emitted without MLIR, and a program is one LLVM module instead of 32. That saves most of a step's compile time.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
os.environ["XLA_FLAGS"] = f"{QUICK} {os.environ.get('XLA_FLAGS', '')}".strip()

# Where Python was told to write no compiled modules, each process that a test starts would compile all of `lm` again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

import pytest
from hypothesis import settings

settings.register_profile("no deadline", deadline=None)  # a busy machine is no fault of an example
settings.load_profile("no deadline")

gc.set_threshold(
    20_000, 10, 10
)  # tracing makes many objects; at the default a twentieth of the time is garbage collection

# A suite that was started in the background ignores these, and so would the processes that it signals.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser):
    parser.addoption("--golden", default=str(ROOT.parent / "shared" / "golden"), help="folder of golden numbers")
    parser.addoption(
        "--models", default=str(ROOT.parent / "shared" / "models"), help="folder of published models' files"
    )
    parser.addoption(
        "--gguf", default=os.environ.get("LM_TESTS_GGUF"), help="GGUF file of a trained model with golden numbers"
    )
    parser.addoption(
        "--fast", action="store_true", help="leave out what is marked slow: layouts, whole runs, processes, browsers"
    )


def pytest_configure(config):
    """What one worker, or the run of the suite before, has compiled is not compiled again; the cache of data is new."""
    if "LM_TESTS_CACHE" not in os.environ:
        os.environ["LM_TESTS_CACHE"] = os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="lm-tests-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ["LM_TESTS_CACHE"], ignore_errors=True))
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        kept = getattr(config, "cache", None)  # None with `-p no:cacheprovider`
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(kept.mkdir("jax") if kept else os.environ["LM_TESTS_CACHE"])
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # most of what tests compile is small


def pytest_collection_modifyitems(config, items):
    if config.getoption("--fast"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]).returncode != 0:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture(scope="session")
def golden(request) -> Path:
    folder = Path(request.config.getoption("--golden"))
    if not folder.is_dir():
        pytest.skip(f"no golden numbers at {folder} (option --golden DIR)")
    return folder


@pytest.fixture(scope="session")
def models(request) -> Path:
    folder = Path(request.config.getoption("--models"))
    if not folder.is_dir():
        pytest.skip(f"no files of published models at {folder} (option --models DIR)")
    return folder


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright (the extra dev)")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("no Chromium was found (Debian's package is chromium): pages are not tried in a browser")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=list(FLAGS))
        yield browser
        browser.close()
