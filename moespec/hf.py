"""The one door to transformers. Import it before any transformers modelling code.

transformers probes for the distribution `kernels`, whose import name is also that of our own package: with the
distribution installed, loading any MoE would import hub kernels from our package and fail. We use none of them, so
transformers is told that there are none before its modelling code is imported.
"""

import transformers.utils
import transformers.utils.import_utils


def _no_hub_kernels(*args: object, **kwargs: object) -> bool:
    return False


transformers.utils.import_utils.is_kernels_available = _no_hub_kernels
transformers.utils.is_kernels_available = _no_hub_kernels

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel  # noqa: E402
from transformers.cache_utils import Cache, CacheLayerMixin  # noqa: E402
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # noqa: E402
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "ALL_EXPERTS_FUNCTIONS",
    "ROPE_INIT_FUNCTIONS",
    "AutoConfig",
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "Cache",
    "CacheLayerMixin",
    "PreTrainedModel",
]
