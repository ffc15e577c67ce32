"""Every family gives the logits and the greedy text that transformers gave: stored, with the weights."""

from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from sparse_lm.convert import load_model, open_hf
from sparse_lm.convert.families import family_from_hf
from sparse_lm.convert.tensor_files import read_json
from sparse_lm.generate import generate

PROMPT, NEW_TOKENS = 8, 12


def test_logits_and_greedy_text_are_those_of_transformers(golden):
    expected = load_file(golden / "expected.safetensors")
    with open_hf(golden, dtype="float32") as weights:
        model = load_model(weights)
    logits, _ = jax.jit(model)(expected["tokens"])
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    prompts = expected["tokens"][:, :PROMPT].tolist()
    assert generate(model, prompts, max_new_tokens=NEW_TOKENS) == expected["greedy"].tolist()


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
    directory = Path(__file__).parent / "goldens" / name
    today = read_json(directory / "config.json")
    older = {key: value for key, value in today.items() if key not in ("rope_parameters", "dtype")}
    older |= fields | {"torch_dtype": "bfloat16"}
    family = family_from_hf(today)
    assert family.config(older) == family.config(today)
