"""Every public name has an example in its docstring, and every example does what it shows."""

import doctest
import inspect
import io
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tf_keras as keras
from channel_search import table_for
from tiny_search import DQN, quick_search

import rl_sparsity_tf as rls

# How long an example takes: a reader is shown what makes sense, one of each is run.
EFFORT = re.compile(r"\b(epochs|evaluations)=\d+")
SEARCHED = re.compile(r">>> .*(compressor\.|result\.|\(compressor|\(result\b)")
# Those that need a search, several conversions or a training of their own.
SLOW = (
    "Compressor LayerSelectionEnvironment MicroReport Result Result.save_policy Result.save_report "
    "SizeModel plots plots.history plots.layers plots.operations plots.pareto "
    "baselines.global_magnitude baselines.hill_climbing baselines.lamp baselines.random_search "
    "baselines.tfmot compare comparison_table export_micro tie_channels"
).split()
SEARCH = rls.Compressor.search


def docstrings():
    """Public name below `rls` -> its docstring; and methods that have an example."""
    values = {name: getattr(rls, name) for name in rls.__all__ if name != "__version__"}
    for space in ("baselines", "callbacks", "datasets", "plots"):
        own = {key: value for key, value in vars(values[space]).items() if key[0] != "_"}
        listed = getattr(values[space], "__all__", None) or [
            key for key, value in own.items() if getattr(value, "__module__", "").endswith(space)
        ]
        values |= {f"{space}.{name}": own[name] for name in listed}
    found = {name: inspect.getdoc(value) or "" for name, value in values.items()}
    for name, value in values.items():
        if inspect.isclass(value):
            methods = {key: inspect.getdoc(getattr(value, key)) or "" for key in vars(value)}
            found |= {f"{name}.{key}": text for key, text in methods.items() if ">>>" in text}
    return found


EXAMPLES = docstrings()


def interrupted(*arguments, **options):
    """What a search does once Ctrl-C was pressed."""
    plan = rls.CompressionPlan.load("plan.json")
    raise rls.SearchInterrupted("after 3 episodes", episodes=3, directory=None, plan=plan)


@pytest.fixture(scope="module")
def names():
    """What the examples speak of: a trained model, its data and a plan."""
    data = rls.datasets.load_digits_data()
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Input((8, 8, 1)),
        keras.layers.Conv2D(16, 3, padding="same", activation="relu", name="conv"),
        keras.layers.MaxPooling2D(name="pool"),
        keras.layers.Flatten(name="flat"),
        keras.layers.Dense(64, activation="relu", name="hidden"),
        keras.layers.Dense(10, activation="softmax", name="classes"),
    ]
    model = keras.Sequential(layers, name="digits")
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    found = {"x": data.x_train[:256], "y": data.y_train[:256]}
    found |= {"x_val": data.x_validation[:100], "y_val": data.y_validation[:100]}
    found |= {"x_test": data.x_test, "y_test": data.y_test}
    model.fit(found["x"], found["y"], epochs=3, verbose=0)
    found |= {"model": model, "plan": rls.baselines.erk(model, sparsity=0.9)}
    with quick_search():
        yield {"rls": rls, "keras": keras, "np": np, "Path": Path, **found}


@pytest.fixture(scope="module")
def folder(names, tmp_path_factory):
    """The files that the examples read."""
    folder, model, plan = tmp_path_factory.mktemp("examples"), names["model"], names["plan"]
    rls.export_tflite(model, folder / "dense.tflite", "none")
    small = rls.strip(rls.wrap(model, plan))
    rls.export_tflite(small, folder / "model.tflite", plan=plan)
    plan.save(folder / "plan.json")
    table_for(model).save(folder / "phone.json")
    return folder


@pytest.fixture(scope="module")
def searched(names):
    """A short search, for the examples that ask for one or look at what came of it."""
    compressor = rls.Compressor(names["model"], rls.Target(sparsity=0.9), agent=DQN)
    few = {"episodes": 1, "finetune_epochs": 1, "finalists": 1, "batch_size": 64, "verbose": 0}
    rows, validation = (names["x"], names["y"]), (names["x_val"], names["y_val"])
    result = compressor.search(rows, validation_data=validation, **few)

    def search(self, *arguments, **options):
        inspect.signature(SEARCH).bind(self, *arguments, **options)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rls.Compressor, "search", search)
        yield {"compressor": compressor, "result": result}


@pytest.mark.parametrize(
    "name",
    [pytest.param(one, marks=pytest.mark.slow) if one in SLOW else one for one in sorted(EXAMPLES)],
)
def test_the_example_of(name, names, folder, request, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    if name.startswith("plots"):
        pytest.importorskip("matplotlib").use("Agg")
    if name == "SearchInterrupted":
        names = {**names, "compressor": SimpleNamespace(search=interrupted)}
    elif SEARCHED.search(EXAMPLES[name]):
        names = names | request.getfixturevalue("searched")
    text = EFFORT.sub(r"\1=1", EXAMPLES[name])
    example = doctest.DocTestParser().get_doctest(text, dict(names), name, None, None)
    assert example.examples, f"the docstring of rls.{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said = io.StringIO()
    runner.run(example, out=said.write)
    assert not runner.failures, said.getvalue()


def test_few_examples_are_only_shown():
    skipped = {name for name, text in EXAMPLES.items() if "+SKIP" in text}
    # A download, and minutes on a machine that does nothing else.
    assert skipped == {"datasets.load_tfds", "measure_latency", "NotMeasuredError"}
