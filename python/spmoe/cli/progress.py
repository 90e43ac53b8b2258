"""How far long work is: a bar on a terminal, one line elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import click

from spmoe.reporting.progress import Progress, silent

_PATIENCE_S = 2.0  # without a terminal, work that ends sooner is not spoken of


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Progress]:
    """Yield a callback (description, done, total) that shows progress on standard error."""
    if quiet:
        yield silent
        return
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        line = _Line()
        try:
            yield line.report
        finally:
            line.cancel()
        return
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TextColumn("{task.completed}/{task.total}"),
        progress.TimeElapsedColumn(),
    )
    with progress.Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("", total=None, visible=False)

        def report(description: str, done: int, total: int) -> None:
            bars.update(task, description=description, completed=done, total=total, visible=True)
            if done >= total:
                bars.stop()
            elif not bars.live.is_started:
                bars.start()

        yield report


class _Line:
    """Prints one line about a stage of work that lasts; another total is another stage."""

    def __init__(self) -> None:
        self._timer: threading.Timer | None = None
        self._latest = ""
        self._total = 0

    def report(self, description: str, done: int, total: int) -> None:
        self._latest = f"{description} ({done} of {total})"
        if done < total == self._total:
            return
        self.cancel()
        if done < total:
            self._total = total
            self._timer = threading.Timer(_PATIENCE_S, self._print)
            self._timer.daemon = True
            self._timer.start()

    def cancel(self) -> None:
        self._total = 0
        if self._timer is not None:
            self._timer.cancel()

    def _print(self) -> None:
        click.echo(f"{self._latest} ...", err=True)
