"""Judgements and dialogues in a database: SQLite, or PostgreSQL by its URL."""
