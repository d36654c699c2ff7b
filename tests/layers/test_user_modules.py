"""--import MODULE: commands on models with classes of the user's own."""

from __future__ import annotations

import importlib
import re
import sys

import numpy as np
import pytest
import tf_keras as keras
from tiny_search import TRAIN, VALIDATION, quick_search

import rl_sparsity_tf as rls
from rl_sparsity_tf.cli import main
from rl_sparsity_tf.layers.loading import user_modules

REGISTERED = """
import tf_keras as keras

@keras.saving.register_keras_serializable("mine")
class Scale(keras.layers.Layer):
    def __init__(self, factor=2.0, **options):
        super().__init__(**options)
        self.factor = factor

    def call(self, x):
        return self.factor * x

    def get_config(self):
        return {**super().get_config(), "factor": self.factor}
"""
UNREGISTERED = REGISTERED.replace('@keras.saving.register_keras_serializable("mine")\n', "")
MODULES = {
    "registers": REGISTERED,
    "describes": UNREGISTERED,
    "passes_on": "from describes import Scale",
    "fails": "import os\n\nos.nothing",
    "lacks": "import no_such_package",
    "broken": "def half(:\n    pass",
    "leaves": "import sys\nsys.exit(3)",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of modules, and models made of their classes, which are then forgotten."""
    folder = tmp_path_factory.mktemp("project")
    for name, text in MODULES.items():
        (folder / f"{name}.py").write_text(text)
    (folder / "package").mkdir()
    (folder / "package" / "__init__.py").write_text("")
    (folder / "package" / "layers.py").write_text(UNREGISTERED)
    sys.path.insert(0, str(folder))
    for name in ("registers", "describes", "package.layers"):
        module = importlib.import_module(name)
        stack = [
            keras.layers.Input((6,)),
            keras.layers.Dense(8, activation="relu"),
            module.Scale(0.5, name="scale"),
            keras.layers.Dense(3, activation="softmax"),
        ]
        model = keras.Sequential(stack)
        model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
        for suffix in ("keras", "h5"):
            model.save(folder / f"{name}.{suffix}")
    sys.path.remove(str(folder))
    arrays = dict(zip(("x_train", "y_train"), TRAIN, strict=True))
    arrays |= dict(zip(("x_validation", "y_validation"), VALIDATION, strict=True))
    np.savez(folder / "data.npz", **arrays)
    return folder


@pytest.fixture
def project(made, monkeypatch):
    """The folder, as the current one; nothing of it is imported or known to Keras."""

    def forget():
        for name in (*MODULES, "package", "package.layers"):
            sys.modules.pop(name, None)
        keras.saving.get_custom_objects().pop("mine>Scale", None)

    forget()
    monkeypatch.chdir(made)
    paths = list(sys.path)
    yield made
    assert sys.path == paths
    forget()


def compress(model, tmp_path, *imports):
    options = [part for name in imports for part in ("--import", name)]
    return [
        *("compress", model, "--data", "data.npz", "--output", str(tmp_path / "run")),
        *("--target-sparsity", "0.5", "--episodes", "1", "--finetune-epochs", "0"),
        *("--finalists", "1", "--verbose", "0", *options),
    ]


@pytest.mark.slow
def test_a_model_with_classes_of_an_imported_module_is_compressed(project, tmp_path, capsys):
    model, known = "describes.keras", set(keras.saving.get_custom_objects())
    assert main(compress(model, tmp_path)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is of the class 'Scale' of the module 'describes'" in line
    assert "pass --import MODULE, the module that has yours" in line
    with quick_search():
        assert main(compress(model, tmp_path, "describes")) == 0
    assert capsys.readouterr().err == ""
    assert (tmp_path / "run" / "model.tflite").exists()
    assert set(keras.saving.get_custom_objects()) <= known
    with user_modules(["describes"]):
        small = rls.load_model(tmp_path / "run" / "model.keras")
    assert small.get_layer("scale").factor == 0.5


@pytest.mark.parametrize("suffix", ["keras", "h5"])
@pytest.mark.parametrize(
    ("model", "modules"),
    [
        ("registers", ["registers"]),
        ("describes", ["describes"]),
        ("describes", ["registers", "passes_on"]),
        ("package.layers", ["package.layers"]),
    ],
)
def test_registered_or_not_its_classes_are_known(project, model, modules, suffix):
    path = project / f"{model}.{suffix}"
    with pytest.raises(rls.ModelError):
        rls.load_model(path)
    with user_modules(modules):
        assert rls.load_model(path).get_layer("scale").factor == 0.5


WRONG = {
    "path": ("lib/layers.py", r"is a path\. .*: --import layers after: cd lib$"),
    "file": ("describes.py", r"is a path\. Expected the name of a module.*: --import describes$"),
    "no name": ("my-layers", r"'my-layers' is no name of a module\. Expected one such as layers"),
    "relative": (".layers", r"'\.layers' is no name of a module"),
    "missing": ("descibes", r"there is no module of that name, .* Did you mean 'describes'\?$"),
    "missing part": ("package.layer", r"--import package\.layer: there is no module of that name"),
    "needs another": ("lacks", r"lacks fails: ModuleNotFoundError: No module named 'no_such_p"),
    "fails": ("fails", r"fails fails: AttributeError: .*fails\.py, line 3\)\. .*-c 'import fails'"),
    "syntax": ("broken", r"broken fails: SyntaxError: .*\(.*broken\.py, line 1\)"),
    "ends": ("leaves", r"leaves fails: SystemExit: 3"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_module_that_cannot_be_used_is_said_in_one_line(case, project, tmp_path, capsys):
    name, message = WRONG[case]
    assert main(compress("registers.keras", tmp_path, name)) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("rl-sparsity compress: --import ")
    assert re.search(message, line), line
    assert not (tmp_path / "run").exists()
