"""Kubernetes manifests: an Indexed Job whose pods are the nodes, a headless Service for their names, the configuration.

No name or value is written into a text here: the manifests are plain values that a YAML writer quotes, and every ``$`` in
them is doubled, since Kubernetes itself would replace ``$(NAME)`` (no torch).
"""

from __future__ import annotations

import hashlib
import posixpath
import re
from dataclasses import replace
from typing import Any

import yaml

from longskip.engine.config import Config
from longskip.engine.configio import dump_yaml
from longskip.errors import EXIT_SAVED, EXIT_USAGE, ConfigError
from longskip.launcher.rendering import MODULE, Rendered, Request, supervise_words, told_by

MANIFEST = "job.yaml"
MOUNTED = "/etc/longskip"
_MOST_CONFIG = 512 * 1024  # a ConfigMap holds 1 MiB


class _Plain(yaml.SafeDumper):
    """YAML without anchors: what stands twice is written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def render_kubernetes(config: Config, request: Request) -> Rendered:
    """The manifests in one file, and the command that applies it. Raises ConfigError for what a pod cannot do without."""
    cluster = request.cluster
    text = yaml.dump_all(manifests(config, request), Dumper=_Plain, sort_keys=False, allow_unicode=True, width=120)
    return Rendered(
        files={MANIFEST: text},
        command=("kubectl", "apply", "-f", f"{request.kept}/{MANIFEST}"),
        notes=(
            f"{cluster.world} rank(s) in {cluster.nodes} pod(s), {cluster.ranks_per_node} each",
            f"kubectl -n {config.launch.kubernetes.namespace} logs -f job/{name_of(request.run)}",
            "the configuration goes along as a ConfigMap; nothing of this machine's environment or files does",
            "a job of this name must be deleted before it is applied again: kubectl delete -f",
        ),
    )


def manifests(config: Config, request: Request) -> list[dict[str, Any]]:
    """ConfigMap, Service and Job as plain values."""
    group, name = config.launch.kubernetes, name_of(request.run)
    folder = _check(config, request)
    run = request.run.rpartition("/")[2]
    labels = {"app.kubernetes.io/name": "longskip", "app.kubernetes.io/instance": name}
    about = {"name": name, "namespace": group.namespace, "labels": labels}
    store = f"{name}-0.{name}:{config.launch.port}"
    # The file is resolved here; the run keeps the name that it has on this machine.
    told = replace(request, train=(f"{MOUNTED}/config.yaml", f"train.name={run}"))
    words = [group.python, "-m", MODULE, *supervise_words(told, node="auto", store=store)]
    resources: dict[str, Any] = {}
    if group.gpu:
        resources[group.gpu] = request.cluster.ranks_per_node
    resources |= {key: value for key, value in (("cpu", group.cpus), ("memory", group.memory)) if value is not None}
    container: dict[str, Any] = {
        "name": "longskip",
        "image": group.image,
        "command": [_literal(word) for word in words],
        "workingDir": folder,
        "env": [{"name": k, "value": _literal(v)} for k, v in sorted(config.launch.environment.items())],
        "resources": {"requests": resources, "limits": dict(resources)} if resources else {},
        "ports": [{"name": "store", "containerPort": config.launch.port}],
        "securityContext": {"allowPrivilegeEscalation": False},
        "volumeMounts": [
            {"name": "config", "mountPath": MOUNTED, "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},
            *({"name": f"claim-{i}", "mountPath": path} for i, path in enumerate(group.volumes.values())),
        ],
    }
    if group.env_from:
        container["envFrom"] = [{"secretRef": {"name": group.env_from}}]
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "subdomain": name,
        "terminationGracePeriodSeconds": group.grace_seconds,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "containers": [container],
        "volumes": [
            {"name": "config", "configMap": {"name": name}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{group.shm_gib}Gi"}},
            *(
                {"name": f"claim-{i}", "persistentVolumeClaim": {"claimName": claim}}
                for i, claim in enumerate(group.volumes)
            ),
        ],
    }
    if group.node_selector:
        pod["nodeSelector"] = dict(group.node_selector)
    if group.pull_from:
        pod["imagePullSecrets"] = [{"name": group.pull_from}]
    job = {
        "completionMode": "Indexed",
        "completions": request.cluster.nodes,
        "parallelism": request.cluster.nodes,
        "backoffLimit": group.retries
        * request.cluster.nodes,  # a lost node ends the supervisors of all others, each with 1
        "podFailurePolicy": {"rules": _rules()},
        "template": {"metadata": {"labels": labels}, "spec": pod},
    }
    service: dict[str, Any] = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": labels}
    service["ports"] = [{"name": "store", "port": config.launch.port}]
    return [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": about, "data": {"config.yaml": dump_yaml(config)}},
        {"apiVersion": "v1", "kind": "Service", "metadata": about, "spec": service},
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": about, "spec": job},
    ]


def name_of(run: str) -> str:
    """A DNS label for the run that begins with a letter, 52 characters at most; runs of different names have different ones."""
    run = run.rpartition("/")[2]
    plain = re.sub(r"[^a-z0-9]+", "-", run.lower()).lstrip("-0123456789")[:44].strip("-")
    if plain == run:
        return plain
    return f"{plain or 'run'}-{hashlib.sha256(run.encode()).hexdigest()[:7]}"


def _rules() -> list[dict[str, Any]]:
    """A pod that was put down with its node is made again, one that saved as well; a wrong configuration ends the job. Any
    other end counts against the job's retries."""
    return [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {
            "action": "Ignore",
            "onExitCodes": {"containerName": "longskip", "operator": "In", "values": [EXIT_SAVED]},
        },
        {
            "action": "FailJob",
            "onExitCodes": {"containerName": "longskip", "operator": "In", "values": [EXIT_USAGE]},
        },
    ]


def _literal(text: str) -> str:
    """``text`` as Kubernetes must be told it, which replaces ``$(NAME)`` and reads ``$$`` as one."""
    return text.replace("$", "$$")


def _check(config: Config, request: Request) -> str:
    """The folder to work in; raises ConfigError for what is missing or would be lost or told."""
    group = config.launch.kubernetes
    if group.image is None:
        raise ConfigError("launch.kubernetes.image is not set", cure="an image in which longskip is installed")
    if not group.volumes or group.folder is None:
        raise ConfigError(
            "launch.kubernetes.volumes and folder are not both set: checkpoints would be lost with their pod",
            cure="volumes: {my-claim: /data}, folder: /data",
        )
    mounts = [posixpath.normpath(path) for path in group.volumes.values()]
    folder = posixpath.normpath(group.folder)
    if not any(folder == mount or folder.startswith(f"{mount.rstrip('/')}/") for mount in mounts):
        raise ConfigError(
            f"launch.kubernetes.folder {folder} is on none of the volumes ({', '.join(mounts)}): checkpoints would be lost",
            cure=f"for instance {mounts[0]}",
        )
    if len({*mounts, MOUNTED, "/dev/shm"}) != len(mounts) + 2:
        raise ConfigError(
            f"launch.kubernetes.volumes: {', '.join(mounts)} are not all different, or ours", cure="change them"
        )
    if keys := told_by(config):
        raise ConfigError(
            f"{', '.join(keys)}: a URL with a name or password would be written into a ConfigMap",
            cure="put the secret into a Secret: launch.kubernetes.env_from",
        )
    if len(dump_yaml(config).encode()) > _MOST_CONFIG:
        raise ConfigError(f"the configuration has more than {_MOST_CONFIG:,} bytes", cure="fewer logging.prompts")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", request.run.rpartition("/")[2]):
        raise ConfigError(f"run {request.run!r} has no plain name", cure="train.name=NAME")
    return group.folder
