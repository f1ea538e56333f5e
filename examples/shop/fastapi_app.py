"""The shop as a FastAPI application: ``uvicorn examples.shop.fastapi_app:app``."""

from __future__ import annotations

from urllib.parse import parse_qs

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from examples.shop.orders import PaymentRefused, place_order
from outbox.middleware.asgi import OutboxMiddleware

app = FastAPI()
app.add_middleware(OutboxMiddleware)


@app.post("/orders", status_code=201)
async def orders(request: Request) -> dict[str, int]:
    form = parse_qs((await request.body()).decode())
    order_id = await run_in_threadpool(place_order, form["item"][0], form["amount"][0])
    return {"order_id": order_id}


@app.exception_handler(PaymentRefused)
async def refused(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": str(error)}, status_code=402)
