import functools
import json
import weakref

import numpy as np
import pytest

from animediffusion.models.bundle import load_bundle
from animediffusion.pipelines.data.manifest import Manifest
from animediffusion.pipelines.evaluation.metrics import color_scores
from animediffusion.pipelines.evaluation.native import evaluate_native
from animediffusion.serve.client.local import BundleColorizer
from animediffusion.serve.rendering.render import RenderOptions
from tests.bundles import write_bundle

evaluated = functools.partial(evaluate_native, "model", "sha")


def reference(sketch, colors, seed):
    return colors


def test_a_painter_that_copies_the_reference_has_the_scores_of_that_baseline(faces_dataset, tmp_path):
    seen = []
    out = tmp_path / "out"
    result = evaluated(reference, "flat", faces_dataset, out=out, progress=lambda *done: seen.append(done), threads=3)
    assert result.tracks == result.baselines["copy_reference"]
    assert set(result.baselines) == {"copy_reference", "mean_color"}
    assert seen == [(done, 16) for done in range(1, 17)]
    assert (result.num_images, result.image_size, result.split) == (8, 32, "val")
    assert result.data_hash == Manifest.load(faces_dataset).content_hash
    assert json.loads((out / "metrics.json").read_text()) == result.to_json()
    assert (out / "grid.png").stat().st_size > 1000


def test_the_painter_gets_the_rows_in_order_and_another_seed_for_each(faces_dataset):
    calls = []

    def painter(sketch, colors, seed):
        calls.append((sketch.shape, colors.shape, seed))
        return colors

    evaluated(painter, "flat", faces_dataset, limit=3)
    assert len(calls) == 6
    assert {shape for call in calls for shape in call[:2]} == {(32, 32, 3)}
    assert [seed for _, _, seed in calls[:3]] == [seed for _, _, seed in calls[3:]]
    assert len({seed for _, _, seed in calls}) == 3


def test_chunks_have_the_numbers_of_the_whole_split_and_leave_the_memory(faces_dataset, monkeypatch):
    sketches = []

    def painter(sketch, colors, seed):
        sketches.append(weakref.ref(sketch.base))  # The sketches of a track in a chunk are one array.
        held = {id(array) for array in (one() for one in sketches) if array is not None}
        assert len(held) <= 2, "more than the two tracks of a chunk are in memory"
        return np.roll(colors, seed % 7, axis=0)

    fields = ("tracks", "baselines", "num_images", "cross_truth")
    results = []
    for size in (25, 2):
        monkeypatch.setattr("animediffusion.pipelines.evaluation.evaluate.CHUNK", size)
        results.append(evaluated(painter, "flat", faces_dataset, threads=2))
    whole, chunks = results
    assert len(sketches) == 2 * 16
    assert all(getattr(whole, field) == getattr(chunks, field) for field in fields)


def test_a_model_of_another_size_than_the_data_is_measured(faces_dataset, tmp_path):
    colorizer = BundleColorizer(load_bundle(write_bundle(tmp_path / "bundle", image_size=16)), "1", 1)
    painter = functools.partial(colorizer.paint, RenderOptions(style="flat", background="reference"))
    result = evaluated(painter, "flat", faces_dataset, limit=2)
    assert result.image_size == 32
    assert all(0 < scores.ciede2000 < 100 for scores in result.tracks.values())


def test_only_pixels_off_the_lines_count():
    truth = np.full((1, 16, 16, 3), 200, np.uint8)
    sketch = np.full_like(truth, 255)
    sketch[:, 8] = 0
    near, far = truth.copy(), truth.copy()
    near[:, 7:10] = 0
    far[:, 5] = 0
    assert color_scores(near, truth, sketch).within_3 == 1
    assert color_scores(far, truth, sketch).within_3 == pytest.approx(1 - 1 / 13, abs=1e-4)
    assert color_scores(far, truth, np.zeros_like(sketch)).within_3 == pytest.approx(1 - 1 / 16, abs=1e-4)
