"""The smallest file that holds an accuracy: searches at several sizes, found by bisection."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.allocation.budgets import CostBudget
from rl_sparsity_tf.allocation.decisions import KernelDecisions
from rl_sparsity_tf.allocation.size_budget import MARGINS
from rl_sparsity_tf.allocation.target import Target
from rl_sparsity_tf.callbacks import DENSE_FILES, TRIAL
from rl_sparsity_tf.checks import check_count, check_flag
from rl_sparsity_tf.console import SearchProgress
from rl_sparsity_tf.data.metrics import Metric
from rl_sparsity_tf.environment.candidates import PROPOSED, Candidate, digests_of, plan_of
from rl_sparsity_tf.environment.curriculum import Constant, Curriculum, Stage
from rl_sparsity_tf.environment.network import CompressedNetwork, evaluate_plan
from rl_sparsity_tf.environment.reward import bounded
from rl_sparsity_tf.errors import ArgumentError, RunError, TargetError, VerificationError, one_line
from rl_sparsity_tf.export.verification import score_model, score_tflite
from rl_sparsity_tf.files import scratch_folder
from rl_sparsity_tf.layers.kernels import walk
from rl_sparsity_tf.layers.plan import CompressionPlan
from rl_sparsity_tf.search.final import finish_candidate
from rl_sparsity_tf.search.finishing import Finished, Task
from rl_sparsity_tf.search.heats import run_heats
from rl_sparsity_tf.search.run_directory import TRIALS, RunDirectory
from rl_sparsity_tf.search.storage_choice import StorageChooser
from rl_sparsity_tf.training.mask_training import FineTuning

if TYPE_CHECKING:
    from rl_sparsity_tf.search.loop import SearchLoop


# Sizes that differ by no more than this factor are not told apart.
_CLOSE = 1.02
# Metrics are sums of float32.
_ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Requirement:
    """What the metric of a file has to be: at most `drop` worse than the dense model's.

    Both are on the validation data.

    Example:
        >>> Requirement(metric=Metric("accuracy", True), dense=0.9, drop=0.02).holds(0.88)
        True
    """

    metric: Metric
    dense: float
    drop: float

    def lost(self, value: float) -> float:
        """How much worse a figure is than the dense model's."""
        return self.dense - value if self.metric.higher_is_better else value - self.dense

    def holds(self, value: float) -> bool:
        """Whether a figure is good enough; one that is no number is not."""
        return self.lost(value) <= self.drop + _ROUNDING


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """What the search at one size came to.

    Attributes:
        limit: Bytes that the file might have.
        tflite_bytes: Bytes that it has; None if fine-tuning left none within the limit.
        validation_metric: The file's own metric on all rows of the validation data, run in LiteRT.
        held: Whether that is good enough.
        plan: The plan as the search found it, as JSON.
    """

    limit: int
    tflite_bytes: int | None
    validation_metric: float | None
    held: bool
    proposed_by: str
    plan: str

    def __post_init__(self) -> None:
        sizes = [self.limit] if self.tflite_bytes is None else [self.limit, self.tflite_bytes]
        for size in sizes:
            check_count("a trial's bytes", size, 1)
        check_flag("held", self.held)
        judged = isinstance(self.validation_metric, int | float)
        if self.held and (self.tflite_bytes is None or not judged):
            raise ArgumentError(
                f"A trial of {self.limit} bytes is said to have held, and has no file or no "
                "metric. Expected both."
            )

    def to_dict(self) -> dict[str, Any]:
        """The trial as metrics.json lists it."""
        values = dataclasses.asdict(self)
        del values["plan"]
        return values


def check_alone(target: Target, curriculum: Curriculum) -> Curriculum:
    """The curriculum, if it goes with the target.

    Raises ArgumentError if the target is searched for at several sizes, a curriculum of its own.
    """
    if target.max_accuracy_drop is not None and not isinstance(curriculum, Constant):
        raise ArgumentError(
            f"curriculum={curriculum.name!r} does not go with Target(max_accuracy_drop="
            f"{target.value:g}), which is searched for at one size after the other. Leave "
            "curriculum out, or give a size: Target(tflite_bytes=50_000)."
        )
    return curriculum


def next_limit(smallest: int, largest: int, trials: Sequence[Trial]) -> int | None:
    """The middle, on a logarithmic scale, between what failed and what held, in bytes.

    `smallest` is the smallest file in reach, and `largest` the dense int8 file, in bytes. It is
    None if what is left between the two is not worth a trial.

    Example:
        >>> next_limit(1_000, 100_000, [])
        10000
    """
    low = max([smallest, *(trial.limit for trial in trials if not trial.held)])
    held = [trial.tflite_bytes for trial in trials if trial.held]
    high = min([largest, *(size for size in held if size is not None)])
    return None if high <= low * _CLOSE else round(math.sqrt(low * high))


_SHARE = 1.0 - MARGINS["tflite_bytes"]


class TrialNetworks:
    """Makes the network of every size that is tried.

    `plain` is made for more bytes than any file of it. The chooser chooses how its kernels are cut
    and stored at every size; without one it is one way at all of them.
    """

    def __init__(self, plain: CompressedNetwork, chooser: StorageChooser | None = None):
        budget = plain.budget
        assert isinstance(budget, CostBudget)
        self.plain, self._chooser = plain, chooser
        self._smallest = budget.smallest

    @property
    def smallest(self) -> int:
        """Bytes of the smallest file in reach."""
        return math.ceil(self._smallest / _SHARE)

    def at(self, limit: int) -> CompressedNetwork:
        """The network whose plans make files of so many bytes at most."""
        self.limit(self.plain, limit)
        if self._chooser is None:
            return self.plain
        build = self._chooser.build

        def limited(decisions: KernelDecisions) -> CompressedNetwork:
            other = build(decisions=decisions)
            self.limit(other, limit)
            return other

        return dataclasses.replace(self._chooser, build=limited).choose(self.plain).network

    @staticmethod
    def limit(network: CompressedNetwork, limit: int) -> None:
        """Brings a network back to its beginning, under a limit of bytes.

        Raises TargetError if it is out of reach.
        """
        budget = network.budget
        assert isinstance(budget, CostBudget)
        network.retarget(budget.limited(limit * _SHARE, f"Target(tflite_bytes={limit})"))


def is_stored_as(network: CompressedNetwork, plan: CompressionPlan) -> bool:
    """Whether a plan's kernels are cut and stored as those of a network, or kept."""
    pairs = [(plan.kernels[k.path], network.storage.of(k.path)) for k in network.kernels]
    return all(
        entry.group == storage.group and entry.bits in (storage.bits, 32)
        for entry, storage in pairs
    )


MOST_TRIALS = 6
"""Sizes that are searched at most."""
_ANY = 2**62
DENSE_INT8 = "dense_int8"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallestFile:
    """The smallest file that held.

    Attributes:
        task: What it was finished for: a target of its own bytes.
        best: The plan that it was made of.
        metrics: What metrics.json says of the trials.
    """

    task: Task
    finished: Finished
    best: Candidate
    metrics: dict[str, Any]


def first_target(model: keras.Model, target: Target) -> Target:
    """The target that a network is made for: more bytes than any file of it, for an accuracy."""
    if target.max_accuracy_drop is None:
        return target
    weights = sum(int(np.prod(variable.shape)) for variable in model.weights)
    return Target(tflite_bytes=8 * weights + 2**24)


class AccuracySearch:
    """Looks for the smallest file that meets `Target(max_accuracy_drop=...)`.

    Six trials at most, or as many as there are episodes, share the episodes. Each searches at a
    size of its own, as `Target(tflite_bytes=...)` does; the agent keeps what it has learned, and
    the best plan of the next larger size is evaluated first, pruned further, if its kernels are
    stored in the same way. The masks of the trial's best plan are ranked anew; heats decide between
    them and those of the largest trained weights. It is fine-tuned and exported, and the file is
    run on all of the validation data. A trial that holds is followed by a smaller size, another by
    a larger one, up to the dense int8 file, which is tried as it is.

    The task's target is the drop. What the trials came to is kept in `run`, if there is one;
    `trials` does not count the dense int8 file. A chooser is given where it is open how kernels are
    cut and stored.
    """

    def __init__(
        self,
        task: Task,
        loop: SearchLoop,
        run: RunDirectory | None = None,
        chooser: StorageChooser | None = None,
    ):
        self._task, self._settings, self._loop, self._run = task, loop.settings, loop, run
        self._networks, self._figures = TrialNetworks(task.network, chooser), task.figures
        self._plain = task.network
        dense = score_model(task.model, self._figures.validation, self._figures.metric).metric
        self._wanted = Requirement(
            metric=self._figures.metric, dense=dense, drop=task.target.max_accuracy_drop or 0.0
        )
        self.trials: list[Trial] = []
        self._best: Candidate | None = None
        self._others: list[tuple[str, CompressionPlan]] = []
        self._finished: Finished | None = None

    def run(self, episodes: int, progress: SearchProgress) -> SmallestFile:
        """Runs the trials that are left; `episodes` are those of all trials together.

        Raises TargetError if none held, not even the dense int8 file; it names the best.
        """
        count = min(MOST_TRIALS, episodes)
        edges = [episodes * number // count for number in range(count + 1)]
        self._resume(edges)
        with progress.phase(DENSE_FILES, "judging the dense int8 file"):
            dense, unpruned, dense_finished = self._dense_int8(progress)
        progress.trial_ended(0, dense.to_dict())
        assert dense.tflite_bytes is not None
        for number in range(len(self.trials), count):
            limit = next_limit(self._networks.smallest, dense.tflite_bytes, self.trials)
            start = sum(entry["trial"] <= number for entry in self._loop.history)
            self._loop.stopped(progress)
            if limit is None or (self._loop.over and self._loop.done == start):
                break
            end = start + edges[number + 1] - edges[number]
            notes = {"trial": number + 1, "limit": limit}
            stage = Stage(start=start, end=end, notes=notes)
            text = f"trial {number + 1} of {count}: at most {limit:,} bytes"
            with progress.phase(TRIAL, text):
                network = self._move_to(limit)
                self._loop.begin(stage, network.budget, self._larger(limit), progress)
                self._loop.play(progress)
                self._loop.rerank(progress, most=1)
                self._try(limit, progress)
            progress.trial_ended(number + 1, self.trials[-1].to_dict())
        if self._best is None and dense.held:
            self._best, self._finished = unpruned, dense_finished
        if self._best is None:
            raise self._unmet([dense, *self.trials])
        if self._finished is None:  # held before the run was cut off
            limit = next(one.limit for one in reversed(self.trials) if one.held)
            progress.say("fine-tuning the plan that held, and exporting it")
            self._move_to(limit)
            self._finished = self._finish(self._best, limit, self._others, progress)
        return self._found(dense, self._finished, self._best)

    def _found(self, dense: Trial, finished: Finished, candidate: Candidate) -> SmallestFile:
        assert finished.exported.report is not None  # a trial without a file does not hold
        size = finished.exported.report.tflite_bytes
        # Contenders meet the same size, as far as the budget's floor lets them.
        self._networks.limit(self._plain, max(size, self._networks.smallest))
        return SmallestFile(
            task=dataclasses.replace(
                self._task, network=self._loop.network, target=Target(tflite_bytes=size)
            ),
            finished=finished,
            best=finished.candidate or candidate,
            metrics={
                "max_accuracy_drop": self._wanted.drop,
                "dense_validation_metric": self._wanted.dense,
                "trials": [trial.to_dict() for trial in (dense, *self.trials)],
            },
        )

    # ------------------------------------------------------------------ one trial

    def _move_to(self, limit: int) -> CompressedNetwork:
        """Goes on with the network for a limit."""
        self._plain.seen |= self._loop.network.seen
        self._loop.move_to(self._networks.at(limit))
        return self._loop.network

    def _larger(self, limit: int) -> CompressionPlan | None:
        """The plan of the smallest trial that was larger, if kernels were stored as they are."""
        larger = [trial for trial in self.trials if trial.limit > limit]
        if not larger:
            return None
        plan = CompressionPlan.from_json(min(larger, key=lambda one: one.limit).plan)
        return plan if is_stored_as(self._loop.network, plan) else None

    def _dense_int8(self, progress: SearchProgress) -> tuple[Trial, Candidate, Finished]:
        """The file with nothing pruned, all that can be as int8, and the trained weights."""
        network = self._plain
        network.reset()
        weights = {path: layer.get_weights() for path, layer in walk(self._task.model)}
        whole = [np.ones(network.groupings[kernel.path].shape, bool) for kernel in network.kernels]
        plan = network.storage.plan_from_live(network.kernels, whole)
        outcome = evaluate_plan(network, plan)
        value = bounded(self._settings.reward, outcome, None)
        candidate = Candidate(plan, weights, outcome, value, PROPOSED, DENSE_INT8)
        task = dataclasses.replace(
            self._task, target=Target(tflite_bytes=_ANY), training=FineTuning(epochs=0)
        )
        finished = finish_candidate(task, candidate)
        report = finished.exported.report
        if finished.exported.failure or report is None:
            raise VerificationError(
                "The dense int8 file, which trials are held against, was not made before the "
                f"search: {finished.exported.failure}"
            )
        size = report.tflite_bytes
        trial = self._judged(candidate, finished, size, "the dense int8 file", progress)
        return trial, candidate, finished

    def _try(self, limit: int, progress: SearchProgress) -> None:
        best = self._loop.best
        assert best is not None
        progress.say(f"the best plan ({best.found_by}):")
        name = f"trial {len(self.trials) + 1}"
        others = list(self._loop.proposed)
        missed = ""
        try:
            finished = self._finish(best, limit, others, progress)
            # In another storage it is no file of this size.
            missed = finished.exported.failure
        except TargetError as error:
            missed = str(error)
        if missed:
            progress.say(f"{name}: {missed}")
            self.trials.append(
                Trial(
                    limit=limit,
                    tflite_bytes=None,
                    validation_metric=None,
                    held=False,
                    proposed_by=best.proposed_by,
                    plan=best.plan.to_json(),
                )
            )
        else:
            self.trials.append(self._judged(best, finished, limit, name, progress))
            if self.trials[-1].held:
                self._best, self._others, self._finished = best, others, finished
        self._save()

    def _finish(
        self,
        candidate: Candidate,
        limit: int,
        others: Sequence[tuple[str, CompressionPlan]],
        progress: SearchProgress,
    ) -> Finished:
        network, seed = self._loop.network, self._settings.seed
        task = dataclasses.replace(self._task, network=network, target=Target(tflite_bytes=limit))
        starts, _ = run_heats(task, [candidate], progress, places=1, seed=seed)
        tf.random.set_seed(seed)
        finished = finish_candidate(task, starts[0].candidate, others)
        return dataclasses.replace(finished, candidate=finished.candidate or starts[0].candidate)

    def _judged(
        self,
        candidate: Candidate,
        finished: Finished,
        limit: int,
        name: str,
        progress: SearchProgress,
    ) -> Trial:
        content, report = finished.exported.content, finished.exported.report
        assert content is not None
        assert report is not None
        with scratch_folder() as folder:
            path = folder / "model.tflite"
            path.write_bytes(content)
            figures = self._figures
            score = score_tflite(path, finished.model, figures.validation, figures.metric)
        held = self._wanted.holds(score.metric)
        size = report.tflite_bytes
        progress.say(
            f"{name}: {size:,} bytes, validation {figures.metric.name} {score.metric:.4f} (dense "
            f"{self._wanted.dense:.4f}): {'held' if held else 'not held'}"
        )
        return Trial(
            limit=limit,
            tflite_bytes=size,
            validation_metric=score.metric,
            held=held,
            proposed_by=(finished.candidate or candidate).proposed_by,
            plan=candidate.plan.to_json(),
        )

    def _unmet(self, trials: Sequence[Trial]) -> TargetError:
        judged = [one for one in trials if one.validation_metric is not None]
        best = min(judged, key=lambda one: self._wanted.lost(one.validation_metric or 0.0))
        name, wanted = self._figures.metric.name, self._wanted
        assert best.validation_metric is not None
        return TargetError(
            f"Target(max_accuracy_drop={wanted.drop:g}) cannot be met: of {len(trials)} files, the "
            f"dense int8 one among them, the best has {best.tflite_bytes:,} bytes and the "
            f"validation {name} {best.validation_metric:.4f}, which is "
            f"{wanted.lost(best.validation_metric):.4f} worse than the dense model's "
            f"{wanted.dense:.4f}. Expected a larger drop, or more finetune_epochs."
        )

    # ------------------------------------------------------------------ going on

    def _save(self) -> None:
        if self._run is None:
            return
        arrays = {
            "trials": np.array(json.dumps([dataclasses.asdict(trial) for trial in self.trials])),
            "others": np.array(json.dumps([(n, plan.to_json()) for n, plan in self._others])),
            "seen": np.array(sorted(self._loop.network.seen), dtype="S64"),
        }
        if self._best is not None:
            held = self._best.to_arrays()
            arrays |= {f"held:{name}": value for name, value in held.items()}
        self._run.save_checkpoint(TRIALS, arrays)

    def _resume(self, edges: Sequence[int]) -> None:
        """Takes up what the trials of a run that was cut off came to."""
        if self._run is None or not self._run.resumed:
            return
        arrays = self._run.load_checkpoint(TRIALS)
        if arrays is not None:
            try:
                self._take(arrays)
                if len(self.trials) >= len(edges):
                    raise ValueError(f"it has {len(self.trials)} trials of {len(edges) - 1}")
            except Exception as error:  # whatever may be in a file
                raise self._run.unreadable(TRIALS, one_line(error)) from error
        number = len(self.trials)
        played = [entry.get("trial") for entry in self._loop.history]
        begun = played.count(number + 1)
        longest = edges[number + 1] - edges[number] if number + 1 < len(edges) else 0
        if set(played) - {number + 1} != set(range(1, number + 1)) or begun > longest:
            raise RunError(
                f"The run in {str(self._run.path)!r} lacks the checkpoint of its finished trials. "
                "Put a copy of it back, or pass overwrite=True to start the run again."
            )

    def _take(self, arrays: Mapping[str, np.ndarray]) -> None:
        network = self._plain
        trials = [Trial(**values) for values in json.loads(str(arrays["trials"]))]
        self.trials = [
            dataclasses.replace(one, plan=plan_of(one.plan, network).to_json()) for one in trials
        ]
        network.seen |= digests_of(arrays["seen"])
        others = json.loads(str(arrays["others"]))
        self._others = [(str(name), plan_of(text, network)) for name, text in others]
        held = {
            name.removeprefix("held:"): value
            for name, value in arrays.items()
            if name.startswith("held:")
        }
        if bool(held) != any(trial.held for trial in self.trials):
            raise ValueError("it does not have the plan that held")
        self._best = Candidate.from_arrays(held, network) if held else None
