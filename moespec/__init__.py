"""MoE-Spec Studio's engine: budgeted expert verification for speculative decoding of Mixture-of-Experts models."""

from moespec.config import BudgetConfig, GenerationConfig, TreeConfig
from moespec.control import Control
from moespec.drafters.base import DraftContext, Drafter
from moespec.engine import Engine, EngineInfo
from moespec.models import EMBEDDED_TARGET
from moespec.policies.base import ExpertPolicy
from moespec.trace import RunSummary, StepTrace, TraceHeader, read_trace, write_trace
from moespec.types import DraftTree, ExpertPlan, RouterScores, TreeContext

__all__ = [
    "EMBEDDED_TARGET",
    "BudgetConfig",
    "Control",
    "DraftContext",
    "DraftTree",
    "Drafter",
    "Engine",
    "EngineInfo",
    "ExpertPlan",
    "ExpertPolicy",
    "GenerationConfig",
    "RouterScores",
    "RunSummary",
    "StepTrace",
    "TraceHeader",
    "TreeConfig",
    "TreeContext",
    "read_trace",
    "write_trace",
]
