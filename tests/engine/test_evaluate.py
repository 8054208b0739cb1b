"""``evaluate`` with all its scores on a saved run: what the result says, that it is right, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch

from longskip.engine.clip import Clip
from longskip.engine.data.sources import open_source
from longskip.engine.data.tokens import Vocabulary
from longskip.engine.distributed import World
from longskip.engine.drawing import Drawing
from longskip.engine.evaluate import evaluate
from longskip.engine.feature_network import FeatureNetwork
from longskip.engine.fidelity import gather
from longskip.engine.opening import open_data
from longskip.engine.sample import draw_prompts, load_run
from longskip.engine.scoring import captions_drawn, prompts_of
from longskip.engine.texts import WordTexts
from longskip.engine.validation import Validation
from longskip.errors import ConfigError, DataError, EncoderError
from longskip.launcher.tables import print_evaluation, score_lines
from tests.engine.stored_features import write_features
from tests.feature_networks import scripted, tiny_inception
from tests.saved_runs import saved_run
from tests.tiny_encoders import tiny_clip


def written(run: Path) -> dict[str, bytes]:
    """The evaluations of a run by their files' names."""
    return {file.name: file.read_bytes() for file in (run / "eval").glob("*.json")}


def a_run(shapes: Path, run: Path, **groups: Any) -> Path:
    source = open_source(shapes / "train")
    words = [text for i in range(len(source)) for text, _ in source.captions(i)]
    data = {"path": str(shapes / "train"), "validation": str(shapes / "validation")}
    tree: dict[str, Any] = {"data": data, "eval": {"samples": 8, "time_bins": 2, "sample_steps": 2, "guidance": 2.0}}
    return saved_run(run, captions=words, **(tree | groups))


@pytest.fixture(scope="module")
def home(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``run``, a feature network ``net.pt``, its statistics ``stats.npz`` and a CLIP ``clip``."""
    home = tmp_path_factory.mktemp("home")
    a_run(shapes, home / "run")
    scripted(tiny_inception(), home / "net.pt")
    tiny_clip(home / "clip")
    gather(open_source(shapes / "train"), FeatureNetwork.load(home / "net.pt"), data="train").save(home / "stats.npz")
    return home


def scores(home: Path, **changed: Any) -> dict[str, Any]:
    given = {"statistics": str(home / "stats.npz"), "network": str(home / "net.pt"), "clip": str(home / "clip")}
    return evaluate(home / "run", **({"count": 10, "steps": 2} | given | changed))


def test_every_score_is_right_and_names_what_it_depends_on(home: Path, shapes: Path) -> None:
    """Against pictures drawn by ``sample`` for the same prompts, scipy's matrix root and cosines by numpy."""
    heard: list[int] = []
    result = scores(home, count=60, seed=4, progress=heard.append)
    assert result == json.loads(written(home / "run")[result["file"]])
    assert result["file"].startswith("step-00000007-fid-60-clip-60-seed-4-") and result["as_configured"]
    assert heard == [50, 60]
    said = {name: result[name] for name in ("step", "checkpoint", "weights", "sampler", "steps", "guidance", "seed")}
    assert said == {
        "step": 7, "checkpoint": "step-00000007", "weights": "ema", "sampler": "euler", "steps": 2, "guidance": 2.0,
        "seed": 4,
    }  # fmt: skip
    assert result["count"] == 60 and result["judge_kind"] == "none"

    loaded = load_run(home / "run")
    prompts = prompts_of(loaded.config, loaded.inputs, 60, seed=4)
    validation = open_source(shapes / "validation")
    known = {text for i in range(40) for text, _ in validation.captions(i)}
    assert set(prompts.texts) <= known and len(prompts.texts) == 60
    pictures = draw_prompts(loaded, prompts.texts, Drawing("euler", 2, 2.0, 4))
    network = FeatureNetwork.load(home / "net.pt")
    drawn = network(pictures).double().numpy()
    source = open_source(shapes / "train")
    with np.load(home / "stats.npz") as archive:
        mean, covariance = archive["mean"], archive["covariance"]
    mine = np.cov(drawn, rowvar=False)
    trace = np.trace(mine + covariance - 2 * scipy.linalg.sqrtm(mine @ covariance).real)
    fidelity = result["fidelity"]
    assert fidelity["fid"]["value"] == pytest.approx(((drawn.mean(0) - mean) ** 2).sum() + trace, rel=1e-6)
    assert "warnings" not in fidelity["fid"] and fidelity["count"] == 60
    assert fidelity["kid"]["subset_size"] == 30 and fidelity["kid"]["std"] > 0
    assert fidelity["network"] == network.describe()
    assert fidelity["statistics"]["fingerprint"] == source.fingerprint() and fidelity["statistics"]["count"] == 300
    assert fidelity["prompts"] == {
        "of": "validation", "data": str(shapes / "validation"), "fingerprint": validation.fingerprint(), "left_out": 0,
    }  # fmt: skip

    clip = Clip(home / "clip", "cpu")
    a, b = clip.pictures(pictures).numpy(), clip.texts(prompts.texts)[0].numpy()
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert result["clip_score"]["value"] == pytest.approx(100 * cosines.mean(), abs=1e-4)
    assert result["clip_score"]["clip"]["sha256"] == clip.describe()["sha256"]


def test_the_seed_decides_and_the_file_is_one_commands_result(home: Path) -> None:
    one, again, other = scores(home), scores(home), scores(home, seed=1)
    assert one == again
    assert one["fidelity"]["fid"] != other["fidelity"]["fid"] and one["fidelity"]["kid"] != other["fidelity"]["kid"]
    assert one["clip_score"]["value"] != other["clip_score"]["value"]
    assert one["fidelity"]["count"] == 10 and one["fidelity"]["kid"]["subset_size"] == 5
    raw = scores(home, weights="raw", clip=None)
    assert raw["fidelity"]["fid"] != one["fidelity"]["fid"] and "clip_score" not in raw
    assert not raw["as_configured"] and one["as_configured"] and other["as_configured"]


def test_few_pictures_are_warned_of_where_people_look(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = scores(home, count=6)
    (warning,) = result["fidelity"]["fid"]["warnings"]
    assert "6 pictures, 8 features" in warning and "rank-deficient" in warning
    print_evaluation(result)
    said = capsys.readouterr().out
    assert "rank-deficient" in said and "6 drawn against 300 real" in said and "CLIP score" in said
    assert result["fidelity"]["statistics"]["sha256"][:12] in said


def test_what_the_configuration_names_is_used_by_default(home: Path, shapes: Path, tmp_path: Path) -> None:
    named = {"stats": str(home / "stats.npz"), "network": str(home / "net.pt"), "clip": str(home / "clip"), "count": 12}
    group = {"samples": 8, "time_bins": 2, "sample_steps": 2, "guidance": 2.0, "likelihood_count": 2}
    run = a_run(shapes, tmp_path / "run", eval=group | named)
    result = evaluate(run)
    assert result["fidelity"]["count"] == result["clip_score"]["count"] == 12
    assert result["fidelity"] == scores(home, count=12)["fidelity"]  # the same weights: runs differ by name alone
    assert evaluate(run, likelihood=["vlb"])["likelihood"]["vlb"]["count"] == 2


def test_scores_beside_a_judge(home: Path) -> None:
    result = scores(home, kind="shapes", clip=None)
    assert result["judge"]["seen"]["count"] == result["judge"]["held_out"]["count"] == 5 and result["count"] == 10
    sheet = home / "run" / "eval" / result["judge"]["examples"]
    assert sheet.is_file() and sheet.stem == Path(result["file"]).stem and result["fidelity"]["count"] == 10


# --- prompts -------------------------------------------------------------------------------------------------------


class Captioned:
    """Samples with the captions that are given; None where there is none."""

    def __init__(self, captions: list[list[tuple[str, float]] | None]) -> None:
        self.held = captions

    def __len__(self) -> int:
        return len(self.held)

    def captions(self, i: int) -> Any:
        from longskip.errors import BadSampleError

        found = self.held[i]
        if found is None:
            raise BadSampleError("caption_missing", "none")
        return tuple(found)


def words_of(captions: list[str], n_tokens: int) -> WordTexts:
    return WordTexts(Vocabulary.build(captions, 300), n_tokens, truncate=False)


def test_prompts_go_through_all_captions_before_any_comes_again() -> None:
    names = [f"w{i}" for i in range(10)]
    source: Any = Captioned([[(name, 1.0)] for name in names])
    texts = words_of(names, 4)
    found, left_out = captions_drawn(source, texts, 25, seed=0)
    assert left_out == 0 and sorted(found[:10]) == sorted(found[10:20]) == sorted(names) and found[:10] != names
    assert found == captions_drawn(source, texts, 25, seed=0)[0] != captions_drawn(source, texts, 25, seed=1)[0]
    assert captions_drawn(source, texts, 7, seed=0)[0] == found[:7]


def test_prompts_follow_the_weights_and_leave_out_what_cannot_be_drawn() -> None:
    choices = [("short", 3.0), ("longer", 1.0)]
    source: Any = Captioned([choices] * 50 + [None, [("far too many words of it", 1.0)]])
    texts = words_of(["short longer far too many words of it"], 3)
    found, left_out = captions_drawn(source, texts, 2000, seed=0)
    share = Counter(found)["short"] / 2000
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / 2000) ** 0.5 and set(found) == {"short", "longer"}
    assert 78 <= left_out <= 80  # two of 52 samples, forty times over
    with pytest.raises(DataError, match="none of 2"):
        captions_drawn(Captioned(source.held[50:]), texts, 1, seed=0)  # type: ignore[arg-type]


def test_statistics_of_latents_are_refused(home: Path, tmp_path: Path) -> None:
    source = open_source(write_features(tmp_path / "features", 4))
    with pytest.raises(DataError, match="holds features and no pictures") as caught:
        gather(source, FeatureNetwork.load(home / "net.pt"), data="latents")
    assert "longskip data stats on the pictures" in caught.value.cure


def test_a_run_without_validation_draws_training_captions(home: Path, shapes: Path, tmp_path: Path) -> None:
    run = a_run(shapes, tmp_path / "run", data={"path": str(shapes / "train")})
    result = evaluate(run, statistics=str(home / "stats.npz"), network=str(home / "net.pt"), count=10, steps=2)
    assert result["fidelity"]["prompts"]["of"] == "training"
    parts = [{"path": str(shapes / name), "weight": 1.0} for name in ("train", "validation")]
    mixed = load_run(a_run(shapes, tmp_path / "mixed", data={"mix": parts}))
    found = prompts_of(mixed.config, mixed.inputs, 340, seed=0)
    assert found.about["of"] == "training" and all(part["path"] in found.about["data"] for part in parts)
    source = open_source(shapes / "validation")
    validation = {text for i in range(40) for text, _ in source.captions(i)}
    assert sum(text in validation for text in found.texts) >= 40  # every sample once


def test_a_run_without_captions_draws_none(home: Path, shapes: Path, tmp_path: Path) -> None:
    run = a_run(
        shapes, tmp_path / "run", encoders={"text": {"kind": "none"}}, diffusion={"caption_dropout": 0.0}
    )  # fmt: skip
    found = evaluate(run, statistics=str(home / "stats.npz"), network=str(home / "net.pt"), count=10, steps=1)
    assert "no captions" in found["fidelity"]["prompts"]["of"] and found["fidelity"]["fid"]["value"] > 0
    with pytest.raises(ConfigError, match="compares pictures with captions"):
        evaluate(run, clip=str(home / "clip"))


# --- loss and likelihood -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "diffusion", [{"prediction": "v"}, {"objective": "ddpm", "prediction": "epsilon"}], ids=["flow", "ddpm"]
)
def test_loss_and_likelihood_are_of_the_runs_own_objective(shapes: Path, tmp_path: Path, diffusion: Any) -> None:
    """What the validation of a training with that objective says, and what likelihood's own functions say."""
    from longskip.engine.diffusion import objective_of
    from longskip.engine.likelihood import batches_of, evaluate_likelihood

    run = a_run(shapes, tmp_path / "run", diffusion=diffusion)
    result = evaluate(run, likelihood=["vlb"], count=3, seed=2)
    loaded = load_run(run)
    objective = objective_of(loaded.config.diffusion)
    source = open_data(loaded.config, str(shapes / "validation"))
    validation = Validation(loaded.config, World(0, 1, 0, torch.device("cpu")), loaded.inputs, source)
    with torch.no_grad():
        assert result["loss"]["mean"] == validation.loss_of(loaded.model, objective)["validation/loss"]
    assert result["loss"]["samples"] == 8
    found = result["likelihood"]
    assert found["objective"] == loaded.config.diffusion.objective and found["seed"] == 2
    assert found["of"] == "8-bit pixels" and found["vlb"]["count"] == 3 and "ode" not in found
    assert found["fingerprint"] == source.fingerprint()
    again = evaluate_likelihood(
        objective, loaded.model, batches_of(loaded.inputs, source, 3, seed=2), methods=["vlb"], pixels=True, seed=2
    )
    assert found["vlb"]["nats"] == pytest.approx(again["vlb"]["nats"], rel=1e-6)
    (line,) = score_lines(result)
    assert "variational bound" in line and "3 samples" in line


@pytest.mark.slow
def test_the_likelihood_by_the_ode(home: Path) -> None:
    result = evaluate(home / "run", likelihood=["ode", "vlb"], count=2)
    assert result["likelihood"]["ode"]["divergence"] == "hutchinson" and result["likelihood"]["vlb"]["count"] == 2
    assert len(score_lines(result)) == 2


# --- refusals ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_evaluated_is_refused_before_anything_is_computed(
    home: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longskip.engine import evaluate as module

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was computed")

    for name in ("_loss", "_likelihood", "score_drawn", "judge_shapes", "judge_nearest"):
        monkeypatch.setattr(module, name, never)
    other = scripted(tiny_inception(seed=1), tmp_path / "other.pt")
    large = a_run(shapes, tmp_path / "large", model={"resolution": 64})
    alone = a_run(shapes, tmp_path / "alone", data={"path": str(shapes / "train")})
    latent = a_run(
        shapes, tmp_path / "latent",
        encoders={"vae": {"kind": "vae"}}, model={"resolution": 256}, data={"path": str(shapes / "train")},
    )  # fmt: skip
    stats, net, clip = (str(home / name) for name in ("stats.npz", "net.pt", "clip"))
    cases: list[tuple[Path, dict[str, Any], type[Exception], str]] = [
        (home / "run", {"statistics": stats}, ConfigError, "--network"),
        (home / "run", {"network": net}, ConfigError, "--fid"),
        (home / "run", {"statistics": stats, "network": str(other)}, ConfigError, "another feature network"),
        (large, {"statistics": stats, "network": net}, ConfigError, r"\[64, 64\]"),
        (home / "run", {"statistics": str(tmp_path / "no.npz"), "network": net}, DataError, "do not exist"),
        (home / "run", {"statistics": stats, "network": str(tmp_path / "no.pt")}, EncoderError, "does not exist"),
        (home / "run", {"clip": str(tmp_path)}, EncoderError, "config.json"),
        (home / "run", {"likelihood": ["exact"]}, ConfigError, "vlb, ode"),
        (home / "run", {"kind": "eyes"}, ConfigError, "shapes, nearest, none"),
        (home / "run", {"sampler": "ddim"}, ConfigError, "does not go with"),
        (alone, {}, ConfigError, "nothing to evaluate"),
        (alone, {"likelihood": ["vlb"]}, ConfigError, r"data\.validation"),
        (latent, {"clip": clip}, ConfigError, r"encoders\.vae\.path"),
    ]
    for run, given, kind, words in cases:
        before = written(run)
        with pytest.raises(kind, match=words):
            evaluate(run, **({"count": 4} | given))
        assert written(run) == before


# --- commands ------------------------------------------------------------------------------------------------------


def test_the_commands(home: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from longskip.launcher.cli import main

    def longskip(*arguments: str | Path) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out + said.err

    out = tmp_path / "made.npz"
    data = ("data", "stats", shapes / "train", "--network", home / "net.pt", "--out")
    code, said = longskip(*data, out, "--count", "100", "--json")
    made = json.loads(said)
    assert code == 0 and made["count"] == 100 and made["out"] == str(out) and len(made["sha256"]) == 64
    code, said = longskip(*data, tmp_path / "few.npz", "--count", "8", "--resolution", "16x24")
    assert code == 0 and "8 pictures at 16x24 pixels, 8 features" in said and "rank-deficient" in said
    scored = ("evaluate", home / "run", "--count", "4", "--steps", "1", "--network", home / "net.pt", "--fid")
    code, said = longskip(*scored, out, "--clip", home / "clip", "--likelihood", "vlb")
    assert code == 0 and "FID" in said and "KID" in said and "CLIP score" in said and "variational bound" in said
    code, said = longskip(*scored, out, "--json")
    assert code == 0 and json.loads(said)["fidelity"]["statistics"]["sha256"] == made["sha256"]
    for arguments, words in (
        ((*scored, tmp_path / "few.npz"), "--resolution 32x32"),
        ((*data, tmp_path / "made.txt"), ".npz"),
        ((*data, out, "--resolution", "big"), "no size in pixels"),
        (("evaluate", home / "run", "--likelihood", "exact"), "vlb, ode"),
    ):
        code, said = longskip(*arguments)
        assert code == 2 and words in said, (arguments, said)


def test_no_evaluation_takes_the_place_of_another(shapes: Path, tmp_path: Path) -> None:
    """Fewer prompts, another seed, other drawing, likelihood: a file each with the sheet it names; the same is the same."""
    eval_ = {"samples": 8, "time_bins": 2, "sample_steps": 1, "judge": "shapes", "judge_count": 8, "guidance": 2.0}
    run = a_run(shapes, tmp_path / "run", eval=eval_ | {"likelihood_count": 2})
    best = evaluate(run)
    before = {file: file.read_bytes() for file in (run / "eval").iterdir()}
    assert len(before) == 2 and best["file"].startswith("step-00000007-shapes-8-seed-0-")
    others: list[dict[str, Any]] = [
        {"count": 4}, {"seed": 1}, {"guidance": 1.0}, {"steps": 2}, {"weights": "raw"}, {"likelihood": ["vlb"]},
    ]  # fmt: skip
    names = {evaluate(run, **given)["file"] for given in others}
    assert len(names | {best["file"]}) == 1 + len(others) == len(written(run))
    assert {file: file.read_bytes() for file in before} == before
    assert evaluate(run) == best and len(written(run)) == 1 + len(others)


def test_likelihood_alone_draws_nothing(shapes: Path, tmp_path: Path) -> None:
    """And nothing that was asked for before comes back unasked."""
    run = a_run(shapes, tmp_path / "run", eval={"samples": 8, "sample_steps": 1, "judge": "shapes", "judge_count": 2})
    alone = evaluate(run, likelihood=["vlb"], count=2)
    assert "judge" not in alone and alone["judge_kind"] == "none" and alone["count"] == 0 and "likelihood" in alone
    assert not list((run / "eval").glob("*.png")) and "vlb-2" in alone["file"]
    assert "likelihood" not in evaluate(run)
    both = evaluate(run, likelihood=["vlb"], count=2, kind="shapes")
    assert "judge" in both and "likelihood" in both
