"""Latency of candidates by a table of single operators, each timed once in onnxruntime on the device."""

from mil_cli.measure.operators.listing import OperatorLister
from mil_cli.measure.operators.operator import Operator
from mil_cli.measure.operators.table import OperatorTable

__all__ = ["Operator", "OperatorLister", "OperatorTable"]
