"""What counts as a secret's name: known names of services, and names of ours that only look like it."""

from __future__ import annotations

import pytest

from longskip.engine.config import Config, leaves
from longskip.engine.secrets import HIDDEN, holds_user, is_secret, redacted

SECRET = [
    "WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID",
    "GITHUBTOKEN", "PGPASSWORD", "MYSQL_PWD", "GOOGLE_APPLICATION_CREDENTIALS", "MLFLOW_TRACKING_PASSWORD", "MYAPIKEYS",
    "SLACK_WEBHOOK", "apiKey", "api-key", "hub_token", "db.password", "secretRef", "Authorization", "SECRET_TOKENS",
]  # fmt: skip
HARMLESS = [
    "PATH", "PWD", "HOME", "NCCL_DEBUG", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "n_tokens", "tokens", "monkey",
    "keyboard", "compass", "RANK", "CUDA_VISIBLE_DEVICES", "LONGSKIP_STORE", "SSH_AUTH_SOCK",
]  # fmt: skip


@pytest.mark.parametrize("name", SECRET)
def test_secret_names(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize("name", HARMLESS)
def test_names_that_only_look_like_it(name: str) -> None:
    assert not is_secret(name)


def test_no_setting_of_a_run_is_taken_for_a_secret() -> None:
    tree = Config().model_dump(mode="json")
    assert [path for path, _ in leaves(tree) if any(is_secret(part) for part in path.split("."))] == []
    assert redacted(tree) == tree


def test_redacted_at_every_depth_and_not_in_place() -> None:
    given = {"a": {"token": "t", "b": [{"password": "p", "c": 1}]}, "HF_TOKEN": "", "url": "s3://me:pw@host/x"}
    told = redacted(given)
    assert told == {
        "a": {"token": HIDDEN, "b": [{"password": HIDDEN, "c": 1}]},
        "HF_TOKEN": "",
        "url": f"s3://{HIDDEN}@host/x",
    }
    assert given["a"] == {"token": "t", "b": [{"password": "p", "c": 1}]}
    assert (
        holds_user("https://me:pw@host/x")
        and holds_user("s3://token@host/x")
        and not holds_user("https://host/x@2")
        and not holds_user("me@host")
    )
