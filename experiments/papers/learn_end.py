"""Does a model end its answers if the end token had no loss?"""

import dataclasses

from small_reasoner import experiment as base
from small_reasoner import quick as small

from lm.experiment import Experiment
from lm.papers.paper import Evidence, Finding, Paper, by_seed, difference, mean_text, where
from lm.sweep.statistics import paired
from lm.sweep.sweep import Sweep


def only_sft(e: Experiment) -> Experiment:
    return dataclasses.replace(e, stages=e.stages[:1])


END = {"learnt": None, "not learnt": {"sft.objective.learn_end": False}}

sweep = Sweep("learn_end", only_sft(base), {"end": END}, seeds=(0, 1, 2, 3))
quick = Sweep("learn_end_quick", only_sft(small), {"end": END})


def judge(evidence: Evidence) -> Finding:
    runs = evidence.results
    fields = {"ended by themselves": "eos_rate", "reward held out": "reward", "tokens an answer": "length"}
    table = {
        (end, field): by_seed(where(runs, end=end), lambda r, f=field: r.final("chains", f))
        for end in END
        for field in fields.values()
    }
    ended, worth = (paired(table["not learnt", field], table["learnt", field]) for field in ("eos_rate", "reward"))
    return Finding(
        verdict="holds"
        if ended.high < 0 and worth.high < 0
        else "does not hold"
        if ended.low > 0 or worth.low > 0
        else "undecided",
        reason=f"Not learning the end changes the part of answers that end by themselves by {difference(ended)}, and the "
        f"reward by {difference(worth)}.",
        columns=("end of the answer", *fields),
        rows=[(end, *(mean_text(table[end, field]) for field in fields.values())) for end in END],
    )


paper = Paper(
    "A model that is not trained on the end of its answers does not end them, and answers worse",
    "Practice: the end-of-turn token is often masked by mistake, as where it is also the padding token",
    judge,
    sweeps=("sweep",),
    quick=("quick",),
)
