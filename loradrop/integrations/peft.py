"""loradrop inside PEFT: `LoraDropConfig` for `get_peft_model`, and PEFT's own adapters made faster.

    model = get_peft_model(model, LoraDropConfig(r=8, lora_alpha=16, budget=0.5))
    Trainer(model, args, ..., callbacks=[loradrop.LoraDropCallback()]).train()

Importing this registers the adapter type LORADROP in PEFT, which loading such an adapter needs.
"""

from loradrop.formats.peft_file import OURS
from loradrop.integrations.peft_versions import require_peft

require_peft()

from peft import mapping  # noqa: E402

from loradrop.integrations.peft_accelerate import accelerate_peft, restore_peft  # noqa: E402
from loradrop.integrations.peft_config import (  # noqa: E402
    LoraDropConfig,
    from_peft,
    to_peft,
)
from loradrop.integrations.peft_tuner import LoraDropModel  # noqa: E402

__all__ = [
    "LoraDropConfig", "LoraDropModel", "accelerate_peft", "from_peft", "restore_peft", "to_peft",
]  # fmt: skip

mapping.PEFT_TYPE_TO_CONFIG_MAPPING[OURS] = LoraDropConfig  # type: ignore[index]
mapping.PEFT_TYPE_TO_TUNER_MAPPING[OURS] = LoraDropModel  # type: ignore[index]
mapping.PEFT_TYPE_TO_PREFIX_MAPPING[OURS] = LoraDropModel.prefix  # type: ignore[index]
