"""Lets torchvision be imported where its compiled operators cannot be loaded.

The registry's wheel of torchvision needs CUDA libraries; beside a CPU build of torch it fails at
import for want of two operator schemas. Models use none of the operators themselves.
"""

from __future__ import annotations

import torch

_library = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, _name):
        _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
