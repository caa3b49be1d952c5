"""The documentation builds without a warning, and what README and CONTRIBUTING link to is there."""

import dataclasses
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lm.cli.main import COMMANDS, Parser
from lm.experiment import Experiment
from lm.files import load

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


PAGES = [*sorted(path.name for path in (ROOT / "docs").glob("*.md")), "../README.md", "../CONTRIBUTING.md"]
FILE = re.compile(r"(?<![\w./-])(?:[\w-]+/)*[\w-]+\.(?:py|sh|js|j2)\b")
IMAGINED = {
    "my_file.py",
    "my_dpo.py",
    "unlikelihood.py",
    "best_of.py",
    "ssh.py",
}  # a reader's own, and those of the change drills


@pytest.mark.parametrize("name", PAGES)
def test_a_file_of_the_code_that_a_page_names_is_there(name):
    folders = ("lm", "tests", "scripts", "experiments", "benchmarks")
    listed = [path.relative_to(ROOT).as_posix() for folder in folders for path in (ROOT / folder).rglob("*.*")]
    spans = re.findall(r"`([^`\n]+)`", (ROOT / "docs" / name).read_text("utf-8"))
    named = {file for span in spans for file in FILE.findall(span) if not Path(file).stem.isupper()}
    gone = [file for file in sorted(named) if not any(f"/{one}".endswith(f"/{file}") for one in listed)]
    assert not [file for file in gone if Path(file).name not in IMAGINED]


@pytest.mark.parametrize("name", [*PAGES, "../benchmarks/README.md"])
def test_a_command_and_its_options_on_a_page_exist(name):
    """Options of commands alone: fields of an experiment have tests of their own."""
    own = {command: options_of(command) for command in COMMANDS}
    for line in (ROOT / "docs" / name).read_text("utf-8").splitlines():
        code = [line] if line.startswith("    ") else re.findall(r"`([^`]+)`", line)
        for command, rest in (
            found for text in code for found in re.findall(r"(?:^|[\s/])lm ([a-z]+)\b([^|#]*)", text)
        ):
            if not line.startswith("    lm ") and command not in COMMANDS:
                continue  # words such as "the `lm` package"
            assert command in COMMANDS, line
            options, takes_fields = own[command]
            unknown = set(re.findall(r"(?<!\S)--[\w-]+(?=[\s=]|$)", rest)) - options - {"--help"}
            assert not unknown or (takes_fields and unknown <= FIELDS), f"{line.strip()}: {unknown}"


RUNS = "|".join(sorted(path.stem for path in (ROOT / "experiments").glob("*.py")))


@pytest.mark.parametrize("name", [*PAGES, "../benchmarks/README.md"])
def test_a_stage_on_a_page_is_one_of_its_experiment(name):
    text = (ROOT / "docs" / name).read_text("utf-8")
    named = re.findall(rf"\b({RUNS}):(\w+)", text)
    listed = re.findall(rf"\blm [a-z]+ ({RUNS})\b[^#`\n]*--stage ((?:\w+ ?)+)", text)
    named += [(run, stage) for run, stages in listed for stage in stages.split()]
    unknown = [(run, stage) for run, stage in named if stage not in {one.name for one in load(run).stages}]
    assert not unknown


@pytest.mark.parametrize("name", [*PAGES, "../benchmarks/README.md"])
def test_an_extra_on_a_page_exists_and_comes_from_the_clone(name):
    """Elsewhere `lm` is another package of this name."""
    commands = re.findall(r"pip install ([^#`\n]*\[[^\s`]+)", (ROOT / "docs" / name).read_text("utf-8"))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    assert all((found := re.fullmatch(r"-e '\.\[(\w+)\]'", one)) and found[1] in extras for one in commands), commands


def options_of(command: str) -> tuple[set[str], bool]:
    module, parser = importlib.import_module(f"lm.cli.{command}"), Parser(prog=f"lm {command}")
    module.configure(parser)
    return parser.flags, module.TAKES_OVERRIDES


FIELDS = {f"--{field.name}" for field in dataclasses.fields(Experiment)}
