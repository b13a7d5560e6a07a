"""MoE-Spec Studio's engine: budgeted expert verification for speculative decoding of Mixture-of-Experts models.

Names are imported when first used: a page can stand before torch and transformers, which take seconds, are loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moespec.batch import Batch
    from moespec.config import EMBEDDED_TARGET, BudgetConfig, GenerationConfig, TreeConfig
    from moespec.control import Control
    from moespec.drafters.base import DraftContext, Drafter
    from moespec.drafters.ngram import NgramDrafter
    from moespec.engine import Engine, EngineInfo
    from moespec.governors import parse_governor
    from moespec.kept_costs import profile_costs
    from moespec.policies.base import ExpertPolicy
    from moespec.policies.parsing import parse_policy
    from moespec.policies.profiles import EMBEDDED_PROFILES
    from moespec.request import Request
    from moespec.trace import RunSummary, StepTrace, TraceHeader, write_trace
    from moespec.trace_reading import read_trace
    from moespec.types import DraftTree, ExpertPlan, RouterScores, TreeContext

_MODULES = {
    "batch": ("Batch",),
    "config": ("EMBEDDED_TARGET", "BudgetConfig", "GenerationConfig", "TreeConfig"),
    "control": ("Control",),
    "drafters.base": ("DraftContext", "Drafter"),
    "drafters.ngram": ("NgramDrafter",),
    "engine": ("Engine", "EngineInfo"),
    "governors": ("parse_governor",),
    "kept_costs": ("profile_costs",),
    "policies.base": ("ExpertPolicy",),
    "policies.parsing": ("parse_policy",),
    "policies.profiles": ("EMBEDDED_PROFILES",),
    "request": ("Request",),
    "trace": ("RunSummary", "StepTrace", "TraceHeader", "write_trace"),
    "trace_reading": ("read_trace",),
    "types": ("DraftTree", "ExpertPlan", "RouterScores", "TreeContext"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "EMBEDDED_PROFILES",
    "EMBEDDED_TARGET",
    "Batch",
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
    "NgramDrafter",
    "Request",
    "RouterScores",
    "RunSummary",
    "StepTrace",
    "TraceHeader",
    "TreeConfig",
    "TreeContext",
    "parse_governor",
    "parse_policy",
    "profile_costs",
    "read_trace",
    "write_trace",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'moespec' has no attribute {name!r}")
    return getattr(importlib.import_module(f"moespec.{_MODULE_OF[name]}"), name)
