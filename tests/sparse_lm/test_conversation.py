"""A text that grows by turns is continued as if it were read anew, and only what is new in it is read."""

import dataclasses

import pytest
from flax import nnx

from sparse_lm import SparseLM
from sparse_lm.conversation import Conversation
from sparse_lm.generate import GREEDY, Sampling, generate
from sparse_lm.inference import InferenceModel

WARM = Sampling(temperature=0.7, top_k=12)


@pytest.fixture(scope="module")
def model(config):
    return InferenceModel.of(SparseLM(dataclasses.replace(config, context_length=64), rngs=nnx.Rngs(0)))


def anew(model, text, **asked):
    return generate(model, [text], max_new_tokens=8, **asked)[0]


@pytest.mark.parametrize("speculate", [0, 3])
@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_every_turn_is_what_a_first_one_would_be(model, sampling, speculate):
    conversation = Conversation(model)
    text, read = [5, 9, 2], []
    for turn in range(3):
        asked = {"sampling": sampling, "seed": turn}
        said = list(conversation.reply(text, max_new_tokens=8, speculate=speculate, **asked))
        assert said == anew(model, text, **asked)
        read.append(conversation.read)
        text = [*text, *said, 3, 4]
    # The last token of a reply has not been read when its text comes back, nor have the two behind it.
    assert read == [3, 3, 3]


def test_a_text_that_was_changed_is_read_from_there(model):
    """So is one that got shorter; one with nothing in common is read whole."""
    conversation = Conversation(model)
    list(conversation.reply(range(1, 11), max_new_tokens=4))
    for text, read in (([1, 2, 3, 7, 8], 2), ([1, 2, 3], 1), ([9, 8, 7, 6], 4), ([9, 8, 7, 6], 1)):
        assert list(conversation.reply(text, max_new_tokens=8)) == anew(model, text)
        assert conversation.read == read


def test_a_stop_token_ends_the_reply(model):
    conversation = Conversation(model)
    whole = anew(model, [5, 9, 2])
    stop = whole[3]
    said = list(conversation.reply([5, 9, 2], max_new_tokens=8, stop_ids={60, stop}))
    assert said == whole[: whole.index(stop)]
    text = [5, 9, 2, *said, stop, 7]
    assert list(conversation.reply(text, max_new_tokens=8)) == anew(model, text)
    assert conversation.read == 2


@pytest.mark.parametrize("place", ["between tokens", "in a prompt", "in a block"])
def test_an_interrupted_reply_spoils_no_other(model, monkeypatch, place):
    conversation = Conversation(model)
    list(conversation.reply([5, 9], max_new_tokens=2))
    reply = conversation.reply([5, 9, 2], max_new_tokens=8)
    if place == "between tokens":
        assert next(reply) == anew(model, [5, 9, 2])[0]
        reply.close()
    else:
        name = {"in a prompt": "read_further", "in a block": "decode_block"}[place]

        def interrupted(*arguments):
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(f"sparse_lm.decoding.{name}", interrupted)
            with pytest.raises(KeyboardInterrupt):
                list(reply)
    text = [5, 9, 2, 1]
    assert list(conversation.reply(text, max_new_tokens=8)) == anew(model, text)
    assert conversation.read == (1 if place == "between tokens" else 4)


def test_a_growing_text_fills_the_context(model):
    conversation = Conversation(model)
    text = [5, 9, 2]
    while len(text) < 64:
        new = min(10, 64 - len(text))
        said = list(conversation.reply(text, max_new_tokens=new))
        assert said == generate(model, [text], max_new_tokens=new)[0]
        text = [*text, *said]
    with pytest.raises(ValueError, match="beyond the model's context of 64"):
        conversation.reply(text, max_new_tokens=1)
