"""The one definition of the loss and the accuracy of target tokens (DESIGN 2), for training and evaluation alike."""

from torch import Tensor

from rxt_platform.model.stepper import LanguageModel


def target_loss(model: LanguageModel, states: Tensor, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy and number of correct predictions of the target tokens.

    `states` [..., T, D] are the decoder's; a target at position t is predicted from the state at t - 1, and the head
    runs on those states only, in parts where the vocabulary is large.
    """
    wanted = targets[..., 1:]
    return model.decoder.head(states[..., :-1, :][wanted], ids[..., 1:][wanted])


def log_probabilities(
    model: LanguageModel, states: Tensor, ids: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token [n] that follows a state [n, D], and the entropy where it was drawn.

    Of the whole vocabulary at that temperature; otherwise as `target_loss`.
    """
    return model.decoder.head(states, ids, temperature)
