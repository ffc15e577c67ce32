"""Break-even curves from result files: what is drawn, where curves cross, and a sentence for each mistake."""

import builtins
import json
from pathlib import Path

import pytest

from train import cli
from train.bench import plot
from train.errors import UserError

SHIPPED = Path(plot.__file__).parents[2] / "pallas_kernels/results/nvidia_h100_80gb_hbm3/layers_forward.json"


def result(nnz, times, *, tokens=1024, direction="forward", source="independent tokens"):
    shape = {"name": "paper", "d_model": 2048, "d_ff": 5632, "gated": True}
    rows = [
        {"name": name, "timing": {"samples_ms": [ms * 0.9, ms, ms * 1.1]}, "median_ms": ms}
        for name, ms in times.items()
    ]
    case = {"shape": shape, "tokens": tokens, "activity": {"mean_nnz": nnz}, "dtype": "bfloat16"}
    return {
        "case": case,
        "direction": direction,
        "source": source,
        "measured": {"mean_nnz": nnz},
        "rows": rows,
    }


def write(path, *results, kind="NVIDIA H100"):
    path.write_text(json.dumps({"device": {"kind": kind}, "cases": list(results)}))
    return str(path)


@pytest.fixture
def file(tmp_path):
    return write(
        tmp_path / "a.json",
        result(100, {"dense": 4.0, "panel": 2.0, "twell": 1.0, "gate_panel": 1.0}),
        result(10, {"dense": 4.0, "panel": 1.0, "twell": 0.5, "gate_panel": 1.0}),
        result(1000, {"dense": 4.0, "panel": 8.0, "twell": 2.0, "gate_panel": 1.0}),
    )


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_picture_is_written_and_crossings_are_told(file, tmp_path, capsys, ending):
    out = tmp_path / f"curves.{ending}"
    assert cli.main(["bench", "curves", file, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    # 2 of 4 ms at nnz 100 and 8 at 1000: on logarithmic axes halfway, at 100 * sqrt(10).
    assert "forward, 1,024 tokens, independent tokens: panel even at 316 nnz" in said
    assert "twell faster throughout" in said
    assert "gate" not in said
    assert out.read_bytes()[:4] == (b"\x89PNG" if ending == "png" else b"<?xm")


def drawn(monkeypatch, tmp_path, files):
    """The axes of the figure that would be saved."""
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self))
    plot.plot(files, tmp_path / "x.png")
    return figures[0]


def test_axes_say_what_they_show(monkeypatch, tmp_path, file):
    figure = drawn(monkeypatch, tmp_path, [file])
    [axes] = figure.axes
    assert "NVIDIA H100" in figure.get_suptitle()
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert "nnz" in axes.get_xlabel()
    assert "ms" in axes.get_ylabel()
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines) == ["dense", "twell (faster throughout)", "panel (even at 316 nnz)"]
    assert list(lines["panel (even at 316 nnz)"].get_xdata()) == [10, 100, 1000]
    assert list(lines["panel (even at 316 nnz)"].get_ydata()) == [1, 2, 8]


def test_tokens_and_directions_have_axes_of_their_own(monkeypatch, tmp_path, file):
    other = write(
        tmp_path / "b.json",
        result(10, {"dense": 8.0, "panel": 9.0}, tokens=2048),
        result(10, {"dense": 8.0, "panel-64": 9.0}, tokens=2048, direction="train"),
        result(10, {"dense": 9.0, "panel-64": 9.5}, tokens=4096, direction="train"),
        result(50, {"dense": 4.0, "panel": 9.0}, source="like trained layers"),
    )
    titles = [axes.get_title().splitlines()[0] for axes in drawn(monkeypatch, tmp_path, [file, other]).axes]
    assert titles == [
        "forward, 1,024 tokens, independent tokens",
        "forward, nnz 10, independent tokens",
        "forward and backward, nnz 10, independent tokens",
    ]


def test_what_the_repository_ships_can_be_drawn(monkeypatch, tmp_path):
    [axes] = drawn(monkeypatch, tmp_path, [SHIPPED]).axes
    assert [line.get_label().split()[0] for line in axes.get_lines()] == ["dense", "twell", "panel", "auto"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"cases": []}',
        '{"device": {"kind": "x"}, "cases": [{"rows": []}]}',
        '{"cases": [{"rows": {}}]}',
    ],
)
def test_a_wrong_file_is_a_sentence(tmp_path, text):
    path = tmp_path / "wrong.json"
    path.write_text(text)
    with pytest.raises(
        UserError, match=r"expected a file that bench layers --json has written; .*wrong\.json is none"
    ):
        plot.plot([path], tmp_path / "x.png")


def test_other_mistakes_are_sentences(tmp_path, file):
    other = write(tmp_path / "b.json", result(10, {"dense": 4.0}), kind="NVIDIA A100")
    with pytest.raises(UserError, match="results of one GPU; the files are of NVIDIA A100 and NVIDIA H100"):
        plot.plot([file, other], tmp_path / "x.png")
    with pytest.raises(UserError, match="differ in nnz alone or in tokens alone; found no two such"):
        plot.plot([other], tmp_path / "x.png")
    with pytest.raises(UserError, match=r"--out must end with \.png, \.svg or \.pdf; got .*x\.doc"):
        plot.plot([file], tmp_path / "x.doc")
    with pytest.raises(UserError, match=r"--out must name a file in a directory that is there; .*no is none"):
        plot.plot([file], tmp_path / "no" / "x.png")


def test_without_matplotlib_the_program_says_how_to_get_it(monkeypatch, tmp_path, file):
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"needs the package matplotlib.*pip install 'sparse-lm\[plot\]'"):
        plot.plot([file], tmp_path / "x.png")
