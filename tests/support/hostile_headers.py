"""Headers of safetensors files that claim what cannot be, over 24 bytes of tensors."""

from __future__ import annotations

from typing import Any

HUGE = 1 << 40
HEADERS: dict[str, dict[str, Any]] = {
    "a huge shape": {"t": {"dtype": "F32", "shape": [HUGE, 16], "data_offsets": [0, 24]}},
    "an overflowing shape": {"t": {"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 0]}},
    "huge offsets": {"t": {"dtype": "F32", "shape": [HUGE], "data_offsets": [0, 4 * HUGE]}},
    "a negative offset": {"t": {"dtype": "F32", "shape": [3, 2], "data_offsets": [-24, 0]}},
    "a negative shape": {"t": {"dtype": "F32", "shape": [-3, -2], "data_offsets": [0, 24]}},
    "offsets that fall": {"t": {"dtype": "F32", "shape": [3, 2], "data_offsets": [24, 0]}},
    "what overlaps": {
        "t": {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]},
        "u": {"dtype": "F32", "shape": [2], "data_offsets": [16, 24]},
    },
    "a gap": {
        "t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "u": {"dtype": "F32", "shape": [2], "data_offsets": [16, 24]},
    },
}
