"""The merge methods: one file per method or family. Importing this package registers all."""

import importlib
import pkgutil

from cki_rec.merging.registry import METHODS

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)

__all__ = ["METHODS"]
