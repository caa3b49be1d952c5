"""TRL's SFTTrainer with PEFT as a contestant: contest A of the peers' kit with an adapter on all linear layers.

    PYTHONPATH=KIT $TORCH_PY benchmarks/contest_trl_lora.py --dtype float32 [--rank 16] [--microbatches 4]

The interpreter is TRL's own; KIT has `contests.py`. The base is in the contest's dtype, as `lm` has it, and the factors in float32.
"""

import argparse
import os
import random
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import contests
import datasets
import peft
import tokenizers
import torch
import transformers
import trl

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FIRST_WORD = 3  # smaller token ids are special


class Tick(transformers.TrainerCallback):
    """Ticks the kit's clock when training starts and after every step."""

    def __init__(self, clock):
        self.clock = clock

    def on_train_begin(self, *args, **kwargs):
        self.clock.tick()

    def on_step_end(self, *args, **kwargs):
        self.clock.tick()


def llama(m, dtype):
    config = transformers.LlamaConfig(
        vocab_size=m["vocab"], hidden_size=m["d_model"], intermediate_size=m["ffn"], num_hidden_layers=m["layers"],
        num_attention_heads=m["heads"], num_key_value_heads=m["kv_heads"], max_position_embeddings=1024,
        rms_norm_eps=m["norm_eps"], rope_theta=m["rope_theta"], tie_word_embeddings=m["tied"], bos_token_id=1,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype)


def tokenizer(vocab_size):
    """One word an id; the trainer asks for a tokenizer, though the rows are token ids already."""
    vocab = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>"])}
    vocab |= {f"w{i}": i for i in range(FIRST_WORD, vocab_size)}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<pad>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--microbatches", type=int, default=1, help="gradient accumulation steps; must divide the batch"
    )
    arguments = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    c, m, o = contests.CONTESTS["A"], contests.MODEL, contests.OPT
    clock = contests.Clock("A")
    rows = [
        {"input_ids": [random.randrange(FIRST_WORD, m["vocab"]) for _ in range(c["seq"])]}
        for _ in range(c["batch"] * clock.total)
    ]
    microbatches = min(arguments.microbatches, c["batch"])
    rows_per_forward = c["batch"] // microbatches
    trainer = trl.SFTTrainer(
        model=llama(m, getattr(torch, arguments.dtype)),
        processing_class=tokenizer(m["vocab"]),
        train_dataset=datasets.Dataset.from_list(rows),
        peft_config=peft.LoraConfig(
            r=arguments.rank, lora_alpha=2 * arguments.rank, lora_dropout=0.0, target_modules=LINEAR,
            task_type="CAUSAL_LM",
        ),
        callbacks=[Tick(clock)],
        args=trl.SFTConfig(
            output_dir=tempfile.mkdtemp(), max_steps=clock.total, use_cpu=True, max_length=c["seq"], packing=False,
            per_device_train_batch_size=rows_per_forward, learning_rate=o["lr"], lr_scheduler_type="constant",
            adam_beta1=o["b1"], adam_beta2=o["b2"], adam_epsilon=o["eps"], weight_decay=o["weight_decay"],
            max_grad_norm=o["clip"], optim="adamw_torch_fused", gradient_checkpointing=False,
            gradient_accumulation_steps=microbatches, bf16=arguments.dtype == "bfloat16", report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_num_workers=0,
        ),
    )  # fmt: skip
    shape = list(next(iter(trainer.get_train_dataloader()))["input_ids"].shape)
    assert shape == [rows_per_forward, c["seq"]], shape
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    trainer.train()
    contests.emit("trl+peft", "A", arguments.dtype, clock.result(), trained=trained)


if __name__ == "__main__":
    main()
