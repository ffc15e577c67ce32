"""Chat templates as publishers write them, and what is no template."""

import json
from importlib.util import find_spec

import pytest

from train.data.tokenizer import ByteTokenizer
from train.errors import UserError
from train.run.chat_template import ChatTemplate, load_chat_template, stop_ids

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'What is "1 < 2"? é'},
    {"role": "assistant", "content": " True."},
    {"role": "user", "content": "Why?"},
]
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = """\
{% set loop_messages = messages %}
{% if messages[0]['role'] == 'system' %}
    {% set system = '<<SYS>>' + messages[0]['content'] + '<</SYS>> ' %}
    {% set loop_messages = messages[1:] %}
{% endif %}
{% for message in loop_messages %}
    {% if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {% endif %}
    {% if message.role == 'user' %}
        {{- bos_token + '[INST] ' + (system if loop.first and system is defined else '') }}
        {{- message.content | trim + ' [/INST]' }}
        {%- continue %}
    {% endif %}
    {% generation %}{{ ' ' + message.content | trim + eos_token }}{% endgeneration %}
{% endfor %}"""
JSON = "{{ messages[1] | tojson }}{% if tools %}tools{% endif %}"
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
EXPECTED = {
    CHATML: "<|im_start|>system\nBe brief.<|im_end|>\n"
    '<|im_start|>user\nWhat is "1 < 2"? é<|im_end|>\n'
    "<|im_start|>assistant\n True.<|im_end|>\n"
    "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
    INST: '<s>[INST] <<SYS>>Be brief.<</SYS>> What is "1 < 2"? é [/INST] True.</s><s>[INST] Why? [/INST]',
    JSON: '{"role": "user", "content": "What is \\"1 < 2\\"? é"}',
}


def write(directory, **files):
    for name, content in files.items():
        path = directory / name.replace("__", ".")
        path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize("source", EXPECTED, ids=["chatml", "inst", "json"])
def test_templates_say_what_transformers_says(source):
    assert ChatTemplate(source, where="here", tokens=TOKENS).render(MESSAGES) == EXPECTED[source]


@pytest.mark.filterwarnings("ignore")  # of transformers, whose version is the user's
@pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers")
@pytest.mark.parametrize("source", EXPECTED, ids=["chatml", "inst", "json"])
def test_transformers_says_it(source):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, chat_template=source, **TOKENS)
    said = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert said == EXPECTED[source]


def test_where_a_template_may_stand(tmp_path):
    """A file of its own comes first; of several with names, the default one is for chat."""
    config = {
        "chat_template": [
            {"name": "tool_use", "template": "x"},
            {"name": "default", "template": "{{ eos_token }}"},
        ]
    }
    write(
        tmp_path, tokenizer_config__json=config, special_tokens_map__json={"eos_token": {"content": "</s>"}}
    )
    assert load_chat_template(tmp_path).render(MESSAGES) == "</s>"
    write(tmp_path, chat_template__jinja="{{ messages | length }}")
    assert load_chat_template(tmp_path).render(MESSAGES) == "4"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "found none in"),
        ({"tokenizer_config__json": {"chat_template": [{"name": "rag", "template": "x"}]}}, "found none in"),
        ({"tokenizer_config__json": {"chat_template": "{% if %}"}}, "must be a Jinja template"),
        ({"tokenizer_config__json": "{"}, "tokenizer_config.json must be JSON"),
        ({"tokenizer_config__json": "[]"}, "must be a JSON object; found a list"),
    ],
)
def test_what_is_no_template_is_refused(tmp_path, files, said):
    write(tmp_path, **files)
    with pytest.raises(UserError, match=said) as raised:
        load_chat_template(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no system here') }}",
        "{{ messages.nothing.at_all }}",
        "{{ messages[0] + 1 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for n in range(999999999) %}{% endfor %}",
    ],
)
def test_a_template_that_fails_or_breaks_out_is_one_sentence(source):
    with pytest.raises(
        UserError, match=r"the chat template here does not take this conversation; it says: ."
    ):
        ChatTemplate(source, where="here").render(MESSAGES)


@pytest.mark.parametrize(
    ("named", "expected"), [(None, {256}), (7, {7, 256}), ([7, 9], {7, 9, 256}), ("x", {256})]
)
def test_tokens_that_end_a_reply(tmp_path, named, expected):
    write(tmp_path, generation_config__json={"eos_token_id": named})
    assert stop_ids(tmp_path, ByteTokenizer()) == expected
