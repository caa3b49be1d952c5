"""Every flag of every launcher against values that the far side would refuse, or that would end a line of a script."""

import shlex
import subprocess

import pytest
import yaml

from lm.cli.main import main
from lm.launch import tpu_vm, values
from lm.launch.table import FLAGS, LAUNCHERS, launchers_with
from tests.launch.cases import COMMIT, EXPERIMENT

MOUNTED = ["--volume", "gs://my-runs:/mnt/runs", "--run-dir", "/mnt/runs/pod"]
LINE_BREAKS = ["\n", "x\n#SBATCH --wrap=x", "a\rb", "a\x1b[31mb", "a\u2028b", "\x00", "a\udc80b"]
NEVER = ["", " ", "-", "--", "a b", "Bad_Name!", "../x", "'", '"', "$(id)", "`id`", "a;b", "x" * 300, "é", *LINE_BREAKS]
COUNTS = ["-1", "0", "1.5", "nan", "inf", str(2**63), "9" * 5000, "1e3", "0x10", "one", "--1"]
VALUED = [flag for flag, option in FLAGS.items() if option.metavar]
COMMON = ["--max-restarts", "--grace", "--join-timeout", "--run-dir", "--until"]


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tpu_vm, "current_commit", lambda: COMMIT)
    (tmp_path / "pod.py").write_text(EXPERIMENT)
    return tmp_path


def launch(on: str, *words: str) -> int:
    launcher = LAUNCHERS[on]
    given = [word for flag in launcher.required for word in (flag, right(flag, on))]
    given += MOUNTED if "--volume" in launcher.flags else []
    return main(["launch", "pod.py", "--on", on, *given, *words, "--dry-run"])


def refused(capsys, on: str, *words: str) -> str:
    code, said = launch(on, *words), capsys.readouterr()
    assert code == 2 and said.out == "", (words, said.out[:300])
    assert said.err.startswith("lm: error: ") and len(said.err.splitlines()) == 1, said.err
    return said.err


@pytest.mark.parametrize("flag", VALUED)
def test_no_flag_takes_what_no_far_side_takes(capsys, flag):
    number = FLAGS[flag].metavar == "N"
    for on in launchers_with(flag):
        for value in [*NEVER, *(COUNTS if number else [])]:
            assert flag in refused(capsys, on, f"{flag}={value}")


@pytest.mark.parametrize("flag", COMMON)
@pytest.mark.parametrize("on", LAUNCHERS)
def test_no_common_flag_takes_what_would_end_a_line(capsys, on, flag):
    values = [*LINE_BREAKS, ""] if flag in ("--run-dir", "--until") else [*NEVER, *set(COUNTS) - {"0"}]
    for value in values:
        refused(capsys, on, f"{flag}={value}")


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_of_another_launcher_is_refused_whatever_its_value(capsys, flag):
    for on in set(LAUNCHERS) - set(launchers_with(flag)):
        refused(capsys, on, *([f"{flag}={right(flag, on)}"] if FLAGS[flag].metavar else [flag]))


def right(flag: str, on: str) -> str:
    """A value that is right for every launcher which has the flag."""
    known = {
        "--topology": "v5e:4x4", "--volume": "gs://other:/mnt/other", "--zone": "us-west4-a", "--project": "my-project",
        "--image": "lm:1", "--service-account": "a@b.iam.gserviceaccount.com" if on == "tpu-vm" else "trainer",
        "--runtime-version": "v2-alpha-tpuv5", "--time": "1-00:00:00",
    }  # fmt: skip
    return known.get(flag, "1" if FLAGS[flag].metavar == "N" else "name")


def test_a_flag_of_two_launchers_is_one_value():
    for name, flag in FLAGS.items():
        assert all(LAUNCHERS[on].flags[name] == flag for on in launchers_with(name)), name


@pytest.mark.parametrize("on", LAUNCHERS)
def test_right_values_are_taken(capsys, on):
    for flag, option in FLAGS.items():
        if option.metavar and on in launchers_with(flag) and flag != "--slices":
            assert launch(on, flag, right(flag, on)) == 0, capsys.readouterr().err


IMAGES = [
    "lm", "lm:1", "localhost:5000/lm", "us-docker.pkg.dev/p/r/lm:v1.2_3-x", "a/b__c/d--e", f"lm@sha256:{'0a' * 32}", "lm:1@sha256:" + "f" * 64,
    "gcr.io/example.com/project/lm:latest", "Registry.example/lm",
]  # fmt: skip
NO_IMAGES = [
    "My Image:Latest!", "LM:1", "lm:", "lm:-1", "lm:.a", "lm:a:b", "lm@sha256:123", "lm@", "/lm", "lm/", "a//b", "https://x/lm:1", "lm:" + "t" * 129,
    "a" * 256, "-lm", "_lm", "lm.", "a..b", "a___b", "x:port/lm", "0" * 64, f"lm@sha256:{'0A' * 32}", "docker.io/lm:1 ", "lm\n",
]  # fmt: skip


@pytest.mark.parametrize("image", IMAGES)
def test_references_of_images(image):
    assert values.image_problem(image) is None


@pytest.mark.parametrize("image", NO_IMAGES)
def test_what_is_no_reference_of_an_image(image):
    assert values.image_problem(image)


@pytest.mark.parametrize("time, seconds", [
    ("30", 1800), ("30:10", 1810), ("1:30:10", 5410), ("2-3", 183600), ("2-3:04", 183840), ("2-03:04:05", 183845), ("UNLIMITED", None), ("0", None),
])  # fmt: skip
def test_times_of_slurm(time, seconds):
    assert values.slurm_seconds(time) == seconds and values.time_problem(time) is None


@pytest.mark.parametrize(
    "time",
    ["1 day", "1d", "1:2:3:4", "-5", "1-", "1-2:3:4:5", "1:", ":1", "1.5", "1-00:00:00 ", "٣", "9" * 20, "99999-0"],
)
def test_what_is_no_time_of_slurm(time):
    assert values.time_problem(time)


def test_a_time_that_is_all_for_saving(capsys):
    assert "--grace" in refused(capsys, "slurm", "--time", "5")
    assert launch("slurm", "--time", "5", "--grace", "60") == 0
    capsys.readouterr()
    refused(capsys, "slurm", "--grace", "70000")  # sbatch takes at most 65,535 seconds


@pytest.mark.parametrize("bucket, told", [
    ("My-Runs", "lowercase"), ("ab", "3 to 63"), ("a" * 64, "63 characters"), ("-runs", "begin and end"), ("runs-", "begin and end"), ("a..b", "two dots"),
    ("a.-b", "beside a dot"), ("192.168.5.4", "IP address"), ("goog-runs", "begin with goog"), ("my-google-runs", "contain google"),
    ("my-g00gle", "contain google"), ("runs/sub", "mounted as a whole: gs://runs:/mnt/x"), ("a b c", "lowercase"), ("", "3 to 63"),
])  # fmt: skip
def test_a_buckets_name_is_refused_with_the_rule_that_it_breaks(capsys, bucket, told):
    for on in ("gke", "tpu-vm"):
        assert told in refused(capsys, on, "--volume", f"gs://{bucket}:/mnt/x")


@pytest.mark.parametrize("second, told", [
    ("gs://other:/mnt/runs", "two are mounted at /mnt/runs"), ("gs://other:/mnt//runs/", "two are mounted at /mnt/runs"),
    ("gs://other:/mnt/runs/inner", "/mnt/runs/inner is below /mnt/runs"), ("gs://other:/mnt", "/mnt/runs is below /mnt"),
    ("gs://other:/mnt/x/../runs", "contains .."), ("gs://other:/", "below the root"), ("gs://other:/usr/local", "hide /usr"), ("gs://other:/a:b", "colon"),
    ("gs://other:/home", "hide what the hosts have in /home"), ("gs://other:/tmp/", "in /tmp"), ("gs://other:/lm", "in /lm"),
    (f"gs://other:/mnt/{'x' * 256}", "too long"), ("gs://other:/" + "x/" * 2100, "too long"),
])  # fmt: skip
def test_volumes_have_folders_of_their_own(capsys, second, told):
    for on in ("gke", "tpu-vm"):
        assert told in refused(capsys, on, "--volume", second)


def test_a_reservation_is_not_preemptible(capsys):
    assert "--spot and --reserved" in refused(capsys, "tpu-vm", "--spot", "--reserved")


def test_the_home_of_a_folder_is_that_of_the_user(capsys, monkeypatch):
    monkeypatch.setenv("HOME", "/shared/me")
    assert launch("slurm", "--run-dir=~/runs/pod") == 0
    assert "--run-dir /shared/me/runs/pod" in capsys.readouterr().out
    assert "~nobody-here" in refused(capsys, "slurm", "--run-dir=~nobody-here/runs")


UNMADE = ["/proc/x", "/dev/null", "/sys/x", "x" * 256, "/" + "x/" * 2100, "-x", " "]


@pytest.mark.parametrize("folder", UNMADE)
def test_a_folder_that_cannot_be_made_is_refused_before_a_job_is_queued(capsys, work, folder):
    assert "--run-dir" in refused(capsys, "slurm", f"--run-dir={folder}")
    (work / "grid.py").write_text(
        "import runpy\nfrom lm.sweep.sweep import Sweep\n"
        "sweep = Sweep('grid', runpy.run_path('pod.py')['experiment'], {'pretrain.optimizer.peak_lr': (1e-3, 2e-3)})\n"
    )
    for flag in ("--folder", "--store"):
        assert main(["sweep", "grid.py", "--on", "slurm", f"{flag}={folder}", "--dry-run"]) == 2
        assert flag in capsys.readouterr().err


@pytest.mark.parametrize(
    "run_dir", ["/mnt/runs/../../tmp/r", "/mnt/runs/..", "/mnt/runs2/r", "/mnt", "mnt/runs/r", "/tmp/r"]
)
def test_a_run_folder_does_not_leave_its_volume(capsys, run_dir):
    for on in ("gke", "tpu-vm"):
        assert "--run-dir" in refused(capsys, on, "--run-dir", run_dir)


def test_an_account_of_one_place_is_none_of_the_other(capsys):
    assert "e-mail" in refused(capsys, "tpu-vm", "--service-account", "trainer")
    assert "Kubernetes" in refused(capsys, "gke", "--service-account", "trainer@my-project.iam.gserviceaccount.com")


def test_a_plan_that_does_not_fit_is_not_launched(capsys):
    large = [
        "--model.num_layers",
        "64",
        "--model.embed_dim",
        "16384",
        "--model.mlp_dim",
        "65536",
        "--pretrain.seq_len",
        "128",
    ]
    for on in ("gke", "tpu-vm"):
        told = refused(capsys, on, *large)
        assert "stage pretrain needs" in told and "GB per device, which has 16.9" in told and "lm plan" in told
        assert launch(on, *large, "--skip-memory-check") == 0
        capsys.readouterr()


WORDS = ["two\nlines", "a\u2028b", '["it\'s \\"$HOME\\" `id`"]', '["#SBATCH --wrap=x"]', '["--- {a: b}"]']


@pytest.mark.parametrize("words", WORDS)
def test_what_an_override_says_arrives_as_it_was_given(capsys, words):
    assert launch("gke", "--prompts", words) == 0
    (manifest,) = yaml.safe_load_all(capsys.readouterr().out)
    (container,) = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    assert container["command"][-1].replace("$$", "$") == words
    assert launch("slurm", "--prompts", words) == 0
    script = capsys.readouterr().out
    directives = [line for line in script.split("set -u")[0].splitlines() if line.startswith("#SBATCH")]
    assert not any("wrap" in line for line in directives)
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).returncode == 0
    assert shlex.quote(words) in script


@pytest.mark.parametrize("path", [".", "./", "/", ".."])
def test_a_path_without_names_is_a_folder(path):
    assert values.path_problem(path) is None
