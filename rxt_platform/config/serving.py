"""The reward and critic service: where it listens, how large it is, what it refuses. No torch, no Ray."""

import ipaddress
from typing import Literal, Self

from pydantic import Field, model_validator

from rxt_platform.config.base import Spec
from rxt_platform.config.rewards import RewardConfig


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class ServiceConfig(Spec):
    """Place, size and limits of the service. Whatever is beyond a limit is refused, by name, before it is computed."""

    host: str = "127.0.0.1"
    port: int = Field(8000, gt=0, lt=2**16)
    expose: bool = Field(False, description="listen where other machines can reach it: HTTP, so put TLS before it")

    replicas: int = Field(1, gt=0)
    max_replicas: int | None = Field(None, description="start replicas under load, up to so many")
    cpus_per_replica: float = Field(1.0, gt=0, description="CPUs that Ray sets aside; one torch thread for each whole")

    max_body_bytes: int = Field(4 * 2**20, gt=0, description="of an HTTP request")
    max_json_depth: int = Field(8, gt=0, description="lists and objects inside each other")
    max_rows: int = Field(1024, gt=0, description="states of a request, and turns of all its episodes")
    max_text_length: int = Field(2**16, gt=0, description="characters of one text")
    max_queued_requests: int = Field(16, ge=0, description="waiting at a replica, beside the one that it computes")
    request_timeout_s: float = Field(30.0, gt=0, description="from a request's arrival to its answer")

    batch_tokens: int = Field(2048, gt=0, description="padded tokens that the critic reads at once")
    versions_in_memory: int = Field(3, gt=0, description="of the critic's weights, in each replica")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not is_loopback(self.host) and not self.expose:
            raise ValueError(
                f"host {self.host}: other machines could reach it; use 127.0.0.1, or say so with expose: true"
            )
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas ({self.max_replicas}) is less than replicas ({self.replicas})")
        return self

    @property
    def most_replicas(self) -> int:
        """Replicas that there may be at a time."""
        return self.max_replicas or self.replicas


class ServingConfig(Spec):
    """What a service answers with: rewards by these weights, values by this critic."""

    service: ServiceConfig = ServiceConfig()
    rewards: RewardConfig = RewardConfig()
    meaning: Literal["hashed", "tokens", "encoder"] = Field(
        "hashed",
        description="what the rewards' cosine compares: hashed characters, or the token embedding or the encoder of "
        "the reward model",
    )
    reward_model: str | None = Field(None, description="directory of that model; its weights must stay the same")
    model: str | None = Field(
        None, description="directory of an encoder with a value head, version 0; of any other model: rewards only"
    )
    versions: str | None = Field(None, description="folder in which a trainer publishes the critic's versions")

    @model_validator(mode="after")
    def _meaning_has_its_model(self) -> Self:
        if (self.meaning == "hashed") != (self.reward_model is None):
            raise ValueError(
                f"meaning {self.meaning} with reward_model {self.reward_model}: tokens and encoder are those of a "
                "reward_model, hashed has none"
            )
        return self
