"""What is served and how: one typed value, checked once, sent to the ingress and to every replica."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from calumma.platform.specification import Section, Tracking

MEBIBYTE = 2**20
GIGABYTE = 10**9
NAME = r"^[A-Za-z0-9._-]+$"
_NAMES = r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*"
HostName = Annotated[str, Field(pattern=rf"^(\*|(\*\.)?{_NAMES}|\[?[0-9A-Fa-f]*(:[0-9A-Fa-f.]*){{2,}}\]?)$")]
Origin = Annotated[str, Field(pattern=r"^(\*|[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:\d+)?)$")]


class SamplingDefaults(Section):
    """Used for whatever a request leaves open; but for the repetition penalty the values are the public release's."""

    temperature: float = Field(0.7, ge=0, le=2, description="of text; 0: the likeliest token")
    top_p: float = Field(0.9, gt=0, le=1, description="of text: the likeliest tokens that have this share together")
    top_k: int = Field(0, ge=0, description="0: all")
    min_p: float = Field(0.0, ge=0, le=1, description="of text: tokens of at least this share of the likeliest one's")
    repetition_penalty: float = Field(
        1.0, gt=0, description="of text that there is already; 1: none; the public release generates with 1.2"
    )
    image_temperature: float = Field(0.7, ge=0, le=2, description="of image codes")
    image_top_p: float = Field(0.9, gt=0, le=1, description="of image codes")
    image_top_k: int = Field(0, ge=0, description="of image codes; 0: all")
    image_min_p: float = Field(0.0, ge=0, le=1, description="of image codes")
    guidance_text: float = Field(3.0, ge=0, description="how far an image follows its text; 1: no guidance")
    guidance_image: float = Field(
        1.2, ge=0, description="how far an image follows the images before it; 1: no guidance"
    )
    guidance_begin: float = Field(
        0.0, ge=0, le=1, description="the part of an image's codes from which on it is guided"
    )
    guidance_end: float = Field(
        1.0, ge=0, le=1, description="the part up to which it is; codes that are not guided cost a third to a half"
    )
    guidance_schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="how guidance rises within that part; constant: it is there at once"
    )
    max_images: int = Field(8, ge=1, description="images in one answer")


class Limits(Section):
    """What one request, one key and one ingress may use; more is refused with a message that names the limit."""

    images: int = Field(16, ge=0, description="images in a prompt")
    pixels: int = Field(2**26, ge=1, description="of one image in a prompt, told from its header before it is decoded")
    pixels_in_all: int = Field(2**27, ge=1, description="of all images of a prompt together")
    image_seconds: float = Field(20.0, gt=0, description="in which the images of a prompt must be decoded")
    image_processes: int = Field(2, ge=1, description="that an ingress decodes images in, at a low priority")
    images_waiting: int = Field(64, ge=1, description="images that are decoded or wait for it in an ingress; then 429")
    tokens: int | None = Field(None, ge=1, description="tokens of one answer; none: the model's context")
    choices: int = Field(128, ge=1, description="answers to one request: its prompts times its n")
    stops: int = Field(16, ge=1, description="stop strings of a request")
    running: int = Field(
        1024,
        ge=1,
        description="answers an ingress works on at once; more get 429, but for keys with less than their even part",
    )
    running_per_key: int = Field(256, ge=1, description="the same for one API key that has no limit of its own")
    seconds: float = Field(900.0, gt=0, description="from a request to the end of its answer; then 504, or an event")
    header_seconds: float = Field(10.0, gt=0, description="from a connection's beginning until its request's header")
    body_seconds: float = Field(60.0, gt=0, description="until a request's body must be there")
    unread_seconds: float = Field(60.0, gt=0, description="until a client that does not read its answer is given up")


class RemoteImages(Section):
    """Fetching of images by URL; off while no host is allowed."""

    hosts: tuple[str, ...] = Field((), description='names that may be fetched from; "*.example.org" for all below one')
    mebibytes: float = Field(16.0, gt=0, description="largest file")
    seconds: float = Field(10.0, gt=0, description="until an image must be there")
    redirects: int = Field(3, ge=0, description="that are followed, each checked again")


class APIKey(Section):
    """An API key, known by its hash alone."""

    name: str = Field(pattern=NAME, description="shown in errors and logs")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="hash of the key, in hexadecimal")
    running: int | None = Field(None, ge=1, description="answers at once; none: Limits.running_per_key")
    priority: int = Field(
        0, ge=-1000, le=1000, description="keys of a lower number go first, and others get what those leave"
    )

    @property
    def owner(self) -> str:
        """Whose files are: of this very key, not of a later one that is given the same name."""
        return f"{self.name}-{self.sha256[:16]}"


class Safety(Section):
    """A policy that sees every prompt and every answer; see safety.py."""

    policy: str | None = Field(None, description="package.module:callable, called with `options`, gives the policy")
    options: dict[str, Any] = Field({}, description="what the policy is made with")


class Batches(Section):
    """Files that clients send, and batches of requests in them, answered beside all others. Each key sees its own."""

    location: str | None = Field(None, description="folder or s3://… that they are kept in; none: there are none")
    running: int = Field(4, ge=1, description="requests of batches that are answered at once")
    requests: int = Field(50_000, ge=1, description="requests of a batch")


class ModelSettings(Section):
    """One model under the endpoint, and its replicas."""

    model: str = Field(description="model directory, s3://…, or models:/name@alias")
    name: str = Field("calumma", pattern=NAME, description="the model's name in requests")
    adapters: dict[Annotated[str, Field(pattern=NAME)], str] = Field(
        {},
        description="low-rank adapters of the model, by the name that requests call each: folders in PEFT's format, or "
        "outputs of a fine-tuning; answered together with the model, in the same passes",
    )
    tracking: Tracking = Tracking()
    min_replicas: int = Field(1, ge=1, description="replicas that always run")
    max_replicas: int = Field(1, ge=1, description="replicas under load")
    idle_seconds: float = Field(300.0, ge=0, description="of little work before a replica above min_replicas ends")
    busy_seconds: float = Field(10.0, ge=0, description="of too much work before a replica is added")
    queued_tokens: int = Field(16384, ge=1, description="prompt tokens in line that are worth a further replica")
    cpus_per_replica: float = Field(1.0, gt=0, description="CPUs")
    gpus_per_replica: float = Field(0.0, ge=0, description="GPUs, or a fraction")
    tensor_parallel: int = Field(
        1,
        ge=1,
        description="processes, on one node, that hold a replica's model together; they share its CPUs, and have a GPU "
        "each where it has GPUs",
    )
    threads: int | None = Field(
        None, ge=1, description="CPU threads of a replica's process; none: the node's cores, shared fairly"
    )
    max_sequences: int = Field(16, ge=1, description="requests answered together; guidance branches come beside them")
    context: int | None = Field(
        None, ge=2, description="most tokens of prompt and answer together; none: the model's context"
    )
    memory: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of a GPU that replicas may fill, the KV cache with all that is left of it; none: 0.9. On "
        "CPUs of the machine's memory; none: the cache has max_sequences whole contexts, where there is room",
    )
    cache_tokens: int | None = Field(
        None, ge=1, description="positions of a replica's KV cache; none: as many as there is memory for"
    )
    host_cache_gigabytes: float = Field(
        0.0,
        ge=0,
        description="of the host's memory, of each replica, for what its KV cache gives up: requests that begin alike "
        "find it there again",
    )
    disk_cache: str | None = Field(
        None,
        description="folder on each node for what is given up there, and for all of the KV cache when a replica ends: "
        "later replicas of the same weights find it; it tells of prompts, as the cache does. none: no disk",
    )
    disk_cache_gigabytes: float = Field(16.0, gt=0, description="most that it may hold of a model's weights")
    prefill_tokens: int = Field(2048, ge=1, description="most prompt tokens that a step takes in")
    dtype: Literal["float32", "bfloat16", "int8"] | None = Field(
        None,
        description="what the Transformer computes in; int8: in bfloat16, with its matrices in 8 bits; none: float32 "
        "on CPUs, and on GPUs bfloat16, or int8 where there is no room for more",
    )
    speculative: int | None = Field(
        0,
        ge=0,
        description="image codes drafted ahead (speculative Jacobi decoding), fewer the more images are drawn at once; "
        "0: none; null: on CPUs as many as are measured to pay. A seed gives other images than with 0, the same with "
        "anything else",
    )
    cuda_graphs: bool | None = Field(
        None,
        description="record the passes of answers in progress as CUDA graphs; none: where one GPU holds a replica",
    )
    max_queued: int = Field(
        256,
        ge=1,
        description="answers that may wait in a replica; more get 429, but for keys with less than their even part",
    )
    max_queued_per_key: int | None = Field(
        None, ge=1, description="the same for one API key; none: three quarters of max_queued"
    )
    max_queued_tokens: int = Field(
        2**22,
        ge=1,
        description="tokens of prompts that may wait in a replica, beside a context for each of max_sequences; more "
        "get 429, but for keys with less than their even part",
    )
    image_coders: int = Field(
        0, ge=0, description="most replicas of a deployment that codes and decodes images; 0: the engine's replicas do"
    )
    image_coder_gpus: float = Field(0.0, ge=0, description="GPUs of a replica that codes images")
    drain_seconds: float = Field(600.0, ge=0, description="answers in flight get so long when a replica is to end")
    stall_seconds: float | None = Field(
        120.0,
        gt=0,
        description="an engine with work that finishes no step for so long is ended, and its replica replaced; more "
        "than the longest step needs (a large model on CPUs); one that a signal has stopped is at once; none: never",
    )
    sampling: SamplingDefaults = SamplingDefaults()

    @field_validator("model")
    @classmethod
    def _given(cls, model: str) -> str:
        if not model.strip():
            raise ValueError("say which model to serve: a directory, s3://…, or models:/name@alias")
        return model

    @field_validator("disk_cache")
    @classmethod
    def _folder(cls, folder: str | None) -> str | None:
        """Replicas stand in other working directories."""
        return None if folder is None else str(Path(folder).expanduser().absolute())

    @field_validator("adapters")
    @classmethod
    def _absolute(cls, adapters: dict[str, str]) -> dict[str, str]:
        """Replicas stand in other working directories."""
        return {
            name: place if "://" in place else str(Path(place).expanduser().absolute())
            for name, place in adapters.items()
        }

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is more than max_replicas {self.max_replicas}")
        if self.tensor_parallel > 1 and self.gpus_per_replica not in (0, self.tensor_parallel):
            raise ValueError(
                f"tensor_parallel {self.tensor_parallel}: its processes have a GPU each, so gpus_per_replica must be "
                f"{self.tensor_parallel}, or 0 to compute on CPUs; given {self.gpus_per_replica:g}"
            )
        if self.disk_cache is not None and self.tensor_parallel > 1:
            raise ValueError("disk_cache is for a model that one process has: leave it out, or give tensor_parallel 1")
        if self.adapters and self.tensor_parallel > 1:
            raise ValueError(
                "adapters are served beside a model that one process has: give tensor_parallel 1, or merge the adapter "
                "into its model (`calumma export merged`)"
            )
        return self

    @property
    def engine_options(self) -> dict[str, Any]:
        """How each process of a replica makes its engine."""
        return {
            "max_sequences": self.max_sequences,
            "cache_tokens": self.cache_tokens,
            "prefill_tokens": self.prefill_tokens,
            "jacobi_window": self.speculative,
            "cuda_graphs": self.cuda_graphs,
            "host_cache": int(self.host_cache_gigabytes * GIGABYTE),
            "disk_cache": self._disk_cache,
        }

    @property
    def _disk_cache(self) -> Any:
        if self.disk_cache is None:
            return None
        from calumma.model.generation.cache.disk_blocks import DiskCache

        return DiskCache(Path(self.disk_cache), int(self.disk_cache_gigabytes * GIGABYTE))

    @property
    def target_ongoing_requests(self) -> float:
        """Requests a replica should be busy with; above it the autoscaler adds one."""
        return max(1.0, self.max_sequences / 2)


class ServeSettings(ModelSettings):
    """The endpoint: its first model, those it serves besides, and who may ask for how much."""

    also: tuple[ModelSettings, ...] = Field((), description="further models under the same endpoint")
    host: str = Field("127.0.0.1", description="address to listen at; 0.0.0.0 for every interface")
    port: int = Field(8000, ge=1, le=65535, description="port to listen at")
    open: bool = Field(False, description="let everybody who reaches it use a server without keys, from elsewhere too")
    tls_certificate: str | None = Field(
        None, description="PEM file with the certificate, and those between it and its authority; none: plain HTTP"
    )
    tls_key: str | None = Field(None, description="PEM file with the certificate's key")
    allowed_hosts: tuple[HostName, ...] = Field(
        (),
        description='names by which clients may call it besides those of this machine, say "example.org" or '
        '"*.example.org"; none: no others at a loopback address, all elsewhere',
    )
    allowed_origins: tuple[Origin, ...] = Field(
        (), description='whose web pages may use it from a browser (CORS), say "https://example.org"; "*": all'
    )
    ingress_replicas: int = Field(
        1, ge=1, description="ingresses, which check and translate requests; limits hold for each of them"
    )
    ingress_cpus: float = Field(0.1, ge=0, description="CPUs of an ingress")
    max_body_mebibytes: float = Field(32.0, gt=0, description="largest request body")
    limits: Limits = Limits()
    remote_images: RemoteImages = RemoteImages()
    keys: tuple[APIKey, ...] = Field((), description="who may use the API; none, and no keys_file: everybody")
    keys_file: str | None = Field(
        None, description="file of further keys, read again when it changes; on each node that an ingress runs on"
    )
    safety: Safety = Safety()
    batches: Batches = Batches()
    watch_seconds: float | None = Field(
        None, gt=0, description="how often models:/name@alias is looked up for a new version; none: never"
    )

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        models = [name for model in self.models for name in (model.name, *model.adapters)]
        for what, names in (("models", models), ("keys", [key.name for key in self.keys])):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{what}: the name {', '.join(twice)} is given more than once; names must differ")
        return self

    @model_validator(mode="after")
    def _both(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("TLS needs both tls_certificate and tls_key")
        return self

    @model_validator(mode="after")
    def _closed(self) -> Self:
        if not (self.open or self.keys_needed or is_loopback(self.host)):
            raise ValueError(
                f"at {self.host} everybody who reaches this machine could use the server: give it keys (--keys FILE; "
                "`calumma serve keys add` makes one), or say that it is meant to be open (--open)"
            )
        return self

    @property
    def keys_needed(self) -> bool:
        """Whether a client needs a key."""
        return bool(self.keys) or self.keys_file is not None

    @property
    def models(self) -> tuple[ModelSettings, ...]:
        """All models, the first one first."""
        return (self, *self.also)

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mebibytes * MEBIBYTE)

    @property
    def url(self) -> str:
        """Where a client on this machine reaches it."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::", "") else self.host
        scheme = "http" if self.tls_certificate is None else "https"
        return f"{scheme}://[{host}]:{self.port}" if ":" in host else f"{scheme}://{host}:{self.port}"


def is_loopback(host: str) -> bool:
    """Whether a name or an address is one by which a machine calls itself."""
    name = host.strip("[]").lower()
    if name == "localhost" or name.endswith(".localhost"):  # RFC 6761
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
