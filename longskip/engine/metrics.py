"""What a run says of itself while it trains: metrics.jsonl, TensorBoard, a bar on a terminal and plain lines elsewhere.

Only rank 0 writes. Names are torchtitan's (``loss/global_avg``, ``time/data_loading(%)``, ``mfu(%)``).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, TextIO

from longskip.engine.quarantine import told
from longskip.engine.runs import append_json, tolerant
from longskip.profiling.meter import Interval


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
        self._bar: Any = None
        self._log: TextIO | None = None
        if not main:
            return
        (run / "logs").mkdir(parents=True, exist_ok=True)
        self._log = open(run / "logs" / "rank-0.log", "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        self._open_board(start)
        if sys.stderr.isatty():
            self._bar = _bar(run.name, steps, start)

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
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step)

    def say(self, text: str) -> None:
        """A line for people: to the run's log and, where there is no bar, to standard output."""
        if not self.main:
            return
        assert self._log is not None
        with tolerant("logs/rank-0.log"):
            self._log.write(f"{time.strftime('%H:%M:%S')} {text}\n")
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, flush=True)

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
        bad = f"  bad: {told(values['bad_reasons'])}" if reasons else ""
        inside = ""
        if ended.communication_share is not None and ended.devices > 1:
            inside = f"  comm {100 * ended.communication_share:.0f}%"
        mfu = f"  mfu {100 * ended.mfu:.1f}%" if ended.mfu is not None else ""
        text = (
            f"step {ended.step}/{self.steps}  loss {_figure(values['loss'], 4)}  lr {values['lr']:.2e}  "
            f"norm {_figure(values['grad_norm'], 3)}  {ended.images_per_second:.0f} images/s  "
            f"{ended.tokens_per_second:.0f} tokens/s  "
            f"data {100 * ended.data_wait_share:.0f}%{inside}  {max(peaks):.1f} GiB{mfu}{bad}  "
            f"C {spent:.2e} ({spent / six_nd:.3f} of 6ND)  eta {format_eta(eta)}"
        )
        if self._bar is not None:
            assert self._log is not None
            with tolerant("logs/rank-0.log"):
                self._log.write(text + "\n")
            self._bar.update(self._bar.task_ids[0], completed=ended.step, info=text.split("  ", 1)[1])
        else:
            self.say(text)

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


def _bar(name: str, steps: int, start: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    bar = Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[info]}"),
        console=Console(stderr=True),
        refresh_per_second=4,
    )
    bar.add_task(name, total=steps, completed=start, info="")
    bar.start()
    return bar
