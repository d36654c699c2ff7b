"""Data sets: digits, TFDS (small sets made here, and Fashion-MNIST where it is), .npz files."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from rl_sparsity_tf.data.datasets import (
    Data,
    load_dataset,
    load_digits_data,
    load_npz,
    load_tfds,
    stratified_split,
)
from rl_sparsity_tf.errors import ArgumentError, DataError

REAL = Path(__file__).parents[3] / "shared" / "tfds"
BLACK = np.zeros((4, 4, 1), np.uint8)


class _Toy(tfds.core.GeneratorBasedBuilder):
    """Base of the sets below; each is written once per test into a temporary folder."""

    VERSION = tfds.core.Version("1.0.0")
    SPLITS = {"train": 100, "test": 20}
    FEATURES = {
        "image": tfds.features.Image(shape=(4, 4, 1)),
        "label": tfds.features.ClassLabel(num_classes=2),
    }
    KEYS = ("image", "label")

    def _info(self):
        features = tfds.features.FeaturesDict(self.FEATURES)
        return tfds.core.DatasetInfo(
            builder=self, description="toy", features=features, supervised_keys=self.KEYS
        )

    def _split_generators(self, dl_manager):
        return {split: self._rows(count) for split, count in self.SPLITS.items()}

    def _generate_examples(self):
        raise NotImplementedError

    def _rows(self, count):
        for row in range(count):
            yield row, self.row(row)

    def row(self, row):
        # A third of the rows are of class 1; the pixel value tells the row's number.
        return {"image": BLACK + row, "label": int(row % 3 == 0)}


class RlsToyGood(_Toy):
    pass


class RlsToyNoTest(_Toy):
    SPLITS = {"train": 100}


class RlsToyThree(_Toy):
    SPLITS = {"train": 60, "validation": 30, "test": 15}


class RlsToyNoTrain(_Toy):
    SPLITS = {"test": 10}


class RlsToyOpenShape(_Toy):
    FEATURES = _Toy.FEATURES | {"image": tfds.features.Image(shape=(None, None, 3))}


class RlsToySixteenBit(_Toy):
    FEATURES = _Toy.FEATURES | {"image": tfds.features.Image(shape=(4, 4, 1), dtype=np.uint16)}


class RlsToyText(_Toy):
    FEATURES = {"text": tfds.features.Text(), "label": _Toy.FEATURES["label"]}
    KEYS = ("text", "label")


class RlsToyTwoLabels(_Toy):
    FEATURES = _Toy.FEATURES | {"other": tfds.features.ClassLabel(num_classes=3)}
    KEYS = None


class RlsToyManyLabels(_Toy):
    FEATURES = _Toy.FEATURES | {
        "label": tfds.features.Sequence(tfds.features.ClassLabel(num_classes=3))
    }


class RlsToyPlainLabel(_Toy):
    FEATURES = _Toy.FEATURES | {"label": np.int64}


class RlsToyNegative(RlsToyPlainLabel):
    def row(self, row):
        return {"image": BLACK, "label": -1}


class RlsToyOffline(_Toy):
    def _split_generators(self, dl_manager):
        raise ConnectionError("Name or service not known\nsecond line")


@pytest.fixture
def toys(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    return tmp_path


def refusal(*args, error=DataError, **kwargs):
    with pytest.raises(error) as info:
        load_dataset(*args, **kwargs)
    message = str(info.value)
    assert "\n" not in message
    return message


def arrays(**changes):
    """The arrays of a good .npz file, changed; None leaves an array out."""
    generator = np.random.default_rng(0)
    good = {
        "x_train": generator.normal(size=(12, 5)),
        "y_train": np.arange(12) % 3,
        "x_validation": generator.normal(size=(6, 5)),
        "y_validation": np.arange(6) % 3,
        "x_test": generator.normal(size=(4, 5)),
        "y_test": np.arange(4) % 3,
    } | changes
    return {name: value for name, value in good.items() if value is not None}


def write_npz(tmp_path, **changes):
    path = tmp_path / "data.npz"
    np.savez(path, **arrays(**changes))
    return path


def test_digits_are_scaled_and_split_in_the_stated_shares():
    data = load_digits_data()
    assert data.x_train.shape == (1079, 8, 8, 1)
    assert data.x_validation.shape == (359, 8, 8, 1)
    assert data.x_test.shape == (359, 8, 8, 1)
    assert data.x_train.dtype == np.float32
    assert data.x_train.min() == 0
    assert data.x_train.max() == 1
    assert (data.input_shape, data.num_classes, data.name) == ((8, 8, 1), 10, "digits")


def test_every_part_of_digits_has_the_classes_in_proportion():
    data = load_digits_data()
    whole = np.bincount(np.concatenate([data.y_train, data.y_validation, data.y_test]))
    assert np.abs(np.bincount(data.y_test) - whole * 0.2).max() <= 1
    assert np.abs(np.bincount(data.y_validation) - whole * 0.2).max() <= 1.25


def test_the_seed_alone_decides_the_split():
    first, again, other = load_digits_data(3), load_digits_data(3), load_digits_data(4)
    np.testing.assert_array_equal(first.x_test, again.x_test)
    assert not np.array_equal(first.x_test, other.x_test)


def test_the_global_generator_is_left_alone():
    np.random.seed(1)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    load_digits_data()
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_a_split_is_exact_disjoint_and_complete():
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    first, second = stratified_split(labels, 0.3, seed=0)
    assert len(second) == 30
    np.testing.assert_array_equal(np.bincount(labels[second]), [15, 9, 6])
    np.testing.assert_array_equal(np.sort(np.concatenate([first, second])), np.arange(100))


def test_an_impossible_split_is_refused():
    with pytest.raises(ArgumentError, match=r"share=1\.5 cannot be used.*between 0 and 1"):
        stratified_split(np.zeros(10), 1.5, seed=0)
    with pytest.raises(DataError, match=r"3 rows cannot be split at a share of 0\.1"):
        stratified_split(np.zeros(3), 0.1, seed=0)


def test_importing_the_module_imports_no_data_library():
    code = (
        "import sys, rl_sparsity_tf.data.datasets;"
        "print([m for m in ('tensorflow', 'tensorflow_datasets', 'sklearn') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_tfds_set_is_loaded_and_a_validation_split_is_made(toys):
    data = load_tfds("rls_toy_good")
    assert data.x_train.shape == (90, 4, 4, 1)
    assert data.x_validation.shape == (10, 4, 4, 1)
    assert data.x_test.shape == (20, 4, 4, 1)
    assert data.x_train.dtype == np.float32
    assert data.y_train.dtype == np.int64
    assert (data.num_classes, data.input_shape) == (2, (4, 4, 1))
    rows = np.rint(np.concatenate([data.x_train, data.x_validation])[:, 0, 0, 0] * 255)
    np.testing.assert_array_equal(np.sort(rows), np.arange(100))
    labels = np.concatenate([data.y_train, data.y_validation])
    np.testing.assert_array_equal(labels, rows % 3 == 0)
    assert data.y_validation.sum() in (3, 4)


def test_a_tfds_set_is_split_the_same_way_every_time(toys):
    first, again = load_tfds("rls_toy_good", seed=5), load_tfds("rls_toy_good", seed=5)
    np.testing.assert_array_equal(first.x_validation, again.x_validation)
    other = load_tfds("rls_toy_good", seed=6)
    assert not np.array_equal(first.x_validation, other.x_validation)


def test_a_missing_test_split_is_split_off_and_said_so(toys, caplog):
    with caplog.at_level(logging.WARNING, "rl_sparsity_tf"):
        data = load_tfds("rls_toy_no_test", validation_share=0.2)
    assert (len(data.x_train), len(data.x_validation), len(data.x_test)) == (64, 16, 20)
    assert "rls_toy_no_test has no test split: 20 of 100 training rows" in caplog.text


def test_a_validation_split_of_the_set_itself_is_used(toys):
    data = load_tfds("rls_toy_three")
    assert (len(data.x_train), len(data.x_validation), len(data.x_test)) == (60, 30, 15)


def test_limit_reads_the_first_rows_of_every_split(toys):
    data = load_tfds("rls_toy_good", limit=50)
    assert (len(data.x_train), len(data.x_validation), len(data.x_test)) == (45, 5, 20)


def test_a_plain_integer_label_counts_its_classes(toys):
    assert load_tfds("rls_toy_plain_label").num_classes == 2


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("rls_toy_no_train", "has the splits ['test']. Expected a split called 'train'"),
        ("rls_toy_open_shape", "the shape (None, None, 3), where None varies"),
        ("rls_toy_sixteen_bit", "has images of type uint16. Expected uint8"),
        ("rls_toy_text", "has 0 input images among its features ['label', 'text']"),
        ("rls_toy_two_labels", "has 2 class labels ['label', 'other']. Expected exactly one label"),
        ("rls_toy_many_labels", "has the target 'label': Sequence"),
        ("rls_toy_negative", "has labels down to -1. Expected class indices from 0"),
    ],
)
def test_an_unsuitable_tfds_set_is_refused_by_what_it_has(toys, name, found):
    message = refusal(name)
    assert found in message
    assert ".npz" in message


def test_a_set_that_does_not_fit_the_memory_is_refused(toys):
    message = refusal("rls_toy_good", memory_limit_mb=0.005)
    assert "about 0.011 MiB of memory (120 images of shape (4, 4, 1))" in message
    assert "the limit is 0.005 MiB" in message
    assert "memory_limit_mb=1" in message
    assert len(load_dataset("rls_toy_good", memory_limit_mb=0.005, limit=30).x_train) == 27


def test_a_failed_download_is_told_in_one_line(toys):
    message = refusal("rls_toy_offline")
    assert "ConnectionError: Name or service not known" in message
    assert "second line" not in message
    assert "TFDS_DATA_DIR" in message
    assert str(toys) in message


def test_a_damaged_prepared_set_is_told_in_one_line(toys):
    load_tfds("rls_toy_good")
    for record in toys.glob("rls_toy_good/1.0.0/*.tfrecord*"):
        record.write_bytes(record.read_bytes()[:50])
    message = refusal("rls_toy_good")
    assert "could not be prepared or read in" in message
    assert "complete prepared copy" in message


def test_an_unknown_name_gets_a_suggestion(toys):
    message = refusal("fashion_mnsit")
    assert "neither 'digits', nor a .npz file, nor one of the" in message
    assert "Did you mean 'fashion_mnist'?" in message
    assert "tfds.list_builders()" in refusal("qqqqqqqqqqqq")


def test_an_unknown_config_and_a_namespace_are_refused(toys):
    assert "TFDS cannot use the name 'mnist_corrupted/nope'" in refusal("mnist_corrupted/nope")
    assert "a namespace or a strange character" in refusal("huggingface:mnist")


@pytest.mark.parametrize(
    ("argument", "value", "expected"),
    [
        ("limit", 0, "a positive number of rows, or None"),
        ("limit", 2.5, "a positive number of rows, or None"),
        ("memory_limit_mb", 0, "a positive number"),
        ("validation_share", 0.5, "a number in (0, 0.5)"),
    ],
)
def test_impossible_arguments_are_refused(argument, value, expected):
    message = refusal("fashion_mnist", error=ArgumentError, **{argument: value})
    assert f"{argument}={value!r} cannot be used" in message
    assert expected in message


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="no prepared Fashion-MNIST beside the repository")
def test_fashion_mnist_is_the_real_one(monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", os.path.relpath(REAL))
    data = load_dataset("fashion_mnist")
    assert data.x_train.shape == (54000, 28, 28, 1)
    assert data.x_test.shape == (10000, 28, 28, 1)
    np.testing.assert_array_equal(np.bincount(data.y_validation), [600] * 10)
    # The known mean of the 60,000 training images, on which papers normalise.
    both = np.concatenate([data.x_train, data.x_validation])
    assert both.mean(dtype=np.float64) == pytest.approx(0.2860, abs=1e-4)
    assert (both.min(), both.max(), data.num_classes) == (0, 1, 10)


def test_an_npz_file_is_read(tmp_path):
    data = load_npz(write_npz(tmp_path))
    assert isinstance(data, Data)
    assert data.x_train.dtype == np.float32
    assert data.y_train.dtype.kind == "i"
    assert (data.input_shape, data.num_classes, data.name) == ((5,), 3, "data.npz")
    np.testing.assert_array_equal(data.x_train, arrays()["x_train"].astype(np.float32))
    assert load_dataset(write_npz(tmp_path)).x_test.shape == (4, 5)


def test_an_npz_file_without_a_test_split_is_read(tmp_path):
    data = load_npz(write_npz(tmp_path, x_test=None, y_test=None))
    assert data.x_test is None
    assert data.y_test is None


def test_integer_inputs_stay_integers_and_float_targets_have_no_classes(tmp_path):
    ids = np.arange(60).reshape(12, 5)
    path = write_npz(tmp_path, x_train=ids, y_train=np.linspace(0, 1, 12))
    data = load_npz(path)
    assert data.x_train.dtype == ids.dtype
    assert data.num_classes is None


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    assert "does not exist" in refusal(tmp_path / "nowhere.npz")
    (tmp_path / "folder.npz").mkdir()
    assert "is a folder" in refusal(tmp_path / "folder.npz")


def test_a_file_that_is_no_npz_is_refused(tmp_path):
    (tmp_path / "data.csv").write_text("1,2,3")
    assert "is not a .npz file. Expected a complete file written by numpy.savez" in refusal(
        tmp_path / "data.csv"
    )


@pytest.mark.parametrize("share", [0.3, 0.95])
def test_a_truncated_npz_file_is_refused(tmp_path, share):
    path = write_npz(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert "is truncated" in refusal(path)


def test_a_damaged_npz_file_is_refused(tmp_path):
    path = write_npz(tmp_path)
    data = bytearray(path.read_bytes())
    data[300] ^= 0xFF
    path.write_bytes(data)
    assert "is damaged at 'x_train'" in refusal(path)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"y_validation": None}, "missing: ['y_validation']"),
        ({"y_test": None}, "missing: ['y_test']"),
        ({"x_valid": np.zeros(3)}, "holds an array 'x_valid'"),
        ({"x_trian": np.zeros(3)}, "Did you mean 'x_train'?"),
        ({"y_train": np.arange(11)}, "has 12 rows in 'x_train' and 11 in 'y_train'"),
        (
            {"x_train": np.zeros((0, 5))},
            "holds 'x_train' of shape (0, 5). Expected at least one row",
        ),
        ({"x_train": np.zeros(12)}, "Expected at least one row and 2 axes"),
        ({"x_test": np.zeros((4, 6))}, "rows of shape (6,) in 'x_test', but (5,) in 'x_train'"),
        ({"x_train": np.full((12, 5), np.nan)}, "holds 60 NaN or infinite values in 'x_train'"),
        ({"x_train": np.full((12, 5), np.inf)}, "holds 60 NaN or infinite values in 'x_train'"),
        ({"x_train": np.full((12, 5), 1e300)}, "holds 60 NaN or infinite values in 'x_train'"),
        ({"y_train": np.array(["a"] * 12)}, "holds 'y_train' of type <U1. Expected numbers"),
        ({"y_train": np.array([{}] * 12)}, "holds Python objects in 'y_train'"),
    ],
)
def test_unusable_arrays_are_refused_by_name(tmp_path, changes, found):
    message = refusal(write_npz(tmp_path, **changes))
    assert found in message
    assert "data.npz" in message
