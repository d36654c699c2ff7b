"""What callbacks are told of a search, how they end it, and that they change nothing else."""

from __future__ import annotations

import csv
import io
import json
import random
import re

import numpy as np
import pytest
import tf_keras as keras
from rich.console import Console
from tiny_search import (
    compressor,
    figures_of,
    journal_of,
    quick_search,
    search,
    trained,
)

import rl_sparsity_tf as rls
from rl_sparsity_tf import callbacks
from rl_sparsity_tf.console import SearchProgress
from rl_sparsity_tf.search import compressor as search_module


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick_search():
        yield


class Notes(callbacks.Callback):
    """Notes everything, and meddles with all that a callback may."""

    def __init__(self):
        self.told = []

    def _note(self, *what):
        random.seed(0)
        np.random.rand(3)  # noqa: NPY002
        self.told.append(what)

    def on_search_begin(self, logs):
        self._note("begin", dict(logs))
        logs.clear()

    def on_search_end(self, logs):
        self._note("end", logs)

    def on_phase_begin(self, phase, logs):
        self._note("phase", phase, logs)

    def on_phase_end(self, phase, logs):
        self._note("phase end", phase, logs)

    def on_episode_end(self, episode, logs):
        self._note("episode", episode, dict(logs))
        logs.clear()

    def on_evaluation(self, logs):
        self._note("evaluation", logs)

    def on_trial_end(self, trial, logs):
        self._note("trial", trial, logs)

    def of(self, kind):
        return [what[1:] for what in self.told if what[0] == kind]


class FailingError(Exception):
    pass


class Failing(callbacks.Callback):
    """Raises after an episode."""

    def __init__(self, episode):
        self.episode = episode

    def on_episode_end(self, episode, logs):
        if episode == self.episode:
            raise FailingError(f"after episode {episode}")


class Stops(callbacks.Callback):
    """Ends the stage, or all, after an episode."""

    def __init__(self, episode, everything):
        self.episode, self.everything = episode, everything

    def on_episode_end(self, episode, logs):
        if episode == self.episode:
            self.stop_episodes() if self.everything else self.stop_stage()


def digest(result):
    metrics = {name: one for name, one in result.metrics.items() if name != "search"}
    return (
        figures_of(result.history),
        result.plan.to_json(),
        json.dumps(metrics),
        [weight.tobytes() for weight in result.model.get_weights()],
    )


CLOSED = {"recovery": "least_squares"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A search that nobody watches."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    return search(compressor(trained(), directory=folder, **CLOSED), finetune_epochs=2)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """The same search with every callback there is; the callbacks, and their folder."""
    folder = tmp_path_factory.mktemp("watched")
    notes = Notes()
    found = [
        notes,
        callbacks.TensorBoard(folder / "logs"),
        callbacks.CSVLogger(folder / "log.csv"),
        callbacks.EarlyStopping(patience=50),
        callbacks.TimeLimit(seconds=1e6),
    ]
    epochs = []
    keras_callback = keras.callbacks.LambdaCallback(on_epoch_end=lambda n, logs: epochs.append(n))
    one = compressor(trained(), directory=folder / "run", **CLOSED)
    result = search(one, callbacks=found, finetune_callbacks=[keras_callback])
    return result, notes, folder, epochs


def test_a_search_ends_in_the_same_bits_whoever_watches(plain, watched):
    assert digest(watched[0]) == digest(plain)


def test_every_episode_is_told_with_its_figures(watched):
    result, notes, _, _ = watched
    episodes = notes.of("episode")
    assert [number for number, _ in episodes] == [0, 1, 2, 3]
    best = -1.0
    for (_, logs), entry in zip(episodes, result.history, strict=True):
        assert logs["value"] == entry["reward"]
        assert (logs["metric"], logs["loss"]) == (
            entry["validation_metric"],
            entry["validation_loss"],
        )
        assert logs["plan"].count_operations() == logs["operations"] == entry["operations"]
        assert logs["bytes"] is None
        best = max(best, logs["best_value"])
        assert logs["best_value"] == best >= logs["value"]
        assert logs["improved"] == (logs["value"] == best and entry["improved"])


def test_the_hooks_say_what_their_docstrings_list(watched):
    _, notes, _, _ = watched
    for kind, hook in (
        ("begin", "on_search_begin"),
        ("end", "on_search_end"),
        ("phase", "on_phase_begin"),
        ("phase end", "on_phase_end"),
        ("episode", "on_episode_end"),
        ("evaluation", "on_evaluation"),
    ):
        text = getattr(callbacks.Callback, hook).__doc__.partition("logs: ")[2]
        for *_, logs in notes.of(kind):
            listed = set(re.findall(r"`(\w+)`", text))
            assert not set(logs) - listed, (hook, set(logs) - listed)


def test_phases_come_in_pairs_by_the_names_that_are_listed(watched):
    _, notes, _, _ = watched
    open_, seen = [], []
    for kind, name, *_ in [what for what in notes.told if what[0].startswith("phase")]:
        if kind == "phase":
            open_.append(name)
            seen.append(name)
        else:
            assert open_.pop() == name
    assert not open_
    assert seen == [
        *("measuring", "preparing", "dense_files", "warm_start", "episodes", "reranking"),
        *("fine_tuning", "export", "saving"),
    ]
    assert set(seen) < set(callbacks.PHASES)
    assert all(name in callbacks.__doc__ for name in map(str.upper, callbacks.PHASES))


def test_every_distinct_plan_is_told_once(watched):
    result, notes, _, _ = watched
    numbers = [logs["evaluation"] for (logs,) in notes.of("evaluation")]
    assert numbers == list(range(1, len(numbers) + 1))
    # The final evaluates more.
    played = result.history[-1]["evaluations"]
    assert played <= len(numbers) <= result.metrics["search"]["evaluations"]
    proposers = {logs["proposed_by"] for (logs,) in notes.of("evaluation")}
    assert {"dqn", "lamp", "dynamic_programming"} <= proposers
    episodes = {logs["episode"] for (logs,) in notes.of("evaluation")}
    assert episodes <= {None, 0, 1, 2, 3}


def test_beginning_and_end_are_told(watched):
    result, notes, folder, _ = watched
    ((begun,),) = notes.of("begin")
    assert (begun["resumed"], begun["episode"], begun["episodes"]) == (False, 0, 4)
    assert begun["directory"] == str(folder / "run")
    assert begun["target"] == {"sparsity": 0.6}
    ((ended,),) = notes.of("end")
    assert ended["result"] is result
    assert ended["error"] is None


def test_tensorboard_reads_what_was_written(watched):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    result, notes, folder, _ = watched
    events = EventAccumulator(str(folder / "logs"), size_guidance={"tensors": 0})
    events.Reload()

    def series(tag):
        return {e.step: float(make_ndarray(e.tensor_proto)) for e in events.Tensors(tag)}

    values = {n: np.float32(entry["reward"]) for n, entry in enumerate(result.history)}
    assert series("search/value") == pytest.approx(values)
    layers = {logs["plan"].kernels["first/kernel"].sparsity for _, logs in notes.of("episode")}
    assert set(series("sparsity/first/kernel").values()) == {float(np.float32(n)) for n in layers}
    tags = set(events.Tags()["tensors"])
    assert {"search/best_value", "search/metric", "sparsity/last/kernel"} <= tags
    assert {"operations/prune", "evaluation/value", "seconds/fine_tuning"} <= tags
    assert {tag for tag in tags if tag.startswith("agent/")} == {"agent/td_loss", "agent/epsilon"}
    shares = [series(f"operations/{name}")[0] for name in result.history[0]["operations"]]
    assert sum(shares) == pytest.approx(1.0)
    assert "search/bytes" not in tags  # not known for a sparsity


def rows_of(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_has_a_line_per_episode(watched):
    result, _, folder, _ = watched
    rows = rows_of(folder / "log.csv")
    assert [float(row["value"]) for row in rows] == [e["reward"] for e in result.history]
    assert [row["trial"] for row in rows] == [""] * 4
    assert tuple(rows[0]) == callbacks.CSVLogger.COLUMNS


def test_keras_callbacks_see_the_final_fine_tuning(watched):
    assert watched[3] == [0, 1]


def test_a_keras_callback_can_end_the_fine_tuning():
    epochs = []

    class Ends(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            epochs.append(epoch)
            self.model.stop_training = True

    one = compressor(trained(), recovery="none")
    search(one, episodes=1, finetune_epochs=3, finetune_callbacks=[Ends()])
    assert set(epochs) == {0}


# -- exceptions and resumption --------------------------------------------------------------------


@pytest.mark.slow
def test_a_callback_that_raises_leaves_a_run_that_goes_on_to_the_same_bits(plain, tmp_path):
    folder = tmp_path / "run"
    log, board = callbacks.CSVLogger(tmp_path / "log.csv"), callbacks.TensorBoard(tmp_path / "b")
    notes = Notes()
    given = [notes, log, board, Failing(1)]
    with pytest.raises(FailingError, match="after episode 1"):
        search(compressor(trained(), directory=folder, **CLOSED), callbacks=given)
    ((ended,),) = notes.of("end")
    assert ended["result"] is None
    assert isinstance(ended["error"], FailingError)
    assert len(journal_of(folder)) == 2
    again = Notes()
    given = [again, log, board]
    result = search(compressor(trained(), directory=folder, **CLOSED), callbacks=given)
    assert digest(result) == digest(plain)
    ((begun,),) = again.of("begin")
    assert (begun["resumed"], begun["episode"]) == (True, 2)
    assert [one["value"] for one in begun["history"]] == [e["reward"] for e in plain.history[:2]]
    assert [number for number, _ in again.of("episode")] == [2, 3]
    told = [one["evaluation"] for (one,) in (*notes.of("evaluation"), *again.of("evaluation"))]
    assert told == list(range(1, len(told) + 1))
    assert len(told) >= plain.history[-1]["evaluations"]
    assert [row["episode"] for row in rows_of(log.path)] == ["0", "1", "2", "3"]


@pytest.mark.slow
@pytest.mark.parametrize("patience", [1, 2])
def test_patience_ends_the_episodes_and_a_killed_final_knows_it(plain, tmp_path, patience):
    values = [entry["reward"] for entry in plain.history]
    best = np.maximum.accumulate(values)
    waited = [n - int(np.argmax(best == best[n])) for n in range(len(values))]
    expected = next((n + 1 for n, one in enumerate(waited) if one >= patience), len(values))
    one = compressor(trained(), directory=tmp_path / "run", **CLOSED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_module, "play_final", fail)
        with pytest.raises(FailingError):
            search(one, callbacks=[callbacks.EarlyStopping(patience=patience)])
    assert len(journal_of(tmp_path / "run")) == expected
    result = search(one)  # nobody asks for an end any more
    assert figures_of(result.history) == figures_of(plain.history[:expected])
    assert result.metrics["search"]["episodes"] == expected
    whole = search(compressor(trained(), **CLOSED), callbacks=[Stops(expected - 1, True)])
    assert digest(whole) == digest(result)


def fail(*_, **__):
    raise FailingError


@pytest.mark.slow
def test_patience_looks_back_at_the_episodes_before_a_kill(plain, tmp_path):
    """The kill came behind the episode that it was to end with."""
    one = compressor(trained(), directory=tmp_path / "run", **CLOSED)
    stopping = callbacks.EarlyStopping(patience=1, min_delta=2.0)  # after the second
    with pytest.raises(FailingError):
        search(one, callbacks=[Failing(1), stopping])
    result = search(one, callbacks=[callbacks.EarlyStopping(patience=1, min_delta=2.0)])
    assert figures_of(result.history) == figures_of(plain.history[:2])


def test_a_time_limit_ends_the_episodes_and_the_best_plan_is_finished():
    result = search(compressor(trained(), **CLOSED), callbacks=[callbacks.TimeLimit(1e-3)])
    assert result.metrics["search"]["episodes"] == 1
    assert result.report is not None


@pytest.mark.slow
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("strategy", ["construct", "improve"])
def test_a_stage_that_is_ended_early_is_followed_by_the_next(tmp_path, everything, strategy):
    options = {"curriculum": rls.Staged(stages=(0.5, 0.8, 1.0)), "strategy": strategy, **CLOSED}
    stop = {"episodes": 9, "callbacks": [Stops(1, everything)]}
    whole = search(compressor(trained(), **options), **stop)
    shares = [entry["stage"] for entry in whole.history]
    assert shares[:2] == [0.5, 0.5]
    assert shares[2:] == ([] if everything else [0.8] * 3 + [1.0] * 3)
    assert whole.plan.sparsity >= 0.5  # of the full target, 0.6 of all weights
    cut = compressor(trained(), directory=tmp_path / "run", **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_module, "play_final", fail)
        with pytest.raises(FailingError):
            search(cut, **stop)
    assert digest(search(cut, episodes=9)) == digest(whole)
    if not everything:
        again = compressor(trained(), directory=tmp_path / "again", **options)
        with pytest.raises(FailingError):
            search(again, episodes=9, callbacks=[Stops(1, False), Failing(3)])
        assert digest(search(again, episodes=9)) == digest(whole)


# -- wrong callbacks ------------------------------------------------------------------------------


def test_wrong_callbacks_are_refused_before_anything_is_read():
    one = compressor(trained())
    wrong = (
        ({"callbacks": [callbacks.EarlyStopping]}, r"the class EarlyStopping\. Expected an inst"),
        ({"callbacks": callbacks.EarlyStopping()}, r"callbacks is a EarlyStopping\. Expected a l"),
        ({"callbacks": [print]}, r"builtin_function_or_method, which is no rls\.callbacks\.Callb"),
        ({"callbacks": [keras.callbacks.History()]}, r"finetune_callbacks=\[\.\.\.\]"),
        ({"finetune_callbacks": [callbacks.EarlyStopping()]}, r"Those of rls\.callbacks go to"),
        ({"finetune_callbacks": [keras.callbacks.History]}, r"has the class History"),
        ({"finetune_callbacks": [3]}, r"finetune_callbacks has a int, which is no tf_keras"),
    )
    for options, message in wrong:
        with pytest.raises(rls.ArgumentError, match=message):
            one.search("no data", validation_data="none", **options)


def test_a_callback_of_keras_3_is_refused_for_the_fine_tuning():
    import keras as keras_3

    with pytest.raises(rls.ArgumentError, match="is of Keras 3, which the fine-tuning does not"):
        search(compressor(trained()), finetune_callbacks=[keras_3.callbacks.History()])
    with pytest.raises(rls.ArgumentError, match="Keras's own go to the final fine-tuning"):
        search(compressor(trained()), callbacks=[keras_3.callbacks.History()])


def test_wrong_settings_are_refused(tmp_path):
    for make, message in (
        (lambda: callbacks.EarlyStopping(patience=0), "patience=0 cannot be used"),
        (lambda: callbacks.EarlyStopping(min_delta=-1), "min_delta=-1 cannot be used"),
        (lambda: callbacks.TimeLimit(0), "seconds=0 cannot be used"),
        (lambda: callbacks.TimeLimit(float("nan")), "seconds=nan cannot be used"),
        (lambda: callbacks.CSVLogger(tmp_path / "none" / "log.csv"), "none"),
        (lambda: callbacks.TensorBoard(3), "log_dir=3 is a int"),
    ):
        with pytest.raises(rls.ArgumentError, match=message):
            make()


def test_a_file_of_somebody_else_is_left_alone(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("name,price\nbread,3\n")
    log = callbacks.CSVLogger(path)
    with pytest.raises(rls.RLSparsityError, match="is no table of a CSVLogger"):
        log.on_search_begin({"episode": 0, "history": []})
    assert path.read_text() == "name,price\nbread,3\n"


def test_a_table_that_was_cut_off_is_mended(tmp_path):
    path = tmp_path / "log.csv"
    log = callbacks.CSVLogger(path)
    log.on_search_begin({"episode": 0, "history": []})
    log.on_episode_end(0, {"value": 0.25, "sparsity": 0.5})
    log.on_episode_end(1, {"value": 0.5, "sparsity": 0.5})
    with path.open("a") as file:
        file.write("2,,,,dq")
    history = [{"episode": n, "value": n / 4} for n in range(1, 4)]
    log.on_search_begin({"episode": 3, "history": history[:2]})
    assert [(row["episode"], row["value"]) for row in rows_of(path)] == [
        ("0", "0.25"),
        ("1", "0.5"),
        ("2", "0.5"),
    ]


def test_tensorboard_that_is_not_installed_is_said(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(rls.RLSparsityError, match="pip install tensorboard"):
        callbacks.TensorBoard(tmp_path).on_search_begin({})


# -- the display ----------------------------------------------------------------------------------


def shown(terminal, verbose=1):
    written = io.StringIO()
    console = Console(file=written, width=120, force_terminal=terminal, highlight=False)
    progress = SearchProgress(4, "accuracy", verbose, console)
    with progress.phase("dense_files"):
        pass
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rl_sparsity_tf.console._WORTH_SAYING", 0.0)
        with progress.phase("trial", "trial 1 of 6"), progress.phase("episodes", total=4):
            progress.update(1, reward=0.1, best=0.25, metric=0.5, sparsity=0.75)
            progress.update(4, reward=0.1, best=0.25, metric=0.5, sparsity=0.75)
    return written.getvalue()


def test_without_a_terminal_there_is_a_line_per_phase():
    text = shown(False)
    assert text.splitlines()[:3] == ["exporting the dense model", "trial 1 of 6", "searching"]
    assert "episode 4/4  reward +0.100  best +0.250  accuracy 0.5000  sparsity 0.750" in text
    assert text.splitlines()[-2:] == ["  episodes: 0 s", "  trial: 0 s"]


def test_in_a_terminal_there_is_a_bar_and_what_took_long_stays():
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown(True))
    assert "4/4" in text
    assert "best +0.250  accuracy 0.5000" in text
    assert text.rstrip().splitlines()[-1].strip().startswith("trial 1 of 6: 0 s")


def test_silence_is_silent():
    assert shown(False, 0) == shown(True, 0) == ""
