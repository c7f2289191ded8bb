"""Gauges: what is true when Prometheus asks. One collector, which reads values that were handed to it."""

from collections.abc import Iterator, Sequence

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from trio_router.telemetry.facts import DeviceFacts, DevicesFacts, FleetFacts, ModelFacts


class StateGauges(Collector):
    """Shows what `show` was given last; called in the thread that renders."""

    def __init__(self) -> None:
        self._fleet: FleetFacts | None = None
        self._devices: DevicesFacts | None = None

    def show(self, fleet: FleetFacts, devices: DevicesFacts) -> None:
        """What `collect` is to show."""
        self._fleet, self._devices = fleet, devices

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """All of it; nothing before `show`."""
        if self._fleet is not None:
            ready = float(self._fleet.phase == "ready")
            yield GaugeMetricFamily("router_ready", "Whether requests are let in: 0 while starting or draining.", ready)
            yield from _queues(self._fleet.models)
            yield from _states(self._fleet.models, self._fleet.states)
            yield from _model_memory(self._fleet.models)
        if self._devices is not None:
            yield from _device_memory(self._devices.devices)
            yield from _device_state(self._devices.devices)


def _queues(models: tuple[ModelFacts, ...]) -> Iterator[GaugeMetricFamily]:
    depth = GaugeMetricFamily("router_queue_depth", "Requests that wait for a slot.", labels=["model"])
    queued = GaugeMetricFamily("router_queued_requests", "The same by priority.", labels=["model", "priority"])
    active = GaugeMetricFamily("router_active_requests", "Requests that have a slot.", labels=["model"])
    slots = GaugeMetricFamily("router_slots", "Slots of models that are ready.", labels=["model", "state"])
    for model in models:
        depth.add_metric([model.alias], model.waiting)
        for priority, waiting in model.waiting_by_priority.items():
            queued.add_metric([model.alias, priority], waiting)
        active.add_metric([model.alias], model.slots_busy)
        slots.add_metric([model.alias, "busy"], model.slots_busy)
        slots.add_metric([model.alias, "idle"], model.slots_idle)
    yield from (depth, queued, active, slots)


def _states(models: tuple[ModelFacts, ...], states: tuple[str, ...]) -> Iterator[GaugeMetricFamily]:
    family = GaugeMetricFamily(
        "router_model_state", "1 for the state a model is in, 0 for the others.", labels=["model", "state"]
    )
    for model in models:
        for state in states:
            family.add_metric([model.alias, state], float(state == model.state))
    yield family


def _model_memory(models: tuple[ModelFacts, ...]) -> Iterator[GaugeMetricFamily]:
    vram = GaugeMetricFamily(
        "router_model_vram_bytes",
        "Device memory of a model: measured where the driver tells, else projected; 0 when it is not in memory.",
        labels=["model"],
    )
    held = GaugeMetricFamily(
        "router_model_device_memory_bytes",
        "What a model's llama-server holds on a device, as the driver says.",
        labels=["model", "device"],
    )
    reserved = GaugeMetricFamily(
        "router_model_reserved_bytes",
        "What is reserved for a model on a device, from before its load until it is gone; `ram` is the host's memory.",
        labels=["model", "device"],
    )
    for model in models:
        vram.add_metric([model.alias], model.vram_bytes)
        for place, size in model.reserved_bytes.items():
            reserved.add_metric([model.alias, place], size)
        for device, size in model.device_bytes.items():
            held.add_metric([model.alias, str(device)], size)
    yield from (vram, held, reserved)


def _device_memory(devices: Sequence[DeviceFacts]) -> Iterator[GaugeMetricFamily]:
    family = GaugeMetricFamily("router_device_memory_bytes", "A device's memory.", labels=["device", "kind"])
    for device in devices:
        for kind, size in (
            ("total", device.total_bytes),
            ("used", device.used_bytes),
            ("free", device.free_bytes),
        ):
            if size is not None:
                family.add_metric([str(device.index), kind], size)
    yield family


def _device_state(devices: Sequence[DeviceFacts]) -> Iterator[GaugeMetricFamily]:
    busy = GaugeMetricFamily("router_device_utilization_ratio", "How busy a device is, 0 to 1.", labels=["device"])
    heat = GaugeMetricFamily("router_device_temperature_celsius", "How hot a device is.", labels=["device"])
    power = GaugeMetricFamily("router_device_power_watts", "What a device draws.", labels=["device"])
    for device in devices:
        label = [str(device.index)]
        if device.utilization_percent is not None:
            busy.add_metric(label, device.utilization_percent / 100)
        if device.temperature_celsius is not None:
            heat.add_metric(label, device.temperature_celsius)
        if device.power_watts is not None:
            power.add_metric(label, device.power_watts)
    yield from (busy, heat, power)
