"""What a failed conversion means for the caller, in one sentence and with a way out."""

from __future__ import annotations

import re

import tf_keras as keras

from rl_sparsity_tf.errors import ExportError
from rl_sparsity_tf.export.recurrent import can_unroll, looping_layers, names_of
from rl_sparsity_tf.tflite.worker import WorkerError

_REASON_CHARACTERS = 300


def conversion_error(model: keras.Model, quantization: str, error: WorkerError) -> ExportError:
    """Explains why a model could not be converted.

    Args:
        model: The model.
        quantization: The mode it was exported in.
        error: What the conversion process reported, or how it died.

    Returns:
        The error to raise.
    """
    text = error.detail
    loops = looping_layers(model)
    if error.reason == "died" and quantization == "int8" and loops:
        unrolled = ", or unroll=True, which exports them without a loop"
        if not can_unroll(model):
            unrolled = ""
        return ExportError(
            f"The TFLite converter crashed on model {model.name!r} with quantization='int8': it "
            f"has no integer form of the loops of its recurrent layers {names_of(loops)}. Your "
            "program is not affected and nothing was written. Pass quantization='dynamic' or "
            f"'plan'{unrolled}."
        )
    if error.reason in ("died", "timeout"):
        return ExportError(f"Model {model.name!r} could not be converted. {error}")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if "TensorList" in text:
        return ExportError(
            f"Model {model.name!r} loops over a list of tensors, as recurrent layers do, which "
            "TFLite's builtin operators take only with a fixed batch size. Pass batch_size=1."
        )
    lacking = sorted(set(re.findall(r"'tf\.(\w+)' op is neither a custom op nor a flex op", text)))
    lacking += [line for line in lines if line.startswith(("Flex ops:", "Custom ops:"))]
    if lacking:
        return ExportError(
            f"Model {model.name!r} uses operations that TFLite's builtins lack: "
            f"{', '.join(lacking)}. Replace the layers that use them; files with Select TF ops do "
            "not run in LiteRT."
        )
    # The converter ends its errors with a dump of the graph; its reason is on an "error:" line.
    reasons = [line.split("error: ", 1)[1] for line in lines if "error: " in line]
    reason = (reasons or lines or ["no reason given"])[-1][:_REASON_CHARACTERS]
    return ExportError(
        f"Model {model.name!r} could not be converted with quantization={quantization!r}: "
        f"{error.reason}: {reason}. Try quantization='none' to see whether the model or the "
        "quantization is the cause."
    )
