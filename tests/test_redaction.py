"""Secrets in text: found by value in whatever form they are printed, and where they are cut in two."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from flash.redaction import REDACTED, SHORTEST_SECRET, Redactor

SECRET = "abcabcabd-9f8e7d"


def test_every_string_of_a_value_is_redacted():
    value = {"text": f"a {SECRET} b", SECRET: [{"deep": (SECRET, 1, None)}]}
    redacted = Redactor([SECRET, "short"]).value(value)
    assert redacted == {"text": f"a {REDACTED} b", REDACTED: [{"deep": [REDACTED, 1, None]}]}


def test_short_values_are_left_alone():
    assert Redactor(["1234567", ""]).text("1234567 is a number") == "1234567 is a number"


def test_escaped_and_quoted_forms_are_found():
    secret = 'pass"wörd\n/with+parts'
    redactor = Redactor([secret])
    for printed in (json.dumps(secret), repr(secret), "https://x/?key=pass%22w%C3%B6rd%0A%2Fwith%2Bparts"):
        assert "wörd" not in redactor.text(printed) and "w%C3%B6rd" not in redactor.text(printed)


def test_of_two_secrets_of_which_one_holds_the_other_nothing_stays():
    assert Redactor(["12345678", "12345678-and-more"]).text("x12345678-and-morex") == f"x{REDACTED}x"


@given(st.text("abcd9-", max_size=30), st.integers(1, len(SECRET) - 1), st.text("abcd9-", max_size=30))
def test_a_secret_cut_in_two_leaves_no_part_of_eight_characters(before, cut, after):
    redactor = Redactor([SECRET])
    first, second = redactor.piece(before + SECRET[:cut]), redactor.piece(SECRET[cut:] + after)
    if cut >= SHORTEST_SECRET:
        assert SECRET[:cut] not in first
    if len(SECRET) - cut >= SHORTEST_SECRET:
        assert SECRET[cut:] not in second


def test_a_piece_keeps_what_is_no_part_of_a_secret():
    redactor = Redactor([SECRET, "canary-of-the-test"])
    assert redactor.piece("abcabcab is not at the end") == "abcabcab is not at the end"
    assert redactor.piece("a canary-of and canary-of-the") == f"a canary-of and {REDACTED}"
    assert redactor.piece("the-test, and the-test") == f"{REDACTED}, and the-test"
    assert redactor.piece(f"all of {SECRET} is gone") == f"all of {REDACTED} is gone"
