"""The timeline of one iteration, out of the trace that a run writes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tandem.engine.timeline import Span, colour_of_phases, figure, newest_iteration
from tandem.engine.trace import TraceWriter, part_path, read_part

SECOND = 10**9


def write_trace(run_dir: Path, spans: Mapping[int, Sequence[tuple[str, float, float]]]) -> None:
    """(phase, begin, end) in seconds, of each rank, in the order in which they end, as a run writes them."""
    for rank, found in spans.items():
        writer = TraceWriter(run_dir / "trace", rank)
        for phase, begin, end in found:
            writer.complete(phase, int(begin * SECOND), int(end * SECOND), {})
        writer.counter("bytes", {"device": 1.0})
        writer.flush()


def test_the_newest_whole_iteration_is_cut_out_with_what_contains_others_first(tmp_path: Path) -> None:
    before = [("rollout", 0, 4), ("log", 4, 5)]
    whole = [("swap", 5, 6), ("grade", 7, 7.5), ("grade", 7.6, 7.6001), ("rollout", 6, 8), ("train", 8, 14), ("log", 14, 15)]
    unfinished = [("swap", 15, 16), ("rollout", 16, 19)]
    write_trace(tmp_path, {0: before + whole + unfinished})
    [spans] = newest_iteration(tmp_path).values()
    found = [(span.phase, round(span.start_s, 4), round(span.duration_s, 4)) for span in spans]  # microseconds of Unix time are rounded
    assert found == [("train", 3, 6), ("rollout", 1, 2), ("swap", 0, 1), ("log", 9, 1), ("grade", 2, 0.5)]


def test_other_ranks_are_cut_to_rank_0s_iteration(tmp_path: Path) -> None:
    # Both are written at once, so that their clocks agree to within this process's two readings of them.
    write_trace(tmp_path, {0: [("log", 0, 10), ("train", 10, 20), ("log", 20, 30)], 1: [("train", 5, 15), ("log", 15, 45)]})
    found = newest_iteration(tmp_path)
    assert [(span.phase, round(span.start_s, 1), round(span.duration_s, 1)) for span in found[1]] == [("log", 5, 15), ("train", 0, 5)]


@pytest.mark.parametrize("spans", [[], [("rollout", 0, 4)], [("rollout", 0, 4), ("log", 4, 5), ("rollout", 5, 9)]])
def test_there_is_none_before_two_iterations_have_ended(tmp_path: Path, spans: list[tuple[str, float, float]]) -> None:
    assert newest_iteration(tmp_path) == {}
    write_trace(tmp_path, {0: spans})
    assert newest_iteration(tmp_path) == {}
    assert figure({}) is None


def test_bars_over_bars_keep_the_order_of_the_legend() -> None:
    ranks = {0: [Span(phase="rollout", start_s=1, duration_s=5), Span(phase="swap", start_s=0, duration_s=1)]}
    ranks[1] = [*ranks[0], Span(phase="grade", start_s=2, duration_s=0.5)]
    drawn = figure(ranks)
    assert drawn is not None
    assert list(colour_of_phases(ranks)) == ["swap", "rollout", "grade"]
    assert [(bar["name"], bar["y"], bar["base"], bar["x"]) for bar in drawn.data] == [
        ("rollout", ["rank 0", "rank 1"], [1, 1], [5, 5]),
        ("swap", ["rank 0", "rank 1"], [0, 0], [1, 1]),
        ("grade", ["rank 1"], [2], [0.5]),
    ]
    assert len({bar["marker"]["color"] for bar in drawn.data}) == 3


def test_the_end_of_a_part_holds_whole_events_only(tmp_path: Path) -> None:
    write_trace(tmp_path, {0: [(f"phase{i}", i, i + 1) for i in range(50)]})
    path = part_path(tmp_path / "trace", 0)
    everything = list(read_part(path))
    with path.open("a") as file:
        file.write('{"ph": "X", "na')  # killed while it wrote
    assert list(read_part(path)) == everything
    some = list(read_part(path, last_bytes=1000))
    assert 0 < len(some) < len(everything)
    assert some == everything[-len(some) :]
    assert list(read_part(path, last_bytes=10**6)) == everything
