"""The contenders of a finished search: complete rows, equal conditions, every error."""

import json
import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_search import (
    SPARSITY,
    TEST,
    TRAIN,
    VALIDATION,
    compressor,
    quick_search,
    search,
    stop,
    trained,
)

import rl_sparsity_tf as rls
from rl_sparsity_tf.cli import main
from rl_sparsity_tf.errors import ArgumentError, MissingDependencyError
from rl_sparsity_tf.search import comparison
from rl_sparsity_tf.search.comparison import ALL, CONTENDERS, DEFAULT, compare, comparison_table

ROW = {
    *("name", "accuracy", "metric", "validation_accuracy", "validation_metric"),
    *("tflite_accuracy", "tflite_metric", "tflite_bytes", "gzip_bytes", "sparsity"),
    "evaluations",
}


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick_search():
        yield


def searched(**options):
    one = compressor(trained(), **options.pop("compressor", {}))
    search(one, **{"episodes": 2, "finetune_epochs": 1, "test_data": TEST, **options})
    return one


@pytest.fixture(scope="module")
def finished():
    """A search for a sparsity, and what all its contenders came to."""
    one = searched()
    return SimpleNamespace(compressor=one, entries=compare(one, "all", verbose=0))


@pytest.fixture(scope="module")
def small():
    """A search for a gzipped size that takes zeros."""
    target = rls.Target(gzip_bytes=1000)
    return searched(compressor={"target": target, "recovery": "least_squares"}, test_data=None)


def rows_of(one, *names):
    return compare(one, list(names), verbose=0)


# ---------------------------------------------------------------------------- all of them


@pytest.mark.slow
def test_all_contenders_have_complete_rows(finished):
    assert [entry["name"] for entry in finished.entries] == [CONTENDERS[name] for name in ALL]
    assert len(ALL) == 10
    # Beside them there are one that stores floats and four that are for whole channels.
    assert len(CONTENDERS) == len(ALL) + 1 + 4
    for entry in finished.entries:
        assert set(entry) == ROW
        assert entry["sparsity"] >= SPARSITY
        assert entry["sparsity"] <= SPARSITY + 0.05
        for key in ROW - {"name"}:
            assert math.isfinite(entry[key]), (entry["name"], key)
        assert 0 < entry["gzip_bytes"] < entry["tflite_bytes"]
    json.dumps(finished.entries)


@pytest.mark.slow
def test_those_that_search_evaluate_as_many_plans_as_the_search(finished):
    search_evaluations = finished.compressor.last.result.metrics["search"]["evaluations"]
    evaluations = {entry["name"]: entry["evaluations"] for entry in finished.entries}
    assert search_evaluations > 2
    assert evaluations["random search int8"] == search_evaluations
    assert 1 < evaluations["hill climbing int8"] <= search_evaluations
    assert evaluations["random policy"] > 1
    for name in ("uniform magnitude int8", "LAMP int8", "dynamic programming"):
        assert evaluations[name] == 1


@pytest.mark.slow
def test_the_search_is_left_as_it_was(finished):
    last = finished.compressor.last
    assert last.loop.evaluations == last.result.metrics["search"]["evaluations"]
    assert last.network.plan.count_operations()["prune"] == 0
    assert last.result.metrics["baselines"] is finished.entries


@pytest.mark.slow
def test_the_table_says_who_proposed_the_plan(finished):
    metrics = finished.compressor.last.result.metrics
    for proposer, title in (("dqn", "compressed (dqn)"), ("erk", "compressed (dqn, plan of erk)")):
        compressed = {**metrics["compressed"], "proposed_by": proposer}
        lines = []
        comparison_table({**metrics, "compressed": compressed}, lines.append)
        text = "\n".join(lines)
        for name in (title, "dense int8", *(entry["name"] for entry in finished.entries)):
            assert f"│ {name} " in text


@pytest.mark.slow
def test_a_single_name_is_enough(finished):
    (again,) = compare(finished.compressor, "lamp", verbose=0)
    (before,) = [entry for entry in finished.entries if entry["name"] == "LAMP int8"]
    for key in ("name", "sparsity", "evaluations"):
        assert again[key] == before[key]
    assert again["validation_metric"] == pytest.approx(before["validation_metric"], abs=0.1)


@pytest.mark.slow
def test_tfmot_is_trained_by_itself_only(finished, monkeypatch):
    trainings = []
    original = comparison.prune_with_tfmot

    def kept(request, train, **options):
        trainings.append((train, options))
        return original(request, train, **options)

    monkeypatch.setattr(comparison, "prune_with_tfmot", kept)
    monkeypatch.setattr(comparison, "play_final", stop)
    (entry,) = rows_of(finished.compressor, "tfmot", "tfmot")
    last = finished.compressor.last
    ((train, options),) = trainings
    assert train is last.figures.train
    assert options == {"epochs": last.training.epochs, "pruned": None}
    assert entry["name"] == "TFMOT int8, trained by TFMOT"
    assert entry["sparsity"] == pytest.approx(44 / 72)


# ---------------------------------------------------------------------------- sizes in bytes


@pytest.mark.slow
def test_contenders_are_held_to_a_size(small):
    names = ("uniform", "dynamic_programming", "random_search", "tfmot")
    entries = rows_of(small, *names)
    assert [entry["name"] for entry in entries] == [CONTENDERS[name] for name in names]
    for entry in entries:
        assert entry["gzip_bytes"] <= 1000
        assert entry["metric"] is None  # there is no test data
        assert 0 < entry["sparsity"] < 1


@pytest.mark.slow
def test_tfmot_prunes_more_where_its_file_is_too_large(small, monkeypatch):
    original = comparison.prune_with_tfmot
    asked = []

    def too_little(request, train, *, epochs, pruned):
        asked.append(pruned)
        return original(request, train, epochs=epochs, pruned=pruned or 0)

    monkeypatch.setattr(comparison, "prune_with_tfmot", too_little)
    (entry,) = rows_of(small, "tfmot")
    assert entry["gzip_bytes"] <= 1000
    assert entry["evaluations"] == len(asked) > 1
    assert asked[0] is None
    assert asked[1] > 0
    monkeypatch.setattr(comparison, "_ATTEMPTS", 1)
    with pytest.raises(rls.TargetError, match=r"\(gzip_bytes=1000\) was missed by TFMOT: after it"):
        rows_of(small, "tfmot")


@pytest.mark.slow
def test_who_cannot_reach_the_target_is_left_out_or_refused(small, monkeypatch, caplog):
    def out_of_reach(_):
        raise rls.TargetError("That is too small.")

    monkeypatch.setattr(comparison, "propose", out_of_reach)
    with pytest.raises(rls.TargetError, match=r"That is too small\."):
        rows_of(small, "lamp", "dynamic_programming", "erk")
    # What was finished by then is kept.
    assert [entry["name"] for entry in small.last.result.metrics["baselines"]] == ["LAMP int8"]
    monkeypatch.setattr(comparison, "DEFAULT", ("dynamic_programming", "uniform_float32"))
    with caplog.at_level(logging.WARNING, "rl_sparsity_tf"):
        (entry,) = compare(small, verbose=0)
    assert entry["name"] == "uniform magnitude"
    assert entry["gzip_bytes"] <= 1000  # by more zeros than integers need
    assert "The contender dynamic_programming is left out: That is too small." in caplog.text


# ---------------------------------------------------------------------------- errors


def test_there_must_be_a_search_first():
    with pytest.raises(rls.ArgumentError, match=r"has not searched yet.*Call compressor\.search"):
        compare(compressor(trained()))


@pytest.mark.parametrize(
    ("contenders", "message"),
    [
        (["lam"], r"contender='lam' is not known\. Expected one of .* Did you mean 'lamp'\?"),
        ("al", r"contender='al' is not known\. Expected one of 'all', .* Did you mean 'all'\?"),
        ([None], r"contender=None is not known"),
        ([], r"contenders=\[\] cannot be used\. Expected 'all', or a list of names such as"),
        (3, r"contenders=3 cannot be used"),
    ],
)
def test_unknown_contenders_are_refused(contenders, message):
    with pytest.raises(rls.ArgumentError, match=message):
        compare(compressor(trained()), contenders)


@pytest.mark.slow
def test_a_named_contender_that_cannot_run_is_an_error(finished, monkeypatch):
    one = finished.compressor

    def missing():
        raise MissingDependencyError("no TFMOT")

    with monkeypatch.context() as patch:
        patch.setattr(comparison, "load_tfmot", missing)
        patch.setattr(comparison, "play_final", stop)  # it is said before others are run
        with pytest.raises(MissingDependencyError, match="no TFMOT"):
            rows_of(one, "lamp", "tfmot")
    with monkeypatch.context() as patch:
        network = one.last.network
        flat = {path: SimpleNamespace(gradient=np.zeros(1)) for path in network.dense_statistics}
        patch.setattr(network, "dense_statistics", flat)
        with pytest.raises(rls.DataError, match="is zero in every kernel on the search's training"):
            rows_of(one, "first_order")
    untrained = searched(finetune_epochs=0, episodes=1)
    with pytest.raises(rls.ArgumentError, match=r"called with finetune_epochs=0\. Expected at lea"):
        rows_of(untrained, "tfmot")


# ---------------------------------------------------------------------------- the command line


@pytest.mark.slow
def test_compress_compares_when_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(comparison, "ALL", ("uniform", "tfmot"))
    trained().save(tmp_path / "model.keras")
    names = ("x_train", "y_train", "x_validation", "y_validation")
    np.savez(tmp_path / "data.npz", **dict(zip(names, (*TRAIN, *VALIDATION), strict=True)))
    command = (
        f"compress {tmp_path}/model.keras --data {tmp_path}/data.npz --output {tmp_path}/run "
        "--episodes 1 --finetune-epochs 1 --target-sparsity 0.5 --batch-size 32 --compare"
    )
    assert main(command.split()) == 0
    printed = capsys.readouterr().out
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    titles = ["uniform magnitude int8", "TFMOT int8, trained by TFMOT"]
    assert [entry["name"] for entry in metrics["baselines"]] == titles
    assert "training and exporting: TFMOT" in printed
    assert all(f"│ {title} " in printed for title in titles)


@pytest.mark.parametrize(("more", "contenders"), [([], None), (["--compare"], "all")])
def test_the_demo_compares_with_more_when_asked(more, contenders, monkeypatch):
    called = {}

    def run_demo(*_, **options):
        called.update(options)
        return SimpleNamespace(report=object())

    monkeypatch.setattr("rl_sparsity_tf.demo.run_demo", run_demo)
    assert main(["demo", *more]) == 0
    assert called["contenders"] == contenders
    assert comparison._names(None)[0] == DEFAULT == ("uniform_float32", "uniform", "random_policy")


@pytest.mark.slow
def test_contenders_that_search_evaluate_as_many_plans_as_they_are_told(small):
    (entry,) = compare(small, ["random_search"], 0, evaluations=3)
    assert entry["evaluations"] == 3
    with pytest.raises(ArgumentError, match=r"evaluations=0"):
        compare(small, ["random_search"], 0, evaluations=0)
