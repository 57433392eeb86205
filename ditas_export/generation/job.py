"""`ditas-sample` as one call: a model's name in, a folder of images out; alone or on many ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ditas_export import __version__
from ditas_export.artifact_files import require_writable
from ditas_export.diffusion.classes import parse_classes
from ditas_export.distributed import SINGLE, Ranks, cores_of_rank
from ditas_export.errors import ArtifactError, RunnerError
from ditas_export.families.base import Conditions, ModelConfig, is_image
from ditas_export.families.registry import conditions_of
from ditas_export.generation.image_folder import NPZ_NAME, ImageFolder
from ditas_export.generation.options import SampleOptions
from ditas_export.generation.pixels import is_npz_file
from ditas_export.generation.sampler import Sampler, SamplingSettings, makes_pixels
from ditas_export.generation.wanted import read_wanted
from ditas_export.job_files import JobFiles, Output, existing, same_file
from ditas_export.options import VAE_FILE
from ditas_export.process import VaeFactors
from ditas_export.runtime.open_runner import OpenedModel, open_runner
from ditas_export.vae.decoder import NO_VAE, Decoder, open_decoder

DEFAULT_VAE = "stabilityai/sd-vae-ft-ema"
"""What published DiTs of 4 latent channels were trained with, on the hub."""

DEFAULT_FACTORS = VaeFactors(scaling_factor=0.18215)
"""How its latents are scaled."""

OnProgress = Callable[[int, int, float], None]
"""Called with steps done, steps to do, and images per second so far, of this rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleReport:
    """What a job gave."""

    folder: Path
    npz: Path
    images: int  # in the folder
    sampled: int  # by this rank, in this run
    seconds: float  # of this rank's sampling, decoding and writing
    runtime: str

    @property
    def images_per_second(self) -> float:
        """Images that this rank made per second; 0 if there was nothing to do."""
        return self.sampled / self.seconds if self.sampled else 0.0


def generate(
    options: SampleOptions,
    *,
    ranks: Ranks = SINGLE,
    on_progress: OnProgress = lambda *_: None,
    say: Callable[[str], None] = lambda _: None,
) -> SampleReport:
    """Sample what is missing of a folder of images, then stack them.

    Every rank takes whole batches and writes into the one folder; rank 0 stacks at the end.

    Args:
        options: what to do.
        ranks: the processes that share the job, and a file system.
        on_progress: called after every step.
        say: called with one-line facts that a user wants to see as they come up.

    Raises:
        DitasExportError: bad input, found before the long work starts.
    """
    with ExitStack() as stack:
        ranks.first(lambda: _check_files(options))
        opened = ranks.together(lambda: _open(options))
        runner = stack.enter_context(opened.runner)
        decoder = ranks.together(lambda: _decoder(options, opened))
        if decoder is not None:
            stack.enter_context(decoder)
        conditions = ranks.together(lambda: conditions_of(runner.config, options.embeddings))
        settings = ranks.together(lambda: _settings(options, conditions))
        sampler = ranks.together(
            lambda: Sampler(runner, settings, conditions=conditions, decoder=decoder)
        )
        say(f"model: {opened.source}\nruntime: {runner.description}")
        for note in opened.notes:
            say(f"  {note}")
        if decoder is not None:
            say(f"VAE: {decoder.description}")
        count = len(sampler.settings.classes)
        pictures = decoder is not None or makes_pixels(runner.config)
        folder = ImageFolder(options.output, count=count, pictures=pictures)
        npz = _npz(options)
        facts = _facts(opened, sampler, conditions)
        ranks.first(lambda: stack.enter_context(folder.held()))
        ranks.first(lambda: folder.prepare(facts))
        sampled, seconds = _sample_missing(sampler, folder, ranks, on_progress)
        ranks.barrier()
        ranks.first(lambda: folder.finish(npz))
        return SampleReport(
            folder=options.output,
            npz=npz,
            images=count,
            sampled=sampled,
            seconds=seconds,
            runtime=runner.description,
        )


def _npz(options: SampleOptions) -> Path:
    """Return where the images are stacked."""
    return options.npz or options.output / NPZ_NAME


def _check_files(options: SampleOptions) -> None:
    """Refuse outputs that must not or cannot be written, before the model is opened.

    Raises:
        ArtifactError: see `ImageFolder.check` and `JobFiles.check`.
    """
    folder, npz = ImageFolder(options.output, count=0, pictures=True), _npz(options)
    folder.check()
    inside = npz.parent.resolve() == options.output.resolve()
    if same_file(npz, options.output) or (inside and folder.has_name(npz.name)):
        raise ArtifactError(f"{npz} has the name of another output; name another")
    if inside and not options.output.exists():
        return  # made with the folder
    if inside and npz.name == NPZ_NAME:
        require_writable(npz)  # the folder's own
        return
    JobFiles(
        inputs=existing(
            model=options.model,
            vae=options.vae,
            list=options.list,
            embeddings=options.embeddings,
            lora=options.lora,
        ),
        outputs=(Output(path=npz, what="stack of samples", is_ours=is_npz_file),),
    ).check()


def _open(options: SampleOptions) -> OpenedModel:
    """Open the model on this rank's device."""
    return open_runner(
        options.model,
        runtime=options.runtime,
        device=_device(options),
        threads=_threads(options),
        hints=options.hints,
    )


def _device(options: SampleOptions) -> str:
    """Return the device by its index: ranks on one machine have a GPU each."""
    if options.device == "cuda" and torch.cuda.is_available():
        return f"cuda:{torch.cuda.current_device()}"
    return options.device


def _threads(options: SampleOptions) -> int | None:
    """Return the threads that were asked for; else ranks on one machine's CPU share its cores."""
    if options.threads is None and options.device == "cpu":
        return cores_of_rank()
    return options.threads


def _decoder(options: SampleOptions, opened: OpenedModel) -> Decoder | None:
    """Return the decoder of the model's latents: as asked, or the one that fits."""
    config = opened.runner.config
    vae = options.vae or _vae_of(options.model, opened, config)
    return open_decoder(vae, config=config, device=_device(options), threads=_threads(options))


def _vae_of(model: str, opened: OpenedModel, config: ModelConfig) -> str:
    """Return the VAE of a model: its pipeline's, the file beside it, or the published models'.

    Raises:
        RunnerError: there is none, and the published models' is not the one that is recorded.
    """
    recorded = config.process.vae
    if opened.vae is not None:
        return opened.vae
    if (recorded is None and makes_pixels(config)) or not is_image(config):
        return NO_VAE
    beside = Path(model).with_name(VAE_FILE)
    if beside.is_file():
        return str(beside)
    if recorded not in (None, DEFAULT_FACTORS):
        raise RunnerError(
            f"{model} was trained on latents of {recorded}, which the default VAE {DEFAULT_VAE} "
            f"({DEFAULT_FACTORS}) does not decode; pass --vae, or put its {VAE_FILE} beside it"
        )
    return DEFAULT_VAE


def _settings(options: SampleOptions, conditions: Conditions) -> SamplingSettings:
    """Return what to sample, the classes or prompts counted out."""
    seed = options.seed or 0
    wanted = None if options.list is None else read_wanted(options.list)
    if wanted is not None:
        classes = wanted.labels
    else:
        classes = parse_classes(
            options.classes or "random",
            conditions=conditions,
            count=options.images,
            seed=seed,
        )
    return SamplingSettings(
        classes=classes,
        seeds=None if wanted is None else wanted.seeds,
        steps=options.steps,
        sampler=options.sampler,
        shift=options.shift,
        cfg_scale=options.cfg_scale,
        cfg_channels=options.cfg_channels,
        guidance_interval=options.guidance_interval,
        seed=seed,
        batch=options.batch,
    )


def _facts(opened: OpenedModel, sampler: Sampler, conditions: Conditions) -> dict[str, Any]:
    """Return what the bytes of the images depend on."""
    decoder = sampler.decoder
    named = {} if conditions.identity is None else {"embeddings_sha256": conditions.identity}
    return named | {
        "model": opened.source,
        "sha256": opened.sha256,
        "runtime": opened.runner.description,
        "vae": None if decoder is None else decoder.description,
        "vae_sha256": None if decoder is None else decoder.sha256,
        "settings": sampler.settings.to_dict(),
        "ditas-export": __version__,
    }


def _sample_missing(
    sampler: Sampler, folder: ImageFolder, ranks: Ranks, on_progress: OnProgress
) -> tuple[int, float]:
    """Sample this rank's missing batches; return the images made and the seconds it took."""
    mine = ranks.mine(range(len(sampler)))
    batches = [batch for batch in mine if folder.lacks(sampler.indices(batch))]
    images = sum(len(sampler.indices(batch)) for batch in batches)
    total = len(batches) * sampler.settings.steps
    done, start = 0, time.perf_counter()

    def after_step(*_: object) -> None:
        nonlocal done
        done += 1
        rate = images * done / total / (time.perf_counter() - start)
        on_progress(done, total, rate)

    on_progress(0, total, 0.0)
    for batch in batches:
        folder.write(sampler.run(batch, on_step=after_step))
    return images, time.perf_counter() - start
