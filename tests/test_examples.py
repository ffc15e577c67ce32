"""The examples run, and what docs/your-own-loop.md shows of them is what stands in them."""

import os
import re
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGE = ROOT / "docs" / "your-own-loop.md"
FOUR_DEVICES = "--xla_force_host_platform_device_count=4"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path):
    """Each asserts at its end what it is to show."""
    if FOUR_DEVICES not in path.read_text():
        runpy.run_path(str(path), run_name="__main__")
        return
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    assert FOUR_DEVICES in environment["XLA_FLAGS"]  # conftest.py's
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_page_links_to_an_example(path):
    assert f"(../examples/{path.name})" in PAGE.read_text()


def test_the_page_shows_the_examples_code():
    """Each block is of the example that is linked last before it, word for word."""
    parts = re.findall(r"\(\.\./examples/(\w+\.py)\)|^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    shown, source = 0, ""
    for name, block in parts:
        if name:
            source = textwrap.dedent((ROOT / "examples" / name).read_text())
        else:
            assert _unindented(block) in _unindented(source), block
            shown += 1
    assert shown == len(EXAMPLES)


def _unindented(code):
    return "\n".join(line.strip() for line in code.splitlines())
