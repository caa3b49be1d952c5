"""Families of open models; every file of this folder with a FAMILY is an entry of the table."""

import importlib
import pkgutil

from lm.model.families.family import Family

FAMILIES: dict[str, Family] = {
    found.FAMILY.model_type: found.FAMILY
    for name in sorted(module.name for module in pkgutil.iter_modules(__path__))
    if hasattr(found := importlib.import_module(f"{__name__}.{name}"), "FAMILY")
}
"""model_type -> family, by the order of the files' names: a model that several families hold is written as the first."""
