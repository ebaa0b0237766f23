"""The manifest of a bulk run on KubeRay: valid, restricted, and about the command and the image that there are."""

from __future__ import annotations

import re
import shlex

import kubernetes_validate
import pytest

from serve import __version__
from serve.cli import bulk
from tests.deployment.conftest import ROOT, Object, assert_restricted, environment, of_kind, render
from tests.deployment.test_manifests import KUBERNETES


@pytest.fixture(scope="module")
def objects() -> list[Object]:
    return render(ROOT / "k8s" / "bulk")


@pytest.fixture(scope="module")
def job(objects: list[Object]) -> Object:
    (found,) = of_kind(objects, "RayJob")
    return dict(found["spec"])


@pytest.fixture(scope="module")
def templates(job: Object) -> list[Object]:
    """The head's pod and the workers'."""
    cluster = job["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [dict(group["template"]) for group in groups]


def test_objects_and_pods_follow_the_schema_of_kubernetes(
    objects: list[Object], templates: list[Object]
) -> None:
    for one in objects:
        if one["kind"] != "RayJob":
            kubernetes_validate.validate(one, KUBERNETES, strict=True)
    for template in templates:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": template["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_pods_are_restricted_and_bounded(objects: list[Object], templates: list[Object]) -> None:
    for template in templates:
        assert_restricted(template["spec"])
        assert template["spec"]["enableServiceLinks"] is False
        (container,) = template["spec"]["containers"]
        for name in ("cpu", "memory", "ephemeral-storage"):
            assert container["resources"]["requests"][name] and container["resources"]["limits"][name]


def test_the_job_runs_a_command_that_there_is_on_ray(
    objects: list[Object], job: Object, templates: list[Object]
) -> None:
    command, failed, status = job["entrypoint"].partition("||")
    program, name, *words = shlex.split(command)
    assert (program, name) == ("mmdet3d-serve", "bulk") and failed
    assert status.split() == ["[", "$?", "-eq", "1", "]"]  # docs/bulk.md: some frames failed
    known = environment(objects, templates[0]["spec"]["containers"][0])
    named = [word[1:] for word in words if word.startswith("$")]
    assert len(named) == 3 and all(known[each].startswith("s3://") for each in named)
    args = bulk._parser().parse_args([known[word[1:]] if word.startswith("$") else word for word in words])
    assert args.engine == "ray" and args.model.endswith(".mar")


def test_every_pod_has_the_image_with_the_locked_ray(job: Object, templates: list[Object]) -> None:
    images = {container["image"] for each in templates for container in each["spec"]["containers"]}
    assert images == {f"mmdet3d-serve-ray:{__version__}"}
    (locked,) = re.findall(r"^ray==(\S+)", (ROOT / "requirements" / "ray.lock").read_text(), re.MULTILINE)
    assert job["rayClusterSpec"]["rayVersion"] == locked
    assert "requirements/ray.lock" in (ROOT / "pyproject.toml").read_text()


def test_ray_listens_to_its_own_pods_alone(
    objects: list[Object], job: Object, templates: list[Object]
) -> None:
    (policy,) = of_kind(objects, "NetworkPolicy")
    labels = policy["spec"]["podSelector"]["matchLabels"].items()
    assert all(labels <= template["metadata"]["labels"].items() for template in templates)
    own, operator = policy["spec"]["ingress"]
    assert own == {"from": [{"podSelector": policy["spec"]["podSelector"]}]}
    assert operator["ports"] == [{"port": 8265}] and "namespaceSelector" in operator["from"][0]
    assert job["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_ray_reports_to_nobody(objects: list[Object], templates: list[Object]) -> None:
    for template in templates:
        (container,) = template["spec"]["containers"]
        assert environment(objects, container)["RAY_USAGE_STATS_ENABLED"] == "0"
