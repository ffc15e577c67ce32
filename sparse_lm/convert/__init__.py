"""Hugging Face directories to models of ours and back, tensor by tensor.

from sparse_lm.convert import load_model, open_hf

with open_hf("path/to/a/directory") as weights:
    model = load_model(weights)  # straight onto a mesh with a sharding
"""

from sparse_lm.convert.activations import ACTIVATIONS
from sparse_lm.convert.errors import ConversionError
from sparse_lm.convert.families import FAMILIES, NATIVE, config_to_hf, family_for
from sparse_lm.convert.leaves import Leaf, leaves
from sparse_lm.convert.weights import (
    Weights,
    load_model,
    load_params,
    load_sharded,
    open_hf,
    open_own,
)
from sparse_lm.convert.write import staged, write_hf, write_own

__all__ = [
    "ACTIVATIONS",
    "FAMILIES",
    "NATIVE",
    "ConversionError",
    "Leaf",
    "Weights",
    "config_to_hf",
    "family_for",
    "leaves",
    "load_model",
    "load_params",
    "load_sharded",
    "open_hf",
    "open_own",
    "staged",
    "write_hf",
    "write_own",
]
