"""Where strings live: tokenizer, chat templates, detokenisation, stop strings."""
