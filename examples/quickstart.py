"""Trains a small Keras model, compresses it to 90 % zeros, and runs the exported file."""

import os

import keras
import numpy as np

import rl_sparsity_tf as rls

quick = os.environ.get("RL_SPARSITY_QUICK") == "1"  # a run of seconds, for the tests
output = os.environ.get("RL_SPARSITY_OUTPUT", "digits.tflite")

data = rls.datasets.load_digits_data()  # 8 x 8 images, shipped with scikit-learn
keras.utils.set_random_seed(0)
model = keras.Sequential(
    [
        keras.layers.Input(data.input_shape),
        keras.layers.Conv2D(16, 3, padding="same", activation="relu", name="conv"),
        keras.layers.MaxPooling2D(),
        keras.layers.Flatten(),
        keras.layers.Dense(64, activation="relu", name="hidden"),
        keras.layers.Dense(data.num_classes, activation="softmax", name="classes"),
    ]
)
model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
model.fit(data.x_train, data.y_train, batch_size=64, epochs=3 if quick else 30, verbose=0)

compressor = rls.Compressor(model, rls.Target(sparsity=0.9), agent="dqn")
result = compressor.search(
    (data.x_train, data.y_train),
    validation_data=(data.x_validation, data.y_validation),
    test_data=(data.x_test, data.y_test),
    episodes=1 if quick else 12,
    batch_size=64,
    finetune_epochs=2 if quick else None,
)
result.summary()
report = result.export_tflite(output, overwrite=True)
predicted = np.argmax(rls.predict_tflite(output, data.x_test), axis=1)
accuracy = np.mean(predicted == data.y_test)
print(f"{output}: {report.tflite_bytes:,} bytes, test accuracy {accuracy:.4f}")
