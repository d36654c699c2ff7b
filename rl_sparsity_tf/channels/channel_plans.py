"""Plans of whole channels, turned into masks that keep what is pruned out of use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import tf_keras as keras

from rl_sparsity_tf.channels.graph import ChannelGraph
from rl_sparsity_tf.channels.groups import check_graph
from rl_sparsity_tf.channels.units import UnitOperations, find_units
from rl_sparsity_tf.layers.kernels import Kernel, find_kernels
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.layers.plan import CompressionPlan, KernelPlan
from rl_sparsity_tf.layers.rules import resolve


def tie_channels(model: keras.Model, plan: CompressionPlan) -> CompressionPlan:
    """The plan of single weights that a plan of channels means.

    A plan that prunes a channel masks the weights that make it. Biases and batch normalizations
    can still give it a value, and training will. Here the weights that read the channel are masked
    too, so that nothing depends on it any more, in fine-tuning either;
    [shrink][rl_sparsity_tf.shrink] removes it.

    Args:
        model: A built, plain `tf_keras` model with a graph.
        plan: A plan with groups of `"channel"`. Kernels that it leaves out are kept.

    Returns:
        A plan with groups of `"element"`, for `wrap`.

    Raises:
        ModelError: If the model is not built, is wrapped, or has no graph.
        PlanError: If the plan does not fit the model, prunes channels that have to stay, or prunes
            tied kernels differently.

    Example:
        >>> wrapped = rls.wrap(model, rls.tie_channels(model, plan))
        >>> wrapped.fit(x, y)
        >>> small = rls.shrink(rls.strip(wrapped))
    """
    check_graph(model, "tie_channels")
    kernels = find_kernels(model)
    operations = UnitOperations(find_units(ChannelGraph(model), kernels))
    decided = operations.of_units(resolve(plan, model))
    return masks(kernels, {k.path: operations.of(k.path, decided) for k in kernels})


def masks(kernels: Sequence[Kernel], operations: Mapping[str, np.ndarray]) -> CompressionPlan:
    """The plan of operations on single weights.

    Args:
        kernels: The kernels.
        operations: Their operations by path, shape `(inputs, outputs)`.
    """
    return CompressionPlan(
        KernelPlan(k.path, k.shape, k.spec.layout, "element", 8, operations[k.path])
        for k in kernels
    )


def only_pruned(operations: np.ndarray) -> np.ndarray:
    """The same operations with all that is not pruned kept."""
    pruned = operations == Operation.PRUNE
    return np.where(pruned, Operation.PRUNE, Operation.KEEP).astype(np.uint8)
