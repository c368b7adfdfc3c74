"""Tool calls as text: how each model family writes them, as grammars to hold a model to and as parsers to read it."""
