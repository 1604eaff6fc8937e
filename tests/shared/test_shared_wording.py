"""Text of others is shown so that it can be printed and read."""

from hypothesis import given, settings
from hypothesis import strategies as st
from unmemorize.shared.wording import bare, visible


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec=None)))
def test_visible_text_can_be_written_and_read_back(text):
    shown = visible(text)
    shown.encode("utf-8")
    assert not any(ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0 for c in shown)
    assert visible(shown) == shown
    plain = "Füchse, лиса, ثعلب, 狐, 🦊, نمی‌خواهم"
    assert visible(plain) == plain


def test_visible_shows_direction_overrides_and_lone_surrogates():
    assert visible("a\u202eb\ud800c\n") == "a<U+202E>b<U+D800>c␊"


def test_a_quoted_word_has_no_comma():
    assert [bare(word) for word in ("cupcake,", "end.", "a:b", "…", ",,")] == [
        "cupcake", "end", "a:b", "…", ",,"
    ]  # fmt: skip
