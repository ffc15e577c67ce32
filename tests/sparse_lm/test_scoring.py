"""Scores are sums of log-probabilities, whatever the batch, the lengths and the contexts shared."""

import jax
import numpy as np
import pytest

from pallas_kernels.errors import RequestError
from sparse_lm import scoring
from sparse_lm.generate import generate
from sparse_lm.inference import InferenceModel
from sparse_lm.scoring import rolling_windows, score

REQUESTS = [
    ((5, 9, 2), (7, 1)),
    ((5, 9, 2), (7,)),
    ((5, 9, 2), (4, 4, 4, 4, 4)),
    ((8,), (3,)),
    ((8,), ()),
    (tuple(range(14)), (50, 51, 52)),
    ((5, 9, 2), (7, 1)),
    (tuple(range(40)), (1, 2)),
]


def direct(model, forward_all, context, continuation):
    """From the logits of the whole text without a cache; the context keeps its end."""
    context = context[-(17 - len(continuation)) :]
    text = [*context, *continuation]
    padded = np.zeros((1, 16), np.int32)
    padded[0, : len(text) - 1] = text[:-1]
    logits = np.asarray(forward_all(padded)[0][0], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    places = range(len(context) - 1, len(text) - 1)
    total = sum(log_p[place, token] for place, token in zip(places, continuation, strict=True))
    return total, [int(logits[place].argmax()) for place in places] == list(continuation)


@pytest.fixture(scope="module")
def expected(model):
    forward_all = jax.jit(model)
    return [direct(model, forward_all, *request) for request in REQUESTS]


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_scores_are_those_of_the_whole_text(model, expected, batch_size):
    """The batch's size, which decides what is padded to what, changes nothing."""
    found = score(model, REQUESTS, batch_size=batch_size)
    totals = [total for total, _ in expected]
    np.testing.assert_allclose([one.log_likelihood for one in found], totals, rtol=1e-5)
    assert [one.is_greedy for one in found] == [greedy for _, greedy in expected]
    assert found[4] == scoring.Score(0.0, True)


def test_the_most_likely_continuation_is_greedy(model):
    text = generate(model, [[5, 9, 2]], max_new_tokens=4)[0]
    other = [*text[:-1], (text[-1] + 1) % 61]
    first, second = score(model, [((5, 9, 2), text), ((5, 9, 2), other)])
    assert first.is_greedy
    assert not second.is_greedy


@pytest.fixture
def read(monkeypatch):
    """Shapes of what the model is given to read while it is traced."""
    shapes = []
    for name in ("prefill", "extend"):
        original = getattr(InferenceModel, name)

        def watched(self, tokens, *arguments, original=original):
            shapes.append(tokens.shape)
            return original(self, tokens, *arguments)

        monkeypatch.setattr(InferenceModel, name, watched)
    return shapes


def test_a_shared_context_is_read_once(model, read):
    """Four answers to one question: one row of the question, four of the answers."""
    question = (1, 2, 3, 4, 5, 6, 7, 8)
    score(model, [(question, (answer, answer + 1)) for answer in range(4)])
    assert read == [(1, 8), (4, 1)]


def test_what_all_contexts_begin_with_is_read_once(model, read, monkeypatch):
    """Three questions behind the same five tokens: one row of these, then three, then one an answer."""
    monkeypatch.setattr("sparse_lm.scoring._LEAST_SHARED", 4)
    questions = [(9, 8, 7, 6, 5, *rest) for rest in ((1, 2, 3), (1,), (4, 2))]
    requests = [(question, answer) for question in questions for answer in ((3, 4), (5, 6, 7))]
    found = score(model, requests)
    assert read == [(1, 8), (4, 4), (8, 3)]
    forward_all = jax.jit(model)
    totals = [direct(model, forward_all, *request)[0] for request in requests]
    np.testing.assert_allclose([one.log_likelihood for one in found], totals, rtol=1e-5)


def test_a_shared_beginning_leaves_each_context_a_token(model, read, monkeypatch):
    """One context may be the beginning of another."""
    monkeypatch.setattr("sparse_lm.scoring._LEAST_SHARED", 2)
    requests = [((9, 8, 7), (1,)), ((9, 8, 7, 6), (1,))]
    found = score(model, requests)
    assert read == [(1, 2), (2, 2)]
    forward_all = jax.jit(model)
    totals = [direct(model, forward_all, *request)[0] for request in requests]
    np.testing.assert_allclose([one.log_likelihood for one in found], totals, rtol=1e-5)


def test_a_model_that_is_ready_is_not_made_again(model, expected, monkeypatch):
    ready = InferenceModel.of(model)
    monkeypatch.delattr(InferenceModel, "of")
    found = score(ready, REQUESTS)
    np.testing.assert_allclose(
        [one.log_likelihood for one in found], [total for total, _ in expected], rtol=1e-5
    )


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 32, 45])
def test_rolling_windows_predict_each_token_once(length):
    """With all the context that fits before the last window, and none that overlaps."""
    tokens = list(range(100, 100 + length))
    windows = rolling_windows(tokens, 9, 16)
    assert [token for _, predicted in windows for token in predicted] == tokens
    text = [9, *tokens]
    end = 1
    for context, predicted in windows:
        end += len(predicted)
        assert len(context) + len(predicted) <= 17
        assert text[end - len(predicted) - len(context) : end] == [*context, *predicted]
    if len(windows) > 1:
        assert all(len(context) + len(predicted) == 17 for context, predicted in windows[1:])


@pytest.mark.parametrize(
    ("requests", "options", "said"),
    [
        ([((), (1,))], {}, "at least one token"),
        ([((1,), (2,) * 17)], {}, "must fit the model's context of 16 tokens; got one of 17"),
        ([((1,), (61,))], {}, "vocabulary of 61; got 61"),
        ([((1,), (2,))], {"batch_size": 0}, "batch_size must be at least 1; got 0"),
    ],
)
def test_what_cannot_be_scored(model, requests, options, said):
    with pytest.raises(RequestError, match=said):
        score(model, requests, **options)
