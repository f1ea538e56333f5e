"""A shop: orders are placed over HTTP, invoices follow from them."""
