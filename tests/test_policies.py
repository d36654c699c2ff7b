"""Policies: from one search to a file, and from the file to another network."""

import json

import numpy as np
import pytest
import tf_keras as keras
from tiny_search import (
    DQN,
    PPO,
    TRAIN,
    VALIDATION,
    compressor,
    figures_of,
    journal_of,
    quick_autoencoder,
    search,
    trained,
)

import rl_sparsity_tf as rls
from rl_sparsity_tf import policies, search_loop
from rl_sparsity_tf.agents import build_agent
from rl_sparsity_tf.cli import main
from rl_sparsity_tf.errors import FileExistsRLSparsityError
from rl_sparsity_tf.policies import PROPOSER, StoredPolicy, load_policy, play, start_from

L = keras.layers
AGENTS = {"dqn": DQN, "ppo": PPO}


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick_autoencoder():
        yield


@pytest.fixture(scope="module")
def learned():
    """A finished search of every agent."""
    found = {}
    for name, agent in AGENTS.items():
        one = compressor(trained(), agent, recovery="least_squares")
        search(one, finetune_epochs=0)
        found[name] = one.last
    return found


@pytest.fixture(scope="module")
def file(learned, tmp_path_factory):
    path = tmp_path_factory.mktemp("policies") / "policy.npz"
    learned["dqn"].result.save_policy(path)
    return path


def another() -> keras.Model:
    """A network of other shapes for the same data."""
    keras.utils.set_random_seed(4)
    model = keras.Sequential(
        [
            L.Input((6,)),
            L.Dense(12, activation="relu"),
            L.Dense(5, activation="relu"),
            L.Dense(3, activation="softmax"),
        ],
        name="another",
    )
    model.compile("adam", "sparse_categorical_crossentropy", ["accuracy"])
    model.fit(*TRAIN, epochs=3, verbose=0)
    return model


def fresh(environment, agent, seed=5):
    return build_agent(agent, environment.time_step_spec(), environment.action_spec(), seed=seed)


@pytest.mark.parametrize("name", AGENTS)
def test_what_is_read_decides_as_what_was_saved(name, learned, tmp_path):
    result, environments = learned[name].result, learned[name].loop.environments
    result.save_policy(tmp_path / "policy.npz")
    policy = load_policy(tmp_path / "policy.npz")
    assert policy.agent == AGENTS[name]
    assert policy.digest == result.policy.digest
    assert policy.episodes == 4
    agent = fresh(environments[0], policy.agent)
    rng = np.random.default_rng(0)
    steps = [environments[0].reset()._replace(observation=o) for o in _observations(agent, rng)]
    before = [agent.act(step) for step in steps]
    policy.put_into(agent)
    after = [agent.act(step) for step in steps]
    assert after == [learned[name].loop.agent.act(step) for step in steps]
    assert after != before  # with other weights it decides otherwise


def _observations(agent, rng):
    legal = np.ones(agent.n_actions, np.int32)
    for _ in range(40):
        yield {"state": rng.uniform(-1, 1, agent.n_features).astype(np.float32), "legal": legal}


def test_a_policy_is_small_and_holds_no_experience(file):
    with np.load(file, allow_pickle=False) as arrays:
        assert sum(array.size for array in arrays.values()) < 1000
    policy = load_policy(file)
    assert [array.ndim for array in policy.variables] == [2, 1, 2, 1]


def test_learning_goes_on_from_the_policy(learned):
    """Both networks of DQN have it; exploration is what it is at the end of a search."""
    loop = learned["dqn"].loop
    agent = fresh(loop.environments[0], DQN)
    learned["dqn"].result.policy.put_into(agent)
    assert agent.epsilon() == pytest.approx(DQN.epsilon_end)
    assert int(agent.replay.num_frames()) == 0
    online, target = agent.tf_agent._q_network, agent.tf_agent._target_q_network
    wanted = learned["dqn"].result.policy.variables
    for network in (online, target):
        for variable, array in zip(network.variables, wanted, strict=True):
            np.testing.assert_array_equal(variable.numpy(), array)


def test_a_search_of_another_network_begins_with_it(file, monkeypatch):
    seen = []
    begin = StoredPolicy.begin

    def watched(self, loop, network, *arguments):
        begin(self, loop, network, *arguments)
        seen.append((loop.best.plan, loop.best.value, loop.best.proposed_by, loop.best.episode))

    monkeypatch.setattr(StoredPolicy, "begin", watched)
    one = compressor(
        another(), "dqn", policy=file, recovery="least_squares", warm_start=False, seed=1
    )
    assert one.agent == DQN  # of the file, not the defaults
    result = search(one, episodes=2, finetune_epochs=0)
    ((plan, value, proposer, episode),) = seen
    assert (proposer, episode) == (PROPOSER, -1)
    assert result.candidate.value >= value
    # It is what one pass of the policy makes, and meets the target.
    network, environments = one.last.network, one.last.loop.environments
    agent = fresh(environments[0], DQN, seed=9)
    load_policy(file).put_into(agent)
    play(agent, environments, network)
    assert network.plan == plan
    assert network.budget.missing == 0


def test_the_policys_plan_is_the_result_if_nothing_beats_it(file, monkeypatch):
    monkeypatch.setattr(search_loop.SearchLoop, "_propose", lambda *_: None)
    monkeypatch.setattr(policies, "bounded", lambda *_: 1.0)
    result = search(
        compressor(another(), "dqn", policy=file, recovery="least_squares"),
        episodes=1,
        finetune_epochs=0,
    )
    assert result.metrics["compressed"]["proposed_by"] == PROPOSER
    assert result.candidate.found_by == PROPOSER


def test_a_search_with_a_policy_repeats_and_resumes(file, tmp_path, monkeypatch):
    def run(folder):
        one = compressor(
            trained(),
            "dqn",
            policy=file,
            recovery="least_squares",
            warm_start=False,
            directory=folder,
        )
        return search(one, episodes=3, finetune_epochs=0)

    whole = run(tmp_path / "whole")
    append, stopped = search_loop.SearchLoop._save, []

    def cut(self, entry, improved):
        append(self, entry, improved)
        if entry["episode"] == 1:
            stopped.append(entry)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(search_loop.SearchLoop, "_save", cut)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut")
    assert stopped
    resumed = run(tmp_path / "cut")
    assert figures_of(resumed.history) == figures_of(whole.history)
    assert figures_of(journal_of(tmp_path / "cut")) == figures_of(whole.history)
    assert resumed.candidate.plan == whole.candidate.plan
    assert resumed.policy.digest == whole.policy.digest
    manifest = json.loads((tmp_path / "cut" / "manifest.json").read_text())
    assert manifest["arguments"]["policy"] == load_policy(file).digest


def test_another_policy_is_another_run(file, learned, tmp_path, monkeypatch):
    folder = tmp_path / "run"

    def run(policy):
        one = compressor(trained(), "dqn", policy=policy, directory=folder)
        return search(one, episodes=1, finetune_epochs=0)

    with monkeypatch.context() as patch:
        patch.setattr(search_loop.SearchLoop, "run", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(file)
    other = StoredPolicy(
        agent=DQN, variables=tuple(2 * a for a in learned["dqn"].result.policy.variables)
    )
    with pytest.raises(FileExistsRLSparsityError, match="unfinished run that differs in policy"):
        run(other)


def _interrupt(*_, **__):
    raise KeyboardInterrupt


def test_a_configuration_may_differ_in_how_it_learns(file):
    slow = rls.DQN(hidden_layers=(8,), learning_rate=1e-4)
    assert start_from(file, slow)[0] == slow


# ------------------------------------------------------------------------------ wrong calls


def changed(file, path, **changes):
    """A copy of a policy's file with other entries; None takes one out."""
    with np.load(file) as arrays:
        content = {name: arrays[name] for name in arrays.files} | changes
    np.savez(path, **{name: value for name, value in content.items() if value is not None})
    return path


BAD_FILES = {
    "missing": (lambda file, path: path, r"policy\.npz' does not exist\. Expected a file that res"),
    "folder": (lambda file, path: path.parent, r"is a folder\. Expected a file that result\.save"),
    "text": (
        lambda file, path: path.write_text("hello") and path,
        r"cannot be read \(.*Expected a file that result\.save_policy\(path\) wrote",
    ),
    "truncated": (
        lambda file, path: path.write_bytes(file.read_bytes()[:500]) and path,
        r"cannot be read \(.*Expected a file that result\.save_policy",
    ),
    "other arrays": (
        lambda file, path: changed(file, path, format=np.array("data")),
        r"holds other arrays\. Expected a file that result\.save_policy",
    ),
    "one array": (
        lambda file, path: path.write_bytes(_one_array(path)) and path,
        r"holds other arrays\. Expected",
    ),
    "objects": (
        lambda file, path: changed(file, path, episodes=np.array([{"a": 1}], object)),
        r"cannot be read \(ValueError: .*Expected a file",
    ),
    "format": (
        lambda file, path: changed(file, path, format_version=np.array(99)),
        r"is of format 99, written by version .* Expected format 1, .*learn it again with this ver",
    ),
    "features": (
        lambda file, path: changed(file, path, features=np.array(["kept", "luck"])),
        r"learned with other features .*: it lacks \['weight_mean'.* and has \['luck'\] besides\. "
        r"Learn it again",
    ),
    "order": (
        lambda file, path: changed(file, path, actions=np.array(_ACTIONS[::-1])),
        r"learned with other actions .*: it has them in another order\. Learn it again",
    ),
    "agent": (
        lambda file, path: changed(file, path, agent=np.array('{"agent": "dqm"}')),
        r"is damaged \(ArgumentError: agent='dqm' is not known.*Expected a file",
    ),
    "agent in prose": (
        lambda file, path: changed(file, path, agent=np.array("a good one")),
        r"is damaged \(JSONDecodeError: .*Expected a file",
    ),
    "no episodes": (
        lambda file, path: changed(file, path, episodes=None),
        r"is damaged \(KeyError: 'episodes'\)\. Expected a file",
    ),
}
_ACTIONS = [operation.name.lower() for operation in rls.Operation]


def _one_array(path):
    np.save(path.with_suffix(".npy"), np.zeros(3))
    return path.with_suffix(".npy").read_bytes()


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_before_anything_starts(case, file, tmp_path):
    make, pattern = BAD_FILES[case]
    path = make(file, tmp_path / "policy.npz")
    with pytest.raises(rls.ArgumentError, match=rf"(?s){pattern}") as caught:
        rls.Compressor(trained(), policy=path)
    assert "\n" not in str(caught.value)


def test_another_agents_policy_is_refused(file):
    with pytest.raises(rls.ArgumentError, match=r"learned by the agent 'dqn', and agent='ppo' is"):
        rls.Compressor(trained(), agent="ppo", policy=file)
    with pytest.raises(rls.ArgumentError, match=r"Pass agent='dqn', or a policy that 'random' lea"):
        rls.Compressor(trained(), agent="random", policy=file)


def test_other_widths_are_refused(file):
    with pytest.raises(rls.ArgumentError, match=r"hidden_layers=\(8,\), and .*=\(64, 64\)\. Expec"):
        rls.Compressor(trained(), agent=rls.DQN(), policy=file)


def test_something_else_is_no_policy():
    with pytest.raises(rls.ArgumentError, match=r"policy=3 is a int\. Expected a file that result"):
        rls.Compressor(trained(), policy=3)


def test_weights_that_do_not_fit_are_refused(learned):
    wrong = StoredPolicy(agent=DQN, variables=(np.zeros((3, 3)),))
    with pytest.raises(rls.ArgumentError, match=r"do not fit an agent of 'dqn': .*file is damaged"):
        wrong.put_into(fresh(learned["dqn"].loop.environments[0], DQN))
    with pytest.raises(rls.ArgumentError, match=r"do not fit an agent of 'random'"):
        wrong.put_into(fresh(learned["dqn"].loop.environments[0], "random"))


def test_what_learns_nothing_has_nothing_to_save(tmp_path):
    result = search(compressor(trained(), "random"), episodes=1, finetune_epochs=0)
    with pytest.raises(rls.ArgumentError, match=r"The agent 'random' learns nothing .*agent='dqn'"):
        result.save_policy(tmp_path / "policy.npz")
    assert not (tmp_path / "policy.npz").exists()


def test_a_file_is_not_replaced_unasked(file, learned):
    before = file.read_bytes()
    with pytest.raises(FileExistsRLSparsityError, match=r"exists already\. Choose another name, o"):
        learned["ppo"].result.save_policy(file)
    assert file.read_bytes() == before


# ------------------------------------------------------------------------------ command line


def test_commands_save_and_begin_with_policies(tmp_path, capsys):
    trained().save(tmp_path / "model.keras")
    names = ("x_train", "y_train", "x_validation", "y_validation")
    arrays = dict(zip(names, (*TRAIN, *VALIDATION), strict=True))
    np.savez(tmp_path / "data.npz", **arrays)

    def compress(folder, *more):
        given = [str(tmp_path / "model.keras"), "--data", str(tmp_path / "data.npz")]
        quick = ["--episodes", "1", "--finetune-epochs", "0", "--verbose", "0"]
        quick += ["--target-sparsity", "0.6"]
        return main(["compress", *given, "--output", str(tmp_path / folder), *quick, *more])

    file = str(tmp_path / "policy.npz")
    assert compress("one", "--save-policy", file) == 0
    assert compress("two", "--policy", file) == 0
    manifest = json.loads((tmp_path / "two" / "manifest.json").read_text())
    assert manifest["arguments"]["policy"] == load_policy(file).digest
    # Known before the search, not after it.
    assert compress("three", "--save-policy", file) == 2
    assert "exists already" in capsys.readouterr().err
    assert not (tmp_path / "three").exists()
