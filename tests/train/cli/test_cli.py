"""The program as a user types it: what works, and one sentence and a status for each mistake."""

import itertools
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import configs
from pallas_kernels import FFNOptions, Panel, sparse_ffn
from sparse_lm import ModelConfig
from train import cli
from train.cli.options import UsageError, parse_options
from train.data.tokenizer import ByteTokenizer

SMALL = {
    "--steps": "2", "--batch-size": "4", "--data.tokenizer": "byte", "--model.vocab-size": "257",
    "--model.d-model": "16", "--model.d-ff": "32", "--model.num-layers": "1", "--model.num-heads": "2",
    "--model.num-kv-heads": "1", "--model.context-length": "16", "--report.evaluate-tokens": "64",
    "--optimizer.warmup-steps": "1",
}  # fmt: skip


def complaint(capsys, *argv):
    """Status and sentence of a command that fails before it prints anything else."""
    status = cli.main(argv)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sparse-lm: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return status, err.removeprefix("sparse-lm: ").rstrip()


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("",
         "expected a command, one of train, tokenize, generate, chat, evaluate, analyze, convert, "
         "layer-inputs, plot, bench, compare, sweep; got none: see sparse-lm --help"),
        ("trian",
         "expected a command, one of train, tokenize, generate, chat, evaluate, analyze, convert, "
         "layer-inputs, plot, bench, compare, sweep; got 'trian'; did you mean train?"),
        ("train --config tinny",
         "config must be one of 0p5b, 1b, 1p5b, 2b, small, study, tiny; got 'tinny'; did you mean tiny?"),
        ("train --config", "config must be one of 0p5b, 1b, 1p5b, 2b, small, study, tiny; got ''"),
        ("train --stepz 4", "unknown option --stepz; did you mean --steps?"),
        ("train --model.stepz=4 --steps 3", "unknown option --model.stepz"),
        ("train --weight_decay 1", "unknown option --weight-decay; did you mean --optimizer.weight-decay?"),
        ("train --beta1 1", "unknown option --beta1; did you mean --optimizer.beta1?"),
        ("train --lr x", "--optimizer.learning-rate must be a number; got 'x'"),
        ("train --l1=-1", "model.sparsity.l1 must be a finite number of at least 0; got -1.0"),
        ("train --resume", "there is no --resume: a run goes on by itself from the newest checkpoint in its"),
        ("train --profile 9:3", "report.profile must be two steps FIRST:LAST, the first no later; got '9:3'"),
        ("bench curves --out y.png", "bench curves needs at least one file of results; got none"),
        ("train --zzz", "unknown option --zzz: see sparse-lm train --help"),
        ("train extra", "unexpected argument 'extra': sparse-lm train takes options only, see its --help"),
        ("train --steps", "--steps needs a value; got none"),
        ("train --steps abc", "--steps must be a whole number; got 'abc'"),
        ("train --steps 1e3", "--steps must be a whole number; got '1e3'"),
        ("train --optimizer.eps x", "--optimizer.eps must be a number; got 'x'"),
        ("generate --checkpoint x --top-k y", "--top-k must be a whole number or None; got 'y'"),
        ("train --model.ffn.format panl",
         "FFNOptions.format must be one of auto, panel, hybrid, twell, decode, dense; got 'panl'"),
        ("train --model.ffn.format=panel(tokens=65)",
         "Panel.tokens must be a power of two from 16 to 128; got 65"),
        ("train --model.ffn.format=panel(width=64)",
         "format 'panel' has the options tokens, capacity, block_tokens; got 'width=64'"),
        ("train --model.ffn.format=hybrid(width=x)",
         "Hybrid.width must be a number; got 'x' in 'hybrid(width=x)'"),
        ("train --model.ffn.format.tokens 64", "unknown option --model.ffn.format.tokens"),
        ("train --model.ffn.activation=threshold(0.1)",
         "model.ffn.activation must be left out, model.activation is the model's; got threshold(0.1)"),
        ("train --model.ffn.activation gelu", "activation must be one of relu, relu2, drelu"),
        ("train --model.activation gelu", "model.activation: activation must be one of relu, relu2, drelu"),
        ("train --model.dtype f32",
         "--model.dtype must be one of 'bfloat16', 'float16', 'float32'; got 'f32'"),
        ("train --steps 0", "steps must be at least 1 and under 2^31; got 0"),
        ("train --seed -1", "seed must be at least 0 and under 2^32; got -1"),
        ("train --data.paths=", "data.paths must name files; got ''"),
        ("train --model.gated false",
         "--model.gated takes no value; got 'false': write --model.gated or --model.no-gated"),
        ("generate --debug=yes --checkpoint x",
         "--debug takes no value; got 'yes': write --debug or --no-debug"),
        ("train --model.sparsity.l1 -1", "model.sparsity.l1 must be a finite number of at least 0; got -1.0"),
        ("train --model.num-heads 7", "model.num-heads must divide model.d-model=128; got 7"),
        ("train --optimizer.accumulation 5", "batch-size must be a multiple of optimizer.accumulation=5"),
        ("generate --prompt x", "generate needs --checkpoint; got none"),
        ("generate --checkpoint x", "generate needs at least one --prompt TEXT; got none"),
        ("generate --checkpoint x --prompt y --temperature -1",
         "--temperature must be a finite number of at least 0"),
        ("generate --checkpoint x --prompt y --top-p 2", "--top-p must be over 0 and at most 1"),
        ("generate --checkpoint x --prompt \udcff", "--prompt must be UTF-8 text; prompt 1 is not"),
        ("evaluate", "evaluate needs --checkpoint; got none"),
        ("evaluate --checkpoint x --data.every-document", "--data.every-document needs --data.paths"),
        ("evaluate --checkpoint x --data.text-field y", "--data.text-field needs --data.paths; got none"),
        ("evaluate --checkpoint x --jsn y", "unknown option --jsn; did you mean --json?"),
        ("layer-inputs --checkpoint x", "layer-inputs needs --out; got none"),
        ("generate --checkpoint x --prompt y --stop=", "--stop must have a character; got none"),
        ("chat --checkpoint x --stop=", "--stop must have a character; got none"),
        ("chat --checkpoint x --top-p 2", "--top-p must be over 0 and at most 1"),
        ("bench model --rounds 0", "rounds must be at least 1; got 0"),
        ("bench decode --rounds 0", "rounds must be at least 1; got 0"),
        ("bench decode --tokens 0", "batches and tokens must be at least 1; got 1, 8, 32, 0"),
        ("bench step --batch-size 0", "batch-size must be at least 1; got 0"),
        ("bench model --tolerance 0.1", "tolerance needs --against, the result that it is of; got none"),
        ("bench step --tolerance -1 --against x", "tolerance must be at least 0; got -1"),
        ("bench decode --against x --json x", "--json must name another file than --against"),
        ("bench decode --agianst x", "unknown option --agianst; did you mean --against?"),
        ("bench order --checkpoint x --panels 0", "panels must be numbers of at least 1; got 0"),
        ("generate --checkpoint x --prompt y --max-new-tokens 0",
         "--max-new-tokens must be at least 1; got 0"),
        ("generate --checkpoint x --prompt y --seed -1", "--seed must be at least 0 and under 2^32; got -1"),
        ("chat --checkpoint x --speculate 16", "--speculate must be from 0 to 15 tokens a step; got 16"),
        ("evaluate --checkpoint x --tokens 0", "--tokens must be at least 1; got 0"),
        ("evaluate --checkpoint x --batch-size 0", "--batch-size must be at least 1; got 0"),
        ("layer-inputs --checkpoint x --out x.npy", "--out must end with .npz; got x.npy"),
        ("layer-inputs --checkpoint x --out x.npz --tokens 0", "--tokens must be at least 1; got 0"),
        ("plot x --out x.txt", "--out must end with .png, .svg or .pdf; got x.txt"),
        ("bench curves x.json --out x.txt", "--out must end with .png, .svg or .pdf; got x.txt"),
        ("plot x.json", "plot needs --out; got none"),
        ("plot --out x.png", "plot needs at least one work directory of a run; got none"),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line(capsys, command, sentence):
    status, said = complaint(capsys, *command.split())
    assert sentence in said
    assert status == 2


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("train --data.paths {tmp}/none.jsonl", "there is no file"),
        ("train --workdir {tmp}/file", "workdir must be a directory that can be made and written to; "),
        ("train --data.tokenizer {tmp}/none.json", "found no file"),
        ("train --data.tokenizer byte --model.vocab-size 100",
         "the tokenizer has 257 ids but model.vocab-size is 100"),
        ("train --data.tokenizer bpe --model.vocab-size 100", "at least 257"),
        ("generate --checkpoint {tmp}/none --prompt x", "there is none at"),
        ("generate --checkpoint {tmp} --prompt x", "found none"),
        ("evaluate --checkpoint {tmp}", "found none"),
        ("generate --checkpoint {run} --prompt 0123456789abcdef", "context of 16 tokens; got one of 16"),
        ("generate --checkpoint {run} --prompt x --max-new-tokens 16", "beyond the model's context of 16"),
        ("evaluate --checkpoint {tmp} --json {tmp}/x.json", "found none"),
        ("evaluate --checkpoint {run} --data.paths {tmp}/file.txt", "one window of the context; found 0: add "
         "text, or with --data.paths take all of it by --data.every-document"),
        ("evaluate --checkpoint {run} --json {tmp}/file/x.json",
         "--json must name a file that can be written; "),
        ("analyze --checkpoint {run} --out {tmp}/file", "file is a file: choose another"),
        ("analyze --checkpoint {tmp}/file --out {tmp}/x", "a directory; {tmp}/file is a file"),
        ("convert --source {tmp}/file --out {tmp}/x", "must be a directory; {tmp}/file is a file"),
        ("convert --source {run} --out {tmp}/x", "must be a Hugging Face model; {run} is a checkpoint"),
        ("plot {run} --out {tmp}/no/x.png", "a file in a directory that is there; {tmp}/no is none"),
        ("bench decode --config tiny", "--context must be from 1 to 112 and --prompt at most 128, in"),
        ("bench order --checkpoint {run} --tokens 64 --times panel", "needs an NVIDIA GPU"),
        ("layer-inputs --checkpoint {tmp} --out {tmp}/x.npz", "found none"),
        ("layer-inputs --checkpoint {run} --out {tmp}/no/x.npz",
         "--out must name a file in a directory that is there"),
        ("layer-inputs --checkpoint {run} --out {tmp}/x.npz --layers 2",
         "layers must be from 0 to 1, which the model has"),
        ("layer-inputs --checkpoint {run} --out {tmp}/x.npz --tokens 15",
         "tokens must be at least 16, one sequence"),
        ("bench curves {tmp}/none.json --out {tmp}/x.png", "none.json: No such file or directory"),
    ],
)  # fmt: skip
def test_mistakes_in_what_the_command_names(capsys, tmp_path, finished, command, sentence):
    words = command.format(tmp=tmp_path, run=finished.workdir).split()
    (tmp_path / "file").touch()
    (tmp_path / "file.txt").write_text("A document that is not held out.")
    if words[0] == "train" and "--workdir" not in words:
        words += ["--workdir", str(tmp_path / "run")]
    status, said = complaint(capsys, *words)
    assert sentence.format(tmp=tmp_path, run=finished.workdir) in said
    assert status == 1
    assert sorted(os.listdir(tmp_path)) == ["file", "file.txt"]


def test_a_reason_from_deep_inside_is_a_sentence(capsys, monkeypatch):
    def run(config, *, source, dry_run):
        x, weight = jnp.ones((2, 4)), jnp.ones((8, 4))
        jax.jit(lambda x: sparse_ffn(x, weight, weight, weight, options=config.model.ffn))(x)

    monkeypatch.setattr("train.run.loop.run", run)
    status, said = complaint(capsys, "train", "--model.ffn.format", "twell")
    assert said.startswith("backend='triton' needs an NVIDIA GPU")
    assert status == 1


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(Exception, match="there is none at"):
        cli.main(["evaluate", "--checkpoint", str(tmp_path / "none"), "--debug"])


def surprise_of_the_interpreter(config, *, source, dry_run):
    int("x")


def surprise_of_a_library(config, *, source, dry_run):
    json.loads("{")


@pytest.mark.parametrize("surprise", [surprise_of_the_interpreter, surprise_of_a_library])
def test_a_surprise_keeps_its_traceback(monkeypatch, surprise):
    monkeypatch.setitem(surprise.__globals__, "__name__", "train.run.loop")
    monkeypatch.setattr("train.run.loop.run", surprise)
    with pytest.raises(ValueError, match=r"invalid literal|Expecting property"):
        cli.main(["train"])


def test_train_alone_runs_the_tiny_preset_and_options_change_it(monkeypatch):
    seen = []
    monkeypatch.setattr("train.run.loop.run", lambda config, source, dry_run: seen.append(config))
    assert cli.main(["train"]) == 0
    assert (
        cli.main(
            ["train", "--config", "1b", "--steps=7", "--model.sparsity.l1", "0", "--data.paths", "a", "b"]
        )
        == 0
    )
    assert seen[0] == configs.load("tiny")
    assert seen[1].steps == 7
    assert seen[1].model.sparsity.l1 == 0
    assert seen[1].data.paths == ("a", "b")
    assert seen[1].model.num_layers == configs.load("1b").model.num_layers


@pytest.mark.parametrize("text", ["panel", "panel(tokens=64)", "panel(tokens=64, capacity=0.5)"])
def test_a_format_is_one_text(monkeypatch, text):
    seen = []
    monkeypatch.setattr("train.run.loop.run", lambda config, source, dry_run: seen.append(config))
    assert cli.main(["train", "--model.ffn.format", text]) == 0
    assert seen[0].model.ffn == FFNOptions(format=text)


def test_a_format_of_a_preset_is_a_default_as_text(capsys):
    default = ModelConfig(ffn=FFNOptions(format=Panel(tokens=64)))
    assert parse_options(ModelConfig, [], "train", default) == default
    with pytest.raises(UsageError, match=r"unknown option --ffn\.formt; did you mean --ffn\.format\?"):
        parse_options(ModelConfig, ["--ffn.formt", "x"], "train", default)
    with pytest.raises(SystemExit):
        parse_options(ModelConfig, ["--help"], "train", default)
    assert "(default: 'panel(tokens=64)')" in " ".join(capsys.readouterr().out.split())


def test_interrupts_end_quietly(capsys, monkeypatch):
    def interrupted(config, *, source, dry_run):
        raise KeyboardInterrupt

    monkeypatch.setattr("train.run.loop.run", interrupted)
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("--help", ["train", "generate", "evaluate", "layer-inputs", "plot"]),
        (
            "train --help",
            [
                "--config",
                "--steps",
                "--lr                --optimizer.learning-rate",
                "--model.sparsity.l1",
                "--workdir",
            ],
        ),
        ("train --config 1b --help", ["--config STR", "(default: 1b)", "(default: 20000)"]),
        ("generate --help", ["--checkpoint", "--prompt", "--temperature", "--top-k", "--top-p", "--seed"]),
        ("evaluate --help", ["--checkpoint", "--json", "--tokens", "--data.paths"]),
        ("layer-inputs --help", ["--checkpoint", "--out", "--tokens", "--layers"]),
        ("plot --help", ["--out", "work directories of runs"]),
        ("bench --help", ["layers", "stages", "model", "step", "decode", "order", "curves"]),
        ("bench curves --help", ["--out", "bench layers"]),
        ("analyze --help", ["--checkpoint", "--out", "--data.paths", "report.html"]),
    ],
)
def test_help_names_the_options(capsys, command, names):
    assert cli.main(command.split()) == 0
    out, err = capsys.readouterr()
    assert [name for name in names if name not in out] == []
    assert err == ""


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("sparse-lm ")


@pytest.mark.parametrize(
    "command", ["--help", "--version", "trian", "train --config tinny", "generate --stepz"]
)
def test_nothing_heavy_is_imported_before_it_is_needed(command):
    code = (
        f"import sys; from train.cli import main; main({command.split()!r}); assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=_root())


def test_train_in_a_process_of_its_own(tmp_path, corpus):
    workdir = tmp_path / "run"
    options = [*itertools.chain(*SMALL.items()), "--data.paths", str(corpus), "--workdir", str(workdir)]
    options += ["--checkpoint.every", "1"]  # the first without held-out figures, of which orbax would warn
    process = subprocess.run(
        [sys.executable, "-m", "train", "train", *options],
        capture_output=True,
        text=True,
        cwd=_root(),
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )
    assert process.returncode == 0, process.stderr
    assert f"python -m train generate --checkpoint {workdir}" in process.stdout
    assert "Traceback" not in process.stderr
    assert "WARNING" not in process.stderr


def test_a_mistake_in_a_process_of_its_own():
    process = subprocess.run(
        [sys.executable, "-m", "train", "generate", "--promt", "x", "--checkpoint", "y"],
        capture_output=True,
        text=True,
        cwd=_root(),
    )
    assert process.returncode == 2
    assert process.stderr == "sparse-lm: unknown option --promt; did you mean --prompt?\n"


@pytest.mark.parametrize("prompt", ["the road 🙂", ""])
def test_generate_streams_its_prompt_and_what_follows(capsys, finished, prompt):
    assert cli.main(["generate", "--checkpoint", str(finished.workdir), "--prompt", prompt]) == 0
    out = capsys.readouterr().out
    assert out.startswith(prompt)
    assert out.endswith("\n")


def test_generate_takes_several_prompts(capsys, finished):
    options = ["--checkpoint", str(finished.workdir), "--max-new-tokens", "4", "--temperature", "0"]
    assert cli.main(["generate", *options, "--prompt", "the road"]) == 0
    alone = capsys.readouterr().out
    assert cli.main(["generate", *options, "--prompt", "the road", "--prompt", "we"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("[1/2] the road")
    assert "[2/2] we" in out
    # A stream never shows what may yet become a character; at the end nothing more can come.
    assert out.removeprefix("[1/2] ").replace("\ufffd", "").startswith(alone.rstrip())


@pytest.mark.parametrize(
    ("stops", "shown"),
    [
        (["lamp"], "the "),
        (["mps", "wi"], "the lamp "),
        (["harbour"], "the lamp wind"),
        (["d", "nd"], "the lamp wi"),
    ],
)
def test_a_string_to_stop_at_ends_the_text_and_is_never_shown(capsys, monkeypatch, finished, stops, shown):
    """Nor a beginning of it; what only began like it is shown in the end."""
    letters = ByteTokenizer().encode("the lamp wind")
    monkeypatch.setattr("sparse_lm.generate.stream", lambda *a, **k: ([letter] for letter in letters))
    options = [word for stop in stops for word in ("--stop", stop)]
    assert cli.main(["generate", "--checkpoint", str(finished.workdir), "--prompt", "> ", *options]) == 0
    assert capsys.readouterr().out == f"> {shown}\n"


def test_generate_says_how_fast_it_was(capsys, finished):
    options = ["--checkpoint", str(finished.workdir), "--max-new-tokens", "4", "--prompt", "x", "--seed", "3"]
    assert cli.main(["generate", *options]) == 0
    pattern = r"\d tokens?, the first after \d+\.\d\d s(, then [\d,.]+ tokens/s)? \(compilation included\)"
    assert re.search(pattern, capsys.readouterr().err)


def test_generate_with_speculation_says_the_same(capsys, finished):
    options = ["--checkpoint", str(finished.workdir), "--prompt", "we", "--seed", "1"]
    assert cli.main(["generate", *options]) == 0
    plain = capsys.readouterr().out
    assert cli.main(["generate", *options, "--speculate", "4"]) == 0
    out, err = capsys.readouterr()
    assert out == plain
    assert re.search(r", \d\.\d\d tokens a step$", err)


def test_a_character_of_several_tokens_is_never_broken_on_its_way(capsys, monkeypatch, finished):
    letters = ByteTokenizer().encode("é🙂 東")
    monkeypatch.setattr("sparse_lm.generate.stream", lambda *a, **k: ([letter] for letter in letters))
    assert cli.main(["generate", "--checkpoint", str(finished.workdir), "--prompt", "x"]) == 0
    assert capsys.readouterr().out == "xé🙂 東\n"


def test_evaluate_repeats_what_training_measured(capsys, finished):
    assert cli.main(["evaluate", "--checkpoint", str(finished.workdir), "--json", "-"]) == 0
    out, err = capsys.readouterr()
    figures = json.loads(out)
    assert figures["step"] == finished.config.steps
    assert figures["ce"] == pytest.approx(finished.result.evaluation.ce, rel=1e-5)
    assert "bits per byte" in err


@pytest.fixture
def evaluated(monkeypatch, finished):
    monkeypatch.setattr("train.evaluate.evaluate_checkpoint", lambda *a, **k: finished.result.evaluation)
    return finished.result.evaluation


def test_evaluate_prints_a_table_and_writes_json(capsys, evaluated, tmp_path):
    path = tmp_path / "figures.json"
    assert cli.main(["evaluate", "--checkpoint", "x", "--json", str(path)]) == 0
    assert "bits per byte\n" in capsys.readouterr().out
    assert json.loads(path.read_text())["ce"] == evaluated.ce


def test_an_error_of_the_system_is_a_sentence(capsys, evaluated, tmp_path):
    (tmp_path / "no").touch()
    target = tmp_path / "no" / "figures.json"
    assert cli.main(["evaluate", "--checkpoint", "x", "--json", str(target)]) == 1
    assert capsys.readouterr().err == (
        f"sparse-lm: --json must name a file that can be written; {target}: File exists\n"
    )


def test_a_device_without_room_is_a_sentence(capsys, monkeypatch):
    def run(config, *, source, dry_run):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")

    monkeypatch.setattr("train.run.loop.run", run)
    status, said = complaint(capsys, "train")
    assert "it ran out of memory: lower the batch size" in said
    assert status == 1


def _root():
    return os.path.dirname(os.path.dirname(os.path.dirname(cli.__file__)))


def test_what_an_error_cut_off_is_not_heard_of_at_the_end():
    """Reads that were under way when another one failed are collected as late as the interpreter's end, and
    their threads find the event loop closed, which C++ reports as an error that nobody caught."""
    program = """
import sys
from train.cli import program

def read():
    try:
        yield
    except GeneratorExit as cut_off:
        raise Exception("Encountered error while reading") from cut_off

under_way = read()
next(under_way)
def main():
    error = RuntimeError("Event loop is closed")
    sys.excepthook(RuntimeError, error, None)
    return 1

program.main = main
program.run()
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", "")
