"""The shop as a Flask application: ``gunicorn examples.shop.flask_app:app``."""

from __future__ import annotations

from flask import Flask, Response, jsonify, request

from examples.shop.orders import PaymentRefused, place_order
from outbox.middleware.wsgi import OutboxMiddleware

app = Flask(__name__)
app.wsgi_app = OutboxMiddleware(app.wsgi_app)  # type: ignore[method-assign]


@app.post("/orders")
def orders() -> tuple[Response, int]:
    order_id = place_order(request.form["item"], request.form["amount"])
    return jsonify(order_id=order_id), 201


@app.errorhandler(PaymentRefused)
def refused(error: PaymentRefused) -> tuple[Response, int]:
    return jsonify(error=str(error)), 402
