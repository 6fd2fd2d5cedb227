"""The core: assess and splice parameter dictionaries. Pure functions on tensors."""
