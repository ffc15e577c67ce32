"""A backend whose tests are not collected passes silently: here it fails."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from op_contract import CASES

FOLDER = Path(__file__).parent
FILES = {path.name: str(path.relative_to(FOLDER)) for path in FOLDER.rglob("test_*.py")}
SUITES = {
    "test_dense.py": ["TestDense"],
    "test_auto_interpret.py": ["TestAutoInterpreted"],
    "test_decode_gpu.py": ["TestDecodeOnGPU"],
    "test_decode_interpret.py": ["TestDecodeInterpreted"],
    "test_hybrid_gpu.py": ["TestHybridOnGPU", "TestHybridOnGPUAtThePapersWidth"],
    "test_hybrid_interpret.py": ["TestHybridInterpreted"],
    "test_panel_gpu.py": ["TestPanelOnGPU", "TestPanelOnGPUAt128Tokens", "TestPanelOnHopper"],
    "test_panel_interpret.py": ["TestPanelInterpreted"],
    "test_twell_interpret.py": ["TestTwELLInterpreted"],
    "test_twell_gpu.py": ["TestTwELLOnGPU", "TestTwELLOnGPUAtThePapersTile", "TestTwELLOnHopper"],
}


@pytest.fixture(scope="module")
def collected():
    """How many tests pytest collects for each (file, class, case)."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "0",
        "-q",
        "--collect-only",
        *(FILES[name] for name in SUITES),
    ]
    listing = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=False)
    assert listing.returncode == 0, listing.stdout + listing.stderr
    ids = [line.split("[")[0].split("::") for line in listing.stdout.splitlines() if "::" in line]
    return Counter((Path(parts[0]).name, *parts[1:]) for parts in ids)


@pytest.mark.parametrize(("file", "suite"), [(file, suite) for file in SUITES for suite in SUITES[file]])
def test_every_suite_runs_every_case(collected, file, suite):
    ran = {case: collected[file, suite, case] for case in CASES}
    assert len(CASES) >= 15
    assert all(ran.values()), f"not collected: {[case for case, count in ran.items() if not count]}"
    assert ran == {case: collected["test_dense.py", "TestDense", case] for case in CASES}


def test_every_file_of_kernel_tests_collects(collected):
    """Files that run a backend by other means than the contract have their names here: none is forgotten."""
    others = {
        "alike_layers", "bench", "bench_layers", "bench_stages", "blackwell_gathered", "blackwell_gemm",
        "blocks", "checks", "collection", "collectives", "config", "decode_lowering", "devices_gpu",
        "devices_interpret", "dispatch", "few_interpret", "formats", "formats_agree", "formats_agree_gpu",
        "gate_epilogues", "gate_stage", "hopper_gemm", "hybrid_lowering", "json_file",
        "lists_interpret", "meshes", "meshes_gpu", "mosaic_down", "mosaic_down_gpu", "mosaic_gathered",
        "mosaic_gathered_gpu", "mosaic_weights", "mosaic_weights_gpu", "panel_lowering", "panel_search",
        "prune", "recorded", "reference", "reorder", "reorder_input", "tile_walk", "token_blocks",
        "transforms", "tuning", "twell_lowering", "unasked", "weight_gradients",
    }  # fmt: skip
    assert FILES.keys() == {f"test_{name}.py" for name in others} | set(SUITES)


def test_gpu_tests_are_skipped_with_the_reason_elsewhere():
    import jax

    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU: nothing is skipped")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "0",
        "-q",
        "-rs",
        FILES["test_twell_gpu.py"],
        "-k",
        "enough_random",
    ]
    run = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "1 skipped" in run.stdout
    assert "needs an NVIDIA GPU" in run.stdout
