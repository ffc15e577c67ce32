"""Reads a checkpoint without the run that saved it: to evaluate, to generate, to convert."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from sparse_lm import SparseLM
from train.config import TrainConfig
from train.config_json import from_dict
from train.data.corpus import CorpusIdentity
from train.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from train.errors import UserError, short_reason
from train.parallel import check_devices
from train.run import converted
from train.run.checkpoint_errors import reading
from train.run.checkpoint_files import find_checkpoint
from train.state import build_program


@dataclasses.dataclass(frozen=True)
class SavedData:
    """Where a run stands in its data, and how its layers run.

    Attributes:
      position: windows taken so far, over all processes (`TrainBatches.position`).
      corpus: what they were taken from.
      plan: the format of each layer (`LayerPlan.texts`), if the run chooses them.
    """

    position: int
    corpus: CorpusIdentity
    plan: tuple[str, ...] | None = None


def load_for_inference(directory: str | Path) -> tuple[SparseLM, Tokenizer, TrainConfig, int]:
    """The model, tokenizer, configuration and step of a checkpoint, on the default device.

    Args:
      directory: a run's workdir (its newest complete checkpoint), one step's directory, or a converted model.

    Raises:
      UserError: no checkpoint there, or it cannot be read, or its tokenizer is not the model's.
    """
    path = find_checkpoint(directory)
    check_devices()
    config, step = read_run(path)
    if config.model.dtype == "float16" and jax.default_backend() == "cpu":
        raise UserError(
            f"{path} computes in float16, whose matrix products a CPU does not have: run it on a GPU"
        )
    program = build_program(config)
    tokenizer = read_tokenizer(path)
    check_vocabulary(tokenizer, config.model.vocab_size)
    if converted.is_converted(path):
        params = converted.read_params(path, config.model)
        return nnx.merge(program.graphdef, params), tokenizer, config, step
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        program.abstract_state().variables,
    )
    with reading(path), ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore(path / "params", wanted)
    return nnx.merge(program.graphdef, params), tokenizer, config, step


def read_run(path: Path) -> tuple[TrainConfig, int]:
    """The configuration and the step of one checkpoint's directory. Raises UserError if it cannot be read."""
    saved = _saved_run(path)
    try:
        return from_dict(TrainConfig, saved["config"]), saved["step"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} must hold a configuration of this version of the program ({short_reason(error)}): use "
            "the version that saved it"
        ) from error


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of one checkpoint's directory. Raises UserError if it cannot be read, or is not the one
    that was saved there."""
    tokenizer = load_tokenizer(path / converted.TOKENIZER)
    run = _saved_run(path)
    saved = run.get("tokenizer") if isinstance(run, dict) else None  # earlier versions kept none
    if saved is not None and saved != tokenizer.fingerprint:
        raise UserError(
            f"{path / converted.TOKENIZER} must hold the tokenizer that the model was trained with "
            f"(fingerprint {saved[:12]}); found another one ({tokenizer.fingerprint[:12]}): put it back"
        )
    return tokenizer


def _saved_run(path: Path) -> Any:
    with reading(path), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        return checkpointer.restore(path / "run")


def read_saved_data(path: Path) -> SavedData:
    """Where a run stood in its data when it saved the checkpoint at ``path``."""
    with reading(path), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        saved = checkpointer.restore(path / "data")
        position, corpus = saved["position"], CorpusIdentity(**saved["corpus"])
        plan = saved.get("plan")
    return SavedData(position, corpus, None if plan is None else tuple(plan))


def read_corpus(path: Path) -> CorpusIdentity | None:
    """The corpus that the model at ``path`` was trained on; None if that is a converted model."""
    return None if converted.is_converted(path) else read_saved_data(path).corpus
