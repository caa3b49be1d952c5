"""What `pip install -e .` puts on the path, and how `lm` is imported where the clone's own folder could be taken for it."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_an_editable_install_puts_the_clone_on_the_path():
    """Where `package-dir` maps "" to a folder, setuptools writes that folder into a .pth file.

    Else it installs an import hook, which comes after the path: in the folder above a clone that is called `lm`, the
    clone's folder is found first, as a namespace package without any content.
    """
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    assert settings["package-dir"] == {"": "."}
    assert settings["packages"]["find"]["include"] == ["lm*"]


def test_lm_is_imported_from_the_folder_above_a_clone_called_lm(tmp_path):
    (tmp_path / "lm").symlink_to(ROOT, target_is_directory=True)
    site = tmp_path / "site"
    site.mkdir()
    (site / "lm.pth").write_text(f"{ROOT}\n", "utf-8")
    code = f"import site; site.addsitedir({str(site)!r}); import lm; print(lm.__version__, lm.__file__)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.split()[1] == str(ROOT / "lm" / "__init__.py")
