"""A model small enough to be measured in a test."""

from fastcm.benchmarks.models import Model

TINY = {
    "resolution": 8,
    "in_channels": 1,
    "out_channels": 1,
    "channels": 8,
    "channel_mult": (1, 2),
    "blocks": 1,
    "attention_resolutions": (4,),
    "head_channels": 8,
    "num_classes": 10,
}
TINY_MODEL = Model("digits", "adm", TINY, cpu_batches=(1,), train_batches={"cpu": (8,)})
