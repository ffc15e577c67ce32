"""What a run is, known before its first step: ``manifest.json`` and ``config.json`` in its work directory.

``config.json`` is what ``--config`` takes. The manifest adds what follows from configuration, corpus and
machine,
and a history with an entry for every start: when, where and how, from which step, and what had changed.
"""

import dataclasses
import hashlib
import json
import math
import os
import platform
import shlex
import socket
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from sparse_lm.config import SILU
from sparse_lm.model import flops_per_token, num_parameters
from sparse_lm.sparsity import l1_coefficient
from train.config import TrainConfig
from train.config_file import config_text, read_config, write_config
from train.config_json import changed_fields, from_dict, to_dict
from train.data.corpus import CorpusIdentity
from train.errors import UserError
from train.run import compilation_cache
from train.run.plan import Terrain
from train.run.step_memory import StepMemory
from train.state import Program, learning_rate_schedule

FILE_NAME = "manifest.json"
CONFIG_NAME = "config.json"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


@dataclasses.dataclass(frozen=True)
class Parent:
    """The checkpoint that a run began from, in place of random weights.

    Attributes:
      path: of the checkpoint or converted model, absolute.
      step: optimizer steps behind it; 0 for a converted model.
      fingerprint: SHA-256 of its weights' files.
    """

    path: str
    step: int
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.path} (step {self.step}, fingerprint {self.fingerprint[:12]})"


@dataclasses.dataclass(frozen=True)
class Lineage:
    """What a run's manifest says of it to later starts: its configuration, and its parent if it has one."""

    config: TrainConfig
    parent: Parent | None


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Facts of a run.

    Attributes:
      config: as given.
      corpus: which text, by its content.
      start: steps done before.
      evaluated_tokens: held-out tokens of one evaluation.
      state_bytes: parameters, optimizer and counters, over all devices together.
      kernels: what runs the feed-forward layers, and why.
      devices: how many of which kind.
      compiled: directory that compiled programs are kept in, if any.
      parent: what it began from, if not from random weights.
      step_memory: what a step takes of a device, where that is known.
    """

    config: TrainConfig
    corpus: CorpusIdentity
    start: int
    evaluated_tokens: int
    state_bytes: int
    kernels: str
    devices: str
    compiled: str | None
    parent: Parent | None = None
    step_memory: StepMemory | None = None

    @classmethod
    def of(
        cls,
        program: Program,
        corpus: CorpusIdentity,
        *,
        start: int,
        evaluated_tokens: int,
        parent: Parent | None = None,
    ) -> "Manifest":
        """The facts of a run on the devices that there are."""
        config = program.config
        state = jax.tree.leaves(program.abstract_state())
        return cls(
            config=config,
            corpus=corpus,
            start=start,
            evaluated_tokens=evaluated_tokens,
            state_bytes=sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in state),
            kernels=_kernels(config),
            devices=f"{jax.device_count()} × {jax.devices()[0].device_kind}",
            compiled=compilation_cache.where(),
            parent=parent,
        )

    @property
    def tokens_per_step(self) -> int:
        return self.config.batch_size * self.config.model.context_length

    @property
    def tokens(self) -> int:
        """Of all steps, those that are done too."""
        return self.config.steps * self.tokens_per_step

    @property
    def flops_per_step(self) -> float:
        """Model FLOPs, as `flops_per_token` counts them."""
        return self.tokens_per_step * flops_per_token(self.config.model, self.config.model.context_length)

    @property
    def batch_per_device(self) -> int:
        """Sequences that a device takes at a time."""
        return self.config.batch_size // (self.config.optimizer.accumulation * jax.device_count())

    def to_dict(self) -> dict[str, Any]:
        """Every fact, ready for JSON."""
        return {
            "config": to_dict(self.config),
            "corpus": dataclasses.asdict(self.corpus),
            "tokens_per_step": self.tokens_per_step,
            "tokens": self.tokens,
            "tokens_to_come": self.tokens - self.start * self.tokens_per_step,
            "epochs": self.tokens / self.corpus.tokens,
            "evaluated_tokens": self.evaluated_tokens,
            "parameters": num_parameters(self.config.model),
            "state_bytes": self.state_bytes,
            "flops_per_step": self.flops_per_step,
            "batch_per_device": self.batch_per_device,
            "step_memory": None if self.step_memory is None else dataclasses.asdict(self.step_memory),
            "kernels": self.kernels.splitlines(),
            "devices": self.devices,
            "compiled": self.compiled,
            "parent": None if self.parent is None else dataclasses.asdict(self.parent),
        }

    def lines(self) -> str:
        """For people."""
        model, corpus = self.config.model, self.corpus
        to_come = self.tokens - self.start * self.tokens_per_step
        begins = [] if self.parent is None else [f"from     {self.parent}"]
        return "\n".join(
            [
                *begins,
                f"model    {model.num_layers} layers, d_model {model.d_model}, d_ff {model.d_ff}, "
                f"{quantity(num_parameters(model))} parameters, "
                f"state {quantity(self.state_bytes, unit='B')}",
                f"corpus   {corpus.documents:,} documents, {quantity(corpus.tokens)} tokens, fingerprint "
                f"{corpus.fingerprint[:12]}; held out {quantity(corpus.heldout_tokens)} tokens, of which an "
                f"evaluation takes {self.evaluated_tokens:,}",
                f"steps    {self.config.batch_size} × {model.context_length} tokens, "
                f"{quantity(self.flops_per_step, unit='FLOPs')} each; {quantity(to_come)} tokens to come, "
                f"{self.tokens / corpus.tokens:.2f} epochs in all",
                f"devices  {self.devices}; {self.batch_per_device} sequences on each at a time, accumulation "
                f"{self.config.optimizer.accumulation}",
                *([] if self.step_memory is None else [f"memory   {self.step_memory}"]),
                f"kernels  {self.kernels.splitlines()[-1]}",
                f"compiled programs are {f'kept in {self.compiled}' if self.compiled else 'not kept'}",
            ]
        )


def quantity(value: float, *, unit: str = "") -> str:
    """A number in three or four figures: a count as in ``1.2B``, or of a unit as in ``1.2 GB``."""
    space, giga = (" ", "G") if unit else ("", "B")
    for limit, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, giga), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{space}{prefix}{unit}"
    return f"{value:.0f}{space}{unit}"


def write(workdir: Path, manifest: Manifest, changes: Mapping[str, tuple[Any, Any]]) -> str:
    """Writes both files; each is whole at any instant.

    Args:
      workdir: the run's directory.
      manifest: its facts.
      changes: what differs from the run that saved the checkpoint, as from `train.config.changed_fields`.

    Returns:
      An id that tells this run, over all its starts, from every other.

    Raises:
      UserError: there is a manifest that this program did not write (`check_others` says so sooner).
    """
    path = workdir / FILE_NAME
    history = [*_history(path), _this_start(manifest.start, changes)]
    partial = path.with_name(FILE_NAME + ".partial")
    partial.write_text(
        json.dumps(manifest.to_dict() | {"history": history}, indent=2, ensure_ascii=False) + "\n",
        encoding="utf-8",
    )
    os.replace(partial, path)
    partial = path.with_name(CONFIG_NAME + ".partial")
    write_config(manifest.config.as_asked(), partial)
    os.replace(partial, workdir / CONFIG_NAME)
    return hashlib.sha256(json.dumps([str(workdir.absolute()), history[0]]).encode()).hexdigest()[:16]


def check_others(workdir: Path) -> None:
    """Raises UserError where a file that a run writes is there and this program did not write it."""
    history = _history(workdir / FILE_NAME)
    path = workdir / CONFIG_NAME
    if history or not path.exists():
        return
    try:
        ours = path.read_text(encoding="utf-8") == config_text(read_config(path))
    except (UserError, UnicodeDecodeError):
        ours = False
    if not ours:
        raise UserError(
            f"a run writes its whole configuration to {path}, and the file there is none that a run wrote: "
            "give it another name, under which --config takes it, or choose another --workdir"
        )


def read_lineage(workdir: Path) -> Lineage | None:
    """What the manifest in a work directory says of the run there; None if there is no run's manifest."""
    path = workdir / FILE_NAME
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        parent = facts.get("parent")  # manifests of earlier versions have none
        return Lineage(from_dict(TrainConfig, facts["config"]), None if parent is None else Parent(**parent))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # `write` says so of a file that is another program's


def schedule_jumps(before: TrainConfig, now: TrainConfig, start: int) -> list[str]:
    """A sentence for each of learning rate and λ that the resumed run does not take up where it was."""
    rates = [float(learning_rate_schedule(c.optimizer, c.steps)(start)) for c in (before, now)]
    coefficients = [float(l1_coefficient(start, c.model.sparsity)) for c in (before, now)]
    found = {"learning rate": rates}
    if now.model.sparsity.schedule != "target":
        found["L1 coefficient λ"] = coefficients
    jumps = [
        f"the {name} jumps at step {start + 1}: {values[1]:.3g}, where it was to be {values[0]:.3g}"
        for name, values in found.items()
        if not math.isclose(*values, rel_tol=0.01)
    ]
    if steers_anew(changed_fields(before, now), now):
        jumps.append(f"the L1 coefficient λ is steered anew, from {now.model.sparsity.l1:.3g}")
    return jumps


def steers_anew(changes: Mapping[str, tuple[Any, Any]], now: TrainConfig) -> bool:
    """Whether a resumed run leaves the λ that it was steered to for the one that is asked for now."""
    asked = {"model.sparsity.l1", "model.sparsity.schedule"} & changes.keys()
    return now.model.sparsity.schedule == "target" and bool(asked)


def _this_start(start: int, changes: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "command": shlex.join(sys.argv),
        "step": start,
        "processes": jax.process_count(),
        "devices": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
        "changes": {name: {"before": before, "now": now} for name, (before, now) in changes.items()},
    }


def _history(path: Path) -> list[Any]:
    if not path.exists():
        return []
    try:
        history = json.loads(path.read_text(encoding="utf-8"))["history"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} must be the manifest of a run; found another file: move it elsewhere, or choose another "
            "--workdir"
        ) from error
    return list(history)


def _kernels(config: TrainConfig) -> str:
    """What `pallas_kernels` says of one micro-batch on one device; raises RequestError if that cannot run."""
    model = config.model
    if model.activation == SILU:
        return f"runs dense: {SILU} is zero for no neuron"
    sequences = max(1, config.batch_size // (config.optimizer.accumulation * jax.device_count()))
    x = jax.ShapeDtypeStruct((sequences * model.context_length, model.d_model), jnp.dtype(model.dtype))
    w_up = jax.ShapeDtypeStruct((model.d_ff, model.d_model), jnp.float32)
    dispatch.choose(model.ffn, dispatch.Call.of(x, w_up))
    if Terrain.of(config) is not None:
        return "runs a plan: each layer dense or in panels, by what the steps count of it"
    return dispatch.explain(x, w_up, model.ffn)
