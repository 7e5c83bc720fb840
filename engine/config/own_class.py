"""Classes of a user's own, named in a configuration as "module:Class".

own_class("my_package.optim:Lion", torch.optim.Optimizer)     the class; its module is imported
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from trunkline.engine.config.strict import nearest


def is_own(name: str) -> bool:
    """Whether a name is that of a user's own class."""
    return ":" in name


def own_class(name: str, base: type) -> Any:
    """The class that "module:Class" names. Raises ValueError unless it is there and a subclass of `base`."""
    module_name, _, class_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a module does when it is imported, it is the same news for whoever named it
        raise ValueError(
            f"the module '{module_name}' cannot be imported ({type(error).__name__}: {error}): install it, or put the "
            "folder that holds it on PYTHONPATH"
        ) from error
    found = getattr(module, class_name, None)
    wanted = f"{base.__module__}.{base.__name__}"
    if inspect.isclass(found) and issubclass(found, base):
        return found
    if found is not None:
        raise ValueError(f"{class_name} of the module '{module_name}' is no subclass of {wanted}")
    there = [key for key, value in vars(module).items() if inspect.isclass(value) and issubclass(value, base)]
    raise ValueError(f"the module '{module_name}' has no class '{class_name}'{nearest(class_name, there)}")
