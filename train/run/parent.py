"""The checkpoint whose weights a run begins with in place of random ones (``train --from``): its parent.

A run keeps the parent that it began with: its manifest names it, and once the run has a checkpoint of its
own, it goes on whether or not the parent is still there. A parent is only ever read.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from sparse_lm import ModelConfig
from sparse_lm.config import SILU
from sparse_lm.convert import load_sharded, open_own
from train.config import TrainConfig
from train.data.tokenizer import Tokenizer, check_vocabulary
from train.errors import UserError
from train.run import converted
from train.run.checkpoint_errors import reading
from train.run.checkpoint_files import SUBDIRECTORY, complete_steps, find_checkpoint
from train.run.checkpoint_reading import read_run, read_tokenizer
from train.run.manifest import Parent, read_lineage
from train.state import Params, TrainState

# What of a model its parent does not decide: how it is computed, and what training asks of it.
_OF_THE_RUN = ("sparsity", "ffn", "remat", "layer_loop", "dtype", "token_order", "token_clusters")
# What may differ besides, where it is asked for: no weight has another shape for it.
_MAY_DIFFER = (*_OF_THE_RUN, "activation", "context_length", "init_std")


def inherited(config: TrainConfig, source: str | None) -> TrainConfig:
    """``config`` with the model and the tokenizer that a run in its work directory begins from, or has begun
    from; without any, ``config`` itself. A SiLU becomes the activation of ``config``, or ReLU.

    Args:
      config: the run, before the command line has had its say.
      source: as for `choose_parent`.

    Raises:
      UserError: there is no checkpoint at ``source``.
    """
    lineage = read_lineage(Path(config.workdir).expanduser())
    if lineage is not None and lineage.parent is not None:
        before = lineage.config
        activation = before.model.activation
    elif source is not None:
        before, _ = read_run(find_checkpoint(source))
        own = "relu" if config.model.activation == SILU else config.model.activation
        activation = own if before.model.activation == SILU else before.model.activation
    else:
        return config
    kept: dict[str, Any] = {name: getattr(config.model, name) for name in _OF_THE_RUN}
    return dataclasses.replace(
        config,
        model=dataclasses.replace(before.model, activation=activation, **kept),
        data=dataclasses.replace(config.data, tokenizer=before.data.tokenizer),
    )


def choose_parent(config: TrainConfig, source: str | None) -> Parent | None:
    """The parent of the run in ``config.workdir``: the one that it began from, or ``source`` for a new run.

    Args:
      config: the run.
      source: a run's work directory, one checkpoint in it, or a converted model; for a run that has begun
        it may be left out, and need no longer exist.

    Raises:
      UserError: there is no checkpoint at ``source``, the work directory is in it or holds a run of another
        parent, or the parent has changed before the run's first checkpoint.
    """
    workdir = Path(config.workdir).expanduser().absolute()
    lineage, begun = read_lineage(workdir), bool(complete_steps(workdir / SUBDIRECTORY))
    before = lineage.parent if lineage is not None else None
    if before is not None and (source is None or _is_of(before, source)):
        if not begun and (found := _parent_at(Path(before.path))) != before:
            raise UserError(
                f"{workdir} holds a run that began from {before} and has no checkpoint yet; found {found}: "
                "choose another workdir to begin from that"
            )
        return before
    if source is None:
        return None
    if before is None and (lineage is not None or begun):
        raise UserError(
            f"--from needs the workdir of a new run, or of one that began from {source}; {workdir} holds a "
            "run that began from random weights: choose another workdir, or leave --from out to go on with it"
        )
    path = find_checkpoint(source)
    holds = path.parent if path.parent.name == SUBDIRECTORY else path
    if workdir.resolve().is_relative_to(holds.resolve()):
        raise UserError(f"workdir must lie outside of what --from names, {path}; got {workdir}")
    given = _parent_at(path)
    if before is not None and given.fingerprint != before.fingerprint:
        raise UserError(
            f"--from must name what the run in {workdir} began from, {before}; got {given}: choose another "
            "workdir, or leave --from out to go on with the run"
        )
    return before or given


def check_child(config: TrainConfig, parent: Parent) -> None:
    """Raises UserError where ``config`` is not a model that the weights of ``parent`` fit."""
    source = read_run(Path(parent.path))[0].model
    names = [field.name for field in dataclasses.fields(ModelConfig) if field.name not in _MAY_DIFFER]
    pairs = {name: (getattr(source, name), getattr(config.model, name)) for name in names}
    differing = [
        f"model.{name.replace('_', '-')} is {there!r} there and {here!r} here"
        for name, (there, here) in pairs.items()
        if there != here
    ]
    if differing:
        raise UserError(
            f"--from takes the model as it is at {parent.path}: {'; '.join(differing)}: leave the options out"
        )
    if config.model.activation == SILU != source.activation:
        raise UserError(
            f"model.activation must have silent neurons, as it has at {parent.path} ({source.activation}); "
            f"got {SILU}: leave the option out"
        )


def parent_tokenizer(config: TrainConfig, parent: Parent) -> tuple[Tokenizer, TrainConfig, Path]:
    """The tokenizer of ``parent``, the configuration that named it, and where it is."""
    path = Path(parent.path)
    tokenizer = read_tokenizer(path)
    check_vocabulary(tokenizer, config.model.vocab_size)
    return tokenizer, read_run(path)[0], path


def with_weights_of(parent: Parent, state: TrainState, placed: TrainState) -> TrainState:
    """``state`` with the weights of ``parent`` in place of its own, which are deleted: there need not be room
    for both. Each device reads only what it holds.

    Args:
      parent: whose.
      state: before the first step.
      placed: its leaves as ``jax.ShapeDtypeStruct`` with shardings.

    Raises:
      UserError: the weights cannot be read, or are not those of the configuration beside them.
    """
    for leaf in jax.tree.leaves(state.params):
        leaf.delete()
    return dataclasses.replace(state, params=_read_weights(Path(parent.path), placed.params))


def _read_weights(path: Path, wanted: Params) -> Params:
    if converted.is_converted(path):
        config = read_run(path)[0].model
        with converted.one_sentence(), open_own(path / converted.PARAMS, config) as weights:
            return load_sharded(weights, lambda leaf: _at(wanted, leaf.path).sharding)
    restore = ocp.args.PyTreeRestore(
        item=wanted,
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=True,  # what its token order kept is not the child's
    )
    with reading(path), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(path / "params", restore)


def _at(tree: Params, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _is_of(parent: Parent, source: str) -> bool:
    """Whether ``source`` is the parent's checkpoint or the run that it was taken from, also if neither exists
    any longer, or the run has newer ones by now."""
    given, path = Path(source).expanduser().absolute(), Path(parent.path)
    return given == path or (path.parent.name == SUBDIRECTORY and given in (path.parent, path.parent.parent))


def _parent_at(directory: Path) -> Parent:
    path = find_checkpoint(directory)
    return Parent(str(path), read_run(path)[1], _fingerprint(path / converted.PARAMS))


def _fingerprint(directory: Path) -> str:
    """SHA-256 of the files below ``directory`` and of their names."""
    whole = hashlib.sha256()
    with reading(directory.parent):
        for path in sorted(path for path in directory.rglob("*") if path.is_file()):
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            whole.update(f"{path.relative_to(directory).as_posix()}\n{content}\n".encode())
    return whole.hexdigest()
