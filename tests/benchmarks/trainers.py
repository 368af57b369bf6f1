"""The same step by trainers that own the loop; each is imported where it runs, see peers.py.

What they do besides, a checkpoint, a progress bar, a summary, lines of a log, is off.
"""

import logging
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from work import TOTAL, Work


def lightning_trainer(work: Work, batches: Iterator[Any], **where: Any) -> None:
    """Train by Lightning's ``Trainer``; *where* says on which ranks."""
    import lightning as pl
    from lightning.pytorch.loggers import TensorBoardLogger

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.optimizer, self.scheduler = work.by_hand()

        def training_step(self, batch: Any) -> torch.Tensor:
            x, y = batch
            loss = work.loss(self.model(x), y)
            if work.folder:
                self.log("loss", loss)
                self.log("lr", self.optimizer.param_groups[0]["lr"])
            return loss

        def configure_optimizers(self) -> Any:
            schedule = {"scheduler": self.scheduler, "interval": "step"}
            return {"optimizer": self.optimizer, "lr_scheduler": schedule}

    trainer = pl.Trainer(
        max_epochs=1,
        accumulate_grad_batches=work.k,
        gradient_clip_val=1.0,
        logger=TensorBoardLogger(work.log_dir()) if work.folder else False,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"accelerator": "cpu", "devices": 1, **where},
    )
    trainer.fit(Module(), batches)


class _Endless(torch.utils.data.IterableDataset[Any]):
    """Batches, as many as there are, for who asks how many."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return self.batches

    def __len__(self) -> int:
        return TOTAL


def mmengine_runner(work: Work, batches: Iterator[Any]) -> None:
    """Train by mmengine's ``Runner``."""
    from mmengine.model import BaseModel
    from mmengine.optim import LinearLR, OptimWrapper
    from mmengine.runner import Runner

    class Model(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.model = work.model()

        def forward(self, x: torch.Tensor, y: torch.Tensor, mode: str) -> Any:
            return {"loss": work.loss(self.model(x), y)}

    model = Model()
    wrapper = OptimWrapper(work.optimizer(model.parameters()), accumulative_counts=work.k, clip_grad={"max_norm": 1.0})
    logged = {"type": "LoggerHook", "interval": 1} if work.folder else None
    backends = [{"type": "TensorboardVisBackend"}] if work.folder else []
    visualizer = {"type": "Visualizer", "vis_backends": backends}
    with tempfile.TemporaryDirectory() as folder:  # it writes its settings in any case
        runner = Runner(
            model,
            work_dir=work.log_dir() if work.folder else folder,
            train_dataloader=torch.utils.data.DataLoader(_Endless(batches), batch_size=None),
            train_cfg={"by_epoch": True, "max_epochs": 1},
            optim_wrapper=wrapper,
            param_scheduler=LinearLR(wrapper, start_factor=1.0, end_factor=0.0, end=TOTAL, by_epoch=False),
            default_hooks={"logger": logged, "timer": None, "checkpoint": None, "sampler_seed": None},
            visualizer=visualizer,
            log_level="ERROR",
        )
        runner.train()
