"""The CPU's counterpart of ``timing.GpuMeter``: wall time, and what the allocator hands out."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable

import torch
from timing import Sample

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler says on stderr that it starts and stops


class CpuMeter:
    """Time by the clock; memory by the profiler's record of every allocation and release."""

    def time(self, run: Callable[[], object]) -> Sample:
        """Runs it once."""
        start = time.perf_counter()
        run()
        ms = (time.perf_counter() - start) * 1e3
        return Sample(ms, ms)

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """Runs it once; the most memory that it took above what was taken before."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            run()
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        return max(itertools.accumulate(sizes), default=0)
