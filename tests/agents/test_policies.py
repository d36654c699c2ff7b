"""Policies as files: what is saved, what begins with it, and what is refused."""

from __future__ import annotations

import csv
import functools
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from tf_agents.specs import array_spec
from tf_agents.trajectories import time_step as ts
from tiny_search import (
    DQN,
    PPO,
    TEST,
    TRAIN,
    VALIDATION,
    compressor,
    episodes_of,
    quick_search,
    search,
    trained,
)

import rl_sparsity_tf as rls
from rl_sparsity_tf.agents.configs import build_agent
from rl_sparsity_tf.agents.demonstrations import heuristic_plan, proposals
from rl_sparsity_tf.agents.policies import (
    CONSTRUCT,
    IMPROVE,
    INTERFACES,
    SavedPolicy,
    resolve_policy,
)
from rl_sparsity_tf.cli import main
from rl_sparsity_tf.console import SearchProgress
from rl_sparsity_tf.data.batches import evaluation_data, training_data
from rl_sparsity_tf.environment.layer_environment import LayerEnvironment
from rl_sparsity_tf.environment.moves import ACTIONS, IMPROVEMENT_STATE_SIZE
from rl_sparsity_tf.environment.network import CompressedNetwork, evaluate_plan
from rl_sparsity_tf.errors import FileExistsRLSparsityError, PolicyFileError
from rl_sparsity_tf.search.episodes import RELATIVE_GAIN, Episodes, LoopSettings
from rl_sparsity_tf.search.loop import SearchLoop

BUCKETS = INTERFACES[CONSTRUCT]
SIZES = (len(BUCKETS.features), len(BUCKETS.actions))


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick_search():
        yield


def drawn(config: rls.DQN | rls.PPO = DQN, seed: int = 0, strategy: str = CONSTRUCT) -> SavedPolicy:
    """A policy that likes something, without a search."""
    rng = np.random.default_rng(seed)
    shapes = INTERFACES[strategy].shapes(config)
    weights = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    return SavedPolicy(config, weights, strategy)


@pytest.fixture
def path(tmp_path) -> Path:
    drawn().save(tmp_path / "policy.npz")
    return tmp_path / "policy.npz"


def rewritten(path: Path, **changes) -> Path:
    """The file with some arrays replaced, or taken out where they are None."""
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    arrays.update({key.replace("__", "/"): value for key, value in changes.items()})
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


@functools.cache
def shared_network() -> CompressedNetwork:
    model = trained()
    return CompressedNetwork(
        model,
        training_data(TRAIN, model, batch_size=32),
        evaluation_data(VALIDATION, model, "validation_data"),
        target=rls.Target(sparsity=0.6),
    )


def fitted() -> CompressedNetwork:
    """A network that recovers by least squares, as good as new."""
    network = shared_network()
    network.reset()
    network.seen.clear()
    network.decisions.by_magnitude = False
    network.group_ranks.forget()
    return network


def loop_of(policy: SavedPolicy, network: CompressedNetwork | None = None, **options) -> SearchLoop:
    options = {"agent": policy.agent, "buckets": 3, "seed": 1, "warm_start": True, **options}
    settings = LoopSettings(reward=rls.Reward(), policy=policy, **options)
    return SearchLoop(settings, network or fitted())


def silent(episodes: int) -> SearchProgress:
    return SearchProgress(episodes, "accuracy", verbose=0)


def greedy_actions(agent, network: CompressedNetwork) -> list[int]:
    """What an agent likes best, by a loop of its own, with buckets around LAMP's densities."""
    network.reset()
    taken = []
    around = heuristic_plan(network, "lamp")
    kernels = sorted(network.kernels, key=lambda kernel: kernel.size)
    for place, kernel in enumerate(kernels):
        later = [other.path for other in kernels[place + 1 :]]
        environment = LayerEnvironment(
            network, kernel.path, buckets=3, later=later, evaluate=not later
        )
        environment.centre(around.kernels[kernel.path].sparsity)
        environment.commit()
        time_step = environment.reset()
        while not time_step.is_last():
            taken.append(agent.act(time_step))
            time_step = environment.step(np.int32(taken[-1]))
    return taken


# -- files that are fine -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("config", [DQN, PPO, rls.DQN(hidden_layers=(5, 3, 4), double=False)])
def test_a_saved_policy_takes_the_same_actions_when_it_is_loaded(config, tmp_path):
    network = fitted()
    environment = LayerEnvironment(network, network.kernels[0].path, buckets=3)
    specs = environment.time_step_spec(), environment.action_spec()
    agent = build_agent(config, *specs, seed=0)
    agent.set_policy_arrays(drawn(config, seed=3).weights)
    SavedPolicy.of(config, agent).save(tmp_path / "policy.npz")
    loaded = SavedPolicy.load(tmp_path / "policy.npz")
    assert loaded.agent == config
    other = build_agent(loaded.agent, *specs, seed=9)
    before = greedy_actions(other, network)
    other.set_policy_arrays(loaded.weights)
    expected = greedy_actions(agent, network)
    assert greedy_actions(other, network) == expected
    assert before != expected, "a test that any policy would pass"


@pytest.mark.slow
@pytest.mark.parametrize("config", [DQN, PPO, rls.DQN(hidden_layers=(5, 3, 4))])
def test_the_shapes_a_configuration_tells_are_those_of_the_agents_networks(config):
    network = fitted()
    environment = LayerEnvironment(network, network.kernels[0].path)
    agent = build_agent(config, environment.time_step_spec(), environment.action_spec())
    assert [one.shape for one in agent.policy_arrays()] == config.policy_shapes(*SIZES)


@pytest.mark.parametrize("config", [DQN, PPO, rls.DQN(hidden_layers=()), rls.PPO(hidden_layers=())])
def test_policies_of_moves_fit_the_networks_that_score_slots(config, tmp_path):
    policy = drawn(config, strategy=IMPROVE)
    policy.save(tmp_path / "policy.npz")
    loaded = SavedPolicy.load(tmp_path / "policy.npz")
    assert (loaded.strategy, loaded.agent, loaded.digest) == (IMPROVE, config, policy.digest)
    state = array_spec.BoundedArraySpec((IMPROVEMENT_STATE_SIZE,), np.float32, -1.0, 1.0, "state")
    legal = array_spec.BoundedArraySpec((ACTIONS,), np.int32, 0, 1, "legal")
    action = array_spec.BoundedArraySpec((), np.int32, 0, ACTIONS - 1, "action")
    specs = ts.time_step_spec({"state": state, "legal": legal}), action
    agent = build_agent(config, *specs, slots=INTERFACES[IMPROVE].slots)
    assert [one.shape for one in agent.policy_arrays()] == INTERFACES[IMPROVE].shapes(config)
    agent.set_policy_arrays(loaded.weights)
    for before, after in zip(policy.weights, agent.policy_arrays(), strict=True):
        np.testing.assert_array_equal(before, after)


def test_files_that_are_older_than_strategies_decide_buckets(path):
    digest = SavedPolicy.load(path).digest
    older = SavedPolicy.load(rewritten(path, strategy=None))
    assert (older.strategy, older.digest) == (CONSTRUCT, digest)


def test_a_policy_is_of_one_strategy(path, tmp_path):
    with pytest.raises(
        rls.ArgumentError, match=r"cannot go on from a policy of 'construct', .*buck"
    ):
        rls.Compressor(trained(), policy=path, strategy="improve")
    drawn(strategy=IMPROVE).save(tmp_path / "moves.npz")
    with pytest.raises(rls.ArgumentError, match=r"Pass strategy='improve', or leave"):
        rls.Compressor(trained(), policy=tmp_path / "moves.npz")
    with pytest.raises(rls.ArgumentError, match=r"strategy='improbe'.*Did you mean 'improve'"):
        rls.Compressor(trained(), policy=tmp_path / "moves.npz", strategy="improbe")


def test_the_file_is_plain_numbers_and_text(path):
    with np.load(path, allow_pickle=False) as file:
        kinds = {key: file[key].dtype.kind for key in file.files}
        assert int(file["format_version"]) == 1
        assert json.loads(str(file["agent"])) == DQN.to_dict()
        assert file["features"].tolist() == list(BUCKETS.features)
        assert file["operations"].tolist() == ["keep", "prune", "quantize", "shuffle"]
    assert set(kinds.values()) == {"i", "U", "f"}
    assert sum(key.startswith("weights/") for key in kinds) == 4


def test_saving_refuses_to_overwrite_and_leaves_nothing_half_written(path, monkeypatch):
    before = path.read_bytes()
    with pytest.raises(FileExistsRLSparsityError, match="pass overwrite=True"):
        drawn(seed=1).save(path)
    monkeypatch.setattr(np, "savez_compressed", lambda file, **_: file.write(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        drawn(seed=1).save(path, overwrite=True)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["policy.npz"]
    monkeypatch.undo()
    drawn(seed=1).save(path, overwrite=True)
    assert SavedPolicy.load(path).digest == drawn(seed=1).digest != drawn().digest


def test_a_random_agent_has_nothing_to_save(tmp_path):
    with pytest.raises(rls.ArgumentError, match="'random' has learned nothing"):
        SavedPolicy(rls.Random(), []).save(tmp_path / "policy.npz")
    with pytest.raises(rls.ArgumentError, match=r"ends in '.txt'"):
        drawn().save(tmp_path / "policy.txt")


# -- files that are not --------------------------------------------------------------------------


class Hostile:
    """Unpickled, it would leave a trace."""

    def __reduce__(self):
        return (Path("trace").write_text, ("run",))


def object_array() -> np.ndarray:
    array = np.empty((), object)
    array[()] = Hostile()
    return array


NAMES = np.array(BUCKETS.features)
OF_RANDOM = json.dumps(rls.Random().to_dict())
UNKNOWN = json.dumps({**DQN.to_dict(), "lerning_rate": 1})
WIDE = json.dumps({**DQN.to_dict(), "hidden_layers": [10**9]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights__0": object_array()}, "Python objects in 'weights/0', which are never unpick"),
        ({"agent": object_array()}, "Python objects in 'agent'"),
        ({"format_version": np.array(2)}, r"is of format 2\. Expected format 1"),
        ({"format_version": None}, r"is of format none\. Expected format 1"),
        ({"format_version": np.arange(2)}, r"is of format \[0 1\]"),
        ({"features": None}, r"holds no 'features'"),
        ({"features": NAMES[:-1]}, r"does not know the features \['depthwise'\]\. Expected the"),
        ({"features": np.append(NAMES, "luck")}, r"features that this version has not: \['luck'\]"),
        ({"features": NAMES[::-1]}, r"has the features in another order\. .*train the policy anew"),
        ({"features": np.arange(3)}, r"holds 'features' of type int64 and shape \(3,\)"),
        ({"operations": np.array(["keep", "prune"])}, r"the operations \['quantize', 'shuffle'\]"),
        ({"agent": np.array("{")}, r"agent that cannot be built \(JSONDecodeError"),
        ({"agent": np.array("[" * 9999)}, r"agent that cannot be built \(RecursionError"),
        ({"agent": np.array("[]")}, r"agent that cannot be built \(ValueError: \[\] is no dict"),
        ({"agent": np.array(UNKNOWN)}, r"DQN has no setting 'lerning_rate'"),
        ({"agent": np.array(OF_RANDOM)}, r"is of agent='random', which learns nothing"),
        ({"agent": np.array(WIDE)}, r"'weights/0' of type float32 and shape \(\d+, 8\)\. Expected"),
        ({"weights__3": None}, r"lacks \['weights/3'\]\. Expected 4 arrays of weights"),
        ({"weights__4": np.zeros(3, "f4")}, r"holds \['weights/4'\], which are not known"),
        ({"weights__1": np.zeros(9, "f4")}, r"shape \(9,\)\. Expected float32 of shape \(8,\)"),
        ({"weights__1": np.zeros(8)}, r"'weights/1' of type float64 and shape \(8,\)"),
        ({"weights__1": np.full(8, np.nan, "f4")}, r"holds 8 NaN or infinite values in 'weights/1"),
        ({"weights__1": np.full(8, np.inf, "f4")}, r"holds 8 NaN or infinite values"),
    ],
)
def test_files_that_cannot_be_used_are_refused(changes, message, path, monkeypatch):
    monkeypatch.chdir(path.parent)
    rewritten(path, **changes)
    with pytest.raises(PolicyFileError, match=message) as caught:
        rls.Compressor(trained(), policy=path)
    assert str(path) in str(caught.value)
    assert "Expected" in str(caught.value)
    assert not Path("trace").exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_truncated_files_are_refused(share, path):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(PolicyFileError, match=r"truncated: its end is missing|is not a \.npz file"):
        SavedPolicy.load(path)


def test_damaged_and_foreign_files_are_refused(path, tmp_path):
    content = bytearray(path.read_bytes())
    content[200:260] = bytes(60)
    path.write_bytes(bytes(content))
    with pytest.raises(PolicyFileError, match="is damaged at '"):
        SavedPolicy.load(path)
    with zipfile.ZipFile(tmp_path / "foreign.npz", "w") as archive:
        archive.writestr("notes.txt", "nothing to see")
    with pytest.raises(PolicyFileError, match=r"holds 'notes\.txt', which is no array"):
        SavedPolicy.load(tmp_path / "foreign.npz")
    np.savez(tmp_path / "data.npz", x_train=np.zeros(3))
    with pytest.raises(PolicyFileError, match="is of format none"):
        SavedPolicy.load(tmp_path / "data.npz")


def test_a_file_that_would_fill_the_memory_is_not_unpacked(path):
    np.savez_compressed(path, huge=np.zeros(2**26 + 1, np.uint8))
    assert path.stat().st_size < 2**20
    with pytest.raises(PolicyFileError, match=r"claims to hold 67,\d+,\d+ bytes"):
        SavedPolicy.load(path)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("missing.npz", r"'missing\.npz' does not exist\. Expected a \.npz file that"),
        (".", r"'\.' is a folder"),
        (3, r"policy=3 is a int\. Expected a \.npz file"),
    ],
)
def test_what_is_no_file_is_refused(policy, message):
    with pytest.raises(rls.ArgumentError, match=message):
        rls.Compressor(trained(), policy=policy)


def test_the_policy_that_comes_with_the_package_decides_moves():
    policy = SavedPolicy.load("pretrained")
    assert (policy.strategy, policy.agent.name, policy.agent.hidden_layers) == (IMPROVE, "dqn", ())
    assert all(np.isfinite(one).all() and one.any() for one in policy.weights)
    begun = rls.Compressor(trained(), policy="pretrained", strategy="improve")
    assert (begun.agent, begun.policy.digest) == (policy.agent, policy.digest)
    file = Path(rls.__file__).parent / "agents" / "pretrained_moves.npz"
    assert file.stat().st_size < 100_000
    # The wheel has it, too.
    assert "pretrained_*.npz" in (Path(__file__).parents[2] / "setup.cfg").read_text()


def test_the_policy_of_moves_builds_no_plans_and_is_of_one_agent():
    with pytest.raises(rls.ArgumentError, match=r"'construct' cannot go on from a policy of 'impr"):
        rls.Compressor(trained(), policy="pretrained")
    with pytest.raises(rls.ArgumentError, match=r"agent='ppo' cannot go on from a policy of 'dqn'"):
        rls.Compressor(trained(), agent="ppo", policy="pretrained", strategy="improve")


# -- whose settings ------------------------------------------------------------------------------


def test_the_agent_is_that_of_the_policy_unless_one_is_given(path):
    one = rls.Compressor(trained(), policy=path)
    assert one.agent == DQN
    assert one.policy.digest == drawn().digest
    assert rls.Compressor(trained(), policy=path, agent="dqn").agent == DQN
    quick = rls.DQN(hidden_layers=(8,), train_steps=1)
    assert rls.Compressor(trained(), policy=path, agent=quick).agent == quick
    assert resolve_policy(None, None) == (None, rls.DQN())
    for agent, message in (
        ("ppo", r"agent='ppo' cannot go on from a policy of 'dqn'"),
        ("random", r"agent='random' cannot go on from a policy of 'dqn'"),
        (rls.DQN(hidden_layers=(9,)), r"other networks than the policy.*equal hidden_layers"),
    ):
        with pytest.raises(rls.ArgumentError, match=message):
            rls.Compressor(trained(), policy=path, agent=agent)


def test_policies_and_two_levels_do_not_go_together(path):
    with pytest.raises(rls.ArgumentError, match=r"policy=\.\.\. does not go with hierarchy=True"):
        rls.Compressor(trained(), policy=path, hierarchy=True)


@pytest.mark.slow
def test_an_agent_refuses_weights_of_other_networks_and_explores_less_with_its_own():
    network = fitted()
    environment = LayerEnvironment(network, network.kernels[0].path)
    specs = environment.time_step_spec(), environment.action_spec()
    agent = build_agent(DQN, *specs)
    with pytest.raises(rls.RLSparsityError, match=r"received arrays of shapes .*; expected"):
        agent.set_policy_arrays(drawn(PPO).weights)
    assert agent.epsilon() == DQN.epsilon_start
    agent.set_policy_arrays(drawn().weights)
    assert agent.epsilon() == DQN.epsilon_end
    agent.step(environment.reset())
    with pytest.raises(rls.RLSparsityError, match="in the middle of a search episode"):
        agent.set_policy_arrays(drawn().weights)
    agent.discard_episode()
    again = build_agent(DQN, *specs, seed=4)
    again.set_state(agent.get_state())
    assert again.epsilon() == DQN.epsilon_end


# -- searches that begin with one ----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("config", [DQN, PPO], ids=["dqn", "ppo"])
def test_the_plan_without_a_search_is_what_the_policy_likes_best(config):
    policy = drawn(config, seed=5)
    loop = loop_of(policy)
    best = loop.run(0, silent(0))
    evaluations = loop.evaluations
    network = fitted()
    episodes = Episodes(
        LoopSettings(agent=config, reward=rls.Reward(), buckets=3, seed=7, warm_start=False),
        network,
    )
    episodes.agent.set_policy_arrays(policy.weights)
    found = {}
    for by_magnitude in (False, True):
        episodes.order_by_magnitude(by_magnitude)
        greedy_actions(episodes.agent, network)
        found[network.plan.to_json()] = rls.Reward()(network.outcome, None)
    assert best.value == pytest.approx(max(found.values()))
    assert found[best.plan.to_json()] == best.value
    assert best.plan not in (plan for _, plan in proposals(network))
    assert (best.proposed_by, best.episode, best.found_by) == ("policy", -1, "policy")
    assert evaluations == len(found)
    assert loop.history == []


@pytest.mark.slow
def test_the_policys_plan_stands_beside_those_of_heuristics_and_the_best_is_returned():
    loop = loop_of(drawn(seed=5))
    best = loop.run(3, silent(3))
    names = [name for name, _ in loop.proposed]
    assert names.count("policy") == 1
    assert {"lamp", "uniform"} <= set(names)
    network = fitted()
    values = [rls.Reward()(evaluate_plan(network, plan), None) for _, plan in loop.proposed]
    assert values == sorted(values, reverse=True)
    assert best.value == max([*values, *(entry["reward"] for entry in loop.history)])
    assert len(loop.history) == 3


@pytest.mark.slow
def test_values_are_learned_relative_to_what_the_policys_plan_is_worth():
    policy = drawn(seed=5)
    loop = loop_of(policy, warm_start=False)
    learned = []
    end = loop.episodes.agent.end_episode
    loop.episodes.agent.end_episode = lambda **given: learned.append(given) or end(**given)
    loop.run(2, silent(2))
    reference = loop_of(policy).run(0, silent(0)).value
    for entry, given in zip(loop.history, learned, strict=True):
        expected = np.clip(RELATIVE_GAIN * (entry["reward"] - reference), -1, 1)
        assert given == {"worth": pytest.approx(expected)}


@pytest.mark.slow
def test_no_search_at_all_gives_a_finished_model(path, tmp_path):
    options = {"policy": path, "directory": tmp_path / "run", "recovery": "least_squares"}
    result = search(compressor(trained(), agent=None, **options), episodes=0, test_data=TEST)
    assert result.history == []
    assert result.candidate.proposed_by == "policy"
    assert result.metrics["compressed"]["proposed_by"] == "policy"
    assert result.metrics["search"]["episodes"] == 0
    assert result.metrics["search"]["evaluations"] in (1, 2)  # in either order of the weights
    assert result.metrics["compressed"]["sparsity"] >= 0.6
    assert result.policy.digest == drawn().digest
    header = next(csv.reader((tmp_path / "run" / "history.csv").read_text().splitlines()))
    assert header == ["keep", "prune", "quantize", "shuffle"]


def test_no_episodes_without_a_policy_are_refused():
    with pytest.raises(rls.ArgumentError, match=r"episodes=0 cannot be used.* at least 1"):
        search(compressor(trained()), episodes=0)


@pytest.mark.slow
def test_what_a_search_has_learned_is_saved_and_begins_another(tmp_path):
    result = search(compressor(trained(), warm_start=False), episodes=2, finetune_epochs=0)
    result.save_policy(tmp_path / "policy.npz")
    with pytest.raises(FileExistsRLSparsityError, match="overwrite=True"):
        result.save_policy(tmp_path / "policy.npz")
    result.save_policy(tmp_path / "policy.npz", overwrite=True)
    saved = SavedPolicy.load(tmp_path / "policy.npz")
    for array, other in zip(saved.weights, result.policy.weights, strict=True):
        np.testing.assert_array_equal(array, other)
    other = compressor(trained(), agent=None, policy=saved, target=rls.Target(sparsity=0.4))
    again = search(other, episodes=1, finetune_epochs=0)
    assert again.metrics["compressed"]["sparsity"] >= 0.4
    assert again.policy.digest != saved.digest


@pytest.mark.slow
def test_a_run_goes_on_with_its_own_policy_only_and_with_the_same_bits(tmp_path, monkeypatch):
    options = {"agent": None, "policy": drawn(), "warm_start": True}
    whole = episodes_of(compressor(trained(), directory=tmp_path / "whole", **options))
    folder = tmp_path / "run"
    played = []
    play = Episodes.play

    def cut_off(self, demonstration=None):
        if len(played) == 2:
            raise KeyboardInterrupt
        played.append(demonstration)
        return play(self, demonstration)

    monkeypatch.setattr(Episodes, "play", cut_off)
    with pytest.raises(KeyboardInterrupt):
        search(compressor(trained(), directory=folder, **options))
    monkeypatch.undo()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["arguments"]["policy"] == drawn().digest
    other = compressor(trained(), agent=DQN, policy=drawn(seed=1), directory=folder)
    with pytest.raises(FileExistsRLSparsityError, match=r"unfinished run that differs in pol"):
        search(other)
    resumed = episodes_of(compressor(trained(), directory=folder, **options))
    for one, other in zip(resumed, whole, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


# -- the command line ----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_line_saves_policies_and_begins_with_them(path, tmp_path, capsys):
    trained().save(tmp_path / "model.keras")
    arrays = dict(zip(("x_train", "y_train"), TRAIN, strict=True))
    arrays |= dict(zip(("x_validation", "y_validation"), VALIDATION, strict=True))
    np.savez(tmp_path / "data.npz", **arrays)
    command = ["compress", str(tmp_path / "model.keras"), "--data", str(tmp_path / "data.npz")]
    command += "--finetune-epochs 1 --finalists 1 --target-sparsity 0.5".split()
    command += "--batch-size 32 --verbose 0".split()
    saved, new = tmp_path / "learned.npz", str(tmp_path / "new.npz")
    first = ["--episodes", "1", "--output", str(tmp_path / "one"), "--policy", str(path)]
    assert main([*command, *first, "--save-policy", str(saved)]) == 0
    assert SavedPolicy.load(saved).agent == DQN
    second = ["--episodes", "0", "--output", str(tmp_path / "two"), "--policy", str(saved)]
    assert main([*command, *second]) == 0
    metrics = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert metrics["compressed"]["proposed_by"] == "policy"
    for wrong, message in (
        (["--episodes", "0"], "episodes=0 cannot be used"),
        (["--policy", str(tmp_path / "data.npz")], "is of format none"),
        (["--policy", str(path), "--agent", "ppo"], "cannot go on from a policy of 'dqn'"),
        (["--save-policy", new, "--hierarchy"], "cannot be used with --hierarchy: of its two"),
        (["--save-policy", str(saved)], "exists already. Choose another name, or pass --overwrite"),
    ):
        capsys.readouterr()
        assert main([*command, "--output", str(tmp_path / "three"), *wrong]) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1
    assert not (tmp_path / "three").exists()
