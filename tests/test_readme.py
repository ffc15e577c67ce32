"""Commands, options, files and names that README, CONTRIBUTING and docs/ show exist. Nothing runs."""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import pkgutil
import re
import shlex
import tomllib
from pathlib import Path

import pytest

import pallas_kernels
import pallas_kernels.bench.__main__ as kernel_benchmarks
import sparse_lm
import train.cli

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
# What has been removed is named in the changelog: its links are checked, and none of its code.
CURRENT = [path for path in DOCUMENTS if path.name != "CHANGELOG.md"]
PUBLIC = {name: getattr(module, name) for module in (pallas_kernels, sparse_lm) for name in module.__all__}

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`]+)`")
_PROGRAM = re.compile(r"^(\.venv/bin/)?sparse-lm\b|^python -m |^make\b|^pip install ")
_TRACKED = ("pallas_kernels/", "sparse_lm/", "train/", "configs/", "tests/", "docs/", "examples/", ".ci/")


def blocks(path, language):
    return [text for name, text in _FENCE.findall(path.read_text()) if name == language]


def inline(path):
    """Code inside sentences, of which a line's end may be a part."""
    prose = _FENCE.sub("", path.read_text())
    return [" ".join(code.split()) for code in _INLINE.findall(prose)]


def commands(path):
    """Of shell blocks, of blocks that show a program's output, and of sentences."""
    shown = "\n".join(blocks(path, "sh") + blocks(path, "")).replace("\\\n", " ").splitlines()
    return [text for text in (*map(str.strip, shown), *inline(path)) if _PROGRAM.match(text)]


def cases(of):
    found = [pytest.param(path, text, id=f"{path.name}-{text[:60]}") for path in CURRENT for text in of(path)]
    assert found
    return found


class Parsed(Exception):
    """The options were understood, and the command would begin."""


@pytest.fixture
def parsed_only(monkeypatch):
    """``sparse-lm`` ends where its parser has."""
    for module in pkgutil.iter_modules(train.cli.__path__):
        command = importlib.import_module(f"train.cli.{module.name}")
        parse = getattr(command, "parse_options", None)
        if parse is None or module.name == "options":
            continue

        def parse_alone(*arguments, parse=parse, **keywords):
            raise Parsed(parse(*arguments, **keywords))

        monkeypatch.setattr(command, "parse_options", parse_alone)
    # Which defaults the options of a run have depends on the model that --from names, and there is none here.
    monkeypatch.setattr("train.run.parent.inherited", lambda config, source: config)


def check_sparse_lm(argv, capsys):
    if argv[0] == "bench" and argv[1:2] and argv[1] in kernel_benchmarks.COMMANDS:
        check_kernel_benchmark(argv[1:])
        return
    if argv[0] == "bench" and len(argv) == 2:  # a benchmark's name in a sentence
        assert re.search(rf"^  {argv[1]} ", train.cli.bench._HELP, re.MULTILINE)
        return
    try:
        status = train.cli.main(argv)
    except Parsed:
        return
    output = capsys.readouterr()
    if len(argv) == 1:  # a command's name in a sentence, whose options are not spelled out
        assert re.search(rf"^  {argv[0]} ", train.cli.program._HELP, re.MULTILINE)
    else:
        assert status == 0, output.err


def check_kernel_benchmark(argv):
    name, *rest = argv
    assert name in kernel_benchmarks.COMMANDS
    if rest:
        importlib.import_module(f"pallas_kernels.bench.{name}")._parser().parse_args(rest)


@pytest.mark.usefixtures("parsed_only")
@pytest.mark.parametrize(("path", "text"), cases(commands))
def test_a_command_is_understood(path, text, capsys):
    program, *argv = shlex.split(text, comments=True)
    if program.endswith("sparse-lm"):
        check_sparse_lm(argv, capsys)
    elif program == "make":
        target, *assignments = argv or ["train"]  # make's first target
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        values = dict(assignment.split("=", 1) for assignment in assignments)
        if target == "train" and "ARGS" in values:
            check_sparse_lm(["train", "--config", "tiny", *shlex.split(values["ARGS"])], capsys)
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(re.findall(r"\[(\w+)\]", text)) <= extras.keys()
    else:
        module, *rest = argv[1:]
        assert importlib.util.find_spec(module) is not None
        if module == "pallas_kernels.bench":
            check_kernel_benchmark(rest)
    for word in argv:
        if word.startswith(_TRACKED):
            assert (ROOT / word).exists()


def known_options(capsys):
    """Every option of every program, as ``--help`` has them."""
    commands = re.findall(r"^  ([a-z][a-z-]+) ", train.cli.program._HELP, re.MULTILINE)
    names = ("model", "step", "decode", "order", "gate-bound", "scaling", "curves")
    benchmarks = [["bench", name] for name in names]
    for argv in [*([name] for name in commands if name != "bench"), *benchmarks]:
        assert train.cli.main([*argv, "--help"]) == 0
    text = capsys.readouterr().out
    for name in kernel_benchmarks.COMMANDS:
        text += importlib.import_module(f"pallas_kernels.bench.{name}")._parser().format_help()
    return set(re.findall(r"--[a-z][a-z0-9.-]*", text)) | {"--help", "--version"}


def test_options_named_in_sentences_exist(capsys):
    known = known_options(capsys)
    named = {
        word
        for path in CURRENT
        for code in inline(path)
        if not _PROGRAM.match(code)
        for word in code.split()
        if re.fullmatch(r"--[a-z][\w.-]*", word)
    }
    assert named
    assert named <= known


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(path):
    prose = _FENCE.sub("", path.read_text())
    links = [link for link in re.findall(r"\]\(([^)]+)\)", prose) if "://" not in link]
    for link in links:
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings], link


@pytest.mark.parametrize("path", CURRENT, ids=lambda path: path.name)
def test_files_named_in_sentences_exist(path):
    sources = {file.name for folder in _TRACKED[:-1] for file in (ROOT / folder).rglob("*.py")}
    for code in inline(path):
        if code.startswith(_TRACKED) and " " not in code:
            assert (ROOT / code).exists(), code
        elif re.fullmatch(r"\w+\.py", code):
            assert code in sources, code


def imported(tree):
    """(module, name or None) of every import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)


def is_constant(call):
    """Whether a call's arguments are all written out: constants, and calls of public names with such."""
    parts = list(ast.walk(call))
    named = all(part.id in PUBLIC for part in parts if isinstance(part, ast.Name))
    return named and not any(isinstance(part, ast.Constant) and part.value is ... for part in parts)


def check_public_names(tree):
    """Arguments that calls of public names are given, options' values, and attributes of public classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in PUBLIC:
            called = PUBLIC[node.func.id]
            signature = inspect.signature(called.__init__ if inspect.isclass(called) else called)
            wrong = {keyword.arg for keyword in node.keywords if keyword.arg} - signature.parameters.keys()
            assert not wrong, f"{node.func.id} has no {', '.join(wrong)}"
            if dataclasses.is_dataclass(called) and is_constant(node):
                eval(compile(ast.Expression(node), "", "eval"), dict(PUBLIC))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in PUBLIC:
            owner = PUBLIC[node.value.id]
            fields = getattr(owner, "__dataclass_fields__", {})
            assert node.attr in fields or hasattr(owner, node.attr), f"{node.value.id} has no {node.attr}"


@pytest.mark.parametrize(("path", "text"), cases(lambda path: blocks(path, "python")))
def test_a_python_block_compiles_and_its_names_exist(path, text):
    compile(text, path.name, "exec")
    tree = ast.parse(text)
    for module, name in imported(tree):
        found = importlib.import_module(module)
        assert name is None or hasattr(found, name), f"{module} has no {name}"
    check_public_names(tree)


@pytest.mark.parametrize("path", CURRENT, ids=lambda path: path.name)
def test_python_in_sentences_names_what_there_is(path):
    for code in inline(path):
        try:
            tree = ast.parse(code, mode="eval")
        except SyntaxError:
            continue
        check_public_names(tree)
