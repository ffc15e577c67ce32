"""Which forwards ``format="auto"`` takes to be PanelELL's without looking at a panel.

On Hopper, with every product on Mosaic GPU, PanelELL loses next to nothing where there is nothing to skip. On
two NVIDIA H200s, where 128 tokens activate 98 % of the neurons, 65,536 tokens at D 2048 and F 5632 took 6.33
and 6.38 ms and dense 6.27 and 6.42; at D 1024 and F 2816, of which they activate all but 10, 1.84 and 1.87. A
probe and a conditional take some 0.06 ms, and a conditional the memory of the dense layer.

In calls of few panels, whose products are Triton's, a conditional costs more than the wrong layer is likely
to. At 45 active neurons of 5,632 a token and D 2048, 1,024 tokens take 78 us where dense takes 163, and 46
more with a conditional. Where a panel activates 0.28 and 0.66 of the neurons, 2,048 tokens take 0.53 and 0.79
of dense's time, and 512 tokens 0.9 and 1.07. At a share of 0.98, on one NVIDIA H100, 1,024 tokens take as
long as dense and 4,096 tokens 1.08 times as long.
"""

from typing import Any

from pallas_kernels.options import Auto
from pallas_kernels.panel import config as configs
from pallas_kernels.panel.gathered import implementation


def is_unasked(x: Any, w_up: Any, layout: Auto, backend: str, *, gated: bool) -> bool:
    """Whether a forward of x (M, D) and weights like w_up (F, D), all of one call, is PanelELL unasked, the
    gate on a backend."""
    tokens = x.shape[0]
    if backend != "mosaic_gpu" or tokens < configs.LEAST_UNASKED_TOKENS:
        return False
    if configs.are_few(tokens, layout.tokens):
        return True
    in_blocks = layout.block_tokens is not None and layout.block_tokens < tokens
    config, up = configs.choose(x, w_up, layout.tokens), w_up if gated else None
    return implementation(config, backend, x, up, in_blocks=in_blocks, by_token=False) == "hopper"
