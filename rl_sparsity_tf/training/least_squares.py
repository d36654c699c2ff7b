"""Recovery in closed form: layer by layer, every kernel is fitted to the dense layer's outputs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.data.batches import TrainingData, inputs_of
from rl_sparsity_tf.data.checks import Batch
from rl_sparsity_tf.errors import DataError
from rl_sparsity_tf.files import sha256_of
from rl_sparsity_tf.layers.groups import Grouping
from rl_sparsity_tf.layers.kernels import Kernel
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.layers.structure import all_layers
from rl_sparsity_tf.layers.wrapper import CompressionWrapper
from rl_sparsity_tf.training.incremental_pass import IncrementalPass
from rl_sparsity_tf.training.layer_problem import LayerProblem, Moments, row_source

RIDGE = 1e-3
_MOST_ROWS = 16384
_LEAST_ROWS = 2048
_MOST_INPUTS, _LEAST_INPUTS = 2048, 512


class LeastSquares:
    """Fits the kernels of a wrapped network, in the order in which they compute.

    Each kernel is fed with the activations of the network compressed so far and fitted to give
    back the outputs of the dense layer, bias included; batch-norm layers re-estimate their
    statistics on the way. A layer that is called several times is fitted once, before its first
    call, to all of them: of the later calls, which depend on the fit, the dense network's inputs
    are taken. Kernels of other layers than dense, convolutional and depthwise ones
    keep their trained weights; so do frozen layers, whatever they are. Constraints on kernels and
    biases are applied to what was fitted.

    What is the same as in the last pass (activations before the first changed layer, Gram matrices
    of layers whose inputs stay) is not computed again.

    The model has its trained weights, its noise layers are switched off, and the inputs are all
    training rows in one batch. The seed says which rows of a layer are drawn. A layer whose inputs
    or outputs are not finite raises a DataError.
    """

    def __init__(
        self,
        model: keras.Model,
        kernels: list[Kernel],
        groupings: Mapping[str, Grouping],
        inputs: Any,
        *,
        ridge: float = RIDGE,
        seed: int = 0,
    ):
        self._pass = IncrementalPass(model, inputs)
        self._kernels = {kernel.path: kernel for kernel in kernels}
        fixed = {id(weight) for weight in model.non_trainable_weights}
        self.problems: dict[str, LayerProblem] = {}
        self._moments: dict[str, tuple[str, Moments]] = {}
        self._fitted_to: dict[str, Moments] = {}
        self._dense_keys: dict[str, str] = {}
        self._paths: dict[int, list[str]] = {}
        sources = {}
        for number, kernel in enumerate(kernels):
            self._paths.setdefault(id(kernel.wrapper), []).append(kernel.path)
            limit = int(np.clip(4 * groupings[kernel.path].inputs, _LEAST_ROWS, _MOST_ROWS))
            sources[kernel.path] = row_source(
                kernel.layer, kernel.spec, limit=limit, seed=seed + number
            )
        self._norms = [
            (layer, layer.get_weights())
            for layer in all_layers(model)
            if isinstance(layer, keras.layers.BatchNormalization)
        ]

        faults: list[DataError] = []

        def prepare(wrapper: CompressionWrapper, given: Any, key: str, first: bool) -> None:
            for path in self._paths.get(id(wrapper), []):
                source = sources[path]
                if source is None or not isinstance(given, tf.Tensor):
                    continue
                kernel = self._kernels[path]
                try:
                    if not first:
                        if path in self.problems:
                            self.problems[path].add_call(_array(given))
                        continue
                    self.problems[path] = LayerProblem(
                        kernel,
                        groupings[path],
                        source,
                        _array(given),
                        ridge=ridge,
                        fixed=id(kernel.variable) in fixed,
                        fixed_bias=id(getattr(kernel.layer, "bias", None)) in fixed,
                    )
                except DataError as error:  # Keras would put lines of its own before it
                    faults.append(error)
                self._dense_keys[path] = key

        self._all_kept = {id(wrapper): "" for wrapper in self._pass.wrappers}
        self._pass.run(self._all_kept, prepare)
        if faults:
            raise faults[0]
        self.fitted = False

    def error(self, path: str, matrix: np.ndarray) -> float:
        """How far a layer's outputs move if its kernel becomes another; 0 for those not fitted."""
        problem = self.problems.get(path)
        return 0.0 if problem is None else problem.error(matrix)

    def recover(self, operations: Mapping[str, np.ndarray], bits: Mapping[str, int]) -> None:
        """Fits all kernels to their operations, which the wrappers must have been given.

        Operations and bits are by kernel path; bits are the grid of a kernel's quantized groups.
        """
        digests = dict(self._all_kept)
        for identity, paths in self._paths.items():
            parts = []
            for path in paths:
                if (operations[path] != Operation.KEEP).any():
                    parts.append(sha256_of(operations[path].tobytes(), bytes([bits[path]])))
                else:
                    parts.append("")
            digests[identity] = "".join(parts)
        self.fitted = True
        self._pass.run(digests, functools.partial(self._fit, operations, bits))

    def _fit(
        self,
        operations: Mapping[str, np.ndarray],
        bits: Mapping[str, int],
        wrapper: CompressionWrapper,
        given: Any,
        key: str,
        first: bool,
    ) -> None:
        for path in self._paths.get(id(wrapper), []) if first else []:
            problem = self.problems.get(path)
            if problem is None:
                continue
            same_inputs = key == self._dense_keys[path]
            if same_inputs and not (operations[path] != Operation.KEEP).any():
                problem.restore()
                continue
            if same_inputs:
                moments = problem.dense
            elif self._moments.get(path, ("",))[0] == key:
                moments = self._moments[path][1]
            else:
                try:
                    moments = problem.moments(problem.take(_array(given)))
                except DataError:  # of this plan: its loss is no number either, and it loses
                    problem.restore()
                    continue
                self._moments[path] = (key, moments)
            self._fitted_to[path] = moments
            problem.fit(operations[path], bits[path], moments)

    def input_energy(self, path: str) -> np.ndarray | None:
        """Mean square of what every weight is multiplied with, as of the last fit.

        The shape is `(inputs, outputs)` or `(inputs, 1)`; None for kernels that are not fitted.
        """
        problem = self.problems.get(path)
        if problem is None or problem.fixed:
            return None
        return problem.energy_of(self._fitted_to.get(path, problem.dense))

    def reset(self) -> None:
        """Puts the trained weights and statistics back, if they were changed."""
        if not self.fitted:
            return
        self.fitted = False
        for problem in self.problems.values():
            problem.restore()
        for layer, weights in self._norms:
            layer.set_weights(weights)
        self._pass.forget_weights()


def _array(tensor: tf.Tensor) -> np.ndarray:
    return np.asarray(tf.cast(tensor, tf.float32))


def closed_form(
    model: keras.Model,
    kernels: list[Kernel],
    groupings: Mapping[str, Grouping],
    train: TrainingData,
    fixed: int | None = None,
    *,
    ridge: float = RIDGE,
) -> LeastSquares:
    """The fits on the first batches of the training data.

    Dense layers see one row of each example, so that those with many inputs need more examples.
    A model that fixes the rows per call gets one batch.
    """
    dense = [kernel.shape[0] for kernel in kernels if isinstance(kernel.layer, keras.layers.Dense)]
    rows = int(np.clip(4 * max(dense, default=0), _LEAST_INPUTS, _MOST_INPUTS))
    batches: list[Batch] = []
    held = 0
    for batch in train.pool:
        if held < rows and (not batches or fixed is None):
            batches.append(batch)
            held += len(tf.nest.flatten(batch[0])[0])
    return LeastSquares(model, kernels, groupings, inputs_of(batches), ridge=ridge)
