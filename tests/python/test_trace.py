"""The Chrome trace: every span an event in its named track."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import spmoe
from spmoe.reporting.trace import Phase, write_trace

TRACKS = ["draft", "verify", "compute", "wait", "link: demand", "link: prefetch"]
PROMPT = "Once upon a time there was a disk"

Span = tuple[str, int, int | None, float, float, int]
Run = tuple[float, list[Span], list[Phase], float]  # start, both kinds, end


def read(path: Path) -> list[dict[str, Any]]:
    trace = json.loads(path.read_text(), parse_constant=pytest.fail)  # chrome knows no NaN
    assert trace["displayTimeUnit"] == "ms"
    events: list[dict[str, Any]] = trace["traceEvents"]
    return events


def names(events: list[dict[str, Any]]) -> dict[int, str]:
    """Row of the picture -> its name."""
    found = [event for event in events if event["name"] == "thread_name"]
    return {event["tid"]: event["args"]["name"] for event in found}


class TestFile:
    PHASES = (Phase("draft", "4 tokens", 10.0, 10.5), Phase("verify", "2 accepted", 10.5, 11.5))
    SPANS: tuple[Span, ...] = (
        ("demand", 0, 7, 10.5, 10.75, 3),
        ("wait", 0, None, 10.5, 10.75, 3),
        ("compute", 0, None, 10.75, 11.0, 2),
        ("prefetch", 1, 2, 10.75, 11.25, 1),
    )

    @pytest.fixture
    def events(self, tmp_path: Path) -> list[dict[str, Any]]:
        write_trace(tmp_path / "trace.json", self.PHASES, self.SPANS)
        return read(tmp_path / "trace.json")

    def test_every_track_is_named_once_from_top_to_bottom(
        self, events: list[dict[str, Any]]
    ) -> None:
        assert [event["tid"] for event in events if event["name"] == "thread_name"] == [*range(6)]
        assert list(names(events).values()) == TRACKS
        (process,) = [event for event in events if event["name"] == "process_name"]
        assert process["args"] == {"name": "spmoe"}

    def test_every_span_is_one_event_in_its_track_in_microseconds(
        self, events: list[dict[str, Any]]
    ) -> None:
        tracks = names(events)
        assert [
            (tracks[event["tid"]], event["name"], event["ts"], event["dur"])
            for event in events
            if event["ph"] == "X"
        ] == [
            ("draft", "4 tokens", 10.0e6, 0.5e6),
            ("verify", "2 accepted", 10.5e6, 1.0e6),
            ("link: demand", "L0 expert 7", 10.5e6, 0.25e6),
            ("wait", "layer 0", 10.5e6, 0.25e6),
            ("compute", "layer 0", 10.75e6, 0.25e6),
            ("link: prefetch", "L1 expert 2", 10.75e6, 0.5e6),
        ]

    def test_the_depth_of_the_queue_is_a_counter(self, events: list[dict[str, Any]]) -> None:
        counters = [event for event in events if event["ph"] == "C"]
        assert {event["name"] for event in counters} == {"queue depth"}
        assert [(event["ts"], event["args"]["fills"]) for event in counters] == [
            (10.75e6, 3),
            (10.75e6, 3),
            (11.0e6, 2),
            (11.25e6, 1),
        ]

    def test_all_events_are_of_one_process(self, events: list[dict[str, Any]]) -> None:
        assert {event["pid"] for event in events} == {1}

    def test_nothing_done_is_a_trace_of_empty_tracks(self, tmp_path: Path) -> None:
        write_trace(tmp_path / "empty.json", [], [])
        assert {event["ph"] for event in read(tmp_path / "empty.json")} == {"M"}


@pytest.fixture(scope="module")
def run(target_path: Path) -> Run:
    with spmoe.load(
        target_path, target_path, expert_memory="50%", policy="horizon", trace_spans=100_000
    ) as engine:
        start = time.perf_counter()
        engine.generate(PROMPT, max_new_tokens=16)
        end = time.perf_counter()
        return start, engine.runtime.spans(), engine.phases, end


class TestRuntime:
    """Spans of a real run."""

    def test_spans_lie_inside_the_run(self, run: Run) -> None:
        start, spans, phases, end = run
        assert {track for track, *_ in spans} >= {"compute", "demand"}
        for track, layer, expert, span_start, span_end, depth in spans:
            assert start <= span_start <= span_end <= end, (track, layer, expert)
            assert depth >= 0
            assert (expert is None) == (track in ("compute", "wait"))
        for phase in phases:
            assert start <= phase.start_s <= phase.end_s <= end

    @pytest.mark.parametrize("track", ["compute", "wait"])
    def test_a_layer_at_a_time_is_computed_or_waited_for(self, run: Run, track: str) -> None:
        spans = sorted(span for span in run[1] if span[0] == track)
        times = sorted((start, end) for _, _, _, start, end, _ in spans)
        assert all(before[1] <= after[0] for before, after in pairwise(times))

    def test_layers_are_computed_inside_verifications(self, run: Run) -> None:
        _, spans, phases, _ = run
        verifications = [phase for phase in phases if phase.track == "verify"]
        for track, layer, _, start, end, _ in spans:
            if track == "compute":
                inside = [p for p in verifications if p.start_s <= start and end <= p.end_s]
                assert len(inside) == 1, layer

    def test_drafting_ends_where_verification_begins(self, run: Run) -> None:
        phases = run[2]
        assert [phase.track for phase in phases] == ["draft", "verify"] * (len(phases) // 2)
        for before, after in pairwise(phases):
            assert before.end_s <= after.start_s + 1e-9

    def test_it_can_be_written(self, run: Run, tmp_path: Path) -> None:
        _, spans, phases, _ = run
        write_trace(tmp_path / "trace.json", phases, spans)
        events = read(tmp_path / "trace.json")
        drawn = [event for event in events if event["ph"] == "X"]
        assert len(drawn) == len(spans) + len(phases)
        assert all(event["dur"] >= 0 for event in drawn)

    def test_only_so_many_of_the_latest_are_kept(self, target_path: Path) -> None:
        with spmoe.load(target_path, expert_memory="50%", trace_spans=100) as engine:
            engine.generate(PROMPT, max_new_tokens=64)
            spans = engine.runtime.spans()
            assert len(spans) == 100
            middle = time.perf_counter()
            engine.generate(PROMPT, max_new_tokens=64)
            assert all(span[3] >= middle for span in engine.runtime.spans())

    def test_without_being_asked_none_are_kept(self, target_path: Path) -> None:
        with spmoe.load(target_path, expert_memory="50%") as engine:
            engine.generate(PROMPT, max_new_tokens=4)
            assert engine.runtime.spans() == []
            assert engine.phases == []
