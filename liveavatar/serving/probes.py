"""What is read off the process, the disk and the GPUs: at each scrape, except the event loop's lag."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

from liveavatar.serving.metrics import Metrics

LAG_SECONDS = 0.5  # between looks at the event loop


def watch_process(metrics: Metrics, folder: str | Path) -> None:
    """Memory of this process, tasks of its running event loop, room on the disk of `folder`."""
    process = psutil.Process()

    def tasks() -> Iterable:
        try:
            return [(("head",), len(asyncio.all_tasks()))]
        except RuntimeError:  # scraped outside the loop: it has no say here
            return []

    def disk() -> Iterable:
        usage = shutil.disk_usage(folder)
        return [((), usage.free / usage.total)]

    metrics.watch("process_resident_bytes", lambda: [(("head",), process.memory_info().rss)])
    metrics.watch("process_open_tasks", tasks)
    metrics.watch("disk_free_ratio", disk)


class LoopProbe:
    """How late the event loop comes when it said when it would. lag: the last seconds seen, 0.0 at first (/livez asks)."""

    def __init__(self, metrics: Metrics, *, clock: Callable[[], float] = time.monotonic, sleep: Callable = asyncio.sleep):
        self.lag = 0.0
        self._metrics, self._clock, self._sleep = metrics, clock, sleep

    async def run(self) -> None:
        """Look for ever; cancel to end."""
        while True:
            asked = self._clock()
            await self._sleep(LAG_SECONDS)
            self.lag = max(0.0, self._clock() - asked - LAG_SECONDS)
            self._metrics.observe("event_loop_lag_seconds", self.lag, "head")


# ---------------------------------------------------------------- GPUs


class Gpus:
    """The GPUs of this host through NVML. nvml: the module pynvml of nvidia-ml-py, initialised."""

    def __init__(self, nvml):
        self._nvml, self._events = nvml, nvml.nvmlEventSetCreate()
        self._handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        self._faults = [self._told_of_faults(handle) for handle in self._handles]
        self.names = tuple(str(index) for index in range(len(self._handles)))

    def _told_of_faults(self, handle) -> bool:
        try:
            self._nvml.nvmlDeviceRegisterEvents(handle, self._nvml.nvmlEventTypeXidCriticalError, self._events)
        except self._nvml.NVMLError_NotSupported:
            return False
        return True

    def watch(self, metrics: Metrics) -> None:
        """Export what the driver supports; a GPU that cannot tell something has no such sample. Faults are asked for at each scrape."""
        n = self._nvml

        def utilization() -> list:
            self.faults(metrics)
            return self._each(lambda handle: n.nvmlDeviceGetUtilizationRates(handle).gpu / 100)

        metrics.watch("gpu_utilization_ratio", utilization)
        for name, read in {
            "gpu_memory_used_bytes": lambda handle: n.nvmlDeviceGetMemoryInfo(handle).used,
            "gpu_temperature_celsius": lambda handle: n.nvmlDeviceGetTemperature(handle, n.NVML_TEMPERATURE_GPU),
            "gpu_power_watts": lambda handle: n.nvmlDeviceGetPowerUsage(handle) / 1000,
        }.items():
            metrics.watch(name, lambda read=read: self._each(read))
        for name, told in zip(self.names, self._faults):
            if told:
                metrics.count("gpu_xid_errors_total", 0, name)

    def _each(self, read: Callable) -> list:
        found = []
        for name, handle in zip(self.names, self._handles):
            try:
                found.append(((name,), read(handle)))
            except self._nvml.NVMLError_NotSupported:
                continue
        return found

    def faults(self, metrics: Metrics) -> int:
        """Count the Xid errors since the last call; returns how many, at once."""
        seen = 0
        while any(self._faults):
            try:
                event = self._nvml.nvmlEventSetWait_v2(self._events, 0)
            except self._nvml.NVMLError_Timeout:
                break
            device = next((name for name, handle in zip(self.names, self._handles) if self._same(handle, event.device)), None)
            if device is not None:
                metrics.count("gpu_xid_errors_total", 1, device)
                seen += 1
        return seen

    def _same(self, one, other) -> bool:
        return self._nvml.nvmlDeviceGetIndex(one) == self._nvml.nvmlDeviceGetIndex(other)

    def close(self) -> None:
        self._nvml.nvmlEventSetFree(self._events)
        self._nvml.nvmlShutdown()


def find_gpus() -> Gpus | None:
    """The GPUs here, or None where nvidia-ml-py or a driver is missing: then the gpu_* metrics are not exported."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return None
    return Gpus(pynvml)
