"""Tasks in a Django project: instances of its models, and the backend of Django's own tasks."""
