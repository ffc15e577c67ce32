"""Speculation says what the plain loop says, in fewer steps where the text repeats itself."""

import dataclasses

import jax.numpy as jnp
import pytest
from flax import nnx

from sparse_lm import SparseLM
from sparse_lm.generate import GREEDY, Sampling, generate, stream
from sparse_lm.inference import InferenceModel
from sparse_lm.speculation import look_up

WARM = Sampling(temperature=0.7, top_k=12, top_p=0.9)
PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 1, 2, 3], [8, 9, 8, 9, 8]]


@pytest.fixture(scope="module")
def model(config):
    """Long enough a context for rows to drift apart."""
    return InferenceModel.of(SparseLM(dataclasses.replace(config, context_length=48), rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def forgetful(config):
    """Attention adds nothing: a token follows from the last one alone, and greedy text runs in circles."""
    model = SparseLM(dataclasses.replace(config, context_length=128), rngs=nnx.Rngs(0))
    kernel = model.blocks.attention.output.kernel
    kernel[...] = jnp.zeros_like(kernel[...])
    return InferenceModel.of(model)


@pytest.mark.parametrize("guesses", [1, 6])
@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["model", "forgetful"])
def test_the_text_is_the_plain_loops(name, sampling, guesses, request):
    """Rows of different lengths accept different numbers of tokens, and end at different places."""
    model = request.getfixturevalue(name)
    for seed in (0, 1, 2):
        plain = generate(model, PROMPTS, max_new_tokens=40, sampling=sampling, seed=seed)
        asked = {"max_new_tokens": 40, "sampling": sampling, "seed": seed, "speculate": guesses}
        assert generate(model, PROMPTS, **asked) == plain
        eos = plain[0][11]
        expected = [row[: row.index(eos)] if eos in row else row for row in plain]
        assert generate(model, PROMPTS, eos_id=eos, **asked) == expected


@pytest.mark.parametrize("new_tokens", [1, 2, 41])
def test_the_context_may_be_filled(model, new_tokens):
    """A guess that reaches beyond it is cut, and a step that gives all that is wanted is the last."""
    plain = generate(model, PROMPTS[2:], max_new_tokens=new_tokens)
    assert generate(model, PROMPTS[2:], max_new_tokens=new_tokens, speculate=15) == plain


def test_a_cache_that_grows_changes_nothing(model, monkeypatch):
    plain = generate(model, PROMPTS, max_new_tokens=40)
    monkeypatch.setattr("sparse_lm.decoding._CAPACITY_STEP", 2)
    monkeypatch.setattr("sparse_lm.decoding._SMALLEST_SHAPE", 4)
    assert generate(model, PROMPTS, max_new_tokens=40, speculate=3) == plain


def test_repetition_takes_fewer_steps(forgetful):
    """A circle of a few tokens is guessed whole once it has been seen."""
    plain, guessed = (stream(forgetful, PROMPTS, max_new_tokens=100, speculate=guesses) for guesses in (0, 7))
    assert list(plain) == list(guessed)
    assert plain.tokens_per_step == 1
    assert guessed.tokens_per_step > 4


def test_a_guess_is_what_followed_the_longest_match():
    history = jnp.array(
        [
            [1, 2, 3, 9, 2, 3, 7, 1, 2, 3, 0, 0],  # "1 2 3" stood at the beginning, and 9 followed
            [5, 6, 4, 6, 8, 6, 0, 0, 0, 0, 0, 0],  # of two places that agree by one token, the newest
            [3, 4, 3, 4, 3, 4, 0, 0, 0, 0, 0, 0],  # a guess beyond the end goes on with the repetition
            [7, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9],  # what lies behind the only token is none of the text
        ]
    )
    known = jnp.array([10, 6, 6, 1])
    assert look_up(history, known, 4).tolist() == [[9, 2, 3, 7], [8, 6, 8, 6], [3, 4, 3, 4], [7, 7, 7, 7]]


@pytest.mark.parametrize("guesses", [-1, 16])
def test_so_many_guesses_are_refused_at_once(model, guesses):
    with pytest.raises(ValueError, match=f"speculate must be from 0 to 15 tokens a step; got {guesses}"):
        stream(model, [[1]], max_new_tokens=1, speculate=guesses)
