"""Judges processes: stuck, too busy, dying again and again."""
