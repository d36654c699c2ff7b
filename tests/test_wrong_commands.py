"""Wrong commands: each is refused in one line, before anything is trained or written."""

from __future__ import annotations

import re
from typing import Any

import pytest
from tiny_search import quick_search
from wrong_calls import Files, StartedError, nothing_runs, tiny

from rl_sparsity_tf import demo
from rl_sparsity_tf.callbacks import PHASES
from rl_sparsity_tf.cli import main
from rl_sparsity_tf.search.loop import SearchLoop


def compress(model: str = "good.keras", data: str | None = "data.npz", more: str = "") -> str:
    """A command; {shared} is the folder of the files, {place} one to write to."""
    given = f"--data {{shared}}/{data} " if data else ""
    return f"compress {{shared}}/{model} {given}--output {{place}}/run {more}"


def arguments_of(command: str, files: Files) -> list[str]:
    return [part.format(shared=files.shared, place=files.place) for part in command.split()]


COMMANDS = {
    "none": ("", r"arguments are required: command"),
    "unknown": ("compres", r"invalid choice: 'compres' \(choose from .*compress"),
    "unknown option": (compress(more="--agnet dqn"), r"unrecognized arguments: --agnet dqn"),
    "missing model": (compress("nothing.keras"), r"no file or folder .*Expected a \.keras or \.h5"),
    "truncated model": (compress("truncated.keras"), r"is truncated: .*Expected a \.keras or \.h5"),
    "TFLite model": (
        compress("model.tflite"),
        r"seems to be a TFLite file, which cannot be turned",
    ),
    "Lambda": (compress("lambda.keras"), r"is a Lambda, .*If you trust .*--trusted"),
    "no data": (compress(data=None), r"one of the arguments --data --dataset is required"),
    "missing data": (
        compress(data="no.npz"),
        r"no\.npz' does not exist\. Expected a complete file",
    ),
    "data twice": (
        compress(more="--dataset digits"),
        r"--dataset: not allowed with argument --data",
    ),
    "unknown dataset": (
        compress(data=None, more="--dataset fashion_mnst"),
        r"'fashion_mnst' is neither 'digits', nor .*Did you mean 'fashion_mnist'\?",
    ),
    "demo of an unknown dataset": ("demo --dataset digit", r"'digit' is neither 'digits', nor"),
    "data without labels": (
        compress(data="no_y.npz"),
        r"missing: \['y_train'\]\. Expected \['x_tr",
    ),
    "data with objects": (
        compress(data="objects.npz"),
        r"holds Python objects in 'x_train', which are never unpickled\. Expected numbers",
    ),
    "truncated data": (compress(data="truncated.npz"), r"is truncated: .*Expected a complete file"),
    "no .npz": (compress(data="text.txt"), r"is not a \.npz file\. Expected a complete file"),
    "label out of range": (
        compress(data="classes.npz"),
        r"has the label 3 in row 95; .*3 classes\. Expected integers from 0 to 2",
    ),
    "agent": (compress(more="--agent dqm"), r"--agent: invalid choice: 'dqm' \(choose from .*dqn"),
    "group": (
        compress(more="--group nope"),
        r"--group: invalid choice: 'nope' \(choose from .*ele",
    ),
    "group by bytes without bytes": (
        compress(more="--group auto"),
        r"group='auto' does not go with Target\(sparsity=0\.9\): .* Expected Target\(tflite_bytes=",
    ),
    "bits where all are 8": (
        compress(more="--int4 none"),
        r"int4='none' does not go with group='element', where every kernel has 8 bits\. Pass",
    ),
    "kernels in 4 bits": (
        compress(more="--int4 some"),
        r"--int4: invalid choice: 'some' \(choose from .*fast",
    ),
    "no episode": (compress(more="--episodes 0"), r"episodes=0 cannot be used\. Expected a whole"),
    "episodes in words": (compress(more="--episodes three"), r"invalid int value: 'three'"),
    "target": (
        compress(more="--target-sparsity 1.5"),
        r"Target\(sparsity=1\.5\) cannot be met\. Expected a number above 0 and below 1",
    ),
    "drop": (
        compress(more="--max-accuracy-drop -1"),
        r"Target\(max_accuracy_drop=-1\.0\) cannot be met\. Expected a number of at least 0",
    ),
    "drop and size": (
        compress(more="--max-accuracy-drop 0.01 --target-bytes 900"),
        r"--target-bytes: not allowed with argument --max-accuracy-drop",
    ),
    "drop and curriculum": (
        compress(more="--max-accuracy-drop 0.01 --curriculum staged"),
        r"curriculum='staged' does not go with Target\(max_accuracy_drop=0\.01\)",
    ),
    "curriculum": (
        compress(more="--curriculum stages"),
        r"--curriculum: invalid choice: 'stages' \(choose from .*staged",
    ),
    "seed": (compress(more="--seed -1"), r"seed=-1 cannot be used\. Expected a whole number"),
    "foreign folder": (
        compress(more="--output {shared}/foreign"),
        r"foreign' is not empty and holds no run of this package\. Choose another",
    ),
    "foreign folder, overwriting": (
        compress(more="--output {shared}/foreign --overwrite"),
        r"foreign' is not empty and holds no run of this package\. Choose another",
    ),
    "finished run": (
        compress(more="--output {shared}/finished"),
        r"holds a finished run\. Choose another folder, or pass --overwrite",
    ),
    "uncompiled": (
        compress("uncompiled.keras"),
        r"is saved without a loss.*Pass --loss, for example --loss sparse_categorical_crossentropy",
    ),
    "unknown loss": (
        compress("uncompiled.keras", more="--loss sparse_crossentropy"),
        r"--loss sparse_crossentropy is not known\. Expected .* such as .* or mse\.$",
    ),
    "misspelt loss": (
        compress("uncompiled.keras", more="--loss sparse_categorical_crosentropy"),
        r"is not known\. Expected .* Did you mean 'sparse_categorical_crossentropy'\?$",
    ),
    "loss of other labels": (
        compress("uncompiled.keras", more="--loss categorical_crossentropy"),
        r"train has labels of shape \(\) per row; .*use the loss sparse_categorical_crossentropy",
    ),
    "demo: target": (
        "demo --target-sparsity 0",
        r"Target\(sparsity=0\.0\) cannot be met\. Expected",
    ),
    "demo: no episode": ("demo --episodes 0", r"episodes=0 cannot be used\. Expected a whole"),
    "demo: epochs": ("demo --finetune-epochs -1", r"finetune_epochs=-1 cannot be used\. Expected"),
    "demo: seed": ("demo --seed -1", r"seed=-1 cannot be used\. Expected a whole number"),
    "demo: memory": (
        "demo --dataset mnist --memory-limit-mb 0",
        r"memory_limit_mb=0\.0 cannot be used\. Expected",
    ),
    "demo: finished run": (
        "demo --output {shared}/finished",
        r"finished' holds a finished run\. Choose another folder\.$",
    ),
    "demo: foreign folder": (
        "demo --output {shared}/foreign",
        r"foreign' is not empty and holds no run of this package\. Choose another",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", COMMANDS)
def test_a_wrong_command_is_refused_in_one_line(case, files, capfd):
    command, pattern = COMMANDS[case]
    arguments = arguments_of(command, files)
    capfd.readouterr()
    try:
        code: Any = main(arguments)
    except SystemExit as ended:
        code = ended.code
    printed = capfd.readouterr()
    assert code == 2
    assert set(printed.out.splitlines()) <= set(PHASES.values())  # what it was about to do
    (line,) = printed.err.splitlines()
    assert line.startswith("rl-sparsity")
    assert re.search(pattern, line), line


RIGHT = {"compress": (compress(), SearchLoop), "demo": ("demo --output {place}/run", demo)}


@pytest.mark.parametrize("case", RIGHT)
def test_commands_without_the_mistake_get_to_work(case, shared, tmp_path):
    command, owner = RIGHT[case]
    tiny()
    with quick_search(), nothing_runs(owner), pytest.raises(StartedError):
        main(arguments_of(command, Files(shared, tmp_path)))
