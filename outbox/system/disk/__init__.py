"""What outbox asks of folders and disks."""
