"""Keras 3 models at the door: made into tf_keras models, and handed back as Keras 3."""
