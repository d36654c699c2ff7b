"""The Model Optimization toolkit on Keras 2, as this package loads it, whoever imports it first."""

from rl_sparsity_tf._compat import TFMOT, seeing_tf_keras

with seeing_tf_keras(TFMOT):
    import tensorflow_model_optimization as tfmot
    from tensorflow_model_optimization.python.core.sparsity.keras.prune_registry import (
        PruneRegistry,
    )

__all__ = ["PruneRegistry", "tfmot"]
