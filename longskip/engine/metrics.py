"""What a run says of itself while it trains: metrics.jsonl, TensorBoard, a bar on a terminal and plain lines elsewhere.

Only rank 0 writes. Names are torchtitan's (``loss/global_avg``, ``time/data_loading(%)``, ``mfu(%)``).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from longskip.engine.quarantine import told
from longskip.engine.runs import append_json, tolerant
from longskip.profiling.meter import Interval

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

HISTORY = 10
"""Lines of a whole run that stay on a terminal above its bar."""


def format_eta(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _figure(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


class Metrics:
    """Writer of a run's metrics; on other ranks than 0 every call does nothing."""

    def __init__(
        self, run: Path, *, main: bool, attempt: int, steps: int, start: int, tensorboard: bool, memory: str = "max_rss"
    ) -> None:
        """``memory``: what the loop's peak bytes are, ``max_reserved`` of a GPU or ``max_rss`` of a process."""
        self.run, self.main, self.attempt, self.steps, self.memory = run, main, attempt, steps, memory
        self._board: Any = None
        self._with_board = tensorboard
        self._bar: _Bar | None = None
        self._log: TextIO | None = None
        self.loss: float | None = None  # of the last interval that had a finite one
        self._kept = start * HISTORY // steps  # tenths of the run that a line stands above the bar for
        if not main:
            return
        (run / "logs").mkdir(parents=True, exist_ok=True)
        self._log = open(run / "logs" / "rank-0.log", "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        self._open_board(start)
        # Whoever pipes the output wants its lines, not a bar beside them.
        if sys.stderr.isatty() and sys.stdout.isatty():
            self._bar = _Bar(run.name, steps, start)

    def _open_board(self, start: int) -> None:
        if self._with_board:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.run / "events"), purge_step=start + 1)

    def rewind(self, attempt: int, step: int) -> None:
        """Lines from now on are of ``attempt``, which goes on from ``step``; TensorBoard drops what lies past it."""
        self.attempt = attempt
        if not self.main:
            return
        if self._board is not None:
            self._board.close()
        self._open_board(step)
        self._kept = step * HISTORY // self.steps
        self.reached(step)

    def reached(self, step: int) -> None:
        """The bar is at ``step``."""
        if self._bar is not None:
            self._bar.line.step = step

    def say(self, text: str) -> None:
        """A line for people: to the run's log and, where there is no bar, to standard output."""
        if not self.main:
            return
        assert self._log is not None
        with tolerant("logs/rank-0.log"):
            self._log.write(f"{time.strftime('%H:%M:%S')} {text}\n")
        if self._bar is not None:
            self._bar.say(text)
        else:
            print(text, flush=True)

    def end_line(self, *lines: str) -> None:
        """What is said last of all: the bar stays as it is, above it."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        for line in lines:
            self.say(line)

    def interval(self, ended: Interval, values: dict[str, Any], eta: float | None) -> None:
        """One logging interval: rates from the meter, ``values`` (loss, lr, norm, peak bytes per rank) from the loop.

        Loss and norm are None, and not in the line, where no step of the interval had a finite one.
        """
        if not self.main:
            return
        known = {"loss/global_avg": values["loss"], "grad_norm": values["grad_norm"]}
        line = {name: value for name, value in known.items() if value is not None} | {
            "lr": values["lr"],
            "images_per_second": ended.images_per_second,
            "tokens_per_second": ended.tokens_per_second,
            "flops_per_second": ended.flops_per_second,
            "time/data_loading(%)": 100 * ended.data_wait_share,
        }
        if ended.communication_share is not None:
            line["time/communication(%)"] = 100 * ended.communication_share
        if ended.mfu is not None and ended.hfu is not None:
            line |= {"mfu(%)": 100 * ended.mfu, "hfu(%)": 100 * ended.hfu}
        peaks = [round(peak / 2**30, 3) for peak in values["peaks"]]
        line |= {f"memory/{self.memory}(GiB)": max(peaks), "memory/per_rank(GiB)": peaks}
        spent, six_nd = values["model_flops"], values["six_nd"]  # committed: every step once
        line |= {"flops/model": spent, "flops/6nd": six_nd, "flops/model_over_6nd": spent / six_nd}
        skipped = {"skipped_steps": values["skipped"]} if values.get("skipped") else {}
        reasons = {f"bad/{reason}": count for reason, count in values.get("bad_reasons", {}).items()}
        self.record(ended.step, line | {"images": values["images"], "bad_samples": values["bad"]} | skipped | reasons)
        self.loss = self.loss if values["loss"] is None else values["loss"]
        first = [f"loss {_figure(values['loss'], 4)}"]
        rate = f"{ended.images_per_second:.{0 if ended.images_per_second >= 10 else 2}f} images/s"
        bad = told(values.get("bad_reasons", {}))
        inside = ended.communication_share is not None and ended.devices > 1
        rest = [
            f"lr {values['lr']:.2e}",
            f"norm {_figure(values['grad_norm'], 3)}",
            f"data {100 * ended.data_wait_share:.0f}%",
            *([f"comm {100 * (ended.communication_share or 0):.0f}%"] if inside else []),
            f"{max(peaks):.1f} GiB",
            *([f"mfu {100 * ended.mfu:.1f}%"] if ended.mfu is not None else []),
            *([f"bad: {bad}"] if bad else []),
            f"{ended.tokens_per_second:.0f} tokens/s",
            f"C {spent:.2e} ({spent / six_nd:.3f} of 6ND)",
        ]
        place = f"step {ended.step}/{self.steps}"
        first += [f"eta {format_eta(eta)}", rate]
        if self._bar is None:
            self.say("  ".join([place, *first, *rest]))
            return
        assert self._log is not None
        with tolerant("logs/rank-0.log"):
            self._log.write(f"{time.strftime('%H:%M:%S')} {'  '.join([place, *first, *rest])}\n")
        self._bar.line.first, self._bar.line.rest = first, rest
        self.reached(ended.step)
        tenth = ended.step * HISTORY // self.steps
        if tenth > self._kept:
            self._kept = tenth
            self._bar.say(fitting([place, *first], rest, self._bar.width))

    def record(self, step: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and every number of it to TensorBoard."""
        if not self.main:
            return
        with tolerant("metrics.jsonl"):
            append_json(
                self.run / "metrics.jsonl", {"step": step, "attempt": self.attempt, "time": time.time()} | values
            )
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._board is not None:
            self._board.close()
        if self._log is not None:
            with tolerant("logs/rank-0.log"):
                self._log.close()


def fitting(first: Sequence[str], rest: Sequence[str], width: int) -> str:
    """``first``, and as many of ``rest`` from the left as a line of ``width`` characters has place for."""
    text = "  ".join(first)
    for part in rest:
        if len(text) + 2 + len(part) > width:
            break
        text += f"  {part}"
    return text


@dataclass
class Line:
    """The bar's one line: run, step and ``first`` always; the bar itself and ``rest`` as the terminal has place for.

    On a terminal too narrow even for those, the run's name is cut, and after it the end of the line.
    """

    name: str
    step: int
    steps: int
    first: list[str] = field(default_factory=list)
    rest: list[str] = field(default_factory=list)

    def text(self, width: int) -> str:
        """The line for a terminal of ``width`` characters."""
        place = f"{self.step}/{self.steps}"
        needed = "  ".join([place, *self.first])
        free = width - len(needed) - 2
        name = self.name if len(self.name) <= free else self.name[: max(0, free - 1)] + "…" if free > 1 else ""
        length = min(24, max(8, width // 8))
        parts = [name] if name else []
        if len(name) + 2 + length <= free:
            done = length if self.step >= self.steps else length * self.step // self.steps
            parts.append("━" * done + "╌" * (length - done))
        return fitting([*parts, place, *self.first], self.rest, width)[:width]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        text = Text(self.text(options.max_width), no_wrap=True, overflow="crop")
        text.highlight_regex("^.*?(?=  )", "bold")
        text.highlight_regex("━+", "magenta")
        text.highlight_regex("╌+", "dim")
        yield text


class _Bar:
    """A line at the foot of the terminal, and what is said above it."""

    def __init__(self, name: str, steps: int, start: int) -> None:
        from rich.console import Console
        from rich.live import Live

        self.line = Line(name, start, steps)
        self._console = Console(stderr=True)
        self._live = Live(self.line, console=self._console, refresh_per_second=4)
        self._live.start()

    @property
    def width(self) -> int:
        return self._console.width

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)

    def stop(self) -> None:
        self._live.stop()
