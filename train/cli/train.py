"""``sparse-lm train``."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from train.cli.options import parse_options
from train.cli.presets import preset_of, value_of

DEFAULT_PRESET = "tiny"
ALIASES = {
    "--data": "--data.paths",
    "--tokenizer": "--data.tokenizer",
    "--lr": "--optimizer.learning-rate",
    "--learning-rate": "--optimizer.learning-rate",
    "--warmup": "--optimizer.warmup-steps",
    "--accumulation": "--optimizer.accumulation",
    "--batch-per-device": "--parallel.batch-per-device",
    "--l1": "--model.sparsity.l1",
    "--context": "--model.context-length",
    "--dtype": "--model.dtype",
    "--remat": "--model.remat",
    "--tensorboard": "--report.tensorboard",
    "--wandb": "--report.wandb",
    "--samples": "--report.samples",
    "--profile": "--report.profile",
}
_EXPLAINED = {
    "--resume": "a run goes on by itself from the newest checkpoint in its --workdir",
    "--epochs": "the length of a run is --steps; --dry-run shows how many epochs they are",
    "--output-dir": "a run keeps everything in its --workdir",
}
_DESCRIPTION = "\n".join(
    [
        "Trains a model, or takes up the run of the same --workdir where it stopped.",
        "",
        "The common options are --config PRESET or FILE.json, --steps, --batch-size, --workdir, --from "
        "CHECKPOINT, --dry-run, and these short names:",
        "",
        *(f"  {short:<20}{name}" for short, name in ALIASES.items()),
    ]
)


def run(argv: list[str]) -> None:
    preset, config = preset_of(argv, DEFAULT_PRESET)
    source, workdir = value_of(argv, "--from"), value_of(argv, "--workdir") or config.workdir
    if source is not None and (not source or source.startswith("-")):
        source = None  # the option lacks its value, which the parser says
    if source is not None or (Path(workdir).expanduser() / "manifest.json").is_file():
        from train.run.parent import inherited

        config = inherited(dataclasses.replace(config, workdir=workdir), source)

    from train.config import TrainConfig

    @dataclasses.dataclass(frozen=True)
    class TrainOptions:
        """Trains a model.

        Attributes:
          config: the preset, or the JSON file such as a run's own config.json, that gives every option below
            its default.
          source: begin with the weights, the sizes and the tokenizer of a trained or converted model: a run's
            work directory, one checkpoint in it, or what convert made; SiLU becomes ReLU. Only the first
            start of the new run needs it.
          dry_run: check everything, show what the run would be, and stop there.
          debug: show the traceback of an error.
        """

        run: Annotated[TrainConfig, tyro.conf.arg(name="")]
        config: str = preset
        source: Annotated[str | None, tyro.conf.arg(name="from")] = None
        dry_run: bool = False
        debug: bool = False

    options = parse_options(
        TrainOptions,
        argv,
        "train",
        TrainOptions(run=config),
        aliases=ALIASES,
        explained=_EXPLAINED,
        description=_DESCRIPTION,
    )

    from train.run import loop

    loop.run(options.run, source=options.source, dry_run=options.dry_run)
