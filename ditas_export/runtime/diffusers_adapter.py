"""An exported file in the place of the transformer of diffusers' pipelines.

One adapter for all families: what a pipeline calls its transformer with goes to the file's inputs
of the same names. A subclass is its pipeline's own class by type, which pipelines check.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from ditas_export.conditions.labels import CLASS_LABELS
from ditas_export.diffusion.runner import Runner
from ditas_export.dit.model import DiTConfig
from ditas_export.errors import RunnerError
from ditas_export.families.base import Input, ModelConfig, ModelInputs
from ditas_export.families.registry import family_of
from ditas_export.onnx_export.external_data import external_files
from ditas_export.onnx_export.manifest import read_manifest, require_own_manifest
from ditas_export.paths import StrPath
from ditas_export.process import FlowProcess
from ditas_export.runtime.onnxruntime_runner import OnnxRuntimeRunner

# diffusers' annotations are in part wrong
_Mixin: Any = ModelMixin
_DiT: Any = DiTTransformer2DModel
_PixArt: Any = PixArtTransformer2DModel

FILE_ENTRY = "onnx_file"
"""The entry of a saved folder's config that names the file in it."""

MICRO_CONDITIONS = "added_cond_kwargs"
"""The argument of diffusers' transformers that holds further inputs by name."""

_STATES, _TIME = "hidden_states", "timestep"
"""diffusers' names of a file's first two inputs."""


class _OnnxTransformer(_Mixin):  # type: ignore[misc]
    """What a pipeline asks of a transformer, answered by a `Runner`.

    It has the transformer's configuration, and no layers. `from_pipe` wants it passed:
    `transformer=pipe.transformer`. `to` moves and casts what the pipeline feeds, never the runner:
    it takes float32 and gives float32, and the result is cast back.

    Args:
        path: file written by `export_onnx` or `export_reference`; ONNX Runtime runs it on the CPU.
        runner: an open runner instead of a file; such an adapter can be neither saved nor pickled.

    Raises:
        RunnerError: neither or both of path and runner, a flow, which the pipelines do not sample,
            a model of another family than the pipeline's, or ONNX Runtime refuses the file.
        OnnxExportError: the file does not say which model it holds.
    """

    _supports_gradient_checkpointing = False
    transformer: ClassVar[Any]  # diffusers' class

    def __init__(self, path: StrPath | None = None, *, runner: Runner | None = None) -> None:
        ModelMixin.__init__(self)  # type: ignore[no-untyped-call]  # builds no layers
        self.file = None if path is None else Path(path)
        self.runner = _one_runner(self.file, runner)
        config = self.runner.config
        self._inputs = family_of(config).inputs(config)
        self._signature = inspect.signature(self.transformer.forward)
        self._require_fitting(config)
        self.register_to_config(**_diffusers_config(config))
        # Holds the float type and the device that the pipeline reads off the transformer; a
        # parameter, as offloading looks for one.
        self.placement = torch.nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(
        self, *arguments: Any, return_dict: bool = True, **named: Any
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Return ε and any learned variance, (N, 2C or C, H, W), in the type of `hidden_states`.

        Args:
            arguments: those of diffusers' class, in its order: `hidden_states` (N, C, H, W) of any
                float type; `timestep`, one whole number for all or (N,) of them, from 0, of any
                number type; and what else the file is fed, such as `class_labels` (N,) or
                `encoder_hidden_states` (N, tokens, D).
            return_dict: False gives a tuple of one.
            named: the same by name; those of `added_cond_kwargs` by their own.

        Raises:
            RunnerError: a time step between whole ones, a label beyond the model's null class,
                inputs of a wrong shape, or one too many or too few.
        """
        given = dict(self._signature.bind(self, *arguments, **named).arguments)
        del given["self"]
        given |= given.pop(MICRO_CONDITIONS, None) or {}
        states: Tensor = given[_STATES]
        output = self.runner(self._fed(given)).to(states.dtype)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _fed(self, given: Mapping[str, Any]) -> ModelInputs:
        """Return the file's inputs, from diffusers' arguments."""
        states: Tensor = given[_STATES]
        what, when, *others = self._inputs
        fed = {what.name: states.float(), when.name: _whole_timesteps(given[_TIME], states)}
        for each in others:
            value = given.get(each.name)
            if value is None:
                raise RunnerError(f"the file is fed {each.name}, which was not given")
            fed[each.name] = _in_type(each, value)
        if odd := [name for name in given if given[name] is not None and name not in
                   {_STATES, _TIME, *fed}]:  # fmt: skip
            raise RunnerError(f"the file has no input {', '.join(odd)[:200]}; leave it out")
        if CLASS_LABELS in fed:
            _require_known(fed[CLASS_LABELS], self.runner.config)
        return ModelInputs(fed)

    def _require_fitting(self, config: ModelConfig) -> None:
        """Refuse a file that is fed what the pipeline does not know, and a flow."""
        if isinstance(config.process, FlowProcess):
            raise RunnerError(
                f"this model {config.process}, and diffusers' pipeline samples diffusions; sample "
                f"it with ditas-sample, or ditas_export.diffusion.sampling"
            )
        known = {*self._signature.parameters, "resolution", "aspect_ratio"}
        if odd := [each.name for each in self._inputs[2:] if each.name not in known]:
            raise RunnerError(
                f"the file is fed {', '.join(odd)}, which no {self.transformer.__name__} is; use "
                f"the adapter of its own family"
            )

    def save_pretrained(self, save_directory: StrPath, *_args: Any, **_options: Any) -> None:
        """Copy the file, its external data and its manifest into a folder, with a `config.json`.

        Raises:
            RunnerError: the adapter was made of a runner.
        """
        file = self._own_file("save")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        beside = [file.with_suffix(".json")] if read_manifest(file) is not None else []
        for each in (file, *external_files(file), *beside):
            if each.resolve() != (folder / each.name).resolve():
                shutil.copy2(each, folder / each.name)
        self.register_to_config(**{FILE_ENTRY: file.name})
        self.save_config(folder)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: StrPath, **options: Any) -> Any:
        """Open what `save_pretrained` wrote; of the options `torch_dtype` counts.

        Raises:
            RunnerError: the folder was written by something else.
            OnnxExportError: the file in it is another than was saved.
        """
        folder = Path(pretrained_model_name_or_path) / (options.get("subfolder") or "")
        if not (folder / cls.config_name).is_file():
            raise RunnerError(f"{folder} has no {cls.config_name}; give what save_pretrained wrote")
        name = cls.load_config(folder).get(FILE_ENTRY)
        if not isinstance(name, str) or Path(name).name != name:
            raise RunnerError(
                f"{folder} names no ONNX file; give what save_pretrained of an {cls.__name__} wrote"
            )
        model = cls(folder / name)
        dtype = options.get("torch_dtype")
        return model.to(dtype) if isinstance(dtype, torch.dtype) else model

    def __reduce__(self) -> tuple[Any, ...]:
        """Return the file to open again, for pickles and copies."""
        return type(self), (str(self._own_file("pickle").absolute()),)

    def _own_file(self, verb: str) -> Path:
        """Return the file that the adapter was made of."""
        if self.file is None:
            raise RunnerError(f"this adapter was made of a runner, and has no file to {verb}")
        return self.file


class OnnxDiTTransformer2DModel(_OnnxTransformer, _DiT):  # type: ignore[misc]
    """The transformer of `DiTPipeline`, answered by a `Runner`."""

    transformer = DiTTransformer2DModel


class OnnxPixArtTransformer2DModel(_OnnxTransformer, _PixArt):  # type: ignore[misc]
    """The transformer of `PixArtAlphaPipeline` and `PixArtSigmaPipeline`, by a `Runner`."""

    transformer = PixArtTransformer2DModel


def _one_runner(path: Path | None, runner: Runner | None) -> Runner:
    """Return the runner that was given, or one of the file."""
    if runner is None and path is not None:
        require_own_manifest(path)
        return OnnxRuntimeRunner(path)
    if runner is None or path is not None:
        raise RunnerError("pass the path of an exported file, or runner=, and not both")
    return runner


def _diffusers_config(config: ModelConfig) -> dict[str, Any]:
    """Return a model's shape under diffusers' names: what pipelines read, and all of a DiT's."""
    common = {
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "sample_size": config.latent_shape[-1],
    }
    if not isinstance(config, DiTConfig):
        return common
    return common | {
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "num_layers": config.depth,
        "patch_size": config.patch_size,
        "num_embeds_ada_norm": config.num_classes,
        "norm_eps": config.mlp_norm_eps,
    }


def _in_type(wanted: Input, value: Tensor) -> Tensor:
    """Return what a pipeline gives as an input's kind of number; masks are of any type."""
    if value.is_floating_point() == wanted.dtype.is_floating_point and value.dtype != torch.bool:
        return value
    cast = value.to(wanted.dtype)
    if not torch.equal(cast.to(value.dtype), value):
        raise RunnerError(f"{wanted.name} are {value.dtype} and not whole; the file takes numbers")
    return cast


def _require_known(class_labels: Tensor, config: ModelConfig) -> None:
    """Refuse labels beyond the null class, such as the pipeline's fixed one in a small model."""
    assert isinstance(config, DiTConfig)  # no other file is fed labels
    largest = int(class_labels.max())
    if largest >= config.label_rows:
        null = f" and the null class {config.null_class}" if config.null_row else ""
        raise RunnerError(
            f"class label {largest}; this model has the labels 0 to {config.num_labels - 1}{null}. "
            f"diffusers' DiTPipeline always guides with the "
            f"null class 1000, of a model with 1000 classes: call it with guidance_scale=1, or "
            f"sample with ditas_export.diffusion.sampling"
        )


def _whole_timesteps(timestep: Tensor | int, hidden_states: Tensor) -> Tensor:
    """Return time steps (N,) int64, one for each row of the hidden states."""
    given = torch.as_tensor(timestep, device=hidden_states.device)
    whole = given.long()
    if not torch.equal(whole.to(given.dtype), given):
        raise RunnerError(
            f"time steps {sorted(set(given.flatten().tolist()))} are not whole; the file takes "
            f"those of the full schedule, from 0: choose a scheduler, or its timestep_spacing, "
            f"that keeps to them"
        )
    return whole.expand(hidden_states.shape[0]) if whole.numel() == 1 else whole
