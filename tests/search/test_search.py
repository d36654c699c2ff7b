"""The search from end to end: what it returns, writes, prints and leaves alone."""

from __future__ import annotations

import contextlib
import copy
import csv
import dataclasses
import io
import json
import math
import re
import zipfile

import numpy as np
import pytest
import tf_keras as keras
from ai_edge_litert.interpreter import Interpreter
from tiny_search import (
    DQN,
    PPO,
    SPARSITY,
    TEST,
    TRAIN,
    VALIDATION,
    compressor,
    quick_search,
    search,
    trained,
)

import rl_sparsity_tf as rls
from rl_sparsity_tf.agents.demonstrations import proposals
from rl_sparsity_tf.allocation import ranking
from rl_sparsity_tf.callbacks import PHASES
from rl_sparsity_tf.console import SearchProgress
from rl_sparsity_tf.data.batches import evaluation_data, training_data
from rl_sparsity_tf.environment.network import CompressedNetwork, evaluate_plan
from rl_sparsity_tf.environment.reranking import SCHEDULE
from rl_sparsity_tf.errors import FileExistsRLSparsityError
from rl_sparsity_tf.layers.kernels import find_kernels
from rl_sparsity_tf.search.episodes import LoopSettings
from rl_sparsity_tf.search.loop import SearchLoop

RUNS = {
    "dqn element plan": {
        "agent": DQN,
        "test_data": TEST,
        "dataset": "three blobs",
        "episodes": 7,
    },
    "ppo block4 none": {
        "agent": PPO,
        "group": "block4",
        "quantization": "none",
        "warm_start": False,
        "episodes": 2,
        "target": rls.Target(sparsity=0.5),
    },
    "random block4 dynamic": {
        "agent": "random",
        "group": "block4",
        "quantization": "dynamic",
        "recovery": rls.Recovery(method="none"),
        "episodes": 2,
    },
    "random block16 plan": {
        "agent": "random",
        "group": "block16",
        "episodes": 1,
        "target": rls.Target(sparsity=0.4),
    },
}
_SEARCH_OPTIONS = ("test_data", "dataset", "quantization", "episodes")


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick_search():
        yield


@dataclasses.dataclass
class Run:
    name: str
    model: keras.Model
    before: dict
    after: dict
    compressor: rls.Compressor
    result: rls.Result
    folder: object
    printed: str


def state_of(model: keras.Model) -> dict:
    """All of a model that a user could notice a change of."""
    return {
        "weights": [value.tobytes() for value in model.get_weights()],
        "optimizer": [np.asarray(v).tobytes() for v in model.optimizer.variables],
        "optimizer_settings": model.optimizer.get_config(),
        "identities": [id(model.optimizer), *map(id, model.layers), *map(id, model.weights)],
        "config": copy.deepcopy(model.get_config()),
        "compiled": copy.deepcopy(model.get_compile_config()),
        "metrics": model.metrics_names,
        "attributes": sorted(vars(model)),
        "trainable": [layer.trainable for layer in model.layers],
        "function": id(model.train_function),
    }


def run_search(name: str, folder) -> Run:
    options = dict(RUNS[name])
    given = {key: options.pop(key) for key in _SEARCH_OPTIONS if key in options}
    model = trained()
    before, printed = state_of(model), io.StringIO()
    one = compressor(model, directory=folder, **options)
    with contextlib.redirect_stdout(printed):
        result = search(one, verbose=2, **given)
    return Run(name, model, before, state_of(model), one, result, folder, printed.getvalue())


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return {}, tmp_path_factory.mktemp("runs")


# For every day there are two, of agents that learn, with and without a warm start.
SLOW_RUNS = ("random block4 dynamic", "random block16 plan")


@pytest.fixture(
    params=[pytest.param(one, marks=pytest.mark.slow) if one in SLOW_RUNS else one for one in RUNS]
)
def run(request, cache) -> Run:
    done, folder = cache
    if request.param not in done:
        done[request.param] = run_search(request.param, folder / request.param.replace(" ", "_"))
    return done[request.param]


@pytest.fixture
def dqn(cache) -> Run:
    done, folder = cache
    name = "dqn element plan"
    if name not in done:
        done[name] = run_search(name, folder / name.replace(" ", "_"))
    return done[name]


def pruned_positions(model: keras.Model, plan: rls.CompressionPlan) -> dict[str, np.ndarray]:
    """Which entries of every kernel, viewed as a matrix, a plan prunes."""
    positions = {}
    for kernel in find_kernels(model):
        entry = plan.kernels[kernel.path]
        pruned = (entry.operations == rls.Operation.PRUNE).astype(np.float32)
        mask = np.asarray(kernel.grouping(entry.group).expand(pruned)) > 0
        positions[kernel.path] = np.broadcast_to(mask, kernel.matrix().shape)
    return positions


# -- the contract of sparsity --------------------------------------------------------------------


def test_the_target_is_met_by_pruned_groups_at_the_smallest_count(run):
    elements = 6 * 8 + 8 * 3
    wanted = math.ceil(run.compressor.target.sparsity * elements)
    positions = pruned_positions(run.model, run.result.plan)
    pruned = sum(int(mask.sum()) for mask in positions.values())
    groups = [int(k.grouping(run.compressor.group).sizes.max()) for k in find_kernels(run.model)]
    assert wanted <= pruned < wanted + sum(groups)
    zeros = 0
    for kernel in find_kernels(run.result.model):
        matrix, mask = kernel.matrix(), positions[kernel.path]
        zeros += int((matrix == 0).sum())
        assert (matrix[mask] == 0).all()
        assert not mask.all(), f"{kernel.path} was emptied"
    assert run.result.metrics["compressed"]["sparsity"] == pytest.approx(zeros / elements)
    assert zeros >= wanted


def test_element_groups_meet_the_target_exactly(dqn):
    masks = pruned_positions(dqn.model, dqn.result.plan)
    assert sum(int(mask.sum()) for mask in masks.values()) == math.ceil(SPARSITY * 72)


def test_the_plan_applied_to_the_original_model_gives_the_same_zeros(run):
    again = rls.strip(rls.wrap(run.model, run.result.plan))
    for path, mask in pruned_positions(run.model, run.result.plan).items():
        (kernel,) = [k for k in find_kernels(again) if k.path == path]
        assert (kernel.matrix()[mask] == 0).all()
        entry = run.result.plan.kernels[path]
        if not (entry.operations == rls.Operation.QUANTIZE).any():
            np.testing.assert_array_equal(kernel.matrix() == 0, mask)


# -- the result ----------------------------------------------------------------------------------


def test_the_model_is_plain_keras_compiled_as_the_original(run):
    assert [type(layer).__module__.split(".")[0] for layer in run.result.model.layers] == [
        "tf_keras"
    ] * 2
    assert run.result.model.get_config() == run.model.get_config()
    assert run.result.model.get_compile_config() == run.model.get_compile_config()
    score = run.result.model.evaluate(*VALIDATION, verbose=0, return_dict=True)
    reported = run.result.metrics["compressed"]["validation_accuracy"]
    assert score["accuracy"] == pytest.approx(reported, abs=1e-6)


def test_the_callers_model_is_not_changed(run):
    for key, value in run.before.items():
        assert run.after[key] == value, f"{key} changed"


def test_metrics_have_the_keys_of_the_contract(run):
    metrics = json.loads((run.folder / "metrics.json").read_text())
    assert metrics == run.result.metrics
    assert set(metrics) == set(
        "format_version dataset agent seed metric dense dense_int8 compressed search "
        "baselines warnings".split()
    )
    figures = {"accuracy", "metric", "tflite_bytes", "gzip_bytes"}
    assert set(metrics["dense"]) == set(metrics["dense_int8"]) == figures
    assert set(metrics["compressed"]) == figures | set(
        "validation_accuracy validation_metric tflite_accuracy tflite_metric sparsity "
        "max_abs_difference batch_size proposed_by".split()
    )
    assert set(metrics["search"]) == {"episodes", "evaluations", "seconds", "operations"}
    assert set(metrics["search"]["operations"]) == {"keep", "prune", "quantize", "shuffle"}
    assert metrics["format_version"] == 1
    assert metrics["metric"] == {"name": "accuracy", "higher_is_better": True}
    assert metrics["agent"] == run.name.split()[0]
    assert metrics["seed"] == 0
    assert metrics["baselines"] == []


def test_metrics_add_up(run):
    metrics = run.result.metrics
    assert metrics["search"]["operations"] == run.result.plan.count_operations()
    assert sum(metrics["search"]["operations"].values()) == 72
    assert metrics["search"]["episodes"] == len(run.result.history)
    assert metrics["search"]["evaluations"] == run.result.history[-1]["evaluations"]
    assert metrics["compressed"]["tflite_bytes"] == (run.folder / "model.tflite").stat().st_size
    assert metrics["compressed"]["proposed_by"] == run.result.candidate.proposed_by
    assert metrics["search"]["seconds"] > 0


def test_figures_on_test_data_are_null_without_it_and_true_with_it(run):
    compressed, dense = run.result.metrics["compressed"], run.result.metrics["dense"]
    if "test_data" not in RUNS[run.name]:
        assert compressed["accuracy"] is compressed["metric"] is dense["accuracy"] is None
        assert compressed["tflite_accuracy"] is compressed["tflite_metric"] is None
        return
    assert run.result.metrics["dataset"] == "three blobs"
    for model, entry in ((run.result.model, compressed), (run.model, dense)):
        predicted = model.predict(TEST[0], verbose=0).argmax(axis=1)
        assert entry["accuracy"] == pytest.approx(float((predicted == TEST[1]).mean()), abs=1e-6)
    assert compressed["tflite_accuracy"] == pytest.approx(compressed["accuracy"], abs=0.05)


def test_the_history_has_an_entry_per_episode_and_the_best_is_returned(run):
    history = run.result.history
    assert [entry["episode"] for entry in history] == list(range(len(history)))
    best = max(entry["reward"] for entry in history)
    candidate = run.result.candidate
    assert candidate.value >= best
    if candidate.episode >= 0:
        assert history[candidate.episode]["reward"] == candidate.value
        assert history[candidate.episode]["improved"]
    else:
        assert candidate.proposed_by in ranking.HEURISTICS
        assert not any(entry["improved"] for entry in history)
    for entry in history:
        assert entry["illegal_actions"] == 0
        assert entry["sparsity"] >= run.compressor.target.sparsity - 1e-9
        assert sum(entry["operations"].values()) == 72
        assert all(math.isfinite(loss) for loss in entry["losses"].values())


def test_warm_start_names_who_proposed_a_plan(dqn):
    proposers = [entry["proposed_by"] for entry in dqn.result.history]
    assert set(proposers[:2]) <= set(ranking.HEURISTICS)
    assert proposers[2:] == ["dqn"] * 5


def test_the_summary_lists_every_kernel_and_the_figures(run):
    lines = []
    run.result.summary(lines.append)
    text = "\n".join(lines)
    compressed = run.result.metrics["compressed"]
    for path in ("first/kernel", "last/kernel"):
        (line,) = [line for line in lines if path in line]
        cells = [cell.strip() for cell in line.strip("│ ").split("│")]
        entry = run.result.plan.kernels[path]
        assert cells[2:6] == [str(entry.weights_under(op)) for op in rls.Operation]
        assert float(cells[6]) == pytest.approx(entry.sparsity, abs=1e-4)
        assert cells[7] in ("float32", "int8")
    assert f"sparsity {compressed['sparsity']:.4f} of all weights" in text
    assert f"plan proposed by {run.result.candidate.found_by}" in lines
    assert f"-> {compressed['tflite_bytes']:,} bytes" in text
    assert f"validation accuracy {compressed['validation_metric']:.4f}" in text
    assert ("test accuracy: dense" in text) == (compressed["metric"] is not None)
    assert all(f"note: {note}" in lines for note in run.result.report.notes)
    assert repr(run.result).startswith(f"Result(sparsity={compressed['sparsity']:.4f}, ")


def test_verbose_2_prints_a_line_per_episode(run):
    lines = [one for one in run.printed.splitlines() if "far below the dense model" not in one]
    lines = [one for one in lines if not re.fullmatch(r"  [a-z ]+: \d+ s", one)]
    begun = [PHASES[phase] for phase in ("data", "measuring", "preparing", "dense_files")]
    assert lines[:4] == begun
    lines = lines[4:]
    count = len(run.result.history)
    if run.compressor.warm_start:
        assert lines.pop(0) == "evaluating the plans of known heuristics"
    else:
        assert lines.pop(0) == "evaluating the plans to begin with"
    assert lines[0] == f"{run.name.split()[0]} search: {count} episodes"
    for number, entry in enumerate(run.result.history, 1):
        line = lines[number]
        assert line.startswith(f"episode {number}/{count}  reward {entry['reward']:+.3f}")
        assert f"sparsity {entry['sparsity']:.3f}" in line
    found = run.result.candidate.found_by
    end = ["fine-tuning", "exporting", "writing the result down"]
    assert lines[-4:] == [f"the best plan ({found}):", *end]
    assert len(lines) == count + 5


# -- the files -----------------------------------------------------------------------------------


def test_the_saved_model_needs_no_custom_objects(run):
    with zipfile.ZipFile(run.folder / "model.keras") as archive:
        assert b"rl_sparsity" not in archive.read("config.json")
    model = keras.models.load_model(run.folder / "model.keras", custom_objects={})
    x = TEST[0]
    np.testing.assert_array_equal(
        model.predict(x, verbose=0), run.result.model.predict(x, verbose=0)
    )


def test_the_tflite_file_does_what_keras_does(run):
    interpreter = Interpreter(model_path=str(run.folder / "model.tflite"))
    (given,), (got,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.resize_tensor_input(given["index"], TEST[0].shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(given["index"], TEST[0])
    interpreter.invoke()
    outputs = interpreter.get_tensor(got["index"])
    expected = run.result.model.predict(TEST[0], verbose=0)
    tolerance = 0.1 if run.result.report.quantization == "dynamic" else 0.02
    np.testing.assert_allclose(outputs, expected, atol=tolerance)
    assert (outputs.argmax(axis=1) == expected.argmax(axis=1)).mean() >= 0.95


def test_the_saved_plan_and_history_are_those_of_the_result(run):
    plan = rls.CompressionPlan.from_json((run.folder / "plan.json").read_text())
    assert plan.to_json() == run.result.plan.to_json()
    table = list(csv.DictReader((run.folder / "history.csv").read_text().splitlines()))
    assert [float(row["reward"]) for row in table] == [e["reward"] for e in run.result.history]
    assert [int(row["prune"]) for row in table] == [
        e["operations"]["prune"] for e in run.result.history
    ]
    names = {path.name for path in run.folder.iterdir()}
    assert names >= {"manifest.json", "journal.jsonl", "checkpoints", "metrics.json"}


def test_save_writes_elsewhere_and_refuses_to_overwrite(dqn, tmp_path):
    folder = tmp_path / "copy"
    dqn.result.save(folder)
    for name in ("model.tflite", "plan.json", "metrics.json", "history.csv"):
        assert (folder / name).read_bytes() == (dqn.folder / name).read_bytes()
    with pytest.raises(FileExistsRLSparsityError, match=r"already holds .*pass overwrite=True"):
        dqn.result.save(folder)
    (folder / "plan.json").write_text("old")
    dqn.result.save(folder, overwrite=True)
    assert (folder / "plan.json").read_text() == dqn.result.plan.to_json()


def test_the_result_exports_in_other_modes_too(dqn, tmp_path):
    same = dqn.result.export_tflite(tmp_path / "same.tflite")
    assert same.tensors == dqn.result.report.tensors
    assert (tmp_path / "same.tflite").read_bytes() == (dqn.folder / "model.tflite").read_bytes()
    with pytest.raises(FileExistsRLSparsityError, match="overwrite=True"):
        dqn.result.export_tflite(tmp_path / "same.tflite")
    with pytest.raises(rls.ArgumentError, match=r"same\.txt' ends in '\.txt'\. Expected a name"):
        dqn.result.export_tflite(tmp_path / "same.txt")
    other = dqn.result.export_tflite(tmp_path / "same.tflite", "float16", overwrite=True)
    assert other.quantization == "float16"
    assert other.tflite_bytes == (tmp_path / "same.tflite").stat().st_size


# -- the loop ------------------------------------------------------------------------------------


class Watch(SearchProgress):
    """Notes the tracing counts after every episode."""

    def __init__(self, loop: SearchLoop, network: CompressedNetwork):
        super().__init__(6, verbose=0)
        self.loop, self.network, self.counts = loop, network, []

    def update(self, episode, **_):
        self.counts.append((self.network.tracing_count(), self.loop.episodes.agent.tracing_count()))


@pytest.fixture(scope="module")
def network() -> CompressedNetwork:
    model = trained()
    return CompressedNetwork(
        model,
        training_data(TRAIN, model, batch_size=32),
        evaluation_data(VALIDATION, model, "validation_data"),
        target=rls.Target(sparsity=SPARSITY),
        recovery=rls.Recovery(method="finetune", steps=1),
    )


@pytest.mark.slow
@pytest.mark.parametrize("agent", [DQN, PPO], ids=["dqn", "ppo"])
def test_nothing_is_traced_again_and_nothing_illegal_is_chosen(network, agent):
    settings = LoopSettings(agent=agent, reward=rls.Reward(), buckets=6, seed=3, warm_start=True)
    loop = SearchLoop(settings, network)
    watch = Watch(loop, network)
    loop.run(6, watch)
    shown = sum(entry["proposed_by"] != loop.episodes.agent.name for entry in loop.history)
    assert shown == 2  # a third
    # Demonstrations (PPO learns from them in another way), then the agent's own episodes.
    assert watch.counts[shown] == watch.counts[-1]
    assert watch.counts[0][0] == watch.counts[-1][0]
    assert watch.counts[-1][1] > 0
    assert sum(env.illegal_actions for env in loop.episodes.environments) == 0
    assert len(loop.history) == 6


@pytest.mark.slow
def test_with_least_squares_the_best_plan_of_all_is_returned_and_rewards_add_up_to_its_value():
    model = trained()
    network = CompressedNetwork(
        model,
        training_data(TRAIN, model, batch_size=32),
        evaluation_data(VALIDATION, model, "validation_data"),
        target=rls.Target(sparsity=SPARSITY),
    )
    assert network.recovery.method == "least_squares"
    settings = LoopSettings(agent=DQN, reward=rls.Reward(), buckets=6, seed=3, warm_start=True)
    loop = SearchLoop(settings, network)
    learned: list[list[float]] = []
    learn = loop.episodes.agent._learn

    def watch(transitions):
        sums, total = [], 0.0
        for transition in transitions:
            total += transition.reward
            if transition.next_step_type == 2:
                sums.append(total)
                total = 0.0
        learned.append(sums)
        return learn(transitions)

    loop.episodes.agent._learn = watch
    best = loop.run(6, Watch(loop, network))
    for entry, sums in zip(loop.history, learned, strict=True):
        assert sums == [pytest.approx(entry["reward"])] * 2  # one per kernel
    # One evaluation per episode at most, those of the heuristics' plans, and the finalists' kernels
    # ranked anew.
    assert loop.evaluations <= 6 + len(ranking.HEURISTICS) + 3 + len(SCHEDULE)
    assert best.value >= max(entry["reward"] for entry in loop.history)
    plans = [plan for _, plan in [*proposals(network)]]
    values = [rls.Reward()(evaluate_plan(network, plan), None) for plan in plans]
    assert best.value >= max(values)
    # What was found can be found again, from the plan alone.
    outcome = evaluate_plan(network, best.plan)
    assert rls.Reward()(outcome, None) == pytest.approx(best.value)
    assert evaluate_plan(network, best.plan) is network.outcome
    weights = network.latent_weights()
    for path, values_of_layer in best.weights.items():
        for one, other in zip(values_of_layer, weights[path], strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)


def test_recovery_is_chosen_by_what_the_layers_allow():
    recurrent = keras.Sequential(
        [keras.layers.Input((4, 3)), keras.layers.LSTM(8), keras.layers.Dense(2)]
    )
    assert rls.Recovery().resolved(find_kernels(recurrent)).method == "finetune"
    assert rls.Recovery().resolved(find_kernels(trained())).method == "least_squares"
    assert rls.Recovery().resolved(find_kernels(trained()), fixed=16).method == "finetune"
    asked = rls.Recovery(method="least_squares").resolved(find_kernels(recurrent))
    assert asked.method == "least_squares"  # the dense layer can be fitted
    only = keras.Sequential([keras.layers.Input((4, 3)), keras.layers.LSTM(8)])
    with pytest.raises(rls.ArgumentError, match=r"none of the kernels \['lstm.*can be fitted"):
        rls.Recovery(method="least_squares").resolved(find_kernels(only))
