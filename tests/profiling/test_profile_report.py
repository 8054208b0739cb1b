"""Figures of a profile against closed forms and published ones; the page that shows them."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longskip.errors import ConfigError, SpecError
from longskip.kernels import jit
from longskip.models.presets import PRESETS
from longskip.models.specs import TextEncoderSpec
from longskip.profiling import hardware
from longskip.profiling.encoder_costs import encoder_cost
from longskip.profiling.profile_report import render_html, render_profile
from longskip.profiling.profile_text import figures, seconds, si
from longskip.profiling.profiles import Profile, all_presets, profile
from longskip.profiling.subjects import of_preset, resized, subjects
from longskip.profiling.treemap import Box, squarified
from longskip.profiling.units import exact

VAE = {
    "_class_name": "AutoencoderKL", "block_out_channels": [8, 8, 16, 16], "layers_per_block": 1,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
}  # fmt: skip
CLIP = {"model_type": "clip_text_model", "hidden_size": 768, "intermediate_size": 96, "num_hidden_layers": 2}


@pytest.fixture(autouse=True)
def _unmeasured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No efficiencies, and no devices, of this machine's user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


# --- figures ----------------------------------------------------------------------------------------------------------

# Exact parameters and forward GMACs at 256² (text-to-image: 77 tokens of width 1024).
SIZES = {
    "uvit-0.3b": (286_865_572, 100.149),
    "uvit-0.6b": (586_994_852, 205.340),
    "uvit-1.3b": (1_319_321_252, 454.579),
    "uvit-2.3b": (2_344_200_356, 801.530),
    "uvit-3.7b": (3_661_632_164, 1246.194),
    "uvit-8b": (7_971_360_932, 2705.127),
}
FLOPS = {
    "uvit-h2-imagenet256": (500_832_016, 266_393_438_208),
    "uvit-s2-coco": (44_692_644, 32_459_431_936),
    "uvit-s2-cifar10": (44_255_328, 24_401_616_896),
}
# Exact model FLOPs ÷ 6ND at 256², 512² and 1024², all tokens.
RATIOS = {"uvit-2.3b": (1.0237, 1.0805, 1.3077), "uvit-8b": (1.0160, 1.0541, 1.2065)}


def test_the_known_sizes() -> None:
    rows = {row["preset"]: row for row in all_presets(subjects())}
    assert list(rows) == list(PRESETS)
    for name, (params, gmacs) in SIZES.items():
        assert rows[name]["parameters"] == params
        assert round(rows[name]["forward_macs"] / 1e9, 3) == gmacs
        assert rows[name]["model_flops"] == 6 * rows[name]["forward_macs"]
    for name, (params, flops) in FLOPS.items():
        assert (rows[name]["parameters"], 2 * rows[name]["forward_macs"]) == (params, flops)


def test_the_known_ratios_to_6nd() -> None:
    for name, expected in RATIOS.items():
        for side, ratio in zip((256, 512, 1024), expected, strict=True):
            found = profile(resized(of_preset(name), resolution=(side, side)))
            assert round(found.ratio("six_nd"), 4) == ratio
    assert round(profile(of_preset("uvit-2.3b")).ratio("image_tokens"), 4) == 1.3356
    classes = profile(of_preset("uvit-h2-imagenet256"))
    assert (round(classes.ratio("six_nd"), 4), round(classes.ratio("image_tokens"), 4)) == (1.0308, 1.0389)


@pytest.mark.parametrize("name", ["uvit-0.3b", "uvit-s2-coco", "uvit-s2-cifar10", "uvit-h2-imagenet256", "uvit-emoji"])
@pytest.mark.parametrize("batch", [1, 3])
def test_at_another_size_the_model_is_built_for_it(name: str, batch: int) -> None:
    """Against the closed forms of "All are Worth Words", written out here once more, at (96, 160) pixels and 9 words."""
    subject = of_preset(name)
    words = 9 if subject.spec.n_txt else None
    found = profile(resized(subject, resolution=(96, 160), batch=batch, text_tokens=words))
    spec, factor = subject.spec, 8 if subject.spec.channels == 4 else 1
    h, p, c, e, text, classes = spec.width, spec.patch, spec.channels, spec.text_width, words or 0, spec.n_classes
    height, width = 96 // factor, 160 // factor
    blocks, skips, n = 2 * (spec.depth // 2) + 1, spec.depth // 2, height * width // p**2
    length = n + 1 + text + bool(classes)
    params = blocks * (12 * h * h + 10 * h) + skips * (2 * h * h + h) + (p * p * c * h + h) + length * h + 2 * h
    params += h * p * p * c + p * p * c + spec.conv * (9 * c * c + c) + bool(text) * (e * h + h) + classes * h
    macs = blocks * (12 * h * h * length + 2 * length**2 * h) + 2 * skips * h * h * length + n * p * p * c * h
    macs += text * e * h + length * h * p * p * c + spec.conv * 9 * c * c * height * width
    tree = found.to_json()
    assert tree["parameters"]["total"] == params
    assert tree["flops"]["forward"] == 2 * batch * macs
    assert tree["flops"]["model"] == 6 * batch * macs == batch * tree["flops"]["model_per_image"]
    assert tree["tokens_per_image"] == length and tree["tokens"]["image"] == n
    accounts = {a["name"]: a["flops"] for a in tree["accounts"]}
    assert accounts["six_nd"] == 6 * params * batch * length
    every_token = blocks * (12 * h * h + 10 * h) + skips * (2 * h * h + h) + 2 * h + h * p * p * c + p * p * c
    assert accounts["n_token"] == 6 * every_token * batch * length
    assert tree["latents"] == [c, height, width]


@pytest.mark.parametrize("depth", ["block", "op", "unit", "row"])
@pytest.mark.parametrize("name", ["uvit-2.3b", "uvit-h2-imagenet256", "uvit-tiny"])
def test_lines_add_up_to_the_whole(name: str, depth: str) -> None:
    found = profile(resized(of_preset(name), batch=2, checkpointing=3))
    lines, ledger = found.lines(depth), found.ledger
    sums = {
        kind: sum(getattr(line, kind) for line in lines)
        for kind in ("forward", "backward", "recomputed", "repeated", "hardware", "elementwise", "bytes")
    }
    assert sums == {
        "forward": ledger.forward_flops, "backward": ledger.backward_flops, "recomputed": ledger.recomputed_flops,
        "repeated": ledger.repeated_flops, "hardware": ledger.hardware_flops,
        "elementwise": ledger.elementwise_flops, "bytes": ledger.bytes,
    }  # fmt: skip
    assert all(getattr(found.total, kind) == value for kind, value in sums.items())


def test_blocks_and_their_units() -> None:
    found = profile(of_preset("uvit-2.3b"))
    assert {line.name: len(line.units) for line in found.lines("block")} == {
        "embed": 1, "blocks": 22, "skip blocks": 21, "head": 1, "loss": 1, "optimizer": 1,
    }  # fmt: skip
    assert next(line.name for line in found.lines("op") if line.block == "skip blocks") == "skip"
    units = found.lines("unit")
    assert [line.name for line in units[1:44]] == [f"blocks.{index}" for index in range(43)]
    # 2 h² more for the skip, of 12 h² + 2 L h a token
    h, length = 2048, 334
    assert units[43].forward - units[1].forward == 2 * length * 2 * h * h


def test_text_loss_optimizer_and_frozen_encoders_stand_apart() -> None:
    plain = of_preset("uvit-s2-coco")
    assert profile(plain).parameters == profile(replace(plain, encoders={"vae": VAE, "text": CLIP})).parameters
    alone, whole = profile(plain), profile(replace(plain, batch=2, encoders={"vae": VAE, "text": CLIP}))
    online = encoder_cost(VAE, pixels=(256, 256), batch=2).flops + encoder_cost(CLIP, tokens=77, batch=2).flops
    parts = {line.name: line for line in whole.lines("block")}
    assert parts["encoders"].hardware == parts["encoders"].forward == online
    assert whole.ledger.model_flops == 2 * alone.ledger.model_flops
    assert whole.ledger.hardware_flops == 2 * alone.ledger.hardware_flops + online
    assert parts["encoders"].intensity is None and "neither elementwise" in whole.notes[-1]
    assert parts["optimizer"].elementwise == alone.parameters * (15 + 1 + 3)
    assert parts["optimizer"].bytes == alone.parameters * (9 * 4 + 2)  # p, g, m, v; p, m, v; the average twice; bf16
    words = TextEncoderSpec(vocab_size=11, width=768, n_tokens=77, depth=1)
    trained = profile(replace(plain, text=words))
    assert trained.parameters - alone.parameters == words.param_counts().total
    assert trained.ledger.model_flops - alone.ledger.model_flops == words.flops().model_flops


def test_tiles_of_our_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter refuses bf16. 334 tokens of head dim 64 are 384 in whole tiles (see test_flop_ledger)."""
    subject = resized(of_preset("uvit-0.3b"), batch=8, precision="fp32", kernels="triton")
    once = 2 * 8 * 16 * 64 * (384**2 - 334**2)
    for device, capability in ((hardware.find("h200"), None), (None, 90)):
        found = profile(subject, device, capability)
        assert {line.name for line in found.lines("op") if line.padded} == {"attn"}
        assert found.total.padded == 21 * 7 * once == found.to_json()["flops"]["padded"]
    unknown = profile(subject, hardware.find("l40s"))
    assert unknown.to_json()["flops"]["padded"] is None and "not counted" in unknown.notes[0]
    assert profile(replace(subject, kernels={"all": "torch"}), hardware.find("h200")).total.padded == 0
    monkeypatch.setattr(jit, "INSTALLED", False)
    assert profile(subject, hardware.find("h200")).notes == ("padded tiles are not counted: triton is not installed",)


# --- the device -------------------------------------------------------------------------------------------------------


def test_the_bound_of_an_op_is_the_longest_of_its_three() -> None:
    h200 = hardware.find("h200")
    found = profile(resized(of_preset("uvit-0.3b"), batch=4), h200)
    assert found.bound_seconds == sum(bound.seconds for bound in found.bounds)
    rows, h = 4 * 334, 1024
    of = {(bound.block, bound.name, bound.phase): bound for bound in found.bounds}
    qkv = of["blocks", "attn.qkv", "forward"]
    assert qkv.flops == 11 * 2 * rows * h * 3 * h and qkv.bytes == 11 * 2 * (rows * 4 * h + 3 * h * h)
    assert qkv.seconds == pytest.approx(max(qkv.flops / 989.5e12, qkv.bytes / 4.8e12), rel=1e-12)
    assert qkv.binds == "compute"
    adamw = of["optimizer", "adamw", "forward"]
    assert adamw.binds == "memory" and adamw.seconds == pytest.approx(286_865_572 * 38 / 4.8e12, rel=1e-12)
    assert sum(bound.flops for bound in found.bounds) == found.ledger.hardware_flops
    assert sum(bound.elementwise for bound in found.bounds) == found.ledger.elementwise_flops
    assert sum(bound.bytes for bound in found.bounds) == found.ledger.bytes


@pytest.mark.parametrize("gpu", ["h200", "a100-40gb", "rtx4090"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_no_op_is_above_the_roof_and_no_prediction_below_the_bound(gpu: str, precision: str) -> None:
    device = hardware.find(gpu)
    found = profile(resized(of_preset("uvit-s2-coco"), batch=16, precision=precision, checkpointing=2), device)
    peak, ceiling = device.peak(precision) + device.peak("fp32"), found.mfu_ceiling
    for bound in found.bounds:
        assert bound.attainable <= min(peak, (bound.intensity or math.inf) * device.bandwidth) * (1 + 1e-9)
    predicted = found.prediction
    assert predicted is not None and predicted.seconds > found.bound_seconds
    low, high = found.to_json()["device"]["predicted_seconds_range"]
    (text,) = (text for name, text in figures(found) if name == "predicted step")
    assert found.bound_seconds < low < predicted.seconds < high
    assert f"({seconds(low)} to {seconds(high)})" in text
    assert ceiling is not None and predicted.mfu is not None and predicted.mfu < ceiling < 1
    assert {bound.phase for bound in found.bounds} == {"forward", "backward", "recomputed"}


def test_a_measured_device_has_no_mfu() -> None:
    device = replace(hardware.find("h200"), name="my box", measured=True)
    found = profile(of_preset("uvit-tiny"), device)
    assert found.mfu_ceiling is None and found.to_json()["device"]["mfu_ceiling"] is None
    text = dict(figures(found))["roofline bound"]
    assert "no MFU" in text and "at most" not in text
    assert "no MFU: rates were measured" in render_html(found)


# --- sizes that are none ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"batch": 0}, r"batch 0 is outside 1\.\.1,048,576"),
        ({"batch": 10**9}, "batch 1000000000 is outside"),
        ({"batch": -1}, "batch -1 is outside"),
        ({"resolution": (0, 256)}, r"resolution 0 is outside 1\.\.65,536 pixels"),
        ({"resolution": (256, 10**9)}, "resolution 1000000000 is outside"),
        ({"resolution": (256, -16)}, "resolution -16 is outside"),
        ({"resolution": (256, 250)}, r"(?s)a side of 250 pixels .* patches of 2 latents of 8 pixels.*take 240 or 256"),
        ({"resolution": (8, 16)}, "(?s)a side of 8 pixels.*take 16$"),
        ({"text_tokens": 0}, "text tokens 0 is outside"),
        ({"text_tokens": 10**9}, "text tokens 1000000000 is outside"),
        ({"checkpointing": -1}, r"checkpointing -1 is outside 0\.\.13"),
        ({"checkpointing": 14}, r"checkpointing 14 is outside 0\.\.13"),
        ({"precision": "bf6"}, "(?s)unknown precision 'bf6'.*did you mean 'bf16'"),
        ({"kernels": "tritn"}, "(?s)unknown backend 'tritn'.*did you mean 'triton'"),
    ],
)
def test_impossible_sizes_are_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resized(of_preset("uvit-s2-coco"), **sizes)


def test_other_refusals() -> None:
    with pytest.raises(SpecError, match=r"(?s)unknown preset 'uvit-8'.*did you mean 'uvit-8b'"):
        of_preset("uvit-8")
    with pytest.raises(ConfigError, match="takes no text"):
        resized(of_preset("uvit-s2-cifar10"), text_tokens=4)
    with pytest.raises(ConfigError, match="a side of 12 pixels does not divide into patches of 8"):
        resized(of_preset("uvit-tiny"), resolution=(8, 12))
    with pytest.raises(ConfigError, match="add --kernels triton"):
        profile(of_preset("uvit-tiny"), capability=90)


# --- the page ---------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The elements with their attributes, the visible text, scripts, and the texts of titles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.titles: list[str] = []
        self.text = ""
        self._inside = [""]
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style", "title"):
            self._inside.append(tag)
            {"script": self.scripts, "title": self.titles}.get(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == self._inside[-1]:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        into = {"script": self.scripts, "title": self.titles}.get(self._inside[-1])
        if into is not None:
            into[-1] += data
        elif self._inside[-1] != "style":
            self.text += " ".join(data.split()) + " " if data.strip() else ""


@pytest.fixture
def on_h200() -> Profile:
    return profile(resized(of_preset("uvit-2.3b"), batch=4, checkpointing=2), hardware.find("h200"))


def test_the_page_shows_the_figures(on_h200: Profile) -> None:
    page, ledger = Page(render_html(on_h200)), on_h200.ledger
    for text in (
        "uvit-2.3b", "2.34 B", exact(2_344_200_356), exact(ledger.model_flops // 4), "1.0237", "1.3356",
        exact(ledger.hardware_flops), exact(ledger.elementwise_flops), "skip blocks ×21", "attn.qkv", "H200",
        "990 TFLOP/s", "NVIDIA H200 Tensor Core GPU datasheet", seconds(on_h200.bound_seconds), "not a prediction",
        "6·N_token·D", "Kaplan 6ND", "Chinchilla, App. F", "256x256 pixels = 4x32x32 latents", "recomputed",
    ):  # fmt: skip
        assert text in page.text, text
    for line in on_h200.lines("row"):
        assert exact(line.forward) in page.text and exact(line.bytes) in page.text
    without = Page(render_html(profile(of_preset("uvit-tiny"))))
    assert "A roofline is a device’s" in without.text and "recomputed 0" not in without.text


def test_nothing_is_loaded_and_only_its_own_script_runs(on_h200: Profile) -> None:
    html = render_html(on_h200)
    page = Page(html)
    assert not re.search(r"https?:|//[a-z0-9]+\.|@import|\bfetch\(|XMLHttpRequest|\bimport\(|url\(", html)
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "img", "image", "form", "use", "foreignobject")
        assert not {"src", "srcset", "action", "background", "xlink:href"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
        if (target := attributes.get("href")) is not None:
            assert tag == "a" and target[1:] in {a.get("id") for _, a in page.elements}
    (script,) = page.scripts
    (policy,) = (a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy is not None and "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy


def test_a_hostile_name_is_text_wherever_it_stands(on_h200: Profile, hostile: str) -> None:
    device = replace(hardware.find("h200"), name=hostile, source=hostile)
    subject = replace(on_h200.subject, name=hostile, preset=hostile, notes=(hostile,))
    page = Page(render_html(profile(subject, device)))
    assert len(page.scripts) == 1 and not any("onerror" in attributes for _, attributes in page.elements)
    assert page.text.count("<script>alert(") >= 4 and not any(tag == "img" for tag, _ in page.elements)


def test_areas_of_the_treemap_are_shares(on_h200: Profile) -> None:
    """A cell's area, of those in its block, is its share to the gap of a pixel between the cells."""
    html = render_html(on_h200)
    for name, measure in (("hardware", "hardware"), ("bytes", "bytes")):
        tree = html.split(f'<div class="tree of-{name}">')[1].split("</div>")[0]
        cells = re.findall(
            r'<svg x="[\d.]+%" y="[\d.]+" width="([\d.]+)%" height="([\d.]+)"><g[^>]*><title>(.*?) ×21 · (\S+): ', tree
        )
        areas = {op: float(width) * float(height) for width, height, block, op in cells if block == "skip blocks"}
        lines = {line.name: getattr(line, measure) for line in on_h200.lines("op") if line.block == "skip blocks"}
        assert areas.keys() == {op for op, value in lines.items() if value}
        for op, area in areas.items():
            assert area / sum(areas.values()) == pytest.approx(lines[op] / sum(lines.values()), rel=0.04)


def test_every_op_is_a_point_of_the_roofline(on_h200: Profile) -> None:
    page = Page(render_html(on_h200))
    points = [a for tag, a in page.elements if tag == "circle"]
    assert len(points) == len([bound for bound in on_h200.bounds if bound.bytes])
    assert all(0 <= float(str(a[at])[:-1]) <= 100 for a in points for at in ("cx", "cy"))
    largest = max(on_h200.bounds, key=lambda bound: bound.flops)
    title = next(t for t in page.titles if t.startswith(f"{largest.block} · {largest.name}, {largest.phase}"))
    assert f"contractions: {exact(largest.flops)} FLOPs" in title and "bound by: compute" in title


def test_written_as_a_whole_or_refused(tmp_path: Path, on_h200: Profile) -> None:
    path = render_profile(on_h200, tmp_path / "new" / "page.html")
    assert path.read_text("utf-8") == render_html(on_h200) and list(path.parent.iterdir()) == [path]
    with pytest.raises(ConfigError, match="cannot write"):
        render_profile(on_h200, tmp_path / "new" / "page.html" / "below.html")
    for folder in ("/", tmp_path):
        with pytest.raises(ConfigError, match="it is a folder"):
            render_profile(on_h200, folder)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.one_of(st.just(0), st.integers(1, 10**15)), max_size=25),
    width=st.floats(1, 2000),
    height=st.floats(1, 2000),
)
def test_a_treemap_fills_its_box(values: list[int], width: float, height: float) -> None:
    box = Box(3.0, 5.0, width, height)
    found, whole = squarified(values, box), sum(values)
    assert len(found) == len(values)
    for value, part in zip(values, found, strict=True):
        assert part.area == pytest.approx(value / whole * box.area if whole else 0.0, rel=1e-6, abs=1e-6 * box.area)
        assert box.x - 1e-6 <= part.x and part.x + part.width <= box.x + width * (1 + 1e-6) + 1e-6
        assert box.y - 1e-6 <= part.y and part.y + part.height <= box.y + height * (1 + 1e-6) + 1e-6
    for a, b in itertools.combinations([part for part in found if part.area], 2):
        across = min(a.x + a.width, b.x + b.width) - max(a.x, b.x)
        down = min(a.y + a.height, b.y + b.height) - max(a.y, b.y)
        assert min(across, down) <= 1e-6 * max(width, height)


def test_treemaps_are_near_to_squares() -> None:
    """The example of Bruls, Huizing and van Wijk (2000): 6, 6, 4, 3, 2, 2, 1 in 6 × 4."""
    found = squarified([6, 6, 4, 3, 2, 2, 1], Box(0, 0, 6, 4))
    assert [round(max(b.width / b.height, b.height / b.width), 4) for b in found[:2]] == [1.5, 1.5]
    assert (found[0].width, found[0].height, found[1].y) == (3.0, 2.0, 2.0)
    assert max(max(b.width / b.height, b.height / b.width) for b in found) < 3
    with pytest.raises(ValueError, match="negative"):
        squarified([1, -1], Box(0, 0, 1, 1))


def test_words() -> None:
    texts = [
        (0, "0"),
        (999, "999"),
        (1000, "1.00 k"),
        (999_500, "1.00 M"),
        (5_410_253_586_432, "5.41 T"),
        (0.5, "0.50"),
    ]
    assert [si(value) for value, _ in texts] == [text for _, text in texts]
    assert si(4.8e12, "B/s") == "4.80 TB/s" and si(-2500) == "-2.50 k"
    assert [seconds(t) for t in (2.125, 0.0413, 4.7e-5)] == ["2.12 s", "41.3 ms", "47 µs"]
    assert exact(2**60 + 1) == "1,152,921,504,606,846,977"
    assert json.loads(json.dumps(profile(of_preset("uvit-8b")).to_json()))["flops"]["model"] == 16_230_760_759_296


def test_each_treemap_names_the_colours_that_stand_in_it_and_no_others() -> None:
    page = render_html(profile(of_preset("uvit-0.3b")))
    trees = re.findall(r'<div class="tree of-(\w+)">(.*?)</div>', page, re.S)
    keys = {}
    for name, body in trees:
        drawn, _, key = body.partition('<p class="colours">')
        assert set(re.findall(r'class="cell run-(\d)"', drawn)) == set(re.findall(r'class="block run-(\d)"', key))
        keys[name] = set(re.findall(r"</i>(\w+)</span>", key))
    assert "adamw" in keys["elementwise"] and keys["hardware"] == {"attn", "mlp", "skip"}
