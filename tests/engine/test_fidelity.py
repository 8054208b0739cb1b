"""FID and KID against torchmetrics on pictures, scipy's matrix root, brute force and closed forms; statistics files."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from torch import nn

from longskip.engine import fidelity
from longskip.engine.data.decode import decode_image
from longskip.engine.data.sources import open_source
from longskip.engine.feature_network import FeatureNetwork
from longskip.engine.fidelity import Fidelity, Moments, Statistics, frechet_distance, gather, kernel_distance
from longskip.errors import ConfigError, DataError
from tests.feature_networks import scripted, tiny_inception


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> FeatureNetwork:
    return FeatureNetwork.load(scripted(tiny_inception(), tmp_path_factory.mktemp("network") / "net.pt"))


@pytest.fixture(scope="module")
def real(shapes: Path, network: FeatureNetwork) -> Statistics:
    return gather(open_source(shapes / "train"), network, data="train")


def pictures(folder: Path) -> np.ndarray:
    source = open_source(folder)
    return np.stack([decode_image(source.read(i).image, resolution=(32, 32)) for i in range(len(source))])


def statistics_of(features: np.ndarray) -> Statistics:
    """Statistics of features that no picture gave."""
    count, size = features.shape
    about = {"format": fidelity.FORMAT, "count": count, "network": {"features": size}, "resolution": [8, 8]}
    covariance = np.cov(features, rowvar=False).reshape(size, size)
    return Statistics(features.mean(0), covariance, features.astype(np.float32), about)


def rows_with(mean: np.ndarray, covariance: np.ndarray, count: int, seed: int) -> torch.Tensor:
    """``count`` rows whose sample mean and covariance (over n − 1) are exactly these."""
    rows = np.random.default_rng(seed).standard_normal((count, len(mean)))
    rows -= rows.mean(0)
    whitened = np.linalg.solve(np.linalg.cholesky(np.cov(rows, rowvar=False)), rows.T)
    return torch.from_numpy((np.linalg.cholesky(covariance) @ whitened).T + mean)


# --- moments -------------------------------------------------------------------------------------------------------


def test_moments_are_those_of_all_rows_whatever_the_batches() -> None:
    """Means 10⁶ deviations from 0, where sums of squares alone would keep few digits."""
    rows = np.random.default_rng(0).standard_normal((500, 6)) @ np.random.default_rng(1).standard_normal((6, 6)) + 1e6
    for batches in ([500], [1, 499], [7] * 71 + [3], [1] * 500):
        moments, start = Moments(6), 0
        for size in batches:
            moments.add(rows[start : start + size])
            start += size
        assert moments.count == 500
        assert np.allclose(moments.mean, rows.mean(0), rtol=1e-14)
        assert np.allclose(moments.covariance, np.cov(rows, rowvar=False), rtol=1e-8)


# --- FID -----------------------------------------------------------------------------------------------------------


def test_fid_of_commuting_gaussians_is_the_closed_form() -> None:
    """Diagonal covariances: Σ (m₁−m₂)² + Σ (σ₁−σ₂)²; and nought against itself."""
    rng = np.random.default_rng(0)
    mean, other_mean = rng.standard_normal(5), rng.standard_normal(5)
    variances, other_variances = rng.uniform(0.1, 4, 5), rng.uniform(0.1, 4, 5)
    drawn = rows_with(mean, np.diag(variances), 200, seed=1)
    made = statistics_of(rows_with(other_mean, np.diag(other_variances), 300, seed=2).numpy())
    expected = ((mean - other_mean) ** 2).sum() + ((np.sqrt(variances) - np.sqrt(other_variances)) ** 2).sum()
    assert frechet_distance(drawn, made)["value"] == pytest.approx(expected, rel=1e-10)
    assert abs(frechet_distance(drawn, statistics_of(drawn.numpy()))["value"]) < 1e-9


@pytest.mark.parametrize("size", [3, 20])
def test_fid_is_that_of_the_matrix_root_in_float64(size: int) -> None:
    rng = np.random.default_rng(size)
    mixed, other = rng.standard_normal((2, size, size))
    drawn = torch.from_numpy(rng.standard_normal((400, size)) @ mixed)
    theirs = rng.standard_normal((300, size)) @ other + 0.3
    a, b = np.cov(drawn.numpy(), rowvar=False), np.cov(theirs, rowvar=False)
    root = scipy.linalg.sqrtm(a @ b)
    expected = ((drawn.numpy().mean(0) - theirs.mean(0)) ** 2).sum() + np.trace(a + b - 2 * root.real)
    found = frechet_distance(drawn, statistics_of(theirs))
    assert found["value"] == pytest.approx(expected, rel=1e-9) and "warnings" not in found


def test_fid_of_fewer_pictures_than_features_is_that_of_the_singular_values() -> None:
    """tr (Σ₁·Σ₂)^½ is the sum of the singular values of X·Yᵀ over √((n−1)(m−1)), X and Y centred, whatever the ranks."""
    rng = np.random.default_rng(0)
    drawn, theirs = rng.standard_normal((20, 64)), rng.standard_normal((30, 64)) * 2 + 0.1
    x, y = drawn - drawn.mean(0), theirs - theirs.mean(0)
    trace = np.linalg.svd(x @ y.T, compute_uv=False).sum() / (19 * 29) ** 0.5
    spread = (x**2).sum() / 19 + (y**2).sum() / 29
    expected = ((drawn.mean(0) - theirs.mean(0)) ** 2).sum() + spread - 2 * trace
    assert frechet_distance(torch.from_numpy(drawn), statistics_of(theirs))["value"] == pytest.approx(
        expected, rel=1e-6
    )


class OnPictures(nn.Module):
    """The network as torchmetrics hands it pictures: uint8 (B, 3, H, W)."""

    def __init__(self, network: FeatureNetwork) -> None:
        super().__init__()
        self.network, self.num_features = network, network.n_features

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.network(pictures.permute(0, 2, 3, 1).numpy())


def test_fid_and_kid_from_statistics_are_those_of_torchmetrics_on_pictures(
    shapes: Path, network: FeatureNetwork, real: Statistics, tmp_path: Path
) -> None:
    """Through a file and in batches against torchmetrics that is shown all pictures of both sides itself."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    ours, theirs = pictures(shapes / "validation"), pictures(shapes / "train")
    made = real.save(tmp_path / "made.npz")
    measured = Fidelity(network, made)
    for start in range(0, 40, 16):
        measured.add(ours[start : start + 16])
    found = measured.result(seed=5)
    fid = FrechetInceptionDistance(feature=OnPictures(network))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kid = KernelInceptionDistance(feature=OnPictures(network), subsets=100, subset_size=20)
    for metric in (fid, kid):
        metric.update(torch.from_numpy(theirs).permute(0, 3, 1, 2), real=True)
        metric.update(torch.from_numpy(ours).permute(0, 3, 1, 2), real=False)
    assert found["fid"]["value"] == pytest.approx(float(fid.compute()), rel=1e-6)
    assert found["kid"]["subset_size"] == 20 and found["kid"]["subsets"] == 100
    torch.manual_seed(5)
    mean, std = kid.compute()
    # Real features stand in the order of the data in both, so that the same seed draws the same subsets.
    assert found["kid"]["mean"] == pytest.approx(float(mean), abs=2e-6)
    assert found["kid"]["std"] == pytest.approx(float(std), abs=2e-6)
    assert found["count"] == 40 and found["network"] == network.describe()
    assert found["statistics"]["sha256"] == hashlib.sha256((tmp_path / "made.npz").read_bytes()).hexdigest()
    assert found["statistics"]["count"] == 300 and found["statistics"]["resolution"] == [32, 32]


@pytest.mark.parametrize(
    ("drawn", "made", "warned"), [(9, 9, []), (8, 9, ["drawn"]), (9, 8, ["real"]), (3, 4, ["drawn", "real"])]
)
def test_too_few_pictures_are_said_to_be_too_few(drawn: int, made: int, warned: list[str]) -> None:
    """Eight features: a covariance of full rank takes nine rows."""
    rng = np.random.default_rng(0)
    rows, others = rng.standard_normal((drawn, 8)), rng.standard_normal((made, 8))
    found = frechet_distance(torch.from_numpy(rows), statistics_of(others))
    assert np.linalg.matrix_rank(np.cov(rows, rowvar=False)) == min(8, drawn - 1)
    said = found.get("warnings", [])
    assert [
        what for what in ("drawn", "real") if any(f"the {what} pictures is rank-deficient" in s for s in said)
    ] == warned
    assert len(said) == len(warned) and np.isfinite(found["value"])


# --- KID -----------------------------------------------------------------------------------------------------------


def brute_force_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate with the kernel (x·y/D + 1)³, pair by pair."""
    n, size = x.shape

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / size + 1) ** 3)

    within = sum(kernel(z[i], z[j]) for z in (x, y) for i in range(n) for j in range(n) if i != j)
    across = sum(kernel(a, b) for a in x for b in y)
    return within / (n * (n - 1)) - 2 * across / n**2


def test_kid_is_the_unbiased_estimate_over_the_subsets_that_the_seed_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "SUBSETS", 4)
    rng = np.random.default_rng(0)
    drawn, theirs = rng.standard_normal((12, 3)), rng.standard_normal((30, 3)) + 0.5
    made = statistics_of(theirs)
    kept = made.features.astype(np.float64)
    found = kernel_distance(torch.from_numpy(drawn), made, seed=9)
    generator = torch.Generator().manual_seed(9)
    values = []
    for _ in range(4):
        first, second = (torch.randperm(n, generator=generator).numpy()[:6] for n in (30, 12))
        values.append(brute_force_mmd(kept[first], drawn[second]))
    assert found == {
        "mean": pytest.approx(np.mean(values), rel=1e-12), "std": pytest.approx(np.std(values), rel=1e-10),
        "subsets": 4, "subset_size": 6,
    }  # fmt: skip


def test_kid_is_near_nought_for_one_distribution_and_that_of_the_moments_for_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Standard normals in 4 dimensions and the same shifted by m: E k needs moments to the third alone."""
    monkeypatch.setattr(fidelity, "SUBSETS", 20)
    rng = np.random.default_rng(1)
    drawn, same = rng.standard_normal((4000, 4)), rng.standard_normal((4000, 4))
    shift = np.array([1.0, -0.5, 0.0, 2.0])
    near = kernel_distance(torch.from_numpy(drawn), statistics_of(same), seed=0)
    far = kernel_distance(torch.from_numpy(drawn), statistics_of(same + shift), seed=0)
    assert near["subset_size"] == 1000 and abs(near["mean"]) < 0.02

    def expected(a: np.ndarray, b: np.ndarray) -> float:
        """E (u/4 + 1)³ with u = x·y of x ~ N(a, I), y ~ N(b, I): mean a·b, second and third moments by Isserlis."""
        mean, d = a @ b, 4
        second = mean**2 + a @ a + b @ b + d
        third = mean**3 + 3 * mean * (a @ a + b @ b + d) + 6 * mean
        return third / 64 + 3 * second / 16 + 3 * mean / 4 + 1

    zero = np.zeros(4)
    closed = expected(zero, zero) + expected(shift, shift) - 2 * expected(zero, shift)
    assert far["mean"] == pytest.approx(closed, rel=0.05)


def test_kid_leaves_the_global_random_numbers_alone() -> None:
    rows = torch.randn(20, 3, dtype=torch.float64)
    made = statistics_of(rows.numpy() + 1)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one = kernel_distance(rows, made, seed=0)
    assert torch.equal(torch.rand(1), expected)
    assert kernel_distance(rows, made, seed=0) == one != kernel_distance(rows, made, seed=1)


# --- statistics of data --------------------------------------------------------------------------------------------


def test_statistics_are_those_of_the_data(shapes: Path, network: FeatureNetwork, real: Statistics) -> None:
    source = open_source(shapes / "train")
    features = network(pictures(shapes / "train")).double().numpy()
    assert np.allclose(real.mean, features.mean(0), rtol=1e-6)
    assert np.allclose(real.covariance, np.cov(features, rowvar=False), rtol=1e-5, atol=1e-9)
    assert real.features.dtype == np.float32 and np.allclose(real.features, features, atol=1e-6)
    assert real.count == 300 and real.about["bad"] == 0 and real.about["resolution"] == [32, 32]
    assert real.about["fingerprint"] == source.fingerprint() and real.about["network"] == network.describe()


def test_a_count_takes_a_random_part_that_the_seed_decides(
    shapes: Path, network: FeatureNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fidelity, "KEPT_FEATURES", 25)
    source = open_source(shapes / "train")
    every = network(pictures(shapes / "train")).numpy()
    parts = [gather(source, network, data="train", count=70, seed=seed) for seed in (0, 0, 1)]
    assert np.array_equal(parts[0].features, parts[1].features) and np.array_equal(parts[0].mean, parts[1].mean)
    assert not np.allclose(parts[0].mean, parts[2].mean, rtol=1e-6)
    for part in parts:
        assert part.count == 70 and part.features.shape == (25, 8)
        places = {int(np.abs(every - row).sum(1).argmin()) for row in part.features}
        assert len(places) > 15 and max(places) > 150  # from all over the data, not its beginning
    monkeypatch.setattr(fidelity, "KEPT_BYTES", 8 * 4 * 10)
    assert gather(source, network, data="train", count=30).features.shape == (10, 8)
    with pytest.raises(DataError, match="300"):
        gather(source, network, data="train", count=301)


def folder_of(path: Path, sizes: list[tuple[int, int]], broken: int = 0) -> Path:
    path.mkdir()
    rng = np.random.default_rng(0)
    for i, (height, width) in enumerate(sizes):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path / f"{i:02d}.png")
        (path / f"{i:02d}.txt").write_text("noise")
    for i in range(broken):
        (path / f"z{i}.png").write_bytes(b"no picture")
        (path / f"z{i}.txt").write_text("noise")
    return path


def test_pictures_of_several_sizes_need_a_resolution(network: FeatureNetwork, tmp_path: Path) -> None:
    mixed = open_source(folder_of(tmp_path / "mixed", [(40, 40), (40, 40), (40, 60)], broken=2))
    with pytest.raises(DataError, match=r"40x40 and of 40x60.*\n.*--resolution"):
        gather(mixed, network, data="mixed")
    made = gather(mixed, network, data="mixed", resolution=(16, 24))
    shown = [decode_image(mixed.read(i).image, resolution=(16, 24)) for i in range(3)]
    assert np.allclose(made.features, network(np.stack(shown)).numpy(), atol=1e-6)
    assert made.count == 3 and made.about["bad"] == 2 and made.about["resolution"] == [16, 24]
    alone = open_source(folder_of(tmp_path / "alone", [(8, 8)], broken=1))
    with pytest.raises(DataError, match="1 usable"):
        gather(alone, network, data="alone")


# --- files ---------------------------------------------------------------------------------------------------------


def test_a_file_holds_all_of_it_and_the_same_bytes_again(real: Statistics, tmp_path: Path) -> None:
    first, again = real.save(tmp_path / "deep" / "a.npz"), real.save(tmp_path / "b.npz")
    assert (tmp_path / "deep" / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    for name in ("mean", "covariance", "features"):
        assert np.array_equal(getattr(first, name), getattr(real, name))
    assert first.about == dict(real.about) and first.sha256 == again.sha256 and len(first.sha256) == 64
    assert not list(tmp_path.glob(".*"))


class Intruder:
    """What a pickle can do when it is read: here it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def test_a_pickle_in_the_file_is_not_read(real: Statistics, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    np.savez(tmp_path / "evil.npz", features=np.array([Intruder(mark)], dtype=object))
    with pytest.raises(DataError, match="no statistics file"):
        Statistics.load(tmp_path / "evil.npz")
    assert not mark.exists()
    with np.load(tmp_path / "evil.npz", allow_pickle=True) as archive:
        _ = archive["features"]
    assert mark.exists()  # the trap works


def test_files_that_are_no_statistics_are_refused(real: Statistics, tmp_path: Path) -> None:
    real.save(tmp_path / "good.npz")
    with np.load(tmp_path / "good.npz") as archive:
        parts = dict(archive)
    about = json.loads(str(parts["about"]))

    def spoilt(name: str, **changed: object) -> Path:
        np.savez(tmp_path / name, **(parts | changed))  # type: ignore[arg-type]
        return tmp_path / name

    def told(**changed: object) -> np.ndarray:
        return np.array(json.dumps(about | changed))

    nan = parts["mean"].copy()
    nan[0] = np.nan
    np.savez(tmp_path / "other.npz", mu=parts["mean"], sigma=parts["covariance"])
    (tmp_path / "text.npz").write_text("statistics")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "good.npz").read_bytes()[:1500])
    cases = [
        (tmp_path / "nowhere.npz", "do not exist"),
        (tmp_path / "text.npz", "no statistics file"),
        (tmp_path / "cut.npz", "no statistics file"),
        (tmp_path / "other.npz", "mu and sigma"),
        (spoilt("nan.npz", mean=nan), "not finite"),
        (spoilt("flat.npz", covariance=parts["covariance"][0]), "mean, covariance and features"),
        (spoilt("narrow.npz", features=parts["features"][:, :3]), "mean, covariance and features"),
        (spoilt("half.npz", covariance=parts["covariance"].astype(np.float32)), "float32"),
        (spoilt("format.npz", about=told(format="2")), "format"),
        (spoilt("few.npz", about=told(count=3)), "3 pictures"),
        (spoilt("list.npz", about=np.array("[1]")), "no statistics file"),
        (spoilt("words.npz", about=np.array("about")), "no statistics file"),
        (spoilt("size.npz", about=told(resolution="32")), "resolution"),
    ]
    for path, words in cases:
        with pytest.raises(DataError, match=words):
            Statistics.load(path)


def test_a_file_that_unpacks_too_far_is_refused_unread(
    real: Statistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real.save(tmp_path / "good.npz")
    monkeypatch.setattr(fidelity, "MAX_FILE_BYTES", 1000)
    with pytest.raises(DataError, match="unpacks to"):
        Statistics.load(tmp_path / "good.npz")


def test_another_network_or_resolution_is_refused(real: Statistics, network: FeatureNetwork, tmp_path: Path) -> None:
    real.check(network, (32, 32))
    other = FeatureNetwork.load(scripted(tiny_inception(seed=1), tmp_path / "other.pt"))
    with pytest.raises(ConfigError, match=r"another feature network.*sha256"):
        real.check(other, (32, 32))
    with pytest.raises(ConfigError, match=r"\[32, 32\].*\[64, 64\](.|\n)*--resolution 64x64"):
        real.check(network, (64, 64))
    resized = replace(real, about={**real.about, "network": network.describe() | {"resize": "nearest"}})
    with pytest.raises(ConfigError, match="resize nearest"):
        resized.check(network, (32, 32))


def test_a_full_disk_leaves_the_old_file(real: Statistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.npz"
    old = real.save(path)

    def full(stream: io.BufferedWriter, **parts: object) -> None:
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(DataError, match="No space left"):
        real.save(path)
    assert Statistics.load(path).sha256 == old.sha256 and [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_torchmetrics_that_is_not_there_is_named_before_anything_is_drawn(
    network: FeatureNetwork, real: Statistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchmetrics.image.fid", None)
    with pytest.raises(ConfigError, match=r"longskip\[eval\]"):
        Fidelity(network, real)


def test_a_copy_of_the_file_is_the_same_network(real: Statistics, network: FeatureNetwork, tmp_path: Path) -> None:
    real.check(FeatureNetwork.load(shutil.copy(network.path, tmp_path / "copy.pt")), (32, 32))
