"""Opens .keras files of Keras 3, without running code that came with the file.

The configuration is read as plain data first, and everything in it looked up where Keras would look
for it, in what is imported already: only classes that Keras makes models of pass, functions that
compute, and what the user registered.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras as keras3
from keras.src.ops.operation import Operation

from rl_sparsity_tf.claims import DTYPE, dicts_of
from rl_sparsity_tf.errors import ModelError, one_line

# What models are made of; operations of keras.ops, as layers, are of the first kind.
PARTS = (
    *(Operation, keras3.losses.Loss, keras3.metrics.Metric, keras3.optimizers.Optimizer),
    *(keras3.initializers.Initializer, keras3.regularizers.Regularizer),
    *(keras3.constraints.Constraint, keras3.dtype_policies.DTypePolicy, keras3.KerasTensor),
    *(keras3.optimizers.schedules.LearningRateSchedule, keras3.random.SeedGenerator),
    *(keras3.layers.InputSpec, keras3.dtype_policies.DTypePolicyMap),
)
# Layers that run code or open files of their configuration's choosing.
_OPENING = ("TFSMLayer", "TorchModuleWrapper", "JaxLayer", "FlaxLayer")
_GROUPS = ("activations", "losses", "metrics", "initializers", "regularizers", "constraints")
_FUNCTIONS = re.compile(rf"keras(\.src)?\.({'|'.join(_GROUPS)}|ops)(\.\w+)*")
_NOT_COMPUTING = {"get", "serialize", "deserialize"}
_PLAIN = {
    *("__keras_tensor__", "__tensor__", "__numpy__", "__bytes__", "__ellipsis__", "__slice__"),
    "__tuple__",
}
_FILES = ("vocabulary", "vocabulary_file", "filepath", "file_path", "filename")


def load_keras_3(path: Path, *, trusted: bool) -> Any:
    """Loads a Keras 3 model whose file has been scanned.

    Raises `ModelError` if Keras cannot build it, or it holds no model.
    """
    try:
        model = keras3.saving.load_model(path, safe_mode=not trusted)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"Keras cannot build the model in {str(path)!r}: {one_line(error, 300)}. If it has "
            "classes or functions of yours, import what registers them "
            "(@keras.saving.register_keras_serializable) before loading; else save it again with "
            f"the Keras that loads it ({keras3.__version__})."
        ) from error
    if not isinstance(model, keras3.Model):
        raise ModelError(
            f"{str(path)!r} holds a {type(model).__name__}, not a model. Expected a .keras file "
            "written by model.save()."
        )
    return model


def foreign_parts(config: object) -> Iterator[str]:
    """Names everything in a configuration that Keras 3 would run, import or read from elsewhere.

    The configuration is made of JSON values.
    """
    for value in dicts_of(config):
        if "class_name" in value:
            yield from _foreign_object(value)


def _foreign_object(stored: dict[str, Any]) -> Iterator[str]:
    module, inner = stored.get("module"), stored.get("config")
    kind = str(stored["class_name"])
    registered = str(stored.get("registered_name") or kind)
    details = inner if isinstance(inner, dict) else {}
    label = f" {details['name']!r}" if isinstance(details.get("name"), str) else ""
    if {"Lambda", "__lambda__"} & {kind, registered.rsplit(">", 1)[-1]}:
        yield f"its layer{label} is a Lambda, which runs Python code stored in the file"
    elif kind == "function":
        own = _registered(str(inner)) or _registered(registered)
        if own is None and not _computes(module, inner):
            yield f"it uses the function {inner!r} of the module {module!r}"
    elif kind in _PLAIN:
        if not DTYPE.fullmatch(str(details.get("dtype") or "float32")):
            yield f"it holds an array of the type {str(details.get('dtype'))[:40]!r}"
    elif _registered(registered) is None:
        found = _found(module, kind)
        if not (isinstance(found, type) and issubclass(found, PARTS)):
            yield f"its part{label} is of the class {kind!r} of the module {module!r}"
        elif any(base.__name__ in (*_OPENING, "Lambda") for base in found.__mro__):
            yield f"its part{label} is a {kind}, which runs or opens what the file names"
        for key in _FILES:
            if isinstance(details.get(key), str):
                yield f"its part{label} reads the file {details[key]!r}"


def _registered(name: str) -> Any:
    return keras3.saving.get_registered_object(name)


def _computes(module: Any, name: Any) -> bool:
    if not str(name).isidentifier() or name in _NOT_COMPUTING:
        return False
    if module == "builtins":  # what Keras writes for its own functions, and Python's eval too
        return any(callable(_found(f"keras.{group}", str(name))) for group in _GROUPS)
    found = _found(module, str(name)) if _FUNCTIONS.fullmatch(str(module)) else None
    return callable(found) and str(getattr(found, "__module__", "")).startswith("keras.")


def _found(module: Any, name: str) -> Any:
    """What Keras may find under a name in a module, of what is imported already."""
    path = str(module)
    if path != "keras" and not path.startswith("keras."):
        return None
    return getattr(sys.modules.get(path), name, None)
