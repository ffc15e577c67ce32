"""Sends a run's metrics to Weights & Biases."""

from pathlib import Path

from train.config import TrainConfig
from train.config_json import to_dict
from train.errors import UserError
from train.run.metrics import Record, scalars


class WandbSink:
    """One run of a W&B project; a resumed run goes on with the same one.

    Args:
      config: the run; ``report.wandb`` names the project.
      workdir: where W&B keeps its own files.
      run_id: tells the run from every other.

    Raises:
      UserError: the package wandb is not installed.
    """

    def __init__(self, config: TrainConfig, workdir: Path, run_id: str) -> None:
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise UserError(
                "report.wandb needs the package wandb, which is not installed: pip install "
                "'sparse-lm[wandb]', or leave the option out"
            ) from error
        self._run = wandb.init(
            project=config.report.wandb,
            id=run_id,
            resume="allow",
            name=workdir.name,
            dir=str(workdir),
            config=to_dict(config),
        )

    def write(self, record: Record) -> None:
        """Sends every number of a record."""
        self._run.log(dict(scalars(record)), step=record["step"])

    def close(self) -> None:
        self._run.finish()
