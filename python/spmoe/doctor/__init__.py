"""`spmoe doctor`: what this machine has for spmoe, and the cure where something is off."""

from spmoe.doctor.lines import Line, describe
from spmoe.doctor.report import Report, examine

__all__ = ["Line", "Report", "describe", "examine"]
