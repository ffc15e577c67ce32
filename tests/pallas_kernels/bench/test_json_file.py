"""Figures in files: an older file stands, and nothing that is no file is replaced by one."""

import json
import os
import stat

import pytest

from pallas_kernels.bench.json_file import JsonFile


def test_figures_replace_an_older_file_and_a_failed_run_leaves_it(tmp_path):
    path = tmp_path / "new" / "figures.json"
    JsonFile(path)
    assert os.listdir(path.parent) == []
    JsonFile(path).write({"old": 1})
    file = JsonFile(path)
    assert json.loads(path.read_text()) == {"old": 1}
    file.write({"new": 2})
    assert json.loads(path.read_text()) == {"new": 2}
    assert os.listdir(path.parent) == ["figures.json"]


def test_a_pipe_gets_the_figures_and_stays_one(tmp_path):
    """As a device does: a rename onto /dev/null would take it from the whole machine."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        JsonFile(path).write({"ms": 3})
        assert json.loads(os.read(reader, 4096)) == {"ms": 3}
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(path.stat().st_mode)
    assert os.listdir(tmp_path) == ["pipe"]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_one(tmp_path, there):
    link, target = tmp_path / "link.json", tmp_path / "elsewhere" / "target.json"
    target.parent.mkdir()
    if there:
        target.write_text("{}")
    link.symlink_to(target)
    JsonFile(link).write({"ms": 3})
    assert link.is_symlink()
    assert json.loads(target.read_text()) == {"ms": 3}


def test_what_cannot_be_written_is_said_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"--json must name a file that can be written; .*: Is a directory"):
        JsonFile(tmp_path)
