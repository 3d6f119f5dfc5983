"""Ray Serve applications: one with the HTTP ingress, and one for each model."""

from __future__ import annotations

import contextlib
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calumma.serve.deploy.ingress import Ingress
from calumma.serve.deploy.naming import APPLICATION_PREFIX, CODER, ENGINE, INGRESS, watcher_application
from calumma.serve.deploy.preparation import ServeError, nodes_of_cluster, require_room
from calumma.serve.replica.tensor_parallel import bundle
from calumma.serve.settings import ModelSettings, ServeSettings

if TYPE_CHECKING:
    from ray.serve import Application

UNLIMITED = 1 << 20
NEVER = 1e9  # seconds


@dataclass(frozen=True)
class ModelApplication:
    """A model that is deployed."""

    application: str  # its name on Ray Serve
    source: str  # path or URI of the model directory


def start_model(model: ModelSettings, source: str, endpoint: str) -> ModelApplication:
    """Start a model as an application of its own, beside whatever runs, and wait until it is up. Its name is new each
    time. Raises ServeError, and leaves nothing of it behind."""
    from ray import serve

    try:
        require_room(model, nodes_of_cluster())
    except ValueError as error:
        raise ServeError(str(error)) from error
    application = f"{APPLICATION_PREFIX}{endpoint}:{model.name}:{secrets.token_hex(4)}"
    try:
        serve.run(build_model(model, source), name=application, route_prefix=None)
    except Exception as error:
        reason = failure_reason(application) or str(error)
        with contextlib.suppress(Exception):
            serve.delete(application)
        raise ServeError(f"the model {model.model} did not come up: {reason}") from error
    return ModelApplication(application, source)


def build_model(model: ModelSettings, source: str) -> Application:
    """A model's application, not yet deployed: engine replicas, and image coders where the settings ask for them."""
    from ray import serve
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

    from calumma.serve.deploy.scaling import QueuedTokensPolicy
    from calumma.serve.replica.deployment import EngineDeployment
    from calumma.serve.replica.image_coder import ImageCoderDeployment

    each = bundle(model)
    several: dict[str, Any] = {
        "placement_group_bundles": [each] * model.tensor_parallel,
        "placement_group_strategy": "STRICT_PACK",
    }
    engine = serve.deployment(
        name=ENGINE,
        ray_actor_options={"num_cpus": each["CPU"], "num_gpus": each.get("GPU", 0)},
        **(several if model.tensor_parallel > 1 else {}),
        # Those beyond the engine's batch wait in its own line, where tenants take turns; Ray's is in order of arrival.
        max_ongoing_requests=model.max_sequences + 2 * model.max_queued,
        max_queued_requests=model.max_queued,
        autoscaling_config=AutoscalingConfig(
            min_replicas=model.min_replicas,
            max_replicas=model.max_replicas,
            target_ongoing_requests=model.target_ongoing_requests,
            upscale_delay_s=model.busy_seconds,
            downscale_delay_s=model.idle_seconds,
            look_back_period_s=max(11.0, min(30.0, model.busy_seconds)),
            policy=AutoscalingPolicy(
                policy_function=QueuedTokensPolicy,
                policy_kwargs={
                    "requests_per_replica": model.target_ongoing_requests,
                    "tokens_per_replica": model.queued_tokens,
                },
            ),
        ),
        request_router_config={
            "request_router_class": "calumma.serve.deploy.routing.PrefixRouter",
            "request_routing_stats_period_s": NEVER,  # the ingress asks by itself (control.py)
        },
        max_constructor_retry_count=2,
        health_check_period_s=2,  # a replica is replaced after three failed checks
        health_check_timeout_s=120,
        graceful_shutdown_timeout_s=model.drain_seconds,
        graceful_shutdown_wait_loop_s=1.0,
    )(EngineDeployment)
    if not model.image_coders:
        return engine.bind(model, source)
    coder = serve.deployment(
        name=CODER,
        ray_actor_options={"num_cpus": model.cpus_per_replica, "num_gpus": model.image_coder_gpus},
        max_ongoing_requests=64,
        autoscaling_config=AutoscalingConfig(
            min_replicas=1,
            max_replicas=model.image_coders,
            target_ongoing_requests=8,
            upscale_delay_s=model.busy_seconds,
            downscale_delay_s=model.idle_seconds,
        ),
        health_check_timeout_s=120,
        graceful_shutdown_timeout_s=model.drain_seconds,
        graceful_shutdown_wait_loop_s=1.0,
    )(ImageCoderDeployment)
    return engine.bind(model, source, coder.bind(model, source))


def build_ingress(settings: ServeSettings, table: dict[str, str]) -> Application:
    """The endpoint's application, not yet deployed. table: the application of each model."""
    from ray import serve

    ingress = serve.deployment(
        name=INGRESS,
        num_replicas=settings.ingress_replicas,
        ray_actor_options={"num_cpus": settings.ingress_cpus},
        max_ongoing_requests=UNLIMITED,  # the HTTP application enforces limits, and probes and control have none
        health_check_timeout_s=120,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        graceful_shutdown_wait_loop_s=1.0,
    )(serve.ingress()(Ingress))
    return ingress.bind(settings, table, watcher_application(settings.name) if settings.watch_seconds else None)


def failure_reason(application: str) -> str:
    """What Ray Serve reports of an application that did not start: the last line, which is the exception's; or ""."""
    from ray import serve

    with contextlib.suppress(Exception):
        overview = serve.status().applications[application]
        messages = [d.message for d in overview.deployments.values() if d.message] or [overview.message]
        return "; ".join(message.strip().splitlines()[-1] for message in messages if message.strip())
    return ""
