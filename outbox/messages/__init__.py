"""What travels between publishers and workers, whatever the transport."""
