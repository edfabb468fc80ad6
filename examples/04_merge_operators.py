"""The merge of keys and values by itself: plan, apply, differentiate."""

import torch

from mima.merging import MergePlan
from mima.ops import projected_merge, weighted_merge

# N = concepts, S = tokens of one concept, D = text embedding, OUT = output, L = layers
N, S, D, L = 2, 5, 64, 3
OUT = 32
generator = torch.Generator().manual_seed(0)


def draw(*shape: int) -> torch.Tensor:
    """Draw standard normal numbers."""
    return torch.randn(*shape, generator=generator)


# embeddings of each concept's prompt, and of ordinary captions that the merge should leave alone
concept_tokens = [draw(S, D) for _ in range(N)]
caption_tokens = draw(500, D)
plan = MergePlan.from_embeddings(concept_tokens, caption_tokens, lam=1e-6)
print(f"condition {plan.condition:.1f}, drift bound {plan.drift_bound.tolist()}")

# one shared weight for each layer, and each concept's adapted version of it
W0 = [draw(OUT, D).requires_grad_() for _ in range(L)]
W = [[(w + 0.1 * draw(OUT, D)).detach().requires_grad_() for w in W0] for _ in range(N)]

merged = projected_merge(W0, W, plan.C, plan.M)
for n, C_SD in enumerate(concept_tokens):
    asked = (W[n][0] - W0[0]) @ C_SD.T
    missed = (merged[0] - W[n][0]) @ C_SD.T
    print(f"concept {n}: misses its own adaptation by {(missed.norm() / asked.norm()).item():.1e}")

sum(phi.square().sum() for phi in merged).backward()
print(f"gradient of concept 0, layer 0: {W[0][0].grad.norm().item():.3f}")

# everything else is averaged
average = weighted_merge(W0[0], [W[n][0] for n in range(N)], torch.tensor([0.5, 0.5]))
print(f"averaged: {average.norm().item():.3f}")
