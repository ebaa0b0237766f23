"""What the files that deploy the service say, and what the code says about the same things."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve.gateway.options import GatewayOptions
from serve.settings import PREFIX

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
OVERLAYS = ("cpu", "gpu", "kserve")

Object = dict[str, Any]


def render(folder: Path) -> list[Object]:
    """What `kubectl kustomize` makes of a folder; kubectl is the pinned one of this environment."""
    command = [str(BIN / "kubectl"), "kustomize", str(folder)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0 and not made.stderr, made.stderr
    return list(yaml.safe_load_all(made.stdout))


@pytest.fixture(scope="session")
def rendered() -> dict[str, list[Object]]:
    """The objects of each overlay."""
    return {name: render(ROOT / "k8s" / "overlays" / name) for name in OVERLAYS}


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [one for one in objects if one["kind"] == kind]


def pod_spec(objects: list[Object]) -> Object:
    """The pod that an overlay starts, of whichever kind."""
    for one in of_kind(objects, "Deployment"):
        return dict(one["spec"]["template"]["spec"])
    (service,) = of_kind(objects, "InferenceService")
    ours = ("minReplicas", "maxReplicas", "scaleMetric", "scaleTarget", "timeout")
    return {name: value for name, value in service["spec"]["predictor"].items() if name not in ours}


def containers(objects: list[Object]) -> Iterator[Object]:
    pod = pod_spec(objects)
    yield from pod.get("initContainers", [])
    yield from pod["containers"]


def main_container(objects: list[Object]) -> Object:
    (container,) = pod_spec(objects)["containers"]
    return dict(container)


def assert_restricted(pod: Object) -> None:
    """The restricted Pod Security Standard, and no folder that can be written but those that are meant for it."""
    assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    allowed = {"emptyDir", "configMap", "persistentVolumeClaim"}
    assert all(volume.keys() - {"name"} <= allowed for volume in pod["volumes"])
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert not any("hostPort" in port for port in container.get("ports", []))


def environment(objects: list[Object], container: Object) -> dict[str, str]:
    """All variables of a container, those from config maps too; what only a node knows is "1"."""
    maps = {one["metadata"]["name"]: one["data"] for one in of_kind(objects, "ConfigMap")}
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        if "configMapRef" in source:
            found |= maps[source["configMapRef"]["name"]]
    for variable in container.get("env", []):
        found[variable["name"]] = variable.get("value", "1")
    return found


def options_of(variables: Mapping[str, str]) -> GatewayOptions:
    """The gateway's options under these variables; raises where one is unknown or impossible."""
    assert all(name.startswith(PREFIX) for name in variables), variables
    return GatewayOptions.build({}, variables)
