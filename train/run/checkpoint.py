"""Checkpoints: one directory a step that holds all it takes to resume, evaluate or generate.

``<workdir>/checkpoints/<step>/`` has ``params`` (the weights, and what the token order keeps), ``rest``
(optimizer, RNG, step, neuron counters), ``data`` (the position in the corpus, which corpus it is, and the
plan), ``run`` (configuration and step) and ``tokenizer``. Orbax writes it under a temporary name and renames
it when it is whole, so that a killed save never looks like a checkpoint.
"""

import contextlib
import dataclasses
import errno
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from train.config import CheckpointConfig, TrainConfig
from train.config_json import to_dict
from train.data.tokenizer import Tokenizer, load_tokenizer
from train.errors import UserError
from train.run import converted
from train.run.checkpoint_errors import making, reading, writing
from train.run.checkpoint_files import (
    SUBDIRECTORY,
    UNDER_WAY,
    complete_steps,
    entries,
    is_half_written,
    set_aside,
)
from train.run.checkpoint_reading import SavedData, read_run, read_saved_data, read_tokenizer
from train.run.checkpoint_removal import SUBDIRECTORY as DELETING
from train.run.checkpoint_removal import Removal
from train.state import TrainState

_CE = "heldout_ce"


class _TokenizerHandler(ocp.CheckpointHandler):
    """Lets orbax carry a tokenizer as its own JSON file."""

    def save(self, directory: Any, args: "_TokenizerSave") -> None:
        if jax.process_index() == 0:
            args.tokenizer.save(Path(directory))

    def restore(self, directory: Any, args: "_TokenizerRestore | None" = None) -> Tokenizer:
        return load_tokenizer(Path(directory))


@ocp.args.register_with_handler(_TokenizerHandler, for_save=True)
@dataclasses.dataclass
class _TokenizerSave(ocp.args.CheckpointArgs):
    tokenizer: Tokenizer


@ocp.args.register_with_handler(_TokenizerHandler, for_restore=True)
@dataclasses.dataclass
class _TokenizerRestore(ocp.args.CheckpointArgs):
    pass


class Checkpoints:
    """The checkpoints of one run: saves in the background, keeps the newest and the best, restores.

    What is there can be asked for at once; ``open`` comes before the first ``save`` or ``restore``.

    Args:
      workdir: the run's directory.
      config: how many to keep.

    Attributes:
      directory: where the steps' directories are.
      ignored: names of half-written checkpoints that were found there, which ``open`` leaves.
      abandoned: names of what a killed run left there, which ``open`` removes: saves that were under way, and
        removals.

    Raises:
      UserError: ``workdir`` holds a converted model.
    """

    def __init__(self, workdir: str | Path, config: CheckpointConfig) -> None:
        self.directory = Path(workdir).expanduser().absolute() / SUBDIRECTORY
        if converted.is_converted(self.directory.parent):
            raise UserError(
                f"workdir must be a directory for a run's checkpoints; {self.directory.parent} holds a "
                "converted model: choose another with --workdir"
            )
        self._removal = Removal(self.directory)
        half_written = [path.name for path in entries(self.directory) if is_half_written(path)]
        self.ignored = [name for name in half_written if not name.endswith(UNDER_WAY)]
        self.abandoned = [name for name in half_written if name.endswith(UNDER_WAY)]
        self.abandoned += [f"{DELETING}/{path.name}" for path in self._removal.found()]
        self._config = config
        self._to_remove = False  # whether a save has begun since the last removal
        self._opened: ocp.CheckpointManager | None = None

    @property
    def _manager(self) -> ocp.CheckpointManager:
        assert self._opened is not None, "open() comes first"
        return self._opened

    def open(self) -> None:
        """Makes the directory, removes what a killed run left there and moves anything else that is
        half-written out of the way.

        Raises:
          UserError: the directory cannot be made, or what it holds cannot be read.
        """
        with making(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                set_aside(self.directory)
                self._removal.begin()
        policy = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(self._config.keep),
                checkpoint_managers.BestN(
                    get_metric_fn=_heldout_ce, reverse=True, n=1, keep_checkpoints_without_metrics=False
                ),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy, best_fn=_heldout_ce, best_mode="min", cleanup_tmp_directories=True,
            todelete_subdir=DELETING,
        )  # fmt: skip
        with reading(self.directory):
            self._opened = ocp.CheckpointManager(self.directory, options=options)

    def newest(self) -> int | None:
        """Step of the newest complete checkpoint, if there is one."""
        steps = complete_steps(self.directory)
        return steps[-1] if steps else None

    def path(self, step: int) -> Path:
        return self.directory / str(step)

    def save(
        self,
        state: TrainState,
        data: SavedData,
        config: TrainConfig,
        tokenizer: Tokenizer,
        *,
        step: int,
        heldout_ce: float | None = None,
    ) -> None:
        """Begins to save; returns once the state's buffers may be reused. Waits for a save that still runs.

        Raises:
          UserError: this save, or the one before it, failed. Earlier checkpoints stand.
        """
        variables, rest = _split_state(state)
        with writing(self.directory):
            self._manager.wait_until_finished()
            self._remove()
            self._removal.wait()  # the save may need that room
            _check_space(self.directory, sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(variables),
                    rest=ocp.args.StandardSave(rest),
                    data=ocp.args.JsonSave(dataclasses.asdict(data)),
                    run=ocp.args.JsonSave(
                        {"step": step, "config": to_dict(config), "tokenizer": tokenizer.fingerprint}
                    ),
                    tokenizer=_TokenizerSave(tokenizer),
                ),
                metrics=None if heldout_ce is None else {_CE: heldout_ce},
                force=True,
            )
            self._to_remove = True

    def check(self) -> None:
        """Raises UserError if a background save has failed; never waits for one that runs."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits for the save that runs. Raises UserError if it failed."""
        with writing(self.directory):
            self._manager.wait_until_finished()
            self._remove()

    def close(self) -> None:
        """Waits for the save and the removal that run and lets the background threads go. Raises UserError if
        one of them failed."""
        with writing(self.directory), contextlib.closing(self._removal):
            if self._opened is not None:
                self._opened.close()
                self._remove()

    def _remove(self) -> None:
        """Begins to remove what the save before has given up."""
        if self._to_remove and jax.process_index() == 0:
            self._removal.begin()
        self._to_remove = False

    def config(self, step: int) -> TrainConfig:
        """The configuration that saved ``step``."""
        return read_run(self.path(step))[0]

    def tokenizer(self, step: int) -> Tokenizer:
        """The tokenizer that ``step`` was trained with."""
        return read_tokenizer(self.path(step))

    def data(self, step: int) -> SavedData:
        """Where the run that saved ``step`` stood in its data."""
        return read_saved_data(self.path(step))

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state saved at ``step``, placed as ``abstract``'s shardings say."""
        variables, rest = _split_state(abstract)
        with reading(self.path(step)):
            items = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(variables),
                    rest=ocp.args.StandardRestore(rest),
                ),
            )
        buffers = {name: items.params.pop(name) for name in abstract.buffers}
        return TrainState(params=items.params, buffers=buffers, **items.rest)


def _split_state(state: TrainState) -> tuple[Any, dict[str, Any]]:
    """The model's variables, which inference needs alone, and everything else."""
    model = ("params", "buffers")
    rest = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return state.variables, {name: value for name, value in rest.items() if name not in model}


def _heldout_ce(metrics: dict[str, float]) -> float:
    return metrics[_CE]


def _check_space(directory: Path, size: int) -> None:
    """Raises OSError (ENOSPC) before a save that the disk has no room for: half a save helps nobody."""
    free = shutil.disk_usage(directory).free
    if free < size:
        raise OSError(errno.ENOSPC, f"{size / 1e6:.1f} MB wanted, {free / 1e6:.1f} MB free")
