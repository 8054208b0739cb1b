"""FAULTS 23: what the environment and the configuration hold of secrets stands in nothing that a run writes, says or starts."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from longskip.engine.configio import dump_yaml, load_config, validate
from longskip.engine.data.remote import open_remote
from longskip.engine.data.sources import open_source
from longskip.engine.data.transport import Transport
from longskip.engine.secrets import hidden, holds_secret
from longskip.errors import ConfigError, LongskipError
from tests.ranks import small_config

NAMES = (
    "HF_TOKEN",
    "WANDB_API_KEY",
    "AWS_SECRET_ACCESS_KEY",
    "DB_PASSWORD",
    "MY_SECRET",
    "GITHUBTOKEN",
    "SSH_PASSPHRASE",
)


def found_in(folder: Path, wanted: list[str]) -> list[str]:
    """Files whose bytes, or names, hold one of the secrets."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    named = [str(path) for path in folder.rglob("*") if any(one in path.name for one in wanted)]
    return named + [str(path) for path in files if any(one.encode() in path.read_bytes() for one in wanted)]


class Watch:
    """The command lines of a process's descendants, looked at until it ends."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.lines: set[str] = set()
        self._process = psutil.Process(process.pid)
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while True:
            try:
                each = [self._process, *self._process.children(recursive=True)]
                if self._process.status() == psutil.STATUS_ZOMBIE:
                    return
            except psutil.NoSuchProcess:
                return
            for process in each:
                try:
                    self.lines.add("\0".join(process.cmdline()))
                except psutil.Error:
                    continue
            time.sleep(0.02)

    def end(self) -> set[str]:
        self._thread.join(timeout=30)
        return self.lines


def run(arguments: list[str], folder: Path, environment: dict[str, str]) -> tuple[int, str, set[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "longskip.launcher", *arguments],
        cwd=folder, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    watch = Watch(process)
    output, _ = process.communicate(timeout=400)
    return process.returncode, output, watch.end()


@pytest.mark.slow
@pytest.mark.parametrize("command", [["train"], ["launch", "--local", "2", "--", "train"]], ids=["train", "launch"])
def test_a_run_and_its_report_hold_no_secret(command: list[str], tmp_path: Path, shapes: Path) -> None:
    """A training that saves, draws, evaluates and logs to TensorBoard; its report; and one that fails."""
    environment = {name: secrets.token_hex(16) for name in NAMES}
    wanted = list(environment.values())
    config = small_config(
        shapes,
        train={"steps": 4, "name": "r"},
        checkpoint={"every": 2},
        logging={"every": 1, "samples_every": 4, "tensorboard": True, "sample_steps": 2},
        eval={"every": 4, "samples": 8},
    )
    (tmp_path / "c.yaml").write_text(dump_yaml(config))
    code, output, lines = run([*command, "c.yaml"], tmp_path, environment)
    assert code == 0, output
    assert (tmp_path / "runs" / "r" / "checkpoints" / "step-00000004").is_dir()
    assert lines and any("train" in line for line in lines)
    code, said, _ = run(["report", "runs/r", "--out", "runs/r/report.html"], tmp_path, environment)
    assert code == 0, said
    code, wrong, more = run([*command, "c.yaml", "train.name=q", "data.path=nowhere"], tmp_path, environment)
    assert code != 0 and "nowhere" in wrong
    for text in (output, said, wrong, *lines, *more):
        assert not any(secret in text for secret in wanted)
    assert found_in(tmp_path, wanted) == []
    assert json.loads((tmp_path / "runs" / "r" / "environment.json").read_text())["packages"]["torch"]


PASSWORD = "hunter2hunter2"
URLS = [
    f"https://user:{PASSWORD}@host.example/data",
    f"https://:{PASSWORD}@host.example/data",
    f"s3://bucket/data?X-Amz-Algorithm=AWS4&X-Amz-Signature={PASSWORD}&X-Amz-Date=1",
    f"https://account.blob.core.windows.net/data?sv=2020&sig={PASSWORD}",
    f"https://host.example/data?access_token={PASSWORD}",
]
KEYS = [
    "data.path",
    "data.validation",
    "data.cache",
    "train.init_from",
    "encoders.vae.path",
    "deepspeed.config",
    "eval.clip",
]


@pytest.mark.parametrize("url", URLS)
def test_a_url_with_a_password_is_refused_and_not_shown(url: str, tmp_path: Path) -> None:
    """The configuration is written into the run, which a resume needs: so it takes none, at any of its keys."""
    (tmp_path / "c.yaml").write_text("data: {shuffle: window, remote: fsspec}\n")
    for key in KEYS:
        with pytest.raises(ConfigError, match="password or a signature") as caught:
            load_config(tmp_path / "c.yaml", [f"{key}={url}"])
        assert PASSWORD not in str(caught.value) and key in str(caught.value)
    for text in (
        f"data: {{mix: [{{path: '{url}'}}], shuffle: window, remote: fsspec}}",
        f"data: {{path: ['{url}']}}",
        f"logging: {{every: '{url}'}}",
        f"logging: {{prompts: ['{url}']}}",
        f"data: '{url}'",
        f"{{data: {{'{url}': 1}}}}",
        f"data: {{captions: {{'{url}': 1}}}}",
        f"data: [{url}",
    ):
        (tmp_path / "d.yaml").write_text(text)
        with pytest.raises(ConfigError) as caught:
            load_config(tmp_path / "d.yaml")
        assert PASSWORD not in str(caught.value), text
    for override in (url, f"data.path {url}", f"data.path=[{url}"):
        with pytest.raises(ConfigError) as caught:
            load_config(tmp_path / "c.yaml", [override])
        assert PASSWORD not in str(caught.value), override


@pytest.mark.parametrize("url", URLS)
def test_what_reads_urls_does_not_show_them(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library itself takes such a URL, as its caller's; through curl's command line it does not go."""
    for act in (
        lambda: open_source(url),
        lambda: open_remote(url, transport="none"),
        lambda: open_remote(f"{url}::x", transport="fsspec"),
        lambda: Transport("webdataset", url),
    ):
        with pytest.raises(LongskipError) as caught:
            act()
        assert PASSWORD not in str(caught.value)
    if url.startswith("https"):
        with pytest.raises(ConfigError, match="command line"):
            Transport("webdataset", url)


def test_what_is_a_secret_in_a_url() -> None:
    for url in URLS:
        assert holds_secret(url) and PASSWORD not in hidden(f"cannot read '{url}', told {url}")
    for harmless in ("https://host/data?page=2", "data/keys?token", "webhdfs://me@host/x", "s3://bucket/a@b", "a cat"):
        assert not holds_secret(harmless)
    assert hidden("a cat?key=3") == "a cat?key=3"
    validate({"logging": {"prompts": ["a key? token=3"]}})
