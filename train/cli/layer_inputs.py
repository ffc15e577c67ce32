"""``sparse-lm layer-inputs``."""

import dataclasses
import shlex

from train.cli.options import parse_options


@dataclasses.dataclass(frozen=True)
class LayerInputsOptions:
    """Runs a checkpoint over its held-out text and saves, for each layer, what enters its feed-forward part
    and its weights: a file for sparse-lm bench layers forward --inputs.

    Attributes:
      checkpoint: a run's work directory, one checkpoint in it, or a converted model.
      out: the file to write, .npz.
      tokens: most tokens, in whole sequences (default: 65536, as far as the text reaches).
      layers: numbers of the layers to save, from 0 (default: all).
      debug: show the traceback of an error.
    """

    checkpoint: str
    out: str
    tokens: int | None = None
    layers: tuple[int, ...] = ()
    debug: bool = False

    def __post_init__(self) -> None:
        if not self.out.endswith(".npz"):
            raise ValueError(f"--out must end with .npz; got {self.out}")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"--tokens must be at least 1; got {self.tokens}")


def run(argv: list[str]) -> None:
    options = parse_options(LayerInputsOptions, argv, "layer-inputs")

    from rich.console import Console

    from train.bench import layer_inputs
    from train.output import print_table
    from train.run.report import program_as_typed

    tokens, found = layer_inputs.save_layer_inputs(
        options.checkpoint, options.out, tokens=options.tokens, layers=options.layers
    )
    console = Console(highlight=False, soft_wrap=True)
    print_table(console, layer_inputs.table(found))
    console.print(
        f"{tokens:,} tokens of each layer: {options.out}\n"
        f"next:\n  {program_as_typed()} bench layers forward --inputs {shlex.quote(options.out)}",
        markup=False,
    )
