"""Tables of docs/results.md hold the medians of the files that they link to; README, what stands in docs/."""

import hashlib
import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

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


def tables() -> Iterator[tuple[Path, list[str], list[list[str]]]]:
    """The file linked last before a table whose contestants it has, the table's header and its rows."""
    file = None
    for part in re.split(r"\n\n", PAGE.read_text()):
        if links := _LINK.findall(part):
            file = (PAGE.parent / links[-1]).resolve()
        elif part.startswith("## "):
            file = None
        elif part.startswith("| ") and file is not None:
            header, _, *rows = (
                [cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines()
            )
            yield file, header, rows
            file = None


def medians(case: dict) -> dict[str, float]:
    return {row["name"]: statistics.median(row["timing"]["samples_ms"]) for row in case["rows"]}


OTHERS = ("step_0p5b", "decode_1p5b")
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


def test_the_readmes_figures_stand_in_docs():
    """Of ``2.48× (6.72 to 2.71 ms)`` both times, and the ratio follows from them."""
    table = (ROOT / "README.md").read_text().split("\n## Headline figures\n")[1].split("\n## ")[0]
    pages = "\n".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    numbers = set(re.findall(r"(?<![\d.,])[\d.,]*\d", pages))
    pairs = re.findall(r"([\d.]+) ?(×|%) \(([\d.,]+) to ([\d.,]+) (ms|µs|GiB|tokens/s)\)", table)
    assert len(pairs) >= 5
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
