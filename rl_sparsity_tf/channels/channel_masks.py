"""Sets whole channels of a model to zero, so that they can be removed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tf_keras as keras

from rl_sparsity_tf.channels.groups import ChannelUse, check_plain, find_groups
from rl_sparsity_tf.errors import ArgumentError
from rl_sparsity_tf.layers.wrapping import strip


def mask_channels(model: keras.Model, live: Mapping[int, Any]) -> keras.Model:
    """Sets whole channels to zero: what makes them, and what would make them differ from zero.

    That is the columns of the kernels, biases, the gamma and beta of batch normalizations (the
    mean where there is no gamma), depthwise kernels and their biases.

    Args:
        model: A built, plain `tf_keras` model; it is not changed.
        live: Index of a group of [find_groups][rl_sparsity_tf.find_groups] -> one
            bool per channel, False for channels to set to zero. Other groups stay as they are.

    Returns:
        A copy, compiled as the model is, of which
        [shrink][rl_sparsity_tf.shrink] removes those channels.

    Raises:
        ArgumentError: If a group does not exist or is frozen, or a mask does not fit it.
        ModelError: If the model is not built, is wrapped, or cannot be copied.

    Example:
        >>> masked = mask_channels(model, {0: [True, False, True, True]})
    """
    check_plain(model, "mask_channels")
    copy = strip(model)
    groups = find_groups(copy)
    for index, given in live.items():
        if index not in range(len(groups)):
            raise ArgumentError(
                f"live names group {index!r}. Expected the index of one of the {len(groups)} "
                "groups that find_groups(model) lists."
            )
        group = groups[index]
        mask = np.asarray(given)
        if mask.dtype != bool or mask.shape != (group.size,):
            raise ArgumentError(
                f"The mask of group {index} has shape {mask.shape} and type {mask.dtype}. Expected "
                f"one bool for each of its {group.size} channels."
            )
        if group.frozen:
            raise ArgumentError(
                f"Group {index} is frozen: {group.frozen}. Leave it out; groups whose `frozen` is "
                "None can be masked."
            )
        if not mask.any():
            raise ArgumentError(
                f"The mask of group {index} leaves no channel. Expected at least one True."
            )
        paths = {use.path for use in group.followers}
        for use in (*group.producers, *group.followers):
            owner, _, attribute = use.path.rpartition("/")
            # A gamma of zero is enough, and fine-tuning may need the statistics.
            kept = attribute == "moving_mean" and f"{owner}/gamma" in paths
            if not kept and attribute not in ("alpha", "moving_variance"):
                _set_to_zero(use, mask)
    return copy


def _set_to_zero(use: ChannelUse, mask: np.ndarray) -> None:
    dead = (use.channels >= 0) & ~mask[use.channels]
    value = np.moveaxis(np.array(use.variable), use.axis, -1)
    value[..., dead] = 0
    use.variable.assign(np.moveaxis(value, -1, use.axis))
    if use.bias_variable is not None:
        bias = np.array(use.bias_variable)
        bias[dead] = 0
        use.bias_variable.assign(bias)
