"""New figures beside an older file's."""

import json

import pytest

from train.bench import against
from train.bench.results import CommonOptions
from train.errors import UserError

NEW = {
    "device": {"kind": "NVIDIA H200"},
    "versions": {"jax": "0.11.2"},
    "options": {"nnz": 30, "batch_size": 8, "model": {"d_ff": 64}},
    "rows": [
        {"name": "dense", "median_ms": 10.0},
        {"name": "panel", "median_ms": 5.5},
        {"name": "auto", "median_ms": 6.0},
    ],
}
OLD = {
    "device": {"kind": "NVIDIA H100"},
    "versions": {"jax": "0.11.2"},
    "options": {"nnz": 45, "batch_size": 8, "model": {"d_ff": 128}},
    "rows": [
        {"name": "dense", "median_ms": 10.0},
        {"name": "panel", "median_ms": 5.0},
        {"name": "twell", "median_ms": None},
    ],
}


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "old.json"
    path.write_text(json.dumps(OLD))
    return path


def test_ratios_and_what_else_differs(old):
    lines, beyond = against.compare(NEW, old)
    assert lines[1:] == [
        "  device differs: NVIDIA H200 here, NVIDIA H100 there",
        "  nnz differs: 30 here, 45 there",
        "  model differs",
        "  dense: 10 ms, 1.000 of 10",
        "  panel: 5.5 ms, 1.100 of 5",
        "  auto: only here has it a time",
    ]
    assert beyond == []


@pytest.mark.parametrize(("tolerance", "count"), [(0.05, 1), (0.11, 0), (0.0, 1)])
def test_only_what_is_slower_than_the_tolerance_is_named(old, tolerance, count):
    _, beyond = against.compare(NEW, old, tolerance=tolerance)
    assert len(beyond) == count
    assert all(sentence.startswith("panel takes 10.0% longer than in ") for sentence in beyond)


def test_a_slower_case_ends_the_program_only_if_asked(old):
    from rich.console import Console

    console = Console(record=True)
    CommonOptions(against=str(old)).print_against(console, NEW)
    assert "panel: 5.5 ms" in console.export_text()
    with pytest.raises(UserError, match=r"panel takes 10.0% longer .*--tolerance allows 5.0%"):
        CommonOptions(against=str(old), tolerance=0.05).print_against(console, NEW)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [{"name": "dense"}]}', '{"rows": [1]}'])
def test_a_wrong_file_is_a_sentence(tmp_path, text):
    path = tmp_path / "wrong.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"--against must name a file .*wrong\.json is none"):
        against.compare(NEW, path)


def test_a_missing_file_and_other_cases_are_sentences(tmp_path):
    with pytest.raises(UserError, match=r"none\.json: No such file"):
        against.compare(NEW, tmp_path / "none.json")
    path = tmp_path / "other.json"
    path.write_text(json.dumps(OLD | {"rows": [{"name": "layer, 1 tokens, auto", "median_ms": 1.0}]}))
    with pytest.raises(UserError, match=r"must have a case of this run; .* has layer, 1 tokens, auto"):
        against.compare(NEW, path)
