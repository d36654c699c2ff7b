"""What a model without some of its channels takes, by a table of its layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import tf_keras as keras

from rl_sparsity_tf.channels.costs import ChannelCounts
from rl_sparsity_tf.channels.latency_table import LatencyTable
from rl_sparsity_tf.channels.units import ChannelUnit
from rl_sparsity_tf.channels.widths import LayerWidths


def latency_of(
    table: LatencyTable, model: keras.Model, units: Sequence[ChannelUnit]
) -> Callable[[np.ndarray], np.ndarray]:
    """The predicted time as a function of what lives.

    Args:
        table: Times of the layers of the model.
        model: The plain model.
        units: What is decided together.

    Returns:
        `live -> milliseconds`: the shares of the units' channels that live, of shape
        `(..., units)`, to times of shape `(...)`.

    Raises:
        ArgumentError: If the table is of another model.
    """
    table.check(model)
    chains = LayerWidths(model).chains
    inputs = ChannelCounts.of([chain.channels_in for chain in chains], units)
    outputs = ChannelCounts.of([chain.channels_out for chain in chains], units)

    def milliseconds(live: np.ndarray) -> np.ndarray:
        # Shares are between whole channels, and every layer keeps one.
        counted = (np.maximum(np.rint(count(live)), 1) for count in (inputs, outputs))
        read, made = (widths.astype(np.int64) for widths in counted)
        total = np.full(live.shape[:-1], table.overhead_ms)
        for index, chain in enumerate(chains):
            total = total + table.layer_ms(chain.path, read[..., index], made[..., index])
        return total

    return milliseconds
