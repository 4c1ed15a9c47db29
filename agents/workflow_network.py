"""Actor and critic of a scheduler of jobs, in PyTorch; `workflow_policy` runs the actor compiled.

Message passing goes from children to parents over the known stages of each job, as in Decima: a
stage's embedding is made of its features and a sum over its children. Nothing in it depends on the
number of stages, jobs or devices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from servegym.agents.workflow_features import NUM_PAIR_FEATURES, NUM_STAGE_FEATURES
from servegym.agents.workflow_network_config import WorkflowNetworkConfig
from servegym.agents.workflow_policy import EMBED, WorkflowWeights


class Graph(NamedTuple):
    """Known stages and edges of some jobs, all of them one behind the other."""

    stages: Tensor  # float32[N, NUM_STAGE_FEATURES]
    parent: Tensor  # int64[M] edges to children that are not hidden
    child: Tensor  # int64[M]
    depth: int  # stages on the longest way
    member: Tensor  # int64[V] stages that were known when their job arrived
    job: Tensor  # int64[V] their jobs
    num_jobs: int


class Pairs(NamedTuple):
    """Pairs of stages and devices that some decisions chose from, one decision behind the other."""

    features: Tensor  # float32[P, NUM_PAIR_FEATURES]
    base: Tensor  # float32[P] score of the base rule
    stage: Tensor  # int64[P] rows of `Graph.stages`
    job: Tensor  # int64[P]
    decision: Tensor  # int64[P] ascending
    num_decisions: int


class WorkflowNetwork(nn.Module):
    """Scores of pairs, and the value of the state they are in.

    The score of a pair is the base rule's, plus a linear function, plus a correction that is zero
    at the start: the untrained policy is the base rule, action for action. Waiting scores 0.
    """

    def __init__(self, config: WorkflowNetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_own = nn.Linear(NUM_STAGE_FEATURES, EMBED)
        self.embed_sum = nn.Linear(EMBED, EMBED, bias=False)
        self.embed_child = nn.Linear(EMBED, EMBED, bias=False)
        self.context = nn.Linear(3 * EMBED, config.hidden, bias=False)
        self.pair = nn.Linear(NUM_PAIR_FEATURES, config.hidden)
        self.out = nn.Linear(config.hidden, 1, bias=False)
        self.theta = nn.Linear(NUM_PAIR_FEATURES, 1, bias=False)
        self.critic = nn.Sequential(
            nn.Linear(2 * NUM_PAIR_FEATURES, 64), nn.ReLU(), nn.Linear(64, 1)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.orthogonal_(module.weight, 2.0**0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.theta.weight)

    def embed(self, graph: Graph) -> Tensor:
        """Embed all stages, `float32[N, EMBED]`; a stage is right after as many rounds as deep."""
        own = self.embed_own(graph.stages)
        x = torch.relu(own)
        for _ in range(graph.depth - 1):
            messages = torch.relu(self.embed_child(x))[graph.child]
            gathered = torch.zeros_like(x).index_add_(0, graph.parent, messages)
            x = torch.relu(own + self.embed_sum(gathered))
        return x

    def scores(self, pairs: Pairs, graph: Graph | None) -> Tensor:
        """Score pairs, `float32[P]`; `graph` is needed with message passing."""
        hidden = self.pair(pairs.features)
        if self.config.message_passing:
            assert graph is not None
            x = self.embed(graph)
            jobs = _mean(x[graph.member], graph.job, graph.num_jobs)
            others = _mean(jobs[pairs.job], pairs.decision, pairs.num_decisions)
            seen = (x[pairs.stage], jobs[pairs.job], others[pairs.decision])
            hidden = hidden + self.context(torch.cat(seen, -1))
        linear = self.theta(pairs.features) + self.out(torch.relu(hidden))
        return pairs.base + linear.squeeze(-1)

    def values(self, pairs: Pairs) -> Tensor:
        """Estimate the (scaled) return from the mean and the greatest features, `float32[D]`."""
        mean = _mean(pairs.features, pairs.decision, pairs.num_decisions)
        index = pairs.decision.unsqueeze(-1).expand_as(pairs.features)
        most = torch.zeros_like(mean).scatter_reduce(
            0, index, pairs.features, "amax", include_self=False
        )
        value: Tensor = self.critic(torch.cat((mean, most), -1)).squeeze(-1)
        return value

    def forward(
        self,
        features: Tensor,
        base: Tensor,
        stage: Tensor,
        job: Tensor,
        stages: Tensor,
        children: Tensor,
        members: Tensor,
    ) -> Tensor:
        """Score the pairs of one decision; what is exported.

        Args:
            features: `float32[P, NUM_PAIR_FEATURES]`.
            base: `float32[P]`.
            stage: Row of each pair's stage, `int64[P]`.
            job: Row of its job, `int64[P]`.
            stages: `float32[S, NUM_STAGE_FEATURES]`.
            children: 1 where the column's stage is a known child of the row's, `float32[S, S]`.
            members: Share of each stage in the mean of its job, `float32[J, S]`.

        Returns:
            `float32[P]`.
        """
        hidden = self.pair(features)
        if self.config.message_passing:
            own = self.embed_own(stages)
            x = torch.relu(own)
            for _ in range(MAX_EXPORTED_DEPTH - 1):
                x = torch.relu(own + self.embed_sum(children @ torch.relu(self.embed_child(x))))
            jobs = (members @ x)[job]
            others = jobs.mean(0, keepdim=True).expand_as(jobs)
            hidden = hidden + self.context(torch.cat((x[stage], jobs, others), -1))
        return base + (self.theta(features) + self.out(torch.relu(hidden))).squeeze(-1)

    @torch.no_grad()
    def weights(self) -> WorkflowWeights:
        """Return the actor for the compiled rule."""

        def array(tensor: Tensor) -> object:
            return tensor.detach().cpu().double().numpy().copy()

        found = {
            "theta": array(self.theta.weight[0]),
            "pair": array(self.pair.weight),
            "bias": array(self.pair.bias),
            "out": array(self.out.weight[0]),
            "context": array(self.context.weight),
        }
        if self.config.message_passing:
            found |= {
                "embed_own": array(self.embed_own.weight),
                "embed_bias": array(self.embed_own.bias),
                "embed_sum": array(self.embed_sum.weight),
                "embed_child": array(self.embed_child.weight),
            }
        return WorkflowWeights(
            base=self.config.base,
            eta=self.config.eta,
            tau_s=self.config.tau_s,
            **found,  # type: ignore[arg-type]
        )


#: Rounds of message passing in an exported graph: jobs with longer ways are refused there.
MAX_EXPORTED_DEPTH = 64


def _mean(values: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Average the rows of each group; 0 for an empty one."""
    total = values.new_zeros(num_groups, values.shape[-1]).index_add_(0, group, values)
    count = values.new_zeros(num_groups).index_add_(0, group, torch.ones_like(values[:, 0]))
    return total / count.clamp(min=1.0).unsqueeze(-1)
