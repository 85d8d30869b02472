"""Feed-forward parts: SwiGLU, and the mixture of experts with its load balancing."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rxt_platform.config.model import ExpertsConfig
from rxt_platform.model.documents import Documents


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


@dataclass(frozen=True)
class RealTokens:
    """Where the real tokens of a batch [batch, T] are: found once, used by every layer. Padding is not routed."""

    rows: Tensor  # [N]
    columns: Tensor  # [N]
    texts: Tensor  # [N], what the balance is taken over: the row, or the document of a packed row
    count: int  # of texts

    @classmethod
    def of(cls, mask: Tensor, documents: Documents | None = None) -> "RealTokens":
        """The True positions of `mask` [B, T]."""
        rows, columns = mask.nonzero(as_tuple=True)
        if documents is None:
            return cls(rows, columns, rows, mask.shape[0])
        return cls(rows, columns, documents.number[rows, columns], documents.count)


class Routed(NamedTuple):
    """Output [B, T, D], balance loss of each text [`RealTokens.count`] and tokens sent to each expert [E]."""

    output: Tensor
    balance: Tensor
    usage: Tensor


class MixtureOfExperts(nn.Module):
    """Top-k routed SwiGLU experts: softmax over all experts, the k best renormalised to sum 1, no token dropped.

    Tokens are sorted by expert and go through one grouped matrix multiplication per projection.
    """

    selection_steps: Tensor

    def __init__(self, hidden_size: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.config = config
        experts, inner = config.number, config.size
        self.router = nn.Linear(hidden_size, experts, bias=False)
        self.input_weight = nn.Parameter(_uniform(experts, hidden_size, 2 * inner, fan_in=hidden_size))
        local = config.bias == "local"
        self.input_bias = nn.Parameter(_uniform(experts, 2 * inner, fan_in=hidden_size)) if local else None
        self.output_weight = nn.Parameter(_uniform(experts, inner, hidden_size, fan_in=inner))
        self.output_bias = nn.Parameter(_uniform(experts, hidden_size, fan_in=inner)) if local else None
        self.bias = nn.Parameter(torch.zeros(hidden_size)) if config.bias == "global" else None
        self.shared = nn.ModuleList(SwiGLU(hidden_size, config.shared_size or inner) for _ in range(config.shared))
        self.shared_gate = nn.Linear(hidden_size, config.shared, bias=False) if config.shared > 1 else None
        if config.balancing == "bias":
            # Whole steps of `bias_update_rate`: exact in any precision that the model is cast to.
            self.register_buffer("selection_steps", torch.zeros(experts, dtype=torch.int64))

    def forward(self, x: Tensor, tokens: RealTokens | None) -> Routed:
        """Mix the experts' outputs for the real tokens of `x` [B, T, D] (all, without `tokens`); padding gets zero.

        See `balance_loss`; with balancing by selection bias it is reported but carries no gradient.
        """
        if tokens is None:
            tokens = RealTokens.of(torch.ones(x.shape[:2], dtype=torch.bool, device=x.device))
        mixed, probabilities, chosen = self._mix(x[tokens.rows, tokens.columns])
        output = torch.zeros_like(x).index_put((tokens.rows, tokens.columns), mixed)
        balance = balance_loss(probabilities, chosen, tokens.texts, tokens.count)
        usage = _count(chosen, self.config.number)
        return Routed(output, balance.detach() if self.config.balancing == "bias" else balance, usage)

    def mix(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D], every token real, without the training's statistics: what generation runs."""
        return self._mix(x.flatten(0, 1))[0].view_as(x)

    def _mix(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs [N, D] of tokens [N, D], router probabilities [N, E] and the experts chosen [N, k]."""
        probabilities = self.router(tokens).float().softmax(dim=-1)
        chosen = self._choose(probabilities)
        weights = probabilities.gather(1, chosen)
        weights = (weights / weights.sum(dim=-1, keepdim=True)).to(tokens.dtype)
        mixed = self._apply_experts(tokens, chosen, weights)
        if self.bias is not None:
            mixed = mixed + self.bias
        return self._add_shared(tokens, mixed), probabilities, chosen

    def _choose(self, probabilities: Tensor) -> Tensor:
        if self.config.balancing == "bias":
            probabilities = probabilities.detach() + self.selection_steps * self.config.bias_update_rate
        return probabilities.topk(self.config.per_token, dim=-1).indices

    def _apply_experts(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Outputs of the chosen experts, weighted and summed: [N, D], [N, k], [N, k] -> [N, D].

        Biases are matrix products with one-hot rows and with the routing weights: to gather a bias for each of N * k
        rows costs as much memory traffic as the experts, and its gradient would be summed in the weights' precision.
        """
        experts = self.config.number
        expert, order = chosen.flatten().sort(stable=True)
        ends = torch.searchsorted(expert, torch.arange(experts, device=expert.device), right=True, out_int32=True)
        hidden = grouped_mm(tokens.index_select(0, order // self.config.per_token), self.input_weight, offs=ends)
        if self.input_bias is not None:
            hidden = torch.addmm(hidden, F.one_hot(expert, experts).to(hidden.dtype), self.input_bias)
        linear, gate = hidden.chunk(2, dim=-1)
        result = grouped_mm(linear * F.silu(gate), self.output_weight, offs=ends)
        back = torch.empty_like(order).index_put((order,), torch.arange(len(order), device=order.device))
        mixed = (result.index_select(0, back).unflatten(0, weights.shape) * weights.unsqueeze(-1)).sum(dim=1)
        if self.output_bias is not None:
            spread = weights.new_zeros(len(weights), experts).scatter(1, chosen, weights)
            mixed = torch.addmm(mixed, spread, self.output_bias)
        return mixed

    def _add_shared(self, tokens: Tensor, mixed: Tensor) -> Tensor:
        """Add the shared experts: one as it is, several weighted by a softmax of their own (REF 1.5)."""
        if self.shared_gate is None:
            return mixed + self.shared[0](tokens) if len(self.shared) else mixed
        shares = self.shared_gate(tokens).float().softmax(dim=-1).to(tokens.dtype)
        for i, expert in enumerate(self.shared):
            mixed = mixed + shares[:, i : i + 1] * expert(tokens)
        return mixed

    @torch.no_grad()
    def rebalance(self, usage: Tensor) -> None:
        """After a step with `usage` [E] over the global batch: lower overloaded experts' bias, raise the others'."""
        self.selection_steps += torch.sign(usage.mean() - usage).to(torch.int64)


def grouped_mm(tokens: Tensor, weights: Tensor, offs: Tensor) -> Tensor:
    """Rows [N, D], sorted by group with ends `offs` [E], times their group's weights [E, D, H]: [N, H]."""
    if tokens.dtype == torch.bfloat16:
        return F.grouped_mm(tokens, weights, offs=offs)
    return _uncompiled_grouped_mm(tokens, weights, offs)


@torch.compiler.disable
def _uncompiled_grouped_mm(tokens: Tensor, weights: Tensor, offs: Tensor) -> Tensor:
    """torch.compile knows the shapes of bf16 grouped products only."""
    return F.grouped_mm(tokens, weights, offs=offs)


def balance_loss(probabilities: Tensor, chosen: Tensor, texts: Tensor, count: int) -> Tensor:
    """Switch-style load balance (arXiv:2101.03961, eq. 4) of each text over its real tokens: [count].

    `E * sum_e f_e * P_e` with f_e the share of the text's assignments that went to expert e and P_e its mean router
    probability; 1 when balanced, 0 for a text without tokens. Per text (a row, or a document of a packed row), not per
    batch, so that it adds up over any split of the global batch and packing does not change it. Branches of a document
    are one text with it.
    `probabilities` [N, E], `chosen` [N, k] and `texts` [N] belong to the N real tokens.
    """
    experts = probabilities.shape[1]
    tokens = torch.bincount(texts, minlength=count).clamp(min=1).unsqueeze(1)
    assigned = F.one_hot(chosen, experts).sum(dim=1).to(probabilities.dtype)
    zeros = probabilities.new_zeros(count, experts)
    share = zeros.index_add(0, texts, assigned) / (tokens * chosen.shape[1])
    mean_probability = zeros.index_add(0, texts, probabilities) / tokens
    return experts * (share * mean_probability).sum(dim=1)


def _count(chosen: Tensor, experts: int) -> Tensor:
    """How many tokens were sent to each expert [E], as floating-point numbers."""
    ones = torch.ones(chosen.numel(), device=chosen.device)
    return ones.new_zeros(experts).index_add(0, chosen.flatten(), ones)


def _uniform(*shape: int, fan_in: int) -> Tensor:
    """Torch's default initialisation of a linear layer, for stacked experts."""
    bound = fan_in**-0.5
    return torch.empty(*shape).uniform_(-bound, bound)
