"""What Django 5.1 does with ``transaction_mode``, as a database backend for Django before that."""
