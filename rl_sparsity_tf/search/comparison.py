"""The search's result beside other contenders, at the same evaluations and training."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf
from rich.table import Table

from rl_sparsity_tf.agents.configs import Random
from rl_sparsity_tf.agents.demonstrations import heuristic_plan
from rl_sparsity_tf.allocation.channel_decisions import CHANNEL_HEURISTICS, ChannelDecisions
from rl_sparsity_tf.allocation.dynamic_programming import propose
from rl_sparsity_tf.allocation.problem import PlanRequest
from rl_sparsity_tf.allocation.size_budget import formats_for
from rl_sparsity_tf.allocation.tfmot import load_tfmot, prune_with_tfmot
from rl_sparsity_tf.checks import check_count
from rl_sparsity_tf.console import SearchProgress, printing, table_lines, without_traces
from rl_sparsity_tf.environment.candidates import Candidate
from rl_sparsity_tf.environment.curriculum import Constant
from rl_sparsity_tf.environment.network import evaluate_plan
from rl_sparsity_tf.environment.reward import bounded
from rl_sparsity_tf.errors import (
    ArgumentError,
    DataError,
    RLSparsityError,
    TargetError,
    check_choice,
)
from rl_sparsity_tf.layers.kernels import count_weights
from rl_sparsity_tf.layers.plan import CompressionPlan
from rl_sparsity_tf.layers.wrapping import strip, wrap
from rl_sparsity_tf.search.compressor import Compressor
from rl_sparsity_tf.search.final import play_final, share_to_keep, size_held
from rl_sparsity_tf.search.finishing import Finished, export_what_holds
from rl_sparsity_tf.search.loop import SearchLoop
from rl_sparsity_tf.search.plan_search import FoundPlan, climb, search_randomly
from rl_sparsity_tf.search.result import FinishedSearch, baseline_entry

_log = logging.getLogger(__name__)

CONTENDERS: Mapping[str, str] = {
    "uniform_float32": "uniform magnitude",
    "uniform": "uniform magnitude int8",
    "erk": "ERK int8",
    "global_magnitude": "global magnitude int8",
    "lamp": "LAMP int8",
    "first_order": "first-order int8",
    "dynamic_programming": "dynamic programming",
    "random_search": "random search int8",
    "hill_climbing": "hill climbing int8",
    "random_policy": "random policy",
    "tfmot": "TFMOT int8, trained by TFMOT",
    "uniform_gamma": "uniform batch-norm scale int8",
    "global_gamma": "global batch-norm scale int8",
    "uniform_output_error": "uniform output error int8",
    "global_output_error": "global output error int8",
}
"""What a contender is called by, and the name of its row."""

DEFAULT = ("uniform_float32", "uniform", "random_policy")
"""The contenders of a comparison that names none."""

ALL = tuple(
    name for name in CONTENDERS if name != "uniform_float32" and name not in CHANNEL_HEURISTICS
)
"""What `"all"` stands for: those that store integers, as the search's plans do."""

ALL_CHANNELS = (*(name for name in ALL if name != "tfmot"), *CHANNEL_HEURISTICS)
"""What it stands for where whole channels are decided."""

# Trainings by TFMOT until its file has a size in bytes.
_ATTEMPTS = 4


@without_traces()
def compare(
    compressor: Compressor,
    contenders: str | Sequence[str] | None = None,
    verbose: int = 1,
    *,
    evaluations: int | None = None,
) -> list[dict[str, Any]]:
    """Runs contenders under the conditions of a finished search, and adds them to its metrics.

    They get the search's own network, validation rows, recovery, epochs of fine-tuning and
    exporter, and meet the same target; one in bytes is held to the bytes of the file. Those that
    search evaluate as many plans as the search did, the random policy plays as many episodes.

    - **uniform_float32**, **uniform**: the smallest weights, the same share of every kernel. What
      lives is stored as floats, or as int8 as in all that follow but where it is decided
      otherwise: by the random policy, and for bytes by dynamic programming.
    - **erk**, **global_magnitude**, **lamp**, **first_order**, **dynamic_programming**: the plans
      of [baselines][rl_sparsity_tf.baselines].
    - **random_search**, **hill_climbing**: theirs, too, with the search's reward.
    - **random_policy**: chooses uniformly among the legal operations.
    - **uniform_gamma**, **global_gamma**, **uniform_output_error**, **global_output_error**: where
      whole channels are decided, those with the smallest scales of batch normalization, or that
      the layers reading them miss least; the same share of every set of tied channels, or the
      least in the network.
    - **tfmot**: `prune_low_magnitude` of the dense model, trained by TFMOT alone, for the epochs
      that others are fine-tuned. It prunes single weights, whatever the search's groups are.

    Args:
        compressor: A compressor whose `search` has returned.
        contenders: Their names, or `"all"` for all of them but `uniform_float32`; by default
            `uniform_float32`, `uniform` and `random_policy`. With `"all"` and by default those
            that cannot be run are left out, with a warning in the log.
        verbose: As in `search`.
        evaluations: Plans that contenders which search evaluate; by default as many as the search
            did.

    Returns:
        The entries of `metrics["baselines"]`, which the compressor's last result holds too.

    Raises:
        ArgumentError: If the compressor has not searched yet, or a name is not known.
        RLSparsityError: If a contender asked for by name cannot be run, as one that misses the
            target.

    Example:
        >>> rows = rls.compare(compressor, ["erk"], verbose=0)  # after compressor.search(...)
        >>> [row["name"] for row in rows]
        ['ERK int8']
    """
    search = compressor.last
    channels = search is not None and isinstance(search.network.decisions, ChannelDecisions)
    names, asked = _names(contenders, channels)
    if search is None:
        raise ArgumentError(
            "The compressor has not searched yet, so there is nothing to compare with. Call "
            "compressor.search(...) first."
        )
    if asked and "tfmot" in names:
        load_tfmot()  # before the others have taken their time
    search = dataclasses.replace(search, network=search.plain)
    network = search.network
    evaluated = set(network.seen)
    if evaluations is None:
        evaluations = search.result.metrics["search"]["evaluations"]
    check_count("evaluations", evaluations, 1)
    progress = SearchProgress(search.episodes, network.metric.name, verbose)
    search = dataclasses.replace(search, progress=progress)  # callbacks watch the search alone
    contest = _Contenders(compressor, search, progress, evaluations)
    entries: list[dict[str, Any]] = []
    try:
        for name in names:
            network.reset()
            network.seen.clear()
            tf.random.set_seed(compressor.seed)
            try:
                finished, evaluated_plans = contest.run(name)
            except RLSparsityError as error:
                if asked:
                    raise
                _log.warning("The contender %s is left out: %s", name, error)
                continue
            metric = search.figures.metric
            figures = (search.model, finished, metric, evaluated_plans)
            entries.append(baseline_entry(CONTENDERS[name], *figures))
    finally:
        network.reset()
        network.seen = evaluated
        search.result.metrics["baselines"] = entries
    return entries


def _names(
    contenders: str | Sequence[str] | None, channels: bool = False
) -> tuple[Sequence[str], bool]:
    """The contenders' names, and whether they were asked for one by one."""
    if contenders is None:
        return DEFAULT, False
    if contenders == "all":
        return ALL_CHANNELS if channels else ALL, False
    names = [contenders] if isinstance(contenders, str) else contenders
    if not isinstance(names, Sequence) or not names:
        raise ArgumentError(
            f"contenders={contenders!r} cannot be used. Expected 'all', or a list of names such "
            "as ['lamp', 'tfmot']."
        )
    choices = ["all", *CONTENDERS] if isinstance(contenders, str) else CONTENDERS
    return list(dict.fromkeys(check_choice("contender", n, choices) for n in names)), True


@dataclasses.dataclass(frozen=True)
class _Contenders:
    """Runs contenders one after the other, under the conditions of one search."""

    compressor: Compressor
    search: FinishedSearch
    progress: SearchProgress
    evaluations: int

    def run(self, name: str) -> tuple[Finished, int]:
        """A contender's finished model, and how many plans it evaluated."""
        if name == "tfmot":
            return self._tfmot()
        if name == "random_policy":
            return self._random_policy()
        if name in ("random_search", "hill_climbing"):
            found = self._searched(name)
            return self._finish(name, self._evaluated(found.plan, name)), found.evaluations
        if name == "dynamic_programming":
            plan = propose(self.search.network)
        else:
            plan = self._ranked(name)
        return self._finish(name, self._evaluated(plan, name)), 1

    def _say(self, name: str, doing: str = "fine-tuning and exporting") -> None:
        self.progress.say(f"{doing}: {CONTENDERS[name]}")

    # ------------------------------------------------------------------ plans

    def _request(self, *, quantize: bool = True, group: str | None = None) -> PlanRequest:
        return PlanRequest.of(
            self.search.model,
            self.search.target,
            group=group or self.search.network.decisions.group,
            quantize=quantize,
            include=self.compressor.selection.paths,
        )

    def _ranked(self, name: str) -> CompressionPlan:
        """The plan of a heuristic; that of `uniform_float32` quantizes nothing."""
        network = self.search.network
        heuristic = "uniform" if name == "uniform_float32" else name
        quantize = name != "uniform_float32"
        if isinstance(network.decisions, ChannelDecisions):
            return heuristic_plan(network, heuristic, quantize)
        if name in CHANNEL_HEURISTICS:
            raise ArgumentError(
                f"The contender {name} ranks whole channels, and the search decided on groups of "
                f"{network.decisions.group!r}. Expected other contenders, or a search with "
                "group='channel'."
            )
        request = self._request(quantize=quantize)
        scores = network.scores(heuristic)
        if scores is None:
            raise DataError(
                "The gradient of the loss is zero in every kernel on the search's training data, "
                "so that first_order cannot tell groups apart. Expected data with examples that "
                "the model does not fit perfectly yet, or contenders without first_order."
            )
        return request.plan(scores)

    def _evaluated(self, plan: CompressionPlan, name: str) -> Candidate:
        """A plan with the weights it has after the search's recovery."""
        network = self.search.network
        outcome = evaluate_plan(network, plan, self._decisions * network.recovery.steps)
        return Candidate.of(network, bounded(self.compressor.reward, outcome, None), 0, name)

    @property
    def _decisions(self) -> int:
        """Recoveries per kernel, where they are training: as in the search's last episode."""
        return self.search.loop.episodes.decisions

    def _finish(self, name: str, candidate: Candidate) -> Finished:
        self._say(name)
        given = (self.search, [candidate], (), self.progress)
        return play_final(*given, places=1, seed=self.compressor.seed)[0]

    # ------------------------------------------------------------------ contenders that search

    def _random_policy(self) -> tuple[Finished, int]:
        settings = self.compressor.loop_settings()
        settings = dataclasses.replace(
            settings, agent=Random(), warm_start=False, curriculum=Constant(), policy=None
        )
        loop = SearchLoop(settings, self.search.network)
        best = loop.run(max(1, self.search.episodes), self.progress)
        evaluations = loop.evaluations
        return self._finish("random_policy", best), evaluations

    def _searched(self, name: str) -> FoundPlan:
        self._say(name, f"evaluating {self.evaluations} plans")
        seeker = search_randomly if name == "random_search" else climb
        return seeker(
            self.search.network,
            self.compressor.reward,
            self.evaluations,
            seed=self.compressor.seed,
            steps=self._decisions,
        )

    # ------------------------------------------------------------------ TFMOT

    def _tfmot(self) -> tuple[Finished, int]:
        """TFMOT's own training; where its file is too large, another one that prunes more."""
        search, target = self.search, self.search.target
        if isinstance(search.network.decisions, ChannelDecisions):
            raise ArgumentError(
                "The contender tfmot prunes single weights, and the search removed whole channels. "
                "Expected contenders without tfmot, or a search with group='element'."
            )
        if search.training.epochs < 1:
            raise ArgumentError(
                "The contender tfmot prunes in the course of training, and the search was called "
                "with finetune_epochs=0. Expected at least 1, or contenders without tfmot."
            )
        request = self._request(group="element")
        _, elements = count_weights(request.model)
        pruned, sizes = None, []
        for attempt in range(1, _ATTEMPTS + 1):
            self._say("tfmot", "training and exporting")
            tf.random.set_seed(self.compressor.seed)
            trained = prune_with_tfmot(
                request, search.figures.train, epochs=search.training.epochs, pruned=pruned
            )
            finished = self._exported(strip(wrap(trained.model, trained.plan)), trained.plan)
            report = finished.exported.report
            if target.sparsity is not None or finished.exported.failure or report is None:
                return finished, attempt
            if size_held(report, target) <= target.value:
                return finished, attempt
            sizes.append(size_held(report, target))
            share = share_to_keep(report, target, attempt, kernels=trained.plan.kernels)
            pruned = elements - int((elements - trained.pruned) * share)
        raise TargetError(
            f"Target({target.kind}={int(target.value)}) was missed by TFMOT: after its trainings "
            f"the file had {' then '.join(map(str, sizes))} bytes. Expected a larger target, or "
            "contenders without tfmot."
        )

    def _exported(self, model: Any, plan: CompressionPlan) -> Finished:
        """A model that is not fine-tuned any more, scored and exported as the others are."""
        search, figures = self.search, self.search.figures
        formats = formats_for(search.target)
        exported = export_what_holds(model, plan, figures, search.quantization, formats)
        validation, test = figures.scores(model)
        return Finished(
            model=model,
            plan=plan,
            validation=validation,
            test=test,
            exported=exported,
            warnings=(exported.failure,) if exported.failure else (),
        )


def comparison_table(metrics: dict[str, Any], print_fn: Callable[[str], Any] = print) -> None:
    """Prints dense, dense int8, the compressed model and the contenders side by side.

    Args:
        metrics: A result's metrics.
        print_fn: Called with every line.

    Example:
        >>> rls.comparison_table(result.metrics)
                       validation accuracy of the .tflite file
        ...
        │ dense float32       │        - │        - │ 71,760 │ ...
        ...
    """
    print_fn = printing(print_fn)
    name, tested = metrics["metric"]["name"], metrics["compressed"]["metric"] is not None
    prefix = "" if tested else "validation_"
    table = Table(title=f"{'test' if tested else 'validation'} {name} of the .tflite file")
    for title in ("", name, "sparsity", "bytes", "gzip bytes", "plans evaluated"):
        table.add_column(title, justify="left" if not title else "right")

    sizes = ("tflite_bytes", "gzip_bytes")

    def row(title: str, entry: dict[str, Any], evaluations: Any) -> None:
        value = entry.get("tflite_metric") if tested else None
        value = entry.get(f"{prefix}metric") if value is None else value
        table.add_row(
            title,
            "-" if value is None else f"{value:.4f}",
            f"{entry['sparsity']:.4f}" if "sparsity" in entry else "-",
            *("-" if entry[key] is None else f"{entry[key]:,}" for key in sizes),
            "-" if evaluations is None else str(evaluations),
        )

    row("dense float32", metrics["dense"], None)
    row("dense int8", metrics["dense_int8"], None)
    evaluations = metrics["search"]["evaluations"]
    proposed_by = metrics["compressed"]["proposed_by"]
    title = f"compressed ({metrics['agent']}"
    title += ")" if proposed_by == metrics["agent"] else f", plan of {proposed_by})"
    row(title, metrics["compressed"], evaluations)
    for entry in metrics["baselines"]:
        row(entry["name"], entry, entry["evaluations"])
    for line in table_lines(table, width=100):
        print_fn(line.rstrip())
