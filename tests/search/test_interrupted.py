"""Searches that are killed, interrupted or changed go on to the same bits, or say why not."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import damaged_runs
import interrupted_runs
import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
import tiny_search as tiny
from channel_search import table_for
from channel_search import trained as bars
from interrupted_runs import KINDS, bits_of, child, compared, lines_of, same_names, until

import rl_sparsity_tf as rls
from rl_sparsity_tf import cli
from rl_sparsity_tf.console import Interruption
from rl_sparsity_tf.environment.layer_environment import LayerEnvironment
from rl_sparsity_tf.errors import FileExistsRLSparsityError, RunError
from rl_sparsity_tf.search import arguments as decision_choice
from rl_sparsity_tf.search import compressor as search_module
from rl_sparsity_tf.search.fingerprints import describe, describe_compilation, describe_model
from rl_sparsity_tf.search.run_directory import RunDirectory
from rl_sparsity_tf.search.run_files import differences_of, versions

layers = keras.layers


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with interrupted_runs.quick():
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A staged search that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    same_names()
    return bits_of(KINDS["curriculum"](folder), folder)


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory):
    """A staged search that was killed behind a checkpoint, to go on from in a copy."""
    folder = tmp_path_factory.mktemp("cut off") / "run"
    same_names()
    assert interrupted_runs.killed(KINDS["curriculum"], folder, 30, after=True)
    assert tiny.journal_of(folder)
    return folder


# ---------------------------------------------------------------------------- kills


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "moments"),
    [("curriculum", [2, 5, 9, 20]), ("latency", [2, 9, 24]), ("improve", [3, 11])],
    ids=["curriculum", "latency", "improve"],
)
def test_a_killed_search_goes_on_to_the_same_bits(kind, moments, whole, tmp_path):
    run, folder = KINDS[kind], tmp_path / "killed"
    if kind != "curriculum":
        run = functools.partial(run, finetune_epochs=0, finalists=1)
        same_names()
        whole = bits_of(run(tmp_path / "whole"), tmp_path / "whole")
    for number, moment in enumerate(moments):
        same_names()
        assert interrupted_runs.killed(run, folder, moment, after=number % 2 == 0) is not None
    same_names()
    interrupted_runs.MEASURED[0] = 1  # measured again, the layers' times would be others
    assert compared(bits_of(run(folder), folder), whole) == "same"


@pytest.mark.slow
def test_a_search_killed_in_the_final_falls_back_on_the_same_plans(whole, tmp_path):
    """What was proposed before the last stage is a part of the final, and of no checkpoint."""
    seen = []
    real = search_module.play_final

    def watched(task, finalists, others, *args, **kwargs):
        seen.append([(name, plan.to_json()) for name, plan in others])
        if len(seen) == 1:
            raise tiny.StoppedError
        return real(task, finalists, others, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_module, "play_final", watched)
        same_names()
        with pytest.raises(tiny.StoppedError):
            KINDS["curriculum"](tmp_path / "run")
        same_names()
        result = KINDS["curriculum"](tmp_path / "run")
    assert seen[0]
    assert seen[0] == seen[1]
    assert compared(bits_of(result, tmp_path / "run"), whole) == "same"


@pytest.mark.slow
def test_checkpoints_that_are_gone_begin_the_search_again(whole, cut_off, tmp_path):
    folder = shutil.copytree(cut_off, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")
    same_names()
    assert compared(bits_of(KINDS["curriculum"](folder), folder), whole) == "same"


@pytest.mark.slow
def test_a_run_of_format_1_goes_on_to_the_same_bits(whole, cut_off, tmp_path):
    folder = shutil.copytree(cut_off, tmp_path / "run")
    tiny.strip_seals(folder)
    same_names()
    assert compared(bits_of(KINDS["curriculum"](folder), folder), whole) == "same"
    assert json.loads((folder / "manifest.json").read_text())["format_version"] == 1


@pytest.mark.slow
def test_killed_processes_leave_what_another_goes_on_from(whole, tmp_path):
    folder = tmp_path / "run"
    process = child(folder, "curriculum")
    until(process, folder, 3)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    same_names()
    again = KINDS["curriculum"](folder)
    assert compared(bits_of(again, folder), whole) == "same"


# ---------------------------------------------------------------------------- damaged folders


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["curriculum", "accuracy drop"])
def test_damaged_folders_are_refused_or_make_no_difference(kind, tmp_path):
    bench = damaged_runs.Bench(kind, tmp_path)
    rng = np.random.default_rng(7)
    for old in (False, True):
        for mutation in damaged_runs.MUTATIONS:
            what, outcome = damaged_runs.mutated(bench, mutation, rng, tmp_path, old)
            assert outcome.startswith(("same", "refused", "forged")), f"{what}: {outcome}"


# ---------------------------------------------------------------------------- other names


def unnamed(tail: int = 3, activation: str = "relu") -> keras.Model:
    """Its layers have the names that Keras gives them, which count up in a process."""
    stack = [layers.Dense(8, activation=activation), layers.Dense(tail, activation="softmax")]
    model = keras.Sequential([layers.Input((6,)), *stack])
    model.compile("adam", "sparse_categorical_crossentropy", ["accuracy"])
    rng = np.random.default_rng(0)
    model.set_weights([rng.normal(size=w.shape).astype(np.float32) for w in model.get_weights()])
    return model


def staged(model: keras.Model, folder: Path) -> rls.Compressor:
    return tiny.compressor(
        model, "random", directory=folder, curriculum=interrupted_runs.STAGED, recovery="none"
    )


@pytest.mark.slow
def test_a_model_that_is_made_again_goes_on_under_its_new_names(tmp_path):
    result = tiny.search(staged(unnamed(), tmp_path / "whole"), finetune_epochs=1)
    tiny.interrupt(staged(unnamed(), tmp_path / "run"), after=3 * 6 + 2, finetune_epochs=1)
    model = unnamed()
    assert model.layers[0].name not in {one.name for one in result.model.layers}
    again = tiny.search(staged(model, tmp_path / "run"), finetune_epochs=1)
    assert set(again.plan.kernels) == {f"{one.name}/kernel" for one in model.layers}
    assert tiny.figures_of(again.history) == tiny.figures_of(result.history)
    for one, other in zip(result.plan.kernels.values(), again.plan.kernels.values(), strict=True):
        np.testing.assert_array_equal(one.operations, other.operations)
    for one, other in zip(result.model.get_weights(), again.model.get_weights(), strict=True):
        assert one.tobytes() == other.tobytes()
    figures = [one.metrics["search"]["evaluations"] for one in (result, again)]
    assert figures[0] == figures[1]


# ---------------------------------------------------------------------------- changed calls


class Scaled(layers.Layer):
    """A layer of the user's, with a setting."""

    def __init__(self, factor: float = 1.0, **options):
        super().__init__(**options)
        self.factor = factor

    def call(self, inputs):
        return inputs * self.factor


def weighted(weight: float):
    def loss(wanted, given):
        return weight * tf.reduce_mean(tf.square(wanted - given))

    return loss


def described(
    *,
    activation="relu",
    rate=1e-2,
    loss=None,
    factor=2.0,
    constant=1.0,
    turned=False,
    function=None,
    k=1,
    trainable=True,
):
    """What a manifest says of a model that has a bit of everything."""
    inputs = layers.Input((6,))
    one, other = layers.Dense(4, activation=activation)(inputs), layers.Dense(4)(inputs)
    x = tf.subtract(other, one) if turned else tf.subtract(one, other)
    x = Scaled(factor)(x + constant)
    x = layers.Lambda(function or (lambda x: x * 2))(x)
    outputs = layers.Dense(3, trainable=trainable)(x)
    model = keras.Model(inputs, outputs)
    loss = loss or keras.losses.CategoricalCrossentropy(from_logits=True)
    metrics = [keras.metrics.TopKCategoricalAccuracy(k=k), keras.metrics.AUC()]
    model.compile(keras.optimizers.Adam(rate), loss, metrics)
    return json.loads(json.dumps([describe_model(model), describe_compilation(model)]))


DECAY = keras.optimizers.schedules.CosineDecay
CHANGES = {
    "activation": ({"activation": "tanh"}, r"config\.activation \('relu', now 'tanh'\)"),
    "learning rate": ({"rate": 1e-3}, r"optimizer\.config\.learning_rate \(0\.00999.*, now 0\.001"),
    "schedule": ({"rate": DECAY(1e-2, 10)}, r"optimizer\.config\.learning_rate \(.*CosineDecay"),
    "loss": ({"loss": "mse"}, r"loss \(.*, now 'mse'\)"),
    "loss's argument": (
        {"loss": keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)},
        r"loss\.config\.label_smoothing \(0\.0, now 0\.1\)",
    ),
    "loss of one's own": ({"loss": weighted(1.0)}, r"loss\."),
    "setting of a layer": ({"factor": 3.0}, r"factor \(2\.0, now 3\.0\)"),
    "constant": ({"constant": 5.0}, r"connections.* \(1\.0, now 5\.0\)"),
    "connections": ({"turned": True}, r"activation \('relu', now 'linear'\)|connections"),
    "function": ({"function": lambda x: x * 3}, r"functions 1\.code"),
    "metric's argument": ({"k": 2}, r"metrics 1\.config\.k \(1, now 2\)"),
    "frozen": ({"trainable": False}, r"trainable \(True, now False\)"),
}


def differences(one, other) -> str:
    parts = ({"arguments": {}, "fingerprints": {"x": value}} for value in (one, other))
    return "; ".join(differences_of(*parts, is_sealed=True))


def test_every_change_of_a_model_is_noticed_and_named():
    before = described()
    assert differences(before, described()) == ""  # though Keras has counted on
    for what, (change, message) in CHANGES.items():
        found = differences(before, described(**change))
        assert re.search(message, found), f"{what}: {found}"
    assert differences(described(loss=weighted(1.0)), described(loss=weighted(1.0))) == ""
    assert "loss.code" in differences(described(loss=weighted(1.0)), described(loss=weighted(2.0)))
    shorter, longer = (described(rate=DECAY(1e-2, steps)) for steps in (10, 20))
    assert "decay_steps (10, now 20)" in differences(shorter, longer)


def test_descriptions_of_all_kinds_of_models_are_json_and_know_them_again():
    from zoo import ZOO

    class Outer(keras.Model):
        def __init__(self, factor):
            super().__init__()
            self.inner, self.factor = layers.Dense(3), factor
            self.own = self.add_weight(name="own", shape=(3,))

        def call(self, inputs):
            return self.inner(inputs) * self.factor + self.own

    def outer(factor=1.0):
        model = Outer(factor)
        model.build((None, 4))
        model.set_weights([np.ones(w.shape) for w in model.get_weights()])
        return model

    for name, build in {**ZOO, "subclassed": outer}.items():
        one, _, other = build(), layers.Dense(3), build()
        texts = [json.dumps([describe_model(m), describe_compilation(m)]) for m in (one, other)]
        assert texts[0] == texts[1], name
    assert "attributes.factor (1.0, now 2.0)" in differences(
        describe_model(outer()), describe_model(outer(2.0))
    )
    changed = outer()
    changed.own.assign_add([1.0, 0.0, 0.0])
    assert "own_weights" in differences(describe_model(outer()), describe_model(changed))


def test_odd_settings_can_be_described():
    circle: list = []
    circle.append(circle)
    big = np.arange(100)
    found = describe([circle, {1, 2}, big, big + 1, b"x", "y" * 999, tf.float32, {"name": "n"}])
    assert json.loads(json.dumps(found)) == found
    assert found[2] != found[3]
    assert found[1] == [1, 2]


def test_changed_calls_are_refused_by_what_has_changed(tmp_path):
    """Batch size, activation, rate, loss and reward; the search itself does not begin."""
    folder = tmp_path / "run"

    def call(model=None, *, options=(), **arguments):
        one = tiny.compressor(model or tiny.trained(), "random", directory=folder, **dict(options))
        tiny.search(one, **arguments)

    def model(activation="relu", **compiled):
        changed = tiny.trained()
        if activation != "relu":
            changed.layers[0].activation = keras.activations.get(activation)
        arguments = {"optimizer": keras.optimizers.Adam(1e-2), "metrics": ["accuracy"]}
        arguments |= {"loss": "sparse_categorical_crossentropy", **compiled}
        changed.compile(**arguments)
        return changed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDirectory, "start", _started_and_stopped)
        with pytest.raises(tiny.StoppedError):
            call()
    sparse = keras.losses.SparseCategoricalCrossentropy
    for arguments, message in (
        ({"batch_size": 16}, r"differs in batch_size \(32, now 16\)\. Call with the same"),
        ({"model": model("tanh")}, r"config\.activation \('relu', now 'tanh'\)\. Call"),
        ({"model": model(optimizer="sgd")}, r"compiled\.optimizer\.class \('Adam', now 'SGD'\)"),
        (
            {"model": model(optimizer=keras.optimizers.Adam(1e-3))},
            r"differs in compiled\.optimizer\.config\.learning_rate \(0\.00999",
        ),
        (
            {"model": model(loss=sparse(ignore_class=2))},
            r"compiled\.loss \('sparse.*, now \{'class'",
        ),
        ({"options": {"reward": lambda outcome, _: outcome.metric}}, r"differs in reward \("),
    ):
        with pytest.raises(FileExistsRLSparsityError, match=message):
            call(**arguments)
    with pytest.MonkeyPatch.context() as patch:
        now = {**versions(), "numpy": "9.9"}
        patch.setattr("rl_sparsity_tf.search.run_directory.versions", lambda: now)
        with pytest.raises(RunError, match=r"begun with other versions: numpy \("):
            call()
    with pytest.raises(
        rls.ArgumentError, match=r"any_versions='yes' cannot be used\. Expected True"
    ):
        call(any_versions="yes")


def _started_and_stopped(self: RunDirectory) -> None:
    _start(self)
    raise tiny.StoppedError


_start = RunDirectory.start


def test_two_rewards_of_one_name_are_told_apart(tmp_path):
    def search(weight):
        def reward(outcome, previous):
            return weight * outcome.metric

        tiny.search(tiny.compressor(tiny.trained(), "random", directory=tmp_path, reward=reward))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDirectory, "start", _started_and_stopped)
        with pytest.raises(tiny.StoppedError):
            search(0.5)
        with pytest.raises(tiny.StoppedError):
            search(0.5)
    with pytest.raises(FileExistsRLSparsityError, match=r"differs in reward_code\.code\."):
        search(0.6)


def test_rows_between_those_of_the_sample_are_noticed_too():
    from rl_sparsity_tf.search.fingerprints import fingerprints_of

    x, y = np.zeros((9000, 6), np.float32), np.zeros(9000, np.int64)
    model = tiny.untrained()
    before = fingerprints_of(model, (x, y, None), None, [], None)
    x[1] = 1
    after = fingerprints_of(model, (x, y, None), None, [], None)
    assert {name for name in before if before[name] != after[name]} <= {"rows", "train"}
    assert before["rows"] != after["rows"]


# ---------------------------------------------------------------------------- measured times


def test_times_that_were_measured_are_kept(tmp_path):
    model, target = bars(), rls.Target(latency=0.5)
    table = table_for(model)
    decisions = decision_choice.decisions_for(model, target, "channel", table, "plan")
    with RunDirectory(tmp_path, {}, {}) as run:
        run.start()
        assert decision_choice.kept_table(model, target, run) is None
        decision_choice.keep_table(decisions, run)
        run.save_checkpoint("latest", {"x": np.zeros(1)})

    def kept(of=model, **options):
        with RunDirectory(tmp_path, {}, {}, **options) as run:
            return decision_choice.kept_table(of, target, run)

    assert kept().to_dict() == table.to_dict()
    others = {f"layer {n}": times for n, times in enumerate(table.layers.values())}
    renamed = dataclasses.replace(table, layers=others)  # as they were called in another process
    run.save_checkpoint("times", {"table": np.array(json.dumps(renamed.to_dict()))})
    assert kept().to_dict() == table.to_dict()
    with pytest.raises(RunError, match=r"times\.npz' cannot be read"):
        kept(tiny.trained())
    (tmp_path / "checkpoints" / "times.npz").unlink()
    with pytest.raises(RunError, match=r"lacks the times .*Measured again they would be others"):
        kept()
    assert kept(any_versions=True) is None


@pytest.mark.slow
def test_another_latency_table_does_not_continue_a_run(tmp_path):
    from channel_search import TRAIN, VALIDATION

    def search(factor):
        table = table_for(bars())
        for layer in table.layers.values():
            object.__setattr__(layer, "ms", layer.ms * factor)
        one = rls.Compressor(
            bars(), rls.Target(latency=0.5), "random", directory=tmp_path, latency_table=table
        )
        one.search(TRAIN, validation_data=VALIDATION, verbose=0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDirectory, "start", _started_and_stopped)
        for _ in range(2):
            same_names()
            with pytest.raises(tiny.StoppedError):
                search(1.0)
    with pytest.raises(FileExistsRLSparsityError, match=r"differs in latency_table \('"):
        search(2.0)


# ---------------------------------------------------------------------------- Ctrl-C


def interrupted_at(patch, decisions: list[int]) -> None:
    """Ctrl-C is pressed at some decisions of a search."""
    taken = iter(range(10**6))
    step = LayerEnvironment._step

    def stepping(self, action):
        number = next(taken)
        if number in decisions:
            signal.raise_signal(signal.SIGINT)
        return step(self, action)

    patch.setattr(LayerEnvironment, "_step", stepping)


@pytest.fixture
def usual_handler():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_ctrl_c_ends_after_the_episode_and_the_same_call_goes_on(
    whole, tmp_path, usual_handler, capsys
):
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        interrupted_at(patch, [6 + 2])
        same_names()
        with pytest.raises(rls.SearchInterrupted) as caught:
            KINDS["curriculum"](folder, verbose=1)
    said = f"interrupted after episode 2. The same call continues it from {str(folder)!r}."
    assert str(caught.value).endswith(said)
    assert (caught.value.episodes, caught.value.directory) == (2, str(folder))
    assert isinstance(caught.value, KeyboardInterrupt)
    assert not isinstance(caught.value, Exception)
    assert "ending after this episode; Ctrl-C again leaves at once\n" in capsys.readouterr().out
    assert rls.strip(rls.wrap(tiny.trained(), caught.value.plan)).count_params() == 83
    assert len(tiny.journal_of(folder)) == 2
    same_names()
    result = KINDS["curriculum"](folder, verbose=1)
    assert "going on after episode 2 of 4\n" in capsys.readouterr().out
    assert compared(bits_of(result, folder), whole) == "same"


def test_a_second_ctrl_c_leaves_at_once_and_without_a_folder_the_plan_is_kept(usual_handler):
    one = tiny.compressor(tiny.trained(), "random", recovery="none", warm_start=False)
    with pytest.MonkeyPatch.context() as patch:
        interrupted_at(patch, [6 + 2, 6 + 3])
        with pytest.raises(KeyboardInterrupt) as caught:
            tiny.search(one)
    assert not isinstance(caught.value, rls.SearchInterrupted)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.MonkeyPatch.context() as patch:
        interrupted_at(patch, [2])
        with pytest.raises(rls.SearchInterrupted, match=r"best plan so far is in this error"):
            tiny.search(one)


def test_handlers_of_the_callers_and_other_threads_are_left_alone():
    def own(number, frame):
        pass

    before = signal.signal(signal.SIGINT, own)
    try:
        with Interruption() as interruption:
            signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is own
        assert not interruption.requested
    finally:
        signal.signal(signal.SIGINT, before)
    found = []

    def elsewhere():
        with Interruption() as interruption:
            found.append(interruption.requested)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [False]


@pytest.mark.parametrize(
    ("overwrite", "files", "message"),
    [
        ([], ["manifest.json"], "after episode 3; the same command goes on from {}"),
        (["--overwrite"], ["manifest.json"], "after episode 3; the same command without --overwr"),
        ([], ["manifest.json", "metrics.json"], "after episode 3; the result is in {}"),
        ([], [], "after episode 3\n"),
    ],
)
def test_the_command_says_how_to_go_on(overwrite, files, message, tmp_path, monkeypatch, capsys):
    def interrupted(_):
        raise rls.SearchInterrupted("", episodes=3, directory=str(tmp_path), plan=None)

    monkeypatch.setattr(cli, "_compress", interrupted)
    for name in files:
        (tmp_path / name).touch()
    arguments = ["compress", "m.keras", "--data", "d.npz", "--output", str(tmp_path), *overwrite]
    assert cli.main(arguments) == 130
    error = capsys.readouterr().err
    assert error.startswith(f"rl-sparsity compress: interrupted {message.format(tmp_path)}")
    assert error.count("\n") == 1


def test_ctrl_c_while_libraries_are_loaded_is_a_line_too(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("rl_sparsity_tf.console._import_silently", interrupted)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "rl-sparsity demo: interrupted\n"


@pytest.mark.slow
def test_a_command_ends_by_ctrl_c_without_a_traceback(tmp_path):
    """An episode's end; and the same command again, in the same process, with two at once."""
    model = tiny.wide()
    model.save(tmp_path / "model.keras")
    (x, y), (xv, yv) = tiny.WIDE_TRAIN, tiny.WIDE_VALIDATION
    np.savez(tmp_path / "data.npz", x_train=x, y_train=y, x_validation=xv, y_validation=yv)
    folder = tmp_path / "run"
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from rl_sparsity_tf.cli import main; "
        "first = main(); print(f'ended with {first}', flush=True); sys.exit(main())"
    )
    command = [*interrupted_runs.PYTHON, "-c", code, "compress", str(tmp_path / "model.keras")]
    command += ["--data", str(tmp_path / "data.npz"), "--output", str(folder), "--verbose", "2"]
    command += ["--episodes", "1000", "--finetune-epochs", "1", "--recovery", "none"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=interrupted_runs.environment(),
    ) as process:
        until(process, folder, 2)
        process.send_signal(signal.SIGINT)
        first = ""
        while not first.endswith("ended with 130\n") and process.poll() is None:
            first += process.stdout.readline()
        until(process, folder, lines_of(folder) + 2)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
        second, error = process.stdout.read(), process.stderr.read()
    assert process.returncode == 130, error
    assert "ending after this episode" in first
    assert "going on after episode" in second
    said = error.splitlines()
    assert len(said) == 2, error
    for line in said:
        assert line.startswith("rl-sparsity compress: interrupted"), error
        assert line.endswith(f"; the same command goes on from {folder}")
