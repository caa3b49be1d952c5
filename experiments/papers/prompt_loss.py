"""Is it better to train on the prompts too (Shi et al. 2024, arXiv:2405.14394)?"""

from learn_end import only_sft
from small_reasoner import experiment as base
from small_reasoner import quick as small

from lm.papers.paper import Evidence, Finding, Paper, by_seed, difference, mean_text, sign_verdict, where
from lm.sweep.statistics import paired
from lm.sweep.sweep import Sweep

LEARNT = {"answers": None, "prompts too": {"sft.objective.loss_on": "all"}}

sweep = Sweep("prompt_loss", only_sft(base), {"learnt": LEARNT}, seeds=(0, 1, 2, 3, 4, 5))
quick = Sweep("prompt_loss_quick", only_sft(small), {"learnt": LEARNT})


def judge(evidence: Evidence) -> Finding:
    runs = evidence.results
    rewards = {name: by_seed(where(runs, learnt=name), lambda r: r.final("chains", "reward")) for name in LEARNT}
    gain = paired(rewards["prompts too"], rewards["answers"])
    return Finding(
        verdict=sign_verdict(gain, +1),
        reason=f"Held-out reward with the prompts learnt too, less without: {difference(gain)}.",
        columns=("learnt", "reward held out"),
        rows=[(name, mean_text(rewards[name])) for name in LEARNT],
    )


paper = Paper(
    "To learn the prompts as well as the answers makes instruction tuning better",
    "Z. Shi et al., Instruction Tuning With Loss Over Instructions, arXiv:2405.14394, 2024",
    judge,
    sweeps=("sweep",),
    quick=("quick",),
)
