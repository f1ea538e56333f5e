"""The results of tasks: the table, what workers write into it, and who waits for it.

Only ``result_row`` and ``open_results`` can be imported without SQLAlchemy.
"""
