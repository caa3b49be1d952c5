"""lm/web/text.py: how much of a long or empty answer a page shows at first."""

from lm.web.text import beginning


def test_a_short_text_is_whole_and_a_long_one_is_cut_by_characters_or_lines():
    assert beginning("a\nb" * 5, 100) == "a\nb" * 5
    assert beginning("x" * 110, 100) == "x" * 110  # little would be cut
    assert beginning("x" * 500, 100) == "x" * 100
    assert beginning("\n" * 80, 420) == "\n" * 19
