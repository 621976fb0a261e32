"""The manifests against Kubernetes' own schemas, and against what they promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from pipelines.address import STORE_VARIABLE
from serving.keys import HOSTS_VARIABLE, read_hosts

FOLDER = Path(__file__).resolve().parents[2] / "deploy/kubernetes"
MANIFESTS = {
    path.name: yaml.safe_load(path.read_text())
    for path in sorted(FOLDER.glob("*.yaml"))
    if path.name != "kustomization.yaml"
}
# Not applied unless wanted.
EXAMPLES = {
    f"examples/{path.name}": yaml.safe_load(path.read_text())
    for path in sorted((FOLDER / "examples").glob("*.yaml"))
}
# The oldest release with the sleep of preStop on by default, and the newest that is known here.
VERSIONS = ("1.30", kubernetes_validate.latest_version())


def find(kind: str) -> Any:
    return next(m for m in MANIFESTS.values() if m["kind"] == kind)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", [*MANIFESTS, *EXAMPLES])
def test_a_manifest_fits_its_schema(name: str, version: str) -> None:
    kubernetes_validate.validate((MANIFESTS | EXAMPLES)[name], version, strict=True)


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


def test_no_pod_collects_events_for_itself() -> None:
    recipe = (FOLDER.parent / "container/Containerfile").read_text()
    assert f"ENV {STORE_VARIABLE}=sqlite:" in recipe
    container = find("Deployment")["spec"]["template"]["spec"]["containers"][0]
    # What is in env would count before the Secret, which may not be there at first.
    assert STORE_VARIABLE not in [variable["name"] for variable in container["env"]]
    config, secret = container["envFrom"]
    assert config == {"configMapRef": {"name": find("ConfigMap")["metadata"]["name"]}}
    assert secret == {"secretRef": {"name": "forecart", "optional": True}}
    assert find("ConfigMap")["data"] == {STORE_VARIABLE: ""}


def test_the_service_is_called_by_the_names_that_the_cluster_gives_it() -> None:
    container = find("Deployment")["spec"]["template"]["spec"]["containers"][0]
    variables = {variable["name"]: variable for variable in container["env"]}
    # One is put into another only where it stands before.
    assert list(variables).index("NAMESPACE") < list(variables).index("FORECART_HOSTS")
    field = variables["NAMESPACE"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert field == "metadata.namespace"
    name = find("Service")["metadata"]["name"]
    hosts = variables["FORECART_HOSTS"]["value"].replace("$(NAMESPACE)", "shop").split(",")
    assert hosts == [name, *(f"{name}.shop{zone}" for zone in ("", ".svc", ".svc.cluster.local"))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(HOSTS_VARIABLE, ",".join(hosts))
        assert read_hosts() >= set(hosts)


def list_openings(policy: dict[str, Any]) -> set[tuple[str, int]]:
    """Return whom the pods may ask on which port: names of pods, or addresses."""
    found = set()
    for rule in policy["spec"]["egress"]:
        for peer in rule["to"]:
            if "ipBlock" in peer:
                names = ["address"]
            else:
                selector = peer["podSelector"]
                names = list(selector.get("matchLabels", {}).values())
                for expression in selector.get("matchExpressions", []):
                    assert expression["operator"] == "In"
                    assert expression["key"] == "app.kubernetes.io/name"
                    names += expression["values"]
            found |= {(name, port["port"]) for name in names for port in rule["ports"]}
    return found


def test_each_database_is_let_through_on_its_own_port_alone() -> None:
    assert list_openings(find("NetworkPolicy")) == {
        ("kube-dns", 53),
        ("postgres", 5432),
        ("postgresql", 5432),
        ("mariadb", 3306),
        ("mysql", 3306),
    }


def test_the_examples_open_the_way_to_what_is_elsewhere() -> None:
    pods = find("NetworkPolicy")["spec"]["podSelector"]
    for policy in EXAMPLES.values():
        assert policy["kind"] == "NetworkPolicy"
        # They open the way out, and leave the way in as it is.
        assert policy["spec"]["policyTypes"] == ["Egress"]
        assert policy["spec"]["podSelector"] == pods
    names = [m["metadata"]["name"] for m in (find("NetworkPolicy"), *EXAMPLES.values())]
    assert len(set(names)) == len(names)
    database = list_openings(EXAMPLES["examples/database.yaml"])
    assert database == {("address", 5432), ("address", 3306)}
    collector = list_openings(EXAMPLES["examples/collector.yaml"])
    assert collector == {("opentelemetry-collector", 4318)}
    guide = (FOLDER.parent / "README.md").read_text()
    assert all(f"deploy/kubernetes/{name}" in guide for name in EXAMPLES)
