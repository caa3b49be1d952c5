"""Base class of the objectives' configs: what data, checks, plan, sweeps and pages need to know, without importing jax."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lm.config.field import UserError, is_function_name, knob
from lm.config.model import Model

if TYPE_CHECKING:
    from lm.config.stage import Stage

DataKind = Literal["text", "conversations", "pairs", "labelled", "prompts"]
ReadWith = Mapping[str, tuple[str, tuple[str, ...]]]
"""Field -> (other field, its values that use the field); with any other value the field must keep its default."""
VERIFIER_ARGUMENTS = "row, completion"
WARNING_STEPS = 5  # steps in a row (or all steps of a shorter stage) before a stage is reported as learning nothing


@dataclass(frozen=True)
class MetricChart:
    """A chart of metrics over the steps of a stage, drawn if the stage has one of them.

    title: title of the chart.
    curves: {name in metrics.jsonl: label of the curve}; a name with a final `*` stands for all metrics with that prefix, each
        labelled by the rest of its name.
    note: one sentence that says what is shown and what a healthy curve looks like.
    percent: whether the axis is in percent if all values are between 0 and 1.
    without: metrics that a `*` does not stand for.
    """

    title: str
    curves: Mapping[str, str]
    note: str = ""
    percent: bool = False
    without: tuple[str, ...] = ()

    def found_in(self, metrics: Iterable[str]) -> dict[str, str]:
        """{metric: label} of the curves of this chart, for the names of the metrics that a stage has."""
        found = {}
        for key, label in self.curves.items():
            for name in (name for name in metrics if fnmatchcase(name, key) and name not in self.without):
                found[name] = label if name == key else name.removeprefix(key[:-1])
        return found


@dataclass(frozen=True)
class MetricWarning:
    """A warning given when `shows` is true of the metrics of `steps` steps in a row.

    `text` is a format string, filled with the fields of the objective and the metrics of the last of these steps.
    """

    shows: Callable[[Mapping[str, Any]], bool]
    text: str
    steps: int = WARNING_STEPS


@dataclass(frozen=True)
class ObjectiveConfig:
    """Base class of an objective's config: its knobs, and properties of its algorithm that need no jax.

    A subclass overrides what differs from the defaults below.

    data: kind of examples that a stage reads. A class that reads prompts has the fields max_new_tokens, temperature,
        verifier and reward_seconds, and if it trains tis_clip.
    produces: result of a stage: a language model ("policy"), a reward model ("scorer"), or rows for later stages.
    learns_preferences: whether held-out pairs are evaluated with the implicit reward, relative to the model before the first
        stage of this kind.
    functions: fields that take a user's FILE:FUNCTION, with the arguments of that function.
    reward_model_field: name of the field that lists reward models.
    takes_presets: whether the named presets (`lm/config/presets.py`) are values of this class.
    caption: end of the sentence about the stage in the report, after the stage's name.
    charts, small_charts: charts of the report beside loss, learning rate, gradient norm and speed.
    metric_warnings: warnings derived from the metrics, by kind.
    """

    data: ClassVar[DataKind]
    produces: ClassVar[Literal["policy", "scorer", "rows"]] = "policy"
    learns_preferences: ClassVar[bool] = False
    functions: ClassVar[Mapping[str, str]] = {}
    reward_model_field: ClassVar[str] = ""
    takes_presets: ClassVar[bool] = False
    caption: ClassVar[str]
    charts: ClassVar[tuple[MetricChart, ...]] = ()
    small_charts: ClassVar[tuple[MetricChart, ...]] = ()
    metric_warnings: ClassVar[Mapping[str, MetricWarning]] = {}

    @property
    def verifier_names(self) -> tuple[str, ...]:
        """Names of the verifiers that score the completions."""
        verifier = getattr(self, "verifier", "")
        return (verifier,) if verifier else ()

    @property
    def environment_name(self) -> str:
        """The environment that replies to its completions and gives their rewards; empty: the verifiers do."""
        return ""

    @property
    def turn_limit(self) -> int:
        """Maximum number of the model's turns in an episode; 0: no limit."""
        return 0

    @property
    def trains(self) -> bool:
        """Whether the stage has training steps."""
        return self.produces != "rows"

    @property
    def samples(self) -> bool:
        """Whether the stage samples completions for its prompts."""
        return self.data == "prompts"

    @property
    def data_options(self) -> dict[str, Any]:
        """Options of how rows become examples, as arguments of the function of its data kind in `lm/data/supply.py`."""
        return {}

    @property
    def rows_per_example(self) -> int:
        """Rows of a batch that belong to one example and stay in one microbatch: 2 for a preference pair, else 1."""
        return 2 if self.data == "pairs" else 1

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates in one step of the loop; more than 1 only where several updates share a rollout."""
        return 1

    def rows_per_update(self, batch_size: int) -> int:
        """Rows of tokens in one optimizer update, over all devices."""
        return batch_size * self.rows_per_example * self.completions_per_prompt // self.updates_per_epoch

    @property
    def completions_per_prompt(self) -> int:
        """Completions sampled for one prompt, in neighbouring rows of a rollout."""
        return 1

    @property
    def max_rollouts(self) -> int:
        """Maximum number of rollouts in one step."""
        return 1

    @property
    def updates_per_epoch(self) -> int:
        """Updates in one epoch over a rollout, in which each row is used once."""
        return self.updates_per_step

    @property
    def samples_as_trained(self) -> bool:
        """Whether the sampler computes what the trainer does, without quantised weights or cache."""
        return True

    @property
    def sampler_cache(self) -> str:
        """Numbers in the sampler's cache of keys and values: "same" as it computes with, or "int8"."""
        return "same"

    @property
    def staleness(self) -> int:
        """Training steps between the weights that sample a step's completions and those before the step."""
        return 0

    @property
    def has_ratios(self) -> bool:
        """Whether an importance correction of the sampler is possible, `tis_clip`."""
        return self.samples

    @property
    def corrects_sampler(self) -> bool:
        """Whether old log-probabilities are recomputed by the trainer, beside the sampler's, for an importance correction."""
        return False

    @property
    def ratio_bounds(self) -> tuple[float, float]:
        """Bounds of the importance ratio, within which a token has a gradient."""
        return 0.0, math.inf

    @property
    def reward_model_names(self) -> tuple[str, ...]:
        """Reward models used by the stage, as NAME or RUN:NAME."""
        return ()

    @property
    def teacher_name(self) -> str:
        """The model that the stage learns from, beside the model before it: NAME, RUN:NAME or open weights; empty: none."""
        return ""

    @property
    def privileged_prompt(self) -> str:
        """The last turn of a prompt with what the policy does not read in training: {prompt} and columns of the row; empty: none."""
        return ""

    @property
    def reads_answers(self) -> bool:
        """Whether a stage that samples also trains on the answers of its rows."""
        return False

    @property
    def caches_reference(self) -> bool:
        """Whether the reference's log-probabilities are computed once, before the first step, and stored in the batches."""
        return False

    def trained_model(self, model: Model) -> Model:
        """Config of the trained model of a stage that starts from a language model of config `model`."""
        return model

    def check(self, stage: Stage, model: Model) -> None:
        """Raise UserError for combinations of fields that make no sense, with field, value and what would work."""


def max_new_tokens_knob() -> Any:
    """The `max_new_tokens` field."""
    text = "maximum length of a completion in tokens; a prompt may have up to seq_len - max_new_tokens"
    return knob(64, text, least=1, most=2**26)


def temperature_knob() -> Any:
    """The `temperature` field of objectives that train on their samples."""
    return knob(1.0, "sampling temperature, also applied to the log-probabilities in the loss", least=0.01, most=100)


def entropy_coef_knob() -> Any:
    """The `entropy_coef` field."""
    return knob(0.0, "weight of the entropy bonus (mean over tokens); 0 disables it", least=0, most=1000)


def tis_clip_knob() -> Any:
    """The `tis_clip` field, which turns on the importance correction for the mismatch of sampler and trainer."""
    text = "upper bound of the importance weight π_trainer / π_sampler (TIS), usually 2; 0: no correction"
    return knob(0.0, text, least=1e-3, most=1e6, special=0)


def max_staleness_knob() -> Any:
    """The `max_staleness` field, which lets the rollouts of later steps be sampled while a step trains."""
    text = (
        "training steps between the weights that sample a step's completions and those that it trains; the rollout of a later step is "
        "sampled while this one trains; 0: each step samples with its own weights, then trains"
    )
    return knob(0, text, least=0, most=64)


def check_staleness(stage: Stage) -> None:
    """Raise UserError if the rollouts that max_staleness keeps in flight are more than the stage has steps."""
    most = stage.objective.staleness
    if most >= stage.steps:
        raise UserError(
            f"{stage.name}.objective.max_staleness is {most} and {stage.name}.steps is {stage.steps}: every step would train on "
            f"completions of the model before the stage; max_staleness should be at most {stage.steps - 1}, or steps at least {most + 1}"
        )


def reward_seconds_knob() -> Any:
    """The `reward_seconds` field, a time limit for one reward."""
    text = "time limit of the verifier for one completion, in seconds; a verifier that takes longer is stopped and the reward is 0"
    return knob(10.0, text, above=0, most=10**6)


def environment_knob() -> Any:
    """The `environment` field, which names a built-in environment or a class of the user's own."""
    text = (
        "environment that replies between the model's turns and gives the rewards: countdown, calculator, python, search:FILE, gym:NAME, or "
        "FILE:CLASS of your own; empty: single-turn answers scored by the verifier"
    )
    return knob("", text)


def max_turns_knob() -> Any:
    """The `max_turns` field, the budget of turns of an episode."""
    text = "maximum number of the model's turns in an environment; 0: as many as fit in max_new_tokens"
    return knob(0, text, least=1, most=10**6, special=0)


def check_environment(where: str, environment: str, verifiers: tuple[str, ...], max_turns: int) -> None:
    """Raise UserError if `environment` is combined with a verifier, or `max_turns` is without one; `where` prefixes the field names."""
    if max_turns and not environment:
        raise UserError(f"{where}.max_turns is {max_turns}, and there is no {where}.environment: an answer is one turn")
    if environment and verifiers != ("answer",):
        raise UserError(
            f"{where}.environment is {environment}, which gives its own rewards, so {where}.verifier {', '.join(verifiers)} "
            "would not be used: leave one of the two out"
        )


COLUMN = re.compile(r"\{(\w+)\}")
"""A column's name in a privileged prompt."""
PROMPT = "prompt"  # stands for the text of the prompt's last turn in it


def check_privileged_prompt(where: str, template: str) -> None:
    """Raise UserError if a privileged prompt lacks {prompt} or has no column beside it; `where` is its dotted name."""
    columns = COLUMN.findall(template)
    if template and (PROMPT not in columns or set(columns) == {PROMPT}):
        raise UserError(
            f"{where} is {template!r}; it should have {{prompt}} and the name of at least one column, as "
            "'{prompt} The answer is {final}.', or be empty"
        )


TIS_LEVEL = (
    "token",
    "level of the importance weight (tis_clip): per token, or per sequence, the product over its tokens",
)
TIS_MODE = (
    "truncate",
    "importance weights above tis_clip are set to tis_clip; mask: set to 0, also those below tis_low",
)
TIS_LOW = (0.0, "tis_mode mask: lower bound of the importance weight; 0: none")
TIS_FIELDS = {"tis_level": TIS_LEVEL, "tis_mode": TIS_MODE, "tis_low": TIS_LOW}
"""Default and help of the importance-correction fields that GRPO and PPO share."""


def check_sampler_correction(where: str, o: Any) -> None:
    """Raise UserError if the importance-correction fields (`tis_*`) contradict each other."""
    changed = [name for name, (default, _) in TIS_FIELDS.items() if getattr(o, name) != default]
    if changed and not o.tis_clip:
        raise UserError(
            f"{where}.{changed[0]} is {getattr(o, changed[0])} and tis_clip is 0, which disables the importance correction; "
            f"tis_clip should be above 0, for instance 2, or {changed[0]} {TIS_FIELDS[changed[0]][0]}"
        )
    if o.tis_low and o.tis_mode != "mask":
        raise UserError(
            f"{where}.tis_low is {o.tis_low} and tis_mode is {o.tis_mode}, which has no lower bound; tis_low should be 0, or tis_mode mask"
        )
    if o.tis_low > o.tis_clip:
        raise UserError(
            f"{where}.tis_low is {o.tis_low} and tis_clip is {o.tis_clip}; tis_low should be at most tis_clip"
        )


def check_read_with(where: str, o: Any, readers: ReadWith) -> None:
    """Raise UserError if a field is set that is not used with the value of another field.

    A user's own loss may use any field.
    """
    for name, (other, values) in readers.items():
        value, default, found = getattr(o, name), getattr(type(o), name), getattr(o, other)
        chosen = found if isinstance(found, tuple) else (found,)
        if value != default and not any(one in values or is_function_name(one) for one in chosen):
            raise UserError(
                f"{where}.{name} is {value} and {other} is {', '.join(chosen)}, which does not use it; {name} should be {default}, "
                f"or {other} {' or '.join(values)}"
            )


def check_label_smoothing(where: str, smoothing: float, losses: tuple[str, ...], readers: frozenset[str]) -> None:
    """Raise UserError if label smoothing is set and none of the losses uses it; `where` is the objective's dotted name."""
    if smoothing and readers.isdisjoint(losses) and not any(map(is_function_name, losses)):
        raise UserError(
            f"{where}.label_smoothing is {smoothing}, which {', '.join(losses)} does not use; "
            f"it should be 0, or the loss one of {', '.join(sorted(readers))}"
        )


# ---- charts and warnings that several objectives share -------------------------------------------------------------

REWARD = MetricChart("Reward", {"reward": "mean of the rollouts"}, "Healthy: rises, then flattens out.", percent=True)
LENGTH_NOTE = "Mean sampled tokens; healthy: well below max_new_tokens."
COMPLETION_LENGTH = MetricChart("Completion length", {"completion_length": "tokens"}, LENGTH_NOTE)
ENTROPY = MetricChart("Entropy", {"entropy": "nats per token"}, "Healthy: falls slowly, without collapsing to 0.")
ENDED = MetricChart("Completions that ended", {"eos_rate": ""}, "Not cut off; healthy: close to 100 %.", percent=True)
KL_TO_START = MetricChart("KL to the start", {"kl": ""}, "Nats, to the model before the stage; healthy: bounded.")
STALENESS = MetricChart(
    "Age of the sampler's weights", {"staleness": ""}, "Training steps behind the policy, at most max_staleness."
)
LOG_RATIO = MetricChart(
    "Log-ratio to the sampler's weights",
    {"log_ratio_mean": "mean", "log_ratio_p99": "99th percentile"},
    "|Δ log p| of a token before the step, with max_staleness; healthy: small and steady.",
)
CHOSEN_REJECTED = {"reward_chosen": "chosen", "reward_rejected": "rejected"}
IMPLICIT_NOTE = "Scaled log-probability, relative to the reference if any; healthy: the gap grows."
IMPLICIT_REWARD = MetricChart("Implicit reward", CHOSEN_REJECTED, IMPLICIT_NOTE)
PAIR_CHARTS = (
    MetricChart("Preference accuracy", {"reward_accuracy": ""}, "Healthy: rises from 50 %.", percent=True),
    IMPLICIT_REWARD,
    MetricChart("Reward margin", {"reward_margin": ""}, "Chosen minus rejected reward; healthy: rises from 0."),
)
SAMPLING_WARNINGS: dict[str, MetricWarning] = {
    "truncated": MetricWarning(
        lambda line: line.get("eos_rate") == 0,
        "at step {step} every answer was cut off at max_new_tokens (eos_rate 0): the policy gets no signal to end its answers. "
        "A larger max_new_tokens or more SFT before this stage helps",
        steps=1,
    ),
    "mostly_truncated": MetricWarning(
        lambda line: line.get("eos_rate", 1) < 0.5,
        "in the {steps} steps up to step {step} more than half of the answers were cut off at max_new_tokens (eos_rate {eos_rate:.2g}): "
        "their rewards are of unfinished answers. A larger max_new_tokens, or a penalty on length, helps",
    ),
    "reward_timeouts": MetricWarning(
        lambda line: line.get("reward_timeouts", 0) > 0,
        "at step {step} {reward_timeouts:.0f} rewards by {scored_by} took longer than objective.reward_seconds ({reward_seconds:g} s; "
        "for formulas at most 5 s), or their judge was down that long, and were set to 0; see the metric reward_timeouts",
        steps=1,
    ),
}
