"""What is served and how: one typed value, checked once, sent to the ingress and to every replica."""

from __future__ import annotations

from typing import Self

from pydantic import Field, field_validator, model_validator

from calumma.platform.config import Section, Tracking

MEBIBYTE = 2**20


class SamplingDefaults(Section):
    """Used for whatever a request leaves open; the values are the public release's."""

    temperature: float = Field(0.7, ge=0, le=2)
    top_p: float = Field(0.9, gt=0, le=1)
    repetition_penalty: float = Field(1.2, gt=0)
    image_temperature: float = Field(0.7, ge=0, le=2)
    image_top_p: float = Field(0.9, gt=0, le=1)
    guidance_text: float = Field(3.0, ge=0)
    guidance_image: float = Field(1.2, ge=0)
    max_images: int = Field(8, ge=1)


class ServeSettings(Section):
    model: str = Field(description="model directory, s3://…, or models:/name@alias")
    tracking: Tracking = Tracking()
    name: str = Field("calumma", pattern=r"^[A-Za-z0-9._-]+$", description="the model's name in requests")
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    cpus_per_replica: float = Field(1.0, gt=0)
    gpus_per_replica: float = Field(0.0, ge=0)
    ingress_cpus: float = Field(0.1, ge=0)
    threads: int | None = Field(
        None, ge=1, description="CPU threads of a replica; none: the node's cores, shared fairly"
    )
    max_sequences: int = Field(16, ge=3, description="sequences decoded together; an image with guidance takes three")
    max_queued: int = Field(256, ge=1, description="requests that may wait for a replica; more get 503")
    max_body_mebibytes: float = Field(32.0, gt=0, description="largest request body")
    sampling: SamplingDefaults = SamplingDefaults()

    @field_validator("model")
    @classmethod
    def _given(cls, model: str) -> str:
        if not model.strip():
            raise ValueError("say which model to serve: a directory, s3://…, or models:/name@alias")
        return model

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is more than max_replicas {self.max_replicas}")
        return self

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mebibytes * MEBIBYTE)

    @property
    def target_ongoing_requests(self) -> float:
        """Requests a replica should be busy with; above it the autoscaler adds one. An image request fills 3 slots."""
        return max(1.0, self.max_sequences / 3)

    @property
    def url(self) -> str:
        """Where a client on this machine reaches it."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::", "") else self.host
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"
