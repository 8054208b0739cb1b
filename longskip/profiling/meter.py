"""The throughput meter: fed once per step, it gives an interval's totals (a ledger line), its rates and the ETA."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from longskip.errors import ConfigError
from longskip.profiling import hardware
from longskip.profiling.ledger import LedgerLine

_RECENT_INTERVALS = 10


@dataclass(frozen=True, slots=True)
class Interval:
    """Totals over the steps ``(from_step, step]``, over all devices; units as in ``LedgerLine``.

    ``seconds`` is all wall time since the previous interval ended, so that evaluation and checkpoints inside it count.
    """

    from_step: int
    step: int
    images: int
    image_tokens: int
    tokens: int
    seconds: float
    data_wait_seconds: float
    model_flops: int
    hardware_flops: int
    six_nd: int
    mfu: float | None
    hfu: float | None
    devices: int
    device_name: str
    communication_seconds: float | None = None

    def _rate(self, amount: float) -> float:
        return amount / self.seconds if self.seconds > 0 else 0.0

    @property
    def steps_per_second(self) -> float:
        return self._rate(self.step - self.from_step)

    @property
    def images_per_second(self) -> float:
        return self._rate(self.images)

    @property
    def tokens_per_second(self) -> float:
        return self._rate(self.tokens)

    @property
    def flops_per_second(self) -> float:
        """Model FLOP/s over all devices."""
        return self._rate(self.model_flops)

    @property
    def data_wait_share(self) -> float:
        """Share of the wall time spent waiting for data, 0 to 1."""
        return self._rate(self.data_wait_seconds)

    @property
    def communication_share(self) -> float | None:
        """Share of the wall time spent in collectives, 0 to 1; None where it is not measured."""
        return None if self.communication_seconds is None else self._rate(self.communication_seconds)

    def line(self, *, attempt: int, loss: float | None) -> LedgerLine:
        """This interval as a line of the ledger."""
        return LedgerLine(
            attempt=attempt,
            from_step=self.from_step,
            step=self.step,
            images=self.images,
            image_tokens=self.image_tokens,
            tokens=self.tokens,
            seconds=self.seconds,
            data_wait_seconds=self.data_wait_seconds,
            model_flops=self.model_flops,
            hardware_flops=self.hardware_flops,
            six_nd=self.six_nd,
            mfu=self.mfu,
            hfu=self.hfu,
            loss=loss,
            devices=self.devices,
            device_name=self.device_name,
            communication_seconds=self.communication_seconds,
        )


class Meter:
    """Adds up steps until ``interval()`` ends the interval.

    ``device_name`` and ``devices`` say what runs (all alike), ``dtype`` the matmuls' (``fp32 tf32 bf16 fp16``); on a
    device without a row in the hardware table MFU and HFU are None and ``reason`` says why. ``step`` is the step the
    run starts from. All amounts given to ``add`` are global: of all ranks together.
    """

    def __init__(
        self,
        *,
        device_name: str,
        devices: int = 1,
        dtype: str = "bf16",
        step: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if devices < 1:
            raise ConfigError(f"the meter needs at least 1 device, not {devices}", cure="give the number of ranks")
        self.device_name = device_name
        self.devices = devices
        row = hardware.lookup(device_name)
        self.peak_flops: int | None = None if row is None else row.peak(dtype) * devices
        self.reason: str | None = hardware.mfu_reason(device_name)
        self.step = step
        self._clock = clock
        self._recent: deque[tuple[int, float]] = deque(maxlen=_RECENT_INTERVALS)
        self._communication: float | None = None
        self._restart()

    def add(
        self,
        *,
        images: int,
        image_tokens: int,
        tokens: int,
        model_flops: int,
        hardware_flops: int,
        six_nd: int,
        data_wait: float = 0.0,
        communication: float | None = None,
    ) -> None:
        """One finished optimizer step; counts are integers, ``data_wait`` seconds this rank waited for its batches,
        ``communication`` those it stood in collectives since the last one, None where nobody measures them."""
        self.step += 1
        self._images += images
        self._image_tokens += image_tokens
        self._tokens += tokens
        self._model_flops += model_flops
        self._hardware_flops += hardware_flops
        self._six_nd += six_nd
        self._data_wait += data_wait
        if communication is not None:
            self._communication = communication + (self._communication or 0.0)

    def peek(self) -> Interval:
        """The interval so far, which goes on."""
        return self._interval(self._clock())

    def interval(self) -> Interval:
        """Ends the interval and starts the next one at the same instant, so that no time is lost between them."""
        now = self._clock()
        ended = self._interval(now)
        if ended.step > ended.from_step:
            self._recent.append((ended.step - ended.from_step, ended.seconds))
        self._restart(now)
        return ended

    def rewind(self, step: int) -> None:
        """What was measured since the last interval is dropped, and the next one begins at ``step`` now."""
        self.step = step
        self._restart()

    def eta(self, last_step: int) -> float | None:
        """Seconds until ``last_step`` at the pace of the last intervals; None before the first step is measured."""
        running = self._interval(self._clock())
        pairs = [*self._recent, (running.step - running.from_step, running.seconds)]
        steps = sum(count for count, _ in pairs)
        if steps == 0:
            return None
        return max(last_step - self.step, 0) * sum(seconds for _, seconds in pairs) / steps

    def _restart(self, now: float | None = None) -> None:
        self._from_step = self.step
        self._start = self._clock() if now is None else now
        self._images = self._image_tokens = self._tokens = 0
        self._model_flops = self._hardware_flops = self._six_nd = 0
        self._data_wait = 0.0
        self._communication = None

    def _interval(self, now: float) -> Interval:
        seconds = now - self._start
        return Interval(
            from_step=self._from_step,
            step=self.step,
            images=self._images,
            image_tokens=self._image_tokens,
            tokens=self._tokens,
            seconds=seconds,
            data_wait_seconds=self._data_wait,
            model_flops=self._model_flops,
            hardware_flops=self._hardware_flops,
            six_nd=self._six_nd,
            mfu=self._share_of_peak(self._model_flops, seconds),
            hfu=self._share_of_peak(self._hardware_flops, seconds),
            devices=self.devices,
            device_name=self.device_name,
            communication_seconds=self._communication,
        )

    def _share_of_peak(self, flops: int, seconds: float) -> float | None:
        if self.peak_flops is None or seconds <= 0:
            return None
        return flops / (seconds * self.peak_flops)
