"""A run's reinforcement learning alone, on a model that was made elsewhere."""

from rxt_platform.config.mrl import EpisodeConfig
from rxt_platform.config.run import RunConfig
from rxt_platform.config.stage_base import StartFrom
from rxt_platform.errors import ConfigError
from rxt_platform.model.files import find_model


def reinforced(config: RunConfig, model: str) -> RunConfig:
    """The run with its stages of episodes only, the first of which starts from `model`.

    Raises ConfigError for a run without such stages, ArtifactError for what is no model.
    """
    stages = {name: stage for name, stage in config.stages.items() if isinstance(stage, EpisodeConfig)}
    if not stages:
        kinds = ", ".join(sorted({stage.kind for stage in config.stages.values()}))
        raise ConfigError(f"stages: none holds conversations (memory_rl, critic_pretraining); there are {kinds}")
    first = next(iter(stages))
    start = StartFrom(artifact=str(find_model(model)))
    stages[first] = stages[first].model_copy(update={"start_from": start})
    name = config.name if len(stages) == len(config.stages) else f"{config.name}_alone"
    dumped = {**config.model_dump(), "name": name, "baseline": None}
    dumped["stages"] = {key: stage.model_dump() for key, stage in stages.items()}
    return RunConfig.model_validate(dumped)
