"""What every launcher renders is what is kept in golden/; and the scripts among it are sound."""

import re
import shutil
import subprocess

import pytest

from tests.launch.cases import CASES, GOLDEN, render

SCRIPTS = [name for name in CASES if name.endswith(".sh")]


@pytest.mark.parametrize("name", CASES)
def test_it_is_what_was_reviewed(name):
    assert render(name) == (GOLDEN / name).read_text(), (
        f"lm launch renders {name} in another way than tests/launch/golden has it; if that is meant, "
        "write the files anew with `python -m tests.launch.cases` and review the difference"
    )


def test_no_golden_file_is_left_over():
    assert {path.name for path in GOLDEN.iterdir()} == set(CASES)


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_reads_the_script_and_what_it_sends_to_hosts(name):
    text = (GOLDEN / name).read_text()
    for part in (text, *re.findall(r"<<'HOST'\n(.*?)^HOST$", text, flags=re.DOTALL | re.MULTILINE)):
        assert subprocess.run(["bash", "-n"], input=part, text=True, capture_output=True).stderr == ""


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here")
@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_has_nothing_to_say(name):
    checked = subprocess.run(["shellcheck", str(GOLDEN / name)], text=True, capture_output=True)
    assert checked.returncode == 0, checked.stdout
