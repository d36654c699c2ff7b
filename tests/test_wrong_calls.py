"""Wrong calls in one table: each is refused in words, before anything is trained or written."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tf_keras as keras
from tiny_search import quick_search, untrained
from wrong_calls import (
    IMAGES,
    LABELS,
    Call,
    Files,
    Hidden,
    StartedError,
    X,
    Y,
    assert_refused,
    clustered,
    compiled_with,
    compressed,
    diverged,
    exported,
    failing,
    hidden,
    images,
    in_folder,
    keras_3,
    layers,
    loaded,
    mostly_skipped,
    not_begun,
    nothing_runs,
    nothing_to_compress,
    option,
    plan_of_another,
    quantization_aware,
    raising,
    read_plan,
    searched,
    stateful,
    stopping,
    targeted,
    tied,
    tiny,
    two_inputs,
    with_a_metric_of_its_own,
    with_one,
    wrapped_with,
)

import rl_sparsity_tf as rls
from rl_sparsity_tf.errors import FileExistsRLSparsityError
from rl_sparsity_tf.layers.plan import KernelRule
from rl_sparsity_tf.search.loop import SearchLoop

MODELS = {
    "a path": (
        compressed(lambda: "model.keras"),
        rls.ModelError,
        r"Received str .*Expected a tf_keras model.*load_model\('model\.keras'\)",
    ),
    "a TFLite file": (
        compressed(lambda: Path("model.tflite")),
        rls.ModelError,
        r"Received PosixPath.*Expected a tf_keras model.*\.tflite file cannot be turned back",
    ),
    "None": (compressed(lambda: None), rls.ModelError, r"Received NoneType.*Expected a tf_keras"),
    "a layer": (
        compressed(lambda: layers.Dense(3)),
        rls.ModelError,
        r"Received Dense .*Expected a tf_keras model.*Sequential\(\[Input\(shape\), layer\]\)",
    ),
    "a class": (
        compressed(lambda: Hidden),
        rls.ModelError,
        r"Received the class Hidden.*Expected a tf_keras model.*Hidden\(\.\.\.\)",
    ),
    "a list": (compressed(lambda: [tiny()]), rls.ModelError, r"Received list.*Expected a tf_keras"),
    "Keras 3": (
        compressed(lambda: keras_3().layers[0]),
        rls.ModelError,
        r"Received Dense from module 'keras.*This is a Keras 3 object, but no model: put it into",
    ),
    "not built": (
        compressed(lambda: keras.Sequential([layers.Dense(3)])),
        rls.ModelError,
        r"is not built: its input shape is unknown\. Call it once on data, call model\.build",
    ),
    "not compiled": (
        compressed(lambda: keras.models.clone_model(untrained())),
        rls.ModelError,
        r"'tiny' is not compiled with a loss.*Call model\.compile\(optimizer, loss, metrics\)",
    ),
    "nothing to compress": (
        compressed(nothing_to_compress),
        rls.ModelError,
        r"has no layer that can be compressed\. Expected at least one.*describe_support\(model\)",
    ),
    "NaN weights": (
        compressed(diverged),
        rls.ModelError,
        r"weight 'first/kernel:0' of model 'tiny' holds NaN .*Expected a trained model: train it",
    ),
    "wrapped": (
        compressed(lambda: rls.wrap(tiny())),
        rls.ModelError,
        r"'tiny' is wrapped already\. Call rl_sparsity_tf\.strip\(model\) first",
    ),
    "wrapped, before there is data": (
        not_begun(model=lambda: rls.wrap(tiny())),
        rls.ModelError,
        r"'tiny' is wrapped already\. Call rl_sparsity_tf\.strip\(model\) first",
    ),
    "wrapped twice": (
        lambda files: rls.wrap(rls.wrap(tiny())),
        rls.ModelError,
        r"'tiny' is wrapped already\. Call rl_sparsity_tf\.strip\(model\) first",
    ),
    "quantization-aware": (
        compressed(quantization_aware),
        rls.ModelError,
        r"prepared for quantization-aware training.*Give the model as it was before quantize_model",
    ),
    "clustered": (
        compressed(clustered),
        rls.ModelError,
        r"is clustered by TFMOT.*strip_clustering\(model\) first",
    ),
    "hidden layers": (
        compressed(hidden),
        rls.ModelError,
        r"uses weights that Keras does not track.*Keep .*in attributes",
    ),
    "tied weights": (
        compressed(tied),
        rls.ModelError,
        r"'tied' share weights with each other .*Share the whole layer instead: call one layer",
    ),
    "a misspelt loss": (
        compressed(compiled_with("sparse_categorical_crosentropy")),
        rls.ModelError,
        r"with the loss 'sparse_\w+', which Keras does not know\. Expected .*"
        r"Did you mean 'sparse_categorical_crossentropy'\?$",
    ),
    "an unknown loss": (
        compressed(compiled_with("nonsense")),
        rls.ModelError,
        r"with the loss 'nonsense', which Keras does not know\. Expected .*, or a function\.$",
    ),
    "a misspelt metric": (
        compressed(compiled_with("sparse_categorical_crossentropy", "acuracy")),
        rls.ModelError,
        r"with the metric 'acuracy', which Keras does not know\. .*Did you mean 'accuracy'\?$",
    ),
    "a loss that raises": (
        compressed(compiled_with(raising)),
        rls.ModelError,
        r"model 'tiny' cannot be computed: RuntimeError: no loss today\. Expected functions",
    ),
    "a wrapper around a text": (
        lambda files: rls.CompressionWrapper("x"),
        rls.ArgumentError,
        r"CompressionWrapper received 'x'\. Expected a layer, such as .*wrap\(model\)",
    ),
    "an environment of nothing": (
        lambda files: rls.LayerEnvironment(None, "first/kernel"),
        rls.ArgumentError,
        r"network=None is a NoneType\. Expected a CompressedNetwork",
    ),
    "strip a text": (lambda files: rls.strip("m"), rls.ModelError, r"Received str.*Expected a tf_"),
    "describe nothing": (
        lambda files: rls.describe_support(None),
        rls.ModelError,
        r"Received NoneType.*Expected a tf_keras model",
    ),
    "register an instance": (
        lambda files: rls.register_layer(layers.Dense(3), kernel="io"),
        rls.ArgumentError,
        r"register_layer received <.*Expected a subclass.*the class itself, not an instance",
    ),
}


def number(name: str, value: Any) -> tuple[Call, str]:
    return searched(**{name: value}), rf"{name}={value!r} cannot be used\. Expected a whole number"


ARGUMENTS = {
    **{
        f"a target of {value!r}": (
            lambda files, value=value: rls.Target(sparsity=value),
            rf"Target\(sparsity={value!r}\) cannot be met\. Expected a number above 0 and below 1",
        )
        for value in (0, 1, 1.5, -0.5, float("nan"), "0.9", True)
    },
    "an empty target": (
        lambda files: rls.Target(),
        r"Target\(\) .*Expected .*Target\(sparsity=0\.9\)",
    ),
    "a target of None": (
        lambda files: rls.Target(sparsity=None),
        r"Target\(.*\) .*Expected .*Target\(sparsity=0\.9\)",
    ),
    "a number as the target": (
        option(target=0.9),
        r"target=0\.9 is a float\. Expected a Target, for example rls\.Target\(sparsity=0\.9\)",
    ),
    "agent dqm": (option(agent="dqm"), r"agent='dqm' is not known\. Expected .*Did you mean 'dqn'"),
    "agent PPO2": (option(agent="PPO2"), r"agent='PPO2' is not known\. Expected one of 'dqn', 'pp"),
    "agent object": (option(agent=object()), r"agent=<object.*expected 'dqn', 'ppo', 'random' or"),
    "agent class": (option(agent=rls.PPO), r"agent=PPO is a class; expected .*Write PPO\(\)"),
    "learning rate": (
        lambda files: rls.DQN(learning_rate=0),
        r"DQN\(learning_rate=0\): expected a number above 0 and at most 1, for instance",
    ),
    "layer widths": (
        lambda files: rls.PPO(hidden_layers=(8, 0)),
        r"PPO\(hidden_layers=\(8, 0\)\): expected a sequence .*instance hidden_layers=\(64, 64\)",
    ),
    "group": (option(group="elemnt"), r"group='elemnt' is not known\. .*Did you mean 'element'"),
    "group 4": (option(group=4), r"group=4 is not known\. Expected one of 'element'"),
    "macs by zeros": (
        lambda files: rls.Compressor(tiny(), rls.Target(macs=0.5), group="element"),
        r"Target\(macs=0\.5\) does not go with group='element'",
    ),
    "macs above 1": (
        lambda files: rls.Target(macs=2),
        r"Target\(macs=2\) cannot be met\. .*below 1",
    ),
    "latency below 0": (
        lambda files: rls.Target(latency=-0.1),
        r"Target\(latency=-0\.1\) cannot be met\. .*the share of the dense file's time",
    ),
    "recovery": (
        option(recovery=4),
        r"recovery=4 is a int\. Expected one of 'least_squares', 'finetune', 'none', or",
    ),
    "recovery's method": (
        lambda files: rls.Recovery(method="fine-tune"),
        r"Recovery\(method\)='fine-tune' is not known\. .*Did you mean 'finetune'",
    ),
    "reward": (
        option(reward=1.0),
        r"reward=1\.0 cannot be called\. Expected rls\.Reward\(\.\.\.\)",
    ),
    "reward class": (
        not_begun(reward=rls.Reward),
        r"reward=<class .*Reward'> is a class\. Expected rls\.Reward\(\.\.\.\) or a function",
    ),
    "warm_start": (
        not_begun(warm_start="no"),
        r"warm_start='no' cannot be used\. Expected True or False",
    ),
    "curriculum": (
        not_begun(curriculum="stages"),
        r"curriculum='stages' is not known\. .*Did you mean 'staged'",
    ),
    "curriculum's stages": (
        lambda files: rls.Staged(stages=(0.5, 0.9)),
        r"Staged\(stages=\(0\.5, 0\.9\)\) cannot be used\. Expected shares .* the last of them 1",
    ),
    "a drop below 0": (
        lambda files: rls.Target(max_accuracy_drop=-0.01),
        r"Target\(max_accuracy_drop=-0\.01\) cannot be met\. Expected a number of at least 0",
    ),
    "a drop and a curriculum": (
        not_begun(target=rls.Target(max_accuracy_drop=0.01), curriculum="linear"),
        r"curriculum='linear' does not go with Target\(max_accuracy_drop=0\.01\).*Leave curriculum",
    ),
    "hierarchy": (
        not_begun(hierarchy=2),
        r"hierarchy=2 cannot be used\. Expected True or False",
    ),
    "reward's weights": (
        lambda files: rls.Reward(accuracy=-1),
        r"Reward\(accuracy=-1\) cannot be used\. Expected a finite number of at least 0",
    ),
    "metric": (
        option(metric="acuracy"),
        r"metric='acuracy' is not among the model's metrics\. .*Did you mean 'accuracy'",
    ),
    "metric's direction": (
        option(metric=("accuracy", "up")),
        r"metric=\('accuracy', 'up'\) has no known direction\. Expected 'max' or 'min'",
    ),
    "metric without a direction": (
        searched(with_a_metric_of_its_own),
        r"Whether a higher 'weird' is better cannot be told .*Pass metric=\('weird', 'max'\) or",
    ),
    "metric as a number": (
        option(metric=3),
        r"metric=3 is not among the model's metrics\. Expected",
    ),
    "metric as a list": (
        option(metric=["accuracy", "max"]),
        r"metric=\['accuracy', 'max'\] is a list\. Expected metric=\('accuracy', 'max'\)\.$",
    ),
    "metric as a list of one": (
        option(metric=["accuracy"]),
        r"metric=\['accuracy'\] is a list\. Expected metric='accuracy'\.$",
    ),
    "metric as an empty list": (
        option(metric=[]),
        r"metric=\[\] is a list\. Expected one name\.$",
    ),
    "metric as one too few": (
        option(metric=("accuracy",)),
        r"metric=\('accuracy',\) is not among the model's metrics\. Expected",
    ),
    "buckets": (option(buckets=0), r"buckets=0 cannot be used\. Expected a whole number of at lea"),
    **{
        f"seed {seed!r}": (option(seed=seed), rf"seed={seed!r} cannot be used\. Expected a whole")
        for seed in (-1, 1.5, True, None, "0")
    },
    **{f"episodes {value!r}": number("episodes", value) for value in (0, -1, 2.5, "three", None)},
    "batch_size": number("batch_size", 0),
    "finetune_epochs": number("finetune_epochs", -1),
    "validation_rows": number("validation_rows", 0),
    "quantization": (
        searched(quantization="int9"),
        r"quantization='int9' is not known\. Expected one of 'plan', .*Did you mean 'int8'",
    ),
    "mask": (
        searched(mask="hard"),
        r"mask='hard' is not known\. Expected one of 'straight_through'",
    ),
    "distillation": (
        searched(distillation=1.5),
        r"distillation=1\.5 cannot be used\. Expected a share from 0 to 1",
    ),
    "verbose": (searched(verbose=7), r"verbose=7 is not known\. Expected 0, 1 or 2"),
    "verbose array": (
        searched(verbose=np.zeros(2)),
        r"verbose=array\(.*\) is not known\. Expected 0, 1 or 2",
    ),
    "overwrite": (
        searched(overwrite="no"),
        r"overwrite='no' cannot be used\. Expected True or False",
    ),
    "dataset": (
        searched(dataset=3),
        r"dataset=3 is a int\. Expected the name of the data as text, or None",
    ),
    "class_weight list": (
        searched(class_weight=[1, 2, 3]),
        r"class_weight=\[1, 2, 3\] is a list\. Expected a dict.*dict\(enumerate\(weights\)\)",
    ),
    "class_weight balanced": (
        searched(class_weight="balanced"),
        r"class_weight='balanced' is a str\. Expected a dict with a number for every class",
    ),
    "class_weight gap": (
        searched(class_weight={0: 1, 2: 1}),
        r"class_weight has the keys \[0, 2\]\. Expected the classes 0, 1, 2, \.\.\. without a gap",
    ),
    "class_weight NaN": (
        searched(class_weight={0: 1, 1: float("nan"), 2: 1}),
        r"class_weight\[1\]=nan cannot be used\. Expected a finite number of at least 0",
    ),
    "class_weight of two classes": (
        searched(class_weight={0: 1, 1: 1}),
        r"class_weight has 2 classes; the model has 3\. Expected the keys 0 to 2",
    ),
    "class_weight for two outputs": (
        searched(
            functools.partial(two_inputs, 2),
            train=((X[:, :3], X[:, 3:]), (Y, Y)),
            class_weight={0: 1, 1: 1, 2: 1},
        ),
        r"class_weight was given for a model with several outputs\. Expected a model with one; ",
    ),
    "unroll": (
        searched(unroll="yes"),
        r"unroll='yes' cannot be used\. Expected True or False",
    ),
    "unroll nothing": (searched(unroll=True), r"unroll=True.*recurrent"),
    "masks": (
        wrapped_with(None, mask="hardconcrete"),
        r"mask='hardconcrete' is not known\. .*Did you mean 'hard_concrete'",
    ),
    "plan and sparsity": (
        wrapped_with(rls.CompressionPlan([KernelRule("*", 0.5)]), sparsity=0.5),
        r"both a plan and a sparsity.*Pass one of the two",
    ),
    "method without sparsity": (
        wrapped_with(None, method="lamp"),
        r"method='lamp' was given without a sparsity.*Pass sparsity=0\.8, too",
    ),
    "unknown method": (
        wrapped_with(None, sparsity=0.5, method="lamb"),
        r"method='lamb' is not known\. .*Did you mean 'lamp'",
    ),
    "method that needs data": (
        wrapped_with(None, sparsity=0.5, method="first_order"),
        r"method='first_order' needs more than .*baselines\.first_order\(model, \(x, y\), spars",
    ),
    "sparsity of several cuts": (
        wrapped_with(None, sparsity=0.5, groups={"first/kernel": "block4"}),
        r"groups=\{'first/kernel': 'block4'\} does not go with a sparsity.*Pass group='block4'",
    ),
    "sparsity and operations": (
        wrapped_with(None, sparsity=0.5, operations=(rls.Operation.PRUNE,)),
        r"operations=\.\.\. does not go with a sparsity.*Leave it out",
    ),
    "mask training": (
        lambda files: rls.MaskTraining(every=0),
        r"every=0 cannot be used\. Expected an integer above 0",
    ),
}

TARGETS = {
    "most weights skipped": (
        targeted(0.9, mostly_skipped),
        r"sparsity of 0\.9 needs 557 of 618 .* only 17 can be: .*Expected a .* at most 0\.027",
    ),
    "groups too large": (
        targeted(0.9, group="channel"),
        r"sparsity=0\.9\) cannot be reached: .*pays, 0\.125 of the dense network's cost",
    ),
    "everything": (targeted(0.999), r"needs 72 of 72 .* only 70 can be.*at most 0\.9722"),
}

FOLDERS = {
    "a file": (
        in_folder("text.txt"),
        rls.ArgumentError,
        r"text\.txt' is a file\. Expected a folder to write to",
    ),
    "no parent": (
        in_folder("nowhere/run"),
        rls.ArgumentError,
        r"nowhere' does not exist\. Create it first, or choose another place for 'run'",
    ),
    "a number": (
        in_folder("", directory=3),
        rls.ArgumentError,
        r"directory=3 is a int\. Expected the path of a folder to write to",
    ),
    "foreign": (
        in_folder("foreign"),
        FileExistsRLSparsityError,
        r"foreign' is not empty and holds no run of this package\. Choose another",
    ),
    "finished": (
        in_folder("finished"),
        FileExistsRLSparsityError,
        r"finished' holds a finished run\. Choose another folder, or pass overwrite=True",
    ),
    "another run": (
        in_folder("unfinished", buckets=4),
        FileExistsRLSparsityError,
        r"holds an unfinished run that differs in buckets \(8, now 4\)\. Call with the same argum",
    ),
    "a run of another seed": (
        in_folder("unfinished", seed=4),
        FileExistsRLSparsityError,
        r"holds an unfinished run that differs in seed \(3, now 4\)\. Call with the same",
    ),
    "a damaged run": (
        in_folder("damaged"),
        rls.RLSparsityError,
        r"manifest in .* cannot be read .*Choose another folder, or pass overwrite=True",
    ),
}

PLANS = {
    "of another model": (
        wrapped_with(plan_of_another()),
        r"kernel 'first/kernel' has shape \(9, 9\) .*the model's has \(6, 8\) .*Use a plan made",
    ),
    "of an unknown kernel": (
        wrapped_with(rls.CompressionPlan([KernelRule("frist/kernel", 0.5)])),
        r"names the kernel 'frist/kernel', .*Expected one of .*Did you mean 'first/kernel'",
    ),
    "of no kernel": (
        wrapped_with(rls.CompressionPlan([KernelRule("conv*/kernel", 0.5)])),
        r"rule for 'conv\*/kernel' matches no kernel\. The model has \['first/kernel', 'last/ker",
    ),
    "a dict": (
        wrapped_with({"kernels": []}),
        r"plan is a dict\. Expected a CompressionPlan, for ex",
    ),
    "a path": (
        wrapped_with("plan.json"),
        r"plan is a str\. Expected a CompressionPlan, for example",
    ),
    "a list of dicts": (
        lambda files: rls.CompressionPlan([{"path": "first/kernel"}]),
        r"was given \{'path': .*\}\. Expected KernelPlan and KernelRule objects; .*from_dict reads",
    ),
    "too sparse": (
        lambda files: KernelRule("*", 1.0),
        r"has sparsity 1\.0\. Expected a number of at least 0 and below 1",
    ),
    "truncated": (
        read_plan("truncated.json"),
        r"The plan is not valid JSON \(line \d, .*Mend that place, or write the plan again",
    ),
    "another version": (
        read_plan("version.json"),
        r"has format_version 99\. Expected 1; a newer version of this package may read it",
    ),
    "text": (
        read_plan("text.txt"),
        r"is not valid JSON \(line 1, .*write the plan again with plan",
    ),
    "another document": (
        read_plan("list.json"),
        r"is not a compression plan\. Expected an object with format_version and kernels, received",
    ),
    "a binary file": (
        read_plan("model.tflite"),
        r"cannot be read \(.*\)\. Expected a JSON file written by plan\.save",
    ),
    "nested too deeply": (
        lambda files: rls.CompressionPlan.from_json("[" * 100_000 + "]" * 100_000),
        r"JSON is nested too deeply to be read\. Expected an object with format_version",
    ),
    "of endless digits": (
        lambda files: rls.CompressionPlan.from_json('{"format_version": ' + "1" * 5000 + "}"),
        r"plan's text cannot be read \(.*\)\. Expected a str of JSON, as plan\.to_json\(\)",
    ),
    "no text": (
        lambda files: rls.CompressionPlan.from_json(None),
        r"plan's text cannot be read \(.*NoneType\)\. Expected a str of JSON",
    ),
    "missing": (read_plan("nothing.json"), r"nothing\.json' cannot be read .*Expected a JSON file"),
}

EXPORTS = {
    "another ending": (
        exported("m.lite"),
        rls.ArgumentError,
        r"m\.lite' ends in '\.lite'\. Expected a name ending in '\.tflite'",
    ),
    "existing file": (
        lambda files: rls.export_tflite(tiny(), files / "text.tflite", "none"),
        FileExistsRLSparsityError,
        r"text\.tflite' exists already\. Choose another name, or pass overwrite=True",
    ),
    "no folder": (
        exported("no/m.tflite"),
        rls.ArgumentError,
        r"does not exist\. Create it first, or choose another place for 'm\.tflite'",
    ),
    "quantization": (
        exported(quantization="int4"),
        rls.ArgumentError,
        r"quantization='int4' is not known\. Expected one of 'plan'",
    ),
    "no plan": (
        exported(quantization="plan"),
        rls.ArgumentError,
        r"quantization='plan' needs a plan, .*Pass plan=, .*or pass quantization='none'",
    ),
    "plan of another model": (
        exported(quantization="plan", plan=plan_of_another()),
        rls.PlanError,
        r"kernel 'first/kernel' the shape \(9, 9\), the model's has \(6, 8\)\. Use the plan with",
    ),
    "no representative data": (
        exported(quantization="int8"),
        rls.ArgumentError,
        r"'int8' needs representative_data .*Pass some hundred rows of training inputs, or choose",
    ),
    "representative data of a wrong shape": (
        exported(quantization="int8", representative_data=X[:, :5]),
        rls.DataError,
        r"data received is .*\(96, 5\); the model's inputs are 'given' \(None, 6\).*Expected an a",
    ),
    "representative data with NaN": (
        exported(quantization="int8", representative_data=with_one(X, np.nan)),
        rls.DataError,
        r"representative_data for input 'given' contains NaN or infinite values\. Expected finite",
    ),
    "representative data of text": (
        exported(quantization="int8", representative_data=X.astype(str)),
        rls.DataError,
        r"representative_data for input 'given' is of type <U32\. Expected numbers .* float32",
    ),
    "representative data that raises": (
        lambda files: exported(quantization="int8", representative_data=stopping())(files),
        rls.DataError,
        r"representative_data could not be read: batch 1 raises OSError: the disk is gone\. Expec",
    ),
    "a representative dataset that raises": (
        lambda files: exported(quantization="int8", representative_data=failing())(files),
        rls.DataError,
        r"representative_data could not be read: batch 1 raises OSError: the disk is gone\. Expec",
    ),
    "representative data without rows": (
        exported(quantization="int8", representative_data=X[:0]),
        rls.DataError,
        r"representative_data has no rows\. Give at least one row of inputs",
    ),
    "tolerance": (
        exported(tolerance=-1),
        rls.ArgumentError,
        r"tolerance=-1 cannot be used\. Expected a positive number.*or None for the default",
    ),
    "batch size": (
        exported(batch_size=0),
        rls.ArgumentError,
        r"batch_size=0 cannot be used\. Expected an integer of at least 1",
    ),
    "another batch size": (
        exported(model=stateful, batch_size=4),
        rls.ArgumentError,
        r"batch_size=4 does not fit model .* fixed to batches of \[8\]\. Leave batch_size out",
    ),
    "unroll without a loop": (
        exported(unroll=True),
        rls.ArgumentError,
        r"unroll=True .*recurrent",
    ),
    "a path for the model": (
        exported(model=lambda: "model.keras"),
        rls.ModelError,
        r"Received str .*Expected a tf_keras model",
    ),
    "predict with a missing file": (
        lambda files: rls.predict_tflite(files / "nothing.tflite", X),
        rls.ArgumentError,
        r"There is no file .*nothing\.tflite'\. Give the path of a \.tflite file",
    ),
    "predict with a batch size of 0": (
        lambda files: rls.predict_tflite(files / "text.tflite", X, batch_size=0),
        rls.ArgumentError,
        r"batch_size=0 cannot be used\. Expected an integer of at least 1",
    ),
}

# What takes a file that can be read: making one starts a process of its own, some seconds long.
RUNTIME = {
    "predict with text": (
        lambda files: rls.predict_tflite(files / "text.tflite", X),
        rls.ArgumentError,
        r"is not a \.tflite file: its bytes 4 to 8",
    ),
    "predict with text for rows": (
        lambda files: rls.predict_tflite(files / "real.tflite", X.astype(str)),
        rls.ArgumentError,
        r"inputs holds <U32\. Expected arrays of integers or real numbers",
    ),
    "predict with ragged rows": (
        lambda files: rls.predict_tflite(files / "real.tflite", [[[1.0, 2.0], [3.0]]]),
        rls.ArgumentError,
        r"inputs has rows of unequal length\. Expected an array of shape \(rows, \.\.\.\).*pad",
    ),
    "predict without rows": (
        lambda files: rls.predict_tflite(files / "real.tflite", X[:0]),
        rls.ArgumentError,
        r"inputs has the shapes \[\(0, 6\)\]\. Expected at least one row",
    ),
    "predict with uneven rows": (
        lambda files: rls.predict_tflite(files / "real.tflite", [X, X[:3]]),
        rls.ArgumentError,
        r"inputs has \[96, 3\] rows\. Expected one array per input of the model, all with the same",
    ),
    "predict with too many inputs": (
        lambda files: rls.predict_tflite(files / "real.tflite", [X, X]),
        rls.ArgumentError,
        r"The file has 1 inputs \['given'\], received 2\. Expected one array per input",
    ),
    **{
        f"predict with rows of shape {x.shape}": (
            lambda files, x=x: rls.predict_tflite(files / "real.tflite", x),
            rls.ArgumentError,
            rf"shape {re.escape(str(x.shape))} for the file's input 'given'\. Expected .rows, 6.",
        )
        for x in (X[:, :5], X[:, :1], X[..., None], np.concatenate([X[:4], X[:4]], 1), X[0])
    },
    "predict with one row alone": (
        lambda files: rls.predict_tflite(files / "real.tflite", X[0]),
        rls.ArgumentError,
        r"Expected \(rows, 6\)\. The batch axis is missing: x\[None\], or \.batch\(32\) on a",
    ),
    "predict with too few channels": (
        lambda files: rls.predict_tflite(files / "open.tflite", np.zeros((2, 8, 8, 1))),
        rls.ArgumentError,
        r"shape \(2, 8, 8, 1\) for the file's input 'picture'\. Expected \(rows, any, any, 2\)\.$",
    ),
    "predict with fractions for ids": (
        lambda files: rls.predict_tflite(files / "ids.tflite", np.zeros((3, 4))),
        rls.ArgumentError,
        r"type float64 for the file's input 'ids'\. Expected int32: x\.astype\('int32'\) if",
    ),
    "predict with ids beyond their type": (
        lambda files: rls.predict_tflite(files / "ids.tflite", np.full((3, 4), 2**32)),
        rls.ArgumentError,
        r"numbers from 4294967296 to 4294967296 .*Expected int32: numbers from -2147483648 to 2",
    ),
}

SAVED = {
    "missing": (
        loaded("nothing.keras"),
        r"There is no file or folder .*Expected a \.keras or \.h5",
    ),
    "truncated": (
        loaded("truncated.keras"),
        r"is truncated: .*its end is missing\. Expected a \.k",
    ),
    "empty": (loaded("empty.keras"), r"empty\.keras' is empty\. Expected a \.keras or \.h5 file"),
    "text": (loaded("text.keras"), r"is damaged or mislabelled: .*Expected a \.keras or \.h5 file"),
    "weights": (
        loaded("weights.h5"),
        r"holds weights but no model\. Build the model in code, call model\.load_weights",
    ),
    "a module": (
        loaded("module"),
        r"can be run but not rebuilt: .*tf\.saved_model\.save\(\).*Save it again from Keras 2",
    ),
    "an export": (
        loaded("exported"),
        r"can be run but not rebuilt: .*model\.export\(\).*Save it again from Keras 2",
    ),
    "a foreign folder": (
        loaded("foreign"),
        r"foreign' is no SavedModel: it has no saved_model\.pb\. Expected a \.keras",
    ),
    "a Lambda": (
        loaded("lambda.keras"),
        r"was not opened: its layer 'twice' is a Lambda, .*Expected .*pass trusted=True",
    ),
    "TFLite": (
        loaded("model.tflite"),
        r"seems to be a TFLite file, which cannot be turned back.*Expected a \.keras",
    ),
}

PATHS = {
    "of no plan": (
        lambda files: rls.CompressionPlan.load(None),
        r"path=None is a NoneType\. Expected the path of a JSON file written by plan\.save",
    ),
    "of no model": (
        lambda files: rls.load_model(None),
        r"path=None is a NoneType\. Expected .*\.keras or \.h5 file",
    ),
    "of no file to run": (
        lambda files: rls.predict_tflite(None, X),
        r"path=None is a NoneType\. Expected the path of a \.tflite file",
    ),
    "of no export": (
        lambda files: rls.export_tflite(tiny(), None, "none"),
        r"path=None is a NoneType\. Expected the name of a file to write",
    ),
}

CALLS: dict[str, tuple[Call, type[Exception], str]] = {
    **{f"model: {name}": entry for name, entry in MODELS.items()},
    **{f"argument: {n}": (call, rls.ArgumentError, text) for n, (call, text) in ARGUMENTS.items()},
    **{f"target: {name}": (call, rls.TargetError, text) for name, (call, text) in TARGETS.items()},
    **{f"folder: {name}": entry for name, entry in FOLDERS.items()},
    **{f"plan: {name}": (call, rls.PlanError, text) for name, (call, text) in PLANS.items()},
    **{f"path: {name}": (call, rls.ArgumentError, text) for name, (call, text) in PATHS.items()},
    **{f"export: {name}": entry for name, entry in EXPORTS.items()},
    **{f"file: {name}": (call, rls.ModelError, text) for name, (call, text) in SAVED.items()},
}


@pytest.mark.parametrize("case", CALLS)
def test_a_wrong_call_is_refused_before_any_work(case, files):
    call, error, pattern = CALLS[case]
    assert_refused(call, files, error, pattern)


# ---------------------------------------------------------------------------- files at run time


@pytest.fixture(scope="module")
def exported_file(shared) -> None:
    rls.export_tflite(tiny(), shared / "real.tflite", "none")
    stack = [
        layers.Input((None, None, 2), name="picture"),
        layers.Conv2D(2, 3),
        layers.GlobalMaxPooling2D(),
    ]
    rls.export_tflite(keras.Sequential(stack), shared / "open.tflite", "none")
    stack = [
        layers.Input((4,), name="ids", dtype="int32"),
        layers.Embedding(9, 3),
        layers.Flatten(),
    ]
    rls.export_tflite(keras.Sequential(stack), shared / "ids.tflite", "none")


@pytest.mark.slow
@pytest.mark.parametrize("case", RUNTIME)
def test_a_file_that_cannot_be_run_is_refused(case, exported_file, files):
    call, error, pattern = RUNTIME[case]
    assert_refused(call, files, error, pattern)


# ------------------------------------------------------------------- the same calls, done right


RIGHT: dict[str, Call] = {
    "search": searched(),
    "several inputs": searched(
        two_inputs,
        train=({"left": X[:, :3], "right": X[:, 3:]}, Y),
        validation_data=((X[:, :3], X[:, 3:]), Y),
    ),
    "images": searched(images, train=(IMAGES, LABELS), validation_data=(IMAGES, LABELS)),
    "an unfinished run": in_folder("unfinished"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", RIGHT)
def test_calls_without_the_mistake_get_to_work(case, shared, tmp_path):
    found = Files(shared, tmp_path)
    tiny()
    with quick_search(), nothing_runs(SearchLoop), pytest.raises(StartedError):
        RIGHT[case](found)


def test_numbers_of_numpy_are_targets():
    target = rls.Target(sparsity=np.float32(0.5))
    assert target == rls.Target(sparsity=0.5)
    json.dumps(target.to_dict())
