"""Names that older versions of diffusers gave to the tensors of attention."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_FORMER_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_FORMER = re.compile(rf"(.*attentions\.\d+)\.({'|'.join(_FORMER_NAMES)})\.(weight|bias)")
_PROJECTION = re.compile(r".*attentions\.\d+\.to_(q|k|v|out\.0)\.weight")


def todays_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename what older versions of diffusers saved, and squeeze attention's 1×1 convolutions."""
    renamed = {}
    for name, tensor in tensors.items():
        if former := _FORMER.fullmatch(name):
            name = f"{former[1]}.{_FORMER_NAMES[former[2]]}.{former[3]}"
        if _PROJECTION.fullmatch(name) and tensor.dim() > 2 and tensor.shape[2:].numel() == 1:
            tensor = tensor.reshape(tensor.shape[:2])
        renamed[name] = tensor
    return renamed
