"""Lets torchvision be imported where its compiled operators cannot be loaded.

The registry's wheel of torchvision needs CUDA libraries; beside a CPU build of torch it fails at
import for want of two operator schemas. Models use none of these operators themselves.
"""

from __future__ import annotations

import importlib
import sys

import torch


def import_torchvision() -> bool:
    """Import torchvision, with the schemas it misses; False if it is not installed."""
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return False
    except RuntimeError:  # "operator torchvision::nms does not exist"
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
    return True


_library = torch.library.Library("torchvision", "FRAGMENT")
