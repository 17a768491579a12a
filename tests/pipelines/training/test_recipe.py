from dataclasses import replace
from pathlib import Path

import pytest

from animediffusion.models.bundle import BundleConfig, SamplerDefaults
from animediffusion.models.diffusion.path import PathConfig, build_path
from animediffusion.models.network.unet import UNetConfig
from animediffusion.pipelines.training.recipe import TrainConfig, changed_keys, load_recipe, recipe_names
from animediffusion.platform.errors import ConfigError

ROOT = Path(__file__).parents[3]


def failure(*overrides, recipe="demo"):
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, overrides)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 600
    return line


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_of_the_package_is_valid_and_named_after_its_file(name):
    config = load_recipe(name)
    assert config.recipe == name
    assert config.run_name.startswith(f"{name}-")
    assert TrainConfig.check(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_benchmarks_can_be_trained(path):
    config = load_recipe(str(path))
    assert config.recipe == path.stem
    config.objective.build(config.bundle_config(64).build(), config.sampler or SamplerDefaults(), config.seed)


def test_phase_2_goes_through_the_sampler_of_the_model_it_starts_from():
    parent = BundleConfig(sampler=SamplerDefaults(name="heun", steps=3))
    assert load_recipe("phase2").started_from(parent).sampler == parent.sampler


def test_the_package_brings_the_papers_recipe_with_the_papers_network():
    config = load_recipe("animediffusion")
    assert config.network == UNetConfig()
    assert (config.path, config.prediction, config.clamp) == (
        PathConfig(name="linear", zero_terminal=True),
        "v",
        False,
    )


def test_the_strict_recipes_are_the_authors_own_down_to_the_bugs():
    for name in ("animediffusion-strict", "animediffusion-strict-phase2"):
        config = load_recipe(name)
        assert config.network == UNetConfig()
        assert (config.path, config.prediction) == (PathConfig(name="linear"), "eps")
        assert config.objective.strict
        assert (config.optimizer.max_grad_norm, config.optimizer.ema_decay) == (None, 0)
        assert (config.optimizer.precision, config.augment.warp_kind) == ("fp32", "diagonal")
    assert config.objective.name == "reconstruction"


def test_ssimbads_recipe_ends_at_its_largest_noise():
    config = load_recipe("ssimbad")
    assert (config.prediction, config.sampler.name) == ("edm", "heun")
    path = build_path(config.path)
    assert path.t_max == pytest.approx(80 / 80.3)
    assert config.objective.denoising.time_min == pytest.approx(0.002 / 0.302, rel=1e-3)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("network.base_chanels=96", "network.base_chanels: unknown key; did you mean 'base_channels'?"),
        ("batch_sise=8", "batch_sise: unknown key; did you mean 'batch_size'?"),
        ("objective.denoising.time_meen=1", "objective.denoising.time_meen: unknown key; did you mean 'time_mean'?"),
        ("augment.xdog.epsilom=1", "augment.xdog.epsilom: unknown key; did you mean 'epsilon'?"),
        ("sampler.step=3", "sampler.step: unknown key; did you mean 'steps'?"),
        ("batch_size=0", "batch_size: 0; input should be greater than 0"),
        ("seed=-1", "seed: -1; input should be greater than or equal to 0"),
        ("prediction=score", "prediction: 'score'; input should be 'eps', 'x0', 'v' or 'edm'"),
        ("attention=flash", "attention: 'flash'; input should be 'auto', 'xformers' or 'sdpa'"),
        ("network.base_channels=33", "network: cannot be used; base_channels must be a multiple of 32, got 33"),
        ("network.head_channels=0", "network: cannot be used; head_channels must be at least 1, got 0"),
        ("optimizer.learning_rate=-1", "optimizer: cannot be used; learning_rate and max_grad_norm must be above 0"),
        ("augment.flip=2", "augment: cannot be used; flip must be in 0..1, got 2.0"),
        ("sampler.steps=0", "sampler: cannot be used; sampler steps must be a whole number from 1 to 1000, got 0"),
        ("num_workers=5", "TrainConfig: cannot be used; batch_size 32 must be a multiple of num_workers 5"),
        ("name=a/b", "name: 'a/b'; string should match pattern"),
    ],
)
def test_a_wrong_setting_is_one_line_that_says_what_is_allowed(override, line):
    assert failure(override).startswith(line)


def test_an_unknown_recipe_suggests_the_nearest():
    line = failure(recipe="phase3")
    assert line.startswith("recipe 'phase3': unknown; did you mean 'phase")
    assert line.endswith("or a YAML file")


def test_a_yaml_file_is_a_recipe_named_after_itself(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("data: d\nmax_steps: 5\n")
    config = load_recipe(str(path), ["seed=4"])
    assert (config.recipe, config.max_steps, config.seed) == ("mine", 5, 4)


@pytest.mark.parametrize(("text", "found"), [("data: [", "is not YAML"), ("- a", "holds a list")])
def test_a_bad_yaml_file_is_named(tmp_path, text, found):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    line = failure(recipe=str(path))
    assert line.startswith(str(path))
    assert found in line
    assert failure(recipe=str(tmp_path / "none.yaml")).startswith(f"{tmp_path}/none.yaml: No such file")


def test_a_recipe_changes_only_what_it_names_of_its_base(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: demo\nseed: 7\nnetwork: {base_channels: 128, num_res_blocks: 2}\n")
    base, mine = load_recipe("demo"), load_recipe(str(path))
    assert changed_keys(base.identity(), mine.identity()) == [
        "network.base_channels",
        "network.num_res_blocks",
        "recipe",
        "seed",
    ]
    assert (mine.recipe, mine.max_minutes) == ("mine", base.max_minutes)


def test_a_recipe_that_is_based_on_itself_raises_config_error(tmp_path):
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    a.write_text(f"base: {b}\n")
    b.write_text(f"base: {a}\n")
    with pytest.raises(ConfigError, match=r"base: recipe '.*b.yaml' is based on itself; name another recipe"):
        load_recipe(str(a))


def test_a_recipes_budget_replaces_its_bases_whichever_unit_that_has(tmp_path):
    path = tmp_path / "short.yaml"
    path.write_text("base: demo\nmax_steps: 40\n")
    config = load_recipe(str(path))
    assert (config.max_steps, config.max_minutes) == (40, None)


def test_a_base_that_does_not_exist_is_named(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: dmeo\n")
    assert failure(recipe=str(path)).startswith("recipe 'dmeo': unknown; did you mean 'demo'?")


def test_a_budget_on_the_command_line_replaces_the_recipes():
    config = load_recipe("demo", ["max_steps=7"])
    assert (config.max_steps, config.max_minutes) == (7, None)
    config = load_recipe("animediffusion", ["max_minutes=0.5"])
    assert (config.max_steps, config.max_minutes) == (None, 0.5)
    assert "set either max_steps or max_minutes" in failure("max_steps=7", "max_minutes=1")


@pytest.mark.parametrize(
    "override",
    ["max_steps=9", "num_workers=4", "use_gpu=false", "log_every=1", "checkpoint_every=7", "storage=s3://b/c"],
)
def test_budget_workers_addresses_and_logging_leave_the_run_name_alone(override):
    assert load_recipe("demo", [override]).run_name == load_recipe("demo").run_name


@pytest.mark.parametrize("override", ["seed=1", "data=elsewhere", "optimizer.learning_rate=1e-4", "batch_size=8"])
def test_what_decides_the_result_changes_the_run_name(override):
    assert load_recipe("demo", [override]).run_name != load_recipe("demo").run_name


def test_a_run_name_is_the_recipe_and_8_hex_or_what_was_asked_for():
    prefix, _, code = load_recipe("demo").run_name.rpartition("-")
    assert prefix == "demo"
    assert len(code) == 8
    assert int(code, 16) >= 0
    assert load_recipe("demo", ["name=first-try"]).run_name == "first-try"


def test_changed_settings_are_listed_by_their_dotted_keys():
    old = load_recipe("demo").identity()
    new = load_recipe("demo", ["seed=3", "objective.denoising.time_mean=0.5", "augment.xdog.k=2"]).identity()
    assert changed_keys(old, new) == ["augment.xdog.k", "objective.denoising.time_mean", "seed"]


def test_a_run_from_a_model_takes_over_what_its_weights_need():
    parent = BundleConfig(
        network=UNetConfig(base_channels=32, head_channels=32),
        path=PathConfig(name="cosine"),
        prediction="v",
        clamp=True,
        sampler=SamplerDefaults(steps=2),
    )
    config = load_recipe("demo", ["sampler=null"]).started_from(parent)
    bundle = config.bundle_config(64)
    assert (bundle.network, bundle.path, bundle.prediction, bundle.clamp, bundle.sampler) == (
        parent.network,
        parent.path,
        parent.prediction,
        parent.clamp,
        parent.sampler,
    )
    own = load_recipe("demo", ["sampler.steps=9"]).started_from(parent)
    assert own.bundle_config(64).sampler.steps == 9


@pytest.mark.parametrize(
    ("batch_size", "gpus", "workers"), [(32, 0, 2), (3, 0, 1), (32, 1, 1), (32, 8, 8), (20, 8, 5), (2, 8, 2)]
)
def test_left_out_num_workers_is_one_for_each_gpu_that_divides_the_batch(batch_size, gpus, workers):
    assert load_recipe("demo", [f"batch_size={batch_size}"]).workers_on(gpus) == (workers, workers)


def test_num_workers_that_is_set_does_not_depend_on_gpus():
    assert load_recipe("demo", ["num_workers=4"]).workers_on(8) == (4, 4)
    assert load_recipe("demo", ["num_workers=[1,2]"]).workers_on(8) == (1, 2)


def test_settings_that_are_newer_than_a_run_leave_its_name_alone_until_they_are_used():
    old = load_recipe("demo", ["data=x"]).identity()
    assert "hints" not in old["network"]
    assert not {"extract", "hints", "wrong_reference", "two_views"} & old["augment"].keys()
    new = load_recipe("demo", ["data=x", "network.hints=true", "augment.hints=0.5"]).identity()
    assert changed_keys(old, new) == ["augment.hints", "network.hints"]


def test_a_run_from_a_model_without_hints_can_add_them():
    parent = load_recipe("demo").bundle_config(64)
    config = load_recipe("demo-phase2", ["network.hints=true", "init_from=x"]).started_from(parent)
    assert config.network == replace(parent.network, hints=True)
    assert (
        load_recipe("demo-phase2", ["init_from=x"]).started_from(replace(parent, network=config.network)).network.hints
    )
