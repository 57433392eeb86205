"""Train the bundled PixArt: diffusers' own class on digits, asked for in words.

    python scripts/train_digits_pixart.py --batch 32 --steps 4000 \
        --output ditas_export/dit/bundled/digits-pixart

The condition is a sequence of word vectors with a mask, as of a text encoder. The vocabulary is
our own, five ways to ask for each digit, of two to eight tokens. The vectors are random and fixed;
their channels are as uneven as a text encoder's. What asks for nothing is the end of the sequence
alone. Writes a pipeline's folder, `transformer/` and `scheduler/` as diffusers has them, and the
sequences as `embeddings.safetensors`. Data, loss and optimizer are those of `train_digits.py`.
Initial values: Chen et al., "PixArt-α", ICLR 2024.
"""

from __future__ import annotations

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_digits import CONFIG, DiffusionLoss, train, training_parser

from ditas_export.conditions.embeddings import PromptEmbeddings

WIDTH = 192
HEADS = 6
BLOCKS = 4
CAPTION_CHANNELS = 64

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS = len(WORDS)
WAYS = (
    "{word}",
    "{numeral}",
    "the digit {word}",
    "number {numeral} please",
    "a handwritten {word} in white on black",
)
"""How a digit is asked for. Row 10 k + d of the embeddings asks for the digit d in the way k."""

END, PADDING = "</s>", "<pad>"


def prompts() -> tuple[str, ...]:
    """Return the text of every row."""
    return tuple(
        way.format(word=word, numeral=numeral) for way in WAYS for numeral, word in enumerate(WORDS)
    )


def embed(texts: tuple[str, ...]) -> PromptEmbeddings:
    """Return the word vectors of texts, as long as the longest, and those of no text."""
    sequences = [[*text.split(), END] for text in texts]
    length = max(map(len, sequences))
    vocabulary = sorted({word for sequence in sequences for word in sequence} | {PADDING})
    vectors = word_vectors(len(vocabulary))
    rows = [[*each, *[PADDING] * (length - len(each))] for each in (*sequences, [END])]
    index = torch.tensor([[vocabulary.index(word) for word in row] for row in rows])
    mask = (index != vocabulary.index(PADDING)).long()
    return PromptEmbeddings(
        tensors={"encoder_hidden_states": vectors[index], "encoder_attention_mask": mask},
        has_null=True,
        prompts=texts,
    )


def word_vectors(count: int) -> Tensor:
    """Return (count, CAPTION_CHANNELS) fixed random vectors; channels differ in scale."""
    random = torch.Generator().manual_seed(0)
    scales = torch.randn(CAPTION_CHANNELS, generator=random).exp()
    return torch.randn(count, CAPTION_CHANNELS, generator=random) * scales


class Asked(nn.Module):
    """The transformer, asked by the rows of the embeddings; the row P asks for nothing."""

    def __init__(self, transformer: PixArtTransformer2DModel, embeddings: PromptEmbeddings) -> None:
        super().__init__()
        self.transformer = transformer
        self.embeddings = embeddings

    def forward(self, noisy: Tensor, timestep: Tensor, rows: Tensor) -> Tensor:
        """Return ε and the variance, (N, 2, 16, 16)."""
        asked = self.embeddings.inputs(rows)
        output: Tensor = self.transformer(noisy, timestep=timestep, return_dict=False, **asked)[0]
        return output


def new_transformer() -> PixArtTransformer2DModel:
    """Return the untrained transformer; it starts as if it were asked for nothing."""
    transformer = PixArtTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        in_channels=CONFIG.in_channels,
        out_channels=2 * CONFIG.in_channels,
        num_layers=BLOCKS,
        cross_attention_dim=WIDTH,
        sample_size=CONFIG.input_size,
        patch_size=CONFIG.patch_size,
        caption_channels=CAPTION_CHANNELS,
    )
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for narrow in (transformer.adaln_single, transformer.caption_projection):
        for module in narrow.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
    for block in transformer.transformer_blocks:
        nn.init.zeros_(block.attn2.to_out[0].weight)
    nn.init.zeros_(transformer.proj_out.weight)
    return transformer


class AskedLoss(DiffusionLoss):
    """The loss of digits, each asked for in one of the ways."""

    def __call__(self, model: nn.Module, x_start: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of one batch; the label 10 asks for nothing."""
        ways = torch.randint(len(WAYS), (len(labels),))
        rows = torch.where(labels == DIGITS, len(WAYS) * DIGITS, ways * DIGITS + labels)
        # The fused kernel's backward takes a third of a step on CPUs; 64 tokens need none.
        with sdpa_kernel(SDPBackend.MATH):
            return super().__call__(model, x_start, rows)


def main() -> None:
    """Train as the command line says and write the folder."""
    args = training_parser(str(__doc__).partition("\n")[0]).parse_args()
    embeddings = embed(prompts())
    trained = train(lambda _: Asked(new_transformer(), embeddings), AskedLoss(), args)
    assert isinstance(trained, Asked)
    trained.transformer.half().save_pretrained(args.output / "transformer")
    # As PixArt's own pipelines have it: the noise schedule is that of `DiffusionLoss`.
    scheduler = DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    scheduler.save_pretrained(args.output / "scheduler")
    embeddings.save(args.output / "embeddings.safetensors")
    size = sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file())
    print(f"wrote {args.output}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
