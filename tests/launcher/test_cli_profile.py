"""``longskip profile`` as a user types it."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from longskip.engine.configio import load_config
from longskip.engine.costs import step_cost
from longskip.engine.profiled import subject_of
from longskip.errors import ConfigError, EncoderError
from longskip.launcher.cli import main
from longskip.models.presets import PRESETS
from longskip.profiling import efficiency
from longskip.profiling.encoder_costs import encoder_cost
from tests.figures import figure

CONFIGS = Path(__file__).parents[2] / "configs"
VAE = {
    "_class_name": "AutoencoderKL", "block_out_channels": [8, 8, 16, 16], "layers_per_block": 1,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
}  # fmt: skip
KINDS = ("forward", "backward", "recomputed", "repeated", "hardware", "elementwise")


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "160")


class Said:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def tree(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def longskip(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str | Path) -> Said:
        with pytest.raises(SystemExit) as ended:
            main([*map(str, arguments)])
        captured = capsys.readouterr()
        return Said(int(ended.value.code or 0), captured.out, captured.err)

    return run


def test_the_table_names_blocks_ops_and_what_they_come_to(longskip: Any) -> None:
    said = longskip("profile", "uvit-2.3b", "--gpu", "h200", "--batch", 4, "--checkpointing", 1)
    assert said.code == 0 and not said.err
    for text in (
        "blocks ×22", "skip blocks ×21", "attn.qkv", "adamw", "recomp.", "repeated", "total",
        "2,344,200,356, of which N_token", "334 = 1 time + 77 text + 256 image", "every token 97.5%",
        "19,236,718,116,864 per step = 3 x forward; 4,809,179,529,216 per image",
        "1.0237 all tokens, 1.3356 image tokens only", "H200: 990 TFLOP/s bf16", "MFU at most", "adamw",
    ):  # fmt: skip
        assert text in said.out, text
    plain = longskip("profile", "uvit-2.3b", "--depth", "block")
    assert "recomp." not in plain.out and "attn.qkv" not in plain.out and "padded" not in plain.out
    assert "roofline" not in plain.out
    assert "blocks.42" in longskip("profile", "uvit-2.3b", "--depth", "unit").out


@pytest.mark.parametrize("columns", [80, 100, 160])
def test_tables_fit_the_terminal(longskip: Any, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    padded = ("--kernels", "triton", "--precision", "fp32", "--gpu", "h200", "--checkpointing", "1")
    for arguments in (
        ("uvit-8b",),
        ("uvit-emoji", *padded),
        ("uvit-8b", "--depth", "unit"),
        ("--all", "--gpu", "h200"),
    ):
        said = longskip("profile", *arguments)
        table = said.out.split("───")[0] + said.out.split("─" * 20)[-1].split("parameters N")[0]
        assert "…" not in said.out and all(len(line) <= columns for line in table.splitlines()[1:])
    assert ("left out for want of width: " in longskip("profile", "uvit-emoji", *padded).out) == (columns == 80)


@pytest.mark.parametrize("depth", ["op", "unit"])
def test_json_sums_are_its_rows(longskip: Any, depth: str) -> None:
    tree = longskip("profile", "uvit-0.6b", "--json", "--checkpointing", 2, "--batch", 3, "--depth", depth).tree
    for kind in KINDS:
        assert sum(row[f"{kind}_flops"] for row in tree["rows"]) == tree["flops"][kind]
        assert all(type(row[f"{kind}_flops"]) is int for row in tree["rows"])
    assert sum(row["bytes"] for row in tree["rows"]) == tree["bytes"]
    assert tree["flops"]["model"] == 3 * tree["flops"]["forward"]
    assert round(tree["flops"]["forward"] / 2 / 3 / 1e9, 3) == 205.340  # GMACs of one image
    assert sum(tree["forward_by_tokens"].values()) == sum(tree["forward_by_parameters"].values())
    units = [unit for row in tree["rows"] if row["name"] == "mlp" for unit in row["units"]]
    assert sorted(units) == sorted(f"blocks.{index}" for index in range(43))
    assert {len(row["units"]) for row in tree["rows"]} == ({1} if depth == "unit" else {1, 10, 11})


def test_csv_reads_back_and_html_is_written(longskip: Any, tmp_path: Path) -> None:
    table, page = tmp_path / "new" / "rows.csv", tmp_path / "new" / "page.html"
    tree = longskip("profile", "uvit-s2-coco", "--json", "--csv", table, "--html", page, "--gpu", "a100-80gb").tree
    with open(table, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(tree["rows"])
    for row, expected in zip(rows, tree["rows"], strict=True):
        assert row["units"].split() == expected["units"] and row["name"] == expected["name"]
        for key, value in expected.items():
            if type(value) is int:
                assert int(row[key]) == value
    html = page.read_text("utf-8")
    assert "uvit-s2-coco" in html and "A100 SXM 80GB" in html
    said = longskip("profile", "uvit-s2-coco", "--html", page)
    assert f"written: {page}" in said.out


def test_all_presets(longskip: Any, tmp_path: Path) -> None:
    file = tmp_path / "all.csv"
    rows = longskip("profile", "--all", "--json", "--csv", file).tree
    assert [row["preset"] for row in rows] == list(PRESETS)
    assert {row["preset"]: row["parameters"] for row in rows}["uvit-8b"] == 7_971_360_932
    with open(file, newline="", encoding="utf-8") as text:
        assert [int(row["model_flops"]) for row in csv.DictReader(text)] == [row["model_flops"] for row in rows]
    out = longskip("profile", "--all").out
    assert "7,971,360,932" in out and "1.0160" in out and "2,705.127" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("uvit-8",), "did you mean 'uvit-8b'?"),
        (("uvit-8b", "--gpu", "h20"), "did you mean 'h200'?"),
        (("uvit-8b", "--batch", "0"), "batch 0 is outside"),
        (("uvit-8b", "--batch", "-5"), "batch -5 is outside"),
        (("uvit-8b", "--batch", "1000000000"), "batch 1000000000 is outside"),
        (("uvit-8b", "--resolution", "1000000000"), "resolution 1000000000 is outside"),
        (("uvit-8b", "--resolution", "-512"), "resolution -512 is outside"),
        (("uvit-8b", "--resolution", "500"), "take 496 or 512"),
        (("uvit-8b", "--resolution", "512x"), "no size"),
        (("uvit-8b", "--checkpointing", "66"), "outside 0..65"),
        (("uvit-8b", "--precision", "fp61"), "did you mean 'fp16'?"),
        (("uvit-8b", "--kernels", "torhc"), "did you mean 'torch'?"),
        (("uvit-8b", "--kernels", "triton", "--capability", "70"), "compute capability 70"),
        (("uvit-8b", "--depth", "ops"), "one of block, op, unit"),
        (("uvit-8b", "--all"), "no MODEL goes with it"),
        ((), "no MODEL or CONFIG"),
        (("--all", "--html", "x.html"), "--html is of one model"),
        (("missing.yaml",), "no configuration at"),
        (("uvit-8b", "--csv", "/dev/null/x.csv"), "cannot write"),
        (("uvit-8b", "--hardware", "missing.yaml", "--gpu", "h200"), "no hardware table"),
        (("uvit-8b", "--hardware", "missing.yaml"), "--hardware without --gpu"),
        (("uvit-8b", "--encoders", "what"), "--encoders 'what': a preset has no frozen encoders (uvit-8b)"),
        (("uvit-8b", "--encoders", "online"), "a preset has no frozen encoders"),
        (("--all", "--encoders", "stored"), "a preset has no frozen encoders"),
        (("uvit-8b", "--html", "/"), "cannot write"),
        (("uvit-8b", "--csv", "/"), "cannot write"),
    ],
)
def test_what_cannot_be_is_refused(longskip: Any, arguments: tuple[str, ...], message: str) -> None:
    said = longskip("profile", *arguments)
    assert said.code == 2 and message in said.err and not said.out


def test_what_a_device_cannot_predict_is_said_before_the_table(longskip: Any, tmp_path: Path) -> None:
    """A device without a rate for the precision, and with a damaged file of measured efficiencies."""
    table = tmp_path / "mine.yaml"
    table.write_text(
        "devices:\n  - {name: Mine, teraflops: {fp32: 1}, memory_gb: 8, bandwidth_gb_s: 100, source: test}\n"
    )
    page = tmp_path / "page.html"
    said = longskip("profile", "uvit-tiny", "--hardware", table, "--gpu", "mine", "--precision", "fp16", "--html", page)
    assert said.code == 2 and "'fp16' has no peak for Mine" in said.err and not said.out and not page.exists()
    assert longskip("profile", "uvit-tiny", "--hardware", table, "--gpu", "mine", "--precision", "fp32").code == 0
    saved = efficiency.cache_folder() / efficiency.file_name("H200", "bf16")
    saved.parent.mkdir(parents=True, exist_ok=True)
    saved.write_text('{"device": "H200", "entries": [{}]}')
    for more in ((), ("--html", page), ("--json",)):
        said = longskip("profile", "uvit-tiny", "--gpu", "h200", *more)
        assert said.code == 2 and "is damaged" in said.err and not said.out and not page.exists()


# --- configurations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["emoji", "golden", "shapes-two", "t2i-256", "uvit-8b"])
def test_a_configuration_costs_what_its_run_books(longskip: Any, name: str) -> None:
    """The engine's own count for one rank, which is held against dispatch counts, and its 6ND."""
    config = load_config(CONFIGS / f"{name}.yaml")
    tree = longskip("profile", CONFIGS / f"{name}.yaml", "--json").tree
    cost = step_cost(config, config.batch(1), tree["parameters"]["total"])
    assert (tree["model"], tree["preset"]) == (name, config.model.preset)
    assert tree["flops"]["model"] == cost.model_flops and tree["flops"]["hardware"] == cost.hardware_flops
    assert {a["name"]: a["flops"] for a in tree["accounts"]}["six_nd"] == cost.six_nd
    assert tree["batch"] == config.train.batch_size and tree["precision"] == config.train.dtype
    assert tree["checkpointing"] == config.engine.checkpointing and tree["pixels"] == list(config.resolution)


def written(folder: Path, **groups: Any) -> Path:
    tree = {
        "model": {"preset": "uvit-s2-coco"},
        "encoders": {"vae": {"kind": "vae"}, "text": {"kind": "clip", "width": 768}},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree | groups))
    return path


def test_sizes_of_a_configuration_and_what_goes_before_them(longskip: Any, tmp_path: Path) -> None:
    path = written(
        tmp_path, train={"micro_batch": 4, "batch_size": 64, "dtype": "bf16"}, engine={"checkpointing": "all"},
        kernels={"backend": {"attention": "require:triton", "mlp": "torch"}}, diffusion={"prediction": "x"},
        optim={"clip": 0.0},
    )  # fmt: skip
    tree = longskip("profile", path, "--json").tree
    assert (tree["batch"], tree["precision"], tree["checkpointing"]) == (4, "bf16", 1)
    assert tree["kernels"] == {"attention": "triton", "mlp": "torch"}
    rows = {row["name"]: row for row in tree["rows"]}
    assert rows["adamw"]["elementwise_flops"] == tree["parameters"]["total"] * (15 + 3)  # no clipping
    eight = written(tmp_path, train={"micro_batch": 4, "accumulation": 2, "batch_size": 64})  # for 8 ranks alone
    assert longskip("profile", eight, "--json").tree["batch"] == 4
    # Per value 3 forward and 2 backward, per sample 5 each; a velocity's is 4 and 3, and 2 (kernels/formulas.py).
    values = 4 * 32 * 32
    assert rows["loss"]["elementwise_flops"] == 4 * (5 * values + 10)
    for groups, expected in (({}, 7 * values + 4), ({"diffusion": {"objective": "ddpm"}}, 5 * values + 10)):
        plain = longskip("profile", written(tmp_path, train={"micro_batch": 4}, **groups), "--json").tree
        (loss,) = (row for row in plain["rows"] if row["name"] == "loss")
        assert loss["elementwise_flops"] == 4 * expected
    given = longskip(
        "profile", path, "--json", "--batch", 2, "--precision", "fp32", "--checkpointing", 0, "--resolution", "128x192",
        "--kernels", "torch", "--text-tokens", 9,
    ).tree  # fmt: skip
    assert (given["batch"], given["precision"], given["checkpointing"]) == (2, "fp32", 0)
    assert given["pixels"] == [128, 192] and given["latents"] == [4, 16, 24] and given["tokens"]["text"] == 9
    assert given["kernels"] == {"all": "torch"} and given["flops"]["recomputed"] == 0


def test_frozen_encoders_run_or_are_stored(longskip: Any, tmp_path: Path) -> None:
    vae = tmp_path / "vae"
    vae.mkdir()
    (vae / "config.json").write_text(json.dumps(VAE))
    (vae / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    data = tmp_path / "data"
    data.mkdir()
    encoders = {"vae": {"kind": "vae", "path": str(vae)}, "text": {"kind": "clip", "width": 768}}
    path = written(tmp_path, encoders=encoders, data={"path": str(data)}, train={"micro_batch": 2})
    online = encoder_cost(VAE, pixels=(256, 256), batch=2).flops

    def executed(*arguments: str) -> int:
        tree = longskip("profile", path, "--json", *arguments).tree
        return sum(row["hardware_flops"] for row in tree["rows"] if row["part"] == "encoders")

    (data / "index.json").write_text(json.dumps({"encoders": {"text": {"kind": "clip"}}}))
    assert executed() == executed("--encoders", "auto") == online
    (data / "index.json").write_text(json.dumps({"encoders": {"text": {}, "vae": {}}}))
    assert executed() == executed("--encoders", "stored") == 0
    (data / "index.json").unlink()
    with pytest.raises(EncoderError, match=r"encoders\.text\.path is not set"):
        subject_of(load_config(path), "run")
    with pytest.raises(EncoderError, match=r"encoders\.text\.path is not set"):
        subject_of(load_config(path), "run", "online")
    away = subject_of(load_config(written(tmp_path, encoders=encoders)), "run")
    assert not away.encoders and any("count as stored" in note for note in away.notes)
    with pytest.raises(ConfigError, match="one of auto, online, stored"):
        subject_of(load_config(path), "run", "onlin")


# --- speed ------------------------------------------------------------------------------------------------------------


def test_without_torch_and_at_once(tmp_path: Path) -> None:
    """``make figures`` prints the processor time of the command; what is asserted is far above it."""
    runs: list[list[list[str]]] = [
        [["uvit-8b"]],
        [
            ["uvit-8b", "--json", "--resolution", "1024", "--gpu", "h200", "--checkpointing", "1"],
            ["uvit-8b", "--gpu", "h200", "--html", str(tmp_path / "page.html")],
            [str(CONFIGS / "uvit-8b.yaml"), "--csv", str(tmp_path / "rows.csv")],
            ["--all"],
        ],
    ]
    for commands in runs:
        code = (
            "import sys, time\n"
            "from longskip.launcher.cli import main\n"
            f"for arguments in {commands!r}:\n"
            "    try:\n"
            "        main(['profile', *arguments])\n"
            "    except SystemExit as ended:\n"
            "        assert not ended.code\n"
            "assert 'torch' not in sys.modules\n"
            "print(time.process_time(), file=sys.stderr)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if len(commands) == 1:
            took = float(done.stderr.split()[-1])
            figure(f"longskip profile uvit-8b: {took:.2f} s of processor time as a command")
            assert took < 5
