"""Will speculation pay for this model on this device, with which tree and which budget? Asked before it is loaded."""

from moespec.advise.acceptance import Acceptance, parse_rates, parse_tokens, recorded
from moespec.advise.advice import Advice, advise
from moespec.advise.choice import Choice
from moespec.advise.devices import DEVICE_NAMES, Device, device_of_bandwidth, find_device
from moespec.advise.judgement import Judgement
from moespec.advise.targets import AdvisedTarget
from moespec.advise.unions import read_record

__all__ = [
    "DEVICE_NAMES",
    "Acceptance",
    "Advice",
    "AdvisedTarget",
    "Choice",
    "Device",
    "Judgement",
    "advise",
    "device_of_bandwidth",
    "find_device",
    "parse_rates",
    "parse_tokens",
    "read_record",
    "recorded",
]
