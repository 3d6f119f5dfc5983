"""A system from its specification: engines in this process or on the cluster, or an endpoint's client."""

from __future__ import annotations

from calumma.platform.evaluation.systems.prompts import System, Told
from calumma.platform.evaluation.systems.specification import SystemSpecification
from calumma.platform.specification import Resources, Tracking


def open_system(
    spec: SystemSpecification, resources: Resources, tracking: Tracking, told: Told | None = None
) -> System:
    """`resources.workers` 0 answers in this process, without Ray. `told` hears when an endpoint is waited for.

    Raises UnusableSystem, SpecificationError, StorageError, TrackingError.
    """
    if spec.url is not None:
        from calumma.platform.evaluation.systems.endpoint import EndpointSystem

        return EndpointSystem(spec, told)
    from calumma.platform.evaluation.systems.engines import ClusterSystem, LocalSystem

    if resources.max_workers == 0:
        return LocalSystem(spec, tracking)
    return ClusterSystem(spec, tracking, resources)
