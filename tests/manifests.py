"""The objects of infra/kubernetes as Kubernetes gets them, and what their schemas are.

Built-in kinds, and every pod template inside KubeRay's, are checked against Kubernetes' own schemas (of the package
kubernetes-validate, strict). KubeRay's kinds are checked against the models below: of its API in v1.7, what our objects
use, and nothing else. They are checked against the operator's own schemas, too, where they are: 3 MB of its source.

    git clone --depth 1 --branch v1.7.0 https://github.com/ray-project/kuberay /tmp/kuberay
    KUBERAY_CRDS=/tmp/kuberay/helm-chart/kuberay-operator/crds make test ARGS=tests/infra/test_kubernetes.py
"""

# ruff: noqa: N815 - the names are the API's
from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonpatch
import jsonschema
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from referencing import Registry, Resource

ROOT = Path(__file__).parents[1]
KUBERNETES = ROOT / "infra/kubernetes"
FOLDERS = ("small", "gpu", "train")
VERSIONS = ("1.31.0", "1.37.0")
"""Of Kubernetes: the oldest and the newest that we say it runs on."""
QUANTITY = re.compile(r"(\d+\.?\d*|\.\d+)(m|k|[KMGTPE]i|[MGTPE])?")
"""Of a resource; Kubernetes' own schema takes any text for one."""
UNITS = {"": 1, "m": 1e-3, "Mi": 2**20, "Gi": 2**30}
"""Those that our quantities have."""
RAY_KINDS = ("RayCluster", "RayJob", "RayService")


def build(folder: Path) -> list[dict[str, Any]]:
    """What `kustomize build` gives, for the few features that we use; see rendered_by_kustomize."""
    told = yaml.safe_load((folder / "kustomization.yaml").read_text())
    unknown = set(told) - {"apiVersion", "kind", "namespace", "resources", "images", "patches"}
    assert not unknown, f"{folder.name}: this build knows nothing of {unknown}"
    objects: list[dict[str, Any]] = []
    for name in told["resources"]:
        path = folder / name
        objects += build(path) if path.is_dir() else [one for one in yaml.safe_load_all(path.read_text()) if one]
    for patch in told.get("patches", []):
        objects = _patched(objects, folder, patch)
    for one in objects:
        if one["kind"] != "Namespace":
            one["metadata"]["namespace"] = told["namespace"]
        for container in containers(one):
            _name_image(container, told.get("images", []))
    return objects


def _patched(objects: list[dict[str, Any]], folder: Path, patch: dict[str, Any]) -> list[dict[str, Any]]:
    operations = yaml.safe_load(patch["patch"] if "patch" in patch else (folder / patch["path"]).read_text())
    target = (patch["target"]["kind"], patch["target"]["name"])
    hit = [(one["kind"], one["metadata"]["name"]) == target for one in objects]
    assert sum(hit) == 1, f"{folder.name}: {target} is there {sum(hit)} times"
    return [jsonpatch.apply_patch(one, operations) if here else one for one, here in zip(objects, hit, strict=True)]


def _name_image(container: dict[str, Any], images: list[dict[str, str]]) -> None:
    name, _, tag = container["image"].partition(":")
    for image in images:
        if image["name"] == name:
            container["image"] = f"{image.get('newName', name)}:{image.get('newTag', tag)}"


def rendered_by_kustomize(folder: Path) -> list[dict[str, Any]] | None:
    """The same from the real program, None where this machine has neither kustomize nor kubectl."""
    command = next(
        (command for command in (["kustomize", "build"], ["kubectl", "kustomize"]) if shutil.which(command[0])), None
    )
    if command is None:
        return None
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def pods(value: Any) -> list[dict[str, Any]]:
    """Every pod spec inside an object."""
    if isinstance(value, list):
        return [spec for item in value for spec in pods(item)]
    if not isinstance(value, dict):
        return []
    here = [value] if "containers" in value else []
    return here + [spec for item in value.values() for spec in pods(item)]


def containers(value: Any) -> list[dict[str, Any]]:
    """Every container inside an object; those that run first and end come last."""
    return [one for spec in pods(value) for one in [*spec["containers"], *spec.get("initContainers", [])]]


def environment(container: dict[str, Any], settings: dict[str, str], secrets: dict[str, str]) -> dict[str, str]:
    """Variables of a container, from the ConfigMap's data and the values of the secrets by their names."""
    found = dict(settings) if "envFrom" in container else {}
    for entry in container.get("env", []):
        value = secrets[entry["valueFrom"]["secretKeyRef"]["name"]] if "valueFrom" in entry else entry["value"]
        found[entry["name"]] = expand(value, found)
    return found


def expand(text: str, variables: dict[str, str]) -> str:
    """Put variables into a command or a value as Kubernetes does: $(NAME)."""
    return re.sub(r"\$\((\w+)\)", lambda match: variables[match[1]], text)


def amount(quantity: str) -> float:
    """Cores or bytes, from a quantity."""
    [(number, unit)] = QUANTITY.findall(str(quantity))
    return float(number) * UNITS[unit]


@functools.cache
def _validator(version: str, kind: str, api_version: str) -> jsonschema.protocols.Validator:
    group, _, number = api_version.rpartition("/")
    name = "-".join([kind.lower(), *([group.partition(".")[0]] if group else []), number])
    folder = resources.files("kubernetes_validate") / "kubernetes-json-schema" / f"v{version}-local-strict"
    schema = json.loads((folder / f"{name}.json").read_text())
    return jsonschema.Draft202012Validator(schema, registry=_definitions(version))


@functools.cache
def _definitions(version: str) -> Registry:
    folder = resources.files("kubernetes_validate") / "kubernetes-json-schema" / f"v{version}-local-strict"
    definitions = json.loads((folder / "_definitions.json").read_text())
    return Resource.from_contents(definitions) @ Registry()


def check(one: dict[str, Any]) -> None:
    """Raise a ValueError that names the field if an object does not fit its schema."""
    for container in containers(one):
        for amount in (amount for part in container.get("resources", {}).values() for amount in part.values()):
            if not QUANTITY.fullmatch(str(amount)):
                raise ValueError(f"{one['kind']}: {container['name']}: {amount!r} is no quantity")
    if one["kind"] in RAY_KINDS:
        {"RayCluster": RayCluster, "RayJob": RayJob, "RayService": RayService}[one["kind"]].model_validate(one)
        return
    for version in VERSIONS:
        errors = list(_validator(version, one["kind"], one["apiVersion"]).iter_errors(one))
        if errors:
            where = ".".join(str(part) for part in errors[0].absolute_path)
            raise ValueError(f"{one['kind']}, Kubernetes {version}: {where}: {errors[0].message[:300]}")


def _pod(template: dict[str, Any]) -> dict[str, Any]:
    metadata = {"name": "pod", **template.get("metadata", {})}
    check({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]})
    unknown = set(template) - {"metadata", "spec"}
    if unknown:
        raise ValueError(f"a pod template has no {unknown}")
    return template


class Api(BaseModel):
    """Base: a field that is not there is an error."""

    model_config = ConfigDict(extra="forbid", strict=True)


PodTemplate = Annotated[dict[str, Any], AfterValidator(_pod)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Name = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=47)]


class Metadata(Api):
    """Of an object."""

    name: Name
    namespace: str


class AuthOptions(Api):
    """Where the token is: key `auth_token` of a secret."""

    mode: Literal["disabled", "token"]
    secretName: str


class RedisCredential(Api):
    """A secret by reference."""

    valueFrom: dict[Literal["secretKeyRef"], dict[Literal["name", "key"], str]]


class GcsFaultToleranceOptions(Api):
    """Where a head keeps its state."""

    redisAddress: str
    redisPassword: RedisCredential


class AutoscalerOptions(Api):
    """The container beside a head that asks for workers."""

    version: Literal["v1", "v2"]
    idleTimeoutSeconds: Count
    securityContext: dict[str, Any]
    resources: dict[Literal["requests", "limits"], dict[str, str]]


class HeadGroup(Api):
    """The head's pod."""

    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer"]
    enableIngress: bool
    rayStartParams: dict[str, str]
    template: PodTemplate


class WorkerGroup(Api):
    """Pods that are alike."""

    groupName: str
    replicas: Count
    minReplicas: Count
    maxReplicas: Count
    priority: int | None = None
    rayStartParams: dict[str, str]
    template: PodTemplate


class ClusterSpec(Api):
    """A Ray cluster."""

    rayVersion: str
    authOptions: AuthOptions
    gcsFaultToleranceOptions: GcsFaultToleranceOptions
    enableInTreeAutoscaling: bool = False
    autoscalerOptions: AutoscalerOptions | None = None
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup] = []


class RayCluster(Api):
    """A cluster that stays."""

    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: ClusterSpec


class ServiceSpec(Api):
    """A Serve application and the cluster for it."""

    serveConfigV2: str
    excludeHeadPodFromServeSvc: bool = False
    rayClusterConfig: ClusterSpec


class RayService(Api):
    """Serving."""

    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: Metadata
    spec: ServiceSpec


class JobSpec(Api):
    """A command on a cluster that is there."""

    clusterSelector: dict[Literal["ray.io/cluster"], str]
    entrypoint: str
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode"]
    submitterConfig: dict[Literal["backoffLimit"], Count]
    submitterPodTemplate: PodTemplate


class RayJob(Api):
    """A job."""

    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: JobSpec


def check_by_operator(one: dict[str, Any], crds: Path) -> None:
    """The same for KubeRay's kinds, by the operator's own schemas."""
    error = jsonschema.exceptions.best_match(_operator(crds)[one["kind"]].iter_errors(one))
    if error:
        raise ValueError(f"{one['kind']}: {'.'.join(map(str, error.absolute_path))}: {error.message[:300]}")


@functools.cache
def _operator(crds: Path) -> dict[str, jsonschema.protocols.Validator]:
    found = {}
    for path in crds.glob("ray.io_*.yaml"):
        definition = yaml.load(path.read_text(), yaml.CSafeLoader)["spec"]
        [version] = [one for one in definition["versions"] if one["name"] == "v1" and one["served"]] or [None]
        if version is not None:  # RayCronJob has no v1 yet
            closed = _closed(version["schema"]["openAPIV3Schema"])
            found[definition["names"]["kind"]] = jsonschema.Draft4Validator(closed)
    return found


def _closed(schema: Any) -> Any:
    """A CRD's schema that refuses unknown fields, as the API server's strict mode does; metadata is not the CRD's."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    named = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if named and schema["properties"] and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed
