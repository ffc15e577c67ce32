"""Continuations end at the first string to stop at, whatever the batch."""

import pytest

from pallas_kernels.errors import RequestError
from sparse_lm.generate import generate, stream
from sparse_lm.generate_until import generate_until

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,;:!?-"
EOS = len(LETTERS)
TEXTS = ["hello", "", "a", "some words"]


class Letters:
    """One letter, one id; the last id ends a text."""

    eos_id = EOS
    prefix_ids = ()
    fingerprint = "letters"

    def encode(self, text):
        return [LETTERS.index(letter) for letter in text]

    def decode(self, ids):
        return "".join(LETTERS[token] for token in ids if token < EOS)


@pytest.fixture(scope="module")
def whole(model):
    """What follows each text without anything to stop at."""
    prompts = [Letters().encode(text)[-8:] or [EOS] for text in TEXTS]
    rows = generate(model, prompts, max_new_tokens=8, eos_id=EOS)
    return [Letters().decode(row) for row in rows]


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_a_continuation_ends_before_what_it_is_to_stop_at(model, whole, batch_size):
    assert all(len(text) >= 4 for text in whole)
    assert generate_until(model, Letters(), TEXTS, until=[], max_new_tokens=8, batch_size=batch_size) == whole
    stops = [whole[0][3:5], whole[1][2]]  # one of two letters, one of one

    def cut(text):
        places = [text.find(stop) for stop in stops if stop in text]
        return text[: min(places)] if places else text

    found = generate_until(model, Letters(), TEXTS, until=stops, max_new_tokens=8, batch_size=batch_size)
    assert found == [cut(text) for text in whole]
    assert len(found[1]) <= 2


def test_no_step_is_asked_for_once_all_rows_have_ended(model, whole, monkeypatch):
    steps = []

    def counted(*args, **kwargs):
        for step in stream(*args, **kwargs):
            steps.append(step)
            yield step

    monkeypatch.setattr("sparse_lm.generate_until.stream", counted)
    generate_until(model, Letters(), TEXTS[:1], until=[whole[0][1]], max_new_tokens=8)
    assert len(steps) <= 2


def test_a_continuation_is_read_behind_its_prompt(model, monkeypatch):
    """As SentencePiece does it, the first space of a text is dropped; a continuation's first space is not."""

    class Dropping(Letters):
        def decode(self, ids):
            return super().decode(ids).removeprefix(" ")

    tokens = Letters().encode(" ab c;")
    monkeypatch.setattr("sparse_lm.generate_until.stream", lambda *_, **__: ([token] for token in tokens))
    assert generate_until(model, Dropping(), ["xyz"], until=[";"], max_new_tokens=8) == [" ab c"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_new_tokens": 16}, "leave room in the model's context of 16; got 16"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"until": [""]}, "must have a character"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_what_cannot_be_continued(model, options, said):
    arguments = {"until": [], "max_new_tokens": 4, **options}
    with pytest.raises(RequestError, match=said):
        generate_until(model, Letters(), ["a"], **arguments)
