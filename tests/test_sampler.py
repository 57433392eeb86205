"""The service API: batches fixed by image index, cancellation, pictures."""

from __future__ import annotations

from dataclasses import replace
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from quantized_fixture import TINY, exported, snr_db, tiny_dit
from torch import Tensor

from ditas_export.diffusion.sampling import image_generator, initial_noise, sample
from ditas_export.dit.model import DiT
from ditas_export.errors import CancelledError, NonFiniteError, RunnerError
from ditas_export.families.base import ModelInputs
from ditas_export.generation.pixels import to_pixels
from ditas_export.generation.sampler import Sampler, SamplingSettings
from ditas_export.runtime.onnxruntime_runner import OnnxRuntimeRunner
from ditas_export.runtime.torch_runner import TorchRunner

SETTINGS = SamplingSettings(classes=(3, 7, 1, 0, 9, 2, 5), steps=4, seed=5, batch=3)


class TwiceAsLarge:
    """A decoder that repeats every pixel."""

    in_channels = TINY.in_channels
    scale = 2
    factors = None
    description = "twice as large"

    def __call__(self, latents: Tensor) -> Tensor:
        return latents.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    def __enter__(self) -> TwiceAsLarge:
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def runner() -> TorchRunner:
    return TorchRunner(tiny_dit())


def all_latents(sampler: Sampler) -> Tensor:
    return torch.cat([batch.latents for batch in sampler])


def test_batches_cover_every_image_once(runner: TorchRunner) -> None:
    batches = list(Sampler(runner, SETTINGS))
    assert [batch.indices for batch in batches] == [range(3), range(3, 6), range(6, 7)]
    assert [len(batch.latents) for batch in batches] == [3, 3, 1]


def test_images_are_those_of_the_sampling_loop(runner: TorchRunner) -> None:
    latents = all_latents(Sampler(runner, SETTINGS))
    alone = sample(
        runner, classes=SETTINGS.classes, steps=4, cfg_scale=4.0, seed=5, image_indices=range(7)
    )
    # The same rows in other batches: float32 sums in another order, through 4 steps.
    assert (latents - alone).abs().max() < 1e-4 * alone.abs().max()


def test_a_batch_gives_the_same_bytes_whatever_ran_before(runner: TorchRunner) -> None:
    sampler = Sampler(runner, SETTINGS)
    in_order = list(sampler)
    last = Sampler(runner, SETTINGS).run(2)
    assert torch.equal(last.latents, in_order[2].latents)
    assert torch.equal(sampler.run(1).latents, in_order[1].latents)


def test_fewer_images_than_a_batch_are_not_filled_up(runner: TorchRunner) -> None:
    seen = []
    settings = replace(SETTINGS, classes=(4, 2), batch=8)
    Sampler(runner, settings).run(0, on_step=lambda *step: seen.append(step[2].shape[0]))
    assert seen == [2] * 4


def test_across_batch_sizes_an_exported_file_makes_the_same_pictures() -> None:
    with OnnxRuntimeRunner(exported(), threads=2) as session:
        by_three = all_latents(Sampler(session, SETTINGS))
        by_two = all_latents(Sampler(session, replace(SETTINGS, batch=2)))
    assert snr_db(by_three, by_two) > 40  # rounding ties flip single codes, no more


def test_pictures_are_made_of_latents(runner: TorchRunner) -> None:
    plain = Sampler(runner, SETTINGS).run(0)
    assert plain.pixels is not None
    assert np.array_equal(plain.pixels, to_pixels(plain.latents))
    decoded = Sampler(runner, SETTINGS, decoder=TwiceAsLarge()).run(0)
    assert decoded.pixels is not None
    assert decoded.pixels.shape == (3, 16, 16, 3)
    assert np.array_equal(decoded.pixels[:, ::2, 1::2], plain.pixels)


def test_latents_without_a_decoder_stay_latents() -> None:
    model = tiny_dit(replace(TINY, in_channels=4))
    assert Sampler(TorchRunner(model), SETTINGS).run(0).pixels is None


class Spoiled:
    """A runner whose output is NaN for some noise, from its second call on."""

    def __init__(self, model: DiT, noise: Tensor) -> None:
        self.model, self.noise, self.odd = TorchRunner(model), noise, torch.zeros(0)
        self.config, self.device, self.description = model.config, torch.device("cpu"), "spoiled"

    def __call__(self, inputs: ModelInputs) -> Tensor:
        latents, timesteps, _ = inputs.values()
        output = self.model(inputs)
        if int(timesteps[0]) == FIRST_TIMESTEP:
            self.odd = (latents - self.noise).flatten(1).abs().amax(dim=1) == 0
        else:
            output[self.odd] = torch.nan
        return output


FIRST_TIMESTEP = 999


def noise_of(seed: int, index: int) -> Tensor:
    return initial_noise(TINY, [image_generator(seed, index)])


@pytest.mark.parametrize(
    ("changes", "noise", "image"),
    [
        ({}, noise_of(5, 4), 4),  # in the second batch
        ({}, noise_of(5, 6), 6),  # what fills the last batch is the same image
        ({"seeds": tuple(range(20, 27))}, noise_of(24, 0), 4),
    ],
    ids=["one seed", "last image", "a seed each"],
)
def test_what_is_not_finite_is_named_by_its_place_in_the_set(
    changes: dict[str, Any], noise: Tensor, image: int
) -> None:
    sampler = Sampler(Spoiled(tiny_dit(), noise), replace(SETTINGS, **changes))
    batch = image // SETTINGS.batch
    message = f"^step 2 of 4, time step 666, image {image}: the latents are not finite"
    with pytest.raises(NonFiniteError, match=message) as caught:
        sampler.run(batch)
    assert caught.value.rows == (image,)
    sampler.run(0)  # other batches are sound


def test_what_fills_a_batch_fails_none() -> None:
    """Images 7 and 8 of 7: no one asked for them."""
    for index in (7, 8):
        Sampler(Spoiled(tiny_dit(), noise_of(5, index)), SETTINGS).run(2)


def test_a_picture_that_is_not_finite_is_named(runner: TorchRunner) -> None:
    class Overflowing(TwiceAsLarge):
        def __call__(self, latents: Tensor) -> Tensor:
            images = super().__call__(latents)
            images[1, 0, 3, 3] = torch.inf
            return images

    sampler = Sampler(runner, SETTINGS, decoder=Overflowing())
    with pytest.raises(NonFiniteError, match=r"^image 4: twice as large made NaN or infinity"):
        sampler.run(1)


def test_cancelling_stops_after_the_step(runner: TorchRunner) -> None:
    cancel, steps = Event(), []

    def on_step(index: int, _timestep: int, _latents: Tensor) -> None:
        steps.append(index)
        if index == 1:
            cancel.set()

    with pytest.raises(CancelledError, match="after step 2"):
        Sampler(runner, SETTINGS).run(0, on_step=on_step, cancel=cancel)
    assert steps == [0, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "batch=0"),
        ({"classes": ()}, "no class"),
        ({"sampler": "ddim", "steps": 30}, "divides 1000"),
        ({"sampler": "euler"}, "does not follow a diffusion"),
        ({"cfg_channels": "2"}, '"3" or "all"'),
    ],
)
def test_settings_that_no_sampler_takes(
    changes: dict[str, object], message: str, runner: TorchRunner
) -> None:
    with pytest.raises(RunnerError, match=message):
        Sampler(runner, replace(SETTINGS, **changes))


def test_classes_and_decoders_that_do_not_fit_the_model(runner: TorchRunner) -> None:
    with pytest.raises(RunnerError, match=r"classes \[10\] are out of range; .* knows 0 to 9"):
        Sampler(runner, replace(SETTINGS, classes=(3, 10)))
    wide = TwiceAsLarge()
    wide.in_channels = 8
    with pytest.raises(RunnerError, match=r"3-channel latents, twice as large takes 8"):
        Sampler(runner, SETTINGS, decoder=wide)
