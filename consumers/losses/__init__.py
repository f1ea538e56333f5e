"""Messages that are lost with their process: who ran in it, and what begins alone."""
