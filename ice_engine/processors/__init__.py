"""Processors: functions from mapping to mapping that change param groups, once per step."""

from ice_engine.processors import schedules
from ice_engine.processors.compose import Collect, Compose
from ice_engine.processors.dictprocess import dictprocess
from ice_engine.processors.processor import Processor

__all__ = ["Collect", "Compose", "Processor", "dictprocess", "schedules"]
