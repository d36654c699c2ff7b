"""From a Keras model to a verified .tflite file or C header, and how large it will be."""
