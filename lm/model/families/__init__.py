"""Families of open models; every file of this folder with a FAMILY is an entry of the table."""

import importlib
import pkgutil

from lm.model.families.family import Family

FAMILIES: dict[str, Family] = {
    found.FAMILY.model_type: found.FAMILY
    for name in sorted(module.name for module in pkgutil.iter_modules(__path__))
    if hasattr(found := importlib.import_module(f"{__name__}.{name}"), "FAMILY")
}
"""model_type -> family, in the order of the file names: a model that several families can express is exported as the first."""
