"""``outbox doctor``: examines a set-up, and names what is wrong with it and the remedy."""
