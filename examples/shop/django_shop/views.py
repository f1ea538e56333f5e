"""Orders over HTTP: each is a row, and an event that is committed with it."""

from __future__ import annotations

from django.db import transaction
from django.http import HttpRequest, JsonResponse
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_POST

from examples.shop.django_shop.models import Order
from examples.shop.orders import PaymentRefused, charge
from outbox import enqueue_event


@csrf_exempt
@require_POST
def orders(request: HttpRequest) -> JsonResponse:
    try:
        order_id = place_order(request.POST["item"], request.POST["amount"])
    except PaymentRefused as error:
        return JsonResponse({"error": str(error)}, status=402)
    return JsonResponse({"order_id": order_id}, status=201)


@transaction.atomic
def place_order(item: str, amount: str) -> int:
    order = Order.objects.create(item=item, amount=amount)
    enqueue_event({"order_id": order.pk, "item": item, "amount": amount}, "order.placed")
    charge(amount)
    return int(order.pk)
