"""A Django project for processes other than the tests' own: servers, commands and scripts."""
