"""Models with random weights, and whether two compute the same."""

import numpy as np


def randomize(model, seed=0):
    """Gives every weight a random value; variances stay positive."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        value = rng.normal(0, 0.4, weight.shape)
        weight.assign(np.abs(value) + 0.5 if "variance" in weight.name else value)
    return model


def random_rows(model, rows, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, *model.input_shape[1:])).astype("float32")


def assert_same(before, after, rows=1024):
    """Equal outputs, and equal classes wherever two of them are not equally likely."""
    x = random_rows(before, rows)
    expected, found = np.asarray(before(x)), np.asarray(after(x))
    assert found.shape == expected.shape
    allowed = 1e-5 * max(np.ptp(expected), 1e-6)
    assert np.abs(found - expected).max() <= allowed
    flat = expected.reshape(-1, expected.shape[-1])
    best = np.sort(flat, axis=-1)
    clear = best[:, -1] - best[:, -2] > 2 * allowed
    same = flat.argmax(-1) == found.reshape(flat.shape).argmax(-1)
    assert clear.mean() > 0.9
    assert same[clear].all()
