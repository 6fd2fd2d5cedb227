"""Integrate several trained click-through-rate models into one model of the same size."""

__version__ = "0.1.0"
