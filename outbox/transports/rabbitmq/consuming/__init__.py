"""Each queue of a subscription: how it is declared and consumed, and the acks of its channel."""
