"""The text of results, as people read it; JSON is tested with the commands."""

from animediffusion import reports
from animediffusion.console import training_line
from animediffusion.models.bundle import SamplerDefaults
from animediffusion.pipelines.evaluation.evaluate import Evaluation
from animediffusion.pipelines.evaluation.measure import Measurement
from animediffusion.pipelines.evaluation.metrics import ImageScores
from animediffusion.pipelines.training.checkpoints import CheckpointScore
from animediffusion.pipelines.training.reporting import StepMetrics, TrainProgress
from animediffusion.pipelines.training.result import TrainResult
from animediffusion.pipelines.tuning.sampler_search import SamplerResult, UnseenPsnr
from animediffusion.pipelines.tuning.schedule_search import RungSummary, ScheduleResult, TrialSummary

METRICS = StepMetrics(0.0812, 1.0, 1e-3, images_per_s=75.0, data_wait=0.01, seconds_per_step=0.5)
SCORE = CheckpointScore(psnr=20.0, ssim=0.9, ciede2000=5.912, psnr_same=21.0)


def test_a_training_line_shows_what_is_known_so_far():
    assert training_line(TrainProgress()) == "step 0"
    speed = "loss 0.0812  75 images/s  data wait 1%"
    assert training_line(TrainProgress(step=20, metrics=METRICS)) == f"step 20  {speed}"
    now = TrainProgress(step=40, max_steps=200, metrics=METRICS, best_step=20, best_score=SCORE)
    assert training_line(now) == f"step 40/200  {speed}  best dE00 5.91 at 20  ETA 1:20"


def test_the_result_of_a_run_has_a_line_for_each_scored_checkpoint():
    result = TrainResult(
        run="r",
        run_dir="d",
        bundle="b",
        steps=20,
        resumed_from=None,
        seconds=2.0,
        images_per_s=75.0,
        num_parameters=9,
        device="cpu",
        attention="sdpa",
        mlflow_run_id="m",
        metrics={"loss": 0.08125},
        scores={20: SCORE},
        best_step=20,
        bundle_step=20,
        num_workers=2,
        peak_memory_mb=300.0,
    )
    lines = reports.training(result).splitlines()
    assert "resumed_from    -" in lines
    assert "metrics.loss    0.08125" in lines
    assert lines[-2].split("  ") == ["checkpoint", "PSNR cross", "SSIM cross", "dE00 cross", "PSNR same"]
    assert lines[-1].split() == ["20", "20.00", "0.900", "5.91", "21.00"]


def test_an_evaluation_is_a_table_of_the_model_and_the_baselines():
    tracks = {name: ImageScores(20.0, 0.9, None, 5.0) for name in ("same", "cross")}
    sampler = SamplerDefaults(steps=4, guidance_scale=1.5)
    result = Evaluation("m", "", "faces", "", "val", 8, 64, sampler, tracks, {"sketch": tracks}, "recolored", None)
    lines = reports.evaluation(result).splitlines()
    assert lines[0] == "8 images of faces (val, 64 px), euler, 4 steps, guidance 1.5"
    assert [line.split()[0] for line in lines[2:]] == ["model", "sketch"]


def test_a_search_of_samplers_marks_the_choice_and_shows_defaults_that_are_not_on_the_front():
    front = [Measurement("euler", steps, 1.0, 20.0 + steps, 1.0, steps, 0.1) for steps in (1, 2)]
    own = Measurement("heun", 4, 2.0, 19.0, 1.0, 16, 0.1, guidance_interval=(0.0, 0.5), ema_length=0.1)
    result = SamplerResult(3, 3, own, front[1], tuple(front), UnseenPsnr(19.0, 21.5), "f", "p.png", "s.png", 2, True)
    lines = reports.sampler_search(result).splitlines()
    assert lines[1].split()[:2] == ["defaults", "16"]
    assert lines[1].endswith("0 to 0.5  10% of the run")
    assert [line.split()[0] for line in lines[2:4]] == ["1", "choice"]
    assert "version              2" in lines
    assert lines[-1] == "PSNR on unseen rows  choice 21.50, defaults 19.00"


def test_a_search_of_schedules_says_how_the_trials_ended():
    best = TrialSummary({"path": "flow"}, 20.0, 18, 1)
    rungs = (RungSummary(2, 15.0, 14.0, 3), RungSummary(18, 20.0, None, 1))
    result = ScheduleResult(3, 1, 2, 0, 0, best, None, rungs, "found.yaml", "f")
    lines = reports.schedule_search(result).splitlines()
    assert lines[2].split() == ["18", "1", "20.00", "-"]
    assert lines[4] == "3 trials: 1 finished, 2 stopped early, 0 failed, 0 ended by the time limit"
    assert lines[-1] == "recipe              found.yaml"
