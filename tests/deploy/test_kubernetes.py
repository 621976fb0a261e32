"""The manifests against Kubernetes' own schemas, and against what they promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

FOLDER = Path(__file__).resolve().parents[2] / "deploy/kubernetes"
MANIFESTS = {
    path.name: yaml.safe_load(path.read_text())
    for path in sorted(FOLDER.glob("*.yaml"))
    if path.name != "kustomization.yaml"
}
# The oldest release with the sleep of preStop on by default, and the newest that is known here.
VERSIONS = ("1.30", kubernetes_validate.latest_version())


def find(kind: str) -> Any:
    return next(m for m in MANIFESTS.values() if m["kind"] == kind)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_fits_its_schema(name: str, version: str) -> None:
    kubernetes_validate.validate(MANIFESTS[name], version, strict=True)


def test_the_schemas_refuse_a_misspelt_key() -> None:
    broken = yaml.safe_load((FOLDER / "deployment.yaml").read_text())
    broken["spec"]["replica"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, VERSIONS[0], strict=True)


def test_kustomize_takes_all_of_them() -> None:
    listed = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["resources"]
    assert sorted(listed) == sorted(MANIFESTS)


def test_selectors_find_the_pods() -> None:
    pods = find("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert find("Deployment")["spec"]["selector"]["matchLabels"] == pods
    assert find("Service")["spec"]["selector"] == pods
    assert find("PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == pods
    assert find("NetworkPolicy")["spec"]["podSelector"]["matchLabels"] == pods
    target = find("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert target["name"] == find("Deployment")["metadata"]["name"]
    assert (
        find("Deployment")["spec"]["template"]["spec"]["serviceAccountName"]
        == (find("ServiceAccount")["metadata"]["name"])
    )


def test_ports_are_those_of_the_image() -> None:
    container = find("Deployment")["spec"]["template"]["spec"]["containers"][0]
    names = {port["name"]: port["containerPort"] for port in container["ports"]}
    recipe = (FOLDER.parent / "container/Containerfile").read_text()
    assert f"EXPOSE {names['http']}" in recipe
    assert find("Service")["spec"]["ports"][0]["targetPort"] in names
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] in names


def test_the_pod_has_no_more_rights_than_it_needs() -> None:
    pod = find("Deployment")["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    recipe = (FOLDER.parent / "container/Containerfile").read_text()
    user, group = pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsGroup"]
    assert f"USER {user}:{group}" in recipe
    # An autoscaler and a fixed number of replicas would fight.
    assert "replicas" not in find("Deployment")["spec"]
