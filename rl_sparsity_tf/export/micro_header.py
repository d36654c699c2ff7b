"""The C header that holds a model for TensorFlow Lite for Microcontrollers."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from rl_sparsity_tf.errors import ArgumentError
from rl_sparsity_tf.export.micro_operators import registering_method
from rl_sparsity_tf.version import __version__

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
        zero_point: See `scale`.
    """

    index: int
    keras_index: int
    shape: tuple[int, ...]
    dtype: str
    scale: float | None
    zero_point: int | None


def check_name(name: object) -> str:
    """Returns the name if C and C++ can use it for the array.

    Raises:
        ArgumentError: If they cannot.
    """
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

    Args:
        name: Prefix of everything the header defines.
        content: The .tflite file.
        model: The model's own name, for the comment.
        arena_bytes: Bytes of the arena.
        arena_basis: Where that number comes from.
        operators: TFLite's names of the operators, each once.
        inputs: The inputs in the runtime's order.
        outputs: The outputs in the runtime's order.
        notes: What else the reader has to know.
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
