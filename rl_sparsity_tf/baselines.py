"""Plans of known heuristics: what to compare a search with, or to use in its place.

Every function here turns a trained model into a complete plan. All but [random_search][],
[hill_climbing][] and [dynamic_programming][] with `rerank` do so without evaluating one:

    >>> plan = rls.baselines.lamp(model, sparsity=0.8)
    >>> wrapped = rls.wrap(model, plan)
    >>> history = wrapped.fit(x, y, epochs=4, verbose=0)
    >>> small = rls.strip(wrapped)

They all take the same arguments ([n_m][] takes no target, sparsity or group, which its pattern
sets):

- **model**: a built model of Keras 3 or `tf_keras`. It is not changed.
- **data**: training data as `fit` takes it. [first_order][], [dynamic_programming][] and the two
  searches read it; the others accept it so that one can be put in another's place.
- **target**: an `rls.Target`; or **sparsity**, short for `Target(sparsity=...)`. A sparsity counts
  all weights of rank >= 2, those of skipped layers included, and the smallest number of groups that
  reaches it is pruned. Of a target in bytes the least sparse plan is taken whose file fits by the
  [SizeModel][rl_sparsity_tf.SizeModel], with the margins that the search leaves.
- **group**: the smallest unit that is pruned: `"element"`, `"block4"`, `"block16"`, `"channel"`.
- **quantize**: whether what lives is quantized, in kernels that TFLite can hold as integers. By
  default for targets in bytes, and not for a sparsity.
- **bits**: 8 or 4, the grid of what is quantized.
- **include**, **exclude**: names of layers, paths of layers or kernels, or patterns of them. What
  `exclude` matches is left as it is, and where `include` is given all that it does not match.
  Frozen layers (`layer.trainable = False`) are left as they are unless `include` matches them.

No kernel is ever emptied: the group of highest score lives, and what a kernel cannot give is taken
from the next lowest scores elsewhere. Ties go to the kernel, and the group, that comes first.

They raise `ArgumentError` for arguments that cannot be used, `ModelError` for models without
compressible kernels, with NaN, or wrapped already, `DataError` for data that does not fit, and
`TargetError` if the target cannot be reached.
"""

from __future__ import annotations

from rl_sparsity_tf.allocation.heuristics import (
    erk,
    first_order,
    global_magnitude,
    lamp,
    n_m,
    uniform,
)
from rl_sparsity_tf.allocation.tfmot import tfmot
from rl_sparsity_tf.search.plan_search import (
    dynamic_programming,
    hill_climbing,
    random_search,
)

__all__ = [
    "dynamic_programming",
    "erk",
    "first_order",
    "global_magnitude",
    "hill_climbing",
    "lamp",
    "n_m",
    "random_search",
    "tfmot",
    "uniform",
]
