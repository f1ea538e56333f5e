"""The shop as a Django project: ``python -m examples.shop.django_shop.manage runserver``."""
