"""Tables of docs/results.md hold the medians of the files that they link to; README, what stands in docs/."""

import hashlib
import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

from pallas_kernels.options import Panel

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results.md"
GAIN = ROOT / "pallas_kernels" / "results" / "nvidia_h100_80gb_hbm3" / "layers_nnz.json"
NAMES = {
    "XLA's product alone": "gate GEMM, XLA",
    "gate stage of panel": "gate_panel",
    "dense FFN": "dense_ffn",
    "gate GEMM, XLA": "gate_gemm",
    "sparse FFN": "sparse_ffn",
}
"""Columns whose contestant has another name in the file."""
_LINK = re.compile(r"\[\w+\.json\]\((\S+\.json)\)")
_CELL = re.compile(r"([\d.]+)(?: \(([\d.]+)×\))?")
_RANGE = re.compile(r"([\d.]+) \(([\d.]+) to ([\d.]+)\)")
_CHANGE = re.compile(r"([\d.]+) to ([\d.]+), ([+−])(\d+) %")


def cells(table: str) -> list[list[str]]:
    """The header of a table and its rows."""
    header, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
    return [header, *rows]


def section(title: str) -> tuple[list[Path], list[list[list[str]]]]:
    """The files that a section of the page links to, and its tables."""
    text = re.split(rf"\n##+ {re.escape(title)}\n", PAGE.read_text())[1]
    text = re.split(r"\n##+ ", text)[0]
    files = [(PAGE.parent / link).resolve() for link in re.findall(r"\]\(([^)]+\.json)\)", text)]
    return files, [cells(part) for part in text.split("\n\n") if part.startswith("| ")]


def tables() -> Iterator[tuple[Path, list[str], list[list[str]]]]:
    """The file linked last before a table whose contestants it has, the table's header and its rows."""
    file = None
    for part in re.split(r"\n\n", PAGE.read_text()):
        if links := _LINK.findall(part):
            file = (PAGE.parent / links[-1]).resolve()
        elif part.startswith("## "):
            file = None
        elif part.startswith("| ") and file is not None:
            header, *rows = cells(part)
            yield file, header, rows
            file = None


def medians(case: dict) -> dict[str, float]:
    return {row["name"]: statistics.median(row["timing"]["samples_ms"]) for row in case["rows"]}


OTHERS = ("step_0p5b", "decode_1p5b", "layers_train_busy_capacity_1", "run_0p5b_order", "run_0p5b_reset")
CASES = [pytest.param(*table, id=table[0].stem) for table in tables() if table[0].stem not in OTHERS]


def test_tables_are_found():
    assert {case.id for case in CASES} >= {"layers_forward", "layers_train", "stages", "twell_paper"}


@pytest.mark.parametrize(("file", "header", "rows"), CASES)
def test_a_table_holds_the_files_medians(file, header, rows):
    cases = json.loads(file.read_text())["cases"]
    assert len(rows) == len(cases)
    for row, case in zip(rows, cases, strict=True):
        measured, checked = medians(case), 0
        for name, cell in zip(header, row, strict=True):
            contestant = name if name in measured else NAMES.get(name)
            if contestant not in measured:
                continue
            shown, ratio = _CELL.fullmatch(cell).groups()
            assert agrees(shown, measured[contestant]), (row[0], name)
            assert ratio is None or agrees(ratio, measured["dense"] / measured[contestant]), (row[0], name)
            checked += 1
        assert checked >= 3


def test_the_steps_table_holds_the_files_medians():
    ((file, header, rows),) = [table for table in tables() if table[0].stem == "step_0p5b"]
    measured = {(row["format"], row["remat"]): row for row in json.loads(file.read_text())["rows"]}
    for row in rows:
        remat = row[0].strip("`").split()[-1]
        for format, cell in zip(header[1:], row[1:], strict=True):
            if cell == "as full":
                continue
            case = measured[format, remat]
            ms, ratio, gibibytes = re.fullmatch(r"([\d.]+) ms(?: \(([\d.]+)\))?, ([\d.]+)", cell).groups()
            dense = measured.get(("dense", remat)) or measured["dense", "full"]
            assert agrees(ms, case["median_ms"]), cell
            assert ratio is None or agrees(ratio, case["median_ms"] / dense["median_ms"]), cell
            assert agrees(gibibytes, case["program_bytes"] / 2**30), cell


def test_the_table_of_decode_holds_the_files_medians():
    ((file, _, rows),) = [table for table in tables() if table[0].stem == "decode_1p5b"]
    measured = {
        (row["what"], row["tokens"], row["format"]): row for row in json.loads(file.read_text())["rows"]
    }
    assert len(rows) == len(measured) / 2
    for what, tokens, dense, dense_share, auto, auto_share, ratio in rows:
        pair = [measured[what, int(tokens.replace(",", "")), format] for format in ("dense", "auto")]
        for row, cell, share in zip(pair, (dense, auto), (dense_share, auto_share), strict=True):
            assert agrees(cell.replace(",", ""), 1e3 * row["median_ms"]), (what, tokens)
            assert share == (
                f"{row['bandwidth_share']:.0%}".replace("%", " %") if row["bandwidth_share"] else ""
            )
        assert agrees(ratio, pair[0]["median_ms"] / pair[1]["median_ms"]), (what, tokens)


def models() -> dict[str, dict[str, dict]]:
    """What was measured of each model's forward, by preset and contestant."""
    results = [json.loads(file.read_text()) for file in section("A whole model's forward")[0]]
    return {result["options"]["config"]: {row["name"]: row for row in result["rows"]} for result in results}


def test_the_table_of_models_holds_the_files_medians():
    files, ((header, *rows), _) = section("A whole model's forward")
    measured = models()
    assert len(rows) == len(measured) == len(files) == 4
    for (name, *times), file in zip(rows, files, strict=True):
        model, layers, nnz = re.fullmatch(r"\[(\w+)\]\(.*\), (\d+), (\d+)", name).groups()
        options = json.loads(file.read_text())["options"]
        assert (options["config"], options["model"]["num_layers"], options["nnz"]) == (
            model,
            int(layers),
            float(nnz),
        )
        dense = statistics.median(measured[model]["dense"]["samples_ms"])
        for contestant, cell in zip(header[1:], times, strict=True):
            shown, ratio = _CELL.fullmatch(cell).groups()
            median = statistics.median(measured[model][contestant]["samples_ms"])
            assert agrees(shown, median), (model, contestant)
            assert (ratio is None) == (contestant == "dense"), (model, contestant)
            assert ratio is None or agrees(ratio, dense / median), (model, contestant)


def test_the_gains_beside_the_papers_are_the_files():
    _, (_, (_, *rows)) = section("A whole model's forward")
    measured, found = models(), set()
    for model, speed, _, energy, _ in rows:
        for cell, key in ((speed, "tokens_per_ms"), (energy, "millijoules_per_token")):
            pair = [measured[model][name][key] for name in ("dense", "panel")] if model in measured else None
            if cell == "not measured":
                assert pair in (None, [None, None]), (model, key)
                continue
            before, after, sign, percent = _CHANGE.fullmatch(cell).groups()
            assert agrees(before, pair[0]), (model, key)
            assert agrees(after, pair[1]), (model, key)
            assert agrees(percent, 100 * abs(pair[1] / pair[0] - 1)), (model, key)
            assert (sign == "+") == (pair[1] > pair[0]), (model, key)
            found.add((model, key))
    assert len(found) == 8


def test_the_table_of_a_busy_host_holds_the_files_samples():
    files, ((header, *rows),) = section("On a busy host")
    runs = [json.loads(file.read_text())["cases"] for file in files]
    assert len(runs) == 2
    for nth, row in enumerate(rows):
        for name, cell in zip(header[1:], row[1:], strict=True):
            contestant, _, second = name.partition(", ")
            case = runs[bool(second)][nth]
            (samples,) = (each["timing"]["samples_ms"] for each in case["rows"] if each["name"] == contestant)
            expected = statistics.median(samples), min(samples), max(samples)
            for shown, value in zip(_RANGE.fullmatch(cell).groups(), expected, strict=True):
                assert agrees(shown, value), (row[0], name)


def paragraph(file: str) -> tuple[dict, str]:
    """A stored result, and the paragraph of the page that links to it, in one line."""
    (text,) = [part for part in PAGE.read_text().split("\n\n") if f"[{file}]" in part]
    (link,) = re.findall(rf"\[{re.escape(file)}\]\(([^)]+)\)", text)
    return json.loads((PAGE.parent / link).read_text()), " ".join(text.split())


def test_a_sentence_holds_the_medians_of_the_file_it_links_to():
    result, text = paragraph("layers_few_busy.json")
    (case,) = result["cases"]
    assert f"{medians(case)['panel']:.3f} ms at {case['case']['tokens']:,} tokens" in text
    assert f"dense {medians(case)['dense']:.3f}" in text


def test_the_curves_of_twelve_layers():
    result, text = paragraph("compare_twelve_layers.json")
    verdict, curves = result["verdict"], result["curves"]
    first, second, third = (f"{verdict['deviations'][name]:.3f}" for name in ("plan", "panel", "order"))
    assert f"they are {first}, {second} and {third} nats" in text
    assert f"one control is {verdict['spread']:.3f}" in text
    assert all(verdict["within"].values())
    *moved, last = [step for step in curves["plan"]["plans"] if step != "1"]
    assert f"at the steps {', '.join(moved)} and {last}" in text
    assert curves["order"]["token_order"] == "centroids"


def test_every_neuron_active_in_decode():
    result, text = paragraph("decode_1p5b_full.json")
    for format in ("decode", "dense"):
        times = [f"{1e3 * row['median_ms']:.1f}" for row in result["rows"] if row["format"] == format]
        assert f"{', '.join(times[:-1])} and {times[-1]}" in text


@pytest.mark.parametrize(
    ("title", "names", "n_rows"),
    [
        ("A training run", ["dense", "order"], 11),
        ("With older kernels, and dead neurons re-initialised", ["dense", "plan", "order", "reset"], 13),
    ],
)
def test_the_table_of_training_runs_holds_their_files_figures(title, names, n_rows):
    """A column for each file that is linked, in that order."""
    files, ((header, *rows),) = section(title)
    runs = [run for file in files for run in json.loads(file.read_text())["runs"]]
    assert [run["run"] for run in runs] == names
    assert len(header) == 1 + len(runs)
    dense, checked = runs[0]["last"]["tokens_per_second"], 0
    for name, *columns in rows:
        for cell, run in zip(columns, runs, strict=True):
            last = run["last"]
            if re.fullmatch(r"held-out CE after 500 steps|[\d,]+", name):
                step = int(re.search(r"[\d,]+", name.removeprefix("held-out CE"))[0].replace(",", ""))
                evaluated = {each["step"]: each["ce"] for each in run["heldout"]}
                assert agrees(cell, evaluated[step]) if cell else step not in evaluated, (name, cell)
            elif name == "tokens/s":
                shown, ratio = re.fullmatch(r"([\d,]+)(?: \(([\d.]+)×\))?", cell).groups()
                assert agrees(shown.replace(",", ""), last["tokens_per_second"]), cell
                assert (ratio is None) == (run is runs[0])
                assert ratio is None or agrees(ratio, last["tokens_per_second"] / dense), cell
            elif name == "neurons of 128 tokens, by layer":
                shown = cell.split(", ") if cell else []
                assert len(shown) == len(last.get("union_per_layer", []))
                assert all(map(agrees, shown, last.get("union_per_layer", [])))
            elif name == "the plan at the end: capacity by layer":
                assert cell.split(", ") == capacities(run), cell
            else:
                value = {
                    "steps": run["steps"],
                    "tokens/s of all steps": run["tokens_per_second"],
                    "active neurons of a token": last["l0"],
                    "dead neurons": 100 * statistics.mean(last["dead_share_per_layer"]),
                }[name]
                assert agrees(cell.replace(",", "").removesuffix(" %"), value), (name, cell)
            checked += 1
    assert checked == n_rows * len(runs)


def capacities(run: dict) -> list[str]:
    """Each layer's, or ``dense``, of the last plan; of a run without plans that all of them are dense."""
    if not run["plans"]:
        return [run["config"]["model"]["ffn"]["format"]]
    layers = []
    for part in re.split(r", (?![^(]*\))", run["plans"][-1]["plan"]):
        count, format = re.fullmatch(r"(?:(\d+) × )?(.+)", part).groups()
        capacity = re.search(r"capacity=([\d.]+)", format)
        room = f"{Panel().capacity}" if capacity is None else capacity[1]
        layers += [room if format.startswith("panel") else "dense"] * int(count or 1)
    return layers


def test_the_readmes_figures_stand_in_docs():
    """Of ``2.48× (6.72 to 2.71 ms)`` both times, and the ratio follows from them."""
    table = (ROOT / "README.md").read_text().split("\n## Headline figures\n")[1].split("\n## ")[0]
    pages = "\n".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    numbers = set(re.findall(r"(?<![\d.,])[\d.,]*\d", pages))
    pairs = re.findall(r"([\d.]+) ?(×|%) \(([\d.,]+) to ([\d.,]+) (ms|µs|GiB|mJ|tokens/s)\)", table)
    assert len(pairs) >= 10
    for ratio, sign, before, after, unit in pairs:
        assert {before, after} <= numbers
        first, second = (float(number.replace(",", "")) for number in (before, after))
        gain = second / first if unit == "tokens/s" else first / second
        assert float(ratio) == pytest.approx(gain if sign == "×" else 100 / gain, rel=6e-3)


def test_the_readmes_picture_is_of_the_stored_file():
    """Drawn from its present content, and described with its figures."""
    content = GAIN.read_bytes()
    picture = (ROOT / "docs" / "images" / "gain.svg").read_text()
    assert hashlib.sha256(content).hexdigest() in picture, "run python docs/_site/draw.py"
    (text,) = re.findall(r"!\[(.*?)\]\(docs/images/gain\.svg\)", (ROOT / "README.md").read_text())
    panel, twell = text.split("TwELL")
    cases = {round(case["measured"]["mean_nnz"]): medians(case) for case in json.loads(content)["cases"]}
    described = [(speed, int(nnz)) for speed, nnz in re.findall(r"([\d.]+) at (\d+)", panel)]
    assert len(described) >= 3
    for (speed, nnz), of_twell in zip(described, re.findall(r"\d\.\d", twell), strict=True):
        assert agrees(speed, cases[nnz]["dense"] / cases[nnz]["panel"])
        assert agrees(of_twell, cases[nnz]["dense"] / cases[nnz]["twell"])


def agrees(shown: str, value: float) -> bool:
    """Whether a number is the value, rounded to as many places as are shown, in its last place."""
    step = 10.0 ** -len(shown.partition(".")[2])
    return abs(float(shown) - value) <= 0.51 * step
