"""The project as a WSGI application: ``gunicorn examples.shop.django_shop.wsgi``."""

from __future__ import annotations

import os

from django.core.wsgi import get_wsgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "examples.shop.django_shop.settings")
application = get_wsgi_application()
