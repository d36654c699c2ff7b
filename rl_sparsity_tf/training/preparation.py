"""Making a wrapped copy fit for a search: no noise, quick batch-norm statistics."""

from __future__ import annotations

import tf_keras as keras

from rl_sparsity_tf.layers.structure import all_layers

# Four recovery steps renew two thirds of the moving statistics. At Keras's default of 0.99 they
# would describe the network before the decision, and every plan would score like chance.
_BATCH_NORM_MOMENTUM = 0.75


def prepare_for_short_recovery(model: keras.Model) -> None:
    """Switches noise off, and lets batch-norm statistics follow within a few steps."""
    layers = keras.layers
    for layer in all_layers(model):
        # Recurrent cells; their layers only pass the rates on.
        if hasattr(layer, "recurrent_dropout") and not isinstance(layer, layers.RNN):
            layer.dropout = layer.recurrent_dropout = 0.0
        elif isinstance(layer, layers.Dropout | layers.GaussianDropout | layers.AlphaDropout):
            layer.rate = 0.0
        elif isinstance(layer, layers.GaussianNoise):
            layer.stddev = 0.0
        elif isinstance(layer, layers.BatchNormalization):
            layer.momentum = min(layer.momentum, _BATCH_NORM_MOMENTUM)
