"""The door to TensorFlow: makes sure that Keras 2 (tf_keras) is what `tf.keras` means.

TF-Agents and the TensorFlow Model Optimization toolkit are written against Keras 2, which lives on
as `tf_keras`. TensorFlow decides between Keras 2 and 3 when `tf.keras` is first touched, so asking
for Keras 2 when this package is imported is early enough, unless somebody touched it before.
"""

from __future__ import annotations

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

    Raises:
        KerasVersionError: If `tf.keras` already resolved to Keras 3.
    """
    if tf_keras_resolved_to_keras_3():
        raise KerasVersionError(
            "tf.keras already means Keras 3 in this process, but rl_sparsity_tf works on Keras 2 "
            "models (tf_keras). Import rl_sparsity_tf before tf.keras is used, or put this line "
            f"first in your program: {_MEND}"
        )
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
