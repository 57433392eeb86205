"""An exported file in the place of the transformer of diffusers' `DiTPipeline`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from ditas_export.conditions.labels import labelled_inputs
from ditas_export.diffusion.runner import Runner
from ditas_export.dit.model import DiTConfig
from ditas_export.errors import RunnerError
from ditas_export.families.base import ModelConfig
from ditas_export.onnx_export.external_data import external_files
from ditas_export.onnx_export.manifest import read_manifest, require_own_manifest
from ditas_export.paths import StrPath
from ditas_export.process import FlowProcess
from ditas_export.runtime.onnxruntime_runner import OnnxRuntimeRunner

_Transformer: Any = DiTTransformer2DModel  # diffusers' annotations are in part wrong

FILE_ENTRY = "onnx_file"
"""The entry of a saved folder's config that names the file in it."""


class OnnxDiTTransformer2DModel(_Transformer):  # type: ignore[misc]
    """What `DiTPipeline` asks of a transformer, answered by a `Runner`.

    It is the pipeline's own class by type, which `DiTPipeline` checks; of that class it has the
    configuration, and no layers. `from_pipe` wants it passed: `transformer=pipe.transformer`. `to`
    moves and casts what the pipeline feeds, never the runner: it takes float32 and gives float32,
    and the result is cast back.

    Args:
        path: file written by `export_onnx` or `export_reference`; ONNX Runtime runs it on the CPU.
        runner: an open runner instead of a file; such an adapter can be neither saved nor pickled.

    Raises:
        RunnerError: neither or both of path and runner, a flow, which the pipeline does not sample,
            or ONNX Runtime refuses the file.
        OnnxExportError: the file does not say which DiT it holds.
    """

    _supports_gradient_checkpointing = False

    def __init__(self, path: StrPath | None = None, *, runner: Runner | None = None) -> None:
        ModelMixin.__init__(self)  # type: ignore[no-untyped-call]  # builds no layers
        self.file = None if path is None else Path(path)
        self.runner = _one_runner(self.file, runner)
        self.dit = _require_dit(self.runner.config)
        settings = _diffusers_config(self.dit)
        self.register_to_config(**settings)
        # Holds the float type and the device that the pipeline reads off the transformer; a
        # parameter, as offloading looks for one.
        self.placement = torch.nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | int,
        class_labels: Tensor,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Return ε and any learned variance, (N, 2C or C, H, W), in the type of `hidden_states`.

        Args:
            hidden_states: (N, C, H, W), any float type.
            timestep: one whole number for all, or (N,) of them, from 0, of any number type.
            class_labels: (N,) int64; `num_embeds_ada_norm` is the null class, where there is one.
            return_dict: False gives a tuple of one.

        Raises:
            RunnerError: a time step between whole ones, a label beyond the model's null class, or
                inputs of a wrong shape.
        """
        _require_known(class_labels, self.dit)
        timesteps = _whole_timesteps(timestep, hidden_states)
        inputs = labelled_inputs(hidden_states.float(), timesteps, class_labels)
        output = self.runner(inputs).to(hidden_states.dtype)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

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
    def from_pretrained(
        cls, pretrained_model_name_or_path: StrPath, **options: Any
    ) -> OnnxDiTTransformer2DModel:
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
                f"{folder} names no ONNX file; give what save_pretrained of an "
                f"OnnxDiTTransformer2DModel wrote"
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


def _one_runner(path: Path | None, runner: Runner | None) -> Runner:
    """Return the runner that was given, or one of the file."""
    if runner is None and path is not None:
        require_own_manifest(path)
        return OnnxRuntimeRunner(path)
    if runner is None or path is not None:
        raise RunnerError("pass the path of an exported file, or runner=, and not both")
    return runner


def _require_dit(config: ModelConfig) -> DiTConfig:
    """Refuse a model that is asked by something else than classes."""
    if not isinstance(config, DiTConfig):
        raise RunnerError(f"this is no DiT but a model of {type(config).__name__}")
    return config


def _diffusers_config(config: DiTConfig) -> dict[str, Any]:
    """Return a DiT's shape under the names of `DiTTransformer2DModel`.

    Raises:
        RunnerError: a flow: the pipeline feeds steps of a diffusion's schedule.
    """
    if isinstance(config.process, FlowProcess):
        raise RunnerError(
            f"this model {config.process}, and diffusers' DiTPipeline samples diffusions; sample "
            f"it with ditas-sample, or ditas_export.diffusion.sampling"
        )
    return {
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "sample_size": config.input_size,
        "patch_size": config.patch_size,
        "num_embeds_ada_norm": config.num_classes,
        "norm_eps": config.mlp_norm_eps,
    }


def _require_known(class_labels: Tensor, config: DiTConfig) -> None:
    """Refuse labels beyond the null class, such as the pipeline's fixed one in a small model."""
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
