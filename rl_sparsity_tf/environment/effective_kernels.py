"""Present effective kernels of a wrapped network, each computed once until it changes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from rl_sparsity_tf.layers.kernels import Kernel


class EffectiveKernels:
    """Traced once per kernel.

    Args:
        kernels: Wrapped kernels.
    """

    def __init__(self, kernels: Sequence[Kernel]):
        self._kernels = {kernel.path: kernel for kernel in kernels}
        self._traced: dict[str, Any] = {
            kernel.path: tf.function(
                functools.partial(kernel.wrapper.effective_kernel, kernel.spec.attribute)
            )
            for kernel in kernels
            if kernel.wrapper is not None
        }
        self._known: dict[str, np.ndarray] = {}

    @property
    def functions(self) -> list[Any]:
        """The traced functions."""
        return list(self._traced.values())

    def matrix(self, path: str) -> np.ndarray:
        """A kernel's effective weights, viewed as `(inputs, outputs)`."""
        if path not in self._known:
            value = self._traced[path]().numpy()
            self._known[path] = self._kernels[path].spec.to_matrix_numpy(value)
        return self._known[path]

    def forget(self, path: str | None = None) -> None:
        """To be called when a kernel, or by default any of them, has changed."""
        if path is None:
            self._known.clear()
        else:
            self._known.pop(path, None)
