"""Published models to checkpoints of ours and back: directories, tokenizers and what is said of them."""

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from sparse_lm import ModelConfig
from sparse_lm.convert import NATIVE, Leaf, Weights, family_for, open_hf, open_own, staged, write_hf
from sparse_lm.model import num_parameters
from train.config import DataConfig, TrainConfig
from train.data.tokenizer import FILE_NAME, check_vocabulary
from train.errors import UserError
from train.run import converted
from train.run.checkpoint_errors import reading
from train.run.checkpoint_files import find_checkpoint
from train.run.checkpoint_reading import read_run, read_tokenizer
from train.run.hf_tokenizer import published_tokenizer, read_published
from train.run.manifest import quantity

# What belongs to a tokenizer besides its own file, kept as it is: templates of chats, names of tokens.
_COMPANIONS = (
    "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Converted:
    """What a conversion made.

    Attributes:
      out: the new directory.
      model_type: the published one.
      config: the model.
      notes: sentences that the user should know.
    """

    out: Path
    model_type: str
    config: ModelConfig
    notes: tuple[str, ...]

    def summary(self) -> str:
        config = self.config
        return (
            f"{self.model_type}: {config.num_layers} layers, d_model {config.d_model}, d_ff {config.d_ff}, "
            f"{config.activation}, {quantity(num_parameters(config))} parameters"
        )


def from_hf(source: str, out: str | Path, *, dtype: Any = None) -> Converted:
    """Converts a published model to one that ``load_for_inference`` loads.

    Args:
      source: a local directory, or a model's name on the Hugging Face hub.
      out: the directory to make.
      dtype: compute type of the model; by default that of the publisher.

    Raises:
      UserError: ``source`` is no model that can be converted, its tokenizer is another's, or ``out`` exists.
    """
    directory = _local(source)
    out = Path(out).expanduser().absolute()
    with converted.one_sentence(), open_hf(directory, dtype=dtype) as weights:
        if not (directory / FILE_NAME).is_file():
            raise UserError(
                f"{directory} must hold {FILE_NAME}; found none: save the tokenizer with transformers' "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        tokenizer = read_published(directory)
        if tokenizer.vocab_size > weights.config.vocab_size:
            raise UserError(
                f"{directory / FILE_NAME} must have no more ids than the {weights.config.vocab_size} of "
                f"config.json's vocab_size; found {tokenizer.vocab_size}: it is another model's"
            )
        data = DataConfig(tokenizer=str(out / converted.TOKENIZER / FILE_NAME))
        run = TrainConfig(steps=1, batch_size=8, workdir=str(out), model=weights.config, data=data)
        with staged(out) as place:
            converted.write(weights, tokenizer, run, place)
            _copy_companions(directory, place / converted.TOKENIZER)
        return Converted(
            out, weights.fields["model_type"], weights.config, _import_notes(weights.fields, run.model)
        )


def to_hf(checkpoint: str, out: str | Path) -> Converted:
    """Exports a trained or converted model as transformers reads it.

    Args:
      checkpoint: a run's work directory, one checkpoint in it, or a converted model.
      out: the directory to make.

    Raises:
      UserError: there is no checkpoint, no published family is like its model, or ``out`` exists.
    """
    out = Path(out).expanduser().absolute()
    path = find_checkpoint(checkpoint)
    config, _ = read_run(path)
    tokenizer = read_tokenizer(path)
    check_vocabulary(tokenizer, config.model.vocab_size)
    with converted.one_sentence(), _weights(path, config.model) as weights, staged(out) as place:
        write_hf(weights, place, eos_id=tokenizer.eos_id)
        published_tokenizer(path / converted.TOKENIZER, config.model.context_length, place)
        _copy_companions(path / converted.TOKENIZER, place)
        model_type = family_for(config.model).model_type
    return Converted(out, model_type, config.model, _export_notes(model_type))


def _local(source: str) -> Path:
    """The directory that ``source`` is, or into which the hub's model of that name is fetched."""
    path = Path(source).expanduser()
    if path.exists() or source.count("/") != 1 or source.startswith((".", "~", "/")):
        return path
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        # Pickles and code are never fetched.
        return Path(
            huggingface_hub.snapshot_download(source, allow_patterns=["*.safetensors", "*.json", "*.jinja"])
        )
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            "--source must be a directory, or a model's name on the Hugging Face hub; there is no directory "
            f"{source} here, and the hub cannot give it: {reason}"
        ) from error


@contextlib.contextmanager
def _weights(path: Path, config: ModelConfig) -> Iterator[Weights]:
    if converted.is_converted(path):
        with open_own(path / converted.PARAMS, config) as weights:
            yield weights
    else:
        yield _TrainedWeights(path, config)


class _TrainedWeights:
    """Master weights of a training checkpoint; holds one leaf, all its layers, at a time."""

    def __init__(self, path: Path, config: ModelConfig) -> None:
        self.config = config
        self._path = path
        self._held: tuple[Leaf, np.ndarray] | None = None

    def nbytes(self, leaf: Leaf, layer: int) -> int:
        return 4 * math.prod(leaf.shape)

    def read(self, leaf: Leaf, layer: int, index: tuple[slice, ...] = ()) -> np.ndarray:
        if self._held is None or self._held[0] != leaf:
            self._held = None
            self._held = leaf, self._restore(leaf)
        values = self._held[1]
        return (values[layer] if leaf.layered else values)[index]

    def _restore(self, leaf: Leaf) -> np.ndarray:
        shape = (self.config.num_layers, *leaf.shape) if leaf.layered else leaf.shape

        def nested(value: Any) -> Any:
            for key in reversed(leaf.path):
                value = {key: value}
            return value

        wanted = ocp.args.PyTreeRestore(
            item=nested(jax.ShapeDtypeStruct(shape, np.float32)),
            restore_args=nested(ocp.RestoreArgs(restore_type=np.ndarray)),
            partial_restore=True,
        )
        with reading(self._path), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            found = checkpointer.restore(self._path / "params", wanted)
        for key in leaf.path:
            found = found[key]
        return found


def _copy_companions(source: Path, out: Path) -> None:
    for name in _COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def _import_notes(fields: dict[str, Any], config: ModelConfig) -> tuple[str, ...]:
    notes = []
    positions = fields["max_position_embeddings"]
    if config.context_length < positions:
        notes.append(
            f"its attention slides over {config.context_length} tokens, which is this model's context: up to "
            "there the two are the same"
        )
    if config.rope_scaling.kind == "dynamic":
        notes.append(
            f"its dynamic rotary scaling begins behind {positions} tokens, where this model's context ends"
        )
    return tuple(notes)


def _export_notes(model_type: str) -> tuple[str, ...]:
    if model_type in NATIVE:
        return ()
    return (
        f"transformers has no {model_type} of its own: put the modelling code of its publisher beside it, "
        "and load it with trust_remote_code=True",
    )
