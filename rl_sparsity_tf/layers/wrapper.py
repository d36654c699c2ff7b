"""The Keras wrapper that holds a layer's masks, grids and permutations while it is compressed."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.errors import ArgumentError, check_choice
from rl_sparsity_tf.layers import operations as ops
from rl_sparsity_tf.layers.groups import KINDS, Grouping
from rl_sparsity_tf.layers.kernel_spec import KernelSpec
from rl_sparsity_tf.layers.operations import (
    MASKS,
    Operation,
    constraint_of,
    hard_concrete_sample,
    holds_when_masked,
)
from rl_sparsity_tf.layers.registry import kernel_specs
from rl_sparsity_tf.layers.structure import follow, is_pruning_wrapper, owner_of


@dataclasses.dataclass(frozen=True)
class KernelSettings:
    """What a wrapper can do to one kernel.

    Attributes:
        prune: Whether the kernel has a mask.
        quantize: Whether groups can be put on the integer grid.
        shuffle: Whether neighbouring groups can swap.
        layout: The kernel's layout, kept so that a saved wrapper does not need the registry.
        per_output_scale: One scale per output unit, or one per tensor.
        gates: Tensors that lie side by side in the kernel and have a scale each.
    """

    group: str = "element"
    prune: bool = True
    quantize: bool = True
    shuffle: bool = True
    layout: str = "io"
    per_output_scale: bool = True
    gates: int = 1

    def __post_init__(self) -> None:
        check_choice("group", self.group, KINDS)

    @classmethod
    def of(cls, spec: KernelSpec, **choices: Any) -> KernelSettings:
        """Settings of a kernel that is viewed as the spec says."""
        return cls(
            layout=spec.layout,
            per_output_scale=spec.per_output_scale,
            gates=spec.gates,
            **choices,
        )


# Hard concrete gates start at log alpha = +-2.5 (open or closed nine times in ten). Adam moves a
# logit by about its learning rate per step whatever the gradient's scale, so log alpha is a
# multiple of the logit: at 1e-3 it can cross over within some hundred steps instead of thousands.
_HARD_CONCRETE_GAIN = 10.0
_HARD_CONCRETE_START = 0.25


@keras.saving.register_keras_serializable(package="rl_sparsity_tf")
class CompressionWrapper(keras.layers.Wrapper):
    """Applies `quantize(mask * permute(W))` to the kernels of the layer inside.

    Usually made by [wrap][rl_sparsity_tf.wrap]. The inner layer keeps its own variables;
    in the forward pass it sees the effective kernels in their place.

    Args:
        layer: A layer of a registered class, or one with such layers inside.
        group: Kind of groups, where `kernels` does not say otherwise.
        mask: `"straight_through"` or `"hard_concrete"`: the gradient of learnable masks.
        train_masks: Whether the masks learn (see
            [update_masks][rl_sparsity_tf.training.mask_training.update_masks]). If not, gradients
            of pruned weights are zero and the masks stay.
        kernels: Settings per kernel attribute (a path such as `"cell/kernel"` for the kernels of
            layers inside the layer), each a [KernelSettings][] or a dict of its fields; by default
            every kernel of the layer with all operations.
        **kwargs: Keras's own, such as `name`.

    Raises:
        ArgumentError: If `layer` is none, its class is not registered, or an argument is not known.

    Example:
        >>> layer = rls.CompressionWrapper(keras.layers.Dense(10), group="block4")
        >>> layer(np.ones((2, 8), "float32")).shape
        TensorShape([2, 10])
    """

    def __init__(
        self,
        layer: keras.layers.Layer,
        group: str = "element",
        mask: str = "straight_through",
        train_masks: bool = False,
        kernels: Mapping[str, KernelSettings | Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ):
        if not isinstance(layer, keras.layers.Layer):
            raise ArgumentError(
                f"CompressionWrapper received {layer!r}. Expected a layer, such as "
                "tf_keras.layers.Dense(10); rl_sparsity_tf.wrap(model) wraps those of a model."
            )
        kwargs.setdefault("name", layer.name)
        kwargs.setdefault("trainable", layer.trainable)
        # Masks and grids are float32 whatever the layer computes in; nor must inputs be cast before
        # the layer inside sees them.
        kwargs["dtype"], kwargs["autocast"] = "float32", False
        super().__init__(layer, **kwargs)
        self.supports_masking = layer.supports_masking
        self.group = check_choice("group", group, KINDS)
        self.mask = check_choice("mask", mask, MASKS)
        self.train_masks = bool(train_masks)
        self._settings: dict[str, KernelSettings] = {}
        if kernels is None:
            kernels = {
                spec.attribute: KernelSettings.of(spec, group=group) for spec in kernel_specs(layer)
            }
        if not kernels:
            raise ArgumentError(
                f"Layer {layer.name!r} of class {type(layer).__name__} has no compressible kernel. "
                "Register its class with rl_sparsity_tf.register_layer, naming its kernels."
            )
        for attribute, settings in kernels.items():
            if not isinstance(settings, KernelSettings):
                settings = KernelSettings(**settings)
            self._settings[attribute] = settings
        self._state: dict[str, dict[str, tf.Variable]] = {}
        self._probe: list[tf.Tensor] | None = None
        self._before_call: Callable[[Any], None] | None = None
        self._substitutes: Mapping[str, tf.Tensor] = {}
        self._only_shapes = False

    # ------------------------------------------------------------------ building

    def build(self, input_shape: Any = None) -> None:
        """Builds the layer inside and one set of state variables per kernel."""
        super().build(input_shape)
        # Attention, and custom layers with layers inside, make their weights when first called.
        if all(follow(self.layer, name) is not None for name in self._settings):
            self._build_states()

    def _build_states(self) -> None:
        for attribute, settings in self._settings.items():
            self._state[attribute] = self._build_state(attribute, settings)

    def _build_state(self, attribute: str, settings: KernelSettings) -> dict[str, tf.Variable]:
        grouping = self.grouping(attribute)
        variables: dict[str, tf.Variable] = {}

        def add(name: str, shape: tuple[int, ...], value: float, trainable: bool = False) -> None:
            variables[name] = self.add_weight(
                name=f"{attribute.replace('/', '_')}_{name}",
                shape=shape,
                dtype=tf.float32,
                initializer=keras.initializers.Constant(value),
                trainable=trainable,
                experimental_autocast=False,
            )

        if settings.prune:
            add("mask", grouping.shape, 1.0)
            if self.train_masks:
                start = _HARD_CONCRETE_START if self.mask == "hard_concrete" else 0.0
                add("mask_logits", grouping.shape, start, trainable=True)
                add("mask_frozen", (), 0.0)
        if settings.quantize:
            add("on_grid", grouping.shape, 0.0)
            # A variable and not a constant: see operations.grid_scale.
            add("levels", (), 127.0)
        if settings.shuffle and grouping.pairs:
            add("swaps", (grouping.pairs, grouping.outputs), 0.0)
        return variables

    # ------------------------------------------------------------------ views

    @property
    def kernels(self) -> dict[str, KernelSettings]:
        """Settings per kernel attribute."""
        return dict(self._settings)

    def spec(self, attribute: str) -> KernelSpec:
        """How a kernel is viewed as a matrix."""
        settings = self._settings[attribute]
        per_output, gates = settings.per_output_scale, settings.gates
        return KernelSpec(attribute, settings.layout, per_output, gates=gates)

    def variable(self, attribute: str) -> tf.Variable:
        """A kernel's variable, as the layer inside trains it."""
        owner, name = owner_of(self.layer, attribute)
        return getattr(owner, name)

    def grouping(self, attribute: str) -> Grouping:
        """How a kernel is cut into groups."""
        shape = self.variable(attribute).shape
        return self.spec(attribute).grouping(shape, self._settings[attribute].group)

    def state(self, attribute: str) -> dict[str, tf.Variable]:
        """State variables of a kernel: some of mask, mask_logits, on_grid, levels, swaps."""
        return self._state[attribute]

    # ------------------------------------------------------------------ the forward pass

    def effective_kernel(self, attribute: str, training: Any = False) -> tf.Tensor:
        """`quantize(mask * permute(W))` of one kernel, in the kernel's own shape."""
        if attribute in self._substitutes:
            return self._substitutes[attribute]
        settings, state = self._settings[attribute], self._state[attribute]
        variable = self.variable(attribute)
        if not state or self._only_shapes:
            return tf.convert_to_tensor(variable)
        spec, grouping = self.spec(attribute), self.grouping(attribute)
        matrix = spec.to_matrix(tf.convert_to_tensor(variable))
        if "swaps" in state and _may_hold_any(state["swaps"]):
            matrix = ops.permute(matrix, state["swaps"] > 0, grouping)
        if "mask_logits" in state:
            matrix = self._learned_mask(matrix, state, grouping, training)
        elif "mask" in state:
            matrix = ops.mask_weights(matrix, state["mask"], grouping)
        matrix = self._constrained(attribute, matrix)
        if "on_grid" in state and _may_hold_any(state["on_grid"]):
            matrix = ops.quantize(
                matrix,
                state["on_grid"] > 0,
                state["levels"],
                grouping,
                settings.per_output_scale,
                settings.gates,
            )
        return spec.from_matrix(matrix, variable.shape)

    def _constrained(self, attribute: str, matrix: tf.Tensor) -> tf.Tensor:
        """The matrix as the kernel's constraint wants it, where masks or swaps have broken it.

        The optimizer applies it to the dense weights, before masks and swaps.
        """
        variable, state = self.variable(attribute), self._state[attribute]
        constraint = constraint_of(variable)
        if constraint is None or holds_when_masked(constraint, moved="swaps" in state):
            return matrix
        broken = tf.constant(False)
        if "mask" in state:
            broken = tf.reduce_any(tf.equal(state["mask"], 0.0))
        if "swaps" in state:
            broken = tf.logical_or(broken, tf.reduce_any(state["swaps"] > 0))
        spec = self.spec(attribute)

        def constrain() -> tf.Tensor:
            kernel = constraint(spec.from_matrix(matrix, variable.shape))
            return spec.to_matrix(tf.cast(kernel, matrix.dtype))

        return tf.cond(broken, constrain, lambda: matrix)

    def _learned_mask(
        self, matrix: tf.Tensor, state: dict[str, tf.Variable], grouping: Grouping, training: Any
    ) -> tf.Tensor:
        mask, logits = tf.convert_to_tensor(state["mask"]), state["mask_logits"]
        if self.mask == "straight_through":
            return ops.mask_weights_straight_through(matrix, mask, logits, grouping)
        sampling = tf.logical_and(tf.cast(training, tf.bool), state["mask_frozen"] < 0.5)
        log_alpha = _HARD_CONCRETE_GAIN * tf.convert_to_tensor(logits)
        values = tf.cond(sampling, lambda: hard_concrete_sample(log_alpha), lambda: mask)
        return ops.mask_weights(matrix, values, grouping)

    @contextlib.contextmanager
    def _effective(self, training: Any) -> Iterator[None]:
        # The variables are swapped for tensors below Keras's attribute tracking, which would
        # otherwise forget them.
        owners = {attribute: owner_of(self.layer, attribute) for attribute in self._settings}
        variables = {attribute: vars(owner)[name] for attribute, (owner, name) in owners.items()}
        effective = {attribute: self.effective_kernel(attribute, training) for attribute in owners}
        try:
            for attribute, (owner, name) in owners.items():
                # Keras casts variables to a layer's compute type, but not tensors.
                wanted = getattr(owner, "compute_dtype", None) or effective[attribute].dtype
                vars(owner)[name] = tf.cast(effective[attribute], wanted)
            yield
        finally:
            for attribute, (owner, name) in owners.items():
                vars(owner)[name] = variables[attribute]

    def call(self, inputs: Any, *args: Any, training: Any = None, **kwargs: Any) -> Any:
        """Calls the layer inside with its effective kernels."""
        if training is None:
            training = keras.backend.learning_phase()
        if self.layer._expects_training_arg:
            kwargs["training"] = training
        if not self.layer._expects_mask_arg:
            kwargs.pop("mask", None)  # Keras hands it to any layer that takes **kwargs
        if not self._state:
            self.layer(inputs, *args, **kwargs)
            with tf.init_scope():
                self._build_states()
        if self._before_call is not None:
            self._before_call(inputs)
        with self._effective(training):
            outputs = self.layer(inputs, *args, **kwargs)
        if self._probe is not None:
            flat = tf.nest.flatten(outputs)
            self._probe += [output for output in flat if output.dtype.is_floating]
        return outputs

    def _infer_output_signature(self, *arguments: Any) -> Any:
        # Keras calls a layer in a graph that it throws away when a model is built or copied, to see
        # the shape and type of what it puts out: neither depends on masks, grids and swaps, which
        # make up most of the graph.
        self._only_shapes = True
        try:
            return super()._infer_output_signature(*arguments)
        finally:
            self._only_shapes = False

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The inner layer's output shape."""
        return self.layer.compute_output_shape(input_shape)

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        """The inner layer's (sequence) mask."""
        return self.layer.compute_mask(inputs, mask)

    @contextlib.contextmanager
    def probed(self) -> Iterator[list[tf.Tensor]]:
        """Collects the layer's outputs while the context is open, for statistics."""
        self._probe = []
        try:
            yield self._probe
        finally:
            self._probe = None

    @contextlib.contextmanager
    def observed(self, before_call: Callable[[Any], None]) -> Iterator[None]:
        """Hands the layer's inputs to a function before every call while the context is open.

        The function may change the kernels: the call that follows sees what it set.
        """
        self._before_call = before_call
        try:
            yield
        finally:
            self._before_call = None

    @contextlib.contextmanager
    def substituted(self, kernels: Mapping[str, tf.Tensor]) -> Iterator[None]:
        """Computes with other effective kernels while the context is open.

        Args:
            kernels: Tensors by attribute, in the kernels' own shapes; gradients reach them.
        """
        self._substitutes = kernels
        try:
            yield
        finally:
            self._substitutes = {}

    # ------------------------------------------------------------------ decisions

    def assign_operations(self, attribute: str, operations: np.ndarray, bits: int = 8) -> None:
        """Sets a kernel's operations, one per group.

        Args:
            attribute: Name of the kernel.
            operations: [Operation][rl_sparsity_tf.Operation] values, shape of the grouping.
            bits: 8 or 4, the grid of its quantized groups.

        Raises:
            ArgumentError: If the wrapper was made without a state that the operations need, or
                they prune from a block without keeping the pattern of the group.
        """
        operations = np.asarray(operations)
        state, grouping = self._state[attribute], self.grouping(attribute)
        live = operations != Operation.PRUNE
        grouping.check_pattern(live, whole=True)
        on_grid = ops.grid_groups(operations)
        swaps = ops.swaps_of(operations, grouping)
        needs = {"mask": ~live, "on_grid": on_grid, "swaps": swaps}
        for name, groups in needs.items():
            if name not in state and groups.any():
                raise ArgumentError(
                    f"The wrapper of {self.name!r} holds no {name!r} for {attribute!r}, which "
                    "these operations need. Wrap the model again with the plan."
                )
        if "mask" in state:
            state["mask"].assign(live.astype(np.float32))
        if "mask_logits" in state and self.mask == "hard_concrete":
            sign = np.where(live, 1.0, -1.0).astype(np.float32)
            state["mask_logits"].assign(_HARD_CONCRETE_START * sign)
        if "on_grid" in state:
            state["on_grid"].assign(on_grid.astype(np.float32))
            state["levels"].assign(7.0 if bits == 4 else 127.0)
        if "swaps" in state:
            state["swaps"].assign(swaps.astype(np.float32))

    def operations(self, attribute: str) -> np.ndarray:
        """Reads a kernel's operations back from the state, one per group, uint8."""
        state, grouping = self._state[attribute], self.grouping(attribute)
        result = np.full(grouping.shape, Operation.KEEP, np.uint8)
        if "on_grid" in state:
            result[state["on_grid"].numpy() > 0] = Operation.QUANTIZE
        live = np.ones(grouping.shape, bool)
        if "mask" in state:
            live = state["mask"].numpy() > 0
        if "swaps" in state:
            # Exactly one of a swapping pair asks: the first that lives and is not on the grid, as
            # far as there is one.
            pair, output = np.nonzero(state["swaps"].numpy() > 0)
            rank = 2 * live + (result != Operation.QUANTIZE)
            second = rank[2 * pair + 1, output] > rank[2 * pair, output]
            result[2 * pair + second, output] = Operation.SHUFFLE
        result[~live] = Operation.PRUNE
        return result

    def bits(self, attribute: str) -> int:
        """8 or 4, the grid of a kernel's quantized groups; 32 if none is quantized."""
        state = self._state[attribute]
        if "on_grid" not in state or not state["on_grid"].numpy().any():
            return 32
        return 4 if float(state["levels"]) == 7.0 else 8

    # ------------------------------------------------------------------ serialization

    def get_config(self) -> dict[str, Any]:
        """Every constructor argument."""
        kernels = {name: dataclasses.asdict(value) for name, value in self._settings.items()}
        return {
            **super().get_config(),
            "group": self.group,
            "mask": self.mask,
            "train_masks": self.train_masks,
            "kernels": kernels,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> CompressionWrapper:
        """Keras's own, for layers of registered custom classes, too.

        Keras takes the config of the layer inside for one of the old format, whose reader looks
        for classes without their package.
        """
        inner = config["layer"]
        if "module" not in inner:
            return super().from_config(config, custom_objects)
        # The wrapper builds its layer; the shape noted need not be that of the layer's input.
        unbuilt = {name: value for name, value in inner.items() if name != "build_config"}
        rest = {name: value for name, value in config.items() if name != "layer"}
        return cls(keras.layers.deserialize(unbuilt, custom_objects), **rest)


def unwrapped(layer: keras.layers.Layer) -> keras.layers.Layer:
    """The layer inside a compression wrapper, or TFMOT's for pruning; any other layer itself."""
    if isinstance(layer, CompressionWrapper) or is_pruning_wrapper(layer):
        return layer.layer
    return layer


def _may_hold_any(flags: tf.Variable) -> bool:
    """Whether any flag is set; True inside a trace, whose flags are set later."""
    return not tf.executing_eagerly() or bool(tf.reduce_any(flags > 0))
