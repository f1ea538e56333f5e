"""The project's settings; the databases and ``OUTBOX`` come from the environment, as JSON."""

from __future__ import annotations

import json
import os

import pymysql

pymysql.install_as_MySQLdb()

SECRET_KEY = "tests"
INSTALLED_APPS = ["outbox.django", "tests.django.shop", "tests.django.project"]
DATABASES = json.loads(os.environ["PROJECT_DATABASES"])
OUTBOX = json.loads(os.environ["PROJECT_OUTBOX"])
MIDDLEWARE = json.loads(os.environ.get("PROJECT_MIDDLEWARE", "[]"))
ROOT_URLCONF = "tests.django.project.project_urls"
ALLOWED_HOSTS = ["127.0.0.1"]
USE_TZ = True
