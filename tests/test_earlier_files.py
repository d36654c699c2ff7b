"""What earlier versions wrote is still read."""

import json
import shutil
from pathlib import Path

import earlier_files
import numpy as np
import pytest
import tf_keras as keras

import rl_sparsity_tf as rls
from rl_sparsity_tf.layers.wrapping import plan_of

FIXTURES = Path(__file__).with_name("fixtures")
VERSIONS = sorted(path.name for path in FIXTURES.iterdir())


@pytest.fixture(params=VERSIONS)
def folder(request) -> Path:
    return FIXTURES / request.param


@pytest.fixture
def facts(folder) -> dict:
    return json.loads((folder / "facts.json").read_text())


@pytest.mark.parametrize("name", ["wrapped", "learning"])
def test_a_wrapped_model_is_loaded_as_it_was(folder, facts, name):
    model = rls.load_model(folder / f"{name}.keras")
    x, y = earlier_files.rows(4, 3)
    np.testing.assert_allclose(model.predict(x, verbose=0), facts["outputs"], atol=1e-5)
    assert plan_of(model) == earlier_files.plan()
    stripped = rls.strip(model)
    np.testing.assert_allclose(stripped.predict(x, verbose=0), facts["outputs"], atol=1e-5)
    assert np.count_nonzero(stripped.layers[0].kernel) == 6 * 8 * 2 // 3
    model.fit(x, y, verbose=0)
    assert plan_of(model).sparsity == earlier_files.plan().sparsity


def test_a_wrapped_model_is_loaded_by_keras_itself(folder, facts):
    model = keras.models.load_model(folder / "wrapped.keras")
    x, _ = earlier_files.rows(4, 3)
    np.testing.assert_allclose(model.predict(x, verbose=0), facts["outputs"], atol=1e-5)


@pytest.mark.parametrize("name", ["plan", "rules"])
def test_a_plan_is_read_and_written_again_as_it_was(folder, name):
    path = folder / f"{name}.json"
    plan = rls.CompressionPlan.load(path)
    rules = rls.CompressionPlan.from_dict(earlier_files.RULES)
    assert plan == {"plan": earlier_files.plan(), "rules": rules}[name]
    assert plan.to_json() == path.read_text()


def test_a_latency_table_is_read_and_written_again_as_it_was(folder, tmp_path):
    path = folder / "latency.json"
    table = rls.LatencyTable.load(path)
    table.check(earlier_files.network())
    assert table.layer_ms("first", 3, 5) == 15 / 64
    table.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == path.read_text()


def test_a_policy_is_read_as_it_was(folder, facts):
    policy = rls.Compressor(earlier_files.network(), policy=folder / "policy.npz").policy
    assert policy.agent == earlier_files.AGENT
    assert policy.digest == facts["policy"]


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on(folder, tmp_path):
    run = shutil.copytree(folder / "run", tmp_path / "run")
    before = (run / "journal.jsonl").read_text().splitlines()
    assert len(before) == earlier_files.PLAYED
    result = earlier_files.search(earlier_files.compressor(run))
    assert (run / "journal.jsonl").read_text().splitlines()[: len(before)] == before
    assert [entry["episode"] for entry in result.history] == list(range(earlier_files.EPISODES))
    assert result.plan.sparsity >= 0.5
    assert rls.CompressionPlan.load(run / "plan.json") == result.plan
