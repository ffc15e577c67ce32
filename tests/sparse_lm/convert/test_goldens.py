"""Every family gives the logits and the greedy text that transformers gave: stored, with the weights."""

from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from sparse_lm.convert import load_model, open_hf, write_hf
from sparse_lm.convert.families import family_from_hf
from sparse_lm.convert.tensor_files import read_json
from sparse_lm.generate import generate

GOLDENS = Path(__file__).parent / "goldens"
LIVE = find_spec("torch") is not None and find_spec("transformers") is not None
PROMPT, NEW_TOKENS = 8, 12


def check(directory):
    """That the model in ``directory`` gives what its ``expected.safetensors`` holds."""
    expected = load_file(directory / "expected.safetensors")
    with open_hf(directory, dtype="float32") as weights:
        model = load_model(weights)
    logits, _ = jax.jit(model)(expected["tokens"])
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    prompts = expected["tokens"][:, :PROMPT].tolist()
    assert generate(model, prompts, max_new_tokens=NEW_TOKENS) == expected["greedy"].tolist()


def test_logits_and_greedy_text_are_those_of_transformers(golden):
    check(golden)


@pytest.mark.filterwarnings("ignore")  # of torch and transformers, whose versions are the user's
@pytest.mark.skipif(not LIVE, reason="needs torch and transformers")
def test_and_those_that_it_gives_today(case, tmp_path):
    from make_goldens import build

    build(case, tmp_path)
    check(tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not LIVE, reason="needs torch and transformers")
@pytest.mark.parametrize(
    "name", ["llama-llama3", "llama-linear", "llama_sparse_relu", "qwen2-dynamic", "arcee"]
)
def test_transformers_loads_what_is_exported(name, tmp_path):
    """By its own classes, with no code of anyone else's; its logits are those that ours were made from."""
    import torch
    import transformers

    with open_hf(GOLDENS / name) as weights:
        write_hf(weights, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = load_file(GOLDENS / name / "expected.safetensors")
    with torch.no_grad():
        logits = model(torch.from_numpy(expected["tokens"]).long()).logits
    np.testing.assert_allclose(logits.numpy(), expected["logits"], atol=1e-4)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama-linear", {"rope_theta": 10_000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}),
        (
            "llama-llama3",
            {
                "rope_theta": 500.0,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8,
                },
            },
        ),
    ],
)
def test_older_versions_of_transformers_wrote_the_same_configuration(name, fields):
    """Their ``rope_theta``, ``rope_scaling`` and ``torch_dtype`` are read like today's names."""
    directory = GOLDENS / name
    today = read_json(directory / "config.json")
    older = {key: value for key, value in today.items() if key not in ("rope_parameters", "dtype")}
    older |= fields | {"torch_dtype": "bfloat16"}
    family = family_from_hf(today)
    assert family.config(older) == family.config(today)
