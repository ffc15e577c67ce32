"""``sparse-lm sweep`` at a size of seconds: what it writes, how it goes on, and what it refuses."""

import json
from pathlib import Path

import programs
import pytest
import tiny_runs

import configs
from sparse_lm.model import num_parameters
from train import cli
from train.config_json import changed_fields
from train.errors import UserError
from train.run import loop
from train.sweep.rows import Sweep

OPTIONS = (
    *programs.TINY, "--steps", "4", "--report.every", "2", "--report.evaluate-every", "0",
    "--checkpoint.every", "4", "--l1", "0", "0.5", "--variants", "silu",
)  # fmt: skip
ROWS = ("l1-0", "l1-0.5", "silu")


def words(corpus: Path, workdir: Path, *options: str) -> list[str]:
    return ["sweep", "study", *OPTIONS, "--data.paths", str(corpus), "--workdir", str(workdir), *options]


@pytest.fixture(scope="module")
def cut_off(corpus, tmp_path_factory):
    """A sweep without plans, as they once were, that ended when its second row was to begin, and the first
    row's files then."""
    workdir = tmp_path_factory.mktemp("sweep")
    train = loop.run

    def first_row_only(config, **how):
        if Path(config.workdir).name != ROWS[0]:
            raise UserError("no power")
        return train(config, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "run", first_row_only)
        assert cli.main([*words(corpus, workdir), "--plan", "off"]) == 1
    return workdir, {path: path.read_bytes() for path in (workdir / ROWS[0]).glob("*.json*")}


@pytest.fixture(scope="module")
def finished_sweep(corpus, cut_off):
    """The same command with its own defaults, and what it printed."""
    workdir, _ = cut_off
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr(
            "rich.console.Console.print", lambda self, *objects, **_: said.extend(map(str, objects))
        )
        assert cli.main(words(corpus, workdir)) == 0
    return workdir, json.loads((workdir / "sweep.json").read_text()), "\n".join(said)


def test_a_sweep_that_was_cut_off_goes_on_and_runs_no_finished_row_again(cut_off, finished_sweep):
    workdir, before = cut_off
    assert len(before) == 3  # config, manifest, metrics
    assert {path: path.read_bytes() for path in before} == before
    assert f"{workdir / ROWS[0]} was finished before" in finished_sweep[2]
    assert not any((workdir / name / "cache").exists() for name in ROWS), "text is tokenized once"


def test_each_row_is_a_run_of_its_own(finished_sweep):
    workdir, document, _ = finished_sweep
    assert [row["name"] for row in document["rows"]] == list(ROWS)
    for row in document["rows"]:
        config = json.loads((workdir / row["name"] / "config.json").read_text())
        assert config["model"] == row["config"]["model"]
        steps = [r for r in tiny_runs.read_records(workdir / row["name"]) if "ce" in r]
        assert [record["step"] for record in steps] == [1, 2, 3, 4]
        assert {record["l1_coefficient"] for record in steps} == {row["l1"]}
        assert row["quality"]["ce"] == tiny_runs.read_records(workdir / row["name"])[-1]["evaluation"]["ce"]
        assert row["speed"] is None
    by_name = {row["name"]: row for row in document["rows"]}
    assert by_name["silu"]["config"]["model"]["activation"] == "silu"
    assert by_name["silu"]["unions"] is None
    dense, sparse = by_name["l1-0"]["quality"], by_name["l1-0.5"]["quality"]
    assert dense["l0_per_layer"][0] > sparse["l0_per_layer"][0]


def test_the_table_has_the_figures_of_the_file(finished_sweep):
    workdir, document, said = finished_sweep
    table = (workdir / "sweep.md").read_text()
    assert table in said
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert rows[0] == "| run | held-out CE | of λ 0 | nnz | active | union of 128 | alike tokens | dead |"
    assert [line.split(" | ")[0] for line in rows[2:]] == ["| λ 0", "| λ 0.5", "| SiLU, dense"]
    for line, row in zip(rows[2:], document["rows"], strict=True):
        cells = line.strip("| ").split(" | ")
        assert cells[1] == f"{row['quality']['ce']:.4f}"
        assert cells[2] == f"{row['quality']['ce'] / document['rows'][0]['quality']['ce'] - 1:+.2%}"
        assert cells[3] == f"{row['quality']['l0_per_layer'][0]:.1f}"
    assert "4 steps of 4 × 16 tokens, 256 in all; one seed (0)" in table
    assert "Speed, memory and energy are measured on a GPU, and left out here on a CPU." in table
    assert (workdir / "sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--steps", "8"), "found one with steps 4 where 8 is asked for: choose another --workdir"),
        (("--model.dtype", "float32"), "found one with model.dtype 'bfloat16' where 'float32' is asked for"),
    ],
)
def test_rows_of_another_sweep_stay_as_they_are(corpus, finished_sweep, capsys, options, sentence):
    workdir, document, _ = finished_sweep
    assert cli.main(words(corpus, workdir, *options)) == 1
    assert sentence in capsys.readouterr().err
    assert json.loads((workdir / "sweep.json").read_text()) == document


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            "study --at 5e-5",
            "at must be one of --l1, so that each variant has a row to be compared with: 0, ",
        ),
        ("study --l1 -1", "l1 must be finite numbers of at least 0; got -1"),
        ("study --l1 1e-5 0.00001", "l1 must name each row once; got 1e-05 twice"),
        ("study --l1 0 abc", "--l1 must be numbers; got 0 abc"),
        ("study --l1", "l1 must name at least one λ; got none"),
        ("study --variants relu3", "--variants must be one of 'silu', 'reset', "),
        ("study --model.sparsity.revive keep", "keep is what the other options ask for"),
        ("studdy", "did you mean study?"),
        ("--config studdy", "did you mean study?"),
        ("study --config tiny", "one preset; got study and --config: leave one out"),
        ("study", "data.paths must name the corpus to train on"),
        ("study --data.paths nowhere.jsonl", "nowhere.jsonl"),
    ],
)
def test_mistakes_are_one_sentence(options, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sweep", *options.split()]) in (1, 2)
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [], "nothing was begun"


def test_variants_change_what_their_names_say():
    base = configs.load("study")
    rows = {row.name: row.config for row in Sweep(base, l1=(0.0, 1e-5, 1e-4), at=1e-5).rows()}
    plain = rows["l1-1e-05"]
    assert [rows[f"l1-{value:g}"].model.sparsity.l1 for value in (0, 1e-5, 1e-4)] == [0, 1e-5, 1e-4]
    changed = {name: changed_fields(plain, config) for name, config in rows.items()}
    for name in rows:
        assert changed[name].pop("workdir", (None, None))[1] in (None, rows[name].workdir)
    assert changed["reset"] == {"model.sparsity.revive": ("off", "reset")}
    assert changed["keep"] == {"model.sparsity.revive": ("off", "keep")}
    assert changed["relu2"] == {"model.activation": ("relu", "relu2")}
    assert changed["silu"] == {"model.activation": ("relu", "silu"), "model.sparsity.l1": (1e-5, 0.0)}
    assert changed["non-gated"] == {"model.gated": (True, False), "model.d_ff": (2304, 3456)}
    assert num_parameters(rows["non-gated"].model) == num_parameters(plain.model)


def test_the_middle_lambda_is_that_of_the_variants():
    assert Sweep(configs.load("study")).level == 3e-5
    assert Sweep(configs.load("study"), l1=(0.0,), variants=("relu2",)).level == 0
