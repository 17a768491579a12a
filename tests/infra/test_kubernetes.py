"""infra/kubernetes: what is built from it, whether Kubernetes and KubeRay will take it, and what it lets in."""

import copy
import os
import re
import tomllib
from pathlib import Path

import manifests
import pytest
import yaml
from manifests import FOLDERS, KUBERNETES, RAY_KINDS, ROOT, amount, build, containers, pods
from ray._private import ray_constants, services, utils
from sqlalchemy import make_url

from animediffusion.cli import app as cli

PLATFORM = ("small", "gpu")
SECRETS = {"storage", "postgres", "redis", "ray-token"}
NOT_OURS = {"postgres", "redis", "minio/minio"}


@pytest.fixture(scope="module")
def crds() -> Path:
    if not os.environ.get("KUBERAY_CRDS"):  # the tests of manifests.check are about the same objects
        pytest.skip("KUBERAY_CRDS names no folder, see manifests.py")
    return Path(os.environ["KUBERAY_CRDS"])


def found(folder: str, kind: str) -> list[dict]:
    return [one for one in build(KUBERNETES / folder) if one["kind"] == kind]


def templates(one: dict) -> list[dict]:
    """Every pod template of an object, with its labels."""
    if isinstance(one, list):
        return [template for item in one for template in templates(item)]
    if not isinstance(one, dict):
        return []
    here = [one] if "containers" in one.get("spec", {}) else []
    return here + [template for value in one.values() for template in templates(value)]


def cluster(folder: str, kind: str) -> dict:
    [one] = found(folder, kind)
    return one["spec"] if kind == "RayCluster" else one["spec"]["rayClusterConfig"]


def pins() -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==(.+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))


def selects(selector: dict, labels: dict) -> bool:
    wanted = selector.get("matchLabels", {}).items() <= labels.items()
    return wanted and all(labels.get(one["key"]) in one["values"] for one in selector.get("matchExpressions", []))


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_object_fits_the_schema_of_its_kind(folder: str) -> None:
    objects = build(KUBERNETES / folder)
    assert objects
    for one in objects:
        manifests.check(one)


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_operators_own_schemas_say_the_same(folder: str, crds: Path) -> None:
    for one in build(KUBERNETES / folder):
        if one["kind"] in RAY_KINDS:
            manifests.check_by_operator(one, crds)


@pytest.mark.parametrize("folder", FOLDERS)
def test_kustomize_builds_the_same(folder: str) -> None:
    theirs = manifests.rendered_by_kustomize(KUBERNETES / folder)
    if theirs is None:  # the tests above and below are about the same objects, built by manifests.build
        pytest.skip("neither kustomize nor kubectl is installed")

    def key(one: dict) -> tuple[str, str]:
        return one["kind"], one["metadata"]["name"]

    assert sorted(theirs, key=key) == sorted(build(KUBERNETES / folder), key=key)


SLIPS = [
    ("RayCluster", lambda spec: spec.update(authOption={}), "authOption"),
    ("RayCluster", lambda spec: spec["authOptions"].update(mode="tokn"), "authOptions"),
    ("RayCluster", lambda spec: containers(spec)[0].update(imag=""), "imag"),
    ("RayCluster", lambda spec: containers(spec)[0]["resources"]["limits"].update(cpu="2 cores"), "2 cores"),
    ("RayService", lambda spec: cluster_in(spec)["workerGroupSpecs"][0].update(replica=1), "replica"),
    ("RayService", lambda spec: cluster_in(spec).pop("headGroupSpec"), "headGroupSpec"),
    ("RayJob", lambda spec: spec.update(entryPoint="doctor"), "entryPoint"),
]


def cluster_in(spec: dict) -> dict:
    return spec["rayClusterConfig"]


def spoiled(kind: str, spoil) -> dict:
    one = copy.deepcopy(found("train" if kind == "RayJob" else "gpu", kind)[0])
    spoil(one["spec"])
    return one


@pytest.mark.parametrize(
    ("kind", "spoil", "named"),
    [
        *SLIPS,
        ("RayService", lambda spec: spec.pop("serveConfigV2"), "serveConfigV2"),
        ("Deployment", lambda spec: spec.update(replica=1), "replica"),
        ("NetworkPolicy", lambda spec: spec.update(policyTypes="Ingress"), "policyTypes"),
    ],
)
def test_a_slip_in_an_object_is_found(kind: str, spoil, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        manifests.check(spoiled(kind, spoil))


@pytest.mark.parametrize(("kind", "spoil", "named"), SLIPS)
def test_a_slip_is_found_by_the_operators_own_schemas(kind: str, spoil, named: str, crds: Path) -> None:
    with pytest.raises(ValueError, match=named):
        manifests.check_by_operator(spoiled(kind, spoil), crds)


@pytest.mark.parametrize("folder", FOLDERS)
def test_nothing_runs_as_root_or_without_limits(folder: str) -> None:
    for one in build(KUBERNETES / folder):
        for pod in pods(one):
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["securityContext"]["runAsUser"] >= 999
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            assert pod["enableServiceLinks"] is False
            assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
            assert all("hostPath" not in volume for volume in pod.get("volumes", []))
        for container in containers(one):
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= set(container["resources"]["limits"])
            assert {"cpu", "memory"} <= set(container["resources"]["requests"])


@pytest.mark.parametrize("folder", PLATFORM)
def test_everything_that_stays_up_is_probed(folder: str) -> None:
    staying = [one for one in build(KUBERNETES / folder) if one["kind"] not in ("Job", "RayJob")]
    probed = [container for one in staying for pod in pods(one) for container in pod["containers"]]
    assert len(probed) >= 5
    for container in probed:
        assert {"readinessProbe", "livenessProbe"} <= set(container), container["name"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_secrets_come_by_reference_and_are_described_in_the_manual(folder: str) -> None:
    objects = build(KUBERNETES / folder)
    assert "Secret" not in {one["kind"] for one in objects}
    for variable in [variable for one in objects for box in containers(one) for variable in box.get("env", [])]:
        if re.search("PASSWORD|SECRET|TOKEN|KEY", variable["name"]):
            assert "secretKeyRef" in variable["valueFrom"], variable["name"]
    text = "\n---\n".join(yaml.safe_dump(one) for one in objects)
    used = set(re.findall(r"secret(?:Key)?Ref:\n(?:\s+key: \S+\n)?\s+name: (\S+)", text))
    used |= set(re.findall(r"secretName: (\S+)", text))
    assert used <= SECRETS
    manual = (ROOT / "docs/cluster.md").read_text()
    assert all(f"secret generic {name} " in manual for name in used)


@pytest.mark.parametrize("folder", FOLDERS)
def test_versions_are_those_of_the_project(folder: str) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for one in build(KUBERNETES / folder):
        for container in containers(one):
            name, _, tag = container["image"].rpartition(":")
            assert tag.startswith(version) or name in NOT_OURS, container["image"]
    for kind in ("RayCluster", "RayService") if folder in PLATFORM else ():
        assert cluster(folder, kind)["rayVersion"] == pins()["ray"]


@pytest.mark.parametrize("folder", PLATFORM)
@pytest.mark.parametrize("kind", ["RayCluster", "RayService"])
def test_a_ray_cluster_asks_for_a_token_and_keeps_its_state_outside(folder: str, kind: str) -> None:
    spec = cluster(folder, kind)
    assert spec["authOptions"] == {"mode": "token", "secretName": "ray-token"}
    assert spec["gcsFaultToleranceOptions"]["redisAddress"] == "redis:6379"
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert spec["headGroupSpec"]["enableIngress"] is False


@pytest.mark.parametrize("folder", PLATFORM)
def test_nothing_is_published_outside_the_cluster(folder: str) -> None:
    assert "Ingress" not in {one["kind"] for one in build(KUBERNETES / folder)}
    assert all(one["spec"].get("type", "ClusterIP") == "ClusterIP" for one in found(folder, "Service"))


@pytest.mark.parametrize("folder", PLATFORM)
def test_only_the_operator_and_submitters_reach_a_dashboard(folder: str) -> None:
    allowed = {"jobs": {"kuberay-operator", "submitter"}, "serve": {"kuberay-operator"}}
    for policy in found(folder, "NetworkPolicy"):
        for rule in policy["spec"].get("ingress", []):
            if 8265 in [port["port"] for port in rule.get("ports", [])]:
                peers = {next(iter(peer["podSelector"]["matchLabels"].values())) for peer in rule["from"]}
                assert peers == allowed.pop(policy["metadata"]["name"])
    assert allowed == {}


@pytest.mark.parametrize("folder", PLATFORM)
def test_every_pod_is_behind_the_rule_that_refuses_and_every_server_behind_one_of_its_own(folder: str) -> None:
    policies = found(folder, "NetworkPolicy")
    [everything] = [one for one in policies if one["spec"]["podSelector"] == {}]
    assert everything["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in everything["spec"]
    for one in build(KUBERNETES / folder):
        for template in templates(one) if one["kind"] != "Job" else []:
            labels = template["metadata"]["labels"]
            own = [policy for policy in policies if selects(policy["spec"]["podSelector"], labels)]
            assert any(policy["spec"].get("ingress") for policy in own), labels


@pytest.mark.parametrize("folder", FOLDERS)
def test_only_a_head_with_an_autoscaler_holds_a_token_of_kubernetes(folder: str) -> None:
    for one in build(KUBERNETES / folder):
        scales = one["kind"] in ("RayCluster", "RayService") and cluster(folder, one["kind"])
        for pod in pods(one):
            head = pod["containers"][0]["name"] == "ray-head"
            needed = head and scales.get("enableInTreeAutoscaling", False)
            assert pod["automountServiceAccountToken"] is needed, one["metadata"]["name"]


def test_gpu_heads_stay_and_compute_nothing_and_spot_machines_come_first() -> None:
    for kind in ("RayCluster", "RayService"):
        spec = cluster("gpu", kind)
        head = spec["headGroupSpec"]
        assert head["rayStartParams"]["num-cpus"] == "0"
        assert head["template"]["spec"]["nodeSelector"] == {"karpenter.sh/capacity-type": "on-demand"}
        assert spec["enableInTreeAutoscaling"] is True
        assert spec["autoscalerOptions"]["version"] == "v2"
        for group in spec["workerGroupSpecs"]:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
            # With this autoscaler KubeRay refuses anything else.
            assert "restartPolicy" not in group["template"]["spec"]
    groups = {group["groupName"]: group for group in cluster("gpu", "RayCluster")["workerGroupSpecs"]}
    assert groups["gpu-spot"]["priority"] > groups["gpu-on-demand"]["priority"]
    limits = {name: containers(group)[0]["resources"]["limits"] for name, group in groups.items()}
    assert [limits[name].get("nvidia.com/gpu") for name in ("cpu", "gpu-spot", "gpu-on-demand")] == [None, "1", "1"]
    assert all(group["minReplicas"] == 0 for group in groups.values())


def test_one_engine_fits_on_one_serving_pod() -> None:
    [service] = found("gpu", "RayService")
    [application] = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    [group] = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert int(containers(group)[0]["resources"]["limits"]["nvidia.com/gpu"]) >= application["args"]["engine_gpus"]
    assert int(containers(group)[0]["resources"]["limits"]["cpu"]) > application["args"]["engine_cpus"]
    assert group["maxReplicas"] >= application["args"]["max_replicas"]


def test_mlflow_answers_to_the_names_that_it_has() -> None:
    for folder in PLATFORM:
        [server] = found(folder, "Deployment")
        [names] = [part for part in containers(server)[0]["args"] if part.startswith("--allowed-hosts=")]
        [settings] = found(folder, "ConfigMap")
        asked = settings["data"]["MLFLOW_TRACKING_URI"].removeprefix("http://")
        assert asked in names.removeprefix("--allowed-hosts=").split(",")
        assert "*" not in names


def test_the_training_job_runs_on_the_cluster_that_is_there() -> None:
    [job] = found("train", "RayJob")
    [there] = found("small", "RayCluster")
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": there["metadata"]["name"]}
    words = job["spec"]["entrypoint"].split()
    assert words[:2] == ["animediffusion", "train"]
    assert {"data", "storage", "name"} <= {word.partition("=")[0] for word in words}
    assert not Path(KUBERNETES / "train" / "rayjob.yaml").read_text().count("runtimeEnvYAML")


def test_the_nightly_job_submits_one_command_at_a_time_to_the_cluster_that_is_there(capsys) -> None:
    [job] = found("improve", "CronJob")
    [there] = found("small", "RayCluster")
    assert job["spec"]["concurrencyPolicy"] == "Forbid"
    [box] = containers(job)
    variables = {one["name"]: one.get("value") for one in box["env"]}
    assert variables["RAY_API_SERVER_ADDRESS"] == f"http://{there['metadata']['name']}-head-svc:8265"
    assert variables["RAY_AUTH_MODE"] == there["spec"]["authOptions"]["mode"]
    program, *words = box["command"]
    assert (program, words[:4]) == ("animediffusion", ["jobs", "submit", "--wait", "--"])
    assert cli.run([*words[4:], "--help"]) == 0  # the options are those of the command
    assert "Usage: animediffusion improve" in capsys.readouterr().out
    [template] = templates(job)
    [policy] = [one for one in found("small", "NetworkPolicy") if one["metadata"]["name"] == "jobs"]
    peers = [peer for rule in policy["spec"]["ingress"] for peer in rule["from"] if "namespaceSelector" not in peer]
    assert any(selects(peer["podSelector"], template["metadata"]["labels"]) for peer in peers)


def ray_pods(folder: str) -> list[tuple[dict, dict]]:
    """The group and the pod of every kind of Ray node."""
    groups = []
    for kind in ("RayCluster", "RayService"):
        spec = cluster(folder, kind)
        groups += [spec["headGroupSpec"], *spec.get("workerGroupSpecs", [])]
    return [(group, group["template"]["spec"]) for group in groups]


@pytest.mark.parametrize("folder", PLATFORM)
def test_ray_keeps_its_objects_in_memory(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Ray's own choice of the store's size and place, in a pod of which nothing is used yet."""
    for group, pod in ray_pods(folder):
        [shm] = [amount(one["emptyDir"]["sizeLimit"]) for one in pod["volumes"] if one["name"] == "shm"]
        memory = amount(pod["containers"][0]["resources"]["limits"]["memory"])
        named = group["rayStartParams"].get("object-store-memory")
        monkeypatch.setattr(utils, "get_shared_memory_bytes", lambda shm=shm: int(shm))
        monkeypatch.setattr("ray._common.utils.get_system_memory", lambda memory=memory: int(memory))
        size = utils.resolve_object_store_memory(int(memory), int(named) if named else None)
        place, _, _ = services.determine_plasma_store_config(size, "/tmp")
        assert place == "/dev/shm", pod["containers"][0]


@pytest.mark.parametrize("folder", PLATFORM)
def test_a_ray_pod_has_the_time_that_ray_takes_to_drain_it(folder: str) -> None:
    for group, pod in ray_pods(folder):
        variables = {one["name"]: one["value"] for one in pod["containers"][0].get("env", [])}
        drain = float(variables.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", 30))
        assert pod["terminationGracePeriodSeconds"] >= drain + 15
        if "groupName" in group:  # a machine that is taken with a notice of two minutes: a run has to save
            assert drain >= 90
    assert ray_constants.RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S == 30


@pytest.mark.parametrize("folder", PLATFORM)
def test_no_disruption_budget_blocks_every_drain(folder: str) -> None:
    """KubeRay's clusters have no scale subresource: only a number of pods counts, and more pods than that must run."""
    running = []
    for kind in ("RayCluster", "RayService"):
        spec = cluster(folder, kind)
        groups = [("head", 1, spec["headGroupSpec"])]
        groups += [("worker", one["minReplicas"], one) for one in spec.get("workerGroupSpecs", [])]
        running += [(group, number, type_) for type_, number, group in groups]
    for budget in found(folder, "PodDisruptionBudget"):
        least = budget["spec"]["minAvailable"]
        assert isinstance(least, int)
        assert "maxUnavailable" not in budget["spec"]
        picked = [
            number
            for group, number, kind in running
            if selects(
                budget["spec"]["selector"], {**group["template"]["metadata"]["labels"], "ray.io/node-type": kind}
            )
        ]
        assert sum(picked) > least


def test_the_application_fills_the_serving_pods_that_always_run() -> None:
    [service] = found("gpu", "RayService")
    [application] = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    [group] = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert group["minReplicas"] == application["args"]["min_replicas"] == application["args"]["num_ingress_replicas"]
    assert application["deployments"] == [{"name": "ingress", "max_replicas_per_node": 1}]


@pytest.mark.parametrize("folder", PLATFORM)
def test_a_shell_is_replaced_by_the_server_that_it_starts(folder: str) -> None:
    """Else the shell gets the signal to stop, and ignores it."""
    for one in build(KUBERNETES / folder):
        for container in containers(one):
            if container.get("command", [])[:2] == ["sh", "-c"]:
                [script] = container["args"]
                assert script.startswith("exec ")
                assert "|" not in script


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_job_goes_when_it_is_done(folder: str) -> None:
    assert all(one["spec"]["ttlSecondsAfterFinished"] <= 300 for one in found(folder, "Job"))


@pytest.mark.parametrize("folder", ["gpu", "train"])
def test_a_registry_may_ask_for_a_login(folder: str) -> None:
    for one in build(KUBERNETES / folder):
        for pod in pods(one):
            if "animediffusion" in pod["containers"][0]["image"]:
                assert pod["imagePullSecrets"] == [{"name": "registry"}], one["metadata"]["name"]
    assert "create secret docker-registry registry " in (ROOT / "docs/cluster.md").read_text()


RESERVED = {"cpu": 1.0, "memory": 2**30}
"""For the operator and what Kubernetes itself runs on a node."""


def requests(pod: dict, resource: str) -> float:
    own = sum(amount(one["resources"]["requests"][resource]) for one in pod["containers"])
    first = [amount(one["resources"]["requests"][resource]) for one in pod.get("initContainers", [])]
    return max(own, *first) if first else own


def test_the_node_that_the_manual_names_holds_a_second_serving_cluster_while_pods_change() -> None:
    [words] = re.findall(r"one node with (\d+) cores and (\d+) GiB", (ROOT / "docs/cluster.md").read_text())
    size = {"cpu": float(words[0]), "memory": float(words[1]) * 2**30}
    serving = pods(cluster("small", "RayService"))
    every = [pod for one in build(KUBERNETES / "small") for pod in pods(one)]
    for resource, there in size.items():
        assert sum(requests(pod, resource) for pod in [*every, *serving]) + RESERVED[resource] <= there


def test_the_policy_for_cloud_identities_fits_its_schema_and_is_not_built() -> None:
    policy = yaml.safe_load((KUBERNETES / "gpu/identity.yaml").read_text())
    policy["metadata"]["namespace"] = "animediffusion"
    manifests.check(policy)
    built = [one["metadata"]["name"] for one in found("gpu", "NetworkPolicy")]
    assert policy["metadata"]["name"] not in built


def test_a_training_job_asks_for_the_gpus_that_the_autoscaler_brings() -> None:
    [job] = found("train", "RayJob")
    assert "use_gpu=true" in job["spec"]["entrypoint"].split()


def test_the_driver_of_every_database_is_installed() -> None:
    """An address without a driver means SQLAlchemy's default one, which is another in each release."""
    files = [path for path in (ROOT / "infra").rglob("*") if path.is_file()]
    files += [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    text = "\n".join(path.read_text() for path in files)
    schemes = re.findall(r"\b((?:postgres|postgresql|mysql)(?:\+\w+)?)://", text)
    assert len(schemes) >= 2
    for scheme in schemes:
        assert make_url(f"{scheme}://user@host/name").get_dialect().import_dbapi()
        assert scheme.partition("+")[2] in (ROOT / "infra/docker/Dockerfile").read_text()
