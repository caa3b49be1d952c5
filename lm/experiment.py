"""Public names for experiment files: the dataclasses of an experiment, and functions that read, write and compare them.

They are defined in `lm/config/`, which imports nothing slow, so that `lm --help` stays fast.
"""

from lm.config.experiment import COLLECTED as COLLECTED
from lm.config.experiment import Eval as Eval
from lm.config.experiment import Experiment as Experiment
from lm.config.experiment import adapters_before as adapters_before
from lm.config.experiment import resolve_sources as resolve_sources
from lm.config.experiment import reward_names as reward_names
from lm.config.experiment import rows_per_example as rows_per_example
from lm.config.experiment import rows_per_update as rows_per_update
from lm.config.experiment import start_of as start_of
from lm.config.experiment import updates_per_step as updates_per_step
from lm.config.field import FUNCTION as FUNCTION
from lm.config.field import UserError as UserError
from lm.config.field import describe as describe
from lm.config.field import diff as diff
from lm.config.field import flatten as flatten
from lm.config.field import nearest as nearest
from lm.config.field import takes_function as takes_function
from lm.config.lora import LoRA as LoRA
from lm.config.model import Layer as Layer
from lm.config.model import Mesh as Mesh
from lm.config.model import Model as Model
from lm.config.model import RolloutMesh as RolloutMesh
from lm.config.model import Tokenizer as Tokenizer
from lm.config.objectives import *  # noqa: F403
from lm.config.rope import DynamicRope as DynamicRope
from lm.config.rope import LinearRope as LinearRope
from lm.config.rope import Llama3Rope as Llama3Rope
from lm.config.rope import LongRope as LongRope
from lm.config.rope import YarnRope as YarnRope
from lm.config.serialize import from_dict as from_dict
from lm.config.serialize import strict as strict
from lm.config.serialize import to_dict as to_dict
from lm.config.stage import Optimizer as Optimizer
from lm.config.stage import Source as Source
from lm.config.stage import Stage as Stage

# Former names, for files that import them.
rows_together = rows_per_example
MADE = COLLECTED
