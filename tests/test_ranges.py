"""Every number has a range beside its field or flag, and whatever is put in its place is refused in one line, or harmless."""

import dataclasses
import importlib
import json
import math
import typing

import pytest

from lm.check import check
from lm.cli.arguments import NumberIn
from lm.cli.main import COMMANDS, Parser
from lm.config.field import Range, is_name
from lm.experiment import (
    DPO,
    OBJECTIVES,
    PPO,
    Collect,
    Distill,
    Eval,
    Experiment,
    Model,
    Optimizer,
    Source,
    Stage,
    UserError,
    flatten,
    from_dict,
    to_dict,
)
from lm.overrides import _leaves, _replace

# what a config needs beside its defaults, and members of a list that would else be empty
GIVEN: dict[type, dict] = {
    DPO: {"loss_weights": (1.0,)},
    PPO: {"verifier": "answer"},
    Distill: {"teacher_prompt": "{prompt} {answer}"},
    Collect: {"verifier": "answer"},
}
STAGES = {name.lower(): kind(**GIVEN.get(kind, {})) for name, kind in OBJECTIVES.items()}
DOCS = Source("gen:docs")
FULL = Experiment(
    name="full",
    stages=tuple(Stage(name, objective, (DOCS,), batch_size=64) for name, objective in STAGES.items()),
    evals=(Eval("docs", DOCS, "bits_per_byte"),),
    model=Model(rope_scaling=(8.0, 1.0, 4.0, 64.0), attention_blocks=(128, 128, 128, 128)),
)
EACH = [dataclasses.replace(FULL, stages=(stage,)) for stage in FULL.stages]
FIELDS = {
    tuple(name.split(".")[1:]) if name.split(".")[0] in STAGES and "objective" not in name else name: (e, name)
    for e in EACH
    for name in _leaves(e)
}
Leaf = tuple[tuple, typing.Any, typing.Any, typing.Mapping]  # path, type, value, metadata
CASES = [pytest.param(experiment, name, id=name) for experiment, name in FIELDS.values()]
LEAVES = _leaves(FULL)
STRANGE = (
    "", "x", "nan", "a\0b", "\ud800", None, True, (), [], {}, ("x",), [None], [["x"]], -1, 0, 1, 1.5, -0.5, 1e-50, 1e50, 2**63,
    -(2**63), 10**400, math.nan, math.inf, -math.inf, b"x", 1j, object(), int, Optimizer(), FULL,
)  # fmt: skip
JSON_VALUES = tuple(value for value in STRANGE if isinstance(value, str | int | float | list | dict | None))
NODES = ("model", "mesh", "tokenizer", "stages", "evals", "prompts", "sources", "source", "objective", "optimizer")


def one_line(error: pytest.ExceptionInfo) -> str:
    said = str(error.value)
    assert said and "\n" not in said and len(said) < 400, said
    return said


def fits(value: object, kind: object, metadata: typing.Mapping) -> bool:
    """Whether a value is of a leaf's type and range, told apart from how `lm.config.field` does it: by its JSON and plain words."""
    span = metadata["range"]
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple | list) and all(fits(item, typing.get_args(kind)[0], metadata) for item in value)
    if kind in (int, float):
        number = type(value) is int or (kind is float and type(value) is float and math.isfinite(value))
        return number and (value == span.special or bounded(value, span))
    if kind is bool:
        return value is True or value is False
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind)
    if value is None:
        return type(None) in typing.get_args(kind)
    return isinstance(value, str) and value not in ("a\0b", "\ud800") and (is_name(value) or not metadata["name"])


def bounded(value: float, span: Range) -> bool:
    low = (span.least is None or value >= span.least) and (span.above is None or value > span.above)
    return low and (span.most is None or value <= span.most) and (span.below is None or value < span.below)


def hold(leaf: Leaf, name: str, value: object, read: typing.Callable[[], object]) -> None:
    """What does not fit is refused by name, value and what it should be; what fits is taken, or refused for another field."""
    _, kind, _, metadata = leaf
    if fits(value, kind, metadata):
        try:
            read()
        except UserError as error:
            assert "\n" not in str(error) and name.rsplit(".", 1)[-1] in str(error), (name, value, error)
        return
    with pytest.raises(UserError) as refusal:
        read()
    said = one_line(refusal)
    where = "name is" if metadata["name"] else name  # what has no name is told by its place
    assert where in said and "should be" in said, (name, value, said)
    if metadata["range"] and typing.get_origin(kind) is not tuple:
        assert said.endswith(str(metadata["range"])), said
        assert type(value) is int or repr(value)[:40] in said, said


@pytest.mark.parametrize("experiment, name", CASES)
def test_a_leaf_of_an_experiment_in_python_takes_what_its_field_declares(experiment, name):
    leaf = _leaves(experiment)[name]
    for value in STRANGE:
        hold(leaf, name, value, lambda value=value: check(_replace(experiment, leaf[0], value)))


def put(plain: object, path: tuple, value: object) -> object:
    """A plain value with the leaf at a path replaced."""
    if not path:
        return value
    if isinstance(plain, list):
        return [put(item, path[1:], value) if place == path[0] else item for place, item in enumerate(plain)]
    return plain | {path[0]: put(plain[path[0]], path[1:], value)}


@pytest.mark.parametrize("experiment, name", CASES)
def test_a_leaf_of_an_experiment_in_json_takes_what_its_field_declares(experiment, name):
    plain, leaf = json.loads(json.dumps(to_dict(experiment))), _leaves(experiment)[name]
    for value in JSON_VALUES:
        hold(leaf, name, value, lambda value=value: check(from_dict(put(plain, leaf[0], value))))


def nodes(value: object, path: tuple = ()) -> list[tuple]:
    """The path of every dataclass and every list of them below a dataclass."""
    found = [path] if path else []
    if dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            found += nodes(getattr(value, f.name), (*path, f.name)) if f.name in NODES else []
    elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        found += [inside for place, item in enumerate(value) for inside in nodes(item, (*path, place))]
    return found


SMALL = EACH[list(STAGES).index("dpo")]


@pytest.mark.parametrize("path", nodes(SMALL), ids=str)
def test_what_stands_in_the_place_of_a_dataclass_is_refused(path):
    plain = json.loads(json.dumps(to_dict(SMALL)))
    wrong = (
        "x",
        None,
        3,
        True,
        math.nan,
        b"x",
        object,
        Experiment,
        {"name": "x"},
        [3],
        [None],
        [{}],
        [[]],
        {"kind": []},
    )
    for value in wrong:
        with pytest.raises(UserError) as refusal:
            check(_replace(SMALL, path, value))
        one_line(refusal)
    for value in (*wrong[:5], *wrong[8:]):
        with pytest.raises(UserError) as refusal:
            check(from_dict(put(plain, path, value)))
        one_line(refusal)


def test_every_number_of_every_dataclass_has_a_range():
    bare = [
        name
        for name, (_, kind, _, metadata) in LEAVES.items()
        if {int, float} & {kind, *typing.get_args(kind)} and not metadata["range"]
    ]
    assert not bare and len(CASES) * len(STRANGE) > 3000


def test_defaults_lie_in_their_ranges_and_lists_become_tuples():
    lists = dataclasses.replace(FULL, stages=list(FULL.stages), prompts=["a"], evals=list(FULL.evals))
    assert check(lists) == dataclasses.replace(FULL, prompts=("a",))
    assert check(from_dict(to_dict(FULL))) == FULL and flatten(to_dict(check(FULL))) == flatten(to_dict(FULL))


def test_numpys_scalars_become_pythons():
    import numpy as np

    stages = (dataclasses.replace(FULL.stages[0], steps=np.int64(50), optimizer=Optimizer(peak_lr=np.float32(0.5))),)
    found = check(dataclasses.replace(FULL, stages=stages, seed=np.uint8(3), name=np.str_("x")))
    kinds = type(found.stages[0].steps), type(found.stages[0].optimizer.peak_lr), type(found.seed), type(found.name)
    assert kinds == (int, float, int, str) and json.dumps(to_dict(found))


NAMES = (
    "",
    ".",
    "..",
    "...",
    "a/b",
    "../../x",
    "a\0b",
    "a b",
    "a\nb",
    " a",
    "-a",
    ".a",
    "a.",
    "ä",
    "a:b",
    "a" * 65,
    "a\\b",
    "~",
    "*",
)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_name_of_a_folder_names_nothing(name):
    first, *others = FULL.stages
    wrong = (
        dataclasses.replace(FULL, name=name),
        dataclasses.replace(FULL, stages=(dataclasses.replace(first, name=name), *others)),
        dataclasses.replace(FULL, evals=(dataclasses.replace(FULL.evals[0], name=name),)),
    )
    for experiment in wrong:
        with pytest.raises(UserError, match=r"name is .*; it should be a name: letters a to z, digits") as refusal:
            check(experiment)
        one_line(refusal)


def numbers() -> list[tuple[str, str, NumberIn]]:
    """(command, flag, its type) of every flag that takes a number."""
    found = []
    for command in COMMANDS:
        parser = Parser(prog=command)
        importlib.import_module(f"lm.cli.{command}").configure(parser)
        found += [
            (command, action.option_strings[-1], action.type)
            for action in parser._actions
            if action.option_strings and (isinstance(action.type, NumberIn) or action.type in (int, float))
        ]
    return found


TEXTS = (
    "",
    "x",
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "1",
    "1.5",
    "1e400",
    "1e-50",
    str(2**63),
    "9" * 5000,
    "0x10",
    "--5",
    "null",
    "٣",
)


@pytest.mark.parametrize("command, flag, kind", numbers(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_flag_takes_numbers_of_its_range_only(command, flag, kind):
    assert isinstance(kind, NumberIn), f"{flag} of lm {command} has no range"
    parser = Parser(prog=f"lm {command}")
    parser.add_argument(flag, type=kind)
    for text in TEXTS:
        try:
            value = kind.kind(text)
        except (ValueError, OverflowError):
            value = math.nan
        if math.isfinite(value) and (value == kind.range.special or bounded(value, kind.range)):
            assert vars(parser.parse_args([f"{flag}={text}"])).popitem()[1] == value
            continue
        with pytest.raises(UserError) as refusal:
            parser.parse_args([f"{flag}={text}"])
        said = one_line(refusal)
        assert flag in said and str(kind.range) in said and repr(text)[:40] in said


def ends(kind: type) -> list[tuple[str, float]]:
    """(field, value) of both ends of every range of a dataclass, and of its special value."""
    spans = [(f.name, f.metadata["range"], f.default) for f in dataclasses.fields(kind) if f.metadata["range"]]
    return [
        (name, type(default)(end))
        for name, span, default in spans
        for end in (span.least, span.most, span.special)
        if end is not None
    ]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_an_optimizer_at_the_ends_of_its_ranges_makes_finite_updates(schedule):
    import jax
    import jax.numpy as jnp

    from lm.optimizer import apply_updates, make_optimizer

    params = {"kernel": jnp.ones((3, 2)), "scale": jnp.ones(3)}
    for name, value in ends(Optimizer):
        config = dataclasses.replace(Optimizer(schedule=schedule, warmup_steps=1), **{name: value})
        optimizer = make_optimizer(config, 10)
        state = optimizer.init(params)
        updates, state = optimizer.update(jax.tree.map(lambda x: 0.5 * x, params), state, params)
        leaves = jax.tree.leaves(apply_updates(params, updates, state))
        assert all(jnp.isfinite(leaf).all() for leaf in leaves), (name, value)
