"""What every objective's config says of its algorithm to code that imports no jax: data, checks, plan, sweep and pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lm.config.field import UserError, is_function_name, knob
from lm.config.model import Model

if TYPE_CHECKING:
    from lm.config.stage import Stage

DataKind = Literal["text", "conversations", "pairs", "labelled", "prompts"]
ReadWith = Mapping[str, tuple[str, tuple[str, ...]]]
"""Fields that may differ from their defaults only where another field, of a name or several, has one of these values."""
VERIFIER_ARGUMENTS = "row, completion"
SIGN_STEPS = 5  # in a row, or all of a shorter stage, before a stage is said to learn nothing


@dataclass(frozen=True)
class MetricChart:
    """A chart of metrics over the steps of a stage: its title, {name in metrics.jsonl: label of its curve}, its axis."""

    title: str
    curves: Mapping[str, str]
    percent: bool = False  # the axis is in percent where all values are parts of 1


@dataclass(frozen=True)
class Sign:
    """A warning that the metrics of `steps` steps in a row give; `text` is filled from the last of them and the objective."""

    shows: Callable[[Mapping[str, Any]], bool]
    text: str
    steps: int = SIGN_STEPS


@dataclass(frozen=True)
class ObjectiveConfig:
    """An objective's fields, and what is asked of its algorithm without jax; a class states what differs from these answers.

    data: kind of the examples that a stage reads. Where it is prompts, a class has the fields max_new_tokens, temperature,
        verifier, reward_seconds and tis_clip.
    produces: what a stage leaves: a language model, a reward model (scorer), or rows for later stages.
    learns_preferences: held-out pairs are compared with the model that entered the first stage of this kind.
    functions: fields that take a function of the user's own, with the arguments it is called with.
    reward_model_field: the field that names reward models.
    takes_presets: whether the named presets (`lm/config/presets.py`) are values of this class.
    caption: what the report says after the stage's name.
    charts, small_charts: what the report draws beside loss, learning rate, gradient norm and speed.
    signs: warnings that its metrics may give, by kind.
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
    signs: ClassVar[Mapping[str, Sign]] = {}

    @property
    def verifier_names(self) -> tuple[str, ...]:
        """The verifiers that judge its completions."""
        verifier = getattr(self, "verifier", "")
        return (verifier,) if verifier else ()

    @property
    def environment_name(self) -> str:
        """The environment, FILE:CLASS, that replies to its completions and gives their rewards; empty: the verifiers do."""
        return ""

    @property
    def trains(self) -> bool:
        """Whether the stage has training steps."""
        return self.produces != "rows"

    @property
    def samples(self) -> bool:
        """Whether the stage samples completions of its prompts."""
        return self.data == "prompts"

    @property
    def data_options(self) -> dict[str, Any]:
        """What makes rows of its kind of data differ, as arguments of the function in `lm/data/supply.py`."""
        return {}

    @property
    def rows_per_example(self) -> int:
        """Rows of a batch that no microbatch may part: the two of a pair."""
        return 2 if self.data == "pairs" else 1

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates in one step of the loop: several only where they share a rollout."""
        return 1

    def rows_per_update(self, batch_size: int) -> int:
        """Rows of tokens in one optimizer update, over all devices."""
        return batch_size * self.rows_per_example * self.completions_per_prompt // self.updates_per_epoch

    @property
    def completions_per_prompt(self) -> int:
        """Completions sampled for one prompt; neighbouring rows of a rollout."""
        return 1

    @property
    def max_rollouts(self) -> int:
        """Most rollouts in one step."""
        return 1

    @property
    def updates_per_epoch(self) -> int:
        """Updates, the first of a step, that see each row of a rollout once."""
        return self.updates_per_step

    @property
    def samples_as_trained(self) -> bool:
        """Whether the sampler has the weights that are trained, not quantised ones."""
        return True

    @property
    def corrects_sampler(self) -> bool:
        """Whether the old policy of a rollout is the trainer's, with the sampler's log-probabilities kept beside it."""
        return False

    @property
    def reward_model_names(self) -> tuple[str, ...]:
        """Reward models that the stage reads, as NAME or RUN:NAME."""
        return ()

    @property
    def caches_reference(self) -> bool:
        """Whether the reference's log-probabilities are computed before the first step and put into the batches."""
        return False

    def trained_model(self, model: Model) -> Model:
        """The config of the model that is trained, where a language model of config `model` enters."""
        return model

    def check(self, stage: Stage, model: Model) -> None:
        """Raises UserError, with the field, its value and what would work, for what the ranges of single fields allow."""


def max_new_tokens_knob() -> Any:
    """The field that limits a completion."""
    text = "longest completion, in tokens; prompts may have seq_len less this"
    return knob(64, text, least=1, most=2**26)


def temperature_knob() -> Any:
    """The field of the sampling temperature of what trains on its samples."""
    return knob(1.0, "sampling temperature, in the log-probabilities too", least=0.01, most=100)


def entropy_coef_knob() -> Any:
    """The field of the entropy bonus."""
    return knob(0.0, "weight of the entropy bonus, a mean over tokens", least=0, most=1000)


def tis_clip_knob() -> Any:
    """The field that turns on the correction of what sampler and trainer differ by."""
    text = (
        "truncated importance sampling (TIS) for the mismatch of sampler and trainer: tokens are weighted by how much "
        "likelier they are to the trainer, at most this; 2 is usual; 0: none"
    )
    return knob(0.0, text, least=1e-3, most=1e6, special=0)


def reward_seconds_knob() -> Any:
    """The field that limits the time of a reward."""
    text = "seconds that the verifier may take for one completion; then it is stopped, and the reward is 0"
    return knob(10.0, text, above=0, most=10**6)


def environment_knob() -> Any:
    """The field that names an environment."""
    text = "environment of your own, FILE:CLASS, with replies between the model's turns and its own rewards; empty: the verifier judges one answer"
    return knob("", text)


def check_environment(where: str, environment: str, verifiers: tuple[str, ...]) -> None:
    """Raises UserError where `environment` names no class, or a verifier too; `where` is what the fields belong to."""
    if environment and not is_function_name(environment):
        raise UserError(f"{where}.environment is {environment!r}; it should be FILE:CLASS, for instance my_file:Guess")
    if environment and verifiers != ("answer",):
        raise UserError(
            f"{where}.environment {environment} gives its own rewards, and {where}.verifier {', '.join(verifiers)} would not be asked: "
            "leave one of them out"
        )


TIS_LEVEL = ("token", "the importance correction is by token, or one for the completion: the product of its tokens'")
TIS_MODE = ("truncate", "importance weights beyond the largest are set to it, or to 0 (then also those below tis_low)")
TIS_LOW = (0.0, "tis_mode mask: least importance weight that is kept")
TIS_FIELDS = {"tis_level": TIS_LEVEL, "tis_mode": TIS_MODE, "tis_low": TIS_LOW}
"""Default and help of the fields of the importance correction, which GRPO and PPO have."""


def check_sampler_correction(where: str, o: Any) -> None:
    """Raises UserError where a field of the importance correction is set and another makes it meaningless."""
    changed = [name for name, (default, _) in TIS_FIELDS.items() if getattr(o, name) != default]
    if changed and not o.tis_clip:
        raise UserError(
            f"{where}.{changed[0]} is {getattr(o, changed[0])} and tis_clip is 0, which corrects nothing; tis_clip should be "
            f"above 0, for instance 2, or {changed[0]} {TIS_FIELDS[changed[0]][0]}"
        )
    if o.tis_low and o.tis_mode != "mask":
        raise UserError(
            f"{where}.tis_low is {o.tis_low} and tis_mode is {o.tis_mode}, which has no lower bound; tis_low should be 0, or tis_mode mask"
        )
    if o.tis_low > o.tis_clip:
        raise UserError(f"{where}.tis_low is {o.tis_low} and tis_clip is {o.tis_clip}; tis_low should be the smaller")


def check_read_with(where: str, o: Any, readers: ReadWith) -> None:
    """Raises UserError where a field is set that nothing reads, since another field has not one of the values that do.

    Losses of the user's own may read any field.
    """
    for name, (other, values) in readers.items():
        value, default, found = getattr(o, name), getattr(type(o), name), getattr(o, other)
        chosen = found if isinstance(found, tuple) else (found,)
        if value != default and not any(one in values or is_function_name(one) for one in chosen):
            raise UserError(
                f"{where}.{name} is {value} and {other} is {', '.join(chosen)}, which does not read it; {name} should be {default}, "
                f"or {other} {' or '.join(values)}"
            )


def check_label_smoothing(where: str, smoothing: float, losses: tuple[str, ...], readers: frozenset[str]) -> None:
    """Raises UserError where label smoothing is set and no loss reads it; `where` is the objective in dotted form."""
    if smoothing and readers.isdisjoint(losses) and not any(map(is_function_name, losses)):
        raise UserError(
            f"{where}.label_smoothing is {smoothing}, which {', '.join(losses)} does not read; "
            f"it should be 0, or the loss one of {', '.join(sorted(readers))}"
        )


# ---- charts and signs that several objectives share ----------------------------------------------------------------

COMPLETION_LENGTH = MetricChart("Completion length", {"completion_length": "tokens"})
ENTROPY = MetricChart("Entropy", {"entropy": "nats a token"})
ENDED = MetricChart("Ended itself", {"eos_rate": ""}, percent=True)
PAIR_CHARTS = (
    MetricChart("Pairs ranked right", {"reward_accuracy": "training pairs"}, percent=True),
    MetricChart("Implicit reward", {"reward_chosen": "chosen", "reward_rejected": "rejected"}),
    MetricChart("Margin", {"reward_margin": "chosen less rejected"}),
)
SAMPLING_SIGNS: dict[str, Sign] = {
    "truncated": Sign(
        lambda line: line.get("eos_rate") == 0,
        "none of the answers of step {step} ended by itself: the policy gets no signal to end its answers; a longer max_new_tokens, or "
        "more instruction tuning before, helps (eos_rate in the metrics tells when it passes)",
        steps=1,
    ),
    "reward_timeouts": Sign(
        lambda line: line.get("reward_timeouts", 0) > 0,
        "{reward_timeouts:.0f} rewards of step {step} took longer than {reward_seconds:g} s (objective.reward_seconds; formulas "
        "are compared for 5 s at most) and count as 0; the metric reward_timeouts counts them",
        steps=1,
    ),
}
