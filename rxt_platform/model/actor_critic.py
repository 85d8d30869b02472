"""A policy and its critic as one module, so that they train and resume together; nothing of the weights is shared."""

from pathlib import Path
from typing import Self

from torch import Tensor

from rxt_platform.config.model import HeadConfig, ModelConfig
from rxt_platform.data.tokenizer import RxtTokenizer
from rxt_platform.errors import ArtifactError
from rxt_platform.model import files
from rxt_platform.model.encoder_model import RxTEncoder
from rxt_platform.model.transformer import ReactiveTransformer

CRITIC = "critic."
"""How the names of the critic's tensors begin."""
CRITIC_FOLDER, ENCODER = "critic", "RxTEncoder"


class ActorCritic(ReactiveTransformer):
    """A Reactive Transformer (the policy) that also holds a critic: an encoder of its own under a value head."""

    def __init__(self, config: ModelConfig, head: HeadConfig) -> None:
        super().__init__(config)
        self.critic = RxTEncoder(config, head)

    def start_critic(self) -> Self:
        """Give the critic the policy's embedding and encoder to start from; its head stays random (REF 4)."""
        self.critic.embedding.load_state_dict(self.embedding.state_dict())
        self.critic.encoder.load_state_dict(self.encoder.state_dict())
        return self


def load_actor_critic(config: ModelConfig, head: HeadConfig, directory: Path) -> ActorCritic:
    """A policy from its model directory, with the critic that is saved in it, or else with one that starts from it.

    Window and scale are those of `head`: the weights fit any. Raises ArtifactError for what is no such critic.
    """
    model, saved = ActorCritic(config, head), directory / CRITIC_FOLDER
    state = files.read_weights(directory)
    if saved.is_dir():
        raw = files.read_config(saved, (ENCODER,))
        if (kind := raw.get("head", {}).get("kind")) != "value":
            raise ArtifactError(f"{saved}: not a critic: its head is {kind!r}")
        state |= {CRITIC + name: tensor for name, tensor in files.read_weights(saved).items()}
        files.fill(model, state, directory)
        return model
    own = {CRITIC + name: tensor for name, tensor in model.critic.state_dict().items()}
    files.fill(model, {**state, **own}, directory)
    return model.start_critic()


def save_critic(directory: Path, critic: RxTEncoder, state: dict[str, Tensor], tokenizer: RxtTokenizer) -> None:
    """The critic as a model directory of its own inside the policy's, which `RxTEncoder.from_pretrained` loads."""
    folder = directory / CRITIC_FOLDER
    folder.mkdir()
    files.write_config(folder, critic.settings(), ENCODER)
    files.write_weights(folder, state)
    tokenizer.save(folder / files.TOKENIZER)


def split_critic(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The policy's tensors, and the critic's by their own names (none without a critic)."""
    critic = {name.removeprefix(CRITIC): tensor for name, tensor in state.items() if name.startswith(CRITIC)}
    return {name: tensor for name, tensor in state.items() if not name.startswith(CRITIC)}, critic
