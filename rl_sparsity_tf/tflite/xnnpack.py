"""What LiteRT and XNNPACK make of the constants of a .tflite file, and of its zeros.

Whether XNNPACK computes a convolution of a .tflite file with its sparse kernel, and if not, why.

On ARM, XNNPACK turns a cluster of float operators to channels-first order and skips zero weights in
its 1x1 convolutions. It does so only for a cluster that starts with a 3x3 convolution of stride 2
on 3 channels, ends in a global average pooling, holds nothing else that it cannot turn, and has
more than two thirds of zeros in its 1x1 convolutions. On x86 with AVX it never does. Seen in LiteRT
2.3 on emulated aarch64, with float32, float16 and int8 weights behind DENSIFY.

Says in plain words what LiteRT's kernels make of each constant of a .tflite file.

That a file stores few values does not make it fast: most kernels multiply zeros like any number.
What is said here was measured in LiteRT 2.3 with and without XNNPACK.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from rl_sparsity_tf.tflite.reading import FlatModel, FlatOperator, FlatTensor

# What may stand between the cluster's ends besides convolutions, on tensors of rank 4.
_ELEMENTWISE = {
    *("ABS", "CEIL", "ELU", "FLOOR", "GELU", "HARD_SWISH", "LEAKY_RELU", "LOGISTIC", "NEG"),
    *("RELU", "RELU6", "RELU_N1_TO_1", "ROUND", "SQUARE", "TANH"),
}
_COMBINING = {"ADD", "MUL"}
_PASSING = {"DENSIFY", "DEQUANTIZE"}
_SAME = 0
START = (
    "the cluster does not start with a 3x3 convolution of stride 2 on 3 channels padded by 1 on "
    "every side (ZeroPadding2D(1), then padding='valid')"
)
END = "the cluster does not end in a global average pooling"
# What is unpacked to float32 when the file is loaded, so that zeros can be counted. Integers and
# half floats behind DENSIFY and DEQUANTIZE were seen to be skipped just as floats are.
_UNPACKED_TYPES = ("float32", "float16", "int8")
# Only a graph with one of these is looked at for clusters at all.
_ENDING = {"MEAN", "SUM", "DEPTH_TO_SPACE"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """A condition that a cluster does not meet.

    Attributes:
        operator: The operator that is in the way; None if one is missing.
        reason: What is wrong with it; empty if one is missing.
        side: What the cluster lacks as a whole.
    """

    operator: FlatOperator | None
    reason: str
    side: str

    def __str__(self) -> str:
        return f"{self.side}: {self.reason}" if self.reason else self.side


class SparseClusters:
    """Answers for one file which of its operators are part of a sparse cluster.

    Example:
        >>> clusters = SparseClusters(read_flat_model("model.tflite"))
        >>> clusters.obstacle(operator)
        'only 1x1 convolutions have a sparse kernel'
    """

    def __init__(self, model: FlatModel) -> None:
        self._operators = model.operators
        self._tensors = {(tensor.subgraph, tensor.index): tensor for tensor in model.tensors}
        self._producers: dict[tuple[int, int], FlatOperator] = {}
        self._consumers: dict[tuple[int, int], list[FlatOperator]] = {}
        for operator in model.operators:
            for index in operator.outputs:
                self._producers[operator.subgraph, index] = operator
            for index in operator.inputs:
                self._consumers.setdefault((operator.subgraph, index), []).append(operator)
        self._outputs = {
            (number, index) for number, graph in enumerate(model.graphs) for index in graph.outputs
        }

    def obstacle(self, operator: FlatOperator) -> str | None:
        """The first condition that fails for a 1x1 convolution to run sparse; None if all hold.

        The operator is the one that reads the weights, directly or behind DENSIFY.
        """
        if not self.pointwise(operator):
            return "only 1x1 convolutions have a sparse kernel"
        reason = self._unfit(operator)
        if reason:
            return reason
        if not self._densified(operator.subgraph):
            return "no tensor is stored sparse, which is what switches it on"
        cluster, failures = self.cluster(operator)
        if failures:
            return str(failures[0])
        zeros, elements = self.zeros(cluster)
        if 3 * zeros <= 2 * elements:
            return (
                f"the cluster's 1x1 convolutions have {zeros / max(elements, 1):.1%} zeros, more "
                "than two thirds are needed"
            )
        return None

    def pointwise(self, operator: FlatOperator) -> bool:
        """Whether an operator is a 1x1 convolution, the only kind with a sparse kernel."""
        return operator.name == "CONV_2D" and self._kernel(operator) == (1, 1)

    def weights(self, operator: FlatOperator) -> FlatTensor | None:
        """The constant that a convolution's weights are unpacked from, as it is stored."""
        return self._constant(operator, 1)

    def zeros(self, cluster: list[FlatOperator]) -> tuple[int, int]:
        """Zeros and elements of the weights of a cluster's 1x1 convolutions."""
        filters = [self.weights(member) for member in cluster if self.pointwise(member)]
        return (
            sum(tensor.zeros or 0 for tensor in filters if tensor is not None),
            sum(tensor.elements for tensor in filters if tensor is not None),
        )

    def broken(self) -> FlatOperator | None:
        """An operator whose chain XNNPACK would compute wrongly if the file had a DENSIFY.

        It turns the operators behind the start of a cluster to channels-first order up to one that
        has no such form, and does not turn back what that one reads: with more than two thirds of
        zeros, results are wrong on ARM (and on x86 without AVX), and nowhere else.

        The operator returned is the start of a chain that does not reach the end of a cluster; None
        if there is none.
        """
        pointwise = [operator for operator in self._operators if self.pointwise(operator)]
        whole: set[int] = set()
        for operator in pointwise:
            members, failures = self.cluster(operator)
            if not failures:
                whole |= {id(member) for member in members}
        outside = [operator for operator in pointwise if id(operator) not in whole]
        skipping = {
            operator.subgraph
            for operator in outside
            for zeros, elements in [self.zeros([operator])]
            if 3 * zeros > 2 * elements
        }
        ending = {operator.subgraph for operator in self._operators if operator.name in _ENDING}
        broken = (
            operator
            for operator in self._operators
            if operator.subgraph in skipping & ending
            and id(operator) not in whole
            and self._starts(operator)
        )
        return next(broken, None)

    def cluster(self, first: FlatOperator) -> tuple[list[FlatOperator], list[Failure]]:
        """The operators connected with a 1x1 convolution, and why they are no cluster.

        The operators are those that fit, up to the first on every way that does not. The zeros are
        not looked at.
        """
        reason = self._unfit(first)
        if reason:
            return [], [Failure(operator=first, reason=reason, side="")]
        found, waiting = [first], [first]
        failures: list[Failure] = []
        starts = ends = 0
        while waiting:
            operator = waiting.pop(0)
            around = []
            if self._starts(operator):
                starts += 1
            else:
                for index in self._moving_inputs(operator):
                    producer = self._before(operator, index)
                    if producer is None:
                        failures.append(Failure(operator=None, reason="", side=START))
                        continue
                    around.append((producer, START))
            if operator.name == "MEAN":
                ends += 1
            else:
                for index in operator.outputs:
                    readers = self._after(operator.subgraph, index)
                    if not readers or (operator.subgraph, index) in self._outputs:
                        failures.append(Failure(operator=None, reason="", side=END))
                        continue
                    around.extend((reader, END) for reader in readers)
            for neighbour, side in around:
                reason = self._unfit(neighbour)
                # A convolution that could start the cluster cannot stand inside it.
                if reason is None and self._starts(neighbour) and side is END:
                    reason = "a 3x3 convolution of stride 2 can only be its first operator"
                if reason:
                    failures.append(Failure(operator=neighbour, reason=reason, side=side))
                elif not any(neighbour is member for member in found):
                    found.append(neighbour)
                    waiting.append(neighbour)
        for count, side in ((starts, START), (ends, END)):
            if not count and not any(failure.side is side for failure in failures):
                failures.append(Failure(operator=None, reason="", side=side))
        return found, failures

    def _unfit(self, operator: FlatOperator) -> str | None:
        """Why an operator cannot be part of a cluster beyond its first operator."""
        name = operator.name
        if any(self._at(operator, index).dtype != "float32" for index in operator.outputs) or any(
            self._at(operator, index).dtype != "float32" for index in self._moving_inputs(operator)
        ):
            return f"{name} does not compute in float32"
        if name in ("CONV_2D", "DEPTHWISE_CONV_2D"):
            weights = self._constant(operator, 1)
            read = self._at(operator, operator.inputs[1])
            if weights is None or read.dtype != "float32" or weights.dtype not in _UNPACKED_TYPES:
                return f"the weights of {name} are not float32 when the file is loaded"
            return self._unfit_convolution(operator)
        if name == "MEAN":
            axes = self._constant(operator, 1)
            pooled = axes is not None and axes.raw is not None
            if pooled and sorted(np.asarray(axes.raw).reshape(-1) % 4) == [1, 2]:  # type: ignore[union-attr]
                return None
            return "MEAN is not over height and width"
        if name in _ELEMENTWISE or name in _COMBINING or name == "RESIZE_BILINEAR":
            count = 2 if name in _COMBINING else 1
            ranks = [len(self._at(operator, index).shape) for index in operator.inputs[:count]]
            return None if ranks == [4] * count else f"{name} works on tensors of rank {ranks}"
        return f"{name} has no channels-first form"

    def _unfit_convolution(self, operator: FlatOperator) -> str | None:
        name, options = operator.name, operator.options
        kernel, padding = self._kernel(operator), self._padding(operator)
        stride = (options.get("strideH"), options.get("strideW"))
        dilation = (options.get("dilationHFactor", 1), options.get("dilationWFactor", 1))
        shown = f"{name} {kernel[0]}x{kernel[1]}"
        if dilation != (1, 1):
            return f"{shown} is dilated"
        if name == "CONV_2D":
            weights = self._constant(operator, 1)
            if weights is not None and weights.shape[-1] != self._channels(operator):
                return f"{shown} is grouped"
            if kernel == (1, 1) and stride == (1, 1):
                return None if padding == (0, 0, 0, 0) else f"{shown} is padded"
            if kernel == (1, 1):
                return f"{shown} has stride {stride[0]}x{stride[1]}"
            if kernel != (3, 3):
                return f"{shown} has no channels-first form"
            if stride != (2, 2):
                return f"{shown} has stride {stride[0]}x{stride[1]}, not 2x2"
            if padding != (1, 1, 1, 1):
                return f"{shown} is not padded by 1 on every side"
            if self._channels(operator) != 3:
                return f"{shown} reads {self._channels(operator)} channels, not 3"
            return None
        if options.get("depthMultiplier", 1) > 1:
            return f"{shown} has a depth multiplier of {options['depthMultiplier']}"
        if kernel not in ((3, 3), (5, 5)):
            return f"{shown} has no channels-first form"
        if stride not in ((1, 1), (2, 2)):
            return f"{shown} has stride {stride[0]}x{stride[1]}"
        if padding != (kernel[0] // 2,) * 4:
            return f"{shown} is not padded by {kernel[0] // 2} on every side"
        return None

    def _starts(self, operator: FlatOperator) -> bool:
        fits = operator.name == "CONV_2D" and self._kernel(operator) == (3, 3)
        return fits and self._unfit(operator) is None

    def _padding(self, operator: FlatOperator) -> tuple[int, ...] | None:
        """Rows and columns of zeros on the four sides; None if it depends on the input's size."""
        pad = self._padding_before(operator)
        if pad is not None:
            values = np.asarray(self._constant(pad, 1).raw)  # type: ignore[union-attr]
            return tuple(int(value) for value in values[1:3].reshape(-1))
        if operator.options.get("padding") != _SAME:
            return (0, 0, 0, 0)
        kernel = self._kernel(operator)
        stride = (operator.options.get("strideH"), operator.options.get("strideW"))
        if kernel == (1, 1):
            return (0, 0, 0, 0)
        if stride != (1, 1) or not kernel[0] % 2 or not kernel[1] % 2:
            return None
        return (kernel[0] // 2, kernel[0] // 2, kernel[1] // 2, kernel[1] // 2)

    def _padding_before(self, operator: FlatOperator) -> FlatOperator | None:
        """The PAD operator that XNNPACK makes part of an unpadded convolution."""
        if operator.options.get("padding") == _SAME:
            return None
        key = (operator.subgraph, operator.inputs[0])
        pad = self._producers.get(key)
        if pad is None or pad.name != "PAD" or len(self._consumers[key]) > 1:
            return None
        sizes = self._constant(pad, 1)
        if sizes is None or sizes.raw is None or sizes.shape != (4, 2):
            return None
        return None if sizes.raw[0].any() or sizes.raw[3].any() else pad

    def _before(self, operator: FlatOperator, index: int) -> FlatOperator | None:
        """The operator that an input comes from, over a padding that is part of the reader."""
        convolution = operator.name in ("CONV_2D", "DEPTHWISE_CONV_2D")
        pad = self._padding_before(operator) if convolution else None
        return self._producers.get((operator.subgraph, index if pad is None else pad.inputs[0]))

    def _after(self, subgraph: int, index: int) -> list[FlatOperator]:
        """The operators that read an output, over paddings that are part of their readers."""
        readers = []
        for reader in self._consumers.get((subgraph, index), []):
            behind: list[FlatOperator] = []
            if reader.name == "PAD":
                behind = self._consumers.get((subgraph, reader.outputs[0]), [])
            one = len(behind) == 1 and behind[0].name in ("CONV_2D", "DEPTHWISE_CONV_2D")
            readers.append(behind[0] if one and self._padding_before(behind[0]) else reader)
        return readers

    def _moving_inputs(self, operator: FlatOperator) -> list[int]:
        return [
            index
            for number, index in enumerate(operator.inputs)
            if index >= 0 and self._constant(operator, number) is None
        ]

    def _constant(self, operator: FlatOperator, position: int) -> FlatTensor | None:
        """The constant an operator reads at an input, through DENSIFY and DEQUANTIZE."""
        if position >= len(operator.inputs):
            return None
        key = (operator.subgraph, operator.inputs[position])
        while True:
            tensor, producer = self._tensors.get(key), self._producers.get(key)
            if tensor is None or tensor.constant:
                return tensor
            if producer is None or producer.name not in _PASSING:
                return None
            key = (producer.subgraph, producer.inputs[0])

    def _densified(self, subgraph: int) -> bool:
        return any(
            operator.name == "DENSIFY" and operator.subgraph == subgraph
            for operator in self._producers.values()
        )

    def _at(self, operator: FlatOperator, index: int) -> FlatTensor:
        return self._tensors[operator.subgraph, index]

    def _channels(self, operator: FlatOperator) -> int:
        return self._at(operator, operator.inputs[0]).shape[-1]

    def _kernel(self, operator: FlatOperator) -> tuple[int, int]:
        weights = self._at(operator, operator.inputs[1])
        return (weights.shape[1], weights.shape[2])


# Operators that multiply activations with weights -> position of the activations.
_MULTIPLYING = {
    **dict.fromkeys(("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D", "CONV_3D"), 0),
    **dict.fromkeys(("TRANSPOSE_CONV", "CONV_3D_TRANSPOSE"), 2),
    **dict.fromkeys(("LSTM", "UNIDIRECTIONAL_SEQUENCE_LSTM", "BIDIRECTIONAL_SEQUENCE_LSTM"), 0),
    **dict.fromkeys(("RNN", "UNIDIRECTIONAL_SEQUENCE_RNN", "BIDIRECTIONAL_SEQUENCE_RNN"), 0),
    "SVDF": 0,
}
_LOOKING_UP = {"GATHER", "GATHER_ND", "EMBEDDING_LOOKUP", "EMBEDDING_LOOKUP_SPARSE"}
_UNPACKING = {"DENSIFY", "DEQUANTIZE"}
_FLOATS = {"float32", "float16", "float64"}
_NATIVE = {"block 1x4": ("float32",), "block 1x16": ("int8",), "CSR": ("float32",)}
# XNNPACK computes them with constant kernels only, and restores int8 and float16 ones, but no int4.
_CONSTANT_KERNELS = {"CONV_2D", "DEPTHWISE_CONV_2D"}
_UNPACKED = "DENSIFY: unpacked at load, no faster"
_LIKE_ANY = "zeros are multiplied like any number"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Use:
    """An operator that computes with a constant, and what stands between the two."""

    operator: FlatOperator
    through: tuple[str, ...]


class KernelUse:
    """Answers for one file who reads a constant and what the kernels gain from it.

    Example:
        >>> kernel_use = KernelUse(read_flat_model("model.tflite"))
        >>> kernel_use.sentence(tensor)
        'dense: zeros are multiplied like any number'
    """

    def __init__(self, model: FlatModel) -> None:
        self._model = model
        self._tensors = {(tensor.subgraph, tensor.index): tensor for tensor in model.tensors}
        self._clusters = SparseClusters(model)
        self._readers: dict[tuple[int, int], list[FlatOperator]] = {}
        for operator in model.operators:
            for index in dict.fromkeys(operator.inputs):
                self._readers.setdefault((operator.subgraph, index), []).append(operator)

    def operators(self, tensor: FlatTensor) -> tuple[str, ...]:
        """Names of the operators on the way from a constant to the computation, each once.

        Example:
            >>> kernel_use.operators(tensor)
            ('DENSIFY', 'CONV_2D')
        """
        names: dict[str, None] = {}
        for use in self._uses(tensor):
            names |= dict.fromkeys((*use.through, use.operator.name))
        return tuple(names)

    def sentence(self, tensor: FlatTensor) -> str:
        """What the kernels that read a constant gain from its zeros and its type."""
        try:
            said = dict.fromkeys(self._say(tensor, use) for use in self._uses(tensor))
        except LookupError:
            return "unknown: an operator around it has not the inputs it should have"
        if said:
            return "; ".join(said)
        graphs = self._model.graphs
        outputs = graphs[tensor.subgraph].outputs if tensor.subgraph < len(graphs) else ()
        return "returned as an output" if tensor.index in outputs else "read by no operator"

    def _uses(self, tensor: FlatTensor) -> list[_Use]:
        uses: list[_Use] = []
        waiting: list[tuple[int, tuple[str, ...]]] = [(tensor.index, ())]
        seen = {tensor.index}
        while waiting:
            index, through = waiting.pop(0)
            for operator in self._readers.get((tensor.subgraph, index), []):
                if operator.name not in _UNPACKING:
                    uses.append(_Use(operator=operator, through=through))
                    continue
                for output in operator.outputs:
                    if output not in seen:
                        seen.add(output)
                        waiting.append((output, (*through, operator.name)))
        return uses

    def _say(self, tensor: FlatTensor, use: _Use) -> str:
        name = use.operator.name
        if tensor.format == "external":
            return "stored in another file"
        if tensor.sparse and "DENSIFY" not in use.through:
            return self._say_native(tensor, use)
        if name in _LOOKING_UP:
            return _after_unpacking(tensor, f"{name} looks rows up, nothing is multiplied")
        if name not in _MULTIPLYING and name != "BATCH_MATMUL":
            return _after_unpacking(tensor, f"{name} reads it as it is, zeros save nothing")
        if "DEQUANTIZE" in use.through:
            kernel = f"{tensor.dtype} weights dequantized before a float kernel"
        elif tensor.dtype in _FLOATS:
            kernel = "dense"
        elif self._activations(use.operator, tensor) in _FLOATS:
            kernel = "hybrid kernel (activations quantized on the fly)"
        else:
            kernel = "integer kernel"
        if tensor.dtype == "int4" and name in _CONSTANT_KERNELS:
            kernel += " slower than XNNPACK's"
        if name == "FULLY_CONNECTED" and tensor.sparse and kernel.startswith(("hybrid", "integer")):
            return f"{_UNPACKED}; {kernel}; XNNPACK refuses the file"
        said = _after_unpacking(tensor, f"{kernel}: {_LIKE_ANY}")
        pointwise = name == "CONV_2D" and tensor.shape[1:3] == (1, 1)
        restored = tensor.dtype in ("float16", "int8") and "DEQUANTIZE" in use.through
        if not (tensor.dtype == "float32" and pointwise) and not (
            tensor.sparse and (tensor.dtype == "float32" or restored)
        ):
            return said
        obstacle = self._clusters.obstacle(use.operator)
        if obstacle is None:
            return "XNNPACK sparse cluster: yes, zeros are skipped on ARM; elsewhere no faster"
        said = _UNPACKED if tensor.sparse else said
        broken = self._clusters.broken() if tensor.sparse else None
        if broken is not None:
            said += f", computed wrongly on ARM, where XNNPACK breaks the chain at {broken.name}"
        return f"{said}. XNNPACK sparse cluster: no, because {obstacle}"

    def _say_native(self, tensor: FlatTensor, use: _Use) -> str:
        """What happens to a sparse tensor that no DENSIFY unpacks."""
        name, layout = use.operator.name, tensor.format
        if name != "FULLY_CONNECTED" or use.through or tensor.dtype not in _NATIVE.get(layout, ()):
            behind = " behind ".join([name, *reversed(use.through)])
            return f"no kernel of {behind} reads {tensor.dtype} {layout}: wrong or refused"
        if layout == "CSR":
            return "native CSR kernel without XNNPACK; wrong with XNNPACK, which takes it for dense"
        block = int(layout.rpartition("x")[2])
        said = f"native block kernel ({layout.removeprefix('block ')}): zero blocks are skipped"
        if tensor.dtype == "int8" and self._activations(use.operator, tensor) in _FLOATS:
            said += " without XNNPACK; wrong with XNNPACK, which takes it for dense"
        if tensor.shape[-1] % block:
            said += (
                f"; wrong: the last {tensor.shape[-1] % block} of {tensor.shape[-1]} inputs, no "
                f"multiple of {block}, are dropped"
            )
        return said

    def _activations(self, operator: FlatOperator, weights: FlatTensor) -> str:
        """The type of what the weights are multiplied with."""
        if operator.name == "BATCH_MATMUL":
            others = [index for index in operator.inputs if index != weights.index]
            position = others[0] if others else weights.index
        else:
            position = operator.inputs[_MULTIPLYING[operator.name]]
        return self._tensors[operator.subgraph, position].dtype


def _after_unpacking(tensor: FlatTensor, said: str) -> str:
    return f"{_UNPACKED}; {said}" if tensor.sparse else said
