"""Which tokens are computed when: KV memory, scheduling, sampling. Token ids only, never text."""
