"""Validation of flag values (images, names, zones, accounts, times), so that errors show before a job is queued.

Sources: the grammar of image references (distribution/reference); Kubernetes on names of objects; Google Cloud on
projects, zones, buckets and service accounts; the manual page of sbatch on times.
"""

from __future__ import annotations

import argparse
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath

from lm.experiment import UserError

LARGEST = 2**31 - 1  # largest count or number of seconds: schedulers use 32 bits
LONGEST_PART, LONGEST_PATH = 255, 4095  # bytes of a folder's name and of a path, on Linux
LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"


@dataclass(frozen=True)
class Form:
    """The valid form of a value: a regular expression, the maximal length, and a description for errors."""

    pattern: str
    most: int
    words: str

    def problem(self, text: str) -> str | None:
        """Error text for an invalid value, to follow the value in a sentence; None if it is valid."""
        if re.fullmatch(self.pattern, text, re.ASCII) and len(text) <= self.most:
            return None
        return f"should be {self.words}, at most {self.most} characters"


OBJECT = Form(
    rf"{LABEL}(\.{LABEL})*",
    253,
    "a name in Kubernetes: lowercase letters, digits, - and ., ending in letters or digits",
)
NAMESPACE = Form(LABEL, 63, "a namespace of Kubernetes: lowercase letters, digits and -, ending in letters or digits")
QUEUE = Form(OBJECT.pattern, 63, "a LocalQueue's name: lowercase letters, digits, - and ., ending in letters or digits")
CLUSTER = Form(
    r"[a-z]([-a-z0-9]*[a-z0-9])?", 40, "a cluster's name: lowercase letters, digits and -, beginning with a letter"
)
PROJECT = Form(
    r"([a-z0-9.-]+:)?[a-z][-a-z0-9]{4,28}[a-z0-9]", 94,
    "the ID of a project: 6 to 30 lowercase letters, digits and -, beginning with a letter",
)  # fmt: skip
ZONE = Form(r"[a-z]+-[a-z]+\d+-(ai\d+)?[a-z]", 40, "a zone of Google Cloud such as us-central2-b")
RUNTIME = Form(r"[a-z0-9]([-a-z0-9._]*[a-z0-9])?", 63, "a version of the TPU software such as v2-alpha-tpuv5")
ACCOUNT_EMAIL = Form(
    r"[a-z0-9][-a-z0-9._]*@[a-z0-9][-a-z0-9.]*\.[a-z]+", 254,
    "the e-mail address of a service account such as NAME@PROJECT.iam.gserviceaccount.com",
)  # fmt: skip
PARTITION = Form(
    r"\w[\w.+-]*(,\w[\w.+-]*)*", 200, "a partition of Slurm, or several with commas: letters, digits, _ . + -"
)
ACCOUNT = Form(r"\w[\w.@+-]*", 200, "an account of Slurm: letters, digits, _ . @ + -")

_COMPONENT = r"[a-zA-Z0-9]([-a-zA-Z0-9]*[a-zA-Z0-9])?"
_PATH = r"[a-z0-9]+(([._]|__|-+)[a-z0-9]+)*"
_IMAGE = re.compile(
    rf"(?P<name>({_COMPONENT}(\.{_COMPONENT})*(:\d{{1,5}})?/)?{_PATH}(/{_PATH})*)(:(?P<tag>[^:@/]*))?(@(?P<digest>.*))?",
    re.ASCII,
)
_DIGEST = r"sha256:[a-f0-9]{64}|sha384:[a-f0-9]{96}|sha512:[a-f0-9]{128}"


def image_problem(text: str) -> str | None:
    """Error text for an invalid container image reference; None if it is valid."""
    found = _IMAGE.fullmatch(text)
    if found is None:
        return (
            "should be an image such as us-docker.pkg.dev/PROJECT/REPOSITORY/lm:1: [HOST[:PORT]/]NAME[:TAG][@DIGEST], "
            "NAME of lowercase letters and digits, with . _ - within and / between its parts"
        )
    if len(found["name"]) > 255 or re.fullmatch(r"[a-f0-9]{64}", found["name"]):
        return "should be an image whose name has at most 255 characters and is not just a digest"
    if found["tag"] is not None and not re.fullmatch(r"\w[\w.-]{0,127}", found["tag"], re.ASCII):
        return "has a tag that should be 1 to 128 letters, digits, _ . -, not beginning with . or -"
    if found["digest"] is not None and not re.fullmatch(_DIGEST, found["digest"]):
        return "has a digest that should be sha256: and 64 lowercase hexadecimal digits"
    return None


_TIME = re.compile(
    r"(?P<days>\d{1,5})-(?P<h>\d{1,7})(:(?P<m>\d{1,7})(:(?P<s>\d{1,9}))?)?|\d{1,9}(:\d{1,9}){0,2}", re.ASCII
)
UNLIMITED = ("UNLIMITED", "INFINITE")


def slurm_seconds(text: str) -> int | None:
    """Seconds of a time limit of sbatch; None for no limit.

    Raises:
        ValueError: it is not a valid time.
    """
    if text.upper() in UNLIMITED:
        return None
    found = _TIME.fullmatch(text)
    if found is None:
        raise ValueError(text)
    if found["days"]:
        days, hours, minutes, seconds = (int(found[name] or 0) for name in ("days", "h", "m", "s"))
    else:
        numbers = [int(part) for part in text.split(":")]
        days = 0
        hours, minutes, seconds = {1: [0, *numbers, 0], 2: [0, *numbers], 3: numbers}[len(numbers)]
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds or None


def time_problem(text: str) -> str | None:
    """Error text for an invalid Slurm time limit; None if it is valid."""
    try:
        seconds = slurm_seconds(text)
    except ValueError:
        seconds = LARGEST
    if seconds is not None and seconds >= LARGEST:
        return (
            "should be a time of Slurm: MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS[:MINUTES[:SECONDS]]"
        )
    return None


def bucket_problem(bucket: str) -> str | None:
    """Error text for an invalid Cloud Storage bucket name (the first rule that it breaks); None if it is valid."""
    parts = bucket.split(".")
    rules = (
        (not re.fullmatch(r"[-a-z0-9._]*", bucket), "should have lowercase letters, digits, - _ and . only"),
        (not 3 <= len(bucket) <= 222, f"should have 3 to 63 characters; it has {len(bucket)}"),
        (any(len(part) > 63 for part in parts), "should have at most 63 characters (between dots)"),
        (not re.fullmatch(r"[a-z0-9].*[a-z0-9]", bucket), "should begin and end with a letter or digit"),
        ("" in parts, "should have no two dots in a row"),
        (any(p.startswith("-") or p.endswith("-") for p in parts), "should have no hyphen beside a dot"),
        (re.fullmatch(r"\d+(\.\d+){3}", bucket), "should not be an IP address"),
        (bucket.startswith("goog"), "should not begin with goog"),
        (re.search(r"g[o0][o0]g[l1]e", bucket), "should not contain google or what looks like it"),
    )
    return next((words for broken, words in rules if broken), None)


def path_problem(path: str) -> str | None:
    """Error text for a folder that cannot be made, or be named in a command, script or manifest; None if it is valid."""
    if not path.strip():
        return "is empty; it should be the path of a folder"
    if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in path):
        return "has a control character or line break"
    if path.startswith("-"):
        return "begins with a hyphen, so commands would read it as an option"
    if path.startswith("~"):
        return "begins with ~ and names no user's folder"
    parts = PurePosixPath(path).parts
    longest = max((len(part.encode()) for part in parts), default=0)
    if longest > LONGEST_PART or len(path.encode()) > LONGEST_PATH:
        return f"is too long: at most {LONGEST_PART} bytes between two /, and {LONGEST_PATH} in all"
    if parts[:1] == ("/",) and parts[1:2] in (("proc",), ("sys",), ("dev",)) and parts[2:3] != ("shm",):
        return f"is below /{parts[1]}, where no folder can be made"
    return None


def mounted_path_problem(path: str) -> str | None:
    """Error text for a folder on mounted storage that is invalid or outside it; None if it is valid."""
    if ".." in PurePosixPath(path).parts:
        return "contains .., which leads out of the mounted storage"
    return path_problem(path)


def valid_text(problem: Callable[[str], str | None]) -> Callable[[str], str]:
    """An argparse type for text that `problem` finds valid."""

    def parse(text: str) -> str:
        wrong = problem(text)
        if wrong:
            raise argparse.ArgumentTypeError(f"{text!r} {wrong}")
        return text

    return parse


def check_value(flag: str, text: str | None, form: Form) -> str | None:
    """Check the value of a flag whose valid form depends on the launcher, and return it.

    Raises:
        UserError: it does not have the form.
    """
    wrong = form.problem(text) if text is not None else None
    if wrong:
        raise UserError(f"{flag} {text!r} {wrong}")
    return text


def word_problem(word: str) -> str | None:
    """Error text for a word that a command cannot contain; None if it is valid (quotes, spaces and line breaks are)."""
    if "\0" in word:
        return "has a NUL character, which no command can be given"
    if any("\ud800" <= letter <= "\udfff" for letter in word):
        return "is not valid UTF-8"
    return None
