"""Converts a tokenizer trained by lm to tokenizer.json and the files beside it, for transformers and other libraries."""

from __future__ import annotations

import json
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as sentencepiece_model

from lm.data.chatml import END_OF_TEXT, SPECIALS, TURN_END, TURN_START
from lm.data.hub import files as hub_files
from lm.experiment import UserError

SPACE = "\u2581"  # sentencepiece's own name for a space
TEMPLATE = (
    "{% for message in messages %}{{ '" + TURN_START + "' + message['role'] + '\\n' + message['content'] + '" + TURN_END
    + "\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '" + TURN_START + "assistant\\n' }}{% endif %}"
)  # fmt: skip
"""`render_chatml` as a chat template."""
ROLES = {"bos_token": END_OF_TEXT, "eos_token": TURN_END, "pad_token": END_OF_TEXT}


def published_files(model: bytes, max_len: int) -> dict[str, bytes]:
    """The files by name: the tokenizer, its settings with the chat template, and the ids that end an answer.

    Args:
        model: a serialised sentencepiece model.
        max_len: maximum length of a text in tokens, for the settings.

    Raises:
        UserError: the model was not trained by lm: it is not BPE, or has fixed pieces other than newline.
    """
    vocabulary = _bpe(model)
    added = [
        {"id": vocabulary["vocab"][name], "content": name, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for name in SPECIALS
    ]  # fmt: skip
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": None, "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": vocabulary,
    }  # fmt: skip
    settings = ROLES | {
        "added_tokens_decoder": {str(one["id"]): {k: v for k, v in one.items() if k != "id"} for one in added},
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_len,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    end, turn_end = (vocabulary["vocab"][name] for name in (END_OF_TEXT, TURN_END))
    generation = {"bos_token_id": end, "eos_token_id": [turn_end, end], "pad_token_id": end}
    found = {
        hub_files.TOKENIZER_JSON: tokenizer, hub_files.CONFIG: settings, hub_files.SPECIAL_MAP: ROLES,
        hub_files.GENERATION: generation,
    }  # fmt: skip
    return {name: (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode() for name, value in found.items()}


def _bpe(model: bytes) -> dict[str, Any]:
    """Vocabulary and merges for `tokenizer.json` that give the same ids as the sentencepiece model.

    Pieces have real spaces, so that texts are split unchanged; a U+2581 in a text becomes bytes, as in the tokenizer of lm.
    """
    proto = sentencepiece_model.ModelProto.FromString(model)  # type: ignore[attr-defined]
    kinds = sentencepiece_model.ModelProto.SentencePiece.Type  # type: ignore[attr-defined]
    fixed = [one.piece for one in proto.pieces if one.type in (kinds.USER_DEFINED, kinds.UNUSED) and len(one.piece) > 1]
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE or fixed:
        raise UserError(
            f"the tokenizer is a sentencepiece model {f'with the fixed piece {fixed[0]!r}' if fixed else 'without merges'}; "
            "tokenizer.json is written only for those that lm trains: BPE with newline as the only fixed piece"
        )
    scores = {one.piece.replace(SPACE, " "): one.score for one in proto.pieces if one.type == kinds.NORMAL}
    merged = sorted((piece for piece in scores if len(piece) > 1), key=lambda piece: -scores[piece])
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": {one.piece.replace(SPACE, " "): index for index, one in enumerate(proto.pieces)},
        "merges": [pair for piece in merged if (pair := _last_merge(piece, scores))],
    }


def _last_merge(piece: str, scores: dict[str, float]) -> list[str] | None:
    """The two pieces whose merge gives this piece when its text is tokenised alone; None if no merge gives it.

    sentencepiece merges any two neighbours whose joined text is a piece, best score first, then leftmost. Until a merge crosses
    the edge of the piece's text, merges inside do not depend on the text around it, so that exactly one pair gives the piece.
    """
    parts = list(piece)
    while len(parts) > 2:
        pairs = [(scores[both], -at) for at in range(len(parts) - 1) if (both := parts[at] + parts[at + 1]) in scores]
        if not pairs:
            return None
        at = -max(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts
