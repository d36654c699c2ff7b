"""The episodes of a search: observe, choose, recover, reward, learn; with checkpoints."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import numpy as np
import tensorflow as tf

from rl_sparsity_tf.candidates import PROPOSED, Candidate, is_better
from rl_sparsity_tf.demonstrations import (
    Demonstration,
    heuristic_plan,
    proposals,
    without_twins,
)
from rl_sparsity_tf.dynamic_programming import propose_all
from rl_sparsity_tf.episodes import LoopSettings
from rl_sparsity_tf.errors import ArgumentError, RunError
from rl_sparsity_tf.hierarchy import make_episodes
from rl_sparsity_tf.network import CompressedNetwork
from rl_sparsity_tf.plan import CompressionPlan
from rl_sparsity_tf.plan_evaluation import evaluate_plan
from rl_sparsity_tf.progress import SearchProgress
from rl_sparsity_tf.reward import bounded
from rl_sparsity_tf.run_directory import RunDirectory

DYNAMIC = "dynamic_programming"
POLICY = "policy"
# Buckets are cut around this heuristic's plan, which takes no evaluation, for a policy's own.
STARTING = "lamp"
# Shown to the agent, the best last: what it has learned of the others must not hide that.
_DEMONSTRATIONS = 3
# Of the layers' errors; no power gives the best plan for every network.
_POWERS = (1.0, 0.5, 0.25)


class SearchLoop:
    """The episodes of one search; continues where a run directory's checkpoint stands.

    Args:
        settings: Agent, reward and seed.
        network: The network.
        run: Where to keep the journal and checkpoints, if anywhere.

    Attributes:
        proposed: Names and plans of the heuristics and of the policy that were evaluated before
            the first episode, the best first.
    """

    def __init__(
        self, settings: LoopSettings, network: CompressedNetwork, run: RunDirectory | None = None
    ):
        self._settings = settings
        self._network = network
        self._run = run
        self.episodes = make_episodes(settings, network)
        self._demonstrations: list[Demonstration] = []
        self.proposed: list[tuple[str, CompressionPlan]] = []
        self.history: list[dict[str, Any]] = []
        self.best: Candidate | None = None
        self.seconds = 0.0
        self._done = 0
        if run is not None and run.resumed:
            self._resume(run)

    @property
    def evaluations(self) -> int:
        """Distinct plans scored on validation data, those before a resume included."""
        return self._network.evaluations

    def run(self, episodes: int, progress: SearchProgress) -> Candidate:
        """Runs the episodes that are left and returns the best candidate of all.

        With a warm start the exact plans of the heuristics are evaluated first, and the agent then
        learns from episodes that play them as closely as buckets allow, the best first. They are
        a third of all episodes at most.

        A policy's own plan is evaluated before anything else; it is the only one with no episode.
        """
        if self._settings.policy is not None and self._done < max(1, episodes):
            progress.say("evaluating the policy's plan")
            self._apply_policy()
        if self._settings.warm_start and self._done < episodes:
            progress.say("evaluating the plans of known heuristics")
            self._propose(max(1, episodes // 3))
        if episodes == 0:
            assert self.best is not None
            return self.best
        with progress.running(f"{self._settings.agent.name} search"):
            for episode in range(self._done, episodes):
                entry = self._episode(episode)
                assert self.best is not None
                progress.update(
                    episode + 1,
                    reward=entry["reward"],
                    best=self.best.value,
                    metric=entry["validation_metric"],
                    sparsity=entry["sparsity"],
                )
        assert self.best is not None
        return self.best

    def _apply_policy(self) -> None:
        network = self._network
        tf.random.set_seed(self._settings.seed)
        if STARTING in network.decisions.heuristics:
            with contextlib.suppress(ArgumentError):  # it may not reach a target in bytes
                self.episodes.centre(heuristic_plan(network, STARTING))
        actions = self.episodes.play_policy()
        value = bounded(self._settings.reward, network.outcome, None)
        # What other networks are worth at best is not seen in the state: better or worse than
        # the policy was is what this one can add.
        self.episodes.reference = value
        if self._done == 0:
            self.episodes.begin_with(actions, value)
        self.proposed = [(POLICY, network.plan)]
        if is_better(value, network.outcome, self.best):
            self.best = Candidate.of(network, value, PROPOSED, POLICY)

    def _propose(self, demonstrations: int) -> None:
        network = self._network
        steps = self._settings.buckets * network.recovery.steps
        tf.random.set_seed(self._settings.seed)
        plans = proposals(network)
        if network.least_squares is not None:
            exact = propose_all(network, _POWERS)
            plans += [(DYNAMIC, plan) for n, plan in enumerate(exact) if plan not in exact[:n]]
        applied = [(self.episodes.reference, one) for one in self.proposed]
        shown: list[tuple[float, Demonstration]] = []
        for name, plan in plans:
            outcome = evaluate_plan(network, plan, steps)
            value = bounded(self._settings.reward, outcome, None)
            shown.append((value, Demonstration.of(name, plan)))
            if is_better(value, outcome, self.best):
                self.best = Candidate.of(network, value, PROPOSED, name)
        order = sorted(range(len(shown)), key=lambda index: -shown[index][0])
        found = [*applied, *((shown[index][0], plans[index]) for index in order)]
        self.proposed = [one for _, one in sorted(found, key=lambda pair: -pair[0])]
        # Around a policy's plan they stay as they are: the search begins with its decisions.
        if self.proposed and self._settings.policy is None:
            self.episodes.centre(self.proposed[0][1])
        best_first = [shown[index][1] for index in order]
        shown_best = without_twins(best_first)[: min(demonstrations, _DEMONSTRATIONS)]
        self._demonstrations = shown_best[::-1]

    def _episode(self, episode: int) -> dict[str, Any]:
        started = time.monotonic()
        network = self._network
        words = np.random.SeedSequence([self._settings.seed, episode]).generate_state(1)
        tf.random.set_seed(int(words[0]))
        shown = self._demonstrations[episode : episode + 1]
        demonstration = shown[0] if shown else None
        name = self._settings.agent.name
        proposed_by = name if demonstration is None else demonstration.name
        total = self.episodes.play(demonstration)
        value = bounded(self._settings.reward, network.outcome, None)
        losses = self.episodes.learn(value)
        improved = is_better(value, network.outcome, self.best)
        if improved:
            self.best = Candidate.of(network, value, episode, proposed_by)
        outcome = network.outcome
        entry = {
            "episode": episode,
            "proposed_by": proposed_by,
            "reward": value,
            "step_rewards": total,
            "validation_metric": outcome.metric,
            "validation_loss": outcome.loss,
            "sparsity": outcome.sparsity,
            "stored_bits": outcome.stored_bits,
            "reconstruction_error": outcome.reconstruction_error,
            "operations": network.plan.count_operations(),
            "illegal_actions": self.episodes.illegal_actions,
            "evaluations": self.evaluations,
            "improved": improved,
            "losses": {name: float(number) for name, number in losses.items()},
            "seconds": time.monotonic() - started,
        }
        self.history.append(entry)
        self._save(entry, improved)
        return entry

    def _save(self, entry: dict[str, Any], improved: bool) -> None:
        if self._run is None:
            return
        assert self.best is not None
        self._run.append(entry)
        if improved or entry["episode"] == 0:
            self._run.save_checkpoint(f"best-{self.best.episode}", self.best.to_arrays())
        state = self.episodes.get_state()
        state["seen"] = np.array(sorted(self._network.seen), dtype="S64")
        state["episodes"] = np.array(entry["episode"] + 1)
        state["best"] = np.array(self.best.episode)
        # The pointer is written last: a run cut off before it redoes the episode.
        self._run.save_checkpoint("latest", state)
        self._run.drop_checkpoints(keep={"latest", f"best-{self.best.episode}"})

    def _resume(self, run: RunDirectory) -> None:
        state = run.load_checkpoint("latest")
        if state is None:
            run.read_journal(0)
            return
        self._done = int(state["episodes"])
        self.history = run.read_journal(self._done)
        self.seconds = sum(entry["seconds"] for entry in self.history)
        best = run.load_checkpoint(f"best-{int(state['best'])}")
        if best is None:
            raise RunError(
                f"The run in {str(run.path)!r} lacks the checkpoint of its best plan. Pass "
                "overwrite=True to start the run again."
            )
        self.best = Candidate.from_arrays(best)
        self.episodes.set_state(state)
        self._network.seen = {bytes(key).decode() for key in state["seen"]}
