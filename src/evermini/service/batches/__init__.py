"""Batches: a file of requests, answered when there is room, their answers in a file.

requests.py   what clients may ask for, and the objects they get
lines.py      the input file: every line checked, and grouped by what its prompt begins with
worker.py     does the lines of a batch, each of them once, and writes the files
"""
