"""What processes of the fork server have imported already: once, instead of seconds each. See tests/distributed.py."""

from __future__ import annotations

import gc
import importlib
import os

from tests.interpreted import import_interpreted
from trunkline.engine.backends import import_deepspeed

import_deepspeed()
if os.environ.get("CUDA_VISIBLE_DEVICES") == "":  # see tests/conftest.py
    import_interpreted()
for _name in (
    "trunkline.engine.trainer",
    "torch._inductor",  # this and the next are what deepspeed.initialize imports
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "transformers.models.llama.modeling_llama",  # this and the next are what a language model's rank imports
    "transformers.models.t5.modeling_t5",
    "transformers.models.resnet.modeling_resnet",  # this and the next are what an image classifier's imports
    "transformers.models.auto.modeling_auto",
    "trunkline.models.causal_lm.task",
    "trunkline.models.fluid.task",
    "trunkline.models.image_classification.task",
    "trunkline.models.seq2seq.task",
    "trunkline.models.token_image.task",
):
    importlib.import_module(_name)
gc.collect()
gc.freeze()  # or each collection in each process would look at all of this, and copy its pages
