"""`lm data`: what is trained on, and only that, is marked; padding and packing are shown for what they are."""

import re

import numpy as np
import pytest

from lm.cli.data import DIM, GREEN, PLAIN, batch_lines, legend, prompt_lines, render_row
from lm.types import LabelledBatch, TokenBatch

WORDS = ["<pad>", "What", " is", " 2+2?", "\n", "It", " is", " 4.", "<|im_end|>", "\x1b[2J"]
TOKENS = [1, 2, 3, 4, 5, 6, 7, 8, 0, 0]
WEIGHTS = [0, 0, 0, 0, 1, 1, 1, 1, 0, 0]
ONE = [1] * 8 + [0, 0]


def decode(ids) -> str:
    return "".join(WORDS[i] for i in ids)


def test_brackets_stand_around_what_is_trained_on():
    assert render_row(TOKENS, WEIGHTS, ONE, decode, colour=False) == "What is 2+2?\n⟦It is 4.<|im_end|>⟧"


def test_green_is_what_is_trained_on_and_the_rest_is_dim():
    text = render_row(TOKENS, WEIGHTS, ONE, decode, colour=True)
    assert text == f"{DIM}What is 2+2?{PLAIN}\n{GREEN}It is 4.<|im_end|>{PLAIN}"


def test_both_forms_mark_the_same_tokens():
    weights = [0, 1, 0, 1, 1, 0, 1, 0, 0, 0]
    colours = render_row(TOKENS, weights, ONE, decode, colour=True)
    brackets = render_row(TOKENS, weights, ONE, decode, colour=False)
    green = re.findall(re.escape(GREEN) + r"([^\x1b]*)", colours)
    assert "".join(green) == "".join(re.findall("⟦(.*?)⟧", brackets, re.DOTALL)).replace("\n", "")


@pytest.mark.parametrize("colour", [False, True])
def test_padding_is_left_out_and_segments_are_told_apart(colour):
    text = render_row(TOKENS, WEIGHTS, [1] * 4 + [2] * 4 + [0, 0], decode, colour)
    assert "<pad>" not in text
    assert text.count("··· segment 2 ···") == 1 and "segment 1" not in text


def test_what_a_data_set_says_to_the_terminal_is_not_obeyed():
    text = render_row([9], [1], [1], decode, colour=True)
    assert text == f"{GREEN}␛[2J{PLAIN}"


def test_the_legend_wears_the_marks_that_it_explains():
    assert legend(False).startswith("⟦trained on⟧")
    assert GREEN in legend(True) and "⟦" not in legend(True)


def test_an_answer_that_is_judged_by_itself_shows_its_label():
    plain = make_batch(2)
    judged = LabelledBatch(**vars(plain), desirable=np.array([1, 0], np.float32), mismatched=plain)
    titles = [line for line in batch_lines(judged, decode, 2, colour=False) if "---" in line]
    assert "row 0 desirable:" in titles[0] and "row 1 undesirable:" in titles[1]


def make_batch(rows: int) -> TokenBatch:
    def tile(x, dtype) -> np.ndarray:
        return np.tile(np.array(x, dtype), (rows, 1))

    return TokenBatch(tile(TOKENS, np.int32), tile(WEIGHTS, np.float32), tile(ONE, np.int32), tile(range(10), np.int32))


def test_rows_come_with_their_counts():
    lines = list(batch_lines(make_batch(4), decode, rows=3, colour=False))
    assert [line.strip() for line in lines[::2]] == [
        f"--- row {i}: 8 tokens, 4 trained on, 2 padding ---" for i in range(3)
    ]


def test_preference_rows_come_in_pairs():
    lines = list(batch_lines(make_batch(4), decode, rows=5, colour=False, paired=True))
    titles = [re.search(r"--- (.*?):", line)[1] for line in lines[::2]]
    assert titles == ["pair 0 chosen", "pair 0 rejected", "pair 1 chosen", "pair 1 rejected"]


def test_prompts_show_the_answer_that_they_are_judged_by():
    class Prompts:
        tokens = np.array([[0, 0, 1, 2, 3]], np.int32)
        lengths = np.array([3], np.int32)
        rows = ({"question": "…", "answer": "It is 4.", "final": "4"},)

    lines = list(prompt_lines(Prompts(), decode, rows=2, colour=False))
    assert lines == ["\n--- prompt 0: 3 tokens ---", "What is 2+2?", "right answer: 4"]
