"""Checkpoints: one directory a step that holds all it takes to resume, evaluate or generate.

``<workdir>/checkpoints/<step>/`` has ``params`` (the weights, and what the token order keeps), ``rest``
(optimizer, RNG, step, neuron counters), ``data`` (the position in the corpus, which corpus it is, and the
plan), ``run`` (configuration and step) and ``tokenizer``. Orbax writes it under a temporary name and renames
it when it is whole, so that a killed save never looks like a checkpoint.
"""

import contextlib
import dataclasses
import errno
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx
from orbax.checkpoint import checkpoint_managers

from sparse_lm import SparseLM
from train.config import CheckpointConfig, TrainConfig, changed_fields, from_dict, to_dict
from train.data.corpus import CorpusIdentity
from train.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from train.errors import UserError, short_reason
from train.parallel import check_devices
from train.run import converted
from train.run.checkpoint_errors import making, reading, writing
from train.run.checkpoint_removal import SUBDIRECTORY as DELETING
from train.run.checkpoint_removal import Removal
from train.state import TrainState, build_program

SUBDIRECTORY = "checkpoints"
_ITEMS = ("params", "rest", "data", "run", "tokenizer")
_HALF_WRITTEN = ".half-written"
_UNDER_WAY = ".orbax-checkpoint-tmp"  # how orbax ends the name of a save that is not whole yet
_CE = "heldout_ce"
# What may differ between the run that saved and the run that resumes; everything else must be equal.
MAY_CHANGE = (
    "steps", "workdir", "optimizer", "checkpoint", "report", "parallel",
    "model.sparsity", "model.ffn", "model.remat", "model.dtype", "model.layer_loop",
    "refresh_order_every", "plan", "compilation_cache",
    # The corpus is compared by its content (`check_same_corpus`), not by the names of its files.
    "data.paths", "data.weights", "data.text_field", "data.accept_change", "data.require_paths",
)  # fmt: skip
_TOKENIZER_FIELD = "data.tokenizer"  # its content is compared, not its name


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
        half_written = [path.name for path in _entries(self.directory) if _is_half_written(path)]
        self.ignored = [name for name in half_written if not name.endswith(_UNDER_WAY)]
        self.abandoned = [name for name in half_written if name.endswith(_UNDER_WAY)]
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
                _set_aside(self.directory)
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
                    run=ocp.args.JsonSave({"step": step, "config": to_dict(config)}),
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
        return load_tokenizer(self.path(step) / "tokenizer")

    def data(self, step: int) -> SavedData:
        """Where the run that saved ``step`` stood in its data."""
        return read_saved_data(self.path(step))

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state saved at ``step``, placed as ``abstract``'s shardings say."""
        variables, rest = _split_state(abstract)
        with reading(self.path(step), _before(self.path(step))):
            items = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(variables),
                    rest=ocp.args.StandardRestore(rest),
                ),
            )
        buffers = {name: items.params.pop(name) for name in abstract.buffers}
        return TrainState(params=items.params, buffers=buffers, **items.rest)


def check_local(option: str, directory: str | Path) -> None:
    """Raises UserError for the address of a bucket, which is no directory of this machine."""
    scheme, separator, _ = str(directory).partition("://")
    if separator:
        raise UserError(
            f"{option} must be a directory that this machine has mounted; got {directory}: mount the bucket "
            f"and name the place where it is mounted, for a run appends to its files and {scheme}:// cannot"
        )


def check_same_run(saved: TrainConfig, given: TrainConfig, where: Path) -> None:
    """Raises UserError naming each field in which ``given`` cannot resume what ``saved`` began."""
    differing = [
        f"{name.replace('_', '-')} is {there!r} there and {here!r} here"
        for name, (there, here) in changed_fields(saved, given).items()
        if not name.startswith((*MAY_CHANGE, _TOKENIZER_FIELD))
    ]
    if differing:
        raise UserError(
            f"{where} was trained with another configuration: {'; '.join(differing)}. Only "
            f"{', '.join(MAY_CHANGE)} may change on resume: restore the field or choose another workdir"
        )


def check_same_tokenizer(
    saved: Tokenizer, given: Tokenizer, where: Path, *, remedy: str = "choose another workdir"
) -> None:
    """Raises UserError unless both tokenizers have the same content; ``remedy`` is what else one can do."""
    if saved.fingerprint != given.fingerprint:
        raise UserError(
            f"{where} was trained with another tokenizer: data.tokenizer has {saved.vocab_size} ids and "
            f"fingerprint {saved.fingerprint[:12]} there, {given.vocab_size} and {given.fingerprint[:12]} "
            f"here: pass the tokenizer it was trained with, or {remedy}"
        )


def check_same_corpus(saved: CorpusIdentity, given: CorpusIdentity, where: Path) -> None:
    """Raises UserError unless both corpora have the same content."""
    if saved.fingerprint != given.fingerprint:
        raise UserError(
            f"{where} was trained on another corpus: {saved} there, {given} here. Pass the documents that it "
            "was trained on, choose another workdir, or go on with these from where the run stands with "
            "--data.accept-change"
        )


def check_same_split(saved: CorpusIdentity, given: CorpusIdentity, where: Path) -> None:
    """Raises UserError unless both corpora hold out a document by the same rule."""
    if saved.threshold != given.threshold:
        raise UserError(
            f"{where} was trained with another rule of which documents are held out than these token shards "
            "have, and text that it was trained on would count as held out: pass the documents themselves"
        )


def complete_steps(directory: Path) -> list[int]:
    """Steps with a complete checkpoint under ``directory``, in rising order."""
    return sorted(int(path.name) for path in _entries(directory) if _is_step(path) and _is_complete(path))


def find_checkpoint(directory: str | Path) -> Path:
    """The step's directory that ``directory`` means: itself, or the newest complete one of a run.

    Raises:
      UserError: there is no such directory, or no complete checkpoint in it.
    """
    check_local("checkpoint", directory)
    given = Path(directory).expanduser().absolute()
    if not given.is_dir():
        raise UserError(f"a checkpoint must be a directory; there is none at {given}")
    if _is_complete(given) or converted.is_converted(given):
        return given
    if _is_half_written(given) or any((given / item).is_dir() for item in _ITEMS):
        raise UserError(f"{given} is a half-written checkpoint: choose a complete one")
    root = given / SUBDIRECTORY if (given / SUBDIRECTORY).is_dir() else given
    steps = complete_steps(root)
    if steps:
        return root / str(steps[-1])
    partial = [path.name for path in _entries(root) if _is_half_written(path)]
    if partial:
        raise UserError(
            f"{root} must hold a complete checkpoint; found only half-written ones: {', '.join(partial)}: "
            "train again with this workdir"
        )
    raise UserError(f"{given} must hold a checkpoint; found none: pass the workdir of a training run")


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
    tokenizer = load_tokenizer(path / "tokenizer")
    check_vocabulary(tokenizer, config.model.vocab_size)
    if converted.is_converted(path):
        params = converted.read_params(path, config.model)
        return nnx.merge(program.graphdef, params), tokenizer, config, step
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        program.abstract_state().variables,
    )
    with reading(path, _before(path)), ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore(path / "params", wanted)
    return nnx.merge(program.graphdef, params), tokenizer, config, step


def _before(path: Path) -> Path | None:
    """The complete checkpoint of the same run that comes before ``path``, if there is one."""
    earlier = [s for s in complete_steps(path.parent) if path.name.isdecimal() and s < int(path.name)]
    return path.with_name(str(earlier[-1])) if earlier else None


def _split_state(state: TrainState) -> tuple[Any, dict[str, Any]]:
    """The model's variables, which inference needs alone, and everything else."""
    model = ("params", "buffers")
    rest = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return state.variables, {name: value for name, value in rest.items() if name not in model}


def read_run(path: Path) -> tuple[TrainConfig, int]:
    """The configuration and the step of one checkpoint's directory. Raises UserError if it cannot be read."""
    with reading(path, _before(path)), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        saved = checkpointer.restore(path / "run")
    try:
        return from_dict(TrainConfig, saved["config"]), saved["step"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} must hold a configuration of this version of the program ({short_reason(error)}): use "
            "the version that saved it"
        ) from error


def read_saved_data(path: Path) -> SavedData:
    """Where a run stood in its data when it saved the checkpoint at ``path``."""
    with reading(path), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        saved = checkpointer.restore(path / "data")
    plan = saved.get("plan")
    return SavedData(
        saved["position"], CorpusIdentity(**saved["corpus"]), None if plan is None else tuple(plan)
    )


def read_corpus(path: Path) -> CorpusIdentity | None:
    """The corpus that the model at ``path`` was trained on; None if that is a converted model."""
    return None if converted.is_converted(path) else read_saved_data(path).corpus


def _heldout_ce(metrics: dict[str, float]) -> float:
    return metrics[_CE]


def _entries(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def _is_step(path: Path) -> bool:
    return path.name.isdecimal() and path.is_dir()


def _is_half_written(path: Path) -> bool:
    leftover = re.match(r"\d+\.(orbax-checkpoint-tmp|half-written)", path.name) is not None
    return leftover or (_is_step(path) and not _is_complete(path))


def _is_complete(path: Path) -> bool:
    files = (
        "_CHECKPOINT_METADATA",
        "params/_METADATA",
        "rest/_METADATA",
        "run/metadata",
        "tokenizer/tokenizer.json",
    )
    return all((path / item).is_dir() for item in _ITEMS) and all((path / file).is_file() for file in files)


def _set_aside(directory: Path) -> None:
    """Renames step directories that lack a part, so that the run can save those steps
    again; deletes nothing."""
    for path in _entries(directory):
        if _is_step(path) and _is_half_written(path):
            taken = sum(other.name.startswith(path.name + _HALF_WRITTEN) for other in _entries(directory))
            path.rename(path.with_name(f"{path.name}{_HALF_WRITTEN}{taken or ''}"))


def _check_space(directory: Path, size: int) -> None:
    """Raises OSError (ENOSPC) before a save that the disk has no room for: half a save helps nobody."""
    free = shutil.disk_usage(directory).free
    if free < size:
        raise OSError(errno.ENOSPC, f"{size / 1e6:.1f} MB wanted, {free / 1e6:.1f} MB free")
