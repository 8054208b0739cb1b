"""How far drawn pictures are from real ones in a network's features: FID and KID, and the statistics files they need.

**FID** (1706.08500, equation 6) is the Fréchet distance of the two Gaussians with the features' means and covariances,

    ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2·(Σ₁·Σ₂)^½),

computed by torchmetrics in float64 from covariances over n − 1. It is biased upwards by an amount that falls with the
number of pictures (1801.01401), so figures of different counts are not comparable, and with no more pictures than
features the covariance is rank-deficient, which the result then says.

**KID** (1801.01401, section 4) is the squared maximum mean discrepancy under the kernel (x·y/D + 1)³, unbiased at any
count: mean and deviation over ``SUBSETS`` random subsets, by torchmetrics in float64.

A **statistics file** (``.npz``, no pickle) holds of real pictures ``mean`` (D,) and ``covariance`` (D, D) in float64,
``features`` (K, D) float32 of randomly chosen ones of them for KID, and ``about``: JSON with the number of pictures, the
network, the resolution and the data's fingerprint.
"""

from __future__ import annotations

import json
import os
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longskip import __version__
from longskip.engine.data.decode import decode_image, upright_size
from longskip.engine.data.draws import generator
from longskip.engine.data.hashes import file_sha256
from longskip.engine.data.sources import Source
from longskip.engine.feature_network import FeatureNetwork
from longskip.errors import BadSampleError, ConfigError, DataError, UnfitDataError

FORMAT = "longskip statistics 1"
SUBSETS, SUBSET_SIZE = 100, 1000
KEPT_FEATURES = 10_000
KEPT_BYTES = 1 << 28
MAX_FILE_BYTES = 1 << 32
BATCH = 32


class Moments:
    """Mean and covariance of features, added up in float64 by the update of Chan, Golub and LeVeque (1983)."""

    def __init__(self, n_features: int) -> None:
        self.count = 0
        self.mean = np.zeros(n_features)
        self._scatter = np.zeros((n_features, n_features))  # Σ (x − mean)·(x − mean)ᵀ

    def add(self, features: np.ndarray) -> None:
        """Rows (B, D)."""
        rows = np.asarray(features, dtype=np.float64)
        total, mean = self.count + len(rows), rows.mean(0)
        apart, centred = mean - self.mean, rows - mean
        self._scatter += centred.T @ centred + np.outer(apart, apart) * (self.count * len(rows) / total)
        self.mean = self.mean + apart * (len(rows) / total)
        self.count = total

    @property
    def covariance(self) -> np.ndarray:
        """(D, D) over count − 1; two rows or more."""
        return self._scatter / (self.count - 1)


@dataclass(frozen=True)
class Statistics:
    """What is kept of real pictures: see the file's description above. ``sha256`` is of the file, "" before it is one."""

    mean: np.ndarray
    covariance: np.ndarray
    features: np.ndarray
    about: Mapping[str, Any]
    sha256: str = ""

    @property
    def count(self) -> int:
        """Pictures that mean and covariance are of."""
        return int(self.about["count"])

    def save(self, path: Path) -> Statistics:
        """Write the file, whole or not at all; returns what was written with its hash."""
        about = np.array(json.dumps(self.about, ensure_ascii=False))
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as stream:
                np.savez(stream, mean=self.mean, covariance=self.covariance, features=self.features, about=about)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except OSError as error:
            raise DataError(f"{path} cannot be written: {error.strerror}") from error
        finally:
            temporary.unlink(missing_ok=True)
        return Statistics.load(path)

    @staticmethod
    def load(path: Path) -> Statistics:
        """A statistics file. Raises ``DataError`` for anything else, pickles and contradicting sizes among it."""
        cure = "make it: longskip data stats DATA --network PATH --out STATS.npz"
        if not path.is_file():
            raise UnfitDataError(f"the statistics {path} do not exist", cure=cure)
        try:
            with zipfile.ZipFile(path) as archive:
                size = sum(member.file_size for member in archive.infolist())
            if size > MAX_FILE_BYTES:
                raise DataError(f"{path} unpacks to {size} bytes; the limit is {MAX_FILE_BYTES}")
            with np.load(path, allow_pickle=False) as archive:
                parts = {name: archive[name] for name in archive.files}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, NotImplementedError) as error:
            raise DataError(f"{path} is no statistics file: {error}", cure=cure) from error
        if "about" not in parts and {"mu", "sigma"} <= parts.keys():
            raise DataError(
                f"{path} holds mu and sigma alone, and not which network, resolution and number of pictures made them",
                cure=cure,
            )
        try:
            about = json.loads(str(parts["about"][()]))
            found = Statistics(parts["mean"], parts["covariance"], parts["features"], about, file_sha256(path))
            _check_parts(found)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise DataError(f"{path} is no statistics file: {error}", cure=cure) from error
        return found

    def check(self, network: FeatureNetwork, resolution: tuple[int, int]) -> None:
        """Raises ``ConfigError`` where another network or resolution made them."""
        made, wanted = self.about["network"], network.describe()
        if made != wanted:
            names = [name for name in {**made, **wanted} if made.get(name) != wanted.get(name)]
            differences = "; ".join(f"{name} {made.get(name)} and here {wanted.get(name)}" for name in names)
            raise ConfigError(
                f"the statistics were made by another feature network than {network.path}: {differences}",
                cure="name the network that made them, or make them again: longskip data stats",
            )
        if self.about["resolution"] != list(resolution):
            raise ConfigError(
                f"the statistics are of pictures at {self.about['resolution']} pixels, the run draws {list(resolution)}",
                cure=f"longskip data stats … --resolution {_pixels(resolution)}",
            )

    def describe(self) -> dict[str, Any]:
        """What a result says of the statistics: hash, data, count, seed, resolution."""
        kept = ("data", "fingerprint", "count", "bad", "seed", "resolution")
        return {"sha256": self.sha256} | {name: self.about.get(name) for name in kept}


def _check_parts(found: Statistics) -> None:
    """Raises ``ValueError`` where parts do not belong together."""
    about, size = found.about, len(found.mean)
    if about["format"] != FORMAT:
        raise ValueError(f"its format is {about['format']!r}, {FORMAT!r} is read")
    shapes = (found.mean.shape, found.covariance.shape, found.features.shape[1:])
    if shapes != ((size,), (size, size), (size,)) or about["network"]["features"] != size:
        raise ValueError(f"mean, covariance and features are {shapes}, of {about['network']['features']} features")
    kinds = tuple(str(part.dtype) for part in (found.mean, found.covariance, found.features))
    if kinds != ("float64", "float64", "float32"):
        raise ValueError(f"mean, covariance and features are {kinds}")
    if not all(np.isfinite(part).all() for part in (found.mean, found.covariance, found.features)):
        raise ValueError("it holds numbers that are not finite")
    if not isinstance(about["count"], int) or not 2 <= len(found.features) <= about["count"]:
        raise ValueError(f"{len(found.features)} features are kept of {about['count']} pictures")
    if not isinstance(about["resolution"], list):
        raise ValueError(f"the resolution is {about['resolution']!r}")


def gather(
    source: Source,
    network: FeatureNetwork,
    *,
    data: str,
    resolution: tuple[int, int] | None = None,
    count: int | None = None,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> Statistics:
    """Statistics of ``count`` samples (all by default), chosen by ``seed``; pictures that cannot be used are counted.

    Pictures are cut and resized to ``resolution`` (H, W) as training sees them without flips and random crops; by
    default all must have the size of the first. ``data`` is the name to be written down. Raises ``DataError`` for data
    without pictures, fewer than two usable ones and, without ``resolution``, for sizes that differ.
    """
    if source.features is not None and not source.features.pictures:
        raise DataError(
            f"{data} holds features and no pictures, and statistics are of pictures",
            cure="longskip data stats on the pictures that were encoded, or encode them with --keep-pictures",
        )
    if count is not None and count > len(source):
        raise UnfitDataError(f"{count} pictures are asked for, {data} holds {len(source)}", cure="a smaller --count")
    fixed = resolution
    order = generator(seed, 0, 0, "statistics").permutation(len(source))[:count]
    limit = max(2, min(KEPT_FEATURES, KEPT_BYTES // (4 * network.n_features)))
    kept_samples = set(order[:limit].tolist())
    moments, kept, bad = Moments(network.n_features), [], 0
    waiting: list[np.ndarray] = []
    keep: list[bool] = []

    def flush() -> None:
        if waiting:
            features = network(np.stack(waiting)).numpy()
            moments.add(features)
            kept.append(features[keep])
            waiting.clear()
            keep.clear()

    for done, sample in enumerate(np.sort(order).tolist(), 1):
        try:
            image = source.read(sample).image
            size = fixed or upright_size(image)
            picture = decode_image(image, resolution=size)
        except BadSampleError:
            bad += 1
            continue
        resolution = resolution or size
        if size != resolution:
            raise DataError(
                f"{data} holds pictures of {_pixels(resolution)} and of {_pixels(size)} pixels",
                cure="name the resolution that the model draws: --resolution HxW",
            )
        waiting.append(picture)
        keep.append(sample in kept_samples)
        if len(waiting) == BATCH:
            flush()
        progress(done)
    flush()
    if resolution is None or moments.count < 2:
        raise DataError(f"{moments.count} usable picture(s) of {len(order)} in {data}; statistics need 2 or more")
    about = {
        "format": FORMAT,
        "count": moments.count,
        "bad": bad,
        "seed": seed,
        "resolution": list(resolution),
        "data": data,
        "fingerprint": source.fingerprint(),
        "network": network.describe(),
        "longskip": __version__,
    }
    return Statistics(moments.mean, moments.covariance, np.concatenate(kept), about)


class Fidelity:
    """FID and KID of drawn pictures against statistics; pictures are added as they are drawn."""

    def __init__(self, network: FeatureNetwork, statistics: Statistics) -> None:
        self.network, self.statistics = network, statistics
        self._features: list[torch.Tensor] = []
        _torchmetrics()  # before anything is drawn

    def add(self, pictures: np.ndarray) -> None:
        """Drawn pictures, uint8 (B, H, W, 3)."""
        self._features.append(self.network(pictures))

    def result(self, seed: int) -> dict[str, Any]:
        """``fid``, ``kid`` and what they depend on; ``seed`` decides KID's subsets. Two pictures or more."""
        drawn = torch.cat(self._features)
        return {
            "count": len(drawn),
            "fid": frechet_distance(drawn, self.statistics),
            "kid": kernel_distance(drawn, self.statistics, seed),
            "network": self.network.describe(),
            "statistics": self.statistics.describe(),
        }


def frechet_distance(drawn: torch.Tensor, statistics: Statistics) -> dict[str, Any]:
    """``{"value", "warnings"?}``: FID of features (N, D) against statistics; fewer than D + 1 pictures are warned of."""
    count, size = drawn.shape
    metric = _torchmetrics().fid.FrechetInceptionDistance(feature=_AsGiven(size))
    metric.update(drawn.double(), real=False)
    mean, covariance = torch.from_numpy(statistics.mean), torch.from_numpy(statistics.covariance)
    metric.real_features_sum = statistics.count * mean
    metric.real_features_cov_sum = (statistics.count - 1) * covariance + statistics.count * torch.outer(mean, mean)
    metric.real_features_num_samples = torch.tensor(statistics.count)
    result: dict[str, Any] = {"value": float(metric.compute())}
    few = [(n, what) for n, what in ((count, "drawn"), (statistics.count, "real")) if n <= size]
    if few:
        result["warnings"] = [
            f"the covariance of the {what} pictures is rank-deficient: {n} pictures, {size} features; the figure is "
            f"biased upwards and comparable with none of another count"
            for n, what in few
        ]
    return result


def kernel_distance(drawn: torch.Tensor, statistics: Statistics, seed: int) -> dict[str, Any]:
    """``{"mean", "std", "subsets", "subset_size"}``: KID of features (N, D) against the features kept of real pictures.

    Subsets are of ``SUBSET_SIZE``, or of half of the pictures there are, so that they differ; ``std`` is the deviation
    over them, not the error of the mean.
    """
    fewer = min(len(drawn), len(statistics.features))
    size = min(SUBSET_SIZE, max(2, fewer // 2))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)  # that it keeps all features
        metric = _torchmetrics().kid.KernelInceptionDistance(
            feature=_AsGiven(drawn.shape[1]), subsets=SUBSETS, subset_size=size
        )
        metric.update(torch.from_numpy(statistics.features).double(), real=True)
        metric.update(drawn.double(), real=False)
        torch.manual_seed(seed)
        mean, std = metric.compute()
    return {"mean": float(mean), "std": float(std), "subsets": SUBSETS, "subset_size": size}


class _AsGiven(torch.nn.Module):
    """Stands where torchmetrics expects a network: the features are computed already, once for both metrics."""

    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.num_features = n_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def _torchmetrics() -> Any:
    try:
        import torchmetrics.image.fid
        import torchmetrics.image.kid
    except ImportError as error:
        raise ConfigError(f"torchmetrics is not installed: {error}", cure="pip install 'longskip[eval]'") from error
    return torchmetrics.image


def _pixels(resolution: tuple[int, int]) -> str:
    return "x".join(map(str, resolution))
