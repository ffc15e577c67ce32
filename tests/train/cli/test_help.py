"""What ``--help`` shows: each option with a sentence, as a terminal shows text."""

import dataclasses
import re

import pytest

from train import cli
from train.cli.options import parse_options

COMMANDS = [
    "train", "tokenize", "generate", "chat", "evaluate", "analyze", "convert", "layer-inputs", "plot",
    "sweep", "compare", "bench model", "bench step", "bench decode", "bench order", "bench gate-bound",
    "bench scaling", "bench curves",
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained_in_plain_text(capsys, command):
    assert cli.main([*command.split(), "--help"]) == 0
    shown, err = capsys.readouterr()
    assert err == ""
    lines = [line.strip("│| ") for line in shown.splitlines()]  # the frame follows the encoding of stdout
    options = [nth for nth, line in enumerate(lines) if re.match(r"--[a-z0-9.-]+( |,|$)", line)]
    assert options
    bare = [lines[nth] for nth in options if lines[nth + 1].startswith("(default")]
    assert bare == [], "options of which only the default is shown"
    assert "Attributes:" not in shown, "a docstring that was not understood is shown as it is written"
    for mark in ("`", "(default: None)", "(default: )", "{None}"):
        assert mark not in shown


def test_a_default_is_shown_where_it_says_something(capsys):
    @dataclasses.dataclass(frozen=True)
    class Options:
        """Does ``this``.

        Attributes:
          size: ``"small"`` or
            ``"large"``.
          name: of the thing.
          parts: of it.
        """

        size: str = "small"
        name: str | None = None
        parts: tuple[int, ...] = ()

    with pytest.raises(SystemExit):
        parse_options(Options, ["--help"], "test")
    shown = " ".join(capsys.readouterr().out.replace("│", " ").replace("|", " ").split())
    assert '--size STR "small" or "large". (default: small)' in shown
    assert "--name STR of the thing. --parts [INT [INT ...]] of it." in shown
    assert parse_options(Options, ["--name", "x", "--parts", "1", "2"], "test") == Options(
        "small", "x", (1, 2)
    )
