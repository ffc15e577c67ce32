"""``sparse-lm bench``: one program, a subject each."""

from train.cli.options import PROGRAM, UsageError, did_you_mean, parse_options

_HELP = f"""usage: {PROGRAM} bench SUBJECT [OPTIONS]

subjects:
  order      count the neurons that panels of a trained model's tokens share, by the order of the tokens

{PROGRAM} bench SUBJECT --help lists a subject's options.
"""


def run(argv: list[str]) -> None:
    subjects = {"order": _order}
    subject = argv[0] if argv else None
    if subject in ("-h", "--help"):
        print(_HELP, end="")
    elif subject in subjects:
        subjects[subject](argv[1:])
    else:
        got = "none" if subject is None else f"{subject!r}{did_you_mean(subject, subjects)}"
        raise UsageError(f"bench expects one of {', '.join(subjects)}; got {got}")


def _order(argv: list[str]) -> None:
    from train.bench import bench_order

    bench_order.run(parse_options(bench_order.BenchOrderOptions, argv, "bench order"))
