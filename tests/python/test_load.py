"""`spmoe.load`: settings, steps, memory."""

from __future__ import annotations

from pathlib import Path

import spmoe


def test_every_step_of_loading_is_reported_and_timed(target_path: Path) -> None:
    reported: list[tuple[str, int, int]] = []
    with spmoe.load(
        target_path,
        target_path,
        expert_memory="50%",
        progress=lambda *step: reported.append(step),
    ) as engine:
        assert set(engine.load_seconds) == {"target", "draft", "costs", "expert memory"}
        assert all(seconds > 0 for seconds in engine.load_seconds.values())
    assert [done for _, done, total in reported if total == 4] == [0, 1, 2, 3, 4]
    with spmoe.load(target_path, expert_memory="50%", policy="on-demand") as engine:
        assert set(engine.load_seconds) == {"target", "expert memory"}
