"""The manifests: against Kubernetes's own schemas, through kubectl's own types, and what a container would be started with."""

from __future__ import annotations

import copy
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from longskip.engine.configio import validate
from longskip.errors import ConfigError
from longskip.launcher.kubernetes import manifests, name_of
from longskip.launcher.rendering import Request, render
from tests.launcher.machines import missing
from tests.launcher.requests import NASTY, asked, configured

GROUP: dict[str, Any] = {
    "image": "registry.example:5000/me/longskip@sha256:0123", "namespace": "training", "folder": "/data/me",
    "volumes": {"my-claim": "/data", "models": "/models"}, "cpus": 32, "memory": "200Gi", "env_from": "keys",
    "pull_from": "registry", "node_selector": {"nvidia.com/gpu.product": "H200"},
}  # fmt: skip


def wanted(**changes: Any) -> Request:
    return asked("kubernetes", "none", **changes)


def made(request: Request | None = None, **group: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """ConfigMap, Service and Job as kubectl would read them from the file."""
    config = configured(kubernetes=GROUP | group, environment={"NCCL_DEBUG": "$(HOME) $$ %"})
    text = render(config, request or wanted()).files["job.yaml"]
    assert "&id" not in text
    found = list(yaml.safe_load_all(text))
    assert found == manifests(config, request or wanted())
    return found[0], found[1], found[2]


def test_the_job() -> None:
    config_map, service, job = made()
    assert {each["metadata"]["name"] for each in (config_map, service, job)} == {"run"}
    assert {each["metadata"]["namespace"] for each in (config_map, service, job)} == {"training"}
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    (container,) = pod["containers"]
    assert container["command"] == [
        "python3", "-m", "longskip.launcher", "supervise", "--nodes", "2", "--node", "auto", "--ranks", "2", "--store",
        "run-0.run:29400", "--preflight", "--", "train", "/etc/longskip/config.yaml", "train.name=run",
    ]  # fmt: skip
    # The pods' names are JOB-INDEX under the service, which must be headless and answer before they are ready.
    assert pod["subdomain"] == service["metadata"]["name"] and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    labels = job["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 2, "cpu": 32, "memory": "200Gi"}
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {
        "/etc/longskip",
        "/dev/shm",
        "/data",
        "/models",
    }
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert container["workingDir"] == "/data/me" and container["envFrom"] == [{"secretRef": {"name": "keys"}}]
    restored = validate(yaml.safe_load(config_map["data"]["config.yaml"]))
    assert restored.train.batch_size == 64


def test_how_a_pods_end_is_taken() -> None:
    """0 done; 75 and a lost node: the pod again; 2 ends the job; anything else is tried a few times."""
    rules = made(retries=5)[2]["spec"]["podFailurePolicy"]["rules"]

    def action(code: int | None, disrupted: bool = False) -> str:
        for rule in rules:
            codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions")
            if (conditions and disrupted) or (codes and code in codes["values"]):
                return str(rule["action"])
        return "Count"

    assert [action(code) for code in (75, 1, 2, 137, 139)] == ["Ignore", "Count", "FailJob", "Count", "Count"]
    assert action(137, disrupted=True) == "Ignore"
    spec = made(retries=5)[2]["spec"]
    assert (
        spec["backoffLimit"] == 5 * 2 and spec["template"]["spec"]["restartPolicy"] == "Never"
    )  # which the policy needs


def expanded(text: str, variables: dict[str, str]) -> str:
    """What a container gets for ``text``: `$$` is `$`, `$(NAME)` the variable where there is one (Kubernetes API, Container)."""
    found = {"$$": "$"} | {f"$({name})": value for name, value in variables.items()}
    return re.sub(r"\$\$|\$\([^)]*\)", lambda match: found.get(match[0], match[0]), text)


def test_no_value_is_expanded() -> None:
    environment = made()[2]["spec"]["template"]["spec"]["containers"][0]["env"]
    assert [expanded(each["value"], {"HOME": "/root"}) for each in environment] == ["$(HOME) $$ %"]
    for i, value in enumerate(NASTY):
        if "\n" in value or "\t" in value or value.startswith("-"):
            continue
        group = {"volumes": {"my-claim": "/data"}, "folder": f"/data/{i}{value.replace(':', '')}"}
        container = made(**group)[2]["spec"]["template"]["spec"]["containers"][0]
        assert container["workingDir"] == group["folder"]


def test_the_secret_is_named_and_nothing_of_this_machine_goes_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "s3cret")
    text = json.dumps(made(wanted(environment={"OMP_NUM_THREADS": "77", "DS_ACCELERATOR": "cpu"})))
    assert "s3cret" not in text and "77" not in text and "DS_ACCELERATOR" not in text and "/env/bin" not in text
    data = {"path": "https://ghp-token@host/x", "shuffle": "window", "remote": "fsspec"}
    config = validate({"data": data, "launch": {"kubernetes": GROUP}, "train": {"batch_size": 64}})
    with pytest.raises(ConfigError, match=r"data\.path.*ConfigMap") as refused:
        render(config, wanted())
    assert "ghp-token" not in str(refused.value)


@pytest.mark.parametrize(
    ("group", "word"),
    [
        ({"image": None}, "image is not set"),
        ({"volumes": {}}, "volumes"),
        ({"folder": None}, "volumes"),
        ({"folder": "/elsewhere"}, "none of the volumes"),
        ({"folder": "/data/../etc"}, "none of the volumes"),
        ({"folder": "/database"}, "none of the volumes"),
        ({"volumes": {"a": "/data", "b": "/data/"}}, "not all different"),
        ({"volumes": {"a": "/data", "b": "/dev/shm"}}, "not all different"),
        ({"volumes": {"A": "/data"}}, "volumes"),
        ({"volumes": {"a": "data"}}, "volumes"),
        ({"volumes": {"a": "/da\nta"}}, "volumes"),
        ({"image": "-x"}, "image"),
        ({"image": "a b"}, "image"),
        ({"namespace": "A"}, "namespace"),
        ({"env_from": "a/b"}, "env_from"),
        ({"gpu": "a b"}, "gpu"),
        ({"memory": "1 Gi"}, "memory"),
        ({"node_selector": {"a b": "c"}}, "node_selector"),
        ({"python": "python3;x"}, "python"),
    ],
)
def test_what_is_refused(group: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        made(**group)


def test_names() -> None:
    names = [name_of(f"runs/{run}") for run in ("run", "Run", "run_1", "run-1", "7b", "é", "x" * 80, "a.b", "-a-")]
    assert names[0] == "run" and names[3] == "run-1" and len(set(names)) == len(names)
    for name in names:  # a Service's name: RFC 1035; a pod's host name adds an index
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) and len(f"{name}-4095") <= 63


def test_kubernetes_own_schemas() -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    for version in ("1.29", validator.latest_version()):
        for resource in made():
            validator.validate(resource, version, strict=True)
    wrong = copy.deepcopy(made()[2])
    wrong["spec"]["template"]["spec"]["containers"][0]["workingDirectory"] = "/data"
    with pytest.raises(validator.ValidationError):  # strict: a key that Kubernetes does not know
        validator.validate(wrong, validator.latest_version(), strict=True)


@pytest.mark.skipif(bool(missing("kubectl")), reason=missing("kubectl"))
def test_kubectl_reads_the_same_job(tmp_path: Path) -> None:
    """kubectl decodes the job into its own types, without a cluster, and writes it out with one variable more: a field that
    it does not know would be lost, a mistyped one refused."""
    ours = made()[2]
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(ours), "utf-8")
    command = ["kubectl", "set", "env", "--local", "-o", "json", "-f", "job.yaml", "SEEN=yes"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    got = json.loads(done.stdout)
    container = ours["spec"]["template"]["spec"]["containers"][0]
    container["env"].append({"name": "SEEN", "value": "yes"})
    for resources in container["resources"].values():  # quantities are texts to Kubernetes
        resources.update({name: str(value) for name, value in resources.items()})
    assert _without_defaults(got, ours) == ours


def _without_defaults(got: Any, ours: Any) -> Any:
    """``got`` without the empty fields that its types have and ours has not."""
    if isinstance(got, dict) and isinstance(ours, dict):
        kept = {key for key, value in got.items() if key in ours or value not in (None, {}, {"loadBalancer": {}})}
        return {key: _without_defaults(got[key], ours.get(key)) for key in kept}
    if isinstance(got, list) and isinstance(ours, list) and len(got) == len(ours):
        return [_without_defaults(a, b) for a, b in zip(got, ours, strict=True)]
    return got
