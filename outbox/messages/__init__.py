"""Messages between publishers and workers, whatever the transport."""
