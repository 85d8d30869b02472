"""Feed-forward parts: SwiGLU and the mixture of experts with its load-balancing loss."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLU(nn.Module):
    """`output(l * SiLU(g))` with (l, g) one projection of width 2h, both linears with bias (REF 1.5)."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.input = nn.Linear(hidden_size, 2 * inner_size)
        self.output = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        linear, gate = self.input(x).chunk(2, dim=-1)
        return self.output(linear * F.silu(gate))


class MixtureOfExperts(nn.Module):
    """Top-k routed SwiGLU experts: softmax over all experts, the k best renormalised to sum 1, no token dropped.

    Tokens are sorted by expert and go through one grouped matrix multiplication per projection; padding is not routed.
    """

    def __init__(self, hidden_size: int, inner_size: int, experts: int, experts_per_token: int) -> None:
        super().__init__()
        self.experts, self.experts_per_token = experts, experts_per_token
        self.router = nn.Linear(hidden_size, experts, bias=False)
        self.input_weight = nn.Parameter(_uniform(experts, hidden_size, 2 * inner_size, fan_in=hidden_size))
        self.input_bias = nn.Parameter(_uniform(experts, 2 * inner_size, fan_in=hidden_size))
        self.output_weight = nn.Parameter(_uniform(experts, inner_size, hidden_size, fan_in=inner_size))
        self.output_bias = nn.Parameter(_uniform(experts, hidden_size, fan_in=inner_size))

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Mix the experts' outputs for the real tokens of `x` [B, T, D] (`mask` [B, T]); padding gets zero.

        Returns the output [B, T, D] and the balance loss of each row [B], see `balance_loss`.
        """
        rows, columns = mask.nonzero(as_tuple=True)
        tokens = x[rows, columns]
        probabilities = self.router(tokens).float().softmax(dim=-1)
        weights, chosen = probabilities.topk(self.experts_per_token, dim=-1)
        weights = (weights / weights.sum(dim=-1, keepdim=True)).to(x.dtype)
        mixed = self._apply_experts(tokens, chosen, weights)
        output = torch.zeros_like(x).index_put((rows, columns), mixed)
        return output, balance_loss(probabilities, chosen, rows, x.shape[0])

    def _apply_experts(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Outputs of the chosen experts, weighted and summed: [N, D], [N, k], [N, k] -> [N, D]."""
        assignment = chosen.flatten()
        order = assignment.argsort(stable=True)
        expert = assignment[order]
        ends = torch.bincount(expert, minlength=self.experts).cumsum(0).to(torch.int32)
        grouped = tokens[order // self.experts_per_token]
        hidden = F.grouped_mm(grouped, self.input_weight, offs=ends) + self.input_bias[expert]
        linear, gate = hidden.chunk(2, dim=-1)
        result = F.grouped_mm(linear * F.silu(gate), self.output_weight, offs=ends) + self.output_bias[expert]
        unsorted = torch.empty_like(result).index_put((order,), result)
        return (unsorted.unflatten(0, weights.shape) * weights.unsqueeze(-1)).sum(dim=1)


def balance_loss(probabilities: Tensor, chosen: Tensor, rows: Tensor, batch: int) -> Tensor:
    """Switch-style load balance (arXiv:2101.03961, eq. 4) of each row over its real tokens: [B].

    `E * sum_e f_e * P_e` with f_e the share of the row's assignments that went to expert e and P_e its mean router
    probability; 1 when balanced. Per row, not per batch, so that it adds up over any split of the global batch.
    `probabilities` [N, E], `chosen` [N, k] and `rows` [N] belong to the N real tokens.
    """
    experts = probabilities.shape[1]
    tokens = torch.bincount(rows, minlength=batch).clamp(min=1).unsqueeze(1)
    assigned = F.one_hot(chosen, experts).sum(dim=1).to(probabilities.dtype)
    zeros = probabilities.new_zeros(batch, experts)
    share = zeros.index_add(0, rows, assigned) / (tokens * chosen.shape[1])
    mean_probability = zeros.index_add(0, rows, probabilities) / tokens
    return experts * (share * mean_probability).sum(dim=1)


def _uniform(*shape: int, fan_in: int) -> Tensor:
    """Torch's default initialisation of a linear layer, for stacked experts."""
    bound = fan_in**-0.5
    return torch.empty(*shape).uniform_(-bound, bound)
