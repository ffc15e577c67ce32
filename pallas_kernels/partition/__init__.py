"""The layer on arrays that several devices share: each computes its own tokens and neurons.

The formats see the arrays of one device. Here stands what is between them and the public call. Which mesh
axes split tokens, neurons or storage follows from the arguments' shardings (`split.Split`), and there are
two ways to know these:

- *Explicit* axes are part of an array's type, and `SparseFFN` knows its own: the split is known while the
call is
  traced, and the layer runs in a ``jax.shard_map`` (`known`).
- *Auto* axes are the compiler's: shardings are known when it partitions the program, and not before. There
the
  layer is an operation with ``custom_partitioning`` (`unknown`).

Inside a ``jax.shard_map`` or ``jax.pmap`` of the caller's, arrays are local already.
"""

from pallas_kernels.partition.call import ffn, ffn_on_mesh, is_shared
from pallas_kernels.partition.split import Split

__all__ = ["Split", "ffn", "ffn_on_mesh", "is_shared"]
