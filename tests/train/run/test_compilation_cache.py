"""Compiled programs are kept where a run is told to, and the process is as before when it is over."""

import json

import jax
import programs
import pytest

from train import cli
from train.errors import UserError
from train.run.compilation_cache import kept, where


def train(corpus, workdir, *options, steps=1):
    assert cli.main(programs.train(corpus, workdir, "--steps", str(steps), *options)) == 0
    return json.loads((workdir / "manifest.json").read_text())["compiled"]


def test_a_run_keeps_its_programs_where_it_is_told_to(corpus, tmp_path, capsys):
    before = where()
    directory = tmp_path / "new" / "compiled"
    assert train(corpus, tmp_path / "run", "--compilation-cache", str(directory)) == str(directory)
    assert f"compiled programs are kept in {directory}\n" in capsys.readouterr().out
    assert any("train_step" in path.name for path in directory.iterdir())
    assert where() == before
    resumed = train(corpus, tmp_path / "run", "--compilation-cache", f"{directory}-2", steps=2)
    assert resumed == f"{directory}-2"


def test_a_run_that_keeps_none(corpus, tmp_path, capsys):
    with kept(str(tmp_path / "compiled")):
        assert train(corpus, tmp_path / "run", "--compilation-cache", "off") is None
    assert "compiled programs are not kept\n" in capsys.readouterr().out
    assert list((tmp_path / "compiled").iterdir()) == []


def test_by_default_the_users_cache_is_taken_on_gpus_and_what_jax_was_told_goes_first(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    told = where()
    with kept(""):
        assert where() == told is not None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        with kept(""):
            assert where() == str(tmp_path / "sparse-lm" / "compiled")
        assert where() is None
        (tmp_path / "sparse-lm" / "compiled").rmdir()
        (tmp_path / "sparse-lm").rmdir()
        (tmp_path / "sparse-lm").write_text("not a directory")
        with kept(""):
            assert where() is None
    finally:
        jax.config.update("jax_compilation_cache_dir", told)


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="compilation-cache must name a directory that can be made; got "),
        kept(str(tmp_path / "file" / "compiled")),
    ):
        pass
