"""A model and its concepts as a bi-level problem: what one outer step draws, trains and merges."""

# N = concepts, K = lower-level steps

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from mima.batches import Batch, Encoded, encode, seeded
from mima.bilevel.lower import LowerLevel
from mima.bilevel.optimizers import SGD, Adam, Optimizer
from mima.bilevel.outer import OuterGradient, UpperTerm, outer_gradient, unmerged_gradient
from mima.bilevel.tasks import FullWeights, LoraFactors
from mima.concepts import Concept
from mima.config import ImmunizeConfig
from mima.embedded import assets
from mima.errors import MimaError
from mima.families import Family, Params
from mima.merging import MergeLayer, MergePlan


@dataclass(frozen=True)
class ConceptData:
    """One concept's pictures as the denoiser reads them.

    Attributes:
        name: the concept's name.
        images: reference pictures.
        class_images: class pictures, or None where no level has a prior.
    """

    name: str
    images: Encoded
    class_images: Encoded | None


class Problem:
    """Everything about a run that stays fixed while θ changes.

    Args:
        family: the model. Its parameters are θ; they are read, and written by the caller.
        data: the concepts' pictures.
        config: the settings.
        merge: how the adapted weights are merged; None leaves them apart (one problem each).

    Attributes:
        upper_names: S_u, the parameters that the defender may change.
        names: S_u ∪ S_l, all parameters that the run concerns.
    """

    def __init__(
        self,
        family: Family,
        data: Sequence[ConceptData],
        config: ImmunizeConfig,
        merge: MergeLayer | None,
    ) -> None:
        self.family = family
        self.data = list(data)
        self.config = config
        self.merge = merge
        self.upper_names = tuple(family.parameter_names(config.upper.parameters))
        if config.lower.parameters == "lora":
            lower_names = family.lora_targets()
        else:
            lower_names = family.parameter_names(config.lower.parameters)
        self.lower_names = tuple(lower_names)
        self.names = tuple(dict.fromkeys((*self.upper_names, *self.lower_names)))

    def theta(self) -> dict[str, torch.Tensor]:
        """θ by name: the denoiser's own tensors, not copies."""
        parameters = dict(self.family.denoiser.named_parameters())
        return {name: parameters[name].detach() for name in self.names}

    def lower_level(self, n: int, step: int) -> LowerLevel:
        """The lower level of concept n at one outer step, its K batches drawn."""
        config, data = self.config.lower, self.data[n]
        own, _ = self._split(n, step)
        draws = seeded(self.config.seed, step, n, "lower")
        draw = partial(Batch.draw, self.family, size=config.batch_size, generator=draws)
        batches = [draw(own) for _ in range(config.steps)]
        prior: list[Batch] = []
        if config.prior_weight:
            assert data.class_images is not None
            prior = [draw(data.class_images) for _ in range(config.steps)]

        def loss(params: Params, k: int) -> torch.Tensor:
            value = batches[k].loss(self.family, params)
            if prior:
                value = value + config.prior_weight * prior[k].loss(self.family, params)
            return value

        if config.parameters != "lora":
            return FullWeights(
                loss, self.lower_names, steps=config.steps, optimizer=self._optimizer()
            )
        theta = self.theta()
        return LoraFactors(
            loss,
            {name: theta[name].shape for name in self.lower_names},
            rank=config.rank,
            scale=(config.alpha or config.rank) / config.rank,
            generator=draws,
            steps=config.steps,
            optimizer=self._optimizer(),
            like=theta[self.lower_names[0]],
        )

    def upper_level(self, n: int, step: int) -> list[UpperTerm]:
        """Concept n's part of the upper level, to be minimised: −L(x_u, c; φ) + w · L(class; φ)."""
        config, data = self.config.upper, self.data[n]
        _, other = self._split(n, step)
        draws = seeded(self.config.seed, step, n, "upper")
        batch = Batch.draw(self.family, other, config.batch_size, draws)
        terms = [UpperTerm(data.name, partial(batch.loss, self.family), -1.0, config.loss_cap)]
        if config.prior_weight:
            assert data.class_images is not None
            size = config.prior_batch_size or config.batch_size
            prior = Batch.draw(self.family, data.class_images, size, draws)
            loss = partial(prior.loss, self.family)
            terms.append(UpperTerm(f"{data.name} (prior)", loss, config.prior_weight))
        return terms

    def hypergradient(
        self,
        theta: Params,
        lower: Sequence[LowerLevel],
        upper: Sequence[Sequence[UpperTerm]],
    ) -> OuterGradient:
        """dJ/dθ on S_u, merged or, where the run has no merge, for each concept by itself."""
        mode, wrt = self.config.hypergradient, self.upper_names
        if self.merge is None:
            return unmerged_gradient(theta, lower, upper, mode=mode, wrt=wrt)
        terms = [term for of_concept in upper for term in of_concept]
        return outer_gradient(theta, lower, self.merge, terms, mode=mode, wrt=wrt)

    def _split(self, n: int, step: int) -> tuple[Encoded, Encoded]:
        """Disjoint halves of a concept's pictures, new each step; a single picture serves both."""
        images = self.data[n].images
        order = torch.randperm(len(images), generator=seeded(self.config.seed, step, n, "split"))
        half = (len(order) + 1) // 2
        return images.rows(order[:half]), images.rows(order[half:] if len(order) > 1 else order)

    def _optimizer(self) -> Optimizer:
        kind = {"sgd": SGD, "adam": Adam}[self.config.lower.optimizer]
        return kind(lr=self.config.lower.lr)


def encode_concepts(
    family: Family, concepts: Sequence[Concept], config: ImmunizeConfig
) -> list[ConceptData]:
    """Encode every concept's pictures once, and draw class pictures where they are missing.

    Class pictures are generated by the model as it is now, from the concept's class prompt, or
    from ordinary captions where it has none or ``config.captions`` is set.
    """
    wanted = bool(config.upper.prior_weight or config.lower.prior_weight)
    data = []
    for concept in concepts:
        class_images = None
        if wanted and concept.class_images:
            class_images = encode(family, concept.class_images)
        elif wanted:
            class_images = _generate_class_images(family, concept, config)
        data.append(ConceptData(concept.name, encode(family, concept.images), class_images))
    return data


def _generate_class_images(family: Family, concept: Concept, config: ImmunizeConfig) -> Encoded:
    count = config.num_class_images
    generator = seeded(config.seed, concept.name, "class images")
    if concept.class_prompt and config.captions is None:
        prompts = [concept.class_prompt] * count
    else:
        captions = ordinary_captions(config.captions)
        order = torch.randperm(len(captions), generator=generator).tolist()
        prompts = [captions[order[i % len(order)]] for i in range(count)]
    chunks = [prompts[start : start + 16] for start in range(0, count, 16)]
    latents = torch.cat([family.sample_latents(chunk, generator) for chunk in chunks])
    conditioning = [family.encode_prompts(chunk) for chunk in chunks]
    return Encoded(
        latents, {name: torch.cat([c[name] for c in conditioning]) for name in conditioning[0]}
    )


def ordinary_captions(path: Path | None) -> list[str]:
    """Captions, one per line, of a file or those that ship with mima.

    Raises:
        MimaError: unreadable, or no caption in it.
    """
    path = path or assets() / "captions.txt"
    try:
        captions = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise MimaError(f"captions: cannot read {path}: {error.strerror}") from error
    captions = [caption for caption in captions if caption]
    if not captions:
        raise MimaError(f"captions: {path} holds no caption")
    return captions


def merge_layer(
    family: Family, concepts: Sequence[Concept], config: ImmunizeConfig
) -> MergeLayer | None:
    """The merge of a run: None for the methods and the rule that do not merge."""
    if config.method in ("imma", "joint") or config.merge == "none":
        return None
    weights = torch.full((len(concepts),), 1 / len(concepts))
    if config.merge == "average":
        return MergeLayer(weights)
    captions = ordinary_captions(config.captions)
    order = torch.randperm(len(captions), generator=seeded(config.seed, "captions"))
    regular = [captions[i] for i in order[: config.num_captions].tolist()]
    plan = MergePlan.from_embeddings(
        [concept_tokens(family, concept) for concept in concepts],
        torch.cat([family.token_embeddings(caption) for caption in regular]),
        lam=config.lam,
        weights=weights,
    )
    return MergeLayer(weights.to(family.device), plan, family.text_projections())


def concept_tokens(family: Family, concept: Concept) -> torch.Tensor:
    """C_n [S_n, D]: embeddings of the concept's prompt, the text its keys and values answer to."""
    return family.token_embeddings(concept.prompt)
