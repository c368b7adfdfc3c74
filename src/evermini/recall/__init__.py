"""Recall: find the few passages of a long context that a question needs, at linear cost and once per text."""
