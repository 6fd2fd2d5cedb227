"""Readers of published raw formats; one file per format, one row in ``FORMATS``."""
