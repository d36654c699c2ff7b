"""The smallest file that holds an accuracy: the trials, what is returned, and going on."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import tf_keras as keras
from hypothesis import given
from hypothesis import strategies as st
from tiny_search import (
    DQN,
    WIDE_TRAIN,
    WIDE_VALIDATION,
    StoppedError,
    compressor,
    figures_of,
    quick_search,
    search,
    wide,
)

import rl_sparsity_tf as rls
from rl_sparsity_tf.allocation.storage import Storage
from rl_sparsity_tf.cli import _target, build_parser
from rl_sparsity_tf.data.metrics import Metric, Score
from rl_sparsity_tf.environment.layer_environment import LayerEnvironment
from rl_sparsity_tf.errors import RunError
from rl_sparsity_tf.layers.plan import CompressionPlan
from rl_sparsity_tf.search import accuracy_search
from rl_sparsity_tf.search.accuracy_search import (
    DENSE_INT8,
    MOST_TRIALS,
    Requirement,
    Trial,
    TrialNetworks,
    first_target,
    is_stored_as,
    next_limit,
)
from rl_sparsity_tf.search.comparison import compare
from rl_sparsity_tf.search.loop import PREVIOUS

ACCURACY = Metric("accuracy", higher_is_better=True)
DATA = {"train": WIDE_TRAIN, "validation_data": WIDE_VALIDATION}
DROP = 0.1
TRIALS, EPISODES = 3, 4  # one episode in each of the first two, and two in the third


@pytest.fixture(scope="module", autouse=True)
def _quick():
    """Three trials of the six: each of them fine-tunes and exports a model of its own."""
    with quick_search(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(accuracy_search, "MOST_TRIALS", TRIALS)
        yield


def searcher(drop=DROP, agent="random", **options) -> rls.Compressor:
    options.setdefault("recovery", "none")
    return compressor(wide(), agent, target=rls.Target(max_accuracy_drop=drop), **options)


def run(one: rls.Compressor, **options) -> rls.Result:
    return search(one, **{**DATA, "episodes": 3, "finetune_epochs": 1, **options})


# ---------------------------------------------------------------------------- the target


@pytest.mark.parametrize("value", [-0.01, float("nan"), float("inf"), "0.01", True, [0.01]])
def test_a_wrong_drop_is_refused(value):
    with pytest.raises(rls.ArgumentError, match=r"Target\(max_accuracy_drop=.*at least 0: how"):
        rls.Target(max_accuracy_drop=value)


def test_a_drop_is_a_goal_of_its_own():
    target = rls.Target(max_accuracy_drop=np.float32(0.5))
    assert target.to_dict() == {"max_accuracy_drop": 0.5}
    assert (target.kind, target.in_bytes, target.needs_channels) == (
        "max_accuracy_drop",
        True,
        False,
    )
    assert rls.Target(max_accuracy_drop=0).value == 0.0  # as good as the dense model
    with pytest.raises(rls.ArgumentError, match=r"names 2 goals.*max_accuracy_drop=0\.01"):
        rls.Target(max_accuracy_drop=0.01, tflite_bytes=900)


def test_other_targets_are_passed_on_as_they_are():
    target = rls.Target(tflite_bytes=900)
    assert first_target(wide(), target) is target
    first = first_target(wide(), rls.Target(max_accuracy_drop=0.01))
    assert first.value > 17_700  # the file in float32


@pytest.mark.parametrize("curriculum", ["linear", rls.Staged(stages=(0.5, 1.0))])
def test_a_curriculum_does_not_go_with_it(curriculum):
    with pytest.raises(rls.ArgumentError, match=r"does not go with Target\(max_accuracy_drop=0\.1"):
        searcher(curriculum=curriculum)
    assert searcher(curriculum="constant").curriculum == rls.Constant()


def test_other_quantizations_do_not_go_with_it():
    with pytest.raises(rls.ArgumentError, match="quantization='int8' does not go with a target in"):
        run(searcher(), quantization="int8")


def test_baselines_say_that_only_a_search_tries_sizes():
    with pytest.raises(rls.ArgumentError, match=r"Target\(max_accuracy_drop=0\.1\) is met by try"):
        rls.baselines.lamp(wide(), target=rls.Target(max_accuracy_drop=0.1))


def test_the_command_line_takes_it():
    parse = build_parser().parse_args
    common = ["compress", "m.keras", "--data", "d.npz", "--output", "o"]
    target = _target(parse([*common, "--max-accuracy-drop", "0.01"]))
    assert target == rls.Target(max_accuracy_drop=0.01)
    with pytest.raises(SystemExit):
        parse([*common, "--max-accuracy-drop", "0.01", "--target-bytes", "900"])


# ---------------------------------------------------------------------------- the trials


def trial(limit: int, held: bool, size: int | None = None) -> Trial:
    size = limit if size is None else size
    return Trial(
        limit=limit, tflite_bytes=size, validation_metric=0.5, held=held, proposed_by="", plan=""
    )


def test_the_next_size_is_in_the_middle_of_the_logarithms():
    assert next_limit(1_000, 100_000, []) == 10_000
    assert next_limit(1_000, 100_000, [trial(10_000, True)]) == 3_162
    assert next_limit(1_000, 100_000, [trial(10_000, False)]) == 31_623
    # What a file has counts, not what it might have had.
    assert next_limit(1_000, 100_000, [trial(10_000, True, 4_000)]) == 2_000
    # A size that no file met is one that did not hold.
    missed = Trial(
        limit=10_000,
        tflite_bytes=None,
        validation_metric=None,
        held=False,
        proposed_by="",
        plan="",
    )
    assert next_limit(1_000, 100_000, [missed]) == 31_623


def test_sizes_within_two_percent_are_not_told_apart():
    assert next_limit(1_000, 1_020, []) is None
    assert next_limit(1_000, 1_030, []) == 1_015
    assert next_limit(1_000, 900, []) is None


@given(st.integers(500, 5_000), st.integers(5_200, 10**6), st.floats(0, 1))
def test_the_trials_close_in_on_the_size_that_just_holds(smallest, largest, place):
    threshold = smallest * (largest / smallest) ** place
    trials: list[Trial] = []
    for _ in range(MOST_TRIALS):
        limit = next_limit(smallest, largest, trials)
        if limit is None:
            break
        assert smallest <= limit <= largest
        trials.append(trial(limit, limit >= threshold))
    best = min([largest, *(one.limit for one in trials if one.held)])
    closeness = max(1.02, (largest / smallest) ** 0.5**MOST_TRIALS)
    assert threshold <= best * 1.001
    assert best / max(threshold, smallest) <= closeness * 1.01


@pytest.mark.parametrize(
    ("higher", "value", "held"),
    [
        (True, 0.88, True),
        (True, 0.95, True),
        (True, 0.8799, False),
        (False, 0.92, True),
        (False, 0.5, True),
        (False, 0.9201, False),
        (True, float("nan"), False),
        (False, float("nan"), False),
    ],
)
def test_a_drop_is_a_rise_for_a_metric_like_a_loss(higher, value, held):
    metric = Metric("accuracy" if higher else "loss", higher)
    one = Requirement(metric=metric, dense=0.9, drop=0.02)
    assert one.holds(value) is held


# ---------------------------------------------------------------------------- a search


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """A search with a run directory that chooses groups and bits at every size; its storages."""
    folder, storages = tmp_path_factory.mktemp("runs") / "run", []
    real = TrialNetworks.at

    def noting(self, limit):
        storages.append((limit, real(self, limit)))
        # At once: the network of single weights is the same at every size that wants it.
        assert storages[-1][1].budget.limit == pytest.approx(0.99 * limit)
        return storages[-1][1]

    options = {"agent": DQN, "recovery": "least_squares", "group": "auto", "directory": folder}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrialNetworks, "at", noting)
        one = searcher(**options)
        return one, run(one, episodes=EPISODES, finetune_epochs=2), storages, folder


@pytest.mark.slow
def test_trials_train_the_start_that_heats_prefer(monkeypatch):
    """The masks of the largest weights are made to win every heat: the file has them."""
    preferred, said = [], []
    real = accuracy_search.run_heats

    def heats(task, candidates, progress, **options):
        starts, places = real(task, candidates, progress, **options)
        preferred.append(next((one for one in starts if one.as_trained), starts[0]))
        said.append(len(starts))
        return [preferred[-1], *starts], places

    monkeypatch.setattr(accuracy_search, "run_heats", heats)
    one = searcher(recovery="least_squares")
    result = run(one, episodes=2, finetune_epochs=4)
    held = [trial["held"] for trial in result.metrics["search"]["trials"][1:]]
    assert len(held) == len(preferred) == 2
    assert max(said) == 2
    assert any(start.as_trained for start in preferred)
    last = max(number for number, is_held in enumerate(held) if is_held)
    assert result.candidate.plan == preferred[last].candidate.plan


def metric_of(content: bytes, folder) -> float:
    (folder / "again.tflite").write_bytes(content)
    outputs = rls.predict_tflite(folder / "again.tflite", WIDE_VALIDATION[0])
    return float((np.asarray(outputs).argmax(axis=1) == WIDE_VALIDATION[1]).mean())


@pytest.mark.slow
def test_the_file_holds_the_drop_on_the_validation_data(chosen, tmp_path):
    one, result, _, folder = chosen
    dense = wide().evaluate(*WIDE_VALIDATION, verbose=0, return_dict=True)["accuracy"]
    content = (folder / "model.tflite").read_bytes()
    assert metric_of(content, tmp_path) >= dense - DROP - 1e-6
    assert result.metrics["search"]["dense_validation_metric"] == pytest.approx(dense)
    # Smaller than as int8 alone.
    assert len(content) == result.metrics["compressed"]["tflite_bytes"] < 6_600
    # Contenders are held to it with single weights at 8 bits, which are all that they know.
    assert one.last.plain.storage == Storage("element")
    assert one.last.plain.budget.limit == pytest.approx(0.99 * len(content))


@pytest.mark.slow
def test_the_trials_are_recorded_and_the_smallest_that_held_is_returned(chosen):
    _, result, _, folder = chosen
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics == result.metrics
    assert metrics["search"]["max_accuracy_drop"] == DROP
    dense, *trials = metrics["search"]["trials"]
    assert dense["proposed_by"] == DENSE_INT8
    assert dense["limit"] == dense["tflite_bytes"] == metrics["dense_int8"]["tflite_bytes"]
    assert 1 < len(trials) <= TRIALS
    least = metrics["search"]["dense_validation_metric"] - DROP
    for one in (dense, *trials):
        if one["tflite_bytes"] is None:  # fine-tuning left no file within the limit
            assert (one["validation_metric"], one["held"]) == (None, False)
            continue
        assert one["held"] == (one["validation_metric"] >= least - 1e-6)
        assert one["tflite_bytes"] <= one["limit"]
    smallest = min(one["tflite_bytes"] for one in (dense, *trials) if one["held"])
    assert metrics["compressed"]["tflite_bytes"] == smallest
    assert (folder / "model.tflite").stat().st_size == smallest


@pytest.mark.slow
def test_the_episodes_are_shared_and_say_which_trial_they_are_of(chosen):
    one, result, _, _ = chosen
    limits = [trial["limit"] for trial in result.metrics["search"]["trials"][1:]]
    assert result.metrics["search"]["episodes"] == len(result.history)
    assert [entry["episode"] for entry in result.history] == list(range(len(result.history)))
    numbers = [entry["trial"] for entry in result.history]
    assert numbers == sorted(numbers)
    assert {(entry["trial"], entry["limit"]) for entry in result.history} == set(
        enumerate(limits, 1)
    )
    assert one.last.loop.episodes.agent.episodes == len(result.history)  # one agent for all
    assert one.last.loop.episodes.illegal_actions == 0


class Fake:
    """Stands in for the score of a file: by its size, as a closed form says."""

    def __init__(self, patch, metric_of_size):
        self.sizes = []

        def score(path, *_):
            size = path.stat().st_size
            self.sizes.append(size)
            return Score(metric=metric_of_size(size), loss=0.0)

        patch.setattr(accuracy_search, "score_tflite", score)


@pytest.fixture(scope="module")
def alike():
    """A search that stores kernels alike at every size; files hold by their size alone.

    Heuristics, which store integers alone, can come down to that, too.
    """
    with pytest.MonkeyPatch.context() as patch:
        Fake(patch, lambda size: 1.0 if size > 4_500 else 0.0)
        one = searcher(recovery="least_squares")
        return one, run(one, finetune_epochs=0)


@pytest.mark.slow
def test_a_smaller_trial_begins_with_the_plan_of_the_next_larger(alike):
    _, result = alike
    first: dict[int, dict] = {}
    for entry in result.history:
        first.setdefault(entry["trial"], entry)
    limits = [entry["limit"] for entry in first.values()]
    begun = [any(size > limit for size in limits[:at]) for at, limit in enumerate(limits)]
    assert any(begun)
    assert [entry["proposed_by"] == PREVIOUS for entry in first.values()] == begun


@pytest.mark.slow
def test_contenders_are_held_to_the_bytes_found(alike):
    one, result = alike
    size = result.metrics["compressed"]["tflite_bytes"]
    assert 4_500 < size < 6_600
    assert one.last.target == rls.Target(tflite_bytes=size)
    entries = compare(one, ["dynamic_programming", "lamp"], verbose=0)
    assert len(entries) == 2
    for entry in entries:
        assert entry["tflite_bytes"] <= size


@pytest.mark.slow
def test_with_fewer_episodes_than_trials_each_has_one(monkeypatch):
    fake = Fake(monkeypatch, lambda size: 0.0 if size < 5_000 else 1.0)
    result = run(searcher(), episodes=2, finetune_epochs=0)
    assert len(fake.sizes) == 3  # the dense int8 file, and two
    assert [entry["trial"] for entry in result.history] == [1, 2]
    # The first is too small; the second goes up again.
    first, second = (entry["limit"] for entry in result.history)
    assert first < 5_000 < second or first < second
    assert result.metrics["search"]["trials"][1]["held"] is False


@pytest.mark.slow
def test_the_dense_int8_file_is_returned_if_nothing_smaller_holds(monkeypatch, capsys):
    Fake(monkeypatch, lambda size: 1.0 if size > 6_500 else 0.0)
    result = run(searcher(), episodes=1, finetune_epochs=0, verbose=2)
    compressed = result.metrics["compressed"]
    assert compressed["tflite_bytes"] == result.metrics["dense_int8"]["tflite_bytes"]
    assert compressed["proposed_by"] == DENSE_INT8
    assert compressed["sparsity"] < 0.01
    assert [one["held"] for one in result.metrics["search"]["trials"]] == [True, False]
    lines = capsys.readouterr().out.splitlines()
    (dense,) = [line for line in lines if line.startswith("the dense int8 file: ")]
    assert dense.endswith(": held")
    assert "random search: 1 episodes" in lines
    (said,) = [line for line in lines if line.startswith("trial 1 of 1: at most ")]
    assert said.endswith(" bytes")
    (judged,) = [line for line in lines if line.startswith("trial 1: ")]
    assert "validation accuracy 0.0000 (dense " in judged
    assert judged.endswith(": not held")


@pytest.mark.slow
def test_a_drop_that_no_file_holds_is_said_with_the_best(monkeypatch, tmp_path):
    Fake(monkeypatch, lambda size: 0.3 if size < 6_500 else 0.2)
    one = searcher(directory=tmp_path / "run")
    pattern = (
        r"Target\(max_accuracy_drop=0\.1\) cannot be met: of 2 files, the dense int8 one among "
        r"them, the best has [\d,]+ bytes and the validation accuracy 0\.3000, which is 0\.\d+ "
        r"worse than the dense model's .*Expected a larger drop, or more finetune_epochs\."
    )
    with pytest.raises(rls.TargetError, match=pattern):
        run(one, episodes=1, finetune_epochs=0)
    assert one.last is None
    assert not (tmp_path / "run" / "metrics.json").exists()
    # The same call finds the trial done, and says the same at once.
    monkeypatch.setattr(accuracy_search.AccuracySearch, "_try", None)
    with pytest.raises(rls.TargetError, match=pattern):
        run(searcher(directory=tmp_path / "run"), episodes=1, finetune_epochs=0)


@pytest.mark.slow
def test_a_size_that_fine_tuning_misses_does_not_hold(monkeypatch, capsys):
    real = accuracy_search.finish_candidate

    def missing(task, candidate, others=()):
        if task.target.value < 6_000:
            raise rls.TargetError("missed")
        return real(task, candidate, others)

    monkeypatch.setattr(accuracy_search, "finish_candidate", missing)
    result = run(searcher(), episodes=1, finetune_epochs=0, verbose=2)
    _, missed = result.metrics["search"]["trials"]
    assert (missed["tflite_bytes"], missed["validation_metric"]) == (None, None)
    assert missed["held"] is False
    assert "trial 1: missed" in capsys.readouterr().out


# ---------------------------------------------------------------------------- going on


def stopped_after(patch: pytest.MonkeyPatch, owner, name: str, calls: int) -> None:
    """Raises in a call of a method, after so many that went well."""
    real, done = getattr(owner, name), []

    def stopping(*arguments, **options):
        if len(done) == calls:
            raise StoppedError
        done.append(1)
        return real(*arguments, **options)

    patch.setattr(owner, name, stopping)


class Stops(rls.callbacks.Callback):
    """Ends a trial after the first episode, and all after the fourth."""

    def __init__(self):
        self.trials = []

    def on_episode_end(self, episode, logs):
        assert logs["bytes"] > 0
        if episode == 0:
            self.stop_stage()
        if episode == 3:
            self.stop_episodes()

    def on_trial_end(self, trial, logs):
        self.trials.append((trial, logs))


@pytest.mark.slow
def test_callbacks_hear_of_sizes_and_end_them(monkeypatch, tmp_path):
    Fake(monkeypatch, lambda size: 1.0 if size > 3_000 else 0.0)
    stops, few = Stops(), {"episodes": 12, "finetune_epochs": 0}
    whole = run(searcher(), callbacks=[stops], **few)
    assert [entry["trial"] for entry in whole.history] == [1, 2, 2, 2]
    trials = whole.metrics["search"]["trials"]
    assert stops.trials == list(enumerate(trials))
    assert len(trials) == 3
    # One that was cut off in the second trial, or after it, knows that there is no third.
    for name, calls in (("_try", 1), ("_found", 0)):
        folder = tmp_path / name
        with pytest.MonkeyPatch.context() as patch:
            stopped_after(patch, accuracy_search.AccuracySearch, name, calls)
            with pytest.raises(StoppedError):
                run(searcher(directory=folder), callbacks=[Stops()], **few)
        again = run(searcher(directory=folder), **few)
        assert figures_of(again.history) == figures_of(whole.history)
        assert again.metrics["search"]["trials"] == trials
        assert again.plan.to_json() == whole.plan.to_json()


@pytest.mark.slow
def test_trials_that_are_lost_are_named(tmp_path):
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        stopped_after(patch, accuracy_search, "finish_candidate", 2)
        with pytest.raises(StoppedError):
            run(searcher(directory=folder), finetune_epochs=0)
    (folder / "checkpoints" / "trials.npz").unlink()
    with pytest.raises(RunError, match=r"lacks the checkpoint of its finished trials\. Put a copy"):
        run(searcher(directory=folder), finetune_epochs=0)


# ---------------------------------------------------------------------------- groups and bits


@pytest.mark.slow
def test_every_size_is_searched_in_the_storage_that_it_wants(chosen):
    one, result, networks, _ = chosen
    trials = result.metrics["search"]["trials"][1:]
    assert [limit for limit, _ in networks] == [trial["limit"] for trial in trials]
    assert any(network.storage != Storage("element") for _, network in networks)
    plans = [CompressionPlan.from_json(trial.plan) for trial in one_trials(one)]
    for (_, network), plan in zip(networks, plans, strict=True):
        assert is_stored_as(network, plan)
    # One agent learns in all of them, and every plan counts.
    assert one.last.loop.episodes.agent.episodes == len(result.history) == EPISODES
    assert one.last.loop.network is networks[-1][1]
    assert result.metrics["search"]["evaluations"] == one.last.loop.network.evaluations
    assert all(one.last.loop.network.seen >= network.seen for _, network in networks)


def one_trials(one):
    """The trials as the run directory keeps them, with their plans."""
    with np.load(one.directory / "checkpoints" / "trials.npz") as arrays:
        return [Trial(**values) for values in json.loads(str(arrays["trials"]))]


@pytest.mark.slow
def test_a_search_cut_off_in_a_later_trial_ends_in_the_same_bits(chosen, tmp_path):
    _, result, _, folder = chosen
    options = {"agent": DQN, "recovery": "least_squares", "group": "auto"}
    options["directory"] = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        stopped_after(patch, LayerEnvironment, "_step", 6 * 3 + 2)
        with pytest.raises(StoppedError):
            run(searcher(**options), episodes=EPISODES, finetune_epochs=2)
    again = run(searcher(**options), episodes=EPISODES, finetune_epochs=2)
    assert figures_of(again.history) == figures_of(result.history)
    assert again.metrics["compressed"] == result.metrics["compressed"]
    assert again.metrics["search"]["trials"] == result.metrics["search"]["trials"]
    assert again.metrics["search"]["evaluations"] == result.metrics["search"]["evaluations"]
    assert again.plan.to_json() == result.plan.to_json()
    files = [place / "model.tflite" for place in (folder, tmp_path / "run")]
    assert files[0].read_bytes() == files[1].read_bytes()


# ---------------------------------------------------------------------------- other models


@pytest.mark.slow
def test_a_model_without_an_accuracy_is_held_to_its_loss():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(128, 40)).astype(np.float32)
    y = x[:, :1] * 2 - x[:, 1:2]
    stack = [keras.layers.Dense(48, activation="relu"), keras.layers.Dense(1)]
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Input((40,)), *stack])
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    model.fit(x, y, epochs=20, verbose=0)
    dense = model.evaluate(x, y, verbose=0)
    target = rls.Target(max_accuracy_drop=0.5)
    one = compressor(model, "random", target=target, recovery="none")
    result = search(one, train=(x, y), validation_data=(x, y), episodes=2, finetune_epochs=1)
    least = [trial for trial in result.metrics["search"]["trials"] if trial["held"]]
    assert result.metrics["metric"] == {"name": "loss", "higher_is_better": False}
    assert all(trial["validation_metric"] <= dense + 0.5 + 1e-5 for trial in least)
    assert math.isclose(result.metrics["search"]["dense_validation_metric"], dense, rel_tol=1e-4)


@pytest.mark.slow
def test_whole_channels_are_removed_for_it_too():
    from channel_search import compressor as channels
    from channel_search import searched, trained

    one = channels(rls.Target(max_accuracy_drop=0.2), agent="random")
    result = searched(one, episodes=1, finetune_epochs=0)
    trials = result.metrics["search"]["trials"]
    assert result.metrics["compressed"]["tflite_bytes"] == min(
        trial["tflite_bytes"] for trial in trials if trial["held"]
    )
    assert result.candidate.proposed_by != DENSE_INT8
    assert result.model.count_params() < trained().count_params()
    assert len(trials) > 1
