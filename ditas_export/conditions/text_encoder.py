"""Prompts to embeddings, by a pipeline's own tokenizer and text encoder.

diffusers' pipeline encodes; this loads no more of it than that takes. Needs transformers (the extra
`[text]`), and a process of its own: T5-XXL has 4.8 billion parameters, and nothing of it is needed
again once the embeddings are written.

The columns of the sequence that no prompt reaches are left out: a mask hides them from the model,
so it computes the same up to rounding, and less.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditas_export.conditions.embeddings import PromptEmbeddings
from ditas_export.conditions.options import (
    MICRO_CONDITIONED,
    PIXELS_PER_LATENT,
    EncoderPrecision,
)
from ditas_export.dit.diffusers_folder import HUB_ID
from ditas_export.dit.tensor_files import abbreviated, read_json
from ditas_export.errors import CheckpointError, RunnerError
from ditas_export.saved_records import shown

OnPrompt = Callable[[int, int], None]
"""Called with how many prompts were encoded, and how many there are."""

_TYPES: Mapping[EncoderPrecision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}

_LONGEST = {"PixArtSigmaPipeline": 300, "PixArtAlphaPipeline": 120}
"""Tokens of a sequence by the pipeline's class: what its `encode_prompt` takes by itself."""

_HUB_PATTERNS = [
    "model_index.json",
    "text_encoder/*.json",
    "text_encoder/*.safetensors",
    "tokenizer/*",
    "transformer/config.json",
]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Encoded:
    """What one text became."""

    states: Tensor  # (1, L, D) float32
    mask: Tensor  # (1, L) int64


def embed_prompts(
    pipeline: str | Path,
    prompts: Sequence[str],
    *,
    precision: EncoderPrecision = "fp32",
    device: str = "cpu",
    on_prompt: OnPrompt = lambda _done, _total: None,
) -> PromptEmbeddings:
    """Encode prompts, and the empty one, which stands for no prompt.

    Args:
        pipeline: a folder that a PixArt pipeline of diffusers was saved to, or its id on the hub.
        prompts: their texts.
        precision: what the encoder computes in; bf16 takes half the memory.
        device: where it runs.
        on_prompt: progress.

    Raises:
        CheckpointError: nothing there, another pipeline, or a damaged one.
        RunnerError: transformers is missing, or a prompt is longer than the pipeline takes.
    """
    folder = _folder(pipeline)
    name = _class_name(folder)
    pipe = _load(folder, name, _TYPES[precision]).to(device)
    texts = ["", *prompts]
    for text in texts:
        _require_short(pipe, text, _LONGEST[name])
    encoded = []
    for done, text in enumerate(texts):
        on_prompt(done, len(texts))
        encoded.append(_encode(pipe, text, _LONGEST[name]))
    on_prompt(len(texts), len(texts))
    rows = [*encoded[1:], encoded[0]]
    mask = torch.cat([each.mask for each in rows])
    length = int(mask.any(dim=0).nonzero().max()) + 1
    states = torch.cat([each.states[:, :length] for each in rows])
    return PromptEmbeddings(
        tensors={
            "encoder_hidden_states": states,
            "encoder_attention_mask": mask[:, :length].contiguous(),
            **_sizes(folder, len(rows)),
        },
        has_null=True,
        prompts=tuple(prompts),
    )


def _folder(pipeline: str | Path) -> Path:
    """Return a pipeline's folder, from the hub if it is none here."""
    if Path(pipeline).is_dir():
        return Path(pipeline)
    if not (isinstance(pipeline, str) and HUB_ID.fullmatch(pipeline)):
        raise CheckpointError(
            f"{pipeline}: no such folder; expected that of a PixArt pipeline written by diffusers, "
            f"or a hub id such as PixArt-alpha/PixArt-Sigma-XL-2-512-MS"
        )
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(pipeline, allow_patterns=_HUB_PATTERNS))
    except Exception as error:  # the hub client raises its own, httpx's and the system's errors
        raise CheckpointError(
            f"{pipeline} is no folder here and could not be had from the hub ({_reason(error)}); "
            f"check the name and the network, or download it and pass the folder"
        ) from error


def _class_name(folder: Path) -> str:
    """Return the class of a pipeline whose prompts are known to be encoded in the same way."""
    path = folder / "model_index.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no model_index.json; pass the folder of a whole pipeline, with "
            f"text_encoder/ and tokenizer/"
        )
    name = read_json(path).get("_class_name")
    if name not in _LONGEST:
        raise CheckpointError(f"{path} describes a {shown(name)}, expected {' or '.join(_LONGEST)}")
    return str(name)


def _load(folder: Path, name: str, dtype: torch.dtype) -> Any:
    """Return the pipeline with its tokenizer and text encoder alone."""
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise RunnerError(
            f"transformers is not installed, which reads prompts ({error}); install it by pip "
            f"install 'ditas-export[text]'"
        ) from error
    import diffusers

    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.T5Tokenizer.from_pretrained(
            folder / "tokenizer", local_files_only=True
        )
        text_encoder, report = transformers.T5EncoderModel.from_pretrained(
            folder / "text_encoder",
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises what safetensors, tokenizers and torch raise
        raise CheckpointError(
            f"the tokenizer or the text encoder in {folder} cannot be loaded: {_reason(error)}; "
            f"get them again, the weights as safetensors"
        ) from error
    if odd := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
        raise CheckpointError(
            f"{folder / 'text_encoder'} lacks {abbreviated(odd)} or has another shape of it; "
            f"get it again"
        )
    unused = dict.fromkeys(("vae", "transformer", "scheduler"))
    return getattr(diffusers, name)(tokenizer=tokenizer, text_encoder=text_encoder, **unused)


def _require_short(pipe: Any, text: str, longest: int) -> None:
    """Refuse a text of which the pipeline would leave out the end."""
    found = len(pipe.tokenizer(text.lower().strip()).input_ids)  # as the pipeline prepares it
    if found > longest:
        raise RunnerError(
            f"the prompt {shown(text)} has {found} tokens, expected {longest} at most; shorten it"
        )


@torch.no_grad()
def _encode(pipe: Any, text: str, longest: int) -> _Encoded:
    """Return what the pipeline makes of a text; alone, so that no other changes a bit of it."""
    states, mask, _, _ = pipe.encode_prompt(
        text, do_classifier_free_guidance=False, max_sequence_length=longest
    )
    return _Encoded(states=states.float().cpu(), mask=mask.long().cpu())


def _sizes(folder: Path, rows: int) -> dict[str, Tensor]:
    """Return the micro-conditions of a square image of the model's own size, where it has them."""
    path = folder / "transformer" / "config.json"
    settings = read_json(path)
    side = settings.get("sample_size", MICRO_CONDITIONED)
    is_asked = settings.get("use_additional_conditions")
    if not (side == MICRO_CONDITIONED if is_asked is None else is_asked):
        return {}
    if isinstance(side, bool) or not isinstance(side, int) or side < 1:
        raise CheckpointError(f"{path} has sample_size={shown(side)}; expected a whole number")
    pixels = float(side * PIXELS_PER_LATENT)
    return {
        "resolution": torch.full((rows, 2), pixels),
        "aspect_ratio": torch.ones(rows, 1),
    }


def _reason(error: Exception) -> str:
    """Return the first line of an error, or its kind where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
