"""SparseLM (arXiv 2603.23198): Llama and Qwen2 with a ReLU, whatever ``hidden_act`` says.

Checkpoints may carry the training's counters, ``tracker.*`` and ``metrics_accumulator.*``: they are dropped.
"""

import dataclasses

from sparse_lm.convert.family import Family, Fields
from sparse_lm.convert.llama import LLAMA
from sparse_lm.convert.qwen2 import QWEN2


def _gated(fields: Fields) -> bool:
    return bool(fields.get("sparsity_gated_mlp", True))


def _of(base: Family) -> Family:
    return dataclasses.replace(
        base,
        model_type=f"{base.model_type}_sparse_relu",
        architecture=f"Sparse{base.architecture}",
        ignored=(*base.ignored, "tracker", "metrics_accumulator"),
        gated=_gated,
        # The first gives the layers another width than intermediate_size, the second stores down_proj
        # transposed.
        unsupported={
            **base.unsupported,
            "sparsity_new_intermediate_size": (None,),
            "sparsity_use_hybrid_kernel": (False,),
        },
    )


LLAMA_SPARSE_RELU = _of(LLAMA)
QWEN2_SPARSE_RELU = _of(QWEN2)
