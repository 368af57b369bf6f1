"""What a user may ask of a model before training it: does accumulation change its gradient?"""

from ice_engine.diagnostics.check import AccumulationReport, check_accumulation
from ice_engine.diagnostics.culprits import Finding

__all__ = ["AccumulationReport", "Finding", "check_accumulation"]
