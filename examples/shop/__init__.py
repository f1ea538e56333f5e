"""A shop: it takes orders over HTTP, and sends an invoice for each."""
