"""``longskip budget`` as a user types it: in this process, and in one of its own where start-up matters."""

from __future__ import annotations

import base64
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from longskip.launcher.cli import main
from longskip.profiling.hardware import find
from longskip.profiling.laws import DIT_IN_CONTEXT, FrontierLaw, ParametricLaw, PowerLaw
from tests.budget_runs import small_spec, write_run

SURFACE = ParametricLaw("truth", "", 0.7, 30.0, 0.33, 60.0, 0.29)


class Said:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err
        self.prose = " ".join(out.split())
        """The output without what the terminal's width makes of it."""


@pytest.fixture
def budget(in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Runs ``longskip budget …`` in an empty folder, without the user's own hardware table."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(in_tmp / "config"))
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str | Path) -> Said:
        with pytest.raises(SystemExit) as stopped:
            main(["budget", *map(str, arguments)])
        said = capsys.readouterr()
        return Said(int(stopped.value.code or 0), said.out, said.err)

    return run


def write_csv(path: Path) -> Path:
    """Trainings at 2410.08184's budgets on exact parabolas about its optima."""
    rows = ["flops,params,tokens,loss"]
    for flops in (1e17, 3e17, 6e17, 1e18, 3e18, 6e18):
        best = DIT_IN_CONTEXT.optimum(flops)
        for factor in (0.3, 0.55, 1.0, 1.8, 3.3):
            n = best.params * factor
            rows.append(f"{flops!r},{n!r},{flops / 6 / n!r},{best.loss + 0.02 * math.log(factor) ** 2!r}")
    path.write_text("\n".join(rows) + "\n")
    return path


def write_family(folder: Path) -> list[str]:
    """Runs of one family: 4 budgets × up to 5 sizes, losses on ``SURFACE``; their names."""
    names = []
    for flops in (4e13, 1.6e14, 6.4e14):
        for width, depth in ((64, 2), (64, 6), (128, 4), (192, 4), (256, 6), (320, 8)):
            spec = small_spec(width, depth)
            cost, n = spec.flops(1), spec.param_counts().total
            batch = round(flops / cost.model_flops / 20)
            if 0.12 < n / SURFACE.optimum(flops).params < 12:
                loss = SURFACE.loss(n, 20 * batch * cost.tokens)
                names.append(f"c{flops:.0e}-{width}x{depth}")
                write_run(folder / names[-1], spec, attempts=((0, 20),), batch=batch, loss=lambda step, loss=loss: loss)
    return names


def test_report_of_one_run(budget, in_tmp: Path) -> None:
    write_run(
        in_tmp / "runs" / "demo",
        small_spec(),
        attempts=((0, 40), (20, 80)),
        config={"budget": {"price_per_device_hour": 3.6}},
    )
    said = budget("report", "demo")
    assert "committed share of the time" in said.out and "goodput" not in said.prose
    assert said.code == 0 and "redone after a resume" in said.out and "Kaplan" in said.out and "ceiling" in said.out
    cost, images = small_spec().flops(1), 80 * 8
    run = json.loads(budget("report", "demo", "--json").out)["runs"][0]
    assert run["amounts"]["model_flops"] == {
        "committed": images * cost.model_flops, "spent": images * cost.model_flops * 5 // 4,
        "redone": images * cost.model_flops // 4,
    }  # fmt: skip
    accounts = {row["name"]: row for row in run["accounts"]}
    assert list(accounts) == ["exact", "six_nd", "image_tokens", "kaplan", "kaplan_context", "chinchilla"]
    assert accounts["six_nd"]["flops"] == run["amounts"]["six_nd"]["committed"]
    assert run["money"]["spent"] == pytest.approx(100 * 0.5 * 2 / 3600 * 3.6)
    dear = json.loads(budget("report", "demo", "--json", "--price", "7.2", "--watts", "100").out)["runs"][0]
    assert dear["money"]["spent"] == pytest.approx(2 * run["money"]["spent"])
    assert dear["energy_kwh"]["spent"] == pytest.approx(100 * 0.5 * 2 / 3600 * 0.1)


def test_report_across_runs_with_a_plot(budget, in_tmp: Path) -> None:
    write_run(in_tmp / "runs" / "a", small_spec(), attempts=((0, 40), (20, 80)))
    write_run(in_tmp / "runs" / "b[bold]", small_spec(128), device="AMD EPYC 7B13")
    with open(in_tmp / "runs" / "b[bold]" / "ledger.jsonl", "a") as file:
        file.write('{"attempt": 1, "from')
    said = budget("report", "a", "b[bold]", "--out", "out")
    assert said.code == 0, said.err
    for words in (
        "total",
        "b[bold]",
        "1 line(s) of the ledger were unreadable or cut",
        "unknown: no rated power",
        "out/budget.png",
    ):
        assert words in said.out, words
    assert "…" not in said.out  # no number is cut on a narrow terminal
    with Image.open("out/budget.png") as image:
        image.load()
        assert min(image.size) > 400 and len(image.convert("RGB").resize((64, 64)).getcolors(4096)) > 20
    body = json.loads(Path("out/budget.json").read_text())
    assert [run["name"] for run in body["runs"]] == ["a", "b[bold]"] and body["runs"][1]["skipped_lines"] == 1
    assert body["total"]["device_hours"]["spent"] == pytest.approx((100 + 40) * 0.5 * 2 / 3600)


def test_report_refuses(budget, in_tmp: Path) -> None:
    folder = write_run(in_tmp / "runs" / "mixed", small_spec())
    other = write_run(in_tmp / "runs" / "other", small_spec(128))
    with open(folder / "ledger.jsonl", "ab") as file:
        file.write((other / "ledger.jsonl").read_bytes())
    said = budget("report", "mixed")
    assert said.code == 2 and "2 different models" in said.err and "cure:" in said.err and "Traceback" not in said.err
    assert "did you mean other" in budget("report", "othr").err
    assert budget("report", "other", "--price", "-1").code == 2


def test_plan_is_the_published_one(budget) -> None:
    plan = json.loads(budget("plan", "--flops", "1.5e21", "--json").out)
    assert plan["flops"] == 1_500_000_000_000_000_000_000 and plan["law"]["name"] == "2410.08184"
    best = plan["optimum"]
    assert f"{best['params'] / 1e6:.0f}" == "956" and f"{best['tokens']:.3e}" == "2.615e+11"
    assert f"{best['loss']:.4f}" == "0.6325" and f"{best['fid']:.1f}" == "25.0"
    assert best["extrapolation"] == pytest.approx(250) and "250×" in best["range"]
    assert plan["candidates"][0]["name"] == "custom" and 0.97 < plan["candidates"][0]["off"] < 1.03
    assert plan["device_hours"] is None and plan["hardware"] is None
    said = budget("plan", "--flops", "1.5e21").prose
    assert "≈ 960 M" in said and "loss ≈ 0.63, FID ≈ 25;" in said and "extrapolation: 250×" in said
    assert "model.width=" in said
    assert "…" not in said


def test_plan_by_gpu_hours(budget) -> None:
    hours = ("--gpu-hours", "5000", "--gpu", "h200", "--mfu", "0.45", "--law", "chinchilla")
    more = ("--gpus", "64", "--price-per-hour", "2", "--resolution", "512x768", "--json")
    plan = json.loads(budget("plan", *hours, *more).out)
    h200 = find("h200")
    assert plan["flops"] == pytest.approx(5000 * 3600 * 0.45 * h200.peak("bf16"), rel=1e-12)
    assert plan["device_hours"] == pytest.approx(5000) and plan["days"] == pytest.approx(5000 / 64 / 24)
    assert plan["money"] == pytest.approx(10_000) and plan["latent_size"] == [64, 96]
    assert plan["energy_kwh"] == pytest.approx(5 * h200.watts)
    said = budget("plan", *hours).prose
    assert "language model" in said and "no price given" in said and "5,000 GPU-hours" in said
    assert "on 8 (assumed; --gpus says another number)" in said and "2404.10102" in said
    paid = budget("plan", *hours, "--gpus", "64", "--price", "2", "--currency", "EUR").prose
    assert "10,000 EUR" in paid and "assumed" not in paid and " 64 " in paid and " cost" not in paid and "÷ C" in paid


def test_plan_without_an_mfu_says_what_is_missing(budget) -> None:
    said = budget("plan", "--flops", "1e21", "--gpu", "h200", "--gpus", "64")
    assert said.code == 0 and "N_opt" in said.prose and "H200: no hours, days, money and energy" in said.prose
    assert said.prose.count("--mfu") == 1 and "GPU-hours of" not in said.prose
    body = json.loads(budget("plan", "--flops", "1e21", "--gpu", "h200", "--json").out)
    assert body["hardware"]["mfu"] is None and body["days"] is None and body["hardware"]["gpus_assumed"]
    assert any("--mfu" in note for note in body["notes"])


def test_plan_claims_little_far_outside(budget) -> None:
    said = budget("plan", "--flops", "1e24").prose
    assert "loss ≈ 0.53, FID ≈ 5.5; extrapolation: 170,000× above" in said and "e+0" not in said
    assert "≈ 0.94 by compute (extrapolation: 684×), 0.865 by params" in said and "UNets at 256²" in said
    assert "fitted on rectified-flow loss and FID by CLIP features, 108M" in said
    near = budget("plan", "--flops", "6e18").prose
    assert "loss 0.7354, FID 91.1; inside" in near and "N_opt 41.5 M" in near
    assert "≈ 0.74 by compute (extrapolation: 42.9×), 0.802 by params (extrapolation: 10.2×)" in near


def test_the_lines_of_the_readme_run(budget, in_tmp: Path) -> None:
    write_run(in_tmp / "runs" / "RUN", small_spec())
    write_csv(in_tmp / "trainings.csv")
    text = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    lines = re.findall(r"^longskip budget (.+?)\s+#", text, re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        said = budget(*line.replace("…", "").split())
        assert said.code == 0, (line, said.err)
        assert "no hours" not in said.prose


def test_a_run_that_is_named_twice_is_refused(budget, in_tmp: Path) -> None:
    write_run(in_tmp / "runs" / "tiny", small_spec())
    (in_tmp / "alias").symlink_to(in_tmp / "runs" / "tiny")
    for command in ("report", "fit"):
        for other in ("tiny", "runs/tiny", "alias"):
            said = budget(command, "tiny", other)
            assert said.code == 2 and f"tiny and {other} are one run" in said.err and not said.out


def test_what_the_times_do_not_hold_is_said(budget, in_tmp: Path) -> None:
    for name in ("a", "b"):
        write_run(in_tmp / "runs" / name, small_spec())
    for names in (("a",), ("a", "b")):
        said = budget("report", *names).prose
        assert said.count("from the first step of each attempt to the last logged one") == 1
    assert "last logged" in json.loads(budget("report", "a", "--json").out)["covers"]


def test_output_that_is_a_file_is_refused(budget, in_tmp: Path) -> None:
    write_run(in_tmp / "runs" / "a", small_spec())
    csv = write_csv(in_tmp / "points.csv")
    before = csv.read_bytes()
    for arguments in (("report", "a"), ("fit", "points.csv")):
        said = budget(*arguments, "--out", "points.csv")
        assert said.code == 2 and "points.csv is a file" in said.err and "cure:" in said.err and not said.out
    assert csv.read_bytes() == before


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("", "neither given"),
        ("--flops 1e21 --gpu-hours 5", "both given"),
        ("--flops -1e21", "not positive"),
        ("--flops nan", "not positive"),
        ("--flops 1e999", "not positive"),
        ("--flops lots", "'lots' is not a number"),
        ("--flops 1e21 --gpu h20 --mfu 0.4", "did you mean 'h200'"),
        ("--flops 1e21 --gpu h200 --mfu 45", "45% is --mfu 0.45"),
        ("--flops 1e21 --gpu h200 --mfu 0.4 --precision bf15", "bf15"),
        ("--gpu-hours 5", "without --gpu"),
        ("--gpu-hours 5 --gpu h200", "--gpu-hours without --mfu"),
        ("--flops 1e21 --gpus 4", "--gpus without --gpu"),
        ("--flops 1e21 --price 3", "--price without --gpu"),
        ("--flops 1e21 --watts 3", "--watts without --gpu"),
        ("--flops 1e21 --precision fp16", "--precision without --gpu"),
        ("--flops 1e21 --hardware nope.yaml", "--hardware without --gpu"),
        ("--flops 1e21 --gpu h200 --mfu 0.4 --price inf", "price inf is not between"),
        ("--flops 1e21 --gpu h200 --mfu 0.4 --watts 1e300", "watts 1e+300 is not between"),
        ("--gpu-hours -5 --gpu h200 --mfu 0.4", "--gpu-hours -5"),
        ("--flops 1e21 --law chinchila", "did you mean 'chinchilla'"),
        ("--flops 1e21 --law none.json", "does not exist"),
        ("--flops 1e21 --resolution 100", "take 96"),
        ("--flops 1e21 --resolution 1x2x3", "not pixels"),
        ("--flops 1e9", "too small"),
    ],
)
def test_plan_refuses(budget, arguments: str, said: str) -> None:
    found = budget("plan", *arguments.split())
    assert found.code == 2 and said in found.err and "cure:" in found.err and "Traceback" not in found.err


def test_fit_of_a_csv_then_a_plan_by_it(budget, in_tmp: Path) -> None:
    write_csv(in_tmp / "points.csv")
    said = budget("fit", "points.csv", "--tokens", "image", "--out", "fit")
    assert said.code == 0 and "0.5681" in said.out and "0.4319" in said.out and "-0.0273" in said.out
    assert "10× beyond" in said.out and "warning" not in said.out
    for name in ("isoflop.png", "power-laws.png"):
        with Image.open(Path("fit") / name) as image:
            image.load()
    page = Path("fit/index.html").read_text("utf-8")
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert [base64.b64decode(text) for text in pictures] == [
        Path("fit", name).read_bytes() for name in ("isoflop.png", "power-laws.png")
    ]
    assert "Segoe UI" in page.split("</style>")[0] and "&#34;" not in page.split("</style>")[0]
    assert "0.5681" in page and not re.search(r"(src|href)=\"(?!data:)", page) and "<script" not in page
    mine = json.loads(budget("plan", "--flops", "1.5e21", "--law", "fit/law.json", "--json").out)
    known = json.loads(budget("plan", "--flops", "1.5e21", "--json").out)
    assert mine["optimum"]["params"] == pytest.approx(known["optimum"]["params"], rel=1e-4)
    assert mine["optimum"]["extrapolation"] == pytest.approx(250) and mine["law"]["tokens"] == "image"
    body = json.loads(budget("fit", "points.csv", "--tokens", "image", "--json").out)
    law = json.loads(Path("fit/law.json").read_text())
    assert body["law"] == law and len(body["minima"]) == 6 and law["fitted_on"] == "30 trainings from points.csv"
    low, high = law["intervals"]["params"]["exponent"]
    assert low <= law["params"]["exponent"] <= high
    at = [one["flops"] for one in law["intervals"]["at"]]
    assert (at[0], at[-1]) == pytest.approx((1e16, 6e22)) and len(at) > 20
    for one in law["intervals"]["at"]:
        for name in ("params", "tokens", "loss"):
            low, high = one[f"{name}_interval"]
            assert low * (1 - 1e-9) <= one[name] <= high * (1 + 1e-9)
    said = budget("plan", "--flops", "1e19", "--law", "fit/law.json").prose
    assert "fitted on 30 trainings from points.csv" in said and "95% intervals" in said
    low, high = json.loads(budget("plan", "--flops", "1e19", "--law", "fit/law.json", "--json").out)["optimum"][
        "params_interval"
    ]
    assert (
        low <= FrontierLaw("", "", *(PowerLaw(**law[name]) for name in ("params", "data"))).params(1e19) <= high * 1.001
    )


def test_fit_warns_of_other_units_and_of_a_loss_that_flattens(budget, in_tmp: Path) -> None:
    rows = []
    for flops in (1e17, 1e18, 1e19, 1e20):
        best = SURFACE.optimum(flops)
        for factor in (0.4, 0.63, 1.0, 1.6, 2.5):
            n = best.params * factor
            rows.append(f"{flops / 1e9!r},{n!r},{flops / 6 / n!r},{SURFACE.loss(n, flops / 6 / n)!r}")
    (in_tmp / "bent.csv").write_text("flops,params,tokens,loss\n" + "\n".join(rows) + "\n")
    said = budget("fit", "bent.csv", "--out", "fit")
    assert said.code == 0 and "warning: flops ÷ (6·params·tokens) is 1e-09 in 20 of 20 rows" in said.prose
    assert "warning: loss does not lie on a straight line" in said.prose and "--form parametric" in said.prose
    warnings = json.loads(Path("fit/fit.json").read_text())["warnings"]
    page = Path("fit/index.html").read_text("utf-8")
    assert len(warnings) == 2 and all(warning[:40] in page for warning in warnings)
    assert json.loads(budget("fit", "bent.csv", "--form", "parametric", "--json").out)["warnings"] == warnings[:1]


def test_fit_of_runs(budget, in_tmp: Path) -> None:
    names = write_family(in_tmp / "runs")
    body = json.loads(budget("fit", *names, "--form", "parametric", "--json", "--out", "fit").out)
    assert body["law"]["E"] == pytest.approx(0.7, rel=1e-3) and body["law"]["alpha"] == pytest.approx(0.33, rel=1e-3)
    assert body["points"] == len(names) and {"E", "params_exponent"} <= set(body["intervals"])
    assert {Path(file).name for file in body["files"]} == {"parametric.png", "index.html", "law.json", "fit.json"}
    exact = json.loads(budget("fit", *names, "--json").out)
    assert exact["form"] == "isoflop" and 0.3 < exact["law"]["params"]["exponent"] < 0.6
    said = budget("fit", *names)
    assert said.code == 0 and f"{len(names)} runs" in said.out


def test_fit_refuses(budget, in_tmp: Path) -> None:
    csv = write_csv(in_tmp / "points.csv")
    lines = csv.read_text().splitlines()
    (in_tmp / "few.csv").write_text("\n".join(lines[:6]))
    write_run(in_tmp / "runs" / "a", small_spec())
    write_run(in_tmp / "runs" / "b", small_spec(128), config={"diffusion": {"prediction": "x"}})
    for arguments, said in (
        (("few.csv",), "3 budgets of 3 sizes each; got 1 budget"),
        (("points.csv", "a"), "give one CSV file alone"),
        (("points.csv", "--form", "cubic"), "one of isoflop, parametric, power"),
        (("points.csv", "--form", "power"), "5 points have the budget"),
        (("few.csv", "--form", "parametric"), "needs 8 points"),
        (("a", "b"), "not models of one family"),
        (("a",), "got 1 budget"),
        (("none.csv",), "does not exist"),
    ):
        found = budget("fit", *arguments)
        assert found.code == 2 and said in found.err, (arguments, found.err)
        assert "cure:" in found.err and "Traceback" not in found.err


def test_budget_needs_no_torch_and_its_help_no_numpy(tmp_path: Path) -> None:
    write_csv(tmp_path / "points.csv")
    write_run(tmp_path / "runs" / "a", small_spec())
    for arguments, strangers in (
        (["budget", "--help"], ("torch", "numpy", "scipy", "matplotlib", "longskip.profiling")),
        (["budget", "plan", "--flops", "1e21", "--json"], ("torch", "scipy", "matplotlib")),
        (["budget", "fit", "points.csv", "--out", "fit"], ("torch",)),
        (["budget", "report", "a", "--out", "out"], ("torch",)),
    ):
        code = (
            "import sys\nfrom longskip.launcher.cli import main\n"
            f"try:\n    main({arguments!r})\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
            f"found = [name for name in {strangers!r} if name in sys.modules]\nassert not found, found\n"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, (arguments, done.stderr)


def test_the_price_has_one_name_and_its_earlier_one_is_understood(budget, in_tmp: Path) -> None:
    write_run(in_tmp / "runs" / "demo", small_spec(), attempts=((0, 40),))
    for arguments in (("report", "demo"), ("plan", "--flops", "1e21", "--gpu", "h200", "--mfu", "0.4")):
        now, earlier = (budget(*arguments, name, "7.2", "--json") for name in ("--price", "--price-per-hour"))
        assert now.code == 0 and now.out == earlier.out and now.out != budget(*arguments, "--json").out
        shown = budget(arguments[0], "--help").out
        assert "--price " in shown and "--price-" not in shown


def test_a_narrow_terminal_holds_a_plan_and_a_fit(budget, in_tmp: Path) -> None:
    """All but what is to be copied."""
    write_csv(in_tmp / "points.csv")
    for arguments in (
        ("plan", "--flops", "1e21", "--gpu", "h200", "--mfu", "0.4"),
        ("fit", "points.csv", "--tokens", "image", "--form", "parametric"),
    ):
        said = budget(*arguments)
        long = [line for line in said.out.splitlines() if len(line) > 80 and "model.width=" not in line]
        assert said.code == 0 and not long, long
