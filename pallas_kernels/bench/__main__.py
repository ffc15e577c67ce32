"""``python -m pallas_kernels.bench COMMAND ...``: one program, a command for each question."""

import sys
from collections.abc import Callable, Sequence

COMMANDS = {
    "layers": "whole layers of every format beside the dense one",
    "stages": "the stages of a PanelELL layer, each alone",
    "twell": "the stages of TwELL beside XLA's products",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that the first argument names on the others; returns its exit status."""
    command, *rest = [*(sys.argv[1:] if arguments is None else arguments), ""]
    rest = rest[:-1]
    run: Callable[[Sequence[str]], int]
    if command == "layers":
        from pallas_kernels.bench.layers import main as run
    elif command == "stages":
        from pallas_kernels.bench.stages import main as run
    elif command == "twell":
        from pallas_kernels.bench.twell import main as run
    else:
        listed = "\n".join(f"  {name:8}{meaning}" for name, meaning in COMMANDS.items())
        print(f"usage: python -m pallas_kernels.bench COMMAND ...; COMMAND --help tells more\n{listed}")
        return 0 if command in ("-h", "--help") else 2
    return run(rest)


if __name__ == "__main__":
    sys.exit(main())
