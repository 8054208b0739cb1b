"""A cluster on this machine for tests: an sshd, and a Slurm, of their own in a folder, which leave nothing behind."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil


def free_port() -> int:
    """A port that is free on all addresses."""
    with socket.socket() as probe:
        probe.bind(("0.0.0.0", 0))
        return int(probe.getsockname()[1])


def missing(*programs: str) -> str:
    """Why a test is skipped; empty where all programs are installed."""
    absent = [program for program in programs if shutil.which(program) is None]
    return f"{', '.join(absent)} not installed" if absent else ""


def wait_for(what: Callable[[], bool], seconds: float, why: str) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        if time.monotonic() > deadline:
            raise TimeoutError(why)
        time.sleep(0.1)


@contextlib.contextmanager
def sshd(folder: Path, addresses: tuple[str, ...] = ("127.0.0.1", "127.0.0.2")) -> Iterator[Path]:
    """An sshd with keys of its own; yields the configuration for ``ssh -F`` that reaches it by these addresses alone."""
    folder.mkdir()
    privileges = Path("/run/sshd")
    made = not privileges.exists() and os.geteuid() == 0
    if made:
        privileges.mkdir(mode=0o755)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copy(folder / "user.pub", folder / "authorized")
    port, user = free_port(), pwd.getpwuid(os.getuid()).pw_name
    lines = [f"Port {port}", *(f"ListenAddress {a}" for a in addresses), f"HostKey {folder / 'host'}", "StrictModes no",
             f"AuthorizedKeysFile {folder / 'authorized'}", "UsePAM no", "PasswordAuthentication no",
             "PermitRootLogin prohibit-password", "PidFile none", "PrintMotd no", "PrintLastLog no"]  # fmt: skip
    (folder / "sshd_config").write_text("\n".join(lines) + "\n")
    key = " ".join((folder / "host.pub").read_text().split()[:2])
    (folder / "known").write_text("".join(f"[{a}]:{port} {key}\n" for a in addresses))
    lines = ["Host *", f"Port {port}", f"User {user}", f"IdentityFile {folder / 'user'}", "IdentitiesOnly yes",
             f"UserKnownHostsFile {folder / 'known'}", "GlobalKnownHostsFile /dev/null", "StrictHostKeyChecking yes",
             "LogLevel ERROR"]  # fmt: skip
    (folder / "ssh_config").write_text("\n".join(lines) + "\n")
    program = shutil.which("sshd") or "/usr/sbin/sshd"
    with open(folder / "log", "w") as log:
        process = subprocess.Popen([program, "-D", "-e", "-f", folder / "sshd_config"], stderr=log)
    try:
        for address in addresses:
            wait_for(lambda a=address: _answers(a, port), 20, (folder / "log").read_text())  # type: ignore[misc]
        yield folder / "ssh_config"
    finally:
        end(process.pid)
        process.wait()
        if made:
            privileges.rmdir()


def _answers(address: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=1):
        return True
    return False


def end(pid: int) -> None:
    """A process and all that it started."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        family = [*process.children(recursive=True), process]
        for each in family:
            with contextlib.suppress(psutil.Error):
                each.terminate()
        for each in psutil.wait_procs(family, timeout=5)[1]:
            each.kill()


@contextlib.contextmanager
def slurm(folder: Path, nodes: int) -> Iterator[dict[str, str]]:
    """A Slurm of ``nodes`` nodes on this machine with a munge of its own; yields the variables that its commands need.

    Plugins that need no privileges and no cgroups, so that it runs in a container as well.
    """
    for name in ("ctld", "munge", *(f"127.0.0.{i + 1}" for i in range(nodes))):
        (folder / name).mkdir(parents=True)
    (folder / "munge").chmod(0o711)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    user, host = pwd.getpwuid(os.getuid()).pw_name, socket.gethostname().partition(".")[0]
    lines = [
        "ClusterName=here", f"SlurmctldHost={host}(127.0.0.1)", f"SlurmUser={user}", f"SlurmdUser={user}",
        f"SlurmctldPort={free_port()}", f"StateSaveLocation={folder / 'ctld'}", f"SlurmdSpoolDir={folder}/%n",
        f"SlurmctldPidFile={folder}/ctld.pid", f"SlurmdPidFile={folder}/%n.pid", "AuthType=auth/munge",
        "CredType=cred/munge", f"AuthInfo=socket={folder}/munge/socket", "ProctrackType=proctrack/pgid",
        "TaskPlugin=task/none", "MpiDefault=none",
        "SwitchType=switch/none", "JobAcctGatherType=jobacct_gather/none", "AccountingStorageType=accounting_storage/none",
        "SelectType=select/cons_tres", "SelectTypeParameters=CR_Core", "ReturnToService=2", "SchedulerType=sched/builtin",
        "InactiveLimit=0", "KillWait=20", "SlurmctldDebug=info", "SlurmdDebug=info", "PropagateResourceLimits=NONE",
        "SlurmdParameters=config_overrides",
    ]  # fmt: skip
    lines += [
        f"NodeName=127.0.0.{i + 1} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=2 State=UNKNOWN"
        for i in range(nodes)
    ]
    lines.append("PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP")
    conf = folder / "slurm.conf"
    conf.write_text("\n".join(lines) + "\n")
    environment = {"SLURM_CONF": str(conf)}
    munge = folder / "munge"
    programs: list[list[str | Path]] = [
        ["munged", "--foreground", "--force", f"--socket={munge}/socket", f"--key-file={key}", f"--pid-file={munge}/pid",
         f"--log-file={munge}/log", f"--seed-file={munge}/seed", "--num-threads=2"],
        ["slurmctld", "-D", "-f", conf],
        *(["slurmd", "-D", "-N", f"127.0.0.{i + 1}", "-f", conf] for i in range(nodes)),
    ]  # fmt: skip
    running = []
    try:
        for program in programs:
            with open(folder / f"{program[0]}.log", "a") as log:
                running.append(
                    subprocess.Popen(
                        program, env=os.environ | environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                    )
                )
            if program[0] == "munged":
                wait_for((munge / "socket").exists, 20, (folder / "munged.log").read_text())

        def idle() -> bool:
            told = subprocess.run(
                ["sinfo", "-h", "-N", "-o", "%T"], env=os.environ | environment, capture_output=True, text=True
            )
            return told.stdout.split() == ["idle"] * nodes

        try:
            wait_for(idle, 60, "Slurm's nodes did not come up")
        except TimeoutError as error:
            logs = "".join(path.read_text(errors="replace")[-2000:] for path in folder.glob("*.log"))
            raise TimeoutError(f"{error}:\n{logs}") from None
        yield environment
    finally:
        for process in reversed(running):
            end(process.pid)
            process.wait()
        mark = f"SLURM_CONF={conf}".encode()
        for each in psutil.process_iter():  # steps are no children of slurmd's, but have its environment
            # A step's daemon writes its title over the first variables, which psutil takes for the end of them.
            with contextlib.suppress(psutil.Error, OSError):
                if mark in Path(f"/proc/{each.pid}/environ").read_bytes().split(b"\0"):
                    each.kill()
