"""PyTorch-Ignite runs the loop; ice_engine decides when and how your optimizer steps."""

from importlib.metadata import version

from ice_engine.checkpoint import Checkpoint
from ice_engine.clipping import clip_adaptive, clip_norm, clip_value
from ice_engine.diagnostics import AccumulationReport, check_accumulation
from ice_engine.errors import IceEngineError, IceEngineWarning, NonFiniteGradientError, Preempted
from ice_engine.events import OptimizerEvents, StepRecord, optimizer_events
from ice_engine.hooks import HookRegistry
from ice_engine.ledger import Ledger
from ice_engine.log_handler import RecordHandler
from ice_engine.matching import LoadReport
from ice_engine.optimizer import Optimizer
from ice_engine.param_groups import param_groups
from ice_engine.plan import Plan
from ice_engine.processors import Collect, Compose, Processor, dictprocess, schedules
from ice_engine.progress import ProgressBar
from ice_engine.sharded import load_sharded, save_sharded
from ice_engine.tensorboard import TensorBoard
from ice_engine.trainer import create_trainer
from ice_engine.typing import DictProcessor

__version__ = version("ice-engine")

__all__ = [
    "AccumulationReport",
    "Checkpoint",
    "Collect",
    "Compose",
    "DictProcessor",
    "HookRegistry",
    "IceEngineError",
    "IceEngineWarning",
    "Ledger",
    "LoadReport",
    "NonFiniteGradientError",
    "Optimizer",
    "OptimizerEvents",
    "Plan",
    "Preempted",
    "Processor",
    "ProgressBar",
    "RecordHandler",
    "StepRecord",
    "TensorBoard",
    "check_accumulation",
    "clip_adaptive",
    "clip_norm",
    "clip_value",
    "create_trainer",
    "dictprocess",
    "load_sharded",
    "optimizer_events",
    "param_groups",
    "save_sharded",
    "schedules",
]
