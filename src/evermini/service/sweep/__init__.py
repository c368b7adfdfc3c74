"""Sweeps: questions about the whole of a long text, for which all of it is read.

run.py       chooses the way, by the question's words, and writes the prompt that is answered at the end
texts.py     the long texts of a request, and the reading of their windows
records.py   the way "check": a list's records, each asked about by itself
items.py     the way "collect": what each window has for a list
digests.py   the way "note": notes on each window; notes.py makes them honest and short
tally.py     the way "tally": words, counted without a model
windows.py   texts cut into windows or records, each character once
asking.py    many small questions to a model at once; forms.py what replies look like, prompts.py what is said
result.py    what a sweep gives
"""
