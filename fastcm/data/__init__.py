"""Pictures: from what `--data` names to batches that are a pure function of (seed, nimg).

In: a path, a pattern, an array or a built-in set's name. Out: a `Dataset` (uint8 pictures in a fixed order, labels, a fingerprint) and its
batches. A source is listed (sources, labels, tar_shards, cifar, npz), decoded once by a stated rule (decoding, decode_pool), kept
(image_cache, cache_building) or streamed, and fetched ahead (prefetch). Knows nothing of networks, noise or runs. builtin/ holds the sets
and models that are shipped.
"""
