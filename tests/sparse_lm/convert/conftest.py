"""Small models of every family, made by transformers: see make_goldens.py."""

import shutil
from pathlib import Path

import pytest

GOLDENS = Path(__file__).parent / "goldens"
CASES = sorted(path.name for path in GOLDENS.iterdir())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", CASES)


@pytest.fixture
def golden(case: str) -> Path:
    """The directory of one model; nobody writes into it."""
    return GOLDENS / case


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A copy of the plainest model, to be spoiled."""
    return Path(shutil.copytree(GOLDENS / "llama", tmp_path / "llama"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A copy of a model in several files, to be spoiled."""
    return Path(shutil.copytree(GOLDENS / "llama_sparse_relu", tmp_path / "sharded"))
