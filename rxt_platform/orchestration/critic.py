"""The reward and critic service of MRL stages: started beside a stage's job, reached by handle, ended with it."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from rxt_platform.config.mrl import EpisodeConfig
from rxt_platform.config.run import RunConfig
from rxt_platform.config.serving import ServingConfig
from rxt_platform.rl.critic import RewardService
from rxt_platform.training.job import StageJob

VERSIONS = "critic"
"""In a job's work folder: the critic's weights that its trainer publishes."""


@contextmanager
def reward_service(config: RunConfig, job: StageJob) -> Iterator[RewardService | None]:
    """What the workers of a stage of episodes ask, if the run has a service; None where they compute all themselves.

    Raises RewardError when the service is not ready in time.
    """
    if config.critic_service is None or not isinstance(job.stage, EpisodeConfig):
        yield None
        return
    from rxt_platform.serving.client import HandleClient
    from rxt_platform.serving.deploy import deploy, remove_leftover, undeploy

    # Of its own: a resume on another number of workers may come to weights that differ in their last bits.
    stage, versions = job.stage, job.work / VERSIONS / uuid.uuid4().hex[:8]
    serving = ServingConfig(
        service=config.critic_service,
        rewards=stage.reward,
        meaning=stage.meaning,
        reward_model=None if stage.meaning == "hashed" else str(job.start),
        versions=str(versions) if stage.critic is not None else None,
    )
    name = f"critic-{job.output.name}"
    remove_leftover(name)  # this driver holds the step's lock
    deployment = deploy(serving, http=False, name=name)
    try:
        yield HandleClient(deployment.app, versions=versions)
    finally:
        undeploy(deployment)
