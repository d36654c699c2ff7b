"""The door to TensorFlow: makes sure that Keras 2 (tf_keras) is what `tf.keras` means.

TF-Agents and the TensorFlow Model Optimization toolkit are written against Keras 2, which lives on
as `tf_keras`. TensorFlow decides between Keras 2 and 3 when `tf.keras` is first touched, so asking
for Keras 2 when this package is imported is early enough, unless somebody touched it before.
"""

from __future__ import annotations

import importlib.util
import os
import sys

from rl_sparsity_tf.errors import RLSparsityError

_MEND = 'import os; os.environ["TF_USE_LEGACY_KERAS"] = "1"'


class KerasVersionError(RLSparsityError, ImportError):
    """`tf.keras` already means Keras 3 in this process."""


def tf_keras_resolved_to_keras_3() -> bool:
    """Whether `tf.keras` has been touched already and means Keras 3 (does not touch it)."""
    tensorflow = sys.modules.get("tensorflow")
    if tensorflow is None:
        return False
    keras = vars(tensorflow).get("keras")
    if keras is None:
        return False
    # TensorFlow keeps a lazy loader until the first attribute is read from it; only a loaded
    # module has a version to look at without causing the load.
    version = vars(keras).get("__version__") or getattr(
        vars(keras).get("_module"), "__version__", None
    )
    return version is not None and str(version).startswith("3.")


def use_tf_keras() -> None:
    """Asks TensorFlow for Keras 2, or raises if it is too late for that.

    It raises `KerasVersionError` if `tf.keras` already resolved to Keras 3.
    """
    if tf_keras_resolved_to_keras_3():
        raise KerasVersionError(
            "tf.keras already means Keras 3 in this process, but rl_sparsity_tf works on Keras 2 "
            "models (tf_keras). Import rl_sparsity_tf before tf.keras is used, or put this line "
            f"first in your program: {_MEND}"
        )
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    if "tensorflow" in sys.modules:
        _find_tf_keras_first()


def _find_tf_keras_first() -> None:
    """Lets `import tensorflow.keras` find Keras 2 when TensorFlow was imported before us.

    `tf.keras` is decided when it is first touched, but the folder in which submodules such as
    `tensorflow.keras.layers` are looked up (TensorFlow Probability imports them so) is put on the
    package's path when TensorFlow is imported, by the variable's value at that time.
    """
    spec = importlib.util.find_spec("tf_keras")
    if spec is None or not spec.submodule_search_locations:
        return  # whoever needs tf_keras says that it is missing
    folder = os.path.join(next(iter(spec.submodule_search_locations)), "api", "_v2")
    for name in ("tensorflow", "tensorflow.compat.v2"):
        path = getattr(sys.modules.get(name), "__path__", None)
        if path is not None and folder not in path:
            path.insert(0, folder)
