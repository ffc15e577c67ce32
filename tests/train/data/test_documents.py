"""Documents survive every form that files come in; every file that cannot be used is one sentence."""

import functools
import gzip
import json
import lzma
import os

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from train.data.documents import find_sources, read_documents, size_of
from train.errors import UserError

# Without the time of day in the file, so that tests have the same names in every process.
GZIP = functools.partial(gzip.compress, mtime=0)
COMPRESS = {
    "": bytes,
    ".gz": GZIP,
    ".xz": lzma.compress,
    ".lzma": functools.partial(lzma.compress, format=lzma.FORMAT_ALONE),
    ".zst": zstandard.compress,
}


def read(*paths, field="text"):
    return list(read_documents(find_sources(list(map(str, paths))), field))


def texts(*paths, **options):
    return [document.text for document in read(*paths, **options)]


def test_the_default_corpus_ships_with_the_package():
    documents = texts()
    assert len(documents) == 233
    assert 10e6 < sum(map(len, documents)) < 11e6


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a", "a.dat"])
def test_json_lines(tmp_path, name, suffix):
    path = tmp_path / (name + suffix)
    path.write_bytes(
        COMPRESS[suffix](b'{"text": "one\\u2028\xc3\xa9", "n": 1}\r\n\n{"text": ""}\n{"text": "two"}')
    )
    assert read(path) == [("one\u2028é", f"{path}, line 1"), ("two", f"{path}, line 4")]


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.dat", "a"])
def test_plain_text_is_one_document_a_file(tmp_path, name, suffix):
    text = "\n[not JSON]\n{neither}\n"
    path = tmp_path / (name + suffix)
    path.write_bytes(COMPRESS[suffix](b"\xef\xbb\xbf" + text.encode()))
    assert texts(path) == [text]


def several_parts(compress):
    return lambda data: compress(data[:4]) + compress(b"") + compress(data[4:])


# What the tools write of their own accord: parallel versions write parts, with padding and headers between.
FORMS = {
    "gzip, parts": several_parts(GZIP),
    "gzip, padded with zeros": lambda data: GZIP(data) + bytes(512),
    "xz, parts": several_parts(lzma.compress),
    "xz, padded": lambda data: lzma.compress(data) + bytes(8) + lzma.compress(b""),
    "xz, CRC-32": functools.partial(lzma.compress, check=lzma.CHECK_CRC32),
    "zstd, parts": several_parts(zstandard.compress),
    "zstd, size unknown": lambda data: zstandard.ZstdCompressor(write_content_size=False).compress(data),
    "zstd, checksum": lambda data: zstandard.ZstdCompressor(write_checksum=True).compress(data),
    "zstd, pzstd": lambda data: b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd" + zstandard.compress(data),
    "zstd, skippable last": lambda data: zstandard.compress(data) + b"\x5f\x2a\x4d\x18\x02\x00\x00\x00ab",
    "zstd, long window": lambda data: zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=28, write_content_size=False)
    ).compress(data),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_that_the_tools_write(tmp_path, form):
    path = tmp_path / "a.txt"
    path.write_bytes(FORMS[form](b"one two three"))
    assert texts(path) == ["one two three"]


def test_a_stream_longer_than_any_block(tmp_path):
    documents = [f"{n} " + "word " * 2000 for n in range(400)]
    for suffix, compress in COMPRESS.items():
        path = tmp_path / f"long.jsonl{suffix}"
        path.write_bytes(compress("".join(json.dumps({"text": text}) + "\n" for text in documents).encode()))
        assert texts(path) == documents


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string()])
def test_parquet(tmp_path, kind):
    path = tmp_path / "part-0"
    table = pyarrow.table({"id": [1, 2, 3], "body": pyarrow.array(["one é", "", "two"], kind)})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    assert read(path, field="body") == [("one é", f"{path}, row 1"), ("two", f"{path}, row 3")]


def test_progress_ends_with_all_bytes_read(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"text": "x"}\n' * 3)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["y"]}), tmp_path / "c.parquet")
    sources = find_sources([str(tmp_path / "*")])
    told = []
    list(read_documents(sources, on_file_read=told.append))
    assert told == sorted(told)
    assert told[-1] == size_of(sources) == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_globs_are_sorted_and_a_file_counts_once(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.txt", "[d].txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    paths = [tmp_path / p for p in ("b.txt", "[d].txt", "*.txt", "**/c.txt", "*")]
    assert texts(*paths) == ["b.txt", "[d].txt", "a.txt", "sub/c.txt"]


# --- Files that cannot be used ------------------------------------------------------------------------------

GOOD = b'{"text": "good"}\n'
TRUNCATED = {suffix: COMPRESS[suffix](GOOD * 50)[:-9] for suffix in (".gz", ".xz", ".zst")}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.jsonl", b"", "found it empty"),
        ("c.txt", b"  \n\n", "found it empty"),
        ("c.jsonl.gz", b"", "found it empty"),
        ("c.jsonl.gz", GZIP(b""), "found it empty"),
        *((f"c.jsonl{suffix}", data, "truncated or damaged") for suffix, data in TRUNCATED.items()),
        ("c.jsonl.gz", GZIP(GOOD)[:12] + b"damage" + GZIP(GOOD)[18:], "truncated or damaged"),
        ("c.jsonl.zst", GOOD, "compressed as its name says"),
        ("c.txt", b"\x7fELF\x00\x01", "found binary data"),
        ("c.txt", "text".encode("utf-16"), "found binary data"),
        ("c.txt", b"one\ntwo\ncaf\xe9", "line 3 must be UTF-8; found the byte 0xe9"),
        ("c.jsonl", GOOD + b'{"text": "caf\xe9"}\n', "line 2 must be UTF-8"),
        ("c.jsonl", GOOD + b"\n{broken\n", "line 3 must be one JSON object; found no valid JSON"),
        ("c.jsonl", b"\n" + GOOD + b"{broken\n", "line 3 must be one JSON object; found no valid JSON"),
        ("c.jsonl", GOOD + b"[" * 100_000, "line 2 must be one JSON object; found no valid JSON"),
        ("c.jsonl", GOOD + b'"text"\n', "line 2 must be one JSON object; found a string: mend"),
        ("c.json", b'[\n{"text": "a"}\n]', "line 1 must be one JSON object"),
        ("c.jsonl", GOOD + b'{"body": "a", "id": 1}\n',
         "line 2 must have the text field 'text'; found the fields body, id"),
        ("c.jsonl", GOOD + b"{}\n", "line 2 must have the text field 'text'; found the fields none"),
        ("c.jsonl", GOOD + b'{"text": null}\n',
         "line 2 must hold a string in 'text'; found null: name another field"),
        ("c.jsonl", GOOD + b'{"text": ["a"]}\n', "line 2 must hold a string in 'text'; found a list"),
        ("c.jsonl", GOOD + b'{"text": "\\ud800"}\n', "line 2 must hold Unicode text"),
        ("c.parquet", b"PAR1 and no more", "must be a whole Parquet file"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(path)
    sentence = str(caught.value)
    assert message in sentence
    assert str(path) in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"body": ["a"]}, "must have the text column 'text'; found the fields body"),
        ({"text": [1]}, "must hold strings in the column 'text'; found int64"),
        ({"text": ["a", None]}, "row 2 must hold a string in 'text'; found null"),
    ],
)
def test_bad_parquet(tmp_path, column, message):
    pyarrow.parquet.write_table(pyarrow.table(column), tmp_path / "c.parquet")
    with pytest.raises(UserError, match=message):
        read(tmp_path / "c.parquet")


def test_without_pyarrow_the_sentence_says_how_to_get_it(tmp_path, monkeypatch):
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs the package pyarrow.*pip install 'sparse-lm\[parquet\]'"):
        read(tmp_path / "c.parquet")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.jsonl", "there is no file"),
        ("*.jsonl", "no file matches"),
        ("", "is a directory without token shards: pass"),
        ("sub*", "no file matches"),
    ],
)
def test_paths_that_are_no_files(tmp_path, path, message):
    (tmp_path / "sub").mkdir()
    with pytest.raises(UserError, match=message) as caught:
        read(f"{tmp_path}/{path}")
    assert str(tmp_path) in str(caught.value)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = tmp_path / "c.txt"
    path.write_text("text")
    path.chmod(0)
    if os.access(path, os.R_OK):  # root reads everything

        def refuse(self, mode):
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(type(path), "open", refuse)
    with pytest.raises(UserError, match=r"c\.txt cannot be read: Permission denied"):
        read(path)
