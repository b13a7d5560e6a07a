"""Will speculation pay for this model on this device, with which tree and which budget? Asked before it is loaded."""

from moespec.advise.advice import Advice, advise

__all__ = ["Advice", "advise"]
