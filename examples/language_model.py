"""Train a small GPT on the manual of Python itself, byte by byte, and see what it would write.

The text is the half million bytes of English that Python ships as pydoc_data.topics. Its paragraphs differ in length,
so micro-batches hold different numbers of bytes: weighed with these, a step is the mean over all bytes of its window.
"""

import gzip
import math
import re
import textwrap
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
import tyro
from ignite.engine import Engine, Events, create_supervised_evaluator
from ignite.handlers import ProgressBar
from ignite.metrics import Loss
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

import ice_engine as ice

CONTEXT = 128  # bytes in a piece of text, at most
BATCH, WINDOW = 8, 2  # pieces in a micro-batch, micro-batches in a window
START, PADDING = 0, -100  # a byte that the text does not have; a target that cross_entropy leaves out


@dataclass(frozen=True)
class Config:
    """What a run is made of."""

    epochs: int = 6
    """Epochs of the whole run; the learning rate falls in its last part, also if a resumed run gets more of them."""
    lr: float = 4e-3
    """Learning rate between the warm-up and the fall at the end."""
    width: int = 128
    """Numbers that stand for a byte inside the network; a multiple of 32."""
    depth: int = 2
    """Blocks of attention and perceptron."""
    bf16: bool = True
    """Compute in bfloat16, by autocast."""
    seed: int = 0
    """Seed of the weights, of the order of the text and of what is written."""
    share: float = 1.0
    """Share of the text, above 0; a small one for a run of seconds."""
    out: Path = Path("runs/language_model")
    """Folder for checkpoints, TensorBoard's files and the ledger; a fresh run replaces the one that is there."""
    resume: bool = False
    """Go on from the last checkpoint in that folder."""


class GPT(nn.Module):
    """Guesses at each place of a text which byte comes next."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.byte, self.place = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        for embedding in (self.byte, self.place):
            nn.init.normal_(embedding.weight, std=0.02)
        block = nn.TransformerEncoderLayer(
            width, width // 32, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map bytes of shape (batch, length) to logits of shape (batch, length, 256)."""
        length = x.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        return self.head(self.blocks(self.byte(x) + self.place.weight[:length], mask, is_causal=True))

    @torch.no_grad()
    def write(self, length: int, seed: int, temperature: float = 0.7) -> str:
        """Draw *length* bytes, at most CONTEXT, from generators of their own: training draws what it would have."""
        drawn, generator = torch.full((1, 1), START), torch.Generator().manual_seed(seed)
        for _ in range(length):
            likely = (self(drawn)[:, -1] / temperature).softmax(-1)
            drawn = torch.cat([drawn, torch.multinomial(likely, 1, generator=generator)], 1)
        return bytes(drawn[0, 1:].tolist()).decode(errors="replace")


def pieces(texts: list[bytes]) -> list[bytes]:
    """Cut texts where paragraphs end, each piece as long as fits; a paragraph that is longer is cut anywhere."""
    pattern = rb"(?s).{1,%d}(?:\n\n|\Z)|.{1,%d}" % (CONTEXT - 2, CONTEXT)
    return [piece for text in texts for piece in re.findall(pattern, text)]


def collate(batch: list[bytes]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return bytes and, for each, the one that comes next; padded to the longest piece."""
    y = [torch.tensor(list(piece)) for piece in batch]
    x = [functional.pad(piece[:-1], (1, 0), value=START) for piece in y]
    return pad_sequence(x, batch_first=True), pad_sequence(y, batch_first=True, padding_value=PADDING)


def count(y: torch.Tensor) -> int:
    """Return how many bytes there are, padding left out."""
    return int((y != PADDING).sum())


def loss_fn(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the mean bits per byte, in full precision whatever autocast made of the logits."""
    return functional.cross_entropy(logits.float().flatten(0, 1), y.flatten(), ignore_index=PADDING) / math.log(2)


def entropy(text: bytes) -> float:
    """Return the bits per byte of a guess that knows how frequent each byte is, and nothing else."""
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values())


def train(config: Config) -> None:
    """Train until the last epoch."""
    torch.manual_seed(config.seed)
    texts = [text.encode() for text in topics.values()]
    held_out, training = pieces(texts[::10]), pieces([text for i, text in enumerate(texts) if i % 10])
    training = training[: math.ceil(config.share * len(training))]
    loader = DataLoader(training, BATCH, shuffle=True, collate_fn=collate)
    held_out_loader = DataLoader(held_out, BATCH, collate_fn=collate)

    model = GPT(config.width, config.depth)
    embeddings = {r"^(byte|place)\.": {"name": "embeddings", "weight_decay": 0.0}}
    groups = ice.param_groups(model, embeddings, {"weight_decay": 0.1}, no_weight_decay=True)
    steps = config.epochs * math.ceil(len(loader) / WINDOW)
    optimizer = ice.Optimizer(
        torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), fused=True),
        accumulation_steps=WINDOW,
        clip=ice.clip_norm(1.0),
        processors=[ice.schedules.wsd(warmup=steps // 20, decay=math.ceil(steps / 4))],
        on_change="replan",  # more --epochs for a resumed run: the learning rate falls at its new end
    )
    trainer = ice.create_trainer(
        model, optimizer, loss_fn, autocast=torch.bfloat16 if config.bf16 else None, weight=lambda x, y: count(y)
    )
    evaluator = create_supervised_evaluator(model, {"loss": Loss(loss_fn, batch_size=count)})
    progress = ProgressBar(disable=None)  # None: only on a terminal
    progress.attach(trainer)

    @trainer.on(Events.EPOCH_COMPLETED)
    def show(engine: Engine) -> None:
        loss = evaluator.run(held_out_loader).metrics["loss"]
        progress.log_message(
            f"epoch {engine.state.epoch:3}   step {engine.state.optimizer_step:4}   held-out loss {loss:.4f}\n"
            + textwrap.indent(model.write(CONTEXT, config.seed), "    | ")
        )

    for records in (ice.TensorBoard(config.out / "tensorboard"), ice.Ledger(config.out / "ledger.jsonl")):
        records.attach(trainer, optimizer, evaluators={"validation": evaluator})
    saved = {"trainer": trainer, "model": model, "optimizer": optimizer}
    checkpoint = ice.Checkpoint(saved, config.out, n_saved=2).attach(trainer)
    if not config.resume:
        for file in config.out.glob("checkpoint_*.pt"):
            file.unlink()
    elif file := checkpoint.resume(trainer):
        print(f"resumed from {file}: epoch {trainer.state.epoch}, step {optimizer.clocks['step']}")
        if trainer.state.epoch >= config.epochs:
            print("this run was complete; --epochs lets it go on")
            return

    started = time.perf_counter()
    trainer.run(loader, max_epochs=config.epochs)
    text = b"".join(held_out)
    print(f"""
trained for        {time.perf_counter() - started:.0f} s, on {len(b"".join(training)):,} bytes
bits per byte      {evaluator.state.metrics["loss"]:.4f} of {len(text):,} held-out bytes
gzip -9            {8 * len(gzip.compress(text)) / len(text):.4f}
bytes one by one   {entropy(text):.4f}
curves             tensorboard --logdir {config.out / "tensorboard"}""")


def main() -> None:
    """Train, as the command line says."""
    train(tyro.cli(Config, description=__doc__))


if __name__ == "__main__":
    main()
