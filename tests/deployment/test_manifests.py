"""The Kubernetes manifests: valid, restricted, and about the service that there is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from fastapi import FastAPI

import serve.torchserve.supervisor
from serve import __version__
from serve.cli import serve as serving
from serve.cli.flags import values_of
from serve.cli.main import COMMANDS
from serve.gateway.app import create_app
from serve.gateway.options import GatewayOptions
from serve.gateway.rollout import read_rollout_file
from serve.torchserve import TorchServeOptions
from serve.torchserve.process import DRAIN_S
from tests.deployment.conftest import (
    OVERLAYS,
    ROOT,
    Object,
    assert_restricted,
    containers,
    environment,
    main_container,
    of_kind,
    options_of,
    pod_spec,
    render,
)

# The schemas' version; the newest that the library has would do as well.
KUBERNETES = "1.34"
# Kinds that are not Kubernetes' own: the library has no schema of them.
FOREIGN = ("InferenceService", "ServiceMonitor", "PrometheusRule")
# What TorchServe's guard adds to the time that it was given.
GUARD_S = 10.0

Rendered = dict[str, list[Object]]
every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


@every_overlay
def test_objects_follow_the_schema_of_kubernetes(rendered: Rendered, overlay: str) -> None:
    checked = [one for one in rendered[overlay] if one["kind"] not in FOREIGN]
    for one in checked:
        kubernetes_validate.validate(one, KUBERNETES, strict=True)
    assert checked


def test_the_schema_check_finds_a_wrong_field() -> None:
    wrong = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}, "spec": {"portz": []}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


@every_overlay
def test_pods_follow_the_schema_of_kubernetes(rendered: Rendered, overlay: str) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": pod_spec(rendered[overlay])}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.mark.parametrize("component", sorted(path.name for path in (ROOT / "k8s" / "components").iterdir()))
def test_every_component_goes_with_the_base(component: str, tmp_path: Any) -> None:
    # kustomize takes relative paths only.
    up = "../" * len(tmp_path.parts[1:])
    where = str(ROOT / "k8s").lstrip("/")
    (tmp_path / "kustomization.yaml").write_text(
        f"resources: [{up}{where}/base]\ncomponents: [{up}{where}/components/{component}]\n"
    )
    for one in render(tmp_path):
        if one["kind"] not in FOREIGN:
            kubernetes_validate.validate(one, KUBERNETES, strict=True)


def test_shares_of_a_rollout_are_mounted_where_the_gateway_reads_them_and_can_be_edited(
    tmp_path: Path,
) -> None:
    up, where = "../" * len(tmp_path.parts[1:]), str(ROOT / "k8s").lstrip("/")
    (tmp_path / "kustomization.yaml").write_text(
        f"resources: [{up}{where}/overlays/cpu]\ncomponents: [{up}{where}/components/rollout]\n"
    )
    objects = render(tmp_path)
    container = main_container(objects)
    file = options_of(environment(objects, container)).rollout_file
    assert file is not None
    (mount,) = [each for each in container["volumeMounts"] if each["name"] == "rollout"]
    assert mount["mountPath"] == str(file.parent) and "subPath" not in mount  # which would never change
    (volume,) = [each for each in pod_spec(objects)["volumes"] if each["name"] == "rollout"]
    (shares,) = [each for each in of_kind(objects, "ConfigMap") if file.name in each["data"]]
    assert volume["configMap"]["name"] == shares["metadata"]["name"] == "mmdet3d-serve-rollout"
    assert shares["metadata"]["namespace"] == "mmdet3d-serve"
    text = shares["data"][file.name]
    for line in (text, text.replace("#canary", "canary").replace("#shadow", "shadow")):
        (tmp_path / "shares").write_text(line)
        found = read_rollout_file(tmp_path / "shares")
    assert found == ({"second": {"2.0": 0.05}}, {"second": {"2.0": 0.1}})


# The restricted Pod Security Standard


@every_overlay
def test_pods_are_restricted(rendered: Rendered, overlay: str) -> None:
    (namespace,) = of_kind(rendered[overlay], "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert_restricted(pod_spec(rendered[overlay]))


@every_overlay
def test_only_folders_that_are_meant_for_it_can_be_written(rendered: Rendered, overlay: str) -> None:
    mounts = {mount["mountPath"]: mount for mount in main_container(rendered[overlay])["volumeMounts"]}
    assert not mounts.pop("/tmp").get("readOnly")
    assert all(mount["readOnly"] for mount in mounts.values())
    volumes = pod_spec(rendered[overlay])["volumes"]
    assert all("sizeLimit" in volume["emptyDir"] for volume in volumes if "emptyDir" in volume)


@every_overlay
def test_images_carry_the_version_and_never_latest(rendered: Rendered, overlay: str) -> None:
    assert {one["image"] for one in containers(rendered[overlay])} == {f"mmdet3d-serve:{__version__}"}


@every_overlay
def test_resources_are_asked_for_and_bounded(rendered: Rendered, overlay: str) -> None:
    resources = main_container(rendered[overlay])["resources"]
    for name in ("cpu", "memory", "ephemeral-storage"):
        assert resources["requests"][name] and resources["limits"][name]
    assert ("nvidia.com/gpu" in resources["limits"]) == (overlay == "gpu")


# What the manifests name exists


@every_overlay
def test_every_variable_is_a_setting_with_a_possible_value(rendered: Rendered, overlay: str) -> None:
    objects = rendered[overlay]
    options_of(environment(objects, main_container(objects)))


@every_overlay
def test_variables_of_services_do_not_reach_the_settings(rendered: Rendered, overlay: str) -> None:
    assert pod_spec(rendered[overlay])["enableServiceLinks"] is False


@every_overlay
def test_the_image_is_started_with_options_that_it_has(rendered: Rendered, overlay: str) -> None:
    container = main_container(rendered[overlay])
    assert "command" not in container  # the image's own: python -m serve serve --container
    args = serving._parser().parse_args(container["args"])
    # TorchServe's own predictions would go past every limit of the gateway.
    assert values_of(args, TorchServeOptions)["inference_host"] == "127.0.0.1"


def test_models_are_fetched_by_a_command_that_there_is(rendered: Rendered) -> None:
    (fetch,) = pod_spec(rendered["gpu"])["initContainers"]
    assert fetch["command"][:3] == ["python", "-m", "serve"] and fetch["command"][3] in COMMANDS
    said = subprocess.run(
        [sys.executable, *fetch["command"][1:], "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    ).stdout
    for word in fetch["args"]:
        assert not word.startswith("--") or f"{word} " in said
    maps = {one["metadata"]["name"]: one["data"] for one in of_kind(rendered["gpu"], "ConfigMap")}
    (source,) = [maps[one["configMapRef"]["name"]] for one in fetch["envFrom"] if "configMapRef" in one]
    assert source["MODEL_STORE_URI"].startswith("s3://") and "$(MODEL_STORE_URI)" in fetch["args"]
    target = fetch["args"][fetch["args"].index("--to") + 1]
    (mount,) = [each for each in fetch["volumeMounts"] if each["mountPath"] == target]
    (theirs,) = [
        each
        for each in main_container(rendered["gpu"])["volumeMounts"]
        if each["mountPath"] == target and each["name"] == mount["name"]
    ]
    assert theirs["readOnly"]


def routes() -> set[str]:
    application: Any = create_app(GatewayOptions())
    while not isinstance(application, FastAPI):
        application = application._app
    return set(application.openapi()["paths"])


@every_overlay
def test_probes_ask_paths_that_the_gateway_has_on_its_port(rendered: Rendered, overlay: str) -> None:
    container = main_container(rendered[overlay])
    named = {port["name"]: port["containerPort"] for port in container["ports"]}
    for name, word in (("startupProbe", "live"), ("livenessProbe", "live"), ("readinessProbe", "ready")):
        ask = container[name]["httpGet"]
        assert ask["path"] in routes() and ask["path"].endswith(word)
        assert named.get(ask["port"], ask["port"]) == GatewayOptions().port


@every_overlay
def test_loading_fits_into_the_startup_probe(rendered: Rendered, overlay: str) -> None:
    probe = main_container(rendered[overlay])["startupProbe"]
    loading = TorchServeOptions(ROOT).startup_timeout_s + serve.torchserve.supervisor._GATEWAY_START_S
    assert probe["periodSeconds"] * probe["failureThreshold"] > loading
    if overlay != "kserve":
        (deployment,) = of_kind(rendered[overlay], "Deployment")
        assert (
            deployment["spec"]["progressDeadlineSeconds"] > probe["periodSeconds"] * probe["failureThreshold"]
        )


@pytest.mark.parametrize("overlay", ["cpu", "gpu"])
def test_ports_are_those_of_the_code_and_lead_to_the_pod(rendered: Rendered, overlay: str) -> None:
    objects = rendered[overlay]
    (deployment,) = of_kind(objects, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    named = {port["name"]: port["containerPort"] for port in main_container(objects)["ports"]}
    assert named == {"http": GatewayOptions().port, "ts-metrics": TorchServeOptions(ROOT).metrics_port}
    for service in of_kind(objects, "Service"):
        assert service["spec"]["selector"].items() <= labels.items()
        for port in service["spec"]["ports"]:
            assert named[port["targetPort"]] == port["port"]
    for monitor in of_kind(objects, "ServiceMonitor"):
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        (service,) = [
            one for one in of_kind(objects, "Service") if wanted <= one["metadata"].get("labels", {}).items()
        ]
        has = {port["name"] for port in service["spec"]["ports"]}
        assert {one["port"] for one in monitor["spec"]["endpoints"]} <= has
    for kind in ("PodDisruptionBudget", "Deployment"):
        (one,) = of_kind(objects, kind)
        assert one["spec"]["selector"]["matchLabels"].items() <= labels.items()
    for spread in pod_spec(objects)["topologySpreadConstraints"]:
        assert spread["labelSelector"]["matchLabels"].items() <= labels.items()


@pytest.mark.parametrize("overlay", ["cpu", "gpu"])
def test_only_the_gateway_can_be_reached(rendered: Rendered, overlay: str) -> None:
    objects = rendered[overlay]
    (deployment,) = of_kind(objects, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    entrances = []
    for policy in of_kind(objects, "NetworkPolicy"):
        assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
        for rule in policy["spec"].get("ingress", []):
            entrances += [(port["port"], "from" in rule) for port in rule["ports"]]
    assert sorted(entrances) == [("http", False), ("ts-metrics", True)]
    (first, *_) = of_kind(objects, "NetworkPolicy")
    assert set(first["spec"]["policyTypes"]) == {"Ingress", "Egress"}
    (service,) = [one for one in of_kind(objects, "Service") if one["spec"].get("clusterIP") != "None"]
    assert [port["targetPort"] for port in service["spec"]["ports"]] == ["http"]


# Ending without losing a request


@every_overlay
def test_what_ending_takes_fits_into_the_grace_period(rendered: Rendered, overlay: str) -> None:
    objects = rendered[overlay]
    options = options_of(environment(objects, main_container(objects)))
    ending_s = (
        options.shutdown_delay_s
        + options.graceful_timeout_s
        + serve.torchserve.supervisor._EXIT_S
        + DRAIN_S
        + GUARD_S
    )
    assert ending_s < pod_spec(objects)["terminationGracePeriodSeconds"]


@every_overlay
def test_no_request_may_last_longer_than_the_drain(rendered: Rendered, overlay: str) -> None:
    objects = rendered[overlay]
    options = options_of(environment(objects, main_container(objects)))
    assert options.max_timeout_s <= options.graceful_timeout_s
    # Endpoints need to forget the pod before it stops listening: longer than a readiness probe takes to say so.
    assert options.shutdown_delay_s >= 5


@pytest.mark.parametrize("overlay", ["cpu", "gpu"])
def test_a_rolling_update_keeps_every_replica(rendered: Rendered, overlay: str) -> None:
    (deployment,) = of_kind(rendered[overlay], "Deployment")
    assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}


@pytest.mark.parametrize("overlay", ["cpu", "gpu"])
def test_the_autoscaler_owns_the_number_of_replicas(rendered: Rendered, overlay: str) -> None:
    (deployment,) = of_kind(rendered[overlay], "Deployment")
    (autoscaler,) = of_kind(rendered[overlay], "HorizontalPodAutoscaler")
    assert "replicas" not in deployment["spec"]
    assert autoscaler["spec"]["scaleTargetRef"] == {
        "apiVersion": deployment["apiVersion"], "kind": "Deployment", "name": deployment["metadata"]["name"],
    }  # fmt: skip
    (budget,) = of_kind(rendered[overlay], "PodDisruptionBudget")
    assert autoscaler["spec"]["minReplicas"] > budget["spec"]["maxUnavailable"]
