"""The kernel, for releases of the library that look for it in a folder of its name."""

import importlib.util
import sys
from pathlib import Path

_PLACE = Path(__file__).parents[1] / "__init__.py"
_SPEC = importlib.util.spec_from_file_location(f"{__name__}_{hash(_PLACE):x}".replace("-", "_"), _PLACE)
_MODULE = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = _MODULE
_SPEC.loader.exec_module(_MODULE)

__all__ = _MODULE.__all__
globals().update({name: getattr(_MODULE, name) for name in __all__})
