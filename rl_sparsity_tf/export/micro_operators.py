"""The operators that TensorFlow Lite for Microcontrollers has kernels for."""

from __future__ import annotations

from collections.abc import Iterable

from rl_sparsity_tf.errors import ExportError
from rl_sparsity_tf.tflite.flat_model import FlatModel

# Every builtin operator that the resolver of the tflite-micro package 0.dev20261023182759 finds,
# asked one by one; the methods that register them are those of TFLM's
# tensorflow/lite/micro/micro_mutable_op_resolver.h. Older sources have fewer.
TFLM_OPERATORS = frozenset(
    """
    ABS ADD ADD_N ARG_MAX ARG_MIN ASSIGN_VARIABLE AVERAGE_POOL_2D BATCH_MATMUL BATCH_TO_SPACE_ND
    BROADCAST_ARGS BROADCAST_TO CALL_ONCE CAST CEIL CONCATENATION CONV_2D COS CUMSUM
    DEPTHWISE_CONV_2D DEPTH_TO_SPACE DEQUANTIZE DIV DYNAMIC_UPDATE_SLICE ELU EMBEDDING_LOOKUP EQUAL
    EXP EXPAND_DIMS FILL FLOOR FLOOR_DIV FLOOR_MOD FULLY_CONNECTED GATHER GATHER_ND GREATER
    GREATER_EQUAL HARD_SWISH IF L2_NORMALIZATION L2_POOL_2D LEAKY_RELU LESS LESS_EQUAL LOG
    LOGICAL_AND LOGICAL_NOT LOGICAL_OR LOGISTIC LOG_SOFTMAX MAXIMUM MAX_POOL_2D MEAN MINIMUM
    MIRROR_PAD MUL NEG NOT_EQUAL PACK PAD PADV2 PRELU QUANTIZE READ_VARIABLE REDUCE_ALL REDUCE_MAX
    REDUCE_MIN RELU RELU6 RESHAPE RESIZE_BILINEAR RESIZE_NEAREST_NEIGHBOR REVERSE_V2 ROUND RSQRT
    SELECT_V2 SHAPE SIN SLICE SOFTMAX SPACE_TO_BATCH_ND SPACE_TO_DEPTH SPLIT SPLIT_V SQRT SQUARE
    SQUARED_DIFFERENCE SQUEEZE STRIDED_SLICE SUB SUM SVDF TANH TRANSPOSE TRANSPOSE_CONV
    UNIDIRECTIONAL_SEQUENCE_LSTM UNPACK VAR_HANDLE WHILE ZEROS_LIKE
    """.split()
)

# Words of an operator's name that its method does not write with one capital.
_WORDS = {"2D": "2D", "CUMSUM": "CumSum", "LSTM": "LSTM", "MATMUL": "MatMul", "PADV2": "PadV2"}
_REMEDIES = {
    "CONV_3D": "use Conv2D on slices of the volume",
    "GELU": "use relu, or another activation",
    "POW": "multiply the tensor with itself",
    "RELU_N1_TO_1": "use relu or relu6",
    "TILE": "use UpSampling or Concatenate",
}


def registering_method(operator: str) -> str:
    """The method of `MicroMutableOpResolver` that registers an operator.

    Example:
        >>> registering_method("DEPTHWISE_CONV_2D")
        'AddDepthwiseConv2D'
    """
    return "Add" + "".join(_WORDS.get(word, word.capitalize()) for word in operator.split("_"))


def check_operators(name: str, flat: FlatModel) -> tuple[str, ...]:
    """Names a file's operators, each once, in alphabetical order.

    Args:
        name: The model's name, for the error.
        flat: The file's content.

    Raises:
        ExportError: If TFLM has no kernel for one of them.
    """
    builtin = {operator.name for operator in flat.operators if operator.kind == "builtin"}
    others = {operator.name for operator in flat.operators if operator.kind != "builtin"}
    lacking = sorted((builtin - TFLM_OPERATORS) | others)
    if lacking:
        raise ExportError(
            f"Model {name!r} needs {_listed(lacking)}, for which TensorFlow Lite for "
            "Microcontrollers has no kernel. Replace the layers that use "
            f"{'it' if len(lacking) == 1 else 'them'}{_remedies(lacking)}."
        )
    return tuple(sorted(builtin))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def _remedies(lacking: Iterable[str]) -> str:
    known = [f"{name}: {_REMEDIES[name]}" for name in lacking if name in _REMEDIES]
    return f" ({'; '.join(known)})" if known else ""
