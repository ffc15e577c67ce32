"""A document's side depends on the document alone."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data.holdout import choose_threshold, digest, is_held_out
from train.errors import UserError

TEXTS = [f"document number {n}" for n in range(4000)]


def sides(texts, threshold):
    return {text: is_held_out(digest(text), threshold) for text in texts}


def test_the_rule_is_the_hash_under_the_threshold():
    threshold = choose_threshold(TEXTS, 0.25)
    assert threshold == 1 << 62
    for text in TEXTS[:50]:
        assert is_held_out(digest(text), threshold) == (hashlib.sha256(text.encode()).digest()[0] < 64)


def test_the_share_is_about_that_asked_for():
    held_out = sum(sides(TEXTS, choose_threshold(TEXTS, 0.05)).values())
    assert abs(held_out - 200) < 5 * (4000 * 0.05 * 0.95) ** 0.5


@given(kept=st.sets(st.sampled_from(TEXTS), min_size=100))
def test_other_documents_move_none(kept):
    whole = sides(TEXTS, choose_threshold(TEXTS, 0.2))
    part = sides(kept, choose_threshold(kept, 0.2))
    assert part == {text: whole[text] for text in kept}


@pytest.mark.parametrize("holdout", [1e-9, 0.05, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 3, 12])
def test_each_side_of_a_small_corpus_has_a_document(count, holdout):
    texts = [f"text {n}" for n in range(count)] * 2
    found = sides(texts, choose_threshold(texts, holdout)).values()
    assert set(found) == {True, False}
    if holdout == 1e-9:
        assert sum(found) == 1


def test_choosing_stops_reading_when_both_sides_have_a_document():
    read = []
    choose_threshold((read.append(text) or text for text in TEXTS), 0.5)
    assert len(read) < 50


@pytest.mark.parametrize(("texts", "count"), [([], 0), (["alone"], 1), (["twin", "twin"], 1)])
def test_a_corpus_without_two_documents_cannot_be_split(texts, count):
    with pytest.raises(UserError, match=rf"at least 2 different documents.*found {count}"):
        choose_threshold(texts, 0.5)
