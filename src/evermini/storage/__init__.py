"""What outlives a request: SQLAlchemy models, migrations, and one store per domain. Knows nothing of HTTP or models.

database.py        opens, migrates and runs work on the database (SQLite by default, PostgreSQL by URL)
schema.py          what the tables have in common; pages of a listing
chats.py           stored chat completions
responses.py       responses, their events, and who is working on the unfinished ones
conversations.py   conversations and their items
adapters.py        fine-tuned models: names, where their bytes are, aliases
fine_tuning.py     fine-tuning jobs, their events and checkpoints
migrations/        Alembic: forwards only, applied when a database is opened

A store's methods block. Callers on an event loop go through `Database.run`.
"""
