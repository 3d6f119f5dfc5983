"""What Ray Serve is told of a model and of the ingress; nothing is deployed."""

from __future__ import annotations

from typing import Any

import pytest

from calumma.serve.deploy.applications import UNLIMITED, build_ingress, build_model
from calumma.serve.deploy.naming import CODER, ENGINE, INGRESS
from calumma.serve.settings import ModelSettings, ServeSettings


def deployment(application: Any) -> Any:
    return application._bound_deployment


def test_a_models_replicas_are_scaled_and_drained_as_its_settings_say() -> None:
    settings = ModelSettings(
        model="m", min_replicas=2, max_replicas=5, busy_seconds=7, idle_seconds=90, max_sequences=10, max_queued=33,
        drain_seconds=44, queued_tokens=777, cpus_per_replica=3, gpus_per_replica=1,
    )  # fmt: skip
    engine = deployment(build_model(settings, "/models/m"))
    config, scaling = engine._deployment_config, engine._deployment_config.autoscaling_config
    assert engine.name == ENGINE
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 5, 5)
    assert (scaling.upscale_delay_s, scaling.downscale_delay_s) == (7, 90)
    assert scaling.policy.policy_kwargs == {"requests_per_replica": 5, "tokens_per_replica": 777}
    assert (config.max_ongoing_requests, config.max_queued_requests) == (10 + 2 * 33, 33)
    assert config.graceful_shutdown_timeout_s == 44
    assert engine.ray_actor_options["num_cpus"] == 3
    assert engine.ray_actor_options["num_gpus"] == 1
    assert engine.init_args == (settings, "/models/m")
    assert config.request_router_config.get_request_router_class().__name__ == "PrefixRouter"


def test_ranks_of_a_replica_are_placed_on_one_node() -> None:
    settings = ModelSettings(model="m", tensor_parallel=2, gpus_per_replica=2, cpus_per_replica=4)
    replicas = deployment(build_model(settings, "/models/m"))._replica_config
    assert replicas.placement_group_bundles == [{"CPU": 2, "GPU": 1}] * 2
    assert replicas.placement_group_strategy == "STRICT_PACK"


def test_image_coders_are_a_deployment_of_their_own_where_they_are_asked_for() -> None:
    settings = ModelSettings(model="m", image_coders=3, image_coder_gpus=0.5)
    *_, coder = deployment(build_model(settings, "/models/m")).init_args
    coder = deployment(coder)
    assert coder.name == CODER
    assert coder._deployment_config.autoscaling_config.max_replicas == 3
    assert coder.ray_actor_options["num_gpus"] == 0.5


@pytest.mark.parametrize(("seconds", "watcher"), [(None, None), (5.0, "calumma-tiny:watch")])
def test_no_slot_of_the_ingress_keeps_a_probe_waiting(seconds: float | None, watcher: str | None) -> None:
    settings = ServeSettings(model="m", name="tiny", ingress_replicas=3, watch_seconds=seconds)
    ingress = deployment(build_ingress(settings, {"tiny": "application"}))
    assert ingress.name == INGRESS
    assert ingress._deployment_config.max_ongoing_requests == UNLIMITED
    assert ingress._deployment_config.num_replicas == 3
    assert ingress.init_args == (settings, {"tiny": "application"}, watcher)
