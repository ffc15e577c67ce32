"""Text survives every tokenizer, a saved tokenizer is the same one,
and bad files are told in one sentence."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from train.data.tokenizer import (
    ByteTokenizer,
    EncodingError,
    HFTokenizer,
    TextStream,
    check_vocabulary,
    decode_continuation,
    fit_bpe,
    load_tokenizer,
    token_dtype,
)
from train.errors import UserError

TEXTS = ["the house of the people", "the state of the union is strong", "naïve café — ☃ 東京 🦊"] * 3
BPE = fit_bpe(TEXTS, 300)
TOKENIZERS = pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["byte", "bpe"])

texts = st.text(st.characters(exclude_categories=["Cs"]))


@TOKENIZERS
@given(text=texts)
def test_decode_inverts_encode(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@TOKENIZERS
@given(text=texts)
def test_every_way_to_encode_agrees_and_measures_each_byte_once(tokenizer, text):
    ids, widths = tokenizer.encode_measured(text)
    assert ids.tolist() == tokenizer.encode(text) == tokenizer.encode_batch([text])[0].tolist()
    assert len(widths) == len(ids)
    assert (widths >= 0).all()
    assert widths.sum() == len(text.encode())


@TOKENIZERS
@given(text=texts)
def test_the_stream_says_what_decode_says_and_never_half_a_character(tokenizer, text):
    stream = TextStream(tokenizer)
    pieces = [stream.feed(i) for i in tokenizer.encode(text)]
    assert "".join(pieces).rstrip("\ufffd") == text.rstrip("\ufffd")
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_broken_utf8_is_shown_and_does_not_stop_the_stream():
    stream = TextStream(ByteTokenizer())
    assert "".join(stream.feed(i) for i in (0xE2, 0x82, ord("a"), 0xFF, ord("b"))) == "\ufffda\ufffdb"


@TOKENIZERS
def test_a_control_token_spelled_in_a_text_is_text(tokenizer):
    text = "before <|endoftext|> after"
    assert tokenizer.eos_id not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@TOKENIZERS
def test_a_tokenizer_is_the_same_in_another_process(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    text = "before <|endoftext|> after"
    assert copy.encode(text) == copy.encode_batch([text])[0].tolist() == tokenizer.encode(text)
    assert (copy.fingerprint, copy.eos_id) == (tokenizer.fingerprint, tokenizer.eos_id)


@TOKENIZERS
def test_eos_decodes_to_nothing(tokenizer):
    assert tokenizer.decode([*tokenizer.encode("ab"), tokenizer.eos_id]) == "ab"


@TOKENIZERS
@pytest.mark.parametrize("target", ["tokenizer.json", "other.json", "."])
def test_a_saved_tokenizer_is_the_same_one(tokenizer, target, tmp_path):
    path = tokenizer.save(tmp_path / target)
    loaded = load_tokenizer(tmp_path / target)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (loaded.vocab_size, loaded.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
    assert loaded.encode(TEXTS[2]) == tokenizer.encode(TEXTS[2])
    assert [path] == list(tmp_path.iterdir())


def test_fingerprints_tell_tokenizers_apart():
    fingerprints = {t.fingerprint for t in (ByteTokenizer(), BPE, fit_bpe(TEXTS, 290))}
    assert len(fingerprints) == 3
    assert load_tokenizer("byte").fingerprint == ByteTokenizer().fingerprint


@settings(max_examples=10)
@given(vocab_size=st.integers(257, 330))
def test_a_fit_is_deterministic_and_within_its_size(vocab_size):
    first, second = fit_bpe(TEXTS, vocab_size), fit_bpe(list(TEXTS), vocab_size)
    assert first.fingerprint == second.fingerprint
    assert first.vocab_size <= vocab_size
    assert first.vocab_size == vocab_size or vocab_size > 300


def test_a_fit_learns_its_corpus():
    assert len(BPE.encode("the state of the union")) < len("the state of the union") / 2


def test_a_fit_too_small_for_bytes_is_refused():
    with pytest.raises(UserError, match=r"at least 257.*got 256"):
        fit_bpe(TEXTS, 256)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(257, np.uint16), (65_536, np.uint16), (65_537, np.uint32)]
)
def test_ids_fit_their_type(vocab_size, dtype):
    assert token_dtype(vocab_size) is dtype
    assert np.iinfo(dtype).max >= vocab_size - 1


@pytest.fixture
def published():
    """The content of a tokenizer.json as a publisher writes it, without our own key."""
    content = json.loads(BPE._rust.to_str())
    assert "eos_token" not in content
    return content


@pytest.mark.parametrize("name", ["</s>", "<eos>", "<|im_end|>"])
def test_eos_is_found_among_the_usual_names(published, name):
    eos = published["added_tokens"][0]
    published["model"]["vocab"][name] = published["model"]["vocab"].pop(eos["content"])
    eos["content"] = name
    assert HFTokenizer(published, source="x").eos_id == eos["id"]


@pytest.mark.parametrize("form", ["<|stop|>", {"content": "<|stop|>"}])
def test_the_publisher_names_eos_beside_the_tokenizer_and_saving_keeps_it(published, form, tmp_path):
    stop = {**published["added_tokens"][0], "id": BPE.vocab_size, "content": "<|stop|>"}
    published["added_tokens"].append(stop)
    (tmp_path / "tokenizer.json").write_text(json.dumps(published))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": form}))
    loaded = load_tokenizer(tmp_path)
    assert loaded.eos_id == BPE.vocab_size
    assert loaded.vocab_size == BPE.vocab_size + 1
    saved = loaded.save(tmp_path / "copy.json")
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_tokenizer(saved).eos_id == loaded.eos_id
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(
        UserError, match=r"tokenizer_config\.json must be a Hugging Face tokenizer_config\.json; "
    ):
        load_tokenizer(tmp_path)


def test_truncation_and_padding_of_a_published_tokenizer_lose_nothing(published):
    published["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    published["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>",
    }  # fmt: skip
    tokenizer = HFTokenizer(published, source="x")
    assert tokenizer.encode_batch(["the people of the house"])[0].tolist() == BPE.encode(
        "the people of the house"
    )


def words(model):
    """A tokenizer that marks the beginnings of words, as SentencePiece does."""
    rust = Tokenizer(model)
    rust.add_special_tokens(["</s>"])
    rust.pre_tokenizer = pre_tokenizers.Metaspace()
    rust.decoder = decoders.Metaspace()
    return HFTokenizer(json.loads(rust.to_str()), source="words.json")


def test_a_continuation_keeps_the_space_before_its_first_word():
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁ship", -1.0), ("▁lamp", -1.0)]
    tokenizer = words(models.Unigram(pieces, 0, False))
    prompt = tokenizer.encode("ship lamp")
    ship, lamp = prompt
    assert tokenizer.decode([ship, lamp, ship]) == "ship lamp ship"
    assert decode_continuation(tokenizer, prompt, [ship, lamp]) == " ship lamp"
    stream = TextStream(tokenizer, prompt)
    assert [stream.feed(ship), stream.feed(lamp)] == [" ship", " lamp"]
    assert decode_continuation(tokenizer, [tokenizer.eos_id], [ship]) == "ship"


@TOKENIZERS
@given(prompt=texts, rest=texts)
def test_a_continuation_is_what_is_added_to_the_prompt(tokenizer, prompt, rest):
    added = decode_continuation(tokenizer, tokenizer.encode(prompt), tokenizer.encode(rest))
    assert prompt.rstrip("\ufffd") + added == prompt + rest


@pytest.mark.parametrize("encode", ["encode", "encode_batch", "encode_measured"])
@pytest.mark.parametrize(
    "model", [models.WordLevel({"</s>": 0, "▁ship": 1}), models.Unigram([("</s>", 0.0), ("▁ship", -1.0)])]
)
def test_text_outside_the_vocabulary_is_one_sentence(model, encode):
    argument = ["ship", "boat"] if encode == "encode_batch" else "boat"
    with pytest.raises(EncodingError, match=r"words\.json has no tokens for some of the text") as caught:
        getattr(words(model), encode)(argument)
    assert "\n" not in str(caught.value)


def test_dropout_is_switched_off_and_told(published, tmp_path):
    published["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(published))
    loaded = load_tokenizer(tmp_path)
    assert {tuple(loaded.encode(TEXTS[1])) for _ in range(20)} == {tuple(BPE.encode(TEXTS[1]))}
    (note,) = loaded.notes
    assert f"{tmp_path}/tokenizer.json has a BPE dropout of 0.5: it is switched off" in note
    saved = load_tokenizer(loaded.save(tmp_path / "copy.json"))
    assert saved.fingerprint == loaded.fingerprint
    assert saved.notes == BPE.notes == ()


def test_no_eos_is_refused(published):
    published["added_tokens"] = []
    del published["model"]["vocab"]["<|endoftext|>"]
    with pytest.raises(UserError, match=r"tok\.json must have an end-of-text token"):
        HFTokenizer(published, source="tok.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no valid JSON"),
        (b"{", "no valid JSON"),
        (b"\xff\xfe", "no valid JSON"),
        (b"[" * 100_000, "no valid JSON"),
        (b"[]", "found a JSON list"),
        (b"{}", "the tokenizers library says"),
        (b'{"model": 3}', "the tokenizers library says"),
    ],
)
def test_files_that_are_no_tokenizer(content, message, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(UserError, match=r"byte, bpe or the path.*found no file .*missing\.json"):
        load_tokenizer(str(tmp_path / "missing.json"))


def test_a_vocabulary_beyond_the_model_is_refused():
    check_vocabulary(ByteTokenizer(), 257)
    with pytest.raises(UserError, match=r"the tokenizer has 257 ids but model\.vocab-size is 256"):
        check_vocabulary(ByteTokenizer(), 256)
