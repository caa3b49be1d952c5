"""The documentation builds without a warning, and what README and CONTRIBUTING link to is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_documentation_builds_and_no_link_is_broken(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "TokenLogprob" in (tmp_path / "site" / "api.html").read_text("utf-8")  # docstrings are in the API page


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "benchmarks/README.md"])
def test_files_that_a_page_links_to_are_there(name):
    page = ROOT / name
    links = re.findall(r"\]\(([^)#\s]+)(#[^)\s]+)?\)", page.read_text("utf-8"))
    local = [(path, anchor) for path, anchor in links if "://" not in path]
    for path, anchor in local:
        target = page.parent / path
        assert target.exists(), f"{name} links to {path}"
        if anchor:
            assert anchor[1:] in anchors(target), f"{name} links to {path}{anchor}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150
