"""What the backward of a layer recomputes."""

from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.options import RESIDUAL_NAMES
from sparse_lm.config import RematPolicy


def rematerialised(
    run_layer: Callable, policy: RematPolicy, *, one_program: bool, read_from_stack: bool = False
) -> Callable:
    """``run_layer``, with a backward that recomputes what ``policy`` does not keep.

    Args:
      run_layer: of arrays to arrays.
      policy: see `ModelConfig.remat`.
      one_program: whether forward and backward are one program, and not two loops. The compiler then has to
        be kept from merging what is computed again with what was computed before, which would keep it.
      read_from_stack: whether it reads its weights from a stack by ``jax.lax.dynamic_slice``. A scan would
        keep a copy of what it reads so, where it needs none of what it is given a layer at a time.
    """
    if policy == "none":
        if not read_from_stack:
            return run_layer
        return jax.checkpoint(run_layer, prevent_cse=one_program, policy=_all_but_slices)
    keep: Callable[..., Any] | None = None
    if policy == "dots":
        # Products of activations with weights only: attention scores grow with the square of the context.
        keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    elif policy == "sparse":
        keep = jax.checkpoint_policies.save_only_these_names(*RESIDUAL_NAMES)
    return jax.checkpoint(run_layer, prevent_cse=one_program, policy=keep)


def _all_but_slices(primitive: Any, *avals: Any, **parameters: Any) -> bool:
    return primitive not in (jax.lax.dynamic_slice_p, jax.lax.squeeze_p)
