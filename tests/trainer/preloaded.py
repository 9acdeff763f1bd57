"""What ranks of the tests use, imported once for all of them."""

# ruff: noqa: F401
import gc

# DeepSpeed imports this with its first optimizer, and half of torch with it.
import deepspeed.runtime.zero.muon.muon_optimizer
import transformers.integrations.deepspeed

import tests.trainer.fault_worker
import tests.trainer.gradient_worker
import tests.trainer.rank_worker
import tests.trainer.supervised.rank_worker
import tests.trainer.weight_sync.doomed_trainer

# What is collected in a rank is then not all this again.
gc.freeze()
