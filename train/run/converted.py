"""A converted model on disk: what inference needs of a checkpoint, its parameters as safetensors.

``<directory>/`` has ``params`` (safetensors, each parameter in the type that its publisher stored), ``run``
(configuration) and ``tokenizer``, like a checkpoint without what resuming needs.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from sparse_lm import ModelConfig
from sparse_lm.convert import ConversionError, Weights, load_params, open_own, write_own
from train.config import TrainConfig
from train.config_json import to_dict
from train.data.tokenizer import FILE_NAME, Tokenizer
from train.errors import UserError

PARAMS, RUN, TOKENIZER = "params", "run", "tokenizer"


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """Lets a conversion's mistakes reach the user as all others do."""
    try:
        yield
    except ConversionError as error:
        raise UserError(str(error)) from error


def is_converted(path: Path) -> bool:
    """Whether ``path`` is a converted model; it was written elsewhere and renamed when it was whole."""
    parts = (path / RUN / "metadata", path / TOKENIZER / FILE_NAME)
    return all(part.is_file() for part in parts) and any((path / PARAMS).glob("*.safetensors"))


def write(weights: Weights, tokenizer: Tokenizer, config: TrainConfig, directory: Path) -> None:
    """Fills an existing directory with a converted model; raises ConversionError as ``weights`` does."""
    params = directory / PARAMS
    params.mkdir()
    write_own(weights, params)
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        run = {"step": 0, "config": to_dict(config)}
        checkpointer.save(directory / RUN, args=ocp.args.JsonSave(run))
    (directory / TOKENIZER).mkdir()
    tokenizer.save(directory / TOKENIZER)


def read_params(path: Path, config: ModelConfig) -> dict[str, Any]:
    """The parameters of a converted model, f32, on the first device.

    Raises:
      UserError: they cannot be read, or are not those of ``config``.
    """
    with one_sentence(), open_own(path / PARAMS, config) as weights:
        return load_params(weights)
