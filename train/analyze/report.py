"""The report of an analysis: one HTML file that needs no other, with figures, tables and sentences."""

import base64
import html
from collections.abc import Callable, Sequence

from train.analyze.analysis import Analysis
from train.analyze.figures import Picture
from train.analyze.summary import TOP_SHARES, TokenSummary, octaves
from train.bench.order_counts import TEXT

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; margin: 0 auto;
  max-width: 60rem; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
p { margin: .4rem 0; max-width: 48rem; } .facts { color: #555; overflow-wrap: anywhere; }
img { width: 100%; height: auto; margin: .5rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: pre; }
th { border-bottom: 2px solid #888; font-weight: 600; white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
.pair { display: flex; flex-wrap: wrap; gap: 0 3rem; } pre { background: #f4f4f4; padding: .75rem;
  white-space: pre-wrap; }
"""


def write_html(analysis: Analysis, pictures: Sequence[Picture]) -> str:
    """The whole page, with the pictures inside it."""
    drawn = {picture.name: picture for picture in pictures}
    sections = "".join(section(analysis, drawn) for section in _SECTIONS)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Activity of {_text(analysis.checkpoint)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"{sections}</body>\n</html>\n"
    )


def headline(analysis: Analysis) -> str:
    """The whole analysis in one sentence."""
    means = [layer.mean_nnz for layer in analysis.layers]
    busiest = max(range(len(means)), key=means.__getitem__)
    mean = sum(means) / len(means)
    return (
        f"A token activates {mean:.1f} of {analysis.d_ff:,} neurons on average over layers "
        f"({mean / analysis.d_ff:.1%}); layer {busiest} is the most active with {means[busiest]:.1f}, "
        f"and {max(layer.max_nnz for layer in analysis.layers):,} is the most that one token activates."
    )


def _begin(analysis: Analysis, drawn: dict[str, Picture]) -> str:
    machine = analysis.machine
    facts = (
        f"{analysis.checkpoint}, step {analysis.step:,}; {analysis.tokens:,} tokens in sequences of "
        f"{analysis.context_length:,}; on {machine['device']['kind']}, JAX {machine['versions']['jax']}"
    )
    notes = "".join(f'<p class="facts">{_text(note)}</p>\n' for note in analysis.notes)
    return (
        f'<h1>Activity of a model\'s neurons</h1>\n<p class="facts">{_text(facts)}</p>\n{notes}'
        f"<p>{_text(headline(analysis))}</p>\n"
    )


def _layers(analysis: Analysis, drawn: dict[str, Picture]) -> str:
    speedups = analysis.speedups
    names = ["layer", "mean nnz", "share", "99th percentile", "largest", "silent neurons"]
    rows = []
    for nth, layer in enumerate(analysis.layers):
        row = [
            str(nth), f"{layer.mean_nnz:.1f}", f"{layer.mean_nnz / analysis.d_ff:.2%}",
            f"{layer.p99_nnz:.0f}", f"{layer.max_nnz:,}", f"{layer.silent_share:.1%}",
        ]  # fmt: skip
        rows.append(row if speedups is None else [*row, f"{speedups[nth]:.2f}×"])
    return _section(
        "Active neurons by layer",
        ["nnz counts the neurons that a token activates. A neuron is silent if no token of this text did."],
        drawn.get("layers"),
        _table(names if speedups is None else [*names, "speed-up"], rows),
    )


def _speed(analysis: Analysis, drawn: dict[str, Picture]) -> str:
    sentences = [analysis.times_note]
    if analysis.speedups is not None and analysis.correlations is not None:
        order = "the order of the text" if analysis.own_order == TEXT else f"the order {analysis.own_order}"
        sentences.append(f"Tokens are in {order}, in which the model runs.")
        for name, what in (("mean_nnz", "mean"), ("max_nnz", "largest")):
            r = analysis.correlations[name]
            sentences.append(
                f"Correlation (Pearson's r over layers) of the speed-up with the {what} nnz: "
                + ("none can be given: too few layers, or all alike." if r is None else f"{r:.3f}.")
            )
    return _section("Speed-up by layer", sentences, drawn.get("speed"))


def _tokens(analysis: Analysis, drawn: dict[str, Picture]) -> str:
    extremes = analysis.extremes
    names = ["token", "came", "mean nnz"]

    def rows(tokens: Sequence[TokenSummary]) -> list[list[str]]:
        return [[token.text, f"{token.count:,}", f"{token.mean_nnz:.1f}"] for token in tokens]

    tables = f"{_table(['least active', *names[1:]], rows(extremes.least))}"
    tables += f"{_table(['most active', *names[1:]], rows(extremes.most))}"
    often = "any number of times" if extremes.least_count == 1 else f"at least {extremes.least_count} times"
    sentence = f"Mean over layers, of tokens that came {often} in this text."
    return _section(
        "Tokens of least and most activity",
        [sentence],
        drawn.get("tokens"),
        f'<div class="pair">{tables}</div>',
    )


def _position(analysis: Analysis, drawn: dict[str, Picture]) -> str:
    columns = octaves(analysis.context_length)
    names = ["layer", *(_range(part) for part in columns)]
    rows = [
        [str(layer), *(f"{curve[part].mean():.1f}" for part in columns)]
        for layer, curve in enumerate(analysis.by_position)
    ]
    rows.append(["mean", *(f"{analysis.by_position[:, part].mean():.1f}" for part in columns)])
    sentence = (
        "Positions count from 1; sequences are cut from the text without regard to its documents. In the "
        "table each column is the mean over a range of positions."
    )
    return _section("Active neurons by position", [sentence], drawn.get("position"), _table(names, rows))


def _range(part: slice) -> str:
    first, last = part.start + 1, part.stop
    return str(first) if first == last else f"{first}–{last}"


def _training(analysis: Analysis, drawn: dict[str, Picture]) -> str:
    sentences = [analysis.training_note]
    table = ""
    if analysis.training is not None:
        training = analysis.training
        sentences.append(f"A neuron is dead once {training.dead_after:,} tokens in a row left it silent.")
        table = _table(
            ["layer", "nnz, first", "nnz, last", "dead, last"],
            [
                [str(layer), f"{nnz[0]:.1f}", f"{nnz[-1]:.1f}", f"{dead[-1]:.1%}"]
                for layer, (nnz, dead) in enumerate(zip(training.nnz, training.dead_share, strict=True))
            ],
        )
    return _section("Over training", sentences, drawn.get("training"), table)


def _popularity(analysis: Analysis, drawn: dict[str, Picture]) -> str:
    names = ["layer", *(f"top {share:.0%} of the neurons" for share in TOP_SHARES)]
    rows = [
        [str(nth), *(f"{held:.1%}" for held in layer.held_by_top)]
        for nth, layer in enumerate(analysis.layers)
    ]
    sentence = "Which share of all (token, active neuron) pairs the most popular neurons of a layer have."
    return _section("Popularity of neurons", [sentence], drawn.get("popularity"), _table(names, rows))


def _unions(analysis: Analysis, drawn: dict[str, Picture]) -> str:
    other = next(name for name in analysis.unions if name != TEXT)
    runs = (
        f"This model takes its tokens in the order of the text; by {other} stands beside it, for what an "
        "order gives."
        if analysis.own_order == TEXT
        else f"This model takes its tokens in the order {other}."
    )
    cost = (
        "A panel of P tokens costs the neurons that any of them activates. "
        f"Tokens are put in order {analysis.call:,} at a time."
    )
    tables = ""
    for name, unions in analysis.unions.items():
        names = ["text" if name == TEXT else name, *(f"P {panel}" for panel in analysis.panels)]
        rows = [[str(layer), *(f"{union:.0f}" for union in row)] for layer, row in enumerate(unions)]
        rows.append(["mean", *(f"{union:.0f}" for union in unions.mean(axis=0))])
        tables += _table(names, rows)
    return _section(
        "Neurons that a panel activates",
        [cost, runs],
        drawn.get("unions"),
        f'<div class="pair">{tables}</div>',
    )


def _auto(analysis: Analysis, drawn: dict[str, Picture]) -> str:
    auto = analysis.auto
    title = "What format=auto would do"
    if auto is None:
        return _section(title, ["The text is shorter than a panel, so there is nothing to probe."], None)
    sentences = [
        f"On {auto.device}, a layer takes PanelELL where the probed panels of {auto.panel_tokens} tokens "
        f"activate less than {auto.break_even_forward:.0%} of its neurons, and {auto.break_even_train:.0%} "
        f"where a gradient is taken. The probe looks at a few panels of each call of {analysis.call:,} "
        "tokens.",
    ]
    if not auto.forward_is_asked:
        sentences.append("A forward takes PanelELL there without a probe: what one would find is shown.")
    rows = [
        [str(layer), decision(choice.panel_forward), decision(choice.panel_train)]
        for layer, choice in enumerate(auto.layers)
    ]
    table = _table(["layer", "forward", "forward and backward"], rows)
    here = f"<p>On this machine:</p>\n<pre>{_text(auto.here)}</pre>\n"
    return _section(title, sentences, drawn.get("auto"), table + here)


def decision(panel: float) -> str:
    """What a layer takes, from the share of the calls in which that is PanelELL."""
    if panel in (0.0, 1.0):
        return "PanelELL" if panel else "dense"
    return f"PanelELL in {panel:.0%} of the calls"


_SECTIONS: tuple[Callable[[Analysis, dict[str, Picture]], str], ...] = (
    _begin, _layers, _speed, _tokens, _position, _training, _popularity, _unions, _auto,
)  # fmt: skip


def _section(title: str, sentences: Sequence[str], picture: Picture | None, below: str = "") -> str:
    shown = "" if picture is None else f"{_image(picture)}\n"
    words = "".join(f"<p>{_text(sentence)}</p>\n" for sentence in sentences)
    return f"<h2>{_text(title)}</h2>\n{words}{shown}{below}"


def _image(picture: Picture) -> str:
    data = base64.b64encode(picture.path.read_bytes()).decode()
    return f'<img alt="{_text(picture.title)}" src="data:image/png;base64,{data}">'


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in names)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n{body}</table></div>\n'


def _text(words: str) -> str:
    return html.escape(words)
