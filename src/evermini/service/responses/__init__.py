"""The Responses API, on top of chat completions: there is one way to generate.

schemas.py      the request and its translation into a chat completion's
items.py        input items: checked, given ids, turned into messages
events.py       deltas of the answer -> events of the stream and items of the output
run.py          one response in flight, from its context to the disk
background.py   responses that outlive their client, and their process
service.py      what the routes call
"""
