"""The objects of infra/kubernetes as Kubernetes receives them, and checks against their schemas.

Built-in kinds, and every pod template inside KubeRay's kinds, are checked against Kubernetes' own schemas (of the
package kubernetes-validate, strict). KubeRay's kinds are checked against the models below, which describe only those
fields of its API v1.7 that our objects use. If KUBERAY_CRDS names the operator's own schemas (3 MB of its source),
KubeRay's kinds are also checked against them:

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
FOLDERS = ("small", "gpu", "train", "improve")
VERSIONS = ("1.31.0", "1.37.0")
"""The oldest and the newest supported version of Kubernetes."""
QUANTITY = re.compile(r"(\d+\.?\d*|\.\d+)(m|k|[KMGTPE]i|[MGTPE])?")
"""A valid quantity of a resource; Kubernetes' own schema accepts any text."""
UNITS = {"": 1, "m": 1e-3, "Mi": 2**20, "Gi": 2**30}
"""Factors of the units that our quantities use."""
RAY_KINDS = ("RayCluster", "RayJob", "RayService")


def build(folder: Path) -> list[dict[str, Any]]:
    """Return the objects that `kustomize build` prints, for the few features that we use; see rendered_by_kustomize."""
    content = yaml.load((folder / "kustomization.yaml").read_text(), yaml.CSafeLoader)
    unknown = set(content) - {"apiVersion", "kind", "namespace", "resources", "images", "patches"}
    assert not unknown, f"{folder.name}: this build knows nothing of {unknown}"
    objects: list[dict[str, Any]] = []
    for name in content["resources"]:
        path = folder / name
        objects += (
            build(path) if path.is_dir() else [one for one in yaml.load_all(path.read_text(), yaml.CSafeLoader) if one]
        )
    for patch in content.get("patches", []):
        objects = _patched(objects, folder, patch)
    for one in objects:
        if one["kind"] != "Namespace":
            one["metadata"]["namespace"] = content["namespace"]
        for container in containers(one):
            _name_image(container, content.get("images", []))
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
    """Return the same objects from the real program; None if this machine has neither kustomize nor kubectl."""
    command = next(
        (command for command in (["kustomize", "build"], ["kubectl", "kustomize"]) if shutil.which(command[0])), None
    )
    if command is None:
        return None
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return list(yaml.load_all(done.stdout, yaml.CSafeLoader))


def pods(value: Any) -> list[dict[str, Any]]:
    """Return every pod spec inside an object."""
    if isinstance(value, list):
        return [spec for item in value for spec in pods(item)]
    if not isinstance(value, dict):
        return []
    here = [value] if "containers" in value else []
    return here + [spec for item in value.values() for spec in pods(item)]


def containers(value: Any) -> list[dict[str, Any]]:
    """Return every container inside an object; the init containers of a pod come last."""
    return [one for spec in pods(value) for one in [*spec["containers"], *spec.get("initContainers", [])]]


def environment(container: dict[str, Any], settings: dict[str, str], secrets: dict[str, str]) -> dict[str, str]:
    """Return the variables of a container, from the ConfigMap's data and the values of the secrets by name."""
    found = dict(settings) if "envFrom" in container else {}
    for entry in container.get("env", []):
        value = secrets[entry["valueFrom"]["secretKeyRef"]["name"]] if "valueFrom" in entry else entry["value"]
        found[entry["name"]] = expand(value, found)
    return found


def expand(text: str, variables: dict[str, str]) -> str:
    """Replace $(NAME) in a command or a value by the variable, as Kubernetes does."""
    return re.sub(r"\$\((\w+)\)", lambda match: variables[match[1]], text)


def amount(quantity: str) -> float:
    """Convert a quantity to cores or bytes."""
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
    """Check an object against its schema.

    Raises:
        ValueError: the object does not match the schema; the message names the field.
    """
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
    """Base class: an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", strict=True)


PodTemplate = Annotated[dict[str, Any], AfterValidator(_pod)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Name = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=47)]


class Metadata(Api):
    """Metadata of an object."""

    name: Name
    namespace: str


class AuthOptions(Api):
    """Token authentication: the token is the key `auth_token` of a secret."""

    mode: Literal["disabled", "token"]
    secretName: str


class RedisCredential(Api):
    """A password from a secret."""

    valueFrom: dict[Literal["secretKeyRef"], dict[Literal["name", "key"], str]]


class GcsFaultToleranceOptions(Api):
    """The Redis in which a head keeps its state."""

    redisAddress: str
    redisPassword: RedisCredential


class AutoscalerOptions(Api):
    """The autoscaler: a container in the head's pod that requests workers."""

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
    """A group of identical worker pods."""

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
    """A permanent cluster."""

    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: ClusterSpec


class ServiceSpec(Api):
    """Spec of a RayService: the application and its cluster."""

    serveConfigV2: str
    excludeHeadPodFromServeSvc: bool = False
    rayClusterConfig: ClusterSpec


class RayService(Api):
    """A Serve application on its own cluster."""

    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: Metadata
    spec: ServiceSpec


class JobSpec(Api):
    """Spec of a RayJob: a command on an existing cluster."""

    clusterSelector: dict[Literal["ray.io/cluster"], str]
    entrypoint: str
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode"]
    submitterConfig: dict[Literal["backoffLimit"], Count]
    submitterPodTemplate: PodTemplate


class RayJob(Api):
    """A job on an existing cluster."""

    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: JobSpec


def check_by_operator(one: dict[str, Any], crds: Path) -> None:
    """Check an object of KubeRay's kinds against the operator's own schemas, in the folder `crds`.

    Raises:
        ValueError: the object does not match the schema; the message names the field.
    """
    error = jsonschema.exceptions.best_match(_operator(crds)[one["kind"]].iter_errors(one))
    if error:
        raise ValueError(f"{one['kind']}: {'.'.join(map(str, error.absolute_path))}: {error.message[:300]}")


@functools.cache
def _operator(crds: Path) -> dict[str, jsonschema.protocols.Validator]:
    found = {}
    for path in crds.glob("ray.io_*.yaml"):
        definition = yaml.load(path.read_text(), yaml.CSafeLoader)["spec"]
        [version] = [one for one in definition["versions"] if one["name"] == "v1" and one["served"]] or [None]
        if version is not None:  # RayCronJob does not have v1 yet
            closed = _closed(version["schema"]["openAPIV3Schema"])
            found[definition["names"]["kind"]] = jsonschema.Draft4Validator(closed)
    return found


def _closed(schema: Any) -> Any:
    """Make a CRD's schema reject unknown fields, as the API server's strict mode does, except in metadata."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    named = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if named and schema["properties"] and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed
