"""GRPO in a custom two-turn environment: guess a number between 1 and 20. About two minutes on a CPU.

    lm run guess_number

An SFT stage imitates random guesses (guess_number.jsonl), then GRPO trains on the model's own guesses, to which the
environment replies "higher" or "lower". The environment is the class below; write another one in a file of your own.
"""

from pathlib import Path

from lm.experiment import GRPO, SFT, Eval, Experiment, Model, Optimizer, Source, Stage, Tokenizer

MOST, TURNS = 20, 2


class GuessNumber:
    """Environment: after a first wrong guess it replies whether the row's `secret` is higher or lower; two guesses in all."""

    columns = ("secret",)
    full_reward = 2.0

    @staticmethod
    def solution(task):
        return [str(task["secret"])]

    def reset(self, task):
        self.secret, self.guesses = int(task["secret"]), []
        return [{"role": "user", "content": f"I think of a number between 1 and {MOST}. Guess it."}]

    def step(self, completion):
        digits = completion.strip()
        self.guesses.append(int(digits) if digits.isascii() and digits.isdecimal() and len(digits) <= 4 else None)
        guess = self.guesses[-1]
        if guess in (None, self.secret) or len(self.guesses) == TURNS:
            return None
        return [{"role": "user", "content": "higher" if guess < self.secret else "lower"}]

    def reward(self):
        last = self.guesses[-1]
        near = 0.0 if last is None else max(0.0, 1 - abs(last - self.secret) / MOST)
        return {"found": float(last == self.secret), "near": near}


guesses = Source(str(Path(__file__).with_name("guess_number.jsonl")), holdout=0.2)

experiment = Experiment(
    name="guess_number",
    prompts=(),
    tokenizer=Tokenizer(vocab_size=300),
    model=Model(num_layers=2, embed_dim=64, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=128, max_len=96),
    stages=(
        Stage("sft", SFT(), (guesses,), Optimizer(peak_lr=3e-3), steps=150, batch_size=16, seq_len=96, save_every=150),
        Stage(
            "grpo",
            GRPO(environment="guess_number:GuessNumber", group_size=16, max_new_tokens=40),
            (guesses,),
            Optimizer(peak_lr=1e-3, warmup_steps=5),
            steps=60,
            batch_size=8,
            seq_len=96,
            save_every=60,
        ),
    ),
    evals=(Eval("guesses", guesses, environment="guess_number:GuessNumber", count=20, max_new_tokens=40),),
)
