"""What a configuration says of clusters: ``launch.slurm``, ``launch.kubernetes``, and the variables of nodes (no torch)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from longskip.engine.fields import Count, Group, Positive, _whole

# Variables that ranks on every node may get: settings of libraries. What names a program or a library to load is none: a
# configuration runs nothing.
PASSED_ON = (
    "CUBLAS_", "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_LAUNCH_BLOCKING", "DS_ACCELERATOR", "FI_", "GLOO_", "HF_DATASETS_OFFLINE",
    "HF_HUB_OFFLINE", "KMP_", "LONGSKIP_", "MKL_", "NCCL_", "OMP_", "PYTORCH_", "TOKENIZERS_PARALLELISM", "TORCHINDUCTOR_",
    "TORCH_", "TRANSFORMERS_OFFLINE", "TRITON_", "UCX_",
)  # fmt: skip
# What a cluster's administrators name: no blank, quote, leading dash or other sign that a scheduler or shell would read.
SiteName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.,:@+-]*$", max_length=255)]
Memory = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,9}[KMGT]?$")]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=255)]
DnsLabel = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", max_length=63)]
QualifiedName = Annotated[
    str, Field(pattern=r"^([a-z0-9.-]+/)?[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?$", max_length=253)
]
AbsolutePath = Annotated[str, Field(pattern=r"^/[^\x00-\x1f\x7f:]*$", max_length=4096)]
Port = Annotated[int, BeforeValidator(_whole), Field(ge=1024, le=65534)]


# Options that the script sets itself, or that run or read something.
_OURS = {
    "account", "array", "bb", "bbf", "chdir", "container", "cpus-per-task", "export", "export-file", "get-user-env",
    "gpus-per-node", "job-name", "mem", "nodes", "no-requeue", "ntasks", "ntasks-per-node", "open-mode", "output",
    "partition", "qos", "requeue", "signal", "time", "wrap",
}  # fmt: skip


class SlurmGroup(Group):
    """What ``longskip launch --on slurm`` asks Slurm for. ``gpus``: by ``--gpus-per-node``, by ``--gres`` (older sites), or
    ``none`` for ranks on CPUs. ``cpus`` and ``memory`` (``200G``) are of a node. ``signal_seconds`` before the time limit
    the ranks save; with ``requeue`` the job then stands in the queue again and goes on. ``extra``: more ``#SBATCH``
    options (``--exclusive``, ``--constraint=a100``).
    """

    partition: SiteName | None = None
    account: SiteName | None = None
    qos: SiteName | None = None
    time: Annotated[str, Field(pattern=r"^([0-9]{1,4}-)?[0-9]{1,6}(:[0-9]{1,2}){0,2}$")] | None = None
    gpus: Literal["per-node", "gres", "none"] = "per-node"
    gpu_type: SiteName | None = None
    cpus: Positive | None = None
    memory: Memory | None = None
    signal_seconds: Annotated[int, BeforeValidator(_whole), Field(ge=10, le=65535)] = 120
    requeue: bool = True
    extra: tuple[Annotated[str, Field(pattern=r"^--[a-z][a-z0-9-]*(=[A-Za-z0-9_.,:@+%/*&|()\[\]-]+)?$")], ...] = ()

    @field_validator("extra")
    @classmethod
    def _not_ours(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for option in value:
            name = option[2:].partition("=")[0]
            if any(ours.startswith(name) for ours in _OURS):  # Slurm takes the beginning of an option for the whole
                raise ValueError(f"{option} is set by longskip, or runs something; leave it out")
        return value

    @field_validator("time", mode="before")
    @classmethod
    def _not_a_number(cls, value: Any) -> Any:
        if isinstance(value, int):
            raise ValueError('YAML reads a time without quotes as a number; write it in quotes, as "12:00:00"')
        return value


class KubernetesGroup(Group):
    """What ``longskip launch --on kubernetes`` renders: a Job whose pods are the nodes, and a headless Service.

    ``volumes``: persistent volume claim → folder where it is mounted; ``folder``, under one of them, is where ``runs/`` and
    relative data paths stand. ``gpu`` is the resource that a pod has as many of as ranks, none for ranks on CPUs.
    ``env_from``: a Secret of yours whose keys become environment variables, ``pull_from``: one that opens the image's
    registry. ``cpus``, ``memory`` (``200Gi``) of a pod. ``retries``: of each pod that fails, but for a wrong configuration.
    """

    image: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:@-]*$", max_length=512)] | None = None
    namespace: DnsLabel = "default"
    volumes: dict[DnsLabel, AbsolutePath] = Field(default_factory=dict)
    folder: AbsolutePath | None = None
    python: Annotated[str, Field(pattern=r"^[A-Za-z0-9_./+-]+$")] = "python3"
    gpu: QualifiedName | None = "nvidia.com/gpu"
    cpus: Positive | None = None
    memory: Annotated[str, Field(pattern=r"^[1-9][0-9]{0,9}([KMGT]i?)?$")] | None = None
    shm_gib: Positive = 16
    node_selector: dict[QualifiedName, Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{0,63}$")]] = Field(
        default_factory=dict
    )
    env_from: DnsLabel | None = None
    pull_from: DnsLabel | None = None
    grace_seconds: Positive = 120
    retries: Count = 3
