"""The house: a module imports from its own folder or from lower floors; files and functions stay small."""

import ast
from collections import Counter
from pathlib import Path

import pytest

import lm
from lm.experiment import OBJECTIVES

ROOT = Path(lm.__file__).parent
FLOORS = (
    "cli", "label", "serve", "web", "papers", "sweep", "launch", "plan", "trained_model", "train", "choices", "evals", "algorithms", "rollout", "sandbox", "open_weights", "data", "interop", "train_step", "objectives", "optimizer",
    "model", "parallel", "check", "types", "overrides", "files", "user_functions", "changes", "extras", "experiment", "json_lines", "stored", "shapes", "config", "parent_death", "allocator", "between_batches", "notebook",
)  # fmt: skip
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def floor(module: str) -> int:
    """Which floor `lm.NAME…` is on, from the top."""
    return FLOORS.index(module.split(".")[1])


def imports(tree: ast.AST) -> list[str]:
    """Every module of lm that is imported, also inside functions; `from lm import x` is lm.x."""
    found = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are absolute"
            found += [f"lm.{alias.name}" for alias in node.names] if node.module == "lm" else [node.module]
    assert not any(name.split(".")[0] == "experiments" for name in found)
    return [name for name in found if name.startswith("lm.") and not name.startswith("lm.__")]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_keeps_to_its_floor_and_its_size(file):
    text = file.read_text()
    tree = ast.parse(text)
    here = floor(".".join(file.relative_to(ROOT.parent).with_suffix("").parts))
    above = [name for name in imports(tree) if floor(name) < here]
    assert not above, f"imports from floors above it: {above}"
    assert ast.get_docstring(tree), "a file says in its first line what its job is"
    assert text.count("\n") < 500
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert not [f.name for f in functions if f.end_lineno - f.lineno >= 60]


def test_no_class_name_stands_twice():
    trees = [ast.parse(file.read_text()) for file in FILES]
    names = Counter(node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    assert not [name for name, count in names.items() if count > 1]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_only_an_algorithm_and_its_config_know_the_class_of_an_objective(file):
    """No isinstance on an objective, no table by its class or by the name of it: others ask its config or the algorithm."""
    tree = ast.parse(file.read_text())
    asserted = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert) and "isinstance(" in ast.unparse(node.test)
    ]
    assert not asserted, (
        f"assert isinstance narrows a type in lines {asserted}: a type parameter or a function of that type does"
    )
    if file.relative_to(ROOT).parts[0] in ("algorithms", "config"):
        return
    found = asked_for_class(tree)
    assert not found, f"asks for the class of an objective in lines {found}"
    named = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value in OBJECTIVES]
    assert not named, f"names an objective's class as text in lines {named}"


CLASSES = {*OBJECTIVES, "Algorithm", "ObjectiveConfig"}


def asked_for_class(tree: ast.AST) -> list[int]:
    """Lines that ask for the class of an objective or algorithm: isinstance, issubclass, `case GRPO():`, type(x.objective)."""
    return [node.lineno for node in ast.walk(tree) if asks_for_class(node)]


def asks_for_class(node: ast.AST) -> bool:
    if isinstance(node, ast.alias):  # under another name it would not be found
        return node.name in CLASSES and node.asname is not None
    if isinstance(node, ast.MatchClass):
        return named_in(node.cls)
    function = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
    if function == "type":
        return ast.unparse(node.args[0]).endswith("objective")
    return function in ("isinstance", "issubclass") and named_in(node.args[1])


def named_in(node: ast.AST) -> bool:
    """Whether one of CLASSES is named in an expression, also as `module.NAME`."""
    names = {getattr(one, "id", getattr(one, "attr", "")) for one in ast.walk(node)}
    return not names.isdisjoint(CLASSES)


@pytest.mark.parametrize(
    "code",
    [
        "isinstance(o, GRPO)",
        "isinstance(o, (KTO, values.PPO))",
        "issubclass(kind, ObjectiveConfig)",
        "type(stage.objective) is kind",
        "match o:\n    case GRPO():\n        pass",
        "from lm.experiment import GRPO as Sampled",
    ],
)
def test_a_question_for_the_class_of_an_objective_is_found(code):
    assert asked_for_class(ast.parse(code))


def test_no_two_test_files_share_a_name():
    """pytest imports a test file of a folder that is no package by its name alone."""
    tests = Path(__file__).parent
    names = Counter(file.name for file in tests.rglob("test_*.py") if not (file.parent / "__init__.py").exists())
    assert [name for name, count in names.items() if count > 1] == []
