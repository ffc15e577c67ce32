"""The runs of a sweep: one for each λ, and one for each variant of the model or of its training."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pallas_kernels.errors import RequestError
from sparse_lm.config import SILU
from train.config import TrainConfig

VariantName = Literal["silu", "reset", "keep", "non-gated", "relu2"]
VARIANTS: tuple[VariantName, ...] = get_args(VariantName)
DEFAULT_L1 = (0.0, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4)
L1 = "l1"


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What to train.

    Attributes:
      base: the run that all rows are made from; its workdir is the sweep's, and holds each row's.
      l1: values of λ, a row each.
      variants: further rows. All but ``"silu"``, which is dense, are trained with λ ``at``: ``"silu"``, the
        gate's activation that is never zero, with λ 0; ``"reset"`` and ``"keep"``, dead neurons brought back
        with the optimizer's moments of their gate rows set to zero or kept; ``"non-gated"``, a layer without
        a gate and half as many neurons again, which has as many parameters; ``"relu2"``, the square of ReLU.
      at: λ of the variants, one of ``l1``; None is the middle one of those above 0.

    Raises:
      RequestError: a λ that is none or stands there twice, ``at`` is not among them, or a variant is what
        ``base`` is already.
    """

    base: TrainConfig
    l1: tuple[float, ...] = DEFAULT_L1
    variants: tuple[VariantName, ...] = VARIANTS
    at: float | None = None

    def __post_init__(self) -> None:
        if not self.l1:
            raise RequestError("l1 must name at least one λ; got none")
        for value in self.l1:
            if not 0 <= value < math.inf:
                raise RequestError(f"l1 must be finite numbers of at least 0; got {value:g}")
        for name, values in {"l1": [f"{value:g}" for value in self.l1], "variants": self.variants}.items():
            twice = next((value for value in values if values.count(value) > 1), None)
            if twice is not None:
                raise RequestError(f"{name} must name each row once; got {twice} twice")
        if self.at is not None and self.at not in self.l1:
            known = ", ".join(f"{value:g}" for value in self.l1)
            raise RequestError(
                f"at must be one of --l1, so that each variant has a row to be compared with: {known}; "
                f"got {self.at:g}"
            )
        if self.base.model.sparsity.schedule != "constant":
            raise RequestError(
                "model.sparsity.schedule must be constant in a sweep, whose rows differ in λ; got "
                f"{self.base.model.sparsity.schedule}"
            )
        for row in self.rows():
            if row.variant != L1 and _without_names(row.config) == _without_names(self._of_l1(self.level)):
                raise RequestError(
                    f"variants must differ from the run that they are made from; {row.variant} is what the "
                    "other options ask for: leave one of them out"
                )

    @property
    def level(self) -> float:
        """λ of the variants."""
        if self.at is not None:
            return self.at
        positive = sorted(value for value in self.l1 if value > 0)
        return positive[len(positive) // 2] if positive else 0.0

    @property
    def workdir(self) -> Path:
        return Path(self.base.workdir).expanduser().absolute()

    def rows(self) -> tuple["Row", ...]:
        """All rows, those of λ first."""
        of_l1 = (Row(f"l1-{value:g}", L1, self._of_l1(value)) for value in self.l1)
        of_variants = (Row(name, name, self._of_variant(name)) for name in self.variants)
        return tuple(self._in_its_directory([*of_l1, *of_variants]))

    def _of_l1(self, value: float) -> TrainConfig:
        return _changed(self.base, sparsity={"l1": value})

    def _of_variant(self, name: VariantName) -> TrainConfig:
        config, model = self._of_l1(self.level), self.base.model
        match name:
            case "silu":
                sparse = {"l1": 0.0, "revive": "off"}
                return _changed(
                    config, activation=SILU, ffn=model.ffn.with_format("auto", "auto"), sparsity=sparse
                )
            case "reset" | "keep":
                return _changed(config, sparsity={"revive": name})
            case "non-gated":
                return _changed(config, gated=False, d_ff=model.d_ff * 3 // 2 if model.gated else model.d_ff)
            case "relu2":
                return _changed(config, activation=name)

    def _in_its_directory(self, rows: Sequence["Row"]) -> Iterator["Row"]:
        for row in rows:
            config = dataclasses.replace(row.config, workdir=str(self.workdir / row.name))
            yield dataclasses.replace(row, config=config)


@dataclasses.dataclass(frozen=True)
class Row:
    """One run of a sweep.

    Attributes:
      name: of its directory in the sweep's.
      variant: ``"l1"``, or the variant that it is.
      config: the run.
    """

    name: str
    variant: str
    config: TrainConfig

    @property
    def workdir(self) -> Path:
        return Path(self.config.workdir)

    @property
    def l1(self) -> float:
        """λ."""
        return self.config.model.sparsity.l1


def _changed(config: TrainConfig, *, sparsity: dict[str, Any] | None = None, **model: Any) -> TrainConfig:
    """``config`` with fields of its model and of the model's sparsity changed."""
    sparse = dataclasses.replace(config.model.sparsity, **(sparsity or {}))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, sparsity=sparse, **model))


def _without_names(config: TrainConfig) -> TrainConfig:
    """``config`` without where it is."""
    return dataclasses.replace(config, workdir="-")
