"""Equal searches give equal bits, and one that was cut off goes on as if nothing had happened."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny_search import (
    DQN,
    TRAIN,
    compressor,
    episodes_of,
    figures_of,
    interrupt,
    journal_of,
    quick_search,
    search,
    trained,
)

import rl_sparsity_tf as rls
from rl_sparsity_tf.environment.layer_environment import LayerEnvironment
from rl_sparsity_tf.errors import FileExistsRLSparsityError, RunError

STEPS_OF_AN_EPISODE = 6  # two kernels, three buckets each


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick_search():
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[rls.Result, object]:
    """A search that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return search(compressor(trained(), directory=folder)), folder


def weights_of(result: rls.Result) -> list[bytes]:
    return [value.tobytes() for value in result.model.get_weights()]


@pytest.mark.slow
def test_a_search_cut_off_in_an_episode_ends_in_the_same_bits(whole, tmp_path):
    result, folder = whole
    cut = tmp_path / "cut"
    interrupt(compressor(trained(), directory=cut), after=2 * STEPS_OF_AN_EPISODE + 3)
    assert [entry["episode"] for entry in journal_of(cut)] == [0, 1]
    assert not (cut / "metrics.json").exists()
    # A line that was being written when the power failed.
    with (cut / "journal.jsonl").open("a") as file:
        file.write('{"episode": 2, "rew')
    resumed = search(compressor(trained(), directory=cut))
    assert figures_of(resumed.history) == figures_of(result.history)
    assert figures_of(journal_of(cut)) == figures_of(journal_of(folder))
    assert resumed.plan.to_json() == result.plan.to_json()
    assert weights_of(resumed) == weights_of(result)
    assert resumed.metrics["compressed"] == result.metrics["compressed"]
    assert resumed.metrics["search"]["evaluations"] == result.metrics["search"]["evaluations"]
    assert (cut / "model.tflite").read_bytes() == (folder / "model.tflite").read_bytes()


@pytest.mark.slow
def test_it_looks_near_the_same_plan_after_it_was_cut_off(tmp_path):
    """From the fifth of nine episodes on buckets are cut near the best plan by then."""
    options = {"recovery": "least_squares", "buckets": 3, "agent": "ppo"}
    with pytest.MonkeyPatch.context() as patch:
        near = []
        centre = LayerEnvironment.centre

        def watched(self, share, near_by=False):
            near.append((self.kernel, share, near_by))
            return centre(self, share, near_by)

        patch.setattr(LayerEnvironment, "centre", watched)
        call = {"episodes": 9, "finetune_epochs": 0}
        whole = search(compressor(trained(), directory=tmp_path / "whole", **options), **call)
        cut_near = [one for one in near if one[2]]
        near.clear()
        cut = compressor(trained(), directory=tmp_path / "cut", **options)
        interrupt(cut, after=6 * STEPS_OF_AN_EPISODE + 2, **call)
        resumed = search(compressor(trained(), directory=tmp_path / "cut", **options), **call)
    assert len(cut_near) == 2  # kernels
    assert {one for one in near if one[2]} == set(cut_near)
    assert figures_of(resumed.history) == figures_of(whole.history)
    assert weights_of(resumed) == weights_of(whole)
    assert resumed.metrics["search"]["evaluations"] == whole.metrics["search"]["evaluations"]
    assert resumed.candidate.found_by == whole.candidate.found_by


@pytest.mark.slow
def test_the_same_seed_repeats_and_another_differs(whole, tmp_path):
    result, folder = whole
    # The user's own random numbers must not matter, nor be touched.
    np.random.seed(1)  # noqa: NPY002
    before = np.random.get_state()[1].tobytes()  # noqa: NPY002
    same = episodes_of(compressor(trained(), directory=tmp_path / "same"))
    assert np.random.get_state()[1].tobytes() == before  # noqa: NPY002
    assert figures_of(same) == figures_of(journal_of(folder)) == figures_of(result.history)
    other = episodes_of(compressor(trained(), directory=tmp_path / "other", seed=1))
    assert figures_of(other)[2:] != figures_of(same)[2:]


@pytest.mark.slow
def test_the_journal_has_a_line_per_episode_and_the_manifest_the_arguments(whole):
    result, folder = whole
    journal = journal_of(folder)
    assert journal == result.history
    keys = "episode proposed_by reward step_rewards validation_metric sparsity operations losses"
    assert all(set(keys.split()) <= set(entry) for entry in journal)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format_version"] == 2
    assert manifest["arguments"]["agent"] == json.loads(json.dumps(DQN.to_dict()))
    assert manifest["arguments"]["episodes"] == 4
    assert set(manifest["fingerprints"]) >= {"model", "train", "validation_data", "test_data"}
    assert manifest["versions"]["tensorflow"]
    kept = {path.stem for path in (folder / "checkpoints").iterdir()}
    best = result.candidate
    when = "before-0" if best.episode < 0 else best.episode + 1
    assert kept == {"latest", f"finalist-{when}-{best.proposed_by}"}


@pytest.mark.slow
def test_other_arguments_do_not_continue_a_run(tmp_path):
    folder = tmp_path / "run"
    interrupt(compressor(trained(), directory=folder), after=STEPS_OF_AN_EPISODE + 1)
    before = (folder / "journal.jsonl").read_bytes()

    def refused(expected: str, model=None, options=(), **arguments) -> None:
        with pytest.raises(FileExistsRLSparsityError, match=expected):
            search(
                compressor(model or trained(), directory=folder, **dict(options)),
                **arguments,
            )

    refused(r"differs in seed \(0, now 5\)\. Call with the same", options={"seed": 5})
    x, y = TRAIN
    changed = x.copy()
    changed[-1, 0] += 1
    for others in ((changed, y), (x, np.roll(y, 1)), (x[:-1], y[:-1]), (x[::-1], y[::-1])):
        refused(r"differs in train\. Call with the same", train=others)
    other = trained()
    other.layers[0].bias.assign_add([0.1] * 8)
    refused(r"differs in episodes \(4, now 3\), model\.", model=other, episodes=3)
    assert (folder / "journal.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_lost_checkpoint_is_named(tmp_path):
    folder = tmp_path / "run"
    interrupt(compressor(trained(), directory=folder), after=STEPS_OF_AN_EPISODE + 1)
    (lost,) = (folder / "checkpoints").glob("finalist-*.npz")
    lost.unlink()
    with pytest.raises(RunError, match=r"lacks .* one of its best plans \(finalist-"):
        search(compressor(trained(), directory=folder))


@pytest.mark.slow
def test_a_finished_run_is_kept_unless_overwriting_is_asked_for(whole, tmp_path):
    _, folder = whole
    with pytest.raises(FileExistsRLSparsityError, match=r"holds a finished run\. Choose another"):
        search(compressor(trained(), directory=folder))
    assert (folder / "metrics.json").exists()
    # The fixture's folder is shared, so overwriting is tried on a copy of what matters.
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("manifest.json", "metrics.json", "journal.jsonl"):
        (copy / name).write_bytes((folder / name).read_bytes())
    journal = episodes_of(
        compressor(trained(), "random", directory=copy), episodes=1, overwrite=True
    )
    assert [entry["proposed_by"] for entry in journal] == ["random"]
    assert not (copy / "metrics.json").exists()


def test_a_folder_of_somebody_else_is_never_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(FileExistsRLSparsityError, match="holds no run of this package"):
            search(compressor(trained(), directory=tmp_path), overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
