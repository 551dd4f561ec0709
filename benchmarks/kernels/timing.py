"""How long one call takes: in a CUDA graph with its data in the second-level cache, with that cache flushed, or on the CPU."""

import statistics
import time
from collections.abc import Callable

import torch

Quantiles = tuple[float, float, float]
WARMUP_CALLS = 3


def measure(call: Callable[[], object], *, regime: str, seconds: float) -> Quantiles:
    """Returns (p20, p50, p80) in milliseconds of `call`, from about `seconds` of measuring after a warm-up.

    regime: "resident" replays a CUDA graph of many calls, so that launches cost what they cost inside a graph; "flushed" replays one of a
    single call, each time after more than the second-level cache was overwritten; "cpu" times single calls.
    """
    for _ in range(WARMUP_CALLS):
        call()
    if regime == "cpu":
        return _quantiles(_cpu_times(call, seconds))
    torch.cuda.synchronize()
    return _quantiles(_graph_times(call, seconds) if regime == "resident" else _flushed_times(call, seconds))


def regime_of(bytes_moved: int, device: torch.device) -> str:
    """Returns the regime of a case: "resident" where its bytes fit the second-level cache, "flushed" beyond, "cpu" on the CPU."""
    if device.type == "cpu":
        return "cpu"
    return "resident" if bytes_moved <= torch.cuda.get_device_properties(device).L2_cache_size else "flushed"


def launches_of(call: Callable[[], object]) -> int:
    """Returns how many kernels one call launches on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    return sum(1 for event in trace.events() if event.device_type == torch.autograd.DeviceType.CUDA)


def _graph_times(call: Callable[[], object], seconds: float) -> list[float]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        stream.synchronize()
        single = _events(call, stream)
    # About a millisecond of work for each replay, so that the replay's own start does not count.
    calls = max(1, min(200, round(1.0 / max(single, 1e-3))))
    graph = _captured(call, stream, calls)
    times, end = [], time.perf_counter() + seconds
    while len(times) < 10 or time.perf_counter() < end:
        times.append(_events(graph.replay, torch.cuda.current_stream()) / calls)
    return times


def _flushed_times(call: Callable[[], object], seconds: float) -> list[float]:
    # A captured call, as one from the host may take it longer than the flush and the call's kernels take the device: that would be timed.
    graph = _captured(call, torch.cuda.Stream(), 1)
    size = max(256 * 2**20, 4 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)
    flush = torch.empty(size // 4, dtype=torch.int32, device="cuda")
    times, end = [], time.perf_counter() + seconds
    while len(times) < 10 or time.perf_counter() < end:
        flush.zero_()
        times.append(_events(graph.replay, torch.cuda.current_stream()))
    return times


def _captured(call: Callable[[], object], stream: torch.cuda.Stream, calls: int) -> torch.cuda.CUDAGraph:
    """A graph of this many calls, captured on `stream` and replayed once."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _events(call: Callable[[], object], stream: torch.cuda.Stream) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record(stream)
    call()
    end.record(stream)
    end.synchronize()
    return start.elapsed_time(end)


def _cpu_times(call: Callable[[], object], seconds: float) -> list[float]:
    times, end = [], time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def _quantiles(times: list[float]) -> Quantiles:
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return fifths[0], statistics.median(times), fifths[3]
