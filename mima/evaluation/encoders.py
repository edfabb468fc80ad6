"""Image similarity M(a, b): cosines of CLIP or DINO features, or 1 − LPIPS.

How pictures are prepared is in `mima.evaluation.preprocessing`.
"""

# B = images, A = other images, D = features

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPModel
from transformers.image_processing_utils import BaseImageProcessor

from mima.assets import assets
from mima.choices import PictureProtocol
from mima.concepts.pictures import Picture
from mima.errors import MimaError, first_line, nearest, one_line
from mima.evaluation.discriminants import NEEDED, OFFLINE, SIDE, embedding
from mima.evaluation.lpips import Lpips
from mima.evaluation.preprocessing import (
    PUBLISHED_SIDE,
    Preprocessor,
    PublishedPreprocessor,
    squeezed,
)
from mima.families.hub import unreachable
from mima.families.model_files import (
    LOADING_ERRORS,
    too_many_layers,
    too_many_numbers,
    weight_files,
)
from mima.storage.inputs import expanded, is_hub_id
from mima.storage.tensor_files import fingerprint

T = TypeVar("T")

CLIP_DEFAULT = "openai/clip-vit-base-patch32"
DINO_DEFAULT = "facebook/dino-vits16"
AT_A_TIME = 64
"""Pictures that are in memory at once where they are read from files."""
EMBEDDED = {"embedded": "judge", "embedded-clip": "encoder"}
"""Encoders that ship with mima, and their folders among the assets."""


@runtime_checkable
class ImageEncoder(Protocol):
    """What measures need of an image encoder."""

    name: str

    def embed(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Normalised float32 features [B, D] on the CPU, one row per image."""


@runtime_checkable
class TextImageEncoder(ImageEncoder, Protocol):
    """An image encoder that also embeds texts into the same space, as CLIP does."""

    def embed_text(self, texts: Sequence[str]) -> torch.Tensor:
        """Normalised float32 features [B, D] on the CPU, one row per text."""


@runtime_checkable
class PairwiseSimilarity(Protocol):
    """A similarity that is not a cosine of features."""

    name: str

    def pairs(self, a: Sequence[Image.Image], b: Sequence[Image.Image]) -> torch.Tensor:
        """Similarities [A, B] float32 on the CPU."""


def similarity(a_AD: torch.Tensor, b_BD: torch.Tensor) -> torch.Tensor:
    """Cosine similarities [A, B], in [−1, 1], of two sets of normalised features."""
    return a_AD @ b_BD.mT


def at_a_time(pictures: Sequence[T]) -> Iterator[Sequence[T]]:
    """Pictures in parts so small that photographs fit into memory."""
    for start in range(0, len(pictures), AT_A_TIME):
        yield pictures[start : start + AT_A_TIME]


def embed_files(encoder: ImageEncoder, pictures: Sequence[Picture]) -> torch.Tensor:
    """Normalised features [B, D] of pictures that need not be in memory all at once."""
    return torch.cat([encoder.embed([p.load() for p in some]) for some in at_a_time(pictures)])


class _Encoder:
    """Shared by the encoders below: pictures become features in batches."""

    def __init__(
        self,
        preprocess: Callable[[Sequence[Image.Image]], torch.Tensor],
        *,
        name: str,
        device: str | torch.device,
        batch_size: int,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"encoder: batch_size must be at least 1, got {batch_size}")
        self.preprocess = preprocess
        self.name = name
        self.device = torch.device(device)
        self.batch_size = batch_size

    @torch.inference_mode()
    def embed(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Normalised float32 features [B, D] on the CPU, one row per image."""
        if not images:
            raise ValueError(f"{self.name}: images is empty")
        rows = []
        for start in range(0, len(images), self.batch_size):
            pixels = self.preprocess(images[start : start + self.batch_size]).to(self.device)
            rows.append(self._features(pixels).cpu())
        return torch.cat(rows)

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features [B, D] of unit length in float32."""
        raise NotImplementedError


class DiscriminantEncoder(_Encoder):
    """The embedded judge of counted features; see `mima.evaluation.discriminants`.

    The folder holds ``judge.safetensors``, as `fit_judge.py` writes.

    Raises:
        MimaError: no such file, or a damaged one.
    """

    def __init__(
        self, folder: str | Path, *, device: str | torch.device = "cpu", batch_size: int = 64
    ) -> None:
        super().__init__(_judged, name="embedded", device=device, batch_size=batch_size)
        file = Path(folder) / "judge.safetensors"
        try:
            stored = load_file(file)
        except (OSError, SafetensorError) as error:
            raise MimaError(f"encoder: cannot open {str(file)!r}: {error}") from error
        missing = sorted(NEEDED - stored.keys())
        if missing:
            raise MimaError(f"encoder: {str(file)!r} lacks {', '.join(missing)}")
        self.numbers = {key: value.float().to(device) for key, value in stored.items()}

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        return embedding(pixels, self.numbers)


def _judged(images: Sequence[Image.Image]) -> torch.Tensor:
    """Pictures as `embedding` reads them, [B, 3, SIDE, SIDE] in [−1, 1]."""
    return squeezed(images, SIDE, Image.Resampling.BICUBIC) / 127.5 - 1


class _TransformersEncoder(_Encoder):
    """An encoder with a network of transformers.

    Args:
        model: hub id or folder of the network and its preprocessor; by default the published one.
        device: where it runs.
        batch_size: images per forward pass.
        protocol: how pictures are prepared; see `mima.evaluation.preprocessing`.
    """

    published: ClassVar[str]

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        device: str | torch.device = "cpu",
        batch_size: int = 64,
        protocol: PictureProtocol = "standard",
    ) -> None:
        source = str(model or self.published)
        network, settings = self._open(source)
        config = getattr(network.config, "vision_config", network.config)
        preprocess = _preprocessor(source, protocol, settings, config.image_size)
        super().__init__(preprocess, name=source, device=device, batch_size=batch_size)
        self.model = network.to(device).eval().requires_grad_(False)

    def _open(self, source: str) -> tuple[Any, dict[str, Any]]:
        """The network, in float32, and the settings of its image processor."""
        raise NotImplementedError


class ClipEncoder(_TransformersEncoder):
    """CLIP through transformers: `get_image_features` and `get_text_features`, normalised."""

    published = CLIP_DEFAULT

    def _open(self, source: str) -> tuple[Any, dict[str, Any]]:
        opened = _from_pretrained(source, CLIPModel)
        with _opening(source):
            self.tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        return opened

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        return _unit(_pooled(self.model.get_image_features(pixel_values=pixels)))

    @torch.inference_mode()
    def embed_text(self, texts: Sequence[str]) -> torch.Tensor:
        """Normalised float32 features [B, D] on the CPU, one row per text; long texts are cut."""
        if not texts:
            raise ValueError(f"{self.name}: texts is empty")
        rows = []
        longest = self.model.config.text_config.max_position_embeddings
        for start in range(0, len(texts), self.batch_size):
            tokens = self.tokenizer(
                list(texts[start : start + self.batch_size]),
                padding=True,
                truncation=True,
                max_length=longest,
                return_tensors="pt",
            ).to(self.device)
            features = _pooled(
                self.model.get_text_features(
                    input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
                )
            )
            rows.append(_unit(features).cpu())
        return torch.cat(rows)


class DinoEncoder(_TransformersEncoder):
    """DINO or DINOv2 through transformers: the last layer's class token, normalised."""

    published = DINO_DEFAULT

    def _open(self, source: str) -> tuple[Any, dict[str, Any]]:
        # a ViTModel's pooling layer is random in DINO checkpoints and not used
        pooling = {"add_pooling_layer": False} if _model_type(source) == "vit" else {}
        return _from_pretrained(source, AutoModel, **pooling)

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        return _unit(self.model(pixel_values=pixels).last_hidden_state[:, 0])


def _unit(features: torch.Tensor) -> torch.Tensor:
    return F.normalize(features.float(), dim=-1)


def judge_fingerprint(judge: ImageEncoder | PairwiseSimilarity) -> str:
    """A hash that another version of a judge's assets does not have.

    It covers the weights, the class that reads them, how pictures are prepared and, of an encoder
    that embeds texts, the vocabulary. A judge that none of this module's loaders opened has its
    name alone.
    """
    match judge:
        case DiscriminantEncoder():
            weights, how = judge.numbers, []
        case _TransformersEncoder() | Lpips():
            weights = dict(judge.model.named_parameters())
            how = [f"{name} {_plain(value)}" for name, value in _preparation(judge).items()]
        case _:
            return judge.name
    told = "\n".join([type(judge).__name__, fingerprint(weights), *sorted(how)])
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _preparation(judge: _TransformersEncoder | Lpips) -> dict[str, Any]:
    """What else an answer of the judge depends on, by name."""
    if isinstance(judge, Lpips):
        return {"protocol": judge.protocol}
    told = {"preprocess": type(judge.preprocess).__name__, **vars(judge.preprocess)}
    if isinstance(judge, ClipEncoder):
        told["vocabulary"] = sorted(judge.tokenizer.get_vocab().items())
    return told


def _plain(value: Any) -> Any:
    return value.flatten().tolist() if isinstance(value, torch.Tensor) else value


def load_similarity(
    model: str | Path = "clip",
    *,
    protocol: PictureProtocol = "standard",
    device: str | torch.device = "cpu",
    batch_size: int = 64,
) -> ImageEncoder | PairwiseSimilarity:
    """Open a similarity model by name.

    Args:
        model: whatever `load_encoder` opens, ``"lpips"``, or ``"lpips:SOURCE"`` with a hub id or a
            folder of LPIPS weights.
        protocol: how pictures are prepared; see `mima.evaluation.preprocessing`.
        device: where it runs.
        batch_size: images per forward pass.

    Returns:
        An encoder, or LPIPS, which compares pictures two by two.

    Raises:
        MimaError: nothing there, or a model of another kind.
    """
    name, _, source = str(model).partition(":")
    if name == "lpips":
        return Lpips(source or name, device=device, batch_size=batch_size, protocol=protocol)
    return load_encoder(model, device=device, batch_size=batch_size, protocol=protocol)


def load_encoder(
    model: str | Path = "embedded",
    *,
    device: str | torch.device = "cpu",
    batch_size: int = 64,
    protocol: PictureProtocol = "standard",
) -> ClipEncoder | DinoEncoder | DiscriminantEncoder:
    """Open an image encoder by name.

    Args:
        model: `"embedded"` (the judge of emoji that mima ships), `"embedded-clip"` (a small CLIP of
            emoji, made otherwise: a second opinion, and one that reads texts), `"clip"`, `"dino"`,
            a hub id, or a folder; CLIP, ViT and DINOv2 models are recognised by their
            configuration.
        device: where it runs.
        batch_size: images per forward pass.
        protocol: how pictures are prepared; see `mima.evaluation.preprocessing`. `"embedded"` has
            only one way.

    Returns:
        The encoder of the kind that the model is.

    Raises:
        MimaError: nothing there, or a model of another kind.
    """
    if model in EMBEDDED:
        folder = assets() / EMBEDDED[str(model)]
        if not folder.is_dir():
            raise MimaError(f"the {model} encoder is missing from this installation ({folder})")
        if model == "embedded":
            return DiscriminantEncoder(folder, device=device, batch_size=batch_size)
        model = folder
    source = {"clip": CLIP_DEFAULT, "dino": DINO_DEFAULT}.get(str(model), str(model))
    folder = expanded(source)
    if folder.is_dir():
        source = str(folder)
    elif not is_hub_id(source):
        raise MimaError(
            f"encoder: {source!r} is neither a folder nor a hub id of the form owner/name; "
            + nearest(source, ("clip", "dino", *EMBEDDED))
        )
    # asked here: transformers would try for a minute to reach the hub
    elif not isinstance(try_to_load_from_cache(source, "config.json"), str):
        problem = unreachable()
        if problem:
            raise MimaError(
                f"encoder: there is no folder {source!r}, the hub's cache on this machine does not "
                f"hold it, and the hub cannot be reached: {problem}; name a local folder, or use "
                f"{OFFLINE}"
            )
    kind = _model_type(source)
    encoders: dict[str, type[ClipEncoder] | type[DinoEncoder]] = {
        "clip": ClipEncoder,
        "vit": DinoEncoder,
        "dinov2": DinoEncoder,
    }
    if kind not in encoders:
        raise MimaError(
            f"encoder: {source} is a {one_line(kind)} model; clip, vit and dinov2 are supported"
        )
    opened = encoders[kind](source, device=device, batch_size=batch_size, protocol=protocol)
    with _opening(source):
        # whether the preprocessor makes pictures of the size that the model reads
        opened.embed([Image.new("RGB", (PUBLISHED_SIDE, PUBLISHED_SIDE))])
    return opened


def _model_type(source: str) -> str:
    with _opening(source):
        # False: where nothing is said, transformers asks on the terminal whether to run its code
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    problem = too_many_layers(config.to_dict())
    if problem is not None:
        raise MimaError(f"encoder: cannot open {source!r}: {problem}")
    return str(config.model_type)


def _from_pretrained(source: str, kind: Any, **keywords: Any) -> tuple[Any, dict[str, Any]]:
    folder = Path(source)
    with _opening(source):
        if folder.is_dir():
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            with torch.device("meta"):
                network = AutoModel.from_config(config, trust_remote_code=False)
            problem = too_many_numbers(folder, network, weight_files(folder, None))
            if problem is not None:
                raise MimaError(f"encoder: {problem}")
        model = kind.from_pretrained(source, dtype=torch.float32, **keywords)
        settings, _ = BaseImageProcessor.get_image_processor_dict(source)
        return model, settings


@contextmanager
def _opening(source: str) -> Iterator[None]:
    """Refuse an encoder whose files are missing, damaged, or do not fit each other."""
    try:
        yield
    except MimaError:
        raise
    except LOADING_ERRORS as error:
        raise MimaError(f"encoder: cannot open {source!r}: {first_line(error)}") from error


def _preprocessor(
    source: str, protocol: PictureProtocol, settings: dict[str, Any], side: int
) -> Preprocessor | PublishedPreprocessor:
    if protocol not in ("standard", "published"):
        raise ValueError(f"encoder: protocol must be standard or published, got {protocol!r}")
    with _opening(source):
        return Preprocessor(settings) if protocol == "standard" else PublishedPreprocessor(side)


def _pooled(features: Any) -> torch.Tensor:
    # transformers 4 returns the projected features, 5 an output object that holds them
    if isinstance(features, torch.Tensor):
        return features
    pooled: torch.Tensor = features.pooler_output
    return pooled
