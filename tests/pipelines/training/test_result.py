import json

from animediffusion.pipelines.training.checkpoints import CheckpointScore
from animediffusion.pipelines.training.result import TrainResult

FIRST = {
    "run": "demo-1",
    "run_dir": "runs/demo-1",
    "bundle": "runs/demo-1/bundle",
    "steps": 40,
    "resumed_from": None,
    "seconds": 12.5,
    "images_per_s": 80.0,
    "num_parameters": 9,
    "device": "cpu",
    "attention": "sdpa",
    "mlflow_run_id": "abc",
    "metrics": {"loss": 0.1, "grad_norm": 1.0, "data_wait": 0.0},
}
NEWER = {
    "scores": {"20": {"psnr": 20.0, "ssim": 0.9, "ciede2000": 5.0, "psnr_same": 21.0}},
    "best_step": 20,
    "bundle_step": 40,
    "num_workers": 2,
    "peak_memory_mb": 300.5,
}


def test_the_json_of_a_result_is_read_back_with_its_keys_in_order():
    text = json.dumps({**FIRST, **NEWER})
    result = TrainResult.from_json(json.loads(text))
    assert json.dumps(result.to_json()) == text
    assert result.scores == {20: CheckpointScore(psnr=20.0, ssim=0.9, ciede2000=5.0, psnr_same=21.0)}


def test_a_result_from_before_checkpoints_had_scores_is_read():
    result = TrainResult.from_json(FIRST)
    assert (result.scores, result.best_step, result.bundle_step, result.num_workers) == ({}, None, 40, 1)
