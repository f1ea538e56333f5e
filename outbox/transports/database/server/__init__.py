"""What is special of a database server as the broker: its connection, its errors."""
