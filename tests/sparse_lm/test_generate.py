"""Generation: the cache, the batch, the end of a row, the draws and the refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_lm.decoding import _grow
from sparse_lm.generate import GREEDY, Sampling, generate, sample, stream
from sparse_lm.inference import InferenceModel

WARM = Sampling(temperature=2.0, top_k=20, top_p=0.9)
PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8]]


@pytest.fixture(scope="module")
def continued(model):
    return generate(model, PROMPTS, max_new_tokens=8)


def test_greedy_equals_the_full_forward(model, forward, continued):
    """Every new token is the most likely one after everything before it, read without a cache."""
    graphdef, state = nnx.split(model)
    for prompt, new in zip(PROMPTS, continued, strict=True):
        assert len(new) == 8
        text = prompt + new
        padded = jnp.zeros((4, 16), jnp.int32).at[0, : len(text)].set(jnp.array(text))
        logits, _ = forward(graphdef, state, padded)
        assert jnp.argmax(logits[0], axis=-1).tolist()[len(prompt) - 1 : len(text) - 1] == new


def test_a_prompt_does_not_depend_on_its_batch_mates(model, continued, monkeypatch):
    """Neither on their tokens nor on how far the longest of them pads it."""
    monkeypatch.setattr("sparse_lm.decoding._SMALLEST_SHAPE", 4)
    assert [generate(model, [prompt], max_new_tokens=8)[0] for prompt in PROMPTS] == continued

    batch = generate(model, PROMPTS, max_new_tokens=8, sampling=WARM, seed=1)
    alone = generate(model, PROMPTS[:1], max_new_tokens=8, sampling=WARM, seed=1)
    mates = generate(model, [[3] * 8, PROMPTS[1], [4]], max_new_tokens=8, sampling=WARM, seed=1)
    assert alone[0] == batch[0]
    assert mates[1] == batch[1]


def test_draws_follow_the_seed_and_the_row(model):
    first = generate(model, [[5]] * 3, max_new_tokens=8, sampling=WARM, seed=1)
    assert first == generate(model, [[5]] * 3, max_new_tokens=8, sampling=WARM, seed=1)
    assert first != generate(model, [[5]] * 3, max_new_tokens=8, sampling=WARM, seed=2)
    assert len({tuple(row) for row in first}) == 3


def test_rows_end_at_the_end_token(model, continued):
    """The row that draws it falls silent, the others go on, and nothing runs once all have ended."""
    eos = continued[0][2]
    expected = [row[: row.index(eos)] if eos in row else row for row in continued]
    assert generate(model, PROMPTS, max_new_tokens=8, eos_id=eos) == expected
    steps = list(stream(model, PROMPTS, max_new_tokens=8, eos_id=eos))
    assert [step[0] for step in steps[:4]] == [*continued[0][:2], None, None]
    assert len(steps) == max(map(len, expected))
    assert len(list(stream(model, PROMPTS[:1], max_new_tokens=8, eos_id=eos))) == 2


def test_decoding_is_compiled_once(model, monkeypatch):
    """One trace for the prompt and one for every token after it, whatever their number;
    none the second time."""
    traces = []
    for name in ("prefill", "extend"):
        original = getattr(InferenceModel, name)

        def counted(*args, name=name, original=original):
            traces.append(name)
            return original(*args)

        monkeypatch.setattr(InferenceModel, name, counted)
    fresh = Sampling(temperature=0.0, top_k=59)  # a static argument no other test uses
    generate(model, PROMPTS, max_new_tokens=8, sampling=fresh)
    assert traces == ["prefill", "extend"]
    generate(model, [[3, 4], [5], [6, 6, 6]], max_new_tokens=7, sampling=fresh)
    assert traces == ["prefill", "extend"]


@pytest.mark.parametrize("block", [1, 2, 3])
def test_neither_blocks_nor_the_growth_of_the_cache_change_a_token(model, continued, block, monkeypatch):
    monkeypatch.setattr("sparse_lm.decoding._BLOCK", block)
    monkeypatch.setattr("sparse_lm.decoding._CAPACITY_STEP", 2)
    monkeypatch.setattr("sparse_lm.decoding._SMALLEST_SHAPE", 4)
    sizes = []
    monkeypatch.setattr("sparse_lm.decoding._grow", lambda *args: sizes.append(args[0]) or _grow(*args))
    assert generate(model, PROMPTS[1:2], max_new_tokens=8) == continued[1:2]
    assert sizes == [8, 16]


def test_the_first_token_waits_for_nothing_that_follows_it(model, continued, monkeypatch):
    """Neither for the compilation of a block nor for its steps."""
    monkeypatch.delattr("sparse_lm.decoding.decode_block")
    assert next(stream(model, PROMPTS, max_new_tokens=8)) == [row[0] for row in continued]


def draws(logits: list[float], sampling: Sampling, count: int = 4000) -> np.ndarray:
    """Shares of each token among ``count`` draws."""
    keys = jax.random.split(jax.random.key(0), count)
    tokens = sample(jnp.tile(jnp.array(logits), (count, 1)), keys, sampling)
    return np.bincount(np.asarray(tokens), minlength=len(logits)) / count


LOGITS = [2.0, 0.0, 1.0, 1.5]  # most likely first: 0, 3, 2, 1


def softmax(logits: list[float]) -> np.ndarray:
    return np.asarray(jax.nn.softmax(jnp.array(logits)))


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), softmax(LOGITS)),
        (Sampling(temperature=0.5), softmax([4.0, 0.0, 2.0, 3.0])),
        (Sampling(top_k=2), softmax([2.0, -np.inf, -np.inf, 1.5])),
        (Sampling(top_k=99), softmax(LOGITS)),
        # 0: 47 %, 3: 28 %, 2: 17 %, 1: 6 %. The third is needed to reach 80 %.
        (Sampling(top_p=0.8), softmax([2.0, -np.inf, 1.0, 1.5])),
        (Sampling(top_p=0.7), softmax([2.0, -np.inf, -np.inf, 1.5])),
        # Of the two that top-k leaves, the first holds 62 %.
        (Sampling(top_k=2, top_p=0.6), np.array([1.0, 0.0, 0.0, 0.0])),
        (Sampling(top_k=1), np.array([1.0, 0.0, 0.0, 0.0])),
        (Sampling(top_p=1e-6), np.array([1.0, 0.0, 0.0, 0.0])),
        (Sampling(temperature=1e-30), np.array([1.0, 0.0, 0.0, 0.0])),
        (GREEDY, np.array([1.0, 0.0, 0.0, 0.0])),
    ],
    ids=lambda value: str(value) if isinstance(value, Sampling) else "",
)
def test_draws_follow_the_distribution(sampling, expected):
    got = draws(LOGITS, sampling)
    np.testing.assert_allclose(got, expected, atol=0.03)  # about four standard errors
    np.testing.assert_array_equal(got[expected == 0], 0)


@pytest.mark.parametrize(
    ("prompts", "max_new_tokens", "sentence"),
    [
        ([[1] * 10], 7, "prompt 1 has 10 tokens and 7 new ones.*context of 16: shorten the prompt"),
        ([[1], [1] * 17], 1, "prompt 2 has 17 tokens"),
        ([], 1, "at least one prompt"),
        ([[1], []], 1, "prompt 2 is empty"),
        ([[61]], 1, "token 61, outside the model's vocabulary of 61"),
        ([[-1]], 1, "token -1"),
        ([[1]], 0, "max_new_tokens must be at least 1; got 0"),
    ],
)
def test_prompts_that_do_not_fit_are_refused_at_once(model, prompts, max_new_tokens, sentence):
    with pytest.raises(ValueError, match=sentence):
        stream(model, prompts, max_new_tokens=max_new_tokens)


def test_a_prompt_may_fill_the_context(model):
    assert len(generate(model, [[1] * 15], max_new_tokens=1)[0]) == 1


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"temperature": -0.1}, "temperature must be a finite number of at least 0; got -0.1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": 0}, "top_k must be at least 1; got 0"),
        ({"top_p": 0.0}, "top_p must be over 0 and at most 1; got 0.0"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_sampling_refuses_values_out_of_range(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        Sampling(**fields)
