"""What a server counts, as the text that Prometheus reads (exposition format 0.0.4)."""

from collections import Counter

# Upper ends of the histogram of a request's seconds.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counts of requests, images and batches since the start."""

    def __init__(self):
        self.requests: Counter[tuple[str, int]] = Counter()
        self.images = self.batches = self.largest_batch = 0
        self._at_most = [0] * len(SECONDS)
        self._seconds, self._timed = 0.0, 0

    def answered(self, path: str, status: int, seconds: float) -> None:
        """A request was answered; path: one of the server's own, so that clients cannot make up rows."""
        self.requests[path, status] += 1
        self._seconds += seconds
        self._timed += 1
        for index, end in enumerate(SECONDS):
            self._at_most[index] += seconds <= end

    def drawn(self, count: int) -> None:
        """A batch of `count` images was drawn."""
        self.images += count
        self.batches += 1
        self.largest_batch = max(self.largest_batch, count)

    def text(self, *, waiting: int, clients: int) -> str:
        """All figures; waiting: images in the queue, clients: open connections."""
        lines = _figure("fastcm_requests_total", "counter", "Requests answered, by path and status.")
        lines += [f'fastcm_requests_total{{path="{path}",status="{status}"}} {n}' for (path, status), n in sorted(self.requests.items())]
        for name, kind, what, value in (
            ("fastcm_images_total", "counter", "Images drawn.", self.images),
            ("fastcm_batches_total", "counter", "Batches drawn.", self.batches),
            ("fastcm_largest_batch_images", "gauge", "Images of the largest batch.", self.largest_batch),
            ("fastcm_queue_images", "gauge", "Images that wait for a batch.", waiting),
            ("fastcm_connections", "gauge", "Open connections.", clients),
        ):
            lines += [*_figure(name, kind, what), f"{name} {value}"]
        name = "fastcm_request_seconds"
        lines += _figure(name, "histogram", "Seconds from a request's head to its answer.")
        lines += [f'{name}_bucket{{le="{end}"}} {count}' for end, count in zip(SECONDS, self._at_most, strict=True)]
        lines += [f'{name}_bucket{{le="+Inf"}} {self._timed}', f"{name}_sum {self._seconds:.6f}", f"{name}_count {self._timed}"]
        return "\n".join(lines) + "\n"


def _figure(name: str, kind: str, what: str) -> list[str]:
    return [f"# HELP {name} {what}", f"# TYPE {name} {kind}"]
