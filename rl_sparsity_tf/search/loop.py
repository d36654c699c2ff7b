"""The episodes of a search: observe, choose, recover, reward, learn; with checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from rl_sparsity_tf.agents.demonstrations import (
    Demonstration,
    heuristic_plan,
    proposals,
    without_twins,
)
from rl_sparsity_tf.agents.policies import CONSTRUCT
from rl_sparsity_tf.allocation.budgets import Budget
from rl_sparsity_tf.allocation.density_plans import pruned_to_budget
from rl_sparsity_tf.allocation.dynamic_programming import (
    DYNAMIC_PROGRAMMING,
    POWERS,
    propose_all,
)
from rl_sparsity_tf.allocation.size_budget import predicted_bytes
from rl_sparsity_tf.callbacks import ALL, EPISODES, RERANKING, WARM_START
from rl_sparsity_tf.console import Interruption, SearchProgress
from rl_sparsity_tf.environment.candidates import (
    PROPOSED,
    Candidate,
    Finalists,
    digests_of,
    figures_of,
    is_better,
    plan_of,
)
from rl_sparsity_tf.environment.curriculum import Stage
from rl_sparsity_tf.environment.network import CompressedNetwork, evaluate_plan
from rl_sparsity_tf.environment.reranking import can_rerank, rank_anew
from rl_sparsity_tf.environment.reward import Outcome, bounded
from rl_sparsity_tf.errors import ArgumentError, RunError, SearchInterrupted, one_line
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.layers.plan import CompressionPlan
from rl_sparsity_tf.search.episodes import Episodes, LoopSettings, make_episodes
from rl_sparsity_tf.search.run_directory import LATEST, TIMES, TRIALS, RunDirectory

PREVIOUS = "previous_stage"
"""Who proposes the plan of an earlier stage, pruned further to the target of the present one."""
POLICY = "policy"
# Buckets are cut around this heuristic's plan, which takes no evaluation, for a policy's own.
STARTING = "lamp"
# Shown to the agent, the best last: what it has learned of the others must not hide that.
_DEMONSTRATIONS = 3
# Of the finalists, the best.
_RANKED = 3
_FINALIST = re.compile(r"finalist-[\w-]{1,100}")
# A stage looks near its best plan from the middle on, if it is not too short for two halves.
_LEAST_TO_NARROW = 8


class SearchLoop:
    """The episodes of one search; continues where a run directory's checkpoint stands.

    The journal and the checkpoints are kept in `run`, if there is one. If the loop is
    `interruptible`, Ctrl-C waits for the end of the present episode.

    Attributes:
        proposed: Names and plans that were evaluated before the stage's first episode, the best
            first.
        finalists: The stage's best candidates, one per proposer.
        done: Episodes played.
        considered: The plans that were evaluated beside the episodes' own, in order: who proposed
            each, before which episode, and its figures.
        over: Whether callbacks want no more episodes at all.
    """

    def __init__(
        self,
        settings: LoopSettings,
        network: CompressedNetwork,
        run: RunDirectory | None = None,
        *,
        interruptible: bool = False,
    ):
        self.settings = settings
        self._network = network
        self._run = run
        self._interruptible = interruptible
        self.episodes = make_episodes(settings, network)
        # A policy of moves begins from plans; one that decides buckets has a plan of its own.
        self._decides = settings.policy is not None and settings.strategy == CONSTRUCT
        self._demonstrations: list[Demonstration] = []
        self.proposed: list[tuple[str, CompressionPlan]] = []
        self.history: list[dict[str, Any]] = []
        self.considered: list[dict[str, Any]] = []
        self.finalists = Finalists(settings.finalists)
        self.seconds = 0.0
        self.done = 0
        self._stage = Stage(start=0, end=0)
        self._previous: CompressionPlan | None = None
        self._centre: CompressionPlan | None = None  # that the buckets are cut near, if any
        self._saved: list[str] = []
        self._ends: dict[int, int] = {}  # of stages that were ended early, by their starts
        self.over = False
        if run is not None and run.resumed:
            self._resume(run)

    @property
    def evaluations(self) -> int:
        """Distinct plans scored on validation data, those before a resume included."""
        return self._network.evaluations

    @property
    def best(self) -> Candidate | None:
        """The stage's best candidate."""
        return self.finalists.best

    def run(
        self,
        episodes: int,
        progress: SearchProgress,
        check: Callable[[Candidate], None] | None = None,
    ) -> Candidate:
        """Runs the episodes that are left, stage by stage, and returns the last one's best.

        With no episode a policy's own plan is the only one. `check` is called once, before the
        first episode, with the best plan by then, if any. Raises SearchInterrupted after an episode
        in which Ctrl-C was pressed.
        """
        full = self._network.budget
        if episodes == 0:
            self.begin(Stage(start=0, end=0), full, None, progress)
            assert self.best is not None
            return self.best
        stages = self.settings.curriculum.schedule(episodes)
        number = -1
        while number < len(stages) - 1:
            number, stage = self._present(stages)
            if len(stages) > 1:
                progress.say(f"{stage.share:.4g} of the way to the target")
            begun = self.done > stage.start
            ahead = self.best.plan if self.best else None
            budget = full if stage.share == 1.0 else full.eased(stage.share)
            self.begin(stage, budget, self._previous if begun else ahead, progress)
            if check is not None and self.best is not None and not self.done:
                check(self.best)
                check = None
            self.play(progress)
        self.rerank(progress)
        assert self.best is not None
        return self.best

    def _present(self, stages: Sequence[Stage]) -> tuple[int, Stage]:
        """The stage that is to be played now, and its number.

        One that was ended early lets the next begin earlier. Behind the last episode it is the last
        stage: what a run proposed that was cut off there is a part of the final.
        """
        early = 0
        for number, planned in enumerate(stages):
            start, end = planned.start - early, planned.end - early
            stage = dataclasses.replace(planned, start=start, end=end)
            ended = self._ends.get(start, min(end, self.done) if self.over else end)
            if ended > self.done or number == len(stages) - 1:
                break
            early += end - ended
        return number, stage

    def stopped(self, progress: SearchProgress) -> bool:
        """Whether callbacks want no more episodes of the stage; once they do, the run keeps it.

        A stage has an episode at least, and what was asked of an earlier one is no matter.
        """
        asked, start = progress.asked, self._stage.start
        if asked and self._stage.episodes and self.done > start:
            before = (dict(self._ends), self.over)
            self._ends.setdefault(start, self.done)
            self.over = self.over or asked == ALL
            if (self._ends, self.over) != before:
                self._keep()
        return self.best is not None and (self.over or start in self._ends)

    def rerank(self, progress: SearchProgress, most: int = _RANKED) -> None:
        """Decides anew which groups of the best plans' kernels live, as long as that is better.

        Whoever proposed a plan keeps it: the densities are theirs. `most` plans are ranked.
        """
        if not can_rerank(self._network):
            return
        ranked = list(self.finalists)[:most]
        with progress.phase(RERANKING, total=len(ranked)):
            for number, one in enumerate(ranked, 1):
                self._rerank_one(one, progress)
                progress.step(number, len(ranked))

    def _rerank_one(self, one: Candidate, progress: SearchProgress) -> None:
        network, best = self._network, one
        steps = self.settings.buckets * network.recovery.steps

        def restore() -> None:
            evaluate_plan(network, best.plan, steps)

        def improves(plan: CompressionPlan) -> bool:
            nonlocal best
            outcome = evaluate_plan(network, plan, steps)
            value = bounded(self.settings.reward, outcome, None)
            self._tell(progress, value, one.proposed_by)
            if better := is_better(value, outcome, best):
                best = Candidate.of(network, value, one.episode, one.proposed_by)
            return better

        rank_anew(network, restore, improves)
        if best is not one:
            self.finalists.add(best)
            self._note("ranked anew", self.done, best.proposed_by, best.value, best.outcome)

    @property
    def network(self) -> CompressedNetwork:
        """The network that is searched."""
        return self._network

    def move_to(self, network: CompressedNetwork) -> None:
        """Goes on with another network of the same model; agent and evaluations stay.

        It has the same kernels, however they are cut and stored.
        """
        if network is self._network:
            return
        state = self.episodes.get_state()
        network.seen |= self._network.seen
        self._network = network
        self.episodes = make_episodes(self.settings, network)
        self.episodes.set_state(state)

    def begin(
        self,
        stage: Stage,
        budget: Budget,
        previous: CompressionPlan | None,
        progress: SearchProgress,
    ) -> None:
        """Begins a stage, or goes on with one that a run directory was cut off in.

        A policy's own plan is evaluated first; then the plan of an earlier stage, pruned further,
        and with a warm start the exact plans of the heuristics. The agent learns from episodes that
        play the best of them as closely as buckets allow: a third of the stage's at most. The
        stage's plans have to meet the budget.
        """
        anew = self.done == stage.start
        self._stage, self._previous = stage, previous
        progress.target_changed(self.evaluations)
        if anew:
            self.finalists, self._centre = Finalists(self.settings.finalists), None
        if budget is not self._network.budget:
            self._network.retarget(budget)
        # A run that was cut off may go on under the budget that its network was made for.
        self.episodes.retarget(anew)
        self.proposed = []
        if self._decides:
            with progress.phase(WARM_START, "evaluating the policy's plan"):
                self._apply_policy(progress)
        if stage.episodes:
            text = "" if self.settings.warm_start else "evaluating the plans to begin with"
            with progress.phase(WARM_START, text):
                self._propose(max(1, stage.episodes // 3), progress)
        if self._centre is not None:
            self.episodes.centre(self._centre, near=True)

    def play(self, progress: SearchProgress) -> None:
        """Plays the episodes that are left of the stage, or fewer if callbacks want no more.

        Raises SearchInterrupted after an episode in which Ctrl-C was pressed.
        """

        def told() -> None:
            progress.say("ending after this episode; Ctrl-C again leaves at once")

        text = f"{self.settings.agent.name} search: {progress.episodes} episodes"
        with progress.phase(EPISODES, text, progress.episodes, self.done):
            while not self.stopped(progress) and self.done < self._stage.end:
                watched = Interruption(told)
                with watched if self._interruptible else contextlib.nullcontext():
                    entry = self._episode(self.done)
                assert self.best is not None
                self._tell(progress, entry["reward"], entry["proposed_by"], entry["episode"])
                progress.episode_ended(entry, self.best.value, self._more)
                if watched.requested:
                    raise self._interrupted(self.best.plan)

    def _tell(
        self, progress: SearchProgress, value: float, proposed_by: str, episode: int | None = None
    ) -> None:
        """Tells of the network's plan, if it is new."""
        network = self._network
        figures = functools.partial(figures_of, network, value, proposed_by, episode)
        progress.evaluated(network.evaluations, value, figures)

    def _more(self) -> dict[str, Any]:
        """What callbacks are told of an episode that its line of the journal does not have."""
        network = self._network
        states = network.states()
        return {"bytes": predicted_bytes(network.budget, states), "plan": network.plan}

    def _interrupted(self, plan: CompressionPlan) -> SearchInterrupted:
        kept = "The best plan so far is in this error's plan; with directory=... it could go on."
        if self._run is not None:
            kept = f"The same call continues it from {str(self._run.path)!r}."
        return SearchInterrupted(
            f"The search was interrupted after episode {self.done}. {kept}",
            episodes=self.done,
            directory=None if self._run is None else str(self._run.path),
            plan=plan,
        )

    def _apply_policy(self, progress: SearchProgress) -> None:
        network, episodes = self._network, self.episodes
        assert isinstance(episodes, Episodes)  # policies decide buckets
        tf.random.set_seed(self.settings.seed)
        if STARTING in network.decisions.heuristics:
            with contextlib.suppress(ArgumentError):  # it may not reach a target in bytes
                episodes.centre(heuristic_plan(network, STARTING))
        # Which weights of a layer are missed least is not a decision, and no rule for it holds in
        # all networks: with least squares the policy decides in both orders, and one is kept.
        both = network.least_squares is not None and network.decisions.group != "channel"
        found = []
        for by_magnitude in (False, True) if both else (False,):
            episodes.order_by_magnitude(by_magnitude)
            actions = episodes.play_policy()
            value = bounded(self.settings.reward, network.outcome, None)
            found.append((value, by_magnitude, actions, network.plan))
            self._consider(value, PROPOSED, POLICY)
            self._tell(progress, value, POLICY)
        value, by_magnitude, actions, plan = max(found, key=lambda one: one[0])
        episodes.order_by_magnitude(by_magnitude)
        # What other networks are worth at best is not seen in the state: better or worse than
        # the policy was is what this one can add.
        episodes.reference = value
        if self.done == self._stage.start:
            episodes.begin_with(actions, value)
        self.proposed = [(POLICY, plan)]

    def _propose(self, demonstrations: int, progress: SearchProgress) -> None:
        network = self._network
        steps = self.settings.buckets * network.recovery.steps
        tf.random.set_seed(self.settings.seed)
        further = None if self._previous is None else pruned_to_budget(network, self._previous)
        plans = [] if further is None else [(PREVIOUS, further)]
        if self.settings.warm_start:
            plans += [one for one in proposals(network) if one[1] != further]
        if self.settings.warm_start and network.least_squares is not None:
            exact = propose_all(network, POWERS)
            plans += [
                (DYNAMIC_PROGRAMMING, plan) for n, plan in enumerate(exact) if plan not in exact[:n]
            ]
        applied = [(self.episodes.reference, one) for one in self.proposed]
        shown: list[tuple[float, Demonstration]] = []
        for name, plan in plans:
            outcome = evaluate_plan(network, plan, steps)
            value = bounded(self.settings.reward, outcome, None)
            shown.append((value, Demonstration.of(name, plan)))
            self._consider(value, PROPOSED, name)
            self._tell(progress, value, name)
        order = sorted(range(len(shown)), key=lambda index: -shown[index][0])
        found = [*applied, *((shown[index][0], plans[index]) for index in order)]
        self.proposed = [one for _, one in sorted(found, key=lambda pair: -pair[0])]
        # Around a policy's plan they stay as they are: the search begins with its decisions.
        if self.proposed and not self._decides:
            self.episodes.centre(self.proposed[0][1])
        order.sort(key=lambda index: plans[index][0] != PREVIOUS)
        best_first = [shown[index][1] for index in order]
        shown_best = without_twins(best_first)[: min(demonstrations, _DEMONSTRATIONS)]
        self._demonstrations = shown_best[::-1] if self.episodes.shown else []

    def _episode(self, episode: int) -> dict[str, Any]:
        started = time.monotonic()
        network = self._network
        words = np.random.SeedSequence([self.settings.seed, episode]).generate_state(1)
        tf.random.set_seed(int(words[0]))
        place = episode - self._stage.start
        shown = self._demonstrations[place : place + 1]
        demonstration = shown[0] if shown else None
        if self._stage.episodes >= _LEAST_TO_NARROW and place == self._stage.episodes // 2:
            demonstration = self._narrow()
        name = self.settings.agent.name
        proposed_by = name if demonstration is None else demonstration.name
        total = self.episodes.play(demonstration)
        value = bounded(self.settings.reward, network.outcome, None)
        losses = self.episodes.learn(value)
        improved = is_better(value, network.outcome, self.best)
        self._consider(value, episode, proposed_by)
        outcome = network.outcome
        entry = {
            "episode": episode,
            **self._stage.notes,
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
        self.done = episode + 1
        self._save(entry)
        return entry

    def _narrow(self) -> Demonstration | None:
        """Looks near the best plan from here on; returns what shows it to the agent.

        Not with a policy, which knows the buckets it was taught with, nor where nothing is learned.
        """
        settings, best = self.settings, self.best
        if best is None or settings.policy is not None or settings.agent.name == "random":
            return None
        if not self.episodes.shown:
            return None
        self._centre = best.plan
        self.episodes.centre(best.plan, near=True)
        self.episodes.begin_anew()
        return Demonstration.of(best.proposed_by, best.plan)

    def _consider(self, value: float, episode: int, proposed_by: str) -> None:
        """Keeps the network's plan if it is good enough for the final."""
        if episode == PROPOSED:
            self._note("proposed", self._stage.start, proposed_by, value, self._network.outcome)
        if self.finalists.wants(value, self._network.outcome, proposed_by):
            self.finalists.add(Candidate.of(self._network, value, episode, proposed_by))

    def _note(
        self, what: str, before: int, proposed_by: str, value: float, outcome: Outcome
    ) -> None:
        self.considered.append(
            {
                "what": what,
                "before_episode": before,
                "proposed_by": proposed_by,
                "reward": value,
                "validation_metric": outcome.metric,
                "sparsity": outcome.sparsity,
            }
        )

    def _save(self, entry: dict[str, Any]) -> None:
        if self._run is not None:
            self._run.append(entry)
            self._keep()

    def _keep(self) -> None:
        """Keeps where the loop is now, behind the journal's last line."""
        if self._run is None:
            return
        names = []
        for one in self.finalists:
            # A plan from before the episodes is known by the stage's beginning.
            when = one.episode + 1 if one.episode != PROPOSED else f"before-{self._stage.start}"
            names.append(f"finalist-{when}-{one.proposed_by}")
            if names[-1] not in self._saved:
                self._run.save_checkpoint(names[-1], one.to_arrays())
        self._saved = names
        state = self.episodes.get_state()
        state["seen"] = np.array(sorted(self._network.seen), dtype="S64")
        state["episodes"] = np.array(self.done)
        state["finalists"] = np.array(names)
        for name, plan in (("previous", self._previous), ("centre", self._centre)):
            state[name] = np.array(plan.to_json() if plan else "")
        if self._ends:
            state["ends"] = np.array([*self._ends.items()], np.int64)
            state["over"] = np.array(self.over)
        # The pointer is written last: a run cut off before it redoes the episode.
        self._run.save_checkpoint(LATEST, state)
        self._run.drop_checkpoints(keep={LATEST, TRIALS, TIMES, *names})

    def _resume(self, run: RunDirectory) -> None:
        state = run.load_checkpoint(LATEST)
        if state is None:
            run.begin_again()
            return
        try:
            done, names = int(state["episodes"]), state["finalists"].tolist()
            most = run.arguments.get("episodes", done)
            if not 1 <= done <= most:
                raise ValueError(f"it is of {done} episodes, of a search of {most}")
            # They become names of files.
            good = 1 <= len(names) <= self.settings.finalists and len(set(names)) == len(names)
            if not good or not all(_FINALIST.fullmatch(str(name)) for name in names):
                raise ValueError(f"it names the plans {str(names)[:80]}")
        except Exception as error:
            raise run.unreadable(LATEST, one_line(error)) from error
        history = run.read_journal(done)
        for name in names:
            self.finalists.add(self._finalist(run, name))
        try:
            check_history(history)
            self._previous, self._centre = (
                plan_of(str(state[name]), self._network) if str(state[name]) else None
                for name in ("previous", "centre")
            )
            self.episodes.set_state(state)
            self._network.seen = digests_of(state["seen"])
            self._ends, self.over = _ends_of(state, done)
        except Exception as error:  # whatever else may be in a file
            raise run.unreadable(LATEST, one_line(error)) from error
        self.done, self.history, self._saved = done, history, names
        self.seconds = sum(entry["seconds"] for entry in history)

    def _finalist(self, run: RunDirectory, name: str) -> Candidate:
        arrays = run.load_checkpoint(name)
        if arrays is None:
            raise RunError(
                f"The run in {str(run.path)!r} lacks the checkpoint of one of its best plans "
                f"({name}). Put a copy of it back, or pass overwrite=True to start the run again."
            )
        try:
            return Candidate.from_arrays(arrays, self._network)
        except Exception as error:
            raise run.unreadable(name, one_line(error)) from error


def _ends_of(state: Mapping[str, np.ndarray], done: int) -> tuple[dict[int, int], bool]:
    """Where stages were ended early, and whether all were; raises ValueError if that cannot be."""
    if "ends" not in state:
        return {}, False
    pairs, over = state["ends"], state["over"]
    whole = pairs.dtype == np.int64 and pairs.ndim == 2 and pairs.shape[1:] == (2,)
    if not whole or over.dtype != np.bool_ or over.shape:
        raise ValueError("the ends of its stages are none")
    numbers = pairs.reshape(-1).tolist()
    if not all(0 <= a < b <= done for a, b in pairs.tolist()) or numbers != sorted(numbers):
        raise ValueError("the ends of its stages do not fit its episodes")
    return dict(pairs.tolist()), bool(over)


_NUMBERS = ("reward", "validation_metric", "sparsity", "seconds")


def check_history(history: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError, naming the first bad entry, unless a journal has what is made of it."""
    names = {operation.name.lower() for operation in Operation}
    for number, entry in enumerate(history, 1):
        operations = entry.get("operations")
        numbers = [entry.get(name) for name in _NUMBERS]
        if (
            set(entry) != set(history[0])
            or not all(isinstance(one, int | float) for one in numbers)
            or not isinstance(operations, dict)
            or set(operations) != names
        ):
            raise ValueError(f"line {number} of the journal lacks figures of its episode")
