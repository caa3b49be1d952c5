"""A small tokenizer in the files that published models have, and chat templates of the kinds that there are."""

import functools
import json

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from lm.data.hub.tokenizer import HubTokenizer, TypedControl, with_options

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "</s>", "<s>")
PLAIN = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # added, and not special
TEXT = "the assistant answers a question of the user: system, what is it? 1 2 3 + - {} \n\n" * 40

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BLOCKS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMED = (  # a system message only before the last question, answers without white space around
    "{{ '<s>' }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' }}"
    "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}"
    "{{ m.content + '[/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + '</s>' }}{% endif %}{% endfor %}"
)
THINKING = (  # reasoning of the last answer only
    "{% for m in messages %}{% set content = m.content %}{% set why = m.reasoning_content or '' %}"
    "{% if m.role == 'assistant' and '</think>' in content %}"
    "{% set why = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n' + why + '\n</think>\n\n' }}{% endif %}"
    "{{ content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ROLES_AS_TEXT = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}"
    "{% if m.role == 'assistant' %}{{ '<|endoftext|>' }}{% endif %}{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|assistant|>\n' }}{% endif %}"
)
TOOLS = (  # definitions, calls, results, and reasoning
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}"
    "{{ '<tool_call>' + call.function.name + ' ' + call.function.arguments | tojson + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML, "blocks": BLOCKS, "trimmed": TRIMMED, "thinking": THINKING, "roles_as_text": ROLES_AS_TEXT
}  # fmt: skip


@functools.cache
def tokenizer_json() -> bytes:
    """A byte-level BPE with special tokens, and others that are none."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    library.train_from_iterator([TEXT], trainer)
    library.add_tokens(list(PLAIN))
    return library.to_str().encode()


def files(template: str | None = CHATML, **config) -> dict[str, bytes]:
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": "<s>"} | config
    found = {"tokenizer.json": tokenizer_json(), "tokenizer_config.json": json.dumps(settings).encode()}
    return found | ({} if template is None else {"chat_template.jinja": template.encode()})


@functools.cache
def tokenizer(template: str | None = CHATML, typed_control: TypedControl = "text") -> HubTokenizer:
    return HubTokenizer(with_options(files(template), typed_control, None))
