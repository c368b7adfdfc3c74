"""What outlives a request: SQLAlchemy models, migrations, and one store per domain. Knows nothing of HTTP or models.

database.py        opens, migrates and runs work on the database (SQLite by default, PostgreSQL by URL)
schema.py          what the tables have in common; pages of a listing
chats.py           stored chat completions
responses.py       responses, and the events of those that may be streamed again
conversations.py   conversations and their items
jobs.py            the one queue of work that outlives a request
files.py           files and uploads; blobs.py has their bytes
ingests.py         files that are indexed before anybody asks
batches.py         batches, and the results of their lines
keys.py            API keys and the audit log; usage.py what they used;
                   rate_limits.py what is left of their limits
adapters.py        fine-tuned models: names, where their bytes are, aliases
permissions.py     which projects a fine-tuned model is shared with
fine_tuning.py     fine-tuning jobs; tuning_history.py their events and checkpoints
migrations/        Alembic: forwards only, applied when a database is opened

A store's methods block. Callers on an event loop go through `Database.run`.
"""
