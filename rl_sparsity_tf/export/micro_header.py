"""The C header that holds a model for TFLM, and the operators that TFLM has kernels for."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

from rl_sparsity_tf.errors import ArgumentError, ExportError
from rl_sparsity_tf.tflite.reading import FlatModel
from rl_sparsity_tf.version import __version__

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

    An ExportError, with the model's name, is raised if TFLM has no kernel for one of them.
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


_BYTES_PER_LINE = 16
_LINE = 92
# Names that C or C++ keep for themselves.
_KEYWORDS = frozenset(
    """
    alignas alignof and and_eq asm auto bitand bitor bool break case catch char class compl concept
    const constexpr const_cast continue decltype default delete do double dynamic_cast else enum
    explicit export extern false float for friend goto if inline int long main mutable namespace new
    noexcept not not_eq nullptr operator or or_eq private protected public register reinterpret_cast
    requires restrict return short signed sizeof static static_assert static_cast struct switch
    template this thread_local throw true try typedef typeid typename union unsigned using virtual
    void volatile wchar_t while xor xor_eq
    """.split()
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MicroPort:
    """An input or output as the runtime on the microcontroller numbers it.

    Attributes:
        index: Its number in the runtime, as in `interpreter.input(index)`.
        keras_index: Its number in the Keras model.
        shape: Its shape, the batch of 1 included.
        dtype: Its type, mostly "int8".
        scale: real value = (stored value - zero_point) * scale; None if it is not quantized.
    """

    index: int
    keras_index: int
    shape: tuple[int, ...]
    dtype: str
    scale: float | None
    zero_point: int | None


def check_name(name: object) -> str:
    """Returns the name if C and C++ can use it for the array; else an ArgumentError is raised."""
    if (
        not isinstance(name, str)
        or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name)
        or "__" in name
        or name in _KEYWORDS
    ):
        raise ArgumentError(
            f"name={name!r} cannot name an array in C and C++. Expected letters, digits and single "
            "underscores, a letter first, and no word of the language: name='gesture_model'."
        )
    return name


def header_text(
    name: str,
    content: bytes,
    *,
    model: str,
    arena_bytes: int,
    arena_basis: str,
    operators: Sequence[str],
    inputs: Sequence[MicroPort],
    outputs: Sequence[MicroPort],
    notes: Sequence[str] = (),
) -> str:
    """Writes a model as a header for C and C++.

    `name` is the prefix of everything the header defines, `model` the model's own name, for the
    comment, and `content` the .tflite file. `arena_basis` says where the number of the arena's
    bytes comes from. Operators have TFLite's names, each once; inputs and outputs are in the
    runtime's order. The notes are what else the reader has to know.
    """
    upper = name.upper()
    lines = [
        *_comment(
            [
                f"{model}: an int8 model of {len(content):,} bytes for TensorFlow Lite for "
                f"Microcontrollers, made by rl_sparsity_tf {__version__}.",
                f"Arena: {arena_basis}",
                *(f"Note: {note}" for note in notes),
            ]
        ),
        f"#ifndef {upper}_H_",
        f"#define {upper}_H_",
        "",
        "#if defined(__cplusplus)",
        f"#define {upper}_ALIGN alignas(16)",
        "#elif defined(__STDC_VERSION__) && __STDC_VERSION__ >= 201112L",
        f"#define {upper}_ALIGN _Alignas(16)",
        "#else",
        f"#define {upper}_ALIGN __attribute__((aligned(16)))",
        "#endif",
        "",
        "/* Bytes of the file and of the arena: uint8_t arena[...], aligned to 16. */",
        f"enum {{ {name}_len = {len(content)}, {name}_arena_bytes = {arena_bytes} }};",
        "",
        *_ports(name, "input", inputs),
        *_ports(name, "output", outputs),
        *_resolver(upper, operators),
        f"{upper}_ALIGN static const unsigned char {name}[] = {{",
        *_array(content),
        "};",
        "",
        f"#endif /* {upper}_H_ */",
        "",
    ]
    return "\n".join(lines)


def _ports(name: str, kind: str, ports: Sequence[MicroPort]) -> list[str]:
    lines = ["/* real value = (stored value - zero_point) * scale */"] if kind == "input" else []
    for port in ports:
        prefix = f"{name}_{kind}" if len(ports) == 1 else f"{name}_{kind}_{port.index}"
        shape = "x".join(map(str, port.shape)) or "scalar"
        elements = 1
        for size in port.shape:
            elements *= size
        lines.append(
            f"/* interpreter.{kind}({port.index}): {port.dtype} {shape}, {kind} "
            f"{port.keras_index} of the Keras model */"
        )
        lines.append(f"enum {{ {prefix}_elements = {elements} }};")
        if port.scale is not None:
            lines.append(f"static const float {prefix}_scale = {_float(port.scale)};")
            lines.append(f"static const int {prefix}_zero_point = {port.zero_point};")
    return [*lines, ""]


def _resolver(upper: str, operators: Sequence[str]) -> list[str]:
    methods = [registering_method(operator) for operator in operators]
    calls = " && \\\n   ".join(f"(resolver).{method}() == kTfLiteOk" for method in methods)
    return [
        *_comment(
            [
                f"Operators: {', '.join(operators)}",
                "In the C++ file that runs the model:",
                f"  tflite::MicroMutableOpResolver<{upper}_OPERATORS> resolver;",
                f"  if (!{upper}_ADD_OPERATORS(resolver)) return kTfLiteError;",
            ]
        ),
        f"#define {upper}_OPERATORS {len(operators)}",
        f"#define {upper}_ADD_OPERATORS(resolver) \\",
        f"  ({calls})",
        "",
    ]


def _array(content: bytes) -> list[str]:
    return [
        "  " + "".join(f"{byte}," for byte in content[start : start + _BYTES_PER_LINE])
        for start in range(0, len(content), _BYTES_PER_LINE)
    ]


def _comment(paragraphs: Sequence[str]) -> list[str]:
    lines = []
    for paragraph in paragraphs:
        indent = " " * (len(paragraph) - len(paragraph.lstrip()))
        line = indent
        for word in _printable(paragraph).split():
            if len(line) + len(word) >= _LINE and line.strip():
                lines.append(line)
                line = indent + "  "
            line += word if not line.strip() else f" {word}"
        lines.append(line)
    return ["/*", *(f" * {line}".rstrip() for line in lines), " */"]


def _printable(text: str) -> str:
    """Names of layers are the user's: nothing in them may end a comment or a line."""
    text = re.sub(r"[^\x20-\x7e]", "_", text)
    return text.replace("*/", "* /").replace("/*", "/ *").replace("\\", "_").replace("??", "? ?")


def _float(value: float) -> str:
    text = f"{value:.9g}"
    return f"{text}f" if set(text) & {".", "e"} else f"{text}.0f"
